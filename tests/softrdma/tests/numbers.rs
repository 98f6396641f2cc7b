// SPDX-License-Identifier: BSD-3-Clause
//! Queue pairs connected by number, without the connection manager.

mod common;

use rdma_sys::*;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// The attributes that each transition requires.
const STEPS: [(u32, i32); 3] = [
    (ibv_qp_state::IBV_QPS_INIT, 0x1 | 0x8 | 0x10 | 0x20),
    (ibv_qp_state::IBV_QPS_RTR, 0x1 | 0x80 | 0x100 | 0x1000 | 0x8000 | 0x2_0000 | 0x10_0000),
    (ibv_qp_state::IBV_QPS_RTS, 0x1 | 0x200 | 0x400 | 0x800 | 0x2000 | 0x1_0000),
];

struct End {
    context: *mut ibv_context,
    pd: *mut ibv_pd,
    cq: *mut ibv_cq,
    qp: *mut ibv_qp,
}

impl End {
    fn new() -> End {
        // SAFETY: each object is made from live ones.
        unsafe {
            let list = ibv_get_device_list(null_mut());
            let context = ibv_open_device(*list);
            ibv_free_device_list(list);
            let pd = ibv_alloc_pd(context);
            let cq = ibv_create_cq(context, 16, null_mut(), null_mut(), 0);
            let mut init: ibv_qp_init_attr = zeroed();
            (init.send_cq, init.recv_cq) = (cq, cq);
            init.qp_type = ibv_qp_type::IBV_QPT_RC;
            init.cap.max_send_wr = 4;
            init.cap.max_recv_wr = 4;
            let qp = ibv_create_qp(pd, &raw mut init);
            assert!(!qp.is_null());
            End { context, pd, cq, qp }
        }
    }

    fn number(&self) -> u32 {
        // SAFETY: a live queue pair.
        unsafe { (*self.qp).qp_num }
    }

    fn modify(&self, state: u32, mask: i32, to: u32) -> i32 {
        // SAFETY: zeroes are valid attributes.
        unsafe {
            let mut attr: ibv_qp_attr = zeroed();
            attr.qp_state = state;
            attr.port_num = 1;
            attr.dest_qp_num = to;
            attr.timeout = 8;
            ibv_modify_qp(self.qp, &raw mut attr, mask)
        }
    }

    fn connect(&self, to: u32) -> i32 {
        for (state, mask) in STEPS {
            let code = self.modify(state, mask, to);
            if code != 0 {
                return code;
            }
        }
        0
    }

    fn recv(&self, wr_id: u64) {
        // SAFETY: a work request without memory.
        unsafe {
            let mut wr: ibv_recv_wr = zeroed();
            wr.wr_id = wr_id;
            assert_eq!(ibv_post_recv(self.qp, &raw mut wr, &mut null_mut()), 0);
        }
    }

    fn send(&self, wr_id: u64) {
        // SAFETY: as above.
        unsafe {
            let mut wr: ibv_send_wr = zeroed();
            wr.wr_id = wr_id;
            wr.opcode = ibv_wr_opcode::IBV_WR_SEND;
            wr.send_flags = common::SIGNALED;
            assert_eq!(ibv_post_send(self.qp, &raw mut wr, &mut null_mut()), 0);
        }
    }

    fn completes(&self, wr_id: u64, status: u32) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(wc) = common::poll(self.cq) {
                assert_eq!((wc.wr_id, wc.status), (wr_id, status));
                return;
            }
            assert!(Instant::now() < end, "no completion of {wr_id}");
            std::thread::yield_now();
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: in the order of their dependence.
        unsafe {
            assert_eq!(ibv_destroy_qp(self.qp), 0);
            assert_eq!(ibv_destroy_cq(self.cq), 0);
            assert_eq!(ibv_dealloc_pd(self.pd), 0);
            assert_eq!(ibv_close_device(self.context), 0);
        }
    }
}

#[test]
fn two_that_name_each_other_meet_in_either_order() {
    for swap in [false, true] {
        let (a, b) = (End::new(), End::new());
        let (first, second) = if swap { (&b, &a) } else { (&a, &b) };
        assert_eq!(first.connect(second.number()), 0);
        // Posted before the other is there: it waits.
        first.send(1);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(second.modify(ibv_qp_state::IBV_QPS_INIT, 0x1 | 0x8 | 0x10 | 0x20, 0), 0);
        second.recv(2);
        assert_eq!(second.connect(first.number()), 0);
        second.completes(2, ibv_wc_status::IBV_WC_SUCCESS);
        first.completes(1, ibv_wc_status::IBV_WC_SUCCESS);
        first.recv(3);
        second.send(4);
        first.completes(3, ibv_wc_status::IBV_WC_SUCCESS);
        second.completes(4, ibv_wc_status::IBV_WC_SUCCESS);
    }
}

#[test]
fn the_end_of_one_exhausts_the_other_s_retries() {
    let (a, b) = (End::new(), End::new());
    assert_eq!((a.connect(b.number()), b.connect(a.number())), (0, 0));
    a.recv(1);
    b.send(2);
    a.completes(1, ibv_wc_status::IBV_WC_SUCCESS);
    b.completes(2, ibv_wc_status::IBV_WC_SUCCESS);
    drop(a);
    b.send(3);
    b.completes(3, ibv_wc_status::IBV_WC_RETRY_EXC_ERR);
}

#[test]
fn a_queue_pair_does_not_meet_itself() {
    let a = End::new();
    assert_eq!(a.connect(a.number()), libc::EOPNOTSUPP);
}

#[test]
fn a_transition_needs_each_of_its_attributes() {
    let (a, b) = (End::new(), End::new());
    for (state, mask) in STEPS {
        // Each of them but the state itself, which says where to go.
        for bit in (1..32).map(|n| 1i32.wrapping_shl(n)).filter(|bit| mask & bit != 0) {
            assert_eq!(a.modify(state, mask & !bit, b.number()), libc::EINVAL, "{state} {bit:#x}");
        }
        assert_eq!(a.modify(state, mask, b.number()), 0);
    }
}
