// SPDX-License-Identifier: BSD-3-Clause
//! What the poller has done by those who know the server.

use crate::child;
use crate::conntype::dual_channel;
use crate::conntype::listener::Listening;
use crate::conntype::outgoing;
use crate::endpoint::Endpoint;
use crate::poller::{Poller, Upcalls};
use proto::session::Millis;
use std::sync::Arc;
use verbs::cm::Event;

/// The connection type, as the poller sees it.
#[derive(Debug)]
pub(super) struct ConnectionType;

impl Upcalls for ConnectionType {
    fn accepted(&self, poller: &Poller, endpoint: &Arc<Endpoint>) {
        Listening::get().hand_over(poller, endpoint);
    }

    fn connected(&self, poller: &Poller, endpoint: &Arc<Endpoint>) {
        outgoing::finish(poller, endpoint);
    }

    fn resolved(&self, poller: &Poller, event: Event) {
        outgoing::event(poller, event);
    }

    fn housekeeping(&self, now: Millis) {
        child::tell();
        dual_channel::rest(now);
    }

    fn needs_housekeeping(&self) -> bool {
        dual_channel::is_filtering()
    }
}
