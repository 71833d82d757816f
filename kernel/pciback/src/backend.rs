//! The whole backend: the functions, the frontends, and where each event goes.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::aer::Severity;
use crate::cmdline::{Complaint, Config, Mode};
use crate::config::registers::capability;
use crate::delegate::Down;
use crate::device::{Device, Report, State};
use crate::frontend::{Context, Frontend, Verdict};
use crate::handover::Reach;
use crate::interrupts::Kind;
use crate::mode::{self, InForce};
use crate::nodes::{self, BACKEND, Link, PUBLISHED};
use crate::platform::{ConfigSpace, Nanos, Platform, Port, Store, StoreError};
use crate::siblings;
use crate::topology;

/// Token of the watch on all backend folders.
const TOKEN: &str = "backend";

/// Frontends at the most: a bound for memory, above what the event loop can wait for.
const MAX_FRONTENDS: usize = 256;

/// Xenstore events handled before frontends get their turn again: each may cost xenstored a score of answers, and a guest
/// can have them come without a pause.
pub const EVENTS_A_TURN: usize = 1;

/// How long after xenstore failed everything is looked at again: 1 second.
const PAUSE: Nanos = 1_000_000_000;
/// The pause doubles with each failure in a row, this many times: 64 seconds.
const LONGEST_PAUSE: u32 = 6;

/// The least time between two writes to xenstore that guests cause by turning interrupts on and off, all guests
/// together: 200 milliseconds. xenstored serves the whole host.
const PUBLISH_PAUSE: Nanos = 200_000_000;

/// The watch on dom0's wish to try a broken function again: its address as in the published folder.
const RETRY: (&str, &str) = ("data/pciback/retry", "retry");

/// The watch on dom0's report of a function's error: its address as in the published folder, a blank, and how bad it is:
/// `nonfatal`, `fatal` or `permanent`, or `auto` if that is to be looked for.
const ERROR: (&str, &str) = ("data/pciback/aer", "aer");

/// What was last published of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Published {
    state: State,
    interrupts: (Kind, u16),
    stale: u32,
    report: Option<Report>,
}

impl Published {
    fn of<C: ConfigSpace>(device: &Device<C>) -> Published {
        let (state, report) = (device.state.clone(), device.report().cloned());
        Published { state, interrupts: in_use(device), stale: device.stale(), report }
    }
}

/// The backend over a machine.
pub struct Backend<P: Platform> {
    platform: P,
    wish: Mode,
    mode: InForce,
    /// dom0's session, as far as it was acted on.
    session: Result<u32, Down>,
    complaints: Vec<Complaint>,
    topology: topology::Kind,
    devices: Vec<Device<P::Config>>,
    published: Vec<Option<Published>>,
    /// When to publish what guests have changed, if they have.
    publish_due: Option<Nanos>,
    /// No sooner than then may what guests change be published.
    publish_not_before: Nanos,
    frontends: BTreeMap<Link, Frontend<P>>,
    watching: bool,
    /// When to look at everything again because xenstore failed; nothing else would bring it back.
    retry: Option<Nanos>,
    failures: u32,
    /// When the next step of a hand-over is due, or an answer to a report of an error.
    due: Option<Nanos>,
    /// All that is published of the domain itself is.
    introduced: bool,
}

impl<P: Platform> Backend<P> {
    /// Seizes the functions that `config` names.
    pub fn new(mut platform: P, config: Config, complaints: Vec<Complaint>) -> Backend<P> {
        let seize = |entry: crate::cmdline::DeviceConfig| {
            let hardware = platform.open_config(entry.sbdf);
            Device::seize(entry, hardware)
        };
        let mut devices: Vec<_> = config.devices.into_iter().map(seize).collect();
        let now = platform.now();
        let mode = mode::settle(config.mode, &mut devices, platform.physdev(), now);
        let published = devices.iter().map(|_| None).collect();
        Backend {
            platform,
            wish: config.mode,
            mode,
            session: Err(Down::Nobody),
            complaints,
            topology: config.topology,
            devices,
            published,
            publish_due: None,
            publish_not_before: 0,
            frontends: BTreeMap::new(),
            watching: false,
            retry: None,
            failures: 0,
            due: Some(now),
            introduced: false,
        }
    }

