//! The emulator follows Lakebase's rules, except for the scripted faults.

mod branches;
mod edge;
mod faults;
mod lifecycle;
mod login;
mod proxied;
mod sleep;
mod workspace;
