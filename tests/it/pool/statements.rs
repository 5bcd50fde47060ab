//! `transaction` mode: prepared statements of the protocol follow their client to whatever connection it is given.

use super::{
    misuse::{answers, parse, plain_bound, plain_bound_of},
    transaction::{shared, sharing},
    *,
};
use crate::{
    console::{console, rows},
    harness::wire::{Reply, Wire, extended},
};

pub(super) fn prepare(name: &str, sql: &str) -> Vec<u8> {
    message('P', format!("{name}\0{sql}\0\0\0").as_bytes())
}

pub(super) fn describe(name: &str) -> Vec<u8> {
    message('D', format!("S{name}\0").as_bytes())
}

pub(super) fn close(name: &str) -> Vec<u8> {
    message('C', format!("S{name}\0").as_bytes())
}

/// Bind, Describe and Execute with these parameters as text.
pub(super) fn execute(name: &str, parameters: &[&str]) -> Vec<u8> {
    let mut bind = format!("\0{name}\0\0\0").into_bytes();
    bind.extend(u16::try_from(parameters.len()).unwrap().to_be_bytes());
    for parameter in parameters {
        bind.extend(u32::try_from(parameter.len()).unwrap().to_be_bytes());
        bind.extend(parameter.as_bytes());
    }
    bind.extend(b"\0\0");
    [
        message('B', &bind),
        message('D', b"P\0"),
        message('E', b"\0\0\0\0\0"),
    ]
    .concat()
}

/// The types of the columns of a RowDescription.
pub(super) fn types(reply: &Reply) -> Vec<u32> {
    assert_eq!(reply.tag, 'T');
    let (count, mut rest) = reply.body.split_first_chunk::<2>().unwrap();
    let mut types = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let end = rest.iter().position(|&byte| byte == 0).unwrap();
        let field = &rest[end + 1..];
        types.push(u32::from_be_bytes(field[6..10].try_into().unwrap()));
        rest = &field[18..];
    }
    types
}

/// The messages of one request and of one without an error, as the types of the answers up to ReadyForQuery.
pub(super) async fn tags(wire: &mut Wire, messages: &[Vec<u8>]) -> String {
    wire.send(&[&messages.concat()[..], &sync()].concat()).await;
    within("the answers", wire.tags()).await
}

/// The error codes and rows of one request.
pub(super) async fn request(wire: &mut Wire, messages: &[Vec<u8>]) -> Vec<String> {
    wire.send(&[&messages.concat()[..], &sync()].concat()).await;
    answers(wire, 1).await
}

/// Gives the only connection to another client in between, with a statement of the same name and no name.
async fn disturb(other: &mut Wire) {
    let found = request(
        other,
        &[
            close("s"),
            prepare("s", "select 'of another'"),
            execute("s", &[]),
        ],
    )
    .await;
    assert_eq!(found, ["of another"]);
    let found = request(other, &[extended("select 'of another, unnamed'")]).await;
    assert_eq!(found, ["of another, unnamed"]);
}

#[tokio::test]
async fn statements_of_the_same_name_stay_apart() {
    let (emulator, proxy) = sharing(2).await;
    let mut clients = JoinSet::new();
    for number in 0..6_u32 {
        let mut wire = proxy.session().await;
        clients.spawn(async move {
            let (sql, oid) = match number % 3 {
                0 => (format!("select {number}::int4 as a"), 23),
                1 => (format!("select '{number}'::text as b"), 25),
                _ => (format!("select {number}::int8 as c"), 20),
            };
            tags(&mut wire, &[prepare("s", &sql)]).await;
            for round in 0..30 {
                let mut messages = vec![execute("s", &[])];
                if round % 2 == 0 {
                    messages.insert(0, describe("s"));
                }
                wire.send(&[&messages.concat()[..], &sync()].concat()).await;
                for reply in wire.until('Z').await {
                    match reply.tag {
                        'T' => assert_eq!(types(&reply), [oid], "{number}"),
                        'D' => assert_eq!(reply.value(), number.to_string()),
                        'E' => panic!("{number}: {:?}", reply.error()),
                        _ => {}
                    }
                }
            }
        });
    }
    within("the clients", clients.join_all()).await;
    assert!(emulator.counts().logins <= 2);
}

