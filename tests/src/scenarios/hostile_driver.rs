//! A driver domain that has been taken over asks dom0's service for everything it may not have: other functions, vectors
//! for other domains, other addresses for its own; then it floods the channel, sends nonsense, and destroys the ring. A
//! guest of another driver domain reads its drive meanwhile and notices nothing.

use crate::check;
use crate::dom0::{DRIVER, Outcome, Rig, SPARE};

const HOSTILE: &str = "hostile0";

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    rig.guest("g1", "(while rig-agent sum /dev/nvme0n1 0 8; do :; done) >/tmp/sums 2>&1 & echo $! >/tmp/reader")?;
    rig.must(&format!(
        "xl-pciback assignable-add {SPARE}; xl-pciback config --name {HOSTILE} --kernel /usr/lib/xen/boot/pciback-hostile \
         {SPARE} > /tmp/{HOSTILE}.cfg; xl create -q /tmp/{HOSTILE}.cfg"
    ))?;
    let attacked = attacked(rig);
    rig.run(&format!("xl destroy {HOSTILE}; xl-pciback assignable-remove {SPARE}"))?;
    attacked?;
    let sums = rig.guest("g1", "kill $(cat /tmp/reader); sort -u /tmp/sums | wc -l")?;
    check!(sums.trim() == "1", "the other guest read {} different sums", sums.trim());
    rig.check_disk("g1", 0, 32)?;
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    check!(lines.len() == 3 && lines.iter().all(|line| line.kind.contains("msi-x")), "its drive has {lines:?}");
    // And the service goes on serving: the drive's vectors go and come.
    rig.guest("g1", "cd /sys/bus/pci/drivers/nvme; d=$(echo 0000:*); echo $d >unbind; echo $d >bind")?;
    rig.wait_disk("g1")?;
    rig.check_disk("g1", 32, 16)
}

fn attacked(rig: &mut Rig) -> Outcome {
    let node = |name: &str| format!("/local/domain/$(domid {HOSTILE})/data/pciback/hostile/{name}");
    rig.wait("the attack to end", 240, &format!("xenstore-read {}", node("done")))?;
    // EPERM where the function or the guest is not its own, EINVAL where the pirq or the address is not.
    for (name, expected) in [
        ("own-write", "ok"),
        ("foreign", "1"),
        ("foreign-map", "1"),
        ("own-map", "1"),
        ("unmap", "22"),
        ("bars", "1"),
        ("bar-parts", "1"),
        ("settle", "ok"),
        ("after-flood", "ok"),
        ("after-nonsense", "ok"),
    ] {
        let said = rig.must(&format!("xenstore-read {}", node(name)))?;
        check!(said.trim() == expected, "{name}: answered with {:?}, not {expected:?}", said.trim());
    }
    check!(rig.domid(DRIVER)?.is_some(), "the other driver domain is gone");
    let log = rig.serve_log()?;
    let about = log.lines().filter(|line| line.contains(HOSTILE)).count();
    check!((3..200).contains(&about), "the service wrote {about} lines about it");
    check!(log.contains("refused"), "the service does not tell what it refused:\n{log}");
    let size = rig.run("awk '/VmRSS/ {print $2}' /proc/$(cat /run/serve.pid)/status")?;
    let size: u64 = size.trim().parse().unwrap_or(u64::MAX);
    check!(size < 8192, "the service has grown to {size} KiB");
    Ok(())
}
