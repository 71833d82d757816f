//! The states of a connection, step by step: which node is written when, and what becomes of a frontend that misses
//! a state, never answers, or does what Linux's does not. The life of a connection as a whole is in `life_cycle.rs`,
//! what happens between two operations in `races.rs`.

use crate::model;

use std::cell::RefCell;
use std::rc::Rc;

use model::hardware::{MASTER, MS, at};
use model::xen::Stage;
use model::{Card, DRIVER, Guest, NIC, ONE, OTHER, Rig, TWO, World, boot, boot_in, boot_with};

/// Watches what the backend writes to `node` of guest 1's folder: each value once, in order.
fn record(rig: &Rig, node: &str) -> Rc<RefCell<Vec<String>>> {
    let path = format!("backend/pci/1/0/{node}");
    let seen: Rc<RefCell<Vec<String>>> = Rc::default();
    let told = seen.clone();
    *rig.world.meanwhile.borrow_mut() = Some(Box::new(move |_, world| {
        let Some(value) = world.get(&path) else { return };
        let mut told = told.borrow_mut();
        if told.last() != Some(&value) {
            told.push(value);
        }
    }));
    seen
}

fn state(guest: &Guest) -> String {
    guest.back("state").unwrap_or_default()
}

fn connected(rig: &mut Rig, id: u16, functions: &[&str]) -> Guest {
    let mut guest = rig.attach(id, functions);
    guest.connect(rig);
    guest
}

/// The toolstack adds a function to the list.
fn list(guest: &Guest, index: usize, sbdf: &str) {
    guest.list(index, sbdf);
    guest.set_back("num_devs", &(index + 1).to_string());
}

/// The ids of function `index` of the list, read where `vdev-N` says that it is.
fn ids(rig: &mut Rig, guest: &Guest, index: usize) -> Result<u32, i32> {
    let place = guest.back(&format!("vdev-{index}")).expect("an address");
    let slot = place.strip_prefix("0000:00:").and_then(|rest| rest.strip_suffix(".00")).expect("function 0");
    guest.read(rig, u32::from_str_radix(slot, 16).expect("a slot") << 3, 0, 2)
}

/// The frontend goes along with a change, as Linux's does.
fn go_along(rig: &mut Rig, guest: &Guest) {
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(state(guest), "8");
    guest.set_front("state", "4");
    rig.settle();
    assert_eq!(state(guest), "4");
}

/// Section 2.2 and 2.3: a new folder is taken up (2), its functions are exported, then it is ready (3).
#[test]
fn a_new_folder_goes_through_init_wait_and_its_frontend_is_watched() {
    let mut rig = boot(ONE);
    let seen = record(&rig, "state");
    let guest = rig.attach(1, &[NIC]);
    *rig.world.meanwhile.borrow_mut() = None;
    assert_eq!((seen.borrow().join(" "), state(&guest)), ("1 2 3".into(), "3".into()));
    let watches = rig.world.watches.borrow().clone();
    assert!(watches.iter().any(|(path, _)| path == "/local/domain/1/device/pci/0/state"), "{watches:?}");
}

/// The address, the roots and `state-N` stand there before the state that makes the frontend read them.
#[test]
fn what_the_frontend_reads_is_there_before_the_state_that_tells_it_to() {
    for (state, node) in [("3", "vdev-0"), ("3", "state-0"), ("3", "root_num"), ("3", "root-0")] {
        let mut rig = boot(ONE);
        let early = Rc::new(RefCell::new(false));
        let told = early.clone();
        *rig.world.meanwhile.borrow_mut() = Some(Box::new(move |_, world| {
            let there = |node: &str| world.get(&format!("backend/pci/1/0/{node}"));
            if there("state").as_deref() == Some(state) && there(node).is_none() {
                *told.borrow_mut() = true;
            }
        }));
        let _guest = rig.attach(1, &[NIC]);
        assert!(!*early.borrow(), "{node} comes after state {state}");
    }
}

