//! Random programs of clients on shared connections: each receives what a direct connection would have sent.
//!
//! The server is a model of Postgres as far as prepared statements and transactions are concerned.

use std::collections::{BTreeMap, btree_map::Entry};

use proptest::{prelude::*, sample::Index};

use super::*;
use crate::protocol::frame::{HEADER_LEN, frame};

/// A model of a server connection.
#[derive(Default)]
struct Server {
    names: BTreeMap<String, String>,
    unnamed: Option<String>,
    portal: Option<String>,
    is_block: bool,
    has_failed: bool,
    is_skipping: bool,
}

type Reply = (u8, Vec<u8>);

fn error(code: &str, message: &str) -> Reply {
    (b'E', format!("C{code}\0M{message}\0P7\0\0").into_bytes())
}

fn aborted() -> Reply {
    error("25P02", "current transaction is aborted")
}

fn tag_of(text: &str) -> Reply {
    (b'C', format!("{text}\0").into_bytes())
}

fn ends_block(sql: &str) -> bool {
    sql == "commit" || sql == "rollback"
}

impl Server {
    fn status(&self) -> u8 {
        match (self.is_block, self.has_failed) {
            (false, _) => b'I',
            (true, false) => b'T',
            (true, true) => b'E',
        }
    }

    fn takes(&mut self, tag: u8, body: &[u8]) -> Vec<Reply> {
        if tag == b'S' {
            self.is_skipping = false;
            if !self.is_block {
                self.portal = None;
            }
            return vec![(b'Z', vec![self.status()])];
        }
        if self.is_skipping || tag == b'H' {
            return Vec::new();
        }
        if tag == b'Q' {
            let sql = String::from_utf8_lossy(body.strip_suffix(b"\0").unwrap()).into_owned();
            self.unnamed = None;
            // Postgres destroys it here, too. One that is answered by the pool keeps it, which no driver uses.
            if !sql.to_ascii_lowercase().starts_with("deallocate ") {
                self.portal = None;
            }
            let mut replies = if sql == "bad" {
                vec![self.fails(error("42601", "syntax error"))]
            } else {
                self.executes(&sql)
            };
            replies.push((b'Z', vec![self.status()]));
            return replies;
        }
        let replies = self.extended(tag, body);
        self.is_skipping = replies.last().is_some_and(|(tag, _)| *tag == b'E');
        replies
    }

    fn fails(&mut self, error: Reply) -> Reply {
        self.has_failed = self.is_block;
        error
    }

    fn find(&self, name: &str) -> Result<String, Reply> {
        let found = match name {
            "" => self
                .unnamed
                .clone()
                .ok_or("unnamed prepared statement does not exist".to_owned()),
            _ => self
                .names
                .get(name)
                .cloned()
                .ok_or(format!("prepared statement \"{name}\" does not exist")),
        };
        found.map_err(|message| error("26000", &message))
    }

