//! The table of one function's registers: every byte of its 4 KiB belongs to exactly one entry.
//! The header comes from the PCI Local Bus Specification 3.0, section 6.1 (header type 0); the
//! capabilities come from a bounded walk of the device's list; what is left is [`Name::Raw`].
//! The device is trusted no further than its bytes: a list that loops, points outside 0x40..0xff or
//! puts two capabilities on one place still gives a table without gaps and overlaps.

use alloc::vec::Vec;

use super::allocation;
use super::msi::{Msi, Msix};
use crate::cmdline::Quirk;
use crate::platform::{ConfigSpace, Width};

/// Bytes of a function's configuration space.
pub const SPACE: u16 = 0x1000;
/// First byte behind the conventional 256: extended capabilities start here.
pub const EXTENDED: u16 = 0x100;
/// First byte behind the header: capabilities live from here to [`EXTENDED`].
pub const HEADER_END: u16 = 0x40;
/// What a vendor register reads where no function answers.
pub const NO_VENDOR: u16 = 0xffff;
/// What a vendor register reads while its function asks to be read again later.
pub const RETRY_VENDOR: u16 = 0x0001;

/// Offsets of the header's registers.
pub mod offset {
    /// Vendor id.
    pub const VENDOR: u16 = 0x00;
    /// Device id.
    pub const DEVICE: u16 = 0x02;
    /// Command.
    pub const COMMAND: u16 = 0x04;
    /// Status.
    pub const STATUS: u16 = 0x06;
    /// Revision, and class in the upper three bytes.
    pub const CLASS: u16 = 0x08;
    /// Cache line size.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Latency timer.
    pub const LATENCY: u16 = 0x0d;
    /// Header type and the multifunction bit.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// Built-in self test.
    pub const BIST: u16 = 0x0f;
    /// The first of six base address registers.
    pub const BAR0: u16 = 0x10;
    /// Expansion ROM base address.
    pub const ROM: u16 = 0x30;
    /// Pointer to the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the Command register.
pub mod command {
    /// The function answers to I/O addresses.
    pub const IO: u16 = 1 << 0;
    /// The function answers to memory addresses.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may start transactions.
    pub const MASTER: u16 = 1 << 2;
    /// The function listens to special cycles.
    pub const SPECIAL: u16 = 1 << 3;
    /// Memory write and invalidate.
    #[doc(alias = "PCI_COMMAND_INVALIDATE")]
    pub const MWI: u16 = 1 << 4;
    /// VGA palette snooping.
    pub const VGA: u16 = 1 << 5;
    /// Address and data stepping.
    pub const WAIT: u16 = 1 << 7;
    /// Fast back-to-back transactions.
    pub const FAST_BACK: u16 = 1 << 9;
    /// The function does not assert its interrupt pin.
    pub const INTX_DISABLE: u16 = 1 << 10;

