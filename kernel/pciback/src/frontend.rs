//! The life of one guest's connection: xenbus states, exported functions, shared page, event channel.
//!
//! [`Frontend::reconcile`] reads where both ends stand and does the next step; it may be called at any
//! time, for any event, any number of times. The own state is read from xenstore each time, because
//! the toolstack writes it too. States and their meaning: `xen/io/xenbus.h`; who writes which node:
//! docs/architecture.md.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::config::{GuestView, Resource};
use crate::device::{Device, State};
use crate::nodes::{self, Link, XenbusState, decimal};
use crate::platform::{Channel, Platform, Port, SharedPage, Store, StoreError};
use crate::sbdf::Sbdf;
use crate::serve::{self, Counters, Notice};
use crate::throttle::Throttle;
use crate::topology::{DeviceIndex, Topology};
use crate::wire::{MAGIC, PCIF_ACTIVE};

/// Requests served before the other frontends get their turn.
const REQUESTS_A_TURN: usize = 8;

/// Functions a virtual bus can hold: what `num_devs` may say at most.
const MAX_FUNCTIONS: u32 = 256;

/// What a step may use: the machine and the functions.
pub struct Context<'a, P: Platform> {
    /// The machine.
    pub platform: &'a mut P,
    /// All functions of this domain.
    pub devices: &'a mut [Device<P::Config>],
}

/// A connected frontend. Fields drop in this order: no event comes in for a page that is gone.
struct Connection<P: Platform> {
    channel: P::Channel,
    page: P::Page,
    /// What the frontend published, to notice that it started anew.
    ring: (u32, u32),
}

/// Whether a frontend is still there after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Keep,
    /// It, or its guest, is gone.
    Gone,
}

/// One guest's connection.
pub struct Frontend<P: Platform> {
    link: Link,
    topology: Topology,
    connection: Option<Connection<P>>,
    watching: bool,
    /// The frontend did something wrong and must go through another state before it is tried again.
    faulted: bool,
    more: bool,
    throttle: Throttle,
    counters: Counters,
}

impl<P: Platform> Frontend<P> {
    /// A frontend nothing is known of yet.
    pub fn new(link: Link) -> Frontend<P> {
        Frontend {
            link,
            topology: Topology::default(),
            connection: None,
            watching: false,
            faulted: false,
            more: false,
            throttle: Throttle::default(),
            counters: Counters::default(),
        }
    }

    /// The event channel's port, while connected.
    pub fn port(&self) -> Option<Port> {
        self.connection.as_ref().map(|connection| connection.channel.port())
    }

    /// Whether requests wait that the last turn did not reach.
    pub fn has_more(&self) -> bool {
        self.more
    }

    /// Serves the requests in the shared page, a bounded number of them.
    pub fn serve(&mut self, cx: &mut Context<'_, P>) {
        self.more = false;
        for turn in 0.. {
            let Some(connection) = &self.connection else { return };
            if connection.page.flags() & PCIF_ACTIVE == 0 {
                return;
            }
            if turn == REQUESTS_A_TURN {
                self.more = true;
                return;
            }
            let request = connection.page.request();
            let (reply, notice) = serve::execute(&request, &self.topology, cx.devices, &mut self.counters);
            // A client that gave up has taken the request back; its page is not ours to write then.
            if connection.page.flags() & PCIF_ACTIVE != 0 {
                connection.page.reply(&reply);
                connection.page.clear_active();
                connection.channel.notify();
            }
            if let Some(notice) = notice {
                self.notice(cx, notice, &request);
            }
        }
    }

