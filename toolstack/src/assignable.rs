//! Taking functions from dom0 and giving them back.

use pciback::sbdf::Sbdf;

use crate::attach::{Host, find_driver, reset};
use crate::detach::attached_to;
use crate::error::{Failure, Outcome, errno};
use crate::mend::{mend, registers};
use crate::nodes::{self, DOMID_IO};
use crate::sysfs::NOBODY;

/// Takes `sbdf` from its dom0 driver, keeps others off, has its interrupt routed, and quarantines it.
/// What an earlier run left undone is done; what it did is left.
///
/// # Errors
/// It is no ordinary function, or somebody refuses. dom0 has it as before, then.
pub fn add(host: &Host<'_>, sbdf: Sbdf) -> Outcome<String> {
    let function = host.sysfs.function(sbdf)?;
    if let Some(refusal) = function.refusal() {
        return Err(refusal);
    }
    if function.driver.as_deref() == Some("pciback") {
        return Err(Failure::new(
            format!("{sbdf} is held by Linux's xen-pciback in dom0"),
            format!("xl pci-assignable-remove {sbdf}, then try again"),
        ));
    }
    let already = function.is_assignable();
    if already && let Some(guest) = attached_to(host, sbdf)? {
        return Ok(format!("{sbdf}: already assignable, and attached to {guest}"));
    }
    if already {
        mend(host.sysfs, host.store, &function)?;
    } else {
        take(host, sbdf, function.driver.as_deref())?;
    }
    // Enabling it has dom0 route the interrupt; from then on sysfs `irq` is the GSI.
    if !host.sysfs.is_enabled(sbdf)
        && let Err(failure) = host.sysfs.set(sbdf, "enable", "1")
    {
        eprintln!("xl-pciback: warning: {}; its line interrupt may not work", failure.what);
    }
    let mut quarantined = host.xen.assign(DOMID_IO, sbdf, true);
    if quarantined == Err(16) {
        // MASKALL is set in its MSI-X control; a reset clears it.
        reset(host, sbdf);
        quarantined = host.xen.assign(DOMID_IO, sbdf, true);
    }
    let word = if already { "already assignable" } else { "assignable" };
    match quarantined {
        Ok(()) => Ok(format!("{sbdf}: {word}")),
        Err(38 | 95) => {
            eprintln!(
                "xl-pciback: warning: {sbdf}: no IOMMU, so it is not in quarantine, and attach will refuse it; \
                 switch on VT-d or AMD-Vi in the firmware"
            );
            Ok(format!("{sbdf}: {word}"))
        }
        Err(number) => {
            let why = match number {
                16 => "MASKALL stays set in its MSI-X control",
                19 => "Xen does not know the function",
                _ => "Xen refuses the quarantine",
            };
            if !already {
                give_back(host, sbdf, true)?;
            }
            Err(Failure::new(
                format!("{sbdf} cannot be made assignable: {why}: {}", errno(number)),
                "see xl dmesg; a cold boot of the host may help a device that is stuck",
            ))
        }
    }
}

/// Makes a function assignable for the attachment that follows. What is not there is found before anything is taken from dom0.
///
/// # Errors
/// There is no such guest, no driver domain has the function, or as [`add`].
pub fn seize(host: &Host<'_>, guest: &str, sbdf: Sbdf, driver: Option<&str>) -> Outcome<()> {
    let (_, drivers) = host.domains.guest_and_drivers(guest)?;
    find_driver(drivers, sbdf, driver)?;
    if !host.sysfs.function(sbdf)?.is_assignable() {
        eprintln!("xl-pciback: {}", add(host, sbdf)?);
    }
    Ok(())
}

