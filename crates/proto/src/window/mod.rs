// SPDX-License-Identifier: BSD-3-Clause
//! The hand-overs between the poller and whoever reads or writes a connection.
//!
//! The poller is the server's main thread; the reader and the writer are the
//! main thread or any of its I/O threads, at most one of each at a time: who reads has a
//! [`Reader`], who writes a [`Writer`], and there is no second one meanwhile. Each
//! type here has one producer and one consumer, and every field has one owner
//! who stores into it; the other side only loads. ([`SharedPeerState`] alone may be stored
//! to by all, since it only ever grows.) Nothing here does I/O, blocks
//! or allocates, so that loom can drive the same types (`--cfg loom`, see `../model.rs`).
//!
//! * [`ReceiveWindow`]: bytes that the peer wrote into our buffer, on their way
//!   to the reader.
//! * [`SendWindow`]: the peer's announced buffer, on its way to the writer.
//! * [`SendLedger`]: work requests and staging bytes in flight, given back by
//!   their completions.
//! * [`SharedPeerState`]: word that the connection is over, from whoever finds out.

mod ledger;
mod peer_state;
mod receive;
mod send;
pub(crate) mod sync;

pub use ledger::{Chunk, SendLedger, Writer};
pub use peer_state::{PeerState, SharedPeerState};
pub use receive::{Overrun, Reader, ReceiveWindow};
pub use send::{Announcement, SendWindow, WindowInUse};
