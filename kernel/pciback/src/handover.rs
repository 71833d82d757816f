//! The hand-over of a function: from the end of one guest's use, or the start of this domain, to the moment at
//! which the next guest may have it. One state machine a function, driven by deadlines: nothing here waits.
//!
//! ```text
//!  begin: bus mastering off
//!    |
//!  Wake -- out of D3hot, in which a function answers no access to its MSI-X table
//!    |
//!  MSI and MSI-X off
//!    |
//!  Unmap  -- until Xen has unmapped all vectors (a reset with vectors mapped makes Xen remember a MASKALL)
//!    |
//!  Meet   -- until it answers and is awake, or the time is over: broken
//!    |
//!  Drain  -- until no transaction is pending, or the time is over
//!    |
//!  reset: PCIe FLR, AF FLR, D3hot and back, or by dom0 on request
//!    |
//!  Asleep, Settle -- the time the specification gives the function
//!  Bus, Gather, Company -- by dom0; with the functions beside it, if there is no other way ([`crate::siblings`])
//!    |
//!  Answer -- until it answers again, or the time is over: broken
//!    |
//!  Restore -- the image taken when it was seized, until it reads back, or the time is over: broken
//!    |
//!  Check  -- Xen's MSI-X state is clean ([`crate::msix_state`]), or broken with the reason
//! ```
//!
//! Times and bits: PCI Express Base 5.0, 6.6.2 (FLR); the Advanced Features ECN; PCI Power Management 1.2, 5.6.1.

use alloc::format;
use alloc::string::{String, ToString};

use crate::cmdline::Reset;
use crate::config::VirtualConfig;
use crate::config::registers::{EXTENDED, advanced, capability, command, express, offset, power};
use crate::image::Image;
use crate::interrupts::{Interrupts, Means};
use crate::msix_state::{self, Clean, Dirty};
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, DomId, Nanos, Width};
use crate::reset_quirks::{self, Quirk};
use crate::sbdf::Sbdf;

const MS: Nanos = 1_000_000;

/// How long Xen may take to unmap a dead guest's vectors.
const UNMAP: Nanos = 10_000 * MS;
/// How often it is looked whether it has.
const UNMAP_PAUSE: Nanos = 20 * MS;
/// How long a function that its guest left asleep may take to wake up before its vectors are unmapped all the same.
const WAKE: Nanos = 1_000 * MS;
/// How long pending transactions are waited for. The reset is done all the same after it, as the specification
/// lets software do.
const DRAIN: Nanos = 700 * MS;
/// How often pending transactions are looked for.
const DRAIN_PAUSE: Nanos = 20 * MS;
/// What a function may take for a function level reset.
const FLR: Nanos = 100 * MS;
/// What a function may take to change its power state.
const POWER: Nanos = 10 * MS;
/// How long a function may answer nothing, or "retry", after a reset. Drives take long; Linux waits as long.
const ANSWER: Nanos = 60_000 * MS;
/// How long registers may lose what is written to them after a reset, and how often it is looked whether they do.
const RESTORE: Nanos = 1_000 * MS;
const RESTORE_PAUSE: Nanos = 20 * MS;
/// How long dom0's kernel may take for a reset; resets of its own wait as long for an answer.
const BUS: Nanos = 70_000 * MS;
/// How often dom0 is asked whether it is done.
const BUS_PAUSE: Nanos = 50 * MS;
/// The longest pause between two looks whether it answers; the first is 1 ms and each is twice the one before.
const ANSWER_PAUSE: Nanos = 128 * MS;

/// Why a function is of no use that dom0's kernel has in hand.
const NOT_FINISHED: &str = "dom0 does not finish its reset: see dmesg of dom0";

/// How a function is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// PCIe function level reset; the offset of the PCI Express capability.
    Flr(u16),
    /// Function level reset of the Advanced Features capability at this offset.
    Af(u16),
    /// D3hot and back; the offset of PMCSR.
    Pm(u16),
    /// It has none of its own, or a bus reset is wished: dom0's kernel does it when this domain asks.
    Bus,
    /// The same where dom0 cannot be asked: its tool does what its kernel can before it attaches the function.
    Dom0,
    /// None, by wish.
    Nothing,
}

