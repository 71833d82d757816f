//! What dom0's sysfs and ACPI tables say of PCI functions.

use std::fs;
use std::path::PathBuf;

use pciback::sbdf::Sbdf;

use crate::error::{Failure, Outcome};

/// The name `driver_override` is set to: no driver has it, so none takes the function.
pub const NOBODY: &str = "pciback-stubdom";

/// dom0's file systems, at `/` or, in tests, elsewhere.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

/// One BAR or the ROM, a line of sysfs `resource`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resource {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
    /// `IORESOURCE_*`.
    pub flags: u64,
}

impl Resource {
    /// Whether it is a range of I/O ports.
    pub fn is_io(&self) -> bool {
        self.flags & 0x100 != 0
    }

    /// Whether there is anything to give access to.
    pub fn is_used(&self) -> bool {
        self.start != 0 && self.end >= self.start
    }

    /// Whether a base address register holds it: with Enhanced Allocation (`IORESOURCE_PCI_EA_BEI`) it reads zero.
    pub fn is_in_register(&self) -> bool {
        self.is_used() && self.flags & 0x20 == 0
    }
}

/// What is known of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its address.
    pub sbdf: Sbdf,
    /// Vendor and device id.
    pub id: (u16, u16),
    /// Class code: base class, subclass, programming interface.
    pub class: u32,
    /// PCI header type without the multifunction bit.
    pub header_type: u8,
    /// Whether it is a virtual function (SR-IOV).
    pub is_virtual: bool,
    /// BAR0 to BAR5 and the ROM.
    pub resources: [Resource; 7],
    /// dom0's interrupt number: the GSI once dom0 has routed it.
    pub irq: u32,
    /// dom0's driver, if one has it.
    pub driver: Option<String>,
    /// `driver_override`, if set.
    pub driver_override: Option<String>,
}

impl Function {
    /// The ids as text.
    pub fn id_text(&self) -> String {
        format!("{:04x}:{:04x}", self.id.0, self.id.1)
    }

    /// The `resource-N` node: seven lines joined by semicolons.
    pub fn resource_text(&self) -> String {
        let lines = self.resources.map(|r| format!("{:#018x} {:#018x} {:#018x}", r.start, r.end, r.flags));
        lines.join(";")
    }

    /// Why the function can never be passed through, if so.
    pub fn refusal(&self) -> Option<Failure> {
        let sbdf = self.sbdf;
        let (base, sub) = (self.class >> 16 & 0xff, self.class >> 8 & 0xff);
        match (self.header_type, base, sub) {
            (1 | 2, ..) => Some(Failure::new(
                format!("{sbdf} is a bridge (header type {})", self.header_type),
                "pass through the functions behind it, not the bridge",
            )),
            (3.., ..) => Some(Failure::new(
                format!("{sbdf} has header type {:#x}, which is not that of a device", self.header_type),
                "see lspci -xs of it; a device that answers all ones has lost its power or its link",
            )),
            // Host and ISA bridges have a device's header. 0680 ("other") is also what NTB cards have.
            (0, 6, sub) if sub != 0x80 => Some(Failure::new(
                format!("{sbdf} is a bridge (class {base:02x}{sub:02x}) that the host itself needs"),
                "name a device, not a part of the chipset",
            )),
            _ => None,
        }
    }

    /// Whether the function was taken from dom0 for this project.
    pub fn is_assignable(&self) -> bool {
        self.driver.is_none() && self.driver_override.as_deref() == Some(NOBODY)
    }
}

/// One entry of ACPI's MCFG table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Address of bus 0.
    pub base: u64,
    /// Segment.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
}

impl Ecam {
    /// The function's frame number, if it is covered.
    pub fn frame(&self, sbdf: Sbdf) -> Option<u64> {
        let covered = sbdf.segment() == self.segment && (self.first_bus..=self.last_bus).contains(&sbdf.bus());
        if covered { Some((self.base >> 12) + u64::from(sbdf.ecam_index())) } else { None }
    }

    /// As a word of the driver domain's command line.
    pub fn word(&self) -> String {
        format!("ecam={:04x}:{:02x}-{:02x}@{:x}", self.segment, self.first_bus, self.last_bus, self.base)
    }
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
}

impl Default for Sysfs {
    /// The real one; tests of the program put another in `XL_PCIBACK_SYSFS`.
    fn default() -> Sysfs {
        Sysfs { root: std::env::var_os("XL_PCIBACK_SYSFS").map_or("/".into(), PathBuf::from) }
    }
}

impl Sysfs {
    /// A tree at `root`, for tests.
    #[cfg(test)]
    pub fn at(root: &std::path::Path) -> Sysfs {
        Sysfs { root: root.into() }
    }

    fn folder(&self, sbdf: Sbdf) -> PathBuf {
        self.root.join(format!("sys/bus/pci/devices/{sbdf}"))
    }

    /// Every function of the host.
    pub fn functions(&self) -> Vec<Sbdf> {
        let entries = fs::read_dir(self.root.join("sys/bus/pci/devices"));
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
        let mut all: Vec<Sbdf> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        all.sort_unstable();
        all
    }

