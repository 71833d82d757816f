//! Writes initramfs archives (cpio, format "newc"; rules: buffer-format.rst of the Linux documentation).
//! Everything belongs to root and has inode numbers of its own, so the host's owners and links do not matter.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::tools::{Context, Result};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn entry(&mut self, name: &[u8], mode: u32, content: &[u8]) {
        self.inodes += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let head = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.inodes,
            0,
            0,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        );
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Adds a directory; those above it must be there already.
    pub fn dir(&mut self, name: &str) {
        self.entry(name.as_bytes(), S_IFDIR | 0o755, b"");
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name.as_bytes(), S_IFREG | permissions, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, name: &str, target: &str) {
        self.entry(name.as_bytes(), S_IFLNK | 0o777, target.as_bytes());
    }

    /// Adds everything below a directory of the host.
    pub fn tree(&mut self, dir: &Path) -> Result<()> {
        self.below(dir, dir)
    }

    fn below(&mut self, top: &Path, dir: &Path) -> Result<()> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(dir).context(dir.display())? {
            paths.push(entry?.path());
        }
        paths.sort();
        for path in paths {
            let name = path.strip_prefix(top).context("path")?.as_os_str().as_bytes().to_vec();
            let meta = path.symlink_metadata().context(path.display())?;
            let permissions = meta.permissions().mode() & 0o7777;
            if meta.is_dir() {
                self.entry(&name, S_IFDIR | permissions, b"");
                self.below(top, &path)?;
            } else if meta.is_symlink() {
                self.entry(&name, S_IFLNK | 0o777, fs::read_link(&path)?.as_os_str().as_bytes());
            } else if meta.is_file() {
                self.entry(&name, S_IFREG | permissions, &fs::read(&path).context(path.display())?);
            }
        }
        Ok(())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(b"TRAILER!!!", 0, b"");
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_110_bytes_and_entries_are_aligned() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"abc");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081ed");
        assert_eq!(&bytes[54..62], b"00000003");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..119], b"abc");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 512, 0);
    }
}
