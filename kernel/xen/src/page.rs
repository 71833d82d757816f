//! A page that somebody else may change at any time: the peer of a ring, Xen, or a device.
//!
//! No reference into it is ever formed but to an atomic; every access is one volatile or atomic
//! access of its width, bounds-checked against the page.

use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use crate::abi::PAGE_SIZE;

/// A mapped page of shared memory or of device registers.
#[derive(Clone, Copy, Debug)]
pub struct Page(*mut u8);

// SAFETY: every access is volatile or atomic, as a peer changes the page anyway; there is one vCPU.
unsafe impl Send for Page {}

/// An access width in a [`Page`].
pub trait Word: Copy + 'static {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Page {
    /// The page at `address`.
    ///
    /// # Safety
    /// A whole page is mapped there, readable and (where written) writable, for as long as the value
    /// or a copy of it is used, and Rust owns nothing in it.
    pub const unsafe fn new(address: *mut u8) -> Page {
        Page(address)
    }

    /// Where it is.
    pub fn address(self) -> u64 {
        self.0 as u64
    }

    /// Checked pointer to a naturally aligned `T` at `offset` bytes.
    fn at<T: Word>(self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(offset.is_multiple_of(size) && offset + size <= PAGE_SIZE as usize, "page access at {offset:#x}");
        self.0.wrapping_add(offset).cast()
    }

    /// One volatile read at `offset`, naturally aligned.
    pub fn read<T: Word>(self, offset: usize) -> T {
        // SAFETY: `at` keeps the access in the page, which is mapped by `new`'s contract.
        unsafe { self.at::<T>(offset).read_volatile() }
    }

    /// One volatile write at `offset`, naturally aligned.
    pub fn write<T: Word>(self, offset: usize, value: T) {
        // SAFETY: `at` keeps the access in the page, which is mapped by `new`'s contract.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// The byte at `offset` as an atomic.
    pub fn atomic8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: in the page by `at`; atomics may be shared with any peer.
        unsafe { AtomicU8::from_ptr(self.at::<u8>(offset)) }
    }

    /// The 16-bit word at `offset` as an atomic.
    pub fn atomic16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: in the page and aligned by `at`; atomics may be shared with any peer.
        unsafe { AtomicU16::from_ptr(self.at::<u16>(offset)) }
    }

    /// The 32-bit word at `offset` as an atomic.
    pub fn atomic32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: in the page and aligned by `at`; atomics may be shared with any peer.
        unsafe { AtomicU32::from_ptr(self.at::<u32>(offset)) }
    }

    /// The 64-bit word at `offset` as an atomic.
    pub fn atomic64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: in the page and aligned by `at`; atomics may be shared with any peer.
        unsafe { AtomicU64::from_ptr(self.at::<u64>(offset)) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use core::sync::atomic::Ordering;
    use std::boxed::Box;

    #[repr(C, align(4096))]
    pub(crate) struct Frame(pub(crate) [u8; 4096]);

    /// A page for a test, leaked so that it outlives every copy.
    pub(crate) fn page() -> Page {
        let frame = Box::leak(Box::new(Frame([0; 4096])));
        // SAFETY: leaked, page-aligned, and used through the `Page` alone.
        unsafe { Page::new(frame.0.as_mut_ptr()) }
    }

    #[test]
    fn each_width_reads_back_little_endian() {
        let page = page();
        page.write(8, 0x1122_3344u32);
        assert_eq!(page.read::<u8>(8), 0x44);
        assert_eq!(page.read::<u16>(10), 0x1122);
        page.write(4094, 0xabcdu16);
        assert_eq!(page.read::<u8>(4095), 0xab);
    }

    #[test]
    fn narrow_atomics_change_nothing_beside_them() {
        let page = page();
        page.write(8, u64::MAX);
        assert_eq!(page.atomic8(9).fetch_and(!2, Ordering::AcqRel), 0xff);
        page.atomic16(12).store(0x1234, Ordering::Release);
        assert_eq!(page.read::<u64>(8), 0xffff_1234_ffff_fdff);
    }

    #[test]
    #[should_panic(expected = "page access at 0xffe")]
    fn an_access_past_the_end_stops() {
        page().read::<u32>(4094);
    }
}
