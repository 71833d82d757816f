//! The rig's helper: runs commands that come over a serial line, in dom0 and in guests, and does what busybox cannot
//! (checksums past the page cache, patterns, timed configuration accesses). Linked statically, so it needs nothing.

mod nvme;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rig_agent::{CODE_LINE, CODE_TIMEOUT, MIB, Pattern, READY, Reply, Request, Sum};

const USAGE: &str = "rig-agent serve
rig-agent guest TTY SECONDS SCRIPT          run a script in the guest behind a console
rig-agent await SECONDS TIMES TEXT OTHER FILE   wait until a file holds TEXT so often, or OTHER
rig-agent sum FILE OFFSET_MIB COUNT_MIB     checksum, past the page cache
rig-agent pattern FILE OFFSET_MIB COUNT_MIB SEED
rig-agent hammer FILE                       read all of a disk again and again, until killed
rig-agent registers FILE                    a config file as lspci -xxxx prints it, without rows of zeros
rig-agent nvme-virtualization FILE CONTROLLER KIND ACTION COUNT   have an NVMe controller give or take resources
rig-agent config-read FILE OFFSET COUNT     time dword reads of a config file, ns for one
rig-agent config-write FILE OFFSET COUNT    time dword writes of the value that is there, ns for one
rig-agent config-change FILE OFFSET COUNT   time byte writes of 8 and 16 in turn, ns for one";

