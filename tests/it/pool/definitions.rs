//! `transaction` and `auto` mode: definitions change what a prepared statement means, and its client gets what a connection of
//! its own would send.

use super::{
    misuse::{parse, plain_bound},
    statements::{close, describe, execute, prepare, request, tags, types},
    *,
};
use crate::harness::wire::{Wire, extended};

const MODES: [PoolMode; 2] = [PoolMode::Transaction, PoolMode::Auto];

/// Has another listener define something, which the pool does not see.
async fn define(sql: &str) {
    let superuser = harness::superuser().await;
    superuser.batch_execute(sql).await.unwrap();
}

/// A table of a name that no other test uses.
async fn table(name: &str) {
    define(&format!(
        "drop table if exists {name}; create table {name} (a int, b int); insert into {name} values (1, 2); \
         grant all on {name} to public"
    ))
    .await;
}

/// Bind and Execute of the statement `s` with a binary int4.
fn execute_with_seven() -> Vec<u8> {
    let bind = b"\0s\0\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\x07\0\0";
    [message('B', bind), message('E', b"\0\0\0\0\0")].concat()
}

/// Ends the only server connection, so that the next request is sent to another one.
async fn move_on(proxy: &Proxy, client: &mut Wire) {
    let pid = client.value("select pg_backend_pid()").await;
    define(&format!("select pg_terminate_backend({pid})")).await;
    eventually("it has ended", async || {
        let open = proxy.metrics().pool_servers.values();
        let open: i64 = open.map(prometheus::IntGauge::get).sum();
        (open == 0).then_some(())
    })
    .await;
}

/// Has the connection of another client, which is shared from then on.
async fn share(other: &mut Wire) {
    assert_eq!(
        tags(other, &[close("o"), prepare("o", "select 9")]).await,
        "31Z"
    );
}

#[tokio::test]
async fn rows_that_others_have_changed_are_an_error_and_no_wrong_rows() {
    table("changed_rows").await;
    let change =
        "alter table changed_rows drop a; alter table changed_rows add a text default 'text'";
    let sql = "select * from changed_rows";
    let (own, unnamed) = (prepare("s", sql), parse(sql));
    let ways = [
        (
            "described",
            vec![own.clone(), describe("s")],
            execute("s", &[]),
        ),
        (
            "its portal described",
            vec![own.clone(), execute("s", &[])],
            execute("s", &[]),
        ),
        ("described by the pool", vec![own], execute("s", &[])),
        ("unnamed", vec![unnamed, describe("")], plain_bound()),
    ];
    for mode in MODES {
        for (way, prepared, bound) in &ways {
            // In `auto`, a client that has its connection to itself prepares as it likes.
            for is_shared in [true, false] {
                if !is_shared && *way == "described by the pool" {
                    continue;
                }
                table("changed_rows").await;
                let (_emulator, proxy) = proxy_in(mode, 1).await;
                let (mut client, mut other) = (proxy.session().await, proxy.session().await);
                if is_shared {
                    share(&mut other).await;
                }
                request(&mut client, prepared).await;
                define(change).await;
                // By the other client, as a query would end the unnamed statement.
                move_on(&proxy, &mut other).await;
                let found = request(&mut client, std::slice::from_ref(bound)).await;
                assert_eq!(found, ["0A000"], "{mode:?}, {way}, shared: {is_shared}");
                // Drivers prepare it again.
                let again = [close("s"), prepare("s", sql), execute("s", &[])];
                assert_eq!(request(&mut client, &again).await, ["2"], "{mode:?}, {way}");
            }
        }
    }
}

/// A binary int4 is no real.
#[tokio::test]
async fn parameters_that_others_have_changed_are_an_error_and_no_wrong_value() {
    for mode in MODES {
        table("changed_parameter").await;
        let (_emulator, proxy) = proxy_in(mode, 1).await;
        let (mut client, mut other) = (proxy.session().await, proxy.session().await);
        share(&mut other).await;
        let insert = prepare("s", "insert into changed_parameter (a) values ($1)");
        assert_eq!(tags(&mut client, &[insert]).await, "1Z");
        define("alter table changed_parameter alter a type real").await;
        move_on(&proxy, &mut other).await;
        assert_eq!(
            request(&mut client, &[execute_with_seven()]).await,
            ["0A000"]
        );
        let count = "select count(*) from changed_parameter where a <> 1";
        assert_eq!(client.value(count).await, "0");
    }
}