impl Method {
    /// The word that is published.
    pub const fn word(self) -> &'static str {
        match self {
            Method::Flr(_) => "flr",
            Method::Af(_) => "af",
            Method::Pm(_) => "pm",
            Method::Bus => "bus",
            Method::Dom0 => "dom0",
            Method::Nothing => "none",
        }
    }

    /// Whether this domain does it, by writing to the function.
    const fn is_own(self) -> bool {
        matches!(self, Method::Flr(_) | Method::Af(_) | Method::Pm(_))
    }

    /// The method for a function: the wish, if the function can do it, or the first of those it has. What its registers
    /// say counts less than what is publicly known of it ([`reset_quirks`]).
    ///
    /// # Errors
    /// A sentence, if the function lacks what is wished.
    pub fn choose<C: ConfigSpace>(
        hardware: &C,
        config: &VirtualConfig,
        wish: Reset,
        reach: Reach,
    ) -> Result<Method, String> {
        let dom0 = if reach.needs_dom0() { Method::Bus } else { Method::Dom0 };
        let quirk = reset_quirks::of(hardware, config);
        let flr = config.capability(capability::EXPRESS).filter(|at| {
            let register = at + express::DEVICE_CAPABILITIES;
            let told = |register| hardware.read(register, Width::Dword) & express::FUNCTION_RESET != 0;
            register + 4 <= EXTENDED && (quirk == Some(Quirk::HiddenFlr) || told(register))
        });
        let linked = config.capability(capability::ADVANCED);
        let af = match quirk {
            Some(Quirk::HiddenAf(at)) => linked.or_else(|| reset_quirks::hidden_advanced(hardware, config, at)),
            _ => linked,
        };
        let af = af.filter(|at| {
            let register = at + advanced::CAPABILITIES;
            register < EXTENDED - 2 && hardware.read(register, Width::Byte) as u8 & advanced::RESET == advanced::RESET
        });
        let keeps_state = |at: &u16| hardware.read(*at, Width::Word) as u16 & power::NO_SOFT_RESET != 0;
        let pm = config.power_control().filter(|at| !keeps_state(at));
        // What is announced and must not be done; a wish for it is refused with the reason.
        let lacks = |name: &str| format!("reset={name}: the function has no such reset; reset=auto takes what it has");
        let denied =
            |name: &str, why: &str| format!("reset={name}: not for this function: {why}; reset=auto takes another");
        let flr = match quirk {
            Some(Quirk::NoFlr(why) | Quirk::Dom0(why)) if flr.is_some() => Err(denied("flr", why)),
            _ => flr.map(Method::Flr).ok_or_else(|| lacks("flr")),
        };
        let af = match quirk {
            Some(Quirk::NoFlr(why) | Quirk::Dom0(why)) if af.is_some() => Err(denied("af", why)),
            _ => af.map(Method::Af).ok_or_else(|| lacks("af")),
        };
        let pm = match quirk {
            Some(Quirk::NoPm(why)) if pm.is_some() => Err(denied("pm", why)),
            _ => pm.map(Method::Pm).ok_or_else(|| lacks("pm")),
        };
        match wish {
            Reset::Auto if matches!(quirk, Some(Quirk::Dom0(_))) => Ok(dom0),
            Reset::Auto => Ok(flr.or(af).or(pm).unwrap_or(dom0)),
            Reset::Flr => flr,
            Reset::Af => af,
            Reset::Pm => pm,
            Reset::Bus => Ok(dom0),
            Reset::None => Ok(Method::Nothing),
        }
    }
}

/// Where the state machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// On its way out of D3hot, where its guest had left it; gone on without at this time.
    Wake { until: Nanos },
    /// Vectors are still mapped; given up at this time.
    Unmap { until: Nanos },
    /// It does not answer, or is asleep, and can't be reset; given up when the patience is over.
    Meet { pause: Nanos },
    /// Transactions may be pending; the reset is done at this time at the latest.
    Drain { until: Nanos },
    /// In D3hot.
    Asleep,
    /// dom0 resets it; given up at this time.
    Bus { until: Nanos },
    /// dom0 resets it only together with the functions beside it, which are not at rest; given up at this time.
    Gather { until: Nanos },
    /// dom0 resets a function beside it, and with that this one; given up at this time.
    Company { until: Nanos },
    /// The reset has been done, and the function must not be touched yet.
    Settle,
    /// It may answer with nothing yet; given up when the patience is over.
    Answer { pause: Nanos },
    /// A register loses what is written to it; given up at this time.
    Restore { until: Nanos },
    /// All is restored, but Xen is not done with a former guest's vectors; given up at this time.
    Check { until: Nanos },
}

