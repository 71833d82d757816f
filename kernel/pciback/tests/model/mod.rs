//! A machine for tests: xenstore with watches, functions with real register behaviour, Xen, guests with
//! shared pages. Everything is in one [`World`] that the test and the backend share.

#![allow(dead_code, reason = "each test file uses its own part")]

pub mod dom0;
pub mod guest;
pub mod hardware;
pub mod images;
pub mod logs;
pub mod store;
pub mod xen;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use pciback::backend::{Backend, EVENTS_A_TURN};
use pciback::cmdline;
use pciback::delegate::{Delegate, Down, RoutedConfig, RoutedPhysdev, Shared as Dom0};
use pciback::device::{Device, State};
use pciback::physdev::{Physdev, PhysdevError, Pirq, Vector};
use pciback::platform::{ConfigSpace, ConnectError, DomId, Nanos, Platform, Port, Way, Width, WritesOff};
use pciback::sbdf::Sbdf;

use self::dom0::End;
#[allow(unused_imports, reason = "each test file uses its own part")]
pub use self::guest::{Guest, withdraw};
use self::guest::{Page, Port0, Shared};
pub use self::hardware::{Card, Hardware};
use self::store::{Meanwhile, Open, StoreClient};
use self::xen::{Act, Assigned, Bus, Flavour, Xen};

/// Domain number of the driver domain in the model.
pub const DRIVER: DomId = 900;

/// A function, and another.
pub const NIC: &str = "0000:01:00.0";
pub const OTHER: &str = "0000:02:00.0";
/// Command lines with the one, and with both.
pub const ONE: &str = "dev=0000:01:00.0";
pub const TWO: &str = "dev=0000:01:00.0 dev=0000:02:00.0";

/// Watches the backend holds while it has no frontend: on their folders, on the wish to try a function again, and on the
/// report of an error.
pub const OWN_WATCHES: usize = 3;

/// All there is.
pub struct World {
    /// Counts changes: a transaction that saw an older tree has to be repeated.
    pub generation: Cell<u64>,
    pub transactions: RefCell<BTreeMap<u32, Open>>,
    pub last_transaction: Cell<u32>,
    pub meanwhile: RefCell<Option<Meanwhile>>,
    pub nodes: RefCell<BTreeMap<String, String>>,
    pub watches: RefCell<Vec<(String, String)>>,
    pub events: RefCell<VecDeque<(String, String)>>,
    pub hardware: Rc<RefCell<BTreeMap<Sbdf, Rc<Hardware>>>>,
    pub pages: RefCell<BTreeMap<(DomId, u32), Rc<Shared>>>,
    pub ports: RefCell<BTreeSet<(DomId, u32)>>,
    pub pending: RefCell<BTreeSet<Port>>,
    pub local: RefCell<BTreeMap<(DomId, u32), Port>>,
    pub notified: RefCell<Vec<Port>>,
    pub order: RefCell<Vec<&'static str>>,
    pub mapped: Cell<i32>,
    pub bound: Cell<i32>,
    pub now: Rc<Cell<Nanos>>,
    pub operations: Cell<u64>,
    pub deaf: Cell<bool>,
    pub xen: Xen,
    pub dom0: dom0::Dom0,
}

impl Default for World {
    fn default() -> World {
        let bus = Bus::default();
        World {
            hardware: bus.functions.clone(),
            now: bus.now.clone(),
            xen: Xen::new(bus),
            generation: Cell::default(),
            transactions: RefCell::default(),
            last_transaction: Cell::default(),
            meanwhile: RefCell::default(),
            nodes: RefCell::default(),
            watches: RefCell::default(),
            events: RefCell::default(),
            pages: RefCell::default(),
            ports: RefCell::default(),
            pending: RefCell::default(),
            local: RefCell::default(),
            notified: RefCell::default(),
            order: RefCell::default(),
            mapped: Cell::default(),
            bound: Cell::default(),
            operations: Cell::default(),
            deaf: Cell::default(),
            dom0: dom0::Dom0::default(),
        }
        .or_delegated()
    }
}

/// Whether the tests run a second time, on an unmodified Xen whose dom0 does what only dom0 may.
pub fn delegated() -> bool {
    std::env::var_os("PCIBACK_DELEGATED").is_some()
}

impl World {
    fn or_delegated(self) -> World {
        if delegated() {
            self.xen.flavour.set(Flavour::Stock417);
            self.serve();
        }
        self
    }

    /// A host with this Xen, without dom0's tool.
    pub fn with(flavour: Flavour) -> Rc<World> {
        let world: Rc<World> = Rc::default();
        world.kill_serve();
        world.xen.flavour.set(flavour);
        world
    }

