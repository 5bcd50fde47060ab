//! The emulator follows Lakebase's rules, except for the scripted faults.

mod edge;
mod faults;
mod lifecycle;
mod login;
mod sleep;
mod workspace;
