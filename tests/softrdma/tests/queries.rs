// SPDX-License-Identifier: BSD-3-Clause
//! What the device says of itself and of others, and what it says it can't do.

mod common;

use common::*;
use rdma_sys::*;
use std::ffi::{CStr, c_char};
use std::mem::zeroed;
use std::ptr::{null, null_mut};

#[test]
fn a_port_tells_its_state_its_key_and_its_address() {
    let p = Pair::default();
    // SAFETY: a live context; zeroes are valid attributes.
    unsafe {
        let context = (*p.client.id).verbs;
        let mut port: ibv_port_attr = zeroed();
        assert_eq!(___ibv_query_port(context, 1, &raw mut port), 0);
        assert_eq!((port.state, port.link_layer), (ibv_port_state::IBV_PORT_ACTIVE, 2));
        assert_eq!((port.gid_tbl_len, port.pkey_tbl_len, port.lid), (1, 1, 0));
        assert_eq!(port.max_msg_sz, 1 << 31);
        let mut key = 0;
        assert_eq!((ibv_query_pkey(context, 1, 0, &raw mut key), key), (0, 0xffff));
        assert_eq!(ibv_get_pkey_index(context, 1, key), 0);
        for other in [0, 2] {
            assert_eq!(___ibv_query_port(context, other, &raw mut port), libc::EINVAL);
            assert_eq!(ibv_query_pkey(context, other, 0, &raw mut key), -1);
            assert_eq!(ibv_get_pkey_index(context, other, key), -1);
            let mut gid: ibv_gid = zeroed();
            assert_eq!(
                (ibv_query_gid(context, other, 0, &raw mut gid), errno()),
                (-1, libc::EINVAL)
            );
        }
        assert_eq!((ibv_query_pkey(context, 1, 1, &raw mut key), errno()), (-1, libc::EINVAL));
        assert_eq!((ibv_get_pkey_index(context, 1, 0x7fff), errno()), (-1, libc::EINVAL));
    }
}

/// Each limit of the device, by a call that keeps to it and one that does not.
#[test]
fn the_device_s_limits_hold() {
    let p = Pair::default();
    // SAFETY: live objects of ours; zeroes are valid attributes.
    unsafe {
        let context = (*p.client.id).verbs;
        let mut device: ibv_device_attr = zeroed();
        assert_eq!(ibv_query_device(context, &raw mut device), 0);
        let queue = |cqe, vector| {
            let cq = ibv_create_cq(context, cqe, null_mut(), null_mut(), vector);
            if cq.is_null() { errno() } else { ibv_destroy_cq(cq) }
        };
        let vectors = (*context).num_comp_vectors;
        assert_eq!((queue(device.max_cqe, vectors - 1), queue(1, 0)), (0, 0));
        for (cqe, vector) in [(device.max_cqe + 1, 0), (0, 0), (-1, 0), (1, vectors), (1, -1)] {
            assert_eq!(queue(cqe, vector), libc::EINVAL, "{cqe} entries, vector {vector}");
        }
        let pair = |wr: i32, sge: i32| {
            let mut init: ibv_qp_init_attr = zeroed();
            (init.send_cq, init.recv_cq) = (p.client.cq, p.client.cq);
            init.qp_type = ibv_qp_type::IBV_QPT_RC;
            (init.cap.max_send_wr, init.cap.max_recv_wr) = (wr as u32, wr as u32);
            (init.cap.max_send_sge, init.cap.max_recv_sge) = (sge as u32, sge as u32);
            let qp = ibv_create_qp(p.client.pd, &raw mut init);
            if qp.is_null() { errno() } else { ibv_destroy_qp(qp) }
        };
        assert_eq!(pair(device.max_qp_wr, device.max_sge), 0);
        assert_eq!(pair(device.max_qp_wr + 1, 1), libc::EINVAL);
        assert_eq!(pair(1, device.max_sge + 1), libc::EINVAL);
        let shared = |wr: i32, sge: i32| {
            let mut init: ibv_srq_init_attr = zeroed();
            (init.attr.max_wr, init.attr.max_sge) = (wr as u32, sge as u32);
            let srq = ibv_create_srq(p.client.pd, &raw mut init);
            if srq.is_null() { errno() } else { ibv_destroy_srq(srq) }
        };
        assert_eq!(shared(device.max_srq_wr, device.max_srq_sge), 0);
        assert_eq!(shared(device.max_srq_wr + 1, 1), libc::EINVAL);
        assert_eq!(shared(1, device.max_srq_sge + 1), libc::EINVAL);
    }
    // More pieces than the queue pair was made for.
    let pieces = vec![p.client.sge(0, 1); p.client.options.sge as usize + 1];
    assert_eq!(p.client.post(Wr::send(1, &pieces)), libc::EINVAL);
    assert_eq!(p.client.recv(1, &pieces), libc::EINVAL);
}

