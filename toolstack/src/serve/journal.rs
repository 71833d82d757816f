//! Which vectors dom0 has mapped for a driver domain, on disk (a memory file system is enough): written before and after
//! each call, so that whatever ends this program, the next one finds what is mapped, and knows when a mapping may have
//! been made that nobody wrote down.
//!
//! One file a function, one line an event:
//!
//! ```text
//! begin GUEST        a mapping is about to be asked for
//! mapped GUEST PIRQ WHAT  Xen has made it: "msi", or the entry of the MSI-X table
//! failed             Xen has not
//! unmapped GUEST PIRQ
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use pciback::nodes::folder;
use pciback::physdev::Pirq;
use pciback::platform::DomId;
use pciback::sbdf::Sbdf;

/// A mapping: the guest, and the (first) pirq.
pub type Mapping = (DomId, Pirq);

/// What a pirq is for: an entry of the MSI-X table, or `None` for MSI.
pub type What = Option<u16>;

/// Lines after which a file is written anew.
const LONG: usize = 4096;

/// The journal of one function.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<fs::File>,
    mapped: BTreeMap<Mapping, What>,
    begun: Option<DomId>,
    lines: usize,
}

fn line(((guest, pirq), what): (Mapping, What)) -> String {
    let what = what.map_or_else(|| "msi".to_string(), |entry| entry.to_string());
    format!("mapped {guest} {pirq} {what}\n")
}

/// What a file says.
fn replay(text: &str) -> (BTreeMap<Mapping, What>, Option<DomId>) {
    let (mut mapped, mut begun) = (BTreeMap::new(), None);
    // A last line without its end was cut short, and may say another number.
    for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match *words.as_slice() {
            ["begin", guest] => begun = guest.parse().ok(),
            ["failed"] => begun = None,
            ["mapped", guest, pirq, what] => {
                begun = None;
                if let (Ok(guest), Ok(pirq)) = (guest.parse(), pirq.parse()) {
                    mapped.insert((guest, pirq), what.parse().ok());
                }
            }
            ["unmapped", guest, pirq] => {
                if let (Ok(guest), Ok(pirq)) = (guest.parse(), pirq.parse()) {
                    mapped.remove(&(guest, pirq));
                }
            }
            _ => {}
        }
    }
    (mapped, begun)
}

impl Journal {
    /// Reads the journal of a function in `dir`.
    pub fn open(dir: &Path, sbdf: Sbdf) -> Journal {
        let path = dir.join(folder(sbdf));
        let (mapped, begun) = replay(&fs::read_to_string(&path).unwrap_or_default());
        let mut journal = Journal { path, file: None, mapped, begun, lines: 0 };
        journal.rewrite();
        journal
    }

    /// Every mapping that any journal in `dir` has.
    pub fn all(dir: &Path) -> BTreeSet<Mapping> {
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        files.flat_map(|file| replay(&fs::read_to_string(file.path()).unwrap_or_default()).0.into_keys()).collect()
    }

    /// What is mapped.
    pub fn mapped(&self) -> &BTreeMap<Mapping, What> {
        &self.mapped
    }

    /// The guest of a mapping that was begun and of which nobody knows whether it was made.
    pub fn begun(&self) -> Option<DomId> {
        self.begun
    }

    /// A mapping is about to be asked for.
    ///
    /// # Errors
    /// It cannot be written down, so it must not be asked for.
    pub fn begin(&mut self, guest: DomId) -> std::io::Result<()> {
        self.append(&format!("begin {guest}\n"))?;
        self.begun = Some(guest);
        Ok(())
    }

    /// How it ended. A line that cannot be written leaves the mapping "begun", and it is looked for later.
    pub fn end(&mut self, made: Option<(Mapping, What)>) {
        let line = match made {
            Some(made) => line(made),
            None => "failed\n".to_string(),
        };
        self.begun = None;
        self.mapped.extend(made);
        self.try_append(&line);
    }

    /// A mapping is gone.
    pub fn unmapped(&mut self, (guest, pirq): Mapping) {
        self.mapped.remove(&(guest, pirq));
        self.try_append(&format!("unmapped {guest} {pirq}\n"));
    }

