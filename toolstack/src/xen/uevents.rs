//! What dom0's kernel tells of its devices: the uevents of `NETLINK_KOBJECT_UEVENT` (`linux/netlink.h`), of which errors
//! of the PCI bus are wanted (`pci_uevent_ers` in Linux's `drivers/pci/pci-driver.c`).

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `struct sockaddr_nl` of `linux/netlink.h`.
#[repr(C)]
struct NetlinkAddress {
    family: u16,
    pad: u16,
    /// The sender's port: 0 for the kernel.
    port: u32,
    /// Multicast groups.
    groups: u32,
}

const _: () = assert!(size_of::<NetlinkAddress>() == 12);

const AF_NETLINK: c_int = 16;
const SOCK_RAW: c_int = 3;
const SOCK_CLOEXEC: c_int = 0o2000000;
const SOCK_NONBLOCK: c_int = 0o4000;
const NETLINK_KOBJECT_UEVENT: c_int = 15;
/// The group that the kernel itself sends to.
const KERNEL: u32 = 1;

/// The kernel's own bound for an event (`UEVENT_BUFFER_SIZE`), with its heading.
const LONGEST: usize = 4096;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const NetlinkAddress, len: u32) -> c_int;
    fn recvfrom(
        socket: c_int,
        buffer: *mut c_void,
        len: usize,
        flags: c_int,
        address: *mut NetlinkAddress,
        address_len: *mut u32,
    ) -> isize;
}

/// The kernel's events.
pub struct Uevents(OwnedFd);

impl Uevents {
    /// Begins to listen.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open() -> std::io::Result<Uevents> {
        // SAFETY: plain numbers.
        let fd = unsafe { socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was opened just now and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = NetlinkAddress { family: AF_NETLINK as u16, pad: 0, port: 0, groups: KERNEL };
        // SAFETY: an open socket, and an address with its size.
        let bound = unsafe { bind(fd.as_raw_fd(), &raw const address, size_of::<NetlinkAddress>() as u32) };
        if bound == 0 { Ok(Uevents(fd)) } else { Err(std::io::Error::last_os_error()) }
    }

    /// The next event of the kernel's that waits: its words, `KEY=VALUE`. Those that were lost because too many waited
    /// are an event without words.
    pub fn next(&self) -> Option<Vec<String>> {
        /// Too many events waited, and some are lost.
        const ENOBUFS: i32 = 105;
        let mut buffer = [0u8; LONGEST];
        loop {
            let mut from = NetlinkAddress { family: 0, pad: 0, port: u32::MAX, groups: 0 };
            let mut len = size_of::<NetlinkAddress>() as u32;
            // SAFETY: an open socket, a buffer and an address with their sizes, alive over the call.
            let got = unsafe {
                recvfrom(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), LONGEST, 0, &raw mut from, &raw mut len)
            };
            let Ok(got) = usize::try_from(got) else {
                let lost = std::io::Error::last_os_error().raw_os_error() == Some(ENOBUFS);
                return lost.then(Vec::new);
            };
            // Other programs can send such messages; udev does.
            if from.port == 0 && len as usize == size_of::<NetlinkAddress>() {
                return Some(words(buffer.get(..got).unwrap_or_default()));
            }
        }
    }
}

impl AsRawFd for Uevents {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The words of an event.
fn words(bytes: &[u8]) -> Vec<String> {
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}
