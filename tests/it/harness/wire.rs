//! A Postgres client of bytes and messages, which can misbehave where a driver would not.

use std::{collections::HashMap, net::SocketAddr};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use lakebase_proxy::{config::Roots, emulator::Emulator, net::tls, protocol::error::ErrorFields};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{TIMEOUT, within};

pub(crate) const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
pub(crate) const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];
pub(crate) const PROTOCOL_3_0: u32 = 3 << 16;
pub(crate) const PROTOCOL_3_2: u32 = (3 << 16) + 2;

/// A message, type and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) tag: char,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn error(&self) -> ErrorFields {
        assert!(matches!(self.tag, 'E' | 'N'), "{self:?}");
        ErrorFields::parse(&self.body)
    }

    /// The first column of a DataRow, as text.
    pub(crate) fn value(&self) -> String {
        assert_eq!(self.tag, 'D');
        let mut body = self.body.clone();
        body.advance(2);
        let length = usize::try_from(body.get_u32()).unwrap();
        String::from_utf8(body.split_to(length).to_vec()).unwrap()
    }
}

/// The messages of a server up to the first ReadyForQuery.
#[derive(Debug, Default)]
pub(crate) struct Welcome {
    pub(crate) parameters: HashMap<String, String>,
    pub(crate) key: [u8; 8],
    pub(crate) notices: Vec<ErrorFields>,
    pub(crate) negotiation: Option<Bytes>,
}

pub(crate) struct Wire<S = TcpStream> {
    pub(crate) stream: S,
    buffer: BytesMut,
}

/// A StartupMessage.
pub(crate) fn startup(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = Vec::new();
    for text in parameters.iter().flat_map(|&(name, value)| [name, value]) {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    packet(version, &body)
}

/// A packet as they begin connections: length, code, body.
pub(crate) fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.put_u32(u32::try_from(body.len() + 8).unwrap());
    packet.put_u32(code);
    packet.extend_from_slice(body);
    packet
}

/// A message.
pub(crate) fn message(tag: char, body: &[u8]) -> Vec<u8> {
    let mut message = vec![u8::try_from(tag).unwrap()];
    message.put_u32(u32::try_from(body.len() + 4).unwrap());
    message.extend_from_slice(body);
    message
}

/// A message of one string.
pub(crate) fn text(tag: char, text: &str) -> Vec<u8> {
    message(tag, &[text.as_bytes(), b"\0"].concat())
}

/// Parse, Bind and Execute of a statement without parameters; no Sync.
pub(crate) fn extended(query: &str) -> Vec<u8> {
    [
        message('P', &[b"\0", query.as_bytes(), b"\0\0\0"].concat()),
        message('B', &[0, 0, 0, 0, 0, 0, 0, 0]),
        message('E', &[0, 0, 0, 0, 0]),
    ]
    .concat()
}

pub(crate) fn sync() -> Vec<u8> {
    message('S', b"")
}

pub(crate) fn terminate() -> Vec<u8> {
    message('X', b"")
}

pub(crate) fn cancel_request(key: [u8; 8]) -> Vec<u8> {
    packet(80_877_102, &key)
}

/// Sends a CancelRequest and waits until it is dealt with.
pub(crate) async fn cancel(address: SocketAddr, key: [u8; 8]) {
    let mut wire = Wire::dial(address).await;
    wire.send(&cancel_request(key)).await;
    wire.closed().await;
}