/// What a step led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The next step is due at this time.
    Until(Nanos),
    /// The function can be given to a guest.
    Ready(Clean),
    /// It can't, for this reason.
    Broken(String),
}

/// How far the domain can go on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Xen sees our writes and takes our hypercalls.
    Direct,
    /// dom0 writes and makes the hypercalls.
    Delegated,
    /// Our writes go past Xen, but for those of Message Control, which dom0 makes, and the hypercalls.
    Split,
    /// Our writes go past Xen, and there are no hypercalls.
    Hardware,
}

impl Reach {
    /// Whether Xen's MSI-X state can be looked at and interrupts can be mapped.
    pub const fn has_physdev(self) -> bool {
        !matches!(self, Reach::Hardware)
    }

    /// Whether dom0 takes part.
    pub const fn needs_dom0(self) -> bool {
        matches!(self, Reach::Delegated | Reach::Split)
    }
}

/// Why a reset cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The function has kept its addresses.
    KeptAddresses,
    /// dom0 did not reset it.
    NotDone(PhysdevError),
    /// Its reset would have reached this function, which a guest has.
    Beside(Sbdf, DomId),
}

/// What a hand-over works on.
pub struct Subject<'a, C, P> {
    /// The function's registers.
    pub hardware: &'a mut C,
    /// Its virtual configuration space.
    pub config: &'a mut VirtualConfig,
    /// Its interrupts.
    pub interrupts: &'a mut Interrupts,
    /// What it is restored to; `None` as long as it has not answered since it was seized.
    pub image: &'a mut Option<Image>,
    /// How it is reset.
    pub method: Method,
    /// How far this domain can go.
    pub reach: Reach,
    /// Xen.
    pub physdev: &'a mut P,
    /// The function.
    pub sbdf: Sbdf,
}

impl<C: ConfigSpace, P> Subject<'_, C, P> {
    /// Takes the image, if there is none, or a better one than there is.
    fn take_image(&mut self) {
        if self.image.as_ref().is_none_or(Image::is_poor)
            && let Some(image) = Image::take(self.hardware, self.config)
        {
            *self.image = Some(image);
        }
    }

    /// Whether the function answers as itself and is awake; if it is asleep it is woken.
    fn rouse(&mut self) -> Result<(), Silent> {
        if self.config.identity().check(self.hardware).is_err() {
            return Err(Silent::Gone(self.hardware.read(offset::VENDOR, Width::Word) as u16));
        }
        match asleep(self.hardware, self.config) {
            None => Ok(()),
            Some(at) => {
                let state = self.hardware.read(at, Width::Word) as u16 & power::STATE;
                set_power(self.hardware, at, 0);
                Err(Silent::Asleep(state))
            }
        }
    }
}

/// Why nothing can be done to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silent {
    /// Its vendor register reads this.
    Gone(u16),
    /// It is in this power state.
    Asleep(u16),
}

/// A hand-over under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOver {
    step: Step,
    due: Nanos,
    doubt: Option<Doubt>,
    /// How long the function may still be silent, before its reset or after it.
    patience: Nanos,
    /// The reset was done twice, as the first did not show.
    repeated: bool,
    /// The image is being put back.
    restoring: bool,
    /// dom0 resets others with it.
    leads: bool,
}

impl HandOver {
    /// Silences the function at once and starts.
    pub fn begin<C: ConfigSpace, P: Physdev>(subject: &mut Subject<'_, C, P>, now: Nanos) -> HandOver {
        subject.config.detach(subject.hardware);
        subject.take_image();
        if let Err(Silent::Asleep(_)) = subject.rouse() {
            let step = Step::Wake { until: now.saturating_add(WAKE) };
            return HandOver::at(step, now.saturating_add(POWER));
        }
        HandOver::at(silence(subject, now), now)
    }

