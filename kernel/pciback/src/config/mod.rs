//! A function's configuration space as its guest sees it: what is read, what may be written, and
//! what of it reaches the device.
//! Relies on [`registers`]: one table names every byte. An access is cut at the table's borders, and
//! each register judges its own bytes, so that no register is reached by way of its neighbour
//! (XSA-128). All state of a guest is in one value made at attach and dropped at detach.
//! The rules follow Linux's xen-pciback (`conf_space*.c`) and the advisories XSA-120, XSA-126 and
//! XSA-128; where this differs on purpose, a comment says so.

mod allocation;
mod bars;
mod identity;
mod msi;
pub mod registers;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::fmt;

pub use self::bars::Resource;
use self::bars::{BarWrite, Bars};
pub use self::identity::Identity;
pub use self::msi::{Msi, Msix, Place, msi_control, msix_control};
use self::registers::{
    BIST_START, EXTENDED, Found, MULTIFUNCTION, SPACE, VPD_WRITE, capability, command, offset as header, power, table,
    walk,
};
pub use self::registers::{Name, Register, Rule};
use crate::cmdline::Quirk;
use crate::platform::{ConfigSpace, Width, WritesOff};
use crate::wire::WireError;

/// What is particular to the guest that gets the function.
#[derive(Clone, Copy, Debug)]
pub struct GuestView {
    /// The guest's pirq for the function's interrupt pin, 0 for none.
    pub pirq: u8,
    /// The resources of BAR 0 to 5 and the ROM.
    pub resources: [Resource; 7],
    /// The guest may write registers that nobody knows.
    pub permissive: bool,
    /// The guest's slot holds more than this function.
    pub multifunction: bool,
}

/// Why a function cannot be given to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The vendor register reads ffff.
    NoAnswer,
    /// It asks to be read again later (PCI Express Base 5.0, 2.3.2, Configuration Request Retry Status): the vendor
    /// register reads 0001 and the others all ones.
    NotYet,
    /// It is a virtual function, and nobody has said its ids.
    Nameless,
    /// The function has another header than a device's.
    HeaderType(u8),
    /// Another device is there than at start.
    Replaced,
    /// The resource list has an entry that no base address register can hold.
    Resource {
        /// 0 to 5, 6 for the ROM.
        index: usize,
    },
    /// The device holds another address than the resource list.
    Bar {
        /// 0 to 5, 6 for the ROM.
        index: usize,
        /// The device's address.
        hardware: u64,
        /// The list's address, 0 where it has none.
        listed: u64,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Refusal::NoAnswer => {
                f.write_str("no device answers (all registers read ffff): check its address and power")
            }
            Refusal::Nameless => f.write_str(
                "it is a virtual function, whose ids only dom0 knows: add id=VVVV:DDDD (xl-pciback config prints it)",
            ),
            Refusal::NotYet => f.write_str("it is not ready to answer yet: try again in a moment"),
            Refusal::HeaderType(1) => f.write_str("it is a bridge: pass the devices behind it instead"),
            Refusal::HeaderType(header) => {
                write!(f, "its header is of type {header}: only type 0, an ordinary device, can be passed")
            }
            Refusal::Replaced => {
                f.write_str("another device is there than at start: restart the driver domain to take it over")
            }
            Refusal::Resource { index } => {
                write!(f, "{} of the resource list cannot be: attach the device again", BarName(index))
            }
            Refusal::Bar { index, hardware, listed } => write!(
                f,
                "{} is at {hardware:#x} in the device and at {listed:#x} in the resource list: \
                 attach the device again, or reset it if it has lost its addresses",
                BarName(index)
            ),
        }
    }
}

/// A base address register's name in a sentence.
struct BarName(usize);

impl fmt::Display for BarName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == bars::ROM { f.write_str("the ROM") } else { write!(f, "BAR {}", self.0) }
    }
}

