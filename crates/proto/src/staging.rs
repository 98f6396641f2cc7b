// SPDX-License-Identifier: BSD-3-Clause
//! Larger staging memory of a connection: one region of each step at most.
//!
//! Work requests in flight read from the regions before the present one, so none is given
//! back before all are over. The peer decides how large its windows are, and so what is
//! asked for; that there is one place for each step, and no other, bounds what it can make
//! the server pin.

/// The three sizes that larger staging memory may have, in bytes, each larger than the one
/// before.
pub type Steps = [usize; 3];

/// The steps of a server: all of a region is written to in turn, so more than is needed is
/// memory that no cache holds. The last is the window of the usual client, who is to get all
/// of it at once.
pub const STEPS: Steps = [64 * 1024, 192 * 1024, 1024 * 1024];

/// Regions by step; the last that is there is in use. `R` is what a region is.
#[derive(Debug)]
pub struct Staging<R> {
    steps: Steps,
    regions: [Option<R>; 3],
}

impl<R> Staging<R> {
    /// No region yet.
    pub fn new(steps: Steps) -> Self {
        Self { steps, regions: [const { None }; 3] }
    }

    /// The region in use, unless the small staging memory is.
    pub fn present(&self) -> Option<&R> {
        self.regions.iter().flatten().next_back()
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &R> {
        self.regions.iter().flatten()
    }

    /// Gets a region by `make`, which is told its length, if `capacity`, the bytes of the
    /// present one, do not do: for `wanted` bytes twice as much, so that one half is sent
    /// while the other is copied to, and no larger than what holds the peer's `window`.
    ///
    /// Returns the length of the new one, unless there is none: what there is does, or `make`
    /// could not.
    pub fn enlarge(
        &mut self,
        wanted: usize,
        window: usize,
        capacity: usize,
        make: impl FnOnce(usize) -> Option<R>,
    ) -> Option<usize> {
        let useful = (2 * wanted).min(window);
        if useful <= capacity {
            return None;
        }
        let last = self.steps.len() - 1;
        let step = self.steps.iter().position(|step| *step >= useful).unwrap_or(last);
        // Behind the present one, or the ring in use would be another than the ledger's.
        if self.regions[step..].iter().any(Option::is_some) {
            return None;
        }
        self.regions[step] = Some(make(self.steps[step])?);
        Some(self.steps[step])
    }

    /// Gives all of them back.
    pub fn clear(&mut self) {
        self.regions = [const { None }; 3];
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const SMALL: usize = 14_080;

    /// What a peer that announces these windows, each of which is to be filled at once,
    /// makes the server have: the regions' lengths.
    fn regions(windows: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let (mut staging, mut capacity) = (Staging::new(STEPS), SMALL);
        for window in windows {
            let got = staging.enlarge(window, window, capacity, Some);
            capacity = got.unwrap_or(capacity);
            assert_eq!(staging.present().copied().unwrap_or(SMALL), capacity);
            assert!(capacity >= window.min(STEPS[2]), "{window} bytes and {capacity}");
        }
        staging.all().copied().collect()
    }

    #[test]
    fn whatever_the_windows_there_is_one_region_of_a_step() {
        const KIB: usize = 1024;
        assert_eq!(regions([1, KIB, SMALL]), [0; 0]);
        assert_eq!(regions((1..2000).map(|n| n * KIB)), STEPS, "growing");
        assert_eq!(regions((1..2000).rev().map(|n| n * KIB)), [STEPS[2]], "shrinking");
        let turns = (1..2000).map(|n| if n % 2 == 0 { n * KIB } else { (2000 - n) * KIB });
        assert_eq!(regions(turns), [STEPS[2]], "in turn");
        assert_eq!(regions([20 * KIB, 17 * KIB, 100 * KIB, 99 * KIB]), STEPS[..2]);
        assert_eq!(regions([u32::MAX as usize]), [STEPS[2]]);
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..1000 {
            let windows: Vec<_> = (0..50).map(|_| random.usize(1..3 << 20)).collect();
            let all = regions(windows);
            assert!(all.is_sorted() && all.iter().sum::<usize>() <= 1_310_720, "{all:?}");
        }
    }

    #[test]
    fn a_region_is_no_larger_than_what_is_of_use() {
        let step = |wanted, window| Staging::new(STEPS).enlarge(wanted, window, SMALL, Some);
        assert_eq!(step(16 << 10, 1 << 20), Some(STEPS[0]));
        assert_eq!(step(64 << 10, 1 << 20), Some(STEPS[1]), "twice as much");
        assert_eq!(step(100 << 10, 100 << 10), Some(STEPS[1]), "the window is no larger");
        assert_eq!(step(100 << 10, 1 << 20), Some(STEPS[2]));
        assert_eq!(step(10_000, 10_000), None, "what there is does");
    }

    #[test]
    fn one_that_can_not_be_had_changes_nothing() {
        let mut staging = Staging::new(STEPS);
        assert_eq!(staging.enlarge(1 << 20, 1 << 20, SMALL, |_| None), None);
        assert!(staging.present().is_none());
        staging.enlarge(1 << 20, 1 << 20, SMALL, |_| Some(())).unwrap();
        staging.clear();
        assert_eq!(staging.all().count(), 0);
    }
}
