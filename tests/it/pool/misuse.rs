//! `transaction` mode and clients that do what drivers rarely do.

use std::time::Duration;

use lakebase_proxy::telemetry::labels::PinReason;
use tokio::{
    io::AsyncWriteExt,
    time::{sleep, timeout},
};

use super::{
    transaction::{shared, sharing},
    *,
};
use crate::harness::wire::{Wire, cancel, extended};

/// Bind and Execute of the unnamed statement, with a parameter of this size.
fn bound(size: usize) -> Vec<u8> {
    let length = u32::try_from(size).unwrap().to_be_bytes();
    let bind = [b"\0\0\0\0\0\x01", &length[..], &vec![b'x'; size], b"\0\0"].concat();
    [message('B', &bind), message('E', b"\0\0\0\0\0")].concat()
}

pub(super) fn plain_bound() -> Vec<u8> {
    plain_bound_of("")
}

/// Bind and Execute of a statement without parameters.
pub(super) fn plain_bound_of(name: &str) -> Vec<u8> {
    let bind = message('B', format!("\0{name}\0\0\0\0\0\0\0").as_bytes());
    [bind, message('E', b"\0\0\0\0\0")].concat()
}

pub(super) fn parse(sql: &str) -> Vec<u8> {
    message('P', format!("\0{sql}\0\0\0").as_bytes())
}

/// The error codes and rows up to `count` ReadyForQuery.
pub(super) async fn answers(wire: &mut Wire, count: usize) -> Vec<String> {
    let mut found = Vec::new();
    for _ in 0..count {
        for reply in within("an answer", wire.until('Z')).await {
            match reply.tag {
                'E' => found.push(reply.error().code),
                'D' => found.push(reply.value()),
                _ => {}
            }
        }
    }
    found
}

#[tokio::test]
async fn the_unnamed_statement_of_another_client_is_out_of_reach_of_any_pipeline() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    // The number of answers, and what they hold.
    let close = message('C', b"Snothing\0");
    for (name, messages, expected) in [
        ("at the front", vec![plain_bound(), sync()], &["26000"][..]),
        (
            "in a later request",
            vec![close.clone(), sync(), plain_bound(), sync()],
            &["26000"],
        ),
        (
            "behind a message in the same request",
            vec![close, plain_bound(), sync()],
            &["26000"],
        ),
        (
            "behind a Parse that the server cannot read",
            vec![message('P', b"\0"), sync(), plain_bound(), sync()],
            &["08P01", "26000"],
        ),
        (
            "behind a Query that the server cannot read",
            vec![message('Q', b"select 1"), plain_bound(), sync()],
            &["08P01", "26000"],
        ),
        (
            "behind a Parse that fails",
            vec![parse("broken"), sync(), plain_bound(), sync()],
            &["42601", "26000"],
        ),
        ("described", vec![message('D', b"S\0"), sync()], &["26000"]),
        (
            "its own",
            vec![parse("select 'own'"), sync(), plain_bound(), sync()],
            &["own"],
        ),
    ] {
        one.send(&[extended("select 'of another'"), sync()].concat())
            .await;
        assert_eq!(answers(&mut one, 1).await, ["of another"]);
        let mut other = proxy.session().await;
        let count = messages
            .iter()
            .filter(|message| matches!(message.first(), Some(b'S' | b'Q')))
            .count();
        other.send(&messages.concat()).await;
        assert_eq!(answers(&mut other, count).await, expected, "{name}");
        assert_eq!(other.value("select 1").await, "1", "{name}");
    }
    // Larger than what is read before there is a connection.
    let one_parameter = message('P', b"\0select 'of another' || $1\0\0\x01\0\0\0\x19");
    one.send(&[one_parameter, bound(1), sync()].concat()).await;
    assert_eq!(answers(&mut one, 1).await, ["of anotherx"]);
    let mut other = proxy.session().await;
    other.send(&[bound(100_000), sync()].concat()).await;
    assert_eq!(answers(&mut other, 1).await, ["26000"]);
    // Sent before the welcome.
    one.send(&[extended("select 'of another'"), sync()].concat())
        .await;
    answers(&mut one, 1).await;
    let mut other = proxy.dial().await;
    let startup = harness::wire::startup(
        harness::wire::PROTOCOL_3_0,
        &[("user", "anyone"), ("database", DATABASE)],
    );
    other.send(&[startup, plain_bound(), sync()].concat()).await;
    other.welcome().await;
    assert_eq!(answers(&mut other, 1).await, ["26000"]);
}

