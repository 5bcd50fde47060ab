//! Nothing of one client reaches another on the connections that they share.
//!
//! Every query carries a token of its client and returns it; whatever else arrives must carry it too. Each session first
//! looks for what an earlier one may have left, works at random, and leaves at any point, while backends are terminated
//! and connections are reset.

use std::{io, net::SocketAddr, time::Duration};

use bytes::Bytes;
use lakebase_proxy::emulator::Disruption;
use rand::random_range;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    Stage,
    measure::{descriptors, eventually, metric, status},
    wire::{Wire, cancel_request, message, query},
};

const CLIENTS: u32 = 200;
const CONNECTIONS: &str = "20";
/// Far longer than a session takes: one that hangs fails.
const SESSION_TIMEOUT: Duration = Duration::from_mins(2);
/// Between two losses of connections.
const LOSS_INTERVAL: Duration = Duration::from_millis(700);

pub(crate) fn arguments(mode: &str) -> Vec<&str> {
    let size = ["--default-pool-size", CONNECTIONS, "--spare-pool-size", "0"];
    let rest = ["--pool-mode", mode, "--server-idle-timeout", "15s"];
    [size, rest].concat()
}

/// What has become of the sessions.
#[derive(Clone, Copy, Default)]
struct Tally {
    sessions: u64,
    answers: u64,
    /// Ended by a loss of the connection.
    lost: u64,
    cancelled: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.sessions += other.sessions;
        self.answers += other.answers;
        self.lost += other.lost;
        self.cancelled += other.cancelled;
    }
}

/// `shares` connections: by transactions, and not by sessions.
pub(crate) async fn clients(stage: &Stage, duration: Duration, shares: bool) {
    let table = "drop table if exists canary_in; create table canary_in (token text)";
    stage.emulator.execute(table).await.unwrap();
    let process = stage.proxy.id();
    at_rest(stage).await;
    let before = descriptors(process);
    let until = Instant::now() + duration;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(client_until(stage.postgres, client, until, shares));
    }
    let losses = async {
        let mut losses = 0_u64;
        let mut warm = 0;
        while Instant::now() < until {
            sleep(LOSS_INTERVAL).await;
            losses += 1;
            if losses.is_multiple_of(10) {
                stage.emulator.disrupt_sessions(Disruption::Reset);
                sleep(Duration::from_millis(5)).await;
                stage.emulator.disrupt_sessions(Disruption::None);
            } else {
                let terminate = "select pg_terminate_backend(pid) from (select pid from pg_stat_activity \
                    where backend_type = 'client backend' and pid <> pg_backend_pid() \
                    order by random() limit 2) victims";
                stage.emulator.execute(terminate).await.unwrap();
            }
            if warm == 0 && until.duration_since(Instant::now()) < duration / 2 {
                warm = status(process, "VmRSS");
            }
        }
        (losses, warm)
    };
    let work = async {
        let mut tally = Tally::default();
        while let Some(ended) = clients.join_next().await {
            tally.add(ended.unwrap());
        }
        tally
    };
    let (tally, (losses, warm)) = tokio::join!(work, losses);
    let Tally {
        sessions,
        answers,
        lost,
        cancelled,
    } = tally;
    let now = status(process, "VmRSS");
    println!(
        "   {sessions} sessions, {answers} answers, {cancelled} cancelled, {lost} lost in {losses} losses; \
         resident {warm} kB half-way, {now} kB at the end"
    );
    let servers = metric(stage.http, "pool_servers").await;
    assert!(servers <= 20.5, "{servers} server connections");
    assert!(sessions > u64::from(CLIENTS) && cancelled > 0 && lost > 0);
    assert!(now < warm + 16 * 1024, "memory grows: {warm} to {now} kB");
    at_rest(stage).await;
    let after = descriptors(process);
    println!("   descriptors {before} before, {after} after");
    assert!(after <= before, "descriptors: {before} to {after}");
    assert!(metric(stage.http, "session_panics_total").await < 0.5);
}

