//! A driver domain that names a function whose frame it was not given: Xen refuses it, the domain says so, and serves
//! what is its own.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig, SPARE, device_node};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!(
        "xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; \
         sed -i 's/^\\(extra *= *\".*\\)\"/\\1 dev={SPARE}\"/' /tmp/{DRIVER}.cfg; grep -q dev={SPARE} /tmp/{DRIVER}.cfg"
    ))?;
    let shown = rig.start_driver().and_then(|()| {
        rig.wait_device(SPARE, "broken")?;
        let reason = rig.published(&device_node(SPARE, "reason"))?;
        check!(reason.contains("-EPERM") && reason.contains("iomem="), "the reason is {reason:?}");
        let status = rig.must(&format!("xl-pciback status {SPARE}"))?;
        check!(status.contains("-EPERM"), "status does not show it:\n{status}");
        rig.create_with_drive("g1")?;
        rig.check_disk("g1", 0, 8)
    });
    rig.run(&format!("xl destroy g1; xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    shown
}
