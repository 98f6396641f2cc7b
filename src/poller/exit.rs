// SPDX-License-Identifier: BSD-3-Clause
//! The end of the process.
//!
//! A kernel still sends what a process has written to a socket when it exits. A device forgets
//! the work requests of a process that is gone. The server's last act is to write to its
//! replicas what they do not have yet, after it has told its modules that it exits: so what is
//! on its way then is waited for by a function that runs at the exit itself.

use super::Poller;
use crate::child;
use crate::endpoint::{Endpoint, PeerState, Reason, Role, Stage};
use crate::host::api;
use crate::host::main_cell::is_main_thread;
use crate::panic::guard;
use crate::time;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the exit of a server is put off at most.
const PATIENCE: Duration = Duration::from_secs(1);

/// From now on an exit of the server waits until what it has written has arrived. Once, while
/// the module loads. The module's code must stay mapped until the exit.
pub fn delay_exit() {
    extern "C" fn at_exit() {
        // Only the exit of a server that has said so: another one may be due to a fault, and a
        // child has no connections.
        if api::is_exiting() && is_main_thread() && !child::in_child() {
            guard("the exit", || Poller::get().deliver());
        }
    }
    // SAFETY: the function stays mapped, by the caller's promise. Without memory for it nothing
    // is waited for.
    unsafe { libc::atexit(at_exit) };
}

impl Poller {
    /// Waits until what was written to each peer has arrived, and a moment longer where that was
    /// just now: as if the server had closed each connection. For at most [`PATIENCE`].
    fn deliver(&self) {
        let _pass = self.pass();
        let mut owed = self.endpoints();
        owed.retain(|endpoint| endpoint.main_state().stage == Stage::Established);
        self.wait_here(Instant::now() + PATIENCE, || {
            owed.retain(|endpoint| self.owes(endpoint));
            owed.is_empty().then_some(())
        });
    }

    /// Whether something may still arrive at the peer of an endpoint. To a replica the server
    /// goes on to write what it began: a socket would have taken more of it.
    fn owes(&self, endpoint: &Arc<Endpoint>) -> bool {
        let left = endpoint.main_state().reason == Some(Reason::Client);
        if left || endpoint.stream().peer_state() != PeerState::Connected {
            return false;
        }
        if endpoint.main_state().role == Role::Replica {
            self.call_write(endpoint);
            if endpoint.awaits_write() {
                return true;
            }
        }
        let now = time::now();
        if endpoint.main_state().stage == Stage::Established {
            endpoint.begin_lingering(now);
        }
        self.step(endpoint, now, false);
        endpoint.main_state().stage == Stage::Lingering
    }
}
