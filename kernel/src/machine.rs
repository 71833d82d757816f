//! The machine as the backend sees it: `pciback`'s traits over Xen. No decisions here.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::Ordering;

use pciback::cmdline::{Config, EcamWindow};
use pciback::delegate::message::{ANSWER, REQUEST};
use pciback::delegate::{Delegate, Down, Line, RoutedConfig, RoutedPhysdev, Shared};
use pciback::nodes::Link;
use pciback::physdev::{Physdev, PhysdevError, Pirq, Vector};
use pciback::platform::{
    Channel, ConfigSpace, ConnectError, DomId, Nanos, Platform, Port, SharedPage, Store, StoreError, Transaction, Way,
    Width, WritesOff,
};
use pciback::sbdf::Sbdf;
use pciback::wire::{AerRequest, MsixEntry, PCIB_ACTIVE, PCIF_ACTIVE, RawReply, RawRequest, offset};
use xen_guest::abi::PAGE_SIZE;
use xen_guest::clock;
use xen_guest::console::Console;
use xen_guest::errno::Errno;
use xen_guest::evtchn::{self, BoundPort, Pending};
use xen_guest::grant::{self, Mapping, Window};
use xen_guest::grant_table::OwnTable;
use xen_guest::halt_poll::HaltPoll;
use xen_guest::memory::{self as xen_memory, Param};
use xen_guest::page::Page;
use xen_guest::physdev;
use xen_guest::sched::{self, POLL_PORTS};
use xen_guest::store::{Client, Error, Transport};
use xen_guest::vchan::Server;

use crate::memory::{AddressSpace, MapError, Use};
use crate::{fatal, logger};

/// Frames of the window for the shared info page (the first), our grant table (the second) and pages that others grant
/// us: one large page of the page tables.
const WINDOW_FRAMES: u64 = 512;
const WINDOW_BYTES: u64 = WINDOW_FRAMES * PAGE_SIZE;

/// Looks at the pending bits between two looks at the clock.
const LOOKS: u32 = 512;

/// Event channels that are no frontend's.
const OWN_PORTS: usize = 3;

/// How long the answer of dom0 is looked for at most before sleeping, if answers come so soon: 2 milliseconds.
const LOOK: Nanos = 2_000_000;

/// dom0, which the channel for delegated operations is for.
const DOM0: DomId = 0;

/// What Xen gives every domain, connected.
pub struct Guest {
    /// The page tables.
    pub space: AddressSpace,
    /// The shared info page.
    pub shared: Page,
    /// Its pending bits.
    pub pending: Pending,
    /// Where grants of others can be mapped.
    pub grants: Window,
    /// The first frame of the own grant table.
    pub table: Page,
    /// xenstore.
    pub store: Client<StoreTransport>,
    /// Its event channel.
    pub store_port: Port,
    /// The console's event channel.
    pub console_port: Port,
}

impl Guest {
    /// Connects to Xen: shared info, grant table, console, xenstore. What fails ends the domain with the reason.
    pub fn new(mut space: AddressSpace, ram_end: u64, config: &Config) -> Guest {
        let window = free_window(ram_end, config);
        must(space.map_large(window, Use::Data), "mapping the grant window");
        // SAFETY: the window is behind all RAM and clear of every device frame.
        must(unsafe { xen_memory::map_shared_info(window / PAGE_SIZE) }, "XENMEM_add_to_physmap(shared_info)");
        // SAFETY: mapped just now, and for good.
        let shared = unsafe { Page::new(window as *mut u8) };
        let pending = Pending::new(shared);
        let table = window + PAGE_SIZE;
        // SAFETY: the second frame of the window, which nothing else is at.
        must(unsafe { xen_memory::map_grant_table(table / PAGE_SIZE) }, "XENMEM_add_to_physmap(grant_table)");
        // SAFETY: mapped just now, and for good.
        let table = unsafe { Page::new(table as *mut u8) };
        // SAFETY: the rest of the window is free and mapped one to one.
        let grants = unsafe { Window::new(window + 2 * PAGE_SIZE, WINDOW_FRAMES - 2) };

        let console = ring(&mut space, Param::ConsolePfn, "console");
        let console_port = port(Param::ConsoleEvtchn, "console");
        logger::use_console(Console::new(console, console_port));

        let page = ring(&mut space, Param::StorePfn, "xenstore");
        let store_port = port(Param::StoreEvtchn, "xenstore");
        // Of a frontend's own node it does not matter what below it changed.
        let pathless = |token: &str| Link::of_token(token).is_some();
        let store = Client::new(page, StoreTransport { port: store_port, pending, shared }, pathless);
        Guest { space, shared, pending, grants, table, store, store_port, console_port }
    }
}

