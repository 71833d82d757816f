//! Compares this project's structures and numbers with the C headers of Debian's `libxen-dev`.
//!
//! `XEN_HEADERS` names one or more include folders, separated by `:` (`cargo xtask test` sets it to
//! both releases'). Without it `/usr/include` is used if it has the headers; else the test says that
//! it was skipped.

use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use pciback::wire;
use xen_guest::abi::{AddToPhysmap, HvmParam, MapGrantRef, MemoryMap, RunstateInfo, UnmapGrantRef};
use xen_guest::abi::{MapPirq, MemoryReservation, PciDevice, UnmapPirq, VcpuContext};
use xen_guest::abi::{grant_entry, shared_info, time_info, vchan, xencons, xenstore};

/// C expression, and what it must be.
fn expectations() -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = Vec::new();
    let mut expect = |expression: &str, value: usize| all.push((expression.to_string(), value as u64));

    macro_rules! structure {
        ($rust:ty, $c:literal: $($field:ident = $cfield:literal),*) => {
            expect(concat!("sizeof(", $c, ")"), size_of::<$rust>());
            $(expect(concat!("offsetof(", $c, ", ", $cfield, ")"), offset_of!($rust, $field));)*
        };
    }
    structure!(MapGrantRef, "struct gnttab_map_grant_ref": host_addr = "host_addr", flags = "flags", grant_ref = "ref",
        dom = "dom", status = "status", handle = "handle", dev_bus_addr = "dev_bus_addr");
    structure!(UnmapGrantRef, "struct gnttab_unmap_grant_ref": host_addr = "host_addr",
        dev_bus_addr = "dev_bus_addr", handle = "handle", status = "status");
    structure!(AddToPhysmap, "struct xen_add_to_physmap": domid = "domid", size = "size", space = "space",
        idx = "idx", gpfn = "gpfn");
    structure!(MemoryMap, "struct xen_memory_map": nr_entries = "nr_entries", buffer = "buffer");
    structure!(HvmParam, "struct xen_hvm_param": domid = "domid", index = "index", value = "value");
    structure!(RunstateInfo, "struct vcpu_runstate_info": state = "state", state_entry_time = "state_entry_time",
        time = "time");
    structure!(VcpuContext, "struct vcpu_hvm_context": mode = "mode", rax = "cpu_regs.x86_64.rax",
        rsp = "cpu_regs.x86_64.rsp", rdi = "cpu_regs.x86_64.rdi", rip = "cpu_regs.x86_64.rip",
        rflags = "cpu_regs.x86_64.rflags", cr0 = "cpu_regs.x86_64.cr0", cr3 = "cpu_regs.x86_64.cr3",
        cr4 = "cpu_regs.x86_64.cr4", efer = "cpu_regs.x86_64.efer");
    structure!(MemoryReservation, "struct xen_memory_reservation": extents = "extent_start", count = "nr_extents",
        order = "extent_order", flags = "mem_flags", domid = "domid");
    structure!(MapPirq, "struct physdev_map_pirq": domid = "domid", kind = "type", index = "index", pirq = "pirq",
        bus = "bus", devfn = "devfn", entry_nr = "entry_nr", table_base = "table_base");
    structure!(UnmapPirq, "struct physdev_unmap_pirq": domid = "domid", pirq = "pirq");
    structure!(PciDevice, "struct physdev_pci_device": seg = "seg", bus = "bus", devfn = "devfn");
    structure!(xen_sys::sched_poll, "struct sched_poll": ports = "ports", nr_ports = "nr_ports", timeout = "timeout");
    structure!(xen_sys::sched_shutdown, "struct sched_shutdown": reason = "reason");
    structure!(xen_sys::evtchn_bind_interdomain, "struct evtchn_bind_interdomain": remote_dom = "remote_dom",
        remote_port = "remote_port", local_port = "local_port");
    structure!(xen_sys::evtchn_alloc_unbound, "struct evtchn_alloc_unbound": dom = "dom", remote_dom = "remote_dom",
        port = "port");
    structure!(xen_sys::evtchn_send, "struct evtchn_send": port = "port");
    structure!(xen_sys::evtchn_close, "struct evtchn_close": port = "port");

    expect("offsetof(struct shared_info, evtchn_pending)", shared_info::EVTCHN_PENDING);
    expect("offsetof(struct shared_info, evtchn_mask)", shared_info::EVTCHN_MASK);
    expect("offsetof(struct shared_info, vcpu_info[0].time)", shared_info::TIME);
    expect("offsetof(struct vcpu_time_info, version)", time_info::VERSION);
    expect("offsetof(struct vcpu_time_info, tsc_timestamp)", time_info::TSC_TIMESTAMP);
    expect("offsetof(struct vcpu_time_info, system_time)", time_info::SYSTEM_TIME);
    expect("offsetof(struct vcpu_time_info, tsc_to_system_mul)", time_info::MUL);
    expect("offsetof(struct vcpu_time_info, tsc_shift)", time_info::SHIFT);

    expect("sizeof(struct grant_entry_v1)", grant_entry::SIZE);
    expect("offsetof(struct grant_entry_v1, flags)", grant_entry::FLAGS);
    expect("offsetof(struct grant_entry_v1, domid)", grant_entry::DOMID);
    expect("offsetof(struct grant_entry_v1, frame)", grant_entry::FRAME);
    expect("GNTTAB_NR_RESERVED_ENTRIES", grant_entry::RESERVED);
    expect("GTF_permit_access", grant_entry::PERMIT_ACCESS as usize);

    expect("sizeof(struct vchan_interface)", vchan::GRANTS);
    for (field, offset) in [
        ("left.cons", vchan::LEFT_CONS),
        ("left.prod", vchan::LEFT_PROD),
        ("right.cons", vchan::RIGHT_CONS),
        ("right.prod", vchan::RIGHT_PROD),
        ("left_order", vchan::LEFT_ORDER),
        ("right_order", vchan::RIGHT_ORDER),
        ("cli_live", vchan::CLI_LIVE),
        ("srv_live", vchan::SRV_LIVE),
        ("cli_notify", vchan::CLI_NOTIFY),
        ("srv_notify", vchan::SRV_NOTIFY),
        ("grants", vchan::GRANTS),
    ] {
        expect(&format!("offsetof(struct vchan_interface, {field})"), offset);
    }
    expect("VCHAN_NOTIFY_WRITE", vchan::NOTIFY_WRITE as usize);
    expect("VCHAN_NOTIFY_READ", vchan::NOTIFY_READ as usize);

    expect("offsetof(struct xencons_interface, out)", xencons::OUT);
    expect("sizeof(((struct xencons_interface *)0)->out)", xencons::OUT_SIZE as usize);
    expect("offsetof(struct xencons_interface, in_cons)", xencons::IN_CONS);
    expect("offsetof(struct xencons_interface, in_prod)", xencons::IN_PROD);
    expect("offsetof(struct xencons_interface, out_cons)", xencons::OUT_CONS);
    expect("offsetof(struct xencons_interface, out_prod)", xencons::OUT_PROD);

    expect("offsetof(struct xenstore_domain_interface, req)", xenstore::REQ);
    expect("offsetof(struct xenstore_domain_interface, rsp)", xenstore::RSP);
    expect("offsetof(struct xenstore_domain_interface, req_cons)", xenstore::REQ_CONS);
    expect("offsetof(struct xenstore_domain_interface, req_prod)", xenstore::REQ_PROD);
    expect("offsetof(struct xenstore_domain_interface, rsp_cons)", xenstore::RSP_CONS);
    expect("offsetof(struct xenstore_domain_interface, rsp_prod)", xenstore::RSP_PROD);
    expect("offsetof(struct xenstore_domain_interface, server_features)", xenstore::SERVER_FEATURES);
    expect("offsetof(struct xenstore_domain_interface, connection)", xenstore::CONNECTION);
    expect("XENSTORE_RING_SIZE", xenstore::RING_SIZE as usize);
    expect("XENSTORE_PAYLOAD_MAX", xenstore::PAYLOAD_MAX);
    expect("sizeof(struct xsd_sockmsg)", xenstore::HEADER);
    for (number, name) in [
        (1, "XS_DIRECTORY"),
        (2, "XS_READ"),
        (4, "XS_WATCH"),
        (5, "XS_UNWATCH"),
        (6, "XS_TRANSACTION_START"),
        (7, "XS_TRANSACTION_END"),
        (11, "XS_WRITE"),
        (13, "XS_RM"),
        (15, "XS_WATCH_EVENT"),
        (16, "XS_ERROR"),
    ] {
        expect(name, number);
    }

    let page = "struct xen_pci_sharedinfo";
    for (field, offset) in [
        ("flags", wire::offset::FLAGS),
        ("op.cmd", wire::offset::CMD),
        ("op.err", wire::offset::ERR),
        ("op.domain", wire::offset::DOMAIN),
        ("op.bus", wire::offset::BUS),
        ("op.devfn", wire::offset::DEVFN),
        ("op.offset", wire::offset::OFFSET),
        ("op.size", wire::offset::SIZE),
        ("op.value", wire::offset::VALUE),
        ("op.info", wire::offset::INFO),
        ("op.msix_entries", wire::offset::MSIX_ENTRIES),
        ("aer_op", wire::offset::AER_OP),
        ("aer_op.err", wire::offset::AER_ERR),
        ("aer_op.domain", wire::offset::AER_DOMAIN),
        ("aer_op.bus", wire::offset::AER_BUS),
        ("aer_op.devfn", wire::offset::AER_DEVFN),
    ] {
        expect(&format!("offsetof({page}, {field})"), offset);
    }
    expect(&format!("sizeof({page})"), wire::offset::END);
    expect("SH_INFO_MAX_VEC", wire::MAX_VECTORS);
    expect("XEN_PCIF_active", wire::PCIF_ACTIVE as usize);
    expect("XEN_PCIB_AERHANDLER", wire::PCIB_AERHANDLER as usize);
    expect("XEN_PCIB_active", wire::PCIB_ACTIVE as usize);

    for (name, number) in [
        ("XENMEM_add_to_physmap", 7),
        ("XENMEM_memory_map", 9),
        ("XENMAPSPACE_shared_info", 0),
        ("XENMAPSPACE_grant_table", 1),
        ("GNTTABOP_map_grant_ref", 0),
        ("GNTTABOP_unmap_grant_ref", 1),
        ("GNTMAP_host_map", 2),
        ("HVMOP_get_param", 1),
        ("HVM_PARAM_STORE_PFN", 1),
        ("HVM_PARAM_STORE_EVTCHN", 2),
        ("HVM_PARAM_CONSOLE_PFN", 17),
        ("HVM_PARAM_CONSOLE_EVTCHN", 18),
        ("VCPUOP_get_runstate_info", 4),
        ("RUNSTATE_running", 0),
        ("DOMID_SELF", 0x7ff0),
        ("__HYPERVISOR_memory_op", xen_sys::__HYPERVISOR_memory_op as usize),
        ("__HYPERVISOR_event_channel_op", xen_sys::__HYPERVISOR_event_channel_op as usize),
        ("__HYPERVISOR_sched_op", xen_sys::__HYPERVISOR_sched_op as usize),
        ("__HYPERVISOR_grant_table_op", xen_sys::__HYPERVISOR_grant_table_op as usize),
        ("__HYPERVISOR_vcpu_op", xen_sys::__HYPERVISOR_vcpu_op as usize),
        ("PHYSDEVOP_map_pirq", 13),
        ("PHYSDEVOP_unmap_pirq", 14),
        ("PHYSDEVOP_restore_msi_ext", 27),
        ("PHYSDEVOP_prepare_msix", 30),
        ("PHYSDEVOP_release_msix", 31),
        ("MAP_PIRQ_TYPE_MSI_SEG", 3),
        ("MAP_PIRQ_TYPE_MULTI_MSI", 4),
        ("XEN_PCI_OP_enable_multi_msi", wire::op::ENABLE_MULTI_MSI as usize),
        ("XEN_PCI_OP_enable_msix", wire::op::ENABLE_MSIX as usize),
        ("XEN_PCI_OP_aer_detected", wire::op::AER_DETECTED as usize),
        ("XEN_PCI_OP_aer_resume", wire::op::AER_RESUME as usize),
        ("XEN_PCI_OP_aer_mmio", wire::op::AER_MMIO as usize),
        ("XEN_PCI_OP_aer_slotreset", wire::op::AER_SLOT_RESET as usize),
        ("__HYPERVISOR_physdev_op", xen_sys::__HYPERVISOR_physdev_op as usize),
        ("__HYPERVISOR_hvm_op", xen_sys::__HYPERVISOR_hvm_op as usize),
        ("EVTCHNOP_alloc_unbound", xen_sys::EVTCHNOP_alloc_unbound as usize),
        ("EVTCHNOP_bind_interdomain", xen_sys::EVTCHNOP_bind_interdomain as usize),
        ("EVTCHNOP_close", xen_sys::EVTCHNOP_close as usize),
        ("EVTCHNOP_send", xen_sys::EVTCHNOP_send as usize),
        ("SCHEDOP_shutdown", xen_sys::SCHEDOP_shutdown as usize),
        ("SCHEDOP_poll", xen_sys::SCHEDOP_poll as usize),
        ("SHUTDOWN_poweroff", xen_sys::SHUTDOWN_poweroff as usize),
        ("SHUTDOWN_reboot", xen_sys::SHUTDOWN_reboot as usize),
        ("SHUTDOWN_crash", xen_sys::SHUTDOWN_crash as usize),
        ("XEN_ELFNOTE_PHYS32_ENTRY", 18),
    ] {
        expect(name, number);
    }
    all
}

