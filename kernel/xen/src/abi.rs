//! Structures of Xen's public headers that `xen-sys` lacks, and the offsets this crate relies on in
//! those that it has. Every layout is asserted when it is compiled.

use core::mem::{offset_of, size_of};

/// Bytes of a page, x86.
pub const PAGE_SIZE: u64 = 4096;

/// The calling domain, where a call takes a domain number.
pub const DOMID_SELF: u16 = 0x7ff0;

/// `struct gnttab_map_grant_ref` of `xen/grant_table.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "gnttab_map_grant_ref")]
pub struct MapGrantRef {
    /// In: guest-physical address to map at.
    pub host_addr: u64,
    /// In: `GNTMAP_*`.
    pub flags: u32,
    /// In: the granting domain's reference.
    pub grant_ref: u32,
    /// In: the granting domain.
    pub dom: u16,
    /// Out: `GNTST_*`.
    pub status: i16,
    /// Out: what unmapping wants back.
    pub handle: u32,
    /// Out: unused here.
    pub dev_bus_addr: u64,
}

/// `struct gnttab_unmap_grant_ref` of `xen/grant_table.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "gnttab_unmap_grant_ref")]
pub struct UnmapGrantRef {
    /// In: guest-physical address it was mapped at.
    pub host_addr: u64,
    /// In: 0.
    pub dev_bus_addr: u64,
    /// In: from the mapping.
    pub handle: u32,
    /// Out: `GNTST_*`.
    pub status: i16,
}

/// `struct xen_add_to_physmap` of `xen/memory.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "xen_add_to_physmap")]
pub struct AddToPhysmap {
    /// Domain to change.
    pub domid: u16,
    /// Unused for single pages.
    pub size: u16,
    /// `XENMAPSPACE_*`.
    pub space: u32,
    /// Index into the space.
    pub idx: u64,
    /// Guest frame the page appears at.
    pub gpfn: u64,
}

/// `struct xen_memory_map` of `xen/memory.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[doc(alias = "xen_memory_map")]
pub struct MemoryMap {
    /// In: room in `buffer`; out: entries stored.
    pub nr_entries: u32,
    /// An array of [`E820Entry`].
    pub buffer: *mut E820Entry,
}

/// One entry of an E820 map, packed as the BIOS call has it.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "e820entry")]
pub struct E820Entry {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// 1 is RAM.
    pub kind: u32,
}

/// `struct xen_hvm_param` of `xen/hvm/hvm_op.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "xen_hvm_param")]
pub struct HvmParam {
    /// Domain.
    pub domid: u16,
    /// Padding.
    pub pad: u16,
    /// `HVM_PARAM_*`.
    pub index: u32,
    /// In or out.
    pub value: u64,
}

/// `struct vcpu_runstate_info` of `xen/vcpu.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "vcpu_runstate_info")]
pub struct RunstateInfo {
    /// `RUNSTATE_*`.
    pub state: i32,
    /// System time in nanoseconds.
    pub state_entry_time: u64,
    /// Nanoseconds spent in each state; index 0 is running.
    pub time: [u64; 4],
}

/// `struct vcpu_hvm_context` of `xen/hvm/hvm_vcpu.h` with the registers of `struct vcpu_hvm_x86_64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "vcpu_hvm_context")]
pub struct VcpuContext {
    /// `VCPU_HVM_MODE_*`.
    pub mode: u32,
    /// Padding.
    pub pad: u32,
    /// Register.
    pub rax: u64,
    /// Register.
    pub rcx: u64,
    /// Register.
    pub rdx: u64,
    /// Register.
    pub rbx: u64,
    /// Stack.
    pub rsp: u64,
    /// Register.
    pub rbp: u64,
    /// Register.
    pub rsi: u64,
    /// First argument of a C function.
    pub rdi: u64,
    /// First instruction.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Control register.
    pub cr0: u64,
    /// Page tables.
    pub cr3: u64,
    /// Control register.
    pub cr4: u64,
    /// Long mode.
    pub efer: u64,
    /// Rest of the union, which has room for the 32-bit registers.
    pub rest: u64,
}

/// `struct xen_memory_reservation` of `xen/memory.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[doc(alias = "xen_memory_reservation")]
pub struct MemoryReservation {
    /// An array of guest frames.
    pub extents: *mut u64,
    /// How many.
    pub count: u64,
    /// 0 for single pages.
    pub order: u32,
    /// 0.
    pub flags: u32,
    /// Domain to change.
    pub domid: u16,
}

/// `struct physdev_map_pirq` of `xen/physdev.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "physdev_map_pirq")]
pub struct MapPirq {
    /// In: the domain to map into.
    pub domid: u16,
    /// In: `MAP_PIRQ_TYPE_*`.
    pub kind: i32,
    /// In: a GSI, or -1.
    pub index: i32,
    /// In: the pirq wished, or -1; out: the pirq.
    pub pirq: i32,
    /// In: segment << 16 | bus.
    pub bus: i32,
    /// In: device << 3 | function.
    pub devfn: i32,
    /// In: index into the MSI-X table, or number of MSI vectors.
    pub entry_nr: i32,
    /// In: address of the BAR with the MSI-X table; 0 for MSI.
    pub table_base: u64,
}

