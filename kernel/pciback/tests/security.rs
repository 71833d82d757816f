//! One test for each advisory that touches a backend: what went wrong elsewhere, tried here. docs/security.md has the list,
//! with those that other files and dom0's tool show.

use crate::model;

use std::rc::Rc;

use model::hardware::{ENABLE, INTX_DISABLE, MASKALL, MASTER, MEMORY, MS, MSI_ENABLE, at, differences};
use model::logs::{self, heard, listen};
use model::xen::errno::{EBUSY, EINVAL, EPERM};
use model::xen::{Act, Assigned, Call, Flavour, Stage};
use model::{Card, Guest, Hardware, NIC, ONE, OTHER, OWN_WATCHES, Rig, TWO, World, boot_in};
use pciback::sbdf::Sbdf;
use pciback::wire::{MsixEntry, PCIF_ACTIVE, RawRequest, op};

fn nic() -> Sbdf {
    NIC.parse().unwrap()
}

/// A connected guest of a driver domain with this command line.
fn connected(card: Card, cmdline: &str) -> (Rig, Guest) {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, card.build());
    let mut rig = boot_in(world, cmdline);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    (rig, guest)
}

/// A guest whose driver has turned the card on.
fn started(card: Card) -> (Rig, Guest) {
    let (mut rig, guest) = connected(card, ONE);
    assert_eq!(guest.write(&mut rig, 0, at::COMMAND.into(), 2, 0x0006), 0);
    (rig, guest)
}

/// Two guests with a card each.
fn two(card: Card) -> (Rig, Guest, Guest) {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, card.build());
    world.plug(OTHER, Card::FULL.build());
    let mut rig = boot_in(world, TWO);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    let mut other = rig.attach(2, &[OTHER]);
    other.connect(&mut rig);
    (rig, guest, other)
}

/// XSA-43, and the second half of XSA-157: a guest filled dom0's log with operations that fail.
#[test]
fn xsa_43_ten_thousand_failing_requests_leave_ten_lines() {
    let (mut rig, guest) = started(Card::BARE);
    listen();
    for number in 0..10_000 {
        let cmd = [op::ENABLE_MSI, op::ENABLE_MSIX, op::CONF_WRITE, 77][number % 4];
        let reply = guest.request(
            &mut rig,
            RawRequest { cmd, value: 1, offset: 0x40 + 4 * (number as i32 % 48), size: 4, ..Default::default() },
        );
        assert!(reply.err <= 0);
    }
    assert!(logs::count() <= 10, "{:#?}", heard());
    rig.pass(10_000 * MS);
    for _ in 0..100 {
        guest.operate(&mut rig, op::ENABLE_MSI, 0, 0);
    }
    assert!(logs::count() <= 20, "{:#?}", heard());
}

/// XSA-120: a guest turned decoding off, the next access of the host had no answer, and some hosts end with that.
#[test]
fn xsa_120_no_guest_turns_decoding_off() {
    for cmdline in [ONE, "dev=0000:01:00.0,permissive"] {
        let (mut rig, guest) = connected(Card::FULL, cmdline);
        guest.write(&mut rig, 0, at::COMMAND.into(), 2, 0x0007);
        for value in (0..=0x07ffu32).rev() {
            guest.write(&mut rig, 0, at::COMMAND.into(), if value % 3 == 0 { 4 } else { 2 }, value);
            guest.write(&mut rig, 0, at::COMMAND.into(), 1, value & 0xff);
            assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 3, 3, "{cmdline}: {value:#x}");
        }
        assert_eq!(guest.read(&mut rig, 0, at::COMMAND.into(), 2).map(|command| command & 3), Ok(0), "as it wrote it");
    }
}

/// The addendum to XSA-120: the backend itself turned decoding off when it released a device; and MSI-X was set up while it
/// was off.
#[test]
fn xsa_120_addendum_a_release_leaves_decoding_on_and_no_table_is_touched_while_it_is_off() {
    let (mut rig, guest) = started(Card::PLAIN);
    guest.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    guest.destroy(&mut rig);
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & 7, 3);

    let mut guest = rig.attach(2, &[NIC]);
    guest.connect(&mut rig);
    // Somebody in dom0 turns it off.
    rig.hardware(NIC).set_word(at::COMMAND, 0);
    rig.forget();
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-6));
    assert_eq!((rig.acts(NIC), rig.hardware(NIC).unanswered.get()), (vec![], 0));
    rig.hardware(NIC).set_word(at::COMMAND, 3);
}

