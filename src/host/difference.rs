// SPDX-License-Identifier: BSD-3-Clause
//! How a server differs from what is known of its line.

use super::connection::Connection;
use super::fingerprint::Mismatch;
use super::line::Layout;
use std::{fmt, io};

/// The first thing about a server that is not as its line has it, or that could not be found
/// out. Such a server is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It exports no function of this name.
    Function(&'static str),
    /// A member of the TCP type's table.
    Member(Mismatch),
    /// The TCP type's own number, or its name.
    Type {
        /// What it answered.
        answer: usize,
        /// Whether the line's types have numbers.
        numbered: bool,
    },
    /// The TCP type's new connection is at this address, where no memory is.
    NoConnection(usize),
    /// A member of a new connection.
    Connection {
        /// The member's name in the server's headers.
        member: &'static str,
        /// What it is.
        found: i64,
        /// What it should be.
        expected: i64,
    },
    /// The size of a connection.
    Size {
        /// Bytes that its allocator gives one.
        found: usize,
        /// Bytes that it gives for as many as we know of.
        expected: usize,
    },
    /// The tail of the TLS type's table is that of none of these.
    Tail(Vec<Layout>),
    /// The system's error number: there is no pipe to look through.
    NoPipe(i32),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(name) => write!(f, "it exports no function {name}"),
            Self::Member(mismatch) => write!(f, "{mismatch}"),
            Self::Type { answer, numbered } => write!(
                f,
                "its TCP connection type says that it is {answer:#x}, and not {}",
                if *numbered { "number 0" } else { "\"tcp\"" }
            ),
            Self::NoConnection(address) => write!(
                f,
                "its TCP connection type makes a connection at {address:#x}, where nothing is"
            ),
            Self::Connection { member, found, expected } => {
                write!(f, "`{member}` of its new TCP connection is {found} instead of {expected}")
            }
            Self::Size { found, expected } => write!(
                f,
                "its TCP connections have {found} bytes instead of {} (the allocator makes \
                 {expected} of them)",
                size_of::<Connection>()
            ),
            Self::Tail(layouts) => {
                let names: Vec<_> = layouts.iter().map(|layout| layout.name()).collect();
                write!(f, "its TLS connection type does not end as that of {}", names.join(" or "))
            }
            Self::NoPipe(errno) => {
                write!(f, "a pipe can't be had: {}", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl std::error::Error for Difference {}

impl From<Mismatch> for Difference {
    fn from(mismatch: Mismatch) -> Self {
        Self::Member(mismatch)
    }
}
