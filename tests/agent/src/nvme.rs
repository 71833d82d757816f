//! Virtualization Management of an NVMe controller (NVM Express Base 1.4, section 5.22), through Linux's `linux/nvme_ioctl.h`:
//! a virtual function answers only when its physical one has given it queues and interrupts and set it online.

use std::ffi::{c_int, c_ulong};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

/// Opcode of the command.
const VIRTUALIZATION: u8 = 0x1c;
/// `NVME_IOCTL_ADMIN_CMD`: `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const ADMIN_COMMAND: c_ulong = 0xc048_4e41;

/// `struct nvme_passthru_cmd`.
#[derive(Default)]
#[repr(C)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    dwords_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}
const _: () = assert!(size_of::<Command>() == 0x48);

unsafe extern "C" {
    fn ioctl(file: c_int, request: c_ulong, argument: *mut Command) -> c_int;
}

/// Has a controller carry out `action` for controller `id`, with `count` resources of a kind: 0 queues, 1 interrupts.
///
/// # Errors
/// The device cannot be opened, or the controller refuses.
pub fn virtualization(path: &str, id: u16, kind: u8, action: u8, count: u32) -> io::Result<()> {
    let device = OpenOptions::new().read(true).write(true).open(path)?;
    let mut command = Command { opcode: VIRTUALIZATION, ..Command::default() };
    command.dwords_10_15[0] = u32::from(id) << 16 | u32::from(kind & 7) << 8 | u32::from(action & 15);
    command.dwords_10_15[1] = count;
    // SAFETY: the file stays open during the call, and the argument is the structure that the request names, which says
    // that there are no buffers.
    let answer = unsafe { ioctl(device.as_raw_fd(), ADMIN_COMMAND, &raw mut command) };
    match answer {
        0 => Ok(()),
        ..0 => Err(io::Error::last_os_error()),
        status => Err(io::Error::other(format!("the controller answers with status {status:#x}"))),
    }
}
