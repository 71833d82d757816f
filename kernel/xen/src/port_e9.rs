//! Port 0xE9: Xen prints what a domain writes there (`xl dmesg`, with guest_loglvl=all). It works
//! from the first instruction, needs nothing, and is where panics go.

use core::arch::asm;
use core::fmt;

/// A writer to the port.
pub struct PortE9;

impl fmt::Write for PortE9 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the port has no effect on a domain but Xen's log line.
            unsafe { asm!("out 0xe9, al", in("al") byte, options(nomem, nostack, preserves_flags)) };
        }
        Ok(())
    }
}
