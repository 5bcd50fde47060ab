//! One HTTP/1.1 request, written by hand.

use axum::http::{HeaderMap, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Sends a request to the emulator, whose answers have a `Content-Length`.
pub(crate) async fn forward(
    emulator: &str,
    head: &str,
    body: &[u8],
) -> (StatusCode, HeaderMap, Vec<u8>) {
    let mut stream = TcpStream::connect(emulator).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let split = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap();
    let head = String::from_utf8(answer[..split].to_vec()).unwrap();
    let mut lines = head.lines();
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| !matches!(*name, "connection" | "content-length" | "transfer-encoding"))
        .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
        .collect();
    (status, headers, answer[split + 4..].to_vec())
}
