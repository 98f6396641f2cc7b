// SPDX-License-Identifier: BSD-3-Clause
//! Asynchronous events: what a device tells of itself, of its ports, and of the queues and
//! queue pairs that were made on it.

use crate::Error;
use crate::descriptor::set_nonblocking;
use crate::device::Device;
use crate::library::call;
use rdma_sys::*;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;

/// An asynchronous event of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The completion queue of this number failed: no completion comes of it any more.
    QueueFailed(usize),
    /// The device failed, or was removed.
    Fatal,
    /// Something arrived on the queue pair of this number before the connection manager said
    /// that it is connected.
    Established(u32),
    /// The queue pair of this number failed, for this reason in the library's words.
    QueuePairFailed(u32, String),
    /// Something befell a port, in the library's words.
    Port(u8, String),
    /// Something else befell the device, in the library's words.
    Other(String),
    /// What every connection may meet on its way, and nobody has to know.
    Routine,
}

impl Device {
    /// The descriptor that polls readable when an event waits: non-blocking from now on. It is
    /// the device's own, so it is not to be closed.
    ///
    /// # Errors
    /// If it can't be made non-blocking.
    pub fn events_fd(&self) -> Result<RawFd, Error> {
        // SAFETY: a live context.
        let fd = unsafe { (*self.context()).async_fd };
        set_nonblocking(fd)?;
        Ok(fd)
    }

    /// The next event, if one waits. It is acknowledged.
    ///
    /// # Errors
    /// `EIO` if the device was removed: there will be no event any more, and the descriptor
    /// polls as in error for ever.
    pub fn next_event(&self) -> Result<Option<DeviceEvent>, Error> {
        let mut raw = MaybeUninit::<ibv_async_event>::zeroed();
        // SAFETY: a live context and room for the event. What the event is of is live until it
        // is acknowledged, since its destruction waits for that; what is needed of it is copied
        // first.
        unsafe {
            if call!(ibv_get_async_event(self.context(), raw.as_mut_ptr())) != 0 {
                let error = Error::last("take the device's events");
                return match error.errno {
                    libc::EAGAIN | libc::EINTR => Ok(None),
                    _ => Err(error),
                };
            }
            let event = read(raw.as_ptr());
            call!(ibv_ack_async_event(raw.as_mut_ptr()));
            Ok(Some(event))
        }
    }
}

/// The kinds by their numbers: a newer library may know more than the declaration.
mod kind {
    use rdma_sys::ibv_event_type;

    macro_rules! kinds {
        ($($name:ident = $raw:ident;)*) => {
            $(pub(super) const $name: u32 = ibv_event_type::$raw as u32;)*
        };
    }
    kinds! {
        CQ_ERR = IBV_EVENT_CQ_ERR;
        QP_FATAL = IBV_EVENT_QP_FATAL;
        QP_REQ_ERR = IBV_EVENT_QP_REQ_ERR;
        QP_ACCESS_ERR = IBV_EVENT_QP_ACCESS_ERR;
        COMM_EST = IBV_EVENT_COMM_EST;
        SQ_DRAINED = IBV_EVENT_SQ_DRAINED;
        DEVICE_FATAL = IBV_EVENT_DEVICE_FATAL;
        PORT_ACTIVE = IBV_EVENT_PORT_ACTIVE;
        PORT_ERR = IBV_EVENT_PORT_ERR;
        LID_CHANGE = IBV_EVENT_LID_CHANGE;
        PKEY_CHANGE = IBV_EVENT_PKEY_CHANGE;
        SM_CHANGE = IBV_EVENT_SM_CHANGE;
        LAST_WQE = IBV_EVENT_QP_LAST_WQE_REACHED;
        CLIENT_REREGISTER = IBV_EVENT_CLIENT_REREGISTER;
        GID_CHANGE = IBV_EVENT_GID_CHANGE;
    }
}

/// What an event says.
///
/// # Safety
/// `raw` is an event that was not acknowledged yet.
unsafe fn read(raw: *const ibv_async_event) -> DeviceEvent {
    // SAFETY: by the caller's promise; the kind is read as the number that it is, and the
    // element is of the sort that the kind says.
    unsafe {
        let kind = (&raw const (*raw).event_type).cast::<u32>().read();
        let element = &raw const (*raw).element;
        let queue_pair = || (*element.cast::<*const ibv_qp>().read()).qp_num;
        match kind {
            kind::CQ_ERR => {
                let queue = element.cast::<*const ibv_cq>().read();
                DeviceEvent::QueueFailed((*queue).cq_context.addr())
            }
            kind::DEVICE_FATAL => DeviceEvent::Fatal,
            kind::COMM_EST => DeviceEvent::Established(queue_pair()),
            kind::SQ_DRAINED | kind::LAST_WQE => DeviceEvent::Routine,
            kind::QP_FATAL | kind::QP_REQ_ERR | kind::QP_ACCESS_ERR => {
                DeviceEvent::QueuePairFailed(queue_pair(), text(kind))
            }
            kind::PORT_ACTIVE
            | kind::PORT_ERR
            | kind::LID_CHANGE
            | kind::PKEY_CHANGE
            | kind::SM_CHANGE
            | kind::CLIENT_REREGISTER
            | kind::GID_CHANGE => DeviceEvent::Port(element.cast::<i32>().read() as u8, text(kind)),
            other => DeviceEvent::Other(text(other)),
        }
    }
}

fn text(kind: u32) -> String {
    if kind > kind::GID_CHANGE {
        return format!("event {kind}");
    }
    // SAFETY: a number that the declaration has a name for, and a function that answers it
    // with a static string.
    unsafe {
        let kind = std::mem::transmute::<u32, ibv_event_type>(kind);
        CStr::from_ptr(call!(ibv_event_type_str(kind))).to_string_lossy().into_owned()
    }
}