    const fn at(step: Step, due: Nanos) -> HandOver {
        HandOver { step, due, doubt: None, patience: 0, repeated: false, restoring: false, leads: false }
    }

    /// When [`HandOver::advance`] is to be called; `None` if something else brings it on.
    pub fn due(&self) -> Option<Nanos> {
        (self.due != Nanos::MAX).then_some(self.due)
    }

    /// Nothing is due until somebody begins it anew.
    pub fn park(&mut self) {
        self.due = Nanos::MAX;
    }

    /// Why the reset that was asked for may not have been one: its former guest's work may go on in the function then.
    pub fn doubt(&self) -> Option<Doubt> {
        self.doubt
    }

    /// Does what is due, up to the next wait.
    pub fn advance<C: ConfigSpace, P: Physdev>(&mut self, subject: &mut Subject<'_, C, P>, now: Nanos) -> Progress {
        if now < self.due {
            return Progress::Until(self.due);
        }
        let progress = self.step(subject, now);
        if let Progress::Until(due) = progress {
            self.due = due;
        }
        progress
    }

    fn step<C: ConfigSpace, P: Physdev>(&mut self, subject: &mut Subject<'_, C, P>, now: Nanos) -> Progress {
        match self.step {
            Step::Wake { until } => {
                if subject.rouse().is_err() && now < until {
                    return Progress::Until(now.saturating_add(POWER));
                }
                subject.take_image();
                // What it has lost on the way, it has lost to its guest too.
                subject.config.detach(subject.hardware);
                self.step = silence(subject, now);
                self.step(subject, now)
            }
            Step::Unmap { until } => match subject.interrupts.unmap(subject.physdev, subject.sbdf) {
                None if subject.interrupts.is_settled(subject.hardware, subject.physdev, subject.sbdf) => {
                    self.patience = now.saturating_add(ANSWER);
                    self.meet(subject, now, MS)
                }
                // A reset would take the table from under Xen's hands.
                None if now < until => Progress::Until(now.saturating_add(UNMAP_PAUSE)),
                None => Progress::Broken(Dirty::Release(PhysdevError::Busy).to_string()),
                Some(_) if now < until => Progress::Until(now.saturating_add(UNMAP_PAUSE)),
                Some(error) => Progress::Broken(format!(
                    "vectors of its former guest are still mapped: unmap_pirq answered {error}; end that guest, or see \
                     xl dmesg"
                )),
            },
            Step::Meet { pause } => self.meet(subject, now, pause),
            Step::Drain { until } => self.drain(subject, now, until),
            Step::Asleep => {
                if let Method::Pm(at) = subject.method {
                    set_power(subject.hardware, at, 0);
                }
                self.step = Step::Settle;
                Progress::Until(now.saturating_add(POWER))
            }
            Step::Bus { until } => self.wait_for_dom0(subject, now, until),
            Step::Gather { until } if now < until => Progress::Until(now.saturating_add(BUS_PAUSE)),
            Step::Gather { .. } => {
                self.doubt = Some(Doubt::NotDone(PhysdevError::Shared));
                self.recover(subject, now)
            }
            Step::Company { until } if now < until => Progress::Until(until),
            Step::Company { .. } => Progress::Broken(String::from(NOT_FINISHED)),
            Step::Settle => self.recover(subject, now),
            Step::Answer { pause } => self.answer(subject, now, pause),
            Step::Restore { until } => self.restore(subject, now, until),
            Step::Check { until } => self.check(subject, now, until),
        }
    }

