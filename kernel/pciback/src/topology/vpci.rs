//! The `vpci` topology: one bus, 0000:00, with 32 slots, as the guest sees it (Linux, `vpci.c`).
//!
//! Functions of one physical device share a slot and keep their function numbers. A function whose
//! device has no function 0 in the guest would sit in a slot that ordinary bus scans skip (PCI 3.0,
//! 6.2.1: function 0 must exist), and consumers of `vdev-N` would look in vain; it becomes function 0.
//!
//! A virtual function is a device of its own, whatever its number: that only says where its PF put it. It gets a slot
//! for itself as function 0. Only when no slot is left do virtual functions share slots, among themselves.

use super::{Entry, FUNCTIONS, Root, Wish, same_slot};
use crate::sbdf::Sbdf;

/// The one bus.
pub(super) const ROOT: Root = (0, 0);

/// Slots of the bus.
const SLOTS: u8 = 32;

/// Where a function goes; `None` if the bus is full.
pub(super) fn place(entries: &[Entry], sbdf: Sbdf, wish: Wish) -> Option<Sbdf> {
    let of_slot = |slot: u8| entries.iter().filter(move |entry| entry.place.device() == slot);
    let free = |place: &Sbdf| entries.iter().all(|entry| entry.place != *place);
    let siblings = |entry: &&Entry| !entry.is_virtual && !wish.is_virtual && same_slot(entry.sbdf, sbdf);
    if let Some(sibling) = entries.iter().find(siblings) {
        let slot = sibling.place.device();
        return core::iter::once(sbdf.function()).chain(0..FUNCTIONS).map(|function| at(slot, function)).find(free);
    }
    if let Some(slot) = wish.slot.into_iter().chain(0..SLOTS).find(|slot| of_slot(*slot).next().is_none()) {
        let keeps = wish.function_0_follows && !wish.is_virtual;
        return Some(at(slot, if keeps { sbdf.function() } else { 0 }));
    }
    let shared = (0..SLOTS).filter(|slot| wish.is_virtual && of_slot(*slot).all(|entry| entry.is_virtual));
    shared.flat_map(|slot| (0..FUNCTIONS).map(move |function| at(slot, function))).find(free)
}

fn at(slot: u8, function: u8) -> Sbdf {
    Sbdf::new(ROOT.0, ROOT.1, slot << 3 | function)
}

#[cfg(test)]
mod tests {
    use super::super::{BusFull, Kind, Topology, sbdf};
    use super::*;

    const SHARED: Wish = Wish { slot: None, function_0_follows: true, is_virtual: false };
    const ALONE: Wish = Wish { slot: None, function_0_follows: false, is_virtual: false };
    const VIRTUAL: Wish = Wish { slot: None, function_0_follows: false, is_virtual: true };

    fn bus() -> Topology {
        Topology::new(Kind::Vpci)
    }

    fn add(bus: &mut Topology, device: usize, text: &str, wish: Wish) -> Result<u8, BusFull> {
        let place = bus.add(device, sbdf(text), wish)?;
        assert_eq!((place.segment(), place.bus()), ROOT);
        Ok(place.devfn())
    }