/// Section 2.2: 2 and 8 ask for nothing, and what is no state does not either.
#[test]
fn a_frontend_in_a_state_that_asks_for_nothing_changes_nothing() {
    for asked in ["2", "8", "0", "9", "04", "", "-1", "four"] {
        let mut rig = boot(ONE);
        let guest = connected(&mut rig, 1, &[NIC]);
        guest.set_front("state", asked);
        rig.settle();
        assert_eq!(state(&guest), "4", "{asked:?}");
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "{asked:?}");
        assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1), "{asked:?}");
    }
}

/// Section 2.5: of the list only 1 (or 3, or nothing) and 5 ask for something.
#[test]
fn a_substate_that_asks_for_nothing_changes_nothing() {
    for asked in ["0", "2", "4", "6", "7", "8", "one"] {
        let mut rig = boot(TWO);
        let guest = connected(&mut rig, 1, &[NIC]);
        list(&guest, 1, OTHER);
        guest.set_back("state-1", asked);
        guest.set_back("state", "7");
        rig.settle();
        go_along(&mut rig, &guest);
        assert_eq!(guest.back("state-1").as_deref(), Some(asked));
        assert_eq!((guest.back("vdev-1"), rig.state(OTHER).as_str()), (None, "ready"), "{asked:?}");
        guest.set_back("state-0", asked);
        guest.set_back("state", "7");
        rig.settle();
        go_along(&mut rig, &guest);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "{asked:?} takes nothing away");
    }
}

/// A function that is listed without a state is listed, in both of Linux's ways of reading the list.
#[test]
fn a_function_without_a_substate_is_exported() {
    let mut rig = boot(TWO);
    let guest = rig.attach(1, &[]);
    list(&guest, 0, NIC);
    rig.world.remove("backend/pci/1/0/state-0");
    guest.set_back("state", "1");
    rig.settle();
    assert_eq!(guest.back("state-0").as_deref(), Some("3"));
    let mut guest = guest;
    guest.connect(&mut rig);
    list(&guest, 1, OTHER);
    rig.world.remove("backend/pci/1/0/state-1");
    guest.set_back("state", "7");
    rig.settle();
    go_along(&mut rig, &guest);
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));
}

/// Section 9.1: a change that comes before Linux's frontend has seen Connected: it goes from 3 to 7 at once.
#[test]
fn a_frontend_that_missed_connected_goes_along_with_the_change() {
    let mut rig = boot(TWO);
    let mut guest = rig.attach(1, &[NIC]);
    guest.publish(&mut rig);
    assert_eq!(state(&guest), "4");
    list(&guest, 1, OTHER);
    guest.set_back("state", "7");
    rig.settle();
    assert_eq!((state(&guest).as_str(), guest.back("vdev-1")), ("7", None), "it has not answered yet");
    go_along(&mut rig, &guest);
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));
    assert_eq!(rig.world.mapped.get(), 1);
}

/// The toolstack does not wait for the end of one change before it makes the next.
#[test]
fn a_second_change_before_the_end_of_the_first_is_made_too() {
    for moment in ["7", "8"] {
        let third = "0000:03:00.0";
        let mut rig = boot(&format!("{TWO} dev={third}"));
        let guest = connected(&mut rig, 1, &[NIC]);
        list(&guest, 1, OTHER);
        guest.set_back("state", "7");
        rig.settle();
        if moment == "8" {
            guest.set_front("state", "7");
            rig.settle();
        }
        assert_eq!(state(&guest), moment);
        list(&guest, 2, third);
        guest.set_back("state", "7");
        rig.settle();
        go_along(&mut rig, &guest);
        for index in 0..3 {
            assert_eq!(ids(&mut rig, &guest, index), Ok(0x8086), "second change in state {moment}, function {index}");
        }
    }
}

/// A frontend that goes back to Connected without having said Reconfiguring has not gone along: nothing is taken
/// from it, and the change stands until it does.
#[test]
fn a_frontend_that_skips_reconfiguring_keeps_its_functions_until_it_goes_along() {
    let mut rig = boot(TWO);
    let guest = connected(&mut rig, 1, &[NIC]);
    list(&guest, 1, OTHER);
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.settle();
    for skipped in ["4", "8", "4"] {
        guest.set_front("state", skipped);
        rig.settle();
        assert_eq!((state(&guest).as_str(), guest.back("state-0").as_deref()), ("7", Some("5")));
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
        assert_eq!(guest.back("vdev-1"), None);
    }
    go_along(&mut rig, &guest);
    assert_eq!((guest.back("state-0").as_deref(), rig.state(NIC).as_str()), (Some("6"), "ready"));
    assert_eq!(ids(&mut rig, &guest, 1), Ok(0x8086));
}

