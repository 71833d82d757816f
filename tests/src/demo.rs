//! The demo: one boot of Debian's own Xen in which a driver domain hands an NVMe drive to a guest, with MSI-X, told step
//! by step.

use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig};
use crate::packages::Release;
use crate::runner::{self, Built};
use crate::scenarios::Boot;
use crate::tools::say;

/// Runs it and prints what a person wants to see.
pub fn run(built: &Built) -> Outcome {
    let mut rig = runner::boot(built, Release::Bookworm, Boot::Plain, "")?;
    let told = show(&mut rig);
    if told.is_err() {
        say(format!("logs: {}", rig.machine.dir().display()));
    }
    let summary = told?;
    println!("\n{summary}");
    Ok(())
}

fn show(rig: &mut Rig) -> Outcome<String> {
    say("the driver domain's configuration, by xl-pciback config");
    println!("{}", rig.run(&format!("cat /tmp/{DRIVER}.cfg"))?);
    say("starting a PV Linux guest and giving it the NVMe drive");
    rig.create(Guest::named("g1"))?;
    print!("{}", rig.must(&format!("xl-pciback attach g1 {NVME} 2>&1"))?);
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    say("the guest found its drive; it reads 64 MiB and the sum is compared with the image file");
    rig.check_disk("g1", 0, 64)?;
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    let interrupts: u64 = lines.iter().map(|line| line.count).sum();
    let kinds: Vec<String> =
        lines.iter().map(|line| format!("{}: {}, {} times", line.name, line.kind, line.count)).collect();
    let pci = rig.guest("g1", "for d in /sys/bus/pci/devices/*; do echo \"$(basename $d) $(cat $d/vendor):$(cat $d/device) driver $(basename $(readlink $d/driver))\"; done")?;
    let domains = rig.run("xl list")?;
    let list = rig.run("xl-pciback list")?;
    let serve = rig.serve_log()?;
    let log = rig.driver_log()?;
    let cpu = rig.ready_cpu()?;
    Ok(format!(
        "domains:\n{domains}\nwho has what (xl-pciback list):\n{list}\nPCI in the guest:\n{pci}\n\
         the drive's interrupts in the guest:\n{}\n\n\
         what xl-pciback serve did in dom0:\n{serve}\n\
         the driver domain's console:\n{log}\n\
         The guest read 64 MiB through the driver domain's set-up, all of them right, with {interrupts} interrupts.\n\
         dom0's xen-pciback was not loaded. The driver domain has 4 MiB of memory and was ready after {cpu} us of CPU time.",
        kinds.join("\n")
    ))
}
