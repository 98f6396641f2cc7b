// SPDX-License-Identifier: BSD-3-Clause
//! Why a link does not come about over RDMA, for the server and for the log.

use super::attempts::IN_VAIN;
use super::identity::Identity;
use super::inquiry::Unanswered;
use std::io;

/// Why a link does not come about.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server can't be asked over TCP, or says nothing of use.
    Tcp(Unanswered),
    /// It did not answer in time.
    Silent,
    /// The connection over RDMA failed.
    Rdma(i32),
    /// It does not say over RDMA who it is.
    Nobody(String),
    /// It is another one.
    Other { tcp: Identity, rdma: Identity },
    /// The last links over RDMA ended before anything was in sync.
    InVain,
    /// There is no descriptor.
    Descriptor,
}

impl Failure {
    /// What the server is told.
    pub(super) fn errno(&self) -> i32 {
        match self {
            Self::Tcp(Unanswered::Unreachable(error)) => {
                error.raw_os_error().unwrap_or(libc::ECONNREFUSED)
            }
            Self::Rdma(errno) => *errno,
            Self::Silent => libc::ETIMEDOUT,
            Self::Descriptor => libc::EMFILE,
            Self::Tcp(Unanswered::Other(_))
            | Self::Nobody(_)
            | Self::Other { .. }
            | Self::InVain => libc::ECONNREFUSED,
        }
    }

    /// In words, for the log.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Tcp(why) => why.to_string(),
            Self::Silent => String::from("it does not tell in time which server it is"),
            Self::Rdma(errno) => {
                format!("no connection over RDMA: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Nobody(said) => {
                format!("over RDMA it does not tell which server it is (\"{said}\")")
            }
            Self::Other { tcp, rdma } => format!(
                "over TCP there is the server {tcp}, over RDMA there is {rdma}: the two ports of \
                 this address are not those of one server"
            ),
            Self::InVain => {
                format!("the last {IN_VAIN} links over RDMA ended before the replica was in sync")
            }
            Self::Descriptor => String::from("no descriptor is left"),
        }
    }
}