/// `struct physdev_unmap_pirq` of `xen/physdev.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "physdev_unmap_pirq")]
pub struct UnmapPirq {
    /// The domain it is mapped into.
    pub domid: u16,
    /// The pirq there.
    pub pirq: i32,
}

/// `struct physdev_pci_device` of `xen/physdev.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[doc(alias = "physdev_pci_device")]
pub struct PciDevice {
    /// Segment.
    pub seg: u16,
    /// Bus.
    pub bus: u8,
    /// Device << 3 | function.
    pub devfn: u8,
}

/// Offsets in `struct xencons_interface` of `xen/io/console.h`.
pub mod xencons {
    /// `out` ring, bytes to the console daemon.
    pub const OUT: usize = 1024;
    /// Bytes of the `out` ring.
    pub const OUT_SIZE: u32 = 2048;
    /// `in_cons`.
    pub const IN_CONS: usize = 3072;
    /// `in_prod`.
    pub const IN_PROD: usize = 3076;
    /// `out_cons`.
    pub const OUT_CONS: usize = 3080;
    /// `out_prod`.
    pub const OUT_PROD: usize = 3084;
}

/// Offsets in `struct xenstore_domain_interface` of `xen/io/xs_wire.h`.
pub mod xenstore {
    /// Bytes of each ring.
    pub const RING_SIZE: u32 = 1024;
    /// `req` ring.
    pub const REQ: usize = 0;
    /// `rsp` ring.
    pub const RSP: usize = 1024;
    /// `req_cons`.
    pub const REQ_CONS: usize = 2048;
    /// `req_prod`.
    pub const REQ_PROD: usize = 2052;
    /// `rsp_cons`.
    pub const RSP_CONS: usize = 2056;
    /// `rsp_prod`.
    pub const RSP_PROD: usize = 2060;
    /// `server_features`.
    pub const SERVER_FEATURES: usize = 2064;
    /// `connection`.
    pub const CONNECTION: usize = 2068;
    /// Bytes of `struct xsd_sockmsg`.
    pub const HEADER: usize = 16;
    /// Most bytes behind a header.
    pub const PAYLOAD_MAX: usize = 4096;
    /// `XENSTORE_SERVER_FEATURE_RECONNECTION`.
    pub const FEATURE_RECONNECTION: u32 = 1;
    /// `XENSTORE_CONNECTED`.
    pub const CONNECTED: u32 = 0;
    /// `XENSTORE_RECONNECT`.
    pub const RECONNECT: u32 = 1;
}

/// Offsets in `struct grant_entry_v1` of `xen/grant_table.h`, one entry of a grant table.
pub mod grant_entry {
    /// Bytes of an entry.
    pub const SIZE: usize = 8;
    /// `flags`, `GTF_*`: what makes an entry valid.
    pub const FLAGS: usize = 0;
    /// `domid`, the domain that may map the page.
    pub const DOMID: usize = 2;
    /// `frame`, the granted guest frame.
    pub const FRAME: usize = 4;
    /// `GNTTAB_NR_RESERVED_ENTRIES`: the first entries belong to the tools that made the domain.
    pub const RESERVED: usize = 8;
    /// `GTF_permit_access`.
    pub const PERMIT_ACCESS: u16 = 1;
}

/// Offsets in `struct vchan_interface` of `xen/io/libxenvchan.h`, and of the two rings that can be
/// inside its page. Left is what the client writes, right what the server writes.
pub mod vchan {
    /// `left.cons`.
    pub const LEFT_CONS: usize = 0;
    /// `left.prod`.
    pub const LEFT_PROD: usize = 4;
    /// `right.cons`.
    pub const RIGHT_CONS: usize = 8;
    /// `right.prod`.
    pub const RIGHT_PROD: usize = 12;
    /// `left_order`.
    pub const LEFT_ORDER: usize = 16;
    /// `right_order`.
    pub const RIGHT_ORDER: usize = 18;
    /// `cli_live`, `LIVE_*`.
    pub const CLI_LIVE: usize = 20;
    /// `srv_live`, `LIVE_*`.
    pub const SRV_LIVE: usize = 21;
    /// `cli_notify`: the events that the client is to send.
    pub const CLI_NOTIFY: usize = 22;
    /// `srv_notify`: the events that the server is to send.
    pub const SRV_NOTIFY: usize = 23;
    /// `grants`, the end of the structure; unused with both rings inside the page.
    pub const GRANTS: usize = 24;
    /// `VCHAN_NOTIFY_WRITE`: tell me when you have written.
    pub const NOTIFY_WRITE: u8 = 1;
    /// `VCHAN_NOTIFY_READ`: tell me when you have read.
    pub const NOTIFY_READ: u8 = 2;
    /// This end is connected.
    pub const LIVE_CONNECTED: u8 = 1;
    /// The client has not connected yet.
    pub const LIVE_NOT_YET: u8 = 2;
    /// Order of the ring at offset 1024.
    pub const SMALL_ORDER: u16 = 10;
    /// Offset of the ring with [`SMALL_ORDER`].
    pub const SMALL_RING: usize = 1024;
    /// Order of the ring at offset 2048.
    pub const LARGE_ORDER: u16 = 11;
    /// Offset of the ring with [`LARGE_ORDER`].
    pub const LARGE_RING: usize = 2048;
}

