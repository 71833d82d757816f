//! Xen as far as message interrupts go: `xen/arch/x86/msi.c`, `irq.c` and `common/domain.c` of 4.17.5, and the
//! config-owner change on top. Functions have Xen's names and its order of steps, oddities included: what a later
//! step of Xen makes of a state is what the tests are about.
//!
//! A configuration write on a Xen that would end the domain for it panics, so every test proves that none is made.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use pciback::physdev::{Pirq, Vector};
use pciback::platform::{DomId, Nanos, Width};
use pciback::sbdf::Sbdf;

use super::hardware::{BAR0, ENABLE, Hardware, INTX_DISABLE, MASKALL, MSI_ENABLE, at};

/// Error numbers of `xen/errno.h`, positive.
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ESRCH: i32 = 3;
    pub const ENXIO: i32 = 6;
    pub const ENOMEM: i32 = 12;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const ENODEV: i32 = 19;
    pub const EINVAL: i32 = 22;
    pub const ENFILE: i32 = 23;
    pub const ENOSPC: i32 = 28;
    pub const ENOSYS: i32 = 38;
    pub const ENODATA: i32 = 61;
    pub const EOPNOTSUPP: i32 = 95;
}
use errno::*;

type Answer<T = ()> = Result<T, i32>;
type Irq = i32;

/// The first pirq behind those of interrupt pins.
const FIRST_PIRQ: Pirq = 24;

/// What Xen is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// With the config-owner change.
    Owner,
    /// Without, 4.17: no physdev operation passes for a PVH domain.
    Stock417,
    /// Without, 4.20: mapping passes the first filter and then needs a privilege.
    Stock420,
    /// Without, and booted with `mmcfg=0`: it does not protect the frames.
    Mmcfg0,
}

/// A kind of hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Prepare,
    Release,
    Restore,
    Map,
    Unmap,
}

/// What the driver domain did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// A configuration write.
    Write(u16, u32),
    Prepare,
    Release,
    Restore,
    Map(DomId, Vector),
    Unmap(DomId, Pirq),
}

/// One entry of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub act: Act,
    /// `None`: a mapping that Xen knows nothing of.
    pub sbdf: Option<Sbdf>,
    pub answer: Answer<Pirq>,
    pub at: Nanos,
}

/// A wrong answer to some uses of a call.
struct Fault {
    call: Call,
    /// Uses from this one to before that one.
    uses: std::ops::Range<u64>,
    until: Nanos,
    errno: i32,
}

/// How far a domain's end has come, in the order of `domain_kill` and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Alive,
    Dying,
    /// `evtchn_destroy`: vectors in use are masked and shut down.
    ChannelsClosed,
    /// `domain_relinquish_resources`: its functions are quarantined.
    Deassigned,
    /// The last reference is gone: no call finds the domain any more.
    Unlisted,
    /// `complete_domain_destroy`: its pirqs are freed, which happens after an RCU grace period.
    Freed,
}

/// Whose a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assigned {
    Dom0,
    /// Quarantined: `dom_io`.
    Nobody,
    To(DomId),
}

/// `struct arch_msix`.
#[derive(Clone, Copy, Debug, Default)]
struct Msix {
    host_maskall: bool,
    guest_maskall: bool,
    used_entries: u32,
    table_first: u64,
}

/// `struct pci_dev`.
#[derive(Debug)]
struct Function {
    assigned: Assigned,
    msix: Option<Msix>,
    /// First interrupts of what is in `msi_list`.
    list: Vec<Irq>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Msi { nr: u8, nvec: u8 },
    Msix { entry: u16 },
}

/// `struct irq_desc` with its `struct msi_desc`.
#[derive(Clone, Copy, Debug)]
struct Desc {
    sbdf: Sbdf,
    kind: Kind,
    /// MSI: offset of the mask bits, if it has any.
    mask_at: Option<u16>,
    domain: DomId,
    pirq: Pirq,
    host_masked: bool,
    guest_masked: bool,
    /// `IRQ_GUEST`: an event channel is bound to it.
    bound: bool,
}

#[derive(Debug)]
struct Domain {
    stage: Stage,
    /// Message pirqs it can have: `extra_guest_irqs`.
    limit: i32,
    /// Interrupts by pirq; negative: unmapped while the guest still has an event channel bound.
    pirqs: BTreeMap<Pirq, Irq>,
}

/// The functions on the host's buses, and the time.
#[derive(Clone, Default)]
pub struct Bus {
    pub functions: Rc<RefCell<BTreeMap<Sbdf, Rc<Hardware>>>>,
    pub now: Rc<Cell<Nanos>>,
}

impl Bus {
    pub fn get(&self, sbdf: Sbdf) -> Option<Rc<Hardware>> {
        self.functions.borrow().get(&sbdf).cloned()
    }
    pub fn read(&self, sbdf: Sbdf, at: u16, width: Width) -> u32 {
        self.get(sbdf).map_or(width.mask(), |function| function.read(self.now.get(), at, width))
    }
    pub fn write(&self, sbdf: Sbdf, at: u16, width: Width, value: u32) {
        if let Some(function) = self.get(sbdf) {
            function.write(self.now.get(), at, width, value);
        }
    }
    fn word(&self, sbdf: Sbdf, at: u16) -> u16 {
        self.read(sbdf, at, Width::Word) as u16
    }
    fn set_word(&self, sbdf: Sbdf, at: u16, value: u16) {
        self.write(sbdf, at, Width::Word, value.into());
    }
    fn capability(&self, sbdf: Sbdf, id: u8) -> Option<u16> {
        self.get(sbdf)?.capability(id)
    }
    fn memory_decoded(&self, sbdf: Sbdf) -> bool {
        // What does not answer reads as ones.
        self.get(sbdf).is_some_and(|card| card.decodes() || card.silence(self.now.get()).is_some())
    }
    fn table_write(&self, sbdf: Sbdf, entry: u16, change: impl FnOnce(&mut super::hardware::Entry)) {
        if let Some(function) = self.get(sbdf) {
            function.table_write(self.now.get(), entry, change);
        }
    }
}

