//! The reset of a bus for functions that have none of their own: what it reaches, whether it may be done, and how.
//!
//! dom0's kernel resets a bus by itself only for the one function on it. For several it is asked to by the bridge's
//! `reset_subordinate` (Linux 6.13 and newer), and where it has none, the bridge's Secondary Bus Reset bit is written here
//! (PCI-to-PCI Bridge 1.2, 3.2.5.18), which is what Linux does. The driver domain restores the functions.

use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use pciback::config::registers::capability;
use pciback::sbdf::Sbdf;

use super::rules::{capabilities, word};
use crate::sysfs::Sysfs;

/// Bridge Control, and its reset bit.
const CONTROL: u16 = 0x3e;
const RESET: u16 = 1 << 6;
/// Of the bridge's PCI Express capability: a slot is there; what the slot can, and that is hot plug.
const FLAGS: u16 = 0x02;
const SLOT: u16 = 1 << 8;
const SLOT_CAPABILITIES: u16 = 0x14;
const HOT_PLUG: u16 = 1 << 6;

/// How long the bit is held, and how long the functions are left alone after it: Linux's times, the specification's 1 ms
/// and 2^25 cycles rounded up.
const HOLD: Duration = Duration::from_millis(2);
const RECOVER: Duration = Duration::from_secs(1);

/// Attribute of a bridge.
const SUBORDINATE: &str = "reset_subordinate";

/// Functions that do not come back from a reset of their bus: vendor, device id and the bits of it that count (Linux,
/// `quirk_no_bus_reset`: Atheros AR93xx to QCA98xx, Cavium, TI KeyStone, NVIDIA boards).
const NEVER: [(u16, u16, u16); 9] = [
    (0x168c, 0x0030, 0xffff),
    (0x168c, 0x0032, 0xffff),
    (0x168c, 0x0033, 0xffff),
    (0x168c, 0x0034, 0xffff),
    (0x168c, 0x003c, 0xffff),
    (0x168c, 0x003e, 0xffff),
    (0x177d, 0xa100, 0xffff),
    (0x104c, 0xb005, 0xffff),
    (0x10de, 0x2340, 0xffc0),
];

/// A bus with several functions behind a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bus {
    bridge: Sbdf,
    functions: Vec<Sbdf>,
}

impl Bus {
    /// The bus that a function is on, if it is behind a bridge and others are on it.
    pub fn of(sysfs: &Sysfs, sbdf: Sbdf) -> Option<Bus> {
        let bridge = sysfs.bridge(sbdf)?;
        let mut functions = sysfs.functions();
        functions.retain(|other| other.segment() == sbdf.segment() && other.bus() == sbdf.bus());
        (functions.len() > 1).then_some(Bus { bridge, functions })
    }

    /// All functions on it.
    pub fn functions(&self) -> &[Sbdf] {
        &self.functions
    }

    /// Resets it, and waits until its functions may be touched.
    ///
    /// # Errors
    /// Why it cannot be reset.
    pub fn reset(&self, sysfs: &Sysfs) -> Result<(), String> {
        for sbdf in &self.functions {
            let (vendor, device) = sysfs.function(*sbdf).map_err(|failure| failure.what)?.id;
            if NEVER.iter().any(|(of, id, bits)| *of == vendor && device & bits == *id) {
                return Err(format!("{sbdf} ({vendor:04x}:{device:04x}) does not come back from a reset of its bus"));
            }
        }
        if sysfs.has(self.bridge, SUBORDINATE) {
            return sysfs.set(self.bridge, SUBORDINATE, "1").map_err(|failure| failure.what);
        }
        let space = sysfs.config_space(self.bridge).map_err(|failure| failure.what)?;
        let express = capabilities(&space).into_iter().find(|(id, _)| *id == capability::EXPRESS);
        let hot_plug = |(_, at): (u8, u16)| {
            word(&space, at + FLAGS) & SLOT != 0 && word(&space, at + SLOT_CAPABILITIES) & HOT_PLUG != 0
        };
        if express.is_some_and(hot_plug) {
            return Err(format!(
                "{} is a hot-plug port: dom0's kernel would take the reset for a removal",
                self.bridge
            ));
        }
        let control = word(&space, CONTROL);
        if control == u16::MAX {
            return Err(format!("the bridge {} does not answer", self.bridge));
        }
        let file = sysfs.open_config(self.bridge).map_err(|failure| failure.what)?;
        let write = |value: u16| {
            let written = file.write_all_at(&value.to_le_bytes(), CONTROL.into());
            written.map_err(|error| format!("dom0's kernel refuses to write the bridge {}: {error}", self.bridge))
        };
        write(control | RESET)?;
        sleep(HOLD);
        write(control & !RESET)?;
        sleep(RECOVER);
        Ok(())
    }
}
