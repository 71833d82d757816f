//! MSI and MSI-X of one function: what is on, what Xen has mapped for which guest, and the operations that
//! change it. Wire semantics: `xen/io/pciif.h` and Linux's xen-pciback (`pciback_ops.c`); order of the steps:
//! docs/msix.md.
//!
//! Everything is checked before anything is touched. Enabling is all or nothing. Either disable operation turns
//! off whatever is on: Linux guests from 5.17 give up MSI-X with disable_msi.

use alloc::vec::Vec;
use core::fmt;

use crate::config::registers::{command, offset, power};
use crate::config::{Msi, Msix, VirtualConfig, msi_control, msix_control};
use crate::msix_state::{self, Clean, Dirty};
use crate::physdev::{Physdev, PhysdevError, Pirq, Vector};
use crate::platform::{ConfigSpace, DomId, Nanos, Width};
use crate::sbdf::Sbdf;
use crate::wire::{MAX_VECTORS, MsixEntry};

/// How long mapping the vectors of one request may take; undoing takes about as long. The client waits for 2
/// seconds and then takes the request for failed.
const MAPPING: Nanos = 900_000_000;

/// Most vectors of plain MSI.
const MAX_MSI: u32 = 32;

/// Which kind of interrupt a function uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its interrupt pin, or none.
    Line,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
}

impl Kind {
    /// Its name.
    pub const fn word(self) -> &'static str {
        match self {
            Kind::Line => "INTx",
            Kind::Msi => "MSI",
            Kind::Msix => "MSI-X",
        }
    }
}

/// Why interrupts could not be enabled. Nothing is left enabled or mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnableError {
    /// The function lacks the capability, or this host or the command line does not allow its use.
    NotOffered,
    /// A count or an entry of the request cannot be.
    BadRequest,
    /// The function has fewer vectors than asked for: this many.
    TooMany(u16),
    /// MSI-X is on already.
    AlreadyOn,
    /// The other kind is on.
    OtherOn,
    /// Memory decode is off, or the function is asleep or does not answer.
    NotNow,
    /// Vectors of an earlier guest could not be unmapped.
    Leftover,
    /// Xen did not map the vector of this entry.
    Map(u16, PhysdevError),
    /// Xen answered with a pirq that the protocol has no room for.
    BadPirq(Pirq),
    /// It took longer than the client waits.
    TooLate,
    /// The function did not take the setting: its Message Control reads this.
    NotTaken(u16),
}

impl EnableError {
    /// `op.err` for enable_msix: the numbers Linux's backend answers with, and its operation-failed (-5) where
    /// Xen or the function is to blame. pcifront hands the number to the driver, which then asks for less.
    pub const fn msix_code(self) -> i32 {
        match self {
            EnableError::NotOffered => -4,
            EnableError::BadRequest => -22,
            EnableError::TooMany(_) | EnableError::Map(_, PhysdevError::NoPirq) => -28,
            EnableError::AlreadyOn => -114,
            EnableError::OtherOn | EnableError::NotNow => -6,
            EnableError::Map(_, PhysdevError::NoMemory) => -12,
            EnableError::Leftover
            | EnableError::Map(..)
            | EnableError::BadPirq(_)
            | EnableError::TooLate
            | EnableError::NotTaken(_) => -5,
        }
    }
}

impl fmt::Display for EnableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EnableError::NotOffered => f.write_str("it is not offered"),
            EnableError::BadRequest => f.write_str("its count or an entry cannot be"),
            EnableError::TooMany(vectors) => write!(f, "the function has {vectors} vectors"),
            EnableError::AlreadyOn => f.write_str("MSI-X is on already"),
            EnableError::OtherOn => f.write_str("the other kind of message interrupt is on"),
            EnableError::NotNow => f.write_str("its memory decode is off, or it is not in D0"),
            EnableError::Leftover => f.write_str("vectors of before are still mapped"),
            EnableError::Map(entry, error @ PhysdevError::NoPirq) => write!(
                f,
                "map_pirq of vector {entry} answered {error}: the guest has no free pirq; raise extra_guest_irqs on Xen's \
                 command line"
            ),
            EnableError::Map(entry, error) => write!(f, "map_pirq of vector {entry} answered {error}; see xl dmesg"),
            EnableError::BadPirq(pirq) => write!(f, "Xen answered with pirq {pirq}"),
            EnableError::TooLate => f.write_str("it took too long"),
            EnableError::NotTaken(control) => write!(f, "Message Control reads {control:04x} after it"),
        }
    }
}

