//! The image of a function: what software had set in it when it was seized, and what a reset takes away.
//!
//! It is taken only of a function that answers, so that all ones are never saved, and restored in an order in which no
//! register begins to act before those that it relies on are there. Message interrupts are not in it: they are off
//! between guests, and Xen's. Registers: PCI Local Bus 3.0, 6.1; PCI Express Base 5.0, 7.5.3, 7.8 and 7.9.

use alloc::vec::Vec;
use core::fmt;

use crate::config::registers::{EXTENDED, SPACE, capability, command, express, offset, power};
use crate::config::{Name, VirtualConfig};
use crate::platform::{ConfigSpace, Width};
use crate::sbdf::Sbdf;

/// One register of an image.
#[derive(Clone, Copy, Debug)]
struct Saved {
    name: &'static str,
    at: u16,
    width: Width,
    value: u32,
    /// Without it the function cannot be used.
    vital: bool,
}

impl Saved {
    fn read<C: ConfigSpace>(&self, hardware: &C) -> u32 {
        hardware.read(self.at, self.width) & self.width.mask()
    }

    /// Whether the function has this value, as far as it can.
    fn is_held(&self, read: u32) -> bool {
        // A function without a pin need not implement its switch.
        let optional = if self.at == offset::COMMAND { u32::from(command::INTX_DISABLE) } else { 0 };
        (read ^ self.value) & !optional == 0
    }

    const fn lost(&self, read: u32) -> Lost {
        Lost { name: self.name, at: self.at, value: self.value, read }
    }

    const fn is_bar(&self) -> bool {
        self.at >= offset::BAR0 && self.at < offset::BAR0 + 24
    }
}

/// A register that did not take its value back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    name: &'static str,
    at: u16,
    value: u32,
    read: u32,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lost { name, at, value, read } = self;
        write!(f, "{name} at {at:#x} does not take back {value:#x}, it reads {read:#x}")
    }
}

/// What software set in a function before it was seized, and what a reset takes away.
#[derive(Debug)]
pub struct Image {
    registers: Vec<Saved>,
    /// It was taken in another power state than D0: on its way there a function may lose what it holds, and in it a
    /// function may have lost that already.
    asleep: bool,
}

/// Extended capabilities with registers that software sets: id, offset, width, name (PCI Express Base 5.0, 7.8
/// and 7.9).
const EXTENDED_REGISTERS: [(u16, u16, Width, &str); 7] = [
    (0x01, 0x08, Width::Dword, "AER uncorrectable mask"),
    (0x01, 0x0c, Width::Dword, "AER uncorrectable severity"),
    (0x01, 0x14, Width::Dword, "AER correctable mask"),
    (0x0d, 0x06, Width::Word, "ACS control"),
    (0x0f, 0x06, Width::Word, "ATS control"),
    (0x18, 0x04, Width::Word, "LTR snoop latency"),
    (0x18, 0x06, Width::Word, "LTR no-snoop latency"),
];

/// Most extended capabilities a list can hold: a dword each.
const MOST_EXTENDED: usize = ((SPACE - EXTENDED) / 4) as usize;

