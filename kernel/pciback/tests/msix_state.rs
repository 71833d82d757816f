//! Xen's memory of a function's MSI-X state, from the end of one guest to the start of the next: the seed of this
//! project ("xen: xen-pciback: Reset MSI-X state when exposing a device", xen-devel, December 2018).

use crate::model;

use model::hardware::{ENABLE, MASKALL, MEMORY, MS, at, differences};
use model::xen::errno::{EBUSY, ENXIO};
use model::xen::{Act, Call, Flavour, Stage};
use model::{Card, Guest, NIC, ONE, Rig, TWO, World, boot_in, boot_with};
use pciback::physdev::Vector;
use pciback::platform::Width;
use pciback::sbdf::Sbdf;

/// Cards with MSI-X, by the way they are reset.
const CARDS: [Card; 4] = [
    Card::PLAIN,
    Card::FULL,
    Card { advanced: true, ..Card::PLAIN },
    Card { power: Some(false), msi: Card::FULL.msi, ..Card::PLAIN },
];

fn nic() -> Sbdf {
    NIC.parse().unwrap()
}

/// A guest whose driver uses three vectors.
fn at_work(rig: &mut Rig, id: u16) -> Guest {
    let mut guest = rig.attach(id, &[NIC]);
    guest.connect(rig);
    guest.enable(rig);
    let vectors = guest.enable_msix(rig, &[0, 1, 2]).expect("three vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    guest
}

/// Which of the three vectors become interrupts.
fn delivered(rig: &Rig) -> [bool; 3] {
    [0, 1, 2].map(|entry| rig.hardware(NIC).delivers(entry))
}

/// Message Control of the card.
fn control(rig: &Rig) -> u16 {
    rig.hardware(NIC).word(at::MSIX_CONTROL)
}

/// A guest that uses its vectors while memory decode is turned off from dom0 (`setpci COMMAND=0`), and ends: Xen
/// must mask and cannot reach the table.
fn stale(rig: &mut Rig, id: u16) {
    let guest = at_work(rig, id);
    assert_eq!(delivered(rig), [true; 3]);
    rig.hardware(NIC).set_word(at::COMMAND, 0);
    guest.die(Stage::ChannelsClosed);
    assert!(rig.world.xen.host_maskall(nic()), "the state that this is about");
    guest.destroy(rig);
}

/// Steps on the bare model, as Linux's pciback makes them: prepare, assign, and three vectors in use.
fn without_backend() -> std::rc::Rc<World> {
    let world = World::with(Flavour::Owner);
    world.plug(NIC, Card::PLAIN.build());
    let xen = &world.xen;
    xen.create(1);
    xen.prepare_msix(nic()).unwrap();
    xen.assign(nic(), 1).unwrap();
    let write = |value: u16| xen.config_write(nic(), at::MSIX_CONTROL, Width::Word, value.into());
    write(ENABLE | MASKALL | 4);
    for entry in 0..3 {
        let vector = Vector::Msix { entry, table_base: model::hardware::BAR0.into() };
        let pirq = xen.map(1, nic(), vector).unwrap();
        xen.bind(1, pirq).unwrap();
    }
    write(ENABLE | 4);
    world
}

/// Measured on Xen 4.17 and 4.20 with Linux's pciback and an e1000e: "cannot mask IRQ: masking MSI-X", Message
/// Control stays 4004, and the next assignment fails with -16.
#[test]
fn the_model_shows_what_was_measured_on_xen() {
    let world = without_backend();
    let card = world.hardware.borrow()[&nic()].clone();
    assert_eq!(card.word(at::MSIX_CONTROL), 0x8004);
    card.set_word(at::COMMAND, 0);
    world.xen.kill(1, Stage::Freed);
    card.set_word(at::COMMAND, 0x0403);
    world.xen.config_write(nic(), at::MSIX_CONTROL, Width::Word, 0x0004);
    assert_eq!(card.word(at::MSIX_CONTROL), 0x4004);
    world.xen.create(2);
    assert_eq!(world.xen.assign(nic(), 2), Err(EBUSY));
}

/// Measured too: with memory decode on nothing of the kind happens.
#[test]
fn the_model_masks_vectors_in_the_table_where_it_can_reach_it() {
    let world = without_backend();
    world.xen.kill(1, Stage::Freed);
    let card = world.hardware.borrow()[&nic()].clone();
    assert_eq!(card.word(at::MSIX_CONTROL), 0x8004, "who turned it on turns it off");
    assert!(!world.xen.host_maskall(nic()));
    assert!(card.table.borrow().iter().all(|entry| entry.masked));
    assert_eq!(card.unanswered.get(), 0);
}

/// The patch of 2018 wrote back the value it had read. On a device that is not reset in between (no FLR) that value
/// has MASKALL set, and Xen takes it for the guest's own wish, which outlives release and prepare. Measured: 4004
/// stays. Written clear, the same calls leave 0004.
#[test]
fn maskall_must_be_written_clear_before_xen_is_asked_to_forget() {
    for (as_the_patch, left) in [(true, 0x4004), (false, 0x0004)] {
        let world = without_backend();
        let card = world.hardware.borrow()[&nic()].clone();
        card.set_word(at::COMMAND, 0);
        world.xen.kill(1, Stage::Freed);
        card.set_word(at::COMMAND, 0x0403);
        let write = |value: u16| world.xen.config_write(nic(), at::MSIX_CONTROL, Width::Word, value.into());
        write(0x0004);
        assert_eq!(card.word(at::MSIX_CONTROL), 0x4004);
        if as_the_patch {
            write(card.word(at::MSIX_CONTROL));
        }
        world.xen.release_msix(nic()).unwrap();
        world.xen.prepare_msix(nic()).unwrap();
        assert_eq!(card.word(at::MSIX_CONTROL), left);
    }
}

// Case 1: xen-devel, December 2018 to January 2020: no MSI-X interrupt arrives after the guest's reboot.
#[test]
fn case_1_the_next_guest_gets_the_card_with_interrupts_that_arrive() {
    for card in CARDS {
        let mut rig = boot_with(card);
        for id in 1..5 {
            stale(&mut rig, id);
            assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
            assert_eq!(control(&rig), 0x0004, "{card:?}");
            assert!(!rig.world.xen.host_maskall(nic()) && !rig.world.xen.guest_maskall(nic()), "{card:?}");
        }
        assert_eq!(rig.published(NIC, "msix").as_deref(), Some("5 entries, stale state reset 4 times"), "{card:?}");
        at_work(&mut rig, 9);
        assert_eq!(delivered(&rig), [true; 3], "{card:?}");
    }
}

// Case 1: one release and one prepare, after a write that has Xen apply what it remembers; none where it remembers
// nothing.
#[test]
fn case_1_xen_is_made_to_forget_once_and_only_where_it_remembers() {
    for (stale, calls) in [(true, &[Act::Release, Act::Prepare][..]), (false, &[])] {
        let mut rig = boot_with(Card::PLAIN);
        rig.world.xen.create(2);
        let guest = rig.attach(2, &[]);
        guest.list(0, NIC);
        if stale {
            rig.world.xen.set_host_maskall(nic());
        }
        rig.forget();
        guest.set_back("num_devs", "1");
        guest.set_back("state", "7");
        rig.settle();
        assert_eq!(rig.state(NIC), "in-use");
        let clear = Act::Write(at::MSIX_CONTROL, 0x0004);
        let acts: Vec<Act> = rig.acts(NIC);
        let asked: Vec<Act> = acts.iter().copied().filter(|act| *act != clear).collect();
        assert_eq!(asked, calls, "stale {stale}");
        assert_eq!(acts.first(), Some(&clear), "stale {stale}: with a write Xen applies what it remembers");
        assert_eq!(acts.last(), Some(&clear), "stale {stale}: and that it has forgotten shows in another");
        assert_eq!(control(&rig), 0x0004);
    }
}

// Case 2: the same thread, December 2018 and September 2019: the owner died without shutting down, its vectors are
// still mapped, and the reset comes before they are unmapped.
#[test]
fn case_2_vectors_are_unmapped_before_the_card_is_reset() {
    for card in CARDS {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1);
        rig.forget();
        guest.destroy(&mut rig);
        let acts = rig.acts(NIC);
        let place = |what: &dyn Fn(&Act) -> bool| acts.iter().position(what);
        let last = |what: &dyn Fn(&Act) -> bool| acts.iter().rposition(what);
        let unmap = |act: &Act| matches!(act, Act::Unmap(1, _));
        assert_eq!(acts.iter().filter(|act| unmap(act)).count(), 3, "{card:?}");
        // Bus mastering goes off before all, and decoding never does by our hand.
        let command = |act: &Act| matches!(act, Act::Write(at::COMMAND, _));
        assert_eq!(place(&command), Some(0), "{card:?}: {acts:?}");
        let reset = |act: &Act| match act {
            Act::Write(at::DEVICE_CONTROL, value) => value & 0x8000 != 0,
            Act::Write(at::PMCSR, value) => value & 3 == 3,
            Act::Write(register, value) => *register == at::ADVANCED + 4 && value & 1 != 0,
            _ => false,
        };
        // What a reset has turned off may be written as it is.
        let decodes = |act: &Act| !matches!(act, Act::Write(at::COMMAND, value) if value & u32::from(MEMORY) == 0);
        let before = place(&reset).unwrap_or(acts.len());
        assert!(acts[..before].iter().all(decodes), "{card:?}: {acts:?}");
        if card.express.is_some() || card.advanced || card.power.is_some() {
            assert!(last(&unmap) < place(&reset), "{card:?}: {acts:?}");
            assert_eq!(rig.hardware(NIC).resets.get(), 2, "{card:?}: at start, and now");
        }
        let renew = |act: &Act| matches!(act, Act::Release | Act::Prepare);
        assert_eq!(place(&renew), None, "{card:?}: nothing was stale");
        assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{card:?}");
        assert_eq!(rig.hardware(NIC).unanswered.get(), 0, "{card:?}: Xen always reached the table");
    }
}

