//! D3hot and back by the guest's own hand (PCI Power Management 1.2, 5.4.1): what a function loses on the way it has
//! again before the guest's next request reaches it. Linux's backend gives back the addresses only, and Xen's vectors
//! stay lost. Case 65 (QubesOS issues 9869, 3049, 4084, 7294).

use crate::model;

use model::hardware::{BAR0, INTX_DISABLE, MASTER, MEMORY, MS, at};
use model::xen::Act;
use model::{Card, Guest, NIC, OTHER, Rig, TWO, World, boot_in, boot_with};
use pciback::wire::{PCIF_ACTIVE, RawRequest, op};

/// A started guest whose driver has turned the card on.
fn started(card: Card) -> (Rig, Guest) {
    let mut rig = boot_with(card);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    (rig, guest)
}

fn post_write(guest: &Guest, offset: u16, value: u32) {
    guest.post(RawRequest { cmd: op::CONF_WRITE, offset: offset.into(), size: 2, value, ..Default::default() });
}

fn post_read(guest: &Guest, offset: i32) {
    guest.post(RawRequest { cmd: op::CONF_READ, offset, size: 4, ..Default::default() });
}

/// To D3hot and back, without a moment's time after it.
fn sleep_and_wake(rig: &mut Rig, guest: &Guest) {
    assert_eq!(guest.write(rig, 0, at::PMCSR.into(), 2, 3), 0);
    rig.pass(20 * MS);
    post_write(guest, at::PMCSR, 0);
    rig.deliver();
    assert_eq!(guest.reply().err, 0);
}

#[test]
fn case_65_what_is_lost_in_d3hot_is_back_before_the_next_request() {
    let (mut rig, guest) = started(Card { power: Some(false), express: Some(true), ..Card::PLAIN });
    let card = rig.hardware(NIC);
    let (command, control) = (card.word(at::COMMAND), card.word(at::DEVICE_CONTROL));
    let vectors = guest.enable_msix(&mut rig, &[0]).expect("a vector");
    guest.bind(vectors[0]);
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086), "it answers in D3hot");
    assert_eq!(guest.read(&mut rig, 0, 0x10, 4), Ok(BAR0));
    post_write(&guest, at::PMCSR, 0);
    rig.deliver();
    assert_eq!(guest.reply().err, 0);
    assert_eq!(card.word(0x12), 0, "it has lost its addresses");

    // The next request comes too early: it waits, and finds all in place.
    post_read(&guest, 4);
    rig.deliver();
    assert_ne!(guest.page.flags.get() & PCIF_ACTIVE, 0, "no answer before the card may be touched");
    rig.pass(9 * MS);
    assert_ne!(guest.page.flags.get() & PCIF_ACTIVE, 0);
    rig.pass(MS);
    assert_eq!(guest.reply().value & 0xffff, 0x0002, "decoding as it was, and bus mastering off as after any reset");
    assert_eq!(u32::from(card.word(0x10)) | u32::from(card.word(0x12)) << 16, BAR0);
    assert_eq!(card.word(at::COMMAND), command & !MASTER | INTX_DISABLE);
    assert_eq!(card.word(at::DEVICE_CONTROL), control);
    assert_eq!(rig.acts(NIC).into_iter().filter(|act| *act == Act::Restore).count(), 1);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert!(card.delivers(0), "Xen's vector is there again");
}

#[test]
fn a_card_that_takes_its_time_is_waited_for_and_one_that_stays_away_is_not_pretended() {
    let (mut rig, guest) = started(Card { power: Some(false), ..Card::PLAIN });
    sleep_and_wake(&mut rig, &guest);
    rig.hardware(NIC).vanish();
    post_read(&guest, 0);
    rig.pass(300 * MS);
    assert_ne!(guest.page.flags.get() & PCIF_ACTIVE, 0);
    rig.hardware(NIC).come_back();
    rig.pass(20 * MS);
    assert_eq!(guest.reply().value, 0x100e_8086);
    assert_eq!(guest.read(&mut rig, 0, 0x10, 4), Ok(BAR0));

    sleep_and_wake(&mut rig, &guest);
    rig.hardware(NIC).vanish();
    let start = rig.world.now.get();
    post_read(&guest, 0);
    rig.settle();
    assert_eq!(guest.reply().value, u32::MAX, "it is gone, and says so");
    assert!(rig.world.now.get() - start < 2_000 * MS, "before the client gives up");
}

