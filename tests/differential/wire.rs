//! A client of messages that reads exactly what a step is answered with, and shows it without what differs between connections.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, path::Path, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::program::Message;

/// Far longer than any statement takes, and than other clients' pins last.
const TIMEOUT: Duration = Duration::from_secs(30);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A session.
pub(super) struct Wire {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    /// What the server has reported last.
    parameters: BTreeMap<String, String>,
    /// After an error in an extended query, up to the next Sync.
    is_skipping: bool,
    has_failed: bool,
}

/// Which of several errors is first depends on whether the connection has the statement.
const IN_FAILED: &str = "E in a failed transaction";

/// The end of a connection, or none within [`TIMEOUT`], as the last reply of a step.
#[derive(Debug, PartialEq, Eq)]
struct Over(String);

impl Wire {
    /// A session by way of the proxy.
    pub(super) async fn proxied(address: SocketAddr, database: &str) -> Result<Self, String> {
        let stream = TcpStream::connect(address).await;
        let stream = stream.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).ok();
        Self::start(Box::new(stream), "anyone", database).await
    }

    /// A session at the server itself, without a password.
    pub(super) async fn direct(
        directory: &Path,
        user: &str,
        database: &str,
    ) -> Result<Self, String> {
        let stream = UnixStream::connect(directory.join(".s.PGSQL.5432")).await;
        let stream = stream.map_err(|error| error.to_string())?;
        Self::start(Box::new(stream), user, database).await
    }

    async fn start(stream: Box<dyn Stream>, user: &str, database: &str) -> Result<Self, String> {
        let mut wire = Self {
            stream,
            buffer: BytesMut::new(),
            parameters: BTreeMap::new(),
            is_skipping: false,
            has_failed: false,
        };
        let body =
            format!("user\0{user}\0database\0{database}\0application_name\0differential\0\0");
        let length = u32::try_from(body.len() + 8).unwrap();
        let startup = [
            &length.to_be_bytes()[..],
            &0x0003_0000_u32.to_be_bytes(),
            body.as_bytes(),
        ];
        wire.stream
            .write_all(&startup.concat())
            .await
            .map_err(|error| error.to_string())?;
        let mut replies = Vec::new();
        match wire.until('Z', &mut replies).await {
            Ok('Z') => Ok(wire),
            other => Err(format!("login: {other:?} {replies:?}")),
        }
    }

    /// What the server has reported of its settings.
    pub(super) fn parameters(&self) -> &BTreeMap<String, String> {
        &self.parameters
    }

    /// The first column of a statement's rows. It must succeed.
    pub(super) async fn query(&mut self, sql: &str) -> Vec<String> {
        let replies = self.step(&[Message::Query(sql.to_owned())], &[]).await;
        assert!(
            !replies.iter().any(|reply| reply.starts_with(['E', '!'])),
            "{sql}: {replies:?}"
        );
        replies
            .into_iter()
            .filter(|reply| reply.starts_with('D'))
            .collect()
    }

    /// Sends the messages of a step in pieces that end at `cuts`, and returns the replies to them.
    pub(super) async fn step(&mut self, messages: &[Message], cuts: &[usize]) -> Vec<String> {
        let bytes: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
        let mut replies = Vec::new();
        let read = match self.send(&bytes, cuts).await {
            Ok(()) => self.replies(messages, &mut replies).await,
            Err(error) => Err(Over(error.to_string())),
        };
        if let Err(Over(reason)) = read {
            replies.push(format!("! {reason}"));
        }
        replies
    }

    /// Leaves without reading what else the server sends.
    pub(super) async fn leave(mut self, is_orderly: bool) {
        if is_orderly {
            self.stream.write_all(b"X\0\0\0\x04").await.ok();
        }
    }

    /// Sends the messages and leaves; returns what the server sends until it closes.
    pub(super) async fn finish(mut self, messages: &[Message]) -> Vec<String> {
        let mut bytes: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
        bytes.extend(b"X\0\0\0\x04");
        let mut replies = Vec::new();
        let mut read = self
            .send(&bytes, &[])
            .await
            .map_err(|error| Over(error.to_string()));
        while read.is_ok() {
            let tag = self.reply(&mut replies).await;
            if tag == Ok('E') && self.has_failed {
                replies.pop();
                replies.push(IN_FAILED.to_owned());
            }
            if tag == Ok('G') {
                // Within a COPY, a server takes the Terminate for an error.
                self.stream.shutdown().await.ok();
            }
            read = tag.map(drop);
        }
        if let Err(Over(reason)) = read {
            replies.push(format!("! {reason}"));
        }
        replies
    }

    async fn send(&mut self, bytes: &[u8], cuts: &[usize]) -> std::io::Result<()> {
        let mut sent = 0;
        for &cut in cuts {
            let cut = cut.clamp(sent, bytes.len());
            self.stream.write_all(&bytes[sent..cut]).await?;
            self.stream.flush().await?;
            tokio::time::sleep(Duration::from_micros(200)).await;
            sent = cut;
        }
        self.stream.write_all(&bytes[sent..]).await?;
        self.stream.flush().await
    }

    /// The replies to these messages, by the rules of the protocol.
    async fn replies(
        &mut self,
        messages: &[Message],
        replies: &mut Vec<String>,
    ) -> Result<(), Over> {
        let mut messages = messages.iter();
        while let Some(message) = messages.next() {
            let ends = match message {
                Message::Sync => {
                    self.is_skipping = false;
                    self.until('Z', replies).await?;
                    continue;
                }
                _ if self.is_skipping => continue,
                Message::Query(_) | Message::FunctionCall(_) => {
                    loop {
                        match self.reply(replies).await? {
                            'G' => end_copy(&mut messages),
                            'Z' => break,
                            _ => {}
                        }
                    }
                    continue;
                }
                Message::Flush
                | Message::CopyData(_)
                | Message::CopyDone
                | Message::CopyFail(_) => continue,
                Message::Parse { .. } => "1",
                Message::Bind { .. } => "2",
                Message::CloseStatement(_) | Message::ClosePortal(_) => "3",
                Message::DescribeStatement(_) | Message::DescribePortal(_) => "Tn",
                Message::Execute { .. } => "CsIG",
            };
            let mut tag = self.until_one_of(ends, replies).await?;
            if tag == 'G' {
                end_copy(&mut messages);
                tag = self.until_one_of("C", replies).await?;
            }
            self.is_skipping = tag == 'E';
            if self.is_skipping && self.has_failed {
                replies.pop();
                replies.push(IN_FAILED.to_owned());
            }
        }
        Ok(())
    }

    async fn until(&mut self, tag: char, replies: &mut Vec<String>) -> Result<char, Over> {
        loop {
            if self.reply(replies).await? == tag {
                return Ok(tag);
            }
        }
    }

    /// Up to a reply with one of these tags, or an error.
    async fn until_one_of(&mut self, tags: &str, replies: &mut Vec<String>) -> Result<char, Over> {
        loop {
            let tag = self.reply(replies).await?;
            if tag == 'E' || tags.contains(tag) {
                return Ok(tag);
            }
        }
    }

    /// Reads one reply and returns its tag.
    async fn reply(&mut self, replies: &mut Vec<String>) -> Result<char, Over> {
        let (tag, body) = self.message().await?;
        if tag == 'S' {
            let mut strings = body.split(|&byte| byte == 0).map(String::from_utf8_lossy);
            let mut string = || strings.next().unwrap_or_default().into_owned();
            let (name, value) = (string(), string());
            // A repeated report is no difference.
            if self.parameters.get(&name) != Some(&value) {
                replies.push(format!("S {name} = {value}"));
                self.parameters.insert(name, value);
            }
        } else {
            if tag == 'Z' {
                self.has_failed = body == "E";
            }
            replies.push(shown(tag, body));
        }
        Ok(tag)
    }

    async fn message(&mut self) -> Result<(char, Bytes), Over> {
        loop {
            if let Some(&[tag, a, b, c, d]) = self.buffer.first_chunk() {
                let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap();
                if self.buffer.len() > length {
                    let body = self.buffer.split_to(length + 1).freeze().slice(5..);
                    return Ok((tag.into(), body));
                }
            }
            match timeout(TIMEOUT, self.stream.read_buf(&mut self.buffer)).await {
                Err(_) => return Err(Over(format!("nothing within {TIMEOUT:?}"))),
                Ok(Ok(1..)) => {}
                // By a FIN or a reset is not the server's choice.
                Ok(_) => return Err(Over("the end of the connection".to_owned())),
            }
        }
    }
}

