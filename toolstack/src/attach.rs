//! Attach: check everything, then assign, permit, map, announce, and wait for the driver domain. What
//! was done is undone in reverse if a later step fails: a failed attach leaves nothing behind.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pciback::cmdline::Mode;
use pciback::sbdf::Sbdf;

use crate::domains::{Domains, Driver, Guest, Xl};
use crate::error::{Failure, Outcome, errno};
use crate::mend::mend;
use crate::nodes::{self, DOMID_IO, Link, told};
use crate::rights;
use crate::serve;
use crate::sysfs::{Function, Sysfs};
use crate::xen::{self, Hypervisor, Store, Xen, transaction};

/// How long the driver domain may take for one step.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The first pause between two looks at what is waited for, and the longest: each look costs xenstored work, which the
/// domains that are waited for need as well.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Everything the operations work on.
pub struct Host<'a> {
    /// Hypercalls.
    pub xen: &'a dyn Hypervisor,
    /// xenstore.
    pub store: &'a dyn Store,
    /// dom0's sysfs.
    pub sysfs: &'a Sysfs,
    /// What xl knows.
    pub domains: &'a dyn Domains,
    /// How long the driver domain may take for one step.
    pub patience: Duration,
    /// Where `serve` writes down which vectors it has mapped.
    pub journals: PathBuf,
}

impl<'a> Host<'a> {
    /// The real one.
    pub fn of(xen: &'a Xen, sysfs: &'a Sysfs) -> Host<'a> {
        Host { xen, store: xen, sysfs, domains: &Xl, patience: PATIENCE, journals: nodes::JOURNALS.into() }
    }

    /// Waits until `look` finds something, at most `patience`, and not after the user interrupts.
    pub fn wait<T>(&self, patience: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + patience;
        let mut pause = SHORTEST_PAUSE;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if Instant::now() >= end || xen::interrupted() {
                return None;
            }
            std::thread::sleep(pause);
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits until no change of the guest's list is under way: the frontend is asked about one at a time.
    pub fn settle(&self, link: &Link, guest: &Guest, patience: Duration) -> Outcome<()> {
        let settled = self.wait(patience, || {
            let state = self.store.read(0, &link.back("state"));
            (!in_change(state.as_deref())).then_some(())
        });
        settled.ok_or_else(|| {
            stopped(Failure::new(
                format!("guest {:?} has not finished an earlier change of its devices", guest.name),
                "see whether its kernel runs, then try again",
            ))
        })
    }
}

/// What a wait that found nothing means: an interrupt by the user, or else `otherwise`.
fn stopped(otherwise: Failure) -> Failure {
    if xen::interrupted() {
        return Failure::new("interrupted; what had been done is undone", "run the command again");
    }
    otherwise
}

/// Whether the backend's state says that the list of functions is being changed, or the connection closed.
fn in_change(state: Option<&str>) -> bool {
    matches!(state, Some("5" | "7" | "8"))
}

/// Options of `attach`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The driver domain's name; the one that lists the function, if not given.
    pub driver: Option<String>,
    /// Let the guest write registers without a rule.
    pub permissive: bool,
}

/// What to undo, newest last.
type Undo<'a> = Vec<(&'static str, Box<dyn Fn() -> Result<(), i32> + 'a>)>;

/// Attaches `sbdf` to a guest.
///
/// # Errors
/// The first thing that is wrong; nothing is left behind.
pub fn attach(host: &Host<'_>, guest: &str, sbdf: Sbdf, options: &Options) -> Outcome<String> {
    let (guest, drivers) = host.domains.guest_and_drivers(guest)?;
    let function = host.sysfs.function(sbdf)?;
    check_guest(&guest)?;
    check_function(&function)?;
    let driver = find_driver(drivers, sbdf, options.driver.as_deref())?;
    let link = Link { driver: driver.domid, guest: guest.domid };
    check_driver(host, &driver, &guest, &function)?;
    check_owner(host, &link, &guest, sbdf)?;

    let others = rights::others(host, guest.domid, sbdf);
    let strangers = rights::strangers(host, &function, &others);
    for stranger in strangers.line {
        eprintln!(
            "xl-pciback: warning: {sbdf}: its interrupt line (GSI {}) is also {stranger}'s in dom0: whoever holds the line \
             down stops the other (XSA-461); drivers that use MSI or MSI-X are not affected",
            function.irq
        );
    }
    for stranger in strangers.frames {
        eprintln!(
            "xl-pciback: warning: {sbdf}: its registers share a 4 KiB page with {stranger}, which the guest can \
             therefore reach too (XSA-461)"
        );
    }
    let mut undo: Undo<'_> = Vec::new();
    let done = carry_out(host, &link, &guest, &function, &others, options, &mut undo);
    if done.is_err() {
        while let Some((what, step)) = undo.pop() {
            if let Err(number) = step() {
                eprintln!("xl-pciback: warning: {sbdf}: undoing ({what}) answered {}", errno(number));
            }
        }
    }
    done
}

