// SPDX-License-Identifier: BSD-3-Clause
//! Event channels, and what happens when an event is fetched.
//!
//! As in rdma-core, the queue pair's transitions belong to the application's
//! call of rdma_get_cm_event, not to the arrival of the message.

use super::id::CmId;
use super::message::Message;
use crate::handle;
use crate::notice::Notices;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::mem::zeroed;
use std::sync::Arc;

/// An event channel.
#[repr(C)]
pub struct EventChannel {
    pub c: rdma_event_channel,
    pub notices: Notices<Pending>,
}

/// An event that waits to be fetched.
pub struct Pending {
    pub kind: rdma_cm_event_type::Type,
    pub status: i32,
    /// The identifier the event is about.
    pub id: Arc<CmId>,
    /// For a connection request, the listener it came to.
    pub listener: Option<Arc<CmId>>,
    pub message: Option<Box<Message>>,
}

/// A fetched event, until it is acknowledged.
#[repr(C)]
pub struct Event {
    pub c: rdma_cm_event,
    /// Whose count of unacknowledged events this is in.
    counted: Arc<CmId>,
    private: [u8; 256],
}

impl EventChannel {
    pub fn new() -> Option<Arc<EventChannel>> {
        let notices = Notices::new().ok()?;
        Some(Arc::new(EventChannel { c: rdma_event_channel { fd: notices.fd() }, notices }))
    }

    /// Drops what nobody will fetch, and refuses the connections among it.
    pub fn close(&self) {
        for pending in self.notices.remove(|_| true) {
            if pending.listener.is_some() {
                pending.id.destroy();
            }
        }
    }

    /// Fetches the next event; the error is an errno.
    pub fn fetch(&self) -> Result<*mut rdma_cm_event, i32> {
        let pending = self.notices.pop(|| false, |pending| pending.counted().acks.reported())?;
        Ok(pending.deliver())
    }
}

impl Pending {
    /// Whose destruction waits until it is acknowledged.
    fn counted(&self) -> &Arc<CmId> {
        self.listener.as_ref().unwrap_or(&self.id)
    }

    fn deliver(self) -> *mut rdma_cm_event {
        let Pending { mut kind, mut status, id, listener, message } = self;
        let counted = listener.clone().unwrap_or_else(|| id.clone());
        // SAFETY: all zeroes is a valid rdma_cm_event.
        let mut event = Box::new(Event { c: unsafe { zeroed() }, counted, private: [0; 256] });
        if let Some(message) = &message {
            event.private[..message.private.len()].copy_from_slice(&message.private);
            event.c.param.conn = message.as_event(event.private.as_ptr());
        }
        match kind {
            RDMA_CM_EVENT_CONNECT_REQUEST => id.introduce(listener.as_deref()),
            RDMA_CM_EVENT_ADDR_RESOLVED => id.publish_addresses(),
            RDMA_CM_EVENT_CONNECT_RESPONSE if id.has_qp() => {
                status = id.process_response();
                kind = if status == 0 {
                    RDMA_CM_EVENT_ESTABLISHED
                } else {
                    RDMA_CM_EVENT_CONNECT_ERROR
                };
            }
            RDMA_CM_EVENT_REJECTED => id.fail_qp(),
            _ => {}
        }
        event.c.event = kind;
        event.c.status = status;
        event.c.listen_id = listener.map_or(std::ptr::null_mut(), |l| l.as_c());
        event.c.id = if kind == RDMA_CM_EVENT_CONNECT_REQUEST {
            // The application owns the new identifier from here on.
            handle::into_c(id)
        } else {
            id.as_c()
        };
        Box::into_raw(event).cast()
    }
}

/// Acknowledges and frees an event.
///
/// # Safety
/// The event came from [`EventChannel::fetch`] and is not used again.
pub unsafe fn acknowledge(event: *mut rdma_cm_event) {
    // SAFETY: the caller's word.
    let event = unsafe { Box::from_raw(event.cast::<Event>()) };
    event.counted.acks.ack(1);
}
