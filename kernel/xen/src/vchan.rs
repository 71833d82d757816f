//! The server's end of a vchan, `xen/io/libxenvchan.h`: a program in dom0 that uses libxenvchan's client talks
//! to the image through it.
//!
//! Both rings are inside the one shared page: the left one (client to server) has 1024 bytes, the right
//! one (server to client) 2048. libxenvchan's client takes the orders from the page. Each side sends an
//! event only if the other has asked for it: a side asks in the *other* side's notify byte (we in
//! `cli_notify`), and answering a request takes the bit away. Requests and answers are atomic changes of the
//! same byte, so that one of two things is always true: the answering side sees the request, or the
//! asking side, which looks once more, sees what the other one published before it answered.
//!
//! The page is the client's to write as well. Our own indices are kept privately and only published; an
//! index of the client's that is out of range counts as "nothing there" and "no room".
//!
//! # Client after client
//!
//! The same page and port serve one client after another with nothing to do here. What that relies on, in
//! `tools/libs/vchan/init.c` of Xen 4.17 and 4.20:
//!
//! - `libxenvchan_client_init` looks at neither `cli_live` nor `srv_live`. It binds the event channel, maps
//!   the page, then sets `cli_live` to 1 and `srv_notify` to WRITE, and sends an event. It resets no index and
//!   keeps none of its own (`io.c`): a new client goes on at the indices in the page.
//! - A client's end clears `cli_live` (`libxenvchan_close`, or the unmap notification of Linux's
//!   `drivers/xen/gntdev.c` if it was killed), and an event follows; only then is its port closed. Xen
//!   turns ours back to unbound for dom0 (`evtchn_close`, `xen/common/event_channel.c`), and drops what we
//!   send meanwhile.
//! - Binding fails while the last client's port is open. So there is one client at a time, and the next one
//!   sets `cli_live` only after the last one's was cleared. The server may see no 0 between the two.
//!
//! Messages that the last client did not read are still in the ring for the next one: a client throws away
//! what it finds, and tells a late answer to its predecessor from its own by what the message says. A client that
//! leaves a nonsense index behind has locked that ring for good, as with libxenvchan's own server. That is
//! the most a client can do: spoil this channel, for itself and its successors.

use core::sync::atomic::Ordering;

use crate::abi::{PAGE_SIZE, vchan};
use crate::evtchn::BoundPort;
use crate::page::Page;

/// Bytes of the left ring, client to server.
const LEFT_SIZE: u32 = 1 << vchan::SMALL_ORDER;
/// Bytes of the right ring, server to client.
const RIGHT_SIZE: u32 = 1 << vchan::LARGE_ORDER;

/// What wakes the client.
pub trait Notify {
    /// Sends one event.
    fn notify(&self);
}

impl Notify for BoundPort {
    fn notify(&self) {
        BoundPort::notify(self);
    }
}

/// The server's end of a vchan.
#[derive(Debug)]
pub struct Server<N> {
    page: Page,
    notify: N,
    /// Bytes received, the left ring's `cons`.
    received: u32,
    /// Bytes sent, the right ring's `prod`.
    sent: u32,
}

impl<N: Notify> Server<N> {
    /// Makes `page` an unconnected vchan, and sends events with `notify`. To be done before the page is granted.
    pub fn new(page: Page, notify: N) -> Server<N> {
        for word in 0..PAGE_SIZE as usize / 8 {
            page.write(word * 8, 0u64);
        }
        page.write(vchan::LEFT_ORDER, vchan::SMALL_ORDER);
        page.write(vchan::RIGHT_ORDER, vchan::LARGE_ORDER);
        page.write(vchan::CLI_LIVE, vchan::LIVE_NOT_YET);
        page.write(vchan::SRV_LIVE, vchan::LIVE_CONNECTED);
        page.write(vchan::CLI_NOTIFY, vchan::NOTIFY_WRITE);
        Server { page, notify, received: 0, sent: 0 }
    }

    /// Whether there is a client.
    pub fn is_connected(&self) -> bool {
        self.page.atomic8(vchan::CLI_LIVE).load(Ordering::Acquire) == vchan::LIVE_CONNECTED
    }

