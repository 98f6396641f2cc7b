// SPDX-License-Identifier: BSD-3-Clause
//! The wire between two queue pairs: one piece of shared memory and a doorbell each way.
//!
//! Each side has a request ring (its SENDs, WRITEs and READ requests) and a
//! response ring (the data of the READs that it answers). Rings are byte streams
//! with one producer and one consumer. Acknowledgements are not messages but
//! counters in the owner's half: how many requests it has executed, which
//! negative acknowledgement stopped it, how often its receive queue was empty.
//!
//! A side that wants to be woken says for what in `want`; the other side rings
//! its doorbell only then, so that a busy connection makes few system calls.

use crate::sys::{self, Fd};
use std::io::Result;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Bytes in each ring: enough that producer and consumer overlap on large
/// messages, small enough to stay in a core's second-level cache.
const RING: u64 = 256 * 1024;
const HEADER: usize = 4096;
const SIZE: usize = HEADER + 4 * RING as usize;

/// What a side may want to be woken for.
pub mod want {
    /// New requests from the other side.
    pub const REQUEST: u32 = 1;
    /// The acknowledgement of request number `ack_at`.
    pub const ACK: u32 = 2;
    /// Room in its own request ring.
    pub const ROOM: u32 = 4;
    /// Data in the other side's response ring.
    pub const RESPONSE: u32 = 8;
    /// Room in its own response ring.
    pub const RESPONSE_ROOM: u32 = 16;
    /// Everything; also what nobody may stay asleep over.
    pub const ALL: u32 = !0;
}

#[repr(C, align(64))]
struct Line<T>(T);

/// What one side tells the other. Written by its owner, except that the other
/// side clears bits of `want` when it rings.
#[repr(C)]
pub struct Side {
    request_head: Line<AtomicU64>,
    request_tail: Line<AtomicU64>,
    response_head: Line<AtomicU64>,
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
    /// The next message that takes a receive may raise the completion event by
    /// the descriptor that this side has handed over.
    direct: Line<AtomicBool>,
}

const _: () = assert!(2 * size_of::<Side>() <= HEADER);

