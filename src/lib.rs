// SPDX-License-Identifier: BSD-3-Clause
//! Valkey over RDMA as a module for stock valkey-server binaries.
pub mod host;
pub mod verbs;
pub mod window;
pub mod wire;
