//! The gate an image must pass before it boots: what Xen's loader wants of a PVH kernel (xen/include/public/elfnote.h,
//! docs/misc/pvh.pandoc) and what this project promises (no writable code, no red zone, at most 256 KiB).

use std::path::Path;
use std::process::Command;

use crate::fail;
use crate::tools::{Result, read, run};

const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const PF_X: u32 = 1;
const PF_W: u32 = 2;
const SHT_RELA: u32 = 4;
const SHT_DYNAMIC: u32 = 6;
const SHT_REL: u32 = 9;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;
/// Largest stripped image.
pub const MAX_SIZE: u64 = 256 << 10;

fn number(bytes: &[u8], at: u64, width: usize) -> Result<u64> {
    let at = usize::try_from(at).map_err(|_| fail!("an offset beyond the file"))?;
    let part = at.checked_add(width).and_then(|end| bytes.get(at..end));
    let part = part.ok_or_else(|| fail!("the file ends before offset {at:#x}"))?;
    Ok(part.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    paddr: u64,
    size: u64,
}

struct Elf<'a> {
    bytes: &'a [u8],
}

impl Elf<'_> {
    fn segments(&self) -> Result<Vec<Segment>> {
        let (table, size, count) = (number(self.bytes, 32, 8)?, number(self.bytes, 54, 2)?, number(self.bytes, 56, 2)?);
        (0..count)
            .map(|n| {
                let at = table.saturating_add(n * size);
                Ok(Segment {
                    kind: number(self.bytes, at, 4)? as u32,
                    flags: number(self.bytes, at + 4, 4)? as u32,
                    offset: number(self.bytes, at + 8, 8)?,
                    paddr: number(self.bytes, at + 24, 8)?,
                    size: number(self.bytes, at + 32, 8)?,
                })
            })
            .collect()
    }

    fn section_kinds(&self) -> Result<Vec<u32>> {
        let (table, size, count) = (number(self.bytes, 40, 8)?, number(self.bytes, 58, 2)?, number(self.bytes, 60, 2)?);
        (0..count).map(|n| Ok(number(self.bytes, table.saturating_add(n * size) + 4, 4)? as u32)).collect()
    }

    /// The value of the Xen note with a number, in a note segment.
    fn xen_note(&self, segment: &Segment, wanted: u32) -> Result<Option<u64>> {
        let (mut at, end) = (segment.offset, segment.offset.saturating_add(segment.size));
        while at.saturating_add(12) <= end {
            let (name_size, value_size) = (number(self.bytes, at, 4)?, number(self.bytes, at + 4, 4)?);
            let kind = number(self.bytes, at + 8, 4)? as u32;
            let value = at + 12 + name_size.next_multiple_of(4);
            let is_xen = name_size == 4 && number(self.bytes, at + 12, 4)? == u64::from(u32::from_le_bytes(*b"Xen\0"));
            if is_xen && kind == wanted {
                return number(self.bytes, value, value_size.min(8) as usize).map(Some);
            }
            at = value + value_size.next_multiple_of(4);
        }
        Ok(None)
    }
}

/// Checks the structure of an image; the answer lists what is wrong.
pub fn check_structure(bytes: &[u8]) -> Result<Vec<String>> {
    let elf = Elf { bytes };
    let mut wrong = Vec::new();
    if bytes.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err(fail!("not a 64-bit little-endian ELF file"));
    }
    let (kind, machine) = (number(bytes, 16, 2)? as u16, number(bytes, 18, 2)? as u16);
    if (kind, machine) != (ET_EXEC, EM_X86_64) {
        wrong.push(format!("type {kind} and machine {machine}, not EXEC for x86-64"));
    }
    let segments = elf.segments()?;
    let loads: Vec<&Segment> = segments.iter().filter(|segment| segment.kind == PT_LOAD).collect();
    if loads.is_empty() {
        wrong.push("nothing to load".to_owned());
    }
    for segment in &segments {
        if segment.kind == PT_DYNAMIC || segment.kind == PT_INTERP {
            wrong.push("it wants a dynamic loader".to_owned());
        }
        if segment.kind == PT_LOAD && segment.flags & (PF_W | PF_X) == PF_W | PF_X {
            wrong.push(format!("the segment at {:#x} is writable and executable", segment.paddr));
        }
    }
    let kinds = elf.section_kinds()?;
    if kinds.iter().any(|kind| [SHT_RELA, SHT_REL, SHT_DYNAMIC].contains(kind)) {
        wrong.push("it has relocations or a dynamic section".to_owned());
    }
    let mut entry = None;
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if let Some(value) = elf.xen_note(segment, PHYS32_ENTRY)? {
            entry = Some(value);
            let end = segment.offset.saturating_add(segment.size);
            if !loads.iter().any(|load| load.offset <= segment.offset && end <= load.offset.saturating_add(load.size)) {
                wrong.push("the note is in no loaded segment".to_owned());
            }
        }
    }
    match entry {
        None => wrong.push("no note 18 (XEN_ELFNOTE_PHYS32_ENTRY) of owner Xen in a note segment".to_owned()),
        Some(entry) => {
            let inside = |load: &&Segment| {
                load.flags & PF_X != 0 && (load.paddr..load.paddr.saturating_add(load.size)).contains(&entry)
            };
            if !loads.iter().any(inside) {
                wrong.push(format!("the entry point {entry:#x} is in no executable segment"));
            }
        }
    }
    Ok(wrong)
}