/// Everything Xen gave this domain.
pub struct Machine {
    space: AddressSpace,
    shared: Page,
    pending: Pending,
    grants: Window,
    store: XenStore,
    store_port: u32,
    console_port: u32,
    /// One clone an open frontend channel.
    channels: Rc<()>,
    ecam: Vec<EcamWindow>,
    physdev: RoutedPhysdev<Hypercalls, Dom0Line>,
    dom0: Shared<Dom0Line>,
    /// Grant reference and our port of the channel to dom0.
    channel: (u32, Port),
}

impl Machine {
    /// Connects to Xen, and makes the channel to dom0.
    ///
    /// What fails here leaves nothing to run with, so it ends the domain with the reason.
    pub fn new(space: AddressSpace, ram_end: u64, config: &Config) -> Machine {
        let Guest { space, shared, pending, grants, table, store, store_port, console_port } =
            Guest::new(space, ram_end, config);
        let (line, channel) = channel(&mut OwnTable::new(table), pending, shared);
        let dom0 = Rc::new(RefCell::new(Delegate::new(line)));
        let physdev = RoutedPhysdev::new(Hypercalls { shared }, dom0.clone());
        Machine {
            space,
            shared,
            pending,
            grants,
            store: XenStore(store),
            store_port,
            console_port,
            channels: Rc::new(()),
            ecam: config.ecam.clone(),
            physdev,
            dom0,
            channel,
        }
    }

    /// Consumes the pending bit of `port`.
    pub fn take_pending(&self, port: Port) -> bool {
        self.pending.take(port)
    }

    /// Looks at the pending bits of `ports` for at most `window` nanoseconds; true if one is set.
    pub fn look(&self, ports: &[Port], window: Nanos) -> bool {
        look(self.shared, window, || ports.iter().any(|port| self.pending.is_set(*port)))
    }

    /// The event channels that are no frontend's: xenstore, console, and the channel to dom0.
    pub fn own_ports(&self) -> [Port; OWN_PORTS] {
        [self.store_port, self.console_port, self.channel.1]
    }

    /// How dom0 finds its channel: the grant reference of the page, and the event channel's port.
    pub fn channel(&self) -> (u32, Port) {
        self.channel
    }

    /// Our end of the channel to dom0.
    #[cfg(feature = "hostile")]
    pub fn delegate(&self) -> Shared<Dom0Line> {
        self.dom0.clone()
    }

    /// The xenstore client with all it can do.
    pub fn client(&mut self) -> &mut Client<StoreTransport> {
        &mut self.store.0
    }
}

/// Looks until `has` says yes, for at most `window` nanoseconds; true if it did.
fn look(shared: Page, window: Nanos, has: impl Fn() -> bool) -> bool {
    let end = clock::now(shared).saturating_add(window);
    loop {
        // Reading the clock may leave the domain, on hosts whose time stamp counter is emulated.
        for _ in 0..LOOKS {
            if has() {
                return true;
            }
            core::hint::spin_loop();
        }
        if clock::now(shared) >= end {
            return false;
        }
    }
}

/// The first place of a whole window behind RAM that no device frame is in.
fn free_window(ram_end: u64, config: &Config) -> u64 {
    let frames: Vec<u64> = config
        .devices
        .iter()
        .filter_map(|device| config.ecam.iter().find_map(|window| window.frame(device.sbdf)))
        .map(|frame| frame.saturating_mul(PAGE_SIZE))
        .collect();
    let mut base = ram_end.next_multiple_of(WINDOW_BYTES);
    while frames.iter().any(|address| (base..base + WINDOW_BYTES).contains(address)) {
        base += WINDOW_BYTES;
    }
    base
}

/// Ends the domain when a step of the connection to Xen failed.
fn must<T, E: core::fmt::Debug>(outcome: Result<T, E>, step: &str) -> T {
    match outcome {
        Ok(value) => value,
        Err(error) => fatal::stop(format_args!("{step} failed: {error:?}")),
    }
}

/// Maps the ring page a parameter names.
fn ring(space: &mut AddressSpace, param: Param, what: &str) -> Page {
    let address = must(xen_memory::hvm_param(param), what).saturating_mul(PAGE_SIZE);
    must(space.map(address, Use::Data), what);
    // SAFETY: a page the tools made for this; mapped just now, and for good.
    unsafe { Page::new(address as *mut u8) }
}

