//! How a card is reset: by what its registers say, and by what is publicly known of it.

use crate::model;

use std::rc::Rc;

use model::hardware::{MS, at};
use model::logs::{heard, listen};
use model::xen::{Act, Flavour};
use model::{Card, Hardware, NIC, ONE, Rig, World, boot_in};

/// A host whose driver domain does all itself, or one whose dom0 does what only dom0 may, with one card.
fn host(flavour: Flavour, card: Hardware, options: &str) -> (Rig, Rc<Hardware>) {
    let world = World::with(flavour);
    if flavour != Flavour::Owner {
        world.serve();
    }
    let hardware = world.plug(NIC, card);
    (boot_in(world, &format!("{ONE}{options}")), hardware)
}

/// How the card is reset, by this domain or by dom0.
fn choice(card: &dyn Fn() -> Hardware) -> (String, String) {
    let told = |flavour| host(flavour, card(), "").0.published(NIC, "reset").expect("a method");
    (told(Flavour::Owner), told(Flavour::Stock417))
}

fn words(own: &str, dom0s: &str) -> (String, String) {
    (own.into(), dom0s.into())
}

/// The beginning of an Intel I219: power management at 0xc8, MSI at 0xd0, and Advanced Features at 0xe0, to which MSI
/// leads or not.
fn i219(device: u16, last: u8, features: u8) -> Hardware {
    let mut bytes = vec![0; 256];
    let mut put = |at: usize, with: &[u8]| bytes[at..at + with.len()].copy_from_slice(with);
    put(0, &[0x86, 0x80, device as u8, (device >> 8) as u8, 0x06, 0x04, 0x10, 0x00]);
    put(0x08, &[0x10, 0, 0, 2]);
    put(0x10, &[0, 0, 0x20, 0x41]);
    put(0x34, &[0xc8]);
    put(0x3d, &[1]);
    put(0xc8, &[0x01, 0xd0, 0x23, 0xc8, 0x08]);
    put(0xd0, &[0x05, last, 0x80]);
    put(0xe0, &[features, 0, 0x06, 0x03]);
    Hardware::from_image(&bytes)
}

// Case 35: QubesOS issues 9356 and 11048: the network domain does not start, as the card "has no reset".
#[test]
fn case_35_a_reset_that_is_in_no_list_is_known_by_the_cards_id() {
    for device in [0x550a, 0x15bc] {
        assert_eq!(choice(&|| i219(device, 0, 0x13)), words("af", "af"), "{device:04x}");
        let (mut rig, card) = host(Flavour::Owner, i219(device, 0, 0x13), "");
        assert_eq!((rig.state(NIC).as_str(), card.resets.get()), ("ready", 1), "{device:04x}");
        rig.forget();
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        guest.enable(&mut rig);
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), card.resets.get()), ("ready", 2), "{device:04x}");
        assert!(rig.acts(NIC).contains(&Act::Write(0xe4, 1)));
        // Linked, as firmware or another kernel leaves it; and something else in its place.
        assert_eq!(choice(&|| i219(device, 0xe0, 0x13)), words("af", "af"), "{device:04x}");
        assert_eq!(choice(&|| i219(device, 0, 0x09)), words("dom0", "bus"), "{device:04x}");
    }
    assert_eq!(choice(&|| i219(0x15b7, 0, 0x13)), words("dom0", "bus"), "another card with the same bytes");
}

