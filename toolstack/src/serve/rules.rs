//! Which configuration writes a driver domain may have made to a function of its own: those that reach nothing but that
//! function. A write that moves its registers onto others', makes functions that no IOMMU context is for, or opens a way
//! around the IOMMU is refused, and so is one to the registers of interrupts that are Xen's.
//!
//! The layout is read from the hardware, not told by the driver domain, and the addresses are dom0's (sysfs).

use pciback::config::registers::{EXTENDED, SPACE, capability, command, offset};
use pciback::platform::Width;

use crate::sysfs::{Function, Resource};

/// Extended capability ids (PCI Express Base 5.0, 7.8 to 7.9; SR-IOV 1.1).
mod extended {
    pub const ACS: u16 = 0x0d;
    pub const ATS: u16 = 0x0f;
    pub const SRIOV: u16 = 0x10;
    pub const PRI: u16 = 0x13;
    pub const RESIZABLE_BAR: u16 = 0x15;
    pub const PASID: u16 = 0x1b;
    pub const RESIZABLE_VF_BAR: u16 = 0x24;
}

/// Capability ids that `pciback::config` has no need of.
const HYPERTRANSPORT: u8 = 0x08;
const ENHANCED_ALLOCATION: u8 = 0x14;

/// What a range of registers allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Only dom0's own value: address bits and value.
    Address(u32, u32),
    /// No write, for this reason.
    Never(&'static str),
    /// Bits that are clear stay clear.
    NoNewBits,
    /// Bits that are set stay set.
    NoLessBits,
}

/// The rules of one function; what no rule covers is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    ranges: Vec<(u16, u16, Rule)>,
    /// The MSI-X table's BAR, if there is one.
    table_bar: Option<u8>,
    /// Addresses of the BARs.
    bars: [u64; 6],
    /// Bits of Command: memory, ports.
    decode: u16,
}

/// A word of a configuration space; all ones behind its end.
pub fn word(space: &[u8], at: u16) -> u16 {
    let at = usize::from(at);
    u16::from_le_bytes([space.get(at).copied().unwrap_or(0xff), space.get(at + 1).copied().unwrap_or(0xff)])
}

fn dword(space: &[u8], at: u16) -> u32 {
    u32::from(word(space, at)) | u32::from(word(space, at + 2)) << 16
}

/// Ids and offsets of the capabilities: a bounded walk.
pub fn capabilities(space: &[u8]) -> Vec<(u8, u16)> {
    let mut found = Vec::new();
    if word(space, 0x06) & 0x10 == 0 {
        return found;
    }
    let mut at = word(space, 0x34) & 0xfc;
    while at >= 0x40 && found.len() < 48 && !found.iter().any(|(_, seen)| *seen == at) {
        let header = word(space, at);
        found.push((header as u8, at));
        at = header >> 8 & 0xfc;
    }
    found
}

fn extended_capabilities(space: &[u8]) -> Vec<(u16, u16)> {
    let mut found: Vec<(u16, u16)> = Vec::new();
    let mut at = EXTENDED;
    while at >= EXTENDED && usize::from(at) + 4 <= space.len() && !found.iter().any(|(_, seen)| *seen == at) {
        let header = dword(space, at);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((header as u16, at));
        at = (header >> 20) as u16 & 0xffc;
    }
    found
}

