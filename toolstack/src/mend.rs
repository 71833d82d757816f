//! Puts back what a reset took from a function and nobody restored, because its driver domain died in between: the
//! addresses, which dom0 knows (sysfs `resource`), and the registers that dom0 had set when the function was taken from it.
//! The driver domain that comes next could only take the function as it finds it.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use pciback::config::registers::{EXTENDED, capability, command, express, offset};
use pciback::platform::Width;
use pciback::sbdf::Sbdf;

use crate::error::{Failure, Outcome};
use crate::nodes;
use crate::serve::rules::{Rules, capabilities, word};
use crate::sysfs::{Function, Sysfs};
use crate::xen::Store;

/// The registers that a reset takes away, besides the addresses, as text: `OFFSET:BYTES:VALUE`, hexadecimal, with spaces
/// between. `space` is what the configuration space reads.
pub fn registers(space: &[u8]) -> String {
    let byte = |at: u16| (at, Width::Byte, word(space, at) & 0xff);
    let mut found = vec![byte(offset::CACHE_LINE), byte(offset::LATENCY)];
    if let Some((_, at)) = capabilities(space).into_iter().find(|(id, _)| *id == capability::EXPRESS) {
        // A capability of version 1 ends before the second register.
        let second = (word(space, at + 2) & 0xf >= 2).then_some(express::DEVICE_CONTROL_2);
        let wanted = [Some(express::DEVICE_CONTROL), Some(express::LINK_CONTROL), second];
        let inside = wanted.into_iter().flatten().map(|register| at + register).filter(|at| *at + 2 <= EXTENDED);
        found.extend(inside.map(|at| (at, Width::Word, word(space, at))));
    }
    let text = found.iter().map(|(at, width, value)| format!("{at:x}:{}:{value:x}", width.bytes()));
    text.collect::<Vec<_>>().join(" ")
}

/// One of them.
fn parse(text: &str) -> Option<(u64, u64, u16)> {
    let mut parts = text.split(':');
    let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
    let (at, bytes, value) = (number()?, number()?, number()?);
    let sound = matches!(bytes, 1 | 2) && at + bytes <= u64::from(EXTENDED) && value < 1 << (8 * bytes);
    sound.then_some((at, bytes, value as u16))
}

