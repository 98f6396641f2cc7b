// SPDX-License-Identifier: BSD-3-Clause
//! The protocol *Valkey over RDMA* without I/O: no device, no socket, no clock, no server.
//! Nothing but the standard library.
//!
//! Completions, announcements and the time go in; what to post and when to end comes out.
//! The caller owns the memory and the queue pair. From the bottom up:
//!
//! * [`wire`]: the control messages.
//! * [`window`]: the lock-free hand-overs between poller, reader and writer. The only part
//!   with `unsafe` code.
//! * [`staging`]: which staging memory there is.
//! * [`send_queue`]: the send loop.
//! * [`stream`]: the bytes of one connection, both ways.
//! * [`session`]: the poller's half of one connection: each completion and the time go in,
//!   what has to be posted goes out.
//! * [`buffer_size`], [`busy_poll`]: policies, each a pure function of what was measured.
//!
//! `docs/protocol.md` of the repository describes the wire, `docs/architecture.md` how the
//! module drives these types. Models (`--cfg loom`), the simulation in `tests/` and the fuzz
//! targets drive the same ones.

#![deny(missing_docs, unreachable_pub)]

pub mod buffer_size;
pub mod busy_poll;
mod lifecycle;
#[cfg(all(test, loom))]
mod model;
mod port;
mod receive_buffers;
pub mod send_queue;
pub mod session;
pub mod staging;
pub mod stream;
pub mod window;
pub mod wire;
