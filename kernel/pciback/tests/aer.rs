//! Errors that dom0 reports of a function: what the guest is asked, what its answers lead to, and what becomes of the
//! function where no good answer comes.

use crate::model;

use model::hardware::{BAR0, ENABLE, INTX_DISABLE, MASTER, Silence, at};
use model::xen::{Act, Stage};
use model::{Card, Guest, NIC, OTHER, Rig, TWO, World, boot, boot_in, boot_with};
use pciback::aer::PATIENCE;
use pciback::wire::{PCIB_ACTIVE, PCIF_ACTIVE, RawRequest};

/// Operations of `aer_op`.
const DETECTED: u32 = 6;
const RESUME: u32 = 7;
const MMIO: u32 = 8;
const SLOT_RESET: u32 = 9;

/// States of the channel.
const NORMAL: u32 = 1;
const FROZEN: u32 = 2;
const PERMANENT: u32 = 3;

/// What drivers answer.
const NONE: i32 = 1;
const CAN_RECOVER: i32 = 2;
const NEED_RESET: i32 = 3;
const DISCONNECT: i32 = 4;
const RECOVERED: i32 = 5;
const NO_DRIVER: i32 = 6;

const WISH: &str = "data/pciback/aer";

/// A connected guest that uses its functions.
fn guest(rig: &mut Rig, id: u16, functions: &[&str]) -> Guest {
    let mut guest = rig.attach(id, functions);
    guest.connect(rig);
    for slot in 0..functions.len() as u32 {
        assert_eq!(guest.write(rig, slot << 3, 4, 2, 0x0006), 0);
    }
    guest
}

/// dom0 reports an error, and the report is acknowledged.
fn report(rig: &mut Rig, sbdf: &str, severity: &str) {
    rig.world.report_error(sbdf, severity);
    rig.deliver();
    assert_eq!(rig.world.get(WISH).as_deref(), Some(""), "the report was seen");
}

/// What is published of the last error.
fn fate(rig: &mut Rig, sbdf: &str) -> String {
    // What guests cause is published a little later.
    rig.pass(200_000_000);
    rig.published(sbdf, "aer").unwrap_or_default()
}

/// The answers of drivers, step by step, and where each row of them ends (Linux: `pcie_do_recovery`, and what its
/// xen-pciback takes for "kill").
#[test]
fn each_answer_leads_to_the_next_step_or_to_the_end() {
    let good: &[(&str, &[(u32, i32)])] = &[
        ("nonfatal", &[(DETECTED, CAN_RECOVER), (MMIO, RECOVERED), (RESUME, NONE)]),
        ("nonfatal", &[(DETECTED, NEED_RESET), (SLOT_RESET, RECOVERED), (RESUME, NONE)]),
        ("nonfatal", &[(DETECTED, RECOVERED), (RESUME, NONE)]),
        ("fatal", &[(DETECTED, CAN_RECOVER), (MMIO, NEED_RESET), (SLOT_RESET, RECOVERED), (RESUME, NONE)]),
        // The answer to resume is nobody's: Linux's frontend writes 1 whatever the driver does.
        ("fatal", &[(DETECTED, NEED_RESET), (SLOT_RESET, RECOVERED), (RESUME, i32::MIN)]),
    ];
    let lost: &[(u32, i32, &str)] = &[
        (DETECTED, NONE, "no driver"),
        (DETECTED, DISCONNECT, "gives it up"),
        (DETECTED, NO_DRIVER, "no driver"),
        (MMIO, NONE, "no driver"),
        (MMIO, DISCONNECT, "gives it up"),
        (MMIO, CAN_RECOVER, "did not recover"),
        (SLOT_RESET, NONE, "no driver"),
        (SLOT_RESET, DISCONNECT, "gives it up"),
        (SLOT_RESET, NEED_RESET, "did not recover"),
        // Linux's xen-pciback hands any number on to dom0's kernel.
        (DETECTED, 0, "means nothing"),
        (DETECTED, 7, "means nothing"),
        (MMIO, -1, "means nothing"),
        (SLOT_RESET, i32::MAX, "means nothing"),
        (DETECTED, i32::MIN, "means nothing"),
    ];
    let way = |last: u32| match last {
        MMIO => vec![(DETECTED, CAN_RECOVER)],
        SLOT_RESET => vec![(DETECTED, NEED_RESET)],
        _ => vec![],
    };
    for (severity, steps) in good {
        walk(severity, steps, None);
    }
    for (last, answer, why) in lost {
        let steps: Vec<_> = way(*last).into_iter().chain([(*last, *answer)]).collect();
        walk("nonfatal", &steps, Some(why));
    }
}

