//! Xen's system time from the shared info page, without a hypercall: nanoseconds since Xen booted.
//! Rules: the comments on `struct vcpu_time_info` in `xen/xen.h` (read the version, the fields, the
//! version again).

use core::arch::x86_64::_rdtsc;
use core::hint::spin_loop;
use core::sync::atomic::{Ordering, fence};

use crate::abi::{shared_info, time_info};
use crate::page::Page;

/// Tries at a consistent snapshot: Xen updates rarely, so a second try almost always succeeds.
const TRIES: u32 = 1000;

/// Nanoseconds for `ticks` of the time stamp counter.
fn scale(ticks: u64, mul: u32, shift: i8) -> u64 {
    let shifted = if shift < 0 {
        ticks >> u32::from(shift.unsigned_abs()).min(63)
    } else {
        ticks << u32::from(shift.unsigned_abs()).min(63)
    };
    ((u128::from(shifted) * u128::from(mul)) >> 32) as u64
}

/// System time now, in nanoseconds.
pub fn now(shared: Page) -> u64 {
    let base = shared_info::TIME;
    let mut time = 0;
    for _ in 0..TRIES {
        let before: u32 = shared.read(base + time_info::VERSION);
        fence(Ordering::Acquire);
        let stamp: u64 = shared.read(base + time_info::TSC_TIMESTAMP);
        let system: u64 = shared.read(base + time_info::SYSTEM_TIME);
        let mul: u32 = shared.read(base + time_info::MUL);
        let shift = shared.read::<u8>(base + time_info::SHIFT) as i8;
        // SAFETY: every x86-64 processor has the instruction.
        let tsc = unsafe { _rdtsc() };
        time = system.wrapping_add(scale(tsc.wrapping_sub(stamp), mul, shift));
        fence(Ordering::Acquire);
        let after: u32 = shared.read(base + time_info::VERSION);
        if before == after && before & 1 == 0 {
            break;
        }
        spin_loop();
    }
    time
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_scale_by_shift_then_fraction() {
        // 2 GHz: half a nanosecond a tick, mul = 0.5 * 2^32.
        assert_eq!(scale(2_000_000_000, 0x8000_0000, 0), 1_000_000_000);
        assert_eq!(scale(1_000, 0x8000_0000, 1), 1_000);
        assert_eq!(scale(4_000, 0x8000_0000, -1), 1_000);
    }
}
