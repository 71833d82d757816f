//! MSI and MSI-X as a guest asks for them: what it is answered, what is mapped, and what the card holds then.
//! Cases are real reports of passthrough trouble; each names where it was told.

use crate::model;

use model::hardware::{ENABLE, INTX_DISABLE, MASKALL, MEMORY, MS, MSI_ENABLE, MsiKind, at};
use model::logs::{heard, listen};
use model::xen::errno::*;
use model::xen::{Act, Call, Stage};
use model::{Card, Guest, Hardware, NIC, ONE, OTHER, Rig, TWO, boot, boot_in, boot_with};
use pciback::physdev::{Pirq, Vector};
use pciback::sbdf::Sbdf;
use pciback::wire::{PCIF_ACTIVE, RawRequest, op};

/// MSI-X and MSI with as many vectors as the shared page can carry.
const LARGE: Card = Card { msix: 129, msi: Some(MsiKind { vectors: 32, maskable: true, wide: true }), ..Card::PLAIN };

fn nic() -> Sbdf {
    NIC.parse().unwrap()
}

/// A guest whose driver has turned the card on.
fn started(card: Card) -> (Rig, Guest) {
    let mut rig = boot_with(card);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    rig.forget();
    (rig, guest)
}

/// Message Control of MSI-X, of MSI, and Command.
fn registers(rig: &Rig) -> (u16, u16, u16) {
    let card = rig.hardware(NIC);
    (card.word(at::MSIX_CONTROL), card.word(at::MSI_CONTROL), card.word(at::COMMAND))
}

/// Which MSI-X entries are mapped.
fn entries(rig: &Rig) -> Vec<u16> {
    rig.world.xen.mapped(nic()).into_iter().map(|(_, _, entry)| entry).collect()
}

fn is_line_on(rig: &Rig) -> bool {
    registers(rig).2 & INTX_DISABLE == 0
}

fn table_base() -> u64 {
    model::hardware::BAR0.into()
}

#[test]
fn msix_is_enabled_masked_mapped_and_then_unmasked() {
    let (mut rig, guest) = started(Card::PLAIN);
    let vectors = guest.enable_msix(&mut rig, &[4, 0]).expect("two vectors");
    let map = |entry| Act::Map(1, Vector::Msix { entry, table_base: table_base() });
    assert_eq!(
        rig.acts(NIC),
        [
            Act::Write(at::MSIX_CONTROL, 0xc004),
            map(4),
            map(0),
            Act::Write(at::COMMAND, 0x0407),
            Act::Write(at::MSIX_CONTROL, 0x8004),
        ]
    );
    assert_eq!(vectors, [55, 54], "pirqs in the order of the request");
    assert_eq!(rig.published(NIC, "interrupts").as_deref(), Some("MSI-X 2"));
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    assert_eq!([4, 0, 1].map(|entry| rig.hardware(NIC).delivers(entry)), [true, true, false]);
}

#[test]
fn msix_is_masked_unmapped_and_then_disabled() {
    let (mut rig, guest) = started(Card::PLAIN);
    let vectors = guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    vectors.iter().for_each(|pirq| guest.close(*pirq));
    rig.forget();
    assert_eq!(guest.disable_msix(&mut rig), 21, "the pirq of the pin that is in use again");
    assert_eq!(
        rig.acts(NIC),
        [
            Act::Write(at::MSIX_CONTROL, 0xc004),
            Act::Unmap(1, vectors[0]),
            Act::Unmap(1, vectors[1]),
            Act::Write(at::MSIX_CONTROL, 0x0004),
            Act::Write(at::COMMAND, 0x0007),
        ]
    );
    rig.pass(1_000_000_000);
    assert_eq!(rig.published(NIC, "interrupts").as_deref(), Some("INTx"));
    assert_eq!(rig.world.xen.pirqs(1), []);
}

#[test]
fn msi_is_mapped_and_then_enabled() {
    for card in [Card::MSI_ONLY, Card::MSI_SIMPLE] {
        let (mut rig, guest) = started(card);
        let pirq = guest.enable_msi(&mut rig).expect("a vector");
        assert_eq!(rig.acts(NIC)[..2], [Act::Map(1, Vector::Msi), Act::Write(at::COMMAND, 0x0407)]);
        guest.bind(pirq);
        assert!(rig.hardware(NIC).delivers_msi(0), "{card:?}");
        assert_eq!(rig.published(NIC, "interrupts").as_deref(), Some("MSI 1"));
        guest.close(pirq);
        guest.disable_msi(&mut rig);
        assert_eq!((registers(&rig).1 & MSI_ENABLE, rig.world.xen.interrupts()), (0, 0), "{card:?}");
        assert!(is_line_on(&rig), "{card:?}");
    }
}

// Measured with Linux 6.1 and 6.12 guests: from 5.17 on, a driver that gives up MSI-X has disable_msi sent.
// Linux's backend ignores that, and its answer to the next enable_msix is -114.
// Case 9: xen-devel, June 2025, "error enabling MSI-X / MSI for guest": an NVMe drive is left with one queue.
#[test]
fn a_second_enable_after_disable_msi_gets_new_vectors() {
    let (mut rig, guest) = started(LARGE);
    let first = guest.enable_msix(&mut rig, &[0]).expect("one vector");
    first.iter().for_each(|pirq| guest.bind(*pirq));
    first.iter().for_each(|pirq| guest.close(*pirq));
    assert_eq!(guest.disable_msi(&mut rig), 21);
    assert_eq!((entries(&rig).len(), registers(&rig).0), (0, 128));
    rig.world.xen.limit(1, 64);
    let second = guest.enable_msix(&mut rig, &(0..33).collect::<Vec<_>>()).expect("33 vectors");
    assert_eq!((second.len(), entries(&rig).len()), (33, 33));
    second.iter().for_each(|pirq| guest.bind(*pirq));
    assert!((0..33).all(|entry| rig.hardware(NIC).delivers(entry)));
}

// Case 9 (a): the same with the operation of that name.
#[test]
fn case_9a_one_vector_then_none_then_many() {
    let (mut rig, guest) = started(LARGE);
    rig.world.xen.limit(1, 64);
    guest.enable_msix(&mut rig, &[0]).expect("one vector");
    guest.disable_msix(&mut rig);
    assert_eq!(guest.enable_msix(&mut rig, &(0..33).collect::<Vec<_>>()).map(|vectors| vectors.len()), Ok(33));
}

