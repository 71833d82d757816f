//! `cargo xtask`: the project's one entry point.
fn main() {}
