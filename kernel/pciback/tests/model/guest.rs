//! One guest with its pcifront, and the page it shares with the backend.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use pciback::physdev::Pirq;
use pciback::platform::{Channel, DomId, Port, SharedPage};
use pciback::wire::{AerRequest, MsixEntry, PCIB_ACTIVE, PCIF_ACTIVE, RawReply, RawRequest, op};

use super::xen::Stage;
use super::{DRIVER, Rig, World};

/// What a hostile second vCPU does to the page.
type SecondVcpu = Box<dyn FnMut(&Shared)>;

/// A page as guest and backend share it.
#[derive(Default)]
pub struct Shared {
    pub flags: Cell<u32>,
    pub request: Cell<RawRequest>,
    pub entries: RefCell<Vec<MsixEntry>>,
    pub reply: Cell<Option<RawReply>>,
    pub request_reads: Cell<u32>,
    /// `aer_op`, with what stands in its `err`.
    pub aer: Cell<Option<AerRequest>>,
    pub aer_err: Cell<i32>,
    pub aer_reads: Cell<u32>,
    /// Called while the request is being executed: a hostile second vCPU.
    pub during: RefCell<Option<SecondVcpu>>,
    /// Called when the reply is complete: a guest that has the next request ready.
    pub after: RefCell<Option<SecondVcpu>>,
}

pub struct Page(pub Rc<Shared>, pub Rc<World>);

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
    fn msix_entries(&self, into: &mut [MsixEntry]) {
        let entries = self.0.entries.borrow();
        for (index, entry) in into.iter_mut().enumerate() {
            *entry = entries.get(index).copied().unwrap_or_default();
        }
    }
    fn reply_vectors(&self, entries: &[MsixEntry]) {
        for (entry, reply) in self.0.entries.borrow_mut().iter_mut().zip(entries) {
            entry.vector = reply.vector;
        }
    }
    fn reply(&self, reply: &RawReply) {
        self.0.reply.set(Some(*reply));
    }
    fn clear_active(&self) -> u32 {
        let before = self.0.flags.replace(self.0.flags.get() & !PCIF_ACTIVE);
        if let Some(after) = self.0.after.borrow_mut().as_mut() {
            after(&self.0);
        }
        before
    }
    fn aer_request(&self, request: &AerRequest) {
        self.0.aer.set(Some(*request));
        self.0.aer_err.set(request.state.cast_signed());
    }
    fn set_aer_active(&self) {
        self.0.flags.set(self.0.flags.get() | PCIB_ACTIVE);
    }
    fn clear_aer_active(&self) {
        self.0.flags.set(self.0.flags.get() & !PCIB_ACTIVE);
    }
    fn aer_result(&self) -> i32 {
        self.0.aer_reads.set(self.0.aer_reads.get() + 1);
        self.0.aer_err.get()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.1.mapped.set(self.1.mapped.get() - 1);
        self.1.order.borrow_mut().push("unmap");
    }
}

