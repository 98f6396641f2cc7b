// SPDX-License-Identifier: BSD-3-Clause
//! The peer's announced buffer, on its way from the poller to the writer.
//!
//! The poller puts an announcement into a mailbox that holds one; the writer
//! takes it when its current window is used up. The writer publishes how much of
//! the current one is `left` before it posts the work request that uses it, so
//! that an announcement, which a peer may send only after its buffer was filled
//! to the last byte, always finds the mailbox empty and nothing left. Whatever
//! comes earlier is a violation and is refused.

use super::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::fmt;

/// A buffer of the peer, as it announced it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// Address of the first byte, on the peer.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// The peer's remote key.
    pub rkey: u32,
}

/// An announcement that came while the one before still had room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowInUse {
    /// Bytes of the earlier announcement that were not used yet.
    pub left: u32,
}

impl fmt::Display for WindowInUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "receive buffer announced while {} bytes of the one before were unused",
            self.left
        )
    }
}

/// The peer's announced buffer, between poller and writer. `announce` belongs to the poller,
/// `take` and `publish_left` to the writer, the others to both.
#[derive(Debug, Default)]
pub struct SendWindow {
    address: AtomicU64,
    /// Length in the upper half, remote key in the lower.
    length_and_key: AtomicU64,
    /// Whether the mailbox holds an announcement: set by the poller, cleared by the writer.
    full: AtomicBool,
    /// Bytes of the current window that the writer may still use; stored by the writer.
    /// A number and no more: what is ordered is ordered by `full`.
    left: AtomicU32,
}

impl SendWindow {
    /// Poller: the peer opened a buffer. One of 0 bytes is legal and changes nothing.
    ///
    /// # Errors
    /// [`WindowInUse`] if the announcement before was not used to its last byte.
    pub fn announce(&self, new: Announcement) -> Result<(), WindowInUse> {
        // Acquire pairs with the writer's clearing: its loads of the fields are over.
        let waiting = if self.full.load(Ordering::Acquire) {
            (self.length_and_key.load(Ordering::Relaxed) >> 32) as u32
        } else {
            0
        };
        let left = waiting.max(self.left.load(Ordering::Relaxed));
        if left > 0 {
            return Err(WindowInUse { left });
        }
        if new.length > 0 {
            self.address.store(new.address, Ordering::Relaxed);
            let packed = (u64::from(new.length) << 32) | u64::from(new.rkey);
            self.length_and_key.store(packed, Ordering::Relaxed);
            self.full.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Poller: the buffer that was announced last, whatever is left of it.
    pub fn announced(&self) -> Option<Announcement> {
        // The poller's own stores.
        let packed = self.length_and_key.load(Ordering::Relaxed);
        let address = self.address.load(Ordering::Relaxed);
        let length = (packed >> 32) as u32;
        (length > 0).then_some(Announcement { address, length, rkey: packed as u32 })
    }

    /// Writer: the next window, if one waits. Only when the current one is used up.
    pub fn take(&self) -> Option<Announcement> {
        if !self.full.load(Ordering::Acquire) {
            return None;
        }
        let packed = self.length_and_key.load(Ordering::Relaxed);
        let taken = Announcement {
            address: self.address.load(Ordering::Relaxed),
            length: (packed >> 32) as u32,
            rkey: packed as u32,
        };
        // Left before empty: whoever looks in between sees room, never none.
        self.left.store(taken.length, Ordering::Relaxed);
        self.full.store(false, Ordering::Release);
        Some(taken)
    }

    /// Writer: so many bytes of the current window remain. Called before the
    /// work request that uses the others is posted.
    pub fn publish_left(&self, left: u32) {
        self.left.store(left, Ordering::Relaxed);
    }

    /// How much of the latest announced buffer is written, and its size, in bytes. Exact
    /// while nobody writes; for those who watch.
    pub fn position(&self) -> (u32, u32) {
        let waits = self.full.load(Ordering::Relaxed);
        let size = (self.length_and_key.load(Ordering::Relaxed) >> 32) as u32;
        let left = if waits { size } else { self.left.load(Ordering::Relaxed) };
        (size.saturating_sub(left), size)
    }

    /// Whether a byte could be written into the peer's memory at this moment.
    pub fn has_room(&self) -> bool {
        self.full.load(Ordering::Acquire) || self.left.load(Ordering::Relaxed) > 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const BUFFER: Announcement = Announcement { address: 0xfeed_0000_0000, length: 100, rkey: 9 };

    #[test]
    fn an_announcement_reaches_the_writer_once() {
        let window = SendWindow::default();
        assert!(!window.has_room());
        assert_eq!(window.announced(), None);
        window.announce(BUFFER).unwrap();
        assert!(window.has_room());
        assert_eq!(window.take(), Some(BUFFER));
        assert_eq!(window.take(), None);
        assert_eq!(window.announced(), Some(BUFFER), "the poller knows it still");
        assert!(window.has_room());
        window.publish_left(0);
        assert!(!window.has_room());
    }

    #[test]
    fn the_position_is_that_of_the_latest_announcement() {
        let window = SendWindow::default();
        assert_eq!(window.position(), (0, 0));
        window.announce(BUFFER).unwrap();
        assert_eq!(window.position(), (0, 100));
        window.take();
        window.publish_left(30);
        assert_eq!(window.position(), (70, 100));
        window.publish_left(0);
        window.announce(Announcement { length: 50, ..BUFFER }).unwrap();
        assert_eq!(window.position(), (0, 50));
    }

    #[test]
    fn a_window_in_use_is_not_announced_again() {
        let window = SendWindow::default();
        window.announce(BUFFER).unwrap();
        assert_eq!(window.announce(BUFFER), Err(WindowInUse { left: 100 }), "one waits");
        window.take();
        window.publish_left(1);
        assert_eq!(window.announce(BUFFER), Err(WindowInUse { left: 1 }), "one is in use");
        window.publish_left(0);
        window.announce(BUFFER).unwrap();
    }

    #[test]
    fn a_window_of_no_bytes_means_no_room_and_may_be_repeated() {
        let window = SendWindow::default();
        for _ in 0..3 {
            window.announce(Announcement { length: 0, ..BUFFER }).unwrap();
            assert!(!window.has_room());
        }
        window.announce(BUFFER).unwrap();
        assert!(window.has_room());
    }
}
