// SPDX-License-Identifier: BSD-3-Clause
//! The connection type: what the server calls, and what it is told.
//!
//! * [`table`]: the functions of `ConnectionType`, the door to C.
//! * [`listener`]: listening; [`listen_error`]: why not; `relisten`: again, where the device
//!   was removed.
//! * [`rebind`]: the settings that change what is listened on in 8.0.
//! * [`accept`]: connections that clients open.
//! * [`outgoing`]: connections that this server opens, and the calls that block.
//! * [`dual_channel`]: replicas that want a second channel.
//! * [`address`]: addresses as the operator writes them.
//! * `upcalls`: what the poller has done here.

pub mod accept;
pub mod address;
pub mod dual_channel;
pub mod listen_error;
pub mod listener;
pub mod outgoing;
pub mod rebind;
mod relisten;
pub mod table;
mod upcalls;

use crate::config::Settings;
use crate::conntype::listener::Listening;
use crate::conntype::upcalls::ConnectionType;
use crate::host::symbols::Symbols;
use crate::host::{Line, MainCell};
use crate::poller::Poller;
use std::sync::Arc;
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
    crate::child::start();
    let settings = Arc::new(MainCell::new(settings));
    let poller = Poller::start(Arc::clone(&settings), &ConnectionType)?;
    Ok((poller, Listening::start(line, symbols, settings, poller)))
}
