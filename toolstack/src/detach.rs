//! Detach: tell the guest first, wait for it, and only then take away what it used.

use std::time::{Duration, Instant};

use pciback::sbdf::Sbdf;

use crate::attach::{Host, find_driver, quarantine, reset, resets_itself, withdraw, withdraw_unexported};
use crate::domains::Guest;
use crate::error::{Failure, Outcome, errno};
use crate::nodes::{self, Link};
use crate::rights;
use crate::serve::journal;
use crate::sysfs::Function;
use crate::xen::{self, transaction};

/// Options of `detach`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The driver domain's name.
    pub driver: Option<String>,
    /// Take the function away even if the guest does not answer.
    pub force: bool,
    /// How long the guest may take.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options { driver: None, force: false, timeout: Duration::from_secs(10) }
    }
}

/// Detaches `sbdf` from a guest.
///
/// # Errors
/// It is not attached, or the guest does not let it go: nothing was taken away then.
pub fn detach(host: &Host<'_>, guest: &str, sbdf: Sbdf, options: &Options) -> Outcome<String> {
    let guest = host.domains.guest(guest)?;
    let function = host.sysfs.function(sbdf)?;
    let driver = find_driver(host.domains.drivers()?, sbdf, options.driver.as_deref());
    if let (Err(failure), true) = (&driver, options.driver.is_some()) {
        return Err(failure.clone());
    }
    let promised = driver.as_ref().is_ok_and(|driver| driver.entry(sbdf).is_some_and(|entry| entry.guest.is_some()));
    let link = driver.ok().map(|driver| Link { driver: driver.domid, guest: guest.domid });
    match link.and_then(|link| Some((link.index_of(host.store, 0, sbdf)?, link))) {
        Some((_, link)) => ask(host, &link, &guest, &function, promised, options),
        None => orphan(host, &guest, &function, options),
    }
}

/// The usual way: the guest is asked, and what it used goes once it has let go.
fn ask(
    host: &Host<'_>,
    link: &Link,
    guest: &Guest,
    function: &Function,
    promised: bool,
    options: &Options,
) -> Outcome<String> {
    let sbdf = function.sbdf;
    let others = rights::others(host, guest.domid, sbdf);
    let port = frontend_port(host, link);
    let end = Instant::now() + options.timeout;
    let left = || end.saturating_duration_since(Instant::now());
    // One that the driver domain has refused, or not come to, the guest knows nothing of, and its frontend would close for
    // good if it were told to let go what it never had.
    match withdraw_unexported(host, link, sbdf) {
        Ok(true) => {
            note_release(host, guest, sbdf, promised);
            wait_removed(host, link, guest, sbdf, port, left());
            return finish(host, guest, function, &others, Ok(()), false);
        }
        Ok(false) => {}
        Err(number) => {
            return Err(Failure::new(
                format!("{sbdf}: xenstore refuses the wish: {}", errno(number)),
                "see whether xenstored runs",
            ));
        }
    }
    match host.settle(link, guest, options.timeout) {
        Err(failure) if !options.force => return Err(failure),
        _ => {}
    }
    let told = tell(host, link, sbdf).map_err(|number| {
        Failure::new(format!("{sbdf}: xenstore refuses the wish: {}", errno(number)), "see whether xenstored runs")
    })?;
    eprintln!("xl-pciback: {sbdf}: waiting for guest {:?} to let it go", guest.name);
    let state_is = |wanted: &str| {
        let index = link.index_of(host.store, 0, sbdf)?;
        let state = host.store.read(0, &link.back(&format!("state-{index}")))?;
        (state == wanted).then_some(())
    };
    let mut released = host.wait(left().max(Duration::from_millis(20)), || {
        let settled =
            !told || host.store.read(0, &link.back("state")).is_some_and(|state| state != "7" && state != "8");
        if settled { state_is("6") } else { None }
    });
    // The driver domain has released it, which it does after the guest's answer. That the frontend has not
    // gone back to Connected is no reason to keep it.
    released = released.or_else(|| state_is("6"));
    if released.is_none() && (!options.force || xen::interrupted()) {
        take_back(host, link, sbdf);
        if xen::interrupted() {
            return Err(Failure::new(
                format!("interrupted; guest {:?} keeps {sbdf}", guest.name),
                "run the command again",
            ));
        }
        return Err(Failure::new(
            format!("guest {:?} did not let {sbdf} go within {} seconds", guest.name, options.timeout.as_secs()),
            "stop what uses it in the guest and try again, or use --force, which takes it away under a running driver",
        ));
    }
    note_release(host, guest, sbdf, promised);
    let withdrawn = withdraw(host, link, sbdf);
    wait_removed(host, link, guest, sbdf, port, left());
    // A function that was taken by force has not been handed over; one that was released has.
    let clean = released.is_some() && resets_itself(host, link.driver, sbdf);
    finish(host, guest, function, &others, withdrawn, clean)
}

