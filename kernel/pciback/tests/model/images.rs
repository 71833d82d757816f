//! Functions as real ones are: header and capabilities of the kinds of devices that people pass to guests, each a short
//! description. Ids, places of capabilities, vector counts and addresses are those of public reports and listings
//! (docs/cases.md); sizes of base addresses and what a report does not tell are made up.

use super::Hardware;

/// Kind of a base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Io,
    Memory,
    /// Memory, 64 bits: the next register is its upper half.
    Wide,
    /// The same, without side effects of reads.
    WidePrefetch,
}

impl Space {
    pub fn is_wide(self) -> bool {
        matches!(self, Space::Wide | Space::WidePrefetch)
    }

    /// The bits of the register that say so.
    pub fn low_bits(self) -> u32 {
        match self {
            Space::Io => 1,
            Space::Memory => 0,
            Space::Wide => 4,
            Space::WidePrefetch => 12,
        }
    }

    /// Linux's `IORESOURCE_*` flags.
    fn flags(self) -> u64 {
        match self {
            Space::Io => 0x4_0101,
            Space::Memory => 0x4_0200,
            Space::Wide => 0x14_0204,
            Space::WidePrefetch => 0x14_220c,
        }
    }
}

/// A base address.
#[derive(Clone, Copy, Debug)]
pub struct Base {
    /// 0 to 5.
    pub index: usize,
    pub space: Space,
    pub start: u64,
    pub size: u64,
}

const fn base(index: usize, space: Space, start: u64, size: u64) -> Base {
    Base { index, space, start, size }
}

/// A capability.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Power {
        pmc: u16,
        pmcsr: u16,
    },
    Vpd,
    /// Message Control.
    Msi(u16),
    /// BAR and offset of the table and of the pending bits.
    Msix {
        entries: u16,
        table: (u8, u32),
        pending: (u8, u32),
    },
    /// Flags, and Device Capabilities.
    Express(u16, u32),
    Advanced,
    /// Its bytes from the third on.
    Vendor(&'static [u8]),
    PciX,
    /// BAR that an entry stands for, first address, and last offset.
    Allocation(&'static [(u8, u64, u32)]),
}

impl Kind {
    pub fn id(&self) -> u8 {
        match self {
            Kind::Power { .. } => 0x01,
            Kind::Vpd => 0x03,
            Kind::Msi(_) => 0x05,
            Kind::PciX => 0x07,
            Kind::Vendor(_) => 0x09,
            Kind::Express(..) => 0x10,
            Kind::Msix { .. } => 0x11,
            Kind::Advanced => 0x13,
            Kind::Allocation(_) => 0x14,
        }
    }

    /// Its bytes behind id and pointer.
    fn bytes(&self) -> Vec<u8> {
        let words = |words: &[u16]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        match *self {
            Kind::Power { pmc, pmcsr } => words(&[pmc, pmcsr, 0]),
            Kind::Vpd => vec![0; 6],
            Kind::Msi(control) => {
                let rest = if control & 0x80 != 0 { 10 } else { 6 } + if control & 0x100 != 0 { 10 } else { 0 };
                [words(&[control]), vec![0; rest]].concat()
            }
            Kind::Msix { entries, table, pending } => {
                let place = |(bar, offset): (u8, u32)| (u32::from(bar) | offset).to_le_bytes();
                [words(&[entries - 1]), place(table).into(), place(pending).into()].concat()
            }
            Kind::Express(flags, device) => {
                // Device Control as firmware leaves it, no pending transactions, a link of one lane.
                let head = [flags, device as u16, (device >> 16) as u16, 0x2810, 0, 0x5c11, 0x0006, 0x0040, 0x1011];
                [words(&head), vec![0; 0x3c - 20]].concat()
            }
            Kind::Advanced => vec![6, 3, 0, 0],
            Kind::Vendor(rest) => rest.to_vec(),
            Kind::PciX => words(&[0x0022, 0x00f8, 0x0183]),
            Kind::Allocation(entries) => {
                let mut bytes = words(&[entries.len() as u16]);
                for (bar, start, last) in entries {
                    // Four dwords behind the first; enabled, memory without prefetch.
                    let header = 0x80ff_0004 | u32::from(*bar) << 4;
                    for dword in [header, *start as u32 | 2, last | 2, (start >> 32) as u32, 0] {
                        bytes.extend(dword.to_le_bytes());
                    }
                }
                bytes
            }
        }
    }
}

/// A function.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    pub name: &'static str,
    pub ids: (u16, u16),
    /// Class and revision.
    pub class: u32,
    /// Subsystem vendor and id.
    pub subsystem: (u16, u16),
    /// Header type: the multifunction bit.
    pub header: u8,
    /// Interrupt pin.
    pub pin: u8,
    pub bases: &'static [Base],
    /// Address and size of the ROM.
    pub rom: Option<(u32, u32)>,
    /// The capabilities in the order of the list.
    pub list: &'static [(u8, Kind)],
    /// Where the extended capabilities are, and their ids.
    pub extended: &'static [(u16, u16)],
    /// The capability that no guest sees.
    pub hidden: Option<u8>,
    /// How it is reset.
    pub reset: &'static str,
}

