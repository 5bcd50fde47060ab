//! What only shows under weight: memory, leaks, idle cost. Takes minutes.
//!
//! ```text
//! cargo test --test soak                     all of it, one after another
//! cargo test --test soak -- churn idle       only these
//! cargo test --test soak -- visits --program PATH     of another build of the proxy
//! cargo test --test soak -- canary canary-transaction --seconds 600      for so long each (default: 60)
//! cargo test --test soak -- credentials --seconds 240     24 lifetimes of a credential (default: 6)
//! cargo test --test soak -- churn --pool-mode auto --seconds 3600        crowd after crowd for so long (default: one)
//! cargo test --test soak -- differential --programs 10000 --seed 2       so many of this sequence (default: 1)
//! cargo test --test soak -- differential --pool-mode auto --seconds 600   in this mode only
//! ```
//!
//! The proxy runs as a process of its own, since it is the process that is measured; the emulator runs in this one.
//! (`thousands`, `visits` and `probes` have a scripted server instead, whose sessions cost next to nothing.) Each scenario asserts
//! its bound and prints what it measured. What is only reported (`idle`, `calls`) depends on the machine, and its bounds
//! are wide.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a scenario fails by panicking and reports on standard output; it is no part of the program"
)]

mod attack;
mod canary;
mod churn;
mod credentials;
mod differential;
mod flood;
mod idle;
mod measure;
mod probes;
mod process;
#[path = "../differential/mod.rs"]
mod programs;
mod scripted;
mod secrets;
#[path = "../../benches/support/mod.rs"]
mod support;
mod volume;
mod wire;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use lakebase_proxy::emulator::{Emulator, EmulatorOptions, Settings};
use tokio::time::Instant;

use process::Process;

/// All that a scenario has: an emulator and a proxy of its own.
struct Stage {
    emulator: Emulator,
    proxy: Process,
    postgres: SocketAddr,
    http: SocketAddr,
}

impl Stage {
    async fn set(program: &Path, more: &[&str], settings: Settings) -> Self {
        let options = EmulatorOptions {
            settings,
            ..EmulatorOptions::default()
        };
        let emulator = Emulator::start(options).await.unwrap();
        let arguments = [
            "--port",
            "0",
            "--http-port",
            "0",
            "--max-connections",
            "2000",
        ];
        let arguments = [&arguments, more].concat();
        let proxy = Process::spawn(program, emulator.environment(), &arguments);
        let postgres = proxy.address("listening for Postgres clients").await;
        let http = proxy.address("serving health and metrics").await;
        // One client first: what is allocated once is there before anything is measured.
        wire::Wire::connect(postgres)
            .await
            .unwrap()
            .terminate()
            .await
            .unwrap();
        Self {
            emulator,
            proxy,
            postgres,
            http,
        }
    }

    /// Ends the proxy, which it does at once where no session is left.
    async fn strike(self) {
        let began = Instant::now();
        let (status, reply) = self.proxy.end().await;
        assert_eq!(status.code(), Some(143), "{reply}");
        assert!(
            reply.contains("complete=true"),
            "a session did not end:\n{reply}"
        );
        assert!(
            began.elapsed().as_secs() < 5,
            "it took {:?} to end without a session",
            began.elapsed()
        );
        self.emulator.stop().await;
    }
}

const SCENARIOS: [&str; 18] = [
    "copy-out",
    "copy-in",
    "value",
    "slow-reader",
    "volume-transaction",
    "churn",
    "canary",
    "canary-transaction",
    "credentials",
    "differential",
    "idle",
    "calls",
    "thousands",
    "visits",
    "probes",
    "secrets",
    "flood",
    "attack",
];

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, directory] = &arguments[..]
        && word == support::upstream::WORD
    {
        return support::upstream::serve(Path::new(directory));
    }
    let mut option = |name: &str| {
        let at = arguments.iter().position(|word| word == name)?;
        arguments.drain(at..arguments.len().min(at + 2)).nth(1)
    };
    let program: PathBuf = option("--program")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_lakebase-proxy").to_owned())
        .into();
    let seconds = option("--seconds").map(|seconds| seconds.parse().expect("a number of seconds"));
    let duration = Duration::from_secs(seconds.unwrap_or(60));
    let number = |value: String| value.parse().expect("a number");
    let pool_mode = option("--pool-mode");
    let programs = option("--programs").map(number);
    let seed = option("--seed").map_or(1, number);
    let requested: Vec<String> = arguments
        .into_iter()
        .filter(|name| !name.starts_with('-'))
        .collect();
    if let Some(unknown) = requested
        .iter()
        .find(|name| !SCENARIOS.contains(&name.as_str()))
    {
        println!(
            "no scenario `{unknown}`; there are: {}",
            SCENARIOS.join(" ")
        );
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for name in SCENARIOS {
        if !requested.is_empty() && !requested.iter().any(|wanted| wanted == name) {
            continue;
        }
        let began = Instant::now();
        println!("== {name} ({})", measure::load());
        runtime.block_on(async {
            match name {
                "thousands" => return scripted::thousands(&program).await,
                "visits" => return scripted::visits(&program).await,
                "probes" => return probes::beside_thousands(&program).await,
                "flood" => return flood::beside_logins(&program).await,
                "differential" => {
                    let deadline = programs.is_none().then(|| Instant::now() + duration);
                    let count = programs.unwrap_or(u64::MAX);
                    let modes = differential::modes(pool_mode.as_deref());
                    return differential::programs(&program, &modes, seed, count, deadline).await;
                }
                _ => {}
            }
            let more = match name {
                "canary" => canary::arguments("session"),
                "churn" => pool_mode
                    .as_deref()
                    .map_or_else(Vec::new, canary::arguments),
                "canary-transaction" | "volume-transaction" => canary::arguments("transaction"),
                "credentials" => credentials::arguments(pool_mode.as_deref().unwrap_or("auto")),
                _ => Vec::new(),
            };
            let settings = match name {
                "credentials" => credentials::settings(),
                _ => Settings::default(),
            };
            let stage = Stage::set(&program, &more, settings).await;
            match name {
                "copy-out" => volume::copy_out(&stage).await,
                "copy-in" => volume::copy_in(&stage).await,
                "value" => volume::one_value(&stage).await,
                "slow-reader" => volume::slow_reader(&stage).await,
                "volume-transaction" => volume::of_shared(&stage).await,
                "churn" => churn::churn(&stage, pool_mode.as_ref().map(|_| duration)).await,
                "canary" => canary::clients(&stage, duration, false).await,
                "canary-transaction" => canary::clients(&stage, duration, true).await,
                "credentials" => credentials::day(&stage, duration).await,
                "idle" => idle::sessions(&stage).await,
                "calls" => idle::calls(&stage).await,
                "secrets" => secrets::in_memory(&stage, &program).await,
                "attack" => attack::beside_logins(&stage).await,
                _ => unreachable!("listed above"),
            }
            stage.strike().await;
        });
        println!("   {:.1} s\n", began.elapsed().as_secs_f64());
    }
    ExitCode::SUCCESS
}
