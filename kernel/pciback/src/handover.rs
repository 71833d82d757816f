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
//!  Drain  -- until no transaction is pending, or the time is over
//!    |
//!  reset: PCIe FLR, AF FLR, D3hot and back, or by dom0 on request
//!    |
//!  Asleep, Bus, Settle -- the time the specification gives the function
//!    |
//!  Answer -- until it answers again, or the time is over: broken
//!    |
//!  restore the image taken when it was seized, and read it back
//!    |
//!  Check  -- Xen's MSI-X state is clean ([`crate::msix_state`]), or broken with the reason
//! ```
//!
//! Times and bits: PCI Express Base 5.0, 6.6.2 (FLR); the Advanced Features ECN; PCI Power Management 1.2, 5.6.1.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::cmdline::Reset;
use crate::config::registers::{EXTENDED, SPACE, advanced, capability, command, express, offset, power};
use crate::config::{Name, VirtualConfig};
use crate::interrupts::{Interrupts, Means};
use crate::msix_state::{self, Clean, Dirty};
use crate::physdev::{Physdev, PhysdevError};
use crate::platform::{ConfigSpace, Nanos, Width};
use crate::sbdf::Sbdf;

const MS: Nanos = 1_000_000;

/// How long Xen may take to unmap a dead guest's vectors.
const UNMAP: Nanos = 10_000 * MS;
/// How often it is looked whether it has.
const UNMAP_PAUSE: Nanos = 20 * MS;
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
/// How long dom0's kernel may take for a reset; resets of its own wait as long for an answer.
const BUS: Nanos = 70_000 * MS;
/// How often dom0 is asked whether it is done.
const BUS_PAUSE: Nanos = 50 * MS;
/// The longest pause between two looks whether it answers; the first is 1 ms and each is twice the one before.
const ANSWER_PAUSE: Nanos = 128 * MS;

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

    /// The method for a function: the wish, if the function can do it, or the first of those it has.
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
        let flr = config.capability(capability::EXPRESS).filter(|at| {
            let register = at + express::DEVICE_CAPABILITIES;
            register + 4 <= EXTENDED && hardware.read(register, Width::Dword) & express::FUNCTION_RESET != 0
        });
        let af = config.capability(capability::ADVANCED).filter(|at| {
            let register = at + advanced::CAPABILITIES;
            register < EXTENDED - 2 && hardware.read(register, Width::Byte) as u8 & advanced::RESET == advanced::RESET
        });
        let keeps_state = |at: &u16| hardware.read(*at, Width::Word) as u16 & power::NO_SOFT_RESET != 0;
        let pm = config.power_control().filter(|at| !keeps_state(at));
        let (flr, af, pm) = (flr.map(Method::Flr), af.map(Method::Af), pm.map(Method::Pm));
        let lacks = |name: &str| format!("reset={name}: the function has no such reset; reset=auto takes what it has");
        match wish {
            Reset::Auto => Ok(flr.or(af).or(pm).unwrap_or(dom0)),
            Reset::Flr => flr.ok_or_else(|| lacks("flr")),
            Reset::Af => af.ok_or_else(|| lacks("af")),
            Reset::Pm => pm.ok_or_else(|| lacks("pm")),
            Reset::Bus => Ok(dom0),
            Reset::None => Ok(Method::Nothing),
        }
    }
}

/// One register of an image.
#[derive(Clone, Copy, Debug)]
struct Saved {
    name: &'static str,
    at: u16,
    width: Width,
    value: u32,
    /// Without it the function cannot be used.
    vital: bool,
}

/// What software set in a function before it was seized, and what a reset takes away.
#[derive(Debug)]
pub struct Image(Vec<Saved>);

/// Extended capabilities with registers that software sets: id, offset, width, name (PCI Express Base 5.0, 7.8
/// and 7.9).
const EXTENDED_REGISTERS: [(u16, u16, Width, &str); 7] = [
    (0x01, 0x08, Width::Dword, "AER uncorrectable mask"),
    (0x01, 0x0c, Width::Dword, "AER uncorrectable severity"),
    (0x01, 0x14, Width::Dword, "AER correctable mask"),
    (0x0d, 0x06, Width::Word, "ACS control"),
    (0x0f, 0x06, Width::Word, "ATS control"),
    (0x18, 0x04, Width::Word, "LTR snoop latency"),
    (0x18, 0x06, Width::Word, "LTR no-snoop latency"),
];

/// Most extended capabilities a list can hold: a dword each.
const MOST_EXTENDED: usize = ((SPACE - EXTENDED) / 4) as usize;

