//! Starting another processor of a PVH domain: `vcpu.h` and `hvm/hvm_vcpu.h`. It begins in long mode with flat segments
//! and the registers it is given; no descriptor tables are loaded.

use crate::abi::VcpuContext;
use crate::errno::Errno;
use crate::hypercall;

const VCPUOP_INITIALISE: u32 = 0;
const VCPUOP_UP: u32 = 1;
/// `VCPU_HVM_MODE_64B`.
const LONG_MODE: u32 = 1;

/// What a processor starts with.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// First instruction.
    pub rip: u64,
    /// Its stack.
    pub rsp: u64,
    /// First argument of a C function.
    pub rdi: u64,
    /// Control registers and EFER, with paging and long mode on.
    pub cr0: u64,
    /// Page tables.
    pub cr3: u64,
    /// With PAE.
    pub cr4: u64,
    /// With LME and LMA.
    pub efer: u64,
}

/// Starts processor `number` with interrupts off.
///
/// # Errors
/// What Xen answered.
///
/// # Safety
/// The page tables map code and stack; what runs there shares memory soundly with the other processors, and needs no
/// descriptor tables.
pub unsafe fn start(number: u32, start: Start) -> Result<(), Errno> {
    let Start { rip, rsp, rdi, cr0, cr3, cr4, efer } = start;
    let mut context = VcpuContext { mode: LONG_MODE, rip, rsp, rdi, cr0, cr3, cr4, efer, ..VcpuContext::default() };
    // SAFETY: VCPUOP_initialise takes a vcpu_hvm_context for a PVH domain; what it starts is sound by our contract.
    unsafe { hypercall::vcpu_op(VCPUOP_INITIALISE, number, &mut context)? };
    // SAFETY: VCPUOP_up takes no structure.
    unsafe { hypercall::vcpu_op(VCPUOP_UP, number, &mut 0u64)? };
    Ok(())
}
