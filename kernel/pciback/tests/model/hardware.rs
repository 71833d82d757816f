//! One PCI function as hardware: which bits take a write, what a reset clears, and when it answers nothing.
//! Registers after PCI Local Bus 3.0 (6.1, 6.8), PCI Power Management 1.2 (3.2), PCI Express Base 5.0 (6.6.2,
//! 7.5.3) and the Advanced Features ECN.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use pciback::platform::{Nanos, Width};

pub const MS: Nanos = 1_000_000;

/// Where a card's capabilities are, if it has them.
pub mod at {
    pub const POWER: u16 = 0x40;
    pub const PMCSR: u16 = POWER + 4;
    pub const MSI: u16 = 0x50;
    pub const MSI_CONTROL: u16 = MSI + 2;
    pub const MSIX: u16 = 0x70;
    pub const MSIX_CONTROL: u16 = MSIX + 2;
    pub const EXPRESS: u16 = 0xa0;
    pub const DEVICE_CONTROL: u16 = EXPRESS + 8;
    pub const DEVICE_STATUS: u16 = EXPRESS + 10;
    pub const ADVANCED: u16 = 0xe0;
    pub const COMMAND: u16 = 4;
}

pub const ENABLE: u16 = 0x8000;
pub const MASKALL: u16 = 0x4000;
pub const MSI_ENABLE: u16 = 1;
pub const MEMORY: u16 = 2;
pub const MASTER: u16 = 4;
pub const INTX_DISABLE: u16 = 0x400;

/// Address of BAR 0, 16 KiB of memory.
pub const BAR0: u32 = 0xfebc_0000;
/// The `resource-N` node that fits every card: BAR 0, and 32 I/O ports at BAR 2.
const RESOURCES: &str = "0xfebc0000 0xfebc3fff 0x40200;0x0 0x0 0x0;0xc040 0xc05f 0x40101;0x0 0x0 0x0;\
                             0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0";

/// An MSI capability.
#[derive(Clone, Copy, Debug)]
pub struct MsiKind {
    /// 1 to 32, a power of two.
    pub vectors: u8,
    pub maskable: bool,
    pub wide: bool,
}

/// What a card has.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    pub vendor: u16,
    pub device: u16,
    /// Has an interrupt pin, and its switch in Command.
    pub pin: bool,
    pub msi: Option<MsiKind>,
    /// Entries of its MSI-X table; 0: it has none.
    pub msix: u16,
    /// Power management; whether it keeps its state on the way from D3hot to D0.
    pub power: Option<bool>,
    /// PCI Express; whether it has a function level reset.
    pub express: Option<bool>,
    /// Advanced Features with a function level reset.
    pub advanced: bool,
}

impl Card {
    /// A network card with 5 MSI-X vectors and no way to be reset.
    pub const PLAIN: Card = Card {
        vendor: 0x8086,
        device: 0x100e,
        pin: true,
        msi: None,
        msix: 5,
        power: None,
        express: None,
        advanced: false,
    };
    /// PCI Express with a function level reset, power management, MSI and MSI-X.
    pub const FULL: Card = Card { msi: Some(MSI), power: Some(true), express: Some(true), ..Card::PLAIN };
    /// MSI only: 4 vectors with mask bits.
    pub const MSI_ONLY: Card = Card { msi: Some(MSI), msix: 0, ..Card::PLAIN };
    /// MSI only: 1 vector without mask bits.
    pub const MSI_SIMPLE: Card = Card { msi: Some(MsiKind { vectors: 1, maskable: false, wide: false }), ..Card::BARE };
    /// MSI and MSI-X.
    pub const BOTH: Card = Card { msi: Some(MSI), ..Card::PLAIN };
    /// An interrupt pin and nothing else.
    pub const BARE: Card = Card { msix: 0, ..Card::PLAIN };

    pub fn build(self) -> Hardware {
        Builder::default().header(&self).capabilities(&self).hardware(&self)
    }
}

const MSI: MsiKind = MsiKind { vectors: 4, maskable: true, wide: true };

/// What a function says while it does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    Ones,
    /// "Request retry": the vendor register reads 0001.
    Retry,
}

/// Where the registers are that do something by themselves.
#[derive(Clone, Copy, Debug)]
struct Places {
    pmcsr: u16,
    express: u16,
    advanced: u16,
}

/// An entry of the MSI-X table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
}

