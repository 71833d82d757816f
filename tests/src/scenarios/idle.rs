//! With nothing to do, the driver domain does not run. Each time it wakes it makes a hypercall to sleep again, so the count
//! of its hypercalls shows every wake-up; processor time would show how noisy the machine is.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let memory = rig.run(&format!("xl list {DRIVER} | awk 'NR == 2 {{print $3}}'"))?;
    check!(memory.trim() == "4", "the driver domain has {} MiB", memory.trim());
    let first = rig.report()?;
    let second = rig.report()?;
    // An idle stretch is what is measured, so this is the one place that waits for time to pass.
    rig.run("sleep 30")?;
    let third = rig.report()?;
    let own = second.hypercalls - first.hypercalls;
    let idle = third.hypercalls - second.hypercalls;
    // xenstored may split or join its answers to a report; 30 seconds of any tick would be far more.
    check!(idle <= own + 6, "{idle} hypercalls for 30 s of idling and a report, {own} for a report alone");
    Ok(())
}
