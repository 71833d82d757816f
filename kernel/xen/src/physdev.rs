//! PCI functions and their message interrupts: `xen/physdev.h`.
//!
//! An unmodified Xen refuses these calls to a PVH domain (-ENOSYS). Xen with the config-owner change
//! (`boot/xen`) carries them out for functions whose ECAM frame the domain was given. On any Xen dom0 may make them.

use crate::abi::{MapPirq, PciDevice, UnmapPirq};
use crate::errno::Errno;
use crate::hypercall;

/// `PHYSDEVOP_map_pirq`.
pub const MAP_PIRQ: u32 = 13;
/// `PHYSDEVOP_unmap_pirq`.
pub const UNMAP_PIRQ: u32 = 14;
/// `PHYSDEVOP_restore_msi_ext`.
pub const RESTORE_MSI_EXT: u32 = 27;
/// `PHYSDEVOP_prepare_msix`.
pub const PREPARE_MSIX: u32 = 30;
/// `PHYSDEVOP_release_msix`.
pub const RELEASE_MSIX: u32 = 31;

/// `MAP_PIRQ_TYPE_MSI_SEG`: one vector; the segment is in the upper half of `bus`.
const TYPE_MSI_SEG: i32 = 3;
/// `MAP_PIRQ_TYPE_MULTI_MSI`: several vectors of MSI; the segment as above.
const TYPE_MULTI_MSI: i32 = 4;
/// "Whichever is free", for an index or a pirq.
const ANY: i32 = -1;

/// A function: segment, bus, device << 3 | function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Segment.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device << 3 | function.
    pub devfn: u8,
}

/// What is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// One vector of MSI.
    Msi,
    /// So many vectors of MSI.
    MultiMsi(u8),
    /// An entry of the MSI-X table: its index, and the address of the BAR the table is in.
    Msix(u16, u64),
}

fn on_function(command: u32, function: Function) -> Result<(), Errno> {
    let mut arg = PciDevice { seg: function.segment, bus: function.bus, devfn: function.devfn };
    // SAFETY: all commands that come here take a physdev_pci_device and only read it.
    unsafe { hypercall::physdev_op(command, &mut arg).map(drop) }
}

/// Has Xen take the function's MSI-X table under its protection.
///
/// # Errors
/// What Xen answered.
pub fn prepare_msix(function: Function) -> Result<(), Errno> {
    on_function(PREPARE_MSIX, function)
}

/// Undoes [`prepare_msix`].
///
/// # Errors
/// What Xen answered.
pub fn release_msix(function: Function) -> Result<(), Errno> {
    on_function(RELEASE_MSIX, function)
}

/// Has Xen write its vectors into the function again.
///
/// # Errors
/// What Xen answered.
pub fn restore_msi(function: Function) -> Result<(), Errno> {
    on_function(RESTORE_MSI_EXT, function)
}

/// The argument of [`map`]; dom0's tool has Xen carry it out with its own hypercall.
pub fn map_argument(domid: u16, function: Function, vector: Vector) -> MapPirq {
    let (kind, entry_nr, table_base) = match vector {
        Vector::Msi => (TYPE_MSI_SEG, 0, 0),
        Vector::MultiMsi(count) => (TYPE_MULTI_MSI, i32::from(count), 0),
        Vector::Msix(entry, table_base) => (TYPE_MSI_SEG, i32::from(entry), table_base),
    };
    MapPirq {
        domid,
        kind,
        index: ANY,
        pirq: ANY,
        bus: i32::from(function.segment) << 16 | i32::from(function.bus),
        devfn: i32::from(function.devfn),
        entry_nr,
        table_base,
    }
}

/// Maps a vector into domain `domid` and returns its pirq there.
///
/// # Errors
/// What Xen answered.
pub fn map(domid: u16, function: Function, vector: Vector) -> Result<i32, Errno> {
    let mut arg = map_argument(domid, function, vector);
    // SAFETY: PHYSDEVOP_map_pirq takes a physdev_map_pirq, which it reads and writes.
    unsafe { hypercall::physdev_op(MAP_PIRQ, &mut arg)? };
    Ok(arg.pirq)
}

/// Takes a mapping back.
///
/// # Errors
/// What Xen answered.
pub fn unmap(domid: u16, pirq: i32) -> Result<(), Errno> {
    let mut arg = UnmapPirq { domid, pirq };
    // SAFETY: PHYSDEVOP_unmap_pirq takes a physdev_unmap_pirq and only reads it.
    unsafe { hypercall::physdev_op(UNMAP_PIRQ, &mut arg).map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segment_is_in_the_upper_half_of_the_bus() {
        let function = Function { segment: 0xfffe, bus: 0x81, devfn: 0xff };
        let arg = map_argument(7, function, Vector::Msix(127, 0x38_0000_0000));
        assert_eq!((arg.domid, arg.kind, arg.index, arg.pirq), (7, 3, -1, -1));
        assert_eq!((arg.bus.cast_unsigned(), arg.devfn), (0xfffe_0081, 0xff));
        assert_eq!((arg.entry_nr, arg.table_base), (127, 0x38_0000_0000));
        let arg = map_argument(7, function, Vector::MultiMsi(32));
        assert_eq!((arg.kind, arg.entry_nr, arg.table_base), (4, 32, 0));
    }
}