/// Our end of the channel to dom0, and how dom0 finds it.
fn channel(table: &mut OwnTable, pending: Pending, shared: Page) -> (Dom0Line, (u32, Port)) {
    let port = must(BoundPort::unbound(DOM0), "EVTCHNOP_alloc_unbound");
    let number = port.port();
    let layout = must(Layout::from_size_align(PAGE_SIZE as usize, PAGE_SIZE as usize), "the channel's page");
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        fatal::stop(format_args!("no memory for the channel to dom0: give the domain more memory"));
    }
    // SAFETY: a page of the heap, mapped one to one, that is never given back and used through this value alone.
    let page = unsafe { Page::new(memory) };
    let server = Server::new(page, port);
    let grant = must(table.grant(DOM0, memory as u64 / PAGE_SIZE).ok_or("none is free"), "granting the channel's page");
    let line = Dom0Line {
        server,
        #[cfg(feature = "hostile")]
        page,
        port: number,
        pending,
        shared,
        patience: HaltPoll::new(LOOK),
        given_up: None,
    };
    (line, (grant, number))
}

/// The event channel a parameter names.
fn port(param: Param, what: &str) -> u32 {
    must(u32::try_from(must(xen_memory::hvm_param(param), what)), what)
}

impl Platform for Machine {
    type Config = RoutedConfig<EcamFrame, Dom0Line>;
    type Page = GrantedPage;
    type Channel = BoundChannel;
    type Store = XenStore;
    type Physdev = RoutedPhysdev<Hypercalls, Dom0Line>;

    fn physdev(&mut self) -> &mut Self::Physdev {
        &mut self.physdev
    }

    fn store(&mut self) -> &mut XenStore {
        &mut self.store
    }

    fn open_config(&mut self, sbdf: Sbdf) -> Result<Self::Config, String> {
        let frame = self
            .ecam
            .iter()
            .find_map(|window| window.frame(sbdf))
            .ok_or_else(|| String::from("no ecam= window on the command line covers it"))?;
        let address = frame.saturating_mul(PAGE_SIZE);
        self.space.map(address, Use::Device).map_err(|error| match error {
            MapError::OutOfMemory => "no memory left for its page tables: give the domain more memory".into(),
            MapError::Taken => format!("its ECAM frame {frame:#x} collides with memory of this domain: check ecam="),
        })?;
        // SAFETY: mapped just now, and for good. Xen lets this domain reach the frame only if its xl
        // config says so; otherwise reads answer all ones.
        let frame = EcamFrame { page: unsafe { Page::new(address as *mut u8) }, writable: false };
        Ok(RoutedConfig::new(frame, sbdf, self.dom0.clone()))
    }

    fn map_page(&mut self, frontend: DomId, grant_ref: u32) -> Result<GrantedPage, ConnectError> {
        self.grants.map(frontend, grant_ref).map(GrantedPage).map_err(|error| ConnectError {
            call: "GNTTABOP_map_grant_ref",
            code: match error {
                grant::MapError::WindowFull => i32::from(GNTST_NO_SPACE),
                grant::MapError::Call(errno) => -errno.0,
                grant::MapError::Status(status) => i32::from(status),
            },
        })
    }

    fn bind_channel(&mut self, frontend: DomId, remote_port: u32) -> Result<BoundChannel, ConnectError> {
        if Rc::strong_count(&self.channels) > POLL_PORTS - OWN_PORTS {
            // The event loop can't sleep on more; see `sched::POLL_PORTS`.
            return Err(ConnectError { call: "the limit of frontends", code: -ENOSPC });
        }
        BoundPort::interdomain(frontend, remote_port)
            .map(|port| BoundChannel { port, _open: self.channels.clone() })
            .map_err(|errno| ConnectError { call: "EVTCHNOP_bind_interdomain", code: -errno.0 })
    }

    fn now(&self) -> Nanos {
        clock::now(self.shared)
    }

    fn poll_dom0(&mut self) -> Result<u32, Down> {
        let mut dom0 = self.dom0.borrow_mut();
        if self.pending.take(self.channel.1) | dom0.has_news() {
            dom0.poll();
        }
        dom0.session()
    }
}

/// The channel to dom0.
pub struct Dom0Line {
    server: Server<BoundPort>,
    #[cfg(feature = "hostile")]
    page: Page,
    port: Port,
    pending: Pending,
    shared: Page,
    /// How long an answer is looked for.
    patience: HaltPoll,
    /// When a look ended without one that has not come yet.
    given_up: Option<Nanos>,
}

#[cfg(feature = "hostile")]
impl Dom0Line {
    /// Writes nonsense over all of the shared page, and tells the other end.
    pub fn scribble(&mut self) {
        (0..PAGE_SIZE as usize).step_by(8).for_each(|at| self.page.write(at, 0xa5a5_5a5a_dead_beefu64));
        evtchn::send(self.port);
    }
}