pub struct Hardware {
    /// Vendor and device id of a virtual function, which shows none itself.
    given: Option<(u16, u16)>,
    /// The `resource-N` node that fits.
    pub resources: String,
    pub bytes: RefCell<Vec<u8>>,
    /// Bits that a write changes.
    takes: RefCell<Vec<u8>>,
    /// Bits that writing 1 clears.
    clears: Vec<u8>,
    /// Bits that a reset sets to those of `fresh`.
    volatile: Vec<u8>,
    fresh: Vec<u8>,
    flr: bool,
    af: bool,
    power: Option<bool>,
    places: Places,
    pub table: RefCell<Vec<Entry>>,
    silent: Cell<Option<(Nanos, Silence)>>,
    /// For how long, and how, it answers nothing after a reset.
    pub recovery: Cell<(Nanos, Silence)>,
    /// Its transactions are pending until then.
    pub pending: Cell<Nanos>,
    pub resets: Cell<u32>,
    /// Its own resets are accepted and change nothing, as with the e1000e that QEMU 7.2 emulates.
    pub unresettable: Cell<bool>,
    /// It stops to answer, for this long, with the read after so many more.
    pub going: Cell<Option<(u32, Nanos)>>,
    /// What happens to it when it is woken from D3hot.
    pub on_waking: RefCell<Option<Box<dyn FnMut()>>>,
    /// How many of the next writes to a register get lost on the way.
    pub losing: RefCell<BTreeMap<u16, u32>>,
    /// It is behind a virtual PCI layer of Xen's, which lets no address through while memory decode was written on:
    /// Command as it was last written.
    pub layer: Cell<Option<u16>>,
    /// What the driver domain wrote.
    pub writes: RefCell<Vec<(u16, u32)>>,
    /// Accesses to the table while the function did not decode its address: a host with firmware-first error
    /// handling may not survive one.
    pub unanswered: Cell<u32>,
}

impl Hardware {
    /// [`Card::PLAIN`] with other ids.
    pub fn card(vendor: u16, device: u16) -> Hardware {
        Card { vendor, device, ..Card::PLAIN }.build()
    }

    /// A virtual function: [`Card::FULL`] without ids, pin and addresses of its own, and only one bit of Command (SR-IOV
    /// 1.1, 3.4.1). Its memory is decoded as long as the physical function says so, which is always here.
    pub fn virtual_function(vendor: u16, device: u16) -> Hardware {
        let mut card = Card { pin: false, ..Card::FULL }.build();
        card.given = Some((vendor, device));
        for (at, bytes, takes) in
            [(0x00, 4, 0), (0x04, 2, u32::from(MASTER)), (0x10, 24, 0), (0x30, 4, 0), (0x3c, 2, 0)]
        {
            let held = if at == 0 { 0xff } else { 0 };
            let range = at..at + bytes;
            card.bytes.borrow_mut()[range.clone()].fill(held);
            card.takes.borrow_mut()[range].copy_from_slice(&takes.to_le_bytes().repeat(6)[..bytes]);
        }
        card.volatile = card.takes.borrow().clone();
        card.resources = RESOURCES.replace("0xc040 0xc05f 0x40101", "0x0 0x0 0x0");
        card
    }

    /// A function with these bytes, as `lspci -xxx` shows them, and ordinary hardware behind them; sizes of its
    /// BARs are made up.
    pub fn from_image(image: &[u8]) -> Hardware {
        Builder::from_image(image)
    }

    /// Vendor and device id as toolstacks write them.
    pub fn ids(&self) -> String {
        let (vendor, device) = self.given.unwrap_or((self.word(0), self.word(2)));
        format!("{vendor:04x}:{device:04x}")
    }

    pub fn is_virtual(&self) -> bool {
        self.given.is_some()
    }

    /// Whether it answers at its addresses.
    pub fn decodes(&self) -> bool {
        self.is_virtual() || self.word(at::COMMAND) & MEMORY != 0
    }

    /// A register as it is, answering or not.
    pub fn word(&self, at: u16) -> u16 {
        let at = usize::from(at);
        u16::from_le_bytes(self.bytes.borrow()[at..at + 2].try_into().unwrap())
    }

    /// Somebody else writes the register: dom0's `setpci`, firmware, the function itself.
    pub fn set_word(&self, at: u16, value: u16) {
        self.bytes.borrow_mut()[usize::from(at)..][..2].copy_from_slice(&value.to_le_bytes());
    }

    /// It does not answer any more.
    pub fn vanish(&self) {
        self.fall_silent(Silence::Ones);
    }

