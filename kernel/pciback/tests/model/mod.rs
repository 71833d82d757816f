//! A machine for tests: xenstore with watches, functions with real register behaviour, guests with
//! shared pages. Everything is in one [`World`] that the test and the backend share.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use pciback::backend::Backend;
use pciback::cmdline;
use pciback::platform::{
    Channel, ConfigSpace, ConnectError, DomId, Nanos, Platform, Port, SharedPage, Store, StoreError, Transaction,
    Width, WritesOff,
};
use pciback::sbdf::Sbdf;
use pciback::wire::{PCIF_ACTIVE, RawReply, RawRequest};

/// Domain number of the driver domain in the model.
pub const DRIVER: DomId = 900;

/// Configuration space of one model function.
pub struct Hardware {
    pub bytes: RefCell<Vec<u8>>,
    pub writable: Cell<bool>,
    pub writes: RefCell<Vec<(u16, u32)>>,
}

impl Hardware {
    /// A network card: 16 KiB of memory at BAR0, 32 I/O ports at BAR2, MSI-X at 0x40, INTA.
    pub fn card(vendor: u16, device: u16) -> Hardware {
        let mut bytes = vec![0; 4096];
        let mut put = |offset: usize, data: &[u8]| bytes[offset..offset + data.len()].copy_from_slice(data);
        put(0x00, &vendor.to_le_bytes());
        put(0x02, &device.to_le_bytes());
        put(0x04, &0x0403u16.to_le_bytes());
        put(0x06, &0x0010u16.to_le_bytes());
        put(0x08, &[3, 0, 0, 2]);
        put(0x10, &0xfebc_0000u32.to_le_bytes());
        put(0x18, &0x0000_c041u32.to_le_bytes());
        put(0x34, &[0x40]);
        put(0x3c, &[11, 1]);
        put(0x40, &[0x11, 0x00, 0x04, 0x00, 0x03, 0x00, 0x00, 0x00, 0x03, 0x20, 0x00, 0x00]);
        Hardware { bytes: RefCell::new(bytes), writable: Cell::new(true), writes: RefCell::default() }
    }

    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes.borrow()[offset..offset + 2].try_into().unwrap())
    }
}

/// The `resource-N` node that fits [`Hardware::card`].
pub const RESOURCES: &str = "0xfebc0000 0xfebc3fff 0x40200;0x0 0x0 0x0;0xc040 0xc05f 0x40101;0x0 0x0 0x0;\
                             0x0 0x0 0x0;0x0 0x0 0x0;0x0 0x0 0x0";

pub struct Config(Rc<Hardware>);

