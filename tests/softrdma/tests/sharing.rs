// SPDX-License-Identifier: BSD-3-Clause
//! Shared receive queues and memory windows.

mod common;

use common::*;
use rdma_sys::ibv_event_type::*;
use rdma_sys::ibv_wc_status::*;
use rdma_sys::*;
use std::mem::zeroed;
use std::ptr::null_mut;

/// A domain of its own with a shared receive queue in it.
struct Shared {
    pd: *mut ibv_pd,
    srq: *mut ibv_srq,
}

// SAFETY: the verbs may be called from any thread.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(max_wr: u32) -> Shared {
        // SAFETY: live objects of ours.
        unsafe {
            let list = rdma_get_devices(null_mut());
            let context = *list;
            rdma_free_devices(list);
            let pd = ibv_alloc_pd(context);
            let mut init: ibv_srq_init_attr = zeroed();
            init.attr.max_wr = max_wr;
            init.attr.max_sge = 1;
            let srq = ibv_create_srq(pd, &raw mut init);
            assert!(!srq.is_null());
            Shared { pd, srq }
        }
    }

    fn post(&self, wr_id: u64, mut sge: ibv_sge) -> i32 {
        let mut wr = ibv_recv_wr { wr_id, next: null_mut(), sg_list: &raw mut sge, num_sge: 1 };
        let mut bad = null_mut();
        // SAFETY: a live queue and a valid work request.
        unsafe { ibv_post_srq_recv(self.srq, &raw mut wr, &raw mut bad) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing uses them any more.
        unsafe {
            assert_eq!(ibv_destroy_srq(self.srq), 0);
            assert_eq!(ibv_dealloc_pd(self.pd), 0);
        }
    }
}

#[test]
fn two_queue_pairs_take_from_one_queue_and_the_limit_is_told() {
    let shared = Shared::new(8);
    let o = Options { pd: shared.pd, srq: shared.srq, ..Options::default() };
    let a = Pair::new(Options::default(), o.clone());
    let mut b = Pair::new(Options::default(), o);
    for i in 0..8u64 {
        assert_eq!(shared.post(i, a.server.sge(64 * i as usize, 64)), 0);
    }
    assert_eq!(shared.post(9, a.server.sge(0, 64)), libc::ENOMEM);
    assert_eq!(a.server.recv(1, &[]), libc::EINVAL);
    // SAFETY: live objects of ours.
    unsafe {
        let mut attr = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: 7 };
        let limit = ibv_srq_attr_mask::IBV_SRQ_LIMIT.0 as i32;
        assert_eq!(ibv_modify_srq(shared.srq, &raw mut attr, limit), 0);
        assert_eq!(ibv_query_srq(shared.srq, &raw mut attr), 0);
        assert_eq!((attr.max_wr, attr.srq_limit), (8, 7));
        assert_eq!(ibv_destroy_srq(shared.srq), libc::EBUSY);
    }
    b.client.fill(0, b"through the shared one");
    a.client.post(Wr::send(1, &[]));
    a.server.done(0);
    b.client.post(Wr::send(1, &[b.client.sge(0, 22)]));
    assert_eq!(b.server.done(1).len, 22);
    assert_eq!(a.server.bytes(64, 22), b"through the shared one");
    async_event(&a.server, shared.srq, IBV_EVENT_SRQ_LIMIT_REACHED);
    drop((a, b));
}

#[test]
fn a_shared_queue_can_be_made_longer_and_not_shorter_than_what_it_holds() {
    let shared = Shared::new(2);
    let resize = |max_wr| {
        let mut attr = ibv_srq_attr { max_wr, max_sge: 0, srq_limit: 0 };
        let mask = ibv_srq_attr_mask::IBV_SRQ_MAX_WR.0 as i32;
        // SAFETY: a live queue.
        unsafe { ibv_modify_srq(shared.srq, &raw mut attr, mask) }
    };
    let nothing = ibv_sge { addr: 0, length: 0, lkey: 0 };
    assert_eq!((shared.post(1, nothing), shared.post(2, nothing)), (0, 0));
    assert_eq!(shared.post(3, nothing), libc::ENOMEM);
    assert_eq!(resize(3), 0);
    assert_eq!((shared.post(3, nothing), shared.post(4, nothing)), (0, libc::ENOMEM));
    assert_eq!((resize(2), resize(0)), (libc::EINVAL, libc::EINVAL));
}

