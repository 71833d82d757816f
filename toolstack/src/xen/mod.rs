//! Xen's own libraries, loaded by soname so that one binary serves several releases: libxenctrl (its
//! name carries the release) and libxenstore here, libxencall in [`calls`], libxenvchan in [`channel`]. The only module
//! with `unsafe`.
//!
//! Prototypes: `xenctrl.h` and `xenstore.h` of 4.17; 4.20 has the same for the functions used here.

/// The symbol `name` of `library` as a function pointer. Only this module names types for it.
macro_rules! function {
    ($library:expr, $name:literal, fn($($arg:ty),*) -> $ret:ty) => {{
        // SAFETY: the prototype is the one of Xen's header.
        let symbol = unsafe { $library.get::<unsafe extern "C" fn($($arg),*) -> $ret>(concat!($name, "\0").as_bytes()) };
        symbol.map(|symbol| *symbol)
    }};
}

/// Calls a function of libxenctrl that answers 0 or -1 with errno.
macro_rules! control {
    ($xen:expr, $name:literal, ($($arg:expr => $type:ty),*)) => {{
        match function!($xen.control, $name, fn(*mut c_void, $($type),*) -> c_int) {
            Err(_) => Err(38),
            Ok(call) => {
                // SAFETY: an open handle and plain numbers (or pointers to locals) by the prototype.
                let answer = unsafe { call($xen.handle, $($arg),*) };
                if answer == 0 { Ok(()) } else { Err(last_errno()) }
            }
        }
    }};
}

/// Calls a function of libxenstore that answers a bool with errno.
macro_rules! store {
    ($xen:expr, $name:literal, ($($arg:expr => $type:ty),*)) => {{
        match function!($xen.store, $name, fn(*mut c_void, $($type),*) -> bool) {
            Err(_) => Err(38),
            Ok(call) => {
                // SAFETY: an open handle, live C strings and buffers by the prototype.
                if unsafe { call($xen.xs, $($arg),*) } { Ok(()) } else { Err(last_errno()) }
            }
        }
    }};
}

pub mod calls;
pub mod channel;
pub mod events;
pub mod uevents;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use libloading::Library;
use pciback::sbdf::Sbdf;

use crate::error::{Failure, Outcome};

/// What only dom0 may ask of the hypervisor. Errors are errno values.
pub trait Hypervisor {
    /// Moves a function to a domain's IOMMU context (`XEN_DOMCTL_assign_device`).
    fn assign(&self, domid: u32, sbdf: Sbdf, relaxed_rdm: bool) -> Result<(), i32>;
    /// Whether no guest has it: dom0 or the quarantine has. An error where Xen cannot tell (no IOMMU).
    fn is_free(&self, sbdf: Sbdf) -> Result<bool, i32>;
    /// Takes it away again.
    fn deassign(&self, domid: u32, sbdf: Sbdf) -> Result<(), i32>;
    /// Allows or forbids machine frames.
    fn iomem(&self, domid: u32, first_frame: u64, frames: u64, allow: bool) -> Result<(), i32>;
    /// Allows or forbids I/O ports.
    fn ioport(&self, domid: u32, first: u32, count: u32, allow: bool) -> Result<(), i32>;
    /// Maps a GSI to the same pirq of a domain.
    fn map_pirq(&self, domid: u32, gsi: u32) -> Result<(), i32>;
    /// Unmaps a pirq.
    fn unmap_pirq(&self, domid: u32, pirq: u32) -> Result<(), i32>;
    /// Whether an event channel of a domain is closed: free, and bound to nothing. An error if it cannot be asked.
    fn port_is_closed(&self, domid: u32, port: u32) -> Result<bool, i32>;
    /// Allows or forbids a pirq.
    fn irq(&self, domid: u32, pirq: u32, allow: bool) -> Result<(), i32>;
}

/// xenstore as dom0 sees it. `tx` 0 is outside any transaction. Errors are errno values.
pub trait Store {
    /// A node's value; `None` if there is no such node.
    fn read(&self, tx: u32, path: &str) -> Option<String>;
    /// Writes a node and makes its parents.
    fn write(&self, tx: u32, path: &str, value: &str) -> Result<(), i32>;
    /// Removes a node and all below it; none is fine.
    fn remove(&self, tx: u32, path: &str) -> Result<(), i32>;
    /// Names of a node's children.
    fn list(&self, tx: u32, path: &str) -> Vec<String>;
    /// Makes `owner` the owner of a node that `reader` may read.
    fn permit(&self, tx: u32, path: &str, owner: u32, reader: Option<u32>) -> Result<(), i32>;
    /// Starts a transaction.
    fn begin(&self) -> Result<u32, i32>;
    /// Ends it; EAGAIN asks to repeat.
    fn end(&self, tx: u32, commit: bool) -> Result<(), i32>;
}

