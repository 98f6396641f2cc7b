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
use crate::verbs::device::{self, Place};
use crate::verbs::qp::{self, Qp};
use rdma_sys::ibv_event_type;
use std::time::Duration;

/// Counts a posted send towards a planned removal, a planned change of address, and a planned
/// asynchronous event.
pub fn consider(qp: &Qp) {
    if fault::strikes(Point::RemoveDevice).is_some() {
        // Not here: the caller holds a queue pair's lock.
        engine().soon(remove);
    }
    if fault::strikes(Point::AddressChange).is_some() {
        engine().soon(cm::address_changed);
    }
    if let Some(kind) = fault::strikes(Point::AsyncEvent) {
        tell(qp, KINDS[kind as usize]);
    }
}

/// The kinds of asynchronous events, in the order of their numbers.
pub const KINDS: [ibv_event_type; 19] = {
    use ibv_event_type::*;
    [
        IBV_EVENT_CQ_ERR,
        IBV_EVENT_QP_FATAL,
        IBV_EVENT_QP_REQ_ERR,
        IBV_EVENT_QP_ACCESS_ERR,
        IBV_EVENT_COMM_EST,
        IBV_EVENT_SQ_DRAINED,
        IBV_EVENT_PATH_MIG,
        IBV_EVENT_PATH_MIG_ERR,
        IBV_EVENT_DEVICE_FATAL,
        IBV_EVENT_PORT_ACTIVE,
        IBV_EVENT_PORT_ERR,
        IBV_EVENT_LID_CHANGE,
        IBV_EVENT_PKEY_CHANGE,
        IBV_EVENT_SM_CHANGE,
        IBV_EVENT_SRQ_ERR,
        IBV_EVENT_SRQ_LIMIT_REACHED,
        IBV_EVENT_QP_LAST_WQE_REACHED,
        IBV_EVENT_CLIENT_REREGISTER,
        IBV_EVENT_GID_CHANGE,
    ]
};

/// An asynchronous event of a queue pair, of the queue that it completes in, or of the device:
/// as its kind says. Nothing else happens.
fn tell(qp: &Qp, kind: ibv_event_type) {
    use ibv_event_type::*;
    let about = match kind {
        IBV_EVENT_CQ_ERR => About::Cq(qp.send_cq.clone()),
        IBV_EVENT_QP_FATAL
        | IBV_EVENT_QP_REQ_ERR
        | IBV_EVENT_QP_ACCESS_ERR
        | IBV_EVENT_COMM_EST
        | IBV_EVENT_SQ_DRAINED
        | IBV_EVENT_PATH_MIG
        | IBV_EVENT_PATH_MIG_ERR
        | IBV_EVENT_QP_LAST_WQE_REACHED => match qp.strong() {
            Some(qp) => About::Qp(qp),
            None => return,
        },
        _ => About::Device,
    };
    qp.context.notify(kind, about);
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
            device::come(Place::First);
        });
    }
}
