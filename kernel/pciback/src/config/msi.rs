//! What a function's MSI and MSI-X capabilities say of themselves: read once, when the function is seized,
//! and believed no further than that (XSA-337).
//! Layouts: PCI Local Bus Specification 3.0, sections 6.8.1 (MSI) and 6.8.2 (MSI-X).

use super::registers::{MSI_64, MSI_MASKABLE};
use crate::platform::{ConfigSpace, Width};

/// Bits of MSI-X Message Control.
pub mod msix_control {
    /// The function uses MSI-X.
    #[doc(alias = "PCI_MSIX_FLAGS_ENABLE")]
    pub const ENABLE: u16 = 1 << 15;
    /// All vectors are masked.
    #[doc(alias = "PCI_MSIX_FLAGS_MASKALL")]
    pub const MASKALL: u16 = 1 << 14;
    /// Number of table entries less one.
    #[doc(alias = "PCI_MSIX_FLAGS_QSIZE")]
    pub const TABLE_SIZE: u16 = 0x07ff;
}

/// Bits of MSI Message Control.
pub mod msi_control {
    /// The function uses MSI.
    #[doc(alias = "PCI_MSI_FLAGS_ENABLE")]
    pub const ENABLE: u16 = 1 << 0;
    /// Binary logarithm of the number of vectors it can have.
    #[doc(alias = "PCI_MSI_FLAGS_QMASK")]
    pub const CAPABLE: u16 = 0x000e;
}

/// An MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Where the capability starts.
    pub offset: u16,
    /// Vectors the function can have: 1 to 32, a power of two.
    pub vectors: u8,
}

impl Msi {
    /// Reads the capability at `offset`.
    pub fn read<C: ConfigSpace>(hardware: &C, offset: u16) -> Msi {
        let control = hardware.read(offset + 2, Width::Word) as u16;
        let log = ((control & msi_control::CAPABLE) >> 1).min(5);
        Msi { offset, vectors: 1 << log }
    }

    /// Offset of Message Control.
    pub const fn control(&self) -> u16 {
        self.offset + 2
    }

    /// Bytes of a capability with this control register.
    pub const fn length(control: u16) -> u16 {
        match (control & MSI_64 != 0, control & MSI_MASKABLE != 0) {
            (false, false) => 0x0a,
            (true, false) => 0x0e,
            (false, true) => 0x14,
            (true, true) => 0x18,
        }
    }
}

/// An MSI-X capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// Where the capability starts.
    pub offset: u16,
    /// Entries of the table: 1 to 2048.
    pub entries: u16,
    /// The table.
    pub table: Place,
    /// The pending bits.
    pub pending: Place,
}

/// A place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the BAR.
    pub bar: u8,
    /// First byte.
    pub start: u32,
    /// Number of bytes.
    pub length: u32,
}

/// Bytes of an entry of the table.
const ENTRY: u32 = 16;

impl Place {
    fn read<C: ConfigSpace>(hardware: &C, register: u16, length: u32) -> Place {
        let value = hardware.read(register, Width::Dword);
        Place { bar: (value & 7) as u8, start: value & !7, length }
    }

    /// The first byte behind.
    pub const fn end(&self) -> u64 {
        self.start as u64 + self.length as u64
    }

    fn overlaps(&self, other: &Place) -> bool {
        self.bar == other.bar && u64::from(self.start) < other.end() && u64::from(other.start) < self.end()
    }
}

impl Msix {
    /// Reads the capability at `offset`.
    pub fn read<C: ConfigSpace>(hardware: &C, offset: u16) -> Msix {
        let control = hardware.read(offset + 2, Width::Word) as u16;
        let entries = (control & msix_control::TABLE_SIZE) + 1;
        let table = Place::read(hardware, offset + 4, u32::from(entries) * ENTRY);
        let pending = Place::read(hardware, offset + 8, u32::from(entries).div_ceil(64) * 8);
        Msix { offset, entries, table, pending }
    }

    /// Offset of Message Control.
    pub const fn control(&self) -> u16 {
        self.offset + 2
    }

    /// Why the capability cannot be true, if it cannot. Some devices have one that lies on their ordinary
    /// registers (QubesOS issue 3609); Xen would write-protect these.
    pub fn nonsense(&self) -> Option<&'static str> {
        if self.table.bar > 5 || self.pending.bar > 5 {
            Some("its table or pending bits lie in a BAR that cannot be")
        } else if self.table.overlaps(&self.pending) {
            Some("its table and its pending bits lie on each other")
        } else {
            None
        }
    }

    /// Whether other registers of the BAR can share a page with the table, which a PV guest can't write then.
    pub const fn shares_page(&self) -> bool {
        !self.table.start.is_multiple_of(0x1000) || !self.table.end().is_multiple_of(0x1000)
    }
}
