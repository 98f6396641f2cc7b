// SPDX-License-Identifier: BSD-3-Clause
//! Received bytes, on their way from the poller to the reader.
//!
//! The peer writes into the announced buffer from its start to its last byte.
//! Each immediate moves `tail`; the reader copies out and moves `head`. When the
//! buffer is exactly full and consumed it, or another one, is announced, and the
//! peer starts at its first byte. All three counters count bytes since the
//! connection began and never wrap in practice (u64), so that "empty" and "full"
//! can't be confused and a new announcement resets nothing that the reader may
//! be looking at.

use super::sync::{AtomicU64, Ordering, own};
use std::fmt;

/// See the module's text. `arrived` and `announce` belong to the poller,
/// `readable` and `consume` to the reader; the rest may be called from anywhere.
#[derive(Debug)]
pub struct ReceiveWindow {
    /// Bytes that arrived; stored by the poller.
    tail: AtomicU64,
    /// Bytes that were read; stored by the reader.
    head: AtomicU64,
    /// Where the connection's first byte would stand if the current buffer went back
    /// as far: its address, less the value of `tail` at which it began. Stored by the
    /// poller while the window is consumed, published to the reader by `tail`.
    origin: AtomicU64,
    /// Value of `tail` at which the current buffer is full; used by the poller alone.
    limit: AtomicU64,
    /// Bytes of the current buffer; used by the poller alone.
    length: AtomicU64,
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
        Self {
            tail: AtomicU64::new(0),
            head: AtomicU64::new(0),
            origin: AtomicU64::new(0),
            limit: AtomicU64::new(0),
            length: AtomicU64::new(0),
        }
    }

    /// Poller: whether the buffer is exactly full and wholly consumed, so that it
    /// may be replaced and must be announced for the peer to go on.
    pub fn is_consumed(&self) -> bool {
        // Acquire: the reader's copies out of the buffer are over.
        self.head.load(Ordering::Acquire) == own(&self.limit)
    }

    /// Poller: opens a buffer of `length` bytes at `address`, the one before or another;
    /// the one before is the poller's alone from here on. Only while
    /// [`is_consumed`](Self::is_consumed).
    pub fn announce(&self, address: u64, length: u32) {
        debug_assert!(self.is_consumed());
        let start = own(&self.tail);
        self.origin.store(address.wrapping_sub(start), Ordering::Relaxed);
        self.limit.store(start + u64::from(length), Ordering::Relaxed);
        self.length.store(length.into(), Ordering::Relaxed);
    }

    /// Poller: an immediate said that `count` more bytes stand in the buffer.
    ///
    /// # Errors
    /// [`Overrun`] if they can't; nothing changes then.
    pub fn arrived(&self, count: u32) -> Result<(), Overrun> {
        let tail = own(&self.tail);
        let room = own(&self.limit) - tail;
        if u64::from(count) > room {
            return Err(Overrun { claimed: count, room });
        }
        // Release: the bytes themselves, and `origin`, come before the new tail.
        self.tail.store(tail + u64::from(count), Ordering::Release);
        Ok(())
    }

    /// Reader: where unread bytes stand, as address and length.
    pub fn readable(&self) -> Option<(u64, usize)> {
        let tail = self.tail.load(Ordering::Acquire);
        let head = own(&self.head);
        if tail == head {
            return None;
        }
        // Unread bytes lie in the current buffer only: an earlier one was
        // consumed to its end before this one was announced.
        let origin = self.origin.load(Ordering::Relaxed);
        Some((origin.wrapping_add(head), (tail - head) as usize))
    }

    /// Reader: `count` bytes of [`readable`](Self::readable) were copied out.
    pub fn consume(&self, count: usize) {
        let head = own(&self.head);
        // Release: the copies are over before the poller may reuse the buffer.
        self.head.store(head + count as u64, Ordering::Release);
    }

    /// Bytes that wait for the reader at this moment.
    pub fn unread(&self) -> u64 {
        // Head first: it can't pass the tail that is loaded after it.
        let head = self.head.load(Ordering::Acquire);
        self.tail.load(Ordering::Relaxed) - head
    }

    /// Poller: how much of the present buffer is written, and its size, in bytes.
    pub fn position(&self) -> (u64, u64) {
        let length = own(&self.length);
        (own(&self.tail) + length - own(&self.limit), length)
    }

    /// Bytes that were read since the connection began.
    pub fn total_read(&self) -> u64 {
        self.head.load(Ordering::Relaxed)
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
        assert_eq!(window.readable(), None);
        window.arrived(4).unwrap();
        assert_eq!(window.readable(), Some((1000, 4)));
        window.consume(3);
        window.arrived(6).unwrap();
        assert_eq!(window.readable(), Some((1003, 7)));
        assert!(!window.is_consumed());
        window.consume(7);
        assert!(window.is_consumed());
        window.announce(0, 5);
        window.arrived(5).unwrap();
        assert_eq!(window.readable(), Some((0, 5)));
        assert_eq!(window.total_read(), 10);
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
        window.consume(5);
        assert!(!window.is_consumed(), "three bytes are still the peer's to write");
        assert_eq!(window.position(), (5, 8));
    }
}