/// What somebody else does while the driver domain makes its n-th hypercall.
type Meanwhile = Box<dyn FnMut(u64, Call, &Xen)>;

pub struct Xen {
    pub bus: Bus,
    pub flavour: Cell<Flavour>,
    /// What is done now is done by dom0's tool.
    pub by_dom0: Cell<bool>,
    /// Functions whose frame the driver domain was not given.
    pub foreign: RefCell<BTreeSet<Sbdf>>,
    /// Interrupt remapping is on.
    pub remapping: Cell<bool>,
    /// What the remapping tables answer instead of taking an entry.
    pub remapping_error: Cell<Option<i32>>,
    /// Time that each hypercall takes.
    pub cost: Cell<Nanos>,
    pub meanwhile: RefCell<Option<Meanwhile>>,
    pub done: RefCell<Vec<Done>>,
    /// Writes that the intercept refused.
    pub refused: Cell<u32>,
    calls: Cell<u64>,
    uses: RefCell<[u64; 5]>,
    faults: RefCell<Vec<Fault>>,
    state: RefCell<State>,
}

impl Xen {
    pub fn new(bus: Bus) -> Xen {
        Xen {
            flavour: Cell::new(Flavour::Owner),
            by_dom0: Cell::new(false),
            foreign: RefCell::default(),
            remapping: Cell::new(true),
            remapping_error: Cell::new(None),
            cost: Cell::new(0),
            meanwhile: RefCell::default(),
            done: RefCell::default(),
            refused: Cell::new(0),
            calls: Cell::new(0),
            uses: RefCell::default(),
            faults: RefCell::default(),
            state: RefCell::new(State { bus: bus.clone(), ..State::default() }),
            bus,
        }
    }

    /// Uses number `uses` of `call` from now on, the next being 0, answer `errno`.
    pub fn fail(&self, call: Call, uses: std::ops::Range<u64>, errno: i32) {
        let so_far = self.uses.borrow()[call as usize];
        let uses = so_far + uses.start..so_far.saturating_add(uses.end);
        self.faults.borrow_mut().push(Fault { call, uses, until: Nanos::MAX, errno });
    }

    /// All uses of `call` answer `errno` for this long.
    pub fn fail_for(&self, call: Call, time: Nanos, errno: i32) {
        let until = self.bus.now.get() + time;
        self.faults.borrow_mut().push(Fault { call, uses: 0..u64::MAX, until, errno });
    }

    /// Every call answers truly again.
    pub fn heal(&self) {
        self.faults.borrow_mut().clear();
    }

    /// What the driver domain did to `sbdf`.
    pub fn acts(&self, sbdf: Sbdf) -> Vec<Act> {
        self.done.borrow().iter().filter(|done| done.sbdf == Some(sbdf)).map(|done| done.act).collect()
    }

    fn record(&self, sbdf: Option<Sbdf>, act: Act, answer: Answer<Pirq>) {
        self.done.borrow_mut().push(Done { act, sbdf, answer, at: self.bus.now.get() });
    }

    /// A configuration write of the driver domain.
    pub fn config_write(&self, sbdf: Sbdf, at: u16, width: Width, value: u32) {
        let mut value = value;
        let owned = !self.foreign.borrow().contains(&sbdf);
        self.record(Some(sbdf), Act::Write(at, value), Ok(0));
        match self.flavour.get() {
            flavour if self.by_dom0.get() || flavour == Flavour::Owner && owned => {
                if !self.state.borrow_mut().conf_write_intercept(sbdf, at, width, &mut value) {
                    self.refused.set(self.refused.get() + 1);
                    return;
                }
            }
            Flavour::Mmcfg0 => {}
            flavour => panic!("domain_crash: {flavour:?}, a write to the read-only frame of {sbdf}"),
        }
        self.bus.write(sbdf, at, width, value);
    }

    /// What comes before every hypercall: the filter, and whose `sbdf` is.
    fn enter(&self, call: Call, sbdf: Option<Sbdf>) -> Answer {
        self.bus.now.set(self.bus.now.get() + self.cost.get());
        self.calls.set(self.calls.get() + 1);
        let use_number = {
            let mut uses = self.uses.borrow_mut();
            uses[call as usize] += 1;
            uses[call as usize] - 1
        };
        let meanwhile = self.meanwhile.borrow_mut().take();
        if let Some(mut act) = meanwhile {
            act(self.calls.get(), call, self);
            self.meanwhile.borrow_mut().get_or_insert(act);
        }
        let foreign = self.foreign.borrow();
        let owns_any = self.bus.functions.borrow().keys().any(|sbdf| !foreign.contains(sbdf));
        match self.flavour.get() {
            _ if self.by_dom0.get() => {}
            Flavour::Owner if owns_any => {}
            Flavour::Stock420 if matches!(call, Call::Map | Call::Unmap) => return Err(EPERM),
            Flavour::Owner | Flavour::Stock417 | Flavour::Stock420 | Flavour::Mmcfg0 => return Err(ENOSYS),
        }
        if !self.by_dom0.get() && sbdf.is_some_and(|sbdf| foreign.contains(&sbdf)) {
            return Err(EPERM);
        }
        let now = self.bus.now.get();
        let mut faults = self.faults.borrow_mut();
        faults.retain(|fault| now < fault.until);
        match faults.iter().find(|fault| fault.call == call && fault.uses.contains(&use_number)) {
            Some(fault) => Err(fault.errno),
            None => Ok(()),
        }
    }

