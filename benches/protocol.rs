//! What is done for every message and every connection, measured alone: `cargo bench --bench protocol`.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark fails by panicking, as a test does"
)]

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use jiff::Timestamp;
use lakebase_proxy::{
    clock::Clock,
    credential::{CredentialCell, Minted},
    protocol::{
        error::Report,
        frame::Scanner,
        options::LoginParameters,
        startup::{InitialPacket, encode_startup, take_initial_packet},
    },
};

/// A relay's chunk of small data rows.
fn rows() -> Vec<u8> {
    let mut row = vec![b'D', 0, 0, 0, 68];
    row.resize(69, b'x');
    row.repeat(32 * 1024 / row.len())
}

fn scan(c: &mut Criterion) {
    let rows = rows();
    let mut group = c.benchmark_group("scan");
    group.throughput(Throughput::Bytes(rows.len() as u64));
    group.bench_function("32 KiB of 69-byte messages", |b| {
        let mut scanner = Scanner::new();
        b.iter(|| scanner.scan(black_box(&rows), |seen| _ = black_box(seen)));
    });
    group.finish();
}

fn startup(c: &mut Criterion) {
    let parameters = [
        ("user", "app"),
        ("database", "d"),
        ("application_name", "a b"),
        ("TimeZone", "UTC"),
    ];
    let packet = encode_startup(&parameters).expect("it is short");
    c.bench_function("startup message to upstream settings", |b| {
        b.iter(|| {
            let packet = take_initial_packet(&mut BytesMut::from(black_box(&packet[..])));
            let Ok(Some(InitialPacket::Startup(message))) = packet else {
                panic!("a startup message")
            };
            LoginParameters::new(&message, "d".to_owned())
        });
    });
}

fn credential(c: &mut Criterion) {
    let cell = CredentialCell::new(Clock::system());
    let expires_at = Some(Timestamp::MAX);
    cell.publish(
        Minted {
            secret: "token".to_owned().into(),
            expires_at,
        },
        0.0,
    );
    c.bench_function("read the credential", |b| {
        b.iter(|| black_box(cell.current()));
    });
}

fn refusal(c: &mut Criterion) {
    let report = Report::new("57P03", "asleep")
        .with_detail("the server's words")
        .with_hint("retry");
    c.bench_function("write a refusal", |b| {
        b.iter(|| black_box(&report).encode_fatal());
    });
}

criterion_group!(benches, scan, startup, credential, refusal);
criterion_main!(benches);
