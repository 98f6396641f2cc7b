// SPDX-License-Identifier: BSD-3-Clause
//! State that belongs to the server's main thread.
//!
//! The server promises to call most of a connection type on its main thread
//! only. A [`MainCell`] holds it to that: it may lie in a structure that other
//! threads see too, and whoever opens it elsewhere, or while it is open, panics
//! at once, which the door to C turns into the end of one connection.

use std::cell::{RefCell, RefMut};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The main thread's pointer to itself, or 0. The thread lives as long as the process, so
/// no other ever has its number. Every access to a [`MainCell`] asks.
static MAIN: AtomicU64 = AtomicU64::new(0);

/// Declares the calling thread the main one. Later calls change nothing.
pub fn declare_main_thread() {
    let _ = MAIN.compare_exchange(0, this_thread(), Ordering::Relaxed, Ordering::Relaxed);
}

/// Whether the caller is the main thread. Before the declaration no thread is; in unit tests,
/// which have no server, each is.
pub fn is_main_thread() -> bool {
    let main = MAIN.load(Ordering::Relaxed);
    main == this_thread() || (cfg!(test) && main == 0)
}

/// The value of `pthread_self`, without the call: the word at the start of what the FS
/// register points to (System V ABI, AMD64 supplement on thread-local storage, variant II:
/// the thread pointer's own value). std's thread ids cost several times as much.
fn this_thread() -> u64 {
    let pointer: u64;
    // SAFETY: every thread of the process has its FS register set up by libc before it runs
    // any code; the word is only read.
    unsafe {
        std::arch::asm!("mov {}, fs:[0]", out(reg) pointer,
            options(pure, readonly, nostack, preserves_flags));
    }
    pointer
}

/// State of the server's main thread inside a structure that other threads hold too.
///
/// Only the main thread reaches the value, and one borrow at a time: both are checked at each
/// access. Whichever thread drops the last holder drops the value, thus `T: Send`.
#[derive(Default)]
pub struct MainCell<T: Send>(RefCell<T>);

// SAFETY: the value and the cell's borrow flag are reached through a shared reference by
// `open` alone, which refuses every thread but one; the value may be dropped on any.
unsafe impl<T: Send> Sync for MainCell<T> {}

impl<T: Send + fmt::Debug> fmt::Debug for MainCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if is_main_thread() { self.0.fmt(f) } else { f.write_str("MainCell(of the main thread)") }
    }
}

impl<T: Send> MainCell<T> {
    /// A cell around `value`.
    pub const fn new(value: T) -> Self {
        Self(RefCell::new(value))
    }

    /// The value, for the time of a statement or block in which no callback of the
    /// server runs.
    ///
    /// # Panics
    /// On another thread than the main one, or if it is open already.
    #[track_caller]
    pub fn borrow_mut(&self) -> RefMut<'_, T> {
        assert!(is_main_thread(), "state of the main thread opened on another");
        self.0.borrow_mut()
    }
}

/// A pointer that the main thread alone follows, so that what holds it may be dropped on any.
#[repr(transparent)]
#[derive(Debug)]
pub struct MainPtr<T>(pub *mut T);

// SAFETY: the pointer is a number to every thread; who follows it says why that is sound.
unsafe impl<T> Send for MainPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for MainPtr<T> {}

impl<T> MainPtr<T> {
    /// A pointer to nothing.
    pub const fn null() -> Self {
        Self(std::ptr::null_mut())
    }
}

impl<T> Clone for MainPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for MainPtr<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart() {
        let here = this_thread();
        assert_ne!(here, 0);
        assert_eq!(here, this_thread());
        // Both live at that time.
        assert_ne!(here, std::thread::spawn(this_thread).join().unwrap());
    }

    #[test]
    fn it_opens_once_at_a_time() {
        let cell = MainCell::new(1);
        *cell.borrow_mut() += 1;
        let first = cell.borrow_mut();
        let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| *cell.borrow_mut()));
        assert!(second.is_err());
        assert_eq!(*first, 2);
    }
}
