//! What the rig and its helper inside the machines share: frames for commands on a serial line, a checksum, a pattern.
//!
//! Frames are lines of text with a length, so that kernel messages before and after them do no harm; the sum tells when
//! something was written into the middle of one.

use std::io::{self, BufRead, Write};

/// Starts a request line: `@run SEQ SECONDS LENGTH`, followed by LENGTH bytes of shell script.
pub const RUN: &str = "@run ";
/// Starts a reply line: `@end SEQ CODE LENGTH SUM`, followed by LENGTH bytes of output.
pub const END: &str = "@end ";
/// The line a server prints when it starts to listen.
pub const READY: &str = "@rig ready";
/// The exit code of a command that ran into its limit, as `timeout` has it.
pub const CODE_TIMEOUT: i32 = 124;
/// The exit code of the helper itself when the line to a guest failed.
pub const CODE_LINE: i32 = 125;
/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Number the reply repeats.
    pub seq: u64,
    /// Seconds after which the command is killed.
    pub seconds: u64,
    /// What `sh -c` gets.
    pub script: Vec<u8>,
}

/// What a command answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Number of the request.
    pub seq: u64,
    /// Exit code, 128 + signal, or [`CODE_TIMEOUT`].
    pub code: i32,
    /// Standard output and error, in order.
    pub output: Vec<u8>,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn exact(input: &mut impl BufRead, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads lines until one holds `tag`, and returns the words after it.
fn find_head(input: &mut impl BufRead, tag: &str) -> io::Result<Vec<String>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let text = String::from_utf8_lossy(&line);
        if let Some(at) = text.find(tag) {
            return Ok(text[at + tag.len()..].split_whitespace().map(str::to_owned).collect());
        }
    }
}

impl Request {
    /// Writes the frame in one piece.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut frame = format!("\n{RUN}{} {} {}\n", self.seq, self.seconds, self.script.len()).into_bytes();
        frame.extend_from_slice(&self.script);
        out.write_all(&frame)?;
        out.flush()
    }

    /// Reads the next frame; what is not a frame is skipped.
    pub fn read(input: &mut impl BufRead) -> io::Result<Self> {
        loop {
            let head = find_head(input, RUN)?;
            if let [seq, seconds, len] = head.as_slice()
                && let (Ok(seq), Ok(seconds), Ok(len)) = (seq.parse(), seconds.parse(), len.parse())
            {
                return Ok(Self { seq, seconds, script: exact(input, len)? });
            }
        }
    }
}

impl Reply {
    /// Writes the frame in one piece.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut sum = Sum::new();
        sum.add(&self.output);
        let mut frame =
            format!("\n{END}{} {} {} {:016x}\n", self.seq, self.code, self.output.len(), sum.value()).into_bytes();
        frame.extend_from_slice(&self.output);
        frame.push(b'\n');
        out.write_all(&frame)?;
        out.flush()
    }

    /// Reads the reply to request `seq`; replies to older requests and other text are skipped.
    pub fn read(input: &mut impl BufRead, seq: u64) -> io::Result<Self> {
        loop {
            let head = find_head(input, END)?;
            let [its_seq, code, len, sum] = head.as_slice() else { continue };
            let (Ok(its_seq), Ok(code), Ok(len), Ok(wanted)) =
                (its_seq.parse::<u64>(), code.parse(), len.parse(), u64::from_str_radix(sum, 16))
            else {
                continue;
            };
            if its_seq != seq {
                continue;
            }
            let output = exact(input, len)?;
            let mut sum = Sum::new();
            sum.add(&output);
            if sum.value() != wanted {
                return Err(bad("something wrote into the middle of a reply"));
            }
            return Ok(Self { seq, code, output });
        }
    }
}

/// FNV-1a over 8-byte words (the last one filled with zeros): quick enough for emulated processors, and it notices moved blocks.
#[derive(Debug, Clone, Copy)]
pub struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self::new()
    }
}

impl Sum {
    /// The sum of nothing.
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds bytes; all calls but the last must bring a multiple of 8.
    pub fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }

    /// The sum of all bytes added.
    pub fn value(self) -> u64 {
        self.0
    }
}

/// An endless seeded pattern (splitmix64), the content of the rig's disk and of what guests write to it.
#[derive(Debug, Clone, Copy)]
pub struct Pattern(u64);

impl Pattern {
    /// A pattern that only the seed decides.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bf0_3635)
    }

    /// Fills a buffer whose length is a multiple of 8.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            chunk.copy_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_found_between_kernel_messages() {
        let request = Request { seq: 7, seconds: 3, script: b"echo 1\necho 2".to_vec() };
        let mut line = b"[    1.0] noise\n@run x\n".to_vec();
        request.write(&mut line).unwrap();
        line.extend_from_slice(b"[    2.0] more\n");
        assert_eq!(Request::read(&mut line.as_slice()).unwrap(), request);
    }

    #[test]
    fn replies_to_older_requests_are_skipped() {
        let mut line = Vec::new();
        for seq in 1..=3 {
            Reply { seq, code: 0, output: format!("{seq}\n").into_bytes() }.write(&mut line).unwrap();
        }
        assert_eq!(Reply::read(&mut line.as_slice(), 3).unwrap().output, b"3\n");
    }

    #[test]
    fn text_inside_a_reply_is_noticed() {
        let mut line = Vec::new();
        Reply { seq: 1, code: 0, output: b"abcdefgh".to_vec() }.write(&mut line).unwrap();
        let at = line.len() - 5;
        line.splice(at..at, *b"[ 3.0] x");
        assert!(Reply::read(&mut line.as_slice(), 1).is_err());
    }

    #[test]
    fn the_sum_notices_swapped_words() {
        let (mut a, mut b) = (Sum::new(), Sum::new());
        a.add(&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        b.add(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_ne!(a.value(), b.value());
    }

    #[test]
    fn patterns_differ_by_seed_and_repeat() {
        let (mut a, mut b, mut c) = ([0; 64], [0; 64], [0; 64]);
        Pattern::new(1).fill(&mut a);
        Pattern::new(1).fill(&mut b);
        Pattern::new(2).fill(&mut c);
        assert_eq!(a, b);
        assert_ne!(a, c);
    }
}
