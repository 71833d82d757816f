//! A guest is saved while it has a drive. Nobody can refuse that for it: xl does not ask. What matters is that the drive is
//! clean and free afterwards, that the service says what happened, and that the guest can be restored.

use crate::check;
use crate::dom0::{Guest, NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest::named("g1"))?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    let (code, said) = rig.exec("timeout 80 xl save g1 /run/g1.save 2>&1")?;
    crate::tools::say(format!("xl save ended with {code}: {said}"));
    let (_, list) = rig.exec("xl list; ls -la /run/g1.save")?;
    crate::tools::say(list);
    crate::tools::say(rig.guest_log("g1")?);
    crate::tools::say(rig.serve_log()?);
    if rig.domid("g1")?.is_none() {
        rig.wait_device(NVME, "ready")?;
        let (code, said) = rig.exec("timeout 80 xl restore /run/g1.save 2>&1")?;
        crate::tools::say(format!("xl restore ended with {code}: {said}"));
        rig.run("sleep 10")?;
        crate::tools::say(rig.guest_log("g1")?);
        let (code, said) = rig.guest_exec("g1", 30, "ls /sys/bus/pci/devices; dmesg | tail -n 25")?;
        crate::tools::say(format!("{code}: {said}"));
        let (code, said) = rig.exec(&format!("xl-pciback attach g1 {NVME} 2>&1"))?;
        crate::tools::say(format!("attach ended with {code}: {said}"));
        let (code, said) = rig.guest_exec("g1", 60, "sleep 10; ls /sys/bus/pci/devices; dmesg | tail -n 25")?;
        crate::tools::say(format!("{code}: {said}"));
    }
    check!(true, "looked at");
    Ok(())
}
