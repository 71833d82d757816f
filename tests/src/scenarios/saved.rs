//! A guest is saved while it has a drive. Nobody can refuse that for it: xl asks neither Xen nor anybody else, and the
//! guest that is restored from it dies, as its PCI bus is gone. What can be done is done: the service says so at the
//! moment of the save, and the drive is clean and free for a fresh start of the guest.

use crate::check;
use crate::dom0::{NVME, Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    let (code, said) = rig.exec("timeout 80 xl save g1 /run/g1.save 2>&1; echo code $?; rm -f /run/g1.save")?;
    check!(code == 0 && said.contains("code 0"), "xl save refuses a guest with a device now, which is better: {said}");
    rig.wait_device(NVME, "ready")?;
    let log = rig.serve_log()?;
    check!(log.contains("\"g1\" is being saved with 0000:01:00.0"), "the service does not warn:\n{log}");
    rig.create_with_drive("g1")?;
    rig.check_disk("g1", 0, 16)
}
