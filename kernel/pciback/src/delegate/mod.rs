//! What only dom0 may do on an unmodified Xen, asked of `xl-pciback serve` over a channel: configuration writes that Xen
//! sees, and the physdev calls. [`RoutedConfig`] and [`RoutedPhysdev`] put it behind the two traits, so that nothing
//! above them knows who carries an operation out.
//!
//! One request is in flight at a time, and its caller waits for the answer, for at most [`PATIENCE`]. When one does not
//! come, the session is over: every request fails at once until dom0 says hello again. So a dom0 that hangs holds
//! guests up once, not with each request. What such a request did in dom0 is not known; dom0 carries requests out in
//! order and says hello after them, and with a new session everything that may be half done is made good:
//! [`Physdev::settle`], and the hand-overs begin anew ([`crate::device::Device::reconnected`]).

pub mod message;

use alloc::rc::Rc;
use core::cell::RefCell;

use self::message::{ANSWER, Answer, Operation, REQUEST, Request, VERSION};
use crate::physdev::{Physdev, PhysdevError, Pirq, Vector};
use crate::platform::{ConfigSpace, DomId, Nanos, Way, Width, WritesOff};
use crate::sbdf::Sbdf;

/// How long an answer may take: 1 second. The client gives a request up after 2.
pub const PATIENCE: Nanos = 1_000_000_000;

/// Messages looked at in one go: more come only from a peer that has lost its way.
const MESSAGES: usize = 64;

/// The channel, as the messages need it: whole messages or none.
pub trait Line {
    /// Whether somebody is at the other end.
    fn is_connected(&self) -> bool;
    /// Sends a request; false if there is no room.
    fn send(&mut self, request: &[u8; REQUEST]) -> bool;
    /// Takes a message that has come; false if there is none.
    fn receive(&mut self, answer: &mut [u8; ANSWER]) -> bool;
    /// Looks for a message for a short while, before somebody asks to be told when one comes: the answer to a request
    /// usually comes soon, and telling costs the peer a call.
    fn look(&mut self) {}
    /// Waits until a message may have come, at most until `deadline`.
    fn wait(&mut self, deadline: Nanos);
    /// Xen's system time now.
    fn now(&self) -> Nanos;
}

/// Why there is no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Nobody has connected, or it has gone.
    Nobody,
    /// It did not answer in time.
    Silent,
    /// It has begun another session while it was waited for.
    Restarted,
    /// It speaks this version of the protocol.
    Version(u32),
}

/// The driver domain's end.
#[derive(Debug)]
pub struct Delegate<L> {
    line: L,
    session: Result<u32, Down>,
    /// The session of a hello that came while an answer was waited for: it begins with the next
    /// [`Delegate::poll`], so that what the request belongs to is over first.
    next: Option<Answer>,
    sequence: u32,
    /// Something may have come behind an answer that was waited for.
    unseen: bool,
    /// Dom0 is to be asked for a hello, once there is room.
    ask: bool,
}

impl<L: Line> Delegate<L> {
    /// An end that nobody has connected to.
    pub fn new(line: L) -> Delegate<L> {
        Delegate { line, session: Err(Down::Nobody), next: None, sequence: 0, unseen: false, ask: false }
    }

    /// The session, a number that changes with each, or why there is none.
    pub fn session(&self) -> Result<u32, Down> {
        self.session
    }

    /// The channel.
    pub fn line(&mut self) -> &mut L {
        &mut self.line
    }

    /// Whether [`Delegate::poll`] has something to do that no event tells of.
    pub fn has_news(&self) -> bool {
        self.unseen || self.next.is_some()
    }

    /// Looks for what has come without being asked for: a hello, or the end of the peer.
    pub fn poll(&mut self) {
        self.unseen = false;
        if let Some(hello) = self.next.take() {
            self.begin(&hello);
        }
        let mut bytes = [0; ANSWER];
        for _ in 0..MESSAGES {
            if !self.line.receive(&mut bytes) {
                break;
            }
            let answer = Answer::decode(&bytes);
            if answer.is_hello() {
                self.begin(&answer);
            }
        }
        if !self.line.is_connected() && !matches!(self.session, Err(Down::Nobody)) {
            self.session = Err(Down::Nobody);
            self.ask = false;
        }
        if self.ask {
            self.ask_again();
        }
    }

