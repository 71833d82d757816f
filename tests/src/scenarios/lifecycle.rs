//! The driver domain ends cleanly by `xl shutdown`, comes back by `xl reboot`, survives `xl destroy`, and serves each time.

use crate::check;
use crate::dom0::{DRIVER, NVME, Outcome, Rig};

fn serves(rig: &mut Rig, name: &str) -> Outcome {
    rig.wait_device(NVME, "ready")?;
    rig.create_with_drive(name)?;
    rig.check_disk(name, 0, 8)?;
    rig.must(&format!("xl destroy {name}"))?;
    rig.wait_device(NVME, "ready")
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let gone = format!("! domid {DRIVER}");
    rig.must(&format!("xl shutdown {DRIVER}"))?;
    rig.wait("xl shutdown to end the driver domain", 60, &gone)?;
    rig.start_driver()?;
    let first = rig.domid(DRIVER)?.unwrap_or_default();

    rig.must(&format!("xl reboot {DRIVER}"))?;
    rig.wait("xl reboot to bring a new driver domain", 60, &format!("id=$(domid {DRIVER}) && [ $id != {first} ]"))?;
    rig.wait_published("state", "ready")?;
    serves(rig, "g1")?;

    rig.must(&format!("xl destroy {DRIVER}"))?;
    rig.wait("xl destroy to end the driver domain", 60, &gone)?;
    let left = rig.run("xenstore-ls -f | grep -e /backend/pci/ -e /device/pci/ || true")?;
    check!(left.is_empty(), "nodes of the destroyed driver domain are left:\n{left}");
    rig.start_driver()?;
    serves(rig, "g2")
}
