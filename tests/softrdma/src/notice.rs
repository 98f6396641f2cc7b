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

/// See the module's documentation.
pub struct Notices<T> {
    fd: Fd,
    queue: Mutex<VecDeque<T>>,
}

impl<T> Notices<T> {
    pub fn new() -> Result<Self> {
        Ok(Notices { fd: sys::event_counter()?, queue: Mutex::new(VecDeque::new()) })
    }

    pub fn fd(&self) -> RawFd {
        self.fd.raw()
    }

    /// Queues a notice and makes the descriptor readable.
    pub fn push(&self, notice: T) {
        let mut queue = self.queue.lock().unwrap();
        queue.push_back(notice);
        sys::signal(&self.fd);
    }

    /// Takes the oldest notice if there is one.
    pub fn try_pop(&self) -> Option<T> {
        let mut queue = self.queue.lock().unwrap();
        let notice = queue.pop_front()?;
        sys::take(&self.fd);
        Some(notice)
    }

    /// Takes the oldest notice, waiting for one unless the descriptor is
    /// non-blocking; the error is an errno.
    pub fn pop(&self) -> std::result::Result<T, i32> {
        loop {
            if let Some(notice) = self.try_pop() {
                return Ok(notice);
            }
            // SAFETY: no pointers.
            let flags = unsafe { libc::fcntl(self.fd.raw(), libc::F_GETFL) };
            if flags < 0 || flags & libc::O_NONBLOCK != 0 {
                return Err(libc::EAGAIN);
            }
            let mut p = libc::pollfd { fd: self.fd.raw(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            if unsafe { libc::poll(&raw mut p, 1, -1) } < 0 {
                return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINTR));
            }
        }
    }

    /// Takes out every notice for which `pick` says so, in order.
    pub fn remove(&self, mut pick: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut queue = self.queue.lock().unwrap();
        let (out, keep): (Vec<T>, Vec<T>) = queue.drain(..).partition(|n| pick(n));
        queue.extend(keep);
        for _ in &out {
            sys::take(&self.fd);
        }
        out
    }
}
