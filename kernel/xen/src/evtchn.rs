//! Event channels, two-level ABI (`xen/event_channel.h`, `xen/xen.h`).
//!
//! Every port stays masked: nothing is delivered, the event loop polls. A pending bit is consumed
//! *before* the ring behind it is looked at, so that an event that comes meanwhile is not lost.

use core::sync::atomic::Ordering;

use crate::abi::{DOMID_SELF, shared_info};
use crate::errno::Errno;
use crate::hypercall;
use crate::page::Page;

/// The pending bits in the shared info page.
#[derive(Clone, Copy, Debug)]
pub struct Pending(Page);

impl Pending {
    /// Takes the shared info page and masks every port.
    pub fn new(shared: Page) -> Pending {
        for word in 0..64 {
            shared.write(shared_info::EVTCHN_MASK + word * 8, u64::MAX);
        }
        Pending(shared)
    }

    /// Whether the pending bit of `port` is set; it stays as it is.
    pub fn is_set(self, port: u32) -> bool {
        let word = shared_info::EVTCHN_PENDING + (port / 64) as usize * 8;
        port < shared_info::PORTS && self.0.atomic64(word).load(Ordering::Acquire) & (1 << (port % 64)) != 0
    }

    /// Consumes the pending bit of `port`; true if it was set.
    pub fn take(self, port: u32) -> bool {
        // A plain load first: most ports of a wake-up are not pending.
        if !self.is_set(port) {
            return false;
        }
        let word = self.0.atomic64(shared_info::EVTCHN_PENDING + (port / 64) as usize * 8);
        let bit = 1 << (port % 64);
        word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }
}

/// A port bound by this domain. Dropping it closes the port.
#[derive(Debug)]
pub struct BoundPort(u32);

impl BoundPort {
    /// Binds to the unbound port `remote_port` that domain `remote` allocated for us.
    ///
    /// # Errors
    /// What Xen answered.
    pub fn interdomain(remote: u16, remote_port: u32) -> Result<BoundPort, Errno> {
        let mut arg = xen_sys::evtchn_bind_interdomain { remote_dom: remote, remote_port, local_port: 0 };
        // SAFETY: EVTCHNOP_bind_interdomain takes an evtchn_bind_interdomain.
        unsafe { hypercall::event_channel_op(xen_sys::EVTCHNOP_bind_interdomain, &mut arg)? };
        Ok(BoundPort(arg.local_port))
    }

    /// Allocates a port that domain `remote` may bind to. When the peer closes its end, Xen turns this
    /// one back to unbound, so that `remote` can bind again.
    ///
    /// # Errors
    /// What Xen answered.
    pub fn unbound(remote: u16) -> Result<BoundPort, Errno> {
        let mut arg = xen_sys::evtchn_alloc_unbound { dom: DOMID_SELF, remote_dom: remote, port: 0 };
        // SAFETY: EVTCHNOP_alloc_unbound takes an evtchn_alloc_unbound.
        unsafe { hypercall::event_channel_op(xen_sys::EVTCHNOP_alloc_unbound, &mut arg)? };
        Ok(BoundPort(arg.port))
    }

    /// The local port number.
    pub fn port(&self) -> u32 {
        self.0
    }

    /// Sends an event to the peer.
    pub fn notify(&self) {
        send(self.0);
    }
}

impl Drop for BoundPort {
    fn drop(&mut self) {
        let mut arg = xen_sys::evtchn_close { port: self.0 };
        // SAFETY: EVTCHNOP_close takes an evtchn_close. The port is ours; closing it cannot fail in a
        // way that leaves something to do.
        let _ = unsafe { hypercall::event_channel_op(xen_sys::EVTCHNOP_close, &mut arg) };
    }
}

/// Sends an event through `port`. A peer that is gone is no error.
pub fn send(port: u32) {
    let mut arg = xen_sys::evtchn_send { port };
    // SAFETY: EVTCHNOP_send takes an evtchn_send.
    let _ = unsafe { hypercall::event_channel_op(xen_sys::EVTCHNOP_send, &mut arg) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::tests::page;

    #[test]
    fn a_pending_bit_is_taken_once_and_every_port_is_masked() {
        let shared = page();
        let pending = Pending::new(shared);
        assert_eq!(shared.read::<u64>(2560), u64::MAX);
        assert_eq!(shared.read::<u64>(2560 + 63 * 8), u64::MAX);
        shared.write(2048 + 8, 1u64 << 3);
        assert!(!pending.take(66));
        assert!(pending.is_set(67) && !pending.is_set(66) && !pending.is_set(4096));
        assert!(pending.take(67));
        assert!(!pending.take(67));
        assert!(!pending.take(4096));
    }
}
