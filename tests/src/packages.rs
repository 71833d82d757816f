//! Debian's Xen, tools and kernel as packages: fetched with the host's own apt configuration, its release name swapped,
//! into private directories. Nothing is installed on the host, and no server is named here.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fail;
use crate::tools::{Context, Result, cache, make_dir, read, remove_tree, run, say, write};

/// A Debian release the rig boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Debian 12: Xen 4.17, Linux 6.1.
    Bookworm,
    /// Debian 13: Xen 4.20, Linux 6.12.
    Trixie,
}

impl Release {
    /// All of them, oldest first.
    pub const ALL: [Release; 2] = [Release::Bookworm, Release::Trixie];

    /// The name Debian's archive uses.
    pub fn name(self) -> &'static str {
        match self {
            Release::Bookworm => "bookworm",
            Release::Trixie => "trixie",
        }
    }

    /// Version of its Xen.
    pub fn xen(self) -> &'static str {
        match self {
            Release::Bookworm => "4.17",
            Release::Trixie => "4.20",
        }
    }

    /// The xenstore daemon that dom0 runs. Debian starts oxenstored where it is installed, which is the usual case; the
    /// other release runs the other one, because both are in use.
    pub fn xenstored(self) -> &'static str {
        match self {
            Release::Bookworm => "oxenstored",
            Release::Trixie => "xenstored",
        }
    }

    /// Finds a release by name.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|release| release.name() == name);
        found.ok_or_else(|| fail!("unknown release {name}: bookworm, trixie or all"))
    }

    /// Packages that make dom0, without the kernel.
    fn packages(self) -> Vec<String> {
        let v = self.xen();
        let mut list: Vec<String> = [
            "xen-utils-common",
            "xenstore-utils",
            "libxencall1",
            "libxendevicemodel1",
            "libxenevtchn1",
            "libxenforeignmemory1",
            "libxengnttab1",
            "libxenhypfs1",
            "libxenstore4",
            "libxentoolcore1",
            "libxentoollog1",
            "libyajl2",
            "libuuid1",
            "liblzma5",
            "libzstd1",
            "zlib1g",
            "libncurses6",
            "libtinfo6",
            "libc6",
            "libgcc-s1",
            "pciutils",
            "libpci3",
            "libkmod2",
            "kmod",
            "libudev1",
            "liblzo2-2",
            "libfdt1",
            "libbz2-1.0",
            "libcap2",
        ]
        .map(str::to_owned)
        .to_vec();
        list.extend([format!("xen-hypervisor-{v}-amd64"), format!("xen-utils-{v}"), format!("libxenmisc{v}")]);
        list.extend(
            match self {
                Release::Bookworm => ["libext2fs2", "libssl3"],
                Release::Trixie => ["libext2fs2t64", "libssl3t64"],
            }
            .map(str::to_owned),
        );
        list
    }
}

/// Modules of the kernel package that dom0 and guests load; not every release has each.
const MODULES: [&str; 53] = [
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-pciback",
    "xen-pcifront",
    "nvme-keyring",
    "nvme-auth",
    "nvme-core",
    "nvme",
    "crct10dif_common",
    "crc-t10dif",
    "crc64",
    "crc64-rocksoft",
    "t10-pi",
    "e1000e",
    "scsi_common",
    "scsi_mod",
    "sd_mod",
    "usb-common",
    "usbcore",
    "usb-storage",
    "xhci-hcd",
    "xhci-pci-renesas",
    "xhci-pci",
    "libata",
    "libahci",
    "ahci",
    "mii",
    "8139cp",
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "uio",
    "uio_pci_generic",
    "soundcore",
    "snd",
    "snd-timer",
    "snd-pcm",
    "snd-hwdep",
    "snd-hda-core",
    "snd-hda-codec",
    "ledtrig-audio",
    "snd-hda-codec-generic",
    "snd-intel-sdw-acpi",
    "snd-intel-dspcfg",
    "snd-hda-intel",
];

/// xl's settings. A program that restores the x87 state (FXRSTOR, XRSTOR) has QEMU change a flag of the *first* processor without
/// a lock (`cpu_clear_ignne` in target/i386/tcg/system/fpu_helper.c of 10.0), in the word that says whether that one is in a
/// domain, and with nested paging. Where the first runs a PVH domain, that is lost now and then, and the domain dies of a
/// triple fault. So none runs there.
const XL_CONF: &str = "vm.hvm.cpumask=\"1\"\n";

