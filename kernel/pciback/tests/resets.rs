//! The reset between two guests: the methods, the registers that come back, the time it takes, and who waits for it.

use crate::model;

use std::rc::Rc;

use model::hardware::{INTX_DISABLE, MASTER, MS, Silence, at, differences};
use model::logs::{heard, listen};
use model::xen::{Act, Flavour};
use model::{Card, Guest, Hardware, NIC, ONE, OTHER, Rig, TWO, World, boot_in, boot_with};
use pciback::platform::Nanos;
use pciback::wire::RawRequest;

const AF: Card = Card { advanced: true, ..Card::PLAIN };
const PM: Card = Card { power: Some(false), ..Card::BOTH };

/// A host with two cards, the first of this kind.
fn two(card: Card) -> Rc<World> {
    let world = World::with(Flavour::Owner);
    world.plug(NIC, card.build());
    world.plug(OTHER, Card::FULL.build());
    world
}

/// A guest that uses a card, with bus mastering on and registers changed.
fn at_work(rig: &mut Rig, id: u16, sbdf: &str) -> Guest {
    let mut guest = rig.attach(id, &[sbdf]);
    guest.connect(rig);
    guest.enable(rig);
    assert_eq!(guest.write(rig, 0, 0x0c, 1, 0x20), 0);
    guest
}

/// Takes the guest's folder away and lets no time pass.
fn leave(rig: &mut Rig, guest: &Guest) {
    guest.leave();
    rig.deliver();
}

/// The card's registers without Status and Command.
fn image(card: &Hardware) -> Vec<u8> {
    let mut bytes = card.bytes.borrow().clone();
    bytes[4..8].fill(0);
    bytes
}

#[test]
fn each_method_brings_back_what_software_had_set() {
    for (card, method) in [(Card::FULL, "flr"), (AF, "af"), (PM, "pm")] {
        let world = two(card);
        let hardware = world.hardware.borrow()[&NIC.parse().unwrap()].clone();
        let before = image(&hardware);
        let mut rig = boot_in(world, TWO);
        assert_eq!(rig.published(NIC, "reset").as_deref(), Some(method));
        assert_eq!(differences(&image(&hardware), &before), [], "{method}, at the start");
        let first = hardware.resets.get();
        let guest = at_work(&mut rig, 1, NIC);
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), hardware.resets.get()), ("ready", first + 1), "{method}");
        assert_eq!(differences(&image(&hardware), &before), [], "{method}");
        assert_eq!(hardware.word(at::COMMAND) & (MASTER | INTX_DISABLE | 3), INTX_DISABLE | 3, "{method}");
    }
}

/// dom0 may have left bus mastering and the pin on.
#[test]
fn a_card_is_silent_before_its_first_guest_whatever_it_was() {
    for card in [Card::FULL, AF, PM, Card::PLAIN] {
        let world = two(card);
        world.hardware.borrow()[&NIC.parse().unwrap()].set_word(at::COMMAND, 0x0007);
        let mut rig = boot_in(world, TWO);
        assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).word(at::COMMAND)), ("ready", 0x0403), "{card:?}");
        let guest = at_work(&mut rig, 1, NIC);
        guest.destroy(&mut rig);
        assert_eq!(rig.hardware(NIC).word(at::COMMAND), 0x0403, "{card:?}");
    }
}

/// A driver domain that died in a reset leaves a function without addresses; once dom0 has put them back and says so, the
/// next one takes it with them. (`MSI_ONLY`: Xen is not asked where a table is, so nobody notices until then.)
#[test]
fn a_card_that_was_left_without_addresses_is_taken_again_once_it_has_them() {
    for (card, first) in [(Card::FULL, "broken"), (AF, "broken"), (Card::MSI_ONLY, "ready")] {
        let world = two(card);
        let hardware = world.hardware.borrow()[&NIC.parse().unwrap()].clone();
        let before = image(&hardware);
        let held: Vec<u16> = (0x10..0x28).step_by(2).map(|at| hardware.word(at)).collect();
        for at in (0x10..0x28).step_by(2) {
            // The kind of a register is not to be written.
            hardware.set_word(at, if at % 4 == 0 { held[usize::from(at - 0x10) / 2] & 0xf } else { 0 });
        }
        hardware.set_word(at::COMMAND, 0);
        let mut rig = boot_in(world, TWO);
        assert_eq!(rig.state(NIC), first, "{card:?}");
        for at in (0x10..0x28).step_by(2) {
            hardware.set_word(at, held[usize::from(at - 0x10) / 2]);
        }
        hardware.set_word(at::COMMAND, 3);
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {}", rig.published(NIC, "reason").unwrap_or_default());
        let guest = at_work(&mut rig, 1, NIC);
        guest.destroy(&mut rig);
        assert_eq!(differences(&image(&hardware), &before), [], "{card:?}");
    }
}