/// A C program in which every expectation is a compile-time assertion.
fn program(expectations: &[(String, u64)]) -> String {
    let mut source = String::from("#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n");
    for header in [
        "xen.h",
        "grant_table.h",
        "memory.h",
        "event_channel.h",
        "physdev.h",
        "sched.h",
        "vcpu.h",
        "hvm/hvm_op.h",
        "hvm/hvm_vcpu.h",
        "hvm/params.h",
        "elfnote.h",
        "io/console.h",
        "io/libxenvchan.h",
        "io/xs_wire.h",
        "io/pciif.h",
    ] {
        let _ = writeln!(source, "#include <xen/{header}>");
    }
    for (expression, value) in expectations {
        let _ = writeln!(
            source,
            "_Static_assert((unsigned long)({expression}) == {value}UL, \"{expression} is not {value}\");"
        );
    }
    source
}

#[test]
fn structures_and_numbers_are_those_of_xens_headers() {
    let folders = std::env::var("XEN_HEADERS").unwrap_or_else(|_| "/usr/include".into());
    let expectations = expectations();
    let work = std::env::temp_dir().join(format!("xen-abi-{}", std::process::id()));
    std::fs::create_dir_all(&work).expect("temporary folder");
    let source = work.join("abi.c");
    std::fs::write(&source, program(&expectations)).expect("temporary file");
    for folder in folders.split(':') {
        if !Path::new(folder).join("xen/xen.h").exists() {
            assert!(std::env::var("XEN_HEADERS").is_err(), "XEN_HEADERS names {folder}, which has no xen/xen.h");
            println!("skipped: no Xen headers in {folder}; install libxen-dev or set XEN_HEADERS");
            continue;
        }
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let output = Command::new(compiler)
            .args(["-std=gnu11", "-fsyntax-only", "-D__XEN_INTERFACE_VERSION__=0x00040d00", "-I", folder])
            .arg(&source)
            .output()
            .expect("a C compiler");
        assert!(output.status.success(), "{folder}:\n{}", String::from_utf8_lossy(&output.stderr));
        println!("{} layouts and numbers agree with {folder}", expectations.len());
    }
    let _ = std::fs::remove_dir_all(&work);
}
