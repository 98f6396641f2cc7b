// SPDX-License-Identifier: BSD-3-Clause
//! The poller's half of one connection: no I/O, no clock, no FFI.
//!
//! A completion goes in by one call ([`Session::on_immediate`], [`Session::on_message`] and
//! their siblings), and so does the time. What has to be posted in turn is posted through a
//! [`Port`], behind which the caller has queue pair and memory; what remains for the caller to
//! do comes back. The payload does not pass through here: reader and writer share it with the
//! poller in a [`Stream`].
//!
//! Whatever the peer sends is checked before it is used; a [`Violation`] ends the
//! session.

use crate::lifecycle::{Duty, Lifecycle};
pub use crate::lifecycle::{Millis, Reader, Timing};
pub use crate::port::Port;
use crate::receive_buffers::ReceiveBuffers;
use crate::send_queue::PostError;
use crate::stream::Stream;
use crate::window::{Announcement, Overrun, PeerState, WindowInUse};
use crate::wire::{DecodeError, MESSAGE_LEN, Memory, Message};
use std::collections::VecDeque;
use std::fmt;
use std::ops::RangeInclusive;

/// An act of the peer that the protocol forbids. It ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A SEND that is no control message.
    Message(DecodeError),
    /// A SEND that is longer than any control message, so that it did not arrive.
    TooLong,
    /// An immediate that exceeds our window.
    Overrun(Overrun),
    /// An announcement before the last one was used up.
    WindowInUse(WindowInUse),
    /// A buffer that would end beyond the address space.
    Wraps {
        /// Start of the announced buffer.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// A feature was switched on that this side does not have.
    Feature(u64),
    /// A completion that no protocol operation leads to.
    Operation(u32),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(error) => error.fmt(f),
            Self::TooLong => write!(f, "control message of more than {MESSAGE_LEN} bytes"),
            Self::Overrun(error) => error.fmt(f),
            Self::WindowInUse(error) => error.fmt(f),
            Self::Wraps { address, length } => {
                write!(f, "receive buffer of {length} bytes at {address:#x} wraps around")
            }
            Self::Feature(bits) => write!(f, "unknown feature bits {bits:#x} switched on"),
            Self::Operation(code) => write!(f, "unexpected operation (completion opcode {code})"),
        }
    }
}

/// Why a connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost<E> {
    /// The peer broke the protocol.
    Violation(Violation),
    /// A work request that the connection needs could not be posted.
    PostFailed(E),
}

impl<E> From<Violation> for Lost<E> {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// The effect of a control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageAction {
    /// Nothing that anybody else has to know of.
    Nothing,
    /// A window of the peer's is open to the writer.
    WindowOpened,
    /// The same, and the handshake is complete by it.
    HandshakeCompleted,
}

/// The caller's part of what is due at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeoutAction {
    /// Nothing.
    Wait,
    /// Disconnect and free.
    End,
    /// Disconnect and free; the handshake took too long.
    HandshakeTimedOut,
    /// Disconnect and free; the peer does not answer a probe.
    NoReply,
}

/// The poller's half of a connection. `B` is a receive buffer.
///
/// Every method that is given a [`Stream`] and a [`Port`] has to be given those of its own
/// connection.
#[derive(Debug)]
pub struct Session<B> {
    lifecycle: Lifecycle,
    buffers: ReceiveBuffers<B>,
    /// `select` and receive slot of the feature requests that wait for a reply. The receive
    /// stays unposted until that is sent, so that a peer that asks without end is held back
    /// by its own requests.
    pending_feature_requests: VecDeque<(u16, u16)>,
    control_slots: u16,
    free_control_slots: Vec<u16>,
    /// Slots whose receives there was no room for.
    unposted: Vec<u16>,
    /// A receive buffer that is open, and that the peer could not be told of yet.
    unannounced: Option<Memory>,
    /// Payload writes posted at the last two ticks of the housekeeping interval.
    posted_before: [u64; 2],
    /// RDMA WRITEs of the peer so far.
    writes: u64,
}

