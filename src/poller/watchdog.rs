// SPDX-License-Identifier: BSD-3-Clause
//! Connections that are stuck although they have something to do.
//!
//! There should be none: whoever parks an endpoint knows what will wake it. The watchdog
//! is for the day on which that is wrong. The housekeeping timer shows it every endpoint once a
//! second. One that has something to do and stood still for the time of the setting is logged,
//! counted and *nudged*: marked ready, as what should have woken it would have done.
//!
//! Time is counted in ticks of the clock, in each of which the event loop had a turn: a
//! server that was busy with a command for ten seconds is not stuck.
//!
//! A full window is the client's affair, and so is a client that does not acknowledge:
//! neither is something to do. A notification that a device lost is nobody's: the slow
//! clock looks for completions by itself.

use crate::endpoint::status;
use crate::endpoint::{Endpoint, Stage};
use crate::metrics::METRICS;
use crate::poller::Poller;
use proto::session::Millis;
use std::time::Duration;

/// Nudges that are logged in a minute.
pub(super) const LINES_PER_MINUTE: u32 = 10;

impl Poller {
    /// Looks at an endpoint, `tick` after the last time.
    pub(super) fn watch_over(&self, endpoint: &Endpoint, tick: Duration, now: Millis) {
        let setting = self.settings().borrow_mut().watchdog_timeout;
        let due = is_due(endpoint);
        let still = endpoint.main_state().watch.tick(endpoint.stream().progress(), due, now);
        // Two ticks at least: the first may have come right before the work did.
        let patience = setting.div_ceil(tick.as_millis() as Millis).max(2);
        if setting > 0 && u64::from(still) >= patience {
            self.nudge_stuck(endpoint, now);
        }
    }

    fn nudge_stuck(&self, endpoint: &Endpoint, now: Millis) {
        // As it is while it is stuck.
        let state = status::describe(endpoint);
        self.nudge(endpoint);
        METRICS.watchdog_nudges.add(1);
        endpoint.main_state().watch.restart();
        let peer = endpoint.peer_text();
        let message = format_args!(
            "connection of {peer} was stuck with something to do and has been nudged; this is a \
             bug in valkey-rdma, please report it: {state}"
        );
        self.log_nudge(now, message);
    }
}

/// Whether the endpoint should be served: a handler of the server has something to do, a
/// window is to be announced, or the server has not heard of the connection yet.
fn is_due(endpoint: &Endpoint) -> bool {
    let own = endpoint.main_state();
    let (stage, open) = (own.stage, own.session.is_open());
    drop(own);
    match stage {
        Stage::Established => endpoint.has_work() || endpoint.is_announcement_missed(),
        Stage::Handshaking => open,
        Stage::Lingering | Stage::Ending => false,
    }
}
