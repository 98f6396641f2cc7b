// SPDX-License-Identifier: BSD-3-Clause
//! The atomics of the hand-overs: the standard library's, or loom's in a model.

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
};

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// `std`'s cell behind the interface of loom's, so that one source serves both.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Runs `f` on a pointer to the value; the caller guarantees exclusiveness.
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

/// The only owner's look at a field that nobody else stores into: there is nothing to
/// order. Loom checks that it is so.
#[cfg(not(loom))]
pub(crate) fn own(field: &AtomicU64) -> u64 {
    field.load(Ordering::Relaxed)
}

#[cfg(loom)]
pub(crate) fn own(field: &AtomicU64) -> u64 {
    // SAFETY: loom fails where another thread may be storing.
    unsafe { field.unsync_load() }
}
