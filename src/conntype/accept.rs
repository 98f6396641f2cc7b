// SPDX-License-Identifier: BSD-3-Clause
//! Connections that clients open: requests are accepted or refused, and endpoints whose
//! handshakes are complete become connections of the server.

use crate::conntype::listener::Listening;
use crate::endpoint::{Endpoint, PeerState, Reason, Stage};
use crate::host::connection::State;
use crate::metrics::METRICS;
use crate::poller::connection::RdmaConnection;
use crate::poller::{Origin, Poller};
use crate::time;
use std::sync::Arc;
use verbs::cm::Id;

impl Listening {
    /// Accepts a connection request, or refuses it.
    pub(super) fn accept(&self, id: Id) {
        let peer = id.peer_address().map_or_else(String::new, |peer| peer.to_string());
        let most = u64::from(self.settings.borrow_mut().max_handshakes);
        if !self.poller.make_room(most) {
            id.reject();
            METRICS.refused_handshakes.add(1);
            self.refuse_client(
                &peer,
                &format!("{most} connections are in handshake or ending (max-handshakes)"),
            );
            return;
        }
        let result = id
            .migrate(self.poller.channel())
            .and_then(|()| self.poller.enter(id, Origin::Client))
            .and_then(|endpoint| {
                let accepted = self.poller.accept(&endpoint);
                if accepted.is_err() {
                    endpoint.id().reject();
                    self.poller.remove(endpoint, Reason::Error);
                }
                accepted
            });
        if let Err(error) = result {
            if error.is_out_of_memory() {
                &METRICS.refused_memory
            } else {
                &METRICS.refused_device
            }
            .add(1);
            self.refuse_client(&peer, &error.to_string());
        }
    }

    /// Counts a client that is refused and says so, once a minute.
    pub(super) fn refuse_client(&self, peer: &str, why: &str) {
        METRICS.connections_refused.add(1);
        let message = format_args!("client {peer} refused: {why}");
        self.refusals.borrow_mut().log(time::now(), log::Level::Warn, message);
    }

    /// The handshake is complete: makes the endpoint a connection of the server.
    pub(super) fn hand_over(&self, poller: &Poller, endpoint: &Arc<Endpoint>) {
        let connection = RdmaConnection::create(self.kind(), State::Accepting);
        // SAFETY: just made, nobody else's yet.
        unsafe {
            if !(*connection).has_descriptor() {
                self.refuse_client(&endpoint.peer_text(), "no descriptor left");
                METRICS.refused_descriptors.add(1);
                RdmaConnection::free(connection);
                poller.lose(endpoint, PeerState::Disconnected, Reason::Server);
                return;
            }
            (*connection).endpoint = Some(Arc::clone(endpoint));
        }
        endpoint.main_state().set_connection(connection.cast());
        endpoint.enter_stage(Stage::Established);
        METRICS.connections_accepted.add(1);
        *self.accepting.borrow_mut() = Some(Arc::clone(endpoint));
        // SAFETY: of our type and accepting.
        unsafe { self.symbols.accept_common(connection.cast()) };
        *self.accepting.borrow_mut() = None;
        poller.mark_if_ready(endpoint);
    }

    /// The server has a new client, of whatever connection type.
    pub fn client_connected(&self, client: u64) {
        // The server says so while it accepts, so it is the one that is being accepted.
        if let Some(endpoint) = self.accepting.borrow_mut().take() {
            endpoint.main_state().client = Some(client);
        }
    }
}
