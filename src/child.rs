// SPDX-License-Identifier: BSD-3-Clause
//! Forked children of the server.
//!
//! A child shares the device with its parent and must touch nothing of it. Two things that a
//! server does write to a client's connection from a child, a debugger of scripts and a
//! replica's second channel. Over RDMA they fail, and the client or replica tells nobody why:
//! so the child leaves a note in memory that both see, and the parent says it.

use crate::host::MainCell;
use crate::log_limit::LogLimiter;
use crate::time;
use log::Level;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use verbs::fork;

/// Whether this process is a child that the server forked.
static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// How often children wanted to write, in memory that they share with their parent.
static WANTED: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

/// From now on children are known as such. Once, while the module loads.
pub fn start() {
    unsafe extern "C" fn in_new_child() {
        IN_CHILD.store(true, Ordering::Relaxed);
        fork::close_in_child();
    }
    // SAFETY: a mapping at an address of the kernel's choice, of zeroes and never unmapped;
    // the callback uses atomics and close(2), which is allowed after fork.
    unsafe {
        let shared = libc::mmap(
            ptr::null_mut(),
            size_of::<AtomicU32>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if shared != libc::MAP_FAILED {
            WANTED.store(shared.cast(), Ordering::Relaxed);
        }
        libc::pthread_atfork(None, None, Some(in_new_child));
    }
}

/// Whether this process is a forked child of the server.
pub fn in_child() -> bool {
    IN_CHILD.load(Ordering::Relaxed)
}

fn wanted() -> Option<&'static AtomicU32> {
    // SAFETY: null, or a mapping that stays.
    unsafe { WANTED.load(Ordering::Relaxed).as_ref() }
}

/// In a child: it wanted to write to a connection.
pub fn note_write() {
    if let Some(wanted) = wanted() {
        wanted.fetch_add(1, Ordering::Relaxed);
    }
}

/// Says that children wanted to write, if any did, once a minute. Main thread.
pub fn tell() {
    static LINES: MainCell<LogLimiter> = MainCell::new(LogLimiter::new(1));
    if wanted().is_some_and(|wanted| wanted.swap(0, Ordering::Relaxed) > 0) {
        LINES.borrow_mut().log(
            time::now(),
            Level::Warn,
            format_args!(
                "a child of the server wanted to write to an RDMA connection, which only the \
                 server itself can: SCRIPT DEBUG YES needs TCP (or SYNC), and so does a replica \
                 with dual-channel-replication-enabled"
            ),
        );
    }
}