    pub fn prepare_msix(&self, sbdf: Sbdf) -> Answer {
        let answer =
            self.enter(Call::Prepare, Some(sbdf)).and_then(|()| self.state.borrow_mut().msi_state_op(sbdf, false));
        self.record(Some(sbdf), Act::Prepare, answer.map(|()| 0));
        answer
    }

    pub fn release_msix(&self, sbdf: Sbdf) -> Answer {
        let answer =
            self.enter(Call::Release, Some(sbdf)).and_then(|()| self.state.borrow_mut().msi_state_op(sbdf, true));
        self.record(Some(sbdf), Act::Release, answer.map(|()| 0));
        answer
    }

    pub fn restore_msi(&self, sbdf: Sbdf) -> Answer {
        let answer = self.enter(Call::Restore, Some(sbdf)).and_then(|()| self.state.borrow_mut().restore(sbdf));
        self.record(Some(sbdf), Act::Restore, answer.map(|()| 0));
        answer
    }

    pub fn map(&self, domain: DomId, sbdf: Sbdf, vector: Vector) -> Answer<Pirq> {
        let remapping = Remapping { on: self.remapping.get(), error: self.remapping_error.get() };
        let answer = self
            .enter(Call::Map, Some(sbdf))
            .and_then(|()| self.state.borrow_mut().map_pirq(domain, sbdf, vector, remapping));
        self.record(Some(sbdf), Act::Map(domain, vector), answer);
        answer
    }

    pub fn unmap(&self, domain: DomId, pirq: Pirq) -> Answer {
        let sbdf = self.state.borrow().function_of(domain, pirq);
        let answer = self.enter(Call::Unmap, sbdf).and_then(|()| {
            let mut state = self.state.borrow_mut();
            state.listed(domain)?;
            state.unmap_domain_pirq(domain, pirq)
        });
        self.record(sbdf, Act::Unmap(domain, pirq), answer.map(|()| 0));
        answer
    }

    /// dom0 creates a PV domain.
    pub fn create(&self, domain: DomId) {
        let state = &mut *self.state.borrow_mut();
        let old = state.domains.get(&domain).is_none_or(|old| old.stage == Stage::Freed);
        if old {
            state.domains.insert(domain, Domain { stage: Stage::Alive, limit: 32, pirqs: BTreeMap::new() });
        }
    }

    /// `extra_guest_irqs`.
    pub fn limit(&self, domain: DomId, limit: i32) {
        self.state.borrow_mut().domain(domain).limit = limit;
    }

    /// Takes a message pirq of a domain for something else, so that the free ones are not in a row.
    pub fn occupy(&self, domain: DomId, pirq: Pirq) {
        self.state.borrow_mut().domain(domain).pirqs.insert(pirq, -1);
    }

    /// dom0 destroys the domain, up to and with this stage.
    pub fn kill(&self, domain: DomId, to: Stage) {
        let state = &mut *self.state.borrow_mut();
        for stage in [Stage::Dying, Stage::ChannelsClosed, Stage::Deassigned, Stage::Unlisted, Stage::Freed].into_iter()
        {
            if state.domains.get(&domain).is_none_or(|domain| domain.stage >= stage) || stage > to {
                continue;
            }
            match stage {
                Stage::ChannelsClosed => state.evtchn_destroy(domain),
                Stage::Deassigned => state.release_devices(domain),
                Stage::Freed => state.free_domain_pirqs(domain),
                Stage::Alive | Stage::Dying | Stage::Unlisted => {}
            }
            state.domain(domain).stage = stage;
        }
    }

    /// dom0 assigns a function: `XEN_DOMCTL_assign_device`.
    pub fn assign(&self, sbdf: Sbdf, domain: DomId) -> Answer {
        self.state.borrow_mut().assign_device(sbdf, domain)
    }

    /// dom0 takes it back into quarantine.
    pub fn deassign(&self, sbdf: Sbdf, domain: DomId) {
        let mut state = self.state.borrow_mut();
        if state.function(sbdf).assigned == Assigned::To(domain) {
            state.function(sbdf).assigned = Assigned::Nobody;
        }
    }

    /// Gives a function to whom it belonged from the start.
    pub fn set_assigned(&self, sbdf: Sbdf, assigned: Assigned) {
        self.state.borrow_mut().function(sbdf).assigned = assigned;
    }

    pub fn assigned(&self, sbdf: Sbdf) -> Assigned {
        self.state.borrow_mut().function(sbdf).assigned
    }

    /// The guest binds an event channel to a pirq.
    pub fn bind(&self, domain: DomId, pirq: Pirq) -> Answer {
        self.state.borrow_mut().evtchn_bind_pirq(domain, pirq)
    }

    /// The guest closes it.
    pub fn close(&self, domain: DomId, pirq: Pirq) {
        self.state.borrow_mut().evtchn_close(domain, pirq);
    }

    /// The guest masks or unmasks an interrupt of its own.
    pub fn mask(&self, domain: DomId, pirq: Pirq, mask: bool) {
        self.state.borrow_mut().guest_mask(domain, pirq, mask);
    }

