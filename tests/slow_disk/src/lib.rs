// SPDX-License-Identifier: BSD-3-Clause
//! A slow disk, for tests: a library for `LD_PRELOAD`.
//!
//! `fdatasync` of an append-only file takes as long as `SLOW_DISK_MS` says. What is in the
//! file when it begins counts as safe when it has ended, and not before; how much that is,
//! and how often it happened, stands in the file that `SLOW_DISK_NOTES` names: two numbers of
//! 8 bytes. Whoever got a reply can look there whether it was true.

use libc::c_int;
use std::env;
use std::fs;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Bytes that are safe, and syncs that ended.
type Notes = [AtomicU64; 2];

/// The notes and the delay, if the environment asks for them.
fn plan() -> Option<&'static (&'static Notes, Duration)> {
    static PLAN: OnceLock<Option<(&'static Notes, Duration)>> = OnceLock::new();
    PLAN.get_or_init(|| {
        let milliseconds = env::var("SLOW_DISK_MS").ok()?.parse().ok()?;
        let path = env::var_os("SLOW_DISK_NOTES")?;
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        let length = size_of::<Notes>();
        if file.metadata().ok()?.len() < length as u64 {
            return None;
        }
        // SAFETY: a new mapping, as long as the file, and never taken away.
        let notes = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let start =
                libc::mmap(ptr::null_mut(), length, access, libc::MAP_SHARED, file.as_raw_fd(), 0);
            if start == libc::MAP_FAILED {
                return None;
            }
            &*start.cast::<Notes>()
        };
        Some((notes, Duration::from_millis(milliseconds)))
    })
    .as_ref()
}

/// The length of an append-only file; `None` of any other.
fn appended(descriptor: c_int) -> Option<u64> {
    let link = format!("/proc/self/fd/{descriptor}");
    let name = fs::read_link(&link).ok()?;
    let ours = name.to_str()?.ends_with(".incr.aof");
    Some(fs::metadata(link).ok()?.len()).filter(|_| ours)
}

/// As fdatasync(2), slowly.
///
/// # Safety
/// None is needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    let slow = plan().zip(appended(descriptor));
    if let Some(((_, delay), _)) = slow {
        thread::sleep(*delay);
    }
    // SAFETY: a system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_fdatasync, descriptor) } as c_int;
    if let (Some(((notes, _), length)), 0) = (slow, result) {
        // Two threads may sync at a time, and the one that began first end last.
        notes[0].fetch_max(length, Ordering::Release);
        notes[1].fetch_add(1, Ordering::Release);
    }
    result
}
