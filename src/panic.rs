// SPDX-License-Identifier: BSD-3-Clause
//! A panic must not cross into C.

use crate::log_limit::LogLimiter;
use crate::time;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

#[cfg(panic = "abort")]
compile_error!("a panic has to end one connection, not the server: build with panic = \"unwind\"");

/// Lines about panics in a minute, two for each: what panics may do so each time.
const LINES_PER_MINUTE: u32 = 200;

static LINES: Mutex<LogLimiter> = Mutex::new(LogLimiter::new(LINES_PER_MINUTE));

/// Any thread.
fn log(message: fmt::Arguments<'_>) {
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.log(time::now(), log::Level::Error, message);
}

/// Has panics log where they happened. The standard library's own hook may print a stack, for
/// which it frees what libc has allocated: that ends a server which brings another allocator
/// along.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        log(format_args!("{}", panic.to_string().replace('\n', " ")));
    }));
}

/// Runs `work`, known as `what` in the log. A panic in it is logged and answered by `None`.
/// Any thread.
pub fn guard<T>(what: &str, work: impl FnOnce() -> T) -> Option<T> {
    let work = || {
        #[cfg(feature = "test-panics")]
        crate::test_panics::if_asked_for(what);
        work()
    };
    let result = catch_unwind(AssertUnwindSafe(work));
    if result.is_err() {
        log(format_args!("panic in {what}: this is a bug in valkey-rdma, please report it"));
    }
    result.ok()
}