fn check_guest(guest: &Guest) -> Outcome<()> {
    let Guest { name, kind, .. } = guest;
    if guest.domid == 0 {
        return Err(Failure::new("domain 0 is no guest", "name a guest; `xl list` shows what runs"));
    }
    if kind != "pv" {
        return Err(Failure::new(
            format!("guest {name:?} is a {kind} guest, and Linux's xen-pcifront works in PV guests only"),
            "use a guest with type = \"pv\"",
        ));
    }
    if !guest.e820_host {
        return Err(Failure::new(
            format!("guest {name:?} was started without e820_host, so its kernel leaves no room for device memory"),
            "add e820_host = 1 to its xl configuration and start it again",
        ));
    }
    if guest.passthrough == "disabled" {
        return Err(Failure::new(
            format!("guest {name:?} was started without passthrough, so Xen gives it no IOMMU context"),
            "add passthrough = \"enabled\" to its xl configuration and start it again",
        ));
    }
    Ok(())
}

fn check_function(function: &Function) -> Outcome<()> {
    let sbdf = function.sbdf;
    if let Some(refusal) = function.refusal() {
        return Err(refusal);
    }
    match &function.driver {
        Some(driver) if driver == "pciback" => Err(Failure::new(
            format!("{sbdf} is held by Linux's xen-pciback in dom0"),
            format!("xl pci-assignable-remove {sbdf}; xl-pciback assignable-add {sbdf}"),
        )),
        Some(driver) => Err(Failure::new(
            format!("{sbdf} is in use by dom0's driver {driver:?}"),
            format!("xl-pciback assignable-add {sbdf}"),
        )),
        None if !function.is_assignable() => Err(Failure::new(
            format!("{sbdf} was not made assignable, so a driver of dom0 could take it at any time"),
            format!("xl-pciback assignable-add {sbdf}"),
        )),
        None => Ok(()),
    }
}

/// The driver domain to use: the one whose xl configuration lists the function.
///
/// # Errors
/// There is none.
pub fn find_driver(mut drivers: Vec<Driver>, sbdf: Sbdf, name: Option<&str>) -> Outcome<Driver> {
    if let Some(name) = name {
        drivers.retain(|driver| driver.name == name || driver.domid.to_string() == name);
        if drivers.is_empty() {
            return Err(Failure::new(
                format!("driver domain {name:?} is not running"),
                format!("xl create /etc/xen/{name}.cfg (xl-pciback config prints such a file)"),
            ));
        }
    }
    let Some(position) = drivers.iter().position(|driver| driver.entry(sbdf).is_some()) else {
        return Err(match drivers.first() {
            None => Failure::new(
                format!("no driver domain is running that could serve {sbdf}"),
                format!("xl-pciback config {sbdf} > /etc/xen/pciback0.cfg; xl create /etc/xen/pciback0.cfg"),
            ),
            Some(Driver { name, .. }) => Failure::new(
                format!("no running driver domain has {sbdf} (there is {name:?})"),
                format!(
                    "add the function to iomem= and dev= of its xl configuration (xl-pciback config {sbdf} prints them) and start it again"
                ),
            ),
        });
    };
    Ok(drivers.swap_remove(position))
}

