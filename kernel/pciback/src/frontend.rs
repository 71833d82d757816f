//! The life of one guest's connection: xenbus states, exported functions, shared page, event channel.
//!
//! [`Frontend::reconcile`] reads where both ends stand and does the next step; it may be called at any
//! time, for any event, any number of times. The own state is read from xenstore each time, because
//! the toolstack writes it too. States and their meaning: `xen/io/xenbus.h`; who writes which node:
//! docs/architecture.md.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use crate::aer::{Reports, Severity};
use crate::config::{GuestView, Resource};
use crate::device::{Device, State};
use crate::nodes::{self, Link, XenbusState, decimal};
use crate::platform::{Channel, ConfigSpace, Nanos, Platform, Port, SharedPage, Store, StoreError, Transaction};
use crate::sbdf::Sbdf;
use crate::serve::{self, Counters, Desk, Notice};
use crate::throttle::{Pace, Throttle};
use crate::topology::{self, DeviceIndex, Topology, Wish};
use crate::wire::{MAGIC, MAX_VECTORS, MsixEntries, MsixEntry, PCIF_ACTIVE, op};

/// Configuration accesses served before the other frontends get their turn.
const REQUESTS_A_TURN: usize = 8;

/// Functions one domain can own: what `num_devs` may say at most.
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
    /// It has been seen beyond Initialised: if it is there again, it started anew, maybe with the same numbers.
    answered: bool,
}

/// Whether a frontend is still there after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is.
    Keep,
    /// It, or its guest, is gone.
    Gone,
    /// xenstore failed on the way: the step has to be tried again.
    Failed(StoreError),
}

/// Whether all functions that are to be exported are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Export {
    /// All are, or were refused.
    Complete,
    /// One is still being reset.
    Later,
}

/// One function of the toolstack's list.
struct Listed {
    index: u32,
    /// Text of `dev-N`.
    name: Option<String>,
    /// Text of `state-N`.
    state: XenbusState,
    /// What else is said of it; only read of a function that is not exported yet.
    terms: Terms,
}

impl Listed {
    fn sbdf(&self) -> Option<Sbdf> {
        self.name.as_deref()?.parse().ok()
    }
}

/// The conditions under which a function is exported, as the nodes have them.
#[derive(Default)]
struct Terms {
    guest: Option<String>,
    irq: Option<String>,
    id: Option<String>,
    resources: Option<String>,
    options: Option<String>,
}

/// What is to be written of one function of the list: nodes without their number, `None` to remove one.
struct Told<'a> {
    function: &'a Listed,
    nodes: Vec<(&'static str, Option<String>)>,
}

/// One guest's connection.
pub struct Frontend<P: Platform> {
    link: Link,
    topology: Topology,
    connection: Option<Connection<P>>,
    watching: bool,
    /// The frontend did something wrong and must go through another state before it is tried again.
    faulted: bool,
    /// A listed function is being reset, and this waits for it to end.
    waiting: bool,
    more: bool,
    /// A request waits for this function to come out of D3hot.
    held: Option<DeviceIndex>,
    throttle: Throttle,
    pace: Pace,
    /// When to look at its nodes, because it has changed them too often.
    postponed: Option<Nanos>,
    /// Errors that the guest is being told of over this connection.
    reports: Reports,
    /// The node that says that it did not cope with one stands.
    marked: bool,
    /// Room for the MSI-X entries of one request.
    entries: Box<MsixEntries>,
}

impl<P: Platform> Frontend<P> {
    /// A frontend nothing is known of yet.
    pub fn new(link: Link, topology: topology::Kind) -> Frontend<P> {
        Frontend {
            link,
            topology: Topology::new(topology),
            connection: None,
            watching: false,
            faulted: false,
            waiting: false,
            more: false,
            held: None,
            throttle: Throttle::default(),
            pace: Pace::default(),
            postponed: None,
            reports: Reports::default(),
            marked: false,
            entries: Box::new([MsixEntry::default(); MAX_VECTORS]),
        }
    }

    /// The event channel's port, while connected.
    pub fn port(&self) -> Option<Port> {
        self.connection.as_ref().map(|connection| connection.channel.port())
    }