#[tokio::test]
async fn names_in_use_and_unknown_names_are_errors_that_skip_exactly_to_their_sync() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    disturb(&mut other).await;
    assert_eq!(tags(&mut one, &[prepare("s", "select 'mine'")]).await, "1Z");
    disturb(&mut other).await;
    let again = prepare("s", "select 'again'");
    assert_eq!(
        request(&mut one, std::slice::from_ref(&again)).await,
        ["42P05"]
    );
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["mine"]);
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[execute("t", &[])]).await, ["26000"]);
    assert_eq!(request(&mut one, &[describe("t")]).await, ["26000"]);
    disturb(&mut other).await;
    // Of ten requests, one fails at its front and one within.
    let mut pipeline = Vec::new();
    for number in 0..10 {
        match number {
            3 => pipeline.extend([&again[..], &execute("s", &[])].concat()),
            7 => {
                pipeline.extend([execute("s", &[]), execute("t", &[]), execute("s", &[])].concat());
            }
            _ => pipeline.extend(execute("s", &[])),
        }
        pipeline.extend(sync());
    }
    one.send(&pipeline).await;
    let found = answers(&mut one, 10).await;
    let mut expected = vec!["mine"; 3];
    expected.push("42P05");
    expected.extend(["mine"; 4]);
    expected.push("26000");
    expected.extend(["mine"; 2]);
    assert_eq!(found, expected);
    disturb(&mut other).await;
    // Closed, the name is free; closing what is not there is no error.
    let messages = [
        close("s"),
        close("s"),
        prepare("s", "select 'new'"),
        execute("s", &[]),
    ];
    assert_eq!(request(&mut one, &messages).await, ["new"]);
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["new"]);
    // A Parse that fails leaves the name free.
    let broken = [close("s"), prepare("s", "broken")];
    assert_eq!(request(&mut one, &broken).await, ["42601"]);
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["26000"]);
    assert_eq!(
        request(&mut one, &[prepare("s", "select 1"), execute("s", &[])]).await,
        ["1"]
    );
}

/// Clients deallocate statements of the protocol by SQL, as psycopg does.
#[tokio::test]
async fn a_statement_of_the_protocol_is_deallocated_by_sql() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for deallocate in [
        "deallocate s",
        "DEALLOCATE \"s\";",
        "deallocate all",
        "discard all",
    ] {
        assert_eq!(tags(&mut one, &[prepare("s", "select 'mine'")]).await, "1Z");
        disturb(&mut other).await;
        one.send(&text('Q', deallocate)).await;
        assert_eq!(one.tags().await, "CZ", "{deallocate}");
        disturb(&mut other).await;
        assert_eq!(
            request(&mut one, &[execute("s", &[])]).await,
            ["26000"],
            "{deallocate}"
        );
        disturb(&mut other).await;
        // It takes effect in its turn, and one that fails has none.
        let messages = [
            prepare("s", "select 'mine'"),
            sync(),
            text('Q', deallocate),
            execute("s", &[]),
            sync(),
            prepare("s", "select 'next'"),
        ];
        one.send(&[&messages.concat()[..], &sync()].concat()).await;
        assert_eq!(answers(&mut one, 4).await, ["26000"], "{deallocate}");
        disturb(&mut other).await;
        let failed = [
            text('Q', "begin"),
            text('Q', "select 1 / 0"),
            text('Q', deallocate),
            text('Q', "rollback"),
        ];
        one.send(&failed.concat()).await;
        assert_eq!(
            answers(&mut one, 4).await,
            ["22012", "25P02"],
            "{deallocate}"
        );
        disturb(&mut other).await;
        assert_eq!(
            request(&mut one, &[execute("s", &[])]).await,
            ["next"],
            "{deallocate}"
        );
        one.query("deallocate s").await;
    }
}

