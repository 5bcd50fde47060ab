//! Hands the linker the order of functions in `order.ld`.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=deploy/link/order.ld");
    let variable = |name| env::var(name).unwrap_or_default();
    // Linkers of one's own choice may know no such scripts; the program is the same without it, only larger in memory.
    let linker_chosen = variable("CARGO_ENCODED_RUSTFLAGS").contains("fuse-ld");
    if variable("PROFILE") == "release"
        && variable("CARGO_CFG_TARGET_OS") == "linux"
        && !linker_chosen
    {
        println!(
            "cargo:rustc-link-arg-bin=lakebase-proxy=-Wl,-T,{}/deploy/link/order.ld",
            variable("CARGO_MANIFEST_DIR")
        );
    }
}