/// One recovery from report to end, by the steps that are expected and their answers; `why` it fails, if it does.
fn walk(severity: &str, steps: &[(u32, i32)], why: Option<&str>) {
    let mut rig = boot(model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    report(&mut rig, NIC, severity);
    assert_eq!(fate(&mut rig, NIC), format!("{severity}: recovering"));
    let (reads, events) = (guest.page.aer_reads.get(), rig.world.notified.borrow().len());
    for (step, (call, answer)) in steps.iter().enumerate() {
        let state = if *call == DETECTED && severity == "fatal" { FROZEN } else { NORMAL };
        assert_eq!(guest.asked(), Some((*call, state, 0)), "{steps:?}, step {step}");
        guest.answer(&mut rig, *answer);
    }
    assert_eq!(guest.asked(), None, "{steps:?}");
    assert_eq!(guest.page.aer_reads.get() - reads, steps.len() as u32, "each answer is read once");
    let told = rig.world.notified.borrow().len() - events;
    assert_eq!(told, steps.len() - 1, "an event comes with each request, the first came before");
    match why {
        None => {
            assert_eq!(fate(&mut rig, NIC), format!("{severity}: recovered"));
            assert_eq!(rig.state(NIC), "in-use");
            assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
            assert_eq!(guest.back("aerState"), None);
        }
        Some(why) => {
            let fate = fate(&mut rig, NIC);
            assert!(fate.starts_with("nonfatal: failed: ") && fate.contains(why), "{steps:?}: {fate}");
            assert!(rig.reason(NIC).contains(why), "{steps:?}: {}", rig.reason(NIC));
            assert_eq!(guest.back("aerState").as_deref(), Some("aerfail"));
            assert_eq!(guest.read(&mut rig, 0, 0, 4), Err(-1));
        }
    }
}

/// Linux's xen-pciback writes a node that nobody reads, and the function goes on as it was.
#[test]
fn a_function_whose_error_nobody_copes_with_is_out_of_its_guests_reach_until_it_is_detached() {
    let world: std::rc::Rc<World> = std::rc::Rc::default();
    world.plug(NIC, Card::FULL.build());
    let mut rig = boot_in(world, TWO);
    let guest = guest(&mut rig, 1, &[NIC, OTHER]);
    let sbdf = NIC.parse().unwrap();
    guest.enable_msix(&mut rig, &[0, 1]).unwrap();
    report(&mut rig, NIC, "nonfatal");
    guest.answer(&mut rig, DISCONNECT);
    assert!(fate(&mut rig, NIC).contains("gives it up"));
    assert!(rig.reason(NIC).contains("nonfatal error"), "{}", rig.reason(NIC));
    assert!(rig.reason(NIC).contains("detach it"), "a remedy: {}", rig.reason(NIC));
    let hardware = rig.hardware(NIC);
    assert_eq!(hardware.word(4) & (MASTER | INTX_DISABLE), INTX_DISABLE, "no DMA, and no interrupt on its line");
    assert_eq!(hardware.word(at::MSIX_CONTROL) & ENABLE, 0);
    assert!(rig.world.xen.mapped(sbdf).is_empty(), "no vector is mapped");
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), -1, "it answers nothing");
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-1));
    assert_eq!(guest.read(&mut rig, 8, 0, 4), Ok(0x100e_8086), "the guest's other function goes on");
    assert_eq!(rig.state(OTHER), "in-use");

    // dom0 detaches it, and the guest lets go.
    let resets = hardware.resets.get();
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.settle();
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
    assert_eq!(hardware.resets.get(), resets + 1, "it was reset");
    assert_eq!(guest.back("aerState"), None, "no function of the guest's is held any more");
    model::withdraw(&rig.world, 1, 0);
    rig.settle();
    let mut next = rig.attach(2, &[NIC]);
    next.connect(&mut rig);
    assert!(next.read(&mut rig, 0, 0, 4).is_ok());
}