/// The server keeps the statements used last, whatever the clients prepare.
#[tokio::test]
async fn a_server_connection_keeps_a_bounded_number_of_statements() {
    const STATEMENTS: usize = 600;
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    // From here on it is not the connection of one client alone.
    disturb(&mut other).await;
    let name = |number: usize| format!("s{number}");
    for number in 0..STATEMENTS {
        tags(
            &mut one,
            &[prepare(&name(number), &format!("select {number}"))],
        )
        .await;
    }
    let held = "select count(*) from pg_prepared_statements";
    let count: usize = other.value(held).await.parse().unwrap();
    assert!(count <= 200, "{count} statements");
    for round in 0..STATEMENTS {
        let number = round * 7919 % STATEMENTS;
        let found = request(&mut one, &[execute(&name(number), &[])]).await;
        assert_eq!(found, [number.to_string()]);
    }
    // In one request more than it keeps: none is closed while it is outstanding.
    let pipeline: Vec<_> = (0..300).map(|number| execute(&name(number), &[])).collect();
    let found = request(&mut one, &pipeline).await;
    let expected: Vec<_> = (0..300).map(|number| number.to_string()).collect();
    assert_eq!(found, expected);
    // With errors within, after which no statement that was to be closed or prepared is taken for what it is not.
    for _ in 0..5 {
        let mut pipeline = Vec::new();
        for number in 300..STATEMENTS {
            pipeline.push(execute(&name(number), &[]));
            if number % 50 == 0 {
                pipeline.push(execute("missing", &[]));
            }
            if number % 20 == 0 {
                pipeline.push(sync());
            }
        }
        let count = pipeline.iter().filter(|it| it[0] == b'S').count() + 1;
        one.send(&[&pipeline.concat()[..], &sync()].concat()).await;
        let found = answers(&mut one, count).await;
        assert_eq!(found.iter().filter(|it| *it == "26000").count(), 6);
        let mut numbers = found
            .iter()
            .filter_map(|it| it.parse::<usize>().ok().filter(|it| *it != 26000));
        assert!(numbers.clone().is_sorted());
        assert!(numbers.all(|number| (300..STATEMENTS).contains(&number)));
    }
    // Those in flight could not be closed; the next that is prepared makes up for it.
    assert_eq!(request(&mut one, &[execute("s7", &[])]).await, ["7"]);
    let count: usize = other.value(held).await.parse().unwrap();
    assert!(count <= 200, "{count} statements");
}

#[tokio::test]
async fn the_unnamed_statement_follows_its_client() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    assert_eq!(
        tags(&mut one, &[parse("select 'mine'"), describe("")]).await,
        "1tTZ"
    );
    for _ in 0..3 {
        disturb(&mut other).await;
        assert_eq!(request(&mut one, &[plain_bound()]).await, ["mine"]);
    }
    assert_eq!(one.value("select 1").await, "1");
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[plain_bound()]).await, ["26000"]);
    // A Parse that fails drops it, too.
    assert_eq!(
        request(&mut one, &[extended("select 'second'")]).await,
        ["second"]
    );
    assert_eq!(request(&mut one, &[parse("broken")]).await, ["42601"]);
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[plain_bound()]).await, ["26000"]);
    // And one that is skipped does not.
    assert_eq!(
        request(&mut one, &[extended("select 'third'")]).await,
        ["third"]
    );
    assert_eq!(
        request(
            &mut one,
            &[execute("missing", &[]), parse("select 'skipped'")]
        )
        .await,
        ["26000"]
    );
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[plain_bound()]).await, ["third"]);
}

/// As without the proxy: drivers know the error and prepare again.
#[tokio::test]
async fn a_changed_table_fails_each_prepared_statement_once_at_most() {
    const CLIENTS: usize = 100;
    let (_emulator, proxy) = sharing(3).await;
    let mut admin = proxy.session().await;
    admin
        .query("create table changed (a int); insert into changed values (1)")
        .await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut wire = proxy.session().await;
        tags(&mut wire, &[prepare("s", "select * from changed")]).await;
        assert_eq!(request(&mut wire, &[execute("s", &[])]).await, ["1"]);
        clients.push(wire);
    }
    admin
        .query("alter table changed add column b text default 'new'")
        .await;
    let mut rounds = JoinSet::new();
    for mut wire in clients {
        rounds.spawn(async move {
            let mut failures = 0;
            for _ in 0..10 {
                wire.send(&[execute("s", &[]), sync()].concat()).await;
                let replies = within("an answer", wire.until('Z')).await;
                if let Some(error) = replies.iter().find(|reply| reply.tag == 'E') {
                    assert_eq!(error.error().code, "0A000");
                    failures += 1;
                    let again = [close("s"), prepare("s", "select * from changed")];
                    assert_eq!(tags(&mut wire, &again).await, "31Z");
                    continue;
                }
                let described = replies.iter().find(|reply| reply.tag == 'T').unwrap();
                assert_eq!(types(described), [23, 25]);
                let row = replies.iter().find(|reply| reply.tag == 'D').unwrap();
                assert_eq!(row.body[..2], [0, 2]);
            }
            failures
        });
    }
    let failures = within("the clients", rounds.join_all()).await;
    assert!(failures.iter().all(|count| *count <= 1), "{failures:?}");
    for _ in 0..5 {
        let mut wire = proxy.session().await;
        let messages = [prepare("s", "select * from changed"), execute("s", &[])];
        assert_eq!(request(&mut wire, &messages).await, ["1"]);
    }
}