    /// The machine.
    pub fn platform_mut(&mut self) -> &mut P {
        &mut self.platform
    }

    /// The functions, in the order of the command line.
    pub fn devices(&self) -> &[Device<P::Config>] {
        &self.devices
    }

    /// Paths and values of the nodes with the functions' counters. They are published when dom0 asks for them only:
    /// no access writes to xenstore.
    pub fn counters(&self) -> Vec<(String, String)> {
        let node = |device: &Device<P::Config>| {
            (nodes::published(device.entry.sbdf, "counters"), device.counters().to_string())
        };
        self.devices.iter().map(node).collect()
    }

    /// Says what is in force, publishes it, and starts to look for frontends.
    pub fn start(&mut self) {
        log::info!("pciback-stubdom {}", env!("CARGO_PKG_VERSION"));
        for complaint in &self.complaints {
            log::error!("{complaint}");
        }
        log::info!("mode {}: {}", self.mode.word(), self.mode.why);
        if self.topology == topology::Kind::Passthrough {
            log::info!("topology passthrough: guests see their functions at the host's addresses");
        }
        if self.devices.is_empty() {
            log::error!("no function to serve: name one with dev= (see xl-pciback config)");
        }
        for device in &self.devices {
            announce(device);
        }
        self.advance();
        self.publish_devices();
        self.watch();
        self.introduce();
    }

    /// Publishes what there is to say of the domain. The state comes last: who waits for it finds the rest.
    fn introduce(&mut self) {
        let complaints = self.complaints.len().to_string();
        let nodes = [
            ("version", env!("CARGO_PKG_VERSION")),
            ("mode", self.mode.word()),
            ("mode-why", self.mode.why.as_str()),
            ("serve", self.serving()),
            ("complaints", complaints.as_str()),
            ("state", "ready"),
        ];
        self.introduced = self.publish(&nodes.map(|(node, value)| (format!("{PUBLISHED}/{node}"), value.to_string())));
    }