/// What became of a write that was well formed.
///
/// `first` is set once for each guest and kind, for one line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All of it took effect, or none was needed.
    Done,
    /// Some of it was dropped; the guest is told of success, as a device would.
    Dropped {
        /// The first of this guest.
        first: bool,
    },
    /// Some of it was refused and the guest is told so: the register is not the guest's to write in
    /// this way, or this host does not let the domain write.
    Denied {
        /// The first of this guest.
        first: bool,
    },
}

impl Written {
    /// What the guest is told.
    ///
    /// # Errors
    /// [`WireError::AccessDenied`] for [`Written::Denied`].
    pub const fn answer(self) -> Result<(), WireError> {
        match self {
            Written::Done | Written::Dropped { .. } => Ok(()),
            Written::Denied { .. } => Err(WireError::AccessDenied),
        }
    }
}

/// What became of one register's part of a write. Of several parts the worst counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Done,
    Dropped,
    Denied,
}

impl From<Result<(), WritesOff>> for Outcome {
    fn from(result: Result<(), WritesOff>) -> Outcome {
        match result {
            Ok(()) => Outcome::Done,
            Err(WritesOff) => Outcome::Denied,
        }
    }
}

/// All that a guest's accesses change here.
#[derive(Clone, Copy, Debug)]
struct Guest {
    pirq: u8,
    permissive: bool,
    multifunction: bool,
    bars: Bars,
    /// The Command register as the guest wrote it; at first as a reset leaves it.
    command: u16,
    /// MSI or MSI-X is on, so the function does not use its interrupt pin.
    messages: bool,
    /// The guest has woken the function from D3hot, on which it may have lost its state: Command as it was before.
    woken: Option<u16>,
    dropped_before: bool,
    denied_before: bool,
}

/// A valid access: aligned and inside the space.
#[derive(Clone, Copy)]
struct Access {
    offset: u16,
    width: Width,
}

impl Access {
    fn new(offset: i32, size: i32) -> Result<Access, WireError> {
        let width = Width::from_bytes(size).ok_or(WireError::InvalidOffset)?;
        let offset = u16::try_from(offset).map_err(|_| WireError::InvalidOffset)?;
        if offset >= SPACE || !offset.is_multiple_of(width.bytes()) {
            return Err(WireError::InvalidOffset);
        }
        Ok(Access { offset, width })
    }

    const fn end(self) -> u16 {
        self.offset + self.width.bytes()
    }
}

/// The virtual configuration space of one function.
#[derive(Debug)]
pub struct VirtualConfig {
    identity: Identity,
    table: Vec<Register>,
    capabilities: Vec<Found>,
    /// What `quirk=` asks for and is not so, and the register in the way.
    refused: Vec<(Quirk, Name)>,
    guest: Option<Guest>,
}

impl VirtualConfig {
    /// Takes over a function: reads who it is and builds its table of registers. `given` are the ids of a virtual
    /// function, which has none of its own.
    ///
    /// # Errors
    /// Those of [`Identity::read`], or [`Refusal::HeaderType`].
    pub fn new<C: ConfigSpace>(hardware: &C, given: Option<(u16, u16)>) -> Result<VirtualConfig, Refusal> {
        let identity = Identity::read(hardware, given)?;
        let kind = hardware.read(header::HEADER_TYPE, Width::Byte) as u8 & !MULTIFUNCTION;
        if kind != 0 {
            return Err(Refusal::HeaderType(kind));
        }
        let capabilities = walk(hardware);
        let table = table(hardware, &capabilities);
        Ok(VirtualConfig { identity, table, capabilities, refused: Vec::new(), guest: None })
    }

    /// Opens registers to guests that have no rule of their own: for every guest, whoever comes and goes.
    pub fn open(&mut self, quirks: &[Quirk]) {
        self.refused = registers::open(&mut self.table, quirks);
    }

    /// What could not be opened, and the register in the way.
    pub fn refused(&self) -> &[(Quirk, Name)] {
        &self.refused
    }

    /// Whether the function has extended space (above 255) of its own.
    pub fn has_extended(&self) -> bool {
        self.table.last().is_some_and(|register| register.name != Name::Absent)
    }

