// SPDX-License-Identifier: BSD-3-Clause
//! How large a receive buffer is.
//!
//! It is pinned for as long as the connection lives, so an idle connection should have
//! a small one; and the peer stops at its end until the next announcement, so a busy
//! one should have a large one. The protocol allows another buffer only when the last
//! was filled to its last byte. So each announcement asks how long that took, and a
//! buffer that is filled quickly is followed by a larger one; and by one of two in
//! turn, so that the peer need not wait until it was read.
//!
//! What is gained is an announcement's way there and back, tens of microseconds, for
//! each buffer; what is lost, pinned memory and a registration on either side. So who
//! fills a buffer by few writes gets a larger one sooner: each of them bears a larger
//! part of what an announcement costs.

use crate::lifecycle::Millis;

/// A page of memory in bytes; all memory that is registered is whole ones.
pub const PAGE: u32 = 4096;

/// Bytes that a connection begins with.
pub const FIRST: u32 = 16 * 1024;

/// One buffer is so many times as large as the next smaller one. A peer may have to
/// register memory of the same size (libvalkey does), so the steps are few.
const STEP: u32 = 4;

/// A buffer that was full sooner after its announcement was too small.
const QUICK: Millis = 100;
/// The same of a buffer that at most [`FEW`] writes filled.
const QUICK_BY_FEW: Millis = 1_000;
/// An announcement costs about what a small request does, so that beyond so many
/// writes it is a small part of what they cost.
const FEW: u64 = 32;
/// Who has two of them and takes no longer keeps both: nobody is to have one made and
/// taken away in turn.
const STEADY: Millis = 1_000;
/// A buffer that took longer was too large.
const SLOW: Millis = 30_000;

/// Whether a peer that filled its buffer in so long should have two of them.
pub fn wants_two(filled_in: Millis, has_two: bool) -> bool {
    filled_in < if has_two { STEADY } else { QUICK }
}

/// Size of the buffer after one of `present` bytes that `writes` filled in `filled_in`,
/// where `most` is the largest that is allowed: whole pages, as both of these are.
pub fn next(present: u32, most: u32, filled_in: Millis, writes: u64) -> u32 {
    let quick = if writes <= FEW { QUICK_BY_FEW } else { QUICK };
    let next = if filled_in < quick {
        present.saturating_mul(STEP)
    } else if filled_in > SLOW {
        (present / STEP / PAGE * PAGE).max(FIRST)
    } else {
        present
    };
    next.min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u32 = 1024 * 1024;
    const MANY: u64 = FEW + 1;

    #[test]
    fn a_busy_connection_gets_all_in_three_steps() {
        let sizes: Vec<_> =
            std::iter::successors(Some(FIRST), |size| Some(next(*size, MOST, 3, MANY)))
                .take(5)
                .map(|size| size / 1024)
                .collect();
        assert_eq!(sizes, [16, 64, 256, 1024, 1024]);
    }

    #[test]
    fn a_slow_one_goes_back_to_where_it_began() {
        assert_eq!(next(MOST, MOST, SLOW + 1, 1), MOST / 4);
        assert_eq!(next(FIRST, MOST, SLOW + 1, 1), FIRST);
    }

    #[test]
    fn one_in_between_keeps_what_it_has() {
        assert_eq!(next(128 * 1024, MOST, QUICK, MANY), 128 * 1024);
        assert_eq!(next(128 * 1024, MOST, SLOW, 1), 128 * 1024);
    }

    #[test]
    fn one_that_few_writes_fill_grows_sooner() {
        assert_eq!(next(FIRST, MOST, QUICK_BY_FEW - 1, FEW), FIRST * STEP);
        assert_eq!(next(FIRST, MOST, QUICK_BY_FEW - 1, MANY), FIRST);
        assert_eq!(next(FIRST, MOST, QUICK_BY_FEW, FEW), FIRST);
    }

    #[test]
    fn a_second_one_is_kept_longer_than_it_is_given() {
        assert!(wants_two(QUICK - 1, false) && !wants_two(QUICK, false));
        assert!(wants_two(STEADY - 1, true) && !wants_two(STEADY, true));
    }

    #[test]
    fn whatever_the_setting_sizes_are_whole_pages_and_settle() {
        for asked in (64 << 10..=16 << 20).step_by(997) {
            let most = (asked / u64::from(PAGE)) as u32 * PAGE;
            let mut size = FIRST;
            for took in [[1; 12], [SLOW + 1; 12]].as_flattened() {
                let next = next(size, most, *took, MANY);
                assert!(next.is_multiple_of(PAGE) && next <= most, "{next} of {most}");
                size = next;
            }
            assert_eq!(size, FIRST);
            assert_eq!(next(most, most, 1, MANY), most, "a busy one stays at the setting");
        }
    }

    #[test]
    fn the_setting_is_the_most_and_nothing_overflows() {
        assert_eq!(next(64 * 1024, 64 * 1024, 0, 1), 64 * 1024);
        assert_eq!(next(u32::MAX, 16 << 20, 0, 1), 16 << 20);
    }
}
