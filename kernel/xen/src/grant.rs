//! Mapping a page that another domain granted, `xen/grant_table.h`.
//!
//! A PVH domain maps at a guest frame of its choice. The frames come from a window that the image
//! reserves: no RAM, no device, and its virtual addresses are mapped one to one.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

use crate::abi::{MapGrantRef, PAGE_SIZE, UnmapGrantRef};
use crate::hypercall;
use crate::page::Page;

const GNTTABOP_MAP_GRANT_REF: u32 = 0;
const GNTTABOP_UNMAP_GRANT_REF: u32 = 1;
const GNTMAP_HOST_MAP: u32 = 2;
const GNTST_OKAY: i16 = 0;

/// Why a grant could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// The window has no free frame: as many pages are mapped as the image has room for.
    WindowFull,
    /// The hypercall itself failed.
    Call(crate::errno::Errno),
    /// Xen refused this grant: `GNTST_*`.
    Status(i16),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::WindowFull => f.write_str("no frame left in the grant window"),
            MapError::Call(errno) => write!(f, "{errno}"),
            MapError::Status(status) => write!(f, "GNTST {status}"),
        }
    }
}

/// The frames grants can be mapped at.
#[derive(Clone, Debug)]
pub struct Window(Rc<RefCell<Vec<u64>>>);

impl Window {
    /// A window of `frames` pages at guest-physical address `base`.
    ///
    /// # Safety
    /// Nothing else is at these guest frames, and their virtual addresses equal the physical ones and
    /// are mapped writable.
    pub unsafe fn new(base: u64, frames: u64) -> Window {
        Window(Rc::new(RefCell::new((0..frames).rev().map(|frame| base + frame * PAGE_SIZE).collect())))
    }

    /// Maps the page that domain `dom` granted as `grant_ref`, writable.
    ///
    /// # Errors
    /// What Xen answered, or a full window.
    pub fn map(&self, dom: u16, grant_ref: u32) -> Result<Mapping, MapError> {
        let address = self.0.borrow_mut().pop().ok_or(MapError::WindowFull)?;
        let mut arg =
            MapGrantRef { host_addr: address, flags: GNTMAP_HOST_MAP, grant_ref, dom, ..MapGrantRef::default() };
        // SAFETY: GNTTABOP_map_grant_ref takes a gnttab_map_grant_ref; the frame is free by `new`.
        let called = unsafe { hypercall::grant_table_op(GNTTABOP_MAP_GRANT_REF, &mut arg) };
        let outcome = match called {
            Err(errno) => Err(MapError::Call(errno)),
            Ok(_) if arg.status != GNTST_OKAY => Err(MapError::Status(arg.status)),
            Ok(_) => Ok(Mapping { window: self.clone(), address, handle: arg.handle }),
        };
        if outcome.is_err() {
            self.0.borrow_mut().push(address);
        }
        outcome
    }
}

/// A mapped grant. Dropping it unmaps.
#[derive(Debug)]
pub struct Mapping {
    window: Window,
    address: u64,
    handle: u32,
}

impl Mapping {
    /// The mapped page.
    pub fn page(&self) -> Page {
        // SAFETY: mapped until drop; the caller's copies live no longer, as `Mapping`'s owner keeps
        // page and mapping together.
        unsafe { Page::new(self.address as *mut u8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut arg = UnmapGrantRef { host_addr: self.address, handle: self.handle, ..UnmapGrantRef::default() };
        // SAFETY: GNTTABOP_unmap_grant_ref takes a gnttab_unmap_grant_ref; nothing uses the page now.
        let called = unsafe { hypercall::grant_table_op(GNTTABOP_UNMAP_GRANT_REF, &mut arg) };
        if called.is_ok() && arg.status == GNTST_OKAY {
            self.window.0.borrow_mut().push(self.address);
        } else {
            // The frame may still be in use: it is lost rather than used twice.
            log::error!("unmapping a grant at {:#x} failed: {called:?}, status {}", self.address, arg.status);
        }
    }
}
