//! What happens between two operations: the toolstack renumbers or removes, xenstored does not answer,
//! the device vanishes. Each test goes through every operation of the backend in turn.

use crate::model;

use std::cell::Cell;
use std::rc::Rc;

use model::hardware::MS;
use model::logs::{heard, listen};
use model::{Guest, NIC, ONE, OTHER, OWN_WATCHES, Rig, TWO, World, boot, boot_in, withdraw};

/// A bound for loops over operations; each ends when the backend takes no more of them.
const OPERATIONS: u64 = 1000;

/// Has `act` done once, after `count` more operations of the backend.
fn after(rig: &Rig, count: u64, mut act: impl FnMut(&World) + 'static) -> Rc<Cell<bool>> {
    let at = rig.world.operations.get() + count;
    let done = Rc::new(Cell::new(false));
    let told = done.clone();
    *rig.world.meanwhile.borrow_mut() = Some(Box::new(move |operation, world| {
        if operation == at {
            act(world);
            told.set(true);
        }
    }));
    done
}

/// Lets time pass until the backend has nothing left to try again.
fn wait(rig: &mut Rig) {
    for _ in 0..20 {
        rig.settle();
        let Some(deadline) = rig.backend.next_deadline() else { return };
        rig.world.now.set(deadline);
    }
    panic!("it tries again for ever");
}

fn both(rig: &mut Rig) -> Guest {
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(rig);
    guest
}

/// The toolstack wants the first function of `guest` back.
fn ask_back(rig: &mut Rig, guest: &Guest) {
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.settle();
}

/// Takes the first entry out of the list now if the backend took fewer operations than [`after`] waited for.
fn withdraw_if_not(rig: &Rig, guest: &Guest, done: &Cell<bool>) {
    if !done.get() {
        *rig.world.meanwhile.borrow_mut() = None;
        guest.withdraw(0);
    }
}

/// The toolstack takes an entry out of the list while the backend reads it: a list read in two halves
/// must not make a function in use look forgotten.
#[test]
fn a_list_that_closes_up_while_it_is_read_takes_no_function_from_its_guest() {
    for count in 1..OPERATIONS {
        let mut rig = boot(TWO);
        let guest = both(&mut rig);
        ask_back(&mut rig, &guest);
        guest.set_front("state", "7");
        rig.settle();
        guest.set_front("state", "4");
        rig.settle();
        assert_eq!(guest.back("state-0").as_deref(), Some("6"));
        assert_eq!(guest.write(&mut rig, 8, 4, 2, 0x0006), 0);

        let done = after(&rig, count, |world| withdraw(world, 1, 0));
        guest.set_back("online", "1");
        rig.settle();
        withdraw_if_not(&rig, &guest, &done);
        wait(&mut rig);
        assert_eq!(rig.published(OTHER, "state").as_deref(), Some("in-use"), "operation {count}");
        assert_eq!(rig.hardware(OTHER).word(4) & 4, 4, "operation {count}: it may still work");
        assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086), "operation {count}");
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
        if !done.get() {
            return assert!(count > 5, "the backend has looked");
        }
    }
}

/// `xl-pciback detach --force` does not wait: it closes the list up under the backend's hands.
#[test]
fn a_forced_detach_at_any_moment_takes_the_function_that_was_meant() {
    for count in 1..OPERATIONS {
        let mut rig = boot(TWO);
        let guest = both(&mut rig);
        ask_back(&mut rig, &guest);
        let done = after(&rig, count, |world| withdraw(world, 1, 0));
        guest.set_front("state", "7");
        rig.settle();
        withdraw_if_not(&rig, &guest, &done);
        wait(&mut rig);
        guest.set_front("state", "4");
        wait(&mut rig);
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "operation {count}");
        assert_eq!(rig.published(OTHER, "state").as_deref(), Some("in-use"), "operation {count}");
        assert_eq!(guest.back("state-0").as_deref(), Some("3"), "operation {count}");
        assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:01.00"), "operation {count}");
        for node in ["state-1", "vdev-1", "error-1"] {
            assert_eq!(guest.back(node), None, "operation {count}: {node} belongs to nobody");
        }
        assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086), "operation {count}");
        if !done.get() {
            return assert!(count > 5, "the backend has looked");
        }
    }
}