// Case 9 (b): without a disable in between the answer is Linux's -114, and the first vector goes on working.
#[test]
fn toggling_interrupts_without_end_writes_to_xenstore_only_now_and_then() {
    let (mut rig, guest) = started(Card::PLAIN);
    let step = 1_000_000;
    rig.pass(10_000 * step);
    let before = rig.world.operations.get();
    for _ in 0..1000 {
        guest.enable_msix(&mut rig, &[0]).expect("a vector");
        guest.disable_msi(&mut rig);
        rig.pass(step);
    }
    // In one second: one write at once, and one each fifth of a second.
    let writes = rig.world.operations.get() - before;
    assert!((1..=6 * 5).contains(&writes), "{writes} operations on xenstore for 1000 rounds");
    guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    rig.pass(1000 * step);
    assert_eq!(rig.published(NIC, "interrupts").as_deref(), Some("MSI-X 2"), "the last is told in the end");
    // And a change after a while is told at once.
    guest.disable_msi(&mut rig);
    assert_eq!(rig.published(NIC, "interrupts").as_deref(), Some("INTx"));
}

#[test]
fn case_9b_a_second_enable_is_refused_and_harms_nothing() {
    let (mut rig, guest) = started(LARGE);
    let first = guest.enable_msix(&mut rig, &[0]).expect("one vector");
    guest.bind(first[0]);
    rig.forget();
    assert_eq!(guest.enable_msix(&mut rig, &(0..33).collect::<Vec<_>>()), Err(-114));
    assert_eq!(rig.acts(NIC), []);
    assert!(rig.hardware(NIC).delivers(0));
    assert_eq!(rig.world.xen.mapped(nic()), [(1, first[0], 0)]);
}

// Case 9 (c): the fifth of eight has no free pirq.
#[test]
fn case_9c_all_or_nothing() {
    let (mut rig, guest) = started(LARGE);
    rig.world.xen.limit(1, 4);
    let before = registers(&rig);
    listen();
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1, 2, 3, 4, 5, 6, 7]), Err(-28));
    assert_eq!(rig.acts(NIC).iter().filter(|act| matches!(act, Act::Unmap(..))).count(), 4);
    assert_eq!((registers(&rig), entries(&rig)), (before, vec![]));
    assert_eq!(rig.world.xen.pirqs(1), []);
    assert!(heard().iter().any(|line| line.contains("extra_guest_irqs")), "{:#?}", heard());
    // What the driver does then.
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1, 2, 3]).map(|vectors| vectors.len()), Ok(4));
}

/// A failed enable leaves the card as it was, whatever Xen's reason and wherever on the way.
#[test]
fn a_failure_at_any_vector_leaves_nothing_half_done() {
    for errno in [EPERM, ESRCH, ENXIO, ENOMEM, EBUSY, EEXIST, ENODEV, EINVAL, ENFILE, ENOSPC, ENODATA, EOPNOTSUPP, 99] {
        for failing in 0..4 {
            for stays in [false, true] {
                let (mut rig, guest) = started(Card::BOTH);
                rig.world.xen.fail(Call::Map, failing..if stays { u64::MAX } else { failing + 1 }, errno);
                let before = registers(&rig);
                let err = match errno {
                    ENOSPC => -28,
                    ENOMEM => -12,
                    _ => -5,
                };
                assert_eq!(guest.enable_msix(&mut rig, &[0, 1, 2, 3]), Err(err), "-{errno} at {failing}");
                assert_eq!((registers(&rig), rig.world.xen.interrupts()), (before, 0), "-{errno} at {failing}");
                assert!(is_line_on(&rig));
                rig.world.xen.heal();
                rig.world.xen.fail(Call::Map, 0..1, errno);
                assert_eq!(guest.enable_msi(&mut rig), Err(-5));
                assert_eq!((registers(&rig), rig.world.xen.interrupts()), (before, 0), "-{errno} at {failing}");
                guest.enable_msix(&mut rig, &[0, 1]).expect("Xen is well again");
            }
        }
    }
}

/// Xen fails deep inside, with its own preparations done: an interrupt remapping table that is full.
#[test]
fn a_failure_inside_xen_leaves_nothing_behind_either() {
    let (mut rig, guest) = started(Card::BOTH);
    let before = registers(&rig);
    rig.world.xen.remapping_error.set(Some(ENOSPC));
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]), Err(-28));
    assert_eq!((registers(&rig), rig.world.xen.interrupts()), (before, 0));
    assert_eq!(guest.enable_msi(&mut rig), Err(-5));
    assert_eq!((registers(&rig), rig.world.xen.interrupts()), (before, 0));
    rig.world.xen.remapping_error.set(None);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]).map(|vectors| vectors.len()), Ok(2));
}

/// Xen's -ENODATA: somebody undid prepare_msix. It leaves a MASKALL in Xen's memory, which must not outlive the
/// failure.
#[test]
fn a_table_that_is_not_prepared_any_more_fails_once() {
    let (mut rig, guest) = started(Card::PLAIN);
    rig.world.as_dom0(|xen| xen.release_msix(nic())).unwrap();
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-5));
    assert!(!rig.world.xen.host_maskall(nic()) && rig.world.xen.prepared(nic()));
    let vectors = guest.enable_msix(&mut rig, &[0]).expect("prepared again");
    guest.bind(vectors[0]);
    assert!(rig.hardware(NIC).delivers(0));
}

// Case 5: xen-devel, November 2022, "Consider INTx disabled when MSI/MSI-X is enabled": Linux writes ENABLE|MASKALL
// while the pin is still on. There the backend served QEMU, which sets the bits itself. Here no guest does: it is
// answered "denied", as Linux's backend answers its PV guests, nothing changes, and the operation that follows is
// not judged by bit 10 of Command.
#[test]
fn case_5_a_pin_that_is_on_keeps_no_message_interrupt_off() {
    let (mut rig, guest) = started(Card::BOTH);
    assert!(is_line_on(&rig));
    assert_eq!(guest.write(&mut rig, 0, at::MSIX_CONTROL.into(), 2, 0xc004), -3);
    assert_eq!(registers(&rig).0, 0x0004);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    assert_eq!((registers(&rig).0, is_line_on(&rig)), (0x8004, false));
    // Linux's own INTX_DISABLE and its last write of Message Control change nothing more.
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
    assert_eq!(guest.write(&mut rig, 0, at::MSIX_CONTROL.into(), 2, 0x8004), 0);
    assert_eq!((registers(&rig).0, registers(&rig).2), (0x8004, 0x0407));
    // The second half of the case: MSI on, and MSI-X wanted.
    guest.disable_msix(&mut rig);
    guest.enable_msi(&mut rig).expect("a vector");
    assert_eq!(guest.write(&mut rig, 0, at::MSIX_CONTROL.into(), 2, 0xc004), -3);
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-6));
    assert_eq!(registers(&rig).0, 0x0004);
}