    /// Waits for a function that does not answer or is asleep, if something is to be written to it or its image is still
    /// to be taken, then goes on.
    fn meet<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        pause: Nanos,
    ) -> Progress {
        if subject.method.is_own() || subject.image.is_none() {
            let met = subject.rouse();
            if met.is_ok() {
                // It may have been gone when these were due.
                subject.config.detach(subject.hardware);
                subject.take_image();
            }
            if met.is_err() || subject.image.is_none() {
                if now >= self.patience {
                    return Progress::Broken(match met {
                        Err(Silent::Asleep(state)) => stays_asleep(state),
                        Err(Silent::Gone(vendor)) => format!(
                            "it does not answer, so it cannot be reset: the vendor register reads {vendor:04x}; \
                             power-cycle the host"
                        ),
                        Ok(()) => String::from("its registers read as ones: power-cycle the host"),
                    });
                }
                let (pause, next) = pauses(met, pause);
                self.step = Step::Meet { pause: next };
                return Progress::Until(now.saturating_add(pause));
            }
        }
        self.drain(subject, now, now.saturating_add(DRAIN))
    }

    /// The function has gone just before its reset: it is waited for anew, as long as there is patience.
    fn meet_again(&mut self, now: Nanos) -> Progress {
        self.step = Step::Meet { pause: MS };
        if now < self.patience {
            return Progress::Until(now.saturating_add(MS));
        }
        Progress::Broken(String::from("it answers, and does not, so it cannot be reset: power-cycle the host"))
    }

    /// Waits for pending transactions, then resets.
    fn drain<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
    ) -> Progress {
        let Subject { hardware, method, .. } = subject;
        let pending = match *method {
            Method::Flr(at) => hardware.read(at + express::DEVICE_STATUS, Width::Word) as u16 & express::PENDING != 0,
            Method::Af(at) => hardware.read(at + advanced::STATUS, Width::Byte) as u8 & advanced::PENDING != 0,
            Method::Pm(_) | Method::Bus | Method::Dom0 | Method::Nothing => false,
        };
        if pending && now < until {
            self.step = Step::Drain { until };
            return Progress::Until(now.saturating_add(DRAIN_PAUSE));
        }
        // One that has gone meanwhile reads as if transactions were pending.
        if subject.method.is_own() && subject.config.identity().check(subject.hardware).is_err() {
            return self.meet_again(now);
        }
        if pending {
            log::warn!("{}: transactions are still pending: it is reset all the same", subject.sbdf);
        }
        let slowness = reset_quirks::slowness(subject.hardware, subject.config);
        let Subject { hardware, method, .. } = subject;
        let settle = match *method {
            Method::Flr(at) => {
                let control = hardware.read(at + express::DEVICE_CONTROL, Width::Word) as u16;
                if control == u16::MAX {
                    return self.meet_again(now);
                }
                let reset = control | express::INITIATE_RESET;
                // What is not written does not reset; the image is compared after it.
                let _ = hardware.write(at + express::DEVICE_CONTROL, Width::Word, u32::from(reset));
                FLR + slowness
            }
            Method::Af(at) => {
                let reset = u32::from(advanced::INITIATE_RESET);
                let _ = hardware.write(at + advanced::CONTROL, Width::Byte, reset);
                FLR + slowness
            }
            Method::Pm(at) => {
                set_power(*hardware, at, power::STATE);
                self.step = Step::Asleep;
                return Progress::Until(now.saturating_add(POWER));
            }
            Method::Bus => return self.ask_dom0(subject, now),
            Method::Dom0 | Method::Nothing => 0,
        };
        self.step = Step::Settle;
        if settle == 0 { self.step(subject, now) } else { Progress::Until(now.saturating_add(settle)) }
    }

    /// Has dom0 reset it.
    fn ask_dom0<C: ConfigSpace, P: Physdev>(&mut self, subject: &mut Subject<'_, C, P>, now: Nanos) -> Progress {
        match subject.physdev.reset(subject.sbdf, false) {
            // Busy: with an earlier wish for the same.
            Ok(()) | Err(PhysdevError::Busy) => {
                self.step = Step::Bus { until: now.saturating_add(BUS) };
                Progress::Until(now.saturating_add(BUS_PAUSE))
            }
            Err(PhysdevError::Shared) => {
                self.step = Step::Gather { until: now.saturating_add(BUS) };
                Progress::Until(now.saturating_add(BUS_PAUSE))
            }
            Err(error) => {
                self.doubt = Some(Doubt::NotDone(error));
                self.recover(subject, now)
            }
        }
    }

    /// Whether its reset waits for the functions beside it to be at rest.
    pub fn gathers(&self) -> bool {
        matches!(self.step, Step::Gather { .. })
    }

    /// All of them are: dom0 resets them all. True if it does.
    pub fn lead<C: ConfigSpace, P: Physdev>(&mut self, subject: &mut Subject<'_, C, P>, now: Nanos) -> bool {
        match subject.physdev.reset(subject.sbdf, true) {
            Ok(()) => {
                self.step = Step::Bus { until: now.saturating_add(BUS) };
                self.leads = true;
                self.due = now.saturating_add(BUS_PAUSE);
            }
            Err(error) => self.go_on(Some(Doubt::NotDone(error)), now),
        }
        self.leads
    }

    /// The hand-over of a function that dom0 resets with one beside it.
    pub fn accompany(now: Nanos) -> HandOver {
        // Not sooner than the other one gives up.
        let until = now.saturating_add(2 * BUS);
        HandOver::at(Step::Company { until }, until)
    }

    /// Whether it is reset with a function beside it.
    pub fn accompanies(&self) -> bool {
        matches!(self.step, Step::Company { .. })
    }

    /// Whether the reset of several functions that it had asked for has ended.
    pub fn has_led(&self) -> bool {
        self.leads && !matches!(self.step, Step::Bus { .. })
    }

    /// The others have been told.
    pub fn dismiss(&mut self) {
        self.leads = false;
    }

    /// A reset that it shared has ended, or is not done.
    pub fn go_on(&mut self, doubt: Option<Doubt>, now: Nanos) {
        self.doubt = doubt;
        self.step = Step::Settle;
        self.due = now;
    }

    fn wait_for_dom0<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
    ) -> Progress {
        match subject.physdev.reset_done(subject.sbdf) {
            Ok(false) if now < until => return Progress::Until(now.saturating_add(BUS_PAUSE)),
            Ok(false) => return Progress::Broken(String::from(NOT_FINISHED)),
            Ok(true) => {}
            Err(error) => self.doubt = Some(Doubt::NotDone(error)),
        }
        self.step = Step::Settle;
        self.recover(subject, now)
    }

    /// The time that a function needs after its reset is over.
    fn recover<C: ConfigSpace, P: Physdev>(&mut self, subject: &mut Subject<'_, C, P>, now: Nanos) -> Progress {
        self.patience = now.saturating_add(ANSWER);
        self.answer(subject, now, MS)
    }

    /// Waits for an answer, then restores.
    fn answer<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        pause: Nanos,
    ) -> Progress {
        if let Err(silent) = subject.rouse() {
            if now >= self.patience {
                return Progress::Broken(match silent {
                    Silent::Asleep(state) => stays_asleep(state),
                    Silent::Gone(vendor) => format!(
                        "it does not answer {} s after its reset ({}): the vendor register reads {vendor:04x}; power-cycle \
                         the host",
                        ANSWER / (1000 * MS),
                        subject.method.word()
                    ),
                });
            }
            let (pause, next) = pauses(Err(silent), pause);
            self.step = Step::Answer { pause: next };
            return Progress::Until(now.saturating_add(pause));
        }
        let kept = subject.image.as_ref().is_some_and(|image| image.addresses_kept(subject.hardware));
        if subject.method.is_own() && kept && !self.restoring {
            if !self.repeated {
                // It may not have heard.
                self.repeated = true;
                self.patience = now.saturating_add(ANSWER);
                return self.meet(subject, now, MS);
            }
            self.doubt = Some(Doubt::KeptAddresses);
        }
        self.restoring = true;
        self.restore(subject, now, now.saturating_add(RESTORE))
    }

    /// Whether something failed because the function has gone again: it is waited for anew, as long as there is patience.
    fn has_gone<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
    ) -> Option<Progress> {
        subject.config.identity().check(subject.hardware).err()?;
        Some(self.answer(subject, now, MS))
    }

    /// Puts the image back.
    fn restore<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
    ) -> Progress {
        if let Some(image) = subject.image {
            match image.restore(subject.hardware) {
                Ok(()) => image.tell_lost(subject.hardware, subject.sbdf),
                Err(lost) => {
                    if let Some(progress) = self.has_gone(subject, now) {
                        return progress;
                    }
                    if now >= until {
                        return Progress::Broken(format!("{lost}: reset it from dom0 or power-cycle the host"));
                    }
                    self.step = Step::Restore { until };
                    return Progress::Until(now.saturating_add(RESTORE_PAUSE));
                }
            }
        }
        self.check(subject, now, now.saturating_add(UNMAP))
    }

    /// Xen's MSI-X state, last.
    fn check<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
    ) -> Progress {
        match check(subject) {
            Ok(clean) => Progress::Ready(clean),
            Err(dirty) => match self.has_gone(subject, now) {
                Some(progress) => progress,
                None if dirty.may_pass() && now < until => {
                    self.step = Step::Check { until };
                    Progress::Until(now.saturating_add(UNMAP_PAUSE))
                }
                None => Progress::Broken(dirty.to_string()),
            },
        }
    }
}

