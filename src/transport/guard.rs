// SPDX-License-Identifier: BSD-3-Clause
//! A panic must not cross into C, and ends no more than the connection that it
//! happened on.

use super::Transport;
use super::endpoint::{Endpoint, Fate, Reason};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

#[cfg(panic = "abort")]
compile_error!("a panic has to end one connection, not the server: build with panic = \"unwind\"");

/// Has panics say in the server's log where they happened. The standard library's own
/// way may print a stack, for which it frees what libc has allocated: that ends a
/// server which brings another allocator along.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{}", panic.to_string().replace('\n', " "));
    }));
}

/// Runs `work`; a panic in it is logged and answered by `otherwise`.
pub fn guard<T>(what: &str, otherwise: T, work: impl FnOnce() -> T) -> T {
    let work = || {
        #[cfg(feature = "test-panics")]
        super::panics::if_asked_for(what);
        work()
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        log::error!("panic in {what}: this is a bug in valkey-rdma, please report it");
        otherwise
    })
}

/// As [`guard`], for the main thread's work on one endpoint among others.
pub fn guard_endpoint(what: &str, endpoint: &Arc<Endpoint>, work: impl FnOnce()) {
    let finished = guard(what, false, || {
        work();
        true
    });
    if !finished {
        give_up(endpoint);
    }
}

/// Ends the connection of an endpoint that our own side failed. Main thread.
pub fn give_up(endpoint: &Arc<Endpoint>) {
    endpoint.worsen(Fate::Broken);
    guard("ending a connection", (), || {
        Transport::get().poller.lose(endpoint, Fate::Broken, Reason::Error);
    });
}
