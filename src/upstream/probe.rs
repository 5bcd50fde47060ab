//! The steps of a login one by one, for `doctor`, which reports on each.

use std::net::SocketAddr;

use bytes::{Buf, BytesMut};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::{dial, endpoint::Endpoint, failure::Failure, login::Login};
use crate::{
    config::Keepalive,
    credential::Credential,
    net::message::{read_message, write_and_flush},
    protocol::{
        error::ErrorFields,
        frame::tag,
        options::LoginParameters,
        startup::{query, terminate},
    },
    telemetry::Metrics,
};

pub(crate) use super::dial::{Stream, resolve};

/// Upper limit of one query's response; doctor's queries return a few rows.
const RESPONSE_LIMIT: usize = 64 * 1024;

/// Connects to the first address that accepts.
pub(crate) async fn connect(addresses: Vec<SocketAddr>) -> Result<TcpStream, Failure> {
    dial::connect(addresses).await.map(|(tcp, _)| tcp)
}

/// Negotiates verified TLS.
pub(crate) async fn secure(
    tcp: TcpStream,
    endpoint: &Endpoint,
    metrics: &Metrics,
) -> Result<Stream, Failure> {
    dial::secure(tcp, endpoint, &Keepalive::default(), metrics).await
}

/// A logged-in connection for small queries.
#[derive(Debug)]
pub(crate) struct Session {
    stream: Stream,
    buffer: BytesMut,
}

/// One result row, as text.
pub(crate) type Row = Vec<Option<String>>;

impl Session {
    /// Logs in.
    pub(crate) async fn log_in(
        mut stream: Stream,
        endpoint: &Endpoint,
        credential: &Credential,
        parameters: &LoginParameters,
    ) -> Result<Self, Failure> {
        let may_send_cleartext = stream.may_send_cleartext();
        // doctor sends parameters of its own only, none of which a server refuses.
        let startup = parameters.startup(&endpoint.user, |_| false)?;
        let login = Login::new(&endpoint.user, credential, parameters);
        let greeting = login
            .exchange(&mut stream, &startup, may_send_cleartext)
            .await
            .map_err(|failure| failure.explain(endpoint, credential, parameters))?;
        Ok(Self {
            stream,
            buffer: greeting.leftover,
        })
    }

    /// Runs one query by the simple protocol. Not cancel safe.
    pub(crate) async fn query(&mut self, sql: &str) -> Result<Vec<Row>, Failure> {
        let query = query(sql).ok_or_else(|| Failure::protocol("zero byte in a query"))?;
        self.send(&query).await?;
        let mut rows = Vec::new();
        let mut error = None;
        let mut received = 0_usize;
        while received <= RESPONSE_LIMIT {
            let message = read_message(&mut self.stream, &mut self.buffer, RESPONSE_LIMIT);
            let message = match message.await {
                Ok(message) => message,
                Err(broken) => return Err(error.unwrap_or_else(|| broken.into())),
            };
            received = received.saturating_add(message.frame.len());
            match message.tag {
                tag::DATA_ROW => rows.extend(row(message.body())),
                tag::ERROR_RESPONSE => {
                    error = Some(Failure::server(ErrorFields::parse(message.body()), []));
                }
                tag::READY_FOR_QUERY => return error.map_or(Ok(rows), Err),
                _ => {}
            }
        }
        Err(Failure::protocol(
            "the server's response is longer than 64 KiB",
        ))
    }

    /// Ends the session; errors no longer matter.
    pub(crate) async fn end(mut self) {
        let _ = self.send(&terminate()).await;
        let _ = self.stream.shutdown().await;
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        write_and_flush(&mut self.stream, bytes)
            .await
            .map_err(|error| Failure::broken(&error))
    }
}

/// The columns of a DataRow; `None` if the body is malformed.
fn row(mut body: &[u8]) -> Option<Row> {
    let columns = body.try_get_u16().ok()?;
    let mut row = Vec::new();
    for _ in 0..columns {
        let length = body.try_get_i32().ok()?;
        // -1 stands for NULL.
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
    fn a_row_is_parsed_and_a_truncated_one_is_not() {
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
