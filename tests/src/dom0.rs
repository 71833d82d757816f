//! What scenarios do in dom0 and in guests: create, attach, wait with a bound, clean up. Every wait names what it waits
//! for, and its bound is generous: software emulation on a busy machine is slow.

use std::fmt;

use rig_agent::Reply;

use crate::machine::Machine;
use crate::packages::Release;
use crate::scenarios::Boot;
use crate::tools::{Error, tail};

/// The NVMe drive, behind a root port.
pub const NVME: &str = "0000:01:00.0";
/// The first network card.
pub const NIC: &str = "0000:00:05.0";
/// The second network card; the driver domain does not own it.
pub const SPARE: &str = "0000:00:06.0";
/// The USB controller, with a stick behind it.
pub const XHCI: &str = "0000:00:07.0";
/// The SATA controller, with a drive.
pub const AHCI: &str = "0000:00:08.0";
/// What the driver domain owns.
pub const OWNED: [&str; 4] = [NVME, NIC, XHCI, AHCI];
/// The driver domain.
pub const DRIVER: &str = "pciback0";
/// What the driver domain publishes, as dom0's shell finds it.
const PUBLISHED: &str = "/local/domain/$(domid pciback0)/data/pciback";

/// Lists what scenarios compare of xenstore.
const LISTING: &str = "for p in /local /pciback; do xenstore-ls -fp $p; done | \
     grep -v -e '/report = ' -e /cpu-us -e /hypercalls -e /sleeps -e /heap-used -e /memory/ -e '/memory = '";

/// What Linux says when it gives up.
const PANIC: &str = "Kernel panic";

/// What Linux says of a breakpoint that it did not set, or has removed already. Linux patches its code with breakpoints
/// while other processors run it, and QEMU before 8.1 with several threads may go on running the translation of a
/// breakpoint that is gone: its commit deba78709ae8 "accel/tcg: Always lock pages before translation" mended that. Seen
/// once in full, with QEMU 7.2, where Linux patches sched_clock_cpu while it boots; a device or its backend cannot do it.
pub const BREAKPOINT: &str = "int3: 0000 [#";

/// What Xen says of a domain that faults while a fault is being delivered. Under QEMU's emulation it came without a fault of
/// the domain's, at the first instruction behind an exit from it, or with Xen's own registers saved as the domain's: in every
/// other run of a scenario with many exits, until domains were kept off the first processor, where the emulation loses
/// flags (`XL_CONF` in packages.rs says how). It has not been seen since.
pub const TRIPLE_FAULT: &str = "Triple fault";

/// Why a scenario ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It cannot run here, and that is fine.
    Skip(String),
    /// What was tested is wrong.
    Failure(String),
    /// The rig itself could not do its work.
    Error(String),
    /// A domain, or Xen, died that should live.
    Crash(String),
}

/// How a scenario ends, and what its helpers return.
pub type Outcome<T = ()> = Result<T, Stop>;

impl Stop {
    /// Its name in the table.
    pub fn kind(&self) -> &'static str {
        match self {
            Stop::Skip(_) => "skip",
            Stop::Failure(_) => "FAILURE",
            Stop::Error(_) => "ERROR",
            Stop::Crash(_) => "CRASH",
        }
    }

    /// The reason.
    pub fn why(&self) -> &str {
        match self {
            Stop::Skip(why) | Stop::Failure(why) | Stop::Error(why) | Stop::Crash(why) => why,
        }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind(), self.why())
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Error(error.0)
    }
}

/// Ends a scenario as failed unless a condition holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($why:tt)*) => {
        let holds: bool = $condition;
        if !holds {
            return Err($crate::dom0::Stop::Failure(format!($($why)*)));
        }
    };
}

/// What differs between guests.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// Its name.
    pub name: &'a str,
    /// `e820_host` and `passthrough` as a guest with devices needs them.
    pub passthrough: bool,
    /// A device for dom0's own xen-pciback.
    pub pci: Option<&'a str>,
    /// Which device drivers it loads; the fewer the quicker it is up: `nvme`, `e1000e`, `disks`, `parts` (of the machine
    /// that only the device matrix uses), or several of them with commas, or `all` but `parts`.
    pub drivers: &'a str,
    /// More words for its kernel's command line.
    pub extra: &'a str,
}

