//! A small model of a Postgres server, written from the server's source and apart from `Requests`, with a random client
//! before it. The fuzz target `requests` uses it, too.

use std::collections::VecDeque;

use super::{Requests, Scanner, TransactionStatus};

/// What each statement does, as the first byte of the messages that carry one.
const ROWS: u8 = 0;
const COPY_IN: u8 = 1;
const COPY_OUT: u8 = 2;
const COPY_BOTH: u8 = 3;

/// Decisions, taken from a string of bytes; all zero once it is used up.
pub(crate) struct Choices<'a>(pub(crate) &'a [u8]);

impl Choices<'_> {
    fn below(&mut self, limit: u8) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first % limit
    }

    fn one_in(&mut self, limit: u8) -> bool {
        self.below(limit) == limit - 1
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// At the top of the server's loop.
    Command,
    /// `ignore_till_sync`.
    Skipping,
    CopyIn {
        /// Started by an Execute.
        is_extended: bool,
        /// Statements behind it in the same simple query.
        left: u8,
    },
    CopyBoth,
    Closed,
}

struct Server {
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    mode: Mode,
    /// An extended message has been processed since the last ReadyForQuery.
    is_open: bool,
    status: u8,
    /// An error has come of which a proxy cannot know what it discards.
    is_ambiguous: bool,
    flushed: bool,
}

fn put(buffer: &mut VecDeque<u8>, tag: u8, body: &[u8]) {
    buffer.push_back(tag);
    buffer.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    buffer.extend(body);
}

/// Takes a whole message: its type and the first byte of its body.
fn take(buffer: &mut VecDeque<u8>) -> Option<(u8, u8)> {
    let header: Vec<u8> = buffer.iter().take(5).copied().collect();
    let &[tag, a, b, c, d] = &header[..] else {
        return None;
    };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap() + 1;
    if buffer.len() < length {
        return None;
    }
    let message: Vec<u8> = buffer.drain(..length).collect();
    Some((tag, message.get(5).copied().unwrap_or(ROWS)))
}

impl Server {
    fn send(&mut self, tags: &[u8]) {
        for &tag in tags {
            put(&mut self.output, tag, b"body");
        }
    }

    fn ready(&mut self, choices: &mut Choices<'_>) {
        self.mode = Mode::Command;
        self.is_open = false;
        self.status = b"ITE"[usize::from(choices.below(3))];
        put(&mut self.output, b'Z', &[self.status]);
    }

    /// An error in an extended message.
    fn skip(&mut self) {
        self.send(b"E");
        self.mode = Mode::Skipping;
    }

