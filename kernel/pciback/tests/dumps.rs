//! Registers of real devices, as `lspci -xxx` lists them, through a whole life: seized, attached, interrupts on and
//! off, released. Runs where the environment's PCIBACK_DUMPS names a folder of such listings, or `../shared/dumps` lies
//! beside the tree; what is skipped is said.

use crate::model;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use model::hardware::at;
use model::{Guest, Hardware, Rig, World, boot_in, images};

/// Where the function is.
const HERE: &str = "0000:05:00.0";

/// The folder of listings, if there is one.
fn folder() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/dumps");
    let found = std::env::var_os("PCIBACK_DUMPS").map(PathBuf::from).or_else(|| beside.is_dir().then_some(beside));
    if found.is_none() {
        println!("skipped: set PCIBACK_DUMPS to a folder of lspci -xxx listings");
    }
    found
}

/// The functions of a listing that have 64 bytes or more.
fn functions(text: &str) -> Vec<Vec<u8>> {
    let mut functions: Vec<Vec<u8>> = Vec::new();
    for line in text.lines() {
        let Some((offset, bytes)) = line.split_once(": ") else { continue };
        let (Ok(offset), true) = (usize::from_str_radix(offset, 16), offset.len() <= 3) else { continue };
        let bytes: Option<Vec<u8>> = bytes.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        let Some(bytes) = bytes.filter(|bytes| bytes.len() == 16) else { continue };
        if offset == 0 {
            functions.push(vec![0; 4096]);
        }
        if let Some(function) = functions.last_mut() {
            function[offset..offset + 16].copy_from_slice(&bytes);
        }
    }
    functions
}

/// All functions of all listings, with a name to tell them apart.
fn listed(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for file in std::fs::read_dir(folder).expect("the folder of listings") {
        let path = file.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("text");
        let named = |(index, bytes)| (format!("{} {index}", path.display()), bytes);
        all.extend(functions(&text).into_iter().enumerate().map(named));
    }
    assert!(!all.is_empty(), "no listing in the folder");
    all
}

/// The function as the host leaves it: decoding, no interrupts.
fn idle(bytes: &[u8]) -> Hardware {
    let card = Hardware::from_image(bytes);
    card.set_word(at::COMMAND, card.word(at::COMMAND) & !7 | 0x0403);
    for (id, off) in [(0x05, !1), (0x11, !0xc000)] {
        if let Some(at) = card.capability(id) {
            card.set_word(at + 2, card.word(at + 2) & off);
        }
    }
    card
}

#[test]
fn listings_of_real_devices_live_and_are_handed_on() {
    let Some(folder) = folder() else { return };
    let mut ready = 0;
    for (name, bytes) in listed(&folder) {
        let world: Rc<World> = Rc::default();
        let card = world.plug(HERE, idle(&bytes));
        let mut rig = boot_in(world, &format!("dev={HERE}"));
        if rig.state(HERE) == "broken" {
            println!("{name}: {}", rig.reason(HERE));
            continue;
        }
        for id in 1..3 {
            let mut guest = rig.attach(id, &[HERE]);
            guest.connect(&mut rig);
            guest.enable(&mut rig);
            let (msix, msi) = (guest.enable_msix(&mut rig, &[0]), card.capability(0x05));
            if let Ok(vectors) = &msix {
                guest.bind(vectors[0]);
                assert!(card.delivers(0), "{name}");
            }
            guest.disable_msi(&mut rig);
            let pirq = guest.enable_msi(&mut rig);
            assert_eq!(pirq.is_ok(), msi.is_some(), "{name}: {pirq:?}");
            guest.destroy(&mut rig);
            assert_eq!((rig.state(HERE).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{name}");
            println!("{name}: MSI-X {msix:?}, MSI {}, reset {:?}", msi.is_some(), rig.published(HERE, "reset"));
        }
        ready += 1;
    }
    assert!(ready > 0, "no function is ready");
}

/// The capabilities of a listing as lspci walks them: a second parser, which shares nothing with the backend's.
fn capabilities(bytes: &[u8]) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let mut next = bytes[0x34] & !3;
    while bytes[6] & 0x10 != 0 && next >= 0x40 && !found.iter().any(|(at, _)| *at == next) {
        let [id, after] = [bytes[usize::from(next)], bytes[usize::from(next) + 1]];
        if id == 0xff {
            break;
        }
        found.push((next, id));
        next = after & !3;
    }
    found
}

/// What of that list no guest may see: MSI-X whose table lies on its pending bits, or in a base address register that
/// reads zero because Enhanced Allocation has the address.
fn is_hidden(bytes: &[u8], list: &[(u8, u8)], (at, id): (u8, u8)) -> bool {
    let dword = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (table, pending) = (dword(usize::from(at) + 4), dword(usize::from(at) + 8));
    let allocated = list.iter().any(|(_, id)| *id == 0x14);
    let register = 0x10 + 4 * (table & 7) as usize;
    id == 0x11 && (table == pending || allocated && dword(register) == 0)
}

#[test]
fn listings_of_real_devices_show_the_list_that_lspci_shows() {
    let Some(folder) = folder() else { return };
    for (name, bytes) in listed(&folder) {
        let world: Rc<World> = Rc::default();
        let card = world.plug(HERE, idle(&bytes));
        let mut rig = boot_in(world, &format!("dev={HERE}"));
        assert_eq!(rig.state(HERE), "ready", "{name}");
        let mut guest = rig.attach(1, &[HERE]);
        guest.connect(&mut rig);
        let mut seen = Vec::new();
        let mut at = guest.read(&mut rig, 0, 0x34, 1).unwrap();
        while at != 0 && seen.len() < 48 {
            seen.push((at as u8, guest.read(&mut rig, 0, at as i32, 1).unwrap() as u8));
            at = guest.read(&mut rig, 0, at as i32 + 1, 1).unwrap();
        }
        let list = capabilities(&bytes);
        let shown: Vec<_> = list.iter().copied().filter(|found| !is_hidden(&bytes, &list, *found)).collect();
        assert_eq!(seen, shown, "{name}");
        // What is behind the list, and extended space, reads through.
        let whole = (0x100..0x1000).step_by(4).all(|at| {
            let held = u32::from(card.word(at)) | u32::from(card.word(at + 2)) << 16;
            guest.read(&mut rig, 0, at.into(), 4) == Ok(held)
        });
        assert!(whole, "{name}");
    }
}

/// A guest that has a function of ours, and its card.
fn started(image: &images::Image, prepare: impl FnOnce(&Hardware)) -> (Rig, Guest, Rc<Hardware>) {
    let world: Rc<World> = Rc::default();
    let card = world.plug(HERE, image.build());
    prepare(&card);
    let mut rig = boot_in(world, &format!("dev={HERE}"));
    let mut guest = rig.attach(1, &[HERE]);
    guest.connect(&mut rig);
    (rig, guest, card)
}

/// The lines of a trace: an operation and its hexadecimal numbers.
fn trace(folder: &Path, file: &str) -> Option<Vec<(String, Vec<u32>)>> {
    let Ok(text) = std::fs::read_to_string(folder.join(file)) else {
        println!("skipped: no {file} in the folder");
        return None;
    };
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let operation = words.next().filter(|word| ["r", "w", "[block"].contains(word))?;
        Some((operation.to_string(), words.map_while(|word| u32::from_str_radix(word, 16).ok()).collect()))
    };
    Some(text.lines().filter_map(line).collect())
}