// Case 6: xen-devel, March 2020, "fix INTERRUPT_TYPE_* defines": with every interrupt off, enabling one was refused.
#[test]
fn case_6_with_all_interrupts_off_each_kind_can_be_enabled() {
    let (mut rig, guest) = started(Card::BOTH);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
    assert_eq!(registers(&rig).2, 0x0407);
    assert!(guest.enable_msi(&mut rig).is_ok());
    guest.disable_msi(&mut rig);
    assert_eq!(registers(&rig).2, 0x0407);
    assert!(guest.enable_msix(&mut rig, &[0]).is_ok());
    guest.disable_msix(&mut rig);
    assert_eq!(registers(&rig).2, 0x0407);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert!(is_line_on(&rig));
}

/// The Atheros QCA8171's capabilities: power management, MSI and MSI-X with 16 vectors each.
const QCA8171: Card =
    Card { msi: Some(MsiKind { vectors: 16, maskable: true, wide: true }), msix: 16, power: Some(true), ..Card::PLAIN };

// Case 7: QubesOS issues 7052 and 7057: drivers that ask for MSI-X and then for nothing else.
#[test]
fn case_7_sixteen_vectors_are_sixteen_vectors() {
    let (mut rig, guest) = started(QCA8171);
    let vectors = guest.enable_msix(&mut rig, &(0..16).collect::<Vec<_>>()).expect("16 vectors");
    assert!(vectors.len() == 16 && vectors.iter().all(|pirq| *pirq > 0));
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    assert!((0..16).all(|entry| rig.hardware(NIC).delivers(entry)));
}

// Case 7: where MSI-X cannot be had, it fails cleanly and MSI works.
#[test]
fn case_7_where_msix_is_not_offered_msi_is_had() {
    for (options, errno, err) in [("", EINVAL, -5), ("", ENOSPC, -28), (",msix=off", 0, -4)] {
        let world: std::rc::Rc<model::World> = Default::default();
        world.plug(NIC, QCA8171.build());
        let mut rig = boot_in(world, &format!("{ONE}{options}"));
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        guest.enable(&mut rig);
        if errno != 0 {
            rig.world.xen.fail(Call::Map, 2..3, errno);
        }
        assert_eq!(guest.enable_msix(&mut rig, &(0..16).collect::<Vec<_>>()), Err(err));
        let pirq = guest.enable_msi(&mut rig).expect("MSI instead");
        guest.bind(pirq);
        assert!(rig.hardware(NIC).delivers_msi(0));
    }
}

// Case 8: QubesOS issue 3217: a nested host, where Xen can map neither kind. Our answers are the protocol's own "the
// operation failed" (-5), not Xen's number; only "no free pirq" is handed on (-28), as the driver then asks for less.
#[test]
fn case_8_a_driver_that_gets_neither_kind_is_left_with_a_working_pin() {
    let (mut rig, guest) = started(Card { msi: Card::FULL.msi, ..Card::PLAIN });
    rig.world.xen.fail(Call::Map, 0..u64::MAX, EINVAL);
    let before = registers(&rig);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]), Err(-5));
    assert_eq!(guest.enable_msi(&mut rig), Err(-5));
    assert_eq!(registers(&rig), before);
    assert!(is_line_on(&rig));
    assert_eq!(guest.read(&mut rig, 0, 0x3c, 2), Ok(0x0115), "line and pin");
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
    assert_eq!(guest.read(&mut rig, 0, 4, 2), Ok(0x0406), "bit 10 is the guest's to write");
}

// Case 10: a Samsung PM174X has 129 vectors; one request carries 128, and a hostile guest asks for more.
#[test]
fn case_10_counts_and_entries_that_cannot_be_are_refused_before_anything_is_touched() {
    let (mut rig, guest) = started(LARGE);
    rig.world.xen.limit(1, 200);
    for value in [129, 130, 1 << 16, (1 << 16) + 1, u32::MAX, 0] {
        guest.put_entries(&(0..129).collect::<Vec<_>>());
        assert_eq!(guest.operate(&mut rig, op::ENABLE_MSIX, 0, value).err, -22, "{value} vectors");
    }
    assert_eq!(rig.acts(NIC), []);
    let vectors = guest.enable_msix(&mut rig, &(1..129).collect::<Vec<_>>()).expect("128 vectors");
    assert_eq!((vectors.len(), entries(&rig).len()), (128, 128));

    // An Intel I210 has 5.
    let (mut rig, guest) = started(Card::PLAIN);
    for (asked, err) in [
        (&[0, 1, 2, 3, 4, 0][..], -28),
        (&[5], -22),
        (&[0, 1, 0xffff], -22),
        (&[0, 0], -22),
        (&[4, 1, 2, 3, 4], -22),
        (&[], -22),
    ] {
        assert_eq!(guest.enable_msix(&mut rig, asked), Err(err), "{asked:?}");
    }
    assert_eq!(rig.acts(NIC), []);
    assert_eq!(guest.enable_msix(&mut rig, &[4, 3, 2, 1, 0]).map(|vectors| vectors.len()), Ok(5));
}

// Case 11: endlessm/linux PR 514 and FreeBSD D6947: vector control words of which only one bit is the mask, and masks
// that are not updated. The table is Xen's: all that this domain writes is Message Control and Command, so what Xen
// puts into an entry stays there.
#[test]
fn case_11_this_domain_writes_message_control_and_command_and_nothing_else() {
    for card in [Card::PLAIN, Card::BOTH, Card::MSI_ONLY, Card::MSI_SIMPLE] {
        let (mut rig, guest) = started(card);
        for _ in 0..3 {
            let _ = guest.enable_msix(&mut rig, &[0, 1]);
            guest.disable_msi(&mut rig);
            let _ = guest.enable_msi(&mut rig);
            guest.disable_msix(&mut rig);
        }
        let own = |register: u16| [at::COMMAND, at::MSI_CONTROL, at::MSIX_CONTROL].contains(&register);
        let writes = rig.hardware(NIC).writes.borrow().clone();
        assert!(!writes.is_empty() && writes.iter().all(|(register, _)| own(*register)), "{card:?}: {writes:x?}");
    }
    // A guest's masks of its own vectors are Xen's business, and last.
    let (mut rig, guest) = started(Card::PLAIN);
    let vectors = guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    for mask in [true, false, true, false] {
        rig.world.xen.mask(1, vectors[0], mask);
        guest.read(&mut rig, 0, at::MSIX_CONTROL.into(), 2).expect("a read");
        assert_eq!([0, 1].map(|entry| rig.hardware(NIC).delivers(entry)), [!mask, true]);
    }
}

