//! What this domain may do on a host, and how it finds out: never by a write, as that would end it on a Xen without
//! the config-owner change. The model of Xen panics with "domain_crash" on such a write.

use crate::model;

use model::hardware::{MASKALL, Silence, at};
use model::logs::{heard, listen};
use model::xen::errno::*;
use model::xen::{Act, Assigned, Call, Flavour};
use model::{Card, NIC, ONE, OTHER, Rig, TWO, World, boot, boot_in};
use pciback::sbdf::Sbdf;
use pciback::wire::op;

const XENS: [Flavour; 4] = [Flavour::Owner, Flavour::Stock417, Flavour::Stock420, Flavour::Mmcfg0];

fn sbdf(text: &str) -> Sbdf {
    text.parse().unwrap()
}

fn host(flavour: Flavour, card: Card) -> std::rc::Rc<World> {
    let world = World::with(flavour);
    world.plug(NIC, card.build());
    world
}

fn mode(rig: &Rig) -> String {
    rig.world.get("data/pciback/mode").unwrap_or_default()
}

/// Did the driver domain write to any function?
fn wrote(rig: &Rig) -> bool {
    rig.world.xen.done.borrow().iter().any(|done| matches!(done.act, Act::Write(..)))
}

/// A guest that writes everything, asks for everything and goes.
fn everything(rig: &mut Rig, id: u16) {
    let mut guest = rig.attach(id, &[NIC]);
    guest.connect(rig);
    for offset in (0..0x1000).step_by(4) {
        for value in [0, u32::MAX, 0x5555_5555] {
            guest.write(rig, 0, offset, 4, value);
        }
    }
    for cmd in [op::ENABLE_MSI, op::DISABLE_MSI, op::ENABLE_MSIX, op::DISABLE_MSIX, op::ENABLE_MULTI_MSI] {
        guest.operate(rig, cmd, 0, 1);
    }
    guest.set_front("state", "6");
    rig.settle();
    guest.destroy(rig);
}

#[test]
fn the_mode_is_found_on_every_xen_and_for_every_card_without_a_write() {
    for card in [Card::PLAIN, Card::FULL, Card::BOTH, Card::MSI_ONLY, Card::MSI_SIMPLE, Card::BARE] {
        for xen in XENS {
            let mut rig = boot_in(host(xen, card), ONE);
            let expected = if xen == Flavour::Owner { "direct" } else { "read-only" };
            assert_eq!(mode(&rig), expected, "{xen:?} {card:?}");
            let first = rig.world.xen.done.borrow()[0].act;
            assert_eq!(first, if card.msix > 0 { Act::Prepare } else { Act::Restore }, "{xen:?} {card:?}");
            everything(&mut rig, 1);
            // That the domain is still there, and this.
            assert_eq!(wrote(&rig), xen == Flavour::Owner, "{xen:?} {card:?}");
            assert_eq!(rig.state(NIC), "ready", "{xen:?} {card:?}");
        }
    }
}

#[test]
fn on_an_unmodified_xen_a_guest_reads_and_uses_its_pin() {
    for xen in [Flavour::Stock417, Flavour::Stock420] {
        let mut rig = boot_in(host(xen, Card::FULL), ONE);
        let why = rig.world.get("data/pciback/mode-why").expect("a reason");
        assert!(why.contains("-ENOSYS (-38)") && why.contains("boot/xen") && why.contains("xl-pciback serve"), "{why}");
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), -3, "bus mastering cannot be turned on");
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), 0, "decoding is on");
        assert_eq!(guest.read(&mut rig, 0, 0x3c, 2), Ok(0x0115));
        for cmd in [op::ENABLE_MSI, op::ENABLE_MSIX, op::ENABLE_MULTI_MSI] {
            assert_eq!(guest.operate(&mut rig, cmd, 0, 1).err, -4, "operation {cmd}");
        }
        for cmd in [op::DISABLE_MSI, op::DISABLE_MSIX] {
            let reply = guest.operate(&mut rig, cmd, 0, 0);
            assert_eq!((reply.err, reply.value), (0, 21), "operation {cmd}");
        }
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 0));
    }
}

