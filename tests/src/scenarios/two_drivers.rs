//! Two driver domains list the same drive. The elder has it: its guest goes on undisturbed, and the younger one's guest
//! gets nothing. When the elder has gone, with its guest, the younger has the drive and keeps its promise.

use crate::check;
use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig};

const YOUNGER: &str = "pciback1";

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    rig.guest("g1", "(while rig-agent sum /dev/nvme0n1 0 8; do :; done) >/tmp/sums 2>&1 & echo $! >/tmp/reader")?;
    rig.must(&format!(
        "xl-pciback config --name {YOUNGER} --guest g2 {NVME} > /tmp/{YOUNGER}.cfg; xl create -q /tmp/{YOUNGER}.cfg"
    ))?;
    let shown = contest(rig);
    rig.run(&format!("xl destroy g2; xl destroy {YOUNGER}"))?;
    shown
}

fn contest(rig: &mut Rig) -> Outcome {
    let said = format!("{NVME}: another driver domain has it: \"{YOUNGER}\" cannot");
    rig.wait("the service to say whose the drive is", 60, &format!("grep -qF '{said}' /var/log/serve.log"))?;
    rig.create_and_wait(Guest::named("g2"))?;
    rig.check_disk("g1", 8, 8)?;
    let sums = rig.guest("g1", "kill $(cat /tmp/reader); sort -u /tmp/sums | wc -l")?;
    check!(sums.trim() == "1", "the elder's guest read {} different sums", sums.trim());
    let seen = rig.guest("g2", "ls /sys/bus/pci/devices")?;
    check!(seen.trim().is_empty(), "the younger one's guest has {seen}");

    // A driver domain that is destroyed while it resets a function leaves it without addresses; that is another matter.
    rig.must("xl destroy g1")?;
    rig.wait_device(NVME, "ready")?;
    rig.must(&format!("xl destroy {DRIVER}"))?;
    rig.wait_disk("g2")?;
    rig.check_disk("g2", 0, 16)?;
    let lines = rig.interrupt_lines("g2", "nvme0q")?;
    check!(lines.len() == 3 && lines.iter().all(|line| line.kind.contains("msi-x")), "its drive has {lines:?}");
    Ok(())
}