/// XSA-155: what a backend had checked was read from the page once more, and was something else by then.
#[test]
fn xsa_155_every_field_is_read_once_and_what_is_changed_after_counts_for_nothing() {
    let honest = RawRequest { cmd: op::CONF_READ, offset: 0, size: 4, ..Default::default() };
    let changes: [fn(&mut RawRequest); 8] = [
        |request| request.cmd = op::CONF_WRITE,
        |request| request.domain = 1,
        |request| request.bus = 1,
        |request| request.devfn = 0xf8,
        |request| request.offset = -4,
        |request| request.size = 0x1000,
        |request| request.value = u32::MAX,
        |request| request.info = u32::MAX,
    ];
    let (mut rig, guest) = started(Card::PLAIN);
    for change in changes {
        rig.hardware(NIC).writes.borrow_mut().clear();
        let reads = guest.page.request_reads.get();
        *guest.page.during.borrow_mut() = Some(Box::new(move |page| {
            let mut request = page.request.get();
            change(&mut request);
            page.request.set(request);
        }));
        let reply = guest.request(&mut rig, honest);
        assert_eq!((reply.err, reply.value), (0, 0x100e_8086));
        assert_eq!(guest.page.request_reads.get() - reads, 1);
        assert_eq!(*rig.hardware(NIC).writes.borrow(), []);
    }
    // The entries too: they change while the first vector is mapped.
    *guest.page.during.borrow_mut() = None;
    let page = guest.page.clone();
    *rig.world.xen.meanwhile.borrow_mut() = Some(Box::new(move |_, _, _| {
        page.entries.borrow_mut().iter_mut().for_each(|entry| *entry = MsixEntry { vector: 0, entry: 4 });
    }));
    guest.put_entries(&[0, 1]);
    assert_eq!(guest.operate(&mut rig, op::ENABLE_MSIX, 0, 2).err, 0);
    *rig.world.xen.meanwhile.borrow_mut() = None;
    let mapped: Vec<u16> = rig.world.xen.mapped(nic()).into_iter().map(|(_, _, entry)| entry).collect();
    assert_eq!(mapped, [0, 1]);
}

/// XSA-157: sequences of operations that nobody had thought of ended dom0. sequences.rs has all of them up to a length;
/// these are the advisory's.
#[test]
fn xsa_157_the_sequences_of_the_advisory_get_an_answer_each() {
    for card in [Card::BOTH, Card::MSI_SIMPLE, Card { pin: false, ..Card::BOTH }] {
        let (mut rig, guest) = started(card);
        let ask = |rig: &mut Rig, cmd, value| {
            guest.put_entries(&[0, 1]);
            guest.operate(rig, cmd, 0, value).err
        };
        for (cmd, value, allowed) in [
            (op::DISABLE_MSI, 0, &[0][..]),
            (op::DISABLE_MSIX, 0, &[0]),
            (op::ENABLE_MSI, 0, &[0]),
            (op::ENABLE_MSI, 0, &[-5]),
            (op::ENABLE_MSIX, 2, &[-4, -6]),
            (op::DISABLE_MSIX, 0, &[0]),
            (op::DISABLE_MSIX, 0, &[0]),
            (op::ENABLE_MSIX, 0, &[-4, -22]),
            (op::ENABLE_MSIX, u32::MAX, &[-4, -22]),
            (op::ENABLE_MSIX, 2, &[0, -4]),
            (op::ENABLE_MSIX, 2, &[-4, -114]),
            (op::ENABLE_MSI, 0, &[0, -5]),
        ] {
            let err = ask(&mut rig, cmd, value);
            assert!(allowed.contains(&err), "{card:?}: operation {cmd} with {value}: {err}");
            rig.check();
        }
        guest.destroy(&mut rig);
        assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0));
    }
}

