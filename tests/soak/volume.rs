//! Large things pass in constant memory, and at the pace of their reader.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    Stage,
    measure::{metric, status},
    wire::{Wire, message, query},
};

/// The promise: no transfer takes the process beyond this.
const PEAK_LIMIT_KB: u64 = 64 * 1024;
const GIGABYTE: usize = 1 << 30;
/// Characters of a row; with its line break a power of two.
const ROW: usize = 1023;
const ROWS: usize = GIGABYTE / (ROW + 1);
/// Postgres refuses values of a gigabyte.
const VALUE: usize = 900 << 20;

pub(crate) async fn copy_out(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    let began = Instant::now();
    let sql = format!("COPY (SELECT repeat('x', {ROW}) FROM generate_series(1, {ROWS})) TO STDOUT");
    client.send(&query(&sql)).await.unwrap();
    let (mut rows, mut wrong) = (0, 0);
    loop {
        let (tag, length) = client.header().await.unwrap();
        match tag {
            b'd' => {
                rows += 1;
                let mut xs = 0;
                let count = |piece: &[u8]| xs += xs_in(piece);
                client.pieces(length, count).await.unwrap();
                wrong += usize::from(length != ROW + 1 || xs != ROW);
            }
            b'Z' => {
                client.body(length).await.unwrap();
                break;
            }
            b'H' | b'c' | b'C' => drop(client.body(length).await.unwrap()),
            other => panic!("message type {:?}", char::from(other)),
        }
    }
    assert_eq!((rows, wrong), (ROWS, 0));
    client.terminate().await.unwrap();
    report(stage, GIGABYTE, began);
}

pub(crate) async fn copy_in(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    client
        .query("CREATE TEMP TABLE sink (line text)")
        .await
        .unwrap()
        .unwrap();
    let began = Instant::now();
    // Only a line of another length is stored, so that the server reads everything and nothing fills the disk.
    let sql = format!("COPY sink FROM STDIN WHERE length(line) <> {ROW}");
    client.send(&query(&sql)).await.unwrap();
    let (tag, length) = client.header().await.unwrap();
    assert_eq!(tag, b'G');
    client.body(length).await.unwrap();
    let line = [&vec![b'x'; ROW][..], b"\n"].concat();
    let block = message(b'd', &line.repeat(64));
    for _ in 0..ROWS / 64 {
        client.send(&block).await.unwrap();
    }
    client
        .send(&message(b'd', b"the last line\n"))
        .await
        .unwrap();
    client.send(&message(b'c', b"")).await.unwrap();
    let (tag, length) = client.header().await.unwrap();
    let body = client.body(length).await.unwrap();
    assert_eq!((tag, &body[..]), (b'C', &b"COPY 1\0"[..]), "{body:?}");
    let (_, length) = client.header().await.unwrap();
    client.body(length).await.unwrap();
    client.terminate().await.unwrap();
    report(stage, GIGABYTE, began);
}

pub(crate) async fn one_value(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    let began = Instant::now();
    client
        .send(&query(&format!("SELECT repeat('x', {VALUE})")))
        .await
        .unwrap();
    let mut xs = 0;
    loop {
        let (tag, length) = client.header().await.unwrap();
        match tag {
            b'D' => {
                assert_eq!(length, VALUE + 6, "one field, whole");
                let count = |piece: &[u8]| xs += xs_in(piece);
                client.pieces(length, count).await.unwrap();
            }
            b'Z' => break client.body(length).await.map(drop).unwrap(),
            b'T' | b'C' => drop(client.body(length).await.unwrap()),
            other => panic!("message type {:?}", char::from(other)),
        }
    }
    // The field's own length, six bytes with the number of fields, holds none.
    assert_eq!(xs, VALUE);
    client.terminate().await.unwrap();
    report(stage, VALUE, began);
}

/// Through a pool whose connections clients share.
pub(crate) async fn of_shared(stage: &Stage) {
    copy_out(stage).await;
    copy_in(stage).await;
    one_value(stage).await;
    value_in(stage).await;
}

