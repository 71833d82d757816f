//! The frontend's end of a connection, with the means to break it at any point.

use alloc::alloc::{Layout, alloc_zeroed};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use pciback::wire::{MAX_VECTORS, PCIF_ACTIVE, RawRequest, offset};
use xen_guest::abi::{PAGE_SIZE, grant_entry};
use xen_guest::evtchn::BoundPort;
use xen_guest::page::Page;
use xen_guest::store::Error;
use xen_guest::{clock, sched};

use crate::machine::Guest;

/// The frontend's folder, in the own domain's directory.
pub const FRONT: &str = "device/pci/0";

/// How long an answer may take. A client of Linux's waits for two seconds; what is asked here is more at once, and
/// the rig is slow.
const PATIENCE: u64 = 10_000_000_000;
/// Between two looks at a node: 50 milliseconds, as each costs xenstored work.
const PAUSE: u64 = 50_000_000;
/// How long a backend may take for a change of state: between two connections it resets the function, and again if that
/// did not get through.
const SECONDS: u64 = 90;

/// What stands in `op.err` before the backend has answered.
const UNANSWERED: i32 = 0x5a5a;

/// What `op.err` may be: the protocol's own, and what Linux's driver knows of enable_msix.
const ALLOWED: [i32; 11] = [0, -1, -2, -3, -4, -5, -6, -12, -22, -28, -114];

/// xorshift64*: the same numbers with each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.next() as usize % list.len()]
    }
}

/// What was done, and what came of it.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Requests made.
    pub requests: u64,
    /// Those that were not answered in time.
    pub unanswered: u64,
    /// Answers with an error that no client knows.
    pub wrong: u64,
    /// Answers that were changed after they had been given.
    pub twice: u64,
    /// Events sent without a request.
    pub events: u64,
    /// Times the second processor rewrote the page.
    pub rewrites: u64,
    /// Connections made.
    pub connections: u64,
    /// Connections that the backend refused, as it should.
    pub refused: u64,
    /// Those that it did not refuse, or states that it did not go to in time.
    pub stuck: u64,
    /// Writes to xenstore.
    pub writes: u64,
}

impl Counts {
    /// What came since `before`.
    pub fn since(&self, before: &Counts) -> Counts {
        Counts {
            requests: self.requests - before.requests,
            unanswered: self.unanswered - before.unanswered,
            wrong: self.wrong - before.wrong,
            twice: self.twice - before.twice,
            events: self.events - before.events,
            rewrites: self.rewrites - before.rewrites,
            connections: self.connections - before.connections,
            refused: self.refused - before.refused,
            stuck: self.stuck - before.stuck,
            writes: self.writes - before.writes,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { requests, unanswered, wrong, twice, events, rewrites, connections, refused, stuck, writes } = self;
        write!(
            f,
            "requests={requests} unanswered={unanswered} wrong={wrong} twice={twice} events={events} \
             rewrites={rewrites} connections={connections} refused={refused} stuck={stuck} writes={writes}"
        )
    }
}

/// What is shared with the backend.
pub struct Connection {
    /// The page.
    pub page: Page,
    /// Its frame.
    pub frame: u64,
    /// Its grant.
    pub grant: u32,
    /// The event channel.
    pub port: BoundPort,
}

/// The frontend.
pub struct Client {
    guest: Guest,
    backend: u16,
    back: String,
    pages: [u64; 2],
    grants: usize,
    /// What is shared, once something is.
    pub connection: Option<Connection>,
    /// The last answer, while nobody else may change it.
    answered: Option<i32>,
    answers: Vec<(i32, u64)>,
    /// What was done.
    pub counts: Counts,
    /// What is done next.
    pub random: Random,
}

impl Client {
    /// Waits until the toolstack has named a backend.
    pub fn new(mut guest: Guest) -> Result<Client, Error> {
        let back = loop {
            match guest.store.read(0, &format!("{FRONT}/backend")) {
                Ok(back) => break back,
                Err(Error::NotFound | Error::Timeout) => pause(&guest),
                Err(error) => return Err(error),
            }
        };
        let backend = guest.store.read(0, &format!("{FRONT}/backend-id"))?.parse().map_err(|_| Error::Other)?;
        Ok(Client {
            guest,
            backend,
            back,
            pages: [new_pages(1), new_pages(1)],
            grants: 0,
            connection: None,
            answered: None,
            answers: Vec::new(),
            counts: Counts::default(),
            random: Random(0x9e37_79b9_7f4a_7c15),
        })
    }