/// XSA-332: events without end kept dom0 from anything else.
#[test]
fn xsa_332_a_storm_of_events_is_a_turn_each_and_no_more() {
    let (mut rig, guest, other) = two(Card::PLAIN);
    let storm = rig.world.local.borrow()[&(1, guest.ring.1)];
    for _ in 0..10_000 {
        rig.world.pending.borrow_mut().insert(storm);
        rig.serve();
    }
    assert!(rig.world.notified.borrow().is_empty(), "no event of ours for an empty one");
    rig.world.pending.borrow_mut().insert(storm);
    other.post(RawRequest { size: 4, ..Default::default() });
    assert!(rig.serve());
    assert_eq!(other.reply().value, 0x100e_8086, "in the same turn");
}

/// XSA-331: an event came in for a channel that was being torn down.
#[test]
fn xsa_331_events_and_requests_during_a_teardown_reach_nothing_that_is_gone() {
    let (mut rig, guest, other) = two(Card::PLAIN);
    let port = rig.world.local.borrow()[&(1, guest.ring.1)];
    for state in ["5", "6"] {
        guest.set_front("state", state);
        guest.page.flags.set(PCIF_ACTIVE | 2);
        rig.world.pending.borrow_mut().insert(port);
        rig.settle();
        assert_eq!(guest.page.reply.take(), None, "the page is gone");
    }
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1), "the other's");
    let order = rig.world.order.borrow().clone();
    assert_eq!(order[order.len() - 2..], ["close", "unmap"], "no event comes in for a page that is gone");
    assert_eq!(other.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
}

/// XSA-349: xenstore events queued up in dom0's memory without a bound.
#[test]
fn xsa_349_nodes_written_without_a_pause_take_no_memory_and_no_watches() {
    let (mut rig, guest, other) = two(Card::PLAIN);
    let (nodes, watches) = (rig.world.nodes.borrow().len(), rig.world.watches.borrow().len());
    assert_eq!(watches, OWN_WATCHES + 2);
    for number in 0..5_000 {
        guest.set_front("state", &(number % 9).to_string());
        if number % 50 == 0 {
            rig.deliver();
            assert_eq!(other.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
        }
    }
    guest.set_front("state", "6");
    rig.pass(2_000 * MS);
    assert_eq!(rig.world.watches.borrow().len(), watches);
    assert!(rig.world.nodes.borrow().len() <= nodes + 4, "{}", rig.world.nodes.borrow().len() - nodes);
}

/// XSA-87: prepare and release of MSI-X were open to any domain. Where Xen refuses them no guest gets the function.
#[test]
fn xsa_87_where_xen_refuses_the_table_the_function_is_nobodys() {
    let world = World::with(Flavour::Owner);
    world.plug(NIC, Card::PLAIN.build());
    world.xen.fail(Call::Prepare, 0..u64::MAX, EPERM);
    let mut rig = boot_in(world, ONE);
    let guest = rig.attach(1, &[NIC]);
    assert_ne!(guest.back("state-0").as_deref(), Some("3"));
    assert!(rig.hardware(NIC).writes.borrow().is_empty(), "what it may not prepare it does not write to");
}

/// XSA-237: vectors of a device that the domain does not own, and the same one twice.
#[test]
fn xsa_237_no_vector_is_mapped_for_whom_the_function_is_not_assigned_to_and_none_twice() {
    let (mut rig, guest) = started(Card::FULL);
    rig.world.xen.set_assigned(nic(), Assigned::Nobody);
    assert_eq!((guest.enable_msi(&mut rig), guest.enable_msix(&mut rig, &[0])), (Err(-5), Err(-5)));
    assert_eq!(rig.world.xen.interrupts(), 0);
    rig.world.xen.set_assigned(nic(), Assigned::To(1));
    assert_eq!(guest.enable_msix(&mut rig, &[0, 0]), Err(-22));
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    rig.forget();
    assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-114));
    assert!(!rig.acts(NIC).iter().any(|act| matches!(act, Act::Map { .. })), "Xen is not even asked");
}

