//! The attacks, one after the other. Each ends with the frontend connected, as far as the backend plays along.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use pciback::wire::{PCIF_ACTIVE, RawRequest, offset, op};
use xen_guest::abi::{PAGE_SIZE, grant_entry};
use xen_guest::evtchn::BoundPort;
use xen_guest::memory;

use super::client::Client;
use super::second::{self, Task};

const OFFSETS: [i32; 19] =
    [0, 1, 2, 3, 4, 5, 0x10, 0x3c, 0x3d, 0xfe, 0xff, 0x100, 0xffc, 0xfff, 0x1000, 0x1001, -1, i32::MIN, i32::MAX];
const SIZES: [i32; 9] = [0, 1, 2, 3, 4, 8, -1, i32::MIN, i32::MAX];
const VALUES: [u32; 11] = [0, 1, 2, 5, 127, 128, 129, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX];

/// Requests while the second processor rewrites them.
const TORN: u32 = 30_000;
/// Events in a row without a request.
const EVENTS: u64 = 100_000;
/// Writes to the state node.
const STATES: usize = 5_000;
/// How long one attack goes on at most on a slow machine.
const LIMIT: u64 = 30_000_000_000;

/// `GTF_readonly`: the backend maps writable.
const READ_ONLY: u16 = 1 << 2;

/// Every operation with every argument's extremes: an answer each, with an error that a client knows.
pub fn operations(client: &mut Client) {
    let everywhere = RawRequest { size: 4, ..RawRequest::default() };
    for offset in OFFSETS {
        for size in SIZES {
            client.ask(&RawRequest { offset, size, ..everywhere }, &[]);
            for value in [0, u32::MAX] {
                client.ask(&RawRequest { cmd: op::CONF_WRITE, offset, size, value, ..everywhere }, &[]);
            }
        }
    }
    let numbers = (0..=12).chain([13, 255, 256, 0x7fff_ffff, 0x8000_0000, u32::MAX]);
    let all: Vec<u16> = (0..128).collect();
    for cmd in numbers {
        let plain = RawRequest { cmd, ..everywhere };
        for value in VALUES {
            client.ask(&RawRequest { value, ..plain }, &all);
            client.ask(&RawRequest { info: value, ..plain }, &all);
            client.ask(&RawRequest { value, info: value, offset: -1, size: -1, ..plain }, &all);
            client.ask(&RawRequest { devfn: value, ..plain }, &all);
            client.ask(&RawRequest { domain: value, ..plain }, &all);
            client.ask(&RawRequest { bus: value, ..plain }, &all);
            client.ask(&RawRequest { domain: value, bus: value, devfn: value, ..plain }, &all);
        }
    }
    // Entries that are too many, twice there, or beyond the table; with its memory on, without which none is looked at.
    client.ask(&RawRequest { cmd: op::CONF_WRITE, offset: 4, size: 2, value: 6, ..everywhere }, &[]);
    for entries in [&all[..], &[0, 0], &[0xffff], &[0x8000, 1], &[1], &[4, 3, 2, 1, 0]] {
        for value in [entries.len() as u32, 128, 129, u32::MAX] {
            client.ask(&RawRequest { cmd: op::ENABLE_MSIX, value, ..everywhere }, entries);
        }
        client.ask(&RawRequest { cmd: op::DISABLE_MSIX, ..everywhere }, &[]);
    }
}

/// Requests that change while they are carried out: still an answer each.
pub fn torn(client: &mut Client) {
    let Some(connection) = &client.connection else { return };
    let before = second::writes();
    second::set(Task::Requests, connection.frame * PAGE_SIZE);
    let end = client.now().saturating_add(LIMIT);
    for count in 0..TORN {
        // A write takes dom0 where it is dom0's to make.
        let cmd = client.random.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 4, 5]);
        let value = client.random.pick(&VALUES);
        let request = RawRequest { cmd, offset: 4, size: 2, value, ..RawRequest::default() };
        client.ask_anyway(&request, &[0, 1, 2]);
        if count % 64 == 0 && client.now() >= end {
            break;
        }
    }
    second::set(Task::Rest, 0);
    client.counts.rewrites += second::writes() - before;
}

/// Flags that change at any moment. How many answers that makes nobody can say; it ends with one.
pub fn flags(client: &mut Client) {
    let Some(connection) = &client.connection else { return };
    let (page, before) = (connection.page, second::writes());
    second::set(Task::Flags, connection.frame * PAGE_SIZE);
    let end = client.now().saturating_add(LIMIT / 4);
    for count in 0..20_000u32 {
        let cmd = client.random.pick(&[0, 0, 0, 0, 0, 0, 0, 3, 4, 5]);
        client.put(&RawRequest { cmd, size: 4, value: 2, ..RawRequest::default() }, &[0, 1]);
        client.ring();
        client.counts.events += 1;
        if count % 256 == 0 {
            client.pause();
            if client.now() >= end {
                break;
            }
        }
    }
    second::set(Task::Rest, 0);
    client.counts.rewrites += second::writes() - before;
    let flags = page.atomic32(offset::FLAGS);
    while flags.load(Ordering::Acquire) & PCIF_ACTIVE != 0 && client.now() < end.saturating_add(LIMIT) {
        client.ring();
        client.pause();
    }
    // One whose flag was cleared under its hands may still be carried out, and would be taken for the next one's answer.
    for _ in 0..30 {
        client.pause();
    }
    flags.store(0, Ordering::Release);
    sane(client);
}

/// Events without a request.
pub fn events(client: &mut Client) {
    for _ in 0..EVENTS {
        client.ring();
    }
    client.counts.events += EVENTS;
    sane(client);
}