/// A function without a reset of its own: what a guest could set is put back one by one.
#[test]
fn without_a_reset_the_registers_are_put_back_all_the_same() {
    let mut rig = boot_with(Card { power: Some(true), ..Card::BOTH });
    let before = image(&rig.hardware(NIC));
    let guest = at_work(&mut rig, 1, NIC);
    guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 0));
    assert_eq!(differences(&image(&rig.hardware(NIC)), &before), []);
}

/// Decoding must not begin before the addresses are there.
#[test]
fn command_comes_back_last() {
    for card in [Card::FULL, AF, PM] {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1, NIC);
        rig.forget();
        guest.destroy(&mut rig);
        let acts = rig.acts(NIC);
        let bar = acts.iter().rposition(|act| matches!(act, Act::Write(0x10 | 0x18, _)));
        let decode = acts.iter().rposition(|act| matches!(act, Act::Write(at::COMMAND, value) if value & 3 != 0));
        assert!(bar.is_some() && bar < decode, "{card:?}: {acts:?}");
    }
}

/// Nothing is written to a card while it may not be touched.
#[test]
fn a_card_is_left_alone_while_it_recovers() {
    for (card, time) in [(Card::FULL, 100 * MS), (AF, 100 * MS), (PM, 20 * MS)] {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1, NIC);
        leave(&mut rig, &guest);
        let start = rig.world.now.get();
        rig.forget();
        rig.settle();
        assert_eq!(rig.world.now.get() - start, time, "{card:?}");
        let early = |done: &model::xen::Done| matches!(done.act, Act::Write(..)) && done.at < start + time;
        let done = rig.world.xen.done.borrow();
        let early: Vec<_> = done.iter().filter(|done| early(done)).map(|done| done.act).collect();
        // The way back from D3hot is one write, in the middle of it.
        assert_eq!(early.len(), usize::from(card.power == Some(false)), "{card:?}: {early:?}");
    }
}

// Case 38: QubesOS issue 1525: the network domain does not start, because a register did not come back.
#[test]
fn case_38_a_vital_register_that_does_not_come_back_breaks_the_card() {
    for (range, told) in [(0x10..0x14, "0x10"), (0x18..0x1c, "0x18"), (0x04..0x06, "Command")] {
        let mut rig = boot_with(Card::FULL);
        let guest = at_work(&mut rig, 1, NIC);
        rig.hardware(NIC).lock(range.clone());
        guest.destroy(&mut rig);
        assert!(rig.reason(NIC).contains(told), "{}", rig.reason(NIC));
        assert!(rig.attach(2, &[NIC]).back("error-0").expect("a reason").contains("does not take back"));
    }
}

#[test]
fn a_register_that_is_not_vital_is_told_and_no_obstacle() {
    listen();
    let mut rig = boot_with(Card::FULL);
    let guest = at_work(&mut rig, 1, NIC);
    let control = usize::from(at::EXPRESS) + 0x10;
    rig.hardware(NIC).lock(control..control + 2);
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready");
    assert!(heard().iter().any(|line| line.contains("Link Control") && line.contains("does not take back")));
}

// Case 40: xen-devel, July 2022: an SN570 drive answers again only seconds after its reset.
#[test]
fn case_40_a_card_that_takes_its_time_is_waited_for() {
    for (time, how) in [
        (100, Silence::Ones),
        (101, Silence::Ones),
        (1_000, Silence::Ones),
        (3_000, Silence::Retry),
        (59_000, Silence::Retry),
    ] {
        let mut rig = boot_with(Card::FULL);
        let before = image(&rig.hardware(NIC));
        let guest = at_work(&mut rig, 1, NIC);
        rig.hardware(NIC).recovery.set((time * MS, how));
        leave(&mut rig, &guest);
        let start = rig.world.now.get();
        rig.settle();
        let took = rig.world.now.get() - start;
        assert_eq!(rig.state(NIC), "ready", "{time} ms, {how:?}");
        assert!((time * MS..(time + 129) * MS).contains(&took), "{time} ms, {how:?}: {took}");
        assert_eq!(differences(&image(&rig.hardware(NIC)), &before), [], "{time} ms, {how:?}");
    }
}

