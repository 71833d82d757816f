//! The `vpci` topology: one bus, 0000:00, with 32 slots, as the guest sees it.
//!
//! Functions of one physical device share a slot and keep their function numbers. A function whose
//! device has no function 0 in the guest would sit in a slot that ordinary bus scans skip (PCI 3.0,
//! 6.2.1: function 0 must exist), and consumers of `vdev-N` would look in vain; it becomes function 0.

use crate::sbdf::Sbdf;

/// Slots of the virtual bus.
const SLOTS: usize = 32;
/// Functions of a slot.
const FUNCTIONS: usize = 8;

/// A function as the backend numbers it.
pub type DeviceIndex = usize;

/// One exported function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    device: DeviceIndex,
    sbdf: Sbdf,
}

/// What is where on one guest's virtual bus.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    slots: [[Option<Entry>; FUNCTIONS]; SLOTS],
}

/// No slot is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusFull;

impl Topology {
    /// Gives a function its place and returns its virtual devfn.
    ///
    /// `slot` is a wish for a new slot. `function_0_follows` says that function 0 of the same physical
    /// device belongs to this guest too.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn add(
        &mut self,
        device: DeviceIndex,
        sbdf: Sbdf,
        slot: Option<u8>,
        function_0_follows: bool,
    ) -> Result<u8, BusFull> {
        let same_device = |entry: &Entry| {
            (entry.sbdf.segment(), entry.sbdf.bus(), entry.sbdf.device()) == (sbdf.segment(), sbdf.bus(), sbdf.device())
        };
        let entry = Some(Entry { device, sbdf });
        let physical = usize::from(sbdf.function());
        let mut slots = self.slots.iter_mut().enumerate();
        if let Some((number, functions)) = slots.find(|(_, functions)| functions.iter().flatten().any(same_device)) {
            let free = |function: &usize| functions.get(*function).is_some_and(Option::is_none);
            let function = core::iter::once(physical).chain(0..FUNCTIONS).find(free).ok_or(BusFull)?;
            if let Some(place) = functions.get_mut(function) {
                *place = entry;
            }
            return Ok(devfn(number, function));
        }
        let empty =
            |number: &usize| self.slots.get(*number).is_some_and(|functions| functions.iter().all(Option::is_none));
        let number = slot.map(usize::from).into_iter().chain(0..SLOTS).find(empty).ok_or(BusFull)?;
        let function = if function_0_follows { physical } else { 0 };
        if let Some(place) = self.slots.get_mut(number).and_then(|functions| functions.get_mut(function)) {
            *place = entry;
        }
        Ok(devfn(number, function))
    }

    /// Takes a function out.
    pub fn remove(&mut self, device: DeviceIndex) {
        for place in self.slots.iter_mut().flatten() {
            if place.is_some_and(|entry| entry.device == device) {
                *place = None;
            }
        }
    }

    /// The function at a guest's address. Everything is compared in full width: an address beyond the
    /// bus never aliases into it.
    pub fn find(&self, domain: u32, bus: u32, devfn: u32) -> Option<DeviceIndex> {
        if domain != 0 || bus != 0 {
            return None;
        }
        let devfn = usize::from(u8::try_from(devfn).ok()?);
        let entry = self.slots.get(devfn >> 3)?.get(devfn & 7)?;
        entry.map(|entry| entry.device)
    }

    /// Where a function is.
    pub fn devfn_of(&self, device: DeviceIndex) -> Option<u8> {
        self.entries().find(|(_, entry)| *entry == device).map(|(devfn, _)| devfn)
    }

    /// All functions with their places.
    pub fn entries(&self) -> impl Iterator<Item = (u8, DeviceIndex)> {
        self.slots.iter().enumerate().flat_map(|(number, functions)| {
            functions
                .iter()
                .enumerate()
                .filter_map(move |(function, entry)| entry.map(|entry| (devfn(number, function), entry.device)))
        })
    }

    /// How many functions are in the slot of `devfn`.
    pub fn functions_beside(&self, devfn: u8) -> usize {
        self.slots.get(usize::from(devfn >> 3)).map_or(0, |functions| functions.iter().flatten().count())
    }
}