/// Crates whose code is compiled without red zone; the toolchain's own core library is not.
const OURS: [&str; 3] = ["pciback", "xen_guest", "pciback_stubdom"];

/// Finds accesses below the stack pointer in the code of our crates.
fn red_zone(disassembly: &str) -> Vec<String> {
    let mut function = "";
    let mut found = Vec::new();
    for line in disassembly.lines() {
        if let Some(name) = line.strip_suffix(">:").and_then(|line| line.split_once('<')).map(|(_, name)| name) {
            function = name;
        } else if line.contains("(%rsp)") && line.contains("-0x") {
            // `-0x8(%rsp)`, but not `lea -0x8(%rsp),%rsp`, which only moves the pointer.
            let operand = line.split("(%rsp)").next().and_then(|text| text.rsplit([' ', ',', '\t', '*']).next());
            let ours = OURS.iter().any(|name| function.contains(name))
                || !function.starts_with("_ZN") && !function.contains("::");
            if operand.is_some_and(|operand| operand.starts_with("-0x")) && !line.contains("lea") && ours {
                found.push(format!("{function}: {}", line.trim()));
            }
        }
    }
    found
}

/// The whole gate.
pub fn gate(full: &Path, stripped: &Path) -> Result<()> {
    let bytes = read(stripped)?;
    let mut wrong = check_structure(&bytes)?;
    if bytes.len() as u64 > MAX_SIZE {
        wrong.push(format!("{} bytes, more than {MAX_SIZE}", bytes.len()));
    }
    let text = run(Command::new("objdump").args(["-d", "--no-show-raw-insn", "--demangle"]).arg(full))?;
    let below = red_zone(&String::from_utf8_lossy(&text));
    if let Some(first) = below.first() {
        wrong.push(format!("{} accesses below the stack pointer, the first in {first}", below.len()));
    }
    if wrong.is_empty() { Ok(()) } else { Err(fail!("{}: {}", full.display(), wrong.join("; "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with one loaded segment that holds everything, and one note segment inside it.
    fn image(flags: u32, note: u32) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 2 * 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 2;
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 2;
        let notes = bytes.len() as u64;
        for (n, value) in [4, 8, note, u32::from_le_bytes(*b"Xen\0"), 0x10_0000, 0].into_iter().enumerate() {
            assert!(n < 6);
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let size = bytes.len() as u64;
        let mut put = |at: usize, kind: u32, flags: u32, offset: u64, size: u64| {
            bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&flags.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 24..at + 32].copy_from_slice(&(0x10_0000 + offset).to_le_bytes());
            bytes[at + 32..at + 40].copy_from_slice(&size.to_le_bytes());
        };
        put(64, PT_LOAD, flags, 0, size);
        put(64 + 56, PT_NOTE, 4, notes, size - notes);
        bytes
    }

    #[test]
    fn a_good_image_passes() {
        assert_eq!(check_structure(&image(5, PHYS32_ENTRY)).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn writable_code_and_a_missing_note_are_found() {
        assert!(check_structure(&image(7, PHYS32_ENTRY)).unwrap()[0].contains("writable and executable"));
        assert!(check_structure(&image(5, 1)).unwrap()[0].contains("note 18"));
    }

    #[test]
    fn a_cut_file_is_an_error_not_a_panic() {
        let bytes = image(5, PHYS32_ENTRY);
        for len in 0..bytes.len() {
            let _ = check_structure(&bytes[..len]);
        }
    }

    #[test]
    fn the_red_zone_is_found_in_our_code_only() {
        let text = "0000 <pciback::a>:\n  10:\tmov    %rax,-0x8(%rsp)\n  14:\tlea    -0x8(%rsp),%rsp\n  15:\tmov    %rax,0x8(%rsp)\n\
                    0020 <core::b>:\n  20:\tmov    -0x10(%rsp),%rax\n";
        assert_eq!(red_zone(text), ["pciback::a: 10:\tmov    %rax,-0x8(%rsp)"]);
    }
}