impl<B> Session<B> {
    /// A session whose handshake begins now. `first` is its receive buffer, `sizes` the least and
    /// the most bytes that a later one may have; `control_slots` of its messages may be in flight.
    pub fn new(
        timing: Timing,
        first: B,
        sizes: RangeInclusive<u32>,
        control_slots: u16,
        now: Millis,
    ) -> Self {
        Self {
            lifecycle: Lifecycle::new(timing, now),
            buffers: ReceiveBuffers::new(first, sizes),
            pending_feature_requests: VecDeque::new(),
            control_slots,
            free_control_slots: (0..control_slots).collect(),
            unposted: Vec::new(),
            unannounced: None,
            posted_before: [0; 2],
            writes: 0,
        }
    }

    /// Posts the first receives, of the slots below `count`: one at least, the others as soon
    /// as there is room.
    ///
    /// # Errors
    /// [`PostError`] if the queue pair does not take one.
    pub fn post_receives<P: Port<Buffer = B>>(
        &mut self,
        port: &mut P,
        count: u16,
    ) -> Result<(), PostError<P::Error>> {
        port.post_receive(0)?;
        (1..count).try_for_each(|slot| self.post_receive(port, slot)).map_err(PostError::Failed)
    }

    // --- Completions ----------------------------------------------------------------

