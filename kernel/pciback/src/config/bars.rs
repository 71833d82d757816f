//! Base address registers as a guest sees them: values and sizes of the resource list, never the
//! device's. What is written only chooses whether the next read gives the address or the size
//! (PCI Local Bus Specification 3.0, section 6.2.5.1).

use super::Refusal;
use super::registers::{command, offset};
use crate::platform::{ConfigSpace, Width};

/// Base address registers of a type 0 header.
const BARS: usize = 6;
/// Index of the expansion ROM in a resource list.
pub const ROM: usize = 6;

/// Bits of [`Resource::flags`], from Linux's `ioport.h`.
mod flag {
    /// In the ROM's entry: the ROM is enabled.
    #[doc(alias = "IORESOURCE_ROM_ENABLE")]
    pub const ROM_ENABLE: u64 = 1 << 0;
    /// In the ROM's entry: the address is a copy in memory, not the device's.
    #[doc(alias = "IORESOURCE_ROM_SHADOW")]
    pub const ROM_SHADOW: u64 = 1 << 1;
    /// The address comes from an Enhanced Allocation entry; the base address register reads zero.
    #[doc(alias = "IORESOURCE_PCI_EA_BEI")]
    pub const ENHANCED_ALLOCATION: u64 = 1 << 5;
    #[doc(alias = "IORESOURCE_IO")]
    pub const IO: u64 = 0x100;
    #[doc(alias = "IORESOURCE_MEM")]
    pub const MEMORY: u64 = 0x200;
    #[doc(alias = "IORESOURCE_PREFETCH")]
    pub const PREFETCH: u64 = 0x2000;
    #[doc(alias = "IORESOURCE_MEM_64")]
    pub const MEMORY_64: u64 = 0x10_0000;
    /// `IORESOURCE_DISABLED`, `IORESOURCE_UNSET` and `IORESOURCE_BUSY`: there is no address to show.
    pub const NOT_USABLE: u64 = 0x1000_0000 | 0x2000_0000 | 0x8000_0000;
}

/// Low bits of a base address register.
mod low {
    /// The register is of I/O kind.
    pub const IO: u32 = 1 << 0;
    /// A memory register of 64 bits: the next register is its upper half.
    pub const MEMORY_64: u32 = 1 << 2;
    /// Reads have no side effects.
    pub const PREFETCH: u32 = 1 << 3;
    /// All bits of an I/O register that are no address.
    pub const IO_MASK: u32 = 0x3;
    /// All bits of a memory register that are no address.
    pub const MEMORY_MASK: u32 = 0xf;
    /// In the ROM's register: the ROM answers.
    pub const ROM_ENABLE: u32 = 1 << 0;
    /// All bits of the ROM's register that are no address.
    pub const ROM_MASK: u32 = 0x7ff;
}

/// One line of a device's `resource` file in Linux's sysfs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resource {
    /// First address.
    pub start: u64,
    /// Last address; 0 where there is no resource.
    pub end: u64,
    /// `IORESOURCE_*` flags.
    pub flags: u64,
}

impl Resource {
    /// The seven resources (BAR 0 to 5, ROM) of a `resource-N` node: `0xSTART 0xEND 0xFLAGS` each,
    /// joined by `;`. Anything else is `None`.
    pub fn parse_list(text: &str) -> Option<[Resource; 7]> {
        let mut list = [Resource::default(); 7];
        let mut lines = text.split(';');
        for resource in &mut list {
            *resource = Resource::parse(lines.next()?)?;
        }
        if lines.next().is_some() { None } else { Some(list) }
    }

    fn parse(line: &str) -> Option<Resource> {
        let mut words = line.split(' ').map(hex);
        let resource = Resource { start: words.next()??, end: words.next()??, flags: words.next()?? };
        if words.next().is_some() { None } else { Some(resource) }
    }

    /// Whether the resource has an address and a length.
    fn usable(&self) -> bool {
        self.flags & (flag::IO | flag::MEMORY) != 0
            && self.flags & flag::NOT_USABLE == 0
            && self.end != 0
            && self.end >= self.start
    }

    /// Whether a base address register shows it.
    fn in_register(&self) -> bool {
        self.usable() && self.flags & flag::ENHANCED_ALLOCATION == 0
    }

    fn is_io(&self) -> bool {
        self.flags & flag::IO != 0
    }

