//! XSA-157 to the end: every sequence of operations on interrupts up to a length of five, on every kind of card, with
//! the rules that hold after each operation.
// Case 20, CVE-2015-8551 and CVE-2015-8552: operations in an order nobody expected crashed the backend's domain.

use crate::model;

use model::hardware::{ENABLE, INTX_DISABLE, MASKALL, MS, MSI_ENABLE, at};
use model::logs::{heard, listen};
use model::xen::Call;
use model::xen::errno::{EINVAL, ENOSPC};
use model::{Card, Guest, NIC, Rig, boot_with};
use pciback::physdev::Pirq;
use pciback::sbdf::Sbdf;
use pciback::wire::op;

const LENGTH: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    EnableMsi,
    DisableMsi,
    EnableMsix,
    DisableMsix,
    EnableMultiMsi,
}

const OPS: [Op; 5] = [Op::EnableMsi, Op::DisableMsi, Op::EnableMsix, Op::DisableMsix, Op::EnableMultiMsi];

/// What is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Nothing,
    Msi(u8),
    Msix,
}

/// Under what a sequence runs.
#[derive(Clone, Copy)]
struct Setting {
    card: Card,
    /// Memory decode is on in the card.
    decodes: bool,
    /// This map_pirq of the sequence fails, with this errno.
    failing: Option<(u64, i32)>,
}

/// What has to be: the whole rule book in few lines.
struct Oracle {
    setting: Setting,
    on: On,
    maps: u64,
}

impl Oracle {
    /// Vectors that a request maps, or its errno.
    fn map(&mut self, vectors: u64) -> Result<(), i32> {
        let failing = self.setting.failing.filter(|(at, _)| (self.maps..self.maps + vectors).contains(at));
        self.maps += failing.map_or(vectors, |(at, _)| at + 1 - self.maps);
        failing.map_or(Ok(()), |(_, errno)| Err(errno))
    }

    /// What `op.err` has to be.
    fn expect(&mut self, op: Op) -> i32 {
        let Setting { card, decodes, .. } = self.setting;
        match (op, self.on) {
            (Op::DisableMsi | Op::DisableMsix, _) => {
                self.on = On::Nothing;
                0
            }
            (Op::EnableMsix, _) if card.msix == 0 => -4,
            (Op::EnableMsix, On::Msix) => -114,
            (Op::EnableMsix, On::Msi(_)) => -6,
            (Op::EnableMsix, On::Nothing) if !decodes => -6,
            (Op::EnableMsix, On::Nothing) => match self.map(2) {
                Ok(()) => {
                    self.on = On::Msix;
                    0
                }
                Err(ENOSPC) => -28,
                Err(_) => -5,
            },
            (Op::EnableMsi | Op::EnableMultiMsi, on) => {
                let count = if op == Op::EnableMsi { 1 } else { 2 };
                match card.msi {
                    None => -4,
                    Some(msi) if on != On::Nothing || msi.vectors < count => -5,
                    Some(_) if self.map(1).is_err() => -5,
                    Some(_) => {
                        self.on = On::Msi(count);
                        0
                    }
                }
            }
        }
    }
}

/// Carries out one operation as a driver does: with a success it binds what it got.
fn carry_out(rig: &mut Rig, guest: &Guest, op: Op) -> i32 {
    guest.put_entries(&[0, 1]);
    let cmd = match op {
        Op::EnableMsi => op::ENABLE_MSI,
        Op::DisableMsi => op::DISABLE_MSI,
        Op::EnableMsix => op::ENABLE_MSIX,
        Op::DisableMsix => op::DISABLE_MSIX,
        Op::EnableMultiMsi => op::ENABLE_MULTI_MSI,
    };
    let start = rig.world.now.get();
    let reply = guest.operate(rig, cmd, 0, 2);
    assert!(rig.world.now.get() - start <= 2_000 * MS, "{op:?}: later than the client waits");
    if reply.err == 0 {
        let first = reply.value.cast_signed();
        let vectors: Vec<Pirq> = match op {
            Op::EnableMsi => vec![first],
            Op::EnableMultiMsi => vec![first, first + 1],
            Op::EnableMsix => guest.vectors(),
            Op::DisableMsi | Op::DisableMsix => vec![],
        };
        vectors.iter().for_each(|pirq| guest.bind(*pirq));
    }
    reply.err
}

/// What holds after every operation.
fn check(rig: &mut Rig, guest: &Guest, on: On) {
    rig.check();
    let card = rig.hardware(NIC);
    let sbdf: Sbdf = NIC.parse().unwrap();
    let (msix, msi, command) = (card.word(at::MSIX_CONTROL), card.word(at::MSI_CONTROL), card.word(at::COMMAND));
    let msix_on = card.capability(0x11).is_some() && msix & ENABLE != 0;
    let msi_on = card.capability(0x05).is_some() && msi & MSI_ENABLE != 0;
    assert_eq!((msix_on, msi_on), (on == On::Msix, matches!(on, On::Msi(_))), "what is on in the card");
    if card.capability(0x11).is_some() {
        assert_eq!(msix & MASKALL, 0, "nothing keeps its vectors masked");
    }
    let mapped = rig.world.xen.mapped(sbdf);
    let vectors = match on {
        On::Nothing => 0,
        On::Msi(count) => count.into(),
        On::Msix => 2,
    };
    assert_eq!(mapped.len(), vectors, "what is mapped");
    for (entry, held) in card.table.borrow().iter().enumerate() {
        let is_mapped = msix_on && mapped.iter().any(|(_, _, number)| usize::from(*number) == entry);
        assert!(held.masked || is_mapped, "entry {entry} can fire and is nobody's");
        assert_eq!(card.delivers(entry as u16), is_mapped, "entry {entry}");
    }
    if let On::Msi(count) = on {
        assert!((0..count).all(|vector| card.delivers_msi(vector)), "MSI arrives");
    }
    assert_eq!(command & INTX_DISABLE != 0, on != On::Nothing, "the pin is off while messages are on");
    for (register, held) in [(at::MSIX_CONTROL, msix), (at::MSI_CONTROL, msi)] {
        assert_eq!(guest.read(rig, 0, register.into(), 2), Ok(held.into()), "the guest sees the card's bits");
    }
}

