// SPDX-License-Identifier: BSD-3-Clause
//! Waiting for descriptors, with a deadline.

use crate::Error;
use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Waits until one of `fds` is readable; `false` if `deadline` is over first. None waits for
/// as long as it takes.
pub(crate) fn readable(fds: &[RawFd], deadline: Option<Instant>) -> Result<bool, Error> {
    let mut entries: Vec<_> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let timeout = match deadline {
        None => -1,
        Some(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, or the last millisecond would be spun away.
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        }
    };
    // SAFETY: as many entries as said.
    match unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, timeout) } {
        0 => Ok(false),
        count if count > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            error => Err(Error::Wait(error)),
        },
    }
}