// Case 15: QubesOS issue 3609, Atheros AR9280: the capability says that table and pending bits are both at the start
// of BAR 0, where the card's registers are. Xen would protect these from writes.
#[test]
fn case_15_an_msix_capability_that_cannot_be_true_is_not_believed() {
    listen();
    let world: std::rc::Rc<model::World> = Default::default();
    let card = world.plug(NIC, Card { msix: 1, ..Card::BOTH }.build());
    card.set_word(at::MSIX + 4, 0);
    card.set_word(at::MSIX + 8, 0);
    let mut rig = boot_in(world, ONE);
    assert_eq!((rig.state(NIC).as_str(), rig.published(NIC, "msix").as_deref()), ("ready", Some("hidden")));
    assert!(!rig.acts(NIC).contains(&Act::Prepare) && !rig.world.xen.prepared(nic()));
    assert!(heard().iter().any(|line| line.contains("its MSI-X capability at 0x70")), "{:#?}", heard());
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    assert_eq!(guest.read(&mut rig, 0, 0x34, 1), Ok(at::MSI.into()));
    assert_eq!(guest.read(&mut rig, 0, i32::from(at::MSI) + 1, 1), Ok(0), "the list ends before it");
    assert_eq!(guest.read(&mut rig, 0, at::MSIX.into(), 4), Ok(0));
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-4));
    guest.enable_msi(&mut rig).expect("MSI works");
    guest.destroy(&mut rig);
    assert_eq!(rig.state(NIC), "ready");
}

// Case 16: xen-devel 2023-2024, "Allow access to registers on the same page as MSI-X table": an AX210 has registers
// beside its table, which a PV guest cannot write.
#[test]
fn case_16_a_table_that_shares_its_page_is_told_of_once_with_bar_and_page() {
    listen();
    let mut rig = boot_with(Card::BOTH);
    let told: Vec<String> = heard().into_iter().filter(|line| line.contains("shares pages")).collect();
    assert_eq!(told.len(), 1, "{:#?}", heard());
    assert!(told[0].contains(NIC) && told[0].contains("0x2000") && told[0].contains("BAR 0"), "{}", told[0]);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable_msi(&mut rig).expect("MSI is served");
}

// Case 17: QubesOS issue 10526, ath11k: a driver reads message address and data from the capability and tells its
// firmware. It reads what Xen put there.
#[test]
fn case_17_the_message_reads_as_xen_set_it() {
    for (card, data) in [(Card::MSI_ONLY, 12), (Card::MSI_SIMPLE, 8)] {
        let (mut rig, guest) = started(card);
        guest.enable_msi(&mut rig).expect("a vector");
        let mut read = |register: u16, size| guest.read(&mut rig, 0, (at::MSI + register).into(), size).unwrap();
        let message = (read(4, 4), read(data, 2));
        assert!(message.0 == 0xfee0_0000 && message.1 & 0xc000 == 0x4000, "{message:x?}");
        assert_eq!((read(4, 4), read(data, 2)), message, "unchanged between reads");
        assert_eq!(guest.write(&mut rig, 0, (at::MSI + 4).into(), 4, 0), 0, "ignored");
        assert_eq!(guest.read(&mut rig, 0, (at::MSI + 4).into(), 4), Ok(message.0));
    }
}

/// The registers of an Intel AX200 that its driver reads: power management at c8, MSI (64 bits, no mask bits) at d0,
/// PCI Express at 40.
fn ax200() -> Hardware {
    let mut image = [0; 256];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x86, 0x80, 0x23, 0x27, 0x02, 0x04, 0x10, 0x00, 0x1a, 0x00, 0x80, 0x02]);
    put(0x10, &[0x04, 0x00, 0x10, 0xce]);
    put(0x34, &[0xc8]);
    put(0x3d, &[0x01]);
    put(0x40, &[0x10, 0x00, 0x02, 0x00]);
    put(0x50, &[0x42, 0x01]);
    put(0x68, &[0x05, 0x04]);
    put(0xc8, &[0x01, 0xd0, 0x23, 0xc8, 0x08, 0x00]);
    put(0xd0, &[0x05, 0x40, 0x80, 0x00]);
    Hardware::from_image(&image)
}

// Case 18: QubesOS issue 5615: what the driver of an AX200 does to its configuration space, from a trace in the
// report. There a device model set MSI's enable bit by a write; here the operation does, and the write is denied.
#[test]
fn case_18_the_trace_of_an_ax200_reads_as_it_did() {
    let world: std::rc::Rc<model::World> = Default::default();
    let card = world.plug(NIC, ax200());
    let mut rig = boot_in(world, ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), 0);
    let reads = |rig: &mut Rig, list: &[(i32, i32, u32)]| {
        for (offset, size, value) in list {
            assert_eq!(guest.read(rig, 0, *offset, *size), Ok(*value), "{offset:#x}");
        }
    };
    let probe = [(0xcc, 2, 0x0008), (0x04, 2, 0x0002), (0x3d, 1, 0x01), (0x04, 2, 0x0002)];
    let header =
        [(0x08, 4, 0x0280_001a), (0x68, 2, 0x0405), (0x0c, 4, 0), (0x10, 4, 0xce10_0004), (0x14, 4, 0), (0x18, 4, 0)];
    reads(&mut rig, &probe);
    reads(&mut rig, &header);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert_eq!(guest.write(&mut rig, 0, 0xd2, 2, 0x0080), 0);
    assert_eq!(guest.write(&mut rig, 0, 0xd2, 2, 0x0081), -3);
    assert_eq!(card.word(0xd2), 0x0080);
    let pirq = guest.enable_msi(&mut rig).expect("a vector");
    guest.bind(pirq);
    reads(&mut rig, &[(0xd4, 4, 0xfee0_0000), (0xd8, 4, 0), (0x04, 2, 0x0006)]);
    rig.forget();
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
    assert_eq!(guest.write(&mut rig, 0, 0xd2, 2, 0x0081), 0, "it is on already");
    assert!(card.writes.borrow().is_empty(), "{:x?}", card.writes.borrow());
    reads(&mut rig, &[(0xd2, 2, 0x0081), (0x50, 2, 0x0142), (0xd2, 2, 0x0081)]);
    assert!(card.delivers_msi(0));

    // The driver is unloaded.
    assert_eq!(guest.write(&mut rig, 0, 0xd2, 2, 0x0080), -3);
    guest.close(pirq);
    guest.disable_msi(&mut rig);
    reads(&mut rig, &[(0xd2, 2, 0x0080), (0x04, 2, 0x0406)]);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    reads(&mut rig, &[(0x04, 2, 0x0006)]);
    assert_eq!(card.word(4) & 4, 4);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), 0);
    assert_eq!(card.word(4) & 4, 0, "bus mastering goes off in the card");
}