    fn extended(&mut self, tag: u8, body: &[u8]) -> Vec<Reply> {
        let mut strings = body.split(|&byte| byte == 0);
        let mut string =
            || String::from_utf8_lossy(strings.next().unwrap_or_default()).into_owned();
        let result = match tag {
            b'P' => {
                let (name, sql) = (string(), string());
                if name.is_empty() {
                    self.unnamed = None;
                }
                if sql == "bad" {
                    Err(error("42601", "syntax error"))
                } else if self.has_failed && !ends_block(&sql) {
                    Err(aborted())
                } else if name.is_empty() {
                    self.unnamed = Some(sql);
                    Ok(vec![(b'1', Vec::new())])
                } else {
                    match self.names.entry(name) {
                        Entry::Occupied(entry) => {
                            let name = entry.key();
                            let message = format!("prepared statement \"{name}\" already exists");
                            Err(error("42P05", &message))
                        }
                        Entry::Vacant(entry) => {
                            entry.insert(sql);
                            Ok(vec![(b'1', Vec::new())])
                        }
                    }
                }
            }
            b'B' => {
                let (_portal, name) = (string(), string());
                self.find(&name).and_then(|sql| {
                    if self.has_failed && !ends_block(&sql) {
                        return Err(aborted());
                    }
                    self.portal = Some(sql);
                    Ok(vec![(b'2', Vec::new())])
                })
            }
            b'D' => {
                let name = string();
                self.find(name.strip_prefix('S').unwrap()).and_then(|sql| {
                    if self.has_failed && !ends_block(&sql) {
                        return Err(aborted());
                    }
                    let described = if ends_block(&sql) { b'n' } else { b'T' };
                    Ok(vec![
                        (b't', b"types".to_vec()),
                        (described, sql.into_bytes()),
                    ])
                })
            }
            b'E' => match self.portal.clone() {
                None => Err(error("34000", "portal \"\" does not exist")),
                Some(sql) => {
                    let replies = self.executes(&sql);
                    if replies.last().is_some_and(|(tag, _)| *tag == b'E') {
                        return replies;
                    }
                    Ok(replies)
                }
            },
            b'C' => {
                let name = string();
                match name.strip_prefix('S').unwrap() {
                    "" => self.unnamed = None,
                    name => {
                        self.names.remove(name);
                    }
                }
                Ok(vec![(b'3', Vec::new())])
            }
            _ => Ok(Vec::new()),
        };
        result.unwrap_or_else(|error| vec![self.fails(error)])
    }

    fn executes(&mut self, sql: &str) -> Vec<Reply> {
        if self.has_failed && !ends_block(sql) {
            return vec![aborted()];
        }
        match sql {
            "fail" => return vec![self.fails(error("22012", "division by zero"))],
            "begin" => self.is_block = true,
            "commit" | "rollback" => {
                self.is_block = false;
                self.has_failed = false;
                self.portal = None;
            }
            "deallocate all" | "discard all" => self.names.clear(),
            _ => {
                if let Some(name) = sql.to_ascii_lowercase().strip_prefix("deallocate ") {
                    let name = name.trim_matches('"').to_owned();
                    if self.names.remove(&name).is_none() {
                        let message = format!("prepared statement \"{name}\" does not exist");
                        return vec![self.fails(error("26000", &message))];
                    }
                    return vec![tag_of("DEALLOCATE")];
                }
            }
        }
        vec![tag_of(sql)]
    }
}

/// A client, its direct connection, and what both have sent it.
struct Client {
    statements: ClientStatements,
    direct: Server,
    expected: Vec<Reply>,
    received: Vec<Reply>,
    /// The connection that it has, while it is not at rest.
    server: Option<usize>,
}

struct Connection {
    server: Server,
    statements: ServerStatements,
    /// Sent by the pool, not taken by the server.
    sent: VecDeque<(u8, Vec<u8>)>,
    /// Answered by the server, not taken by the pool.
    answered: VecDeque<Reply>,
}

fn messages(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut messages = Vec::new();
    while let [tag, a, b, c, d, ..] = *bytes {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        messages.push((tag, bytes[HEADER_LEN..=length].to_vec()));
        bytes = &bytes[length + 1..];
    }
    messages
}

impl Connection {
    /// The server takes one message, or the pool one answer.
    fn step(&mut self, client: &mut Client, is_server: bool) -> bool {
        if is_server && let Some((tag, body)) = self.sent.pop_front() {
            self.answered.extend(self.server.takes(tag, &body));
            return true;
        }
        let Some((tag, body)) = self.answered.pop_front() else {
            return false;
        };
        let mut out = BytesMut::new();
        let passage = client
            .statements
            .server_sends(&mut self.statements, tag, &body, &mut out);
        if passage == Passage::Pass {
            client.received.push((tag, body));
        }
        client.received.extend(messages(&out));
        true
    }
}

impl Client {
    fn new(texts: &Arc<Texts>) -> Self {
        Self {
            statements: ClientStatements::new(texts),
            direct: Server::default(),
            expected: Vec::new(),
            received: Vec::new(),
            server: None,
        }
    }

