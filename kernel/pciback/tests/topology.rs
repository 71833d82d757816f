//! Where a guest sees its functions, and what it gets for every other address: `topology=vpci` and
//! `topology=passthrough`, as pcifront scans them. Cases are real reports; each names where it was told.

use crate::model;

use std::rc::Rc;

use model::{Card, Guest, Hardware, NIC, OTHER, Rig, World, boot_in};
use pciback::sbdf::Sbdf;
use pciback::wire::{MsixEntry, RawRequest, op};

/// The ECAM windows of the segments above 0 that the tests use.
const SEGMENTS: &str = "ecam=0002:00-ff@c0000000 ecam=ffff:00-ff@d0000000";

/// A driver domain that owns these functions. Each tells its place in the list at offset 0x2c.
fn boot(topology: &str, functions: &[&str]) -> Rig {
    let world: Rc<World> = Rc::default();
    for (index, sbdf) in functions.iter().enumerate() {
        let card = Card::PLAIN.build();
        card.bytes.borrow_mut()[0x2c] = index as u8;
        world.plug(sbdf, card);
    }
    let words: String = functions.iter().map(|sbdf| format!(" dev={sbdf}")).collect();
    boot_in(world, &format!("{SEGMENTS} topology={topology}{words}"))
}

fn read(rig: &mut Rig, guest: &Guest, (domain, bus, devfn): (u32, u32, u32), offset: i32) -> Result<u32, i32> {
    let reply = guest.request(rig, RawRequest { domain, bus, devfn, offset, size: 1, ..Default::default() });
    if reply.err == 0 { Ok(reply.value) } else { Err(reply.err) }
}

/// A guest's address of three numbers.
fn parts(text: &str) -> (u32, u32, u32) {
    let sbdf: Sbdf = text.parse().unwrap();
    (sbdf.segment().into(), sbdf.bus().into(), sbdf.devfn().into())
}

/// The roots as pcifront reads them.
fn roots(guest: &Guest) -> Vec<String> {
    let count: usize = guest.back("root_num").expect("root_num").parse().expect("a number");
    (0..count).map(|number| guest.back(&format!("root-{number}")).expect("a root")).collect()
}

/// What pcifront's scan finds: it asks for all 256 functions of each root.
fn scan(rig: &mut Rig, guest: &Guest) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for root in roots(guest) {
        let (domain, bus, _) = parts(&format!("{root}:00.0"));
        for devfn in 0..256 {
            match read(rig, guest, (domain, bus, devfn), 0x2c) {
                Ok(mark) => found.push((format!("{root}:{:02x}.{}", devfn >> 3, devfn & 7), mark)),
                Err(error) => assert_eq!(error, -1),
            }
        }
    }
    found
}

/// The toolstack adds a function to the list of a guest that is connected, and the guest goes along.
fn hot_plug(rig: &mut Rig, guest: &Guest, index: usize, sbdf: &str) {
    guest.list(index, sbdf);
    guest.set_back("num_devs", &(index + 1).to_string());
    reconfigure(rig, guest);
}

fn reconfigure(rig: &mut Rig, guest: &Guest) {
    guest.set_back("state", "7");
    rig.settle();
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("8"));
    guest.set_front("state", "4");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("4"));
}

/// Cases 18, 55 and 56, QubesOS issues 5615, 9853 and 10393: buses above 0x7f, segments above 0, a function without
/// its function 0.
#[test]
fn with_passthrough_the_scan_finds_every_function_at_the_hosts_address_and_nothing_else() {
    let all = ["0000:00:02.4", "0000:52:00.0", "0000:80:14.0", "0002:01:00.0", "0002:80:14.3", "ffff:ff:1f.7"];
    let mut rig = boot("passthrough", &all);
    let mut guest = rig.attach(1, &all);
    for (index, sbdf) in all.iter().enumerate() {
        let (address, function) = sbdf.rsplit_once('.').unwrap();
        assert_eq!(guest.back(&format!("vdev-{index}")), Some(format!("{address}.0{function}")));
    }
    assert_eq!(roots(&guest), ["0000:00", "0000:52", "0000:80", "0002:01", "0002:80", "ffff:ff"]);
    guest.connect(&mut rig);
    let wanted: Vec<_> = all.iter().enumerate().map(|(mark, sbdf)| (sbdf.to_string(), mark as u32)).collect();
    assert_eq!(scan(&mut rig, &guest), wanted);
}

