//! Our side of TLS in front of a server of rustls's own, over a wire that gives and takes as many bytes as the input selects,
//! stalls and breaks one byte where it selects that. What is echoed is what was sent; of a broken wire nothing
//! wrong is read. The input: two bytes for what is done, two for how much is sent, four for the byte that breaks, the
//! rest is the wire's manner.
#![no_main]

use std::{
    io::{self, Read, Write},
    pin::Pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll},
};

use libfuzzer_sys::fuzz_target;
use rcgen::CertifiedKey;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, ServerConnection,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::ServerName,
    version::{TLS12, TLS13},
};
use tls_stream::TlsStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

// It is private to the upstream, so it is not reached through the library.
#[path = "../../../src/upstream/tls_stream.rs"]
#[allow(dead_code, reason = "not all of a stream is used here")]
mod tls_stream;

struct Configs {
    client: Arc<ClientConfig>,
    servers: [Arc<ServerConfig>; 2],
}

static CONFIGS: LazyLock<Configs> = LazyLock::new(|| {
    let provider: Arc<CryptoProvider> = Arc::new(aws_lc_rs::default_provider());
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).expect("an authority");
    let client = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let servers = [&TLS12, &TLS13].map(|version| {
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[version])
            .expect("a version")
            .with_no_client_auth()
            .with_single_cert(
                vec![cert.der().clone()],
                signing_key.serialize_der().try_into().expect("a key"),
            );
        Arc::new(server.expect("a server"))
    });
    Configs {
        client: Arc::new(client),
        servers,
    }
});

/// A server at the other end, which sends back what it is sent.
struct Wire<'a> {
    server: ServerConnection,
    /// On its way to the client.
    coming: Vec<u8>,
    /// How many bytes have come.
    come: usize,
    /// Which of them is broken, if it is reached.
    breaks: Option<usize>,
    /// One byte for each reading or writing.
    manner: &'a [u8],
    /// Whether the server changes its keys before it answers.
    updates: bool,
}

impl Wire<'_> {
    /// How much may pass now; nothing for a stall. Once the input is used up, all.
    fn allowed(&mut self, cx: &Context<'_>) -> Poll<usize> {
        let Some((&byte, rest)) = self.manner.split_first() else {
            return Poll::Ready(usize::MAX);
        };
        self.manner = rest;
        if byte == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // Mostly few bytes, now and then whole records.
        Poll::Ready(if byte < 0xc0 {
            usize::from(byte)
        } else {
            usize::from(byte) * 300
        })
    }

    /// Lets the server answer what it has got.
    fn serve(&mut self) -> io::Result<()> {
        let state = self.server.process_new_packets().map_err(io::Error::other);
        if let Ok(state) = &state
            && state.plaintext_bytes_to_read() > 0
        {
            let mut reply = vec![0; state.plaintext_bytes_to_read()];
            self.server.reader().read_exact(&mut reply)?;
            if self.updates {
                let _ = self.server.refresh_traffic_keys();
            }
            self.server.writer().write_all(&reply)?;
        }
        while self.server.wants_write() {
            self.server.write_tls(&mut self.coming)?;
        }
        state.map(drop)
    }
}

impl AsyncRead for Wire<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Poll::Ready(allowed) = this.allowed(cx) else {
            return Poll::Pending;
        };
        // A server without output has gone: nothing else could end the wait.
        let now = allowed.min(buf.remaining()).min(this.coming.len());
        let mut passing: Vec<u8> = this.coming.drain(..now).collect();
        if let Some(at) = this.breaks.and_then(|at| at.checked_sub(this.come))
            && let Some(byte) = passing.get_mut(at)
        {
            *byte ^= 0x55;
        }
        this.come += now;
        buf.put_slice(&passing);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Poll::Ready(allowed) = this.allowed(cx) else {
            return Poll::Pending;
        };
        let mut now = buf.get(..allowed).unwrap_or(buf);
        let length = now.len();
        while !now.is_empty() {
            if this.server.read_tls(&mut now)? == 0 {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if let Err(error) = this.serve() {
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

async fn exchange(wire: Wire<'_>, sent: &[u8], back: &mut Vec<u8>) -> io::Result<()> {
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = TlsStream::connect(CONFIGS.client.clone(), name, wire).await?;
    for part in sent.chunks(100_000) {
        stream.write_all(part).await?;
        stream.flush().await?;
        let mut echoed = vec![0; part.len()];
        let mut filled = 0;
        while filled < part.len() {
            match stream.read(&mut echoed[filled..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => {
                    back.extend_from_slice(&echoed[filled..filled + read]);
                    filled += read;
                }
            }
        }
    }
    stream.shutdown().await
}

fuzz_target!(|data: &[u8]| {
    let Some((&[version, flags, high, low, b0, b1, b2, b3], manner)) = data.split_first_chunk()
    else {
        return;
    };
    let server = CONFIGS.servers[usize::from(version & 1)].clone();
    let breaks = (flags & 1 == 1).then(|| u32::from_be_bytes([b0, b1, b2, b3]) as usize);
    let wire = Wire {
        server: ServerConnection::new(server).expect("a server"),
        coming: Vec::new(),
        come: 0,
        breaks,
        manner,
        updates: flags & 2 == 2,
    };
    // Longer than a chunk of the stream's now and then.
    let length = usize::from(u16::from_be_bytes([high, low])) * 3;
    let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    let mut back = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let done = runtime.block_on(exchange(wire, &sent, &mut back));
    assert!(sent.starts_with(&back));
    assert!(done.is_err() || back == sent);
    assert!(breaks.is_some() || done.is_ok(), "{done:?}");
});
