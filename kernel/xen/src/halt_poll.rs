//! How long to look for the next event before sleeping in Xen.
//!
//! A frontend's requests come in bursts: a bus scan is hundreds of reads, one after the other. Going to
//! sleep and being woken costs far more than an access, so after a short sleep the next wait begins with
//! a look at the pending bits, for a bounded time. Looks that find nothing shorten the time, and soon
//! there is none: an idle domain never looks. The idea is Linux's haltpoll; the bounds are ours.

/// Longest look, nanoseconds.
const MOST: u64 = 200_000;
/// First look after a short sleep.
const LEAST: u64 = 25_000;
/// A sleep that ended sooner would have been worth a look.
const SHORT: u64 = 400_000;

/// The time to look, learnt from the waits before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HaltPoll(u64);

impl HaltPoll {
    /// How long to look before sleeping, nanoseconds; 0 is not at all.
    pub fn window(self) -> u64 {
        self.0
    }

    /// The look found nothing, and the sleep after it took `slept` nanoseconds.
    pub fn slept(&mut self, slept: u64) {
        self.0 = if slept < SHORT { (self.0 * 2).clamp(LEAST, MOST) } else { self.0 / 2 };
        if self.0 < LEAST {
            self.0 = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_make_it_look_and_idleness_makes_it_stop() {
        let mut poll = HaltPoll::default();
        assert_eq!(poll.window(), 0);
        poll.slept(100_000);
        assert_eq!(poll.window(), LEAST);
        for _ in 0..20 {
            poll.slept(100_000);
        }
        assert_eq!(poll.window(), MOST, "bounded");
        for _ in 0..4 {
            poll.slept(10_000_000);
        }
        assert_eq!(poll.window(), 0, "four idle sleeps and it never looks");
        poll.slept(u64::MAX);
        assert_eq!(poll.window(), 0);
    }
}
