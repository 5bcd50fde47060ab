//! lakebase-proxy: any Postgres client reaches Databricks Lakebase on localhost, with no password and no token code.
//!
//! # A connection
//!
//! ```text
//!  app ──plain Postgres──▶ listener ─▶ session ─────────────────────────────▶ endpoint
//!                  (TCP, Unix)          handshake   TLS, startup message         ▲
//!                                       access      uid, password, limits        │
//!                                       connect ─▶ upstream  dial, TLS, login ───┤
//!                                       relay       bytes both ways ─────────────┘
//!                                       cancel      our key ▶ the server's key
//!                                          │
//!  workspace API ◀── Mint ── refresher ─▶ cell (ArcSwap, read without a lock)
//! ```
//!
//! # Layers
//!
//! Imports go downwards only: `tests/it/layers.rs` reads every source file and fails on an import upwards or in a cycle.
//!
//! | layer | module | owns |
//! |---|---|---|
//! | 1 | `cli` | the command line, one file per subcommand |
//! | 2 | `app` | the composition root: build, run, reload, shut down |
//! | 3 | `listener` | TCP, Unix and inherited sockets; the runtimes of sessions |
//! | | `admin` | health, metrics and the status page over HTTP |
//! | | `console` | SHOW commands over the Postgres protocol |
//! | | `notes` | the notes page, a client of our own listener |
//! | | `exec` | the parent process of an application |
//! | | `doctor` | diagnosis of each step from the settings to `SELECT 1` |
//! | 4 | `session` | one client from accept to close |
//! | 5 | `pool` | server connections that clients share one after the other |
//! | 6 | `upstream` | the route to the endpoint: connect, TLS, login, failure classes |
//! | 7 | `credential` | the lifetime of the database credential |
//! | 8 | `workspace` | the REST API of the Databricks workspace |
//! | 9 | `status` | the registry of sessions, health, and the snapshot that admin and console render |
//! | 10 | `net` | sockets, TLS configuration, backoff, files, the HTTP server |
//! | | `protocol` | the Postgres wire protocol without I/O |
//! | | `telemetry` | logs, metrics, redaction |
//! | | `systemd` | notifications to the service manager |
//! | 11 | `config` | settings, each declared once |
//! | | `clock`, `shutdown` | time, and the phases of the shutdown |
//!
//! What differs between systems has one module for each thing, with a twin for the others: `net::unix`, `listener::unix`,
//! `shutdown`, `exec`, `systemd`, and small ones named `system` in the file of their users.
//!
//! The limits of clients, in the order in which a client meets them:
//!
//! | limit | enforced by | size |
//! |---|---|---|
//! | handshakes per endpoint | `session::handshake_limit`, taken by `listener` before a client is served | an eighth of the descriptor limit |
//! | connections of the process | `status::Registry::enter`, called by `session::connect` | `max_connections` |
//! | logins per endpoint | `upstream::connect`; one at a time while the endpoint wakes (`upstream::wake`) | 32 |
//!
//! Besides, `emulator` stands in for the workspace, the edge and Postgres; it imports only leaves of the proxy.
//!
//! # Glossary
//!
//! | term | meaning |
//! |---|---|
//! | client | a connection from the application to the proxy |
//! | server (connection) | a logged-in connection from the proxy to the endpoint |
//! | upstream | everything on the far side of the proxy: the endpoint, its edge, its Postgres |
//! | session | one client from accept to close |
//! | handshake | from accept to the end of the access checks: client TLS, startup message, local password |
//! | login | the exchange with the server up to ReadyForQuery |
//! | relay | copying bytes between a client and a server |
//! | endpoint | a Lakebase compute, and the host that it answers on |
//! | edge | what answers on the endpoint's port 5432 in front of Postgres |
//! | workspace | the Databricks workspace and its REST API; a workspace token authenticates to it |
//! | credential | a token that the server accepts as password, with its expiry; to mint one is to request it from the workspace |
//! | cell | holds the current credential; read without a lock |
//! | refresher | the task that mints credentials and is the only writer of the cell |
//! | generation | the number of a credential in its cell; a rejection names it, so that one refresh serves all |
//! | forced refresh | a refresh because the endpoint rejected the credential |
//! | waking | the endpoint does not answer yet; one client's attempts lead and the others wait for their result |
//! | route | where the sessions of an endpoint find it: known, being looked up, or why it cannot be found |
//! | registry | the sessions of the process, one entry each |
//! | snapshot | the state of the proxy as plain values, for display |

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
pub mod pool;
pub mod protocol;
pub mod session;
pub mod shutdown;
pub mod status;
pub mod systemd;
pub mod telemetry;
pub mod upstream;
pub mod workspace;