/// Runs `body` in a transaction until it commits without a conflict.
///
/// # Errors
/// What the body or xenstored answered; nothing was changed then.
pub fn transaction<S: Store + ?Sized, T>(store: &S, body: impl Fn(u32) -> Result<T, i32>) -> Result<T, i32> {
    const EAGAIN: i32 = 11;
    for _ in 0..16 {
        let tx = store.begin()?;
        let done = match body(tx) {
            Ok(done) => done,
            Err(errno) => {
                // Dropping it cannot change anything.
                let _ = store.end(tx, false);
                return Err(errno);
            }
        };
        match store.end(tx, true) {
            Err(EAGAIN) => {}
            ended => return ended.map(|()| done),
        }
    }
    Err(EAGAIN)
}

/// `struct xs_permissions`.
#[repr(C)]
struct Permission {
    id: c_uint,
    perms: c_uint,
}

/// `struct evtchn_status` of `xen/event_channel.h`.
#[repr(C)]
#[derive(Default)]
struct EvtchnStatus {
    dom: u16,
    port: u32,
    status: u32,
    vcpu: u32,
    /// By status.
    more: [u32; 2],
}

const _: () = assert!(size_of::<EvtchnStatus>() == 24);

const EVTCHNSTAT_CLOSED: u32 = 0;
const XS_PERM_NONE: c_uint = 0;
const XS_PERM_READ: c_uint = 1;
const XEN_DOMCTL_DEV_RDM_RELAXED: u32 = 1;
const DOMID_INVALID: u32 = 0x7ff4;

/// Both libraries with an open handle each.
pub struct Xen {
    release: String,
    libdir: Option<String>,
    control: Library,
    handle: *mut c_void,
    store: Library,
    xs: *mut c_void,
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(5)
}

/// The running Xen's release, "4.17", from sysfs.
pub fn release() -> Option<String> {
    let read = |name: &str| fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok();
    Some(format!("{}.{}", read("major")?.trim(), read("minor")?.trim()))
}

unsafe extern "C" {
    fn free(pointer: *mut c_void);
    fn write(fd: c_int, data: *const c_void, len: usize) -> isize;
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> *mut c_void;
}

/// Whether the user asked to stop since [`hold_interrupts`].
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// A descriptor that is written to when one of these signals comes; -1 for none.
static WAKE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note_interrupt(_: c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
    let wake = WAKE.load(Ordering::Relaxed);
    if wake >= 0 {
        // SAFETY: write(2) may be called in a signal handler; the byte lives. A full or closed pipe is no harm.
        unsafe { write(wake, [1u8].as_ptr().cast(), 1) };
    }
}