// Case 13: Xen's commit "x86/MSI-X: be more careful during teardown": on PCI Express an access to the table of a
// function that does not decode is an error that may end the host.
#[test]
fn case_13_nobody_touches_the_table_while_the_card_does_not_decode() {
    for card in CARDS {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1);
        guest.disable_msix(&mut rig);
        guest.enable_msix(&mut rig, &[3]).expect("a vector");
        guest.destroy(&mut rig);
        let guest = at_work(&mut rig, 2);
        rig.hardware(NIC).set_word(at::COMMAND, 0);
        guest.destroy(&mut rig);
        at_work(&mut rig, 3);
        assert_eq!(rig.hardware(NIC).unanswered.get(), 0, "{card:?}");
    }
}

/// With MASKALL set before it unmaps, Xen has nothing to mask and so nothing to remember.
#[test]
fn the_ends_that_go_through_this_domain_first_leave_nothing_stale() {
    for card in CARDS {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1);
        rig.hardware(NIC).set_word(at::COMMAND, 0);
        rig.forget();
        guest.destroy(&mut rig);
        assert_eq!(rig.state(NIC), "ready", "{card:?}");
        assert!(!rig.acts(NIC).contains(&Act::Release), "{card:?}");
        assert_eq!(rig.published(NIC, "msix").as_deref(), Some("5 entries"), "{card:?}");
    }
}

