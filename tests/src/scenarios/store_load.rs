//! xenstored has much to do for others: devices are attached, used and given back all the same.

use crate::check;
use crate::dom0::{Guest, NVME, Outcome, Rig};

/// Four processes that write, read and list without a pause.
const LOAD: &str = "for n in 1 2 3 4; do (while [ -e /run/load ]; do xenstore-write /load/$n/a x /load/$n/b y; \
     xenstore-ls /local/domain/0 >/dev/null; xenstore-rm /load/$n; done) >/dev/null 2>&1 & done";

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_and_wait(Guest::named("g1"))?;
    rig.must(&format!("touch /run/load; {LOAD}"))?;
    let used = (|| {
        for _ in 0..2 {
            rig.attach("g1", NVME)?;
            rig.wait_disk("g1")?;
            rig.check_disk("g1", 0, 16)?;
            let lines = rig.interrupt_lines("g1", "nvme0q")?;
            check!(lines.len() == 3, "the drive has {lines:?}");
            rig.must(&format!("xl-pciback detach --timeout 60 g1 {NVME}"))?;
            rig.wait_device(NVME, "ready")?;
        }
        Ok(())
    })();
    rig.must("rm -f /run/load; xenstore-rm /load || true")?;
    used
}
