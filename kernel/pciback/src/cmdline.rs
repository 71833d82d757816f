//! The domain's command line: which functions it owns, for whom, and how it may work.
//!
//! A word that is unknown or wrong is reported with its text and position, and the others still count.
//! A `dev=` entry with one bad key is dropped whole: half an entry could give a device to the wrong
//! guest.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use log::LevelFilter;

use crate::sbdf::Sbdf;
use crate::topology;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where configuration space is, by segment and bus.
    pub ecam: Vec<EcamWindow>,
    /// The functions this domain owns.
    pub devices: Vec<DeviceConfig>,
    /// How configuration space may be written.
    pub mode: Mode,
    /// What is logged.
    pub log: LevelFilter,
    /// Where guests see their functions.
    pub topology: topology::Kind,
}

/// One `ecam=` word: as a line of ACPI's MCFG table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamWindow {
    /// PCI segment.
    pub segment: u16,
    /// First bus covered.
    pub first_bus: u8,
    /// Last bus covered.
    pub last_bus: u8,
    /// Physical address of bus 0 of the segment, also where bus 0 is not covered.
    pub base: u64,
}

impl EcamWindow {
    /// Frame number of the function's 4 KiB, if this window covers it.
    pub fn frame(&self, sbdf: Sbdf) -> Option<u64> {
        let covered = sbdf.segment() == self.segment && (self.first_bus..=self.last_bus).contains(&sbdf.bus());
        if covered { Some((self.base >> 12) + u64::from(sbdf.ecam_index())) } else { None }
    }
}

/// How configuration space may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Find out: see [`crate::mode`].
    Auto,
    /// The host runs with `mmcfg=0`: ECAM frames may be written.
    Mmcfg0,
    /// Never write.
    ReadOnly,
}

/// How a function is reset between guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// The first method that the function has.
    Auto,
    /// Function level reset (PCIe).
    Flr,
    /// Advanced Features reset.
    Af,
    /// D3hot and back.
    Pm,
    /// By dom0, which may reset the bus it is on.
    Bus,
    /// None.
    None,
}

impl Reset {
    /// The word of the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Reset::Auto => "auto",
            Reset::Flr => "flr",
            Reset::Af => "af",
            Reset::Pm => "pm",
            Reset::Bus => "bus",
            Reset::None => "none",
        }
    }
}

/// A register without a rule of its own that a guest may write: `quirk=OFFSET:SIZE:MASK`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quirk {
    /// Where it is in configuration space, a multiple of its size.
    pub offset: u16,
    /// Its bytes: 1, 2 or 4.
    pub size: u16,
    /// The bits that a guest may change.
    pub mask: u32,
}

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "quirk={:x}:{}:{:x}", self.offset, self.size, self.mask)
    }
}

/// Most registers that can be opened in one function: a bound for the table's size.
pub const MAX_QUIRKS: usize = 64;

/// One `dev=` word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The function.
    pub sbdf: Sbdf,
    /// The only guest that may have it, by name; `None`: whom the tool attaches it to.
    pub guest: Option<String>,
    /// Vendor and device id it must have.
    pub id: Option<(u16, u16)>,
    /// Writes to registers without a rule pass.
    pub permissive: bool,
    /// Virtual slot, with `topology=vpci`.
    pub slot: Option<u8>,
    /// Reset method.
    pub reset: Reset,
    /// No reset, no exposure.
    pub strict: bool,
    /// Whether MSI is offered.
    pub msi: bool,
    /// Whether MSI-X is offered.
    pub msix: bool,
    /// Registers that a guest may write besides, by ascending offset; no two overlap.
    pub quirks: Vec<Quirk>,
}

impl DeviceConfig {
    fn new(sbdf: Sbdf) -> DeviceConfig {
        DeviceConfig {
            sbdf,
            guest: None,
            id: None,
            permissive: false,
            slot: None,
            reset: Reset::Auto,
            strict: false,
            msi: true,
            msix: true,
            quirks: Vec::new(),
        }
    }