/// A domain's end is many steps; xenstore may tell of it at any of them, and memory decode may be off or on.
#[test]
fn a_guest_may_be_found_dead_at_any_stage_of_its_end() {
    let stages = [Stage::Alive, Stage::Dying, Stage::ChannelsClosed, Stage::Deassigned, Stage::Unlisted, Stage::Freed];
    for card in CARDS {
        for found in stages {
            // The rest of its end comes at once, in the middle of a reset, or when all is done.
            for rest in [0, 50 * MS, 200 * MS] {
                for decodes in [true, false] {
                    let case = format!("{card:?}: found {found:?}, the rest after {rest} ns, decoding {decodes}");
                    let mut rig = boot_with(card);
                    let guest = at_work(&mut rig, 1);
                    if !decodes {
                        rig.hardware(NIC).set_word(at::COMMAND, 0);
                    }
                    guest.die(found);
                    guest.leave();
                    rig.pass(rest);
                    rig.check();
                    guest.die(Stage::Freed);
                    rig.settle();
                    assert_eq!(rig.state(NIC), "ready", "{case}: {:?}", rig.published(NIC, "reason"));
                    assert_eq!(rig.world.xen.interrupts(), 0, "{case}");
                    assert_eq!(rig.hardware(NIC).unanswered.get(), 0, "{case}: Xen always reached the table");
                    let next = at_work(&mut rig, 2);
                    assert_eq!(delivered(&rig), [true; 3], "{case}");
                    next.destroy(&mut rig);
                    assert_eq!(rig.state(NIC), "ready", "{case}");
                }
            }
        }
    }
}

