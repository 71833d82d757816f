//! Bounds the log lines a guest can cause (XSA-43, XSA-157): a few in a span of time, then a count.

use crate::platform::Nanos;

/// Lines in one span.
const LINES: u32 = 10;
/// Length of a span: 10 seconds.
const SPAN: Nanos = 10_000_000_000;

/// Counts the lines of one guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    since: Nanos,
    lines: u32,
    dropped: u32,
}

impl Throttle {
    /// Whether a line may be written at `now`; if so, how many were dropped before it.
    pub fn allow(&mut self, now: Nanos) -> Option<u32> {
        if now.saturating_sub(self.since) >= SPAN {
            self.since = now;
            self.lines = 0;
        }
        if self.lines >= LINES {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(core::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_costs_ten_lines_a_span_and_one_count() {
        let mut throttle = Throttle::default();
        let start = 100 * SPAN;
        let written = (0..10_000).filter(|_| throttle.allow(start).is_some()).count();
        assert_eq!(written, 10);
        assert_eq!(throttle.allow(start + SPAN - 1), None);
        assert_eq!(throttle.allow(start + SPAN), Some(9_991));
        assert_eq!(throttle.allow(start + SPAN), Some(0));
    }
}
