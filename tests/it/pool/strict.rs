//! `pool_strict`: a connection is reset whenever another client gets it.

use super::{
    statements::{execute, prepare, request},
    transaction::shared,
    *,
};

impl Proxy {
    fn resets(&self) -> u64 {
        self.metrics().pool_resets[PoolReset::Done].get()
    }
}

async fn strict(mode: PoolMode, is_strict: bool) -> (Emulator, Proxy) {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.pool_mode = Some(mode);
        settings.pool_strict = Some(is_strict);
    })
    .await;
    (emulator, proxy)
}

/// The text of the session does not show what the function does.
#[tokio::test]
async fn what_a_function_leaves_is_undone_for_the_next_client() {
    let superuser = harness::superuser().await;
    let function = "create or replace function leave_something() returns int language sql as \
        $$ select set_config('work_mem', '123kB', false); select set_config('app.hidden', 'left', false); \
           select pg_advisory_lock(70001); select 1 $$";
    superuser.batch_execute(function).await.unwrap();
    let look = "select concat_ws(' ', current_setting('work_mem'), current_setting('app.hidden', true), \
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()))";
    for mode in [PoolMode::Transaction, PoolMode::Auto] {
        for (is_strict, expected) in [(false, "123kB left 1"), (true, "4MB  0")] {
            let (emulator, proxy) = strict(mode, is_strict).await;
            let (mut one, mut other) = (proxy.session().await, proxy.session().await);
            assert_eq!(one.value("select leave_something()").await, "1");
            assert_eq!(other.value(look).await, expected, "{mode:?}");
            assert_eq!(proxy.resets(), u64::from(is_strict), "{mode:?}");
            assert_eq!(emulator.counts().logins, 1);
        }
    }
}

/// It is answered without a server, as the session has set nothing that can be seen.
#[tokio::test]
async fn what_a_function_leaves_is_undone_for_the_same_client_by_its_own_reset() {
    let superuser = harness::superuser().await;
    let function = "create or replace function sign_in() returns text language sql as \
        $$ select set_config('app.owner', 'alice', false) $$";
    superuser.batch_execute(function).await.unwrap();
    let (_emulator, proxy) = strict(PoolMode::Transaction, true).await;
    let mut one = proxy.session().await;
    for reset in ["discard all", "reset all"] {
        assert_eq!(one.value("select sign_in()").await, "alice");
        one.query(reset).await;
        let look = "select coalesce(current_setting('app.owner', true), '')";
        assert_eq!(one.value(look).await, "", "{reset}");
    }
    assert_eq!(proxy.metrics().pool_local_answers.get(), 2);
}

#[tokio::test]
async fn what_clients_have_set_and_prepared_follows_them_over_resets() {
    let (emulator, proxy) = strict(PoolMode::Transaction, true).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for (client, value) in [(&mut one, "1"), (&mut other, "2")] {
        client.query(&format!("set app.number = {value}")).await;
        let sql = format!("select {value} + current_setting('app.number')::int");
        let found = request(client, &[prepare("s", &sql), execute("s", &[])]).await;
        assert_eq!(found.len(), 1);
    }
    for _ in 0..3 {
        assert_eq!(request(&mut one, &[execute("s", &[])]).await, ["2"]);
        assert_eq!(request(&mut other, &[execute("s", &[])]).await, ["4"]);
    }
    let resets = proxy.resets();
    assert!(resets >= 6, "{resets}");
    // As long as the client is the same, nothing is reset.
    for _ in 0..3 {
        assert_eq!(request(&mut other, &[execute("s", &[])]).await, ["4"]);
    }
    assert_eq!(proxy.resets(), resets);
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn clients_that_have_left_nothing_cause_no_reset() {
    let (_emulator, proxy) = strict(PoolMode::Transaction, true).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for _ in 0..3 {
        assert_eq!(one.value("select 1").await, "1");
        assert_eq!(other.value("select 1").await, "1");
    }
    assert_eq!(proxy.resets(), 0);
}
