//! The xenbus life cycle against a model of toolstack and pcifront.

use crate::model;

use model::{NIC, ONE, boot, boot_in};

#[test]
fn a_guest_attaches_connects_and_reads_its_card() {
    let mut rig = boot(ONE);
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    assert_eq!(rig.world.get("data/pciback/state").as_deref(), Some("ready"));
    let mut guest = rig.attach(1, &[NIC]);
    assert_eq!(guest.back("state").as_deref(), Some("3"));
    assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:00.00"));
    assert_eq!(guest.back("state-0").as_deref(), Some("3"));
    assert_eq!((guest.back("root_num"), guest.back("root-0")), (Some("1".into()), Some("0000:00".into())));
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("in-use"));
    assert_eq!(rig.published(NIC, "frontend").as_deref(), Some("1"));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert_eq!(guest.read(&mut rig, 0, 0x3c, 1), Ok(21), "the interrupt line is the guest's pirq");
}

#[test]
fn the_scan_of_pcifront_finds_exactly_the_exported_functions() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:01:00.1 dev=0000:02:00.0");
    let mut guest = rig.attach(1, &[NIC, "0000:01:00.1", "0000:02:00.0"]);
    guest.connect(&mut rig);
    let found: Vec<u32> = (0..256).filter(|devfn| guest.read(&mut rig, *devfn, 0, 4).is_ok()).collect();
    // Without guest= nobody says that 01:00.0 goes to the same guest; it came first, though.
    assert_eq!(found, [0x00, 0x01, 0x08]);
    assert_eq!(guest.read(&mut rig, 0x00, 0x0e, 1), Ok(0x80), "two functions share the slot");
    assert_eq!(guest.read(&mut rig, 0x08, 0x0e, 1), Ok(0x00));
    for devfn in [0x100, 0x1ff, u32::MAX] {
        assert_eq!(guest.read(&mut rig, devfn, 0, 4), Err(-1));
    }
}

/// xen-pciback has no way back from Closed: a module that is loaded again finds a dead backend.
#[test]
fn a_frontend_that_closed_can_open_again() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    for round in 0..3 {
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "round {round}");
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0007), 0);
        assert_eq!(rig.hardware(NIC).word(4) & 4, 4);
        guest.set_front("state", "5");
        rig.settle();
        assert_eq!(guest.back("state").as_deref(), Some("5"));
        guest.set_front("state", "6");
        rig.settle();
        assert_eq!(guest.back("state").as_deref(), Some("3"), "ready for the next");
        assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
        assert_eq!(rig.hardware(NIC).word(4) & 7, 3, "bus mastering is off, decoding is not");
    }
    assert_eq!(rig.world.order.borrow()[..2], ["close", "unmap"], "no event comes in for a page that is gone");
}

/// A module unload goes straight to Closed.
#[test]
fn a_frontend_that_goes_straight_to_closed_can_open_again() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("3"));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

#[test]
fn with_online_0_closed_is_the_end() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.set_back("online", "0");
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("6"));
}

/// A guest that crashes and loads a new kernel in place does not close first.
#[test]
fn a_frontend_that_starts_anew_without_closing_gets_its_new_page() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1));
}

#[test]
fn a_guest_destroyed_in_the_middle_of_a_request_frees_its_card_for_the_next() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    guest.page.flags.set(3);
    guest.destroy(&mut rig);
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    assert_eq!(rig.published(NIC, "frontend"), None);
    assert_eq!(guest.back("state"), None, "nothing of it is left");
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
    assert_eq!(rig.hardware(NIC).word(4) & 4, 0);
    let mut second = rig.attach(2, &[NIC]);
    second.connect(&mut rig);
    assert_eq!(second.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
}

