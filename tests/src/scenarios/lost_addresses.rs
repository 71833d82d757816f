//! A driver domain dies in the middle of a reset, so nobody restores the functions: they have no addresses and decode
//! nothing. The next driver domain, or a wish to attach them, finds that, and they work.

use crate::check;
use crate::dom0::{AHCI, DRIVER, Guest, NVME, Outcome, Rig};
use crate::machine::{SATA_SEED, pattern_sum};
use crate::scenarios::Boot;

/// What a reset leaves of Command and the base address registers.
fn lose(rig: &mut Rig, bdf: &str) -> Outcome {
    let zeros = |at: u32, count: u32| {
        format!(
            "dd if=/dev/zero of=/sys/bus/pci/devices/{bdf}/config bs=1 seek={at} count={count} conv=notrunc 2>/dev/null"
        )
    };
    rig.must(&format!("{}; {}", zeros(4, 2), zeros(16, 24)))?;
    let left = registers(rig, bdf)?;
    check!(
        left.split_whitespace().all(|dword| dword.len() == 8 && dword.trim_start_matches('0').len() <= 1),
        "{bdf} reads {left}"
    );
    Ok(())
}

/// The base address registers.
fn registers(rig: &mut Rig, bdf: &str) -> Outcome<String> {
    Ok(rig.run(&format!("od -An -tx4 -j16 -N24 /sys/bus/pci/devices/{bdf}/config"))?.trim().to_owned())
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let before = (registers(rig, NVME)?, registers(rig, AHCI)?);
    rig.must(&format!("xl destroy {DRIVER}"))?;
    for bdf in [NVME, AHCI] {
        lose(rig, bdf)?;
    }
    rig.start_driver()?;
    if rig.boot == Boot::Plain {
        // By themselves: the driver domain asks serve for them.
        rig.wait_device(NVME, "ready")?;
        rig.wait_device(AHCI, "ready")?;
        check!((registers(rig, NVME)?, registers(rig, AHCI)?) == before, "they are ready without their addresses");
    }
    rig.create(Guest { drivers: "all", ..Guest::named("g1") })?;
    for bdf in [NVME, AHCI] {
        rig.attach("g1", bdf)?;
    }
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    rig.check_disk("g1", 0, 8)?;
    rig.guest_wait("g1", "its SATA drive", 60, "[ -b /dev/sda ]")?;
    let (got, wanted) = (rig.guest("g1", "rig-agent sum /dev/sda 0 4")?, pattern_sum(SATA_SEED, 4));
    check!(got.trim() == wanted, "g1 read {} from its SATA drive, which holds {wanted}", got.trim());
    check!(
        (registers(rig, NVME)?, registers(rig, AHCI)?) == before,
        "the guest has them at other addresses than dom0 knows"
    );
    Ok(())
}
