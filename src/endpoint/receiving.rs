// SPDX-License-Identifier: BSD-3-Clause
//! What the peer writes: the receive buffers, their announcements, and the copy out of them.

use super::{Endpoint, PeerState, ReadOutcome};
use crate::host::main_cell::is_main_thread;
use crate::metrics::METRICS;
use crate::time;
use proto::buffer_size;
use proto::session::Millis;
use proto::wire::{Memory, Message};
use std::ptr;
use verbs::Error;
use verbs::mr::{Access, Region};

/// The receive buffers.
#[derive(Debug)]
pub(super) struct Receive {
    /// The one that was announced last.
    pub(super) region: Region,
    /// The one before, if there are two. Perhaps it is read still.
    pub(super) other: Option<Region>,
    /// When it was announced, unless it was not yet.
    pub(super) since: Option<Millis>,
    /// The peer's writes until then, since the connection began.
    pub(super) writes_before: u64,
    /// The largest that one may be, in bytes.
    pub(super) most: u32,
}

impl Endpoint {
    /// Whether the read handler has something to do.
    pub fn is_readable(&self) -> bool {
        self.stream.is_readable()
    }

    /// Copies received bytes to `to`. Any thread, one at a time.
    ///
    /// # Safety
    /// `to` is writable for `length` bytes.
    pub unsafe fn read(&self, to: *mut u8, length: usize) -> ReadOutcome {
        let outcome = self.stream.read(length, |address, count| {
            // SAFETY: the window says that these bytes of the receive buffer arrived and
            // were not read. Until they are consumed the buffer is not freed nor announced,
            // and the peer may not write there (one that does spoils its own request); `to`
            // is the caller's.
            unsafe {
                let from = ptr::with_exposed_provenance::<u8>(address as usize);
                ptr::copy_nonoverlapping(from, to, count);
            };
        });
        if let ReadOutcome::Bytes(count) = outcome {
            METRICS.bytes_received.add(count as u64);
            let reads = if is_main_thread() { &METRICS.reads_main } else { &METRICS.reads_io };
            reads.add(1);
        }
        outcome
    }

    /// Bytes of the receive buffers.
    pub fn receive_bytes(&self) -> usize {
        let receive = self.receive.open();
        receive.region.length() + receive.other.as_ref().map_or(0, Region::length)
    }

    /// Whether the receive window is consumed and nobody has tried to announce it. Main thread.
    pub fn is_announcement_missed(&self) -> bool {
        let own = self.own();
        self.stream.inbound().is_consumed()
            && !own.announcement_due
            && own.session.is_established()
            && self.stream.peer_state() == PeerState::Connected
    }

    /// Opens the receive window again if it is full, and consumed or there is another
    /// buffer. Main thread.
    ///
    /// # Errors
    /// If the message can't be posted.
    pub fn announce_if_full(&self) -> Result<(), Error> {
        let own = self.own();
        let due = own.announcement_due;
        let wanted = own.session.is_established()
            && (due || self.stream.inbound().is_full())
            && self.stream.peer_state() == PeerState::Connected;
        drop(own);
        if !wanted || (!due && !self.turn_receive_buffer()) {
            return Ok(());
        }
        let receive = self.receive.open();
        let memory = Memory {
            address: receive.region.start().expose_provenance() as u64,
            length: receive.region.length() as u32,
            rkey: receive.region.rkey(),
        };
        drop(receive);
        if !due {
            self.stream.inbound().announce(memory.address, memory.length);
        }
        let message = Message::RegisterXferMemory(memory);
        let sent = self.send_control(message)?;
        self.own().announcement_due = !sent;
        if sent {
            METRICS.announcements_sent.add(1);
        }
        Ok(())
    }

    /// Has the next receive buffer ready, of a size that fits the traffic, the present one
    /// being full. `false` if the peer has to wait until that was read.
    fn turn_receive_buffer(&self) -> bool {
        let now = time::now();
        let writes = self.own().session.writes();
        let mut receive = self.receive.open();
        let receive = &mut *receive;
        let took = receive.since.map(|since| now - since);
        let present = receive.region.length() as u32;
        let by = writes - receive.writes_before;
        let wanted =
            took.map_or(present, |took| buffer_size::next(present, receive.most, took, by));
        let fits = |region: &Region| region.length() == wanted as usize;
        let has_two = receive.other.as_ref().is_some_and(fits);
        let two = took.is_some_and(|took| buffer_size::wants_two(took, has_two));
        // Slower but right with what there is, where there is no memory for more.
        let new = || {
            Region::new(&self.domain, wanted as usize, Access::RemoteWrite)
                .inspect_err(|error| log::debug!("connection of {}: {error}", self.peer_text()))
                .ok()
        };
        if self.stream.inbound().is_consumed() {
            if !two {
                receive.other = None;
            }
            if wanted != present
                && let Some(region) = new()
            {
                receive.region = region;
            }
        } else {
            if !two || !self.stream.inbound().is_other_free() {
                return false;
            }
            let Some(next) = receive.other.take().filter(fits).or_else(new) else { return false };
            receive.other = Some(std::mem::replace(&mut receive.region, next));
            METRICS.announcements_sent_early.add(1);
        }
        receive.since = Some(now);
        receive.writes_before = writes;
        true
    }
}
