//! Descriptor tables. Every exception is fatal and reported from a stack of its own, so that a stack
//! overflow (it meets the guard page) is reported too.

use core::arch::global_asm;

use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use crate::fatal;

global_asm!(include_str!("../../boot/traps.s"));

unsafe extern "C" {
    static trap_table: [u64; VECTORS];
    static trap_stack_top: u8;
}

/// Exception vectors; interrupts stay off, so nothing else arrives.
const VECTORS: usize = 32;

/// An interrupt gate of the 64-bit IDT (Intel SDM 3A, 6.14.1).
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

impl Gate {
    /// Present, privilege level 0, 64-bit interrupt gate.
    const KIND: u8 = 0x8e;

    fn new(handler: u64, selector: u16) -> Gate {
        Gate {
            offset_low: handler as u16,
            selector,
            ist: 1,
            kind: Gate::KIND,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

/// The stack as `trap_common` leaves it.
#[repr(C)]
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Loads GDT, TSS and IDT. They live for ever.
pub fn init() {
    let mut tss = TaskStateSegment::new();
    // IST 1 in the gates is index 0 here.
    tss.interrupt_stack_table[0] = VirtAddr::from_ptr(&raw const trap_stack_top);
    let tss: &'static TaskStateSegment = alloc::boxed::Box::leak(alloc::boxed::Box::new(tss));

    let mut gdt = GlobalDescriptorTable::new();
    let code = gdt.append(Descriptor::kernel_code_segment());
    let task = gdt.append(Descriptor::tss_segment(tss));
    let gdt: &'static GlobalDescriptorTable = alloc::boxed::Box::leak(alloc::boxed::Box::new(gdt));
    gdt.load();
    // SAFETY: the selector is of the table just loaded, and a code segment's.
    unsafe { CS::set_reg(code) };
    // SAFETY: the selector is of the table just loaded, and a task state's.
    unsafe { load_tss(task) };

    // SAFETY: the table is ours and never changes.
    let entries = unsafe { &trap_table };
    let idt: &'static [Gate; VECTORS] =
        alloc::boxed::Box::leak(alloc::boxed::Box::new(entries.map(|entry| Gate::new(entry, code.0))));
    let pointer = DescriptorTablePointer {
        limit: (size_of_val(idt) - 1) as u16,
        base: VirtAddr::from_ptr(core::ptr::from_ref(idt)),
    };
    // SAFETY: every gate leads to its entry in boot/traps.s, on a stack that exists.
    unsafe { x86_64::instructions::tables::lidt(&pointer) };
}

/// Reports an exception; called by `trap_common`.
#[unsafe(no_mangle)]
extern "C" fn rust_trap(frame: &Frame) -> ! {
    let cr2 = x86_64::registers::control::Cr2::read_raw();
    fatal::stop(format_args!(
        "exception {} ({}) at rip {:#x}, error code {:#x}, cr2 {cr2:#x}, rsp {:#x}, cs {:#x}, ss {:#x}, rflags {:#x}",
        frame.vector,
        name(frame.vector),
        frame.rip,
        frame.error,
        frame.rsp,
        frame.cs,
        frame.ss,
        frame.rflags,
    ))
}

/// The exception's mnemonic.
fn name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE",
        2 => "NMI",
        6 => "#UD",
        8 => "#DF",
        13 => "#GP",
        14 => "#PF",
        16 => "#MF",
        17 => "#AC",
        18 => "#MC",
        19 => "#XM",
        _ => "other",
    }
}