#[test]
fn a_guest_that_connects_anew_has_a_held_function_again() {
    let mut rig = boot(model::ONE);
    let mut guest = guest(&mut rig, 1, &[NIC]);
    report(&mut rig, NIC, "nonfatal");
    guest.answer(&mut rig, DISCONNECT);
    assert_eq!(rig.state(NIC), "broken");
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!((rig.state(NIC).as_str(), guest.back("aerState")), ("in-use", None));
    guest.connect(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    report(&mut rig, NIC, "nonfatal");
    assert_eq!(guest.asked(), Some((DETECTED, NORMAL, 0)), "the new connection is asked like any");
}

/// Linux's xen-pciback waits for 300 seconds with a lock held that every other device needs, then reports a success
/// and leaves its own note that an answer is due.
#[test]
fn a_guest_that_does_not_answer_loses_the_function_after_a_while_and_holds_nobody_up() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0 dev=0000:03:00.0");
    let mut deaf = guest(&mut rig, 1, &[NIC, "0000:03:00.0"]);
    let other = guest(&mut rig, 2, &[OTHER]);
    report(&mut rig, NIC, "nonfatal");
    assert!(rig.backend.next_deadline().is_some(), "somebody wakes up to end the wait");
    rig.pass(PATIENCE - 1_000_000_000);
    assert_eq!(deaf.asked(), Some((DETECTED, NORMAL, 0)), "it still has time");
    assert_eq!(other.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert_eq!(deaf.read(&mut rig, 0, 0, 4), Ok(0x100e_8086), "and its own requests are served");
    report(&mut rig, OTHER, "nonfatal");
    other.answer(&mut rig, RECOVERED);
    other.answer(&mut rig, NONE);
    assert_eq!(fate(&mut rig, OTHER), "nonfatal: recovered", "another guest's answers are taken meanwhile");
    rig.pass(2_000_000_000);
    assert_eq!(deaf.page.flags.get(), 2, "the request is taken back");
    assert!(rig.reason(NIC).contains("did not answer"), "{}", rig.reason(NIC));
    assert_eq!(deaf.back("aerState").as_deref(), Some("aerfail"));
    assert_eq!(rig.state("0000:03:00.0"), "in-use", "its other function goes on");
    assert_eq!(rig.backend.next_deadline(), None, "nothing is left pending");

    // Its answer comes after all.
    let reads = deaf.page.aer_reads.get();
    deaf.page.aer_err.set(RECOVERED);
    deaf.ring(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), deaf.page.aer_reads.get()), ("broken", reads));

    // What it writes now could be meant for the first request.
    report(&mut rig, "0000:03:00.0", "nonfatal");
    assert_eq!(deaf.asked(), None);
    assert!(rig.reason("0000:03:00.0").contains("unanswered"), "{}", rig.reason("0000:03:00.0"));

    // With a new page there is nothing to confuse.
    deaf.set_front("state", "6");
    rig.settle();
    deaf.connect(&mut rig);
    report(&mut rig, NIC, "nonfatal");
    deaf.answer(&mut rig, RECOVERED);
    deaf.answer(&mut rig, NONE);
    assert_eq!(fate(&mut rig, NIC), "nonfatal: recovered");
}

