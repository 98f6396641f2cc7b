// SPDX-License-Identifier: BSD-3-Clause
//! The hand-overs of the crate between real threads: a poller, and two I/O threads that
//! both try, as chance has it. The models of `src/model.rs` look at every interleaving
//! of a few steps; this looks at some interleavings of very many, with plain memory behind the
//! windows, so that ThreadSanitizer (`scripts/sanitizers.sh thread`) sees who touches a byte
//! without an order between them.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, SendQueue, Transmit};
use valkey_rdma_proto::staging::Steps;
use valkey_rdma_proto::window::{Announcement, Chunk, ReceiveWindow};

/// Bytes that go each way.
const TOTAL: u64 = 500_000;
/// Nobody waits longer than this for the others.
const PATIENCE: Duration = Duration::from_secs(120);
/// Work requests in flight, and staging memory.
const DEPTH: usize = 8;
const STAGING: usize = 3000;
/// No larger staging memory: regions of it can't be had.
const NONE: Steps = [usize::MAX; 3];
/// The longest buffer that is announced.
const WINDOW: usize = 5000;

/// The byte at a position of the stream.
fn byte(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Bytes that are shared without a lock.
struct Memory(Box<[UnsafeCell<u8>]>);

// SAFETY: the hand-overs keep threads apart, which is what is tested.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(length: usize) -> Self {
        Self((0..length).map(|_| UnsafeCell::new(0)).collect())
    }

    fn store(&self, at: usize, length: usize, position: u64) {
        for (cell, position) in self.0[at..at + length].iter().zip(position..) {
            // SAFETY: see above.
            unsafe { *cell.get() = byte(position) };
        }
    }

    fn check(&self, at: usize, length: usize, position: u64) {
        for (cell, position) in self.0[at..at + length].iter().zip(position..) {
            // SAFETY: see above.
            assert_eq!(unsafe { *cell.get() }, byte(position), "the byte at {position}");
        }
    }
}

/// Calls `step` until it says that it is done.
fn until(what: &str, mut step: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !step() {
        assert!(Instant::now() < deadline, "{what}: stuck");
        thread::yield_now();
    }
}

/// A send queue: entries are stored before the number of them is.
struct Queue {
    entries: [AtomicU64; DEPTH],
    posted: AtomicU64,
}

impl Queue {
    /// By who has the right to write.
    fn post(&self, offset: usize, length: usize, signalled: bool) {
        let number = self.posted.load(Ordering::Relaxed);
        let entry = (offset as u64) << 32 | (length as u64) << 1 | u64::from(signalled);
        self.entries[number as usize % DEPTH].store(entry, Ordering::Relaxed);
        // Release: as a doorbell comes after what it is rung for.
        self.posted.store(number + 1, Ordering::Release);
    }

    fn take(&self, number: u64) -> Option<(usize, usize, bool)> {
        (self.posted.load(Ordering::Acquire) > number).then(|| {
            let entry = self.entries[number as usize % DEPTH].load(Ordering::Relaxed);
            ((entry >> 32) as usize, (entry as u32 >> 1) as usize, entry & 1 == 1)
        })
    }
}

struct Sending {
    sender: SendQueue<()>,
    staging: Memory,
    queue: Queue,
    /// Bytes that were posted; stored by who has the right to write.
    written: AtomicU64,
}

impl Transmit<()> for &Sending {
    type Staged = Chunk;
    type Error = ();

    fn register(&mut self, _length: usize) -> Option<()> {
        None
    }

    fn copy(&mut self, _region: Option<&()>, chunk: Chunk) -> Chunk {
        self.staging.store(chunk.offset, chunk.length, self.written.load(Ordering::Relaxed));
        chunk
    }

    fn post(&mut self, chunk: Chunk, write: PayloadWrite) -> Result<(), PostError<()>> {
        self.written.fetch_add(chunk.length as u64, Ordering::Relaxed);
        self.queue.post(chunk.offset, chunk.length, write.signalled);
        Ok(())
    }
}

impl Sending {
    /// Returns whether all is written.
    fn write(&self, rng: &mut Rng) -> bool {
        self.sender.write(rng.usize(1..8000), &mut &*self);
        self.written.load(Ordering::Relaxed) == TOTAL
    }
}

#[test]
fn bytes_are_sent_in_order_by_whichever_thread_has_the_right_to_write() {
    let sending = Arc::new(Sending {
        sender: SendQueue::new(DEPTH, STAGING, NONE),
        staging: Memory::new(STAGING),
        queue: Queue { entries: Default::default(), posted: AtomicU64::new(0) },
        written: AtomicU64::new(0),
    });
    let writers = [1, 2].map(|seed| {
        let sending = Arc::clone(&sending);
        let mut rng = Rng::with_seed(seed);
        thread::spawn(move || until("writing", || sending.write(&mut rng)))
    });

    let mut rng = Rng::with_seed(3);
    let (mut received, mut room, mut number) = (0, 0, 0);
    until("sending", || {
        if room == 0 {
            // As much as is to be written, over all windows.
            let length = rng.usize(1..=WINDOW).min((TOTAL - received) as usize);
            let announcement = Announcement { address: received, length: length as u32, rkey: 0 };
            sending.sender.announce(announcement).expect("the one before is used up");
            room = length;
        }
        if let Some((offset, length, signalled)) = sending.queue.take(number) {
            sending.staging.check(offset, length, received);
            received += length as u64;
            room -= length;
            number += 1;
            if signalled {
                assert!(sending.sender.retire(number as u32 & 0x00ff_ffff));
            }
        }
        received == TOTAL
    });
    for writer in writers {
        writer.join().expect("a writer");
    }
}

#[test]
fn bytes_are_received_in_order_by_whichever_thread_has_the_right_to_read() {
    struct Receiving {
        window: ReceiveWindow,
        buffer: Memory,
        /// Bytes that were read; stored by who has the right to read.
        read: AtomicU64,
    }
    let receiving = Arc::new(Receiving {
        window: ReceiveWindow::new(),
        // Two buffers, of which any may be announced after one that was read.
        buffer: Memory::new(2 * WINDOW),
        read: AtomicU64::new(0),
    });
    let readers = [1, 2].map(|seed| {
        let receiving = Arc::clone(&receiving);
        let mut rng = Rng::with_seed(seed);
        thread::spawn(move || {
            until("reading", || {
                if let Some(mut reader) = receiving.window.reader()
                    && let Some((address, waiting)) = reader.readable()
                {
                    let read = receiving.read.load(Ordering::Relaxed);
                    let count = waiting.min(rng.usize(1..3000));
                    receiving.buffer.check(address as usize, count, read);
                    receiving.read.store(read + count as u64, Ordering::Relaxed);
                    reader.consume(count);
                }
                receiving.read.load(Ordering::Relaxed) == TOTAL
            });
        })
    });

    let mut rng = Rng::with_seed(3);
    let (mut sent, mut filled, mut length, mut start) = (0, 0, 0, 0);
    until("receiving", || {
        if filled == length && receiving.window.is_other_free() {
            length = rng.usize(1..=WINDOW);
            filled = 0;
            let any = receiving.window.is_consumed() && rng.bool();
            start = if any { start } else { WINDOW - start };
            receiving.window.announce(start as u64, length as u32);
        }
        let count = (length - filled).min((TOTAL - sent) as usize).min(rng.usize(1..2000));
        receiving.buffer.store(start + filled, count, sent);
        receiving.window.arrived(count as u32).expect("it fits");
        filled += count;
        sent += count as u64;
        sent == TOTAL
    });
    for reader in readers {
        reader.join().expect("a reader");
    }
}
