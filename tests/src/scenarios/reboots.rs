//! Fifty reboots of a guest with MSI-X leak neither a pirq nor an interrupt of Xen's, and the drive works after the last.

use std::collections::BTreeMap;

use crate::check;
use crate::dom0::{Guest, NVME, Outcome, Rig};
use crate::tools::say;

/// How many.
const REBOOTS: u32 = 50;

/// How many of Xen's message interrupts each domain has. Numbers of domains change with every reboot: what is left of an
/// old one shows as a domain more, and in the total.
fn irqs(rig: &mut Rig) -> Outcome<BTreeMap<String, usize>> {
    let mut of = BTreeMap::new();
    for line in rig.guest_irqs()? {
        // "... in-flight=0 d12: 54(---)": the domains the interrupt is bound to.
        let owner = line
            .split_whitespace()
            .find(|word| word.starts_with('d') && word.ends_with(':'))
            .unwrap_or("none")
            .to_owned();
        *of.entry(owner).or_default() += 1;
    }
    Ok(of)
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let idle = irqs(rig)?;
    let mut first = rig.create(Guest::named("g1"))?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    let one = irqs(rig)?;
    check!(
        one.values().sum::<usize>() == idle.values().sum::<usize>() + 3,
        "one guest with 3 vectors: {idle:?}, then {one:?}"
    );
    for reboot in 1..=REBOOTS {
        rig.guest("g1", "(sleep 0.2; reboot -f) >/dev/null 2>&1 & echo soon")?;
        rig.wait("g1's new domain", 60, &format!("id=$(xl domid g1) && [ $id != {first} ]"))?;
        first = rig.domid("g1")?.unwrap_or_default();
        rig.attach("g1", NVME)?;
        rig.wait_up("g1", reboot + 1)?;
        rig.wait_disk("g1")?;
        if reboot % 10 == 0 {
            say(format!("{reboot} reboots"));
        }
    }
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    check!(
        lines.len() == 3 && lines.iter().all(|line| line.kind.contains("msi-x")),
        "after {REBOOTS} reboots: {lines:?}"
    );
    rig.check_disk("g1", 0, 32)?;
    let many = irqs(rig)?;
    check!(
        many.values().sum::<usize>() == one.values().sum::<usize>() && many.len() == one.len(),
        "Xen had {one:?} interrupts of messages with one guest, and has {many:?} after {REBOOTS} reboots"
    );
    rig.must("xl destroy g1")?;
    rig.wait_device(NVME, "ready")?;
    let end = irqs(rig)?;
    check!(end == idle, "Xen had {idle:?} without a guest, and has {end:?} at the end");
    Ok(())
}
