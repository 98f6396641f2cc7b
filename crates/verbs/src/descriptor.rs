// SPDX-License-Identifier: BSD-3-Clause
//! Descriptors of channels.

use crate::Error;
use std::os::fd::RawFd;

/// Makes a descriptor non-blocking, and closed on exec.
pub(crate) fn set_nonblocking(fd: RawFd) -> Result<(), Error> {
    // SAFETY: fcntl with integer arguments on a descriptor of ours.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(Error::last("make a descriptor non-blocking"));
        }
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
    }
    Ok(())
}
