//! An unmodified Xen with `xl-pciback serve` in dom0: what the driver domain does with it, and without it when it goes, hangs
//! and comes back. That everything else is as in direct mode, all other tests show: they run a second time with
//! `PCIBACK_DELEGATED=1` (`cargo xtask test`).

use crate::model;

use model::dom0::Death;
use model::hardware::{ENABLE, MASKALL, at};
use model::logs::{heard, listen};
use model::xen::Flavour;
use model::{Card, Guest, NIC, ONE, Rig, World, boot_in};
use pciback::delegate::message::Operation;
use pciback::sbdf::Sbdf;

const SECOND: u64 = 1_000_000_000;

fn nic() -> Sbdf {
    NIC.parse().unwrap()
}

fn host(card: Card) -> std::rc::Rc<World> {
    let world = World::with(Flavour::Stock417);
    world.plug(NIC, card.build());
    world
}

fn mode(rig: &Rig) -> (String, String) {
    let read = |node: &str| rig.world.get(&format!("data/pciback/{node}")).unwrap_or_default();
    (read("mode"), read("serve"))
}

/// A driver domain whose dom0 serves, and a guest that uses its card with three vectors.
fn at_work() -> (Rig, Guest) {
    let world = host(Card::FULL);
    world.serve();
    let mut rig = boot_in(world, ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    let vectors = guest.enable_msix(&mut rig, &[0, 1, 2]).expect("vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    (rig, guest)
}

fn mapped(rig: &Rig) -> usize {
    rig.world.xen.mapped(nic()).len()
}

fn control(rig: &Rig) -> u16 {
    rig.hardware(NIC).word(at::MSIX_CONTROL)
}

#[test]
fn the_domain_reads_until_dom0_comes_and_then_can_do_everything() {
    let world = host(Card::FULL);
    let mut rig = boot_in(world.clone(), ONE);
    assert_eq!(mode(&rig), ("read-only".into(), "not connected".into()));
    assert!(rig.hardware(NIC).writes.borrow().is_empty());
    world.serve();
    rig.settle();
    assert_eq!(mode(&rig), ("delegated".into(), "connected".into()));
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 1));
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]).map(|vectors| vectors.len()), Ok(2));
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), mapped(&rig)), ("ready", 0));
}

#[test]
fn a_guest_that_had_a_card_before_dom0_came_keeps_it_as_it_is() {
    let world = host(Card::FULL);
    let mut rig = boot_in(world.clone(), ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    world.serve();
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("in-use", 0));
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), -3);
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 1), "taken once it is free");
    let mut next = rig.attach(2, &[NIC]);
    next.connect(&mut rig);
    assert_eq!(next.write(&mut rig, 0, 4, 2, 0x0006), 0);
}

#[test]
fn a_domain_that_can_do_it_alone_or_shall_not_write_needs_no_dom0() {
    for (flavour, line, expected) in
        [(Flavour::Owner, ONE.to_string(), "direct"), (Flavour::Stock417, format!("mode=read-only {ONE}"), "read-only")]
    {
        let world = World::with(flavour);
        world.serve();
        let mut rig = boot_in(world, &line);
        assert_eq!(mode(&rig).0, expected);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        guest.write(&mut rig, 0, 4, 2, 0x0006);
        assert!(rig.world.dom0.requests.borrow().is_empty(), "{expected}");
    }
}

/// Under `mmcfg=0` Xen sees nothing of what goes to the frame: the writes it must see go the other way, and so the
/// seed's check works there too.
#[test]
fn with_mmcfg_0_only_message_control_and_the_calls_are_dom0s() {
    let world = World::with(Flavour::Mmcfg0);
    world.plug(NIC, Card::PLAIN.build());
    world.xen.set_host_maskall(nic());
    world.serve();
    let mut rig = boot_in(world, &format!("mode=mmcfg0 {ONE}"));
    assert_eq!(mode(&rig), ("mmcfg0".into(), "connected".into()));
    assert!(
        rig.hardware(NIC).writes.borrow().is_empty(),
        "dom0's tool has not said yet that the command line is right"
    );
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), control(&rig)), ("ready", 4), "{:?}", rig.published(NIC, "reason"));
    assert!(!rig.world.xen.host_maskall(nic()), "Xen has forgotten it");
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    guest.enable_msix(&mut rig, &[0, 1]).expect("vectors");
    assert_eq!(control(&rig), ENABLE | 4);
    for request in rig.world.dom0.requests.borrow().iter() {
        if let Operation::Write { offset, .. } = request.operation {
            assert!([at::MSIX_CONTROL, at::MSI_CONTROL].contains(&offset), "{offset:#x}");
        }
    }
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), mapped(&rig)), ("ready", 0));
}