    /// Whether dom0's tool takes part, as it is published.
    fn serving(&self) -> &'static str {
        match (self.mode.reach, self.session) {
            (Some(Reach::Direct), _) => "not needed",
            (_, Ok(_)) => "connected",
            (_, Err(_)) => "not connected",
        }
    }

    /// A xenstore watch fired.
    pub fn watch_fired(&mut self, path: &str, token: &str) {
        if let Some(link) = Link::of_token(token) {
            if self.frontends.contains_key(&link) {
                self.look(link);
            }
        } else if token == RETRY.1 {
            self.retry_device();
        } else if token == ERROR.1 {
            self.report_error();
        } else if token == TOKEN {
            let mut parts = path.strip_prefix(BACKEND).unwrap_or("").trim_start_matches('/').splitn(3, '/');
            match (parts.next().filter(|part| !part.is_empty()), parts.next(), parts.next()) {
                (Some(frontend), Some(devid), node) => {
                    if let Some(link) = Link::parse(frontend, devid)
                        && node.is_none_or(is_toolstacks)
                    {
                        self.reconcile(link);
                    }
                }
                _ => self.scan(),
            }
        }
    }

    /// Serves every frontend whose event channel is pending or that had requests left, one turn each.
    /// `take` consumes a port's pending bit. True if any was served.
    pub fn serve(&mut self, take: impl Fn(&P, Port) -> bool) -> bool {
        let mut busy = false;
        let session = self.platform.poll_dom0();
        if session != self.session {
            busy = true;
            self.dom0_changed(session);
        }
        if let Some(due) = self.retry
            && self.platform.now() >= due
        {
            self.retry = None;
            busy = true;
            if !self.watching {
                self.watch();
            }
            self.scan();
            self.publish_devices();
            if !self.introduced {
                self.introduce();
            }
            if self.retry.is_none() {
                self.failures = 0;
            }
        }
        if let Some(due) = self.due
            && self.platform.now() >= due
        {
            busy = true;
            self.advance();
        }
        if let Some(link) = self.overdue() {
            busy = true;
            self.look(link);
        }
        let Backend { platform, devices, frontends, .. } = self;
        let mut changed = false;
        for frontend in frontends.values_mut() {
            if let Some(port) = frontend.port()
                && (take(platform, port) | frontend.has_more(devices))
            {
                busy = true;
                changed |= frontend.serve(&mut Context { platform, devices });
            }
        }
        if changed {
            self.note_due();
            self.publish_due.get_or_insert(self.publish_not_before);
        }
        // After the replies: nobody waits for it.
        if let Some(due) = self.publish_due
            && self.platform.now() >= due
        {
            self.publish_not_before = self.platform.now().saturating_add(PUBLISH_PAUSE);
            self.publish_devices();
        }
        busy
    }

    /// The frontend whose postponed look has been due for longest.
    fn overdue(&self) -> Option<Link> {
        let now = self.platform.now();
        let due = self.frontends.iter().filter_map(|(link, frontend)| Some((frontend.look_due()?, *link)));
        due.min().filter(|(due, _)| *due <= now).map(|(_, link)| link)
    }

    /// dom0's tool has come, has gone, or has begun anew.
    fn dom0_changed(&mut self, session: Result<u32, Down>) {
        self.session = session;
        let Backend { platform, devices, wish, mode, .. } = self;
        let now = platform.now();
        let former = mode.reach;
        match session {
            Ok(_) => {
                // If it goes on the way, the next look tells.
                let _ = mode::engage(*wish, mode, devices, platform.physdev(), now);
                log::info!("xl-pciback serve is connected; mode {}: {}", mode.word(), mode.why);
            }
            Err(why) if mode.reach.is_some_and(Reach::needs_dom0) => log::warn!(
                "xl-pciback serve {}: guests' writes are refused and hand-overs wait until it is back; reads and \
                 interrupts go on",
                gone(why)
            ),
            Err(why) => log::warn!("xl-pciback serve {}", gone(why)),
        }
        if former != self.mode.reach {
            // How a function is reset may be another way now.
            self.published.fill(None);
        }
        self.note_due();
        self.publish_devices();
        self.introduce();
    }

    /// Takes control of functions that guests had without dom0 and have given back.
    fn take_control(&mut self) {
        let Some(reach) = self.mode.reach.filter(|reach| reach.needs_dom0() && self.session.is_ok()) else { return };
        let now = self.platform.now();
        for device in &mut self.devices {
            if mode::take(reach, device, self.platform.physdev(), now).is_err() {
                break;
            }
        }
    }

    /// Does what is due of the hand-overs, and for the frontends that waited for one to end.
    fn advance(&mut self) {
        let now = self.platform.now();
        let mut changed = false;
        for device in &mut self.devices {
            if device.due().is_some_and(|due| due <= now) {
                changed |= device.advance(self.platform.physdev(), now);
            }
        }
        let Backend { platform, devices, frontends, .. } = self;
        for frontend in frontends.values_mut().filter(|frontend| frontend.due().is_some_and(|due| due <= now)) {
            changed |= frontend.go_on(&mut Context { platform, devices });
        }
        changed |= siblings::settle(&mut self.devices, self.platform.physdev(), now);
        if changed {
            // One that was handed over without dom0 gets to its next guest with it.
            self.take_control();
            self.publish_devices();
            let waiting: Vec<Link> =
                self.frontends.iter().filter(|(_, frontend)| frontend.is_waiting()).map(|(link, _)| *link).collect();
            for link in waiting {
                self.reconcile(link);
            }
        }
        self.note_due();
    }

    fn note_due(&mut self) {
        let handed_over = self.devices.iter().filter_map(Device::due);
        self.due = handed_over.chain(self.frontends.values().filter_map(Frontend::due)).min();
    }

    /// dom0 asks to try a broken function again.
    fn retry_device(&mut self) {
        // A failure leaves the wish where it is; dom0 can make it again.
        let Ok(wish) = self.platform.store().read(None, RETRY.0) else { return };
        if wish.is_empty() {
            return;
        }
        let now = self.platform.now();
        let mut known = self.devices.iter_mut().zip(&mut self.published);
        match known.find(|(device, _)| nodes::folder(device.entry.sbdf) == wish) {
            Some((device, published)) => {
                log::info!("{}: dom0 asks to try it again", device.entry.sbdf);
                if mode::admit(self.mode.reach, device, self.platform.physdev(), now) {
                    // Its ids, and how it is reset, are told anew.
                    *published = None;
                    announce(device);
                }
                device.retry(self.platform.physdev(), now);
            }
            None => log::warn!("{}: {wish:?} is no function of this domain", RETRY.0),
        }
        self.note_due();
        self.publish_devices();
        // The empty value tells that the wish was seen, and comes after what it led to.
        if let Err(error) = self.platform.store().write(None, RETRY.0, "") {
            log::warn!("cannot acknowledge {}: {error}", RETRY.0);
        }
    }

    /// When the next look is due that was postponed because a frontend's nodes changed too often.
    pub fn look_due(&self) -> Option<Nanos> {
        self.frontends.values().filter_map(Frontend::look_due).min()
    }

    /// dom0 reports an error of a function.
    fn report_error(&mut self) {
        // A failure leaves the report where it is; dom0 can make it again.
        let Ok(wish) = self.platform.store().read(None, ERROR.0) else { return };
        if wish.is_empty() {
            return;
        }
        let Backend { platform, devices, frontends, .. } = self;
        let (folder, word) = wish.split_once(' ').unwrap_or((&wish, ""));
        let severity = if word == "auto" { Some(None) } else { Severity::parse(word).map(Some) };
        let index = devices.iter().position(|device| nodes::folder(device.entry.sbdf) == folder);
        if let (Some(index), Some(severity)) = (index, severity)
            && let Some(device) = devices.get_mut(index)
        {
            let now = platform.now();
            if let Some((_, severity)) = device.error_reported(severity, platform.physdev(), now)
                && let Some(frontend) = frontends.values_mut().find(|frontend| frontend.has(index))
            {
                frontend.report_error(&mut Context { platform, devices }, index, severity);
            }
        } else {
            log::warn!("{}: {wish:?} is no report of a function of this domain", ERROR.0);
        }
        self.note_due();
        self.publish_devices();
        // As with a retry.
        if let Err(error) = self.platform.store().write(None, ERROR.0, "") {
            log::warn!("cannot acknowledge {}: {error}", ERROR.0);
        }
    }

    /// The ports to wait for.
    pub fn ports(&self) -> impl Iterator<Item = Port> {
        self.frontends.values().filter_map(Frontend::port)
    }

    /// When to call [`Backend::serve`] again without an event: after xenstore failed, while a function is handed
    /// over, while a guest is to answer a report of an error, when something is to be published that guests may not have
    /// published at once, and when nodes are to be looked at that changed too often.
    pub fn next_deadline(&self) -> Option<Nanos> {
        [self.retry, self.due, self.publish_due, self.look_due()].into_iter().flatten().min()
    }

    /// The xenstore connection was made anew: watches are gone, and anything may have happened.
    pub fn store_reconnected(&mut self) {
        for frontend in self.frontends.values_mut() {
            frontend.forget_watch();
        }
        self.watching = false;
        self.watch();
        self.scan();
        for published in &mut self.published {
            *published = None;
        }
        self.publish_devices();
        self.introduce();
    }

    /// Closes every frontend: the domain ends.
    pub fn shutdown(&mut self) {
        let Backend { platform, devices, frontends, .. } = self;
        for frontend in frontends.values_mut() {
            frontend.shutdown(&mut Context { platform, devices });
        }
        self.frontends.clear();
        for device in &mut self.devices {
            device.give_up(self.platform.physdev());
        }
    }

    /// Looks at every frontend that is known or listed.
    fn scan(&mut self) {
        let mut links: Vec<Link> = self.frontends.keys().copied().collect();
        for frontend in self.children(BACKEND) {
            for devid in self.children(&format!("{BACKEND}/{frontend}")) {
                links.extend(Link::parse(&frontend, &devid));
            }
        }
        links.sort_unstable();
        links.dedup();
        for link in links {
            if self.reconcile(link) == Verdict::Failed(StoreError::Timeout) {
                // The others would wait for it as long, and connected guests with them.
                break;
            }
        }
    }

    fn children(&mut self, path: &str) -> Vec<String> {
        match self.platform.store().list(None, path) {
            Ok(children) => children,
            Err(StoreError::NotFound) => Vec::new(),
            Err(_) => {
                self.failed();
                Vec::new()
            }
        }
    }

    /// xenstore failed: all is looked at again later. While xenstored does not answer, a try keeps connected
    /// guests waiting, so the pauses grow.
    fn failed(&mut self) {
        if self.retry.is_none() {
            self.retry = Some(self.platform.now().saturating_add(PAUSE << self.failures.min(LONGEST_PAUSE)));
            self.failures = self.failures.saturating_add(1);
        }
    }

    /// A guest has changed its node: looks at it, or later if it does so without a pause. What the toolstack changes is not
    /// counted; our own changes, of which each look brings a few, are bounded with it.
    fn look(&mut self, link: Link) {
        let now = self.platform.now();
        if self.frontends.get_mut(&link).is_none_or(|frontend| frontend.may_look(now)) {
            self.reconcile(link);
        }
    }

    fn reconcile(&mut self, link: Link) -> Verdict {
        if !self.frontends.contains_key(&link) && self.frontends.len() >= MAX_FRONTENDS {
            log::error!("domain {}: not served: {MAX_FRONTENDS} frontends are the most", link.frontend);
            return Verdict::Keep;
        }
        let Backend { platform, devices, frontends, topology, .. } = self;
        let frontend = frontends.entry(link).or_insert_with(|| Frontend::new(link, *topology));
        let verdict = frontend.reconcile(&mut Context { platform, devices });
        match verdict {
            Verdict::Keep => {}
            Verdict::Gone => drop(frontends.remove(&link)),
            Verdict::Failed(_) => self.failed(),
        }
        self.take_control();
        self.note_due();
        self.publish_devices();
        verdict
    }

    fn watch(&mut self) {
        match self.platform.store().watch(BACKEND, TOKEN) {
            Ok(()) => self.watching = true,
            Err(error) => {
                log::error!("cannot watch {BACKEND}: {error}: no new guest will be served until it works");
                self.failed();
                return;
            }
        }
        for (node, token) in [RETRY, ERROR] {
            if let Err(error) = self.platform.store().watch(node, token) {
                log::warn!("cannot watch {node}: {error}");
            }
        }
    }

    /// Publishes what has changed of the functions since the last time.
    fn publish_devices(&mut self) {
        self.publish_due = None;
        let store = self.platform.store();
        // A domain that has just started has nothing to take back.
        let fresh = !self.introduced && self.failures == 0;
        let mut nodes = Vec::new();
        let mut removed = true;
        for (device, published) in self.devices.iter().zip(&mut self.published) {
            let present = Published::of(device);
            if published.as_ref() == Some(&present) {
                continue;
            }
            let first = published.is_none();
            *published = Some(present);
            for (node, value) in description(device, first) {
                let path = nodes::published(device.entry.sbdf, node);
                match value {
                    Some(value) => nodes.push((path, value)),
                    None if fresh || !removed => {}
                    // Usually there is none.
                    None => removed = store.remove(None, &path) != Err(StoreError::Timeout),
                }
            }
        }
        if !removed {
            self.failed();
        }
        if !removed || !self.publish(&nodes) {
            self.published.fill(None);
        }
    }

    /// True if all is published; if not, it is tried again later.
    fn publish(&mut self, nodes: &[(String, String)]) -> bool {
        if nodes.is_empty() {
            return true;
        }
        match self.platform.store().write_all(nodes) {
            Ok(()) => true,
            Err(error) => {
                log::warn!("cannot publish below {PUBLISHED}: {error}");
                self.failed();
                false
            }
        }
    }
}