/// The sequence with this number.
fn sequence(number: u32) -> [Op; LENGTH as usize] {
    let mut rest = number;
    [(); LENGTH as usize].map(|()| {
        let op = OPS[rest as usize % OPS.len()];
        rest /= OPS.len() as u32;
        op
    })
}

/// Sequences after which the guest is destroyed with all it has on, and another comes: each 16th. After the others it
/// turns off what is on, which must leave nothing either.
const DESTROYED: u32 = 16;

/// A guest whose driver has turned the card on, as the setting wants it.
fn started(rig: &mut Rig, id: u16, setting: Setting) -> Guest {
    let mut guest = rig.attach(id, &[NIC]);
    guest.connect(rig);
    guest.enable(rig);
    if !setting.decodes {
        rig.hardware(NIC).set_word(at::COMMAND, 0x0004);
    }
    guest
}

/// All sequences; those that are shorter are the beginnings of these.
fn all_sequences(setting: Setting) {
    let mut rig = boot_with(setting.card);
    rig.world.xen.cost.set(5 * MS);
    let mut guest = started(&mut rig, 1, setting);
    let pristine = rig.hardware(NIC).word(at::COMMAND);
    for number in 0..(OPS.len() as u32).pow(LENGTH) {
        let sequence = sequence(number);
        if let Some((at, errno)) = setting.failing {
            rig.world.xen.heal();
            rig.world.xen.fail(Call::Map, at..at + 1, errno);
        }
        let mut oracle = Oracle { setting, on: On::Nothing, maps: 0 };
        for (place, op) in sequence.into_iter().enumerate() {
            let expected = oracle.expect(op);
            let err = carry_out(&mut rig, &guest, op);
            assert_eq!(err, expected, "{sequence:?} at {place}");
            check(&mut rig, &guest, oracle.on);
        }
        if number % DESTROYED == 0 {
            guest.destroy(&mut rig);
            assert_eq!((rig.state(NIC).as_str(), rig.world.xen.interrupts()), ("ready", 0), "{sequence:?}");
            guest = started(&mut rig, 2 + (number / DESTROYED) as u16, setting);
        } else {
            guest.disable_msi(&mut rig);
            check(&mut rig, &guest, On::Nothing);
        }
        let (now, left) = (rig.hardware(NIC).word(at::COMMAND), rig.world.xen.interrupts());
        assert_eq!((now, left), (pristine, 0), "{sequence:?}");
        rig.world.xen.pirqs(guest.id).into_iter().for_each(|pirq| guest.close(pirq));
        assert_eq!(rig.world.xen.pirqs(guest.id), [], "{sequence:?}");
        rig.forget();
    }
    assert_eq!(rig.hardware(NIC).unanswered.get(), 0);
}

const GOOD: Setting = Setting { card: Card::BOTH, decodes: true, failing: None };

#[test]
fn every_sequence_on_a_card_with_both_kinds() {
    all_sequences(GOOD);
}

#[test]
fn every_sequence_on_a_card_with_msix_only() {
    all_sequences(Setting { card: Card::PLAIN, ..GOOD });
}

#[test]
fn every_sequence_on_a_card_with_msi_only() {
    all_sequences(Setting { card: Card::MSI_ONLY, ..GOOD });
}

#[test]
fn every_sequence_on_a_card_with_a_single_msi_vector_without_mask() {
    all_sequences(Setting { card: Card::MSI_SIMPLE, ..GOOD });
}

#[test]
fn every_sequence_on_a_card_with_a_pin_only() {
    all_sequences(Setting { card: Card::BARE, ..GOOD });
}

#[test]
fn every_sequence_with_memory_decode_off() {
    all_sequences(Setting { decodes: false, ..GOOD });
}

#[test]
fn every_sequence_with_the_first_map_failing() {
    all_sequences(Setting { failing: Some((0, EINVAL)), ..GOOD });
}

#[test]
fn every_sequence_with_the_second_map_failing() {
    all_sequences(Setting { failing: Some((1, ENOSPC)), ..GOOD });
}

#[test]
fn every_sequence_with_the_fourth_map_failing() {
    all_sequences(Setting { failing: Some((3, EINVAL)), ..GOOD });
}

/// However long a guest goes on, the log gets ten lines in ten seconds.
#[test]
fn no_sequence_fills_the_log() {
    for (card, decodes) in [(Card::BOTH, true), (Card::BOTH, false), (Card::PLAIN, true), (Card::BARE, true)] {
        let mut rig = boot_with(card);
        let mut guest = rig.attach(1, &[NIC]);
        guest.connect(&mut rig);
        if !decodes {
            rig.hardware(NIC).set_word(at::COMMAND, 0x0004);
        }
        listen();
        for number in 0..300 {
            for op in sequence(number * 10) {
                carry_out(&mut rig, &guest, op);
            }
        }
        assert!(heard().len() <= 10, "{card:?}: {:#?}", heard());
        rig.pass(10_000 * MS);
        carry_out(&mut rig, &guest, Op::DisableMsi);
        let _ = guest.enable_msix(&mut rig, &[]);
        let counted = heard().iter().any(|line| line.contains("suppressed"));
        assert!(counted && heard().len() <= 12, "{card:?}: {:#?}", heard());
    }
}