#[test]
fn a_message_longer_than_the_device_takes_is_refused() {
    let p = Pair::default();
    let half = ibv_sge { length: 1 << 30, ..p.client.sge(0, 0) };
    assert_eq!(p.client.post(Wr::send(1, &[half, half, p.client.sge(0, 1)])), libc::EINVAL);
    assert_eq!(p.client.state(), ibv_qp_state::IBV_QPS_RTS);
}

fn text(name: *const c_char) -> &'static str {
    // SAFETY: the names are constants.
    unsafe { CStr::from_ptr(name) }.to_str().expect("text")
}

#[test]
fn states_and_events_have_names() {
    use ibv_event_type::*;
    // SAFETY: any number may be asked for.
    unsafe {
        assert_eq!(text(ibv_wc_status_str(0)), "success");
        assert_eq!(text(ibv_wc_status_str(5)), "Work Request Flushed Error");
        assert_eq!(text(ibv_wc_status_str(13)), "RNR retry counter exceeded");
        assert_eq!(text(ibv_wc_status_str(4711)), "unknown");
        assert_eq!(text(ibv_port_state_str(ibv_port_state::IBV_PORT_ACTIVE)), "active");
        assert_eq!(
            text(ibv_node_type_str(ibv_node_type::IBV_NODE_CA)),
            "InfiniBand channel adapter"
        );
        assert_eq!(text(ibv_event_type_str(IBV_EVENT_CQ_ERR)), "CQ error");
        assert_eq!(text(ibv_event_type_str(IBV_EVENT_SRQ_LIMIT_REACHED)), "SRQ limit reached");
        assert_eq!(text(ibv_event_type_str(IBV_EVENT_QP_LAST_WQE_REACHED)), "last WQE reached");
        assert_eq!(
            text(rdma_event_str(rdma_cm_event_type::RDMA_CM_EVENT_TIMEWAIT_EXIT)),
            "RDMA_CM_EVENT_TIMEWAIT_EXIT"
        );
        assert_eq!(
            text(rdma_event_str(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED)),
            "RDMA_CM_EVENT_ESTABLISHED"
        );
        assert_eq!(text(rdma_event_str(99)), "UNKNOWN EVENT");
    }
}

/// Alone in asking, so that no other test of this process answers for it.
#[test]
fn fork_protection_is_off_until_it_is_asked_for() {
    // SAFETY: no arguments.
    unsafe {
        assert_eq!(ibv_is_fork_initialized(), IBV_FORK_DISABLED);
        assert_eq!(ibv_fork_init(), 0);
        assert_eq!(ibv_is_fork_initialized(), IBV_FORK_ENABLED);
    }
}

