//! What all of our HTTP servers have in common: bounds, and a guard against pages of other origins.
//!
//! Knows nothing of what is served.

mod guard;
mod server;

pub use guard::is_from_this_machine;
pub use server::{Limits, serve};
