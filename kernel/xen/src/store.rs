//! A xenstore client over the shared ring (`xen/io/xs_wire.h`, `docs/misc/xenstore-ring`).
//!
//! One call at a time, which returns when its replies came or its deadline passed. A call that sends
//! several requests does not wait in between: waking and sleeping cost more than the daemon's work.
//! Replies are told by request id, so that one that comes late is dropped and never taken for another's.
//! Watch events that come in between are queued: without duplicates and bounded (XSA-349), in their number and, as a
//! guest chooses the names below its own nodes, in their length. What the ring holds is checked: a daemon that breaks the protocol costs the connection, which is then made anew.

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{Ordering, fence};

use crate::abi::xenstore as ring;
use crate::page::Page;

/// How long one call may take, in nanoseconds.
const PATIENCE: u64 = 5_000_000_000;

/// Watch events kept until somebody takes them.
pub const EVENT_QUEUE: usize = 512;

/// Message types, `enum xsd_sockmsg_type`.
mod kind {
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const WATCH: u32 = 4;
    pub const UNWATCH: u32 = 5;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const WRITE: u32 = 11;
    pub const RM: u32 = 13;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// ENOENT.
    NotFound,
    /// EACCES or EPERM.
    Denied,
    /// EAGAIN: repeat the transaction.
    Again,
    /// No answer in time.
    Timeout,
    /// The daemon broke the protocol; the connection is being made anew.
    Broken,
    /// Another error the daemon named, or a request that cannot be sent.
    Other,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::NotFound => "ENOENT",
            Error::Denied => "EACCES",
            Error::Again => "EAGAIN",
            Error::Timeout => "no answer from xenstored",
            Error::Broken => "xenstored broke the protocol",
            Error::Other => "xenstored refused",
        })
    }
}

/// A watch that fired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path that changed, relative if the watch was; empty where the client was told that it does not matter.
    pub path: String,
    /// The token the watch was set with.
    pub token: String,
}

/// What the client needs of its surroundings: waking the daemon, sleeping, the time.
pub trait Transport {
    /// Tells the daemon that the ring changed.
    fn notify(&mut self);
    /// Sleeps until the daemon tells us that the ring changed, or until `deadline`.
    fn wait(&mut self, deadline: u64);
    /// Xen's system time in nanoseconds.
    fn now(&self) -> u64;
}

/// The client.
#[derive(Debug)]
pub struct Client<T> {
    page: Page,
    transport: T,
    pathless: fn(&str) -> bool,
    next_id: u32,
    /// What of a request has not fitted into the ring yet.
    unsent: VecDeque<u8>,
    /// An incomplete message from the daemon.
    partial: Vec<u8>,
    /// Ids of the requests whose replies the present call waits for.
    awaited: Vec<u32>,
    /// The present call's result so far: the newest reply, or the first error.
    outcome: Result<Vec<u8>, Error>,
    events: VecDeque<WatchEvent>,
    lost_watches: bool,
    /// Something may have come that nobody has looked for since.
    unseen: bool,
}

impl<T: Transport> Client<T> {
    /// A client of the ring in `page`. Events whose token `pathless` accepts are kept without their path: those of a node
    /// that a guest owns, which can have them come for any name that it makes below.
    pub fn new(page: Page, transport: T, pathless: fn(&str) -> bool) -> Client<T> {
        Client {
            page,
            transport,
            pathless,
            next_id: 1,
            unsent: VecDeque::new(),
            partial: Vec::new(),
            awaited: Vec::new(),
            outcome: Ok(Vec::new()),
            events: VecDeque::new(),
            lost_watches: false,
            unseen: true,
        }
    }

