//! A guest that does not play by the rules: it must get errors, and nobody else may notice.

use crate::model;

use std::cell::Cell;

use model::hardware::{MS, differences};
use model::xen::Flavour;
use model::{Card, NIC, ONE, OTHER, TWO, World, boot, boot_in};
use pciback::wire::{PCIF_ACTIVE, RawRequest, op};

/// XSA-155: the request is read once; what the guest changes afterwards has no effect.
#[test]
fn a_request_changed_while_it_is_carried_out_has_no_effect() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.hardware(NIC).writes.borrow_mut().clear();
    *guest.page.during.borrow_mut() = Some(Box::new(|page| {
        page.request.set(RawRequest { cmd: 1, offset: 4, size: 2, value: 0, ..Default::default() });
    }));
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert_eq!(guest.page.request_reads.get(), 1);
    assert!(rig.hardware(NIC).writes.borrow().is_empty());
}

/// pcifront gives up after two seconds and takes the request back: a late answer must not reach the
/// next request.
#[test]
fn a_late_answer_does_not_touch_the_page() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    *guest.page.during.borrow_mut() = Some(Box::new(|page| page.flags.set(page.flags.get() & !PCIF_ACTIVE)));
    guest.page.flags.set(PCIF_ACTIVE | 2);
    let port = rig.world.local.borrow()[&(1, guest.ring.1)];
    rig.world.pending.borrow_mut().insert(port);
    rig.settle();
    assert_eq!(guest.page.reply.take(), None);
    assert!(rig.world.notified.borrow().is_empty());
    *guest.page.during.borrow_mut() = None;
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// XSA-332 and plain greed: a guest that always has a request ready gets its turn and no more.
#[test]
fn a_guest_that_never_stops_asking_does_not_starve_the_others() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut greedy = rig.attach(1, &[NIC]);
    greedy.connect(&mut rig);
    let mut modest = rig.attach(2, &["0000:02:00.0"]);
    modest.connect(&mut rig);
    greedy.page.request.set(RawRequest { size: 4, ..Default::default() });
    greedy.page.flags.set(PCIF_ACTIVE | 2);
    // Each answer meets the next request: the flag is set again at once.
    *greedy.page.after.borrow_mut() = Some(Box::new(|page| page.flags.set(PCIF_ACTIVE | 2)));
    modest.page.request.set(RawRequest { size: 4, ..Default::default() });
    modest.page.flags.set(PCIF_ACTIVE | 2);
    for guest in [&greedy, &modest] {
        let port = rig.world.local.borrow()[&(guest.id, guest.ring.1)];
        rig.world.pending.borrow_mut().insert(port);
    }
    assert!(rig.serve());
    assert!(modest.page.reply.take().is_some());
    assert_eq!(greedy.page.request_reads.get(), 8);
    assert!(rig.serve(), "it gets the next turn without another event");
    assert_eq!(greedy.page.request_reads.get(), 16);
    *greedy.page.after.borrow_mut() = None;
}

/// The same with operations that cost a hundred hypercalls each: another guest waits for one of them at most, or it
/// would take its own requests for failed.
#[test]
fn a_guest_that_maps_without_end_does_not_starve_the_others() {
    let world = World::with(Flavour::Owner);
    world.plug(NIC, Card { msix: 128, ..Card::PLAIN }.build());
    world.plug(OTHER, Card::PLAIN.build());
    let mut rig = boot_in(world, TWO);
    rig.world.xen.cost.set(5 * MS);
    // The greedy one comes first in every order.
    let mut greedy = rig.attach(1, &[NIC]);
    greedy.connect(&mut rig);
    rig.world.xen.limit(1, 200);
    let mut modest = rig.attach(2, &[OTHER]);
    modest.connect(&mut rig);
    greedy.put_entries(&(0..128).collect::<Vec<_>>());
    // Each answer meets the next request, on and off in turns.
    let on = Cell::new(false);
    *greedy.page.after.borrow_mut() = Some(Box::new(move |page| {
        let cmd = if on.replace(!on.get()) { op::ENABLE_MSIX } else { op::DISABLE_MSIX };
        page.request.set(RawRequest { cmd, value: 128, ..Default::default() });
        page.flags.set(PCIF_ACTIVE | 2);
    }));
    greedy.post(RawRequest { cmd: op::ENABLE_MSIX, value: 128, ..Default::default() });
    let start = rig.world.now.get();
    modest.post(RawRequest { size: 4, ..Default::default() });
    while modest.page.reply.take().is_none() {
        rig.serve();
    }
    let waited = rig.world.now.get() - start;
    assert!(waited <= 128 * 5 * MS, "{} ms", waited / MS);
    assert_ne!(greedy.page.request_reads.get(), 0);
    *greedy.page.after.borrow_mut() = None;
}