#[test]
fn a_frontend_that_does_not_handle_errors_is_not_asked() {
    let mut rig = boot(model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    guest.page.flags.set(0);
    let events = rig.world.notified.borrow().len();
    report(&mut rig, NIC, "nonfatal");
    assert_eq!((guest.page.flags.get(), guest.page.aer.get()), (0, None));
    assert_eq!(rig.world.notified.borrow().len(), events);
    assert!(rig.reason(NIC).contains("does not handle errors"), "{}", rig.reason(NIC));
    assert_eq!(guest.back("aerState").as_deref(), Some("aerfail"));
}

#[test]
fn a_function_that_nobody_has_is_reset_and_restored() {
    let mut rig = boot_with(Card::FULL);
    let hardware = rig.hardware(NIC);
    // What dom0's kernel does to the link.
    hardware.reset(rig.world.now.get(), (0, Silence::Ones));
    let resets = hardware.resets.get();
    rig.world.report_error(NIC, "auto");
    rig.settle();
    assert_eq!(hardware.resets.get(), resets + 1);
    assert_eq!(u32::from(hardware.word(0x12)) << 16, BAR0, "it has its addresses again");
    assert_eq!((rig.state(NIC).as_str(), fate(&mut rig, NIC).as_str()), ("ready", "fatal: reset: no guest has it"));
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(guest.asked(), None, "it is none of the next guest's business");
}

#[test]
fn a_guest_that_is_not_connected_finds_the_function_reset() {
    let mut rig = boot_with(Card::FULL);
    let mut guest = rig.attach(1, &[NIC]);
    let hardware = rig.hardware(NIC);
    hardware.reset(rig.world.now.get(), (0, Silence::Ones));
    rig.world.report_error(NIC, "auto");
    rig.settle();
    assert_eq!(fate(&mut rig, NIC), "fatal: reset: its guest is not connected");
    assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "frontend").as_deref()), ("in-use", Some("1")));
    assert_eq!(u32::from(hardware.word(0x12)) << 16, BAR0);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
}

#[test]
fn a_guest_that_dies_while_it_is_asked_leaves_nothing_behind() {
    let mut rig = boot(TWO);
    let first = guest(&mut rig, 1, &[NIC]);
    let second = guest(&mut rig, 2, &[OTHER]);
    report(&mut rig, NIC, "nonfatal");
    first.destroy(&mut rig);
    assert_eq!((rig.state(NIC).as_str(), rig.world.mapped.get()), ("ready", 1));
    assert_eq!(fate(&mut rig, NIC), "nonfatal: reset: its guest has let it go");
    assert_eq!(rig.backend.next_deadline(), None);
    let next = guest(&mut rig, 3, &[NIC]);
    assert_eq!(next.asked(), None);
    for guest in [&second, &next] {
        assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    }
    second.die(Stage::Freed);
}

#[test]
fn a_guest_that_closes_while_it_is_asked_finds_its_function_reset() {
    let mut rig = boot(model::ONE);
    let mut guest = guest(&mut rig, 1, &[NIC]);
    report(&mut rig, NIC, "nonfatal");
    guest.set_front("state", "6");
    rig.settle();
    assert_eq!(fate(&mut rig, NIC), "nonfatal: reset: its guest has let it go");
    guest.connect(&mut rig);
    assert_eq!(guest.asked(), None);
    assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
}

