//! One function this domain owns, from its seizure at start to the guest that has it.
//!
//! The state says all: a function in use carries its guest, a broken one its reason. Nothing of one
//! guest reaches the next: what a guest can set lives in the view that is made for it.

use alloc::format;
use alloc::string::{String, ToString};

use crate::cmdline::DeviceConfig;
use crate::config::{GuestView, VirtualConfig};
use crate::platform::{ConfigSpace, DomId};
use crate::sbdf::Sbdf;

/// A function's hardware access and the virtual configuration space over it.
#[derive(Debug)]
pub struct Function<C> {
    /// The hardware.
    pub hardware: C,
    /// What a guest sees.
    pub config: VirtualConfig,
}

/// Where a function stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
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
            State::Ready => "ready",
            State::InUse(_) => "in-use",
            State::Broken(_) => "broken",
        }
    }
}

/// A function of the command line.
#[derive(Debug)]
pub struct Device<C> {
    /// What the command line says of it.
    pub entry: DeviceConfig,
    /// Where it stands.
    pub state: State,
    function: Option<Function<C>>,
    /// What the present guest was given.
    view: Option<GuestView>,
}

impl<C: ConfigSpace> Device<C> {
    /// Seizes a function: finds out whether this domain can serve it. `hardware` is an error sentence
    /// where its configuration space could not be mapped.
    pub fn seize(entry: DeviceConfig, hardware: Result<C, String>) -> Device<C> {
        let seized = hardware.and_then(|hardware| {
            if entry.sbdf == Sbdf::new(0, 0, 0) {
                return Err("it is the host bridge, which is never passed through: remove it from dev=".to_string());
            }
            let config = VirtualConfig::new(&hardware).map_err(|refusal| refusal.to_string())?;
            let (vendor, model) = config.ids();
            match entry.id {
                Some(id) if id != (vendor, model) => Err(format!(
                    "another card is in its place: it is {vendor:04x}:{model:04x}, the command line says {:04x}:{:04x}; \
                     check with lspci and correct id= or the address",
                    id.0, id.1
                )),
                _ => Ok(Function { hardware, config }),
            }
        });
        match seized {
            Ok(function) => Device { entry, state: State::Ready, function: Some(function), view: None },
            Err(reason) => Device { entry, state: State::Broken(reason), function: None, view: None },
        }
    }

    /// Vendor and device id, if the function could be read.
    pub fn ids(&self) -> Option<(u16, u16)> {
        self.function.as_ref().map(|function| function.config.ids())
    }

    /// Hardware and virtual configuration space.
    pub fn function(&mut self) -> Option<&mut Function<C>> {
        self.function.as_mut()
    }

    /// Gives the function to `guest` with a fresh view.
    ///
    /// # Errors
    /// A sentence that says why it can't be given; the state is as before.
    pub fn attach(&mut self, guest: DomId, view: GuestView) -> Result<(), String> {
        match &self.state {
            State::Ready => {}
            State::InUse(owner) => {
                return Err(format!("domain {owner} has it: detach it there first (xl-pciback detach)"));
            }
            State::Broken(reason) => return Err(reason.clone()),
        }
        let function = self.function.as_mut().ok_or("it was never seized")?;
        function.config.attach(&mut function.hardware, view).map_err(|refusal| refusal.to_string())?;
        self.view = Some(view);
        self.state = State::InUse(guest);
        Ok(())
    }

    /// Takes the function from its guest: bus mastering off, nothing of the guest kept.
    pub fn detach(&mut self) {
        // What broke under its guest stays broken, but nothing of the guest stays either.
        if self.view.take().is_some()
            && let Some(function) = self.function.as_mut()
        {
            function.config.detach(&mut function.hardware);
        }
        if let State::InUse(_) = self.state {
            self.state = State::Ready;
        }
    }

    /// The guest closed its connection and may open another: as for a new guest, with the same view.
    pub fn restart(&mut self) {
        if let (Some(function), Some(view)) = (self.function.as_mut(), self.view) {
            function.config.detach(&mut function.hardware);
            if let Err(refusal) = function.config.attach(&mut function.hardware, view) {
                self.state = State::Broken(refusal.to_string());
            }
        }
    }
}
