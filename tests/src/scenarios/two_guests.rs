//! Two guests use a device each at the same time, and neither disturbs the other.

use crate::check;
use crate::dom0::{Guest, NIC, NVME, Outcome, Rig, device_node};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest::named("g1"))?;
    rig.create(Guest { drivers: "e1000e", ..Guest::named("g2") })?;
    rig.attach("g1", NVME)?;
    rig.attach("g2", NIC)?;
    rig.wait_up("g1", 1)?;
    rig.wait_up("g2", 1)?;
    rig.wait_disk("g1")?;
    rig.guest("g1", "rig-agent hammer /dev/nvme0n1 >/dev/null 2>&1 & echo started")?;
    rig.ping("g2")?;
    rig.check_disk("g1", 0, 32)?;
    for (bdf, name) in [(NVME, "g1"), (NIC, "g2")] {
        let Some(domid) = rig.domid(name)? else {
            return Err(crate::dom0::Stop::Crash(format!("{name} is gone")));
        };
        let frontend = rig.published(&device_node(bdf, "frontend"))?;
        check!(frontend == domid.to_string(), "{bdf} says frontend {frontend}, {name} is domain {domid}");
    }
    Ok(())
}