    /// Has dom0 carry out `operation`, and returns the answer's value.
    ///
    /// # Errors
    /// dom0's errno; [`PhysdevError::NotConnected`] without a session, or if this request ended it.
    pub fn call(&mut self, function: Sbdf, operation: Operation) -> Result<u32, PhysdevError> {
        let session = self.session.map_err(|_| PhysdevError::NotConnected)?;
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        let request = Request { session, sequence: self.sequence, function, operation };
        let deadline = self.line.now().saturating_add(PATIENCE);
        if !self.line.send(&request.encode()) {
            return self.lost();
        }
        self.line.look();
        let mut bytes = [0; ANSWER];
        loop {
            // Late answers of before are passed over: a bounded number, as the channel holds no more.
            while self.line.receive(&mut bytes) {
                let answer = Answer::decode(&bytes);
                if answer.session == session && answer.sequence == request.sequence {
                    return match i32::try_from(answer.errno) {
                        Ok(0) => Ok(answer.value),
                        Ok(errno) => Err(PhysdevError::of(errno)),
                        Err(_) => Err(PhysdevError::Other(i32::MAX)),
                    };
                }
                if answer.is_hello() {
                    // The request went to a former life of the peer.
                    self.session = Err(Down::Restarted);
                    self.next = Some(answer);
                    return Err(PhysdevError::NotConnected);
                }
            }
            if !self.line.is_connected() || self.line.now() >= deadline {
                return self.lost();
            }
            self.unseen = true;
            self.line.wait(deadline);
        }
    }

    fn begin(&mut self, hello: &Answer) {
        self.ask = false;
        self.session = if hello.value == VERSION { Ok(hello.session) } else { Err(Down::Version(hello.value)) };
    }

    fn lost(&mut self) -> Result<u32, PhysdevError> {
        if self.line.is_connected() {
            self.session = Err(Down::Silent);
            self.ask_again();
        } else {
            self.session = Err(Down::Nobody);
        }
        Err(PhysdevError::NotConnected)
    }

    /// It may answer yet; what it does before it says hello is made good then.
    fn ask_again(&mut self) {
        let again = Request { session: 0, sequence: 1, function: Sbdf::new(0, 0, 0), operation: Operation::Again };
        self.ask = !self.line.send(&again.encode());
    }
}

/// One end, used by every function and by the physdev calls.
pub type Shared<L> = Rc<RefCell<Delegate<L>>>;

/// A function's configuration space with its frame and with dom0.
#[derive(Debug)]
pub struct RoutedConfig<C, L> {
    frame: C,
    sbdf: Sbdf,
    way: Option<Way>,
    dom0: Shared<L>,
}

impl<C, L> RoutedConfig<C, L> {
    /// The function behind `frame`. Nothing may be written yet.
    pub fn new(frame: C, sbdf: Sbdf, dom0: Shared<L>) -> RoutedConfig<C, L> {
        RoutedConfig { frame, sbdf, way: None, dom0 }
    }
}

impl<C: ConfigSpace, L: Line> ConfigSpace for RoutedConfig<C, L> {
    fn read(&self, offset: u16, width: Width) -> u32 {
        self.frame.read(offset, width)
    }

    fn write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), WritesOff> {
        match self.way {
            None => Err(WritesOff),
            Some(Way::Frame) => self.frame.write(offset, width, value),
            Some(way) if !way.is_dom0s(offset, width) => self.frame.write(offset, width, value),
            Some(_) => {
                let answer = self.dom0.borrow_mut().call(self.sbdf, Operation::Write { offset, width, value });
                answer.map(drop).map_err(|_| WritesOff)
            }
        }
    }

    fn writable(&self) -> bool {
        match self.way {
            None => false,
            Some(Way::Frame) => true,
            Some(Way::Dom0 | Way::Split(_)) => self.dom0.borrow().session().is_ok(),
        }
    }

    fn allow_writes(&mut self, way: Way) {
        self.way = Some(way);
        if way != Way::Dom0 {
            self.frame.allow_writes(way);
        }
    }
}