#[test]
fn a_card_that_never_answers_again_is_broken_after_a_minute() {
    for how in [Silence::Ones, Silence::Retry] {
        let mut rig = boot_with(Card::FULL);
        let guest = at_work(&mut rig, 1, NIC);
        rig.hardware(NIC).recovery.set((Nanos::MAX / 2, how));
        leave(&mut rig, &guest);
        let start = rig.world.now.get();
        let mut looks = 0;
        while let Some(due) = rig.hand_over_due() {
            rig.world.now.set(due.max(rig.world.now.get()));
            rig.deliver();
            looks += 1;
        }
        let took = rig.world.now.get() - start;
        assert!((60_000 * MS..61_000 * MS).contains(&took), "{took}");
        assert!(looks < 600, "{looks} looks");
        assert!(rig.reason(NIC).contains("does not answer 60 s after its reset (flr)"), "{}", rig.reason(NIC));
        assert_eq!(rig.backend.next_deadline(), None, "nothing wakes the domain any more");
        // A minute later somebody has power-cycled it.
        rig.hardware(NIC).come_back();
        rig.hardware(NIC).recovery.set((100 * MS, Silence::Ones));
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready");
        at_work(&mut rig, 2, NIC);
    }
}

/// After the reset another card answers, or the same with other firmware.
#[test]
fn a_card_that_comes_back_as_another_is_broken() {
    let mut rig = boot_with(Card::FULL);
    let guest = at_work(&mut rig, 1, NIC);
    rig.hardware(NIC).set_word(2, 0x1234);
    guest.destroy(&mut rig);
    assert!(rig.reason(NIC).contains("does not answer"), "{}", rig.reason(NIC));
}

#[test]
fn pending_transactions_are_waited_for_and_not_for_ever() {
    for card in [Card::FULL, AF] {
        for (pending, reset_after) in [(0, 0), (50, 60), (650, 660), (10_000, 700)] {
            let mut rig = boot_with(card);
            let guest = at_work(&mut rig, 1, NIC);
            let first = rig.hardware(NIC).resets.get();
            let start = rig.world.now.get();
            rig.hardware(NIC).pending.set(start + pending * MS);
            leave(&mut rig, &guest);
            assert_eq!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0, "no new ones are started meanwhile");
            while rig.hardware(NIC).resets.get() == first {
                let due = rig.hand_over_due().expect("a reset to come");
                rig.world.now.set(due.max(rig.world.now.get()));
                rig.deliver();
            }
            assert_eq!((rig.world.now.get() - start) / MS, reset_after, "{card:?}, pending {pending} ms");
            rig.settle();
            assert_eq!(rig.state(NIC), "ready");
        }
    }
}

/// Whatever a reset takes, another guest's requests are answered at once.
#[test]
fn other_guests_are_served_between_any_two_steps() {
    let slow = [(100 * MS, Silence::Ones), (5_000 * MS, Silence::Retry), (Nanos::MAX / 2, Silence::Ones)];
    for card in [Card::FULL, AF, PM] {
        for recovery in slow {
            let mut rig = boot_in(two(card), TWO);
            let guest = at_work(&mut rig, 1, NIC);
            guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
            let mut other = rig.attach(2, &[OTHER]);
            other.connect(&mut rig);
            rig.hardware(NIC).recovery.set(recovery);
            rig.hardware(NIC).pending.set(rig.world.now.get() + 200 * MS);
            leave(&mut rig, &guest);
            let mut served = 0;
            while let Some(due) = rig.hand_over_due() {
                let now = rig.world.now.get();
                other.post(RawRequest { cmd: 0, size: 4, ..Default::default() });
                rig.deliver();
                assert_eq!(other.reply().value, 0x100e_8086);
                assert_eq!(rig.world.now.get(), now, "an answer takes no time");
                rig.world.now.set(due.max(now));
                rig.deliver();
                served += 1;
            }
            assert!(served >= 2, "{card:?} {recovery:?}");
            guest.destroy(&mut rig);
        }
    }
}

