// SPDX-License-Identifier: BSD-3-Clause
//! One connection's protocol state, as the poller keeps it: no I/O, no clock, no FFI.
//!
//! Completions and the time go in; what to do comes out. The payload does not
//! pass through here: it goes through the types of [`crate::window`], which other
//! threads share. The life of a session:
//!
//! 1. *Handshake*: until the connection manager says "established" and the peer's
//!    first announcement is here, in either order. Only then does the server hear
//!    of the connection, so that whatever it says first, an error included, has a
//!    window to go to.
//! 2. *Open*: messages and immediates.
//! 3. *Lingering*: the server closed. What it had written is delivered and the peer
//!    gets time to read it, since a peer may look for the disconnect before it
//!    looks for the data; then the connection ends.
//!
//! Whatever the peer sends is checked before it is used; a [`Violation`] ends the
//! session.

use crate::send_queue::SendQueue;
use crate::window::{Announcement, Overrun, ReceiveWindow, Refused};
use crate::wire::{DecodeError, MESSAGE_LEN, Memory, Message};
use std::collections::VecDeque;
use std::fmt;

/// Milliseconds on a clock that never goes back.
pub type Millis = u64;

/// Durations that a session goes by, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A handshake that takes longer is given up.
    pub handshake: Millis,
    /// After so long without anything from the peer it is probed.
    pub keepalive: Millis,
    /// A peer that has not answered its probe for so long is given up.
    pub answer: Millis,
    /// Time that a peer has to read what was delivered before we disconnect.
    pub linger: Millis,
    /// Time for delivering it, after which we disconnect all the same.
    pub delivery: Millis,
}

/// What a peer did that the protocol forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A SEND that is no control message.
    Message(DecodeError),
    /// A SEND that is longer than any control message, so that it did not arrive.
    TooLong,
    /// An immediate that exceeds our window.
    Overrun(Overrun),
    /// An announcement before the last one was used up.
    Early(Refused),
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
            Self::Early(error) => error.fmt(f),
            Self::Wraps { address, length } => {
                write!(f, "receive buffer of {length} bytes at {address:#x} wraps around")
            }
            Self::Feature(bits) => write!(f, "unknown feature bits {bits:#x} switched on"),
            Self::Operation(code) => write!(f, "unexpected operation (completion opcode {code})"),
        }
    }
}

/// What a control message asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing; the receive may be posted again.
    Nothing,
    /// The peer's buffer is open to us; the receive may be posted again.
    WindowOpened,
    /// An answer is due. Its receive stays unposted until the answer is sent, so
    /// that a peer that asks without end is held back by its own questions.
    AnswerDue,
}

/// What is to be done at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Nothing yet.
    Wait,
    /// Post a probe.
    Probe,
    /// Disconnect and free.
    End,
    /// Disconnect and free; the handshake took too long.
    TimedOut,
    /// Disconnect and free; the peer does not answer.
    Unanswered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Handshake { deadline: Millis },
    Open,
    Lingering { deadline: Millis, since: Millis },
}

/// A probe that took no longer found nothing in its way: what was posted before it had
/// arrived already, or arrived with it.
const PROMPT: Millis = 100;

/// Least time for delivering a refusal, whatever the time to read it is.
const REFUSAL: Millis = 500;

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    timing: Timing,
    phase: Phase,
    established: bool,
    announced: bool,
    /// `select` and receive slot of the questions that wait for an answer.
    questions: VecDeque<(u16, u16)>,
    /// When the probe that is out was asked for.
    probed: Option<Millis>,
    last_heard: Millis,
    /// When something that was written is known to have arrived last.
    arrived: Millis,
    writes: u64,
}

impl Session {
    /// A session whose handshake begins now.
    pub fn new(timing: Timing, now: Millis) -> Self {
        Self {
            timing,
            phase: Phase::Handshake { deadline: now + timing.handshake },
            established: false,
            announced: false,
            questions: VecDeque::new(),
            probed: None,
            last_heard: now,
            arrived: 0,
            writes: 0,
        }
    }

    /// The connection manager has established the connection. Returns whether the
    /// handshake is complete by that.
    pub fn establish(&mut self) -> bool {
        self.established = true;
        self.complete_handshake()
    }

    /// Whether the connection manager has established the connection.
    pub fn is_established(&self) -> bool {
        self.established
    }

    fn complete_handshake(&mut self) -> bool {
        let complete =
            matches!(self.phase, Phase::Handshake { .. }) && self.established && self.announced;
        if complete {
            self.phase = Phase::Open;
        }
        complete
    }