impl Image {
    /// Takes the image of a function that answers.
    pub fn take<C: ConfigSpace>(hardware: &C, config: &VirtualConfig) -> Image {
        let mut registers = Vec::new();
        let mut save = |name, at: u16, width: Width, vital| {
            registers.push(Saved { name, at, width, value: hardware.read(at, width) & width.mask(), vital });
        };
        if let Some(at) = config.capability(capability::EXPRESS) {
            for (register, name) in [
                (express::DEVICE_CONTROL, "Device Control"),
                (express::LINK_CONTROL, "Link Control"),
                (express::DEVICE_CONTROL_2, "Device Control 2"),
                (express::LINK_CONTROL_2, "Link Control 2"),
            ] {
                // A capability of version 1 ends before the second pair.
                let version = hardware.read(at + 2, Width::Word) & 0xf;
                let has = register < express::DEVICE_CONTROL_2 || version >= 2;
                if has && at + register + 2 <= EXTENDED {
                    save(name, at + register, Width::Word, false);
                }
            }
        }
        for (id, at) in if config.has_extended() { extended(hardware) } else { Vec::new() } {
            for (_, register, width, name) in EXTENDED_REGISTERS.iter().filter(|(of, ..)| *of == id) {
                if at + register + width.bytes() <= SPACE {
                    save(name, at + register, *width, false);
                }
            }
        }
        // What a guest may write, it must not leave to the next.
        for register in config.registers().filter(|register| matches!(register.name, Name::Opened { .. })) {
            if let Some(width) = Width::from_bytes(register.length.into()) {
                save("a register of quirk=", register.offset, width, false);
            }
        }
        for bar in 0..6 {
            save("a base address register", offset::BAR0 + 4 * bar, Width::Dword, true);
        }
        save("the ROM's base address register", offset::ROM, Width::Dword, false);
        save("cache line size", offset::CACHE_LINE, Width::Byte, false);
        save("latency timer", offset::LATENCY, Width::Byte, false);
        save("interrupt line", offset::INTERRUPT_LINE, Width::Byte, false);
        // Last, as decoding must not begin before the addresses are there.
        let held = hardware.read(offset::COMMAND, Width::Word);
        let idle = held & !u32::from(command::MASTER) | u32::from(command::INTX_DISABLE);
        registers.push(Saved {
            name: "Command",
            at: offset::COMMAND,
            width: Width::Word,
            value: idle & 0xffff,
            vital: true,
        });
        Image(registers)
    }

    /// Writes what differs.
    ///
    /// # Errors
    /// A sentence, if a register without which the function can't be used does not take its value.
    pub fn restore<C: ConfigSpace>(&self, hardware: &mut C, sbdf: Sbdf) -> Result<(), String> {
        for saved in &self.0 {
            let Saved { name, at, width, value, vital } = *saved;
            let mut read = hardware.read(at, width) & width.mask();
            if read == value {
                continue;
            }
            // Where the host forbids writes, the value read back tells.
            let _ = hardware.write(at, width, value);
            read = hardware.read(at, width) & width.mask();
            // A function without a pin need not implement its switch.
            let same = if at == offset::COMMAND {
                (read ^ value) & !u32::from(command::INTX_DISABLE) == 0
            } else {
                read == value
            };
            if !same && vital {
                return Err(format!(
                    "{name} at {at:#x} does not take back {value:#x}, it reads {read:#x}: reset it from dom0 or \
                     power-cycle the host"
                ));
            }
            if !same {
                log::warn!("{sbdf}: {name} at {at:#x} does not take back {value:#x}, it reads {read:#x}");
            }
        }
        Ok(())
    }

    /// Whether it has any address: one that was taken after a reset which nobody restored has none.
    pub fn has_addresses(&self) -> bool {
        self.addresses().next().is_some()
    }

    /// The base address registers that hold an address.
    fn addresses(&self) -> impl Iterator<Item = &Saved> {
        let is_bar = |saved: &&Saved| (offset::BAR0..offset::BAR0 + 24).contains(&saved.at) && saved.value & !0xf != 0;
        self.0.iter().filter(is_bar)
    }

    /// Whether the function has its addresses.
    pub fn is_in_place<C: ConfigSpace>(&self, hardware: &C) -> bool {
        self.addresses().all(|saved| hardware.read(saved.at, saved.width) == saved.value)
    }

