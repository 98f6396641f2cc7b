// SPDX-License-Identifier: BSD-3-Clause
//! The server that we are loaded into: its ABI, its event loop, its log.
//!
//! The only place that knows `struct connection`, `ConnectionType` and their
//! kin. Nothing here touches `struct valkeyServer` or `struct client`: their
//! offsets differ in every build, while what is declared here is the same in
//! every build of one release (`docs/abi.md` says how that was found).
//!
//! * [`mod@line`]: the supported releases, as data.
//! * [`connection`]: `struct connection`, with its shared fields as atomics.
//! * [`layout`]: the shapes of `ConnectionType` and `connListener`.
//! * [`symbols`]: the functions that the executable exports.
//! * [`fingerprint`]: whether the running server's tables have the shape of its line.
//! * [`probe`]: whether it does what its line does.
//! * [`tcp_slots`]: the two slots of the TCP type that may be replaced.
//! * [`difference`]: how it differs from its line.
//! * [`api`]: the public module API: event loop, timers, log.
//! * [`filter`]: a look at each command, while somebody needs it.
//! * [`reply`]: replies of commands, as values.

pub mod api;
pub mod connection;
pub mod difference;
pub mod filter;
pub mod fingerprint;
pub mod layout;
pub mod line;
pub mod main_cell;
pub mod probe;
pub mod reply;
pub mod symbols;
pub mod tcp_slots;

pub use connection::Connection;
pub use line::Line;
pub use main_cell::MainCell;