impl Line for Dom0Line {
    fn is_connected(&self) -> bool {
        self.server.is_connected()
    }

    fn send(&mut self, request: &[u8; REQUEST]) -> bool {
        self.server.send(request)
    }

    fn receive(&mut self, answer: &mut [u8; ANSWER]) -> bool {
        let received = self.server.receive(answer);
        if received && let Some(since) = self.given_up.take() {
            self.patience.slept(self.now().saturating_sub(since));
        }
        received
    }

    fn look(&mut self) {
        let found = look(self.shared, self.patience.window(), || self.server.has(ANSWER));
        self.given_up = (!found).then(|| self.now());
    }

    fn wait(&mut self, deadline: Nanos) {
        if !self.pending.take(self.port) {
            // An error leaves a busy loop, which the deadline ends.
            let _ = sched::poll(&[self.port], Some(deadline));
            self.pending.take(self.port);
        }
    }

    fn now(&self) -> Nanos {
        clock::now(self.shared)
    }
}

/// `GNTST_no_space` of `xen/grant_table.h`.
const GNTST_NO_SPACE: i16 = -13;

/// `ENOSPC` of `xen/errno.h`.
const ENOSPC: i32 = 28;

/// The ECAM frame of one function: its 4 KiB of configuration space (PCIe base spec, 7.2.2).
pub struct EcamFrame {
    page: Page,
    writable: bool,
}

impl ConfigSpace for EcamFrame {
    fn read(&self, offset: u16, width: Width) -> u32 {
        let offset = usize::from(offset);
        match width {
            Width::Byte => self.page.read::<u8>(offset).into(),
            Width::Word => self.page.read::<u16>(offset).into(),
            Width::Dword => self.page.read::<u32>(offset),
        }
    }

    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff> {
        // On a Xen that protects the frame a write would end this domain: never try.
        if !self.writable {
            return Err(WritesOff);
        }
        let offset = usize::from(offset);
        match width {
            Width::Byte => self.page.write(offset, value as u8),
            Width::Word => self.page.write(offset, value as u16),
            Width::Dword => self.page.write(offset, value),
        }
        Ok(())
    }

    fn writable(&self) -> bool {
        self.writable
    }

    fn allow_writes(&mut self, _: Way) {
        self.writable = true;
    }
}

/// Xen's physdev operations.
pub struct Hypercalls {
    shared: Page,
}

fn function(sbdf: Sbdf) -> physdev::Function {
    physdev::Function { segment: sbdf.segment(), bus: sbdf.bus(), devfn: sbdf.devfn() }
}

fn refusal(errno: Errno) -> PhysdevError {
    PhysdevError::of(errno.0)
}

impl Physdev for Hypercalls {
    fn prepare_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        physdev::prepare_msix(function(sbdf)).map_err(refusal)
    }

    fn release_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        physdev::release_msix(function(sbdf)).map_err(refusal)
    }

    fn restore_msi(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        physdev::restore_msi(function(sbdf)).map_err(refusal)
    }

    fn map(&mut self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, PhysdevError> {
        let vector = match vector {
            Vector::Msi => physdev::Vector::Msi,
            Vector::MultiMsi { count } => physdev::Vector::MultiMsi(count),
            Vector::Msix { entry, table_base } => physdev::Vector::Msix(entry, table_base),
        };
        physdev::map(guest, function(sbdf), vector).map_err(refusal)
    }

    fn unmap(&mut self, guest: DomId, _: Sbdf, pirq: Pirq) -> Result<(), PhysdevError> {
        physdev::unmap(guest, pirq).map_err(refusal)
    }

    fn now(&self) -> Nanos {
        clock::now(self.shared)
    }
}

/// A frontend's shared page.
pub struct GrantedPage(Mapping);

impl SharedPage for GrantedPage {
    fn flags(&self) -> u32 {
        self.0.page().atomic32(offset::FLAGS).load(Ordering::Acquire)
    }

    fn request(&self) -> RawRequest {
        let page = self.0.page();
        RawRequest {
            cmd: page.read(offset::CMD),
            domain: page.read(offset::DOMAIN),
            bus: page.read(offset::BUS),
            devfn: page.read(offset::DEVFN),
            offset: page.read::<u32>(offset::OFFSET).cast_signed(),
            size: page.read::<u32>(offset::SIZE).cast_signed(),
            value: page.read(offset::VALUE),
            info: page.read(offset::INFO),
        }
    }

