//! The life of server connections: opened, idle, expired, lost, shut down.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lakebase_proxy::emulator::{Action, Disruption, EmulatorOptions, ServerError, Site};
use tokio::time::{Instant, sleep};

use super::*;

#[tokio::test]
async fn an_idle_connection_is_closed_after_its_time_and_not_replaced() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 5);
        settings.server_idle_timeout = Some(millis(500));
    })
    .await;
    let clients = [proxy.client().await, proxy.client().await];
    drop(clients);
    eventually("they close", async || {
        (proxy.closes(PoolClose::IdleTimeout) == 2).then_some(())
    })
    .await;
    proxy.until_quiet().await;
    assert_eq!(emulator.counts().logins, 2);
}

#[tokio::test]
async fn a_connection_that_the_server_closes_while_idle_reaches_no_client() {
    let (emulator, proxy) = proxy(3).await;
    let role = emulator.identities().app.name.clone();
    drop([proxy.client().await, proxy.client().await]);
    proxy.until_idle(2).await;
    let superuser = harness::superuser().await;
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1 and backend_type = 'client backend'";
    superuser.query(terminate, &[&role]).await.unwrap();
    eventually("both are closed", async || {
        (proxy.closes(PoolClose::Server) == 2).then_some(())
    })
    .await;
    assert_eq!(
        emulator.counts().logins,
        2,
        "not replaced before a client needs one"
    );
    assert_eq!(proxy.metrics().pool_hidden_losses.get(), 2);
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
}

/// Never one that another client has had, and the client keeps it to its end.
#[tokio::test]
async fn without_pooling_a_client_may_get_a_connection_opened_ahead() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| settings.spare_pool_size = Some(1)).await;
    let mut pids = BTreeSet::new();
    for number in 1..=5 {
        let client = proxy.client().await;
        assert!(pids.insert(pid(&client).await), "a connection of its own");
        client.batch_execute("set work_mem = '7MB'").await.unwrap();
        eventually("a spare", async || {
            (proxy.servers(PoolServer::Idle) == 1).then_some(())
        })
        .await;
        assert_eq!(emulator.counts().logins, number + 1);
    }
    assert_eq!(proxy.closes(PoolClose::Taken), 4);
    let mut other = proxy.client_config();
    other.application_name("another");
    let other = connect(&other).await;
    assert_eq!(value(&other, "show application_name").await, "another");
    assert_eq!(proxy.closes(PoolClose::Taken), 4, "it needs another login");
    eventually("sessions are closed", async || {
        (proxy.metrics().upstream_active.get() <= 3).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_spare_connection_is_opened_ahead_of_the_next_client() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 10);
        settings.spare_pool_size = Some(2);
    })
    .await;
    let one = proxy.client().await;
    eventually("the spares", async || {
        (proxy.servers(PoolServer::Idle) == 2).then_some(())
    })
    .await;
    let two = proxy.client().await;
    assert_eq!(proxy.metrics().pool_leases[PoolLease::Idle].get(), 1);
    drop((one, two));
}

#[tokio::test]
async fn a_shutdown_leaves_no_backend_behind() {
    let (emulator, proxy) = proxy(5).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let busy = proxy.client().await;
    drop([proxy.client().await, proxy.client().await]);
    within("the shutdown", proxy.end(std::future::pending())).await;
    eventually("all backends end", async || {
        (harness::backends(&superuser, &role).await == 0).then_some(())
    })
    .await;
    drop(busy);
}

/// PostgreSQL applies a reload of its settings to an idle session with the next request.
#[tokio::test]
async fn a_setting_that_the_server_has_reloaded_is_in_the_next_welcome() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let proxy = Proxy::with(&emulator, one).await;
    let mut wire = proxy.session().await;
    assert_eq!(wire.value("show datestyle").await, "ISO, MDY");
    drop(wire);
    emulator
        .execute("alter system set datestyle = 'SQL, DMY'")
        .await
        .unwrap();
    emulator.execute("select pg_reload_conf()").await.unwrap();
    let welcome = eventually("a welcome with it", async || {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone"), ("database", DATABASE)])
            .await;
        let welcome = wire.welcome().await;
        wire.query("select 1").await;
        (welcome.parameters["DateStyle"] == "SQL, DMY").then_some(welcome)
    })
    .await;
    assert_eq!(welcome.notices, []);
    assert_eq!(emulator.counts().logins, 1, "on the same connection");
    emulator.stop().await;
}

