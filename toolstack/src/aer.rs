//! Reports of errors to driver domains. Linux tells the driver of a function that the bus has reported an error of it; a
//! function that was made assignable has none in dom0, so its driver domain is told instead, and that one tells the guest.

use std::time::Duration;

use pciback::aer::Severity;
use pciback::sbdf::Sbdf;

use crate::attach::{Host, find_driver};
use crate::domains::Driver;
use crate::error::{Failure, Outcome, errno};
use crate::nodes::{self, told};
use crate::xen::{self, transaction};

/// The word for "look yourself how bad it is".
pub const AUTO: &str = "auto";

/// How long the guest may take for the whole recovery: four steps of 300 seconds, and a little.
pub const RECOVERY: Duration = Duration::from_secs(4 * 300 + 30);

/// The severity that a word of the command line names, as the driver domain takes it.
///
/// # Errors
/// It is none.
pub fn severity(word: &str) -> Outcome<&'static str> {
    if word == AUTO {
        return Ok(AUTO);
    }
    Severity::parse(word)
        .map(Severity::word)
        .ok_or_else(|| Failure::usage(format!("{word:?} is not auto, nonfatal, fatal or permanent")))
}

/// Reports an error of `sbdf` and waits for what comes of it.
///
/// # Errors
/// The driver domain does not answer, or the function was not recovered.
pub fn report(host: &Host<'_>, sbdf: Sbdf, severity: &str, patience: Duration) -> Outcome<String> {
    let driver = find_driver(host.domains.drivers()?, sbdf, None)?;
    announce(host, &driver, sbdf, severity)?;
    let node = nodes::published(driver.domid, sbdf, "aer");
    let mut said = false;
    let fate = host.wait(patience, || {
        let fate = told(host.store, &node).filter(|text| !is_open(text));
        if fate.is_none() && !said {
            eprintln!("xl-pciback: {sbdf}: waiting for its guest's driver");
            said = true;
        }
        fate
    });
    match fate {
        Some(fate) => outcome(host, &driver, sbdf, &fate),
        None if xen::interrupted() => Err(Failure::new(
            format!("interrupted; {sbdf} is still being recovered"),
            format!("xl-pciback status {sbdf} tells what comes of it"),
        )),
        None => Err(Failure::new(
            format!("driver domain {:?} does not say what became of {sbdf}", driver.name),
            format!("see xl console {}", driver.name),
        )),
    }
}

/// Tells the driver domain, and waits until it has taken it up.
///
/// # Errors
/// It does not.
pub fn announce(host: &Host<'_>, driver: &Driver, sbdf: Sbdf, severity: &str) -> Outcome<()> {
    let node = nodes::own(driver.domid, "aer");
    let wish = format!("{} {severity}", pciback::nodes::folder(sbdf));
    let refused = |number: i32| {
        Failure::new(format!("{sbdf}: xenstore refuses the report: {}", errno(number)), "see whether xenstored runs")
    };
    // The node holds one report. Another one that stands there is another program's, and soon taken up.
    let written = host.wait(host.patience / 3, || {
        let placed = transaction(host.store, |tx| {
            let free = host.store.read(tx, &node).is_none_or(|other| other.is_empty());
            if free { host.store.write(tx, &node, &wish).map(|()| true) } else { Ok(false) }
        });
        match placed {
            Ok(false) => None,
            Ok(true) => Some(Ok(())),
            Err(number) => Some(Err(refused(number))),
        }
    });
    if let Some(Err(failure)) = written {
        return Err(failure);
    }
    let seen = || host.store.read(0, &node).is_some_and(|wish| wish.is_empty()).then_some(());
    if written.is_some() && host.wait(host.patience / 3, seen).is_some() {
        return Ok(());
    }
    // A report is not left behind: the next driver domain of this number would take it up.
    let _ = transaction(host.store, |tx| match host.store.read(tx, &node) {
        Some(standing) if standing == wish => host.store.remove(tx, &node),
        _ => Ok(()),
    });
    Err(Failure::new(
        format!("driver domain {:?} does not take up the report about {sbdf}", driver.name),
        format!("see xl console {}; use image and tool of the same version", driver.name),
    ))
}

/// Whether the recovery that a driver domain speaks of is not over.
pub fn is_open(fate: &str) -> bool {
    fate.ends_with(": recovering")
}

/// What came of a report, from the driver domain's words.
fn outcome(host: &Host<'_>, driver: &Driver, sbdf: Sbdf, fate: &str) -> Outcome<String> {
    let done = fate.split_once(": ").map(|(_, rest)| rest);
    if done.is_some_and(|rest| rest == "recovered" || rest.starts_with("reset: ")) {
        return Ok(format!("{sbdf}: {fate}"));
    }
    let guest = crate::rights::holder(host, sbdf).map(|domid| nodes::name_of(host.store, domid));
    Err(Failure::new(
        format!("{sbdf}: driver domain {:?} says {fate:?}", driver.name),
        match guest {
            Some(guest) => format!("xl-pciback detach {guest} {sbdf}, which resets it, then attach it again"),
            None => format!("xl-pciback status {sbdf}"),
        },
    ))
}

/// The device of which dom0's kernel tells by this event that it has done what it could about an error: the address of a
/// function, or of the bridge above those concerned. Only the end counts: before it a reset of the link may be under way.
pub fn concerned(event: &[String]) -> Option<&str> {
    let value = |key: &str| event.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let over = matches!(value("ERROR_EVENT"), Some("FAILED_RECOVERY" | "SUCCESSFUL_RECOVERY"));
    value("PCI_SLOT_NAME").filter(|_| over && value("SUBSYSTEM") == Some("pci"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Vec<String> {
        text.split(' ').map(String::from).collect()
    }

    /// As Linux 6.1 sends them.
    #[test]
    fn the_end_of_a_recovery_names_its_device_and_no_other_event_does() {
        let head = "change@/devices/pci0000:00/0000:00:03.0 ACTION=change DEVPATH=/devices/pci0000:00/0000:00:03.0 SUBSYSTEM=pci";
        let tail = "DRIVER=pcieport PCI_CLASS=60400 PCI_ID=1B36:000C PCI_SLOT_NAME=0000:00:03.0 SEQNUM=1902";
        let told = |middle: &str| concerned(&event(&format!("{head} {middle} {tail}"))).map(String::from);
        assert_eq!(told("ERROR_EVENT=FAILED_RECOVERY DEVICE_ONLINE=0").as_deref(), Some("0000:00:03.0"));
        assert_eq!(told("ERROR_EVENT=SUCCESSFUL_RECOVERY DEVICE_ONLINE=1").as_deref(), Some("0000:00:03.0"));
        assert_eq!(told("ERROR_EVENT=BEGIN_RECOVERY DEVICE_ONLINE=0"), None, "the link may be being reset");
        assert_eq!(told("DEVICE_ONLINE=0"), None);
        assert_eq!(concerned(&event("ERROR_EVENT=FAILED_RECOVERY SUBSYSTEM=net PCI_SLOT_NAME=0000:00:03.0")), None);
        assert_eq!(concerned(&[]), None);
    }
}
