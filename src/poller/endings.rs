// SPDX-License-Identifier: BSD-3-Clause
//! How connections end: by the server, by a violation or by a failure, with a line in the log,
//! and their removal.

use super::{ENDINGS_PER_PASS, Poller};
use crate::endpoint::{Endpoint, PeerState, Reason, Stage};
use crate::metrics::METRICS;
use crate::panic::guard;
use crate::poller::teardown;
use crate::time;
use log::Level;
use proto::session::Violation;
use std::sync::Arc;
use verbs::Error;

impl Poller {
    /// Removes an endpoint that no connection of the server has any more.
    pub fn remove(&self, endpoint: Arc<Endpoint>, reason: Reason) {
        if !self.registry.borrow_mut().remove(endpoint.key(), &endpoint.id_key()) {
            return;
        }
        let reason = endpoint.main_state().reason.unwrap_or(reason);
        match reason {
            Reason::Client => &METRICS.ended_by_client,
            Reason::Server => &METRICS.ended_by_server,
            Reason::Violation => &METRICS.ended_by_violation,
            Reason::Error => &METRICS.ended_by_error,
            Reason::Timeout => &METRICS.ended_by_timeout,
        }
        .add(1);
        endpoint.enter_stage(Stage::Ending);
        if endpoint.stream().outbound().total_posted() > 0 {
            endpoint.device().abilities().note_written();
        }
        endpoint.detach();
        teardown::hand_over(endpoint, |why| self.say_trouble(Level::Warn, why));
    }

    /// Removes endpoints that are over, up to the bound of a pass.
    pub(super) fn remove_doomed(&self) {
        let mut count = 0;
        while count < ENDINGS_PER_PASS {
            let Some(key) = self.doomed.borrow_mut().pop_front() else { break };
            if let Some(endpoint) = self.find(key) {
                self.remove(endpoint, Reason::Error);
                count += 1;
            }
        }
        METRICS.endings_at_once_most.raise(count as u64);
    }

    /// Has an endpoint removed that no connection of the server has any more: not here, since
    /// completions of it may stand further on in the batch.
    pub fn doom(&self, endpoint: &Endpoint) {
        if endpoint.main_state().stage == Stage::Ending {
            return;
        }
        // It takes no newcomer's room any more.
        endpoint.enter_stage(Stage::Ending);
        self.doomed.borrow_mut().push_back(endpoint.key());
        if *self.passes.borrow_mut() == 0 {
            self.wake_loop();
        }
    }

    /// Ends the connection if something that it needs could not be posted.
    pub fn lose_on_error(&self, endpoint: &Arc<Endpoint>, result: Result<(), Error>) {
        if let Err(error) = result {
            METRICS.posts_failed.add(1);
            if endpoint.stream().peer_state() == PeerState::Connected {
                self.say_post_failed(endpoint, error);
            }
            self.lose(endpoint, PeerState::Disconnected, Reason::Error);
        }
    }

    /// Says that a write could not be posted, which any thread may have found, once, and minds
    /// what that tells of the device.
    pub(super) fn say_post_error(&self, endpoint: &Endpoint) {
        if let Some(errno) = endpoint.take_post_error() {
            let error = Error { action: "post a work request", errno };
            self.say_post_failed(endpoint, error);
            if endpoint.stream().outbound().total_posted() == 0 && error.is_unsupported() {
                self.doubt_device(&endpoint.device(), error);
            }
        }
    }

    fn say_post_failed(&self, endpoint: &Endpoint, error: Error) {
        self.say_lost(endpoint, &format!("{error}; device {}", endpoint.device().name()));
    }

    /// Says why a connection is lost, unless many are.
    pub fn say_lost(&self, endpoint: &Endpoint, why: &str) {
        let peer = endpoint.peer_text();
        let message = format_args!("connection of {peer} lost: {why}");
        self.losses.borrow_mut().log(time::now(), Level::Info, message);
    }

    /// Says what befell a device or an address, unless much does.
    pub fn say_trouble(&self, level: log::Level, what: &str) {
        self.troubles.borrow_mut().log(time::now(), level, format_args!("{what}"));
    }

    /// The peer broke the protocol: that is said, and the connection is over.
    pub(super) fn violate(&self, endpoint: &Arc<Endpoint>, violation: Violation) {
        if endpoint.stream().peer_state() != PeerState::Failed {
            METRICS.violated(&violation);
            // Also where the server has closed already, or the peer has left.
            endpoint.main_state().reason = Some(Reason::Violation);
            let peer = endpoint.peer_text();
            let message = format_args!("client {peer} broke the protocol: {violation}");
            self.violations.borrow_mut().log(time::now(), Level::Warn, message);
        }
        self.lose(endpoint, PeerState::Failed, Reason::Violation);
    }

    /// The connection is over for this reason; whoever has it is told.
    pub fn lose(&self, endpoint: &Arc<Endpoint>, state: PeerState, reason: Reason) {
        endpoint.stream().escalate(state);
        let mut own = endpoint.main_state();
        own.reason.get_or_insert(reason);
        let orphan = own.connection().is_null();
        // It left before the server looked at it: what it sent before is carried out all the same.
        let unheard = reason == Reason::Client
            && own.stage == Stage::Handshaking
            && own.session.is_open()
            && endpoint.stream().unread() > 0;
        drop(own);
        self.tell_elsewhere();
        if orphan && !unheard {
            self.doom(endpoint);
        } else {
            self.mark_ready(endpoint);
        }
    }

    /// The server closed the connection of `endpoint`: what it had written is still
    /// delivered.
    pub fn close(&self, endpoint: &Arc<Endpoint>) {
        self.say_post_error(endpoint);
        let now = time::now();
        endpoint.begin_lingering(now);
        let mut own = endpoint.main_state();
        own.set_connection(std::ptr::null_mut());
        own.watch.since = now;
        let left = own.reason == Some(Reason::Client);
        let alive = endpoint.stream().peer_state() == PeerState::Connected && !left;
        if alive {
            own.reason.get_or_insert(Reason::Server);
        }
        drop(own);
        if alive {
            self.track_lingering(endpoint);
        } else {
            self.doom(endpoint);
        }
    }

    /// As [`guard`], for the main thread's work on one endpoint: a panic ends its connection.
    pub fn guard(&self, what: &str, endpoint: &Arc<Endpoint>, work: impl FnOnce()) {
        if guard(what, work).is_none() {
            self.give_up(endpoint);
        }
    }

    /// Ends the connection of an endpoint that our own side failed.
    pub fn give_up(&self, endpoint: &Arc<Endpoint>) {
        endpoint.stream().escalate(PeerState::Failed);
        guard("ending a connection", || self.lose(endpoint, PeerState::Failed, Reason::Error));
    }
}
