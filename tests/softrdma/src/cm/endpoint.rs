// SPDX-License-Identifier: BSD-3-Clause
//! Synchronous identifiers and the endpoint helpers built on them:
//! rdma_create_ep, rdma_get_request, rdma_getaddrinfo.

use super::exports::{
    rdma_ack_cm_event, rdma_bind_addr, rdma_create_id, rdma_create_qp, rdma_destroy_id,
    rdma_destroy_qp, rdma_destroy_srq, rdma_resolve_addr, rdma_resolve_route, result,
};
use super::id::{CmId, Template};
use crate::handle;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::ffi::{c_char, c_int};
use std::mem::{size_of, zeroed};
use std::ptr::null_mut;
use std::sync::atomic::Ordering;

/// Waits for the event of the call just made, if the identifier is synchronous.
///
/// # Safety
/// The identifier is a live one of ours.
pub unsafe fn complete(id: *mut rdma_cm_id) -> Result<(), i32> {
    // SAFETY: the caller's word.
    unsafe {
        let object = handle::borrow::<CmId, _>(id);
        if !object.sync.load(Ordering::Relaxed) {
            return Ok(());
        }
        if !(*id).event.is_null() {
            rdma_ack_cm_event((*id).event);
            (*id).event = null_mut();
        }
        let event = object.channel().fetch()?;
        (*id).event = event;
        match ((*event).event, (*event).status) {
            (_, 0) => Ok(()),
            (RDMA_CM_EVENT_REJECTED, _) => Err(libc::ECONNREFUSED),
            (_, status) => Err(status.abs()),
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rdma_get_request(listen: *mut rdma_cm_id, out: *mut *mut rdma_cm_id) -> c_int {
    // SAFETY: live objects of the application.
    let got = unsafe {
        (|| {
            let object = handle::borrow::<CmId, _>(listen);
            if !object.sync.load(Ordering::Relaxed) {
                return Err(libc::EINVAL);
            }
            if !(*listen).event.is_null() {
                rdma_ack_cm_event((*listen).event);
                (*listen).event = null_mut();
            }
            let event = object.channel().fetch()?;
            let refused = match ((*event).event, (*event).status) {
                (RDMA_CM_EVENT_REJECTED, _) => Some(libc::ECONNREFUSED),
                (_, status) if status != 0 => Some(status.abs()),
                (RDMA_CM_EVENT_CONNECT_REQUEST, _) => None,
                _ => Some(libc::EINVAL),
            };
            if let Some(code) = refused {
                (*listen).event = event;
                return Err(code);
            }
            let id = (*event).id;
            let template =
                object.qp_template.lock().unwrap().as_ref().map(|t| std::ptr::read(&raw const t.0));
            if let Some(mut init) = template
                && rdma_create_qp(id, (*listen).pd, &raw mut init) != 0
            {
                (*listen).event = event;
                return Err(*libc::__errno_location());
            }
            (*id).event = event;
            out.write(id);
            Ok(())
        })()
    };
    result(got)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rdma_create_ep(
    out: *mut *mut rdma_cm_id,
    info: *mut rdma_addrinfo,
    pd: *mut ibv_pd,
    init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: live objects of the application; `init` may be null.
    unsafe {
        let info = &*info;
        if let Some(init) = init.as_mut() {
            init.qp_type = info.ai_qp_type as u32;
        }
        let mut id = null_mut();
        if rdma_create_id(null_mut(), &raw mut id, null_mut(), info.ai_port_space as u32) != 0 {
            return -1;
        }
        let ok = if info.ai_flags & PASSIVE != 0 {
            let bound = rdma_bind_addr(id, info.ai_src_addr.cast()) == 0;
            if bound && !init.is_null() {
                let template = Template(std::ptr::read(init));
                *handle::borrow::<CmId, _>(id).qp_template.lock().unwrap() = Some(template);
            }
            if !pd.is_null() {
                (*id).pd = pd;
            }
            bound
        } else {
            rdma_resolve_addr(id, info.ai_src_addr.cast(), info.ai_dst_addr.cast(), 2000) == 0
                && rdma_resolve_route(id, 2000) == 0
                && (init.is_null() || rdma_create_qp(id, pd, init) == 0)
        };
        if !ok {
            let code = *libc::__errno_location();
            rdma_destroy_ep(id);
            return result(Err(code));
        }
        out.write(id);
        0
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rdma_destroy_ep(id: *mut rdma_cm_id) {
    // SAFETY: a live identifier.
    unsafe {
        rdma_destroy_qp(id);
        rdma_destroy_srq(id);
        rdma_destroy_id(id);
    }
}

const PASSIVE: c_int = 1;
const NUMERIC_HOST: c_int = 2;

#[unsafe(no_mangle)]
unsafe extern "C" fn rdma_getaddrinfo(
    node: *const c_char,
    service: *const c_char,
    hints: *const rdma_addrinfo,
    out: *mut *mut rdma_addrinfo,
) -> c_int {
    // SAFETY: strings and hints are valid or null; what getaddrinfo returns is
    // copied and freed.
    unsafe {
        let flags = hints.as_ref().map_or(0, |h| h.ai_flags);
        let family = hints.as_ref().map_or(0, |h| h.ai_family);
        let mut want: libc::addrinfo = zeroed();
        want.ai_family = family;
        want.ai_socktype = libc::SOCK_STREAM;
        if flags & PASSIVE != 0 {
            want.ai_flags |= libc::AI_PASSIVE;
        }
        if flags & NUMERIC_HOST != 0 {
            want.ai_flags |= libc::AI_NUMERICHOST;
        }
        let mut found: *mut libc::addrinfo = null_mut();
        let code = libc::getaddrinfo(node, service, &raw const want, &raw mut found);
        if code != 0 {
            return code;
        }
        let len = (*found).ai_addrlen;
        let copy = libc::calloc(1, size_of::<libc::sockaddr_storage>());
        std::ptr::copy_nonoverlapping((*found).ai_addr.cast::<u8>(), copy.cast(), len as usize);
        let info = libc::calloc(1, size_of::<rdma_addrinfo>()).cast::<rdma_addrinfo>();
        let i = &mut *info;
        i.ai_flags = flags;
        i.ai_family = (*found).ai_family;
        i.ai_qp_type = hints.as_ref().map_or(0, |h| h.ai_qp_type);
        if i.ai_qp_type == 0 {
            i.ai_qp_type = ibv_qp_type::IBV_QPT_RC as c_int;
        }
        i.ai_port_space = hints.as_ref().map_or(0, |h| h.ai_port_space);
        if i.ai_port_space == 0 {
            i.ai_port_space = rdma_port_space::RDMA_PS_TCP as c_int;
        }
        if flags & PASSIVE != 0 {
            (i.ai_src_addr, i.ai_src_len) = (copy.cast(), len);
        } else {
            (i.ai_dst_addr, i.ai_dst_len) = (copy.cast(), len);
        }
        libc::freeaddrinfo(found);
        out.write(info);
        0
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rdma_freeaddrinfo(info: *mut rdma_addrinfo) {
    // SAFETY: from rdma_getaddrinfo.
    unsafe {
        if let Some(i) = info.as_mut() {
            libc::free(i.ai_src_addr.cast());
            libc::free(i.ai_dst_addr.cast());
            libc::free(info.cast());
        }
    }
}
