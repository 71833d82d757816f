//! Sleeping in Xen and ending the domain: `xen/sched.h`.

use crate::errno::Errno;
use crate::hypercall;

/// Ports one poll can take.
pub const POLL_PORTS: usize = 128;

/// Why the domain stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// It is done.
    #[doc(alias = "SHUTDOWN_poweroff")]
    Poweroff = xen_sys::SHUTDOWN_poweroff,
    /// The tools shall build it again.
    #[doc(alias = "SHUTDOWN_reboot")]
    Reboot = xen_sys::SHUTDOWN_reboot,
    /// It failed.
    #[doc(alias = "SHUTDOWN_crash")]
    Crash = xen_sys::SHUTDOWN_crash,
}

/// Sleeps until one of `ports` (at most [`POLL_PORTS`]) is pending, or until `deadline`.
///
/// Works with interrupts off, and returns at once if a port is pending already. `deadline` is
/// absolute system time in nanoseconds.
///
/// # Errors
/// What Xen answered.
pub fn poll(ports: &[u32], deadline: Option<u64>) -> Result<(), Errno> {
    let mut arg = xen_sys::sched_poll {
        ports: ports.as_ptr().cast_mut(),
        nr_ports: u32::try_from(ports.len()).unwrap_or(u32::MAX),
        // Zero means for ever, so a deadline is never zero.
        timeout: deadline.map_or(0, |at| at.max(1)),
    };
    // SAFETY: SCHEDOP_poll takes a sched_poll and only reads the ports.
    unsafe { hypercall::sched_op(xen_sys::SCHEDOP_poll, &mut arg)? };
    Ok(())
}

/// Lets others have the processor.
pub fn yield_now() {
    // SAFETY: SCHEDOP_yield takes no structure. It cannot fail in a way that leaves something to do.
    let _ = unsafe { hypercall::sched_op(xen_sys::SCHEDOP_yield, &mut 0u64) };
}

/// Ends the domain.
pub fn shutdown(reason: Reason) -> ! {
    let mut arg = xen_sys::sched_shutdown { reason: reason as u32 };
    loop {
        // SAFETY: SCHEDOP_shutdown takes a sched_shutdown. It does not return; if it ever did, asking
        // again is all that is left.
        let _ = unsafe { hypercall::sched_op(xen_sys::SCHEDOP_shutdown, &mut arg) };
    }
}
