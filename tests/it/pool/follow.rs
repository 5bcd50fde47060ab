//! `transaction` mode: what a client has set is in force on whatever connection it is given, and for no other client.

use std::{env, time::Duration};

use lakebase_proxy::telemetry::labels::PinReason;
use tokio::time::Instant;

use super::{
    misuse::answers,
    statements::{execute, prepare, request, tags, types},
    transaction::sharing,
    *,
};
use crate::harness::wire::Wire;

impl Proxy {
    pub(super) fn all_pins(&self) -> u64 {
        let pins = self.metrics().pool_pins.values();
        pins.map(prometheus::IntCounter::get).sum()
    }

    async fn session_with(&self, parameters: &[(&str, &str)]) -> Wire {
        let mut wire = self.dial().await;
        let all = [&[("user", "anyone"), ("database", DATABASE)], parameters].concat();
        wire.startup(&all).await;
        wire.welcome().await;
        wire
    }
}

/// The one value of a query, that another client has had the only connection before.
async fn follows(one: &mut Wire, other: &mut Wire, look: &str) -> String {
    other.query("select 1").await;
    within("a connection", one.value(look)).await
}

#[tokio::test]
async fn settings_follow_the_rules_of_transactions() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for (program, expected) in [
        ("set work_mem = '5MB'", "5MB"),
        ("begin; set work_mem = '6MB'; rollback", "5MB"),
        ("begin; set work_mem = '6MB'; commit", "6MB"),
        (
            "begin; set work_mem = '7MB'; set local work_mem = '8MB'; commit",
            "7MB",
        ),
        (
            "begin; set local work_mem = '9MB'; set work_mem = '10MB'; commit",
            "10MB",
        ),
        (
            "begin; savepoint a; set work_mem = '11MB'; rollback to a; commit",
            "10MB",
        ),
        (
            "begin; savepoint a; set work_mem = '11MB'; release a; commit",
            "11MB",
        ),
        (
            "begin; set work_mem = '12MB'; savepoint a; reset work_mem; rollback to a; commit",
            "12MB",
        ),
        ("begin; reset work_mem; rollback", "12MB"),
        ("begin; reset all; commit", "4MB"),
        ("set local work_mem = '13MB'", "4MB"),
        ("set work_mem = '14MB'; set work_mem = '15MB'", "15MB"),
        ("set work_mem to default", "4MB"),
    ] {
        one.query(program).await;
        assert_eq!(
            follows(&mut one, &mut other, "show work_mem").await,
            expected,
            "{program}"
        );
        assert_eq!(other.value("show work_mem").await, "4MB", "{program}");
    }
    // COMMIT of a failed block is a rollback; so is an error in a text of several.
    for program in [
        &["begin", "set work_mem = '5MB'", "select 1 / 0", "commit"][..],
        &["set work_mem = '5MB'; select 1 / 0"],
        &["begin; set work_mem = '5MB'; select 1 / 0", "rollback"],
    ] {
        let messages: Vec<_> = program.iter().map(|sql| text('Q', sql)).collect();
        one.send(&messages.concat()).await;
        assert_eq!(answers(&mut one, program.len()).await, ["22012"]);
        assert_eq!(
            follows(&mut one, &mut other, "show work_mem").await,
            "4MB",
            "{program:?}"
        );
    }
    // A warning, and no effect.
    one.send(&text('Q', "set local work_mem = '5MB'")).await;
    let replies = one.until('Z').await;
    assert_eq!(replies[0].error().code, "25P01");
    // By the extended protocol.
    let messages = [prepare("", "set work_mem = '16MB'"), execute("", &[])];
    assert_eq!(tags(&mut one, &messages).await, "12nCZ");
    assert_eq!(follows(&mut one, &mut other, "show work_mem").await, "16MB");
    assert_eq!(proxy.pins(PinReason::Settings), 0);
}

