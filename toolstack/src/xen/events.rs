//! What `serve` waits for: xenstore watches and file descriptors that become readable.

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use super::{Xen, free, last_errno, path};

/// `struct pollfd` of poll(2).
#[repr(C)]
struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

const POLLIN: i16 = 1;

unsafe extern "C" {
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
}

/// Waits until one of `fds` is readable or closed by its other end, a signal comes, or the time is over; which ones
/// are is returned.
pub fn wait_readable(fds: &[RawFd], timeout: Option<Duration>) -> Vec<bool> {
    let mut polled: Vec<PollFd> = fds.iter().map(|fd| PollFd { fd: *fd, events: POLLIN, revents: 0 }).collect();
    // Rounded up, so that what is due then is due after it.
    let timeout = timeout.map_or(-1, |time| c_int::try_from(time.as_millis().saturating_add(1)).unwrap_or(c_int::MAX));
    // SAFETY: as many entries as are said, alive over the call.
    let answer = unsafe { poll(polled.as_mut_ptr(), polled.len() as c_ulong, timeout) };
    polled.iter().map(|polled| answer > 0 && polled.revents != 0).collect()
}

impl Xen {
    /// Watches a node and all below it. An event comes at once.
    pub fn watch(&self, node: &str, token: &str) -> Result<(), i32> {
        let (node, token) = (path(node)?, path(token)?);
        store!(self, "xs_watch", (node.as_ptr() => *const c_char, token.as_ptr() => *const c_char))
    }

    /// Ends a watch.
    pub fn unwatch(&self, node: &str, token: &str) -> Result<(), i32> {
        let (node, token) = (path(node)?, path(token)?);
        store!(self, "xs_unwatch", (node.as_ptr() => *const c_char, token.as_ptr() => *const c_char))
    }

    /// The next watch event, if one has come: path and token.
    ///
    /// # Errors
    /// The connection to xenstored is lost.
    pub fn next_event(&self) -> Result<Option<(String, String)>, i32> {
        const EAGAIN: i32 = 11;
        let call = function!(self.store, "xs_check_watch", fn(*mut c_void) -> *mut *mut c_char).map_err(|_| 38)?;
        // SAFETY: an open handle.
        let event = unsafe { call(self.xs) };
        if event.is_null() {
            return match last_errno() {
                EAGAIN => Ok(None),
                errno => Err(errno),
            };
        }
        // SAFETY: an event is an array of two C strings, path and token (XS_WATCH_PATH, XS_WATCH_TOKEN).
        let strings = unsafe { event.cast::<[*mut c_char; 2]>().read() };
        // SAFETY: both are C strings in the same block.
        let [path, token] = strings.map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
        // SAFETY: the block is ours to free, once.
        unsafe { free(event.cast()) };
        Ok(Some((path, token)))
    }
}

impl AsRawFd for Xen {
    /// Readable while watch events wait.
    fn as_raw_fd(&self) -> RawFd {
        let call = function!(self.store, "xs_fileno", fn(*mut c_void) -> c_int);
        // SAFETY: an open handle.
        call.map_or(-1, |fileno| unsafe { fileno(self.xs) })
    }
}
