// SPDX-License-Identifier: BSD-3-Clause
//! The removal of the device, as a planned fault: every context learns of it,
//! every queue pair fails, every identifier gets RDMA_CM_EVENT_DEVICE_REMOVAL,
//! and nothing new can be made.

use crate::cm;
use crate::fault::{self, Point};
use crate::verbs::context::{About, Context};
use crate::verbs::qp;
use rdma_sys::ibv_event_type;
use std::sync::atomic::{AtomicBool, Ordering};

static REMOVED: AtomicBool = AtomicBool::new(false);

/// True if there is no device, from the start or any more.
pub fn no_device() -> bool {
    fault::plan().no_device || REMOVED.load(Ordering::Relaxed)
}

/// Counts a posted send towards a planned removal.
pub fn consider() {
    if fault::strikes(Point::RemoveDevice).is_some() && !REMOVED.swap(true, Ordering::Relaxed) {
        // Not here: the caller holds a queue pair's lock.
        crate::engine::engine().soon(|| {
            for context in Context::all() {
                context.notify(ibv_event_type::IBV_EVENT_DEVICE_FATAL, About::Device);
            }
            for qp in qp::all() {
                qp.fatal();
            }
            cm::device_removed();
        });
    }
}