#[tokio::test]
async fn a_reset_restores_what_the_client_has_started_with() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy
        .session_with(&[
            ("application_name", "at start"),
            ("options", "-c work_mem=5MB"),
        ])
        .await;
    let mut other = proxy
        .session_with(&[("application_name", "of another")])
        .await;
    for reset in [
        "reset work_mem",
        "set work_mem to default",
        "reset all",
        "discard all",
    ] {
        one.query("set work_mem = '6MB'").await;
        one.query("set application_name = 'changed'").await;
        let look = "select current_setting('work_mem') || current_setting('application_name')";
        assert_eq!(
            follows(&mut one, &mut other, look).await,
            "6MBchanged",
            "{reset}"
        );
        one.query(reset).await;
        let expected = if reset.ends_with("all") {
            "5MBat start"
        } else {
            "5MBchanged"
        };
        assert_eq!(
            follows(&mut one, &mut other, look).await,
            expected,
            "{reset}"
        );
        assert_eq!(
            follows(&mut other, &mut one, look).await,
            "4MBof another",
            "{reset}"
        );
    }
}

#[tokio::test]
async fn settings_of_any_form_follow_verbatim() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for number in 0..60 {
        one.query(&format!("set app.number_{number} = 'value {number}'"))
            .await;
    }
    // The last of them, and more of all would keep the connection.
    let long = "x".repeat(5000);
    one.query(&format!("set app.long = '{long}'")).await;
    for statement in [
        "set time zone interval '+02' hour to minute",
        "set names 'LATIN1'",
        "set app.b.c = 'dots'",
        "set \"Weird.Name\" = 'mixed'",
        "set app.quoted = 'it''s \\ $1'",
        "set app.escaped = E'tab\\tquote\\''",
        "set app.dollars = $q$it's$q$",
        "set search_path = \"$user\", \"Mixed Case\", public",
        "set session characteristics as transaction isolation level repeatable read",
        "set names 'UTF8'",
        "set app.unicode = 'ünïcödé \u{1f600}'",
    ] {
        one.query(statement).await;
        assert_eq!(proxy.all_pins(), 0, "{statement}");
    }
    other.query("select 1").await;
    for (name, expected) in [
        ("app.number_0", "value 0"),
        ("app.number_59", "value 59"),
        ("app.long", &long),
        ("timezone", "<+00:02>-00:02"),
        ("client_encoding", "UTF8"),
        ("app.b.c", "dots"),
        ("weird.name", "mixed"),
        ("app.quoted", "it's \\ $1"),
        ("app.escaped", "tab\tquote'"),
        ("app.dollars", "it's"),
        ("search_path", "\"$user\", \"Mixed Case\", public"),
        ("default_transaction_isolation", "repeatable read"),
        ("app.unicode", "ünïcödé \u{1f600}"),
    ] {
        let look = format!("select current_setting('{name}')");
        assert_eq!(
            follows(&mut one, &mut other, &look).await,
            expected,
            "{name}"
        );
        let look = format!("select coalesce(current_setting('{name}', true), '')");
        assert_ne!(
            other.value(&look).await,
            if name == "client_encoding" {
                ""
            } else {
                expected
            },
            "{name}"
        );
    }
    // With strings in which a backslash escapes, on a connection of its own perhaps.
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("set standard_conforming_strings = off").await;
    one.query("set app.backslash = 'it\\'s'").await;
    let look = "select current_setting('app.backslash')";
    assert_eq!(follows(&mut one, &mut other, look).await, "it's");
    assert_eq!(
        follows(&mut one, &mut other, "show standard_conforming_strings").await,
        "off"
    );
    assert_eq!(other.value("select '\\'").await, "\\");
}

