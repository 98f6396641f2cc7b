// SPDX-License-Identifier: BSD-3-Clause
//! The device. There is one at a time at most: a planned fault removes it, and another one
//! with the same name and GUID may take its place, as after a reset or a driver's reload.

use super::context::node_guid;
use crate::fault;
use crate::habits::habits;
use rdma_sys::*;
use std::mem::zeroed;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// A device that is there, or was.
#[repr(C)]
pub struct Device {
    c: ibv_device,
    /// The kernel's number for it, of which no two devices have the same.
    pub index: i32,
    gone: AtomicBool,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// `None` until it was asked for the first time.
static PRESENT: Mutex<Option<Option<&'static Device>>> = Mutex::new(None);

/// The device, if there is one now.
pub fn present() -> Option<&'static Device> {
    let mut present = PRESENT.lock().unwrap();
    *present.get_or_insert_with(|| (!fault::plan().no_device).then(Device::appear))
}

/// Takes the device away; returns it if there was one.
pub fn remove() -> Option<&'static Device> {
    let device = present()?;
    *PRESENT.lock().unwrap() = Some(None);
    device.gone.store(true, Ordering::SeqCst);
    Some(device)
}

/// A device comes that has the name and the GUID of the one before.
pub fn come_back() {
    *PRESENT.lock().unwrap() = Some(Some(Device::appear()));
}

impl Device {
    /// Kept for good, as its contexts and the application's lists may be.
    fn appear() -> &'static Device {
        static NEXT: AtomicI32 = AtomicI32::new(0);
        // SAFETY: all zeroes is a valid ibv_device.
        let mut c: ibv_device = unsafe { zeroed() };
        if habits().iwarp {
            c.node_type = ibv_node_type::IBV_NODE_RNIC;
            c.transport_type = ibv_transport_type::IBV_TRANSPORT_IWARP;
        } else {
            c.node_type = ibv_node_type::IBV_NODE_CA;
            c.transport_type = ibv_transport_type::IBV_TRANSPORT_IB;
        }
        super::context::copy_name(&mut c.name, "softrdma0");
        super::context::copy_name(&mut c.dev_name, "softrdma0");
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        Box::leak(Box::new(Device { c, index, gone: AtomicBool::new(false) }))
    }

    pub fn as_c(&self) -> *mut ibv_device {
        (&raw const self.c).cast_mut()
    }

    /// The device behind a C pointer.
    ///
    /// # Safety
    /// The pointer came from [`Device::as_c`].
    pub unsafe fn of(c: *mut ibv_device) -> &'static Device {
        // SAFETY: the caller's word; devices are never freed.
        unsafe { &*c.cast() }
    }

    pub fn guid(&self) -> u64 {
        node_guid()
    }

    /// Whether it was removed.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }
}