#[tokio::test]
async fn rows_of_a_table_that_was_made_anew_have_the_types_that_are_described() {
    let (_emulator, proxy) = sharing(2).await;
    let mut admin = proxy.session().await;
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(proxy.session().await);
    }
    for (number, (kind, value, oid)) in [("int", "1", 23), ("text", "'x'", 25), ("int8", "2", 20)]
        .iter()
        .cycle()
        .take(6)
        .enumerate()
    {
        let make = format!(
            "drop table if exists anew; create table anew (a {kind}); insert into anew values ({value})"
        );
        admin.query(&make).await;
        for wire in &mut clients {
            let messages = [close("s"), prepare("s", "select a from anew")];
            assert_eq!(tags(wire, &messages).await, "31Z", "{number}");
            wire.send(&[describe("s"), execute("s", &[]), sync()].concat())
                .await;
            let replies = within("an answer", wire.until('Z')).await;
            let described = replies.iter().filter(|reply| reply.tag == 'T').map(types);
            assert_eq!(described.collect::<Vec<_>>(), [[*oid], [*oid]], "{number}");
            let row = replies.iter().find(|reply| reply.tag == 'D').unwrap();
            assert_eq!(row.value(), value.trim_matches('\''));
        }
    }
}

#[tokio::test]
async fn large_statements_names_and_numbers_of_parameters_are_served() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let name = "n".repeat(6000);
    let long = format!("select length('{}')", "x".repeat(8_000_000));
    assert_eq!(tags(&mut one, &[prepare(&name, &long)]).await, "1Z");
    for _ in 0..2 {
        disturb(&mut other).await;
        assert_eq!(request(&mut one, &[execute(&name, &[])]).await, ["8000000"]);
    }
    assert_eq!(tags(&mut one, &[close(&name)]).await, "3Z");
    let count = 65_535;
    let sums: Vec<_> = (1..=count)
        .map(|number| format!("(${number}::int)"))
        .collect();
    let many = format!("select sum(a) from (values {}) v (a)", sums.join(","));
    let parameters = vec!["1"; count];
    let messages = [prepare("s", &many), execute("s", &parameters)];
    assert_eq!(request(&mut one, &messages).await, ["65535"]);
    assert_eq!(tags(&mut one, &[close("s")]).await, "3Z");
    // Texts that are not large, and more of them than one client may have.
    let mut refused = None;
    for number in 0..1000 {
        let sql = format!("select {number} /* {} */", "x".repeat(60_000));
        one.send(&[prepare(&format!("s{number}"), &sql), sync()].concat())
            .await;
        let replies = within("an answer", one.until('Z')).await;
        if let Some(reply) = replies.iter().find(|reply| reply.tag == 'E') {
            refused = Some((number, reply.error()));
            break;
        }
    }
    let (number, error) = refused.expect("a limit");
    assert!((200..400).contains(&number), "{number} statements");
    assert_eq!(error.code, "53200");
    assert!(error.hint.is_some());
    disturb(&mut other).await;
    assert_eq!(request(&mut one, &[execute("s7", &[])]).await, ["7"]);
    assert_eq!(
        tags(&mut one, &[close("s8"), prepare("s", "select 'small'")]).await,
        "31Z"
    );
}

/// A Parse that need not be sent is answered in its turn, and not at all behind an error.
#[tokio::test]
async fn what_is_answered_without_the_server_keeps_its_order() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    // The server has both.
    let (known, failing) = ("select 'known'", "select 1 / (random() * 0)::int");
    for (name, sql) in [("a", known), ("b", failing)] {
        assert_eq!(tags(&mut other, &[prepare(name, sql)]).await, "1Z");
    }
    assert_eq!(tags(&mut one, &[prepare("b", failing)]).await, "1Z");
    let behind = [execute("b", &[]), prepare("a", known), execute("a", &[])];
    one.send(&[&behind.concat()[..], &sync()].concat()).await;
    let found = one.tags().await;
    assert!(found.ends_with("EZ") && !found.contains('1'), "{found}");
    assert_eq!(
        request(&mut one, &[execute("a", &[])]).await,
        ["26000"],
        "it was skipped"
    );
    let before = [
        prepare("a", known),
        execute("a", &[]),
        close("a"),
        prepare("a", known),
        execute("b", &[]),
    ];
    one.send(&[&before.concat()[..], &sync()].concat()).await;
    let found = one.tags().await;
    assert!(
        found.starts_with("12TDC31") && found.ends_with("EZ"),
        "{found}"
    );
    // The Parse that has its answer counts, although the request fails.
    assert_eq!(request(&mut one, &[execute("a", &[])]).await, ["known"]);
}