/// As directly: what counts is the names and types of the columns.
#[tokio::test]
async fn a_table_that_is_made_anew_with_the_same_columns_fails_nothing() {
    for mode in MODES {
        table("swapped").await;
        let (_emulator, proxy) = proxy_in(mode, 1).await;
        let (mut client, mut other) = (proxy.session().await, proxy.session().await);
        share(&mut other).await;
        let prepared = [prepare("s", "select a, b from swapped"), describe("s")];
        request(&mut client, &prepared).await;
        other
            .query("create table swapped_anew (b int, z text, a int); insert into swapped_anew values (4, '', 3)")
            .await;
        define("drop table swapped; alter table swapped_anew rename to swapped").await;
        move_on(&proxy, &mut other).await;
        assert_eq!(request(&mut client, &[execute("s", &[])]).await, ["3"]);
    }
}

/// What only one client sees decides no statement of another.
#[tokio::test]
async fn tables_of_one_client_decide_no_statement_of_another() {
    table("own_tables").await;
    define("drop schema if exists own_schema cascade; create schema own_schema; grant all on schema own_schema to public")
        .await;
    let insert = "insert into own_tables (a) values ($1)";
    for mode in MODES {
        for (make, unmake) in [
            (
                "create temp table own_tables (a text)",
                "drop table own_tables",
            ),
            (
                "begin; create table own_schema.own_tables (a text)",
                "rollback",
            ),
        ] {
            let (_emulator, proxy) = proxy_in(mode, 2).await;
            let (mut one, mut other) = (proxy.session().await, proxy.session().await);
            let mut third = proxy.session().await;
            // Both connections are shared.
            for client in [&mut third, &mut other, &mut one] {
                share(client).await;
            }
            one.query("begin").await;
            share(&mut third).await;
            one.query("rollback").await;
            for client in [&mut one, &mut other] {
                client.query("set search_path = own_schema, public").await;
            }
            one.query(make).await;
            for client in [&mut one, &mut other] {
                assert_eq!(tags(client, &[prepare("s", insert)]).await, "1Z");
            }
            // The other connection is taken, and that of the one client free once it has no such table any more.
            third.query("begin").await;
            one.query(unmake).await;
            other.query("begin").await;
            assert_eq!(
                request(&mut other, &[execute_with_seven()]).await,
                [""; 0],
                "{mode:?}: {make}"
            );
            assert_eq!(other.value("select max(a) from own_tables").await, "7");
            other.query("rollback").await;
            third.query("rollback").await;
        }
    }
}

/// Prepared after a definition, a statement is one of after it, also where the command tag shows none.
#[tokio::test]
async fn a_statement_is_of_the_time_that_it_is_prepared() {
    let sql = "select * from of_its_time";
    let add = "alter table of_its_time add c int";
    for mode in MODES {
        for (definition, undone, columns) in [
            (vec![extended(&format!("do 'begin {add}; end'"))], None, 3),
            (
                vec![extended("begin"), extended("savepoint s"), extended(add)],
                Some("rollback to s"),
                2,
            ),
            (
                vec![extended("create table of_its_time as select 1 as only")],
                None,
                1,
            ),
            (vec![extended(add)], None, 3),
        ] {
            define("drop table if exists of_its_time").await;
            define("drop schema if exists its_schema cascade; create schema its_schema; grant all on schema its_schema to public")
                .await;
            let (_emulator, proxy) = proxy_in(mode, 1).await;
            let (mut client, mut other) = (proxy.session().await, proxy.session().await);
            other.query("create table of_its_time (a int, b int)").await;
            for client in [&mut client, &mut other] {
                client.query("set search_path = its_schema, public").await;
            }
            request(&mut other, &[prepare("s", sql), describe("s")]).await;
            // In one unit, and in one of its own.
            let mut messages = definition.clone();
            if let Some(undone) = undone {
                messages.push(prepare("in_part", sql));
                messages.push(extended(undone));
            }
            for name in ["s", "t"] {
                messages.extend([prepare(name, sql), describe(name), sync()]);
                client.send(&messages.concat()).await;
                let replies = within("a description", client.until('Z')).await;
                let described = replies.iter().rfind(|reply| reply.tag == 'T').unwrap();
                assert_eq!(
                    types(described).len(),
                    columns,
                    "{mode:?}, {name}: {columns}"
                );
                messages = Vec::new();
            }
            client.query("rollback").await;
        }
    }
}
