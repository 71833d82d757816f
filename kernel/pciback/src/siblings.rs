//! Functions that can only be reset together: those on one bus, of a device whose functions have no reset of their own.
//! dom0's kernel resets none of them alone, as its reset of the bus reaches all; so it is asked for that one once all
//! are at rest, and each is restored after it. While a guest has one of them the others are not reset.
//!
//! The image answers for its own functions; that a bus has no others, dom0's tool makes sure of.

use crate::device::{Device, Rest};
use crate::physdev::Physdev;
use crate::platform::{ConfigSpace, Nanos};
use crate::sbdf::Sbdf;

/// Whether a reset of the bus that `one` is on reaches `other`.
fn are_beside(one: Sbdf, other: Sbdf) -> bool {
    one != other && one.segment() == other.segment() && one.bus() == other.bus()
}

/// Begins the resets that waited for functions at rest, and lets those go on that have been reset with another. True if
/// the state of any has changed.
pub fn settle<C: ConfigSpace, P: Physdev>(devices: &mut [Device<C>], physdev: &mut P, now: Nanos) -> bool {
    let mut changed = false;
    for place in 0..devices.len() {
        let Some(device) = devices.get_mut(place) else { break };
        let sbdf = device.entry.sbdf;
        let (led, gathers) = (device.take_led(), device.gathers());
        let beside = |other: &&mut Device<C>| are_beside(sbdf, other.entry.sbdf);
        if let Some(doubt) = led {
            devices.iter_mut().filter(beside).for_each(|other| other.leave_company(doubt, now));
        }
        if !gathers {
            continue;
        }
        let mut used = None;
        let mut moving = false;
        for other in devices.iter().filter(|other| are_beside(sbdf, other.entry.sbdf)) {
            match other.rest() {
                Rest::With(guest) => used = used.or(Some((other.entry.sbdf, guest))),
                Rest::Moving => moving = true,
                Rest::Still => {}
            }
        }
        let Some(device) = devices.get_mut(place) else { break };
        match used {
            Some((other, guest)) => device.stay_alone(other, guest, now),
            None if moving => {}
            None => {
                if device.lead(physdev, now) {
                    devices.iter_mut().filter(beside).for_each(|other| other.accompany(now));
                    changed = true;
                }
            }
        }
    }
    changed
}