/// Two tries of the same thing: unmap answers -EINVAL where Xen unmapped before, -ESRCH where the guest is gone.
// Also case 47: QubesOS vmm-xen PR 113, the unmap of an interrupt that was unmapped before fails the detach.
#[test]
fn what_xen_unmapped_before_is_no_error() {
    model::logs::listen();
    for stage in [Stage::Freed, Stage::Deassigned] {
        let mut rig = boot_with(Card::FULL);
        let guest = at_work(&mut rig, 1);
        guest.die(stage);
        if stage == Stage::Deassigned {
            for pirq in rig.world.xen.pirqs(1) {
                rig.world.as_dom0(|xen| xen.unmap(1, pirq)).expect("mapped until now");
            }
        }
        rig.forget();
        guest.destroy(&mut rig);
        assert_eq!(rig.state(NIC), "ready");
        let done = rig.world.xen.done.borrow();
        let unmaps = done.iter().filter(|done| matches!(done.act, Act::Unmap(..)));
        let answers: Vec<_> = unmaps.map(|done| done.answer).collect();
        assert_eq!(answers, [Err(if stage == Stage::Freed { 3 } else { 22 }); 3]);
    }
    let loud = |line: &String| line.starts_with("WARN") || line.starts_with("ERROR");
    assert!(!model::logs::heard().iter().any(loud), "{:#?}", model::logs::heard());
}

/// What Xen refuses to unmap is asked for again, and the card is not reset before.
#[test]
fn a_refused_unmap_is_tried_again_and_the_reset_waits() {
    let mut rig = boot_with(Card::FULL);
    let guest = at_work(&mut rig, 1);
    rig.world.xen.fail_for(Call::Unmap, 300 * MS, EBUSY);
    rig.forget();
    guest.leave();
    rig.pass(250 * MS);
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("resetting", 1));
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 4, 0, "bus mastering is off all the while");
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 2));
    assert_eq!(rig.world.xen.interrupts(), 0);
}

#[test]
fn an_unmap_that_is_always_refused_leaves_the_card_broken_until_it_is_mended() {
    let mut rig = boot_with(Card::FULL);
    let guest = at_work(&mut rig, 1);
    rig.world.xen.fail_for(Call::Unmap, u64::from(u32::MAX) * MS, EBUSY);
    guest.leave();
    rig.settle();
    assert!(rig.reason(NIC).contains("unmap_pirq answered -EBUSY (-16)"), "{}", rig.reason(NIC));
    assert_eq!(rig.hardware(NIC).resets.get(), 1, "it was not reset with vectors mapped");
    rig.world.xen.heal();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0));
    assert_eq!(rig.world.get("data/pciback/retry").as_deref(), Some(""), "the wish was seen");
}

// Case 2: release_msix answers busy while a vector is mapped: tried again, and not offered before.
#[test]
fn case_2_a_busy_release_is_waited_for() {
    for gone in [true, false] {
        let mut rig = boot_with(Card::PLAIN);
        rig.world.xen.fail_for(Call::Release, 4_000 * MS, EBUSY);
        if gone {
            stale_without_settling(&mut rig, 1);
        } else {
            // Every vector is unmapped, and still it is busy.
            let guest = at_work(&mut rig, 1);
            rig.world.xen.set_host_maskall(nic());
            guest.leave();
            rig.deliver();
            assert_eq!(rig.world.xen.interrupts(), 0);
        }
        rig.pass(3_900 * MS);
        assert_eq!(rig.state(NIC), "resetting", "gone {gone}");
        rig.pass(200 * MS);
        assert_eq!((rig.state(NIC).as_str(), control(&rig)), ("ready", 0x0004), "gone {gone}");
        rig.world.xen.kill(1, Stage::Freed);
        at_work(&mut rig, 2);
        assert_eq!(delivered(&rig), [true; 3], "gone {gone}");
    }
}

