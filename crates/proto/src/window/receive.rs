// SPDX-License-Identifier: BSD-3-Clause
//! Received bytes, on their way from the poller to the reader.
//!
//! The peer writes into the announced buffer from its start to its last byte.
//! Each immediate moves `tail`; the reader copies out and moves `head`. When the
//! buffer is exactly full another one is announced, or the same if it was read, and
//! the peer starts at its first byte. So the peer may fill one buffer while the reader
//! is at the one before; at more than one it never is. All counters count bytes since
//! the connection began and never wrap in practice (u64), so that "empty" and "full"
//! can't be confused and a new announcement resets nothing that the reader may be
//! looking at.
//!
//! The window also decides who reads. The server calls a connection's `read` from one
//! thread at a time, but that is its promise, not ours: [`ReceiveWindow::reader`] takes
//! the number of the buffer that is read, and whoever finds it taken comes back later.

use super::sync::{AtomicU64, Ordering, own};
use std::fmt;

/// The receive buffers of one connection, as poller and reader share them. The methods of
/// the poller say so; a [`Reader`] has those of the reader; the rest may be called from
/// anywhere.
#[derive(Debug)]
pub struct ReceiveWindow {
    /// Bytes that arrived; stored by the poller.
    tail: AtomicU64,
    /// Bytes that were read; stored by the reader.
    head: AtomicU64,
    /// The last two buffers: number n, counted from 1, at n modulo 2. Stored by the
    /// poller once the reader is done with what stood there, and published by `tail`.
    buffers: [Buffer; 2],
    /// Number of the last buffer that was announced; used by the poller alone.
    announced: AtomicU64,
    /// Number of the buffer that the byte at `head` stands in, or [`TAKEN`] while a
    /// [`Reader`] exists, which has it.
    reading: AtomicU64,
}

/// No buffer's number.
const TAKEN: u64 = 0;

/// One buffer, as a range of the connection's bytes.
#[derive(Debug)]
struct Buffer {
    /// Where the connection's first byte would stand if the buffer went back as far:
    /// its address less `start`.
    origin: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

/// The peer claims to have written more than its window holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun {
    /// Bytes that the immediate claimed.
    pub claimed: u32,
    /// Bytes that the window still held.
    pub room: u64,
}

impl fmt::Display for Overrun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "immediate announces {} bytes where the window holds {}", self.claimed, self.room)
    }
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self::new()
    }
}

impl ReceiveWindow {
    /// A window without room: nothing was announced yet.
    pub fn new() -> Self {
        let buffer = || Buffer {
            origin: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        };
        Self {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            buffers: [buffer(), buffer()],
            announced: AtomicU64::new(0),
            reading: AtomicU64::new(1),
        }
    }

    fn buffer(&self, number: u64) -> &Buffer {
        &self.buffers[(number % 2) as usize]
    }

    /// The buffer that was announced last. For the poller.
    fn present(&self) -> &Buffer {
        self.buffer(own(&self.announced))
    }

    /// Poller: whether the present buffer is exactly full and wholly consumed, so that it
    /// may be replaced and must be announced for the peer to go on.
    pub fn is_consumed(&self) -> bool {
        // Acquire: the reader's copies out of the buffer are over.
        self.head.load(Ordering::Acquire) == own(&self.present().end)
    }

    /// Poller: whether the present buffer is exactly full.
    pub fn is_full(&self) -> bool {
        own(&self.tail) == own(&self.present().end)
    }

    /// Poller: whether every buffer before the present one is consumed, so that its
    /// memory may be announced next, once the present one is full.
    pub fn is_other_free(&self) -> bool {
        // Acquire: the reader's copies out of the buffer are over.
        self.head.load(Ordering::Acquire) >= own(&self.present().start)
    }