impl Image {
    /// What the other descriptions add to.
    const PLAIN: Image = Image {
        name: "",
        ids: (0, 0),
        class: 0x0200_0000,
        subsystem: (0, 0),
        header: 0,
        pin: 1,
        bases: &[],
        rom: None,
        list: &[],
        extended: &[],
        hidden: None,
        reset: "dom0",
    };

    /// Its 4 KiB: decoding and interrupts off but for what firmware leaves.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
        put(0x00, &self.ids.0.to_le_bytes());
        put(0x02, &self.ids.1.to_le_bytes());
        put(0x04, &[0x03, 0x04, 0x10, 0x00]);
        put(0x08, &self.class.to_le_bytes());
        put(0x0c, &[0x10, 0, self.header, 0]);
        for base in self.bases {
            put(0x10 + 4 * base.index, &(base.start as u32 | base.space.low_bits()).to_le_bytes());
            if base.space.is_wide() {
                put(0x14 + 4 * base.index, &((base.start >> 32) as u32).to_le_bytes());
            }
        }
        put(0x2c, &self.subsystem.0.to_le_bytes());
        put(0x2e, &self.subsystem.1.to_le_bytes());
        put(0x30, &self.rom.map_or(0, |(start, _)| start).to_le_bytes());
        put(0x3c, &[11, self.pin]);
        let mut pointer = 0x34;
        for (at, kind) in self.list {
            put(pointer, &[*at]);
            put(usize::from(*at), &[kind.id(), 0]);
            put(usize::from(*at) + 2, &kind.bytes());
            pointer = usize::from(*at) + 1;
        }
        for (index, (at, id)) in self.extended.iter().enumerate() {
            let next = self.extended.get(index + 1).map_or(0, |(next, _)| *next);
            put(usize::from(*at), &(u32::from(*id) | 1 << 16 | u32::from(next) << 20).to_le_bytes());
        }
        bytes
    }

    /// Which bits of its six base address registers and the ROM's take a write.
    fn takes(&self) -> [u32; 7] {
        let mut takes = [0; 7];
        for base in self.bases {
            let mask = base.size.wrapping_neg();
            takes[base.index] = mask as u32 & if base.space == Space::Io { !3 } else { !0xf };
            if base.space.is_wide() {
                takes[base.index + 1] = (mask >> 32) as u32;
            }
        }
        takes[6] = self.rom.map_or(0, |(_, size)| size.wrapping_neg() | 1);
        takes
    }

    /// The `resource-N` node.
    fn resources(&self) -> String {
        let mut lines = vec!["0x0 0x0 0x0".to_string(); 7];
        for base in self.bases {
            lines[base.index] =
                format!("{:#x} {:#x} {:#x}", base.start, base.start + base.size - 1, base.space.flags());
        }
        for (_, kind) in self.list {
            let Kind::Allocation(entries) = kind else { continue };
            for (bar, start, last) in entries.iter().filter(|(bar, ..)| *bar < 6) {
                // IORESOURCE_PCI_EA_BEI among them.
                lines[usize::from(*bar)] = format!("{start:#x} {:#x} 0x100220", start + u64::from(*last | 3));
            }
        }
        if let Some((start, size)) = self.rom {
            lines[6] = format!("{start:#x} {:#x} 0x46200", start + (size - 1));
        }
        lines.join(";")
    }

    /// The function as hardware. What is behind the heads of its extended capabilities takes every write.
    pub fn build(&self) -> Hardware {
        let hardware = Hardware::from_image(&self.bytes()).with_bars(self.resources(), self.takes());
        let heads =
            |at: usize| self.extended.iter().any(|(head, _)| (usize::from(*head)..).take(4).any(|byte| byte == at));
        (0x100..0x1000).filter(|at| !heads(*at)).for_each(|at| hardware.open(at..at + 1));
        hardware
    }

    pub fn find(&self, id: u8) -> Option<u8> {
        self.list.iter().find(|(at, kind)| kind.id() == id && self.hidden != Some(*at)).map(|(at, _)| *at)
    }

    /// Entries of the MSI-X table, 0 where a guest is offered none.
    pub fn msix(&self) -> u16 {
        let entries = |(at, kind): &(u8, Kind)| match kind {
            Kind::Msix { entries, .. } if self.hidden != Some(*at) => Some(*entries),
            _ => None,
        };
        self.list.iter().find_map(entries).unwrap_or(0)
    }

    /// Vectors of MSI, 0 where it has none.
    pub fn msi(&self) -> u32 {
        let vectors = |(_, kind): &(u8, Kind)| match kind {
            Kind::Msi(control) => Some(1 << (control >> 1 & 7)),
            _ => None,
        };
        self.list.iter().find_map(vectors).unwrap_or(0)
    }
}

