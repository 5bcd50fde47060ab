//! Random programs of clients on shared connections: each receives what a direct connection would have sent.

mod reference;

use std::collections::BTreeMap;

use proptest::{prelude::*, sample::Index};

use self::reference::{Client, Connection, Step, append, messages, run};
use super::*;
use crate::protocol::{
    error::{ErrorFields, sqlstate},
    frame::{HEADER_LEN, split_string},
};

fn step() -> impl Strategy<Value = Step> {
    let tag = prop_oneof![
        5 => Just('P'), 5 => Just('B'), 2 => Just('D'), 2 => Just('C'), 4 => Just('E'),
        4 => Just('S'), 2 => Just('Q'), 1 => Just('H'),
    ];
    // Plain statements are most of them.
    let sql = prop_oneof![3 => 0..3_u8, 1 => 0..11_u8];
    (tag, 0..4_u8, sql).prop_map(|(tag, name, sql)| Step(tag, name, sql))
}

/// What is recorded of a client at rest and its connection is what they have.
fn check(client: &Client, connection: &Connection, limit: usize) {
    assert!(client.statements.latest.is_empty());
    let names: Vec<&str> = client.direct.names.keys().map(String::as_str).collect();
    let mut followed: Vec<&str> = client
        .statements
        .names
        .keys()
        .map(|it| str::from_utf8(it).unwrap())
        .collect();
    followed.sort_unstable();
    assert_eq!(followed, names);
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
        assert_eq!(connection.server.names.get(name), Some(sql), "{known:?}");
    }
    for name in connection
        .server
        .names
        .keys()
        .filter(|it| it.starts_with("lbp_"))
    {
        assert!(
            known.contains_key(name),
            "{name} is not recorded: {known:?}"
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
        assert!(shared <= limit + 10, "{shared}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_client_receives_what_a_direct_connection_sends(
        program in prop::collection::vec((0..2_usize, prop::collection::vec(step(), 0..10)), 1..16),
        choices in prop::collection::vec(any::<Index>(), 1..40),
        limit in 1..4_usize,
    ) {
        let mut next = 0;
        let choose = |among: usize| {
            next += 1;
            choices[next % choices.len()].index(among)
        };
        run(&program, choose, limit, |client, connection| check(client, connection, limit));
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
            if let Ok(Sent::Rest(from)) =
                client.client_sends(&mut server, message, Meaning::default(), &mut to_server, &mut out)
            {
                prop_assert!(from <= length);
            }
            for (tag, status) in replies.by_ref().take(2) {
                client.server_sends(&mut server, tag, &b"ITEC"[usize::from(status)..], &mut out);
            }
        }
    }
}

/// A Parse before the query would fail, and the server would discard the query up to the Sync: one answer too few.
#[test]
fn a_deallocate_by_query_behind_another_message_fails_in_a_failed_block() {
    run_in_500_orders(&[
        (0, vec![Step('P', 0, 0), Step('P', 0, 0)]),
        (1, vec![Step('Q', 0, 5), Step('P', 1, 0)]),
        (1, vec![Step('P', 1, 1)]),
        (1, vec![Step('C', 2, 0), Step('Q', 0, 9)]),
    ]);
}

#[test]
fn a_deallocate_by_query_behind_the_end_of_a_failed_block_succeeds() {
    run_in_500_orders(&[
        (1, vec![Step('P', 2, 0), Step('P', 3, 6), Step('P', 0, 5)]),
        (1, vec![Step('B', 0, 0), Step('E', 0, 0)]),
        (1, vec![Step('P', 2, 0)]),
        (1, vec![Step('B', 3, 0), Step('E', 0, 0), Step('Q', 0, 10)]),
    ]);
}

#[test]
fn a_bind_that_fails_leaves_what_its_portal_executes() {
    run_in_500_orders(&[
        (0, vec![Step('P', 1, 8), Step('Q', 0, 5), Step('B', 3, 0)]),
        (0, vec![Step('P', 0, 7), Step('B', 0, 0), Step('B', 1, 0)]),
        (0, vec![Step('E', 0, 0)]),
        (0, vec![Step('D', 1, 0)]),
    ]);
}