/// The toolstack removes everything while the backend works on it: nothing may be made anew.
#[test]
fn a_folder_removed_at_any_moment_stays_removed() {
    for magic in ["7", "8"] {
        for count in 1..OPERATIONS {
            let mut rig = boot(ONE);
            let before = { rig.attach(9, &[]) };
            before.destroy(&mut rig);
            // The folders that all errors share stay after the first one.
            let count_nodes = |rig: &Rig| {
                rig.world.nodes.borrow().keys().filter(|key| !key.starts_with("/local/domain/900/error")).count()
            };
            let nodes = count_nodes(&rig);
            let done = after(&rig, count, |world| {
                world.remove("backend/pci/1");
                world.remove("/local/domain/1");
            });
            let mut guest = rig.attach(1, &[NIC]);
            if !done.get() {
                guest.world.pages.borrow_mut().insert((1, 9), guest.page.clone());
                guest.world.ports.borrow_mut().insert((1, 6));
                for (node, value) in [("pci-op-ref", "9"), ("event-channel", "6"), ("magic", magic), ("state", "3")] {
                    guest.set_front(node, value);
                }
                rig.settle();
            }
            let last = !done.get();
            if last {
                *rig.world.meanwhile.borrow_mut() = None;
                guest.ring = (9, 6);
                guest.destroy(&mut rig);
            }
            wait(&mut rig);
            let left: Vec<_> = rig.world.nodes.borrow().keys().filter(|key| key.contains("/pci/1")).cloned().collect();
            assert_eq!(left, [""; 0], "operation {count}, magic {magic}");
            assert_eq!(count_nodes(&rig), nodes, "operation {count}, magic {magic}");
            assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "operation {count}");
            assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
            assert_eq!(rig.world.watches.borrow().len(), OWN_WATCHES, "operation {count}");
            if last {
                assert!(count > 5, "the backend has looked");
                break;
            }
        }
    }
}

/// One operation that xenstored does not answer, anywhere on the way: the guest gets its function in the
/// end, without another change in xenstore.
#[test]
fn an_operation_that_times_out_is_made_up_for() {
    for count in 1..OPERATIONS {
        let mut rig = boot(ONE);
        let at = rig.world.operations.get() + count;
        *rig.world.meanwhile.borrow_mut() = Some(Box::new(move |operation, world| world.deaf.set(operation == at)));
        let mut guest = rig.attach(1, &[NIC]);
        wait(&mut rig);
        guest.publish(&mut rig);
        wait(&mut rig);
        assert_eq!(guest.back("state").as_deref(), Some("4"), "operation {count}: {:?}", guest.back("error"));
        assert_eq!(guest.back("state-0").as_deref(), Some("3"), "operation {count}: {:?}", guest.back("error-0"));
        assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:00.00"), "operation {count}");
        guest.set_front("state", "4");
        wait(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "operation {count}");
        guest.destroy(&mut rig);
        wait(&mut rig);
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "operation {count}");
        assert_eq!(guest.back("state"), None, "operation {count}");
        if rig.world.operations.get() < at {
            return assert!(count > 50, "the backend has worked");
        }
    }
}

