//! Registers that the configuration opens (`quirk=OFFSET:SIZE:MASK`), and extended space that is none. Cases 22 (a
//! NC340T's register at e0) and 34 (a listing of a device without rules).

use crate::model;

use std::rc::Rc;

use model::logs::{heard, listen};
use model::{Card, Guest, NIC, Rig, World, boot_in};

const WITH_RULE: &str = "dev=0000:01:00.0,quirk=e0:2:00ff,quirk=f0:4:80000001,quirk=800:1:f0";

fn boot(card: Card, cmdline: &str) -> Rig {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, card.build());
    boot_in(world, cmdline)
}

fn started(cmdline: &str) -> (Rig, Guest) {
    let mut rig = boot(Card::PLAIN, cmdline);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.hardware(NIC).writes.borrow_mut().clear();
    (rig, guest)
}

#[test]
fn case_22_only_what_the_rule_names_reaches_the_device() {
    let (mut rig, guest) = started(WITH_RULE);
    let card = rig.hardware(NIC);
    card.set_word(0xe0, 0x5500);
    assert_eq!(guest.write(&mut rig, 0, 0xe0, 2, 0xaa77), 0);
    assert_eq!(card.word(0xe0), 0x5577, "the mask holds");
    assert_eq!(guest.write(&mut rig, 0, 0xe0, 1, 0x12), 0);
    assert_eq!(card.word(0xe0), 0x5512);
    assert_eq!(guest.write(&mut rig, 0, 0xe1, 1, 0xff), 0);
    assert_eq!(card.word(0xe0), 0x5512, "no bit of that byte is the guest's");
    // A wide write reaches the rule's register and nothing beside it.
    assert_eq!(guest.write(&mut rig, 0, 0xe0, 4, 0xffff_ffff), 0);
    assert_eq!((card.word(0xe0), card.word(0xe2)), (0x55ff, 0));
    assert_eq!(guest.write(&mut rig, 0, 0xe2, 2, 0xffff), 0);
    assert_eq!(card.word(0xe2), 0);
    assert_eq!(guest.write(&mut rig, 0, 0xf0, 4, 0xffff_ffff), 0);
    assert_eq!((card.word(0xf0), card.word(0xf2)), (0x0001, 0x8000));
    assert_eq!(guest.read(&mut rig, 0, 0xf0, 4), Ok(0x8000_0001));
}

#[test]
fn case_22_without_a_rule_the_write_is_dropped_and_told_once() {
    let (mut rig, guest) = started("dev=0000:01:00.0");
    listen();
    for _ in 0..10 {
        assert_eq!(guest.write(&mut rig, 0, 0xe0, 2, 0xffff), 0);
    }
    assert_eq!(rig.hardware(NIC).word(0xe0), 0);
    assert_eq!(heard().iter().filter(|line| line.contains("0xe0")).count(), 1, "{:#?}", heard());
}

#[test]
fn a_rule_is_for_every_guest_and_what_one_wrote_is_not_the_next_ones() {
    let (mut rig, mut guest) = started(WITH_RULE);
    for number in 2..5 {
        assert_eq!(guest.read(&mut rig, 0, 0xe0, 2), Ok(0));
        assert_eq!(guest.write(&mut rig, 0, 0xe0, 2, 0x0042), 0);
        assert_eq!(rig.hardware(NIC).word(0xe0), 0x0042);
        guest.destroy(&mut rig);
        assert_eq!(rig.hardware(NIC).word(0xe0), 0, "{number}: the card has no reset of its own");
        guest = rig.attach(number, &[NIC]);
        guest.connect(&mut rig);
    }
}

#[test]
fn case_34_the_rules_in_force_are_listed_also_without_a_guest() {
    let (mut rig, guest) = started(WITH_RULE);
    let told = Some("quirk=e0:2:ff,quirk=f0:4:80000001,quirk=800:1:f0".to_string());
    assert_eq!(rig.published(NIC, "options"), told);
    guest.destroy(&mut rig);
    assert_eq!(rig.published(NIC, "options"), told);
    let rig = boot(Card::PLAIN, "dev=0000:01:00.0");
    assert_eq!(rig.published(NIC, "options"), None);
}

/// A permissive guest is trusted with what nobody knows; the mask is what somebody knows.
#[test]
fn the_mask_holds_for_a_permissive_guest_too() {
    let (mut rig, guest) = started("dev=0000:01:00.0,permissive,quirk=e0:2:00ff");
    assert_eq!(guest.write(&mut rig, 0, 0xe0, 4, 0xffff_ffff), 0);
    assert_eq!((rig.hardware(NIC).word(0xe0), rig.hardware(NIC).word(0xe2)), (0x00ff, 0xffff));
}

#[test]
fn a_register_with_a_rule_of_its_own_cannot_be_opened() {
    listen();
    let rig = boot(Card::FULL, "dev=0000:01:00.0,quirk=4:2:ffff,quirk=10:4:ffffffff,quirk=52:2:ffff,quirk=e0:2:1");
    assert_eq!(rig.published(NIC, "options").as_deref(), Some("quirk=e0:2:1"), "the others are not in force");
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    let told: Vec<String> = heard().into_iter().filter(|line| line.contains("is not followed")).collect();
    assert_eq!(told.len(), 3, "{told:#?}");
    for (line, register) in told.iter().zip(["Command", "Bar(0)", "MsiControl"]) {
        assert!(line.contains(register), "{line}");
    }
}

#[test]
fn a_card_that_does_not_answer_is_not_written_to() {
    let (mut rig, guest) = started(WITH_RULE);
    rig.hardware(NIC).vanish();
    rig.hardware(NIC).writes.borrow_mut().clear();
    assert_eq!(guest.write(&mut rig, 0, 0xe0, 2, 0x0001), 0);
    assert_eq!(*rig.hardware(NIC).writes.borrow(), []);
}

/// Behind a bridge that drops the upper address bits the first 256 bytes show again where extended space would be:
/// whoever could write there would go around their rules.
#[test]
fn what_mirrors_the_first_256_bytes_is_no_extended_space() {
    let world: Rc<World> = Rc::default();
    let card = world.plug(NIC, Card::PLAIN.build());
    {
        let mut bytes = card.bytes.borrow_mut();
        for at in 0x100..0x1000 {
            bytes[at] = bytes[at & 0xff];
        }
    }
    let mut rig = boot_in(world, "dev=0000:01:00.0,permissive,quirk=104:2:ffff");
    assert_eq!(rig.published(NIC, "options").as_deref(), Some("permissive"), "nothing is opened there");
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.hardware(NIC).writes.borrow_mut().clear();
    for at in (0x100..0x1000).step_by(4) {
        assert_eq!(guest.read(&mut rig, 0, at, 4), Ok(u32::MAX));
        assert_eq!(guest.write(&mut rig, 0, at, 4, 0), 0);
    }
    assert_eq!(guest.read(&mut rig, 0, 0xffe, 2), Ok(0xffff));
    assert_eq!(*rig.hardware(NIC).writes.borrow(), []);
}