    fn msix_entries(&self, into: &mut [MsixEntry]) {
        let page = self.0.page();
        for (index, entry) in into.iter_mut().enumerate() {
            // One access an entry: both halves are of the same moment.
            let both: u32 = page.read(offset::MSIX_ENTRIES + 4 * index);
            *entry = MsixEntry { vector: both as u16, entry: (both >> 16) as u16 };
        }
    }

    fn reply_vectors(&self, entries: &[MsixEntry]) {
        let page = self.0.page();
        for (index, entry) in entries.iter().enumerate() {
            page.write(offset::MSIX_ENTRIES + 4 * index, entry.vector);
        }
    }

    fn reply(&self, reply: &RawReply) {
        let page = self.0.page();
        page.write(offset::ERR, reply.err.cast_unsigned());
        page.write(offset::VALUE, reply.value);
    }

    fn clear_active(&self) -> u32 {
        self.0.page().atomic32(offset::FLAGS).fetch_and(!PCIF_ACTIVE, Ordering::AcqRel)
    }

    fn aer_request(&self, request: &AerRequest) {
        let page = self.0.page();
        page.write(offset::AER_OP, request.cmd);
        page.write(offset::AER_ERR, request.state);
        page.write(offset::AER_DOMAIN, request.domain);
        page.write(offset::AER_BUS, request.bus);
        page.write(offset::AER_DEVFN, request.devfn);
    }

    fn set_aer_active(&self) {
        self.0.page().atomic32(offset::FLAGS).fetch_or(PCIB_ACTIVE, Ordering::AcqRel);
    }

    fn clear_aer_active(&self) {
        self.0.page().atomic32(offset::FLAGS).fetch_and(!PCIB_ACTIVE, Ordering::AcqRel);
    }

    fn aer_result(&self) -> i32 {
        self.0.page().read::<u32>(offset::AER_ERR).cast_signed()
    }
}

/// A frontend's event channel.
pub struct BoundChannel {
    port: BoundPort,
    _open: Rc<()>,
}

impl Channel for BoundChannel {
    fn port(&self) -> Port {
        self.port.port()
    }

    fn notify(&self) {
        self.port.notify();
    }
}

/// How the xenstore client wakes the daemon, sleeps and tells the time.
pub struct StoreTransport {
    port: u32,
    pending: Pending,
    shared: Page,
}

impl Transport for StoreTransport {
    fn notify(&mut self) {
        evtchn::send(self.port);
    }

    fn wait(&mut self, deadline: u64) {
        if !self.pending.take(self.port) {
            // An error leaves a busy loop, which the client's deadline ends.
            let _ = sched::poll(&[self.port], Some(deadline));
            self.pending.take(self.port);
        }
    }

    fn now(&self) -> u64 {
        clock::now(self.shared)
    }
}

/// The xenstore client behind `pciback`'s trait.
pub struct XenStore(Client<StoreTransport>);

fn id(tx: Option<Transaction>) -> u32 {
    tx.map_or(0, |tx| tx.0)
}

fn error(error: Error) -> StoreError {
    match error {
        Error::NotFound => StoreError::NotFound,
        Error::Denied => StoreError::Denied,
        Error::Again => StoreError::Again,
        Error::Timeout | Error::Broken => StoreError::Timeout,
        Error::Other => StoreError::Other,
    }
}

impl Store for XenStore {
    fn read(&mut self, tx: Option<Transaction>, path: &str) -> Result<String, StoreError> {
        self.0.read(id(tx), path).map_err(error)
    }

    fn write(&mut self, tx: Option<Transaction>, path: &str, value: &str) -> Result<(), StoreError> {
        self.0.write(id(tx), path, value).map_err(error)
    }

    fn write_all(&mut self, nodes: &[(String, String)]) -> Result<(), StoreError> {
        self.0.write_all(nodes).map_err(error)
    }

    fn remove(&mut self, tx: Option<Transaction>, path: &str) -> Result<(), StoreError> {
        self.0.remove(id(tx), path).map_err(error)
    }

    fn list(&mut self, tx: Option<Transaction>, path: &str) -> Result<Vec<String>, StoreError> {
        self.0.list(id(tx), path).map_err(error)
    }

    fn begin(&mut self) -> Result<Transaction, StoreError> {
        self.0.begin().map(Transaction).map_err(error)
    }

    fn end(&mut self, tx: Transaction, commit: bool) -> Result<(), StoreError> {
        self.0.end(tx.0, commit).map_err(error)
    }

    fn watch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.0.watch(path, token).map_err(error)
    }

    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), StoreError> {
        self.0.unwatch(path, token).map_err(error)
    }
}