    /// Puts a function into the host.
    pub fn plug(&self, sbdf: &str, hardware: Hardware) -> Rc<Hardware> {
        let hardware = Rc::new(hardware);
        self.hardware.borrow_mut().insert(sbdf.parse().unwrap(), hardware.clone());
        hardware
    }

    /// The address, if a function is there.
    pub fn address(&self, name: &str) -> Option<Sbdf> {
        name.parse().ok().filter(|sbdf| self.hardware.borrow().contains_key(sbdf))
    }

    /// What the driver domain says of a function.
    pub fn published(&self, sbdf: Sbdf, node: &str) -> Option<String> {
        self.get(&format!("data/pciback/device/{}/{node}", sbdf.to_string().replace([':', '.'], "-")))
    }

    /// dom0 assigns a function that the driver domain says is ready.
    pub fn assign(&self, sbdf: Sbdf, guest: DomId) {
        if let Assigned::To(former) = self.xen.assigned(sbdf) {
            // An attachment that was refused.
            self.xen.deassign(sbdf, former);
        }
        let assigned = self.xen.assign(sbdf, guest);
        let answers = self.hardware.borrow()[&sbdf].silence(self.now.get()).is_none();
        if answers && (matches!(self.xen.flavour.get(), Flavour::Owner | Flavour::Mmcfg0) || self.dom0.running.get()) {
            assert_eq!(assigned, Ok(()), "{sbdf} is ready, so Xen assigns it");
        }
    }

    /// dom0 asks to try a function again.
    pub fn retry(&self, sbdf: &str) {
        self.set("data/pciback/retry", &sbdf.replace([':', '.'], "-"));
    }
}

impl World {
    /// dom0 reports an error of a function, this bad.
    pub fn report_error(&self, sbdf: &str, severity: &str) {
        self.set("data/pciback/aer", &format!("{} {severity}", sbdf.replace([':', '.'], "-")));
    }
}

/// How the driver domain reaches a function: through Xen, and with a lock of its own.
pub struct Config {
    world: Rc<World>,
    sbdf: Sbdf,
    allowed: bool,
}

impl ConfigSpace for Config {
    fn read(&self, offset: u16, width: Width) -> u32 {
        // Nothing is mapped where the frame was not given to this domain.
        if self.world.xen.foreign.borrow().contains(&self.sbdf) {
            return width.mask();
        }
        self.world.xen.bus.read(self.sbdf, offset, width)
    }

    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff> {
        assert!(value & !width.mask() == 0 && offset.is_multiple_of(width.bytes()), "{offset:#x}: {value:#x}");
        if !self.allowed {
            return Err(WritesOff);
        }
        self.world.hardware.borrow()[&self.sbdf].writes.borrow_mut().push((offset, value));
        self.world.xen.config_write(self.sbdf, offset, width, value);
        Ok(())
    }

    fn writable(&self) -> bool {
        self.allowed
    }

    fn allow_writes(&mut self, way: Way) {
        assert_ne!(way, Way::Dom0, "those writes are dom0's");
        self.allowed = true;
    }
}

/// The physdev operations.
pub struct Calls(Rc<World>);

impl Physdev for Calls {
    fn prepare_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        self.0.xen.prepare_msix(sbdf).map_err(PhysdevError::of)
    }
    fn release_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        self.0.xen.release_msix(sbdf).map_err(PhysdevError::of)
    }
    fn restore_msi(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        self.0.xen.restore_msi(sbdf).map_err(PhysdevError::of)
    }
    fn map(&mut self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, PhysdevError> {
        self.0.xen.map(guest, sbdf, vector).map_err(PhysdevError::of)
    }
    fn unmap(&mut self, guest: DomId, _: Sbdf, pirq: Pirq) -> Result<(), PhysdevError> {
        self.0.xen.unmap(guest, pirq).map_err(PhysdevError::of)
    }
    fn now(&self) -> Nanos {
        self.0.now.get()
    }
}

pub struct Machine {
    world: Rc<World>,
    store: StoreClient,
    physdev: RoutedPhysdev<Calls, End>,
    dom0: Dom0<End>,
}

impl Platform for Machine {
    type Config = RoutedConfig<Config, End>;
    type Page = Page;
    type Channel = Port0;
    type Store = StoreClient;
    type Physdev = RoutedPhysdev<Calls, End>;