/// Reference bug: command shadow and permissive survive to the next guest.
#[test]
fn nothing_a_guest_set_reaches_the_next_guest() {
    let mut rig = boot(ONE);
    let mut first = rig.attach(1, &[NIC]);
    first.connect(&mut rig);
    let fresh = first.read(&mut rig, 0, 4, 2);
    assert_eq!(first.write(&mut rig, 0, 4, 2, 0x0547), 0);
    assert_eq!(first.write(&mut rig, 0, 0x10, 4, u32::MAX), 0);
    assert_ne!(first.read(&mut rig, 0, 4, 2), fresh);
    first.destroy(&mut rig);
    let mut second = rig.attach(2, &[NIC]);
    second.connect(&mut rig);
    assert_eq!(second.read(&mut rig, 0, 4, 2), fresh);
    assert_eq!(second.read(&mut rig, 0, 0x10, 4), Ok(0xfebc_0000), "no sizing is under way");
}

/// They count on over connections and guests, each function for itself, and no access publishes them.
#[test]
fn what_guests_ask_of_a_function_is_counted_from_the_start_on() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0 dev=0000:07:00.0");
    let told = |rig: &model::Rig| {
        let nodes = rig.backend.counters();
        let paths: Vec<&str> = nodes.iter().map(|(path, _)| path.as_str()).collect();
        let wanted = ["0000-01-00-0", "0000-02-00-0", "0000-07-00-0"];
        assert_eq!(paths, wanted.map(|folder| format!("data/pciback/device/{folder}/counters")));
        nodes.into_iter().map(|(_, value)| value).collect::<Vec<_>>()
    };
    assert_eq!(told(&rig), ["0 0 0 0"; 3]);
    let mut first = rig.attach(1, &[NIC]);
    first.connect(&mut rig);
    let before = rig.world.generation.get();
    assert_eq!(first.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert_eq!(first.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(first.write(&mut rig, 0, 0x80, 4, 0x1234), 0, "no rule allows it, and it is ignored");
    assert_eq!(first.read(&mut rig, 0, 0x1000, 4), Err(-2), "beyond the end");
    assert_eq!(first.operate(&mut rig, 99, 0, 0).err, -4, "no such operation");
    assert_eq!(first.read(&mut rig, 0x08, 0, 4), Err(-1), "no such function");
    assert_eq!(told(&rig), ["2 2 1 2", "0 0 0 0", "0 0 0 0"]);
    assert_eq!(rig.world.generation.get(), before, "nothing was written to xenstore");
    assert_eq!(rig.published(NIC, "counters"), None);
    first.connect(&mut rig);
    assert_eq!(first.read(&mut rig, 0, 0, 2), Ok(0x8086));
    first.destroy(&mut rig);
    let mut second = rig.attach(2, &[NIC, "0000:02:00.0"]);
    second.connect(&mut rig);
    assert_eq!(second.read(&mut rig, 0, 0, 2), Ok(0x8086));
    assert_eq!(second.write(&mut rig, 0x08, 4, 2, 0x0002), 0);
    assert_eq!(told(&rig), ["4 2 1 2", "0 1 0 0", "0 0 0 0"], "the last is not in the host");
}

#[test]
fn permissive_is_one_attachments_and_ends_with_it() {
    let mut rig = boot(ONE);
    let mut first = rig.attach(1, &[]);
    first.list(0, NIC);
    first.set_back("opts-0", "colour=red,permissive=1");
    first.set_back("num_devs", "1");
    rig.settle();
    first.set_back("state", "7");
    rig.settle();
    first.connect(&mut rig);
    assert_eq!(first.write(&mut rig, 0, 0x80, 4, 0x1234), 0);
    assert_eq!(rig.hardware(NIC).word(0x80), 0x1234);
    first.destroy(&mut rig);
    let mut second = rig.attach(2, &[NIC]);
    second.connect(&mut rig);
    assert_eq!(second.write(&mut rig, 0, 0x80, 4, 0x5678), 0);
    assert_eq!(rig.hardware(NIC).word(0x80), 0x1234);
}

#[test]
fn a_reboot_loop_with_new_domain_numbers_leaks_nothing() {
    let mut rig = boot(ONE);
    let first = rig.attach(1000, &[NIC]);
    first.destroy(&mut rig);
    let before = rig.world.nodes.borrow().len();
    for id in 1..200 {
        let mut guest = rig.attach(id, &[NIC]);
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
        guest.destroy(&mut rig);
    }
    assert_eq!(rig.world.nodes.borrow().len(), before);
    assert_eq!(rig.world.watches.borrow().len(), model::OWN_WATCHES);
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
}

#[test]
fn a_function_that_another_guest_has_is_refused_and_stays_where_it_is() {
    let mut rig = boot(ONE);
    let mut first = rig.attach(1, &[NIC]);
    first.connect(&mut rig);
    let second = rig.attach(2, &[NIC]);
    assert_eq!(second.back("state-0").as_deref(), Some("6"));
    assert!(second.back("error-0").expect("a reason").contains("domain 1 has it"));
    assert_eq!(first.read(&mut rig, 0, 0, 2), Ok(0x8086));
    first.destroy(&mut rig);
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
}

#[test]
fn hot_plug_and_unplug_while_connected() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.list(1, "0000:02:00.0");
    guest.set_back("num_devs", "2");
    guest.set_back("state", "7");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("7"), "the frontend is asked first");
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!((guest.back("state").as_deref(), guest.back("vdev-1").as_deref()), (Some("8"), Some("0000:00:01.00")));
    guest.set_front("state", "4");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("4"));
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));

    // Unplug the first, as libxl does; the list closes up afterwards.
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.settle();
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086), "still there until the guest let go");
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("8"));
    assert_eq!(guest.back("state-0").as_deref(), Some("6"));
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    guest.set_front("state", "4");
    rig.settle();
    for node in ["dev", "key", "opts", "id", "irq", "resource", "state", "vdev"] {
        if let Some(value) = guest.back(&format!("{node}-1")) {
            guest.set_back(&format!("{node}-0"), &value);
        }
        rig.world.remove(&format!("backend/pci/1/0/{node}-1"));
    }
    guest.set_back("num_devs", "1");
    rig.settle();
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Err(-1));
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086), "it kept its slot");
    assert_eq!(rig.published("0000:02:00.0", "state").as_deref(), Some("in-use"));
}

