//! The rig: boots a real Xen in QEMU, with Debian's packages, and runs scenarios in it.
//!
//! One boot serves many scenarios. Everything runs under software emulation, so no hardware or KVM is needed; figures
//! about speed are therefore only ever ratios against Linux's own backend in the same run.

pub mod bench;
pub mod builds;
pub mod compare;
pub mod cpio;
pub mod demo;
pub mod dom0;
pub mod elf;
pub mod initramfs;
pub mod machine;
pub mod packages;
pub mod runner;
pub mod scenarios;
pub mod tools;
pub mod xen;