    fn physdev(&mut self) -> &mut RoutedPhysdev<Calls, End> {
        &mut self.physdev
    }
    fn store(&mut self) -> &mut StoreClient {
        &mut self.store
    }
    fn open_config(&mut self, sbdf: Sbdf) -> Result<RoutedConfig<Config, End>, String> {
        let placed = self.world.hardware.borrow().contains_key(&sbdf);
        let frame = placed.then(|| Config { world: self.world.clone(), sbdf, allowed: false }).ok_or("no frame")?;
        Ok(RoutedConfig::new(frame, sbdf, self.dom0.clone()))
    }
    fn map_page(&mut self, frontend: DomId, grant_ref: u32) -> Result<Page, ConnectError> {
        let page = self.world.pages.borrow().get(&(frontend, grant_ref)).cloned();
        let page = page.ok_or(ConnectError { call: "GNTTABOP_map_grant_ref", code: -3 })?;
        self.world.mapped.set(self.world.mapped.get() + 1);
        Ok(Page(page, self.world.clone()))
    }
    fn bind_channel(&mut self, frontend: DomId, remote_port: u32) -> Result<Port0, ConnectError> {
        if !self.world.ports.borrow().contains(&(frontend, remote_port)) {
            return Err(ConnectError { call: "EVTCHNOP_bind_interdomain", code: -22 });
        }
        self.world.bound.set(self.world.bound.get() + 1);
        let mut local = self.world.local.borrow_mut();
        let next = 100 + local.len() as Port;
        local.insert((frontend, remote_port), next);
        Ok(Port0(next, self.world.clone()))
    }
    fn now(&self) -> Nanos {
        self.world.now.get()
    }
    fn poll_dom0(&mut self) -> Result<u32, Down> {
        let mut dom0 = self.dom0.borrow_mut();
        dom0.poll();
        dom0.session()
    }
}

/// A started backend in its world.
pub struct Rig {
    pub world: Rc<World>,
    pub backend: Backend<Machine>,
}

/// Boots a driver domain with the functions of `cmdline`, each a [`Card::PLAIN`] unless placed before, on a Xen
/// with the config-owner change.
pub fn boot(cmdline: &str) -> Rig {
    boot_in(Rc::default(), cmdline)
}

/// The same with one card, at [`NIC`].
pub fn boot_with(card: Card) -> Rig {
    let world: Rc<World> = Rc::default();
    world.plug(NIC, card.build());
    boot_in(world, ONE)
}

pub fn boot_in(world: Rc<World>, cmdline: &str) -> Rig {
    let (config, complaints) = cmdline::parse(&format!("ecam=0000:00-ff@b0000000 {cmdline}"));
    for device in &config.devices {
        world.hardware.borrow_mut().entry(device.sbdf).or_insert_with(|| Rc::new(Hardware::card(0x8086, 0x100e)));
    }
    world.now.set(world.now.get().max(1_000_000_000_000));
    if world.dom0.running.get() {
        // dom0's tool connects to the new driver domain.
        world.serve();
    }
    let dom0 = Rc::new(RefCell::new(Delegate::new(End(world.clone()))));
    let physdev = RoutedPhysdev::new(Calls(world.clone()), dom0.clone());
    let machine = Machine { world: world.clone(), store: StoreClient(world.clone()), physdev, dom0 };
    let mut rig = Rig { backend: Backend::new(machine, config, complaints), world };
    rig.backend.start();
    rig.settle();
    rig
}

impl Rig {
    /// Delivers events until none is left, no function is being reset and no look is postponed, for which time
    /// passes; more than a fixed number of steps means that they feed themselves.
    pub fn settle(&mut self) {
        for _ in 0..20_000 {
            self.deliver();
            let due = [self.hand_over_due(), self.backend.look_due()].into_iter().flatten().min();
            let Some(due) = due else { return };
            self.world.now.set(due.max(self.world.now.get()));
        }
        panic!("a hand-over without end");
    }

    /// Delivers events until none is left; no time passes.
    pub fn deliver(&mut self) {
        for _ in 0..20_000 {
            let event = self.world.events.borrow_mut().pop_front();
            if let Some((path, token)) = event {
                self.backend.watch_fired(&path, &token);
            } else if !self.serve() {
                return;
            }
        }
        panic!("events without end");
    }

    /// One turn of the image's event loop.
    pub fn turn(&mut self) {
        self.serve();
        for _ in 0..EVENTS_A_TURN {
            let Some((path, token)) = self.world.events.borrow_mut().pop_front() else { break };
            self.backend.watch_fired(&path, &token);
        }
    }

    /// When the next step of a hand-over is due; the backend must ask to be called by then.
    pub fn hand_over_due(&self) -> Option<Nanos> {
        let due = self.backend.devices().iter().filter_map(Device::due).min()?;
        assert!(self.backend.next_deadline().is_some_and(|deadline| deadline <= due), "a step nobody is called for");
        Some(due)
    }

