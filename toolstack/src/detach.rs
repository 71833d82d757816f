//! Detach: tell the guest first, wait for it, and only then take away what it used.

use std::time::Duration;

use pciback::sbdf::Sbdf;

use crate::attach::{Host, find_driver, quarantine, reset, withdraw};
use crate::error::{Failure, Outcome, errno};
use crate::nodes::Link;
use crate::xen::{Store, transaction};

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
    let link = Link { driver: find_driver(host, sbdf, options.driver.as_deref())?, guest: guest.domid };
    let index = link.index_of(host.store, 0, sbdf).ok_or_else(|| {
        Failure::new(format!("{sbdf} is not attached to guest {:?}", guest.name), "xl-pciback list shows what is where")
    })?;
    let function = host.sysfs.function(sbdf)?;

    let told = tell(host, &link, index).map_err(|number| {
        Failure::new(format!("{sbdf}: xenstore refuses the wish: {}", errno(number)), "see whether xenstored runs")
    })?;
    eprintln!("xl-pciback: {sbdf}: waiting for guest {:?} to let it go", guest.name);
    let released = host.wait(options.timeout, || {
        let index = link.index_of(host.store, 0, sbdf)?;
        let state = host.store.read(0, &link.back(&format!("state-{index}")))?;
        let settled =
            !told || host.store.read(0, &link.back("state")).is_some_and(|state| state != "7" && state != "8");
        (state == "6" && settled).then_some(())
    });
    if released.is_none() && !options.force {
        take_back(host, &link, sbdf);
        return Err(Failure::new(
            format!("guest {:?} did not let {sbdf} go within {} seconds", guest.name, options.timeout.as_secs()),
            "stop what uses it in the guest and try again, or use --force, which takes it away under a running driver",
        ));
    }

    // The guest has let go: now its rights go, and a failure of one is no reason to keep another.
    let mut problems = Vec::new();
    let mut note = |what: &str, outcome: Result<(), i32>| {
        if let Err(number) = outcome {
            problems.push(format!("{what}: {}", errno(number)));
        }
    };
    note("withdrawing the announcement", withdraw(host, &link, sbdf));
    if (1..255).contains(&function.irq) {
        note("interrupt permission", host.xen.irq(guest.domid, function.irq, false));
        // EINVAL, ESRCH: the guest's own teardown was first.
        note(
            "interrupt",
            host.xen.unmap_pirq(guest.domid, function.irq).or_else(|number| match number {
                3 | 22 => Ok(()),
                other => Err(other),
            }),
        );
    }
    note("memory and ports", host.bars(guest.domid, &function, false).map_err(|(_, number)| number));
    note("assignment", host.xen.deassign(guest.domid, sbdf));
    note("quarantine", quarantine(host, sbdf));
    reset(host, sbdf);
    if problems.is_empty() {
        Ok(format!("{sbdf}: detached from {:?}", guest.name))
    } else {
        Err(Failure::new(format!("{sbdf}: detached, but {}", problems.join("; ")), "see xl dmesg"))
    }
}

/// Says that the function shall go. True if a connected frontend has to answer.
fn tell(host: &Host<'_>, link: &Link, index: u32) -> Result<bool, i32> {
    let connected = |tx: u32| host.store.read(tx, &link.back("state")).is_some_and(|state| state == "4");
    let told = connected(0);
    transaction(host.store, |tx| {
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

/// Whether any guest has the function: for `assignable-remove`.
pub fn attached_to(store: &dyn Store, sbdf: Sbdf) -> Option<u32> {
    crate::nodes::drivers(store).into_iter().find_map(|(driver, _)| {
        let guests = store.list(0, &format!("/local/domain/{driver}/backend/pci"));
        guests
            .into_iter()
            .filter_map(|guest| guest.parse().ok())
            .find(|guest| Link { driver, guest: *guest }.index_of(store, 0, sbdf).is_some())
    })
}
