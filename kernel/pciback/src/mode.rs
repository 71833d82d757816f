//! Which mode is in force: what this domain may do on this host, and how that was found out.
//!
//! On an unmodified Xen a write to an ECAM frame ends the domain, so nothing is tried by writing. Where Xen has
//! the config-owner change (`boot/xen`), it carries out prepare_msix for a function whose frame the domain was
//! given; an unmodified Xen answers -ENOSYS, and for a function that is not the domain's the change answers -EPERM.

use alloc::format;
use alloc::string::{String, ToString};

use crate::cmdline::Mode;
use crate::device::{Answer, Device};
use crate::handover::Reach;
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, Nanos};

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
            Some(Reach::Hardware) => "mmcfg0",
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
        Mode::Auto => ask(devices, physdev, now),
    }
}

/// Asks Xen for each function.
fn ask<C: ConfigSpace, P: Physdev>(devices: &mut [Device<C>], physdev: &mut P, now: Nanos) -> InForce {
    let mut direct = None;
    let mut refused = None;
    for device in devices {
        let sbdf = device.entry.sbdf;
        let seized = device.ids().is_some();
        match device.ask(physdev) {
            Answer::Yes => {
                direct.get_or_insert(sbdf);
                device.control(Reach::Direct, None, physdev, now);
            }
            Answer::InUse(dirty) => {
                direct.get_or_insert(sbdf);
                device.control(Reach::Direct, Some(dirty), physdev, now);
            }
            Answer::No(PhysdevError::NotImplemented) => {
                refused.get_or_insert((sbdf, PhysdevError::NotImplemented));
            }
            // The change is there, and says whose function it is not.
            Answer::No(error @ PhysdevError::NotPermitted) => {
                refused.get_or_insert((sbdf, error));
                device.refuse(format!(
                    "Xen answers {error} to physdev calls for it: this domain is not its config owner; add its ECAM \
                     frame to iomem= (xl-pciback config prints it)"
                ));
            }
            Answer::No(error) => {
                refused.get_or_insert((sbdf, error));
                if seized {
                    device.refuse(format!("Xen answers {error} to physdev calls for it; see xl dmesg"));
                }
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
        (None, Some((sbdf, error))) => InForce {
            reach: None,
            why: format!(
                "Xen answered {error} when asked for {sbdf}: it has no config-owner change, and a configuration write would \
                 end this domain, so guests' configuration writes are refused; boot a Xen with the change (boot/xen), or \
                 boot Xen with mmcfg=0 and say mode=mmcfg0"
            ),
        },
        (None, None) => InForce { reach: None, why: "there is no function to ask Xen for".to_string() },
    }
}