/// Each client is sent it once, whatever connection reports it, and a new client with its welcome.
#[tokio::test]
async fn a_setting_that_the_server_reloads_is_reported_to_each_connected_client_once() {
    let (server, emulator) = harness::own_server().await;
    let proxy = Proxy::with(&emulator, |settings| {
        one(settings);
        settings.pool_mode = Some(PoolMode::Transaction);
    })
    .await;
    let mut clients = [
        proxy.session().await,
        proxy.session().await,
        proxy.session().await,
    ];
    // One that sets its own keeps it.
    clients[2].query("set datestyle = 'German'").await;
    emulator
        .execute("alter system set datestyle = 'SQL, DMY'")
        .await
        .unwrap();
    emulator.execute("select pg_reload_conf()").await.unwrap();
    eventually("the reload", async || {
        let session = harness::superuser_of(&server).await;
        (value(&session, "show datestyle").await == "SQL, DMY").then_some(())
    })
    .await;
    for (number, client) in clients.iter_mut().enumerate() {
        let mut reported = Vec::new();
        for _ in 0..3 {
            client.send(&text('Q', "select 1")).await;
            let replies = within("an answer", client.until('Z')).await;
            let of_style = replies
                .into_iter()
                .filter(|reply| reply.tag == 'S' && reply.body.starts_with(b"DateStyle"));
            reported.extend(of_style.map(|reply| reply.body));
        }
        let expected: &[&[u8]] = match number {
            2 => &[],
            _ => &[b"DateStyle\0SQL, DMY\0"],
        };
        assert_eq!(reported, expected, "{number}");
    }
    assert_eq!(clients[2].value("show datestyle").await, "German, DMY");
    let mut late = proxy.dial().await;
    late.startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    assert_eq!(late.welcome().await.parameters["DateStyle"], "SQL, DMY");
    assert_eq!(emulator.counts().logins, 1, "{}", proxy.close_reasons());
    emulator.stop().await;
}

/// The server reports it with the answer to the next request, which is the client's.
#[tokio::test]
async fn a_setting_that_the_server_reloads_while_idle_is_reported_to_the_next_client_once() {
    let (server, emulator) = harness::own_server().await;
    let proxy = Proxy::with(&emulator, one).await;
    let mut seen = Vec::new();
    for round in 0..3 {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone"), ("database", DATABASE)])
            .await;
        let welcome = wire.welcome().await;
        wire.send(&text('Q', "select 1")).await;
        let replies = wire.until('Z').await;
        let reported = replies.iter().filter(|reply| reply.tag == 'S').count();
        seen.push((welcome.parameters["DateStyle"].clone(), reported));
        drop(wire);
        proxy.until_idle(1).await;
        if round == 0 {
            let alter = "alter system set datestyle = 'SQL, DMY'";
            emulator.execute(alter).await.unwrap();
            emulator.execute("select pg_reload_conf()").await.unwrap();
            // A session that begins after the reload: all others have been notified of it.
            eventually("the reload", async || {
                let session = harness::superuser_of(&server).await;
                (value(&session, "show datestyle").await == "SQL, DMY").then_some(())
            })
            .await;
        }
    }
    let expected = [("ISO, MDY", 0), ("ISO, MDY", 1), ("SQL, DMY", 0)];
    assert_eq!(
        seen,
        expected.map(|(value, reported)| (value.to_owned(), reported))
    );
    assert_eq!(emulator.counts().logins, 1, "on the same connection");
    emulator.stop().await;
}

/// Clients that insert one row after the other, without a pause, and connect again for each or after a loss.
struct Ledger {
    is_over: Arc<AtomicBool>,
    /// The rows that were acknowledged, and those that were not.
    clients: JoinSet<(Vec<String>, Vec<String>)>,
}

impl Ledger {
    /// `stays` connected from one row to the next.
    async fn start(proxy: &Proxy, stays: bool) -> Self {
        let client = proxy.client().await;
        client
            .batch_execute("create table pool_ledger (token text)")
            .await
            .unwrap();
        let is_over = Arc::<AtomicBool>::default();
        let clients = (0..30)
            .map(|number| insert_rows(number, proxy.client_config(), Arc::clone(&is_over), stays))
            .collect();
        Self { is_over, clients }
    }