/// Waits until no client is left, and the idle connections have reached their timeout.
async fn at_rest(stage: &Stage) {
    eventually(Duration::from_mins(1), async || {
        for name in [
            "client_connections_active",
            "upstream_connections_active",
            "pool_servers",
            "pool_clients_waiting",
        ] {
            let count = metric(stage.http, name).await;
            if count > 0.5 {
                return Some(format!("{name} is {count}"));
            }
        }
        None
    })
    .await;
}

async fn client_until(address: SocketAddr, client: u32, until: Instant, shares: bool) -> Tally {
    let mut tally = Tally::default();
    for turn in 0.. {
        if Instant::now() >= until {
            break;
        }
        let wire = timeout(SESSION_TIMEOUT, Wire::connect(address)).await;
        let wire = wire.unwrap_or_else(|_| panic!("client {client} still waits"));
        let wire = wire.unwrap_or_else(|error| panic!("client {client} was refused: {error}"));
        let mut session = Session {
            address,
            wire,
            client,
            token: format!("canary-{client}-{turn}-"),
            shares,
            is_listening: false,
            may_be_cancelled: false,
            tally: Tally::default(),
        };
        let ended = timeout(SESSION_TIMEOUT, session.work()).await;
        let ended = ended.unwrap_or_else(|_| panic!("{} hangs", session.token));
        session.tally.sessions = 1;
        session.tally.lost = ended.is_err().into();
        tally.add(session.tally);
        if ended.is_ok() {
            session.leave().await;
        }
    }
    tally
}

struct Session {
    address: SocketAddr,
    wire: Wire,
    client: u32,
    token: String,
    shares: bool,
    is_listening: bool,
    may_be_cancelled: bool,
    tally: Tally,
}

/// An answer up to ReadyForQuery.
#[derive(Debug, Default)]
struct Answer {
    rows: Vec<Bytes>,
    error: Option<String>,
}

impl Session {
    async fn work(&mut self) -> io::Result<()> {
        self.look().await?;
        let acts = if self.shares { 16 } else { 4 };
        for _ in 0..random_range(0..acts) {
            self.act().await?;
        }
        // Its own answers, whatever it has done; none in a failed transaction.
        let token = self.token.clone();
        let sql = format!("select '{token}', current_setting('app.token', true)");
        let answer = self.run(&sql).await?;
        if let Some(row) = answer.rows.first() {
            // Its own setting, or none: it may have been rolled back.
            let row = String::from_utf8_lossy(row);
            let foreign = row.replace(&token, "").contains("canary-");
            assert!(!foreign, "{token}: {row:?}");
        }
        assert!(
            answer.rows.len() == 1 || answer.error.is_some_and(|error| error.contains("25P02")),
            "{token}"
        );
        Ok(())
    }

    /// Looks for what an earlier session left.
    async fn look(&mut self) -> io::Result<()> {
        let token = &self.token;
        // On a connection that is shared, those of the protocol are the pool's.
        let of_sql = if self.shares { "where from_sql" } else { "" };
        let sql = format!(
            "select concat_ws('|', '{token}', \
             (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()), \
             (select count(*) from pg_listening_channels()), (select count(*) from pg_prepared_statements {of_sql}), \
             (select count(*) from pg_cursors), pg_my_temp_schema(), coalesce(current_setting('app.token', true), ''), \
             current_setting('work_mem'), current_setting('statement_timeout'), current_setting('application_name'), \
             current_setting('search_path'), current_setting('transaction_isolation'), \
             current_user = session_user, now() = statement_timestamp())"
        );
        let expected =
            format!("{token}|0|0|0|0|0||4MB|0|soak|\"$user\", public|read committed|t|t");
        let answer = self.run(&sql).await?;
        let row = answer
            .rows
            .first()
            .map(|row| String::from_utf8_lossy(&row[6..]));
        assert_eq!(row.as_deref(), Some(&expected[..]), "{answer:?}");
        Ok(())
    }

