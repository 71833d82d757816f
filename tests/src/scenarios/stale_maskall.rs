//! The failure this project began with. A card with MSI-X in use loses its memory decode, and its guest is destroyed: Xen
//! cannot reach the table, masks all vectors by MASKALL, and remembers that. The next guest must get working interrupts.

use crate::check;
use crate::dom0::{DRIVER, Guest, NIC, Outcome, Rig, device_node};

/// Where the card's MSI-X capability is.
pub(crate) const CAPABILITY: u32 = 0xa0;
/// What the driver domain says when it has reset the state.
const RESET: &str = "Xen still masked all its MSI-X vectors";

/// Gives the card to a guest and uses it with MSI-X.
fn use_card(rig: &mut Rig, guest: &str) -> Outcome {
    rig.create(Guest { drivers: "e1000e", ..Guest::named(guest) })?;
    rig.attach(guest, NIC)?;
    rig.wait_up(guest, 1)?;
    rig.ping(guest)?;
    let control = rig.msix_control(NIC, CAPABILITY)?;
    check!(control == "8004", "{guest}: Message Control is {control}, not 8004");
    let lines = rig.interrupt_lines(guest, "eth0")?;
    check!(lines.iter().all(|line| line.kind.contains("msi-x")), "{guest}: the card's interrupts are {lines:?}");
    check!(lines.iter().filter(|line| line.count > 0).count() >= 2, "{guest}: interrupts do not arrive: {lines:?}");
    Ok(())
}

/// What an administrator's mistake in dom0 does.
pub(crate) fn no_decode(rig: &mut Rig) -> Outcome {
    rig.must(&format!("printf '\\0\\0' | dd of=/sys/bus/pci/devices/{NIC}/config bs=1 seek=4 conv=notrunc 2>/dev/null"))
        .map(drop)
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    use_card(rig, "g1")?;
    no_decode(rig)?;
    // The driver domain is late: Xen takes the guest down first, and so meets the card without memory decode.
    rig.must(&format!("xl pause {DRIVER}"))?;
    let destroyed = rig.must("xl destroy g1").and_then(|_| rig.wait("g1 to be gone", 30, "! domid g1"));
    let dirty = rig.msix_control(NIC, CAPABILITY);
    rig.must(&format!("xl unpause {DRIVER}"))?;
    destroyed?;
    let dirty = dirty?;
    check!(dirty == "4004" || dirty == "c004", "the scenario needs MASKALL to be set, and Message Control is {dirty}");
    rig.wait_device(NIC, "ready")?;
    let control = rig.msix_control(NIC, CAPABILITY)?;
    check!(control == "0004", "Message Control is {control} when the card is ready, not 0004");
    let log = rig.driver_log()?;
    check!(log.contains(RESET), "the driver domain does not say that it reset the state:\n{log}");
    let msix = rig.published(&device_node(NIC, "msix"))?;
    check!(msix.contains("stale state reset"), "msix is published as {msix:?}");
    use_card(rig, "g2")?;

    // The same with a driver domain that is quick.
    no_decode(rig)?;
    rig.must("xl destroy g2")?;
    rig.wait_device(NIC, "ready")?;
    use_card(rig, "g3")
}
