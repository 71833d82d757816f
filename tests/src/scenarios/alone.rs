//! With `mmcfg=0` the driver domain writes for itself. Without dom0's service a guest uses its drive with the interrupt
//! line; the next one, once the service is there, with MSI-X.

use crate::check;
use crate::dom0::{DRIVER, NVME, Outcome, Rig};

/// A guest reads the drive, whose interrupts come with MSI-X or by the line.
fn uses_drive(rig: &mut Rig, name: &str, msix: bool) -> Outcome {
    rig.create_with_drive(name)?;
    rig.check_disk(name, 0, 16)?;
    let lines = rig.interrupt_lines(name, "nvme0q")?;
    check!(
        !lines.is_empty() && lines.iter().all(|line| line.kind.contains("msi-x") == msix),
        "{name}: the drive has {lines:?}"
    );
    check!(lines.iter().any(|line| line.count > 0), "{name}: no interrupt came: {lines:?}");
    rig.must(&format!("xl destroy {name}"))?;
    rig.wait_device(NVME, "ready")
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.stop_serve("TERM")?;
    rig.must(&format!("xl destroy {DRIVER}"))?;
    let alone = rig.start_driver_alone().and_then(|()| {
        check!(rig.published("mode")? == "mmcfg0", "mode is {:?}", rig.published("mode")?);
        uses_drive(rig, "g1", false)
    });
    rig.start_serve()?;
    alone?;
    rig.wait_published("serve", "connected")?;
    uses_drive(rig, "g2", true)
}
