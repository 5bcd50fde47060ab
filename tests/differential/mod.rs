//! Random programs through the proxy, each compared message by message with the same one on a connection of its own to the
//! same Postgres.
//!
//! Clients that run at the same time share few server connections, so that whatever is lost, kept or mixed up shows as a
//! difference. A program that differs is made smaller before it is reported.

mod program;
mod wire;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};

use self::{
    program::{End, Message, Program, Step},
    wire::Wire,
};

/// Clients at the same time: more than there are server connections, then fewer.
const CLIENTS: [u64; 2] = [8, 2];
/// Steps that a program sends at once before it leaves, if it leaves them in flight.
const LAST_STEPS: usize = 3;
/// The error of a server that has lost the state of its own transaction.
const BROKEN: &str = "StartTransactionCommand: unexpected state";
/// How long a program that differs is made smaller.
const SHRINK_TIMEOUT: Duration = Duration::from_mins(1);

/// Where the programs run.
pub(crate) struct Servers {
    pub(crate) proxy: SocketAddr,
    /// The directory with the socket of the Postgres behind it, where no password is needed.
    pub(crate) postgres: PathBuf,
    pub(crate) superuser: &'static str,
    /// The role that the proxy logs in as.
    pub(crate) role: String,
}

/// A program that does not do the same by way of the proxy, at the step where that shows first.
struct Difference {
    program: Program,
    step: usize,
    direct: Vec<String>,
    proxied: Vec<String>,
}

/// The servers with what all runs have in common.
struct Stage {
    servers: Servers,
    /// The database of the connections without the proxy.
    direct: String,
    /// The database of the clients of the proxy.
    proxied: String,
    /// A role that the clients may take.
    group: String,
    runs: AtomicU64,
}

/// Runs programs of the sequence `seed` until there have been so many, or until `deadline`; returns their number.
///
/// # Panics
///
/// If one of them differs.
pub(crate) async fn run(servers: Servers, seed: u64, count: u64, deadline: Option<Instant>) -> u64 {
    let stage = Arc::new(Stage::set(servers).await);
    let halfway = deadline.map(|at| Instant::now() + (at - Instant::now()) / 2);
    let parts = [(0..count / 2, halfway), (count / 2..count, deadline)];
    for (clients, (numbers, deadline)) in CLIENTS.into_iter().zip(parts) {
        let difference = stage.first_difference(clients, seed, numbers, deadline);
        if let Some((number, difference)) = difference.await {
            let smallest = stage.shrink(difference, clients).await;
            panic!("program {number} of seed {seed} differs for {clients} clients\n{smallest}");
        }
    }
    stage.runs.load(Ordering::Relaxed)
}

impl Stage {
    async fn set(servers: Servers) -> Self {
        let [direct, proxied] = ["direct", "proxied"].map(|it| format!("{it} of {}", servers.role));
        let group = format!("group of {}", servers.role);
        let Servers {
            role,
            postgres,
            superuser,
            ..
        } = &servers;
        let mut wire = Wire::direct(postgres, superuser, "postgres").await.unwrap();
        for statement in [
            format!("create role \"{group}\""),
            format!("grant \"{group}\" to \"{role}\""),
            format!("create database \"{direct}\" owner \"{role}\""),
            format!("create database \"{proxied}\" owner \"{role}\""),
        ] {
            wire.query(&statement).await;
        }
        Self {
            direct,
            proxied,
            group,
            runs: AtomicU64::new(0),
            servers,
        }
    }

