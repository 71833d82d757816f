//! A guest that plays the client by itself attacks the driver domain: every operation with every argument's extremes, a second
//! processor that rewrites page and flags, grants taken back, frames given away, ports closed, nodes scribbled, events by the
//! hundred thousand. Another guest reads its drive meanwhile, and notices nothing; the driver domain is none the bigger for
//! it, and the function goes to the next guest as if nothing had been.

use crate::check;
use crate::dom0::{DRIVER, Guest, NIC, NVME, Outcome, Rig};
use crate::tools::{say, tail};

const HOSTILE: &str = "hostile";
const LOG: &str = "/var/log/xen/guest-hostile.log";

/// How much of the driver domain's heap may be in use afterwards that was not before: queues keep the room that they had
/// once.
const HEAP_SLACK: u64 = 16 * 1024;

/// A guest that reads its drive and its configuration space again and again. With pauses: without them its processes have all
/// of the emulator's two processors, and xenstored's answers take a second.
const READER: &str = "(while [ ! -e /tmp/stop ]; do rig-agent sum /dev/nvme0n1 0 4; sleep 0.2; done) >/tmp/sums 2>&1 & \
     (while [ ! -e /tmp/stop ]; do rig-agent config-read /sys/bus/pci/devices/0000:00:00.0/config 0 4; sleep 0.4; done) \
     >/tmp/reads 2>&1 & echo started";

/// What `xl-pciback attach` would write; it gives functions to PV guests only, as Linux has no client for others. The
/// function is the guest's for the driver domain, and nobody's for Xen. Nodes get the rights of the folder they are made in;
/// the guest waits for the last one.
fn nodes() -> String {
    format!(
        "d=$(domid {DRIVER}); g=$(domid {HOSTILE}); s=/sys/bus/pci/devices/{NIC}; \
         p=/local/domain/$d/backend/pci/$g; b=$p/0; f=/local/domain/$g/device/pci/0; \
         id=$(sed s/0x// $s/vendor):$(sed s/0x// $s/device); \
         resource=$(head -n 7 $s/resource | tr '\\n' ';'); \
         xenstore-write $p '' && xenstore-chmod $p n$d && xenstore-write $b '' $f '' && xenstore-chmod $b n$d r$g && \
         xenstore-chmod $f n$g r$d && xenstore-write $b/frontend $f $b/frontend-id $g $b/online 1 $b/domain {HOSTILE} \
         $b/dev-0 {NIC} $b/key-0 {NIC} $b/opts-0 permissive=0 $b/id-0 $id $b/irq-0 0 $b/resource-0 \"${{resource%;}}\" \
         $b/state-0 1 $b/num_devs 1 $f/state 1 $b/state 1 $f/backend-id $d $f/backend $b"
    )
}

/// A number of the line in which the guest tells what it did.
fn told(line: &str, name: &str) -> Option<u64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest { drivers: "all", ..Guest::named("g1") })?;
    rig.attach("g1", NVME)?;
    rig.wait_up("g1", 1)?;
    rig.wait_disk("g1")?;
    rig.guest("g1", READER)?;
    let heap = rig.report()?.heap_used;
    let lines = lines(rig)?;
    let result = attack(rig);
    let after = result.and_then(|()| calm(rig, heap, lines));
    // It is preserved when it crashes.
    rig.run(&format!("xl destroy {HOSTILE} 2>/dev/null; true"))?;
    after
}

/// Lines of the driver domain's console.
fn lines(rig: &mut Rig) -> Outcome<u64> {
    let text = rig.run(&format!("wc -l < /var/log/xen/guest-{DRIVER}.log"))?;
    Ok(text.trim().parse().unwrap_or(0))
}

/// Starts the guest, and waits until it has done its worst.
fn attack(rig: &mut Rig) -> Outcome {
    rig.must(&format!(
        "rm -f {LOG}; printf '%s\\n' 'name=\"{HOSTILE}\"' 'type=\"pvh\"' 'kernel=\"/usr/lib/xen/boot/hostile-guest\"' memory=8 \
         maxmem=8 vcpus=2 'tsc_mode=\"native\"' 'on_crash=\"preserve\"' >/tmp/{HOSTILE}.cfg; xl create -q /tmp/{HOSTILE}.cfg"
    ))?;
    rig.must(&nodes())?;
    let waited = rig.machine.exec(650, &format!("rig-agent await 600 1 'hostile: done' 'fatal:' {LOG}"))?;
    let log = rig.run(&format!("cat {LOG}"))?.replace('\r', "");
    check!(
        waited.code == 0 && log.contains("hostile: done"),
        "the attack has not ended; it said last\n{}",
        tail(&log, 20)
    );
    for line in log.lines().filter(|line| line.contains("hostile:")) {
        say(line);
    }
    let done = log.lines().find(|line| line.contains("hostile: done")).unwrap_or_default();
    for (name, least, most) in [
        ("sane", 1, 1),
        ("unanswered", 0, 0),
        ("wrong", 0, 0),
        ("twice", 0, 0),
        ("stuck", 0, 0),
        ("requests", 5_000, u64::MAX),
        ("rewrites", 20_000, u64::MAX),
        ("events", 100_000, u64::MAX),
        ("connections", 12, u64::MAX),
        ("refused", 35, u64::MAX),
        ("writes", 1_000, u64::MAX),
    ] {
        let count = told(done, name);
        check!(
            count.is_some_and(|count| (least..=most).contains(&count)),
            "{name} is {count:?}, and not from {least} to {most}:\n{}",
            tail(&log, 30)
        );
    }
    Ok(())
}

/// Nobody else has noticed: `heap` and `lines` are the driver domain's from before.
fn calm(rig: &mut Rig, heap: u64, lines_before: u64) -> Outcome {
    let said = rig
        .guest("g1", "touch /tmp/stop; sort -u /tmp/sums | wc -l; wc -l </tmp/sums; sort -n /tmp/reads | tail -n 1")?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let &[sums, reads, slowest] = words.as_slice() else {
        return Err(crate::dom0::Stop::Failure(format!("the other guest's readers say {said:?}")));
    };
    check!(sums == "1", "the other guest read {sums} different sums of its drive");
    // Linux's client waits for two seconds, and takes the request for failed.
    check!(slowest.parse().is_ok_and(|time: u64| time < 2_000_000_000), "the other guest's reads took {slowest} ns");
    let trouble = rig.guest("g1", "dmesg | grep -e 'not responding' -e timeout -e polled || true")?;
    check!(trouble.is_empty(), "the other guest's kernel says\n{trouble}");
    rig.check_disk("g1", 0, 64)?;

    rig.must("kill -0 $(cat /run/xenstored.pid)")?;
    rig.must(&format!("xl destroy {HOSTILE}"))?;
    rig.wait_device(NIC, "ready")?;
    let left = rig.run(&format!("xenstore-ls -f /local/domain/$(domid {DRIVER})/backend/pci | grep -c '/state = '"))?;
    check!(left.trim() == "1", "{} backends are listed, one guest is there", left.trim());
    let after = rig.report()?.heap_used;
    let written = lines(rig)?.saturating_sub(lines_before);
    say(format!("heap {heap} before, {after} after; {written} lines; {reads} sums, reads of {slowest} ns at most"));
    check!(after <= heap + HEAP_SLACK, "the driver domain's heap was {heap} bytes and is {after}");
    // Ten in ten seconds, and those about hand-overs.
    check!(written < 600, "the driver domain wrote {written} lines");

    // The next guest has the function, clean.
    rig.attach("g1", NIC)?;
    rig.ping("g1")
}
