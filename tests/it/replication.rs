//! The replication protocol passes as any other, with nothing of ours slipped in.

use crate::harness::{
    self, Proxy, backends, eventually, superuser,
    wire::{Reply, Wire, message, text},
};

async fn may_replicate(role: &str) {
    let statement = format!("alter role \"{role}\" replication");
    superuser().await.batch_execute(&statement).await.unwrap();
}

async fn walsender(proxy: &Proxy) -> Wire {
    let mut wire = proxy.dial().await;
    // An encoding would be set by a SET, which a walsender refuses.
    wire.startup(&[
        ("user", "anyone"),
        ("replication", "true"),
        ("client_encoding", "LATIN1"),
    ])
    .await;
    wire.welcome().await;
    wire
}

#[tokio::test]
async fn replication_passes_and_the_servers_answer_is_shown() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("replication", "database")])
        .await;
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "42501", "{refusal:?}");
    // In the words of Postgres 15, and of later ones.
    let reply = ["superuser or replication role", "start WAL sender"];
    assert!(
        reply.iter().any(|words| refusal.message.contains(words)),
        "{refusal:?}"
    );

    may_replicate(&emulator.identities().app.name).await;
    let mut wire = proxy.dial().await;
    // A plain walsender takes no SQL, so that nothing of ours may be slipped in.
    wire.startup(&[
        ("user", "anyone"),
        ("replication", "true"),
        ("client_encoding", "LATIN1"),
    ])
    .await;
    wire.welcome().await;
    wire.send(&text('Q', "IDENTIFY_SYSTEM")).await;
    assert_eq!(wire.tags().await, "TDCZ");
}

#[tokio::test]
async fn the_log_streams_both_ways_until_either_side_ends_it() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let role = emulator.identities().app.name.clone();
    may_replicate(&role).await;
    let mut wire = walsender(&proxy).await;
    wire.send(&text('Q', "IDENTIFY_SYSTEM")).await;
    let system = wire.until('Z').await;
    let columns = columns(&system[1]);
    let position = &columns[2];

    wire.send(&text(
        'Q',
        &format!(
            "START_REPLICATION PHYSICAL {position} TIMELINE {}",
            columns[1]
        ),
    ))
    .await;
    assert_eq!(wire.next().await.tag, 'W');
    // Whatever is written from here on comes by itself.
    proxy
        .client()
        .await
        .batch_execute("select pg_current_xact_id()")
        .await
        .unwrap();
    superuser()
        .await
        .batch_execute("select pg_logical_emit_message(false, 'proxy', repeat('in the log', 1000))")
        .await
        .unwrap();
    let mut log = Vec::new();
    while !log.windows(10).any(|window| window == b"in the log") {
        let reply = wire.next().await;
        assert_eq!(reply.tag, 'd');
        if reply.body[0] == b'w' {
            log.extend_from_slice(&reply.body[25..]);
        }
    }
    // A status update that requests an answer gets one.
    let mut status = vec![b'r'];
    status.extend_from_slice(&[0; 32]);
    status.push(1);
    wire.send(&message('d', &status)).await;
    while wire.next().await.body[0] != b'k' {}
    // The client ends the stream, not the session.
    wire.send(&message('c', b"")).await;
    let end = wire.until('Z').await;
    assert!(end.iter().any(|reply| reply.tag == 'c'), "{end:?}");
    wire.send(&text('Q', "IDENTIFY_SYSTEM")).await;
    assert_eq!(wire.tags().await, "TDCZ");

    // The client dies in the middle of the stream.
    wire.send(&text(
        'Q',
        &format!("START_REPLICATION PHYSICAL {position}"),
    ))
    .await;
    assert_eq!(wire.next().await.tag, 'W');
    wire.reset();
    let superuser = superuser().await;
    eventually("the walsender ends", async || {
        (backends(&superuser, &role).await == 0).then_some(())
    })
    .await;
    proxy.until_quiet().await;
}

/// A DataRow's columns, as text.
fn columns(row: &Reply) -> Vec<String> {
    use bytes::Buf;

    let mut body = row.body.clone();
    (0..body.get_u16())
        .map(|_| {
            let length = usize::try_from(body.get_i32()).unwrap_or_default();
            String::from_utf8(body.split_to(length).to_vec()).unwrap()
        })
        .collect()
}
