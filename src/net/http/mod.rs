//! What all of our HTTP servers have in common: bounds, and a guard against pages of other origins.
//!
//! Knows nothing of what is served.

mod guard;
mod server;

pub use guard::{check_intent, is_from_this_machine, is_led_from_another_site};
pub use server::{Limits, serve};
