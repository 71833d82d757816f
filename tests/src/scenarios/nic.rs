//! A guest uses a network card: its link comes up and traffic passes.

use crate::check;
use crate::dom0::{Guest, NIC, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest { drivers: "e1000e", ..Guest::named("g1") })?;
    rig.attach("g1", NIC)?;
    rig.wait_up("g1", 1)?;
    rig.ping("g1")?;
    check!(rig.interrupts("g1", "eth0")? > 0, "the card has no interrupts");
    Ok(())
}
