//! `reset=bus`: dom0's kernel resets the drive by the bus behind its root port. The drive, which a guest left running,
//! comes back switched off, and the next guest uses it.

use crate::check;
use crate::dom0::{DRIVER, NVME, Outcome, Rig, Stop, device_node};

/// The drive's register CC as dom0 reads it (NVM Express base 1.4, 3.1.5). Bit 0: a driver has switched it on.
fn configuration(rig: &mut Rig) -> Outcome<u32> {
    let said = rig.run(&format!(
        "f=/sys/bus/pci/devices/{NVME}; decode() {{ printf \"\\\\$1\" | dd of=$f/config bs=1 seek=4 conv=notrunc 2>/dev/null; }}; \
         c=$(od -An -to1 -j4 -N1 $f/config); decode 2; devmem $(( $(awk 'NR == 1 {{print $1}}' $f/resource) + 0x14 )) 32; decode $c"
    ))?;
    let number = u32::from_str_radix(said.trim().trim_start_matches("0x"), 16);
    number.map_err(|_| Stop::Error(format!("the drive's CC reads {said:?}")))
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!(
        "xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; sed -i 's/dev={NVME}/&,reset=bus/' /tmp/{DRIVER}.cfg; \
         grep -q reset=bus /tmp/{DRIVER}.cfg"
    ))?;
    let shown = rig.start_driver().and_then(|()| resets(rig));
    rig.run(&format!("xl destroy g1; xl destroy g2; xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    shown
}

fn resets(rig: &mut Rig) -> Outcome {
    rig.wait_device(NVME, "ready")?;
    let method = rig.published(&device_node(NVME, "reset"))?;
    check!(method == "bus", "its reset is published as {method:?}");
    for name in ["g1", "g2"] {
        rig.create_with_drive(name)?;
        rig.check_disk(name, 0, 16)?;
        rig.must(&format!("xl destroy {name}"))?;
        rig.wait_device(NVME, "ready")?;
        let (log, said) = (rig.driver_log()?, rig.run("dmesg | tail -n 12")?);
        check!(
            !log.contains(&format!("{NVME}: dom0 does not reset it")),
            "dom0 does not reset it; its kernel said last\n{said}"
        );
        let left = configuration(rig)?;
        check!(left & 1 == 0, "after its reset the drive is still on: CC is {left:#x}");
    }
    Ok(())
}
