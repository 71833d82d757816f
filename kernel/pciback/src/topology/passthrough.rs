//! The `passthrough` topology: a guest sees each function at the host's address (Linux, `passthrough.c`).
//!
//! Linux publishes a bus as a root unless a bridge above it is exported too. This backend exports no bridges, so every
//! bus that holds a function is a root: one `root-N` for each segment and bus. Nothing else is on those buses, and
//! there is no room to run out of, as no address occurs twice.

use crate::sbdf::Sbdf;

/// Where the guest sees a function.
pub(super) fn place(sbdf: Sbdf) -> Sbdf {
    sbdf
}

#[cfg(test)]
mod tests {
    use super::super::{Kind, Topology, Wish, sbdf};

    fn tree(functions: &[&str]) -> Topology {
        let mut tree = Topology::new(Kind::Passthrough);
        for (index, text) in functions.iter().enumerate() {
            assert_eq!(tree.add(index, sbdf(text), Wish::default()), Ok(sbdf(text)));
        }
        tree
    }

    #[test]
    fn functions_keep_their_addresses_whatever_is_beside_them() {
        let functions = ["0000:00:1f.6", "0000:05:00.1", "0000:80:14.0", "0002:01:00.0", "ffff:ff:1f.7"];
        let tree = tree(&functions);
        for (index, text) in functions.iter().enumerate() {
            let place = sbdf(text);
            assert_eq!(tree.place_of(index), Some(place));
            let found = tree.find(place.segment().into(), place.bus().into(), place.devfn().into());
            assert_eq!(found, Some(index), "{text}");
        }
    }

    #[test]
    fn every_bus_is_a_root_once_and_stays_one() {
        let mut tree = tree(&["0000:80:14.0", "0002:01:00.0", "0000:80:15.0", "0000:01:00.0"]);
        let roots = [(0, 0x80), (2, 1), (0, 1)];
        assert_eq!(tree.roots(), roots);
        tree.remove(1);
        assert_eq!(tree.roots(), roots, "the guest knows it by its number");
        assert_eq!(self::tree(&[]).roots(), []);
    }

    #[test]
    fn functions_of_one_device_are_counted_and_those_of_its_namesakes_are_not() {
        let tree = tree(&["0000:05:00.0", "0000:05:00.1", "0001:05:00.2", "0000:06:00.3"]);
        let beside = |text| tree.functions_beside(sbdf(text));
        assert_eq!((beside("0000:05:00.0"), beside("0001:05:00.2"), beside("0000:06:00.3")), (2, 1, 1));
    }

    /// Cut to 16, 8 and 8 bits each of these would be the function's address.
    #[test]
    fn no_address_aliases_into_a_function() {
        let tree = tree(&["0002:80:14.0"]);
        assert_eq!(tree.find(2, 0x80, 0xa0), Some(0));
        for (domain, bus, devfn) in [
            (0x1_0002, 0x80, 0xa0),
            (2, 0x180, 0xa0),
            (2, 0x80, 0x1a0),
            (0x8000_0002, 0x80, 0xa0),
            (0, 0x80, 0xa0),
            (2, 0, 0xa0),
            (0, 0, 0),
            (u32::MAX, u32::MAX, u32::MAX),
        ] {
            assert_eq!(tree.find(domain, bus, devfn), None, "{domain:x}:{bus:x}:{devfn:x}");
        }
    }
}