#[test]
fn while_dom0_is_away_reads_and_interrupts_go_on_and_writes_are_refused_with_one_line() {
    listen();
    let (mut rig, guest) = at_work();
    rig.world.kill_serve();
    rig.settle();
    assert_eq!(mode(&rig), ("delegated".into(), "not connected".into()));
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert!(rig.hardware(NIC).delivers(0));
    for _ in 0..100 {
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), -3);
    }
    let lines = |what: &str| heard().iter().filter(|line| line.contains(what)).count();
    assert_eq!((lines("xl-pciback serve has gone"), lines("nothing can be written now")), (1, 1), "{:#?}", heard());
    rig.world.serve();
    rig.settle();
    assert_eq!(mode(&rig), ("delegated".into(), "connected".into()));
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert!(rig.hardware(NIC).delivers(0) && mapped(&rig) == 3, "nothing was lost");
}

#[test]
fn a_dom0_that_hangs_is_waited_for_once() {
    let (mut rig, guest) = at_work();
    rig.world.dom0.hung.set(true);
    let start = rig.world.now.get();
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), -3);
    assert!(rig.world.now.get() - start < 2 * SECOND, "the client's patience");
    let late = rig.world.now.get();
    for _ in 0..10 {
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), -3);
    }
    assert_eq!(rig.world.now.get(), late, "the others are not held up");
    rig.world.wake_serve();
    rig.settle();
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert!(rig.hardware(NIC).delivers(0) && mapped(&rig) == 3);
}

/// dom0's tool ends at every request of a guest's whole life, in every way, and is started again: nothing stays mapped
/// that nobody knows of, the card is offered again, and the next guest can use it.
#[test]
fn dom0_may_end_at_any_request() {
    for how in [Death::Before, Death::Unwritten, Death::Unanswered] {
        let mut last = 0;
        for count in 0.. {
            let world = host(Card::FULL);
            world.serve();
            let mut rig = boot_in(world.clone(), ONE);
            let so_far = world.dom0.requests.borrow().len();
            world.kill_serve_at(count, how);
            let back = |rig: &mut Rig| {
                if !rig.world.dom0.running.get() {
                    rig.world.serve();
                    rig.settle();
                }
            };
            let mut guest = rig.attach(1, &[NIC]);
            back(&mut rig);
            if rig.state(NIC) == "in-use" {
                guest.connect(&mut rig);
                if guest.write(&mut rig, 0, 4, 2, 0x0006) != 0 {
                    back(&mut rig);
                    guest.enable(&mut rig);
                }
                let first = guest.enable_msix(&mut rig, &[0, 1, 2]);
                back(&mut rig);
                // Of the last write the register itself tells that it was made.
                if first.is_err() {
                    assert_eq!(mapped(&rig), 0, "{how:?} at {count}: all or nothing");
                    let again = guest.enable_msix(&mut rig, &[0, 1, 2]).map(|vectors| vectors.len());
                    assert_eq!(again, Ok(3), "{how:?} at {count}");
                }
                guest.operate(&mut rig, pciback::wire::op::DISABLE_MSIX, 0, 0);
                back(&mut rig);
                assert_eq!(mapped(&rig), 0, "{how:?} at {count}");
            }
            guest.destroy(&mut rig);
            let reached = !world.dom0.running.get() || world.dom0.requests.borrow().len() - so_far > count as usize;
            if !world.dom0.running.get() {
                assert_eq!(rig.state(NIC), "resetting", "{how:?} at {count}: it waits");
                world.serve();
                rig.settle();
            }
            world.kill_serve_at(u32::MAX, how);
            assert_eq!(rig.state(NIC), "ready", "{how:?} at {count}: {:?}", rig.published(NIC, "reason"));
            assert_eq!((mapped(&rig), control(&rig) & (ENABLE | MASKALL)), (0, 0), "{how:?} at {count}");
            let mut next = rig.attach(2, &[NIC]);
            next.connect(&mut rig);
            next.enable(&mut rig);
            assert_eq!(
                next.enable_msix(&mut rig, &[0, 1, 2]).map(|vectors| vectors.len()),
                Ok(3),
                "{how:?} at {count}"
            );
            next.destroy(&mut rig);
            last = count;
            if !reached {
                break;
            }
        }
        assert!(last > 20, "{how:?}: a life has {last} requests");
    }
}