impl ConfigSpace for Config {
    fn read(&self, offset: u16, width: Width) -> u32 {
        let bytes = self.0.bytes.borrow();
        let at = usize::from(offset);
        let slice = &bytes[at..at + usize::from(width.bytes())];
        slice.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff> {
        if !self.0.writable.get() {
            return Err(WritesOff);
        }
        self.0.writes.borrow_mut().push((offset, value));
        let at = usize::from(offset);
        let len = usize::from(width.bytes());
        self.0.bytes.borrow_mut()[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        Ok(())
    }

    fn writable(&self) -> bool {
        self.0.writable.get()
    }
}

/// What a hostile second vCPU does to the page.
type SecondVcpu = Box<dyn FnMut(&Shared)>;

/// A page as guest and backend share it.
#[derive(Default)]
pub struct Shared {
    pub flags: Cell<u32>,
    pub request: Cell<RawRequest>,
    pub reply: Cell<Option<RawReply>>,
    pub request_reads: Cell<u32>,
    /// Called while the request is being executed: a hostile second vCPU.
    pub during: RefCell<Option<SecondVcpu>>,
}

pub struct Page(Rc<Shared>, Rc<World>);

impl SharedPage for Page {
    fn flags(&self) -> u32 {
        self.0.flags.get()
    }
    fn request(&self) -> RawRequest {
        self.0.request_reads.set(self.0.request_reads.get() + 1);
        let request = self.0.request.get();
        if let Some(during) = self.0.during.borrow_mut().as_mut() {
            during(&self.0);
        }
        request
    }
    fn reply(&self, reply: &RawReply) {
        self.0.reply.set(Some(*reply));
    }
    fn clear_active(&self) -> u32 {
        self.0.flags.replace(self.0.flags.get() & !PCIF_ACTIVE)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.1.mapped.set(self.1.mapped.get() - 1);
        self.1.order.borrow_mut().push("unmap");
    }
}

pub struct Port0(Port, Rc<World>);

impl Channel for Port0 {
    fn port(&self) -> Port {
        self.0
    }
    fn notify(&self) {
        self.1.notified.borrow_mut().push(self.0);
    }
}

impl Drop for Port0 {
    fn drop(&mut self) {
        self.1.bound.set(self.1.bound.get() - 1);
        self.1.order.borrow_mut().push("close");
    }
}

/// All there is.
#[derive(Default)]
pub struct World {
    pub nodes: RefCell<BTreeMap<String, String>>,
    pub watches: RefCell<Vec<(String, String)>>,
    pub events: RefCell<VecDeque<(String, String)>>,
    pub hardware: RefCell<BTreeMap<Sbdf, Rc<Hardware>>>,
    pub pages: RefCell<BTreeMap<(DomId, u32), Rc<Shared>>>,
    pub ports: RefCell<BTreeSet<(DomId, u32)>>,
    pub pending: RefCell<BTreeSet<Port>>,
    pub local: RefCell<BTreeMap<(DomId, u32), Port>>,
    pub notified: RefCell<Vec<Port>>,
    pub order: RefCell<Vec<&'static str>>,
    pub mapped: Cell<i32>,
    pub bound: Cell<i32>,
    pub now: Cell<Nanos>,
    pub operations: Cell<u64>,
    pub deaf: Cell<bool>,
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.into() } else { format!("/local/domain/{DRIVER}/{path}") }
}

impl World {
    pub fn get(&self, path: &str) -> Option<String> {
        self.nodes.borrow().get(&absolute(path)).cloned()
    }

    pub fn set(&self, path: &str, value: &str) {
        let path = absolute(path);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
        assert!(path.bytes().all(valid), "xenstored refuses the path {path}");
        self.nodes.borrow_mut().insert(path.clone(), value.into());
        self.fire(&path);
    }

    pub fn remove(&self, path: &str) -> bool {
        let path = absolute(path);
        let below = format!("{path}/");
        let mut nodes = self.nodes.borrow_mut();
        let gone: Vec<_> = nodes.keys().filter(|key| **key == path || key.starts_with(&below)).cloned().collect();
        gone.iter().for_each(|key| drop(nodes.remove(key)));
        drop(nodes);
        for key in &gone {
            self.fire(key);
        }
        if !gone.is_empty() {
            self.fire(&path);
        }
        !gone.is_empty()
    }

