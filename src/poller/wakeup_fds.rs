// SPDX-License-Identifier: BSD-3-Clause
//! Descriptors that fire together with a device's.
//!
//! 8.0, 8.1 and 9.0 wake as many I/O threads as *descriptors* fired in one turn of the event
//! loop, divided by a setting. All connections of a device share one completion
//! channel, so one descriptor would fire for all of them, and no thread would ever be
//! woken. So the channel's descriptor is registered several times, by copies of it: as
//! often as there are busy connections.

use crate::host::api;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Copies of a completion channel's descriptor, registered with the event loop. Main thread only.
#[derive(Debug, Default)]
pub(super) struct WakeupFds {
    /// Most of them; 0 where the server does not go by descriptors.
    most: usize,
    descriptors: Vec<OwnedFd>,
    /// Most endpoints ready at one time since the last look.
    busy: usize,
}

impl WakeupFds {
    /// No more than `most`, from now on.
    pub(super) fn allow(&mut self, most: usize) {
        self.most = most;
        self.keep(most);
    }

    /// Has as many descriptors fire with `fd` as there are `busy` endpoints.
    pub(super) fn grow(&mut self, fd: RawFd, busy: usize) {
        self.busy = self.busy.max(busy);
        let wanted = self.busy.saturating_sub(1).min(self.most);
        while self.descriptors.len() < wanted {
            // SAFETY: the caller's descriptor, which is open.
            let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
            let Some(copy) = copy.ok().filter(|copy| api::watch(copy.as_raw_fd(), on_wakeup_fd, 0))
            else {
                self.most = self.descriptors.len();
                return;
            };
            self.descriptors.push(copy);
        }
    }

    /// Lets go of those that were not needed since the last call, or of all.
    pub(super) fn shrink(&mut self, all: bool) {
        let busy = std::mem::take(&mut self.busy);
        let wanted = if all { 0 } else { busy.saturating_sub(1) };
        self.keep(wanted);
    }

    fn keep(&mut self, wanted: usize) {
        while self.descriptors.len() > wanted {
            if let Some(descriptor) = self.descriptors.pop() {
                api::unwatch(descriptor.as_raw_fd());
            }
        }
    }
}

/// The device's own handler does the work.
unsafe extern "C" fn on_wakeup_fd(_fd: c_int, _data: *mut c_void, _mask: c_int) {}
