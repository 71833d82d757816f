//! An exception in the driver domain is reported on its console and on port 0xE9, and ends it as `on_crash` says.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!("xl trigger {DRIVER} nmi"))?;
    // The rig's driver domain has on_crash="preserve": it stays, crashed.
    rig.wait(
        "the domain to crash",
        30,
        &format!("xl list {DRIVER} | awk 'NR == 2 && $5 ~ /c/ {{f = 1}} END {{exit !f}}'"),
    )?;
    let log = rig.driver_log()?;
    let (_, xen) = rig.exec("xl dmesg | grep 'pciback-stubdom: fatal' | tail -n 1")?;
    rig.must(&format!("xl destroy {DRIVER}"))?;
    for (place, text) in [("its console", &log), ("xl dmesg", &xen)] {
        let told = text.lines().find(|line| line.contains("fatal: exception 2 (NMI) at rip 0x"));
        check!(told.is_some_and(|line| line.contains("rsp 0x")), "{place} has no report:\n{text}");
    }
    rig.start_driver()
}
