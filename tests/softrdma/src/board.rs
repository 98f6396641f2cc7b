// SPDX-License-Identifier: BSD-3-Clause
//! The notice board of a process: who has news for whom.
//!
//! One piece of shared memory for each process, mapped by every process that it is
//! connected to. Each queue pair has a few *slips* on it, each completion queue a
//! *hook*, and hook 0 is the progress thread's. Who has put something on a wire
//! hangs the wire's slip on the hook of whom it concerns; the owner takes all slips
//! down at once. So news are found where they are, however many queue pairs are idle.
//!
//! A hook is one word: the last slip that was hung there, which names the one before
//! it, and the owner's [`Mood`]. Hanging a slip and learning whether the owner has
//! to be woken is one step, and so is the owner's look back, hence no wake-up is lost.
//!
//! All of it is a hint. A slip that hangs for nothing costs one look at its queue
//! pair, and a process that is killed in the middle leaves one slip unusable.

use crate::fork;
use crate::sys::{self, Fd};
use crate::tally;
use std::collections::{HashMap, VecDeque};
use std::io::Result;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, Weak};

const HOOKS: u32 = 1 << 16;
const SLIPS: u32 = 1 << 18;
/// Each hook has a cache line: other processes write to its neighbours.
const STRIDE: usize = 64;
const SIZE: usize = HOOKS as usize * STRIDE + SLIPS as usize * size_of::<AtomicU32>();
/// Slips of one queue pair.
const EACH: u32 = 4;

/// How many numbers that came back are not given out again yet.
const RESTING: usize = 64;

/// The progress thread's hook.
pub const PROGRESS: u32 = 0;

/// What is known of a hook's owner.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Mood {
    /// Nobody is known to come: news that can't wait are the progress thread's.
    Away = 0,
    /// Sleeps, and whoever has news may wake it.
    Armed = 1,
    /// Was woken, and is on its way.
    Told = 2,
    /// Sleeps, and only its own progress thread may wake it.
    Indirect = 3,
}

impl Mood {
    fn of(word: u64) -> Mood {
        [Mood::Away, Mood::Armed, Mood::Told, Mood::Indirect][(word >> 32 & 3) as usize]
    }
    fn bits(self) -> u64 {
        (self as u64) << 32
    }
}

/// A slip that hangs nowhere.
const FREE: u32 = 0;
/// The end of a chain of slips.
const LAST: u32 = u32::MAX;

/// Where a queue pair wants its news: a slip, and the hook for it.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Place {
    pub slip: u32,
    pub hook: u32,
}

/// The mapped memory of a board, one's own or another process's.
pub struct Board(*mut u8);

// SAFETY: a mapping that lives as long as its owner, and all of it is atomic.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

impl Drop for Board {
    fn drop(&mut self) {
        if !fork::in_child() {
            // SAFETY: our own mapping, no longer referenced.
            unsafe { libc::munmap(self.0.cast(), SIZE) };
        }
    }
}

impl Board {
    fn hook(&self, n: u32) -> &AtomicU64 {
        // SAFETY: within the mapping, aligned, and zeroes are a valid value.
        unsafe { &*self.0.add((n % HOOKS) as usize * STRIDE).cast() }
    }

    /// Numbers come from other processes, hence they are looked at.
    fn slip(&self, n: u32) -> Option<&AtomicU32> {
        let at = HOOKS as usize * STRIDE + n as usize * size_of::<AtomicU32>();
        // SAFETY: within the mapping, aligned, and zeroes are a valid value.
        (n != FREE && n < SLIPS).then(|| unsafe { &*self.0.add(at).cast() })
    }

