//! Enhanced Allocation: base addresses that stand in a capability, for good, while the base address registers read
//! zero (PCI-SIG ECN "Enhanced Allocation", 2014). The guest reads the capability and finds its memory; nobody may
//! write it. What is wanted of it here is which registers it stands for.

use super::registers::EXTENDED;
use crate::platform::{ConfigSpace, Width};

/// Number of entries, in the byte behind the list pointer.
const COUNT: u32 = 0x3f;
/// First dword of an entry: dwords behind it.
const SIZE: u32 = 0x7;
/// First dword of an entry: what it stands for; 0 to 5 are the base address registers.
const STANDS_FOR: u32 = 0xf;
/// First dword of an entry: it counts.
#[doc(alias = "PCI_EA_ENABLE")]
const ENABLED: u32 = 1 << 31;

/// The base address registers that the capability at `offset` stands for, a bit each.
pub fn registers<C: ConfigSpace>(hardware: &C, offset: u16) -> u8 {
    let count = hardware.read(offset + 2, Width::Byte) & COUNT;
    let mut at = offset + 4;
    let mut registers = 0;
    for _ in 0..count {
        if at + 4 > EXTENDED {
            break;
        }
        let first = hardware.read(at, Width::Dword);
        let index = first >> 4 & STANDS_FOR;
        if first & ENABLED != 0 && index < 6 {
            registers |= 1 << index;
        }
        at += 4 * (1 + (first & SIZE) as u16);
    }
    registers
}
