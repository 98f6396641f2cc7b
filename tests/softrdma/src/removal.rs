// SPDX-License-Identifier: BSD-3-Clause
//! The removal of the device, as a planned fault, and its return.
//!
//! As in the kernel, what the process made on the device stays in its hands, dead: channels
//! poll in error for ever and answer EIO, nothing completes any more, nothing new can be made
//! on it, and every identifier that is bound to it gets RDMA_CM_EVENT_DEVICE_REMOVAL.
//! Listeners at no particular address are none of its: they rest until a device is there.

use crate::cm;
use crate::engine::engine;
use crate::fault::{self, Point};
use crate::verbs::context::{About, Context};
use crate::verbs::{device, qp};
use rdma_sys::ibv_event_type;
use std::time::Duration;

/// Counts a posted send towards a planned removal, or a planned change of address.
pub fn consider() {
    if fault::strikes(Point::RemoveDevice).is_some() {
        // Not here: the caller holds a queue pair's lock.
        engine().soon(remove);
    }
    if fault::strikes(Point::AddressChange).is_some() {
        engine().soon(cm::address_changed);
    }
}

fn remove() {
    let Some(device) = device::remove() else { return };
    for qp in qp::all().iter().filter(|qp| std::ptr::eq(qp.context.device, device)) {
        qp.fatal();
    }
    for context in Context::all().iter().filter(|context| std::ptr::eq(context.device, device)) {
        context.notify(ibv_event_type::IBV_EVENT_DEVICE_FATAL, About::Device);
        context.dissociate();
    }
    cm::device_removed(device);
    if let Some(after) = fault::plan().device_returns {
        engine().after(Duration::from_millis(after), || {
            device::come_back();
            cm::device_added();
        });
    }
}
