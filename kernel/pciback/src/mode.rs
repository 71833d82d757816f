//! Which mode is in force: what this domain may do on this host, and how that was found out.
//!
//! On an unmodified Xen a write to an ECAM frame ends the domain, so nothing is tried by writing. Where Xen has
//! the config-owner change (`boot/xen`), it carries out prepare_msix for a function whose frame the domain was
//! given; an unmodified Xen answers -ENOSYS, and for a function that is not the domain's the change answers -EPERM.
//! Where the domain may not, dom0's tool does it, once it is there ([`crate::delegate`]): until then guests read.

use alloc::format;
use alloc::string::{String, ToString};

use crate::cmdline::Mode;
use crate::device::{Answer, Device};
use crate::handover::Reach;
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, Nanos};
use crate::sbdf::Sbdf;

/// The mode in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InForce {
    /// How far the domain can go; `None`: it reads, and serves interrupt pins.
    pub reach: Option<Reach>,
    /// Why.
    pub why: String,
}

impl InForce {
    /// The word that is published.
    pub const fn word(&self) -> &'static str {
        match self.reach {
            Some(Reach::Direct) => "direct",
            Some(Reach::Delegated) => "delegated",
            Some(Reach::Split | Reach::Hardware) => "mmcfg0",
            None => "read-only",
        }
    }
}

/// Finds the mode, and takes control of the functions as it allows.
pub fn settle<C: ConfigSpace, P: Physdev>(
    wish: Mode,
    devices: &mut [Device<C>],
    physdev: &mut P,
    now: Nanos,
) -> InForce {
    match wish {
        Mode::Mmcfg0 => {
            for device in devices {
                device.control(Reach::Hardware, None, physdev, now);
            }
            InForce {
                reach: Some(Reach::Hardware),
                why: "the command line says that Xen was booted with mmcfg=0, so configuration writes go to the ECAM \
                      frames; Xen sees none of them, so guests get no MSI and no MSI-X"
                    .to_string(),
            }
        }
        Mode::ReadOnly => InForce {
            reach: None,
            why: "the command line says mode=read-only: guests' configuration writes are refused".to_string(),
        },
        Mode::Auto => ask_for_all(devices, physdev, now),
    }
}

/// dom0's tool has connected: what only dom0 may do is asked of it from now on, unless this domain may do it itself or
/// is not to write at all. Functions that a guest has without dom0 stay as they are until it gives them back.
///
/// # Errors
/// [`PhysdevError::NotConnected`]: it has gone again.
pub fn engage<C: ConfigSpace, P: Physdev>(
    wish: Mode,
    force: &mut InForce,
    devices: &mut [Device<C>],
    physdev: &mut P,
    now: Nanos,
) -> Result<(), PhysdevError> {
    let reach = match (wish, force.reach) {
        (Mode::ReadOnly, _) | (_, Some(Reach::Direct)) => return Ok(()),
        (Mode::Auto, _) => Reach::Delegated,
        (Mode::Mmcfg0, _) => Reach::Split,
    };
    let why = match reach {
        Reach::Split => {
            "the command line says that Xen was booted with mmcfg=0, so configuration writes go to the ECAM frames; those \
             that Xen must see, and the mapping of MSI and MSI-X, are carried out by xl-pciback serve in dom0"
        }
        _ => {
            "Xen lets only dom0 write configuration space and map MSI and MSI-X: xl-pciback serve in dom0 carries that out \
             for this domain"
        }
    };
    *force = InForce { reach: Some(reach), why: why.to_string() };
    physdev.use_dom0();
    for device in devices {
        match device.reconnected(physdev, now) {
            Ok(()) => take(reach, device, physdev, now)?,
            Err(PhysdevError::NotConnected) => return Err(PhysdevError::NotConnected),
            Err(error) => device.refuse_unless_used(not_listed(error)),
        }
    }
    Ok(())
}

/// Takes control of a function that nobody has, as far as the mode in force allows and it was not done.
///
/// # Errors
/// [`PhysdevError::NotConnected`].
pub fn take<C: ConfigSpace, P: Physdev>(
    reach: Reach,
    device: &mut Device<C>,
    physdev: &mut P,
    now: Nanos,
) -> Result<(), PhysdevError> {
    let wanting = device.is_uncontrolled() || device.lacks_dom0();
    if !reach.needs_dom0() || !wanting {
        return Ok(());
    }
    match ask(reach, device, physdev, now) {
        Err(PhysdevError::NotConnected) => Err(PhysdevError::NotConnected),
        _ => Ok(()),
    }
}