/// Changes when what is made of the packages changes, so that an old cache is made anew.
const LAYOUT: &str = "6";

/// The release whose QEMU runs the machines: that of the host may be an older one.
const EMULATOR: Release = Release::Trixie;

/// Starts QEMU of [`EMULATOR`] from the folder it was unpacked to. Its own loader lets it run beside other libraries.
const EMULATOR_SCRIPT: &str = r#"#!/bin/sh
R=${0%/*}
exec "$R/usr/lib64/ld-linux-x86-64.so.2" --library-path "$R/usr/lib/x86_64-linux-gnu" "$R/usr/bin/qemu-system-x86_64" \
  -L "$R/usr/share/qemu" -L "$R/usr/share/seabios" "$@"
"#;

/// The unpacked packages of a release.
#[derive(Debug, Clone)]
pub struct Base {
    /// The emulator.
    pub qemu: PathBuf,
    /// The release.
    pub release: Release,
    /// Xen, an ELF file.
    pub xen: PathBuf,
    /// Linux, as the package has it, for dom0.
    pub linux: PathBuf,
    /// The same unpacked, for guests: dom0's tools would unpack it at every start of one, which takes seconds here.
    pub vmlinux: PathBuf,
    /// Modules, decompressed.
    pub modules: PathBuf,
    /// dom0's root without init.
    pub dom0: PathBuf,
}

/// What an apt source offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Binary packages.
    Binary,
    /// Source packages.
    Source,
}

impl Kind {
    /// apt's word for it.
    fn word(self) -> &'static str {
        match self {
            Kind::Binary => "deb",
            Kind::Source => "deb-src",
        }
    }
}

/// Keeps the host's Debian sources only, for another release. Understands one-line and deb822 form.
fn swap_release(text: &str, deb822: bool, host: &str, wanted: &str, kind: Kind) -> String {
    let swap = |suite: &str| match suite.strip_prefix(host) {
        Some(rest) if rest.is_empty() || rest.starts_with('-') || rest.starts_with('/') => {
            Some(format!("{wanted}{rest}"))
        }
        _ => None,
    };
    let mut out = String::new();
    if deb822 {
        let mut stanza = String::new();
        let mut ours = false;
        for line in text.lines().chain([""]) {
            if line.trim().is_empty() {
                if ours {
                    out.push_str(&stanza);
                    out.push('\n');
                }
                stanza.clear();
                ours = false;
                continue;
            }
            match line.split_once(':') {
                Some((key, suites)) if key.eq_ignore_ascii_case("suites") => {
                    let suites: Vec<String> = suites.split_whitespace().filter_map(swap).collect();
                    ours = !suites.is_empty();
                    stanza.push_str(&format!("Suites: {}\n", suites.join(" ")));
                }
                Some((key, _)) if key.eq_ignore_ascii_case("types") => {
                    stanza.push_str(&format!("Types: {}\n", kind.word()));
                }
                _ => {
                    stanza.push_str(line);
                    stanza.push('\n');
                }
            }
        }
        return out;
    }
    for line in text.lines().filter(|line| line.starts_with("deb ") || line.starts_with("deb\t")) {
        let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        // `deb [options] uri suite components`: options may hold blanks, and end with a bracket.
        let options =
            if words[1].starts_with('[') { words.iter().position(|word| word.ends_with(']')).unwrap_or(0) } else { 0 };
        let Some(suite) = words.get_mut(options + 2) else { continue };
        let Some(swapped) = swap(suite) else { continue };
        *suite = swapped;
        words[0] = kind.word().to_owned();
        out.push_str(&words.join(" "));
        out.push('\n');
    }
    out
}

/// apt with private directories and one release's sources.
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    pub(crate) fn new(release: Release, dir: &Path, kind: Kind) -> Result<Self> {
        let host = String::from_utf8_lossy(&read("/etc/os-release")?)
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME=").map(|name| name.trim_matches('"').to_owned()))
            .unwrap_or_default();
        let parts = dir.join("sources");
        remove_tree(&parts)?;
        for sub in ["sources", "lists/partial", "archives/partial"] {
            make_dir(dir.join(sub))?;
        }
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(entries.flatten().map(|entry| entry.path()));
        }
        let mut found = false;
        for (n, file) in files.iter().enumerate() {
            let Ok(text) = std::fs::read_to_string(file) else { continue };
            let deb822 = file.extension().is_some_and(|ext| ext == "sources");
            let swapped = swap_release(&text, deb822, &host, release.name(), kind);
            if !swapped.is_empty() {
                found = true;
                write(parts.join(format!("{n}.{}", if deb822 { "sources" } else { "list" })), swapped)?;
            }
        }
        if !found || host.is_empty() {
            return Err(fail!(
                "no apt source of this machine names its own release ({host}): the rig fetches packages with a Debian machine's own sources"
            ));
        }
        Ok(Self { dir: dir.to_owned() })
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let set = |key: &str, value: &str| format!("{key}={value}");
        let at = |sub: &str| self.dir.join(sub).to_string_lossy().into_owned();
        for option in [
            set("Dir::Etc::SourceList", "/dev/null"),
            set("Dir::Etc::SourceParts", &at("sources")),
            set("Dir::State::Lists", &at("lists")),
            set("Dir::Cache", &self.dir.to_string_lossy()),
            set("APT::Sandbox::User", ""),
            set("APT::Architecture", "amd64"),
            set("Acquire::Retries", "3"),
        ] {
            command.arg("-o").arg(option);
        }
        command.arg("-qq");
        command
    }

    pub(crate) fn update(&self) -> Result<()> {
        run(self.command("apt-get").arg("update")).map(drop)
    }

    fn depends(&self, package: &str) -> Result<String> {
        let out = run(self.command("apt-cache").args(["depends", package]))?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// Downloads a package and all that it needs, as if nothing were installed.
    fn download_whole(&self, package: &str, into: &Path) -> Result<()> {
        make_dir(into.join("partial"))?;
        let mut command = self.command("apt-get");
        for option in ["Dir::State::Status=/dev/null", "Debug::NoLocking=1"] {
            command.args(["-o", option]);
        }
        command.arg("-o").arg(format!("Dir::Cache::Archives={}/", into.display()));
        command.args(["install", "--yes", "--no-install-recommends", "--download-only", package]);
        run(&mut command).map(drop)
    }

    fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        make_dir(into)?;
        run(self.command("apt-get").arg("download").args(packages).current_dir(into)).map(drop)
    }
}

fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir).context(dir.display())?.flatten().map(|e| e.path()).collect();
    found.retain(|path| path.extension().is_some_and(|ext| ext == "deb"));
    found.sort();
    Ok(found)
}

fn unpack(deb: &Path, into: &Path) -> Result<()> {
    make_dir(into)?;
    run(Command::new("dpkg").arg("-x").args([deb, into])).map(drop)
}

/// Runs `make` into a directory that only appears when all of it worked.
pub(crate) fn once(dir: &Path, stamp: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let done = dir.join("complete");
    if std::fs::read_to_string(&done).is_ok_and(|text| text == stamp) {
        return Ok(());
    }
    remove_tree(dir)?;
    make_dir(dir)?;
    make(dir)?;
    write(done, stamp)
}

/// Fetches and unpacks what a release needs, unless the cache has it.
pub fn base(release: Release) -> Result<Base> {
    let cache = cache()?.join(release.name());
    let packages = release.packages();
    once(&cache.join("debs"), &packages.join(" "), |dir| {
        say(format!("{}: fetching packages", release.name()));
        let apt = Apt::new(release, &cache.join("apt"), Kind::Binary)?;
        apt.update()?;
        let kernel = apt
            .depends("linux-image-amd64")?
            .split_whitespace()
            .find(|word| word.starts_with("linux-image-") && word.as_bytes().get(12).is_some_and(u8::is_ascii_digit))
            .map(str::to_owned)
            .ok_or_else(|| fail!("package linux-image-amd64 of {} depends on no kernel", release.name()))?;
        let mut all = packages.clone();
        all.push(kernel);
        apt.download(&all, dir)
    })?;
    let tree = cache.join("base");
    once(&tree, &format!("{LAYOUT} {}", packages.join(" ")), |dir| {
        say(format!("{}: unpacking", release.name()));
        assemble(release, &cache.join("debs"), dir)
    })?;
    Ok(Base {
        qemu: emulator()?,
        release,
        xen: tree.join("xen"),
        linux: tree.join("linux"),
        vmlinux: tree.join("vmlinux"),
        modules: tree.join("modules"),
        dom0: tree.join("dom0"),
    })
}

/// Fetches and unpacks the emulator, unless the cache has it.
fn emulator() -> Result<PathBuf> {
    let cache = cache()?.join("emulator");
    let tree = cache.join("tree");
    once(&tree, EMULATOR_SCRIPT, |dir| {
        say(format!("fetching QEMU of {}", EMULATOR.name()));
        let apt = Apt::new(EMULATOR, &cache.join("apt"), Kind::Binary)?;
        apt.update()?;
        let packed = dir.join("debs");
        apt.download_whole("qemu-system-x86", &packed)?;
        for deb in debs(&packed)? {
            unpack(&deb, dir)?;
        }
        remove_tree(packed)?;
        let script = dir.join("qemu");
        write(&script, EMULATOR_SCRIPT)?;
        run(Command::new("chmod").arg("755").arg(&script)).map(drop)
    })?;
    Ok(tree.join("qemu"))
}

fn find_file(dir: &Path, matches: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir {
            if let Some(found) = find_file(&path, matches) {
                return Some(found);
            }
        } else if matches(&entry.file_name().to_string_lossy()) {
            return Some(path);
        }
    }
    None
}

fn assemble(release: Release, from: &Path, dir: &Path) -> Result<()> {
    let (kernel, hypervisor, dom0) = (dir.join("kernel"), dir.join("hypervisor"), dir.join("dom0"));
    for deb in debs(from)? {
        let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let into = match name.as_str() {
            name if name.starts_with("linux-image-") => &kernel,
            name if name.starts_with("xen-hypervisor-") => &hypervisor,
            _ => &dom0,
        };
        unpack(&deb, into)?;
    }
    // Older packages still bring /lib beside /usr/lib; dom0 has one of each, as installed systems do.
    for name in ["bin", "sbin", "lib", "lib64"] {
        let (top, usr) = (dom0.join(name), dom0.join("usr").join(name));
        make_dir(&usr)?;
        if top.is_dir() && !top.is_symlink() {
            run(Command::new("cp").arg("-a").arg(top.join(".")).arg(&usr))?;
            remove_tree(&top)?;
        }
        if !top.is_symlink() {
            std::os::unix::fs::symlink(format!("usr/{name}"), &top)?;
        }
    }
    for waste in ["usr/share", "usr/lib/python3", "var"] {
        remove_tree(dom0.join(waste))?;
    }
    for name in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "boot",
        "etc/xen",
        "modules",
        "var/log/xen",
        "var/lib/xen",
        "var/lib/xenstored",
        "usr/lib/xen/boot",
    ] {
        make_dir(dom0.join(name))?;
    }
    for (link, target) in [("run", "../run"), ("lock", "../run/lock")] {
        std::os::unix::fs::symlink(target, dom0.join("var").join(link))?;
    }
    write(dom0.join("etc/xen/xl.conf"), XL_CONF)?;
    let modules = dir.join("modules");
    make_dir(&modules)?;
    for module in MODULES {
        let names = [format!("{module}.ko"), format!("{module}.ko.xz")];
        let Some(path) = find_file(&kernel, &|name| names.iter().any(|wanted| wanted == name)) else { continue };
        let bytes = match path.extension().is_some_and(|ext| ext == "xz") {
            true => run(Command::new("xz").arg("-dc").arg(&path))?,
            false => read(&path)?,
        };
        write(modules.join(&names[0]), bytes)?;
    }
    for module in [
        "xen-privcmd",
        "xen-evtchn",
        "xenfs",
        "nvme",
        "e1000e",
        "xhci-pci",
        "usb-storage",
        "xen-pcifront",
        "xen-pciback",
    ] {
        if !modules.join(format!("{module}.ko")).exists() {
            return Err(fail!("the kernel package of {} has no module {module}", release.name()));
        }
    }
    let linux = find_file(&kernel.join("boot"), &|name| name.starts_with("vmlinuz-"))
        .ok_or_else(|| fail!("the kernel package of {} has no vmlinuz", release.name()))?;
    let linux = read(linux)?;
    write(dir.join("vmlinux"), unpacked(&linux)?)?;
    write(dir.join("linux"), linux)?;
    let packed = hypervisor.join(format!("boot/xen-{}-amd64.gz", release.xen()));
    write(dir.join("xen"), run(Command::new("gzip").arg("-dc").arg(packed))?)?;
    remove_tree(kernel)?;
    remove_tree(hypervisor)
}

/// The kernel inside a bzImage: an ELF file. Places by Linux's boot protocol: `setup_sects` (0x1f1), `payload_offset`
/// (0x248) and `payload_length` (0x24c).
fn unpacked(image: &[u8]) -> Result<Vec<u8>> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize).ok_or_else(|| fail!("the kernel is no bzImage"))
    };
    let sectors = usize::from(*image.get(0x1f1).ok_or_else(|| fail!("the kernel is no bzImage"))?);
    let start = (sectors + 1) * 512 + number(0x248)?;
    // The size behind the data is not the packer's.
    let data =
        image.get(start..start + number(0x24c)?.saturating_sub(4)).ok_or_else(|| fail!("the kernel is cut off"))?;
    let (packer, suffix) = match data {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", "xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "zst"),
        [0x1f, 0x8b, ..] => ("gzip", "gz"),
        _ => return Err(fail!("the kernel is packed in a way that is not known: {:02x?}", data.get(..6))),
    };
    let packed = std::env::temp_dir().join(format!("pciback-stubdom-kernel.{}.{suffix}", std::process::id()));
    write(&packed, data)?;
    let elf = run(Command::new(packer).arg("-dc").arg(&packed));
    std::fs::remove_file(&packed).context(packed.display())?;
    let elf = elf?;
    if elf.starts_with(b"\x7fELF") { Ok(elf) } else { Err(fail!("the unpacked kernel is no ELF file")) }
}

/// The include folder of a release's Xen headers (package libxen-dev).
pub fn headers(release: Release) -> Result<PathBuf> {
    let cache = cache()?.join(release.name());
    let dir = cache.join("headers");
    once(&dir, "libxen-dev", |dir| {
        say(format!("{}: fetching Xen's headers", release.name()));
        let apt = Apt::new(release, &cache.join("apt"), Kind::Binary)?;
        apt.update()?;
        apt.download(&["libxen-dev".to_owned()], dir)?;
        for deb in debs(dir)? {
            unpack(&deb, dir)?;
        }
        Ok(())
    })?;
    let include = dir.join("usr/include");
    if include.join("xen/xen.h").exists() {
        Ok(include)
    } else {
        Err(fail!("package libxen-dev of {} has no xen/xen.h", release.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stanzas_of_the_hosts_release_are_kept_and_swapped() {
        let text = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
                    Types: deb\nURIs: http://mirror.example/other\nSuites: cloud-bookworm\nComponents: main\n";
        assert_eq!(
            swap_release(text, true, "bookworm", "trixie", Kind::Binary),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n\n"
        );
    }

    #[test]
    fn one_line_sources_with_options_are_swapped() {
        let text = "# comment\ndeb [arch=amd64 signed-by=/k] http://mirror.example/debian trixie-security main\n\
                    deb http://mirror.example/x nodistro main\ndeb-src http://mirror.example/debian trixie main\n";
        assert_eq!(
            swap_release(text, false, "trixie", "bookworm", Kind::Binary),
            "deb [arch=amd64 signed-by=/k] http://mirror.example/debian bookworm-security main\n"
        );
    }

    #[test]
    fn sources_of_packages_are_derived_from_those_of_binaries() {
        let stanza = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n";
        assert!(swap_release(stanza, true, "bookworm", "trixie", Kind::Source).starts_with("Types: deb-src\n"));
        assert_eq!(
            swap_release("deb http://mirror.example/debian trixie main\n", false, "trixie", "trixie", Kind::Source),
            "deb-src http://mirror.example/debian trixie main\n"
        );
    }
}
