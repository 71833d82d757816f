//! A guest has a USB controller with MSI-X, and reads and writes the stick behind it.

use crate::check;
use crate::dom0::{Guest, Outcome, Rig, XHCI};
use crate::machine::{STICK_MIB, STICK_SEED, pattern_sum};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest { drivers: "disks", ..Guest::named("g1") })?;
    rig.attach("g1", XHCI)?;
    rig.wait_up("g1", 1)?;
    rig.guest_wait("g1", "the stick", 90, "[ -b /dev/sda ]")?;
    let before = rig.interrupt_lines("g1", "xhci_hcd")?;
    check!(
        !before.is_empty() && before.iter().all(|line| line.kind.contains("msi-x")),
        "the controller's interrupts are {before:?}"
    );
    let (got, wanted) =
        (rig.guest("g1", &format!("rig-agent sum /dev/sda 0 {STICK_MIB}"))?, pattern_sum(STICK_SEED, STICK_MIB));
    check!(got.trim() == wanted, "the guest read {} from the stick, which holds {wanted}", got.trim());
    rig.guest("g1", "rig-agent pattern /dev/sda 2 2 4712")?;
    let (got, wanted) = (rig.guest("g1", "rig-agent sum /dev/sda 2 2")?, pattern_sum(4712, 2));
    check!(got.trim() == wanted, "the guest read back {}, and had written {wanted}", got.trim());
    let count = |lines: &[crate::dom0::Interrupt]| lines.iter().map(|line| line.count).sum::<u64>();
    let after = rig.interrupt_lines("g1", "xhci_hcd")?;
    check!(count(&after) > count(&before), "no interrupt came: {before:?}, {after:?}");
    Ok(())
}
