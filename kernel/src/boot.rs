//! What the loader hands over: command line and memory map, copied out of the PVH start info before
//! anything else uses memory. Layout: `xen/arch-x86/hvm/start_info.h` through the `pvh` crate.

use core::ffi::CStr;
use core::fmt;

use pvh::start_info::{MemmapTableEntry, ModlistEntry, START_MAGIC_VALUE, StartInfo};
use xen_guest::abi::{E820Entry, PAGE_SIZE};
use xen_guest::memory;

/// The boot page tables map this much one to one.
const BOOT_MAPPED: u64 = 1 << 30;
/// E820 type of RAM, and `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;

pvh::xen_elfnote_phys32_entry!(pvh_start32);

unsafe extern "C" {
    fn pvh_start32() -> !;
    static image_end: u8;
}

/// First byte behind the image, page-aligned.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}

/// What the start info says.
pub struct BootInfo {
    /// The domain's command line, where the loader put it: valid until the final page tables.
    pub cmdline: &'static CStr,
    /// Free RAM behind image and start info: page-aligned start and end.
    pub free: (u64, u64),
    /// End of the RAM region the image lies in.
    pub ram_end: u64,
}

/// The start info cannot be used.
#[derive(Debug)]
pub enum BootError {
    /// The magic number is wrong: this is no PVH boot.
    Magic(u32),
    /// Neither the start info nor Xen has a memory map with the RAM this image lies in.
    NoMemoryMap,
    /// No RAM is left behind the image.
    NoRoom,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BootError::Magic(magic) => write!(f, "its magic number is {magic:#x}"),
            BootError::NoMemoryMap => f.write_str("no memory map has RAM where this image is"),
            BootError::NoRoom => f.write_str("no RAM is left behind the image: raise memory= in the xl config"),
        }
    }
}

/// Reads the start info at `address`.
///
/// # Errors
/// A [`BootError`]; nothing can run then.
///
/// # Safety
/// `address` is what the loader passed in `ebx`; the boot page tables are in force and nothing has
/// been allocated.
pub unsafe fn read(address: u32) -> Result<BootInfo, BootError> {
    let start = core::ptr::with_exposed_provenance::<StartInfo>(address as usize);
    // SAFETY: the loader's start info is aligned and in mapped RAM. Version 0 lacks the last two
    // fields: then they are whatever lies behind it, and are not used.
    let info = unsafe { start.read() };
    let (magic, version, cmdline) = (info.magic, info.version, info.cmdline_paddr);
    let (modlist, modules) = (info.modlist_paddr, info.nr_modules);
    if magic != START_MAGIC_VALUE {
        return Err(BootError::Magic(magic));
    }
    let mut used = end_of_image().max(u64::from(address) + size_of::<StartInfo>() as u64);
    used = used.max(modlist + u64::from(modules) * size_of::<ModlistEntry>() as u64);

    let cmdline = if cmdline == 0 || cmdline >= BOOT_MAPPED {
        c""
    } else {
        // SAFETY: the loader ends the command line with a zero byte.
        unsafe { CStr::from_ptr(core::ptr::with_exposed_provenance(cmdline as usize)) }
    };
    used = used.max(cmdline.as_ptr() as u64 + cmdline.count_bytes() as u64 + 1);

    let inside = |addr: u64, size: u64| (addr..addr.saturating_add(size)).contains(&(end_of_image() - 1));
    let mut ram_end = None;
    if version >= 1 {
        let (map, entries) = (info.memmap_paddr, info.memmap_entries);
        let map_ptr = core::ptr::with_exposed_provenance::<MemmapTableEntry>(map as usize);
        for index in 0..if map == 0 { 0 } else { entries as usize } {
            // SAFETY: the map has `entries` entries.
            let entry = unsafe { map_ptr.wrapping_add(index).read() };
            if entry.ty == RAM && inside(entry.addr, entry.size) {
                ram_end = Some(entry.addr + entry.size);
            }
        }
        used = used.max(map + u64::from(entries) * size_of::<MemmapTableEntry>() as u64);
    }
    if ram_end.is_none() {
        let mut entries = [E820Entry::default(); 32];
        let count = memory::memory_map(&mut entries).unwrap_or(0);
        let found = entries.iter().take(count).find(|entry| entry.kind == RAM && inside(entry.addr, entry.size));
        ram_end = found.map(|entry| entry.addr + entry.size);
    }
    let ram_end = ram_end.ok_or(BootError::NoMemoryMap)?.min(BOOT_MAPPED);
    let free = (used.next_multiple_of(PAGE_SIZE), ram_end & !(PAGE_SIZE - 1));
    if free.0 >= free.1 {
        return Err(BootError::NoRoom);
    }
    Ok(BootInfo { cmdline, free, ram_end })
}