    /// Every acknowledged row is there, and none twice; returns how many clients lost their connection.
    async fn check(self, proxy: &Proxy) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = within("the clients", self.clients.join_all()).await;
        let client = proxy.client().await;
        let query = "select token, count(*) from pool_ledger group by token";
        let rows = client.query(query, &[]).await.unwrap();
        let rows: HashMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert!(rows.values().all(|count| *count == 1), "{rows:?}");
        let (done, unknown): (Vec<_>, Vec<_>) = ended.into_iter().unzip();
        let (done, unknown) = (done.concat(), unknown.concat());
        assert!(done.iter().all(|token| rows.contains_key(token)));
        let found = unknown.iter().filter(|token| rows.contains_key(*token));
        assert_eq!(rows.len(), done.len() + found.count());
        assert!(!done.is_empty() && !unknown.is_empty());
        client
            .batch_execute("drop table pool_ledger")
            .await
            .unwrap();
        unknown.len()
    }
}

async fn insert_rows(
    number: usize,
    config: tokio_postgres::Config,
    is_over: Arc<AtomicBool>,
    stays: bool,
) -> (Vec<String>, Vec<String>) {
    let (mut done, mut unknown) = (Vec::new(), Vec::new());
    let mut connected = None;
    for turn in 0.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let token = format!("{number}-{turn}");
        // No login fails.
        let client = match connected.take() {
            Some(client) => client,
            None => connect(&config).await,
        };
        let insert = format!("insert into pool_ledger values ('{token}'); select pg_sleep(0.005)");
        match client.batch_execute(&insert).await {
            Ok(()) => {
                done.push(token);
                connected = stays.then_some(client);
            }
            Err(error) => {
                // The server's reason, or ours where it sent none; tokio-postgres keeps none that came before the request.
                let lost = [SqlState::ADMIN_SHUTDOWN, SqlState::CONNECTION_FAILURE];
                let is_lost = error.code().is_some_and(|code| lost.contains(code));
                assert!(is_lost || error.is_closed(), "{error:?}");
                unknown.push(token);
            }
        }
    }
    (done, unknown)
}

/// Every login replaces a connection of the pool that was lost: the bound of logins is the size for each loss, and the size
/// once.
#[tokio::test]
async fn clients_that_wait_notice_no_loss_and_no_acknowledged_row_is_lost_or_doubled() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        losses(mode).await;
    }
}

async fn losses(mode: PoolMode) {
    const SIZE: usize = 5;
    const LOSSES: u64 = 10;
    let (emulator, proxy) = proxy_in(mode, SIZE).await;
    let ledger = Ledger::start(&proxy, mode == PoolMode::Transaction).await;
    // A connected client at rest notices no loss, either.
    let mut resting = Vec::new();
    if mode == PoolMode::Transaction {
        for _ in 0..10 {
            resting.push(proxy.client().await);
        }
    }
    for _ in 0..LOSSES {
        sleep(Duration::from_millis(200)).await;
        emulator.terminate_sessions().await;
    }
    for client in &resting {
        assert_eq!(value(client, "select 1").await, "1");
    }
    let lost = ledger.check(&proxy).await;
    let logins = emulator.counts().logins;
    assert!(
        logins <= SIZE as u64 * (LOSSES + 1),
        "{logins} logins for {LOSSES} losses, {lost} clients lost"
    );
}

/// The bound of dials for each restart: as many as connections were lost, which find the server down at once; then one at a
/// time, with waits that grow from 50 ms (ten in five seconds); then as many as connections were lost.
#[tokio::test]
async fn clients_that_wait_notice_no_restart_of_the_server() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        restarts(mode).await;
    }
}

async fn restarts(mode: PoolMode) {
    const SIZE: usize = 5;
    const RESTARTS: u64 = 3;
    let (server, emulator) = harness::own_server().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, SIZE);
        settings.pool_mode = Some(mode);
    })
    .await;
    let ledger = Ledger::start(&proxy, mode == PoolMode::Transaction).await;
    let leases = || proxy.metrics().pool_wait_seconds.get_sample_count();
    let busy = async || {
        let before = leases();
        eventually("clients are served", async || {
            (leases() > before + 100).then_some(())
        })
        .await;
    };
    let mut down = Duration::ZERO;
    for _ in 0..RESTARTS {
        busy().await;
        let began = Instant::now();
        within("the restart", server.restart()).await.unwrap();
        down += began.elapsed();
    }
    busy().await;
    ledger.check(&proxy).await;
    let counts = emulator.counts();
    assert!(counts.logins <= SIZE as u64 * (RESTARTS + 1), "{counts:?}");
    let failed = counts.dials - counts.logins;
    let bound = RESTARTS * (SIZE as u64 + 10) + down.as_secs();
    assert!(failed <= bound, "{down:?}: {counts:?}");
    emulator.stop().await;
}

