//! Without `mmcfg=0` on Xen's command line every write to a configuration frame would kill the driver domain. It must start
//! all the same, serve reads, refuse writes, and live.

use crate::check;
use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig, Stop};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.stop_serve("TERM")?;
    let told = without(rig);
    rig.start_serve()?;
    told
}

fn without(rig: &mut Rig) -> Outcome {
    rig.must(&format!("xl destroy {DRIVER}"))?;
    rig.start_driver_alone()?;
    let mode = rig.published("mode")?;
    check!(mode == "read-only", "mode is {mode:?}");
    let why = rig.published("mode-why")?;
    check!(why.contains("xl-pciback serve"), "mode-why does not name the remedy: {why:?}");
    let first = rig.domid(DRIVER)?;
    rig.create_and_wait(Guest::named("g1"))?;
    rig.attach("g1", NVME)?;
    rig.guest_wait("g1", "a device on its bus", 60, "[ -n \"$(ls /sys/bus/pci/devices)\" ]")?;
    let ids = rig.guest("g1", "cd /sys/bus/pci/devices/*; cat vendor device class")?;
    let ids: Vec<&str> = ids.split_whitespace().collect();
    check!(ids == ["0x1b36", "0x0010", "0x010802"], "the guest sees {ids:?}");
    // Writing the command register: refused or ignored, but nobody dies of it.
    rig.guest("g1", "f=$(echo /sys/bus/pci/devices/*/config); rig-agent config-write $f 4 10 || true")?;
    rig.guest("g1", "rig-agent config-read $(echo /sys/bus/pci/devices/*/config) 0 10")?;
    if rig.domid(DRIVER)? != first {
        return Err(Stop::Crash("the driver domain died of a write".to_owned()));
    }
    rig.check_crash()?;
    rig.must("xl destroy g1")?;
    rig.wait_device(NVME, "ready")?;

    rig.must(&format!(
        "xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; \
         sed -i -e 's/ mode=[a-z0-9-]*//' -e 's/^\\(extra *= *\".*\\)\"/\\1 mode=mmcfg0\"/' /tmp/{DRIVER}.cfg; grep -q mode=mmcfg0 /tmp/{DRIVER}.cfg"
    ))?;
    let started = rig.start_driver_alone();
    let result = match started {
        Ok(()) => {
            rig.create_and_wait(Guest::named("g2"))?;
            let (code, said) = rig.exec(&format!("xl-pciback attach g2 {NVME}"))?;
            if code == 1 && said.contains("mmcfg") {
                Ok(())
            } else {
                Err(Stop::Failure(format!(
                    "attach with mode=mmcfg0 on a Xen without mmcfg=0 ended with {code}: {said}"
                )))
            }
        }
        Err(stop) => Err(stop),
    };
    rig.run(&format!("xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    result
}
