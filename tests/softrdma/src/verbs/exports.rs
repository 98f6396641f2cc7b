// SPDX-License-Identifier: BSD-3-Clause
//! The C interface of libibverbs: functions by name, and those that programs
//! reach through a context's table of operations.
//!
//! Every pointer comes from an application that keeps to the manual: it is valid
//! for its type, and an object is not used after its destruction. That is the
//! reason behind each `unsafe` block here.

use super::context::*;
use super::cq::{Channel, Cq};
use super::device::{self, Device};
use super::memory::{self, Pd};
use super::qp::Qp;
use super::srq::Srq;
use super::strings;
use super::work::RecvWork;
use crate::fault::{self, Point};
use crate::sys::set_errno;
use crate::{fork, handle, removal};
use rdma_sys::*;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::{size_of, zeroed};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A pointer result: null and errno on failure.
fn pointer<T>(result: Result<*mut T, i32>) -> *mut T {
    result.unwrap_or_else(|code| {
        set_errno(code);
        null_mut()
    })
}

fn failed(code: i32) -> c_int {
    set_errno(code);
    -1
}

/// Puts the operations into a context's tables.
pub fn fill(verbs: &mut verbs_context) {
    verbs.query_port = Some(query_port);
    verbs.create_qp_ex = Some(create_qp_ex);
    verbs.create_srq_ex = Some(create_srq_ex);
    let ops = &mut verbs.context.ops;
    ops.alloc_mw = Some(alloc_mw);
    ops.bind_mw = Some(bind_mw);
    ops.dealloc_mw = Some(dealloc_mw);
    ops.poll_cq = Some(poll_cq);
    ops.req_notify_cq = Some(req_notify_cq);
    ops.post_srq_recv = Some(post_srq_recv);
    ops.post_send = Some(post_send);
    ops.post_recv = Some(post_recv);
}

// Devices and contexts.