/// Skips what is part of a COPY, Sync and Flush included.
fn end_copy<'a>(messages: &mut impl Iterator<Item = &'a Message>) {
    messages.find(|it| matches!(it, Message::CopyDone | Message::CopyFail(_)));
}

/// A reply as text, without process ids, OIDs of tables and places in the source of Postgres.
fn shown(tag: char, mut body: Bytes) -> String {
    match tag {
        'E' | 'N' => {
            let fields = body.split(|&byte| byte == 0);
            let fields =
                fields.filter(|field| !matches!(field.first(), None | Some(b'F' | b'L' | b'R')));
            let fields = fields.map(String::from_utf8_lossy).collect::<Vec<_>>();
            let text = fields.join(" | ");
            // Of a client's names for the same text, the error of a Bind shows any.
            let is_named = |rest: &str| rest.split_once('"').map(|(_, rest)| rest.to_owned());
            match text.split_once("but prepared statement \"s") {
                Some((before, rest)) => format!("{tag} {before}{:?}", is_named(rest)),
                None => format!("{tag} {text}"),
            }
        }
        'A' => format!("A {:?}", &body[4..]),
        'T' => {
            let mut text = "T".to_owned();
            let count = body.get_u16();
            for _ in 0..count {
                let end = body.iter().position(|&byte| byte == 0).unwrap();
                let name = body.split_to(end);
                body.advance(1 + 4);
                write!(text, " {name:?}:{:?}", body.split_to(14)).unwrap();
            }
            text
        }
        _ => format!("{tag} {body:?}"),
    }
}