/// An idle domain is not woken.
#[test]
fn nothing_is_due_while_no_card_is_being_reset() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    assert_eq!(rig.backend.next_deadline(), None);
    let guest = at_work(&mut rig, 1, NIC);
    assert_eq!(rig.backend.next_deadline(), None);
    leave(&mut rig, &guest);
    assert!(rig.backend.next_deadline().is_some());
    rig.settle();
    assert_eq!(rig.backend.next_deadline(), None);
}

/// The toolstack takes `state-N` 6 for "it is yours again", so it is written after the reset.
#[test]
fn a_detached_function_is_told_of_when_its_reset_has_ended() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(&mut rig);
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.settle();
    guest.set_front("state", "7");
    rig.deliver();
    assert_eq!((rig.state(NIC).as_str(), guest.back("state-0").as_deref()), ("resetting", Some("5")));
    guest.post(RawRequest { cmd: 0, size: 4, ..Default::default() });
    rig.deliver();
    assert_eq!(guest.reply().err, -1, "it is nobody's");
    guest.post(RawRequest { cmd: 0, size: 4, devfn: 8, ..Default::default() });
    rig.deliver();
    assert_eq!(guest.reply().value, 0x100e_8086, "the other one is there all the time");
    rig.pass(99 * MS);
    assert_eq!(guest.back("state-0").as_deref(), Some("5"));
    rig.pass(MS);
    assert_eq!((rig.state(NIC).as_str(), guest.back("state-0").as_deref()), ("ready", Some("6")));
}

/// A frontend that closed and opens again is held until its functions are reset, and then gets them.
#[test]
fn a_frontend_waits_in_init_wait_while_its_function_is_reset() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(&mut rig);
    guest.set_front("state", "6");
    rig.deliver();
    assert_eq!((guest.back("state").as_deref(), rig.state(NIC).as_str()), (Some("2"), "resetting"));
    rig.pass(99 * MS);
    assert_eq!(guest.back("state").as_deref(), Some("2"));
    rig.pass(MS);
    assert_eq!(guest.back("state").as_deref(), Some("3"));
    assert_eq!((rig.state(NIC).as_str(), rig.state(OTHER).as_str()), ("in-use", "in-use"));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));
}

/// A function that is wanted while it is being reset: the new guest waits for it, in InitWait.
#[test]
fn the_next_guest_waits_for_the_end_of_the_reset() {
    let mut rig = boot_with(Card::FULL);
    let first = at_work(&mut rig, 1, NIC);
    leave(&mut rig, &first);
    first.die(model::xen::Stage::Freed);
    rig.world.xen.create(2);
    let start = rig.world.now.get();
    let mut second = rig.attach(2, &[NIC]);
    assert_eq!(rig.world.now.get() - start, 100 * MS);
    assert_eq!((rig.state(NIC).as_str(), second.back("state").as_deref()), ("in-use", Some("3")));
    rig.world.assign(NIC.parse().unwrap(), 2);
    second.connect(&mut rig);
    assert_eq!(second.read(&mut rig, 0, 4, 2), Ok(0));
}

/// The same for a function that is plugged into a running guest: its frontend hears "reconfigured" after the reset.
#[test]
fn a_hot_plugged_function_is_there_when_its_reset_has_ended() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let first = at_work(&mut rig, 1, NIC);
    let mut second = rig.attach(2, &[OTHER]);
    second.connect(&mut rig);
    leave(&mut rig, &first);
    second.list(1, NIC);
    second.set_back("num_devs", "2");
    second.set_back("state", "7");
    rig.deliver();
    second.set_front("state", "7");
    rig.deliver();
    assert_eq!((second.back("state").as_deref(), second.back("vdev-1")), (Some("7"), None));
    second.post(RawRequest { cmd: 0, size: 4, ..Default::default() });
    rig.deliver();
    assert_eq!(second.reply().value, 0x100e_8086, "what it has works meanwhile");
    rig.pass(100 * MS);
    assert_eq!(second.back("state").as_deref(), Some("8"));
    assert_eq!((second.back("state-1").as_deref(), second.back("vdev-1")), (Some("3"), Some("0000:00:01.00".into())));
    second.set_front("state", "4");
    rig.settle();
    assert_eq!((second.back("state").as_deref(), second.read(&mut rig, 8, 0, 2)), (Some("4"), Ok(0x8086)));
    first.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "in-use");
}

