//! One emulated machine with Xen on it: starts QEMU, speaks with the command server in dom0, ends QEMU on drop.
//! The processor flags are what it takes to boot Xen under QEMU's software emulation; each is explained where it stands.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rig_agent::{CODE_TIMEOUT, MIB, Pattern, READY, Reply, Request, Sum};

use crate::fail;
use crate::initramfs::{self, Parts};
use crate::packages::Base;
use crate::tools::{Context, Error, Result, make_dir, say, tail, write};

/// Size of the NVMe drive.
pub const DISK_MIB: u64 = 128;
/// Seed of the drive's content.
pub const DISK_SEED: u64 = 20;
/// Size of the USB stick.
pub const STICK_MIB: u64 = 16;
/// Seed of the stick's content.
pub const STICK_SEED: u64 = 21;
/// Size of the SATA drive.
pub const SATA_MIB: u64 = 16;
/// Seed of the SATA drive's content.
pub const SATA_SEED: u64 = 22;

/// Size of the namespace that the second NVMe drive shares with its virtual function.
pub const SHARED_MIB: u64 = 16;
/// Seed of its content.
pub const SHARED_SEED: u64 = 23;

/// Signals QEMU dies of by its own fault: whatever runs in the machine must not bring the emulator down. Seen of QEMU 7.2:
/// an assertion about the timer of an e1000e whose driver turns on MSI-X while it still runs for the interrupt line
/// (e1000e_intrmgr_on_throttling_timer in hw/net/e1000e_core.c).
const CRASHES: [(i32, &str); 5] = [(4, "SIGILL"), (6, "SIGABRT"), (7, "SIGBUS"), (8, "SIGFPE"), (11, "SIGSEGV")];

/// File of what QEMU logs: resets of its processors, which include what they did when Xen itself had a triple fault.
const CPU_LOG: &str = "cpu.log";

/// File of Xen's and dom0's console.
const CONSOLE: &str = "console.log";

/// How to boot.
#[derive(Debug, Clone)]
pub struct Options {
    /// Words for Xen's command line.
    pub xen_args: String,
    /// dom0's console on this terminal, with a shell.
    pub shell: bool,
    /// Where logs and images of this run go.
    pub dir: PathBuf,
}

/// The right to run a machine: one at a time on this computer, because two on a few cores starve each other until guests
/// miss their timeouts and figures mean nothing. `flock` holds it, and lets go when the pipe to it closes.
#[derive(Debug)]
struct Turn {
    holder: Child,
}

impl Turn {
    fn wait() -> Result<Self> {
        // A file of another user in a shared folder could not be opened.
        let user = std::fs::metadata("/proc/self").context("/proc/self")?.uid();
        Self::wait_for(&std::env::temp_dir().join(format!("pciback-stubdom-rig.{user}.lock")))
    }

    fn wait_for(path: &Path) -> Result<Self> {
        let mut holder = Command::new("flock")
            .arg(path)
            .arg("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("flock")?;
        let (Some(mut to), Some(from)) = (holder.stdin.take(), holder.stdout.take()) else {
            return Err(fail!("flock has no pipes"));
        };
        std::io::Write::write_all(&mut to, b"mine\n")?;
        // cat starts, and echoes, when the lock is taken.
        let (sender, answer) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            let read = BufReader::new(from).read_line(&mut line);
            sender.send(read.is_ok() && line == "mine\n")
        });
        let mut told = false;
        let taken = loop {
            match answer.recv_timeout(Duration::from_secs(2)) {
                Err(RecvTimeoutError::Timeout) if told => {}
                Err(RecvTimeoutError::Timeout) => {
                    say("waiting for another rig on this computer to end");
                    told = true;
                }
                answered => break answered == Ok(true),
            }
        };
        holder.stdin = Some(to);
        let turn = Self { holder };
        if taken { Ok(turn) } else { Err(fail!("cannot lock {}", path.display())) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Closes the pipe, and cat ends.
        let _ = self.holder.wait();
    }
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    commands: ChildStdin,
    expect: Sender<u64>,
    replies: Receiver<std::io::Result<Reply>>,
    seq: u64,
    dir: PathBuf,
    /// Its pipe was found closed.
    closed: bool,
    // Dropped after QEMU has ended.
    _turn: Turn,
}