/// Takes a function into the mode in force that was not in its place, or refused, when the mode was settled. True if
/// there is something new to say of it.
pub fn admit<C: ConfigSpace, P: Physdev>(
    reach: Option<Reach>,
    device: &mut Device<C>,
    physdev: &mut P,
    now: Nanos,
) -> bool {
    let known = device.recognise();
    match reach {
        Some(Reach::Hardware) if known => {
            device.control(Reach::Hardware, None, physdev, now);
            true
        }
        Some(reach) if reach.has_physdev() && (known || device.is_refused()) => {
            let _ = ask(reach, device, physdev, now);
            true
        }
        _ => known,
    }
}

fn not_listed(error: PhysdevError) -> String {
    format!("xl-pciback serve in dom0 answers {error} for it: see its log (journalctl -u xl-pciback)")
}

/// Asks Xen, or dom0, for a function, and takes control of it or refuses it.
fn ask<C: ConfigSpace, P: Physdev>(
    reach: Reach,
    device: &mut Device<C>,
    physdev: &mut P,
    now: Nanos,
) -> Result<(), PhysdevError> {
    match device.ask(physdev) {
        Answer::Yes => device.control(reach, None, physdev, now),
        Answer::InUse(dirty) => device.control(reach, Some(dirty), physdev, now),
        Answer::No(error) => {
            match error {
                PhysdevError::NotConnected => {}
                PhysdevError::NotImplemented if reach == Reach::Direct => {}
                // The change is there, and says whose function it is not: that is also why its frame reads as if no device
                // were there.
                PhysdevError::NotPermitted if reach == Reach::Direct => device.refuse(format!(
                    "Xen answers {error} to physdev calls for it: this domain is not its config owner; add its ECAM \
                     frame to iomem= (xl-pciback config prints it)"
                )),
                // What is wrong with one that was not recognised is told already.
                _ if device.peek().is_none() => {}
                _ if reach.needs_dom0() => device.refuse(not_listed(error)),
                _ => device.refuse(format!("Xen answers {error} to physdev calls for it; see xl dmesg")),
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Asks Xen for each function.
fn ask_for_all<C: ConfigSpace, P: Physdev>(devices: &mut [Device<C>], physdev: &mut P, now: Nanos) -> InForce {
    let mut direct = None;
    let mut refused = None;
    for device in devices {
        let sbdf = device.entry.sbdf;
        match ask(Reach::Direct, device, physdev, now) {
            Ok(()) => {
                direct.get_or_insert(sbdf);
            }
            Err(error) => {
                refused.get_or_insert((sbdf, error));
            }
        }
    }
    match (direct, refused) {
        (Some(sbdf), _) => InForce {
            reach: Some(Reach::Direct),
            why: format!(
                "Xen takes this domain's own physdev calls (asked with prepare_msix or restore_msi for {sbdf}), so it has \
                 the config-owner change: configuration writes go to the ECAM frames through Xen's checks, and this \
                 domain maps MSI and MSI-X itself"
            ),
        },
        (None, Some((sbdf, error))) => InForce { reach: None, why: refusal(sbdf, error) },
        (None, None) => InForce { reach: None, why: "there is no function to ask Xen for".to_string() },
    }
}

/// Why no function may be written to, by what Xen answered for the first.
fn refusal(sbdf: Sbdf, error: PhysdevError) -> String {
    let (means, remedy) = match error {
        PhysdevError::NotImplemented => (
            "it has no config-owner change, and a configuration write would end this domain",
            "start xl-pciback serve in dom0, which carries them out (or boot a Xen with the change, boot/xen)",
        ),
        PhysdevError::NotPermitted => (
            "it has the config-owner change, and this domain is the config owner of none of its functions",
            "add their ECAM frames to iomem= (xl-pciback config prints them)",
        ),
        _ => ("whether this domain may write is not known", "see xl dmesg"),
    };
    format!(
        "Xen answered {error} when asked for {sbdf}: {means}, so guests' configuration writes are refused; {remedy}"
    )
}
