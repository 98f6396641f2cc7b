// SPDX-License-Identifier: BSD-3-Clause
//! Listening again where the device was removed.
//!
//! A listener on all addresses needs no help: the kernel puts it on every device that comes.
//! One that is bound to an address goes with the device of that address. It is opened again
//! by a timer, first soon and then ever less often, until the address is on a device again or
//! the server listens on something else.

use crate::host::{MainCell, api};
use crate::panic::guard;
use crate::poller::again;
use redis_module::raw::RedisModuleCtx;
use std::ffi::c_void;
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(8);

/// An attempt to listen, which returns whether a further one is needed.
type Attempt = fn() -> bool;

/// The next attempt, if there is to be one, and the pause before it.
static NEXT: MainCell<Option<(Attempt, Duration)>> = MainCell::new(None);

/// A listener has lost its device: `attempt` is to be made, until it needs no other.
pub(super) fn begin(attempt: Attempt) {
    if NEXT.borrow_mut().replace((attempt, FIRST)).is_none() {
        api::after(FIRST, on_tick);
    }
}

unsafe extern "C" fn on_tick(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let Some((attempt, _)) = *NEXT.borrow_mut() else { return };
    let waiting = guard("listening again", attempt).unwrap_or(true);
    // Whatever became of that, it is tried again.
    let pause = guard("the next attempt to listen", || {
        let mut next = NEXT.borrow_mut();
        *next = next.filter(|_| waiting).map(|(attempt, last)| (attempt, (2 * last).min(LONGEST)));
        next.map(|(_, pause)| pause)
    });
    if let Some(pause) = pause.unwrap_or(Some(LONGEST)) {
        again(pause, on_tick);
    }
}