/// One direction's byte stream, seen from either end.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    head: &'a AtomicU64,
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

    fn pieces(&self, pos: u64, len: usize) -> [(*mut u8, usize); 2] {
        let at = (pos % RING) as usize;
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

type Cut = Box<dyn Fn() + Send + Sync>;

/// One side's hold on the wire.
pub struct Link {
    map: *mut u8,
    me: usize,
    bell: Fd,
    peer_bell: Fd,
    /// The other process is gone.
    dead: AtomicBool,
    seen: AtomicU64,
    /// The other side's completion channel, if it has handed it over.
    peer_channel: OnceLock<Fd>,
    cut: OnceLock<Cut>,
    severed: AtomicBool,
    /// A look after the other side's progress is due.
    pub watching: AtomicBool,
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
    /// Makes a wire. The descriptors are for the other side's [`Link::attach`].
    pub fn create() -> Result<(Link, [Fd; 1])> {
        let memory = sys::shared_memory(SIZE)?;
        let map = sys::map_shared(&memory, SIZE)?;
        let link = Link {
            map,
            me: 0,
            bell: sys::doorbell()?,
            peer_bell: sys::doorbell()?,
            dead: AtomicBool::new(false),
            seen: AtomicU64::new(0),
            peer_channel: OnceLock::new(),
            cut: OnceLock::new(),
            severed: AtomicBool::new(false),
            watching: AtomicBool::new(false),
        };
        Ok((link, [memory]))
    }

    /// The descriptors that go with the shared memory's, in order.
    pub fn bells(&self) -> [RawFd; 2] {
        [self.bell.raw(), self.peer_bell.raw()]
    }

    /// Takes the other end of a wire that another process made.
    pub fn attach(memory: Fd, maker_bell: Fd, my_bell: Fd) -> Result<Link> {
        if !sys::lasting_size(&memory, SIZE) {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let map = sys::map_shared(&memory, SIZE)?;
        Ok(Link {
            map,
            me: 1,
            bell: my_bell,
            peer_bell: maker_bell,
            dead: AtomicBool::new(false),
            seen: AtomicU64::new(0),
            peer_channel: OnceLock::new(),
            cut: OnceLock::new(),
            severed: AtomicBool::new(false),
            watching: AtomicBool::new(false),
        })
    }

    pub fn bell(&self) -> RawFd {
        self.bell.raw()
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
            head: &self.side(from).request_head.0,
            tail: &self.side(1 - from).request_tail.0,
            // SAFETY: within the mapping.
            data: unsafe { self.map.add(HEADER + 2 * from * RING as usize) },
        }
    }
    fn response_ring(&self, from: usize) -> Ring<'_> {
        Ring {
            head: &self.side(from).response_head.0,
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
        self.ring_for(want::ALL);
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

    /// True if a glance finds nothing new from the other side.
    pub fn quiet(&self) -> bool {
        self.glance() == self.seen.load(Ordering::Relaxed)
    }

    /// Notes how far we look now; called before looking, under the queue pair's lock.
    pub fn look(&self) {
        self.seen.store(self.glance(), Ordering::Relaxed);
    }

    /// A sum over all that the other side may change: it only ever grows.
    fn glance(&self) -> u64 {
        let t = self.theirs();
        t.request_head
            .0
            .load(Ordering::Acquire)
            .wrapping_add(t.acked.0.load(Ordering::Acquire))
            .wrapping_add(t.response_head.0.load(Ordering::Acquire))
    }

    /// Asks to be woken. The caller must look again afterwards.
    pub fn ask(&self, what: u32) {
        self.mine().want.0.fetch_or(what, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
    /// Asks to be woken when request number `n` is acknowledged.
    pub fn ask_ack(&self, n: u64) {
        self.mine().ack_at.store(n, Ordering::SeqCst);
        self.ask(want::ACK);
    }
    /// Hands over the other side's completion channel.
    pub fn set_peer_channel(&self, fd: Fd) {
        let _ = self.peer_channel.set(fd);
    }
    /// Permits the other side to raise our completion event, once.
    pub fn offer(&self) {
        self.mine().direct.0.store(true, Ordering::SeqCst);
    }
    /// Takes the permission back; false if it was used.
    pub fn revoke(&self) -> bool {
        self.mine().direct.0.swap(false, Ordering::SeqCst)
    }
    /// True if the permission given was used.
    pub fn offer_used(&self) -> bool {
        !self.mine().direct.0.load(Ordering::SeqCst)
    }
    /// Raises the other side's completion event if it permits that.
    pub fn raise(&self) -> bool {
        let Some(channel) = self.peer_channel.get() else { return false };
        fence(Ordering::SeqCst);
        let direct = &self.theirs().direct.0;
        let may = direct.load(Ordering::Relaxed) && direct.swap(false, Ordering::SeqCst);
        if may {
            sys::signal(channel);
        }
        may
    }
    /// Rings if the other side has not taken all that was sent.
    pub fn ring_if_waiting(&self) {
        if self.requests_out().room() < RING as usize {
            sys::signal(&self.peer_bell);
        }
    }

    /// Wakes the other side if it wants one of `what`.
    pub fn ring_for(&self, what: u32) {
        fence(Ordering::SeqCst);
        let theirs = self.theirs();
        let mut hit = theirs.want.0.load(Ordering::SeqCst) & what;
        if hit == want::ACK && what != want::ALL {
            let acked = self.mine().acked.0.load(Ordering::Relaxed);
            if acked < theirs.ack_at.load(Ordering::SeqCst) {
                hit = 0;
            }
        }
        if hit != 0 || what == want::ALL {
            theirs.want.0.fetch_and(!hit, Ordering::SeqCst);
            sys::signal(&self.peer_bell);
        }
    }
}