/// The MSI-X check of a function whose vectors are all unmapped: before every exposure.
///
/// # Errors
/// Why it may not be exposed.
pub fn check<C: ConfigSpace, P: Physdev>(subject: &mut Subject<'_, C, P>) -> Result<Clean, Dirty> {
    match (subject.reach, subject.interrupts.msix().copied()) {
        (reach, _) if reach.has_physdev() => {
            let cleaned = subject.interrupts.clean(subject.hardware, subject.physdev, subject.sbdf);
            match cleaned {
                Err(Dirty::Prepare(error)) if has_no_table(subject, error) => {
                    subject.interrupts.forgo(subject.hardware, subject.sbdf, error).map(|()| Clean::Already)
                }
                other => other,
            }
        }
        (_, Some(msix)) => msix_state::clear(subject.hardware, &msix).map(|()| Clean::Already),
        (_, None) => Ok(Clean::Already),
    }
}

/// Whether it is for good that Xen does not find the MSI-X table, and not for something that dom0 can mend: the function
/// has its addresses and decodes them.
fn has_no_table<C: ConfigSpace, P>(subject: &Subject<'_, C, P>, error: PhysdevError) -> bool {
    let Subject { hardware, config, image, .. } = subject;
    let held = hardware.read(offset::COMMAND, Width::Word) as u16;
    let placed = image.as_ref().is_some_and(Image::has_addresses);
    let decodes = config.identity().is_virtual() || placed && held & command::MEMORY != 0;
    error == PhysdevError::NoMemoryDecode && decodes
}