fn devfn(slot: usize, function: usize) -> u8 {
    (slot << 3 | function) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sbdf(text: &str) -> Sbdf {
        text.parse().expect("address")
    }

    #[test]
    fn functions_of_one_device_share_a_slot_and_keep_their_numbers() {
        let mut bus = Topology::default();
        assert_eq!(bus.add(0, sbdf("01:00.0"), None, true), Ok(0x00));
        assert_eq!(bus.add(1, sbdf("02:00.0"), None, true), Ok(0x08));
        assert_eq!(bus.add(2, sbdf("01:00.3"), None, true), Ok(0x03));
        assert_eq!((bus.functions_beside(0x00), bus.functions_beside(0x08)), (2, 1));
        assert_eq!(bus.entries().collect::<std::vec::Vec<_>>(), [(0x00, 0), (0x03, 2), (0x08, 1)]);
    }

    #[test]
    fn the_same_slot_of_another_bus_or_segment_is_another_device() {
        let mut bus = Topology::default();
        for (index, text) in ["0000:01:00.0", "0000:02:00.0", "0002:01:00.0"].into_iter().enumerate() {
            assert_eq!(bus.add(index, sbdf(text), None, true), Ok((index as u8) << 3));
        }
    }

    /// QubesOS issue 9853: a VF 00:02.4 alone was put at function 4 and its consumer found nothing.
    #[test]
    fn a_function_without_its_function_0_becomes_function_0() {
        let mut bus = Topology::default();
        assert_eq!(bus.add(0, sbdf("00:02.4"), None, false), Ok(0x00));
        assert_eq!(bus.add(1, sbdf("00:02.0"), None, false), Ok(0x01), "its number is taken: the next free one");
    }

    #[test]
    fn a_function_whose_function_0_follows_keeps_its_number() {
        let mut bus = Topology::default();
        assert_eq!(bus.add(0, sbdf("05:00.1"), None, true), Ok(0x01));
        assert_eq!(bus.add(1, sbdf("05:00.0"), None, true), Ok(0x00));
    }

    #[test]
    fn a_wished_slot_is_given_if_free() {
        let mut bus = Topology::default();
        assert_eq!(bus.add(0, sbdf("01:00.0"), Some(0x1f), true), Ok(0xf8));
        assert_eq!(bus.add(1, sbdf("02:00.0"), Some(0x1f), true), Ok(0x00));
    }

    /// The reference masks the slot with 31, so that devfn 0x100 answers for devfn 0.
    #[test]
    fn no_address_outside_the_bus_finds_anything() {
        let mut bus = Topology::default();
        assert_eq!(bus.add(7, sbdf("01:00.0"), None, true), Ok(0));
        assert_eq!(bus.find(0, 0, 0), Some(7));
        for (domain, number, devfn) in
            [(0, 0, 0x100), (0, 0, u32::MAX), (1, 0, 0), (0, 1, 0), (0, 0x80, 0), (0, 0, 1), (0x10000, 0, 0)]
        {
            assert_eq!(bus.find(domain, number, devfn), None);
        }
    }

    #[test]
    fn a_full_bus_says_so_and_a_freed_slot_is_used_again() {
        let mut bus = Topology::default();
        for index in 0..32u8 {
            assert_eq!(bus.add(index.into(), Sbdf::new(0, index, 0), None, true), Ok(index << 3));
        }
        assert_eq!(bus.add(99, sbdf("40:00.0"), None, true), Err(BusFull));
        bus.remove(5);
        assert_eq!(bus.devfn_of(5), None);
        assert_eq!(bus.add(99, sbdf("40:00.0"), None, true), Ok(5 << 3));
        assert_eq!(bus.devfn_of(99), Some(5 << 3));
    }
}
