// SPDX-License-Identifier: BSD-3-Clause
//! The wire between two queue pairs: one piece of shared memory.
//!
//! Each side has a request ring (its SENDs, WRITEs and READ requests) and a
//! response ring (the data of the READs that it answers). Rings are byte streams
//! with one producer and one consumer. Acknowledgements are not messages but
//! counters in the owner's half: how many requests it has executed, which
//! negative acknowledgement stopped it, how often its receive queue was empty.
//!
//! What concerns the other side's application is hung up on its process's
//! [notice board](crate::board), and wakes it if it sleeps. A side that wants its
//! progress thread called says for what in `want`; the other side calls only then,
//! so that a busy connection makes few system calls.

use crate::board::{self, Mood, Peer, Place};
use crate::engine::engine;
use crate::sys::{self, Fd};
use std::io::Result;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

/// Bytes in each ring: enough that producer and consumer overlap on large
/// messages, small enough to stay in a core's second-level cache.
const RING: u64 = 256 * 1024;
const HEADER: usize = 4096;
const SIZE: usize = HEADER + 4 * RING as usize;

/// What a side may want to be told of.
pub mod want {
    /// New requests from the other side.
    pub const REQUEST: u32 = 1;
    /// The acknowledgement of request number `ack_at`, for which it stands still.
    pub const ACK: u32 = 2;
    /// Room in its own request ring.
    pub const ROOM: u32 = 4;
    /// Data in the other side's response ring.
    pub const RESPONSE: u32 = 8;
    /// Room in its own response ring.
    pub const RESPONSE_ROOM: u32 = 16;
    /// The acknowledgement of request number `ack_at`, which only completes something.
    pub const COMPLETION: u32 = 32;
    /// Everything; also what nobody may stay asleep over.
    pub const ALL: u32 = !0;
}

#[repr(C, align(64))]
struct Line<T>(T);

/// The producer's end of a ring.
#[repr(C)]
struct Produced {
    head: AtomicU64,
    /// The head at which the ring was last begun anew, from its first byte.
    base: AtomicU64,
}

/// What one side tells the other. Written by its owner, except that the other
/// side clears bits of `want` when it tells.
#[repr(C)]
pub struct Side {
    requests: Line<Produced>,
    request_tail: Line<AtomicU64>,
    responses: Line<Produced>,
    response_tail: Line<AtomicU64>,
    /// How many of the other side's requests this side has executed.
    acked: Line<AtomicU64>,
    /// Zero, or the wire code of the error that request `acked + 1` met.
    nak: AtomicU32,
    /// Counts RNR NAKs (high half) and carries the encoded timer (low byte).
    rnr: AtomicU64,
    /// The RNR NAK count after which this side, as requester, has tried again.
    rnr_retry: AtomicU64,
    /// The queue pair is in the error state or gone.
    closed: AtomicBool,
    want: Line<AtomicU32>,
    ack_at: AtomicU64,
    address: Line<Address>,
}

/// Where on its process's board a side wants its news; zeroes until it is connected.
struct Address {
    /// The other side's requests.
    requests: Where,
    /// What became of its own requests.
    answers: Where,
    /// Its progress thread.
    call: AtomicU32,
    /// The completion channel that was handed over is also that of `answers`.
    one_channel: AtomicBool,
}

struct Where {
    slip: AtomicU32,
    hook: AtomicU32,
}

impl Where {
    fn place(&self) -> Place {
        Place { slip: self.slip.load(Ordering::SeqCst), hook: self.hook.load(Ordering::Relaxed) }
    }
    fn set(&self, place: Place) {
        self.hook.store(place.hook, Ordering::Relaxed);
        self.slip.store(place.slip, Ordering::SeqCst);
    }
}

const _: () = assert!(2 * size_of::<Side>() <= HEADER);

/// One direction's byte stream, seen from either end.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    head: &'a AtomicU64,
    base: &'a AtomicU64,
    tail: &'a AtomicU64,
    data: *mut u8,
}

