//! The physdev hypercalls that a driver domain may not make, by libxencall. libxenctrl has no function for most of them,
//! and none of its own with a PCI segment. Commands and layouts are the image's (`xen-guest`), which a test of that
//! crate compares with Xen's headers.

use std::ffi::{c_int, c_uint, c_void};

use libloading::Library;
use pciback::physdev::{Pirq, Vector};
use pciback::platform::DomId;
use pciback::sbdf::Sbdf;
use xen_guest::abi::{MapPirq, PciDevice, UnmapPirq};
use xen_guest::physdev::{self, MAP_PIRQ, PREPARE_MSIX, RELEASE_MSIX, RESTORE_MSI_EXT, UNMAP_PIRQ};

use super::{Xen, last_errno};
use crate::error::{Failure, Outcome};

/// `__HYPERVISOR_physdev_op` of `xen/xen.h`.
const PHYSDEV_OP: u64 = 33;

/// The calls. Errors are errno values.
pub trait Physdev {
    /// Has Xen take a function's MSI-X table under its protection.
    fn prepare_msix(&self, sbdf: Sbdf) -> Result<(), i32>;
    /// Undoes that.
    fn release_msix(&self, sbdf: Sbdf) -> Result<(), i32>;
    /// Has Xen write a function's vectors again.
    fn restore_msi(&self, sbdf: Sbdf) -> Result<(), i32>;
    /// Maps a message interrupt into a guest.
    fn map(&self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, i32>;
    /// Takes it back.
    fn unmap(&self, guest: DomId, pirq: Pirq) -> Result<(), i32>;
}

/// libxencall with an open handle and a buffer that hypercalls can reach.
pub struct Calls {
    library: Library,
    handle: *mut c_void,
    buffer: *mut c_void,
}

/// Bytes of the buffer: more than the longest argument.
const BUFFER: usize = 64;

impl Calls {
    /// Opens it.
    ///
    /// # Errors
    /// No library, or not in dom0.
    pub fn open(xen: &Xen) -> Outcome<Calls> {
        let library = xen.library("libxencall.so.1")?;
        let missing = |_| Failure::new("libxencall.so.1 lacks a function", "report the Xen release to the project");
        let open = function!(library, "xencall_open", fn(*mut c_void, c_uint) -> *mut c_void).map_err(missing)?;
        let alloc =
            function!(library, "xencall_alloc_buffer", fn(*mut c_void, usize) -> *mut c_void).map_err(missing)?;
        // SAFETY: a null logger is allowed; no flags.
        let handle = unsafe { open(std::ptr::null_mut(), 0) };
        if handle.is_null() {
            return Err(Failure::new("hypercalls are not to be had", "run as root in dom0"));
        }
        // SAFETY: an open handle.
        let buffer = unsafe { alloc(handle, BUFFER) };
        if buffer.is_null() {
            return Err(Failure::new("no memory for hypercalls", "see dmesg of dom0"));
        }
        Ok(Calls { library, handle, buffer })
    }

    /// Makes one call with `argument`, which is read back after it.
    fn physdev<T: Copy>(&self, command: u32, argument: &mut T) -> Result<(), i32> {
        const { assert!(size_of::<T>() <= BUFFER) };
        let call = function!(self.library, "xencall2", fn(*mut c_void, c_uint, u64, u64) -> c_int).map_err(|_| 38)?;
        // SAFETY: the buffer has room, is aligned to a page or more than any `T` needs, and is this thread's.
        unsafe { self.buffer.cast::<T>().write(*argument) };
        // SAFETY: an open handle; the argument's layout is the command's, and it lies in a hypercall buffer.
        let answer = unsafe { call(self.handle, PHYSDEV_OP as c_uint, command.into(), self.buffer as u64) };
        if answer < 0 {
            return Err(last_errno());
        }
        // SAFETY: written above, and by Xen.
        *argument = unsafe { self.buffer.cast::<T>().read() };
        Ok(())
    }

    fn on_function(&self, command: u32, sbdf: Sbdf) -> Result<(), i32> {
        self.physdev(command, &mut PciDevice { seg: sbdf.segment(), bus: sbdf.bus(), devfn: sbdf.devfn() })
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        if let Ok(free) = function!(self.library, "xencall_free_buffer", fn(*mut c_void, *mut c_void) -> ()) {
            // SAFETY: our buffer, used no more.
            unsafe { free(self.handle, self.buffer) };
        }
        if let Ok(close) = function!(self.library, "xencall_close", fn(*mut c_void) -> c_int) {
            // SAFETY: our handle, used no more.
            unsafe { close(self.handle) };
        }
    }
}

impl Physdev for Calls {
    fn prepare_msix(&self, sbdf: Sbdf) -> Result<(), i32> {
        self.on_function(PREPARE_MSIX, sbdf)
    }

    fn release_msix(&self, sbdf: Sbdf) -> Result<(), i32> {
        self.on_function(RELEASE_MSIX, sbdf)
    }

    fn restore_msi(&self, sbdf: Sbdf) -> Result<(), i32> {
        self.on_function(RESTORE_MSI_EXT, sbdf)
    }

    fn map(&self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, i32> {
        let vector = match vector {
            Vector::Msi => physdev::Vector::Msi,
            Vector::MultiMsi { count } => physdev::Vector::MultiMsi(count),
            Vector::Msix { entry, table_base } => physdev::Vector::Msix(entry, table_base),
        };
        let function = physdev::Function { segment: sbdf.segment(), bus: sbdf.bus(), devfn: sbdf.devfn() };
        let mut argument: MapPirq = physdev::map_argument(guest, function, vector);
        self.physdev(MAP_PIRQ, &mut argument)?;
        Ok(argument.pirq)
    }

    fn unmap(&self, guest: DomId, pirq: Pirq) -> Result<(), i32> {
        self.physdev(UNMAP_PIRQ, &mut UnmapPirq { domid: guest, pirq })
    }
}
