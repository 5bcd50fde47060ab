//! The model of the requests in flight against a real Postgres: random programs, and what the server really answers.

use std::time::Duration;

use lakebase_proxy::protocol::{
    frame::Seen,
    requests::{CopyDirection, Requests, TransactionStatus},
};
use tokio::{io::AsyncWriteExt, net::UnixStream, time::timeout};

use crate::harness::{
    self,
    wire::{Reply, Wire, message, sync, text},
};

const STATEMENTS: [&str; 16] = [
    "select 1",
    "select a from generate_series(1, 5) a",
    "",
    "select 1/0",
    "no statement",
    "begin",
    "commit",
    "rollback",
    // Fails with the commit only.
    "insert into pg_temp.later values (1), (1)",
    "copy pg_temp.target from stdin",
    // Fails behind its CopyInResponse.
    "copy pg_temp.view from stdin",
    "copy (select 1) to stdout",
    "set application_name = 'random'",
    "do $$ begin raise notice 'a notice'; end $$",
    "select 1; select 1/0; select 2",
    "copy pg_temp.target from stdin; select 1; copy pg_temp.target from stdin",
];
const COPIES: [&str; 2] = [
    "copy pg_temp.target from stdin",
    "copy pg_temp.view from stdin",
];

/// Numbers that look random, the same for the same seed.
struct Choices(u64);

impl Choices {
    fn below(&mut self, limit: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(limit).unwrap()).unwrap()
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

fn parse(statement: &str) -> Vec<u8> {
    message('P', &[b"\0", statement.as_bytes(), b"\0\0\0"].concat())
}

fn bind() -> Vec<u8> {
    message('B', &[0; 8])
}

fn execute(rows: u8) -> Vec<u8> {
    message('E', &[0, 0, 0, 0, rows])
}

/// Of `pg_backend_pid`, or of no function.
fn function_call(choices: &mut Choices) -> Vec<u8> {
    let function = choices.of(&[2026_u32, 1]);
    message('F', &[&function.to_be_bytes()[..], &[0; 6]].concat())
}

/// Any message, whatever was sent before it.
fn any_message(choices: &mut Choices) -> Vec<u8> {
    match choices.below(14) {
        0 => text('Q', choices.of(&STATEMENTS)),
        1 | 2 => parse(choices.of(&STATEMENTS)),
        3 | 4 => bind(),
        5 | 6 => execute(choices.of(&[0, 2])),
        7 => message('D', choices.of(&[&b"P\0"[..], b"S\0", b"Snone\0"])),
        8 => message('C', choices.of(&[b"P\0", b"S\0"])),
        9 => message('H', b""),
        10 | 11 => sync(),
        12 => function_call(choices),
        _ => copy_message(choices),
    }
}

fn copy_message(choices: &mut Choices) -> Vec<u8> {
    match choices.below(5) {
        0 => message('c', b""),
        1 => text('f', "given up"),
        2 => message('d', b"no number\n"),
        _ => message('d', b"1\n"),
    }
}

/// What a driver sends: whole requests, and the data of a COPY only for a COPY.
fn request(choices: &mut Choices) -> Vec<Vec<u8>> {
    let rest = |choices: &mut Choices| {
        let statement = choices.of(&STATEMENTS);
        if statement.contains("stdin") {
            "select 1"
        } else {
            statement
        }
    };
    let extended = |statement| [parse(statement), bind()];
    let mut messages = Vec::new();
    match choices.below(8) {
        0 => messages.push(text('Q', rest(choices))),
        1 => messages.push(function_call(choices)),
        2 | 3 => {
            for _ in 0..=choices.below(3) {
                messages.extend(extended(rest(choices)));
                messages.push(message('D', choices.of(&[b"P\0", b"S\0"])));
                messages.push(execute(choices.of(&[0, 2])));
            }
            messages.push(sync());
        }
        4 => {
            messages.extend(extended(rest(choices)));
            messages.extend([execute(0), text('Q', rest(choices))]);
        }
        5 => messages.push(sync()),
        6 => {
            messages.push(text('Q', choices.of(&COPIES)));
            messages.extend(copy_data(choices));
        }
        _ => {
            messages.extend(extended(choices.of(&COPIES)));
            // As libpq does: a Sync ahead of the data, too.
            messages.extend([execute(0), message(choices.of(&['S', 'H']), b"")]);
            messages.extend(copy_data(choices));
            messages.push(sync());
        }
    }
    messages
}

fn copy_data(choices: &mut Choices) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    for _ in 0..choices.below(4) {
        messages.push(message('d', choices.of(&[b"1\n", b"2\n", b"x\n"])));
    }
    messages.push(match choices.below(3) {
        0 => text('f', "given up"),
        _ => message('c', b""),
    });
    messages
}

/// A session at the server, and the model that sees its messages in both directions.
struct Session {
    wire: Wire<UnixStream>,
    requests: Requests,
    /// A COPY has failed after it had begun, or a query follows a Flush: that can leave the model uncertain.
    may_be_uncertain: bool,
    flushed: bool,
}

