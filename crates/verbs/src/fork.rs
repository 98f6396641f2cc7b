// SPDX-License-Identifier: BSD-3-Clause
//! Forking beside RDMA: what has to be prepared, and what a child must not keep.
//!
//! The server forks to save its data, and the child may live for minutes, also when the
//! server has crashed. The kernel ends what belongs to an event channel when the last process
//! closes it: a child that kept the listeners' would keep the server from being started
//! again, and with the connections' their clients would wait for a server that is gone.

use crate::Error;
use crate::library::call;
use rdma_sys::IBV_FORK_DISABLED;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

/// A free place among the descriptors.
const NONE: RawFd = -1;

/// Descriptors of event channels: two sets of listeners, while one follows the other, and
/// the poller's, with room to spare.
static CHANNELS: [AtomicI32; 64] = [const { AtomicI32::new(NONE) }; 64];

/// Makes `fork` safe beside registered memory, where the kernel does not by itself.
/// Must come before the first registration.
///
/// # Errors
/// If the libraries can't.
pub fn prepare() -> Result<(), Error> {
    // SAFETY: no arguments.
    unsafe {
        if call!(ibv_is_fork_initialized()) == IBV_FORK_DISABLED {
            return Error::check_number(
                "make registered memory safe for fork",
                call!(ibv_fork_init()),
            );
        }
    }
    Ok(())
}

/// Notes a descriptor that a child is to close.
pub(crate) fn note(fd: RawFd) {
    replace(NONE, fd);
}

/// Forgets a descriptor that is about to be closed.
pub(crate) fn forget(fd: RawFd) {
    replace(fd, NONE);
}

fn replace(old: RawFd, new: RawFd) {
    let swap =
        |place: &AtomicI32| place.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed);
    // One that finds no place stays open in children, which does no other harm.
    let _ = CHANNELS.iter().any(|place| swap(place).is_ok());
}

/// Closes, in a child that was just forked, what it must not keep. As callable as a signal
/// handler: nothing of the libraries is touched, whose locks another thread may have held.
pub fn close_in_child() {
    for place in &CHANNELS {
        let fd = place.swap(NONE, Ordering::Relaxed);
        if fd != NONE {
            // SAFETY: the child's own copy of a descriptor that nobody there uses.
            unsafe { libc::close(fd) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    fn is_open(fd: RawFd) -> bool {
        // SAFETY: a query.
        unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
    }

    #[test]
    fn a_child_closes_what_is_noted_and_not_forgotten() {
        // SAFETY: new descriptors; the second is closed below.
        let (kept, given) =
            unsafe { (OwnedFd::from_raw_fd(libc::eventfd(0, 0)), libc::eventfd(0, 0)) };
        note(kept.as_raw_fd());
        note(given);
        forget(kept.as_raw_fd());
        close_in_child();
        assert!(is_open(kept.as_raw_fd()) && !is_open(given));
        assert!(CHANNELS.iter().all(|place| place.load(Ordering::Relaxed) == NONE));
    }
}