/// Sections 2.9 and 2.10: a guest that never answers costs nothing, keeps nobody, and what it has can be taken by force.
#[test]
fn a_frontend_that_never_answers_a_change_costs_nothing_and_keeps_nobody() {
    let third = "0000:03:00.0";
    for answered in [false, true] {
        let mut rig = boot(&format!("{TWO} dev={third}"));
        let deaf = connected(&mut rig, 1, &[NIC]);
        let good = connected(&mut rig, 2, &[OTHER]);
        deaf.set_back("state-0", "5");
        deaf.set_back("state", "7");
        rig.settle();
        if answered {
            // It hangs after half of it.
            deaf.set_front("state", "7");
            rig.settle();
        }
        let (stands, operations) = (state(&deaf), rig.world.operations.get());
        rig.pass(600_000 * MS);
        assert_eq!(
            (state(&deaf), rig.world.operations.get()),
            (stands, operations),
            "nothing is tried again and again"
        );

        list(&good, 1, third);
        good.set_back("state", "7");
        rig.settle();
        go_along(&mut rig, &good);
        assert_eq!(good.read(&mut rig, 8, 0, 2), Ok(0x8086));

        // The toolstack has waited long enough.
        assert_eq!(rig.state(NIC), if answered { "ready" } else { "in-use" });
        deaf.withdraw(0);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready");
        assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086));
        let next = connected(&mut rig, 3, &[NIC]);
        assert_eq!(next.read(&mut rig, 0, 0, 2), Ok(0x8086));
        deaf.destroy(&mut rig);
        assert_eq!(rig.state(NIC), "in-use", "the end of the former guest is nothing to the next");
    }
}

/// A guest that never connects holds nothing up, and the toolstack can take its function back.
#[test]
fn a_frontend_that_never_connects_costs_nothing_and_gives_its_function_back() {
    for published in ["1", "2", "4", "7", "8"] {
        let mut rig = boot(TWO);
        let silent = rig.attach(1, &[NIC]);
        silent.set_front("state", published);
        rig.settle();
        assert_eq!(state(&silent), "3", "{published}");
        let operations = rig.world.operations.get();
        rig.pass(600_000 * MS);
        assert_eq!(rig.world.operations.get(), operations);
        let good = connected(&mut rig, 2, &[OTHER]);
        assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086));
        silent.set_back("state-0", "5");
        rig.settle();
        assert_eq!(silent.back("state-0").as_deref(), Some("6"), "{published}");
        assert_eq!((state(&silent).as_str(), rig.state(NIC).as_str()), ("3", "ready"), "{published}");
    }
}

/// Both ends write at once, whatever they write: no other guest notices, and a new connection is possible.
#[test]
fn any_two_state_writes_at_once_leave_a_connection_that_can_be_opened_again() {
    for own in 0..=9 {
        for peer in 0..=9 {
            let mut rig = boot(TWO);
            let good = connected(&mut rig, 2, &[OTHER]);
            let mut guest = connected(&mut rig, 1, &[NIC]);
            guest.set_back("state", &own.to_string());
            guest.set_front("state", &peer.to_string());
            rig.settle();
            assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086), "{own} {peer}");
            assert_eq!(rig.state(NIC), "in-use", "{own} {peer}");
            // Whatever that led to: the guest loads its module anew, and that leads to the start.
            guest.set_front("state", "6");
            rig.settle();
            guest.connect(&mut rig);
            assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "{own} {peer}");
            assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (2, 2), "{own} {peer}");
        }
    }
}