/// QEMU's command line.
fn qemu(base: &Base, options: &Options) -> Command {
    let dir = &options.dir;
    let show = |name: &str| dir.join(name).to_string_lossy().replace(',', ",,");
    // setpriv asks the kernel to end QEMU with this program, however that ends; Drop alone does not see a signal.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&base.qemu);
    command.args(["-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi"]);
    // svm, npt: PVH domains need them. xsaves: the emulated sizes disagree. smap, smep: QEMU before 9.1 does a PV kernel's
    // iret with kernel rights. monitor: Xen would idle with mwait and die. rdtscp: its exits cannot be decoded.
    command.args(["-cpu", "EPYC,+svm,+npt,-xsaves,-smap,-smep,-monitor,-rdtscp", "-smp", "2", "-m", "3072"]);
    command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"]);
    command.args(["-d", "cpu_reset", "-D"]).arg(dir.join(CPU_LOG));
    if options.shell {
        command.args(["-serial", "stdio"]);
    } else {
        command.arg("-serial").arg(format!("file:{}", show(CONSOLE)));
        command.args(["-chardev", "stdio,id=control,signal=off", "-serial", "chardev:control"]);
    }
    // x-speed: behind a quicker port Linux waits, after a reset of the bus, for a bit that QEMU does not set again.
    command.args(["-device", "intel-iommu,intremap=on", "-device", "pcie-root-port,id=rp1,slot=1,chassis=1,x-speed=5"]);
    command.arg("-drive").arg(format!("if=none,id=nv,format=raw,file={}", show("nvme.img")));
    command.args(["-device", "nvme,drive=nv,serial=rig,bus=rp1"]);
    command.args(["-netdev", "user,id=net0", "-device", "e1000e,netdev=net0,bus=pcie.0,addr=5"]);
    command.args(["-netdev", "user,id=net1", "-device", "e1000e,netdev=net1,bus=pcie.0,addr=6"]);
    command.arg("-drive").arg(format!("if=none,id=stick,format=raw,file={}", show("stick.img")));
    command.args(["-device", "qemu-xhci,id=xhci,bus=pcie.0,addr=7", "-device", "usb-storage,bus=xhci.0,drive=stick"]);
    command.arg("-drive").arg(format!("if=none,id=sata,format=raw,file={}", show("sata.img")));
    command.args(["-device", "ich9-ahci,id=ahci,bus=pcie.0,addr=8", "-device", "ide-hd,bus=ahci.0,drive=sata"]);
    parts(&mut command);
    command.arg("-drive").arg(format!("if=none,id=shared,format=raw,file={}", show("shared.img")));
    // One virtual function with three queues and interrupts, which its physical function must give it first.
    for device in [
        "pcie-root-port,id=rp3,bus=pcie.0,addr=b,slot=3,chassis=3,x-speed=5",
        "nvme-subsys,id=family",
        "nvme,id=physical,serial=shared,subsys=family,bus=rp3,sriov_max_vfs=1,sriov_vq_flexible=3,sriov_vi_flexible=3",
        "nvme-ns,drive=shared,bus=physical,nsid=1",
    ] {
        command.args(["-device", device]);
    }
    // noreplace-smp: the emulator translates code anew that is changed while it runs.
    command.arg("-kernel").arg(&base.xen).arg("-initrd").arg(format!(
        "{} console=hvc0 nokaslr noreplace-smp loglevel=4,{}",
        base.linux.to_string_lossy().replace(',', ",,"),
        show("dom0.img")
    ));
    // xsave=0: with AVX in use, processes of dom0 and of PV guests died at random (heap corruption, null thread pointers)
    // whenever a PVH domain ran beside them; without it they do not. Looks like QEMU's emulation of the state's switch.
    command.arg("-append").arg(format!(
        "console=com1 com1=115200,8n1 dom0_mem=1024M,max:1024M loglvl=all guest_loglvl=all cpuidle=0 xsave=0 \
         iommu=verbose {}",
        options.xen_args
    ));
    command
}