    /// Address decoding of both kinds.
    pub const DECODE: u16 = IO | MEMORY;
    /// Bits that every guest controls in the device.
    pub const GUEST: u16 = MASTER | MWI;
    /// Bits that a permissive guest controls besides.
    pub const PERMISSIVE: u16 = SPECIAL | VGA | WAIT | FAST_BACK;
    /// Bits a guest reads from the device; it reads the others as it wrote them.
    #[doc(alias = "PCI_COMMAND_GUEST")]
    pub const FROM_HARDWARE: u16 = GUEST | PERMISSIVE;
    const _: () = assert!(FROM_HARDWARE == 0x2bc);
}

/// Status bit: the function has a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Header type bit: the device has more than one function.
pub const MULTIFUNCTION: u8 = 1 << 7;
/// BIST bit: start the test.
pub const BIST_START: u8 = 1 << 6;

/// Bits of the power management registers (PCI Power Management 1.2, section 3.2).
pub mod power {
    /// PMC: the states from which the function can wake the system.
    pub const PME_SUPPORT: u16 = 0xf800;
    /// PMCSR: the power state.
    pub const STATE: u16 = 0x0003;
    /// PMCSR: the function keeps its state on the way from D3hot to D0.
    #[doc(alias = "PCI_PM_CTRL_NO_SOFT_RESET")]
    pub const NO_SOFT_RESET: u16 = 1 << 3;
    /// PMCSR: wake signals are on.
    pub const PME_ENABLE: u16 = 1 << 8;
    /// PMCSR: what the data register shows.
    pub const DATA_SELECT: u16 = 0x1e00;
    /// PMCSR: a wake event is pending; writing 1 clears it.
    pub const PME_STATUS: u16 = 1 << 15;
}

/// VPD address bit: set starts a write into the device's storage.
pub const VPD_WRITE: u16 = 1 << 15;
/// MSI control bit: the message address has 64 bits.
pub const MSI_64: u16 = 1 << 7;
/// MSI control bit: the capability has mask and pending registers.
pub const MSI_MASKABLE: u16 = 1 << 8;

/// Bits of the PCI Express capability (PCI Express Base 5.0, section 7.5.3).
pub mod express {
    /// Device Capabilities, from the capability's start.
    pub const DEVICE_CAPABILITIES: u16 = 0x04;
    /// Device Control.
    pub const DEVICE_CONTROL: u16 = 0x08;
    /// Device Status.
    pub const DEVICE_STATUS: u16 = 0x0a;
    /// Link Control.
    pub const LINK_CONTROL: u16 = 0x10;
    /// Device Control 2.
    pub const DEVICE_CONTROL_2: u16 = 0x28;
    /// Link Control 2.
    pub const LINK_CONTROL_2: u16 = 0x30;
    /// Device Capabilities: the function can be reset alone.
    #[doc(alias = "PCI_EXP_DEVCAP_FLR")]
    pub const FUNCTION_RESET: u32 = 1 << 28;
    /// Device Control: resets the function; reads as 0.
    #[doc(alias = "PCI_EXP_DEVCTL_BCR_FLR")]
    pub const INITIATE_RESET: u16 = 1 << 15;
    /// Device Status: transactions are pending.
    #[doc(alias = "PCI_EXP_DEVSTA_TRPND")]
    pub const PENDING: u16 = 1 << 5;
}

/// Bits of the Advanced Features capability (PCI-SIG ECN of 2006).
pub mod advanced {
    /// Capabilities, one byte, from the capability's start.
    pub const CAPABILITIES: u16 = 0x03;
    /// Control, one byte.
    pub const CONTROL: u16 = 0x04;
    /// Status, one byte.
    pub const STATUS: u16 = 0x05;
    /// Capabilities: pending transactions and function reset, both needed.
    pub const RESET: u8 = 0x03;
    /// Control: resets the function.
    pub const INITIATE_RESET: u8 = 1 << 0;
    /// Status: transactions are pending.
    pub const PENDING: u8 = 1 << 0;
}

/// Capability ids with registers of their own in the table.
pub mod capability {
    /// Power management.
    pub const POWER: u8 = 0x01;
    /// Vital product data.
    pub const VPD: u8 = 0x03;
    /// Message signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Advanced Features.
    pub const ADVANCED: u8 = 0x13;
    /// Enhanced Allocation.
    pub const ALLOCATION: u8 = 0x14;

    /// What it is called.
    pub const fn name(id: u8) -> &'static str {
        match id {
            POWER => "power management",
            VPD => "VPD",
            MSI => "MSI",
            EXPRESS => "PCI Express",
            MSIX => "MSI-X",
            ADVANCED => "Advanced Features",
            _ => "other",
        }
    }
}

/// The register an entry of the table stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// Vendor id.
    Vendor,
    /// Device id.
    Device,
    /// Command.
    Command,
    /// Status.
    Status,
    /// Revision and class code.
    Class,
    /// Cache line size.
    CacheLine,
    /// Latency timer.
    Latency,
    /// Header type.
    HeaderType,
    /// Built-in self test.
    Bist,
    /// Base address register 0 to 5.
    Bar(u8),
    /// Cardbus CIS pointer.
    CardbusCis,
    /// Subsystem vendor and id.
    Subsystem,
    /// Expansion ROM base address.
    Rom,
    /// Pointer to the first capability: the offset of the first that the guest sees, 0 for none.
    CapabilityPointer(u8),
    /// Bytes 0x35 to 0x3b.
    Reserved,
    /// Interrupt line.
    InterruptLine,
    /// Interrupt pin.
    InterruptPin,
    /// Minimum grant and maximum latency.
    Timing,
    /// Id and next pointer of a capability.
    CapabilityHeader {
        /// Its id.
        id: u8,
        /// The next one that the guest sees, 0 for none.
        next: u8,
    },
    /// A capability that is not shown: it reads as zeros and is in no list.
    Hidden,
    /// Power management capabilities (PMC).
    PowerCapabilities,
    /// Power management control and status (PMCSR).
    PowerControl,
    /// Bridge support extensions and data, behind PMCSR.
    PowerData,
    /// VPD address.
    VpdAddress,
    /// VPD data.
    VpdData,
    /// MSI message control.
    MsiControl,
    /// MSI address, data, mask and pending bits.
    MsiMessage,
    /// MSI-X message control.
    MsixControl,
    /// MSI-X table and pending-bit-array location.
    MsixLocation,
    /// A register without a rule of its own in which a guest may change these bits (`quirk=`).
    Opened {
        /// The bits.
        mask: u32,
    },
    /// There is no extended space: what answers there are the first 256 bytes again. Reads as all ones.
    Absent,
    /// Everything else, in the first 256 bytes and behind them.
    Raw,
}

