//! One guest gets two functions, the second while it runs and uses the first.

use crate::dom0::{Guest, NIC, NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest { drivers: "all", ..Guest::named("g1") })?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    rig.guest("g1", "rig-agent hammer /dev/nvme0n1 >/dev/null 2>&1 & echo started")?;
    rig.attach("g1", NIC)?;
    rig.ping("g1")?;
    rig.must(&format!("xl-pciback detach g1 {NIC}"))?;
    rig.guest_wait("g1", "its network card to leave", 30, "[ ! -e /sys/class/net/eth0 ]")?;
    rig.wait_device(NIC, "ready")?;
    rig.check_disk("g1", 0, 16)
}