const KEEPS_STATE: u16 = 0x0008;
/// Device Capabilities: function level reset.
const FLR: u32 = 1 << 28;

/// The network card of the report that this project began with (case 1).
pub const I210: Image = Image {
    name: "Intel I210",
    ids: (0x8086, 0x1533),
    class: 0x0200_0003,
    subsystem: (0xffff, 0x0000),
    bases: &[
        base(0, Space::Memory, 0x7200_0000, 0x10_0000),
        base(2, Space::Io, 0x1000, 0x20),
        base(3, Space::Memory, 0x7220_0000, 0x4000),
    ],
    list: &[
        (0x40, Kind::Power { pmc: 0xc823, pmcsr: 0x2000 | KEEPS_STATE }),
        (0x50, Kind::Msi(0x0180)),
        (0x70, Kind::Msix { entries: 5, table: (3, 0), pending: (3, 0x2000) }),
        (0xa0, Kind::Express(0x0002, FLR | 0x8cc2)),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x03)],
    reset: "flr",
    ..Image::PLAIN
};

/// Network card with virtual functions, physical function 0 (case 65, and dump of that name).
pub const I82576: Image = Image {
    name: "Intel 82576",
    ids: (0x8086, 0x10c9),
    class: 0x0200_0001,
    subsystem: (0x8086, 0xa03c),
    header: 0x80,
    bases: &[
        base(0, Space::Memory, 0xe080_0000, 0x2_0000),
        base(1, Space::Memory, 0xe000_0000, 0x40_0000),
        base(2, Space::Io, 0x1020, 0x20),
        base(3, Space::Memory, 0xe084_0000, 0x4000),
    ],
    rom: Some((0xc780_0000, 0x40_0000)),
    list: &[
        (0x40, Kind::Power { pmc: 0xc823, pmcsr: 0x2000 }),
        (0x50, Kind::Msi(0x0180)),
        (0x70, Kind::Msix { entries: 10, table: (3, 0), pending: (3, 0x2000) }),
        (0xa0, Kind::Express(0x0002, FLR | 0x8cc2)),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x03), (0x150, 0x0e), (0x160, 0x10)],
    reset: "flr",
    ..Image::PLAIN
};

