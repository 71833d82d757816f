//! `xl-pciback serve`: what dom0 does all the time. It carries out for the driver domains what Xen lets only dom0 do
//! ([`desk`], [`office`]), and keeps the promises of their configurations: a function with `guest=NAME` is
//! attached whenever that guest runs ([`promises`]).
//!
//! It waits for events: xenstore watches, channels, the end of attachments, signals. Everything that is there when it
//! starts is found, so it can be ended and started at any point.

pub mod bus;
pub mod desk;
pub mod journal;
pub mod office;
pub mod promises;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pciback::cmdline::Mode;
use pciback::sbdf::Sbdf;

use self::desk::Desk;
use self::promises::{Known, Server, Step, View, plan};
use crate::aer;
use crate::attach::{self, Host, quarantine};
use crate::detach::{self, detach};
use crate::domains::{Domains, Driver, Xl};
use crate::error::{Failure, Outcome, errno};
use crate::nodes::{self, DOMID_IO, Link, told};
use crate::sysfs::Sysfs;
use crate::xen::events::wait_readable;
use crate::xen::uevents::Uevents;
use crate::xen::{self, Hypervisor, Store, Xen, transaction};

/// Where dom0's other commands see that this one runs: its process number.
pub const NODE: &str = "/pciback/serve";

/// The least time between two looks at everything that driver domains' words bring about.
const PAUSE: Duration = Duration::from_millis(100);

/// After which times a guest that has not begun to connect is told once more. Linux's xenbus lists its devices before it
/// watches for new ones, so what comes in between is missed.
const REMINDERS: [Duration; 3] = [Duration::from_secs(3), Duration::from_secs(15), Duration::from_secs(60)];

/// After which times a failed attachment is tried again, if nothing changes before.
const RETRIES: [Duration; 3] = [Duration::from_secs(5), Duration::from_secs(30), Duration::from_secs(120)];

/// How long a guest may take to remove a device whose driver domain is gone.
const REMOVAL: Duration = Duration::from_secs(120);

/// How often a domain is looked up because it says something.
const LOOK_UPS: u32 = 20;

/// After how long a failed look at the domains is repeated.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// After how long an attachment that another program makes is looked at again.
const LOOK_AT_OTHERS: Duration = Duration::from_secs(10);

/// The least time between two attachments of a function to the same guest is one second, twice as long with each, and at
/// most two to this power: a guest can have its end taken down as often as it likes.
const SLOWEST: u32 = 8;

/// One attachment: driver domain, guest, function.
type Key = (u32, u32, Sbdf);

/// How an attachment failed.
#[derive(Clone, Debug)]
struct Failed {
    times: usize,
    again: Option<Instant>,
    /// What the driver domain said of the function then.
    state: String,
}

/// What a thread does for a guest.
enum Job {
    /// Attaches a function by the driver domain with this name and number.
    Attach(String, u32),
    /// Takes a function away that no driver domain serves any more.
    Orphan,
}

/// What such a thread tells. For a function that was taken away the driver domain is 0.
struct Done {
    key: Key,
    outcome: Outcome<String>,
}

/// Options of `serve`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The folder of Xen's libraries.
    pub libdir: Option<String>,
}

/// The running service.
struct Serve<'a> {
    xen: &'a Xen,
    sysfs: &'a Sysfs,
    options: Options,
    drivers: Vec<Driver>,
    /// Domains that are watched.
    watched: BTreeSet<u32>,
    /// The drivers are to be asked for anew, and when if that failed.
    stale: bool,
    again: Option<Instant>,
    /// When to look at an attachment that another program makes.
    others: Option<Instant>,
    /// How often a domain that says something like a driver domain was looked up.
    looked_up: BTreeMap<u32, u32>,
    /// Attachments that were made: how often, and before when not to be made again.
    made: BTreeMap<(u32, Sbdf), (u32, Instant)>,
    desks: BTreeMap<u32, Desk>,
    /// Guests with a thread that attaches, and the threads.
    busy: BTreeSet<u32>,
    workers: Vec<JoinHandle<()>>,
    failed: BTreeMap<Key, Failed>,
    /// Guests to remind: when, and how often it was done.
    reminders: BTreeMap<(u32, u32), (Instant, usize)>,
    results: (Sender<Done>, Receiver<Done>),
    /// What dom0's kernel tells of errors, if it does.
    uevents: Option<Uevents>,
    /// Functions of which an error is to be reported, and the thread that reports the former ones.
    errors: BTreeSet<Sbdf>,
    reporter: Option<JoinHandle<()>>,
    /// Functions whose recovery is to be told of, with their driver domains.
    recovering: BTreeSet<(u32, Sbdf)>,
    /// Rung by threads that are done.
    bell: (UnixStream, UnixStream),
}

