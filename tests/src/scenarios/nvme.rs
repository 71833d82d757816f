//! A guest uses an NVMe drive: what it reads is what the image holds, what it writes arrives, interrupts come.

use crate::check;
use crate::dom0::{NVME, Outcome, Rig};
use crate::machine::pattern_sum;

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    rig.wait_device(NVME, "in-use")?;
    let before = rig.interrupts("g1", "nvme")?;
    rig.check_disk("g1", 0, 64)?;
    rig.guest("g1", "rig-agent pattern /dev/nvme0n1 96 16 4711")?;
    let (wanted, got) = (pattern_sum(4711, 16), rig.machine.disk_sum(96, 16)?);
    check!(got == wanted, "the guest wrote 16 MiB with sum {wanted}, the image has {got}");
    let after = rig.interrupts("g1", "nvme")?;
    check!(after > before, "no interrupt came: {before} before, {after} after 80 MiB");
    let polled = rig.guest("g1", "dmesg | grep -c polled || true")?;
    check!(polled.trim() == "0", "the drive's driver lost interrupts: {polled} completions were polled");
    Ok(())
}
