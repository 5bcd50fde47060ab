//! Clients at a scripted server on loopback: dials, retries, budgets and refusals.

use std::{
    future::ready,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures_util::FutureExt;
use jiff::Timestamp;
use secrecy::SecretString;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::{
    clock::Clock,
    credential::{BoxFuture, CallError, Mint, Minted, Refresher},
    protocol::frame::frame,
    status::Label,
    upstream::{Addresses, DroppedParameters, Security, slots::CONCURRENT_LOGINS},
};

/// More than any of these tests takes when all is well.
const LONG: Duration = Duration::from_secs(30);

/// What the server does with a connection after the password.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Closes before it sends anything.
    Asleep,
    /// Refuses with this SQLSTATE and text.
    Refuse(&'static str, &'static str),
    /// Refuses the first credential and takes any other.
    RefuseFirst,
    /// Sends nothing.
    Stall,
    /// Logs the client in.
    Welcome,
}

#[derive(Default)]
struct Seen {
    dials: AtomicUsize,
    logging_in: AtomicUsize,
    cancels: std::sync::Mutex<Vec<[u8; 16]>>,
}

impl Seen {
    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

struct Server {
    port: u16,
    act: watch::Sender<Act>,
    seen: Arc<Seen>,
    /// Sends once for each dial.
    dialed: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn start(act: Act) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (act, acts) = watch::channel(act);
        let (dial, dialed) = watch::channel(0);
        let seen = Arc::new(Seen::default());
        let witness = Arc::clone(&seen);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, acts) = (Arc::clone(&witness), acts.clone());
                seen.dials.fetch_add(1, Ordering::SeqCst);
                dial.send_modify(|dials| *dials += 1);
                connections.spawn(async move {
                    // A client that leaves ends its connection, and no test.
                    let _ = serve(stream, acts, &seen).await;
                });
            }
        });
        Self {
            port,
            act,
            seen,
            dialed,
            _tasks: tasks,
        }
    }

    fn now(&self, act: Act) {
        self.act.send_replace(act);
    }

    async fn dialed(&self, at_least: usize) {
        let mut dialed = self.dialed.clone();
        let waited = timeout(LONG, dialed.wait_for(|dials| *dials >= at_least)).await;
        waited.expect("no dial").unwrap();
    }
}

async fn serve(
    mut stream: TcpStream,
    mut acts: watch::Receiver<Act>,
    seen: &Seen,
) -> std::io::Result<()> {
    if *acts.borrow() == Act::Asleep {
        return Ok(());
    }
    seen.logging_in.fetch_add(1, Ordering::SeqCst);
    let mut first = [0; 16];
    stream.read_exact(&mut first).await?;
    if first[4..8] == [4, 210, 22, 46] {
        seen.cancels.lock().unwrap().push(first);
        return Ok(());
    }
    let length = u32::from_be_bytes(first[..4].try_into().unwrap());
    stream
        .read_exact(&mut vec![0; length as usize - 16])
        .await?;
    stream.write_all(&frame(b'R', &[0, 0, 0, 3])).await?;
    stream.read_u8().await?;
    let length = stream.read_u32().await?;
    let mut password = vec![0; length as usize - 4];
    stream.read_exact(&mut password).await?;
    // Stalls until the script changes.
    let act = *acts.wait_for(|act| *act != Act::Stall).await.unwrap();
    seen.logging_in.fetch_sub(1, Ordering::SeqCst);
    let refusal = match act {
        Act::Refuse(code, text) => Some((code, text)),
        Act::RefuseFirst if password == b"token-1\0" => {
            Some(("28P01", "password authentication failed"))
        }
        _ => None,
    };
    if let Some((code, text)) = refusal {
        let error = format!("SFATAL\0C{code}\0M{text}\0\0");
        return stream.write_all(&frame(b'E', error.as_bytes())).await;
    }
    let welcome = [
        frame(b'R', &[0, 0, 0, 0]),
        frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]),
        frame(b'Z', b"I"),
    ];
    stream.write_all(&welcome.concat()).await?;
    stream.read_to_end(&mut Vec::new()).await?;
    Ok(())
}