/// Puts back what is missing, if the function answers. `kept` are the registers as [`registers`] wrote them. True if
/// anything was.
///
/// # Errors
/// The kernel's refusal, or that the function does not take its addresses.
pub fn put_back(space: &fs::File, rules: &Rules, kept: Option<&str>) -> io::Result<bool> {
    let read = |at: u16, width: Width| {
        let mut bytes = [0; 4];
        space.read_exact_at(bytes.get_mut(..usize::from(width.bytes()))?, at.into()).ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let Some(held) = read(offset::COMMAND, Width::Word).map(|held| held as u16).filter(|held| *held != u16::MAX) else {
        return Ok(false);
    };
    let in_place = rules.is_in_place(read);
    if in_place && held & rules.decode() == rules.decode() {
        return Ok(false);
    }
    let set = |value: u16| space.write_all_at(&value.to_le_bytes(), offset::COMMAND.into());
    if !in_place {
        // Nothing is decoded while half of an address stands there.
        set(held & !(command::IO | command::MEMORY | command::MASTER))?;
        for (at, _, address) in rules.addresses() {
            space.write_all_at(&address.to_le_bytes(), at.into())?;
        }
        for (at, bytes, value) in kept.unwrap_or_default().split(' ').filter_map(parse) {
            space.write_all_at(value.to_le_bytes().get(..bytes as usize).unwrap_or_default(), at)?;
        }
        if !rules.is_in_place(read) {
            return Err(io::Error::other("it does not take back its addresses; reset it, or power-cycle the host"));
        }
    }
    set(held & !command::MASTER | rules.decode())?;
    Ok(true)
}

/// The same for a function that no guest has. What does not answer is left alone.
///
/// # Errors
/// As [`put_back`].
pub fn mend(sysfs: &Sysfs, store: &dyn Store, function: &Function) -> Outcome<bool> {
    let sbdf = function.sbdf;
    let Some(rules) = Rules::new(function, &sysfs.config_space(sbdf)?) else { return Ok(false) };
    let mended = put_back(&sysfs.open_config(sbdf)?, &rules, record(store, sbdf).as_deref()).map_err(|error| {
        Failure::new(format!("{sbdf}: its registers cannot be put back: {error}"), "see dom0's kernel log (dmesg)")
    })?;
    if mended {
        eprintln!("xl-pciback: {sbdf}: it had lost addresses or their decoding, as after a reset: put back");
    }
    Ok(mended)
}

/// What was written down of a function when it was taken from dom0.
pub fn record(store: &dyn Store, sbdf: Sbdf) -> Option<String> {
    store.read(0, &nodes::record(sbdf, "registers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::rules::tests::function;

    /// What that function reads, with a PCI Express capability at 0x60.
    fn space() -> Vec<u8> {
        let mut space = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x86, 0x80, 0xd3, 0x10]);
        put(4, &[0x03, 0x04]);
        put(6, &[0x10, 0]);
        put(0x0c, &[0x10, 0x20]);
        put(0x10, &0x0000_4004u32.to_le_bytes());
        put(0x14, &0x38u32.to_le_bytes());
        put(0x18, &0xc001u32.to_le_bytes());
        put(0x34, &[0x60]);
        put(0x60, &[0x10, 0, 0x02, 0]);
        put(0x68, &[0x3f, 0x29]);
        put(0x70, &[0x40, 0]);
        put(0x88, &[0x05, 0]);
        space
    }

    /// Puts back into a file that reads `space`, and returns what it reads then.
    fn after(name: &str, space: &[u8], kept: Option<&str>) -> (io::Result<bool>, Vec<u8>) {
        let path = std::env::temp_dir().join(format!("xl-pciback-mend-{}-{name}", std::process::id()));
        fs::write(&path, space).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let rules = Rules::new(&function(), &self::space()).unwrap();
        let done = put_back(&file, &rules, kept);
        let now = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        (done, now)
    }

    #[test]
    fn what_a_reset_took_comes_back() {
        let whole = space();
        let kept = registers(&whole);
        assert_eq!(kept, "c:1:10 d:1:20 68:2:293f 70:2:40 88:2:5");
        let mut lost = whole.clone();
        for gone in [4..6, 0x0c..0x0e, 0x10..0x28, 0x68..0x6a, 0x70..0x72, 0x88..0x8a] {
            lost[gone].fill(0);
        }
        lost[0x10] = 0x04;
        let (done, now) = after("reset", &lost, Some(&kept));
        assert!(done.unwrap());
        // Only memory and ports are decoded; the kind of a register is no part of what is written, and a file keeps no bits.
        let mut wanted = whole.clone();
        (wanted[4], wanted[5], wanted[0x10], wanted[0x18]) = (0x03, 0, 0, 0);
        assert_eq!(now, wanted);
    }

    #[test]
    fn a_function_that_has_all_of_it_is_not_written_to() {
        let (done, now) = after("whole", &space(), Some("c:1:55"));
        assert!(!done.unwrap());
        assert_eq!(now, space());
        let mut deaf = space();
        deaf.fill(0xff);
        let (done, now) = after("deaf", &deaf, None);
        assert!(!done.unwrap());
        assert_eq!(now, deaf);
        let mut off = space();
        off[4] = 0;
        let (done, now) = after("off", &off, Some("c:1:55"));
        assert!(done.unwrap());
        assert_eq!(now, space());
    }

    #[test]
    fn a_record_that_makes_no_sense_writes_nothing() {
        for text in ["", "c", "c:1", "c:1:100", "c:4:1", "ff:2:1", "ffff:1:1", "x:1:1", "c:0:0"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        assert_eq!(parse("fe:2:ffff"), Some((0xfe, 2, 0xffff)));
    }
}
