// SPDX-License-Identifier: BSD-3-Clause
//! The sum of the memory that the process has registered, and the limits on it.
//!
//! Registered memory is pinned, so it is resident from the start, and a program's own allocator
//! knows nothing of it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static REGISTERED: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);
static REGISTRATIONS: AtomicU64 = AtomicU64::new(0);
static LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);
static LIMIT_NAME: OnceLock<&'static str> = OnceLock::new();

/// Bytes that are registered now, and the most that ever were at one time.
pub fn registered() -> (u64, u64) {
    (REGISTERED.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed))
}

/// Regions that were registered so far.
pub fn registrations() -> u64 {
    REGISTRATIONS.load(Ordering::Relaxed)
}

/// Runs `trial`, which gives back all that it registers: none of it counts among the most
/// that was registered. (What another thread registers meanwhile counts if it is still there
/// in the end.)
pub fn uncounted<T>(trial: impl FnOnce() -> T) -> T {
    let peak = PEAK.load(Ordering::Relaxed);
    let result = trial();
    let peak = peak.max(REGISTERED.load(Ordering::Relaxed));
    PEAK.store(peak, Ordering::Relaxed);
    result
}

/// From now on a registration that would take the total above `bytes` fails. The text of that
/// error calls the limit by the first `name` that was given: what whoever may raise it knows.
pub fn limit_registered(bytes: u64, name: &'static str) {
    LIMIT_NAME.get_or_init(|| name);
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// The name of the limit, if there is one.
pub(crate) fn limit_name() -> Option<&'static str> {
    LIMIT_NAME.get().copied()
}

/// The process's limit on locked memory in bytes, if it has one.
pub fn locked_memory_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a structure to fill in.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Bytes of one region, which count as registered until it is dropped.
#[derive(Debug)]
pub(crate) struct Share(u64);

impl Share {
    /// Takes `bytes` of what the limit leaves, if it leaves as many.
    pub(crate) fn take(bytes: u64) -> Option<Self> {
        let total = REGISTERED.fetch_add(bytes, Ordering::Relaxed) + bytes;
        // Dropped, it gives back what was too much.
        let share = Self(bytes);
        (total <= LIMIT.load(Ordering::Relaxed)).then_some(share)
    }

    /// Counts the registration that it was taken for.
    pub(crate) fn count(&self) {
        REGISTRATIONS.fetch_add(1, Ordering::Relaxed);
        PEAK.fetch_max(REGISTERED.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        REGISTERED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, REGISTER_WITHIN};

    /// One test for all, since the account is the process's.
    #[test]
    fn what_is_registered_counts_and_is_limited() {
        limit_registered(100, "a limit");
        let first = Share::take(60).unwrap();
        first.count();
        assert!(Share::take(41).is_none());
        let error = Error { action: REGISTER_WITHIN, errno: libc::EDQUOT };
        assert!(error.to_string().ends_with(" total (a limit)"), "{error}");
        assert_eq!((registered(), registrations()), ((60, 60), 1), "refused is not counted");
        uncounted(|| Share::take(40).unwrap().count());
        assert_eq!((registered(), registrations()), ((60, 60), 2));
        let second = Share::take(40).unwrap();
        second.count();
        drop(first);
        assert_eq!(registered(), (40, 100));
        drop(second);
        limit_registered(u64::MAX, "none");
        assert_eq!(registered(), (0, 100));
    }
}
