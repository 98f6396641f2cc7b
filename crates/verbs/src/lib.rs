// SPDX-License-Identifier: BSD-3-Clause
//! Owners of RDMA objects over libibverbs and librdmacm.
//!
//! [`library::load`] comes first: it opens the two libraries, which a program is not linked
//! against. Then, as a connection needs them:
//!
//! * [`cm`]: the connection manager, with event channels and ids.
//! * [`device`]: the devices that there are, and their limits.
//! * [`mr`]: protection domains and registered memory; [`account`], the sum of it.
//! * [`cq`]: completion channels and queues.
//! * [`qp`]: queue pairs and their work requests.
//! * [`fork`]: what a process that forks has to mind.
//!
//! Nothing here waits. Descriptors of channels are non-blocking and polled by the caller.
//!
//! Every owner frees its object when it is dropped and borrows nothing: objects
//! that need each other (a queue pair its protection domain) are kept in the
//! right order by whoever holds them, and a wrong order makes the kernel refuse
//! the destruction (`EBUSY`) rather than use freed memory.

pub mod account;
mod address;
pub mod cm;
pub mod cq;
mod descriptor;
pub mod device;
mod error;
pub mod fork;
pub mod library;
pub mod mr;
pub mod qp;

pub use error::Error;
