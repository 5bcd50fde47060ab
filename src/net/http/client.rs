//! One HTTP request to a running proxy.
//!
//! Not by reqwest, whose client needs TLS roots: a container may have none, and this request is in cleartext.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::telemetry::chain;

const TIMEOUT: Duration = Duration::from_secs(5);
/// More than any answer of the proxy: its metrics are 50 KiB for each endpoint.
const ANSWER_LIMIT: u64 = 4 * 1024 * 1024;

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The HTTP status.
    pub(crate) status: u16,
    /// The body.
    pub(crate) body: String,
}

/// Sends `method path` and reads the answer; the error is its text.
pub(crate) async fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
) -> Result<Answer, String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        // `connection: close` makes the end of the stream the end of the answer.
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_LIMIT).read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = timeout(TIMEOUT, exchange)
        .await
        .map_err(|_| format!("no answer from {address} within {} s", TIMEOUT.as_secs()))?
        .map_err(|error| format!("cannot reach {address}: {}", chain(&error)))?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| format!("what listens on {address} does not speak HTTP"))
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut words = head.lines().next()?.split(' ');
    if !words.next()?.starts_with("HTTP/1.") {
        return None;
    }
    Some(Answer {
        status: words.next()?.parse().ok()?,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_http_response_is_parsed() {
        let answer = parse("HTTP/1.1 503 Service Unavailable\r\nvary: accept\r\n\r\nerror\n");
        assert_eq!(
            answer,
            Some(Answer {
                status: 503,
                body: "error\n".to_owned()
            })
        );
        for other in [
            "",
            "SSH-2.0-x\r\n",
            "E\0\0\0",
            "HTTP/1.1\r\n\r\n",
            "HTTP/1.1 x\r\n\r\n",
        ] {
            assert_eq!(parse(other), None, "{other:?}");
        }
    }
}