#[tokio::test]
async fn a_statement_that_was_described_is_bound_on_another_connection() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.send(
        &[
            prepare("s", "select $1::int4 as a, pg_backend_pid()"),
            describe("s"),
            sync(),
        ]
        .concat(),
    )
    .await;
    let replies = one.until('Z').await;
    let described = types(replies.iter().find(|reply| reply.tag == 'T').unwrap());
    assert_eq!(described, [23, 23]);
    // Whichever it had is taken.
    for sql in ["begin", "select 1"] {
        other.query(sql).await;
    }
    let mut third = proxy.session().await;
    one.send(&[execute("s", &["5"]), sync()].concat()).await;
    let replies = within("an answer", one.until('Z')).await;
    assert_eq!(
        types(replies.iter().find(|reply| reply.tag == 'T').unwrap()),
        described
    );
    assert_eq!(third.value("select 1").await, "1");
    other.query("commit").await;
}

/// Sent by pools of applications at every return of a connection.
#[tokio::test]
async fn discard_all_is_the_clients_own() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for _ in 0..3 {
        one.send(&text('Q', "discard all")).await;
        let replies = one.until('Z').await;
        assert_eq!(replies[0].body, "DISCARD ALL\0");
        assert_eq!(other.value("select 1").await, "1");
    }
    for reset in ["RESET ALL", "DEALLOCATE ALL", "CLOSE ALL", "UNLISTEN *"] {
        one.send(&text('Q', reset)).await;
        assert_eq!(one.tags().await, "CZ", "{reset}");
        assert_eq!(other.value("select 1").await, "1", "{reset}");
    }
    one.query("begin").await;
    one.send(&text('Q', "discard all")).await;
    assert_eq!(answers(&mut one, 1).await, ["25001"]);
    one.query("rollback").await;
    assert_eq!(other.value("select 1").await, "1");
}

#[tokio::test]
async fn discard_all_drops_no_statement_of_another_client() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for (wire, mine) in [(&mut one, "select 'one'"), (&mut other, "select 'other'")] {
        assert_eq!(tags(wire, &[prepare("s", mine)]).await, "1Z");
    }
    one.query("set work_mem = '5MB'").await;
    for discard in ["discard all", "deallocate all"] {
        one.query(discard).await;
        assert_eq!(request(&mut other, &[execute("s", &[])]).await, ["other"]);
        assert_eq!(
            request(&mut one, &[execute("s", &[])]).await,
            ["26000"],
            "{discard}"
        );
        assert_eq!(one.value("show work_mem").await, "4MB");
        assert_eq!(tags(&mut one, &[prepare("s", "select 'one'")]).await, "1Z");
    }
}

#[tokio::test]
async fn sql_prepares_by_the_name_of_a_statement_of_another_client() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    assert_eq!(tags(&mut one, &[prepare("s", "select 'one'")]).await, "1Z");
    other.query("prepare s as select 'other'").await;
    assert_eq!(other.value("execute s").await, "other");
    other.query("deallocate s").await;
    assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["one"]);
}

#[tokio::test]
async fn what_sql_prepares_is_there_for_the_rest_of_its_unit() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    disturb(&mut other).await;
    let sql = |sql| [parse(sql), plain_bound()].concat();
    for ends in [
        text('Q', "deallocate q"),
        [sql("deallocate q"), sync()].concat(),
    ] {
        one.send(&[sql("prepare q as select 1"), ends].concat())
            .await;
        let tags = within("the answers", one.tags()).await;
        assert!(tags.ends_with("CZ"), "{tags}");
    }
}

/// What follows in the same unit waits for its answer, which comes only behind a Flush; also on a connection of the client's own.
#[tokio::test]
async fn a_statement_is_not_found_behind_one_that_deallocates_all_in_its_unit() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    for discard in ["discard all", "deallocate all"] {
        let unit = [
            prepare("s", discard),
            prepare("t", "select 1"),
            execute("s", &[]),
            execute("s", &[]),
        ];
        assert_eq!(request(&mut one, &unit).await, ["26000"], "{discard}");
        assert_eq!(request(&mut one, &[execute("t", &[])]).await, ["26000"]);
    }
}