    /// The backend's domain.
    pub fn backend(&self) -> u16 {
        self.backend
    }

    /// The address of the shared info page.
    pub fn shared(&self) -> u64 {
        self.guest.shared.address()
    }

    /// Xen's time, nanoseconds.
    pub fn now(&self) -> u64 {
        clock::now(self.guest.shared)
    }

    /// Lets others run for a while.
    pub fn pause(&self) {
        pause(&self.guest);
    }

    /// Each error that answers had, and how often, since the last time.
    pub fn take_answers(&mut self) -> Vec<(i32, u64)> {
        self.answers.sort_unstable();
        core::mem::take(&mut self.answers)
    }

    /// Writes the frontend's nodes. What xenstored does not take is its affair.
    pub fn tell(&mut self, nodes: &[(&str, &str)]) {
        let nodes: Vec<(String, String)> =
            nodes.iter().map(|(node, value)| (format!("{FRONT}/{node}"), (*value).to_string())).collect();
        self.counts.writes += nodes.len() as u64;
        let _ = self.guest.store.write_all(&nodes);
    }

    /// The same with bytes that are no text.
    pub fn tell_bytes(&mut self, node: &str, value: &[u8]) {
        self.counts.writes += 1;
        let _ = self.guest.store.write_bytes(&format!("{FRONT}/{node}"), value);
    }

    /// Makes a node and removes it again.
    pub fn flash(&mut self, node: &str) {
        self.tell(&[(node, "")]);
        let _ = self.guest.store.remove(0, &format!("{FRONT}/{node}"));
    }

    /// The backend's state.
    pub fn back_state(&mut self) -> String {
        self.guest.store.read(0, &format!("{}/state", self.back)).unwrap_or_default()
    }

    /// Waits until the backend is in one of these states, and says in which.
    pub fn wait_state(&mut self, wanted: &[&str]) -> Option<String> {
        let end = self.now().saturating_add(SECONDS * 1_000_000_000);
        loop {
            let state = self.back_state();
            if wanted.contains(&state.as_str()) {
                return Some(state);
            }
            if self.now() >= end {
                self.counts.stuck += 1;
                log::warn!("hostile: the backend is in state {state:?}, not in one of {wanted:?}");
                return None;
            }
            self.pause();
        }
    }

    /// Lets domain `to` map a frame, and returns the grant.
    pub fn grant(&mut self, to: u16, frame: u64, flags: u16) -> u32 {
        // All entries but the tools', in turn: one may be used anew while the backend still has what it named.
        let number =
            grant_entry::RESERVED + self.grants % (PAGE_SIZE as usize / grant_entry::SIZE - grant_entry::RESERVED);
        self.grants += 1;
        let entry = number * grant_entry::SIZE;
        let table = self.guest.table;
        table.atomic16(entry + grant_entry::FLAGS).store(0, Ordering::Release);
        table.write(entry + grant_entry::FRAME, frame as u32);
        table.write(entry + grant_entry::DOMID, to);
        table.atomic16(entry + grant_entry::FLAGS).store(flags, Ordering::Release);
        number as u32
    }

    /// Takes a grant back, whether it is in use or not.
    pub fn revoke(&mut self, grant: u32) {
        let entry = grant as usize * grant_entry::SIZE;
        self.guest.table.atomic16(entry + grant_entry::FLAGS).store(0, Ordering::Release);
    }

    /// A fresh page and port, which nobody knows of yet: another page than the last time.
    pub fn prepare(&mut self) {
        self.pages.swap(0, 1);
        let address = self.pages[0];
        // SAFETY: a page of the heap's, mapped one to one, never given back and used through such values alone.
        let page = unsafe { Page::new(address as *mut u8) };
        (0..PAGE_SIZE as usize).step_by(8).for_each(|at| page.write(at, 0u64));
        let frame = address / PAGE_SIZE;
        let grant = self.grant(self.backend, frame, grant_entry::PERMIT_ACCESS);
        match BoundPort::unbound(self.backend) {
            Ok(port) => self.connection = Some(Connection { page, frame, grant, port }),
            Err(error) => crate::fatal::stop(format_args!("no event channel: {error}")),
        }
        self.answered = None;
    }

    /// Tells the backend where page and port are.
    pub fn publish(&mut self) {
        let Some(connection) = &self.connection else { return };
        let (grant, port) = (connection.grant.to_string(), connection.port.port().to_string());
        self.tell(&[("pci-op-ref", &grant), ("event-channel", &port), ("magic", "7"), ("state", "3")]);
    }