/// Storage controller whose list goes up and down (cases 31, 52, 65).
pub const SAS2008: Image = Image {
    name: "LSI SAS2008",
    ids: (0x1000, 0x0072),
    class: 0x0107_0002,
    subsystem: (0x1000, 0x3060),
    bases: &[
        base(0, Space::Io, 0xb000, 0x100),
        base(1, Space::Wide, 0xf9ff_c000, 0x4000),
        base(3, Space::Wide, 0xf9f8_0000, 0x4_0000),
    ],
    rom: Some((0xf9f0_0000, 0x8_0000)),
    list: &[
        (0x50, Kind::Power { pmc: 0x0603, pmcsr: KEEPS_STATE }),
        (0x68, Kind::Express(0x0002, FLR | 0x8025)),
        (0xd0, Kind::Vpd),
        (0xa8, Kind::Msi(0x0080)),
        (0xc0, Kind::Msix { entries: 15, table: (1, 0x2000), pending: (1, 0x3800) }),
    ],
    extended: &[(0x100, 0x01), (0x138, 0x04)],
    reset: "flr",
    ..Image::PLAIN
};

/// Wifi card: eight MSI vectors with mask bits and a 32-bit address.
pub const QCA988X: Image = Image {
    name: "Atheros QCA988x",
    ids: (0x168c, 0x003c),
    class: 0x0280_0000,
    bases: &[base(0, Space::Wide, 0x8000_0000, 0x20_0000)],
    list: &[
        (0x40, Kind::Power { pmc: 0x07c2, pmcsr: 0 }),
        (0x50, Kind::Msi(0x0106)),
        (0x70, Kind::Express(0x0002, 0x003c_8dc1)),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x02), (0x160, 0x03)],
    reset: "pm",
    ..Image::PLAIN
};

/// Wifi card: four MSI vectors with mask bits and a 64-bit address.
pub const AR93XX: Image = Image {
    name: "Atheros AR93xx",
    ids: (0x168c, 0x0030),
    class: 0x0280_0001,
    subsystem: (0x168c, 0x3114),
    bases: &[base(0, Space::Wide, 0xa000_0000, 0x2_0000)],
    list: &[
        (0x40, Kind::Power { pmc: 0x5bc3, pmcsr: 0 }),
        (0x50, Kind::Msi(0x0184)),
        (0x70, Kind::Express(0x0002, 0x003c_8700)),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x02), (0x300, 0x03)],
    reset: "pm",
    ..Image::PLAIN
};

/// Wifi card whose MSI-X capability lies on its registers (case 15).
pub const AR928X: Image = Image {
    name: "Atheros AR928x",
    ids: (0x168c, 0x002a),
    class: 0x0280_0001,
    subsystem: (0x168c, 0x0203),
    bases: &[base(0, Space::Wide, 0xa100_0000, 0x1_0000)],
    list: &[
        (0x40, Kind::Power { pmc: 0x5bc2, pmcsr: 0 }),
        (0x50, Kind::Msi(0x0000)),
        (0x60, Kind::Express(0x0011, 0x0090_8701)),
        (0x90, Kind::Msix { entries: 1, table: (0, 0), pending: (0, 0) }),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x02)],
    hidden: Some(0x90),
    reset: "pm",
    ..Image::PLAIN
};

/// Network card with a 64-bit address in base address registers 2 and 4.
pub const RTL8168_02: Image = Image {
    name: "Realtek 8168, revision 2",
    ids: (0x10ec, 0x8168),
    class: 0x0200_0002,
    subsystem: (0x1043, 0x8367),
    bases: &[
        base(0, Space::Io, 0xd800, 0x100),
        base(2, Space::Wide, 0xfbdf_f000, 0x1000),
        base(4, Space::WidePrefetch, 0xf8df_0000, 0x1_0000),
    ],
    list: &[
        (0x40, Kind::Power { pmc: 0xffc3, pmcsr: KEEPS_STATE }),
        (0x50, Kind::Msi(0x0080)),
        (0x70, Kind::Express(0x0201, 0x0028_86c1)),
        (0xb0, Kind::Msix { entries: 2, table: (4, 0), pending: (4, 0x800) }),
        (0xd0, Kind::Vpd),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x02), (0x160, 0x03)],
    ..Image::PLAIN
};

