//! Xen with the config-owner change of `boot/xen`: fetched as a release's source package with the host's own apt
//! configuration, built as Debian configures it, kept by what it was made of.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig_agent::Sum;

use crate::fail;
use crate::packages::{Apt, Kind, Release, once};
use crate::tools::{
    Context, Result, cache, install_missing_of, make_dir, read, remove_tree, root, run, say, tail, write,
};

/// Which hypervisor a machine boots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Hypervisor {
    /// The release's own.
    #[default]
    Stock,
    /// With the config-owner change.
    ConfigOwner,
}

impl Hypervisor {
    /// Finds one by the word for it on the command line.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "stock" => Ok(Hypervisor::Stock),
            "changed" => Ok(Hypervisor::ConfigOwner),
            _ => Err(fail!("unknown hypervisor {word}: stock or changed")),
        }
    }
}

/// For behind a version: nothing, or what is different.
impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Hypervisor::Stock => Ok(()),
            Hypervisor::ConfigOwner => f.write_str(" with the config-owner change"),
        }
    }
}

/// A hypervisor that was built.
#[derive(Debug, Clone)]
pub struct Built {
    /// An ELF file, for QEMU.
    pub plain: PathBuf,
    /// The same, compressed, for a host's /boot.
    pub packed: PathBuf,
}

/// Programs and files a build needs on the host, and the Debian package each is in.
const NEEDED: [(&str, &str); 9] = [
    ("dpkg-source", "dpkg-dev"),
    ("patch", "patch"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
    ("ld", "binutils"),
    ("bison", "bison"),
    ("flex", "flex"),
    ("python3", "python3"),
];

/// Changes when the way of building changes, so that what was built before is not used.
const RECIPE: &str = "1";

/// Where the change is.
fn change() -> PathBuf {
    root().join("boot/xen")
}

/// The hypervisor that `PCIBACK_XEN` names, or the one built from the release's source; an ELF file either way.
pub fn changed_or_given(release: Release) -> Result<PathBuf> {
    let Some(given) = std::env::var_os("PCIBACK_XEN").map(PathBuf::from) else {
        return Ok(changed(release, false)?.plain);
    };
    let bytes = read(&given).map_err(|error| fail!("PCIBACK_XEN: {error}"))?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(given);
    }
    let plain = root().join("target/rig/xen-given");
    write(&plain, run(Command::new("gzip").arg("-dc").arg(&given))?)?;
    Ok(plain)
}

/// Xen with the change, from the cache or built now. `force` fetches and builds anew.
pub fn changed(release: Release, force: bool) -> Result<Built> {
    let cache = cache()?.join(release.name());
    if force {
        remove_tree(cache.join("xen-source"))?;
    }
    let (dsc, version) = source(release, &cache)?;
    let dir = cache.join(format!("xen-{}", key(&version)?));
    let built = Built { plain: dir.join("xen"), packed: dir.join("xen.gz") };
    if force {
        remove_tree(&dir)?;
    }
    if dir.is_dir() {
        return Ok(built);
    }
    install_missing_of(&NEEDED)?;
    // Under a name of its own until it is complete: another process may build, too.
    let work = cache.join(format!("xen-build.{}", std::process::id()));
    remove_tree(&work)?;
    make_dir(&work)?;
    let done = build(release, &version, &dsc, &work);
    let kept = done.and_then(|result| match std::fs::rename(&result, &dir) {
        // The other was first, and made the same.
        Err(_) if dir.is_dir() => Ok(()),
        renamed => renamed.context(dir.display()),
    });
    remove_tree(&work)?;
    kept.map(|()| built)
}

/// Names what a build is made of.
fn key(version: &str) -> Result<String> {
    let mut sum = Sum::new();
    let mut add = |bytes: &[u8]| {
        sum.add(&(bytes.len() as u64).to_le_bytes());
        sum.add(bytes);
    };
    add(RECIPE.as_bytes());
    add(version.as_bytes());
    let dir = change();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&dir).context(dir.display())?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    // What is only read by people changes nothing.
    files.retain(|file| !["README.md", "COPYING"].iter().any(|name| file.ends_with(name)));
    for file in files {
        add(file.file_name().unwrap_or_default().as_encoded_bytes());
        add(&read(&file)?);
    }
    Ok(format!("{:016x}", sum.value()))
}

