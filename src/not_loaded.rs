// SPDX-License-Identifier: BSD-3-Clause
//! Why the module does not let itself be loaded.

use crate::config::ArgumentError;
use crate::doctor::DoctorError;
use crate::host::Line;
use crate::host::api::Unsupported;
use crate::host::difference::Difference;
use crate::host::line::Version;
use crate::replication::patch::Unfit;
use std::fmt;
use verbs::Error;
use verbs::library::LoadError;

/// Why the module is not loaded. The text fits behind "not loaded:".
#[derive(Debug)]
pub enum NotLoaded {
    /// The server runs already.
    TooLate,
    /// The server's release is of no supported line.
    Line(Version),
    /// The server has an RDMA transport of its own.
    OwnTransport,
    /// An argument can't be used.
    Argument(ArgumentError),
    /// The release is newer than any known one of its line, and such are to be refused.
    Release(Version, Line),
    /// The server is not what it says it is.
    Differs(Version, Difference),
    /// The RDMA libraries can't be used.
    Library(LoadError),
    /// The RDMA connection manager can't be used.
    Verbs(Error),
    /// A device is unfit, or there is none to examine, and that is required.
    Doctor(DoctorError),
    /// Links between servers can't go over RDMA, and are to.
    Replication(Unfit),
    /// The module API lacks something.
    Api(Unsupported),
    /// The event loop has no room for our descriptors.
    EventLoop,
    /// A value of the module's own settings can't be used.
    Setting,
    /// There is a connection type of our name.
    TypeTaken,
}

impl fmt::Display for NotLoaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLate => f.write_str(
                "a connection type can be loaded only while the server starts: \
                 put `loadmodule` into its configuration file and restart it",
            ),
            Self::Line(version) => write!(
                f,
                "the server is {version}; this module supports the lines {}: run it in a server \
                 of one of these, or get a version of the module that supports this one",
                Line::SUPPORTED
            ),
            Self::OwnTransport => f.write_str(
                "this server was built with an RDMA transport of its own; use that one, or a \
                 server without it",
            ),
            Self::Argument(error) => write!(f, "{error}"),
            Self::Release(version, line) => write!(
                f,
                "the server is {version}, and {} is the last release of its line that this module \
                 knows: without unknown-release=refuse it is accepted if it is like that one",
                line.last_known()
            ),
            Self::Differs(version, difference) => write!(
                f,
                "the server says it is {version}, but {difference}; it is no build that this \
                 module knows"
            ),
            Self::Library(error) => write!(f, "{error}"),
            Self::Verbs(error) => write!(f, "{error}"),
            Self::Doctor(error) => write!(f, "{error}"),
            Self::Replication(error) => write!(f, "{error}"),
            Self::Api(error) => write!(f, "{error}"),
            Self::EventLoop => {
                f.write_str("the server's event loop takes no more descriptors (maxclients)")
            }
            Self::Setting => f.write_str(
                "a value of one of its settings, rdma.…, can't be used; see the line above",
            ),
            Self::TypeTaken => f.write_str("the server has a connection type \"rdma\" already"),
        }
    }
}

impl std::error::Error for NotLoaded {}

impl From<DoctorError> for NotLoaded {
    fn from(error: DoctorError) -> Self {
        Self::Doctor(error)
    }
}

impl From<Unfit> for NotLoaded {
    fn from(error: Unfit) -> Self {
        Self::Replication(error)
    }
}

impl From<ArgumentError> for NotLoaded {
    fn from(error: ArgumentError) -> Self {
        Self::Argument(error)
    }
}

impl From<LoadError> for NotLoaded {
    fn from(error: LoadError) -> Self {
        Self::Library(error)
    }
}

impl From<Error> for NotLoaded {
    fn from(error: Error) -> Self {
        Self::Verbs(error)
    }
}

impl From<Unsupported> for NotLoaded {
    fn from(error: Unsupported) -> Self {
        Self::Api(error)
    }
}