    fn sends(
        &mut self,
        connection: &mut Connection,
        tag: u8,
        body: &[u8],
        steps: &mut dyn FnMut() -> bool,
    ) {
        self.expected.extend(self.direct.takes(tag, body));
        let message = ClientMessage {
            tag,
            length: body.len(),
            body,
        };
        loop {
            let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
            let sent = self.statements.client_sends(
                &mut connection.statements,
                message,
                Meaning::default(),
                &mut to_server,
                &mut to_client,
            );
            if let Ok(rest) = sent {
                to_server.extend_from_slice(&body[rest..]);
            }
            connection.sent.extend(messages(&to_server));
            self.received.extend(messages(&to_client));
            if sent.is_ok() {
                break;
            }
            assert!(
                connection.step(self, true) || connection.step(self, false),
                "blocked for good: {:?}",
                self.statements
            );
        }
        while steps() && (connection.step(self, steps()) || connection.step(self, true)) {}
    }

    /// What is compared: an error without the fields that the pool leaves out.
    fn compared(replies: &[Reply]) -> Vec<Reply> {
        let fields = |body: &[u8]| {
            let error = ErrorFields::parse(body);
            format!("{} {}", error.code, error.message).into_bytes()
        };
        replies
            .iter()
            .map(|(tag, body)| {
                (
                    *tag,
                    if *tag == b'E' {
                        fields(body)
                    } else {
                        body.clone()
                    },
                )
            })
            .collect()
    }
}

const SQL: [&str; 11] = [
    "select 1",
    "select 2",
    "select 3",
    "bad",
    "fail",
    "begin",
    "commit",
    "rollback",
    "deallocate all",
    "deallocate a",
    "DEALLOCATE \"b\"",
];

/// A message, as a number for what it names and one for its text.
#[derive(Clone, Debug)]
struct Step(char, u8, u8);

impl Step {
    fn encode(&self) -> (u8, Vec<u8>) {
        let name = ["", "a", "b", "c"][usize::from(self.1) % 4];
        // By name as a query only: which name that was is known when it is bound.
        let known = if self.0 == 'P' {
            SQL.len() - 2
        } else {
            SQL.len()
        };
        let sql = SQL[usize::from(self.2) % known];
        let body = match self.0 {
            'P' => format!("{name}\0{sql}\0\0\0"),
            'B' => format!("\0{name}\0\0\0\0\0\0\0"),
            'D' | 'C' => format!("S{name}\0"),
            'E' => "\0\0\0\0\0".to_owned(),
            'Q' => format!("{sql}\0"),
            _ => String::new(),
        };
        (self.0 as u8, body.into_bytes())
    }
}

fn step() -> impl Strategy<Value = Step> {
    let tag = prop_oneof![
        5 => Just('P'), 5 => Just('B'), 2 => Just('D'), 2 => Just('C'), 4 => Just('E'),
        4 => Just('S'), 2 => Just('Q'), 1 => Just('H'),
    ];
    // Plain statements are most of them.
    let sql = prop_oneof![3 => 0..3_u8, 1 => 0..11_u8];
    (tag, 0..4_u8, sql).prop_map(|(tag, name, sql)| Step(tag, name, sql))
}