    /// Hangs a slip, after its reason was published. With `wake`, an owner that is
    /// armed counts as told, and the caller has to signal it. Answers its mood before.
    pub fn hang(&self, place: Place, wake: bool) -> Mood {
        fence(Ordering::SeqCst);
        let Some(slip) = self.slip(place.slip) else { return Mood::Away };
        let hook = self.hook(place.hook);
        let ours = slip.load(Ordering::SeqCst) == FREE
            && slip.compare_exchange(FREE, LAST, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        let mut old = hook.load(Ordering::SeqCst);
        loop {
            let mut new = old;
            if ours {
                let before = old as u32;
                slip.store(if before == FREE { LAST } else { before }, Ordering::Relaxed);
                new = new & !u64::from(u32::MAX) | u64::from(place.slip);
            }
            if wake && Mood::of(old) == Mood::Armed {
                new = new & !Mood::Indirect.bits() | Mood::Told.bits();
            }
            if new == old {
                return Mood::of(old);
            }
            match hook.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Mood::of(old),
                Err(now) => old = now,
            }
        }
    }

    fn is_free(&self, slip: u32) -> bool {
        self.slip(slip).is_none_or(|slip| slip.load(Ordering::SeqCst) == FREE)
    }

    /// True if a slip hangs there.
    pub fn has_news(&self, hook: u32) -> bool {
        self.hook(hook).load(Ordering::SeqCst) as u32 != FREE
    }

    /// Takes all slips down and calls `each` for every one, the oldest first. A slip
    /// can be hung again from before its call on.
    pub fn take(&self, hook: u32, mut each: impl FnMut(u32)) {
        if !self.has_news(hook) {
            return;
        }
        let mask = !u64::from(u32::MAX);
        let mut n = self.hook(hook).fetch_and(mask, Ordering::SeqCst) as u32;
        // The chain is ours now; turned round, it begins with the oldest.
        let mut oldest = LAST;
        for _ in 0..SLIPS {
            let Some(slip) = self.slip(n) else { break };
            let before = slip.swap(oldest, Ordering::Relaxed);
            oldest = n;
            n = before;
        }
        for _ in 0..SLIPS {
            let Some(slip) = self.slip(oldest) else { break };
            let next = slip.swap(FREE, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            each(oldest);
            oldest = next;
        }
    }

    pub fn mood(&self, hook: u32) -> Mood {
        Mood::of(self.hook(hook).load(Ordering::SeqCst))
    }

    /// Changes the owner's mood; answers the one before. A look at the hook must
    /// follow if the owner means to sleep.
    pub fn set_mood(&self, hook: u32, mood: Mood) -> Mood {
        let change = |word: u64| Some(word & !Mood::Indirect.bits() | mood.bits());
        let old = self.hook(hook).fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        Mood::of(old.unwrap_or_else(|word| word))
    }

    /// The owner was told and has not come for too long, or has come and found nothing:
    /// its progress thread has to see to it that it is told again.
    pub fn give_up(&self, hook: u32) {
        // Told has one bit of Indirect's two.
        let change =
            |word: u64| (Mood::of(word) == Mood::Told).then(|| word | Mood::Indirect.bits());
        let _ = self.hook(hook).fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
    }
}

/// Numbers that are given out and taken back. What came back rests for a while: the
/// other side of a wire may be late with its news.
#[derive(Default)]
struct Numbers {
    used: u32,
    free: VecDeque<u32>,
}

impl Numbers {
    /// One that is usable: of those that have rested, else a new one, else of those that rest.
    fn get(&mut self, below: u32, usable: impl Fn(u32) -> bool) -> Option<u32> {
        self.used_before(self.free.len().saturating_sub(RESTING), &usable)
            .or_else(|| self.fresh(below))
            .or_else(|| self.used_before(self.free.len(), &usable))
    }

    fn used_before(&mut self, tries: usize, usable: impl Fn(u32) -> bool) -> Option<u32> {
        for _ in 0..tries {
            let number = self.free.pop_front()?;
            if usable(number) {
                return Some(number);
            }
            self.free.push_back(number);
        }
        None
    }

    fn fresh(&mut self, below: u32) -> Option<u32> {
        (self.used + 1 < below).then(|| {
            self.used += 1;
            self.used
        })
    }
}

/// This process's board.
pub struct Own {
    pub board: Board,
    memory: Fd,
    hooks: Mutex<Numbers>,
    pairs: Mutex<Numbers>,
}

/// The process's board, made at the first call.
pub fn own() -> &'static Own {
    static OWN: OnceLock<Own> = OnceLock::new();
    OWN.get_or_init(|| {
        let memory = sys::shared_memory(SIZE).expect("softrdma: no shared memory");
        let board = Board(sys::map_shared(&memory, SIZE).expect("softrdma: no shared memory"));
        Own { board, memory, hooks: Mutex::default(), pairs: Mutex::default() }
    })
}

