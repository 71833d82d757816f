//! Granting a page of our own to another domain, `xen/grant_table.h`, version 1 entries.
//!
//! [`crate::memory::map_grant_table`] makes the table's first frame appear: Xen has it from the start, and
//! its 512 entries are more than the image grants. An entry is valid as soon as its flags say so;
//! frame and domain are stored first.
//!
//! A grant stays for the life of the domain, so nothing is revoked here.

use core::sync::atomic::Ordering;

use crate::abi::{PAGE_SIZE, grant_entry};
use crate::page::Page;

/// Entries in the one frame used.
const ENTRIES: usize = PAGE_SIZE as usize / grant_entry::SIZE;

/// The first frame of this domain's grant table.
#[derive(Debug)]
pub struct OwnTable {
    page: Page,
    /// First entry that is free. Those before it are the tools' or granted.
    next: usize,
}

impl OwnTable {
    /// The table in `page`, with only the tools' entries in use.
    pub const fn new(page: Page) -> OwnTable {
        OwnTable { page, next: grant_entry::RESERVED }
    }

    /// Lets domain `to` map our guest frame `frame`, writable, and returns the grant reference. `None` if
    /// every entry is in use or the frame's number is wider than an entry holds.
    pub fn grant(&mut self, to: u16, frame: u64) -> Option<u32> {
        let frame = u32::try_from(frame).ok()?;
        let grant_ref = u32::try_from(self.next).ok().filter(|_| self.next < ENTRIES)?;
        let entry = self.next * grant_entry::SIZE;
        self.page.write(entry + grant_entry::FRAME, frame);
        self.page.write(entry + grant_entry::DOMID, to);
        let flags = self.page.atomic16(entry + grant_entry::FLAGS);
        flags.store(grant_entry::PERMIT_ACCESS, Ordering::Release);
        self.next += 1;
        Some(grant_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::tests::page;

    #[test]
    fn a_grant_is_an_entry_behind_the_tools_own() {
        let page = page();
        for entry in 0..8 {
            page.write(entry * 8, 0x5555_5555_5555_5555u64);
        }
        let mut table = OwnTable::new(page);
        assert_eq!(table.grant(0, 0x1234), Some(8));
        assert_eq!(table.grant(7, 0xffff_ffff), Some(9));
        assert_eq!((page.read::<u16>(64), page.read::<u16>(66), page.read::<u32>(68)), (1, 0, 0x1234));
        assert_eq!((page.read::<u16>(72), page.read::<u16>(74), page.read::<u32>(76)), (1, 7, u32::MAX));
        for entry in 0..8 {
            assert_eq!(page.read::<u64>(entry * 8), 0x5555_5555_5555_5555);
        }
    }

    #[test]
    fn a_frame_too_wide_uses_no_entry() {
        let page = page();
        let mut table = OwnTable::new(page);
        assert_eq!(table.grant(0, 1 << 32), None);
        assert_eq!(page.read::<u64>(64), 0);
        assert_eq!(table.grant(0, 1), Some(8));
    }

    #[test]
    fn a_full_table_grants_nothing_more() {
        let mut table = OwnTable::new(page());
        for grant_ref in 8..512 {
            assert_eq!(table.grant(0, 1), Some(grant_ref));
        }
        assert_eq!(table.grant(0, 1), None);
        assert_eq!(table.grant(0, 1), None);
    }
}