/// Runs until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// What it cannot begin without.
pub fn serve(xen: &Xen, sysfs: &Sysfs, options: Options) -> Outcome<()> {
    let fail = |what: &str, error: std::io::Error| Failure::new(format!("{what}: {error}"), "see dmesg");
    std::fs::create_dir_all(nodes::JOURNALS).map_err(|error| fail(nodes::JOURNALS, error))?;
    alone(xen)?;
    let pair = || UnixStream::pair().map_err(|error| fail("a pair of sockets", error));
    let (wake, woken) = pair()?;
    xen::wake_on_signal(&wake);
    let mut serve = Serve {
        xen,
        sysfs,
        options,
        drivers: Vec::new(),
        watched: BTreeSet::new(),
        stale: true,
        again: None,
        others: None,
        looked_up: BTreeMap::new(),
        made: BTreeMap::new(),
        workers: Vec::new(),
        desks: BTreeMap::new(),
        busy: BTreeSet::new(),
        failed: BTreeMap::new(),
        reminders: BTreeMap::new(),
        results: channel(),
        uevents: Uevents::open()
            .inspect_err(|error| {
                eprintln!("xl-pciback: warning: errors of functions are not heard of (xl-pciback aer): {error}");
            })
            .ok(),
        errors: BTreeSet::new(),
        reporter: None,
        recovering: BTreeSet::new(),
        bell: pair()?,
    };
    serve.bell.1.set_nonblocking(true).map_err(|error| fail("a socket", error))?;
    for node in ["@introduceDomain", "@releaseDomain", nodes::RECORDS] {
        xen.watch(node, "change").map_err(|number| {
            Failure::new(format!("xenstore refuses a watch on {node}: {}", errno(number)), "see whether xenstored runs")
        })?;
    }
    eprintln!("xl-pciback: serving");
    let ended = serve.run(&woken);
    eprintln!("xl-pciback: ending");
    // They stop waiting by the same signal, and undo what they have begun.
    for worker in std::mem::take(&mut serve.workers).into_iter().chain(serve.reporter.take()) {
        let _ = worker.join();
    }
    for (_, desk) in std::mem::take(&mut serve.desks) {
        desk.close();
    }
    let _ = xen.remove(0, NODE);
    ended
}

/// Whether a serve runs, by the note it leaves.
pub fn is_running<S: Store + ?Sized>(store: &S) -> bool {
    let process = store.read(0, NODE).and_then(|text| text.parse::<u32>().ok());
    process.is_some_and(is_ours)
}

/// In the note of an attachment under way, the number of no process: its own was killed, and it is being taken back.
const TAKEN_UP: u32 = 0;

/// The note of an attachment under way: guest and process.
fn assigning<S: Store + ?Sized>(store: &S, sbdf: Sbdf) -> Option<(u32, u32)> {
    let text = store.read(0, &nodes::record(sbdf, "assigning"))?;
    let (guest, process) = text.split_once(' ')?;
    Some((guest.parse().ok()?, process.parse().ok()?))
}

/// Whether an attachment was broken off and is to be taken back.
fn is_half_done<S: Store + ?Sized>(store: &S, sbdf: Sbdf) -> bool {
    assigning(store, sbdf).is_some_and(|(_, process)| process == TAKEN_UP)
}