/// What only the device matrix (`scenarios/device_matrix.rs`) gives to guests. Each card is on a network of its own, and none
/// has a ROM, which the firmware would run at each boot.
fn parts(command: &mut Command) {
    let mut device = |text: &str| {
        command.args(["-device", text]);
    };
    device("pcie-root-port,id=rp2,bus=pcie.0,addr=9,slot=2,chassis=2,x-speed=5");
    device("pcie-pci-bridge,id=bridge,bus=pcie.0,addr=a");
    device("edu,bus=pcie.0,addr=c");
    device("intel-hda,id=hda,bus=pcie.0,addr=e");
    command.args(["-audiodev", "none,id=silence", "-device", "hda-output,bus=hda.0,audiodev=silence"]);
    for (number, card) in [
        // iommu_platform: without it the card's transactions would not go through the IOMMU, as those of a real one do.
        (2, "virtio-net-pci,bus=rp2,disable-legacy=on,iommu_platform=on"),
        (3, "rtl8139,bus=bridge,addr=1"),
        (4, "rtl8139,bus=pcie.0,addr=d"),
        (5, "e1000e,bus=pcie.0,addr=10.0,multifunction=on"),
        (6, "e1000e,bus=pcie.0,addr=10.1"),
    ] {
        command.arg("-netdev").arg(format!("user,id=net{number},net=10.0.{}.0/24", number + 2));
        command.arg("-device").arg(format!("{card},netdev=net{number},romfile="));
    }
}

/// Waits for the command server, then hands over one reply for each number asked for.
fn listen(out: ChildStdout, wanted: &Receiver<u64>, replies: &Sender<std::io::Result<Reply>>) {
    let mut out = BufReader::new(out);
    let mut line = Vec::new();
    loop {
        line.clear();
        match out.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => {
                let _ = replies.send(Err(std::io::ErrorKind::UnexpectedEof.into()));
                return;
            }
            Ok(_) if String::from_utf8_lossy(&line).contains(READY) => break,
            Ok(_) => {}
        }
    }
    if replies.send(Ok(Reply { seq: 0, code: 0, output: Vec::new() })).is_err() {
        return;
    }
    while let Ok(seq) = wanted.recv() {
        if replies.send(Reply::read(&mut out, seq)).is_err() {
            return;
        }
    }
}

fn make_disks(dir: &Path) -> Result<()> {
    make_disk(&dir.join("nvme.img"), DISK_SEED, DISK_MIB)?;
    make_disk(&dir.join("stick.img"), STICK_SEED, STICK_MIB)?;
    make_disk(&dir.join("sata.img"), SATA_SEED, SATA_MIB)?;
    make_disk(&dir.join("shared.img"), SHARED_SEED, SHARED_MIB)
}

fn make_disk(path: &Path, seed: u64, size_mib: u64) -> Result<()> {
    let file = File::create(path).context(path.display())?;
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; MIB as usize];
    for n in 0..size_mib {
        pattern.fill(&mut buffer);
        file.write_all_at(&buffer, n * MIB)?;
    }
    Ok(())
}