/// The guest's end of the event channel, while its frontend is connected.
fn frontend_port(host: &Host<'_>, link: &Link) -> Option<u32> {
    host.store.read(0, &link.front("event-channel")).and_then(|text| text.parse().ok())
}

/// Waits until the guest has removed its end, if that went with its last function. One that was listed again before the
/// guest has seen it go would never be found: Linux looks only whether there is one.
fn wait_removed(host: &Host<'_>, link: &Link, guest: &Guest, sbdf: Sbdf, port: Option<u32>, patience: Duration) {
    let Some(port) = port.filter(|_| host.store.read(0, &link.front("state")).is_none()) else { return };
    let gone = || host.xen.port_is_closed(guest.domid, port).unwrap_or(true);
    if !gone() {
        eprintln!("xl-pciback: {sbdf}: waiting for guest {:?} to remove it", guest.name);
        host.wait(patience, || gone().then_some(()));
    }
}

/// Before a promised function is free: `serve` would give it to this guest again.
fn note_release(host: &Host<'_>, guest: &Guest, sbdf: Sbdf, promised: bool) {
    if promised {
        let _ = host.store.write(0, &nodes::record(sbdf, "released"), &guest.domid.to_string());
    }
}

/// The driver domain has ended, or was started anew, while the guest had the function. Nobody can tell the
/// guest, which noticed long ago; but Xen still lets it use the device.
fn orphan(host: &Host<'_>, guest: &Guest, function: &Function, options: &Options) -> Outcome<String> {
    let sbdf = function.sbdf;
    if rights::holder(host, sbdf) != Some(guest.domid) {
        return Err(Failure::new(
            format!("{sbdf} is not attached to guest {:?}", guest.name),
            "xl-pciback list shows what is where",
        ));
    }
    if !options.force {
        return Err(Failure::new(
            format!("the driver domain that served {sbdf} to {:?} is gone, so the guest cannot be told", guest.name),
            "end the guest, or use --force, which takes the device away under a running driver",
        ));
    }
    let others = rights::others(host, guest.domid, sbdf);
    let link = Link { driver: 0, guest: guest.domid };
    let port = frontend_port(host, &link);
    let forgotten = transaction(host.store, |tx| {
        host.store.remove(tx, &nodes::record(sbdf, "domid"))?;
        // The guest's end is removed with the last function, if its backend is gone as well.
        let backend = host.store.read(tx, &link.front("backend-id")).and_then(|text| text.parse().ok());
        let gone = |driver| host.store.read(tx, &Link { driver, guest: guest.domid }.back("state")).is_none();
        if others.is_empty() && backend.is_some_and(gone) {
            host.store.remove(tx, &link.front_folder())?;
            let parent = format!("/local/domain/{}/device/pci", guest.domid);
            if host.store.list(tx, &parent).is_empty() {
                host.store.remove(tx, &parent)?;
            }
        }
        Ok(())
    });
    // Its end goes with the device, after its driver has let go. Every access to configuration space takes the guest two
    // seconds now that nobody answers. A guest that takes longer than is waited for loses the device under its driver.
    if forgotten.is_ok() {
        wait_removed(host, &link, guest, sbdf, port, options.timeout);
    }
    finish(host, guest, function, &others, forgotten, false)
}

