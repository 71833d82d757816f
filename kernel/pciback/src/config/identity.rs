//! Who a function is. An ordinary one says it in its first two registers. A virtual function reads ffff there (SR-IOV
//! 1.1, 3.4.1.1 and 3.4.1.2), as an empty place does; only the physical function knows its ids, so they are
//! configured (`id=`), and what answers is told from what is missing by the class register.

use super::Refusal;
use super::registers::{NO_VENDOR, RETRY_VENDOR, offset};
use crate::platform::{ConfigSpace, Width};

/// The ids of a function, and how it shows that it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    vendor: u16,
    device: u16,
    /// Revision and class of a virtual function.
    class: Option<u32>,
}

impl Identity {
    /// Reads who answers. `given` are the ids that a virtual function has.
    ///
    /// # Errors
    /// [`Refusal::NoAnswer`], [`Refusal::NotYet`], or [`Refusal::Nameless`] for a virtual function of which nobody has
    /// said the ids.
    pub fn read<C: ConfigSpace>(hardware: &C, given: Option<(u16, u16)>) -> Result<Identity, Refusal> {
        match (ids(hardware), given) {
            ((NO_VENDOR, _), _) => {
                let class = class_of_virtual(hardware)?;
                let (vendor, device) = given.ok_or(Refusal::Nameless)?;
                Ok(Identity { vendor, device, class: Some(class) })
            }
            ((RETRY_VENDOR, u16::MAX), _) => Err(Refusal::NotYet),
            ((vendor, device), _) => Ok(Identity { vendor, device, class: None }),
        }
    }

    /// Vendor and device id.
    pub const fn ids(&self) -> (u16, u16) {
        (self.vendor, self.device)
    }

    /// Whether it is a virtual function: its base address registers, its decode bits and its interrupt pin do not
    /// exist (SR-IOV 1.1, 3.4.1).
    pub const fn is_virtual(&self) -> bool {
        self.class.is_some()
    }

    /// Looks whether this function answers.
    ///
    /// # Errors
    /// [`Refusal::NoAnswer`], [`Refusal::NotYet`] or [`Refusal::Replaced`].
    pub fn check<C: ConfigSpace>(&self, hardware: &C) -> Result<(), Refusal> {
        let same = match (ids(hardware), self.class) {
            ((RETRY_VENDOR, u16::MAX), _) => return Err(Refusal::NotYet),
            ((NO_VENDOR, _), Some(class)) => class_of_virtual(hardware)? == class,
            ((NO_VENDOR, _), None) => return Err(Refusal::NoAnswer),
            (found, None) => found == self.ids(),
            (_, Some(_)) => false,
        };
        if same { Ok(()) } else { Err(Refusal::Replaced) }
    }
}

fn ids<C: ConfigSpace>(hardware: &C) -> (u16, u16) {
    let vendor = hardware.read(offset::VENDOR, Width::Word) as u16;
    let device = hardware.read(offset::DEVICE, Width::Word) as u16;
    (vendor, device)
}

/// Revision and class of what has no ids: all ones where nothing is.
fn class_of_virtual<C: ConfigSpace>(hardware: &C) -> Result<u32, Refusal> {
    match hardware.read(offset::CLASS, Width::Dword) {
        u32::MAX => Err(Refusal::NoAnswer),
        class => Ok(class),
    }
}