/// Reference bug: Linux masks the slot and compares what is left, so that other addresses answer for a function.
#[test]
fn no_address_aliases_into_a_function_in_either_topology() {
    for (topology, sbdf, place) in
        [("vpci", "0000:80:14.0", (0, 0, 0)), ("passthrough", "0002:80:14.0", (2, 0x80, 0xa0))]
    {
        let mut rig = boot(topology, &[sbdf]);
        let mut guest = rig.attach(1, &[sbdf]);
        guest.connect(&mut rig);
        assert_eq!(read(&mut rig, &guest, place, 0x2c), Ok(0));
        let (domain, bus, devfn) = place;
        for wrong in [
            (domain ^ 1, bus, devfn),
            (domain, bus ^ 0x80, devfn),
            (domain, bus, devfn ^ 1),
            (domain | 0x1_0000, bus, devfn),
            (domain | 0x8000_0000, bus, devfn),
            (domain, bus | 0x100, devfn),
            (domain, bus, devfn | 0x100),
            (domain, bus, devfn | 0x8000_0000),
            (u32::MAX, u32::MAX, u32::MAX),
        ] {
            assert_eq!(read(&mut rig, &guest, wrong, 0x2c), Err(-1), "{topology}: {wrong:x?}");
            let (domain, bus, devfn) = wrong;
            for cmd in [op::CONF_WRITE, op::ENABLE_MSI, op::DISABLE_MSI, op::ENABLE_MSIX, op::DISABLE_MSIX, 77] {
                let request = RawRequest { cmd, domain, bus, devfn, size: 4, value: 1, ..Default::default() };
                assert_eq!(guest.request(&mut rig, request).err, -1, "{topology}: operation {cmd} at {wrong:x?}");
            }
        }
    }
}

/// Case 56: the host's segment and bus must reach Xen in full, whatever the guest calls the function.
#[test]
fn vectors_are_mapped_for_the_hosts_address_in_either_topology() {
    for (topology, place) in [("vpci", (0, 0, 0)), ("passthrough", (2, 0x80, 0xa0))] {
        let mut rig = boot(topology, &["0002:80:14.0"]);
        let mut guest = rig.attach(1, &["0002:80:14.0"]);
        guest.connect(&mut rig);
        let (domain, bus, devfn) = place;
        let there = RawRequest { domain, bus, devfn, ..Default::default() };
        let decode = RawRequest { cmd: op::CONF_WRITE, offset: 4, size: 2, value: 6, ..there };
        assert_eq!(guest.request(&mut rig, decode).err, 0);
        *guest.page.entries.borrow_mut() = vec![MsixEntry { vector: 0xffff, entry: 3 }];
        assert_eq!(guest.request(&mut rig, RawRequest { cmd: op::ENABLE_MSIX, value: 1, ..there }).err, 0);
        let mapped = rig.world.xen.mapped("0002:80:14.0".parse().unwrap());
        assert_eq!(mapped.iter().map(|(guest, _, entry)| (*guest, *entry)).collect::<Vec<_>>(), [(1, 3)]);
    }
}