    /// Poller: opens a buffer of `length` bytes, at least one, at `address`. Only if the
    /// present one [is full](Self::is_full), and either consumed, or the new one is other
    /// memory and that is [free](Self::is_other_free).
    pub fn announce(&self, address: u64, length: u32) {
        debug_assert!(length > 0 && self.is_full() && self.is_other_free());
        let start = own(&self.tail);
        let number = own(&self.announced) + 1;
        let buffer = self.buffer(number);
        buffer.origin.store(address.wrapping_sub(start), Ordering::Relaxed);
        buffer.start.store(start, Ordering::Relaxed);
        buffer.end.store(start + u64::from(length), Ordering::Relaxed);
        self.announced.store(number, Ordering::Relaxed);
    }

    /// Poller: an immediate said that `count` more bytes stand in the buffer.
    ///
    /// # Errors
    /// [`Overrun`] if they can't; nothing changes then.
    pub fn arrived(&self, count: u32) -> Result<(), Overrun> {
        let tail = own(&self.tail);
        let room = own(&self.present().end) - tail;
        if u64::from(count) > room {
            return Err(Overrun { claimed: count, room });
        }
        // Release: the bytes themselves, and their buffer, come before the new tail.
        self.tail.store(tail + u64::from(count), Ordering::Release);
        Ok(())
    }

    /// The right to read, unless somebody has it at this moment. Never waits.
    #[inline]
    pub fn reader(&self) -> Option<Reader<'_>> {
        let reading = self.reading.load(Ordering::Relaxed);
        if reading == TAKEN {
            return None;
        }
        self.reading
            .compare_exchange(reading, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Reader { window: self, reading })
    }

    /// Bytes that wait for the reader at this moment.
    pub fn unread(&self) -> u64 {
        // Head first: it can't pass the tail that is loaded after it.
        let head = self.head.load(Ordering::Acquire);
        self.tail.load(Ordering::Relaxed) - head
    }

    /// Poller: how much of the present buffer is written, and its size, in bytes.
    pub fn position(&self) -> (u64, u64) {
        let (start, end) = (own(&self.present().start), own(&self.present().end));
        (own(&self.tail) - start, end - start)
    }

    /// Reader: whether the last byte that was read was the last of its buffer, and no other has
    /// been read since. The peer may be waiting for an announcement then.
    pub fn is_buffer_read(&self) -> bool {
        let reading = self.reading.load(Ordering::Relaxed);
        // The poller may have announced another buffer in that one's place. Then it has looked
        // already, and "no" is right as well.
        reading > 1
            && self.head.load(Ordering::Relaxed)
                == self.buffer(reading - 1).end.load(Ordering::Relaxed)
    }

    /// Bytes that were read since the connection began.
    pub fn total_read(&self) -> u64 {
        self.head.load(Ordering::Relaxed)
    }
}

/// The right to read from one connection; dropping it gives it back.
#[derive(Debug)]
pub struct Reader<'a> {
    window: &'a ReceiveWindow,
    /// Number of the buffer that the next byte stands in.
    reading: u64,
}