/// Runs each client's units, one client after the other, on connections that are chosen at each rest.
fn run(
    program: &[(usize, Vec<Step>)],
    choices: &[Index],
    limit: usize,
) -> Result<(), TestCaseError> {
    let texts = Texts::new(1 << 20);
    let mut clients: Vec<Client> = (0..3).map(|_| Client::new(&texts)).collect();
    let mut connections: Vec<Connection> = (0..3)
        .map(|_| Connection {
            server: Server::default(),
            statements: ServerStatements::new(limit),
            sent: VecDeque::new(),
            answered: VecDeque::new(),
        })
        .collect();
    let mut next = 0;
    let mut choose = |among: usize| {
        next += 1;
        choices[next % choices.len()].index(among)
    };
    for (at, unit) in program {
        let client = &mut clients[*at];
        let mut sending: Vec<Step> = unit.clone();
        sending.push(Step('S', 0, 0));
        for step in sending {
            let is_first = client.server.is_none();
            // Free connections only: another client may be in a block.
            let server = *client.server.get_or_insert_with(|| {
                let held: Vec<usize> = connections
                    .iter()
                    .enumerate()
                    .filter(|(_, it)| !it.server.is_block)
                    .map(|(at, _)| at)
                    .collect();
                held[choose(held.len())]
            });
            let connection = &mut connections[server];
            if is_first {
                client.statements.begin(&mut connection.statements);
            }
            let (tag, body) = step.encode();
            let mut may_step = || choose(3) > 0;
            client.sends(connection, tag, &body, &mut may_step);
        }
        let connection = &mut connections[client.server.unwrap_or_default()];
        while connection.step(client, true) || connection.step(client, false) {}
        prop_assert!(!client.statements.is_lost(), "{:?}", client.statements);
        prop_assert!(client.statements.queue.is_empty() && client.statements.latest.is_empty());
        prop_assert_eq!(
            Client::compared(&client.received),
            Client::compared(&client.expected)
        );
        let names: Vec<&str> = client.direct.names.keys().map(String::as_str).collect();
        let mut followed: Vec<&str> = client
            .statements
            .names
            .keys()
            .map(|it| str::from_utf8(it).unwrap())
            .collect();
        followed.sort_unstable();
        prop_assert_eq!(followed, names);
        // What is recorded of the server is what it has.
        let known: BTreeMap<String, String> = connection
            .statements
            .known
            .values()
            .map(|it| {
                let (sql, _) = split_string(&it.statement.body).unwrap();
                (
                    String::from_utf8_lossy(&it.name).into(),
                    String::from_utf8_lossy(sql).into(),
                )
            })
            .collect();
        for (name, sql) in &known {
            prop_assert_eq!(connection.server.names.get(name), Some(sql), "{:?}", known);
        }
        for name in connection
            .server
            .names
            .keys()
            .filter(|it| it.starts_with("lbp_"))
        {
            prop_assert!(
                known.contains_key(name),
                "{} is not recorded: {:?}",
                name,
                known
            );
        }
        if !connection.statements.is_exclusive() {
            let shared = connection
                .server
                .names
                .keys()
                .filter(|it| it.starts_with("lbp_"))
                .count();
            // No more than those of one unit beyond it.
            prop_assert!(shared <= limit + 10, "{}", shared);
        }
        if !client.direct.is_block {
            client.server = None;
        }
    }
    drop(clients);
    drop(connections);
    prop_assert_eq!(texts.length(), 0, "all texts are freed");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_client_receives_what_a_direct_connection_sends(
        program in prop::collection::vec((0..2_usize, prop::collection::vec(step(), 0..10)), 1..16),
        choices in prop::collection::vec(any::<Index>(), 1..40),
        limit in 1..4_usize,
    ) {
        run(&program, &choices, limit)?;
    }
}

fn shared(limit: usize) -> ServerStatements {
    let mut server = ServerStatements::new(limit);
    server.names = Names::Shared;
    server
}

proptest! {
    #[test]
    fn no_answer_of_a_server_makes_it_panic(
        steps in prop::collection::vec((step(), any::<bool>()), 0..30),
        replies in prop::collection::vec((prop::sample::select(&b"123CDEGHINSTVWZcnst"[..]), 0..4_u8), 0..40),
        is_shared: bool,
    ) {
        let texts = Texts::new(100);
        let mut client = ClientStatements::new(&texts);
        let mut server = if is_shared { shared(1) } else { ServerStatements::new(1) };
        client.begin(&mut server);
        let mut replies = replies.into_iter();
        for (step, is_cut) in steps {
            let (tag, body) = step.encode();
            let mut out = BytesMut::new();
            let length = body.len();
            let body = if is_cut { &body[..length / 2] } else { &body };
            let message = ClientMessage { tag, length, body };
            let mut to_server = BytesMut::new();
            if let Ok(rest) =
                client.client_sends(&mut server, message, Meaning::default(), &mut to_server, &mut out)
            {
                prop_assert!(rest <= length);
            }
            for (tag, status) in replies.by_ref().take(2) {
                client.server_sends(&mut server, tag, &b"ITEC"[usize::from(status)..], &mut out);
            }
        }
    }
}

