//! Bytes between a client and Postgres, after login; nothing is looked at.
//!
//! Either side's end becomes the other's: a client's FIN is passed on and replies still flow, Postgres's end closes the
//! client's connection after its final error.

use std::sync::Arc;

use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::TcpStream,
    sync::watch,
    time::timeout,
};
use tokio_rustls::server::TlsStream;

use super::connection::{LINGER, linger, reset};
use crate::emulator::{
    compute::Compute,
    endpoint::Endpoint,
    faults::{Action, Struck},
    loss,
    postgres::Stream,
    sessions::{Disruption, Session},
};

/// Bytes moved at a time.
const BUFFER: usize = 64 * 1024;

/// The message with which a client leaves.
const TERMINATE: &[u8] = b"X\0\0\0\x04";

/// A session that is logged in, and the fault in store for it.
pub(super) struct Running {
    pub(super) session: Session,
    pub(super) fault: Option<Struck>,
    pub(super) endpoint: Arc<Endpoint>,
}

/// How a relay ended.
enum End {
    /// Postgres closed; its final error was passed on.
    Server,
    /// One side broke off, or a fault requires it.
    Abrupt,
    Reset,
    /// These bytes are the last.
    Send(Vec<u8>),
}

/// Runs until either side ends.
pub(super) async fn run(
    mut tls: TlsStream<TcpStream>,
    mut server: Box<dyn Stream>,
    running: Running,
) {
    let Running {
        mut session,
        fault,
        endpoint,
    } = running;
    let end = pass(
        &mut tls,
        &mut server,
        fault,
        &mut session.disrupted,
        &endpoint.compute,
    )
    .await;
    // Postgres first: what it holds must not wait for the client.
    drop(server);
    match end {
        // The session last: once it is no longer counted, its client's connection has ended.
        End::Abrupt => drop(tls),
        End::Reset => {
            reset(tls.get_ref().0);
            drop(tls);
        }
        End::Server => {
            drop(session);
            linger(&mut tls).await;
        }
        End::Send(bytes) => {
            drop(session);
            let _ = timeout(LINGER, async {
                tls.write_all(&bytes).await?;
                tls.flush().await
            })
            .await;
            linger(&mut tls).await;
        }
    }
}

async fn pass(
    tls: &mut TlsStream<TcpStream>,
    server: &mut Box<dyn Stream>,
    fault: Option<Struck>,
    disrupted: &mut watch::Receiver<Disruption>,
    compute: &Compute,
) -> End {
    // For the faults of the network, once more: the stream itself is split.
    let socket = SockRef::from(tls.get_ref().0).try_clone().ok();
    let (mut client_read, mut client_write) = split(tls);
    let (mut server_read, mut server_write) = split(server);
    let limit = fault.as_ref().map(|fault| fault.after_bytes);
    let up = pump(&mut client_read, &mut server_write, None, compute);
    let down = pump(&mut server_read, &mut client_write, limit, compute);
    tokio::pin!(up, down);
    let mut is_up_open = true;
    loop {
        tokio::select! {
            ended = &mut down => match ended {
                Ok(Pumped::End) => return End::Server,
                Ok(Pumped::Limit) => match fault.map(|fault| (fault.action, fault.cleared)) {
                    Some((Action::Reset, _)) => return End::Reset,
                    Some((Action::Error(error), _)) => return End::Send(error.encode()),
                    Some((Action::Answer(text), _)) => return End::Send(text.into_bytes()),
                    Some((action @ (Action::Stall | Action::Blackhole), mut cleared)) => {
                        let is_lost = action == Action::Blackhole;
                        if let (true, Some(socket)) = (is_lost, &socket) {
                            loss::begin(socket);
                        }
                        // Nothing flows any more; the disruption table can still end it.
                        let is_end = |state: &Disruption| matches!(state, Disruption::Close | Disruption::Reset);
                        tokio::select! {
                            _ = disrupted.wait_for(is_end) => {}
                            () = cleared.wait() => {}
                        }
                        return if is_lost { End::Reset } else { End::Abrupt };
                    }
                    _ => return End::Abrupt,
                },
                Err(_) => return End::Abrupt,
            },
            ended = &mut up, if is_up_open => match ended {
                // A Postgres that accepts no more input may still send a final error.
                Ok(_) | Err(Broken::Write) => is_up_open = false,
                Err(Broken::Read) => return End::Abrupt,
            },
            _ = disrupted.changed() => match hold(disrupted, socket.as_ref()).await {
                Disruption::Reset => return End::Reset,
                Disruption::Close => return End::Abrupt,
                Disruption::None | Disruption::Stall | Disruption::Blackhole => {}
            },
        }
    }
}

/// Waits while nothing is to flow; returns what comes after. Not cancel safe.
async fn hold(disrupted: &mut watch::Receiver<Disruption>, socket: Option<&Socket>) -> Disruption {
    let mut is_lost = false;
    loop {
        let state = *disrupted.borrow_and_update();
        let must_be_lost = state == Disruption::Blackhole;
        if let Some(socket) = socket {
            match (is_lost, must_be_lost) {
                (false, true) => loss::begin(socket),
                (true, false) => loss::end(socket),
                _ => {}
            }
        }
        is_lost = must_be_lost;
        if !matches!(state, Disruption::Stall | Disruption::Blackhole) {
            return state;
        }
        if disrupted.changed().await.is_err() {
            return Disruption::Close;
        }
    }
}

enum Pumped {
    End,
    Limit,
}

/// Which side of a pump failed.
enum Broken {
    Read,
    Write,
}

/// Moves bytes until the reader ends, whose end is passed on, or `limit` bytes have gone. Not cancel safe.
async fn pump<R, W>(
    reader: &mut R,
    writer: &mut W,
    limit: Option<u64>,
    compute: &Compute,
) -> Result<Pumped, Broken>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut left = limit.unwrap_or(u64::MAX);
    let mut buffer = vec![0; BUFFER];
    loop {
        if left == 0 {
            return Ok(Pumped::Limit);
        }
        let wanted = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
        let free = buffer.get_mut(..wanted).unwrap_or_default();
        let read = reader.read(free).await.map_err(|_| Broken::Read)?;
        if read == 0 {
            writer.shutdown().await.map_err(|_| Broken::Write)?;
            return Ok(Pumped::End);
        }
        let bytes = buffer.get(..read).unwrap_or_default();
        // To the compute's monitor a backend that leaves is only gone.
        if bytes != TERMINATE {
            compute.touch();
        }
        writer.write_all(bytes).await.map_err(|_| Broken::Write)?;
        writer.flush().await.map_err(|_| Broken::Write)?;
        left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
    }
}
