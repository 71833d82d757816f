//! One function this domain owns, from its seizure at start to the guest that has it.
//!
//! The state says all: a function in use carries its guest, a broken one its reason. Nothing of one
//! guest reaches the next: what a guest can set lives in the view that is made for it, and between two guests
//! lies a [`crate::handover`].

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt;

use crate::aer::{End, Severity};
use crate::cmdline::DeviceConfig;
use crate::config::registers::{command, power};
use crate::config::{GuestView, VirtualConfig};
use crate::handover::{self, Doubt, HandOver, Method, Progress, Reach, Subject};
use crate::image::Image;
use crate::interrupts::{Interrupts, Means};
use crate::msix_state::{Clean, Dirty};
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, DomId, Nanos, Way, Width};
use crate::sbdf::Sbdf;
use crate::serve::Counters;

/// How long a function needs to come back from D3hot (PCI Power Management 1.2, 5.6.1), and how often it is looked
/// at after that: 10 milliseconds.
const WAKE_PAUSE: Nanos = 10_000_000;
/// How long it may take: 1 second. Its guest's client waits for an answer for 2.
const WAKE: Nanos = 1_000_000_000;

/// Why nothing can be done to a function.
const UNREACHABLE: &str = "xl-pciback serve in dom0, which carries this domain's writes out, is not connected: start it, \
                           then try again";

/// A function's hardware access, the virtual configuration space over it, and its interrupts.
#[derive(Debug)]
pub struct Function<C> {
    /// The hardware.
    pub hardware: C,
    /// What a guest sees.
    pub config: VirtualConfig,
    /// MSI and MSI-X.
    pub interrupts: Interrupts,
    /// What guests have asked of it.
    pub counters: Counters,
    /// What the hand-over needs; `None` while this domain may not write.
    control: Option<Control>,
    /// Its guest was refused a write because nothing can be written now, and that was told.
    pub mute: bool,
    /// Its guest has woken it from D3hot, and it has not got back yet what it lost.
    pub waking: Option<Waking>,
}

/// A function on its way out of D3hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waking {
    /// Its Command register before.
    command: u16,
    /// When to look at it.
    due: Nanos,
    /// When to give up.
    until: Nanos,
}

/// What is known of a function that may be written.
#[derive(Debug)]
struct Control {
    /// What it is restored to; `None` as long as it has not answered.
    image: Option<Image>,
    /// The function has been ready with this image.
    proven: bool,
    /// It was told that the reset changes nothing.
    doubted: bool,
    method: Method,
    reach: Reach,
}

/// Where a function stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is being handed over.
    Resetting,
    /// It can be attached.
    Ready,
    /// The guest with this domain number has it.
    InUse(DomId),
    /// It can't be used, for this reason.
    Broken(String),
}

impl State {
    /// The word that is published.
    pub fn word(&self) -> &'static str {
        match self {
            State::Resetting => "resetting",
            State::Ready => "ready",
            State::InUse(_) => "in-use",
            State::Broken(_) => "broken",
        }
    }
}

/// The last error that dom0 reported of a function, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    severity: Severity,
    fate: Fate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// The guest's driver is being told.
    Recovering,
    /// It goes on with the function.
    Recovered,
    /// It does not, for this reason, and the function was taken from it.
    Failed(String),
    /// There was no driver to tell, for this reason, and the function was reset.
    Reset(&'static str),
}

/// As a node's text.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.severity.word())?;
        match &self.fate {
            Fate::Recovering => f.write_str("recovering"),
            Fate::Recovered => f.write_str("recovered"),
            Fate::Failed(why) => write!(f, "failed: {why}"),
            Fate::Reset(why) => write!(f, "reset: {why}"),
        }
    }
}

/// What Xen answered when it was asked whether this domain may act on a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It may.
    Yes,
    /// It may, but a guest's vectors are mapped.
    InUse(Dirty),
    /// It may not, or something else is wrong.
    No(PhysdevError),
}

