// SPDX-License-Identifier: BSD-3-Clause
//! A panic must not cross into C, and ends no more than the connection that it
//! happened on.

use super::endpoint::{Endpoint, Fate, Reason};
use super::valve::Valve;
use super::{Transport, clock};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(panic = "abort")]
compile_error!("a panic has to end one connection, not the server: build with panic = \"unwind\"");

/// Lines about panics in a minute, two for each: what panics may do so each time.
const LINES_PER_MINUTE: u32 = 100;

static LINES: Mutex<Valve> = Mutex::new(Valve::new(LINES_PER_MINUTE));

/// Any thread.
fn say(message: fmt::Arguments<'_>) {
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.say(clock::now(), log::Level::Error, message);
}

/// Has panics say in the server's log where they happened. The standard library's own
/// way may print a stack, for which it frees what libc has allocated: that ends a
/// server which brings another allocator along.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        say(format_args!("{}", panic.to_string().replace('\n', " ")));
    }));
}

/// Runs `work`, known as `what` in the log. A panic in it is logged and answered by `None`.
/// Any thread.
pub fn guard<T>(what: &str, work: impl FnOnce() -> T) -> Option<T> {
    let work = || {
        #[cfg(feature = "test-panics")]
        super::panics::if_asked_for(what);
        work()
    };
    let result = catch_unwind(AssertUnwindSafe(work));
    if result.is_err() {
        say(format_args!("panic in {what}: this is a bug in valkey-rdma, please report it"));
    }
    result.ok()
}

/// As [`guard`], for the main thread's work on one endpoint among others.
pub fn guard_endpoint(what: &str, endpoint: &Arc<Endpoint>, work: impl FnOnce()) {
    if guard(what, work).is_none() {
        give_up(endpoint);
    }
}

/// Ends the connection of an endpoint that our own side failed. Main thread.
pub fn give_up(endpoint: &Arc<Endpoint>) {
    endpoint.worsen(Fate::Broken);
    guard("ending a connection", || {
        Transport::get().poller.lose(endpoint, Fate::Broken, Reason::Error);
    });
}