/// Linux, April 2021: the first node write started the backend, and the functions after it were lost.
#[test]
fn functions_added_before_the_frontend_connects_are_all_there() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut guest = rig.attach(1, &[NIC]);
    guest.list(1, "0000:02:00.0");
    guest.set_back("num_devs", "2");
    rig.settle();
    guest.connect(&mut rig);
    assert_eq!(guest.back("vdev-1").as_deref(), Some("0000:00:01.00"));
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086));
}

/// Reference bug: one bad hot-plugged function closes the guest's whole bus.
#[test]
fn a_function_that_cannot_be_exported_harms_no_other() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for (index, (name, told)) in
        [("0000:07:00.0", "not this driver domain's"), ("rubbish", "not a PCI address")].into_iter().enumerate()
    {
        let index = index + 1;
        guest.list(index, name);
        guest.set_back("num_devs", &(index + 1).to_string());
        guest.set_back("state", "7");
        rig.settle();
        guest.set_front("state", "7");
        rig.settle();
        assert_eq!(guest.back(&format!("state-{index}")).as_deref(), Some("6"));
        let error = guest.back(&format!("error-{index}")).expect("a reason");
        assert!(error.contains(told), "{error}");
        guest.set_front("state", "4");
        rig.settle();
        assert_eq!(guest.back("state").as_deref(), Some("4"));
        assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    }
}

#[test]
fn a_function_promised_to_one_guest_goes_to_no_other() {
    let mut rig = boot("dev=0000:01:00.0,guest=guest2");
    let other = rig.attach(1, &[NIC]);
    assert!(other.back("error-0").expect("a reason").contains("is for guest \"guest2\""));
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    let mut right = rig.attach(2, &[NIC]);
    right.connect(&mut rig);
}

