//! Everything at once, at random and repeatable: guests that come, work, break off and die in stages, a toolstack that
//! hot-plugs, a host that meddles, a Xen that fails for a while, and a driver domain that is started again. What holds
//! is checked after every step, and in the end everything can be had again.
// Also case 50 of the reports: a device that is missing from the list of free ones after its guest ended.

use crate::model;

use model::hardware::{ENABLE, MS, MSI_ENABLE, Silence, at};
use model::xen::errno::*;
use model::xen::{Call, Stage};
use model::{Card, Guest, Rig, World, boot_in};
use pciback::platform::Nanos;
use pciback::sbdf::Sbdf;
use pciback::wire::{RawReply, RawRequest, op};

const CARDS: [(&str, Card); 5] = [
    ("0000:01:00.0", Card::FULL),
    ("0000:02:00.0", Card::PLAIN),
    ("0000:03:00.0", Card { advanced: true, ..Card::BOTH }),
    ("0000:04:00.0", Card { power: Some(false), ..Card::BOTH }),
    ("0000:05:00.0", Card::MSI_ONLY),
];

const STEPS: u32 = 400;
const SEEDS: u64 = 80;

fn sbdf(index: usize) -> Sbdf {
    CARDS[index].0.parse().unwrap()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// A guest and what the toolstack knows of it.
struct Player {
    guest: Guest,
    stage: Stage,
    /// Its folder is gone.
    left: bool,
    /// A driver domain that it was with is gone.
    orphan: bool,
}

struct Game {
    rig: Option<Rig>,
    random: Random,
    players: Vec<Player>,
    last_id: u16,
    /// Told with a failure.
    story: Vec<String>,
}

impl Game {
    fn new(seed: u64) -> Game {
        let world: std::rc::Rc<World> = Default::default();
        for (sbdf, card) in CARDS {
            world.plug(sbdf, card.build());
        }
        world.xen.cost.set(MS);
        let rig = Some(boot_in(world, &Game::cmdline()));
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Game { rig, random, players: Vec::new(), last_id: 0, story: Vec::new() }
    }

    fn cmdline() -> String {
        CARDS.map(|(sbdf, _)| format!("dev={sbdf} ")).concat()
    }

    fn rig(&mut self) -> &mut Rig {
        self.rig.as_mut().expect("a running driver domain")
    }

    fn tell(&mut self, what: String) {
        let now = self.rig().world.now.get() / MS;
        self.story.push(format!("{now} ms: {what}"));
    }

    fn state(&mut self, index: usize) -> String {
        self.rig().state(CARDS[index].0)
    }

    /// A player whose guest runs and whose frontend is connected.
    fn active(&mut self) -> Option<usize> {
        let ports: Vec<_> = self.rig().backend.ports().collect();
        let connected = |player: &Player| {
            let guest = &player.guest;
            let port = guest.world.local.borrow().get(&(guest.id, guest.ring.1)).copied();
            !player.orphan
                && !player.left
                && player.stage == Stage::Alive
                && port.is_some_and(|port| ports.contains(&port))
        };
        let all: Vec<usize> = (0..self.players.len()).filter(|index| connected(&self.players[*index])).collect();
        (!all.is_empty()).then(|| self.random.pick(&all))
    }

    /// The address of one of the functions a guest was told of, or sometimes none.
    fn devfn(&mut self, player: usize) -> u32 {
        let told = |index: usize| self.players[player].guest.back(&format!("vdev-{index}"));
        let slot = |text: String| u32::from_str_radix(&text[8..10], 16).unwrap() << 3;
        let mut all: Vec<u32> = (0..3).filter_map(|index| told(index).map(slot)).collect();
        if all.is_empty() || self.random.below(10) == 0 {
            all.push(0x10);
        }
        self.random.pick(&all)
    }

    fn ask(&mut self, player: usize, request: RawRequest) -> RawReply {
        let start = self.rig().world.now.get();
        self.players[player].guest.post(request);
        self.rig().deliver();
        let took = self.rig().world.now.get() - start;
        assert!(took < 2_000 * MS, "answered after {} ms", took / MS);
        let reply = self.players[player].guest.reply();
        assert!([0, -1, -2, -3, -4, -5, -6, -12, -22, -28, -114].contains(&reply.err), "{request:?}: {reply:?}");
        reply
    }

    fn step(&mut self) {
        match self.random.below(36) {
            0..=4 => self.attach(),
            5..=14 => self.operate(),
            15..=18 => self.write(),
            19..=20 => self.interrupts(),
            21..=22 => self.frontend(),
            23..=27 => self.end(),
            28 => self.unplug(),
            29 if self.random.below(2) == 0 => self.meddle(),
            30 if self.random.below(2) == 0 => self.fail(),
            31..=32 => self.retry(),
            33 if self.random.below(6) == 0 => self.restart(),
            _ => {
                let time = self.random.below(200) * MS;
                self.tell(format!("{} ms pass", time / MS));
                self.rig().pass(time);
            }
        }
        self.rig().deliver();
        self.check();
    }

    /// The toolstack attaches a new guest to functions, mostly to ready ones.
    fn attach(&mut self) {
        if self.players.len() > 6 {
            return;
        }
        let mut wanted: Vec<usize> = (0..CARDS.len()).filter(|index| self.state(*index) == "ready").collect();
        wanted.retain(|index| self.rig().world.hardware.borrow()[&sbdf(*index)].silence(0).is_none());
        wanted.truncate(1 + self.random.below(2) as usize);
        if self.random.below(10) == 0 {
            wanted.push(self.random.below(CARDS.len() as u64) as usize);
        }
        wanted.dedup();
        if wanted.is_empty() {
            return;
        }
        self.last_id += 1;
        let id = self.last_id;
        self.tell(format!("guest {id} gets {wanted:?}"));
        let names: Vec<&str> = wanted.iter().map(|index| CARDS[*index].0).collect();
        let mut guest = self.rig().attach(id, &names);
        guest.publish(self.rig.as_mut().expect("a running driver domain"));
        guest.set_front("state", "4");
        self.rig().deliver();
        self.players.push(Player { guest, stage: Stage::Alive, left: false, orphan: false });
        if let Some(player) = self.active() {
            let devfn = self.devfn(player);
            self.ask(
                player,
                RawRequest { cmd: op::CONF_WRITE, devfn, offset: 4, size: 2, value: 6, ..Default::default() },
            );
        }
    }

    fn operate(&mut self) {
        let Some(player) = self.active() else { return };
        let cmd = self.random.pick(&[
            op::ENABLE_MSI,
            op::DISABLE_MSI,
            op::ENABLE_MSIX,
            op::ENABLE_MSIX,
            op::ENABLE_MSIX,
            op::DISABLE_MSIX,
            op::ENABLE_MULTI_MSI,
            op::ENABLE_MULTI_MSI,
            99,
        ]);
        let count = self.random.pick(&[0, 1, 1, 2, 2, 3, 4, 5, 6]);
        let entries: Vec<u16> = (0..count).map(|entry| (entry as u16 + self.random.below(2) as u16) % 6).collect();
        let devfn = self.devfn(player);
        let id = self.players[player].guest.id;
        self.tell(format!("guest {id} asks for operation {cmd} of {devfn:#x} with {count}"));
        self.players[player].guest.put_entries(&entries);
        let reply = self.ask(player, RawRequest { cmd, devfn, value: count, info: count, ..Default::default() });
        if reply.err == 0 {
            let first = reply.value.cast_signed();
            let pirqs = match cmd {
                op::ENABLE_MSI => vec![first],
                op::ENABLE_MULTI_MSI => (first..first + count.cast_signed()).collect(),
                op::ENABLE_MSIX => self.players[player].guest.vectors(),
                _ => return,
            };
            for pirq in pirqs.into_iter().filter(|_| self.random.below(4) != 0) {
                self.players[player].guest.bind(pirq);
            }
        }
    }

    /// Any write, often to a register that matters.
    fn write(&mut self) {
        let Some(player) = self.active() else { return };
        let matters = [at::COMMAND, at::PMCSR, at::MSIX_CONTROL, at::MSI_CONTROL, at::DEVICE_CONTROL, 0x10, 0x0c];
        let size = self.random.pick(&[1, 2, 4]);
        let offset = match self.random.below(2) {
            0 => self.random.pick(&matters).into(),
            _ => self.random.below(0x200) as i32 & !(size - 1),
        };
        let value = self.random.pick(&[0, 3, 6, 7, 0xc004, 0x8004, 0x8001, u32::MAX]);
        let devfn = self.devfn(player);
        let id = self.players[player].guest.id;
        self.tell(format!("guest {id} writes {value:#x} to {offset:#x} of {devfn:#x}"));
        self.ask(player, RawRequest { cmd: op::CONF_WRITE, devfn, offset, size, value, ..Default::default() });
    }

    /// A guest binds, masks and closes what it has.
    fn interrupts(&mut self) {
        let Some(player) = self.active() else { return };
        let (world, id) = (self.rig().world.clone(), self.players[player].guest.id);
        for pirq in world.xen.pirqs(id) {
            match self.random.below(4) {
                0 => drop(world.xen.bind(id, pirq)),
                1 => world.xen.close(id, pirq),
                2 => world.xen.mask(id, pirq, self.random.below(2) == 0),
                _ => {}
            }
        }
    }

    /// A frontend closes, opens again, or writes nonsense.
    fn frontend(&mut self) {
        let Some(player) = self.active() else { return };
        let state = self.random.pick(&["5", "6", "3", "1", "9"]);
        let guest = &mut self.players[player].guest;
        let id = guest.id;
        if state == "3" {
            guest.publish(self.rig.as_mut().expect("a running driver domain"));
        } else {
            guest.set_front("state", state);
        }
        self.tell(format!("frontend {id} goes to {state}"));
        self.rig().deliver();
        if self.random.below(2) == 0 {
            self.rig().pass(200 * MS);
            let rig = self.rig.as_mut().expect("a running driver domain");
            let guest = &mut self.players[player].guest;
            guest.publish(rig);
            guest.set_front("state", "4");
            rig.deliver();
        }
    }

    /// A guest's end goes on: its folder goes, or Xen gets a stage further.
    fn end(&mut self) {
        if self.players.is_empty() {
            return;
        }
        let index = self.random.below(self.players.len() as u64) as usize;
        let player = &mut self.players[index];
        let id = player.guest.id;
        if !player.left && self.random.below(2) == 0 {
            player.left = true;
            player.guest.leave();
            self.tell(format!("the folder of guest {id} goes"));
        } else {
            let next = match player.stage {
                Stage::Alive => Stage::Dying,
                Stage::Dying => Stage::ChannelsClosed,
                Stage::ChannelsClosed => Stage::Deassigned,
                Stage::Deassigned => Stage::Unlisted,
                Stage::Unlisted | Stage::Freed => Stage::Freed,
            };
            player.stage = self.random.pick(&[next, next, Stage::Freed]);
            player.guest.die(player.stage);
            let stage = player.stage;
            self.tell(format!("guest {id} is {stage:?}"));
        }
        self.rig().deliver();
        self.players.retain(|player| !player.left || player.stage != Stage::Freed);
    }

    /// The toolstack takes the first function of a guest.
    fn unplug(&mut self) {
        let Some(player) = self.active() else { return };
        let guest = &self.players[player].guest;
        let id = guest.id;
        guest.set_back("state-0", "5");
        guest.set_back("state", "7");
        self.tell(format!("guest {id} is to give its first function back"));
        self.rig().deliver();
        for state in ["7", "4"] {
            self.players[player].guest.set_front("state", state);
            self.rig().deliver();
        }
    }

    /// Somebody on the host does something to a function.
    fn meddle(&mut self) {
        let index = self.random.below(CARDS.len() as u64) as usize;
        let card = self.rig().hardware(CARDS[index].0);
        let what = self.random.below(7);
        self.tell(format!("the host does {what} to {index}"));
        match what {
            0 => card.set_word(at::COMMAND, 0),
            1 => card.set_word(at::COMMAND, 0x0403),
            2 => card.vanish(),
            3..=4 => card.come_back(),
            5 => card.recovery.set((self.random.below(2_000) * MS, self.random.pick(&[Silence::Ones, Silence::Retry]))),
            _ => card.pending.set(card.pending.get().max(self.rig().world.now.get() + self.random.below(1_000) * MS)),
        }
    }

    /// Xen fails for a while.
    fn fail(&mut self) {
        let (call, errno) = self.random.pick(&[
            (Call::Map, ENOSPC),
            (Call::Map, EINVAL),
            (Call::Map, ENOMEM),
            (Call::Unmap, EBUSY),
            (Call::Release, EBUSY),
            (Call::Prepare, ENOMEM),
        ]);
        let time: Nanos = self.random.below(500) * MS;
        self.tell(format!("{call:?} answers -{errno} for {} ms", time / MS));
        self.rig().world.xen.fail_for(call, time, errno);
    }

    fn retry(&mut self) {
        let broken: Vec<usize> = (0..CARDS.len()).filter(|index| self.state(*index) == "broken").collect();
        if broken.is_empty() {
            return;
        }
        let index = self.random.pick(&broken);
        self.tell(format!("dom0 asks for {index} to be tried again"));
        self.rig().world.retry(CARDS[index].0);
    }

    /// The driver domain ends, with or without a word, and is started again. Its guests live on without it.
    fn restart(&mut self) {
        let world = self.rig().world.clone();
        // MSI that is mapped and was turned off by a reset of the guest's own doing: nobody can tell any more.
        let lost = |name: &str| {
            let hardware = world.hardware.borrow()[&name.parse().unwrap()].clone();
            let off = hardware.capability(5).is_some() && hardware.word(at::MSI_CONTROL) & MSI_ENABLE == 0;
            off && hardware.word(at::MSIX_CONTROL) & ENABLE == 0 && !world.xen.mapped(name.parse().unwrap()).is_empty()
        };
        if CARDS.iter().any(|(name, _)| lost(name)) {
            return;
        }
        let orderly = self.random.below(2) == 0;
        self.tell(format!("the driver domain is started again, orderly {orderly}"));
        let mut rig = self.rig.take().expect("a running driver domain");
        if orderly {
            // A refusal now would be the same: MSI that is mapped and off.
            rig.world.xen.heal();
            rig.backend.shutdown();
        }
        rig.world.remove("backend");
        self.players.iter_mut().for_each(|player| player.orphan = true);
        self.rig = Some(rig.crash_and_boot(&Game::cmdline()));
    }

    /// What holds at any time.
    fn check(&mut self) {
        self.rig().check();
        for (name, card) in CARDS {
            let (state, reason) = (self.rig().state(name), self.rig().published(name, "reason"));
            assert!(["resetting", "ready", "in-use", "broken"].contains(&state.as_str()), "{name} is {state:?}");
            assert_eq!(reason.is_some(), state == "broken", "{name} is {state}: {reason:?}");
            let hardware = self.rig().hardware(name);
            if card.msi.is_some() && card.msix > 0 {
                let msix = hardware.word(at::MSIX_CONTROL) & ENABLE != 0;
                assert!(!msix || hardware.word(at::MSI_CONTROL) & MSI_ENABLE == 0, "{name}: both kinds are on");
            }
            if state == "in-use" {
                let id = self.rig().published(name, "frontend").expect("a guest");
                let here = |player: &Player| player.guest.id.to_string() == id && !player.left && !player.orphan;
                assert!(self.players.iter().any(here), "{name} is in use by guest {id}, which is gone");
            }
        }
        assert_eq!(self.rig().backend.ports().count() as i32, self.rig().world.bound.get());
        if self.rig().world.xen.done.borrow().len() > 10_000 {
            self.rig().forget();
        }
    }

    /// All guests end, the host is well, dom0 has broken functions tried again: everything can be had, and works.
    fn finish(&mut self) {
        self.tell("the end".into());
        let world = self.rig().world.clone();
        world.xen.heal();
        for hardware in world.hardware.borrow().values() {
            hardware.come_back();
            hardware.recovery.set((100 * MS, Silence::Ones));
        }
        for player in std::mem::take(&mut self.players) {
            player.guest.leave();
            player.guest.die(Stage::Freed);
        }
        self.rig().settle();
        // What did not answer, or Xen failed on, while the driver domain started, only another start takes over.
        let start = ["no device answers", "its header is of type", "to physdev calls for it"];
        let unseized = |why: String| start.iter().any(|told| why.contains(told));
        if CARDS.iter().any(|(name, _)| world.published(name.parse().unwrap(), "reason").is_some_and(unseized)) {
            let rig = self.rig.take().expect("a running driver domain");
            self.rig = Some(rig.crash_and_boot(&Game::cmdline()));
        }
        for (name, _) in CARDS {
            if self.rig().state(name) == "broken" {
                // Lost in a reset that no driver domain saw the end of; as Linux writes them again.
                let hardware = self.rig().hardware(name);
                if hardware.word(0x12) == 0 || hardware.word(at::COMMAND) & 3 != 3 {
                    hardware.set_word(0x12, 0xfebc);
                    hardware.set_word(0x18, 0xc041);
                    hardware.set_word(at::COMMAND, 0x0403);
                }
                // Left on by a card that was gone when Xen took its vector.
                if world.published(name.parse().unwrap(), "reason").is_some_and(|why| why.contains("its MSI is on")) {
                    hardware.set_word(at::MSI_CONTROL, hardware.word(at::MSI_CONTROL) & !MSI_ENABLE);
                }
                world.retry(name);
                self.rig().settle();
            }
            assert_eq!(self.rig().state(name), "ready", "{name}: {:?}", self.rig().published(name, "reason"));
        }
        assert_eq!(world.xen.interrupts(), 0, "no vector is left");
        assert_eq!((world.mapped.get(), world.bound.get()), (0, 0), "no page and no port");
        for (index, (name, card)) in CARDS.into_iter().enumerate() {
            let mut guest = self.rig().attach(5_000 + index as u16, &[name]);
            let rig = self.rig.as_mut().expect("a running driver domain");
            guest.connect(rig);
            guest.enable(rig);
            let hardware = rig.hardware(name);
            if card.msix > 0 {
                let vectors = guest.enable_msix(rig, &[0, 1]).expect("two vectors");
                vectors.iter().for_each(|pirq| guest.bind(*pirq));
                assert!(hardware.delivers(0) && hardware.delivers(1), "{name}");
            } else {
                guest.bind(guest.enable_msi(rig).expect("a vector"));
                assert!(hardware.delivers_msi(0), "{name}");
            }
        }
    }
}

/// Tells a game's story when it ends badly.
impl Drop for Game {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let from = self.story.len().saturating_sub(60);
            println!("{}", self.story[from..].join("\n"));
        }
    }
}

fn play(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut game = Game::new(seed);
        game.tell(format!("seed {seed}"));
        for step in 0..STEPS {
            if step % 50 == 0 {
                game.tell(format!("seed {seed}, step {step}"));
            }
            game.step();
        }
        game.finish();
    }
}

/// Two halves, for two processors.
#[test]
fn a_long_life_ends_well() {
    play(0..SEEDS / 2);
}

#[test]
fn another_long_life_ends_well() {
    play(SEEDS / 2..SEEDS);
}