/// The same text means another table for each client, with columns of another type.
#[tokio::test]
async fn statements_of_the_same_text_mean_the_tables_of_their_clients_search_path() {
    let (_emulator, proxy) = sharing(2).await;
    let mut admin = proxy.session().await;
    let mut clients = JoinSet::new();
    for (number, (kind, value, oid)) in [("int", "1", 23), ("text", "'x'", 25), ("int8", "3", 20)]
        .into_iter()
        .enumerate()
    {
        let schema = format!("path_{number}");
        admin.query(&format!("create schema {schema}; create table {schema}.t (a {kind}); insert into {schema}.t values ({value})")).await;
        for _ in 0..2 {
            let mut wire = proxy.session().await;
            let schema = schema.clone();
            clients.spawn(async move {
                wire.query(&format!("set search_path = {schema}")).await;
                tags(&mut wire, &[prepare("s", "select a from t")]).await;
                for _ in 0..20 {
                    wire.send(&[execute("s", &[]), sync()].concat()).await;
                    for reply in within("the answers", wire.until('Z')).await {
                        match reply.tag {
                            'T' => assert_eq!(types(&reply), [oid], "{schema}"),
                            'D' => assert_eq!(reply.value(), value.trim_matches('\'')),
                            'E' => panic!("{schema}: {:?}", reply.error()),
                            _ => {}
                        }
                    }
                    let messages = [prepare("", "select a from t"), execute("", &[])];
                    assert_eq!(
                        request(&mut wire, &messages).await,
                        [value.trim_matches('\'')]
                    );
                }
            });
        }
    }
    within("the clients", clients.join_all()).await;
    // With another path, the statement means another table, as on a direct connection.
    let mut wire = proxy.session().await;
    wire.query("set search_path = path_1").await;
    tags(&mut wire, &[prepare("s", "select length(a) from t")]).await;
    wire.query("set search_path = path_0").await;
    let mut other = proxy.session().await;
    other.query("select 1").await;
    assert_eq!(request(&mut wire, &[execute("s", &[])]).await, ["42883"]);
    for number in 0..3 {
        admin
            .query(&format!("drop schema path_{number} cascade"))
            .await;
    }
}

#[tokio::test]
async fn a_statement_timeout_is_its_own_clients() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("set statement_timeout = '50ms'").await;
    for _ in 0..2 {
        other.query("select pg_sleep(0.2)").await;
        one.send(&text('Q', "select pg_sleep(10)")).await;
        assert_eq!(answers(&mut one, 1).await, ["57014"]);
    }
}

#[tokio::test]
async fn clients_of_different_encodings_get_the_bytes_of_theirs() {
    let (emulator, proxy) = sharing(1).await;
    let (mut latin, mut unicode) = (proxy.session().await, proxy.session().await);
    latin
        .send(&text('Q', "set client_encoding = 'LATIN1'"))
        .await;
    let replies = latin.until('Z').await;
    assert!(
        replies
            .iter()
            .any(|reply| reply.tag == 'S' && reply.body == "client_encoding\0LATIN1\0")
    );
    for _ in 0..3 {
        latin.send(&text('Q', "select chr(228)")).await;
        let replies = within("a row", latin.until('Z')).await;
        assert_eq!(replies[1].body, b"\0\x01\0\0\0\x01\xe4"[..]);
        // Reported once, and not at each change of the connection.
        assert_eq!(
            replies.iter().map(|reply| reply.tag).collect::<String>(),
            "TDCZ"
        );
        unicode.send(&text('Q', "select chr(228)")).await;
        let replies = unicode.until('Z').await;
        assert_eq!(replies[1].body, b"\0\x01\0\0\0\x02\xc3\xa4"[..]);
        assert_eq!(replies.len(), 4);
        // What is sent, too.
        latin.send(&message('Q', b"select length('\xe4')\0")).await;
        assert_eq!(answers(&mut latin, 1).await, ["1"]);
        assert_eq!(unicode.value("select length('ä')").await, "1");
    }
    assert_eq!(emulator.counts().logins, 1);
    assert_eq!(proxy.pins(PinReason::Encoding), 0);
}

/// The second byte of a character may be a backslash.
#[tokio::test]
async fn an_encoding_that_is_not_safe_in_sql_keeps_its_connection() {
    let (_emulator, proxy) = sharing(2).await;
    let mut one = proxy.session().await;
    one.query("set client_encoding = 'SJIS'").await;
    for _ in 0..3 {
        one.send(&message('Q', b"select length('\x83\x5c')\0"))
            .await;
        assert_eq!(answers(&mut one, 1).await, ["1"]);
        assert_eq!(
            value(&proxy.client().await, "show client_encoding").await,
            "UTF8"
        );
    }
    assert_eq!(one.value("show client_encoding").await, "SJIS");
    let pins = [PinReason::Encoding, PinReason::Settings].map(|reason| proxy.pins(reason));
    assert_eq!(pins.iter().sum::<u64>(), 1);
}