    /// The pirqs of message interrupts that a domain has, those included that only wait for it to let go.
    pub fn pirqs(&self, domain: DomId) -> Vec<Pirq> {
        let state = self.state.borrow();
        state.domains.get(&domain).map(|domain| domain.pirqs.keys().copied().collect()).unwrap_or_default()
    }

    /// The pirqs that are mapped for a function, by domain, and the MSI-X entry or MSI vector of each.
    pub fn mapped(&self, sbdf: Sbdf) -> Vec<(DomId, Pirq, u16)> {
        let number = |kind| match kind {
            Kind::Msi { nr, .. } => u16::from(nr),
            Kind::Msix { entry } => entry,
        };
        let state = self.state.borrow();
        let of = state.descs.values().filter(|desc| desc.sbdf == sbdf);
        of.map(|desc| (desc.domain, desc.pirq, number(desc.kind))).collect()
    }

    /// Whether calls find the domain.
    pub fn listed(&self, domain: DomId) -> bool {
        self.state.borrow().listed(domain).is_ok()
    }

    /// Whether a function has vectors of MSI-X mapped, or of a domain that calls find.
    pub fn is_taken(&self, sbdf: Sbdf) -> bool {
        let state = self.state.borrow();
        let of = |desc: &Desc| matches!(desc.kind, Kind::Msix { .. }) || state.listed(desc.domain).is_ok();
        state.descs.values().any(|desc| desc.sbdf == sbdf && of(desc))
    }

    /// Interrupts of all domains and functions.
    pub fn interrupts(&self) -> usize {
        self.state.borrow().descs.len()
    }

    pub fn host_maskall(&self, sbdf: Sbdf) -> bool {
        self.state.borrow_mut().function(sbdf).msix.is_some_and(|msix| msix.host_maskall)
    }

    /// Xen masks all vectors of a function, for whatever reason it has.
    pub fn set_host_maskall(&self, sbdf: Sbdf) {
        self.state.borrow_mut().msix(sbdf).host_maskall = true;
    }

    pub fn guest_maskall(&self, sbdf: Sbdf) -> bool {
        self.state.borrow_mut().function(sbdf).msix.is_some_and(|msix| msix.guest_maskall)
    }

    /// Whether `prepare_msix` is in force.
    pub fn prepared(&self, sbdf: Sbdf) -> bool {
        self.state.borrow_mut().function(sbdf).msix.is_some_and(|msix| msix.table_first != 0)
    }

    /// Xen's own accounts must agree.
    pub fn check(&self) {
        let state = self.state.borrow();
        for (sbdf, function) in &state.functions {
            let of = |msix: bool| {
                let heads = function.list.iter().filter_map(|irq| state.descs.get(irq));
                heads.filter(|desc| matches!(desc.kind, Kind::Msix { .. }) == msix).count() as u32
            };
            if let Some(msix) = &function.msix {
                assert_eq!(msix.used_entries, of(true) + u32::from(msix.table_first != 0), "{sbdf}: {function:?}");
            }
            assert!(of(false) <= 1 && (of(false) == 0 || of(true) == 0), "{sbdf}: MSI and MSI-X");
        }
        for (irq, desc) in &state.descs {
            assert_eq!(state.domains[&desc.domain].pirqs.get(&desc.pirq), Some(irq), "{desc:?}");
        }
    }
}

/// Whether, and how well, interrupts are remapped.
#[derive(Clone, Copy)]
struct Remapping {
    on: bool,
    error: Option<i32>,
}

#[derive(Default)]
struct State {
    bus: Bus,
    functions: BTreeMap<Sbdf, Function>,
    domains: BTreeMap<DomId, Domain>,
    descs: BTreeMap<Irq, Desc>,
    last_irq: Irq,
}

const MSI_ID: u8 = 0x05;
const MSIX_ID: u8 = 0x11;

impl State {
    fn function(&mut self, sbdf: Sbdf) -> &mut Function {
        let msix = self.bus.capability(sbdf, MSIX_ID).map(|_| Msix::default());
        self.functions.entry(sbdf).or_insert(Function { assigned: Assigned::Nobody, msix, list: Vec::new() })
    }

    fn msix(&mut self, sbdf: Sbdf) -> &mut Msix {
        self.function(sbdf).msix.as_mut().expect("a function with MSI-X")
    }

    fn domain(&mut self, domain: DomId) -> &mut Domain {
        self.domains.get_mut(&domain).expect("a domain")
    }

    /// `rcu_lock_domain_by_id`.
    fn listed(&self, domain: DomId) -> Answer {
        match self.domains.get(&domain) {
            Some(found) if found.stage < Stage::Unlisted => Ok(()),
            _ => Err(ESRCH),
        }
    }

    fn function_of(&self, domain: DomId, pirq: Pirq) -> Option<Sbdf> {
        let irq = self.domains.get(&domain)?.pirqs.get(&pirq)?;
        self.descs.get(irq).map(|desc| desc.sbdf)
    }

    /// `msi_state_op` of the change.
    fn msi_state_op(&mut self, sbdf: Sbdf, off: bool) -> Answer {
        if self.bus.get(sbdf).is_none() {
            return Err(ENODEV);
        }
        if self.function(sbdf).assigned == Assigned::Dom0 {
            return Err(EBUSY);
        }
        if self.function(sbdf).msix.is_none() {
            return Err(ENODEV);
        }
        self.prepare_msix(sbdf, off)
    }

