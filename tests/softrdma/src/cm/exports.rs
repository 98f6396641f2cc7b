// SPDX-License-Identifier: BSD-3-Clause
//! The C interface of librdmacm.
//!
//! Every pointer comes from an application that keeps to the manual: it is valid
//! for its type, and an object is not used after its destruction. That is the
//! reason behind each `unsafe` block here.

use super::address;
use super::channel::{self, EventChannel};
use super::devices;
use super::endpoint::complete;
use super::id::CmId;
use crate::verbs::context::Context;
use crate::verbs::cq::{Channel, Cq};
use crate::verbs::exports::{ibv_create_qp, ibv_create_srq, ibv_destroy_qp, ibv_destroy_srq};
use crate::{fork, handle, sys};
use rdma_sys::*;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::size_of;
use std::ptr::null_mut;
use std::sync::atomic::Ordering;

/// The C convention: 0, or -1 and errno.
pub fn result(result: Result<(), i32>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(code) => {
            sys::set_errno(code);
            -1
        }
    }
}

fn null<T>(code: i32) -> *mut T {
    sys::set_errno(code);
    null_mut()
}

/// Calls on an identifier, refused in a forked child.
unsafe fn on<'a>(id: *mut rdma_cm_id) -> Result<&'a CmId, i32> {
    if fork::in_child() {
        return Err(libc::ENODEV);
    }
    // SAFETY: see above.
    Ok(unsafe { handle::borrow::<CmId, _>(id) })
}

