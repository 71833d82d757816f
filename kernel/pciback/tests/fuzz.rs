//! A guest that does what it likes: any operation with any argument, the page rewritten between any two reads of it, flags
//! flipped at any moment, storms of events, pages and ports taken away, nodes scribbled. Beside it an honest guest of the
//! same driver domain works. Seeded, so that a failure can be had again: it prints the seed, and
//! `PCIBACK_FUZZ_SEED=n PCIBACK_FUZZ_OPS=n` play it; `cargo xtask fuzz` plays more.
//!
//! What must hold: no panic; one answer for a request that stands, and none to a page that asks for nothing; nothing is
//! written into a device but what a guest without trust may have there, or what the hand-over puts back; an honest request
//! is answered within a bounded number of turns, with the truth; lines, watches, pages, ports and vectors are bounded.

use crate::model;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use model::hardware::{BAR0, MASTER, MS, MSI_ENABLE, at};
use model::logs::{self, heard, listen};
use model::xen::Stage;
use model::{Card, DRIVER, Guest, Hardware, OWN_WATCHES, Rig, World, boot_in};
use pciback::device::State;
use pciback::platform::Nanos;
use pciback::wire::{MsixEntry, PCIB_ACTIVE, PCIF_ACTIVE, RawRequest, op};

/// The hostile guest's functions.
const PREY: [(&str, Card); 3] = [
    ("0000:01:00.0", Card::FULL),
    ("0000:02:00.0", Card { power: Some(false), ..Card::BOTH }),
    ("0000:03:00.0", Card { advanced: true, ..Card::MSI_ONLY }),
];
/// The honest guest's.
const HONEST: &str = "0000:09:00.0";
const CMDLINE: &str = "dev=0000:01:00.0 dev=0000:02:00.0 dev=0000:03:00.0 dev=0000:09:00.0";

/// Operations a run, and runs; a million all together.
const OPS: u64 = 130_000;
const SEEDS: u64 = 8;

/// xorshift64*, which a second vCPU shares.
#[derive(Clone)]
struct Random(Rc<Cell<u64>>);

