// SPDX-License-Identifier: BSD-3-Clause
//! A panic must not cross into C.

use std::panic::{AssertUnwindSafe, catch_unwind};

#[cfg(panic = "abort")]
compile_error!("a panic has to end one connection, not the server: build with panic = \"unwind\"");

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
