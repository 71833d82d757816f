//! Boots a release and runs scenarios in it, one after the other; a failure of one does not doom the next.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use crate::dom0::{BREAKPOINT, Outcome, Rig, Stop};
use crate::initramfs::Parts;
use crate::machine::{self, Machine, Options};
use crate::packages::{self, Base, Release};
use crate::scenarios::{Boot, Scenario};
use crate::tools::{Result, root, say, tail};
use crate::xen::{self, Hypervisor};
use crate::{builds, tools};

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Line {
    /// Where it ran: a release, or `host`.
    pub place: String,
    /// What ran.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
}

impl Line {
    /// Runs something and notes how it ended.
    pub fn of(place: &str, name: &str, run: impl FnOnce() -> Outcome) -> Self {
        let start = Instant::now();
        let outcome = run();
        let line =
            Self { place: place.to_owned(), name: name.to_owned(), outcome, seconds: start.elapsed().as_secs_f64() };
        match &line.outcome {
            Ok(()) => say(format!("{place}: {name}: passed")),
            Err(stop) => say(format!("{place}: {name}: {stop}")),
        }
        line
    }
}

/// The table, and how many passed, failed and were skipped.
pub fn table(lines: &[Line]) -> (String, usize, usize, usize) {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut text = String::new();
    for line in lines {
        let (kind, why) = match &line.outcome {
            Ok(()) => {
                passed += 1;
                ("pass", "")
            }
            Err(stop @ Stop::Skip(why)) => {
                skipped += 1;
                (stop.kind(), why.as_str())
            }
            Err(stop) => {
                failed += 1;
                (stop.kind(), stop.why())
            }
        };
        let why = why.lines().next().unwrap_or_default();
        let _ = writeln!(text, "{:16} {:16} {kind:8} {:6.1} s  {why}", line.place, line.name, line.seconds);
    }
    (text, passed, failed, skipped)
}

/// What goes into dom0, built.
#[derive(Debug, Clone)]
pub struct Built {
    /// The helper.
    pub agent: PathBuf,
    /// dom0's tool.
    pub tool: PathBuf,
    /// The image.
    pub image: PathBuf,
    /// The image of a driver domain that has been taken over.
    pub hostile: PathBuf,
    /// The image of a guest that attacks a driver domain.
    pub hostile_guest: PathBuf,
}

impl Built {
    /// Builds all of it.
    pub fn new() -> Result<Self> {
        Ok(Self {
            agent: builds::agent()?,
            tool: builds::tool()?,
            image: builds::image_or_given()?,
            hostile: builds::hostile()?,
            hostile_guest: builds::hostile_guest()?,
        })
    }

    /// For the initramfs.
    pub fn parts(&self) -> Parts<'_> {
        Parts {
            agent: &self.agent,
            tool: Some(&self.tool),
            image: Some(&self.image),
            hostile: Some(&self.hostile),
            hostile_guest: Some(&self.hostile_guest),
        }
    }
}

/// Where a boot's logs go.
pub fn log_dir(release: Release, boot: Boot) -> PathBuf {
    let kind = match boot {
        Boot::Writable => "",
        Boot::Plain => "-plain",
        Boot::Changed => "-changed",
    };
    root().join("target/rig").join(format!("{}{kind}", release.name()))
}

/// The hypervisor of a boot.
pub fn hypervisor(boot: Boot) -> Hypervisor {
    match boot {
        Boot::Writable | Boot::Plain => Hypervisor::Stock,
        Boot::Changed => Hypervisor::ConfigOwner,
    }
}

/// What a release's machines are made of, with the hypervisor asked for.
pub fn base(release: Release, hypervisor: Hypervisor) -> Result<Base> {
    let mut base = packages::base(release)?;
    if hypervisor == Hypervisor::ConfigOwner {
        base.xen = xen::changed_or_given(release)?;
    }
    Ok(base)
}

/// The words for Xen's command line that make a boot what it is. Where Xen does not use ECAM nobody owns a frame of it,
/// so the changed hypervisor never gets `mmcfg=0`.
pub fn boot_args(boot: Boot, more: &str) -> String {
    let mmcfg = if boot == Boot::Writable { "mmcfg=0 " } else { "" };
    format!("{mmcfg}{more}")
}

