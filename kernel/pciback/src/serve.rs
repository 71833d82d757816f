//! One request of a frontend, from the copy out of the shared page to the reply.
//!
//! Rules: `xen/io/pciif.h`. The only effect of a request is on the function it names. Nothing here waits; an access
//! to configuration space allocates nothing and makes no hypercall, the operations on interrupts make a bounded
//! number ([`crate::interrupts`]).

use core::fmt;

use crate::config::Written;
use crate::device::{Device, Function};
use crate::interrupts::{EnableError, Kind, Means};
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, DomId, Width};
use crate::sbdf::Sbdf;
use crate::topology::{DeviceIndex, Topology};
use crate::wire::{MsixEntry, RawReply, RawRequest, WireError, op};

/// What guests have asked of one function since this domain has started: they are never set back, so that who looks
/// twice knows what came in between, whatever guests came and went. Requests that reached no function are in none.
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

impl Counters {
    /// The counters of a node's text: four decimal numbers with a blank in between, and nothing else.
    pub fn parse(text: &str) -> Option<Counters> {
        let mut words = text.split(' ');
        let mut number = || {
            let plain = |word: &&str| !word.is_empty() && word.len() <= 20 && word.bytes().all(|b| b.is_ascii_digit());
            words.next().filter(plain)?.parse().ok()
        };
        let counters = Counters { reads: number()?, writes: number()?, refused_writes: number()?, errors: number()? };
        words.next().is_none().then_some(counters)
    }
}

/// As a node's text.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.reads, self.writes, self.refused_writes, self.errors)
    }
}

/// What is worth a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The first write of this guest to this function that no rule allows.
    Dropped(DeviceIndex),
    /// A write that needs the hardware while writes are off, the first since they were on.
    WritesOff(DeviceIndex),
    /// The first write of this guest to this function that only the backend may make.
    Denied(DeviceIndex),
    /// Message interrupts were turned on.
    Enabled(DeviceIndex),
    /// They were asked for and are not on.
    NotEnabled(DeviceIndex, Kind, EnableError),
    /// They were on and are off; and what Xen said if it did not unmap them.
    Disabled(DeviceIndex, Kind, Option<PhysdevError>),
    /// The guest has woken the function from D3hot; its Command register held this before.
    Woken(DeviceIndex, u16),
}

impl Notice {
    /// The function it is about.
    pub const fn device(&self) -> DeviceIndex {
        match *self {
            Notice::Dropped(index)
            | Notice::WritesOff(index)
            | Notice::Denied(index)
            | Notice::Enabled(index)
            | Notice::NotEnabled(index, ..)
            | Notice::Disabled(index, ..)
            | Notice::Woken(index, _) => index,
        }
    }

    /// Whether the function's interrupts are others than before, or are to be restored.
    pub const fn changes_interrupts(&self) -> bool {
        matches!(self, Notice::Enabled(_) | Notice::Disabled(..) | Notice::Woken(..))
    }
}

/// What a request may reach.
pub struct Desk<'a, C, P> {
    /// The guest that asks.
    pub guest: DomId,
    /// Its virtual bus.
    pub topology: &'a Topology,
    /// All functions of this domain.
    pub devices: &'a mut [Device<C>],
    /// Xen.
    pub physdev: &'a mut P,
}

impl<C: ConfigSpace, P: Physdev> Desk<'_, C, P> {
    /// The function a request names, if the guest has it.
    fn target(&mut self, request: &RawRequest) -> Option<(DeviceIndex, Sbdf, &mut Function<C>, &mut P)> {
        let index = self.topology.find(request.domain, request.bus, request.devfn)?;
        let device = self.devices.get_mut(index)?;
        let sbdf = device.entry.sbdf;
        Some((index, sbdf, device.function_of(self.guest)?, self.physdev))
    }
}