impl Ring<'_> {
    /// Bytes that the consumer may read.
    pub fn filled(&self) -> usize {
        let n = self.head.load(Ordering::Acquire).wrapping_sub(self.tail.load(Ordering::Relaxed));
        n.min(RING) as usize
    }

    /// Bytes that the producer may write.
    pub fn room(&self) -> usize {
        let n = self.head.load(Ordering::Relaxed).wrapping_sub(self.tail.load(Ordering::Acquire));
        (RING - n.min(RING)) as usize
    }

    /// The producer begins anew at the first byte if all is consumed: a wire that
    /// carries little touches little memory. The consumer learns of it by the head.
    pub fn rewind(&self) {
        let head = self.head.load(Ordering::Relaxed);
        if self.tail.load(Ordering::Acquire) == head {
            self.base.store(head, Ordering::Relaxed);
        }
    }

    fn pieces(&self, pos: u64, len: usize) -> [(*mut u8, usize); 2] {
        let at = (pos.wrapping_sub(self.base.load(Ordering::Relaxed)) % RING) as usize;
        let first = len.min(RING as usize - at);
        // SAFETY: `at` is below the ring's size.
        [(unsafe { self.data.add(at) }, first), (self.data, len - first)]
    }

    /// Copies in at `offset` beyond the head, without publishing it.
    ///
    /// # Safety
    /// `src` is readable for `len` bytes, and `offset + len` is within `room()`.
    pub unsafe fn put(&self, offset: usize, src: *const u8, len: usize) {
        let pos = self.head.load(Ordering::Relaxed).wrapping_add(offset as u64);
        let [(a, n), (b, m)] = self.pieces(pos, len);
        // SAFETY: the pieces lie in the ring; the source is the caller's word.
        unsafe {
            ptr::copy_nonoverlapping(src, a, n);
            ptr::copy_nonoverlapping(src.add(n), b, m);
        }
    }

    /// Copies out from `offset` beyond the tail, without consuming it.
    ///
    /// # Safety
    /// `dst` is writable for `len` bytes, and `offset + len` is within `filled()`.
    pub unsafe fn get(&self, offset: usize, dst: *mut u8, len: usize) {
        let pos = self.tail.load(Ordering::Relaxed).wrapping_add(offset as u64);
        let [(a, n), (b, m)] = self.pieces(pos, len);
        // SAFETY: the pieces lie in the ring; the target is the caller's word.
        unsafe {
            ptr::copy_nonoverlapping(a, dst, n);
            ptr::copy_nonoverlapping(b, dst.add(n), m);
        }
    }

    pub fn publish(&self, len: usize) {
        let head = self.head.load(Ordering::Relaxed);
        self.head.store(head.wrapping_add(len as u64), Ordering::Release);
    }

    pub fn consume(&self, len: usize) {
        let tail = self.tail.load(Ordering::Relaxed);
        self.tail.store(tail.wrapping_add(len as u64), Ordering::Release);
    }
}

/// The descriptors by which the other side gets to know this process, and which may
/// wake the owner of a completion channel, given by its number and descriptor.
pub fn introduction(channel: Option<(u64, RawFd)>) -> (u64, Vec<RawFd>) {
    let mut fds = vec![board::own().memory(), engine().bell()];
    fds.extend(channel.map(|(_, fd)| fd));
    (channel.map_or(0, |(number, _)| number), fds)
}

type Cut = Box<dyn Fn() + Send + Sync>;

/// One side's hold on the wire.
pub struct Link {
    map: *mut u8,
    me: usize,
    /// The other process is gone.
    dead: AtomicBool,
    /// Whom to tell, and its completion channel if it has handed that over.
    peer: OnceLock<(Arc<Peer>, Option<Arc<Fd>>)>,
    cut: OnceLock<Cut>,
    severed: AtomicBool,
    /// The other side is on its way to take what was sent up to `watched_to`.
    watched: AtomicBool,
    watched_to: AtomicU64,
}

