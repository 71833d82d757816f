//! A function of each kind, ten in all, with two guests: each has the driver that belongs to it and the interrupts that
//! this driver asks for, does its work, and shows every register as dom0 reads it, but for those that [`shown`] lists.
//! docs/devices.md tells what comes of it. The eleventh, a virtual function, is in `virtual-function`.

use std::fmt::Write;

use crate::check;
use crate::dom0::{DRIVER, Guest, Interrupt, NIC, NVME, Outcome, Rig, Stop, XHCI, device_node};
use crate::machine::{STICK_MIB, STICK_SEED, pattern_sum};

/// A virtio network card of the PCI Express kind, behind a root port of its own.
const VIRTIO: &str = "0000:02:00.0";
/// A network card behind a PCIe-to-PCI bridge.
const BRIDGED: &str = "0000:03:01.0";
/// QEMU's device for teaching: registers that compute, and an interrupt line.
const EDU: &str = "0000:00:0c.0";
/// A conventional network card, with its line and without capabilities.
const RTL: &str = "0000:00:0d.0";
/// A sound controller with a codec.
const HDA: &str = "0000:00:0e.0";
/// Two functions of one slot.
const TWINS: [&str; 2] = ["0000:00:10.0", "0000:00:10.1"];

/// What Linux guests call the kinds of interrupts.
pub(super) const MSIX: &str = "xen-pirq -pcifront-msi-x";
const MSI: &str = "xen-pirq -pcifront-msi";
const LINE: &str = "xen-pirq -pcifront";

/// Bits of Command (PCI Local Bus Specification 3.0, 6.2.2).
mod command {
    pub(crate) const IO: u16 = 1 << 0;
    pub(crate) const MEMORY: u16 = 1 << 1;
    pub(crate) const INTX_DISABLE: u16 = 1 << 10;
    /// Bus master, special cycles, memory write and invalidate, palette snooping, stepping, fast back-to-back: what a guest
    /// reads from the device. The other bits it reads as it wrote them.
    pub(crate) const FROM_DEVICE: u16 = 0x02bc;
}

/// Bit of Status, its low byte: there is a list of capabilities.
const STATUS_LIST: u8 = 1 << 4;

/// What Linux's NVMe driver writes to those that are the guest's own.
pub(super) const NVME_COMMAND: u16 = command::MEMORY | command::INTX_DISABLE;

/// What a guest does with its function.
type Work = fn(&mut Rig, &Function, &str) -> Outcome;