impl Image {
    /// Takes the image of a function; `None` if it does not answer, or goes meanwhile.
    pub fn take<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Option<Image> {
        let mut registers = Vec::new();
        let mut save = |name, at: u16, width: Width, vital| {
            registers.push(Saved { name, at, width, value: hardware.read(at, width) & width.mask(), vital });
        };
        if let Some(at) = config.capability(capability::EXPRESS) {
            for (register, name) in [
                (express::DEVICE_CONTROL, "Device Control"),
                (express::LINK_CONTROL, "Link Control"),
                (express::DEVICE_CONTROL_2, "Device Control 2"),
                (express::LINK_CONTROL_2, "Link Control 2"),
            ] {
                // A capability of version 1 ends before the second pair.
                let version = hardware.read(at + 2, Width::Word) & 0xf;
                let has = register < express::DEVICE_CONTROL_2 || version >= 2;
                if has && at + register + 2 <= EXTENDED {
                    save(name, at + register, Width::Word, false);
                }
            }
        }
        for (id, at) in if config.has_extended() { extended(hardware) } else { Vec::new() } {
            for (_, register, width, name) in EXTENDED_REGISTERS.iter().filter(|(of, ..)| *of == id) {
                if at + register + width.bytes() <= SPACE {
                    save(name, at + register, *width, false);
                }
            }
        }
        // What a guest may write, it must not leave to the next.
        for register in config.registers().filter(|register| matches!(register.name, Name::Opened { .. })) {
            if let Some(width) = Width::from_bytes(register.length.into()) {
                save("a register of quirk=", register.offset, width, false);
            }
        }
        for bar in 0..6 {
            save("a base address register", offset::BAR0 + 4 * bar, Width::Dword, true);
        }
        save("the ROM's base address register", offset::ROM, Width::Dword, false);
        save("cache line size", offset::CACHE_LINE, Width::Byte, false);
        save("latency timer", offset::LATENCY, Width::Byte, false);
        save("interrupt line", offset::INTERRUPT_LINE, Width::Byte, false);
        // Last, as decoding must not begin before the addresses are there.
        save("Command", offset::COMMAND, Width::Word, true);
        let asleep = config.power_control().is_some_and(|at| hardware.read(at, Width::Word) as u16 & power::STATE != 0);
        // What has gone, and come back meanwhile, has left ones where none can be.
        if registers.iter().any(|saved| saved.vital && saved.value == saved.width.mask()) {
            return None;
        }
        config.identity().check(hardware).ok()?;
        if let Some(saved) = registers.last_mut() {
            saved.value = saved.value & !u32::from(command::MASTER) | u32::from(command::INTX_DISABLE);
        }
        Some(Image { registers, asleep })
    }

    /// Whether another image, taken now that the function is awake, is better: this one was taken while it was not,
    /// and has no addresses.
    pub fn is_poor(&self) -> bool {
        self.asleep && !self.has_addresses()
    }

    /// Whether another image, taken later of a function that nobody has had, is no worse: it has no fewer addresses. dom0
    /// may have put them back; or a reset in between has taken them.
    pub fn may_become(&self, later: &Image) -> bool {
        later.addresses().count() >= self.addresses().count()
    }

    /// Writes what differs, and once more what did not take it.
    ///
    /// # Errors
    /// The first register without which the function can't be used that does not take its value. Those behind it were
    /// not written.
    pub fn restore<C: ConfigSpace>(&self, hardware: &mut C) -> Result<(), Lost> {
        // What a reset has turned off is written as off: below a dom0 of type PVH, Xen takes no address while memory decode
        // was *written* on, and a reset writes nothing (Jiqian Chen, xen-devel, November 2023).
        let held = hardware.read(offset::COMMAND, Width::Word) as u16;
        let moved = self.registers.iter().any(|saved| saved.is_bar() && saved.read(hardware) != saved.value);
        if moved && held & command::DECODE == 0 {
            let _ = hardware.write(offset::COMMAND, Width::Word, u32::from(held));
        }
        for saved in &self.registers {
            let mut read = saved.read(hardware);
            if read != saved.value {
                // Where the host forbids writes, the value read back tells.
                let _ = hardware.write(saved.at, saved.width, saved.value);
                read = saved.read(hardware);
            }
            if !saved.is_held(read) {
                // One that has just been reset may lose a write.
                let _ = hardware.write(saved.at, saved.width, saved.value);
                read = saved.read(hardware);
            }
            if saved.vital && !saved.is_held(read) {
                return Err(saved.lost(read));
            }
        }
        Ok(())
    }

    /// Says which registers have not come back, of those that are not vital.
    pub fn tell_lost<C: ConfigSpace>(&self, hardware: &C, sbdf: Sbdf) {
        for saved in &self.registers {
            let read = saved.read(hardware);
            if !saved.is_held(read) {
                log::warn!("{sbdf}: {}", saved.lost(read));
            }
        }
    }

    /// Whether it has any address: one that was taken after a reset which nobody restored has none.
    pub fn has_addresses(&self) -> bool {
        self.addresses().next().is_some()
    }