impl Session {
    async fn begin() -> Self {
        let socket = harness::server().await.directory().join("s/.s.PGSQL.5432");
        let mut wire = Wire::of(UnixStream::connect(socket).await.unwrap());
        let startup = [
            ("user", "databricks_control_plane"),
            ("database", "postgres"),
        ];
        wire.startup(&startup).await;
        wire.welcome().await;
        wire.query(
            "create temp table target (a int);
             create temp view view as select 1 as a;
             create temp table later (a int unique deferrable initially deferred)",
        )
        .await;
        Self {
            wire,
            requests: Requests::new(),
            may_be_uncertain: false,
            flushed: false,
        }
    }

    /// Sends messages at once; false if the server has closed the connection.
    async fn send(&mut self, messages: &[Vec<u8>]) -> bool {
        for &tag in messages.iter().filter_map(|message| message.first()) {
            self.requests.from_client(Seen::Message { tag });
            self.may_be_uncertain |= self.flushed && matches!(tag, b'Q' | b'F');
            self.flushed = tag == b'H';
        }
        let sent = self.wire.stream.write_all(&messages.concat()).await;
        sent.is_ok()
    }

    /// The next message; `None` at the end of the connection.
    async fn next(&mut self) -> Option<Reply> {
        let reply = self.wire.try_next().await.ok().flatten()?;
        let tag = u8::try_from(reply.tag).unwrap();
        self.may_be_uncertain |= tag == b'E' && self.requests.copy() == Some(CopyDirection::In);
        self.requests.from_server(Seen::Message { tag });
        if tag == b'Z' {
            self.requests.from_server(Seen::Status(reply.body[0]));
        }
        Some(reply)
    }

    /// The next message that is part of an answer.
    async fn answer(&mut self) -> Option<Reply> {
        loop {
            let reply = self.next().await?;
            if !matches!(reply.tag, 'N' | 'A' | 'S') {
                return Some(reply);
            }
        }
    }

    /// That the answer to a query is the next that the server sends.
    async fn assert_at_rest(&mut self, query: &str) {
        let status = self.requests.status();
        let (mut tags, mut value) = (String::new(), String::new());
        assert!(self.send(&[text('Q', &format!("select '{query}'"))]).await);
        while !tags.ends_with('Z') {
            let reply = self.answer().await.expect("an answer, not the end");
            tags.push(reply.tag);
            if reply.tag == 'D' {
                value = reply.value();
            }
        }
        match status {
            TransactionStatus::Failed => assert_eq!(tags, "EZ"),
            _ => assert_eq!((tags.as_str(), value.as_str()), ("TDCZ", query)),
        }
        assert!(self.requests.is_at_rest());
    }

    /// Ends whatever is under way; then the server is at rest, and the model is to know it.
    async fn end(&mut self, is_orderly: bool) {
        let ending = [
            text('f', "the end"),
            sync(),
            text('Q', "rollback"),
            text('Q', "select 'the end'"),
        ];
        if !self.send(&ending).await {
            return;
        }
        while let Some(reply) = self.next().await {
            if reply.tag == 'D' && reply.body.ends_with(b"the end") {
                assert_eq!(self.requests.outstanding(), 1, "{:?}", self.requests);
                while self.next().await.unwrap().tag != 'Z' {}
                let is_known = self.requests.is_at_rest() && !self.requests.is_owed();
                assert!(is_known || (self.may_be_uncertain && !is_orderly));
                return;
            }
        }
        assert!(!is_orderly, "the server ended it");
    }
}

/// One session, its programs derived from the seed. The server ends it when a message comes that COPY does not allow.
async fn run(seed: u64, is_orderly: bool) {
    let mut choices = Choices(seed);
    let mut session = Session::begin().await;
    for step in 0..25 {
        let messages = if is_orderly {
            request(&mut choices)
        } else {
            vec![any_message(&mut choices)]
        };
        // Pieces of a request with the answers between them, or all at once.
        for piece in messages.chunks(choices.of(&[1, 2, 20])) {
            if !session.send(piece).await {
                return;
            }
            while choices.below(3) > 0
                && let Ok(reply) = timeout(Duration::from_millis(1), session.next()).await
            {
                if reply.is_none() {
                    assert!(!is_orderly, "the server ended it");
                    return;
                }
            }
        }
        if session.requests.is_at_rest() {
            session.assert_at_rest(&format!("step {step}")).await;
        }
    }
    session.end(is_orderly).await;
}

#[tokio::test]
async fn the_model_of_requests_agrees_with_a_server_on_what_drivers_send() {
    for seed in 0..60 {
        println!("seed {seed}");
        run(seed, true).await;
    }
}

#[tokio::test]
async fn the_model_of_requests_agrees_with_a_server_on_any_messages() {
    for seed in 0..60 {
        println!("seed {seed}");
        run(seed, false).await;
    }
}
