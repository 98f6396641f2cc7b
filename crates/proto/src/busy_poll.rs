// SPDX-License-Identifier: BSD-3-Clause
//! Whether the next completions are worth waiting for.
//!
//! To sleep costs three system calls and a wake-up: the event is read from the channel, the
//! queues are armed, and the event loop is woken again. So where completions follow each other
//! closely, or come faster than they are served, the event is *left* in the channel: the
//! descriptor stays readable, the event loop comes back at once, and the queues are looked at,
//! for a limited time if they are empty.
//!
//! It can't become a spin. One look lasts at most the limit, counted from the end of the pass
//! before; a look that found nothing ends it, and the next tries are given up for ever longer,
//! until completions are close to each other again. Nothing is left in the channel before a
//! completion came, so who is idle is not looked for.

/// Nanoseconds on a clock that never goes back.
pub type Nanos = u64;

/// Passes after which it is tried again at the latest, as a power of 2.
const LONGEST_PAUSE: u32 = 10;

/// After so many passes in a row that found more before the server slept, it stays awake.
const CROWD: u32 = 4;

/// The pace of a device's completions: whether to poll for the next ones, and until when. It
/// has no clock of its own.
#[derive(Debug, Default)]
pub struct Pace {
    /// How long after a pass one look may last.
    limit: Nanos,
    /// End of the last pass.
    passed: Nanos,
    /// Mean time from the end of a pass to the completions of the next.
    gap: Nanos,
    /// Passes in a row after which completions were there already, [`CROWD`] at most.
    crowded: u32,
    /// Whether the last pass served one connection at most.
    alone: bool,
    /// What became of the event that fired last.
    event: Event,
    /// Looks that found nothing, less those that did.
    fruitless: u32,
    /// Passes to come in which no event is left.
    pause: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Event {
    /// It is not in the channel any more, or will not be after this pass.
    #[default]
    Taken,
    /// It came just now, and will be left.
    New,
    /// It was left by the pass before.
    Left,
}

impl Pace {
    /// A pace that waits for at most `limit`.
    pub fn new(limit: Nanos) -> Self {
        Self { limit, gap: Nanos::MAX, ..Self::default() }
    }

    /// The descriptor is readable. Until when may be looked for completions, once at least,
    /// before its event is taken? `None`: the event is to be taken now.
    pub fn patience(&mut self, now: Nanos) -> Option<Nanos> {
        if self.event == Event::Left {
            return Some(if self.is_close() { self.passed.saturating_add(self.limit) } else { 0 });
        }
        self.observe(now);
        if self.pause > 0 {
            self.pause -= 1;
            return None;
        }
        if self.crowded < CROWD && !self.is_close() {
            return None;
        }
        self.event = Event::New;
        // The completions that fired are there already.
        Some(0)
    }

    /// A look that [`patience`](Self::patience) allowed is over. Whether the event stays in
    /// the channel; otherwise it is to be taken now.
    pub fn looked(&mut self, found: bool, now: Nanos) -> bool {
        if !found {
            self.fruitless = LONGEST_PAUSE.min(self.fruitless + 1);
            self.pause = 1 << self.fruitless;
            self.crowded = 0;
            self.event = Event::Taken;
            return false;
        }
        if self.event == Event::Left {
            self.observe(now);
            self.fruitless = self.fruitless.saturating_sub(1);
        }
        self.event = Event::Left;
        true
    }

    /// The event was taken, whoever decided so.
    pub fn taken(&mut self) {
        self.event = Event::Taken;
    }

    /// A pass is over that served so many connections.
    pub fn passed(&mut self, served: usize, now: Nanos) {
        self.passed = now;
        self.alone = served <= 1;
    }

    /// Whether the queues are better armed at once, when their event is taken, than right
    /// before the server sleeps: a client that waits for its reply sends nothing more until
    /// then, so to look for it would be in vain.
    pub fn is_alone(&self) -> bool {
        self.alone && self.crowded == 0
    }