    /// Reads one message and does what it requests; false if there is none.
    fn step(&mut self, choices: &mut Choices<'_>, is_tame: bool) -> bool {
        if self.mode == Mode::Closed {
            return false;
        }
        let Some((tag, statement)) = take(&mut self.input) else {
            return false;
        };
        if choices.one_in(16) {
            self.send(&b"NAS"[usize::from(choices.below(3))..][..1]);
        }
        let was_flushed = self.flushed;
        self.flushed &= matches!(tag, b'd' | b'c' | b'f');
        let fails = choices.one_in(8);
        match (self.mode, tag) {
            (_, b'X') => self.mode = Mode::Closed,
            (Mode::CopyIn { .. }, b'H' | b'S') => self.is_ambiguous |= tag == b'S' && !is_tame,
            (Mode::CopyIn { .. }, b'd' | b'c' | b'f') if fails || tag == b'f' => {
                self.is_ambiguous |= tag == b'd' && !is_tame;
                self.fail_copy(choices);
            }
            (Mode::CopyIn { .. }, b'd') => {}
            (Mode::CopyIn { is_extended, left }, b'c') => {
                self.mode = Mode::Command;
                self.send(b"C");
                if !is_extended {
                    self.query(left, ROWS, choices, is_tame);
                }
            }
            (Mode::CopyBoth, b'd') if !fails => self.send(b"d"),
            (Mode::CopyBoth, b'd') => {
                self.send(b"E");
                self.ready(choices);
            }
            (Mode::CopyBoth, b'c') => {
                self.send(b"cC");
                self.ready(choices);
            }
            // Reports the message, then the loss of synchronization.
            (Mode::CopyIn { .. } | Mode::CopyBoth, _) => {
                self.send(b"EE");
                self.mode = Mode::Closed;
            }
            (_, b'S') => {
                // The commit of an implicit transaction.
                if fails && self.is_open && self.mode == Mode::Command {
                    self.send(b"E");
                }
                self.ready(choices);
            }
            (Mode::Skipping | Mode::Closed, _) | (_, b'd' | b'c' | b'f') => {}
            (Mode::Command, b'H') => {
                self.flushed = self.is_open;
                if fails && self.is_open && !is_tame {
                    // A timeout that has struck between two messages.
                    self.is_ambiguous = true;
                    self.skip();
                }
            }
            (Mode::Command, b'F') => {
                self.is_ambiguous |= fails && was_flushed;
                self.send(if fails { b"E" } else { b"V" });
                self.ready(choices);
            }
            (Mode::Command, b'Q') => {
                if fails {
                    self.is_ambiguous |= was_flushed;
                    self.send(b"E");
                    self.ready(choices);
                } else {
                    let statements = choices.below(3) + u8::from(statement != ROWS);
                    if statements == 0 {
                        self.send(b"I");
                    }
                    self.is_ambiguous |= was_flushed;
                    self.query(statements, statement, choices, is_tame);
                }
            }
            (Mode::Command, _) => {
                self.is_open = true;
                match tag {
                    _ if fails => self.skip(),
                    b'P' => self.send(b"1"),
                    b'B' => self.send(b"2"),
                    b'C' => self.send(b"3"),
                    b'D' => {
                        self.send([&b"T"[..], b"n", b"tT", b"tn"][usize::from(choices.below(4))]);
                    }
                    b'E' => self.execute(statement, choices, is_tame),
                    _ => unreachable!("not sent"),
                }
            }
        }
        true
    }

    fn fail_copy(&mut self, choices: &mut Choices<'_>) {
        if matches!(
            self.mode,
            Mode::CopyIn {
                is_extended: true,
                ..
            }
        ) {
            self.skip();
        } else {
            self.send(b"E");
            self.ready(choices);
        }
    }

    fn begin_copy_in(
        &mut self,
        is_extended: bool,
        left: u8,
        choices: &mut Choices<'_>,
        is_tame: bool,
    ) {
        self.send(b"G");
        self.mode = Mode::CopyIn { is_extended, left };
        // Some checks come after the response, as that for a view does.
        if choices.one_in(6) {
            self.is_ambiguous |= !is_tame;
            self.fail_copy(choices);
        }
    }

    fn execute(&mut self, statement: u8, choices: &mut Choices<'_>, is_tame: bool) {
        match statement {
            COPY_IN => self.begin_copy_in(true, 0, choices, is_tame),
            COPY_OUT => self.send(b"HddcC"),
            _ => self.send([&b"DDC"[..], b"C", b"Ds", b"I"][usize::from(choices.below(4))]),
        }
    }

    fn query(&mut self, statements: u8, first: u8, choices: &mut Choices<'_>, is_tame: bool) {
        for index in 0..statements {
            match if index == 0 || is_tame {
                first
            } else {
                choices.below(3)
            } {
                COPY_IN => {
                    return self.begin_copy_in(false, statements - index - 1, choices, is_tame);
                }
                COPY_BOTH => {
                    self.send(b"W");
                    self.mode = Mode::CopyBoth;
                    return;
                }
                COPY_OUT => self.send(b"HdcC"),
                _ => self.send(b"TDC"),
            }
            if choices.one_in(8) {
                self.send(b"E");
                break;
            }
        }
        self.ready(choices);
    }
}

/// A client that sends anything in any order, or what drivers send.
fn client_messages(choices: &mut Choices<'_>, is_tame: bool) -> Vec<(u8, u8)> {
    if !is_tame {
        let tag = b"PBDECHSQFdcfPBES"[usize::from(choices.below(16))];
        return vec![(tag, choices.below(4))];
    }
    let plain = |tags: &[u8]| tags.iter().map(|&tag| (tag, ROWS)).collect();
    match choices.below(8) {
        0 => plain(b"Q"),
        1 => plain(b"PDSBES"),
        2 => plain(b"PBDEHBEHCS"),
        3 => plain(b"F"),
        4 => vec![(b'E', COPY_OUT), (b'S', ROWS)],
        // Without its Sync, then a query.
        5 => plain(b"PBEQ"),
        6 => {
            // As libpq sends it: a Sync ahead of the data, and one behind.
            let mut messages = plain(b"PB");
            messages.push((b'E', COPY_IN));
            messages.extend(plain(if choices.one_in(2) { b"S" } else { b"H" }));
            messages.extend(plain(&b"ddd"[usize::from(choices.below(4))..]));
            messages.extend(plain(if choices.one_in(3) { b"fS" } else { b"cS" }));
            messages
        }
        _ => vec![(b'S', ROWS)],
    }
}