    /// Connects as pcifront does; the backend must not be connected.
    pub fn connect(&mut self) -> bool {
        self.prepare();
        self.publish();
        let connected = self.wait_state(&["4"]).is_some();
        if connected {
            self.counts.connections += 1;
            self.tell(&[("state", "4")]);
        }
        connected
    }

    /// Closes, and waits until the backend would have a frontend again.
    pub fn close(&mut self) {
        self.tell(&[("state", "5"), ("state", "6")]);
        self.wait_state(&["3"]);
        if let Some(connection) = self.connection.take() {
            self.revoke(connection.grant);
        }
    }

    /// Sends an event.
    pub fn ring(&mut self) {
        if let Some(connection) = &self.connection {
            connection.port.notify();
        }
    }

    /// Puts a request into the page, without an event.
    pub fn put(&mut self, request: &RawRequest, entries: &[u16]) {
        let Some(Connection { page, .. }) = &self.connection else { return };
        for (at, value) in [
            (offset::CMD, request.cmd),
            (offset::ERR, UNANSWERED.cast_unsigned()),
            (offset::DOMAIN, request.domain),
            (offset::BUS, request.bus),
            (offset::DEVFN, request.devfn),
            (offset::OFFSET, request.offset.cast_unsigned()),
            (offset::SIZE, request.size.cast_unsigned()),
            (offset::VALUE, request.value),
            (offset::INFO, request.info),
        ] {
            page.write(at, value);
        }
        for (index, entry) in entries.iter().take(MAX_VECTORS).enumerate() {
            page.write(offset::MSIX_ENTRIES + 4 * index, u32::from(*entry) << 16 | 0xffff);
        }
        page.atomic32(offset::FLAGS).fetch_or(PCIF_ACTIVE, Ordering::AcqRel);
    }

    /// Makes a request and waits for its answer, `op.err` and `op.value`.
    pub fn ask(&mut self, request: &RawRequest, entries: &[u16]) -> Option<(i32, u32)> {
        if let (Some(Connection { page, .. }), Some(answered)) = (&self.connection, self.answered.take())
            && page.read::<u32>(offset::ERR).cast_signed() != answered
        {
            self.counts.twice += 1;
        }
        let answer = self.ask_anyway(request, entries)?;
        self.answered = Some(answer.0);
        Some(answer)
    }

    /// The same while somebody else writes to the page as well.
    pub fn ask_anyway(&mut self, request: &RawRequest, entries: &[u16]) -> Option<(i32, u32)> {
        self.answered = None;
        self.counts.requests += 1;
        self.put(request, entries);
        self.ring();
        let end = self.now().saturating_add(PATIENCE);
        let Connection { page, port, .. } = self.connection.as_ref()?;
        let port = port.port();
        let flags = page.atomic32(offset::FLAGS);
        while flags.load(Ordering::Acquire) & PCIF_ACTIVE != 0 {
            if self.now() >= end {
                flags.fetch_and(!PCIF_ACTIVE, Ordering::AcqRel);
                self.counts.unanswered += 1;
                log::warn!("hostile: no answer to {request:?}");
                return None;
            }
            if !self.guest.pending.take(port) {
                // An error leaves a busy loop, which the deadline ends.
                let _ = sched::poll(&[port], Some(end));
            }
        }
        let answer = (page.read::<u32>(offset::ERR).cast_signed(), page.read(offset::VALUE));
        if !ALLOWED.contains(&answer.0) {
            self.counts.wrong += 1;
            log::warn!("hostile: {request:?} was answered with {}", answer.0);
        }
        if let Some((_, count)) = self.answers.iter_mut().find(|(err, _)| *err == answer.0) {
            *count += 1;
        } else if self.answers.len() < 32 {
            self.answers.push((answer.0, 1));
        }
        Some(answer)
    }
}

/// Lets others run for a while.
fn pause(guest: &Guest) {
    // An error leaves a shorter pause.
    let _ = sched::poll(&[], Some(clock::now(guest.shared).saturating_add(PAUSE)));
}

/// The address of so many pages of the heap's in a row that are never given back.
pub fn new_pages(count: usize) -> u64 {
    let layout = Layout::from_size_align(count * PAGE_SIZE as usize, PAGE_SIZE as usize);
    // SAFETY: the layout is not empty.
    let memory = layout.map_or(core::ptr::null_mut(), |layout| unsafe { alloc_zeroed(layout) });
    if memory.is_null() {
        crate::fatal::stop(format_args!("no memory for {count} pages"));
    }
    memory as u64
}