/// [`stale`] up to the moment at which the folder goes.
fn stale_without_settling(rig: &mut Rig, id: u16) {
    let guest = at_work(rig, id);
    rig.hardware(NIC).set_word(at::COMMAND, 0);
    guest.die(Stage::Freed);
    guest.leave();
    rig.deliver();
}

// Case 2: one that never passes: broken, with Xen's word for it, and dom0 can have it tried again.
#[test]
fn case_2_a_release_that_stays_busy_breaks_the_card_until_dom0_asks_again() {
    let mut rig = boot_with(Card::PLAIN);
    rig.world.xen.fail_for(Call::Release, u64::from(u32::MAX) * MS, EBUSY);
    stale_without_settling(&mut rig, 1);
    let start = rig.world.now.get();
    rig.settle();
    let took = rig.world.now.get() - start;
    assert!((5_000 * MS..15_000 * MS).contains(&took), "{took}");
    assert!(rig.reason(NIC).contains("release_msix answered -EBUSY (-16)"), "{}", rig.reason(NIC));
    let refused = rig.attach(2, &[NIC]);
    assert_eq!(refused.back("state-0").as_deref(), Some("6"));
    assert!(refused.back("error-0").expect("a reason").contains("-EBUSY"));
    refused.destroy(&mut rig);

    // As long as it is busy, a retry finds the same.
    rig.world.retry(NIC);
    rig.settle();
    assert!(rig.reason(NIC).contains("-EBUSY"), "{}", rig.reason(NIC));
    rig.world.xen.heal();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
    at_work(&mut rig, 3);
    assert_eq!(delivered(&rig), [true; 3]);
}

/// Other answers do not pass by waiting.
#[test]
fn a_release_or_prepare_that_fails_breaks_the_card_at_once_with_xens_word_for_it() {
    for (call, errno, told) in [
        (Call::Release, 1, "release_msix answered -EPERM (-1)"),
        (Call::Prepare, ENXIO, "prepare_msix answered -ENXIO (-6)"),
        (Call::Prepare, 12, "prepare_msix answered -ENOMEM (-12)"),
        (Call::Prepare, 19, "prepare_msix answered -ENODEV (-19)"),
    ] {
        let mut rig = boot_with(Card::PLAIN);
        rig.world.xen.fail(call, 0..u64::MAX, errno);
        stale_without_settling(&mut rig, 1);
        rig.settle();
        assert!(rig.reason(NIC).contains(told), "{}", rig.reason(NIC));
        rig.world.xen.heal();
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{told}: {:?}", rig.published(NIC, "reason"));
        at_work(&mut rig, 2);
        assert_eq!(delivered(&rig), [true; 3], "{told}");
    }
}

/// Xen cannot read where the table is while memory decode is off: told with the way to turn it on. Xen remembers a
/// MASKALL of this, too.
// Also case 40: the SN570 drive after a failed reset, xen-devel, July 2022.
#[test]
fn a_card_without_memory_decode_at_start_is_broken_with_the_remedy() {
    let world = World::with(Flavour::Owner);
    let card = world.plug(NIC, Card::PLAIN.build());
    card.set_word(at::COMMAND, 0);
    let mut rig = boot_in(world, TWO);
    assert!(rig.reason(NIC).contains("-ENXIO (-6)") && rig.reason(NIC).contains("xl-pciback assignable-add"));
    assert!(rig.world.xen.host_maskall(nic()), "Xen remembers it");
    assert_eq!(rig.published(model::OTHER, "state").as_deref(), Some("ready"));
    card.set_word(at::COMMAND, MEMORY);
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), control(&rig)), ("ready", 0x0004));
    at_work(&mut rig, 1);
    assert_eq!(delivered(&rig), [true; 3]);
}

