// SPDX-License-Identifier: BSD-3-Clause
//! The progress thread: one for each process, asleep in epoll unless its bell,
//! a socket or a timer calls. It plays the part of the adapter, which moves data
//! and runs the connection protocol while the application does something else.

use crate::board::{self, Mood, PROGRESS};
use crate::fork;
use crate::sys::{self, Fd};
use crate::verbs::qp;
use std::cmp::Ordering as Order;
use std::collections::{BinaryHeap, HashMap};
use std::os::fd::RawFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Something with a descriptor that the progress thread watches.
pub trait Source: Send + Sync {
    /// Called on the progress thread when the descriptor is ready.
    fn ready(self: Arc<Self>);
}

type Job = Box<dyn FnOnce() + Send>;

struct Timer {
    at: Instant,
    order: u64,
    job: Job,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Order::Equal
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Order> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    // Reversed, because BinaryHeap hands out the greatest first.
    fn cmp(&self, other: &Self) -> Order {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// See the module's documentation.
pub struct Engine {
    epoll: Fd,
    /// Rung by other threads and, for what hangs on the notice board, by other processes.
    bell: Fd,
    next: AtomicU64,
    sources: Mutex<HashMap<u64, Arc<dyn Source>>>,
    timers: Mutex<Timers>,
}

#[derive(Default)]
struct Timers {
    heap: BinaryHeap<Timer>,
    /// When the thread looks at the timers again by itself, if ever.
    looks_at: Option<Instant>,
}

/// A watched descriptor's registration.
#[derive(Clone, Copy, Debug)]
pub struct Watch(u64);

const BELL: u64 = 0;

/// The process's engine; started at the first call.
pub fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    static THREAD: OnceLock<()> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| {
        fork::prepare();
        // SAFETY: no pointers.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        assert!(epoll >= 0, "softrdma: no epoll descriptor");
        let bell = sys::doorbell().expect("softrdma: no event descriptor");
        let engine = Engine {
            epoll: Fd::private(epoll),
            bell,
            next: AtomicU64::new(1),
            sources: Mutex::new(HashMap::new()),
            timers: Mutex::new(Timers::default()),
        };
        let events = libc::EPOLLIN | libc::EPOLLET;
        engine.control(libc::EPOLL_CTL_ADD, engine.bell.raw(), events, BELL);
        engine
    });
    THREAD.get_or_init(|| spawn(engine));
    engine
}

fn spawn(engine: &'static Engine) {
    // Signals are the application's: the thread starts with all of them blocked.
    // SAFETY: both sets are valid for the calls.
    let old = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
        old
    };
    std::thread::Builder::new()
        .name("softrdma".into())
        .spawn(|| {
            // Without its progress the process would only seem to hang.
            if std::panic::catch_unwind(AssertUnwindSafe(|| engine.run())).is_err() {
                std::process::abort();
            }
        })
        .expect("softrdma: no thread");
    // SAFETY: restores the mask read above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut()) };
}

/// Serves the queue pairs that the thread was called for; false if there are calls
/// again. Looked after at each turn: who called may have been killed before it rang.
fn answer_calls() -> bool {
    let board = &board::own().board;
    board.take(PROGRESS, qp::called);
    if board.mood(PROGRESS) != Mood::Armed {
        board.set_mood(PROGRESS, Mood::Armed);
    }
    !board.has_news(PROGRESS)
}

impl Engine {
    fn control(&self, op: i32, fd: RawFd, events: i32, token: u64) {
        let mut e = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: one valid event.
        unsafe { libc::epoll_ctl(self.epoll.raw(), op, fd, &raw mut e) };
    }

    /// The descriptor by which other processes call the progress thread.
    pub fn bell(&self) -> RawFd {
        self.bell.raw()
    }

    /// Watches a descriptor for input.
    pub fn watch(&self, fd: RawFd, source: Arc<dyn Source>) -> Watch {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        self.sources.lock().unwrap().insert(token, source);
        self.control(libc::EPOLL_CTL_ADD, fd, libc::EPOLLIN, token);
        Watch(token)
    }

    /// Stops watching. A call of `ready` may still be running.
    pub fn unwatch(&self, watch: Watch, fd: RawFd) {
        if self.sources.lock().unwrap().remove(&watch.0).is_some() {
            self.control(libc::EPOLL_CTL_DEL, fd, 0, 0);
        }
    }

    /// Runs a job on the progress thread after a delay.
    pub fn after(&self, delay: Duration, job: impl FnOnce() + Send + 'static) {
        let order = self.next.fetch_add(1, Ordering::Relaxed);
        let timer = Timer { at: Instant::now() + delay, order, job: Box::new(job) };
        let mut timers = self.timers.lock().unwrap();
        let early = timers.looks_at.is_none_or(|at| timer.at < at);
        if early {
            timers.looks_at = Some(timer.at);
        }
        timers.heap.push(timer);
        drop(timers);
        if early {
            sys::signal(&self.bell);
        }
    }

    /// Runs a job on the progress thread as soon as it can: for work that must
    /// not run under the caller's locks.
    pub fn soon(&self, job: impl FnOnce() + Send + 'static) {
        self.after(Duration::ZERO, job);
    }

    fn run(&self) {
        // SAFETY: all zeroes is a valid event.
        let mut events: [libc::epoll_event; 64] = unsafe { std::mem::zeroed() };
        loop {
            let timeout = self.run_timers();
            let timeout = if answer_calls() { timeout } else { 0 };
            // SAFETY: the array has room for 64 events.
            let n = unsafe { libc::epoll_wait(self.epoll.raw(), events.as_mut_ptr(), 64, timeout) };
            for e in &events[..n.max(0) as usize] {
                let token = e.u64;
                let source = self.sources.lock().unwrap().get(&token).cloned();
                if let Some(source) = source {
                    source.ready();
                }
            }
        }
    }

    /// Runs what is due; answers how long epoll may sleep, in milliseconds.
    fn run_timers(&self) -> i32 {
        loop {
            let job = {
                let mut timers = self.timers.lock().unwrap();
                let Some(first) = timers.heap.peek() else {
                    timers.looks_at = None;
                    return -1;
                };
                let left = first.at.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    timers.looks_at = Some(first.at);
                    // Rounded up: a timer never fires early. 1 ms is fine enough
                    // for every timer but the shortest RNR ones.
                    return left.as_millis().min(60_000) as i32 + 1;
                }
                timers.heap.pop().map(|t| t.job)
            };
            if let Some(job) = job {
                job();
            }
        }
    }
}