    /// The peer's RDMA WRITE with this immediate used the receive of `slot`.
    ///
    /// # Errors
    /// [`Lost`]: the connection must end.
    #[inline]
    pub fn on_immediate<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        slot: u16,
        count: u32,
        now: Millis,
    ) -> Result<(), Lost<P::Error>> {
        self.lifecycle.heard(now);
        self.writes += 1;
        stream.inbound().arrived(count).map_err(Violation::Overrun)?;
        self.give_back(stream, port, slot).map_err(Lost::PostFailed)?;
        // The sooner the better: the peer has nowhere to write to.
        self.announce_if_full(stream, port, now).map_err(Lost::PostFailed)
    }

    /// The peer's SEND of `bytes` arrived in the receive of `slot`.
    ///
    /// # Errors
    /// [`Lost`]: the connection must end.
    pub fn on_message<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        slot: u16,
        bytes: &[u8],
        now: Millis,
    ) -> Result<MessageAction, Lost<P::Error>> {
        self.lifecycle.heard(now);
        let action = match Message::decode(bytes).map_err(Violation::Message)? {
            Message::Keepalive | Message::SetClientFeature { features: 0, .. } => {
                MessageAction::Nothing
            }
            Message::SetClientFeature { features, .. } => {
                return Err(Violation::Feature(features).into());
            }
            Message::GetServerFeature { select, .. } => {
                self.pending_feature_requests.push_back((select, slot));
                self.send_replies(port).map_err(Lost::PostFailed)?;
                return Ok(MessageAction::Nothing);
            }
            Message::RegisterXferMemory(Memory { address, length, rkey }) => {
                if address.checked_add(u64::from(length)).is_none() {
                    return Err(Violation::Wraps { address, length }.into());
                }
                let window = Announcement { address, length, rkey };
                stream.outbound().announce(window).map_err(Violation::WindowInUse)?;
                if self.lifecycle.announced() {
                    MessageAction::HandshakeCompleted
                } else {
                    MessageAction::WindowOpened
                }
            }
        };
        self.give_back(stream, port, slot).map_err(Lost::PostFailed)?;
        Ok(action)
    }

    /// The payload of number `sequence` has arrived, and all before it.
    ///
    /// # Errors
    /// If a message can't be posted: the connection must end.
    pub fn on_payload_sent<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        sequence: u32,
        now: Millis,
    ) -> Result<TimeoutAction, P::Error> {
        stream.outbound().retire(sequence.wrapping_add(1));
        self.lifecycle.payload_completed(now);
        self.delivered(stream, port, now)
    }

    /// A probe that bore the number `next` has arrived, and all payload before that.
    ///
    /// # Errors
    /// If a message can't be posted: the connection must end.
    pub fn on_probe_sent<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        next: u32,
        now: Millis,
    ) -> Result<TimeoutAction, P::Error> {
        stream.outbound().retire(next);
        self.lifecycle.probe_completed(now);
        self.delivered(stream, port, now)
    }

    /// The control message in `slot` has arrived.
    ///
    /// # Errors
    /// If a message can't be posted: the connection must end.
    pub fn on_message_sent<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        slot: u16,
        now: Millis,
    ) -> Result<(), P::Error> {
        self.free_control_slots.push(slot);
        self.send_replies(port)?;
        self.announce_if_full(stream, port, now)
    }

    /// Something that was written is known to have arrived.
    fn delivered<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        now: Millis,
    ) -> Result<TimeoutAction, P::Error> {
        if !self.lifecycle.is_lingering() {
            return Ok(TimeoutAction::Wait);
        }
        // Perhaps that was all that it lingered for.
        self.handle_timeout(stream, port, false, now)
    }

    // --- Events and the time --------------------------------------------------------

    /// The connection manager has established the connection. Returns whether the
    /// handshake is complete by that.
    ///
    /// # Errors
    /// If the first announcement can't be posted: the connection must end.
    pub fn establish<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        now: Millis,
    ) -> Result<bool, P::Error> {
        let complete = self.lifecycle.establish();
        self.announce_if_full(stream, port, now)?;
        Ok(complete)
    }

    /// The server closed the connection, to which it had written at the time `written` last.
    pub fn close(&mut self, written: Millis, reader: Reader, now: Millis) {
        self.lifecycle.close(written, reader, now);
    }

    /// Does what is due at the time `now`. `caught_up` says that all completions and events that
    /// waited then were handled: no peer is given up for what may be the server's own delay.
    ///
    /// # Errors
    /// If a probe can't be posted: the connection must end.
    pub fn handle_timeout<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        caught_up: bool,
        now: Millis,
    ) -> Result<TimeoutAction, P::Error> {
        match self.lifecycle.duty(now, stream.outbound().is_idle()) {
            Duty::Probe => self.probe(stream, port).map(|()| TimeoutAction::Wait),
            Duty::End => Ok(TimeoutAction::End),
            Duty::HandshakeTimedOut if caught_up => Ok(TimeoutAction::HandshakeTimedOut),
            Duty::NoReply if caught_up => Ok(TimeoutAction::NoReply),
            Duty::HandshakeTimedOut | Duty::NoReply | Duty::Wait => Ok(TimeoutAction::Wait),
        }
    }

    /// Once in a housekeeping interval: posts messages and receives that found no room, which no
    /// completion will bring back, and gives back the memory of an idle connection.
    ///
    /// # Errors
    /// If the queue pair refuses something: the connection must end.
    pub fn on_housekeeping_tick<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        now: Millis,
    ) -> Result<(), P::Error> {
        if stream.peer_state() == PeerState::Connected {
            let waiting = std::mem::take(&mut self.unposted);
            waiting.into_iter().try_for_each(|slot| self.post_receive(port, slot))?;
            if self.awaits_control_slot() {
                self.send_replies(port)?;
                self.announce_if_full(stream, port, now)?;
            }
        }
        if self.shrink_if_idle(stream) && self.lifecycle.begin_probe(now) {
            self.probe(stream, port)?;
        }
        Ok(())
    }

    /// Gives larger staging memory back, and the second receive buffer, if nothing was
    /// written for two ticks and nothing is in flight. Returns whether a probe would show
    /// that: the last work requests may not be signalled, and its completion stands for theirs.
    fn shrink_if_idle<R>(&mut self, stream: &Stream<R>) -> bool {
        let queue = stream.outbound();
        let posted = queue.total_posted();
        let paused = posted == self.posted_before[0];
        let quiet = self.posted_before == [posted; 2];
        self.posted_before = [posted, self.posted_before[0]];
        if quiet && stream.inbound().is_other_free() {
            self.buffers.shrink();
        }
        if !quiet || !queue.is_idle() {
            return paused && !queue.is_idle() && queue.has_larger_staging();
        }
        queue.release_staging();
        false
    }

    /// Posts the probe that the lifecycle counts on.
    fn probe<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
    ) -> Result<(), P::Error> {
        let at = stream.outbound().announced();
        match stream.outbound().probe(|next| port.post_probe(next, at)) {
            Some(Ok(())) => Ok(()),
            // Somebody writes at this moment, or there is no room.
            None | Some(Err(PostError::Full)) => {
                self.lifecycle.probe_not_sent();
                Ok(())
            }
            Some(Err(PostError::Failed(error))) => {
                self.lifecycle.probe_not_sent();
                Err(error)
            }
        }
    }

    // --- Receives and messages ------------------------------------------------------

    /// Opens the receive window again if it is full, and consumed or there is another
    /// buffer.
    ///
    /// # Errors
    /// If the message can't be posted: the connection must end.
    #[inline]
    pub fn announce_if_full<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        now: Millis,
    ) -> Result<(), P::Error> {
        if self.may_announce(stream) {
            self.announce(stream, port, now)?;
        }
        Ok(())
    }

    /// Whether [`announce_if_full`](Self::announce_if_full) has something to look at.
    #[inline]
    pub fn may_announce<R>(&self, stream: &Stream<R>) -> bool {
        (self.unannounced.is_some() || stream.inbound().is_full())
            && self.lifecycle.is_cm_established()
            && stream.peer_state() == PeerState::Connected
    }

    fn announce<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        now: Millis,
    ) -> Result<(), P::Error> {
        let memory = match self.unannounced.take() {
            Some(memory) => memory,
            None => {
                if !self.buffers.turn(stream.inbound(), port, self.writes, now) {
                    return Ok(());
                }
                let memory = port.memory(self.buffers.present());
                stream.inbound().announce(memory.address, memory.length);
                memory
            }
        };
        // Still open, and to be announced, if that fails.
        self.unannounced = Some(memory);
        if self.send(port, Message::RegisterXferMemory(memory))? {
            self.unannounced = None;
        }
        Ok(())
    }

    /// Sends the replies that are due, as far as there are slots.
    fn send_replies<P: Port<Buffer = B>>(&mut self, port: &mut P) -> Result<(), P::Error> {
        while let Some((select, slot)) = self.pending_feature_requests.front().copied() {
            // No feature is defined yet, so none is offered.
            if !self.send(port, Message::GetServerFeature { select, features: 0 })? {
                break;
            }
            self.pending_feature_requests.pop_front();
            self.post_receive(port, slot)?;
        }
        Ok(())
    }

    /// Posts a control message; `false` if no slot is free, or no room in the queue.
    ///
    /// # Errors
    /// If the queue pair refuses it: the connection must end.
    pub fn send<P: Port<Buffer = B>>(
        &mut self,
        port: &mut P,
        message: Message,
    ) -> Result<bool, P::Error> {
        let Some(slot) = self.free_control_slots.pop() else { return Ok(false) };
        port.post_message(slot, message).map(|()| true).or_else(|error| {
            self.free_control_slots.push(slot);
            match error {
                PostError::Full => Ok(false),
                PostError::Failed(error) => Err(error),
            }
        })
    }

    /// Posts a receive again whose completion was seen.
    #[inline]
    fn give_back<R, P: Port<Buffer = B>>(
        &mut self,
        stream: &Stream<R>,
        port: &mut P,
        slot: u16,
    ) -> Result<(), P::Error> {
        if stream.peer_state() == PeerState::Connected {
            self.post_receive(port, slot)?;
        }
        Ok(())
    }

    /// Posts the receive of a slot, which has to wait if there is no room now.
    #[inline]
    fn post_receive<P: Port<Buffer = B>>(
        &mut self,
        port: &mut P,
        slot: u16,
    ) -> Result<(), P::Error> {
        match port.post_receive(slot) {
            Ok(()) => Ok(()),
            Err(PostError::Full) => {
                self.unposted.push(slot);
                Ok(())
            }
            Err(PostError::Failed(error)) => Err(error),
        }
    }

    // --- For those who ask ----------------------------------------------------------

    /// Whether the connection manager has established the connection.
    pub fn is_cm_established(&self) -> bool {
        self.lifecycle.is_cm_established()
    }

    /// Whether the handshake is complete and the server has not closed.
    pub fn is_open(&self) -> bool {
        self.lifecycle.is_open()
    }

    /// Whether its handshake has taken too long, as far as is known.
    pub fn is_overdue(&self, now: Millis) -> bool {
        self.lifecycle.is_overdue(now)
    }

    /// Whether it is in handshake or lingers, so that the time is to be asked often.
    pub fn is_transient(&self) -> bool {
        self.lifecycle.is_transient()
    }

    /// Whether a probe is out that was not answered yet.
    pub fn is_probing(&self) -> bool {
        self.lifecycle.is_probing()
    }

    /// The time of the peer's last sign of life.
    pub fn last_heard(&self) -> Millis {
        self.lifecycle.last_heard()
    }

    /// Control messages of ours that are not known to have arrived.
    pub fn messages_in_flight(&self) -> usize {
        usize::from(self.control_slots) - self.free_control_slots.len()
    }

    /// Whether a message of ours waits for a slot.
    pub fn awaits_control_slot(&self) -> bool {
        self.unannounced.is_some()
            || !self.pending_feature_requests.is_empty()
            || self.free_control_slots.is_empty()
    }

    /// Whether the receive window is consumed and nobody has tried to announce it.
    pub fn is_announcement_missed<R>(&self, stream: &Stream<R>) -> bool {
        stream.inbound().is_consumed()
            && self.unannounced.is_none()
            && self.is_cm_established()
            && stream.peer_state() == PeerState::Connected
    }

    /// The receive buffers: the one that was announced last, and the one before, if there are
    /// two.
    pub fn receive_buffers(&self) -> impl Iterator<Item = &B> {
        self.buffers.all()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::staging::STEPS;

    const TIMING: Timing =
        Timing { handshake: 100, keepalive: 50, answer: 500, linger: 20, delivery: 200 };

    /// A queue pair with room for so many messages, and what was posted to it.
    #[derive(Default)]
    struct Queue {
        room: usize,
        refuses_receives: bool,
        receives: Vec<u16>,
        messages: Vec<Message>,
    }

    /// A receive buffer's length.
    impl Port for Queue {
        type Buffer = u32;
        type Error = &'static str;

        fn post_receive(&mut self, slot: u16) -> Result<(), PostError<&'static str>> {
            if self.refuses_receives {
                return Err(PostError::Full);
            }
            self.receives.push(slot);
            Ok(())
        }

        fn post_message(
            &mut self,
            _slot: u16,
            message: Message,
        ) -> Result<(), PostError<&'static str>> {
            self.room = self.room.checked_sub(1).ok_or(PostError::Full)?;
            self.messages.push(message);
            Ok(())
        }

        fn post_probe(
            &mut self,
            _next: u32,
            _at: Option<Announcement>,
        ) -> Result<(), PostError<&'static str>> {
            Err(PostError::Failed("no probes here"))
        }

        fn register(&mut self, length: u32) -> Option<u32> {
            Some(length)
        }

        fn memory(&self, buffer: &u32) -> Memory {
            Memory { address: 0x2000, length: *buffer, rkey: 5 }
        }
    }

    fn announcement(length: u32) -> [u8; 32] {
        Message::RegisterXferMemory(Memory { address: 0x1000, length, rkey: 1 }).encode()
    }

    fn new() -> (Session<u32>, Stream<()>, Queue) {
        let session = Session::new(TIMING, 64, 64..=64, 8, 0);
        (session, Stream::new(8, 1024, STEPS), Queue { room: 100, ..Queue::default() })
    }

    fn open() -> (Session<u32>, Stream<()>, Queue) {
        let (mut session, stream, mut queue) = new();
        let action = session.on_message(&stream, &mut queue, 0, &announcement(64), 0);
        assert_eq!(action, Ok(MessageAction::WindowOpened));
        assert_eq!(session.establish(&stream, &mut queue, 0), Ok(true));
        let [Message::RegisterXferMemory(memory)] = queue.messages[..] else { panic!() };
        assert_eq!(memory.length, 64);
        queue.receives.clear();
        queue.messages.clear();
        (session, stream, queue)
    }

    #[test]
    fn a_window_of_no_bytes_completes_the_handshake_too() {
        let (mut session, stream, mut queue) = new();
        assert_eq!(session.establish(&stream, &mut queue, 0), Ok(false));
        let mut action = || session.on_message(&stream, &mut queue, 0, &announcement(0), 0);
        assert_eq!(action(), Ok(MessageAction::HandshakeCompleted));
        assert_eq!(action(), Ok(MessageAction::WindowOpened), "only once");
    }

    #[test]
    fn a_write_of_the_peer_s_posts_its_receive_again_and_the_last_byte_announces() {
        let (mut session, stream, mut queue) = open();
        for (slot, count) in [(3, 1), (4, 0), (5, 63)] {
            session.on_immediate(&stream, &mut queue, slot, count, 0).unwrap();
        }
        assert_eq!((&queue.receives[..], session.writes), (&[3, 4, 5][..], 3));
        assert_eq!(queue.messages.len(), 1, "into the other buffer, since it was quick");
        assert_eq!(stream.inbound().unread(), 64);
    }

    #[test]
    fn an_announcement_that_found_no_room_is_repeated_as_it_was() {
        let (mut session, stream, mut queue) = open();
        queue.room = 0;
        session.on_immediate(&stream, &mut queue, 0, 64, 0).unwrap();
        assert!(session.awaits_control_slot() && queue.messages.is_empty());
        queue.room = 1;
        session.on_housekeeping_tick(&stream, &mut queue, 900).unwrap();
        assert_eq!(queue.messages.len(), 1);
        assert!(!session.awaits_control_slot());
    }

    #[test]
    fn a_receive_that_found_no_room_is_posted_at_the_next_tick() {
        let (mut session, stream, mut queue) = open();
        queue.refuses_receives = true;
        session.on_immediate(&stream, &mut queue, 9, 1, 0).unwrap();
        queue.refuses_receives = false;
        session.on_housekeeping_tick(&stream, &mut queue, 900).unwrap();
        assert_eq!(queue.receives, [9]);
    }

    #[test]
    fn nothing_is_posted_for_a_peer_that_has_left() {
        let (mut session, stream, mut queue) = open();
        stream.escalate(PeerState::Disconnected);
        session.on_immediate(&stream, &mut queue, 0, 64, 0).unwrap();
        assert_eq!(stream.inbound().unread(), 64, "what it sent is read");
        assert!(queue.receives.is_empty() && queue.messages.is_empty());
    }

    #[test]
    fn violations_are_told_apart() {
        let (mut session, stream, mut queue) = open();
        let mut lost = |bytes: &[u8]| match session
            .on_message(&stream, &mut queue, 0, bytes, 0)
            .unwrap_err()
        {
            Lost::Violation(violation) => violation,
            Lost::PostFailed(why) => panic!("{why}"),
        };
        assert_eq!(lost(&[0; 3]), Violation::Message(DecodeError::Length(3)));
        assert_eq!(lost(&announcement(9)), Violation::WindowInUse(WindowInUse { left: 64 }));
        let wraps = Message::RegisterXferMemory(Memory { address: u64::MAX, length: 2, rkey: 0 });
        assert!(matches!(lost(&wraps.encode()), Violation::Wraps { length: 2, .. }));
        let feature = Message::SetClientFeature { select: 0, features: 4 };
        assert_eq!(lost(&feature.encode()), Violation::Feature(4));
        assert_eq!(
            session.on_immediate(&stream, &mut queue, 0, 65, 0),
            Err(Lost::Violation(Violation::Overrun(Overrun { claimed: 65, room: 64 })))
        );
        assert_eq!(queue.receives, [0; 0], "a receive of who broke the protocol stays unposted");
    }

    #[test]
    fn feature_requests_hold_their_receives_until_they_are_replied_to() {
        let (mut session, stream, mut queue) = open();
        queue.room = 1;
        for slot in 0..3 {
            let request = Message::GetServerFeature { select: 40 + slot, features: 0 }.encode();
            let action = session.on_message(&stream, &mut queue, slot, &request, 0);
            assert_eq!(action, Ok(MessageAction::Nothing));
        }
        assert_eq!(queue.receives, [0]);
        queue.room = 2;
        session.on_message_sent(&stream, &mut queue, 7, 0).unwrap();
        assert_eq!(queue.receives, [0, 1, 2]);
        let replies = [40, 41, 42].map(|select| Message::GetServerFeature { select, features: 0 });
        assert_eq!(queue.messages, replies);
    }

    #[test]
    fn who_lingers_ends_with_the_last_delivery() {
        let (mut session, stream, mut queue) = open();
        session.close(0, Reader::Client, 1000);
        assert_eq!(session.on_payload_sent(&stream, &mut queue, 0, 1000), Ok(TimeoutAction::Wait));
        let ends = session.on_probe_sent(&stream, &mut queue, 0, 1021);
        assert_eq!(ends, Ok(TimeoutAction::End));
    }

    #[test]
    fn nobody_is_given_up_before_what_waits_was_looked_at() {
        let (mut session, stream, mut queue) = new();
        let mut at = |caught_up| session.handle_timeout(&stream, &mut queue, caught_up, 100);
        assert_eq!(at(false), Ok(TimeoutAction::Wait));
        assert_eq!(at(true), Ok(TimeoutAction::HandshakeTimedOut));
        let (mut session, stream, mut queue) = open();
        assert_eq!(session.handle_timeout(&stream, &mut queue, true, 50), Err("no probes here"));
        assert!(!session.is_probing(), "it is tried again");
    }
}
