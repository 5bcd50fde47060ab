//! A pool of one connection, whose server is the test.

use std::{
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    config::PinSessions,
    protocol::{frame::frame, options::LoginParameters},
    status::{Label, Registry},
    telemetry::{GaugeGuard, labels::PoolLease},
    upstream::{Connected, Connection, Greeting, Stream, tls_pair},
};

/// The pool, and what it needs to go on.
fn pool() -> (Pools, Arc<Pool>) {
    let settings = PoolSettings {
        default_pool_size: 1,
        ..PoolSettings::default()
    };
    let metrics = Metrics::new().unwrap();
    let (registry, closed) = (Registry::default(), CancellationToken::new());
    let context = PoolContext {
        registry: EndpointSessions::new(&registry, Label::new("e"), &metrics, closed),
        settings: ArcSwap::from_pointee(settings),
        metrics,
        shutdown: Shutdown::default(),
        tasks: TaskTracker::new(),
        main_runtime: Handle::current(),
        reported_pins: Mutex::default(),
    };
    let pools = Pools::new(PoolMode::Session, context);
    let pool = pools.pool("db");
    (pools, pool)
}

fn login() -> Arc<LoginParameters> {
    Arc::new(LoginParameters {
        database: "db".to_owned(),
        ..LoginParameters::default()
    })
}

fn wanted() -> Wanted {
    Wanted::from(login())
}

/// Both ends of a connection.
async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap());
    let (client, accepted) = tokio::join!(client, listener.accept());
    let (client, server) = (client.unwrap(), accepted.unwrap().0);
    // What has been written has arrived.
    server.set_nodelay(true).unwrap();
    (client, server)
}

impl Pool {
    fn slot(self: &Arc<Self>) -> Slot {
        let slot = self.lock().open_slot(self, Duration::ZERO);
        let mut slot = slot.expect("the first");
        slot.enter(PoolServer::Leased);
        slot
    }

    /// A connection that has just been opened, and the server's end of it.
    async fn connection(self: &Arc<Self>) -> (ServerConnection, TcpStream) {
        let (client, server) = sockets().await;
        (self.opened(Stream::Plain(client.into())), server)
    }

    fn opened(self: &Arc<Self>, stream: Stream) -> ServerConnection {
        let mut greeting = Greeting::default();
        let status = frame(b'S', b"DateStyle\0ISO, MDY\0");
        greeting.parameter_status.extend_from_slice(&status);
        let connected = Connected {
            connection: Connection {
                stream,
                greeting,
                address: SocketAddr::from(([127, 0, 0, 1], 5432)),
                gauge: GaugeGuard::new(&self.context.metrics.upstream_active),
            },
            database: "db".to_owned(),
            woke_after: None,
        };
        let login = login();
        let lifetime = Duration::from_hours(1);
        ServerConnection::new(connected, login, self.slot(), lifetime)
    }
}