/// A function of the command line.
#[derive(Debug)]
pub struct Device<C> {
    /// What the command line says of it.
    pub entry: DeviceConfig,
    /// Where it stands.
    pub state: State,
    function: Option<Function<C>>,
    /// The registers of a function that is not what it should be, or does not answer.
    unknown: Option<C>,
    /// The guest that has it, and what it was given.
    owner: Option<(DomId, GuestView)>,
    handover: Option<HandOver>,
    /// It has never been written to: nobody but the command line says that the host allows it.
    untouched: bool,
    /// How often Xen's MSI-X state was stale and has been reset.
    stale: u32,
    report: Option<Report>,
    /// A reset that reached the functions beside it, too, has ended; whether it may be none.
    led: Option<Option<Doubt>>,
}

/// Whether a reset may reach a function that was asked for by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// A guest has it.
    With(DomId),
    /// It is being handed over.
    Moving,
    /// Nobody has it.
    Still,
}

/// The configuration space of the function that the command line means, or why it is not to be had.
fn recognise<C: ConfigSpace>(entry: &DeviceConfig, hardware: &C) -> Result<VirtualConfig, String> {
    if entry.sbdf == Sbdf::new(0, 0, 0) {
        return Err("it is the host bridge, which is never passed through: remove it from dev=".to_string());
    }
    let config = VirtualConfig::new(hardware, entry.id).map_err(|refusal| refusal.to_string())?;
    let (vendor, model) = config.identity().ids();
    match entry.id {
        Some(id) if id != (vendor, model) => Err(format!(
            "another card is in its place: it is {vendor:04x}:{model:04x}, the command line says {:04x}:{:04x}; check with \
             lspci and correct id= or the address",
            id.0, id.1
        )),
        _ => Ok(config),
    }
}

impl<C: ConfigSpace> Device<C> {
    /// Seizes a function: finds out whether this domain can serve it. `hardware` is an error sentence
    /// where its configuration space could not be mapped.
    pub fn seize(entry: DeviceConfig, hardware: Result<C, String>) -> Device<C> {
        let (hardware, state) = match hardware {
            Ok(hardware) => (Some(hardware), State::Ready),
            Err(reason) => (None, State::Broken(reason)),
        };
        let mut device = Device {
            entry,
            state,
            function: None,
            unknown: hardware,
            owner: None,
            handover: None,
            untouched: false,
            stale: 0,
            report: None,
            led: None,
        };
        device.recognise();
        device
    }

    /// Looks what is at the function's address, if that is not known yet. True if it has become known.
    pub fn recognise(&mut self) -> bool {
        let Some(hardware) = self.unknown.take() else { return false };
        match recognise(&self.entry, &hardware) {
            Ok(mut config) => {
                config.open(&self.entry.quirks);
                let interrupts = Interrupts::new(&hardware, &config);
                let counters = Counters::default();
                self.function =
                    Some(Function { hardware, config, interrupts, counters, control: None, mute: false, waking: None });
                self.state = State::Ready;
                true
            }
            Err(reason) => {
                self.unknown = Some(hardware);
                self.state = State::Broken(reason);
                false
            }
        }
    }

    /// Asks Xen whether this domain may act on the function, with a call that changes nothing for anybody else:
    /// prepare_msix, or for a function without MSI-X the restore of no vectors. Never by a write, which would end
    /// the domain where the answer is no.
    pub fn ask<P: Physdev>(&mut self, physdev: &mut P) -> Answer {
        let sbdf = self.entry.sbdf;
        let asked = match self.function.as_mut().filter(|function| function.interrupts.msix().is_some()) {
            Some(function) => function.interrupts.take(physdev, sbdf),
            None => match physdev.restore_msi(sbdf) {
                Ok(()) => Ok(()),
                Err(PhysdevError::Busy) => Err(Dirty::Dom0s),
                Err(error) => return Answer::No(error),
            },
        };
        match asked {
            // The call went through. Why memory decode is off is found by the hand-over.
            Ok(()) | Err(Dirty::Prepare(PhysdevError::NoMemoryDecode)) => match self.check_msi() {
                Ok(()) => Answer::Yes,
                Err(dirty) => Answer::InUse(dirty),
            },
            Err(Dirty::Prepare(error) | Dirty::Release(error)) if error != PhysdevError::Busy => Answer::No(error),
            Err(busy) => Answer::InUse(busy),
        }
    }

    fn check_msi(&self) -> Result<(), Dirty> {
        self.function.as_ref().map_or(Ok(()), |function| function.interrupts.check_msi(&function.hardware))
    }