// Case 19: QubesOS issue 7906: host and guest see the same bit differently. `sequences.rs` checks it after every
// operation; this is over the ends of connections and guests.
#[test]
fn case_19_a_guest_reads_the_cards_own_enable_bits_through_resets_and_new_attachments() {
    let mut rig = boot_with(Card::FULL);
    for id in 1..4 {
        let mut guest = rig.attach(id, &[NIC]);
        for _ in 0..2 {
            guest.connect(&mut rig);
            guest.enable(&mut rig);
            let views = |rig: &mut Rig| {
                let (msix, msi, _) = registers(rig);
                let of = |rig: &mut Rig, register: u16| guest.read(rig, 0, register.into(), 2).unwrap() as u16;
                assert_eq!((of(rig, at::MSIX_CONTROL), of(rig, at::MSI_CONTROL)), (msix, msi));
                (msix & ENABLE != 0, msi & MSI_ENABLE != 0)
            };
            assert_eq!(views(&mut rig), (false, false));
            guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
            assert_eq!(views(&mut rig), (true, false));
            guest.disable_msi(&mut rig);
            guest.enable_msi(&mut rig).expect("a vector");
            assert_eq!(views(&mut rig), (false, true));
            guest.set_front("state", "6");
            rig.settle();
        }
        guest.destroy(&mut rig);
    }
}

// Case 20: XSA-157 (CVE-2015-8551, CVE-2015-8552): operations in an order nobody expects. The named ones of the
// report; `sequences.rs` has all up to a length of five.
#[test]
fn case_20_operations_in_no_sensible_order_get_an_answer() {
    let (mut rig, guest) = started(Card::BOTH);
    assert_eq!((guest.disable_msi(&mut rig), guest.disable_msix(&mut rig)), (21, 21), "nothing was on");
    assert_eq!(rig.acts(NIC), []);
    let pirq = guest.enable_msi(&mut rig).expect("a vector");
    assert_eq!(guest.enable_msi(&mut rig), Err(-5));
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-6));
    assert_eq!(rig.world.xen.mapped(nic()), [(1, pirq, 0)], "the first is untouched");
    guest.disable_msix(&mut rig);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    assert_eq!(guest.enable_msi(&mut rig), Err(-5));
    assert_eq!(entries(&rig), [0]);
    guest.disable_msi(&mut rig);

    // Memory decode off: by the host, as no guest can.
    rig.hardware(NIC).set_word(at::COMMAND, 0);
    rig.forget();
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-6));
    assert_eq!(rig.acts(NIC), [], "Xen is not asked, and nothing is touched");
}

// Case 20: a function without the capability.
#[test]
fn case_20_what_a_card_lacks_is_not_implemented() {
    let (mut rig, guest) = started(Card::BARE);
    assert_eq!((guest.enable_msi(&mut rig), guest.enable_msix(&mut rig, &[0])), (Err(-4), Err(-4)));
    let (mut rig, guest) = started(Card::MSI_ONLY);
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-4));
    let (mut rig, guest) = started(Card::PLAIN);
    assert_eq!(guest.enable_msi(&mut rig), Err(-4));
    assert_eq!(rig.acts(NIC), []);
}

// Case 21: XSA-128 (CVE-2015-4103): a wide write over an allowed and a forbidden register changed MSI data on the
// host. The registers one by one are in the unit tests of the configuration space; this is with MSI on, permissive
// or not: nothing reaches the card, and so nothing Xen's own check of it.
#[test]
fn case_21_no_width_reaches_the_registers_of_a_message_in_use() {
    for (words, permissive) in [(ONE.to_string(), false), (format!("{ONE},permissive"), true)] {
        for card in [Card::MSI_ONLY, Card::MSI_SIMPLE, Card::BOTH] {
            let world: std::rc::Rc<model::World> = Default::default();
            world.plug(NIC, card.build());
            let mut rig = boot_in(world, &words);
            let mut guest = rig.attach(1, &[NIC]);
            guest.connect(&mut rig);
            guest.enable(&mut rig);
            guest.bind(guest.enable_msi(&mut rig).expect("a vector"));
            rig.forget();
            let end = at::MSI + if card.msi.unwrap().maskable { 0x18 } else { 0x0a };
            for size in [1, 2, 4] {
                for offset in (i32::from(at::MSI)..i32::from(end)).step_by(size as usize) {
                    for value in [0, u32::MAX, 0x5555_5555] {
                        let err = guest.write(&mut rig, 0, offset, size, value);
                        assert!([0, -3].contains(&err), "{offset:#x} {size}: {err}");
                    }
                }
            }
            let behind = |write: &(u16, u32)| permissive && write.0 >= end;
            let writes = rig.hardware(NIC).writes.borrow().clone();
            assert!(writes.iter().all(behind), "{card:?}, permissive {permissive}: {writes:x?}");
            assert!(rig.hardware(NIC).delivers_msi(0));
            for (offset, size) in [(at::MSI - 2, 4), (at::MSI + 1, 2), (at::MSI, 3), (at::MSI, 8)] {
                assert_eq!(guest.write(&mut rig, 0, offset.into(), size, 0), -2, "{offset:#x} {size}");
            }
        }
    }
}

/// A card that is asleep or does not answer is not set up.
#[test]
fn a_card_that_is_asleep_or_gone_is_not_set_up() {
    let (mut rig, guest) = started(Card::FULL);
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 3), 0);
    rig.forget();
    assert_eq!((guest.enable_msix(&mut rig, &[0]), guest.enable_msi(&mut rig)), (Err(-6), Err(-5)));
    assert_eq!(rig.acts(NIC), []);
    assert_eq!(guest.write(&mut rig, 0, at::PMCSR.into(), 2, 0), 0);
    guest.enable_msix(&mut rig, &[0]).expect("it is awake");
    guest.disable_msix(&mut rig);
    rig.hardware(NIC).vanish();
    rig.forget();
    assert_eq!((guest.enable_msix(&mut rig, &[0]), guest.enable_msi(&mut rig)), (Err(-6), Err(-5)));
    assert_eq!(rig.acts(NIC), []);
    rig.hardware(NIC).come_back();
}

/// A card that vanishes with vectors in use: the vectors go, and nothing is pretended.
#[test]
fn a_card_that_vanishes_gives_its_vectors_back() {
    let (mut rig, guest) = started(Card::FULL);
    let vectors = guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    rig.hardware(NIC).vanish();
    assert_eq!(guest.disable_msix(&mut rig), 21);
    assert_eq!(rig.world.xen.interrupts(), 0);
    guest.destroy(&mut rig);
    assert!(rig.reason(NIC).contains("does not answer"));
    rig.hardware(NIC).come_back();
    rig.world.retry(NIC);
    rig.settle();
    assert_eq!(rig.state(NIC), "ready");
}

/// What could not be turned off while the card was gone is turned off when it is there again.
#[test]
fn a_card_that_comes_back_with_messages_on_has_them_off_before_the_next_guest() {
    for (card, msix) in [(Card::MSI_ONLY, false), (Card::BOTH, false), (Card::BOTH, true), (Card::FULL, false)] {
        let (mut rig, guest) = started(card);
        if msix {
            guest.enable_msix(&mut rig, &[0]).expect("a vector");
        } else {
            guest.enable_msi(&mut rig).expect("a vector");
        }
        rig.hardware(NIC).vanish();
        guest.destroy(&mut rig);
        assert!(rig.reason(NIC).contains("does not answer"), "{card:?}");
        rig.hardware(NIC).come_back();
        rig.world.retry(NIC);
        rig.settle();
        assert_eq!(rig.state(NIC), "ready", "{card:?}: {:?}", rig.published(NIC, "reason"));
        assert_eq!((registers(&rig).0 & (ENABLE | MASKALL), registers(&rig).1 & MSI_ENABLE), (0, 0), "{card:?}");
    }
}