    fn append(&mut self, line: &str) -> std::io::Result<()> {
        if self.lines >= LONG {
            self.rewrite();
        }
        self.lines += 1;
        if self.file.is_none() {
            self.file = Some(fs::OpenOptions::new().create(true).append(true).open(&self.path)?);
        }
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(line.as_bytes()))
    }

    fn try_append(&mut self, line: &str) {
        if let Err(error) = self.append(line) {
            eprintln!("xl-pciback: warning: {} cannot be written: {error}", self.path.display());
        }
    }

    /// Writes the file anew with what is mapped; the old one stays if that fails.
    fn rewrite(&mut self) {
        let begun = self.begun.map(|guest| format!("begin {guest}\n"));
        let lines = self.mapped.iter().map(|(mapping, what)| line((*mapping, *what)));
        // "begin" last: a "mapped" behind it would end it.
        let text: String = lines.chain(begun).collect();
        let fresh = self.path.with_extension("new");
        let written = fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &self.path));
        if written.is_ok() {
            self.lines = self.mapped.len();
            self.file = None;
        }
    }
}

/// What is mapped of a function, without taking its journal over.
pub fn mapped(dir: &Path, sbdf: Sbdf) -> BTreeSet<Mapping> {
    replay(&fs::read_to_string(dir.join(folder(sbdf))).unwrap_or_default()).0.into_keys().collect()
}

/// Notes in somebody else's journal that a mapping is gone.
pub fn note_unmapped(dir: &Path, sbdf: Sbdf, (guest, pirq): Mapping) {
    if let Ok(mut file) = fs::OpenOptions::new().append(true).open(dir.join(folder(sbdf))) {
        let _ = file.write_all(format!("unmapped {guest} {pirq}\n").as_bytes());
    }
}

/// The guest is gone, and its number may be another's one day.
pub fn forget(dir: &Path, sbdf: Sbdf, guest: u32) {
    for mapping in mapped(dir, sbdf).into_iter().filter(|mapping| u32::from(mapping.0) == guest) {
        note_unmapped(dir, sbdf, mapping);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("xl-pciback-journal-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn another_life_finds_what_is_mapped_and_what_is_not_known() {
        let dir = dir("life");
        let sbdf: Sbdf = "0000:01:00.0".parse().unwrap();
        let mut journal = Journal::open(&dir, sbdf);
        journal.begin(7).unwrap();
        journal.end(Some(((7, 55), Some(0))));
        journal.begin(7).unwrap();
        journal.end(Some(((7, 54), None)));
        journal.begin(7).unwrap();
        journal.end(None);
        journal.unmapped((7, 55));
        journal.begin(8).unwrap();
        drop(journal);
        for _ in 0..2 {
            let journal = Journal::open(&dir, sbdf);
            assert_eq!(
                journal.mapped().iter().map(|(mapping, what)| (*mapping, *what)).collect::<Vec<_>>(),
                [((7, 54), None)]
            );
            assert_eq!(journal.begun(), Some(8));
            assert_eq!(Journal::all(&dir).len(), 1);
        }
        let mut journal = Journal::open(&dir, sbdf);
        journal.end(None);
        drop(journal);
        assert_eq!(Journal::open(&dir, sbdf).begun(), None);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_stays_short_and_a_cut_line_is_no_trouble() {
        let dir = dir("long");
        let sbdf: Sbdf = "0000:01:00.0".parse().unwrap();
        let mut journal = Journal::open(&dir, sbdf);
        for round in 0..10_000 {
            journal.begin(7).unwrap();
            journal.end(Some(((7, round), Some(3))));
            journal.unmapped((7, round));
        }
        let path = dir.join(folder(sbdf));
        assert!(fs::metadata(&path).unwrap().len() < 200_000);
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("mapped 7 9 0\nmapped 7 8 1");
        fs::write(&path, text).unwrap();
        assert_eq!(Journal::open(&dir, sbdf).mapped().len(), 1);
        assert_eq!(replay("nonsense\nmapped x y 0\nmapped 1\n"), (BTreeMap::new(), None));
        fs::remove_dir_all(&dir).unwrap();
    }
}