/// The same for the driver domain's own start, when guests wait for it already.
#[test]
fn a_start_on_which_an_operation_times_out_is_made_up_for() {
    for count in 1..OPERATIONS {
        let mut before = boot(ONE);
        let mut guest = before.attach(1, &[NIC]);
        let world = before.world.clone();
        drop(before);
        world.watches.borrow_mut().clear();
        world.events.borrow_mut().clear();
        world.remove("data/pciback");
        guest.set_back("state", "1");
        let at = world.operations.get() + count;
        *world.meanwhile.borrow_mut() = Some(Box::new(move |operation, world| world.deaf.set(operation == at)));
        let mut rig = boot_in(world, ONE);
        wait(&mut rig);
        assert_eq!(rig.world.get("data/pciback/state").as_deref(), Some("ready"), "operation {count}");
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("in-use"), "operation {count}");
        guest.publish(&mut rig);
        wait(&mut rig);
        assert_eq!(guest.back("state").as_deref(), Some("4"), "operation {count}");
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "operation {count}");
        if rig.world.operations.get() < at {
            return assert!(count > 20, "the backend has worked");
        }
    }
}

/// A check whose node cannot be read is not a check passed.
#[test]
fn no_timeout_lets_another_card_or_another_guest_through() {
    for (words, node, value) in
        [(ONE, "id-0", "8086:1533"), ("dev=0000:01:00.0,guest=guest2", "domain", "guest1"), (ONE, "dev-0", OTHER)]
    {
        for count in 1..OPERATIONS {
            let mut rig = boot(words);
            let at = rig.world.operations.get() + count;
            *rig.world.meanwhile.borrow_mut() = Some(Box::new(move |operation, world| world.deaf.set(operation == at)));
            let guest = rig.attach(1, &[]);
            guest.list(0, NIC);
            guest.set_back(node, value);
            guest.set_back("num_devs", "1");
            guest.set_back("state", "1");
            wait(&mut rig);
            assert_eq!(guest.back("state-0").as_deref(), Some("6"), "{node}, operation {count}");
            assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "{node}, operation {count}");
            if rig.world.operations.get() < at {
                break;
            }
        }
    }
}

/// The toolstack changes the list again and again: the backend gives up after a bounded number of tries,
/// serves others, and comes back to it.
#[test]
fn a_list_that_never_stands_still_costs_bounded_work() {
    let mut rig = boot(TWO);
    let mut good = rig.attach(2, &[OTHER]);
    good.connect(&mut rig);
    let before = rig.world.operations.get();
    // Each operation of the backend meets a newer tree.
    *rig.world.meanwhile.borrow_mut() = Some(Box::new(|_, world| world.generation.set(world.generation.get() + 1)));
    let guest = rig.attach(1, &[NIC]);
    rig.settle();
    assert!(rig.world.operations.get() - before < 4000, "{}", rig.world.operations.get() - before);
    assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086));
    *rig.world.meanwhile.borrow_mut() = None;
    wait(&mut rig);
    assert_eq!(guest.back("state-0").as_deref(), Some("3"));
    assert_eq!(guest.back("state").as_deref(), Some("3"));
}

/// Contract with the toolstack: without a connected frontend, a function marked 5 is released at once.
#[test]
fn a_function_is_released_at_once_while_the_frontend_is_not_connected() {
    for (online, states) in [("1", &["5"][..]), ("0", &["5"]), ("1", &["5", "6"]), ("0", &["5", "6"]), ("0", &["6"])] {
        let mut rig = boot(TWO);
        let guest = both(&mut rig);
        guest.set_back("online", online);
        for state in states {
            guest.set_front("state", state);
            rig.settle();
        }
        guest.set_back("state-0", "5");
        rig.settle();
        assert_eq!(guest.back("state-0").as_deref(), Some("6"), "online {online}, frontend {states:?}");
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "online {online}, frontend {states:?}");
        assert_eq!(rig.published(OTHER, "state").as_deref(), Some("in-use"));
    }
}

/// A list that cannot be read is no list of nothing.
#[test]
fn a_malformed_count_takes_no_function_from_a_connected_guest() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.set_back("num_devs", "one");
    rig.settle();
    assert!(guest.back("error").expect("a reason").contains("num_devs"));
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    guest.set_back("num_devs", "0");
    rig.settle();
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Err(-1));
}

