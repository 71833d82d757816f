//! With nothing to do, the driver domain does not run: its time in `xl vcpu-list` stands still.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig, Stop};

fn seconds(rig: &mut Rig) -> Outcome<f64> {
    let text = rig.run(&format!("xl vcpu-list {DRIVER} | awk 'NR == 2 {{for (i = 4; i <= NF; i++) if ($i ~ /^[0-9]+\\.[0-9]+$/) {{print $i; exit}}}}'"))?;
    text.trim().parse().map_err(|_| Stop::Error(format!("xl vcpu-list: {text:?}")))
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let memory = rig.run(&format!("xl list {DRIVER} | awk 'NR == 2 {{print $3}}'"))?;
    check!(memory.trim() == "4", "the driver domain has {} MiB", memory.trim());
    let before = seconds(rig)?;
    // An idle stretch is what is measured, so this is the one place that waits for time to pass.
    rig.run("sleep 20")?;
    let after = seconds(rig)?;
    let ran = after - before;
    check!(ran <= 0.11, "idle for 20 s, and it ran {ran:.1} s");
    let report = rig.report()?;
    let again = rig.report()?;
    rig.run("sleep 10")?;
    let idle = rig.report()?;
    let own = again.cpu_us.saturating_sub(report.cpu_us);
    let spent = idle.cpu_us.saturating_sub(again.cpu_us);
    check!(spent <= own * 3 + 2000, "10 s of idling and a report cost {spent} us, a report alone {own} us");
    check!(
        idle.hypercalls - again.hypercalls <= (again.hypercalls - report.hypercalls) + 4,
        "{} hypercalls while idle",
        idle.hypercalls - again.hypercalls
    );
    Ok(())
}
