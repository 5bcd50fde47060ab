//! The emulator keeps Lakebase's rules, and does wrong what it is asked to do wrong.

mod edge;
mod faults;
mod lifecycle;
mod login;
mod sleep;
mod workspace;