/// A register that does not take the setting is not reported as success.
#[test]
fn an_enable_bit_that_does_not_stick_is_a_failure() {
    for (register, kind) in [(at::MSI_CONTROL, "MSI"), (at::MSIX_CONTROL, "MSI-X")] {
        let (mut rig, guest) = started(Card::BOTH);
        rig.hardware(NIC).lock(usize::from(register)..usize::from(register) + 2);
        listen();
        let err =
            if kind == "MSI" { guest.enable_msi(&mut rig).err() } else { guest.enable_msix(&mut rig, &[0]).err() };
        assert_eq!(err, Some(-5), "{kind}");
        assert_eq!(rig.world.xen.interrupts(), 0, "{kind}");
        assert!(is_line_on(&rig), "{kind}");
        assert!(heard().iter().any(|line| line.contains(&format!("{kind} not enabled"))), "{:#?}", heard());
    }
}

/// The protocol has 16 bits for a pirq of MSI-X.
#[test]
fn a_pirq_that_does_not_fit_is_given_back() {
    let (mut rig, guest) = started(Card::PLAIN);
    rig.world.xen.limit(1, 70_000);
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1]), Err(-5));
    assert_eq!(rig.world.xen.pirqs(1), []);
}

/// pcifront gives up after two seconds; with any cost of a hypercall the answer comes before.
#[test]
fn the_answer_comes_before_the_client_gives_up() {
    for (cost, fits) in [(1, true), (5, true), (10, false), (20, false), (50, false), (100, false)] {
        let (mut rig, guest) = started(LARGE);
        rig.world.xen.limit(1, 200);
        rig.world.xen.cost.set(cost * MS);
        let start = rig.world.now.get();
        let outcome = guest.enable_msix(&mut rig, &(0..128).collect::<Vec<_>>());
        let took = rig.world.now.get() - start;
        assert!(took <= 2_000 * MS, "{cost} ms a call: answered after {} ms", took / MS);
        assert_eq!(outcome.is_ok(), fits, "{cost} ms a call: {outcome:?}");
        if !fits {
            assert_eq!((outcome, rig.world.xen.interrupts()), (Err(-5), 0), "{cost} ms a call");
        }
        let start = rig.world.now.get();
        guest.disable_msix(&mut rig);
        assert!(rig.world.now.get() - start <= 2_000 * MS, "{cost} ms a call");
    }
}

/// A client that gave up has taken the request back before the reply: it believes that nothing is on, so nothing is.
#[test]
fn what_a_client_did_not_wait_for_is_undone() {
    for cmd in [op::ENABLE_MSI, op::ENABLE_MULTI_MSI, op::ENABLE_MSIX] {
        for at_the_call in [false, true] {
            let (mut rig, guest) = started(Card::BOTH);
            let before = registers(&rig);
            guest.put_entries(&[0, 1]);
            let page = guest.page.clone();
            if at_the_call {
                let give_up = move |_, call, _: &model::xen::Xen| {
                    if call == Call::Map {
                        page.flags.set(page.flags.get() & !PCIF_ACTIVE);
                    }
                };
                *rig.world.xen.meanwhile.borrow_mut() = Some(Box::new(give_up));
            } else {
                let give_up = |page: &model::guest::Shared| page.flags.set(page.flags.get() & !PCIF_ACTIVE);
                *guest.page.during.borrow_mut() = Some(Box::new(give_up));
            }
            guest.post(RawRequest { cmd, value: 2, info: 2, ..Default::default() });
            rig.settle();
            assert_eq!(guest.page.reply.take(), None, "the page is not the backend's any more");
            assert_eq!(guest.vectors(), [0xffff; 2]);
            assert_eq!((rig.world.xen.interrupts(), is_line_on(&rig)), (0, true), "operation {cmd}");
            assert_eq!((registers(&rig).0, registers(&rig).1 & 1), (before.0, before.1 & 1), "operation {cmd}");
            assert!(rig.acts(NIC).iter().any(|act| matches!(act, Act::Unmap(..))), "operation {cmd}: it was mapped");
            *guest.page.during.borrow_mut() = None;
            *rig.world.xen.meanwhile.borrow_mut() = None;
            guest.enable_msix(&mut rig, &[0]).expect("the next request is answered");
        }
    }
}

/// A failure that its client did not wait for undoes nothing: what was on before is in use.
#[test]
fn a_failed_request_that_was_given_up_takes_nothing_away() {
    for cmd in [op::ENABLE_MSI, op::ENABLE_MULTI_MSI, op::ENABLE_MSIX] {
        let (mut rig, guest) = started(Card::BOTH);
        let vectors = guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
        vectors.iter().for_each(|pirq| guest.bind(*pirq));
        *guest.page.during.borrow_mut() = Some(Box::new(|page| page.flags.set(2)));
        guest.post(RawRequest { cmd, value: 2, info: 2, ..Default::default() });
        rig.settle();
        assert!(rig.hardware(NIC).delivers(0) && rig.hardware(NIC).delivers(1), "operation {cmd}");
    }
}

/// A disable that its client did not wait for is done all the same.
#[test]
fn a_disable_that_was_given_up_is_done() {
    let (mut rig, guest) = started(Card::PLAIN);
    guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    *guest.page.during.borrow_mut() = Some(Box::new(|page| page.flags.set(2)));
    guest.post(RawRequest { cmd: op::DISABLE_MSIX, ..Default::default() });
    rig.settle();
    assert_eq!((rig.world.xen.interrupts(), registers(&rig).0), (0, 0x0004));
}

/// A guest may disable while it still has event channels bound: Xen takes the interrupts, and the numbers are free
/// when the guest lets go of them.
#[test]
fn vectors_still_bound_are_taken_and_their_numbers_come_back_later() {
    let (mut rig, guest) = started(Card::PLAIN);
    rig.world.xen.limit(1, 4);
    let vectors = guest.enable_msix(&mut rig, &[0, 1, 2]).expect("three vectors");
    vectors.iter().for_each(|pirq| guest.bind(*pirq));
    guest.disable_msix(&mut rig);
    assert_eq!((rig.world.xen.interrupts(), rig.world.xen.pirqs(1).len()), (0, 3));
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1, 2]), Err(-28));
    vectors.iter().for_each(|pirq| guest.close(*pirq));
    assert_eq!(guest.enable_msix(&mut rig, &[0, 1, 2]).map(|vectors| vectors.len()), Ok(3));
}