#[test]
fn a_function_listed_twice_is_exported_once_and_the_second_entry_says_so() {
    let mut rig = boot(ONE);
    let guest = rig.attach(1, &[NIC, NIC]);
    assert_eq!((guest.back("state-0").as_deref(), guest.back("state-1").as_deref()), (Some("3"), Some("6")));
    assert!(guest.back("error-1").expect("a reason").contains("twice"));
}

/// Case 46: a failed addition is never silent, leaves nothing of the function's own behind, and a second
/// try succeeds.
#[test]
fn case_46_a_refused_function_can_be_tried_again() {
    let mut rig = boot(TWO);
    let mut owner = rig.attach(2, &[OTHER]);
    owner.connect(&mut rig);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for round in 0..2 {
        guest.list(1, OTHER);
        guest.set_back("num_devs", "2");
        guest.set_back("state", "7");
        rig.settle();
        guest.set_front("state", "7");
        rig.settle();
        guest.set_front("state", "4");
        rig.settle();
        if round == 0 {
            assert_eq!(guest.back("state-1").as_deref(), Some("6"));
            assert!(guest.back("error-1").is_some());
            assert_eq!(guest.back("vdev-1"), None);
            owner.destroy(&mut rig);
        }
    }
    assert_eq!(guest.back("state-1").as_deref(), Some("3"));
    assert_eq!(guest.back("error-1"), None, "the old reason is gone");
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));
}

/// Every end of a guest leaves as many nodes as there were, also of one that was at fault.
#[test]
fn the_faults_of_guests_that_are_gone_leave_no_nodes() {
    let mut rig = boot(ONE);
    let mut before = None;
    for id in 1..50 {
        let mut guest = rig.attach(id, &[NIC]);
        guest.publish(&mut rig);
        guest.set_front("state", "6");
        rig.settle();
        guest.set_front("magic", "8");
        guest.set_front("state", "3");
        rig.settle();
        assert!(rig.world.get(&format!("error/backend/pci/{id}/0/error")).is_some());
        if id % 2 == 0 {
            // As libxl does: the backend's folder goes first.
            rig.world.remove(&format!("backend/pci/{id}"));
            rig.settle();
        }
        guest.destroy(&mut rig);
        // The first one leaves the folders that all of them use.
        let left = rig.world.nodes.borrow().len();
        assert_eq!(left, *before.get_or_insert(left), "guest {id}");
    }
}

/// A device that does not come back from what its guest did to it: no panic, a reason, nobody else harmed.
#[test]
fn a_device_that_vanishes_with_its_guest_is_broken_and_stops_nothing() {
    for last in ["5", "6", "gone"] {
        let mut rig = boot(TWO);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        rig.hardware(NIC).vanish();
        assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(u32::MAX), "what is gone reads as ones, its ids too");
        assert_eq!(guest.read(&mut rig, 0, 0x10, 4), Ok(u32::MAX));
        assert_eq!(guest.read(&mut rig, 0, 0x3c, 1), Ok(0xff));
        if last != "gone" {
            guest.set_front("state", last);
            rig.settle();
            assert_eq!(rig.published(NIC, "state").as_deref(), Some("broken"));
            assert!(rig.published(NIC, "reason").expect("a reason").contains("does not answer 60 s after its reset"));
        }
        guest.destroy(&mut rig);
        assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
        let mut second = rig.attach(2, &[NIC, OTHER]);
        assert!(second.back("error-0").expect("a reason").contains("does not answer"));
        second.connect(&mut rig);
        assert_eq!(second.read(&mut rig, 0, 0, 2), Ok(0x8086), "the other one is served");
    }
}

