//! Bounds what a guest can cause: log lines (XSA-43, XSA-157), a few in a span of time, then a count; and looks at its
//! xenstore nodes, of which those that are too many are made later, all in one.

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

/// Looks at one guest's nodes in a second. A guest that connects, or changes its list of functions, takes a handful.
const LOOKS: u32 = 20;
/// That second.
const SECOND: Nanos = 1_000_000_000;

/// Counts the looks at one guest's nodes: each costs the others as long as xenstored takes for a score of answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    since: Nanos,
    looks: u32,
}

impl Pace {
    /// Takes a look at `now`.
    ///
    /// # Errors
    /// There were too many: when the next one may be taken.
    pub fn look(&mut self, now: Nanos) -> Result<(), Nanos> {
        if now.saturating_sub(self.since) >= SECOND {
            *self = Pace { since: now, looks: 0 };
        }
        if self.looks >= LOOKS {
            return Err(self.since.saturating_add(SECOND));
        }
        self.looks += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

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

    #[test]
    fn twenty_looks_a_second_are_taken_and_the_next_one_has_its_time() {
        let mut pace = Pace::default();
        let start = 100 * SECOND;
        let outcomes: Vec<_> = (0..25).map(|step| pace.look(start + step)).collect();
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 20);
        assert_eq!(outcomes[20..], [Err(start + SECOND); 5]);
        assert_eq!(pace.look(start + SECOND - 1), Err(start + SECOND));
        assert_eq!(pace.look(start + SECOND), Ok(()));
    }
}
