//! The PV console ring, `xen/io/console.h`: what `xl console` shows and xenconsoled logs.
//!
//! Output only. The daemon drains the ring when it likes; a full ring never stops us: what does not
//! fit is dropped and counted, and the count is printed as soon as there is room.

use core::sync::atomic::Ordering;

use crate::abi::xencons;
use crate::evtchn;
use crate::page::Page;

/// Our end of the console ring.
#[derive(Debug)]
pub struct Console {
    page: Page,
    port: u32,
    lost: u32,
}

impl Console {
    /// The ring in `page`, with event channel `port`.
    pub const fn new(page: Page, port: u32) -> Console {
        Console { page, port, lost: 0 }
    }

    /// Writes one line, its end added as CR LF, and wakes the daemon. A line is written whole or not
    /// at all.
    pub fn line(&mut self, text: &str) {
        if self.lost > 0 {
            let mut note = Line::<64>::new();
            // A fixed buffer never fails.
            let _ = core::fmt::Write::write_fmt(&mut note, format_args!("({} lines lost: console full)", self.lost));
            if self.push(note.as_str()) {
                self.lost = 0;
            }
        }
        if !self.push(text) {
            self.lost = self.lost.saturating_add(1);
        }
        evtchn::send(self.port);
    }

    /// Copies a line into the ring if there is room for all of it.
    fn push(&mut self, text: &str) -> bool {
        let end = b"\r\n";
        let cons = self.page.atomic32(xencons::OUT_CONS).load(Ordering::Acquire);
        let mut prod: u32 = self.page.read(xencons::OUT_PROD);
        let used = prod.wrapping_sub(cons);
        let free = xencons::OUT_SIZE.saturating_sub(used);
        if text.len() + end.len() > free as usize {
            return false;
        }
        for byte in text.bytes().map(printable).chain(*end) {
            self.page.write(xencons::OUT + (prod % xencons::OUT_SIZE) as usize, byte);
            prod = prod.wrapping_add(1);
        }
        self.page.atomic32(xencons::OUT_PROD).store(prod, Ordering::Release);
        true
    }

    /// Throws away what somebody typed, so that the daemon's side never fills up.
    pub fn discard_input(&self) {
        let prod = self.page.atomic32(xencons::IN_PROD).load(Ordering::Acquire);
        self.page.atomic32(xencons::IN_CONS).store(prod, Ordering::Release);
    }
}

/// Guest-chosen text may reach a log line: no control byte gets to the terminal behind it.
fn printable(byte: u8) -> u8 {
    if byte.is_ascii_control() && byte != b'\t' { b'?' } else { byte }
}

/// A line of at most `N` bytes on the stack; what does not fit is cut and marked.
pub struct Line<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Line<N> {
    /// An empty line.
    pub const fn new() -> Self {
        Line { bytes: [0; N], len: 0 }
    }

    /// What has been written.
    pub fn as_str(&self) -> &str {
        // Only whole characters are ever stored.
        core::str::from_utf8(self.bytes.get(..self.len).unwrap_or(&[])).unwrap_or("")
    }
}

impl<const N: usize> Default for Line<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> core::fmt::Write for Line<N> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for ch in text.chars() {
            let mut utf8 = [0; 4];
            let part = ch.encode_utf8(&mut utf8).as_bytes();
            let Some(room) = self.bytes.get_mut(self.len..self.len + part.len()) else {
                return Err(core::fmt::Error);
            };
            room.copy_from_slice(part);
            self.len += part.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::tests::page;
    use std::string::String;

    fn drain(page: Page) -> String {
        let (cons, prod): (u32, u32) = (page.read(3080), page.read(3084));
        page.write(3080, prod);
        (cons..prod).map(|i| page.read::<u8>(1024 + (i % 2048) as usize) as char).collect()
    }

    #[test]
    fn a_full_ring_drops_whole_lines_and_says_how_many() {
        let page = page();
        let mut console = Console::new(page, 2);
        while console.push(&"x".repeat(100)) {}
        console.lost = 3;
        drain(page);
        assert!(console.push("after"));
        assert_eq!(drain(page), "after\r\n");
    }

    #[test]
    fn a_daemon_with_a_wild_consumer_index_gets_nothing() {
        let page = page();
        page.write(3080, 5000u32);
        assert!(!Console::new(page, 2).push("hello"));
    }

    #[test]
    fn control_bytes_never_reach_the_terminal() {
        let page = page();
        assert!(Console::new(page, 2).push("a\u{1b}[2Jb"));
        assert_eq!(drain(page), "a?[2Jb\r\n");
    }

    #[test]
    fn a_line_is_cut_at_a_whole_character() {
        use core::fmt::Write;
        let mut line = Line::<4>::new();
        assert!(write!(line, "abcé").is_err());
        assert_eq!(line.as_str(), "abc");
    }
}
