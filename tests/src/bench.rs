//! Measures the driver domain beside Linux's xen-pciback in dom0: same boot, same guest, same drive. Under software
//! emulation a figure alone says little; the ratio of two from one run is what counts.

use std::fmt::Write as _;
use std::time::Instant;

use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig, Stop};
use crate::packages::Release;
use crate::runner::{self, Built};
use crate::scenarios::Boot;
use crate::tools::{root, say};

/// Accesses in one batch, and batches in a measurement: the median batch counts, the quickest and slowest show the noise.
const READS: u64 = 2_048;
const WRITES: u64 = 1_024;
const BATCHES: usize = 5;
/// Starts of the driver domain after the first.
const STARTS: usize = 5;

/// What is measured of either backend.
struct Figures {
    read: Spread,
    write: Spread,
    attach_ms: f64,
}

/// Microseconds, by batch or start.
#[derive(Clone, Copy)]
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(mut batches: Vec<f64>) -> Self {
        batches.sort_by(f64::total_cmp);
        let at = |n: usize| batches.get(n).copied().unwrap_or(f64::NAN);
        Self { least: at(0), median: at(batches.len() / 2), most: at(batches.len().saturating_sub(1)) }
    }

    fn text(self) -> String {
        format!("{:.1} ({:.1} to {:.1})", self.median, self.least, self.most)
    }
}

/// A bound, and whether a figure keeps it.
fn judged(figure: f64, bound: f64) -> String {
    format!("{bound}, {}", if figure <= bound { "kept" } else { "**missed**" })
}

/// Runs the bench and writes docs/bench.md.
pub fn run(built: &Built, release: Release, boot: Boot) -> Outcome {
    let mut rig = runner::boot(built, release, boot, "")?;
    let size = std::fs::metadata(&built.image).map_err(|error| Stop::Error(error.to_string()))?.len();
    let number = |text: String| text.trim().parse::<f64>().map_err(|_| Stop::Error(format!("not a number: {text:?}")));
    // The first start of a boot is also the emulator's: it translates the image, and the part of Xen that runs it.
    let first_ready = rig.ready_cpu()? as f64;
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        rig.must(&format!("xl destroy {DRIVER}"))?;
        rig.start_driver()?;
        starts.push(rig.ready_cpu()? as f64);
    }
    let ready = Spread::of(starts);
    let memory = number(rig.run(&format!("xl list {DRIVER} | awk 'NR == 2 {{print $3}}'"))?)?;
    rig.create_and_wait(Guest::named("g1"))?;

    let mut modes = vec![ours(&mut rig)?];
    if boot == Boot::Writable {
        // The same, with every write by dom0.
        rig.must(&format!("xl destroy {DRIVER}; sed -i 's/ mode=mmcfg0//' /tmp/{DRIVER}.cfg"))?;
        rig.start_driver()?;
        modes.push(ours(&mut rig)?);
    }
    rig.must(&format!("xl destroy {DRIVER}; xl-pciback assignable-remove --no-rebind {NVME}"))?;

    say("measuring Linux's xen-pciback");
    rig.must(&format!("insmod /modules/xen-pciback.ko && xl pci-assignable-add {NVME}"))?;
    let start = Instant::now();
    rig.must(&format!("xl pci-attach g1 {NVME}"))?;
    let theirs = measure(&mut rig, start, "/local/domain/0/backend/pci/$(domid g1)/0")?;

    let mut text = format!(
        "# Measured beside Linux's xen-pciback\n\nWritten by `cargo xtask bench` on Xen {}. Both backends served the same guest (PV Linux, 2 vCPUs) and the same\n\
         emulated NVMe drive in one boot of {} under QEMU's software emulation with two processors; the driver\n\
         domain runs on the second one only, because of the emulator (CONTRIBUTING.md). Only the ratios mean something elsewhere.\n\n\
         | figure | driver domain | xen-pciback | ratio | bound |\n| --- | ---: | ---: | ---: | --- |\n",
        release.xen(),
        match boot {
            Boot::Writable => "the release's own Xen with `mmcfg=0`",
            Boot::Plain => "the release's own Xen",
            Boot::Changed => "Xen with the config-owner change (mode direct)",
        }
    );
    // One table a mode: the modes have bounds of their own.
    let Some(Ours { calls, .. }) = modes.first() else { return Err(Stop::Error("no mode was measured".into())) };
    let calls = *calls;
    for Ours { mode, figures, .. } in &modes {
        let ratio = |ours: Spread, theirs: Spread| ours.median / theirs.median;
        let (read, write) = (ratio(figures.read, theirs.read), ratio(figures.write, theirs.write));
        let write_bound = if mode == "delegated" { judged(write, 1.5) } else { String::new() };
        for (name, ours, theirs, ratio, bound) in [
            ("read", figures.read.text(), theirs.read.text(), read, judged(read, 0.5)),
            ("write", figures.write.text(), theirs.write.text(), write, write_bound),
            (
                "attach",
                format!("{:.0}", figures.attach_ms),
                format!("{:.0}", theirs.attach_ms),
                figures.attach_ms / theirs.attach_ms,
                String::new(),
            ),
        ] {
            let what = match name {
                "attach" => "attach command to Connected, ms".to_owned(),
                "read" => "config dword read, us".to_owned(),
                _ => "config byte write, us".to_owned(),
            };
            let _ = writeln!(text, "| {what}, mode {mode} | {ours} | {theirs} | {ratio:.2} | {bound} |");
        }
    }
    let mut row = |name: &str, ours: String, bound: String| {
        let _ = writeln!(text, "| {name} | {ours} | | | {bound} |");
    };
    let mut alone = |name: &str, figure: f64, places: usize, bound: f64| {
        row(name, format!("{figure:.places$}"), judged(figure, bound));
    };
    alone("hypercalls an access", calls, 2, 2.0);
    alone("image, stripped, bytes", size as f64, 0, 262_144.0);
    alone("memory, MiB", memory, 0, 4.0);
    alone("CPU from entry to ready, us, first start of a boot", first_ready, 0, 20_000.0);
    row("the same, later starts", ready.text(), judged(ready.median, 20_000.0));
    let _ = writeln!(
        text,
        "\nReads: {BATCHES} batches of {READS} dwords at offset 0 of the configuration file in sysfs; writes: {BATCHES} batches of \
         {WRITES} of the byte at 0x0c\n(cache line size) with two values in turn, so that each reaches the hardware; the median batch, and the quickest and slowest. Attach and the first start \
         are single figures, later starts the\nmedian of {STARTS}; CPU time is noisy, as Xen counts what the emulated processor was kept from \
         doing too, and the first start\nincludes the emulator's translation of the image and of the part of Xen that runs it. Hypercalls \
         are counted by the image itself\n(`data/pciback/report`), the report's own subtracted."
    );
    let path = root().join("docs/bench.md");
    std::fs::write(&path, &text).map_err(|error| Stop::Error(error.to_string()))?;
    println!("\n{text}\nwritten to {}", path.display());
    Ok(())
}