    /// Gives a function that a guest has what it has lost, and `command` last. False if it does not take back what it
    /// needs.
    pub fn revive<C: ConfigSpace>(&self, hardware: &mut C, command: u16) -> bool {
        let mut whole = true;
        for saved in &self.0 {
            let Saved { at, width, vital, .. } = *saved;
            let value = if at == offset::COMMAND { u32::from(command) } else { saved.value };
            if hardware.read(at, width) & width.mask() != value {
                // Where nothing can be written now, the value read back tells.
                let _ = hardware.write(at, width, value);
                whole &= !vital || hardware.read(at, width) & width.mask() == value;
            }
        }
        whole
    }

    /// Whether a function still has its addresses after a reset. Every reset clears its base address registers (PCI
    /// Express Base 5.0, 6.6.2; for D3hot PCI Power Management 1.2, 5.4.1), so such a function was not reset.
    fn addresses_kept<C: ConfigSpace>(&self, hardware: &C) -> bool {
        let mut bars = self.addresses().peekable();
        bars.peek().is_some() && bars.all(|saved| hardware.read(saved.at, saved.width) == saved.value)
    }
}

/// The extended capabilities: ids and offsets.
fn extended<C: ConfigSpace>(hardware: &C) -> Vec<(u16, u16)> {
    let mut found: Vec<(u16, u16)> = Vec::new();
    let mut at = EXTENDED;
    while found.len() < MOST_EXTENDED && at >= EXTENDED && !found.iter().any(|(_, seen)| *seen == at) {
        let header = hardware.read(at, Width::Dword);
        if header == 0 || header == u32::MAX {
            break;
        }
        found.push((header as u16, at));
        at = (header >> 20) as u16 & !3;
    }
    found
}

/// Where the state machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// On its way out of D3hot, where its guest had left it.
    Wake,
    /// Vectors are still mapped; given up at this time.
    Unmap { until: Nanos },
    /// Transactions may be pending; the reset is done at this time at the latest.
    Drain { until: Nanos },
    /// In D3hot.
    Asleep,
    /// dom0 resets it; given up at this time.
    Bus { until: Nanos },
    /// The reset has been done, and the function must not be touched yet.
    Settle,
    /// It may answer with nothing yet; given up at this time.
    Answer { until: Nanos, pause: Nanos },
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
}

/// What a hand-over works on.
pub struct Subject<'a, C, P> {
    /// The function's registers.
    pub hardware: &'a mut C,
    /// Its virtual configuration space.
    pub config: &'a mut VirtualConfig,
    /// Its interrupts.
    pub interrupts: &'a mut Interrupts,
    /// What it is restored to.
    pub image: &'a Image,
    /// How it is reset.
    pub method: Method,
    /// How far this domain can go.
    pub reach: Reach,
    /// Xen.
    pub physdev: &'a mut P,
    /// The function.
    pub sbdf: Sbdf,
}

/// A hand-over under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandOver {
    step: Step,
    due: Nanos,
    doubt: Option<Doubt>,
}