// Case 35's companion: an ICH10 USB controller, in whose list it is.
#[test]
fn case_35_a_reset_that_is_in_the_list_is_used_by_its_registers() {
    let mut bytes = vec![0; 256];
    let mut put = |at: usize, with: &[u8]| bytes[at..at + with.len()].copy_from_slice(with);
    put(0, &[0x86, 0x80, 0x34, 0x3a, 0x05, 0x00, 0x90, 0x02]);
    put(0x20, &[0x81, 0xff]);
    put(0x34, &[0x50]);
    put(0x3d, &[1]);
    put(0x50, &[0x13, 0, 0x06, 0x03]);
    let (mut rig, card) = host(Flavour::Owner, Hardware::from_image(&bytes), "");
    assert_eq!(rig.published(NIC, "reset").as_deref(), Some("af"));
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.forget();
    let (start, resets) = (rig.world.now.get(), card.resets.get());
    card.pending.set(start + 50 * MS);
    guest.leave();
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), card.resets.get()), ("ready", resets + 1));
    let done = rig.world.xen.done.borrow();
    let reset = done.iter().find(|done| done.act == Act::Write(0x54, 1)).expect("the reset");
    assert_eq!(((reset.at - start) / MS, (rig.world.now.get() - reset.at) / MS), (60, 100));
}

/// The datasheet of Intel's 82599 (9.3.10.4, 9.5): its virtual functions have a reset that only the physical one shows.
#[test]
fn a_virtual_function_whose_reset_only_the_physical_one_tells_of_is_reset() {
    for (device, method, resets) in [(0x10ed, "flr", 1), (0x1520, "dom0", 0)] {
        let vf = Hardware::virtual_function(0x8086, device);
        vf.set_word(at::EXPRESS + 6, 0);
        let (rig, card) = host(Flavour::Owner, vf, &format!(",id=8086:{device:04x}"));
        assert_eq!(rig.published(NIC, "reset").as_deref(), Some(method), "{device:04x}");
        assert_eq!((rig.state(NIC).as_str(), card.resets.get()), ("ready", resets), "{device:04x}");
    }
}

fn full(vendor: u16, device: u16, keeps: bool) -> Hardware {
    Card { vendor, device, power: Some(keeps), ..Card::FULL }.build()
}

/// Linux's list, and Mediatek's MT7922 (reported from Qubes OS in 2025), which does not come back.
#[test]
fn a_card_that_does_not_survive_a_function_level_reset_gets_another() {
    for (vendor, device) in [(0x1022, 0x149c), (0x1022, 0x7901), (0x8086, 0x1502), (0x14c3, 0x0616)] {
        assert_eq!(choice(&|| full(vendor, device, false)), words("pm", "pm"), "{vendor:04x}:{device:04x}");
        assert_eq!(choice(&|| full(vendor, device, true)), words("dom0", "bus"), "{vendor:04x}:{device:04x}");
        let (rig, card) = host(Flavour::Owner, full(vendor, device, true), ",reset=flr");
        let reason = rig.reason(NIC);
        assert!(reason.contains("reset=flr: not for this function: ") && reason.contains("reset=auto"), "{reason}");
        assert_eq!(card.resets.get(), 0);
        // Nothing else resets it where dom0 has no part in the hand-over.
        let (rig, _) = host(Flavour::Owner, full(vendor, device, true), ",strict");
        assert!(rig.reason(NIC).contains("it has no reset of its own"), "{}", rig.reason(NIC));
    }
    assert_eq!(choice(&|| full(0x1022, 0x149d, false)), words("flr", "flr"));
}

/// Linux's list: graphics cards that keep their picture, switches that keep their ports.
#[test]
fn a_card_that_keeps_its_state_over_d3hot_is_not_reset_by_it() {
    let card = |vendor, device, class| {
        let card = Card { vendor, device, power: Some(false), ..Card::BOTH }.build();
        card.set_word(0x0a, class);
        card
    };
    assert_eq!(choice(&|| card(0x1002, 0x7300, 0x0300)), words("dom0", "bus"));
    assert_eq!(choice(&|| card(0x1002, 0xaae8, 0x0403)), words("pm", "pm"), "its sound");
    assert_eq!(choice(&|| card(0x15b3, 0xcb84, 0x0200)), words("dom0", "bus"));
    assert_eq!(choice(&|| card(0x15b3, 0x1017, 0x0200)), words("pm", "pm"));
    let (rig, _) = host(Flavour::Owner, card(0x1002, 0x7300, 0x0300), ",reset=pm");
    assert!(rig.reason(NIC).contains("keeps its state over D3hot"), "{}", rig.reason(NIC));
}

