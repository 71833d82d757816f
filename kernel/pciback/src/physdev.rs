//! The physdev operations that interrupts and the hand-over need, as a trait: Xen's memory of a function's
//! MSI-X state, and the mapping of its vectors into a guest.
//!
//! Rules: `xen/physdev.h`, and what `xen/arch/x86/msi.c` does behind them. The image carries them out itself
//! where Xen has the config-owner change (`boot/xen`); host tests have a model of `msi.c`.

use core::fmt;

use crate::platform::{DomId, Nanos};
use crate::sbdf::Sbdf;

/// A physical interrupt's number in a guest's own space.
pub type Pirq = i32;

/// Why a physdev operation failed: Xen's errno by name, `xen/errno.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PhysdevError {
    /// EPERM: the function is not this domain's, or not the target's.
    NotPermitted,
    /// ENOENT: dom0's kernel has no such operation for the function.
    NotFound,
    /// ESRCH: there is no such domain (any more).
    NoDomain,
    /// EIO: dom0's kernel could not do it.
    Failed,
    /// ENXIO: the function's memory decode is off, so Xen cannot reach its MSI-X table.
    NoMemoryDecode,
    /// ENOMEM: Xen has no memory.
    NoMemory,
    /// EACCES: a BAR with the MSI-X structures points where none can be, or the guest was not given that BAR.
    NotAccessible,
    /// EFAULT: Xen cannot read the arguments.
    Fault,
    /// EBUSY: dom0 has the function itself; or for prepare and release, vectors are mapped or the state is not the expected one.
    Busy,
    /// EEXIST: it is mapped already.
    Exists,
    /// ENODEV: Xen knows no such function, or it is not assigned to that guest.
    NoDevice,
    /// EINVAL: Xen takes the arguments for wrong; for unmap, nothing is mapped there.
    Invalid,
    /// ENFILE: the function has fewer vectors.
    TooMany,
    /// ENOSPC: the guest has no free pirq (`extra_guest_irqs`).
    NoPirq,
    /// ENOSYS: this Xen does not let the domain make the call.
    NotImplemented,
    /// ENODATA: prepare_msix was not called before.
    NotPrepared,
    /// EUSERS: dom0's kernel can reset the function only together with others, which are this domain's.
    Shared,
    /// EADDRINUSE: it can reset the function only together with others, of which one is not this domain's.
    SharedWithOthers,
    /// EOPNOTSUPP: no interrupt remapping, or MSI is off in Xen.
    NotSupported,
    /// ENOTCONN: dom0, which is to make the call, is not connected, or did not answer. Whether the call was made is
    /// not known.
    NotConnected,
    /// Another error number, positive.
    Other(i32),
}

impl PhysdevError {
    /// The error with this positive number.
    pub const fn of(errno: i32) -> PhysdevError {
        match errno {
            1 => PhysdevError::NotPermitted,
            2 => PhysdevError::NotFound,
            3 => PhysdevError::NoDomain,
            5 => PhysdevError::Failed,
            6 => PhysdevError::NoMemoryDecode,
            12 => PhysdevError::NoMemory,
            13 => PhysdevError::NotAccessible,
            14 => PhysdevError::Fault,
            16 => PhysdevError::Busy,
            17 => PhysdevError::Exists,
            19 => PhysdevError::NoDevice,
            22 => PhysdevError::Invalid,
            23 => PhysdevError::TooMany,
            28 => PhysdevError::NoPirq,
            38 => PhysdevError::NotImplemented,
            61 => PhysdevError::NotPrepared,
            87 => PhysdevError::Shared,
            98 => PhysdevError::SharedWithOthers,
            95 => PhysdevError::NotSupported,
            107 => PhysdevError::NotConnected,
            other => PhysdevError::Other(other),
        }
    }

    /// The positive error number.
    pub const fn errno(self) -> i32 {
        match self {
            PhysdevError::NotPermitted => 1,
            PhysdevError::NotFound => 2,
            PhysdevError::NoDomain => 3,
            PhysdevError::Failed => 5,
            PhysdevError::NoMemoryDecode => 6,
            PhysdevError::NoMemory => 12,
            PhysdevError::NotAccessible => 13,
            PhysdevError::Fault => 14,
            PhysdevError::Busy => 16,
            PhysdevError::Exists => 17,
            PhysdevError::NoDevice => 19,
            PhysdevError::Invalid => 22,
            PhysdevError::TooMany => 23,
            PhysdevError::NoPirq => 28,
            PhysdevError::NotImplemented => 38,
            PhysdevError::NotPrepared => 61,
            PhysdevError::Shared => 87,
            PhysdevError::SharedWithOthers => 98,
            PhysdevError::NotSupported => 95,
            PhysdevError::NotConnected => 107,
            PhysdevError::Other(errno) => errno,
        }
    }