#[unsafe(no_mangle)]
pub extern "C" fn rdma_create_event_channel() -> *mut rdma_event_channel {
    if fork::in_child() {
        return null(libc::ENODEV);
    }
    if let Err(code) = devices::initialise() {
        return null(code);
    }
    crate::engine::engine();
    EventChannel::new().map_or_else(|| null(libc::EMFILE), handle::into_c)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_destroy_event_channel(channel: *mut rdma_event_channel) {
    if fork::in_child() {
        return;
    }
    // SAFETY: see above.
    let channel = unsafe { handle::take::<EventChannel, _>(channel) };
    channel.close();
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_get_cm_event(
    channel: *mut rdma_event_channel,
    out: *mut *mut rdma_cm_event,
) -> c_int {
    if fork::in_child() {
        return result(Err(libc::ENODEV));
    }
    // SAFETY: see above.
    unsafe {
        let channel = handle::share::<EventChannel, _>(channel);
        result(channel.fetch().map(|event| out.write(event)))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int {
    if fork::in_child() {
        return result(Err(libc::ENODEV));
    }
    if event.is_null() {
        return result(Err(libc::EINVAL));
    }
    // SAFETY: see above.
    unsafe { channel::acknowledge(event) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_create_id(
    channel: *mut rdma_event_channel,
    out: *mut *mut rdma_cm_id,
    context: *mut c_void,
    ps: rdma_port_space::Type,
) -> c_int {
    if fork::in_child() {
        return result(Err(libc::ENODEV));
    }
    if ps != rdma_port_space::RDMA_PS_TCP && ps != rdma_port_space::RDMA_PS_IB {
        return result(Err(libc::EOPNOTSUPP));
    }
    let sync = channel.is_null();
    let made = if sync {
        EventChannel::new().ok_or(libc::EMFILE)
    } else {
        // SAFETY: see above.
        Ok(unsafe { handle::share::<EventChannel, _>(channel) })
    };
    result(made.map(|channel| {
        let id = CmId::new(channel, sync, context, ps, ibv_qp_type::IBV_QPT_RC);
        // SAFETY: see above.
        unsafe { out.write(handle::into_c(id)) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: see above.
    unsafe {
        match on(id) {
            Ok(object) => {
                if !(*id).event.is_null() {
                    rdma_ack_cm_event((*id).event);
                    (*id).event = null_mut();
                }
                object.destroy();
                drop(handle::take::<CmId, _>(id));
                0
            }
            Err(code) => result(Err(code)),
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut sockaddr) -> c_int {
    // SAFETY: see above.
    unsafe {
        let addr = address::from_c(addr).ok_or(libc::EINVAL);
        result(addr.and_then(|addr| on(id)?.bind(addr)))
    }
}

use libc::sockaddr;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_resolve_addr(
    id: *mut rdma_cm_id,
    src: *mut sockaddr,
    dst: *mut sockaddr,
    _timeout_ms: c_int,
) -> c_int {
    // SAFETY: see above.
    unsafe {
        let dst = address::from_c(dst).ok_or(libc::EINVAL);
        result(dst.and_then(|dst| {
            on(id)?.resolve_address(address::from_c(src), dst)?;
            complete(id)
        }))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_resolve_route(id: *mut rdma_cm_id, _timeout_ms: c_int) -> c_int {
    // SAFETY: see above.
    unsafe { result(on(id).and_then(|object| object.resolve_route().and_then(|()| complete(id)))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int {
    // SAFETY: see above.
    unsafe { result(on(id).and_then(|object| object.listen(backlog))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| object.connect(param.as_ref()).and_then(|()| complete(id))))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_establish(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: see above.
    unsafe { result(on(id).and_then(CmId::establish)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| object.accept(param.as_ref()).and_then(|()| complete(id))))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_reject(id: *mut rdma_cm_id, data: *const c_void, len: u8) -> c_int {
    // SAFETY: see above.
    unsafe { result(on(id).and_then(|object| object.reject(data.cast(), usize::from(len)))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: see above.
    unsafe { result(on(id).and_then(|object| object.disconnect().and_then(|()| complete(id)))) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_migrate_id(
    id: *mut rdma_cm_id,
    channel: *mut rdma_event_channel,
) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| {
            let sync = channel.is_null();
            if sync && object.sync.load(Ordering::Relaxed) {
                return Err(libc::EINVAL);
            }
            let channel = if sync {
                EventChannel::new().ok_or(libc::EMFILE)?
            } else {
                handle::share::<EventChannel, _>(channel)
            };
            if !(*id).event.is_null() {
                rdma_ack_cm_event((*id).event);
                (*id).event = null_mut();
            }
            object.migrate(channel, sync);
            Ok(())
        }))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_set_option(
    id: *mut rdma_cm_id,
    level: c_int,
    option: c_int,
    value: *mut c_void,
    len: usize,
) -> c_int {
    const TOS: c_int = 0;
    const REUSEADDR: c_int = 1;
    const AFONLY: c_int = 2;
    const ACK_TIMEOUT: c_int = 3;
    // SAFETY: see above; the length was given with the value.
    unsafe {
        result(on(id).and_then(|object| match (level, option) {
            (0, TOS) if len == 1 => Ok(()),
            (0, REUSEADDR) if len == size_of::<c_int>() => Ok(()),
            (0, AFONLY) if len == size_of::<c_int>() => {
                object.set_v6_only(*value.cast::<c_int>() != 0)
            }
            (0, ACK_TIMEOUT) if len == 1 => {
                object.set_ack_timeout(*value.cast::<u8>());
                Ok(())
            }
            (0, TOS | REUSEADDR | AFONLY | ACK_TIMEOUT) => Err(libc::EINVAL),
            _ => Err(libc::ENOSYS),
        }))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_get_src_port(id: *mut rdma_cm_id) -> u16 {
    if fork::in_child() {
        return 0;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<CmId, _>(id) }.ports().0.to_be()
}
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_get_dst_port(id: *mut rdma_cm_id) -> u16 {
    if fork::in_child() {
        return 0;
    }
    // SAFETY: see above.
    unsafe { handle::borrow::<CmId, _>(id) }.ports().1.to_be()
}

#[unsafe(no_mangle)]
pub extern "C" fn rdma_get_devices(count: *mut c_int) -> *mut *mut ibv_context {
    if fork::in_child() {
        return null(libc::ENODEV);
    }
    let all = match devices::list() {
        Ok(all) => all,
        Err(code) => return null(code),
    };
    // SAFETY: room for the pointers and a last one; `count` may be null.
    unsafe {
        let list = libc::calloc(all.len() + 1, size_of::<*mut ibv_context>());
        let list = list.cast::<*mut ibv_context>();
        if !list.is_null() {
            std::ptr::copy_nonoverlapping(all.as_ptr(), list, all.len());
            if !count.is_null() {
                count.write(all.len() as c_int);
            }
        }
        list
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_free_devices(list: *mut *mut ibv_context) {
    // SAFETY: from rdma_get_devices, so it ends with a null pointer.
    unsafe {
        let count = (0..).take_while(|index| !(*list.add(*index)).is_null()).count();
        devices::release(std::slice::from_raw_parts(list, count));
        libc::free(list.cast());
    }
}

// Queue pairs of identifiers.

/// Makes the completion queues that the application leaves to the identifier.
unsafe fn make_queues(id: &mut rdma_cm_id, init: &mut ibv_qp_init_attr) -> Result<(), i32> {
    if id.verbs.is_null() {
        return Err(libc::EINVAL);
    }
    // SAFETY: an identifier keeps its device open.
    let context = unsafe { Context::share(id.verbs) };
    context.check_there("rdma_create_qp")?;
    let make = |size: u32,
                channel: &mut *mut ibv_comp_channel,
                cq: &mut *mut ibv_cq,
                user: *mut c_void| {
        let made = Channel::new(context.clone()).ok_or(libc::EMFILE)?;
        let queue = Cq::new(context.clone(), size.max(1) as c_int, user, Some(made.clone()))?;
        *channel = handle::into_c(made);
        *cq = handle::into_c(queue);
        Ok::<(), i32>(())
    };
    let user = (&raw mut *id).cast();
    if init.send_cq.is_null() {
        make(init.cap.max_send_wr, &mut id.send_cq_channel, &mut id.send_cq, user)?;
        init.send_cq = id.send_cq;
    }
    if init.recv_cq.is_null() {
        make(init.cap.max_recv_wr, &mut id.recv_cq_channel, &mut id.recv_cq, user)?;
        init.recv_cq = id.recv_cq;
    }
    Ok(())
}

unsafe fn destroy_queues(id: &mut rdma_cm_id) {
    for (channel, cq) in
        [(&mut id.send_cq_channel, &mut id.send_cq), (&mut id.recv_cq_channel, &mut id.recv_cq)]
    {
        // SAFETY: made by make_queues.
        unsafe {
            if !cq.is_null() {
                crate::verbs::exports::ibv_destroy_cq(*cq);
                *cq = null_mut();
            }
            if !channel.is_null() {
                crate::verbs::exports::ibv_destroy_comp_channel(*channel);
                *channel = null_mut();
            }
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_create_qp(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| {
            let (c, init) = (&mut *id, &mut *init);
            let pd = if pd.is_null() { c.pd } else { pd };
            if !c.qp.is_null() || pd.is_null() || (*pd).context != c.verbs {
                return Err(libc::EINVAL);
            }
            make_queues(c, init)?;
            c.qp = ibv_create_qp(pd, init);
            if c.qp.is_null() {
                let code = *libc::__errno_location();
                destroy_queues(c);
                return Err(code);
            }
            c.pd = pd;
            object.init_qp().inspect_err(|_| rdma_destroy_qp(id))
        }))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_create_qp_ex(
    id: *mut rdma_cm_id,
    init: *mut ibv_qp_init_attr_ex,
) -> c_int {
    const PD: u32 = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0;
    // SAFETY: see above; the extended structure begins with the basic one.
    unsafe {
        if (*init).comp_mask & !PD != 0 {
            return result(Err(libc::EOPNOTSUPP));
        }
        let pd = if (*init).comp_mask & PD != 0 { (*init).pd } else { null_mut() };
        rdma_create_qp(id, pd, init.cast())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_destroy_qp(id: *mut rdma_cm_id) {
    // SAFETY: see above.
    unsafe {
        if on(id).is_ok() && !(*id).qp.is_null() {
            ibv_destroy_qp((*id).qp);
            (*id).qp = null_mut();
            destroy_queues(&mut *id);
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_create_srq(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    init: *mut ibv_srq_init_attr,
) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|_| {
            let pd = if pd.is_null() { (*id).pd } else { pd };
            if pd.is_null() {
                return Err(libc::EINVAL);
            }
            (*id).srq = ibv_create_srq(pd, init);
            if (*id).srq.is_null() { Err(*libc::__errno_location()) } else { Ok(()) }
        }))
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn rdma_create_srq_ex(
    _id: *mut rdma_cm_id,
    _init: *mut ibv_srq_init_attr_ex,
) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_destroy_srq(id: *mut rdma_cm_id) {
    if fork::in_child() {
        return;
    }
    // SAFETY: see above.
    unsafe {
        if !(*id).srq.is_null() {
            ibv_destroy_srq((*id).srq);
            (*id).srq = null_mut();
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_init_qp_attr(
    id: *mut rdma_cm_id,
    attr: *mut ibv_qp_attr,
    mask: *mut c_int,
) -> c_int {
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| object.qp_attributes((*attr).qp_state)).map(|(a, m)| {
            attr.write(a);
            mask.write(m as c_int);
        }))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rdma_notify(id: *mut rdma_cm_id, event: u32) -> c_int {
    const ESTABLISHED: u32 = ibv_event_type::IBV_EVENT_COMM_EST as u32;
    // SAFETY: see above.
    unsafe {
        result(on(id).and_then(|object| match event {
            ESTABLISHED => object.communication_established(),
            _ => Err(libc::EINVAL),
        }))
    }
}

// Names.

#[unsafe(no_mangle)]
pub extern "C" fn rdma_event_str(event: rdma_cm_event_type::Type) -> *const c_char {
    const NAMES: [&CStr; 16] = [
        c"RDMA_CM_EVENT_ADDR_RESOLVED",
        c"RDMA_CM_EVENT_ADDR_ERROR",
        c"RDMA_CM_EVENT_ROUTE_RESOLVED",
        c"RDMA_CM_EVENT_ROUTE_ERROR",
        c"RDMA_CM_EVENT_CONNECT_REQUEST",
        c"RDMA_CM_EVENT_CONNECT_RESPONSE",
        c"RDMA_CM_EVENT_CONNECT_ERROR",
        c"RDMA_CM_EVENT_UNREACHABLE",
        c"RDMA_CM_EVENT_REJECTED",
        c"RDMA_CM_EVENT_ESTABLISHED",
        c"RDMA_CM_EVENT_DISCONNECTED",
        c"RDMA_CM_EVENT_DEVICE_REMOVAL",
        c"RDMA_CM_EVENT_MULTICAST_JOIN",
        c"RDMA_CM_EVENT_MULTICAST_ERROR",
        c"RDMA_CM_EVENT_ADDR_CHANGE",
        c"RDMA_CM_EVENT_TIMEWAIT_EXIT",
    ];
    NAMES.get(event as usize).unwrap_or(&c"UNKNOWN EVENT").as_ptr()
}

// What this fabric does not have: multicast and enhanced connection establishment.

#[unsafe(no_mangle)]
pub extern "C" fn rdma_join_multicast(
    _id: *mut rdma_cm_id,
    _addr: *mut sockaddr,
    _context: *mut c_void,
) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
pub extern "C" fn rdma_join_multicast_ex(
    _id: *mut rdma_cm_id,
    _attr: *mut c_void,
    _context: *mut c_void,
) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
pub extern "C" fn rdma_leave_multicast(_id: *mut rdma_cm_id, _addr: *mut sockaddr) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
pub extern "C" fn rdma_reject_ece(_id: *mut rdma_cm_id, _data: *const c_void, _len: u8) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
pub extern "C" fn rdma_get_remote_ece(_id: *mut rdma_cm_id, _ece: *mut c_void) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
#[unsafe(no_mangle)]
pub extern "C" fn rdma_set_local_ece(_id: *mut rdma_cm_id, _ece: *mut c_void) -> c_int {
    result(Err(libc::EOPNOTSUPP))
}