impl Wire {
    pub(crate) async fn dial(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: BytesMut::new(),
        }
    }

    /// Ends the connection with a reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
    }

    /// A session at the emulator without the proxy, logged in with a credential as the tutorial's app does.
    pub(crate) async fn direct(emulator: &Emulator) -> Wire<TlsStream<TcpStream>> {
        let app = emulator.identities().app.clone();
        let token = emulator.credential_for(&app, TIMEOUT * 2).unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", emulator.pg_port()))
            .await
            .unwrap();
        stream.write_all(&SSL_REQUEST).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'S');
        let config = tls::client_config(
            &Roots::File(emulator.ca_file().into()),
            tls::ALPN_POSTGRESQL,
        )
        .unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TlsConnector::from(config)
            .connect(name, stream)
            .await
            .unwrap();
        let mut wire = Wire {
            stream,
            buffer: BytesMut::new(),
        };
        wire.startup(&[("user", &app.name), ("database", "databricks_postgres")])
            .await;
        assert_eq!(wire.next().await.tag, 'R');
        wire.send(&text('p', &token)).await;
        wire.welcome().await;
        wire
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Over a connection made elsewhere.
    pub(crate) fn of(stream: S) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
        }
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        within("sending", sent).await.unwrap();
    }

    pub(crate) async fn startup(&mut self, parameters: &[(&str, &str)]) {
        self.send(&startup(PROTOCOL_3_0, parameters)).await;
    }

    /// One byte, as an answer to SSLRequest is.
    pub(crate) async fn byte(&mut self) -> char {
        if self.buffer.is_empty() {
            within("a byte", self.stream.read_buf(&mut self.buffer))
                .await
                .unwrap();
        }
        char::from(self.buffer.get_u8())
    }

    /// The next message; `None` at the end of the connection.
    pub(crate) async fn try_next(&mut self) -> std::io::Result<Option<Reply>> {
        loop {
            if let Some(&[tag, a, b, c, d]) = self.buffer.first_chunk() {
                let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap();
                if self.buffer.len() > length {
                    let body = self.buffer.split_to(length + 1).freeze().slice(5..);
                    return Ok(Some(Reply {
                        tag: tag.into(),
                        body,
                    }));
                }
            }
            if within("a message", self.stream.read_buf(&mut self.buffer)).await? == 0 {
                assert!(
                    self.buffer.is_empty(),
                    "ends inside a message: {:?}",
                    self.buffer
                );
                return Ok(None);
            }
        }
    }

    pub(crate) async fn next(&mut self) -> Reply {
        self.try_next()
            .await
            .unwrap()
            .expect("a message, not the end")
    }

    /// Messages up to and with the next of this type.
    pub(crate) async fn until(&mut self, tag: char) -> Vec<Reply> {
        let mut reply = Vec::new();
        loop {
            reply.push(self.next().await);
            if reply.last().unwrap().tag == tag {
                return reply;
            }
        }
    }

    /// The types of the messages up to the next ReadyForQuery.
    pub(crate) async fn tags(&mut self) -> String {
        self.until('Z')
            .await
            .iter()
            .map(|reply| reply.tag)
            .collect()
    }

    /// Everything up to the first ReadyForQuery.
    pub(crate) async fn welcome(&mut self) -> Welcome {
        let mut welcome = Welcome::default();
        loop {
            let reply = self.next().await;
            match reply.tag {
                'R' => assert_eq!(&reply.body[..], [0, 0, 0, 0], "no password is required"),
                'S' => {
                    let mut strings = reply.body.split(|&byte| byte == 0);
                    let mut string =
                        || String::from_utf8(strings.next().unwrap().to_vec()).unwrap();
                    welcome.parameters.insert(string(), string());
                }
                'K' => welcome.key = reply.body[..].try_into().expect("a key of eight bytes"),
                'N' => welcome.notices.push(reply.error()),
                'v' => welcome.negotiation = Some(reply.body),
                'Z' => return welcome,
                _ => panic!(
                    "instead of a welcome: {:?}",
                    ErrorFields::parse(&reply.body)
                ),
            }
        }
    }

    /// A FATAL error, and the end of the connection after it.
    pub(crate) async fn refusal(&mut self) -> ErrorFields {
        let reply = self.next().await;
        assert_eq!(reply.tag, 'E', "a refusal and nothing before it: {reply:?}");
        let error = reply.error();
        assert_eq!(error.severity, "FATAL", "{error:?}");
        assert_eq!(
            self.try_next().await.unwrap(),
            None,
            "nothing after the refusal"
        );
        error
    }

    /// The end of the connection and nothing before it.
    pub(crate) async fn closed(&mut self) {
        if let Ok(Some(reply)) = self.try_next().await {
            panic!("instead of the end: {reply:?}");
        }
    }

    /// A simple query's rows, each its first column.
    pub(crate) async fn query(&mut self, query: &str) -> Vec<String> {
        self.send(&text('Q', query)).await;
        let reply = self.until('Z').await;
        if let Some(error) = reply.iter().find(|reply| reply.tag == 'E') {
            panic!("{query}: {:?}", error.error());
        }
        reply
            .iter()
            .filter(|reply| reply.tag == 'D')
            .map(Reply::value)
            .collect()
    }

    /// A simple query's one value.
    pub(crate) async fn value(&mut self, query: &str) -> String {
        let mut rows = self.query(query).await;
        assert_eq!(rows.len(), 1, "{query}");
        rows.remove(0)
    }
}