/// What an operation works on, besides the function itself.
pub struct Means<'a, C, P> {
    /// The function's registers.
    pub hardware: &'a mut C,
    /// Xen.
    pub physdev: &'a mut P,
    /// The function.
    pub sbdf: Sbdf,
    /// Whether its interrupt pin is to work while no message interrupt is on.
    pub line: bool,
}

/// The interrupts of one function.
#[derive(Debug)]
pub struct Interrupts {
    msi: Option<Msi>,
    msix: Option<Msix>,
    /// Whether guests may use MSI, and MSI-X.
    offered: (bool, bool),
    /// Xen has the MSI-X table under its protection.
    taken: bool,
    /// Xen cannot set up MSI-X: what it answered. The function is served without.
    forgone: Option<PhysdevError>,
    /// Offset of PMCSR.
    power: Option<u16>,
    /// Its memory decode is the physical function's, where Xen looks for it.
    is_virtual: bool,
    kind: Kind,
    /// Vectors were mapped for a domain that no call finds any more. Xen frees them itself, but later: RCU.
    orphaned: bool,
    /// What is on is to go off, and dom0 could not be reached for it.
    unfinished: bool,
    /// Xen's memory was found stale on the way, and has been renewed.
    was_stale: bool,
    /// Who has what is mapped.
    guest: DomId,
    /// What Xen has mapped: the first pirq of MSI, or one an entry of MSI-X. Room for all is made once.
    pirqs: Vec<Pirq>,
    /// Vectors in use.
    vectors: u16,
}

impl Interrupts {
    /// The interrupts of a function. None is offered to guests yet.
    pub fn new<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Interrupts {
        let (msi, msix) = (config.msi(hardware), config.msix(hardware));
        let room = usize::from(msix.map_or(u16::from(msi.is_some()), |msix| msix.entries)).min(MAX_VECTORS);
        Interrupts {
            msi,
            msix,
            offered: (false, false),
            taken: false,
            forgone: None,
            power: config.power_control(),
            is_virtual: config.identity().is_virtual(),
            kind: Kind::Line,
            orphaned: false,
            unfinished: false,
            was_stale: false,
            guest: 0,
            pirqs: Vec::with_capacity(room),
            vectors: 0,
        }
    }

    /// Lets guests use MSI and MSI-X, as far as the function has them.
    pub fn offer(&mut self, msi: bool, msix: bool) {
        self.offered = (msi, msix);
    }

    /// Has Xen take the MSI-X table under its protection, if that was not done or was undone.
    ///
    /// # Errors
    /// What [`msix_state::take`] found.
    pub fn take<P: Physdev>(&mut self, physdev: &mut P, sbdf: Sbdf) -> Result<(), Dirty> {
        if self.msix.is_some() && !self.taken {
            msix_state::take(physdev, sbdf)?;
            self.taken = true;
        }
        Ok(())
    }

    /// Makes sure that nobody whom this domain does not know uses MSI. Xen counts its vectors for nobody to ask, but
    /// clears the enable bit with the last.
    ///
    /// # Errors
    /// [`Dirty::MsiOn`].
    pub fn check_msi<C: ConfigSpace>(&self, hardware: &C) -> Result<(), Dirty> {
        let control = self.msi.map_or(0, |msi| hardware.read(msi.control(), Width::Word) as u16);
        let on = control & msi_control::ENABLE != 0 && control != u16::MAX;
        if on && !self.is_mapped() { Err(Dirty::MsiOn) } else { Ok(()) }
    }

    /// Gives the MSI-X table back to Xen: this domain is done with the function.
    pub fn give_back<P: Physdev>(&mut self, physdev: &mut P, sbdf: Sbdf) {
        if core::mem::take(&mut self.taken)
            && let Err(error) = physdev.release_msix(sbdf)
        {
            log::warn!("{sbdf}: release_msix answered {error}");
        }
    }

    /// Makes sure that message interrupts are off and will arrive once they are on: see [`msix_state`]. No vector may
    /// be mapped.
    ///
    /// # Errors
    /// Why they would not.
    pub fn clean<C: ConfigSpace, P: Physdev>(
        &mut self,
        hardware: &mut C,
        physdev: &mut P,
        sbdf: Sbdf,
    ) -> Result<Clean, Dirty> {
        if let (Some(msi), Err(_)) = (self.msi, self.check_msi(hardware)) {
            // It could not be turned off when that was due: the function did not answer.
            set_control(hardware, msi.control(), 0, msi_control::ENABLE);
            self.check_msi(hardware)?;
        }
        let Some(msix) = self.msix else { return Ok(Clean::Already) };
        self.take(physdev, sbdf)?;
        let outcome = msix_state::clean(hardware, physdev, sbdf, &msix);
        self.taken = outcome.is_ok();
        if self.taken && self.forgone.take().is_some() {
            log::info!("{sbdf}: Xen can set up its MSI-X again");
        }
        match outcome {
            Ok(Clean::Already) if core::mem::take(&mut self.was_stale) => Ok(Clean::Reset),
            Ok(_) => {
                self.was_stale = false;
                outcome
            }
            Err(_) => outcome,
        }
    }

