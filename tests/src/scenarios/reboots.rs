//! Five, or fifty, reboots of a guest with MSI-X leak neither a pirq nor an interrupt of Xen's, and its drive works after the last.

use std::collections::BTreeMap;

use crate::check;
use crate::dom0::{Guest, NVME, Outcome, Rig};
use crate::tools::say;

/// The guests: name, device, words for the kernel, and what shows that the device is there.
const GUESTS: [(&str, &str, &str, &str); 1] = [("g1", NVME, "", "[ -b /dev/nvme0n1 ]")];

/// How many of Xen's message interrupts each domain has. Numbers of domains change with every reboot: what is left of an
/// old one shows as a domain more, and in the total.
fn irqs(rig: &mut Rig) -> Outcome<BTreeMap<String, usize>> {
    let mut of = BTreeMap::new();
    for line in rig.guest_irqs()? {
        // "... in-flight=0 d12: 54(---)": the domain the interrupt is bound to.
        let mut words = line.split_whitespace();
        let owner = words.find_map(|word| word.strip_prefix('d')?.split_once(':').map(|(domain, _)| domain.to_owned()));
        *of.entry(owner.unwrap_or_else(|| "none".to_owned())).or_default() += 1;
    }
    Ok(of)
}

pub(super) fn five(rig: &mut Rig) -> Outcome {
    reboots(rig, 5)
}

pub(super) fn fifty(rig: &mut Rig) -> Outcome {
    reboots(rig, 50)
}

/// Has each guest reboot so often.
fn reboots(rig: &mut Rig, times: u32) -> Outcome {
    let idle = irqs(rig)?;
    let mut numbers = Vec::new();
    for (name, bdf, extra, there) in GUESTS {
        numbers.push(rig.create(Guest { extra, ..Guest::named(name) })?);
        rig.attach(name, bdf)?;
        rig.wait_up(name, 1)?;
        rig.guest_wait(name, "its device", 60, there)?;
    }
    let first = irqs(rig)?;
    let total = |of: &BTreeMap<String, usize>| of.values().sum::<usize>();
    check!(total(&first) == total(&idle) + 3, "one guest with 3 vectors: {idle:?}, then {first:?}");
    for reboot in 1..=times {
        for (name, ..) in GUESTS {
            rig.guest(name, "(sleep 0.2; reboot -f) >/dev/null 2>&1 & echo soon")?;
        }
        for ((name, ..), number) in GUESTS.into_iter().zip(&mut numbers) {
            rig.wait(&format!("{name}'s new domain"), 90, &format!("id=$(domid {name}) && [ $id != {number} ]"))?;
            *number = rig.domid(name)?.unwrap_or_default();
        }
        // Not before they are up: what is attached between Linux's look at its devices and its watch on them is not seen.
        for (name, bdf, _, there) in GUESTS {
            rig.wait_up(name, reboot + 1)?;
            rig.attach(name, bdf)?;
            rig.guest_wait(name, "its device", 60, there)?;
        }
        if reboot % 10 == 0 {
            say(format!("{} reboots", reboot));
        }
    }
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    let right = lines.len() == 3 && lines.iter().all(|line| line.kind.ends_with("msi-x"));
    check!(right, "after {times} reboots: {lines:?}");
    rig.check_disk("g1", 0, 32)?;
    let last = irqs(rig)?;
    check!(
        total(&last) == total(&first) && last.len() == first.len(),
        "Xen had {first:?} interrupts of messages with the first guest, and has {last:?} after all reboots"
    );
    for (name, bdf, ..) in GUESTS {
        rig.must(&format!("xl destroy {name}"))?;
        rig.wait_device(bdf, "ready")?;
    }
    let end = irqs(rig)?;
    check!(end == idle, "Xen had {idle:?} without a guest, and has {end:?} at the end");
    Ok(())
}