    /// Offset of the first capability with this id that is shown.
    pub fn capability(&self, id: u8) -> Option<u16> {
        let mut shown = self.capabilities.iter().filter(|found| !found.hidden);
        shown.find(|found| found.id == id).map(|found| found.offset)
    }

    /// Offset of the power management control and status register (PMCSR).
    pub fn power_control(&self) -> Option<u16> {
        self.capability(capability::POWER).map(|at| at + 4).filter(|at| at + 2 <= EXTENDED)
    }

    /// Ids and offsets of the capabilities that are not shown because what they say cannot be.
    pub fn hidden(&self) -> impl Iterator<Item = (u8, u16)> {
        self.capabilities.iter().filter(|found| found.hidden).map(|found| (found.id, found.offset))
    }

    /// The MSI capability, as the device has it now.
    pub fn msi<C: ConfigSpace>(&self, hardware: &C) -> Option<Msi> {
        self.capability(capability::MSI).map(|offset| Msi::read(hardware, offset))
    }

    /// The MSI-X capability, as the device has it now.
    pub fn msix<C: ConfigSpace>(&self, hardware: &C) -> Option<Msix> {
        self.capability(capability::MSIX).map(|offset| Msix::read(hardware, offset))
    }

    /// Address of the memory BAR that `place` lies in, if the guest was given it and it is large enough.
    pub fn memory(&self, place: Place) -> Option<u64> {
        self.guest.as_ref().and_then(|guest| guest.bars.memory(usize::from(place.bar), place.end()))
    }

    /// Says that MSI or MSI-X is on, or off: with it the function does not use its interrupt pin, whatever the
    /// guest writes.
    pub fn set_messages(&mut self, on: bool) {
        if let Some(guest) = &mut self.guest {
            guest.messages = on;
        }
    }

    /// Whether the guest has woken the function from D3hot since the last call: Command as it was before.
    pub fn take_woken(&mut self) -> Option<u16> {
        self.guest.as_mut().and_then(|guest| guest.woken.take())
    }

    /// Whether the guest has turned the function on and does not silence its interrupt pin, which must then work while
    /// neither MSI nor MSI-X is on.
    pub fn wants_line(&self) -> bool {
        let wants = |command: u16| command & command::DECODE != 0 && command & command::INTX_DISABLE == 0;
        self.guest.is_some_and(|guest| wants(guest.command))
    }

    /// Who the function is.
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The table, by ascending offset.
    pub fn registers(&self) -> impl Iterator<Item = &Register> {
        self.table.iter()
    }

    /// The guest's pirq, 0 for none.
    pub fn pirq(&self) -> u8 {
        self.guest.map_or(0, |guest| guest.pirq)
    }

    /// Gives the function to a guest. Nothing is left of what another guest did before.
    ///
    /// Wake events are turned off in the device, where it can be written.
    ///
    /// # Errors
    /// Why this guest cannot have it; the function is with no guest then.
    pub fn attach<C: ConfigSpace>(&mut self, hardware: &mut C, view: GuestView) -> Result<(), Refusal> {
        self.guest = None;
        self.identity.check(hardware)?;
        let bars = Bars::new(hardware, &view.resources, self.identity.is_virtual())?;
        for register in self.table.iter().filter(|register| register.name == Name::PowerControl) {
            let held = hardware.read(register.offset, Width::Word) as u16;
            if held & power::PME_ENABLE != 0 {
                let off = held & !(power::PME_ENABLE | power::PME_STATUS);
                // Where the host forbids writes the guest cannot turn them on either.
                let _ = hardware.write(register.offset, Width::Word, u32::from(off));
            }
        }
        self.guest = Some(Guest {
            pirq: view.pirq,
            permissive: view.permissive,
            multifunction: view.multifunction,
            bars,
            command: 0,
            messages: false,
            woken: None,
            dropped_before: false,
            denied_before: false,
        });
        Ok(())
    }

    /// Whether the guest's slot holds more than this function.
    pub fn set_multifunction(&mut self, on: bool) {
        if let Some(guest) = &mut self.guest {
            guest.multifunction = on;
        }
    }

