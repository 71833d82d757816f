//! Reports of users of PCI passthrough, each as a small test; those about a subject that has a file of its own stand
//! there. The list of all, with their sources and tests: docs/cases.md.

use crate::model;

use std::rc::Rc;

use model::hardware::{MS, at};
use model::images::{self, Image, Kind};
use model::logs::{heard, listen};
use model::{Card, Guest, NIC, ONE, OTHER, Rig, TWO, World, boot, boot_in, boot_with};

/// A guest that is listed with `NIC` and this `opts-0`, and connected.
fn with_options(rig: &mut Rig, id: u16, options: &str) -> Guest {
    let mut guest = rig.attach(id, &[]);
    guest.list(0, NIC);
    guest.set_back("opts-0", options);
    guest.set_back("num_devs", "1");
    guest.set_back("state", "7");
    rig.settle();
    guest.connect(rig);
    guest
}

// Case 24: QubesOS issues 8414 and 3476: the option was set, and did not arrive; elsewhere it arrived where it was not
// set. It counts as a whole word with the value 1, and nothing else does.
#[test]
fn case_24_permissive_of_opts_counts_as_a_whole_word() {
    let mut rig = boot(ONE);
    for (id, (options, permissive)) in [
        ("msitranslate=0,power_mgmt=0,permissive=1,rdm_policy=strict", true),
        ("permissive=1", true),
        ("msitranslate=1,power_mgmt=1,permissive=0,rdm_policy=relaxed", false),
        ("permissive=10", false),
        ("xpermissive=1", false),
        ("permissive", false),
        ("colour=red,,=,permissive=1", true),
        ("", false),
    ]
    .into_iter()
    .enumerate()
    {
        let guest = with_options(&mut rig, id as u16 + 1, options);
        rig.hardware(NIC).set_word(0x80, 0);
        assert_eq!(guest.write(&mut rig, 0, 0x80, 2, 0x1234), 0);
        assert_eq!(rig.hardware(NIC).word(0x80) == 0x1234, permissive, "{options:?}");
        guest.destroy(&mut rig);
    }
}

// Case 29: XSA-126 and XSA-120: the host dies of a guest's access to memory that is not decoded. Decoding goes on;
// bus mastering is the guest's own, whatever it does to decoding.
#[test]
fn case_29_bus_mastering_follows_its_own_bit() {
    let mut rig = boot(ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for (value, held) in [(0x0006, 6), (0x0004, 6), (0x0007, 7), (0x0003, 3), (0x0000, 3), (0x0004, 7)] {
        assert_eq!(guest.write(&mut rig, 0, 4, 2, value), 0);
        // Memory and ports were on before the guest came.
        assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 7, held | 3, "{value:#x}");
        assert_eq!(guest.read(&mut rig, 0, 4, 2), Ok(value));
    }
}

// Case 44: Linux, April 2021, "reconfigure also from backend watch handler": the toolstack writes one device after the
// other; the first write starts the backend, and the others were never looked at.
#[test]
fn case_44_functions_that_are_written_one_by_one_are_all_exported() {
    for states in [["7", "7"], ["1", "1"], ["", ""]] {
        let mut rig = boot(TWO);
        let mut guest = rig.attach(1, &[]);
        for (index, sbdf) in [NIC, OTHER].into_iter().enumerate() {
            guest.list(index, sbdf);
            guest.set_back("num_devs", &(index + 1).to_string());
            if !states[index].is_empty() {
                guest.set_back("state", states[index]);
            }
            rig.settle();
        }
        guest.connect(&mut rig);
        for (node, value) in
            [("vdev-0", "0000:00:00.00"), ("vdev-1", "0000:00:01.00"), ("state-0", "3"), ("state-1", "3")]
        {
            assert_eq!(guest.back(node).as_deref(), Some(value), "{node} after {states:?}");
        }
        assert_eq!([0, 8].map(|devfn| guest.read(&mut rig, devfn, 0, 2)), [Ok(0x8086); 2], "{states:?}");
    }
}

// Case 47: QubesOS issue 8793: a toolstack that unmaps before the backend does, or after it: the device was left in
// quarantine and the next start failed. What is not mapped any more is no error, in either order.
#[test]
fn case_47_vectors_that_somebody_else_has_unmapped_are_no_error() {
    let mut rig = boot_with(Card::FULL);
    let mut first = None;
    for id in 1..4 {
        let mut guest = rig.attach(id, &[NIC]);
        guest.connect(&mut rig);
        guest.enable(&mut rig);
        let vectors = guest.enable_msix(&mut rig, &[0, 1, 2]).expect("three vectors");
        // The same every time.
        assert_eq!(*first.get_or_insert(vectors.clone()), vectors, "guest {id}");
        rig.world.as_dom0(|xen| xen.unmap(id, vectors[usize::from(id - 1)])).expect("dom0 may");
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "guest {id}");
    }
}