    /// The options that are in force, as text; empty if all are as by default.
    pub fn options(&self) -> String {
        let mut options = Vec::new();
        if self.permissive {
            options.push("permissive".to_string());
        }
        if let Some(slot) = self.slot {
            options.push(alloc::format!("slot={slot:x}"));
        }
        if self.reset != Reset::Auto {
            options.push(alloc::format!("reset={}", self.reset.word()));
        }
        for (given, name) in [(self.strict, "strict"), (!self.msi, "msi=off"), (!self.msix, "msix=off")] {
            if given {
                options.push(name.to_string());
            }
        }
        options.extend(self.quirks.iter().map(Quirk::to_string));
        options.join(",")
    }
}

/// A word that could not be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Byte position on the command line, from 0.
    pub position: usize,
    /// The word.
    pub text: String,
    /// What is wrong with it, and what would be right.
    pub why: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command line, byte {}: {:?}: {}", self.position, self.text, self.why)
    }
}

/// Most functions one domain owns.
pub const MAX_DEVICES: usize = 256;

/// Reads a command line: what it asks for, and what in it could not be used.
pub fn parse(line: &str) -> (Config, Vec<Complaint>) {
    let mut config = Config {
        ecam: Vec::new(),
        devices: Vec::new(),
        mode: Mode::Auto,
        log: LevelFilter::Info,
        topology: topology::Kind::Vpci,
    };
    let mut complaints = Vec::new();
    let mut places: Vec<(usize, &str)> = Vec::new();
    for (position, text) in words(line) {
        let mut complain = |why: &str| {
            complaints.push(Complaint { position, text: text.to_string(), why: why.to_string() });
        };
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "ecam" => match ecam(value) {
                Ok(window) => config.ecam.push(window),
                Err(why) => complain(why),
            },
            "dev" => match device(value) {
                Ok(device) if config.devices.iter().any(|other| other.sbdf == device.sbdf) => {
                    complain("this function was named before; the first entry counts");
                }
                Ok(_) if config.devices.len() >= MAX_DEVICES => {
                    complain("more functions than one domain can own (256)");
                }
                Ok(device) => {
                    config.devices.push(device);
                    places.push((position, text));
                }
                Err(why) => complain(why),
            },
            "mode" => match value {
                "auto" => config.mode = Mode::Auto,
                "mmcfg0" => config.mode = Mode::Mmcfg0,
                "read-only" => config.mode = Mode::ReadOnly,
                "direct" | "delegated" => complain("is what mode=auto finds out; taken as that"),
                _ => complain("no such mode: auto, mmcfg0 or read-only"),
            },
            "log" => match value {
                "error" => config.log = LevelFilter::Error,
                "warn" => config.log = LevelFilter::Warn,
                "info" => config.log = LevelFilter::Info,
                "debug" => config.log = LevelFilter::Debug,
                "trace" => config.log = LevelFilter::Trace,
                _ => complain("no such level: error, warn, info, debug or trace"),
            },
            "topology" => match topology::Kind::parse(value) {
                Some(kind) => config.topology = kind,
                None => complain("no such topology: vpci or passthrough"),
            },
            _ => complain("unknown word: ecam=, dev=, mode=, log= and topology= are known"),
        }
    }
    // Windows may stand behind the functions they cover, and the topology behind the slots it has no use for.
    let (ecam, topology) = (&config.ecam, config.topology);
    let mut place = places.into_iter();
    config.devices.retain(|device| {
        let (position, text) = place.next().unwrap_or((0, ""));
        let why = if !ecam.iter().any(|window| window.frame(device.sbdf).is_some()) {
            "no ecam= window covers this function; `xl-pciback config` prints the right one"
        } else if topology == topology::Kind::Passthrough && device.slot.is_some() {
            "slot= is for topology=vpci: with topology=passthrough a guest sees the host's address; remove one of them"
        } else {
            return true;
        };
        complaints.push(Complaint { position, text: text.to_string(), why: why.to_string() });
        false
    });
    complaints.sort_by_key(|complaint| complaint.position);
    (config, complaints)
}

/// The words of a line with their byte positions.
fn words(line: &str) -> impl Iterator<Item = (usize, &str)> {
    line.split_ascii_whitespace().map(move |word| (word.as_ptr() as usize - line.as_ptr() as usize, word))
}