    /// Sends the whole of `message`, or nothing and answers false: there is no room or no client. Where room
    /// may come, the client is asked for an event when it has read.
    pub fn send(&mut self, message: &[u8]) -> bool {
        let Some(len) = fits(message.len(), RIGHT_SIZE).filter(|_| self.is_connected()) else {
            return false;
        };
        if !self.enough(len, vchan::NOTIFY_READ, Self::room) {
            return false;
        }
        for byte in message {
            self.page.write(vchan::LARGE_RING + (self.sent % RIGHT_SIZE) as usize, *byte);
            self.sent = self.sent.wrapping_add(1);
        }
        self.page.atomic32(vchan::RIGHT_PROD).store(self.sent, Ordering::Release);
        self.answer(vchan::NOTIFY_WRITE);
        true
    }

    /// Fills `into` with the next bytes, or takes nothing and answers false: there are fewer. The client is
    /// then asked for an event when it has written. What a client sent before it went is still received.
    pub fn receive(&mut self, into: &mut [u8]) -> bool {
        let Some(len) = fits(into.len(), LEFT_SIZE) else {
            return false;
        };
        if !self.enough(len, vchan::NOTIFY_WRITE, Self::ready) {
            return false;
        }
        for byte in into {
            *byte = self.page.read(vchan::SMALL_RING + (self.received % LEFT_SIZE) as usize);
            self.received = self.received.wrapping_add(1);
        }
        self.page.atomic32(vchan::LEFT_CONS).store(self.received, Ordering::Release);
        self.answer(vchan::NOTIFY_READ);
        true
    }

    /// Whether `len` bytes are there. Unlike [`Server::receive`] it asks for no event if not: for one who looks again soon.
    pub fn has(&self, len: usize) -> bool {
        fits(len, LEFT_SIZE).is_some_and(|len| self.ready() >= len)
    }

    /// Bytes there to receive; 0 for a nonsense index.
    fn ready(&self) -> u32 {
        let prod = self.page.atomic32(vchan::LEFT_PROD).load(Ordering::Acquire);
        let ready = prod.wrapping_sub(self.received);
        if ready > LEFT_SIZE { 0 } else { ready }
    }

    /// Bytes there is room to send; 0 for a nonsense index.
    fn room(&self) -> u32 {
        let cons = self.page.atomic32(vchan::RIGHT_CONS).load(Ordering::Acquire);
        RIGHT_SIZE.saturating_sub(self.sent.wrapping_sub(cons))
    }

    /// Whether `look` finds at least `len` bytes. If not, asks the client for the event `bit` and looks once
    /// more: what the client did before it could see the request brings no event.
    fn enough(&self, len: u32, bit: u8, look: impl Fn(&Self) -> u32) -> bool {
        if look(self) >= len {
            return true;
        }
        self.page.atomic8(vchan::CLI_NOTIFY).fetch_or(bit, Ordering::AcqRel);
        look(self) >= len
    }

    /// Sends an event if the client has asked for it. The caller has published its index before.
    fn answer(&self, bit: u8) {
        if self.page.atomic8(vchan::SRV_NOTIFY).fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            self.notify.notify();
        }
    }
}

