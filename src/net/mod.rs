//! What sockets have in common: connect, keepalive, TLS configuration, backoff, whole messages, bulk transfer.
//!
//! Knows nothing of sessions, endpoints or credentials.

pub(crate) mod backoff;
pub(crate) mod bulk;
pub mod descriptors;
pub(crate) mod file;
pub mod http;
pub(crate) mod message;
pub mod socket;
pub(crate) mod tcp;
pub mod tls;
pub mod unix;
pub(crate) mod watch;

pub(crate) use self::{file::blocking, watch::FileWatch};
