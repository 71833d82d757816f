//! `xl-pciback`, dom0's side of pciback-stubdom: what needs dom0's privilege and nothing else.
//!
//! A command checks, then acts, then says in one line what it did; an error is one sentence and a
//! remedy. Hypercalls and xenstore go through Xen's own libraries (`xen`), facts about domains come
//! from `xl` (`domains`), facts about devices from sysfs (`sysfs`).

mod aer;
mod assignable;
mod attach;
mod check;
mod config;
mod detach;
mod domains;
mod error;
mod list;
mod mend;
mod nodes;
mod rights;
mod serve;
mod sysfs;
#[cfg(test)]
mod tests;
mod xen;
mod xlcfg;

use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::*;
use pciback::sbdf::Sbdf;

use crate::attach::Host;
use crate::domains::{Domains, Xl};
use crate::error::{Failure, Outcome, exit};
use crate::sysfs::Sysfs;
use crate::xen::Xen;

const HELP: &str = "\
xl-pciback: give PCI functions to guests through a pciback-stubdom driver domain

Usage: xl-pciback COMMAND [ARGUMENT...]

Commands:
  assignable-add BDF...      take functions from dom0 and quarantine them
  assignable-remove BDF...   give them back   [--no-rebind]
  assignable-list            list the functions that were taken
  config BDF...              print the driver domain's xl file
                             [--guest NAME] [--name NAME] [--kernel PATH] [--permissive]
                             [--mode auto|mmcfg0|read-only] [--topology vpci|passthrough]
  check FILE                 compare such a file with this host; exit code 3 if something is wrong
  attach GUEST BDF           give a function to a running or paused guest
                             [--driver NAME] [--permissive] [--seize]
  detach GUEST BDF           take it away again   [--driver NAME] [--timeout SECONDS] [--force]
  aer BDF [SEVERITY]         report an error of a function to the guest that has it   [--timeout SECONDS]
  serve                      carry out what driver domains may not do themselves, and attach what is promised
  list                       show driver domains, functions and guests   [--json]
  status [BDF...]            show how functions stand, and count what guests do with them   [--json]

BDF is SSSS:BB:DD.F or BB:DD.F (hexadecimal); with * for F it means all functions of the slot (quote it for the shell).
GUEST is a name or a domain number.
--libdir DIR (or XL_PCIBACK_LIBDIR) names the folder of Xen's libraries where they are in no usual one.
`xl-pciback COMMAND --help` says more about one command.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 check found problems.
";