// Case 18: QubesOS issue 5615. There the backend let a device model set MSI's enable bit with a write; here the guest's
// operation does, just before it.
#[test]
fn the_trace_of_an_ax200_reads_as_it_was_recorded() {
    let Some(trace) = folder().and_then(|folder| trace(&folder, "ax200-config-ops.txt")) else { return };
    // What the card held at that time.
    let (mut rig, guest, card) = started(&images::AX200, |card| {
        for (at, value) in [(0x0c, 0), (0x50, 0x0142), (0x68, 0x0405)] {
            card.set_word(at, value);
        }
    });
    // The message of before, which the hand-over's reset has cleared.
    card.set_word(0xd4, 0x0798);
    card.set_word(0xd6, 0xfee0);
    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0002), 0);
    let (mut block, mut reads) = (0, 0);
    for (operation, numbers) in &trace {
        match (operation.as_str(), numbers.as_slice()) {
            ("[block", _) => {
                block += 1;
                if block == 3 {
                    // Between the blocks: the driver turns its card on.
                    assert_eq!(guest.write(&mut rig, 0, 4, 2, 0x0006), 0);
                }
            }
            ("r", [size, at, value]) => {
                reads += 1;
                assert_eq!(guest.read(&mut rig, 0, *at as i32, *size as i32), Ok(*value), "{at:#x}, block {block}");
            }
            ("w", [size, at, value]) => {
                match (*at, *value, card.word(0xd2)) {
                    (0xd2, 0x0081, 0x0080) => drop(guest.enable_msi(&mut rig).expect("a vector")),
                    (0xd2, 0x0080, 0x0081) => drop(guest.disable_msi(&mut rig)),
                    _ => {}
                }
                assert_eq!(guest.write(&mut rig, 0, *at as i32, *size as i32, *value), 0, "{at:#x}, block {block}");
            }
            other => panic!("a line of another form: {other:?}"),
        }
    }
    assert_eq!((block, reads), (4, 30), "the whole trace");
    assert_eq!(card.word(at::COMMAND) & 4, 0, "the last write turns bus mastering off in the card");
}

// Case 26: QubesOS issue 9003.
#[test]
fn the_byte_walk_of_an_nvidia_card_reads_bytes() {
    let Some(trace) = folder().and_then(|folder| trace(&folder, "nvidia-cap-walk-bytes.txt")) else { return };
    let (mut rig, guest, _) = started(&images::GT218, |_| {});
    for (operation, numbers) in &trace {
        let ("r", [size, at, _, right]) = (operation.as_str(), numbers.as_slice()) else { panic!("{numbers:x?}") };
        assert_eq!(guest.read(&mut rig, 0, *at as i32, *size as i32), Ok(*right), "{at:#x}");
    }
    assert_eq!(trace.len(), 5, "the whole walk");
}
