// SPDX-License-Identifier: BSD-3-Clause
//! A queue with a descriptor that is readable exactly while something is queued:
//! what completion channels, CM event channels and asynchronous events have in common.
//!
//! The descriptor is the application's to poll and to set non-blocking.

use crate::sys::{self, Fd};
use std::collections::VecDeque;
use std::io::Result;
use std::os::fd::RawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// See the module's documentation.
pub struct Notices<T> {
    fd: Fd,
    queue: Mutex<VecDeque<T>>,
    closed: AtomicBool,
}

impl<T> Notices<T> {
    pub fn new() -> Result<Self> {
        Ok(Notices {
            fd: sys::event_counter()?,
            queue: Mutex::default(),
            closed: AtomicBool::new(false),
        })
    }

    pub fn fd(&self) -> RawFd {
        self.fd.raw()
    }

    /// Queues a notice and makes the descriptor readable.
    pub fn push(&self, notice: T) {
        let mut queue = self.queue.lock().unwrap();
        if self.is_closed() {
            return;
        }
        queue.push_back(notice);
        sys::signal(&self.fd);
    }

    /// Queues a notice for which another process has made, or is just making, the
    /// descriptor readable. Who waited may have taken that signal away in between, as
    /// one that has no notice, and sleep again: so it is looked at after all.
    pub fn push_signalled(&self, notice: T) {
        self.push_for_caller(notice);
        self.signal();
    }

    /// Queues a notice that the caller, who is in [`Notices::pop`], takes itself.
    pub fn push_for_caller(&self, notice: T) {
        self.queue.lock().unwrap().push_back(notice);
    }

    /// True if a notice is queued.
    pub fn waiting(&self) -> bool {
        !self.queue.lock().unwrap().is_empty()
    }

    /// Makes the descriptor readable, in case it should be and is not.
    pub fn signal(&self) {
        if !sys::wait_readable(&self.fd, 0).unwrap_or(false) {
            sys::signal(&self.fd);
        }
    }

    /// Nothing comes any more: what is queued can still be taken, then there is EIO, and the
    /// descriptor polls as in error for ever.
    pub fn close(&self) {
        let _queue = self.queue.lock().unwrap();
        self.closed.store(true, Ordering::SeqCst);
        sys::put_in_error(&self.fd);
    }

    /// Closes the descriptor of what nobody may use any more, and which is never dropped.
    pub fn give_up_descriptor(&self) {
        self.fd.close_early();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Takes the oldest notice if there is one; `signalled` says that the caller has
    /// taken a signal off already. `reported` is told of it while nobody else can look.
    fn pop_front(&self, signalled: bool, reported: impl Fn(&T)) -> Option<T> {
        let mut queue = self.queue.lock().unwrap();
        let notice = queue.pop_front()?;
        reported(&notice);
        if self.is_closed() {
            return Some(notice);
        }
        if !signalled && !sys::take(&self.fd) {
            // The other process is between its decision and its signal, or was
            // killed there: then the descriptor is readable once for nothing.
            let _ = sys::wait_readable(&self.fd, 1);
            sys::take(&self.fd);
        }
        self.signal_for_rest(&queue);
        Some(notice)
    }

    /// Takes the oldest notice, waiting for one unless the descriptor is
    /// non-blocking; the error is an errno. `pull` looks for notices that
    /// another process has signalled, and says whether it queued one. `reported` counts it as
    /// such: who destroys what it is about finds it queued or counted.
    pub fn pop(
        &self,
        pull: impl Fn() -> bool,
        reported: impl Fn(&T),
    ) -> std::result::Result<T, i32> {
        let mut signalled = false;
        loop {
            if let Some(notice) = self.pop_front(signalled, &reported) {
                return Ok(notice);
            }
            if self.is_closed() {
                // Who waited has taken one off.
                sys::put_in_error(&self.fd);
                return Err(libc::EIO);
            }
            if pull() {
                continue;
            }
            // A signal that has no notice is forgotten, but only if there was still none
            // to be pulled after it: a signal comes after its reason. Whether this waits
            // is the application's choice, by the descriptor's flags.
            sys::await_signal(&self.fd).map_err(|e| e.raw_os_error().unwrap_or(libc::EINTR))?;
            signalled = true;
        }
    }

    /// Takes out every notice for which `pick` says so, in order.
    pub fn remove(&self, mut pick: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut queue = self.queue.lock().unwrap();
        let (out, keep): (Vec<T>, Vec<T>) = queue.drain(..).partition(|n| pick(n));
        queue.extend(keep);
        if self.is_closed() {
            return out;
        }
        for _ in &out {
            sys::take(&self.fd);
        }
        self.signal_for_rest(&queue);
        out
    }

    /// Not every notice has a signal of its own: the last one may have been taken for
    /// another notice than its own.
    fn signal_for_rest(&self, queue: &VecDeque<T>) {
        if !queue.is_empty() {
            self.signal();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_is_queued_or_reported_and_nothing_between() {
        let notices = Notices::new().unwrap();
        notices.push(1);
        // Who removes it would have to wait here.
        notices.pop(|| false, |_| assert!(notices.queue.try_lock().is_err())).unwrap();
    }

    fn is_readable<T>(notices: &Notices<T>) -> bool {
        sys::wait_readable(&notices.fd, 0).unwrap()
    }

    #[test]
    fn a_notice_whose_signal_was_taken_away_is_told_all_the_same() {
        let notices = Notices::new().unwrap();
        // The other process's signal came, and a waiting thread took it for a stale one.
        sys::signal(&notices.fd);
        assert!(sys::take(&notices.fd));
        notices.push_signalled(1);
        assert!(is_readable(&notices));
        assert_eq!(notices.pop_front(false, |_| ()), Some(1));
        assert!(!is_readable(&notices));
    }

    #[test]
    fn what_is_left_is_told_when_one_took_the_other_s_signal() {
        let notices = Notices::new().unwrap();
        notices.push(1);
        notices.push_signalled(2);
        notices.push(3);
        assert!(sys::take(&notices.fd));
        for expected in 1..=3 {
            assert!(is_readable(&notices));
            assert_eq!(notices.pop_front(false, |_| ()), Some(expected));
        }
        assert!(!is_readable(&notices));
        notices.push(4);
        notices.push_signalled(5);
        assert_eq!(notices.remove(|notice| *notice == 4), [4]);
        assert!(is_readable(&notices));
    }
}
