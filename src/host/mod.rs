// SPDX-License-Identifier: BSD-3-Clause
//! The server that we are loaded into: its ABI, its event loop, its log.
//!
//! The only place that knows `struct connection`, `ConnectionType` and their
//! kin. Nothing here touches `struct valkeyServer` or `struct client`: their
//! offsets differ in every build, while what is declared here is the same in
//! every build of one minor line (`docs/abi.md` says how that was found).
//!
//! * [`mod@line`]: the supported minor lines.
//! * [`connection`]: `struct connection`, with its shared fields as atomics.
//! * [`layout`]: the three shapes of `ConnectionType`, two of `connListener`.
//! * [`symbols`]: the functions that the executable exports.
//! * [`fingerprint`]: whether the running server has the shape of its line.
//! * [`api`]: the public module API: event loop, timers, log.
//! * [`filter`]: a look at each command, while somebody needs it.
//! * [`reply`]: replies of commands, as values.

pub mod api;
pub mod connection;
pub mod filter;
pub mod fingerprint;
pub mod layout;
pub mod line;
pub mod main_cell;
pub mod reply;
pub mod symbols;

pub use connection::Connection;
pub use line::Line;
pub use main_cell::MainCell;
