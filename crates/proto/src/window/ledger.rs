// SPDX-License-Identifier: BSD-3-Clause
//! Work requests and staging bytes in flight, and who may post the next one.
//!
//! A write copies into staging memory and posts work requests that read from it;
//! both are given back by completions, which the poller sees. Completions are
//! asked for only as often as reclaiming needs them: at the latest after half
//! of the work requests or a quarter of the staging bytes, so that a writer that
//! finds no room always has a completion outstanding that will bring some. One
//! that comes when the server has nothing else to do wakes it up for nothing.
//!
//! The ledger also decides who writes. The server calls a connection's `write`
//! from one thread at a time, but that is its promise, not ours: [`SendLedger::writer`]
//! is a lock that is only ever tried, and whoever finds it taken comes back later.

use super::sync::{AtomicBool, AtomicU64, Ordering, UnsafeCell, own};
use std::ops::{Deref, DerefMut};

/// A contiguous piece of staging memory to copy into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset from the start of the staging memory in bytes.
    pub offset: usize,
    /// Length in bytes, never 0.
    pub length: usize,
}

/// The account of work requests and staging bytes in flight on one connection. `T` is other
/// state of the writer.
#[derive(Debug)]
pub struct SendLedger<T> {
    /// Taken while a [`Writer`] exists.
    busy: AtomicBool,
    state: UnsafeCell<State<T>>,
    /// Work requests posted since the connection began; stored by the writer.
    posted: AtomicU64,
    /// Work requests known to be over; stored by the poller.
    completed: AtomicU64,
    /// Staging bytes known to be free again; stored by the poller.
    reclaimed: AtomicU64,
    /// Staging position behind each work request in flight, by sequence number
    /// modulo the depth; stored by the writer before it posts.
    ends: Box<[AtomicU64]>,
}

#[derive(Debug)]
struct State<T> {
    /// Staging bytes handed out since the connection began.
    produced: u64,
    /// Value of `produced` at which the present staging memory was installed.
    origin: u64,
    /// Size of the present staging memory in bytes.
    capacity: usize,
    /// `posted` and `produced` at the last signalled work request.
    signalled: (u64, u64),
    own: T,
}

// SAFETY: `state` is reached only through a `Writer`, of which `busy` allows one
// at a time; its taking and giving back are an acquire and a release.
unsafe impl<T: Send> Sync for SendLedger<T> {}

impl<T> SendLedger<T> {
    /// A ledger for `depth` work requests in flight over `capacity` bytes of staging.
    pub fn new(depth: usize, capacity: usize, own: T) -> Self {
        Self {
            busy: AtomicBool::new(false),
            state: UnsafeCell::new(State {
                produced: 0,
                origin: 0,
                capacity,
                signalled: (0, 0),
                own,
            }),
            posted: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            reclaimed: AtomicU64::new(0),
            ends: (0..depth).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The right to write, unless somebody has it at this moment. Never waits.
    pub fn writer(&self) -> Option<Writer<'_, T>> {
        self.busy
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Writer { ledger: self })
    }

    /// The right to write, if every work request is known to be over and nobody has it.
    /// The order matters: who asks first and takes the right afterwards may have had
    /// a whole write in between, and would free memory that is in flight.
    pub fn idle_writer(&self) -> Option<Writer<'_, T>> {
        self.writer().filter(|_| self.is_idle())
    }

    /// Poller: work requests up to and without number `sequence` are over. Only the
    /// low 24 bits of `sequence` count, as many as a work request's id carries.
    ///
    /// Returns whether that gave anything back; a number that was never posted does not.
    pub fn retire(&self, sequence: u32) -> bool {
        let completed = own(&self.completed);
        let posted = self.posted.load(Ordering::Acquire);
        let ahead = u64::from(sequence.wrapping_sub(completed as u32) & 0x00ff_ffff);
        if ahead == 0 || completed + ahead > posted {
            return false;
        }
        let now = completed + ahead;
        let end = self.ends[((now - 1) % self.ends.len() as u64) as usize].load(Ordering::Relaxed);
        // Release: the device is done with the staging memory before it is reused.
        self.reclaimed.store(end, Ordering::Release);
        self.completed.store(now, Ordering::Release);
        true
    }

    /// Whether every posted work request is known to be over.
    pub fn is_idle(&self) -> bool {
        self.completed.load(Ordering::Relaxed) == self.posted.load(Ordering::Relaxed)
    }

    /// Work requests that are not known to be over. Exact while nobody writes.
    pub fn in_flight(&self) -> u64 {
        let completed = self.completed.load(Ordering::Relaxed);
        self.posted.load(Ordering::Relaxed).saturating_sub(completed)
    }

    /// Work requests posted since the connection began.
    pub fn total_posted(&self) -> u64 {
        self.posted.load(Ordering::Relaxed)
    }

    /// Work requests that may be posted now without overrunning the send queue.
    pub fn credit(&self) -> usize {
        self.credit_after(self.posted.load(Ordering::Relaxed))
    }

    fn credit_after(&self, posted: u64) -> usize {
        self.ends.len() - (posted - self.completed.load(Ordering::Acquire)) as usize
    }
}