    /// The queues were looked at before the server sleeps, their event having been taken.
    pub fn looked_last(&mut self, found: bool) {
        self.crowded = if found { CROWD.min(self.crowded + 1) } else { 0 };
    }

    fn is_close(&self) -> bool {
        // A gap that was slept through holds the wake-up as well.
        self.limit > 0 && self.gap <= 2 * self.limit
    }

    fn observe(&mut self, now: Nanos) {
        let gap = now.saturating_sub(self.passed);
        // A gap of minutes must not be felt for minutes: none counts for more than ten limits.
        let most = 10 * self.limit;
        self.gap = (3 * self.gap.min(most) + gap.min(most)) / 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass at `now`, whose completions came `gap` after the one before.
    fn pass(pace: &mut Pace, now: &mut Nanos, gap: Nanos) -> bool {
        *now += gap;
        let Some(deadline) = pace.patience(*now) else {
            pace.passed(2, *now);
            return false;
        };
        let found = deadline == 0 || *now <= deadline;
        let left = pace.looked(found, *now);
        pace.passed(2, *now);
        left
    }

    #[test]
    fn events_are_left_where_completions_follow_closely() {
        let (mut pace, mut now) = (Pace::new(10), 1_000_000);
        assert!(!pass(&mut pace, &mut now, 5), "the first gap is since ever");
        let first = (0..20).find(|_| pass(&mut pace, &mut now, 5)).unwrap();
        assert!(first < 10);
        assert!((0..1000).all(|_| pass(&mut pace, &mut now, 5)));
        assert!(!pass(&mut pace, &mut now, 500), "it waited and nothing came");
    }

    #[test]
    fn nothing_is_waited_for_where_they_do_not() {
        let (mut pace, mut now) = (Pace::new(10), 0);
        assert!((0..1000).all(|_| !pass(&mut pace, &mut now, 50)));
        let mut off = Pace::new(0);
        assert!((0..1000).all(|_| !pass(&mut off, &mut now, 1)));
    }

    #[test]
    fn who_is_never_done_before_more_comes_does_not_sleep() {
        let (mut pace, mut now) = (Pace::new(10), 0);
        for _ in 0..CROWD {
            assert!(!pass(&mut pace, &mut now, 500));
            pace.looked_last(true);
        }
        for _ in 0..1000 {
            now += 500;
            assert_eq!(pace.patience(now), Some(0), "what there is, without waiting");
            assert!(pace.looked(true, now));
            pace.passed(2, now);
        }
        assert_eq!(pace.patience(now), Some(0));
        assert!(!pace.looked(false, now), "nothing more came");
        pace.looked_last(false);
        assert!((0..1000).all(|_| !pass(&mut pace, &mut now, 500)));
    }

    #[test]
    fn one_client_that_waits_for_its_replies_is_alone() {
        let (mut pace, now) = (Pace::new(10), 0);
        assert!(!pace.is_alone(), "who knows yet");
        pace.passed(1, now);
        assert!(pace.is_alone());
        pace.passed(2, now);
        assert!(!pace.is_alone());
        pace.looked_last(true);
        pace.passed(1, now);
        assert!(!pace.is_alone(), "more had come before the server slept");
        pace.looked_last(false);
        assert!(pace.is_alone());
    }

    #[test]
    fn waits_in_vain_become_rare() {
        let (mut pace, mut now) = (Pace::new(10), 0);
        let mut in_vain = 0;
        // Each second gap is a long one: the mean stays small, half of the waits are in vain.
        for round in 0..100_000_u64 {
            let waits = pace.event == Event::Left;
            let left = pass(&mut pace, &mut now, if round % 2 == 0 { 1 } else { 35 });
            in_vain += u32::from(waits && !left);
        }
        assert!(in_vain > 0);
        assert!(in_vain < 1000, "{in_vain}");
    }

    #[test]
    fn a_taken_event_is_not_waited_for() {
        let (mut pace, mut now) = (Pace::new(10), 0);
        while !pass(&mut pace, &mut now, 1) {}
        pace.taken();
        now += 1;
        assert_eq!(pace.patience(now), Some(0), "a new event, whose completions are there");
    }
}