/// pcifront reads the roots again when the backend says Reconfigured: the new one has to be there by then.
#[test]
fn with_passthrough_a_hot_plugged_function_brings_its_root() {
    let all = ["0000:01:00.0", "0002:80:14.0", "0000:01:00.1"];
    let mut rig = boot("passthrough", &all);
    let mut guest = rig.attach(1, &all[..1]);
    guest.connect(&mut rig);
    assert_eq!(roots(&guest), ["0000:01"]);
    guest.list(1, all[1]);
    guest.set_back("num_devs", "2");
    guest.set_back("state", "7");
    rig.settle();
    assert_eq!(roots(&guest), ["0000:01"], "the guest has not been asked yet");
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(guest.back("state").as_deref(), Some("8"));
    assert_eq!(roots(&guest), ["0000:01", "0002:80"]);
    guest.set_front("state", "4");
    rig.settle();
    hot_plug(&mut rig, &guest, 2, all[2]);
    assert_eq!(roots(&guest), ["0000:01", "0002:80"], "its bus is a root already");
    let wanted = [(all[0].to_string(), 0), (all[2].to_string(), 2), (all[1].to_string(), 1)];
    assert_eq!(scan(&mut rig, &guest), wanted);

    // It leaves again. A root never does: the guest knows the others by their numbers.
    guest.set_back("state-1", "5");
    reconfigure(&mut rig, &guest);
    guest.withdraw(1);
    rig.settle();
    assert_eq!(roots(&guest), ["0000:01", "0002:80"]);
    assert_eq!(read(&mut rig, &guest, parts(all[1]), 0x2c), Err(-1));
    assert_eq!(read(&mut rig, &guest, parts(all[2]), 0x2c), Ok(2));
}

/// Without `root_num` pcifront would complain and scan 0000:00.
#[test]
fn with_passthrough_and_no_function_yet_there_is_no_root() {
    let mut rig = boot("passthrough", &[NIC]);
    let mut guest = rig.attach(1, &[]);
    assert_eq!(guest.back("root_num").as_deref(), Some("0"));
    guest.connect(&mut rig);
    hot_plug(&mut rig, &guest, 0, NIC);
    assert_eq!(scan(&mut rig, &guest), [(NIC.to_string(), 0)]);
}

/// A function that is refused must not leave a bus for the guest to scan.
#[test]
fn with_passthrough_a_refused_function_is_no_root() {
    let mut rig = boot("passthrough", &[NIC, OTHER]);
    let mut owner = rig.attach(2, &[OTHER]);
    owner.connect(&mut rig);
    let guest = rig.attach(1, &[NIC, OTHER]);
    assert_eq!((guest.back("state-0").as_deref(), guest.back("state-1").as_deref()), (Some("3"), Some("6")));
    assert_eq!(roots(&guest), ["0000:01"]);
}

/// Two guests of one driver domain: each sees its own at the host's address, and nothing of the other's.
#[test]
fn with_passthrough_the_others_address_is_no_device() {
    let mut rig = boot("passthrough", &[NIC, OTHER]);
    let mut guests = [rig.attach(1, &[NIC]), rig.attach(2, &[OTHER])];
    for guest in &mut guests {
        guest.connect(&mut rig);
    }
    let [first, second] = guests;
    assert_eq!(scan(&mut rig, &first), [(NIC.to_string(), 0)]);
    assert_eq!(scan(&mut rig, &second), [(OTHER.to_string(), 1)]);
    assert_eq!(read(&mut rig, &first, parts(OTHER), 0x2c), Err(-1));
    assert_eq!(read(&mut rig, &second, parts(NIC), 0x2c), Err(-1));
}

/// The multifunction bit is the truth about the slot as the guest sees it.
#[test]
fn the_multifunction_bit_follows_the_functions_in_the_slot_in_either_topology() {
    for (topology, places) in [("vpci", [(0, 0, 0), (0, 0, 3)]), ("passthrough", [(0, 1, 0), (0, 1, 3)])] {
        let mut rig = boot(topology, &[NIC, "0000:01:00.3"]);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        assert_eq!(read(&mut rig, &guest, places[0], 0x0e), Ok(0), "{topology}");
        hot_plug(&mut rig, &guest, 1, "0000:01:00.3");
        for place in places {
            assert_eq!(read(&mut rig, &guest, place, 0x0e), Ok(0x80), "{topology}: {place:?}");
        }
        guest.set_back("state-1", "5");
        reconfigure(&mut rig, &guest);
        assert_eq!(read(&mut rig, &guest, places[0], 0x0e), Ok(0), "{topology}");
    }
}

