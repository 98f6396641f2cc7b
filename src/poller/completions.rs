// SPDX-License-Identifier: BSD-3-Clause
//! What completed, one after the other: which endpoint it is of, and what follows from it.

use super::Poller;
use crate::device::{Progress, SharedDevice, Which};
use crate::endpoint::wr_id::{EndpointId, WrKind};
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::metrics::METRICS;
use crate::time;
use proto::busy_poll::Nanos;
use proto::session::{Lost, MessageAction, Violation};
use std::cell::Cell;
use std::sync::Arc;
use verbs::Error;
use verbs::cq::{Completion, Outcome, Status};

impl Poller {
    /// Takes what completed on a device, and looks until `deadline` if that is nothing. Returns
    /// whether there was something.
    pub(super) fn wait_for_completions(&self, device: &Arc<SharedDevice>, deadline: Nanos) -> bool {
        loop {
            if self.take_completions(device, Which::All) > 0 {
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
    pub(super) fn take_completions(&self, device: &Arc<SharedDevice>, which: Which) -> u64 {
        let count = Cell::new(0);
        let progress = device.poll(which, |completion| {
            count.set(count.get() + 1);
            self.complete(completion);
        });
        // Most looks before the server sleeps find nothing.
        if count.get() > 0 {
            METRICS.completions.add(count.get());
            METRICS.completions_per_poll_peak.raise(count.get());
            self.tell_elsewhere();
        }
        self.let_go();
        match progress {
            Ok(Progress::Empty) => {}
            Ok(Progress::More) => *self.unfinished.borrow_mut() = true,
            Err((queue, error)) => {
                // The device may say more of it: that it is about this queue alone.
                self.take_device_events(device);
                if !device.is_given_up(queue) {
                    self.retire(device, &error.to_string());
                }
            }
        }
        count.get()
    }

    /// One completion.
    fn complete(&self, completion: Completion) {
        let Some((key, work)) = EndpointId::parse(completion.wr_id) else { return };
        // A connection that is gone may still have completions on their way.
        let Some(endpoint) = self.find(key) else { return };
        self.guard("one completion", &endpoint, || {
            self.complete_work(&endpoint, work, completion.outcome);
        });
    }

    fn complete_work(&self, endpoint: &Arc<Endpoint>, work: WrKind, outcome: Outcome) {
        match (outcome, work) {
            (Outcome::Immediate(count), WrKind::Receive(slot)) => {
                if let Err(lost) = endpoint.on_immediate(slot, count, time::now()) {
                    self.end_by(endpoint, lost);
                }
                self.mark_if_ready(endpoint);
            }
            (Outcome::Received(length), WrKind::Receive(slot)) => {
                // The peer is ready, though the connection manager has not heard of it: a
                // message that says so may be lost, and come again after seconds.
                if !endpoint.main_state().session.is_cm_established() {
                    endpoint.id().notify_arrival();
                }
                match endpoint.on_message(slot, length, time::now()) {
                    Ok(MessageAction::Nothing) => {}
                    Ok(action) => {
                        METRICS.announcements_received.add(1);
                        endpoint.activity().window_opened();
                        if action == MessageAction::HandshakeCompleted {
                            self.mark_ready(endpoint);
                        }
                        self.mark_if_ready(endpoint);
                    }
                    Err(lost) => self.end_by(endpoint, lost),
                }
            }
            (Outcome::Sent, work) => {
                match endpoint.on_sent(work, time::now()) {
                    Ok(action) => self.act(endpoint, action),
                    Err(error) => self.lose_on_error(endpoint, Err(error)),
                }
                if matches!(work, WrKind::Payload(_) | WrKind::Probe(_)) {
                    self.mark_if_ready(endpoint);
                }
            }
            (Outcome::Failed(status), _) => self.failed(endpoint, work, status),
            (Outcome::Unexpected(code), _) => self.violate(endpoint, Violation::Operation(code)),
            // A number of ours that says what it is not.
            (Outcome::Immediate(_) | Outcome::Received(_), _) => {}
        }
    }

    /// A work request failed, and with it the queue pair.
    fn failed(&self, endpoint: &Arc<Endpoint>, work: WrKind, status: Status) {
        let is_too_long = status.is_too_long()
            || (status.is_local_operation() && endpoint.device().hides_length());
        if matches!(work, WrKind::Receive(_)) && is_too_long {
            self.violate(endpoint, Violation::TooLong);
            return;
        }
        if !status.is_flush() {
            METRICS.failed(status.failure());
        }
        if matches!(work, WrKind::Probe(_)) && status.is_local_operation() {
            self.doubt_probes(endpoint);
        }
        // Of a peer that has left nothing else is to be expected.
        let left = endpoint.main_state().reason == Some(Reason::Client);
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
        let reason = if left { Reason::Client } else { Reason::Error };
        self.lose(endpoint, PeerState::Disconnected, reason);
    }

    fn end_by(&self, endpoint: &Arc<Endpoint>, lost: Lost<Error>) {
        match lost {
            Lost::Violation(violation) => self.violate(endpoint, violation),
            Lost::PostFailed(error) => self.lose_on_error(endpoint, Err(error)),
        }
    }
}