// SAFETY: the mapping lives as long as the link, and everything in it is atomic
// or handed over through an atomic's release and acquire.
unsafe impl Send for Link {}
// SAFETY: as above; the rings' ends are used under the queue pair's lock.
unsafe impl Sync for Link {}

impl Drop for Link {
    fn drop(&mut self) {
        if !crate::fork::in_child() {
            // SAFETY: our own mapping, no longer referenced.
            unsafe { libc::munmap(self.map.cast(), SIZE) };
        }
    }
}

impl Link {
    fn over(map: *mut u8, me: usize) -> Link {
        Link {
            map,
            me,
            dead: AtomicBool::new(false),
            peer: OnceLock::new(),
            cut: OnceLock::new(),
            severed: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            watched_to: AtomicU64::new(0),
        }
    }

    /// Makes a wire. The memory is for the other side's [`Link::attach`].
    pub fn create() -> Result<(Link, Fd)> {
        let memory = sys::shared_memory(SIZE)?;
        Ok((Link::over(sys::map_shared(&memory, SIZE)?, 0), memory))
    }

    /// Takes the other end of a wire that another process made.
    pub fn attach(memory: Fd) -> Result<Link> {
        if !sys::lasting_size(&memory, SIZE) {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        Ok(Link::over(sys::map_shared(&memory, SIZE)?, 1))
    }

    /// Learns of the other side from its [`introduction`]; false if that is none.
    pub fn meet(&self, channel: u64, fds: Vec<Fd>) -> bool {
        let mut fds = fds.into_iter();
        let (Some(board), Some(bell)) = (fds.next(), fds.next()) else { return false };
        let Ok(peer) = Peer::meet(board, bell) else { return false };
        let channel = fds.next().map(|fd| peer.channel(channel, fd));
        self.peer.set((peer, channel)).is_ok()
    }

    /// Says where news for this side go: of requests, of answers, and calls.
    pub fn set_address(&self, requests: Place, answers: Place, call: u32, one_channel: bool) {
        let address = &self.mine().address.0;
        address.one_channel.store(one_channel, Ordering::Relaxed);
        address.requests.set(requests);
        address.answers.set(answers);
        address.call.store(call, Ordering::SeqCst);
    }

    /// News for this side concern nobody any more.
    pub fn clear_address(&self) {
        self.set_address(Place::default(), Place::default(), 0, false);
    }

    fn side(&self, who: usize) -> &Side {
        // SAFETY: the mapping begins with two Sides; zeroes are a valid Side.
        unsafe { &*self.map.cast::<Side>().add(who) }
    }
    fn mine(&self) -> &Side {
        self.side(self.me)
    }
    fn theirs(&self) -> &Side {
        self.side(1 - self.me)
    }

    fn request_ring(&self, from: usize) -> Ring<'_> {
        Ring {
            head: &self.side(from).requests.0.head,
            base: &self.side(from).requests.0.base,
            tail: &self.side(1 - from).request_tail.0,
            // SAFETY: within the mapping.
            data: unsafe { self.map.add(HEADER + 2 * from * RING as usize) },
        }
    }
    fn response_ring(&self, from: usize) -> Ring<'_> {
        Ring {
            head: &self.side(from).responses.0.head,
            base: &self.side(from).responses.0.base,
            tail: &self.side(1 - from).response_tail.0,
            // SAFETY: within the mapping.
            data: unsafe { self.map.add(HEADER + (2 * from + 1) * RING as usize) },
        }
    }

    /// Our requests, of which we are the producer.
    pub fn requests_out(&self) -> Ring<'_> {
        self.request_ring(self.me)
    }
    /// The other side's requests, of which we are the consumer.
    pub fn requests_in(&self) -> Ring<'_> {
        self.request_ring(1 - self.me)
    }
    /// The data of READs that we answer.
    pub fn responses_out(&self) -> Ring<'_> {
        self.response_ring(self.me)
    }
    /// The data of READs that we asked for.
    pub fn responses_in(&self) -> Ring<'_> {
        self.response_ring(1 - self.me)
    }

    /// How many of our requests the other side has executed.
    pub fn acked(&self) -> u64 {
        self.theirs().acked.0.load(Ordering::Acquire)
    }
    /// Says that one more of the other side's requests is executed.
    pub fn acknowledge(&self, count: u64) {
        self.mine().acked.0.store(count, Ordering::Release);
    }
    /// The wire code of the error that stopped our requests, or 0.
    pub fn nak(&self) -> u32 {
        self.theirs().nak.load(Ordering::Acquire)
    }
    /// Refuses the other side's next request for good.
    pub fn refuse(&self, code: u32) {
        self.mine().nak.store(code, Ordering::Release);
    }
    /// The other side's RNR NAKs so far, and the encoded timer of the last.
    pub fn rnr(&self) -> (u64, u8) {
        let v = self.theirs().rnr.load(Ordering::Acquire);
        (v >> 8, v as u8)
    }
    /// Sends an RNR NAK; answers its number.
    pub fn not_ready(&self, timer: u8) -> u64 {
        let n = (self.mine().rnr.load(Ordering::Relaxed) >> 8) + 1;
        self.mine().rnr.store(n << 8 | u64::from(timer), Ordering::Release);
        n
    }
    /// Tries again after RNR NAK number `n`.
    pub fn retry(&self, n: u64) {
        self.mine().rnr_retry.store(n, Ordering::Release);
    }
    /// Up to which RNR NAK the other side has tried again.
    pub fn retried(&self) -> u64 {
        self.theirs().rnr_retry.load(Ordering::Acquire)
    }

    /// Says that our queue pair takes and sends nothing any more.
    pub fn close(&self) {
        self.mine().closed.store(true, Ordering::Release);
        self.tell(want::ALL, false);
    }
    /// True when nobody will answer any more.
    pub fn peer_gone(&self) -> bool {
        self.dead.load(Ordering::Acquire) || self.theirs().closed.load(Ordering::Acquire)
    }
    /// How to cut the connection that this wire belongs to.
    pub fn set_cut(&self, cut: impl Fn() + Send + Sync + 'static) {
        let _ = self.cut.set(Box::new(cut));
    }
    /// Cuts the connection, as a planned fault: nothing passes any more.
    pub fn sever(&self) {
        self.severed.store(true, Ordering::Release);
        if let Some(cut) = self.cut.get() {
            cut();
        }
    }
    pub fn severed(&self) -> bool {
        self.severed.load(Ordering::Acquire)
    }
    /// Notes that the other process died.
    pub fn set_dead(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Asks to be told. The caller must look again afterwards.
    pub fn ask(&self, what: u32) {
        let want = &self.mine().want.0;
        if want.load(Ordering::SeqCst) & what != what {
            want.fetch_or(what, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }
    /// Asks to be told when request number `n` is acknowledged, in one of two ways.
    pub fn ask_ack(&self, n: u64, how: u32) {
        self.mine().ack_at.store(n, Ordering::SeqCst);
        self.ask(how);
    }

    /// Tells the other side of news, after they were published: as far as it wants
    /// them, and of requests always. `completes` says that a request takes a receive
    /// there, which is reason enough to wake the application itself. True if it is
    /// on its way for that, so that its progress thread was not called.
    pub fn tell(&self, news: u32, completes: bool) -> bool {
        let Some((peer, channel)) = self.peer.get() else { return false };
        fence(Ordering::SeqCst);
        let theirs = self.theirs();
        let address = &theirs.address.0;
        let mut hit = theirs.want.0.load(Ordering::SeqCst) & news;
        if hit & (want::ACK | want::COMPLETION) != 0
            && news != want::ALL
            && self.mine().acked.0.load(Ordering::Relaxed) < theirs.ack_at.load(Ordering::SeqCst)
        {
            hit &= !(want::ACK | want::COMPLETION);
        }
        let mut expected = false;
        if news & want::REQUEST != 0 {
            let channel = channel.as_ref().filter(|_| completes && !self.peer_gone());
            let mood = peer.board.hang(address.requests.place(), channel.is_some());
            if let Some(channel) = channel
                && matches!(mood, Mood::Armed | Mood::Told)
            {
                if mood == Mood::Armed {
                    sys::signal(channel);
                }
                expected = true;
                hit &= !want::REQUEST;
            }
        }
        if hit != 0 {
            // Before it is told: it may want the next at once.
            theirs.want.0.fetch_and(!hit, Ordering::SeqCst);
        }
        let mut call = news == want::ALL || hit & !want::COMPLETION != 0;
        if hit & !want::REQUEST != 0 {
            let wake = hit & want::COMPLETION != 0 && news != want::ALL;
            let one = address.one_channel.load(Ordering::Relaxed);
            let channel = channel.as_ref().filter(|_| wake && one);
            match (peer.board.hang(address.answers.place(), channel.is_some()), channel) {
                (Mood::Armed, Some(channel)) => sys::signal(channel),
                (Mood::Armed | Mood::Indirect, _) => call = true,
                _ => {}
            }
        }
        if call {
            peer.call(address.call.load(Ordering::SeqCst));
        }
        expected
    }

    /// How far our requests have been sent, and taken.
    fn ends(&self) -> (u64, u64) {
        let ring = self.requests_out();
        (ring.head.load(Ordering::Relaxed), ring.tail.load(Ordering::Acquire))
    }

    /// Notes what is to be taken in time; false if the wire is watched already.
    pub fn begin_watch(&self) -> bool {
        let new = !self.watched.swap(true, Ordering::SeqCst);
        if new {
            self.watched_to.store(self.ends().0, Ordering::Relaxed);
        }
        new
    }

    /// A while later: calls the other side's progress thread if what was watched is
    /// not taken; false if nothing has to be watched any more.
    pub fn keep_watch(&self) -> bool {
        let (head, tail) = self.ends();
        if (tail.wrapping_sub(self.watched_to.load(Ordering::Relaxed)) as i64) < 0 {
            self.watched.store(false, Ordering::SeqCst);
            if let Some((peer, _)) = self.peer.get() {
                peer.board.give_up(self.theirs().address.0.requests.place().hook);
            }
            self.tell(want::ALL, false);
            return false;
        }
        if head == tail {
            self.watched.store(false, Ordering::SeqCst);
            let (head, tail) = self.ends();
            if head == tail || self.watched.swap(true, Ordering::SeqCst) {
                return false;
            }
        }
        self.watched_to.store(head, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `len` bytes `times` times and takes them at the other end.
    fn carry(here: &Link, there: &Link, len: usize, times: usize) {
        let (from, to) = (here.requests_out(), there.requests_in());
        for i in 0..times {
            let sent: Vec<u8> = (0..len).map(|n| (n * 7 + i) as u8).collect();
            let mut got = vec![0; len];
            from.rewind();
            assert!(from.room() >= len && to.filled() == 0);
            // SAFETY: the vectors are that long, and so is the room.
            unsafe { from.put(0, sent.as_ptr(), len) };
            from.publish(len);
            assert_eq!(to.filled(), len);
            // SAFETY: as above.
            unsafe { to.get(0, got.as_mut_ptr(), len) };
            to.consume(len);
            assert_eq!(got, sent);
        }
    }

    #[test]
    fn a_wire_that_carries_little_touches_little_memory() {
        let (here, memory) = Link::create().expect("a wire");
        let kept = memory.raw();
        // SAFETY: a descriptor of our own, duplicated for the other end.
        let there = Link::attach(Fd::visible(unsafe { libc::dup(kept) })).expect("its other end");
        carry(&here, &there, 100, 10_000);
        assert!(sys::resident(&memory) <= HEADER + 4096, "{}", sys::resident(&memory));
        carry(&here, &there, RING as usize, 3);
        carry(&here, &there, 100, 10);
    }
}