impl<'a> Guest<'a> {
    /// A guest ready to get an NVMe drive, or with other [`Guest::drivers`] other devices.
    pub fn named(name: &'a str) -> Self {
        Self { name, passthrough: true, pci: None, drivers: "nvme", extra: "" }
    }

    /// Its xl configuration. The kernel's words spare the emulator a good third of its start: pages whose rights are taken
    /// away, code that is changed while it runs, tests of ciphers, a list of places to trace.
    fn config(self) -> String {
        let Self { name, passthrough, pci, drivers, extra } = self;
        let mut text = format!(
            "name=\"{name}\"\ntype=\"pv\"\nkernel=\"/boot/vmlinux\"\nramdisk=\"/boot/guest.img\"\n\
             extra=\"console=hvc0 nokaslr rodata=off noreplace-smp cryptomgr.notests initcall_blacklist=init_kprobe_trace loglevel=6 rig.drivers={drivers} {extra}\"\nmemory=256\nvcpus=2\non_crash=\"destroy\"\non_reboot=\"restart\"\n"
        );
        if let Some(pci) = pci {
            text.push_str(&format!("pci=[\"{pci}\"]\n"));
        } else if passthrough {
            text.push_str("e820_host=1\npassthrough=\"enabled\"\n");
        }
        text
    }
}

/// Configures the card and pings QEMU's gateway.
const PING: &str = "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; \
     n=0; until [ \"$(cat /sys/class/net/eth0/carrier)\" = 1 ]; do n=$((n+1)); [ $n -gt 100 ] && exit 9; sleep 0.3; done; \
     ping -A -c 5 -W 10 10.0.2.2";

/// A line of /proc/interrupts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interrupt {
    /// How often it came, on all processors together.
    pub count: u64,
    /// What the kernel calls its kind, e.g. `xen-pirq -msi-x`.
    pub kind: String,
    /// Who asked for it.
    pub name: String,
}

impl Interrupt {
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().skip(1).peekable();
        let mut count = 0;
        while let Some(number) = words.peek().and_then(|word| word.parse::<u64>().ok()) {
            count += number;
            words.next();
        }
        let rest: Vec<&str> = words.collect();
        let (name, kind) = rest.split_last()?;
        Some(Self { count, kind: kind.join(" "), name: (*name).to_owned() })
    }
}

/// The driver domain's counters.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// Hypercalls since its start.
    pub hypercalls: u64,
    /// Times its event loop slept since its start.
    pub sleeps: u64,
    /// Processor time since its start.
    pub cpu_us: u64,
    /// Bytes of its heap in use.
    pub heap_used: u64,
}

/// The folder a function's state is published in: xenstored accepts neither colons nor dots in a path.
pub fn device_node(bdf: &str, node: &str) -> String {
    format!("device/{}/{node}", bdf.replace([':', '.'], "-"))
}

/// A word the shell takes literally.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A booted machine and what scenarios know about it.
#[derive(Debug)]
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    /// Its release.
    pub release: Release,
    /// How Xen was booted.
    pub boot: Boot,
    console_seen: usize,
    tripled: bool,
}

impl Rig {
    /// Takes over a booted machine.
    pub fn new(machine: Machine, release: Release, boot: Boot) -> Self {
        Self { machine, release, boot, console_seen: 0, tripled: false }
    }

    /// Runs a script in dom0, whatever it answers.
    pub fn exec(&mut self, script: &str) -> Outcome<(i32, String)> {
        let Reply { code, output, .. } = self.machine.exec(90, script)?;
        Ok((code, String::from_utf8_lossy(&output).into_owned()))
    }

    /// Runs a script in dom0 that must succeed.
    pub fn run(&mut self, script: &str) -> Outcome<String> {
        Ok(self.machine.run(90, script)?)
    }

