// SPDX-License-Identifier: BSD-3-Clause
//! The registered memory of a connection and its queue pair, as the protocol's session and
//! send loop use them.

use proto::send_queue::{PayloadWrite, PostError, Transmit};
use proto::session::Port;
use proto::window::{Announcement, Chunk};
use proto::wire::{MESSAGE_LEN, Memory, Message};
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::{ptr, slice};
use verbs::Error;
use verbs::mr::{Access, ProtectionDomain, Region, Sge};
use verbs::qp::{QueuePair, RemoteBuf};

/// Receives that the server finds posted: as many as upstream's client library has. A server
/// with upstream's module may have as many writes in flight.
pub(crate) const RECEIVES: u16 = 1024;
/// Our control messages that may be in flight.
pub(crate) const CONTROL_SLOTS: u16 = 8;
/// Payload writes that may be in flight.
pub(crate) const PAYLOAD_DEPTH: usize = 32;
/// With a probe, of which one is out at a time.
pub(crate) const SEND_DEPTH: u32 = PAYLOAD_DEPTH as u32 + CONTROL_SLOTS as u32 + 1;

const MESSAGES_AT: usize = RECEIVES as usize * MESSAGE_LEN;
const STAGING_AT: usize = MESSAGES_AT + CONTROL_SLOTS as usize * MESSAGE_LEN;
/// Staging memory that each connection has from the start.
pub(crate) const STAGING: usize = 16 * 1024;

/// One work request, by what its id says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A receive, by slot.
    Receive(u16),
    /// A control message, by slot.
    Control(u16),
    /// Payload, by its number modulo 2^24.
    Payload(u32),
    /// A write of no bytes, by the number of the next payload.
    Probe(u32),
}

impl Work {
    pub(crate) fn id(self) -> u64 {
        match self {
            Self::Receive(slot) => u64::from(slot),
            Self::Control(slot) => 1 << 32 | u64::from(slot),
            Self::Payload(number) => 2 << 32 | u64::from(number),
            Self::Probe(number) => 3 << 32 | u64::from(number),
        }
    }

    /// The work of an id that [`id`](Self::id) made.
    pub(crate) fn of(id: u64) -> Self {
        let number = id as u32;
        match id >> 32 {
            0 => Self::Receive(number as u16),
            1 => Self::Control(number as u16),
            2 => Self::Payload(number),
            _ => Self::Probe(number),
        }
    }
}

/// Queue pair and memory. The queue pair goes first.
#[derive(Debug)]
pub(crate) struct Objects {
    pub(crate) queue_pair: QueuePair,
    control: Region,
    domain: Arc<ProtectionDomain>,
    window: u32,
}

impl Objects {
    /// With receive buffers of `window` bytes, rounded up to whole pages; and the first of them.
    pub(crate) fn new(
        queue_pair: QueuePair,
        domain: Arc<ProtectionDomain>,
        window: u32,
    ) -> Result<(Self, Region), Error> {
        let control = Region::new(&domain, STAGING_AT + STAGING, Access::Local)?;
        let first = Region::new(&domain, window as usize, Access::RemoteWrite)?;
        let window = first.length() as u32;
        Ok((Self { queue_pair, control, domain, window }, first))
    }

    /// The message that arrived in a receive slot.
    pub(crate) fn received(&self, slot: u16) -> [u8; MESSAGE_LEN] {
        let offset = usize::from(slot.min(RECEIVES - 1)) * MESSAGE_LEN;
        // SAFETY: inside the control region; the receive completed and is not posted again, so the
        // device does not write there.
        unsafe { self.control.start().add(offset).cast::<[u8; MESSAGE_LEN]>().read() }
    }
}

/// Whether a queue pair has no room or fails.
fn post_error(error: Error) -> PostError<Error> {
    if error.is_queue_full() { PostError::Full } else { PostError::Failed(error) }
}

impl Port for &Objects {
    type Buffer = Region;
    type Error = Error;

    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<Error>> {
        let into = self.control.sge(usize::from(slot) * MESSAGE_LEN, MESSAGE_LEN as u32);
        self.queue_pair.post_receive(Work::Receive(slot).id(), into).map_err(post_error)
    }

    fn post_message(&mut self, slot: u16, message: Message) -> Result<(), PostError<Error>> {
        let offset = MESSAGES_AT + usize::from(slot) * MESSAGE_LEN;
        // SAFETY: a slot of the control region, which is free and so ours alone.
        unsafe {
            let place = self.control.start().add(offset);
            place.cast::<[u8; MESSAGE_LEN]>().write(message.encode());
        }
        let bytes = self.control.sge(offset, MESSAGE_LEN as u32);
        self.queue_pair.post_send(Work::Control(slot).id(), bytes).map_err(post_error)
    }