impl Random {
    fn next(&self) -> u64 {
        let mut state = self.0.get();
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.0.set(state);
        state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn below(&self, end: u64) -> u64 {
        self.next() % end
    }
    fn one_in(&self, count: u64) -> bool {
        self.below(count) == 0
    }
    fn pick<T: Copy>(&self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// A number at one of the edges, or any.
    fn word(&self) -> u32 {
        match self.below(4) {
            0 => self.pick(&[
                0,
                1,
                2,
                4,
                6,
                7,
                0x7f,
                0x80,
                0xff,
                0x100,
                128,
                129,
                0xffff,
                0x7fff_ffff,
                0x8000_0000,
                u32::MAX,
            ]),
            1 => 1 << self.below(32),
            2 => self.below(256) as u32,
            _ => self.next() as u32,
        }
    }

    /// Anything, more often something that gets far.
    fn request(&self) -> RawRequest {
        let likely = |good: u32| if self.one_in(16) { self.word() } else { good };
        let cmd = if self.one_in(12) { self.word() } else { self.pick(&[0, 0, 1, 1, 1, 1, 2, 3, 4, 4, 5, 10]) };
        let offset = match self.below(4) {
            0 => self.pick(&[
                0, 4, 6, 0x0c, 0x0f, 0x10, 0x14, 0x18, 0x30, 0x34, 0x3c, 0x40, 0x44, 0x50, 0x52, 0x54, 0x58, 0x5c,
                0x70, 0x72,
            ]),
            1 => self.pick(&[
                0x74, 0x78, 0xa0, 0xa4, 0xa8, 0xaa, 0xc8, 0xe0, 0xe4, 0x100, 0x104, 0x108, 0x146, 0xffc, 0x1000, -4,
            ]),
            2 => self.below(0x100) as i32,
            _ => self.word().cast_signed(),
        };
        RawRequest {
            cmd,
            domain: likely(0),
            bus: likely(0),
            devfn: likely(self.below(4) as u32 * 8),
            offset,
            size: if self.one_in(12) { self.word().cast_signed() } else { self.pick(&[1, 2, 4]) },
            value: self.word(),
            info: self.word(),
        }
    }

    fn entries(&self) -> Vec<MsixEntry> {
        (0..self.below(9))
            .map(|number| MsixEntry {
                vector: self.next() as u16,
                entry: if self.one_in(4) { self.word() as u16 } else { number as u16 },
            })
            .collect()
    }
}

struct Game {
    rig: Rig,
    random: Random,
    prey: [Rc<Hardware>; 3],
    hostile: Guest,
    honest: Guest,
    /// How often a second vCPU may still set the flag in a row.
    again: Rc<Cell<u32>>,
    last_id: u16,
    /// How many hostile guests there were.
    guests: u64,
    /// The latest, told with a failure.
    story: RefCell<Vec<String>>,
    /// The registers of the hostile guest's functions as they were before any guest.
    before: BTreeMap<&'static str, Vec<u8>>,
    started: Nanos,
    /// Which of its functions were in use before this step.
    used: [bool; 3],
    /// Answers without an error, by operation: a game that gets nowhere shows nothing.
    done: BTreeMap<u32, u64>,
}

impl Game {
    fn new(seed: u64) -> Game {
        let world: Rc<World> = Rc::default();
        for (sbdf, card) in PREY {
            world.plug(sbdf, card.build());
        }
        world.plug(HONEST, Card::FULL.build());
        let mut rig = boot_in(world, CMDLINE);
        let mut honest = rig.attach(2, &[HONEST]);
        honest.connect(&mut rig);
        assert_eq!(honest.write(&mut rig, 0, 4, 2, 6), 0);
        let vectors = honest.enable_msix(&mut rig, &[0]).expect("a vector");
        honest.bind(vectors[0]);
        let before = PREY.map(|(sbdf, _)| (sbdf, rig.hardware(sbdf).bytes.borrow().clone())).into();
        let prey = PREY.map(|(sbdf, _)| rig.hardware(sbdf));
        let hostile = rig.attach(10, &PREY.map(|(sbdf, _)| sbdf));
        let random = Random(Rc::new(Cell::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)));
        let started = rig.world.now.get();
        rig.forget();
        let story = RefCell::default();
        Game {
            rig,
            random,
            prey,
            hostile,
            honest,
            again: Rc::default(),
            last_id: 10,
            guests: 1,
            story,
            before,
            started,
            used: [true; 3],
            done: BTreeMap::new(),
        }
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        let mut story = self.story.borrow_mut();
        if story.len() == 60 {
            story.remove(0);
        }
        story.push(what());
    }

    /// The guest is a PV guest with a page that it publishes.
    fn publish(&mut self) {
        let guest = &mut self.hostile;
        // It has one page and one port at a time, so that it is known where an answer must come.
        let id = guest.id;
        self.rig.world.pages.borrow_mut().retain(|(owner, _), _| *owner != id);
        self.rig.world.ports.borrow_mut().retain(|(owner, _)| *owner != id);
        guest.publish(&mut self.rig);
        guest.set_front("state", "4");
        let (random, again) = (self.random.clone(), self.again.clone());
        *guest.page.during.borrow_mut() = Some(Box::new({
            let random = random.clone();
            move |page| match random.below(8) {
                0 => page.request.set(random.request()),
                1 => page.flags.set(page.flags.get() ^ random.word()),
                2 => page.flags.set(page.flags.get() & !PCIF_ACTIVE),
                3 => *page.entries.borrow_mut() = random.entries(),
                _ => {}
            }
        }));
        *guest.page.after.borrow_mut() = Some(Box::new(move |page| {
            if again.get() > 0 {
                again.set(again.get() - 1);
                page.request.set(random.request());
                page.flags.set(page.flags.get() | PCIF_ACTIVE);
            }
        }));
    }

    fn connected(&self) -> bool {
        let port = self.rig.world.local.borrow().get(&(self.hostile.id, self.hostile.ring.1)).copied();
        port.is_some_and(|port| self.rig.backend.ports().any(|open| open == port))
    }

    fn ring(&self, guest: &Guest) {
        let port = self.rig.world.local.borrow().get(&(guest.id, guest.ring.1)).copied();
        if let Some(port) = port {
            self.rig.world.pending.borrow_mut().insert(port);
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..=78 => self.ask(),
            79 => self.error(),
            80..=83 => {
                let flags = self.random.word();
                self.hostile.page.flags.set(flags);
                self.tell(|| format!("flags {flags:#x}"));
                self.ring(&self.hostile);
            }
            84..=85 => {
                self.again.set(self.random.below(40) as u32);
                self.tell(|| "requests without a pause".to_string());
            }
            86..=90 => self.scribble(),
            91 => self.take_away(),
            92..=93 => self.connect(),
            94 => self.toolstack(),
            _ => {
                let time = self.random.below(if self.random.one_in(8) { 3_000 } else { 30 }) * MS;
                self.tell(|| format!("{} ms pass", time / MS));
                self.rig.pass(time);
            }
        }
    }

    /// A request, mostly one that it waits for.
    fn ask(&mut self) {
        if !self.connected() && self.random.one_in(4) {
            self.connect();
        }
        let request = self.random.request();
        self.tell(|| format!("{request:x?}"));
        let page = self.hostile.page.clone();
        *page.entries.borrow_mut() = self.random.entries();
        page.request.set(request);
        page.reply.set(None);
        let (reads, storm) = (page.request_reads.get(), self.again.get());
        page.flags.set(page.flags.get() | PCIF_ACTIVE);
        self.ring(&self.hostile);
        self.rig.deliver();
        let read = page.request_reads.get() - reads;
        assert!(read <= 1 + storm + 1, "one request is read once, not {read} times");
        if let Some(reply) = page.reply.get() {
            let known = [0, -1, -2, -3, -4, -5, -6, -12, -22, -28, -114];
            assert!(known.contains(&reply.err), "{reply:?}");
            if reply.err == 0 && storm == 0 {
                *self.done.entry(request.cmd).or_default() += 1;
            }
        }
        if page.flags.get() & PCIF_ACTIVE == 0 {
            return;
        }
        // It stands: nobody is connected to the page, or the function is on its way out of D3hot.
        self.rig.pass(1_100 * MS);
        let held = self.connected() && page.flags.get() & PCIF_ACTIVE != 0;
        assert!(!held, "a request without an answer");
    }

    /// dom0 reports an error of one of its functions, and it answers as it likes, or not at all.
    fn error(&mut self) {
        let (sbdf, severity) =
            (self.random.pick(&PREY).0, self.random.pick(&["nonfatal", "nonfatal", "fatal", "auto", "permanent"]));
        let severity = if self.random.one_in(4) { severity } else { "nonfatal" };
        self.tell(|| format!("{severity} error of {sbdf}"));
        let mut reads = self.hostile.page.aer_reads.get();
        self.rig.world.report_error(sbdf, severity);
        self.rig.deliver();
        for _ in 0..self.random.below(6) {
            let page = &self.hostile.page;
            assert!(page.aer_reads.get() <= reads + 1, "an answer is read once");
            reads = page.aer_reads.get();
            page.aer_err.set(if self.random.one_in(8) {
                self.random.word().cast_signed()
            } else {
                self.random.pick(&[2, 3, 5, 5])
            });
            if !self.random.one_in(8) {
                page.flags.set(page.flags.get() & !PCIB_ACTIVE);
            }
            self.ring(&self.hostile);
            self.rig.deliver();
        }
        if self.random.one_in(8) {
            self.rig.pass(301_000 * MS);
        }
    }

    fn scribble(&mut self) {
        let node =
            self.random.pick(&["state", "state", "state", "pci-op-ref", "event-channel", "magic", "backend", "x/y/z"]);
        let value = match self.random.below(6) {
            0 => String::new(),
            1 => self.random.word().to_string(),
            2 => "9".repeat(self.random.below(2_000) as usize),
            3 => format!("{}\u{0}\n../../{}", self.random.below(9), self.random.below(9)),
            _ => self.random.below(10).to_string(),
        };
        self.tell(|| format!("{node} = {:.40?}", value));
        for _ in 0..1 + if self.random.one_in(50) { self.random.below(100) } else { 0 } {
            self.hostile.set_front(node, &value);
        }
        self.rig.deliver();
    }

    fn take_away(&mut self) {
        self.tell(|| "page or port is taken away".to_string());
        let (id, ring) = (self.hostile.id, self.hostile.ring);
        if self.random.one_in(2) {
            self.rig.world.pages.borrow_mut().remove(&(id, ring.0));
        } else {
            self.rig.world.ports.borrow_mut().remove(&(id, ring.1));
        }
        self.rig.deliver();
    }

    /// It plays by the rules for once.
    fn connect(&mut self) {
        self.tell(|| "closes and connects".to_string());
        self.again.set(0);
        for state in ["6", "1"] {
            self.hostile.set_front("state", state);
            self.rig.pass(2_000 * MS);
        }
        self.hostile.set_front("magic", "7");
        self.publish();
        self.rig.pass(2_000 * MS);
        if self.random.one_in(2) {
            for devfn in [0, 8, 16] {
                // Its hook answers for it at times.
                self.hostile.post(RawRequest { cmd: 1, devfn, offset: 4, size: 2, value: 6, ..Default::default() });
                self.rig.pass(MS);
            }
        }
    }

    /// What dom0 does with it: it is destroyed, and a guest of the same kind gets the functions.
    fn toolstack(&mut self) {
        self.tell(|| "destroyed".to_string());
        self.again.set(0);
        *self.hostile.page.during.borrow_mut() = None;
        // Now and then Xen is done with it before its nodes are gone.
        let first = self.random.one_in(4);
        if first {
            self.hostile.die(Stage::Unlisted);
        }
        self.hostile.leave();
        self.rig.deliver();
        for (sbdf, _) in PREY.iter().filter(|(sbdf, _)| self.rig.state(sbdf) != "in-use") {
            let silent = self.rig.hardware(sbdf).word(at::COMMAND) & MASTER == 0;
            assert!(silent, "{sbdf}: a bus master that nobody has");
        }
        if !first && self.random.one_in(2) {
            self.rig.settle();
            self.hostile.die(Stage::Deassigned);
            self.rig.settle();
        }
        self.hostile.die(Stage::Freed);
        self.rig.pass(12_000 * MS);
        for (sbdf, _) in PREY {
            if self.rig.state(sbdf) == "broken" {
                let why = self.rig.reason(sbdf);
                panic!("{sbdf}: no guest can break a function for the next one: {why}");
            }
            self.check_clean(sbdf);
        }
        self.guests += 1;
        self.last_id += if self.last_id + 1 == DRIVER { 2 } else { 1 };
        self.hostile = self.rig.attach(self.last_id, &PREY.map(|(sbdf, _)| sbdf));
    }

    /// Between two guests a function is as it was before the first.
    fn check_clean(&self, sbdf: &str) {
        assert_eq!(self.rig.state(sbdf), "ready");
        let now = self.rig.hardware(sbdf).bytes.borrow().clone();
        let mut left = model::hardware::differences(&self.before[sbdf], &now);
        // Xen turns the pin on with the last vector of MSI that it frees, which for a domain that died before its
        // frontend was gone is later than this. After its reset the function has nothing to say there.
        left.retain(|difference| *difference != (5, 4, 0));
        // What is no register of a rule keeps what it had, and nothing could be written there.
        assert_eq!(left, [], "{sbdf}: what a guest has left");
        assert_eq!(self.rig.hardware(sbdf).word(at::COMMAND) & MASTER, 0, "{sbdf}: bus mastering");
    }

    /// Whether a guest has it; they stand in the order of the command line.
    fn in_use(&self, index: usize) -> bool {
        matches!(self.rig.backend.devices()[index].state, State::InUse(_))
    }

    /// Only what may be there was written into the hostile guest's functions since the last look.
    fn check_writes(&mut self) {
        for (index, ((sbdf, card), was_used)) in PREY.into_iter().zip(self.used).enumerate() {
            let hardware = self.prey[index].clone();
            let used = was_used || self.in_use(index);
            for (offset, value) in hardware.writes.borrow_mut().drain(..) {
                let dword = |at: u16| u32::from_le_bytes(self.before[sbdf][usize::from(at)..][..4].try_into().unwrap());
                let held = |at: u16| dword(at & !3) >> (8 * (at & 3));
                let fine = match offset {
                    // Memory and ports stay on (XSA-120), and nobody's function is a bus master. A hand-over writes them
                    // as off where a reset has turned them off, before the addresses; what counts is how it ends.
                    at::COMMAND => {
                        let off = value & 7 == 0;
                        value & !0x07ff == 0 && (value & 3 == 3 || off) && (used || value & u32::from(MASTER) == 0)
                    }
                    0x0c | 0x0d | 0x3c => value <= 0xff,
                    0x0f => value == 0x40,
                    0x10 => value == BAR0,
                    0x18 => value == 0xc041,
                    0x14 | 0x1c..=0x24 | 0x30 => value == dword(offset),
                    at::PMCSR if card.power.is_some() => value & 0x0100 == 0,
                    // Xen alone sets addresses, data and masks; of the controls only on, off and masked.
                    at::MSI_CONTROL if card.msi.is_some() => {
                        (value ^ held(offset)) & !u32::from(MSI_ENABLE | 0x70) & 0xffff == 0
                    }
                    at::MSIX_CONTROL if card.msix > 0 => (value ^ held(offset)) & 0x3fff == 0,
                    at::DEVICE_CONTROL => value & 0x7fff == held(offset) & 0x7fff,
                    _ if card.advanced && offset == at::ADVANCED + 4 => value == 1,
                    // The image's others: with the value from before any guest.
                    0xb0 | 0xc8 | 0xd0 if card.express.is_some() => value == held(offset) & 0xffff,
                    0x108..=0x157 if card.express.is_some() => {
                        value == held(offset) & 0xffff || value == dword(offset & !3)
                    }
                    _ => false,
                };
                assert!(fine, "{sbdf}: {value:#x} was written to {offset:#x}");
            }
            let asleep = self.rig.backend.devices()[index].due().is_some();
            assert!(asleep || hardware.word(at::COMMAND) & 3 == 3, "{sbdf}: it decodes nothing");
        }
        self.used = [0, 1, 2].map(|index| self.in_use(index));
        assert_eq!(*self.rig.hardware(HONEST).writes.borrow(), [], "the honest guest wrote nothing");
    }

    /// The honest guest has its function, its answers and its vector.
    fn check_honest(&mut self) {
        let (offset, size, value) =
            self.random.pick(&[(0, 4, 0x100e_8086), (0x10, 4, BAR0), (0x3c, 1, 21), (4, 2, 0x0006)]);
        self.honest.post(RawRequest { offset, size, ..Default::default() });
        if self.random.one_in(4) {
            self.again.set(40);
            self.hostile.page.flags.set(self.hostile.page.flags.get() | PCIF_ACTIVE);
            self.ring(&self.hostile);
        }
        let mut turns = 0;
        while self.honest.page.flags.get() & PCIF_ACTIVE != 0 {
            let before = self.hostile.page.request_reads.get();
            self.rig.serve();
            turns += 1;
            let read = self.hostile.page.request_reads.get() - before;
            assert!(read <= 8, "{read} requests of another guest come first");
            assert!(turns <= 4, "an honest request waits for {turns} turns");
        }
        let reply = self.honest.reply();
        assert_eq!((reply.err, reply.value & if offset == 4 { 0x0006 } else { u32::MAX }), (0, value), "{offset:#x}");
        assert!(self.rig.hardware(HONEST).delivers(0), "the honest guest's vector");
    }

    /// What can grow is bounded.
    fn check_bounds(&mut self) {
        let world = &self.rig.world;
        assert!(world.mapped.get() <= 2 && world.bound.get() <= 2, "two guests have a page and a port each");
        assert!(world.watches.borrow().len() <= OWN_WATCHES + 2, "{:?}", world.watches.borrow());
        assert!(world.events.borrow().len() <= 1_000);
        // Two frontends and four functions, whatever it asked for.
        assert!(world.xen.interrupts() <= 1 + 5 + 5 + 4, "{} vectors", world.xen.interrupts());
        let seconds = (world.now.get() - self.started) / (1_000 * MS) + 1;
        let lines = logs::count() as u64;
        // Ten in ten seconds of a guest's requests; an attachment and its end write a few for each function.
        let most = 20 + 2 * seconds + 60 * self.guests;
        assert!(lines <= most, "{lines} lines in {seconds} s with {} guests: {:#?}", self.guests, &heard()[..40]);
        let notified = world.notified.borrow_mut().drain(..).count();
        assert!(notified <= 40_000, "{notified} events");
        self.rig.check();
    }

    fn play(&mut self, ops: u64) {
        self.publish();
        for op in 0..ops {
            self.step();
            self.check_writes();
            if op % 8 == 0 {
                self.check_honest();
            }
            if op % 256 == 0 {
                self.check_bounds();
            }
            let keeps = self.hostile.page.flags.get() & !(PCIF_ACTIVE | PCIB_ACTIVE);
            // The other bits are the guest's to scribble, and nobody's to clear.
            self.hostile.page.flags.set(keeps);
        }
        self.toolstack();
        self.check_bounds();
        for cmd in
            [op::CONF_READ, op::CONF_WRITE, op::ENABLE_MSI, op::DISABLE_MSI, op::ENABLE_MSIX, op::ENABLE_MULTI_MSI]
        {
            let done = self.done.get(&cmd).copied().unwrap_or_default();
            assert!(done >= ops / 5_000, "operation {cmd} succeeded {done} times only: {:?}", self.done);
        }
    }
}

fn play(seed: u64, ops: u64) {
    listen();
    let mut game = Game::new(seed);
    let outcome = catch_unwind(AssertUnwindSafe(|| game.play(ops)));
    if let Err(panic) = outcome {
        println!("PCIBACK_FUZZ_SEED={seed}; what came last:\n{}", game.story.take().join("\n"));
        // What is broken is not taken apart.
        std::mem::forget(game);
        resume_unwind(panic);
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn a_million_operations_of_a_hostile_guest_harm_nobody() {
    // With dom0's writes each costs a multiple.
    let ops = number("PCIBACK_FUZZ_OPS").unwrap_or(if model::delegated() { OPS / 8 } else { OPS });
    let seeds = match number("PCIBACK_FUZZ_SEED") {
        Some(seed) => seed..seed + number("PCIBACK_FUZZ_RUNS").unwrap_or(1),
        None => 0..SEEDS,
    };
    for seed in seeds {
        play(seed, ops);
        println!("seed {seed}: {ops} operations, all well");
    }
}