/// Makes `token-2`, `token-3` and so on, once there is a `token-1`.
struct Counting(Arc<AtomicUsize>);

impl Mint for Counting {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        let number = self.0.fetch_add(1, Ordering::SeqCst) + 2;
        Box::pin(ready(Ok(minted(number))))
    }
}

fn minted(number: usize) -> Minted {
    Minted {
        secret: SecretString::from(format!("token-{number}")),
        expires_at: Some(Timestamp::now() + Duration::from_hours(1)),
    }
}

struct Fixture {
    upstream: Upstream,
    connect: ConnectSettings,
    mints: Arc<AtomicUsize>,
    _stop: DropGuard,
    _refresher: JoinSet<()>,
}

fn limits() -> Timeouts {
    Timeouts {
        connect_timeout: LONG,
        server_connect_timeout: LONG,
        credential_timeout: LONG,
        capacity_timeout: LONG,
    }
}

fn fixture(server: &Server, limits: Timeouts) -> Arc<Fixture> {
    let metrics = Metrics::new().unwrap();
    let cell = CredentialCell::new(Clock::system());
    cell.publish(minted(1), 0.0);
    let mints = Arc::new(AtomicUsize::new(0));
    let stop = CancellationToken::new();
    let mut refresher = JoinSet::new();
    let minter = Refresher::new(
        Arc::new(Counting(Arc::clone(&mints))),
        cell.clone(),
        Arc::clone(&metrics),
    );
    refresher.spawn(minter.run(stop.clone()));
    let endpoint = Endpoint {
        label: Label::new("e"),
        host: "127.0.0.1".to_owned(),
        port: server.port,
        addresses: Addresses::default(),
        user: "me".to_owned(),
        database: "db".to_owned(),
        security: Security::Plain,
        dropped: DroppedParameters::default(),
    };
    let mut upstream = Upstream::new(endpoint, cell, metrics);
    upstream.failing_budget = Duration::from_millis(150);
    Arc::new(Fixture {
        upstream,
        connect: ConnectSettings {
            timeouts: limits,
            keepalive: Keepalive::default(),
        },
        mints,
        _stop: stop.drop_guard(),
        _refresher: refresher,
    })
}

impl Fixture {
    async fn connect(&self) -> Result<Connected, Refusal> {
        let settings = LoginParameters {
            database: "db".to_owned(),
            fallback_database: None,
            parameters: Vec::new(),
            client_encoding: None,
            replication: false,
            ..LoginParameters::default()
        };
        timeout(LONG * 2, self.upstream.connect(&settings, &self.connect))
            .await
            .expect("neither session nor refusal")
    }

    async fn refused(&self) -> Refusal {
        self.connect().await.map(|_| ()).unwrap_err()
    }

    fn mints(&self) -> usize {
        self.mints.load(Ordering::SeqCst)
    }
}

type Clients = JoinSet<Result<Connected, Refusal>>;

fn clients(fixture: &Arc<Fixture>, count: usize) -> Clients {
    let mut clients = JoinSet::new();
    for _ in 0..count {
        let fixture = Arc::clone(fixture);
        clients.spawn(async move { fixture.connect().await });
    }
    clients
}

#[tokio::test]
async fn while_the_endpoint_wakes_one_client_dials_for_all() {
    const CLIENTS: usize = 200;
    let server = Server::start(Act::Asleep).await;
    let fixture = fixture(&server, limits());
    let clients = clients(&fixture, CLIENTS);
    // Those under way when the first was refused, and then the leader's own.
    server.dialed(CONCURRENT_LOGINS + 4).await;
    let asleep = server.seen.dials();
    assert!(
        asleep <= CONCURRENT_LOGINS + 8,
        "{asleep} dials while asleep"
    );
    server.now(Act::Welcome);
    let results = timeout(LONG, clients.join_all()).await.unwrap();
    let held = results
        .iter()
        .filter(|result| result.as_ref().unwrap().woke_after.is_some())
        .count();
    assert!(held >= CLIENTS - 1, "only {held} know that they were held");
    let dials = server.seen.dials();
    assert!(dials <= CLIENTS + asleep + 2, "{dials} dials in all");
    drop(results);
}

