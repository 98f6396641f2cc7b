// SPDX-License-Identifier: BSD-3-Clause
//! The system's monotonic clock, read in two ways. Any thread.

use proto::busy_poll::Nanos;
use proto::session::Millis;

/// Milliseconds on the monotonic clock, exact to the kernel's tick (1 to 10 ms): read for each
/// completion, and the coarse clock costs a quarter of the fine one.
pub fn now() -> Millis {
    read(libc::CLOCK_MONOTONIC_COARSE) / 1_000_000
}

/// Nanoseconds on the same clock, at its full resolution.
pub fn nanos() -> Nanos {
    read(libc::CLOCK_MONOTONIC)
}

fn read(clock: libc::clockid_t) -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the answer; both clocks are there since Linux 2.6.32.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as Nanos * 1_000_000_000 + time.tv_nsec as Nanos
}