/// With `mmcfg=0` Xen does not protect the frames; that has to be said, as it cannot be found out. Said wrongly, the
/// first write would end the domain: none is made before dom0's tool, which knows Xen's command line, lists the card.
#[test]
fn with_mmcfg_0_cards_are_written_and_reset_and_have_no_message_interrupts() {
    let world = host(Flavour::Mmcfg0, Card::FULL);
    world.hardware.borrow()[&sbdf(NIC)].set_word(at::MSIX_CONTROL, MASKALL | 4);
    let mut rig = boot_in(world, &format!("mode=mmcfg0 {ONE}"));
    assert_eq!((mode(&rig).as_str(), rig.state(NIC).as_str()), ("mmcfg0", "ready"));
    assert!(rig.hardware(NIC).writes.borrow().is_empty());
    // The tool asks for the hand-over before it has Xen assign the card, which would refuse one with MASKALL set.
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
    assert_eq!(rig.hardware(NIC).word(at::MSIX_CONTROL), 0x0004);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    assert_eq!((guest.enable_msi(&mut rig), guest.enable_msix(&mut rig, &[0])), (Err(-4), Err(-4)));
    guest.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", 2));
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 4, 0);
    let calls = rig.world.xen.done.borrow().iter().filter(|done| !matches!(done.act, Act::Write(..))).count();
    assert_eq!(calls, 0, "Xen takes none of its calls");
}

#[test]
fn read_only_is_a_wish_that_is_kept() {
    let mut rig = boot_in(host(Flavour::Owner, Card::FULL), &format!("mode=read-only {ONE}"));
    assert_eq!(mode(&rig), "read-only");
    everything(&mut rig, 1);
    assert_eq!(rig.world.xen.done.borrow().len(), 0, "neither written nor asked");
    assert_eq!(rig.state(NIC), "ready");
}

/// Of the functions that the command line names, Xen gave this domain only some frames.
#[test]
fn a_function_whose_frame_is_not_ours_is_told_and_the_others_work() {
    for (foreign, ours) in [(NIC, OTHER), (OTHER, NIC)] {
        for card in [Card::PLAIN, Card::MSI_ONLY, Card::BARE] {
            let world = World::with(Flavour::Owner);
            world.plug(NIC, card.build());
            world.plug(OTHER, card.build());
            world.xen.foreign.borrow_mut().insert(sbdf(foreign));
            let mut rig = boot_in(world, TWO);
            assert_eq!(mode(&rig), "direct", "{foreign} {card:?}");
            let reason = rig.reason(foreign);
            assert!(reason.contains("-EPERM (-1)") && reason.contains("iomem="), "{reason}");
            assert!(rig.hardware(foreign).writes.borrow().is_empty());
            let mut guest = rig.attach(1, &[ours]);
            guest.connect(&mut rig);
            guest.enable(&mut rig);
            if card.msix > 0 {
                guest.enable_msix(&mut rig, &[0]).expect("a vector");
            }
            let refused = rig.attach(2, &[foreign]);
            assert!(refused.back("error-0").expect("a reason").contains("-EPERM"));
            rig.world.retry(foreign);
            rig.settle();
            assert_eq!(rig.state(foreign), "broken");
            assert!(rig.hardware(foreign).writes.borrow().is_empty());
        }
    }
}

/// With two functions, so that the change is found by the other where the first gives no hint of it.
#[test]
fn a_function_that_was_not_there_at_start_is_taken_when_dom0_asks_again() {
    for (flavour, options, found) in [
        (Flavour::Owner, "", "direct"),
        (Flavour::Mmcfg0, "mode=mmcfg0 ", "mmcfg0"),
        (Flavour::Stock417, "", "read-only"),
        (Flavour::Owner, "mode=read-only ", "read-only"),
    ] {
        for (how, says) in [(Silence::Ones, "no device answers"), (Silence::Retry, "not ready to answer yet")] {
            let world = host(flavour, Card::FULL);
            world.plug(OTHER, Card::FULL.build());
            let card = world.hardware.borrow()[&sbdf(NIC)].clone();
            card.fall_silent(how);
            let mut rig = boot_in(world, &format!("{options}{TWO}"));
            assert_eq!(mode(&rig), found, "{options} {how:?}");
            assert!(rig.reason(NIC).contains(says), "{}", rig.reason(NIC));
            assert_eq!(rig.published(NIC, "id").as_deref(), Some(""));
            // Too early.
            rig.world.retry(NIC);
            rig.settle();
            assert!(rig.reason(NIC).contains(says), "{}", rig.reason(NIC));
            card.come_back();
            rig.world.retry(NIC);
            rig.settle();
            assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "reason")), ("ready", None), "{options} {how:?}");
            for node in ["id", "reset"] {
                assert_eq!(rig.published(NIC, node), rig.published(OTHER, node), "{options} {how:?}");
            }
            let mut guest = rig.attach(1, &[NIC]);
            guest.connect(&mut rig);
            if found != "read-only" {
                guest.enable(&mut rig);
            }
            let vectors = guest.enable_msix(&mut rig, &[0]).map(|vectors| vectors.len());
            assert_eq!(vectors, if found == "direct" { Ok(1) } else { Err(-4) }, "{options} {how:?}");
            assert_eq!(wrote(&rig), found != "read-only");
            guest.destroy(&mut rig);
            assert_eq!(rig.state(NIC), "ready");
        }
    }
}