impl Own {
    /// The descriptor for [`Peer::meet`].
    pub fn memory(&self) -> RawFd {
        self.memory.raw()
    }

    /// A hook for a completion queue.
    pub fn new_hook(&self) -> Option<u32> {
        let hook = self.hooks.lock().unwrap().get(HOOKS, |_| true)?;
        self.board.take(hook, |_| ());
        self.board.set_mood(hook, Mood::Away);
        Some(hook)
    }
    pub fn free_hook(&self, hook: u32) {
        self.board.set_mood(hook, Mood::Away);
        self.board.take(hook, |_| ());
        self.hooks.lock().unwrap().free.push_back(hook);
    }

    /// A number for a queue pair, which stands for its slips.
    pub fn new_pair(&self) -> Option<u32> {
        let mut pairs = self.pairs.lock().unwrap();
        let before = pairs.used;
        // A slip that a late or killed process left hanging can't be hung again.
        let pair = pairs.get(SLIPS / EACH, |pair| self.is_clear(pair));
        if pairs.used > before {
            tally::NUMBERS.count();
        }
        pair
    }
    /// True if none of a queue pair's slips hangs anywhere.
    pub fn is_clear(&self, pair: u32) -> bool {
        (0..EACH).all(|which| self.board.is_free(slip(pair, which)))
    }
    pub fn free_pair(&self, pair: u32) {
        self.pairs.lock().unwrap().free.push_back(pair);
    }
}

/// A queue pair's slip number `which`, below [`EACH`].
pub fn slip(pair: u32, which: u32) -> u32 {
    pair * EACH + which
}
/// The queue pair that a slip belongs to.
pub fn pair(slip: u32) -> u32 {
    slip / EACH
}

/// Another process, or this one, as the other side of wires.
pub struct Peer {
    pub board: Board,
    /// Wakes its progress thread.
    bell: Fd,
    /// Its completion channels by its own numbers for them.
    channels: Mutex<HashMap<u64, Weak<Fd>>>,
}

/// Peers by the identity of their boards' memory.
type Peers = HashMap<(u64, u64), Weak<Peer>>;

impl Peer {
    /// The process with that board and bell. Each is mapped only once.
    pub fn meet(memory: Fd, bell: Fd) -> Result<Arc<Peer>> {
        static PEERS: Mutex<Option<Peers>> = Mutex::new(None);
        let identity = sys::identity(&memory)?;
        let mut peers = PEERS.lock().unwrap();
        let peers = peers.get_or_insert_default();
        if let Some(peer) = peers.get(&identity).and_then(Weak::upgrade) {
            return Ok(peer);
        }
        if !sys::lasting_size(&memory, SIZE) {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let board = Board(sys::map_shared(&memory, SIZE)?);
        let peer = Arc::new(Peer { board, bell, channels: Mutex::default() });
        peers.retain(|_, peer| peer.strong_count() > 0);
        peers.insert(identity, Arc::downgrade(&peer));
        Ok(peer)
    }

    /// Its completion channel number `number`. Each is held only once.
    pub fn channel(&self, number: u64, fd: Fd) -> Arc<Fd> {
        let mut channels = self.channels.lock().unwrap();
        if let Some(channel) = channels.get(&number).and_then(Weak::upgrade) {
            return channel;
        }
        let channel = Arc::new(fd);
        if channels.len() == channels.capacity() {
            channels.retain(|_, channel| channel.strong_count() > 0);
        }
        channels.insert(number, Arc::downgrade(&channel));
        channel
    }

    /// Calls its progress thread for the queue pair with that slip.
    pub fn call(&self, slip: u32) {
        if self.board.hang(Place { slip, hook: PROGRESS }, true) == Mood::Armed {
            sys::signal(&self.bell);
        }
    }
}