/// The guest closes its connection, and is destroyed before the reset that follows has ended.
#[test]
fn a_guest_may_end_in_the_middle_of_a_reset() {
    for card in [Card::FULL, AF, PM] {
        for after in [0, 5, 10, 15, 50, 99] {
            let mut rig = boot_with(card);
            let before = image(&rig.hardware(NIC));
            let guest = at_work(&mut rig, 1, NIC);
            guest.enable_msix(&mut rig, &[0]).expect("a vector");
            guest.set_front("state", "5");
            rig.deliver();
            rig.pass(after * MS);
            guest.destroy(&mut rig);
            assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{card:?} after {after}");
            assert_eq!(differences(&image(&rig.hardware(NIC)), &before), [], "{card:?} after {after}");
            at_work(&mut rig, 2, NIC);
        }
    }
}

/// The end of a guest during the reset that its closing began does not begin another.
#[test]
fn a_reset_that_is_under_way_is_not_begun_again() {
    listen();
    for (card, resets) in [(Card::FULL, 1), (AF, 1), (PM, 1)] {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1, NIC);
        let first = rig.hardware(NIC).resets.get();
        rig.hardware(NIC).recovery.set((3_000 * MS, Silence::Ones));
        let start = rig.world.now.get();
        guest.set_front("state", "6");
        rig.deliver();
        rig.pass(if card.power == Some(false) { 5 * MS } else { 1_000 * MS });
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get() - first), ("ready", resets), "{card:?}");
        assert!(rig.world.now.get() - start < 3_200 * MS, "{card:?}");
    }
    assert!(!heard().iter().any(|line| line.starts_with("WARN")), "{:#?}", heard());
}

/// While a card that its guest still owns is being reset for good, the guest's requests find nothing.
#[test]
fn a_guest_reaches_nothing_of_a_card_that_is_being_reset() {
    let mut rig = boot_with(Card::FULL);
    let mut guest = at_work(&mut rig, 1, NIC);
    guest.set_front("state", "6");
    rig.deliver();
    rig.forget();
    // It comes back at once with a new page, while the backend still waits.
    guest.page = Rc::default();
    guest.page.flags.set(2);
    assert_eq!(rig.state(NIC), "resetting");
    assert_eq!(rig.backend.ports().count(), 0, "no connection while it waits");
    rig.settle();
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// A card that is gone at the end of its guest, and its function number with another guest's device: nobody else
/// notices.
#[test]
fn a_broken_card_does_not_keep_a_guest_from_its_other_card() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let guest = at_work(&mut rig, 1, NIC);
    rig.hardware(NIC).vanish();
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "broken");
    let mut next = rig.attach(2, &[NIC, OTHER]);
    next.connect(&mut rig);
    assert_eq!((next.back("state-0").as_deref(), next.back("state-1").as_deref()), (Some("6"), Some("3")));
    assert_eq!(next.read(&mut rig, 0, 0, 2), Ok(0x8086));
    // Mended while that guest runs: it is ready for whoever asks next.
    rig.hardware(NIC).come_back();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
}

/// A card that is gone when a guest is to get it: refused, with a reason, and had again when it is back.
#[test]
fn a_card_that_is_gone_when_it_is_wanted_is_refused() {
    for card in [Card::BARE, Card::MSI_ONLY, Card::PLAIN, Card::BOTH] {
        let mut rig = boot_in(two(card), TWO);
        rig.hardware(NIC).vanish();
        let mut guest = rig.attach(1, &[NIC, OTHER]);
        assert_eq!((guest.back("state-0").as_deref(), guest.back("state-1").as_deref()), (Some("6"), Some("3")));
        let reason = guest.back("error-0").expect("a reason");
        assert!(reason.contains("no device answers"), "{card:?}: {reason}");
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
        rig.hardware(NIC).come_back();
        assert_eq!(rig.state(NIC), "ready", "{card:?}");
        at_work(&mut rig, 2, NIC);
    }
}