#[tokio::test]
async fn a_panic_with_a_connection_frees_its_slot_for_the_client_that_waits() {
    let (_pools, pool) = pool();
    let slot = pool.slot();
    let waiting = pool.enter(&wanted());
    assert!(!waiting.is_granted());
    let panicked = catch_unwind(AssertUnwindSafe(move || {
        let _slot = slot;
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert!(matches!(waiting.granted().await, Grant::Open(_)));
    let metrics = &pool.context.metrics;
    assert_eq!(metrics.pool_servers[PoolServer::Leased].get(), 0);
    assert_eq!(metrics.pool_closes[PoolClose::Session].get(), 1);
}

/// Its socket need not be registered anew.
#[tokio::test(start_paused = true)]
async fn of_clients_that_come_at_once_the_one_on_the_runtime_of_a_connection_gets_it_but_no_later_one()
 {
    let (_pools, pool) = pool();
    let (mut connection, _server) = pool.connection().await;
    let other = runtime::Builder::new_current_thread().build().unwrap();
    let elsewhere = {
        let _entered = other.enter();
        pool.enter(&wanted())
    };
    let at_once = [(); 3].map(|()| pool.enter(&wanted()));
    // Far enough for the clock of the other runtime, which is not paused.
    tokio::time::advance(AT_ONCE + Duration::from_mins(1)).await;
    let later = pool.enter(&wanted());
    for waiting in at_once {
        connection.put_back();
        assert!(waiting.is_granted() && !elsewhere.is_granted());
        let Grant::Server(granted) = waiting.granted().await else {
            panic!("the connection");
        };
        connection = granted;
    }
    connection.put_back();
    assert!(elsewhere.is_granted() && !later.is_granted());
    other.shutdown_background();
}

/// What the server may send at any time: a notice, a notification, and the new value of a parameter.
fn unrequested() -> Vec<u8> {
    let frames = [
        frame(b'N', b"SNOTICE\0C00000\0Mfor no client\0\0"),
        frame(b'A', b"\0\0\0\x07channel\0payload\0"),
        frame(b'S', b"DateStyle\0SQL, DMY\0"),
    ];
    frames.concat()
}

/// The client that takes the connection receives this much before its first request.
async fn received(mut lease: Lease) -> usize {
    let mut bytes = [0; 64];
    let read = timeout(Duration::from_millis(100), lease.stream.read(&mut bytes)).await;
    read.map_or(0, |read| read.unwrap())
}

#[tokio::test]
async fn what_an_idle_server_sends_reaches_no_client_but_in_the_welcome() {
    let (_pools, pool) = pool();
    let (connection, mut server) = pool.connection().await;
    connection.put_back();
    // In two parts, the second one within a message.
    let bytes = unrequested();
    let (first, second) = bytes.split_at(20);
    for part in [first, second] {
        server.write_all(part).await.unwrap();
        let idle = || pool.lock().idle[0].server.record.unread.clone();
        while idle().is_empty() == (part == first) {
            tokio::task::yield_now().await;
        }
    }
    let Grant::Server(connection) = pool.enter(&wanted()).granted().await else {
        panic!("an idle connection");
    };
    let connection = connection.prepare(&wanted()).await.unwrap();
    let leased = pool.leased(connection, PoolLease::Idle);
    assert_eq!(
        leased.parameter_status,
        frame(b'S', b"DateStyle\0SQL, DMY\0")
    );
    assert!(leased.notices.is_empty() && leased.leftover.is_empty());
    assert_eq!(received(leased.lease).await, 0);
}

/// The watch of the idle connection has no turn between the bytes and the client.
#[tokio::test]
async fn what_has_just_arrived_is_taken_before_a_client_gets_the_connection() {
    let (_pools, pool) = pool();
    let (connection, mut server) = pool.connection().await;
    let mut connection = connection;
    for _ in 0..3 {
        let bytes = unrequested();
        assert_eq!(server.try_write(&bytes).unwrap(), bytes.len());
        connection = connection.prepare(&wanted()).await.unwrap();
    }
    let leased = pool.leased(connection, PoolLease::Returned);
    assert_eq!(
        leased.parameter_status,
        frame(b'S', b"DateStyle\0SQL, DMY\0")
    );
    assert_eq!(received(leased.lease).await, 0);
    server.shutdown().await.unwrap();
}

/// Tickets and key updates are no messages of the server: waiting for one would be for ever.
#[tokio::test]
async fn what_tls_sends_to_an_idle_connection_is_no_reason_to_wait_or_to_close_it() {
    let (_pools, pool) = pool();
    let (client, server) = sockets().await;
    let (stream, mut server) = tls_pair(client.into(), server).await;
    let mut connection = pool.opened(stream);
    for _ in 0..3 {
        server.get_mut().1.refresh_traffic_keys().unwrap();
        server.flush().await.unwrap();
        let prepared = timeout(Duration::from_secs(10), connection.prepare(&wanted())).await;
        connection = prepared.expect("at once").unwrap();
    }
    server.write_all(&unrequested()).await.unwrap();
    server.flush().await.unwrap();
    let connection = connection.prepare(&wanted()).await.unwrap();
    let leased = pool.leased(connection, PoolLease::Idle);
    assert_eq!(
        leased.parameter_status,
        frame(b'S', b"DateStyle\0SQL, DMY\0")
    );
    assert_eq!(received(leased.lease).await, 0);
}

#[tokio::test]
async fn a_connection_whose_server_reports_an_error_ends_or_stops_within_a_message_is_closed() {
    let error = frame(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0");
    let answer = frame(b'C', b"SELECT 1\0");
    let notice = unrequested();
    for (bytes, ends) in [
        (&error[..], false),
        (&answer, false),
        (&notice[..7], false),
        (&[], true),
    ] {
        let (_pools, pool) = pool();
        let (connection, mut server) = pool.connection().await;
        server.write_all(bytes).await.unwrap();
        if ends {
            server.shutdown().await.unwrap();
        }
        assert!(connection.prepare(&wanted()).await.is_err(), "{bytes:?}");
        let metrics = &pool.context.metrics;
        assert_eq!(metrics.pool_closes[PoolClose::Server].get(), 1);
        assert_eq!(metrics.pool_hidden_losses.get(), 1);
        assert_eq!(metrics.pool_servers[PoolServer::Leased].get(), 0);
    }
}

/// One that has just come.
fn client(pools: &Pools, mode: PoolMode) -> ClientState {
    ClientState::new(login(), Bytes::new(), &pools.texts, mode, PinSessions::Pin)
}

/// A connection that goes to another client with a request in flight would give that one the answer.
#[tokio::test]
async fn a_request_that_is_sent_after_all_keeps_its_connection() {
    let (pools, pool) = pool();
    let (connection, mut server) = pool.connection().await;
    let mut client = client(&pools, PoolMode::Auto);
    let mut lease = pool.leased(connection, PoolLease::Idle).lease;
    let mut shared = lease.share(&mut client).unwrap();
    let query = frame(b'Q', b"select 1\0");
    shared.write_all(&query).await.unwrap();
    let answer = [frame(b'C', b"SELECT 1\0"), frame(b'Z', b"I")].concat();
    server.write_all(&answer).await.unwrap();
    let mut received = vec![0; answer.len()];
    shared.read_exact(&mut received).await.unwrap();
    // Another client waits, and then has been given the connection of yet another.
    for is_short in [true, false] {
        pool.is_short.store(is_short, Ordering::SeqCst);
        let written = shared.write(&query).now_or_never();
        assert_eq!(written.is_none(), is_short);
        assert_eq!(shared.is_yielding(), is_short);
    }
}

/// Whether the COPY has read the first Sync is not known, and so neither whether an answer is to come.
#[tokio::test]
async fn a_client_whose_copy_has_failed_does_not_give_way() {
    let (pools, pool) = pool();
    let (connection, mut server) = pool.connection().await;
    let mut client = client(&pools, PoolMode::Auto);
    let mut lease = pool.leased(connection, PoolLease::Idle).lease;
    let mut shared = lease.share(&mut client).unwrap();
    let copy = [
        frame(b'P', b"\0copy t from stdin\0\0\0"),
        frame(b'B', b"\0\0\0\0\0\0\0\0"),
        frame(b'E', b"\0\0\0\0\0"),
        frame(b'S', b""),
        frame(b'f', b"\0"),
        frame(b'S', b""),
    ];
    shared.write_all(&copy.concat()).await.unwrap();
    let answers = [
        frame(b'1', b""),
        frame(b'2', b""),
        frame(b'G', b"\0\0\0"),
        frame(b'E', b"C57014\0\0"),
        frame(b'Z', b"I"),
    ];
    let answers = answers.concat();
    server.write_all(&answers).await.unwrap();
    let mut received = vec![0; answers.len()];
    shared.read_exact(&mut received).await.unwrap();
    pool.is_short.store(true, Ordering::SeqCst);
    let query = frame(b'Q', b"select 1\0");
    assert!(shared.write(&query).now_or_never().is_some());
    assert!(!shared.is_yielding() && !shared.is_at_rest());
}

/// A row of columns of one character.
fn row(columns: &[&str]) -> Vec<u8> {
    let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
    for column in columns {
        body.extend(1_u32.to_be_bytes());
        body.extend(column.as_bytes());
    }
    frame(b'D', &body)
}

/// A reload of the server's configuration changes it in all sessions.
#[tokio::test]
async fn a_setting_that_no_set_has_changed_pins_only_if_it_is_the_sessions_own() {
    for is_own in [false, true] {
        let (pools, pool) = pool();
        let (connection, mut server) = pool.connection().await;
        let mut client = client(&pools, PoolMode::Transaction);
        let mut lease = pool.leased(connection, PoolLease::Idle).lease;
        let mut shared = lease.share(&mut client).unwrap();
        shared.write_all(&frame(b'Q', b"select 1\0")).await.unwrap();
        let answer = [
            frame(b'C', b"SELECT 1\0"),
            frame(b'S', b"IntervalStyle\0iso_8601\0"),
            frame(b'Z', b"I"),
        ]
        .concat();
        server.write_all(&answer).await.unwrap();
        let mut received = vec![0; answer.len()];
        shared.read_exact(&mut received).await.unwrap();
        assert!(client.is_suspect());
        let row = row(&["0", "0", "0", "0", if is_own { "1" } else { "0" }]);
        server
            .write_all(&[row, frame(b'Z', b"I")].concat())
            .await
            .unwrap();
        let verified = lease.verify(&mut client).await.unwrap();
        assert_eq!(matches!(verified, Verified::Clean(_)), !is_own);
        assert_eq!(client.pin(), is_own.then_some(PinReason::Settings));
        assert!(!client.is_suspect());
    }
}

/// By a timeout of the client's own, for example.
#[tokio::test]
async fn a_verification_that_fails_leaves_the_client_its_connection() {
    let (pools, pool) = pool();
    let (mut connection, mut server) = pool.connection().await;
    let mut client = client(&pools, PoolMode::Transaction);
    let error = "SERROR\0C57014\0Mcanceling statement due to statement timeout\0\0";
    let error = frame(b'E', error.as_bytes());
    for (answer, is_clean) in [
        (error, false),
        (row(&["0", "0", "0", "1"]), false),
        (row(&["0"; 4]), true),
    ] {
        let answer = [answer, frame(b'Z', b"I")].concat();
        server.write_all(&answer).await.unwrap();
        assert_eq!(connection.verify(&mut client).await.unwrap(), is_clean);
    }
    let fatal = frame(b'E', b"SFATAL\0C57P01\0Mterminating connection\0\0");
    server.write_all(&fatal).await.unwrap();
    connection.verify(&mut client).await.unwrap_err();
    let counted = &pool.context.metrics.pool_verifications;
    for (result, count) in counted {
        assert_eq!(count.get(), 1, "{result:?}");
    }
}

/// What the client has there would be lost with the connection.
#[tokio::test(start_paused = true)]
async fn a_slow_verification_is_waited_for() {
    for (takes, is_lost) in [(60, false), (180, true)] {
        let (pools, pool) = pool();
        let (connection, mut server) = pool.connection().await;
        let mut client = client(&pools, PoolMode::Transaction);
        let lease = pool.leased(connection, PoolLease::Idle).lease;
        let answer = [row(&["0", "0", "0", "1"]), frame(b'Z', b"I")].concat();
        let answering = async {
            sleep(Duration::from_secs(takes)).await;
            server.write_all(&answer).await
        };
        let (verified, _) = tokio::join!(lease.verify(&mut client), answering);
        assert_eq!(verified.is_err(), is_lost, "{takes} s");
    }
}