#[tokio::test]
async fn a_leader_that_hangs_up_hands_the_lead_over() {
    let server = Server::start(Act::Asleep).await;
    let fixture = fixture(&server, limits());
    let mut leader = clients(&fixture, 1);
    server.dialed(2).await;
    let others = clients(&fixture, 5);
    server.dialed(4).await;
    leader.shutdown().await;
    let dials = server.seen.dials();
    server.dialed(dials + 2).await;
    server.now(Act::Welcome);
    for result in timeout(LONG, others.join_all()).await.unwrap() {
        assert!(result.unwrap().woke_after.is_some());
    }
    assert_eq!(
        fixture.upstream.logins.free(),
        6,
        "one, and one for each login"
    );
}

#[tokio::test]
async fn after_a_whole_budget_has_failed_later_clients_wait_less_until_a_login_works() {
    let server = Server::start(Act::Asleep).await;
    let fixture = fixture(
        &server,
        Timeouts {
            connect_timeout: Duration::from_millis(800),
            ..limits()
        },
    );
    let began = Instant::now();
    let refusal = fixture.refused().await;
    let whole = began.elapsed();
    assert_eq!(
        (refusal.reason, refusal.report.sqlstate.as_str()),
        (Reason::Waking, "08006")
    );
    assert!(fixture.upstream.wake.has_spent_budget());
    assert!(server.seen.dials() >= 3, "{} dials", server.seen.dials());

    let began = Instant::now();
    assert_eq!(fixture.refused().await.reason, Reason::Waking);
    assert!(began.elapsed() < whole, "waited as long as before");

    server.now(Act::Welcome);
    drop(fixture.connect().await.unwrap());
    assert!(!fixture.upstream.wake.has_spent_budget());
}

#[tokio::test]
async fn a_server_that_stalls_is_given_one_attempts_time_and_tried_again() {
    let server = Server::start(Act::Stall).await;
    let fixture = fixture(
        &server,
        Timeouts {
            server_connect_timeout: Duration::from_millis(50),
            ..limits()
        },
    );
    let client = clients(&fixture, 1);
    server.dialed(3).await;
    server.now(Act::Welcome);
    assert!(client.join_all().await.remove(0).is_ok());
}

#[tokio::test]
async fn a_rejected_identity_mints_once_for_all_clients_and_is_tried_once_more() {
    let server = Server::start(Act::RefuseFirst).await;
    let fixture = fixture(&server, limits());
    fixture
        .upstream
        .credentials
        .accepted(1, Cause::login("another", "db", false));
    for result in clients(&fixture, 20).join_all().await {
        assert!(result.unwrap().woke_after.is_none(), "nothing was asleep");
    }
    assert_eq!(fixture.mints(), 1);
    assert!(server.seen.dials() <= 40);
}

#[tokio::test]
async fn an_identity_that_is_always_rejected_is_refused_after_one_retry() {
    let server = Server::start(Act::Refuse(
        "28P01",
        "password authentication failed for user \"me\"",
    ))
    .await;
    let fixture = fixture(&server, limits());
    fixture
        .upstream
        .credentials
        .accepted(1, Cause::login("another", "db", false));
    let refusal = fixture.refused().await;
    assert_eq!(
        (refusal.reason, refusal.report.sqlstate.as_str()),
        (Reason::Identity, "28P01")
    );
    assert!(refusal.report.hint.is_some());
    let detail = refusal.report.detail.unwrap();
    assert!(detail.ends_with("for user \"me\""), "{detail}");
    assert_eq!((server.seen.dials(), fixture.mints()), (2, 1));
}

