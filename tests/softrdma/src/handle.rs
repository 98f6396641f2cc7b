// SPDX-License-Identifier: BSD-3-Clause
//! Objects that the application holds by a C pointer, and how they end.
//!
//! Each object is an `Arc` whose data begins with the C struct of its interface;
//! the pointer that the application got owns one reference.

use std::sync::{Arc, Condvar, Mutex};

/// Hands a reference out as the C pointer.
pub fn into_c<T, C>(object: Arc<T>) -> *mut C {
    Arc::into_raw(object).cast_mut().cast()
}

/// Borrows the object behind a C pointer.
///
/// # Safety
/// The pointer came from [`into_c`] for the same `T` and was not destroyed yet.
pub unsafe fn borrow<'a, T, C>(pointer: *mut C) -> &'a T {
    // SAFETY: the caller's word.
    unsafe { &*pointer.cast::<T>() }
}

/// Another reference to the object behind a C pointer.
///
/// # Safety
/// As [`borrow`].
pub unsafe fn share<T, C>(pointer: *mut C) -> Arc<T> {
    // SAFETY: the caller's word; the count pays for the new reference.
    unsafe {
        Arc::increment_strong_count(pointer.cast::<T>());
        Arc::from_raw(pointer.cast::<T>())
    }
}

/// Takes the application's reference back.
///
/// # Safety
/// As [`borrow`]; the pointer is not used again.
pub unsafe fn take<T, C>(pointer: *mut C) -> Arc<T> {
    // SAFETY: the caller's word.
    unsafe { Arc::from_raw(pointer.cast::<T>()) }
}

/// Counts events that were reported and must be acknowledged before the object
/// they concern may be destroyed.
#[derive(Default)]
pub struct Acks {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Default)]
struct Counts {
    unacked: i64,
    waiters: u32,
}

impl Acks {
    pub fn reported(&self) {
        self.counts.lock().unwrap().unacked += 1;
    }

    pub fn ack(&self, n: u32) {
        let mut counts = self.counts.lock().unwrap();
        counts.unacked -= i64::from(n);
        // Nearly always nobody waits, and a notification is a system call.
        if counts.waiters > 0 {
            self.changed.notify_all();
        }
    }

    /// Blocks until everything reported is acknowledged.
    pub fn wait(&self) {
        let mut counts = self.counts.lock().unwrap();
        counts.waiters += 1;
        while counts.unacked > 0 {
            counts = self.changed.wait(counts).unwrap();
        }
        counts.waiters -= 1;
    }
}
