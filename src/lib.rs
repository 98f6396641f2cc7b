// SPDX-License-Identifier: BSD-3-Clause
//! Valkey over RDMA as a module for stock valkey-server binaries.
