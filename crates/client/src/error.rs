// SPDX-License-Identifier: BSD-3-Clause
//! Why a connection can't be had or is over.

use proto::session::Violation;
use std::net::SocketAddr;
use std::{fmt, io};
use verbs::cm::EventKind;
use verbs::library::LoadError;

/// Why a connection can't be had or is over.
#[derive(Debug)]
pub enum Error {
    /// The RDMA libraries can't be used.
    Library(LoadError),
    /// The address is none, or its name can't be resolved.
    Address(String, io::Error),
    /// The server can't be reached: the event of the connection manager in its place, and its
    /// status, an error number if negative and otherwise the peer's reason to reject.
    NotConnected(SocketAddr, EventKind, i32),
    /// Nothing happened for as long as the time-out says: what was waited for.
    TimedOut(&'static str),
    /// The server has closed the connection.
    Closed,
    /// The connection broke: the device's words.
    Lost(String),
    /// The server broke the protocol.
    Violation(Violation),
    /// An RDMA object can't be had or used.
    Verbs(verbs::Error),
    /// The system call that waits failed.
    Wait(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library(error) => error.fmt(f),
            Self::Address(text, error) => write!(f, "cannot resolve '{text}': {error}"),
            Self::NotConnected(address, event, status) => {
                write!(f, "cannot connect to {address} over RDMA: ")?;
                match event {
                    EventKind::Rejected => write!(
                        f,
                        "rejected (reason {status}): no server listens there over RDMA, or it \
                         takes no client now and says in its log why not"
                    ),
                    _ if status.abs() == libc::ENODEV => f.write_str(
                        "no RDMA device of this host leads there ('rdma link' shows the devices, \
                         'ip route get ADDRESS' the way)",
                    ),
                    _ => {
                        let error = io::Error::from_raw_os_error(status.abs());
                        write!(f, "{error} ({event:?})")
                    }
                }
            }
            Self::TimedOut(what) => write!(f, "timed out while waiting for {what}"),
            Self::Closed => f.write_str("the server has closed the connection"),
            Self::Lost(why) => write!(f, "the connection is lost: {why}"),
            Self::Violation(violation) => write!(f, "the server broke the protocol: {violation}"),
            Self::Verbs(error) => write!(f, "this host {error}"),
            Self::Wait(error) => write!(f, "cannot wait for events: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<verbs::Error> for Error {
    fn from(error: verbs::Error) -> Self {
        Self::Verbs(error)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Library(_) => io::ErrorKind::Unsupported,
            Error::Address(_, error) | Error::Wait(error) => error.kind(),
            Error::NotConnected(..) => io::ErrorKind::ConnectionRefused,
            Error::TimedOut(_) => io::ErrorKind::TimedOut,
            Error::Closed => io::ErrorKind::ConnectionAborted,
            Error::Lost(_) => io::ErrorKind::ConnectionReset,
            Error::Violation(_) => io::ErrorKind::InvalidData,
            Error::Verbs(error) => io::Error::from_raw_os_error(error.errno).kind(),
        };
        Self::new(kind, error)
    }
}
