//! What several capabilities' tests stand on.

pub(crate) mod emulator;
