//! A model of a Postgres server as far as prepared statements and transactions are concerned, with random clients that share
//! connections: each receives what a direct connection would have sent. The fuzz target `statements` uses it, too.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    sync::Arc,
};

use bytes::BytesMut;

use super::{
    ClientMessage, ClientStatements, ErrorFields, HEADER_LEN, Meaning, Passage, Sent,
    ServerStatements, Texts,
};

/// A model of a server connection.
#[derive(Default)]
pub(crate) struct Server {
    pub(crate) names: BTreeMap<String, String>,
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

fn is_deallocate(sql: &str) -> bool {
    sql.to_ascii_lowercase().starts_with("deallocate ")
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
            self.portal = None;
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
        vec![tag_of(&sql.to_ascii_uppercase())]
    }
}

/// A client, its direct connection, and what both have sent it.
pub(crate) struct Client {
    pub(crate) statements: ClientStatements,
    pub(crate) direct: Server,
    expected: Vec<Reply>,
    received: Vec<Reply>,
    /// The connection that it has, while it is not at rest.
    server: Option<usize>,
    /// A DEALLOCATE by a Query may have been answered by the pool: then it has not ended the portal, as the server would.
    is_portal_doubtful: bool,
}

pub(crate) struct Connection {
    pub(crate) server: Server,
    pub(crate) statements: ServerStatements,
    /// Sent by the pool, not taken by the server.
    sent: VecDeque<(u8, Vec<u8>)>,
    /// Answered by the server, not taken by the pool.
    answered: VecDeque<Reply>,
}

/// Appends what the server is sent of a message.
pub(crate) fn append(sent: Sent, message: ClientMessage<'_>, to_server: &mut BytesMut) {
    let ClientMessage { tag, length, body } = message;
    let from = match sent {
        Sent::Unchanged => {
            to_server.extend_from_slice(&[tag]);
            to_server.extend_from_slice(&u32::try_from(length + 4).unwrap().to_be_bytes());
            0
        }
        Sent::Rest(from) => from,
    };
    to_server.extend_from_slice(&body[from..]);
}

pub(crate) fn messages(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
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
            is_portal_doubtful: false,
        }
    }

    fn sends(
        &mut self,
        connection: &mut Connection,
        tag: u8,
        body: &[u8],
        steps: &mut dyn FnMut() -> bool,
    ) {
        match tag {
            _ if self.direct.is_skipping => {}
            b'Q' => self.is_portal_doubtful = is_deallocate(&String::from_utf8_lossy(body)),
            b'B' => self.is_portal_doubtful = false,
            // No driver executes it.
            b'E' if self.is_portal_doubtful => return,
            _ => {}
        }
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
            if let Ok(sent) = sent {
                append(sent, message, &mut to_server);
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
pub(crate) struct Step(pub(crate) char, pub(crate) u8, pub(crate) u8);

impl Step {
    pub(crate) fn encode(&self) -> (u8, Vec<u8>) {
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

/// Runs each client's units, one client after the other, on connections that are chosen at each rest.
pub(crate) fn run(
    program: &[(usize, Vec<Step>)],
    mut choose: impl FnMut(usize) -> usize,
    limit: usize,
    check: impl Fn(&Client, &Connection),
) {
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
        assert!(!client.statements.is_lost(), "{:?}", client.statements);
        assert!(client.statements.is_at_rest());
        assert_eq!(
            Client::compared(&client.received),
            Client::compared(&client.expected)
        );
        check(client, connection);
        if !client.direct.is_block {
            client.server = None;
        }
    }
    drop(clients);
    drop(connections);
    assert_eq!(texts.length(), 0, "all texts are freed");
}