#[test]
fn events_without_a_request_cost_nothing() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    let port = rig.world.local.borrow()[&(1, guest.ring.1)];
    let operations = rig.world.operations.get();
    for _ in 0..1000 {
        rig.world.pending.borrow_mut().insert(port);
        rig.settle();
    }
    assert_eq!(rig.world.operations.get(), operations);
    assert!(rig.world.notified.borrow().is_empty());
    assert_eq!(guest.page.request_reads.get(), 0);
}

#[test]
fn without_message_interrupts_every_operation_number_gets_an_answer_and_touches_nothing() {
    let mut rig = boot_in(World::with(Flavour::Mmcfg0), &format!("mode=mmcfg0 {ONE}"));
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.hardware(NIC).writes.borrow_mut().clear();
    let cases =
        [(2, -4), (3, 0), (4, -4), (5, 0), (6, -4), (7, -4), (8, -4), (9, -4), (10, -4), (11, -4), (u32::MAX, -4)];
    for (cmd, err) in cases {
        for value in [0, 1, 128, 129, u32::MAX] {
            let reply = guest.request(&mut rig, RawRequest { cmd, value, ..Default::default() });
            // More entries than a request holds are wrong wherever they are asked for.
            let err = if cmd == op::ENABLE_MSIX && value > 128 { -22 } else { err };
            assert_eq!(reply.err, err, "operation {cmd}");
            let echoed = if cmd == op::ENABLE_MSIX { value } else { 0 };
            assert_eq!(reply.value, if err == 0 { 21 } else { echoed }, "operation {cmd}");
            let reply = guest.request(&mut rig, RawRequest { cmd, devfn: 0x100, value, ..Default::default() });
            assert_eq!(reply.err, -1, "operation {cmd} on no function");
        }
    }
    assert!(rig.hardware(NIC).writes.borrow().is_empty());
}

/// XSA-128 and reference bugs: negative, unaligned and far offsets.
#[test]
fn no_offset_or_size_outside_the_rules_reaches_anything() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    let before = rig.hardware(NIC).bytes.borrow().clone();
    for (offset, size) in [
        (0, 0),
        (0, 3),
        (0, 8),
        (0, -1),
        (0, i32::MIN),
        (-1, 1),
        (-4, 4),
        (4096, 1),
        (4096, 4),
        (4095, 2),
        (6, 4),
        (0xfe, 4),
        (5, 2),
        (i32::MIN, 4),
        (i32::MAX, 1),
        (-4096, 4),
    ] {
        assert_eq!(guest.read(&mut rig, 0, offset, size), Err(-2), "{offset} {size}");
        assert_eq!(guest.write(&mut rig, 0, offset, size, u32::MAX), -2, "{offset} {size}");
    }
    assert_eq!(differences(&rig.hardware(NIC).bytes.borrow(), &before), []);
    assert_eq!(guest.read(&mut rig, 0, 4092, 4), Ok(0));
}

