// SPDX-License-Identifier: BSD-3-Clause
//! What can end a call of this client, each as its own case so that a test can tell them apart.

use std::io;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing happened within the call's time-out.
    #[error("timed out while {0}")]
    TimedOut(&'static str),
    /// The other side ended the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The connection manager did not bring the connection up.
    #[error("connecting failed: {event}, status {status}")]
    NotConnected {
        /// The connection manager's name of the event.
        event: String,
        /// The event's status: an errno, or the reason of a rejection.
        status: i32,
    },
    /// A work request completed with an error.
    #[error("work request failed: {0}")]
    Completion(String),
    /// A call of the system or of the RDMA libraries failed.
    #[error("{call}: {source}")]
    System {
        /// The function that failed.
        call: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The server sent what the protocol does not allow.
    #[error("protocol violation by the server: {0}")]
    Protocol(String),
}

impl Error {
    /// The error of `call` as errno has it now.
    pub(crate) fn last(call: &'static str) -> Self {
        Self::System { call, source: io::Error::last_os_error() }
    }

    /// Whether the other side is gone, in whichever way it showed.
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Closed | Self::Completion(_))
    }

    /// Whether the call ended by its time-out.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::TimedOut(_))
    }
}

/// The result of every fallible call here.
pub type Result<T> = std::result::Result<T, Error>;