    /// A command under test: when it fails, the scenario fails.
    pub fn must(&mut self, script: &str) -> Outcome<String> {
        let (code, output) = self.exec(script)?;
        check!(code == 0, "`{script}` ended with {code}: {}", tail(&output, 10));
        Ok(output)
    }

    /// Waits until a script in dom0 succeeds.
    pub fn wait(&mut self, what: &str, seconds: u64, script: &str) -> Outcome {
        // As few processes as can be: they take the processors from what is waited for. A look takes its time, too, so the
        // bound is one for the looks.
        let looks = seconds * 3;
        let looped = format!(
            "n=0; until ( {script} ) >/tmp/wait 2>&1; do \
             n=$((n+1)); [ $n -ge {looks} ] && {{ cat /tmp/wait; exit 1; }}; sleep 0.3; done"
        );
        let reply = self.machine.exec(seconds * 6 + 30, &looped)?;
        let said = String::from_utf8_lossy(&reply.output).into_owned();
        check!(reply.code == 0, "waited {seconds} s for {what}. {}", tail(&said, 10));
        Ok(())
    }

    /// A domain's number, if it exists.
    pub fn domid(&mut self, name: &str) -> Outcome<Option<u32>> {
        let (code, output) = self.exec(&format!("domid {name} 2>/dev/null"))?;
        Ok(if code == 0 { output.trim().parse().ok() } else { None })
    }

    /// Creates a guest and returns at once.
    pub fn create(&mut self, guest: Guest<'_>) -> Outcome<u32> {
        let (code, output) = self.try_create(guest)?;
        let domid = if code == 0 { output.trim().lines().last().and_then(|line| line.parse().ok()) } else { None };
        domid.ok_or_else(|| Stop::Error(format!("xl create {} ended with {code}: {}", guest.name, tail(&output, 10))))
    }

    /// Creates a guest, which may fail; prints its number last.
    pub fn try_create(&mut self, guest: Guest<'_>) -> Outcome<(i32, String)> {
        self.try_create_with(guest, "")
    }

    /// Creates a guest that does nothing.
    pub fn create_paused(&mut self, guest: Guest<'_>) -> Outcome {
        let (code, output) = self.try_create_with(guest, "-p")?;
        check!(code == 0, "xl create -p {} ended with {code}: {}", guest.name, tail(&output, 10));
        Ok(())
    }

    fn try_create_with(&mut self, guest: Guest<'_>, option: &str) -> Outcome<(i32, String)> {
        let name = guest.name;
        self.exec(&format!(
            "rm -f /var/log/xen/guest-{name}.log; echo {} > /tmp/{name}.cfg; xl create -q {option} /tmp/{name}.cfg && domid {name}",
            quote(&guest.config())
        ))
    }

    /// Waits until a guest has started `boots` times and takes commands.
    pub fn wait_up(&mut self, name: &str, boots: u32) -> Outcome {
        let log = format!("/var/log/xen/guest-{name}.log");
        let ready = format!("[ $(grep -c '@rig ready' {log}) -ge {boots} ]");
        // A guest that has died will not come up.
        let reply = self.machine.exec(180, &format!("rig-agent await 150 {boots} '@rig ready' '{PANIC}' {log}"))?;
        let waited = match reply.code {
            0 => Ok(()),
            _ => Err(Stop::Failure(format!("waited 150 s for {name} to boot"))),
        };
        if waited.is_err() || self.exec(&ready)?.0 != 0 {
            let log = self.run(&format!("cat {log}"))?.replace('\r', "");
            let why = match waited {
                Err(stop) if !log.contains(PANIC) => stop.why().to_owned(),
                _ => format!("{name}: {PANIC}"),
            };
            return Err(Stop::Failure(format!("{why}; its console says\n{}", trouble(&log))));
        }
        Ok(())
    }

    /// Creates a guest and waits until it takes commands.
    pub fn create_and_wait(&mut self, guest: Guest<'_>) -> Outcome<u32> {
        let domid = self.create(guest)?;
        self.wait_up(guest.name, 1)?;
        Ok(domid)
    }

