//! Cards whose MSI-X Xen cannot set up: they are served without it.

use crate::model;

use model::hardware::at;
use model::logs::{heard, listen};
use model::xen::errno::ENXIO;
use model::xen::{Call, Flavour};
use model::{Card, NIC, ONE, Rig, World, boot_in};

/// What there is instead works, and goes as it came.
fn serves_without(rig: &mut Rig, id: u16) {
    let mut guest = rig.attach(id, &[NIC]);
    guest.connect(rig);
    guest.enable(rig);
    assert_eq!(guest.enable_msix(rig, &[0]), Err(-4));
    let pirq = guest.enable_msi(rig).expect("a vector");
    guest.bind(pirq);
    assert!(rig.hardware(NIC).delivers_msi(0));
    guest.destroy(rig);
    assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0));
}

// Case 40: xen-devel, July 2022: after its reset prepare_msix answers -6 for an SN570 drive.
#[test]
fn case_40_a_card_for_which_prepare_msix_fails_is_served_without_msix() {
    listen();
    let world = World::with(Flavour::Owner);
    let card = world.plug(NIC, Card::FULL.build());
    world.xen.fail(Call::Prepare, 0..u64::MAX, ENXIO);
    let mut rig = boot_in(world, ONE);
    for id in 1..4 {
        serves_without(&mut rig, id);
    }
    let told = rig.published(NIC, "msix").expect("a text");
    assert!(told.contains("5 entries, not usable: prepare_msix answered -ENXIO (-6)"), "{told}");
    assert_eq!(card.word(at::MSIX_CONTROL), 0x0004);
    let said = heard().iter().filter(|line| line.contains("served without MSI-X")).count();
    assert_eq!(said, 1, "{:#?}", heard());
    // It is tried again between two guests.
    rig.world.xen.heal();
    let guest = rig.attach(4, &[NIC]);
    guest.destroy(&mut rig);
    let mut guest = rig.attach(5, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    assert_eq!(rig.published(NIC, "msix").as_deref(), Some("5 entries"));
}

/// What dom0 can mend is not taken for that: a card without addresses, or one that does not decode them.
#[test]
fn a_card_that_dom0_can_mend_is_not_served_without_msix() {
    for addresses in [true, false] {
        let world = World::with(Flavour::Owner);
        let card = world.plug(NIC, Card::FULL.build());
        if addresses {
            card.set_word(at::COMMAND, 0);
        } else {
            card.bytes.borrow_mut()[0x10..0x28].fill(0);
        }
        let rig = boot_in(world, ONE);
        assert!(rig.reason(NIC).contains("-ENXIO (-6)"), "{}", rig.reason(NIC));
    }
}

/// Nor is one that Xen would assign to nobody, as all its vectors are masked.
#[test]
fn a_card_whose_vectors_are_masked_for_good_is_broken() {
    let world = World::with(Flavour::Owner);
    let card = world.plug(NIC, Card::PLAIN.build());
    card.set_word(at::MSIX_CONTROL, 0x4004);
    world.xen.fail(Call::Prepare, 0..u64::MAX, ENXIO);
    let rig = boot_in(world, ONE);
    assert!(rig.reason(NIC).contains("-ENXIO (-6)"), "{}", rig.reason(NIC));
}
