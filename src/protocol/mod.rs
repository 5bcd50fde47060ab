//! The Postgres wire protocol, without I/O: bytes in, values out, and back.
//!
//! The only room that knows `pgwire`. Its encoders build what we originate; whatever is read from a socket is parsed by
//! our own readers first, because `pgwire`'s decoders may panic on short bodies and rewrite names that are not UTF-8.
//! Follows "Frontend/Backend Protocol" of the PostgreSQL documentation.

pub mod auth;
pub mod backend;
pub mod error;
pub mod frame;
pub mod options;
pub mod progress;
pub mod rows;
pub mod scram;
pub mod startup;