    /// Takes the function from its guest. The device may no longer start transactions; it still
    /// decodes its addresses, because the host may touch them.
    pub fn detach<C: ConfigSpace>(&mut self, hardware: &mut C) {
        self.guest = None;
        let held = hardware.read(header::COMMAND, Width::Word) as u16;
        // A device that still asks for service holds a shared line: every other user of the line would see
        // interrupts nobody claims. It stays silent until the next guest enables it.
        let idle = (held & !command::MASTER) | command::INTX_DISABLE;
        if held != idle && held != u16::MAX {
            // Without writes the guest could not have turned anything on.
            let _ = hardware.write(header::COMMAND, Width::Word, u32::from(idle));
        }
    }

    /// The function was reset while the guest has it: what the guest wrote into the Command register is gone.
    pub fn was_reset(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.command = 0;
        }
    }

    /// What the guest reads.
    ///
    /// # Errors
    /// [`WireError::InvalidOffset`] for an access no device answers, [`WireError::DeviceNotFound`]
    /// while no guest has the function.
    pub fn read<C: ConfigSpace>(&mut self, hardware: &C, offset: i32, size: i32) -> Result<u32, WireError> {
        let access = Access::new(offset, size)?;
        let guest = self.guest.as_ref().ok_or(WireError::DeviceNotFound)?;
        Ok(guest.look(&self.table, &self.identity, hardware, access))
    }

    /// Takes the guest's write.
    ///
    /// # Errors
    /// As [`VirtualConfig::read`]; nothing was touched then. A refused write is no error here but
    /// [`Written::Denied`], so that the caller learns whether to log it.
    pub fn write<C: ConfigSpace>(
        &mut self,
        hardware: &mut C,
        offset: i32,
        size: i32,
        value: u32,
    ) -> Result<Written, WireError> {
        let access = Access::new(offset, size)?;
        let guest = self.guest.as_mut().ok_or(WireError::DeviceNotFound)?;
        let value = value & access.width.mask();
        let mut worst = Outcome::Done;
        for register in overlapping(&self.table, access) {
            let part = Part::new(register, access, value);
            worst = worst.max(guest.write(&self.table, &self.identity, hardware, &part));
        }
        Ok(match worst {
            Outcome::Done => Written::Done,
            Outcome::Dropped => Written::Dropped { first: !core::mem::replace(&mut guest.dropped_before, true) },
            Outcome::Denied => Written::Denied { first: !core::mem::replace(&mut guest.denied_before, true) },
        })
    }
}

/// The registers an access touches: at most four, found by binary search.
fn overlapping(table: &[Register], access: Access) -> impl Iterator<Item = &Register> {
    let first = table.partition_point(|register| register.end() <= access.offset);
    table.iter().skip(first).take_while(move |register| register.offset < access.end())
}

/// One register's share of a write.
#[derive(Clone, Copy)]
struct Part<'a> {
    register: &'a Register,
    /// The first byte written, in the configuration space.
    start: u16,
    /// The first byte behind.
    end: u16,
    /// The bytes, the one at `start` lowest.
    value: u32,
}

