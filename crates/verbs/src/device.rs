// SPDX-License-Identifier: BSD-3-Clause
//! Devices: which there are, their names and their limits.

use crate::Error;
use crate::library::call;
use rdma_sys::*;
use std::ffi::CStr;
use std::mem::MaybeUninit;

/// An open RDMA device, by its context. librdmacm opens it, and closes it once the device
/// was removed and no id is bound to it any more. So whoever keeps a device, or makes
/// something on it, keeps an id that is bound to it as well, for longer. Not comparable: a
/// context that is opened later may have the address of one that was closed.
#[derive(Clone, Copy, Debug)]
pub struct Device(pub(crate) *mut ibv_context);

/// What a device can do, as far as the transport asks.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most entries of one completion queue.
    pub completion_entries: u32,
    /// Completion vectors, at least 1.
    pub vectors: u32,
}

impl Device {
    /// Shows `each` all devices that the connection manager can use, which are open until
    /// this returns. librdmacm looks at what devices there are now, and closes those that
    /// were removed and that nothing uses any more.
    pub fn for_each(mut each: impl FnMut(Self)) {
        let mut count = 0;
        // SAFETY: a place for the count; the list is NULL-terminated and ours to free.
        unsafe {
            let list = call!(rdma_get_devices(&mut count));
            if list.is_null() {
                return;
            }
            (0..count as usize).for_each(|index| each(Self(*list.add(index))));
            call!(rdma_free_devices(list));
        }
    }

    /// The names of all devices that the connection manager can use.
    pub fn names() -> Vec<String> {
        let mut names = Vec::new();
        Self::for_each(|device| names.push(device.name()));
        names
    }

    /// The device's name, such as `mlx5_0`.
    pub fn name(self) -> String {
        // SAFETY: a live context has a live device with a NUL-terminated name.
        unsafe {
            let name = call!(ibv_get_device_name((*self.0).device));
            if name.is_null() {
                String::from("?")
            } else {
                CStr::from_ptr(name).to_string_lossy().into_owned()
            }
        }
    }

    /// Asks the device for its limits.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn limits(self) -> Result<Limits, Error> {
        let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: a live context and room for the answer, which is plain numbers.
        let attributes = unsafe {
            Error::check_number(
                "query the device",
                call!(ibv_query_device(self.0, attributes.as_mut_ptr())),
            )?;
            attributes.assume_init()
        };
        // SAFETY: a live context.
        let vectors = unsafe { (*self.0).num_comp_vectors };
        Ok(Limits {
            completion_entries: attributes.max_cqe.max(0) as u32,
            vectors: vectors.max(1) as u32,
        })
    }
}

// SAFETY: a context may be used from any thread (libibverbs is thread-safe); who keeps
// it keeps it open, see the type's text.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}
