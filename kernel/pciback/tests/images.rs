//! Functions like real ones (`model/images.rs`), each through the eyes of a guest: its list, its addresses, what a write
//! reaches, the interrupts it is offered, and how it is handed on.

use crate::model;

use std::rc::Rc;

use model::hardware::{at, differences};
use model::images::{self, Image, Kind};
use model::{Guest, Hardware, NIC, ONE, Rig, World, boot_in};

/// A guest that has the function and has turned it on.
fn started(image: &Image, options: &str) -> (Rig, Guest, Rc<Hardware>) {
    let world: Rc<World> = Rc::default();
    let card = world.plug(NIC, image.build());
    let mut rig = boot_in(world, &format!("{ONE}{options}"));
    assert_eq!(rig.state(NIC), "ready", "{}", image.name);
    let mut guest = rig.attach(1, &[NIC]);
    guest.connect(&mut rig);
    guest.enable(&mut rig);
    rig.forget();
    (rig, guest, card)
}

/// One read that must succeed.
fn read(rig: &mut Rig, guest: &Guest, offset: u16, size: i32) -> u32 {
    guest.read(rig, 0, offset.into(), size).expect("a read")
}

/// The capability list as a guest walks it, byte by byte.
fn list(rig: &mut Rig, guest: &Guest) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let mut at = read(rig, guest, 0x34, 1);
    while at != 0 {
        assert!(found.len() < 48, "the walk ends");
        let id = read(rig, guest, at as u16, 1);
        found.push((at as u8, id as u8));
        at = read(rig, guest, at as u16 + 1, 1);
    }
    found
}

/// The registers of the base addresses and the ROM.
fn bar_offsets() -> impl Iterator<Item = u16> {
    (0x10..0x28).step_by(4).chain([0x30])
}

#[test]
fn every_image_names_each_byte_once() {
    for image in images::ALL {
        let (rig, ..) = started(image, "");
        let function = rig.backend.devices()[0].peek().expect("a function");
        let mut end = 0;
        for register in function.config.registers() {
            assert!(register.offset == end && register.length > 0, "{}: {register:?}", image.name);
            end = register.end();
        }
        assert_eq!(end, 4096, "{}", image.name);
    }
}

// Case 15 (QubesOS issue 3609): an MSI-X capability that lies on the card's registers. Case 32: one whose table only
// Enhanced Allocation can find.
#[test]
fn what_cannot_be_true_is_in_no_list() {
    for image in images::ALL {
        let (mut rig, guest, _) = started(image, "");
        let shown = image.list.iter().filter(|(at, _)| image.hidden != Some(*at));
        let shown: Vec<(u8, u8)> = shown.map(|(at, kind)| (*at, kind.id())).collect();
        assert_eq!(list(&mut rig, &guest), shown, "{}", image.name);
        let Some(hidden) = image.hidden else { continue };
        assert_eq!(rig.published(NIC, "msix").as_deref(), Some("hidden"), "{}", image.name);
        for offset in 0..12 {
            assert_eq!(read(&mut rig, &guest, u16::from(hidden) + offset, 1), 0, "{}: +{offset}", image.name);
        }
        assert_eq!(guest.enable_msix(&mut rig, &[0]), Err(-4), "{}", image.name);
    }
    assert_eq!(images::ALL.iter().filter(|image| image.hidden.is_some()).count(), 2);
}