    /// Does without MSI-X, which Xen answered that it cannot set up. Only while MSI-X is off and nothing masks it: with
    /// MASKALL set, Xen assigns the function to nobody. It is looked at and not written: after a failed prepare_msix Xen sets
    /// MASKALL with every write.
    ///
    /// # Errors
    /// What Xen answered, where it is not so.
    pub fn forgo<C: ConfigSpace>(&mut self, hardware: &C, sbdf: Sbdf, error: PhysdevError) -> Result<(), Dirty> {
        let control = self.msix.map_or(u16::MAX, |msix| hardware.read(msix.control(), Width::Word) as u16);
        if control & (msix_control::ENABLE | msix_control::MASKALL) != 0 {
            return Err(Dirty::Prepare(error));
        }
        self.taken = false;
        if self.forgone.replace(error) != Some(error) {
            log::warn!("{sbdf}: it is served without MSI-X, as Xen cannot set that up: prepare_msix answered {error}");
        }
        Ok(())
    }

    /// Why there is no MSI-X, if Xen cannot set it up.
    pub fn forgone(&self) -> Option<PhysdevError> {
        self.forgone
    }

    /// Whether Xen is done with the vectors of a domain that is gone. Of MSI-X it is asked (release_msix is busy
    /// until then); of MSI it can't be, and its vectors have nothing that a reset could tear from Xen's hands. With the
    /// asking Xen forgets what it remembers, so that is looked for before: Message Control was written clear.
    pub fn is_settled<C: ConfigSpace, P: Physdev>(&mut self, hardware: &C, physdev: &mut P, sbdf: Sbdf) -> bool {
        if self.orphaned && self.taken {
            let control = self.msix.map_or(0, |msix| hardware.read(msix.control(), Width::Word) as u16);
            self.was_stale |= control & msix_control::MASKALL != 0 && control != u16::MAX;
            let renewed = msix_state::renew(physdev, sbdf);
            if renewed == Err(Dirty::Release(PhysdevError::Busy)) {
                return false;
            }
            // What else failed, the check before the next exposure finds.
            self.taken = renewed.is_ok();
        }
        self.orphaned = false;
        true
    }

    /// What is on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is on, and with how many vectors: as it is published.
    pub fn in_use(&self) -> (Kind, u16) {
        (self.kind, self.vectors)
    }

    /// Whether Xen has vectors of this function mapped for a guest.
    pub fn is_mapped(&self) -> bool {
        !self.pirqs.is_empty()
    }

    /// Offsets of the Message Control registers.
    pub fn controls(&self) -> [Option<u16>; 2] {
        [self.msi.map(|msi| msi.control()), self.msix.map(|msix| msix.control())]
    }

    /// The MSI-X capability.
    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    /// The pirqs, in the order of the request that mapped them.
    pub fn pirqs(&self) -> &[Pirq] {
        &self.pirqs
    }

    /// Turns MSI on with `count` vectors and returns the (first) pirq.
    ///
    /// # Errors
    /// Why not.
    pub fn enable_msi<C: ConfigSpace, P: Physdev>(
        &mut self,
        means: &mut Means<'_, C, P>,
        guest: DomId,
        count: u32,
    ) -> Result<Pirq, EnableError> {
        let msi = self.msi.filter(|_| self.offered.0).ok_or(EnableError::NotOffered)?;
        if count == 0 || count > MAX_MSI {
            return Err(EnableError::BadRequest);
        }
        self.finish(means);
        // The function counts its vectors in powers of two.
        let count = count.next_power_of_two() as u8;
        if count > msi.vectors {
            return Err(EnableError::TooMany(u16::from(msi.vectors)));
        }
        match self.kind {
            Kind::Line => {}
            Kind::Msi | Kind::Msix => return Err(EnableError::OtherOn),
        }
        self.check_state(means.hardware, false)?;

        // Xen writes address, data and the number of vectors, and leaves MSI off.
        let vector = if count == 1 { Vector::Msi } else { Vector::MultiMsi { count } };
        let pirq = match means.physdev.map(guest, means.sbdf, vector) {
            Ok(pirq) => pirq,
            Err(error) => {
                // Where it fails late, Xen has taken its vector back, and with that turned the pin on.
                set_line(means.hardware, means.line);
                return Err(EnableError::Map(u16::from(count), error));
            }
        };
        self.guest = guest;
        self.pirqs.push(pirq);
        self.kind = Kind::Msi;
        self.vectors = u16::from(count);
        // A guest reads 0 and below as an error.
        let outcome = if pirq <= 0 {
            Err(EnableError::BadPirq(pirq))
        } else {
            set_line(means.hardware, false);
            let on = set_control(means.hardware, msi.control(), msi_control::ENABLE, 0);
            if on & msi_control::ENABLE == 0 { Err(EnableError::NotTaken(on)) } else { Ok(pirq) }
        };
        if outcome.is_err() {
            self.disable(means);
        }
        outcome
    }