/// Grants that are taken back while the backend has them mapped, used twice, or not for it.
pub fn grants(client: &mut Client) {
    for _ in 0..2 {
        let Some(connection) = &client.connection else { return };
        let (grant, frame) = (connection.grant, connection.frame);
        client.revoke(grant);
        // It was mapped before: the backend may still answer, and must not care.
        sane(client);
        client.tell(&[("state", "5"), ("state", "6")]);
        client.wait_state(&["3"]);
        // The same again, which is void now.
        refused(client, &[("state", "3")]);
        // One that may only be read, one for dom0, one for the guest itself.
        for (to, flags) in [
            (client.backend(), grant_entry::PERMIT_ACCESS | READ_ONLY),
            (0, grant_entry::PERMIT_ACCESS),
            (0x7ff0, grant_entry::PERMIT_ACCESS),
        ] {
            let grant = client.grant(to, frame, flags).to_string();
            refused(client, &[("pci-op-ref", &grant), ("state", "3")]);
        }
        // A frame that is no memory.
        let grant = client.grant(client.backend(), 0xffff_ffff, grant_entry::PERMIT_ACCESS).to_string();
        refused(client, &[("pci-op-ref", &grant), ("state", "3")]);
        client.connect();
        sane(client);
    }
}

/// A page that is given back to Xen while the backend has it mapped.
pub fn frames(client: &mut Client) {
    for _ in 0..2 {
        let Some(connection) = &client.connection else { return };
        let frame = connection.frame;
        // SAFETY: nothing here touches the page until another is there.
        if let Err(error) = unsafe { memory::give_back(frame) } {
            log::info!("hostile: Xen does not take the page: {error}");
            return;
        }
        for _ in 0..1000 {
            client.ring();
        }
        client.counts.events += 1000;
        client.tell(&[("state", "6")]);
        client.wait_state(&["3"]);
        if let Err(error) = memory::populate(frame) {
            crate::fatal::stop(format_args!("Xen has no page for frame {frame:#x}: {error}"));
        }
        client.connect();
        sane(client);
    }
}

/// Ports that are closed while requests wait, and others in their place.
pub fn ports(client: &mut Client) {
    for _ in 0..8 {
        client.put(&RawRequest { size: 4, ..RawRequest::default() }, &[]);
        client.ring();
        let backend = client.backend();
        let Some(connection) = &mut client.connection else { return };
        match BoundPort::unbound(backend) {
            // The former one is closed.
            Ok(port) => connection.port = port,
            Err(error) => crate::fatal::stop(format_args!("no event channel: {error}")),
        }
        client.publish();
        // The request that waits is answered by then, or with this one.
        client.ask_anyway(&RawRequest { size: 4, ..RawRequest::default() }, &[]);
        client.wait_state(&["4"]);
        client.tell(&[("state", "4")]);
        client.counts.connections += 1;
    }
    sane(client);
}

/// Nodes that mean nothing.
pub fn nodes(client: &mut Client) {
    client.close();
    client.prepare();
    let Some(connection) = &client.connection else { return };
    let (grant, port) = (connection.grant.to_string(), connection.port.port().to_string());
    let good = [("pci-op-ref", grant.as_str()), ("event-channel", port.as_str()), ("magic", "7")];
    let long: String = core::iter::repeat_n('7', 1500).collect();
    let rubbish = ["", "-1", "0x8", "1", "4096", "4294967295", "4294967296", "8 ", &long];
    for (node, _) in good {
        for value in rubbish {
            client.tell(&good);
            refused(client, &[(node, value), ("state", "3")]);
        }
        client.tell(&good);
        client.tell_bytes(node, b"\xff\xfe\0\x80");
        refused(client, &[("state", "3")]);
    }
    client.tell(&good);
    client.tell(&[("state", "3")]);
    client.wait_state(&["4"]);
    client.tell(&[("state", "4")]);
    client.counts.connections += 1;
    sane(client);
}

/// The state as fast as xenstored takes it, and names below it.
pub fn states(client: &mut Client) {
    let long: String = core::iter::repeat_n('4', 1500).collect();
    let states = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "", "4 ", "-1", "04", "\u{1b}[2J", &long];
    let end = client.now().saturating_add(LIMIT);
    for _ in 0..STATES / 50 {
        let batch: Vec<(&str, &str)> = (0..50).map(|_| ("state", client.random.pick(&states))).collect();
        client.tell(&batch);
        client.tell_bytes("state", b"\xff\xff\xff");
        if client.now() >= end {
            break;
        }
    }
    for number in 0..200 {
        let name: String = core::iter::repeat_n('x', 200).collect();
        client.flash(&alloc::format!("state/{number}{name}"));
    }
    client.close();
    client.connect();
    sane(client);
}

/// A read that must be answered as always.
fn sane(client: &mut Client) {
    let answer = client.ask(&RawRequest { size: 4, ..RawRequest::default() }, &[]);
    if !answer.is_some_and(|(err, value)| err == 0 && value != 0 && value != u32::MAX) {
        client.counts.wrong += 1;
        log::warn!("hostile: a sane read was answered with {answer:?}");
    }
}

/// Writes nodes with which nobody can connect, and waits until the backend has said so; then until it would try again.
fn refused(client: &mut Client, nodes: &[(&str, &str)]) {
    client.tell(nodes);
    match client.wait_state(&["6", "4"]).as_deref() {
        Some("6") => client.counts.refused += 1,
        other => {
            client.counts.stuck += 1;
            log::warn!("hostile: {nodes:?} led to state {other:?}");
        }
    }
    client.tell(&[("state", "6")]);
    client.wait_state(&["3"]);
}