/// Who may write a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Nobody; a write that would change it is reported as dropped.
    ReadOnly,
    /// Nobody; guests write it as routine, so a write is not worth a report.
    Ignored,
    /// A permissive guest writes the device, another guest's write is dropped.
    Permissive,
    /// The register's own code in `VirtualConfig` decides.
    Own,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Which register.
    pub name: Name,
    /// First byte.
    pub offset: u16,
    /// Number of bytes, at least one.
    pub length: u16,
    /// Who may write it.
    pub rule: Rule,
    /// Why that rule.
    pub reason: &'static str,
}

impl Register {
    /// The first byte behind the register.
    pub const fn end(&self) -> u16 {
        self.offset + self.length
    }
}

const fn entry(offset: u16, length: u16, name: Name, rule: Rule, reason: &'static str) -> Register {
    Register { name, offset, length, rule, reason }
}

const BAR: &str = "shows the resource list; a guest sizes it and never moves it";
const IDENTITY: &str = "says what the device is";

/// The 64 bytes of a type 0 header.
#[rustfmt::skip]
const HEADER: [Register; 23] = [
    entry(0x00, 2, Name::Vendor, Rule::ReadOnly, IDENTITY),
    entry(0x02, 2, Name::Device, Rule::ReadOnly, IDENTITY),
    entry(0x04, 2, Name::Command, Rule::Own, "decoding never goes off under the host's feet (XSA-120, XSA-126)"),
    entry(0x06, 2, Name::Status, Rule::Permissive, "error bits are the host's evidence; writing 1 clears them"),
    entry(0x08, 4, Name::Class, Rule::ReadOnly, IDENTITY),
    entry(0x0c, 1, Name::CacheLine, Rule::Own, "goes to the device: memory write and invalidate needs it"),
    entry(0x0d, 1, Name::Latency, Rule::Ignored, "shares the bus among its devices: the host's choice"),
    entry(0x0e, 1, Name::HeaderType, Rule::ReadOnly, "the multifunction bit tells of the guest's slot, not the host's"),
    entry(0x0f, 1, Name::Bist, Rule::Own, "a guest may start the self test and nothing else"),
    entry(0x10, 4, Name::Bar(0), Rule::Own, BAR),
    entry(0x14, 4, Name::Bar(1), Rule::Own, BAR),
    entry(0x18, 4, Name::Bar(2), Rule::Own, BAR),
    entry(0x1c, 4, Name::Bar(3), Rule::Own, BAR),
    entry(0x20, 4, Name::Bar(4), Rule::Own, BAR),
    entry(0x24, 4, Name::Bar(5), Rule::Own, BAR),
    entry(0x28, 4, Name::CardbusCis, Rule::ReadOnly, IDENTITY),
    entry(0x2c, 4, Name::Subsystem, Rule::ReadOnly, IDENTITY),
    entry(0x30, 4, Name::Rom, Rule::Own, BAR),
    entry(0x34, 1, Name::CapabilityPointer(0), Rule::ReadOnly, IDENTITY),
    entry(0x35, 7, Name::Reserved, Rule::ReadOnly, "reserved by the specification"),
    entry(0x3c, 1, Name::InterruptLine, Rule::Ignored, "reads the guest's pirq; firmware's notepad otherwise"),
    entry(0x3d, 1, Name::InterruptPin, Rule::ReadOnly, IDENTITY),
    entry(0x3e, 2, Name::Timing, Rule::ReadOnly, IDENTITY),
];

/// Capabilities a list can hold: 48 dwords lie between the header and the end.
const MOST_CAPABILITIES: usize = ((EXTENDED - HEADER_END) / 4) as usize;