/// XSA-349: a guest writes its state node as fast as it can.
#[test]
fn a_storm_of_state_changes_costs_bounded_work_each_and_harms_nobody() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut good = rig.attach(2, &["0000:02:00.0"]);
    good.connect(&mut rig);
    let mut bad = rig.attach(1, &[NIC]);
    let mut seed = 7u32;
    for _ in 0..2000 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let before = rig.world.operations.get();
        bad.set_front("state", &(seed >> 24).wrapping_rem(10).to_string());
        rig.settle();
        assert!(rig.world.operations.get() - before < 400, "{}", rig.world.operations.get() - before);
    }
    assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086));
    bad.set_front("state", "6");
    rig.settle();
    bad.connect(&mut rig);
    assert_eq!(bad.read(&mut rig, 0, 0, 2), Ok(0x8086));
    bad.destroy(&mut rig);
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1));
}

/// The same as fast as it can, without a pause: it gets twenty looks a second, and the last of its states counts in the end.
#[test]
fn a_guest_that_scribbles_its_state_without_a_pause_gets_twenty_looks_a_second_and_the_last_one_is_not_lost() {
    let mut rig = boot(ONE);
    let mut bad = rig.attach(1, &[NIC]);
    bad.connect(&mut rig);
    rig.pass(1000 * MS);
    let before = rig.world.operations.get();
    for round in 0..2000 {
        bad.set_front("state", ["5", "6", "1", "3", "4"][round % 5]);
        rig.deliver();
    }
    // A look is a score of operations, and a hundred where it closes, opens and connects.
    let cost = rig.world.operations.get() - before;
    assert!(cost < 20 * 100, "{cost} operations");
    bad.set_front("state", "6");
    rig.deliver();
    assert!(rig.backend.next_deadline().is_some_and(|due| due <= rig.world.now.get() + 1000 * MS));
    rig.pass(1000 * MS);
    assert_eq!(bad.back("state").as_deref(), Some("3"), "it was seen to have closed, and may come back");
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
    bad.connect(&mut rig);
    assert_eq!(bad.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// The twenty are each guest's own.
#[test]
fn a_guest_whose_looks_are_postponed_delays_nobody_elses() {
    let mut rig = boot(TWO);
    let mut good = rig.attach(2, &[OTHER]);
    good.connect(&mut rig);
    let mut bad = rig.attach(1, &[NIC]);
    bad.connect(&mut rig);
    for round in 0..200 {
        bad.set_front("state", ["5", "6", "3"][round % 3]);
        rig.deliver();
    }
    let now = rig.world.now.get();
    assert!(rig.backend.look_due().is_some_and(|due| due > now));
    good.set_front("state", "5");
    rig.deliver();
    assert_eq!(good.back("state").as_deref(), Some("5"));
    assert_eq!(rig.world.now.get(), now, "no time has passed");
}

/// However many guests scribble at once, a request waits for one look at most.
#[test]
fn a_request_waits_for_one_xenstore_event_at_most() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut good = rig.attach(100, &[OTHER]);
    good.connect(&mut rig);
    let mut bad: Vec<_> = (1..20).map(|id| rig.attach(id, &[])).collect();
    bad.iter_mut().for_each(|guest| guest.connect(&mut rig));
    rig.pass(1000 * MS);
    let look = {
        let before = rig.world.operations.get();
        bad[0].set_front("state", "6");
        rig.turn();
        rig.world.operations.get() - before
    };
    assert!(look > 10, "it was looked at");
    rig.settle();
    bad.iter().for_each(|guest| guest.set_front("state", "5"));
    rig.turn();
    let before = rig.world.operations.get();
    good.post(RawRequest { size: 4, ..Default::default() });
    let mut turns = 0;
    while good.page.reply.get().is_none() {
        rig.turn();
        turns += 1;
    }
    assert!(turns <= 1 && rig.world.operations.get() - before <= look);
    assert!(!rig.world.events.borrow().is_empty(), "the others still wait");
    rig.settle();
}
