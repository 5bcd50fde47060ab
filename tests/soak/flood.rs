//! Logins beside a flood of failing handshakes: silent clients, and wrong passwords.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lakebase_proxy::emulator::{Emulator, EmulatorOptions};
use tokio::{
    io::AsyncReadExt,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    process::Process,
    wire::{Wire, message, startup},
};

/// Clients that connect again as soon as they are refused, and send nothing.
const SILENT: usize = 2000;
/// Clients that connect again as soon as they are refused, and send a wrong password.
const GUESSERS: usize = 1500;
const PASSWORD: &str = "sesame";
/// The flood has filled all queues by then.
const RUN_UP: Duration = Duration::from_secs(4);
const LOGINS: usize = 5;
/// What a login beside the flood may take.
const PROMPT: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_mins(1);

/// Connects, sends nothing, and waits for the end.
async fn silent(address: SocketAddr) -> io::Result<()> {
    let mut wire = Wire::open(address).await?;
    while wire.stream.read(&mut [0; 512]).await? > 0 {}
    Ok(())
}

/// A SCRAM exchange with a proof made of zeros: a wrong password that costs the client no PBKDF2.
async fn guess(address: SocketAddr) -> io::Result<()> {
    let mut wire = Wire::open(address).await?;
    wire.send(&startup()).await?;
    let (_, length) = wire.header().await?;
    wire.body(length).await?;
    let first = b"n,,n=,r=abcdefghijklmnopqrstuvwx";
    let length = u32::try_from(first.len()).unwrap().to_be_bytes();
    let body = [&b"SCRAM-SHA-256\0"[..], &length, first].concat();
    wire.send(&message(b'p', &body)).await?;
    let (tag, length) = wire.header().await?;
    let answer = wire.body(length).await?;
    if tag != b'R' {
        return Ok(());
    }
    let answer = String::from_utf8_lossy(&answer[4..]).into_owned();
    let nonce = answer.split(',').next().unwrap_or_default();
    let last = format!("c=biws,{nonce},p={}=", "A".repeat(43));
    wire.send(&message(b'p', last.as_bytes())).await?;
    while wire.stream.read(&mut [0; 512]).await? > 0 {}
    Ok(())
}

/// Clients that repeat an attempt until the set is dropped; the counter is that of the attempts.
fn flood<F>(
    clients: usize,
    attempt: impl Fn() -> F + Clone + Send + 'static,
) -> (JoinSet<()>, Arc<AtomicU64>)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let (mut tasks, attempts) = (JoinSet::new(), Arc::new(AtomicU64::new(0)));
    for _ in 0..clients {
        let (attempt, attempts) = (attempt.clone(), Arc::clone(&attempts));
        tasks.spawn(async move {
            loop {
                let _ = attempt().await;
                attempts.fetch_add(1, Ordering::Relaxed);
                // Not a busy loop where the connection is refused.
                sleep(Duration::from_millis(1)).await;
            }
        });
    }
    (tasks, attempts)
}

/// The longest and the mean time of some logins, one after another.
async fn logins(postgres: SocketAddr, what: &str) -> Duration {
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(postgres.port())
        .user("anyone")
        .password(PASSWORD);
    let mut took = Vec::with_capacity(LOGINS);
    for _ in 0..LOGINS {
        let began = Instant::now();
        let login = timeout(TIMEOUT, config.connect(tokio_postgres::NoTls)).await;
        let (client, connection) = login.expect("a login in time").unwrap();
        took.push(began.elapsed());
        drop((client, connection));
    }
    took.sort();
    let (median, longest) = (took[LOGINS / 2], took[LOGINS - 1]);
    println!("   a login {what}: median {median:?}, longest {longest:?}");
    longest
}

pub(crate) async fn beside_logins(program: &Path) {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(PASSWORD.as_bytes()).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let base = ["--port", "0", "--http-port", "none"];
    let with_password = [&base[..], &["--local-password-file", &path]].concat();

    for (clients, what, flags) in [
        (SILENT, "silent clients", &base[..]),
        (GUESSERS, "wrong passwords", &with_password),
    ] {
        let proxy = Process::spawn(program, emulator.environment(), flags);
        let postgres = proxy.address("listening for Postgres clients").await;
        logins(postgres, "alone").await;
        let (tasks, attempts) = if clients == SILENT {
            flood(clients, move || silent(postgres))
        } else {
            flood(clients, move || guess(postgres))
        };
        sleep(RUN_UP).await;
        let (began, before) = (Instant::now(), attempts.load(Ordering::Relaxed));
        let longest = logins(postgres, &format!("beside {clients} {what}")).await;
        let refused = attempts.load(Ordering::Relaxed) - before;
        println!("   {refused} of them refused in {:?}", began.elapsed());
        assert!(longest < PROMPT, "a login takes {longest:?}");
        drop(tasks);
        let (status, reply) = proxy.end().await;
        assert_eq!(status.code(), Some(143), "{reply}");
    }
    emulator.stop().await;
}
