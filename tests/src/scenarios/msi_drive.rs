//! A SATA controller, a conventional PCI device with MSI and without MSI-X or a reset of its own: its interrupts arrive
//! by MSI, for two guests in turn.

use crate::check;
use crate::dom0::{AHCI, Guest, Interrupt, Outcome, Rig};
use crate::machine::{SATA_MIB, SATA_SEED, pattern_sum};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    for name in ["g1", "g2"] {
        rig.create(Guest { drivers: "disks", ..Guest::named(name) })?;
        rig.attach(name, AHCI)?;
        rig.wait_up(name, 1)?;
        rig.guest_wait(name, "the drive", 90, "[ -b /dev/sda ]")?;
        let before = rig.interrupt_lines(name, "ahci")?;
        let right = !before.is_empty() && before.iter().all(|line| line.kind == "xen-pirq -pcifront-msi");
        check!(right, "the controller's interrupts are {before:?}");
        let (got, wanted) =
            (rig.guest(name, &format!("rig-agent sum /dev/sda 0 {SATA_MIB}"))?, pattern_sum(SATA_SEED, SATA_MIB));
        check!(got.trim() == wanted, "{name} read {} from the drive, which holds {wanted}", got.trim());
        let count = |lines: &[Interrupt]| lines.iter().map(|line| line.count).sum::<u64>();
        let after = rig.interrupt_lines(name, "ahci")?;
        check!(count(&after) > count(&before), "no interrupt came: {before:?}, {after:?}");
        let status = rig.must(&format!("xl-pciback status {AHCI}"))?;
        check!(status.contains("MSI 1"), "status does not say MSI 1:\n{status}");
        rig.must(&format!("xl destroy {name}"))?;
        rig.wait_device(AHCI, "ready")?;
    }
    Ok(())
}
