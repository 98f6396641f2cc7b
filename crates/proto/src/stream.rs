// SPDX-License-Identifier: BSD-3-Clause
//! The bytes of one connection, both ways: what its reader, its writer and the poller share.
//!
//! The server may read and write on any of its threads. Who reads while somebody else does, or
//! writes, is told to come again. The poller puts in what completions and messages say. Nothing here waits, and nothing allocates but
//! the regions that a write [registers](Transmit::register).

use crate::send_queue::{SendQueue, Sent, Shortage, Transmit};
use crate::staging::Steps;
use crate::window::sync::{AtomicBool, Ordering};
use crate::window::{Chunk, PeerState, ReceiveWindow, SharedPeerState};

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// So many bytes.
    Bytes(usize),
    /// None yet, or somebody else is reading at this moment.
    Again,
    /// None any more.
    End,
    /// The connection is broken.
    Broken,
}

/// The result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written<E> {
    /// So many bytes were posted, and if that is not all, then why.
    Posted(usize, Option<Shortage<E>>),
    /// The peer has left: all is taken and goes nowhere.
    Discarded,
    /// Somebody else is writing at this moment.
    Busy,
    /// The connection is broken.
    Broken,
}

/// One connection's bytes. `R` is a region of staging memory.
#[derive(Debug)]
pub struct Stream<R> {
    inbound: ReceiveWindow,
    outbound: SendQueue<R>,
    peer: SharedPeerState,
    /// The server has shut the connection down, and will close it.
    shut: AtomicBool,
}

impl<R> Stream<R> {
    /// A stream without windows. See [`SendQueue::new`].
    pub fn new(depth: usize, small_staging: usize, steps: Steps) -> Self {
        Self {
            inbound: ReceiveWindow::new(),
            outbound: SendQueue::new(depth, small_staging, steps),
            peer: SharedPeerState::default(),
            shut: AtomicBool::new(false),
        }
    }

    /// Has `copy` take received bytes, at most `length`: it is told where they stand and how
    /// many they are. Nobody else reads meanwhile.
    #[inline]
    pub fn read(&self, length: usize, copy: impl FnOnce(u64, usize)) -> ReadOutcome {
        self.take(|address, waiting| {
            let count = waiting.min(length);
            if count > 0 {
                copy(address, count);
            }
            count
        })
    }

    /// The same, where `take` is told how many bytes there are and says how many it has taken.
    #[inline]
    pub fn take(&self, take: impl FnOnce(u64, usize) -> usize) -> ReadOutcome {
        // First, and the bytes afterwards: those that came before the end are read.
        let peer = self.peer.get();
        if peer == PeerState::Failed {
            return ReadOutcome::Broken;
        }
        if self.is_shut() {
            return ReadOutcome::End;
        }
        let Some(mut reader) = self.inbound.reader() else { return ReadOutcome::Again };
        let Some((address, waiting)) = reader.readable() else {
            let over = peer == PeerState::Disconnected;
            return if over { ReadOutcome::End } else { ReadOutcome::Again };
        };
        let count = take(address, waiting);
        if count == 0 {
            return ReadOutcome::Again;
        }
        assert!(count <= waiting, "no more than there are");
        reader.consume(count);
        ReadOutcome::Bytes(count)
    }

    /// Writer: takes as much of `length` bytes as there is room for, and returns at once.
    #[inline]
    pub fn write<T: Transmit<R>>(&self, length: usize, transmit: &mut T) -> Written<T::Error> {
        self.post(|outbound| outbound.write(length, transmit))
    }

    /// Writer: the same of bytes that `fill` puts into their place; see [`SendQueue::fill`].
    pub fn fill<T: Transmit<R>>(
        &self,
        most: usize,
        transmit: &mut T,
        fill: impl FnOnce(&mut T, Option<&R>, Chunk) -> (T::Staged, usize),
    ) -> Written<T::Error> {
        self.post(|outbound| outbound.fill(most, transmit, fill))
    }

    #[inline]
    fn post<E>(&self, post: impl FnOnce(&SendQueue<R>) -> Option<Sent<E>>) -> Written<E> {
        match self.peer.get() {
            PeerState::Connected => {}
            // As a socket does after the peer's close: the commands that it sent
            // before are all carried out, their replies have nowhere to go.
            PeerState::Disconnected => return Written::Discarded,
            PeerState::Failed => return Written::Broken,
        }
        if self.is_shut() {
            return Written::Broken;
        }
        let Some(sent) = post(&self.outbound) else { return Written::Busy };
        if matches!(sent.shortage, Some(Shortage::Failed(_))) {
            self.peer.escalate(PeerState::Disconnected);
        }
        Written::Posted(sent.bytes, sent.shortage)
    }

    /// Whether a read would not answer [`ReadOutcome::Again`].
    pub fn is_readable(&self) -> bool {
        self.inbound.unread() > 0 || self.peer.get() != PeerState::Connected || self.is_shut()
    }

    /// Whether a write would take a byte, or find that the connection is over.
    pub fn is_writable(&self) -> bool {
        self.peer.get() != PeerState::Connected || self.outbound.is_writable()
    }

    /// Whether the peer is there.
    pub fn peer_state(&self) -> PeerState {
        self.peer.get()
    }

    /// The peer's state is `state`, unless it is known to be worse.
    pub fn escalate(&self, state: PeerState) {
        self.peer.escalate(state);
    }

    /// Nothing is read or written any more. What was written is delivered all the same.
    pub fn shut_down(&self) {
        self.shut.store(true, Ordering::Relaxed);
    }

    /// Whether [`shut_down`](Self::shut_down) was called.
    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::Relaxed)
    }

    /// Bytes on their way in. For the session alone, which has the poller's half of it: whoever
    /// says what arrived says which memory a reader looks at.
    pub(crate) fn inbound(&self) -> &ReceiveWindow {
        &self.inbound
    }

    /// Reader: whether the last byte that was read was the last of its buffer, and no other has
    /// been read since.
    pub fn is_buffer_read(&self) -> bool {
        self.inbound.is_buffer_read()
    }

    /// Bytes that wait for the reader at this moment.
    pub fn unread(&self) -> u64 {
        self.inbound.unread()
    }

    /// Bytes that were read since the connection began.
    pub fn total_read(&self) -> u64 {
        self.inbound.total_read()
    }

    /// Poller: how much of the receive buffer that was announced last is written, and its size,
    /// in bytes.
    pub fn received(&self) -> (u64, u64) {
        self.inbound.position()
    }

    /// Bytes on their way out.
    pub fn outbound(&self) -> &SendQueue<R> {
        &self.outbound
    }

    /// A number that grows with every byte read and work request posted.
    pub fn progress(&self) -> u64 {
        self.inbound.total_read().wrapping_add(self.outbound.total_posted())
    }
}
