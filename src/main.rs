//! The `lakebase-proxy` binary.
fn main() {}
