// SPDX-License-Identifier: BSD-3-Clause
//! A module that does with memory what nobody should, while the server loads it. It shows that
//! a job of `scripts/sanitizers.sh` would find the like in the module proper: same server, same
//! compiler, same flags. `BLUNDER` says what: `use-after-free`, `overrun` or `uninitialised`.
//! It then refuses to load, so that only a sanitizer's word tells one blunder from none.

use std::ffi::{c_int, c_void};
use std::hint::black_box;

unsafe extern "C" {
    fn malloc(size: usize) -> *mut c_void;
    fn free(memory: *mut c_void);
}

/// The server's entry into the module.
///
/// # Safety
/// None of it is safe; that is the point.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ValkeyModule_OnLoad(
    _context: *mut c_void,
    _arguments: *const *mut c_void,
    _count: c_int,
) -> c_int {
    // SAFETY: the first read and the free are right, the rest is not.
    unsafe {
        let memory: *mut u8 = black_box(malloc(40).cast());
        match std::env::var("BLUNDER").as_deref() {
            Ok("use-after-free") => {
                memory.write(1);
                free(memory.cast());
                black_box(memory.read_volatile());
            }
            Ok("overrun") => {
                memory.add(40).write_volatile(1);
            }
            Ok("uninitialised") => {
                if memory.read_volatile() == 7 {
                    black_box(memory);
                }
            }
            _ => {}
        }
    }
    1
}
