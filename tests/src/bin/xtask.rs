//! `cargo xtask`: the project's one entry point for building, testing and measuring.

use std::process::{Command, ExitCode};

use lexopt::prelude::*;
use rig::dom0::{Outcome, Stop};
use rig::machine::{Machine, Options};
use rig::packages::{self, Release};
use rig::runner::{self, Built, Line};
use rig::scenarios::{self, Boot, Scenario};
use rig::tools::{Result, cargo, install_missing, root, run_shown, say};
use rig::xen::{self, Hypervisor};
use rig::{builds, elf, fail};

const HELP: &str = "\
cargo xtask COMMAND [OPTIONS]      (each command has --help)

  image    build the driver domain's image; prints its size, and its path last
  xen      build Xen with the config-owner change; prints its path last
  rig      boot a real Xen in QEMU and run scenarios
  demo     show it at work: a driver domain hands an NVMe drive to a guest
  bench    measure it beside Linux's xen-pciback; writes docs/bench.md
  compare  run the same scenarios with it and with Linux's xen-pciback; writes docs/compare.md
  fuzz     a hostile guest for as long as you like, in the model
  test     everything: format, lints, unit tests, the ELF gate, the rig on both releases
";

const HELP_IMAGE: &str = "cargo xtask image\n\nBuilds and strips the image; the last line is its path.\n";
const HELP_RIG: &str = "\
cargo xtask rig [--release bookworm|trixie|all] [--xen stock|changed] [--boot KIND] [--xen-args WORDS] [--list] [--shell] [SCENARIO...]

  --release   which Debian release's Xen and Linux (default: bookworm)
  --xen       run on the release's own hypervisor, or on the one of `cargo xtask xen` (default: on those that each
              scenario is for)
  --boot      only this kind of machine: mmcfg=0, plain or changed
  --xen-args  more words for Xen's command line
  --list      print the scenarios
  --shell     boot to a shell in dom0 instead

Packages are kept in $PCIBACK_CACHE, or pciback-stubdom in the user's cache directory; logs in target/rig.
PCIBACK_IMAGE=FILE runs that image instead of building one; PCIBACK_XEN=FILE is the changed hypervisor (xen or xen.gz)
instead of one that is built.
";
const HELP_XEN: &str = "\
cargo xtask xen [--release bookworm|trixie] [--force]

Fetches the source package of a Debian release's Xen, applies boot/xen, and builds the hypervisor; the last line is its
path. What was built is kept beside the packages, by source version and contents of boot/xen.

  --release   which Debian release's Xen (default: bookworm)
  --force     fetch and build anew
";
const HELP_DEMO: &str = "cargo xtask demo\n\nInstalls what is missing (when root), builds, boots, and shows a guest that reads a passed-through drive.\n";
const HELP_BENCH: &str = "\
cargo xtask bench [--release bookworm|trixie] [--boot mmcfg=0|plain|changed]

Measures this backend and Linux's in one run and writes docs/bench.md.

  --boot      mmcfg=0: the release's own hypervisor booted so, with the domain's own writes and with writes by dom0 (default);
              plain: the release's own hypervisor, writes by dom0; changed: the hypervisor of `cargo xtask xen`, direct mode
";
const HELP_COMPARE: &str = "\
cargo xtask compare [--release bookworm|trixie]

Runs the same scenarios with the driver domain and with Linux's xen-pciback, in one boot of Xen with the config-owner change,
and writes what came of each to docs/compare.md.
";
const HELP_FUZZ: &str = "\
cargo xtask fuzz [--seed N] [--runs N] [--ops N] [--delegated]

Plays guests that do what they like against the backend in its model (kernel/pciback/tests/fuzz.rs): more of what the
test plays a million operations of. Says each seed that went well; a failure prints what led to it.

  --seed       the first (default: 1000; the test plays 0 to 7)
  --runs       how many seeds (default: 100)
  --ops        operations of each (default: 1000000)
  --delegated  with writes by dom0
";
const HELP_TEST: &str = "\
cargo xtask test [--long]

Runs every check, and says how many passed. --long runs every scenario on every hypervisor that it is for,
which takes some three times as long.
";