    fn fire(&self, path: &str) {
        let prefix = format!("/local/domain/{DRIVER}/");
        for (watch, token) in self.watches.borrow().iter() {
            let full = absolute(watch);
            if path == full || path.starts_with(&format!("{full}/")) {
                let told = if watch.starts_with('/') { path } else { path.strip_prefix(&prefix).unwrap_or(path) };
                self.events.borrow_mut().push_back((told.into(), token.clone()));
            }
        }
    }
}

pub struct StoreClient(Rc<World>);

impl StoreClient {
    fn count(&self) -> Result<(), StoreError> {
        self.0.operations.set(self.0.operations.get() + 1);
        if self.0.deaf.get() { Err(StoreError::Timeout) } else { Ok(()) }
    }
}

impl Store for StoreClient {
    fn read(&mut self, _: Option<Transaction>, path: &str) -> Result<String, StoreError> {
        self.count()?;
        // What is missing below a folder that only dom0 may read answers "denied", as in xenstored.
        let foreign = path.starts_with("/local/domain/");
        self.0.get(path).ok_or(if foreign { StoreError::Denied } else { StoreError::NotFound })
    }
    fn write(&mut self, _: Option<Transaction>, path: &str, value: &str) -> Result<(), StoreError> {
        self.count()?;
        self.0.set(path, value);
        Ok(())
    }
    fn remove(&mut self, _: Option<Transaction>, path: &str) -> Result<(), StoreError> {
        self.count()?;
        if self.0.remove(path) { Ok(()) } else { Err(StoreError::NotFound) }
    }
    fn list(&mut self, _: Option<Transaction>, path: &str) -> Result<Vec<String>, StoreError> {
        self.count()?;
        let below = format!("{}/", absolute(path));
        let nodes = self.0.nodes.borrow();
        let names: BTreeSet<String> = nodes
            .keys()
            .filter_map(|key| key.strip_prefix(&below))
            .filter_map(|rest| rest.split('/').next())
            .map(String::from)
            .collect();
        Ok(names.into_iter().collect())
    }
    fn begin(&mut self) -> Result<Transaction, StoreError> {
        Ok(Transaction(1))
    }
    fn end(&mut self, _: Transaction, _: bool) -> Result<(), StoreError> {
        Ok(())
    }
    fn watch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.count()?;
        self.0.watches.borrow_mut().push((path.into(), token.into()));
        self.0.events.borrow_mut().push_back((path.into(), token.into()));
        Ok(())
    }
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.count()?;
        self.0.watches.borrow_mut().retain(|watch| watch != &(path.into(), token.into()));
        Ok(())
    }
}

pub struct Machine {
    world: Rc<World>,
    store: StoreClient,
}

impl Platform for Machine {
    type Config = Config;
    type Page = Page;
    type Channel = Port0;
    type Store = StoreClient;

