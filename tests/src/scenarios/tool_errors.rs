//! dom0's tool refuses what cannot work, says why, and leaves nothing behind.

use crate::check;
use crate::dom0::{DRIVER, Guest, NIC, NVME, Outcome, Rig, SPARE};
use crate::tools::tail;

/// Runs commands, each of which must fail with a code and a message that holds one of the words; none must change xenstore.
/// A listing takes xenstored long here, so there are two for all of them.
fn refused(rig: &mut Rig, commands: &[(&str, i32, &[&str])]) -> Outcome {
    rig.note_store()?;
    for (command, code, words) in commands {
        let (got, said) = rig.exec(command)?;
        check!(got == *code, "`{command}` ended with {got}, not {code}: {}", tail(&said, 5));
        let lower = said.to_lowercase();
        check!(words.iter().any(|word| lower.contains(word)), "`{command}` says none of {words:?}: {}", tail(&said, 5));
    }
    let changed = rig.changed()?;
    let names: Vec<&str> = commands.iter().map(|(command, ..)| *command).collect();
    check!(changed.is_empty(), "one of {names:?} failed and left changes in xenstore:\n{changed}");
    Ok(())
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let (to_g1, to_g2, to_g3) = (
        &*format!("xl-pciback attach g1 {NVME}"),
        &*format!("xl-pciback attach g2 {NVME}"),
        &*format!("xl-pciback attach g3 {NVME}"),
    );
    // The spare card belongs to a driver of dom0.
    rig.run("insmod /modules/e1000e.ko")?;
    rig.wait("dom0's e1000e", 30, &format!("[ -e /sys/bus/pci/devices/{SPARE}/driver ]"))?;
    rig.create_and_wait(Guest::named("g1"))?;
    rig.create_paused(Guest { passthrough: false, ..Guest::named("g2") })?;
    rig.create_paused(Guest::named("g3"))?;
    let refusals = refused(
        rig,
        &[
            ("xl-pciback frobnicate", 2, &["frobnicate", "usage"]),
            ("xl-pciback attach", 2, &["usage", "guest", "missing"]),
            (&format!("xl-pciback attach nobody {NVME}"), 1, &["nobody"]),
            (&format!("xl-pciback attach g1 {SPARE}"), 1, &["driver", "e1000e", SPARE]),
            ("xl-pciback attach g1 0000:77:00.0", 1, &["0000:77:00.0"]),
            ("xl-pciback attach g1 nonsense", 2, &["nonsense"]),
            (&format!("xl-pciback detach g1 {NVME}"), 1, &["not attached", "no device", NVME]),
            (to_g2, 1, &["e820_host", "passthrough"]),
        ],
    );
    rig.run("rmmod e1000e")?;
    refusals?;

    rig.attach("g1", NVME)?;
    rig.wait_disk("g1")?;
    let taken: &[&str] = &["already", "in-use", "in use"];
    refused(rig, &[(to_g1, 1, taken), (to_g3, 1, taken)])?;
    rig.check_disk("g1", 0, 4)?;
    rig.must(&format!("xl-pciback detach g1 {NVME}"))?;
    rig.wait_device(NVME, "ready")?;

    rig.must(&format!("xl destroy {DRIVER}"))?;
    refused(rig, &[(to_g1, 1, &["driver domain", DRIVER])])?;

    // Another card than the config's id= names: the driver domain must not hand it out.
    rig.run(&format!("cp /tmp/{DRIVER}.cfg /tmp/good.cfg; sed -i 's/id=8086:10d3/id=8086:1234/' /tmp/{DRIVER}.cfg"))?;
    let changed = rig.run(&format!("grep -c 8086:1234 /tmp/{DRIVER}.cfg || true"))?;
    let started = rig.start_driver();
    rig.run(&format!("cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    started?;
    check!(changed.trim() == "1", "`xl-pciback config` writes no id= for {NIC}");
    rig.wait_device(NIC, "broken")?;
    rig.wait_device(NVME, "ready")?;
    let result = refused(rig, &[(&format!("xl-pciback attach g1 {NIC}"), 1, &["broken", "id", "8086"])]);
    rig.run(&format!("xl destroy {DRIVER}"))?;
    result
}