    /// `pci_prepare_msix`.
    fn prepare_msix(&mut self, sbdf: Sbdf, off: bool) -> Answer {
        if self.msix(sbdf).used_entries != u32::from(off) {
            return Err(EBUSY);
        }
        if off {
            self.cleanup_msix(sbdf);
            return Ok(());
        }
        self.msix_capability_init(sbdf, None)
    }

    fn cleanup_msix(&mut self, sbdf: Sbdf) {
        let msix = self.msix(sbdf);
        msix.used_entries -= 1;
        if msix.used_entries == 0 {
            msix.table_first = 0;
        }
    }

    fn msix_control(&self, sbdf: Sbdf) -> u16 {
        self.bus.capability(sbdf, MSIX_ID).expect("a function with MSI-X") + 2
    }

    fn read_pci_mem_bar(&self, sbdf: Sbdf, bar: u8) -> u64 {
        if bar > 5 {
            return 0;
        }
        if self.bus.get(sbdf).is_some_and(|card| card.is_virtual()) {
            // From the physical function's, whose only one in the model is this.
            return if bar == 0 { BAR0.into() } else { 0 };
        }
        let at = 0x10 + 4 * u16::from(bar);
        let low = self.bus.read(sbdf, at, Width::Dword);
        match low & 7 {
            0 => u64::from(low & !0xf),
            4 if bar < 5 => u64::from(low & !0xf) | u64::from(self.bus.read(sbdf, at + 4, Width::Dword)) << 32,
            _ => 0,
        }
    }

    fn msix_capability_init(&mut self, sbdf: Sbdf, entry: Option<u16>) -> Answer {
        let at = self.msix_control(sbdf);
        let mut maskall = self.msix(sbdf).host_maskall;
        let mut control = self.bus.word(sbdf, at);
        self.msix(sbdf).host_maskall = true;
        self.bus.set_word(sbdf, at, control | ENABLE | MASKALL);
        if !self.bus.memory_decoded(sbdf) {
            self.bus.set_word(sbdf, at, control & !ENABLE);
            return Err(ENXIO);
        }
        let location = self.bus.read(sbdf, at + 2, Width::Dword);
        if self.msix(sbdf).used_entries == 0 && entry.is_none() {
            let base = self.read_pci_mem_bar(sbdf, (location & 7) as u8);
            if base == 0 {
                self.bus.set_word(sbdf, at, control & !ENABLE);
                return Err(ENXIO);
            }
            self.msix(sbdf).table_first = base + u64::from(location & !7);
        } else if self.msix(sbdf).table_first == 0 {
            self.bus.set_word(sbdf, at, control);
            return Err(ENODATA);
        }
        if let Some(entry) = entry {
            self.bus.table_write(sbdf, entry, |entry| entry.masked = true);
        }
        let guest_maskall = self.msix(sbdf).guest_maskall;
        if self.msix(sbdf).used_entries == 0 {
            maskall = false;
            control = if guest_maskall { control | MASKALL } else { control & !MASKALL };
        }
        self.msix(sbdf).used_entries += 1;
        self.msix(sbdf).host_maskall = maskall;
        self.bus.set_word(sbdf, at, control);
        Ok(())
    }

    fn msi_set_enable(&self, sbdf: Sbdf, enable: bool) {
        if let Some(at) = self.bus.capability(sbdf, MSI_ID) {
            let control = self.bus.word(sbdf, at + 2) & !MSI_ENABLE;
            self.bus.set_word(sbdf, at + 2, control | if enable { MSI_ENABLE } else { 0 });
        }
    }

    /// Returns where the mask bits are, if there are any.
    fn msi_capability_init(&self, sbdf: Sbdf, nvec: u8) -> Answer<Option<u16>> {
        let at = self.bus.capability(sbdf, MSI_ID).ok_or(ENODEV)?;
        let control = self.bus.word(sbdf, at + 2);
        let most = 1u8 << (control >> 1 & 7);
        if nvec > most {
            return Err(ENFILE);
        }
        self.msi_set_enable(sbdf, false);
        let mask_at = (control & 0x100 != 0).then_some(at + if control & 0x80 != 0 { 0x10 } else { 0x0c });
        if let Some(mask_at) = mask_at {
            let masks = self.bus.read(sbdf, mask_at, Width::Dword) | u32::MAX >> (32 - most);
            self.bus.write(sbdf, mask_at, Width::Dword, masks);
        }
        self.bus.set_word(sbdf, at + 2, control & !0x70 | (nvec.trailing_zeros() as u16) << 4);
        Ok(mask_at)
    }

    /// `map_pirq` of the change, and `allocate_and_map_msi_pirq`.
    fn map_pirq(&mut self, domain: DomId, sbdf: Sbdf, vector: Vector, remapping: Remapping) -> Answer<Pirq> {
        self.listed(domain)?;
        if self.domain(domain).stage != Stage::Alive || self.function(sbdf).assigned != Assigned::To(domain) {
            return Err(ENODEV);
        }
        let heads = self.function(sbdf).list.clone();
        for irq in heads {
            match (vector, self.descs[&irq].kind) {
                (Vector::Msix { entry, .. }, Kind::Msix { entry: other }) if entry == other => return Err(EEXIST),
                (Vector::Msix { .. }, Kind::Msix { .. }) => {}
                _ => return Err(EBUSY),
            }
        }
        let count = match vector {
            Vector::Msi | Vector::Msix { .. } => 1,
            Vector::MultiMsi { count } => {
                assert!(count.is_power_of_two(), "{count}: how a function counts its vectors");
                if count > 1 && !remapping.on {
                    return Err(EOPNOTSUPP);
                }
                count
            }
        };
        let pirq = self.get_free_pirqs(domain, count.into())?;
        match vector {
            Vector::Msix { entry, table_base } => {
                let location = self.bus.read(sbdf, self.msix_control(sbdf) + 2, Width::Dword);
                let bar = self.read_pci_mem_bar(sbdf, (location & 7) as u8);
                assert_eq!(table_base, bar, "the address of the BAR, not of the table");
                self.pci_enable_msix(domain, sbdf, pirq, entry, remapping)?;
            }
            Vector::Msi | Vector::MultiMsi { .. } => self.pci_enable_msi(domain, sbdf, pirq, count, remapping)?,
        }
        Ok(pirq)
    }

