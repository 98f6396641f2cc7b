// SPDX-License-Identifier: BSD-3-Clause
//! What the time asks for.
//!
//! Two clocks, each running only while it has something to look at: a slow one for
//! all endpoints (keepalive, idle memory), a fast one for those in handshake or
//! lingering. Both are timers of the module API; a pending one also makes the
//! server refuse to unload us. No timer comes while the server runs its event loop from
//! within a script, or while it loads its data. There the fast clock is asked before each
//! sleep.

use crate::endpoint::key::Key;
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::host::api;
use crate::panic::guard;
use crate::poller::Poller;
use crate::time;
use proto::session::{Millis, TimeoutAction};
use redis_module::raw::RedisModuleCtx;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

const SLOW: Duration = Duration::from_secs(1);
const FAST: Duration = Duration::from_millis(50);
/// A fast clock that has not ticked for so long has no timer at the moment, in milliseconds.
const LATE: Millis = 100;

/// State of the two clocks.
#[derive(Debug, Default)]
pub(super) struct Clocks {
    slow_runs: bool,
    fast_runs: bool,
    /// When the fast one ticked last.
    ticked: Millis,
    /// Endpoints in handshake or lingering.
    attended: Vec<Key>,
}

impl Poller {
    /// Watches an endpoint that is in handshake or lingers, from now on.
    pub fn attend(&self, endpoint: &Arc<Endpoint>) {
        let now = time::now();
        self.step(endpoint, now, false);
        let mut clocks = self.clocks().open();
        clocks.attended.push(endpoint.key());
        if !std::mem::replace(&mut clocks.fast_runs, true) {
            clocks.ticked = now;
            api::after(FAST, on_fast);
        }
        if !std::mem::replace(&mut clocks.slow_runs, true) {
            api::after(SLOW, on_slow);
        }
    }

    /// The endpoint that has lingered longest.
    pub(super) fn oldest_lingering(&self) -> Option<Arc<Endpoint>> {
        let clocks = self.clocks().open();
        clocks.attended.iter().filter_map(|key| self.find(*key)).find(|endpoint| {
            let own = endpoint.own();
            own.session.is_lingering() && !own.doomed
        })
    }

    /// Does what an endpoint's session asks for now. `caught_up` says that whatever waited at
    /// that time was looked at: nobody is given up for what may be the server's own delay.
    pub(super) fn step(&self, endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
        match endpoint.handle_timeout(caught_up, now) {
            Ok(action) => self.act(endpoint, action),
            Err(error) => self.close_on_error(endpoint, Err(error)),
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

    /// Ticks the fast clock where its timer does not. To be called before the server sleeps.
    pub(super) fn tick_if_late(&self) {
        let clocks = self.clocks().open();
        let late = clocks.fast_runs && time::now() >= clocks.ticked + LATE;
        drop(clocks);
        if late {
            self.tick();
        }
    }

    /// Looks at those who are in handshake or linger.
    fn tick(&self) {
        guard("fast clock", || {
            let now = time::now();
            self.clocks().open().ticked = now;
            let keys = self.clocks().open().attended.clone();
            let attended: Vec<_> = keys.into_iter().filter_map(|key| self.find(key)).collect();
            let overdue = |endpoint: &Arc<Endpoint>| endpoint.own().session.is_overdue(now);
            // What completes a handshake may wait since before its time was over.
            let caught_up = attended.iter().any(overdue) && self.catch_up();
            for endpoint in attended.iter().filter(|it| it.own().session.is_transient()) {
                self.guard("one endpoint's fast clock", endpoint, || {
                    self.step(endpoint, now, caught_up);
                });
            }
        });
    }

    /// What an endpoint needs once a second.
    fn look_after(&self, endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
        self.step(endpoint, now, caught_up);
        self.close_on_error(endpoint, endpoint.on_housekeeping_tick(now));
        // What a full send queue refused, and no completion will bring back.
        if endpoint.stream().outbound().take_refused() {
            self.mark_if_ready(endpoint);
        }
        self.watch_over(endpoint, SLOW, now);
    }
}

/// Has a timer come again, from within it, whatever became of what it was for.
pub fn again(delay: Duration, on_timer: api::OnTimer) {
    guard("a timer", || api::after(delay, on_timer));
}

unsafe extern "C" fn on_fast(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = Poller::get();
    let is_transient =
        |key: &Key| poller.find(*key).is_some_and(|it| it.own().session.is_transient());
    poller.tick();
    // Whatever became of that, the clock goes on.
    let runs = guard("the fast clock's next tick", || {
        let mut attended = poller.clocks().open().attended.clone();
        attended.retain(is_transient);
        let mut clocks = poller.clocks().open();
        clocks.fast_runs = !attended.is_empty();
        clocks.attended = attended;
        clocks.fast_runs
    });
    if runs.unwrap_or(true) {
        again(FAST, on_fast);
    }
}

unsafe extern "C" fn on_slow(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = Poller::get();
    guard("slow clock", || {
        let now = time::now();
        poller.upcalls().housekeeping(now);
        // A notification that the device lost costs a second, and not all its connections.
        let caught_up = poller.catch_up();
        let endpoints = poller.endpoints();
        for endpoint in &endpoints {
            poller.guard("one endpoint's slow clock", endpoint, || {
                poller.look_after(endpoint, now, caught_up);
            });
        }
    });
    // Whatever became of that, the clock goes on.
    let runs = guard("the slow clock's next tick", || {
        poller.shrink_hubs();
        let runs = poller.needs_clock() || poller.upcalls().needs_housekeeping();
        // Without endpoints this clock stops: what it would let go of later goes now.
        poller.shrink_wakeup_fds(!runs);
        poller.clocks().open().slow_runs = runs;
        runs
    });
    if runs.unwrap_or(true) {
        again(SLOW, on_slow);
    }
}
