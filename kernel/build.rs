//! Link arguments of the image: no C start-up, no C library, our own layout.

fn main() {
    let script = format!("{}/../linker.ld", std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    println!("cargo:rerun-if-changed={script}");
    for file in ["entry.s", "traps.s", "memops.s"] {
        println!("cargo:rerun-if-changed=../boot/{file}");
    }
    // A hosted target links through the C compiler, a bare one calls the linker itself.
    let hosted = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os != "none");
    if hosted {
        for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
            println!("cargo:rustc-link-arg-bins={arg}");
        }
    }
    for arg in [
        format!("-T{script}"),
        "--gc-sections".into(),
        "-zmax-page-size=0x1000".into(),
        "-znoexecstack".into(),
        "--build-id=none".into(),
    ] {
        println!("cargo:rustc-link-arg-bins={}{arg}", if hosted { "-Wl," } else { "" });
    }
}
