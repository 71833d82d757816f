//! The image of a card: of what it is taken, and how it comes back after a reset.

use crate::model;

use std::rc::Rc;

use model::hardware::{MASTER, MS, at, differences};
use model::logs::{heard, listen};
use model::xen::{Act, Flavour};
use model::{Card, Guest, Hardware, NIC, ONE, OTHER, Rig, TWO, World, boot_in, boot_with};
use pciback::platform::Nanos;

const AF: Card = Card { advanced: true, ..Card::PLAIN };
const PM: Card = Card { power: Some(false), ..Card::BOTH };
const CARDS: [Card; 3] = [Card::FULL, AF, PM];

/// A guest that uses the card, with bus mastering on and a register changed.
fn at_work(rig: &mut Rig, id: u16) -> Guest {
    let mut guest = rig.attach(id, &[NIC]);
    guest.connect(rig);
    guest.enable(rig);
    assert_eq!(guest.write(rig, 0, 0x0c, 1, 0x20), 0);
    guest
}

/// The card's registers without Status, Command and the power state.
fn image(card: &Hardware) -> Vec<u8> {
    let mut bytes = card.bytes.borrow().clone();
    bytes[4..8].fill(0);
    bytes[usize::from(at::PMCSR)] &= !3;
    bytes
}

/// The writes that were made to the card from `start` to before `end`.
fn written(rig: &Rig, start: Nanos, end: Nanos) -> Vec<Act> {
    let done = rig.world.xen.done.borrow();
    let made = done.iter().filter(|done| (start..end).contains(&done.at) && matches!(done.act, Act::Write(..)));
    made.map(|done| done.act).collect()
}

// Case 43: xen-devel, July 2025: a USB controller that was asleep when it was handed over; all its registers read as
// ones in the guest.
#[test]
fn case_43_a_card_that_is_found_asleep_is_woken_and_loses_nothing() {
    for power in [true, false] {
        for state in [1, 2, 3] {
            for card in [Card::FULL, AF, Card::BOTH].map(|card| Card { power: Some(power), ..card }) {
                let world = World::with(Flavour::Owner);
                let hardware = world.plug(NIC, card.build());
                let before = image(&hardware);
                hardware.set_word(at::PMCSR, hardware.word(at::PMCSR) | state);
                let mut rig = boot_in(world, ONE);
                assert_eq!(rig.state(NIC), "ready", "D{state}, {card:?}: {:?}", rig.published(NIC, "reason"));
                assert_eq!(hardware.word(at::PMCSR) & 3, 0, "D{state}, {card:?}");
                assert_eq!(differences(&image(&hardware), &before), [], "D{state}, {card:?}: at the start");
                let guest = at_work(&mut rig, 1);
                guest.enable_msix(&mut rig, &[0]).expect("a vector");
                guest.destroy(&mut rig);
                assert_eq!(differences(&image(&hardware), &before), [], "D{state}, {card:?}");
                assert_eq!(hardware.unanswered.get(), 0, "D{state}, {card:?}: Xen always reached the table");
            }
        }
    }
}

/// Asleep, and without addresses there: what it has once it is awake counts.
#[test]
fn a_card_whose_addresses_show_only_when_it_is_awake_is_taken_awake() {
    let world = World::with(Flavour::Owner);
    let hardware = world.plug(NIC, Card { power: Some(true), msix: 0, ..Card::MSI_ONLY }.build());
    let before = image(&hardware);
    let held = hardware.bytes.borrow()[0x10..0x28].to_vec();
    hardware.set_word(at::PMCSR, hardware.word(at::PMCSR) | 3);
    for register in (0x10..0x28).step_by(4) {
        hardware.set_word(register, hardware.word(register) & 0xf);
        hardware.set_word(register + 2, 0);
    }
    let card = hardware.clone();
    // Firmware gives them back while it wakes up.
    hardware.on_waking.replace(Some(Box::new(move || card.bytes.borrow_mut()[0x10..0x28].copy_from_slice(&held))));
    let mut rig = boot_in(world, ONE);
    let guest = at_work(&mut rig, 1);
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), differences(&image(&hardware), &before)), ("ready", vec![]));
}