/// What Xen refuses to unmap stays on record: it is not mapped over, and the next disable tries again.
#[test]
fn a_refused_unmap_is_remembered() {
    for errno in [EBUSY, EPERM, 99] {
        let (mut rig, guest) = started(Card::PLAIN);
        guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
        rig.world.xen.fail(Call::Unmap, 0..1, errno);
        listen();
        assert_eq!(guest.disable_msix(&mut rig), 21, "the client has no use for a failure");
        assert!(heard().iter().any(|line| line.contains("unmap_pirq answered")), "{:#?}", heard());
        assert_eq!((entries(&rig).len(), registers(&rig).0), (1, 0x0004), "off in the card all the same");
        assert_eq!(guest.enable_msix(&mut rig, &[1]), Err(-5));
        guest.disable_msix(&mut rig);
        assert_eq!(entries(&rig).len(), 0);
        assert_eq!(guest.enable_msix(&mut rig, &[1]).map(|vectors| vectors.len()), Ok(1));
    }
}

#[test]
fn msi_that_xen_does_not_unmap_is_off_in_the_card() {
    for card in [Card::MSI_ONLY, Card::MSI_SIMPLE] {
        let (mut rig, guest) = started(card);
        guest.bind(guest.enable_msi(&mut rig).expect("a vector"));
        rig.world.xen.fail(Call::Unmap, 0..1, EBUSY);
        guest.disable_msi(&mut rig);
        assert_eq!((rig.world.xen.interrupts(), registers(&rig).1 & MSI_ENABLE), (1, 0), "{card:?}");
        assert_eq!(guest.enable_msi(&mut rig), Err(-5), "{card:?}");
        guest.disable_msi(&mut rig);
        guest.enable_msi(&mut rig).expect("a vector");
        assert_eq!(rig.world.xen.interrupts(), 1, "{card:?}");
    }
}

/// The guest dies while its request is carried out.
#[test]
fn a_guest_that_dies_between_two_vectors_leaves_none() {
    for stage in [Stage::Dying, Stage::Deassigned, Stage::Unlisted, Stage::Freed] {
        for after in 1..5 {
            let (mut rig, guest) = started(Card::FULL);
            let first = rig.world.xen.done.borrow().len();
            *rig.world.xen.meanwhile.borrow_mut() = Some(Box::new(move |_, call, xen| {
                if call == Call::Map && xen.done.borrow().len() >= first + after {
                    xen.kill(1, stage);
                }
            }));
            let _ = guest.enable_msix(&mut rig, &[0, 1, 2]);
            *rig.world.xen.meanwhile.borrow_mut() = None;
            guest.leave();
            rig.deliver();
            guest.die(Stage::Freed);
            rig.settle();
            assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{stage:?} after {after}");
            assert_eq!(rig.hardware(NIC).unanswered.get(), 0, "{stage:?} after {after}");
        }
    }
}

// Case 57: xen-devel 2019, "xen map irq failed -19", and QubesOS issue 5843: the function belongs to somebody else.
#[test]
fn case_57_a_card_that_is_not_the_guests_fails_with_nothing_half_enabled() {
    let (mut rig, guest) = started(Card::BOTH);
    let before = registers(&rig);
    rig.world.xen.deassign(nic(), 1);
    listen();
    assert_eq!((guest.enable_msix(&mut rig, &[0]), guest.enable_msi(&mut rig)), (Err(-5), Err(-5)));
    assert_eq!((registers(&rig), rig.world.xen.interrupts()), (before, 0));
    assert!(heard().iter().any(|line| line.contains("-ENODEV (-19)")), "{:#?}", heard());
    rig.world.xen.assign(nic(), 1).unwrap();
    guest.enable_msix(&mut rig, &[0]).expect("it is the guest's again");
}

/// INTX_DISABLE in the card is set while a message interrupt is on, and clear otherwise if the guest uses the card.
#[test]
fn the_pin_is_off_while_messages_are_on_and_on_again_after() {
    let (mut rig, guest) = started(Card::BOTH);
    for round in 0..2 {
        guest.enable_msix(&mut rig, &[0]).expect("a vector");
        assert!(!is_line_on(&rig), "round {round}");
        // Nothing that the guest writes turns it on meanwhile.
        for value in [0x0000, 0x0006, 0x0406, 0x0002, 0x0006] {
            assert_eq!(guest.write(&mut rig, 0, 4, 2, value), 0);
            assert!(!is_line_on(&rig), "round {round}, after {value:#x}");
            assert_eq!(guest.read(&mut rig, 0, 4, 2).unwrap() & 0x0403, value & 0x0403);
        }
        guest.disable_msix(&mut rig);
        assert!(is_line_on(&rig), "round {round}");
        guest.enable_msi(&mut rig).expect("a vector");
        for value in [0x0000, 0x0006] {
            assert_eq!(guest.write(&mut rig, 0, 4, 2, value), 0);
            assert!(!is_line_on(&rig), "round {round}, after {value:#x}");
        }
        guest.disable_msi(&mut rig);
        assert!(is_line_on(&rig), "round {round}");
    }
}

/// A guest that has not turned the card on gets its pin with the first decoding, and not by a detour over MSI.
#[test]
fn a_guest_that_has_not_turned_the_card_on_gets_no_pin_by_a_detour() {
    for card in [Card::BOTH, Card::MSI_ONLY] {
        let mut rig = boot_with(card);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        assert!(!is_line_on(&rig));
        guest.enable_msi(&mut rig).expect("a vector");
        guest.disable_msi(&mut rig);
        assert!(!is_line_on(&rig), "{card:?}: off as it was");
        rig.world.xen.fail(Call::Map, 0..1, ENOMEM);
        assert_eq!(guest.enable_msi(&mut rig), Err(-5));
        assert!(!is_line_on(&rig), "{card:?}: off as it was");
        // Xen turns the pin on when it takes a vector of MSI back, also within a map that fails.
        rig.world.xen.remapping_error.set(Some(ENOMEM));
        assert_eq!(guest.enable_msi(&mut rig), Err(-5));
        assert!(!is_line_on(&rig), "{card:?}: off as it was");
        guest.enable(&mut rig);
        assert!(is_line_on(&rig), "{card:?}");
    }
}

/// uio_pci_generic's handler silences the line and leaves it to a program to have it again. Linux's xen-pciback takes that for the
/// guest's notepad, and the same interrupt comes again and again (seen on the rig, `device-matrix`: 900 to 4000 times).
#[test]
fn a_handler_silences_its_line_and_has_it_again() {
    let (mut rig, guest) = started(Card::BOTH);
    for _ in 0..2 {
        assert!(is_line_on(&rig));
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
        assert!(!is_line_on(&rig));
        assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    }
    // One that is silent stays so when messages end.
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0406), 0);
    guest.disable_msix(&mut rig);
    assert!(!is_line_on(&rig));
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
    assert!(is_line_on(&rig));
}