    fn notice(&mut self, cx: &mut Context<'_, P>, notice: Notice, request: &crate::wire::RawRequest) {
        let Some(dropped) = self.throttle.allow(cx.platform.now()) else { return };
        let (Notice::Dropped(index) | Notice::WritesOff(index) | Notice::Denied(index) | Notice::NoMsi(index)) = notice;
        let Some(device) = cx.devices.get(index) else { return };
        let (sbdf, guest) = (device.entry.sbdf, self.link.frontend);
        let (offset, size, value) = (request.offset, request.size, request.value);
        let suffix = Suppressed(dropped);
        match notice {
            Notice::Dropped(_) => log::warn!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, which no rule allows: ignored, \
                 as all such writes will be (permissive would let them pass){suffix}"
            ),
            Notice::WritesOff(_) => log::warn!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, but writes are off on this \
                 host: refused{suffix}"
            ),
            Notice::Denied(_) => log::info!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, which is the backend's own to \
                 change: refused{suffix}"
            ),
            Notice::NoMsi(_) => {
                log::info!("{sbdf}: domain {guest} asked for MSI or MSI-X: not in this version, it has INTx{suffix}");
            }
        }
    }

    /// Looks where both ends stand and does what follows.
    pub fn reconcile(&mut self, cx: &mut Context<'_, P>) -> Verdict {
        let own = match nodes::read_state(cx.platform.store(), &self.link.back("state")) {
            Ok(Some(own)) => own,
            Ok(None) => {
                self.release_all(cx);
                self.unwatch(cx);
                return Verdict::Gone;
            }
            Err(error) => return self.postpone(cx, error),
        };
        if let Err(why) = self.check_link(cx) {
            if own != XenbusState::Closed {
                self.fault(cx, &why);
            }
            return Verdict::Keep;
        }
        if !self.watching {
            match cx.platform.store().watch(&self.link.front("state"), &self.link.token()) {
                Ok(()) => self.watching = true,
                Err(error) => return self.postpone(cx, error),
            }
        }
        let peer = match nodes::read_state(cx.platform.store(), &self.link.front("state")) {
            Ok(Some(peer)) => peer,
            Ok(None) => {
                log::info!("domain {}: its frontend is gone", self.link.frontend);
                self.release_all(cx);
                self.unwatch(cx);
                self.remove_folder(cx);
                return Verdict::Gone;
            }
            Err(error) => return self.postpone(cx, error),
        };
        if let Err(error) = self.step(cx, own, peer) {
            return self.postpone(cx, error);
        }
        Verdict::Keep
    }

    /// One step of the state machine.
    fn step(&mut self, cx: &mut Context<'_, P>, own: XenbusState, peer: XenbusState) -> Result<(), StoreError> {
        use XenbusState as S;
        self.release_unlisted(cx)?;
        let connected = self.connection.is_some();
        match (own, peer) {
            (S::Unknown | S::Initialising | S::InitWait, _) => {
                self.set_state(cx, S::InitWait)?;
                self.open(cx, peer)
            }
            // The frontend closes, or has.
            (S::Connected | S::Reconfiguring | S::Reconfigured, S::Closing) if connected => {
                self.disconnect(cx);
                self.set_state(cx, S::Closing)
            }
            (S::Connected | S::Reconfiguring | S::Reconfigured | S::Closing, S::Closed | S::Initialising)
                if connected || own == S::Closing =>
            {
                self.disconnect(cx);
                self.set_state(cx, S::Closed)?;
                self.reopen(cx, peer)
            }
            (S::Closing, S::Closing) => Ok(()),
            (S::Closing | S::Closed, _) => self.reopen(cx, peer),
            // It starts anew without having closed.
            (S::Connected | S::Reconfiguring | S::Reconfigured, S::Initialised) if connected => {
                let ring = self.ring(cx).ok();
                if ring.is_some() && ring != self.connection.as_ref().map(|connection| connection.ring) {
                    self.disconnect(cx);
                    self.set_state(cx, S::Initialised)?;
                    self.open(cx, peer)?;
                }
                Ok(())
            }
            // Not connected yet: the set of functions changes without the frontend.
            (S::Initialised | S::Connected | S::Reconfiguring | S::Reconfigured, _) if !connected => {
                self.open(cx, peer)
            }
            (S::Connected | S::Reconfiguring, S::Reconfiguring) => {
                self.sync(cx)?;
                self.set_state(cx, S::Reconfigured)
            }
            (S::Reconfigured, S::Connected) => self.set_state(cx, S::Connected),
            _ => Ok(()),
        }
    }

    /// Exports what is listed, goes to Initialised, and connects if the frontend is ready.
    fn open(&mut self, cx: &mut Context<'_, P>, peer: XenbusState) -> Result<(), StoreError> {
        self.sync(cx)?;
        self.set_state(cx, XenbusState::Initialised)?;
        if peer == XenbusState::Initialised { self.connect(cx) } else { Ok(()) }
    }

    /// After Closed, a frontend may come back as long as the toolstack wants the device online.
    fn reopen(&mut self, cx: &mut Context<'_, P>, peer: XenbusState) -> Result<(), StoreError> {
        if peer == XenbusState::Initialised && self.faulted {
            // It is not tried again as it is, but its list of functions is still the toolstack's to change.
            return self.sync(cx);
        }
        let online = cx.platform.store().read(None, &self.link.back("online"));
        if !online.is_ok_and(|online| online != "0") {
            return Ok(());
        }
        self.faulted = false;
        self.set_state(cx, XenbusState::InitWait)?;
        self.open(cx, peer)
    }

    /// The toolstack's two nodes must say what the path says: nothing else is ever followed.
    fn check_link(&self, cx: &mut Context<'_, P>) -> Result<(), String> {
        let store = cx.platform.store();
        let frontend = store.read(None, &self.link.back("frontend"));
        let id = store.read(None, &self.link.back("frontend-id"));
        match (frontend, id) {
            (Err(StoreError::Timeout), _) | (_, Err(StoreError::Timeout)) => Ok(()),
            (Ok(path), Ok(id))
                if path == self.link.front_folder() && decimal(&id) == Some(u32::from(self.link.frontend)) =>
            {
                Ok(())
            }
            _ => Err(format!(
                "frontend and frontend-id must name {} and {}: attach with xl-pciback",
                self.link.front_folder(),
                self.link.frontend
            )),
        }
    }

    /// Brings the exported functions in line with the toolstack's list.
    fn sync(&mut self, cx: &mut Context<'_, P>) -> Result<(), StoreError> {
        for index in 0..self.num_devs(cx)? {
            let state = nodes::read_state(cx.platform.store(), &self.link.back(&format!("state-{index}")))?;
            match state.unwrap_or(XenbusState::Initialising) {
                XenbusState::Initialising | XenbusState::Initialised => self.export(cx, index)?,
                XenbusState::Closing => {
                    if let Some(device) = self.listed(cx, index)? {
                        self.release(cx, device);
                    }
                    self.write(cx, &format!("state-{index}"), XenbusState::Closed.text())?;
                }
                _ => {}
            }
        }
        self.write(cx, "root-0", "0000:00")?;
        self.write(cx, "root_num", "1")
    }

    /// Releases what the toolstack no longer lists.
    fn release_unlisted(&mut self, cx: &mut Context<'_, P>) -> Result<(), StoreError> {
        let exported: Vec<DeviceIndex> = self.topology.entries().map(|(_, device)| device).collect();
        if exported.is_empty() {
            return Ok(());
        }
        let mut listed = Vec::new();
        for index in 0..self.num_devs(cx)? {
            listed.extend(self.listed(cx, index)?);
        }
        for device in exported {
            if !listed.contains(&device) {
                self.release(cx, device);
            }
        }
        Ok(())
    }

    fn num_devs(&mut self, cx: &mut Context<'_, P>) -> Result<u32, StoreError> {
        let text = match cx.platform.store().read(None, &self.link.back("num_devs")) {
            Err(StoreError::NotFound) => String::new(),
            other => other?,
        };
        match decimal(&text).filter(|count| *count <= MAX_FUNCTIONS) {
            Some(count) => Ok(count),
            None => {
                self.report(cx, &format!("num_devs is {text:?}, not a number up to {MAX_FUNCTIONS}"));
                Ok(0)
            }
        }
    }

    /// The function that `dev-N` names, if it is one of ours.
    fn listed(&self, cx: &mut Context<'_, P>, index: u32) -> Result<Option<DeviceIndex>, StoreError> {
        let text = match cx.platform.store().read(None, &self.link.back(&format!("dev-{index}"))) {
            Err(StoreError::NotFound) => return Ok(None),
            other => other?,
        };
        let sbdf: Option<Sbdf> = text.parse().ok();
        Ok(cx.devices.iter().position(|device| Some(device.entry.sbdf) == sbdf))
    }

    /// Exports function number `index` of the list. What is wrong with it is that function's alone.
    fn export(&mut self, cx: &mut Context<'_, P>, index: u32) -> Result<(), StoreError> {
        match self.try_export(cx, index) {
            Ok(None) => Ok(()),
            Ok(Some(devfn)) => {
                self.write(cx, &format!("vdev-{index}"), &nodes::vdev(devfn))?;
                self.write(cx, &format!("state-{index}"), XenbusState::Initialised.text())
            }
            Err(why) => {
                log::error!("domain {}: function {index} of its list is not exported: {why}", self.link.frontend);
                self.write(cx, &format!("error-{index}"), &why)?;
                self.write(cx, &format!("state-{index}"), XenbusState::Closed.text())
            }
        }
    }

    /// The new virtual devfn, or `None` if the function is exported already.
    fn try_export(&mut self, cx: &mut Context<'_, P>, index: u32) -> Result<Option<u8>, String> {
        let link = self.link;
        let store = cx.platform.store();
        let mut node = |name: &str| store.read(None, &link.back(name)).ok();
        let name = node(&format!("dev-{index}")).ok_or_else(|| format!("dev-{index} is missing"))?;
        let sbdf: Sbdf = name.parse().map_err(|bad| format!("dev-{index} is {name:?}: {bad}"))?;
        let guest = node("domain");
        let irq = node(&format!("irq-{index}"));
        let id = node(&format!("id-{index}"));
        let resources = node(&format!("resource-{index}"));
        let options = node(&format!("opts-{index}")).unwrap_or_default();

        let entry = |device: &Device<P::Config>| device.entry.sbdf == sbdf;
        let position =
            cx.devices.iter().position(entry).ok_or_else(|| {
                format!("{sbdf} is not this driver domain's: add it to iomem= and dev= of its xl config")
            })?;
        if self.topology.devfn_of(position).is_some() {
            return Ok(None);
        }
        let function_0_follows = sbdf.function() == 0 || {
            let zero = Sbdf::new(sbdf.segment(), sbdf.bus(), sbdf.devfn() & !7);
            let wanted = cx.devices.get(position).and_then(|device| device.entry.guest.clone());
            cx.devices
                .iter()
                .any(|device| device.entry.sbdf == zero && device.entry.guest == wanted && wanted.is_some())
        };
        let device = cx.devices.get_mut(position).ok_or("it is gone")?;
        if let Some(wanted) = &device.entry.guest
            && guest.as_ref() != Some(wanted)
        {
            let guest = guest.unwrap_or_default();
            return Err(format!("{sbdf} is for guest {wanted:?} (guest= of its dev= entry), not for {guest:?}"));
        }
        if let (Some(id), Some((vendor, model))) = (id, device.ids())
            && id != format!("{vendor:04x}:{model:04x}")
        {
            return Err(format!("{sbdf} is {vendor:04x}:{model:04x}, but id-{index} says {id}: another card?"));
        }
        let pirq = match irq.as_deref().map(decimal) {
            None => 0,
            Some(Some(irq)) if irq < 255 => irq as u8,
            Some(_) => return Err(format!("irq-{index} is not a number below 255")),
        };
        let resources = resources
            .as_deref()
            .and_then(Resource::parse_list)
            .ok_or_else(|| format!("resource-{index} is missing or malformed: attach with xl-pciback"))?;
        let permissive = device.entry.permissive || options.split(',').any(|option| option == "permissive=1");
        let slot = device.entry.slot;
        device.attach(link.frontend, GuestView { pirq, resources, permissive, multifunction: false })?;
        let Ok(devfn) = self.topology.add(position, sbdf, slot, function_0_follows) else {
            device.detach();
            return Err("the guest's virtual bus is full".to_string());
        };
        self.refresh_multifunction(cx);
        log::info!(
            "{sbdf}: exported to domain {} as {}{}, pirq {pirq}",
            link.frontend,
            nodes::vdev(devfn),
            if permissive { ", permissive" } else { "" }
        );
        Ok(Some(devfn))
    }

    /// The multifunction bit is the truth about the virtual slot, not about the physical one.
    fn refresh_multifunction(&self, cx: &mut Context<'_, P>) {
        for (devfn, device) in self.topology.entries() {
            let several = self.topology.functions_beside(devfn) > 1;
            if let Some(function) = cx.devices.get_mut(device).and_then(Device::function) {
                function.config.set_multifunction(several);
            }
        }
    }

    fn release(&mut self, cx: &mut Context<'_, P>, index: DeviceIndex) {
        if self.topology.devfn_of(index).is_none() {
            return;
        }
        self.topology.remove(index);
        if let Some(device) = cx.devices.get_mut(index) {
            debug_assert_eq!(device.state, State::InUse(self.link.frontend));
            device.detach();
            let Counters { reads, writes, refused_writes, errors } = self.counters;
            log::info!(
                "{}: released by domain {} (connection: {reads} reads, {writes} writes, {refused_writes} refused, \
                 {errors} errors)",
                device.entry.sbdf,
                self.link.frontend
            );
        }
        self.refresh_multifunction(cx);
    }

    /// Ends the connection and gives every function back.
    pub fn release_all(&mut self, cx: &mut Context<'_, P>) {
        self.connection = None;
        let exported: Vec<DeviceIndex> = self.topology.entries().map(|(_, device)| device).collect();
        for device in exported {
            self.release(cx, device);
        }
    }

    /// Connects to a frontend that says it is ready.
    fn connect(&mut self, cx: &mut Context<'_, P>) -> Result<(), StoreError> {
        let magic = cx.platform.store().read(None, &self.link.front("magic"));
        if magic == Err(StoreError::Timeout) {
            return Err(StoreError::Timeout);
        }
        if magic.as_deref() != Ok(MAGIC) {
            self.fault(cx, &format!("its magic is not {MAGIC:?}: this backend speaks no other version of pciif"));
            return Ok(());
        }
        let ring = match self.ring(cx) {
            Ok(ring) => ring,
            Err(why) => {
                self.fault(cx, &why);
                return Ok(());
            }
        };
        let frontend = self.link.frontend;
        let mapped = cx.platform.map_page(frontend, ring.0);
        let bound = mapped.and_then(|page| Ok((page, cx.platform.bind_channel(frontend, ring.1)?)));
        match bound {
            Ok((page, channel)) => {
                self.connection = Some(Connection { channel, page, ring });
                // A request may be there already, and its event may have come before the port was bound.
                self.more = true;
                self.counters = Counters::default();
                self.set_state(cx, XenbusState::Connected)?;
                // What stood there has been mended; a node that never was is no error.
                let _ = cx.platform.store().remove(None, &self.link.back("error"));
                log::info!("domain {frontend}: connected");
            }
            Err(why) => self.fault(cx, &format!("its page or event channel cannot be used: {why}")),
        }
        Ok(())
    }

    /// Grant reference and port that the frontend published.
    fn ring(&self, cx: &mut Context<'_, P>) -> Result<(u32, u32), String> {
        let mut number = |name: &str| {
            let text =
                cx.platform.store().read(None, &self.link.front(name)).map_err(|error| format!("{name}: {error}"))?;
            decimal(&text).ok_or_else(|| format!("{name} is not a number"))
        };
        Ok((number("pci-op-ref")?, number("event-channel")?))
    }

    /// Drops page and channel; every function of the guest starts afresh for the next connection.
    fn disconnect(&mut self, cx: &mut Context<'_, P>) {
        if self.connection.take().is_none() {
            return;
        }
        self.more = false;
        log::info!("domain {}: disconnected", self.link.frontend);
        for (_, index) in self.topology.entries() {
            if let Some(device) = cx.devices.get_mut(index) {
                device.restart();
            }
        }
        self.refresh_multifunction(cx);
    }

    /// Tells a connected frontend that the backend goes away.
    pub fn shutdown(&mut self, cx: &mut Context<'_, P>) {
        self.release_all(cx);
        for state in [XenbusState::Closing, XenbusState::Closed] {
            // The domain ends; what cannot be written now never will be.
            let _ = self.set_state(cx, state);
        }
    }

    /// The frontend is at fault: says so, closes, and waits for it to start anew.
    fn fault(&mut self, cx: &mut Context<'_, P>, why: &str) {
        self.disconnect(cx);
        self.faulted = true;
        self.report(cx, why);
        // Without xenstore the next event tries again.
        let _ = self.set_state(cx, XenbusState::Closed);
    }

    /// Puts a sentence where people and tools look for it.
    fn report(&mut self, cx: &mut Context<'_, P>, why: &str) {
        if let Some(dropped) = self.throttle.allow(cx.platform.now()) {
            log::error!("domain {}: {why}{}", self.link.frontend, Suppressed(dropped));
        }
        // The state is what counts; the sentence is help.
        let _ = cx.platform.store().write(None, &self.link.back("error"), why);
        let _ = cx.platform.store().write(None, &format!("error/{}/error", self.link.back_folder()), why);
    }

    /// xenstore failed: the next event of this frontend tries again.
    fn postpone(&mut self, cx: &mut Context<'_, P>, error: StoreError) -> Verdict {
        if self.throttle.allow(cx.platform.now()).is_some() {
            log::warn!("domain {}: xenstore: {error}; tried again at the next change", self.link.frontend);
        }
        Verdict::Keep
    }

    fn set_state(&self, cx: &mut Context<'_, P>, state: XenbusState) -> Result<(), StoreError> {
        let now = nodes::read_state(cx.platform.store(), &self.link.back("state"))?;
        match now {
            // The toolstack removed the folder meanwhile: writing would make it anew.
            None => Ok(()),
            Some(now) if now == state => Ok(()),
            Some(_) => self.write(cx, "state", state.text()),
        }
    }

    fn write(&self, cx: &mut Context<'_, P>, node: &str, value: &str) -> Result<(), StoreError> {
        cx.platform.store().write(None, &self.link.back(node), value)
    }

    fn unwatch(&mut self, cx: &mut Context<'_, P>) {
        if core::mem::take(&mut self.watching) {
            // A watch that can't be removed brings events that find nothing.
            let _ = cx.platform.store().unwatch(&self.link.front("state"), &self.link.token());
        }
    }

    /// All watches are lost with a xenstore connection.
    pub fn forget_watch(&mut self) {
        self.watching = false;
    }

    /// Removes what is left of a guest that is gone.
    fn remove_folder(&self, cx: &mut Context<'_, P>) {
        let store = cx.platform.store();
        for path in [self.link.back_folder(), format!("error/{}", self.link.back_folder())] {
            if let Err(error) = store.remove(None, &path)
                && error != StoreError::NotFound
            {
                log::warn!("domain {}: {path} cannot be removed: {error}", self.link.frontend);
            }
        }
        let parent = format!("{}/{}", nodes::BACKEND, self.link.frontend);
        if store.list(None, &parent).is_ok_and(|children| children.is_empty()) {
            // Only tidiness: an empty folder harms nobody.
            let _ = store.remove(None, &parent);
        }
    }
}

/// The end of a log line after others were dropped.
struct Suppressed(u32);

impl core::fmt::Display for Suppressed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " ({} lines before this one were suppressed)", self.0) }
    }
}
