// SPDX-License-Identifier: BSD-3-Clause
//! Waiting on the main thread while the server's event loop stands still.

use super::Poller;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// Time alone may be what is waited for: it is looked at once in so long.
const LOOK: Duration = Duration::from_millis(50);

impl Poller {
    /// Takes completions and connection events as they come, until `done` answers or the time
    /// is over. No handler of the server runs meanwhile. Returns what `done` answered. Main
    /// thread.
    pub fn wait_here<T>(
        &self,
        deadline: Instant,
        mut done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        loop {
            if let Some(answer) = done() {
                return Some(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            sleep_until_readable(&self.descriptors(), left.min(LOOK));
            self.catch_up();
        }
    }
}

fn sleep_until_readable(descriptors: &[RawFd], most: Duration) {
    let mut polled: Vec<_> = descriptors
        .iter()
        .map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
        .collect();
    let ms = most.as_millis().max(1) as i32;
    // SAFETY: as many structures as said.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, ms) };
}
