// SPDX-License-Identifier: BSD-3-Clause
//! Open devices, and what a query says about them.

use super::cq::{Channel, Cq};
use super::device::Device;
use super::qp::Qp;
use super::srq::Srq;
use crate::habits::Habits;
use crate::notice::Notices;
use rdma_sys::*;
use std::mem::{offset_of, size_of, zeroed};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// What the device can do; a request beyond one of these fails.
pub mod limit {
    pub const QP: i32 = 65_536;
    pub const PD: i32 = 65_536;
    pub const MR: i32 = 1 << 20;
    pub const QP_WR: u32 = 16_384;
    pub const SGE: u32 = 32;
    pub const INLINE: u32 = 512;
    pub const CQE: i32 = 1 << 22;
    pub const SRQ_WR: u32 = 1 << 20;
    pub const READS: u8 = 128;
    pub const MESSAGE: u32 = 1 << 31;
    pub const MR_SIZE: u64 = 1 << 46;
}

/// An asynchronous event and the object it concerns.
pub struct AsyncEvent {
    pub kind: ibv_event_type,
    pub about: About,
}

/// What an asynchronous event is about.
#[derive(Clone)]
pub enum About {
    Cq(Arc<Cq>),
    Qp(Arc<Qp>),
    Srq(Arc<Srq>),
    Device,
}

/// An open device, as the application sees it plus our part.
#[repr(C)]
pub struct Context {
    pub verbs: verbs_context,
    pub events: Notices<AsyncEvent>,
    pub device: &'static Device,
    channels: Mutex<Vec<Weak<Channel>>>,
    closed: AtomicBool,
}

// SAFETY: the C part is written before the context is shared and constant after.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

pub fn copy_name<const N: usize>(to: &mut [std::ffi::c_char; N], name: &str) {
    for (dst, src) in to.iter_mut().zip(name.bytes()) {
        *dst = src as _;
    }
}

static CONTEXTS: Mutex<Vec<Weak<Context>>> = Mutex::new(Vec::new());

impl Context {
    /// Opens a device.
    pub fn open(device: &'static Device) -> Option<Arc<Context>> {
        if device.is_gone() {
            return None;
        }
        crate::engine::engine();
        let events = Notices::new().ok()?;
        // SAFETY: null function pointers and zeroes are what an unimplemented
        // verb looks like.
        let mut verbs: verbs_context = unsafe { zeroed() };
        verbs.sz = size_of::<verbs_context>();
        super::exports::fill(&mut verbs);
        let c = &mut verbs.context;
        c.device = device.as_c();
        c.cmd_fd = -1;
        c.async_fd = events.fd();
        c.num_comp_vectors = std::thread::available_parallelism().map_or(1, |n| n.get() as i32);
        // The mark of a context that has the extended verbs before it.
        c.abi_compat = usize::MAX as *mut _;
        let (channels, closed) = (Mutex::default(), AtomicBool::new(false));
        let context = Arc::new(Context { verbs, events, device, channels, closed });
        let mut all = CONTEXTS.lock().unwrap();
        all.retain(|c| c.strong_count() > 0);
        all.push(Arc::downgrade(&context));
        Some(context)
    }

    /// Every open context.
    pub fn all() -> Vec<Arc<Context>> {
        CONTEXTS.lock().unwrap().iter().filter_map(Weak::upgrade).collect()
    }

