//! The guest side of Xen, for a one-vCPU PVH domain that runs with interrupts off.
//!
//! This crate and the image's boot code are the only places with `unsafe`. Each module wraps one
//! interface of `xen/include/public` in types that can't be misused; structures are asserted at
//! compile time here and compared with the C headers by `tests/abi.rs`.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod abi;
pub mod clock;
pub mod console;
pub mod errno;
pub mod evtchn;
pub mod grant;
pub mod grant_table;
pub mod halt_poll;
pub mod hypercall;
pub mod memory;
pub mod page;
pub mod physdev;
pub mod port_e9;
pub mod sched;
pub mod store;
pub mod vchan;
pub mod vcpu;