/// `SSSS:BB-BB@BASE`, all hexadecimal.
fn ecam(text: &str) -> Result<EcamWindow, &'static str> {
    const WRONG: &str = "not of the form ecam=SSSS:BB-BB@BASE (hexadecimal), e.g. ecam=0000:00-ff@b0000000";
    let (segment, rest) = text.split_once(':').ok_or(WRONG)?;
    let (first, rest) = rest.split_once('-').ok_or(WRONG)?;
    let (last, base) = rest.split_once('@').ok_or(WRONG)?;
    let window = EcamWindow {
        segment: hex(segment, 4).ok_or(WRONG)? as u16,
        first_bus: hex(first, 2).ok_or(WRONG)? as u8,
        last_bus: hex(last, 2).ok_or(WRONG)? as u8,
        base: hex(base.strip_prefix("0x").unwrap_or(base), 16).ok_or(WRONG)?,
    };
    if window.first_bus > window.last_bus {
        return Err("the first bus is above the last");
    }
    // One segment is 256 MiB, and physical addresses have at most 52 bits.
    if !window.base.is_multiple_of(1 << 20) || window.base == 0 || window.base >= 1 << 52 {
        return Err("the base must be the address of bus 0: a multiple of 1 MiB below 2^52, not 0");
    }
    Ok(window)
}

/// `SBDF[,key[=value]]...`
fn device(text: &str) -> Result<DeviceConfig, &'static str> {
    let mut fields = text.split(',');
    let sbdf = fields.next().unwrap_or("").parse().map_err(|_| "not a PCI address of the form SSSS:BB:DD.F")?;
    let mut device = DeviceConfig::new(sbdf);
    for field in fields {
        let (key, value) = field.split_once('=').map_or((field, None), |(key, value)| (key, Some(value)));
        match (key, value) {
            ("guest", Some(name)) if !name.is_empty() => device.guest = Some(name.to_string()),
            ("guest", _) => return Err("guest= wants the guest's name"),
            ("id", Some(id)) => {
                let (vendor, model) = id.split_once(':').ok_or("id= wants VVVV:DDDD")?;
                let vendor = hex(vendor, 4).ok_or("id= wants VVVV:DDDD")?;
                let model = hex(model, 4).ok_or("id= wants VVVV:DDDD")?;
                device.id = Some((vendor as u16, model as u16));
            }
            ("permissive", None) => device.permissive = true,
            ("strict", None) => device.strict = true,
            ("slot", Some(slot)) => {
                let slot = hex(slot, 2).filter(|slot| *slot < 32).ok_or("slot= wants 0 to 1f (hexadecimal)")?;
                device.slot = Some(slot as u8);
            }
            ("reset", Some(method)) => {
                device.reset = match method {
                    "auto" => Reset::Auto,
                    "flr" => Reset::Flr,
                    "af" => Reset::Af,
                    "pm" => Reset::Pm,
                    "bus" => Reset::Bus,
                    "none" => Reset::None,
                    _ => return Err("no such reset: auto, flr, af, pm, bus or none"),
                }
            }
            ("msi", Some("off")) => device.msi = false,
            ("msix", Some("off")) => device.msix = false,
            ("quirk", Some(text)) => {
                let quirk = quirk(text)?;
                if device.quirks.len() >= MAX_QUIRKS {
                    return Err("more than 64 quirk= of one function");
                }
                let end = |quirk: &Quirk| quirk.offset + quirk.size;
                if device.quirks.iter().any(|other| other.offset < end(&quirk) && quirk.offset < end(other)) {
                    return Err("two quirk= lie on one register: say it once, with all bits in the mask");
                }
                device.quirks.push(quirk);
            }
            _ => {
                return Err(
                    "unknown key: guest=, id=, permissive, slot=, reset=, strict, msi=off, msix=off and quirk= are \
                            known",
                );
            }
        }
    }
    device.quirks.sort_unstable_by_key(|quirk| quirk.offset);
    Ok(device)
}

