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
pub mod watchdog;

use crate::config::Settings;
use crate::host::symbols::Symbols;
use crate::host::{Line, MainCell};
pub use child::in_child;
use listener::Listeners;
use poller::Poller;
use std::ffi::c_void;
use std::sync::OnceLock;

/// Everything of the running module.
#[derive(Debug)]
pub struct Transport {
    pub line: Line,
    pub symbols: Symbols,
    pub settings: MainCell<Settings>,
    pub poller: Poller,
    pub listeners: MainCell<Listeners>,
    kind: OnceLock<usize>,
}

static TRANSPORT: OnceLock<Transport> = OnceLock::new();

impl Transport {
    /// Sets the transport up; once, while the module loads.
    ///
    /// # Errors
    /// In words, if something of the system's can't be had.
    pub fn start(
        line: Line,
        symbols: Symbols,
        settings: Settings,
    ) -> Result<&'static Self, String> {
        child::start();
        let transport = Self {
            line,
            symbols,
            poller: Poller::new().map_err(|error| error.to_string())?,
            listeners: MainCell::new(Listeners::new(&settings)),
            settings: MainCell::new(settings),
            kind: OnceLock::new(),
        };
        Ok(TRANSPORT.get_or_init(|| transport))
    }

    /// The running transport.
    ///
    /// # Panics
    /// Before [`start`](Self::start).
    pub fn get() -> &'static Self {
        TRANSPORT.get().expect("the module is loaded")
    }

    /// The registered `ConnectionType`.
    pub fn kind(&self) -> *const c_void {
        *self.kind.get().expect("the type is registered") as *const c_void
    }

    /// Keeps the address of the registered `ConnectionType`.
    pub fn set_kind(&self, table: *const c_void) {
        let _ = self.kind.set(table as usize);
    }
}
