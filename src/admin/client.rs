//! Asking a running proxy: one request over HTTP, one answer.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any answer of ours has.
const ANSWER_LIMIT: u64 = 64 * 1024;

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens there, or the connection broke.
    #[error("cannot reach {address}")]
    Io {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something else listens there.
    #[error("what listens on {address} does not speak HTTP")]
    NotHttp {
        /// Where.
        address: SocketAddr,
    },
    /// The answer takes too long.
    #[error("no answer from {address} within {} s", PATIENCE.as_secs())]
    TimedOut {
        /// Where.
        address: SocketAddr,
    },
}

/// Sends `method path` and reads the answer.
pub async fn ask(address: SocketAddr, method: &str, path: &str) -> Result<Answer, AskError> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER_LIMIT).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    let answer = timeout(PATIENCE, exchange)
        .await
        .map_err(|_| AskError::TimedOut { address })?
        .map_err(|source| AskError::Io { address, source })?;
    parse(&String::from_utf8_lossy(&answer)).ok_or(AskError::NotHttp { address })
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
    fn only_an_http_answer_is_one() {
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
