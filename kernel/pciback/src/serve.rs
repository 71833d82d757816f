//! One request of a frontend, from the copy out of the shared page to the reply.
//!
//! Rules: `xen/io/pciif.h`. Nothing here waits, allocates or makes a hypercall; the only effect of a
//! request is on the function it names.

use crate::config::Written;
use crate::device::{Device, Function};
use crate::platform::{ConfigSpace, Width};
use crate::topology::{DeviceIndex, Topology};
use crate::wire::{RawReply, RawRequest, WireError};

/// Operation numbers, `XEN_PCI_OP_*`.
mod op {
    pub const CONF_READ: u32 = 0;
    pub const CONF_WRITE: u32 = 1;
    pub const ENABLE_MSI: u32 = 2;
    pub const DISABLE_MSI: u32 = 3;
    pub const ENABLE_MSIX: u32 = 4;
    pub const DISABLE_MSIX: u32 = 5;
    pub const ENABLE_MULTI_MSI: u32 = 10;
}

/// Counters of one frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Configuration reads.
    pub reads: u64,
    /// Configuration writes, refused ones included.
    pub writes: u64,
    /// Writes that changed nothing because no rule allows them.
    pub refused_writes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// What is worth a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The first write of this guest to this function that no rule allows.
    Dropped(DeviceIndex),
    /// The first write of this guest to this function that needs the hardware while writes are off.
    WritesOff(DeviceIndex),
    /// The first write of this guest to this function that only the backend may make.
    Denied(DeviceIndex),
    /// The guest asked for MSI or MSI-X.
    NoMsi(DeviceIndex),
}

/// Carries out one request.
pub fn execute<C: ConfigSpace>(
    request: &RawRequest,
    topology: &Topology,
    devices: &mut [Device<C>],
    counters: &mut Counters,
) -> (RawReply, Option<Notice>) {
    let found = topology.find(request.domain, request.bus, request.devfn);
    let target = found.and_then(|index| Some((index, devices.get_mut(index)?.function()?)));
    let (outcome, notice) = match target {
        Some((index, function)) => operate(request, index, function, counters),
        None => (Err(WireError::DeviceNotFound), None),
    };
    let reply = match outcome {
        Ok(value) => RawReply { err: 0, value },
        Err(error) => {
            counters.errors = counters.errors.saturating_add(1);
            RawReply { err: error.code(), value: 0 }
        }
    };
    (reply, notice)
}

fn operate<C: ConfigSpace>(
    request: &RawRequest,
    index: DeviceIndex,
    function: &mut Function<C>,
    counters: &mut Counters,
) -> (Result<u32, WireError>, Option<Notice>) {
    let Function { hardware, config } = function;
    match request.cmd {
        op::CONF_READ => {
            counters.reads = counters.reads.saturating_add(1);
            (config.read(hardware, request.offset, request.size), None)
        }
        op::CONF_WRITE => {
            counters.writes = counters.writes.saturating_add(1);
            let mask = Width::from_bytes(request.size).map_or(0, Width::mask);
            match config.write(hardware, request.offset, request.size, request.value & mask) {
                Ok(written) => {
                    let notice = match written {
                        Written::Done => None,
                        Written::Dropped { first } => first.then_some(Notice::Dropped(index)),
                        Written::Denied { first } if hardware.writable() => first.then_some(Notice::Denied(index)),
                        Written::Denied { first } => first.then_some(Notice::WritesOff(index)),
                    };
                    let outcome = match written {
                        Written::Denied { .. } => Err(WireError::AccessDenied),
                        _ => Ok(request.value),
                    };
                    if written != Written::Done {
                        counters.refused_writes = counters.refused_writes.saturating_add(1);
                    }
                    (outcome, notice)
                }
                Err(error) => {
                    counters.refused_writes = counters.refused_writes.saturating_add(1);
                    (Err(error), None)
                }
            }
        }
        // INTx is the interrupt of this version. The client falls back to it by itself.
        op::ENABLE_MSI | op::ENABLE_MSIX | op::ENABLE_MULTI_MSI => {
            (Err(WireError::NotImplemented), Some(Notice::NoMsi(index)))
        }
        // Nothing is on, so nothing is left to do: the line interrupt goes on.
        op::DISABLE_MSI | op::DISABLE_MSIX => (Ok(config.pirq().into()), None),
        _ => (Err(WireError::NotImplemented), None),
    }
}