/// A function without a pin has no switch for it.
#[test]
fn a_card_without_a_pin_keeps_command_as_it_is() {
    let (mut rig, guest) = started(Card { pin: false, ..Card::BOTH });
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    guest.disable_msix(&mut rig);
    guest.enable_msi(&mut rig).expect("a vector");
    guest.disable_msi(&mut rig);
    let of_command = |act: &Act| matches!(act, Act::Write(at::COMMAND, _));
    assert!(!rig.acts(NIC).iter().any(of_command), "{:?}", rig.acts(NIC));
    assert_eq!(registers(&rig).2, 0x0007);
}

/// Operation 10, which Xen's header has and Linux does not: several vectors of MSI at consecutive pirqs.
#[test]
fn several_vectors_of_msi_are_consecutive() {
    for vectors in [1u8, 2, 4, 8, 16, 32] {
        let (mut rig, guest) =
            started(Card { msi: Some(MsiKind { vectors, maskable: true, wide: true }), ..Card::BARE });
        rig.world.xen.limit(1, 64);
        let reply = guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, vectors.into());
        assert_eq!(reply.err, 0, "{vectors}");
        let pirq = reply.value.cast_signed();
        (0..Pirq::from(vectors)).for_each(|vector| guest.bind(pirq + vector));
        assert!((0..vectors).all(|vector| rig.hardware(NIC).delivers_msi(vector)), "{vectors}");
        assert_eq!(rig.published(NIC, "interrupts"), Some(format!("MSI {vectors}")));
        (0..Pirq::from(vectors)).for_each(|vector| guest.close(pirq + vector));
        guest.disable_msi(&mut rig);
        assert_eq!((rig.world.xen.interrupts(), rig.world.xen.pirqs(1).len()), (0, 0), "{vectors}");

        // One more than it has: how many would do.
        let reply = guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, u32::from(vectors) + 1);
        let told = if vectors < 32 { u32::from(vectors) } else { 0 };
        assert_eq!((reply.err, reply.value), (-5, told), "{vectors}");
    }
}

#[test]
fn a_count_of_msi_vectors_that_is_no_power_of_two_is_rounded_up_and_zero_is_none() {
    let card = Card { msi: Some(MsiKind { vectors: 8, maskable: true, wide: true }), ..Card::BARE };
    let (mut rig, guest) = started(card);
    for (asked, mapped) in [(1, 1), (2, 2), (3, 4), (5, 8), (7, 8)] {
        let reply = guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, asked);
        assert_eq!((reply.err, rig.world.xen.interrupts()), (0, mapped), "{asked}");
        guest.disable_msi(&mut rig);
    }
    rig.forget();
    for asked in [0, 9, 33, 1 << 31, u32::MAX] {
        assert_eq!(guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, asked).err, -5, "{asked}");
    }
    assert_eq!(rig.acts(NIC), []);
    // The count of enable_msi is always one, whatever else is in the request.
    assert_eq!(guest.operate(&mut rig, op::ENABLE_MSI, 0, 8).err, 0);
    assert_eq!(rig.world.xen.interrupts(), 1);
}

#[test]
fn where_several_msi_vectors_cannot_be_had_the_answer_says_how_many_can() {
    let card = Card { msi: Some(MsiKind { vectors: 32, maskable: true, wide: true }), ..Card::BARE };
    let (mut rig, guest) = started(card);
    rig.world.xen.remapping.set(false);
    let reply = guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, 4);
    assert_eq!((reply.err, reply.value), (-5, 2), "without interrupt remapping Xen maps one");
    assert_eq!(guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, 1).err, 0);
    guest.disable_msi(&mut rig);
    rig.world.xen.remapping.set(true);

    // Every fourth pirq is taken: three in a row are free, and a block of two.
    for pirq in (24..24 + 32).step_by(4) {
        rig.world.xen.occupy(1, pirq);
    }
    let mut asked = 32;
    while asked > 0 {
        let reply = guest.operate(&mut rig, op::ENABLE_MULTI_MSI, 0, asked);
        if reply.err == 0 {
            break;
        }
        assert_eq!((reply.err, reply.value), (-5, asked / 2), "{asked}");
        asked = reply.value;
    }
    assert_eq!((asked, rig.world.xen.interrupts()), (2, 2));
}

/// Two functions of one guest, and two guests: an operation reaches the function it names.
#[test]
fn an_operation_reaches_the_function_it_names_and_no_other() {
    let mut rig = boot(&format!("{TWO} dev=0000:03:00.0"));
    let mut guest = rig.attach(1, &[NIC, OTHER]);
    guest.connect(&mut rig);
    let mut second = rig.attach(2, &["0000:03:00.0"]);
    second.connect(&mut rig);
    guest.put_entries(&[0, 1]);
    assert_eq!(guest.operate(&mut rig, op::ENABLE_MSIX, 8, 2).err, 0);
    assert_eq!(second.enable_msix(&mut rig, &[3]).map(|vectors| vectors.len()), Ok(1));
    let mapped = |rig: &Rig, sbdf: &str| rig.world.xen.mapped(sbdf.parse().unwrap()).len();
    assert_eq!([NIC, OTHER, "0000:03:00.0"].map(|sbdf| mapped(&rig, sbdf)), [0, 2, 1]);
    guest.disable_msix(&mut rig);
    assert_eq!(mapped(&rig, OTHER), 2, "that was the other function");
    for devfn in [0x10, 0x100, u32::MAX] {
        assert_eq!(guest.operate(&mut rig, op::ENABLE_MSIX, devfn, 1).err, -1);
        assert_eq!(guest.operate(&mut rig, op::DISABLE_MSIX, devfn, 0).err, -1);
    }
    assert_eq!([NIC, OTHER, "0000:03:00.0"].map(|sbdf| mapped(&rig, sbdf)), [0, 2, 1]);
}

/// The entries are copied out of the page once, like all of a request (XSA-155).
#[test]
fn entries_changed_while_they_are_mapped_have_no_effect() {
    let (mut rig, guest) = started(Card::PLAIN);
    let page = guest.page.clone();
    *rig.world.xen.meanwhile.borrow_mut() = Some(Box::new(move |_, _, _| {
        page.entries.borrow_mut().iter_mut().for_each(|entry| entry.entry = 0x7ff);
    }));
    guest.put_entries(&[1, 2]);
    assert_eq!(guest.operate(&mut rig, op::ENABLE_MSIX, 0, 2).err, 0);
    assert_eq!(entries(&rig), [1, 2]);
    assert!(registers(&rig).0 & (ENABLE | MASKALL) == ENABLE && registers(&rig).2 & MEMORY != 0);
}