#[tokio::test]
async fn settings_that_resemble_those_of_a_transaction_stay_the_clients_own() {
    for setting in ["local.a", "transaction.a", "constraints.a"] {
        let (_emulator, proxy) = sharing(1).await;
        let client = proxy.client().await;
        client
            .simple_query(&format!("set {setting} = 'mine'"))
            .await
            .unwrap();
        let look = format!("select coalesce(current_setting('{setting}', true), '')");
        assert_eq!(value(&proxy.client().await, &look).await, "");
        assert_eq!(value(&client, &look).await, "mine", "{setting}");
        assert_eq!(proxy.pins(PinReason::Settings), 0, "{setting}");
    }
}

/// In a transaction, as a request without a connection is read as a whole.
#[tokio::test]
async fn a_setting_is_found_wherever_its_text_is_cut() {
    for cut in [6, 7, 9, 30] {
        let (_emulator, proxy) = sharing(1).await;
        let mut one = proxy.session().await;
        one.query("begin").await;
        let set = text('Q', "set app.cut = 'mine'; commit");
        one.stream.set_nodelay(true).unwrap();
        one.send(&set[..cut]).await;
        sleep(Duration::from_millis(50)).await;
        one.send(&set[cut..]).await;
        one.until('Z').await;
        let look = "select coalesce(current_setting('app.cut', true), '')";
        for _ in 0..3 {
            assert_eq!(value(&proxy.client().await, look).await, "");
        }
        assert_eq!(one.value(look).await, "mine", "{cut}");
        assert_eq!(proxy.pins(PinReason::Settings), 0, "{cut}");
    }
}

#[tokio::test]
async fn each_client_has_its_own_application_name_and_encoding() {
    let (emulator, proxy) = sharing(1).await;
    let mut plain = proxy.session().await;
    let mut latin = proxy.dial().await;
    latin
        .startup(&[
            ("user", "anyone"),
            ("database", DATABASE),
            ("application_name", "latin"),
            ("client_encoding", "LATIN1"),
        ])
        .await;
    latin.welcome().await;
    for _ in 0..3 {
        let look =
            "select current_setting('client_encoding') || current_setting('application_name')";
        assert_eq!(latin.value(look).await, "LATIN1latin");
        assert_eq!(plain.value(look).await, "UTF8");
    }
    assert_eq!(emulator.counts().logins, 1);
    let mut sjis = proxy.dial().await;
    sjis.startup(&[("user", "anyone"), ("client_encoding", "SJIS")])
        .await;
    sjis.welcome().await;
    assert_eq!(proxy.pins(PinReason::Encoding), 1);
}

#[tokio::test]
async fn a_client_whose_database_does_not_exist_shares_those_of_the_default_one() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.database_mapping = None;
    })
    .await;
    let mut one = proxy.dial().await;
    one.startup(&[("user", "anyone")]).await;
    one.welcome().await;
    for _ in 0..5 {
        one.query("select 1").await;
    }
    proxy.until_at_rest().await;
    assert!(
        emulator.counts().logins <= 2,
        "{}",
        emulator.counts().logins
    );
}

#[tokio::test]
async fn a_request_whose_client_has_closed_its_half_is_answered() {
    let (_emulator, proxy) = sharing(1).await;
    for _ in 0..10 {
        let mut one = proxy.session().await;
        one.send(&text('Q', "select 'last'")).await;
        one.stream.shutdown().await.unwrap();
        assert_eq!(answers(&mut one, 1).await, ["last"]);
    }
    let client = proxy.client().await;
    client
        .simple_query("create table last_words (a int)")
        .await
        .unwrap();
    for _ in 0..10 {
        let mut one = proxy.session().await;
        one.send(&[text('Q', "insert into last_words values (1)"), terminate()].concat())
            .await;
        one.stream.shutdown().await.unwrap();
        // One that must wait is given up with its client, so one after the other.
        while let Ok(Some(_)) = one.try_next().await {}
    }
    eventually("the requests", async || {
        (value(&client, "select count(*) from last_words").await == "10").then_some(())
    })
    .await;
}