/// Whether a process is this program.
fn is_ours(process: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    name.trim_end() == "xl-pciback"
}

/// Makes this the only one.
fn alone(xen: &Xen) -> Outcome<()> {
    if is_running(xen) && xen.read(0, NODE) != Some(std::process::id().to_string()) {
        return Err(Failure::new(
            format!("another xl-pciback serve runs (process {})", xen.read(0, NODE).unwrap_or_default()),
            "end that one first: systemctl stop xl-pciback, or kill",
        ));
    }
    xen.write(0, NODE, &std::process::id().to_string()).map_err(|number| {
        Failure::new(format!("xenstore refuses a note: {}", errno(number)), "see whether xenstored runs")
    })
}

impl Serve<'_> {
    fn run(&mut self, woken: &UnixStream) -> Outcome<()> {
        let mut fds = vec![self.xen.as_raw_fd(), self.bell.1.as_raw_fd(), woken.as_raw_fd()];
        fds.extend(self.uevents.as_ref().map(AsRawFd::as_raw_fd));
        let mut looked = Instant::now();
        // When to look at everything again.
        let mut look = Some(Instant::now());
        while !xen::interrupted() {
            let now = Instant::now();
            if look.is_some_and(|due| due <= now) {
                look = None;
                looked = now;
                self.reconcile();
            }
            let next = [look, self.next_deadline()].into_iter().flatten().min();
            let ready = wait_readable(&fds, next.map(|due| due.saturating_duration_since(Instant::now())));
            let mut changed = false;
            while let Some((path, token)) = self.xen.next_event().map_err(|number| {
                Failure::new(format!("the connection to xenstored is lost: {}", errno(number)), "start serve again")
            })? {
                changed |= self.note(&path, &token);
            }
            if ready.get(1) == Some(&true) {
                let _ = std::io::Read::read(&mut &self.bell.1, &mut [0; 64]);
            }
            while let Ok(done) = self.results.1.try_recv() {
                changed = true;
                self.attached(done);
            }
            self.note_errors();
            self.report_errors();
            changed |= self.is_due();
            if changed {
                look.get_or_insert(looked + PAUSE);
            }
        }
        Ok(())
    }

    /// A watch has fired. True if everything is to be looked at.
    fn note(&mut self, path: &str, token: &str) -> bool {
        match token.split_once(' ') {
            None => {
                self.stale |= path.starts_with('@');
                true
            }
            Some(("name", _)) => true,
            Some(("shutdown", domid)) => {
                self.warn_of_save(domid.parse().unwrap_or(0));
                false
            }
            Some(("driver", domid)) => {
                let domid = domid.parse().unwrap_or(0);
                match self.desks.get(&domid) {
                    Some(desk) if path.contains("/channel/") => desk.ring(),
                    // It may have been created before its configuration could be read. Any domain can say such things, so
                    // that is looked at a few times only.
                    _ if !self.drivers.iter().any(|driver| driver.domid == domid) => {
                        let times = self.looked_up.entry(domid).or_default();
                        *times += 1;
                        self.stale |= *times <= LOOK_UPS;
                    }
                    _ => {}
                }
                if path.ends_with("/aer") {
                    self.tell_recovery(domid, path);
                }
                // Counters are nothing to act on.
                path.ends_with("/state") || path.ends_with("/mode") || path.ends_with("/data/pciback")
            }
            Some(_) => false,
        }
    }

    /// Takes note of the errors that dom0's kernel has told of.
    fn note_errors(&mut self) {
        while let Some(event) = self.uevents.as_ref().and_then(Uevents::next) {
            let Some(name) = aer::concerned(&event) else { continue };
            let functions = self.drivers.iter().flat_map(|driver| &driver.config.devices).map(|device| device.sbdf);
            let behind: Vec<Sbdf> = functions.filter(|sbdf| self.sysfs.is_behind(*sbdf, name)).collect();
            for sbdf in behind {
                eprintln!("xl-pciback: {sbdf}: dom0's kernel tells of an error at {name}");
                self.errors.insert(sbdf);
            }
        }
    }

    /// Starts a thread that reports them, if none does. It waits for driver domains only until they have taken a report up.
    fn report_errors(&mut self) {
        if self.errors.is_empty() || self.reporter.as_ref().is_some_and(|reporter| !reporter.is_finished()) {
            return;
        }
        let Ok(bell) = self.bell.0.try_clone() else { return };
        let todo: Vec<(Driver, Sbdf)> = std::mem::take(&mut self.errors)
            .into_iter()
            .filter_map(|sbdf| Some((self.drivers.iter().find(|driver| driver.entry(sbdf).is_some())?.clone(), sbdf)))
            .collect();
        self.recovering.extend(todo.iter().map(|(driver, sbdf)| (driver.domid, *sbdf)));
        let (libdir, sysfs) = (self.options.libdir.clone(), self.sysfs.clone());
        let body = move || {
            for (driver, sbdf) in todo {
                let reported = Xen::open(libdir.as_deref())
                    .and_then(|xen| aer::announce(&Host::of(&xen, &sysfs), &driver, sbdf, aer::AUTO));
                if let Err(failure) = reported {
                    eprintln!("{failure}");
                }
            }
            let _ = std::io::Write::write(&mut &bell, &[1]);
        };
        match std::thread::Builder::new().name("errors".into()).stack_size(512 << 10).spawn(body) {
            Ok(reporter) => self.reporter = Some(reporter),
            Err(error) => eprintln!("xl-pciback: an error of a function is not reported: no thread for it: {error}"),
        }
    }

    /// A driver domain says what becomes of an error: that is told once for each that was reported to it.
    fn tell_recovery(&mut self, domid: u32, path: &str) {
        let folder = path.strip_suffix("/aer").and_then(|path| path.rsplit_once('/'));
        let Some(sbdf) = folder.and_then(|(_, name)| nodes::of_folder(name)) else { return };
        let fate = told(self.xen, &nodes::published(domid, sbdf, "aer")).filter(|fate| !aer::is_open(fate));
        if let Some(fate) = fate
            && self.recovering.remove(&(domid, sbdf))
        {
            eprintln!("xl-pciback: {sbdf}: error: {fate}");
        }
    }

    /// xl saves a guest whether it has functions or not, and what is restored from that dies with its PCI bus.
    fn warn_of_save(&self, guest: u32) {
        if self.xen.read(0, &format!("/local/domain/{guest}/control/shutdown")).as_deref() != Some("suspend") {
            return;
        }
        let records = self.xen.list(0, nodes::RECORDS).into_iter().filter_map(|folder| nodes::of_folder(&folder));
        let own = |sbdf: &Sbdf| self.xen.read(0, &nodes::record(*sbdf, "domid")) == Some(guest.to_string());
        for sbdf in records.filter(own) {
            eprintln!(
                "xl-pciback: warning: guest {:?} is being saved with {sbdf}, which it cannot be restored with; detach it \
                 first (xl-pciback detach)",
                nodes::name_of(self.xen, guest)
            );
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let retries = self.failed.values().filter_map(|failed| failed.again);
        let now = Instant::now();
        let made = self.made.values().map(|(_, due)| *due).filter(|due| *due > now);
        retries
            .chain(self.reminders.values().map(|(due, _)| *due))
            .chain(self.again)
            .chain(self.others)
            .chain(made)
            .min()
    }

    /// Something is due: reminds guests, and lets failed attachments be tried again. True if those are to be looked at.
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let due: Vec<(u32, u32)> =
            self.reminders.iter().filter(|(_, (due, _))| *due <= now).map(|(link, _)| *link).collect();
        for (driver, guest) in due {
            self.remind(Link { driver, guest });
        }
        let mut any = self.made.values().any(|(_, due)| *due <= now && now - *due < PAUSE);
        for failed in self.failed.values_mut().filter(|failed| failed.again.is_some_and(|again| again <= now)) {
            // To be tried whatever the driver domain says of it; if nobody wants it any more, that was all.
            (failed.again, failed.state) = (None, String::new());
            any = true;
        }
        for due in [&mut self.again, &mut self.others] {
            any |= due.take_if(|due| *due <= now).is_some();
        }
        any
    }

    /// A guest whose frontend has not begun to connect may have missed that it has a device: its node is written again.
    fn remind(&mut self, link: Link) {
        let key = (link.driver, link.guest);
        let Some((_, times)) = self.reminders.remove(&key) else { return };
        if self.xen.read(0, &link.front("state")).as_deref() != Some("1") {
            return;
        }
        let again = transaction(self.xen, |tx| match self.xen.read(tx, &link.front("state")).as_deref() {
            Some("1") => self.xen.write(tx, &link.front("state"), "1"),
            _ => Ok(()),
        });
        if let (Ok(()), Some(time)) = (again, REMINDERS.get(times + 1)) {
            self.reminders.insert(key, (Instant::now() + *time, times + 1));
        }
    }

    /// Looks at everything and does what follows.
    fn reconcile(&mut self) {
        if self.stale {
            match Xl.drivers() {
                Ok(drivers) => {
                    self.stale = false;
                    self.drivers = drivers;
                }
                // Domains come and go while xl looks.
                Err(failure) => {
                    eprintln!("{failure}");
                    self.again = Some(Instant::now() + LOOK_AGAIN);
                }
            }
        }
        // No event would tell that it was killed; its end takes the note away, which is one.
        self.others = self.adopt().then(|| Instant::now() + LOOK_AT_OTHERS);
        let view = self.view();
        self.watch_domains(&view);
        let gone: Vec<u32> = self.desks.keys().filter(|domid| !view.domains.contains_key(domid)).copied().collect();
        for domid in gone {
            if let Some(desk) = self.desks.remove(&domid) {
                desk.close();
            }
        }
        let there = |driver: &u32| *driver == 0 || view.domains.contains_key(driver);
        self.failed.retain(|(driver, guest, _), _| there(driver) && view.domains.contains_key(guest));
        self.reminders
            .retain(|(driver, guest), _| view.domains.contains_key(driver) && view.domains.contains_key(guest));
        self.recovering.retain(|(domid, _)| view.domains.contains_key(domid));
        self.looked_up.retain(|domid, _| view.domains.contains_key(domid));
        self.made.retain(|(guest, _), _| view.domains.contains_key(guest));
        let mut held_up = BTreeSet::new();
        for step in plan(&view) {
            match step {
                Step::Forget { sbdf, guest, driver } => self.forget(sbdf, guest, driver),
                Step::Orphan { sbdf, guest } => {
                    held_up.insert(sbdf);
                    let waits = self.failed.get(&(0, guest, sbdf)).is_some_and(|failed| failed.again.is_some());
                    if !waits {
                        self.start(guest, sbdf, Job::Orphan);
                    }
                }
                Step::Attach { .. } => {}
            }
        }
        // What guests have from before is settled now: a new driver domain may have the functions.
        // One that is not to write has nothing to ask for.
        let asking = owners(&self.drivers, &view.domains).into_iter();
        for driver in asking.filter(|driver| driver.config.mode != Mode::ReadOnly) {
            let ready = !driver.config.devices.iter().any(|device| held_up.contains(&device.sbdf));
            self.desks.retain(|_, desk| desk.is_open());
            // One that was another's until now is its own.
            let outdated = self.desks.get(&driver.domid).is_some_and(|desk| !desk.serves(&driver));
            if outdated && let Some(former) = self.desks.remove(&driver.domid) {
                former.close();
            }
            if ready && !self.desks.contains_key(&driver.domid) {
                for device in
                    self.drivers.iter().filter(|all| all.domid == driver.domid).flat_map(|all| &all.config.devices)
                {
                    if driver.entry(device.sbdf).is_none() {
                        eprintln!(
                            "xl-pciback: {}: another driver domain has it: {:?} cannot",
                            device.sbdf, driver.name
                        );
                    }
                }
                let dir = Path::new(nodes::JOURNALS).to_path_buf();
                match Desk::open(&driver, self.sysfs, dir, self.options.libdir.clone()) {
                    Ok(desk) => drop(self.desks.insert(driver.domid, desk)),
                    Err(error) => eprintln!("xl-pciback: driver domain {:?} is not served: {error}", driver.name),
                }
            }
        }
        self.attach(&self.view());
    }

    /// A program that attached a function was killed on the way. If the driver domain has exported it, it was at its end;
    /// if not, the guest counts as the one that has it, and it is taken back ([`is_half_done`]). True if another program is
    /// at it.
    fn adopt(&self) -> bool {
        let mut under_way = false;
        for sbdf in self.xen.list(0, nodes::RECORDS).into_iter().filter_map(|folder| nodes::of_folder(&folder)) {
            let Some((guest, process)) = assigning(self.xen, sbdf) else { continue };
            let own = process == std::process::id();
            let others = !own && is_ours(process);
            under_way |= others;
            if process == TAKEN_UP || own && self.busy.contains(&guest) || others {
                continue;
            }
            let note = nodes::record(sbdf, "assigning");
            let exported = |driver: &Driver| {
                let link = Link { driver: driver.domid, guest };
                let index = link.index_of(self.xen, 0, sbdf)?;
                self.xen.read(0, &link.back(&format!("state-{index}"))).filter(|state| state == "3")
            };
            if self.xen.is_free(sbdf) == Ok(true) || self.drivers.iter().any(|driver| exported(driver).is_some()) {
                let _ = self.xen.remove(0, &note);
                continue;
            }
            eprintln!(
                "xl-pciback: {sbdf}: process {process} was killed while it attached it to guest {guest}: it is taken back"
            );
            let adopted = transaction(self.xen, |tx| {
                self.xen.write(tx, &nodes::record(sbdf, "domid"), &guest.to_string())?;
                self.xen.write(tx, &note, &format!("{guest} {TAKEN_UP}"))
            });
            if let Err(number) = adopted {
                eprintln!("xl-pciback: warning: {sbdf}: xenstore refuses to remember it: {}", errno(number));
            }
        }
        under_way
    }

    /// What is there now.
    fn view(&self) -> View {
        let store = self.xen;
        let domains: BTreeMap<u32, String> = store
            .list(0, "/local/domain")
            .into_iter()
            .filter_map(|domid| domid.parse().ok())
            .filter(|domid| *domid != 0)
            .map(|domid| (domid, nodes::name_of(store, domid)))
            .collect();
        let number = |sbdf, node: &str| store.read(0, &nodes::record(sbdf, node)).and_then(|text| text.parse().ok());
        let known = |driver: u32, sbdf: Sbdf| {
            let holder: Option<u32> = number(sbdf, "domid");
            Known {
                state: told(store, &nodes::published(driver, sbdf, "state")).unwrap_or_default(),
                listed: holder.is_some_and(|guest| Link { driver, guest }.index_of(store, 0, sbdf).is_some())
                    && !is_half_done(store, sbdf),
                holder,
                released: number(sbdf, "released"),
            }
        };
        let servers: Vec<Server> = owners(&self.drivers, &domains)
            .into_iter()
            .map(|driver| Server {
                mode: told(store, &nodes::own(driver.domid, "mode")).unwrap_or_default(),
                functions: driver.config.devices.iter().map(|d| (d.sbdf, known(driver.domid, d.sbdf))).collect(),
                driver,
            })
            .collect();
        let records = store.list(0, nodes::RECORDS).into_iter().filter_map(|folder| nodes::of_folder(&folder));
        let lost = records
            .filter(|sbdf| !servers.iter().any(|server| server.functions.contains_key(sbdf)))
            .filter_map(|sbdf| Some((sbdf, number(sbdf, "domid")?)))
            .collect();
        View { domains, servers, lost }
    }

    /// Watches the name of every domain, and what a driver domain says.
    fn watch_domains(&mut self, view: &View) {
        let nodes = |domid: u32| {
            [
                (format!("/local/domain/{domid}/name"), format!("name {domid}")),
                (format!("/local/domain/{domid}/data/pciback"), format!("driver {domid}")),
                (format!("/local/domain/{domid}/control/shutdown"), format!("shutdown {domid}")),
            ]
        };
        let gone: Vec<u32> = self.watched.iter().filter(|domid| !view.domains.contains_key(domid)).copied().collect();
        for domid in gone {
            self.watched.remove(&domid);
            for (node, token) in nodes(domid) {
                let _ = self.xen.unwatch(&node, &token);
            }
        }
        for domid in view.domains.keys() {
            if !self.watched.insert(*domid) {
                continue;
            }
            for (node, token) in nodes(*domid) {
                if let Err(number) = self.xen.watch(&node, &token) {
                    eprintln!("xl-pciback: warning: xenstore refuses a watch on {node}: {}", errno(number));
                }
            }
        }
    }

    /// The guest is gone: its entry in the driver domain's list goes, and the function into quarantine.
    fn forget(&self, sbdf: Sbdf, guest: u32, driver: Option<u32>) {
        let gone = transaction(self.xen, |tx| {
            for node in ["domid", "released", "assigning"] {
                self.xen.remove(tx, &nodes::record(sbdf, node))?;
            }
            match driver {
                Some(driver) => self.xen.remove(tx, &format!("/local/domain/{driver}/backend/pci/{guest}")),
                None => Ok(()),
            }
        });
        journal::forget(Path::new(nodes::JOURNALS), sbdf, guest);
        let quarantined = quarantine(&Host::of(self.xen, self.sysfs), sbdf);
        let problem = gone.err().map(|number| format!("xenstore: {}", errno(number)));
        // Xen itself has put it there, if it could; what keeps it out is found when it is attached.
        let problem = problem.or(quarantined.err().map(|number| format!("domain {DOMID_IO}: {}", errno(number))));
        match problem {
            None => eprintln!("xl-pciback: {sbdf}: guest {guest} has ended"),
            Some(problem) => eprintln!("xl-pciback: warning: {sbdf}: guest {guest} has ended, but {problem}"),
        }
    }

    /// Starts the attachments that are due, one a guest at a time.
    fn attach(&mut self, view: &View) {
        let now = Instant::now();
        for step in plan(view) {
            let Step::Attach { guest, sbdf, driver, domid } = step else { continue };
            let key = (domid, guest, sbdf);
            let server = view.servers.iter().find(|server| server.driver.domid == domid);
            let state = server.and_then(|server| server.functions.get(&sbdf)).map(|known| known.state.clone());
            let waits = self.failed.get(&key).is_some_and(|failed| {
                state.as_ref() == Some(&failed.state) && failed.again.is_none_or(|again| again > now)
            });
            let early = self.made.get(&(guest, sbdf)).is_some_and(|(_, due)| *due > now);
            if !waits && !early {
                self.start(guest, sbdf, Job::Attach(driver, domid));
            }
        }
    }

    /// Starts a thread for a guest, if it has none.
    fn start(&mut self, guest: u32, sbdf: Sbdf, job: Job) {
        if !self.busy.insert(guest) {
            return;
        }
        let key = (if let Job::Attach(_, domid) = &job { *domid } else { 0 }, guest, sbdf);
        let (results, libdir, sysfs) = (self.results.0.clone(), self.options.libdir.clone(), self.sysfs.clone());
        let Ok(bell) = self.bell.0.try_clone() else {
            self.busy.remove(&guest);
            return;
        };
        let body = move || {
            let outcome = work(libdir.as_deref(), &sysfs, guest, sbdf, job);
            let _ = results.send(Done { key, outcome });
            let _ = std::io::Write::write(&mut &bell, &[1]);
        };
        self.workers.retain(|worker| !worker.is_finished());
        match std::thread::Builder::new().name("attach".into()).stack_size(512 << 10).spawn(body) {
            Ok(worker) => self.workers.push(worker),
            Err(error) => {
                eprintln!("xl-pciback: {sbdf}: no thread for it: {error}");
                self.busy.remove(&guest);
            }
        }
    }

    fn attached(&mut self, done: Done) {
        let Done { key, outcome } = done;
        let (domid, guest, sbdf) = key;
        self.busy.remove(&guest);
        match outcome {
            Ok(text) => {
                eprintln!("xl-pciback: {text}");
                self.failed.remove(&key);
                if domid == 0 {
                    return;
                }
                let (times, due) = self.made.entry((guest, sbdf)).or_insert((0, Instant::now()));
                *due = Instant::now() + Duration::from_secs(1 << *times);
                *times = (*times + 1).min(SLOWEST);
                self.reminders.insert((domid, guest), (Instant::now() + REMINDERS[0], 0));
            }
            Err(failure) => {
                eprintln!("{failure}");
                let times = self.failed.get(&key).map_or(0, |failed| failed.times);
                let state = told(self.xen, &nodes::published(domid, sbdf, "state")).unwrap_or_default();
                let again = RETRIES.get(times).map(|time| Instant::now() + *time);
                self.failed.insert(key, Failed { times: times + 1, again, state });
            }
        }
    }
}