/// The source package: its description file and its version. Fetched once; `--force` looks for a newer one.
fn source(release: Release, cache: &Path) -> Result<(PathBuf, String)> {
    let dir = cache.join("xen-source");
    once(&dir, "xen", |dir| {
        say(format!("{}: fetching Xen's source package", release.name()));
        let apt = Apt::new(release, &cache.join("apt-source"), Kind::Source)?;
        apt.update()?;
        let listed = run(apt.command("apt-cache").args(["showsrc", "xen"]))?;
        let mut reasons = String::new();
        for version in newest_first(versions(&String::from_utf8_lossy(&listed))) {
            let package = format!("xen={version}");
            match run(apt.command("apt-get").args(["source", "--download-only", &package]).current_dir(dir)) {
                Ok(_) => return Ok(()),
                Err(error) => reasons.push_str(&format!("\n{version}: {}", reason(&error.0))),
            }
        }
        if reasons.is_empty() {
            reasons.push_str("\nthe sources of this machine list none");
        }
        Err(fail!(
            "{}: no source package of Xen can be fetched, so the changed hypervisor cannot be built for this release.{reasons}\n\
             Use another release, or PCIBACK_XEN=FILE with one that was built from a tree with boot/xen/apply.",
            release.name()
        ))
    })?;
    let dsc = std::fs::read_dir(&dir)
        .context(dir.display())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ext| ext == "dsc"))
        .ok_or_else(|| fail!("{} has no .dsc file", dir.display()))?;
    let text = String::from_utf8_lossy(&read(&dsc)?).into_owned();
    let version = versions(&text).into_iter().next().ok_or_else(|| fail!("{} names no version", dsc.display()))?;
    Ok((dsc, version))
}

/// The first thing apt found wrong.
fn reason(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    let told = lines.iter().find(|line| line.starts_with("E: "));
    told.or(lines.last()).unwrap_or(&"").trim_start_matches("E: ").to_owned()
}

/// Versions in descriptions of source packages.
fn versions(text: &str) -> Vec<String> {
    let mut found: Vec<String> =
        text.lines().filter_map(|line| line.strip_prefix("Version: ")).map(|v| v.trim().to_owned()).collect();
    found.dedup();
    found
}

/// In the order in which they are tried.
fn newest_first(mut versions: Vec<String>) -> Vec<String> {
    let newer = |a: &str, b: &str| run(Command::new("dpkg").args(["--compare-versions", a, "gt", b])).is_ok();
    versions.sort_by(|a, b| if newer(a, b) { std::cmp::Ordering::Less } else { newer(b, a).cmp(&false) });
    versions.dedup();
    versions
}

/// Unpacks, changes and builds in `work`; returns the directory with the result.
fn build(release: Release, version: &str, dsc: &Path, work: &Path) -> Result<PathBuf> {
    let (tree, result) = (work.join("tree"), work.join("result"));
    say(format!("{}: unpacking Xen {version}", release.name()));
    run(Command::new("dpkg-source").arg("-x").args([dsc, &tree]))?;
    let said = run(Command::new("sh").arg(change().join("apply")).arg(&tree))?;
    say(format!("{}: {}", release.name(), String::from_utf8_lossy(&said).lines().collect::<Vec<_>>().join("; ")));
    let xen = tree.join("xen");
    write(xen.join(".config"), read(tree.join("debian/xen-kconfig"))?)?;
    let make = |targets: &[&str]| {
        let mut command = Command::new("make");
        command.arg("-C").arg(&xen).args(targets).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
        command
    };
    run(&mut make(&["olddefconfig"]))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    watched(release, &mut make(&[&format!("-j{cores}")]), &work.join("build.log"))?;
    make_dir(&result)?;
    for name in ["xen", "xen.gz"] {
        std::fs::copy(xen.join(name), result.join(name)).context(xen.join(name).display())?;
    }
    write(result.join("version"), version)?;
    Ok(result)
}

/// Runs a build that takes a minute, and says how far it is.
fn watched(release: Release, command: &mut Command, log: &Path) -> Result<()> {
    let file = File::create(log).context(log.display())?;
    let mut child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn().context("make")?;
    say(format!("{}: building Xen, a minute or two", release.name()));
    let mut told = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        std::thread::sleep(Duration::from_millis(200));
        if told.elapsed() > Duration::from_secs(15) {
            let text = String::from_utf8_lossy(&read(log)?).into_owned();
            let compiled = text.lines().filter(|line| line.trim_start().starts_with("CC ")).count();
            say(format!("{}: {compiled} files compiled", release.name()));
            told = Instant::now();
        }
    };
    let text = String::from_utf8_lossy(&read(log)?).into_owned();
    if status.success() { Ok(()) } else { Err(fail!("building Xen: {status}\n{}", tail(&text, 40))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_source_is_tried_first() {
        let text = "Package: xen\nVersion: 4.17.5+72-g01140da4e8-1\n\nPackage: xen\nVersion: 4.17.7+13-g1-0+deb12u1\n";
        assert_eq!(newest_first(versions(text)), ["4.17.7+13-g1-0+deb12u1", "4.17.5+72-g01140da4e8-1"]);
    }

    #[test]
    fn the_key_depends_on_the_source() {
        let one = key("4.17.5-1").unwrap();
        assert_eq!(one, key("4.17.5-1").unwrap());
        assert_ne!(one, key("4.17.7-1").unwrap());
    }

    #[test]
    fn what_apt_found_wrong_is_told_in_a_line() {
        let said = "apt-get source: exit status: 100\nE: Failed to fetch x.dsc  404  Not Found\nE: Failed to fetch some archives.";
        assert_eq!(reason(said), "Failed to fetch x.dsc  404  Not Found");
    }
}