    #[test]
    fn functions_of_one_device_share_a_slot_and_keep_their_numbers() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 0, "01:00.0", SHARED), Ok(0x00));
        assert_eq!(add(&mut bus, 1, "02:00.0", SHARED), Ok(0x08));
        assert_eq!(add(&mut bus, 2, "01:00.3", SHARED), Ok(0x03));
        assert_eq!((bus.functions_beside(at(0, 0)), bus.functions_beside(at(1, 0))), (2, 1));
        assert_eq!(bus.entries().collect::<std::vec::Vec<_>>(), [(at(0, 0), 0), (at(0, 3), 2), (at(1, 0), 1)]);
    }

    #[test]
    fn the_same_slot_of_another_bus_or_segment_is_another_device() {
        let mut bus = bus();
        for (index, text) in ["0000:01:00.0", "0000:02:00.0", "0002:01:00.0"].into_iter().enumerate() {
            assert_eq!(add(&mut bus, index, text, SHARED), Ok((index as u8) << 3));
        }
        assert_eq!(bus.roots(), [(0, 0)]);
    }

    /// QubesOS issue 9853: a VF 00:02.4 alone was put at function 4 and its consumer found nothing.
    #[test]
    fn a_function_without_its_function_0_becomes_function_0() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 0, "00:02.4", ALONE), Ok(0x00));
        assert_eq!(add(&mut bus, 1, "00:02.0", ALONE), Ok(0x01), "its number is taken: the next free one");
    }

    #[test]
    fn a_function_whose_function_0_follows_keeps_its_number() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 0, "05:00.1", SHARED), Ok(0x01));
        assert_eq!(add(&mut bus, 1, "05:00.0", SHARED), Ok(0x00));
    }

    #[test]
    fn all_eight_functions_of_a_device_have_room_in_their_slot() {
        let mut bus = bus();
        for (index, function) in [6, 0, 1, 2, 3, 4, 5, 7].into_iter().enumerate() {
            let wish = if index == 0 { ALONE } else { SHARED };
            assert!(add(&mut bus, index, &std::format!("05:00.{function}"), wish).is_ok_and(|devfn| devfn < 8));
        }
        assert_eq!(bus.functions_beside(at(0, 0)), 8);
    }

    #[test]
    fn a_wished_slot_is_given_if_free() {
        let mut bus = bus();
        let wish = Wish { slot: Some(0x1f), ..SHARED };
        assert_eq!(add(&mut bus, 0, "01:00.0", wish), Ok(0xf8));
        assert_eq!(add(&mut bus, 1, "02:00.0", wish), Ok(0x00));
        assert_eq!(add(&mut bus, 2, "01:00.1", Wish { slot: Some(5), ..SHARED }), Ok(0xf9), "where its device is");
    }

    /// Linux puts a VF with a number above 0 beside its PF, or beside other VFs without a function 0.
    #[test]
    fn a_virtual_function_has_a_slot_for_itself_beside_its_pf_and_its_like() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 0, "00:02.0", SHARED), Ok(0x00));
        assert_eq!(add(&mut bus, 1, "00:02.1", VIRTUAL), Ok(0x08));
        assert_eq!(add(&mut bus, 2, "00:02.2", VIRTUAL), Ok(0x10));
        assert_eq!(add(&mut bus, 3, "07:10.0", Wish { slot: Some(9), function_0_follows: true, ..VIRTUAL }), Ok(0x48));
        assert_eq!(add(&mut bus, 4, "07:10.3", Wish { function_0_follows: true, ..VIRTUAL }), Ok(0x18));
        assert_eq!(add(&mut bus, 5, "07:10.4", ALONE), Ok(0x20), "a function that is no VF never joins one");
        assert_eq!(bus.entries().filter(|(place, _)| bus.functions_beside(*place) > 1).count(), 0);
    }

    #[test]
    fn virtual_functions_share_slots_among_themselves_when_none_is_left() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 300, "01:00.0", SHARED), Ok(0x00));
        for index in 0..31u8 {
            assert_eq!(bus.add(index.into(), Sbdf::new(0, 7, index), VIRTUAL), Ok(at(index + 1, 0)));
        }
        for index in 31..248u8 {
            let place = bus.add(index.into(), Sbdf::new(0, 7, index), VIRTUAL).expect("room");
            assert_ne!(place.device(), 0, "that slot is no VF's");
        }
        assert_eq!(bus.add(301, Sbdf::new(0, 8, 0), VIRTUAL), Err(BusFull));
        assert_eq!(add(&mut bus, 302, "02:00.0", SHARED), Err(BusFull));
        assert_eq!(add(&mut bus, 303, "01:00.1", SHARED), Ok(0x01), "its device has its slot");
    }

    /// The reference masks the slot with 31, so that devfn 0x100 answers for devfn 0.
    #[test]
    fn no_address_outside_the_bus_finds_anything() {
        let mut bus = bus();
        assert_eq!(add(&mut bus, 7, "01:00.0", SHARED), Ok(0));
        assert_eq!(bus.find(0, 0, 0), Some(7));
        for (domain, number, devfn) in
            [(0, 0, 0x100), (0, 0, u32::MAX), (1, 0, 0), (0, 1, 0), (0, 0x80, 0), (0, 0, 1), (0x10000, 0, 0)]
        {
            assert_eq!(bus.find(domain, number, devfn), None);
        }
    }

    #[test]
    fn a_full_bus_says_so_and_a_freed_slot_is_used_again() {
        let mut bus = bus();
        for index in 0..32u8 {
            assert_eq!(bus.add(index.into(), Sbdf::new(0, index, 0), SHARED), Ok(at(index, 0)));
        }
        assert_eq!(add(&mut bus, 99, "40:00.0", SHARED), Err(BusFull));
        bus.remove(5);
        assert_eq!(bus.place_of(5), None);
        assert_eq!(add(&mut bus, 99, "40:00.0", SHARED), Ok(5 << 3));
        assert_eq!(bus.place_of(99), Some(at(5, 0)));
    }
}