/// From now on these signals also make the other end of `wake` readable; it must stay open for good.
pub fn wake_on_signal(wake: &UnixStream) {
    WAKE.store(wake.as_raw_fd(), Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP end waits instead of the program, so that what was begun is
/// undone or finished.
pub fn hold_interrupts() {
    const SIGHUP: c_int = 1;
    const SIGINT: c_int = 2;
    const SIGTERM: c_int = 15;
    for number in [SIGHUP, SIGINT, SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is safe in a signal handler.
        unsafe { signal(number, note_interrupt) };
    }
}

/// Whether one of these signals came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Loads the first of `names` that is there.
fn load(names: &[String]) -> Option<Library> {
    names.iter().find_map(|name| {
        // SAFETY: Xen's libraries run no code of their own when they are loaded.
        unsafe { Library::new(name) }.ok()
    })
}

/// Loads a library of the running release, from `libdir` if given.
fn find(name: &str, release: &str, libdir: Option<&str>) -> Outcome<Library> {
    let names: Vec<String> = match libdir {
        Some(folder) => vec![format!("{folder}/{name}")],
        None => ["", "/usr/lib/x86_64-linux-gnu/", "/usr/lib64/", "/usr/lib/", "/usr/local/lib/"]
            .map(String::from)
            .into_iter()
            .chain([format!("/usr/lib/xen-{release}/lib/x86_64-linux-gnu/"), format!("/usr/lib/xen-{release}/lib/")])
            .map(|folder| format!("{folder}{name}"))
            .collect(),
    };
    load(&names).ok_or_else(|| {
        let place = libdir.map(|folder| format!(" in {folder}")).unwrap_or_default();
        Failure::new(
            format!("{name} cannot be loaded{place}"),
            format!("install Xen's tools for {release} (Debian: xen-utils-{release}), or name their folder: --libdir"),
        )
    })
}

impl Xen {
    /// Loads the libraries of the running release, from `libdir` if given, and opens both interfaces.
    ///
    /// # Errors
    /// Not under Xen, not in dom0, or no libraries of this release.
    pub fn open(libdir: Option<&str>) -> Outcome<Xen> {
        let release = release().ok_or_else(|| {
            Failure::new(
                "not running under Xen as dom0: there is no /sys/hypervisor/version",
                "run xl-pciback in dom0 of a Xen host, as root",
            )
        })?;
        let name = format!("libxenctrl.so.{release}");
        let control = find(&name, &release, libdir)?;
        let store = find("libxenstore.so.4", &release, libdir)?;
        let missing = |_| {
            Failure::new(format!("{name} lacks a function this tool needs"), "report the Xen release to the project")
        };
        let open = function!(control, "xc_interface_open", fn(*mut c_void, *mut c_void, c_uint) -> *mut c_void)
            .map_err(missing)?;
        // SAFETY: null loggers are allowed; no flags.
        let handle = unsafe { open(std::ptr::null_mut(), std::ptr::null_mut(), 0) };
        let xs_open = function!(store, "xs_open", fn(c_ulong) -> *mut c_void).map_err(missing)?;
        // SAFETY: no flags.
        let xs = unsafe { xs_open(0) };
        if handle.is_null() || xs.is_null() {
            return Err(Failure::new(
                format!(
                    "not running under Xen as dom0: Xen's {} interface cannot be opened",
                    if xs.is_null() { "xenstore" } else { "control" }
                ),
                "run as root in dom0, with xenstored running",
            ));
        }
        Ok(Xen { release, libdir: libdir.map(String::from), control, handle, store, xs })
    }

    /// The running Xen's release, "4.17".
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Another of Xen's libraries.
    fn library(&self, name: &str) -> Outcome<Library> {
        find(name, &self.release, self.libdir.as_deref())
    }
}

impl Drop for Xen {
    fn drop(&mut self) {
        if let Ok(close) = function!(self.control, "xc_interface_close", fn(*mut c_void) -> c_int) {
            // SAFETY: our handle, used no more.
            unsafe { close(self.handle) };
        }
        if let Ok(close) = function!(self.store, "xs_close", fn(*mut c_void) -> ()) {
            // SAFETY: our handle, used no more.
            unsafe { close(self.xs) };
        }
    }
}

impl Xen {
    /// Stops a domain, or lets it go on.
    pub fn pause(&self, domid: u32, still: bool) -> Result<(), i32> {
        if still {
            control!(self, "xc_domain_pause", (domid => u32))
        } else {
            control!(self, "xc_domain_unpause", (domid => u32))
        }
    }
}

impl Hypervisor for Xen {
    fn assign(&self, domid: u32, sbdf: Sbdf, relaxed_rdm: bool) -> Result<(), i32> {
        let flag = if relaxed_rdm { XEN_DOMCTL_DEV_RDM_RELAXED } else { 0 };
        control!(self, "xc_assign_device", (domid => u32, sbdf.packed() => u32, flag => u32))
    }

    fn is_free(&self, sbdf: Sbdf) -> Result<bool, i32> {
        match control!(self, "xc_test_assign_device", (DOMID_INVALID => u32, sbdf.packed() => u32)) {
            Ok(()) => Ok(true),
            // EINVAL, EBUSY: "already assigned, or non-existent".
            Err(16 | 22) => Ok(false),
            Err(number) => Err(number),
        }
    }

    fn deassign(&self, domid: u32, sbdf: Sbdf) -> Result<(), i32> {
        control!(self, "xc_deassign_device", (domid => u32, sbdf.packed() => u32))
    }

    fn iomem(&self, domid: u32, first_frame: u64, frames: u64, allow: bool) -> Result<(), i32> {
        control!(self, "xc_domain_iomem_permission",
            (domid => u32, first_frame => c_ulong, frames => c_ulong, u8::from(allow) => u8))
    }

    fn ioport(&self, domid: u32, first: u32, count: u32, allow: bool) -> Result<(), i32> {
        control!(self, "xc_domain_ioport_permission",
            (domid => u32, first => u32, count => u32, u32::from(allow) => u32))
    }

    fn map_pirq(&self, domid: u32, gsi: u32) -> Result<(), i32> {
        let gsi = c_int::try_from(gsi).map_err(|_| 22)?;
        let mut pirq = gsi;
        control!(self, "xc_physdev_map_pirq", (domid => u32, gsi => c_int, &raw mut pirq => *mut c_int))?;
        // The guest binds the number that we tell it; another one would be another interrupt.
        if pirq == gsi { Ok(()) } else { Err(17) }
    }

    fn unmap_pirq(&self, domid: u32, pirq: u32) -> Result<(), i32> {
        let pirq = c_int::try_from(pirq).map_err(|_| 22)?;
        control!(self, "xc_physdev_unmap_pirq", (domid => u32, pirq => c_int))
    }

    fn port_is_closed(&self, domid: u32, port: u32) -> Result<bool, i32> {
        let mut status = EvtchnStatus { dom: domid as u16, port, ..EvtchnStatus::default() };
        control!(self, "xc_evtchn_status", (&raw mut status => *mut EvtchnStatus))?;
        Ok(status.status == EVTCHNSTAT_CLOSED)
    }

    fn irq(&self, domid: u32, pirq: u32, allow: bool) -> Result<(), i32> {
        control!(self, "xc_domain_irq_permission", (domid => u32, pirq => u32, allow => bool))
    }
}

fn path(text: &str) -> Result<CString, i32> {
    CString::new(text).map_err(|_| 22)
}

impl Store for Xen {
    fn read(&self, tx: u32, node: &str) -> Option<String> {
        let node = path(node).ok()?;
        let call =
            function!(self.store, "xs_read", fn(*mut c_void, u32, *const c_char, *mut c_uint) -> *mut c_void).ok()?;
        let mut len: c_uint = 0;
        // SAFETY: an open handle, a live path, room for the length.
        let value = unsafe { call(self.xs, tx, node.as_ptr(), &raw mut len) };
        if value.is_null() {
            return None;
        }
        // SAFETY: xs_read returns `len` bytes in a block of malloc.
        let bytes = unsafe { std::slice::from_raw_parts(value.cast::<u8>(), len as usize) }.to_vec();
        // SAFETY: the block is ours to free, once.
        unsafe { free(value) };
        String::from_utf8(bytes).ok()
    }

    fn write(&self, tx: u32, node: &str, value: &str) -> Result<(), i32> {
        let node = path(node)?;
        store!(self, "xs_write", (tx => u32, node.as_ptr() => *const c_char,
            value.as_ptr().cast() => *const c_void, value.len() as c_uint => c_uint))
    }

    fn remove(&self, tx: u32, node: &str) -> Result<(), i32> {
        let node = path(node)?;
        match store!(self, "xs_rm", (tx => u32, node.as_ptr() => *const c_char)) {
            Err(2) => Ok(()),
            other => other,
        }
    }

    fn list(&self, tx: u32, node: &str) -> Vec<String> {
        let Ok(node) = path(node) else { return Vec::new() };
        let call =
            function!(self.store, "xs_directory", fn(*mut c_void, u32, *const c_char, *mut c_uint) -> *mut *mut c_char);
        let Ok(call) = call else { return Vec::new() };
        let mut count: c_uint = 0;
        // SAFETY: an open handle, a live path, room for the count.
        let names = unsafe { call(self.xs, tx, node.as_ptr(), &raw mut count) };
        if names.is_null() {
            return Vec::new();
        }
        let mut list = Vec::new();
        for index in 0..count as usize {
            // SAFETY: the array has `count` pointers.
            let name = unsafe { names.wrapping_add(index).read() };
            // SAFETY: each points to a C string in the same block.
            list.push(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned());
        }
        // SAFETY: array and strings are one block, ours to free, once.
        unsafe { free(names.cast()) };
        list
    }

    fn permit(&self, tx: u32, node: &str, owner: u32, reader: Option<u32>) -> Result<(), i32> {
        let node = path(node)?;
        let mut perms = vec![Permission { id: owner, perms: XS_PERM_NONE }];
        perms.extend(reader.map(|id| Permission { id, perms: XS_PERM_READ }));
        store!(self, "xs_set_permissions", (tx => u32, node.as_ptr() => *const c_char,
            perms.as_mut_ptr() => *mut Permission, perms.len() as c_uint => c_uint))
    }

    fn begin(&self) -> Result<u32, i32> {
        let call = function!(self.store, "xs_transaction_start", fn(*mut c_void) -> u32).map_err(|_| 38)?;
        // SAFETY: an open handle.
        match unsafe { call(self.xs) } {
            0 => Err(last_errno()),
            tx => Ok(tx),
        }
    }

    fn end(&self, tx: u32, commit: bool) -> Result<(), i32> {
        store!(self, "xs_transaction_end", (tx => u32, !commit => bool))
    }
}