/// What a guest reads in another way than it stands in the device, and nothing else.
#[test]
fn every_image_shows_its_own_registers_where_nothing_is_said_of_them() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, "");
        let power = image.find(0x01).map(u16::from);
        for offset in (0..4096).step_by(4) {
            let seen = read(&mut rig, &guest, offset, 4);
            let [low, high] = [card.word(offset), card.word(offset + 2)].map(u32::from);
            let held = low | high << 16;
            let wanted = match offset {
                // Decoding and the pin's switch as the guest wrote them.
                0x04 => held & !0x0403 | 0x0002,
                // The guest's slot has one function.
                0x0c => held & !0x80_0000,
                // The guest's pirq.
                0x3c => held & !0xff | 21,
                0x34 => image
                    .list
                    .iter()
                    .map(|(at, _)| u32::from(*at))
                    .find(|at| image.hidden.map(u32::from) != Some(*at))
                    .unwrap_or(0),
                // No wake events.
                _ if Some(offset) == power => held & !0xf800_0000,
                _ => held,
            };
            let hidden = image.hidden.map(u16::from);
            if hidden.is_some_and(|hidden| (hidden..hidden + 12).contains(&offset)) {
                assert_eq!(seen, 0, "{}: {offset:#x}", image.name);
            } else if image.list.iter().any(|(at, _)| u16::from(*at) == offset && offset != power.unwrap_or(0)) {
                // Where the list goes on is the subject of another test.
                assert_eq!(seen & !0xff00, wanted & !0xff00, "{}: {offset:#x}", image.name);
            } else {
                assert_eq!(seen, wanted, "{}: {offset:#x}", image.name);
            }
        }
    }
}

// Case 26 (QubesOS issue 9003): a one-byte read was answered with two bytes.
#[test]
fn case_26_every_image_reads_the_same_in_every_width() {
    for image in images::ALL {
        let (mut rig, guest, _) = started(image, "");
        for offset in (0..0x200).step_by(4) {
            let whole = read(&mut rig, &guest, offset, 4);
            for part in 0..4 {
                assert_eq!(read(&mut rig, &guest, offset + part, 1), whole >> (8 * part) & 0xff, "{}", image.name);
            }
            for part in [0, 2] {
                assert_eq!(read(&mut rig, &guest, offset + part, 2), whole >> (8 * part) & 0xffff, "{}", image.name);
            }
        }
    }
}

// Case 31: base addresses of every shape; the upper half of one is never judged by its low bits.
#[test]
fn case_31_every_image_shows_addresses_and_sizes_and_moves_nothing() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, "");
        let before: Vec<(u16, u32)> = bar_offsets().map(|at| (at, read(&mut rig, &guest, at, 4))).collect();
        for (at, _) in &before {
            let ones = if *at == 0x30 { 0xffff_f800 } else { u32::MAX };
            assert_eq!(guest.write(&mut rig, 0, (*at).into(), 4, ones), 0, "{}", image.name);
        }
        let mut wanted = [0; 7];
        for base in image.bases {
            let mask = base.size.wrapping_neg();
            wanted[base.index] = mask as u32 | base.space.low_bits();
            if base.space.is_wide() {
                wanted[base.index + 1] = (mask >> 32) as u32;
            }
        }
        wanted[6] = image.rom.map_or(0, |(_, size)| size.wrapping_neg());
        let sizes: Vec<u32> = bar_offsets().map(|at| read(&mut rig, &guest, at, 4)).collect();
        assert_eq!(sizes, wanted, "{}: {sizes:x?}", image.name);
        for (at, value) in &before {
            assert_eq!(guest.write(&mut rig, 0, (*at).into(), 4, *value), 0, "{}", image.name);
            assert_eq!(read(&mut rig, &guest, *at, 4), *value, "{}", image.name);
            // Another place is refused without a word, as a device would.
            assert_eq!(guest.write(&mut rig, 0, (*at).into(), 4, 0x1234_5670), 0, "{}", image.name);
            assert_eq!(read(&mut rig, &guest, *at, 4), *value, "{}", image.name);
        }
        let moved = card.writes.borrow().iter().filter(|(at, _)| (0x10..0x34).contains(at)).count();
        assert_eq!(moved, 0, "{}: {:x?}", image.name, card.writes.borrow());
        let held = |at: u16| u32::from(card.word(at)) | u32::from(card.word(at + 2)) << 16;
        assert!(image.bases.is_empty() || before.iter().all(|(at, value)| held(*at) == *value), "{}", image.name);
    }
}