impl Rules {
    /// The rules for a function whose configuration space reads `space` (256 or 4096 bytes). `None` if it does not answer.
    pub fn new(function: &Function, space: &[u8]) -> Option<Rules> {
        let ids = (word(space, 0), word(space, 2));
        // A virtual function has no ids of its own, but a class (SR-IOV 1.1, 3.4.1).
        let answers = ids == function.id
            || function.is_virtual && ids == (u16::MAX, u16::MAX) && dword(space, offset::CLASS) >> 8 == function.class;
        if space.len() < 256 || !answers {
            return None;
        }
        let mut ranges = Vec::new();
        let mut bars = [0; 6];
        let mut upper = false;
        for (number, resource) in function.resources.iter().take(6).enumerate() {
            let at = offset::BAR0 + 4 * number as u16;
            if std::mem::take(&mut upper) {
                continue;
            }
            let address = if resource.is_in_register() { resource.start } else { 0 };
            if let Some(bar) = bars.get_mut(number) {
                *bar = address;
            }
            if function.is_virtual {
                // Its addresses are the physical function's to set; here is nothing to write.
                continue;
            }
            let mask = if resource.is_io() { !0x3 } else { !0xf };
            ranges.push((at, at + 4, Rule::Address(mask, address as u32)));
            // Whether it has an upper half, its type bits say; they cannot be written.
            if number < 5 && dword(space, at) & 0x7 == 0x4 {
                ranges.push((at + 4, at + 8, Rule::Address(u32::MAX, (address >> 32) as u32)));
                upper = true;
            }
        }
        let rom = function.resources.get(6).filter(|resource| resource.is_used()).map_or(0, |rom| rom.start as u32);
        if function.is_virtual {
            ranges.push((
                offset::BAR0,
                offset::BAR0 + 24,
                Rule::Never("a virtual function has no addresses of its own"),
            ));
        }
        ranges.push((offset::ROM, offset::ROM + 4, Rule::Address(!0x7ff, rom)));

        let mut table_bar = None;
        for (id, at) in capabilities(space) {
            match id {
                capability::MSI => {
                    let control = word(space, at + 2);
                    let length = if control & 0x80 != 0 { 0x0e } else { 0x0a };
                    let length = if control & 0x100 != 0 { length + 0x0a } else { length };
                    ranges.push((at + 4, at + length, Rule::Never("Xen alone sets MSI addresses, data and masks")));
                }
                capability::MSIX => table_bar = Some((dword(space, at + 4) & 7) as u8),
                HYPERTRANSPORT => ranges.push((at, at + 0x1c, Rule::Never("it is HyperTransport's"))),
                ENHANCED_ALLOCATION => ranges.push((at, at + 0x40, Rule::Never("it moves the function's registers"))),
                _ => {}
            }
        }
        for (id, at) in extended_capabilities(space) {
            let end = |length: u16| (at + length).min(SPACE);
            match id {
                extended::SRIOV => ranges.push((at, end(0x40), Rule::Never("it makes virtual functions"))),
                extended::RESIZABLE_BAR | extended::RESIZABLE_VF_BAR => {
                    ranges.push((at, end(0x34), Rule::Never("it moves the function's registers")));
                }
                extended::ATS => ranges.push((at + 6, end(8), Rule::NoNewBits)),
                extended::PRI => ranges.push((at + 4, end(6), Rule::NoNewBits)),
                extended::PASID => ranges.push((at + 6, end(8), Rule::NoNewBits)),
                extended::ACS => ranges.push((at + 6, end(8), Rule::NoLessBits)),
                _ => {}
            }
        }
        let used = function.resources.iter().take(6).filter(|resource| resource.is_used() && !function.is_virtual);
        let bit = |resource: &Resource| if resource.is_io() { command::IO } else { command::MEMORY };
        let decode = used.map(bit).fold(0, |all, bit| all | bit);
        Some(Rules { ranges, table_bar, bars, decode })
    }

    /// Address of the BAR that holds the MSI-X table.
    pub fn table_base(&self) -> Option<u64> {
        self.bars.get(usize::from(self.table_bar?)).copied().filter(|base| *base != 0)
    }

    /// Whether the function has an MSI-X capability. Xen's prepare and release follow a null pointer for one without.
    pub fn has_msix(&self) -> bool {
        self.table_bar.is_some()
    }

    /// The base address registers: offset, address bits, dom0's address.
    pub fn addresses(&self) -> impl Iterator<Item = (u16, u32, u32)> {
        let bars = self.ranges.iter().filter(|(first, ..)| *first < offset::ROM);
        bars.filter_map(|(first, _, rule)| match rule {
            Rule::Address(mask, address) => Some((*first, *mask, *address)),
            _ => None,
        })
    }

    /// Whether the registers are where dom0 knows them: Xen takes the place of the MSI-X table from them.
    pub fn is_in_place(&self, now: impl Fn(u16, Width) -> Option<u32>) -> bool {
        self.addresses()
            .all(|(first, mask, address)| now(first, Width::Dword).is_some_and(|value| value & mask == address & mask))
    }

    /// The bits of Command with which the function answers to all its addresses.
    pub fn decode(&self) -> u16 {
        self.decode
    }