/// Such a query is not read; its command tag shows what it has done.
#[tokio::test]
async fn a_large_query_that_deallocates_all_ends_what_its_client_has_prepared() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for (wire, mine) in [(&mut one, "select 'one'"), (&mut other, "select 'other'")] {
        assert_eq!(tags(wire, &[prepare("s", mine)]).await, "1Z");
        assert_eq!(tags(wire, &[execute("s", &[])]).await, "2TDCZ");
    }
    let comment = "-".repeat(70_000);
    one.query(&format!("/*{comment}*/ deallocate all")).await;
    assert_eq!(request(&mut other, &[execute("s", &[])]).await, ["other"]);
    assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["26000"]);
    assert_eq!(tags(&mut one, &[prepare("s", "select 'one'")]).await, "1Z");
}

/// A function ends statements unseen.
#[tokio::test]
async fn a_statement_that_the_server_has_lost_is_prepared_again() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("create function f() returns void language plpgsql as 'begin execute ''deallocate'' || '' all''; end'")
        .await;
    disturb(&mut other).await;
    assert_eq!(
        tags(&mut other, &[prepare("t", "select 'second'")]).await,
        "1Z"
    );
    one.query("select f()").await;
    // Once, however many statements it has.
    assert_eq!(request(&mut other, &[execute("s", &[])]).await, ["26000"]);
    let both = [execute("s", &[]), execute("t", &[])];
    assert_eq!(request(&mut other, &both).await, ["of another", "second"]);
    one.query("drop function f()").await;
    // One of them only.
    let name = "select name from pg_prepared_statements where statement like '%second%' and statement not like '%name%'";
    let mut third = proxy.session().await;
    let name = third.value(name).await;
    let end = format!("do 'begin deallocate {name}; end'");
    third.query(&end).await;
    assert_eq!(request(&mut other, &[execute("t", &[])]).await, ["26000"]);
    assert_eq!(request(&mut other, &both).await, ["of another", "second"]);
}

/// PostgreSQL has one table of names for both.
#[tokio::test]
async fn statements_of_sql_and_of_the_protocol_have_the_same_names() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    disturb(&mut other).await;
    one.query("prepare q as select 'by sql'").await;
    for _ in 0..2 {
        assert_eq!(request(&mut one, &[execute("q", &[])]).await, ["by sql"]);
        assert_eq!(tags(&mut one, &[describe("q")]).await, "tTZ");
        let again = prepare("q", "select 'by the protocol'");
        assert_eq!(request(&mut one, &[again]).await, ["42P05"]);
    }
    assert_eq!(tags(&mut one, &[close("q")]).await, "3Z");
    assert_eq!(request(&mut one, &[execute("q", &[])]).await, ["26000"]);
    // The same the other way round.
    tags(&mut one, &[prepare("q", "select 'by the protocol'")]).await;
    disturb(&mut other).await;
    one.send(&text('Q', "prepare q as select 'by sql'")).await;
    assert_eq!(answers(&mut one, 1).await, ["42P05"]);
    assert_eq!(
        request(&mut one, &[execute("q", &[])]).await,
        ["by the protocol"]
    );
    // One that is hidden in dynamic SQL.
    one.query("do 'begin execute ''pre'' || ''pare hidden as select 1''; end'")
        .await;
    assert_eq!(one.query("deallocate hidden").await, [""; 0]);
    // No statement.
    for sql in ["deallocate q garbage", "deallocate prepare q 1"] {
        one.send(&text('Q', sql)).await;
        assert_eq!(answers(&mut one, 1).await, ["42601"]);
    }
    assert_eq!(
        request(&mut one, &[execute("q", &[])]).await,
        ["by the protocol"]
    );
}

/// As in PostgreSQL, whose names have 63 bytes.
#[tokio::test]
async fn a_long_name_is_cut() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let name = "n".repeat(63);
    let (long, same) = (format!("{name}1"), format!("{name}2"));
    for client in [&mut one, &mut other] {
        tags(client, &[prepare(&long, "select 'of a long name'")]).await;
        let again = prepare(&same, "select 'another'");
        assert_eq!(request(client, &[again]).await, ["42P05"]);
        let found = request(client, &[execute(&same, &[])]).await;
        assert_eq!(found, ["of a long name"]);
    }
    assert_eq!(one.query(&format!("deallocate {same}")).await, [""; 0]);
    assert_eq!(request(&mut one, &[execute(&long, &[])]).await, ["26000"]);
}