fn main() -> ExitCode {
    match command() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The options of all commands; each takes what it knows.
#[derive(Default)]
struct Words {
    release: Option<String>,
    hypervisor: Option<Hypervisor>,
    only: Option<Boot>,
    force: bool,
    xen_args: String,
    list: bool,
    shell: bool,
    long: bool,
    seed: Option<u64>,
    runs: Option<u64>,
    ops: Option<u64>,
    delegated: bool,
    scenarios: Vec<String>,
}

impl Words {
    /// The boot on the hypervisor that is asked for, in which configuration space can be written.
    fn boot(&self) -> Boot {
        let stock = if self.hypervisor == Some(Hypervisor::ConfigOwner) { Boot::Changed } else { Boot::Writable };
        self.only.unwrap_or(stock)
    }
}

fn command() -> Result<ExitCode> {
    let mut parser = lexopt::Parser::from_env();
    let name = match parser.next()? {
        Some(Value(name)) => name.to_string_lossy().into_owned(),
        Some(Long("help") | Short('h')) | None => {
            print!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        Some(other) => return Err(other.unexpected().into()),
    };
    let help = match name.as_str() {
        "image" => HELP_IMAGE,
        "rig" => HELP_RIG,
        "xen" => HELP_XEN,
        "demo" => HELP_DEMO,
        "bench" => HELP_BENCH,
        "compare" => HELP_COMPARE,
        "fuzz" => HELP_FUZZ,
        "test" => HELP_TEST,
        _ => return Err(fail!("unknown command {name}\n\n{HELP}")),
    };
    let mut words = Words::default();
    while let Some(arg) = parser.next()? {
        match (name.as_str(), arg) {
            (_, Long("help") | Short('h')) => {
                print!("{help}");
                return Ok(ExitCode::SUCCESS);
            }
            ("rig" | "bench" | "compare" | "xen", Long("release")) => words.release = Some(parser.value()?.string()?),
            ("rig", Long("xen")) => words.hypervisor = Some(Hypervisor::parse(&parser.value()?.string()?)?),
            ("rig" | "bench", Long("boot")) => {
                let name = parser.value()?.string()?;
                let found = Boot::ALL.into_iter().find(|boot| boot.name() == name);
                words.only = Some(found.ok_or_else(|| fail!("--boot {name}: mmcfg=0, plain or changed"))?);
            }
            ("xen", Long("force")) => words.force = true,
            ("rig", Long("xen-args")) => words.xen_args = parser.value()?.string()?,
            ("rig", Long("list")) => words.list = true,
            ("rig", Long("shell")) => words.shell = true,
            ("rig", Value(scenario)) => words.scenarios.push(scenario.string()?),
            ("fuzz", Long("seed")) => words.seed = Some(parser.value()?.parse()?),
            ("fuzz", Long("runs")) => words.runs = Some(parser.value()?.parse()?),
            ("fuzz", Long("ops")) => words.ops = Some(parser.value()?.parse()?),
            ("fuzz", Long("delegated")) => words.delegated = true,
            ("test", Long("long")) => words.long = true,
            (_, other) => return Err(other.unexpected().into()),
        }
    }
    match name.as_str() {
        "image" => image(),
        "rig" => rig_command(&words),
        "xen" => xen_command(&words),
        "fuzz" => fuzz(&words),
        "test" => test(words.long),
        "demo" => shown("demo", rig::demo::run),
        "compare" => {
            let release = releases(words.release.as_deref())?[0];
            shown("compare", |built| rig::compare::run(built, release))
        }
        _ => {
            let release = releases(words.release.as_deref())?[0];
            shown("bench", |built| rig::bench::run(built, release, words.boot()))
        }
    }
}

/// The test's game with other numbers.
fn fuzz(words: &Words) -> Result<ExitCode> {
    let mut game = cargo();
    game.args(["test", "--quiet", "-p", "pciback", "--test", "backend", "fuzz::", "--", "--nocapture"])
        .env("PCIBACK_FUZZ_SEED", words.seed.unwrap_or(1000).to_string())
        .env("PCIBACK_FUZZ_RUNS", words.runs.unwrap_or(100).to_string())
        .env("PCIBACK_FUZZ_OPS", words.ops.unwrap_or(1_000_000).to_string());
    if words.delegated {
        game.env("PCIBACK_DELEGATED", "1");
    }
    run_shown(&mut game)?;
    Ok(ExitCode::SUCCESS)
}

fn image() -> Result<ExitCode> {
    let image = builds::image()?;
    println!("{} bytes", builds::size(&image.stripped)?);
    println!("{}", image.stripped.display());
    Ok(ExitCode::SUCCESS)
}

fn releases(name: Option<&str>) -> Result<Vec<Release>> {
    match name {
        None => Ok(vec![Release::Bookworm]),
        Some("all") => Ok(Release::ALL.to_vec()),
        Some(name) => Release::parse(name).map(|release| vec![release]),
    }
}

/// Prints the table; success only when nothing failed and something ran.
fn finish(lines: &[Line]) -> ExitCode {
    let (table, passed, failed, skipped) = runner::table(lines);
    println!("\n{table}\n{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn rig_command(words: &Words) -> Result<ExitCode> {
    if words.list {
        for scenario in scenarios::ALL {
            let boots: Vec<&str> = scenario.boots.iter().map(|boot| boot.name()).collect();
            println!("{:16} {} [{}]", scenario.name, scenario.about, boots.join(", "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let releases = releases(words.release.as_deref())?;
    let mut chosen: Vec<Scenario> = Vec::new();
    for name in &words.scenarios {
        let found = scenarios::ALL.into_iter().find(|scenario| scenario.name == name);
        chosen.push(found.ok_or_else(|| fail!("unknown scenario {name}; --list shows them"))?);
    }
    install_missing()?;
    let built = Built::new()?;
    if words.shell {
        let boot = words.boot();
        let base = runner::base(releases[0], runner::hypervisor(boot))?;
        let dir = runner::log_dir(releases[0], boot);
        let options = Options { xen_args: runner::boot_args(boot, &words.xen_args), shell: true, dir };
        Machine::shell(&base, built.parts(), &options)?;
        return Ok(ExitCode::SUCCESS);
    }
    if chosen.is_empty() {
        chosen = scenarios::ALL.to_vec();
    }
    let mut lines = Vec::new();
    for release in releases {
        let mut todo = Vec::new();
        for scenario in &chosen {
            let fits = |boot: &Boot| {
                words.hypervisor.is_none_or(|wanted| runner::hypervisor(*boot) == wanted)
                    && words.only.is_none_or(|wanted| wanted == *boot)
            };
            let boots: Vec<Boot> = scenario.boots.iter().copied().filter(fits).collect();
            // A scenario that is named is tried where it was not made for, too.
            let boots = if boots.is_empty() && !words.scenarios.is_empty() {
                vec![words.only.unwrap_or(words.boot())]
            } else {
                boots
            };
            todo.extend(boots.into_iter().map(|boot| (boot, *scenario)));
        }
        lines.extend(runner::run(&built, release, &todo, &words.xen_args));
    }
    Ok(finish(&lines))
}

fn xen_command(words: &Words) -> Result<ExitCode> {
    let built = xen::changed(releases(words.release.as_deref())?[0], words.force)?;
    println!("{}", built.packed.display());
    Ok(ExitCode::SUCCESS)
}

/// Something to look at: builds, runs, and fails with a reason.
fn shown(name: &str, run: impl FnOnce(&Built) -> Outcome) -> Result<ExitCode> {
    install_missing()?;
    run(&Built::new()?).map_err(|stop| fail!("{name}: {stop}"))?;
    Ok(ExitCode::SUCCESS)
}

/// The scenarios of the whole test on one release, or why it has no changed hypervisor.
fn for_release(release: Release, long: bool) -> (Vec<(Boot, Scenario)>, Option<String>) {
    let changed = xen::changed(release, false).err().map(|error| error.0);
    let pairs = |scenario: Scenario| scenario.boots.iter().map(move |boot| (*boot, scenario));
    let fits = |(boot, scenario): &(Boot, Scenario)| {
        (*boot != Boot::Changed || changed.is_none()) && (long || scenario.is_tested(release, *boot))
    };
    (scenarios::ALL.into_iter().flat_map(pairs).filter(fits).collect(), changed)
}

/// A check on the host: a command that must succeed.
fn host(name: &str, command: &mut Command) -> Line {
    say(format!("host: {name}"));
    Line::of("host", name, || run_shown(command).map_err(|error| Stop::Failure(error.0)))
}

fn gate() -> Outcome {
    let image = builds::image()?;
    elf::gate(&image.full, &image.stripped).map_err(|error| Stop::Failure(error.0))
}

fn test(long: bool) -> Result<ExitCode> {
    install_missing()?;
    let mut lines = vec![
        host("format", cargo().args(["fmt", "--all", "--check"])),
        host("lints", cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    ];
    let headers: Result<Vec<String>> =
        Release::ALL.into_iter().map(|r| packages::headers(r).map(|dir| dir.display().to_string())).collect();
    lines.push(match headers {
        Ok(dirs) => {
            host("unit tests", cargo().args(["test", "--quiet", "--workspace"]).env("XEN_HEADERS", dirs.join(":")))
        }
        Err(error) => Line::of("host", "unit tests", || Err(error.into())),
    });
    // The same tests with dom0's tool in the place of the hypercalls: kernel/pciback/tests/delegated.rs.
    let mut again = cargo();
    again.args(["test", "--quiet", "-p", "pciback", "--tests"]).env("PCIBACK_DELEGATED", "1");
    lines.push(host("delegated tests", &mut again));
    lines.push(Line::of("host", "elf gate", gate));
    match Built::new() {
        Ok(built) => {
            let mut built_none = Vec::new();
            for release in Release::ALL {
                let (todo, missing) = for_release(release, long);
                lines.extend(runner::run(&built, release, &todo, ""));
                built_none.extend(missing.map(|why| (release, why)));
            }
            // One release's source may be out of reach; without any the change is not tested at all.
            let all = built_none.len() == Release::ALL.len();
            lines.extend(built_none.into_iter().map(|(release, why)| {
                let stop = if all { Stop::Error(why) } else { Stop::Skip(why) };
                Line::of(release.name(), "changed Xen", || Err(stop))
            }));
        }
        Err(error) => lines.push(Line::of("rig", "build", || Err(error.into()))),
    }
    println!("logs of the rig: {}", root().join("target/rig").display());
    Ok(finish(&lines))
}