    fn post_probe(&mut self, next: u32, at: Option<Announcement>) -> Result<(), PostError<Error>> {
        let at = at.map_or(RemoteBuf { address: 0, rkey: 0 }, |window| RemoteBuf {
            address: window.address,
            rkey: window.rkey,
        });
        self.queue_pair.post_probe(Work::Probe(next).id(), at).map_err(post_error)
    }

    /// None of another size than the first: a server with upstream's module does not survive a
    /// second window of another size.
    fn register(&mut self, length: u32) -> Option<Region> {
        let wanted = (length == self.window).then_some(length as usize)?;
        Region::new(&self.domain, wanted, Access::RemoteWrite).ok()
    }

    fn memory(&self, buffer: &Region) -> Memory {
        Memory {
            address: buffer.start().expose_provenance() as u64,
            length: buffer.length() as u32,
            rkey: buffer.rkey(),
        }
    }
}

/// One write: its bytes in pieces, and where they go.
pub(crate) struct Sender<'a> {
    pub(crate) objects: &'a Objects,
    pub(crate) pieces: &'a [IoSlice<'a>],
    /// Bytes of the first piece that were copied already.
    pub(crate) within: usize,
}

impl<'a> Sender<'a> {
    /// Where a chunk lies: its region, and its offset in there.
    fn place<'region>(
        &self,
        region: Option<&'region Region>,
        chunk: Chunk,
    ) -> (&'region Region, usize)
    where
        'a: 'region,
    {
        let objects: &'a Objects = self.objects;
        let (region, start) = region.map_or((&objects.control, STAGING_AT), |it| (it, 0));
        let offset = start + chunk.offset;
        assert!(offset + chunk.length <= region.length(), "the chunk lies in its region");
        (region, offset)
    }

    /// Has `fill` put bytes into the place of a chunk.
    pub(crate) fn fill(
        &self,
        region: Option<&Region>,
        chunk: Chunk,
        fill: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> (Sge<'static>, io::Result<usize>) {
        let (region, offset) = self.place(region, chunk);
        // SAFETY: the chunk is inside the region, whose bytes were zeroes at first, and nobody
        // else's until its completion.
        let place = unsafe { slice::from_raw_parts_mut(region.start().add(offset), chunk.length) };
        let outcome = fill(place).inspect(|&count| {
            assert!(count <= chunk.length, "no more was put there than there was room for");
        });
        let count = *outcome.as_ref().unwrap_or(&0);
        // SAFETY: the send loop gives up no region between this call and the next, which posts it.
        (unsafe { region.sge(offset, count as u32).unbound() }, outcome)
    }
}

impl Transmit<Region> for Sender<'_> {
    type Staged = Sge<'static>;
    type Error = Error;

    fn register(&mut self, length: usize) -> Option<Region> {
        Region::new(&self.objects.domain, length, Access::Local).ok()
    }

    fn copy(&mut self, region: Option<&Region>, chunk: Chunk) -> Sge<'static> {
        let (region, offset) = self.place(region, chunk);
        let mut left = chunk.length;
        // SAFETY: the chunk is inside the region, and nobody else's until its completion. The
        // send loop gives up no region between this call and the next, which posts it.
        unsafe {
            let mut to = region.start().add(offset);
            while left > 0 {
                let rest = &self.pieces[0][self.within..];
                let count = rest.len().min(left);
                ptr::copy_nonoverlapping(rest.as_ptr(), to, count);
                to = to.add(count);
                left -= count;
                self.within += count;
                if self.within == self.pieces[0].len() {
                    self.pieces = &self.pieces[1..];
                    self.within = 0;
                }
            }
            region.sge(offset, chunk.length as u32).unbound()
        }
    }

    fn post(&mut self, staged: Sge<'static>, write: PayloadWrite) -> Result<(), PostError<Error>> {
        let id = Work::Payload(write.sequence).id();
        let to = RemoteBuf { address: write.address, rkey: write.rkey };
        self.objects.queue_pair.post_write(id, staged, to, write.signalled).map_err(post_error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_work() {
        for work in [
            Work::Receive(0),
            Work::Receive(RECEIVES - 1),
            Work::Control(CONTROL_SLOTS - 1),
            Work::Payload(0x00ff_ffff),
            Work::Probe(7),
        ] {
            assert_eq!(Work::of(work.id()), work);
        }
    }
}
