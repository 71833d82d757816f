//! dom0's service ends while a guest reads its drive: reads and interrupts go on, writes to configuration space are
//! refused, and all works again once it is back. Then it is killed in the middle of attachments. At rest it needs no
//! processor and little memory.

use crate::check;
use crate::dom0::{NIC, Outcome, Rig};

/// Sets the drive's cache line size, which the hardware keeps, and reads it back.
fn set_cache_line(rig: &mut Rig, value: u8) -> Outcome<String> {
    let script = format!(
        "f=$(echo /sys/bus/pci/drivers/nvme/0000:*/config); printf '\\{value:03o}' | dd of=$f bs=1 seek=12 conv=notrunc \
         2>/dev/null; dd if=$f bs=1 skip=12 count=1 2>/dev/null | od -An -tu1"
    );
    Ok(rig.guest("g1", &script)?.trim().to_owned())
}

/// How many lines of the driver domain's console say that writes are refused because nobody carries them out.
fn refusals(rig: &mut Rig) -> Outcome<usize> {
    Ok(rig.driver_log()?.matches("nothing can be written now").count())
}

fn connected(rig: &mut Rig, yes: bool) -> Outcome {
    rig.wait_published("serve", if yes { "connected" } else { "'not connected'" })
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create_with_drive("g1")?;
    check!(set_cache_line(rig, 8)? == "8", "the cache line size does not take 8");
    rig.guest("g1", "(while rig-agent sum /dev/nvme0n1 0 8; do :; done) >/tmp/sums 2>&1 & echo $! >/tmp/reader")?;
    for (signal, value) in [("KILL", 16), ("TERM", 32)] {
        rig.stop_serve(signal)?;
        connected(rig, false)?;
        let before = refusals(rig)?;
        for _ in 0..3 {
            let read = set_cache_line(rig, value)?;
            check!(read != value.to_string(), "after SIG{signal} a write took effect: {read}");
        }
        // The first of a guest is told, until it has the device anew.
        let lines = refusals(rig)? - before;
        check!(lines <= 1, "{lines} lines about three writes");
        rig.check_disk("g1", 8, 8)?;
        rig.start_serve()?;
        connected(rig, true)?;
        check!(set_cache_line(rig, value)? == value.to_string(), "after a new start a write takes no effect");
        rig.check_disk("g1", 16, 8)?;
    }
    check!(refusals(rig)? > 0, "the driver domain does not say that writes are refused");
    // The reader saw nothing of it, and every sum was the same.
    let sums = rig.guest("g1", "kill $(cat /tmp/reader); sort -u /tmp/sums | wc -l; wc -l </tmp/sums")?;
    let counts: Vec<u64> = sums.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    check!(matches!(counts.as_slice(), [1, all] if *all > 1), "different sums, and all: {counts:?}");

    for round in 1..=4 {
        rig.must(&format!(
            "(xl-pciback attach g1 {NIC}; echo $? >/tmp/code) >/tmp/attach 2>&1 & rm -f /tmp/code; sleep 0.{round}"
        ))?;
        rig.stop_serve("KILL")?;
        rig.start_serve()?;
        rig.wait("the attachment to end", 60, "[ -s /tmp/code ]")?;
        if rig.run("cat /tmp/code")?.trim() != "0" {
            // Refused whole; the next one must not meet anything of it.
            connected(rig, true)?;
            rig.wait_device(NIC, "ready")?;
            rig.attach("g1", NIC)?;
        }
        connected(rig, true)?;
        rig.must(&format!("xl-pciback detach g1 {NIC}"))?;
        rig.wait_device(NIC, "ready")?;
    }
    // And one by hand that is killed is taken back by the service.
    let record = "/pciback/assignable/0000-00-05-0";
    rig.must(&format!(
        "xl-pciback attach g1 {NIC} >/tmp/attach 2>&1 & p=$!; n=0; until xenstore-read {record}/assigning >/dev/null 2>&1; do \
         n=$((n+1)); [ $n -ge 9000 ] && exit 1; usleep 5000; done; kill -KILL $p"
    ))?;
    let gone = format!("! xenstore-read {record}/assigning && ! xenstore-read {record}/domid");
    rig.wait("the service to take back what was half done", 60, &gone)?;
    rig.wait_device(NIC, "ready")?;
    rig.attach("g1", NIC)?;
    rig.must(&format!("xl-pciback detach g1 {NIC}"))?;
    // Its vectors come and go as ever.
    rig.guest("g1", "cd /sys/bus/pci/drivers/nvme; d=$(echo 0000:*); echo $d >unbind; echo $d >bind")?;
    rig.wait_disk("g1")?;
    rig.check_disk("g1", 0, 16)?;
    let lines = rig.interrupt_lines("g1", "nvme0q")?;
    check!(lines.iter().all(|line| line.kind.contains("msi-x")), "after all that the drive has {lines:?}");
    rest(rig)
}

/// What the service needs when nothing happens.
fn rest(rig: &mut Rig) -> Outcome {
    let status = "cat /proc/$(cat /run/serve.pid)/task/*/status | awk '/ctxt_switches/ {n += $2} /VmRSS/ {m = $2} END {print n, m}'";
    let numbers = |text: String| -> Vec<u64> { text.split_whitespace().filter_map(|word| word.parse().ok()).collect() };
    let before = numbers(rig.run(status)?);
    // A stretch of rest is what is measured.
    rig.run("sleep 20")?;
    let after = numbers(rig.run(status)?);
    match (before.as_slice(), after.as_slice()) {
        (&[first, _], &[last, memory]) => {
            check!(memory > 100 && memory < 8192, "it has {memory} KiB of memory");
            // Reminders of guests are the only thing that can be due.
            check!(last - first <= 6, "it woke {} times in 20 s of rest", last - first);
            Ok(())
        }
        other => Err(crate::dom0::Stop::Failure(format!("its status is {other:?}"))),
    }
}
