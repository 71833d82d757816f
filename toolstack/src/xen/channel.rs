//! dom0's end of the channel to a driver domain, by libxenvchan. What comes through it is the driver domain's word:
//! whole messages, looked at by [`crate::serve`].

use std::ffi::{CString, c_char, c_int, c_void};

use libloading::Library;
use pciback::delegate::message::{ANSWER, CHANNEL, REQUEST};

use super::Xen;
use crate::error::{Failure, Outcome};

/// Requests thrown away when a channel is taken over: as many as it holds.
const LEFT_OVER: usize = 64;

/// The first fields of `struct libxenvchan`.
#[repr(C)]
struct Head {
    pointers: [*mut c_void; 3],
    event_port: u32,
    flags: u32,
}

/// `blocking`, the third bit field behind `is_server` and `server_persist`.
const BLOCKING: u32 = 1 << 2;

/// The library's functions on an open channel. They are looked up once: that takes longer than most of them do.
struct Functions {
    receive: unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int,
    ready: unsafe extern "C" fn(*mut c_void) -> c_int,
    send: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> c_int,
    fd: unsafe extern "C" fn(*mut c_void) -> c_int,
    wait: unsafe extern "C" fn(*mut c_void) -> c_int,
    close: unsafe extern "C" fn(*mut c_void),
}

impl Functions {
    fn of(library: &Library) -> Result<Functions, libloading::Error> {
        Ok(Functions {
            receive: function!(library, "libxenvchan_recv", fn(*mut c_void, *mut c_void, usize) -> c_int)?,
            ready: function!(library, "libxenvchan_data_ready", fn(*mut c_void) -> c_int)?,
            send: function!(library, "libxenvchan_send", fn(*mut c_void, *const c_void, usize) -> c_int)?,
            fd: function!(library, "libxenvchan_fd_for_select", fn(*mut c_void) -> c_int)?,
            wait: function!(library, "libxenvchan_wait", fn(*mut c_void) -> c_int)?,
            close: function!(library, "libxenvchan_close", fn(*mut c_void) -> ())?,
        })
    }
}

/// An open channel.
pub struct Channel {
    control: *mut c_void,
    functions: Functions,
    // Dropped after the last use of the functions.
    _library: Library,
}

impl Channel {
    /// Connects to the end that domain `domid` has announced.
    ///
    /// # Errors
    /// There is none, or another program is connected to it.
    pub fn open(xen: &Xen, domid: u32) -> Outcome<Channel> {
        let library = xen.library(&format!("libxenvchan.so.{}", xen.release()))?;
        let missing = |_| Failure::new("libxenvchan lacks a function", "report the Xen release to the project");
        let init = function!(library, "libxenvchan_client_init", fn(*mut c_void, c_int, *const c_char) -> *mut c_void)
            .map_err(missing)?;
        let functions = Functions::of(&library).map_err(missing)?;
        let path = CString::new(format!("/local/domain/{domid}/{CHANNEL}")).unwrap_or_default();
        let number = c_int::try_from(domid).unwrap_or(c_int::MAX);
        // SAFETY: a null logger is allowed; the path is a live C string.
        let control = unsafe { init(std::ptr::null_mut(), number, path.as_ptr()) };
        // SAFETY: libxenvchan.h: behind three pointers and the port come the flags; the third, "blocking", is never set by
        // the library. A null pointer gives `None`.
        let Some(head) = (unsafe { control.cast::<Head>().as_mut() }) else {
            return Err(Failure::new(
                format!("the channel of domain {domid} cannot be opened"),
                "see whether another xl-pciback serve runs",
            ));
        };
        // What waits in the channel is waited for by poll, so nothing may block.
        head.flags &= !BLOCKING;
        let channel = Channel { control, functions, _library: library };
        // What the last one left unread is not for this one.
        let mut request = [0; REQUEST];
        (0..LEFT_OVER).find(|_| !channel.receive(&mut request));
        Ok(channel)
    }

    /// Takes a request, if a whole one has come.
    pub fn receive(&self, request: &mut [u8; REQUEST]) -> bool {
        // SAFETY: an open channel; the buffer has the size that is said.
        self.has_data()
            && unsafe { (self.functions.receive)(self.control, request.as_mut_ptr().cast(), REQUEST) }
                == REQUEST as c_int
    }

    /// Whether a whole request has come. If not, an event tells when one may have.
    pub fn has_data(&self) -> bool {
        // SAFETY: an open channel.
        unsafe { (self.functions.ready)(self.control) >= REQUEST as c_int }
    }

    /// Sends an answer. One for which there is no room is lost: a driver domain that does not read waits for none.
    pub fn send(&self, answer: &[u8; ANSWER]) -> bool {
        // SAFETY: an open channel; the buffer has the size that is said.
        unsafe { (self.functions.send)(self.control, answer.as_ptr().cast(), ANSWER) == ANSWER as c_int }
    }

    /// Becomes readable when [`Channel::has_data`] may have changed.
    pub fn fd(&self) -> c_int {
        // SAFETY: an open channel.
        unsafe { (self.functions.fd)(self.control) }
    }

    /// Takes the event that made [`Channel::fd`] readable. Waits if there is none.
    pub fn take_event(&self) {
        // SAFETY: an open channel.
        unsafe { (self.functions.wait)(self.control) };
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: our channel, used no more.
        unsafe { (self.functions.close)(self.control) };
    }
}