/// Registers that a guest without further rights changes in the device, besides base addresses that were lost: Command,
/// cache line size, power control, VPD address.
fn is_a_guests(image: &Image, byte: usize) -> bool {
    let in_capability = |id: u8, bytes: std::ops::Range<usize>| {
        image.find(id).is_some_and(|at| bytes.contains(&byte.wrapping_sub(usize::from(at))))
    };
    [0x04, 0x05, 0x0c].contains(&byte) || in_capability(0x01, 4..6) || in_capability(0x03, 2..4)
}

// XSA-120, XSA-124, XSA-128 and XSA-131: what has no rule does not reach the device, in no width.
#[test]
fn no_write_of_a_guest_reaches_more_than_its_own_registers() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, "");
        let before = card.bytes.borrow().clone();
        let power = image.find(0x01).map_or(0x1000, |at| i32::from(at) + 4);
        for size in [1, 2, 4] {
            let end = if size == 4 { 4096 } else { 0x180 };
            for offset in (0..end).step_by(size as usize) {
                // Power states have tests of their own: a card that sleeps takes no write at all.
                if (power - size + 1..power + 2).contains(&offset) {
                    continue;
                }
                for value in [u32::MAX, 0xa5a5_a5a5, 0] {
                    let mask = if size == 4 { u32::MAX } else { (1 << (8 * size)) - 1 };
                    let err = guest.write(&mut rig, 0, offset, size, value & mask);
                    assert!(err == 0 || err == -3, "{}: {offset:#x}: {err}", image.name);
                }
            }
        }
        let changed = differences(&card.bytes.borrow(), &before);
        let wrong: Vec<_> = changed.iter().filter(|(byte, ..)| !is_a_guests(image, *byte)).collect();
        assert!(wrong.is_empty(), "{}: {wrong:x?}", image.name);
        let decode = card.word(at::COMMAND) & 3;
        assert_eq!(decode, u16::from(before[4]) & 3, "{}: decoding goes on", image.name);
    }
}

#[test]
fn what_no_rule_covers_is_a_permissive_guests_to_write() {
    for image in images::ALL {
        for permissive in [false, true] {
            let (mut rig, guest, card) = started(image, if permissive { ",permissive" } else { "" });
            let mut try_write = |at: u16, mask: u16| {
                let held = card.word(at);
                assert_eq!(guest.write(&mut rig, 0, at.into(), 2, u32::from(held ^ mask)), 0, "{}", image.name);
                let wanted = if permissive { held ^ mask } else { held };
                assert_eq!(card.word(at), wanted, "{}: {at:#x}, permissive {permissive}", image.name);
            };
            for (at, kind) in image.list {
                let at = u16::from(*at);
                match kind {
                    Kind::Express(..) => try_write(at + 8, 0x0010),
                    Kind::PciX => try_write(at + 4, 0x0008),
                    Kind::Vendor(rest) if rest.len() > 6 => try_write(at + 4, 0x5555),
                    _ => {}
                }
            }
            for (at, _) in image.extended {
                try_write(at + 4, 0x0101);
            }
        }
    }
}

// The same for registers that are nobody's: a permissive guest does not reach them either (differences.md).
#[test]
fn a_permissive_guest_reaches_no_identity_no_address_and_no_message() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, ",permissive");
        let before = card.bytes.borrow().clone();
        let mut kept: Vec<std::ops::Range<usize>> = vec![0..4, 8..12, 0x0e..0x0f, 0x10..0x34, 0x34..0x38, 0x3c..0x40];
        for (at, kind) in image.list {
            let at = usize::from(*at);
            kept.push(at..at + 2);
            match kind {
                Kind::Msi(control) => kept.push(at..at + if control & 0x100 != 0 { 0x14 } else { 0x0a }),
                Kind::Msix { .. } => kept.push(at..at + 12),
                _ => {}
            }
        }
        for range in &kept {
            for byte in range.clone() {
                guest.write(&mut rig, 0, byte as i32, 1, u32::from(!before[byte]));
            }
        }
        let changed = differences(&card.bytes.borrow(), &before);
        let wrong: Vec<_> = changed.iter().filter(|(byte, ..)| kept.iter().any(|range| range.contains(byte))).collect();
        assert!(wrong.is_empty(), "{}: {wrong:x?}", image.name);
    }
}

