//! What measuring needs besides the proxy: a scripted server in a process of its own, a client that costs next to
//! nothing, and the kernel's measurements of a process.
#![allow(
    dead_code,
    reason = "each program that includes this uses a part of it"
)]

pub(crate) mod client;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod upstream;
