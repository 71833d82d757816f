//! The fields of a reply, and when a request is answered (`xen/io/pciif.h`).

use crate::model;

use model::logs::{heard, listen};
use model::{NIC, OTHER, TWO, boot, boot_with};
use pciback::wire::{PCIF_ACTIVE, RawReply, RawRequest, op};

const CARD: model::Card = model::Card::FULL;

#[test]
fn a_malformed_request_is_answered_with_value_0() {
    let mut rig = boot_with(CARD);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for (offset, size) in [(-4, 4), (4096, 1), (1, 2), (2, 4), (0, 3), (0, 0)] {
        for cmd in [op::CONF_READ, op::CONF_WRITE] {
            let request = RawRequest { cmd, offset, size, value: 0xdead_beef, ..Default::default() };
            assert_eq!(guest.request(&mut rig, request), RawReply { err: -2, value: 0 }, "{offset} {size}");
        }
    }
    let elsewhere = RawRequest { devfn: 9, size: 4, value: 0xdead_beef, ..Default::default() };
    assert_eq!(guest.request(&mut rig, elsewhere), RawReply { err: -1, value: 0 });
}

#[test]
fn a_write_echoes_its_value() {
    let mut rig = boot_with(CARD);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for (offset, size, value) in [(4, 2, 0x0006), (0x0c, 1, 0x20), (0x80, 4, 0xdead_beef), (0, 4, 0x1234_5678)] {
        let request = RawRequest { cmd: op::CONF_WRITE, offset, size, value, ..Default::default() };
        assert_eq!(guest.request(&mut rig, request), RawReply { err: 0, value }, "{offset:#x}");
    }
}

/// A frontend may ask as soon as its page is published; the event of that can come before anybody listens.
#[test]
fn a_request_from_before_the_channel_was_bound_is_answered() {
    let mut rig = boot_with(CARD);
    let mut guest = rig.attach(1, &[NIC]);
    // As `publish` does, with a request in the page.
    guest.page.flags.set(2 | PCIF_ACTIVE);
    guest.page.request.set(RawRequest { size: 4, ..Default::default() });
    guest.ring = (40, 41);
    rig.world.pages.borrow_mut().insert((1, 40), guest.page.clone());
    rig.world.ports.borrow_mut().insert((1, 41));
    for (node, value) in [("pci-op-ref", "40"), ("event-channel", "41"), ("magic", "7"), ("state", "3")] {
        guest.set_front(node, value);
    }
    assert!(rig.world.pending.borrow().is_empty(), "no event comes");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("4"));
    assert_eq!(guest.reply(), RawReply { err: 0, value: 0x100e_8086 });
}

/// No operation is refused for the state of the frontend: it may be about to reconfigure, and its drivers work on.
#[test]
fn a_request_is_answered_whatever_the_frontends_state() {
    let mut rig = boot_with(CARD);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for front in ["7", "8", "2", "4", "7", "4"] {
        guest.set_front("state", front);
        rig.settle();
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "frontend in {front}");
    }
    // The toolstack has begun a change, and the frontend has not answered.
    guest.set_back("state", "7");
    rig.settle();
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    guest.enable(&mut rig);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
}

#[test]
fn each_export_and_release_is_told_with_device_and_domain() {
    listen();
    let mut rig = boot(TWO);
    let mut guest = rig.attach(7, &[NIC, OTHER]);
    guest.connect(&mut rig);
    guest.destroy(&mut rig);
    let lines = heard();
    let told = |words: &[&str]| lines.iter().filter(|line| words.iter().all(|word| line.contains(word))).count();
    assert_eq!(told(&[NIC, "exported to domain 7 as 0000:00:00.00"]), 1, "{lines:#?}");
    assert_eq!(told(&[OTHER, "exported to domain 7 as 0000:00:01.00"]), 1, "{lines:#?}");
    assert_eq!(told(&["domain 7", "connected"]), 1, "{lines:#?}");
    assert_eq!([NIC, OTHER].map(|sbdf| told(&[sbdf, "released by domain 7"])), [1, 1], "{lines:#?}");
}