/// What is published of a function: names and values of nodes, and those to remove. What never changes comes
/// with the `first` only, where there is something to say. The state comes last: who waits for it finds
/// the rest in place.
fn description<C: ConfigSpace>(device: &Device<C>, first: bool) -> Vec<(&'static str, Option<String>)> {
    let mut nodes = Vec::new();
    if first {
        let id = device.ids().map(|(vendor, model)| format!("{vendor:04x}:{model:04x}"));
        nodes.push(("id", Some(id.unwrap_or_default())));
        nodes.extend(device.entry.guest.clone().map(|guest| ("guest", Some(guest))));
        nodes.extend(Some(device.options()).filter(|text| !text.is_empty()).map(|text| ("options", Some(text))));
        nodes.push(("reset", Some(device.method().word().to_string())));
    }
    nodes.push(("interrupts", Some(interrupts(device))));
    nodes.push(("msix", Some(msix(device))));
    nodes.extend(device.report().map(|report| ("aer", Some(report.to_string()))));
    let (frontend, reason) = match &device.state {
        State::Ready | State::Resetting => (None, None),
        State::InUse(guest) => (Some(guest.to_string()), None),
        State::Broken(reason) => (None, Some(reason.clone())),
    };
    nodes.extend([("frontend", frontend), ("reason", reason), ("state", Some(device.state.word().to_string()))]);
    nodes
}