/// Keeps drivers off and takes the function from the one it has.
fn take(host: &Host<'_>, sbdf: Sbdf, driver: Option<&str>) -> Outcome<()> {
    host.sysfs.set(sbdf, "driver_override", NOBODY)?;
    // As its driver had set it, or the firmware.
    let set = host.sysfs.config_space(sbdf).map(|space| registers(&space)).unwrap_or_default();
    let noted = host
        .store
        .write(0, &nodes::record(sbdf, "driver"), driver.unwrap_or(""))
        .and_then(|()| host.store.write(0, &nodes::record(sbdf, "registers"), &set));
    if let Err(number) = noted {
        let _ = host.store.remove(0, nodes::record(sbdf, "").trim_end_matches('/'));
        host.sysfs.set(sbdf, "driver_override", "\n")?;
        return Err(Failure::new(
            format!("{sbdf}: xenstore refuses to remember its driver: {}", errno(number)),
            "see whether xenstored runs",
        ));
    }
    if driver.is_some()
        && let Err(failure) = host.sysfs.unbind(sbdf)
    {
        give_back(host, sbdf, false)?;
        return Err(failure);
    }
    Ok(())
}

/// Lets dom0's drivers have the function; with `rebind` they are told at once. Returns the former driver.
fn give_back(host: &Host<'_>, sbdf: Sbdf, rebind: bool) -> Outcome<Option<String>> {
    if host.sysfs.is_enabled(sbdf) && host.sysfs.function(sbdf)?.driver.is_none() {
        // It was enabled for its interrupt only; a driver enables it again.
        let _ = host.sysfs.set(sbdf, "enable", "0");
    }
    host.sysfs.set(sbdf, "driver_override", "\n")?;
    let driver = host.store.read(0, &nodes::record(sbdf, "driver")).filter(|driver| !driver.is_empty());
    let _ = host.store.remove(0, nodes::record(sbdf, "").trim_end_matches('/'));
    if rebind && driver.is_some() {
        host.sysfs.probe(sbdf)?;
    }
    Ok(driver)
}

/// Gives `sbdf` back to dom0.
///
/// # Errors
/// A guest has it, or somebody refuses.
pub fn remove(host: &Host<'_>, sbdf: Sbdf, rebind: bool) -> Outcome<String> {
    let function = host.sysfs.function(sbdf)?;
    if function.driver_override.as_deref() != Some(NOBODY) {
        return Err(Failure::new(format!("{sbdf} is not assignable"), "xl-pciback assignable-list shows what is"));
    }
    if let Some(guest) = attached_to(host, sbdf)? {
        return Err(Failure::new(
            format!("{sbdf} is attached to {guest}"),
            format!("xl-pciback detach GUEST {sbdf}, with --force if its driver domain is gone"),
        ));
    }
    match host.xen.deassign(DOMID_IO, sbdf) {
        // Not in quarantine, or no IOMMU: then it is dom0's already.
        Ok(()) | Err(3 | 19 | 22 | 38 | 95) => {}
        Err(number) => {
            return Err(Failure::new(
                format!("{sbdf} cannot be taken out of quarantine: {}", errno(number)),
                "see xl dmesg",
            ));
        }
    }
    // dom0's driver needs the addresses, too.
    if let Err(failure) = mend(host.sysfs, host.store, &function) {
        eprintln!("xl-pciback: warning: {}", failure.what);
    }
    let driver = give_back(host, sbdf, rebind)?;
    let now = host.sysfs.function(sbdf)?.driver;
    Ok(match (driver, now) {
        (_, Some(now)) => format!("{sbdf}: back in dom0, driver {now}"),
        (Some(driver), None) if rebind => format!("{sbdf}: back in dom0; its driver {driver} did not take it"),
        _ => format!("{sbdf}: back in dom0"),
    })
}

/// All functions that were made assignable.
pub fn list(host: &Host<'_>) -> Vec<String> {
    let functions = host.sysfs.functions().into_iter().filter_map(|sbdf| host.sysfs.function(sbdf).ok());
    functions
        .filter(|function| function.is_assignable())
        .map(|function| format!("{} {} irq {}", function.sbdf, function.id_text(), function.irq))
        .collect()
}