    /// It does not answer any more, in this way.
    pub fn fall_silent(&self, how: Silence) {
        self.silent.set(Some((Nanos::MAX, how)));
    }

    /// It reads as ones until then.
    pub fn fall_silent_until(&self, until: Nanos) {
        self.silent.set(Some((until, Silence::Ones)));
    }

    /// It answers again, as it was.
    pub fn come_back(&self) {
        self.silent.set(None);
    }

    /// From now on these registers take no write.
    pub fn lock(&self, range: std::ops::Range<usize>) {
        self.takes.borrow_mut()[range].fill(0);
    }

    /// From now on these registers take every write.
    pub fn open(&self, range: std::ops::Range<usize>) {
        self.takes.borrow_mut()[range].fill(0xff);
    }

    /// The same function with these resources: the node, and which bits of its six base address registers and the
    /// ROM's take a write, before a reset and after it.
    pub fn with_bars(mut self, resources: String, takes: [u32; 7]) -> Hardware {
        self.resources = resources;
        for (index, takes) in takes.into_iter().enumerate() {
            let at = if index == 6 { 0x30 } else { 0x10 + 4 * index };
            self.takes.borrow_mut()[at..at + 4].copy_from_slice(&takes.to_le_bytes());
            self.volatile[at..at + 4].copy_from_slice(&takes.to_le_bytes());
        }
        self
    }

    pub fn silence(&self, now: Nanos) -> Option<Silence> {
        self.silent.get().filter(|(until, _)| now < *until).map(|(_, how)| how)
    }

    pub fn read(&self, now: Nanos, at: u16, width: Width) -> u32 {
        match self.going.get() {
            Some((0, time)) => {
                self.going.set(None);
                self.fall_silent_until(now.saturating_add(time));
            }
            Some((left, time)) => self.going.set(Some((left - 1, time))),
            None => {}
        }
        match self.silence(now) {
            Some(Silence::Ones) => return width.mask(),
            Some(Silence::Retry) => return if at == 0 { 0xffff_0001 & width.mask() } else { width.mask() },
            None => {}
        }
        let busy = now < self.pending.get();
        let byte = |at: u16| {
            let busy = match at {
                _ if self.flr && at == self.places.express + 10 => u8::from(busy) << 5,
                _ if self.af && at == self.places.advanced + 5 => u8::from(busy),
                _ => 0,
            };
            self.bytes.borrow()[usize::from(at)] | busy
        };
        (at..at + width.bytes()).rev().fold(0, |value, at| value << 8 | u32::from(byte(at)))
    }

    pub fn write(&self, now: Nanos, at: u16, width: Width, value: u32) {
        if self.silence(now).is_some() {
            return;
        }
        if let Some(left) = self.losing.borrow_mut().get_mut(&at).filter(|left| **left > 0) {
            *left -= 1;
            return;
        }
        match (at, self.layer.get()) {
            (at::COMMAND, Some(_)) => self.layer.set(Some(value as u16)),
            (0x10..0x28, Some(written)) if written & MEMORY != 0 => return,
            _ => {}
        }
        let asleep = self.state() == 3;
        let mut resets = false;
        for (at, byte) in (at..at + width.bytes()).zip(value.to_le_bytes()) {
            let takes = self.takes.borrow()[usize::from(at)];
            let mut bytes = self.bytes.borrow_mut();
            let held = &mut bytes[usize::from(at)];
            *held = (*held & !takes | byte & takes) & !(byte & self.clears[usize::from(at)]);
            resets |= self.flr && at == self.places.express + 9 && byte & 0x80 != 0;
            resets |= self.af && at == self.places.advanced + 4 && byte & 1 != 0;
        }
        if asleep && self.state() == 0 {
            self.on_waking.borrow_mut().iter_mut().for_each(|act| act());
        }
        if self.unresettable.get() {
            return;
        }
        if resets {
            self.reset(now, self.recovery.get());
        } else if asleep && self.state() == 0 && self.power == Some(false) {
            self.reset(now, (10 * MS, Silence::Ones));
        }
    }

    /// The power state.
    fn state(&self) -> u8 {
        if self.power.is_some() { self.bytes.borrow()[usize::from(self.places.pmcsr)] & 3 } else { 0 }
    }