/// Takes away what the guest used. A failure of one step is no reason to leave out another. `clean` says that the
/// driver domain has reset the function.
fn finish(
    host: &Host<'_>,
    guest: &Guest,
    function: &Function,
    others: &[Function],
    withdrawn: Result<(), i32>,
    clean: bool,
) -> Outcome<String> {
    let (sbdf, domid) = (function.sbdf, guest.domid);
    let mut problems = Vec::new();
    // Vectors that dom0 mapped for a driver domain that cannot have them unmapped any more.
    for mapping in journal::mapped(&host.journals, sbdf).into_iter().filter(|mapping| u32::from(mapping.0) == domid) {
        if matches!(host.xen.unmap_pirq(domid, mapping.1.cast_unsigned()), Ok(()) | Err(3 | 22)) {
            journal::note_unmapped(&host.journals, sbdf, mapping);
        }
    }
    let mut note = |what: &str, outcome: Result<(), i32>| {
        if let Err(number) = outcome {
            problems.push(format!("{what}: {}", errno(number)));
        }
    };
    note("withdrawing the announcement", withdrawn);
    if let Some(irq) = rights::irq(function).filter(|_| !rights::shares_irq(function, others)) {
        note("interrupt permission", host.xen.irq(domid, irq, false));
        // EINVAL, ESRCH: the guest's own teardown was first.
        note(
            "interrupt",
            host.xen.unmap_pirq(domid, irq).or_else(|number| match number {
                3 | 22 => Ok(()),
                other => Err(other),
            }),
        );
    }
    for (range, number) in rights::revoke(host.xen, domid, function, others) {
        note(&range, Err(number));
    }
    note("assignment", host.xen.deassign(domid, sbdf));
    let quarantined = quarantine(host, sbdf);
    if !clean {
        reset(host, sbdf);
    }
    // What kept it out of quarantine (MASKALL left set, EBUSY) may have gone with the reset.
    note("quarantine", quarantined.or_else(|_| quarantine(host, sbdf)));
    if problems.is_empty() {
        Ok(format!("{sbdf}: detached from {:?}", guest.name))
    } else {
        Err(Failure::new(format!("{sbdf}: detached, but {}", problems.join("; ")), "see xl dmesg"))
    }
}

/// Says that the function shall go. True if a connected frontend has to answer.
fn tell(host: &Host<'_>, link: &Link, sbdf: Sbdf) -> Result<bool, i32> {
    let connected = |tx: u32| host.store.read(tx, &link.back("state")).is_some_and(|state| state == "4");
    let told = connected(0);
    transaction(host.store, |tx| {
        let index = link.index_of(host.store, tx, sbdf).ok_or(2)?;
        host.store.write(tx, &link.back(&format!("state-{index}")), "5")?;
        // Without a connected frontend the driver domain sees the list change and acts at once.
        if connected(tx) { host.store.write(tx, &link.back("state"), "7") } else { Ok(()) }
    })?;
    Ok(told)
}

/// The guest keeps the function: the wish is withdrawn, so that it does not act on it later.
fn take_back(host: &Host<'_>, link: &Link, sbdf: Sbdf) {
    let undone = transaction(host.store, |tx| {
        let Some(index) = link.index_of(host.store, tx, sbdf) else { return Ok(()) };
        let state = link.back(&format!("state-{index}"));
        if host.store.read(tx, &state).is_some_and(|state| state == "5") {
            host.store.write(tx, &state, "3")?;
        }
        if host.store.read(tx, &link.back("state")).is_some_and(|state| state == "7") {
            host.store.write(tx, &link.back("state"), "4")?;
        }
        Ok(())
    });
    if let Err(number) = undone {
        eprintln!("xl-pciback: warning: {sbdf}: the wish to let it go stays in xenstore: {}", errno(number));
    }
}

/// Whether any guest has the function, by the driver domains' lists, this tool's records, or Xen itself.
///
/// # Errors
/// `xl list` does not answer.
pub fn attached_to(host: &Host<'_>, sbdf: Sbdf) -> Outcome<Option<String>> {
    let named = |domid: u32| format!("domain {domid} ({:?})", nodes::name_of(host.store, domid));
    for driver in host.domains.drivers()? {
        let guests = host.store.list(0, &format!("/local/domain/{}/backend/pci", driver.domid));
        let guests = guests.into_iter().filter_map(|guest| guest.parse().ok());
        let listed = guests
            .map(|guest| Link { driver: driver.domid, guest })
            .find(|link| link.index_of(host.store, 0, sbdf).is_some());
        if let Some(link) = listed {
            return Ok(Some(named(link.guest)));
        }
    }
    Ok(match host.xen.is_free(sbdf) {
        Ok(false) => Some(rights::holder(host, sbdf).map_or("some domain".into(), named)),
        _ => None,
    })
}