/// A guest whose card broke when its connection closed gets it back when it is mended.
#[test]
fn a_card_that_broke_between_two_connections_comes_back_to_its_guest() {
    let mut rig = boot_with(Card::FULL);
    let mut guest = at_work(&mut rig, 1, NIC);
    rig.hardware(NIC).vanish();
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(rig.state(NIC), "broken");
    rig.hardware(NIC).come_back();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "in-use");
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// The guest connects again while one of its cards is broken: that card is not there, not even when it answers again.
#[test]
fn a_guest_reaches_nothing_of_a_broken_card() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(&mut rig);
    rig.hardware(NIC).vanish();
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.state(OTHER).as_str()), ("broken", "in-use"));
    rig.hardware(NIC).come_back();
    guest.connect(&mut rig);
    rig.forget();
    assert_eq!((guest.read(&mut rig, 0, 0, 4), guest.read(&mut rig, 8, 0, 2)), (Err(-1), Ok(0x8086)));
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), -1);
    assert_eq!((guest.enable_msi(&mut rig), guest.enable_msix(&mut rig, &[0])), (Err(-1), Err(-1)));
    assert_eq!(rig.acts(NIC), []);
}

/// Wishes that name nothing, or what is not broken, change nothing.
#[test]
fn a_retry_of_what_is_not_broken_changes_nothing() {
    let mut rig = boot_in(two(Card::FULL), TWO);
    let guest = at_work(&mut rig, 1, NIC);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    rig.forget();
    for wish in [NIC, OTHER, "0000:07:00.0", "rubbish"] {
        rig.world.retry(wish);
        rig.settle();
        assert_eq!(rig.world.get("data/pciback/retry").as_deref(), Some(""), "{wish}");
    }
    assert_eq!((rig.state(NIC).as_str(), rig.state(OTHER).as_str()), ("in-use", "ready"));
    assert!(rig.acts(NIC).is_empty() && rig.acts(OTHER).is_empty());
    assert_eq!(rig.world.xen.interrupts(), 1);
}

// Case 36: QubesOS issues 4853, 3262 and more: a function with nothing to be reset with. Without strict it is
// exposed, and silenced as far as registers go.
#[test]
fn case_36_a_function_without_a_reset_is_silenced() {
    let mut rig = boot_in(two(Card { power: Some(true), ..Card::BOTH }), ONE);
    assert_eq!(rig.published(NIC, "reset").as_deref(), Some("dom0"));
    let guest = at_work(&mut rig, 1, NIC);
    guest.enable_msi(&mut rig).expect("a vector");
    guest.destroy(&mut rig);
    let card = rig.hardware(NIC);
    assert_eq!(card.word(at::COMMAND), 0x0403, "no bus mastering, no pin");
    assert_eq!((card.word(at::MSI_CONTROL) & 1, card.word(at::MSIX_CONTROL)), (0, 0x0004));
    assert_eq!(rig.state(NIC), "ready");
}

/// A guest may put its card to sleep, and end. In D3hot a card answers to configuration accesses only: it is woken
/// before Xen has to reach its table, and the next guest finds it awake.
#[test]
fn a_card_that_was_left_asleep_is_woken_first() {
    let without = Card { power: Some(true), ..Card::BOTH };
    for card in [Card::FULL, PM, without, Card { power: Some(false), ..AF }] {
        for msix in [true, false] {
            let mut rig = boot_with(card);
            let guest = at_work(&mut rig, 1, NIC);
            if msix {
                let vectors = guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
                vectors.iter().for_each(|pirq| guest.bind(*pirq));
            }
            assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
            guest.destroy(&mut rig);
            assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
            assert_eq!(rig.hardware(NIC).word(at::PMCSR) & 3, 0, "{card:?}");
            assert_eq!(rig.hardware(NIC).unanswered.get(), 0, "{card:?}: Xen always reached the table");
            let next = at_work(&mut rig, 2, NIC);
            let vectors = next.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
            vectors.iter().for_each(|pirq| next.bind(*pirq));
            assert!(rig.hardware(NIC).delivers(0) && rig.hardware(NIC).delivers(1), "{card:?}");
        }
    }
}

