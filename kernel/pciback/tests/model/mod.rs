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

/// What somebody else does to xenstore between two operations of the backend; the number counts them.
type Meanwhile = Box<dyn FnMut(u64, &World)>;

/// A transaction: the tree as it was at its start with its own changes in it, and those changes.
struct Open {
    generation: u64,
    nodes: BTreeMap<String, String>,
    changes: Vec<(String, Option<String>)>,
}

/// All there is.
#[derive(Default)]
pub struct World {
    /// Counts changes: a transaction that saw an older tree has to be repeated.
    pub generation: Cell<u64>,
    transactions: RefCell<BTreeMap<u32, Open>>,
    last_transaction: Cell<u32>,
    pub meanwhile: RefCell<Option<Meanwhile>>,
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

/// Writes a node and makes its parents, as xenstored does.
fn insert(nodes: &mut BTreeMap<String, String>, path: &str, value: &str) {
    for (at, _) in path.match_indices('/').skip(1) {
        nodes.entry(path[..at].into()).or_default();
    }
    nodes.insert(path.into(), value.into());
}

/// Removes a node with all below it; returns what is gone.
fn remove(nodes: &mut BTreeMap<String, String>, path: &str) -> Vec<String> {
    let below = format!("{path}/");
    let gone: Vec<_> = nodes.keys().filter(|key| *key == path || key.starts_with(&below)).cloned().collect();
    gone.iter().for_each(|key| drop(nodes.remove(key)));
    gone
}

impl World {
    pub fn get(&self, path: &str) -> Option<String> {
        self.nodes.borrow().get(&absolute(path)).cloned()
    }

    pub fn set(&self, path: &str, value: &str) {
        let path = absolute(path);
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_@".contains(&byte);
        assert!(path.bytes().all(valid), "xenstored refuses the path {path}");
        insert(&mut self.nodes.borrow_mut(), &path, value);
        self.generation.set(self.generation.get() + 1);
        self.fire(&path);
    }

    pub fn remove(&self, path: &str) -> bool {
        let path = absolute(path);
        let gone = remove(&mut self.nodes.borrow_mut(), &path);
        self.generation.set(self.generation.get() + 1);
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
                let event = (told.into(), token.clone());
                let mut events = self.events.borrow_mut();
                // One that waits already is not queued again, as in the image's client.
                if !events.contains(&event) {
                    events.push_back(event);
                }
            }
        }
    }
}

pub struct StoreClient(Rc<World>);

impl StoreClient {
    fn count(&self) -> Result<(), StoreError> {
        let world = &self.0;
        world.operations.set(world.operations.get() + 1);
        let meanwhile = world.meanwhile.borrow_mut().take();
        if let Some(mut act) = meanwhile {
            act(world.operations.get(), world);
            world.meanwhile.borrow_mut().get_or_insert(act);
        }
        if world.deaf.get() { Err(StoreError::Timeout) } else { Ok(()) }
    }

    /// Does something with the tree that `tx` sees.
    fn see<T>(&self, tx: Option<Transaction>, look: impl FnOnce(&BTreeMap<String, String>) -> T) -> T {
        match tx {
            None => look(&self.0.nodes.borrow()),
            Some(tx) => look(&self.0.transactions.borrow()[&tx.0].nodes),
        }
    }
}