/// What is not implemented says so, each call in the way its manual has for errors.
#[test]
fn what_is_not_there_says_so() {
    const NO: i32 = libc::EOPNOTSUPP;
    let p = Pair::default();
    let pointer = |name, given: Option<usize>| {
        assert_eq!((given.unwrap_or(0), errno()), (0, NO), "{name}");
        // The next call has to set it itself.
        // SAFETY: errno is the thread's own.
        unsafe { *libc::__errno_location() = 0 };
    };
    let minus_one = |name, given: i32| {
        assert_eq!((given, errno()), (-1, NO), "{name}");
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = 0 };
    };
    // SAFETY: live objects of ours, and null where nothing is looked at.
    unsafe {
        let (c, pd, qp) = ((*p.client.id).verbs, p.client.pd, p.client.qp);
        *libc::__errno_location() = 0;
        pointer("create_ah", Some(ibv_create_ah(pd, null_mut()) as usize));
        pointer(
            "create_ah_from_wc",
            Some(ibv_create_ah_from_wc(pd, null_mut(), null_mut(), 1) as usize),
        );
        pointer("reg_dmabuf_mr", Some(ibv_reg_dmabuf_mr(pd, 0, 1, 0, 0, 1) as usize));
        pointer("import_device", Some(ibv_import_device(0) as usize));
        pointer("import_pd", Some(ibv_import_pd(c, 0) as usize));
        pointer("import_mr", Some(ibv_import_mr(pd, 0) as usize));
        pointer("create_cq_ex", ibv_create_cq_ex(c, null_mut()).map(|p| p as usize));
        pointer("create_flow", ibv_create_flow(qp, null_mut()).map(|p| p as usize));
        pointer("alloc_null_mr", ibv_alloc_null_mr(pd).map(|p| p as usize));
        pointer("alloc_td", ibv_alloc_td(c, null_mut()).map(|p| p as usize));
        pointer("create_wq", ibv_create_wq(c, null_mut()).map(|p| p as usize));
        pointer("open_xrcd", ibv_open_xrcd(c, null_mut()).map(|p| p as usize));
        pointer("alloc_dm", ibv_alloc_dm(c, null_mut()).map(|p| p as usize));
        let mut init: ibv_qp_init_attr_ex = zeroed();
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        init.comp_mask = ibv_qp_init_attr_mask::IBV_QP_INIT_ATTR_PD.0 | 1 << 6; // send operations
        init.pd = pd;
        pointer("create_qp_ex", ibv_create_qp_ex(c, &raw mut init).map(|p| p as usize));

        minus_one("rereg_mr", ibv_rereg_mr(p.client.mr, 1, pd, null_mut(), 0, 0));
        minus_one("init_ah_from_wc", ibv_init_ah_from_wc(c, 1, null_mut(), null_mut(), null_mut()));
        let id = p.client.id;
        minus_one("join_multicast", rdma_join_multicast(id, null_mut(), null_mut()));
        minus_one("leave_multicast", rdma_leave_multicast(id, null_mut()));
        minus_one("set_local_ece", rdma_set_local_ece(id, null_mut()));
        minus_one("get_remote_ece", rdma_get_remote_ece(id, null_mut()));
        minus_one("reject_ece", rdma_reject_ece(id, null(), 0));
        let mut datagrams = null_mut();
        minus_one(
            "create_id of datagrams",
            rdma_create_id(
                p.client_cm.channel,
                &raw mut datagrams,
                null_mut(),
                rdma_port_space::RDMA_PS_UDP,
            ),
        );

        for (name, code) in [
            ("resize_cq", ibv_resize_cq(p.client.cq, 512)),
            ("attach_mcast", ibv_attach_mcast(qp, null(), 0)),
            ("detach_mcast", ibv_detach_mcast(qp, null(), 0)),
            ("set_ece", ibv_set_ece(qp, null_mut())),
            ("query_ece", ibv_query_ece(qp, null_mut())),
            ("bind_mw of type 1", (*c).ops.bind_mw.expect("there")(qp, null_mut(), null_mut())),
            ("modify_cq", ibv_modify_cq(p.client.cq, null_mut())),
        ] {
            assert_eq!(code, NO, "{name}");
        }
    }
    // None of it harmed the queue pair.
    p.client.post(Wr::write(1, &[], 0, 0));
    p.client.done(1);
}
