//! Measures the driver domain beside Linux's xen-pciback in dom0: same boot, same guest, same drive. Under software
//! emulation a figure alone says little; the ratio of two from one run is what counts.

use std::fmt::Write as _;
use std::time::Instant;

use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig, Stop};
use crate::packages::Release;
use crate::runner::{self, Built};
use crate::scenarios::Boot;
use crate::tools::{root, say};

/// Accesses a measurement makes.
const READS: u64 = 10_240;
const WRITES: u64 = 2_048;

/// What is measured of either backend.
struct Figures {
    read_us: f64,
    write_us: f64,
    attach_ms: f64,
}

/// Runs the bench and writes docs/bench.md.
pub fn run(built: &Built, release: Release) -> Outcome {
    let mut rig = runner::boot(built, release, Boot::Writable, "")?;
    let size = std::fs::metadata(&built.image).map_err(|error| Stop::Error(error.to_string()))?.len();
    let ready: u64 = rig.published("ready-cpu-us")?.parse().unwrap_or(0);
    rig.create_and_wait(Guest::named("g1"))?;

    say("measuring the driver domain");
    let start = Instant::now();
    rig.must(&format!("xl-pciback attach g1 {NVME}"))?;
    let base = format!("/local/domain/$(xl domid {DRIVER})/backend/pci/$(xl domid g1)/0");
    let ours = measure(&mut rig, start, &base)?;
    let calls = hypercalls(&mut rig)?;
    rig.must(&format!("xl-pciback detach g1 {NVME}"))?;
    rig.must(&format!("xl destroy {DRIVER}; xl-pciback assignable-remove --no-rebind {NVME}"))?;

    say("measuring Linux's xen-pciback");
    rig.must(&format!("insmod /modules/xen-pciback.ko && xl pci-assignable-add {NVME}"))?;
    let start = Instant::now();
    rig.must(&format!("xl pci-attach g1 {NVME}"))?;
    let theirs = measure(&mut rig, start, "/local/domain/0/backend/pci/$(xl domid g1)/0")?;

    let mut text = format!(
        "# Measured beside Linux's xen-pciback\n\nWritten by `cargo xtask bench` on Xen {}. Both backends served the same guest (PV Linux, 2 vCPUs) and the same\n\
         emulated NVMe drive in one boot under QEMU's software emulation with `mmcfg=0`; only the ratios mean something elsewhere.\n\n\
         | figure | driver domain | xen-pciback | ratio | bound |\n| --- | ---: | ---: | ---: | --- |\n",
        release.xen()
    );
    for (name, ours, theirs, bound) in [
        ("config dword read, us", ours.read_us, theirs.read_us, "0.5"),
        ("config dword write, us", ours.write_us, theirs.write_us, ""),
        ("attach command to Connected, ms", ours.attach_ms, theirs.attach_ms, ""),
    ] {
        let _ = writeln!(text, "| {name} | {ours:.1} | {theirs:.1} | {:.2} | {bound} |", ours / theirs);
    }
    let _ = writeln!(text, "| hypercalls an access | {calls:.2} | | | 2 |");
    let _ = writeln!(text, "| image, stripped, bytes | {size} | | | 262144 |");
    let _ = writeln!(text, "| memory, MiB | 4 | | | 4 |");
    let _ = writeln!(text, "| CPU from entry to ready, us | {ready} | | | 20000 |");
    let _ = writeln!(
        text,
        "\nReads: {READS} dwords at offset 0 of the configuration file in sysfs; writes: {WRITES} of the dword at 0x0c with the value it has.\n\
         Hypercalls are counted by the image itself (`data/pciback/report`), the report's own subtracted."
    );
    let path = root().join("docs/bench.md");
    std::fs::write(&path, &text).map_err(|error| Stop::Error(error.to_string()))?;
    println!("\n{text}\nwritten to {}", path.display());
    Ok(())
}

/// Waits for Connected, then times accesses in the guest.
fn measure(rig: &mut Rig, start: Instant, base: &str) -> Outcome<Figures> {
    rig.wait("Connected", 60, &format!("[ \"$(xenstore-read {base}/state)\" = 4 ]"))?;
    let attach_ms = start.elapsed().as_secs_f64() * 1000.0;
    rig.wait_disk("g1")?;
    let file = "/sys/bus/pci/devices/0000:00:00.0/config";
    let mut time = |what: &str, offset: &str, count: u64| -> Outcome<f64> {
        let said = rig.guest("g1", &format!("rig-agent {what} {file} {offset} {count}"))?;
        let nanos: f64 = said.trim().parse().map_err(|_| Stop::Error(format!("{what}: {said:?}")))?;
        Ok(nanos / 1000.0)
    };
    Ok(Figures { read_us: time("config-read", "0", READS)?, write_us: time("config-write", "12", WRITES)?, attach_ms })
}

/// Hypercalls of the driver domain for one access.
fn hypercalls(rig: &mut Rig) -> Outcome<f64> {
    let first = rig.report()?;
    let second = rig.report()?;
    rig.guest("g1", &format!("rig-agent config-read /sys/bus/pci/devices/0000:00:00.0/config 0 {READS}"))?;
    let third = rig.report()?;
    let own = second.hypercalls - first.hypercalls;
    let all = (third.hypercalls - second.hypercalls).saturating_sub(own);
    Ok(all as f64 / READS as f64)
}