    fn store(&mut self) -> &mut StoreClient {
        &mut self.store
    }
    fn open_config(&mut self, sbdf: Sbdf) -> Result<Config, String> {
        self.world.hardware.borrow().get(&sbdf).cloned().map(Config).ok_or_else(|| "no frame".into())
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
}

/// A started backend in its world.
pub struct Rig {
    pub world: Rc<World>,
    pub backend: Backend<Machine>,
}

/// Boots a driver domain with the functions of `cmdline`, each a card 8086:100e unless placed before.
pub fn boot(cmdline: &str) -> Rig {
    boot_in(Rc::default(), cmdline)
}

pub fn boot_in(world: Rc<World>, cmdline: &str) -> Rig {
    let (config, complaints) = cmdline::parse(&format!("ecam=0000:00-ff@b0000000 mode=mmcfg0 {cmdline}"));
    for device in &config.devices {
        world.hardware.borrow_mut().entry(device.sbdf).or_insert_with(|| Rc::new(Hardware::card(0x8086, 0x100e)));
    }
    world.now.set(1_000_000_000_000);
    let machine = Machine { world: world.clone(), store: StoreClient(world.clone()) };
    let mut rig = Rig { backend: Backend::new(machine, config, complaints), world };
    rig.backend.start();
    rig.settle();
    rig
}

impl Rig {
    /// Delivers events until none is left; more than a fixed number means that they feed themselves.
    pub fn settle(&mut self) {
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

    /// One turn of the event channels.
    pub fn serve(&mut self) -> bool {
        let world = self.world.clone();
        self.backend.serve(|_, port| world.pending.borrow_mut().remove(&port))
    }

    pub fn hardware(&self, sbdf: &str) -> Rc<Hardware> {
        self.world.hardware.borrow()[&sbdf.parse::<Sbdf>().unwrap()].clone()
    }

    pub fn published(&self, sbdf: &str, node: &str) -> Option<String> {
        self.world.get(&format!("data/pciback/device/{}/{node}", sbdf.replace([':', '.'], "-")))
    }

    /// What the toolstack writes for a first attach.
    pub fn attach(&mut self, guest: DomId, functions: &[&str]) -> Guest {
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

/// One guest with its pcifront.
pub struct Guest {
    pub id: DomId,
    pub world: Rc<World>,
    pub page: Rc<Shared>,
    pub ring: (u32, u32),
}

impl Guest {
    pub fn back(&self, node: &str) -> Option<String> {
        self.world.get(&format!("backend/pci/{}/0/{node}", self.id))
    }
    pub fn set_back(&self, node: &str, value: &str) {
        self.world.set(&format!("backend/pci/{}/0/{node}", self.id), value);
    }
    pub fn front(&self, node: &str) -> Option<String> {
        self.world.get(&format!("/local/domain/{}/device/pci/0/{node}", self.id))
    }
    pub fn set_front(&self, node: &str, value: &str) {
        self.world.set(&format!("/local/domain/{}/device/pci/0/{node}", self.id), value);
    }

    /// The nodes of function `index` of the list.
    pub fn list(&self, index: usize, sbdf: &str) {
        for (node, value) in [
            ("dev", sbdf),
            ("key", sbdf),
            ("opts", "msitranslate=0,power_mgmt=0,permissive=0,rdm_policy=strict"),
            ("id", "8086:100e"),
            ("irq", "21"),
            ("resource", RESOURCES),
            ("state", "1"),
        ] {
            self.set_back(&format!("{node}-{index}"), value);
        }
    }

    /// pcifront's probe: a fresh page and port, published, state Initialised.
    pub fn publish(&mut self, rig: &mut Rig) {
        self.page = Rc::default();
        self.page.flags.set(2);
        self.ring = (self.ring.0 + 1, self.ring.1 + 1);
        self.world.pages.borrow_mut().insert((self.id, self.ring.0), self.page.clone());
        self.world.ports.borrow_mut().insert((self.id, self.ring.1));
        self.set_front("pci-op-ref", &self.ring.0.to_string());
        self.set_front("event-channel", &self.ring.1.to_string());
        self.set_front("magic", "7");
        self.set_front("state", "3");
        rig.settle();
    }

    /// Publishes and goes to Connected as pcifront does.
    pub fn connect(&mut self, rig: &mut Rig) {
        self.publish(rig);
        assert_eq!(self.back("state").as_deref(), Some("4"), "{:?}", self.back("error"));
        self.set_front("state", "4");
        rig.settle();
    }

    /// One request through page and event channel.
    pub fn request(&self, rig: &mut Rig, request: RawRequest) -> RawReply {
        self.page.request.set(request);
        self.page.flags.set(self.page.flags.get() | PCIF_ACTIVE);
        let port = self.world.local.borrow()[&(self.id, self.ring.1)];
        self.world.pending.borrow_mut().insert(port);
        rig.settle();
        assert_eq!(self.page.flags.get(), 2, "active is cleared and the client's own bit is not");
        self.page.reply.take().expect("a reply")
    }

    /// A configuration read at virtual `devfn`.
    pub fn read(&self, rig: &mut Rig, devfn: u32, offset: i32, size: i32) -> Result<u32, i32> {
        let reply = self.request(rig, RawRequest { cmd: 0, devfn, offset, size, ..Default::default() });
        if reply.err == 0 { Ok(reply.value) } else { Err(reply.err) }
    }

    /// A configuration write at virtual `devfn`.
    pub fn write(&self, rig: &mut Rig, devfn: u32, offset: i32, size: i32, value: u32) -> i32 {
        self.request(rig, RawRequest { cmd: 1, devfn, offset, size, value, ..Default::default() }).err
    }

    /// The guest is destroyed: Xen's tools remove its folder.
    pub fn destroy(&self, rig: &mut Rig) {
        self.world.remove(&format!("/local/domain/{}", self.id));
        rig.settle();
    }
}