fn check_driver(host: &Host<'_>, driver: &Driver, guest: &Guest, function: &Function) -> Outcome<()> {
    let sbdf = function.sbdf;
    let name = &driver.name;
    // The promise is the administrator's. It does not depend on what the driver domain says.
    if let Some(wanted) = driver.entry(sbdf).and_then(|entry| entry.guest.as_ref()).filter(|only| **only != guest.name)
    {
        return Err(Failure::new(
            format!(
                "{sbdf} is promised to guest {wanted:?} (guest= in the configuration of {name:?}), not to {:?}",
                guest.name
            ),
            "attach it to that guest, or change the configuration",
        ));
    }
    let xen = host.domains.xen()?;
    if !xen.has_iommu() {
        return Err(Failure::new(
            "this host has no usable IOMMU, and without one a guest's device could write all memory",
            "switch on VT-d or AMD-Vi in the firmware; `xl info` must name pv_directio or hvm_directio in virt_caps",
        ));
    }
    if driver.config.mode == Mode::Mmcfg0 && !xen.mmcfg_off() {
        return Err(Failure::new(
            format!(
                "driver domain {name:?} was told mode=mmcfg0, but this Xen was not booted with mmcfg=0: its first configuration write would end it"
            ),
            "boot Xen with mmcfg=0, or take mode=mmcfg0 out of its configuration and start it again",
        ));
    }

    wait_for_serve(host, driver);
    let read = |node: &str| told(host.store, &nodes::published(driver.domid, sbdf, node));
    // With mode=mmcfg0 the driver domain writes nothing before it is told that the host allows it: that was checked.
    let stands = read("state");
    let told = driver.config.mode == Mode::Mmcfg0 && stands.as_deref() == Some("ready");
    // A driver domain before this one may have died in a reset of it.
    let mended = matches!(stands.as_deref(), Some("ready" | "broken")) && mend(host.sysfs, host.store, function)?;
    if told || mended || stands.as_deref() == Some("broken") {
        try_again(host, driver, sbdf);
    }
    let mut said = false;
    let state = host.wait(host.patience / 3, || match read("state") {
        Some(state) if state != "resetting" => Some(state),
        _ => {
            if !said {
                eprintln!("xl-pciback: {sbdf}: waiting for driver domain {name:?} to have it ready");
            }
            said = true;
            None
        }
    });
    match state.as_deref() {
        Some("ready") => {}
        Some("in-use") => {
            let owner = read("frontend").unwrap_or_default();
            let mine = owner == guest.domid.to_string();
            let owner_name = owner.parse().map(|id| nodes::name_of(host.store, id)).unwrap_or_default();
            return Err(Failure::new(
                format!(
                    "{sbdf} is already attached to {} {owner_name:?} (domain {owner})",
                    if mine { "this guest," } else { "guest" }
                ),
                format!("xl-pciback detach {} {sbdf}", if owner_name.is_empty() { &owner } else { &owner_name }),
            ));
        }
        Some("broken") => {
            return Err(Failure::new(
                format!("driver domain {name:?} cannot serve {sbdf}: {}", read("reason").unwrap_or_default()),
                "mend what it says, then try again; if it says the same, start the driver domain again",
            ));
        }
        Some(other) => {
            return Err(Failure::new(
                format!("driver domain {name:?} says {other:?} of {sbdf}, which this version does not know"),
                "use image and tool of the same version",
            ));
        }
        None => {
            return Err(stopped(Failure::new(
                format!("driver domain {name:?} does not say that {sbdf} is ready"),
                format!("see xl console {name}; it may have crashed, or its kernel= is not the pciback-stubdom image"),
            )));
        }
    }
    if let Some(id) = read("id").filter(|id| *id != function.id_text()) {
        return Err(Failure::new(
            format!("{sbdf} is {} for dom0, but driver domain {name:?} reads {id}", function.id_text()),
            "check ecam= and iomem= of its xl configuration with xl-pciback check",
        ));
    }
    Ok(())
}