/// What kind of interrupt a function uses, and how many vectors of it.
fn in_use<C: ConfigSpace>(device: &Device<C>) -> (Kind, u16) {
    device.peek().map_or((Kind::Line, 0), |function| function.interrupts.in_use())
}

/// The same as text.
fn interrupts<C: ConfigSpace>(device: &Device<C>) -> String {
    match in_use(device) {
        (Kind::Line, _) => Kind::Line.word().to_string(),
        (kind, vectors) => format!("{} {vectors}", kind.word()),
    }
}

/// What the last checks of a function's MSI-X state found.
fn msix<C: ConfigSpace>(device: &Device<C>) -> String {
    let Some(function) = device.peek() else { return "unknown".to_string() };
    let msix = function.interrupts.msix();
    match (msix, function.interrupts.forgone(), device.stale()) {
        (None, ..) if function.config.hidden().any(|(id, _)| id == capability::MSIX) => "hidden".to_string(),
        (None, ..) => "none".to_string(),
        (Some(msix), Some(error), _) => {
            format!("{} entries, not usable: prepare_msix answered {error}", msix.entries)
        }
        (Some(msix), None, 0) => format!("{} entries", msix.entries),
        (Some(msix), None, stale) => format!("{} entries, stale state reset {stale} times", msix.entries),
    }
}

