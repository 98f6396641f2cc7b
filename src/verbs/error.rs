// SPDX-License-Identifier: BSD-3-Clause
//! What went wrong: what was being done, and what the system answered.

use std::{fmt, io};

/// A verbs or connection manager call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// The operation, in words that fit behind "cannot".
    pub action: &'static str,
    /// The system's error number.
    pub errno: i32,
}

impl Error {
    /// The error that `errno` holds right after a call failed.
    pub(super) fn last(action: &'static str) -> Self {
        Self { action, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    /// `Ok` for the 0 of calls that return 0 or −1 and set `errno`.
    pub(super) fn check(action: &'static str, result: i32) -> Result<(), Self> {
        if result == 0 { Ok(()) } else { Err(Self::last(action)) }
    }

    /// `Ok` for the 0 of calls that return the error number itself. Some
    /// providers return −1 and set `errno` where the manual promises a number.
    pub(super) fn check_number(action: &'static str, result: i32) -> Result<(), Self> {
        match result {
            0 => Ok(()),
            errno if errno > 0 => Err(Self { action, errno }),
            _ => Err(Self::last(action)),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.action, io::Error::from_raw_os_error(self.errno))?;
        if self.errno == libc::ENOMEM && self.action.contains("register") {
            write!(f, " (is the limit on locked memory, `ulimit -l`, too small?)")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