#[tokio::test]
async fn a_large_text_by_a_name_in_use_is_refused() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    assert_eq!(tags(&mut one, &[prepare("s", "select 'one'")]).await, "1Z");
    let large = format!("select '{}'", "-".repeat(70_000));
    for _ in 0..2 {
        assert_eq!(request(&mut one, &[prepare("s", &large)]).await, ["42P05"]);
        disturb(&mut other).await;
        assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["one"]);
    }
}

/// The statements of pgbench, prepared, by more clients than there are connections.
#[tokio::test]
async fn eight_clients_of_pgbench_share_two_connections() {
    for protocol in ["simple", "extended", "prepared"] {
        let (emulator, proxy) = sharing(2).await;
        let port = proxy.address().port().to_string();
        let pgbench = async |arguments: &[&str]| {
            let output = tokio::process::Command::new("pgbench")
                .env("PATH", harness::path())
                .args(["-h", "127.0.0.1", "-p", &port, "-U", "anyone"])
                .args(arguments)
                .arg(DATABASE)
                .kill_on_drop(true)
                .output();
            let output = within("pgbench", output).await.unwrap();
            let report = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{protocol}: {report}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        pgbench(&["-i", "-s", "1", "-q"]).await;
        // A thread for each, as one that prepares waits for its answer.
        let report = pgbench(&["-M", protocol, "-c", "8", "-j", "8", "-t", "50", "-n"]).await;
        assert!(report.contains("processed: 400/400"), "{report}");
        let client = proxy.client().await;
        client
            .batch_execute(
                "drop table pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers",
            )
            .await
            .unwrap();
        // pgbench drops its connection for the load.
        assert!(
            emulator.counts().logins <= 4,
            "{}",
            emulator.counts().logins
        );
    }
}

/// Within COPY, a Sync or Flush has no effect and no answer.
#[tokio::test]
async fn a_sync_within_the_copy_of_a_query_is_no_request() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    disturb(&mut other).await;
    one.query("create table copied (a text)").await;
    let data = [
        text('Q', "copy copied from stdin"),
        message('d', b"a\n"),
        message('H', b""),
        sync(),
    ]
    .concat();
    let look = [
        close("s"),
        prepare("s", "select count(*) from copied"),
        execute("s", &[]),
    ];
    for count in ["1", "2"] {
        one.send(&[&data[..], &message('c', b"")].concat()).await;
        assert_eq!(one.tags().await, "GCZ");
        disturb(&mut other).await;
        assert_eq!(request(&mut one, &look).await, [count]);
    }
    // Whether one that fails has read it before is not known: the connection stays the client's.
    one.send(&[&data[..], &text('f', "given up")].concat())
        .await;
    assert_eq!(one.tags().await, "GEZ");
    assert_eq!(request(&mut one, &look).await, ["2"]);
}

/// One into a view fails before it reads anything, and a Sync sent with its Execute is read after it.
#[tokio::test]
async fn a_copy_that_fails_before_it_reads_costs_no_session() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("create view seen as select 1 as a").await;
    let copy = prepare("c", "copy seen from stdin");
    assert_eq!(tags(&mut one, &[copy]).await, "1Z");
    let execute = [plain_bound_of("c"), sync()].concat();
    let data = [message('d', b"1\n"), message('c', b""), sync()].concat();
    for _ in 0..3 {
        disturb(&mut other).await;
        one.send(&execute).await;
        assert_eq!(one.tags().await, "2GEZ");
        one.send(&data).await;
        assert_eq!(one.tags().await, "Z");
        assert_eq!(one.value("select 2").await, "2");
        // All at once, with a request behind it.
        one.send(&[&execute[..], &data, &text('Q', "select 3")].concat())
            .await;
        let found = [one.tags().await, one.tags().await, one.tags().await];
        assert_eq!(found, ["2GEZ", "Z", "TDCZ"]);
        let query = text('Q', "copy seen from stdin");
        one.send(&[&query[..], &sync(), &text('Q', "select 4")].concat())
            .await;
        let found = [one.tags().await, one.tags().await, one.tags().await];
        assert_eq!(found, ["GEZ", "Z", "TDCZ"]);
    }
}

