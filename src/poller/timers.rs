// SPDX-License-Identifier: BSD-3-Clause
//! What the time asks for.
//!
//! Two timers of the module API, each running only while it has something to look at. The
//! *housekeeping timer* looks at all endpoints once a second (keepalive, idle memory, the
//! watchdog), the *handshake timer* 20 times a second at those in handshake or lingering. A
//! pending timer also makes the server refuse to unload us. The server runs no timer while it
//! runs its event loop from within a script, or loads its data: there the handshake timer is
//! made up for before each sleep.

use crate::endpoint::wr_id::EndpointId;
use crate::endpoint::{Endpoint, PeerState, Reason, Stage};
use crate::host::api;
use crate::panic::guard;
use crate::poller::Poller;
use crate::time;
use proto::session::{Millis, TimeoutAction};
use redis_module::raw::RedisModuleCtx;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(1);
const HANDSHAKE_INTERVAL: Duration = Duration::from_millis(50);
/// After this many milliseconds without a tick the server runs no timers at the moment.
const LATE: Millis = 100;

/// State of the two timers.
#[derive(Debug, Default)]
pub(super) struct Timers {
    housekeeping_runs: bool,
    handshakes_run: bool,
    /// When the handshake timer ticked last.
    ticked: Millis,
    /// Endpoints in handshake or lingering.
    transients: Vec<EndpointId>,
    /// Those that linger, in the order in which the server closed them, and some that are over.
    lingering: VecDeque<EndpointId>,
}

impl Poller {
    /// Watches an endpoint that is in handshake or lingers, from now on.
    pub fn track_transient(&self, endpoint: &Arc<Endpoint>) {
        let now = time::now();
        self.step(endpoint, now, false);
        let mut timers = self.timers().borrow_mut();
        timers.transients.push(endpoint.key());
        if !std::mem::replace(&mut timers.handshakes_run, true) {
            timers.ticked = now;
            api::after(HANDSHAKE_INTERVAL, on_handshakes);
        }
        if !std::mem::replace(&mut timers.housekeeping_runs, true) {
            api::after(HOUSEKEEPING_INTERVAL, on_housekeeping);
        }
    }

    /// Watches an endpoint that lingers, from now on.
    pub(super) fn track_lingering(&self, endpoint: &Arc<Endpoint>) {
        self.track_transient(endpoint);
        self.timers().borrow_mut().lingering.push_back(endpoint.key());
    }

    /// The endpoint that has lingered longest, which is to be ended.
    pub(super) fn take_oldest_lingering(&self) -> Option<Arc<Endpoint>> {
        let lingering = &mut self.timers().borrow_mut().lingering;
        std::iter::from_fn(|| lingering.pop_front())
            .filter_map(|key| self.find(key))
            .find(|endpoint| endpoint.main_state().stage == Stage::Lingering)
    }

    /// Does what an endpoint's session asks for now. `caught_up` says that whatever waited at
    /// that time was looked at: nobody is given up for what may be the server's own delay.
    pub(super) fn step(&self, endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
        match endpoint.handle_timeout(caught_up, now) {
            Ok(action) => self.act(endpoint, action),
            Err(error) => self.lose_on_error(endpoint, Err(error)),
        }
    }

    /// Does what is left to do of what the time asks for.
    pub(super) fn act(&self, endpoint: &Arc<Endpoint>, action: TimeoutAction) {
        match action {
            TimeoutAction::Wait => {}
            TimeoutAction::End => self.doom(endpoint),
            TimeoutAction::HandshakeTimedOut => {
                self.time_out(endpoint, "handshake not completed within handshake-timeout");
            }
            TimeoutAction::NoReply => {
                self.time_out(endpoint, "no reply to a keepalive probe (keepalive-probes)");
            }
        }
    }

    fn time_out(&self, endpoint: &Arc<Endpoint>, why: &str) {
        // Once: its removal may be a pass away.
        if endpoint.stream().peer_state() == PeerState::Connected {
            self.say_lost(endpoint, why);
        }
        self.lose(endpoint, PeerState::Disconnected, Reason::Timeout);
    }

    /// Does what the handshake timer does where the server runs no timers. To be called before
    /// the server sleeps.
    pub(super) fn tick_if_late(&self) {
        let timers = self.timers().borrow_mut();
        let late = timers.handshakes_run && time::now() >= timers.ticked + LATE;
        drop(timers);
        if late {
            self.tick();
        }
    }

    /// Looks at those who are in handshake or linger.
    fn tick(&self) {
        guard("handshake timer", || {
            let now = time::now();
            self.timers().borrow_mut().ticked = now;
            let keys = self.timers().borrow_mut().transients.clone();
            let transients: Vec<_> = keys.into_iter().filter_map(|key| self.find(key)).collect();
            let overdue = |endpoint: &Arc<Endpoint>| endpoint.main_state().session.is_overdue(now);
            // What completes a handshake may wait since before its time was over.
            let caught_up = transients.iter().any(overdue) && self.catch_up();
            for endpoint in transients.iter().filter(|it| it.main_state().session.is_transient()) {
                self.guard("one endpoint's handshake timer", endpoint, || {
                    self.step(endpoint, now, caught_up);
                });
            }
        });
    }

    /// What an endpoint needs once a second.
    fn on_housekeeping_tick(&self, endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
        self.step(endpoint, now, caught_up);
        self.lose_on_error(endpoint, endpoint.on_housekeeping_tick(now));
        // What a full send queue did not take, and no completion will bring back.
        if endpoint.stream().outbound().take_no_room() {
            self.mark_if_ready(endpoint);
        }
        self.watch_over(endpoint, HOUSEKEEPING_INTERVAL, now);
    }
}

/// Has a timer come again, from within it, whatever became of what it was for.
pub fn again(delay: Duration, on_timer: api::OnTimer) {
    guard("a timer", || api::after(delay, on_timer));
}

unsafe extern "C" fn on_handshakes(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = Poller::get();
    let is_transient = |key: &EndpointId| {
        poller.find(*key).is_some_and(|it| it.main_state().session.is_transient())
    };
    poller.tick();
    // Whatever became of that, the clock goes on.
    let runs = guard("the handshake timer's next tick", || {
        let mut transients = poller.timers().borrow_mut().transients.clone();
        transients.retain(is_transient);
        let mut timers = poller.timers().borrow_mut();
        timers.handshakes_run = !transients.is_empty();
        timers.transients = transients;
        timers.lingering.retain(is_transient);
        timers.handshakes_run
    });
    if runs.unwrap_or(true) {
        again(HANDSHAKE_INTERVAL, on_handshakes);
    }
}

unsafe extern "C" fn on_housekeeping(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = Poller::get();
    guard("housekeeping timer", || {
        let now = time::now();
        poller.upcalls().housekeeping(now);
        // A notification that the device lost costs a second, and not all its connections.
        let caught_up = poller.catch_up();
        let endpoints = poller.endpoints();
        for endpoint in &endpoints {
            poller.guard("one endpoint's housekeeping timer", endpoint, || {
                poller.on_housekeeping_tick(endpoint, now, caught_up);
            });
        }
    });
    // Whatever became of that, the clock goes on.
    let runs = guard("the housekeeping timer's next tick", || {
        poller.shrink_queues();
        let runs = poller.needs_clock() || poller.upcalls().needs_housekeeping();
        // Without endpoints this clock stops: what it would let go of later goes now.
        poller.shrink_wakeup_fds(!runs);
        poller.timers().borrow_mut().housekeeping_runs = runs;
        runs
    });
    if runs.unwrap_or(true) {
        again(HOUSEKEEPING_INTERVAL, on_housekeeping);
    }
}
