//! What all of our HTTP servers have in common: bounds, and a guard against pages of other origins.
//!
//! Knows nothing of what is served.

mod guard;
mod server;

pub use server::{Limits, Visitor, serve};
