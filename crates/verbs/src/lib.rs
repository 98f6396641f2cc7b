// SPDX-License-Identifier: BSD-3-Clause
//! Owners of RDMA objects over libibverbs and librdmacm.
//!
//! [`library::load`] comes first: it opens the two libraries, which a program is not linked
//! against. Then, as a connection needs them:
//!
//! * [`cm`]: the connection manager, with event channels and ids.
//! * [`device`]: the devices that there are, and their limits; [`events`], what they tell.
//! * [`mr`]: protection domains and registered memory; [`account`], the sum of it.
//! * [`cq`]: completion channels and queues.
//! * [`qp`]: queue pairs and their work requests.
//! * [`fork`]: what a process that forks has to mind.
//!
//! Nothing here waits. Descriptors of channels are non-blocking and polled by the caller.
//!
//! Every owner frees its object when it is dropped, and keeps what it was made on until then:
//! a queue pair its id, domain and completion queue, a region its domain, and all of them the
//! device. So they may be dropped in any order and on any thread.

#![deny(missing_docs, unreachable_pub)]

pub mod account;
pub mod address;
pub mod cm;
pub mod cq;
mod descriptor;
pub mod device;
mod error;
pub mod events;
pub mod fork;
pub mod library;
pub mod mr;
pub mod qp;

pub use error::{Error, FIND};