// Case 3: xen-devel, November 2022: MASKALL is found set before any guest ran; on standby power a card keeps it
// over a reboot of the host.
#[test]
fn case_3_maskall_from_before_the_host_started_is_cleared() {
    for card in CARDS {
        for left in [MASKALL | 4, ENABLE | MASKALL | 4, ENABLE | 4] {
            let world = World::with(Flavour::Owner);
            world.plug(NIC, card.build()).set_word(at::MSIX_CONTROL, left);
            let mut rig = boot_in(world, ONE);
            assert_eq!((rig.state(NIC).as_str(), control(&rig)), ("ready", 0x0004), "{card:?}, {left:#x}");
            let mut guest = rig.attach(1, &[NIC]);
            guest.connect(&mut rig);
            guest.enable_msix(&mut rig, &[0]).expect("a vector");
            assert_eq!(control(&rig), 0x8004, "{card:?}, {left:#x}");
        }
    }
}

/// Something keeps MASKALL set whatever is done: the card is not offered, and Message Control is told.
#[test]
fn a_maskall_that_stays_set_breaks_the_card_and_is_shown() {
    let world = World::with(Flavour::Owner);
    let card = world.plug(NIC, Card::PLAIN.build());
    card.set_word(at::MSIX_CONTROL, MASKALL | 4);
    card.lock(usize::from(at::MSIX_CONTROL)..usize::from(at::MSIX_CONTROL) + 2);
    let mut rig = boot_in(world, ONE);
    assert!(rig.reason(NIC).contains("Message Control reads 4004"), "{}", rig.reason(NIC));
    assert_eq!(rig.attach(1, &[NIC]).back("state-0").as_deref(), Some("6"));
}

/// The driver domain crashed, its guest is gone, and Xen still has the table under its protection.
#[test]
fn a_driver_domain_that_starts_again_takes_over_what_it_left_behind() {
    for card in CARDS {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1);
        let world = rig.world.clone();
        drop(rig);
        guest.die(Stage::Freed);
        guest.leave();
        world.remove("backend/pci/1");
        world.xen.done.borrow_mut().clear();
        world.watches.borrow_mut().clear();
        world.events.borrow_mut().clear();
        rig = boot_in(world, ONE);
        assert_eq!((rig.state(NIC).as_str(), control(&rig)), ("ready", 0x0004), "{card:?}");
        // In delegated mode, after its own call was refused.
        let first = usize::from(model::delegated());
        assert_eq!(rig.acts(NIC)[first..][..3], [Act::Prepare, Act::Release, Act::Prepare], "{card:?}");
        at_work(&mut rig, 2);
        assert_eq!(delivered(&rig), [true; 3], "{card:?}");
    }
}

/// The driver domain crashed and its guest lives: its card goes on working, and nothing of it is touched.
#[test]
fn a_card_whose_guest_outlived_the_driver_domain_is_left_alone() {
    if model::delegated() {
        // dom0 knows what is mapped, and takes the card from the guest first: see delegated.rs.
        return;
    }
    for card in CARDS {
        let mut rig = boot_with(card);
        let guest = at_work(&mut rig, 1);
        let bytes = rig.hardware(NIC).bytes.borrow().clone();
        rig.forget();
        rig = rig.crash_and_boot(ONE);
        assert!(rig.reason(NIC).contains("release_msix answered -EBUSY (-16)"), "{card:?}: {}", rig.reason(NIC));
        assert!(rig.hardware(NIC).writes.borrow().is_empty(), "{card:?}: {:?}", rig.hardware(NIC).writes.borrow());
        assert_eq!(differences(&rig.hardware(NIC).bytes.borrow(), &bytes), [], "{card:?}");
        assert_eq!((delivered(&rig), rig.world.xen.pirqs(1).len()), ([true; 3], 3), "{card:?}");
        // A retry while it lives changes nothing either, whatever Xen answers.
        for errno in [0, 1, 12, 19] {
            if errno != 0 {
                rig.world.xen.fail(Call::Prepare, 0..1, errno);
            }
            rig.world.retry(NIC);
            rig.settle();
            assert_eq!(rig.state(NIC), "broken", "{card:?}, -{errno}");
            assert!(rig.hardware(NIC).writes.borrow().is_empty(), "{card:?}, -{errno}");
        }
        guest.destroy(&mut rig);
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{card:?}");
        at_work(&mut rig, 2);
        assert_eq!(delivered(&rig), [true; 3], "{card:?}");
    }
}