/// Case 54: with vpci a function alone becomes function 0, which every scan finds. With its function 0 it keeps
/// its number, in whatever order the toolstack lists them (libxl lists `.*` from function 7 down).
#[test]
fn functions_of_one_device_keep_their_numbers_in_any_order_of_the_list() {
    let all = ["0000:05:00.2", "0000:05:00.1", "0000:05:00.0"];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut rig = boot("vpci", &all);
        let mut guest = rig.attach(1, &order.map(|index| all[index]));
        guest.connect(&mut rig);
        let found: Vec<_> = scan(&mut rig, &guest);
        let wanted = [("0000:00:00.0", 2), ("0000:00:00.1", 1), ("0000:00:00.2", 0)];
        assert_eq!(found, wanted.map(|(place, mark)| (place.to_string(), mark)), "{order:?}");
    }
    let mut rig = boot("vpci", &all);
    let mut guest = rig.attach(1, &all[..1]);
    guest.connect(&mut rig);
    assert_eq!(scan(&mut rig, &guest), [("0000:00:00.0".to_string(), 0)]);
}

/// A slot whose function 0 cannot be had would be one that ordinary scans skip.
#[test]
fn a_function_0_that_is_broken_or_anothers_is_not_waited_for() {
    for words in [
        "dev=0000:05:00.0,guest=guest1,id=1234:5678 dev=0000:05:00.1,guest=guest1",
        "dev=0000:05:00.0 dev=0000:05:00.1",
    ] {
        let mut rig = boot_in(Rc::default(), words);
        let _owner = rig.attach(2, &["0000:05:00.0"]);
        let guest = rig.attach(1, &["0000:05:00.1", "0000:05:00.0"]);
        assert_eq!(guest.back("vdev-0").as_deref(), Some("0000:00:00.00"), "{words}");
        assert_eq!(guest.back("state-1").as_deref(), Some("6"), "{words}");
    }
}

#[test]
fn a_wished_slot_holds_the_function_and_its_siblings() {
    let mut rig = boot_in(Rc::default(), "dev=0000:05:00.0,slot=1f dev=0000:05:00.1 dev=0000:06:00.0");
    let guest = rig.attach(1, &["0000:06:00.0", "0000:05:00.0", "0000:05:00.1"]);
    let places = [0, 1, 2].map(|index| guest.back(&format!("vdev-{index}")).expect("an address"));
    assert_eq!(places, ["0000:00:00.00", "0000:00:1f.00", "0000:00:1f.01"]);
}

/// Reference bug: a function for which there is no slot stays claimed, and takes the guest's whole bus down.
#[test]
fn a_full_bus_refuses_the_one_function_that_has_no_room_and_nothing_else() {
    let all: Vec<String> = (0..33).map(|bus| format!("0000:{:02x}:00.0", bus + 1)).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut rig = boot("vpci", &all);
    let mut guest = rig.attach(1, &all[..32]);
    guest.connect(&mut rig);
    hot_plug(&mut rig, &guest, 32, all[32]);
    assert_eq!(guest.back("state-32").as_deref(), Some("6"));
    assert!(guest.back("error-32").expect("a reason").contains("virtual bus is full"));
    assert_eq!(guest.back("vdev-32"), None);
    assert_eq!(rig.state(all[32]), "ready", "another guest may have it");
    assert_eq!(scan(&mut rig, &guest).len(), 32);

    // Another guest has it, and gives it back; then a slot is free, and this guest can have it.
    let mut other = rig.attach(2, &all[32..]);
    other.connect(&mut rig);
    assert_eq!(scan(&mut rig, &other), [("0000:00:00.0".to_string(), 32)]);
    other.destroy(&mut rig);
    guest.set_back("state-7", "5");
    reconfigure(&mut rig, &guest);
    guest.withdraw(7);
    rig.settle();
    hot_plug(&mut rig, &guest, 31, all[32]);
    assert_eq!(guest.back("vdev-31").as_deref(), Some("0000:00:07.00"));
    assert_eq!(guest.back("error-31"), None);
    assert_eq!(scan(&mut rig, &guest).len(), 32);
}