#[test]
fn every_image_has_the_message_interrupts_that_it_offers() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, "");
        rig.world.xen.limit(1, 300);
        let most = image.msix();
        let entries: Vec<u16> = (0..most.clamp(1, 128)).rev().collect();
        match (most, guest.enable_msix(&mut rig, &entries)) {
            (0, answer) => assert_eq!(answer, Err(-4), "{}", image.name),
            (_, answer) => {
                let vectors = answer.unwrap_or_else(|err| panic!("{}: {err}", image.name));
                vectors.iter().for_each(|pirq| guest.bind(*pirq));
                assert!(entries.iter().all(|entry| card.delivers(*entry)), "{}", image.name);
                assert_eq!(rig.published(NIC, "interrupts"), Some(format!("MSI-X {}", entries.len())));
                vectors.iter().for_each(|pirq| guest.close(*pirq));
                guest.disable_msix(&mut rig);
                // One more than there are, if a request has room for it.
                let beyond: Vec<u16> = (0..=most).collect();
                let refused = if most < 128 { Err(-28) } else { Err(-22) };
                assert_eq!(guest.enable_msix(&mut rig, &beyond).map(|_| ()), refused, "{}", image.name);
                assert_eq!(guest.enable_msix(&mut rig, &[most]), Err(-22), "{}", image.name);
            }
        }
        match (image.msi(), guest.enable_msi(&mut rig)) {
            (0, answer) => assert_eq!(answer, Err(-4), "{}", image.name),
            (_, answer) => {
                guest.bind(answer.unwrap_or_else(|err| panic!("{}: {err}", image.name)));
                assert!(card.delivers_msi(0), "{}", image.name);
                guest.disable_msi(&mut rig);
            }
        }
        assert_eq!(rig.world.xen.mapped(NIC.parse().unwrap()), [], "{}", image.name);
    }
}

#[test]
fn every_image_is_handed_on_as_it_was() {
    for image in images::ALL {
        let (mut rig, guest, card) = started(image, "");
        let method = if model::delegated() && image.reset == "dom0" { "bus" } else { image.reset };
        assert_eq!(rig.published(NIC, "reset").as_deref(), Some(method), "{}", image.name);
        let header = |card: &Hardware| card.bytes.borrow()[..0x40].to_vec();
        let (before, resets) = (header(&card), card.resets.get());
        guest.destroy(&mut rig);
        assert_eq!(rig.state(NIC), "ready", "{}", image.name);
        let own = if ["flr", "af", "pm"].contains(&method) { 1 } else { 0 };
        if method != "bus" {
            assert_eq!(card.resets.get() - resets, own, "{}", image.name);
        }
        let changed = differences(&header(&card), &before);
        // The guest had turned bus mastering on, and the pin; a function that nobody has is silent.
        let pin = u16::from(image.pin != 0) << 10;
        assert!(changed.iter().all(|(byte, ..)| [4, 5].contains(byte)), "{}: {changed:x?}", image.name);
        assert_eq!(card.word(at::COMMAND) & !0x0400 | pin, 0x0003 | pin, "{}", image.name);
        assert_eq!(card.unanswered.get(), 0, "{}", image.name);
        let mut second = rig.attach(2, &[NIC]);
        second.connect(&mut rig);
        assert_eq!(second.read(&mut rig, 0, 4, 2), Ok(0), "{}: a new beginning", image.name);
    }
}