#[tokio::test]
async fn connections_that_reach_their_lifetime_are_replaced_one_by_one_and_only_when_needed() {
    const SIZE: u64 = 6;
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 6);
        settings.server_lifetime = Some(millis(1000));
    })
    .await;
    let until = Instant::now() + Duration::from_secs(5);
    let clients: JoinSet<()> = (0..SIZE)
        .map(|_| {
            let config = proxy.client_config();
            async move {
                while Instant::now() < until {
                    value(&connect(&config).await, "select pg_sleep(0.01)").await;
                }
            }
        })
        .collect();
    within("the clients", clients.join_all()).await;
    let logins = eventually("no login is under way", async || {
        let counts = emulator.counts();
        (counts.dials == counts.logins).then_some(counts.logins)
    })
    .await;
    // Each lives for 0.8 s at least.
    assert!(
        (2 * SIZE..=7 * SIZE).contains(&logins),
        "{logins} logins in 5 s"
    );
    eventually("all reach it", async || {
        (proxy.metrics().upstream_active.get() == 0).then_some(())
    })
    .await;
    assert_eq!(emulator.counts().logins, logins, "no client needed one");
    assert_eq!(proxy.closes(PoolClose::Lifetime), logins);
}

#[tokio::test]
async fn a_pool_whose_credential_is_refused_serves_on_with_what_it_has() {
    let (emulator, proxy) = proxy(4).await;
    let clients = [
        proxy.client().await,
        proxy.client().await,
        proxy.client().await,
    ];
    let refused = ServerError::fatal("28P01", "password authentication failed");
    emulator
        .faults()
        .always(Site::Password, Action::Error(refused));
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "28P01", "{refusal:?}");
    assert!(refusal.hint.is_some(), "{refusal:?}");
    for client in &clients {
        assert_eq!(value(client, "select 1").await, "1");
    }
    drop(clients);
    proxy.until_idle(3).await;
    let pids: BTreeSet<String> = BTreeSet::from([
        pid(&proxy.client().await).await,
        pid(&proxy.client().await).await,
    ]);
    assert!(!pids.is_empty());
    emulator.faults().clear();
    let four = [
        proxy.client().await,
        proxy.client().await,
        proxy.client().await,
        proxy.client().await,
    ];
    assert_eq!(value(&four[3], "select 1").await, "1");
}

/// In `transaction` mode the refusal is an error of the request alone.
#[tokio::test]
async fn a_request_whose_login_is_refused_fails_and_its_session_goes_on() {
    let (emulator, proxy) = proxy_in(PoolMode::Transaction, 4).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(proxy.session().await);
    }
    proxy.until_at_rest().await;
    emulator.suspend().await;
    proxy.until_idle(0).await;
    // One connection each.
    for client in &mut clients[..3] {
        client.query("begin").await;
    }
    let refused = ServerError::fatal("28P01", "password authentication failed");
    emulator
        .faults()
        .always(Site::Password, Action::Error(refused));
    clients[3].send(&text('Q', "select 1")).await;
    let replies = within("the refusal", clients[3].until('Z')).await;
    let error = replies[0].error();
    assert_eq!((&*error.code, &*error.severity), ("28P01", "ERROR"));
    assert!(error.hint.is_some(), "{error:?}");
    for client in &mut clients[..3] {
        assert_eq!(client.value("select 1").await, "1");
        client.query("commit").await;
    }
    // With a connection that is there, it needs no login.
    assert_eq!(clients[3].value("select 2").await, "2");
    emulator.faults().clear();
    for client in &mut clients {
        client.query("begin").await;
    }
    assert_eq!(clients[3].value("select 3").await, "3");
}

