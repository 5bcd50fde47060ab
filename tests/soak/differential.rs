//! Random programs through a pool do the same as on connections of their own: many more than the main tests run.

use std::{path::Path, sync::Arc};

use lakebase_proxy::emulator::{
    Emulator, EmulatorOptions, LocalPostgres, LocalPostgresOptions, PostgresSource,
};
use tokio::time::Instant;

use crate::{
    process::Process,
    programs::{Servers, run},
};

/// Modes of the pool.
const MODES: [&str; 3] = ["session", "transaction", "auto"];

/// All of them, or the one requested.
pub(crate) fn modes(requested: Option<&str>) -> Vec<&'static str> {
    let mut modes = MODES.to_vec();
    modes.retain(|mode| requested.is_none_or(|requested| requested == *mode));
    modes
}

/// An equal part of the programs in each mode.
pub(crate) async fn programs(
    program: &Path,
    modes: &[&str],
    seed: u64,
    count: u64,
    deadline: Option<Instant>,
) {
    let began = Instant::now();
    let deadline = deadline.map(|at| at.saturating_duration_since(began));
    let parts = u32::try_from(modes.len()).unwrap();
    for mode in modes {
        let server = LocalPostgres::start(LocalPostgresOptions::default());
        let server = Arc::new(server.await.unwrap());
        let options = EmulatorOptions {
            postgres: PostgresSource::Shared(Arc::clone(&server)),
            ..EmulatorOptions::default()
        };
        let emulator = Emulator::start(options).await.unwrap();
        let arguments = ["--port", "0", "--http-port", "none", "--pool-mode", mode];
        let size = ["--default-pool-size", "3", "--spare-pool-size", "0"];
        // New ones again and again, which the first client has to itself.
        let lifetime = ["--server-lifetime", "2s"];
        let arguments = [&arguments[..], &size, &lifetime].concat();
        let process = Process::spawn(program, emulator.environment(), &arguments);
        let servers = Servers {
            proxy: process.address("listening for Postgres clients").await,
            postgres: server.directory().join("s"),
            superuser: "databricks_control_plane",
            role: emulator.identities().app.name.clone(),
        };
        let count = count.div_ceil(parts.into());
        let deadline = deadline.map(|duration| Instant::now() + duration / parts);
        let began = Instant::now();
        let runs = run(servers, seed, count, deadline).await;
        println!(
            "   {mode}: {runs} programs without a difference in {:?}",
            began.elapsed()
        );
        process.end().await;
        emulator.stop().await;
    }
}
