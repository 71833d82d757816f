//! Registers of real devices, as `lspci -xxx` lists them, through a whole life: seized, attached, interrupts on and
//! off, released. Runs where the environment's PCIBACK_DUMPS names a folder of such listings.

mod model;

use model::hardware::at;
use model::{Hardware, World, boot_in};

/// The functions of a listing that have 64 bytes or more.
fn images(text: &str) -> Vec<Vec<u8>> {
    let mut images: Vec<Vec<u8>> = Vec::new();
    for line in text.lines() {
        let Some((offset, bytes)) = line.split_once(": ") else { continue };
        let (Ok(offset), true) = (usize::from_str_radix(offset, 16), offset.len() <= 3) else { continue };
        let bytes: Option<Vec<u8>> = bytes.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        let Some(bytes) = bytes.filter(|bytes| bytes.len() == 16) else { continue };
        if offset == 0 {
            images.push(vec![0; 4096]);
        }
        if let Some(image) = images.last_mut() {
            image[offset..offset + 16].copy_from_slice(&bytes);
        }
    }
    images
}

#[test]
fn listings_of_real_devices_live_and_are_handed_on() {
    let Ok(folder) = std::env::var("PCIBACK_DUMPS") else {
        println!("skipped: set PCIBACK_DUMPS to a folder of lspci -xxx listings");
        return;
    };
    let mut ready = 0;
    for file in std::fs::read_dir(folder).expect("the folder of PCIBACK_DUMPS") {
        let path = file.expect("an entry").path();
        for (index, image) in images(&std::fs::read_to_string(&path).expect("text")).iter().enumerate() {
            let (name, sbdf) = (format!("{} {index}", path.display()), "0000:05:00.0");
            let world: std::rc::Rc<World> = Default::default();
            let card = world.plug(sbdf, Hardware::from_image(image));
            // As the host leaves it: decoding, no interrupts.
            card.set_word(at::COMMAND, card.word(at::COMMAND) & !7 | 0x0403);
            for (id, off) in [(0x05, !1), (0x11, !0xc000)] {
                if let Some(at) = card.capability(id) {
                    card.set_word(at + 2, card.word(at + 2) & off);
                }
            }
            let mut rig = boot_in(world, &format!("dev={sbdf}"));
            if rig.state(sbdf) == "broken" {
                println!("{name}: {}", rig.reason(sbdf));
                continue;
            }
            for id in 1..3 {
                let mut guest = rig.attach(id, &[sbdf]);
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
                assert_eq!((rig.state(sbdf).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{name}");
                println!("{name}: MSI-X {msix:?}, MSI {}, reset {:?}", msi.is_some(), rig.published(sbdf, "reset"));
            }
            ready += 1;
        }
    }
    assert!(ready > 0, "no listing in the folder");
}