    /// One turn of the event channels.
    pub fn serve(&mut self) -> bool {
        let world = self.world.clone();
        self.backend.serve(|_, port| world.pending.borrow_mut().remove(&port))
    }

    pub fn hardware(&self, sbdf: &str) -> Rc<Hardware> {
        self.world.hardware.borrow()[&sbdf.parse::<Sbdf>().unwrap()].clone()
    }

    pub fn published(&self, sbdf: &str, node: &str) -> Option<String> {
        self.world.published(sbdf.parse().unwrap(), node)
    }

    /// Published state.
    pub fn state(&self, sbdf: &str) -> String {
        self.published(sbdf, "state").unwrap_or_default()
    }

    /// Published reason; only a broken function has one.
    pub fn reason(&self, sbdf: &str) -> String {
        assert_eq!(self.state(sbdf), "broken");
        self.published(sbdf, "reason").expect("a reason")
    }

    /// What the driver domain did to a function.
    pub fn acts(&self, sbdf: &str) -> Vec<Act> {
        self.world.xen.acts(sbdf.parse().unwrap())
    }

    /// Forgets what the driver domain did so far.
    pub fn forget(&mut self) {
        self.world.xen.done.borrow_mut().clear();
        self.world.hardware.borrow().values().for_each(|hardware| hardware.writes.borrow_mut().clear());
    }

    /// Lets this much time pass, with what is due in it.
    pub fn pass(&mut self, time: Nanos) {
        let end = self.world.now.get() + time;
        self.deliver();
        while let Some(due) = self.backend.next_deadline().filter(|due| *due <= end) {
            self.world.now.set(due.max(self.world.now.get()));
            self.deliver();
        }
        self.world.now.set(end.max(self.world.now.get()));
    }

    /// The driver domain ends without a word and is started again.
    pub fn crash_and_boot(self, cmdline: &str) -> Rig {
        let world = self.world.clone();
        drop(self);
        world.watches.borrow_mut().clear();
        world.events.borrow_mut().clear();
        world.remove("data/pciback");
        boot_in(world, cmdline)
    }

    /// The backend and Xen agree on what is mapped, and the rules that hold at any time hold.
    pub fn check(&self) {
        let world = &self.world;
        world.xen.check();
        assert_eq!(world.xen.refused.get(), 0, "Xen's intercept refused a write");
        for device in self.backend.devices() {
            let (Some(function), false) = (device.peek(), matches!(device.state, State::Broken(_))) else { continue };
            let sbdf = device.entry.sbdf;
            // MSI of a domain that no call finds any more is Xen's to free, and nobody can ask whether it has.
            let taken = device.state == State::Ready && world.xen.is_taken(sbdf);
            assert!(!taken, "{sbdf} is offered with a former guest's vectors mapped: {:?}", world.xen.mapped(sbdf));
            let recorded = function.interrupts.pirqs();
            // Pirqs of a domain that no call reaches any more are Xen's own to free.
            for (_, pirq, number) in world.xen.mapped(sbdf).into_iter().filter(|(guest, ..)| world.xen.listed(*guest)) {
                // Of several vectors of MSI the first stands for all.
                let on_record = recorded.contains(&pirq) || recorded.contains(&(pirq - Pirq::from(number)));
                assert!(on_record, "{sbdf}: pirq {pirq} is mapped and not on record {recorded:?}");
            }
        }
    }

    /// What the toolstack writes for a first attach.
    pub fn attach(&mut self, guest: DomId, functions: &[&str]) -> Guest {
        self.world.xen.create(guest);
        let guest = Guest { id: guest, world: self.world.clone(), page: Rc::default(), ring: (8, 5) };
        guest.set_front("backend", &format!("/local/domain/{DRIVER}/backend/pci/{}/0", guest.id));
        guest.set_front("backend-id", &DRIVER.to_string());
        guest.set_front("state", "1");
        let name = format!("guest{}", guest.id);
        let front = format!("/local/domain/{}/device/pci/0", guest.id);
        let (id, count) = (guest.id.to_string(), functions.len().to_string());
        for (node, value) in [
            ("frontend", front.as_str()),
            ("frontend-id", &id),
            ("online", "1"),
            ("domain", &name),
            ("num_devs", &count),
        ] {
            guest.set_back(node, value);
        }
        for (index, sbdf) in functions.iter().enumerate() {
            guest.list(index, sbdf);
        }
        guest.set_back("state", "1");
        self.settle();
        guest
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}