/// Whether the block has failed is not known when its end is sent.
#[tokio::test]
async fn a_deallocate_behind_the_end_of_a_block_that_fails_meanwhile_is_answered() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    tags(
        &mut one,
        &[prepare("end", "rollback"), prepare("a", "select 1")],
    )
    .await;
    disturb(&mut other).await;
    one.query("begin").await;
    let messages = [
        text('Q', "select 1 / 0"),
        plain_bound_of("end"),
        text('Q', "deallocate a"),
    ];
    one.send(&messages.concat()).await;
    assert_eq!(within("the error", one.tags()).await, "EZ");
    assert_eq!(within("an answer", one.tags()).await, "2CCZ");
}

/// Its text is not kept, so that it stays where it is.
#[tokio::test]
async fn a_large_unnamed_statement_keeps_its_connection_until_the_next_one() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    // Both connections have had several clients.
    for client in [&mut one, &mut other] {
        client.query("begin").await;
    }
    for client in [&mut one, &mut other] {
        client.query("commit").await;
    }
    let large = format!("select 'large' /* {} */", "x".repeat(100_000));
    for _ in 0..2 {
        assert_eq!(request(&mut one, &[extended(&large)]).await, ["large"]);
        disturb(&mut other).await;
        // In a later request.
        assert_eq!(request(&mut one, &[execute("", &[])]).await, ["large"]);
        proxy.until_idle_beside(1, 1).await;
        assert_eq!(request(&mut one, &[extended("select 1")]).await, ["1"]);
        proxy.until_at_rest().await;
    }
}

/// The Parse that is added for it takes a snapshot, behind which no BEGIN may choose its isolation level.
#[tokio::test]
async fn a_description_on_another_connection_takes_no_snapshot() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        // What another client prepares drops what this one has.
        settings.max_prepared_statements = Some(1);
    })
    .await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for name in ["", "s"] {
        assert_eq!(tags(&mut one, &[prepare(name, "select 1")]).await, "1Z");
        disturb(&mut other).await;
        let messages = [
            describe(name),
            extended("begin isolation level repeatable read"),
            extended("show transaction_isolation"),
        ];
        let found = request(&mut one, &messages).await;
        assert_eq!(found, ["repeatable read"], "{name:?}");
        one.query("rollback").await;
        let found = request(&mut one, &[describe(name), extended("select 7")]).await;
        assert_eq!(found, if name.is_empty() { ["26000"] } else { ["7"] });
    }
    // What fails there fails the client's own request, and no more.
    one.query("create table described_elsewhere ()").await;
    for name in ["", "t"] {
        let sql = "select * from described_elsewhere";
        assert_eq!(tags(&mut one, &[prepare(name, sql)]).await, "1Z");
        disturb(&mut other).await;
        other
            .query("drop table if exists described_elsewhere")
            .await;
        let pipeline = [
            describe(name),
            extended("select 7"),
            sync(),
            extended("select 8"),
            sync(),
        ];
        one.send(&pipeline.concat()).await;
        assert_eq!(answers(&mut one, 2).await, ["42P01", "8"], "{name:?}");
        other.query("create table described_elsewhere ()").await;
    }
    one.query("drop table described_elsewhere").await;
}

#[tokio::test]
async fn the_console_counts_statements_and_shows_no_text() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.max_prepared_statements = Some(2);
        settings.admin_console = Some(true);
    })
    .await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for sql in ["select 1", "select 2", "select 3"] {
        for client in [&mut one, &mut other] {
            assert_eq!(tags(client, &[prepare(sql, sql)]).await, "1Z");
        }
    }
    let console = console(&proxy).await;
    let shown = rows(&console, "SHOW PREPARED_STATEMENTS").await;
    let number = |name| shown[0].get(name).unwrap().parse::<u64>().unwrap();
    assert_eq!(shown.len(), 1);
    assert_eq!(number("statements"), 3);
    assert_eq!(number("max_per_server"), 2);
    assert!((24..100).contains(&number("memory")));
    assert_eq!(number("memory_limit"), 64 * 1024 * 1024);
    // The first one twice: at first by the name of the only client that had the connection.
    assert_eq!((number("sent"), number("answered")), (4, 2));
    assert_eq!(number("evicted"), 1);
    let shows_text = |at| shown[0].get(at).is_some_and(|it| it.contains("select"));
    assert!(!(0..shown[0].len()).any(shows_text));
}
