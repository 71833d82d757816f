//! Functions whose resets are not what their registers say: a table by vendor and device id, each row with where it is
//! publicly known from. Only facts are taken over; what they mean here is said at each kind.
//!
//! Most are known from the list that Linux keeps (`drivers/pci/quirks.c`: `quirk_no_flr`, `quirk_no_pm_reset`,
//! `pci_dev_reset_methods`), of v6.14 and of patches on linux-pci since. Its list of functions that must not be reset with their bus is not here: only dom0's kernel
//! does that, and knows them.

use crate::config::VirtualConfig;
use crate::config::registers::{EXTENDED, advanced, capability, offset};
use crate::platform::{ConfigSpace, Nanos, Width};

const MS: Nanos = 1_000_000;

/// What is particular to a function's resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// The function level reset of PCI Express works though Device Capabilities do not tell of it.
    HiddenFlr,
    /// The Advanced Features capability is at this offset and in no list.
    HiddenAf(u16),
    /// A function level reset is announced, and harms: why.
    NoFlr(&'static str),
    /// The way over D3hot is announced as a reset, and is none: why.
    NoPm(&'static str),
    /// After a function level reset it needs this much longer than the specification says.
    Slow(Nanos),
    /// Its own reset needs its memory as well as its configuration space: dom0's kernel knows how. Why.
    Dom0(&'static str),
}

/// A row: vendor, device id and the bits of it that count, base class and subclass if only these are meant, the quirk.
struct Row(u16, u16, u16, Option<u16>, Quirk);

const ANY: u16 = 0;
const ONE: u16 = 0xffff;
const VGA: u16 = 0x0300;

const HANGS: &str = "a function level reset makes it hang";
const NO_FIRMWARE: &str = "it does not answer after a function level reset";
const SYNC: &str = "it keeps its state over D3hot";
const CONTROLLER: &str = "a function level reset with the NVMe controller on can end it";

#[rustfmt::skip]
const TABLE: [Row; 27] = [
    // The 82599 datasheet, 9.3.10.4 and 9.5: reported by the physical function only. Linux: reset_intel_82599_sfp_virtfn.
    Row(0x8086, 0x10ed, ONE, None, Quirk::HiddenFlr),
    // QubesOS issues 9356 (I219-LM) and 11048 (I219-V): an erratum; it is behind MSI at 0xd0.
    Row(0x8086, 0x550a, ONE, None, Quirk::HiddenAf(0xe0)),
    Row(0x8086, 0x15bc, ONE, None, Quirk::HiddenAf(0xe0)),
    // Linux: quirk_no_flr. AMD Matisse audio and USB, Starship USB, the FCH's SATA, the NPUs.
    Row(0x1022, 0x1487, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x1022, 0x148c, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x1022, 0x149c, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x1022, 0x7901, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x1022, 0x1502, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x1022, 0x17f0, ONE, None, Quirk::NoFlr(HANGS)),
    // Linux: quirk_no_flr. Intel 82579LM and 82579V.
    Row(0x8086, 0x1502, ONE, None, Quirk::NoFlr(HANGS)),
    Row(0x8086, 0x1503, ONE, None, Quirk::NoFlr(HANGS)),
    // Linux: quirk_no_flr, "PCI: Avoid FLR for Mediatek MT7922 WiFi", February 2025, reported from Qubes OS; MT7925, 2026.
    Row(0x14c3, 0x0616, ONE, None, Quirk::NoFlr(NO_FIRMWARE)),
    Row(0x14c3, 0x7925, ONE, None, Quirk::NoFlr(NO_FIRMWARE)),
    // Linux: quirk_no_pm_reset. AMD graphics keep showing their picture; Mellanox Spectrum 1 to 4 keep their ports up.
    Row(0x1002, ANY, ANY, Some(VGA), Quirk::NoPm(SYNC)),
    Row(0x15b3, 0xcb84, ONE, None, Quirk::NoPm(SYNC)),
    Row(0x15b3, 0xcf6c, ONE, None, Quirk::NoPm(SYNC)),
    Row(0x15b3, 0xcf70, ONE, None, Quirk::NoPm(SYNC)),
    Row(0x15b3, 0xcf80, ONE, None, Quirk::NoPm(SYNC)),
    // Linux: delay_250ms_after_flr. Intel DC P3700 and P4510, Solidigm P44 Pro.
    Row(0x8086, 0x0953, ONE, None, Quirk::Slow(250 * MS)),
    Row(0x8086, 0x0a54, ONE, None, Quirk::Slow(250 * MS)),
    Row(0x025e, 0xf1ac, ONE, None, Quirk::Slow(250 * MS)),
    // Linux: nvme_disable_and_flr. Samsung 950 PRO and SM961.
    Row(0x144d, 0xa802, ONE, None, Quirk::Dom0(CONTROLLER)),
    Row(0x144d, 0xa804, ONE, None, Quirk::Dom0(CONTROLLER)),
    // Linux: reset_ivb_igd. Intel graphics of Ivy Bridge.
    Row(0x8086, 0x0156, ONE, None, Quirk::Dom0("its graphics engines are reset in its memory")),
    Row(0x8086, 0x0166, ONE, None, Quirk::Dom0("its graphics engines are reset in its memory")),
    // Linux: reset_chelsio_generic_dev. All of the T4 family.
    Row(0x1425, 0x4000, 0xf000, None, Quirk::Dom0("a function level reset without bus mastering and MSI-X ends it")),
    // Linux: reset_hinic_vf_dev. Virtual functions of Huawei's HiNIC.
    Row(0x19e5, 0x375e, ONE, None, Quirk::Dom0("its firmware has to finish its function level reset")),
];

/// What is known of a function, if anything is.
pub fn of<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Option<Quirk> {
    let (vendor, device) = config.identity().ids();
    let class = hardware.read(offset::CLASS + 2, Width::Word) as u16;
    let mut rows = TABLE.iter().filter(|Row(of, id, bits, kind, _)| {
        *of == vendor && device & bits == *id && kind.is_none_or(|kind| kind == class)
    });
    rows.next().map(|Row(.., quirk)| *quirk)
}

/// How much longer than others a function needs after a function level reset.
pub fn slowness<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Nanos {
    match of(hardware, config) {
        Some(Quirk::Slow(time)) => time,
        _ => 0,
    }
}

/// Where the Advanced Features capability is that a row tells of, if it is there and behind it really is the last in the
/// list: another revision may have something else in its place.
pub fn hidden_advanced<C: ConfigSpace>(hardware: &C, config: &VirtualConfig, at: u16) -> Option<u16> {
    let msi = config.capability(capability::MSI)?;
    let last = hardware.read(msi, Width::Word) >> 8 & 0xff == 0;
    let here = at + advanced::STATUS < EXTENDED && hardware.read(at, Width::Byte) as u8 == capability::ADVANCED;
    (last && msi + 0x10 == at && here).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_function_is_in_two_rows_and_no_row_is_void() {
        for (place, Row(vendor, id, bits, class, _)) in TABLE.iter().enumerate() {
            assert!(*vendor != 0 && id & !bits == 0, "{vendor:04x}:{id:04x}");
            for Row(other, second, mask, kind, _) in &TABLE[..place] {
                let both = bits & mask;
                let overlap = vendor == other && id & both == second & both && (class == kind || class.is_none());
                assert!(!overlap, "{vendor:04x}:{id:04x}");
            }
        }
    }
}
