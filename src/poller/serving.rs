// SPDX-License-Identifier: BSD-3-Clause
//! The ready queue: endpoints that have something to do, and the calls of their handlers.

use super::Poller;
use crate::endpoint::{Endpoint, PeerState, Stage};
use crate::host::connection::{
    Connection, FLAG_CLOSE_SCHEDULED, FLAG_WRITE_BARRIER, Handler, State,
};
use crate::metrics::METRICS;
use crate::poller::connection::RdmaConnection;
use std::sync::Arc;

impl Poller {
    /// The endpoint may have something to do: serves it in a pass to come, and sees
    /// to it that one comes.
    pub fn mark_ready(&self, endpoint: &Endpoint) {
        {
            let mut own = endpoint.main_state();
            if own.queued {
                return;
            }
            own.queued = true;
            if std::mem::take(&mut own.parked) {
                METRICS.woken.add(1);
            }
        }
        #[cfg(feature = "test-panics")]
        if crate::test_panics::asked_for("mark_ready") {
            // As the worst of faults would have it: queued, it believes, and it is not.
            return;
        }
        self.ready.borrow_mut().push_back(endpoint.key());
        if *self.passes.borrow_mut() == 0 {
            self.wake_loop();
        }
    }

    /// Marks the endpoint ready if one of its handlers has something to do.
    pub fn mark_if_ready(&self, endpoint: &Endpoint) {
        if endpoint.has_work() {
            self.mark_ready(endpoint);
        }
    }

    /// As [`mark_ready`](Self::mark_ready), whatever was noted of the endpoint and of the
    /// event loop before. For the watchdog.
    pub fn nudge(&self, endpoint: &Endpoint) {
        endpoint.main_state().queued = false;
        *self.awake.borrow_mut() = false;
        self.mark_ready(endpoint);
    }

    /// Serves every endpoint that is in the queue now, once.
    pub(super) fn serve_ready(&self) -> usize {
        METRICS.passes.add(1);
        let count = self.ready.borrow_mut().len();
        let mut served = 0;
        for _ in 0..count {
            let Some(key) = self.ready.borrow_mut().pop_front() else { break };
            let Some(endpoint) = self.find(key) else { continue };
            endpoint.main_state().queued = false;
            self.guard("one endpoint", &endpoint, || self.serve(&endpoint));
            served += 1;
        }
        self.remove_doomed();
        served
    }

    fn serve(&self, endpoint: &Arc<Endpoint>) {
        let (connection, open, stage) = {
            let own = endpoint.main_state();
            (own.connection(), own.session.is_open(), own.stage)
        };
        if connection.is_null() {
            if open && stage != Stage::Ending {
                self.upcalls.accepted(self, endpoint);
            }
            return;
        }
        // SAFETY: an endpoint's connection is live until the server closes it, which clears the
        // pointer.
        if unsafe { (*connection).state() } == State::Connecting {
            if open || endpoint.stream().peer_state() != PeerState::Connected {
                self.upcalls.connected(self, endpoint);
            }
            return;
        }
        self.say_post_error(endpoint);
        let before = endpoint.stream().progress();
        // SAFETY: as above.
        let write_first = unsafe { has_write_barrier(connection) };
        let mut steps = [Self::call_read, Self::call_write];
        if write_first {
            steps.reverse();
        }
        for step in steps {
            step(self, endpoint);
            if endpoint.main_state().connection().is_null() {
                return;
            }
        }
        self.lose_on_error(endpoint, endpoint.announce_if_full());
        if endpoint.has_work() {
            if self.waits_for_sync(endpoint) {
                self.mark_ready(endpoint);
                // The next turn begins with it, before more of its commands are carried out.
                self.wake_loop();
            } else if endpoint.stream().progress() != before {
                self.mark_ready(endpoint);
            } else {
                endpoint.main_state().parked = true;
                METRICS.parked.add(1);
            }
        }
    }

    /// The server carries out commands of this connection now, or may. Their replies have to
    /// wait for the sync of the append-only file, if one is due.
    pub fn carries_out(&self, endpoint: &Endpoint) {
        endpoint.main_state().carried_out = Some(*self.turn.borrow_mut());
    }

