//! What a guest may use of the machine because of a function: frames and ports of its BARs, its line
//! interrupt. Two functions of one guest may share a frame or an interrupt line; what the other still
//! needs is not taken away with the first. Whole addresses, at grant and at revocation alike (XSA-476).

use crate::attach::Host;
use crate::nodes;
use crate::sysfs::Function;
use crate::xen::Hypervisor;
use pciback::sbdf::Sbdf;

/// What the numbers of a range count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Machine frames of 4 KiB.
    Frames,
    /// I/O ports.
    Ports,
}

/// Frames or ports from `first` to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    space: Space,
    first: u64,
    last: u64,
}

impl Range {
    fn set(&self, xen: &dyn Hypervisor, domid: u32, allow: bool) -> Result<(), i32> {
        let count = (self.last - self.first).checked_add(1).ok_or(22)?;
        match self.space {
            Space::Frames => xen.iomem(domid, self.first, count, allow),
            Space::Ports => {
                let first = u32::try_from(self.first).map_err(|_| 22)?;
                xen.ioport(domid, first, u32::try_from(count).map_err(|_| 22)?, allow)
            }
        }
    }

    fn text(&self) -> String {
        match self.space {
            Space::Frames => format!("memory {:#x}-{:#x}", self.first << 12, self.last << 12 | 0xfff),
            Space::Ports => format!("ports {:#x}-{:#x}", self.first, self.last),
        }
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.space == other.space && self.first <= other.last && other.first <= self.last
    }

    /// The parts of this range that are in none of `kept`.
    fn without(self, kept: &[Range]) -> Vec<Range> {
        let mut parts = vec![self];
        for keep in kept {
            parts = parts.into_iter().flat_map(|part| part.minus(keep)).collect();
        }
        parts
    }

    fn minus(self, keep: &Range) -> Vec<Range> {
        if !self.overlaps(keep) {
            return vec![self];
        }
        let below = (self.first < keep.first).then(|| Range { last: keep.first - 1, ..self });
        let above = (keep.last < self.last).then(|| Range { first: keep.last + 1, ..self });
        below.into_iter().chain(above).collect()
    }
}

/// Everything a guest needs for the function's BARs, in whole frames.
pub fn ranges(function: &Function) -> Vec<Range> {
    let used = function.resources.iter().filter(|resource| resource.is_used());
    used.map(|resource| match resource.is_io() {
        true => Range { space: Space::Ports, first: resource.start, last: resource.end },
        false => Range { space: Space::Frames, first: resource.start >> 12, last: resource.end >> 12 },
    })
    .collect()
}

/// The pirq a guest gets for the function's interrupt pin. Larger numbers do not fit Interrupt Line.
pub fn irq(function: &Function) -> Option<u32> {
    (1..255).contains(&function.irq).then_some(function.irq)
}

/// Whether one of `kept` has the same interrupt line.
pub fn shares_irq(function: &Function, kept: &[Function]) -> bool {
    irq(function).is_some_and(|number| kept.iter().any(|other| irq(other) == Some(number)))
}

/// Permits the BARs.
///
/// # Errors
/// The first range that Xen refuses.
pub fn grant(xen: &dyn Hypervisor, domid: u32, function: &Function) -> Result<(), (String, i32)> {
    ranges(function).iter().try_for_each(|range| range.set(xen, domid, true).map_err(|errno| (range.text(), errno)))
}

/// Takes the BARs away, except what `kept` needs. Goes on after a refusal and returns all of them.
pub fn revoke(xen: &dyn Hypervisor, domid: u32, function: &Function, kept: &[Function]) -> Vec<(String, i32)> {
    let kept: Vec<Range> = kept.iter().flat_map(ranges).collect();
    let parts = ranges(function).into_iter().flat_map(|range| range.without(&kept));
    parts.filter_map(|part| Some((part.text(), part.set(xen, domid, false).err()?))).collect()
}

/// The other functions that the guest has, by this tool's own records (a driver domain cannot write them).
pub fn others(host: &Host<'_>, domid: u32, sbdf: Sbdf) -> Vec<Function> {
    let held = host.store.list(0, nodes::RECORDS).into_iter().filter_map(|folder| nodes::of_folder(&folder));
    held.filter(|other| *other != sbdf && holder(host, *other) == Some(domid))
        .filter_map(|other| host.sysfs.function(other).ok())
        .collect()
}

/// The guest that has the function: this tool's record, unless Xen says that nobody has it.
pub fn holder(host: &Host<'_>, sbdf: Sbdf) -> Option<u32> {
    let recorded = host.store.read(0, &nodes::record(sbdf, "domid"))?.parse().ok()?;
    (host.xen.is_free(sbdf) != Ok(true)).then_some(recorded)
}

/// Functions outside the guest that are not apart from the one it gets (XSA-461).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Strangers {
    /// Registers of theirs lie in a frame that the guest gets.
    pub frames: Vec<Sbdf>,
    /// They have the same interrupt line.
    pub line: Vec<Sbdf>,
}

/// Looks for them among the host's functions.
pub fn strangers(host: &Host<'_>, function: &Function, own: &[Function]) -> Strangers {
    let frames: Vec<Range> = ranges(function).into_iter().filter(|range| range.space == Space::Frames).collect();
    let mut found = Strangers::default();
    let candidates = host.sysfs.functions().into_iter();
    let others = candidates
        .filter(|sbdf| *sbdf != function.sbdf && !own.iter().any(|other| other.sbdf == *sbdf))
        .filter_map(|sbdf| host.sysfs.function(sbdf).ok())
        // What a bridge forwards contains the BARs behind it; it has no registers there.
        .filter(|other| other.header_type == 0);
    for other in others {
        if ranges(&other).iter().any(|theirs| frames.iter().any(|frame| frame.overlaps(theirs))) {
            found.frames.push(other.sbdf);
        }
        // One that nobody uses asks for no interrupt.
        if other.driver.is_some() && shares_irq(function, std::slice::from_ref(&other)) {
            found.line.push(other.sbdf);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_need_is_cut_out() {
        let range = |first, last| Range { space: Space::Frames, first, last };
        let ports = Range { space: Space::Ports, first: 0, last: 100 };
        assert_eq!(range(10, 20).without(&[]), [range(10, 20)]);
        assert_eq!(range(10, 20).without(&[ports]), [range(10, 20)]);
        assert_eq!(range(10, 20).without(&[range(12, 14)]), [range(10, 11), range(15, 20)]);
        assert_eq!(range(10, 20).without(&[range(0, 10), range(20, 30)]), [range(11, 19)]);
        assert_eq!(range(10, 20).without(&[range(10, 20)]), []);
        assert_eq!(range(0, 5).without(&[range(0, 0)]), [range(1, 5)]);
    }
}
