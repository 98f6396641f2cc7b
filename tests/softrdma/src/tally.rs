// SPDX-License-Identifier: BSD-3-Clause
//! Counts of work, for tests: what a message costs must not depend on who is idle, nor what a
//! connection takes on who was there before.

use std::sync::atomic::{AtomicU64, Ordering};

/// How often some thread looked what there is to do for a queue pair.
pub static LOOKS: Tally = Tally(AtomicU64::new(0));
/// How often the progress thread did so because it was called.
pub static CALLS: Tally = Tally(AtomicU64::new(0));
/// How many numbers for queue pairs were made; giving one out again makes none.
pub static NUMBERS: Tally = Tally(AtomicU64::new(0));

/// A count of this process.
pub struct Tally(AtomicU64);

impl Tally {
    pub(crate) fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn so_far(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
