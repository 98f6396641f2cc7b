// SPDX-License-Identifier: BSD-3-Clause
//! Listening again where the device was removed.
//!
//! A listener on all addresses needs no help: the kernel puts it on every device that comes.
//! One that is bound to an address goes with the device of that address. It is opened again
//! by a timer, first soon and then ever less often, until the address is on a device again or
//! the server listens on something else.

use super::Transport;
use crate::host::{MainCell, api};
use crate::panic::guard;
use redis_module::raw::RedisModuleCtx;
use std::ffi::c_void;
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(8);

/// Until the next attempt, if there is to be one.
static PAUSE: MainCell<Option<Duration>> = MainCell::new(None);

/// A listener has lost its device.
pub fn begin() {
    if PAUSE.open().replace(FIRST).is_none() {
        api::after(FIRST, on_tick);
    }
}

unsafe extern "C" fn on_tick(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let waiting = guard("listening again", || Transport::get().listeners.open().listen_again())
        .unwrap_or(true);
    // Whatever became of that, it is tried again.
    guard("the next attempt to listen", || {
        let mut pause = PAUSE.open();
        *pause = pause.filter(|_| waiting).map(|last| (2 * last).min(LONGEST));
        if let Some(next) = *pause {
            api::after(next, on_tick);
        }
    });
}
