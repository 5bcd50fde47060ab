//! Hands the linker the order of functions in `order.ld`, and warns of a release build without its allocator.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=deploy/link/order.ld");
    let variable = |name| env::var(name).unwrap_or_default();
    let is_release = variable("PROFILE") == "release";
    let is_linux = variable("CARGO_CFG_TARGET_OS") == "linux";
    if is_release
        && is_linux
        && variable("CARGO_CFG_TARGET_ENV") == "gnu"
        && variable("CARGO_FEATURE_JEMALLOC").is_empty()
    {
        println!(
            "cargo:warning=without --features jemalloc, memory of ended sessions is neither overwritten nor returned soon: `cargo build-release` has it"
        );
    }
    // Linkers of one's own choice may know no such scripts; the program is the same without it, only larger in memory.
    let linker_chosen = variable("CARGO_ENCODED_RUSTFLAGS").contains("fuse-ld");
    if is_release && is_linux && !linker_chosen {
        println!(
            "cargo:rustc-link-arg-bin=lakebase-proxy=-Wl,-T,{}/deploy/link/order.ld",
            variable("CARGO_MANIFEST_DIR")
        );
    }
}