    /// As many free pirqs in a row, from the top; the lowest of them.
    fn get_free_pirqs(&mut self, domain: DomId, count: i32) -> Answer<Pirq> {
        let domain = self.domain(domain);
        let mut found = 0;
        for pirq in (FIRST_PIRQ..FIRST_PIRQ + domain.limit).rev() {
            found = if domain.pirqs.contains_key(&pirq) { 0 } else { found + 1 };
            if found == count {
                return Ok(pirq);
            }
        }
        Err(ENOSPC)
    }

    fn new_irq(&mut self, desc: Desc) -> Irq {
        self.last_irq += 1;
        let irq = 100 + self.last_irq;
        self.descs.insert(irq, desc);
        self.domain(desc.domain).pirqs.insert(desc.pirq, irq);
        irq
    }

    fn pci_enable_msix(&mut self, domain: DomId, sbdf: Sbdf, pirq: Pirq, entry: u16, remapping: Remapping) -> Answer {
        if self.function(sbdf).msix.is_none() {
            return Err(ENODEV);
        }
        if entry > self.bus.word(sbdf, self.msix_control(sbdf)) & 0x7ff {
            return Err(EINVAL);
        }
        self.msix_capability_init(sbdf, Some(entry))?;
        let kind = Kind::Msix { entry };
        let desc =
            Desc { sbdf, kind, mask_at: None, domain, pirq, host_masked: true, guest_masked: true, bound: false };
        let irq = self.new_irq(desc);
        self.function(sbdf).list.push(irq);

        // setup_msi_irq
        let at = self.msix_control(sbdf);
        let control = self.bus.word(sbdf, at);
        if control & ENABLE == 0 {
            self.bus.set_word(sbdf, at, control | ENABLE | MASKALL);
        }
        let written = remapping.error.map_or_else(|| self.write_msix_msg(sbdf, entry, irq), Err);
        if control & ENABLE == 0 {
            self.bus.set_word(sbdf, at, control);
        }
        if written.is_err() {
            self.disable(irq);
            self.forget(irq);
        }
        written
    }

    fn write_msix_msg(&self, sbdf: Sbdf, entry: u16, irq: Irq) -> Answer {
        let enabled = self.bus.word(sbdf, self.msix_control(sbdf)) & ENABLE != 0;
        if !enabled || !self.bus.memory_decoded(sbdf) {
            return Err(ENXIO);
        }
        self.bus.table_write(sbdf, entry, |entry| (entry.address, entry.data) = (0xfee0_0000, irq as u32));
        Ok(())
    }

    fn pci_enable_msi(&mut self, domain: DomId, sbdf: Sbdf, pirq: Pirq, nvec: u8, remapping: Remapping) -> Answer {
        let mask_at = self.msi_capability_init(sbdf, nvec)?;
        let masked = mask_at.is_some();
        for nr in 0..nvec {
            let kind = Kind::Msi { nr, nvec };
            let pirq = pirq + i32::from(nr);
            let desc =
                Desc { sbdf, kind, mask_at, domain, pirq, host_masked: masked, guest_masked: false, bound: false };
            let irq = self.new_irq(desc);
            if nr == 0 {
                self.function(sbdf).list.push(irq);
            }
        }
        let head = self.domain(domain).pirqs[&pirq];
        match remapping.error {
            Some(error) => {
                self.disable(head);
                (pirq..pirq + i32::from(nvec)).for_each(|pirq| self.forget(self.domains[&domain].pirqs[&pirq]));
                Err(error)
            }
            None => {
                self.write_msi_msg(sbdf, head);
                Ok(())
            }
        }
    }

    fn write_msi_msg(&self, sbdf: Sbdf, head: Irq) {
        let at = self.bus.capability(sbdf, MSI_ID).expect("checked when it was mapped");
        let wide = self.bus.word(sbdf, at + 2) & 0x80 != 0;
        self.bus.write(sbdf, at + 4, Width::Dword, 0xfee0_0000);
        if wide {
            self.bus.write(sbdf, at + 8, Width::Dword, 0);
        }
        self.bus.set_word(sbdf, at + if wide { 12 } else { 8 }, 0x4000 | head as u16);
    }

    /// Takes an interrupt out of all books.
    fn forget(&mut self, irq: Irq) {
        let desc = self.descs.remove(&irq).expect("an interrupt");
        self.domain(desc.domain).pirqs.remove(&desc.pirq);
        self.function(desc.sbdf).list.retain(|head| *head != irq);
    }