/// The physdev calls by this domain itself, or by dom0.
#[derive(Debug)]
pub struct RoutedPhysdev<P, L> {
    own: P,
    by_dom0: bool,
    dom0: Shared<L>,
}

impl<P: Physdev, L: Line> RoutedPhysdev<P, L> {
    /// This domain's own calls, until [`Physdev::use_dom0`] says otherwise.
    pub fn new(own: P, dom0: Shared<L>) -> RoutedPhysdev<P, L> {
        RoutedPhysdev { own, by_dom0: false, dom0 }
    }

    fn ask(&mut self, sbdf: Sbdf, operation: Operation) -> Result<u32, PhysdevError> {
        self.dom0.borrow_mut().call(sbdf, operation)
    }
}

impl<P: Physdev, L: Line> Physdev for RoutedPhysdev<P, L> {
    fn prepare_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        if self.by_dom0 { self.ask(sbdf, Operation::Prepare).map(drop) } else { self.own.prepare_msix(sbdf) }
    }

    fn release_msix(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        if self.by_dom0 { self.ask(sbdf, Operation::Release).map(drop) } else { self.own.release_msix(sbdf) }
    }

    fn restore_msi(&mut self, sbdf: Sbdf) -> Result<(), PhysdevError> {
        if self.by_dom0 { self.ask(sbdf, Operation::Restore).map(drop) } else { self.own.restore_msi(sbdf) }
    }

    fn map(&mut self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, PhysdevError> {
        if self.by_dom0 {
            let pirq = self.ask(sbdf, Operation::Map { guest, vector })?;
            // One that cannot be is refused by the caller, as it would be from Xen.
            return Ok(pirq.cast_signed());
        }
        self.own.map(guest, sbdf, vector)
    }

    fn unmap(&mut self, guest: DomId, sbdf: Sbdf, pirq: Pirq) -> Result<(), PhysdevError> {
        if self.by_dom0 {
            return self.ask(sbdf, Operation::Unmap { guest, pirq }).map(drop);
        }
        self.own.unmap(guest, sbdf, pirq)
    }

    fn now(&self) -> Nanos {
        self.own.now()
    }

    fn use_dom0(&mut self) {
        self.by_dom0 = true;
    }

    fn is_connected(&self) -> bool {
        !self.by_dom0 || self.dom0.borrow().session().is_ok()
    }

    fn settle(&mut self, guest: DomId, sbdf: Sbdf, known: &[Pirq]) -> Result<(), PhysdevError> {
        if !self.by_dom0 {
            return Ok(());
        }
        for pirq in known {
            self.ask(sbdf, Operation::Keep { guest, pirq: *pirq })?;
        }
        self.ask(sbdf, Operation::Settle).map(drop)
    }

    fn reset(&mut self, sbdf: Sbdf, together: bool) -> Result<(), PhysdevError> {
        if !self.by_dom0 {
            return Err(PhysdevError::NotImplemented);
        }
        self.ask(sbdf, Operation::Reset { together }).map(drop)
    }

    fn reset_done(&mut self, sbdf: Sbdf) -> Result<bool, PhysdevError> {
        if self.by_dom0 {
            return self.ask(sbdf, Operation::ResetDone).map(|value| value != 0);
        }
        Err(PhysdevError::NotImplemented)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::vec::Vec;

    /// A dom0 for tests: what it gets, what it says, and how long that takes.
    #[derive(Debug, Default)]
    struct Dom0 {
        connected: bool,
        now: Nanos,
        sent: Vec<Request>,
        inbox: VecDeque<Answer>,
        /// What it answers while it is waited for.
        replies: VecDeque<Answer>,
        full: bool,
    }

    impl Line for Dom0 {
        fn is_connected(&self) -> bool {
            self.connected
        }
        fn send(&mut self, request: &[u8; REQUEST]) -> bool {
            if !self.full {
                self.sent.push(Request::decode(request).expect("a good request"));
            }
            !self.full
        }
        fn receive(&mut self, answer: &mut [u8; ANSWER]) -> bool {
            let Some(next) = self.inbox.pop_front() else { return false };
            *answer = next.encode();
            true
        }
        fn wait(&mut self, deadline: Nanos) {
            match self.replies.pop_front() {
                Some(reply) => self.inbox.push_back(reply),
                None => self.now = deadline,
            }
        }
        fn now(&self) -> Nanos {
            self.now
        }
    }

    const NIC: Sbdf = Sbdf::new(0, 1, 0);

    fn connected(session: u32) -> Delegate<Dom0> {
        let mut delegate = Delegate::new(Dom0 { connected: true, ..Dom0::default() });
        delegate.line.inbox.push_back(Answer::hello(session));
        delegate.poll();
        assert_eq!(delegate.session(), Ok(session));
        delegate
    }

    fn answer(session: u32, sequence: u32, errno: u32, value: u32) -> Answer {
        Answer { session, sequence, errno, value }
    }

    #[test]
    fn without_a_hello_nothing_is_sent() {
        let mut delegate = Delegate::new(Dom0 { connected: true, ..Dom0::default() });
        delegate.poll();
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert!(delegate.line.sent.is_empty());
        let other = Answer { value: VERSION + 1, ..Answer::hello(5) };
        delegate.line.inbox.push_back(other);
        delegate.poll();
        assert_eq!(delegate.session(), Err(Down::Version(VERSION + 1)));
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
    }

    #[test]
    fn an_answer_is_the_one_to_its_request() {
        let mut delegate = connected(5);
        delegate.line.replies.extend([answer(4, 1, 0, 9), answer(5, 7, 0, 9), answer(5, 1, 0, 151)]);
        assert_eq!(delegate.call(NIC, Operation::Prepare), Ok(151));
        delegate.line.replies.push_back(answer(5, 2, 28, 0));
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NoPirq));
        delegate.line.replies.push_back(answer(5, 3, u32::MAX, 0));
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::Other(i32::MAX)));
        assert_eq!(delegate.line.sent.iter().map(|sent| sent.sequence).collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn a_silent_dom0_is_waited_for_once_and_asked_to_begin_again() {
        let mut delegate = connected(5);
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert_eq!((delegate.line.now, delegate.session()), (PATIENCE, Err(Down::Silent)));
        let before = delegate.line.now;
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert_eq!(delegate.line.now, before, "the second fails at once");
        let sent: Vec<Operation> = delegate.line.sent.iter().map(|sent| sent.operation).collect();
        assert_eq!(sent, [Operation::Prepare, Operation::Again]);
        // It wakes up: the late answer is nobody's any more, the hello begins a session.
        delegate.line.inbox.extend([answer(5, 1, 0, 0), Answer::hello(6)]);
        delegate.poll();
        assert_eq!(delegate.session(), Ok(6));
        delegate.line.replies.push_back(answer(6, 2, 0, 1));
        assert_eq!(delegate.call(NIC, Operation::Settle), Ok(1));
        assert_eq!(delegate.line.sent.last().map(|sent| sent.session), Some(6));
    }

    #[test]
    fn a_peer_that_goes_or_is_another_ends_the_request() {
        let mut delegate = connected(5);
        delegate.line.connected = false;
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert_eq!(delegate.session(), Err(Down::Nobody));
        let mut delegate = connected(5);
        delegate.line.replies.push_back(Answer::hello(6));
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert_eq!(
            delegate.call(NIC, Operation::Prepare),
            Err(PhysdevError::NotConnected),
            "and all that belongs to it"
        );
        assert!(delegate.has_news());
        delegate.poll();
        assert_eq!((delegate.session(), delegate.has_news()), (Ok(6), false));
        let mut delegate = connected(5);
        delegate.line.connected = false;
        delegate.poll();
        assert_eq!(delegate.session(), Err(Down::Nobody));
    }

    #[test]
    fn a_full_channel_is_no_wait_and_the_wish_to_begin_again_is_kept() {
        let mut delegate = connected(5);
        delegate.line.full = true;
        assert_eq!(delegate.call(NIC, Operation::Prepare), Err(PhysdevError::NotConnected));
        assert_eq!((delegate.line.now, delegate.session()), (0, Err(Down::Silent)));
        delegate.line.full = false;
        delegate.poll();
        delegate.poll();
        assert_eq!(delegate.line.sent.len(), 1);
    }
}