    /// What any reset does, also one that nobody here asked for.
    pub fn reset(&self, now: Nanos, recovery: (Nanos, Silence)) {
        self.resets.set(self.resets.get() + 1);
        for (at, byte) in self.bytes.borrow_mut().iter_mut().enumerate() {
            *byte = *byte & !self.volatile[at] | self.fresh[at] & self.volatile[at];
        }
        self.table.borrow_mut().fill(Entry { masked: true, ..Entry::default() });
        self.pending.set(0);
        self.silent.set(Some((now.saturating_add(recovery.0), recovery.1)));
    }

    /// Xen changes an entry of the table.
    pub fn table_write(&self, now: Nanos, entry: u16, change: impl FnOnce(&mut Entry)) {
        if self.silence(now).is_some() || !self.decodes() || self.state() != 0 {
            self.unanswered.set(self.unanswered.get() + 1);
            return;
        }
        change(&mut self.table.borrow_mut()[usize::from(entry)]);
    }

    /// Whether the function's event for this MSI-X vector becomes an interrupt.
    pub fn delivers(&self, entry: u16) -> bool {
        let entry = self.table.borrow()[usize::from(entry)];
        let control = self.capability(0x11).map_or(0, |at| self.word(at + 2)) & (ENABLE | MASKALL);
        control == ENABLE && !entry.masked && entry.address != 0 && self.word(at::COMMAND) & MASTER != 0
    }

    /// Whether its event for an MSI vector becomes an interrupt.
    pub fn delivers_msi(&self, vector: u8) -> bool {
        let Some(at) = self.capability(0x05) else { return false };
        let control = self.word(at + 2);
        let mask_at = at + if control & 0x80 != 0 { 0x10 } else { 0x0c };
        let masked = control & 0x100 != 0 && self.word(mask_at + u16::from(vector / 16) * 2) >> (vector % 16) & 1 != 0;
        let given = 1 << (control >> 4 & 7);
        control & MSI_ENABLE != 0 && !masked && vector < given && self.word(at::COMMAND) & MASTER != 0
    }

    /// The first capability with this id, as Xen finds it.
    pub fn capability(&self, id: u8) -> Option<u16> {
        let bytes = self.bytes.borrow();
        let mut at = usize::from(bytes[0x34] & 0xfc);
        for _ in 0..48 {
            match at {
                0..0x40 => return None,
                _ if bytes[at] == id => return Some(at as u16),
                _ => at = usize::from(bytes[at + 1] & 0xfc),
            }
        }
        None
    }
}

/// Where two images differ, and how.
pub fn differences(left: &[u8], right: &[u8]) -> Vec<(usize, u8, u8)> {
    let pairs = left.iter().zip(right).enumerate();
    pairs.filter(|(_, (left, right))| left != right).map(|(at, (left, right))| (at, *left, *right)).collect()
}

/// Registers on their way to a [`Hardware`].
struct Builder {
    held: Vec<u8>,
    takes: Vec<u8>,
    clears: Vec<u8>,
    fresh: Vec<u8>,
    places: Places,
}

impl Default for Builder {
    fn default() -> Builder {
        let [held, mut takes, clears, fresh] = [(); 4].map(|()| vec![0; 4096]);
        // What is no capability is a vendor's own registers.
        takes[0x40..0x100].fill(0xff);
        let places = Places { pmcsr: at::PMCSR, express: at::EXPRESS, advanced: at::ADVANCED };
        Builder { held, takes, clears, fresh, places }
    }
}

impl Builder {
    /// A register of `bytes` bytes: what software left in it, the bits that take a write, and what a reset sets
    /// these to.
    fn put(&mut self, at: u16, bytes: usize, held: u32, takes: u32, fresh: u32) {
        let range = usize::from(at)..usize::from(at) + bytes;
        self.held[range.clone()].copy_from_slice(&held.to_le_bytes()[..bytes]);
        self.takes[range.clone()].copy_from_slice(&takes.to_le_bytes()[..bytes]);
        self.fresh[range].copy_from_slice(&fresh.to_le_bytes()[..bytes]);
    }

