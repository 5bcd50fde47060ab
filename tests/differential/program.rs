//! Random programs of a client: what drivers, applications and careless people send.
//!
//! `{n}` in a text is the number of the program's run, so that runs at the same time do not meet. What depends on anything but
//! the program is left out: process ids, times, other sessions.

use std::fmt;

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A message of a client.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Query(String),
    Parse {
        name: &'static str,
        sql: String,
    },
    Bind {
        portal: &'static str,
        statement: &'static str,
        parameters: usize,
    },
    DescribeStatement(&'static str),
    DescribePortal(&'static str),
    Execute {
        portal: &'static str,
        rows: u8,
    },
    CloseStatement(&'static str),
    ClosePortal(&'static str),
    Flush,
    Sync,
    CopyData(&'static str),
    CopyDone,
    CopyFail(&'static str),
    /// With two texts as arguments.
    FunctionCall(u32),
}

/// Messages that are sent together; the last one is answered.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) messages: Vec<Message>,
    /// Where the bytes are cut in sending.
    pub(super) cuts: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) steps: Vec<Step>,
    pub(super) end: End,
}

/// How a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Without a message.
    Abrupt,
    /// With Terminate.
    Orderly,
    /// With Terminate behind its last requests, whose answers it reads to the end.
    InFlight,
}

const STATEMENTS: [&str; 4] = ["", "s0", "s1", "s2"];
const PORTALS: [&str; 3] = ["", "p0", "p1"];

const PLAIN: &[&str] = &[
    "select 1",
    "select 'one', null, 2.5",
    "select a, b from d{n}.t order by a",
    "select * from d{n}.u order by a",
    "select count(*) from d{n}.t",
    "insert into d{n}.t select max(a) + 1, 'more' from d{n}.t",
    "insert into d{n}.t select max(a) + 1, 'returned' from d{n}.t returning a",
    "update d{n}.t set b = b || '.' where a = 1",
    "delete from d{n}.t where a > 3",
    "select g from generate_series(1, 5) g",
    "select repeat('x', 20000) from generate_series(1, 3)",
    "",
    ";",
    "-- nothing",
    "/* set work_mem = '1MB'; listen x */ select 'commented'",
    "select 1; select 2",
    "insert into d{n}.u values ('kept'); select 'kept'",
    "values (1, 'a'), (2, 'b')",
    "with x as (select 1 as a) select a from x",
    "select '$$ begin set work_mem to 1'",
    "explain (costs off) select a from d{n}.t",
    "lock table d{n}.t in share mode",
    "create table d{n}.v (a int)",
    "drop table if exists d{n}.v",
    "truncate d{n}.u",
    "alter table d{n}.u add column if not exists c int",
    "alter table d{n}.u drop column if exists c",
    "do 'begin alter table d{n}.u add column if not exists e text; end'",
    "begin; alter table d{n}.u drop column if exists e",
    "select d{n}.f()",
    "do 'begin raise notice ''noticed''; end'",
    "vacuum d{n}.u",
];

const ERRORS: &[&str] = &[
    "select 1 / 0",
    "selec",
    "select a from d{n}.missing",
    "insert into d{n}.t values (1, 'twice')",
    "insert into d{n}.u values ('undone'); select 1 / 0",
    "select 1; selec",
    "select 'unfinished",
    "do 'begin raise exception ''raised'' using errcode = ''22012''; end'",
    "set log_min_messages = 'error'",
    "set work_mem = 'much'",
    "set nothing = 1",
    "vacuum d{n}.missing",
    "select a from d{n}.t for update; select 1 / 0",
    "fetch 1 from missing",
    "execute missing",
    "deallocate missing",
    "prepare transaction 'x'",
    "select $1",
    "copy d{n}.missing to stdout",
];

const TRANSACTIONS: &[&str] = &[
    "begin",
    "begin",
    "begin",
    "start transaction",
    "begin isolation level repeatable read",
    "begin read only",
    "commit",
    "commit",
    "commit",
    "end",
    "rollback",
    "rollback",
    "abort",
    "savepoint a",
    "savepoint b",
    "release a",
    "rollback to a",
    "rollback to savepoint b",
    "commit and chain",
    "rollback and chain",
    "begin; select 1",
    "begin; insert into d{n}.u values ('in text'); commit",
    "select 1; commit; select 2",
    "insert into d{n}.u values ('implicit'); begin; select 1 / 0",
    "begin; savepoint a; select 1",
    "set transaction read only",
    "set local work_mem = '3MB'",
    "set local app.owner = 'local'",
    "select set_config('app.owner', 'local too', true)",
    "set local search_path = d{n}b",
    "set local time zone 'Asia/Tokyo'",
    "select set_config('search_path', 'd{n}b', true)",
    "select set_config('TimeZone', 'Asia/Tokyo', true)",
    "set constraints all deferred",
    "select pg_advisory_xact_lock({n}, 1)",
    "create temp table g (a int) on commit drop",
];

const SETTINGS: &[&str] = &[
    "set work_mem = '5MB'",
    "set work_mem to 6000",
    "set session work_mem = '7MB'",
    "set work_mem to default",
    "reset work_mem",
    "set app.owner = 'mine'",
    "set app.owner = 'it''s'",
    "set \"app\".owner to e'\\x41'",
    "reset app.owner",
    "set search_path = d{n}",
    "set search_path = d{n}b, public",
    "set schema 'd{n}b'",
    "reset search_path",
    "set datestyle = german",
    "set datestyle to 'ISO, YMD'",
    "set datestyle = 'DMY'",
    "set random_page_cost = 1.5e+1",
    "set timezone = 'Asia/Tokyo'",
    "set time zone 'America/New_York'",
    "set time zone interval '+02' hour to minute",
    "set time zone local",
    "set intervalstyle = iso_8601",
    "set client_encoding = 'LATIN1'",
    "set names 'UTF8'",
    "set names 'SJIS'",
    "set application_name = 'renamed'",
    "reset application_name",
    "set standard_conforming_strings = off",
    "set standard_conforming_strings = on",
    "set statement_timeout = '1h'",
    "set lock_timeout = '2h'",
    "set default_transaction_read_only = on",
    "set default_transaction_read_only = off",
    "set session characteristics as transaction isolation level repeatable read",
    "set role {r}",
    "set role none",
    "reset role",
    "set session authorization default",
    "reset session authorization",
    "reset all",
    "reset all",
    "set work_mem = '8MB'; set app.owner = 'second'",
    "begin; set work_mem = '9MB'; rollback",
    "begin; set work_mem = '10MB'; commit",
    "begin; savepoint a; set work_mem = '11MB'; rollback to a; commit",
    "set work_mem = '12MB'; select 1 / 0",
    "select 1; set app.owner = 'third'",
];

const LOOKS: &[&str] = &[
    "show work_mem",
    // A custom setting that a backend has had is empty ever after, and not null: RESET does not undo that.
    "select current_setting('work_mem'), coalesce(current_setting('app.owner', true), '')",
    "show search_path",
    "select a from u",
    "select * from u",
    "select current_user, current_schema()",
    "select '2024-02-03 04:05:06+00'::timestamptz, '1 day 2 hours'::interval",
    "show timezone",
    "show client_encoding",
    "show application_name",
    "show statement_timeout",
    "show transaction_read_only",
    "show transaction_isolation",
    "show standard_conforming_strings",
    "select 'a\\b'",
    "select count(*) from pg_listening_channels()",
    "select name from pg_prepared_statements where from_sql order by name",
    "select name, is_holdable from pg_cursors where name <> '' and name not like 'p_' order by name",
    "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    "select count(*) from pg_class where relnamespace = pg_my_temp_schema()",
];

/// State that a session keeps besides settings and statements of the protocol.
const STATE: &[&str] = &[
    "prepare q0 as select 'prepared'",
    "prepare q1 (int) as select $1 + 1",
    "execute q0",
    "execute q1 (2)",
    "deallocate q0",
    "deallocate prepare q1",
    "deallocate all",
    "discard all",
    "discard plans",
    "discard sequences",
    "discard temp",
    "listen c{n}",
    "listen \"C{n}\"",
    "unlisten c{n}",
    "unlisten *",
    "notify c{n}, 'sent'",
    "select pg_notify('c{n}', 'called')",
    "select pg_advisory_lock({n}, 2)",
    "select pg_try_advisory_lock({n}, 3)",
    "select pg_advisory_lock_shared({n}, 2)",
    "select pg_advisory_unlock({n}, 2)",
    "select pg_advisory_unlock_all()",
    "create temp table x (a int)",
    "create temporary view y as select 1 as a",
    "select 1 as a into temp z",
    "create table pg_temp.x (a int)",
    "create temp table u as select 5 as a, 6 as z",
    "drop table if exists pg_temp.u",
    "insert into x values (1)",
    "select a from x",
    "select a from z",
    "drop table x",
    "declare k cursor for select g from generate_series(1, 9) g",
    "declare h cursor with hold for select g from generate_series(1, 9) g",
    "declare l scroll cursor with hold for select a from d{n}.t order by a",
    "fetch 2 from k",
    "fetch 2 from h",
    "fetch backward 1 from l",
    "move 1 in h",
    "close k",
    "close h",
    "close all",
    "select nextval('d{n}.s')",
    "select currval('d{n}.s')",
    "select setval('d{n}.s', 40)",
    "select set_config('app.owner', 'configured', false)",
    "do 'begin set work_mem = ''13MB''; end'",
    "do 'begin perform set_config(''app.owner'', ''within'', false); end'",
    "do 'begin execute ''select pg_adv'' || ''isory_lock({n}, 4)''; end'",
    "select setseed(0.25); select random()",
    "load 'plpgsql'",
    "begin; declare h cursor with hold for select 1; commit",
    "begin; listen c{n}; rollback",
];

/// With the number of their parameters.
const PARAMETERS: &[(&str, usize)] = &[
    ("select $1::int + 1", 1),
    ("select a, b from d{n}.t where a = $1", 1),
    ("insert into d{n}.t values ($1 + 100, 'bound')", 1),
    ("select $1::text || $2::text", 2),
    ("update d{n}.t set b = $2 where a = $1", 2),
    ("select g from generate_series(1, $1::int * 3) g", 1),
    ("select 100 / ($1::int - 1)", 1),
];

/// What a program has more than plain statements.
struct Flavor {
    settings: bool,
    state: bool,
    named: bool,
}

struct Generator {
    rng: StdRng,
    flavor: Flavor,
    /// Parameters of the statement last prepared under each of [`STATEMENTS`].
    parameters: [usize; STATEMENTS.len()],
    /// Whether a transaction block is likely.
    is_in_block: bool,
    /// Whether messages of an extended query without Sync are likely.
    is_open: bool,
}

impl Program {
    /// The program of this number in the sequence of `seed`.
    pub(super) fn random(seed: u64, number: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let flavor = Flavor {
            settings: rng.random_bool(0.4),
            state: rng.random_bool(0.3),
            named: rng.random_bool(0.5),
        };
        let length = rng.random_range(4..20);
        let mut generator = Generator {
            rng,
            flavor,
            parameters: [0; STATEMENTS.len()],
            is_in_block: false,
            is_open: false,
        };
        let mut steps: Vec<Step> = (0..length).map(|_| generator.step()).collect();
        if generator.is_open {
            steps.push(Step::of(vec![Message::Sync]));
        }
        // What is left when it is over, too.
        if generator.rng.random_bool(0.7) {
            steps.push(Step::of(vec![Message::Query("rollback".to_owned())]));
            steps.extend(
                LOOKS
                    .iter()
                    .map(|look| Step::of(vec![Message::Query((*look).to_owned())])),
            );
        }
        Self {
            steps,
            end: generator.one_of(&[End::Abrupt, End::Orderly, End::InFlight]),
        }
    }

    /// The same for a run with this number.
    pub(super) fn numbered(&self, number: u64, role: &str) -> Self {
        let mut numbered = self.clone();
        remove_unbound(&mut numbered.steps);
        let messages = numbered
            .steps
            .iter_mut()
            .flat_map(|step| &mut step.messages);
        for message in messages {
            if let Message::Query(sql) | Message::Parse { sql, .. } = message {
                *sql = sql.replace("{n}", &number.to_string()).replace("{r}", role);
            }
        }
        numbered
    }
}

/// Removes the uses of an unnamed portal of an earlier request: Postgres 15 reads freed memory if that was a Query that failed.
/// And those of an unnamed statement that may be a COPY, whose data would not follow.
fn remove_unbound(steps: &mut [Step]) {
    let (mut is_parsed, mut is_bound, mut has_copy) = (false, false, false);
    for message in steps.iter_mut().flat_map(|step| &mut step.messages) {
        let is_kept = match message {
            Message::Parse { name: "", sql } => {
                is_parsed = true;
                has_copy |= sql.starts_with("copy") && sql.ends_with("stdin");
                true
            }
            Message::Bind { statement: "", .. } if has_copy && !is_parsed => false,
            Message::Bind { portal: "", .. } => {
                is_bound = true;
                true
            }
            Message::DescribePortal("") | Message::Execute { portal: "", .. } => is_bound,
            Message::Sync | Message::Query(_) | Message::FunctionCall(_) => {
                (is_parsed, is_bound) = (false, false);
                true
            }
            _ => true,
        };
        if !is_kept {
            // It changes nothing.
            *message = Message::Flush;
        }
    }
}

impl Step {
    fn of(messages: Vec<Message>) -> Self {
        Self {
            messages,
            cuts: Vec::new(),
        }
    }
}

impl Generator {
    fn step(&mut self) -> Step {
        let mut messages = Vec::new();
        for _ in 0..self.one_of(&[1, 1, 1, 1, 2, 3, 5]) {
            self.unit(&mut messages);
        }
        let mut cuts = Vec::new();
        if self.rng.random_bool(0.1) {
            let length = messages.iter().map(|it| it.encode().len()).sum::<usize>();
            cuts = (0..4).map(|_| self.rng.random_range(0..=length)).collect();
            cuts.sort_unstable();
        }
        Step { messages, cuts }
    }

    /// One or several messages, the last of which is answered.
    fn unit(&mut self, messages: &mut Vec<Message>) {
        match self.rng.random_range(0..100) {
            0..42 if !self.is_open => messages.push(Message::Query(self.statement())),
            42..46 if !self.is_open => {
                let text = [self.statement(), self.statement()].join("; ");
                messages.push(Message::Query(text));
            }
            46..80 => self.extended(messages),
            80..84 => self.copy_in(messages),
            84..86 => {
                let table = self.one_of(&["d{n}.t", "d{n}.missing", "(select 1 / a from d{n}.t)"]);
                messages.push(Message::Query(format!("copy {table} to stdout")));
            }
            86..88 => {
                // `int4pl`, `int4div` and none.
                messages.push(Message::FunctionCall(self.one_of(&[177, 177, 154, 1])));
            }
            88..90 => messages.push(Message::Sync),
            90..92 => messages.extend([Message::CopyDone, Message::Sync]),
            92..96 => {
                // Simple behind extended, without a Sync between them.
                self.structured(messages);
                messages.push(Message::Query(self.statement()));
                messages.push(Message::Sync);
            }
            _ => {
                self.structured(messages);
                messages.push(Message::Sync);
            }
        }
        self.is_open &= !matches!(messages.last(), Some(Message::Sync));
    }

    fn extended(&mut self, messages: &mut Vec<Message>) {
        for _ in 0..self.one_of(&[1, 1, 1, 2, 4]) {
            if self.rng.random_bool(0.8) {
                self.structured(messages);
            } else {
                self.loose(messages);
            }
        }
        self.is_open = self.rng.random_bool(0.1);
        messages.push(if self.is_open {
            Message::Flush
        } else {
            Message::Sync
        });
    }

    /// Parse, Bind, Describe and Execute as drivers send them.
    fn structured(&mut self, messages: &mut Vec<Message>) {
        let statement = self.name();
        // A statement with a name may be there.
        if statement.is_empty() || self.rng.random_bool(0.4) {
            if !statement.is_empty() && self.rng.random_bool(0.6) {
                messages.push(Message::CloseStatement(statement));
            }
            messages.push(self.parse(statement));
            match self.rng.random_range(0..10) {
                0 => {
                    messages.push(Message::DescribeStatement(statement));
                    return;
                }
                // Bound in the next request.
                1 => messages.extend([Message::DescribeStatement(statement), Message::Sync]),
                _ => {}
            }
        }
        let portal = if self.rng.random_bool(0.9) { "" } else { "p0" };
        messages.push(self.bind(portal, statement));
        if self.rng.random_bool(0.6) {
            messages.push(Message::DescribePortal(portal));
        }
        let rows = self.one_of(&[0, 0, 0, 2]);
        messages.push(Message::Execute { portal, rows });
        if rows > 0 && self.rng.random_bool(0.5) {
            if self.rng.random_bool(0.5) {
                messages.push(Message::Flush);
            }
            messages.push(Message::Execute { portal, rows: 0 });
        }
    }

    /// One message that need not suit the others.
    fn loose(&mut self, messages: &mut Vec<Message>) {
        let statement = self.name();
        let portal = self.one_of(&PORTALS);
        let message = match self.rng.random_range(0..8) {
            0 => self.parse(statement),
            1 => self.bind(portal, statement),
            // One with a name is not described in a failed transaction, where a shared connection may lack it.
            2 => Message::DescribeStatement(""),
            3 => Message::DescribePortal(portal),
            4 => Message::Execute { portal, rows: 1 },
            5 => Message::CloseStatement(statement),
            6 => Message::ClosePortal(portal),
            _ => Message::Flush,
        };
        messages.push(message);
    }

    fn copy_in(&mut self, messages: &mut Vec<Message>) {
        let table = self.one_of(&["d{n}.u (a)", "d{n}.u (a)", "d{n}.t", "d{n}.missing"]);
        let sql = format!("copy {table} from stdin");
        let is_extended = self.is_open || self.rng.random_bool(0.4);
        if is_extended {
            messages.push(Message::Parse { name: "", sql });
            self.parameters[0] = 0;
            messages.push(self.bind("", ""));
            messages.push(Message::Execute {
                portal: "",
                rows: 0,
            });
        } else {
            messages.push(Message::Query(sql));
        }
        let data = if table == "d{n}.t" {
            "501\tcopied\n"
        } else {
            "copied\n"
        };
        messages.push(Message::CopyData(data));
        match self.rng.random_range(0..10) {
            0 => messages.push(Message::CopyData("broken\t\t\t\n")),
            // Without effect within COPY.
            1 => messages.extend([Message::Flush, Message::Sync]),
            2 => messages.push(Message::CopyData("\\.\n")),
            _ => {}
        }
        messages.push(if self.rng.random_bool(0.8) {
            Message::CopyDone
        } else {
            Message::CopyFail("given up")
        });
        if is_extended {
            messages.push(Message::Sync);
        }
    }

    fn parse(&mut self, name: &'static str) -> Message {
        let (sql, parameters) = if self.rng.random_bool(0.5) {
            let (sql, parameters) = self.one_of(PARAMETERS);
            (sql.to_owned(), parameters)
        } else {
            (self.statement(), 0)
        };
        if let Some(at) = STATEMENTS.iter().position(|it| *it == name) {
            self.parameters[at] = parameters;
        }
        Message::Parse { name, sql }
    }

    fn bind(&mut self, portal: &'static str, statement: &'static str) -> Message {
        let at = STATEMENTS.iter().position(|it| *it == statement);
        let mut parameters = at.map_or(0, |at| self.parameters[at]);
        if self.rng.random_bool(0.03) {
            parameters += 1;
        }
        Message::Bind {
            portal,
            statement,
            parameters,
        }
    }

    fn name(&mut self) -> &'static str {
        if self.flavor.named {
            self.one_of(&STATEMENTS)
        } else {
            ""
        }
    }

    fn statement(&mut self) -> String {
        let texts = match self.rng.random_range(0..100) {
            0..12 => ERRORS,
            12..16 if self.is_in_block => &["commit", "rollback", "rollback to a"],
            12..32 => TRANSACTIONS,
            32..52 if self.flavor.settings => SETTINGS,
            52..64 if self.flavor.settings => LOOKS,
            64..90 if self.flavor.state => STATE,
            _ => PLAIN,
        };
        let text = self.one_of(texts);
        if text.starts_with("begin") || text.starts_with("start") {
            self.is_in_block = true;
        } else if ["commit", "end", "rollback", "abort"].contains(&text) {
            self.is_in_block = false;
        }
        text.to_owned()
    }

    fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.rng.random_range(0..items.len())]
    }
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let zero = |parts: &[&str]| {
            parts
                .iter()
                .flat_map(|part| [part.as_bytes(), b"\0"].concat())
                .collect::<Vec<u8>>()
        };
        let (tag, body) = match self {
            Self::Query(sql) => (b'Q', zero(&[sql])),
            Self::Parse { name, sql } => (b'P', [&zero(&[name, sql])[..], b"\0\0"].concat()),
            Self::Bind {
                portal,
                statement,
                parameters,
            } => {
                let mut body = zero(&[portal, statement]);
                body.extend(b"\0\0\0");
                body.extend(u8::try_from(*parameters));
                // One digit each.
                body.extend(b"\0\0\0\x011".repeat(*parameters));
                body.extend(b"\0\0");
                (b'B', body)
            }
            Self::DescribeStatement(name) => (b'D', zero(&[&format!("S{name}")])),
            Self::DescribePortal(name) => (b'D', zero(&[&format!("P{name}")])),
            Self::Execute { portal, rows } => {
                (b'E', [&zero(&[portal])[..], &[0, 0, 0, *rows]].concat())
            }
            Self::CloseStatement(name) => (b'C', zero(&[&format!("S{name}")])),
            Self::ClosePortal(name) => (b'C', zero(&[&format!("P{name}")])),
            Self::Flush => (b'H', Vec::new()),
            Self::Sync => (b'S', Vec::new()),
            Self::CopyData(data) => (b'd', data.as_bytes().to_vec()),
            Self::CopyDone => (b'c', Vec::new()),
            Self::CopyFail(reason) => (b'f', zero(&[reason])),
            Self::FunctionCall(oid) => {
                let arguments = b"\0\0\0\x02\0\0\0\x017\0\0\0\x010\0\0";
                (b'F', [&oid.to_be_bytes()[..], arguments].concat())
            }
        };
        let length = u32::try_from(body.len() + 4).unwrap_or_default();
        [&[tag][..], &length.to_be_bytes(), &body].concat()
    }
}

impl fmt::Display for Message {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self:?}")
    }
}

impl fmt::Display for Program {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(formatter, "step {number}, cut at {:?}", step.cuts)?;
            for message in &step.messages {
                writeln!(formatter, "  {message:?}")?;
            }
        }
        Ok(())
    }
}
