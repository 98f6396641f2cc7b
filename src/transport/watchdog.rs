// SPDX-License-Identifier: BSD-3-Clause
//! Connections that are stuck although they have something to do.
//!
//! There should be none: whoever parks an endpoint knows what will wake it. The watchdog
//! is for the day on which that is wrong. The slow clock shows it every endpoint once a
//! second. One that has something to do and stood still for the time of the setting is logged,
//! counted and *nudged*: marked ready, as what should have woken it would have done.
//!
//! Time is counted in ticks of the clock, in each of which the event loop had a turn: a
//! server that was busy with a command for ten seconds is not stuck.
//!
//! A full window is the client's affair, and so is a client that does not acknowledge:
//! neither is something to do. A notification that a device lost is nobody's: the slow
//! clock looks for completions by itself.

use super::Transport;
use super::endpoint::{Endpoint, Stage};
use super::status;
use crate::host::MainCell;
use crate::log_limit::LogLimiter;
use crate::metrics::METRICS;
use proto::session::Millis;
use std::time::Duration;

/// Nudges that are logged in a minute.
const LINES_PER_MINUTE: u32 = 10;

static LINES: MainCell<LogLimiter> = MainCell::new(LogLimiter::new(LINES_PER_MINUTE));

/// What the watchdog remembers of an endpoint.
#[derive(Debug, Default)]
pub struct Watch {
    /// The endpoint's progress at the last look. What the client does does not count:
    /// it may send, or acknowledge probes, and not be served.
    progress: u64,
    /// When that was first seen, or the endpoint began to linger.
    pub since: Millis,
    /// Ticks since then on which there was something to do.
    ticks: u32,
}

impl Watch {
    /// What is remembered of an endpoint that is new.
    pub fn new(now: Millis) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// A look at the endpoint. Returns on how many ticks, this one included, it stood
    /// still with something to do.
    fn tick(&mut self, progress: u64, due: bool, now: Millis) -> u32 {
        if progress != self.progress {
            (self.progress, self.since, self.ticks) = (progress, now, 0);
        } else if due {
            self.ticks += 1;
        } else {
            self.ticks = 0;
        }
        self.ticks
    }
}

/// Looks at an endpoint, `tick` after the last time.
pub fn look_at(endpoint: &Endpoint, tick: Duration, now: Millis) {
    let setting = Transport::get().settings.open().watchdog_timeout;
    let due = is_due(endpoint);
    let still = endpoint.own().watch.tick(endpoint.progress(), due, now);
    // Two ticks at least: the first may have come right before the work did.
    let patience = setting.div_ceil(tick.as_millis() as Millis).max(2);
    if setting > 0 && u64::from(still) >= patience {
        nudge(endpoint, now);
    }
}

/// Whether the endpoint should be served: a handler of the server has something to do, a
/// window is to be announced, or the server has not heard of the connection yet.
fn is_due(endpoint: &Endpoint) -> bool {
    let own = endpoint.own();
    let (stage, open) = (own.stage, own.session.is_open());
    drop(own);
    match stage {
        Some(Stage::Established) => endpoint.has_work() || endpoint.is_announcement_missed(),
        Some(Stage::Handshaking) => open,
        Some(Stage::Lingering | Stage::Ending) | None => false,
    }
}

fn nudge(endpoint: &Endpoint, now: Millis) {
    // As it is while it is stuck.
    let state = status::describe(endpoint);
    Transport::get().poller.nudge(endpoint);
    METRICS.watchdog_nudges.add(1);
    endpoint.own().watch.ticks = 0;
    let peer = endpoint.peer_text();
    let message = format_args!(
        "connection of {peer} was stuck with something to do and has been nudged; this is a \
         bug in valkey-rdma, please report it: {state}"
    );
    LINES.open().log(now, log::Level::Warn, message);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_count_only_while_nothing_moves_and_something_is_due() {
        let mut watch = Watch::new(0);
        let (still, moved) = (0, 1);
        assert_eq!(watch.tick(still, true, 1000), 1);
        assert_eq!(watch.tick(still, true, 2000), 2);
        assert_eq!(watch.tick(still, false, 3000), 0, "nothing to do any more");
        assert_eq!(watch.tick(still, true, 4000), 1);
        assert_eq!(watch.since, 0);
        assert_eq!(watch.tick(moved, true, 5000), 0);
        assert_eq!(watch.since, 5000);
        assert_eq!(watch.tick(moved, true, 6000), 1);
    }
}