/// The right to write to one connection; dropping it gives it back.
#[derive(Debug)]
pub struct Writer<'a, T> {
    ledger: &'a SendLedger<T>,
}

impl<T> Writer<'_, T> {
    fn with<R>(&mut self, f: impl FnOnce(&mut State<T>) -> R) -> R {
        // SAFETY: this `Writer` is the only one, see `SendLedger::writer`, and
        // `&mut self` makes this the only use of it.
        self.ledger.state.with_mut(|state| f(unsafe { &mut *state }))
    }

    /// Bytes of staging memory that are free, contiguous or not.
    pub fn free(&mut self) -> usize {
        let reclaimed = self.ledger.reclaimed.load(Ordering::Acquire);
        self.with(|s| s.capacity - (s.produced - reclaimed.max(s.origin)) as usize)
    }

    /// The next piece of staging memory, `want` bytes or what is there of them.
    /// `None` when there is none, or no work request left to send it with.
    pub fn chunk(&mut self, want: usize) -> Option<Chunk> {
        if want == 0 || self.ledger.credit_after(own(&self.ledger.posted)) == 0 {
            return None;
        }
        let free = self.free();
        self.with(|s| {
            let offset = (s.produced - s.origin) as usize % s.capacity;
            let length = want.min(free).min(s.capacity - offset);
            (length > 0).then_some(Chunk { offset, length })
        })
    }

    /// Enters the work request for `length` bytes of the last [`chunk`](Self::chunk),
    /// before it is posted. Returns its sequence number modulo 2^24 and whether
    /// a completion must be asked for.
    pub fn enter(&mut self, length: usize) -> (u32, bool) {
        let depth = self.ledger.ends.len() as u64;
        let posted = own(&self.ledger.posted);
        let (end, signal) = self.with(|s| {
            s.produced += length as u64;
            let signal = posted + 1 - s.signalled.0 >= depth / 2
                || s.produced - s.signalled.1.max(s.origin) >= (s.capacity / 4) as u64;
            if signal {
                s.signalled = (posted + 1, s.produced);
            }
            (s.produced, signal)
        });
        self.ledger.ends[(posted % depth) as usize].store(end, Ordering::Relaxed);
        self.ledger.posted.store(posted + 1, Ordering::Release);
        (posted as u32 & 0x00ff_ffff, signal)
    }

    /// Sequence number that the next work request will have, modulo 2^24: what stands
    /// before it is posted already, and stays so while this `Writer` is held.
    pub fn next_sequence(&self) -> u32 {
        own(&self.ledger.posted) as u32 & 0x00ff_ffff
    }

    /// Takes back the last [`enter`](Self::enter), whose work request the send queue
    /// refused.
    pub fn take_back(&mut self, length: usize) {
        let posted = own(&self.ledger.posted) - 1;
        self.with(|s| {
            s.produced -= length as u64;
            if s.signalled.0 > posted {
                // As if nothing were signalled yet: the next work request will be.
                s.signalled = (0, 0);
            }
        });
        self.ledger.posted.store(posted, Ordering::Release);
    }

    /// Other staging memory of `capacity` bytes is used from now on. Work requests
    /// in flight still read from the one before: the caller keeps it.
    pub fn install(&mut self, capacity: usize) {
        self.with(|s| {
            s.origin = s.produced;
            s.capacity = capacity;
        });
    }

    /// Size of the present staging memory in bytes.
    pub fn capacity(&mut self) -> usize {
        self.with(|s| s.capacity)
    }
}

