// SPDX-License-Identifier: BSD-3-Clause
//! From a connection's handshake to its end: what the time asks for.
//!
//! 1. *Handshake*: until the connection manager says "established" and the peer's
//!    first announcement is here, in either order. Only then does the server hear
//!    of the connection, so that whatever it says first, an error included, has a
//!    window to go to.
//! 2. *Open*: a peer that is silent for too long is probed.
//! 3. *Lingering*: the server closed. What it had written is delivered and the peer
//!    gets time to read it, since a peer may look for the disconnect before it
//!    looks for the data; then the connection ends.

/// Milliseconds on a clock that never goes back.
pub type Millis = u64;

/// Durations that a connection goes by, in milliseconds.
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

/// What is to be done at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Nothing yet.
    Wait,
    /// Post a probe.
    Probe,
    /// Disconnect and free.
    End,
    /// Disconnect and free; the handshake took too long.
    HandshakeTimedOut,
    /// Disconnect and free; the peer does not answer.
    NoReply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Handshake {
        deadline: Millis,
    },
    Open,
    /// `linger` is how long the reader has, from its last bytes on.
    Lingering {
        deadline: Millis,
        since: Millis,
        linger: Millis,
    },
}

/// A probe that took no longer found nothing in its way: what was posted before it had
/// arrived already, or arrived with it.
const PROMPT: Millis = 100;

/// Least time for delivering a refusal, whatever the time to read it is.
const UNSERVED: Millis = 500;

/// Who reads the last words of a connection that is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// A client that nothing was read from, so that it was only refused: it is waited for no
    /// longer than it takes to read why.
    Refused,
    /// A client. It may drop what it has not read when it hears of the disconnect.
    Client,
    /// Another server, or a client of this project. It reads what has arrived before it minds
    /// the disconnect.
    Server,
}

/// One connection's phase and its deadlines.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    timing: Timing,
    phase: Phase,
    established: bool,
    announced: bool,
    /// When the probe that is out was asked for.
    probed: Option<Millis>,
    last_heard: Millis,
    /// When something that was written is known to have arrived last.
    arrived: Millis,
}

impl Lifecycle {
    /// A handshake that begins now.
    pub(crate) fn new(timing: Timing, now: Millis) -> Self {
        Self {
            timing,
            phase: Phase::Handshake { deadline: now + timing.handshake },
            established: false,
            announced: false,
            probed: None,
            last_heard: now,
            arrived: 0,
        }
    }

    /// The connection manager has established the connection. Returns whether the
    /// handshake is complete by that.
    pub(crate) fn establish(&mut self) -> bool {
        self.established = true;
        self.complete_handshake()
    }

    /// The peer has announced a window. Returns whether the handshake is complete by that.
    pub(crate) fn announced(&mut self) -> bool {
        self.announced = true;
        self.complete_handshake()
    }

    /// The peer gave a sign of life.
    pub(crate) fn heard(&mut self, now: Millis) {
        self.last_heard = now;
    }