/// XSA-337: base address and MSI registers were read back from the device and believed.
#[test]
fn xsa_337_what_a_card_says_later_of_its_table_counts_for_nothing() {
    let (mut rig, guest) = started(Card::PLAIN);
    let card = rig.hardware(NIC);
    // Another BAR, another place and more entries than it had.
    card.bytes.borrow_mut()[usize::from(at::MSIX) + 4] = 0x05;
    card.set_word(at::MSIX_CONTROL, 0x07ff);
    assert_eq!(guest.enable_msix(&mut rig, &[5]), Err(-22), "it has five, 0 to 4, as when it was seized");
    card.bytes.borrow_mut()[usize::from(at::MSIX) + 4] = 0x00;
    card.set_word(at::MSIX_CONTROL, 0x0004);
    guest.enable_msix(&mut rig, &[4]).expect("a vector");
}

/// XSA-360 and XSA-395: vectors stayed behind when guests died, until there was none left for anybody.
#[test]
fn xsa_360_and_395_five_hundred_dead_guests_leave_no_vector() {
    let (mut rig, _, other) = two(Card::FULL);
    other.write(&mut rig, 0, at::COMMAND.into(), 2, 6);
    let kept = other.enable_msix(&mut rig, &[0, 1]).expect("two vectors");
    kept.iter().for_each(|pirq| other.bind(*pirq));
    let start = rig.world.xen.interrupts();
    rig.world.xen.kill(1, Stage::Freed);
    rig.world.remove("/local/domain/1");
    rig.settle();
    for id in 10..510 {
        let mut guest = rig.attach(id, &[NIC]);
        guest.connect(&mut rig);
        guest.write(&mut rig, 0, at::COMMAND.into(), 2, 6);
        let vectors = guest.enable_msix(&mut rig, &[0, 1, 2]).expect("three vectors");
        vectors.iter().take(usize::from(id % 4)).for_each(|pirq| guest.bind(*pirq));
        if id % 2 == 0 {
            guest.die(Stage::Freed);
        }
        guest.destroy(&mut rig);
        assert_eq!(rig.world.xen.interrupts(), start, "guest {id}");
    }
    assert!(rig.hardware(OTHER).delivers(0) && rig.hardware(OTHER).delivers(1), "the other guest's");
}

/// XSA-458: the error path of several MSI vectors freed what was not allocated. All of them or none are on record here.
#[test]
fn xsa_458_several_vectors_that_fail_leave_none() {
    let (mut rig, guest) = started(Card::MSI_ONLY);
    for (count, errno) in [(2, EINVAL), (4, EBUSY), (3, EPERM)] {
        rig.world.xen.fail(Call::Map, 0..1, errno);
        let reply =
            guest.request(&mut rig, RawRequest { cmd: op::ENABLE_MULTI_MSI, info: count, ..Default::default() });
        assert_eq!(reply.err, -5);
        assert_eq!((rig.world.xen.interrupts(), rig.world.xen.pirqs(1)), (0, vec![]));
        assert_eq!(rig.hardware(NIC).word(at::MSI_CONTROL) & MSI_ENABLE, 0);
        rig.world.xen.heal();
    }
    let reply = guest.request(&mut rig, RawRequest { cmd: op::ENABLE_MULTI_MSI, info: 4, ..Default::default() });
    assert_eq!((reply.err, rig.world.xen.interrupts()), (0, 4));
}

/// XSA-302 and XSA-306: a device went on writing to memory after it had been taken from its guest.
#[test]
fn xsa_302_a_function_is_silenced_and_reset_before_anybody_is_told_that_it_is_free() {
    let (mut rig, guest) = started(Card::FULL);
    assert_ne!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0);
    let resets = rig.hardware(NIC).resets.get();
    guest.leave();
    rig.deliver();
    // The first thing, before any time passes.
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0);
    assert_eq!(rig.state(NIC), "resetting");
    while rig.state(NIC) == "resetting" {
        assert_eq!(rig.hardware(NIC).word(at::COMMAND) & MASTER, 0);
        rig.pass(MS);
    }
    assert_eq!((rig.state(NIC).as_str(), rig.hardware(NIC).resets.get()), ("ready", resets + 1));
    guest.die(Stage::Freed);
}

