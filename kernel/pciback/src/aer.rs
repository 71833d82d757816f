//! Errors that dom0 reports of a function, told to the guest that has it: the backend's own requests in the shared page.
//!
//! One [`Reports`] a connection: which functions are being recovered, and the one request that is in the page. The
//! guest is waited for without holding anybody else up, for at most [`PATIENCE`], and what it answers is looked at once
//! and taken for nothing but one of six numbers. Rules: `xen/io/pciif.h`; the order of the steps and what an answer
//! leads to: `pcie_do_recovery` of Linux's `drivers/pci/pcie/err.c`.
//!
//! ```text
//!  detected --can recover--> mmio --recovered--> resume --> recovered
//!     |                        |                   ^
//!     +------need reset------> slot reset ---------+        any other answer, or none: failed
//! ```

use alloc::vec::Vec;
use core::fmt;

use crate::platform::{Nanos, SharedPage};
use crate::topology::{DeviceIndex, Topology};
use crate::wire::{AerRequest, PCIB_ACTIVE, PCIB_AERHANDLER, op};

/// How long the guest's driver may take for one step, as in Linux's xen-pciback: drivers reset their cards in it.
pub const PATIENCE: Nanos = 300_000_000_000;

/// How bad an error is. The order is by badness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The link works, and the function holds what was set in it.
    NonFatal = 1,
    /// The link did not work: dom0's kernel has reset it, and the function with it.
    Fatal = 2,
    /// The function is lost.
    Permanent = 3,
}

impl Severity {
    /// The severity that a wish of dom0's names; `None` for another word.
    pub fn parse(word: &str) -> Option<Severity> {
        [Severity::NonFatal, Severity::Fatal, Severity::Permanent].into_iter().find(|severity| severity.word() == word)
    }

    /// Its word.
    pub const fn word(self) -> &'static str {
        match self {
            Severity::NonFatal => "nonfatal",
            Severity::Fatal => "fatal",
            Severity::Permanent => "permanent",
        }
    }
}

/// A step of a recovery: what the guest's driver is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// An error was detected.
    Detected,
    /// Registers may be accessed again.
    Mmio,
    /// The function was reset.
    SlotReset,
    /// All is well again.
    Resume,
}

impl Call {
    const fn number(self) -> u32 {
        match self {
            Call::Detected => op::AER_DETECTED,
            Call::Mmio => op::AER_MMIO,
            Call::SlotReset => op::AER_SLOT_RESET,
            Call::Resume => op::AER_RESUME,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Call::Detected => "error detected",
            Call::Mmio => "registers accessible",
            Call::SlotReset => "slot reset",
            Call::Resume => "resume",
        })
    }
}

/// What a driver answers, Linux's `pci_ers_result_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Nothing,
    CanRecover,
    NeedReset,
    Disconnect,
    Recovered,
    NoDriver,
}

impl Answer {
    /// The answer of a number out of the shared page.
    fn of(number: i32) -> Option<Answer> {
        Some(match number {
            1 => Answer::Nothing,
            2 => Answer::CanRecover,
            3 => Answer::NeedReset,
            4 => Answer::Disconnect,
            5 => Answer::Recovered,
            6 => Answer::NoDriver,
            _ => return None,
        })
    }
}

/// Why a recovery has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Its frontend does not say that it handles errors.
    NoHandler,
    /// It did not answer this step in time.
    Silent(Call),
    /// It did not answer an earlier request of this connection in time: what it answers now could be meant for that.
    Deaf,
    /// No driver of the guest's has the function, or one that handles no errors.
    NoDriver(Call),
    /// Its driver gives the function up.
    GivenUp(Call),
    /// The driver's answer to this step does not end in a function that works.
    NotRecovered(Call, i32),
    /// The answer is no number that the protocol knows.
    Nonsense(Call, i32),
    /// There is nothing to be recovered.
    Lost,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::NoHandler => f.write_str("its guest's frontend does not handle errors"),
            Failure::Silent(call) => {
                write!(f, "its guest did not answer ({call}) within {} s", PATIENCE / 1_000_000_000)
            }
            Failure::Deaf => f.write_str("its guest left an earlier report unanswered"),
            Failure::NoDriver(call) => write!(f, "its guest has no driver for it that handles errors ({call})"),
            Failure::GivenUp(call) => write!(f, "its guest's driver gives it up ({call})"),
            Failure::NotRecovered(call, number) => {
                write!(f, "its guest's driver did not recover it ({call} was answered with {number})")
            }
            Failure::Nonsense(call, number) => {
                write!(f, "its guest answered {call} with {number}, which means nothing")
            }
            Failure::Lost => f.write_str("the error is permanent"),
        }
    }
}

/// How a recovery has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest's driver goes on with the function.
    Recovered,
    /// It does not, or nobody knows.
    Failed(Failure),
}

