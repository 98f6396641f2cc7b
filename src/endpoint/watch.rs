// SPDX-License-Identifier: BSD-3-Clause
//! What the watchdog remembers of an endpoint between two looks.

use proto::session::Millis;

/// The watchdog's notes on an endpoint.
#[derive(Debug, Default)]
pub struct Watch {
    /// The endpoint's progress at the last look. What the client does does not count:
    /// it may send, or acknowledge probes, and not be served.
    progress: u64,
    /// When that was first seen, or the endpoint began to linger.
    pub since: Millis,
    /// Ticks since then on which there was something to do.
    ticks: u32,
}

impl Watch {
    /// The notes on a new endpoint.
    pub fn new(now: Millis) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// The endpoint was nudged: its ticks are counted anew.
    pub fn restart(&mut self) {
        self.ticks = 0;
    }

    /// A look at the endpoint. Returns on how many ticks, this one included, it stood
    /// still with something to do.
    pub fn tick(&mut self, progress: u64, due: bool, now: Millis) -> u32 {
        if progress != self.progress {
            (self.progress, self.since, self.ticks) = (progress, now, 0);
        } else if due {
            self.ticks += 1;
        } else {
            self.ticks = 0;
        }
        self.ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_count_only_while_nothing_moves_and_something_is_due() {
        let mut watch = Watch::new(0);
        let (still, moved) = (0, 1);
        assert_eq!(watch.tick(still, true, 1000), 1);
        assert_eq!(watch.tick(still, true, 2000), 2);
        assert_eq!(watch.tick(still, false, 3000), 0, "nothing to do any more");
        assert_eq!(watch.tick(still, true, 4000), 1);
        assert_eq!(watch.since, 0);
        assert_eq!(watch.tick(moved, true, 5000), 0);
        assert_eq!(watch.since, 5000);
        assert_eq!(watch.tick(moved, true, 6000), 1);
    }
}
