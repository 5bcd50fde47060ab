//! One integration binary, a module by capability. They need the emulator's own Postgres, which Windows does not have.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helpers fail by panicking, as tests do; clippy only exempts the tests themselves"
)]

mod admin;
mod auth;
mod auth_network;
#[cfg(target_os = "linux")]
mod auth_production;
mod cancel;
#[path = "../cli/mod.rs"]
mod cli;
mod client_tls;
mod console;
mod credential;
mod demo;
#[path = "../differential/mod.rs"]
mod differential;
mod discovery;
mod doctor;
mod drain;
mod emulator;
mod endpoints;
mod exec;
mod failures;
mod guides;
mod harness;
mod health;
mod isolation;
mod layers;
mod lexer;
mod lifecycle;
mod limits;
mod listeners;
mod local_auth;
mod login;
mod logs;
mod metrics;
mod notes;
mod origins;
mod outage;
mod pg_isready;
mod pool;
mod postgres;
#[path = "../soak/process.rs"]
mod process;
mod reference;
mod refresh;
mod relay;
mod reload;
mod replication;
mod requests;
mod secrecy;
mod shutdown;
mod startup;
mod systemd;
mod unix_socket;
mod web;