/// Boots and creates the driver domain.
pub fn boot(built: &Built, release: Release, boot: Boot, xen_args: &str) -> Outcome<Rig> {
    let hypervisor = hypervisor(boot);
    let base = base(release, hypervisor)?;
    let dir = log_dir(release, boot);
    tools::make_dir(&dir)?;
    say(format!("{}: booting Xen {}{hypervisor}", release.name(), release.xen()));
    let options = Options { xen_args: boot_args(boot, xen_args), shell: false, dir };
    let machine = match Machine::boot(&base, built.parts(), &options) {
        Err(error) if machine::console(&options.dir).contains(BREAKPOINT) => {
            say(format!("{}: booting once more, because the emulator killed dom0: {error}", release.name()));
            Machine::boot(&base, built.parts(), &options)?
        }
        booted => booted?,
    };
    let mut rig = Rig::new(machine, release, boot);
    say(format!("{}: dom0 is up", release.name()));
    rig.machine.note("set-up");
    rig.set_up()?;
    say(format!("{}: the driver domain is ready", release.name()));
    Ok(rig)
}

/// Runs a scenario, and once more if a guest died of a fault of the emulator that is known.
fn run_twice_if_needed(rig: &mut Rig, scenario: &Scenario) -> Outcome {
    let outcome = run_one(rig, scenario);
    match outcome {
        Err(stop) if !matches!(stop, Stop::Skip(_)) && rig.emulator_failed() => {
            let name = rig.release.name();
            say(format!("{name}: {}: once more, because the emulator killed a guest: {stop}", scenario.name));
            rig.clean_up(true)?;
            run_one(rig, scenario)
        }
        outcome => outcome,
    }
}

fn run_one(rig: &mut Rig, scenario: &Scenario) -> Outcome {
    rig.machine.note(scenario.name);
    let mut outcome = (scenario.run)(rig);
    if let Err(crash @ Stop::Crash(_)) = rig.check_crash() {
        outcome = Err(match outcome {
            Err(stop) => Stop::Crash(format!("{} ({})", crash.why(), stop.why())),
            Ok(()) => crash,
        });
    }
    if outcome.is_err()
        && let Ok(log) = rig.driver_log()
    {
        // For the log of commands.
        let _ = rig.exec("for log in /var/log/xen/guest-*.log; do echo \"==> $log\"; tail -c 20000 $log; done");
        say(format!("the driver domain said last\n{}", tail(&log, 12)));
        say(format!("logs: {}", rig.machine.dir().display()));
    }
    outcome
}

/// Runs scenarios on one release, each in the boots it is paired with. Machines that did not survive are booted again.
pub fn run(built: &Built, release: Release, scenarios: &[(Boot, Scenario)], xen_args: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    for kind in Boot::ALL {
        let mut todo = scenarios.iter().filter(|(boot, _)| *boot == kind).map(|(_, scenario)| scenario).peekable();
        let place = format!("{} {}", release.name(), kind.name());
        // The first boot of a kind makes the logs' directory anew.
        if todo.peek().is_some() {
            let _ = tools::remove_tree(log_dir(release, kind));
        }
        let mut machine: Option<Rig> = None;
        let mut broken_boots = 0;
        for scenario in todo {
            if machine.is_none() {
                match boot(built, release, kind, xen_args) {
                    Ok(rig) => machine = Some(rig),
                    Err(stop) => {
                        broken_boots += 1;
                        lines.push(Line::of(&place, "boot", || Err(stop.clone())));
                        if broken_boots > 1 {
                            break;
                        }
                    }
                }
            }
            if machine.is_none() {
                lines.push(Line::of(&place, scenario.name, || Err(Stop::Error("no machine".to_owned()))));
                continue;
            }
            lines.push(Line::of(&place, scenario.name, || {
                let Some(rig) = machine.as_mut() else { return Err(Stop::Error("no machine".to_owned())) };
                let outcome = run_twice_if_needed(rig, scenario);
                if outcome.is_ok() || !rig.machine.emulator_died() {
                    return outcome;
                }
                let how = rig.machine.ending().unwrap_or_default();
                say(format!("{place}: {}: on a new machine, because the emulator died ({how})", scenario.name));
                // Only one can run.
                machine = None;
                run_one(machine.insert(boot(built, release, kind, xen_args)?), scenario)
            }));
            if let Some(rig) = machine.as_mut()
                && let Err(stop) = rig.clean_up(true)
            {
                say(format!("{}: a new machine, because cleaning up failed: {stop}", release.name()));
                machine = None;
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_boot_switches_ecam_off() {
        assert_eq!(Boot::ALL.map(|boot| boot_args(boot, "x")), ["mmcfg=0 x", "x", "x"]);
    }

    #[test]
    fn the_table_counts_each_kind() {
        let line = |outcome| Line { place: "host".into(), name: "x".into(), outcome, seconds: 1.0 };
        let lines = [
            line(Ok(())),
            line(Err(Stop::Skip("no".into()))),
            line(Err(Stop::Crash("dead".into()))),
            line(Err(Stop::Failure("bad".into()))),
        ];
        let (text, passed, failed, skipped) = table(&lines);
        assert_eq!((passed, failed, skipped), (1, 2, 1));
        assert_eq!(text.lines().count(), 4);
    }
}