    /// Whether the connection manager has established the connection.
    pub(crate) fn is_cm_established(&self) -> bool {
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
    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// The server closed the connection, to which it had written at the time `written` last.
    pub(crate) fn close(&mut self, written: Millis, reader: Reader, now: Millis) {
        let Timing { delivery, linger, .. } = self.timing;
        let (patience, linger) = match reader {
            Reader::Refused => (linger.max(UNSERVED).min(delivery), linger),
            Reader::Client => (delivery, linger),
            Reader::Server => (delivery, 0),
        };
        self.phase = Phase::Lingering { deadline: now + patience, since: written, linger };
    }

    /// Something that was written has arrived, so the peer lives.
    pub(crate) fn payload_completed(&mut self, now: Millis) {
        self.last_heard = now;
        self.arrived = now;
    }

    /// A probe completed: everything posted before it has arrived, and the peer lives.
    pub(crate) fn probe_completed(&mut self, now: Millis) {
        let late = self.probed.take().is_some_and(|since| now > since + PROMPT);
        self.last_heard = now;
        if late {
            self.arrived = now;
        }
    }

    /// What the time asks for. `delivered` says that no work request is in flight.
    pub(crate) fn duty(&mut self, now: Millis, delivered: bool) -> Duty {
        match &mut self.phase {
            Phase::Handshake { deadline } if now >= *deadline => Duty::HandshakeTimedOut,
            Phase::Handshake { .. } => Duty::Wait,
            Phase::Open => {
                let silent_since = self.last_heard + self.timing.keepalive;
                if self.probed.is_some() {
                    // The device gives up at some time, but not Soft-RoCE: it takes the seven
                    // tries that clients choose for tries without end.
                    let over = now >= silent_since.saturating_add(self.timing.answer);
                    return if over { Duty::NoReply } else { Duty::Wait };
                }
                if now < silent_since {
                    return Duty::Wait;
                }
                self.probed = Some(now);
                Duty::Probe
            }
            Phase::Lingering { deadline, since, linger } => {
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
                if now >= since + *linger { Duty::End } else { Duty::Wait }
            }
        }
    }

    /// Whether a probe is out that was not answered yet.
    pub(crate) fn is_probing(&self) -> bool {
        self.probed.is_some()
    }

    /// When the peer last gave a sign of life.
    pub(crate) fn last_heard(&self) -> Millis {
        self.last_heard
    }

    /// A probe is to be posted for another reason than silence. `false` if one is out: its
    /// completion says as much.
    pub(crate) fn begin_probe(&mut self, now: Millis) -> bool {
        let none = self.probed.is_none();
        self.probed.get_or_insert(now);
        none
    }

    /// A probe could not be posted: it is tried again at the next [`duty`](Self::duty).
    pub(crate) fn probe_not_sent(&mut self) {
        self.probed = None;
    }

    /// Whether the server has closed the connection.
    pub(crate) fn is_lingering(&self) -> bool {
        matches!(self.phase, Phase::Lingering { .. })
    }

    /// Whether its handshake has taken too long, as far as is known.
    pub(crate) fn is_overdue(&self, now: Millis) -> bool {
        matches!(self.phase, Phase::Handshake { deadline } if now >= deadline)
    }

    /// Whether it is in handshake or lingers, so that the time is to be asked often.
    pub(crate) fn is_transient(&self) -> bool {
        self.phase != Phase::Open
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const TIMING: Timing =
        Timing { handshake: 100, keepalive: 50, answer: 500, linger: 20, delivery: 200 };

    fn open() -> Lifecycle {
        let mut lifecycle = Lifecycle::new(TIMING, 0);
        assert!(!lifecycle.announced());
        assert!(lifecycle.establish());
        lifecycle
    }

    #[test]
    fn the_handshake_needs_both_halves_in_either_order() {
        assert!(open().is_open());
        let mut lifecycle = Lifecycle::new(TIMING, 0);
        assert!(!lifecycle.establish());
        assert!(lifecycle.announced());
        assert!(!lifecycle.announced(), "only once");
    }

    #[test]
    fn a_handshake_that_takes_too_long_ends() {
        let mut lifecycle = Lifecycle::new(TIMING, 1000);
        lifecycle.establish();
        assert_eq!(lifecycle.duty(1099, true), Duty::Wait);
        assert_eq!(lifecycle.duty(1100, true), Duty::HandshakeTimedOut);
    }

    #[test]
    fn a_silent_peer_is_probed_once_at_a_time() {
        let mut lifecycle = open();
        assert_eq!(lifecycle.duty(49, true), Duty::Wait);
        assert_eq!(lifecycle.duty(50, true), Duty::Probe);
        assert_eq!(lifecycle.duty(500, true), Duty::Wait, "one is out");
        lifecycle.probe_completed(501);
        assert_eq!(lifecycle.duty(550, true), Duty::Wait);
        lifecycle.heard(540);
        assert_eq!(lifecycle.duty(589, true), Duty::Wait, "heard of it since");
        assert_eq!(lifecycle.duty(590, true), Duty::Probe);
    }

    #[test]
    fn a_peer_that_does_not_answer_is_given_up() {
        let mut lifecycle = open();
        assert_eq!(lifecycle.duty(50, true), Duty::Probe);
        assert_eq!(lifecycle.duty(549, true), Duty::Wait);
        assert_eq!(lifecycle.duty(550, true), Duty::NoReply);
        lifecycle.heard(551);
        assert_eq!(
            lifecycle.duty(1100, true),
            Duty::Wait,
            "it spoke, whatever became of the probe"
        );
        assert_eq!(lifecycle.duty(1101, true), Duty::NoReply);
        let mut patient =
            Lifecycle { timing: Timing { answer: Millis::MAX, ..TIMING }, ..lifecycle };
        assert_eq!(patient.duty(Millis::MAX - 1, true), Duty::Wait);
    }

    #[test]
    fn a_probe_of_the_transport_s_is_one_like_the_others() {
        let mut lifecycle = open();
        assert!(lifecycle.begin_probe(20));
        assert!(!lifecycle.begin_probe(30), "one is out");
        assert_eq!(lifecycle.duty(50, true), Duty::Wait);
        assert_eq!(lifecycle.duty(550, true), Duty::NoReply, "no sooner and no later");
        lifecycle.probe_completed(560);
        assert!(lifecycle.begin_probe(570));
        lifecycle.probe_not_sent();
        assert_eq!(lifecycle.duty(610, true), Duty::Probe);
    }

    #[test]
    fn closing_waits_for_delivery_and_then_for_the_reader() {
        let mut lifecycle = open();
        lifecycle.close(1000, Reader::Client, 1000);
        assert!(!lifecycle.is_open());
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        assert_eq!(lifecycle.duty(1050, false), Duty::Wait);
        lifecycle.probe_completed(1060);
        assert_eq!(lifecycle.duty(1000 + 19, true), Duty::Wait, "prompt: counted from the write");
        assert_eq!(lifecycle.duty(1000 + 20, true), Duty::End);
    }

    #[test]
    fn what_arrived_late_is_read_later() {
        let mut lifecycle = open();
        lifecycle.close(1000, Reader::Client, 1000);
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        let late = 1000 + PROMPT + 1;
        lifecycle.probe_completed(late);
        assert_eq!(lifecycle.duty(late + 19, true), Duty::Wait);
        assert_eq!(lifecycle.duty(late + 20, true), Duty::End);

        // The same of a probe that was out already, and of bytes that were signalled.
        let mut lifecycle = open();
        assert_eq!(lifecycle.duty(50, false), Duty::Probe);
        lifecycle.close(40, Reader::Client, 990);
        assert_eq!(lifecycle.duty(990, false), Duty::Wait);
        lifecycle.probe_completed(1000);
        assert_eq!(lifecycle.duty(1019, true), Duty::Wait);
        let mut lifecycle = open();
        lifecycle.payload_completed(1000);
        lifecycle.close(40, Reader::Client, 1001);
        assert_eq!(lifecycle.duty(1019, true), Duty::Wait);
        assert_eq!(lifecycle.duty(1020, true), Duty::End);
    }

    #[test]
    fn closing_is_bounded() {
        let mut lifecycle = open();
        lifecycle.close(1000, Reader::Client, 1000);
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        assert_eq!(lifecycle.duty(1199, false), Duty::Wait);
        assert_eq!(lifecycle.duty(1200, false), Duty::End, "a peer that takes nothing");

        let timing = Timing { delivery: 10_000, ..TIMING };
        let mut refused = Lifecycle::new(timing, 0);
        refused.close(1000, Reader::Refused, 1000);
        assert_eq!(refused.duty(1000, false), Duty::Probe);
        assert_eq!(refused.duty(1000 + UNSERVED - 1, false), Duty::Wait);
        assert_eq!(refused.duty(1000 + UNSERVED, false), Duty::End, "a refused one, sooner");
    }

    #[test]
    fn closing_is_immediate_when_the_peer_has_had_its_time() {
        let mut lifecycle = open();
        lifecycle.close(0, Reader::Client, 1000);
        assert_eq!(lifecycle.duty(1000, true), Duty::End, "nothing was ever written");

        // Written long ago, and not known to have arrived: a round trip tells.
        let mut lifecycle = open();
        lifecycle.close(900, Reader::Client, 1000);
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        lifecycle.probe_completed(1001);
        assert_eq!(lifecycle.duty(1001, true), Duty::End);
    }

    #[test]
    fn a_server_reads_what_has_arrived_whenever_it_ends() {
        let mut lifecycle = open();
        lifecycle.close(1000, Reader::Server, 1000);
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        assert_eq!(lifecycle.duty(1050, false), Duty::Wait);
        lifecycle.probe_completed(1060);
        assert_eq!(lifecycle.duty(1060, true), Duty::End, "as soon as it has arrived");
        let mut lifecycle = open();
        lifecycle.close(1000, Reader::Server, 1000);
        assert_eq!(lifecycle.duty(1000, false), Duty::Probe);
        assert_eq!(lifecycle.duty(1200, false), Duty::End, "one that takes nothing, as a client");
    }
}
