//! A device is detached from a running guest and attached again.

use crate::check;
use crate::dom0::{Guest, NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_and_wait(Guest::named("g1"))?;
    for round in 1..=2 {
        rig.attach("g1", NVME)?;
        rig.wait_disk("g1")?;
        rig.check_disk("g1", 0, 8)?;
        rig.must(&format!("xl-pciback detach g1 {NVME}"))?;
        rig.guest_wait("g1", "its drive to leave", 30, "[ ! -e /dev/nvme0n1 ]")?;
        rig.wait_device(NVME, "ready")?;
        let left = rig.guest("g1", "ls /sys/bus/pci/devices")?;
        check!(left.trim().is_empty(), "after detach {round} the guest still has {left}");
    }
    let domid = rig.domid("g1")?.unwrap_or_default();
    let left = rig
        .run(&format!("xenstore-ls -f | grep -e /backend/pci/{domid}/ -e /local/domain/{domid}/device/pci/ || true"))?;
    check!(left.is_empty(), "detach left nodes behind:\n{left}");
    Ok(())
}