/// The receives of a shared queue are posted by threads while two connections use them up.
#[test]
fn threads_may_post_to_a_shared_queue_at_once() {
    let shared = Shared::new(4096);
    let o = Options { pd: shared.pd, srq: shared.srq, cqe: 4096, ..Options::default() };
    let (a, b) = (Pair::new(Options::default(), o.clone()), Pair::new(Options::default(), o));
    const EACH: u64 = 150;
    for pair in [&a, &b] {
        pair.server.rnr_timer(1);
    }
    let queue = &shared;
    let sge = a.server.sge(0, 8);
    std::thread::scope(|s| {
        for t in 0..4 {
            s.spawn(move || (0..EACH).for_each(|i| assert_eq!(queue.post(t * EACH + i, sge), 0)));
        }
        for client in [&a.client, &b.client] {
            s.spawn(move || {
                for i in 0..2 * EACH {
                    client.post(Wr::send(i, &[]));
                    client.done(i);
                }
            });
        }
    });
    let mut ids: Vec<u64> = [&a, &b]
        .iter()
        .flat_map(|pair| std::iter::from_fn(|| pair.server.try_poll()))
        .map(|wc| wc.wr_id)
        .collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..4 * EACH).collect::<Vec<_>>());
    drop((a, b));
}

#[test]
fn a_queue_pair_in_error_says_when_it_takes_no_more() {
    let shared = Shared::new(8);
    let o = Options { pd: shared.pd, srq: shared.srq, ..Options::default() };
    let p = Pair::new(Options::default(), o);
    p.server.disconnect();
    async_event(&p.server, p.server.qp, IBV_EVENT_QP_LAST_WQE_REACHED);
    drop(p);
}

/// As Soft-RoCE has it: the buffers are looked up in the queue pair's domain.
#[test]
fn a_shared_queue_of_another_domain_fails_the_first_send() {
    let shared = Shared::new(8);
    let o = Options { srq: shared.srq, ..Options::default() };
    let p = Pair::new(Options::default(), o);
    let mut memory = vec![0u8; 64];
    // SAFETY: live objects of ours.
    let mr = unsafe { ibv_reg_mr(shared.pd, memory.as_mut_ptr().cast(), 64, 1) };
    // SAFETY: as above.
    let lkey = unsafe { (*mr).lkey };
    shared.post(1, ibv_sge { addr: memory.as_ptr() as u64, length: 64, lkey });
    p.client.post(Wr::send(2, &[p.client.sge(0, 8)]));
    p.server.fails(1, IBV_WC_LOC_QP_OP_ERR);
    p.client.fails(2, IBV_WC_REM_OP_ERR);
    drop(p);
    // SAFETY: as above.
    unsafe { assert_eq!(ibv_dereg_mr(mr), 0) };
}

const BINDABLE: u32 = 1 | 16;

struct Window(*mut ibv_mw);

impl Window {
    fn new(side: &Side) -> Window {
        // SAFETY: a live domain.
        let mw = unsafe { ibv_alloc_mw(side.pd, ibv_mw_type::IBV_MW_TYPE_2) };
        Window(mw.filter(|mw| !mw.is_null()).expect("a window"))
    }

    /// A bind of `len` bytes at `offset`, with a key one variant further.
    fn bind(&self, side: &Side, wr_id: u64, offset: usize, len: usize, access: u32) -> (Wr, u32) {
        // SAFETY: a live window.
        let key = unsafe { (*self.0).rkey };
        let rkey = key & !0xff | u32::from((key as u8).wrapping_add(1));
        let info = ibv_mw_bind_info {
            mr: side.mr,
            addr: side.addr(offset),
            length: len as u64,
            mw_access_flags: access,
        };
        let bind = Some(bind_mw_t { mw: self.0, rkey, bind_info: info });
        let wr = Wr { opcode: ibv_wr_opcode::IBV_WR_BIND_MW, bind, ..Wr::send(wr_id, &[]) };
        (wr, rkey)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: ours, not used any more.
        unsafe { assert_eq!(ibv_dealloc_mw(self.0), 0) };
    }
}

fn invalidate(wr_id: u64, key: u32) -> Wr {
    Wr { opcode: ibv_wr_opcode::IBV_WR_LOCAL_INV, imm: key, ..Wr::send(wr_id, &[]) }
}

fn bindable() -> Pair {
    Pair::new(Options::default(), Options { access: BINDABLE, ..Options::default() })
}