#[test]
fn another_card_than_named_is_refused_until_the_right_one_is_there() {
    let world = host(Flavour::Owner, Card::FULL);
    let card = world.hardware.borrow()[&sbdf(NIC)].clone();
    card.set_word(2, 0x1234);
    let mut rig = boot_in(world, &format!("{ONE},id=8086:100e"));
    for _ in 0..2 {
        assert!(rig.reason(NIC).contains("another card is in its place: it is 8086:1234"), "{}", rig.reason(NIC));
        rig.world.retry(NIC);
        rig.settle();
    }
    assert!(!wrote(&rig));
    card.set_word(2, 0x100e);
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "id").as_deref()), ("ready", Some("8086:100e")));
}

#[test]
fn a_function_that_xen_refused_at_start_is_asked_for_again() {
    for errno in [EPERM, ENODEV] {
        let world = host(Flavour::Owner, Card::FULL);
        world.plug(OTHER, Card::FULL.build());
        world.xen.fail(Call::Prepare, 0..2, errno);
        let mut rig = boot_in(world, TWO);
        // The first call was for the one; the second, for the other, failed too.
        assert_eq!(mode(&rig), "read-only");
        for function in [NIC, OTHER] {
            assert!(rig.reason(function).contains(&format!("(-{errno})")), "{}", rig.reason(function));
        }
        // Nothing says any more that the host allows writes.
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "broken");
        assert!(!wrote(&rig));

        let world = host(Flavour::Owner, Card::FULL);
        world.plug(OTHER, Card::FULL.build());
        world.xen.fail(Call::Prepare, 0..1, errno);
        let mut rig = boot_in(world, TWO);
        assert_eq!(
            (mode(&rig).as_str(), rig.state(NIC).as_str(), rig.state(OTHER).as_str()),
            ("direct", "broken", "ready")
        );
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "reset").as_deref()), ("ready", Some("flr")));
    }
}

#[test]
fn why_nothing_may_be_written_is_told_by_what_xen_answered() {
    for (errno, says, not) in [
        (EPERM, "config owner of none", "boot a Xen"),
        (ENOSYS, "boot a Xen with the change", "iomem="),
        (ENODEV, "see xl dmesg", "boot a Xen"),
    ] {
        let world = host(Flavour::Owner, Card::FULL);
        world.xen.fail(Call::Prepare, 0..u64::MAX, errno);
        let rig = boot_in(world, ONE);
        let why = rig.world.get("data/pciback/mode-why").expect("a reason");
        assert!(why.contains(&format!("(-{errno})")) && why.contains(says) && !why.contains(not), "{why}");
    }
}

/// Functions that dom0 has not given up yet: Xen answers busy for whatever it is asked.
#[test]
fn a_function_that_dom0_still_has_is_broken_and_untouched() {
    for card in [Card::PLAIN, Card::MSI_ONLY] {
        let world = host(Flavour::Owner, card);
        world.plug(OTHER, Card::PLAIN.build());
        world.xen.set_assigned(sbdf(NIC), Assigned::Dom0);
        let mut rig = boot_in(world, TWO);
        assert_eq!((mode(&rig).as_str(), rig.state(OTHER).as_str()), ("direct", "ready"));
        assert!(rig.reason(NIC).contains("-EBUSY (-16)"), "{}", rig.reason(NIC));
        assert!(rig.hardware(NIC).writes.borrow().is_empty());
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "broken");
        assert!(rig.hardware(NIC).writes.borrow().is_empty());
    }
}

/// Other answers to the question: none of them is taken for a yes.
#[test]
fn no_error_is_taken_for_leave_to_write() {
    for card in [Card::PLAIN, Card::MSI_ONLY, Card::BARE] {
        for errno in [EPERM, ESRCH, ENOMEM, ENODEV, EINVAL, ENOSYS, EOPNOTSUPP, 99] {
            let world = host(Flavour::Owner, card);
            for call in [Call::Prepare, Call::Restore] {
                world.xen.fail(call, 0..u64::MAX, errno);
            }
            let mut rig = boot_in(world, ONE);
            assert_eq!(mode(&rig), "read-only", "-{errno} {card:?}");
            if rig.state(NIC) == "ready" {
                everything(&mut rig, 1);
            } else {
                let reason = rig.reason(NIC);
                assert!(reason.contains(&format!("(-{errno})")), "{reason}");
            }
            assert!(!wrote(&rig), "-{errno} {card:?}");
        }
    }
}