#[tokio::test]
async fn a_shutdown_closes_idle_connections_first_and_lets_requests_end() {
    let (emulator, proxy) = proxy(3).await;
    let role = emulator.identities().app.name.clone();
    let (busy, others) = (
        proxy.client().await,
        [proxy.client().await, proxy.client().await],
    );
    drop(others);
    proxy.until_idle_beside(2, 1).await;
    let metrics = Arc::clone(proxy.metrics());
    let query =
        TaskTracker::new().spawn(async move { value(&busy, "select pg_sleep(2), 1").await });
    harness::until_running(&role, 1).await;
    let (answer, (), ()) = tokio::join!(
        async { within("the query", query).await.unwrap() },
        proxy.end(std::future::pending()),
        eventually("the idle ones end", async || {
            let idle = metrics.pool_servers[PoolServer::Idle].get();
            let leased = metrics.pool_servers[PoolServer::Leased].get();
            (idle == 0 && leased == 1).then_some(())
        })
    );
    assert_eq!(metrics.pool_closes[PoolClose::Shutdown].get(), 3);
    assert_eq!(answer, "");
    let superuser = harness::superuser().await;
    eventually("all backends end", async || {
        (harness::backends(&superuser, &role).await == 0).then_some(())
    })
    .await;
}

/// As a test suite does with its database: a connection that its clients have left would be in the way.
#[tokio::test]
async fn a_database_is_dropped_once_its_clients_have_left() {
    for (mode, name) in [
        (PoolMode::Session, "pool_dropped_session"),
        (PoolMode::Transaction, "pool_dropped_transaction"),
        (PoolMode::Auto, "Pool \"dropped\" auto"),
    ] {
        let (emulator, proxy) = proxy_in(mode, 3).await;
        let quoted = format!("\"{}\"", name.replace('"', "\"\""));
        let role = emulator.identities().app.name.clone();
        let drop_it = format!("drop database if exists {quoted}");
        let create = format!("create database {quoted} owner \"{role}\"");
        let mut config = proxy.client_config();
        config.dbname(name);
        for is_prepared in [false, true] {
            emulator.execute(&drop_it).await.unwrap();
            emulator.execute(&create).await.unwrap();
            let client = proxy.try_client(&config).await.unwrap();
            assert_eq!(value(&client, "select current_database()").await, name);
            drop(client);
            let others = i64::from(is_prepared);
            proxy.until_idle(others + 1).await;
            let other = proxy.client().await;
            let dropped = if is_prepared {
                other.execute(&drop_it, &[]).await.map(drop)
            } else {
                other.batch_execute(&drop_it).await
            };
            dropped.unwrap();
            drop(other);
            proxy.until_idle(1).await;
        }
    }
}

/// Whether a connection to this port is established, as the kernel has it: the end of a connection may still be on its way to it on a
/// busy machine, although the peer has closed the socket.
#[cfg(target_os = "linux")]
fn is_any_established(port: u16) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(std::fs::read_to_string);
    let tables = tables.into_iter().flatten().collect::<String>();
    let remote = format!(":{port:04X}");
    let is_established = |line: &str| {
        let mut fields = line.split_whitespace().skip(2);
        fields.next().is_some_and(|it| it.ends_with(&remote)) && fields.next() == Some("01")
    };
    tables.lines().any(is_established)
}

/// As on a laptop that wakes up: the sockets are dead, and their peers do not know them.
#[tokio::test]
async fn idle_connections_that_are_reset_at_once_reach_no_client() {
    let (emulator, proxy) = proxy(5).await;
    for disruption in [Disruption::Reset, Disruption::Close] {
        let clients: JoinSet<_> = (0..5)
            .map(|_| {
                let config = proxy.client_config();
                async move { connect(&config).await }
            })
            .collect();
        drop(clients.join_all().await);
        proxy.until_idle(5).await;
        emulator.disrupt_sessions(disruption);
        let ended = emulator.wait_for(harness::TIMEOUT, |counts| counts.sessions == 0);
        ended.await.unwrap();
        #[cfg(target_os = "linux")]
        eventually("the ends arrive", async || {
            (!is_any_established(emulator.pg_port())).then_some(())
        })
        .await;
        let clients: JoinSet<_> = (0..20)
            .map(|_| {
                let config = proxy.client_config();
                async move { value(&connect(&config).await, "select 1").await }
            })
            .collect();
        let answers = within("the clients", clients.join_all()).await;
        assert!(answers.iter().all(|answer| answer == "1"), "{answers:?}");
    }
}