    /// The functions that a word of the command line means: one address, or with `*` for its function all that are
    /// in the slot, as xl has it. Function 0 comes first, so that the guest gets it first.
    ///
    /// # Errors
    /// It is no address, or nothing is in the slot.
    pub fn named(&self, word: &str) -> Outcome<Vec<Sbdf>> {
        let wrong = |bad| Failure::usage(format!("{word:?} is {bad}"));
        let Some(slot) = word.strip_suffix(".*") else {
            return Ok(vec![word.parse().map_err(wrong)?]);
        };
        let zero: Sbdf = format!("{slot}.0").parse().map_err(wrong)?;
        let of_slot = |sbdf: &Sbdf| Sbdf::new(sbdf.segment(), sbdf.bus(), sbdf.devfn() & !7) == zero;
        let found: Vec<Sbdf> = self.functions().into_iter().filter(of_slot).collect();
        if found.is_empty() {
            return Err(Failure::new(
                format!("the host has no PCI function in slot {slot}"),
                "lspci -D lists what there is",
            ));
        }
        Ok(found)
    }

    /// The bridge that a function is behind; none on a root bus.
    pub fn bridge(&self, sbdf: Sbdf) -> Option<Sbdf> {
        let place = fs::canonicalize(self.folder(sbdf)).ok()?;
        place.parent()?.file_name()?.to_str()?.parse().ok()
    }

    /// What is known of `sbdf`.
    ///
    /// # Errors
    /// There is no such function, or it cannot be read.
    pub fn function(&self, sbdf: Sbdf) -> Outcome<Function> {
        let folder = self.folder(sbdf);
        let read = |name: &str| fs::read_to_string(folder.join(name)).map(|text| text.trim().to_string());
        if !folder.exists() {
            return Err(Failure::new(
                format!("{sbdf}: the host has no such PCI function"),
                "lspci -D lists what there is",
            ));
        }
        let unreadable = || Failure::new(format!("{sbdf}: {} cannot be read", folder.display()), "run as root in dom0");
        let number = |name: &str| read(name).ok().and_then(|text| parse_hex(&text)).ok_or_else(unreadable);
        let mut resources = [Resource::default(); 7];
        let text = read("resource").map_err(|_| unreadable())?;
        for (resource, line) in resources.iter_mut().zip(text.lines()) {
            let mut fields = line.split_ascii_whitespace().map(parse_hex);
            if let (Some(Some(start)), Some(Some(end)), Some(Some(flags))) =
                (fields.next(), fields.next(), fields.next())
            {
                *resource = Resource { start, end, flags };
            }
        }
        let header = fs::read(folder.join("config")).map_err(|_| unreadable())?;
        let driver = fs::read_link(folder.join("driver")).ok();
        let driver = driver.and_then(|link| Some(link.file_name()?.to_str()?.to_string()));
        let forced = read("driver_override").ok().filter(|name| !name.is_empty() && name != "(null)");
        Ok(Function {
            sbdf,
            id: (number("vendor")? as u16, number("device")? as u16),
            class: number("class")? as u32,
            is_virtual: folder.join("physfn").exists(),
            header_type: header.get(0x0e).copied().unwrap_or(0xff) & 0x7f,
            resources,
            irq: read("irq").ok().and_then(|text| text.parse().ok()).unwrap_or(0),
            driver,
            driver_override: forced,
        })
    }