/// O_DIRECT of Linux on x86.
const O_DIRECT: i32 = 0o40000;
/// O_NOCTTY.
const O_NOCTTY: i32 = 0o400;

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["serve"] => serve(),
        ["guest", tty, seconds, script] => return ExitCode::from(guest(tty, seconds, script)),
        ["await", seconds, times, text, other, file] => await_text(seconds, times, text, other, file),
        ["sum", file, offset, count] => sum(file, offset, count),
        ["pattern", file, offset, count, seed] => pattern(file, offset, count, seed),
        ["hammer", file] => hammer(file),
        ["nvme-virtualization", file, id, kind, action, count] => virtualization(file, id, kind, action, count),
        ["registers", file] => registers(file),
        ["config-read", file, offset, count] => config(file, offset, count, Access::Read),
        ["config-write", file, offset, count] => config(file, offset, count, Access::Write),
        ["config-change", file, offset, count] => config(file, offset, count, Access::Change),
        _ => Err(invalid(USAGE)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rig-agent: {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

/// Answers requests on standard input and output for ever.
fn serve() -> io::Result<()> {
    let mut input = BufReader::new(io::stdin());
    let mut out = io::stdout();
    out.write_all(format!("\n{READY}\n").as_bytes())?;
    out.flush()?;
    loop {
        let request = Request::read(&mut input)?;
        let (code, output) = run(&request).unwrap_or_else(|error| (CODE_LINE, error.to_string().into_bytes()));
        Reply { seq: request.seq, code, output }.write(&mut out)?;
    }
}

/// Runs a script with its output in a file, so that processes it leaves in the background hold nothing up.
fn run(request: &Request) -> io::Result<(i32, Vec<u8>)> {
    let path = format!("/tmp/rig-out.{}", request.seq);
    let out = OpenOptions::new().create(true).append(true).open(&path)?;
    let script = String::from_utf8_lossy(&request.script).into_owned();
    let mut child = Command::new("/bin/sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()?;
    // A thread keeps the time, as looking again and again would take the processor from what the script waits for.
    let (ended, end) = mpsc::channel::<()>();
    let (process, limit) = (child.id(), Duration::from_secs(request.seconds));
    let keeper = thread::spawn(move || {
        let late = end.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            // The process is still this one: it is waited for only when this thread has been told.
            let _ = Command::new("kill").args(["-KILL", &process.to_string()]).status();
        }
        late
    });
    let status = child.wait()?;
    drop(ended);
    let late = keeper.join().unwrap_or(false);
    let code = if late { CODE_TIMEOUT } else { status.code().unwrap_or(128 + status.signal().unwrap_or(0)) };
    let output = std::fs::read(&path)?;
    std::fs::remove_file(&path)?;
    Ok((code, output))
}

/// Waits for a text in a file that grows. Without a process for each look, which the domain that writes would wait for.
fn await_text(seconds: &str, times: &str, text: &str, other: &str, file: &str) -> io::Result<()> {
    let number = |word: &str| word.parse::<u64>().map_err(|_| invalid("not a number"));
    let (limit, times) = (Instant::now() + Duration::from_secs(number(seconds)?), number(times)?);
    loop {
        let said = std::fs::read(file).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if said.matches(text).count() as u64 >= times || said.contains(other) {
            return Ok(());
        }
        if Instant::now() > limit {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{text:?} is not there {times} times")));
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Sends one request over a guest's console and prints what it answers.
fn guest(tty: &str, seconds: &str, script: &str) -> u8 {
    match ask_guest(tty, seconds, script) {
        Ok(reply) => {
            let _ = io::stdout().write_all(&reply.output);
            u8::try_from(reply.code).unwrap_or(u8::MAX)
        }
        Err(error) => {
            eprintln!("rig-agent: guest behind {tty}: {error}");
            CODE_LINE as u8
        }
    }
}

fn ask_guest(tty: &str, seconds: &str, script: &str) -> io::Result<Reply> {
    let seconds: u64 = seconds.parse().map_err(|_| invalid("SECONDS is not a number"))?;
    let seq = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |t| t.as_nanos() as u64);
    // Without raw mode the terminal would echo the guest's replies back into it.
    Command::new("stty").args(["-F", tty, "raw", "-echo"]).status()?;
    let line = OpenOptions::new().read(true).write(true).custom_flags(O_NOCTTY).open(tty)?;
    let mut out = line.try_clone()?;
    let (sender, replies) = mpsc::channel();
    thread::spawn(move || sender.send(Reply::read(&mut BufReader::new(line), seq)));
    Request { seq, seconds, script: script.as_bytes().to_vec() }.write(&mut out)?;
    replies
        .recv_timeout(Duration::from_secs(seconds + 5))
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer from the guest")))
}

fn mib(text: &str) -> io::Result<u64> {
    text.parse::<u64>().map(|n| n * MIB).map_err(|_| invalid("not a number of MiB"))
}

/// A MiB whose start is aligned for O_DIRECT: a place inside a longer vector.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![0_u8; MIB as usize + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + MIB as usize]
    }
}

fn direct(path: &str, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(O_DIRECT).open(path)
}

fn sum(path: &str, offset: &str, count: &str) -> io::Result<()> {
    let (offset, count) = (mib(offset)?, mib(count)?);
    let file = direct(path, false)?;
    let mut buffer = Aligned::new();
    let mut sum = Sum::new();
    for at in (offset..offset + count).step_by(MIB as usize) {
        file.read_exact_at(buffer.get(), at)?;
        sum.add(buffer.get());
    }
    println!("{:016x}", sum.value());
    Ok(())
}

fn pattern(path: &str, offset: &str, count: &str, seed: &str) -> io::Result<()> {
    let (offset, count) = (mib(offset)?, mib(count)?);
    let mut pattern = Pattern::new(seed.parse().map_err(|_| invalid("SEED is not a number"))?);
    let file = direct(path, true)?;
    let mut buffer = Aligned::new();
    for at in (offset..offset + count).step_by(MIB as usize) {
        pattern.fill(buffer.get());
        file.write_all_at(buffer.get(), at)?;
    }
    file.sync_all()
}

fn hammer(path: &str) -> io::Result<()> {
    let file = direct(path, false)?;
    let mut buffer = Aligned::new();
    loop {
        let mut at = 0;
        while file.read_at(buffer.get(), at)? == MIB as usize {
            at += MIB;
            // Always a read under way or about to be, but not all of the emulator's time: it emulates the drive in the
            // same thread as everything else the machine waits for.
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn number(text: &str) -> io::Result<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    }
    .map_err(|_| invalid("not a number"))
}

/// Prints a config file: its length, then each row of 16 bytes that are not all zeros.
fn registers(path: &str) -> io::Result<()> {
    let bytes = std::fs::read(path)?;
    println!("{:x}", bytes.len());
    for (row, bytes) in bytes.chunks(16).enumerate().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
        let bytes: String = bytes.iter().map(|byte| format!(" {byte:02x}")).collect();
        println!("{:02x}:{bytes}", 16 * row);
    }
    Ok(())
}

fn virtualization(path: &str, id: &str, kind: &str, action: &str, count: &str) -> io::Result<()> {
    fn small<T: TryFrom<u64>>(text: &str) -> io::Result<T> {
        T::try_from(number(text)?).map_err(|_| invalid("the number is too large"))
    }
    nvme::virtualization(path, small(id)?, small(kind)?, small(action)?, small(count)?)
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Change,
}

fn config(path: &str, offset: &str, count: &str, access: Access) -> io::Result<()> {
    let (offset, count) = (number(offset)?, number(count)?);
    let file = OpenOptions::new().read(true).write(access != Access::Read).open(path)?;
    let mut value = [0; 4];
    file.read_exact_at(&mut value, offset)?;
    let start = Instant::now();
    for turn in 0..count {
        match access {
            Access::Read => file.read_exact_at(&mut value, offset)?,
            Access::Write => file.write_all_at(&value, offset)?,
            Access::Change => file.write_all_at(&[if turn % 2 == 0 { 8 } else { 16 }], offset)?,
        }
    }
    println!("{}", start.elapsed().as_nanos() as u64 / count.max(1));
    if access == Access::Change {
        // That it took effect.
        let mut last = [0];
        file.read_exact_at(&mut last, offset)?;
        if count > 0 && last != [if count % 2 == 1 { 8 } else { 16 }] {
            return Err(invalid(&format!("the register reads {last:?} after it")));
        }
    }
    Ok(())
}
