//! A guest reboots: it comes back with a new number, its device is attached again and works.

use crate::check;
use crate::dom0::{NVME, Outcome, Rig, device_node};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let first = rig.create_with_drive("g1")?;
    rig.check_disk("g1", 0, 8)?;
    rig.guest("g1", "(sleep 1; reboot -f) >/dev/null 2>&1 & echo soon")?;
    rig.wait("g1's new domain", 60, &format!("id=$(domid g1) && [ $id != {first} ]"))?;
    rig.wait_device(NVME, "ready")?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 2)?;
    rig.wait_disk("g1")?;
    let second = rig.domid("g1")?.map(|id| id.to_string()).unwrap_or_default();
    let frontend = rig.published(&device_node(NVME, "frontend"))?;
    check!(frontend == second, "the device says frontend {frontend}, g1 is domain {second}");
    rig.check_disk("g1", 0, 32)
}