#[test]
fn another_card_in_the_slot_is_refused_at_start_and_at_attach() {
    let rig = boot("dev=0000:01:00.0,id=8086:1533");
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("broken"));
    assert!(rig.published(NIC, "reason").expect("a reason").contains("8086:100e"));

    let mut rig = boot(ONE);
    let guest = rig.attach(1, &[]);
    guest.list(0, NIC);
    guest.set_back("id-0", "8086:1533");
    guest.set_back("num_devs", "1");
    guest.set_back("state", "7");
    rig.settle();
    assert!(guest.back("error-0").expect("a reason").contains("another card"));
}

#[test]
fn missing_and_malformed_nodes_of_the_toolstack_are_named() {
    for (node, value, told) in
        [("resource-0", "rubbish", "resource-0"), ("irq-0", "-1", "irq-0"), ("irq-0", "255", "irq-0")]
    {
        let mut rig = boot(ONE);
        let guest = rig.attach(1, &[]);
        guest.list(0, NIC);
        guest.set_back(node, value);
        guest.set_back("num_devs", "1");
        guest.set_back("state", "7");
        rig.settle();
        let error = guest.back("error-0").expect("a reason");
        assert!(error.contains(told), "{error}");
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
    }
    for count in ["", "-1", "257", "x"] {
        let mut rig = boot(ONE);
        let guest = rig.attach(1, &[]);
        guest.set_back("num_devs", count);
        guest.set_back("state", "1");
        rig.settle();
        assert!(guest.back("error").expect("a reason").contains("num_devs"), "{count:?}");
    }
    let mut rig = boot(ONE);
    let guest = rig.attach(1, &[]);
    guest.set_back("frontend", "/local/domain/2/device/pci/0");
    guest.set_back("state", "1");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("6"));
    assert!(guest.back("error").expect("a reason").contains("frontend"));
}

#[test]
fn a_frontends_faults_are_its_own_and_it_may_try_again() {
    for (node, value) in [
        ("magic", Some("8")),
        ("magic", None),
        ("pci-op-ref", Some("4000000")),
        ("pci-op-ref", Some("-1")),
        ("pci-op-ref", None),
        ("event-channel", Some("77")),
        ("event-channel", Some("1 ")),
        ("event-channel", None),
    ] {
        let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
        let mut good = rig.attach(2, &["0000:02:00.0"]);
        good.connect(&mut rig);
        let mut bad = rig.attach(1, &[NIC]);
        bad.publish(&mut rig);
        rig.world.nodes.borrow_mut().insert("/local/domain/1/device/pci/0/state".into(), "6".into());
        bad.set_front("state", "6");
        rig.settle();
        bad.set_front("magic", "7");
        match value {
            Some(value) => bad.set_front(node, value),
            None => drop(rig.world.remove(&format!("/local/domain/1/device/pci/0/{node}"))),
        }
        bad.set_front("state", "3");
        rig.settle();
        assert_eq!(bad.back("state").as_deref(), Some("6"), "{node} {value:?}");
        assert!(bad.back("error").is_some());
        assert!(rig.world.get("error/backend/pci/1/0/error").is_some());
        assert_eq!(good.read(&mut rig, 0, 0, 2), Ok(0x8086));
        assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1), "{node} {value:?}");
        bad.set_front("state", "1");
        rig.settle();
        bad.connect(&mut rig);
        assert_eq!(bad.back("error"), None);
        assert_eq!(bad.read(&mut rig, 0, 0, 2), Ok(0x8086));
    }
}