/// The longer text of one command.
fn help(command: &str) -> Option<&'static str> {
    Some(match command {
        "assignable-add" => {
            "\
Usage: xl-pciback assignable-add BDF...
Takes each function from its dom0 driver, sets driver_override so that no other takes it, enables it so that
dom0 routes its interrupt, and puts it into Xen's quarantine. Doing it again changes nothing.
"
        }
        "assignable-remove" => {
            "\
Usage: xl-pciback assignable-remove [--no-rebind] BDF...
Gives each function back to dom0 and lets its former driver have it (not with --no-rebind).
"
        }
        "assignable-list" => {
            "Usage: xl-pciback assignable-list\nLists functions that assignable-add took, with id and interrupt.\n"
        }
        "config" => {
            "\
Usage: xl-pciback config [OPTION...] BDF...
Prints an xl file for a driver domain that owns these functions: ECAM base from ACPI's MCFG table, one
frame a function, ids. Redirect it to /etc/xen/NAME.cfg.
  --guest NAME     only this guest may have them
  --name NAME      the driver domain's name (pciback0)
  --kernel PATH    the image (/usr/lib/xen/boot/pciback-stubdom)
  --permissive     let the guest write registers that have no rule
  --mode MODE      auto, mmcfg0 (on a Xen with mmcfg=0, and only there) or read-only; by default what fits Xen's
                   command line: a comment in the file says which, and why
  --topology KIND  vpci (the guest has one bus, 0000:00; the default) or passthrough (it sees the host's addresses)
"
        }
        "check" => {
            "Usage: xl-pciback check FILE\nCompares a driver domain's xl file with this host and prints each problem with its remedy.\n"
        }
        "attach" => {
            "\
Usage: xl-pciback attach [--driver NAME] [--permissive] [--seize] GUEST BDF
Gives a function to a guest, which may be paused or run. The guest must be PV, with e820_host = 1 and
passthrough = \"enabled\". Whatever fails, nothing is left behind; neither if it is interrupted (Ctrl-C).
  --driver NAME    the driver domain; by default the one whose configuration lists the function
  --permissive     let the guest write registers that have no rule
  --seize          make the function assignable first (assignable-add), if it is not
With BB:DD.* each function of the slot is attached, function 0 first; one that fails keeps no other.
"
        }
        "detach" => {
            "\
Usage: xl-pciback detach [--driver NAME] [--timeout SECONDS] [--force] GUEST BDF
Tells the guest, waits until it has let go (10 seconds), then takes its rights away. With --force it takes
them away even if the guest does not answer, or cannot be told because the driver domain is gone.
Interrupted (Ctrl-C) while it waits, the guest keeps the function.
"
        }
        "aer" => {
            "\
Usage: xl-pciback aer [--timeout SECONDS] BDF [auto|nonfatal|fatal|permanent]
Tells a function's driver domain that the bus has reported an error of it, as dom0's kernel tells drivers of its own, and
waits for what comes of it. serve does the same when dom0's kernel reports an error; this is for scripts, and for a
look at how a guest copes. What a reset of the link has taken from the function is put back first. Then the guest's
driver is called: error detected, and by its answer registers accessible, slot reset, resume.
  auto             (default) look how bad it is: fatal if the function has lost its addresses, permanent if it does not
                   answer, else nonfatal
  nonfatal         the link works
  fatal            the link did not work, and was reset
  permanent        the function is lost: its driver is told, and it is taken from the guest
A function that its guest's driver does not recover is held: broken, without DMA and interrupts, until it is detached
(xl-pciback detach), which resets it. A function that no guest uses is reset. Exit code 1 if it was not recovered.
  --timeout SECONDS  how long to wait for the guest (1230); the driver domain itself waits 300 seconds for each step
"
        }
        "serve" => {
            "\
Usage: xl-pciback serve [--foreground]
Runs in the foreground until it is ended (SIGTERM), and says what it does on stderr; a service manager runs it (xl-pciback.service).
It carries out configuration writes and the mapping of MSI and MSI-X for driver domains on an unmodified Xen, only for
functions that their xl configuration lists, and only towards guests that this tool attached them to. It attaches
functions with guest=NAME whenever that guest runs. It may be ended and started at any time: guests go on meanwhile,
but their writes to configuration space are refused.
"
        }
        "list" => {
            "\
Usage: xl-pciback list [--json]
Shows every function of every driver domain.
  --json           an array with an object a function; keys are added in later versions, never changed:
                   driver_domid (number), driver (name), mode, mode_why, function (SSSS:BB:DD.F),
                   id (vvvv:dddd), state (unknown, resetting, ready, in-use, broken), reason (why it is broken),
                   guest_domid (number) and guest (name) that have it, promised_to (the only guest that may
                   have it), guest_address (SSSS:BB:DD.FF), reset, interrupts, msix, serve (see status),
                   aer (the last error that was reported, and what came of it),
                   reads, writes, refused, errors (numbers, told to status only).
                   What does not apply, or is not known, is null.
"
        }
        "status" => {
            "\
Usage: xl-pciback status [--json] [BDF...]
Shows how functions stand, all in a table or those named in a paragraph each: state and reason, guest, what
interrupts they use (INTx, or MSI or MSI-X with the number of vectors), how many entries the MSI-X table has and how
often Xen's stale MSI-X state had to be reset, how they are reset between guests (flr, af, pm: by the driver domain;
dom0: by this tool; none), the driver domain's mode with its reason, and whether xl-pciback serve takes part
(connected, not connected, not needed).
Counts what guests have asked of each function since the driver domain's start: configuration reads, configuration
writes, how many of those were refused, and requests answered with an error. The driver domain is asked for these
numbers; where it does not answer within 2 seconds there is a \"-\".
  --json           as list --json, with reads, writes, refused and errors
"
        }
        _ => return None,
    })
}

/// What the command line says.
#[derive(Default)]
struct Line {
    words: Vec<String>,
    driver: Option<String>,
    guest: Option<String>,
    name: Option<String>,
    kernel: Option<String>,
    mode: Option<String>,
    topology: Option<String>,
    timeout: Option<u64>,
    permissive: bool,
    seize: bool,
    force: bool,
    json: bool,
    no_rebind: bool,
    libdir: Option<String>,
    help: bool,
    given: Vec<String>,
}

/// The options of a command, without `--help` and `--libdir`.
fn options(command: &str) -> &'static [&'static str] {
    match command {
        "assignable-remove" => &["no-rebind"],
        "config" => &["guest", "name", "kernel", "permissive", "mode", "topology"],
        "attach" => &["driver", "permissive", "seize"],
        "detach" => &["driver", "timeout", "force"],
        "aer" => &["timeout"],
        "list" | "status" => &["json"],
        "serve" => &["foreground"],
        _ => &[],
    }
}

fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Outcome<Line> {
    let mut parser = lexopt::Parser::from_args(args);
    let mut line = Line::default();
    let wrong = |error: lexopt::Error| Failure::usage(error.to_string());
    while let Some(arg) = parser.next().map_err(wrong)? {
        let option = match arg {
            Value(word) => {
                line.words.push(word.string().map_err(wrong)?);
                continue;
            }
            Short('h') => "help".to_string(),
            Short('V') => "version".to_string(),
            Long(name) => name.to_string(),
            other @ Short(_) => return Err(wrong(other.unexpected())),
        };
        let mut text = || parser.value().and_then(|value| value.string()).map_err(wrong);
        match option.as_str() {
            "help" => line.help = true,
            "version" => line.words.insert(0, "version".into()),
            "libdir" => line.libdir = Some(text()?),
            "driver" => line.driver = Some(text()?),
            "guest" => line.guest = Some(text()?),
            "name" => line.name = Some(text()?),
            "kernel" => line.kernel = Some(text()?),
            "mode" => line.mode = Some(text()?),
            "topology" => line.topology = Some(text()?),
            "timeout" => {
                let seconds = text()?.parse().ok().filter(|seconds| (1..=3600).contains(seconds));
                line.timeout = Some(seconds.ok_or_else(|| Failure::usage("--timeout wants 1 to 3600 seconds"))?);
            }
            "permissive" => line.permissive = true,
            "seize" => line.seize = true,
            "force" => line.force = true,
            // It always runs in the foreground; service managers like to say so.
            "foreground" => {}
            "json" => line.json = true,
            "no-rebind" => line.no_rebind = true,
            other => return Err(Failure::usage(format!("there is no option --{other}"))),
        }
        if !["help", "version", "libdir"].contains(&option.as_str()) {
            line.given.push(option);
        }
    }
    Ok(line)
}

fn addresses(sysfs: &Sysfs, words: &[String]) -> Outcome<Vec<Sbdf>> {
    if words.is_empty() {
        return Err(Failure::usage("name at least one function"));
    }
    let mut all = Vec::new();
    for word in words {
        all.extend(sysfs.named(word)?);
    }
    Ok(all)
}

fn guest_and_addresses<'a>(sysfs: &Sysfs, words: &'a [String]) -> Outcome<(&'a str, Vec<Sbdf>)> {
    match words {
        [guest, word] => Ok((guest, sysfs.named(word)?)),
        _ => Err(Failure::usage("this command wants GUEST BDF")),
    }
}

fn one(word: &str) -> Outcome<Sbdf> {
    word.parse().map_err(|bad| Failure::usage(format!("{word:?} is {bad}")))
}

fn address_and_severity(words: &[String]) -> Outcome<(Sbdf, &'static str)> {
    match words {
        [sbdf] => Ok((one(sbdf)?, aer::AUTO)),
        [sbdf, word] => Ok((one(sbdf)?, aer::severity(word)?)),
        _ => Err(Failure::usage("this command wants BDF and how bad the error is")),
    }
}

fn none(words: &[String]) -> Outcome<()> {
    if words.is_empty() { Ok(()) } else { Err(Failure::usage("this command takes no argument")) }
}

/// Runs `action` for each function, goes on after a failure, and reports the first one last.
fn each(functions: Vec<Sbdf>, action: impl Fn(Sbdf) -> Outcome<String>) -> Outcome<()> {
    let mut first = None;
    for sbdf in functions {
        match action(sbdf) {
            Ok(done) => println!("{done}"),
            Err(failure) if first.is_none() => first = Some(failure),
            Err(failure) => eprintln!("{failure}"),
        }
    }
    first.map_or(Ok(()), Err)
}

