// SPDX-License-Identifier: BSD-3-Clause
//! Devices: which there are, their names and their limits.

use crate::Error;
use crate::cm::Id;
use crate::library::call;
use rdma_sys::*;
use std::ffi::CStr;
use std::fmt;
use std::mem::MaybeUninit;
use std::sync::Arc;

/// An open RDMA device. librdmacm opens it, and closes it once the device was removed and no id
/// is bound to it any more; so this keeps what holds it open. Not comparable: a context that is
/// opened later may have the address of one that was closed.
#[derive(Clone, Debug)]
pub struct Device {
    context: *mut ibv_context,
    _held_by: Holder,
}

#[derive(Clone, Debug)]
enum Holder {
    Id { _id: Arc<Id> },
    List { _list: Arc<List> },
}

impl Id {
    /// The device that serves the id, once there is one.
    pub fn device(self: &Arc<Self>) -> Option<Device> {
        // SAFETY: a live id.
        let context = unsafe { (*self.raw()).verbs };
        let held_by = Holder::Id { _id: Arc::clone(self) };
        (!context.is_null()).then_some(Device { context, _held_by: held_by })
    }
}

/// All devices that there were when it was made.
#[derive(Debug)]
struct List(*mut *mut ibv_context);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by rdma_get_devices, freed here alone; no device of it is left.
        unsafe { call!(rdma_free_devices(self.0)) }
    }
}

/// Broadcom's number.
pub const BROADCOM: u32 = 0x14e4;

/// Soft-RoCE's numbers, of older kernels and of newer ones (`RXE_VENDOR_ID`).
const SOFT_ROCE: [u32; 2] = [0, 0xff_ffff];

/// A device's limits, as far as this crate needs them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most entries of one completion queue.
    pub completion_entries: u32,
    /// Most work requests of one queue of a queue pair.
    pub work_requests: u32,
    /// Completion vectors, at least 1.
    pub vectors: u32,
    /// The vendor's number.
    pub vendor: u32,
}

impl Limits {
    /// Whether it is the kernel's Soft-RoCE.
    pub fn is_soft_roce(&self) -> bool {
        SOFT_ROCE.contains(&self.vendor)
    }
}

/// What a device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name, such as `mlx5_0`.
    pub name: String,
    /// Whether its transport is iWARP, and not InfiniBand or RoCE.
    pub iwarp: bool,
    /// The version of its firmware.
    pub firmware: String,
    /// The vendor's number.
    pub vendor: u32,
    /// The vendor's number of the part.
    pub part: u32,
    /// The GUID of the node.
    pub guid: u64,
    /// Most queue pairs.
    pub queue_pairs: u32,
    /// Most completion queues.
    pub completion_queues: u32,
    /// Most entries of one completion queue.
    pub completion_entries: u32,
    /// Most registered regions.
    pub regions: u32,
    /// Most protection domains.
    pub domains: u32,
    /// Completion vectors.
    pub vectors: u32,
}

/// In one line.
impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, firmware {}, vendor {:#06x} part {}, GUID {:016x}, at most {} queue pairs, \
             {} completion queues of {} entries, {} regions, {} protection domains; {} completion \
             vectors",
            self.name,
            if self.iwarp { "iWARP" } else { "InfiniBand or RoCE" },
            if self.firmware.is_empty() { "unknown" } else { &self.firmware },
            self.vendor,
            self.part,
            self.guid,
            self.queue_pairs,
            self.completion_queues,
            self.completion_entries,
            self.regions,
            self.domains,
            self.vectors,
        )
    }
}

impl Device {
    pub(crate) fn context(&self) -> *mut ibv_context {
        self.context
    }

    /// All devices that the connection manager can use. librdmacm looks at what devices there
    /// are now, and closes those that were removed and that nothing uses any more.
    pub fn all() -> Vec<Self> {
        let mut count = 0;
        // SAFETY: a place for the count. The list holds as many devices.
        unsafe {
            let list = call!(rdma_get_devices(&mut count));
            if list.is_null() {
                return Vec::new();
            }
            let owner = Arc::new(List(list));
            let device = |index| Self {
                context: *list.add(index),
                _held_by: Holder::List { _list: Arc::clone(&owner) },
            };
            (0..count as usize).map(device).collect()
        }
    }

    /// The device's name, such as `mlx5_0`.
    pub fn name(&self) -> String {
        // SAFETY: a live context has a live device with a NUL-terminated name.
        unsafe {
            let name = call!(ibv_get_device_name((*self.context).device));
            if name.is_null() {
                String::from("?")
            } else {
                CStr::from_ptr(name).to_string_lossy().into_owned()
            }
        }
    }

    /// Whether the library knows the kernel's number of the device, by which it tells it from
    /// another of the same GUID, such as the same one after a reset. It asks for it by netlink.
    pub fn has_index(&self) -> bool {
        // SAFETY: a live context has a live device.
        unsafe { call!(ibv_get_device_index((*self.context).device)) >= 0 }
    }

    /// What the device says of itself.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn facts(&self) -> Result<Facts, Error> {
        let attributes = self.attributes()?;
        // SAFETY: text that ends in a NUL, inside the structure.
        let firmware = unsafe { CStr::from_ptr(attributes.fw_ver.as_ptr()) };
        // SAFETY: a live context.
        let vectors = unsafe { (*self.context).num_comp_vectors };
        Ok(Facts {
            name: self.name(),
            iwarp: self.is_iwarp(),
            firmware: firmware.to_string_lossy().into_owned(),
            vendor: attributes.vendor_id,
            part: attributes.vendor_part_id,
            guid: u64::from_be(attributes.node_guid),
            queue_pairs: attributes.max_qp.max(0) as u32,
            completion_queues: attributes.max_cq.max(0) as u32,
            completion_entries: attributes.max_cqe.max(0) as u32,
            regions: attributes.max_mr.max(0) as u32,
            domains: attributes.max_pd.max(0) as u32,
            vectors: vectors.max(0) as u32,
        })
    }

    /// Whether its transport is iWARP.
    pub fn is_iwarp(&self) -> bool {
        // SAFETY: a live context has a live device.
        unsafe {
            (*(*self.context).device).transport_type == ibv_transport_type::IBV_TRANSPORT_IWARP
        }
    }

    fn attributes(&self) -> Result<ibv_device_attr, Error> {
        let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: a live context and room for the answer, which is plain numbers.
        unsafe {
            Error::check_number(
                "query the device",
                call!(ibv_query_device(self.context, attributes.as_mut_ptr())),
            )?;
            Ok(attributes.assume_init())
        }
    }

    /// Asks the device for its limits.
    ///
    /// # Errors
    /// If the device does not answer.
    pub fn limits(&self) -> Result<Limits, Error> {
        let attributes = self.attributes()?;
        // SAFETY: a live context.
        let vectors = unsafe { (*self.context).num_comp_vectors };
        Ok(Limits {
            completion_entries: attributes.max_cqe.max(0) as u32,
            work_requests: attributes.max_qp_wr.max(0) as u32,
            vectors: vectors.max(1) as u32,
            vendor: attributes.vendor_id,
        })
    }
}

// SAFETY: a context may be used from any thread, libibverbs is thread-safe.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}
// SAFETY: the list is only read, and freed once.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}