#[test]
fn a_window_opens_its_range_and_nothing_else() {
    let p = bindable();
    let window = Window::new(&p.server);
    let (wr, rkey) = window.bind(&p.server, 1, 4096, 100, 2);
    assert_eq!(p.server.post(wr), 0);
    assert_eq!(p.server.done(1).opcode, ibv_wc_opcode::IBV_WC_BIND_MW);
    p.client.post(Wr::write(1, &[p.client.sge(0, 100)], p.server.addr(4096), rkey));
    p.client.done(1);
    // The region stays while a window is bound to it.
    // SAFETY: a live region.
    unsafe { assert_eq!(ibv_dereg_mr(p.server.mr), libc::EBUSY) };
    p.client.post(Wr::write(2, &[p.client.sge(0, 101)], p.server.addr(4096), rkey));
    p.client.fails(2, IBV_WC_REM_ACCESS_ERR);
    drop(window);
}

#[test]
fn a_window_does_not_open_the_region_nor_other_rights() {
    let p = bindable();
    let window = Window::new(&p.server);
    let (wr, rkey) = window.bind(&p.server, 1, 0, 4096, 2);
    p.server.post(wr);
    p.server.done(1);
    p.client.post(Wr::read(1, &[p.client.sge(0, 8)], p.server.addr(0), rkey));
    p.client.fails(1, IBV_WC_REM_ACCESS_ERR);
    drop(window);
    drop(p);
    let p = bindable();
    p.client.post(Wr::write(1, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey()));
    p.client.fails(1, IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn a_window_works_through_its_own_queue_pair_only() {
    let shared = Shared::new(1);
    let o = Options { pd: shared.pd, access: BINDABLE, ..Options::default() };
    let (a, b) = (Pair::new(Options::default(), o.clone()), Pair::new(Options::default(), o));
    let window = Window::new(&a.server);
    let (wr, rkey) = window.bind(&a.server, 1, 0, 64, 2);
    a.server.post(wr);
    a.server.done(1);
    b.client.post(Wr::write(1, &[b.client.sge(0, 8)], a.server.addr(0), rkey));
    b.client.fails(1, IBV_WC_REM_ACCESS_ERR);
    a.client.post(Wr::write(1, &[a.client.sge(0, 8)], a.server.addr(0), rkey));
    a.client.done(1);
    drop(window);
    drop((a, b));
}

#[test]
fn an_invalidated_window_is_shut_and_can_be_bound_again() {
    let p = bindable();
    let window = Window::new(&p.server);
    let (wr, rkey) = window.bind(&p.server, 1, 0, 64, 2);
    p.server.post(wr);
    p.server.done(1);
    p.server.post(invalidate(2, rkey));
    assert_eq!(p.server.done(2).opcode, ibv_wc_opcode::IBV_WC_LOCAL_INV);
    let (wr, rkey) = window.bind(&p.server, 3, 64, 64, 2);
    p.server.post(wr);
    p.server.done(3);
    p.client.post(Wr::write(1, &[p.client.sge(0, 64)], p.server.addr(64), rkey));
    p.client.done(1);
    // A peer may do it too, with its message.
    p.server.recv(4, &[]);
    let wr = Wr { opcode: ibv_wr_opcode::IBV_WR_SEND_WITH_INV, imm: rkey, ..Wr::send(5, &[]) };
    p.client.post(wr);
    p.server.done(4);
    p.client.done(5);
    p.client.post(Wr::write(6, &[p.client.sge(0, 64)], p.server.addr(64), rkey));
    p.client.fails(6, IBV_WC_REM_ACCESS_ERR);
    drop(window);
}

#[test]
fn a_bind_that_is_not_allowed_fails_its_queue_pair() {
    // The region does not permit binding.
    let p = Pair::new(Options::default(), Options { access: 1, ..Options::default() });
    let window = Window::new(&p.server);
    let (wr, _) = window.bind(&p.server, 1, 0, 64, 2);
    p.server.post(wr);
    p.server.fails(1, IBV_WC_MW_BIND_ERR);
    drop(window);
    // The range is not within the region.
    let p = bindable();
    let window = Window::new(&p.server);
    let (wr, _) = window.bind(&p.server, 1, p.server.options.buffer - 8, 64, 2);
    p.server.post(wr);
    p.server.fails(1, IBV_WC_MW_BIND_ERR);
    drop(window);
    // Windows of type 1 are not there at all.
    // SAFETY: a live domain.
    unsafe {
        let mw = ibv_alloc_mw(p.server.pd, ibv_mw_type::IBV_MW_TYPE_1);
        assert!(mw.is_none_or(|mw| mw.is_null()));
        assert_eq!(errno(), libc::EOPNOTSUPP);
    }
}
