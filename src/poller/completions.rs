// SPDX-License-Identifier: BSD-3-Clause
//! What completed, one after the other: which endpoint it is of, and what follows from it.

use super::Poller;
use crate::device::{Hub, Progress, Which};
use crate::endpoint::key::{Key, Work};
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::metrics::METRICS;
use crate::time;
use proto::busy_poll::Nanos;
use proto::session::{Reaction, Violation};
use std::cell::Cell;
use std::sync::Arc;
use verbs::cq::{Completion, Outcome};

impl Poller {
    /// Takes what completed on a hub, and looks until `deadline` if that is nothing. Returns
    /// whether there was something.
    pub(super) fn wait_for_completions(&self, hub: &Arc<Hub>, deadline: Nanos) -> bool {
        loop {
            if self.take_completions(hub, Which::All) > 0 {
                METRICS.busy_poll_hits.add(1);
                return true;
            }
            if deadline == 0 || time::nanos() >= deadline {
                METRICS.busy_poll_misses.add(1);
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Returns how many there were.
    pub(super) fn take_completions(&self, hub: &Arc<Hub>, which: Which) -> u64 {
        let count = Cell::new(0);
        let progress = hub.poll(which, |completion| {
            count.set(count.get() + 1);
            self.complete(completion);
        });
        // Most looks before the server sleeps find nothing.
        if count.get() > 0 {
            METRICS.completions.add(count.get());
            METRICS.completions_per_poll_peak.raise(count.get());
        }
        self.let_go();
        match progress {
            Ok(Progress::Empty) => {}
            Ok(Progress::More) => *self.unfinished.open() = true,
            Err(error) => self.retire(hub, &error.to_string()),
        }
        count.get()
    }

    /// One completion.
    fn complete(&self, completion: Completion) {
        let Some((key, work)) = Key::parse(completion.wr_id) else { return };
        // A connection that is gone may still have completions on their way.
        let Some(endpoint) = self.find(key) else { return };
        self.guard("one completion", &endpoint, || {
            self.complete_work(&endpoint, work, completion.outcome);
        });
    }

    fn complete_work(&self, endpoint: &Arc<Endpoint>, work: Work, outcome: Outcome) {
        match outcome {
            Outcome::Failed(status) if matches!(work, Work::Receive(_)) && status.is_too_long() => {
                self.violate(endpoint, Violation::TooLong);
            }
            Outcome::Failed(status) => {
                if !status.is_flush() {
                    METRICS.failed(status.failure());
                }
                // Of a peer that has left nothing else is to be expected.
                let left = endpoint.own().reason == Some(Reason::Client);
                if endpoint.stream().peer_state() == PeerState::Connected && !left {
                    let why = if status.is_flush() {
                        // Nothing of ours failed: the device refused what the peer tried.
                        String::from(
                            "queue pair flushed without a local error: remote access violation \
                             by the peer, or device failure",
                        )
                    } else {
                        format!("{} ({work:?})", status.text())
                    };
                    self.say_lost(endpoint, &why);
                }
                self.lose(endpoint, PeerState::Disconnected, Reason::Error);
            }
            Outcome::Unexpected(code) => self.violate(endpoint, Violation::Operation(code)),
            Outcome::Received(length) => {
                let Work::Receive(slot) = work else { return };
                self.receive_message(endpoint, slot, length);
            }
            Outcome::Immediate(count) => {
                let Work::Receive(slot) = work else { return };
                let now = time::now();
                let result =
                    endpoint.own().session.immediate(count, endpoint.stream().inbound(), now);
                match result {
                    Ok(()) => {
                        self.post_again(endpoint, slot);
                        // The sooner the better: the peer has nowhere to write to.
                        self.attempt(endpoint, endpoint.announce_if_full());
                    }
                    Err(violation) => self.violate(endpoint, violation),
                }
                self.mark_if_ready(endpoint);
            }
            Outcome::Sent => match work {
                Work::Payload(sequence) => {
                    endpoint.stream().outbound().retire((sequence + 1) & 0x00ff_ffff);
                    endpoint.own().session.payload_completed(time::now());
                    self.delivered(endpoint);
                }
                Work::Probe(sequence) => {
                    endpoint.stream().outbound().retire(sequence);
                    endpoint.own().session.probe_completed(time::now());
                    self.delivered(endpoint);
                }
                Work::Control(slot) => {
                    endpoint.control_completed(slot);
                    self.attempt(endpoint, endpoint.send_answers());
                    self.attempt(endpoint, endpoint.announce_if_full());
                }
                Work::Receive(_) => {}
            },
        }
    }

    /// Something that was written is known to have arrived.
    fn delivered(&self, endpoint: &Arc<Endpoint>) {
        if endpoint.own().session.is_lingering() {
            // Perhaps that was all that it lingered for.
            self.step(endpoint, time::now(), false);
        } else {
            self.mark_if_ready(endpoint);
        }
    }

    fn receive_message(&self, endpoint: &Arc<Endpoint>, slot: u16, length: u32) {
        let bytes = endpoint.received(slot, length);
        let reaction =
            endpoint.own().session.message(&bytes, slot, endpoint.stream().outbound(), time::now());
        match reaction {
            Ok(Reaction::Nothing) => self.post_again(endpoint, slot),
            Ok(Reaction::WindowOpened) => {
                METRICS.announcements_received.add(1);
                endpoint.activity().window_opened();
                self.post_again(endpoint, slot);
                if endpoint.own().session.handshake_completed_by_window() {
                    self.mark_ready(endpoint);
                }
                self.mark_if_ready(endpoint);
            }
            Ok(Reaction::AnswerDue) => self.attempt(endpoint, endpoint.send_answers()),
            Err(violation) => self.violate(endpoint, violation),
        }
    }

    fn post_again(&self, endpoint: &Arc<Endpoint>, slot: u16) {
        if endpoint.stream().peer_state() == PeerState::Connected {
            self.attempt(endpoint, endpoint.post_receive_again(slot));
        }
    }
}
