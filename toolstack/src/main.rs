//! `xl-pciback`, dom0's side of pciback-stubdom.
fn main() {}