/// The same with MSI, of which Xen keeps no count that could be asked for: the enable bit in the card tells. Xen
/// clears it when it takes the vector back.
#[test]
fn a_card_with_msi_on_whose_guest_outlived_the_driver_domain_is_left_alone() {
    if model::delegated() {
        // dom0 knows what is mapped, and takes the card from the guest first: see delegated.rs.
        return;
    }
    for card in [Card::MSI_ONLY, Card::MSI_SIMPLE, Card::BOTH, Card::FULL] {
        let mut rig = boot_with(card);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        guest.enable(&mut rig);
        let pirq = guest.enable_msi(&mut rig).expect("a vector");
        guest.bind(pirq);
        let bytes = rig.hardware(NIC).bytes.borrow().clone();
        rig.forget();
        rig = rig.crash_and_boot(ONE);
        assert!(rig.reason(NIC).contains("MSI"), "{card:?}: {}", rig.reason(NIC));
        assert!(rig.hardware(NIC).writes.borrow().is_empty(), "{card:?}: {:x?}", rig.hardware(NIC).writes.borrow());
        assert_eq!(differences(&rig.hardware(NIC).bytes.borrow(), &bytes), [], "{card:?}");
        assert!(rig.hardware(NIC).delivers_msi(0), "{card:?}");
        rig.world.retry(NIC);
        rig.settle();
        assert!(rig.hardware(NIC).writes.borrow().is_empty(), "{card:?}");
        guest.destroy(&mut rig);
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{card:?}");
        let mut next = rig.attach(2, &[NIC]);
        next.connect(&mut rig);
        next.enable(&mut rig);
        let pirq = next.enable_msi(&mut rig).expect("a vector");
        next.bind(pirq);
        assert!(rig.hardware(NIC).delivers_msi(0), "{card:?}");
    }
}

/// The end of the driver domain itself, in order: nothing stays mapped, and Xen gets the table back.
#[test]
fn a_shutdown_unmaps_and_gives_the_table_back() {
    let mut rig = boot_with(Card::FULL);
    let _guest = at_work(&mut rig, 1);
    rig.backend.shutdown();
    assert_eq!((rig.world.xen.interrupts(), rig.world.xen.prepared(nic()), control(&rig)), (0, false, 0x0004));
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 4, 0, "bus mastering is off");
}

// Case 61: XSA-360, xcp-ng issue 470: vectors leaked with each reboot of a guest until other guests' devices
// stopped.
#[test]
fn case_61_a_guest_that_reboots_again_and_again_leaks_no_vector() {
    let world = World::with(Flavour::Owner);
    world.plug(NIC, Card::FULL.build());
    world.plug(model::OTHER, Card { msix: 16, ..Card::FULL }.build());
    let mut rig = boot_in(world, TWO);
    let mut other = rig.attach(500, &[model::OTHER]);
    other.connect(&mut rig);
    other.enable(&mut rig);
    let vectors = other.enable_msix(&mut rig, &[0, 1, 2, 3]).expect("four vectors");
    vectors.iter().for_each(|pirq| other.bind(*pirq));
    for id in 1..51 {
        let guest = at_work(&mut rig, id);
        assert_eq!(delivered(&rig), [true; 3], "boot {id}");
        if id % 2 == 0 {
            guest.disable_msi(&mut rig);
        }
        if id % 3 == 0 {
            guest.die(Stage::Freed);
        }
        guest.destroy(&mut rig);
        assert_eq!(rig.world.xen.interrupts(), 4, "boot {id}");
    }
    assert_eq!(rig.world.xen.pirqs(500).len(), 4);
    assert!((0..4).all(|entry| rig.hardware(model::OTHER).delivers(entry)), "another guest's vectors are untouched");
}
