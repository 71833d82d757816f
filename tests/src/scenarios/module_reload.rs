//! The guest unloads its drivers and pcifront, and loads them again: the connection closes and opens anew.

use crate::dom0::{Outcome, Rig};

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    // Linux's xenbus holds the module of a driver that is bound to a device.
    rig.guest("g1", "rmmod nvme && echo pci-0 > /sys/bus/xen/drivers/pcifront/unbind && rmmod xen_pcifront")?;
    rig.guest_wait("g1", "an empty bus", 30, "[ -z \"$(ls /sys/bus/pci/devices)\" ]")?;
    rig.guest("g1", "insmod /modules/xen-pcifront.ko && insmod /modules/nvme.ko")?;
    rig.wait_disk("g1")?;
    rig.check_disk("g1", 0, 16)
}