    /// The C name.
    pub const fn name(self) -> &'static str {
        match self {
            PhysdevError::NotPermitted => "EPERM",
            PhysdevError::NotFound => "ENOENT",
            PhysdevError::NoDomain => "ESRCH",
            PhysdevError::Failed => "EIO",
            PhysdevError::NoMemoryDecode => "ENXIO",
            PhysdevError::NoMemory => "ENOMEM",
            PhysdevError::NotAccessible => "EACCES",
            PhysdevError::Fault => "EFAULT",
            PhysdevError::Busy => "EBUSY",
            PhysdevError::Exists => "EEXIST",
            PhysdevError::NoDevice => "ENODEV",
            PhysdevError::Invalid => "EINVAL",
            PhysdevError::TooMany => "ENFILE",
            PhysdevError::NoPirq => "ENOSPC",
            PhysdevError::NotImplemented => "ENOSYS",
            PhysdevError::NotPrepared => "ENODATA",
            PhysdevError::Shared => "EUSERS",
            PhysdevError::SharedWithOthers => "EADDRINUSE",
            PhysdevError::NotSupported => "EOPNOTSUPP",
            PhysdevError::NotConnected => "ENOTCONN",
            PhysdevError::Other(_) => "errno",
        }
    }
}

impl fmt::Display for PhysdevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "-{} (-{})", self.name(), self.errno())
    }
}

/// What is mapped into a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vector {
    /// The one MSI vector.
    Msi,
    /// `count` MSI vectors at consecutive pirqs; a power of two, 2 to 32.
    MultiMsi {
        /// How many.
        count: u8,
    },
    /// One entry of the MSI-X table.
    Msix {
        /// Its index.
        entry: u16,
        /// Address of the BAR that holds the table (of the BAR, not of the table).
        table_base: u64,
    },
}

/// The hypercalls. Each is for one function that this domain owns.
pub trait Physdev {
    /// Has Xen find the MSI-X table and take it under its protection.
    ///
    /// # Errors
    /// [`PhysdevError::Busy`] if that was done before, or vectors are mapped.
    #[doc(alias = "PHYSDEVOP_prepare_msix")]
    fn prepare_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError>;

    /// Undoes [`Physdev::prepare_msix`].
    ///
    /// # Errors
    /// [`PhysdevError::Busy`] if it was not done, or vectors are mapped.
    #[doc(alias = "PHYSDEVOP_release_msix")]
    fn release_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError>;

    /// Has Xen write its vectors into the function again, which lost them in a change of power state. Does
    /// nothing for a function without mapped vectors.
    ///
    /// # Errors
    /// [`PhysdevError::NoMemoryDecode`] for MSI-X with memory decode off.
    #[doc(alias = "PHYSDEVOP_restore_msi_ext")]
    fn restore_msi(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError>;

    /// Maps a vector into `guest`, which the function is assigned to, and returns its (first) pirq there.
    ///
    /// # Errors
    /// What Xen answers; nothing is mapped then.
    #[doc(alias = "PHYSDEVOP_map_pirq")]
    fn map(&mut self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, PhysdevError>;

    /// Takes a mapping back; of several MSI vectors, with the first pirq, all.
    ///
    /// # Errors
    /// [`PhysdevError::Invalid`] or [`PhysdevError::NoDomain`] if Xen did so before.
    #[doc(alias = "PHYSDEVOP_unmap_pirq")]
    fn unmap(&mut self, guest: DomId, sbdf: Sbdf, pirq: Pirq) -> Result<(), PhysdevError>;

    /// Xen's system time, to bound a row of calls.
    fn now(&self) -> Nanos;

    /// From now on dom0 makes the calls.
    fn use_dom0(&mut self) {}

    /// Whether whoever makes the calls can be reached. False only while dom0 is to make them and is not connected;
    /// every call answers [`PhysdevError::NotConnected`] then.
    fn is_connected(&self) -> bool {
        true
    }

    /// Tells dom0 which vectors of the function this domain knows to be mapped for `guest`; it unmaps all others.
    ///
    /// # Errors
    /// What dom0 answers; there is none where this domain makes the calls itself, and nothing to do.
    fn settle(&mut self, guest: DomId, sbdf: Sbdf, known: &[Pirq]) -> Result<(), PhysdevError> {
        let _ = (guest, sbdf, known);
        Ok(())
    }

    /// Has dom0's kernel start the reset it has for the function; with `together` one that reaches all functions on its
    /// bus, for which they must all be at rest.
    ///
    /// # Errors
    /// What dom0 answers: without `together`, [`PhysdevError::Shared`] if only such a reset can be done;
    /// [`PhysdevError::NotImplemented`] where dom0 cannot be asked.
    fn reset(&mut self, sbdf: Sbdf, together: bool) -> Result<(), PhysdevError> {
        let _ = (sbdf, together);
        Err(PhysdevError::NotImplemented)
    }

    /// Whether that reset is done.
    ///
    /// # Errors
    /// It failed.
    fn reset_done(&mut self, sbdf: Sbdf) -> Result<bool, PhysdevError> {
        let _ = sbdf;
        Err(PhysdevError::NotImplemented)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_keeps_its_number_and_tells_its_name() {
        for errno in 1..200 {
            assert_eq!(PhysdevError::of(errno).errno(), errno);
        }
        assert_eq!(std::format!("{}", PhysdevError::of(28)), "-ENOSPC (-28)");
        assert_eq!(std::format!("{}", PhysdevError::of(7)), "-errno (-7)");
    }
}