/// Of two names for one text, a connection that has had one client only has both, and one is recorded.
#[test]
fn a_name_of_an_exclusive_connection_is_not_found_once_that_is_shared() {
    run_in_500_orders(&[
        (0, vec![Step('P', 1, 2), Step('P', 2, 2)]),
        (1, vec![Step('P', 1, 0)]),
        (0, vec![Step('C', 2, 0)]),
        (0, vec![Step('Q', 0, 10)]),
    ]);
}

/// The orders in which the server takes messages and the pool answers.
fn run_in_500_orders(program: &[(usize, Vec<Step>)]) {
    for seed in 0..500_u32 {
        let mut state = seed;
        let choose = |count: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as usize % count
        };
        run(program, choose, 1, |_, _| {});
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
    assert_eq!(answers(&mut client, &mut server, b"1tn2G"), "12G");
    sent(
        &mut client,
        &mut server,
        &[Step('d', 0, 0), Step('c', 0, 0), Step('S', 0, 0)],
    );
    assert_eq!(answers(&mut client, &mut server, b"CZ"), "CZ");
    assert!(!client.is_lost() && client.queue.is_empty());
}

/// Both Syncs are answered, and the second answer is not the end of a unit that has begun since.
#[test]
fn a_copy_that_fails_before_it_reads_leaves_the_next_unit() {
    let texts = Texts::new(1 << 20);
    let mut server = shared(10);
    let mut client = ClientStatements::new(&texts);
    let copy = [Step('B', 1, 0), Step('E', 0, 0), Step('S', 0, 0)];
    let step = Step('P', 1, 0);
    sent(&mut client, &mut server, &[step]);
    sent(&mut client, &mut server, &copy);
    assert_eq!(answers(&mut client, &mut server, b"1tn2G"), "12G");
    let data = [Step('d', 0, 0), Step('c', 0, 0), Step('S', 0, 0)];
    sent(&mut client, &mut server, &data);
    assert_eq!(sent(&mut client, &mut server, &[Step('P', 2, 1)]), "PD");
    assert_eq!(answers(&mut client, &mut server, b"EZZ"), "EZZ");
    // By a text that the server has.
    let next = [
        Step('P', 3, 0),
        Step('B', 3, 0),
        Step('E', 0, 0),
        Step('S', 0, 0),
    ];
    assert_eq!(sent(&mut client, &mut server, &next), "BES");
    assert_eq!(answers(&mut client, &mut server, b"1tn2CZ"), "112CZ");
    assert!(!client.is_lost() && client.is_at_rest());
}

/// The messages that the server gets for those of a client on a shared connection, one letter each.
fn sent(client: &mut ClientStatements, server: &mut ServerStatements, steps: &[Step]) -> String {
    let mut tags = String::new();
    for step in steps {
        let (is_sent, sent) = attempted(client, server, step);
        assert!(is_sent, "blocked");
        tags.push_str(&sent);
    }
    tags
}

/// The same of a message that must wait for the answer.
fn blocked(client: &mut ClientStatements, server: &mut ServerStatements, step: &Step) -> String {
    let (is_sent, sent) = attempted(client, server, step);
    assert!(!is_sent);
    sent
}

/// Whether a message is sent, with the letters; those of what the client gets at once stand between bars.
fn attempted(
    client: &mut ClientStatements,
    server: &mut ServerStatements,
    step: &Step,
) -> (bool, String) {
    let (tag, body) = step.encode();
    let (mut to_server, mut to_client) = (BytesMut::new(), BytesMut::new());
    let message = ClientMessage {
        tag,
        length: body.len(),
        body: &body,
    };
    let meaning = Meaning::default();
    let sent = client.client_sends(server, message, meaning, &mut to_server, &mut to_client);
    if let Ok(sent) = sent {
        append(sent, message, &mut to_server);
    }
    let letters = |bytes: &[u8]| {
        let tags = messages(bytes).into_iter();
        tags.map(|(tag, _)| char::from(tag)).collect::<String>()
    };
    let at_once = match letters(&to_client) {
        none if none.is_empty() => none,
        letters => format!("|{letters}|"),
    };
    (sent.is_ok(), letters(&to_server) + &at_once)
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
    // With a Describe of the pool's, as another connection may describe it differently.
    assert_eq!(sent(&mut one, &mut server, &program), "PDBES");
    assert_eq!(answers(&mut one, &mut server, b"1tn2CZ"), "12CZ");
    assert_eq!(sent(&mut other, &mut server, &program), "|1|BES");
    assert_eq!(answers(&mut other, &mut server, b"2CZ"), "2CZ");
    // Another connection, which gets the text before the Bind, and describes it first.
    let mut server = shared(10);
    assert_eq!(blocked(&mut one, &mut server, &program[1]), "PDH");
    assert_eq!(answers(&mut one, &mut server, b"1tn"), "");
    assert_eq!(sent(&mut one, &mut server, &program[1..]), "BES");
    assert_eq!(answers(&mut one, &mut server, b"2CZ"), "2CZ");
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
            let sent = client.client_sends(
                &mut server,
                message,
                Meaning::default(),
                &mut to_server,
                &mut to_client,
            );
            assert_eq!(sent, Ok(Sent::Unchanged));
            assert_eq!((&to_server[..], &to_client[..]), (&b""[..], &b""[..]));
        }
    }
}

