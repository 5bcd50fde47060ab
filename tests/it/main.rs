//! One integration binary, a module by capability.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test's helpers fail by panicking, as tests do; clippy only exempts the tests themselves"
)]

mod admin;
mod credential;
mod discovery;
mod demo;
mod emulator;
mod harness;
mod notes;
mod postgres;
mod startup;
mod web;