    fn is_64(&self) -> bool {
        !self.is_io() && self.flags & flag::MEMORY_64 != 0
    }

    /// The size, where a base address register can express it: a power of two at a multiple of
    /// itself, reachable with the register's width.
    fn size(&self) -> Option<u64> {
        let size = (self.end - self.start).checked_add(1)?;
        let reachable = self.is_64() || self.end <= u64::from(u32::MAX);
        (size.is_power_of_two() && self.start & (size - 1) == 0 && reachable).then_some(size)
    }

    /// The type bits of its base address register.
    fn low_bits(&self) -> u32 {
        if self.is_io() {
            return low::IO;
        }
        let wide = if self.is_64() { low::MEMORY_64 } else { 0 };
        let prefetch = if self.flags & flag::PREFETCH != 0 { low::PREFETCH } else { 0 };
        wide | prefetch
    }
}

/// A hexadecimal number with `0x` and 1 to 16 digits.
fn hex(word: &str) -> Option<u64> {
    let digits = word.strip_prefix("0x")?;
    let plain = digits.len() <= 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if plain { u64::from_str_radix(digits, 16).ok() } else { None }
}

/// One base address register (or the ROM's) of one guest.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Address and type bits.
    value: u32,
    /// What it reads while it is being sized.
    size: u32,
    /// Bits that do not count when all ones are looked for.
    no_address: u32,
    /// Whether a guest may write `value` back into a device that has lost it.
    restorable: bool,
    /// The last write was all ones: reads give the size.
    sizing: bool,
}

/// What became of a write to a [`Bar`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarWrite {
    /// All there is to do is done.
    Done,
    /// The guest asked for another address.
    Moved,
    /// The device has lost this value, and the guest asks to have it back.
    Restore(u32),
}

impl Bar {
    /// A register with no address: it reads zero, sized or not, and nothing is restored to it.
    const fn absent(no_address: u32) -> Bar {
        Bar { value: 0, size: 0, no_address, restorable: false, sizing: false }
    }

    fn new(resource: &Resource, size: u64, no_address: u32, low: u32) -> Bar {
        let size = size.wrapping_neg() as u32;
        Bar { value: resource.start as u32 | low, size: size | low, no_address, restorable: true, sizing: false }
    }

    /// The upper half of a 64-bit register: all address, whatever its low bits look like.
    fn upper(resource: &Resource, size: u64) -> Bar {
        let size = (size.wrapping_neg() >> 32) as u32;
        Bar { value: (resource.start >> 32) as u32, size, no_address: 0, restorable: true, sizing: false }
    }

    /// What the guest reads.
    pub fn read(&self) -> u32 {
        if self.sizing { self.size } else { self.value }
    }

    /// Takes the guest's `value`, while the device's register holds `hardware`.
    pub fn write(&mut self, value: u32, hardware: u32) -> BarWrite {
        self.sizing = value | self.no_address == u32::MAX;
        if self.sizing {
            BarWrite::Done
        } else if value != self.value {
            BarWrite::Moved
        } else if self.restorable && (hardware ^ value) & !self.no_address != 0 {
            BarWrite::Restore(value)
        } else {
            BarWrite::Done
        }
    }
}

/// The registers of one guest, from its resource list.
#[derive(Clone, Copy, Debug)]
pub struct Bars {
    bars: [Bar; BARS + 1],
    /// Address and size of each that is memory, else zeros.
    memory: [(u64, u64); BARS],
    /// The Command bits that turn on decoding of what the list names.
    pub decode: u16,
}