    /// Whether a domain of this scenario died of a fault of the emulator's: see [`BREAKPOINT`] and [`TRIPLE_FAULT`].
    pub fn emulator_failed(&mut self) -> bool {
        std::mem::take(&mut self.tripled)
            || self.exec(&format!("grep -qF '{BREAKPOINT}' /var/log/xen/guest-*.log")).is_ok_and(|(code, _)| code == 0)
    }

    /// What a domain wrote to its console.
    pub fn guest_log(&mut self, name: &str) -> Outcome<String> {
        Ok(self.exec(&format!("tail -c 6000 /var/log/xen/guest-{name}.log"))?.1.replace('\r', ""))
    }

    /// Runs a script in a guest, whatever it answers.
    pub fn guest_exec(&mut self, name: &str, seconds: u64, script: &str) -> Outcome<(i32, String)> {
        let looked = format!(
            "tty=$(xenstore-read /local/domain/$(domid {name})/console/tty) && rig-agent guest $tty {seconds} {}",
            quote(script)
        );
        let reply = self.machine.exec(seconds + 30, &looked)?;
        Ok((reply.code, String::from_utf8_lossy(&reply.output).into_owned()))
    }

    /// Runs a script in a guest that must succeed.
    pub fn guest(&mut self, name: &str, script: &str) -> Outcome<String> {
        let (code, output) = self.guest_exec(name, 90, script)?;
        if code != 0 {
            let (_, log) = self.guest_exec(name, 10, "dmesg | tail -n 15").unwrap_or_default();
            return Err(Stop::Failure(format!(
                "{name}: `{script}` ended with {code}: {}\nits kernel said last\n{log}",
                tail(&output, 10)
            )));
        }
        Ok(output)
    }

    /// Waits until a script in a guest succeeds.
    pub fn guest_wait(&mut self, name: &str, what: &str, seconds: u64, script: &str) -> Outcome {
        let looped =
            format!("n=0; until ( {script} ); do n=$((n+1)); [ $n -ge {} ] && exit 1; sleep 0.5; done", seconds * 2);
        let (code, output) = self.guest_exec(name, seconds * 2 + 20, &looped)?;
        if code != 0 {
            let (_, log) = self.guest_exec(name, 10, "dmesg | tail -n 20").unwrap_or_default();
            return Err(Stop::Failure(format!(
                "{name}: waited {seconds} s for {what}. {}\nits kernel said last\n{log}",
                tail(&output, 5)
            )));
        }
        Ok(())
    }

    /// Attaches a function and waits until the driver domain has handed it out.
    pub fn attach(&mut self, guest: &str, bdf: &str) -> Outcome {
        self.must(&format!("xl-pciback attach {guest} {bdf}")).map(drop)
    }

    /// Creates a guest that has the NVMe drive from its start, and waits until both are there.
    pub fn create_with_drive(&mut self, name: &str) -> Outcome<u32> {
        let domid = self.create(Guest::named(name))?;
        self.attach(name, NVME)?;
        self.wait_up(name, 1)?;
        self.wait_disk(name)?;
        Ok(domid)
    }

    /// Waits for the guest's drive.
    pub fn wait_disk(&mut self, guest: &str) -> Outcome {
        self.guest_wait(guest, "its NVMe drive", 60, "[ -b /dev/nvme0n1 ]")
    }

    /// Reads a part of the drive in a guest and compares it with the image.
    pub fn check_disk(&mut self, guest: &str, offset: u64, count: u64) -> Outcome {
        let wanted = self.machine.disk_sum(offset, count)?;
        let got = self.guest(guest, &format!("rig-agent sum /dev/nvme0n1 {offset} {count}"))?;
        check!(
            got.trim() == wanted,
            "{guest} read {count} MiB at {offset} MiB with sum {}, the image has {wanted}",
            got.trim()
        );
        Ok(())
    }