impl Reader<'_> {
    /// Address and number of the unread bytes, as far as they are in one buffer.
    #[inline]
    pub fn readable(&self) -> Option<(u64, usize)> {
        let tail = self.window.tail.load(Ordering::Acquire);
        let head = own(&self.window.head);
        if tail == head {
            return None;
        }
        // What follows in the next buffer is for the next time.
        let buffer = self.window.buffer(self.reading);
        let end = tail.min(buffer.end.load(Ordering::Relaxed));
        let origin = buffer.origin.load(Ordering::Relaxed);
        Some((origin.wrapping_add(head), (end - head) as usize))
    }

    /// `count` bytes of [`readable`](Self::readable) were copied out.
    #[inline]
    pub fn consume(&mut self, count: usize) {
        let head = own(&self.window.head) + count as u64;
        // Before the poller may learn that the buffer is done with, and replace it.
        if head == self.window.buffer(self.reading).end.load(Ordering::Relaxed) {
            self.reading += 1;
        }
        // Release: the copies are over before the poller may reuse the buffer.
        self.window.head.store(head, Ordering::Release);
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.window.reading.store(self.reading, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_where_they_arrived() {
        let window = ReceiveWindow::new();
        assert!(window.is_consumed());
        window.announce(1000, 10);
        assert_eq!(window.reader().unwrap().readable(), None);
        window.arrived(4).unwrap();
        assert_eq!(window.reader().unwrap().readable(), Some((1000, 4)));
        window.reader().unwrap().consume(3);
        window.arrived(6).unwrap();
        assert_eq!(window.reader().unwrap().readable(), Some((1003, 7)));
        assert!(!window.is_consumed());
        window.reader().unwrap().consume(7);
        assert!(window.is_consumed());
        window.announce(0, 5);
        window.arrived(5).unwrap();
        assert_eq!(window.reader().unwrap().readable(), Some((0, 5)));
        assert_eq!(window.total_read(), 10);
    }

    #[test]
    fn the_peer_fills_one_buffer_while_the_one_before_is_read() {
        let window = ReceiveWindow::new();
        window.announce(1000, 4);
        window.arrived(4).unwrap();
        assert!(window.is_full() && window.is_other_free() && !window.is_consumed());
        window.reader().unwrap().consume(1);
        window.announce(2000, 3);
        assert!(!window.is_other_free(), "three bytes of the first are unread");
        window.arrived(2).unwrap();
        assert_eq!(
            window.reader().unwrap().readable(),
            Some((1001, 3)),
            "up to its end and no further"
        );
        window.reader().unwrap().consume(3);
        assert!(window.is_other_free() && !window.is_full());
        assert_eq!(window.reader().unwrap().readable(), Some((2000, 2)));
        window.reader().unwrap().consume(2);
        assert_eq!(window.reader().unwrap().readable(), None);
        window.arrived(1).unwrap();
        window.announce(1000, 4);
        window.arrived(4).unwrap();
        assert!(!window.is_other_free());
        assert_eq!(window.unread(), 5);
        assert_eq!(window.reader().unwrap().readable(), Some((2002, 1)));
        window.reader().unwrap().consume(1);
        assert_eq!(window.reader().unwrap().readable(), Some((1000, 4)));
        assert_eq!(window.position(), (4, 4));
        window.reader().unwrap().consume(4);
        assert!(window.is_consumed());
    }

    #[test]
    fn immediates_that_exceed_or_wrap_are_refused() {
        let window = ReceiveWindow::new();
        assert_eq!(window.arrived(1), Err(Overrun { claimed: 1, room: 0 }));
        window.announce(0, 8);
        window.arrived(8).unwrap();
        assert_eq!(window.arrived(u32::MAX), Err(Overrun { claimed: u32::MAX, room: 0 }));
        assert_eq!(window.unread(), 8);
        window.arrived(0).unwrap();
    }

    #[test]
    fn a_part_read_buffer_is_not_consumed() {
        let window = ReceiveWindow::new();
        window.announce(0, 8);
        window.arrived(5).unwrap();
        window.reader().unwrap().consume(5);
        assert!(!window.is_consumed(), "three bytes are still the peer's to write");
        assert_eq!(window.position(), (5, 8));
    }

    #[test]
    fn a_reader_knows_when_a_buffer_is_read() {
        let window = ReceiveWindow::new();
        assert!(!window.is_buffer_read(), "there was none");
        window.announce(0, 4);
        window.arrived(4).unwrap();
        window.reader().unwrap().consume(3);
        assert!(!window.is_buffer_read());
        window.reader().unwrap().consume(1);
        assert!(window.is_buffer_read());
        window.announce(64, 4);
        window.arrived(1).unwrap();
        assert!(window.is_buffer_read(), "nothing of the next one was read");
        window.reader().unwrap().consume(1);
        assert!(!window.is_buffer_read());
    }

    #[test]
    fn the_right_to_read_is_one_reader_s() {
        let window = ReceiveWindow::new();
        window.announce(1000, 4);
        window.arrived(4).unwrap();
        let mut reader = window.reader().unwrap();
        assert!(window.reader().is_none() && window.reader().is_none());
        reader.consume(1);
        assert_eq!(reader.readable(), Some((1001, 3)));
        drop(reader);
        assert_eq!(window.reader().unwrap().readable(), Some((1001, 3)));
    }
}
