//! Virtual functions (SR-IOV 1.1, 3.4.1): their ids, addresses and decode bits are the physical function's.
//! Case 28: Linux's "xen/pciback: guest SR-IOV support for PV guest".

use crate::model;

use std::rc::Rc;

use model::hardware::{ENABLE, MASKALL, MS, Silence, at};
use model::{Hardware, NIC, Rig, World, boot_in};

const WITH_ID: &str = "dev=0000:01:00.0,id=8086:1520";

fn boot() -> Rig {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, Hardware::virtual_function(0x8086, 0x1520));
    boot_in(world, WITH_ID)
}

#[test]
fn case_28_a_guest_sees_ids_and_addresses_that_the_function_does_not_show() {
    let mut rig = boot();
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(rig.hardware(NIC).word(0), 0xffff);
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x1520_8086));
    assert_eq!(guest.read(&mut rig, 0, 2, 1), Ok(0x20));
    // Memory decode is the physical function's: it reads as the guest wrote it.
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(guest.read(&mut rig, 0, 4, 2), Ok(0x0006));
    assert_eq!(rig.hardware(NIC).word(4), 0x0004, "only bus mastering is its own");
    assert_eq!(guest.read(&mut rig, 0, 0x3c, 2).map(|line| line >> 8), Ok(0), "no pin");
    assert_eq!(guest.read(&mut rig, 0, 0x30, 4), Ok(0), "no ROM");

    // The address is dom0's resource list's, and the device's register takes nothing.
    let address = guest.read(&mut rig, 0, 0x10, 4).unwrap();
    assert_eq!(address, model::hardware::BAR0);
    rig.hardware(NIC).writes.borrow_mut().clear();
    assert_eq!(guest.write(&mut rig, 0, 0x10, 4, u32::MAX), 0);
    assert_eq!(guest.read(&mut rig, 0, 0x10, 4), Ok(0xffff_c000));
    assert_eq!(guest.write(&mut rig, 0, 0x10, 4, address), 0);
    assert_eq!(guest.read(&mut rig, 0, 0x10, 4), Ok(address));
    assert_eq!(*rig.hardware(NIC).writes.borrow(), [], "what takes nothing is not written to");
}

#[test]
fn its_vectors_are_mapped_though_its_own_memory_bit_reads_0() {
    let mut rig = boot();
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.write(&mut rig, 0, 4, 2, 0x0006);
    assert!(guest.enable_msix(&mut rig, &[0, 1]).is_ok_and(|vectors| vectors.iter().all(|vector| *vector > 0)));
    assert_eq!(rig.hardware(NIC).word(at::MSIX_CONTROL) & (ENABLE | MASKALL), ENABLE);
    assert_eq!(rig.hardware(NIC).unanswered.get(), 0);
}

#[test]
fn between_guests_it_is_reset_and_waited_for_by_its_class() {
    let mut rig = boot();
    for number in 1..4 {
        let mut guest = rig.attach(number, &[NIC]);
        guest.connect(&mut rig);
        guest.write(&mut rig, 0, 4, 2, 0x0006);
        let resets = rig.hardware(NIC).resets.get();
        rig.hardware(NIC).recovery.set((300 * MS, if number == 2 { Silence::Retry } else { Silence::Ones }));
        guest.destroy(&mut rig);
        rig.settle();
        assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
        assert_eq!(rig.hardware(NIC).resets.get(), resets + 1);
        assert_eq!(rig.hardware(NIC).word(4), 0, "bus mastering is off");
    }
}

#[test]
fn one_that_is_gone_reads_as_ones_and_is_broken_after_its_reset() {
    let mut rig = boot();
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    // The physical function's driver takes its functions away.
    rig.hardware(NIC).vanish();
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(u32::MAX), "not the ids that were given");
    guest.destroy(&mut rig);
    rig.settle();
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("broken"));
    rig.hardware(NIC).come_back();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("ready"));
}

#[test]
fn without_its_ids_it_is_refused_with_the_remedy() {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, Hardware::virtual_function(0x8086, 0x1520));
    let rig = boot_in(world, "dev=0000:01:00.0");
    assert_eq!(rig.published(NIC, "state").as_deref(), Some("broken"));
    assert!(rig.published(NIC, "reason").unwrap().contains("add id="), "{:?}", rig.published(NIC, "reason"));
}

#[test]
fn another_function_in_its_place_is_not_taken_for_it() {
    let mut rig = boot();
    let guest = rig.attach(1, &[NIC]);
    guest.destroy(&mut rig);
    rig.settle();
    // The physical function has made its functions anew, of another kind.
    rig.hardware(NIC).bytes.borrow_mut()[0x0b] = 0x01;
    let guest = rig.attach(2, &[NIC]);
    assert!(guest.back("error").or(guest.back("error-0")).is_some_and(|why| why.contains("another device")));
}

#[test]
fn the_pirq_of_a_function_without_a_pin_is_0() {
    let mut rig = boot();
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.write(&mut rig, 0, 4, 2, 0x0006);
    assert_eq!(guest.disable_msi(&mut rig), 0);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    assert_eq!(guest.disable_msix(&mut rig), 0);
    assert_eq!(guest.read(&mut rig, 0, 0x3c, 1), Ok(0));
}
