//! The whole backend: the functions, the frontends, and where each event goes.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::cmdline::{Complaint, Config, Mode};
use crate::device::{Device, State};
use crate::frontend::{Context, Frontend, Verdict};
use crate::nodes::{self, BACKEND, Link, PUBLISHED};
use crate::platform::{ConfigSpace, Nanos, Platform, Port, Store, StoreError};

/// Token of the watch on all backend folders.
const TOKEN: &str = "backend";

/// Frontends at the most: a bound for memory, above what the event loop can wait for.
const MAX_FRONTENDS: usize = 256;

/// How long after xenstore failed everything is looked at again: 1 second.
const PAUSE: Nanos = 1_000_000_000;
/// The pause doubles with each failure in a row, this many times: 64 seconds.
const LONGEST_PAUSE: u32 = 6;

/// The backend over a machine.
pub struct Backend<P: Platform> {
    platform: P,
    mode: Mode,
    complaints: Vec<Complaint>,
    devices: Vec<Device<P::Config>>,
    published: Vec<Option<State>>,
    frontends: BTreeMap<Link, Frontend<P>>,
    watching: bool,
    /// When to look at everything again because xenstore failed; nothing else would bring it back.
    retry: Option<Nanos>,
    failures: u32,
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
        let devices: Vec<_> = config.devices.into_iter().map(seize).collect();
        let published = devices.iter().map(|_| None).collect();
        Backend {
            platform,
            mode: config.mode,
            complaints,
            devices,
            published,
            frontends: BTreeMap::new(),
            watching: false,
            retry: None,
            failures: 0,
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

    /// Says what is in force, publishes it, and starts to look for frontends.
    pub fn start(&mut self) {
        log::info!("pciback-stubdom {}", env!("CARGO_PKG_VERSION"));
        for complaint in &self.complaints {
            log::error!("{complaint}");
        }
        let (mode, why) = mode(self.mode);
        log::info!("mode {mode}: {why}");
        if self.devices.is_empty() {
            log::error!("no function to serve: name one with dev= (see xl-pciback config)");
        }
        for device in &self.devices {
            announce(device);
        }
        self.publish_devices();
        self.watch();
        self.introduce();
    }

    /// Publishes what there is to say of the domain. The state comes last: who waits for it finds the rest.
    fn introduce(&mut self) {
        let (mode, why) = mode(self.mode);
        let complaints = self.complaints.len().to_string();
        let nodes = [
            ("version", env!("CARGO_PKG_VERSION")),
            ("mode", mode),
            ("mode-why", why),
            ("complaints", complaints.as_str()),
            ("state", "ready"),
        ];
        self.introduced = self.publish(&nodes.map(|(node, value)| (format!("{PUBLISHED}/{node}"), value.to_string())));
    }

    /// A xenstore watch fired.
    pub fn watch_fired(&mut self, path: &str, token: &str) {
        if let Some(link) = Link::of_token(token) {
            if self.frontends.contains_key(&link) {
                self.reconcile(link);
            }
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
        let Backend { platform, devices, frontends, .. } = self;
        for frontend in frontends.values_mut() {
            if let Some(port) = frontend.port()
                && (take(platform, port) | frontend.has_more())
            {
                busy = true;
                frontend.serve(&mut Context { platform, devices });
            }
        }
        busy
    }

    /// The ports to wait for.
    pub fn ports(&self) -> impl Iterator<Item = Port> {
        self.frontends.values().filter_map(Frontend::port)
    }

    /// When to call [`Backend::serve`] again without an event: only after xenstore failed.
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.retry
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
        self.publish_devices();
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

    fn reconcile(&mut self, link: Link) -> Verdict {
        if !self.frontends.contains_key(&link) && self.frontends.len() >= MAX_FRONTENDS {
            log::error!("domain {}: not served: {MAX_FRONTENDS} frontends are the most", link.frontend);
            return Verdict::Keep;
        }
        let Backend { platform, devices, frontends, .. } = self;
        let frontend = frontends.entry(link).or_insert_with(|| Frontend::new(link));
        let verdict = frontend.reconcile(&mut Context { platform, devices });
        match verdict {
            Verdict::Keep => {}
            Verdict::Gone => drop(frontends.remove(&link)),
            Verdict::Failed(_) => self.failed(),
        }
        self.publish_devices();
        verdict
    }

    fn watch(&mut self) {
        match self.platform.store().watch(BACKEND, TOKEN) {
            Ok(()) => self.watching = true,
            Err(error) => {
                log::error!("cannot watch {BACKEND}: {error}: no new guest will be served until it works");
                self.failed();
            }
        }
    }

    /// Publishes what has changed of the functions since the last time.
    fn publish_devices(&mut self) {
        let store = self.platform.store();
        // A domain that has just started has nothing to take back.
        let fresh = !self.introduced && self.failures == 0;
        let mut nodes = Vec::new();
        let mut removed = true;
        for (device, published) in self.devices.iter().zip(&mut self.published) {
            if published.as_ref() == Some(&device.state) {
                continue;
            }
            let first = published.is_none();
            *published = Some(device.state.clone());
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
        nodes.extend(Some(device.entry.options()).filter(|text| !text.is_empty()).map(|text| ("options", Some(text))));
    }
    let (frontend, reason) = match &device.state {
        State::Ready => (None, None),
        State::InUse(guest) => (Some(guest.to_string()), None),
        State::Broken(reason) => (None, Some(reason.clone())),
    };
    nodes.extend([("frontend", frontend), ("reason", reason), ("state", Some(device.state.word().to_string()))]);
    nodes
}

/// The mode's name and why it is in force.
fn mode(mode: Mode) -> (&'static str, &'static str) {
    match mode {
        Mode::Mmcfg0 => (
            "mmcfg0",
            "the command line says that Xen was booted with mmcfg=0, so configuration writes go to the ECAM frames",
        ),
        Mode::ReadOnly => {
            ("read-only", "the command line says mode=read-only: guests' configuration writes are refused")
        }
        Mode::Auto => (
            "read-only",
            "this version has no way to write on a stock Xen, which would end the domain: guests' configuration writes \
             are refused; boot Xen with mmcfg=0 and say mode=mmcfg0 to have them",
        ),
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
            let options = entry.options();
            let comma = if options.is_empty() { "" } else { ", " };
            log::info!("{}: {vendor:04x}:{model:04x} ready, for {guest}{comma}{options}", entry.sbdf);
        }
    }
    for option in entry.not_yet() {
        log::warn!("{}: {option} is understood but not in force in this version", entry.sbdf);
    }
}

/// Whether a node of a backend folder is one that the toolstack changes; the others are our own.
fn is_toolstacks(node: &str) -> bool {
    !["vdev-", "root", "error"].iter().any(|own| node.starts_with(own))
}
