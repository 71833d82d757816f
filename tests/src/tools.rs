//! Running other programs, saying what goes on, and the error everything here returns.
//! Every external command goes through `run`, so a failure always shows the command and what it said.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

/// A sentence for the person at the terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub String);

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<lexopt::Error> for Error {
    fn from(error: lexopt::Error) -> Self {
        Self(error.to_string())
    }
}

/// Makes an error with a format string.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => { $crate::tools::Error(format!($($arg)*)) };
}

/// Adds what was being done to an error.
pub trait Context<T> {
    /// The same result, its error prefixed by `what`.
    fn context(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| fail!("{what}: {error}"))
    }
}

fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Prints a line of progress with the seconds since the first one.
pub fn say(text: impl fmt::Display) {
    eprintln!("[{:6.1}] {text}", start().elapsed().as_secs_f64());
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Where downloaded packages and what is made of them are kept.
pub fn cache() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = from("PCIBACK_CACHE") {
        return Ok(dir);
    }
    from("XDG_CACHE_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".cache")))
        .map(|dir| dir.join("pciback-stubdom"))
        .ok_or_else(|| fail!("neither PCIBACK_CACHE nor HOME is set: no place for the cache"))
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end and returns its standard output; its errors are shown only when it fails.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let out = command.stdin(Stdio::null()).output().context(show(command))?;
    if out.status.success() {
        return Ok(out.stdout);
    }
    let mut said = String::from_utf8_lossy(&out.stderr).into_owned();
    if said.trim().is_empty() {
        said = String::from_utf8_lossy(&out.stdout).into_owned();
    }
    Err(fail!("{}: {}\n{}", show(command), out.status, tail(&said, 40)))
}

/// Runs a command that may talk to the terminal.
pub fn run_shown(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().context(show(command))?;
    if status.success() { Ok(()) } else { Err(fail!("{}: {status}", show(command))) }
}

/// Reads a file, naming it when that fails.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<u8>> {
    std::fs::read(&path).context(path.as_ref().display())
}

/// Writes a file and the directories above it.
pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
    if let Some(dir) = path.as_ref().parent() {
        make_dir(dir)?;
    }
    std::fs::write(&path, bytes).context(path.as_ref().display())
}

/// Makes a directory and those above it.
pub fn make_dir(path: impl AsRef<Path>) -> Result<()> {
    std::fs::create_dir_all(&path).context(path.as_ref().display())
}

/// Removes a tree if it is there.
pub fn remove_tree(path: impl AsRef<Path>) -> Result<()> {
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(path.as_ref().display()),
        _ => Ok(()),
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A command of the toolchain that runs this program.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // What `cargo run` sets for this program is not meant for the builds it starts.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"]
    {
        command.env_remove(name);
    }
    command
}

/// True when a program is on the path.
pub fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Programs and files the rig needs on the host, and the Debian package each is in.
const NEEDED: [(&str, &str); 8] = [
    ("busybox", "busybox-static"),
    ("setpriv", "util-linux"),
    ("flock", "util-linux"),
    ("xz", "xz-utils"),
    ("gzip", "gzip"),
    ("objdump", "binutils"),
    ("gcc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
];

/// Packages that are missing on the host, of a list of programs and files and the package each is in.
fn missing_of(needed: &[(&str, &'static str)]) -> Vec<&'static str> {
    let there = |name: &str| if name.starts_with('/') { Path::new(name).exists() } else { on_path(name) };
    needed.iter().filter(|(name, _)| !there(name)).map(|(_, package)| *package).collect()
}

/// Installs what the rig misses on the host, or names the command that does.
pub fn install_missing() -> Result<()> {
    install_missing_of(&NEEDED)
}

/// Installs what is missing on the host, or names the command that does.
pub fn install_missing_of(needed: &[(&str, &'static str)]) -> Result<()> {
    let missing = missing_of(needed);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let uid = run(Command::new("id").arg("-u"))?;
    if String::from_utf8_lossy(&uid).trim() != "0" {
        return Err(fail!("missing on this machine; run: sudo apt-get update && sudo apt-get install -y {list}"));
    }
    say(format!("installing {list}"));
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        command
    };
    run(apt().arg("update"))?;
    run(apt().args(["install", "-y", "--no-install-recommends"]).args(&missing))?;
    let still = missing_of(needed);
    if still.is_empty() { Ok(()) } else { Err(fail!("still missing after apt-get install: {}", still.join(" "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_short_text_is_all_of_it() {
        assert_eq!(tail("a\nb", 5), "a\nb");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
    }

    #[test]
    fn a_failing_command_is_named_with_what_it_said() {
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(error.0.contains("exit 3") && error.0.contains("why"), "{error}");
    }
}
