//! A virtual function of an NVMe drive: dom0's driver has the physical one, makes the other and gives it queues, and two
//! guests in turn use it while dom0 goes on using the drive. Its registers tell neither its ids nor its addresses.
//!
//! How it is made ready is in QEMU's docs/system/devices/nvme.rst: the physical function gives up what it could lend, which
//! takes a reset, lends it to the other, and sets that online.

use crate::check;
use crate::dom0::{DRIVER, Guest, Outcome, Rig};
use crate::machine::{SHARED_MIB, SHARED_SEED, pattern_sum};
use crate::scenarios::device_matrix::{Function, MSIX, NVME_COMMAND, place, works};

/// The drive.
const PHYSICAL: &str = "0000:04:00.0";
/// Its virtual function.
const VIRTUAL: &str = "0000:04:00.1";
/// The number of its controller.
const CONTROLLER: u32 = 1;
/// Queues and interrupts that it gets: one for commands, one for each of the guest's processors.
const RESOURCES: u32 = 3;

/// Kinds of resources, and actions, of Virtualization Management (NVM Express Base 1.4, figure 373).
mod management {
    pub(crate) const QUEUES: u32 = 0;
    pub(crate) const INTERRUPTS: u32 = 1;
    pub(crate) const PRIMARY_ALLOCATE: u32 = 1;
    pub(crate) const SECONDARY_ASSIGN: u32 = 8;
    pub(crate) const SECONDARY_ONLINE: u32 = 9;
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!("xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg"))?;
    let shown = make(rig).and_then(|()| used(rig));
    rig.run(&format!(
        "xl destroy g1; xl destroy g2; xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg; cd /sys/bus/pci/devices/{PHYSICAL}; \
         xl-pciback assignable-remove --no-rebind {VIRTUAL}; echo 0 >sriov_numvfs; echo {PHYSICAL} >driver/unbind; \
         rmmod nvme nvme-core; true"
    ))?;
    shown
}

/// Has dom0 make the virtual function, which then answers as a controller.
fn make(rig: &mut Rig) -> Outcome {
    use management::{INTERRUPTS, PRIMARY_ALLOCATE, QUEUES, SECONDARY_ASSIGN, SECONDARY_ONLINE};
    rig.must(
        "for m in crct10dif_common crc-t10dif crc64 crc64-rocksoft t10-pi nvme-keyring nvme-auth nvme-core nvme; do \
         [ ! -e /modules/$m.ko ] || insmod /modules/$m.ko; done",
    )?;
    rig.wait("dom0's drive", 60, "[ -b /dev/nvme0n1 ]")?;
    let manage = |controller: u32, kind: u32, action: u32, count: u32| {
        format!("rig-agent nvme-virtualization /dev/nvme0 {controller} {kind} {action} {count}")
    };
    // The interrupts are given before the function is made: Xen looks once, when it is, how many it has. dom0's driver must
    // not have it.
    rig.must(&format!(
        "{} && {} && cd /sys/bus/pci/devices/{PHYSICAL} && echo 1 >reset && {} && {} && echo 0 >sriov_drivers_autoprobe && \
         echo 1 >sriov_numvfs",
        manage(0, QUEUES, PRIMARY_ALLOCATE, 0),
        manage(0, INTERRUPTS, PRIMARY_ALLOCATE, 0),
        manage(CONTROLLER, QUEUES, SECONDARY_ASSIGN, RESOURCES),
        manage(CONTROLLER, INTERRUPTS, SECONDARY_ASSIGN, RESOURCES),
    ))?;
    rig.wait("the virtual function", 30, &format!("[ -e /sys/bus/pci/devices/{VIRTUAL} ]"))?;
    rig.must(&manage(CONTROLLER, QUEUES, SECONDARY_ONLINE, 0)).map(drop)
}

fn used(rig: &mut Rig) -> Outcome {
    let ids = rig.run(&format!("od -An -tx2 -N4 /sys/bus/pci/devices/{VIRTUAL}/config"))?;
    check!(ids.trim() == "ffff ffff", "the function's own ids read {ids}");
    rig.must(&format!("xl-pciback assignable-add {VIRTUAL}"))?;
    rig.must(&format!("xl-pciback config {VIRTUAL} > /tmp/{DRIVER}.cfg && xl-pciback check /tmp/{DRIVER}.cfg"))?;
    rig.start_driver()?;
    rig.wait_device(VIRTUAL, "ready")?;
    for (number, guest) in ["g1", "g2"].into_iter().enumerate() {
        rig.create_paused(Guest::named(guest))?;
        rig.attach(guest, VIRTUAL)?;
        rig.must(&format!("xl unpause {guest}"))?;
        rig.wait_up(guest, 1)?;
        let function = Function {
            bdf: VIRTUAL,
            guest,
            driver: "nvme",
            interrupts: (MSIX, 3),
            command: NVME_COMMAND,
            multifunction: false,
            work: if number == 0 { first } else { second },
        };
        let place = place(rig, &function)?;
        works(rig, &function, &place)?;
        // With the guest dead its function is reset; the drive's other user does not notice.
        rig.must(&format!("xl destroy {guest}"))?;
        rig.wait_device(VIRTUAL, "ready")?;
        let (got, wanted) = (rig.must("rig-agent sum /dev/nvme0n1 0 2")?, pattern_sum(4714, 2));
        check!(got.trim() == wanted, "dom0 reads {} from the drive, the guest wrote {wanted}", got.trim());
    }
    Ok(())
}

/// Reads what is there, and writes something else.
fn first(rig: &mut Rig, of: &Function, _: &str) -> Outcome {
    rig.wait_disk(of.guest)?;
    let (got, wanted) = (
        rig.guest(of.guest, &format!("rig-agent sum /dev/nvme0n1 0 {SHARED_MIB}"))?,
        pattern_sum(SHARED_SEED, SHARED_MIB),
    );
    check!(got.trim() == wanted, "{} read {}, the drive holds {wanted}", of.guest, got.trim());
    rig.guest(of.guest, "rig-agent pattern /dev/nvme0n1 0 2 4714").map(drop)
}

/// Reads that.
fn second(rig: &mut Rig, of: &Function, _: &str) -> Outcome {
    rig.wait_disk(of.guest)?;
    let (got, wanted) = (rig.guest(of.guest, "rig-agent sum /dev/nvme0n1 0 2")?, pattern_sum(4714, 2));
    check!(got.trim() == wanted, "{} read {}, the guest before it wrote {wanted}", of.guest, got.trim());
    Ok(())
}