/// The same kind with an upper half that looks like an I/O address (case 31).
pub const RTL8168_0C: Image = Image {
    name: "Realtek 8168, revision c",
    ids: (0x10ec, 0x8168),
    class: 0x0200_000c,
    subsystem: (0x10ec, 0x0123),
    bases: &[
        base(0, Space::Io, 0x4000, 0x100),
        base(2, Space::Wide, 0x7170_0000, 0x1000),
        base(4, Space::WidePrefetch, 0x9_0040_0000, 0x4000),
    ],
    list: &[
        (0x40, Kind::Power { pmc: 0xffc3, pmcsr: KEEPS_STATE }),
        (0x50, Kind::Msi(0x0080)),
        (0x70, Kind::Express(0x0202, 0x0064_8cc0)),
        (0xb0, Kind::Msix { entries: 4, table: (4, 0), pending: (4, 0x800) }),
        (0xd0, Kind::Vpd),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x02), (0x160, 0x03), (0x170, 0x18)],
    ..Image::PLAIN
};

/// Graphics in the processor; its list begins with a vendor's own capability.
pub const SKYLAKE: Image = Image {
    name: "Intel Skylake graphics",
    ids: (0x8086, 0x191e),
    class: 0x0300_0007,
    subsystem: (0x8086, 0x2212),
    bases: &[
        base(0, Space::Wide, 0xa000_0000, 0x100_0000),
        base(2, Space::WidePrefetch, 0x9000_0000, 0x1000_0000),
        base(4, Space::Io, 0x3000, 0x40),
    ],
    list: &[
        (0x40, Kind::Vendor(&[0x0c, 0x01, 0x85, 0x66, 0x61, 0x7a, 0xd4, 0x80, 0x15, 0x16])),
        (0x70, Kind::Express(0x0092, FLR | 0x8000)),
        (0xac, Kind::Msi(0x0000)),
        (0xd0, Kind::Power { pmc: 0x0022, pmcsr: 0 }),
    ],
    extended: &[(0x100, 0x1b), (0x200, 0x0f), (0x300, 0x13)],
    reset: "flr",
    ..Image::PLAIN
};

