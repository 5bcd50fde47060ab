//! Whole sessions from accept to close.

use std::{net::SocketAddr, sync::Mutex, time::Duration};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use secrecy::SecretString;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpListener,
    runtime::Handle,
    task::JoinSet,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{client::CLOSE_TIMEOUT, *};
use crate::{
    clock::Clock,
    config::{PoolMode, Settings},
    credential::{CredentialCell, Minted},
    pool::{PoolContext, Pools},
    protocol::{
        error::ErrorFields,
        frame::{Message, take_message},
        startup::{CancelKey, encode_startup, terminate},
    },
    shutdown::Shutdown,
    status::{EndpointSessions, Label, Registry},
    telemetry::Metrics,
    upstream::{Addresses, DroppedParameters, Endpoint, Route, Security, Upstream},
};

/// More than any of these tests takes when all is well.
const LONG: Duration = Duration::from_secs(30);

/// Sessions that lead to a listener on this machine.
fn sessions(upstream: SocketAddr, client_login_timeout: Duration) -> Arc<EndpointContext> {
    let metrics = Metrics::new().unwrap();
    let credentials = CredentialCell::new(Clock::system());
    credentials.publish(
        Minted {
            secret: SecretString::from("token"),
            expires_at: None,
        },
        0.0,
    );
    let endpoint = Endpoint {
        label: Label::new("e"),
        host: upstream.ip().to_string(),
        port: upstream.port(),
        addresses: Addresses::default(),
        user: "me".to_owned(),
        database: "db".to_owned(),
        security: Security::Plain,
        dropped: DroppedParameters::default(),
    };
    let upstream = Upstream::new(endpoint, credentials, Arc::clone(&metrics));
    let (finder, route) = Route::channel(Label::new("e"));
    finder.found(Arc::new(upstream));
    let process = ProcessContext {
        max_handshakes: 256,
        config: Arc::new(ArcSwap::from_pointee(SessionConfig {
            client_login_timeout,
            max_connections: 1,
            ..SessionConfig::new(&Settings::default(), Arc::default())
        })),
        shutdown: Shutdown::new(),
        console: None,
    };
    let registry = EndpointSessions::new(
        &Registry::default(),
        Label::new("e"),
        &metrics,
        CancellationToken::new(),
    );
    let pools = PoolContext {
        registry: registry.clone(),
        settings: ArcSwap::default(),
        metrics: Arc::clone(&metrics),
        shutdown: process.shutdown.clone(),
        tasks: TaskTracker::new(),
        main_runtime: Handle::current(),
        reported_pins: Mutex::default(),
    };
    Arc::new(EndpointContext::new(
        Arc::new(process),
        route,
        registry,
        metrics,
        Pools::new(PoolMode::None, pools),
    ))
}

/// A client of this endpoint, whose connection buffers `capacity` bytes.
async fn client(
    endpoint: &Arc<EndpointContext>,
    capacity: usize,
    tasks: &mut JoinSet<()>,
) -> DuplexStream {
    let (client, stream) = duplex(capacity);
    let accepted = accepted(endpoint, stream).await;
    tasks.spawn(serve(Arc::clone(endpoint), accepted));
    client
}

async fn accepted(endpoint: &EndpointContext, stream: DuplexStream) -> Box<Accepted<DuplexStream>> {
    let peer = Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 4711)));
    Box::new(Accepted {
        id: endpoint.registry.registry().next_id(),
        peer,
        stream,
        permit: HandshakeLimiter::new(256).enter(peer).await,
    })
}

async fn message(stream: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> Message {
    loop {
        if let Some(message) = take_message(buffer, 10_000).unwrap() {
            return message;
        }
        assert!(stream.read_buf(buffer).await.unwrap() > 0, "no message");
    }
}

/// A server that logs one client in; returns its connection after ReadyForQuery.
async fn accept_login(listener: &TcpListener) -> tokio::net::TcpStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let length = stream.read_u32().await.unwrap();
    stream
        .read_exact(&mut vec![0; length as usize - 4])
        .await
        .unwrap();
    let status = [&b"S\0\0\0\x30a\0"[..], &[b'b'; 41], &[0]].concat();
    let answer = [
        &b"R\0\0\0\x08\0\0\0\0"[..],
        &status,
        b"K\0\0\0\x0c\0\0\0\x07\0\0\0\x09Z\0\0\0\x05I",
    ];
    stream.write_all(&answer.concat()).await.unwrap();
    stream
}