/// A capability found by the walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Where it starts.
    pub offset: u16,
    /// Its id.
    pub id: u8,
    /// Bytes of the registers that are known of it, two at least.
    pub length: u16,
    /// What it says cannot be, so no guest sees it.
    pub hidden: bool,
}

impl Found {
    /// The first byte behind.
    const fn end(&self) -> u16 {
        self.offset + self.length
    }
}

/// The capabilities of the device in the order of its list, each offset once.
pub fn walk<C: ConfigSpace>(hardware: &C) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::with_capacity(MOST_CAPABILITIES);
    if hardware.read(offset::STATUS, Width::Word) as u16 & STATUS_CAPABILITIES == 0 {
        return found;
    }
    let mut at = pointer(hardware.read(offset::CAPABILITIES, Width::Byte));
    while found.len() < MOST_CAPABILITIES && at >= HEADER_END && !found.iter().any(|seen| seen.offset == at) {
        let header = hardware.read(at, Width::Word);
        if header & 0xffff == 0xffff {
            break;
        }
        let id = header as u8;
        found.push(Found { offset: at, id, length: length(hardware, at, id), hidden: false });
        at = pointer(header >> 8);
    }
    // The walk proved only the first two bytes of each. Of two that lie on each other nobody knows which is true.
    let places: Vec<(u16, u16)> = found.iter().map(|capability| (capability.offset, capability.end())).collect();
    for capability in &mut found {
        let on_it = |(start, end): &(u16, u16)| capability.offset < *end && *start < capability.end();
        capability.hidden = capability.end() > EXTENDED || places.iter().filter(|place| on_it(place)).count() > 1;
    }
    for capability in found.iter_mut().filter(|found| found.id == capability::MSIX && !found.hidden) {
        capability.hidden = Msix::read(hardware, capability.offset).nonsense().is_some();
    }
    hide_tables_without_register(hardware, &mut found);
    found
}

/// Xen takes the place of an MSI-X table from the base address register alone. Where Enhanced Allocation has it
/// instead, Xen cannot protect the table, and maps no vector: such a capability is of no use to a guest.
fn hide_tables_without_register<C: ConfigSpace>(hardware: &C, list: &mut [Found]) {
    let allocations = list.iter().filter(|found| found.id == capability::ALLOCATION);
    let moved = allocations.fold(0, |moved, found| moved | allocation::registers(hardware, found.offset));
    for found in list.iter_mut().filter(|found| found.id == capability::MSIX && !found.hidden) {
        let Msix { table, pending, .. } = Msix::read(hardware, found.offset);
        found.hidden = [table, pending].iter().any(|place| moved >> place.bar & 1 != 0);
    }
}

/// Bytes of a capability's registers, as far as they have rules or are used here. Of PCI Express those that every version
/// has (version 1 ends behind Link Status).
fn length<C: ConfigSpace>(hardware: &C, at: u16, id: u8) -> u16 {
    match id {
        capability::POWER | capability::VPD => 8,
        capability::MSI => Msi::length(hardware.read(at + 2, Width::Word) as u16),
        capability::MSIX => 12,
        capability::EXPRESS => 20,
        capability::ADVANCED => 6,
        _ => 2,
    }
}

/// A list pointer: one byte whose low two bits are reserved.
fn pointer(byte: u32) -> u16 {
    (byte & 0xfc) as u16
}

/// Offset of the first capability of `list` that a guest sees, 0 for none.
fn first_shown(list: &[Found]) -> u8 {
    list.iter().find(|capability| !capability.hidden).map_or(0, |capability| capability.offset as u8)
}

/// The table of `hardware`, a function with a type 0 header, whose capabilities are `list`.
pub fn table<C: ConfigSpace>(hardware: &C, list: &[Found]) -> Vec<Register> {
    let mut found: Vec<(Found, u8)> = list
        .iter()
        .enumerate()
        .map(|(index, capability)| (*capability, first_shown(list.get(index + 1..).unwrap_or_default())))
        .collect();
    found.sort_unstable_by_key(|(capability, _)| capability.offset);
    let mut table = Vec::with_capacity(HEADER.len() + 5 * found.len() + 2);
    table.extend_from_slice(&HEADER);
    if let Some(register) = table.iter_mut().find(|register| register.offset == offset::CAPABILITIES) {
        register.name = Name::CapabilityPointer(first_shown(list));
    }
    for (index, (capability, next)) in found.iter().enumerate() {
        // The next capability's start clips this one. Starts are dwords, so what has code of its own
        // (all within a dword) is there as a whole or not at all.
        let limit = found.get(index + 1).map_or(EXTENDED, |(behind, _)| behind.offset);
        raw_up_to(&mut table, capability.offset);
        push_capability(&mut table, hardware, *capability, *next, limit);
    }
    raw_up_to(&mut table, EXTENDED);
    if is_mirrored(hardware) {
        let reason = "the first 256 bytes show again there, and their rules would not hold";
        table.push(entry(EXTENDED, SPACE - EXTENDED, Name::Absent, Rule::ReadOnly, reason));
    }
    raw_up_to(&mut table, SPACE);
    table
}

