//! The PCI backend: what a frontend asks, what a guest may see and change, and when.
//!
//! Principles:
//! 1. Guests are hostile. A request is copied once, checked, and acted on from the copy.
//! 2. One guest's fault is that guest's: no error here stops another frontend.
//! 3. One table names every byte of configuration space; what it does not allow is refused.
//! 4. No `unsafe`, no hypercall, no clock: the [`platform`] traits bring the machine, so that all of
//!    it runs in ordinary tests.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod aer;
pub mod backend;
pub mod cmdline;
pub mod config;
pub mod delegate;
pub mod device;
pub mod frontend;
pub mod handover;
pub mod image;
pub mod interrupts;
pub mod mode;
pub mod msix_state;
pub mod nodes;
pub mod physdev;
pub mod platform;
pub mod reset_quirks;
pub mod sbdf;
pub mod serve;
pub mod siblings;
pub mod throttle;
pub mod topology;
pub mod wire;
