//! Runs inside the rig's guests.
fn main() {}