/// The driver domains that run, each with the functions that no other has before it: a function has one owner, and it
/// is the elder.
fn owners(drivers: &[Driver], domains: &BTreeMap<u32, String>) -> Vec<Driver> {
    let mut taken = BTreeSet::new();
    let mut running: Vec<Driver> =
        drivers.iter().filter(|driver| domains.contains_key(&driver.domid)).cloned().collect();
    running.sort_by_key(|driver| driver.domid);
    for driver in &mut running {
        driver.config.devices.retain(|device| taken.insert(device.sbdf));
    }
    running
}

/// Does one job, with connections of its own.
fn work(libdir: Option<&str>, sysfs: &Sysfs, guest: u32, sbdf: Sbdf, job: Job) -> Outcome<String> {
    let xen = Xen::open(libdir)?;
    let host = Host::of(&xen, sysfs);
    match job {
        Job::Attach(driver, _) => {
            let options = attach::Options { driver: Some(driver), permissive: false };
            attach::attach(&host, &guest.to_string(), sbdf, &options)
        }
        Job::Orphan => {
            if !is_half_done(&xen, sbdf) {
                eprintln!(
                    "xl-pciback: {sbdf}: no driver domain serves it to guest {guest} any more, so it is taken from it"
                );
            }
            let options = detach::Options { driver: None, force: true, timeout: REMOVAL };
            let done = detach(&host, &guest.to_string(), sbdf, &options)?;
            // That was nobody's wish to keep it from the guest.
            for node in ["released", "assigning"] {
                let _ = xen.remove(0, &nodes::record(sbdf, node));
            }
            Ok(done)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_two_driver_domains_list_belongs_to_the_elder_that_runs() {
        let driver = |domid, names: &str| {
            let (config, _) = pciback::cmdline::parse(&format!("ecam=0000:00-ff@b0000000 {names}"));
            Driver { domid, name: format!("p{domid}"), config }
        };
        let drivers = [driver(9, "dev=0000:01:00.0 dev=0000:02:00.0"), driver(4, "mode=read-only dev=0000:01:00.0")];
        let own = |running: &[u32]| -> Vec<(u32, Vec<String>)> {
            let domains = running.iter().map(|domid| (*domid, String::new())).collect();
            let names = |driver: Driver| driver.config.devices.iter().map(|device| device.sbdf.to_string()).collect();
            owners(&drivers, &domains).into_iter().map(|driver| (driver.domid, names(driver))).collect()
        };
        assert_eq!(own(&[4, 9]), [(4, vec!["0000:01:00.0".into()]), (9, vec!["0000:02:00.0".into()])]);
        assert_eq!(own(&[9]), [(9, vec!["0000:01:00.0".into(), "0000:02:00.0".into()])]);
    }
}