impl Machine {
    /// Boots and waits until dom0 takes commands.
    pub fn boot(base: &Base, parts: Parts<'_>, options: &Options) -> Result<Self> {
        let turn = Turn::wait()?;
        make_dir(&options.dir)?;
        write(options.dir.join("dom0.img"), initramfs::dom0(base, parts, options.shell)?)?;
        make_disks(&options.dir)?;
        let log = File::create(options.dir.join("qemu.log"))?;
        let mut child = qemu(base, options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("qemu-system-x86_64")?;
        let (Some(commands), Some(out)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(fail!("QEMU has no pipes"));
        };
        let (expect, wanted) = mpsc::channel();
        let (sender, replies) = mpsc::channel();
        thread::spawn(move || listen(out, &wanted, &sender));
        let machine =
            Self { child, commands, expect, replies, seq: 0, dir: options.dir.clone(), closed: false, _turn: turn };
        match machine.replies.recv_timeout(Duration::from_secs(180)) {
            Ok(Ok(_)) => Ok(machine),
            _ => Err(fail!(
                "dom0 did not come up; the console ({}) ends with\n{}",
                machine.log().display(),
                machine.console_tail(30)
            )),
        }
    }

    /// Boots with dom0's console on this terminal, until the person leaves.
    pub fn shell(base: &Base, parts: Parts<'_>, options: &Options) -> Result<()> {
        make_dir(&options.dir)?;
        write(options.dir.join("dom0.img"), initramfs::dom0(base, parts, true)?)?;
        make_disks(&options.dir)?;
        qemu(base, options).status().context("qemu-system-x86_64").map(drop)
    }

    /// Runs a script in dom0 with a limit in seconds.
    pub fn exec(&mut self, seconds: u64, script: &str) -> Result<Reply> {
        use std::io::Write;
        self.seq += 1;
        let _ = self.expect.send(self.seq);
        let request = Request { seq: self.seq, seconds, script: script.as_bytes().to_vec() };
        self.trace(&format!("# {script}\n"));
        let start = Instant::now();
        if let Err(error) = request.write(&mut self.commands) {
            self.closed = true;
            return Err(self.gone(&error.to_string()));
        }
        let reply = match self.replies.recv_timeout(Duration::from_secs(seconds + 30)) {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => {
                self.closed = true;
                return Err(self.gone(&error.to_string()));
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Err(self.gone("no answer")),
        };
        let mut text = reply.output.clone();
        let _ = writeln!(text, "(exit code {}, {:.1} s)", reply.code, start.elapsed().as_secs_f64());
        self.trace(&String::from_utf8_lossy(&text));
        Ok(reply)
    }

    /// Runs a script in dom0 that must succeed, and returns what it printed.
    pub fn run(&mut self, seconds: u64, script: &str) -> Result<String> {
        let reply = self.exec(seconds, script)?;
        let text = String::from_utf8_lossy(&reply.output).into_owned();
        match reply.code {
            0 => Ok(text),
            CODE_TIMEOUT => Err(fail!("dom0: `{script}` did not end in {seconds} s\n{}", tail(&text, 20))),
            code => Err(fail!("dom0: `{script}` ended with {code}\n{}", tail(&text, 20))),
        }
    }

    fn gone(&self, why: &str) -> Error {
        fail!("dom0 is gone ({why}); the console ({}) ends with\n{}", self.log().display(), self.console_tail(20))
    }

    /// How QEMU ended, if it has: the signal or exit status, and what it said last. A machine that resets itself, as after a
    /// triple fault of Xen's, ends it with status 0.
    pub fn ending(&mut self) -> Option<String> {
        let status = self.status()?;
        let read = |name| String::from_utf8_lossy(&std::fs::read(self.dir.join(name)).unwrap_or_default()).into_owned();
        let how = crash_of(status).map_or_else(|| status.to_string(), |name| format!("killed by {name}"));
        let cpu = if self.tripled() { " after a triple fault of the machine's processor" } else { "" };
        // It warns of each feature the processor model has and the emulation has not.
        let said = read("qemu.log");
        let said: Vec<&str> = said.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
        Some(format!("{how}{cpu}, it said {:?}", tail(&said.join("\n"), 8)))
    }

    /// Whether QEMU crashed (see [`CRASHES`]), or its processor had a triple fault with Xen, which reports the faults it
    /// knows of, saying nothing: the domains' triple faults out of nothing (see [`crate::dom0::TRIPLE_FAULT`]) come from the
    /// same emulation.
    pub fn emulator_died(&mut self) -> bool {
        let silent = !self.console_tail(20).contains("Xen call trace");
        self.status().is_some_and(|status| crash_of(status).is_some() || status.success() && self.tripled() && silent)
    }

    /// Whether a processor of the machine had a triple fault, which ends it. A guest's does not count: Xen gets that.
    fn tripled(&self) -> bool {
        String::from_utf8_lossy(&std::fs::read(self.dir.join(CPU_LOG)).unwrap_or_default()).contains("Triple fault")
    }

    /// QEMU's exit status, if it has ended. One that has closed its pipes is ending, and waited for: writing a core file
    /// takes a while.
    fn status(&mut self) -> Option<ExitStatus> {
        for _ in 0..600 {
            match self.child.try_wait() {
                Ok(None) if self.closed => thread::sleep(Duration::from_millis(100)),
                ended => return ended.ok().flatten(),
            }
        }
        None
    }

    /// Keeps all commands and answers in a file of the run.
    fn trace(&self, text: &str) {
        use std::io::Write;
        if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.join("dom0.log")) {
            let _ = file.write_all(text.as_bytes());
        }
    }

    /// Marks the start of something in the log of commands.
    pub fn note(&self, text: &str) {
        self.trace(&format!("\n#### {text}\n"));
    }

    /// Xen's and dom0's console.
    pub fn log(&self) -> PathBuf {
        self.dir.join(CONSOLE)
    }

    /// All of the console so far.
    pub fn console(&self) -> String {
        console(&self.dir)
    }

    /// The console's last lines.
    pub fn console_tail(&self, lines: usize) -> String {
        tail(&self.console(), lines)
    }

    /// The run's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Checksum of a part of the drive, as the host sees it.
    pub fn disk_sum(&self, offset_mib: u64, count_mib: u64) -> Result<String> {
        let file = File::open(self.dir.join("nvme.img"))?;
        let mut sum = Sum::new();
        let mut buffer = vec![0; MIB as usize];
        for n in offset_mib..offset_mib + count_mib {
            file.read_exact_at(&mut buffer, n * MIB)?;
            sum.add(&buffer);
        }
        Ok(format!("{:016x}", sum.value()))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill() {
            say(format!("QEMU: {error}"));
        }
        let _ = self.child.wait();
        // The images are made anew by every boot.
        for name in ["dom0.img", "nvme.img", "stick.img", "sata.img", "shared.img"] {
            let _ = std::fs::remove_file(self.dir.join(name));
        }
    }
}

/// The signal of an emulator that crashed: see [`CRASHES`].
fn crash_of(status: ExitStatus) -> Option<&'static str> {
    CRASHES.into_iter().find(|(number, _)| status.signal() == Some(*number)).map(|(_, name)| name)
}