/// Waits for `serve` where it takes part, as what a guest finds when its driver begins lasts. Until it has connected, a guest
/// of a domain that may not write could only look at its device, and with `mode=mmcfg0` it would get no MSI and no MSI-X.
fn wait_for_serve(host: &Host<'_>, driver: &Driver) {
    let published = |node: &str| told(host.store, &nodes::own(driver.domid, node));
    let lacks = || match driver.config.mode {
        Mode::Auto => published("mode").is_none_or(|mode| mode == "read-only"),
        Mode::Mmcfg0 => published("serve").is_none_or(|serve| serve == "not connected"),
        Mode::ReadOnly => false,
    };
    if !lacks() {
        return;
    }
    let waited = serve::is_running(host.store) && host.wait(host.patience / 3, || (!lacks()).then_some(())).is_some();
    if !waited && lacks() {
        let (why, so) = match driver.config.mode {
            Mode::Auto => ("may not write on this Xen and ", "the guest can only look at the device"),
            _ => ("", "the guest gets no MSI and no MSI-X"),
        };
        eprintln!(
            "xl-pciback: warning: driver domain {:?} {why}is not connected to xl-pciback serve: {so}; start xl-pciback serve",
            driver.name
        );
    }
}

/// Asks the driver domain to hand a function over: a broken one again, as what broke it may be over, or one that it
/// has not dared to touch. Without an answer, the state as it is counts.
fn try_again(host: &Host<'_>, driver: &Driver, sbdf: Sbdf) {
    let node = nodes::own(driver.domid, "retry");
    if host.store.write(0, &node, &pciback::nodes::folder(sbdf)).is_ok() {
        eprintln!("xl-pciback: {sbdf}: asking driver domain {:?} to make it ready", driver.name);
        let seen = || host.store.read(0, &node).is_some_and(|wish| wish.is_empty()).then_some(());
        host.wait(host.patience / 3, seen);
        // A wish is not left behind, whether it was taken up or not.
        let _ = host.store.remove(0, &node);
    }
}

/// Whether the driver domain resets the function by itself; otherwise dom0's kernel is asked to.
pub fn resets_itself(host: &Host<'_>, driver: u32, sbdf: Sbdf) -> bool {
    told(host.store, &nodes::published(driver, sbdf, "reset")).is_some_and(|method| method != "dom0")
}

/// Nobody may have the function, and the guest no other backend: it has room for one.
fn check_owner(host: &Host<'_>, link: &Link, guest: &Guest, sbdf: Sbdf) -> Outcome<()> {
    let name = &guest.name;
    if link.index_of(host.store, 0, sbdf).is_some() {
        return Err(Failure::new(
            format!("{sbdf} is already attached to this guest, {name:?}"),
            format!("xl-pciback detach {name} {sbdf}"),
        ));
    }
    if host.xen.is_free(sbdf) == Ok(false) {
        let holder = rights::holder(host, sbdf);
        let who = holder.map_or("another domain".into(), |domid| {
            format!("domain {domid} ({:?})", nodes::name_of(host.store, domid))
        });
        return Err(Failure::new(
            format!("Xen says that {who} already has {sbdf}"),
            holder.map_or("end that domain; see xl dmesg".into(), |domid| {
                format!("xl-pciback detach --force {domid} {sbdf}, or end that domain")
            }),
        ));
    }
    // A number only: the node is the guest's to write, so its path is not followed.
    let other: Option<u32> = host.store.read(0, &link.front("backend-id")).and_then(|text| text.parse().ok());
    let Some(other) = other.filter(|other| *other != link.driver) else { return Ok(()) };
    let there = Link { driver: other, guest: link.guest };
    if host.store.read(0, &there.back("state")).is_none() {
        return Ok(());
    }
    Err(Failure::new(
        format!("guest {name:?} gets its PCI functions from domain {other}, and a guest can have one such backend"),
        if other == 0 {
            "take pci= out of its xl configuration and start it again".to_string()
        } else {
            "list all functions of this guest in one driver domain".to_string()
        },
    ))
}

/// What an errno of assign_device means.
fn assign_failure(sbdf: Sbdf, number: i32) -> Failure {
    let (why, remedy) = match number {
        1 => (
            "Xen refuses it, as it shares reserved memory (RMRR) with the platform",
            "use another device or port; see xl dmesg",
        ),
        16 => (
            "another domain has it, or MASKALL is still set in its MSI-X control from before",
            "xl dmesg tells which; reset it (echo 1 > sysfs reset) or power-cycle the host",
        ),
        19 | 22 => (
            "Xen does not know it, or another domain has it",
            "see xl dmesg; xl-pciback assignable-remove and assignable-add it again",
        ),
        95 => (
            "the guest has no IOMMU context",
            "add passthrough = \"enabled\" to the guest's xl configuration and start it again",
        ),
        38 => ("there is no IOMMU", "switch on VT-d or AMD-Vi in the firmware"),
        _ => ("Xen refuses the assignment", "see xl dmesg"),
    };
    Failure::new(format!("{sbdf} cannot be assigned to the guest: {why}: {}", errno(number)), remedy)
}