#[test]
fn a_sync_that_a_copy_has_read_is_not_answered() {
    let texts = Texts::new(1 << 20);
    let mut server = shared(10);
    let mut client = ClientStatements::new(&texts);
    let program = [
        Step('P', 1, 0),
        Step('B', 1, 0),
        Step('E', 0, 0),
        Step('S', 0, 0),
    ];
    sent(&mut client, &mut server, &program);
    assert_eq!(answers(&mut client, &mut server, b"12G"), "12G");
    sent(
        &mut client,
        &mut server,
        &[Step('d', 0, 0), Step('c', 0, 0), Step('S', 0, 0)],
    );
    assert_eq!(answers(&mut client, &mut server, b"CZ"), "CZ");
    assert!(!client.is_lost() && client.queue.is_empty());
}

/// The messages that the server gets for those of a client on a shared connection, one letter each.
fn sent(client: &mut ClientStatements, server: &mut ServerStatements, steps: &[Step]) -> String {
    let mut tags = String::new();
    for step in steps {
        let (tag, body) = step.encode();
        let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
        let message = ClientMessage {
            tag,
            length: body.len(),
            body: &body,
        };
        let meaning = Meaning::default();
        let rest = client.client_sends(server, message, meaning, &mut to_server, &mut to_client);
        to_server.extend_from_slice(&body[rest.unwrap()..]);
        tags.extend(messages(&to_server).iter().map(|(tag, _)| char::from(*tag)));
        if !to_client.is_empty() {
            tags.push('|');
            tags.extend(messages(&to_client).iter().map(|(tag, _)| char::from(*tag)));
            tags.push('|');
        }
    }
    tags
}

fn answers(client: &mut ClientStatements, server: &mut ServerStatements, tags: &[u8]) -> String {
    let mut got = String::new();
    for &tag in tags {
        let mut out = BytesMut::new();
        let body: &[u8] = if tag == b'Z' { b"I" } else { b"" };
        if client.server_sends(server, tag, body, &mut out) == Passage::Pass {
            got.push(char::from(tag));
        }
        got.extend(messages(&out).iter().map(|(tag, _)| char::from(*tag)));
    }
    got
}

#[test]
fn a_statement_that_the_server_has_is_not_parsed_again() {
    let texts = Texts::new(1 << 20);
    let mut server = shared(10);
    let (mut one, mut other) = (ClientStatements::new(&texts), ClientStatements::new(&texts));
    let program = [
        Step('P', 1, 0),
        Step('B', 1, 0),
        Step('E', 0, 0),
        Step('S', 0, 0),
    ];
    assert_eq!(sent(&mut one, &mut server, &program), "PBES");
    assert_eq!(answers(&mut one, &mut server, b"12CZ"), "12CZ");
    assert_eq!(sent(&mut other, &mut server, &program), "|1|BES");
    assert_eq!(answers(&mut other, &mut server, b"2CZ"), "2CZ");
    // Another connection, which gets the text before the Bind.
    let mut server = shared(10);
    assert_eq!(sent(&mut one, &mut server, &program[1..]), "PBES");
    assert_eq!(answers(&mut one, &mut server, b"12CZ"), "2CZ");
    assert_eq!(texts.length(), "select 1\0\0\0".len());
}

#[test]
fn an_exclusive_connection_gets_every_byte_as_it_is() {
    let texts = Texts::new(1 << 20);
    let mut server = ServerStatements::new(1);
    let mut client = ClientStatements::new(&texts);
    client.begin(&mut server);
    for name in 0..4 {
        for step in [
            Step('P', name, name),
            Step('B', name, 0),
            Step('D', name, 0),
            Step('C', name, 0),
        ] {
            let (tag, body) = step.encode();
            let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
            let message = ClientMessage {
                tag,
                length: body.len(),
                body: &body,
            };
            let rest = client
                .client_sends(
                    &mut server,
                    message,
                    Meaning::default(),
                    &mut to_server,
                    &mut to_client,
                )
                .unwrap();
            to_server.extend_from_slice(&body[rest..]);
            assert_eq!(
                (&to_server[..], &to_client[..]),
                (&frame(tag, &body)[..], &b""[..])
            );
        }
    }
}

