//! The Postgres wire protocol without I/O: bytes in, values out, and back.
//!
//! Every message has one encoder: `postgres-protocol`'s towards the server, `pgwire`'s towards a client. What arrives from a
//! socket is parsed by the readers here first, because pgwire's decoders can panic on short bodies and replace names that
//! are not UTF-8. Knows nothing of sessions or endpoints. Follows "Frontend/Backend Protocol" of the PostgreSQL
//! documentation.

pub mod auth;
pub(crate) mod backend;
pub mod error;
pub mod frame;
pub mod lexer;
pub mod options;
pub(crate) mod reported;
pub mod requests;
pub(crate) mod rows;
pub mod scram;
pub mod startup;
pub mod tag;
pub(crate) mod traces;
pub mod words;