/// The driver domain died in the middle of a reset and started again: the card has lost its addresses. dom0 gives them
/// back and asks for another try, which must not put back what was found at the start.
#[test]
fn a_card_that_was_found_without_its_addresses_is_taken_as_dom0_mends_it() {
    let world = World::with(Flavour::Owner);
    let card = world.plug(NIC, Card::FULL.build());
    let whole = card.bytes.borrow().clone();
    card.reset(0, (0, Silence::Ones));
    let mut rig = boot_in(world, ONE);
    assert!(rig.reason(NIC).contains("-ENXIO"), "{}", rig.reason(NIC));
    card.bytes.borrow_mut().copy_from_slice(&whole);
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready", "{:?}", rig.published(NIC, "reason"));
    let mut changed = differences(&card.bytes.borrow(), &whole);
    changed.retain(|(register, ..)| *register != usize::from(at::COMMAND) + 1);
    assert_eq!(changed, []);
    let guest = at_work(&mut rig, 1, NIC);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    guest.destroy(&mut rig);
    // From then on the image is what counts, whatever the card has become.
    card.set_word(0x10, 0);
    rig.world.retry(NIC);
    rig.settle();
    let guest = at_work(&mut rig, 2, NIC);
    guest.destroy(&mut rig);
    assert_eq!(card.word(0x12), 0xfebc);
}

/// A card that does not hear when it is woken is woken again, and never offered asleep.
#[test]
fn a_card_that_does_not_wake_up_is_not_offered() {
    let mut rig = boot_with(PM);
    let guest = at_work(&mut rig, 1, NIC);
    leave(&mut rig, &guest);
    assert_eq!(rig.hardware(NIC).word(at::PMCSR) & 3, 3, "on its way through D3hot");
    rig.hardware(NIC).vanish();
    rig.pass(1_000 * MS);
    rig.hardware(NIC).come_back();
    assert_eq!(rig.hardware(NIC).word(at::PMCSR) & 3, 3);
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).word(at::PMCSR) & 3), ("ready", 0));

    let guest = at_work(&mut rig, 2, NIC);
    rig.hardware(NIC).set_word(at::PMCSR, 3);
    rig.hardware(NIC).lock(usize::from(at::PMCSR)..usize::from(at::PMCSR) + 1);
    let start = rig.world.now.get();
    guest.destroy(&mut rig);
    assert!(rig.reason(NIC).contains("D3"), "{}", rig.reason(NIC));
    assert!(rig.world.now.get() - start < 62_000 * MS);
}

/// A card whose reset is none keeps working for its former guest. That cannot be mended from here, but told.
#[test]
fn a_reset_that_changes_nothing_is_told_once_and_is_none_for_strict() {
    for (card, method) in [(Card::FULL, "flr"), (AF, "af"), (PM, "pm")] {
        let doubt = format!("its reset ({method}) changes nothing");
        for (unresettable, times) in [(false, 0), (true, 1)] {
            listen();
            let world: Rc<World> = Rc::default();
            world.plug(NIC, card.build()).unresettable.set(unresettable);
            let mut rig = boot_in(world, ONE);
            for id in 1..4 {
                assert_eq!(rig.state(NIC), "ready");
                let mut guest = rig.attach(id, &[NIC]);
                guest.connect(&mut rig);
                guest.enable(&mut rig);
                guest.destroy(&mut rig);
            }
            let told = heard().iter().filter(|line| line.contains(&doubt)).count();
            assert_eq!(told, times, "{method}: {:#?}", heard());
        }
        let world: Rc<World> = Rc::default();
        let hardware = world.plug(NIC, card.build());
        hardware.unresettable.set(true);
        let mut rig = boot_in(world, &format!("{ONE},strict"));
        assert!(rig.reason(NIC).contains(&doubt) && rig.reason(NIC).contains("reset=bus"), "{}", rig.reason(NIC));
        hardware.unresettable.set(false);
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{method}");
    }
}

/// Nothing can be said of a card without addresses, nor where the reset is not its own.
#[test]
fn only_a_reset_that_shows_is_doubted() {
    for options in ["", ",reset=bus", ",reset=none"] {
        listen();
        let world: Rc<World> = Rc::default();
        let hardware = world.plug(NIC, Card { power: Some(false), msix: 0, ..Card::PLAIN }.build());
        hardware.unresettable.set(true);
        if options.is_empty() {
            hardware.lock(0x10..0x28);
            hardware.bytes.borrow_mut()[0x10..0x28].fill(0);
        }
        let rig = boot_in(world, &format!("{ONE}{options}"));
        assert_eq!(rig.state(NIC), "ready", "{options}");
        assert!(!heard().iter().any(|line| line.contains("changes nothing")), "{options}: {:#?}", heard());
    }
}
