//! What the backend asks of the machine it runs on: configuration space, the shared page, the event
//! channel, xenstore and a clock. The image implements these traits over Xen; host tests implement
//! them over models. Nothing above this file knows which one it has.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::delegate::Down;
use crate::physdev::Physdev;
use crate::sbdf::Sbdf;
use crate::wire::{AerRequest, MsixEntry, RawReply, RawRequest};

/// A Xen domain number.
pub type DomId = u16;

/// A local event-channel port, as the event loop reports it.
pub type Port = u32;

/// A point in time: nanoseconds of Xen's system time.
pub type Nanos = u64;

/// Width of one configuration access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    Byte,
    /// Two bytes, at an even offset.
    Word,
    /// Four bytes, at an offset divisible by four.
    Dword,
}

impl Width {
    /// The width in bytes: 1, 2 or 4.
    pub const fn bytes(self) -> u16 {
        match self {
            Width::Byte => 1,
            Width::Word => 2,
            Width::Dword => 4,
        }
    }

    /// The width of `bytes` bytes, or `None` if no access has that width.
    pub const fn from_bytes(bytes: i32) -> Option<Width> {
        match bytes {
            1 => Some(Width::Byte),
            2 => Some(Width::Word),
            4 => Some(Width::Dword),
            _ => None,
        }
    }

    /// All ones at this width.
    pub const fn mask(self) -> u32 {
        match self {
            Width::Byte => 0xff,
            Width::Word => 0xffff,
            Width::Dword => 0xffff_ffff,
        }
    }
}

/// How writes reach a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through its ECAM frame.
    Frame,
    /// By dom0.
    Dom0,
    /// Through its ECAM frame, which Xen does not watch; those to the Message Control registers of MSI and MSI-X at
    /// these offsets by dom0, so that Xen sees them.
    Split([Option<u16>; 2]),
}

impl Way {
    /// Whether dom0 makes the write at `offset`.
    pub fn is_dom0s(self, offset: u16, width: Width) -> bool {
        match self {
            Way::Frame => false,
            Way::Dom0 => true,
            Way::Split(controls) => {
                controls.iter().flatten().any(|control| offset < control + 2 && *control < offset + width.bytes())
            }
        }
    }
}

/// The configuration space refuses a write: this host does not let the domain write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WritesOff;

/// The 4 KiB configuration space of the one function it was made for.
///
/// `offset` is below 4096 and a multiple of the width: the caller has checked both.
pub trait ConfigSpace {
    /// Reads a naturally aligned register; what no hardware answers reads as all ones.
    fn read(&self, offset: u16, width: Width) -> u32;

    /// Writes a naturally aligned register.
    ///
    /// # Errors
    /// [`WritesOff`] where the host's mode does not allow the write; nothing was written.
    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff>;

    /// Whether writes reach the hardware now.
    fn writable(&self) -> bool;

    /// Lets writes through from now on, this way. On a Xen that protects the frame a write to it ends the domain, so
    /// this is called only once it is known that it does not.
    fn allow_writes(&mut self, way: Way);
}

/// The page a frontend granted: `struct xen_pci_sharedinfo` of `xen/io/pciif.h`.
///
/// The peer changes it at any time; every method makes one volatile or atomic access a field.
/// Dropping it unmaps the page.
pub trait SharedPage {
    /// The flag word, with acquire order.
    fn flags(&self) -> u32;

    /// Copies the request fields out of the page, each read once.
    fn request(&self) -> RawRequest;

    /// Copies the first entries of `op.msix_entries` out of the page, each read once.
    fn msix_entries(&self, into: &mut [MsixEntry]);

    /// Writes the `vector` halves of the first entries of `op.msix_entries`; the other halves stay as they are.
    /// Comes before [`SharedPage::reply`].
    fn reply_vectors(&self, entries: &[MsixEntry]);

    /// Writes the fields a reply may change. Ordered before a following [`SharedPage::clear_active`].
    fn reply(&self, reply: &RawReply);

    /// Clears `_XEN_PCIF_active` with an atomic read-modify-write (release) and returns the flag
    /// word as it was before.
    fn clear_active(&self) -> u32;

    /// Writes the fields of `aer_op`. Ordered before a following [`SharedPage::set_aer_active`].
    fn aer_request(&self, request: &AerRequest);

    /// Sets `_XEN_PCIB_active` with an atomic read-modify-write (release).
    fn set_aer_active(&self);

    /// Clears `_XEN_PCIB_active` in the same way: the request is taken back.
    fn clear_aer_active(&self);

    /// Reads `aer_op.err`, once: the frontend's result, after it has cleared `_XEN_PCIB_active`. Any number can be there.
    fn aer_result(&self) -> i32;
}