impl HandOver {
    /// Silences the function at once and starts.
    pub fn begin<C: ConfigSpace, P: Physdev>(subject: &mut Subject<'_, C, P>, now: Nanos) -> HandOver {
        subject.config.detach(subject.hardware);
        if let Some(at) = asleep(subject.hardware, subject.config) {
            set_power(subject.hardware, at, 0);
            return HandOver { step: Step::Wake, due: now.saturating_add(POWER), doubt: None };
        }
        HandOver { step: silence(subject, now), due: now, doubt: None }
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
            Step::Wake => {
                // What it has lost on the way, it has lost to its guest too.
                subject.config.detach(subject.hardware);
                self.step = silence(subject, now);
                self.step(subject, now)
            }
            Step::Unmap { until } => match subject.interrupts.unmap(subject.physdev, subject.sbdf) {
                None if subject.interrupts.is_settled(subject.hardware, subject.physdev, subject.sbdf) => {
                    self.drain(subject, now, now.saturating_add(DRAIN))
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
            Step::Drain { until } => self.drain(subject, now, until),
            Step::Asleep => {
                if let Method::Pm(at) = subject.method {
                    set_power(subject.hardware, at, 0);
                }
                self.step = Step::Settle;
                Progress::Until(now.saturating_add(POWER))
            }
            Step::Bus { until } => self.wait_for_dom0(subject, now, until),
            Step::Settle => self.answer(subject, now, now.saturating_add(ANSWER), MS),
            Step::Answer { until, pause } => self.answer(subject, now, until, pause),
            Step::Check { until } => self.check(subject, now, until),
        }
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
        if pending {
            log::warn!("{}: transactions are still pending: it is reset all the same", subject.sbdf);
        }
        let Subject { hardware, method, .. } = subject;
        let settle = match *method {
            Method::Flr(at) => {
                let control = hardware.read(at + express::DEVICE_CONTROL, Width::Word) as u16;
                let reset = control | express::INITIATE_RESET;
                // What is not written does not reset; the image is compared after it.
                let _ = hardware.write(at + express::DEVICE_CONTROL, Width::Word, u32::from(reset));
                FLR
            }
            Method::Af(at) => {
                let reset = u32::from(advanced::INITIATE_RESET);
                let _ = hardware.write(at + advanced::CONTROL, Width::Byte, reset);
                FLR
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
        match subject.physdev.reset(subject.sbdf) {
            // Busy: with an earlier wish for the same.
            Ok(()) | Err(PhysdevError::Busy) => {
                self.step = Step::Bus { until: now.saturating_add(BUS) };
                Progress::Until(now.saturating_add(BUS_PAUSE))
            }
            Err(error) => {
                self.doubt = Some(Doubt::NotDone(error));
                self.answer(subject, now, now.saturating_add(ANSWER), MS)
            }
        }
    }

    fn wait_for_dom0<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
    ) -> Progress {
        match subject.physdev.reset_done(subject.sbdf) {
            Ok(false) if now < until => return Progress::Until(now.saturating_add(BUS_PAUSE)),
            Ok(false) => return Progress::Broken(String::from("dom0 does not finish its reset: see dmesg of dom0")),
            Ok(true) => {}
            Err(error) => self.doubt = Some(Doubt::NotDone(error)),
        }
        self.answer(subject, now, now.saturating_add(ANSWER), MS)
    }

    /// Waits for an answer, then restores.
    fn answer<C: ConfigSpace, P: Physdev>(
        &mut self,
        subject: &mut Subject<'_, C, P>,
        now: Nanos,
        until: Nanos,
        pause: Nanos,
    ) -> Progress {
        if subject.config.identity().check(subject.hardware).is_err() {
            if now >= until {
                return Progress::Broken(format!(
                    "it does not answer {} s after its reset ({}): the vendor register reads {:04x}; power-cycle the \
                     host",
                    ANSWER / (1000 * MS),
                    subject.method.word(),
                    subject.hardware.read(offset::VENDOR, Width::Word)
                ));
            }
            self.step = Step::Answer { until, pause: (2 * pause).min(ANSWER_PAUSE) };
            return Progress::Until(now.saturating_add(pause));
        }
        if let Some(at) = asleep(subject.hardware, subject.config) {
            if now >= until {
                let state = subject.hardware.read(at, Width::Word) as u16 & power::STATE;
                return Progress::Broken(format!("it stays in power state D{state}: power-cycle the host"));
            }
            // It did not hear that it was to wake up.
            set_power(subject.hardware, at, 0);
            self.step = Step::Answer { until, pause };
            return Progress::Until(now.saturating_add(POWER));
        }
        let own = matches!(subject.method, Method::Flr(_) | Method::Af(_) | Method::Pm(_));
        if own && subject.image.addresses_kept(subject.hardware) {
            self.doubt = Some(Doubt::KeptAddresses);
        }
        if let Err(why) = subject.image.restore(subject.hardware, subject.sbdf) {
            return Progress::Broken(why);
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
            Err(dirty) if dirty.may_pass() && now < until => {
                self.step = Step::Check { until };
                Progress::Until(now.saturating_add(UNMAP_PAUSE))
            }
            Err(dirty) => Progress::Broken(dirty.to_string()),
        }
    }
}

/// The MSI-X check of a function whose vectors are all unmapped: before every exposure.
///
/// # Errors
/// Why it may not be exposed.
pub fn check<C: ConfigSpace, P: Physdev>(subject: &mut Subject<'_, C, P>) -> Result<Clean, Dirty> {
    match (subject.reach, subject.interrupts.msix().copied()) {
        (reach, _) if reach.has_physdev() => subject.interrupts.clean(subject.hardware, subject.physdev, subject.sbdf),
        (_, Some(msix)) => msix_state::clear(subject.hardware, &msix).map(|()| Clean::Already),
        (_, None) => Ok(Clean::Already),
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
    let wanted = held & !(power::STATE | power::PME_STATUS | power::PME_ENABLE) | state;
    // The function answers in either state, or is found not to.
    let _ = hardware.write(at, Width::Word, u32::from(wanted));
}