#[test]
fn what_a_client_has_prepared_is_not_of_one_that_comes_after_a_client_that_prepares_nothing() {
    let texts = Texts::new(1 << 20);
    for name in 0..2 {
        let mut server = ServerStatements::new(1);
        let mut client = ClientStatements::new(&texts);
        client.begin(&mut server);
        let program = [Step('P', name, 0), Step('S', 0, 0)];
        sent(&mut client, &mut server, &program);
        answers(&mut client, &mut server, b"1Z");
        client.end(&mut server);
        // Of one that leaves before its first request.
        server.forget_client();
        let mut next = ClientStatements::new(&texts);
        next.begin(&mut server);
        assert!(!server.is_exclusive());
        // A Bind that fails.
        assert_eq!(sent(&mut next, &mut server, &[Step('B', name, 0)]), "B");
        let mut out = BytesMut::new();
        next.server_sends(&mut server, b'E', b"C26000\0M\0\0", &mut out);
        assert_eq!(ErrorFields::parse(&out[HEADER_LEN..]).code, "26000");
    }
}

#[test]
fn a_text_beyond_the_limit_is_refused_by_an_error() {
    let texts = Texts::new(20);
    let mut server = shared(10);
    let mut client = ClientStatements::new(&texts);
    assert_eq!(sent(&mut client, &mut server, &[Step('P', 1, 0)]), "PD");
    // A Bind that fails.
    assert_eq!(
        sent(
            &mut client,
            &mut server,
            &[Step('P', 2, 1), Step('S', 0, 0)]
        ),
        "BS"
    );
    answers(&mut client, &mut server, b"1tn");
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
    assert_eq!(rest, Ok(Sent::Rest(2)));
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
        "PDC"
    );
    answers(&mut client, &mut server, b"1tn3");
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
    assert_eq!(answers(&mut client, &mut server, b"1tTtTZ"), "1tTZ");
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
        // Looked at again before the answer, perhaps where it would be prepared differently.
        let elsewhere = Meaning {
            scope: Scope::Once(9),
            ..later
        };
        let again =
            client.client_sends(&mut other, bind, elsewhere, &mut to_server, &mut to_client);
        assert_eq!((again, messages(&to_server).len()), (Err(Blocked), 3));
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

#[test]
fn a_query_that_changes_what_is_known_of_the_session_is_found_by_its_beginning() {
    for sql in [
        "SET a = 1",
        "reset all",
        "Commit",
        "end",
        "rollback to x",
        "abort;",
        "savepoint a",
        "release a",
        "discard all",
        "prepare p as select 1",
        "DEALLOCATE p ; ",
    ] {
        for before in ["", " \n", "\x0b", "-- a\n", "/*b*/"] {
            let sql = [before, sql].concat();
            assert_eq!(Sql::of_query(sql.as_bytes()).len(), 1, "{sql}");
        }
    }
    for sql in [
        "",
        "s",
        "select 1",
        "begin",
        "settle",
        "insert into t values (1)",
        "\"set\"",
        "discard temp",
    ] {
        assert!(Sql::of_query(sql.as_bytes()).is_empty(), "{sql}");
    }
}