#[tokio::test]
async fn a_full_endpoint_is_waited_for_a_little() {
    let server = Server::start(Act::Refuse("53300", "sorry, too many clients already")).await;
    let fixture = fixture(
        &server,
        Timeouts {
            capacity_timeout: Duration::from_millis(400),
            ..limits()
        },
    );
    let refusal = fixture.refused().await;
    assert_eq!(
        (refusal.reason, refusal.report.sqlstate.as_str()),
        (Reason::Capacity, "53300")
    );
    let dials = server.seen.dials();
    assert!((2..=8).contains(&dials), "{dials} dials");
    assert_eq!(fixture.mints(), 0);

    let client = clients(&fixture, 1);
    server.dialed(dials + 1).await;
    server.now(Act::Welcome);
    assert!(client.join_all().await.remove(0).is_ok());
}

#[tokio::test]
async fn room_is_waited_for_even_by_a_client_that_waited_for_the_endpoint_before() {
    let server = Server::start(Act::Asleep).await;
    let fixture = fixture(
        &server,
        Timeouts {
            capacity_timeout: Duration::from_millis(200),
            ..limits()
        },
    );
    let client = clients(&fixture, 1);
    // Longer than the wait for room.
    server.dialed(5).await;
    let dials = server.seen.dials();
    server.now(Act::Refuse("53300", "sorry, too many clients already"));
    server.dialed(dials + 2).await;
    let refusal = client.join_all().await.remove(0).map(|_| ()).unwrap_err();
    assert_eq!(refusal.reason, Reason::Capacity);
}

#[tokio::test]
async fn a_failure_that_waiting_does_not_fix_is_refused_at_once() {
    for (code, text, reason, sqlstate) in [
        (
            "28000",
            "role \"me\" does not exist",
            Reason::Permission,
            "28000",
        ),
        (
            "3D000",
            "database \"db\" does not exist",
            Reason::Permission,
            "3D000",
        ),
        (
            "XX000",
            "Provided authentication token is not a valid JWT encoding",
            Reason::WrongKind,
            "28000",
        ),
        (
            "08006",
            "Connection does not have SNI.",
            Reason::Protocol,
            "08006",
        ),
        ("58000", "something new", Reason::Other, "58000"),
    ] {
        let server = Server::start(Act::Refuse(code, text)).await;
        let fixture = fixture(&server, limits());
        let refusal = fixture.refused().await;
        assert_eq!(
            (refusal.reason, refusal.report.sqlstate.as_str()),
            (reason, sqlstate),
            "{text}"
        );
        assert!(
            refusal
                .report
                .detail
                .is_some_and(|detail| detail.contains(text))
        );
        assert_eq!((server.seen.dials(), fixture.mints()), (1, 0), "{text}");
    }
}

#[tokio::test]
async fn a_bounded_number_of_clients_log_in_at_a_time() {
    let server = Server::start(Act::Stall).await;
    let fixture = fixture(&server, limits());
    let clients = clients(&fixture, 100);
    server.dialed(CONCURRENT_LOGINS).await;
    let more = timeout(
        Duration::from_millis(100),
        server.dialed(CONCURRENT_LOGINS + 1),
    )
    .await;
    assert!(
        more.is_err(),
        "{} clients log in",
        server.seen.logging_in.load(Ordering::SeqCst)
    );
    server.now(Act::Welcome);
    for result in timeout(LONG, clients.join_all()).await.unwrap() {
        assert!(result.is_ok());
    }
}

#[tokio::test]
async fn a_client_without_an_attempt_does_not_change_the_endpoints_state() {
    let server = Server::start(Act::Welcome).await;
    let fixture = fixture(
        &server,
        Timeouts {
            connect_timeout: Duration::from_millis(50),
            ..limits()
        },
    );
    let mut taken = Vec::new();
    while let Some(slot) = fixture.upstream.logins.take().now_or_never() {
        taken.push(slot);
    }
    let refusal = fixture.refused().await;
    assert_eq!(
        (refusal.reason, refusal.report.sqlstate.as_str()),
        (Reason::Capacity, "53300")
    );
    assert_eq!(server.seen.dials(), 0);
    assert!(!fixture.upstream.wake.is_waking() && !fixture.upstream.wake.has_spent_budget());
    drop(taken);
    assert!(fixture.connect().await.is_ok());
}

