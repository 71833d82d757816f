//! Functions that dom0's kernel can reset only together, as its reset of their bus reaches them all.

use crate::model;

use std::rc::Rc;

use model::hardware::{MASTER, MS, at, differences};
use model::logs::{heard, listen};
use model::xen::Flavour;
use model::{Card, Guest, Hardware, Rig, World, boot_in};
use pciback::sbdf::Sbdf;

const ONE: &str = "0000:03:00.0";
const TWO: &str = "0000:03:00.1";
const BOTH: &str = "dev=0000:03:00.0 dev=0000:03:00.1";
/// EUSERS and EADDRINUSE.
const SHARED: i32 = 87;
const WITH_OTHERS: i32 = 98;

/// No function level reset, and power management keeps its state: a card reader and its network function.
const CARD: Card = Card { power: Some(true), ..Card::BOTH };

/// A host whose dom0 resets the two functions together or not at all.
fn host(second: Card, answer: i32) -> Rc<World> {
    let world = World::with(Flavour::Stock417);
    world.dom0.can_reset.set(true);
    world.dom0.reset_time.set(1_000 * MS);
    world.dom0.alone_errno.set(Some(answer));
    world.plug(ONE, CARD.build());
    world.plug(TWO, second.build());
    world.serve();
    world
}

fn booted(second: Card, cmdline: &str) -> Rig {
    let rig = boot_in(host(second, SHARED), cmdline);
    rig.world.dom0.resets.borrow_mut().clear();
    rig
}

fn sbdf(text: &str) -> Sbdf {
    text.parse().unwrap()
}

fn image(card: &Hardware) -> Vec<u8> {
    let mut bytes = card.bytes.borrow().clone();
    bytes[4..8].fill(0);
    bytes
}

/// Where the guest finds a function: `vdev-N` is SSSS:BB:DD.FF.
fn devfn(guest: &Guest, index: usize) -> u32 {
    let vdev = guest.back(&format!("vdev-{index}")).expect("an address");
    let (slot, function) = vdev.rsplit(':').next().and_then(|tail| tail.split_once('.')).expect("a slot");
    u32::from_str_radix(slot, 16).unwrap() << 3 | u32::from_str_radix(function, 16).unwrap()
}

fn at_work(rig: &mut Rig, id: u16, functions: &[&str]) -> Guest {
    let mut guest = rig.attach(id, functions);
    guest.connect(rig);
    for index in 0..functions.len() {
        let devfn = devfn(&guest, index);
        assert_eq!(guest.write(rig, devfn, 4, 2, 0x0007), 0, "{devfn}");
        assert_eq!(guest.write(rig, devfn, 0x0c, 1, 0x20), 0);
    }
    guest
}

// Case 37: QubesOS issues 4818, 1393 and 1364; a graphics card with its sound function (dump gpu-nvidia-gt218-2fn).
#[test]
fn case_37_two_functions_of_one_guest_are_reset_once_and_both_restored() {
    let rig = boot_in(host(CARD, SHARED), BOTH);
    assert_eq!(*rig.world.dom0.resets.borrow(), [(sbdf(ONE), true)], "when they are seized");
    drop(rig);
    let mut rig = booted(CARD, BOTH);
    let before = [ONE, TWO].map(|function| image(&rig.hardware(function)));
    let resets = [ONE, TWO].map(|function| rig.hardware(function).resets.get());
    let guest = at_work(&mut rig, 1, &[ONE, TWO]);
    guest.destroy(&mut rig);
    assert_eq!(rig.world.dom0.resets.borrow().len(), 1);
    for (index, function) in [ONE, TWO].into_iter().enumerate() {
        assert_eq!(rig.state(function), "ready", "{function}: {:?}", rig.published(function, "reason"));
        assert_eq!(differences(&image(&rig.hardware(function)), &before[index]), [], "{function}");
        assert_eq!(rig.hardware(function).resets.get(), resets[index] + 1, "{function}");
    }
    at_work(&mut rig, 2, &[ONE, TWO]);
}

#[test]
fn case_37_a_function_beside_one_that_is_in_use_is_not_reset() {
    listen();
    for strict in [false, true] {
        let words = format!("dev={ONE}{} dev={TWO}", if strict { ",strict" } else { "" });
        let mut rig = booted(CARD, &words);
        let first = at_work(&mut rig, 1, &[ONE]);
        let second = at_work(&mut rig, 2, &[TWO]);
        let resets = rig.hardware(TWO).resets.get();
        first.destroy(&mut rig);
        assert_eq!((rig.hardware(TWO).resets.get(), rig.state(TWO).as_str()), (resets, "in-use"));
        assert_eq!(rig.hardware(TWO).word(at::COMMAND) & MASTER, MASTER, "its guest notices nothing");
        let devfn = devfn(&second, 0);
        assert_eq!(second.read(&mut rig, devfn, 0, 2), Ok(0x8086));
        let told = "the same reset would reach 0000:03:00.1, which domain 2 has";
        if strict {
            assert!(rig.reason(ONE).contains(told), "{}", rig.reason(ONE));
            // With the other one gone, it can be.
            second.destroy(&mut rig);
            rig.world.retry(ONE);
            rig.settle();
            assert_eq!((rig.state(ONE).as_str(), rig.state(TWO).as_str()), ("ready", "ready"));
        } else {
            assert_eq!(rig.state(ONE), "ready");
            let card = rig.hardware(ONE);
            assert_eq!(card.word(at::COMMAND), 0x0403, "silenced as far as registers go");
        }
    }
    assert!(heard().iter().any(|line| line.contains("which domain 2 has")));
}

