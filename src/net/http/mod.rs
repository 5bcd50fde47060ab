//! The HTTP server for the admin surface and the notes page: limits, and a guard against pages of other origins; and requests
//! to a running proxy.

pub(crate) mod client;
mod guard;
mod server;

pub use guard::{check_intent, is_from_this_machine, is_led_from_another_site, is_on_loopback};
pub use server::{Limits, serve};
