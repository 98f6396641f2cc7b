// SPDX-License-Identifier: BSD-3-Clause
//! Threads of the server that read a connection on their own.
//!
//! An I/O thread reads once, and the server collects its job on the main thread. From 9.0 on
//! another thread loads a replica's data: it reads until it has all, and the server tells us
//! nothing of it. So what it has read to the end is announced here, and here it waits for more.

use super::Poller;
use crate::endpoint::Endpoint;
use crate::endpoint::wr_id::EndpointId;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A wait is over after this long in any case, and looks again.
const NAP: Duration = Duration::from_millis(50);

/// What those threads and the main thread tell each other.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    /// Endpoints of which another thread has read a receive buffer to its end.
    read: Mutex<Vec<EndpointId>>,
    waiting: AtomicU32,
    /// How often the main thread has taken something in while somebody waited for it.
    arrivals: Mutex<u64>,
    arrived: Condvar,
    /// Passes before the server's sleeps.
    turns: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Poller {
    /// The calling thread has read a receive buffer of the endpoint to its end: the main thread
    /// announces it again. Any thread.
    pub fn read_elsewhere(&self, endpoint: &Endpoint) {
        lock(&self.elsewhere.read).push(endpoint.key());
        self.write_wake();
    }

    /// Announces what other threads have read to its end. Main thread.
    pub(super) fn announce_elsewhere(&self) {
        let read = std::mem::take(&mut *lock(&self.elsewhere.read));
        for endpoint in read.into_iter().filter_map(|key| self.find(key)) {
            self.lose_on_error(&endpoint, endpoint.announce_if_full());
        }
    }

    /// Waits on another thread than the main one, which has to go on meanwhile, until `done` says
    /// so or the time is over. Returns what `done` said.
    pub fn wait_elsewhere<T>(
        &self,
        deadline: Instant,
        mut done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let elsewhere = &self.elsewhere;
        elsewhere.waiting.fetch_add(1, Ordering::SeqCst);
        let answer = loop {
            let before = *lock(&elsewhere.arrivals);
            if let Some(answer) = done() {
                break Some(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break None;
            }
            let arrivals = lock(&elsewhere.arrivals);
            drop(
                elsewhere.arrived.wait_timeout_while(arrivals, left.min(NAP), |now| *now == before),
            );
        };
        elsewhere.waiting.fetch_sub(1, Ordering::SeqCst);
        answer
    }

    /// Something has arrived, or a connection is over: wakes those who wait. Main thread.
    pub(super) fn tell_elsewhere(&self) {
        if self.elsewhere.waiting.load(Ordering::SeqCst) > 0 {
            *lock(&self.elsewhere.arrivals) += 1;
            self.elsewhere.arrived.notify_all();
        }
    }

    /// The server's main thread has come round.
    pub(super) fn turn_elsewhere(&self) {
        self.elsewhere.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that stays the same while the server's main thread does not come round: then
    /// nothing arrives either. Any thread.
    pub fn turns(&self) -> u64 {
        self.elsewhere.turns.load(Ordering::Relaxed)
    }
}
