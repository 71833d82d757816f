//! The same scenarios with our domain and with Linux's xen-pciback, in one boot and with the same devices and guests, and
//! what came of each, as a table in docs/compare.md. A thing that does not work is a result, not a failure.

use std::fmt::Write as _;

use crate::check;
use crate::dom0::{AHCI, DRIVER, Guest, Interrupt, NIC, NVME, OWNED, Outcome, Rig, Stop, XHCI};
use crate::machine::{SATA_MIB, SATA_SEED, STICK_MIB, STICK_SEED, pattern_sum};
use crate::packages::Release;
use crate::runner::{self, Built};
use crate::scenarios::{Boot, stale_maskall};
use crate::tools::{root, say, tail};

/// Reboots of a guest.
const REBOOTS: u32 = 3;
/// Guests that die while vectors are mapped.
const DEATHS: u32 = 3;

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Ours,
    Linux,
}

impl Backend {
    /// Starts a guest that has a function, and waits until it takes commands.
    fn start(self, rig: &mut Rig, name: &str, bdf: &str, extra: &str) -> Outcome {
        match self {
            Backend::Ours => {
                rig.create(Guest { extra, drivers: "all", ..Guest::named(name) })?;
                rig.attach(name, bdf)?;
            }
            Backend::Linux => {
                let (code, said) =
                    rig.try_create(Guest { extra, drivers: "all", pci: Some(bdf), ..Guest::named(name) })?;
                check!(code == 0, "the guest does not start: {}", cause(&said));
            }
        }
        rig.wait_up(name, 1)
    }

    /// Ends a guest, and waits until its function can be given to another.
    fn end(self, rig: &mut Rig, name: &str, bdf: &str) -> Outcome {
        rig.must(&format!("xl destroy {name}"))?;
        match self {
            Backend::Ours => rig.wait_device(bdf, "ready"),
            Backend::Linux => {
                rig.wait(&format!("{bdf} to be assignable"), 60, &format!("xl pci-assignable-list | grep -q {bdf}"))
            }
        }
    }
}

/// The line that tells why xl failed.
fn cause(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    let told = lines.iter().find(|line| line.contains("failed (") || line.contains("failed:")).or(lines.last());
    told.map_or_else(String::new, |line| line.trim_start_matches("libxl: error: ").trim().to_owned())
}