/// XSA-124: registers that no specification knows can do anything.
#[test]
fn xsa_124_what_has_no_rule_is_not_written() {
    let (mut rig, guest) = started(Card::FULL);
    rig.forget();
    let known = |offset: i32| {
        [4..8, 0xc..0x28, 0x30..0x34, 0x44..0x46].iter().any(|range: &std::ops::Range<i32>| range.contains(&offset))
    };
    let before = rig.hardware(NIC).bytes.borrow().clone();
    for offset in (0..0x1000).filter(|offset| !known(*offset)) {
        for size in [1, 2, 4].into_iter().filter(|size| offset % size == 0) {
            // -3 where the backend alone switches; else told as done, as a device would.
            let err = guest.write(&mut rig, 0, offset, size, 0xa5a5_a5a5 >> (32 - 8 * size));
            assert!([0, -3].contains(&err), "{offset:#x}: {err}");
        }
    }
    assert_eq!(*rig.hardware(NIC).writes.borrow(), []);
    assert_eq!(differences(&before, &rig.hardware(NIC).bytes.borrow()), []);
}

/// XSA-126, 128, 129 (QEMU's): message addresses, data and masks were the guest's to write, permissive or not.
#[test]
fn xsa_128_and_129_message_addresses_data_and_masks_are_xens() {
    for cmdline in [ONE, "dev=0000:01:00.0,permissive"] {
        let (mut rig, guest) = connected(Card::FULL, cmdline);
        guest.write(&mut rig, 0, at::COMMAND.into(), 2, 6);
        guest.enable_msi(&mut rig).expect("a vector");
        let before = rig.hardware(NIC).bytes.borrow()[usize::from(at::MSI)..usize::from(at::MSIX) + 12].to_vec();
        rig.forget();
        for offset in i32::from(at::MSI)..i32::from(at::MSI) + 0x18 {
            for size in [1, 2, 4].into_iter().filter(|size| offset % size == 0) {
                guest.write(&mut rig, 0, offset, size, u32::MAX);
                guest.write(&mut rig, 0, offset, size, 0);
            }
        }
        for offset in i32::from(at::MSIX)..i32::from(at::MSIX) + 12 {
            guest.write(&mut rig, 0, offset, 1, 0xff);
        }
        assert_eq!(*rig.hardware(NIC).writes.borrow(), [], "{cmdline}");
        let now = rig.hardware(NIC).bytes.borrow()[usize::from(at::MSI)..usize::from(at::MSIX) + 12].to_vec();
        assert_eq!(differences(&before, &now), [], "{cmdline}");
    }
}

/// XSA-164: a write beyond the table hit other memory.
#[test]
fn xsa_164_no_entry_beyond_the_table_and_no_vector_beyond_the_page() {
    let (mut rig, guest) = started(Card::PLAIN);
    rig.forget();
    for entries in [&[5u16][..], &[0, 0xffff], &[0x8000], &[0, 1, 2, 3, 4, 5]] {
        assert!([-22, -28].contains(&guest.enable_msix(&mut rig, entries).unwrap_err()), "{entries:?}");
    }
    for count in [0, 129, 0x8000_0001, u32::MAX] {
        guest.put_entries(&[0]);
        let reply = guest.operate(&mut rig, op::ENABLE_MSIX, 0, count);
        assert!([-22, -28].contains(&reply.err), "{count:#x}: {reply:?}");
    }
    assert_eq!(rig.acts(NIC), []);
}