#[tokio::test]
async fn a_cancel_reaches_the_address_that_gave_the_key() {
    let (server, elsewhere) = (
        Server::start(Act::Welcome).await,
        Server::start(Act::Welcome).await,
    );
    let fixture = fixture(&elsewhere, limits());
    let key = CancelKey {
        process_id: 7,
        secret: 9,
    };
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let keepalive = &fixture.connect.keepalive;
    fixture
        .upstream
        .cancel(address, key, keepalive)
        .await
        .unwrap();
    let cancels = server.seen.cancels.lock().unwrap();
    assert_eq!(cancels.concat(), key.request());
    assert_eq!(elsewhere.seen.dials(), 0);
}

#[tokio::test]
async fn a_login_that_its_own_settings_make_slow_delays_no_other_client() {
    let server = Server::start(Act::Stall).await;
    let fixture = fixture(
        &server,
        Timeouts {
            server_connect_timeout: SLOW_LOGIN * 2,
            ..limits()
        },
    );
    // Every place, and every one of them slow after the password.
    let slow = clients(&fixture, CONCURRENT_LOGINS);
    server.dialed(CONCURRENT_LOGINS).await;
    let other = clients(&fixture, 1);
    server.dialed(CONCURRENT_LOGINS + 1).await;
    // The slow ones have run into their time limit and are tried again.
    server.dialed(CONCURRENT_LOGINS + 2).await;
    assert!(!fixture.upstream.wake.is_waking());
    server.now(Act::Welcome);
    for result in slow
        .join_all()
        .await
        .into_iter()
        .chain(other.join_all().await)
    {
        result.unwrap();
    }
}

#[tokio::test]
async fn a_leader_whose_own_login_is_slow_hands_the_lead_on() {
    let server = Server::start(Act::Asleep).await;
    let fixture = fixture(&server, limits());
    let leader = clients(&fixture, 1);
    server.dialed(2).await;
    server.now(Act::Stall);
    let dials = server.seen.dials();
    server.dialed(dials + 1).await;
    // Leads while the first one's login is under way.
    let other = clients(&fixture, 1);
    server.dialed(dials + 2).await;
    server.now(Act::Welcome);
    for result in leader
        .join_all()
        .await
        .into_iter()
        .chain(other.join_all().await)
    {
        assert!(result.unwrap().woke_after.is_some());
    }
}

/// They made their attempts one after another, each a lookup of its own, and the last was refused after 45 s.
#[tokio::test(start_paused = true)]
async fn two_hundred_clients_learn_as_fast_as_one_that_a_name_does_not_resolve() {
    let server = Server::start(Act::Welcome).await;
    let fixture = fixture(
        &server,
        Timeouts {
            connect_timeout: LONG * 2,
            ..limits()
        },
    );
    // A label of more than 63 characters is sent to no name server, whose time to answer would count.
    let endpoint = Endpoint {
        host: "x".repeat(64),
        ..(*fixture.upstream.endpoint()).clone()
    };
    fixture.upstream.redirect(endpoint);
    for count in [1, 200] {
        let began = Instant::now();
        for result in clients(&fixture, count).join_all().await {
            let refusal = result.map(|_| ()).unwrap_err();
            assert!(refusal.report.message.contains("cannot resolve host name"));
        }
        let waited = began.elapsed();
        assert!(waited <= Duration::from_secs(11), "{count}: {waited:?}");
    }
}

/// Freshly issued credentials were seen refused for a few seconds; replacing them at once would start that time anew.
#[tokio::test]
async fn a_young_credential_that_is_refused_is_tried_again_before_another_is_minted() {
    let server = Server::start(Act::Refuse("28P01", "password authentication failed")).await;
    let fixture = fixture(&server, limits());
    let client = clients(&fixture, 1);
    server.dialed(2).await;
    server.now(Act::Welcome);
    assert!(client.join_all().await.remove(0).is_ok());
    assert_eq!(fixture.mints(), 0);
}