    /// Judges a write. `now` reads the register as it is.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn judge(
        &self,
        at: u16,
        width: Width,
        value: u32,
        now: impl Fn(u16, Width) -> Option<u32>,
    ) -> Result<(), &'static str> {
        let end = at + width.bytes();
        for (first, last, rule) in self.ranges.iter().filter(|(first, last, _)| at < *last && *first < end) {
            match *rule {
                Rule::Never(why) => return Err(why),
                Rule::Address(mask, address) => {
                    if width != Width::Dword || at != *first {
                        return Err("a base address register is written whole");
                    }
                    if value & mask != address & mask {
                        return Err("it moves the function's registers");
                    }
                }
                Rule::NoNewBits | Rule::NoLessBits => {
                    let held = now(at, width).ok_or("the function does not answer")?;
                    let covered = |byte: u16| (*first..*last).contains(&(at + byte));
                    let bits =
                        (0..width.bytes()).filter(|byte| covered(*byte)).fold(0, |m, byte| m | 0xff << (8 * byte));
                    let (held, value) = (held & bits, value & bits);
                    if *rule == Rule::NoNewBits && value & !held != 0 {
                        return Err("it would let the function go around the IOMMU");
                    }
                    if *rule == Rule::NoLessBits && held & !value != 0 {
                        return Err("it would let functions reach each other past the IOMMU");
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const BAR: u64 = 0x38_0000_4000;

    fn space() -> Vec<u8> {
        let mut space = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x86, 0x80, 0xd3, 0x10]);
        put(6, &[0x10, 0]);
        put(0x10, &0x0000_4004u32.to_le_bytes());
        put(0x14, &0x38u32.to_le_bytes());
        put(0x18, &0xc001u32.to_le_bytes());
        put(0x34, &[0x40]);
        put(0x40, &[0x05, 0x60, 0x80, 0x01]); // MSI, 64 bits, masks
        put(0x60, &[0x11, 0x80, 0x04, 0x00, 0x00, 0x20, 0, 0]); // MSI-X, BAR 0
        put(0x80, &[0x10, 0x00]); // PCI Express, the last
        put(0x100, &[0x10, 0x00, 0x01, 0x14]); // SR-IOV, next 0x140
        put(0x140, &[0x0f, 0x00, 0x01, 0x15]); // ATS
        put(0x150, &[0x0d, 0x00, 0x01, 0x16]); // ACS
        put(0x156, &[0x1d, 0x00]);
        put(0x160, &[0x15, 0x00, 0x01, 0x00]); // resizable BAR, the last
        space
    }

    /// A function with a 64-bit BAR at [`BAR`], ports and a ROM.
    pub fn function() -> Function {
        let mut resources = [Resource::default(); 7];
        resources[0] = Resource { start: BAR, end: BAR + 0x3fff, flags: 0x14_0204 };
        resources[2] = Resource { start: 0xc000, end: 0xc01f, flags: 0x4_0101 };
        resources[6] = Resource { start: 0xfeb4_0000, end: 0xfeb7_ffff, flags: 0x4_6200 };
        Function {
            sbdf: "0000:01:00.0".parse().unwrap(),
            id: (0x8086, 0x10d3),
            class: 0x02_0000,
            header_type: 0,
            is_virtual: false,
            resources,
            irq: 0,
            driver: None,
            driver_override: None,
        }
    }

    fn judge(at: u16, width: Width, value: u32) -> Result<(), &'static str> {
        let space = space();
        let rules = Rules::new(&function(), &space).expect("it answers");
        rules.judge(at, width, value, |at, width| Some(dword(&space, at) & width.mask()))
    }

    #[test]
    fn a_base_address_register_takes_only_dom0s_value() {
        for (at, value) in
            [(0x10, 0x4004), (0x14, 0x38), (0x18, 0xc001), (0x18, 0xc000), (0x24, 0), (0x30, 0xfeb4_0001)]
        {
            assert_eq!(judge(at, Width::Dword, value), Ok(()), "{at:#x} {value:#x}");
        }
        for (at, value) in [
            (0x10, 0x5004),
            (0x14, 0x39),
            (0x18, 0xc101),
            (0x1c, 0x1000),
            (0x24, 0xffff_ffff),
            (0x30, 0xfee0_0001),
            (0x30, 1),
        ] {
            assert!(judge(at, Width::Dword, value).is_err(), "{at:#x} {value:#x}");
        }
        assert!(judge(0x10, Width::Word, 0x4004).is_err());
        assert!(judge(0x12, Width::Word, 0).is_err());
        assert!(judge(0x33, Width::Byte, 0xfe).is_err());
    }

    #[test]
    fn a_virtual_function_answers_without_ids_and_its_addresses_are_not_written() {
        let whole = Function { is_virtual: true, ..function() };
        let mut space = space();
        space[..4].fill(0xff);
        space[8..12].copy_from_slice(&[0x01, 0x00, 0x00, 0x02]);
        space[0x10..0x28].fill(0);
        let rules = Rules::new(&whole, &space).expect("it answers");
        let now = |at: u16, width: Width| Some(dword(&space, at) & width.mask());
        assert_eq!(rules.table_base(), Some(BAR));
        assert_eq!(rules.decode(), 0, "it has no such bits");
        assert!(rules.is_in_place(now));
        for at in (0x10..0x28).step_by(4) {
            assert!(rules.judge(at, Width::Dword, 0x4004, now).is_err(), "{at:#x}");
        }
        assert_eq!(rules.judge(0x04, Width::Word, 0x0004, now), Ok(()));
        assert_eq!(Rules::new(&function(), &space), None, "an ordinary one has ids");
        space[8..12].fill(0xff);
        assert_eq!(Rules::new(&whole, &space), None, "nothing is there");
    }

    /// A Cavium ThunderX has its addresses in its Enhanced Allocation capability, and zeros in the registers for good:
    /// nothing of it was lost.
    #[test]
    fn addresses_of_enhanced_allocation_are_in_no_register() {
        let mut resources = [Resource::default(); 7];
        resources[0] = Resource { start: 0x8430_0000_0000, end: 0x8430_3fff_ffff, flags: 0x10_0220 };
        let allocated = Function { resources, ..function() };
        let mut space = space();
        space[0x10..0x34].fill(0);
        let now = |at: u16, width: Width| Some(dword(&space, at) & width.mask());
        let rules = Rules::new(&allocated, &space).expect("it answers");
        assert!(rules.is_in_place(now));
        assert_eq!((rules.decode(), rules.table_base()), (command::MEMORY, None));
        assert!(rules.judge(0x10, Width::Dword, 0x8000_0000, now).is_err());
    }

    #[test]
    fn message_interrupts_are_turned_on_and_not_aimed() {
        assert_eq!(judge(0x42, Width::Word, 0x81), Ok(()));
        assert_eq!(judge(0x62, Width::Word, 0xc004), Ok(()));
        for at in (0x44..0x58).step_by(4) {
            assert!(judge(at, Width::Dword, 0).is_err(), "{at:#x}");
        }
        assert!(judge(0x40, Width::Dword, 0).is_ok(), "id, next and control");
        assert!(judge(0x58, Width::Dword, 0).is_ok(), "behind the capability");
    }

    #[test]
    fn what_reaches_past_the_function_is_refused() {
        assert!(judge(0x108, Width::Dword, 1).is_err(), "virtual functions");
        assert!(judge(0x168, Width::Dword, 0).is_err(), "another size");
        assert!(judge(0x146, Width::Word, 0x8000).is_err(), "ATS");
        assert_eq!(judge(0x146, Width::Word, 0), Ok(()));
        assert!(judge(0x144, Width::Dword, 0x8000_0000).is_err());
        assert!(judge(0x156, Width::Word, 0x1c).is_err(), "ACS");
        assert_eq!(judge(0x156, Width::Word, 0x1f), Ok(()));
        assert_eq!(judge(0x04, Width::Word, 0x0406), Ok(()));
        assert_eq!(judge(0x88, Width::Word, 0xa810), Ok(()), "a function level reset");
    }

    #[test]
    fn a_function_that_does_not_answer_has_no_rules() {
        assert_eq!(Rules::new(&function(), &[0xff; 4096]), None);
        assert_eq!(Rules::new(&function(), &[]), None);
        let rules = Rules::new(&function(), &space()).unwrap();
        assert_eq!(rules.table_base(), Some(BAR));
    }
}