    /// Whether the handshake is complete and the server has not closed.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// The peer's SEND of `bytes` arrived in receive `slot`.
    ///
    /// # Errors
    /// [`Violation`]: the connection must end.
    pub fn message<R>(
        &mut self,
        bytes: &[u8],
        slot: u16,
        outbound: &SendQueue<R>,
        now: Millis,
    ) -> Result<Reaction, Violation> {
        self.last_heard = now;
        match Message::decode(bytes).map_err(Violation::Message)? {
            Message::Keepalive => Ok(Reaction::Nothing),
            Message::SetClientFeature { features: 0, .. } => Ok(Reaction::Nothing),
            Message::SetClientFeature { features, .. } => Err(Violation::Feature(features)),
            Message::GetServerFeature { select, .. } => {
                self.questions.push_back((select, slot));
                Ok(Reaction::AnswerDue)
            }
            Message::RegisterXferMemory(Memory { address, length, rkey }) => {
                if address.checked_add(u64::from(length)).is_none() {
                    return Err(Violation::Wraps { address, length });
                }
                outbound
                    .announce(Announcement { address, length, rkey })
                    .map_err(Violation::Early)?;
                self.announced = true;
                Ok(Reaction::WindowOpened)
            }
        }
    }

    /// To be asked after a [`Reaction::WindowOpened`]: whether it completed the handshake.
    pub fn handshake_completed_by_window(&mut self) -> bool {
        self.complete_handshake()
    }

    /// The peer's RDMA WRITE with this immediate arrived.
    ///
    /// # Errors
    /// [`Violation`]: the connection must end.
    pub fn immediate(
        &mut self,
        count: u32,
        inbound: &ReceiveWindow,
        now: Millis,
    ) -> Result<(), Violation> {
        self.last_heard = now;
        self.writes += 1;
        inbound.arrived(count).map_err(Violation::Overrun)
    }

    /// RDMA WRITEs of the peer so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The next answer to send, if one is due, and the receive slot that its
    /// question occupies: post both.
    pub fn next_answer(&mut self) -> Option<(Message, u16)> {
        let (select, slot) = self.questions.pop_front()?;
        // No feature is defined yet, so none is offered.
        Some((Message::GetServerFeature { select, features: 0 }, slot))
    }

    /// Puts an answer back that could not be sent yet.
    pub fn answer_not_sent(&mut self, answer: Message, slot: u16) {
        if let Message::GetServerFeature { select, .. } = answer {
            self.questions.push_front((select, slot));
        }
    }

    /// The server closed the connection, to which it had written at the time `written` last.
    /// `served` says whether it had read anything from it: a peer that it only refused is
    /// waited for no longer than it takes to read why.
    pub fn close(&mut self, written: Millis, served: bool, now: Millis) {
        let Timing { delivery, linger, .. } = self.timing;
        let patience = if served { delivery } else { linger.max(REFUSAL).min(delivery) };
        self.phase = Phase::Lingering { deadline: now + patience, since: written };
    }

    /// Something that was written has arrived, so the peer lives.
    pub fn payload_completed(&mut self, now: Millis) {
        self.last_heard = now;
        self.arrived = now;
    }

    /// A probe completed: everything posted before it has arrived, and the peer lives.
    pub fn probe_completed(&mut self, now: Millis) {
        let late = self.probed.take().is_some_and(|since| now > since + PROMPT);
        self.last_heard = now;
        if late {
            self.arrived = now;
        }
    }

    /// What the time asks for. `delivered` says that no work request is in flight.
    pub fn duty(&mut self, now: Millis, delivered: bool) -> Duty {
        match &mut self.phase {
            Phase::Handshake { deadline } if now >= *deadline => Duty::TimedOut,
            Phase::Handshake { .. } => Duty::Wait,
            Phase::Open => {
                let silent_since = self.last_heard + self.timing.keepalive;
                if self.probed.is_some() {
                    // The device gives up at some time, but not Soft-RoCE: it takes the seven
                    // tries that clients choose for tries without end.
                    let over = now >= silent_since.saturating_add(self.timing.answer);
                    return if over { Duty::Unanswered } else { Duty::Wait };
                }
                if now < silent_since {
                    return Duty::Wait;
                }
                self.probed = Some(now);
                Duty::Probe
            }
            Phase::Lingering { deadline, since } => {
                if now >= *deadline {
                    return Duty::End;
                }
                if !delivered {
                    if self.probed.is_some() {
                        return Duty::Wait;
                    }
                    // The last work requests may not be signalled: the probe's
                    // completion stands for theirs.
                    self.probed = Some(now);
                    return Duty::Probe;
                }
                // From the last write on the peer has had its time, unless that arrived late.
                let since = self.arrived.max(*since);
                if now >= since + self.timing.linger { Duty::End } else { Duty::Wait }
            }
        }
    }

    /// Whether a question of the peer's was not answered yet.
    pub fn owes_answers(&self) -> bool {
        !self.questions.is_empty()
    }

    /// Whether a probe is out that was not answered yet.
    pub fn is_probing(&self) -> bool {
        self.probed.is_some()
    }