/// What the policy of a table reads the tenant from.
#[derive(Clone, Copy, Debug)]
enum Tenancy {
    Setting,
    Role,
    Transaction,
}

/// For how long: `TENANTS_SECONDS` by a nightly run.
fn tenants_duration() -> Duration {
    let seconds = env::var("TENANTS_SECONDS").map(|seconds| seconds.parse().unwrap());
    Duration::from_secs(seconds.unwrap_or(2))
}

/// Row level security: two tenants on two connections.
async fn no_client_sees_a_row_of_another_tenant(tenancy: Tenancy) {
    for mode in [PoolMode::Transaction, PoolMode::Auto] {
        tenants_are_apart(tenancy, mode).await;
    }
}

async fn tenants_are_apart(tenancy: Tenancy, mode: PoolMode) {
    let (emulator, proxy) = proxy_in(mode, 2).await;
    let app = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let tag = format!("tenant_{}", std::process::id());
    let (table, roles) = (
        format!("{tag}_{tenancy:?}"),
        [0, 1].map(|tenant| format!("{tag}_{tenancy:?}_{tenant}").to_lowercase()),
    );
    let [first, second] = &roles;
    superuser
        .batch_execute(&format!(
            "create role {first}; create role {second}; grant {first}, {second} to \"{app}\"; \
             create table {table} (tenant text, a int); \
             insert into {table} select '{first}', g from generate_series(1, 10) g; \
             insert into {table} select '{second}', g from generate_series(1, 10) g; \
             alter table {table} enable row level security; \
             create policy own on {table} using (tenant in (current_user::text, current_setting('app.tenant', true))); \
             grant select on {table} to {first}, {second}, \"{app}\""
        ))
        .await
        .unwrap();
    let until = Instant::now() + tenants_duration();
    let clients: JoinSet<()> = (0..20)
        .map(|number| {
            let (config, tenant) = (proxy.client_config(), roles[number % 2].clone());
            let look = format!("select string_agg(distinct tenant, ','), count(*) from {table}");
            async move {
                let client = connect(&config).await;
                match tenancy {
                    Tenancy::Setting => client
                        .batch_execute(&format!("set app.tenant = '{tenant}'"))
                        .await
                        .unwrap(),
                    Tenancy::Role => client
                        .batch_execute(&format!("set role {tenant}"))
                        .await
                        .unwrap(),
                    Tenancy::Transaction => {}
                }
                let mut looks = 0;
                // On a busy machine the time is not enough to have the connections change hands.
                while Instant::now() < until || looks < 4 {
                    if let Tenancy::Transaction = tenancy {
                        let begin = format!("begin; set local app.tenant = '{tenant}'");
                        client.batch_execute(&begin).await.unwrap();
                    }
                    let row = if looks % 2 == 0 {
                        let row = client.query_one(&look, &[]).await.unwrap();
                        (row.get::<_, Option<String>>(0), row.get::<_, i64>(1))
                    } else {
                        (Some(value(&client, &look).await), 10)
                    };
                    assert_eq!(row, (Some(tenant.clone()), 10), "{tenancy:?}");
                    if let Tenancy::Transaction = tenancy {
                        client.batch_execute("commit").await.unwrap();
                    }
                    looks += 1;
                }
            }
        })
        .collect();
    clients.join_all().await;
    assert!(emulator.counts().logins <= 2);
    superuser
        .batch_execute(&format!(
            "drop table {table}; drop role {first}; drop role {second}"
        ))
        .await
        .unwrap();
}

#[tokio::test]
async fn no_client_sees_a_row_of_another_tenant_by_a_setting() {
    no_client_sees_a_row_of_another_tenant(Tenancy::Setting).await;
}

#[tokio::test]
async fn no_client_sees_a_row_of_another_tenant_by_a_role() {
    no_client_sees_a_row_of_another_tenant(Tenancy::Role).await;
}

#[tokio::test]
async fn no_client_sees_a_row_of_another_tenant_by_a_transaction() {
    no_client_sees_a_row_of_another_tenant(Tenancy::Transaction).await;
}