/// Offsets in `struct shared_info` of `xen/xen.h`; vCPU 0's `vcpu_info` is at 0.
pub mod shared_info {
    /// `evtchn_pending`, 64 words of 64 bits.
    pub const EVTCHN_PENDING: usize = core::mem::offset_of!(xen_sys::shared_info, evtchn_pending);
    /// `evtchn_mask`, 64 words of 64 bits.
    pub const EVTCHN_MASK: usize = core::mem::offset_of!(xen_sys::shared_info, evtchn_mask);
    /// `vcpu_info[0].time`.
    pub const TIME: usize = core::mem::offset_of!(xen_sys::vcpu_info, time);
    /// Ports of the two-level event channel ABI, 64-bit.
    pub const PORTS: u32 = 4096;
}

/// Offsets in `struct vcpu_time_info` of `xen/xen.h`.
pub mod time_info {
    /// `version`, odd while Xen updates.
    pub const VERSION: usize = core::mem::offset_of!(xen_sys::vcpu_time_info, version);
    /// `tsc_timestamp`.
    pub const TSC_TIMESTAMP: usize = core::mem::offset_of!(xen_sys::vcpu_time_info, tsc_timestamp);
    /// `system_time`, nanoseconds.
    pub const SYSTEM_TIME: usize = core::mem::offset_of!(xen_sys::vcpu_time_info, system_time);
    /// `tsc_to_system_mul`, 32.32 fixed point.
    pub const MUL: usize = core::mem::offset_of!(xen_sys::vcpu_time_info, tsc_to_system_mul);
    /// `tsc_shift`, signed byte.
    pub const SHIFT: usize = core::mem::offset_of!(xen_sys::vcpu_time_info, tsc_shift);
}

const _: () = {
    assert!(size_of::<MapGrantRef>() == 32);
    assert!(offset_of!(MapGrantRef, dom) == 16 && offset_of!(MapGrantRef, status) == 18);
    assert!(offset_of!(MapGrantRef, handle) == 20 && offset_of!(MapGrantRef, dev_bus_addr) == 24);
    assert!(size_of::<UnmapGrantRef>() == 24 && offset_of!(UnmapGrantRef, status) == 20);
    assert!(size_of::<AddToPhysmap>() == 24 && offset_of!(AddToPhysmap, idx) == 8);
    assert!(size_of::<MemoryMap>() == 16 && offset_of!(MemoryMap, buffer) == 8);
    assert!(size_of::<E820Entry>() == 20);
    assert!(size_of::<HvmParam>() == 16 && offset_of!(HvmParam, value) == 8);
    assert!(size_of::<RunstateInfo>() == 48 && offset_of!(RunstateInfo, time) == 16);
    assert!(size_of::<VcpuContext>() == 128 && offset_of!(VcpuContext, rip) == 72);
    assert!(offset_of!(VcpuContext, efer) == 112);
    assert!(size_of::<MemoryReservation>() == 32 && offset_of!(MemoryReservation, domid) == 24);
    assert!(size_of::<MapPirq>() == 40 && offset_of!(MapPirq, kind) == 4 && offset_of!(MapPirq, entry_nr) == 24);
    assert!(offset_of!(MapPirq, table_base) == 32);
    assert!(size_of::<UnmapPirq>() == 8 && offset_of!(UnmapPirq, pirq) == 4);
    assert!(size_of::<PciDevice>() == 4 && offset_of!(PciDevice, devfn) == 3);
    assert!(size_of::<xen_sys::vcpu_time_info>() == 32 && size_of::<xen_sys::vcpu_info>() == 64);
    assert!(shared_info::EVTCHN_PENDING == 2048 && shared_info::EVTCHN_MASK == 2560);
    assert!(shared_info::TIME == 32);
    assert!(size_of::<xen_sys::sched_poll>() == 24);
    assert!(size_of::<xen_sys::evtchn_bind_interdomain>() == 12);
    assert!(size_of::<xen_sys::evtchn_alloc_unbound>() == 8);
    assert!(grant_entry::FRAME + size_of::<u32>() == grant_entry::SIZE);
    assert!(vchan::GRANTS == vchan::SRV_NOTIFY + 1 && vchan::GRANTS <= vchan::SMALL_RING);
    assert!(vchan::SMALL_RING + (1 << vchan::SMALL_ORDER) == vchan::LARGE_RING);
    assert!(vchan::LARGE_RING + (1 << vchan::LARGE_ORDER) == PAGE_SIZE as usize);
};
