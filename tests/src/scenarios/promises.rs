//! `guest=NAME` in the driver domain's configuration is kept without anybody attaching anything: when the guest
//! starts, reboots, comes back after a crash, when the driver domain is another one, and when the service itself was not
//! there. What an administrator takes away by hand stays away.

use crate::check;
use crate::dom0::{DRIVER, Guest, NVME, Outcome, Rig, device_node};
use crate::scenarios::Boot;

/// The guest that was promised a drive. A driver that begins while nothing can be written waits for its first command in
/// vain, by itself a minute.
fn promised() -> Guest<'static> {
    Guest { extra: "nvme-core.admin_timeout=15", ..Guest::named("g1") }
}

/// The guest has its drive, and the driver domain says so.
fn has_drive(rig: &mut Rig, name: &str) -> Outcome {
    let domid = rig.domid(name)?.unwrap_or_default();
    rig.wait_published(&device_node(NVME, "frontend"), &domid.to_string())?;
    rig.wait(
        "the frontend to connect",
        60,
        &format!("[ \"$(xenstore-read /local/domain/{domid}/device/pci/0/state)\" = 4 ]"),
    )?;
    // One that it had before may be on its way out.
    rig.guest_wait(name, "its NVMe drive to be read", 60, "rig-agent sum /dev/nvme0n1 0 1")?;
    rig.check_disk(name, 0, 8)
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.must(&format!(
        "xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; sed -i 's/dev={NVME}/&,guest=g1/' /tmp/{DRIVER}.cfg; \
         grep -q guest=g1 /tmp/{DRIVER}.cfg"
    ))?;
    if !rig.boot.has_serve() {
        rig.start_serve()?;
    }
    let kept = rig.start_driver().and_then(|()| keeps(rig));
    rig.run(&format!("xl destroy {DRIVER}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"))?;
    // What went wrong first is what is told.
    kept.and(if rig.boot.has_serve() { Ok(()) } else { rig.stop_serve("TERM") })
}

fn keeps(rig: &mut Rig) -> Outcome {
    let first = rig.create_and_wait(promised())?;
    has_drive(rig, "g1")?;

    rig.guest("g1", "(sleep 0.3; reboot -f) >/dev/null 2>&1 & echo soon")?;
    rig.wait("g1's new domain", 90, &format!("id=$(domid g1) && [ $id != {first} ]"))?;
    rig.wait_up("g1", 2)?;
    has_drive(rig, "g1")?;

    // Another driver domain, while the guest stays: its drive leaves and comes back.
    rig.must(&format!("xl destroy {DRIVER}"))?;
    rig.check_disk("g1", 8, 8)?;
    rig.start_driver()?;
    if rig.boot == Boot::Changed {
        // Only the one that has gone knew which vectors it had mapped: they stay until the guest has ended.
        rig.wait_device(NVME, "broken")?;
        let reason = rig.published(&device_node(NVME, "reason"))?;
        check!(reason.contains("vectors of a guest are still mapped"), "the reason is {reason:?}");
        rig.must("xl destroy g1; rm -f /var/log/xen/guest-g1.log")?;
        rig.create_and_wait(promised())?;
    }
    has_drive(rig, "g1")?;

    // By hand.
    rig.must(&format!("xl-pciback detach g1 {NVME}"))?;
    rig.wait_device(NVME, "ready")?;
    rig.stop_serve("TERM")?;
    rig.start_serve()?;
    if rig.boot.has_serve() {
        rig.wait_published("serve", "connected")?;
    }
    rig.wait_device(NVME, "ready")?;
    let frontend = rig.published(&device_node(NVME, "frontend"))?;
    check!(frontend.is_empty(), "a function that was detached by hand was attached again to {frontend}");
    rig.attach("g1", NVME)?;
    has_drive(rig, "g1")?;

    // A guest that crashes, while nobody is there to see it.
    rig.stop_serve("KILL")?;
    rig.guest("g1", "(sleep 0.3; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 & echo soon")?;
    rig.wait("g1 to be gone", 60, "! domid g1")?;
    rig.run("rm -f /var/log/xen/guest-g1.log")?;
    rig.create_and_wait(promised())?;
    // Killed in the middle of attaching it, when each of these is there for the first time: what is half done is taken
    // back, and done again. One that was listed, the driver domain has refused meanwhile, if it needs serve.
    let listed = "/local/domain/$(domid pciback0)/backend/pci/$(domid g1)/0";
    for node in ["/pciback/assignable/0000-01-00-0/assigning", &format!("{listed}/dev-0"), &format!("{listed}/vdev-0")]
    {
        rig.start_serve()?;
        rig.must(&format!(
            "p={node}; n=0; until xenstore-read $p >/dev/null 2>&1; do n=$((n+1)); [ $n -ge 9000 ] && exit 1; usleep 5000; done"
        ))?;
        rig.stop_serve("KILL")?;
        if node.ends_with("/dev-0") && rig.boot.has_serve() {
            let state = format!("xenstore-read {listed}/state-0");
            rig.wait("the driver domain to have decided", 60, &format!("[ $({state}) -ge 3 ]"))?;
        }
    }
    rig.start_serve()?;
    if rig.boot.has_serve() {
        rig.wait_published("serve", "connected")?;
    }
    // Its driver may have begun while nothing could be written.
    let bound = "[ -b /dev/nvme0n1 ] || { echo 0000:00:00.0 >/sys/bus/pci/drivers/nvme/bind; false; }";
    rig.guest_wait("g1", "its driver to have the drive", 60, bound)?;
    has_drive(rig, "g1")?;
    let half = rig.run("xenstore-read /pciback/assignable/0000-01-00-0/assigning 2>/dev/null || echo none")?;
    check!(half.trim() == "none", "an attachment is said to be under way after its end: {half}");

    // A name is what counts, and not what had it first.
    rig.must("xl rename g1 g5")?;
    let (_, listed) = rig.exec(&format!("xl-pciback list | grep {NVME}"))?;
    check!(listed.contains("g5"), "a renamed guest lost its drive: {listed}");
    rig.create_and_wait(promised())?;
    rig.must("xl destroy g5")?;
    has_drive(rig, "g1")?;
    let left = rig.run("xenstore-ls -f /local/domain/$(domid pciback0)/backend | grep -c '/state = ' || true")?;
    check!(left.trim() == "1", "{} backends are listed, one guest is there", left.trim());
    Ok(())
}