/// Why a function that does not wake up is of no use.
fn stays_asleep(state: u16) -> String {
    format!("it stays in power state D{state}: power-cycle the host")
}

/// The pause before the next look at a function that is silent for this reason, and the one after it.
fn pauses(silent: Result<(), Silent>, pause: Nanos) -> (Nanos, Nanos) {
    match silent {
        // It did not hear that it was to wake up.
        Err(Silent::Asleep(_)) => (POWER, pause),
        Err(Silent::Gone(_)) | Ok(()) => (pause, (2 * pause).min(ANSWER_PAUSE)),
    }
}

/// Turns message interrupts off; the step that follows.
fn silence<C: ConfigSpace, P: Physdev>(subject: &mut Subject<'_, C, P>, now: Nanos) -> Step {
    let Subject { hardware, interrupts, physdev, sbdf, .. } = subject;
    interrupts.disable(&mut Means { hardware: *hardware, physdev: *physdev, sbdf: *sbdf, line: false });
    Step::Unmap { until: now.saturating_add(UNMAP) }
}

/// Offset of PMCSR, if the function is in another state than D0.
fn asleep<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Option<u16> {
    let at = config.power_control()?;
    let held = hardware.read(at, Width::Word) as u16;
    (held & power::STATE != 0 && held != u16::MAX).then_some(at)
}

/// Writes the power state; wake events stay off, and a pending one is not cleared by accident.
fn set_power<C: ConfigSpace>(hardware: &mut C, at: u16, state: u16) {
    let held = hardware.read(at, Width::Word) as u16;
    if held == u16::MAX {
        return;
    }
    let wanted = held & !(power::STATE | power::PME_STATUS | power::PME_ENABLE) | state;
    // The function answers in either state, or is found not to.
    let _ = hardware.write(at, Width::Word, u32::from(wanted));
}
