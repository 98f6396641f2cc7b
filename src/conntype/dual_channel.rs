// SPDX-License-Identifier: BSD-3-Clause
//! Replicas that want their data by a second channel, and can't have one.
//!
//! Where both sides have `dual-channel-replication-enabled`, a primary answers a replica that
//! has to be loaded "+DUALCHANNELSYNC"; the replica opens a second connection, and a child of
//! the server writes the data to it. Over RDMA no child can. The replica, which came by way of
//! our port through some bridge, would begin again each second, with a fork of the server each
//! time.
//!
//! So the server must not believe a replica over RDMA that says that it could: then it is
//! loaded by the one connection that it has, as replicas always were. There is no other way to
//! bring that about than a filter of commands, and all commands pay for a filter. It is there
//! only from the moment at which the server gives that answer over RDMA until nothing of such a
//! replica was seen for a while. The second channel of the first attempt is refused, in words
//! that the replica logs; the next attempt, a second later, goes by one channel.
//!
//! A replica that has this module and comes to us by it (`replication`) opens its second channel
//! over TCP, where a child can write. It is left alone.

use crate::endpoint::{Endpoint, Role};
use crate::host::filter::{Command, Filter};
use crate::host::main_cell::is_main_thread;
use crate::host::{MainCell, api};
use crate::log_limit::LogLimiter;
use crate::panic::guard;
use crate::poller::Poller;
use crate::time;
use log::Level;
use proto::session::Millis;
use redis_module::raw::RedisModuleCommandFilterCtx;

/// The server's answer to a replica, a write of its own in all lines.
const OFFER: &[u8] = b"+DUALCHANNELSYNC\r\n";

/// How long the filter stays when nothing of such a replica was seen. A replica that failed is
/// back after a second.
const STAYS: Millis = 10_000;

/// What a replica over RDMA can do, in place of `dual-channel`: a word that no server knows,
/// which it ignores.
const ONE_CHANNEL: &str = "one-channel-over-rdma";
/// What its second connection wants to be, in place of `rdb-channel`: the server refuses it,
/// and the replica logs the refusal.
const NO_CHANNEL: &str = "rdb-channel-over-rdma";

/// The filter, and when something of such a replica was seen last.
static FILTER: MainCell<Option<(Filter, Millis)>> = MainCell::new(None);

/// Looks at what the server writes to a connection: whether it offers a replica the second
/// channel. Any thread.
pub(super) fn look_at(endpoint: &Endpoint, written: &[u8]) {
    // A client may have a script answer the same: then the filter comes in vain.
    if written == OFFER && is_main_thread() && !api::is_exiting() && !is_link(endpoint) {
        let mut filter = FILTER.borrow_mut();
        let now = time::now();
        match &mut *filter {
            Some((_, seen)) => *seen = now,
            None => *filter = Some((Filter::new(before_command), now)),
        }
    }
}

/// Whether the peer is a server with this module, whose second channel goes over TCP.
fn is_link(endpoint: &Endpoint) -> bool {
    endpoint.main_state().role == Role::Replica
}

/// Whether the filter is there.
pub(super) fn is_filtering() -> bool {
    FILTER.borrow_mut().is_some()
}

/// Takes the filter away if it is not needed any more. Housekeeping timer.
pub(super) fn rest(now: Millis) {
    let mut filter = FILTER.borrow_mut();
    if filter.as_ref().is_some_and(|(_, seen)| now >= seen + STAYS) {
        *filter = None;
    }
}

unsafe extern "C" fn before_command(shown: *mut RedisModuleCommandFilterCtx) {
    // SAFETY: the server's, for the time of this call.
    let mut command = unsafe { Command::new(shown) };
    if command.argument(0).eq_ignore_ascii_case(b"replconf") {
        guard("the filter of commands", || correct(&mut command));
    }
}

/// Takes the second channel out of what a replica over RDMA says of itself.
fn correct(command: &mut Command) {
    let is = |at, word: &[u8]| command.argument(at).eq_ignore_ascii_case(word);
    let found: Vec<_> = (1..command.count())
        .step_by(2)
        .filter_map(|at| match () {
            () if is(at, b"capa") && is(at + 1, b"dual-channel") => Some((at + 1, ONE_CHANNEL)),
            () if is(at, b"rdb-channel") && is(at + 1, b"1") => Some((at, NO_CHANNEL)),
            () => None,
        })
        .collect();
    if found.is_empty() {
        return;
    }
    let endpoint = Poller::get().find_client(command.client());
    let Some(endpoint) = endpoint.filter(|endpoint| !is_link(endpoint)) else { return };
    for (at, with) in found {
        command.replace(at, with);
    }
    static LINES: MainCell<LogLimiter> = MainCell::new(LogLimiter::new(1));
    let peer = endpoint.peer().map_or_else(|| String::from("?"), |peer| peer.to_string());
    let now = time::now();
    LINES.borrow_mut().log(
        now,
        Level::Info,
        format_args!(
            "a replica that comes by way of RDMA wants a second channel for its data \
             (dual-channel-replication-enabled), which needs TCP: {peer} is loaded by one"
        ),
    );
    if let Some((_, seen)) = &mut *FILTER.borrow_mut() {
        *seen = now;
    }
}