/// One function that is being recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Recovery {
    device: DeviceIndex,
    severity: Severity,
    call: Call,
}

impl Recovery {
    /// What the answer to the step leads to: the next one, or the end.
    fn answered(&self, number: i32) -> Result<Call, End> {
        let call = self.call;
        let failed = |why| Err(End::Failed(why));
        if self.severity == Severity::Permanent {
            // That was to let the driver know; nothing it says brings the function back.
            return failed(Failure::Lost);
        }
        if call == Call::Resume {
            // Drivers have nothing to say to that; Linux's frontend always writes 1.
            return Err(End::Recovered);
        }
        let Some(answer) = Answer::of(number) else { return failed(Failure::Nonsense(call, number)) };
        match (call, answer) {
            (_, Answer::Nothing | Answer::NoDriver) => failed(Failure::NoDriver(call)),
            (_, Answer::Disconnect) => failed(Failure::GivenUp(call)),
            (Call::Detected, Answer::CanRecover) => Ok(Call::Mmio),
            (Call::Detected | Call::Mmio, Answer::NeedReset) => Ok(Call::SlotReset),
            (_, Answer::Recovered) => Ok(Call::Resume),
            (_, Answer::CanRecover | Answer::NeedReset) => failed(Failure::NotRecovered(call, number)),
        }
    }
}

/// The request that is in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    /// Whom it is about; `None` if that recovery is over, and only the page is waited for.
    device: Option<DeviceIndex>,
    until: Nanos,
}

/// What is being recovered over one connection. A function is in it once at the most.
#[derive(Debug, Default)]
pub struct Reports {
    /// In the order in which they were reported.
    recoveries: Vec<Recovery>,
    asked: Option<Asked>,
    deaf: bool,
}

impl Reports {
    /// Takes up a report. One of the same function before it is over.
    pub fn take_up(&mut self, device: DeviceIndex, severity: Severity) {
        self.forget(device);
        self.recoveries.push(Recovery { device, severity, call: Call::Detected });
    }

    /// The function is no longer to be recovered. A request about it stays in the page until the guest has answered it,
    /// as it can hold one only.
    pub fn forget(&mut self, device: DeviceIndex) {
        self.recoveries.retain(|recovery| recovery.device != device);
        if let Some(asked) = &mut self.asked {
            asked.device = asked.device.filter(|about| *about != device);
        }
    }

    /// Whether there is nothing to do and nothing to wait for.
    pub fn is_idle(&self) -> bool {
        self.asked.is_none() && self.recoveries.is_empty()
    }

    /// When [`Reports::advance`] is to be called without an event.
    pub fn due(&self) -> Option<Nanos> {
        self.asked.map(|asked| asked.until)
    }

    /// Looks whether the guest has answered and makes the next request, `notify`ing the guest of it. Returns a function
    /// whose recovery has ended, until there is none.
    pub fn advance<P: SharedPage>(
        &mut self,
        page: &P,
        topology: &Topology,
        now: Nanos,
        mut notify: impl FnMut(),
    ) -> Option<(DeviceIndex, End)> {
        loop {
            if let Some(asked) = self.asked {
                let answered = page.flags() & PCIB_ACTIVE == 0;
                if !answered && now < asked.until {
                    return None;
                }
                self.asked = None;
                if !answered {
                    // From now on an answer may be one to this request, whatever is in the page then.
                    page.clear_aer_active();
                    self.deaf = true;
                }
                let Some(place) = self.recoveries.iter().position(|known| Some(known.device) == asked.device) else {
                    continue;
                };
                let recovery = self.recoveries.get_mut(place)?;
                let outcome = if answered {
                    recovery.answered(page.aer_result())
                } else {
                    Err(End::Failed(Failure::Silent(recovery.call)))
                };
                match outcome {
                    Ok(call) => recovery.call = call,
                    Err(end) => return Some((self.recoveries.remove(place).device, end)),
                }
            }
            let recovery = *self.recoveries.first()?;
            let refused = match (self.deaf, page.flags() & PCIB_AERHANDLER) {
                (true, _) => Some(Failure::Deaf),
                (false, 0) => Some(Failure::NoHandler),
                _ => None,
            };
            if let Some(why) = refused {
                self.forget(recovery.device);
                return Some((recovery.device, End::Failed(why)));
            }
            let Some(place) = topology.place_of(recovery.device) else {
                self.forget(recovery.device);
                continue;
            };
            let cmd = recovery.call.number();
            // From the second step on the channel works again.
            let state = if recovery.call == Call::Detected { recovery.severity } else { Severity::NonFatal } as u32;
            let (domain, bus, devfn) = (place.segment().into(), place.bus().into(), place.devfn().into());
            page.aer_request(&AerRequest { cmd, state, domain, bus, devfn });
            page.set_aer_active();
            notify();
            self.asked = Some(Asked { device: Some(recovery.device), until: now.saturating_add(PATIENCE) });
        }
    }
}