/// One row: what is compared, and how it is found out.
type Row = (&'static str, fn(&mut Rig, Backend) -> Outcome<String>);

/// The last may leave a device unusable.
const ROWS: [Row; 8] = [
    ("NVMe drive: its interrupts, and how many came while each of 2 processors read 16 MiB", nvme),
    ("NVMe drive: its interrupts after the guest has rebooted 3 times", reboots),
    ("e1000e network card", card),
    ("e1000e network card with `pci=nomsi` in the guest", card_line),
    ("SATA controller (conventional PCI, MSI): the drive is read", sata),
    ("xHCI controller: a USB stick is read", usb),
    ("3 guests destroyed while their drive's driver is bound and unbound without a pause; the next guest", deaths),
    ("`stale-maskall`: memory decode of a card in use goes off, its guest is destroyed; the next guest", stale),
];

/// What a driver's interrupts are.
fn kinds(lines: &[Interrupt]) -> String {
    let of = |kind: &str| lines.iter().filter(|line| line.kind.ends_with(kind)).count();
    match (of("msi-x"), of("-msi"), lines.len()) {
        (_, _, 0) => "none".into(),
        (n, _, all) if n == all => format!("MSI-X, {n} vectors"),
        (_, n, all) if n == all => format!("MSI, {n} vector"),
        (0, 0, _) => "the interrupt line".into(),
        _ => format!("{lines:?}"),
    }
}

fn total(lines: &[Interrupt]) -> u64 {
    lines.iter().map(|line| line.count).sum()
}

fn nvme(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    backend.start(rig, "g1", NVME, "")?;
    rig.wait_disk("g1")?;
    let mut counts = Vec::new();
    let mut before = rig.interrupt_lines("g1", "nvme0q")?;
    for mask in [1, 2] {
        rig.guest("g1", &format!("taskset {mask} rig-agent sum /dev/nvme0n1 {} 16", 16 * mask))?;
        let after = rig.interrupt_lines("g1", "nvme0q")?;
        for (line, old) in after.iter().zip(&before) {
            if line.count > old.count {
                counts.push(format!("{} +{}", line.name, line.count - old.count));
            }
        }
        before = after;
    }
    rig.check_disk("g1", 0, 16)?;
    backend.end(rig, "g1", NVME)?;
    Ok(format!("{} ({})", kinds(&before), counts.join(", ")))
}

fn reboots(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    backend.start(rig, "g1", NVME, "")?;
    for reboot in 1..=REBOOTS {
        rig.wait_disk("g1")?;
        let old = rig.domid("g1")?.unwrap_or_default();
        rig.guest("g1", "(sleep 0.2; reboot -f) >/dev/null 2>&1 & echo soon")?;
        rig.wait("g1's new domain", 90, &format!("id=$(domid g1) && [ $id != {old} ]"))?;
        if backend == Backend::Ours {
            rig.attach("g1", NVME)?;
        }
        rig.wait_up("g1", reboot + 1)?;
    }
    rig.wait_disk("g1")?;
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    rig.check_disk("g1", 0, 16)?;
    backend.end(rig, "g1", NVME)?;
    Ok(kinds(&lines))
}

fn use_card(rig: &mut Rig, backend: Backend, name: &str, extra: &str) -> Outcome<String> {
    backend.start(rig, name, NIC, extra)?;
    rig.ping(name)?;
    let lines = rig.interrupt_lines(name, "eth0")?;
    check!(total(&lines) > 0, "no interrupt arrives");
    Ok(format!("{}; link up, pings answered", kinds(&lines)))
}

fn card(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    let said = use_card(rig, backend, "g1", "")?;
    backend.end(rig, "g1", NIC).map(|()| said)
}

fn card_line(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    let said = use_card(rig, backend, "g1", "pci=nomsi")?;
    backend.end(rig, "g1", NIC).map(|()| said)
}

/// Reads a whole disk at /dev/sda, and tells of its driver's interrupts.
fn disk(rig: &mut Rig, backend: Backend, bdf: &str, driver: &str, mib: u64, seed: u64) -> Outcome<String> {
    backend.start(rig, "g1", bdf, "")?;
    rig.guest_wait("g1", "the disk", 90, "[ -b /dev/sda ]")?;
    let got = rig.guest("g1", &format!("rig-agent sum /dev/sda 0 {mib}"))?;
    check!(got.trim() == pattern_sum(seed, mib), "what was read is wrong");
    let lines = rig.interrupt_lines("g1", driver)?;
    backend.end(rig, "g1", bdf)?;
    Ok(format!("{}; data right", kinds(&lines)))
}

fn sata(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    disk(rig, backend, AHCI, "ahci", SATA_MIB, SATA_SEED)
}

fn usb(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    disk(rig, backend, XHCI, "xhci_hcd", STICK_MIB, STICK_SEED)
}

fn deaths(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    let before = rig.guest_irqs()?.len();
    for death in 1..=DEATHS {
        backend.start(rig, "g1", NVME, "")?;
        rig.wait_disk("g1")?;
        rig.guest("g1", crate::scenarios::killed_enabling::REBIND)?;
        rig.run(&format!("usleep {}", 500_000 + 230_000 * death))?;
        backend.end(rig, "g1", NVME)?;
    }
    backend.start(rig, "g2", NVME, "")?;
    rig.wait_disk("g2")?;
    rig.check_disk("g2", 0, 8)?;
    let lines = rig.interrupt_lines("g2", "nvme0q")?;
    backend.end(rig, "g2", NVME)?;
    rig.wait("Xen to be done with the guests", 30, crate::scenarios::killed_enabling::NO_GUESTS)?;
    let left = rig.guest_irqs()?.len() as i64 - before as i64;
    Ok(format!("{}; {left} interrupts of Xen's are left over", kinds(&lines)))
}

fn stale(rig: &mut Rig, backend: Backend) -> Outcome<String> {
    use_card(rig, backend, "g1", "")?;
    stale_maskall::no_decode(rig)?;
    // As in the scenario: our domain is late, so that Xen meets the card without memory decode. Linux's always is.
    if backend == Backend::Ours {
        rig.must(&format!("xl pause {DRIVER}"))?;
    }
    let destroyed = rig.must("xl destroy g1").and_then(|_| rig.wait("g1 to be gone", 60, "! domid g1"));
    let control = rig.msix_control(NIC, stale_maskall::CAPABILITY);
    if backend == Backend::Ours {
        rig.must(&format!("xl unpause {DRIVER}"))?;
        rig.wait_device(NIC, "ready")?;
    }
    destroyed?;
    let control = control?;
    let outcome = match use_card(rig, backend, "g2", "") {
        Ok(said) => said,
        Err(Stop::Failure(why)) => format!("**{why}**"),
        Err(stop) => return Err(stop),
    };
    Ok(format!("{outcome} (Message Control was {control} in between)"))
}

/// All rows of one backend.
fn column(rig: &mut Rig, backend: Backend) -> Outcome<Vec<String>> {
    let mut cells = Vec::new();
    for (name, measure) in ROWS {
        say(format!("{backend:?}: {name}"));
        let cell = match measure(rig, backend) {
            Ok(said) => said,
            // One line; the rest is in the logs.
            Err(Stop::Failure(why)) => format!("**fails**: {}", why.lines().next().unwrap_or_default()),
            Err(stop) => return Err(stop),
        };
        say(format!("  {cell}"));
        cells.push(cell);
        // Whatever became of it, the next starts without guests.
        rig.run("for d in $(xl list | awk 'NR > 1 && $2 != 0 {print $1}' | grep ^g); do xl destroy $d; done; rm -f /var/log/xen/guest-g*.log")?;
    }
    Ok(cells)
}

/// Runs the comparison and writes docs/compare.md.
pub fn run(built: &Built, release: Release) -> Outcome {
    let mut rig = runner::boot(built, release, Boot::Changed, "")?;
    let kernel = rig.run("uname -r")?;
    let ours = column(&mut rig, Backend::Ours)?;

    let owned = OWNED.join(" ");
    rig.must(&format!("xl shutdown -w {DRIVER}; xl-pciback assignable-remove --no-rebind {owned}"))?;
    rig.must(&format!(
        "insmod /modules/xen-pciback.ko; for d in {owned}; do xl pci-assignable-add $d || exit 1; done"
    ))?;
    let theirs = column(&mut rig, Backend::Linux)?;
    let said = rig
        .run("xl dmesg | grep -iE 'cannot (mask|disable) IRQ' | tail -2; dmesg | grep -i 'error enabling' | tail -2")?;

    let mut text = format!(
        "# Compared with Linux's xen-pciback\n\nWritten by `cargo xtask compare`: the same scenarios in one boot of Xen {} (with the config-owner \
         change, which Linux's\nbackend does not use), with the same emulated devices and PV guests of Linux {} with 2 processors. Left as \
         measured.\n\n| scenario | this project | Linux's xen-pciback |\n| --- | --- | --- |\n",
        release.xen(),
        kernel.trim(),
    );
    for ((name, _), (ours, theirs)) in ROWS.iter().zip(ours.iter().zip(&theirs)) {
        let _ = writeln!(text, "| {name} | {ours} | {theirs} |");
    }
    let _ = writeln!(
        text,
        "\nOne scenario of the rig has no counterpart here: a function that is not the backend's own. A driver domain gets -EPERM \
         from Xen\nfor it and says so (`foreign`); Linux's backend runs in dom0, to which all functions belong.\n\nWhat Xen and dom0 said in \
         Linux's run:\n\n    {}",
        tail(&said, 4).lines().collect::<Vec<_>>().join("\n    ")
    );
    let path = root().join("docs/compare.md");
    std::fs::write(&path, &text).map_err(|error| Stop::Error(error.to_string()))?;
    println!("\n{text}\nwritten to {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_told_apart() {
        let line = |kind: &str| Interrupt { count: 1, kind: kind.into(), name: "x".into() };
        let msix = line("xen-pirq -pcifront-msi-x");
        assert_eq!(kinds(&[msix.clone(), msix]), "MSI-X, 2 vectors");
        assert_eq!(kinds(&[line("xen-pirq -pcifront-msi")]), "MSI, 1 vector");
        assert_eq!(kinds(&[line("xen-pirq -pcifront")]), "the interrupt line");
        assert_eq!(kinds(&[]), "none");
    }

    #[test]
    fn xls_reason_is_found() {
        let said = "Parsing config\nlibxl: error: libxl_pci.c:1496:pci_add_dm_done: xc_assign_device failed: Device busy\nlibxl: error: x";
        assert!(cause(said).ends_with("failed: Device busy"));
    }
}