/// Relays random traffic through the model, byte by byte in random order, and compares what it reports with the server.
pub(crate) fn run(bytes: &[u8], is_tame: bool) {
    let mut choices = Choices(bytes);
    let mut requests = Requests::new();
    let (mut client_scanner, mut server_scanner) = (Scanner::new(), Scanner::new());
    let mut unsent = VecDeque::new();
    let mut server = Server {
        input: VecDeque::new(),
        output: VecDeque::new(),
        mode: Mode::Command,
        is_open: false,
        status: b'I',
        is_ambiguous: false,
        flushed: false,
    };
    let mut closing = false;
    loop {
        if choices.0.is_empty() && !closing {
            // From whatever state: ends a COPY, then an extended request, then shows that all is well.
            closing = true;
            let copy_end = if server.mode == Mode::CopyBoth {
                b'c'
            } else {
                b'f'
            };
            for tag in [copy_end, b'S', b'Q', b'Q'] {
                put(&mut unsent, tag, &[ROWS]);
            }
        }
        match choices.below(4) {
            0 if !closing => {
                for (tag, statement) in client_messages(&mut choices, is_tame) {
                    put(&mut unsent, tag, &[statement]);
                }
            }
            2 if !closing => {
                server.step(&mut choices, is_tame);
            }
            1 | 3 if !closing => {
                let (from, is_client) = if choices.one_in(2) {
                    (&mut unsent, true)
                } else {
                    (&mut server.output, false)
                };
                let length = usize::from(choices.below(32)).min(from.len());
                let chunk: Vec<u8> = from.drain(..length).collect();
                if is_client {
                    client_scanner.scan(&chunk, |seen| requests.from_client(seen));
                    server.input.extend(chunk);
                } else {
                    server_scanner.scan(&chunk, |seen| requests.from_server(seen));
                }
            }
            _ => {
                let chunk: Vec<u8> = unsent.drain(..).collect();
                client_scanner.scan(&chunk, |seen| requests.from_client(seen));
                server.input.extend(chunk);
                let stepped = server.step(&mut choices, is_tame);
                let chunk: Vec<u8> = server.output.drain(..).collect();
                server_scanner.scan(&chunk, |seen| requests.from_server(seen));
                if closing && !stepped {
                    break;
                }
            }
        }
        let between = client_scanner.is_at_boundary() && server_scanner.is_at_boundary();
        if between && requests.is_at_rest() {
            assert_at_rest(&server, &requests);
        }
    }
    if server.mode == Mode::Closed {
        return;
    }
    assert_eq!((server.mode, server.is_open), (Mode::Command, false));
    if !server.is_ambiguous {
        assert!(requests.is_at_rest(), "{requests:?}");
        assert_eq!((requests.outstanding(), requests.copy()), (0, None));
    }
}

/// That the server waits for a request, and that nothing is on its way that has or is an answer.
fn assert_at_rest(server: &Server, requests: &Requests) {
    let (mut input, mut output) = (server.input.clone(), server.output.clone());
    while let Some((tag, _)) = take(&mut input) {
        assert!(matches!(tag, b'd' | b'c' | b'f' | b'H'), "{requests:?}");
    }
    while let Some((tag, _)) = take(&mut output) {
        assert!(matches!(tag, b'N' | b'A' | b'S'), "{requests:?}");
    }
    assert_eq!(
        (server.mode, server.is_open),
        (Mode::Command, false),
        "{requests:?}"
    );
    let status = match server.status {
        b'T' => TransactionStatus::InTransaction,
        b'E' => TransactionStatus::Failed,
        _ => TransactionStatus::Idle,
    };
    assert_eq!(requests.status(), status);
}
