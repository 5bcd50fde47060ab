//! Network code that client and server connections share.

pub(crate) mod bulk;
pub mod socket;
