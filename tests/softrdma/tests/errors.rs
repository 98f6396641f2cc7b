// SPDX-License-Identifier: BSD-3-Clause
//! What each violation and shortage does: the completion's status on either
//! side, the queue pairs' states, the asynchronous events.

mod common;

use common::*;
use rdma_sys::ibv_event_type::*;
use rdma_sys::ibv_qp_state::*;
use rdma_sys::ibv_wc_status::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::mem::zeroed;
use std::time::{Duration, Instant};

/// The client's request `wr` is refused with `status`; both queue pairs err, the
/// rest is flushed, and the server's owner hears of it.
fn refused(p: &Pair, wr: Wr, status: u32, event: Option<ibv_event_type>) {
    p.server.recv(100, &[p.server.sge(0, 16)]);
    assert_eq!(p.client.post(wr), 0);
    assert_eq!(p.client.post(Wr::send(8, &[]).flags(0)), 0);
    p.client.fails(7, status);
    p.client.fails(8, IBV_WC_WR_FLUSH_ERR);
    assert_eq!(p.client.state(), IBV_QPS_ERR);
    p.server.fails(100, IBV_WC_WR_FLUSH_ERR);
    p.server.enters_error();
    if let Some(event) = event {
        async_event(&p.server, p.server.qp, event);
    }
    // Posts to a queue pair in error are taken and flushed.
    assert_eq!(p.client.post(Wr::send(9, &[]).flags(0)), 0);
    p.client.fails(9, IBV_WC_WR_FLUSH_ERR);
    assert_eq!(p.client.recv(10, &[]), 0);
    p.client.fails(10, IBV_WC_WR_FLUSH_ERR);
}

fn with_access(access: u32) -> Pair {
    Pair::new(Options::default(), Options { access, ..Options::default() })
}

#[test]
fn an_unknown_key_is_refused() {
    let p = Pair::default();
    let wr = Wr::write(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey() ^ 1);
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
    // A write that fails takes no receive, with immediate data either (C10-87).
    let p = Pair::default();
    let wr = Wr::write_imm(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey() ^ 1, 1);
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
    let p = Pair::default();
    let wr = Wr::read(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey() ^ 1);
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
}