    /// When the peer last gave a sign of life.
    pub fn last_heard(&self) -> Millis {
        self.last_heard
    }

    /// A probe is to be posted for a reason of the transport's. `false` if one is out: its
    /// completion says as much.
    pub fn begin_probe(&mut self, now: Millis) -> bool {
        let none = self.probed.is_none();
        self.probed.get_or_insert(now);
        none
    }

    /// A probe could not be posted: it is tried again at the next [`duty`](Self::duty).
    pub fn probe_not_sent(&mut self) {
        self.probed = None;
    }

    /// Whether the server has closed the connection.
    pub fn is_lingering(&self) -> bool {
        matches!(self.phase, Phase::Lingering { .. })
    }

    /// Whether its handshake has taken too long, as far as is known.
    pub fn is_overdue(&self, now: Millis) -> bool {
        matches!(self.phase, Phase::Handshake { deadline } if now >= deadline)
    }

    /// Whether the session needs the fast clock: it is short-lived now.
    pub fn is_transient(&self) -> bool {
        self.phase != Phase::Open
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::staging::STEPS;

    fn queue() -> SendQueue<()> {
        SendQueue::new(8, 1024, STEPS)
    }

    const TIMING: Timing =
        Timing { handshake: 100, keepalive: 50, answer: 500, linger: 20, delivery: 200 };

    fn announcement(length: u32) -> [u8; 32] {
        Message::RegisterXferMemory(Memory { address: 0x1000, length, rkey: 1 }).encode()
    }

    fn open() -> (Session, SendQueue<()>, ReceiveWindow) {
        let (mut session, send) = (Session::new(TIMING, 0), queue());
        session.message(&announcement(64), 0, &send, 0).unwrap();
        assert!(!session.handshake_completed_by_window());
        assert!(session.establish());
        (session, send, ReceiveWindow::new())
    }

    #[test]
    fn the_handshake_needs_both_halves_in_either_order() {
        let (session, ..) = open();
        assert!(session.is_open());

        let (mut session, send) = (Session::new(TIMING, 0), queue());
        assert!(!session.establish());
        assert_eq!(
            session.message(&announcement(0), 0, &send, 0),
            Ok(Reaction::WindowOpened),
            "no room is an announcement too"
        );
        assert!(session.handshake_completed_by_window());
        assert!(!session.handshake_completed_by_window(), "only once");
    }

    #[test]
    fn a_handshake_that_takes_too_long_ends() {
        let mut session = Session::new(TIMING, 1000);
        session.establish();
        assert_eq!(session.duty(1099, true), Duty::Wait);
        assert_eq!(session.duty(1100, true), Duty::TimedOut);
    }

    #[test]
    fn writes_are_counted_and_messages_are_not() {
        let (mut session, _, receive) = open();
        receive.announce(0x2000, 64);
        for count in [1, 0, 63] {
            session.immediate(count, &receive, 0).unwrap();
        }
        assert_eq!(session.writes(), 3);
    }

    #[test]
    fn violations_are_told_apart() {
        let (mut session, send, receive) = open();
        let mut violation = |bytes: &[u8]| session.message(bytes, 0, &send, 0).unwrap_err();
        assert_eq!(violation(&[0; 3]), Violation::Message(DecodeError::Length(3)));
        assert_eq!(violation(&announcement(9)), Violation::Early(Refused { left: 64 }));
        let wraps = Message::RegisterXferMemory(Memory { address: u64::MAX, length: 2, rkey: 0 });
        assert!(matches!(violation(&wraps.encode()), Violation::Wraps { length: 2, .. }));
        let feature = Message::SetClientFeature { select: 0, features: 4 };
        assert_eq!(violation(&feature.encode()), Violation::Feature(4));
        assert_eq!(
            session.immediate(1, &receive, 0),
            Err(Violation::Overrun(Overrun { claimed: 1, room: 0 }))
        );
    }

    #[test]
    fn questions_hold_their_receives_until_they_are_answered() {
        let (mut session, send, _) = open();
        for slot in 0..3 {
            let question = Message::GetServerFeature { select: 40 + slot, features: 0 };
            assert_eq!(
                session.message(&question.encode(), slot, &send, 0),
                Ok(Reaction::AnswerDue)
            );
        }
        let (answer, slot) = session.next_answer().unwrap();
        assert_eq!((answer, slot), (Message::GetServerFeature { select: 40, features: 0 }, 0));
        session.answer_not_sent(answer, slot);
        assert_eq!(session.next_answer().unwrap().1, 0);
        assert_eq!(session.next_answer().unwrap().1, 1);
        assert_eq!(session.next_answer().unwrap().1, 2);
        assert_eq!(session.next_answer(), None);
    }

    #[test]
    fn a_silent_peer_is_probed_once_at_a_time() {
        let (mut session, send, _) = open();
        assert_eq!(session.duty(49, true), Duty::Wait);
        assert_eq!(session.duty(50, true), Duty::Probe);
        assert_eq!(session.duty(500, true), Duty::Wait, "one is out");
        session.probe_completed(501);
        assert_eq!(session.duty(550, true), Duty::Wait);
        session.message(&Message::Keepalive.encode(), 0, &send, 540).unwrap();
        assert_eq!(session.duty(589, true), Duty::Wait, "heard of it since");
        assert_eq!(session.duty(590, true), Duty::Probe);
    }

    #[test]
    fn a_peer_that_does_not_answer_is_given_up() {
        let (mut session, send, _) = open();
        assert_eq!(session.duty(50, true), Duty::Probe);
        assert_eq!(session.duty(549, true), Duty::Wait);
        assert_eq!(session.duty(550, true), Duty::Unanswered);
        session.message(&Message::Keepalive.encode(), 0, &send, 551).unwrap();
        assert_eq!(session.duty(1100, true), Duty::Wait, "it spoke, whatever became of the probe");
        assert_eq!(session.duty(1101, true), Duty::Unanswered);
        let mut patient = Session { timing: Timing { answer: Millis::MAX, ..TIMING }, ..session };
        assert_eq!(patient.duty(Millis::MAX - 1, true), Duty::Wait);
    }

    #[test]
    fn a_probe_of_the_transport_s_is_one_like_the_others() {
        let (mut session, ..) = open();
        assert!(session.begin_probe(20));
        assert!(!session.begin_probe(30), "one is out");
        assert_eq!(session.duty(50, true), Duty::Wait);
        assert_eq!(session.duty(550, true), Duty::Unanswered, "no sooner and no later");
        session.probe_completed(560);
        assert!(session.begin_probe(570));
        session.probe_not_sent();
        assert_eq!(session.duty(610, true), Duty::Probe);
    }

    #[test]
    fn closing_waits_for_delivery_and_then_for_the_reader() {
        let (mut session, ..) = open();
        session.close(1000, true, 1000);
        assert!(!session.is_open());
        assert_eq!(session.duty(1000, false), Duty::Probe);
        assert_eq!(session.duty(1050, false), Duty::Wait);
        session.probe_completed(1060);
        assert_eq!(session.duty(1000 + 19, true), Duty::Wait, "prompt: counted from the write");
        assert_eq!(session.duty(1000 + 20, true), Duty::End);
    }

    #[test]
    fn what_arrived_late_is_read_later() {
        let (mut session, ..) = open();
        session.close(1000, true, 1000);
        assert_eq!(session.duty(1000, false), Duty::Probe);
        let late = 1000 + PROMPT + 1;
        session.probe_completed(late);
        assert_eq!(session.duty(late + 19, true), Duty::Wait);
        assert_eq!(session.duty(late + 20, true), Duty::End);

        // The same of a probe that was out already, and of bytes that were signalled.
        let (mut session, ..) = open();
        assert_eq!(session.duty(50, false), Duty::Probe);
        session.close(40, true, 990);
        assert_eq!(session.duty(990, false), Duty::Wait);
        session.probe_completed(1000);
        assert_eq!(session.duty(1019, true), Duty::Wait);
        let (mut session, ..) = open();
        session.payload_completed(1000);
        session.close(40, true, 1001);
        assert_eq!(session.duty(1019, true), Duty::Wait);
        assert_eq!(session.duty(1020, true), Duty::End);
    }

    #[test]
    fn closing_is_bounded() {
        let (mut session, ..) = open();
        session.close(1000, true, 1000);
        assert_eq!(session.duty(1000, false), Duty::Probe);
        assert_eq!(session.duty(1199, false), Duty::Wait);
        assert_eq!(session.duty(1200, false), Duty::End, "a peer that takes nothing");

        let timing = Timing { delivery: 10_000, ..TIMING };
        let mut refused = Session::new(timing, 0);
        refused.close(1000, false, 1000);
        assert_eq!(refused.duty(1000, false), Duty::Probe);
        assert_eq!(refused.duty(1000 + REFUSAL - 1, false), Duty::Wait);
        assert_eq!(refused.duty(1000 + REFUSAL, false), Duty::End, "a refused one, sooner");
    }

    #[test]
    fn closing_is_immediate_when_the_peer_has_had_its_time() {
        let (mut session, ..) = open();
        session.close(0, true, 1000);
        assert_eq!(session.duty(1000, true), Duty::End, "nothing was ever written");

        // Written long ago, and not known to have arrived: a round trip tells.
        let (mut session, ..) = open();
        session.close(900, true, 1000);
        assert_eq!(session.duty(1000, false), Duty::Probe);
        session.probe_completed(1001);
        assert_eq!(session.duty(1001, true), Duty::End);
    }
}