/// The log line of a function at start.
fn announce<C: ConfigSpace>(device: &Device<C>) {
    let entry = &device.entry;
    match (&device.state, device.ids()) {
        (State::Broken(reason), _) => log::error!("{}: broken: {reason}", entry.sbdf),
        (_, ids) => {
            let (vendor, model) = ids.unwrap_or_default();
            let guest =
                entry.guest.as_deref().map_or_else(|| "any guest".into(), |guest| format!("guest {guest:?} only"));
            let options = device.options();
            let comma = if options.is_empty() { "" } else { ", " };
            let reset = device.method().word();
            log::info!("{}: {vendor:04x}:{model:04x}, reset {reset}, for {guest}{comma}{options}", entry.sbdf);
        }
    }
    let Some(function) = device.peek() else { return };
    for (quirk, name) in function.config.refused() {
        log::error!(
            "{}: {quirk} is not followed: {name:?} is there, which has a rule of its own; take it out",
            entry.sbdf
        );
    }
    for (id, at) in function.config.hidden() {
        let name = capability::name(id);
        log::warn!("{}: its {name} capability at {at:#x} cannot be true, so no guest sees it", entry.sbdf);
    }
    if let Some(msix) = function.interrupts.msix().filter(|msix| msix.shares_page()) {
        let (bar, from, to) = (msix.table.bar, msix.table.start & !0xfff, msix.table.end().next_multiple_of(0x1000));
        log::info!(
            "{}: its MSI-X table shares pages {from:#x} to {to:#x} of BAR {bar} with other registers, which a PV guest \
             cannot write while Xen protects the table",
            entry.sbdf
        );
    }
}

/// Why dom0 takes no part.
fn gone(why: Down) -> alloc::borrow::Cow<'static, str> {
    match why {
        Down::Nobody => "has gone".into(),
        Down::Silent => "does not answer".into(),
        Down::Restarted => "has begun anew".into(),
        Down::Version(version) => format!(
            "speaks version {version} of the protocol, this image version {}: use image and tool of the same version",
            crate::delegate::message::VERSION
        )
        .into(),
    }
}

/// Whether a node of a backend folder is one that the toolstack changes; the others are our own.
fn is_toolstacks(node: &str) -> bool {
    !["vdev-", "root", "error", "aerState"].iter().any(|own| node.starts_with(own))
}
