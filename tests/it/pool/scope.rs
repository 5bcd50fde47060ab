//! `transaction` and `auto` mode: equal texts are one prepared statement only where the server reads them alike.

use super::{
    statements::{describe, execute, prepare, request},
    *,
};

const MODES: [PoolMode; 2] = [PoolMode::Transaction, PoolMode::Auto];

/// Literals mean something from the time on that a statement is prepared.
#[tokio::test]
async fn a_text_is_read_by_the_settings_of_the_client_that_prepares_it() {
    for mode in MODES {
        for (settings, sql, values) in [
            (
                ["timezone = 'UTC'", "timezone = 'Asia/Tokyo'"],
                "select extract(epoch from timestamptz '2024-01-01 00:00')::bigint",
                ["1704067200", "1704034800"],
            ),
            (
                ["datestyle = 'ISO, MDY'", "datestyle = 'ISO, DMY'"],
                "select extract(month from date '01/02/2024')::int",
                ["1", "2"],
            ),
            (
                ["client_encoding = 'UTF8'", "client_encoding = 'LATIN1'"],
                "select length('é')",
                ["1", "2"],
            ),
        ] {
            let (_emulator, proxy) = proxy_in(mode, 1).await;
            let (mut one, mut other) = (proxy.session().await, proxy.session().await);
            one.query(&format!("set {}", settings[0])).await;
            other.query(&format!("set {}", settings[1])).await;
            let [first, second] = values;
            for _ in 0..2 {
                let prepared = [prepare("s", sql), execute("s", &[])];
                assert_eq!(request(&mut one, &prepared).await, [first], "{mode:?}");
                assert_eq!(request(&mut other, &prepared).await, [second], "{mode:?}");
                assert_eq!(request(&mut one, &[execute("s", &[])]).await, [first]);
                for client in [&mut one, &mut other] {
                    client.query("deallocate s").await;
                }
            }
        }
    }
}

/// Two schemas, each with a type of the same name.
async fn schemas(name: &str) {
    let sql = [1, 2].map(|number| {
        let schema = format!("{name}_{number}");
        format!(
            "drop schema if exists {schema} cascade; create schema {schema}; \
             create type {schema}.status as enum ('of {number}'); create table {schema}.u (a {schema}.status); \
             insert into {schema}.u values ('of {number}'); grant usage on schema {schema} to public; \
             grant select on {schema}.u to public"
        )
    });
    let superuser = harness::superuser().await;
    superuser.batch_execute(&sql.join("; ")).await.unwrap();
}

#[tokio::test]
async fn a_text_is_read_by_the_settings_of_its_transaction() {
    schemas("scope_local").await;
    for mode in MODES {
        for set in [
            "set local search_path = scope_local_{}",
            "select set_config('search_path', 'scope_local_{}', true)",
            "set search_path = scope_local_{}",
        ] {
            let (_emulator, proxy) = proxy_in(mode, 1).await;
            let (mut one, mut other) = (proxy.session().await, proxy.session().await);
            for round in 0..3 {
                for (client, number) in [(&mut one, "1"), (&mut other, "2")] {
                    client.query("begin").await;
                    client.query(&set.replace("{}", number)).await;
                    let name = format!("s{round}");
                    let sql = "select a from u where a = $1";
                    let expected = format!("of {number}");
                    let messages = [prepare(&name, sql), execute(&name, &[&expected])];
                    assert_eq!(request(client, &messages).await, [expected], "{set}");
                    client.query("rollback").await;
                }
            }
        }
    }
}

/// A statement that is prepared once more, as its client has another connection, is read by other settings than at first.
#[tokio::test]
async fn a_statement_that_is_prepared_again_by_other_settings_is_no_other_clients() {
    schemas("scope_again").await;
    let (_emulator, proxy) = proxy_in(PoolMode::Transaction, 1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for client in [&mut one, &mut other] {
        client.query("set search_path = scope_again_1").await;
    }
    let statement = prepare("s", "select a from u");
    assert_eq!(
        request(
            &mut one,
            &[statement.clone(), describe("s"), execute("s", &[])]
        )
        .await,
        ["of 1"]
    );
    let superuser = harness::superuser().await;
    for _ in 0..2 {
        one.query("set search_path = scope_again_2").await;
        let pid = one.value("select pg_backend_pid()").await;
        let end = format!("select pg_terminate_backend({pid})");
        superuser.batch_execute(&end).await.unwrap();
        eventually("it has ended", async || {
            (proxy.servers(PoolServer::Idle) == 0).then_some(())
        })
        .await;
        // As directly: the type that it returned was another one.
        let found = request(&mut one, &[execute("s", &[])]).await;
        assert_eq!(found, ["0A000"]);
        assert_eq!(
            request(&mut other, &[statement.clone(), execute("s", &[])]).await,
            ["of 1"]
        );
        other.query("deallocate s").await;
        one.query("set search_path = scope_again_1").await;
        assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["of 1"]);
    }
}
