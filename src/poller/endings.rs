// SPDX-License-Identifier: BSD-3-Clause
//! What befalls connections, and how they end: by a word of the connection manager, of the
//! server or of a failure, with a line in the log, and their removal.

use super::{ENDINGS_PER_PASS, Poller};
use crate::device::SharedDevice;
use crate::endpoint::{Endpoint, PeerState, Reason, Stage};
use crate::host::api;
use crate::metrics::METRICS;
use crate::panic::guard;
use crate::poller::device_events::unwatch_events;
use crate::poller::teardown;
use crate::time;
use log::Level;
use proto::session::Violation;
use std::sync::Arc;
use verbs::Error;
use verbs::cm::{Event, EventKind};

impl Poller {
    /// What happened to a connection, or to one that is being opened.
    pub(super) fn connection_event(&self, event: Event) {
        let found = self.registry.borrow_mut().find_by_id(&event.id);
        if event.kind == EventKind::DeviceRemoval {
            // Each id is told; the one that holds it open is there even if nobody is connected.
            let devices = self.devices.borrow_mut();
            let of_device = |device: &&Arc<SharedDevice>| match &found {
                Some(endpoint) => Arc::ptr_eq(&endpoint.device(), device),
                None => device.anchor() == event.id,
            };
            let device = devices.iter().find(of_device).cloned();
            drop(devices);
            if let Some(device) = device {
                self.retire(&device, "it was removed");
            }
        }
        let Some(endpoint) = found else {
            self.upcalls.resolved(self, event);
            return;
        };
        match event.kind {
            EventKind::Established => self.establish(&endpoint),
            EventKind::Disconnected | EventKind::TimewaitExit => {
                endpoint.main_state().reason.get_or_insert(Reason::Client);
                let horizon = endpoint.device().horizon(endpoint.queue());
                self.leaving.borrow_mut().push((endpoint.key(), horizon));
            }
            EventKind::Failed | EventKind::Rejected => {
                let why = format!("it could not be established (status {})", event.status);
                // Negative statuses are error numbers, others a peer's reasons to reject.
                if event.status < 0 {
                    endpoint.main_state().failure = -event.status;
                }
                self.say_lost(&endpoint, &why);
                self.lose(&endpoint, PeerState::Disconnected, Reason::Error);
            }
            EventKind::AddressChange => {
                let what = format!("address of the connection of {} changed", endpoint.peer_text());
                self.say_trouble(Level::Info, &what);
            }
            EventKind::AddressResolved
            | EventKind::RouteResolved
            | EventKind::ConnectRequest
            | EventKind::DeviceRemoval
            | EventKind::Other => {}
        }
    }

    /// The connection manager has established a connection.
    fn establish(&self, endpoint: &Arc<Endpoint>) {
        self.shorten_rnr_timer(endpoint);
        match endpoint.establish() {
            Ok(true) => self.mark_ready(endpoint),
            Ok(false) => {}
            Err(error) => self.close_on_error(endpoint, Err(error)),
        }
    }

    /// A device was removed, or can't be used any more: forgets it, so that its
    /// descriptor, which would be readable for ever, is not looked at, and ends its
    /// connections. Its queues go with the last of them. A device that comes back, even the
    /// same, is opened anew.
    pub(super) fn retire(&self, device: &Arc<SharedDevice>, why: &str) {
        {
            let mut devices = self.devices.borrow_mut();
            let Some(index) = devices.iter().position(|it| Arc::ptr_eq(it, device)) else { return };
            devices.remove(index);
        }
        api::unwatch(device.fd());
        unwatch_events(device);
        // Copies of that descriptor among them; they grow again as they are needed.
        self.wakeup_fds.borrow_mut().shrink(true);
        METRICS.devices_lost.add(1);
        let mut ended = 0;
        for endpoint in &self.on_device(device) {
            self.lose(endpoint, PeerState::Disconnected, Reason::Error);
            ended += 1;
        }
        let what = format!("device {} is lost: {why}; its {ended} connections end", device.name());
        self.say_trouble(Level::Warn, &what);
    }

    /// Says of those who have left that they are gone, once all that they sent was seen.
    pub(super) fn let_go(&self) {
        if self.leaving.borrow_mut().is_empty() {
            return;
        }
        let leaving = std::mem::take(&mut *self.leaving.borrow_mut());
        for (key, horizon) in leaving {
            let Some(endpoint) = self.find(key) else { continue };
            if endpoint.device().is_beyond(endpoint.queue(), horizon) {
                self.lose(&endpoint, PeerState::Disconnected, Reason::Client);
            } else {
                self.leaving.borrow_mut().push((key, horizon));
            }
        }
    }

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
    pub fn close_on_error(&self, endpoint: &Arc<Endpoint>, result: Result<(), Error>) {
        if let Err(error) = result {
            METRICS.posts_refused.add(1);
            if endpoint.stream().peer_state() == PeerState::Connected {
                self.say_refused(endpoint, error);
            }
            self.lose(endpoint, PeerState::Disconnected, Reason::Error);
        }
    }

    /// Says that the device refused a write, which any thread may have found, once, and minds
    /// what that tells of the device.
    pub(super) fn say_refusal(&self, endpoint: &Endpoint) {
        if let Some(errno) = endpoint.take_refusal() {
            let error = Error { action: "post a work request", errno };
            self.say_refused(endpoint, error);
            if endpoint.stream().outbound().total_posted() == 0 && error.is_unsupported() {
                self.doubt_device(&endpoint.device(), error);
            }
        }
    }

    fn say_refused(&self, endpoint: &Endpoint, error: Error) {
        self.say_lost(endpoint, &format!("{error}; device {}", endpoint.device().name()));
    }

    /// A device refused a connection's first write as something that there is not. If none has
    /// ever written there, nobody can be served by it.
    fn doubt_device(&self, device: &Arc<SharedDevice>, error: Error) {
        let has_written = |it: &Arc<Endpoint>| it.stream().outbound().total_posted() > 0;
        if self.on_device(device).iter().any(has_written) {
            device.abilities().note_written();
        }
        if device.abilities().note_write_refused() {
            METRICS.devices_unfit.add(1);
            let what = format!(
                "device {} can't serve clients: it refuses RDMA writes with immediate data, which \
                 the protocol needs ({error}); they are refused from now on",
                device.name()
            );
            self.say_trouble(Level::Warn, &what);
        }
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
        drop(own);
        if orphan {
            self.doom(endpoint);
        } else {
            self.mark_ready(endpoint);
        }
    }

    /// The server closed the connection of `endpoint`: what it had written is still
    /// delivered.
    pub fn close(&self, endpoint: &Arc<Endpoint>) {
        self.say_refusal(endpoint);
        endpoint.enter_stage(Stage::Lingering);
        let now = time::now();
        let mut own = endpoint.main_state();
        own.set_connection(std::ptr::null_mut());
        own.watch.since = now;
        let left = own.reason == Some(Reason::Client);
        let alive = endpoint.stream().peer_state() == PeerState::Connected && !left;
        let served = endpoint.stream().total_read() > 0;
        own.session.close(endpoint.activity().written(), served, now);
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
