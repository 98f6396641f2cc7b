// SPDX-License-Identifier: BSD-3-Clause
//! Valkey over RDMA as a module for stock valkey-server binaries.
//!
//! The protocol itself is the crate [`proto`], and [`verbs`] owns the RDMA objects.
//! Dependencies in this direction only:
//!
//! * [`time`], [`log_limit`], [`mod@panic`]: the clock, a limit on log lines, no panic into C.
//! * [`host`]: the server's ABI.
//! * [`config`], [`metrics`]: what is set and what is counted.
//! * [`child`]: what forked children must not do.
//! * [`device`]: the completion queues that the connections of one device share.
//! * [`endpoint`]: one RDMA connection.
//! * [`poller`]: completions in, handlers called, timers.
//! * [`conntype`]: the connection type that the server calls.
//! * [`commands`], [`mod@doctor`]: what an operator may ask.
//! * [`namesake`]: another module of our name.
//! * [`module`]: loading and `INFO`; [`not_loaded`]: why it is not loaded.

#![deny(missing_docs, unreachable_pub)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")))]
compile_error!(
    "valkey-rdma is for x86-64 Linux with glibc: the layouts of the server's structures are \
     known for that target only (see docs/abi.md)"
);

pub mod child;
pub mod commands;
pub mod config;
pub mod conntype;
pub mod device;
pub mod doctor;
pub mod endpoint;
pub mod host;
pub mod log_limit;
pub mod metrics;
pub mod module;
pub mod namesake;
pub mod not_loaded;
pub mod panic;
pub mod poller;
pub mod replication;
#[cfg(feature = "test-panics")]
mod test_panics;
pub mod time;