impl Store for StoreClient {
    fn read(&mut self, tx: Option<Transaction>, path: &str) -> Result<String, StoreError> {
        self.count()?;
        // What is missing below a folder that only dom0 may read answers "denied", as in xenstored.
        let foreign = path.starts_with("/local/domain/");
        let found = self.see(tx, |nodes| nodes.get(&absolute(path)).cloned());
        found.ok_or(if foreign { StoreError::Denied } else { StoreError::NotFound })
    }
    fn write(&mut self, tx: Option<Transaction>, path: &str, value: &str) -> Result<(), StoreError> {
        self.count()?;
        let Some(tx) = tx else {
            self.0.set(path, value);
            return Ok(());
        };
        let mut transactions = self.0.transactions.borrow_mut();
        let open = transactions.get_mut(&tx.0).expect("an open transaction");
        insert(&mut open.nodes, &absolute(path), value);
        open.changes.push((path.into(), Some(value.into())));
        Ok(())
    }
    fn remove(&mut self, tx: Option<Transaction>, path: &str) -> Result<(), StoreError> {
        self.count()?;
        let Some(tx) = tx else {
            return if self.0.remove(path) { Ok(()) } else { Err(StoreError::NotFound) };
        };
        let mut transactions = self.0.transactions.borrow_mut();
        let open = transactions.get_mut(&tx.0).expect("an open transaction");
        if remove(&mut open.nodes, &absolute(path)).is_empty() {
            return Err(StoreError::NotFound);
        }
        open.changes.push((path.into(), None));
        Ok(())
    }
    fn list(&mut self, tx: Option<Transaction>, path: &str) -> Result<Vec<String>, StoreError> {
        self.count()?;
        let below = format!("{}/", absolute(path));
        self.see(tx, |nodes| {
            if !nodes.contains_key(&absolute(path)) {
                return Err(StoreError::NotFound);
            }
            let names = nodes.keys().filter_map(|key| key.strip_prefix(&below));
            Ok(names.filter(|rest| !rest.contains('/')).map(String::from).collect())
        })
    }
    fn begin(&mut self) -> Result<Transaction, StoreError> {
        self.count()?;
        let world = &self.0;
        let id = world.last_transaction.get() + 1;
        world.last_transaction.set(id);
        let open =
            Open { generation: world.generation.get(), nodes: world.nodes.borrow().clone(), changes: Vec::new() };
        world.transactions.borrow_mut().insert(id, open);
        assert_eq!(world.transactions.borrow().len(), 1, "one transaction at a time, and none left open");
        Ok(Transaction(id))
    }
    fn end(&mut self, tx: Transaction, commit: bool) -> Result<(), StoreError> {
        let answered = self.count();
        let world = &self.0;
        let open = world.transactions.borrow_mut().remove(&tx.0).expect("an open transaction");
        // What comes of an end without an answer nobody knows: the daemon may have seen it or not.
        if answered.is_err() && world.operations.get().is_multiple_of(2) {
            return answered;
        }
        if commit && open.generation != world.generation.get() {
            return Err(StoreError::Again);
        }
        for (path, value) in open.changes.iter().filter(|_| commit) {
            match value {
                Some(value) => world.set(path, value),
                None => drop(world.remove(path)),
            }
        }
        answered
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

    /// What `xl-pciback` does with its list after a detach: function `index` leaves it and the others close
    /// up, in one transaction.
    pub fn withdraw(&self, index: usize) {
        withdraw(&self.world, self.id, index);
    }

    /// The guest is destroyed: Xen's tools remove its folder.
    pub fn destroy(&self, rig: &mut Rig) {
        self.world.remove(&format!("/local/domain/{}", self.id));
        rig.settle();
    }
}

/// [`Guest::withdraw`], for use while the guest is elsewhere.
pub fn withdraw(world: &World, guest: DomId, index: usize) {
    let node = |name: &str| format!("/local/domain/{DRIVER}/backend/pci/{guest}/0/{name}");
    let count: usize = world.get(&node("num_devs")).unwrap().parse().unwrap();
    let mut changed = vec![node("num_devs")];
    {
        let mut nodes = world.nodes.borrow_mut();
        for name in ["dev", "key", "opts", "id", "irq", "resource", "state", "vdev", "error"] {
            for at in index..count {
                let next = nodes.get(&node(&format!("{name}-{}", at + 1))).cloned().filter(|_| at + 1 < count);
                let path = node(&format!("{name}-{at}"));
                match next {
                    Some(value) => drop(nodes.insert(path.clone(), value)),
                    None => drop(nodes.remove(&path)),
                }
                changed.push(path);
            }
        }
        nodes.insert(node("num_devs"), (count - 1).to_string());
    }
    world.generation.set(world.generation.get() + 1);
    // xenstored tells of a transaction's changes when all of them are made.
    changed.iter().for_each(|path| world.fire(path));
}
