// SPDX-License-Identifier: BSD-3-Clause
//! The transport: listeners, endpoints, the poller, and the table that the server
//! calls us through.
//!
//! * [`key`]: what a work request's id says.
//! * [`hub`]: what the connections of one device share.
//! * [`endpoint`]: one RDMA connection.
//! * [`connection`]: the server's `connection` of our type.
//! * [`poller`]: completions in, handlers called, the ready queue.
//! * [`listener`]: listening and accepting.
//! * [`accept`]: connections that clients open.
//! * [`relisten`]: listening again where the device was removed.
//! * [`rebind`]: the settings that change what is listened on in 8.0.
//! * `teardown`: the thread that gives back what endpoints consisted of.
//! * [`clock`]: what the time asks for.
//! * [`watchdog`]: connections that are stuck.
//! * [`status`]: what a connection is doing, for those who ask.
//! * [`outgoing`]: connections that this server opens.
//! * [`child`]: what forked children must not do, and what is said of it.
//! * `dual_channel`: replicas that want what only a child could give.
//! * [`address`]: addresses as the operator writes them.
//! * [`table`]: the functions of `ConnectionType`, the door to C.

pub mod accept;
pub mod address;
pub mod child;
pub mod clock;
pub mod connection;
mod dual_channel;
mod echoes;
pub mod endpoint;
pub mod hub;
pub mod key;
pub mod listener;
pub mod outgoing;
pub mod poller;
pub mod rebind;
mod relisten;
pub mod status;
pub mod table;
mod teardown;
mod upcalls;
pub mod watchdog;

use crate::config::Settings;
use crate::host::symbols::Symbols;
use crate::host::{Line, MainCell};
pub use child::in_child;
use listener::Listening;
use poller::Poller;
use std::sync::Arc;
use upcalls::ConnectionType;
use verbs::Error;

/// Sets the transport up; once, while the module loads.
///
/// # Errors
/// If a descriptor can't be had, or the kernel has no RDMA connection manager.
pub fn start(
    line: Line,
    symbols: Symbols,
    settings: Settings,
) -> Result<(&'static Poller, &'static Listening), Error> {
    child::start();
    let settings = Arc::new(MainCell::new(settings));
    let poller = Poller::start(Arc::clone(&settings), &ConnectionType)?;
    Ok((poller, Listening::start(line, symbols, settings, poller)))
}
