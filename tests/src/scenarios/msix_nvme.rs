//! A drive gets MSI-X through our domain's own hypercalls: one vector for commands and one queue a processor, and both
//! queues' interrupts come while that processor reads.

use crate::check;
use crate::dom0::{Interrupt, NVME, Outcome, Rig, device_node};

/// The drive's interrupts, in the order of its queues.
fn queues(rig: &mut Rig) -> Outcome<Vec<Interrupt>> {
    let mut lines = rig.interrupt_lines("g1", "nvme0q")?;
    lines.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(lines)
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let mode = rig.published("mode")?;
    check!(mode == rig.boot.mode(), "mode is {mode:?}: {}", rig.published("mode-why")?);
    rig.create_with_drive("g1")?;
    let before = queues(rig)?;
    let names: Vec<&str> = before.iter().map(|line| line.name.as_str()).collect();
    check!(names == ["nvme0q0", "nvme0q1", "nvme0q2"], "the drive's interrupts are {before:?}");
    check!(before.iter().all(|line| line.kind.contains("msi-x")), "not all are MSI-X: {before:?}");
    rig.guest("g1", "taskset 1 rig-agent sum /dev/nvme0n1 0 16 && taskset 2 rig-agent sum /dev/nvme0n1 16 16")?;
    rig.check_disk("g1", 0, 64)?;
    let after = queues(rig)?;
    for queue in [1, 2] {
        let counts = (before.get(queue).map(|line| line.count), after.get(queue).map(|line| line.count));
        check!(
            counts.0 < counts.1,
            "queue {queue} had {:?} interrupts before its reads and {:?} after",
            counts.0,
            counts.1
        );
    }
    let polled = rig.guest("g1", "dmesg | grep -c polled || true")?;
    check!(polled.trim() == "0", "the drive's driver lost interrupts: {polled} completions were polled");
    rig.wait_published(&device_node(NVME, "interrupts"), "\"MSI-X 3\"")?;
    let status = rig.must(&format!("xl-pciback status {NVME}"))?;
    for part in ["in-use", "MSI-X 3", "65 entries", "reset             flr", &format!("mode {mode}")] {
        check!(status.contains(part), "status does not say {part:?}:\n{status}");
    }
    // Linux frees its first vector before it asks for all; that it does so with the operation for MSI must not matter.
    let log = rig.driver_log()?;
    check!(
        log.contains("MSI-X on, 3 vectors, mapped by map_pirq"),
        "the driver domain does not say who mapped:\n{log}"
    );
    Ok(())
}