#[unsafe(no_mangle)]
extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let devices = device::present();
    let room = devices.len() + 1;
    // SAFETY: the pointers' room, freed by ibv_free_device_list.
    let list = unsafe { libc::calloc(room, size_of::<*mut ibv_device>()) };
    let list = list.cast::<*mut ibv_device>();
    if !list.is_null() {
        // SAFETY: allocated above; `count` may be null.
        unsafe {
            for (place, device) in devices.iter().enumerate() {
                list.add(place).write(device.as_c());
            }
            if !count.is_null() {
                count.write(devices.len() as c_int);
            }
        }
    }
    list
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    // SAFETY: from ibv_get_device_list.
    unsafe { libc::free(list.cast()) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: a device of ours.
    unsafe { (&raw const (*device).name).cast() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_index(device: *mut ibv_device) -> c_int {
    // SAFETY: a device of ours.
    let device = unsafe { Device::of(device) };
    if device.habits.netlink { device.index } else { -1 }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_guid(device: *mut ibv_device) -> u64 {
    // SAFETY: a device of ours.
    unsafe { Device::of(device) }.guid()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: a device of ours.
    let device = unsafe { Device::of(device) };
    if fork::in_child() || device.is_gone() {
        return pointer(Err(libc::ENODEV));
    }
    pointer(
        Context::open(device)
            .map(|c| {
                let pointer = c.as_c();
                std::mem::forget(c);
                pointer
            })
            .ok_or(libc::EMFILE),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: the application's reference, which it gives up.
    unsafe {
        let context = Context::share(context);
        context.check_open("ibv_close_device");
        context.close();
        Arc::decrement_strong_count(Arc::as_ptr(&context));
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(c: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    // SAFETY: see above.
    let context = unsafe { Context::share(c) };
    if let Err(code) = context.check_there("ibv_query_device") {
        return code;
    }
    // SAFETY: see above.
    device_attributes(context.device, unsafe { &mut *attr });
    0
}

unsafe extern "C" fn query_port(
    _context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    len: usize,
) -> c_int {
    if port != 1 {
        return libc::EINVAL;
    }
    // SAFETY: zeroes are valid; no more is written than the caller has room for.
    unsafe {
        let mut full: ibv_port_attr = zeroed();
        port_attributes(&mut full);
        let n = len.min(size_of::<ibv_port_attr>());
        std::ptr::copy_nonoverlapping((&raw const full).cast::<u8>(), attr.cast(), n);
    }
    0
}

/// The old form, whose structure ends before `flags`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(
    context: *mut ibv_context,
    port: u8,
    attr: *mut c_void,
) -> c_int {
    let len = std::mem::offset_of!(ibv_port_attr, flags);
    // SAFETY: see above.
    unsafe { query_port(context, port, attr.cast(), len) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid(
    context: *mut ibv_context,
    port: u8,
    index: c_int,
    out: *mut ibv_gid,
) -> c_int {
    if port != 1 || index != 0 {
        return failed(libc::EINVAL);
    }
    // SAFETY: see above.
    unsafe { out.write(Context::share(context).device.gid()) };
    0
}

const GID_TYPE_ROCE_V2: u32 = 2;

#[unsafe(no_mangle)]
unsafe extern "C" fn _ibv_query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    _flags: u32,
    _size: usize,
) -> c_int {
    if port != 1 || index != 0 {
        return libc::EINVAL;
    }
    let found = ibv_gid_entry {
        // SAFETY: see above.
        gid: unsafe { Context::share(context) }.device.gid(),
        gid_index: 0,
        port_num: 1,
        gid_type: GID_TYPE_ROCE_V2,
        ndev_ifindex: 1,
    };
    // SAFETY: see above.
    unsafe { entry.write(found) };
    0
}

/// For ibv_devinfo, which names a private function of rdma-core's.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid_type(
    _context: *mut ibv_context,
    port: u8,
    index: c_uint,
    out: *mut c_uint,
) -> c_int {
    const ROCE_V2: c_uint = 1;
    if port != 1 || index != 0 {
        return failed(libc::EINVAL);
    }
    // SAFETY: see above.
    unsafe { out.write(ROCE_V2) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _ibv_query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    flags: u32,
    size: usize,
) -> isize {
    if max == 0 {
        return 0;
    }
    // SAFETY: room for at least one entry.
    unsafe { _ibv_query_gid_ex(context, 1, 0, entries, flags, size) };
    1
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_pkey(
    _c: *mut ibv_context,
    port: u8,
    index: c_int,
    out: *mut u16,
) -> c_int {
    if port != 1 || index != 0 {
        return failed(libc::EINVAL);
    }
    // SAFETY: see above.
    unsafe { out.write(0xffff) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_get_pkey_index(_context: *mut ibv_context, port: u8, pkey: u16) -> c_int {
    if port == 1 && pkey == 0xffff { 0 } else { failed(libc::EINVAL) }
}

// Forking.

static FORK_INIT: AtomicBool = AtomicBool::new(false);

/// Nothing to do: no page is pinned, so the kernel copies them all on write.
#[unsafe(no_mangle)]
extern "C" fn ibv_fork_init() -> c_int {
    FORK_INIT.store(true, Ordering::Relaxed);
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_is_fork_initialized() -> c_uint {
    const DISABLED: c_uint = 0;
    const ENABLED: c_uint = 1;
    if FORK_INIT.load(Ordering::Relaxed) { ENABLED } else { DISABLED }
}

// Protection domains and memory.

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { Context::share(context) }.check_there("ibv_alloc_pd") {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    pointer(Pd::new(unsafe { Context::share(context) }).map(handle::into_c))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe {
        handle::borrow::<Pd, _>(pd).context.check_open("ibv_dealloc_pd");
        if handle::borrow::<Pd, _>(pd).busy() {
            return libc::EBUSY;
        }
        drop(handle::take::<Pd, _>(pd));
    }
    0
}

unsafe fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { &handle::borrow::<Pd, _>(pd).context }.check_there("ibv_reg_mr") {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    let pd = unsafe { handle::share::<Pd, _>(pd) };
    pointer(memory::register(pd, addr.cast(), length, iova, access))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: see above.
    unsafe { register(pd, addr, length, addr as u64, access as c_uint) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: see above.
    unsafe { register(pd, addr, length, iova, access as c_uint) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: see above.
    unsafe { register(pd, addr, length, iova, access) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe { memory::deregister(mr) }
}

#[unsafe(no_mangle)]
extern "C" fn ibv_rereg_mr(
    _mr: *mut ibv_mr,
    _flags: c_int,
    _pd: *mut ibv_pd,
    _addr: *mut c_void,
    _length: usize,
    _access: c_int,
) -> c_int {
    set_errno(libc::EOPNOTSUPP);
    -1 // IBV_REREG_MR_ERR_INPUT: the region stays as it was.
}

unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: ibv_mw_type::Type) -> *mut ibv_mw {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { &handle::borrow::<Pd, _>(pd).context }.check_there("ibv_alloc_mw") {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    pointer(memory::allocate_window(unsafe { handle::share::<Pd, _>(pd) }, kind))
}

unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe { memory::free_window(mw) };
    0
}

/// Type-1 windows are not implemented.
unsafe extern "C" fn bind_mw(_qp: *mut ibv_qp, _mw: *mut ibv_mw, _bind: *mut ibv_mw_bind) -> c_int {
    libc::EOPNOTSUPP
}

// Completion channels and queues.

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { Context::share(context) }.check_there("ibv_create_comp_channel") {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    let context = unsafe { Context::share(context) };
    pointer(Channel::new(context).map(handle::into_c).ok_or(libc::EMFILE))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe {
        let context = &handle::borrow::<Channel, _>(channel).context;
        context.check_open("ibv_destroy_comp_channel");
        if handle::borrow::<Channel, _>(channel).users.load(Ordering::Relaxed) > 0 {
            return libc::EBUSY;
        }
        drop(handle::take::<Channel, _>(channel));
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    user: *mut c_void,
    channel: *mut ibv_comp_channel,
    vector: c_int,
) -> *mut ibv_cq {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { Context::share(context) }.check_there("ibv_create_cq") {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    let (context, channel) = unsafe {
        let channel = (!channel.is_null()).then(|| handle::share::<Channel, _>(channel));
        (Context::share(context), channel)
    };
    if vector < 0 || vector >= context.verbs.context.num_comp_vectors {
        return pointer(Err(libc::EINVAL));
    }
    pointer(Cq::new(context, cqe, user, channel).map(handle::into_c))
}

#[unsafe(no_mangle)]
extern "C" fn ibv_resize_cq(_cq: *mut ibv_cq, _cqe: c_int) -> c_int {
    libc::EOPNOTSUPP
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_cq(c: *mut ibv_cq) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let cq = unsafe { handle::share::<Cq, _>(c) };
    cq.context.check_open("ibv_destroy_cq");
    if cq.in_use() {
        return libc::EBUSY;
    }
    if let Some(channel) = &cq.channel {
        channel.leave(&cq);
    }
    cq.context.events.remove(|e| matches!(&e.about, About::Cq(other) if Arc::ptr_eq(other, &cq)));
    cq.acks.wait();
    cq.async_acks.wait();
    // SAFETY: see above.
    drop(unsafe { handle::take::<Cq, _>(c) });
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    user: *mut *mut c_void,
) -> c_int {
    if fork::in_child() {
        return failed(libc::ENODEV);
    }
    // SAFETY: see above.
    match unsafe { handle::borrow::<Channel, _>(channel) }.next() {
        Ok(event) => {
            // SAFETY: see above.
            unsafe {
                cq.write((&raw const event.c).cast_mut());
                user.write(event.c.cq_context);
            }
            0
        }
        Err(code) => failed(code),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(cq: *mut ibv_cq, n: c_uint) {
    if fork::in_child() {
        return;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<Cq, _>(cq) }.acks.ack(n);
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
    if fork::in_child() {
        return -1;
    }
    // SAFETY: see above.
    unsafe {
        let cq = handle::borrow::<Cq, _>(cq);
        cq.context.check_open("ibv_poll_cq");
        cq.poll(n, wc)
    }
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let cq = unsafe { handle::borrow::<Cq, _>(cq) };
    // By the kernel, as Soft-RoCE's.
    if let Err(code) = cq.context.check_there("ibv_req_notify_cq") {
        return code;
    }
    cq.arm(solicited_only != 0);
    0
}

// Shared receive queues.

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_create_srq(
    pd: *mut ibv_pd,
    init: *mut ibv_srq_init_attr,
) -> *mut ibv_srq {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { &handle::borrow::<Pd, _>(pd).context }.check_there("ibv_create_srq")
    {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    let (pd, init) = unsafe { (handle::share::<Pd, _>(pd), &mut *init) };
    pointer(Srq::new(pd, &init.attr, init.srq_context).map(|srq| {
        srq.query(&mut init.attr);
        handle::into_c(srq)
    }))
}

unsafe extern "C" fn create_srq_ex(
    context: *mut ibv_context,
    init: *mut ibv_srq_init_attr_ex,
) -> *mut ibv_srq {
    // SAFETY: see above.
    let ex = unsafe { &mut *init };
    let typed = ex.comp_mask & ibv_srq_init_attr_mask::IBV_SRQ_INIT_ATTR_TYPE.0 != 0;
    if typed && ex.srq_type != ibv_srq_type::IBV_SRQT_BASIC || ex.pd.is_null() {
        return pointer(Err(libc::EOPNOTSUPP));
    }
    let _ = context;
    // The extended structure begins with the basic one.
    // SAFETY: see above.
    unsafe { ibv_create_srq(ex.pd, init.cast()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_srq(
    srq: *mut ibv_srq,
    attr: *mut ibv_srq_attr,
    mask: c_int,
) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<Srq, _>(srq).modify(&*attr, mask as u32) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<Srq, _>(srq).query(&mut *attr) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_srq(c: *mut ibv_srq) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let srq = unsafe { handle::share::<Srq, _>(c) };
    srq.context.check_open("ibv_destroy_srq");
    if srq.users.load(Ordering::Relaxed) > 0 {
        return libc::EBUSY;
    }
    srq.context
        .events
        .remove(|e| matches!(&e.about, About::Srq(other) if Arc::ptr_eq(other, &srq)));
    srq.async_acks.wait();
    srq.pd.release();
    // SAFETY: see above.
    drop(unsafe { handle::take::<Srq, _>(c) });
    0
}

/// Copies a receive work request.
unsafe fn receive(wr: &ibv_recv_wr) -> RecvWork {
    let sges = if wr.num_sge <= 0 {
        Vec::new()
    } else {
        // SAFETY: num_sge entries.
        unsafe { std::slice::from_raw_parts(wr.sg_list, wr.num_sge as usize) }.to_vec()
    };
    RecvWork { wr_id: wr.wr_id, sges }
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    mut wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let srq = unsafe { handle::borrow::<Srq, _>(srq) };
    while !wr.is_null() {
        // SAFETY: see above.
        let one = unsafe { &*wr };
        let code = if let Some(code) = fault::strikes(Point::PostReceive) {
            code as c_int
        } else if one.num_sge as u32 > srq.max_sge {
            srq.context.habits().as_returned(libc::EINVAL)
        // SAFETY: see above.
        } else if !srq.post(unsafe { receive(one) }) {
            srq.context.habits().as_returned(srq.context.habits().full)
        } else {
            0
        };
        if code != 0 {
            // SAFETY: see above.
            unsafe { bad.write(wr) };
            return code;
        }
        wr = one.next;
    }
    0
}

// Queue pairs.

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_create_qp(
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> *mut ibv_qp {
    if fork::in_child() {
        return pointer(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    if let Err(code) = unsafe { &handle::borrow::<Pd, _>(pd).context }.check_there("ibv_create_qp")
    {
        return pointer(Err(code));
    }
    // SAFETY: see above.
    let (pd, init) = unsafe { (handle::share::<Pd, _>(pd), &mut *init) };
    pointer(Qp::new(pd, init).map(|qp| {
        init.cap = qp.cap;
        handle::into_c(qp)
    }))
}

unsafe extern "C" fn create_qp_ex(
    _context: *mut ibv_context,
    init: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    // SAFETY: see above.
    let ex = unsafe { &*init };
    if ex.comp_mask != ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0 {
        return pointer(Err(libc::EOPNOTSUPP));
    }
    // The extended structure begins with the basic one.
    // SAFETY: see above.
    unsafe { ibv_create_qp(ex.pd, init.cast()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let qp = unsafe { handle::share::<Qp, _>(qp) };
    if let Err(code) = qp.context.check_there("ibv_modify_qp") {
        return code;
    }
    // SAFETY: see above.
    qp.modify(unsafe { &*attr }, mask as u32)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _mask: c_int,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<Qp, _>(qp).query(&mut *attr, &mut *init) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_destroy_qp(c: *mut ibv_qp) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let qp = unsafe { handle::share::<Qp, _>(c) };
    qp.context.check_open("ibv_destroy_qp");
    qp.destroy();
    qp.context.events.remove(|e| matches!(&e.about, About::Qp(other) if Arc::ptr_eq(other, &qp)));
    qp.async_acks.wait();
    // SAFETY: see above.
    drop(unsafe { handle::take::<Qp, _>(c) });
    0
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let qp = unsafe { handle::borrow::<Qp, _>(qp) };
    // The doorbell is the kernel's, as Soft-RoCE's.
    if let Err(code) = qp.context.check_there("ibv_post_send") {
        // SAFETY: see above.
        unsafe { bad.write(wr) };
        return code;
    }
    let mut inner = qp.lock();
    let mut result = 0;
    while !wr.is_null() {
        // SAFETY: see above.
        let one = unsafe { &*wr };
        let planned = fault::strikes(Point::PostSend)
            .or(fault::strikes(Point::SendQueueFull).map(|_| libc::ENOMEM as u64));
        // SAFETY: see above.
        let posted = match planned {
            Some(code) => Err(code as i32),
            // SAFETY: see above.
            None => unsafe { qp.post_send(one, &mut inner) },
        };
        removal::consider(qp);
        if let Err(code) = posted {
            // SAFETY: see above.
            unsafe { bad.write(wr) };
            result = qp.habits().as_returned(code);
            break;
        }
        wr = one.next;
    }
    qp.run(&mut inner);
    drop(inner);
    qp.arm_deferred();
    result
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    mut wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    if fork::in_child() {
        return libc::ENODEV;
    }
    // SAFETY: see above.
    let qp = unsafe { handle::borrow::<Qp, _>(qp) };
    qp.context.check_open("ibv_post_recv");
    let mut inner = qp.lock();
    let mut result = 0;
    while !wr.is_null() {
        // SAFETY: see above.
        let one = unsafe { &*wr };
        let posted = match fault::strikes(Point::PostReceive) {
            Some(code) => Err(code as i32),
            // SAFETY: see above.
            None => qp.post_recv(unsafe { receive(one) }, &mut inner),
        };
        if let Err(code) = posted {
            // SAFETY: see above.
            unsafe { bad.write(wr) };
            result = qp.habits().as_returned(code);
            break;
        }
        wr = one.next;
    }
    drop(inner);
    qp.arm_deferred();
    result
}

// Asynchronous events.

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(
    context: *mut ibv_context,
    out: *mut ibv_async_event,
) -> c_int {
    if fork::in_child() {
        return failed(libc::ENODEV);
    }
    // SAFETY: see above.
    let context = unsafe { Context::share(context) };
    let reported = |event: &AsyncEvent| match &event.about {
        About::Cq(cq) => cq.async_acks.reported(),
        About::Qp(qp) => qp.async_acks.reported(),
        About::Srq(srq) => srq.async_acks.reported(),
        About::Device => {}
    };
    match context.events.pop(|| false, reported) {
        Ok(event) => {
            let element = match &event.about {
                About::Cq(cq) => {
                    ibv_async_event_element_t { cq: Arc::as_ptr(cq).cast_mut().cast() }
                }
                About::Qp(qp) => {
                    ibv_async_event_element_t { qp: Arc::as_ptr(qp).cast_mut().cast() }
                }
                About::Srq(srq) => {
                    ibv_async_event_element_t { srq: Arc::as_ptr(srq).cast_mut().cast() }
                }
                About::Device => {
                    // Whoever looks at the pointer in its place finds no leftovers in the rest.
                    let mut element = ibv_async_event_element_t { cq: null_mut() };
                    element.port_num = 1;
                    element
                }
            };
            // SAFETY: see above.
            unsafe { out.write(ibv_async_event { element, event_type: event.kind }) };
            0
        }
        Err(code) => failed(code),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(event: *mut ibv_async_event) {
    if fork::in_child() {
        return;
    }
    use ibv_event_type::*;
    // SAFETY: the element is of the kind that the event's type says.
    unsafe {
        let e = &*event;
        match e.event_type {
            IBV_EVENT_CQ_ERR => handle::borrow::<Cq, _>(e.element.cq).async_acks.ack(1),
            IBV_EVENT_QP_FATAL
            | IBV_EVENT_QP_REQ_ERR
            | IBV_EVENT_QP_ACCESS_ERR
            | IBV_EVENT_COMM_EST
            | IBV_EVENT_SQ_DRAINED
            | IBV_EVENT_PATH_MIG
            | IBV_EVENT_PATH_MIG_ERR
            | IBV_EVENT_QP_LAST_WQE_REACHED => {
                handle::borrow::<Qp, _>(e.element.qp).async_acks.ack(1);
            }
            IBV_EVENT_SRQ_ERR | IBV_EVENT_SRQ_LIMIT_REACHED => {
                handle::borrow::<Srq, _>(e.element.srq).async_acks.ack(1);
            }
            _ => {}
        }
    }
}

// Names.

fn name(text: &'static CStr) -> *const c_char {
    text.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ibv_wc_status_str(status: ibv_wc_status::Type) -> *const c_char {
    name(strings::status(status))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_event_type_str(event: c_uint) -> *const c_char {
    name(strings::event(event))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_port_state_str(state: ibv_port_state::Type) -> *const c_char {
    name(strings::port_state(state))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_node_type_str(kind: ibv_node_type::Type) -> *const c_char {
    name(strings::node_type(kind))
}

// What a device without the capability says: datagrams, multicast, extended
// objects of other kinds.

#[unsafe(no_mangle)]
extern "C" fn ibv_create_ah(_pd: *mut ibv_pd, _attr: *mut c_void) -> *mut c_void {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_create_ah_from_wc(
    _pd: *mut ibv_pd,
    _wc: *mut ibv_wc,
    _grh: *mut c_void,
    _port: u8,
) -> *mut c_void {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_init_ah_from_wc(
    _context: *mut ibv_context,
    _port: u8,
    _wc: *mut ibv_wc,
    _grh: *mut c_void,
    _attr: *mut c_void,
) -> c_int {
    failed(libc::EOPNOTSUPP)
}
#[unsafe(no_mangle)]
extern "C" fn ibv_destroy_ah(_ah: *mut c_void) -> c_int {
    libc::EOPNOTSUPP
}
#[unsafe(no_mangle)]
extern "C" fn ibv_attach_mcast(_qp: *mut ibv_qp, _gid: *const ibv_gid, _lid: u16) -> c_int {
    libc::EOPNOTSUPP
}
#[unsafe(no_mangle)]
extern "C" fn ibv_detach_mcast(_qp: *mut ibv_qp, _gid: *const ibv_gid, _lid: u16) -> c_int {
    libc::EOPNOTSUPP
}
#[unsafe(no_mangle)]
extern "C" fn ibv_qp_to_qp_ex(_qp: *mut ibv_qp) -> *mut c_void {
    null_mut()
}
#[unsafe(no_mangle)]
extern "C" fn ibv_reg_dmabuf_mr(
    _pd: *mut ibv_pd,
    _offset: u64,
    _length: usize,
    _iova: u64,
    _fd: c_int,
    _access: c_int,
) -> *mut ibv_mr {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_query_ece(_qp: *mut ibv_qp, _ece: *mut c_void) -> c_int {
    libc::EOPNOTSUPP
}
#[unsafe(no_mangle)]
extern "C" fn ibv_set_ece(_qp: *mut ibv_qp, _ece: *mut c_void) -> c_int {
    libc::EOPNOTSUPP
}
#[unsafe(no_mangle)]
extern "C" fn ibv_query_qp_data_in_order(_qp: *mut ibv_qp, _op: c_uint, _flags: u32) -> c_int {
    0
}
#[unsafe(no_mangle)]
extern "C" fn ibv_import_device(_fd: c_int) -> *mut ibv_context {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_import_pd(_context: *mut ibv_context, _handle: u32) -> *mut ibv_pd {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_import_mr(_pd: *mut ibv_pd, _handle: u32) -> *mut ibv_mr {
    pointer(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
extern "C" fn ibv_get_sysfs_path() -> *const c_char {
    c"/sys".as_ptr()
}
#[unsafe(no_mangle)]
extern "C" fn ibv_read_sysfs_file(
    _dir: *const c_char,
    _file: *const c_char,
    _buf: *mut c_char,
    _size: usize,
) -> c_int {
    failed(libc::ENOENT)
}
#[unsafe(no_mangle)]
extern "C" fn ibv_rate_to_mult(_rate: c_uint) -> c_int {
    -1
}
#[unsafe(no_mangle)]
extern "C" fn ibv_rate_to_mbps(_rate: c_uint) -> c_int {
    -1
}
#[unsafe(no_mangle)]
extern "C" fn mult_to_ibv_rate(_mult: c_int) -> c_uint {
    0
}
#[unsafe(no_mangle)]
extern "C" fn mbps_to_ibv_rate(_mbps: c_int) -> c_uint {
    0
}
#[unsafe(no_mangle)]
extern "C" fn ibv_dontfork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}
#[unsafe(no_mangle)]
extern "C" fn ibv_dofork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_resolve_eth_l2_from_gid(
    _context: *mut ibv_context,
    _attr: *mut c_void,
    _mac: *mut u8,
    _vid: *mut u16,
) -> c_int {
    failed(libc::EOPNOTSUPP)
}
#[unsafe(no_mangle)]
extern "C" fn ibv_import_dm(_context: *mut ibv_context, _handle: u32) -> *mut c_void {
    pointer(Err(libc::EOPNOTSUPP))
}
// Nothing was imported, so nothing is to be given back.
#[unsafe(no_mangle)]
extern "C" fn ibv_unimport_pd(_pd: *mut ibv_pd) {}
#[unsafe(no_mangle)]
extern "C" fn ibv_unimport_mr(_mr: *mut ibv_mr) {}
#[unsafe(no_mangle)]
extern "C" fn ibv_unimport_dm(_dm: *mut c_void) {}