fn carry_out<'a>(
    host: &'a Host<'a>,
    link: &'a Link,
    guest: &'a Guest,
    function: &'a Function,
    others: &'a [Function],
    options: &Options,
    undo: &mut Undo<'a>,
) -> Outcome<String> {
    let sbdf = function.sbdf;
    let domid = guest.domid;
    host.settle(link, guest, host.patience)?;
    if !resets_itself(host, link.driver, sbdf) {
        reset(host, sbdf);
    }

    // Written down first, until the driver domain has it: `serve` takes back what a program that was killed has left half
    // done.
    let note = nodes::record(sbdf, "assigning");
    host.store.write(0, &note, &format!("{domid} {}", std::process::id())).map_err(|number| {
        Failure::new(format!("{sbdf}: xenstore refuses a note: {}", errno(number)), "see whether xenstored runs")
    })?;
    undo.push(("note", Box::new(move || host.store.remove(0, &nodes::record(sbdf, "assigning")))));
    host.xen.assign(domid, sbdf, false).map_err(|number| assign_failure(sbdf, number))?;
    undo.push((
        "assignment",
        Box::new(move || {
            host.xen.deassign(domid, sbdf)?;
            quarantine(host, sbdf)
        }),
    ));

    // Pushed first: if the third BAR fails, the first two are taken back.
    undo.push((
        "memory and ports",
        Box::new(move || match rights::revoke(host.xen, domid, function, others).first() {
            Some((_, number)) => Err(*number),
            None => Ok(()),
        }),
    ));
    rights::grant(host.xen, domid, function).map_err(|(range, number)| {
        Failure::new(format!("{sbdf}: Xen refuses the guest access to {range}: {}", errno(number)), "see xl dmesg")
    })?;

    let irq = rights::irq(function).unwrap_or(0);
    if irq == 0 {
        // No virtual function has one (SR-IOV 1.1, 3.4.1.18).
        if !function.is_virtual {
            eprintln!(
                "xl-pciback: warning: {sbdf} has no line interrupt that dom0 has routed; its driver may not work"
            );
        }
    } else {
        host.xen.map_pirq(domid, irq).map_err(|number| {
            Failure::new(format!("{sbdf}: GSI {irq} cannot be mapped for the guest: {}", errno(number)), "see xl dmesg")
        })?;
        let shared = rights::shares_irq(function, others);
        if !shared {
            undo.push(("interrupt", Box::new(move || host.xen.unmap_pirq(domid, irq))));
        }
        host.xen.irq(domid, irq, true).map_err(|number| {
            Failure::new(format!("{sbdf}: the guest cannot be allowed pirq {irq}: {}", errno(number)), "see xl dmesg")
        })?;
        if !shared {
            undo.push(("interrupt permission", Box::new(move || host.xen.irq(domid, irq, false))));
        }
    }

    let first = link.count(host.store, 0).is_none();
    let list = nodes::function_nodes(function, irq, options.permissive);
    announce(host, link, guest, sbdf, &list)?;
    undo.push(("announcement", Box::new(move || withdraw(host, link, sbdf))));

    eprintln!("xl-pciback: {sbdf}: waiting for the driver domain");
    wait_exported(host, link, sbdf)?;
    // A note that stays is no harm: what it speaks of is found done.
    let _ = host.store.remove(0, &note);
    let index = link.index_of(host.store, 0, sbdf);
    let address = index.and_then(|index| told(host.store, &link.back(&format!("vdev-{index}")))).unwrap_or_default();
    let exported = format!("{sbdf}: exported to {:?} as {address}", guest.name);

    // A frontend that runs takes the function now. One that does not take it is no failure of ours.
    let front = host.store.read(0, &link.front("state"));
    let runs = matches!(front.as_deref(), Some("3" | "4" | "7"));
    let connected = || host.store.read(0, &link.back("state")).is_some_and(|state| state == "4").then_some(());
    let taken = runs && host.wait(host.patience / 3, connected).is_some();
    Ok(match (taken, first || !runs) {
        (true, _) => exported,
        (false, true) => format!("{exported}; it connects when its xen-pcifront loads"),
        (false, false) => format!("{exported}; its xen-pcifront has not taken it yet"),
    })
}