/// XSA-175 and XSA-178: who reads nodes of somebody less trusted must not follow them. A frontend writes what it likes
/// into its own folder; nothing of that is a path, an address or a name of anything.
#[test]
fn xsa_175_and_178_a_frontends_nodes_lead_nowhere() {
    let (mut rig, guest, other) = two(Card::PLAIN);
    let before = other.back("state");
    for value in ["/local/domain/2/device/pci/0", "../../2", "2", "-1", "4294967296", "", "\u{0}", "0x10", " 8", "8 "] {
        guest.set_front("state", "6");
        rig.pass(2_000 * MS);
        for node in ["backend", "backend-id", "pci-op-ref", "event-channel", "magic"] {
            guest.set_front(node, value);
        }
        guest.set_front("state", "1");
        rig.pass(2_000 * MS);
        guest.set_front("state", "3");
        rig.pass(2_000 * MS);
        assert_ne!(guest.back("state").as_deref(), Some("4"), "{value:?}");
    }
    assert_eq!(other.back("state"), before);
    assert_eq!(other.read(&mut rig, 0, 0, 4), Ok(0x100e_8086));
    assert_eq!((rig.world.mapped.get(), rig.world.bound.get()), (1, 1), "the other's only");
}

/// XSA-391: a peer that sends events as it likes. (331 and 332 are the other way round.) A guest's own events come back
/// once for each answer and never by themselves.
#[test]
fn xsa_391_a_guest_gets_an_event_for_an_answer_and_for_nothing_else() {
    let (mut rig, guest) = started(Card::PLAIN);
    rig.world.notified.borrow_mut().clear();
    for _ in 0..100 {
        let reply = guest.read(&mut rig, 0, 0, 4);
        assert_eq!(reply, Ok(0x100e_8086));
    }
    rig.pass(60_000 * MS);
    assert_eq!(rig.world.notified.borrow().len(), 100);
}

/// XSA-461: functions that share a page of registers or an interrupt line are not apart. dom0's tool warns at attach; here a
/// function that nobody has drives no line.
#[test]
fn xsa_461_a_function_that_nobody_has_drives_no_line_that_another_may_share() {
    let (mut rig, guest) = started(Card::FULL);
    assert_eq!(rig.hardware(NIC).word(at::COMMAND) & INTX_DISABLE, 0);
    guest.destroy(&mut rig);
    assert_ne!(rig.hardware(NIC).word(at::COMMAND) & INTX_DISABLE, 0);
    assert_ne!(rig.hardware(NIC).word(at::COMMAND) & MEMORY, 0);
}

/// XSA-476 was a 64-bit address cut at 32 bits. Here: the address of a BAR above 4 GiB reaches Xen whole.
#[test]
fn xsa_476_an_address_above_4_gib_is_not_cut() {
    let world: Rc<World> = Rc::default();
    let mut card: Hardware = Card::PLAIN.build();
    card.bytes.borrow_mut()[0x10..0x18].copy_from_slice(&0x0000_0038_febc_0004u64.to_le_bytes());
    card.resources = card.resources.replacen("0xfebc0000 0xfebc3fff 0x40200", "0x38febc0000 0x38febc3fff 0x140204", 1);
    world.plug(NIC, card);
    let mut rig = boot_in(world, ONE);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.write(&mut rig, 0, at::COMMAND.into(), 2, 6);
    assert_eq!((guest.read(&mut rig, 0, 0x10, 4), guest.read(&mut rig, 0, 0x14, 4)), (Ok(0xfebc_0004), Ok(0x38)));
    // The model's Xen compares the address that it is given.
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
}

/// What reading Linux's backend found: a guest's Command, its trust and its sizing stay for the next one.
#[test]
fn review_nothing_of_a_guest_is_left_for_the_next() {
    let (mut rig, guest) = started(Card::PLAIN);
    guest.write(&mut rig, 0, 4, 2, 0x0147);
    guest.write(&mut rig, 0, 0x10, 4, u32::MAX);
    guest.write(&mut rig, 0, 0x0c, 1, 0x20);
    guest.enable_msix(&mut rig, &[0]).expect("a vector");
    guest.destroy(&mut rig);
    let mut next = rig.attach(2, &[NIC]);
    next.connect(&mut rig);
    assert_eq!(next.read(&mut rig, 0, 4, 2), Ok(0));
    assert_eq!(next.read(&mut rig, 0, 0x10, 4), Ok(model::hardware::BAR0));
    assert_eq!(next.read(&mut rig, 0, 0x0c, 1), Ok(0x10));
    assert_eq!(rig.hardware(NIC).word(at::MSIX_CONTROL) & (ENABLE | MASKALL), 0);
}