    /// The base address registers that hold an address.
    fn addresses(&self) -> impl Iterator<Item = &Saved> {
        self.registers.iter().filter(|saved| saved.is_bar() && saved.value & !0xf != 0)
    }

    /// Whether the function has its addresses.
    pub fn is_in_place<C: ConfigSpace>(&self, hardware: &C) -> bool {
        self.addresses().all(|saved| saved.read(hardware) == saved.value)
    }

    /// Gives a function that a guest has what it has lost, and `command` last. False if it does not take back what it
    /// needs.
    pub fn revive<C: ConfigSpace>(&self, hardware: &mut C, command: u16) -> bool {
        let mut whole = true;
        for saved in &self.registers {
            let Saved { at, width, vital, .. } = *saved;
            let value = if at == offset::COMMAND { u32::from(command) } else { saved.value };
            if saved.read(hardware) != value {
                // Where nothing can be written now, the value read back tells.
                let _ = hardware.write(at, width, value);
                whole &= !vital || saved.read(hardware) == value;
            }
        }
        whole
    }

    /// Whether a function still has its addresses after a reset. Every reset clears its base address registers (PCI
    /// Express Base 5.0, 6.6.2; for D3hot PCI Power Management 1.2, 5.4.1), so such a function was not reset.
    pub fn addresses_kept<C: ConfigSpace>(&self, hardware: &C) -> bool {
        self.has_addresses() && self.is_in_place(hardware)
    }
}

/// The extended capabilities: ids and offsets.
fn extended<C: ConfigSpace>(hardware: &C) -> Vec<(u16, u16)> {
    let mut found: Vec<(u16, u16)> = Vec::new();
    let mut at = EXTENDED;
    while found.len() < MOST_EXTENDED && at >= EXTENDED && !found.iter().any(|(_, seen)| *seen == at) {
        let header = hardware.read(at, Width::Dword);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((header as u16, at));
        at = (header >> 20) as u16 & !3;
    }
    found
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use std::vec;

    use super::*;
    use crate::platform::{Way, WritesOff};

    /// A function that is gone for some reads.
    struct Gone {
        bytes: Vec<u8>,
        reads: Cell<u32>,
        from: u32,
        to: u32,
    }

    impl ConfigSpace for Gone {
        fn read(&self, at: u16, width: Width) -> u32 {
            let number = self.reads.replace(self.reads.get() + 1);
            if (self.from..self.to).contains(&number) {
                return width.mask();
            }
            let bytes = self.bytes.iter().skip(at.into()).take(width.bytes().into());
            bytes.rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
        }
        fn write(&mut self, _: u16, _: Width, _: u32) -> Result<(), WritesOff> {
            Err(WritesOff)
        }
        fn writable(&self) -> bool {
            false
        }
        fn allow_writes(&mut self, _: Way) {}
    }

    /// Between any two reads, for however long.
    #[test]
    fn an_image_is_true_or_none() {
        let mut bytes = vec![0; 4096];
        bytes[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
        bytes[4..6].copy_from_slice(&[3, 4]);
        bytes[0x10..0x14].copy_from_slice(&0xfebc_0000u32.to_le_bytes());
        let mut function = Gone { bytes, reads: Cell::new(0), from: 0, to: 0 };
        let config = VirtualConfig::new(&function, None).expect("it answers");
        function.reads.set(0);
        let image = Image::take(&function, &config).expect("it answers");
        let vital = |image: &Image| -> Vec<u32> {
            image.registers.iter().filter(|saved| saved.vital).map(|saved| saved.value).collect()
        };
        let (reads, whole) = (function.reads.get(), vital(&image));
        for from in 0..reads {
            for to in from + 1..=reads {
                (function.from, function.to) = (from, to);
                function.reads.set(0);
                if let Some(image) = Image::take(&function, &config) {
                    assert_eq!(vital(&image), whole, "gone for the reads from {from} to before {to}");
                    assert_ne!(to, reads, "gone at its end");
                }
            }
        }
    }
}
