//! Xen's memory of a function's MSI-X state, and how it is made clean: the patch this project began with
//! ("xen-pciback: Reset MSI-X state when exposing a device", 2018), in a form that also holds for a function
//! without a reset of its own. docs/msix.md tells the story.
//!
//! Where Xen must mask a vector and cannot reach the table (memory decode is off), it sets MASKALL and
//! remembers that it did (`host_maskall` in `xen/arch/x86/msi.c`). No reset of the device clears that memory, so
//! every later write of Message Control sets MASKALL again and no interrupt arrives. A write that has MASKALL set
//! is taken for the guest's own wish (`guest_maskall`), which prepare_msix keeps. Hence: write it *clear*, read it
//! back, and only if it does not stay clear have Xen forget, by release and prepare.

use core::fmt;

use crate::config::{Msix, msix_control};
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, Width, WritesOff};
use crate::sbdf::Sbdf;

/// A state in which interrupts arrive once they are enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clean {
    /// It was so.
    Already,
    /// Xen remembered a MASKALL, and was made to forget it.
    Reset,
}

/// Why the state could not be made clean. The function must not be given to anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// The host does not let the domain write.
    WritesOff,
    /// release_msix failed.
    Release(PhysdevError),
    /// prepare_msix failed.
    Prepare(PhysdevError),
    /// The function does not answer.
    Silent,
    /// MASKALL or ENABLE stays set, with this Message Control.
    Stuck(u16),
    /// MSI is on, and it was not this domain that turned it on.
    MsiOn,
    /// dom0 has the function itself.
    Dom0s,
}

impl Dirty {
    /// Whether it can be clean later without anybody doing something to the function: a dead guest's vectors are
    /// unmapped when Xen gets to it.
    pub const fn may_pass(self) -> bool {
        matches!(self, Dirty::Release(PhysdevError::Busy) | Dirty::Prepare(PhysdevError::Busy))
    }
}

impl fmt::Display for Dirty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dirty::WritesOff => f.write_str("its MSI-X state cannot be checked: writes are off on this host"),
            Dirty::Silent => f.write_str("its MSI-X state cannot be checked: it does not answer; check its power"),
            Dirty::Release(PhysdevError::Busy) => write!(
                f,
                "its MSI-X state cannot be reset: release_msix answered {}: either vectors of a guest are still mapped \
                 (end that guest with xl destroy, or detach the function from it), or dom0 has the function itself \
                 (xl-pciback assignable-add)",
                PhysdevError::Busy
            ),
            Dirty::Release(error) => {
                write!(f, "its MSI-X state cannot be reset: release_msix answered {error}; see xl dmesg")
            }
            Dirty::Prepare(error @ PhysdevError::NoMemoryDecode) => write!(
                f,
                "its MSI-X state cannot be set up: prepare_msix answered {error}: its memory decode is off; \
                 xl-pciback assignable-add turns it on"
            ),
            Dirty::Prepare(error) => {
                write!(f, "its MSI-X state cannot be set up: prepare_msix answered {error}; see xl dmesg")
            }
            Dirty::Stuck(control) => write!(
                f,
                "its MSI-X state is not clean: Message Control reads {control:04x} after a reset of Xen's state: no \
                 interrupt would arrive; power-cycle the host"
            ),
            Dirty::Dom0s => write!(
                f,
                "Xen answers {} to physdev calls for it: dom0 has the function itself; xl-pciback assignable-add takes it",
                PhysdevError::Busy
            ),
            Dirty::MsiOn => f.write_str(
                "its MSI is on: a guest that was here before this domain started may use it; end that guest (xl destroy), \
                 or, if there is none, reset the function from dom0",
            ),
        }
    }
}

/// Has Xen take the function's MSI-X table under its protection: needed once before any vector is mapped, and
/// done again by [`clean`] where the state was stale. Xen keeps it when a driver domain ends without a word, so
/// "busy" may only mean an earlier life of this one.
///
/// # Errors
/// [`Dirty::Release`] with busy if vectors are mapped; [`Dirty::Prepare`].
pub fn take<P: Physdev>(physdev: &mut P, sbdf: Sbdf) -> Result<(), Dirty> {
    match physdev.prepare_msix(sbdf) {
        Err(PhysdevError::Busy) => renew(physdev, sbdf),
        other => other.map_err(Dirty::Prepare),
    }
}

/// Has Xen forget what it remembers: release and prepare.
///
/// # Errors
/// [`Dirty::Release`] with busy if vectors are mapped; what else Xen answered.
pub fn renew<P: Physdev>(physdev: &mut P, sbdf: Sbdf) -> Result<(), Dirty> {
    // "Busy" is also the answer for a function that is not prepared, which an earlier failure can leave.
    let busy = match physdev.release_msix(sbdf) {
        Ok(()) => false,
        Err(PhysdevError::Busy) => true,
        Err(error) => return Err(Dirty::Release(error)),
    };
    match physdev.prepare_msix(sbdf) {
        Err(PhysdevError::Busy) if busy => Err(Dirty::Release(PhysdevError::Busy)),
        other => other.map_err(Dirty::Prepare),
    }
}

/// Makes sure that MSI-X is off and that nothing keeps it masked. No vector may be mapped.
///
/// # Errors
/// Why it is not so.
pub fn clean<C: ConfigSpace, P: Physdev>(
    hardware: &mut C,
    physdev: &mut P,
    sbdf: Sbdf,
    msix: &Msix,
) -> Result<Clean, Dirty> {
    // Not only when it reads as set: with the write Xen applies what it remembers.
    if is_clean(write_clear(hardware, msix)?) {
        return Ok(Clean::Already);
    }
    renew(physdev, sbdf)?;
    let control = write_clear(hardware, msix)?;
    if is_clean(control) { Ok(Clean::Reset) } else { Err(Dirty::Stuck(control)) }
}

/// As [`clean`] where Xen sees none of our writes and takes none of our hypercalls (`mode=mmcfg0`): the function's
/// own register only.
///
/// # Errors
/// Why it is not clean.
pub fn clear<C: ConfigSpace>(hardware: &mut C, msix: &Msix) -> Result<(), Dirty> {
    let control = write_clear(hardware, msix)?;
    if is_clean(control) { Ok(()) } else { Err(Dirty::Stuck(control)) }
}

/// Writes Message Control with ENABLE and MASKALL clear, and reads it back.
fn write_clear<C: ConfigSpace>(hardware: &mut C, msix: &Msix) -> Result<u16, Dirty> {
    let control = hardware.read(msix.control(), Width::Word) as u16;
    if control == u16::MAX {
        return Err(Dirty::Silent);
    }
    let wanted = control & !(msix_control::ENABLE | msix_control::MASKALL);
    let written = hardware.write(msix.control(), Width::Word, u32::from(wanted));
    written.map_err(|WritesOff| Dirty::WritesOff)?;
    Ok(hardware.read(msix.control(), Width::Word) as u16)
}

const fn is_clean(control: u16) -> bool {
    control & (msix_control::ENABLE | msix_control::MASKALL) == 0
}
