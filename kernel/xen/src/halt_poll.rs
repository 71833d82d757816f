//! How long to look for the next event before sleeping in Xen.
//!
//! A frontend's requests come in bursts: a bus scan is hundreds of reads, one after the other. Going to
//! sleep and being woken costs far more than an access, so after a short sleep the next wait begins with
//! a look at the pending bits, for a bounded time. Looks that find nothing shorten the time, and soon
//! there is none: an idle domain never looks. The idea is Linux's haltpoll; the bounds are ours.

/// The time to look, learnt from the waits before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HaltPoll {
    window: u64,
    most: u64,
}

impl HaltPoll {
    /// Looks for at most `most` nanoseconds. A sleep that was shorter than twice that would have been worth a look.
    pub const fn new(most: u64) -> HaltPoll {
        HaltPoll { window: 0, most }
    }

    /// How long to look before sleeping, nanoseconds; 0 is not at all.
    pub fn window(self) -> u64 {
        self.window
    }

    /// The look found nothing, and the sleep after it took `slept` nanoseconds.
    pub fn slept(&mut self, slept: u64) {
        let least = self.most / 8;
        self.window = if slept < self.most * 2 { (self.window * 2).clamp(least, self.most) } else { self.window / 2 };
        if self.window < least {
            self.window = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 200_000;

    #[test]
    fn bursts_make_it_look_and_idleness_makes_it_stop() {
        let mut poll = HaltPoll::new(MOST);
        assert_eq!(poll.window(), 0);
        poll.slept(100_000);
        assert_eq!(poll.window(), MOST / 8);
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