/// A message's length, if a ring of `size` bytes can hold it at all.
fn fits(len: usize, size: u32) -> Option<u32> {
    u32::try_from(len).ok().filter(|len| *len <= size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::tests::page;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::mpsc;
    use std::time::Duration;
    use std::vec::Vec;

    /// Counts the events.
    #[derive(Clone, Default)]
    struct Count(Rc<Cell<u32>>);

    impl Notify for Count {
        fn notify(&self) {
            self.0.set(self.0.get() + 1);
        }
    }

    impl Count {
        fn take(&self) -> u32 {
            self.0.replace(0)
        }
    }

    impl Notify for mpsc::Sender<()> {
        fn notify(&self) {
            // The peer may have all it waited for and be gone.
            let _ = self.send(());
        }
    }

    /// A client by the header's text: its indices are those in the page, offsets are written out.
    struct Client<N> {
        page: Page,
        notify: N,
    }

    impl<N: Notify> Client<N> {
        fn connect(page: Page, notify: N) -> Client<N> {
            assert_eq!((page.read::<u16>(16), page.read::<u16>(18)), (10, 11));
            page.atomic8(20).store(1, Ordering::Release);
            page.atomic8(23).store(1, Ordering::Release);
            notify.notify();
            Client { page, notify }
        }

        fn die(self) {
            self.page.atomic8(20).store(0, Ordering::Release);
            self.notify.notify();
        }

        fn ask(&self, bit: u8) {
            self.page.atomic8(23).fetch_or(bit, Ordering::SeqCst);
        }

        fn answer(&self, bit: u8) {
            if self.page.atomic8(22).fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
                self.notify.notify();
            }
        }

        fn write(&self, message: &[u8]) -> bool {
            let prod: u32 = self.page.read(4);
            let room = || 1024 - prod.wrapping_sub(self.page.atomic32(0).load(Ordering::SeqCst)) as usize;
            if room() < message.len() {
                self.ask(2);
                if room() < message.len() {
                    return false;
                }
            }
            let mut at = prod;
            for byte in message {
                self.page.write(1024 + (at % 1024) as usize, *byte);
                at = at.wrapping_add(1);
            }
            self.page.atomic32(4).store(at, Ordering::SeqCst);
            self.answer(1);
            true
        }

        fn read(&self, into: &mut [u8]) -> bool {
            let cons: u32 = self.page.read(8);
            let ready = || self.page.atomic32(12).load(Ordering::SeqCst).wrapping_sub(cons) as usize;
            if ready() < into.len() {
                self.ask(1);
                if ready() < into.len() {
                    return false;
                }
            }
            let mut at = cons;
            for byte in into {
                *byte = self.page.read(2048 + (at % 2048) as usize);
                at = at.wrapping_add(1);
            }
            self.page.atomic32(8).store(at, Ordering::SeqCst);
            self.answer(2);
            true
        }
    }

    /// A server with its page, a connected client, and the events each sent.
    fn pair() -> (Server<Count>, Client<Count>, Count, Count) {
        let page = page();
        let (to_client, to_server) = (Count::default(), Count::default());
        let server = Server::new(page, to_client.clone());
        let client = Client::connect(page, to_server.clone());
        to_server.take();
        (server, client, to_client, to_server)
    }

    fn message(number: u32) -> [u8; 32] {
        core::array::from_fn(|i| number.wrapping_mul(2_654_435_761).to_le_bytes()[i % 4] ^ i as u8)
    }

    /// The next of a sequence of numbers without a pattern.
    fn next(state: &mut u64) -> u32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 32) as u32
    }

    #[test]
    fn a_new_page_is_what_the_librarys_server_makes() {
        let page = page();
        for word in 0..512 {
            page.write(word * 8, u64::MAX);
        }
        let server = Server::new(page, Count::default());
        assert!(!server.is_connected());
        assert_eq!((page.read::<u64>(0), page.read::<u64>(8)), (0, 0));
        assert_eq!((page.read::<u16>(16), page.read::<u16>(18)), (10, 11));
        assert_eq!([20, 21, 22, 23].map(|at| page.read::<u8>(at)), [2, 1, 1, 0]);
        assert!((3..512).all(|word| page.read::<u64>(word * 8) == 0));
    }

    #[test]
    fn messages_pass_both_ways_over_many_wraps() {
        // Lengths that divide the rings, and one that does not: a message is then split at the end.
        for len in [32, 32 - 3] {
            let (mut server, client, _, _) = pair();
            for number in 0..1000 {
                let (question, reply) = (message(number), message(!number));
                assert!(client.write(&question[..len]));
                let mut got = [0; 32];
                assert!(server.receive(&mut got[..len]));
                assert_eq!(got[..len], question[..len]);
                assert!(server.send(&reply[..len]));
                assert!(client.read(&mut got[..len]));
                assert_eq!(got[..len], reply[..len]);
            }
            assert!(!server.receive(&mut [0]) && !client.read(&mut [0]));
        }
    }

    #[test]
    fn indices_pass_their_own_end() {
        let (mut server, client, _, _) = pair();
        let start = u32::MAX - 40;
        (server.received, server.sent) = (start, start);
        for at in [0, 4, 8, 12] {
            client.page.write(at, start);
        }
        for number in 0..10 {
            let mut got = [0; 32];
            assert!(client.write(&message(number)) && server.receive(&mut got) && got == message(number));
            assert!(server.send(&message(!number)) && client.read(&mut got) && got == message(!number));
        }
    }

    #[test]
    fn a_full_ring_takes_whole_messages_or_nothing() {
        let (mut server, client, _, to_server) = pair();
        for number in 0..64 {
            assert!(server.send(&message(number)));
        }
        assert!(!server.send(&[1]) && !server.send(&message(64)));
        assert!(server.send(&[]));
        assert_eq!(client.page.read::<u32>(12), 2048);
        // It asked to hear of room.
        assert_eq!(to_server.take(), 0);
        let mut got = [0; 32];
        assert!(client.read(&mut got) && got == message(0));
        assert_eq!(to_server.take(), 1);
        assert!(server.send(&message(64)));
        for number in 1..65 {
            assert!(client.read(&mut got));
            assert_eq!(got, message(number));
        }
        // The other ring, seen from its reader.
        for number in 0..32 {
            assert!(client.write(&message(number)));
        }
        assert!(!client.write(&[1]));
        for number in 0..32 {
            assert!(server.receive(&mut got));
            assert_eq!(got, message(number));
        }
        assert!(!server.receive(&mut got));
    }

    #[test]
    fn what_no_ring_can_hold_is_refused_and_a_whole_ring_is_not() {
        let (mut server, client, _, _) = pair();
        assert!(!server.send(&[7; 2049]) && server.send(&[7; 2048]));
        assert!(client.write(&[9; 1024]));
        assert!(!server.receive(&mut [0; 1025]));
        let mut got = [0; 1024];
        assert!(server.receive(&mut got) && got == [9; 1024]);
    }

    #[test]
    fn a_partial_message_stays_until_the_rest_is_there() {
        let (mut server, client, _, to_server) = pair();
        let mut got = [0xaa; 32];
        assert!(client.write(&message(5)[..20]));
        assert_eq!(to_server.take(), 1);
        assert!(!server.receive(&mut got));
        assert_eq!(got, [0xaa; 32]);
        assert!(client.write(&message(5)[20..]));
        assert_eq!(to_server.take(), 1);
        assert!(server.receive(&mut got) && got == message(5));
    }

    #[test]
    fn nothing_is_sent_without_a_client_but_what_it_left_is_received() {
        let page = page();
        let mut server = Server::new(page, Count::default());
        assert!(!server.send(&[1]));
        page.write(20, 0xffu8);
        assert!(!server.is_connected() && !server.send(&[1]));
        let client = Client::connect(page, Count::default());
        assert!(server.is_connected() && client.write(&message(1)));
        client.die();
        let mut got = [0; 32];
        assert!(!server.is_connected() && server.receive(&mut got) && got == message(1));
        assert!(!server.send(&got));
    }

    #[test]
    fn the_next_client_goes_on_where_the_last_one_stopped() {
        let (mut server, mut client, to_client, to_server) = pair();
        let page = client.page;
        let mut got = [0; 32];
        for number in 0..200 {
            assert!(!server.receive(&mut got));
            assert!(client.write(&message(number)));
            assert_eq!(to_server.take(), 1);
            assert!(server.receive(&mut got) && got == message(number));
            assert!(server.send(&got));
            assert_eq!(to_client.take(), 1);
            // Every other client goes without its answer, which its successor finds first.
            if number % 2 == 0 {
                assert!(client.read(&mut got) && got == message(number));
            }
            client.die();
            assert_eq!(to_server.take(), 1);
            client = Client::connect(page, to_server.clone());
            assert_eq!(to_server.take(), 1);
            if number % 2 == 1 {
                assert!(client.read(&mut got) && got == message(number));
            }
            assert!(!client.read(&mut got));
        }
    }

    #[test]
    fn events_are_sent_only_when_asked_for_and_once() {
        let (mut server, client, to_client, to_server) = pair();
        // Connecting has asked for one.
        assert!(server.send(&message(0)) && server.send(&message(1)));
        assert_eq!(to_client.take(), 1);
        let mut got = [0; 32];
        assert!(client.read(&mut got) && client.read(&mut got) && !client.read(&mut got));
        assert!(server.send(&message(2)));
        assert_eq!(to_client.take(), 1);
        // A request to hear of reading is no request to hear of writing, and stays.
        client.ask(2);
        assert!(server.send(&message(3)));
        assert_eq!(to_client.take(), 0);
        assert!(client.write(&message(4)) && client.write(&message(5)));
        // A new page asks the client for the first event.
        assert_eq!(to_server.take(), 1);
        assert!(server.receive(&mut got) && server.receive(&mut got));
        assert_eq!(to_client.take(), 1);
        assert_eq!(client.page.read::<u8>(22), 0);
        assert!(!server.receive(&mut got));
        assert_eq!(client.page.read::<u8>(22), 1);
    }

    #[test]
    fn nonsense_indices_are_nothing_there_and_no_room() {
        let (mut server, client, _, _) = pair();
        let page = client.page;
        let mut state = 1;
        let (mut received, mut sent) = (0u32, 0u32);
        let (mut taken, mut given) = (0, 0);
        for _ in 0..100_000 {
            // Near our index as often as anywhere; our own published ones are overwritten as well.
            let [left, right] = [received, sent].map(|own| match next(&mut state) % 2 {
                0 => own.wrapping_add(next(&mut state) % 8192).wrapping_sub(4096),
                _ => next(&mut state),
            });
            page.write(4, left);
            page.write(8, right);
            page.write(0, next(&mut state));
            page.write(12, next(&mut state));
            page.write(22, next(&mut state) as u16);

            let len = 1 + next(&mut state) % 1500;
            let there = left.wrapping_sub(received);
            let expected = len <= 1024 && there <= 1024 && there >= len;
            assert_eq!(server.receive(&mut std::vec![0; len as usize]), expected);
            if expected {
                received = received.wrapping_add(len);
                assert_eq!(page.read::<u32>(0), received);
                taken += 1;
            }
            let used = sent.wrapping_sub(right);
            let expected = used <= 2048 && len <= 2048 - used;
            assert_eq!(server.send(&std::vec![0; len as usize]), expected);
            if expected {
                sent = sent.wrapping_add(len);
                assert_eq!(page.read::<u32>(12), sent);
                given += 1;
            }
        }
        assert!(taken > 100 && given > 100, "{taken} received, {given} sent");
        // What is beside the rings and indices is as it was.
        assert_eq!((page.read::<u16>(16), page.read::<u16>(18), page.read::<u16>(20)), (10, 11, 0x0101));
        assert!((3..128).all(|word| page.read::<u64>(word * 8) == 0));
    }

    #[test]
    fn what_the_client_does_between_look_and_request_is_seen() {
        let (mut server, client, _, to_server) = pair();
        while server.send(&message(0)) {}
        client.page.write(22, 0u8);
        let looks = Cell::new(0);
        // The client acts right after the first look, when nothing has been asked of it.
        let first = |acts: &dyn Fn() -> bool| looks.replace(looks.get() + 1) != 0 || acts();
        assert!(server.enough(32, 1, |server| {
            let ready = server.ready();
            assert!(first(&|| client.write(&message(1))));
            ready
        }));
        assert_eq!((looks.take(), to_server.take(), client.page.read::<u8>(22)), (2, 0, 1));
        client.page.write(22, 0u8);
        assert!(server.enough(32, 2, |server| {
            let room = server.room();
            assert!(first(&|| client.read(&mut [0; 32])));
            room
        }));
        assert_eq!((looks.take(), to_server.take(), client.page.read::<u8>(22)), (2, 0, 2));
    }

    /// Both ends run at once and each sleeps until an event whenever it can do nothing: one that is missed
    /// leaves both asleep.
    #[test]
    fn no_wake_up_is_lost() {
        const MESSAGES: u32 = 20_000;
        const PATIENCE: Duration = Duration::from_secs(20);
        let page = page();
        let (to_client, client_events) = mpsc::channel();
        let (to_server, server_events) = mpsc::channel();
        let mut server = Server::new(page, to_client);
        let client = Client::connect(page, to_server);

        let echo = std::thread::spawn(move || {
            let (mut done, mut got) = (0, [0; 32]);
            let mut owed: Option<[u8; 32]> = None;
            while done < MESSAGES {
                if let Some(reply) = owed.take() {
                    if server.send(&reply) {
                        done += 1;
                        continue;
                    }
                    owed = Some(reply);
                } else if server.receive(&mut got) {
                    owed = Some(got);
                    continue;
                }
                server_events.recv_timeout(PATIENCE).expect("an event for the server");
            }
        });

        let (mut written, mut read, mut got) = (0, 0, [0; 32]);
        // Bursts of other sizes each time: now the rings run full, now they run empty.
        let (mut state, mut burst) = (7, 1);
        while read < MESSAGES {
            let wrote = written < MESSAGES && written - read < burst && client.write(&message(written));
            written += u32::from(wrote);
            if client.read(&mut got) {
                assert_eq!(got, message(read));
                read += 1;
                burst = if written == read { 1 + next(&mut state) % 150 } else { burst };
            } else if !wrote {
                client_events.recv_timeout(PATIENCE).expect("an event for the client");
            }
        }
        echo.join().expect("the server's end");
        let rest: Vec<()> = client_events.try_iter().collect();
        assert!(rest.len() <= 2, "{} events nobody asked for", rest.len());
    }
}
