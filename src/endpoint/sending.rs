// SPDX-License-Identifier: BSD-3-Clause
//! What is written to the peer: the memory that the send loop copies into, and the work
//! requests that it posts.

use super::control::post_error;
use super::{Endpoint, activity};
use crate::endpoint::wr_id::WrKind;
use crate::host::main_cell::is_main_thread;
use crate::metrics::METRICS;
use proto::send_queue::{PayloadWrite, PostError, Shortage, Transmit};
use proto::stream::Written;
use proto::window::Chunk;
use std::io::IoSlice;
use std::ptr;
use std::sync::atomic::Ordering;
use verbs::Error;
use verbs::mr::{Access, Region, Sge};
use verbs::qp::RemoteBuf;

/// Most bytes of one call of the server: who is given more than any device sends while it is
/// copied would keep the thread from others, and the server can't be answered 2 GiB.
const CALL: usize = 64 << 20;

/// The result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// So many bytes were taken, at least one.
    Bytes(usize),
    /// No room at this moment; the write handler will be called when there is.
    Again,
    /// The connection is broken.
    Broken,
}

impl Endpoint {
    /// Whether the write handler has something to do.
    pub fn is_writable(&self) -> bool {
        self.stream.is_writable()
    }

    /// Writes as much of `pieces` as the peer's window, the staging memory and the
    /// send queue take, and returns at once. Any thread; who writes while somebody else does
    /// is told to come again.
    pub fn write(&self, pieces: &[IoSlice<'_>]) -> WriteOutcome {
        if self.held.load(Ordering::Relaxed) && !is_main_thread() {
            METRICS.writes_before_sync.add(1);
            return WriteOutcome::Again;
        }
        let total = at_once(pieces);
        let source = Source { pieces, within: 0 };
        let (done, shortage) =
            match self.stream.write(total, &mut Sender { endpoint: self, source }) {
                Written::Posted(done, shortage) => (done, shortage),
                Written::Discarded => return WriteOutcome::Bytes(total),
                Written::Busy => return WriteOutcome::Again,
                Written::Broken => return WriteOutcome::Broken,
            };
        let main = is_main_thread();
        if done > 0 {
            self.activity.wrote(done as u64);
        }
        if let Some(shortage) = shortage {
            if let Shortage::Failed(error) = shortage {
                METRICS.posts_failed.add(1);
                self.post_error.store(error.errno, Ordering::Relaxed);
            }
            self.activity.hold_back(match shortage {
                Shortage::Window => activity::Shortage::Window,
                Shortage::Staging | Shortage::Failed(_) => activity::Shortage::Staging,
            });
            if main { &METRICS.short_writes_main } else { &METRICS.short_writes_io }.add(1);
        }
        if done == 0 {
            return if total == 0 { WriteOutcome::Bytes(0) } else { WriteOutcome::Again };
        }
        METRICS.bytes_sent.add(done as u64);
        if main { &METRICS.writes_main } else { &METRICS.writes_io }.add(1);
        WriteOutcome::Bytes(done)
    }

    /// Whether the next job that an I/O thread gets of this connection is told to come again
    /// when it writes. Main thread, before the job is handed over, which orders this.
    pub fn hold_writes(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    /// Bytes of all staging memory, unless somebody writes at this moment.
    pub fn staging_bytes(&self) -> Option<usize> {
        self.stream.outbound().staging_bytes(Region::length)
    }

    /// The error number of a write that could not be posted for good, once. Main thread.
    pub fn take_post_error(&self) -> Option<i32> {
        Some(self.post_error.swap(0, Ordering::Relaxed)).filter(|errno| *errno != 0)
    }
}

/// One write of the server: its bytes, and the endpoint that they go through.
struct Sender<'a> {
    endpoint: &'a Endpoint,
    source: Source<'a>,
}

impl Transmit<Region> for Sender<'_> {
    type Staged = Sge<'static>;
    type Error = Error;

    fn register(&mut self, length: usize) -> Option<Region> {
        self.endpoint.register(length, Access::Local)
    }

    fn copy(&mut self, region: Option<&Region>, chunk: Chunk) -> Sge<'static> {
        let (region, start) = match region {
            Some(region) => (region, 0),
            None => (&self.endpoint.control, self.endpoint.layout.staging_at()),
        };
        debug_assert!(start + chunk.offset + chunk.length <= region.length());
        let offset = start + chunk.offset;
        // SAFETY: the chunk lies in the staging memory and is nobody else's until its
        // completion. The writer gives up no region between this call and the next, which
        // posts it.
        unsafe {
            self.source.copy_to(region.start().add(offset), chunk.length);
            region.sge(offset, chunk.length as u32).unbound()
        }
    }

    fn post(&mut self, staged: Sge<'static>, write: PayloadWrite) -> Result<(), PostError<Error>> {
        let Endpoint { qp, key, .. } = self.endpoint;
        let wr_id = key.wr_id(WrKind::Payload(write.sequence));
        let to = RemoteBuf { address: write.address, rkey: write.rkey };
        qp.post_write(wr_id, staged, to, write.signalled).map_err(post_error)
    }
}

/// How many bytes of these pieces one call takes at most.
fn at_once(pieces: &[IoSlice<'_>]) -> usize {
    pieces.iter().fold(0, |sum: usize, piece| sum.saturating_add(piece.len())).min(CALL)
}

/// Bytes to send, in pieces.
struct Source<'a> {
    pieces: &'a [IoSlice<'a>],
    /// Bytes of the first piece that were copied already.
    within: usize,
}

impl Source<'_> {
    /// Copies the next `length` bytes, of which there must be as many.
    ///
    /// # Safety
    /// `to` is writable for `length` bytes.
    unsafe fn copy_to(&mut self, mut to: *mut u8, mut length: usize) {
        while length > 0 {
            let rest = &self.pieces[0][self.within..];
            let count = rest.len().min(length);
            // SAFETY: by the caller's promise; the two never overlap, one is ours.
            unsafe {
                ptr::copy_nonoverlapping(rest.as_ptr(), to, count);
                to = to.add(count);
            }
            length -= count;
            self.within += count;
            if self.within == self.pieces[0].len() {
                self.pieces = &self.pieces[1..];
                self.within = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_takes_no_more_than_the_server_can_be_told() {
        assert_eq!(at_once(&[]), 0);
        assert_eq!(at_once(&[b"one", &b""[..], b"four"].map(IoSlice::new)), 7);
        let large = vec![0; CALL / 2 + 1];
        assert_eq!(at_once(&[IoSlice::new(&large)]), large.len());
        assert_eq!(at_once(&[IoSlice::new(&large), IoSlice::new(&large)]), CALL);
    }

    #[test]
    fn pieces_are_joined_in_order_whatever_the_steps() {
        let text = b"one two three";
        let pieces = [&text[..3], &text[3..3], &text[3..8], &text[8..]].map(IoSlice::new);
        for step in 1..=text.len() {
            let mut source = Source { pieces: &pieces, within: 0 };
            let mut out = vec![0_u8; text.len()];
            let mut at = 0;
            while at < text.len() {
                let count = step.min(text.len() - at);
                // SAFETY: `out` holds as many bytes as the pieces.
                unsafe { source.copy_to(out.as_mut_ptr().add(at), count) };
                at += count;
            }
            assert_eq!(out, text);
        }
    }
}