/// Whether the first 256 bytes show again in the place of extended space, as behind some bridges that drop the upper
/// address bits.
fn is_mirrored<C: ConfigSpace>(hardware: &C) -> bool {
    let first = hardware.read(offset::VENDOR, Width::Dword);
    first != u32::MAX && (EXTENDED..SPACE).step_by(0x100).all(|at| hardware.read(at, Width::Dword) == first)
}

/// Opens registers that have no rule of their own; returns those that cannot be, each with what is in the way.
pub fn open(table: &mut Vec<Register>, quirks: &[Quirk]) -> Vec<(Quirk, Name)> {
    let mut refused = Vec::new();
    for quirk in quirks {
        let end = quirk.offset + quirk.size;
        let at = table.partition_point(|register| register.end() <= quirk.offset);
        let Some(register) = table.get(at).copied() else { continue };
        if register.name != Name::Raw || register.end() < end {
            // A register of less than four bytes may be followed by the one in the way.
            let behind = table.iter().skip(at).take_while(|register| register.offset < end);
            let name = behind.map(|register| register.name).find(|name| *name != Name::Raw);
            refused.push((*quirk, name.unwrap_or(register.name)));
            continue;
        }
        let parts = [
            Register { length: quirk.offset - register.offset, ..register },
            entry(quirk.offset, quirk.size, Name::Opened { mask: quirk.mask }, Rule::Own, "the configuration opens it"),
            Register { offset: end, length: register.end() - end, ..register },
        ];
        table.splice(at..=at, parts.into_iter().filter(|part| part.length > 0));
    }
    refused
}

fn raw_up_to(table: &mut Vec<Register>, end: u16) {
    let start = table.last().map_or(0, Register::end);
    if start < end {
        let reason = "nobody knows what it does: only for guests trusted with the device";
        table.push(entry(start, end - start, Name::Raw, Rule::Permissive, reason));
    }
}

/// Appends the registers of one capability, those that start before `limit`.
fn push_capability<C: ConfigSpace>(table: &mut Vec<Register>, hardware: &C, capability: Found, next: u8, limit: u16) {
    let mut push = |at: u16, length: u16, name: Name, rule: Rule, reason: &'static str| {
        let start = capability.offset + at;
        if start < limit {
            table.push(entry(start, length.min(limit - start), name, rule, reason));
        }
    };
    let id = capability.id;
    if capability.hidden {
        for at in (0..capability.length).step_by(4) {
            push(at, 4, Name::Hidden, Rule::ReadOnly, "what it says of itself cannot be");
        }
        return;
    }
    push(0, 2, Name::CapabilityHeader { id, next }, Rule::ReadOnly, "the list is the device's");
    match id {
        capability::POWER => {
            push(2, 2, Name::PowerCapabilities, Rule::ReadOnly, "wake events are the host's, so none is offered");
            push(4, 2, Name::PowerControl, Rule::Own, "a guest chooses the power state and never turns on wake events");
            push(6, 2, Name::PowerData, Rule::ReadOnly, IDENTITY);
        }
        capability::VPD => {
            push(2, 2, Name::VpdAddress, Rule::Own, "starts a read; a write would outlive the guest");
            push(4, 4, Name::VpdData, Rule::ReadOnly, "data of a write that is not allowed");
        }
        capability::MSI => {
            let control = hardware.read(capability.offset + 2, Width::Word) as u16;
            push(2, 2, Name::MsiControl, Rule::Own, "on and off are operations of the protocol");
            push(4, Msi::length(control) - 4, Name::MsiMessage, Rule::ReadOnly, MESSAGE);
        }
        capability::MSIX => {
            push(2, 2, Name::MsixControl, Rule::Own, "on and off are operations of the protocol");
            push(4, 8, Name::MsixLocation, Rule::ReadOnly, IDENTITY);
        }
        _ => {}
    }
}

const MESSAGE: &str = "where interrupts go is Xen's (XSA-128)";
