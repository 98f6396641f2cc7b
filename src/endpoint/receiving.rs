// SPDX-License-Identifier: BSD-3-Clause
//! What completed on the endpoint's queue pair, and the copy out of the receive buffers.

use super::control::Ports;
use super::{Endpoint, ReadOutcome};
use crate::endpoint::wr_id::WrKind;
use crate::host::main_cell::is_main_thread;
use crate::metrics::METRICS;
use crate::time;
use proto::send_queue::PostError;
use proto::session::{Lost, MessageAction, Millis, Session, TimeoutAction};
use proto::stream::Stream;
use std::mem::MaybeUninit;
use std::ptr;
use verbs::Error;
use verbs::mr::Region;
use verbs::qp::Times;

impl Endpoint {
    /// Hands what the session works on to `work`. Main thread.
    fn with_session<T>(
        &self,
        work: impl FnOnce(&mut Session<Region>, &Stream<Region>, &mut Ports<'_>) -> T,
    ) -> T {
        work(&mut self.main_state().session, &self.stream, &mut Ports(self))
    }

    /// Posts the first receives. Main thread.
    ///
    /// # Errors
    /// If the queue pair does not take one.
    pub(super) fn post_receives(&self) -> Result<(), Error> {
        let receives = self.layout.receives;
        self.with_session(|session, _, ports| session.post_receives(ports, receives)).map_err(
            |error| match error {
                PostError::Full => Error { action: "post a receive", errno: libc::ENOMEM },
                PostError::Failed(error) => error,
            },
        )
    }

    /// A write of the peer's, whose immediate says how many bytes arrived. Main thread.
    ///
    /// # Errors
    /// Why the connection has to end.
    pub fn on_immediate(&self, slot: u16, count: u32, now: Millis) -> Result<(), Lost<Error>> {
        self.with_session(|session, stream, ports| {
            session.on_immediate(stream, ports, slot, count, now)
        })
    }

    /// A message of the peer's, of so many bytes. Main thread.
    ///
    /// # Errors
    /// Why the connection has to end.
    pub fn on_message(
        &self,
        slot: u16,
        length: u32,
        now: Millis,
    ) -> Result<MessageAction, Lost<Error>> {
        let (bytes, length) = self.received(slot, length);
        self.with_session(|session, stream, ports| {
            session.on_message(stream, ports, slot, &bytes[..length], now)
        })
    }

    /// A work request of ours is over. Main thread.
    ///
    /// # Errors
    /// If something that is due can't be posted.
    pub fn on_sent(&self, work: WrKind, now: Millis) -> Result<TimeoutAction, Error> {
        self.with_session(|session, stream, ports| match work {
            WrKind::Payload(sequence) => session.on_payload_sent(stream, ports, sequence, now),
            WrKind::Probe(next) => session.on_probe_sent(stream, ports, next, now),
            WrKind::Control(slot) => {
                session.on_message_sent(stream, ports, slot, now).map(|()| TimeoutAction::Wait)
            }
            WrKind::Receive(_) => Ok(TimeoutAction::Wait),
        })
    }

    /// Makes the peer wait for a short time only where it finds no receive posted, once the queue
    /// pair is ready to send. Returns what the first queue pair of a device shows. Main thread.
    pub fn shorten_rnr_timer(&self) -> Option<Times> {
        if let Err(error) = self.qp.shorten_rnr_timer() {
            log::debug!("connection of {}: {error}", self.peer_text());
        }
        if self.device().abilities().knows_receives() {
            return None;
        }
        self.qp.times()
    }

    /// The connection manager has established the connection. Returns whether the handshake
    /// is complete by that. Main thread.
    ///
    /// # Errors
    /// If the first announcement can't be posted.
    pub fn establish(&self) -> Result<bool, Error> {
        self.with_session(|session, stream, ports| session.establish(stream, ports, time::now()))
    }

    /// Does what the time asks for. Main thread.
    ///
    /// # Errors
    /// If a probe can't be posted.
    pub fn handle_timeout(&self, caught_up: bool, now: Millis) -> Result<TimeoutAction, Error> {
        self.with_session(|session, stream, ports| {
            session.handle_timeout(stream, ports, caught_up, now)
        })
    }

    /// What the endpoint needs once in a housekeeping interval. Main thread.
    ///
    /// # Errors
    /// If the queue pair refuses something.
    pub fn on_housekeeping_tick(&self, now: Millis) -> Result<(), Error> {
        self.with_session(|session, stream, ports| session.on_housekeeping_tick(stream, ports, now))
    }

    /// Opens the receive window again if it is full, and consumed or there is another
    /// buffer. Main thread.
    ///
    /// # Errors
    /// If the message can't be posted.
    pub fn announce_if_full(&self) -> Result<(), Error> {
        self.with_session(|session, stream, ports| {
            // Asked more often than there is something to do, so the time is asked last.
            if session.may_announce(stream) {
                session.announce_if_full(stream, ports, time::now())?;
            }
            Ok(())
        })
    }

    /// Whether the receive window is consumed and nobody has tried to announce it. Main thread.
    pub fn is_announcement_missed(&self) -> bool {
        self.main_state().session.is_announcement_missed(&self.stream)
    }

    /// Bytes of the receive buffers. Main thread.
    pub fn receive_bytes(&self) -> usize {
        self.main_state().session.receive_buffers().map(Region::length).sum()
    }

    /// Receives that are posted for the peer.
    pub fn receive_slots(&self) -> u16 {
        self.layout.receives
    }

    /// Whether the read handler has something to do.
    pub fn is_readable(&self) -> bool {
        self.stream.is_readable()
    }

    /// Copies received bytes to the start of `to`. Any thread; who reads while somebody else
    /// does is told to come again.
    pub fn read(&self, to: &mut [MaybeUninit<u8>]) -> ReadOutcome {
        let outcome = self.stream.read(to.len(), |address, count| {
            // SAFETY: the window says that these bytes of the receive buffer arrived and
            // were not read, and gives the right to read them to one. Until they are consumed
            // the buffer is not freed nor announced, and the peer may not write there (one that
            // does spoils its own request). There are no more than `to` has room for.
            unsafe {
                let from = ptr::with_exposed_provenance(address as usize);
                ptr::copy_nonoverlapping(from, to.as_mut_ptr(), count);
            };
        });
        if let ReadOutcome::Bytes(count) = outcome {
            METRICS.bytes_received.add(count as u64);
            let reads = if is_main_thread() { &METRICS.reads_main } else { &METRICS.reads_io };
            reads.add(1);
        }
        outcome
    }
}
