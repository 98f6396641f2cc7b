// SPDX-License-Identifier: BSD-3-Clause
//! Whether the peer is there, on its way from whoever finds out to everybody else.
//!
//! The poller sees the peer leave or break the protocol; a writer on an I/O thread
//! may find that nothing can be posted any more; the server may shut the connection
//! down. None of them stops a reader or writer that is at work at that moment, and
//! none frees anything: they leave word here, and the memory stays until the server
//! has closed, which it does when no job of the connection is under way.
//!
//! What a peer sent before it left is still read. So word of it comes after the
//! received bytes, and a reader looks here *first* and at the bytes afterwards.

use super::sync::{AtomicU8, Ordering};

/// Whether the peer is there. Each state is worse than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum PeerState {
    /// It is there, as far as is known.
    Connected = 0,
    /// It left, or was lost: what it sent before is still read.
    Disconnected = 1,
    /// It broke the protocol, or our own side failed: nothing more is read.
    Failed = 2,
}

/// A [`PeerState`] that all threads share. Any of them may load it and escalate it.
#[derive(Debug)]
pub struct SharedPeerState(AtomicU8);

impl Default for SharedPeerState {
    fn default() -> Self {
        Self(AtomicU8::new(PeerState::Connected as u8))
    }
}

impl SharedPeerState {
    /// The state at this moment.
    pub fn get(&self) -> PeerState {
        // Acquire: the bytes that arrived before the end are seen by who sees the end.
        match self.0.load(Ordering::Acquire) {
            0 => PeerState::Connected,
            1 => PeerState::Disconnected,
            _ => PeerState::Failed,
        }
    }

    /// Moves to `state`, unless the present one is as bad or worse.
    pub fn escalate(&self, state: PeerState) {
        // Release: what arrived comes before the end.
        self.0.fetch_max(state as u8, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_state_only_gets_worse() {
        let shared = SharedPeerState::default();
        assert_eq!(shared.get(), PeerState::Connected);
        for (word, then) in [
            (PeerState::Disconnected, PeerState::Disconnected),
            (PeerState::Connected, PeerState::Disconnected),
            (PeerState::Failed, PeerState::Failed),
            (PeerState::Disconnected, PeerState::Failed),
        ] {
            shared.escalate(word);
            assert_eq!(shared.get(), then);
        }
    }
}