/// dom0's own reset, where the function has one. A failure is told and no more: a guest's driver
/// resets its device again.
pub fn reset(host: &Host<'_>, sbdf: Sbdf) {
    if !host.sysfs.has(sbdf, "reset") {
        eprintln!("xl-pciback: warning: {sbdf} has no reset that dom0 knows; what the last guest left in it stays");
    } else if let Err(failure) = host.sysfs.set(sbdf, "reset", "1") {
        eprintln!("xl-pciback: warning: {}", failure.what);
    }
}

/// Puts a function into quarantine, where its DMA reaches nothing.
pub fn quarantine(host: &Host<'_>, sbdf: Sbdf) -> Result<(), i32> {
    match host.xen.assign(DOMID_IO, sbdf, true) {
        // ENODEV: Xen put it there by itself when it left the guest. ENOSYS, EOPNOTSUPP: no IOMMU.
        Err(19 | 38 | 95) => Ok(()),
        other => other,
    }
}

/// Lists the function in xenstore, in one transaction, once no other change is under way.
fn announce(host: &Host<'_>, link: &Link, guest: &Guest, sbdf: Sbdf, list: &[(&'static str, String)]) -> Outcome<()> {
    loop {
        host.settle(link, guest, host.patience)?;
        match list_function(host, link, guest, sbdf, list) {
            // A change began in between.
            Err(EBUSY) => {}
            Err(number) => {
                return Err(Failure::new(
                    format!("{sbdf}: xenstore refuses the announcement: {}", errno(number)),
                    "see whether xenstored runs",
                ));
            }
            Ok(()) => return Ok(()),
        }
    }
}

const EBUSY: i32 = 16;
const ENOSPC: i32 = 28;

