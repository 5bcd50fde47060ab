//! The way to a session taken step by step, for `doctor`: each step alone says how it went.
//!
//! The steps are those of every login; nothing here is done differently but told apart.

use std::{io, net::SocketAddr};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    dial,
    endpoint::{Endpoint, Security, is_loopback},
    failure::Failure,
    login,
    phases::Progress,
};
use crate::{
    config::Keepalive,
    credential::Credential,
    protocol::{
        error::ErrorFields,
        frame::{tag, take_message},
        options::SessionSettings,
    },
    telemetry::Metrics,
};

pub use super::dial::Stream;

/// More than any answer that is asked for here.
const ANSWER_LIMIT: usize = 64 * 1024;

/// The endpoint's addresses.
pub async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
    dial::resolve(host, port).await
}

/// A connection to whichever address answers first.
pub async fn connect(addresses: Vec<SocketAddr>) -> Result<TcpStream, Failure> {
    dial::connect(addresses).await.map(|(tcp, _)| tcp)
}

/// TLS on it, verified.
pub async fn secure(
    tcp: TcpStream,
    endpoint: &Endpoint,
    metrics: &Metrics,
) -> Result<Stream, Failure> {
    dial::secure(tcp, endpoint, &Keepalive::default(), metrics).await
}

/// A logged-in connection that can be asked small questions.
#[derive(Debug)]
pub struct Session {
    stream: Stream,
    buffer: BytesMut,
}

/// One row of an answer, as text.
pub type Row = Vec<Option<String>>;

impl Session {
    /// Logs in.
    pub async fn log_in(
        mut stream: Stream,
        endpoint: &Endpoint,
        credential: &Credential,
        settings: &SessionSettings,
    ) -> Result<Self, Failure> {
        let may_send_cleartext = match (&endpoint.security, &stream) {
            (Security::Tls { .. }, _) => true,
            (Security::Plain, Stream::Plain(socket)) => socket
                .peer_addr()
                .is_some_and(|address| is_loopback(address.ip())),
            (Security::Plain, Stream::Tls(_)) => false,
        };
        let startup = settings.startup(&endpoint.user, |_| false)?;
        let progress = Progress::default();
        let exchange = login::exchange(
            &mut stream,
            &endpoint.user,
            credential,
            settings,
            &startup,
            may_send_cleartext,
            &progress,
        );
        let (_, buffer) = exchange
            .await
            .map_err(|failure| failure.explain(endpoint, credential, settings))?;
        Ok(Self { stream, buffer })
    }

    /// Asks one question by the simple protocol. Not cancel safe.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>, Failure> {
        let length = u32::try_from(sql.len().saturating_add(5)).unwrap_or(u32::MAX);
        let frame = [
            &[tag::QUERY][..],
            &length.to_be_bytes(),
            sql.as_bytes(),
            b"\0",
        ]
        .concat();
        self.send(&frame).await?;
        let mut rows = Vec::new();
        let mut error = None;
        let mut read = 0_usize;
        loop {
            while let Some(message) = take_message(&mut self.buffer, ANSWER_LIMIT)? {
                match message.tag {
                    DATA_ROW => rows.extend(row(message.body())),
                    tag::ERROR_RESPONSE => {
                        error = Some(Failure::server(ErrorFields::parse(message.body()), []));
                    }
                    tag::READY_FOR_QUERY => return error.map_or(Ok(rows), Err),
                    _ => {}
                }
            }
            let more = self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .map_err(|error| Failure::broken(&error))?;
            read = read.saturating_add(more);
            if more == 0 {
                let ended = Failure::broken(&io::ErrorKind::UnexpectedEof.into());
                return Err(error.unwrap_or(ended));
            }
            if read > ANSWER_LIMIT {
                return Err(Failure::protocol("the server's answer does not end"));
            }
        }
    }

    /// Says goodbye; what goes wrong now does not matter.
    pub async fn end(mut self) {
        let _ = self.send(&[tag::TERMINATE, 0, 0, 0, 4]).await;
        let _ = self.stream.shutdown().await;
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        sent.await.map_err(|error| Failure::broken(&error))
    }
}

const DATA_ROW: u8 = b'D';

/// The columns of a DataRow; `None` for a body that is none.
fn row(mut body: &[u8]) -> Option<Row> {
    let columns = body.try_get_u16().ok()?;
    let mut row = Vec::new();
    for _ in 0..columns {
        let length = body.try_get_i32().ok()?;
        let Ok(length) = usize::try_from(length) else {
            row.push(None);
            continue;
        };
        let (value, rest) = body.split_at_checked(length)?;
        body = rest;
        row.push(Some(String::from_utf8_lossy(value).into_owned()));
    }
    Some(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_and_a_torn_one_is_none() {
        let body = [0, 3, 0, 0, 0, 1, b'x', 255, 255, 255, 255, 0, 0, 0, 0];
        assert_eq!(
            row(&body),
            Some(vec![Some("x".to_owned()), None, Some(String::new())])
        );
        for end in 0..body.len() {
            assert_eq!(row(&body[..end]), None, "{end}");
        }
    }
}
