// SPDX-License-Identifier: BSD-3-Clause
//! Safe owners of RDMA objects: the only place that calls librdmacm and libibverbs.
//!
//! Every owner frees its object when it is dropped and borrows nothing: objects
//! that need each other (a queue pair its protection domain) are kept in the
//! right order by whoever holds them, and a wrong order makes the kernel refuse
//! the destruction (`EBUSY`) rather than use freed memory.
//!
//! * [`library`]: opens the two libraries, forwards their functions.
//! * [`cm`]: connection manager, event channels and ids.
//! * [`fork`]: what a forked child must not keep.
//! * [`memory`]: protection domains and registered memory.
//! * [`completion`]: completion channels and queues.
//! * [`pair`]: queue pairs and the work requests of this protocol.

pub mod cm;
pub mod completion;
mod error;
pub mod fork;
pub mod library;
pub mod memory;
pub mod pair;

pub use error::{Error, locked_memory_limit};
