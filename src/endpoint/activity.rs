// SPDX-License-Identifier: BSD-3-Clause
//! What a connection's writer did, and since when it is held back.
//!
//! What a connection waits for follows from its other state. Only the time at which writing was
//! held back has to be noted when the wait begins, on whichever thread that happens.

use crate::metrics::{Counter, METRICS};
use crate::time;
use proto::session::Millis;
use std::sync::atomic::{AtomicU64, Ordering};

/// The shortage that holds a write back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Shortage {
    /// The client's window is full.
    Window = 0,
    /// Staging memory or the send queue is full, until work requests complete.
    Staging = 1,
}

impl Shortage {
    fn counters(self) -> (&'static Counter, &'static Counter) {
        match self {
            Self::Window => (&METRICS.window_stalls, &METRICS.window_stalls_ms),
            Self::Staging => (&METRICS.staging_stalls, &METRICS.staging_stalls_ms),
        }
    }
}

/// A connection's writer: bytes sent, the time of its last write, and since when it is held
/// back. Any thread.
#[derive(Debug)]
pub struct Activity {
    /// The time at which the connection began.
    pub begun: Millis,
    sent: AtomicU64,
    /// When a write took bytes last.
    written: AtomicU64,
    /// 0, or one more than the time, twice, and the shortage in the lowest bit.
    held_back: AtomicU64,
}

impl Activity {
    /// Nothing yet.
    pub fn new(begun: Millis) -> Self {
        Self {
            begun,
            sent: AtomicU64::new(0),
            written: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
        }
    }

    /// A write took so many bytes: whatever held it back is over.
    pub fn wrote(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.written.store(time::now(), Ordering::Relaxed);
        if self.held_back.load(Ordering::Relaxed) != 0 {
            over(self.held_back.swap(0, Ordering::Relaxed));
        }
    }

    /// A write was held back, unless it was so already.
    pub fn hold_back(&self, shortage: Shortage) {
        if self.held_back().is_some_and(|(present, _)| present == shortage) {
            return;
        }
        let now = ((time::now() + 1) << 1) | shortage as u64;
        if shortage == Shortage::Window {
            // First: the main thread takes it off again as soon as it sees the shortage.
            METRICS.connections_window_full.add(1);
        }
        over(self.held_back.swap(now, Ordering::Relaxed));
        shortage.counters().0.add(1);
    }

    /// The client announced a window.
    pub fn window_opened(&self) {
        let present = self.held_back.load(Ordering::Relaxed);
        if unpack(present).is_some_and(|(shortage, _)| shortage == Shortage::Window)
            && self
                .held_back
                .compare_exchange(present, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            over(present);
        }
    }

    /// The shortage that holds the writer back, and the time at which it began.
    pub fn held_back(&self) -> Option<(Shortage, Millis)> {
        unpack(self.held_back.load(Ordering::Relaxed))
    }

    /// The time of the last write that took bytes; 0 if none did.
    pub fn written(&self) -> Millis {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes that writes took since the connection began.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        over(std::mem::take(self.held_back.get_mut()));
    }
}

fn unpack(held_back: u64) -> Option<(Shortage, Millis)> {
    let shortage = if held_back & 1 == 0 { Shortage::Window } else { Shortage::Staging };
    (held_back != 0).then(|| (shortage, (held_back >> 1) - 1))
}

/// Counts the time of a shortage that is over, if there was one.
fn over(held_back: u64) {
    let Some((shortage, since)) = unpack(held_back) else { return };
    shortage.counters().1.add(time::now().saturating_sub(since));
    if shortage == Shortage::Window {
        METRICS.connections_window_full.sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_shortage_lasts_until_bytes_flow_or_its_window_opens() {
        let activity = Activity::new(0);
        assert_eq!(activity.held_back(), None);
        activity.hold_back(Shortage::Window);
        let (_, since) = activity.held_back().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        activity.hold_back(Shortage::Window);
        assert_eq!(activity.held_back(), Some((Shortage::Window, since)), "the same still");
        activity.window_opened();
        assert_eq!(activity.held_back(), None);
        activity.hold_back(Shortage::Staging);
        activity.window_opened();
        assert!(activity.held_back().is_some(), "a window is no staging memory");
        activity.wrote(7);
        assert_eq!((activity.held_back(), activity.sent()), (None, 7));
        assert!(activity.written() >= since);
    }

    #[test]
    fn the_gauge_of_full_windows_is_never_less_than_nothing() {
        let activity = Activity::new(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // The more there are, the sooner one of them comes in between.
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        activity.window_opened();
                        let full = METRICS.connections_window_full.get();
                        assert!(full < 1000, "{full} connections");
                    }
                });
            }
            let begun = std::time::Instant::now();
            while begun.elapsed().as_millis() < 1500 {
                for _ in 0..1000 {
                    activity.hold_back(Shortage::Window);
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
