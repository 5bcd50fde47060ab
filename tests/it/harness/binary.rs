//! The program itself, as an operator starts it.

use std::{net::SocketAddr, process::Stdio};

use lakebase_proxy::emulator::Emulator;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

use super::within;
use crate::process::{Signal, signal};

/// A running program; killed when dropped.
pub(crate) struct Binary {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    /// What it has logged so far.
    pub(crate) lines: Vec<Value>,
    pub(crate) postgres: SocketAddr,
    pub(crate) http: SocketAddr,
}

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_lakebase-proxy");

/// The program with nothing of this process's environment that it would read.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if ["PG", "DATABRICKS_", "LAKEBASE_", "ENDPOINT_NAME"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .env("PATH", super::path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

impl Binary {
    /// `serve` in front of `emulator` on any free ports; it holds a credential when this returns.
    pub(crate) async fn serve(emulator: &Emulator, flags: &[&str]) -> Self {
        Self::serve_with(emulator, flags, &[]).await
    }

    /// The same with variables.
    pub(crate) async fn serve_with(
        emulator: &Emulator,
        flags: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut base = vec!["serve", "--structured-logs"];
        if !flags.contains(&"--port") {
            base.extend(["--port", "0"]);
        }
        if !flags.contains(&"--http-port") {
            base.extend(["--http-port", "0"]);
        }
        let mut child = command(&base)
            .args(flags)
            .envs(emulator.environment())
            .envs(variables.iter().copied())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut binary = Self {
            child,
            log,
            lines: Vec::new(),
            postgres: unknown,
            http: unknown,
        };
        let address = |line: &Value| line["address"].as_str().unwrap().parse().unwrap();
        // The two come in either order.
        let mut wanted = vec![
            "serving health and metrics",
            "database credential obtained",
            "listening for Postgres clients",
        ];
        while !wanted.is_empty() {
            let line = binary.line().await.expect("it starts");
            let message = line["message"].as_str().unwrap_or_default();
            wanted.retain(|wanted| *wanted != message);
            match message {
                "listening for Postgres clients" if line["socket"].is_null() => {
                    binary.postgres = address(&line);
                }
                "serving health and metrics" => binary.http = address(&line),
                _ => {}
            }
        }
        binary
    }

    /// The next line it logs.
    async fn line(&mut self) -> Option<Value> {
        let line = within("a line of the log", self.log.next_line())
            .await
            .unwrap()?;
        let line: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}"));
        self.lines.push(line.clone());
        Some(line)
    }

    /// This message, from what it has logged so far or will.
    pub(crate) async fn find(&mut self, message: &str) -> Value {
        let is_it = |line: &&Value| {
            line["message"]
                .as_str()
                .is_some_and(|reply| reply.contains(message))
        };
        match self.lines.iter().find(is_it) {
            Some(line) => line.clone(),
            None => self.until(message).await,
        }
    }

    /// Reads the log up to this message.
    pub(crate) async fn until(&mut self, message: &str) -> Value {
        loop {
            let line = self
                .line()
                .await
                .unwrap_or_else(|| panic!("it ended without logging: {message}"));
            if line["message"]
                .as_str()
                .is_some_and(|reply| reply.contains(message))
            {
                return line;
            }
        }
    }

    /// The line with this message, logged already or next.
    pub(crate) async fn logged(&mut self, message: &str) -> Value {
        let reply = |line: &&Value| line["message"] == message;
        match self.lines.iter().find(reply) {
            Some(line) => line.clone(),
            None => self.until(message).await,
        }
    }

    /// Its process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    pub(crate) fn signal(&self, requested: Signal) {
        signal(self.process(), requested);
    }

    /// Waits for the end without reading the log, and returns the exit code.
    pub(crate) async fn unread_exit_code(mut self) -> Option<i32> {
        within("the program ends", self.child.wait())
            .await
            .unwrap()
            .code()
    }

    /// Waits for the end and returns the exit code.
    pub(crate) async fn exit_code(mut self) -> Option<i32> {
        while self.line().await.is_some() {}
        within("the program ends", self.child.wait())
            .await
            .unwrap()
            .code()
    }
}