/// Carries out one request. `entries` are the MSI-X entries it brought along, as many as it says up to the most
/// that fit; with a reply without error their vectors are the guest's pirqs.
///
/// `Err` with the function, and nothing was done, while that is on its way out of D3hot: it may not be touched, and has
/// not got back what it lost.
pub fn execute<C: ConfigSpace, P: Physdev>(
    request: &RawRequest,
    entries: &mut [MsixEntry],
    desk: &mut Desk<'_, C, P>,
) -> Result<(RawReply, Option<Notice>), DeviceIndex> {
    let guest = desk.guest;
    let Some((index, sbdf, function, physdev)) = desk.target(request) else {
        return Ok((reply(Err(WireError::DeviceNotFound)), None));
    };
    if function.waking.is_some() {
        return Err(index);
    }
    let (reply, notice) = if matches!(request.cmd, op::CONF_READ | op::CONF_WRITE) {
        let (outcome, notice) = access(request, index, function);
        (reply(outcome), notice)
    } else {
        let mut turn = Turn { request, index, sbdf, function: &mut *function, physdev };
        match request.cmd {
            op::ENABLE_MSI => turn.enable_msi(guest, 1),
            op::ENABLE_MULTI_MSI => turn.enable_msi(guest, request.info),
            op::ENABLE_MSIX => turn.enable_msix(guest, entries),
            op::DISABLE_MSI | op::DISABLE_MSIX => turn.disable(),
            _ => (reply(Err(WireError::NotImplemented)), None),
        }
    };
    if reply.err != 0 {
        function.counters.errors = function.counters.errors.saturating_add(1);
    }
    Ok((reply, notice))
}

/// The client has given the request up before the reply: it takes it for failed, so what it turned on goes off
/// again.
pub fn withdrawn<C: ConfigSpace, P: Physdev>(
    request: &RawRequest,
    reply: &RawReply,
    desk: &mut Desk<'_, C, P>,
) -> Option<Notice> {
    if reply.err != 0 || !matches!(request.cmd, op::ENABLE_MSI | op::ENABLE_MSIX | op::ENABLE_MULTI_MSI) {
        return None;
    }
    let (index, sbdf, function, physdev) = desk.target(request)?;
    Turn { request, index, sbdf, function, physdev }.disable().1
}

fn reply(outcome: Result<u32, WireError>) -> RawReply {
    match outcome {
        Ok(value) => RawReply { err: 0, value },
        Err(error) => RawReply { err: error.code(), value: 0 },
    }
}

fn access<C: ConfigSpace>(
    request: &RawRequest,
    index: DeviceIndex,
    function: &mut Function<C>,
) -> (Result<u32, WireError>, Option<Notice>) {
    let Function { hardware, config, counters, mute, .. } = function;
    if request.cmd == op::CONF_READ {
        counters.reads = counters.reads.saturating_add(1);
        return (config.read(hardware, request.offset, request.size), None);
    }
    counters.writes = counters.writes.saturating_add(1);
    let mask = Width::from_bytes(request.size).map_or(0, Width::mask);
    match config.write(hardware, request.offset, request.size, request.value & mask) {
        Ok(written) => {
            let notice = match written {
                Written::Done => None,
                Written::Dropped { first } => first.then_some(Notice::Dropped(index)),
                Written::Denied { first } if hardware.writable() => first.then_some(Notice::Denied(index)),
                // Once for each time that it comes to this: `first` is for the guest's whole use.
                Written::Denied { .. } => (!core::mem::replace(mute, true)).then_some(Notice::WritesOff(index)),
            };
            if written == Written::Done {
                *mute = false;
            }
            if written != Written::Done {
                counters.refused_writes = counters.refused_writes.saturating_add(1);
            }
            // Also where another register of the same write was refused: the function is on its way.
            let woken = config.take_woken().map(|command| Notice::Woken(index, command));
            (written.answer().map(|()| request.value), woken.or(notice))
        }
        Err(error) => {
            counters.refused_writes = counters.refused_writes.saturating_add(1);
            (Err(error), None)
        }
    }
}

/// One operation on interrupts.
struct Turn<'a, C, P> {
    request: &'a RawRequest,
    index: DeviceIndex,
    sbdf: Sbdf,
    function: &'a mut Function<C>,
    physdev: &'a mut P,
}