#[test]
fn msi_off_and_msix_off_keep_that_kind_from_guests() {
    for (option, msi, msix) in [("msi=off", Err(-4), Ok(1)), ("msix=off", Ok(1), Err(-4))] {
        let world = host(Flavour::Owner, Card::BOTH);
        let mut rig = boot_in(world, &format!("{ONE},{option}"));
        assert_eq!(rig.published(NIC, "options").as_deref(), Some(option));
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        assert_eq!(guest.enable_msi(&mut rig).map(|_| 1), msi, "{option}");
        guest.disable_msi(&mut rig);
        assert_eq!(guest.enable_msix(&mut rig, &[0]).map(|vectors| vectors.len()), msix, "{option}");
        // Its state is looked after all the same.
        assert!(rig.world.xen.prepared(sbdf(NIC)));
    }
}

#[test]
fn strict_wants_a_reset_of_the_functions_own_or_dom0s_by_wish() {
    for (card, options, state) in [
        (Card::PLAIN, "strict", "broken"),
        (Card::PLAIN, "strict,reset=none", "broken"),
        (Card::PLAIN, "strict,reset=bus", "ready"),
        (Card::FULL, "strict", "ready"),
        (Card::FULL, "strict,reset=none", "broken"),
        (Card::PLAIN, "reset=none", "ready"),
    ] {
        let mut rig = boot_in(host(Flavour::Owner, card), &format!("{ONE},{options}"));
        assert_eq!(rig.state(NIC), state, "{options} {card:?}");
        if state == "broken" {
            assert!(rig.reason(NIC).contains("strict"), "{}", rig.reason(NIC));
            rig.world.retry(NIC);
            rig.settle();
            assert_eq!(rig.state(NIC), "broken", "a retry does not make it less strict");
            assert!(!wrote(&rig), "{options}");
        }
    }
}

#[test]
fn a_reset_that_the_function_lacks_is_told() {
    for (card, wish, method) in [
        (Card::FULL, "flr", Some("flr")),
        (Card::FULL, "auto", Some("flr")),
        (Card { advanced: true, ..Card::PLAIN }, "auto", Some("af")),
        (Card { power: Some(false), ..Card::PLAIN }, "auto", Some("pm")),
        (Card { power: Some(true), ..Card::PLAIN }, "auto", Some("dom0")),
        (Card { express: Some(false), ..Card::PLAIN }, "auto", Some("dom0")),
        (Card { advanced: true, power: Some(false), ..Card::FULL }, "pm", Some("pm")),
        (Card { advanced: true, power: Some(false), ..Card::FULL }, "af", Some("af")),
        (Card::FULL, "bus", Some("dom0")),
        (Card::FULL, "none", Some("none")),
        (Card { express: Some(false), ..Card::PLAIN }, "flr", None),
        (Card::PLAIN, "flr", None),
        (Card::PLAIN, "af", None),
        (Card { power: Some(true), ..Card::PLAIN }, "pm", None),
    ] {
        let rig = boot_in(host(Flavour::Owner, card), &format!("{ONE},reset={wish}"));
        match method {
            Some(method) => {
                assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "reset")), ("ready", Some(method.into())));
                let resets = u32::from(["flr", "af", "pm"].contains(&method));
                assert_eq!(rig.hardware(NIC).resets.get(), resets, "{wish} {card:?}");
            }
            None => assert!(rig.reason(NIC).contains(&format!("reset={wish}")), "{}", rig.reason(NIC)),
        }
    }
}

/// What is in force is said at start, for the domain and for each function.
#[test]
fn what_is_in_force_is_logged_at_start() {
    listen();
    let _rig = boot("dev=0000:01:00.0,guest=db1,msi=off dev=0000:02:00.0,permissive");
    let told = |what: &str| heard().iter().any(|line| line.contains(what));
    assert!(told(if model::delegated() { "mode delegated: " } else { "mode direct: " }), "{:#?}", heard());
    assert!(told("0000:01:00.0: 8086:100e, reset dom0, for guest \"db1\" only, msi=off"), "{:#?}", heard());
    assert!(told("0000:02:00.0: 8086:100e, reset dom0, for any guest, permissive"), "{:#?}", heard());
}