    /// Lets this domain write to the function, and starts its first hand-over; not while a guest's vectors are
    /// mapped (`busy`), as the function must not be touched then.
    pub fn control<P: Physdev>(&mut self, reach: Reach, busy: Option<Dirty>, physdev: &mut P, now: Nanos) {
        let Some(function) = self.function.as_mut() else { return };
        match reach {
            Reach::Direct => function.hardware.allow_writes(Way::Frame),
            Reach::Delegated => function.hardware.allow_writes(Way::Dom0),
            Reach::Split | Reach::Hardware => {}
        }
        match Method::choose(&function.hardware, &function.config, self.entry.reset, reach) {
            Ok(Method::Dom0 | Method::Nothing)
                if self.entry.strict && self.entry.reset != crate::cmdline::Reset::Bus =>
            {
                self.state = State::Broken(
                    "it has no reset of its own, and strict does not allow it without: say reset=bus, or take strict out"
                        .to_string(),
                );
            }
            Ok(method) => {
                let image = Image::take(&function.hardware, &function.config);
                function.control = Some(Control { image, proven: false, doubted: false, method, reach });
                let full = reach.has_physdev();
                function.interrupts.offer(full && self.entry.msi, full && self.entry.msix);
                match busy {
                    None if matches!(reach, Reach::Direct | Reach::Delegated) => self.begin(physdev, now),
                    // A wrong mode= would end the domain with the first write. dom0's tool looks at Xen's command line
                    // before it lists a function for a guest.
                    None => self.untouched = true,
                    Some(dirty) => self.state = State::Broken(dirty.to_string()),
                }
            }
            Err(why) => self.state = State::Broken(why),
        }
    }