#[test]
fn a_card_that_keeps_its_state_is_left_alone_and_one_that_only_says_so_is_not() {
    for lies in [false, true] {
        let (mut rig, guest) = started(Card { power: Some(true), ..Card::PLAIN });
        assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
        rig.pass(20 * MS);
        post_write(&guest, at::PMCSR, 0);
        rig.deliver();
        assert_eq!(guest.reply().err, 0);
        rig.hardware(NIC).writes.borrow_mut().clear();
        if lies {
            rig.hardware(NIC).set_word(0x12, 0);
            rig.hardware(NIC).set_word(at::COMMAND, 0);
        }
        rig.pass(20 * MS);
        assert_eq!(u32::from(rig.hardware(NIC).word(0x12)), BAR0 >> 16);
        let master = if lies { 0 } else { MASTER };
        assert_eq!(rig.hardware(NIC).word(at::COMMAND) & (MEMORY | MASTER), MEMORY | master);
        assert_eq!(rig.hardware(NIC).writes.borrow().is_empty(), !lies);
    }
}

#[test]
fn a_guest_that_wakes_its_card_holds_up_nobody_else() {
    let world = std::rc::Rc::<World>::default();
    world.plug(NIC, Card { power: Some(false), ..Card::PLAIN }.build());
    let mut rig = boot_in(world, TWO);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    let mut other = rig.attach(2, &[OTHER]);
    other.connect(&mut rig);
    sleep_and_wake(&mut rig, &guest);
    post_read(&guest, 0);
    post_read(&other, 0);
    rig.deliver();
    assert_eq!(other.reply().value, 0x100e_8086);
    assert_ne!(guest.page.flags.get() & PCIF_ACTIVE, 0);
    // Nothing is looked at over and over meanwhile.
    assert!(!rig.serve());
    rig.settle();
    assert_eq!(guest.reply().value, 0x100e_8086);
}

#[test]
fn a_guest_that_dies_on_the_way_leaves_a_card_for_the_next() {
    let (mut rig, guest) = started(Card { power: Some(false), ..Card::PLAIN });
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    sleep_and_wake(&mut rig, &guest);
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready");
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0);
    let mut next = rig.attach(2, &[NIC]);
    next.connect(&mut rig);
    assert_eq!(next.read(&mut rig, 0, 0x10, 4), Ok(BAR0));
}

/// A wish that was refused wakes nothing.
#[test]
fn case_65_wake_events_stay_off_whatever_the_guest_writes() {
    let (mut rig, guest) = started(Card::FULL);
    for value in [0x0100, 0x0103, 0x0100, 0xffff, 0x0100] {
        guest.write(&mut rig, 0, at::PMCSR.into(), 2, value);
        rig.settle();
        assert_eq!(rig.hardware(NIC).word(at::PMCSR) & 0x0100, 0, "{value:#x}");
    }
}

/// Reference 3.6: the guest chooses D-state and data selector, and clears a pending wake event by its own 1 only.
#[test]
fn power_state_and_data_selector_follow_and_a_wake_event_is_cleared_by_its_1_only() {
    let (mut rig, guest) = started(Card::FULL);
    let card = rig.hardware(NIC);
    for state in [1, 2, 3, 0] {
        assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, state), 0);
        rig.settle();
        assert_eq!(u32::from(card.word(at::PMCSR) & 3), state);
    }
    card.set_word(at::PMCSR, card.word(at::PMCSR) | 0x8000);
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 0x0a00), 0);
    assert_eq!(card.word(at::PMCSR) & 0x9e00, 0x8a00, "the event is pending still");
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 1, 0x01), 0);
    assert_eq!(card.word(at::PMCSR) & 0x9e03, 0x8a01, "a byte beside it clears nothing either");
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 0x8000), 0);
    assert_eq!(card.word(at::PMCSR) & 0x9e00, 0);
}

/// The write that wakes it may be wider than the register, and be refused for the rest. (Found by the hostile guest of
/// fuzz.rs.)
#[test]
fn a_wide_write_wakes_as_a_narrow_one_does() {
    let (mut rig, guest) = started(Card { power: Some(false), ..Card::PLAIN });
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 4, 0x5a5a_0000), 0);
    rig.settle();
    assert_eq!(rig.hardware(NIC).word(at::PMCSR) & 3, 0);
    assert_eq!(u32::from(rig.hardware(NIC).word(0x12)), BAR0 >> 16);
    assert_ne!(rig.hardware(NIC).word(at::COMMAND) & MEMORY, 0);
}