fn list_function(
    host: &Host<'_>,
    link: &Link,
    guest: &Guest,
    sbdf: Sbdf,
    list: &[(&'static str, String)],
) -> Result<(), i32> {
    let Link { driver, guest: domid } = *link;
    transaction(host.store, |tx| {
        let state = host.store.read(tx, &link.back("state"));
        if in_change(state.as_deref()) {
            return Err(EBUSY);
        }
        let write = |path: &str, value: &str| host.store.write(tx, path, value);
        let node = |path: &str, value: &str| {
            write(path, value)?;
            host.store.permit(tx, path, driver, Some(domid))
        };
        let count = link.count(host.store, tx);
        let index = count.unwrap_or(0);
        if index >= nodes::MAX_FUNCTIONS {
            return Err(ENOSPC);
        }
        write(&nodes::record(sbdf, "domid"), &domid.to_string())?;
        let released = nodes::record(sbdf, "released");
        if host.store.read(tx, &released).is_some() {
            host.store.remove(tx, &released)?;
        }
        if count.is_none() {
            for folder in ["backend", "backend/pci", &format!("backend/pci/{domid}")] {
                let path = format!("/local/domain/{driver}/{folder}");
                if host.store.read(tx, &path).is_none() {
                    write(&path, "")?;
                }
                host.store.permit(tx, &path, driver, None)?;
            }
            node(&link.back_folder(), "")?;
            node(&link.back("frontend"), &link.front_folder())?;
            node(&link.back("frontend-id"), &domid.to_string())?;
            node(&link.back("online"), "1")?;
            node(&link.back("domain"), &guest.name)?;
            let front = |path: &str, value: &str| {
                write(path, value)?;
                host.store.permit(tx, path, domid, Some(driver))
            };
            front(&link.front_folder(), "")?;
            front(&link.front("backend"), &link.back_folder())?;
            front(&link.front("backend-id"), &driver.to_string())?;
            front(&link.front("state"), "1")?;
        }
        for (name, value) in list {
            node(&link.back(&format!("{name}-{index}")), value)?;
        }
        node(&link.back(&format!("state-{index}")), "1")?;
        node(&link.back("num_devs"), &(index + 1).to_string())?;
        if count.is_none() {
            node(&link.back("state"), "1")
        } else if state.as_deref() == Some("4") {
            write(&link.back("state"), "7")
        } else {
            Ok(())
        }
    })
}

/// Takes the function out of the list, and the folders with the last one.
pub fn withdraw(host: &Host<'_>, link: &Link, sbdf: Sbdf) -> Result<(), i32> {
    transaction(host.store, |tx| take_out(host, link, sbdf, tx))
}

/// The same, unless the driver domain has exported it. True if it had not: its guest knows nothing of it.
pub fn withdraw_unexported(host: &Host<'_>, link: &Link, sbdf: Sbdf) -> Result<bool, i32> {
    transaction(host.store, |tx| {
        let index = link.index_of(host.store, tx, sbdf).ok_or(2)?;
        if host.store.read(tx, &link.back(&format!("vdev-{index}"))).is_some() {
            return Ok(false);
        }
        take_out(host, link, sbdf, tx).map(|()| true)
    })
}

fn take_out(host: &Host<'_>, link: &Link, sbdf: Sbdf, tx: u32) -> Result<(), i32> {
    host.store.remove(tx, &nodes::record(sbdf, "domid"))?;
    let Some(index) = link.index_of(host.store, tx, sbdf) else { return Ok(()) };
    let count = link.count(host.store, tx).unwrap_or(0);
    if count <= 1 {
        host.store.remove(tx, &link.front_folder())?;
        host.store.remove(tx, &link.back_folder())?;
        for parent in [
            format!("/local/domain/{}/device/pci", link.guest),
            format!("/local/domain/{}/backend/pci/{}", link.driver, link.guest),
            format!("/local/domain/{}/backend/pci", link.driver),
            format!("/local/domain/{}/backend", link.driver),
        ] {
            if host.store.list(tx, &parent).is_empty() {
                host.store.remove(tx, &parent)?;
            }
        }
        return Ok(());
    }
    // Every higher place moves down by one, as libxl does it.
    for from in index + 1..count {
        for name in nodes::PER_FUNCTION {
            let to = link.back(&format!("{name}-{}", from - 1));
            match host.store.read(tx, &link.back(&format!("{name}-{from}"))) {
                Some(value) => {
                    host.store.write(tx, &to, &value)?;
                    host.store.permit(tx, &to, link.driver, Some(link.guest))?;
                }
                None => host.store.remove(tx, &to)?,
            }
        }
    }
    for name in nodes::PER_FUNCTION {
        host.store.remove(tx, &link.back(&format!("{name}-{}", count - 1)))?;
    }
    host.store.write(tx, &link.back("num_devs"), &(count - 1).to_string())?;
    // A frontend that never answered the change is not asked again.
    if host.store.read(tx, &link.back("state")).is_some_and(|state| state == "7") {
        host.store.write(tx, &link.back("state"), "4")?;
    }
    Ok(())
}

fn wait_exported(host: &Host<'_>, link: &Link, sbdf: Sbdf) -> Outcome<()> {
    let verdict = host.wait(host.patience, || {
        let index = link.index_of(host.store, 0, sbdf)?;
        if let Some(error) = told(host.store, &link.back(&format!("error-{index}"))) {
            return Some(Err(error));
        }
        if let Some(error) = told(host.store, &link.back("error")) {
            return Some(Err(error));
        }
        let state = host.store.read(0, &link.back(&format!("state-{index}")))?;
        (state == "3").then_some(Ok(()))
    });
    match verdict {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) => Err(Failure::new(
            format!("the driver domain does not export {sbdf}: {error}"),
            "mend what it says; xl console of the driver domain may tell more",
        )),
        None => Err(stopped(Failure::new(
            format!(
                "the driver domain or the guest did not answer within {} seconds about {sbdf}",
                host.patience.as_secs()
            ),
            "see xl console of the driver domain, and whether the guest's kernel runs",
        ))),
    }
}