    /// Interrupts a driver got in a guest, all its lines together.
    pub fn interrupts(&mut self, guest: &str, driver: &str) -> Outcome<u64> {
        let script = format!(
            "grep {driver} /proc/interrupts | awk '{{for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) s += $i}} END {{print s + 0}}'"
        );
        let output = self.guest(guest, &script)?;
        output.trim().parse().map_err(|_| Stop::Error(format!("interrupt count: {output}")))
    }

    /// The lines of a guest's /proc/interrupts that name a driver: for each the sum over its processors, the kind (the
    /// words behind the counts up to the name), and the name.
    pub fn interrupt_lines(&mut self, guest: &str, driver: &str) -> Outcome<Vec<Interrupt>> {
        let output = self.guest(guest, &format!("grep {driver} /proc/interrupts || true"))?;
        Ok(output.lines().filter_map(Interrupt::parse).collect())
    }

    /// Waits until a guest's network card has come up, then pings QEMU's gateway through it.
    pub fn ping(&mut self, guest: &str) -> Outcome {
        self.guest_wait(guest, "its network card", 60, "[ -e /sys/class/net/eth0 ]")?;
        let said = self.guest(guest, PING)?;
        check!(said.contains(" 0% packet loss"), "ping lost packets: {said}");
        Ok(())
    }

    /// Message Control of a function's MSI-X capability at `offset`, as the hardware has it, in hexadecimal.
    pub fn msix_control(&mut self, bdf: &str, offset: u32) -> Outcome<String> {
        let at = offset + 2;
        Ok(self.run(&format!("od -An -tx2 -j{at} -N2 /sys/bus/pci/devices/{bdf}/config"))?.trim().to_owned())
    }

    /// Xen's interrupts that belong to guests, from `xl debug-keys i`: one line each.
    pub fn guest_irqs(&mut self) -> Outcome<Vec<String>> {
        // The new part only: the ring keeps what earlier calls printed. Xen prints behind the command's back, this part
        // before its IO-APICs.
        let output = self.run(
            "xl dmesg -c >/dev/null; xl debug-keys i; \
             until xl dmesg | grep -q 'IO-APIC interrupt information'; do sleep 0.1; done; xl dmesg",
        )?;
        let lines = output.lines().filter(|line| line.contains("IRQ:"));
        Ok(lines.filter(|line| line.contains("PCI-MSI")).map(|line| line.trim().to_owned()).collect())
    }

    /// The last lines of the driver domain's own console.
    pub fn driver_log(&mut self) -> Outcome<String> {
        self.guest_log(DRIVER)
    }

    /// A node the driver domain publishes, or nothing.
    pub fn published(&mut self, node: &str) -> Outcome<String> {
        Ok(self.exec(&format!("xenstore-read {PUBLISHED}/{node} 2>/dev/null"))?.1.trim().to_owned())
    }

    /// CPU time of the driver domain from entry to ready, microseconds. It is published right behind the state.
    pub fn ready_cpu(&mut self) -> Outcome<u64> {
        self.wait("the driver domain's CPU time", 20, &format!("xenstore-read {PUBLISHED}/ready-cpu-us"))?;
        let text = self.published("ready-cpu-us")?;
        text.parse().map_err(|_| Stop::Failure(format!("ready-cpu-us is {text:?}")))
    }

    /// Waits until the driver domain publishes a value.
    pub fn wait_published(&mut self, node: &str, value: &str) -> Outcome {
        let read = format!("xenstore-read {PUBLISHED}/{node}");
        self.wait(&format!("{DRIVER} to publish {node}={value}"), 60, &format!("[ \"$({read})\" = {value} ]"))
    }

    /// Asks the driver domain for its counters.
    pub fn report(&mut self) -> Outcome<Report> {
        self.must(&format!("xenstore-write {PUBLISHED}/report 1"))?;
        self.wait("the driver domain's report", 20, &format!("[ -z \"$(xenstore-read {PUBLISHED}/report)\" ]"))?;
        let text =
            self.must(&format!("for n in hypercalls sleeps cpu-us heap-used; do xenstore-read {PUBLISHED}/$n; done"))?;
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match numbers.as_slice() {
            &[hypercalls, sleeps, cpu_us, heap_used] => Ok(Report { hypercalls, sleeps, cpu_us, heap_used }),
            _ => Err(Stop::Failure(format!("the driver domain's report is {text:?}"))),
        }
    }