/// Linux's list: drives that take commands too early after a reset.
#[test]
fn a_slow_drive_is_left_alone_longer() {
    for (vendor, device, time) in [(0x8086, 0x0953, 350), (0x025e, 0xf1ac, 350), (0x8086, 0x0a53, 100)] {
        let (mut rig, _) = host(Flavour::Owner, full(vendor, device, true), "");
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        let start = rig.world.now.get();
        guest.leave();
        rig.settle();
        assert_eq!((rig.world.now.get() - start) / MS, time, "{vendor:04x}:{device:04x}");
    }
}

/// Linux's list: resets that need the card's memory, which this domain does not have.
#[test]
fn a_card_with_a_reset_of_its_own_kind_is_left_to_dom0() {
    for (vendor, device) in [(0x144d, 0xa804), (0x8086, 0x0166), (0x1425, 0x4407), (0x19e5, 0x375e)] {
        assert_eq!(choice(&|| full(vendor, device, true)), words("dom0", "bus"), "{vendor:04x}:{device:04x}");
        let (rig, _) = host(Flavour::Owner, full(vendor, device, true), ",reset=flr");
        assert!(rig.reason(NIC).contains("not for this function"), "{}", rig.reason(NIC));
    }
    assert_eq!(choice(&|| full(0x1425, 0x5407, true)), words("flr", "flr"), "T5");
}

/// Case 36: the order of the methods.
#[test]
fn case_36_the_first_of_the_methods_that_a_card_has_is_used() {
    let all = Card { advanced: true, power: Some(false), ..Card::FULL };
    for (card, own, dom0s) in [
        (all, "flr", "flr"),
        (Card { express: Some(false), ..all }, "af", "af"),
        (Card { express: None, advanced: false, ..all }, "pm", "pm"),
        (Card { express: Some(false), advanced: false, power: Some(true), ..all }, "dom0", "bus"),
        (Card { express: None, advanced: false, power: None, ..all }, "dom0", "bus"),
    ] {
        assert_eq!(choice(&|| card.build()), words(own, dom0s), "{card:?}");
    }
}

/// Case 36: dom0 may have no reset either (an xHCI on the root bus whose power management keeps its state).
#[test]
fn case_36_without_any_reset_strict_refuses_and_others_are_told() {
    let card = || Card { power: Some(true), ..Card::BOTH }.build();
    for (options, flavour) in [(",strict", Flavour::Owner), (",strict", Flavour::Stock417)] {
        let (rig, _) = host(flavour, card(), options);
        let reason = rig.reason(NIC);
        assert!(reason.contains("strict"), "{flavour:?}: {reason}");
    }
    listen();
    let (rig, _) = host(Flavour::Stock417, card(), "");
    assert_eq!(rig.state(NIC), "ready");
    assert!(heard().iter().any(|line| line.contains(NIC) && line.contains("dom0 does not reset it: -ENOENT")));
}

/// With strict, a card is used only after a reset that shows: each time.
#[test]
fn strict_looks_at_every_reset() {
    let (mut rig, card) = host(Flavour::Owner, Card::FULL.build(), ",strict");
    for id in 1..4 {
        assert_eq!(rig.state(NIC), "ready");
        let mut guest = rig.attach(id, &[NIC]);
        guest.connect(&mut rig);
        card.unresettable.set(id == 3);
        guest.destroy(&mut rig);
    }
    assert!(rig.reason(NIC).contains("its reset (flr) changes nothing"), "{}", rig.reason(NIC));
    let next = rig.attach(4, &[NIC]);
    assert_eq!(next.back("state-0").as_deref(), Some("6"), "nobody gets it");
    assert!(next.back("error-0").expect("a reason").contains("strict"));
    card.unresettable.set(false);
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
}
