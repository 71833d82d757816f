//! Memory calls: HVM parameters, pages of Xen put into our physical map, the memory map when the
//! start info has none, and the vCPU's own run time. Headers: `memory.h`, `hvm/params.h`, `vcpu.h`.

use crate::abi::{AddToPhysmap, DOMID_SELF, E820Entry, HvmParam, MemoryMap, MemoryReservation, RunstateInfo};
use crate::errno::Errno;
use crate::hypercall;

const XENMEM_DECREASE_RESERVATION: u32 = 1;
const XENMEM_POPULATE_PHYSMAP: u32 = 6;
const XENMEM_ADD_TO_PHYSMAP: u32 = 7;
const XENMEM_MEMORY_MAP: u32 = 9;
const XENMAPSPACE_SHARED_INFO: u32 = 0;
const XENMAPSPACE_GRANT_TABLE: u32 = 1;
const HVMOP_GET_PARAM: u32 = 1;
const VCPUOP_GET_RUNSTATE_INFO: u32 = 4;
const RUNSTATE_RUNNING: usize = 0;

/// A parameter Xen's tools set for a PVH domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Param {
    /// Frame of the xenstore ring.
    #[doc(alias = "HVM_PARAM_STORE_PFN")]
    StorePfn = 1,
    /// Event channel of the xenstore ring.
    #[doc(alias = "HVM_PARAM_STORE_EVTCHN")]
    StoreEvtchn = 2,
    /// Frame of the console ring.
    #[doc(alias = "HVM_PARAM_CONSOLE_PFN")]
    ConsolePfn = 17,
    /// Event channel of the console ring.
    #[doc(alias = "HVM_PARAM_CONSOLE_EVTCHN")]
    ConsoleEvtchn = 18,
}

/// Reads a parameter of this domain.
///
/// # Errors
/// What Xen answered.
pub fn hvm_param(param: Param) -> Result<u64, Errno> {
    let mut arg = HvmParam { domid: DOMID_SELF, index: param as u32, ..HvmParam::default() };
    // SAFETY: HVMOP_get_param takes a xen_hvm_param.
    unsafe { hypercall::hvm_op(HVMOP_GET_PARAM, &mut arg)? };
    Ok(arg.value)
}

/// Makes the shared info page appear at guest frame `gfn`.
///
/// # Errors
/// What Xen answered.
///
/// # Safety
/// Nothing else is, or is later placed, at `gfn`.
pub unsafe fn map_shared_info(gfn: u64) -> Result<(), Errno> {
    // SAFETY: `gfn` is free by our contract.
    unsafe { add_to_physmap(XENMAPSPACE_SHARED_INFO, gfn) }
}

/// Makes the first frame of this domain's grant table appear at guest frame `gfn`.
///
/// # Errors
/// What Xen answered.
///
/// # Safety
/// Nothing else is, or is later placed, at `gfn`.
pub unsafe fn map_grant_table(gfn: u64) -> Result<(), Errno> {
    // SAFETY: `gfn` is free by our contract.
    unsafe { add_to_physmap(XENMAPSPACE_GRANT_TABLE, gfn) }
}

/// Makes the first page of `space` appear at guest frame `gfn`.
///
/// # Safety
/// Nothing else is, or is later placed, at `gfn`.
unsafe fn add_to_physmap(space: u32, gfn: u64) -> Result<(), Errno> {
    let mut arg = AddToPhysmap { domid: DOMID_SELF, space, gpfn: gfn, ..Default::default() };
    // SAFETY: XENMEM_add_to_physmap takes a xen_add_to_physmap; `gfn` is free by our contract.
    unsafe { hypercall::memory_op(XENMEM_ADD_TO_PHYSMAP, &mut arg)? };
    Ok(())
}

/// Gives the page at guest frame `gfn` back to Xen. Who has mapped it keeps it for as long.
///
/// # Errors
/// What Xen answered, or [`Errno`] 0 if it took none.
///
/// # Safety
/// Nothing uses the frame until [`populate`] has put another page there.
pub unsafe fn give_back(gfn: u64) -> Result<(), Errno> {
    // SAFETY: nobody uses the page, by our contract.
    unsafe { reserve(XENMEM_DECREASE_RESERVATION, gfn) }
}

/// Has Xen put a page of its choice at guest frame `gfn`, where none is.
///
/// # Errors
/// What Xen answered, or [`Errno`] 0 if it has none to give now.
pub fn populate(gfn: u64) -> Result<(), Errno> {
    // SAFETY: a frame that has no page is nobody's; one that has is left as it is.
    unsafe { reserve(XENMEM_POPULATE_PHYSMAP, gfn) }
}

/// # Safety
/// What `cmd` does to the page at `gfn` harms nobody.
unsafe fn reserve(cmd: u32, mut gfn: u64) -> Result<(), Errno> {
    let mut arg = MemoryReservation { extents: &raw mut gfn, count: 1, order: 0, flags: 0, domid: DOMID_SELF };
    // SAFETY: both calls take a xen_memory_reservation, whose array has one element; the rest is our contract.
    let done = unsafe { hypercall::memory_op(cmd, &mut arg)? };
    if done == 1 { Ok(()) } else { Err(Errno(0)) }
}

/// Stores the domain's memory map in `entries` and returns how many there are.
///
/// # Errors
/// What Xen answered.
pub fn memory_map(entries: &mut [E820Entry]) -> Result<usize, Errno> {
    let room = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    let mut arg = MemoryMap { nr_entries: room, buffer: entries.as_mut_ptr() };
    // SAFETY: XENMEM_memory_map takes a xen_memory_map; the buffer has the room it names.
    unsafe { hypercall::memory_op(XENMEM_MEMORY_MAP, &mut arg)? };
    Ok((arg.nr_entries as usize).min(entries.len()))
}

/// Nanoseconds this domain's vCPU has run since it was made.
///
/// # Errors
/// What Xen answered.
pub fn cpu_time() -> Result<u64, Errno> {
    let mut arg = RunstateInfo::default();
    // SAFETY: VCPUOP_get_runstate_info takes a vcpu_runstate_info.
    unsafe { hypercall::vcpu_op(VCPUOP_GET_RUNSTATE_INFO, 0, &mut arg)? };
    Ok(arg.time[RUNSTATE_RUNNING])
}
