//! The hypercall gate: Xen fills one page with an entry a hypercall, and we call into it.
//!
//! `xen-sys` is used for numbers only: its own wrappers pass the fifth argument in the wrong register
//! and promise the compiler not to touch the stack. ABI: `xen/arch-x86/xen-x86_64.h`.

use core::arch::{asm, global_asm, x86_64::__cpuid};
use core::sync::atomic::{AtomicU64, Ordering};

use crate::errno::Errno;

// Xen writes the entries when `init` names the page; until then any call into it stops at `hlt`.
global_asm!(
    ".pushsection .text.xen_hypercall_page, \"ax\", @progbits",
    ".balign 4096",
    ".global xen_hypercall_page",
    "xen_hypercall_page:",
    ".fill 4096, 1, 0xf4",
    ".popsection",
);

unsafe extern "C" {
    safe static xen_hypercall_page: [u8; 4096];
}

/// Hypercalls made since boot: a figure the bench reads, and the proof of "two an access".
static CALLS: AtomicU64 = AtomicU64::new(0);

/// First CPUID leaf a hypervisor may use, and how far apart candidates are.
const CPUID_FIRST: u32 = 0x4000_0000;
const CPUID_STEP: u32 = 0x100;
const CPUID_LAST: u32 = 0x4001_0000;

/// No Xen signature was found in CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotUnderXen;

/// Finds Xen in CPUID and has it fill the hypercall page.
///
/// # Errors
/// [`NotUnderXen`] if no hypervisor leaf carries Xen's signature.
///
/// # Safety
/// The image runs identity-mapped at privilege level 0; called once, before any hypercall.
pub unsafe fn init() -> Result<(), NotUnderXen> {
    let base = (CPUID_FIRST..CPUID_LAST)
        .step_by(CPUID_STEP as usize)
        .find(|leaf| {
            let id = __cpuid(*leaf);
            // "XenVMMXenVMM", XEN_CPUID_SIGNATURE_*
            (id.ebx, id.ecx, id.edx) == (0x566e_6558, 0x6558_4d4d, 0x4d4d_566e)
        })
        .ok_or(NotUnderXen)?;
    let msr = __cpuid(base + 2).ebx;
    let page = &raw const xen_hypercall_page as u64;
    // SAFETY: the MSR is the one Xen names for this; it writes our page, which holds nothing else.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") page as u32, in("edx") (page >> 32) as u32, options(nostack));
    }
    Ok(())
}

/// Number of hypercalls made since boot.
pub fn count() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Makes hypercall `NR` with up to three arguments: no interface this crate uses takes more.
///
/// # Safety
/// The arguments are what `NR` expects: pointers among them are valid for what Xen reads and writes.
unsafe fn call<const NR: u32>(a1: u64, a2: u64, a3: u64) -> Result<u64, Errno> {
    CALLS.store(CALLS.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    let answer: i64;
    // SAFETY: the entry keeps the ABI of xen-x86_64.h: argument registers and rax may change, rcx
    // and r11 as for a system call; the call uses the stack, so no `nostack`.
    unsafe {
        asm!(
            "call xen_hypercall_page + {entry}",
            entry = const NR * 32,
            lateout("rax") answer,
            inlateout("rdi") a1 => _,
            inlateout("rsi") a2 => _,
            inlateout("rdx") a3 => _,
            out("rcx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    Errno::check(answer)
}

/// `HYPERVISOR_memory_op`.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn memory_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_memory_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 0) }
}

/// `HYPERVISOR_event_channel_op`.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn event_channel_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_event_channel_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 0) }
}

/// `HYPERVISOR_sched_op`.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn sched_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_sched_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 0) }
}

/// `HYPERVISOR_grant_table_op` with one element.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn grant_table_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_grant_table_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 1) }
}

/// `HYPERVISOR_hvm_op`.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn hvm_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_hvm_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 0) }
}

/// `HYPERVISOR_physdev_op`.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn physdev_op<T>(cmd: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe { call::<{ xen_sys::__HYPERVISOR_physdev_op }>(u64::from(cmd), core::ptr::from_mut(arg) as u64, 0) }
}

/// `HYPERVISOR_vcpu_op` for one vCPU.
///
/// # Safety
/// `arg` is the structure that `cmd` expects.
pub unsafe fn vcpu_op<T>(cmd: u32, vcpu: u32, arg: &mut T) -> Result<u64, Errno> {
    // SAFETY: by this function's contract.
    unsafe {
        call::<{ xen_sys::__HYPERVISOR_vcpu_op }>(u64::from(cmd), u64::from(vcpu), core::ptr::from_mut(arg) as u64)
    }
}