    /// `pci_disable_msi`.
    fn disable(&mut self, irq: Irq) {
        let Desc { sbdf, kind, bound, .. } = self.descs[&irq];
        match kind {
            Kind::Msi { .. } => {
                self.msi_set_enable(sbdf, false);
                if !bound {
                    // pci_intx(dev, true)
                    let command = self.bus.word(sbdf, at::COMMAND);
                    self.bus.set_word(sbdf, at::COMMAND, command & !INTX_DISABLE);
                }
            }
            Kind::Msix { entry } => {
                let at = self.msix_control(sbdf);
                let mut control = self.bus.word(sbdf, at);
                let mut maskall = self.msix(sbdf).host_maskall;
                if control & ENABLE == 0 {
                    self.msix(sbdf).host_maskall = true;
                    self.bus.set_word(sbdf, at, control | ENABLE | MASKALL);
                }
                if self.bus.memory_decoded(sbdf) {
                    self.bus.table_write(sbdf, entry, |entry| entry.masked = true);
                } else if control & MASKALL == 0 {
                    // "cannot disable IRQ: masking MSI-X"
                    maskall = true;
                }
                self.msix(sbdf).host_maskall = maskall;
                if maskall || self.msix(sbdf).guest_maskall {
                    control |= MASKALL;
                }
                self.bus.set_word(sbdf, at, control);
                self.cleanup_msix(sbdf);
            }
        }
    }

    /// `msi_set_mask_bit`.
    fn set_mask_bit(&mut self, irq: Irq, host: bool, guest: bool) {
        let Desc { sbdf, kind, mask_at, .. } = self.descs[&irq];
        let flag = host || guest;
        match kind {
            Kind::Msi { nr, .. } => {
                if let Some(at) = mask_at {
                    let masks = self.bus.read(sbdf, at, Width::Dword) & !(1 << nr) | u32::from(flag) << nr;
                    self.bus.write(sbdf, at, Width::Dword, masks);
                }
            }
            Kind::Msix { entry } => {
                let at = self.msix_control(sbdf);
                let mut maskall = self.msix(sbdf).host_maskall;
                let mut control = self.bus.word(sbdf, at);
                let enabled = control & ENABLE != 0;
                if !enabled {
                    self.msix(sbdf).host_maskall = true;
                    self.bus.set_word(sbdf, at, control | ENABLE | MASKALL);
                }
                let decoded = self.bus.memory_decoded(sbdf);
                if decoded {
                    self.bus.table_write(sbdf, entry, |entry| entry.masked = flag);
                } else if flag && control & MASKALL == 0 {
                    // "cannot mask IRQ: masking MSI-X": the seed's state.
                    maskall = true;
                }
                if !decoded || !enabled {
                    self.msix(sbdf).host_maskall = maskall;
                    if maskall || self.msix(sbdf).guest_maskall {
                        control |= MASKALL;
                    }
                    self.bus.set_word(sbdf, at, control);
                }
                if !decoded {
                    return;
                }
            }
        }
        if let Some(desc) = self.descs.get_mut(&irq) {
            (desc.host_masked, desc.guest_masked) = (host, guest);
        }
    }

    /// Whether the interrupt's controller has a way to mask it.
    fn maskable(&self, irq: Irq) -> bool {
        let desc = self.descs[&irq];
        desc.mask_at.is_some() || matches!(desc.kind, Kind::Msix { .. })
    }

    fn evtchn_bind_pirq(&mut self, domain: DomId, pirq: Pirq) -> Answer {
        let irq = self.domains.get(&domain).and_then(|domain| domain.pirqs.get(&pirq).copied()).unwrap_or(0);
        let desc = self.descs.get_mut(&irq).ok_or(EINVAL)?;
        desc.bound = true;
        let host = desc.host_masked;
        if self.maskable(irq) {
            self.set_mask_bit(irq, false, true);
            self.set_mask_bit(irq, false, false);
        } else {
            self.set_mask_bit(irq, host, false);
        }
        Ok(())
    }

    /// `__pirq_guest_unbind`: the interrupt is disabled and shut down.
    fn unbind(&mut self, irq: Irq) {
        if self.maskable(irq) {
            let guest = self.descs[&irq].guest_masked;
            self.set_mask_bit(irq, true, guest);
            self.set_mask_bit(irq, true, true);
        }
        if let Some(desc) = self.descs.get_mut(&irq) {
            desc.bound = false;
        }
    }

    fn guest_mask(&mut self, domain: DomId, pirq: Pirq, mask: bool) {
        let irq = self.domain(domain).pirqs.get(&pirq).copied().unwrap_or(0);
        if let Some(desc) = self.descs.get(&irq).filter(|desc| desc.bound) {
            let host = desc.host_masked;
            self.set_mask_bit(irq, host, mask);
        }
    }

    fn evtchn_close(&mut self, domain: DomId, pirq: Pirq) {
        let irq = self.domain(domain).pirqs.get(&pirq).copied().unwrap_or(0);
        if irq < 0 {
            self.domain(domain).pirqs.remove(&pirq);
        } else if self.descs.get(&irq).is_some_and(|desc| desc.bound) {
            self.unbind(irq);
        }
    }

    fn unmap_domain_pirq(&mut self, domain: DomId, pirq: Pirq) -> Answer {
        let irq = self.domain(domain).pirqs.get(&pirq).copied().unwrap_or(0);
        let Desc { kind, bound, .. } = *self.descs.get(&irq).ok_or(EINVAL)?;
        let count = match kind {
            Kind::Msi { nr: 0, nvec } => nvec,
            Kind::Msi { .. } => return Err(EBUSY),
            Kind::Msix { .. } => 1,
        };
        if bound {
            self.unbind(irq);
        }
        self.disable(irq);
        for pirq in pirq..pirq + i32::from(count) {
            let irq = self.domain(domain).pirqs[&pirq];
            self.forget(irq);
            if bound {
                // The number is the guest's until it closes its event channel.
                self.domain(domain).pirqs.insert(pirq, -irq);
            }
        }
        Ok(())
    }