/// What is measured of the driver domain in one mode.
struct Ours {
    mode: String,
    figures: Figures,
    /// Hypercalls an access.
    calls: f64,
}

/// Measures the driver domain as it runs.
fn ours(rig: &mut Rig) -> Outcome<Ours> {
    let mode = rig.published("mode")?;
    say(format!("measuring the driver domain, mode {mode}"));
    let start = Instant::now();
    rig.must(&format!("xl-pciback attach g1 {NVME}"))?;
    let base = format!("/local/domain/$(domid {DRIVER})/backend/pci/$(domid g1)/0");
    let figures = measure(rig, start, &base)?;
    let calls = hypercalls(rig)?;
    rig.must(&format!("xl-pciback detach g1 {NVME}"))?;
    Ok(Ours { mode, figures, calls })
}

/// Waits for Connected, then times accesses in the guest.
fn measure(rig: &mut Rig, start: Instant, base: &str) -> Outcome<Figures> {
    rig.wait("Connected", 60, &format!("[ \"$(xenstore-read {base}/state)\" = 4 ]"))?;
    let attach_ms = start.elapsed().as_secs_f64() * 1000.0;
    rig.wait_disk("g1")?;
    let file = "/sys/bus/pci/devices/0000:00:00.0/config";
    let mut time = |what: &str, offset: &str, count: u64| -> Outcome<Spread> {
        let mut batches = Vec::new();
        for _ in 0..BATCHES {
            let said = rig.guest("g1", &format!("rig-agent {what} {file} {offset} {count}"))?;
            let nanos: f64 = said.trim().parse().map_err(|_| Stop::Error(format!("{what}: {said:?}")))?;
            batches.push(nanos / 1000.0);
        }
        Ok(Spread::of(batches))
    };
    Ok(Figures { read: time("config-read", "0", READS)?, write: time("config-change", "12", WRITES)?, attach_ms })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_batch_counts() {
        let spread = Spread::of(vec![5.0, 1.0, 300.0, 3.0, 4.0]);
        assert_eq!(spread.text(), "4.0 (1.0 to 300.0)");
    }

    #[test]
    fn a_missed_bound_is_said() {
        assert_eq!(judged(0.5, 0.5), "0.5, kept");
        assert_eq!(judged(0.71, 0.5), "0.5, **missed**");
    }
}