impl<'a> Part<'a> {
    fn new(register: &'a Register, access: Access, value: u32) -> Part<'a> {
        let start = register.offset.max(access.offset);
        let end = register.end().min(access.end());
        let value = (value >> (8 * u32::from(start - access.offset))) & bytes_mask(end - start);
        Part { register, start, end, value }
    }

    /// The bits of the register that are written. Only for registers of up to four bytes.
    fn mask(&self) -> u32 {
        bytes_mask(self.end - self.start) << (8 * u32::from(self.start - self.register.offset))
    }

    /// The register as the write leaves it, `old` where it is not written.
    fn merged(&self, old: u32) -> u32 {
        old & !self.mask() | self.value << (8 * u32::from(self.start - self.register.offset))
    }

    /// Writes the bytes, and no others, into the device.
    fn forward<C: ConfigSpace>(&self, hardware: &mut C) -> Outcome {
        let (mut at, mut rest) = (self.start, self.value);
        while at < self.end {
            let width = match (at % 4, self.end - at) {
                (0, 4) => Width::Dword,
                (0 | 2, 2..) => Width::Word,
                _ => Width::Byte,
            };
            if hardware.write(at, width, rest & width.mask()) == Err(WritesOff) {
                return Outcome::Denied;
            }
            at += width.bytes();
            rest = rest.checked_shr(8 * u32::from(width.bytes())).unwrap_or(0);
        }
        Outcome::Done
    }
}

/// All ones in the low `count` bytes, of which there are at most four.
const fn bytes_mask(count: u16) -> u32 {
    if count >= 4 { u32::MAX } else { (1 << (8 * count)) - 1 }
}

impl Guest {
    /// What the guest reads: the device's bytes, and over them what has a value of its own.
    fn look<C: ConfigSpace>(&self, table: &[Register], identity: &Identity, hardware: &C, access: Access) -> u32 {
        let mut seen = hardware.read(access.offset, access.width) & access.width.mask();
        // A device that is gone reads as ones everywhere: that is how a driver finds out. The remembered ids
        // would tell it that the device is still there.
        if seen == access.width.mask() && identity.check(hardware).is_err() {
            return seen;
        }
        for register in overlapping(table, access) {
            if register.name == Name::Absent {
                return access.width.mask();
            }
            if let Some(value) = self.value(identity, hardware, register) {
                let whole = bytes_mask(register.length);
                let (value, mask) = if register.offset >= access.offset {
                    let left = 8 * u32::from(register.offset - access.offset);
                    (value << left, whole << left)
                } else {
                    let right = 8 * u32::from(access.offset - register.offset);
                    (value >> right, whole >> right)
                };
                seen = seen & !mask | value & mask;
            }
        }
        seen & access.width.mask()
    }

    /// The value of a whole register, or `None` where the guest reads the device's.
    fn value<C: ConfigSpace>(&self, identity: &Identity, hardware: &C, register: &Register) -> Option<u32> {
        match register.name {
            Name::Vendor => Some(u32::from(identity.ids().0)),
            Name::Device => Some(u32::from(identity.ids().1)),
            Name::Command => {
                let held = hardware.read(header::COMMAND, Width::Word) as u16;
                Some(u32::from(held & command::FROM_HARDWARE | self.command & !command::FROM_HARDWARE))
            }
            Name::HeaderType => {
                let kind = hardware.read(header::HEADER_TYPE, Width::Byte) & !u32::from(MULTIFUNCTION);
                Some(kind | if self.multifunction { u32::from(MULTIFUNCTION) } else { 0 })
            }
            Name::Bar(index) => self.bars.get(usize::from(index)).map(bars::Bar::read),
            Name::Rom => self.bars.get(bars::ROM).map(bars::Bar::read),
            Name::InterruptLine => Some(u32::from(self.pirq)),
            Name::Hidden => Some(0),
            Name::CapabilityPointer(first) => Some(u32::from(first)),
            Name::CapabilityHeader { id, next } => Some(u32::from(id) | u32::from(next) << 8),
            Name::PowerCapabilities => {
                Some(hardware.read(register.offset, Width::Word) & !u32::from(power::PME_SUPPORT))
            }
            Name::Status
            | Name::Class
            | Name::CacheLine
            | Name::Latency
            | Name::Bist
            | Name::CardbusCis
            | Name::Subsystem
            | Name::Reserved
            | Name::InterruptPin
            | Name::Timing
            | Name::PowerControl
            | Name::PowerData
            | Name::VpdAddress
            | Name::VpdData
            | Name::MsiControl
            | Name::MsiMessage
            | Name::MsixControl
            | Name::MsixLocation
            | Name::Opened { .. }
            | Name::Absent
            | Name::Raw => None,
        }
    }