/// Console of the machine whose logs are in `dir`; empty if there is none.
pub fn console(dir: &Path) -> String {
    let bytes = std::fs::read(dir.join(CONSOLE)).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\r', "")
}

/// Checksum of a pattern, to compare with what a guest wrote.
pub fn pattern_sum(seed: u64, count_mib: u64) -> String {
    let (mut pattern, mut sum) = (Pattern::new(seed), Sum::new());
    let mut buffer = vec![0; MIB as usize];
    for _ in 0..count_mib {
        pattern.fill(&mut buffer);
        sum.add(&buffer);
    }
    format!("{:016x}", sum.value())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_of_its_own_is_a_crash_and_being_ended_is_not() {
        let crash = |status| crash_of(ExitStatus::from_raw(status));
        assert_eq!(crash(6), Some("SIGABRT"));
        // With a core file.
        assert_eq!(crash(11 | 0x80), Some("SIGSEGV"));
        // SIGKILL, which comes from us or from a machine without memory; exit status 1; a machine that reset itself.
        assert_eq!([crash(9), crash(1 << 8), crash(0)], [None; 3]);
    }

    #[test]
    fn a_second_rig_waits_until_the_first_has_ended() {
        let path = std::env::temp_dir().join(format!("pciback-stubdom-rig-test.{}.lock", std::process::id()));
        let first = Turn::wait_for(&path).unwrap();
        let (sender, second) = mpsc::channel();
        let other = path.clone();
        thread::spawn(move || sender.send(Turn::wait_for(&other).is_ok()));
        assert!(second.recv_timeout(Duration::from_millis(300)).is_err());
        drop(first);
        assert_eq!(second.recv_timeout(Duration::from_secs(20)), Ok(true));
        std::fs::remove_file(path).unwrap();
    }
}