/// A new driver domain finds a guest's vectors mapped by the one before: dom0 knows them, and unmaps them.
#[test]
fn a_new_driver_domain_gets_what_the_one_before_left() {
    let (rig, guest) = at_work();
    assert_eq!(mapped(&rig), 3);
    guest.leave();
    rig.world.remove("backend/pci/1");
    let rig = rig.crash_and_boot(ONE);
    assert_eq!((rig.state(NIC).as_str(), mapped(&rig), control(&rig)), ("ready", 0, 4));
}

#[test]
fn a_function_that_dom0_refuses_is_broken_and_says_where_to_look() {
    let world = host(Card::FULL);
    world.dom0.refused.borrow_mut().insert(nic());
    world.serve();
    let mut rig = boot_in(world.clone(), ONE);
    assert!(rig.reason(NIC).contains("xl-pciback serve in dom0 answers -EPERM (-1)"), "{}", rig.reason(NIC));
    // What is wrong is mended, and asked for again.
    world.dom0.refused.borrow_mut().clear();
    world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
}

/// As above where the domain itself may write: once dom0 lets it have the function, a guest gets all that dom0 takes part
/// in, also if the function was in use before there was a dom0 to ask.
#[test]
fn with_mmcfg_0_a_function_that_dom0_refused_has_its_interrupts_once_it_is_let_have_it() {
    for used in [false, true] {
        let world = World::with(Flavour::Mmcfg0);
        world.plug(NIC, Card::FULL.build());
        world.dom0.refused.borrow_mut().insert(nic());
        let mut rig = boot_in(world.clone(), &format!("mode=mmcfg0 {ONE}"));
        if used {
            world.retry(NIC);
            rig.settle();
            assert_eq!(rig.state(NIC), "ready");
        }
        world.serve();
        rig.settle();
        assert!(rig.reason(NIC).contains("xl-pciback serve in dom0 answers -EPERM (-1)"), "{}", rig.reason(NIC));
        world.dom0.refused.borrow_mut().clear();
        world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready");
        let mut guest = rig.attach(1, &[NIC]);
        rig.settle();
        guest.connect(&mut rig);
        guest.enable(&mut rig);
        guest.enable_msix(&mut rig, &[0, 1]).unwrap_or_else(|errno| panic!("used before: {used}: {errno}"));
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), mapped(&rig)), ("ready", 0));
    }
}

/// A function without a reset of its own is reset by dom0's kernel during the hand-over; others are served meanwhile.
#[test]
fn dom0_resets_what_cannot_reset_itself() {
    for (can, errno, strict, expected) in
        [(true, 0, true, "ready"), (false, 0, false, "ready"), (false, 0, true, "broken"), (true, 5, true, "broken")]
    {
        let world = host(Card { express: None, power: None, advanced: false, ..Card::PLAIN });
        world.dom0.can_reset.set(can);
        world.dom0.reset_errno.set(errno);
        world.dom0.reset_time.set(3 * SECOND);
        world.serve();
        let start = world.now.get();
        let line = format!("{ONE}{}", if strict { ",strict" } else { "" });
        let rig = boot_in(world.clone(), &line);
        assert_eq!(rig.state(NIC), expected, "{can} {errno} {strict}: {:?}", rig.published(NIC, "reason"));
        assert_eq!(rig.published(NIC, "reset").as_deref(), Some("bus"));
        assert_eq!(rig.hardware(NIC).resets.get(), u32::from(can && errno == 0));
        if can {
            assert!(world.now.get() - start >= 3 * SECOND, "it was waited for");
        }
    }
}
