//! The pciif protocol, `xen/include/public/io/pciif.h`: layout of the shared page, operations, error
//! numbers. The page itself is reached through [`crate::platform::SharedPage`].

/// Version string of the protocol, compared as text.
#[doc(alias = "XEN_PCI_MAGIC")]
pub const MAGIC: &str = "7";

/// Vectors one request can carry.
#[doc(alias = "SH_INFO_MAX_VEC")]
pub const MAX_VECTORS: usize = 128;

/// Set by the frontend when a request is complete, cleared by the backend after the reply.
#[doc(alias = "_XEN_PCIF_active")]
pub const PCIF_ACTIVE: u32 = 1 << 0;
/// Set by the frontend for good: it handles AER requests.
#[doc(alias = "_XEN_PCIB_AERHANDLER")]
pub const PCIB_AERHANDLER: u32 = 1 << 1;
/// Set by the backend when an AER request is complete.
#[doc(alias = "_XEN_PCIB_active")]
pub const PCIB_ACTIVE: u32 = 1 << 2;

/// Byte offsets of the shared page's fields (`struct xen_pci_sharedinfo`).
pub mod offset {
    /// `flags`, u32.
    pub const FLAGS: usize = 0;
    /// `op.cmd`, u32.
    pub const CMD: usize = 4;
    /// `op.err`, i32.
    pub const ERR: usize = 8;
    /// `op.domain`, u32.
    pub const DOMAIN: usize = 12;
    /// `op.bus`, u32.
    pub const BUS: usize = 16;
    /// `op.devfn`, u32.
    pub const DEVFN: usize = 20;
    /// `op.offset`, i32.
    pub const OFFSET: usize = 24;
    /// `op.size`, i32.
    pub const SIZE: usize = 28;
    /// `op.value`, u32.
    pub const VALUE: usize = 32;
    /// `op.info`, u32.
    pub const INFO: usize = 36;
    /// `op.msix_entries`, 128 of {u16 vector, u16 entry}.
    pub const MSIX_ENTRIES: usize = 40;
    /// `aer_op`, five u32; its first, `aer_op.cmd`.
    pub const AER_OP: usize = 552;
    /// `aer_op.err`, i32: the channel's state in a request, the result in the answer.
    pub const AER_ERR: usize = 556;
    /// `aer_op.domain`, u32.
    pub const AER_DOMAIN: usize = 560;
    /// `aer_op.bus`, u32.
    pub const AER_BUS: usize = 564;
    /// `aer_op.devfn`, u32.
    pub const AER_DEVFN: usize = 568;
    /// Bytes of the whole structure.
    pub const END: usize = 572;
}

/// One element of `op.msix_entries`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[doc(alias = "xen_msix_entry")]
pub struct MsixEntry {
    /// The guest's pirq, in a reply.
    pub vector: u16,
    /// Index into the function's table.
    pub entry: u16,
}

/// The elements of one request: room for all that it can carry.
pub type MsixEntries = [MsixEntry; MAX_VECTORS];

/// A request as copied out of the shared page: nothing in it has been checked.
///
/// The MSI-X entries are not part of it: only the operation that needs them copies them, also once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[doc(alias = "xen_pci_op")]
pub struct RawRequest {
    /// Operation number.
    pub cmd: u32,
    /// Segment as the guest sees it.
    pub domain: u32,
    /// Bus as the guest sees it.
    pub bus: u32,
    /// Device << 3 | function, as the guest sees it.
    pub devfn: u32,
    /// Configuration offset in bytes.
    pub offset: i32,
    /// Access width in bytes.
    pub size: i32,
    /// Value to write, or vector count.
    pub value: u32,
    /// Vector count of enable_multi_msi.
    pub info: u32,
}

impl RawRequest {
    /// How many MSI-X entries the request has, if it is one of enable_msix: what it says, up to the most that fit.
    pub fn entries(&self) -> usize {
        if self.cmd == op::ENABLE_MSIX { (self.value as usize).min(MAX_VECTORS) } else { 0 }
    }
}

/// Operation numbers, `XEN_PCI_OP_*`.
pub mod op {
    /// Reads configuration space.
    pub const CONF_READ: u32 = 0;
    /// Writes configuration space.
    pub const CONF_WRITE: u32 = 1;
    /// Turns on MSI with one vector.
    pub const ENABLE_MSI: u32 = 2;
    /// Turns off MSI.
    pub const DISABLE_MSI: u32 = 3;
    /// Turns on MSI-X.
    pub const ENABLE_MSIX: u32 = 4;
    /// Turns off MSI-X.
    pub const DISABLE_MSIX: u32 = 5;
    /// In `aer_op`: an error was detected.
    #[doc(alias = "XEN_PCI_OP_aer_detected")]
    pub const AER_DETECTED: u32 = 6;
    /// In `aer_op`: the recovery has ended well.
    #[doc(alias = "XEN_PCI_OP_aer_resume")]
    pub const AER_RESUME: u32 = 7;
    /// In `aer_op`: registers may be accessed again.
    #[doc(alias = "XEN_PCI_OP_aer_mmio")]
    pub const AER_MMIO: u32 = 8;
    /// In `aer_op`: the function was reset.
    #[doc(alias = "XEN_PCI_OP_aer_slotreset")]
    pub const AER_SLOT_RESET: u32 = 9;
    /// Turns on MSI with several vectors; Linux's client does not have it.
    pub const ENABLE_MULTI_MSI: u32 = 10;
}

/// The backend's own request, about an error of a function: the fields of `aer_op`. The frontend writes its result
/// over `state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(alias = "xen_pcie_aer_op")]
pub struct AerRequest {
    /// One of [`op::AER_DETECTED`] to [`op::AER_SLOT_RESET`].
    pub cmd: u32,
    /// The channel's state, Linux's `pci_channel_state_t`: 1 normal, 2 frozen, 3 failed for good.
    pub state: u32,
    /// Segment as the guest sees it.
    pub domain: u32,
    /// Bus as the guest sees it.
    pub bus: u32,
    /// Device << 3 | function, as the guest sees it.
    pub devfn: u32,
}

/// The fields of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawReply {
    /// 0 or a negative [`WireError`].
    pub err: i32,
    /// The value read, or what the operation defines.
    pub value: u32,
}

/// Why a request failed, as the frontend reads it in `op.err`. The only table of these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The guest has no function at that address.
    #[doc(alias = "XEN_PCI_ERR_dev_not_found")]
    DeviceNotFound = -1,
    /// Offset or size of a configuration access is not one the protocol allows.
    #[doc(alias = "XEN_PCI_ERR_invalid_offset")]
    InvalidOffset = -2,
    /// The guest may not do this.
    #[doc(alias = "XEN_PCI_ERR_access_denied")]
    AccessDenied = -3,
    /// No such operation, or none in this version.
    #[doc(alias = "XEN_PCI_ERR_not_implemented")]
    NotImplemented = -4,
    /// The operation was tried and failed.
    #[doc(alias = "XEN_PCI_ERR_op_failed")]
    OpFailed = -5,
}

impl WireError {
    /// The number that goes into `op.err`.
    pub const fn code(self) -> i32 {
        self as i32
    }
}