#[test]
fn a_range_beyond_the_region_is_refused_and_nothing_is_written() {
    let p = Pair::default();
    let end = p.server.options.buffer;
    let wr = Wr::write(7, &[p.client.sge(0, 17)], p.server.addr(end - 16), p.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
    assert_eq!(p.server.bytes(end - 16, 16), [0; 16]);
    let p = Pair::default();
    let wr = Wr::write(7, &[p.client.sge(0, 8)], p.server.addr(0) - 1, p.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, None);
    let p = Pair::default();
    let wr = Wr::write(7, &[p.client.sge(0, 8)], u64::MAX - 3, p.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, None);
}

/// Makes whoever raises the side's next completion event wait until [`let_go`].
fn hold_up(side: &Side) {
    side.arm(false);
    let full = u64::MAX - 1;
    // SAFETY: eight bytes from a u64.
    assert_eq!(unsafe { libc::write(side.channel_fd(), (&raw const full).cast(), 8) }, 8);
}

fn let_go(side: &Side) {
    let mut one = 0u64;
    // SAFETY: eight bytes into a u64.
    assert_eq!(unsafe { libc::read(side.channel_fd(), (&raw mut one).cast(), 8) }, 8);
}

/// Who sees a flush may hang up at once, and who hears of that looks for its completions
/// only once more.
#[test]
fn a_refusal_arrives_before_the_flush_is_seen() {
    let p = Pair::default();
    assert_eq!(p.server.recv(100, &[p.server.sge(0, 16)]), 0);
    hold_up(&p.server);
    assert_eq!(p.client.post(Wr::write(7, &[p.client.sge(0, 8)], p.server.addr(0), 1)), 0);
    let end = Instant::now() + Duration::from_secs(2);
    let mut refused = None;
    while refused.is_none() && Instant::now() < end {
        refused = p.client.try_poll();
    }
    let_go(&p.server);
    p.server.fails(100, IBV_WC_WR_FLUSH_ERR);
    assert_eq!(refused.map(|wc| wc.status), Some(IBV_WC_REM_ACCESS_ERR));
}

#[test]
fn what_another_thread_is_about_to_complete_comes_before_the_hanging_up() {
    let p = Pair::default();
    hold_up(&p.client);
    let unknown = ibv_sge { lkey: 1, ..p.client.sge(0, 8) };
    let early = std::thread::scope(|scope| {
        scope.spawn(|| p.client.post(Wr::send(7, &[unknown])));
        std::thread::sleep(Duration::from_millis(100));
        p.server.disconnect();
        let early = p.client_cm.try_event(Duration::from_millis(200));
        let_go(&p.client);
        early
    });
    assert!(early.is_none(), "{early:?} before the completion");
    p.client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    let failed = p.client.try_poll().map(|wc| (wc.wr_id, wc.status));
    assert_eq!(failed, Some((7, IBV_WC_LOC_PROT_ERR)));
}

#[test]
fn a_right_that_the_region_lacks_is_refused() {
    let p = with_access(1);
    let wr = Wr::write(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
    let p = with_access(1 | 2);
    let wr = Wr::read(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
}

#[test]
fn a_right_that_the_queue_pair_lacks_is_refused() {
    let p = Pair::default();
    assert_eq!(
        p.server.modify(|a| a.qp_access_flags = 2, ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS),
        0
    );
    let wr = Wr::read(7, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey());
    refused(&p, wr, IBV_WC_REM_INV_REQ_ERR, Some(IBV_EVENT_QP_REQ_ERR));
}

#[test]
fn a_key_of_another_protection_domain_is_refused() {
    let (p, other) = (Pair::default(), Pair::default());
    let wr = Wr::write(7, &[p.client.sge(0, 8)], other.server.addr(0), other.server.rkey());
    refused(&p, wr, IBV_WC_REM_ACCESS_ERR, Some(IBV_EVENT_QP_ACCESS_ERR));
}

#[test]
fn a_deregistered_key_is_refused() {
    let p = Pair::default();
    let mut more = vec![0u8; 64];
    // SAFETY: a live domain and memory of ours.
    let (addr, rkey) = unsafe {
        let mr = ibv_reg_mr(p.server.pd, more.as_mut_ptr().cast(), 64, ALL as i32);
        let rkey = (*mr).rkey;
        assert_eq!(ibv_dereg_mr(mr), 0);
        (more.as_ptr() as u64, rkey)
    };
    refused(&p, Wr::write(7, &[p.client.sge(0, 8)], addr, rkey), IBV_WC_REM_ACCESS_ERR, None);
}

#[test]
fn a_bad_local_key_fails_the_sender_alone() {
    let p = Pair::default();
    let sge = ibv_sge { lkey: 1, ..p.client.sge(0, 8) };
    p.client.post(Wr::send(1, &[sge]));
    p.client.fails(1, IBV_WC_LOC_PROT_ERR);
    assert_eq!(p.client.state(), IBV_QPS_ERR);
    assert_eq!(p.server.state(), IBV_QPS_RTS);
    // What was posted before it completes before it, and well.
    let p = Pair::default();
    p.server.recv(1, &[p.server.sge(0, 8)]);
    p.client.post(Wr::send(1, &[p.client.sge(0, 8)]));
    p.client.post(Wr::send(2, &[sge]));
    p.client.done(1);
    p.client.fails(2, IBV_WC_LOC_PROT_ERR);
}

#[test]
fn a_bad_key_in_a_receive_fails_both() {
    let p = Pair::default();
    p.server.recv(1, &[ibv_sge { lkey: 1, ..p.server.sge(0, 64) }]);
    p.client.post(Wr::send(2, &[p.client.sge(0, 8)]));
    p.server.fails(1, IBV_WC_LOC_PROT_ERR);
    p.client.fails(2, IBV_WC_REM_OP_ERR);
    assert_eq!(p.server.state(), IBV_QPS_ERR);
}

#[test]
fn a_receive_that_is_too_short_fails_both() {
    let p = Pair::default();
    p.server.recv(1, &[p.server.sge(0, 15)]);
    p.client.post(Wr::send(2, &[p.client.sge(0, 16)]));
    p.server.fails(1, IBV_WC_LOC_LEN_ERR);
    p.client.fails(2, IBV_WC_REM_INV_REQ_ERR);
    assert_eq!(p.server.state(), IBV_QPS_ERR);
}

#[test]
fn without_retries_an_empty_receive_queue_fails_the_sender() {
    // The server's parameter limits the client.
    let p = Pair::new(Options::default(), Options { rnr_retry: 0, ..Options::default() });
    p.client.post(Wr::send(1, &[p.client.sge(0, 8)]));
    p.client.fails(1, IBV_WC_RNR_RETRY_EXC_ERR);
    assert_eq!(p.client.state(), IBV_QPS_ERR);
    assert_eq!(p.server.state(), IBV_QPS_RTS);
}

#[test]
fn retries_are_counted_and_each_waits_the_receiver_s_time() {
    let p = Pair::new(Options::default(), Options { rnr_retry: 3, ..Options::default() });
    p.server.rnr_timer(22); // 20.48 ms
    let start = Instant::now();
    p.client.post(Wr::send(1, &[p.client.sge(0, 8)]));
    p.client.fails(1, IBV_WC_RNR_RETRY_EXC_ERR);
    let took = start.elapsed();
    assert!(took >= Duration::from_micros(3 * 20_480), "{took:?}");
    assert!(took < Duration::from_millis(500), "{took:?}");
}

#[test]
fn seven_means_for_ever_and_immediates_need_a_receive_too() {
    let p = Pair::default();
    p.server.rnr_timer(12); // 0.64 ms
    p.client.post(Wr::write_imm(1, &[p.client.sge(0, 8)], p.server.addr(0), p.server.rkey(), 5));
    p.client.post(Wr::send(2, &[]));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(p.client.try_poll(), None);
    p.server.recv(1, &[]);
    assert_eq!(p.server.done(1).imm, Some(5));
    p.client.done(1);
    p.server.recv(2, &[]);
    p.server.done(2);
    p.client.done(2);
}

#[test]
fn the_connection_manager_leaves_the_rnr_timer_at_655_ms() {
    let p = Pair::default();
    assert_eq!(p.server.query().min_rnr_timer, 0);
    let start = Instant::now();
    p.client.post(Wr::send(1, &[]));
    std::thread::sleep(Duration::from_millis(5));
    p.server.recv(1, &[]);
    p.client.done(1);
    let took = start.elapsed();
    assert!((600..3000).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn a_full_send_queue_is_enomem_until_a_completion_is_polled() {
    let p = Pair::new(Options { send_wr: 4, ..Options::default() }, Options::default());
    for i in 0..20 {
        p.server.recv(i, &[]);
    }
    for round in 0..3u64 {
        // Three unsignalled ones and a signalled one fill it.
        for i in 0..4 {
            let flags = if i == 3 { SIGNALED } else { 0 };
            assert_eq!(p.client.post(Wr::send(i, &[]).flags(flags)), 0, "round {round}");
        }
        for _ in 0..4 {
            p.server.wc();
        }
        assert_eq!(p.client.post(Wr::send(9, &[])), libc::ENOMEM);
        p.client.done(3);
    }
    assert_eq!(p.client.recv(0, &[]), 0);
    let p = Pair::new(Options { recv_wr: 2, ..Options::default() }, Options::default());
    assert_eq!(
        (p.client.recv(0, &[]), p.client.recv(0, &[]), p.client.recv(0, &[])),
        (0, 0, libc::ENOMEM)
    );
}

#[test]
fn a_completion_queue_that_overflows_dies_with_its_queue_pairs() {
    let p = Pair::new(Options::default(), Options { cqe: 2, ..Options::default() });
    for i in 0..3 {
        p.server.recv(i, &[]);
    }
    for i in 0..3 {
        p.client.post(Wr::send(i, &[]));
    }
    async_event(&p.server, p.server.cq, IBV_EVENT_CQ_ERR);
    async_event(&p.server, p.server.qp, IBV_EVENT_QP_FATAL);
    assert_eq!(p.server.state(), IBV_QPS_ERR);
}

#[test]
fn states_change_as_the_table_says() {
    let p = Pair::default();
    let state = |s| move |a: &mut ibv_qp_attr| a.qp_state = s;
    let mask = ibv_qp_attr_mask::IBV_QP_STATE;
    assert_eq!(p.client.state(), IBV_QPS_RTS);
    assert_eq!(p.client.modify(state(IBV_QPS_RTR), mask), libc::EINVAL);
    assert_eq!(p.client.modify(state(IBV_QPS_INIT), mask), libc::EINVAL);
    assert_eq!(p.client.modify(state(IBV_QPS_SQD), mask), 0);
    // A drained queue takes posts and holds them back.
    p.server.recv(1, &[]);
    assert_eq!(p.client.post(Wr::send(1, &[])), 0);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(p.server.try_poll(), None);
    assert_eq!(p.client.modify(state(IBV_QPS_RTS), mask), 0);
    p.client.done(1);
    p.client.recv(2, &[]);
    assert_eq!(p.client.modify(state(IBV_QPS_ERR), mask), 0);
    p.client.fails(2, IBV_WC_WR_FLUSH_ERR);
    assert_eq!(p.client.modify(state(IBV_QPS_RTS), mask), libc::EINVAL);
    assert_eq!(p.client.modify(state(IBV_QPS_RESET), mask), 0);
    assert_eq!(p.client.post(Wr::send(1, &[])), libc::EINVAL);
    assert_eq!(p.client.recv(1, &[]), libc::EINVAL);
    assert_eq!(p.client.modify(state(IBV_QPS_ERR), mask), libc::EINVAL);
}

#[test]
fn a_peer_in_error_exhausts_the_transport_retries() {
    let p = Pair::default();
    assert_eq!(p.server.modify(|a| a.qp_state = IBV_QPS_ERR, ibv_qp_attr_mask::IBV_QP_STATE), 0);
    let start = Instant::now();
    p.client.post(Wr::write(1, &[], 0, 0));
    p.client.fails(1, IBV_WC_RETRY_EXC_ERR);
    // 67 ms for the first try and each of two retries.
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[test]
fn registration_checks_its_arguments() {
    let p = Pair::default();
    let mut memory = vec![0u8; 4096];
    // SAFETY: a live domain; bad addresses are what is tested.
    unsafe {
        let remote_only = ibv_reg_mr(p.client.pd, memory.as_mut_ptr().cast(), 4096, 2);
        assert_eq!((remote_only.is_null(), errno()), (true, libc::EINVAL));
        let unmapped = ibv_reg_mr(p.client.pd, 0x1000 as *mut _, 4096, 1);
        assert_eq!((unmapped.is_null(), errno()), (true, libc::EFAULT));
        let moved =
            ibv_reg_mr_iova(p.server.pd, memory.as_mut_ptr().cast(), 4096, 0x7000, ALL as i32);
        assert!(!moved.is_null());
        p.client.post(Wr::write(1, &[p.client.sge(0, 8)], 0x7000 + 4088, (*moved).rkey));
        p.client.done(1);
        assert_eq!(ibv_dereg_mr(moved), 0);
        assert_eq!(ibv_dealloc_pd(p.client.pd), libc::EBUSY);
        assert_eq!(ibv_destroy_cq(p.client.cq), libc::EBUSY);
        assert_eq!(ibv_destroy_comp_channel(p.client.channel), libc::EBUSY);
    }
}

#[test]
fn other_kinds_of_queue_pairs_are_not_supported() {
    let p = Pair::default();
    // SAFETY: live objects of ours.
    unsafe {
        let mut init: ibv_qp_init_attr = zeroed();
        (init.send_cq, init.recv_cq) = (p.client.cq, p.client.cq);
        for kind in
            [ibv_qp_type::IBV_QPT_UC, ibv_qp_type::IBV_QPT_UD, ibv_qp_type::IBV_QPT_XRC_SEND]
        {
            init.qp_type = kind;
            assert!(ibv_create_qp(p.client.pd, &raw mut init).is_null());
            assert_eq!(errno(), libc::EOPNOTSUPP);
        }
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        init.cap.max_send_wr = 1 << 20;
        assert!(ibv_create_qp(p.client.pd, &raw mut init).is_null());
        assert_eq!(errno(), libc::EINVAL);
    }
}
