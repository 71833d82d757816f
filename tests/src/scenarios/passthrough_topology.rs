//! With `topology=passthrough` a guest sees its functions where the host has them: the drive on its own bus, and a
//! network card that comes later on another one, which the guest's pcifront has to find as a new root.

use crate::check;
use crate::dom0::{DRIVER, Guest, NIC, NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!(
        "xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; sed -i 's/ mode=/ topology=passthrough&/' /tmp/{DRIVER}.cfg; \
         grep -q topology=passthrough /tmp/{DRIVER}.cfg && xl-pciback check /tmp/{DRIVER}.cfg"
    ))?;
    let shown = rig.start_driver().and_then(|()| sees(rig));
    rig.run(&format!("xl destroy g1; xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    shown
}

/// The guest's functions, as its kernel names them.
fn functions(rig: &mut Rig) -> Outcome<Vec<String>> {
    Ok(rig.guest("g1", "ls /sys/bus/pci/devices")?.split_whitespace().map(str::to_owned).collect())
}

fn sees(rig: &mut Rig) -> Outcome {
    let domid = rig.create(Guest { drivers: "all", ..Guest::named("g1") })?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    let seen = functions(rig)?;
    check!(seen == [NVME], "the guest sees {seen:?}");
    let list = rig.must("xl-pciback list")?;
    check!(list.lines().any(|line| line.ends_with("0000:01:00.00")), "list says\n{list}");
    rig.check_disk("g1", 0, 16)?;
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    check!(!lines.is_empty() && lines.iter().all(|line| line.count > 0), "its interrupts are {lines:?}");

    rig.attach("g1", NIC)?;
    rig.ping("g1")?;
    let mut seen = functions(rig)?;
    seen.sort();
    check!(seen == [NIC, NVME], "with the network card the guest sees {seen:?}");
    let roots = format!(
        "p=/local/domain/$(domid {DRIVER})/backend/pci/{domid}/0; xenstore-read $p/root_num $p/root-0 $p/root-1"
    );
    let roots = rig.run(&roots)?;
    check!(roots.split_whitespace().eq(["2", "0000:01", "0000:00"]), "the roots are {roots}");

    rig.must(&format!("xl-pciback detach --timeout 60 g1 {NVME}"))?;
    rig.guest_wait("g1", "its drive to leave", 30, "[ ! -e /dev/nvme0n1 ]")?;
    rig.wait_device(NVME, "ready")?;
    let seen = functions(rig)?;
    check!(seen == [NIC], "without its drive the guest sees {seen:?}");
    rig.ping("g1")
}