impl<C: ConfigSpace, P: Physdev> Turn<'_, C, P> {
    fn enable_msi(&mut self, guest: DomId, count: u32) -> (RawReply, Option<Notice>) {
        let line = self.function.config.wants_line();
        let Function { hardware, interrupts, config, .. } = &mut *self.function;
        let mut means = Means { hardware, physdev: &mut *self.physdev, sbdf: self.sbdf, line };
        match interrupts.enable_msi(&mut means, guest, count) {
            Ok(pirq) => {
                config.set_messages(true);
                // Checked to be above 0.
                (RawReply { err: 0, value: pirq.cast_unsigned() }, Some(Notice::Enabled(self.index)))
            }
            Err(why) => {
                // Only the operation for several has a place for "fewer would do".
                let fewer = match why {
                    EnableError::TooMany(vectors) => u32::from(vectors),
                    EnableError::Map(_, PhysdevError::NoPirq | PhysdevError::NotSupported) => count / 2,
                    _ => 0,
                };
                let value = if self.request.cmd == op::ENABLE_MULTI_MSI { fewer } else { 0 };
                let error = match why {
                    EnableError::NotOffered => WireError::NotImplemented,
                    _ => WireError::OpFailed,
                };
                (RawReply { err: error.code(), value }, Some(Notice::NotEnabled(self.index, Kind::Msi, why)))
            }
        }
    }

    fn enable_msix(&mut self, guest: DomId, entries: &mut [MsixEntry]) -> (RawReply, Option<Notice>) {
        let line = self.function.config.wants_line();
        let Function { hardware, interrupts, config, .. } = &mut *self.function;
        let table = interrupts.msix().map(|msix| msix.table);
        let base = table.and_then(|table| config.memory(table)).unwrap_or(0);
        let mut means = Means { hardware, physdev: &mut *self.physdev, sbdf: self.sbdf, line };
        // More than fit in a request: the entries were cut, and a part is not what was asked for.
        let outcome = if entries.len() == self.request.value as usize {
            interrupts.enable_msix(&mut means, guest, base, entries)
        } else {
            Err(EnableError::BadRequest)
        };
        match outcome {
            Ok(()) => {
                config.set_messages(true);
                (RawReply { err: 0, value: 0 }, Some(Notice::Enabled(self.index)))
            }
            Err(why) => {
                let reply = RawReply { err: why.msix_code(), value: self.request.value };
                (reply, Some(Notice::NotEnabled(self.index, Kind::Msix, why)))
            }
        }
    }

    /// Either disable operation: Linux guests from 5.17 give up MSI-X with disable_msi.
    fn disable(&mut self) -> (RawReply, Option<Notice>) {
        let line = self.function.config.wants_line();
        let Function { hardware, interrupts, config, .. } = &mut *self.function;
        let kind = interrupts.kind();
        let mut means = Means { hardware, physdev: &mut *self.physdev, sbdf: self.sbdf, line };
        let left = interrupts.disable(&mut means);
        config.set_messages(false);
        let notice = (kind != Kind::Line).then_some(Notice::Disabled(self.index, kind, left));
        (RawReply { err: 0, value: config.pirq().into() }, notice)
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    #[test]
    fn counters_read_back_and_nothing_else_does() {
        let counters = Counters { reads: 12, writes: 3, refused_writes: 1, errors: u64::MAX };
        assert_eq!(format!("{counters}"), "12 3 1 18446744073709551615");
        assert_eq!(Counters::parse("12 3 1 18446744073709551615"), Some(counters));
        for text in [
            "",
            "1 2 3",
            "1 2 3 4 5",
            "1 2 3 4 ",
            " 1 2 3 4",
            "1  2 3 4",
            "1 2 3 -4",
            "1 2 3 +4",
            "1 2 3 0x4",
            "1 2 3 4\n",
            "1 2 3 18446744073709551616",
            "1 2 3 000000000000000000001",
        ] {
            assert_eq!(Counters::parse(text), None, "{text:?}");
        }
    }
}