/// A card that stops to answer between the moment at which it was recognised and that at which it may be written to.
fn gone_while_it_is_seized(card: Card, until: Nanos) -> Rig {
    let world = World::with(Flavour::Owner);
    let hardware = world.plug(NIC, card.build());
    world.plug(OTHER, Card::FULL.build());
    let gone = hardware.clone();
    world.xen.meanwhile.replace(Some(Box::new(move |number, _, xen| {
        if number == 1 {
            gone.fall_silent_until(xen.bus.now.get() + until);
        }
    })));
    let mut rig = boot_in(world, TWO);
    rig.settle();
    rig
}

// Case 43 also: "never saves an all-ones image".
#[test]
fn case_43_all_ones_are_never_taken_for_the_image() {
    for card in CARDS {
        let before = image(&card.build());
        let mut rig = gone_while_it_is_seized(card, 5_000 * MS);
        let hardware = rig.hardware(NIC);
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        let guest = at_work(&mut rig, 1);
        guest.destroy(&mut rig);
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

#[test]
fn a_card_that_is_gone_before_its_image_was_taken_is_broken_and_can_be_tried_again() {
    for card in [Card::FULL, AF, PM, Card::BARE] {
        let before = image(&card.build());
        let mut rig = gone_while_it_is_seized(card, 100_000 * MS);
        let hardware = rig.hardware(NIC);
        assert!(rig.reason(NIC).contains("it does not answer, so it cannot be reset"), "{}", rig.reason(NIC));
        assert_eq!((rig.state(OTHER).as_str(), rig.acts(NIC).len()), ("ready", 1), "{card:?}: the question to Xen");
        rig.pass(50_000 * MS);
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        let guest = at_work(&mut rig, 1);
        guest.destroy(&mut rig);
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

/// The same where dom0 comes late: the card is known, and gone when it is to be taken.
#[test]
fn a_card_that_is_gone_when_dom0_comes_is_waited_for() {
    for card in CARDS {
        let world = World::with(Flavour::Stock417);
        let hardware = world.plug(NIC, card.build());
        let before = image(&hardware);
        let mut rig = boot_in(world, ONE);
        hardware.fall_silent_until(rig.world.now.get() + 3_000 * MS);
        rig.world.serve();
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        let guest = at_work(&mut rig, 1);
        guest.destroy(&mut rig);
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

/// A card that is gone when its guest ends reads as ones. Nothing made of them is written to it, as it may be back at
/// any moment; and it is not given to anybody before it was reset.
#[test]
fn a_card_that_is_gone_when_its_guest_ends_is_written_to_when_it_is_back_and_then_reset() {
    for card in CARDS {
        let mut rig = boot_with(card);
        let before = image(&rig.hardware(NIC));
        let guest = at_work(&mut rig, 1);
        guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
        let hardware = rig.hardware(NIC);
        let (start, resets) = (rig.world.now.get(), hardware.resets.get());
        hardware.fall_silent_until(start + 20_000 * MS);
        rig.forget();
        guest.destroy(&mut rig);
        assert_eq!(written(&rig, start, start + 20_000 * MS), [], "{card:?}");
        assert_eq!((rig.state(NIC).as_str(), hardware.resets.get()), ("ready", resets + 1), "{card:?}");
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
        assert_eq!(hardware.word(at::COMMAND) & MASTER, 0, "{card:?}");
        at_work(&mut rig, 2);
    }
}

/// The same while transactions are waited for: the register that tells reads as if some were pending for ever.
#[test]
fn a_card_that_goes_while_its_transactions_are_waited_for_is_reset_when_it_is_back() {
    for card in [Card::FULL, AF] {
        let mut rig = boot_with(card);
        let before = image(&rig.hardware(NIC));
        let guest = at_work(&mut rig, 1);
        let hardware = rig.hardware(NIC);
        let (start, resets) = (rig.world.now.get(), hardware.resets.get());
        hardware.pending.set(start + 10_000 * MS);
        guest.leave();
        rig.deliver();
        rig.pass(100 * MS);
        hardware.fall_silent_until(start + 5_000 * MS);
        rig.forget();
        rig.settle();
        assert_eq!(written(&rig, start, start + 5_000 * MS), [], "{card:?}");
        assert_eq!((rig.state(NIC).as_str(), hardware.resets.get()), ("ready", resets + 1), "{card:?}");
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

/// Whether a value for this register was made of ones: it has bits that no register of the card has.
fn is_of_ones(act: &Act) -> bool {
    let Act::Write(register, value) = *act else { return false };
    let never = match register {
        at::COMMAND => 0xf800,
        at::PMCSR => 0x00f0,
        at::MSI_CONTROL => 0xfe00,
        at::MSIX_CONTROL => 0x3800,
        at::DEVICE_CONTROL => 0x0040,
        _ => 0,
    };
    value & never != 0
}

/// A card that goes for a while, at any moment of a hand-over.
#[test]
fn whenever_a_card_goes_it_is_ready_when_it_is_back_and_nothing_made_of_ones_was_written_to_it() {
    listen();
    let asleep = Card { power: Some(false), ..Card::FULL };
    for card in [Card::FULL, AF, PM, asleep] {
        let mut rig = boot_with(card);
        let before = image(&rig.hardware(NIC));
        let hardware = rig.hardware(NIC);
        let mut ended = false;
        for reads in 0..1_000 {
            let guest = at_work(&mut rig, reads as u16 + 1);
            guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
            if card.power == Some(false) {
                assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
            }
            rig.forget();
            let resets = hardware.resets.get();
            hardware.going.set(Some((reads, 5_000 * MS)));
            guest.destroy(&mut rig);
            assert_eq!(rig.state(NIC), "ready", "{card:?}, {reads}: {:?}", rig.published(NIC, "reason"));
            assert_eq!(differences(&image(&hardware), &before), [], "{card:?}, {reads}");
            assert_ne!(hardware.resets.get(), resets, "{card:?}, {reads}: not without a reset");
            let acts = rig.acts(NIC);
            assert!(!acts.iter().any(is_of_ones), "{card:?}, {reads}: {acts:x?}");
            ended = hardware.going.take().is_some();
            if ended {
                break;
            }
        }
        assert!(ended, "{card:?}: a hand-over without end");
    }
    // What was restored in part before it went is no address that it kept.
    assert!(!heard().iter().any(|line| line.contains("changes nothing")), "{:#?}", heard());
}

/// The same while it is seized.
#[test]
fn whenever_a_card_goes_while_it_is_seized_its_image_is_the_true_one() {
    for card in [Card::FULL, AF, PM] {
        let before = image(&card.build());
        for reads in 0..1_000 {
            let world: Rc<World> = Rc::default();
            let hardware = world.plug(NIC, card.build());
            hardware.going.set(Some((reads, 5_000 * MS)));
            let mut rig = boot_in(world, ONE);
            let ended = hardware.going.take().is_some();
            if rig.state(NIC) == "broken" {
                // It was not recognised, or Xen did not find its table.
                rig.pass(5_000 * MS);
                rig.world.retry(NIC);
                rig.settle();
            }
            assert_eq!(rig.state(NIC), "ready", "{card:?}, {reads}: {:?}", rig.published(NIC, "reason"));
            let guest = at_work(&mut rig, 1);
            guest.destroy(&mut rig);
            assert_eq!(differences(&image(&hardware), &before), [], "{card:?}, {reads}");
            if ended {
                break;
            }
        }
    }
}

// Case 38 also: a mismatch on a base address register is tried again.
#[test]
fn case_38_a_register_that_loses_a_write_is_written_again() {
    for register in [0x10, 0x18, at::COMMAND, at::DEVICE_CONTROL] {
        for lost in [1, 2, 5, 40] {
            let mut rig = boot_with(Card::FULL);
            let before = image(&rig.hardware(NIC));
            let guest = at_work(&mut rig, 1);
            guest.leave();
            rig.deliver();
            // The reset itself has been written.
            rig.hardware(NIC).losing.borrow_mut().insert(register, lost);
            rig.settle();
            let vital = register != at::DEVICE_CONTROL;
            assert_eq!(rig.state(NIC), "ready", "{register:#x}, {lost} lost: {:?}", rig.published(NIC, "reason"));
            if vital || lost < 2 {
                assert_eq!(differences(&image(&rig.hardware(NIC)), &before), [], "{register:#x}, {lost} lost");
                let decodes = rig.hardware(NIC).word(at::COMMAND) & 3;
                assert_eq!(decodes, 3, "{register:#x}, {lost} lost");
            }
        }
    }
}

/// A reset that did not get through leaves the card as it was: it is done again.
#[test]
fn a_reset_that_is_lost_on_the_way_is_done_again() {
    listen();
    for (card, register) in [(Card::FULL, at::DEVICE_CONTROL), (AF, at::ADVANCED + 4), (PM, at::PMCSR)] {
        let mut rig = boot_with(card);
        let before = image(&rig.hardware(NIC));
        let guest = at_work(&mut rig, 1);
        let (hardware, resets) = (rig.hardware(NIC), rig.hardware(NIC).resets.get());
        hardware.losing.borrow_mut().insert(register, 1);
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), hardware.resets.get()), ("ready", resets + 1), "{card:?}");
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
    assert!(!heard().iter().any(|line| line.contains("changes nothing")), "{:#?}", heard());
}

/// A card that breaks in its first hand-over is tried again with the image of before, not with what is left.
#[test]
fn a_card_that_broke_in_its_first_reset_is_restored_to_what_it_was_before() {
    for card in CARDS {
        let world: Rc<World> = Rc::default();
        let hardware = world.plug(NIC, card.build());
        let before = image(&hardware);
        hardware.losing.borrow_mut().insert(0x18, 1_000);
        let mut rig = boot_in(world, ONE);
        assert!(rig.reason(NIC).contains("0x18"), "{card:?}: {}", rig.reason(NIC));
        hardware.losing.borrow_mut().clear();
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

/// What is behind a register that is not there is not written: nothing is decoded at a wrong address.
#[test]
fn decoding_does_not_begin_while_an_address_is_missing() {
    let mut rig = boot_with(Card::FULL);
    let guest = at_work(&mut rig, 1);
    rig.hardware(NIC).lock(0x10..0x14);
    guest.destroy(&mut rig);
    assert!(rig.reason(NIC).contains("0x10"), "{}", rig.reason(NIC));
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 7, 0);
}

// Case 42: "Support device passthrough when dom0 is PVH on Xen", xen-devel, November 2023: addresses that are put back
// after a reset do not get through, because Xen goes by the Command that was written before it.
#[test]
fn case_42_addresses_get_through_a_layer_that_has_not_noticed_the_reset() {
    for card in CARDS {
        let world: Rc<World> = Rc::default();
        let hardware = world.plug(NIC, card.build());
        hardware.layer.set(Some(hardware.word(at::COMMAND)));
        let before = image(&hardware);
        let mut rig = boot_in(world, ONE);
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        let guest = at_work(&mut rig, 1);
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), differences(&image(&hardware), &before)), ("ready", vec![]), "{card:?}");
        assert_eq!(hardware.word(at::COMMAND) & 3, 3, "{card:?}");
        at_work(&mut rig, 2);
    }
}