// Case 52: pcifront waits for two seconds, whatever its device does: a read of vital product data that never ends is
// the guest's to wait for, not the backend's.
#[test]
fn case_52_a_vpd_read_that_never_ends_holds_nobody_up() {
    for image in [&images::SAS2008, &images::CX3] {
        let world: Rc<World> = Rc::default();
        let card = world.plug(NIC, image.build());
        let mut rig = boot_in(world, ONE);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        let vpd = u16::from(image.find(0x03).expect("vital product data"));
        let start = rig.world.now.get();
        assert_eq!(guest.write(&mut rig, 0, i32::from(vpd) + 2, 2, 0x0010), 0);
        assert_eq!(card.word(vpd + 2), 0x0010, "the device is asked");
        for _ in 0..100 {
            assert_eq!(guest.read(&mut rig, 0, i32::from(vpd) + 2, 2), Ok(0x0010), "and is not done");
        }
        assert_eq!(guest.read(&mut rig, 0, i32::from(vpd) + 4, 4), Ok(0));
        assert_eq!(rig.world.now.get(), start, "{}: no request waited", image.name);
    }
}

// Case 52: a device that does not answer any more.
#[test]
fn case_52_a_device_that_does_not_answer_is_answered_for_at_once() {
    let mut rig = boot(TWO);
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    rig.hardware(NIC).vanish();
    let start = rig.world.now.get();
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(u32::MAX));
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-6));
    assert_eq!(guest.read(&mut rig, 8, 0, 2), Ok(0x8086), "the other one is served");
    assert!(rig.world.now.get() - start < 1000 * MS);
    rig.hardware(NIC).come_back();
}

// Case 59: "Support device passthrough when dom0 is PVH on Xen", November 2023: the number of a line is not the number
// of its interrupt, and one was taken for the other. The guest reads the number that the toolstack mapped for it, never
// what firmware left in the register.
#[test]
fn case_59_the_interrupt_line_reads_what_the_toolstack_mapped() {
    for (irq, line) in [(Some("38"), 38), (Some("254"), 254), (Some("0"), 0), (None, 0)] {
        let mut rig = boot(ONE);
        assert_eq!(rig.hardware(NIC).word(0x3c) & 0xff, 11, "firmware's");
        let mut guest = rig.attach(1, &[]);
        guest.list(0, NIC);
        match irq {
            Some(irq) => guest.set_back("irq-0", irq),
            None => drop(rig.world.remove("backend/pci/1/0/irq-0")),
        }
        guest.set_back("num_devs", "1");
        guest.set_back("state", "7");
        rig.settle();
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0x3c, 1), Ok(line), "{irq:?}");
        assert_eq!(guest.write(&mut rig, 0, 0x3c, 1, 11), 0);
        assert_eq!(guest.read(&mut rig, 0, 0x3c, 1), Ok(line), "{irq:?}: it is not the guest's to write");
        // What MSI gives way to is the same line.
        assert_eq!(guest.disable_msi(&mut rig), line, "{irq:?}");
    }
}

// Case 63: xen-devel, April 2022, "pci-phantom": a card whose requests carry the numbers of functions that do not show
// themselves. A guest cannot turn that on, nor longer tags; and what does not show itself is not given away.
#[test]
fn case_63_phantom_functions_are_neither_turned_on_nor_given_away() {
    const PHANTOM: Image = Image {
        name: "phantom functions",
        // Device Capabilities, bits 4 and 3: the two highest bits of the function number; bit 5: long tags.
        list: &[(0x40, Kind::Express(0x0002, 0x8fc2 | 2 << 3 | 1 << 5))],
        reset: "dom0",
        ..images::GT218_SOUND
    };
    let world: Rc<World> = Rc::default();
    let card = world.plug("0000:04:00.0", PHANTOM.build());
    world.plug("0000:04:00.4", PHANTOM.build()).vanish();
    let mut rig = boot_in(world, "dev=0000:04:00.0 dev=0000:04:00.4");
    assert!(rig.reason("0000:04:00.4").contains("no device answers"));
    let mut guest = rig.attach(1, &["0000:04:00.0"]);
    guest.connect(&mut rig);
    let before = card.word(0x48);
    assert_eq!(before & 0x0300, 0, "off as firmware leaves it");
    for value in [0x0100, 0x0200, 0x0300, 0xffff] {
        assert_eq!(guest.write(&mut rig, 0, 0x48, 2, value), 0, "dropped");
        assert_eq!(card.word(0x48), before, "{value:#x}");
    }
}

// Case 23: xen-devel, September 2021, an I350's virtual function: a dropped write is told once, and what follows it
// works.
#[test]
fn case_23_after_a_dropped_write_the_next_ones_work() {
    listen();
    let world: Rc<World> = Rc::default();
    let card = world.plug(NIC, images::I82576.build());
    let mut rig = boot_in(world, ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    for _ in 0..5 {
        assert_eq!(guest.write(&mut rig, 0, 0x1d6, 2, 0x001d), 0);
    }
    assert_eq!(card.word(0x1d6), 0);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(card.word(at::COMMAND) & 6, 6);
    let told: Vec<String> = heard().into_iter().filter(|line| line.contains("no rule allows")).collect();
    assert_eq!(told.len(), 1, "{told:#?}");
    assert!([NIC, "0x1d6", "2 bytes"].iter().all(|what| told[0].contains(what)), "{told:#?}");
}