/// The toolstack writes 7 at the moment at which the guest closes, dies, or starts anew.
#[test]
fn a_change_that_meets_the_guests_end_is_made_without_it() {
    for last in ["5", "6", "gone"] {
        let mut rig = boot(TWO);
        let guest = connected(&mut rig, 1, &[NIC]);
        list(&guest, 1, OTHER);
        guest.set_back("state-0", "5");
        guest.set_back("state", "7");
        if last == "gone" {
            guest.leave();
        } else {
            guest.set_front("state", last);
        }
        rig.settle();
        if last == "gone" {
            assert_eq!((rig.state(NIC), rig.state(OTHER)), ("ready".into(), "ready".into()));
            assert_eq!(guest.back("state"), None);
            guest.die(Stage::Freed);
            rig.settle();
            continue;
        }
        assert_eq!((guest.back("state-0").as_deref(), rig.state(NIC).as_str()), (Some("6"), "ready"), "{last}");
        guest.set_front("state", "6");
        rig.settle();
        let mut guest = guest;
        guest.connect(&mut rig);
        assert_eq!(ids(&mut rig, &guest, 1), Ok(0x8086), "{last}");
        let found = (0..256).filter(|devfn| guest.read(&mut rig, *devfn, 0, 4).is_ok()).count();
        assert_eq!(found, 1, "{last}: the other is gone");
    }
}

/// Section 9.7: mini-os waits for 5 and for a change after that, goes back to 1, and then wants the backend between
/// 2 and 5. It publishes its nodes with its state in one transaction.
#[test]
fn the_way_in_which_mini_os_closes_and_opens_again() {
    let mut rig = boot(ONE);
    let mut guest = connected(&mut rig, 1, &[NIC]);
    for _ in 0..3 {
        guest.set_front("state", "5");
        rig.settle();
        assert_eq!(state(&guest), "5");
        guest.set_front("state", "6");
        rig.settle();
        assert_ne!(state(&guest), "5");
        guest.set_front("state", "1");
        rig.settle();
        assert!(["2", "3", "4"].contains(&state(&guest).as_str()), "{}", state(&guest));
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    }
}

/// Linux's xenbus writes 1 for a frontend whose node was made anew: the old connection is over.
#[test]
fn a_frontend_that_goes_back_to_its_start_is_disconnected() {
    let mut rig = boot(ONE);
    let mut guest = connected(&mut rig, 1, &[NIC]);
    guest.set_front("state", "1");
    rig.settle();
    assert_eq!((state(&guest).as_str(), rig.world.mapped.get()), ("3", 0));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// Section 2.13: the toolstack makes the folder anew under a guest that is connected.
#[test]
fn a_folder_made_anew_begins_from_the_start() {
    let mut rig = boot(ONE);
    let mut guest = connected(&mut rig, 1, &[NIC]);
    rig.world.remove("backend/pci/1/0");
    rig.settle();
    assert_eq!((rig.world.mapped.get(), rig.state(NIC).as_str()), (0, "ready"));
    let front = "/local/domain/1/device/pci/0";
    guest.list(0, NIC);
    for (node, value) in [("frontend", front), ("frontend-id", "1"), ("online", "1"), ("num_devs", "1"), ("state", "1")]
    {
        guest.set_back(node, value);
    }
    guest.set_front("backend", &format!("/local/domain/{DRIVER}/backend/pci/1/0"));
    guest.set_front("state", "1");
    rig.settle();
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// Section 11.1, row 12: libxl follows a null pointer where `dev-N` is missing at the removal.
#[test]
fn a_function_that_has_lost_its_name_is_given_back() {
    for (node, value) in [("dev-0", None), ("dev-0", Some("0000:07:00.0")), ("dev-0", Some("?")), ("vdev-0", None)] {
        let mut rig = boot(TWO);
        let guest = connected(&mut rig, 1, &[NIC, OTHER]);
        match value {
            Some(value) => guest.set_back(node, value),
            None => drop(rig.world.remove(&format!("backend/pci/1/0/{node}"))),
        }
        guest.set_back("state-0", "5");
        guest.set_back("state", "7");
        rig.settle();
        go_along(&mut rig, &guest);
        assert_eq!(rig.state(NIC), "ready", "{node} {value:?}");
        assert_eq!(guest.back("state-0").as_deref(), Some("6"), "{node} {value:?}");
        assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086), "{node} {value:?}");
    }
}