    async fn act(&mut self) -> io::Result<()> {
        let (token, client) = (self.token.clone(), self.client);
        let other = random_range(0..CLIENTS);
        let key = random_range(0..1_000_000);
        let act = if self.shares && random_range(0..8) > 0 {
            // One that pins nothing, so that the connection changes between two.
            random_range(9..14) + 9 * random_range(0..2)
        } else {
            random_range(0..23)
        };
        let sql = match act {
            0 => format!("set app.token = '{token}'"),
            1 => format!("set work_mem = '{}kB'", random_range(64..4000)),
            2 => format!("set application_name = '{token}'; set search_path = pg_catalog"),
            3 => {
                "set statement_timeout = '50s'; set default_transaction_isolation = 'serializable'"
                    .to_owned()
            }
            4 => {
                self.is_listening = true;
                format!("listen channel_{client}")
            }
            5 => format!("notify channel_{other}, 'to {other} from {token}'"),
            6 => format!("select pg_advisory_lock({key}), '{token}'"),
            7 => format!("prepare canary as select '{token}'; execute canary"),
            8 => format!(
                "declare canary cursor with hold for select '{token}'; fetch all from canary"
            ),
            9 => format!("begin; select '{token}'"),
            10 => "begin; select 1/0".to_owned(),
            11 => {
                format!("do $$ begin for i in 1..10 loop raise notice '{token}'; end loop; end $$")
            }
            12 => format!("copy (select '{token}' from generate_series(1, 1000)) to stdout"),
            13 => format!("select '{token}' || repeat('x', 1000) from generate_series(1, 200)"),
            14 if random_range(0..4) == 0 => {
                format!("create temporary table canary as select '{token}' as token; table canary")
            }
            15 => return self.pipeline().await,
            16 => return self.cancel().await,
            18 => return self.unnamed(random_range(0..3)).await,
            19 => return self.copy_in().await,
            20 => "commit".to_owned(),
            21 => format!("select '{token}', pg_sleep(0.01)"),
            _ => {
                sleep(Duration::from_millis(random_range(0..20))).await;
                format!("select '{token}'")
            }
        };
        self.run(&sql).await?;
        Ok(())
    }

    /// Several extended queries at once, by a named statement.
    async fn pipeline(&mut self) -> io::Result<()> {
        let parse = format!("canary_{}\0select '{}'\0\0\0", self.client, self.token);
        let name = format!("\0canary_{}\0\0\0\0\0\0\0", self.client);
        let mut messages = [message(b'P', parse.as_bytes()), message(b'S', b"")].concat();
        for _ in 0..10 {
            messages.extend(message(b'B', name.as_bytes()));
            messages.extend(message(b'E', b"\0\0\0\0\0"));
            messages.extend(message(b'S', b""));
        }
        self.wire.send(&messages).await?;
        for _ in 0..11 {
            self.answer().await?;
        }
        Ok(())
    }

    /// The unnamed statement, in one request; in one with a Flush; or in two requests.
    async fn unnamed(&mut self, how: u32) -> io::Result<()> {
        let parse = message(b'P', format!("\0select '{}'\0\0\0", self.token).as_bytes());
        let bind = [message(b'B', &[0; 8]), message(b'E', &[0; 5])].concat();
        let sync = message(b'S', b"");
        let (first, rest) = match how {
            0 => (Vec::new(), [parse, bind, sync].concat()),
            1 => ([parse, message(b'H', b"")].concat(), [bind, sync].concat()),
            _ => ([parse, sync.clone()].concat(), [bind, sync].concat()),
        };
        self.wire.send(&first).await?;
        sleep(Duration::from_millis(random_range(0..5))).await;
        self.wire.send(&rest).await?;
        if how == 2 {
            self.answer().await?;
        }
        self.answer().await?;
        Ok(())
    }

    /// Sends its data without waiting for the server, as some drivers do.
    async fn copy_in(&mut self) -> io::Result<()> {
        let copy = query("copy canary_in from stdin");
        let data = message(b'd', format!("{}\n", self.token).as_bytes());
        let end = message(b'c', b"");
        let pieces = [&copy[..], &data.repeat(100), &end].concat();
        self.wire.send(&pieces).await?;
        self.answer().await?;
        Ok(())
    }