    /// Turns MSI-X on with the table entries that `entries` names, and puts the guest's pirqs into them.
    /// `table_base` is the address of the BAR that holds the table, 0 if it has none.
    ///
    /// # Errors
    /// Why not; `entries` is as before then.
    pub fn enable_msix<C: ConfigSpace, P: Physdev>(
        &mut self,
        means: &mut Means<'_, C, P>,
        guest: DomId,
        table_base: u64,
        entries: &mut [MsixEntry],
    ) -> Result<(), EnableError> {
        let msix = self.msix.filter(|_| self.offered.1 && self.forgone.is_none()).ok_or(EnableError::NotOffered)?;
        self.finish(means);
        self.check_msix(&msix, entries)?;
        if table_base == 0 {
            return Err(EnableError::NotNow);
        }
        self.check_state(means.hardware, true)?;

        let late = means.physdev.now().saturating_add(MAPPING);
        let on = msix_control::ENABLE | msix_control::MASKALL;
        set_control(means.hardware, msix.control(), on, 0);
        self.guest = guest;
        self.kind = Kind::Msix;
        let mut outcome = Ok(());
        for asked in entries.iter() {
            let vector = Vector::Msix { entry: asked.entry, table_base };
            let mapped = match means.physdev.map(guest, means.sbdf, vector) {
                Ok(pirq) => {
                    self.pirqs.push(pirq);
                    if !(1..=i32::from(u16::MAX)).contains(&pirq) {
                        Err(EnableError::BadPirq(pirq))
                    } else if means.physdev.now() > late {
                        Err(EnableError::TooLate)
                    } else {
                        Ok(())
                    }
                }
                Err(error) => Err(EnableError::Map(asked.entry, error)),
            };
            if mapped.is_err() {
                outcome = mapped;
                break;
            }
        }
        if outcome.is_ok() {
            set_line(means.hardware, false);
            let control = set_control(means.hardware, msix.control(), msix_control::ENABLE, msix_control::MASKALL);
            if control & on != msix_control::ENABLE {
                outcome = Err(EnableError::NotTaken(control));
            }
        }
        match outcome {
            Ok(()) => {
                self.vectors = entries.len() as u16;
                for (entry, pirq) in entries.iter_mut().zip(&self.pirqs) {
                    // Checked above.
                    entry.vector = *pirq as u16;
                }
            }
            Err(_) => {
                self.disable(means);
                if !self.is_mapped() {
                    // A map that failed half way can leave Xen with MASKALL in its memory. What cannot be mended
                    // here is found by the check before the next exposure.
                    let _ = self.clean(means.hardware, means.physdev, means.sbdf);
                }
            }
        }
        outcome
    }

    /// The request's own limits, and what is on.
    fn check_msix(&self, msix: &Msix, entries: &[MsixEntry]) -> Result<(), EnableError> {
        if entries.is_empty() || entries.len() > MAX_VECTORS {
            return Err(EnableError::BadRequest);
        }
        match self.kind {
            Kind::Line => {}
            Kind::Msix => return Err(EnableError::AlreadyOn),
            Kind::Msi => return Err(EnableError::OtherOn),
        }
        if entries.len() > usize::from(msix.entries) {
            return Err(EnableError::TooMany(msix.entries));
        }
        let twice =
            |(place, entry): (usize, &MsixEntry)| entries.iter().take(place).any(|before| before.entry == entry.entry);
        if entries.iter().any(|entry| entry.entry >= msix.entries) || entries.iter().enumerate().any(twice) {
            return Err(EnableError::BadRequest);
        }
        Ok(())
    }