    fn evtchn_destroy(&mut self, domain: DomId) {
        let pirqs: Vec<Pirq> = self.domain(domain).pirqs.keys().copied().collect();
        pirqs.into_iter().for_each(|pirq| self.evtchn_close(domain, pirq));
    }

    fn release_devices(&mut self, domain: DomId) {
        for function in self.functions.values_mut().filter(|function| function.assigned == Assigned::To(domain)) {
            function.assigned = Assigned::Nobody;
        }
    }

    fn free_domain_pirqs(&mut self, domain: DomId) {
        let pirqs: Vec<Pirq> = self.domain(domain).pirqs.keys().copied().collect();
        for pirq in pirqs {
            // Those of several MSI vectors go with the first.
            let _ = self.unmap_domain_pirq(domain, pirq);
        }
        self.domain(domain).pirqs.clear();
    }

    fn assign_device(&mut self, sbdf: Sbdf, domain: DomId) -> Answer {
        self.listed(domain)?;
        if self.function(sbdf).assigned != Assigned::Nobody {
            return Err(EBUSY);
        }
        // pci_reset_msix_state
        if self.function(sbdf).msix.is_some() {
            if self.bus.word(sbdf, self.msix_control(sbdf)) & MASKALL != 0 {
                return Err(EBUSY);
            }
            let msix = self.msix(sbdf);
            (msix.host_maskall, msix.guest_maskall) = (false, false);
        }
        self.function(sbdf).assigned = Assigned::To(domain);
        Ok(())
    }

    /// `pci_conf_write_intercept`; false: the write is dropped.
    fn conf_write_intercept(&mut self, sbdf: Sbdf, reg: u16, width: Width, value: &mut u32) -> bool {
        if !(64..256).contains(&reg) || self.bus.get(sbdf).is_none() {
            return true;
        }
        if let (Some(pos), Some(msix)) = (self.bus.capability(sbdf, MSIX_ID), &mut self.function(sbdf).msix)
            && (pos..pos + 12).contains(&reg)
        {
            if reg != pos + 2 || width != Width::Word {
                return false;
            }
            msix.guest_maskall = *value & u32::from(MASKALL) != 0;
            if msix.host_maskall {
                *value |= u32::from(MASKALL);
            }
            return true;
        }
        let heads = self.function(sbdf).list.clone();
        let head = heads.iter().filter_map(|irq| self.descs.get(irq)).find_map(|desc| match desc.kind {
            Kind::Msi { nvec, .. } => Some((desc.mask_at?, nvec)),
            Kind::Msix { .. } => None,
        });
        let (Some((mask_at, nvec)), Some(pos)) = (head, self.bus.capability(sbdf, MSI_ID)) else { return true };
        if reg < pos || reg >= mask_at + 8 {
            return true;
        }
        if reg == pos + 2 {
            return width == Width::Word;
        }
        if reg != mask_at || width != Width::Dword {
            return false;
        }
        for desc in self.descs.values_mut().filter(|desc| desc.sbdf == sbdf) {
            if let Kind::Msi { nr, .. } = desc.kind {
                desc.guest_masked = *value >> nr & 1 != 0;
                *value |= u32::from(desc.host_masked) << nr;
            }
        }
        let most = 1u32 << (self.bus.word(sbdf, pos + 2) >> 1 & 7);
        let unused = u32::MAX >> (32 - most) & !(u32::MAX >> (32 - u32::from(nvec)));
        *value |= unused;
        true
    }

    /// `pci_restore_msi_state`.
    fn restore(&mut self, sbdf: Sbdf) -> Answer {
        if self.bus.get(sbdf).is_none() {
            return Err(ENODEV);
        }
        if self.function(sbdf).assigned == Assigned::Dom0 {
            return Err(EBUSY);
        }
        let heads = self.function(sbdf).list.clone();
        let mut msix_control = None;
        for irq in heads {
            let Desc { kind, host_masked, guest_masked, .. } = self.descs[&irq];
            match kind {
                Kind::Msi { nvec, .. } => {
                    self.msi_set_enable(sbdf, false);
                    self.write_msi_msg(sbdf, irq);
                    let of = self.descs.iter().filter(|(_, desc)| desc.sbdf == sbdf);
                    let all: Vec<_> = of.map(|(irq, desc)| (*irq, desc.host_masked, desc.guest_masked)).collect();
                    for (irq, host, guest) in all {
                        self.set_mask_bit(irq, host, guest);
                    }
                    let at = self.bus.capability(sbdf, MSI_ID).expect("checked when it was mapped") + 2;
                    let control = self.bus.word(sbdf, at) & !0x70;
                    self.bus.set_word(sbdf, at, control | (nvec.trailing_zeros() as u16) << 4);
                    self.msi_set_enable(sbdf, true);
                }
                Kind::Msix { entry } => {
                    let at = self.msix_control(sbdf);
                    if msix_control.is_none() {
                        let control = self.bus.word(sbdf, at);
                        msix_control = Some(control);
                        self.bus.set_word(sbdf, at, control | ENABLE | MASKALL);
                        if !self.bus.memory_decoded(sbdf) {
                            self.bus.set_word(sbdf, at, control & !ENABLE);
                            return Err(ENXIO);
                        }
                    }
                    let _ = self.write_msix_msg(sbdf, entry, irq);
                    self.set_mask_bit(irq, host_masked, guest_masked);
                }
            }
        }
        if let Some(control) = msix_control {
            self.bus.set_word(sbdf, self.msix_control(sbdf), control | ENABLE);
        }
        Ok(())
    }
}