fn startup() -> BytesMut {
    encode_startup(&[("user", "anyone")]).unwrap()
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[tokio::test]
async fn a_session_is_logged_in_relayed_and_ended_with_its_client() {
    let (listener, address) = listen().await;
    let sessions = sessions(address, LONG);
    let mut tasks = JoinSet::new();
    let mut client = client(&sessions, 64 * 1024, &mut tasks).await;
    client.write_all(&startup()).await.unwrap();
    let mut server = accept_login(&listener).await;
    let (mut buffer, mut tags) = (BytesMut::new(), Vec::new());
    let mut key = None;
    while tags.last() != Some(&b'Z') {
        let message = message(&mut client, &mut buffer).await;
        tags.push(message.tag);
        if message.tag == b'K' {
            let (process_id, secret) = message.body().split_at(4);
            key = Some(CancelKey {
                process_id: u32::from_be_bytes(process_id.try_into().unwrap()),
                secret: u32::from_be_bytes(secret.try_into().unwrap()),
            });
        }
    }
    assert_eq!(tags, b"RSKZ");
    let key = key.unwrap();
    assert_eq!(key.process_id, 7);
    let cancel::Found::Target(target) = sessions.cancel_keys.find(key) else {
        panic!("a key without a target");
    };
    assert_eq!(target.address, address);

    let mut second = self::client(&sessions, 64 * 1024, &mut tasks).await;
    second.write_all(&startup()).await.unwrap();
    let refusal = message(&mut second, &mut BytesMut::new()).await;
    assert_eq!(ErrorFields::parse(refusal.body()).code, "53300");
    drop(second);

    client.write_all(&terminate()).await.unwrap();
    drop(client);
    let mut received = Vec::new();
    server.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, terminate());
    drop(server);
    timeout(LONG, tasks.join_all()).await.unwrap();
    assert_eq!(sessions.cancel_keys.find(key), cancel::Found::Nothing);
    assert_eq!(sessions.metrics.clients_active.get(), 0);
    assert_eq!(sessions.metrics.upstream_active.get(), 0);
    assert_eq!(sessions.registry.counts().all, 0);
}

#[tokio::test]
async fn a_client_that_does_not_read_its_login_answer_is_closed_after_the_login_timeout() {
    let (listener, address) = listen().await;
    let sessions = sessions(address, Duration::from_millis(100));
    let mut tasks = JoinSet::new();
    let mut client = client(&sessions, 32, &mut tasks).await;
    client.write_all(&startup()).await.unwrap();
    let mut server = accept_login(&listener).await;
    timeout(LONG, tasks.join_all()).await.unwrap();
    assert_eq!(server.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert_eq!(sessions.registry.counts().all, 0);
}

#[tokio::test]
async fn a_client_that_hangs_up_while_waiting_ends_its_session() {
    let (listener, address) = listen().await;
    let sessions = sessions(address, LONG);
    let mut tasks = JoinSet::new();
    let mut client = client(&sessions, 1024, &mut tasks).await;
    client.write_all(&startup()).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    drop(client);
    timeout(LONG, tasks.join_all()).await.unwrap();
    let mut received = Vec::new();
    server.read_to_end(&mut received).await.unwrap_or_default();
    assert_eq!(sessions.registry.counts().all, 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_does_not_delay_shutdown() {
    let sessions = sessions(SocketAddr::from(([127, 0, 0, 1], 1)), LONG);
    let mut tasks = JoinSet::new();
    let silent = client(&sessions, 1024, &mut tasks).await;
    let mut late = client(&sessions, 1024, &mut tasks).await;
    let began = Instant::now();
    sessions.process.shutdown.drain();
    late.write_all(&startup()).await.unwrap();
    let refusal = message(&mut late, &mut BytesMut::new()).await;
    assert_eq!(ErrorFields::parse(refusal.body()).code, "57P03");
    drop(late);
    tasks.join_all().await;
    assert_eq!(began.elapsed().as_secs(), CLOSE_TIMEOUT.as_secs());
    drop(silent);
}

/// The memory that every session's task keeps for its whole life; a login has a box of its own.
#[tokio::test]
async fn the_task_of_a_session_is_small() {
    let (_listener, address) = listen().await;
    let sessions = sessions(address, LONG);
    let (_client, stream) = duplex(16);
    let accepted = accepted(&sessions, stream).await;
    let session = serve(sessions, accepted);
    let size = size_of_val(&session);
    assert!(size <= 1500, "{size} bytes");
}
