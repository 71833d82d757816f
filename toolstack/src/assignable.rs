//! Taking functions from dom0 and giving them back.

use pciback::sbdf::Sbdf;

use crate::attach::{Host, quarantine};
use crate::detach::attached_to;
use crate::error::{Failure, Outcome, errno};
use crate::nodes::DOMID_IO;
use crate::sysfs::NOBODY;

/// Where the driver a function had in dom0 is remembered.
fn memory(sbdf: Sbdf) -> String {
    format!("/pciback/assignable/{}/driver", sbdf.to_string().replace([':', '.'], "-"))
}

/// Takes `sbdf` from its dom0 driver, keeps others off, has its interrupt routed, and quarantines it.
///
/// # Errors
/// It is no ordinary function, or somebody refuses.
pub fn add(host: &Host<'_>, sbdf: Sbdf) -> Outcome<String> {
    let function = host.sysfs.function(sbdf)?;
    if function.header_type != 0 {
        return Err(Failure::new(
            format!("{sbdf} is a bridge (header type {})", function.header_type),
            "pass through the functions behind it, not the bridge",
        ));
    }
    if function.driver.as_deref() == Some("pciback") {
        return Err(Failure::new(
            format!("{sbdf} is held by Linux's xen-pciback in dom0"),
            format!("xl pci-assignable-remove {sbdf}, then try again"),
        ));
    }
    if function.is_assignable() {
        return Ok(format!("{sbdf}: already assignable"));
    }
    host.sysfs.set(sbdf, "driver_override", NOBODY)?;
    if let Some(driver) = &function.driver {
        let remembered = host.store.write(0, &memory(sbdf), driver);
        if let Err(number) = remembered {
            eprintln!("xl-pciback: warning: {sbdf}: its driver {driver:?} is not remembered: {}", errno(number));
        }
        if let Err(failure) = host.sysfs.unbind(sbdf) {
            // Nothing changed yet but the override.
            host.sysfs.set(sbdf, "driver_override", "\n")?;
            return Err(failure);
        }
    }
    // Enabling it has dom0 route the interrupt; from then on sysfs `irq` is the GSI.
    if let Err(failure) = host.sysfs.set(sbdf, "enable", "1") {
        eprintln!("xl-pciback: warning: {}; its line interrupt may not work", failure.what);
    }
    match quarantine(host, sbdf) {
        Ok(()) => Ok(format!("{sbdf}: assignable")),
        Err(number) => Err(Failure::new(
            format!("{sbdf} was taken from dom0 but cannot be quarantined: {}", errno(number)),
            format!("see xl dmesg; xl-pciback assignable-remove {sbdf} gives it back"),
        )),
    }
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
    if let Some(guest) = attached_to(host.store, sbdf) {
        return Err(Failure::new(
            format!("{sbdf} is attached to domain {guest}"),
            format!("xl-pciback detach {guest} {sbdf}"),
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
    if host.sysfs.has(sbdf, "enable") {
        // It was enabled for its interrupt only; a driver enables it again.
        let _ = host.sysfs.set(sbdf, "enable", "0");
    }
    host.sysfs.set(sbdf, "driver_override", "\n")?;
    let driver = host.store.read(0, &memory(sbdf));
    let _ = host.store.remove(0, memory(sbdf).trim_end_matches("/driver"));
    if rebind && let Some(driver) = driver {
        host.sysfs.probe(sbdf)?;
        let now = host.sysfs.function(sbdf)?.driver;
        return Ok(match now {
            Some(now) => format!("{sbdf}: back in dom0, driver {now}"),
            None => format!("{sbdf}: back in dom0; its driver {driver} did not take it"),
        });
    }
    Ok(format!("{sbdf}: back in dom0"))
}

/// All functions that were made assignable.
pub fn list(host: &Host<'_>) -> Vec<String> {
    let functions = host.sysfs.functions().into_iter().filter_map(|sbdf| host.sysfs.function(sbdf).ok());
    functions
        .filter(|function| function.is_assignable())
        .map(|function| format!("{} {} irq {}", function.sbdf, function.id_text(), function.irq))
        .collect()
}