#[tokio::test]
async fn malformed_messages_are_the_servers_to_refuse() {
    let (_emulator, proxy) = sharing(1).await;
    for (name, bytes) in [
        ("a length of 0", &b"Q\0\0\0\0"[..]),
        ("a length of 3", b"Q\0\0\0\x03"),
        ("a length of 2^31", b"Q\x80\0\0\0"),
        ("an unknown type", b"?\0\0\0\x04"),
    ] {
        let mut one = proxy.session().await;
        one.send(bytes).await;
        let ended = async { while let Ok(Some(_)) = one.try_next().await {} };
        within(name, ended).await;
        assert_eq!(proxy.session().await.value("select 1").await, "1", "{name}");
    }
    // An error that nothing but itself explains is the client's own, and no state for another.
    for _ in 0..10 {
        let mut one = proxy.session().await;
        one.send(b"H\0\0\0\x05x").await;
        assert_eq!(one.until('E').await[0].error().code, "08P01");
        one.send(&[text('Q', "select 1"), sync()].concat()).await;
        assert_eq!(one.tags().await, "Z");
        drop(one);
        assert_eq!(proxy.session().await.value("select 1").await, "1");
    }
    // Errors after which the session goes on.
    for bytes in [&b"S\0\0\0\x05x"[..], b"Q\0\0\0\x05x"] {
        let mut one = proxy.session().await;
        one.send(bytes).await;
        assert_eq!(answers(&mut one, 1).await, ["08P01"]);
        assert_eq!(one.value("select 1").await, "1");
    }
}

#[tokio::test]
async fn a_prepare_that_fails_holds_no_connection() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.send(&[parse("broken"), sync()].concat()).await;
    assert_eq!(answers(&mut one, 1).await, ["42601"]);
    assert_eq!(within("the other", other.value("select 1")).await, "1");
}

#[tokio::test]
async fn clients_at_rest_that_read_nothing_do_not_delay_a_shutdown() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    let syncs = sync().repeat(1000);
    // Until its own buffers are full, too.
    while timeout(Duration::from_millis(500), one.stream.write_all(&syncs))
        .await
        .is_ok()
    {}
    let began = tokio::time::Instant::now();
    within("the end", proxy.end(async {})).await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn requests_that_arrive_one_byte_at_a_time_are_served() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.stream.set_nodelay(true).unwrap();
    let requests = [
        text('Q', "select 'simple'"),
        extended("select 'extended'"),
        sync(),
        sync(),
        parse("select 'in two'"),
        sync(),
        plain_bound(),
        sync(),
        text('Q', "begin"),
        text('Q', "select 'within'"),
        text('Q', "commit"),
    ]
    .concat();
    for byte in requests {
        one.send(&[byte]).await;
        sleep(Duration::from_millis(1)).await;
    }
    let found = answers(&mut one, 8).await;
    assert_eq!(found, ["simple", "extended", "in two", "within"]);
    assert_eq!(other.value("select 1").await, "1");
}

#[tokio::test]
async fn a_flush_is_answered_while_another_client_waits_and_ends_no_lease() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.send(
        &[
            parse("select 'one'"),
            message('D', b"S\0"),
            message('H', b""),
        ]
        .concat(),
    )
    .await;
    one.until('T').await;
    other.send(&text('Q', "select 'other'")).await;
    eventually("the other waits", async || {
        (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
    })
    .await;
    one.send(&[plain_bound(), message('H', b"")].concat()).await;
    one.until('C').await;
    // An error in a block is due without a Sync or a Flush.
    one.send(&sync()).await;
    one.until('Z').await;
    assert_eq!(answers(&mut other, 1).await, ["other"]);
    one.query("begin").await;
    one.send(
        &[
            message('B', b"\0nothing\0\0\0\0\0\0\0"),
            message('E', b"\0\0\0\0\0"),
        ]
        .concat(),
    )
    .await;
    assert_eq!(one.until('E').await[0].error().code, "26000");
    one.send(&[sync(), text('Q', "rollback")].concat()).await;
    answers(&mut one, 2).await;
    assert_eq!(other.value("select 1").await, "1");
}

