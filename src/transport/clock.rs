// SPDX-License-Identifier: BSD-3-Clause
//! What the time asks for.
//!
//! Two clocks, each running only while it has something to look at: a slow one for
//! all endpoints (keepalive, idle memory), a fast one for those in handshake or
//! lingering. Both are timers of the module API; a pending one also makes the
//! server refuse to unload us. No timer comes while the server runs its event loop from
//! within a script, or while it loads its data. There the fast clock is asked before each
//! sleep.

use super::endpoint::{Endpoint, Fate, Reason};
use super::key::Key;
use super::watchdog;
use super::{Transport, child, dual_channel};
use crate::host::{MainCell, api};
use crate::panic::guard;
use crate::time;
use proto::session::{Duty, Millis};
use redis_module::raw::RedisModuleCtx;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

const SLOW: Duration = Duration::from_secs(1);
const FAST: Duration = Duration::from_millis(50);
/// A fast clock that has not ticked for so long has no timer at the moment, in milliseconds.
const LATE: Millis = 100;

#[derive(Debug)]
struct Clocks {
    slow_runs: bool,
    fast_runs: bool,
    /// When the fast one ticked last.
    ticked: Millis,
    /// Endpoints in handshake or lingering.
    attended: Vec<Key>,
}

static CLOCKS: MainCell<Clocks> =
    MainCell::new(Clocks { slow_runs: false, fast_runs: false, ticked: 0, attended: Vec::new() });

/// Watches an endpoint that is in handshake or lingers, from now on.
pub fn attend(endpoint: &Arc<Endpoint>) {
    let now = time::now();
    step(endpoint, now, false);
    let mut clocks = CLOCKS.open();
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
pub fn oldest_lingering() -> Option<Arc<Endpoint>> {
    let poller = &Transport::get().poller;
    let clocks = CLOCKS.open();
    clocks.attended.iter().filter_map(|key| poller.find(*key)).find(|endpoint| {
        let own = endpoint.own();
        own.session.is_lingering() && !own.doomed
    })
}

/// Does what an endpoint's session asks for now. `caught_up` says that whatever waited at that
/// time was looked at: nobody is given up for what may be the server's own delay.
pub fn step(endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
    let delivered = endpoint.is_delivered();
    let duty = endpoint.own().session.duty(now, delivered);
    match duty {
        Duty::Probe => probe(endpoint),
        Duty::End => Transport::get().poller.doom(endpoint),
        Duty::TimedOut if caught_up => {
            time_out(endpoint, "handshake not completed within handshake-timeout")
        }
        Duty::Unanswered if caught_up => {
            time_out(endpoint, "no reply to a keepalive probe (keepalive-probes)")
        }
        Duty::TimedOut | Duty::Unanswered | Duty::Wait => {}
    }
}

/// Posts the probe that the session counts on.
fn probe(endpoint: &Arc<Endpoint>) {
    let sent = match endpoint.post_probe() {
        Err(error) if error.is_about_room() => Ok(false),
        result => result,
    };
    if !matches!(sent, Ok(true)) {
        endpoint.own().session.probe_not_sent();
    }
    Transport::get().poller.attempt(endpoint, sent.map(drop));
}

fn time_out(endpoint: &Arc<Endpoint>, why: &str) {
    let poller = &Transport::get().poller;
    // Once: its removal may be a pass away.
    if endpoint.fate() == Fate::Alive {
        poller.say_lost(endpoint, why);
    }
    poller.lose(endpoint, Fate::Gone, Reason::Timeout);
}

/// Ticks the fast clock where its timer does not. To be asked before the server sleeps.
pub fn tick_if_late() {
    let clocks = CLOCKS.open();
    let late = clocks.fast_runs && time::now() >= clocks.ticked + LATE;
    drop(clocks);
    if late {
        tick();
    }
}

/// Looks at those who are in handshake or linger.
fn tick() {
    let poller = &Transport::get().poller;
    guard("fast clock", || {
        let now = time::now();
        CLOCKS.open().ticked = now;
        let keys = CLOCKS.open().attended.clone();
        let attended: Vec<_> = keys.into_iter().filter_map(|key| poller.find(key)).collect();
        let overdue = |endpoint: &Arc<Endpoint>| endpoint.own().session.is_overdue(now);
        // What completes a handshake may wait since before its time was over.
        let caught_up = attended.iter().any(overdue) && poller.catch_up();
        for endpoint in attended.iter().filter(|it| it.own().session.is_transient()) {
            poller.guard("one endpoint's fast clock", endpoint, || {
                step(endpoint, now, caught_up);
            });
        }
    });
}

unsafe extern "C" fn on_fast(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = &Transport::get().poller;
    let is_transient =
        |key: &Key| poller.find(*key).is_some_and(|it| it.own().session.is_transient());
    tick();
    // Whatever became of that, the clock goes on.
    guard("the fast clock's next tick", || {
        let mut attended = std::mem::take(&mut CLOCKS.open().attended);
        attended.retain(is_transient);
        let mut clocks = CLOCKS.open();
        clocks.fast_runs = !attended.is_empty();
        clocks.attended = attended;
        if clocks.fast_runs {
            api::after(FAST, on_fast);
        }
    });
}

unsafe extern "C" fn on_slow(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let poller = &Transport::get().poller;
    guard("slow clock", || {
        child::tell();
        let now = time::now();
        dual_channel::rest(now);
        // A notification that the device lost costs a second, and not all its connections.
        let caught_up = poller.catch_up();
        let endpoints = poller.endpoints();
        for endpoint in &endpoints {
            poller.guard("one endpoint's slow clock", endpoint, || {
                look_after(endpoint, now, caught_up);
            });
        }
    });
    // Whatever became of that, the clock goes on.
    guard("the slow clock's next tick", || {
        poller.shrink_hubs();
        let runs = poller.needs_clock() || dual_channel::is_filtering();
        // Without endpoints this clock stops: what it would let go of later goes now.
        poller.shrink_echoes(!runs);
        CLOCKS.open().slow_runs = runs;
        if runs {
            api::after(SLOW, on_slow);
        }
    });
}

/// What an endpoint needs once a second.
fn look_after(endpoint: &Arc<Endpoint>, now: Millis, caught_up: bool) {
    let poller = &Transport::get().poller;
    step(endpoint, now, caught_up);
    // What a full send queue refused, and no completion will bring back.
    if endpoint.fate() == Fate::Alive {
        poller.attempt(endpoint, endpoint.post_waiting_receives());
        if endpoint.awaits_control_slot() {
            poller.attempt(endpoint, endpoint.send_answers());
            poller.attempt(endpoint, endpoint.announce_if_full());
        }
    }
    if endpoint.shrink_if_idle() && endpoint.own().session.begin_probe(now) {
        probe(endpoint);
    }
    if endpoint.take_refused() {
        poller.mark_if_ready(endpoint);
    }
    watchdog::look_at(endpoint, SLOW, now);
}