    /// What its device does in its own way.
    pub fn habits(&self) -> &'static Habits {
        self.device.habits
    }

    pub fn as_c(self: &Arc<Self>) -> *mut ibv_context {
        (&raw const self.verbs.context).cast_mut()
    }

    /// The context behind a C pointer.
    ///
    /// # Safety
    /// The pointer came from [`Context::as_c`] of a context that is still open.
    pub unsafe fn share(c: *mut ibv_context) -> Arc<Context> {
        let start = c.wrapping_byte_sub(offset_of!(Context, verbs.context));
        // SAFETY: the caller's word.
        unsafe { crate::handle::share(start) }
    }

    /// A channel of this context, which the device's removal closes.
    pub fn enter(&self, channel: &Arc<Channel>) {
        let mut channels = self.channels.lock().unwrap();
        channels.retain(|other| other.strong_count() > 0);
        channels.push(Arc::downgrade(channel));
    }

    /// The device was removed: every descriptor of the context is in error from now on.
    pub fn dissociate(&self) {
        self.events.close();
        for channel in self.channels.lock().unwrap().iter().filter_map(Weak::upgrade) {
            channel.notices.close();
        }
    }

    /// The context is closed. Whoever uses it, or what was made on it, from here on is told.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// As [`close`](Self::close), for librdmacm: the memory stays, so that a use which keeps
    /// the pointer for too long is always found out, and only the descriptor goes.
    pub fn close_for_good(self: Arc<Self>) {
        self.close();
        self.events.give_up_descriptor();
        std::mem::forget(self);
    }

    /// Ends the process if the context is closed: with a real library this would be a use of
    /// freed memory, and anything may come of that.
    pub fn check_open(&self, what: &str) {
        if self.closed.load(Ordering::Relaxed) {
            eprintln!("softrdma: {what} on a device whose ibv_context is closed");
            std::process::abort();
        }
    }

    /// As [`check_open`](Self::check_open), for what the kernel has to do: it answers EIO once
    /// the device is gone.
    pub fn check_there(&self, what: &str) -> Result<(), i32> {
        self.check_open(what);
        if self.device.is_gone() { Err(libc::EIO) } else { Ok(()) }
    }

    pub fn notify(&self, kind: ibv_event_type, about: About) {
        self.events.push(AsyncEvent { kind, about });
    }
}

/// A number that no two objects of the process share.
pub fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn device_attributes(device: &Device, a: &mut ibv_device_attr) {
    let habits = device.habits;
    // SAFETY: all zeroes is a valid ibv_device_attr.
    *a = unsafe { zeroed() };
    copy_name(&mut a.fw_ver, "softrdma");
    a.node_guid = device.guid();
    a.sys_image_guid = device.guid();
    a.max_mr_size = limit::MR_SIZE;
    a.page_size_cap = 0xffff_f000;
    a.vendor_id = habits.vendor;
    a.max_qp = habits.max_qp;
    a.max_qp_wr = limit::QP_WR as i32;
    a.device_cap_flags = ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW.0
        | ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0
        | ibv_device_cap_flags::IBV_DEVICE_MEM_MGT_EXTENSIONS.0
        | ibv_device_cap_flags::IBV_DEVICE_RC_RNR_NAK_GEN.0
        | ibv_device_cap_flags::IBV_DEVICE_SRQ_RESIZE.0;
    a.max_sge = limit::SGE as i32;
    a.max_sge_rd = limit::SGE as i32;
    a.max_cq = 65_536;
    a.max_cqe = habits.max_cqe;
    a.max_mr = habits.max_mr;
    a.max_pd = habits.max_pd;
    a.max_qp_rd_atom = i32::from(limit::READS);
    a.max_res_rd_atom = i32::from(limit::READS) * limit::QP;
    a.max_qp_init_rd_atom = i32::from(limit::READS);
    a.atomic_cap = ibv_atomic_cap::IBV_ATOMIC_NONE;
    a.max_mw = 1 << 20;
    a.max_srq = 65_536;
    a.max_srq_wr = limit::SRQ_WR as i32;
    a.max_srq_sge = limit::SGE as i32;
    a.max_pkeys = 1;
    a.local_ca_ack_delay = 15;
    a.phys_port_cnt = 1;
}

pub fn port_attributes(a: &mut ibv_port_attr) {
    // SAFETY: all zeroes is a valid ibv_port_attr.
    *a = unsafe { zeroed() };
    a.state = ibv_port_state::IBV_PORT_ACTIVE;
    a.max_mtu = ibv_mtu::IBV_MTU_4096;
    a.active_mtu = ibv_mtu::IBV_MTU_4096;
    a.gid_tbl_len = 1;
    a.max_msg_sz = limit::MESSAGE;
    a.pkey_tbl_len = 1;
    a.max_vl_num = 1;
    a.active_width = 1;
    a.active_speed = 1;
    a.phys_state = 5;
    a.link_layer = 2; // Ethernet: addresses are IP addresses, as with RoCE.
}