#[tokio::test]
async fn many_cancels_at_once_hit_their_own_requests() {
    let (emulator, proxy) = sharing(4).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut wire = Wire::dial(proxy.address()).await;
        wire.startup(&[("user", "anyone")]).await;
        let key = wire.welcome().await.key;
        clients.push((wire, key));
    }
    let mut spared = proxy.session().await;
    for (wire, _) in &mut clients[..3] {
        wire.send(&text('Q', "select pg_sleep(20)")).await;
    }
    spared
        .send(&text('Q', "select 'spared' from pg_sleep(2)"))
        .await;
    harness::until_running(&emulator.identities().app.name, 4).await;
    let mut requests = JoinSet::new();
    for turn in 0..40 {
        // That of the client at rest is among them.
        requests.spawn(cancel(proxy.address(), clients[turn % 4].1));
    }
    within("the cancels", requests.join_all()).await;
    for (wire, _) in &mut clients[..3] {
        let found = answers(wire, 1).await;
        assert!(found.contains(&"57014".to_owned()), "{found:?}");
    }
    assert_eq!(answers(&mut spared, 1).await, ["spared"]);
    assert_eq!(clients[3].0.value("select 'rests'").await, "rests");
}

#[tokio::test]
async fn a_request_at_rest_wakes_the_endpoint() {
    let (emulator, proxy) = sharing(2).await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = proxy.session().await;
        client.query("select 1").await;
        clients.push(client);
    }
    proxy.until_at_rest().await;
    emulator.suspend().await;
    // A request that is sent before the end of its connection arrives is lost, as on a direct connection.
    proxy.until_idle(0).await;
    for client in &mut clients {
        assert_eq!(within("the wake", client.value("select 2")).await, "2");
    }
}

#[tokio::test]
async fn a_slow_reader_delays_no_other_client() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut slow, mut other) = (proxy.session().await, proxy.session().await);
    let copy = "copy (select repeat('x', 1000) from generate_series(1, 100000)) to stdout";
    slow.send(&text('Q', copy)).await;
    slow.next().await;
    for _ in 0..200 {
        assert_eq!(within("the other", other.value("select 1")).await, "1");
    }
    let rows = slow.until('Z').await;
    assert_eq!(rows.iter().filter(|row| row.tag == 'd').count(), 100_000);
    drop(slow);
    assert_eq!(other.value("select 1").await, "1");
}

#[tokio::test]
async fn a_statement_that_fails_in_a_text_of_two_undoes_both() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("create table undone (a int)").await;
    one.send(&text('Q', "insert into undone values (1); select 1 / 0"))
        .await;
    assert_eq!(answers(&mut one, 1).await, ["22012"]);
    assert_eq!(other.value("select count(*) from undone").await, "0");
    // A notice is its own client's, and COPY data behind an error is no request.
    let loud = "do $$ begin raise notice 'one'; end $$";
    one.send(&text('Q', loud)).await;
    assert!(one.until('Z').await.iter().any(|reply| reply.tag == 'N'));
    let data = message('d', b"broken\n").repeat(10_000);
    let copy = text('Q', "copy undone from stdin");
    one.send(&[copy, data, message('c', b"")].concat()).await;
    assert_eq!(answers(&mut one, 1).await, ["22P02"]);
    assert_eq!(other.tags_of("select 1").await, "TDCZ");
    assert_eq!(one.value("select 2").await, "2");
}

impl Wire {
    async fn tags_of(&mut self, sql: &str) -> String {
        self.send(&text('Q', sql)).await;
        self.tags().await
    }
}