/// Case 55's second half: what opens `vdev-N` literally finds the function, also after the frontend came anew.
#[test]
fn an_address_stays_the_same_while_the_guest_has_the_function() {
    for topology in ["vpci", "passthrough"] {
        let all = ["0000:00:02.4", "0000:00:1f.6"];
        let mut rig = boot(topology, &all);
        let mut guest = rig.attach(1, &all);
        let before = [0, 1].map(|index| guest.back(&format!("vdev-{index}")).expect("an address"));
        for state in ["6", "5", "3"] {
            guest.connect(&mut rig);
            for (mark, place) in before.iter().enumerate() {
                let (address, function) = place.rsplit_once('.').unwrap();
                let place =
                    parts(&format!("{address}.{}", function.trim_start_matches('0').parse::<u8>().unwrap_or(0)));
                assert_eq!(read(&mut rig, &guest, place, 0x2c), Ok(mark as u32), "{topology}");
            }
            if state != "3" {
                guest.set_front("state", state);
                rig.settle();
            }
        }
        assert_eq!([0, 1].map(|index| guest.back(&format!("vdev-{index}")).expect("an address")), before);
    }
}

/// A bridge has nothing for a guest, and Linux's test for one (`class >> 24`) is never true.
#[test]
fn a_bridge_is_exported_in_neither_topology() {
    for topology in ["vpci", "passthrough"] {
        let world: Rc<World> = Rc::default();
        let bridge = Hardware::card(0x8086, 0xa110);
        bridge.bytes.borrow_mut()[0x0a..0x0f].copy_from_slice(&[4, 6, 0, 0, 1]);
        world.plug("0000:00:1c.0", bridge);
        let mut rig = boot_in(world, &format!("topology={topology} dev=0000:00:1c.0 dev={NIC}"));
        let mut guest = rig.attach(1, &["0000:00:1c.0", NIC]);
        assert_eq!((guest.back("state-0").as_deref(), guest.back("state-1").as_deref()), (Some("6"), Some("3")));
        assert!(guest.back("error-0").expect("a reason").contains("it is a bridge"));
        guest.connect(&mut rig);
        assert_eq!(scan(&mut rig, &guest).len(), 1);
    }
}

/// A wish for a slot has no meaning there: the entry is refused, so that nobody gets the function elsewhere.
#[test]
fn with_passthrough_an_entry_with_a_slot_is_refused_and_the_others_are_served() {
    let mut rig = boot_in(Rc::default(), &format!("topology=passthrough dev={NIC},slot=3 dev={OTHER}"));
    assert_eq!(rig.world.get("data/pciback/complaints").as_deref(), Some("1"));
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    assert!(guest.back("error-0").expect("a reason").contains("not this driver domain's"));
    guest.connect(&mut rig);
    assert_eq!(scan(&mut rig, &guest).into_iter().map(|(place, _)| place).collect::<Vec<_>>(), [OTHER]);
}

/// Case 55, QubesOS issue 9853: Linux puts the VF 00:02.4 beside its PF, or alone at function 4.
#[test]
fn virtual_functions_are_devices_of_their_own_for_the_guest() {
    for with_pf in [true, false] {
        let world: Rc<World> = Rc::default();
        for sbdf in ["0000:00:02.1", "0000:00:02.4"] {
            world.plug(sbdf, Hardware::virtual_function(0x8086, 0x4680));
        }
        let words = "dev=0000:00:02.0 dev=0000:00:02.1,id=8086:4680 dev=0000:00:02.4,id=8086:4680";
        let mut rig = boot_in(world, words);
        let list = ["0000:00:02.0", "0000:00:02.1", "0000:00:02.4"];
        let mut guest = rig.attach(1, if with_pf { &list } else { &list[1..] });
        guest.connect(&mut rig);
        let found: Vec<u32> = (0..256).filter(|devfn| guest.read(&mut rig, *devfn, 0, 4).is_ok()).collect();
        assert_eq!(found, if with_pf { vec![0x00, 0x08, 0x10] } else { vec![0x00, 0x08] });
        for devfn in found {
            assert_eq!(guest.read(&mut rig, devfn, 0x0e, 1), Ok(0), "alone in its slot");
        }
    }
}
