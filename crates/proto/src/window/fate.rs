// SPDX-License-Identifier: BSD-3-Clause
//! What became of a connection, on its way from whoever finds out to everybody else.
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

/// What became of the connection to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Fate {
    /// It is there.
    Alive = 0,
    /// It left, or was lost: what it sent before is still read.
    Gone = 1,
    /// It broke the protocol, or our own side failed: nothing more is read.
    Broken = 2,
}

/// See the module's text. Both may be called from anywhere.
#[derive(Debug)]
pub struct SharedFate(AtomicU8);

impl Default for SharedFate {
    fn default() -> Self {
        Self(AtomicU8::new(Fate::Alive as u8))
    }
}

impl SharedFate {
    /// The fate at this moment.
    pub fn get(&self) -> Fate {
        // Acquire: the bytes that arrived before the end are seen by who sees the end.
        match self.0.load(Ordering::Acquire) {
            0 => Fate::Alive,
            1 => Fate::Gone,
            _ => Fate::Broken,
        }
    }

    /// It gets no better: `Gone` after `Alive`, `Broken` after both.
    pub fn worsen(&self, fate: Fate) {
        // Release: what arrived comes before the end.
        self.0.fetch_max(fate as u8, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_fate_only_gets_worse() {
        let fate = SharedFate::default();
        assert_eq!(fate.get(), Fate::Alive);
        for (word, then) in [
            (Fate::Gone, Fate::Gone),
            (Fate::Alive, Fate::Gone),
            (Fate::Broken, Fate::Broken),
            (Fate::Gone, Fate::Broken),
        ] {
            fate.worsen(word);
            assert_eq!(fate.get(), then);
        }
    }
}