/// A bound interdomain event channel. Dropping it closes the port.
pub trait Channel {
    /// Our end's port number.
    fn port(&self) -> Port;

    /// Sends an event to the peer (one hypercall). A dead peer is no error.
    fn notify(&self);
}

/// An open xenstore transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transaction(pub u32);

/// Why a xenstore operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreError {
    /// ENOENT: the node does not exist.
    NotFound,
    /// EACCES: the node's permissions refuse it.
    Denied,
    /// EAGAIN: the transaction met a conflicting change; start it again.
    Again,
    /// xenstored did not answer in time, or the connection was lost.
    Timeout,
    /// Any other error xenstored names, or an answer that breaks the protocol.
    Other,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StoreError::NotFound => "no such node",
            StoreError::Denied => "permission denied",
            StoreError::Again => "conflicting transaction",
            StoreError::Timeout => "xenstored does not answer",
            StoreError::Other => "xenstore error",
        })
    }
}

/// A xenstore client. Paths without a leading slash are relative to the own domain's directory.
pub trait Store {
    /// Reads a node; what is not UTF-8 is an error ([`StoreError::Other`]).
    fn read(&mut self, tx: Option<Transaction>, path: &str) -> Result<String, StoreError>;
    /// Writes a node, and makes it and its parents if they are missing.
    fn write(&mut self, tx: Option<Transaction>, path: &str, value: &str) -> Result<(), StoreError>;
    /// Writes nodes, paths and values, in this order. The first error is told; it does not keep the others
    /// from being written, unless it is [`StoreError::Timeout`]. A client that need not wait for each does
    /// better than this default.
    fn write_all(&mut self, nodes: &[(String, String)]) -> Result<(), StoreError> {
        let mut outcome = Ok(());
        for (path, value) in nodes {
            match self.write(None, path, value) {
                Err(StoreError::Timeout) => return Err(StoreError::Timeout),
                written => outcome = outcome.and(written),
            }
        }
        outcome
    }
    /// Removes a node with all below it.
    fn remove(&mut self, tx: Option<Transaction>, path: &str) -> Result<(), StoreError>;
    /// The names of a node's children.
    fn list(&mut self, tx: Option<Transaction>, path: &str) -> Result<Vec<String>, StoreError>;
    /// Starts a transaction.
    fn begin(&mut self) -> Result<Transaction, StoreError>;
    /// Ends a transaction; [`StoreError::Again`] asks to repeat it. `commit` false drops it.
    fn end(&mut self, tx: Transaction, commit: bool) -> Result<(), StoreError>;
    /// Watches a path and all below it; events carry `token`. The first event comes at once.
    fn watch(&mut self, path: &str, token: &str) -> Result<(), StoreError>;
    /// Ends a watch.
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), StoreError>;
}

/// Why a frontend's page or channel could not be connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectError {
    /// The hypercall that failed, by its C name.
    pub call: &'static str,
    /// What Xen answered: a negative errno, or a `GNTST_*` status.
    pub code: i32,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered {}", self.call, self.code)
    }
}

/// The machine: everything the backend needs that is not its own logic.
pub trait Platform {
    /// How an owned function's configuration space is reached.
    type Config: ConfigSpace;
    /// A mapped shared page.
    type Page: SharedPage;
    /// A bound event channel.
    type Channel: Channel;
    /// The xenstore client.
    type Store: Store;
    /// The physdev hypercalls.
    type Physdev: Physdev;

    /// The xenstore client.
    fn store(&mut self) -> &mut Self::Store;

    /// The physdev hypercalls.
    fn physdev(&mut self) -> &mut Self::Physdev;

    /// Maps the configuration space of `sbdf`. Called once a function, at start.
    ///
    /// # Errors
    /// A sentence that says what is missing and what to do about it.
    fn open_config(&mut self, sbdf: Sbdf) -> Result<Self::Config, String>;

    /// Maps the page that domain `frontend` granted as `grant_ref`.
    ///
    /// # Errors
    /// What Xen answered.
    fn map_page(&mut self, frontend: DomId, grant_ref: u32) -> Result<Self::Page, ConnectError>;

    /// Binds to the unbound port `remote_port` of domain `frontend`.
    ///
    /// # Errors
    /// What Xen answered.
    fn bind_channel(&mut self, frontend: DomId, remote_port: u32) -> Result<Self::Channel, ConnectError>;

    /// Xen's system time now.
    fn now(&self) -> Nanos;

    /// Looks whether dom0 has come or gone: the number of its session, or why there is none.
    fn poll_dom0(&mut self) -> Result<u32, Down> {
        Err(Down::Nobody)
    }
}
