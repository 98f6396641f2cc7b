// SPDX-License-Identifier: BSD-3-Clause
//! What the connection manager tells of connections.

use super::{EVENTS_PER_GO, Poller};
use crate::device::{SharedDevice, Which};
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::panic::guard;
use log::Level;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use verbs::cm::{Event, EventKind};

impl Poller {
    /// Handles what happened to connections.
    fn run_connection_events(&self) {
        let _pass = self.pass();
        self.take_connection_events();
        if !self.leaving.borrow_mut().is_empty() {
            let devices = self.devices.borrow_mut().clone();
            for device in &devices {
                self.take_completions(device, Which::All);
            }
        }
        self.serve_ready();
    }

    /// Takes what happened to connections, up to the bound of a pass. Returns whether that
    /// was all.
    pub(super) fn take_connection_events(&self) -> bool {
        for _ in 0..EVENTS_PER_GO {
            match self.channel.next() {
                Ok(Some(event)) => self.connection_event(event),
                Ok(None) => return true,
                Err(error) => {
                    self.say_trouble(Level::Warn, &error.to_string());
                    return true;
                }
            }
        }
        false
    }

    /// What happened to a connection, or to one that is being opened.
    fn connection_event(&self, event: Event) {
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
            Err(error) => self.lose_on_error(endpoint, Err(error)),
        }
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
}

pub(super) unsafe extern "C" fn on_connection_event(_fd: c_int, _data: *mut c_void, _mask: c_int) {
    guard("connection event", || Poller::get().run_connection_events());
}