    async fn cancel(&mut self) -> io::Result<()> {
        self.may_be_cancelled = true;
        let sql = format!("select '{}', pg_sleep(20)", self.token);
        self.wire.send(&query(&sql)).await?;
        loop {
            self.request_cancel().await?;
            // One that overtakes the query cancels nothing.
            if let Ok(answer) = timeout(Duration::from_millis(500), self.answer()).await {
                let answer = answer?;
                self.tally.cancelled += u64::from(answer.error.is_some());
                return Ok(());
            }
        }
    }

    async fn request_cancel(&self) -> io::Result<()> {
        let mut requester = Wire::open(self.address).await?;
        requester.send(&cancel_request(&self.wire.key)).await
    }

    async fn run(&mut self, sql: &str) -> io::Result<Answer> {
        self.wire.send(&query(sql)).await?;
        self.answer().await
    }

    /// Reads up to ReadyForQuery; the loss of the connection is an error.
    async fn answer(&mut self) -> io::Result<Answer> {
        let mut answer = Answer::default();
        loop {
            let (tag, length) = self.wire.header().await?;
            let body = self.wire.body(length).await?;
            let text = String::from_utf8_lossy(&body);
            let is_own = text.contains(&self.token);
            match tag {
                b'D' | b'd' => {
                    assert!(is_own, "{} got the row {text:?}", self.token);
                    answer.rows.push(body);
                }
                b'N' => assert!(
                    is_own
                        || text.contains("there is already a transaction")
                        || text.contains("there is no transaction"),
                    "{} got the notice {text:?}",
                    self.token
                ),
                b'A' => {
                    let own = format!("to {} from ", self.client);
                    assert!(
                        self.is_listening && text.contains(&own),
                        "{} got the notification {text:?}",
                        self.token
                    );
                }
                b'S' => assert!(
                    is_own || !text.contains("canary-"),
                    "{} got {text:?}",
                    self.token
                ),
                b'E' if text.contains("FATAL") => return Err(io::Error::other(text.into_owned())),
                b'E' => {
                    assert!(
                        self.may_be_cancelled || !text.contains("57014"),
                        "{} was cancelled by another client: {text:?}",
                        self.token
                    );
                    assert!(is_own || !text.contains("canary-"), "{text:?}");
                    answer.error = Some(text.into_owned());
                }
                b'Z' => {
                    self.tally.answers += 1;
                    return Ok(answer);
                }
                _ => {}
            }
        }
    }

    /// Leaves at any point, in any manner.
    async fn leave(mut self) {
        let token = self.token.clone();
        let work = format!("select '{token}', pg_sleep(0.0{})", random_range(0..9));
        let last = match random_range(0..10) {
            0 => query(&work),
            1 => query(&work)[..20].to_vec(),
            2 => query("copy pg_catalog.pg_class from stdin"),
            3 => [
                message(b'P', format!("\0{work}\0\0\0").as_bytes()),
                message(b'B', &[0; 8]),
                message(b'E', &[0; 5]),
            ]
            .concat(),
            4 => [query(&work), query(&work), query(&work)].concat(),
            5 => query("select repeat('canary', 100000) from generate_series(1, 100)"),
            6 => {
                // It arrives late, or after another session has begun on the connection.
                let _ = self.wire.send(&query(&work)).await;
                let _ = self.request_cancel().await;
                Vec::new()
            }
            _ => Vec::new(),
        };
        // The connection may have been lost by now.
        let _ = self.wire.send(&last).await;
        let (address, key) = (self.address, self.wire.key.clone());
        match random_range(0..3) {
            0 => {
                let _ = self.wire.send(b"X\0\0\0\x04").await;
            }
            1 => self.wire.reset(),
            _ => {}
        }
        // The key of a session that has ended cancels nothing.
        if random_range(0..50) == 0
            && let Ok(mut requester) = Wire::open(address).await
        {
            let _ = requester.send(&cancel_request(&key)).await;
        }
    }
}