/// `OFFSET:SIZE:MASK`; offset and mask are hexadecimal.
fn quirk(text: &str) -> Result<Quirk, &'static str> {
    const WRONG: &str =
        "quirk= wants OFFSET:SIZE:MASK, e.g. quirk=e0:2:ffff: offset and mask hexadecimal, size 1, 2 or 4";
    let mut fields = text.split(':');
    let mut field = || fields.next().ok_or(WRONG);
    let offset = hex(field()?, 3).ok_or(WRONG)? as u16;
    let size = match field()? {
        "1" => 1,
        "2" => 2,
        "4" => 4,
        _ => return Err(WRONG),
    };
    let mask = hex(field()?, 8).ok_or(WRONG)?;
    if fields.next().is_some() {
        return Err(WRONG);
    }
    if !offset.is_multiple_of(size) {
        return Err("quirk=: the offset is no multiple of the size, so no access could reach the register");
    }
    if mask == 0 || mask >> (8 * u32::from(size)) != 0 {
        return Err("quirk=: the mask must name bits of the register, and at least one");
    }
    Ok(Quirk { offset, size, mask: mask as u32 })
}

/// A hexadecimal number of 1 to `digits` digits and nothing else.
fn hex(text: &str, digits: usize) -> Option<u64> {
    let plain = !text.is_empty() && text.len() <= digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u64::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Case 22: the rule for the register at e0 of a NC340T's ports.
    #[test]
    fn case_22_a_rule_for_one_register_is_read_and_said_back() {
        let quirks = |text: &str| {
            let (config, complaints) = parse(&alloc::format!("ecam=0000:00-ff@b0000000 dev=01:00.0{text}"));
            match config.devices.first() {
                Some(device) => Ok((device.quirks.clone(), device.options())),
                None => Err(complaints[0].why.clone()),
            }
        };
        let wide = Quirk { offset: 0xe0, size: 2, mask: 0xffff };
        assert_eq!(quirks(",quirk=e0:2:ffff").unwrap(), (alloc::vec![wide], "quirk=e0:2:ffff".to_string()));
        let text = "quirk=ff:1:1,quirk=e0:2:ffff,quirk=FFC:4:80000000";
        let (list, said) = quirks(&alloc::format!(",{text}")).unwrap();
        assert_eq!(list.iter().map(|quirk| quirk.offset).collect::<Vec<_>>(), [0xe0, 0xff, 0xffc]);
        assert_eq!(quirks(&alloc::format!(",{said}")).unwrap().0, list);
        for wrong in [
            "",
            "e0",
            "e0:2",
            "e0:3:ff",
            "e0:2:",
            "e0:2:0",
            "e0:2:10000",
            "e1:2:ff",
            "-4:2:ff",
            "1000:2:ff",
            "e0:2:ff:0",
            "e0:8:1",
            "e0:4:100000000",
            "xx:2:ff",
            "e0:2:ff,quirk=e1:1:1",
        ] {
            let why = quirks(&alloc::format!(",quirk={wrong}")).unwrap_err();
            assert!(why.contains("quirk"), "{wrong:?}: {why}");
        }
        let many: String = (0..65).map(|at| alloc::format!(",quirk={:x}:1:1", 0x40 + at)).collect();
        assert!(quirks(&many).is_err() && quirks(&many[..many.rfind(',').unwrap()]).is_ok());
    }

    #[test]
    fn a_whole_line_is_understood() {
        let (config, complaints) = parse(
            "dev=0000:01:00.0,guest=db1,id=1b36:0010 ecam=0000:00-ff@b0000000  dev=00:05.0,permissive,slot=1f mode=mmcfg0 log=debug topology=vpci",
        );
        assert_eq!(complaints, []);
        assert_eq!(config.mode, Mode::Mmcfg0);
        assert_eq!(config.log, LevelFilter::Debug);
        assert_eq!(config.topology, topology::Kind::Vpci);
        assert_eq!(config.devices[0].guest.as_deref(), Some("db1"));
        assert_eq!(config.devices[0].id, Some((0x1b36, 0x0010)));
        assert_eq!(config.devices[1].options(), "permissive,slot=1f");
        assert_eq!(config.ecam[0].frame(config.devices[0].sbdf), Some(0xb0100));
        assert_eq!(config.ecam[0].frame(config.devices[1].sbdf), Some(0xb0028));
    }

    #[test]
    fn wrong_words_are_named_with_their_place_and_the_right_ones_count() {
        let line = "ecam=0000:00-ff@b0000000 blah dev=01:00.9 dev=01:00.0 dev=01:00.0,permissive log=loud dev=02:00.0,slot=20 dev=0001:01:00.0 mode=direct";
        let (config, complaints) = parse(line);
        let told: Vec<_> = complaints.iter().map(|c| (c.position, c.text.as_str())).collect();
        let texts = [
            "blah",
            "dev=01:00.9",
            "dev=01:00.0,permissive",
            "log=loud",
            "dev=02:00.0,slot=20",
            "dev=0001:01:00.0",
            "mode=direct",
        ];
        assert_eq!(told, texts.map(|text| (line.find(text).expect("in the line"), text)));
        assert_eq!(config.devices.len(), 1);
        assert!(!config.devices[0].permissive);
        assert_eq!((config.mode, config.log), (Mode::Auto, LevelFilter::Info));
    }

    #[test]
    fn a_slot_has_no_place_in_the_passthrough_topology() {
        let line = "ecam=0000:00-ff@b0000000 dev=01:00.0,slot=3 dev=02:00.0 topology=passthrough";
        let (config, complaints) = parse(line);
        assert_eq!((config.topology, config.devices.len()), (topology::Kind::Passthrough, 1));
        assert_eq!(complaints.len(), 1);
        assert_eq!((complaints[0].position, complaints[0].text.as_str()), (25, "dev=01:00.0,slot=3"));
        assert!(complaints[0].why.starts_with("slot= is for topology=vpci"));
        for word in ["topology", "topology=", "topology=flat"] {
            let (config, complaints) = parse(word);
            assert_eq!((config.topology, complaints.len()), (topology::Kind::Vpci, 1), "{word}");
            assert_eq!(complaints[0].why, "no such topology: vpci or passthrough");
        }
    }

    #[test]
    fn an_entry_with_one_bad_key_is_dropped_whole() {
        for entry in ["guest=", "guest", "id=1b36", "permissive=1", "colour=red", "reset=maybe", "msi=on", ""] {
            let (config, complaints) = parse(&alloc::format!("ecam=0000:00-ff@b0000000 dev=01:00.0,{entry}"));
            assert_eq!((config.devices.len(), complaints.len()), (0, 1), "{entry}");
        }
    }

    #[test]
    fn windows_are_checked_and_limited_to_their_buses() {
        for text in [
            "",
            "0000:00-ff",
            "0000:20-10@b0000000",
            "0000:00-ff@b0000001",
            "0000:00-ff@0",
            "0:0-0@+1",
            "0000:00-ff@ffffffffffff00000",
        ] {
            assert!(ecam(text).is_err(), "{text}");
        }
        let window = ecam("0002:40-7f@0x8000000000").expect("right");
        assert_eq!(window.frame("0002:40:00.0".parse().expect("address")), Some(0x800_4000));
        assert_eq!(window.frame("0002:3f:00.0".parse().expect("address")), None);
        assert_eq!(window.frame("0000:40:00.0".parse().expect("address")), None);
    }

    #[test]
    fn options_read_back_as_they_were_given() {
        let (config, complaints) = parse("ecam=0000:00-ff@b0000000 dev=01:00.0,reset=flr,strict,msi=off,msix=off");
        assert_eq!(complaints, []);
        assert_eq!(config.devices[0].options(), "reset=flr,strict,msi=off,msix=off");
    }

    #[test]
    fn no_line_of_bytes_makes_it_stop() {
        let mut seed = 1u32;
        for _ in 0..2000 {
            let line: String = (0..40)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"dev=0:1,.ecam@-ff guestid\xff"[(seed >> 24) as usize % 25] as char
                })
                .collect();
            let _ = parse(&line);
        }
    }
}