#[test]
fn a_text_beyond_the_limit_is_refused_by_an_error() {
    let texts = Texts::new(20);
    let mut server = shared(10);
    let mut client = ClientStatements::new(&texts);
    assert_eq!(sent(&mut client, &mut server, &[Step('P', 1, 0)]), "P");
    // A Bind that fails.
    assert_eq!(
        sent(
            &mut client,
            &mut server,
            &[Step('P', 2, 1), Step('S', 0, 0)]
        ),
        "BS"
    );
    answers(&mut client, &mut server, b"1");
    let mut out = BytesMut::new();
    let body = b"C26000\0M\0\0";
    client.server_sends(&mut server, b'E', body, &mut out);
    assert_eq!(ErrorFields::parse(&out[HEADER_LEN..]).code, "53200");
    drop((client, server));
    assert_eq!(texts.length(), 0);
}

#[test]
fn a_large_text_passes_and_stays_with_its_connection() {
    let texts = Texts::new(1 << 20);
    let mut server = shared(1);
    let mut client = ClientStatements::new(&texts);
    let message = ClientMessage {
        tag: b'P',
        length: LARGE_STATEMENT + 100,
        body: b"a\0select 1",
    };
    let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
    let rest = client.client_sends(
        &mut server,
        message,
        Meaning::default(),
        &mut to_server,
        &mut to_client,
    );
    assert_eq!(rest, Ok(2));
    assert_eq!(&to_server[HEADER_LEN..], b"lbp_1\0");
    assert_eq!(
        to_server[1..HEADER_LEN],
        u32::to_be_bytes(4 + 4 + 65_536 + 100)[..]
    );
    answers(&mut client, &mut server, b"1");
    assert!(client.has_large());
    assert_eq!(
        sent(
            &mut client,
            &mut server,
            &[Step('P', 2, 0), Step('C', 1, 0)]
        ),
        "PC"
    );
    answers(&mut client, &mut server, b"13");
    assert!(!client.has_large());
    assert_eq!(texts.length(), "select 1\0\0\0".len());
}

#[test]
fn a_description_that_has_changed_is_an_error_and_no_wrong_row() {
    let texts = Texts::new(1 << 20);
    let (mut server, mut other) = (shared(10), shared(10));
    let mut client = ClientStatements::new(&texts);
    sent(
        &mut client,
        &mut server,
        &[Step('P', 1, 0), Step('D', 1, 0), Step('S', 0, 0)],
    );
    assert_eq!(answers(&mut client, &mut server, b"1tTZ"), "1tTZ");
    let (_, body) = Step('B', 1, 0).encode();
    let bind = ClientMessage {
        tag: b'B',
        length: body.len(),
        body: &body,
    };
    let later = Meaning {
        epoch: 1,
        ..Meaning::default()
    };
    for (description, expected) in [
        (&b"other"[..], Some(sqlstate::FEATURE_NOT_SUPPORTED)),
        (b"", None),
    ] {
        let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
        other.clear();
        let blocked = client.client_sends(&mut other, bind, later, &mut to_server, &mut to_client);
        assert_eq!(blocked, Err(Blocked));
        let tags: Vec<u8> = messages(&to_server).iter().map(|(tag, _)| *tag).collect();
        assert_eq!(tags, b"PDH");
        for (tag, body) in [(b'1', &b""[..]), (b't', b""), (b'T', description)] {
            assert_eq!(
                client.server_sends(&mut other, tag, body, &mut to_client),
                Passage::Drop
            );
        }
        client
            .client_sends(&mut other, bind, later, &mut to_server, &mut to_client)
            .unwrap();
        let error = b"C26000\0M\0\0";
        if expected.is_none() {
            assert_eq!(
                client.server_sends(&mut other, b'2', b"", &mut to_client),
                Passage::Pass
            );
            continue;
        }
        client.server_sends(&mut other, b'E', error, &mut to_client);
        let code = ErrorFields::parse(&to_client[HEADER_LEN..]).code;
        assert_eq!(Some(code.as_str()), expected);
        sent(&mut client, &mut other, &[Step('S', 0, 0)]);
        answers(&mut client, &mut other, b"Z");
    }
}