    fn header(mut self, card: &Card) -> Builder {
        self.put(0x00, 2, card.vendor.into(), 0, 0);
        self.put(0x02, 2, card.device.into(), 0, 0);
        let switch = if card.pin { u32::from(INTX_DISABLE) } else { 0 };
        self.put(0x04, 2, 0x0003 | switch, 0x03ff | switch, 0);
        self.put(0x06, 2, 0x0010, 0, 0);
        self.clears[0x07] = 0xf9;
        self.put(0x08, 4, 0x0200_0003, 0, 0);
        self.put(0x0c, 1, 0x10, 0xff, 0);
        self.put(0x0d, 1, 0x00, 0xff, 0);
        self.put(0x10, 4, BAR0, 0xffff_c000, 0);
        self.put(0x18, 4, 0xc041, 0xffff_ffe0, 0);
        self.put(0x3c, 1, 11, 0xff, 0);
        self.put(0x3d, 1, card.pin.into(), 0, 0);
        self
    }

    fn capabilities(mut self, card: &Card) -> Builder {
        let list = [
            (card.power.is_some(), at::POWER, 0x01),
            (card.msi.is_some(), at::MSI, 0x05),
            (card.msix > 0, at::MSIX, 0x11),
            (card.express.is_some(), at::EXPRESS, 0x10),
            (card.advanced, at::ADVANCED, 0x13),
        ];
        let mut pointer = 0x34;
        for (_, at, id) in list.into_iter().filter(|(has, ..)| *has) {
            self.put(pointer, 1, at.into(), 0, 0);
            self.put(at, 2, id, 0, 0);
            pointer = at + 1;
        }
        if let Some(keeps) = card.power {
            self.put(at::POWER + 2, 2, 0xc803, 0, 0);
            self.put(at::PMCSR, 4, u32::from(keeps) << 3, 0x1f03, 0);
            self.clears[usize::from(at::PMCSR) + 1] = 0x80;
        }
        if let Some(msi) = card.msi {
            let wide = u32::from(msi.wide);
            let control = msi.vectors.trailing_zeros() << 1 | wide << 7 | u32::from(msi.maskable) << 8;
            self.put(at::MSI_CONTROL, 2, control, 0x0071, 0);
            self.put(at::MSI + 4, 4, 0, 0xffff_fffc, 0);
            let data = at::MSI + if msi.wide { 12 } else { 8 };
            if msi.wide {
                self.put(at::MSI + 8, 4, 0, u32::MAX, 0);
            }
            self.put(data, 4, 0, 0xffff, 0);
            if msi.maskable {
                self.put(data + 4, 4, 0, u32::MAX >> (32 - msi.vectors), 0);
                self.put(data + 8, 4, 0, 0, 0);
            }
        }
        if card.msix > 0 {
            self.put(at::MSIX_CONTROL, 2, u32::from(card.msix) - 1, 0xc000, 0);
            self.put(at::MSIX + 4, 4, 0x2000, 0, 0);
            self.put(at::MSIX + 8, 4, 0x3000, 0, 0);
        }
        if let Some(flr) = card.express {
            self.express(flr);
        }
        if card.advanced {
            self.put(at::ADVANCED + 2, 2, 0x0306, 0, 0);
            // The bit that resets reads as 0.
            self.put(at::ADVANCED + 4, 2, 0, 0, 0);
        }
        self
    }

    fn express(&mut self, flr: bool) {
        self.put(at::EXPRESS + 2, 2, 0x0002, 0, 0);
        self.put(at::EXPRESS + 4, 4, u32::from(flr) << 28, 0, 0);
        self.put(at::DEVICE_CONTROL, 2, 0x2930, 0x7fff, 0x2810);
        self.put(at::DEVICE_STATUS, 2, 0, 0, 0);
        self.clears[usize::from(at::DEVICE_STATUS)] = 0x0f;
        self.put(at::EXPRESS + 0x10, 2, 0x0142, 0x01ff, 0x0000);
        self.put(at::EXPRESS + 0x28, 2, 0x0405, 0x07ff, 0x0000);
        self.put(at::EXPRESS + 0x30, 2, 0x0003, 0x000f, 0x0002);
        // Advanced error reporting, access control, latency tolerance.
        self.put(0x100, 4, 0x1402_0001, 0, 0);
        self.put(0x108, 4, 0x0010_0000, 0x07ff_f030, 0);
        self.put(0x10c, 4, 0x0046_2030, 0x07ff_f030, 0x0046_2030);
        self.put(0x114, 4, 0x0000_2000, 0x0000_f1c1, 0);
        self.put(0x140, 4, 0x1501_000d, 0, 0);
        self.put(0x146, 2, 0x001d, 0x007f, 0);
        self.put(0x150, 4, 0x0001_0018, 0, 0);
        self.put(0x154, 4, 0x1003_1003, 0x1fff_1fff, 0);
    }

