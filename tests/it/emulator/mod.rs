//! The emulator follows Lakebase's rules, except for the scripted faults.

mod branches;
mod dialect;
mod edge;
mod faults;
mod lifecycle;
mod login;
mod proxied;
mod sleep;
mod workspace;