    /// Reads a node. What of its value is not UTF-8 is replaced: that of a guest's node may be any bytes, which is no
    /// failure of the daemon's.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn read(&mut self, tx: u32, path: &str) -> Result<String, Error> {
        let value = self.request(kind::READ, tx, &[path.as_bytes(), b"\0"])?;
        Ok(String::from_utf8_lossy(&value).into_owned())
    }

    /// Writes a node.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn write(&mut self, tx: u32, path: &str, value: &str) -> Result<(), Error> {
        self.request(kind::WRITE, tx, &[path.as_bytes(), b"\0", value.as_bytes()]).map(drop)
    }

    /// Writes a node whose value is no text.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn write_bytes(&mut self, path: &str, value: &[u8]) -> Result<(), Error> {
        self.request(kind::WRITE, 0, &[path.as_bytes(), b"\0", value]).map(drop)
    }

    /// Writes nodes, paths and values, in this order.
    ///
    /// # Errors
    /// The first that the daemon answered; it has seen the other nodes all the same.
    pub fn write_all(&mut self, nodes: &[(String, String)]) -> Result<(), Error> {
        self.begin_call();
        for (path, value) in nodes {
            self.send(kind::WRITE, 0, &[path.as_bytes(), b"\0", value.as_bytes()]);
        }
        self.finish_call().map(drop)
    }

    /// Removes a node and what is below it.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn remove(&mut self, tx: u32, path: &str) -> Result<(), Error> {
        self.request(kind::RM, tx, &[path.as_bytes(), b"\0"]).map(drop)
    }

    /// Names of a node's children.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn list(&mut self, tx: u32, path: &str) -> Result<Vec<String>, Error> {
        let names = self.request(kind::DIRECTORY, tx, &[path.as_bytes(), b"\0"])?;
        let names = core::str::from_utf8(&names).map_err(|_| Error::Other)?;
        Ok(names.split('\0').filter(|name| !name.is_empty()).map(ToString::to_string).collect())
    }

    /// Starts a transaction and returns its id, which is never 0.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn begin(&mut self) -> Result<u32, Error> {
        let id = self.request(kind::TRANSACTION_START, 0, &[b"\0"])?;
        let text = core::str::from_utf8(&id).map_err(|_| Error::Other)?;
        text.trim_end_matches('\0').parse().ok().filter(|id| *id != 0).ok_or(Error::Other)
    }

    /// Ends a transaction.
    ///
    /// # Errors
    /// [`Error::Again`] if somebody else changed what it read.
    pub fn end(&mut self, tx: u32, commit: bool) -> Result<(), Error> {
        self.request(kind::TRANSACTION_END, tx, &[if commit { b"T\0" } else { b"F\0" }]).map(drop)
    }

    /// Sets a watch.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(kind::WATCH, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"]).map(drop)
    }

    /// Sets watches, paths and tokens, in this order.
    ///
    /// # Errors
    /// The first that the daemon answered; it has seen the other watches all the same.
    pub fn watch_all(&mut self, watches: &[(&str, &str)]) -> Result<(), Error> {
        self.begin_call();
        for (path, token) in watches {
            self.send(kind::WATCH, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"]);
        }
        self.finish_call().map(drop)
    }

    /// Removes a watch. Events of it that wait in the queue go with it.
    ///
    /// # Errors
    /// What the daemon answered.
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        let done = self.request(kind::UNWATCH, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"]);
        self.events.retain(|event| event.token != token);
        done.map(drop)
    }

    /// The oldest watch event not taken yet, from the queue or the ring.
    pub fn next_event(&mut self) -> Option<WatchEvent> {
        if self.events.is_empty() {
            self.pump();
            self.unseen = !self.events.is_empty();
        }
        self.events.pop_front()
    }

    /// Whether [`Client::next_event`] is worth a call although the daemon has not woken us: a request
    /// takes the wake-ups of what came behind its reply.
    pub fn may_have_events(&self) -> bool {
        self.unseen || self.lost_watches
    }

    /// True once after watches or their events were lost: set all watches anew and look at everything.
    pub fn take_lost_watches(&mut self) -> bool {
        core::mem::take(&mut self.lost_watches)
    }

    fn request(&mut self, kind: u32, tx: u32, parts: &[&[u8]]) -> Result<Vec<u8>, Error> {
        self.begin_call();
        self.send(kind, tx, parts);
        self.finish_call()
    }

    /// Replies to what came before are nobody's from now on.
    fn begin_call(&mut self) {
        self.awaited.clear();
        self.outcome = Ok(Vec::new());
    }

    /// Adds a request to the present call.
    fn send(&mut self, kind: u32, tx: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > ring::PAYLOAD_MAX {
            self.note(Err(Error::Other));
            return;
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.awaited.push(id);
        for word in [kind, id, tx, len as u32] {
            self.unsent.extend(word.to_le_bytes());
        }
        for part in parts {
            self.unsent.extend(*part);
        }
    }

    /// Waits until all that was sent is answered.
    fn finish_call(&mut self) -> Result<Vec<u8>, Error> {
        self.unseen = true;
        let deadline = self.transport.now().saturating_add(PATIENCE);
        loop {
            self.push();
            self.pump();
            if self.awaited.is_empty() {
                return core::mem::replace(&mut self.outcome, Ok(Vec::new()));
            }
            if self.lost_connection() {
                self.reconnect();
                return Err(Error::Broken);
            }
            if self.transport.now() >= deadline {
                // Whatever of a request the ring did not take must not mix with the next one.
                if !self.unsent.is_empty() {
                    self.reconnect();
                }
                return Err(Error::Timeout);
            }
            self.transport.wait(deadline);
        }
    }

    /// Adds an answer to the present call's result.
    fn note(&mut self, answer: Result<Vec<u8>, Error>) {
        if self.outcome.is_ok() {
            self.outcome = answer;
        }
    }

    /// Whether the daemon's indices are impossible, or it has asked for a new connection.
    fn lost_connection(&self) -> bool {
        let distance = |prod: usize, cons: usize| {
            let prod = self.page.atomic32(prod).load(Ordering::Acquire);
            prod.wrapping_sub(self.page.atomic32(cons).load(Ordering::Acquire))
        };
        distance(ring::REQ_PROD, ring::REQ_CONS) > ring::RING_SIZE
            || distance(ring::RSP_PROD, ring::RSP_CONS) > ring::RING_SIZE
            || self.page.atomic32(ring::CONNECTION).load(Ordering::Acquire) != ring::CONNECTED
            || self.header().is_some_and(|(_, _, len)| len > ring::PAYLOAD_MAX)
    }

    /// Has the daemon reset the rings, if it can; forgets all that was under way.
    fn reconnect(&mut self) {
        let features: u32 = self.page.read(ring::SERVER_FEATURES);
        if features & ring::FEATURE_RECONNECTION != 0 {
            let connection = self.page.atomic32(ring::CONNECTION);
            connection.store(ring::RECONNECT, Ordering::Release);
            let deadline = self.transport.now().saturating_add(PATIENCE);
            self.transport.notify();
            while connection.load(Ordering::Acquire) != ring::CONNECTED && self.transport.now() < deadline {
                self.transport.wait(deadline);
            }
        }
        self.unsent.clear();
        self.partial.clear();
        self.events.clear();
        self.lost_watches = true;
    }

    /// Moves as much of the unsent bytes into the ring as fits.
    fn push(&mut self) {
        let cons = self.page.atomic32(ring::REQ_CONS).load(Ordering::Acquire);
        let mut prod: u32 = self.page.read(ring::REQ_PROD);
        let mut free = ring::RING_SIZE.saturating_sub(prod.wrapping_sub(cons));
        let mut moved = false;
        while free > 0
            && let Some(byte) = self.unsent.pop_front()
        {
            self.page.write(ring::REQ + (prod % ring::RING_SIZE) as usize, byte);
            prod = prod.wrapping_add(1);
            free -= 1;
            moved = true;
        }
        if moved {
            self.page.atomic32(ring::REQ_PROD).store(prod, Ordering::Release);
            self.transport.notify();
        }
    }

    /// Takes all whole messages out of the ring: events into the queue, replies to the present call.
    fn pump(&mut self) {
        loop {
            let prod = self.page.atomic32(ring::RSP_PROD).load(Ordering::Acquire);
            let start: u32 = self.page.read(ring::RSP_CONS);
            let mut cons = start;
            let available = prod.wrapping_sub(cons);
            if available == 0 || available > ring::RING_SIZE {
                return;
            }
            // First up to the end of the header, then up to the end of the message it announces.
            let mut complete = false;
            while !complete {
                let header = self.header();
                let wanted = ring::HEADER + header.map_or(0, |(_, _, len)| len);
                if wanted > ring::HEADER + ring::PAYLOAD_MAX {
                    return;
                }
                while cons != prod && self.partial.len() < wanted {
                    self.partial.push(self.page.read(ring::RSP + (cons % ring::RING_SIZE) as usize));
                    cons = cons.wrapping_add(1);
                }
                if self.partial.len() < wanted {
                    break;
                }
                complete = header.is_some();
            }
            self.page.atomic32(ring::RSP_CONS).store(cons, Ordering::Release);
            // Only a daemon that found the ring full waits for room. It looks after it wrote and we look after we
            // took, with a barrier on both sides, so one of us sees the other.
            fence(Ordering::SeqCst);
            if self.page.atomic32(ring::RSP_PROD).load(Ordering::Acquire).wrapping_sub(start) >= ring::RING_SIZE {
                self.transport.notify();
            }
            if complete {
                self.dispatch();
            }
        }
    }

    /// Type, request id and payload length of the message being received, once its header is whole.
    fn header(&self) -> Option<(u32, u32, usize)> {
        let word = |index: usize| -> Option<u32> {
            let bytes = self.partial.get(index * 4..index * 4 + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        Some((word(0)?, word(1)?, word(3)? as usize))
    }

    /// Puts a whole message where it belongs.
    fn dispatch(&mut self) {
        let Some((kind, id, _)) = self.header() else { return };
        let payload = self.partial.split_off(ring::HEADER);
        self.partial.clear();
        if kind != kind::WATCH_EVENT {
            if let Some(index) = self.awaited.iter().position(|awaited| *awaited == id) {
                self.awaited.swap_remove(index);
                self.note(answer(kind, payload));
            }
            return;
        }
        let Ok(text) = core::str::from_utf8(&payload) else { return };
        let mut fields = text.split('\0');
        let (Some(path), Some(token)) = (fields.next(), fields.next()) else { return };
        let path = if (self.pathless)(token) { "" } else { path };
        if self.events.iter().any(|event| event.path == path && event.token == token) {
            return;
        }
        if self.events.len() >= EVENT_QUEUE {
            // Looking at everything once replaces any number of events.
            self.events.clear();
            self.lost_watches = true;
            return;
        }
        self.events.push_back(WatchEvent { path: path.to_string(), token: token.to_string() });
    }
}

/// The payload of a reply, or the error it names.
fn answer(kind: u32, payload: Vec<u8>) -> Result<Vec<u8>, Error> {
    if kind != kind::ERROR {
        return Ok(payload);
    }
    Err(match payload.strip_suffix(b"\0").unwrap_or(&payload) {
        b"ENOENT" => Error::NotFound,
        b"EACCES" | b"EPERM" => Error::Denied,
        b"EAGAIN" => Error::Again,
        _ => Error::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::tests::page;
    use std::cell::Cell;
    use std::vec;

    type Script = alloc::boxed::Box<dyn FnMut(u32, u32, &[u8]) -> Vec<Vec<u8>>>;

    /// A daemon that runs while the client sleeps, if the client has woken it: `script` gets type, id and
    /// payload of each request and returns raw messages.
    struct Daemon {
        page: Page,
        script: Script,
        inbox: Vec<u8>,
        outbox: VecDeque<u8>,
        clock: Cell<u64>,
        deaf: bool,
        woken: bool,
        wakings: usize,
    }

    fn message(kind: u32, id: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [kind, id, 0, payload.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    impl Daemon {
        fn run(&mut self) {
            if self.deaf {
                return;
            }
            if self.page.read::<u32>(ring::CONNECTION) == ring::RECONNECT {
                for index in [ring::REQ_CONS, ring::REQ_PROD, ring::RSP_CONS, ring::RSP_PROD, ring::CONNECTION] {
                    self.page.write(index, 0u32);
                }
                self.inbox.clear();
                self.outbox.clear();
            }
            let (mut cons, prod): (u32, u32) = (self.page.read(ring::REQ_CONS), self.page.read(ring::REQ_PROD));
            while cons != prod {
                self.inbox.push(self.page.read((cons % 1024) as usize));
                cons = cons.wrapping_add(1);
            }
            self.page.write(ring::REQ_CONS, cons);
            while self.inbox.len() >= 16 {
                let word = |i: usize| u32::from_le_bytes(self.inbox[i * 4..i * 4 + 4].try_into().unwrap());
                let (kind, id, len) = (word(0), word(1), word(3) as usize);
                if self.inbox.len() < 16 + len {
                    break;
                }
                let payload: Vec<u8> = self.inbox.drain(..16 + len).skip(16).collect();
                for reply in (self.script)(kind, id, &payload) {
                    self.outbox.extend(reply);
                }
            }
            let (rsp_cons, mut rsp_prod): (u32, u32) = (self.page.read(ring::RSP_CONS), self.page.read(ring::RSP_PROD));
            while rsp_prod.wrapping_sub(rsp_cons) < 1024 && !self.outbox.is_empty() {
                self.page.write(1024 + (rsp_prod % 1024) as usize, self.outbox.pop_front().unwrap());
                rsp_prod = rsp_prod.wrapping_add(1);
            }
            self.page.write(ring::RSP_PROD, rsp_prod);
        }
    }

    impl Transport for Daemon {
        fn notify(&mut self) {
            self.woken = true;
            self.wakings += 1;
        }
        fn wait(&mut self, _deadline: u64) {
            if std::mem::take(&mut self.woken) {
                self.run();
            } else {
                self.clock.set(self.clock.get() + 1_000_000_000);
            }
        }
        fn now(&self) -> u64 {
            self.clock.get()
        }
    }

    fn client(script: impl FnMut(u32, u32, &[u8]) -> Vec<Vec<u8>> + 'static) -> Client<Daemon> {
        let page = page();
        page.write(ring::SERVER_FEATURES, 1u32);
        let daemon = Daemon {
            page,
            script: alloc::boxed::Box::new(script),
            inbox: vec![],
            outbox: VecDeque::new(),
            clock: Cell::new(1),
            deaf: false,
            woken: false,
            wakings: 0,
        };
        Client::new(page, daemon, |token| token.starts_with("guest"))
    }

    #[test]
    fn a_read_sends_path_and_gets_the_value() {
        let mut store = client(|kind, id, payload| {
            assert_eq!((kind, payload), (2, b"domid\0".as_slice()));
            vec![message(2, id, b"7")]
        });
        assert_eq!(store.read(0, "domid"), Ok("7".into()));
        assert_eq!(store.read(0, "domid"), Ok("7".into()));
    }

    #[test]
    fn messages_larger_than_the_ring_pass_both_ways() {
        let mut store = client(|kind, id, payload| {
            vec![if kind == 11 { message(11, id, b"OK\0") } else { message(2, id, &vec![b'v'; payload.len() + 3900]) }]
        });
        assert_eq!(store.write(0, "big", &"x".repeat(4000)), Ok(()));
        assert_eq!(store.read(0, "big").map(|v| v.len()), Ok(3904));
        assert_eq!(store.write(0, "big", &"x".repeat(4096)), Err(Error::Other));
        assert_eq!(store.write(0, "big", "still fine"), Ok(()));
    }

    #[test]
    fn a_daemon_is_woken_once_a_call_unless_the_ring_was_full() {
        let mut store = client(|kind, id, _| vec![message(kind, id, &vec![b'v'; if kind == 2 { 10 } else { 2500 }])]);
        assert!(store.read(0, "x").is_ok());
        assert_eq!(store.transport.wakings, 1);
        assert!(store.list(0, "x").is_ok());
        assert_eq!(store.transport.wakings, 4, "2516 bytes fill the ring twice");
    }

    /// A client whose daemon keeps the paths of the nodes it was told to write, and refuses those with an x.
    fn writer() -> (Client<Daemon>, alloc::rc::Rc<core::cell::RefCell<Vec<String>>>) {
        let seen = alloc::rc::Rc::new(core::cell::RefCell::new(Vec::new()));
        let log = seen.clone();
        let store = client(move |kind, id, payload| {
            assert_eq!(kind, 11);
            let path = std::str::from_utf8(payload).unwrap().split('\0').next().unwrap();
            log.borrow_mut().push(path.to_string());
            vec![if path.contains('x') { message(16, id, b"EACCES\0") } else { message(11, id, b"OK\0") }]
        });
        (store, seen)
    }

    fn nodes(paths: &[&str], length: usize) -> Vec<(String, String)> {
        paths.iter().map(|path| (path.to_string(), "v".repeat(length))).collect()
    }

    #[test]
    fn many_nodes_are_written_in_order_with_one_wake_up() {
        let (mut store, seen) = writer();
        assert_eq!(store.write_all(&nodes(&["c", "b", "a"], 4)), Ok(()));
        assert_eq!(*seen.borrow(), ["c", "b", "a"]);
        assert_eq!(store.transport.wakings, 1);
        assert_eq!(store.write_all(&[]), Ok(()));
        assert_eq!(store.transport.wakings, 1);
    }

    #[test]
    fn more_nodes_than_the_ring_holds_are_all_written() {
        let (mut store, seen) = writer();
        assert_eq!(store.write_all(&nodes(&["n"; 100], 100)), Ok(()));
        assert_eq!(seen.borrow().len(), 100);
    }

    #[test]
    fn the_first_error_among_many_nodes_is_told_and_the_others_are_written() {
        let (mut store, seen) = writer();
        assert_eq!(store.write_all(&nodes(&["a", "x", "b"], 4)), Err(Error::Denied));
        assert_eq!(*seen.borrow(), ["a", "x", "b"]);
        assert_eq!(store.write_all(&nodes(&["too-long"], 4096)), Err(Error::Other));
        assert_eq!(store.write(0, "c", "still fine"), Ok(()));
        store.transport.deaf = true;
        assert_eq!(store.write_all(&nodes(&["a", "b"], 4)), Err(Error::Timeout));
    }

    #[test]
    fn errors_are_told_by_name() {
        for (name, error) in
            [("ENOENT", Error::NotFound), ("EACCES", Error::Denied), ("EAGAIN", Error::Again), ("EIO", Error::Other)]
        {
            let mut store = client(move |_, id, _| vec![message(16, id, std::format!("{name}\0").as_bytes())]);
            assert_eq!(store.read(0, "x"), Err(error));
        }
    }

    #[test]
    fn a_late_reply_is_never_taken_for_the_next_ones() {
        let mut held = Vec::new();
        let mut store = client(move |_, id, payload| {
            held.push(message(2, id, payload));
            if held.len() == 2 { std::mem::take(&mut held) } else { vec![] }
        });
        assert_eq!(store.read(0, "first"), Err(Error::Timeout));
        assert_eq!(store.read(0, "second"), Ok("second\0".into()));
        assert!(!store.take_lost_watches());
    }

    #[test]
    fn events_between_request_and_reply_are_kept_in_order_without_duplicates() {
        let mut store = client(|_, id, _| {
            vec![
                message(15, 0, b"a\0t\0"),
                message(15, 0, b"b\0t\0"),
                message(15, 0, b"a\0t\0"),
                message(2, id, b"v"),
                message(15, 0, b"c\0u\0"),
            ]
        });
        assert_eq!(store.read(0, "x"), Ok("v".into()));
        let events: Vec<_> = std::iter::from_fn(|| store.next_event()).map(|e| e.path + "/" + &e.token).collect();
        assert_eq!(events, ["a/t", "b/t", "c/u"]);
        assert!(!store.may_have_events(), "all was looked at");
        assert_eq!(store.read(0, "x"), Ok("v".into()));
        assert!(store.may_have_events(), "what came with the reply woke nobody");
    }

    /// XSA-349, with the paths a guest chooses: each of its names below the watched node makes an event.
    #[test]
    fn a_flood_of_names_below_a_guests_node_is_one_event_without_a_path() {
        let mut store = client(|_, id, _| {
            let path = |n: u32| std::format!("state/{n}{}\0guest-7\0", "x".repeat(700));
            let mut all: Vec<_> = (0..1000).map(|n| message(15, 0, path(n).as_bytes())).collect();
            all.push(message(15, 0, b"a\0t\0"));
            all.push(message(2, id, b"v"));
            all
        });
        let mut answer = store.read(0, "x");
        for _ in 0..500 {
            if answer.is_ok() {
                break;
            }
            answer = store.read(0, "x");
            assert!(store.events.len() <= 2);
        }
        assert_eq!(answer, Ok("v".into()));
        assert!(!store.take_lost_watches(), "and nobody is looked at anew for it");
        let events: Vec<_> = std::iter::from_fn(|| store.next_event()).map(|e| e.path + "/" + &e.token).collect();
        assert_eq!(events[..2], ["/guest-7", "a/t"]);
    }

    /// Any bytes in a guest's node are a value, not a failure of xenstored, after which all guests are looked at again.
    #[test]
    fn a_value_that_is_no_text_is_read_as_one_that_means_nothing() {
        let mut store = client(|_, id, _| vec![message(2, id, b"4\xff\xfe\0")]);
        assert_eq!(store.read(0, "state"), Ok("4\u{fffd}\u{fffd}\0".into()));
    }

    #[test]
    fn an_event_flood_costs_a_rescan_and_bounded_memory() {
        let mut store = client(|_, id, _| {
            let mut all: Vec<_> = (0..2000).map(|n| message(15, 0, std::format!("p{n}\0t\0").as_bytes())).collect();
            all.push(message(2, id, b"v"));
            all
        });
        store.transport.clock = Cell::new(1);
        // The flood needs many turns of the ring; the reply comes after it.
        let mut answer = store.read(0, "x");
        for _ in 0..20 {
            if answer.is_ok() {
                break;
            }
            answer = store.read(0, "x");
            assert!(store.events.len() <= EVENT_QUEUE);
        }
        assert!(store.take_lost_watches());
        assert!(!store.take_lost_watches());
    }

    #[test]
    fn a_daemon_with_impossible_indices_costs_the_connection_only() {
        let mut store = client(|_, id, _| vec![message(2, id, b"v")]);
        store.page.write(ring::RSP_PROD, 77_777u32);
        assert_eq!(store.read(0, "x"), Err(Error::Broken));
        assert!(store.take_lost_watches());
        assert_eq!(store.read(0, "x"), Ok("v".into()));
    }

    #[test]
    fn an_oversized_message_costs_the_connection_only() {
        let mut first = true;
        let mut store = client(move |_, id, _| {
            let mut reply = message(2, id, b"v");
            if std::mem::take(&mut first) {
                reply[12..16].copy_from_slice(&5000u32.to_le_bytes());
            }
            vec![reply]
        });
        assert_eq!(store.read(0, "x"), Err(Error::Broken));
        assert_eq!(store.read(0, "x"), Ok("v".into()));
    }

    #[test]
    fn a_daemon_that_restarts_the_connection_is_followed() {
        let mut store = client(|_, id, _| vec![message(2, id, b"v")]);
        store.page.write(ring::CONNECTION, ring::RECONNECT);
        store.transport.deaf = true;
        // Nothing answers while it restarts; the client must not hang.
        assert_eq!(store.read(0, "x"), Err(Error::Broken));
        store.transport.deaf = false;
        store.transport.run();
        assert!(store.take_lost_watches());
        assert_eq!(store.read(0, "x"), Ok("v".into()));
    }

    #[test]
    fn transactions_have_an_id_and_end_with_t_or_f() {
        let mut store = client(|kind, id, payload| match kind {
            6 => vec![message(6, id, b"42\0")],
            _ => vec![message(16, id, if payload == b"T\0" { b"EAGAIN\0" } else { b"EINVAL\0" })],
        });
        assert_eq!(store.begin(), Ok(42));
        assert_eq!(store.end(42, true), Err(Error::Again));
        assert_eq!(store.end(42, false), Err(Error::Other));
    }
}