    /// One register's share of a write.
    fn write<C: ConfigSpace>(
        &mut self,
        table: &[Register],
        identity: &Identity,
        hardware: &mut C,
        part: &Part<'_>,
    ) -> Outcome {
        match part.register.name {
            Name::Command => self.write_command(hardware, part),
            Name::CacheLine => write_if_changed(hardware, part.start, Width::Byte, part.value),
            Name::Bist => write_bist(hardware, part.value as u8),
            Name::Bar(index) => self.write_bar(hardware, usize::from(index), part),
            Name::Rom => self.write_bar(hardware, bars::ROM, part),
            Name::PowerControl => {
                let held = wakes(hardware, part).then(|| hardware.read(header::COMMAND, Width::Word) as u16);
                let outcome = write_power_control(hardware, part);
                if outcome == Outcome::Done && held.is_some() {
                    self.woken = held;
                }
                outcome
            }
            Name::VpdAddress => write_vpd_address(hardware, part),
            Name::Opened { mask } => write_opened(identity, hardware, part, mask),
            // Permissive or not: the reference lets a permissive guest flip these, but with Xen's
            // filter behind it. Here none is.
            Name::MsiControl | Name::MsixControl => {
                let held = hardware.read(part.register.offset, Width::Word);
                if part.merged(held) == held { Outcome::Done } else { Outcome::Denied }
            }
            Name::Vendor
            | Name::Device
            | Name::Status
            | Name::Class
            | Name::Latency
            | Name::HeaderType
            | Name::CardbusCis
            | Name::Subsystem
            | Name::CapabilityPointer(_)
            | Name::Reserved
            | Name::InterruptLine
            | Name::InterruptPin
            | Name::Timing
            | Name::CapabilityHeader { .. }
            | Name::Hidden
            | Name::PowerCapabilities
            | Name::PowerData
            | Name::VpdData
            | Name::MsiMessage
            | Name::MsixLocation
            | Name::Absent
            | Name::Raw => match part.register.rule {
                Rule::Ignored => Outcome::Done,
                Rule::Permissive if self.permissive => part.forward(hardware),
                Rule::Permissive => Outcome::Dropped,
                Rule::ReadOnly | Rule::Own => {
                    let same = (part.start..part.end).zip(part.value.to_le_bytes()).all(|(at, byte)| {
                        let access = Access { offset: at, width: Width::Byte };
                        self.look(table, identity, hardware, access) == u32::from(byte)
                    });
                    if same { Outcome::Done } else { Outcome::Dropped }
                }
            },
        }
    }

    /// The Command register.
    ///
    /// Decoding goes on in the device when the guest turns it on and stays on; bus mastering and
    /// memory-write-and-invalidate follow the guest; the other bits are the guest's notepad, or,
    /// for a permissive guest, follow too. Interrupt disable follows a guest that has turned on decoding,
    /// so that a handler can silence the line, unless the pin is not in use; it is a notepad otherwise.
    fn write_command<C: ConfigSpace>(&mut self, hardware: &mut C, part: &Part<'_>) -> Outcome {
        let held = hardware.read(header::COMMAND, Width::Word) as u16;
        let seen = held & command::FROM_HARDWARE | self.command & !command::FROM_HARDWARE;
        let value = part.merged(u32::from(seen)) as u16;

        let follows = command::GUEST | if self.permissive { command::PERMISSIVE } else { 0 };
        let decode = value & self.bars.decode;
        let mut wanted = held & !follows | value & follows | decode;
        let on = value & command::DECODE != 0;
        let turned_on = on && self.command & command::DECODE == 0;
        let switched = on && (self.command ^ value) & command::INTX_DISABLE != 0;
        if (turned_on || switched) && !self.messages && hardware.read(header::INTERRUPT_PIN, Width::Byte) != 0 {
            wanted = wanted & !command::INTX_DISABLE | value & command::INTX_DISABLE;
        }
        let outcome = write_if_changed(hardware, header::COMMAND, Width::Word, u32::from(wanted));
        // A guest must not read that decoding is on, or its line silent, where the device could not be told.
        let missing = if outcome == Outcome::Done { 0 } else { wanted & !held & (decode | command::INTX_DISABLE) };
        self.command = value & !missing;
        outcome
    }

