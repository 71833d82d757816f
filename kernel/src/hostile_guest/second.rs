//! The second processor: it rewrites the shared page while the first one's requests are carried out.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pciback::wire::{MAX_VECTORS, PCIF_ACTIVE, offset};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::registers::model_specific::Efer;
use xen_guest::abi::PAGE_SIZE;
use xen_guest::errno::Errno;
use xen_guest::page::Page;
use xen_guest::{clock, sched, vcpu};

use super::client::{Random, new_pages};

/// What it does.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Task {
    /// Nothing.
    Rest = 0,
    /// Rewrites requests and MSI-X entries; flags and answers are left alone.
    Requests = 1,
    /// Rewrites the flags, and now and then a request.
    Flags = 2,
}

/// Its task, the task that it has begun, and the page that it is about.
static TASK: AtomicU32 = AtomicU32::new(Task::Rest as u32);
static BEGUN: AtomicU32 = AtomicU32::new(Task::Rest as u32);
static PAGE: AtomicU64 = AtomicU64::new(0);
/// The shared info page, for the time.
static SHARED: AtomicU64 = AtomicU64::new(0);
/// How often it has written.
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Writes in a row before it lets others have the processor: with the rig's one for all such domains the backend would
/// wait for the end of its time otherwise.
const IN_A_ROW: u32 = 200;

/// How long it rests at a time: 10 milliseconds. The backend has the same processor in the rig.
const NAP: u64 = 10_000_000;

/// Pages of its stack.
const STACK: usize = 4;

/// Starts it. `shared` is the address of the shared info page.
pub fn start(shared: u64) -> Result<(), Errno> {
    SHARED.store(shared, Ordering::Release);
    let stack = new_pages(STACK);
    let (cr3, _) = Cr3::read();
    let start = vcpu::Start {
        rip: run as *const () as u64,
        // As if it had been called.
        rsp: stack + STACK as u64 * PAGE_SIZE - 8,
        rdi: 0,
        cr0: Cr0::read_raw(),
        cr3: cr3.start_address().as_u64(),
        cr4: Cr4::read_raw(),
        efer: Efer::read_raw(),
    };
    // SAFETY: the page tables are in force here; what it shares with this processor are atomics and a page that is only
    // accessed volatile.
    unsafe { vcpu::start(1, start) }
}

/// Gives it a task, and waits until it has begun: until then it may be at its former one.
pub fn set(task: Task, page: u64) {
    PAGE.store(page, Ordering::Release);
    TASK.store(task as u32, Ordering::Release);
    while BEGUN.load(Ordering::Acquire) != task as u32 {
        sched::yield_now();
    }
}

/// How often it has written.
pub fn writes() -> u64 {
    WRITES.load(Ordering::Relaxed)
}

extern "C" fn run(_: u64) -> ! {
    let mut random = Random(0x1234_5678_9abc_def1);
    loop {
        let task = TASK.load(Ordering::Acquire);
        BEGUN.store(task, Ordering::Release);
        let address = PAGE.load(Ordering::Acquire);
        if task != Task::Rest as u32 && address != 0 {
            // SAFETY: the first processor names a page of its own, and another only when this task has ended.
            let page = unsafe { Page::new(address as *mut u8) };
            for _ in 0..IN_A_ROW {
                if task == Task::Flags as u32 { flags(page, &mut random) } else { request(page, &mut random) }
            }
            WRITES.fetch_add(u64::from(IN_A_ROW), Ordering::Relaxed);
            sched::yield_now();
        } else {
            // SAFETY: the first processor's shared info page, which stays mapped.
            let shared = unsafe { Page::new(SHARED.load(Ordering::Acquire) as *mut u8) };
            // An error leaves a busy loop, which is what a hostile guest may do.
            let _ = sched::poll(&[], Some(clock::now(shared).saturating_add(NAP)));
        }
    }
}

/// One field of the request, or one MSI-X entry.
fn request(page: Page, random: &mut Random) {
    let any = random.next() as u32;
    let (at, value) = match random.next() % 10 {
        0 | 1 => (offset::CMD, random.pick(&[0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 4, 5, 10, 11, u32::MAX])),
        2 | 3 => (offset::OFFSET, random.pick(&[0, 2, 4, 6, 0x3c, 0xfff, 0x1000, 0x8000_0000, u32::MAX, any & 0xfff])),
        4 => (offset::SIZE, random.pick(&[0, 1, 2, 3, 4, 8, u32::MAX])),
        5 => (offset::VALUE, random.pick(&[0, 1, 5, 127, 128, 129, 0xffff, u32::MAX, any])),
        6 => (offset::DEVFN, random.pick(&[0, 0, 0, 8, 0x100, u32::MAX])),
        7 => (offset::DOMAIN, random.pick(&[0, 0, 0, 1, u32::MAX])),
        8 => (offset::BUS, random.pick(&[0, 0, 0, 1, u32::MAX])),
        _ => (offset::MSIX_ENTRIES + 4 * (any as usize % MAX_VECTORS), random.next() as u32 & 0x0007_ffff),
    };
    page.write(at, value);
}

/// The flags.
fn flags(page: Page, random: &mut Random) {
    let flags = page.atomic32(offset::FLAGS);
    let any = random.next() as u32;
    match random.next() % 8 {
        0..=2 => drop(flags.fetch_or(PCIF_ACTIVE, Ordering::AcqRel)),
        3..=4 => drop(flags.fetch_and(!PCIF_ACTIVE, Ordering::AcqRel)),
        5 => drop(flags.fetch_xor(any, Ordering::AcqRel)),
        6 => flags.store(any, Ordering::Release),
        _ => request(page, random),
    }
}