/// A parameter that no buffer should hold as a whole.
async fn value_in(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    let began = Instant::now();
    let parse = message(b'P', b"\0select octet_length($1::bytea)\0\0\0");
    client.send(&parse).await.unwrap();
    // As binary.
    let head = [
        &b"\0\0\0\x01\0\x01\0\x01"[..],
        &u32::try_from(VALUE).unwrap().to_be_bytes(),
    ]
    .concat();
    let length = u32::try_from(4 + head.len() + VALUE + 2).unwrap();
    let bind = [&b"B"[..], &length.to_be_bytes(), &head].concat();
    client.send(&bind).await.unwrap();
    let block = vec![b'x'; 1 << 20];
    for _ in 0..VALUE >> 20 {
        client.send(&block).await.unwrap();
    }
    client
        .send(b"\0\0E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04")
        .await
        .unwrap();
    let mut tags = Vec::new();
    while tags.last() != Some(&b'Z') {
        let (tag, length) = client.header().await.unwrap();
        let body = client.body(length).await.unwrap();
        if tag == b'D' {
            assert_eq!(&body[6..], VALUE.to_string().as_bytes());
        }
        tags.push(tag);
    }
    assert_eq!(tags, b"12DCZ");
    client.terminate().await.unwrap();
    report(stage, VALUE, began);
}

pub(crate) async fn slow_reader(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    let sql = format!("COPY (SELECT repeat('x', {ROW}) FROM generate_series(1, {ROWS})) TO STDOUT");
    client.send(&query(&sql)).await.unwrap();
    let (_, length) = client.header().await.unwrap();
    client.body(length).await.unwrap();

    // Nothing is read: what has been passed on must come to a halt, held up by full buffers of the kernel's alone.
    let mut passed = relayed(stage).await;
    let halted = Instant::now() + Duration::from_secs(30);
    loop {
        sleep(Duration::from_millis(500)).await;
        let now = relayed(stage).await;
        if now.to_bits() == passed.to_bits() {
            break;
        }
        assert!(
            Instant::now() < halted,
            "the sender is not slowed: {now} bytes"
        );
        passed = now;
    }
    assert!(
        passed < 64.0 * 1024.0 * 1024.0,
        "{passed} bytes went somewhere"
    );
    println!(
        "   unread: the sender stood still after {:.1} MiB",
        passed / 1_048_576.0
    );

    // Read on at some 10 MiB a second.
    let before = status(stage.proxy.id(), "VmRSS");
    let (mut highest, mut read) = (before, 0);
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        for _ in 0..512 {
            let (tag, length) = client.header().await.unwrap();
            assert_eq!(tag, b'd');
            client.pieces(length, |_| {}).await.unwrap();
            read += length;
        }
        sleep(Duration::from_millis(50)).await;
        highest = highest.max(status(stage.proxy.id(), "VmRSS"));
    }
    let ahead = relayed(stage).await - f64::from(u32::try_from(read).unwrap());
    println!(
        "   slow: {} MiB read; the sender at most {:.1} MiB ahead; resident {before} kB, at most {highest} kB",
        read >> 20,
        ahead / 1_048_576.0
    );
    assert!(
        highest < before + 4096,
        "memory grew with a slow reader: {before} to {highest} kB"
    );
    client.reset();
    peak(stage);
}

fn xs_in(piece: &[u8]) -> usize {
    piece.iter().map(|&byte| usize::from(byte == b'x')).sum()
}

/// Bytes passed on to clients.
async fn relayed(stage: &Stage) -> f64 {
    metric(stage.http, "relay_bytes_total").await
}

fn report(stage: &Stage, bytes: usize, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    let mib = f64::from(u32::try_from(bytes >> 20).unwrap());
    println!("   {mib} MiB in {seconds:.1} s: {:.0} MiB/s", mib / seconds);
    peak(stage);
}

fn peak(stage: &Stage) {
    let (peak, now) = (
        status(stage.proxy.id(), "VmHWM"),
        status(stage.proxy.id(), "VmRSS"),
    );
    println!("   proxy's memory: peak {peak} kB, now {now} kB");
    assert!(peak < PEAK_LIMIT_KB, "peak memory {peak} kB");
}