    /// Whether the function is in a state to be set up; with `memory`, in which Xen can reach its table.
    fn check_state<C: ConfigSpace>(&self, hardware: &C, memory: bool) -> Result<(), EnableError> {
        if self.is_mapped() {
            return Err(EnableError::Leftover);
        }
        let held = hardware.read(offset::COMMAND, Width::Word) as u16;
        let state = self.power.map_or(0, |at| hardware.read(at, Width::Word) as u16 & power::STATE);
        let decodes = self.is_virtual || held & command::MEMORY != 0;
        if held == u16::MAX || memory && !decodes || state != 0 {
            return Err(EnableError::NotNow);
        }
        Ok(())
    }

    /// Turns off what is on and unmaps it. What Xen unmapped before is no error; what it refuses to unmap stays on
    /// record, and is returned.
    pub fn disable<C: ConfigSpace, P: Physdev>(&mut self, means: &mut Means<'_, C, P>) -> Option<PhysdevError> {
        match (self.kind, self.msi, self.msix) {
            (Kind::Msi, Some(msi), _) => {
                set_control(means.hardware, msi.control(), 0, msi_control::ENABLE);
            }
            // Masked and still enabled while Xen unmaps: it then neither turns MSI-X on and off for each entry to
            // reach the table nor has to remember a MASKALL of its own where it can't reach it.
            (Kind::Msix, _, Some(msix)) => {
                set_control(means.hardware, msix.control(), msix_control::ENABLE | msix_control::MASKALL, 0);
            }
            _ => {}
        }
        let left = self.unmap(means.physdev, means.sbdf);
        if let (Kind::Msix, Some(msix)) = (self.kind, self.msix) {
            set_control(means.hardware, msix.control(), 0, msix_control::ENABLE | msix_control::MASKALL);
        }
        if self.kind != Kind::Line && !means.physdev.is_connected() {
            self.unfinished = true;
            return left;
        }
        if self.kind != Kind::Line {
            set_line(means.hardware, means.line);
        }
        self.kind = Kind::Line;
        self.vectors = 0;
        left
    }

    /// Turns off what could not be turned off when that was due.
    pub fn finish<C: ConfigSpace, P: Physdev>(&mut self, means: &mut Means<'_, C, P>) {
        if core::mem::take(&mut self.unfinished) {
            self.disable(means);
        }
    }

    /// Tells dom0 what is mapped, and has it unmap what else is.
    ///
    /// # Errors
    /// What dom0 answered.
    pub fn settle<P: Physdev>(&self, physdev: &mut P, sbdf: Sbdf) -> Result<(), PhysdevError> {
        physdev.settle(self.guest, sbdf, &self.pirqs)
    }

    /// Unmaps what is mapped. What Xen refuses stays on record, and the first refusal is returned.
    pub fn unmap<P: Physdev>(&mut self, physdev: &mut P, sbdf: Sbdf) -> Option<PhysdevError> {
        let (guest, mut left) = (self.guest, None);
        let orphaned = &mut self.orphaned;
        self.pirqs.retain(|pirq| match physdev.unmap(guest, sbdf, *pirq) {
            // EINVAL: not mapped any more.
            Ok(()) | Err(PhysdevError::Invalid) => false,
            // ESRCH: the guest is gone, and its pirqs are or will be: see `is_settled`.
            Err(PhysdevError::NoDomain) => {
                *orphaned = true;
                false
            }
            Err(error) => {
                left.get_or_insert(error);
                true
            }
        });
        left
    }
}

/// Sets and clears bits of a Message Control register, and returns what it reads then. Always 16 bits wide: Xen
/// refuses other widths. What does not answer is not written to.
fn set_control<C: ConfigSpace>(hardware: &mut C, at: u16, set: u16, clear: u16) -> u16 {
    let control = hardware.read(at, Width::Word) as u16;
    if control == u16::MAX {
        return control;
    }
    // Where the host forbids writes, the value read back tells.
    let _ = hardware.write(at, Width::Word, u32::from(control & !clear | set));
    hardware.read(at, Width::Word) as u16
}

/// Lets the function use its interrupt pin, or not. A function without a pin is left alone.
fn set_line<C: ConfigSpace>(hardware: &mut C, on: bool) {
    if hardware.read(offset::INTERRUPT_PIN, Width::Byte) & 0xff == 0 {
        return;
    }
    let held = hardware.read(offset::COMMAND, Width::Word) as u16;
    let wanted = if on { held & !command::INTX_DISABLE } else { held | command::INTX_DISABLE };
    if held != wanted && held != u16::MAX {
        // Every caller has written before.
        let _ = hardware.write(offset::COMMAND, Width::Word, u32::from(wanted));
    }
}