/// The page holds one request. Other guests have their own.
#[test]
fn two_functions_of_a_guest_are_asked_about_one_after_the_other_and_two_guests_at_once() {
    let mut rig = boot("dev=0000:01:00.0 dev=0000:02:00.0 dev=0000:03:00.0");
    let both = guest(&mut rig, 1, &[NIC, OTHER]);
    let one = guest(&mut rig, 2, &["0000:03:00.0"]);
    for sbdf in [NIC, OTHER, "0000:03:00.0"] {
        report(&mut rig, sbdf, "nonfatal");
    }
    assert_eq!(both.asked(), Some((DETECTED, NORMAL, 0)));
    assert_eq!(one.asked(), Some((DETECTED, NORMAL, 0)));
    one.answer(&mut rig, DISCONNECT);
    both.answer(&mut rig, CAN_RECOVER);
    both.answer(&mut rig, RECOVERED);
    both.answer(&mut rig, NONE);
    assert_eq!(both.asked(), Some((DETECTED, NORMAL, 8)));
    both.answer(&mut rig, RECOVERED);
    both.answer(&mut rig, NONE);
    for (sbdf, state) in [(NIC, "in-use"), (OTHER, "in-use"), ("0000:03:00.0", "broken")] {
        assert_eq!(rig.state(sbdf), state, "{sbdf}");
    }
}

/// A request about a function that has left cannot be taken out of the page: the answer to it could be taken for one to
/// the next.
#[test]
fn a_function_that_leaves_while_its_guest_is_asked_keeps_the_page_until_the_answer() {
    let mut rig = boot(TWO);
    let guest = guest(&mut rig, 1, &[NIC, OTHER]);
    report(&mut rig, NIC, "nonfatal");
    report(&mut rig, OTHER, "nonfatal");
    guest.set_back("state-0", "5");
    guest.set_back("state", "7");
    rig.deliver();
    guest.set_front("state", "7");
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
    assert_eq!(guest.asked(), Some((DETECTED, NORMAL, 0)), "it still stands there");
    guest.answer(&mut rig, DISCONNECT);
    assert_eq!((rig.state(NIC).as_str(), rig.state(OTHER).as_str()), ("ready", "in-use"), "it is meant for nobody");
    assert_eq!(guest.asked(), Some((DETECTED, NORMAL, 8)));
    guest.answer(&mut rig, RECOVERED);
    guest.answer(&mut rig, NONE);
    assert_eq!(fate(&mut rig, OTHER), "nonfatal: recovered");
}

