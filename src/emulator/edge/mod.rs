//! What answers on the endpoint's port before Postgres does.
//!
//! Owns the listener and one task per connection; follows what is known of Lakebase's front: TLS by `SSLRequest` only, a
//! server name required, protocol 3.0 exactly, the token as a cleartext password, replaced cancel keys. After login it
//! passes bytes and looks at none.

mod connection;
mod error;
mod login;
mod relay;
mod wire;

use std::{io, net::IpAddr, net::Ipv4Addr, net::Ipv6Addr, sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
    time::sleep,
};

pub use error::ServerError;

use super::{EmulatorError, settings::Settings, shared::Shared};

/// How often a pair of free ports is looked for when any will do.
const PORT_ATTEMPTS: usize = 20;
/// Pause after an accept error such as "too many open files".
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// The edge's sockets: 127.0.0.1 and, where the machine has it, ::1 on the same port, since `localhost` may mean either.
pub(super) struct Listeners {
    v4: Listener,
    v6: Option<Listener>,
    pub(super) port: u16,
}

/// A listening socket, and one that keeps its port while that is closed.
struct Listener {
    socket: TcpListener,
    reserved: Option<TcpSocket>,
}

impl Listeners {
    /// Binds `port`; 0 means any that is free on both.
    pub(super) fn bind(port: u16) -> Result<Self, EmulatorError> {
        let mut attempts = if port == 0 { PORT_ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            let v4 = Listener::bind(Ipv4Addr::LOCALHOST.into(), port)
                .map_err(|source| EmulatorError::Bind { port, source })?;
            let chosen = v4
                .socket
                .local_addr()
                .map_err(|source| EmulatorError::Bind { port, source })?
                .port();
            match Listener::bind(Ipv6Addr::LOCALHOST.into(), chosen) {
                Ok(v6) => {
                    return Ok(Self {
                        v4,
                        v6: Some(v6),
                        port: chosen,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    return Err(EmulatorError::Bind {
                        port: chosen,
                        source: error,
                    });
                }
                // No IPv6 here.
                Err(_) => {
                    return Ok(Self {
                        v4,
                        v6: None,
                        port: chosen,
                    });
                }
            }
        }
    }

    /// Closes the listening sockets; returns what keeps their port.
    fn close(self) -> Vec<TcpSocket> {
        let listeners = [Some(self.v4), self.v6].into_iter().flatten();
        listeners.filter_map(|it| it.reserved).collect()
    }

    async fn accept(&self) -> io::Result<TcpStream> {
        let from_v6 = async {
            match &self.v6 {
                Some(listener) => listener.socket.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = self.v4.socket.accept() => accepted,
            accepted = from_v6 => accepted,
        }
        .map(|(stream, _)| stream)
    }
}

impl Listener {
    fn bind(address: IpAddr, port: u16) -> io::Result<Self> {
        // Linux gives a bound port to no other program, and lets several sockets bind it of which one listens. Elsewhere the
        // port is anyone's while it is closed.
        let reserved = if cfg!(target_os = "linux") {
            Some(bind(address, port)?)
        } else {
            None
        };
        let port = match &reserved {
            Some(reserved) => reserved.local_addr()?.port(),
            None => port,
        };
        Ok(Self {
            socket: bind(address, port)?.listen(BACKLOG)?,
            reserved,
        })
    }
}

fn bind(address: IpAddr, port: u16) -> io::Result<TcpSocket> {
    let address = std::net::SocketAddr::new(address, port);
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        SockRef::from(&socket).set_only_v6(true)?;
    }
    socket.bind(address)?;
    Ok(socket)
}

/// Accepts until stopped; closes and reopens the port according to the settings.
pub(super) async fn serve(mut listeners: Listeners, shared: Arc<Shared>) {
    let port = listeners.port;
    let mut settings = shared.settings.subscribe();
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => return,
            is_open = until(&mut settings, false) => if is_open { None } else { return },
            accepted = listeners.accept() => Some(accepted),
        };
        match accepted {
            Some(Ok(stream)) => {
                let connection = connection::serve(stream, Arc::clone(&shared));
                shared
                    .tracker
                    .spawn(shared.stop.clone().run_until_cancelled_owned(connection));
                continue;
            }
            Some(Err(_)) => {
                sleep(ACCEPT_BACKOFF).await;
                continue;
            }
            None => {}
        }
        // Until it is bound again.
        let _reserved = listeners.close();
        let reopened = shared
            .stop
            .run_until_cancelled(until(&mut settings, true))
            .await;
        if reopened != Some(true) {
            return;
        }
        listeners = loop {
            match Listeners::bind(port) {
                Ok(listeners) => break listeners,
                Err(error) => {
                    tracing::warn!(%error, "cannot listen again");
                    if shared
                        .stop
                        .run_until_cancelled(sleep(ACCEPT_BACKOFF))
                        .await
                        .is_none()
                    {
                        return;
                    }
                }
            }
        };
    }
}

/// Waits until the settings enable or disable the listener; `false` if they are gone. Cancel safe.
async fn until(settings: &mut watch::Receiver<Settings>, is_listening: bool) -> bool {
    settings
        .wait_for(|settings| settings.is_listening == is_listening)
        .await
        .is_ok()
}