    /// dom0 wants the function handed over, or given to a guest: what was put off at the start is done now.
    pub fn first_use<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        if core::mem::take(&mut self.untouched) {
            if let Some(Function { hardware, interrupts, control: Some(control), .. }) = self.function.as_mut() {
                let split = control.reach == Reach::Split;
                hardware.allow_writes(if split { Way::Split(interrupts.controls()) } else { Way::Frame });
            }
            self.begin(physdev, now);
        }
    }

    /// Whether this domain could take control of the function now: it is known, and nobody has it.
    pub fn is_uncontrolled(&self) -> bool {
        self.state == State::Ready && self.function.as_ref().is_some_and(|function| function.control.is_none())
    }

    /// Whether dom0 could take part with the function and does not: it came after the function was taken, and nobody
    /// has the function now.
    pub fn lacks_dom0(&self) -> bool {
        let control = self.function.as_ref().and_then(|function| function.control.as_ref());
        self.state == State::Ready && control.is_some_and(|control| control.reach == Reach::Hardware)
    }

    /// Whether something waits for dom0 to be connected.
    fn is_stalled<P: Physdev>(&self, physdev: &P) -> bool {
        let control = self.function.as_ref().and_then(|function| function.control.as_ref());
        control.is_some_and(|control| control.reach.needs_dom0()) && !physdev.is_connected()
    }

    /// dom0 is connected again: it learns what is mapped, what could not be done without it is done, and a hand-over
    /// begins anew, as nobody knows how far it had come.
    ///
    /// # Errors
    /// What dom0 answered.
    pub fn reconnected<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) -> Result<(), PhysdevError> {
        let sbdf = self.entry.sbdf;
        let Some(function) = self.function.as_mut() else { return Ok(()) };
        function.interrupts.settle(physdev, sbdf)?;
        let Function { hardware, config, interrupts, control, .. } = function;
        if control.as_ref().is_none_or(|control| !control.reach.needs_dom0()) {
            return Ok(());
        }
        let line = config.wants_line();
        interrupts.finish(&mut Means { hardware, physdev, sbdf, line });
        if self.handover.take().is_some() {
            self.begin(physdev, now);
        }
        Ok(())
    }

    /// Whether the function is known and broken, and this domain has no control of it, or has made no use of one without
    /// dom0.
    pub fn is_refused(&self) -> bool {
        let Some(function) = self.function.as_ref() else { return false };
        let unused = |had: &Control| self.untouched && had.reach == Reach::Hardware;
        matches!(self.state, State::Broken(_)) && function.control.as_ref().is_none_or(unused)
    }

    /// Says that the function can't be used, unless a guest uses it or it is known to be broken.
    pub fn refuse_unless_used(&mut self, why: String) {
        if matches!(self.state, State::Ready | State::Resetting) {
            self.handover = None;
            self.refuse(why);
        }
    }

    /// Says that the function can't be used.
    pub fn refuse(&mut self, why: String) {
        self.state = State::Broken(why);
    }

    /// Vendor and device id, if the function could be read.
    pub fn ids(&self) -> Option<(u16, u16)> {
        self.function.as_ref().map(|function| function.config.identity().ids())
    }

    /// The options that are in force, as text; empty if all are as by default.
    pub fn options(&self) -> String {
        let mut entry = self.entry.clone();
        if let Some(function) = &self.function {
            let refused = function.config.refused();
            entry.quirks.retain(|quirk| !refused.iter().any(|(other, _)| other == quirk));
        }
        entry.options()
    }

    /// How the function is reset; without a right to write, by dom0.
    pub fn method(&self) -> Method {
        let control = self.function.as_ref().and_then(|function| function.control.as_ref());
        control.map_or(Method::Dom0, |control| control.method)
    }

    /// How often Xen's MSI-X state was stale and has been reset.
    pub fn stale(&self) -> u32 {
        self.stale
    }

    /// What guests have asked of it since this domain has started; nothing, if it could not be read.
    pub fn counters(&self) -> Counters {
        self.function.as_ref().map(|function| function.counters).unwrap_or_default()
    }

    /// The function for the guest that has it. While it is being handed over, nobody has it.
    pub fn function_of(&mut self, guest: DomId) -> Option<&mut Function<C>> {
        if self.state == State::InUse(guest) { self.function.as_mut() } else { None }
    }

    /// Hardware, virtual configuration space and interrupts.
    pub fn function(&mut self) -> Option<&mut Function<C>> {
        self.function.as_mut()
    }

    /// As [`Device::function`], to look at.
    pub fn peek(&self) -> Option<&Function<C>> {
        self.function.as_ref()
    }

    /// When [`Device::advance`] is to be called.
    pub fn due(&self) -> Option<Nanos> {
        match &self.handover {
            Some(handover) => handover.due(),
            None => self.function.as_ref().and_then(|function| function.waking).map(|waking| waking.due),
        }
    }

    /// The guest has woken the function from D3hot, and `command` is what its Command register held. Until
    /// [`Device::advance`] has given it back what it may have lost, no request reaches it.
    pub fn woken(&mut self, command: u16, now: Nanos) {
        if let Some(function) = self.function.as_mut() {
            let (due, until) = (now.saturating_add(WAKE_PAUSE), now.saturating_add(WAKE));
            function.waking = Some(Waking { command, due, until });
        }
    }

    /// Whether the function is on its way out of D3hot.
    pub fn is_waking(&self) -> bool {
        self.function.as_ref().is_some_and(|function| function.waking.is_some())
    }

    /// Gives a function that its guest has woken what it lost on the way (PCI Power Management 1.2, 5.4.1): its
    /// addresses, what software had set, and decoding; and by Xen its vectors. Bus mastering stays off until the guest
    /// turns it on, as with any reset.
    fn wake<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        let sbdf = self.entry.sbdf;
        let Some(function) = self.function.as_mut() else { return };
        let Some(waking) = function.waking.filter(|waking| waking.due <= now) else { return };
        let Function { hardware, config, interrupts, control, waking: state, .. } = function;
        let power = config.power_control().map_or(0, |at| hardware.read(at, Width::Word) as u16);
        if config.identity().check(hardware).is_err() || power & power::STATE != 0 {
            let due = now.saturating_add(WAKE_PAUSE);
            *state = (now < waking.until).then_some(Waking { due, ..waking });
            if state.is_none() {
                log::warn!("{sbdf}: it does not come back from D3hot, from which its guest woke it");
            }
            return;
        }
        *state = None;
        let Some(Control { image: Some(image), .. }) = control else { return };
        // Some that claim to keep their state do not.
        if power & power::NO_SOFT_RESET != 0 && (image.is_in_place(hardware) || !image.has_addresses()) {
            return;
        }
        if !image.revive(hardware, waking.command & !command::MASTER) {
            log::warn!("{sbdf}: it does not take back what it lost in D3hot, from which its guest woke it");
        }
        if interrupts.is_mapped()
            && let Err(error) = physdev.restore_msi(sbdf)
        {
            log::warn!(
                "{sbdf}: its interrupts are lost: restore_msi_ext answered {error} after its guest woke it from D3hot"
            );
        }
    }

    /// Gives the function to `guest` with a fresh view. Its MSI-X state is checked once more before.
    ///
    /// # Errors
    /// A sentence that says why it can't be given.
    pub fn attach<P: Physdev>(&mut self, guest: DomId, view: GuestView, physdev: &mut P) -> Result<(), String> {
        match &self.state {
            State::Ready => {}
            State::Resetting => return Err("it is being reset: try again in a moment".to_string()),
            State::InUse(owner) => {
                return Err(format!("domain {owner} has it: detach it there first (xl-pciback detach)"));
            }
            State::Broken(reason) => return Err(reason.clone()),
        }
        // What does not answer says nothing true of its MSI-X state either.
        if self.is_stalled(physdev) {
            return Err(UNREACHABLE.to_string());
        }
        let function = self.function.as_ref().ok_or("it was never seized")?;
        function.config.identity().check(&function.hardware).map_err(|refusal| refusal.to_string())?;
        match self.subject(physdev).map(|mut subject| handover::check(&mut subject)) {
            None | Some(Ok(Clean::Already)) => {}
            Some(Ok(Clean::Reset)) => self.found_stale(),
            Some(Err(_)) if self.is_stalled(physdev) => return Err(UNREACHABLE.to_string()),
            Some(Err(dirty)) => {
                self.state = State::Broken(dirty.to_string());
                return Err(dirty.to_string());
            }
        }
        let function = self.function.as_mut().ok_or("it was never seized")?;
        function.config.attach(&mut function.hardware, view).map_err(|refusal| refusal.to_string())?;
        self.owner = Some((guest, view));
        self.state = State::InUse(guest);
        Ok(())
    }

    /// Takes the function from its guest, and starts its hand-over. Nothing of the guest is kept.
    pub fn detach<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        if self.owner.take().is_some() {
            self.begin(physdev, now);
        }
    }

    /// The guest closed its connection and may open another: the function is handed over to the same guest.
    pub fn restart<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        if self.owner.is_some() {
            self.begin(physdev, now);
        }
    }

    /// Tries a broken function again, if it is one that a hand-over can mend; or one that was taken without addresses, as
    /// its former driver domain had died in a reset of it, and dom0 may have put them back.
    pub fn retry<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        self.first_use(physdev, now);
        let renew = self.function.as_ref().is_some_and(|function| {
            // A virtual function's addresses are nowhere in its registers.
            let has = |control: &Control| control.image.as_ref().is_some_and(Image::has_addresses);
            let lost = |control: &Control| !has(control) && !function.config.identity().is_virtual();
            function.control.as_ref().is_some_and(|control| !control.proven || lost(control))
        });
        let wanting = matches!(self.state, State::Broken(_)) || self.state == State::Ready && renew;
        if !wanting || self.is_stalled(physdev) {
            return;
        }
        let sbdf = self.entry.sbdf;
        let Some(Function { hardware, config, interrupts, control: Some(control), .. }) = self.function.as_mut() else {
            return;
        };
        if !control.proven && config.identity().check(hardware).is_err() {
            // Whether a guest of before uses it can't be seen.
            return;
        }
        let free = match control.reach {
            // MSI that is on in a function which this domain has had is its own, and goes off.
            Reach::Hardware => Ok(()),
            _ if control.proven => interrupts.take(physdev, sbdf),
            _ => interrupts.check_msi(hardware).and_then(|()| match interrupts.msix() {
                Some(_) => interrupts.take(physdev, sbdf),
                None if physdev.restore_msi(sbdf) == Err(PhysdevError::Busy) => Err(Dirty::Dom0s),
                None => Ok(()),
            }),
        };
        match free {
            // The hand-over may turn memory decode on.
            Ok(()) | Err(Dirty::Prepare(PhysdevError::NoMemoryDecode)) => {
                if renew
                    && let Some(later) = Image::take(hardware, config)
                    && control.image.as_ref().is_none_or(|image| image.may_become(&later))
                {
                    control.image = Some(later);
                }
                self.begin(physdev, now);
            }
            Err(_) if self.is_stalled(physdev) => {}
            // As long as it is not known that no guest's vectors are mapped, the function must not be touched.
            Err(dirty) => self.state = State::Broken(dirty.to_string()),
        }
    }

    /// The last error that dom0 reported, and what became of it.
    pub fn report(&self) -> Option<&Report> {
        self.report.as_ref()
    }

    /// Whether the function was taken from its guest because of an error that the guest did not cope with, and is still
    /// on the guest's bus.
    pub fn is_held(&self) -> bool {
        let failed = self.report.as_ref().is_some_and(|report| matches!(report.fate, Fate::Failed(_)));
        failed && self.owner.is_some() && matches!(self.state, State::Broken(_))
    }

    /// dom0 reports an error of the function, without a `severity` if it does not say how bad. What a reset of the link
    /// took from a function in use is put back. Returns the guest to be told, and of what; an error that is no worse than
    /// one it is being told of goes with that.
    pub fn error_reported<P: Physdev>(
        &mut self,
        severity: Option<Severity>,
        physdev: &mut P,
        now: Nanos,
    ) -> Option<(DomId, Severity)> {
        let found = self.damage();
        let severity = severity.unwrap_or(found);
        let sbdf = self.entry.sbdf;
        log::warn!("{sbdf}: dom0 reports a {} error", severity.word());
        let fate = match self.state {
            State::InUse(guest) => {
                let report = Report { severity, fate: Fate::Recovering };
                let known = self
                    .report
                    .as_ref()
                    .is_some_and(|known| known.fate == Fate::Recovering && known.severity >= severity);
                if !known {
                    self.report = Some(report);
                }
                if found == Severity::Fatal
                    && let Err(why) = self.mend(physdev)
                {
                    self.hold(why, physdev);
                    return None;
                }
                return (!known).then_some((guest, severity));
            }
            State::Ready => {
                self.begin(physdev, now);
                Fate::Reset("no guest has it")
            }
            State::Resetting => Fate::Reset("it is between guests"),
            State::Broken(ref why) => Fate::Failed(why.clone()),
        };
        self.report = Some(Report { severity, fate });
        None
    }

    /// How bad an error looks in the function's registers.
    fn damage(&self) -> Severity {
        let Some(Function { hardware, config, control, .. }) = self.function.as_ref() else {
            return Severity::Permanent;
        };
        let image = control.as_ref().and_then(|control| control.image.as_ref());
        if config.identity().check(hardware).is_err() {
            Severity::Permanent
        } else if image.is_some_and(|image| !image.is_in_place(hardware)) {
            Severity::Fatal
        } else {
            Severity::NonFatal
        }
    }

    /// Puts back what a reset by somebody else took from a function in use, and has Xen do the same with its vectors.
    fn mend<P: Physdev>(&mut self, physdev: &mut P) -> Result<(), String> {
        if self.is_stalled(physdev) {
            return Err(UNREACHABLE.to_string());
        }
        let sbdf = self.entry.sbdf;
        let Some(Function { hardware, config, interrupts, control: Some(control), .. }) = self.function.as_mut() else {
            return Ok(());
        };
        if let Some(image) = &control.image {
            image.restore(hardware).map_err(|lost| format!("{lost}: reset it from dom0 or power-cycle the host"))?;
            image.tell_lost(hardware, sbdf);
        }
        config.was_reset();
        if interrupts.is_mapped()
            && let Err(error) = physdev.restore_msi(sbdf)
        {
            log::warn!("{sbdf}: its interrupts are lost: restore_msi_ext answered {error} after a reset of its link");
        }
        Ok(())
    }

    /// The recovery that the guest was told of has ended. True if it has failed: the function is held then.
    pub fn recovery_ended<P: Physdev>(&mut self, end: End, physdev: &mut P) -> bool {
        let sbdf = self.entry.sbdf;
        match end {
            End::Recovered => {
                log::info!("{sbdf}: its guest's driver has recovered it");
                if let Some(report) = &mut self.report {
                    report.fate = Fate::Recovered;
                }
                false
            }
            End::Failed(why) => {
                self.hold(why.to_string(), physdev);
                true
            }
        }
    }

    /// The function's driver could not be told of it: nobody uses the function, and a hand-over to the same guest puts
    /// all in order.
    pub fn recover_unused<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        self.restart(physdev, now);
        if let Some(report) = &mut self.report {
            report.fate = Fate::Reset("its guest is not connected");
        }
    }

    /// Takes the function out of the guest's reach, without taking it off its bus: it does no more DMA, sends no
    /// interrupts, and answers nothing, until it is detached or its guest connects anew. Both reset it.
    fn hold<P: Physdev>(&mut self, why: String, physdev: &mut P) {
        let sbdf = self.entry.sbdf;
        if let Some(Function { hardware, config, interrupts, waking, .. }) = self.function.as_mut() {
            *waking = None;
            config.detach(hardware);
            interrupts.disable(&mut Means { hardware, physdev, sbdf, line: false });
        }
        let severity = self.report.as_ref().map_or("", |report| report.severity.word());
        let reason = format!("after a {severity} error {why}; detach it, which resets it");
        log::error!("{sbdf}: broken: {reason}");
        self.state = State::Broken(reason);
        if let Some(report) = &mut self.report {
            report.fate = Fate::Failed(why);
        }
    }

    /// Does what is due of a hand-over. True if the state has changed.
    pub fn advance<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) -> bool {
        let Some(mut handover) = self.handover else {
            self.wake(physdev, now);
            return false;
        };
        let Some(mut subject) = self.subject(physdev) else { return false };
        let progress = handover.advance(&mut subject, now);
        if handover.has_led() {
            self.led.get_or_insert(handover.doubt());
            handover.dismiss();
        }
        if !matches!(progress, Progress::Ready(_)) && self.is_stalled(physdev) {
            // It begins anew with the next session.
            handover.park();
            self.handover = Some(handover);
            return false;
        }
        match progress {
            Progress::Until(_) => {
                self.handover = Some(handover);
                return false;
            }
            Progress::Ready(clean) => {
                self.handover = None;
                if clean == Clean::Reset {
                    self.found_stale();
                }
                self.state = State::Ready;
                if let Some(control) = self.function.as_mut().and_then(|function| function.control.as_mut()) {
                    control.proven = true;
                    if let Some(doubt) = handover.doubt() {
                        let (doubt, remedy) = match doubt {
                            Doubt::KeptAddresses => (
                                format!(
                                    "its reset ({}) changes nothing: it has kept its addresses, so what a guest started in \
                                     it may go on with the next",
                                    control.method.word()
                                ),
                                "reset=bus",
                            ),
                            Doubt::NotDone(error @ PhysdevError::SharedWithOthers) => (
                                format!(
                                    "dom0 does not reset it: {error}: the same reset would reach a function that is not this \
                                     domain's (its log names it), so what a guest started in it may go on with the next"
                                ),
                                "to pass that one through this domain",
                            ),
                            Doubt::NotDone(error) => (
                                format!(
                                    "dom0 does not reset it: {error}, so what a guest started in it may go on with the next"
                                ),
                                "another reset=",
                            ),
                            Doubt::Beside(beside, guest) => (
                                format!(
                                    "it is not reset, as the same reset would reach {beside}, which domain {guest} has, so \
                                     what a guest started in it may go on with the next"
                                ),
                                "one guest for both",
                            ),
                        };
                        if self.entry.strict {
                            self.state = State::Broken(format!("{doubt}; say {remedy}, or take strict out"));
                        } else if !core::mem::replace(&mut control.doubted, true) {
                            log::warn!("{}: {doubt}; {remedy} may help", self.entry.sbdf);
                        }
                    }
                }
                if self.state == State::Ready
                    && let Some((guest, view)) = self.owner.take()
                    && let Err(why) = self.attach(guest, view, physdev)
                {
                    self.owner = Some((guest, view));
                    self.state = State::Broken(why);
                }
            }
            Progress::Broken(why) => {
                self.handover = None;
                self.state = State::Broken(why);
            }
        }
        if let State::Broken(why) = &self.state {
            log::error!("{}: broken: {why}", self.entry.sbdf);
        }
        true
    }

    /// Whether a reset may reach it.
    pub fn rest(&self) -> Rest {
        match (&self.state, &self.handover) {
            (State::InUse(guest), _) => Rest::With(*guest),
            (_, Some(handover)) if !handover.gathers() => Rest::Moving,
            _ => Rest::Still,
        }
    }

    /// Whether its reset waits for the functions beside it to be at rest.
    pub fn gathers(&self) -> bool {
        self.handover.is_some_and(|handover| handover.gathers())
    }

    /// They are: dom0 resets them all. True if it does.
    pub fn lead<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) -> bool {
        let Some(mut handover) = self.handover else { return false };
        let leads = self.subject(physdev).is_some_and(|mut subject| handover.lead(&mut subject, now));
        self.handover = Some(handover);
        leads
    }

    /// dom0 resets it with a function beside it. One that this domain has no control of is left as it is.
    pub fn accompany(&mut self, now: Nanos) {
        let Some(function) = self.function.as_mut().filter(|function| function.control.is_some()) else { return };
        function.waking = None;
        self.handover = Some(HandOver::accompany(now));
        self.state = State::Resetting;
    }

    /// Takes the news that a reset of this function and those beside it has ended.
    pub fn take_led(&mut self) -> Option<Option<Doubt>> {
        self.led.take()
    }

    /// The reset of the function beside it has ended, if it was for this one, too.
    pub fn leave_company(&mut self, doubt: Option<Doubt>, now: Nanos) {
        if let Some(handover) = self.handover.as_mut().filter(|handover| handover.accompanies()) {
            handover.go_on(doubt, now);
        }
    }

    /// Its reset would reach a function that is in use: it is not done.
    pub fn stay_alone(&mut self, beside: Sbdf, guest: DomId, now: Nanos) {
        if let Some(handover) = self.handover.as_mut() {
            handover.go_on(Some(Doubt::Beside(beside, guest)), now);
        }
    }

    /// This domain ends: the guest's vectors go, bus mastering goes off, and Xen gets the MSI-X table back.
    pub fn give_up<P: Physdev>(&mut self, physdev: &mut P) {
        self.owner = None;
        let sbdf = self.entry.sbdf;
        let Some(function) = self.function.as_mut() else { return };
        function.config.detach(&mut function.hardware);
        let Function { hardware, interrupts, .. } = function;
        interrupts.disable(&mut Means { hardware, physdev, sbdf, line: false });
        interrupts.give_back(physdev, sbdf);
    }

    fn found_stale(&mut self) {
        self.stale = self.stale.saturating_add(1);
        log::warn!(
            "{}: Xen still masked all its MSI-X vectors (MASKALL) from before: the state was reset with release_msix and \
             prepare_msix",
            self.entry.sbdf
        );
    }

    fn begin<P: Physdev>(&mut self, physdev: &mut P, now: Nanos) {
        if let Some(report) = self.report.as_mut().filter(|report| report.fate == Fate::Recovering) {
            report.fate = Fate::Reset("its guest has let it go");
        }
        if let Some(function) = self.function.as_mut() {
            function.waking = None;
        }
        if self.handover.is_some() {
            // Nobody has had the function since it began.
            return;
        }
        if let Some(mut subject) = self.subject(physdev) {
            let handover = HandOver::begin(&mut subject, now);
            self.handover = Some(handover);
            self.state = State::Resetting;
            return;
        }
        // Without a right to write there is nothing to do, and nothing was done.
        let Some(function) = self.function.as_mut() else { return };
        function.config.detach(&mut function.hardware);
        if let State::Broken(_) = self.state {
            return;
        }
        self.state = State::Ready;
        if let Some((guest, view)) = self.owner {
            match function.config.attach(&mut function.hardware, view) {
                Ok(()) => self.state = State::InUse(guest),
                Err(refusal) => self.state = State::Broken(refusal.to_string()),
            }
        }
    }

    fn subject<'a, P: Physdev>(&'a mut self, physdev: &'a mut P) -> Option<Subject<'a, C, P>> {
        let sbdf = self.entry.sbdf;
        let Function { hardware, config, interrupts, control, .. } = self.function.as_mut()?;
        let Control { image, method, reach, .. } = control.as_mut()?;
        Some(Subject { hardware, config, interrupts, image, method: *method, reach: *reach, physdev, sbdf })
    }
}