    /// Waits until a function is in a state.
    pub fn wait_device(&mut self, bdf: &str, state: &str) -> Outcome {
        self.wait_published(&device_node(bdf, "state"), state)
    }

    /// Waits until nobody has any of these functions.
    pub fn wait_ready(&mut self, functions: &[&str]) -> Outcome {
        let nodes: String = functions.iter().map(|bdf| format!(" $d/{}", device_node(bdf, "state"))).collect();
        let ready = vec!["ready"; functions.len()].join(" ");
        self.wait(
            "all functions to be ready",
            60,
            &format!("d={PUBLISHED}; [ \"$(echo $(xenstore-read{nodes}))\" = \"{ready}\" ]"),
        )
    }

    /// Prepares the devices and writes the driver domain's config; once a boot.
    pub fn set_up(&mut self) -> Outcome {
        let owned = OWNED.join(" ");
        self.must(&format!("xl-pciback assignable-add {owned}"))?;
        self.must(&format!("xl-pciback config {owned} > /tmp/{DRIVER}.cfg"))?;
        self.run(&format!("echo 'on_crash=\"preserve\"' >> /tmp/{DRIVER}.cfg; cat /tmp/{DRIVER}.cfg"))?;
        if self.boot.has_serve() {
            self.start_serve()?;
        }
        self.start_driver()
    }

    /// Starts dom0's service.
    pub fn start_serve(&mut self) -> Outcome {
        self.must("setsid xl-pciback serve </dev/null >>/var/log/serve.log 2>&1 & echo $! >/run/serve.pid")?;
        self.wait("xl-pciback serve", 20, "xenstore-read /pciback/serve")
    }

    /// Ends it, with this signal.
    pub fn stop_serve(&mut self, signal: &str) -> Outcome {
        self.must(&format!("kill -{signal} $(cat /run/serve.pid)"))?;
        self.wait("xl-pciback serve to end", 20, "! kill -0 $(cat /run/serve.pid)")
    }

    /// What it said.
    pub fn serve_log(&mut self) -> Outcome<String> {
        self.run("cat /var/log/serve.log 2>/dev/null || true")
    }

    /// Creates the driver domain and waits until it serves and, where it needs dom0 for that, can do so fully.
    pub fn start_driver(&mut self) -> Outcome {
        self.start_driver_alone()?;
        if self.boot.has_serve() {
            self.wait_published("serve", "connected")?;
        }
        Ok(())
    }

    /// Creates the driver domain and waits until it serves.
    pub fn start_driver_alone(&mut self) -> Outcome {
        self.must(&format!("rm -f /var/log/xen/guest-{DRIVER}.log; xl create -q /tmp/{DRIVER}.cfg"))?;
        let waited = self.wait_published("state", "ready");
        if let Err(stop) = waited {
            let log = self.driver_log()?;
            self.check_crash()?;
            return Err(Stop::Failure(format!("{}; its console ends with\n{}", stop.why(), tail(&log, 15))));
        }
        Ok(())
    }

    /// Notes everything in xenstore about domains and this project, for [`Rig::changed`]. What changes by itself is left
    /// out, and so is the memory target that any xl command may note; and xl's own notes (`/libxl`, `/vm`, `/tool`), which
    /// are as many again, as a listing takes xenstored seconds here.
    pub fn note_store(&mut self) -> Outcome {
        self.run(&format!("{LISTING} >/tmp/store.before")).map(drop)
    }

    /// What has changed in xenstore since: lines that have gone, with a minus, and lines that have come. They are compared in
    /// dom0, because a listing is long and the line to it slow.
    pub fn changed(&mut self) -> Outcome<String> {
        self.run(&format!(
            "{LISTING} >/tmp/store.after; cd /tmp; grep -vxFf store.after store.before | sed 's/^/- /'; \
             grep -vxFf store.before store.after | sed 's/^/+ /'; true"
        ))
    }

