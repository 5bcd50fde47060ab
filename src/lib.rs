//! lakebase-proxy: any Postgres client reaches Databricks Lakebase on localhost, with no password and no token code.
//!
//! # The way of a connection
//!
//! ```text
//!  app ──plain Postgres──▶ listener ─▶ session ────────────────────────────▶ endpoint
//!                  (TCP, Unix, TLS)     handshake   who is asking, for what      ▲
//!                                       login ──▶ upstream  dial, TLS, log in ───┤
//!                                       relay       bytes both ways ─────────────┘
//!                                       cancel      key of ours ▶ key of theirs
//!                                          │
//!  workspace API ◀── Mint ── refresher ─▶ cell (ArcSwap, read without a lock)
//! ```
//!
//! # The rooms
//!
//! | room | owns |
//! |---|---|
//! | [`app`] | the composition root: `build` binds everything, `run` drives it |
//! | [`cli`], [`config`] | flag > environment > file > default, resolved once |
//! | [`listener`] | TCP, Unix and inherited sockets, bounded handshakes, accept errors that back off |
//! | [`session`] | one client from accept to close |
//! | [`net`] | sockets of clients and servers |
//! | [`upstream`] | reaching the endpoint: dial, TLS, login, failure classes, holding while it wakes |
//! | [`credential`] | the life of the database credential |
//! | [`workspace`] | everything said to the Databricks workspace over HTTPS |
//! | [`protocol`] | the Postgres wire protocol without I/O; the only room that knows `pgwire` |
//! | [`telemetry`] | logs and metrics; a leaf that all may use |
//! | [`net::http`] | what our HTTP servers share: bounds, and the guard against other origins' pages |
//! | [`doctor`] | each step from the settings to `SELECT 1`, checked alone, with its mend |
//! | [`admin`] | health, metrics and the status page over HTTP |
//! | [`console`] | `SHOW CLIENTS` and its kin, for psql |
//! | [`status`] | the registry of sessions; recent refusals and wakes |
//! | [`exec`] | the proxy as the parent of one program |
//! | [`systemd`] | what a service manager is told |
//! | `notes` | the notes page: a client of our own listener |
//! | `emulator` | a Lakebase for one machine; the proxy never imports it |
//!
//! Arrows go downwards only; `credential` knows the workspace through the trait [`credential::Mint`] alone.

pub mod admin;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod console;
pub mod credential;
pub mod doctor;
#[cfg(feature = "demo")]
pub mod emulator;
pub mod exec;
pub mod listener;
pub mod net;
#[cfg(feature = "notes")]
pub mod notes;
pub mod protocol;
pub mod session;
pub mod shutdown;
pub mod status;
pub mod systemd;
pub mod telemetry;
pub mod upstream;
pub mod workspace;
