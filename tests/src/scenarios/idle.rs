//! With nothing to do, the driver domain does not run. Its event loop counts how often it slept, and so each wake-up;
//! processor time would show how noisy the machine is, and hypercalls how xenstored cuts its answers into pieces.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig};

/// Sleeps that a report ends: when dom0 asks, and when xenstored tells of the answer, which may come in pieces.
const REPORT: u64 = 6;

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let memory = rig.run(&format!("xl list {DRIVER} | awk 'NR == 2 {{print $3}}'"))?;
    check!(memory.trim() == "4", "the driver domain has {} MiB", memory.trim());
    let first = rig.report()?.sleeps;
    // An idle stretch is what is measured, so this is the one place that waits for time to pass.
    rig.run("sleep 30")?;
    let sleeps = rig.report()?.sleeps - first;
    // Even one wake-up in three seconds would be more.
    check!(sleeps >= 1, "the count of sleeps stands still: it counts nothing");
    check!(
        sleeps <= REPORT,
        "the driver domain slept {sleeps} times in 30 s of idling, a report ends {REPORT} at most"
    );
    Ok(())
}