    /// A base address register, or the ROM's.
    fn write_bar<C: ConfigSpace>(&mut self, hardware: &mut C, index: usize, part: &Part<'_>) -> Outcome {
        let Some(bar) = self.bars.get_mut(index) else {
            return Outcome::Dropped;
        };
        let held = hardware.read(part.register.offset, Width::Dword);
        match bar.write(part.merged(bar.read()), held) {
            BarWrite::Done => Outcome::Done,
            BarWrite::Moved => Outcome::Dropped,
            BarWrite::Restore(value) => hardware.write(part.register.offset, Width::Dword, value).into(),
        }
    }
}

/// Writes a register whose writes have no effect but its value.
fn write_if_changed<C: ConfigSpace>(hardware: &mut C, offset: u16, width: Width, value: u32) -> Outcome {
    if hardware.read(offset, width) == value { Outcome::Done } else { hardware.write(offset, width, value).into() }
}

/// Lets through a start of the test; the other bits are the device's.
fn write_bist<C: ConfigSpace>(hardware: &mut C, value: u8) -> Outcome {
    let held = hardware.read(header::BIST, Width::Byte) as u8;
    if (value ^ held) & !BIST_START != 0 && value != BIST_START {
        return Outcome::Dropped;
    }
    write_if_changed(hardware, header::BIST, Width::Byte, u32::from(value))
}

/// Power state and data selector follow the guest, a pending wake event is cleared when the guest
/// itself writes the 1 (a merged one would clear it unasked), and wake events are never on.
fn write_power_control<C: ConfigSpace>(hardware: &mut C, part: &Part<'_>) -> Outcome {
    const FOLLOWS: u16 = power::STATE | power::DATA_SELECT;
    let held = hardware.read(part.register.offset, Width::Word) as u16;
    let value = part.merged(u32::from(held)) as u16;
    let cleared = part.merged(0) as u16 & power::PME_STATUS;
    let others = held & !(FOLLOWS | power::PME_STATUS | power::PME_ENABLE);
    let wanted = others | value & FOLLOWS | cleared;
    if wanted == held & !power::PME_STATUS {
        return Outcome::Done;
    }
    hardware.write(part.register.offset, Width::Word, u32::from(wanted)).into()
}

/// Whether a write of power control takes the function from D3hot to D0.
fn wakes<C: ConfigSpace>(hardware: &C, part: &Part<'_>) -> bool {
    let held = hardware.read(part.register.offset, Width::Word) as u16;
    let asleep = held & power::STATE == power::STATE && held != u16::MAX;
    asleep && part.merged(u32::from(held)) as u16 & power::STATE == 0
}

/// Changes the bits that `quirk=` names, also for a permissive guest; the others of the bytes that are written keep what
/// they read.
fn write_opened<C: ConfigSpace>(identity: &Identity, hardware: &mut C, part: &Part<'_>, mask: u32) -> Outcome {
    let Some(width) = Width::from_bytes(part.register.length.into()) else { return Outcome::Dropped };
    let held = hardware.read(part.register.offset, width);
    // What does not answer has nothing to keep.
    if held == width.mask() && identity.check(hardware).is_err() {
        return Outcome::Dropped;
    }
    let value = held & !mask | part.merged(held) & mask;
    let shift = 8 * u32::from(part.start - part.register.offset);
    let outcome = Part { value: (value & part.mask()) >> shift, ..*part }.forward(hardware);
    if outcome == Outcome::Done && value != part.merged(held) { Outcome::Dropped } else { outcome }
}

/// Starts a read of vital product data. Not only when the value changes: the same address asks
/// again.
fn write_vpd_address<C: ConfigSpace>(hardware: &mut C, part: &Part<'_>) -> Outcome {
    let value = part.merged(hardware.read(part.register.offset, Width::Word));
    if value & u32::from(VPD_WRITE) != 0 {
        return Outcome::Denied;
    }
    hardware.write(part.register.offset, Width::Word, value).into()
}
