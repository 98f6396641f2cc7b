// SPDX-License-Identifier: BSD-3-Clause
//! Where endpoints go when they are removed: a thread that gives back what they consist of.
//!
//! To disconnect a queue pair and destroy it, with its memory regions, its protection domain
//! and its id, takes several commands of the device, about a millisecond together, and the last
//! of them waits in the kernel, for as long as it likes, until the connection manager is done.
//! Thousands of connections that end at once would keep the main thread from everything else
//! for seconds. So it only takes an endpoint out of its registry and hands it over.
//!
//! What makes that sound:
//! * Nobody finds a removed endpoint any more: completions and events of it are dropped, as
//!   they are of one that is destroyed. Should somebody still hold it, then whoever lets go of
//!   it last destroys it.
//! * What endpoints share is counted by atomics: a completion queue lives until the last queue
//!   pair on it is gone, and its entries are given back afterwards ([`crate::device`]); an
//!   endpoint's key is taken again only after that too ([`crate::endpoint::place`]).
//! * libibverbs and librdmacm may be called from any thread. An id whose event the main thread
//!   is reading is freed after that event was acknowledged, and has no queue pair any more that
//!   the reading could change.
//! * A forked child has no such thread and calls nothing here. A process that ends takes the
//!   thread along at whichever step; the kernel gives back the rest.

use crate::endpoint::Endpoint;
use crate::metrics::METRICS;
use crate::panic::guard;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// Endpoints that may wait for the thread before newcomers see to one each.
const WAITING: usize = 1024;

static QUEUE: Mutex<Queue> =
    Mutex::new(Queue { connected: VecDeque::new(), disconnected: VecDeque::new() });
static BELL: Condvar = Condvar::new();
/// Whether there is a thread; settled by the first endpoint that ends.
static THREAD: OnceLock<bool> = OnceLock::new();

/// Endpoints that were removed.
struct Queue {
    /// Those whose peers are to be told first.
    connected: VecDeque<Arc<Endpoint>>,
    disconnected: VecDeque<Arc<Endpoint>>,
}

/// Disconnects and destroys an endpoint that is in the registry no more, in the stage that is
/// called ending. `no_thread` logs why there is no thread, once. Main thread.
pub(super) fn hand_over(endpoint: Arc<Endpoint>, no_thread: impl FnOnce(&str)) {
    if *THREAD.get_or_init(|| start(no_thread)) {
        lock(&QUEUE).connected.push_back(endpoint);
        BELL.notify_one();
    } else {
        endpoint.id().disconnect();
        destroy(endpoint);
    }
}

/// For a newcomer: where more wait than the thread gets done, destroys one of them, so that it
/// is never more than came and went. Main thread.
pub(super) fn help() {
    let mut queue = lock(&QUEUE);
    if queue.connected.len() + queue.disconnected.len() <= WAITING {
        return;
    }
    let Some(endpoint) = queue.disconnected.pop_front() else { return };
    drop(queue);
    destroy(endpoint);
}

/// Starts the thread. Returns whether that worked.
fn start(no_thread: impl FnOnce(&str)) -> bool {
    without_signals(|| {
        let thread = std::thread::Builder::new().name(String::from("rdma-teardown"));
        let result = thread.spawn(work);
        if let Err(error) = &result {
            let what = format!("no thread for what ended: {error}; the main thread sees to it");
            no_thread(&what);
        }
        result.is_ok()
    })
}

/// Runs `body` with all signals blocked that are not about the running code itself, as a
/// thread that it starts keeps them: the server's own are for its main thread.
fn without_signals<T>(body: impl FnOnce() -> T) -> T {
    // SAFETY: signal sets are plain memory, which the first call fills; the mask is this
    // thread's own, and as it was afterwards.
    unsafe {
        let (mut none, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut none);
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGABRT] {
            libc::sigdelset(&mut none, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, &mut before);
        let result = body();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}

fn work() {
    let mut queue = lock(&QUEUE);
    loop {
        // Peers that wait for their end come first: to destroy takes longer.
        if let Some(endpoint) = queue.connected.pop_front() {
            drop(queue);
            endpoint.id().disconnect();
            queue = lock(&QUEUE);
            queue.disconnected.push_back(endpoint);
        } else if let Some(endpoint) = queue.disconnected.pop_front() {
            drop(queue);
            destroy(endpoint);
            queue = lock(&QUEUE);
        } else {
            queue = BELL.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn destroy(endpoint: Arc<Endpoint>) {
    guard("the end of an endpoint", || drop(endpoint));
    METRICS.connections_ending.sub(1);
}

/// Nobody panics with one of these locked, and what is in them would be right all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