impl<T> Deref for Writer<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: as in `with`; the borrow ends with that of `self`.
        self.ledger.state.with_mut(|state| unsafe { &(*state).own })
    }
}

impl<T> DerefMut for Writer<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `with`; the borrow ends with that of `self`.
        self.ledger.state.with_mut(|state| unsafe { &mut (*state).own })
    }
}

impl<T> Drop for Writer<'_, T> {
    fn drop(&mut self) {
        self.ledger.busy.store(false, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_writer_at_a_time() {
        let ledger = SendLedger::new(8, 64, ());
        let writer = ledger.writer().unwrap();
        assert!(ledger.writer().is_none());
        drop(writer);
        assert!(ledger.writer().is_some());
    }

    #[test]
    fn staging_is_a_ring_that_completions_give_back() {
        let ledger = SendLedger::new(8, 100, ());
        let mut writer = ledger.writer().unwrap();
        assert_eq!(writer.chunk(60), Some(Chunk { offset: 0, length: 60 }));
        let (first, signal) = writer.enter(60);
        assert!(signal, "more than a quarter of the staging memory");
        assert_eq!(writer.chunk(60), Some(Chunk { offset: 60, length: 40 }));
        let (second, _) = writer.enter(40);
        assert_eq!(writer.chunk(1), None);
        assert_eq!(ledger.in_flight(), 2);
        assert!(ledger.retire(first + 1));
        assert_eq!(ledger.in_flight(), 1);
        assert_eq!(writer.chunk(70), Some(Chunk { offset: 0, length: 60 }));
        assert!(ledger.retire(second + 1));
        assert!(ledger.is_idle());
        assert!(!ledger.retire(second + 1), "nothing new");
        assert!(!ledger.retire(second + 5), "never posted");
    }

    #[test]
    fn whoever_finds_no_room_has_a_completion_outstanding() {
        for (depth, capacity, piece) in [(8, 1 << 20, 1), (8, 64, 1), (32, 4096, 100), (4, 8, 3)] {
            let ledger = SendLedger::new(depth, capacity, ());
            let mut last_signalled = None;
            for _round in 0..100 {
                let mut writer = ledger.writer().unwrap();
                while let Some(chunk) = writer.chunk(piece) {
                    let (sequence, signal) = writer.enter(chunk.length);
                    if signal {
                        last_signalled = Some(sequence);
                    }
                }
                let sequence = last_signalled.take().expect("stuck without a completion to come");
                assert!(ledger.retire(sequence + 1));
            }
        }
    }

    #[test]
    fn new_staging_memory_is_free_whatever_the_old_one_has_in_flight() {
        let ledger = SendLedger::new(8, 16, ());
        let mut writer = ledger.writer().unwrap();
        writer.chunk(10).unwrap();
        let (first, _) = writer.enter(10);
        writer.install(1000);
        assert_eq!(writer.chunk(2000), Some(Chunk { offset: 0, length: 1000 }));
        let (second, _) = writer.enter(1000);
        assert_eq!(writer.chunk(1), None);
        assert!(ledger.retire(first + 1));
        assert_eq!(writer.chunk(1), None, "the old memory's bytes are not the new one's");
        assert!(ledger.retire(second + 1));
        assert_eq!(writer.free(), 1000);
    }

    #[test]
    fn a_refused_work_request_leaves_no_trace() {
        let ledger = SendLedger::new(8, 64, ());
        let mut writer = ledger.writer().unwrap();
        writer.chunk(40).unwrap();
        assert_eq!(writer.enter(40), (0, true));
        writer.take_back(40);
        assert!(ledger.is_idle());
        assert_eq!(writer.chunk(64), Some(Chunk { offset: 0, length: 64 }));
        assert_eq!(writer.enter(40), (0, true), "a completion that was lost is asked for again");
    }

    #[test]
    fn sequence_numbers_survive_their_24_bits() {
        let ledger = SendLedger::new(4, 64, ());
        let mut writer = ledger.writer().unwrap();
        let start = 0x00ff_fffe;
        ledger.posted.store(start, Ordering::Relaxed);
        ledger.completed.store(start, Ordering::Relaxed);
        let mut last = 0;
        for _ in 0..4 {
            writer.chunk(1).unwrap();
            last = writer.enter(1).0;
        }
        assert_eq!(last, 1);
        assert!(ledger.retire(2));
        assert!(ledger.is_idle());
    }
}
