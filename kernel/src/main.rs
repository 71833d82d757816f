//! The bootable image: a PVH domain that serves PCI functions to other domains.
//!
//! Boot goes in one line: start info -> heap -> page tables -> exceptions -> Xen (shared info,
//! console, xenstore) -> the backend -> the event loop, which sleeps in Xen. One vCPU, interrupts off
//! for good, no timer tick. All logic that needs no hardware is in `pciback`; all that talks to Xen is
//! in `xen-guest`; what is left here is the glue.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod fatal;
#[cfg(all(feature = "hostile", not(feature = "hostile-guest")))]
mod hostile;
#[cfg(feature = "hostile-guest")]
mod hostile_guest;
mod logger;
#[cfg_attr(feature = "hostile-guest", allow(dead_code, reason = "a guest needs a part of it"))]
mod machine;
mod memory;
#[cfg_attr(
    any(feature = "hostile", feature = "hostile-guest"),
    allow(dead_code, reason = "the attack takes its place")
)]
mod run;
mod traps;

use alloc::string::String;
use core::arch::global_asm;

use xen_guest::hypercall;

global_asm!(include_str!("../../boot/entry.s"));
global_asm!(
    include_str!("../../boot/memops.s"),
    ".global memcpy, memmove, memset, memcmp, bcmp, strlen",
    ".set memcpy, stubdom_memcpy",
    ".set memmove, stubdom_memmove",
    ".set memset, stubdom_memset",
    ".set memcmp, stubdom_memcmp",
    ".set bcmp, stubdom_memcmp",
    ".set strlen, stubdom_strlen",
);

/// Called by `boot/entry.s` with the physical address of the start info.
#[unsafe(no_mangle)]
extern "C" fn rust_entry(start_info: u32) -> ! {
    logger::init();
    // SAFETY: identity-mapped at privilege level 0, and nothing has made a hypercall yet.
    if unsafe { hypercall::init() }.is_err() {
        // Without Xen there is neither a console nor a way to end: 0xE9 and a stop are all there is.
        log::error!("this image runs under Xen only: start it with `xl create`");
        loop {
            x86_64::instructions::hlt();
        }
    }
    let entry = xen_guest::memory::cpu_time().unwrap_or(0);
    // SAFETY: the loader's address; nothing has been allocated.
    let info = match unsafe { boot::read(start_info) } {
        Ok(info) => info,
        Err(error) => fatal::stop(format_args!("cannot use the PVH start info: {error}")),
    };
    // SAFETY: RAM behind everything that is in use.
    unsafe { memory::init_heap(info.free.0, info.free.1) };
    // The command line is copied before the boot page tables, and with them its mapping, go.
    let cmdline = String::from_utf8_lossy(info.cmdline.to_bytes()).into_owned();
    // SAFETY: the boot page tables are in force; called once.
    let space = match unsafe { memory::AddressSpace::build(info.free) } {
        Ok(space) => space,
        Err(error) => fatal::stop(format_args!("cannot build page tables: {error:?}; give the domain more memory")),
    };
    traps::init();
    let (config, complaints) = pciback::cmdline::parse(&cmdline);
    logger::set_level(config.log);
    #[cfg(feature = "hostile-guest")]
    {
        let _ = (complaints, entry);
        hostile_guest::run(machine::Guest::new(space, info.ram_end, &config))
    }
    #[cfg(not(feature = "hostile-guest"))]
    let machine = machine::Machine::new(space, info.ram_end, &config);
    #[cfg(all(feature = "hostile", not(feature = "hostile-guest")))]
    {
        let _ = (complaints, entry);
        hostile::run(machine, &config)
    }
    #[cfg(not(any(feature = "hostile", feature = "hostile-guest")))]
    run::run(machine, config, complaints, entry)
}

/// Asked for by precompiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Asked for by precompiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    fatal::stop(format_args!("unwinding"))
}