/// A function, and what its guest must make of it.
pub(super) struct Function {
    /// Its address in dom0.
    pub(super) bdf: &'static str,
    /// Who gets it.
    pub(super) guest: &'static str,
    /// The driver.
    pub(super) driver: &'static str,
    /// The kind of its interrupts in /proc/interrupts, and how many the driver has asked for.
    pub(super) interrupts: (&'static str, usize),
    /// What the driver has written to those bits of Command that are not read from the device.
    pub(super) command: u16,
    /// Whether the guest has another function of its slot, too.
    pub(super) multifunction: bool,
    /// What it is used for.
    pub(super) work: Work,
}

/// The disks' guest gets what is no network card.
const FUNCTIONS: [Function; 10] = [
    Function {
        bdf: NVME,
        guest: "g1",
        driver: "nvme",
        interrupts: (MSIX, 3),
        command: NVME_COMMAND,
        multifunction: false,
        work: drive,
    },
    Function {
        bdf: XHCI,
        guest: "g1",
        driver: "xhci_hcd",
        interrupts: (MSIX, 3),
        command: command::MEMORY | command::INTX_DISABLE,
        multifunction: false,
        work: stick,
    },
    Function {
        bdf: EDU,
        guest: "g1",
        driver: "uio_pci_generic",
        interrupts: (LINE, 1),
        // Its handler turns the line off, and leaves it to programs to turn it on again.
        command: command::MEMORY | command::INTX_DISABLE,
        multifunction: false,
        work: factorial,
    },
    Function {
        bdf: HDA,
        guest: "g1",
        driver: "snd_hda_intel",
        interrupts: (MSI, 1),
        command: command::MEMORY | command::INTX_DISABLE,
        multifunction: false,
        work: codec,
    },
    card(NIC, "e1000e", (MSIX, 3), false, |rig, of, at| ping(rig, of, at, 2)),
    card(VIRTIO, "virtio-pci", (MSIX, 3), false, |rig, of, at| ping(rig, of, at, 4)),
    card(BRIDGED, "8139cp", (LINE, 1), false, |rig, of, at| ping(rig, of, at, 5)),
    card(RTL, "8139cp", (LINE, 1), false, |rig, of, at| ping(rig, of, at, 6)),
    card(TWINS[0], "e1000e", (MSIX, 3), true, |rig, of, at| ping(rig, of, at, 7)),
    card(TWINS[1], "e1000e", (MSIX, 3), true, |rig, of, at| ping(rig, of, at, 8)),
];

/// A network card: all of them are the other guest's.
const fn card(
    bdf: &'static str,
    driver: &'static str,
    interrupts: (&'static str, usize),
    multifunction: bool,
    work: Work,
) -> Function {
    let line = if interrupts.1 == 1 { command::IO } else { command::INTX_DISABLE };
    Function { bdf, guest: "g2", driver, interrupts, command: command::MEMORY | line, multifunction, work }
}

pub(super) fn run(rig: &mut Rig) -> Outcome {
    let more = [VIRTIO, BRIDGED, EDU, RTL, HDA, TWINS[0], TWINS[1]].join(" ");
    let all = FUNCTIONS.map(|function| function.bdf).join(" ");
    rig.must(&format!("xl destroy {DRIVER}; cp /tmp/{DRIVER}.cfg /tmp/good.cfg; xl-pciback assignable-add {more}"))?;
    rig.must(&format!("xl-pciback config {all} > /tmp/{DRIVER}.cfg"))?;
    let shown = rig.start_driver().and_then(|()| matrix(rig));
    rig.run(&format!(
        "xl destroy g1; xl destroy g2; xl destroy {DRIVER}; xl-pciback assignable-remove {more}; cp /tmp/good.cfg /tmp/{DRIVER}.cfg"
    ))?;
    shown
}

fn matrix(rig: &mut Rig) -> Outcome {
    let all = FUNCTIONS.map(|function| function.bdf);
    rig.wait_ready(&all)?;
    // For the log: how each is reset.
    rig.run("xl-pciback status")?;
    // Attaching takes a fraction of the time while no guest boots beside it.
    for (guest, drivers) in [("g1", "nvme,disks,parts"), ("g2", "e1000e,parts")] {
        rig.create_paused(Guest { drivers, ..Guest::named(guest) })?;
    }
    for function in &FUNCTIONS {
        rig.attach(function.guest, function.bdf)?;
    }
    rig.must("xl unpause g1; xl unpause g2")?;
    rig.wait_up("g1", 1)?;
    rig.wait_up("g2", 1)?;
    // It has no driver in Linux; this one gives it to programs.
    rig.guest("g1", "echo 1234 11e8 >/sys/bus/pci/drivers/uio_pci_generic/new_id")?;
    let mut faults = String::new();
    for guest in ["g1", "g2"] {
        let mut seen = Vec::new();
        for function in FUNCTIONS.iter().filter(|function| function.guest == guest) {
            let place = place(rig, function)?;
            // All of them are told at once, as a machine of another make might differ in several.
            if let Err(stop) = works(rig, function, &place) {
                let _ = writeln!(faults, "{} ({}): {stop}", function.bdf, function.driver);
            }
            seen.push(place.at);
        }
        seen.sort();
        let listed = rig.guest(guest, "ls /sys/bus/pci/devices")?;
        check!(listed.split_whitespace().eq(seen.iter()), "{guest} sees {listed:?} and was given {seen:?}");
    }
    check!(faults.is_empty(), "{faults}");
    let [first, second] = [place(rig, &FUNCTIONS[8])?.at, place(rig, &FUNCTIONS[9])?.at];
    check!(
        first.strip_suffix(".0").is_some_and(|slot| second == format!("{slot}.1")),
        "two functions of one slot are at {first} and {second}"
    );
    rig.must("xl destroy g1; xl destroy g2")?;
    rig.wait_ready(&all)
}

/// Where a function is in its guest.
#[derive(Debug)]
pub(super) struct Place {
    /// Its address there.
    pub(super) at: String,
    /// Its pirq for the line.
    pub(super) pirq: u8,
}

/// What the nodes of a connection say about a function.
pub(super) fn place(rig: &mut Rig, function: &Function) -> Outcome<Place> {
    let Function { bdf, guest, .. } = function;
    let nodes = rig.run(&format!("xenstore-ls /local/domain/$(domid {DRIVER})/backend/pci/$(domid {guest})/0"))?;
    let node = |name: &str| {
        let mut lines = nodes.lines().filter_map(|line| line.trim().split_once(" = "));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim_matches('"'))
    };
    let number = (0..32).find(|number| node(&format!("dev-{number}")) == Some(bdf));
    let found = number.and_then(|number| {
        // Its function has two digits.
        let (slot, last) = node(&format!("vdev-{number}"))?.split_once('.')?;
        let pirq = node(&format!("irq-{number}"))?.parse().ok()?;
        Some(Place { at: format!("{slot}.{}", last.trim_start_matches('0').parse::<u8>().unwrap_or(0)), pirq })
    });
    found.ok_or_else(|| Stop::Failure(format!("{guest} has {bdf} at no address:\n{nodes}")))
}

/// All that is looked at of one function.
pub(super) fn works(rig: &mut Rig, function: &Function, place: &Place) -> Outcome {
    let Function { bdf, guest, driver, interrupts: (kind, count), .. } = function;
    let at = &place.at;
    let folder = format!("/sys/bus/pci/devices/{at}");
    rig.guest_wait(guest, &format!("{driver} to have {at}"), 60, &format!("[ -e {folder}/driver ]"))?;
    let bound = rig.guest(guest, &format!("basename $(readlink {folder}/driver)"))?;
    check!(bound.trim() == *driver, "its driver is {bound}");
    (function.work)(rig, function, at)?;

    // /proc/interrupts shows those only that the driver has a handler for.
    let said = rig.guest(
        guest,
        &format!(
            "numbers=$(ls {folder}/msi_irqs 2>/dev/null || cat {folder}/irq); echo $numbers; \
             for n in $numbers; do grep \"^ *$n:\" /proc/interrupts; done; true"
        ),
    )?;
    let (numbers, lines) = said.split_once('\n').unwrap_or_default();
    let lines: Vec<Interrupt> = lines.lines().filter_map(Interrupt::parse).collect();
    check!(
        numbers.split_whitespace().count() == *count
            && lines.iter().all(|line| line.kind.trim_end_matches("-level") == *kind),
        "its interrupts are {numbers}, of these in use {lines:?}, not {count} of {kind:?}"
    );
    check!(lines.iter().any(|line| line.count > 0), "no interrupt came: {lines:?}");
    let state = rig.published(&device_node(bdf, "state"))?;
    check!(state == "in-use", "it is {state:?}");
    compare(rig, function, place)
}

/// Compares what a guest reads with what it must read.
fn compare(rig: &mut Rig, function: &Function, place: &Place) -> Outcome {
    let Function { bdf, guest, .. } = function;
    let ask = |path: &str| format!("rig-agent registers /sys/bus/pci/devices/{path}/config");
    let mut told = String::new();
    // Status bits may change between two looks; then it is looked again.
    for _ in 0..5 {
        let before = rig.run(&ask(bdf))?;
        let seen = rig.guest(guest, &ask(&place.at))?;
        let after = rig.run(&ask(bdf))?;
        if before != after {
            told = format!("what dom0 reads changes:\n{before}\n{after}");
            continue;
        }
        let (host, seen) = (bytes(&before)?, bytes(&seen)?);
        let known = if host.starts_with(&[0xff; 4]) { Some(known(rig, bdf)?) } else { None };
        let wanted = shown(&host, function, place, known.as_ref());
        check!(
            seen.len() == wanted.len(),
            "the guest reads {} bytes of its configuration space and dom0 {}",
            seen.len(),
            host.len()
        );
        told.clear();
        for (at, ((seen, wanted), host)) in seen.iter().zip(&wanted).zip(&host).enumerate() {
            if seen != wanted {
                let _ = write!(told, "\n{at:03x}: guest {seen:02x}, right would be {wanted:02x}, dom0 {host:02x}");
            }
        }
        break;
    }
    check!(told.is_empty(), "registers differ:{told}");
    Ok(())
}

/// What a guest must read where dom0 reads `host`.
///
/// | register | differs | because |
/// | --- | --- | --- |
/// | Command, bits I/O, memory, parity, SERR, interrupt disable | as the guest wrote them | decoding never goes off under the host's feet (XSA-120), the line is off while MSI or MSI-X is on, and the others are the host's |
/// | header type, bit 7 | whether the *guest's* slot has several functions | a lone function is function 0 of a slot of its own |
/// | interrupt line | the guest's pirq | firmware's notepad otherwise |
/// | capability pointer, where Status tells of no list | zero | it points nowhere (QEMU's rtl8139 has one left over) |
/// | power management capabilities, bits 11 to 15 | zeros | wake events are the host's |
/// | a virtual function's ids and base addresses | as dom0's kernel knows them | its own registers do not tell them |
fn shown(host: &[u8], function: &Function, place: &Place, known: Option<&Known>) -> Vec<u8> {
    let mut wanted = host.to_vec();
    let word = |at: usize| u16::from_le_bytes([host[at], host[at + 1]]);
    let mut put = |at: usize, value: u16| wanted[at..at + 2].copy_from_slice(&value.to_le_bytes());
    put(0x04, word(0x04) & command::FROM_DEVICE | function.command);
    if host[0x06] & STATUS_LIST == 0 {
        put(0x34, u16::from(host[0x35]) << 8);
    }
    if let Some(power) = capability(host, 0x01) {
        put(power + 2, word(power + 2) & 0x07ff);
    }
    for (at, value) in known.iter().flat_map(|known| (0..).step_by(2).zip(&known.ids)) {
        put(at, *value);
    }
    for (at, value) in known.iter().flat_map(|known| (0x10..).step_by(4).zip(&known.bars)) {
        wanted[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    wanted[0x0e] = wanted[0x0e] & 0x7f | if function.multifunction { 0x80 } else { 0 };
    wanted[0x3c] = place.pirq;
    wanted
}

/// What dom0's kernel knows of a virtual function.
#[derive(Debug, Default, PartialEq, Eq)]
struct Known {
    /// Vendor and device id.
    ids: Vec<u16>,
    /// What base address registers would read.
    bars: Vec<u32>,
}

fn known(rig: &mut Rig, bdf: &str) -> Outcome<Known> {
    let text = rig.run(&format!("cd /sys/bus/pci/devices/{bdf}; cat vendor device; head -n 6 resource"))?;
    known_from(&text).ok_or_else(|| Stop::Error(format!("dom0 says of {bdf}: {text:?}")))
}

/// `IORESOURCE_MEM_64` of Linux's `ioport.h`: the next register is the upper half of this one.
const MEMORY_64: u64 = 0x10_0000;

/// Reads two ids and six lines of sysfs `resource`: first address, last address, and flags, of which the low four bits are
/// the register's.
fn known_from(text: &str) -> Option<Known> {
    let numbers: Result<Vec<u64>, _> =
        text.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16)).collect();
    let numbers = numbers.ok()?;
    let (ids, rows) = numbers.split_at_checked(2)?;
    let ids = ids.iter().map(|id| *id as u16).collect();
    let mut bars = Vec::new();
    let mut upper = None;
    for row in rows.chunks_exact(3) {
        let (start, flags) = (row[0], row[2]);
        bars.push(upper.take().unwrap_or(start as u32 | (flags & 0xf) as u32));
        if flags & MEMORY_64 != 0 {
            upper = Some((start >> 32) as u32);
        }
    }
    (bars.len() == 6).then_some(Known { ids, bars })
}

/// Where a capability is.
fn capability(host: &[u8], id: u8) -> Option<usize> {
    let mut at = if host[0x06] & STATUS_LIST != 0 { usize::from(host[0x34]) } else { 0 };
    for _ in 0..48 {
        match at & 0xfc {
            0 => return None,
            here if host[here] == id => return Some(here),
            here => at = usize::from(host[here + 1]),
        }
    }
    None
}

/// The bytes that `rig-agent registers` tells of.
fn bytes(listing: &str) -> Outcome<Vec<u8>> {
    let parsed = || {
        let mut lines = listing.lines();
        let mut bytes = vec![0; usize::from_str_radix(lines.next()?.trim(), 16).ok()?];
        for line in lines {
            let (at, row) = line.split_once(':')?;
            let at = usize::from_str_radix(at, 16).ok()?;
            for (byte, text) in bytes.get_mut(at..at + 16)?.iter_mut().zip(row.split_whitespace()) {
                *byte = u8::from_str_radix(text, 16).ok()?;
            }
        }
        (bytes.len() >= 0x100).then_some(bytes)
    };
    parsed().ok_or_else(|| Stop::Error(format!("configuration space is {listing:?}")))
}

fn drive(rig: &mut Rig, of: &Function, _: &str) -> Outcome {
    rig.wait_disk(of.guest)?;
    rig.check_disk(of.guest, 0, 16)?;
    rig.guest(of.guest, "rig-agent pattern /dev/nvme0n1 96 4 4713")?;
    let (wanted, got) = (pattern_sum(4713, 4), rig.machine.disk_sum(96, 4)?);
    check!(got == wanted, "the guest wrote 4 MiB with sum {wanted}, the image has {got}");
    // Every queue's interrupt comes.
    rig.guest(of.guest, "taskset 1 rig-agent sum /dev/nvme0n1 16 4; taskset 2 rig-agent sum /dev/nvme0n1 20 4")?;
    let lines = rig.interrupt_lines(of.guest, "nvme0q")?;
    check!(lines.iter().all(|line| line.count > 0), "a queue has no interrupts: {lines:?}");
    Ok(())
}

fn stick(rig: &mut Rig, of: &Function, _: &str) -> Outcome {
    rig.guest_wait(of.guest, "the stick", 90, "[ -b /dev/sda ]")?;
    let (got, wanted) =
        (rig.guest(of.guest, &format!("rig-agent sum /dev/sda 0 {STICK_MIB}"))?, pattern_sum(STICK_SEED, STICK_MIB));
    check!(got.trim() == wanted, "the guest read {} from the stick, which holds {wanted}", got.trim());
    Ok(())
}

/// The device computes 10!, and says so by its interrupt. The handler silences the line and leaves the rest to a program, which
/// has the line again and 10! once more. Registers by QEMU's docs/specs/edu.rst.
fn factorial(rig: &mut Rig, of: &Function, at: &str) -> Outcome {
    let said = rig.guest(
        of.guest,
        &format!(
            "cd /sys/bus/pci/devices/{at}; f=$(awk 'NR == 1 {{print $1}}' resource); r() {{ devmem $((f + $1)) 32 $2; }}; \
             came() {{ awk '/uio_pci_generic/ {{print $2 + $3}}' /proc/interrupts; }}; \
             r 0; r 4 0x12345678; r 4; r 0x20 0x80; \
             for turn in 1 2; do \
             printf '\\000' | dd of=config bs=1 seek=5 conv=notrunc 2>/dev/null; r 8 10; \
             n=0; while [ $(came) -lt $turn ]; do n=$((n+1)); [ $n -gt 100 ] && break; sleep 0.1; done; \
             r 8; r 0x24; r 0x64 1; r 0x24; came; done"
        ),
    )?;
    let said: Vec<&str> = said.split_whitespace().collect();
    let turn = |count| ["0x00375F00", "0x00000001", "0x00000000", count];
    let wanted: Vec<&str> = ["0x010000ED", "0xEDCBA987"].into_iter().chain(turn("1")).chain(turn("2")).collect();
    check!(
        said == wanted,
        "it says {said:?} and not {wanted:?}: its name, a number turned round, then twice 10!, why it asks for service, before and \
         after that is done, and how many interrupts have come"
    );
    Ok(())
}

/// The codec behind the sound controller answers: each of its nodes is asked for by way of memory, and answers with an interrupt.
fn codec(rig: &mut Rig, of: &Function, _: &str) -> Outcome {
    rig.guest_wait(of.guest, "the codec", 60, "grep -q '^Codec: ' '/proc/asound/card0/codec#0'")?;
    let said = rig.guest(of.guest, "cat '/proc/asound/card0/codec#0'; ls /dev/snd")?;
    check!(
        said.contains("Vendor Id: 0x1af4") && said.contains("Audio Output") && said.contains("pcmC0D0p"),
        "the codec says {said}"
    );
    Ok(())
}

/// Pings the gateway of the card's own network, 10.0.`number`.0.
fn ping(rig: &mut Rig, of: &Function, at: &str, number: u32) -> Outcome {
    // virtio puts a device of its own between.
    let said = rig.guest(
        of.guest,
        &format!(
            "cd /sys/bus/pci/devices/{at}; n=0; \
             until i=$(ls net 2>/dev/null || ls virtio*/net 2>/dev/null); do n=$((n+1)); [ $n -gt 100 ] && exit 8; sleep 0.3; done; \
             ip link set $i up; ip addr add 10.0.{number}.15/24 dev $i; \
             n=0; until [ \"$(cat /sys/class/net/$i/carrier)\" = 1 ]; do n=$((n+1)); [ $n -gt 100 ] && exit 9; sleep 0.3; done; \
             ping -A -c 5 -W 10 -I $i 10.0.{number}.2"
        ),
    )?;
    check!(said.contains(" 0% packet loss"), "ping lost packets: {said}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function with one capability, power management with all wake events.
    fn host() -> Vec<u8> {
        let mut host = vec![0; 256];
        host[..8].copy_from_slice(&[0x86, 0x80, 0x34, 0x12, 0x47, 0x05, 0x10, 0x00]);
        (host[0x0e], host[0x34], host[0x3c]) = (0x80, 0x50, 0x0b);
        host[0x50..0x54].copy_from_slice(&[0x01, 0x00, 0x03, 0xfe]);
        host
    }

    #[test]
    fn a_listing_of_registers_is_read_back() {
        let mut wanted = vec![0; 256];
        wanted[0xf0..].copy_from_slice(&[0xab; 16]);
        assert_eq!(bytes(&format!("100\nf0:{}\n", " ab".repeat(16))), Ok(wanted));
        assert!(bytes("100\n100: 00\n").is_err() && bytes("10\n").is_err());
    }

    #[test]
    fn only_the_listed_registers_differ_and_only_in_their_bits() {
        let place = Place { at: String::new(), pirq: 23 };
        let function = &FUNCTIONS[0];
        let (host, wanted) = (host(), shown(&host(), function, &place, None));
        let differ: Vec<usize> = (0..host.len()).filter(|at| host[*at] != wanted[*at]).collect();
        // Bus master is the device's; I/O, parity and SERR the guest has not set, memory and interrupt disable it has.
        assert_eq!(differ, [0x04, 0x05, 0x0e, 0x3c, 0x53]);
        assert_eq!((&wanted[4..6], wanted[0x0e], wanted[0x3c], wanted[0x53]), (&[0x06, 0x04][..], 0x00, 23, 0x06));
    }

    #[test]
    fn a_virtual_function_shows_what_dom0_knows_of_it() {
        let text = "0x1b36\n0x0010\n0x00000001fe604000 0x00000001fe607fff 0x0000000000140204\n".to_owned()
            + &"0x0000000000000000 0x0000000000000000 0x0000000000000000\n".repeat(5);
        let known = known_from(&text).unwrap();
        assert_eq!(known, Known { ids: vec![0x1b36, 0x10], bars: vec![0xfe60_4004, 1, 0, 0, 0, 0] });
        let mut host = host();
        host[..4].fill(0xff);
        let wanted = shown(&host, &FUNCTIONS[0], &Place { at: String::new(), pirq: 0 }, Some(&known));
        assert_eq!(
            (&wanted[..4], &wanted[0x10..0x18]),
            (&[0x36, 0x1b, 0x10, 0][..], &[4, 0x40, 0x60, 0xfe, 1, 0, 0, 0][..])
        );
        assert_eq!(known_from("0x1b36\n0x0010\n"), None);
    }
}
