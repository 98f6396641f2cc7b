// SPDX-License-Identifier: BSD-3-Clause
//! The control region of an endpoint: slots for the messages of both sides, and a little
//! staging memory behind them; and what the session posts from it.

use super::Endpoint;
use crate::endpoint::wr_id::WrKind;
use crate::metrics::METRICS;
use proto::send_queue::PostError;
use proto::session::Port;
use proto::window::Announcement;
use proto::wire::{MESSAGE_LEN, Memory, Message};
use verbs::Error;
use verbs::mr::{Access, Region};
use verbs::qp::RemoteBuf;

/// Control messages of ours that may be in flight.
pub(super) const CONTROL_SLOTS: u16 = 8;

/// Least staging memory that every endpoint has: four pages are full with the fewest receives.
const LEAST_STAGING: usize = 14_080;
const PAGE: usize = 4096;

/// What is where in a control region, by how many receives there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) receives: u16,
}

impl Layout {
    /// Bytes of the whole.
    pub(super) const fn bytes(self) -> usize {
        (self.staging_at() + LEAST_STAGING).next_multiple_of(PAGE)
    }

    /// Where our own messages begin.
    const fn messages_at(self) -> usize {
        self.receives as usize * MESSAGE_LEN
    }

    /// Where the staging memory begins.
    pub(super) const fn staging_at(self) -> usize {
        self.messages_at() + CONTROL_SLOTS as usize * MESSAGE_LEN
    }

    /// Bytes of the staging memory.
    pub(super) const fn staging(self) -> usize {
        self.bytes() - self.staging_at()
    }
}

/// The port of an endpoint's session: its queue pair and its registered memory.
pub(super) struct Ports<'a>(pub(super) &'a Endpoint);

impl Port for Ports<'_> {
    type Buffer = Region;
    type Error = Error;

    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<Error>> {
        let into = self.0.control.sge(offset(0, slot), MESSAGE_LEN as u32);
        let wr_id = self.0.key.wr_id(WrKind::Receive(slot));
        self.0.qp.post_receive(wr_id, into).map_err(post_error)
    }

    fn post_message(&mut self, slot: u16, message: Message) -> Result<(), PostError<Error>> {
        let offset = offset(self.0.layout.messages_at(), slot);
        // SAFETY: a slot of the control region, which is free and so ours alone.
        unsafe {
            let place = self.0.control.start().add(offset);
            place.cast::<[u8; MESSAGE_LEN]>().write(message.encode());
        }
        let bytes = self.0.control.sge(offset, MESSAGE_LEN as u32);
        let wr_id = self.0.key.wr_id(WrKind::Control(slot));
        self.0.qp.post_send(wr_id, bytes).map_err(post_error)?;
        if matches!(message, Message::RegisterXferMemory(_)) {
            METRICS.announcements_sent.add(1);
        }
        Ok(())
    }

    fn post_probe(&mut self, next: u32, at: Option<Announcement>) -> Result<(), PostError<Error>> {
        if !self.0.device().abilities().carries_probes(at.is_some()) {
            return Err(PostError::Full);
        }
        let at = at
            .map_or(RemoteBuf { address: 0, rkey: 0 }, |Announcement { address, rkey, .. }| {
                RemoteBuf { address, rkey }
            });
        self.0.qp.post_probe(self.0.key.wr_id(WrKind::Probe(next)), at).map_err(post_error)?;
        METRICS.keepalive_probes.add(1);
        Ok(())
    }

    fn register(&mut self, length: u32) -> Option<Region> {
        self.0.register(length as usize, Access::RemoteWrite)
    }

    fn memory(&self, buffer: &Region) -> Memory {
        Memory {
            address: buffer.start().expose_provenance() as u64,
            length: buffer.length() as u32,
            rkey: buffer.rkey(),
        }
    }

    fn announced_early(&mut self) {
        METRICS.announcements_sent_early.add(1);
    }
}

impl Endpoint {
    /// The bytes of the SEND that arrived in a receive slot, and how many they are.
    pub(super) fn received(&self, slot: u16, length: u32) -> ([u8; MESSAGE_LEN], usize) {
        let offset = offset(0, slot.min(self.layout.receives - 1));
        // SAFETY: inside the control region; the receive completed and is not posted, so the
        // device does not write there.
        let copy = unsafe {
            let place = self.control.start().add(offset);
            place.cast::<[u8; MESSAGE_LEN]>().read()
        };
        (copy, (length as usize).min(MESSAGE_LEN))
    }

    /// Memory of this endpoint, if it can be had: without it a connection is slower, and right.
    pub(super) fn register(&self, length: usize, access: Access) -> Option<Region> {
        Region::new(&self.domain, length, access)
            .inspect_err(|error| log::debug!("connection of {}: {error}", self.peer_text()))
            .ok()
    }
}

/// Where a slot of those that begin at `start` is in the control region.
fn offset(start: usize, slot: u16) -> usize {
    start + usize::from(slot) * MESSAGE_LEN
}

/// Whether a queue pair has no room or fails.
pub(super) fn post_error(error: Error) -> PostError<Error> {
    if error.is_queue_full() { PostError::Full } else { PostError::Failed(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::abilities::{FEW_RECEIVES, MANY_RECEIVES};

    #[test]
    fn the_parts_of_the_control_region_fit() {
        let few = Layout { receives: FEW_RECEIVES };
        assert_eq!((few.bytes(), few.staging()), (16_384, 14_080), "four pages, all of them used");
        let many = Layout { receives: MANY_RECEIVES };
        assert_eq!((many.bytes(), many.staging_at()), (49_152, 33_024));
        assert!(many.staging() >= few.staging());
    }
}