/// The toolstack's list names more than it holds, or holds more than it names.
#[test]
fn a_count_that_does_not_fit_the_list_harms_no_listed_function() {
    let mut rig = boot(TWO);
    let guest = connected(&mut rig, 1, &[NIC]);
    guest.set_back("num_devs", "3");
    guest.set_back("state", "7");
    rig.settle();
    go_along(&mut rig, &guest);
    for index in ["1", "2"] {
        assert_eq!(guest.back(&format!("state-{index}")).as_deref(), Some("6"));
        assert!(guest.back(&format!("error-{index}")).expect("a reason").contains("is missing"));
    }
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    guest.list(3, OTHER);
    guest.set_back("state", "7");
    rig.settle();
    go_along(&mut rig, &guest);
    assert_eq!(rig.state(OTHER), "ready", "it is not on the list");
}

/// A guest that was saved and goes on under its number (`xl save -c`), or was started anew in place, comes with a new
/// ring: it finds a function as fresh as a new guest does, and the old vectors are gone.
#[test]
fn a_guest_that_comes_back_with_a_new_ring_finds_a_fresh_function() {
    let mut rig = boot_with(Card::BOTH);
    let mut guest = connected(&mut rig, 1, &[NIC]);
    let fresh = guest.read(&mut rig, 0, 4, 2);
    guest.enable(&mut rig);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]).map(|vectors| vectors.len()), Ok(2));
    let old = guest.page.clone();
    guest.connect(&mut rig);
    assert!(!Rc::ptr_eq(&old, &guest.page));
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1));
    assert_eq!(rig.world.xen.mapped(NIC.parse().unwrap()), []);
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0);
    assert_eq!(guest.read(&mut rig, 0, 4, 2), fresh);
    guest.enable(&mut rig);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]).map(|vectors| vectors.len()), Ok(2));
}

/// The same where the new ring has the numbers of the old one: a kernel that starts in place counts from the start. The
/// page that was mapped is the old kernel's.
#[test]
fn a_frontend_that_starts_anew_with_the_same_numbers_gets_its_new_page() {
    for between in ["4", "7"] {
        let mut rig = boot(ONE);
        let mut guest = connected(&mut rig, 1, &[NIC]);
        guest.set_front("state", between);
        rig.settle();
        guest.ring = (guest.ring.0 - 1, guest.ring.1 - 1);
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "the page of before is no longer looked at");
        assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1));
    }
}

/// A guest that is restored has another number, and no nodes: for the backend the old one has ended, and what is
/// attached to the new one has nothing of it.
#[test]
fn a_guest_that_comes_back_under_another_number_begins_from_the_start() {
    let mut rig = boot_with(Card::FULL);
    let saved = connected(&mut rig, 1, &[NIC]);
    let fresh = saved.read(&mut rig, 0, 4, 2);
    saved.enable(&mut rig);
    assert_eq!(saved.enable_msix(&mut rig, &[0]).map(|vectors| vectors.len()), Ok(1));
    // It is suspended: its vCPUs stand still, its nodes stay. That may take as long as it likes.
    let operations = rig.world.operations.get();
    rig.pass(600_000 * MS);
    assert_eq!((rig.world.operations.get(), rig.state(NIC).as_str()), (operations, "in-use"));
    saved.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready");
    let restored = connected(&mut rig, 2, &[NIC]);
    assert_eq!(restored.read(&mut rig, 0, 4, 2), fresh);
    assert_eq!(rig.world.xen.mapped(NIC.parse().unwrap()), []);
    assert_eq!(saved.back("state"), None);
}

/// Two driver domains in turn under one guest: what the first left of `root-N` and `vdev-N` is not what counts.
#[test]
fn what_a_former_driver_domain_published_is_written_anew() {
    let world: Rc<World> = Rc::default();
    let mut rig = boot_in(world, ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.set_back("vdev-0", "0000:00:1f.00");
    guest.set_back("root-0", "0005:05");
    guest.set_back("root_num", "9");
    guest.set_back("state-0", "1");
    guest.set_back("state", "1");
    rig.settle();
    assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:00.00"));
    assert_eq!((guest.back("root_num"), guest.back("root-0")), (Some("1".into()), Some("0000:00".into())));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}