    /// Whether requests wait that the last turn did not reach, and can be served now.
    pub fn has_more(&self, devices: &[Device<P::Config>]) -> bool {
        self.more || self.held.and_then(|held| devices.get(held)).is_some_and(|device| !device.is_waking())
    }

    /// Whether a function it waits for was being reset at the last look.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Whether its nodes, which have changed, may be looked at now; if not, they are later.
    pub fn may_look(&mut self, now: Nanos) -> bool {
        match self.pace.look(now) {
            Ok(()) => true,
            Err(later) => {
                self.postponed = Some(later);
                false
            }
        }
    }

    /// When to look at its nodes without another event.
    pub fn look_due(&self) -> Option<Nanos> {
        self.postponed
    }

    /// Whether this guest has the function.
    pub fn has(&self, device: DeviceIndex) -> bool {
        self.topology.place_of(device).is_some()
    }

    /// When [`Frontend::go_on`] is to be called without an event.
    pub fn due(&self) -> Option<Nanos> {
        self.reports.due()
    }

    /// dom0 reports an error of a function that this guest has.
    pub fn report_error(&mut self, cx: &mut Context<'_, P>, index: DeviceIndex, severity: Severity) {
        if self.connection.is_some() {
            self.reports.take_up(index, severity);
            self.go_on(cx);
        } else if let Some(device) = cx.devices.get_mut(index) {
            let now = cx.platform.now();
            device.recover_unused(cx.platform.physdev(), now);
        }
    }

    /// Goes on with the recovery of functions. True if one has ended.
    pub fn go_on(&mut self, cx: &mut Context<'_, P>) -> bool {
        let mut any = false;
        while let Some(Connection { page, channel, .. }) = &self.connection
            && let Some((index, end)) =
                self.reports.advance(page, &self.topology, cx.platform.now(), || channel.notify())
        {
            any = true;
            let Some(device) = cx.devices.get_mut(index) else { continue };
            if device.recovery_ended(end, cx.platform.physdev()) {
                self.mark(cx, true);
            }
        }
        any
    }

    /// Writes, or removes, the node by which Linux's xen-pciback says that a guest did not cope with an error.
    fn mark(&mut self, cx: &mut Context<'_, P>, failed: bool) {
        if core::mem::replace(&mut self.marked, failed) == failed {
            return;
        }
        let path = self.link.back("aerState");
        // Only for people and tools that look for it: what counts is the function's own state.
        let _ = self.change(cx, |store, tx| {
            if failed { store.write(Some(tx), &path, "aerfail") } else { store.remove(Some(tx), &path) }
        });
    }

    /// Functions have left the guest, or come to it afresh.
    fn refresh_mark(&mut self, cx: &mut Context<'_, P>) {
        if !self.topology.entries().any(|(_, index)| cx.devices.get(index).is_some_and(Device::is_held)) {
            self.mark(cx, false);
        }
    }

    /// Serves the requests in the shared page, a bounded number of them. True if the interrupts of a function
    /// were changed, or the recovery of one has ended.
    pub fn serve(&mut self, cx: &mut Context<'_, P>) -> bool {
        self.more = false;
        self.held = None;
        let mut changed = !self.reports.is_idle() && self.go_on(cx);
        let mut left = REQUESTS_A_TURN;
        while let Some(connection) = &self.connection {
            if connection.page.flags() & PCIF_ACTIVE == 0 {
                break;
            }
            if left == 0 {
                self.more = true;
                break;
            }
            let request = connection.page.request();
            // An operation on interrupts costs hypercalls by the hundred: it is a turn of its own.
            left = if matches!(request.cmd, op::CONF_READ | op::CONF_WRITE) { left - 1 } else { 0 };
            let entries = self.entries.get_mut(..request.entries()).unwrap_or_default();
            connection.page.msix_entries(entries);
            let guest = self.link.frontend;
            let mut desk =
                Desk { guest, topology: &self.topology, devices: cx.devices, physdev: cx.platform.physdev() };
            let (reply, mut notice) = match serve::execute(&request, entries, &mut desk) {
                Ok(done) => done,
                Err(waking) => {
                    self.held = Some(waking);
                    break;
                }
            };
            // A client that gave up has taken the request back; its page is not ours to write then.
            if connection.page.flags() & PCIF_ACTIVE != 0 {
                if reply.err == 0 {
                    connection.page.reply_vectors(entries);
                }
                connection.page.reply(&reply);
                connection.page.clear_active();
                connection.channel.notify();
            } else if let Some(undone) = serve::withdrawn(&request, &reply, &mut desk) {
                notice = Some(undone);
            }
            if let Some(notice) = notice {
                changed |= notice.changes_interrupts();
                if let Notice::Woken(index, command) = notice
                    && let Some(device) = cx.devices.get_mut(index)
                {
                    device.woken(command, cx.platform.now());
                }
                self.notice(cx, notice, &request);
            }
        }
        changed
    }