/// Graphics card, function 0 (case 37).
pub const GT218: Image = Image {
    name: "NVIDIA GT218",
    ids: (0x10de, 0x0a65),
    class: 0x0300_00a2,
    subsystem: (0x3842, 0x1312),
    header: 0x80,
    bases: &[
        base(0, Space::Memory, 0xfa00_0000, 0x100_0000),
        base(1, Space::WidePrefetch, 0xd000_0000, 0x1000_0000),
        base(3, Space::WidePrefetch, 0xce00_0000, 0x200_0000),
        base(5, Space::Io, 0xcc00, 0x80),
    ],
    rom: Some((0xfbc0_0000, 0x8_0000)),
    list: &[
        (0x60, Kind::Power { pmc: 0x0003, pmcsr: KEEPS_STATE }),
        (0x68, Kind::Msi(0x0080)),
        (0x78, Kind::Express(0x0002, 0x012c_8de0)),
        (0xb4, Kind::Vendor(&[0x14, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
    ],
    extended: &[(0x100, 0x02), (0x128, 0x04), (0x600, 0x0b)],
    ..Image::PLAIN
};

/// Its sound, function 1, on pin B.
pub const GT218_SOUND: Image = Image {
    name: "NVIDIA GT218, sound",
    ids: (0x10de, 0x0be3),
    class: 0x0403_00a1,
    subsystem: (0x3842, 0x1312),
    header: 0x80,
    pin: 2,
    bases: &[base(0, Space::Memory, 0xfbcf_c000, 0x4000)],
    list: &[
        (0x60, Kind::Power { pmc: 0x0003, pmcsr: KEEPS_STATE }),
        (0x68, Kind::Msi(0x0080)),
        (0x78, Kind::Express(0x0002, 0x012c_8da0)),
    ],
    ..Image::PLAIN
};

/// Graphics card with base addresses that can be resized, and a base address register after the I/O one.
pub const FIJI: Image = Image {
    name: "AMD Fiji",
    ids: (0x1002, 0x7300),
    class: 0x0300_00ca,
    subsystem: (0x1002, 0x0b36),
    header: 0x80,
    bases: &[
        base(0, Space::WidePrefetch, 0xe000_0000, 0x1000_0000),
        base(2, Space::WidePrefetch, 0xf000_0000, 0x20_0000),
        base(4, Space::Io, 0xe000, 0x100),
        base(5, Space::Memory, 0xfe80_0000, 0x4_0000),
    ],
    rom: Some((0xfe84_0000, 0x2_0000)),
    list: &[
        (0x48, Kind::Vendor(&[0x08, 0x00, 0x02, 0x10, 0x36, 0x0b])),
        (0x50, Kind::Power { pmc: 0xf603, pmcsr: KEEPS_STATE }),
        (0x58, Kind::Express(0x0012, 0x8fa1)),
        (0xa0, Kind::Msi(0x0080)),
    ],
    extended: &[
        (0x100, 0x0b),
        (0x150, 0x01),
        (0x200, 0x15),
        (0x270, 0x19),
        (0x2b0, 0x0f),
        (0x2c0, 0x13),
        (0x2d0, 0x1b),
        (0x328, 0x0e),
    ],
    ..Image::PLAIN
};

/// Drive with one vector more than a request can carry, and its pending bits before the table (case 10).
pub const PM174X: Image = Image {
    name: "Samsung PM174X",
    ids: (0x144d, 0xa826),
    class: 0x0108_0200,
    subsystem: (0x144d, 0xaa0a),
    bases: &[base(0, Space::Wide, 0x8840_0000, 0x8000)],
    list: &[
        (0x40, Kind::Power { pmc: 0x0013, pmcsr: KEEPS_STATE }),
        (0x70, Kind::Express(0x0002, FLR | 0xa0_8fe2)),
        (0xb0, Kind::Msix { entries: 129, table: (0, 0x4000), pending: (0, 0x3000) }),
    ],
    extended: &[
        (0x100, 0x01),
        (0x148, 0x03),
        (0x168, 0x0e),
        (0x178, 0x19),
        (0x198, 0x26),
        (0x1bc, 0x27),
        (0x1d4, 0x2a),
        (0x1f8, 0x10),
        (0x3c0, 0x25),
    ],
    reset: "flr",
    ..Image::PLAIN
};

/// Network card with 256 vectors (case 10).
pub const CX3: Image = Image {
    name: "Mellanox ConnectX-3 Pro",
    ids: (0x15b3, 0x1007),
    class: 0x0200_0000,
    subsystem: (0x15b3, 0x0006),
    bases: &[base(0, Space::Wide, 0xfb40_0000, 0x10_0000), base(2, Space::WidePrefetch, 0x38_0000_0000, 0x80_0000)],
    rom: Some((0xfb30_0000, 0x10_0000)),
    list: &[
        (0x40, Kind::Power { pmc: 0x0003, pmcsr: KEEPS_STATE }),
        (0x48, Kind::Vpd),
        (0x9c, Kind::Msix { entries: 256, table: (0, 0x7_c000), pending: (0, 0x7_d000) }),
        (0x60, Kind::Express(0x0002, FLR | 0x8d02)),
    ],
    extended: &[(0x100, 0x0e), (0x148, 0x03), (0x154, 0x01), (0x18c, 0x19)],
    reset: "flr",
    ..Image::PLAIN
};

/// USB controller without a reset (case 36).
pub const TUSB73X0: Image = Image {
    name: "TI TUSB73x0",
    ids: (0x104c, 0x8241),
    class: 0x0c03_3002,
    bases: &[base(0, Space::Wide, 0xc000_0000, 0x1_0000), base(2, Space::Wide, 0xc001_0000, 0x2000)],
    list: &[
        (0x40, Kind::Power { pmc: 0x7e03, pmcsr: KEEPS_STATE }),
        (0x48, Kind::Msi(0x0086)),
        (0x70, Kind::Express(0x0002, 0x003c_8fc3)),
        (0xc0, Kind::Msix { entries: 8, table: (2, 0), pending: (2, 0x1000) }),
    ],
    extended: &[(0x100, 0x01), (0x150, 0x03)],
    ..Image::PLAIN
};

/// USB controller of an older kind: one I/O address, and Advanced Features for a reset (case 35).
pub const ICH10: Image = Image {
    name: "Intel ICH10 UHCI",
    ids: (0x8086, 0x3a34),
    class: 0x0c03_0000,
    subsystem: (0x8086, 0x4f53),
    header: 0x80,
    bases: &[base(4, Space::Io, 0x2080, 0x20)],
    list: &[(0x50, Kind::Advanced)],
    reset: "af",
    ..Image::PLAIN
};

/// Wifi card whose list begins at its end.
pub const WIFI_7265: Image = Image {
    name: "Intel 7265",
    ids: (0x8086, 0x095a),
    class: 0x0280_0061,
    subsystem: (0x8086, 0x5010),
    bases: &[base(0, Space::Wide, 0xd100_0000, 0x2000)],
    list: &[
        (0xc8, Kind::Power { pmc: 0xc823, pmcsr: 0 }),
        (0xd0, Kind::Msi(0x0080)),
        (0x40, Kind::Express(0x0002, FLR | 0x8ec0)),
    ],
    extended: &[(0x100, 0x01), (0x140, 0x03), (0x14c, 0x18), (0x154, 0x1e)],
    reset: "flr",
    ..Image::PLAIN
};

/// Wifi card of the trace (case 18).
pub const AX200: Image = Image {
    name: "Intel AX200",
    ids: (0x8086, 0x2723),
    class: 0x0280_001a,
    subsystem: (0x8086, 0x0084),
    bases: &[base(0, Space::Wide, 0xce10_0000, 0x4000)],
    list: &[
        (0xc8, Kind::Power { pmc: 0xc823, pmcsr: KEEPS_STATE }),
        (0xd0, Kind::Msi(0x0080)),
        (0x40, Kind::Express(0x0002, FLR | 0x8ec0)),
    ],
    extended: &[(0x100, 0x01), (0x14c, 0x18)],
    reset: "flr",
    ..Image::PLAIN
};

/// Wifi card with registers beside its MSI-X table (case 16).
pub const AX210: Image = Image {
    name: "Intel AX210",
    ids: (0x8086, 0x2725),
    class: 0x0280_001a,
    subsystem: (0x8086, 0x0024),
    bases: &[base(0, Space::Wide, 0xce20_0000, 0x4000)],
    list: &[
        (0xc8, Kind::Power { pmc: 0xc823, pmcsr: KEEPS_STATE }),
        (0xd0, Kind::Msi(0x0080)),
        (0x40, Kind::Express(0x0002, FLR | 0x8ec0)),
        (0x80, Kind::Msix { entries: 16, table: (0, 0x2000), pending: (0, 0x3000) }),
    ],
    extended: &[(0x100, 0x01), (0x14c, 0x18)],
    reset: "flr",
    ..Image::PLAIN
};

/// Network card whose addresses come from Enhanced Allocation (case 32): base address registers that read zero.
pub const THUNDERX: Image = Image {
    name: "Cavium ThunderX",
    ids: (0x177d, 0xa01e),
    class: 0x0200_0008,
    subsystem: (0x177d, 0xa11e),
    pin: 0,
    list: &[
        (0x40, Kind::Express(0x0002, 0)),
        (0x80, Kind::Msix { entries: 10, table: (4, 0), pending: (4, 0xf_0000) }),
        (
            0x98,
            Kind::Allocation(&[
                (0, 0x8430_0000_0000, 0x3fff_fffc),
                (4, 0x8430_6000_0000, 0x000f_fffc),
                (9, 0x8430_a000_0000, 0x001f_fffc),
                (13, 0x8430_e000_0000, 0x001f_fffc),
            ]),
        ),
    ],
    extended: &[(0x100, 0x0e), (0x108, 0x0b), (0x180, 0x10)],
    hidden: Some(0x80),
    ..Image::PLAIN
};

/// Network card of drivers that want MSI-X or nothing (case 7).
pub const QCA8171: Image = Image {
    name: "Atheros QCA8171",
    ids: (0x1969, 0x10a1),
    class: 0x0200_0010,
    subsystem: (0x1849, 0x10a1),
    bases: &[base(0, Space::Wide, 0xdf40_0000, 0x4_0000), base(2, Space::Io, 0xd000, 0x80)],
    list: &[
        (0x40, Kind::Power { pmc: 0xf9c3, pmcsr: 0 }),
        (0x58, Kind::Express(0x0001, 0x0040_8da1)),
        (0xc0, Kind::Msi(0x0188)),
        (0xd8, Kind::Msix { entries: 16, table: (0, 0x2000), pending: (0, 0x3000) }),
    ],
    extended: &[(0x100, 0x01), (0x180, 0x03)],
    reset: "pm",
    ..Image::PLAIN
};

/// Storage controller whose ROM register reads ones while it is off (case 31).
pub const MARVELL: Image = Image {
    name: "Marvell 9170",
    ids: (0x1b4b, 0x9170),
    class: 0x0106_0112,
    subsystem: (0x1b4b, 0x9170),
    bases: &[
        base(0, Space::Io, 0xe040, 8),
        base(1, Space::Io, 0xe030, 4),
        base(2, Space::Io, 0xe020, 8),
        base(3, Space::Io, 0xe010, 4),
        base(4, Space::Io, 0xe000, 0x10),
        base(5, Space::Memory, 0xdf11_0000, 0x200),
    ],
    rom: Some((0xffff_0000, 0x1_0000)),
    list: &[
        (0x40, Kind::Power { pmc: 0x4003, pmcsr: KEEPS_STATE }),
        (0x50, Kind::Msi(0x0000)),
        (0x70, Kind::Express(0x0012, 0x9002)),
        (0xe0, Kind::Vendor(&[0x10])),
    ],
    extended: &[(0x100, 0x01)],
    ..Image::PLAIN
};

/// Network card of the PCI-X times, its list at the end of the space (case 22).
pub const I82546: Image = Image {
    name: "Intel 82546",
    ids: (0x8086, 0x10b5),
    class: 0x0200_0003,
    subsystem: (0x103c, 0x3109),
    header: 0x80,
    bases: &[base(0, Space::Wide, 0xfdfe_0000, 0x2_0000), base(4, Space::Io, 0x6000, 0x40)],
    list: &[(0xdc, Kind::Power { pmc: 0xc822, pmcsr: 0 }), (0xe4, Kind::PciX), (0xf0, Kind::Msi(0x0080))],
    reset: "pm",
    ..Image::PLAIN
};

/// All of them.
pub const ALL: [&Image; 23] = [
    &I210,
    &I82576,
    &SAS2008,
    &QCA988X,
    &AR93XX,
    &AR928X,
    &RTL8168_02,
    &RTL8168_0C,
    &SKYLAKE,
    &GT218,
    &GT218_SOUND,
    &FIJI,
    &PM174X,
    &CX3,
    &TUSB73X0,
    &ICH10,
    &WIFI_7265,
    &AX200,
    &AX210,
    &THUNDERX,
    &QCA8171,
    &MARVELL,
    &I82546,
];