/// Cases 54 to 56: a function without its function 0, and addresses beyond bus 0 and segment 0.
#[test]
fn cases_54_to_56_every_exported_function_is_where_vdev_says_and_nowhere_else() {
    for sbdf in ["0000:00:02.4", "0000:80:14.0", "0002:01:00.0", "0000:05:00.1"] {
        let segment = &sbdf[..4];
        let mut rig = boot(&format!("ecam={segment}:00-ff@c0000000 dev={sbdf}"));
        let mut guest = rig.attach(1, &[sbdf]);
        assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:00.00"), "{sbdf}");
        guest.connect(&mut rig);
        let found: Vec<u32> = (0..256).filter(|devfn| guest.read(&mut rig, *devfn, 0, 4).is_ok()).collect();
        assert_eq!(found, [0], "{sbdf}");
        assert_eq!(guest.read(&mut rig, 0, 0x0e, 1), Ok(0), "alone in its slot: not multifunction");
        for (domain, bus, devfn) in
            [(1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0x80, 0), (0, 0, 0x100), (0, 0, 0x1ff), (0, 0, u32::MAX)]
        {
            let request = pciback::wire::RawRequest { domain, bus, devfn, size: 4, ..Default::default() };
            assert_eq!(guest.request(&mut rig, request).err, -1, "{sbdf}");
        }
    }
}

/// Case 50: whatever the guests do, a function is always ready, in use by a guest that is there, or broken.
#[test]
fn case_50_after_a_thousand_random_steps_the_listing_is_the_truth() {
    let all = [NIC, OTHER, "0000:03:00.0"];
    let mut rig = boot(&all.map(|sbdf| format!("dev={sbdf} ")).concat());
    let mut guests: Vec<Guest> = Vec::new();
    let mut owner: [Option<u16>; 3] = [None; 3];
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for step in 0..1000u16 {
        let wanted = random(3) as usize;
        if guests.is_empty() || random(4) == 0 {
            let mut guest = rig.attach(step + 1, &[all[wanted]]);
            if owner[wanted].is_none() {
                owner[wanted] = Some(guest.id);
            }
            if random(4) != 0 {
                guest.connect(&mut rig);
            }
            guests.push(guest);
        } else {
            let index = random(guests.len() as u64) as usize;
            match random(6) {
                0 => guests[index].set_front("state", "5"),
                1 => guests[index].set_front("state", "6"),
                2 => guests[index].publish(&mut rig),
                3 => guests[index].set_front("magic", "8"),
                4 => guests[index].page.flags.set(3),
                _ => {
                    let guest = guests.remove(index);
                    for owned in owner.iter_mut().filter(|owned| **owned == Some(guest.id)) {
                        *owned = None;
                    }
                    guest.destroy(&mut rig);
                }
            }
            rig.settle();
        }
        for (sbdf, owner) in all.iter().zip(owner) {
            let state = if owner.is_some() { "in-use" } else { "ready" };
            assert_eq!(rig.published(sbdf, "state").as_deref(), Some(state), "step {step}: {sbdf}");
            assert_eq!(rig.published(sbdf, "frontend"), owner.map(|id| id.to_string()), "step {step}: {sbdf}");
        }
        assert_eq!(rig.backend.ports().count() as i32, rig.world.bound.get());
    }
}

/// XSA-43 and XSA-157: nothing a guest repeats fills the log.
#[test]
fn a_guest_that_repeats_itself_writes_a_bounded_number_of_lines() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    let start = rig.world.now.get();
    listen();
    for _ in 0..200 {
        guest.connect(&mut rig);
        assert_eq!(guest.enable_msix(&mut rig, &[]), Err(-22));
        assert_eq!(guest.enable_msix(&mut rig, &[0]).map(|vectors| vectors.len()), Ok(1));
        assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-114));
        guest.disable_msix(&mut rig);
        assert_eq!(guest.write(&mut rig, 0, 0x80, 4, 1), 0);
        guest.set_front("state", "6");
        rig.settle();
        guest.set_front("magic", "8");
        guest.set_front("state", "3");
        rig.settle();
        guest.set_front("state", "6");
        rig.settle();
    }
    // Ten lines in ten seconds: it may not change its nodes at any speed.
    let spans = (rig.world.now.get() - start) / (10_000 * MS) + 1;
    assert!(spans < 20 && heard().len() as u64 <= 10 * spans, "{spans}: {:#?}", heard());
}