    /// Whether the write handler has something to do and must not be called before the server
    /// has synced its append-only file: it would take replies along that tell of writes which
    /// are not in it yet.
    fn waits_for_sync(&self, endpoint: &Endpoint) -> bool {
        let connection = endpoint.main_state().connection();
        // SAFETY: an endpoint's connection is live until the server closes it, which clears
        // the pointer.
        !connection.is_null()
            && unsafe { has_write_barrier(connection) && (*connection).write_handler.is_some() }
            && self.may_await_sync(endpoint)
            && endpoint.is_writable()
    }

    /// Whether commands of this connection may have been carried out since the server's last
    /// sync of its append-only file.
    fn may_await_sync(&self, endpoint: &Endpoint) -> bool {
        endpoint.main_state().carried_out == Some(*self.turn.borrow_mut())
    }

    /// The server gives an I/O thread a job of this connection: one that writes takes all
    /// replies along that are there now. 9.1 gives such jobs also between the commands of a
    /// turn and their sync: those may not write, and the server's write handler, which it
    /// installs then, has the barrier.
    pub fn hold_early_writes(&self, endpoint: &Endpoint) {
        let early = *self.syncs_always.borrow_mut() && self.may_await_sync(endpoint);
        endpoint.hold_writes(early);
    }

    fn call_read(&self, endpoint: &Arc<Endpoint>) {
        loop {
            let connection = endpoint.main_state().connection();
            if connection.is_null() || !endpoint.is_readable() {
                return;
            }
            // SAFETY: live, as above; no cell is open during the call.
            unsafe {
                let base = &*connection;
                let handler = match (base.read_handler, endpoint.stream().peer_state()) {
                    (None, PeerState::Connected) => return,
                    // Nobody reads: let the writer find out.
                    (None, _) => {
                        base.set_state(State::Closed);
                        base.write_handler
                    }
                    (handler, _) => handler,
                };
                if handler.is_none() {
                    return;
                }
                self.carries_out(endpoint);
                let stays = call_handler(connection, handler);
                // Once more: a handler may have had the event loop run meanwhile.
                self.carries_out(endpoint);
                if !stays {
                    return;
                }
            }
            // The test feature brings back what this transport exists to avoid.
            if cfg!(not(feature = "test-handler-loop")) {
                return;
            }
        }
    }

    pub(super) fn call_write(&self, endpoint: &Arc<Endpoint>) {
        let connection = endpoint.main_state().connection();
        if connection.is_null() || self.waits_for_sync(endpoint) {
            return;
        }
        // SAFETY: live, as above; no cell is open during the call.
        unsafe {
            let handler = (*connection).write_handler;
            if handler.is_some() && endpoint.is_writable() {
                METRICS.resumptions.add(1);
                call_handler(connection, handler);
            }
        }
    }
}

/// Whether the write handler is to go first.
///
/// # Safety
/// `connection` is live.
unsafe fn has_write_barrier(connection: *mut Connection) -> bool {
    // SAFETY: by the caller's promise.
    unsafe { (*connection).flags & FLAG_WRITE_BARRIER != 0 }
}

/// Calls a handler of the server as the server does it: while it runs, a close is
/// only noted, and carried out afterwards. Returns whether the connection is still
/// there. Main thread, no cell open.
///
/// # Safety
/// `connection` is live and of our type.
pub unsafe fn call_handler(connection: *mut Connection, handler: Option<Handler>) -> bool {
    // SAFETY: `refs` keeps the connection alive while the handler runs; no
    // reference to it is held across the call, since the handler changes it.
    unsafe {
        (*connection).refs += 1;
        if let Some(handler) = handler {
            handler(connection);
        }
        (*connection).refs -= 1;
        if (*connection).flags & FLAG_CLOSE_SCHEDULED != 0 {
            if (*connection).refs == 0 {
                RdmaConnection::free(connection.cast());
            }
            return false;
        }
    }
    true
}
