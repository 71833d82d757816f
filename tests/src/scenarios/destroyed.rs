//! A guest is destroyed in the middle of I/O; the next guest gets the device in a clean state and reads right data.

use crate::dom0::{NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    rig.guest("g1", "rig-agent hammer /dev/nvme0n1 >/dev/null 2>&1 & echo started")?;
    rig.guest_wait("g1", "reads", 30, "[ $(awk '{print $1}' /sys/block/nvme0n1/stat) -gt 50 ]")?;
    rig.must("xl destroy g1")?;
    rig.wait_device(NVME, "ready")?;
    rig.create_with_drive("g2")?;
    rig.check_disk("g2", 0, 32)
}