pub struct Port0(pub Port, pub Rc<World>);

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

    /// What the toolstack does for function `index` of the list: the assignment, then the nodes.
    pub fn list(&self, index: usize, sbdf: &str) {
        if let Some(sbdf) = self.world.address(sbdf)
            && self.world.published(sbdf, "state").as_deref() == Some("ready")
        {
            self.world.assign(sbdf, self.id);
        }
        let card = self.world.address(sbdf).map(|sbdf| self.world.hardware.borrow()[&sbdf].clone());
        // dom0 has no interrupt for a virtual function.
        let irq = if card.as_ref().is_some_and(|card| card.is_virtual()) { "0" } else { "21" };
        let (ids, resources) = card.map_or_else(Default::default, |card| (card.ids(), card.resources.clone()));
        for (node, value) in [
            ("dev", sbdf),
            ("key", sbdf),
            ("opts", "msitranslate=0,power_mgmt=0,permissive=0,rdm_policy=strict"),
            ("id", ids.as_str()),
            ("irq", irq),
            ("resource", resources.as_str()),
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

    /// Puts a request into the page and rings.
    pub fn post(&self, request: RawRequest) {
        self.page.request.set(request);
        self.page.flags.set(self.page.flags.get() | PCIF_ACTIVE);
        let port = self.world.local.borrow()[&(self.id, self.ring.1)];
        self.world.pending.borrow_mut().insert(port);
    }

    /// What the backend asks about an error: operation and channel state, for virtual `devfn` of bus 0000:00.
    pub fn asked(&self) -> Option<(u32, u32, u32)> {
        let active = self.page.flags.get() & PCIB_ACTIVE != 0;
        let AerRequest { cmd, state, domain, bus, devfn } = self.page.aer.get().filter(|_| active)?;
        assert_eq!((domain, bus), (0, 0));
        Some((cmd, state, devfn))
    }

    /// Answers that, as pcifront does, and rings.
    pub fn answer(&self, rig: &mut Rig, result: i32) {
        assert!(self.asked().is_some(), "nothing was asked");
        self.page.aer_err.set(result);
        self.page.flags.set(self.page.flags.get() & !PCIB_ACTIVE);
        self.ring(rig);
    }

    /// An event to the backend.
    pub fn ring(&self, rig: &mut Rig) {
        let port = self.world.local.borrow()[&(self.id, self.ring.1)];
        self.world.pending.borrow_mut().insert(port);
        rig.deliver();
    }

    /// The reply to what was posted.
    pub fn reply(&self) -> RawReply {
        assert_eq!(self.page.flags.get() & !PCIB_ACTIVE, 2, "active is cleared and the client's own bit is not");
        self.page.reply.take().expect("a reply")
    }

    /// One request through page and event channel.
    pub fn request(&self, rig: &mut Rig, request: RawRequest) -> RawReply {
        self.post(request);
        rig.settle();
        self.reply()
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

    /// An operation on the interrupts of the function at virtual `devfn`.
    pub fn operate(&self, rig: &mut Rig, cmd: u32, devfn: u32, value: u32) -> RawReply {
        self.request(rig, RawRequest { cmd, devfn, value, info: value, ..Default::default() })
    }

    /// What a driver does first: decoding and bus mastering on.
    pub fn enable(&self, rig: &mut Rig) {
        assert_eq!(self.write(rig, 0, 4, 2, 0x0006), 0);
    }

    pub fn enable_msi(&self, rig: &mut Rig) -> Result<Pirq, i32> {
        let reply = self.operate(rig, op::ENABLE_MSI, 0, 0);
        if reply.err == 0 { Ok(reply.value.cast_signed()) } else { Err(reply.err) }
    }

    /// Puts MSI-X entries into the page, as Linux does: without a vector yet.
    pub fn put_entries(&self, entries: &[u16]) {
        *self.page.entries.borrow_mut() =
            entries.iter().map(|entry| MsixEntry { vector: 0xffff, entry: *entry }).collect();
    }

    /// The vectors that are in the page.
    pub fn vectors(&self) -> Vec<Pirq> {
        self.page.entries.borrow().iter().map(|entry| Pirq::from(entry.vector)).collect()
    }

    pub fn enable_msix(&self, rig: &mut Rig, entries: &[u16]) -> Result<Vec<Pirq>, i32> {
        self.put_entries(entries);
        let reply = self.operate(rig, op::ENABLE_MSIX, 0, entries.len() as u32);
        if reply.err == 0 {
            assert_eq!(reply.value, 0, "what Linux takes for success");
            return Ok(self.vectors());
        }
        assert!(self.vectors().iter().all(|vector| *vector == 0xffff), "a failure names no vectors");
        Err(reply.err)
    }

    /// Returns the pirq of the interrupt pin.
    pub fn disable_msi(&self, rig: &mut Rig) -> u32 {
        let reply = self.operate(rig, op::DISABLE_MSI, 0, 0);
        assert_eq!(reply.err, 0);
        reply.value
    }

    /// Returns the pirq of the interrupt pin.
    pub fn disable_msix(&self, rig: &mut Rig) -> u32 {
        let reply = self.operate(rig, op::DISABLE_MSIX, 0, 0);
        assert_eq!(reply.err, 0);
        reply.value
    }

    /// The driver requests an interrupt.
    pub fn bind(&self, pirq: Pirq) {
        assert_eq!(self.world.xen.bind(self.id, pirq), Ok(()));
    }

    /// The driver frees it.
    pub fn close(&self, pirq: Pirq) {
        self.world.xen.close(self.id, pirq);
    }

    /// What `xl-pciback` does with its list after a detach: function `index` leaves it and the others close
    /// up, in one transaction.
    pub fn withdraw(&self, index: usize) {
        withdraw(&self.world, self.id, index);
    }

    /// The guest is destroyed as `xl destroy` does: its folder goes first, then the domain.
    pub fn destroy(&self, rig: &mut Rig) {
        self.leave();
        rig.settle();
        self.die(Stage::Freed);
        rig.settle();
    }

    /// Its folder goes.
    pub fn leave(&self) {
        self.world.remove(&format!("/local/domain/{}", self.id));
    }

    /// Xen gets this far with the end of the domain.
    pub fn die(&self, stage: Stage) {
        self.world.xen.kill(self.id, stage);
    }
}

/// [`Guest::withdraw`], for use while the guest is elsewhere.
pub fn withdraw(world: &World, guest: DomId, index: usize) {
    let node = |name: &str| format!("/local/domain/{DRIVER}/backend/pci/{guest}/0/{name}");
    let count: usize = world.get(&node("num_devs")).unwrap().parse().unwrap();
    if let Some(sbdf) = world.get(&node(&format!("dev-{index}"))).and_then(|name| world.address(&name)) {
        world.xen.deassign(sbdf, guest);
    }
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