#[test]
fn sixty_four_guests_at_once_each_see_their_own_card() {
    let words: String = (0..64).map(|bus| format!("dev=0000:{bus:02x}:01.0 ")).collect();
    let world: std::rc::Rc<model::World> = Default::default();
    for bus in 0..64u8 {
        let sbdf = format!("0000:{bus:02x}:01.0").parse().unwrap();
        let card = model::Hardware::card(0x8086, 0x100e);
        card.bytes.borrow_mut()[0x2c] = bus;
        world.hardware.borrow_mut().insert(sbdf, std::rc::Rc::new(card));
    }
    let mut rig = boot_in(world, &words);
    let mut guests: Vec<_> =
        (0..64u16).map(|bus| rig.attach(bus + 1, &[format!("0000:{bus:02x}:01.0").as_str()])).collect();
    for guest in &mut guests {
        guest.connect(&mut rig);
    }
    assert_eq!(rig.backend.ports().count(), 64);
    for (bus, guest) in guests.iter().enumerate() {
        assert_eq!(guest.read(&mut rig, 0, 0x2c, 1), Ok(bus as u32));
    }
    // Every second one dies; the others go on.
    for guest in guests.iter().step_by(2) {
        guest.destroy(&mut rig);
    }
    for (bus, guest) in guests.iter().enumerate().skip(1).step_by(2) {
        assert_eq!(guest.read(&mut rig, 0, 0x2c, 1), Ok(bus as u32));
    }
    assert_eq!(rig.backend.ports().count(), 32);
}

#[test]
fn a_lost_xenstore_connection_loses_no_guest() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    let gone = rig.attach(2, &["0000:02:00.0"]);
    // The daemon forgets all watches; a guest dies unseen.
    rig.world.watches.borrow_mut().clear();
    gone.destroy(&mut rig);
    assert_eq!(rig.published("0000:02:00.0", "state").as_deref(), Some("in-use"));
    rig.backend.store_reconnected();
    rig.settle();
    assert_eq!(rig.published("0000:02:00.0", "state").as_deref(), Some("ready"));
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    guest.destroy(&mut rig);
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"), "the watches are back");
}

#[test]
fn while_xenstored_is_deaf_connected_guests_are_served() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    rig.world.deaf.set(true);
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
    rig.world.deaf.set(false);
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("3"));
}

#[test]
fn a_shutdown_tells_every_frontend_and_lets_go_of_everything() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0");
    let mut guests = [rig.attach(1, &[NIC]), rig.attach(2, &["0000:02:00.0"])];
    for guest in &mut guests {
        guest.connect(&mut rig);
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    }
    rig.backend.shutdown();
    for guest in &guests {
        assert_eq!(guest.back("state").as_deref(), Some("6"));
    }
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (0, 0));
    assert_eq!(rig.hardware(NIC).word(4) & 4, 0);
}

#[test]
fn folders_from_before_the_driver_domain_started_are_served() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    let world = rig.world.clone();
    drop(rig);
    world.watches.borrow_mut().clear();
    world.events.borrow_mut().clear();
    guest.set_back("state", "1");
    guest.set_back("state-0", "1");
    let mut rig = boot_in(world, ONE);
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

#[test]
fn a_bridge_the_host_bridge_and_an_empty_slot_are_broken_with_a_reason() {
    let world: std::rc::Rc<model::World> = Default::default();
    let put = |sbdf: &str, offset: usize, bytes: &[u8]| {
        let card = model::Hardware::card(0x8086, 0x100e);
        card.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        world.hardware.borrow_mut().insert(sbdf.parse().unwrap(), std::rc::Rc::new(card));
    };
    put("0000:00:00.0", 0, &[]);
    put("0000:00:1c.0", 0x0e, &[1]);
    put("0000:05:00.0", 0, &[0xff; 64]);
    let rig = boot_in(world.clone(), "dev=0000:00:00.0 dev=0000:00:1c.0 dev=0000:05:00.0 dev=0000:01:00.0");
    for sbdf in ["0000:00:00.0", "0000:00:1c.0", "0000:05:00.0"] {
        assert_eq!(rig.published(sbdf, "state").as_deref(), Some("broken"), "{sbdf}");
        assert!(rig.published(sbdf, "reason").is_some());
    }
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
}