    fn from_image(image: &[u8]) -> Hardware {
        let mut builder = Builder::default();
        builder.held[..image.len()].copy_from_slice(image);
        builder.takes[0x04..0x06].copy_from_slice(&[0xff, 0x07]);
        builder.clears[0x07] = 0xf9;
        builder.takes[0x0c..0x0e].fill(0xff);
        builder.takes[0x10..0x28].fill(0xff);
        builder.takes[0x30..0x34].fill(0xff);
        builder.takes[0x3c] = 0xff;
        let held = builder.held.clone();
        let word = |at: usize| u16::from_le_bytes(held[at..at + 2].try_into().unwrap());
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let mut card = Card { pin: held[0x3d] != 0, msix: 0, ..Card::PLAIN };
        let mut at = usize::from(held[0x34] & 0xfc);
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            builder.behave(at, &mut card);
            at = usize::from(held[at + 1] & 0xfc);
        }
        // What no list leads to works all the same.
        if held[0xe0] == 0x13 && held[0xe2..0xe4] == [0x06, 0x03] {
            builder.behave(0xe0, &mut card);
        }
        let mut resources = vec!["0x0 0x0 0x0".to_string(); 7];
        let mut index = 0;
        while index < 6 {
            let at = 0x10 + 4 * index;
            let (io, wide) = (held[at] & 1 != 0, held[at] & 7 == 4);
            let upper = if wide && index < 5 { u64::from(dword(at + 4)) << 32 } else { 0 };
            let start = u64::from(dword(at) & if io { !3 } else { !0xf }) | upper;
            if start != 0 {
                let size = 1u64 << start.trailing_zeros().min(if io { 8 } else { 20 });
                let flags = if io { 0x101 } else { 0x200 | if wide { 0x10_0004 } else { 0 } };
                resources[index] = format!("{start:#x} {:#x} {flags:#x}", start + size - 1);
            }
            index += if wide { 2 } else { 1 };
        }
        let hardware = builder.hardware(&card);
        Hardware { resources: resources.join(";"), ..hardware }
    }

    /// Gives the capability at `at` the behaviour of its kind. What a kind does not say is a vendor's own.
    fn behave(&mut self, at: usize, card: &mut Card) {
        let word = |at: usize| u16::from_le_bytes(self.held[at..at + 2].try_into().unwrap());
        let mut set = |offset: usize, takes: &[u8]| self.takes[at + offset..][..takes.len()].copy_from_slice(takes);
        set(0, &[0; 4]);
        match self.held[at] {
            0x01 => {
                set(4, &[0x03, 0x1f, 0, 0]);
                self.clears[at + 5] = 0x80;
                self.places.pmcsr = at as u16 + 4;
                card.power = Some(word(at + 4) & 8 != 0);
            }
            0x03 => set(2, &[0xff, 0xff]),
            0x05 => set(2, &[0x71, 0]),
            0x10 => {
                set(4, &[0, 0, 0, 0, 0xff, 0x7f, 0, 0, 0, 0, 0, 0]);
                self.clears[at + 10] = 0x0f;
                self.places.express = at as u16;
                card.express = Some(word(at + 6) & 1 << 12 != 0);
            }
            0x11 => {
                set(3, &[0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
                card.msix = (word(at + 2) & 0x7ff) + 1;
            }
            0x13 => {
                set(4, &[0, 0]);
                self.places.advanced = at as u16;
                card.advanced = self.held[at + 3] & 3 == 3;
            }
            _ => {}
        }
    }

    fn hardware(self, card: &Card) -> Hardware {
        let Builder { held, takes, clears, fresh, places } = self;
        let volatile = takes.clone();
        Hardware {
            given: None,
            resources: RESOURCES.into(),
            bytes: RefCell::new(held),
            takes: RefCell::new(takes),
            clears,
            volatile,
            fresh,
            flr: card.express == Some(true),
            af: card.advanced,
            power: card.power,
            places,
            table: RefCell::new(vec![Entry { masked: true, ..Entry::default() }; usize::from(card.msix)]),
            silent: Cell::new(None),
            unresettable: Cell::new(false),
            recovery: Cell::new((100 * MS, Silence::Ones)),
            pending: Cell::new(0),
            resets: Cell::new(0),
            going: Cell::new(None),
            on_waking: RefCell::default(),
            losing: RefCell::default(),
            layer: Cell::new(None),
            writes: RefCell::default(),
            unanswered: Cell::new(0),
        }
    }
}
