// SPDX-License-Identifier: BSD-3-Clause
//! Valkey over RDMA as a module for stock valkey-server binaries.
//!
//! The protocol itself is the crate [`proto`], and [`verbs`] owns the RDMA objects.
//! Dependencies in this direction only:
//!
//! * [`host`]: the server's ABI.
//! * [`config`], [`metrics`]: what is set and what is counted.
//! * [`transport`]: all of it together, and the table that the server calls.
//! * [`commands`]: what an operator may ask.
//! * [`namesake`]: another module of our name.
//! * [`module`]: loading and `INFO`.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")))]
compile_error!(
    "valkey-rdma is for x86-64 Linux with glibc: the layouts of the server's structures are \
     known for that target only (see docs/abi.md)"
);

pub mod commands;
pub mod config;
pub mod host;
pub mod log_limit;
pub mod metrics;
pub mod module;
pub mod namesake;
pub mod panic;
#[cfg(feature = "test-panics")]
mod test_panics;
pub mod time;
pub mod transport;