fn run() -> Outcome<()> {
    let line = parse(std::env::args_os().skip(1))?;
    let (command, words) = match line.words.split_first() {
        Some((command, words)) => (command.as_str(), words),
        None if line.help => {
            print!("{HELP}");
            return Ok(());
        }
        None => return Err(Failure::usage("no command was given")),
    };
    if command == "version" {
        println!("xl-pciback {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let Some(text) = help(command) else {
        return Err(Failure::usage(format!("there is no command {command:?}")));
    };
    if line.help {
        print!("{text}");
        return Ok(());
    }
    if let Some(option) = line.given.iter().find(|option| !options(command).contains(&option.as_str())) {
        return Err(Failure::usage(format!("{command} has no option --{option}")));
    }
    let sysfs = Sysfs::default();
    if command == "config" {
        let functions = addresses(&sysfs, words)?;
        let mode = config::choose(line.mode.as_deref(), Xl.xen().ok().map(|xen| xen.mmcfg_off()))?;
        let options = config::Options {
            name: line.name.unwrap_or_else(|| "pciback0".into()),
            kernel: line.kernel.unwrap_or_else(|| "/usr/lib/xen/boot/pciback-stubdom".into()),
            guest: line.guest,
            permissive: line.permissive,
            mode,
            topology: config::topology(line.topology.as_deref())?,
        };
        print!("{}", config::generate(&sysfs, &functions, &options)?);
        return Ok(());
    }
    if command == "check" {
        let [file] = words else { return Err(Failure::usage("check wants one FILE")) };
        let text = std::fs::read_to_string(file).map_err(|error| {
            Failure::new(format!("{file} cannot be read: {error}"), "name the driver domain's xl file")
        })?;
        let problems = check::check(&text, &sysfs, Xl.xen().ok().as_ref());
        for problem in &problems {
            println!("{file}: {}\n  remedy: {}", problem.what, problem.remedy);
        }
        return match problems.len() {
            0 => {
                println!("{file}: fits this host");
                Ok(())
            }
            count => Err(Failure {
                what: format!("{file}: {count} problem(s)"),
                remedy: "as above".into(),
                code: exit::PROBLEMS,
            }),
        };
    }

    // What is wrong with the words is said before Xen is needed.
    enum Job<'a> {
        Add(Vec<Sbdf>),
        Remove(Vec<Sbdf>),
        Assignable,
        Attach(&'a str, Vec<Sbdf>),
        Detach(&'a str, Vec<Sbdf>),
        Report(Sbdf, &'static str),
        List,
        Status(Vec<Sbdf>),
        Serve,
    }
    let job = match command {
        "assignable-add" => Job::Add(addresses(&sysfs, words)?),
        "assignable-remove" => Job::Remove(addresses(&sysfs, words)?),
        "assignable-list" => none(words).map(|()| Job::Assignable)?,
        "attach" => guest_and_addresses(&sysfs, words).map(|(guest, functions)| Job::Attach(guest, functions))?,
        "detach" => guest_and_addresses(&sysfs, words).map(|(guest, functions)| Job::Detach(guest, functions))?,
        "status" if words.is_empty() => Job::Status(Vec::new()),
        "status" => Job::Status(addresses(&sysfs, words)?),
        "aer" => address_and_severity(words).map(|(sbdf, severity)| Job::Report(sbdf, severity))?,
        "serve" => none(words).map(|()| Job::Serve)?,
        _ => none(words).map(|()| Job::List)?,
    };
    let libdir = line.libdir.or_else(|| std::env::var("XL_PCIBACK_LIBDIR").ok());
    let xen = Xen::open(libdir.as_deref())?;
    let host = Host::of(&xen, &sysfs);
    // From here on an interrupt ends waits, not the program in the middle of a change.
    if !matches!(job, Job::Assignable | Job::List | Job::Status(_)) {
        xen::hold_interrupts();
    }
    match job {
        Job::Add(functions) => each(functions, |sbdf| assignable::add(&host, sbdf))?,
        Job::Remove(functions) => each(functions, |sbdf| assignable::remove(&host, sbdf, !line.no_rebind))?,
        Job::Assignable => assignable::list(&host).iter().for_each(|text| println!("{text}")),
        Job::Attach(guest, functions) => {
            let options = attach::Options { driver: line.driver, permissive: line.permissive };
            each(functions, |sbdf| {
                if line.seize {
                    assignable::seize(&host, guest, sbdf, options.driver.as_deref())?;
                }
                attach::attach(&host, guest, sbdf, &options)
            })?;
        }
        Job::Detach(guest, functions) => {
            let timeout = Duration::from_secs(line.timeout.unwrap_or(10));
            let options = detach::Options { driver: line.driver, force: line.force, timeout };
            // The last first, so that function 0 is there as long as another is.
            each(functions.into_iter().rev().collect(), |sbdf| detach::detach(&host, guest, sbdf, &options))?;
        }
        Job::Report(sbdf, severity) => {
            let timeout = line.timeout.map_or(aer::RECOVERY, Duration::from_secs);
            println!("{}", aer::report(&host, sbdf, severity, timeout)?);
        }
        Job::Serve => serve::serve(&xen, &sysfs, serve::Options { libdir })?,
        Job::List => {
            let rows = list::rows(&host)?;
            if line.json {
                println!("{:#}", list::json(&rows));
            } else {
                println!("{}", list::table(&rows));
            }
        }
        Job::Status(wanted) => {
            let mut rows = list::rows(&host)?;
            if let Some(missing) = wanted.iter().find(|sbdf| !rows.iter().any(|row| row.function == sbdf.to_string())) {
                return Err(Failure::new(
                    format!("no running driver domain has {missing}"),
                    "xl-pciback list shows the functions of all driver domains",
                ));
            }
            rows.retain(|row| wanted.is_empty() || wanted.iter().any(|sbdf| sbdf.to_string() == row.function));
            list::count(&host, &mut rows);
            if line.json {
                println!("{:#}", list::json(&rows));
            } else if wanted.is_empty() {
                println!("{}", list::overview(&rows));
            } else {
                println!("{}", list::details(&rows));
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.code)
        }
    }
}