    /// Looks whether a domain or Xen died since the last look.
    pub fn check_crash(&mut self) -> Outcome {
        let console = self.machine.console();
        let fresh = console.get(self.console_seen..).unwrap_or_default().to_owned();
        self.console_seen = console.len();
        self.tripled |= fresh.contains(TRIPLE_FAULT);
        for sign in ["domain_crash", "Panic on CPU", "FATAL TRAP", "Kernel panic", "crashed on cpu", TRIPLE_FAULT] {
            if let Some(line) = fresh.lines().find(|line| line.contains(sign)) {
                return Err(Stop::Crash(line.to_owned()));
            }
        }
        if let Some(ending) = self.machine.ending() {
            return Err(Stop::Crash(format!("QEMU ended ({ending}); the console ends with\n{}", tail(&console, 15))));
        }
        let (_, listed) = self.exec("xl list | awk 'NR > 1 && $5 ~ /c/ {print $1}'")?;
        check_listed(listed.trim())
    }

    /// Makes the machine ready for the next scenario.
    pub fn clean_up(&mut self, driver: bool) -> Outcome {
        let script = format!(
            "for d in $(xl list | awk 'NR > 1 && $1 != \"Domain-0\" && $1 != \"{DRIVER}\" {{print $1}}'); do xl destroy $d; done; \
             rm -f /var/log/xen/guest-g*.log; \
             [ -z \"$(xl list | awk '$1 == \"{DRIVER}\" && $5 ~ /[csd]/')\" ] || xl destroy {DRIVER}; \
             domid {DRIVER} 2>/dev/null || echo none"
        );
        let output = self.run(&script)?;
        if !driver {
            return Ok(());
        }
        if output.contains("none") {
            self.start_driver()?;
        }
        if self.wait_ready(&OWNED).is_err() {
            // A device that does not come back must not spoil what follows: a new driver domain starts from nothing.
            self.exec(&format!("xl destroy {DRIVER}"))?;
            self.start_driver()?;
            self.wait_ready(&OWNED)?;
        }
        Ok(())
    }
}

/// The part of a guest's console that tells why it died: from its kernel's first complaint on, or the end.
fn trouble(log: &str) -> String {
    const SIGNS: [&str; 6] = ["BUG:", "Oops", BREAKPOINT, "general protection", "invalid opcode", PANIC];
    let first = log.lines().position(|line| SIGNS.iter().any(|sign| line.contains(sign)));
    first.map_or_else(
        || tail(log, 15),
        |first| log.lines().skip(first.saturating_sub(3)).take(40).collect::<Vec<_>>().join("\n"),
    )
}

fn check_listed(names: &str) -> Outcome {
    if names.is_empty() { Ok(()) } else { Err(Stop::Crash(format!("{names} crashed"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_survive_the_shell() {
        let script = format!("printf %s {}", quote("it's $HOME \"x\""));
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(out.stdout, b"it's $HOME \"x\"");
    }

    #[test]
    fn what_killed_a_guest_is_shown_rather_than_what_it_said_last() {
        let noise = "later\n".repeat(50);
        let log = format!("a\nb\nc\nd\n[ 1.9] BUG: unable to handle page fault\nRIP: here\n{noise}");
        let shown = trouble(&log);
        assert!(shown.starts_with("b\nc\nd\n[ 1.9] BUG:") && shown.contains("RIP: here"), "{shown}");
        assert_eq!(trouble(&noise).lines().count(), 15);
    }

    #[test]
    fn a_line_of_interrupts_has_count_kind_and_name() {
        let line = " 55:        120          3  xen-pirq    -msi-x     nvme0q1";
        let wanted = Interrupt { count: 123, kind: "xen-pirq -msi-x".into(), name: "nvme0q1".into() };
        assert_eq!(Interrupt::parse(line), Some(wanted));
    }

    #[test]
    fn a_guest_without_passthrough_has_neither_key() {
        let config = Guest { passthrough: false, ..Guest::named("g") }.config();
        assert!(!config.contains("e820_host") && !config.contains("passthrough"));
    }
}
