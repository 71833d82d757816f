//! A guest that binds and unbinds its drive's driver without a pause, so that vectors are always being mapped or
//! unmapped, is destroyed in the middle of it, again and again. The drive comes back each time, and nothing leaks.

use crate::check;
use crate::dom0::{NVME, Outcome, Rig};

/// Binds and unbinds the drive's driver for ever.
pub(crate) const REBIND: &str = "cd /sys/bus/pci/drivers/nvme; d=$(echo 0000:*); \
     (while :; do echo $d >unbind; echo $d >bind; done) >/dev/null 2>&1 & echo started";
/// Whether no guest is left, not even one that is dying.
pub(crate) const NO_GUESTS: &str = "! xl list | awk 'NR > 1 && $1 !~ /^(Domain-0|pciback0)$/ {print $1}' | grep -q .";

pub(super) fn three(rig: &mut Rig) -> Outcome {
    guests(rig, 3)
}

pub(super) fn twelve(rig: &mut Rig) -> Outcome {
    guests(rig, 12)
}

/// Has so many guests die.
fn guests(rig: &mut Rig, number: u32) -> Outcome {
    let before = rig.guest_irqs()?;
    for guest in 1..=number {
        let name = format!("g{guest}");
        rig.create_with_drive(&name)?;
        rig.guest(&name, REBIND)?;
        // Somewhere in it: each round takes a good part of a second here.
        rig.run(&format!("usleep {}", 500_000 + 170_000 * (guest % 7)))?;
        rig.must(&format!("xl destroy {name}"))?;
        rig.wait_device(NVME, "ready")?;
    }
    rig.wait("Xen to be done with the guests", 30, NO_GUESTS)?;
    let after = rig.guest_irqs()?;
    check!(before.len() == after.len(), "Xen's interrupts of messages before:\n{before:#?}\nand after:\n{after:#?}");
    rig.create_with_drive("g0")?;
    let lines = rig.interrupt_lines("g0", "nvme0q")?;
    check!(lines.len() == 3 && lines.iter().all(|line| line.kind.contains("msi-x")), "the next guest has {lines:?}");
    rig.check_disk("g0", 0, 16)
}