// Case 37 (QubesOS issues 4818, 1393): a graphics card and its sound are two functions of one slot.
#[test]
fn a_graphics_card_and_its_sound_share_the_guests_slot() {
    let (video, sound) = ("0000:06:00.0", "0000:06:00.1");
    let world: Rc<World> = Rc::default();
    world.plug(video, images::GT218.build());
    world.plug(sound, images::GT218_SOUND.build());
    let mut rig = boot_in(world, &format!("dev={video} dev={sound}"));
    let mut guest = rig.attach(1, &[video, sound]);
    guest.connect(&mut rig);
    assert_eq!([0, 1].map(|devfn| guest.read(&mut rig, devfn, 0, 4)), [Ok(0x0a65_10de), Ok(0x0be3_10de)]);
    assert_eq!([0, 1].map(|devfn| guest.read(&mut rig, devfn, 0x0e, 1)), [Ok(0x80), Ok(0x80)]);
    assert_eq!([0, 1].map(|devfn| guest.read(&mut rig, devfn, 0x3d, 1)), [Ok(1), Ok(2)], "pins A and B");
    guest.destroy(&mut rig);
    assert_eq!([video, sound].map(|sbdf| rig.state(sbdf)), ["ready", "ready"]);
}

/// The ROM cannot be switched on by a guest: it would answer where nobody has looked.
#[test]
fn a_rom_is_sized_and_never_turned_on() {
    for image in images::ALL.iter().filter(|image| image.rom.is_some()) {
        for options in ["", ",permissive"] {
            let (mut rig, guest, card) = started(image, options);
            let (start, size) = image.rom.expect("a ROM");
            for (value, seen) in [
                (0xffff_f800, size.wrapping_neg()),
                (u32::MAX, size.wrapping_neg()),
                (start, start),
                (start | 1, start),
                (1, start),
                (0, start),
                (0xffff_f000, start),
            ] {
                assert_eq!(guest.write(&mut rig, 0, 0x30, 4, value), 0);
                assert_eq!(read(&mut rig, &guest, 0x30, 4), seen, "{}: {value:#x}", image.name);
            }
            assert_eq!(card.word(0x30) & 1, 0, "{}", image.name);
        }
    }
}

/// Linux has rules for the first capability of each kind only: a second one was a way around them.
#[test]
fn a_second_capability_of_a_kind_is_guarded_like_the_first() {
    const TWICE: Image = Image {
        name: "everything twice",
        list: &[
            (0x40, Kind::Power { pmc: 0xc803, pmcsr: 8 }),
            (0x48, Kind::Power { pmc: 0xc803, pmcsr: 8 }),
            (0x50, Kind::Msi(0x0080)),
            (0x60, Kind::Msi(0x0080)),
            (0x70, Kind::Msix { entries: 4, table: (3, 0), pending: (3, 0x2000) }),
            (0x80, Kind::Msix { entries: 4, table: (3, 0), pending: (3, 0x2000) }),
            (0x90, Kind::Vpd),
            (0x98, Kind::Vpd),
        ],
        ..images::I210
    };
    for options in ["", ",permissive"] {
        let (mut rig, guest, card) = started(&TWICE, options);
        let shown: Vec<(u8, u8)> = TWICE.list.iter().map(|(at, kind)| (*at, kind.id())).collect();
        assert_eq!(list(&mut rig, &guest), shown);
        let before = card.bytes.borrow().clone();
        for (at, size, value, err) in [
            (0x4c, 2, 0x0100, 0),
            (0x62, 2, 0x0081, -3),
            (0x64, 4, 0xfee0_0000, 0),
            (0x6c, 2, 0x4021, 0),
            (0x82, 2, 0x8003, -3),
            (0x84, 4, 0x0000_1000, 0),
            (0x9a, 2, 0x8000, -3),
            (0x9c, 4, 0x1234_5678, 0),
        ] {
            assert_eq!(guest.write(&mut rig, 0, at, size, value), err, "{at:#x}");
        }
        assert_eq!(differences(&card.bytes.borrow(), &before), [], "{options:?}");
    }
}