impl Bars {
    /// Checks the list against itself and against the device. A virtual function's registers read zero and take
    /// nothing: its addresses come from the physical function, and decoding is switched there (SR-IOV 1.1, 3.3.3.4
    /// and 3.4.1.11).
    ///
    /// # Errors
    /// [`Refusal::Resource`] or [`Refusal::Bar`] with the first register that does not fit.
    pub fn new<C: ConfigSpace>(hardware: &C, list: &[Resource; 7], is_virtual: bool) -> Result<Bars, Refusal> {
        let mut bars = Bars { bars: [Bar::absent(low::MEMORY_MASK); BARS + 1], memory: [(0, 0); BARS], decode: 0 };
        for resource in list.iter().filter(|resource| resource.usable() && !is_virtual) {
            bars.decode |= if resource.is_io() { command::IO } else { command::MEMORY };
        }
        let [registers @ .., rom] = list;
        for (memory, resource) in bars.memory.iter_mut().zip(registers) {
            if resource.usable() && !resource.is_io() {
                *memory = (resource.start, (resource.end - resource.start).saturating_add(1));
            }
        }
        let mut halves = bars.bars.iter_mut().zip(registers).enumerate();
        while let Some((index, (bar, resource))) = halves.next() {
            if !resource.in_register() {
                check_absent(hardware, index)?;
                continue;
            }
            let size = resource.size().ok_or(Refusal::Resource { index })?;
            check(hardware, index, resource)?;
            let no_address = if resource.is_io() { low::IO_MASK } else { low::MEMORY_MASK };
            *bar = Bar { restorable: !is_virtual, ..Bar::new(resource, size, no_address, resource.low_bits()) };
            if resource.is_64() {
                let (_, (upper, _)) = halves.next().ok_or(Refusal::Resource { index })?;
                *upper = Bar { restorable: !is_virtual, ..Bar::upper(resource, size) };
            }
        }
        bars.bars[ROM] = rom_bar(hardware, rom)?;
        Ok(bars)
    }

    /// Address of memory BAR `index`, if it has at least `size` bytes.
    pub fn memory(&self, index: usize, size: u64) -> Option<u64> {
        self.memory.get(index).filter(|(start, has)| *start != 0 && size <= *has).map(|(start, _)| *start)
    }

    /// Register `index`: 0 to 5, or [`ROM`].
    pub fn get(&self, index: usize) -> Option<&Bar> {
        self.bars.get(index)
    }

    /// Register `index`: 0 to 5, or [`ROM`].
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Bar> {
        self.bars.get_mut(index)
    }
}

/// The offset of register `index`.
pub fn register_offset(index: usize) -> u16 {
    if index == ROM { offset::ROM } else { offset::BAR0 + 4 * index as u16 }
}

/// A device that holds an address must hold the listed one: another address would mean that the
/// list is another device's, or out of date.
fn check<C: ConfigSpace>(hardware: &C, index: usize, resource: &Resource) -> Result<(), Refusal> {
    let held = hardware.read(register_offset(index), Width::Dword);
    let no_address = if resource.is_io() { low::IO_MASK } else { low::MEMORY_MASK };
    let mut address = u64::from(held & !no_address);
    if resource.is_64() {
        address |= u64::from(hardware.read(register_offset(index + 1), Width::Dword)) << 32;
    }
    let kind = low::IO | if resource.is_io() { 0 } else { low::MEMORY_64 };
    if address != 0 && (address != resource.start || (held ^ resource.low_bits()) & kind != 0) {
        return Err(Refusal::Bar { index, hardware: address, listed: resource.start });
    }
    Ok(())
}

/// The same for a register whose resource the list does not have.
fn check_absent<C: ConfigSpace>(hardware: &C, index: usize) -> Result<(), Refusal> {
    let held = hardware.read(register_offset(index), Width::Dword);
    let address = held & !if held & low::IO != 0 { low::IO_MASK } else { low::MEMORY_MASK };
    if address != 0 {
        return Err(Refusal::Bar { index, hardware: u64::from(address), listed: 0 });
    }
    Ok(())
}

/// The ROM's register. Linux leaves the device's register as firmware had it while the ROM is off,
/// so only one that is on has to agree with the list. A guest cannot turn the ROM on: one that is
/// off has nothing to restore.
fn rom_bar<C: ConfigSpace>(hardware: &C, resource: &Resource) -> Result<Bar, Refusal> {
    if !resource.in_register() || resource.is_io() || resource.flags & flag::ROM_SHADOW != 0 {
        return Ok(Bar::absent(low::ROM_MASK));
    }
    let narrow = Resource { flags: resource.flags & !flag::MEMORY_64, ..*resource };
    let size = narrow.size().ok_or(Refusal::Resource { index: ROM })?;
    let held = hardware.read(offset::ROM, Width::Dword);
    let address = u64::from(held & !low::ROM_MASK);
    if held & low::ROM_ENABLE != 0 && address != resource.start {
        return Err(Refusal::Bar { index: ROM, hardware: address, listed: resource.start });
    }
    let on = resource.flags & flag::ROM_ENABLE != 0;
    let low = if on { low::ROM_ENABLE } else { 0 };
    Ok(Bar { restorable: on, ..Bar::new(resource, size, low::ROM_MASK, low) })
}
