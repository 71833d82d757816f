//! The heap and the final page tables.
//!
//! Everything is mapped one to one. Code is executable and read-only, constants are read-only, data
//! is never executable; the pages below both stacks and page 0 are not mapped. Device frames are
//! mapped uncached, one by one, as they are asked for.

use alloc::alloc::{GlobalAlloc, Layout};
use core::ptr::{NonNull, null_mut};

use linked_list_allocator::Heap;
use spin::Mutex;
use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};
use xen_guest::abi::PAGE_SIZE;

unsafe extern "C" {
    static image_start: u8;
    static text_start: u8;
    static text_end: u8;
    static data_start: u8;
    static image_end: u8;
    static boot_stack_guard: u8;
    static trap_stack_guard: u8;
}

/// The image's allocator: first fit over the free RAM. One vCPU and no interrupts, so the lock is
/// never contended.
struct LockedHeap(Mutex<Heap>);

#[global_allocator]
static HEAP: LockedHeap = LockedHeap(Mutex::new(Heap::empty()));

// SAFETY: `Heap` hands out disjoint blocks of the region it was given; the lock makes it shareable.
unsafe impl GlobalAlloc for LockedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.lock().allocate_first_fit(layout).map_or(null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(ptr) = NonNull::new(ptr) {
            // SAFETY: by the trait's contract the block came from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(ptr, layout) }
        }
    }
}

/// Gives the heap its memory.
///
/// # Safety
/// `start..end` is mapped RAM that nothing else uses, now or later. Called once.
pub unsafe fn init_heap(start: u64, end: u64) {
    // SAFETY: by this function's contract.
    unsafe { HEAP.0.lock().init(start as *mut u8, (end - start) as usize) }
}

/// Bytes of heap in use and free.
pub fn heap_usage() -> (usize, usize) {
    let heap = HEAP.0.lock();
    (heap.used(), heap.free())
}

/// Page tables come from the heap and are never given back.
struct TableFrames;

// SAFETY: each frame is a block of its own from the heap, zeroed, and stays allocated for good.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let layout = Layout::from_size_align(PAGE_SIZE as usize, PAGE_SIZE as usize).ok()?;
        // SAFETY: the layout is not empty.
        let frame = unsafe { alloc::alloc::alloc_zeroed(layout) };
        if frame.is_null() { None } else { PhysFrame::from_start_address(PhysAddr::new(frame as u64)).ok() }
    }
}

/// What a mapped page may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Execute and read.
    Code,
    /// Read.
    Constants,
    /// Read and write.
    Data,
    /// Read and write, uncached: registers of a device.
    Device,
}

impl Use {
    fn flags(self) -> PageTableFlags {
        let nx = PageTableFlags::NO_EXECUTE;
        PageTableFlags::PRESENT
            | match self {
                Use::Code => PageTableFlags::empty(),
                Use::Constants => nx,
                Use::Data => nx | PageTableFlags::WRITABLE,
                Use::Device => nx | PageTableFlags::WRITABLE | PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH,
            }
    }
}

/// Why a page could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// The heap is exhausted.
    OutOfMemory,
    /// Something is mapped there, or the address is no physical address.
    Taken,
}

/// The final page tables.
pub struct AddressSpace(OffsetPageTable<'static>);

impl AddressSpace {
    /// Builds the tables for the image and `heap`, and switches to them.
    ///
    /// # Errors
    /// [`MapError`] when the heap cannot hold the tables.
    ///
    /// # Safety
    /// The boot page tables are in force and map image and heap one to one. Called once.
    pub unsafe fn build(heap: (u64, u64)) -> Result<AddressSpace, MapError> {
        let top = TableFrames.allocate_frame().ok_or(MapError::OutOfMemory)?;
        let table = core::ptr::with_exposed_provenance_mut::<PageTable>(top.start_address().as_u64() as usize);
        // SAFETY: a zeroed frame of our own is an empty table, and nothing else refers to it.
        let table = unsafe { &mut *table };
        // SAFETY: physical and virtual addresses of all table frames are equal, so the offset is 0.
        let mut space = AddressSpace(unsafe { OffsetPageTable::new(table, VirtAddr::zero()) });

        let guards = [&raw const boot_stack_guard as u64, &raw const trap_stack_guard as u64];
        let sections = [
            (&raw const image_start as u64, &raw const text_start as u64, Use::Constants),
            (&raw const text_start as u64, &raw const text_end as u64, Use::Code),
            (&raw const data_start as u64, &raw const image_end as u64, Use::Data),
            (heap.0, heap.1, Use::Data),
        ];
        for (start, end, usage) in sections {
            let mut address = start;
            while address < end {
                if address.is_multiple_of(Size2MiB::SIZE) && end - address >= Size2MiB::SIZE {
                    space.map_large(address, usage)?;
                    address += Size2MiB::SIZE;
                    continue;
                }
                if !guards.contains(&address) {
                    space.map(address, usage)?;
                }
                address += PAGE_SIZE;
            }
        }
        // SAFETY: the new tables map the code that runs, its stack and its data where they are.
        unsafe {
            x86_64::registers::control::Cr3::write(top, x86_64::registers::control::Cr3Flags::empty());
        }
        Ok(space)
    }

    /// Maps the page at physical `address` at the same virtual address.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(&mut self, address: u64, usage: Use) -> Result<(), MapError> {
        self.map_page::<Size4KiB>(address, usage)
    }

    /// Maps the 2 MiB at physical `address` at the same virtual address.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map_large(&mut self, address: u64, usage: Use) -> Result<(), MapError> {
        self.map_page::<Size2MiB>(address, usage)
    }

    fn map_page<S: PageSize + core::fmt::Debug>(&mut self, address: u64, usage: Use) -> Result<(), MapError>
    where
        OffsetPageTable<'static>: Mapper<S>,
    {
        let frame = PhysAddr::try_new(address).ok().and_then(|a| PhysFrame::<S>::from_start_address(a).ok());
        let page = VirtAddr::try_new(address).ok().and_then(|a| Page::<S>::from_start_address(a).ok());
        let (Some(frame), Some(page)) = (frame, page) else { return Err(MapError::Taken) };
        // SAFETY: a page that is mapped already is refused, so no memory of Rust's changes.
        let mapped = unsafe { self.0.map_to(page, frame, usage.flags(), &mut TableFrames) };
        match mapped {
            // Nothing was mapped here before: no stale translation to flush.
            Ok(flush) => flush.ignore(),
            Err(MapToError::FrameAllocationFailed) => return Err(MapError::OutOfMemory),
            Err(_) => return Err(MapError::Taken),
        }
        Ok(())
    }
}