    /// The first of these programs that differs.
    async fn first_difference(
        self: &Arc<Self>,
        clients: u64,
        seed: u64,
        numbers: Range<u64>,
        deadline: Option<Instant>,
    ) -> Option<(u64, Box<Difference>)> {
        let next = Arc::new(AtomicU64::new(numbers.start));
        let mut runs = JoinSet::new();
        for _ in 0..clients {
            let (stage, next, end) = (Arc::clone(self), Arc::clone(&next), numbers.end);
            runs.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end || deadline.is_some_and(|at| at <= Instant::now()) {
                        return Ok(());
                    }
                    let program = Program::random(seed, number);
                    let difference = stage.compare(&program).await;
                    difference.map_err(|difference| (number, difference))?;
                }
            });
        }
        let mut found = Vec::new();
        while let Some(ended) = runs.join_next().await {
            if let Err(difference) = ended.unwrap() {
                found.push(difference);
                // The others end with their program.
                next.store(numbers.end, Ordering::Relaxed);
            }
        }
        // A client that cannot log in is delayed by another.
        found.sort_by_key(|(_, difference)| difference.direct.is_empty());
        found.into_iter().next()
    }

    async fn connect(&self, database: &str) -> Wire {
        let Servers { postgres, role, .. } = &self.servers;
        Wire::direct(postgres, role, database).await.unwrap()
    }

    /// Runs a program by both ways, step by step.
    async fn compare(&self, program: &Program) -> Result<(), Box<Difference>> {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let databases = [&self.direct, &self.proxied];
        for database in databases {
            let schema = schema(number, &self.group);
            self.connect(database).await.query(&schema).await;
        }
        let numbered = program.numbered(number, &format!("\"{}\"", self.group));
        let differs = |step, direct, proxied| {
            Box::new(Difference {
                program: program.clone(),
                step,
                direct,
                proxied,
            })
        };
        let mut direct = self.connect(&self.direct).await;
        let proxied = Wire::proxied(self.servers.proxy, &self.proxied).await;
        let mut proxied = proxied.map_err(|error| differs(0, Vec::new(), vec![error]))?;
        if direct.parameters() != proxied.parameters() {
            let [direct, proxied] = [direct, proxied].map(|it| shown(it.parameters()));
            return Err(differs(0, direct, proxied));
        }
        let mut is_broken = false;
        for (at, Step { messages, cuts }) in numbered.steps.iter().enumerate() {
            if numbered.end == End::InFlight && at + LAST_STEPS >= numbered.steps.len() {
                break;
            }
            let (direct, proxied) =
                tokio::join!(direct.step(messages, cuts), proxied.step(messages, cuts));
            // No program does that.
            let is_over = direct.last().is_some_and(|reply| reply.starts_with('!'));
            assert!(
                !is_over,
                "Postgres ended the connection: {direct:?}\n{numbered}"
            );
            // PostgreSQL 18 after a simple query within an extended one: what it does from then on is of no interest.
            is_broken = direct.iter().any(|it| it.contains(BROKEN));
            if is_broken {
                break;
            }
            if direct != proxied {
                return Err(differs(at, direct, proxied));
            }
        }
        if numbered.end == End::InFlight && !is_broken {
            let at = numbered.steps.len().saturating_sub(LAST_STEPS);
            let last = numbered.steps.get(at..).unwrap_or_default();
            let last = last.iter().flat_map(|it| &it.messages);
            let last: Vec<Message> = last.cloned().collect();
            let (direct, proxied) = tokio::join!(direct.finish(&last), proxied.finish(&last));
            if direct != proxied {
                return Err(differs(at, direct, proxied));
            }
        } else {
            let is_orderly = numbered.end == End::Orderly;
            direct.leave(is_orderly).await;
            proxied.leave(is_orderly).await;
        }
        // What they have done must not differ either. It waits for the end of what they have left behind.
        let mut contents = Vec::new();
        for database in databases {
            let mut wire = self.connect(database).await;
            let mut rows = Vec::new();
            for table in ["t", "u"] {
                let look = format!("select row(x) from d{number}.{table} x order by 1");
                rows.extend(wire.query(&look).await);
            }
            let drop = format!("drop schema d{number}, d{number}b cascade");
            wire.query(&drop).await;
            contents.push(rows);
        }
        if contents[0] != contents[1] && !is_broken {
            let proxied = contents.pop().unwrap_or_default();
            let direct = contents.pop().unwrap_or_default();
            return Err(differs(program.steps.len(), direct, proxied));
        }
        Ok(())
    }

    /// Removes steps and messages as long as the rest differs.
    async fn shrink(
        self: &Arc<Self>,
        mut smallest: Box<Difference>,
        clients: u64,
    ) -> Box<Difference> {
        let until = Instant::now() + SHRINK_TIMEOUT;
        let mut size = smallest.program.steps.len();
        while size > 0 && Instant::now() < until {
            let mut at = 0;
            while at < smallest.program.steps.len() && Instant::now() < until {
                let mut program = smallest.program.clone();
                let end = (at + size).min(program.steps.len());
                program.steps.drain(at..end);
                match self.differs(&program, clients).await {
                    Some(smaller) => smallest = smaller,
                    None => at += size,
                }
            }
            size /= 2;
        }
        let mut step = 0;
        while step < smallest.program.steps.len() && Instant::now() < until {
            // The last one is that which is answered.
            let mut message = smallest.program.steps[step].messages.len() - 1;
            while message > 0 && Instant::now() < until {
                message -= 1;
                let mut program = smallest.program.clone();
                program.steps[step].cuts.clear();
                let removed = program.steps[step].messages.remove(message);
                if matches!(removed, Message::CopyDone | Message::CopyFail(_)) {
                    // Postgres would take what follows for data.
                    continue;
                }
                if let Some(smaller) = self.differs(&program, clients).await {
                    smallest = smaller;
                    message = message.min(smallest.program.steps[step].messages.len() - 1);
                }
            }
            step += 1;
        }
        smallest
    }

    /// Runs a program by as many clients as there were, as it may differ only beside others.
    async fn differs(self: &Arc<Self>, program: &Program, clients: u64) -> Option<Box<Difference>> {
        let mut runs = JoinSet::new();
        for _ in 0..clients {
            let (stage, program) = (Arc::clone(self), program.clone());
            runs.spawn(async move { stage.compare(&program).await });
        }
        let results = runs.join_all().await;
        let mut differences = results.into_iter().filter_map(Result::err);
        // A client that cannot log in is delayed by another.
        differences.find(|it| !it.direct.is_empty())
    }
}

/// What the statements of a program find. A statement that was prepared by one role is analyzed for another on a shared
/// connection, so that both may look into the schemas.
fn schema(number: u64, group: &str) -> String {
    let n = format!("d{number}");
    format!(
        "create schema {n}; create schema {n}b; grant usage on schema {n}, {n}b to \"{group}\"; \
         create table {n}.t (a int primary key, b text); \
         insert into {n}.t values (1, 'one'), (2, 'two'), (3, null); \
         create table {n}.u (a text); insert into {n}.u values ('text'); \
         create table {n}b.u (a int); insert into {n}b.u values (7); \
         create sequence {n}.s; \
         create function {n}.f() returns text language sql set work_mem = '77kB' as 'select current_setting(''work_mem'')'"
    )
}

fn shown(parameters: &BTreeMap<String, String>) -> Vec<String> {
    let shown = parameters.iter();
    shown
        .map(|(name, value)| format!("S {name} = {value}"))
        .collect()
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.program)?;
        writeln!(
            formatter,
            "at step {}, with the tables after the last one:",
            self.step
        )?;
        for (name, replies) in [("direct", &self.direct), ("proxied", &self.proxied)] {
            for reply in replies {
                let reply: String = reply.chars().take(200).collect();
                writeln!(formatter, "  {name}: {reply}")?;
            }
        }
        Ok(())
    }
}
