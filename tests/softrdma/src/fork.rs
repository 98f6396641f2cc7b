// SPDX-License-Identifier: BSD-3-Clause
//! What a forked child may do with the fabric: nothing, harmlessly.
//!
//! A child inherits every descriptor. If it kept the sockets, the peer of a
//! killed parent would go on believing that the parent lives, and a restarted
//! parent would find its own address taken. So the child closes them at once;
//! after that every call fails, because the progress thread does not exist there.

use std::os::fd::RawFd;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MAX_FD: usize = 1 << 20;
static PRIVATE: [AtomicU64; MAX_FD / 64] = [const { AtomicU64::new(0) }; MAX_FD / 64];
static IN_CHILD: AtomicBool = AtomicBool::new(false);
static STARTED: AtomicBool = AtomicBool::new(false);
static REGISTER: Once = Once::new();

/// True in a process that was forked from one in which the fabric was running.
pub fn in_child() -> bool {
    IN_CHILD.load(Ordering::Relaxed)
}

/// Called before the first descriptor or thread of the fabric exists.
pub fn prepare() {
    REGISTER.call_once(|| {
        // SAFETY: the handler only touches atomics and calls close(2), both of
        // which are allowed in the child of a multi-threaded process.
        unsafe { libc::pthread_atfork(None, None, Some(in_new_child)) };
        STARTED.store(true, Ordering::SeqCst);
    });
}

/// Notes a descriptor that a forked child must not keep.
pub fn note(fd: RawFd) {
    if let Some(word) = PRIVATE.get(fd as usize / 64) {
        word.fetch_or(1 << (fd as usize % 64), Ordering::Relaxed);
    }
}

/// Forgets a descriptor that is about to be closed.
pub fn forget(fd: RawFd) {
    if let Some(word) = PRIVATE.get(fd as usize / 64) {
        word.fetch_and(!(1 << (fd as usize % 64)), Ordering::Relaxed);
    }
}

extern "C" fn in_new_child() {
    if !STARTED.load(Ordering::Relaxed) {
        return;
    }
    IN_CHILD.store(true, Ordering::Relaxed);
    for (i, word) in PRIVATE.iter().enumerate() {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            let bit = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            // SAFETY: closing an inherited descriptor of our own.
            unsafe { libc::close((i * 64 + bit) as RawFd) };
        }
    }
}
