//! Where a guest sees its functions: the two topologies of xen-pciback behind one type.
//!
//! Which address a function gets is the kind's own business ([`vpci`], [`passthrough`]). Everything after that is
//! the same: one sorted list of addresses, in which a request's address is looked up in its full width, so that no
//! number beyond a bus aliases into it. The buses that hold functions are the roots that pcifront scans.

use alloc::vec::Vec;

use crate::sbdf::Sbdf;

mod passthrough;
mod vpci;

/// Functions of a slot.
const FUNCTIONS: u8 = 8;

/// A function as the backend numbers it.
pub type DeviceIndex = usize;

/// How addresses are chosen: `topology=` of the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// One virtual bus, 0000:00.
    #[default]
    Vpci,
    /// The host's addresses.
    Passthrough,
}

impl Kind {
    /// The word of the command line.
    pub const fn word(self) -> &'static str {
        match self {
            Kind::Vpci => "vpci",
            Kind::Passthrough => "passthrough",
        }
    }

    /// The kind that a word names.
    pub fn parse(word: &str) -> Option<Kind> {
        [Kind::Vpci, Kind::Passthrough].into_iter().find(|kind| kind.word() == word)
    }
}

/// What counts when a function gets its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Virtual slot, if a new one is to be taken (`slot=`).
    pub slot: Option<u8>,
    /// Function 0 of the same physical device is this guest's too.
    pub function_0_follows: bool,
    /// It is a virtual function: its number says nothing about the ones beside it.
    pub is_virtual: bool,
}

/// One exported function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// Its address in the guest.
    place: Sbdf,
    device: DeviceIndex,
    /// Its address in the host.
    sbdf: Sbdf,
    is_virtual: bool,
}

/// A bus that the guest scans from its root: segment and bus.
pub type Root = (u16, u8);

/// What is where for one guest.
#[derive(Clone, Debug)]
pub struct Topology {
    kind: Kind,
    /// Sorted by place.
    entries: Vec<Entry>,
    roots: Vec<Root>,
}

/// No place is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusFull;

impl Topology {
    /// Nothing is anywhere yet.
    pub fn new(kind: Kind) -> Topology {
        let roots = match kind {
            Kind::Vpci => [vpci::ROOT].into(),
            Kind::Passthrough => Vec::new(),
        };
        Topology { kind, entries: Vec::new(), roots }
    }

    /// Gives a function its place and returns the address at which the guest sees it.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn add(&mut self, device: DeviceIndex, sbdf: Sbdf, wish: Wish) -> Result<Sbdf, BusFull> {
        let place = match self.kind {
            Kind::Vpci => vpci::place(&self.entries, sbdf, wish).ok_or(BusFull)?,
            Kind::Passthrough => passthrough::place(sbdf),
        };
        let Err(position) = self.entries.binary_search_by_key(&place, |entry| entry.place) else { return Err(BusFull) };
        self.entries.insert(position, Entry { place, device, sbdf, is_virtual: wish.is_virtual });
        let root = (place.segment(), place.bus());
        if !self.roots.contains(&root) {
            self.roots.push(root);
        }
        Ok(place)
    }

    /// Takes a function out.
    pub fn remove(&mut self, device: DeviceIndex) {
        self.entries.retain(|entry| entry.device != device);
    }

    /// The function at a guest's address. Everything is compared in full width: an address beyond a
    /// bus never aliases into it.
    pub fn find(&self, domain: u32, bus: u32, devfn: u32) -> Option<DeviceIndex> {
        let (Ok(segment), Ok(bus), Ok(devfn)) = (u16::try_from(domain), u8::try_from(bus), u8::try_from(devfn)) else {
            return None;
        };
        let place = Sbdf::new(segment, bus, devfn);
        let position = self.entries.binary_search_by_key(&place, |entry| entry.place).ok()?;
        self.entries.get(position).map(|entry| entry.device)
    }

    /// Where a function is.
    pub fn place_of(&self, device: DeviceIndex) -> Option<Sbdf> {
        self.entries.iter().find(|entry| entry.device == device).map(|entry| entry.place)
    }

    /// All functions with their places.
    pub fn entries(&self) -> impl Iterator<Item = (Sbdf, DeviceIndex)> {
        self.entries.iter().map(|entry| (entry.place, entry.device))
    }

    /// How many functions are in the slot of `place`.
    pub fn functions_beside(&self, place: Sbdf) -> usize {
        self.entries.iter().filter(|entry| same_slot(entry.place, place)).count()
    }

    /// The buses that hold functions, or have held one: in the order in which they came, because the guest knows
    /// them by their number, and none ever goes, as in the reference.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }
}

/// Whether two addresses are functions of one device.
fn same_slot(one: Sbdf, other: Sbdf) -> bool {
    (one.segment(), one.bus(), one.device()) == (other.segment(), other.bus(), other.device())
}

/// Addresses as tests write them.
#[cfg(test)]
fn sbdf(text: &str) -> Sbdf {
    text.parse().expect("address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_is_found_no_more_and_its_place_is_free() {
        for kind in [Kind::Vpci, Kind::Passthrough] {
            let mut topology = Topology::new(kind);
            let first = topology.add(7, sbdf("0002:81:00.0"), Wish::default()).expect("room");
            let second = topology.add(8, sbdf("0002:82:00.0"), Wish::default()).expect("room");
            let find = |topology: &Topology, place: Sbdf| {
                topology.find(place.segment().into(), place.bus().into(), place.devfn().into())
            };
            assert_eq!((find(&topology, first), find(&topology, second)), (Some(7), Some(8)));
            topology.remove(7);
            assert_eq!((find(&topology, first), find(&topology, second)), (None, Some(8)));
            assert_eq!((topology.place_of(7), topology.place_of(8)), (None, Some(second)));
            assert_eq!(topology.add(7, sbdf("0002:81:00.0"), Wish::default()), Ok(first));
        }
    }

    #[test]
    fn the_words_of_the_command_line_read_back() {
        for kind in [Kind::Vpci, Kind::Passthrough] {
            assert_eq!(Kind::parse(kind.word()), Some(kind));
        }
        assert_eq!(Kind::parse("Passthrough"), None);
    }
}