/// A driver does configuration accesses while it handles an error.
#[test]
fn requests_of_the_guest_are_served_while_it_is_asked_and_keep_its_own_bits() {
    let mut rig = boot(model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    report(&mut rig, NIC, "nonfatal");
    for _ in 0..20 {
        assert_eq!(guest.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    }
    assert_eq!(guest.asked(), Some((DETECTED, NORMAL, 0)));
    // Answer and request come with the same event.
    guest.post(RawRequest { size: 4, ..Default::default() });
    guest.answer(&mut rig, CAN_RECOVER);
    assert_eq!(guest.asked(), Some((MMIO, NORMAL, 0)));
    assert_eq!(guest.reply().value, 0x100e_8086);
}

#[test]
fn flags_that_a_guest_flips_reach_nothing_but_its_own_recovery() {
    let mut rig = boot(TWO);
    let hostile = guest(&mut rig, 1, &[NIC]);
    let other = guest(&mut rig, 2, &[OTHER]);
    let reads = hostile.page.aer_reads.get();
    for flags in [PCIB_ACTIVE, 0, PCIB_ACTIVE | 2, !PCIF_ACTIVE, 2] {
        hostile.page.flags.set(flags);
        hostile.page.aer_err.set(RECOVERED);
        hostile.ring(&mut rig);
    }
    assert_eq!(hostile.page.aer_reads.get(), reads, "nobody asked");
    assert_eq!(fate(&mut rig, NIC), "");
    // The bit is set before anything is asked, and at each answer again: it never says that it has answered.
    hostile.page.flags.set(PCIB_ACTIVE | 2);
    report(&mut rig, NIC, "nonfatal");
    for _ in 0..100 {
        hostile.page.aer_err.set(RECOVERED);
        hostile.ring(&mut rig);
    }
    assert_eq!(fate(&mut rig, NIC), "nonfatal: recovering");
    // What it takes for an answer without having written one is what was asked, as a number.
    hostile.page.flags.set(2);
    hostile.page.aer_err.set(0);
    hostile.ring(&mut rig);
    assert!(fate(&mut rig, NIC).contains("means nothing"));
    assert_eq!(rig.state(OTHER), "in-use");
    assert_eq!(other.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
}

/// After a fatal error dom0's kernel resets the link, and what is behind it has lost its registers. A driver that kept its
/// vectors counts on finding them after its slot-reset step.
#[test]
fn what_a_reset_of_the_link_took_is_put_back_before_the_guest_is_told() {
    let mut rig = boot_with(Card::FULL);
    let guest = guest(&mut rig, 1, &[NIC]);
    let vectors = guest.enable_msix(&mut rig, &[0, 1]).unwrap();
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    let hardware = rig.hardware(NIC);
    assert!(hardware.delivers(0) && hardware.delivers(1));
    hardware.reset(rig.world.now.get(), (0, Silence::Ones));
    assert_eq!(hardware.word(0x12), 0);
    report(&mut rig, NIC, "auto");
    assert_eq!(guest.asked(), Some((DETECTED, FROZEN, 0)), "what is found says how bad it was");
    assert_eq!(u32::from(hardware.word(0x12)) << 16, BAR0, "the addresses are back");
    assert_eq!(hardware.word(4) & MASTER, 0, "it does no DMA before its driver wants it to");
    assert_eq!(guest.read(&mut rig, 0, 4, 2), Ok(0), "the guest sees a Command register after a reset");
    guest.answer(&mut rig, NEED_RESET);
    assert_eq!(guest.asked(), Some((SLOT_RESET, NORMAL, 0)));
    // pci_restore_state.
    assert_eq!(guest.write(&mut rig, 0, 0x10, 4, BAR0), 0);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    rig.pass(100_000_000);
    assert!(rig.acts(NIC).contains(&Act::Restore), "Xen puts its vectors back");
    assert!(hardware.delivers(0) && hardware.delivers(1));
    assert_eq!(hardware.word(4) & 6, 6);
    guest.answer(&mut rig, RECOVERED);
    guest.answer(&mut rig, NONE);
    assert_eq!(fate(&mut rig, NIC), "fatal: recovered");
    vectors.iter().for_each(|pirq| guest.close(*pirq));
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready");
}

/// A function that kept its registers is left as its driver has it.
#[test]
fn an_error_without_a_reset_changes_nothing_in_the_function() {
    let mut rig = boot_with(Card::FULL);
    let guest = guest(&mut rig, 1, &[NIC]);
    guest.enable_msix(&mut rig, &[0]).unwrap();
    rig.forget();
    report(&mut rig, NIC, "auto");
    assert_eq!(guest.asked(), Some((DETECTED, NORMAL, 0)));
    guest.answer(&mut rig, CAN_RECOVER);
    guest.answer(&mut rig, RECOVERED);
    guest.answer(&mut rig, NONE);
    rig.pass(100_000_000);
    assert_eq!((rig.acts(NIC), rig.hardware(NIC).writes.borrow().len()), (vec![], 0));
}

#[test]
fn a_function_that_is_gone_is_told_to_be_and_held_whatever_its_driver_answers() {
    for answer in [DISCONNECT, RECOVERED, CAN_RECOVER, 77] {
        let mut rig = boot(model::ONE);
        let guest = guest(&mut rig, 1, &[NIC]);
        rig.hardware(NIC).vanish();
        report(&mut rig, NIC, "auto");
        assert_eq!(guest.asked(), Some((DETECTED, PERMANENT, 0)));
        guest.answer(&mut rig, answer);
        assert_eq!(guest.asked(), None);
        assert!(rig.reason(NIC).contains("permanent"), "{}", rig.reason(NIC));
        rig.hardware(NIC).come_back();
    }
}

#[test]
fn a_worse_error_begins_anew_and_any_other_goes_with_the_recovery_under_way() {
    let mut rig = boot(model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    report(&mut rig, NIC, "nonfatal");
    guest.answer(&mut rig, CAN_RECOVER);
    assert_eq!(guest.asked(), Some((MMIO, NORMAL, 0)));
    report(&mut rig, NIC, "nonfatal");
    assert_eq!(guest.asked(), Some((MMIO, NORMAL, 0)), "that is known");
    report(&mut rig, NIC, "fatal");
    guest.answer(&mut rig, RECOVERED);
    assert_eq!(guest.asked(), Some((DETECTED, FROZEN, 0)), "the answer of before counts no more");
    report(&mut rig, NIC, "nonfatal");
    for answer in [NEED_RESET, RECOVERED, NONE] {
        guest.answer(&mut rig, answer);
    }
    assert_eq!(fate(&mut rig, NIC), "fatal: recovered");
    // A million reports need no more memory than one.
    for _ in 0..1000 {
        report(&mut rig, NIC, "nonfatal");
    }
    guest.answer(&mut rig, RECOVERED);
    guest.answer(&mut rig, NONE);
    assert_eq!(guest.asked(), None);
}

#[test]
fn a_report_that_means_nothing_does_nothing() {
    let mut rig = boot(model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    for wish in [
        "0000-01-00-0",
        "0000-01-00-0 ",
        "0000-01-00-0 mild",
        "0000-01-00-0 fatal ",
        "0000-01-00-0  fatal",
        "0000:01:00.0 fatal",
        "0000-09-00-0 fatal",
        " fatal",
        "fatal",
    ] {
        rig.world.set(WISH, wish);
        rig.deliver();
        assert_eq!(rig.world.get(WISH).as_deref(), Some(""), "{wish:?}");
        assert_eq!((guest.asked(), fate(&mut rig, NIC)), (None, String::new()), "{wish:?}");
    }
}

#[test]
fn a_report_while_the_function_is_between_guests_is_covered_by_its_reset() {
    let mut rig = boot_with(Card::FULL);
    let guest = guest(&mut rig, 1, &[NIC]);
    guest.leave();
    rig.deliver();
    assert_eq!(rig.state(NIC), "resetting");
    report(&mut rig, NIC, "nonfatal");
    rig.settle();
    guest.die(Stage::Freed);
    rig.settle();
    assert_eq!(
        (rig.state(NIC).as_str(), fate(&mut rig, NIC).as_str()),
        ("ready", "nonfatal: reset: it is between guests")
    );
}

/// What dom0 writes for the domain it cannot write without it.
#[test]
fn without_dom0s_service_what_a_reset_took_cannot_be_put_back_and_the_function_is_held() {
    let world = World::with(model::xen::Flavour::Stock417);
    world.serve();
    world.plug(NIC, Card::FULL.build());
    let mut rig = boot_in(world, model::ONE);
    let guest = guest(&mut rig, 1, &[NIC]);
    rig.world.kill_serve();
    rig.deliver();
    rig.hardware(NIC).reset(rig.world.now.get(), (0, Silence::Ones));
    report(&mut rig, NIC, "auto");
    assert_eq!(guest.asked(), None);
    assert!(rig.reason(NIC).contains("xl-pciback serve"), "{}", rig.reason(NIC));
    rig.world.serve();
    rig.settle();
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready", "with it, it comes back");
}

#[test]
fn a_guest_is_asked_by_the_address_at_which_it_sees_the_function() {
    let mut rig = boot("ecam=0002:00-ff@c0000000 topology=passthrough dev=0002:81:02.3");
    let mut guest = rig.attach(1, &["0002:81:02.3"]);
    guest.connect(&mut rig);
    report(&mut rig, "0002:81:02.3", "nonfatal");
    let asked = guest.page.aer.get().unwrap();
    assert_eq!((asked.domain, asked.bus, asked.devfn), (2, 0x81, 0x13));
}
