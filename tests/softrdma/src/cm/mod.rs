// SPDX-License-Identifier: BSD-3-Clause
//! The connection manager: identifiers, event channels, and the handshake over
//! a Unix socket that lays the wire between two queue pairs.

mod address;
mod channel;
mod connection;
mod devices;
mod endpoint;
mod exports;
mod id;
mod message;
mod rsockets;

pub use id::{address_changed, device_added, device_removed};