    /// Writes an attribute of a function.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn set(&self, sbdf: Sbdf, attribute: &str, value: &str) -> Outcome<()> {
        fs::write(self.folder(sbdf).join(attribute), value).map_err(|error| {
            Failure::new(
                format!("{sbdf}: dom0's kernel refuses {attribute} = {value:?}: {error}"),
                "see dom0's kernel log (dmesg)",
            )
        })
    }

    /// Whether a function is the device `name`, or behind it.
    pub fn is_behind(&self, sbdf: Sbdf, name: &str) -> bool {
        // The link goes through every bridge on the way.
        let way = fs::read_link(self.folder(sbdf)).unwrap_or_else(|_| self.folder(sbdf));
        way.components().any(|part| part.as_os_str() == name)
    }

    /// Whether the function was taken from dom0 and no driver has it.
    pub fn is_nobodys(&self, sbdf: Sbdf) -> bool {
        let folder = self.folder(sbdf);
        let forced = fs::read(folder.join("driver_override"));
        forced.is_ok_and(|name| name.trim_ascii_end() == NOBODY.as_bytes())
            && fs::symlink_metadata(folder.join("driver")).is_err()
    }

    /// Opens `driver_override` for looks at it.
    pub fn open_override(&self, sbdf: Sbdf) -> Option<fs::File> {
        fs::File::open(self.folder(sbdf).join("driver_override")).ok()
    }

    /// What the configuration space reads.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn config_space(&self, sbdf: Sbdf) -> Outcome<Vec<u8>> {
        fs::read(self.folder(sbdf).join("config")).map_err(|error| {
            Failure::new(format!("{sbdf}: its configuration space cannot be read: {error}"), "see dmesg")
        })
    }

    /// Opens the configuration space for reading and writing.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn open_config(&self, sbdf: Sbdf) -> Outcome<fs::File> {
        let opened = fs::OpenOptions::new().read(true).write(true).open(self.folder(sbdf).join("config"));
        opened.map_err(|error| {
            Failure::new(format!("{sbdf}: its configuration space cannot be opened: {error}"), "see dmesg")
        })
    }

    /// Whether dom0 has enabled the function.
    pub fn is_enabled(&self, sbdf: Sbdf) -> bool {
        fs::read_to_string(self.folder(sbdf).join("enable")).is_ok_and(|text| text.trim() != "0")
    }

    /// Whether a function has an attribute.
    pub fn has(&self, sbdf: Sbdf, attribute: &str) -> bool {
        self.folder(sbdf).join(attribute).exists()
    }

    /// Takes a function from its driver.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn unbind(&self, sbdf: Sbdf) -> Outcome<()> {
        self.set(sbdf, "driver/unbind", &sbdf.to_string())
    }

    /// Has the kernel look for a driver.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn probe(&self, sbdf: Sbdf) -> Outcome<()> {
        fs::write(self.root.join("sys/bus/pci/drivers_probe"), sbdf.to_string())
            .map_err(|error| Failure::new(format!("{sbdf}: no driver could be looked for: {error}"), "see dmesg"))
    }

    /// The ECAM windows of ACPI's MCFG table.
    ///
    /// # Errors
    /// There is no table, or it is malformed.
    pub fn ecam(&self) -> Outcome<Vec<Ecam>> {
        let table = fs::read(self.root.join("sys/firmware/acpi/tables/MCFG")).map_err(|error| {
            Failure::new(
                format!("ACPI's MCFG table cannot be read: {error}"),
                "run as root in dom0; a host without PCI Express has no such table and cannot be used",
            )
        })?;
        let windows = parse_mcfg(&table);
        if windows.is_empty() {
            return Err(Failure::new(
                "ACPI's MCFG table names no window",
                "the firmware is at fault; look for an update",
            ));
        }
        Ok(windows)
    }
}

/// Entries of an MCFG table (PCI Firmware specification 3.0, 4.1.2): 44 bytes of header, 16 an entry.
pub fn parse_mcfg(table: &[u8]) -> Vec<Ecam> {
    let len = table.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
    let body = table.get(44..len.min(table.len())).unwrap_or(&[]);
    body.chunks_exact(16)
        .filter_map(|entry| {
            Some(Ecam {
                base: u64::from_le_bytes(entry.get(0..8)?.try_into().ok()?),
                segment: u16::from_le_bytes(entry.get(8..10)?.try_into().ok()?),
                first_bus: *entry.get(10)?,
                last_bus: *entry.get(11)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mcfg(entries: &[(u64, u16, u8, u8)]) -> Vec<u8> {
        let mut table = vec![0; 44];
        table[..4].copy_from_slice(b"MCFG");
        for (base, segment, first, last) in entries {
            table.extend(base.to_le_bytes());
            table.extend(segment.to_le_bytes());
            table.extend([*first, *last, 0, 0, 0, 0]);
        }
        let len = table.len() as u32;
        table[4..8].copy_from_slice(&len.to_le_bytes());
        table
    }

    /// An error of a bridge concerns what is behind it, at any depth, and nothing beside it.
    #[test]
    fn a_function_is_behind_every_bridge_on_its_way() {
        let root = std::env::temp_dir().join(format!("xl-pciback-{}-behind", std::process::id()));
        let devices = root.join("sys/bus/pci/devices");
        fs::create_dir_all(&devices).unwrap();
        let way = "../../../devices/pci0000:00/0000:00:03.0/0000:01:00.0/0000:02:00.0";
        std::os::unix::fs::symlink(way, devices.join("0000:02:00.0")).unwrap();
        let sysfs = Sysfs::at(&root);
        let behind = |name| sysfs.is_behind("0000:02:00.0".parse().unwrap(), name);
        assert!(["0000:00:03.0", "0000:01:00.0", "0000:02:00.0"].into_iter().all(behind));
        assert!(!["0000:00:03.1", "0000:00:03", "0000:02:00.1", "0000:03:00.0", ""].into_iter().any(behind));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn several_segments_are_found_and_a_short_table_is_no_trouble() {
        let table = mcfg(&[(0xb000_0000, 0, 0, 255), (0x80_0000_0000, 2, 0x40, 0x7f)]);
        let windows = parse_mcfg(&table);
        assert_eq!(windows.len(), 2);
        assert_eq!(windows[0].word(), "ecam=0000:00-ff@b0000000");
        assert_eq!(windows[1].frame("0002:40:00.1".parse().unwrap()), Some(0x800_4001));
        assert_eq!(windows[1].frame("0002:3f:00.1".parse().unwrap()), None);
        assert_eq!(parse_mcfg(&table[..70]).len(), 1);
        for len in 0..44 {
            assert!(parse_mcfg(&table[..len]).is_empty());
        }
        let mut lying = table.clone();
        lying[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(parse_mcfg(&lying).len(), 2);
    }
}