    fn notice(&mut self, cx: &mut Context<'_, P>, notice: Notice, request: &crate::wire::RawRequest) {
        let Some(dropped) = self.throttle.allow(cx.platform.now()) else { return };
        let Some(device) = cx.devices.get(notice.device()) else { return };
        let (sbdf, guest) = (device.entry.sbdf, self.link.frontend);
        let (offset, size, value) = (request.offset, request.size, request.value);
        let suffix = Suppressed(dropped);
        match notice {
            Notice::Dropped(_) => log::warn!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, which no rule allows: ignored, \
                 as all such writes will be (permissive would let them pass){suffix}"
            ),
            Notice::WritesOff(_) => log::warn!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, but nothing can be \
                 written now (see the mode): refused{suffix}"
            ),
            Notice::Denied(_) => log::info!(
                "{sbdf}: domain {guest} wrote {value:#x} ({size} bytes) to {offset:#x}, which is the backend's own to \
                 change: refused{suffix}"
            ),
            Notice::Enabled(_) => {
                let Some(function) = device.peek() else { return };
                let ((kind, vectors), pirqs) = (function.interrupts.in_use(), function.interrupts.pirqs());
                log::info!(
                    "{sbdf}: domain {guest}: {} on, {vectors} vectors, mapped by map_pirq to pirqs {pirqs:?}{suffix}",
                    kind.word()
                );
            }
            Notice::NotEnabled(_, kind, why) => {
                log::warn!("{sbdf}: domain {guest}: {} not enabled: {why}{suffix}", kind.word());
            }
            Notice::Disabled(_, kind, None) => {
                log::info!("{sbdf}: domain {guest}: {} off, unmapped by unmap_pirq{suffix}", kind.word());
            }
            Notice::Woken(..) => log::debug!("{sbdf}: domain {guest} woke it from D3hot{suffix}"),
            Notice::Disabled(_, kind, Some(why)) => {
                log::warn!("{sbdf}: domain {guest}: {} off, but unmap_pirq answered {why}{suffix}", kind.word());
            }
        }
    }

    /// Looks where both ends stand and does what follows.
    pub fn reconcile(&mut self, cx: &mut Context<'_, P>) -> Verdict {
        self.postponed = None;
        let own = match nodes::read_state(cx.platform.store(), &self.link.back("state")) {
            Ok(Some(own)) => own,
            Ok(None) => {
                self.release_all(cx);
                self.unwatch(cx);
                let _ = self.remove_folders(cx, &[self.link.error_folder()]);
                return Verdict::Gone;
            }
            Err(error) => return self.postpone(cx, error),
        };
        match self.check_link(cx) {
            Ok(Ok(())) => {}
            Ok(Err(why)) => {
                if own != XenbusState::Closed {
                    self.fault(cx, &why);
                }
                return Verdict::Keep;
            }
            Err(error) => return self.postpone(cx, error),
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
                if let Err(error) = self.remove_folders(cx, &[self.link.back_folder(), self.link.error_folder()]) {
                    return self.postpone(cx, error);
                }
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
        if core::mem::take(&mut self.waiting) {
            // What was released may have been reset meanwhile; that is told in every state.
            self.sync(cx, false)?;
        }
        let connected = self.connection.is_some();
        let answered = self.connection.as_ref().is_some_and(|connection| connection.answered);
        if let Some(connection) = &mut self.connection {
            connection.answered |= peer != S::Initialised;
        }
        match (own, peer) {
            (S::Unknown | S::Initialising | S::InitWait, _) => {
                self.disconnect(cx);
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
            (S::Closing, S::Closing) => self.sync(cx, false).map(drop),
            (S::Closing | S::Closed, _) => self.reopen(cx, peer),
            // It starts anew without having closed; or it waits for a Connected that could not be written.
            (S::Initialised | S::Connected | S::Reconfiguring | S::Reconfigured, S::Initialised) if connected => {
                let ring = self.ring(cx)?.ok();
                let another = ring != self.connection.as_ref().map(|connection| connection.ring);
                if ring.is_some() && (another || answered) {
                    self.disconnect(cx);
                    self.set_state(cx, S::Initialised)?;
                    self.open(cx, peer)
                } else if own == S::Initialised {
                    self.set_state(cx, S::Connected)
                } else {
                    Ok(())
                }
            }
            (S::Initialised, _) if connected => {
                self.disconnect(cx);
                self.open(cx, peer)
            }
            // Not connected yet: the set of functions changes without the frontend.
            (S::Initialised | S::Connected | S::Reconfiguring | S::Reconfigured, _) if !connected => {
                self.open(cx, peer)
            }
            (S::Connected | S::Reconfiguring, S::Reconfiguring) => {
                if self.sync(cx, true)? == Export::Later {
                    Ok(())
                } else {
                    self.set_state(cx, S::Reconfigured)
                }
            }
            (S::Reconfigured, S::Connected) => self.set_state(cx, S::Connected),
            _ => Ok(()),
        }
    }

    /// Exports what is listed, goes to Initialised, and connects if the frontend is ready.
    fn open(&mut self, cx: &mut Context<'_, P>, peer: XenbusState) -> Result<(), StoreError> {
        if self.sync(cx, true)? == Export::Later {
            return Ok(());
        }
        self.set_state(cx, XenbusState::Initialised)?;
        if peer == XenbusState::Initialised { self.connect(cx) } else { Ok(()) }
    }

    /// After Closed, a frontend may come back as long as the toolstack wants the device online.
    fn reopen(&mut self, cx: &mut Context<'_, P>, peer: XenbusState) -> Result<(), StoreError> {
        if peer == XenbusState::Initialised && self.faulted {
            // It is not tried again as it is, but its list of functions is still the toolstack's to change.
            return self.sync(cx, true).map(drop);
        }
        let online = nodes::read_optional(cx.platform.store(), None, &self.link.back("online"))?;
        if online.is_none_or(|online| online == "0") {
            return self.sync(cx, false).map(drop);
        }
        self.faulted = false;
        self.set_state(cx, XenbusState::InitWait)?;
        self.open(cx, peer)
    }

    /// The toolstack's two nodes must say what the path says: nothing else is ever followed.
    fn check_link(&self, cx: &mut Context<'_, P>) -> Result<Result<(), String>, StoreError> {
        let store = cx.platform.store();
        let path = nodes::read_optional(store, None, &self.link.back("frontend"))?;
        let id = nodes::read_optional(store, None, &self.link.back("frontend-id"))?;
        let (folder, frontend) = (self.link.front_folder(), self.link.frontend);
        if path.as_ref() == Some(&folder) && id.as_deref().and_then(decimal) == Some(u32::from(frontend)) {
            return Ok(Ok(()));
        }
        Ok(Err(format!("frontend and frontend-id must name {folder} and {frontend}: attach with xl-pciback")))
    }

    /// Brings the exported functions in line with the toolstack's list; without `export`, only what is to go
    /// goes.
    ///
    /// A function that is being reset is left for later: it is neither exported nor said to be released before
    /// that has ended.
    fn sync(&mut self, cx: &mut Context<'_, P>, export: bool) -> Result<Export, StoreError> {
        for _ in 0..nodes::TRIES {
            let list = self.list(cx)?.unwrap_or_default();
            let mut told = Vec::new();
            let mut outcome = Export::Complete;
            for function in &list {
                let device = position(cx.devices, function.sbdf());
                let wanted = matches!(function.state, XenbusState::Initialising | XenbusState::Initialised) && export;
                if let (XenbusState::Closing, Some(device)) = (function.state, device) {
                    self.release(cx, device);
                }
                if let (true, Some(device)) = (wanted, device.and_then(|device| cx.devices.get_mut(device))) {
                    let now = cx.platform.now();
                    device.first_use(cx.platform.physdev(), now);
                }
                let resetting = device
                    .and_then(|device| cx.devices.get(device))
                    .is_some_and(|device| device.state == State::Resetting);
                if (wanted || function.state == XenbusState::Closing) && resetting {
                    self.waiting = true;
                    if wanted {
                        outcome = Export::Later;
                    }
                    continue;
                }
                let nodes = match function.state {
                    _ if wanted => self.export(cx, function, &list),
                    XenbusState::Closing => vec![("state", Some(XenbusState::Closed.text().to_string()))],
                    _ => continue,
                };
                if !nodes.is_empty() {
                    told.push(Told { function, nodes });
                }
            }
            if self.tell(cx, &told, export)? {
                return Ok(outcome);
            }
        }
        Err(StoreError::Again)
    }

    /// Writes what is to be said of the list's functions. False if the list is another one by now: what is
    /// said of one function must not land on another that has got its number.
    fn tell(&self, cx: &mut Context<'_, P>, told: &[Told<'_>], roots: bool) -> Result<bool, StoreError> {
        if told.is_empty() && !roots {
            return Ok(true);
        }
        let link = self.link;
        let written = self.change(cx, |store, tx| {
            for Told { function, nodes } in told {
                let index = function.index;
                if nodes::read_optional(store, Some(tx), &link.back(&format!("dev-{index}")))? != function.name {
                    return Ok(false);
                }
                for (node, value) in nodes {
                    let path = link.back(&format!("{node}-{index}"));
                    match value {
                        Some(value) => store.write(Some(tx), &path, value)?,
                        None => match store.remove(Some(tx), &path) {
                            Ok(()) | Err(StoreError::NotFound) => {}
                            Err(error) => return Err(error),
                        },
                    }
                }
            }
            if roots {
                for (number, (segment, bus)) in self.topology.roots().iter().enumerate() {
                    store.write(
                        Some(tx),
                        &link.back(&format!("root-{number}")),
                        &format!("{segment:04x}:{bus:02x}"),
                    )?;
                }
                store.write(Some(tx), &link.back("root_num"), &self.topology.roots().len().to_string())?;
            }
            Ok(true)
        })?;
        Ok(written.unwrap_or(true))
    }

    /// Releases what the toolstack no longer lists.
    fn release_unlisted(&mut self, cx: &mut Context<'_, P>) -> Result<(), StoreError> {
        let exported: Vec<DeviceIndex> = self.topology.entries().map(|(_, device)| device).collect();
        if exported.is_empty() {
            return Ok(());
        }
        let Some(list) = self.list(cx)? else { return Ok(()) };
        let listed: Vec<_> = list.iter().filter_map(|function| position(cx.devices, function.sbdf())).collect();
        for device in exported {
            if !listed.contains(&device) {
                self.release(cx, device);
            }
        }
        Ok(())
    }

    /// The toolstack's list as it is at one moment: it renumbers its entries when one leaves, and half of the
    /// old list with half of the new would miss one. `None` if it can't be made out.
    fn list(&mut self, cx: &mut Context<'_, P>) -> Result<Option<Vec<Listed>>, StoreError> {
        let (link, topology) = (self.link, &self.topology);
        let Context { platform, devices } = cx;
        let list = nodes::transact(platform.store(), |store, tx| {
            let mut node = |name: &str| nodes::read_optional(store, Some(tx), &link.back(name));
            let count = node("num_devs")?.unwrap_or_default();
            let Some(number) = decimal(&count).filter(|number| *number <= MAX_FUNCTIONS) else {
                return Ok(Err(count));
            };
            let mut list = Vec::new();
            for index in 0..number {
                let name = node(&format!("dev-{index}"))?;
                let state = node(&format!("state-{index}"))?;
                let state = state.map_or(XenbusState::Initialising, |text| XenbusState::parse(&text));
                let mut function = Listed { index, name, state, terms: Terms::default() };
                let exported = position(devices, function.sbdf()).and_then(|device| topology.place_of(device));
                let wanted = matches!(state, XenbusState::Initialising | XenbusState::Initialised);
                if wanted && exported.is_none() {
                    function.terms = Terms {
                        guest: node("domain")?,
                        irq: node(&format!("irq-{index}"))?,
                        id: node(&format!("id-{index}"))?,
                        resources: node(&format!("resource-{index}"))?,
                        options: node(&format!("opts-{index}"))?,
                    };
                }
                list.push(function);
            }
            Ok(Ok(list))
        })?;
        match list {
            Ok(list) => Ok(Some(list)),
            Err(count) => {
                self.report(cx, &format!("num_devs is {count:?}, not a number up to {MAX_FUNCTIONS}"));
                Ok(None)
            }
        }
    }

    /// Exports one function of the list, and returns what is to be said of it. What is wrong with it is that
    /// function's alone.
    fn export(
        &mut self,
        cx: &mut Context<'_, P>,
        function: &Listed,
        list: &[Listed],
    ) -> Vec<(&'static str, Option<String>)> {
        let exported = position(cx.devices, function.sbdf()).and_then(|device| self.topology.place_of(device));
        let mut before = list.iter().take_while(|other| other.index < function.index);
        let twice = function.sbdf().is_some() && before.any(|other| other.sbdf() == function.sbdf());
        let outcome = match exported {
            _ if twice => Err(format!("{} is listed twice", function.name.as_deref().unwrap_or_default())),
            // Both nodes are written together, so the address stands there too.
            Some(_) if function.state == XenbusState::Initialised => return Vec::new(),
            Some(place) => Ok(place),
            None => self.try_export(cx, function, list),
        };
        match outcome {
            Ok(place) => vec![
                ("error", None),
                ("vdev", Some(nodes::vdev(place))),
                ("state", Some(XenbusState::Initialised.text().to_string())),
            ],
            Err(why) => {
                let (guest, index) = (self.link.frontend, function.index);
                log::error!("domain {guest}: function {index} of its list is not exported: {why}");
                vec![("error", Some(why)), ("state", Some(XenbusState::Closed.text().to_string()))]
            }
        }
    }

    /// Exports a function that is not exported yet, and returns where the guest sees it.
    fn try_export(&mut self, cx: &mut Context<'_, P>, function: &Listed, list: &[Listed]) -> Result<Sbdf, String> {
        let Listed { index, name, terms, .. } = function;
        let name = name.as_deref().ok_or_else(|| format!("dev-{index} is missing"))?;
        let sbdf: Sbdf = name.parse().map_err(|bad| format!("dev-{index} is {name:?}: {bad}"))?;
        let position = position(cx.devices, Some(sbdf))
            .ok_or_else(|| format!("{sbdf} is not this driver domain's: add it to iomem= and dev= of its xl config"))?;
        let function_0_follows = sbdf.function() == 0 || self.has_function_0(cx.devices, position, list);
        let device = cx.devices.get_mut(position).ok_or("it is gone")?;
        if let Some(wanted) = &device.entry.guest
            && terms.guest.as_ref() != Some(wanted)
        {
            let guest = terms.guest.as_deref().unwrap_or_default();
            return Err(format!("{sbdf} is for guest {wanted:?} (guest= of its dev= entry), not for {guest:?}"));
        }
        if let (Some(id), Some((vendor, model))) = (&terms.id, device.ids())
            && *id != format!("{vendor:04x}:{model:04x}")
        {
            return Err(format!("{sbdf} is {vendor:04x}:{model:04x}, but id-{index} says {id}: another card?"));
        }
        let pirq = match terms.irq.as_deref().map(decimal) {
            None => 0,
            Some(Some(irq)) if irq < 255 => irq as u8,
            Some(_) => return Err(format!("irq-{index} is not a number below 255")),
        };
        let resources = terms
            .resources
            .as_deref()
            .and_then(Resource::parse_list)
            .ok_or_else(|| format!("resource-{index} is missing or malformed: attach with xl-pciback"))?;
        let options = terms.options.as_deref().unwrap_or_default();
        let permissive = device.entry.permissive || options.split(',').any(|option| option == "permissive=1");
        let is_virtual = device.peek().is_some_and(|function| function.config.identity().is_virtual());
        let wish = Wish { slot: device.entry.slot, function_0_follows, is_virtual };
        let guest = self.link.frontend;
        let view = GuestView { pirq, resources, permissive, multifunction: false };
        device.attach(guest, view, cx.platform.physdev())?;
        let Ok(place) = self.topology.add(position, sbdf, wish) else {
            let now = cx.platform.now();
            device.detach(cx.platform.physdev(), now);
            return Err("the guest's virtual bus is full".to_string());
        };
        self.refresh_multifunction(cx);
        let permissive = if permissive { ", permissive" } else { "" };
        log::info!("{sbdf}: exported to domain {guest} as {}{permissive}, pirq {pirq}", nodes::vdev(place));
        Ok(place)
    }

    /// Whether the guest has function 0 of the same physical device too, or is about to: it is on the list, or
    /// promised to this guest like the function at `position`; and it can be exported.
    fn has_function_0(&self, devices: &[Device<P::Config>], position: DeviceIndex, list: &[Listed]) -> bool {
        let Some(entry) = devices.get(position).map(|device| &device.entry) else { return false };
        let zero = Sbdf::new(entry.sbdf.segment(), entry.sbdf.bus(), entry.sbdf.devfn() & !7);
        let wanted = |state| matches!(state, XenbusState::Initialising | XenbusState::Initialised);
        let listed = list.iter().any(|function| function.sbdf() == Some(zero) && wanted(function.state));
        devices.iter().filter(|device| device.entry.sbdf == zero).any(|device| {
            let promised = entry.guest.is_some() && device.entry.guest == entry.guest;
            let to_be_had = match device.state {
                State::Ready | State::Resetting => true,
                State::InUse(guest) => guest == self.link.frontend,
                State::Broken(_) => false,
            };
            to_be_had && (listed || promised)
        })
    }

    /// The multifunction bit is the truth about the slot that the guest sees, not about the physical one.
    fn refresh_multifunction(&self, cx: &mut Context<'_, P>) {
        for (place, device) in self.topology.entries() {
            let several = self.topology.functions_beside(place) > 1;
            if let Some(function) = cx.devices.get_mut(device).and_then(Device::function) {
                function.config.set_multifunction(several);
            }
        }
    }

    fn release(&mut self, cx: &mut Context<'_, P>, index: DeviceIndex) {
        if self.topology.place_of(index).is_none() {
            return;
        }
        self.topology.remove(index);
        self.reports.forget(index);
        let now = cx.platform.now();
        if let Some(device) = cx.devices.get_mut(index) {
            device.detach(cx.platform.physdev(), now);
            let Counters { reads, writes, refused_writes, errors } = device.counters();
            log::info!(
                "{}: released by domain {} (since the start: {reads} reads, {writes} writes, {refused_writes} refused, \
                 {errors} errors)",
                device.entry.sbdf,
                self.link.frontend
            );
        }
        self.refresh_multifunction(cx);
        self.refresh_mark(cx);
    }

    /// Ends the connection and gives every function back.
    pub fn release_all(&mut self, cx: &mut Context<'_, P>) {
        self.connection = None;
        self.reports = Reports::default();
        let exported: Vec<DeviceIndex> = self.topology.entries().map(|(_, device)| device).collect();
        for device in exported {
            self.release(cx, device);
        }
    }

    /// Connects to a frontend that says it is ready.
    fn connect(&mut self, cx: &mut Context<'_, P>) -> Result<(), StoreError> {
        let magic = match cx.platform.store().read(None, &self.link.front("magic")) {
            Err(StoreError::Timeout) => return Err(StoreError::Timeout),
            other => other,
        };
        if magic.as_deref() != Ok(MAGIC) {
            self.fault(cx, &format!("its magic is not {MAGIC:?}: this backend speaks no other version of pciif"));
            return Ok(());
        }
        let ring = match self.ring(cx)? {
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
                self.connection = Some(Connection { channel, page, ring, answered: false });
                // A request may be there already, and its event may have come before the port was bound.
                self.more = true;
                self.set_state(cx, XenbusState::Connected)?;
                // What stood there has been mended; a node that never was is no error.
                let _ = cx.platform.store().remove(None, &self.link.back("error"));
                if let Some(dropped) = self.throttle.allow(cx.platform.now()) {
                    log::info!("domain {frontend}: connected{}", Suppressed(dropped));
                }
            }
            Err(why) => self.fault(cx, &format!("its page or event channel cannot be used: {why}")),
        }
        Ok(())
    }

    /// Grant reference and port that the frontend published, or what is wrong with them.
    fn ring(&self, cx: &mut Context<'_, P>) -> Result<Result<(u32, u32), String>, StoreError> {
        let mut number = |name: &str| match cx.platform.store().read(None, &self.link.front(name)) {
            Err(StoreError::Timeout) => Err(StoreError::Timeout),
            Err(error) => Ok(Err(format!("{name}: {error}"))),
            Ok(text) => Ok(decimal(&text).ok_or_else(|| format!("{name} is not a number"))),
        };
        let (page, port) = (number("pci-op-ref")?, number("event-channel")?);
        Ok(page.and_then(|page| Ok((page, port?))))
    }

    /// Drops page and channel; every function of the guest starts afresh for the next connection.
    fn disconnect(&mut self, cx: &mut Context<'_, P>) {
        if self.connection.take().is_none() {
            return;
        }
        self.more = false;
        self.reports = Reports::default();
        if let Some(dropped) = self.throttle.allow(cx.platform.now()) {
            log::info!("domain {}: disconnected{}", self.link.frontend, Suppressed(dropped));
        }
        let now = cx.platform.now();
        for (_, index) in self.topology.entries() {
            if let Some(device) = cx.devices.get_mut(index) {
                device.restart(cx.platform.physdev(), now);
            }
        }
        self.refresh_multifunction(cx);
        self.refresh_mark(cx);
    }

    /// Tells a connected frontend that the backend goes away.
    pub fn shutdown(&mut self, cx: &mut Context<'_, P>) {
        self.connection = None;
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
        let paths = [self.link.back("error"), format!("{}/error", self.link.error_folder())];
        let _ = self.change(cx, |store, tx| paths.iter().try_for_each(|path| store.write(Some(tx), path, why)));
    }

    /// xenstore failed: this frontend is looked at again later.
    fn postpone(&mut self, cx: &mut Context<'_, P>, error: StoreError) -> Verdict {
        if self.throttle.allow(cx.platform.now()).is_some() {
            log::warn!("domain {}: xenstore: {error}; tried again later", self.link.frontend);
        }
        Verdict::Failed(error)
    }

    fn set_state(&self, cx: &mut Context<'_, P>, state: XenbusState) -> Result<(), StoreError> {
        let path = self.link.back("state");
        if nodes::read_state(cx.platform.store(), &path)? == Some(state) {
            return Ok(());
        }
        self.change(cx, |store, tx| store.write(Some(tx), &path, state.text())).map(drop)
    }

    /// Writes in one transaction, if the backend's folder is still there: the toolstack may have removed it
    /// meanwhile, and writing would make it anew. `None` if it is gone.
    fn change<T>(
        &self,
        cx: &mut Context<'_, P>,
        mut work: impl FnMut(&mut P::Store, Transaction) -> Result<T, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        let state = self.link.back("state");
        nodes::transact(cx.platform.store(), |store, tx| match store.read(Some(tx), &state) {
            Err(StoreError::NotFound | StoreError::Denied) => Ok(None),
            Err(error) => Err(error),
            Ok(_) => work(store, tx).map(Some),
        })
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

    /// Removes what is left of a guest that is gone, and the guest's folder around it if nothing else is in it.
    fn remove_folders(&self, cx: &mut Context<'_, P>, folders: &[String]) -> Result<(), StoreError> {
        let store = cx.platform.store();
        for folder in folders {
            match store.remove(None, folder) {
                Ok(()) | Err(StoreError::NotFound) => {}
                Err(error) => return Err(error),
            }
            let Some((parent, _)) = folder.rsplit_once('/') else { continue };
            if store.list(None, parent).is_ok_and(|children| children.is_empty()) {
                // Only tidiness: an empty folder harms nobody.
                let _ = store.remove(None, parent);
            }
        }
        Ok(())
    }
}

/// The function at an address, if it is one of ours.
fn position<C: ConfigSpace>(devices: &[Device<C>], sbdf: Option<Sbdf>) -> Option<DeviceIndex> {
    devices.iter().position(|device| Some(device.entry.sbdf) == sbdf)
}

/// The end of a log line after others were dropped.
struct Suppressed(u32);

impl core::fmt::Display for Suppressed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.0 == 0 { Ok(()) } else { write!(f, " ({} lines before this one were suppressed)", self.0) }
    }
}