/// A function that nobody has is no obstacle: it is reset with the other, and nobody gets it meanwhile.
#[test]
fn case_37_an_idle_function_is_reset_with_the_one_beside_it() {
    for second in [CARD, Card::FULL] {
        let mut rig = booted(second, BOTH);
        let before = image(&rig.hardware(TWO));
        let guest = at_work(&mut rig, 1, &[ONE]);
        guest.leave();
        rig.deliver();
        rig.pass(300 * MS);
        assert_eq!((rig.state(ONE).as_str(), rig.state(TWO).as_str()), ("resetting", "resetting"), "{second:?}");
        guest.die(model::xen::Stage::Freed);
        let mut next = rig.attach(2, &[TWO]);
        assert_eq!(differences(&image(&rig.hardware(TWO)), &before), [], "{second:?}");
        assert_eq!((rig.state(ONE).as_str(), rig.state(TWO).as_str()), ("ready", "in-use"), "{second:?}");
        assert_eq!(*rig.world.dom0.resets.borrow(), [(sbdf(ONE), true)]);
        rig.world.assign(sbdf(TWO), 2);
        next.connect(&mut rig);
        let devfn = devfn(&next, 0);
        assert_eq!(next.read(&mut rig, devfn, 0, 2), Ok(0x8086));
    }
}

/// A function on another bus is not beside it.
#[test]
fn a_function_on_another_bus_is_left_alone() {
    let world = host(CARD, SHARED);
    world.plug("0000:04:00.0", CARD.build());
    let mut rig = boot_in(world, &format!("{BOTH} dev=0000:04:00.0"));
    let mut other = rig.attach(2, &["0000:04:00.0"]);
    other.connect(&mut rig);
    let resets = rig.hardware("0000:04:00.0").resets.get();
    let guest = at_work(&mut rig, 1, &[ONE, TWO]);
    guest.destroy(&mut rig);
    assert_eq!(rig.hardware("0000:04:00.0").resets.get(), resets);
    assert_eq!((rig.state(ONE).as_str(), rig.state(TWO).as_str()), ("ready", "ready"));
    assert_eq!(other.read(&mut rig, 0, 0, 2), Ok(0x8086));
}

/// dom0 has one of them itself, or another driver domain has.
#[test]
fn case_37_a_function_beside_one_that_is_not_ours_is_not_reset() {
    listen();
    let world = host(CARD, WITH_OTHERS);
    let mut rig = boot_in(world, &format!("dev={ONE}"));
    assert_eq!((rig.state(ONE).as_str(), rig.hardware(TWO).resets.get()), ("ready", 0));
    let guest = at_work(&mut rig, 1, &[ONE]);
    guest.destroy(&mut rig);
    assert_eq!((rig.state(ONE).as_str(), rig.hardware(TWO).resets.get()), ("ready", 0));
    let told = heard().iter().filter(|line| line.contains("a function that is not this domain's")).count();
    assert_eq!(told, 1, "{:#?}", heard());
    let rig = boot_in(host(CARD, WITH_OTHERS), &format!("dev={ONE},strict"));
    assert!(rig.reason(ONE).contains("a function that is not this domain's"), "{}", rig.reason(ONE));
}

/// dom0's tool may go and come at any moment of it.
#[test]
fn a_serve_that_goes_in_the_middle_does_not_leave_a_function_behind() {
    for after in [0, 20, 60, 500, 1_010, 1_060] {
        let mut rig = booted(CARD, BOTH);
        let before = [ONE, TWO].map(|function| image(&rig.hardware(function)));
        let guest = at_work(&mut rig, 1, &[ONE, TWO]);
        guest.leave();
        rig.deliver();
        rig.pass(after * MS);
        rig.world.kill_serve();
        rig.deliver();
        rig.pass(1_000 * MS);
        rig.world.serve();
        rig.settle();
        guest.destroy(&mut rig);
        for (index, function) in [ONE, TWO].into_iter().enumerate() {
            assert_eq!(rig.state(function), "ready", "{after}: {:?}", rig.published(function, "reason"));
            assert_eq!(differences(&image(&rig.hardware(function)), &before[index]), [], "{after}, {function}");
        }
        at_work(&mut rig, 2, &[ONE, TWO]);
    }
}

/// A reset that does not end breaks all of them, and not for ever.
#[test]
fn a_reset_of_several_that_does_not_end_breaks_all_of_them() {
    let mut rig = booted(CARD, BOTH);
    let guest = at_work(&mut rig, 1, &[ONE, TWO]);
    rig.world.dom0.reset_time.set(1_000_000 * MS);
    guest.destroy(&mut rig);
    for function in [ONE, TWO] {
        assert!(rig.reason(function).contains("dom0 does not finish its reset"), "{}", rig.reason(function));
    }
    rig.world.dom0.reset_time.set(1_000 * MS);
    for function in [ONE, TWO] {
        rig.world.retry(function);
    }
    rig.settle();
    for function in [ONE, TWO] {
        rig.world.retry(function);
        rig.settle();
    }
    assert_eq!((rig.state(ONE).as_str(), rig.state(TWO).as_str()), ("ready", "ready"));
}
