// SPDX-License-Identifier: BSD-3-Clause
//! What devices do each in their own way, one term of `SOFTRDMA_FAULTS` after the other, and two
//! devices beside each other. The terms are the process's, so each test runs in a process of its own: this program again.

mod common;

use common::*;
use rdma_sys::ibv_event_type::*;
use rdma_sys::ibv_qp_state::*;
use rdma_sys::ibv_wc_status::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::ffi::CStr;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

const SHORT: Duration = Duration::from_millis(50);

/// Makes a queue pair beside a side's own; answers the inline data that it was given.
fn queue_pair(side: &Side, inline: u32) -> Result<u32, i32> {
    // SAFETY: live objects, and attributes that are numbers and pointers.
    unsafe {
        let mut init: ibv_qp_init_attr = zeroed();
        (init.send_cq, init.recv_cq) = (side.cq, side.cq);
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        (init.cap.max_send_wr, init.cap.max_recv_wr) = (4, 4);
        (init.cap.max_send_sge, init.cap.max_recv_sge) = (1, 1);
        init.cap.max_inline_data = inline;
        let qp = ibv_create_qp(side.pd, &raw mut init);
        if qp.is_null() {
            return Err(errno());
        }
        assert_eq!(ibv_destroy_qp(qp), 0);
        Ok(init.cap.max_inline_data)
    }
}

/// Posts so much inline data, and waits for its end.
fn inline(side: &Side, len: usize) -> i32 {
    let wr = Wr::write(1, &[side.sge(0, len)], side.addr(100), side.rkey());
    side.post(wr.flags(SIGNALED | INLINE))
}

#[test]
fn a_wish_for_inline_data_is_granted_and_not_kept() {
    planned("a_wish_for_inline_data_is_granted_and_not_kept", "inline=32", || {
        let p = Pair::default();
        assert_eq!((queue_pair(&p.client, 96), queue_pair(&p.client, 8)), (Ok(32), Ok(32)));
        assert_eq!((inline(&p.client, 33), inline(&p.client, 32)), (libc::EINVAL, 0));
    });
}

#[test]
fn too_much_inline_data_is_no_queue_pair() {
    planned("too_much_inline_data_is_no_queue_pair", "inline=80:error", || {
        let p = Pair::default();
        assert_eq!(queue_pair(&p.client, 80), Ok(80));
        assert_eq!(queue_pair(&p.client, 81), Err(libc::EINVAL));
        assert_eq!((inline(&p.client, 65), inline(&p.client, 64)), (libc::EINVAL, 0));
    });
}

#[test]
fn inline_data_are_fetched_by_their_key() {
    planned("inline_data_are_fetched_by_their_key", "inline=ignored", || {
        let mut p = Pair::default();
        assert_eq!(queue_pair(&p.client, 96), Ok(96));
        p.client.fill(0, &[7; 300]);
        let to = (p.server.addr(0), p.server.rkey());
        let flags = SIGNALED | INLINE;
        p.client.post(Wr::write(1, &[p.client.sge(0, 300)], to.0, to.1).flags(flags));
        p.client.done(1);
        assert_eq!(p.server.bytes(0, 300), [7; 300]);
        let unregistered = ibv_sge { lkey: 1, ..p.client.sge(0, 8) };
        p.client.post(Wr::write(2, &[unregistered], to.0, to.1).flags(flags));
        p.client.fails(2, IBV_WC_LOC_PROT_ERR);
    });
}

#[test]
fn too_much_inline_data_looks_like_a_full_queue() {
    planned("too_much_inline_data_looks_like_a_full_queue", "inline-error=ENOMEM", || {
        let p = Pair::default();
        assert_eq!((inline(&p.client, 65), inline(&p.client, 64)), (libc::ENOMEM, 0));
    });
}

/// What a post to a full send queue and one to a full receive queue answer.
fn full() -> (i32, i32) {
    let p = Pair::default();
    let send = (0..=64).map(|i| p.client.post(Wr::write(i, &[], 0, 0))).find(|code| *code != 0);
    let receive = (0..=64).map(|i| p.client.recv(i, &[])).find(|code| *code != 0);
    (send.unwrap_or(0), receive.unwrap_or(0))
}

#[test]
fn error_numbers_have_a_minus() {
    planned("error_numbers_have_a_minus", "errno=negative", || {
        assert_eq!(full(), (-libc::ENOMEM, -libc::ENOMEM));
        let p = Pair::default();
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = 0 };
        assert_eq!(p.client.post(Wr::write(1, &[p.client.sge(0, 1); 9], 0, 0)), -libc::EINVAL);
        assert_eq!(errno(), 0);
    });
}

#[test]
fn a_full_queue_is_invalid() {
    planned("a_full_queue_is_invalid", "full=EINVAL", || {
        assert_eq!(full(), (libc::EINVAL, libc::EINVAL));
    });
}

#[test]
fn nothing_is_posted_after_an_error() {
    planned("nothing_is_posted_after_an_error", "dead=EIO", || {
        let p = Pair::default();
        assert_eq!(p.client.recv(1, &[]), 0);
        p.client.disconnect();
        p.client.fails(1, IBV_WC_WR_FLUSH_ERR);
        assert_eq!(p.client.post(Wr::send(2, &[])), libc::EIO);
        assert_eq!(p.client.recv(3, &[]), libc::EIO);
        assert_eq!(p.client.try_poll(), None);
    });
}

#[test]
fn the_place_of_a_receive_is_still_in_use_now_and_then() {
    planned("the_place_of_a_receive_is_still_in_use_now_and_then", "recv-busy=10", || {
        let p = Pair::default();
        (1..=64).for_each(|i| assert_eq!(p.server.recv(i, &[]), 0));
        for i in 1..=20 {
            p.client.post(Wr::send(i, &[]));
            p.server.done(i);
            let again = matches!(i, 6 | 15);
            assert_eq!(p.server.recv(i, &[]), if again { -libc::EAGAIN } else { 0 }, "{i}");
            if again {
                assert_eq!(p.server.recv(i, &[]), 0);
            }
        }
    });
}

#[test]
fn there_is_no_immediate_data() {
    planned("there_is_no_immediate_data", "imm=none", || {
        let p = Pair::default();
        p.server.recv(1, &[]);
        let to = (p.server.addr(0), p.server.rkey());
        let write = Wr::write_imm(1, &[p.client.sge(0, 8)], to.0, to.1, 8);
        assert_eq!(p.client.post(write), libc::EINVAL);
        assert_eq!(p.client.post(Wr::send_imm(1, &[], 8)), libc::EINVAL);
        // What needs none is as ever.
        assert_eq!(p.client.post(Wr::write(2, &[p.client.sge(0, 8)], to.0, to.1)), 0);
        assert_eq!(p.client.post(Wr::send(3, &[])), 0);
        p.client.done(2);
        p.client.done(3);
        p.server.done(1);
    });
}

/// How long a send takes for which the receive is posted a moment later.
fn overrun(p: &Pair) -> Duration {
    let start = Instant::now();
    p.client.post(Wr::send(1, &[]));
    std::thread::sleep(Duration::from_millis(5));
    p.server.recv(1, &[]);
    p.client.done(1);
    start.elapsed()
}

#[test]
fn the_rnr_timer_stays_at_655_ms() {
    planned("the_rnr_timer_stays_at_655_ms", "rnr=ignored", || {
        let p = Pair::default();
        // 0.64 ms.
        p.server.rnr_timer(12);
        assert_eq!(p.server.query().min_rnr_timer, 0);
        let took = overrun(&p);
        assert!(took >= Duration::from_millis(600), "{took:?}");
    });
}

#[test]
fn the_rnr_timer_can_not_be_set_once_connected() {
    planned("the_rnr_timer_can_not_be_set_once_connected", "rnr=refused", || {
        let p = Pair::default();
        let set = |a: &mut ibv_qp_attr| a.min_rnr_timer = 12;
        let mask = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER;
        assert_eq!(p.server.modify(set, mask), libc::EINVAL);
        assert_eq!((p.server.query().min_rnr_timer, p.server.state()), (0, IBV_QPS_RTS));
    });
}

#[test]
fn where_nothing_is_repeated_a_missing_receive_ends_both() {
    planned("where_nothing_is_repeated_a_missing_receive_ends_both", "rnr=none", || {
        for with_immediate in [false, true] {
            let p = Pair::default();
            p.server.recv(1, &[]);
            let post = |wr_id| {
                p.client.post(match with_immediate {
                    true => Wr::write_imm(wr_id, &[], 0, 0, 5),
                    false => Wr::send(wr_id, &[]),
                })
            };
            post(1);
            p.client.done(1);
            p.server.done(1);
            post(2);
            p.client.fails(2, IBV_WC_REM_OP_ERR);
            p.server.enters_error();
            async_event(&p.server, p.server.qp, IBV_EVENT_QP_FATAL);
        }
    });
}

#[test]
fn a_change_without_the_state_resets() {
    planned("a_change_without_the_state_resets", "modify-resets", || {
        let p = Pair::default();
        let timer = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER;
        let states = ibv_qp_attr_mask::IBV_QP_STATE | ibv_qp_attr_mask::IBV_QP_CUR_STATE;
        let set = |a: &mut ibv_qp_attr| {
            (a.qp_state, a.cur_qp_state, a.min_rnr_timer) = (IBV_QPS_RTS, IBV_QPS_RTS, 12);
        };
        assert_eq!(p.server.modify(set, timer | states), 0);
        assert_eq!((p.server.query().min_rnr_timer, p.server.state()), (12, IBV_QPS_RTS));
        assert_eq!(p.server.modify(set, timer), 0);
        assert_eq!(p.server.state(), IBV_QPS_RESET);
        assert_eq!(p.server.post(Wr::send(1, &[])), libc::EINVAL);
        p.client.post(Wr::send(2, &[]));
        p.client.fails(2, IBV_WC_RETRY_EXC_ERR);
    });
}

#[test]
fn a_write_of_nothing_fails() {
    planned("a_write_of_nothing_fails", "zero-write=fails", || {
        let p = Pair::default();
        p.client.post(Wr::write(1, &[p.client.sge(0, 1)], p.server.addr(0), p.server.rkey()));
        p.client.done(1);
        p.client.post(Wr::write(2, &[], p.server.addr(0), p.server.rkey()));
        p.client.fails(2, IBV_WC_LOC_QP_OP_ERR);
    });
}

#[test]
fn a_write_of_nothing_needs_a_key() {
    planned("a_write_of_nothing_needs_a_key", "zero-write=needs-key", || {
        let p = Pair::default();
        p.client.post(Wr::write(1, &[], p.server.addr(0), p.server.rkey()));
        p.client.done(1);
        p.client.post(Wr::write(2, &[], 0, 0));
        p.client.fails(2, IBV_WC_LOC_QP_OP_ERR);
    });
}

#[test]
fn connections_have_another_time_out() {
    planned("connections_have_another_time_out", "ack-timeout=18", || {
        let p = Pair::default();
        assert_eq!((p.client.query().timeout, p.server.query().timeout), (18, 18));
    });
}

#[test]
fn objects_are_limited() {
    // A pair has two of each; the connection manager has a domain of its own.
    let plan = "max-qp=2 max-mr=2 max-pd=3 max-cqe=300 at-limit=ENOSPC";
    planned("objects_are_limited", plan, || {
        let p = Pair::default();
        // SAFETY: live objects.
        unsafe {
            let context = (*p.client.id).verbs;
            let mut attr: ibv_device_attr = zeroed();
            assert_eq!(ibv_query_device(context, &raw mut attr), 0);
            let said = (attr.max_qp, attr.max_mr, attr.max_pd, attr.max_cqe);
            assert_eq!(said, (2, 2, 3, 300));
            assert_eq!(queue_pair(&p.client, 0), Err(libc::ENOSPC));
            assert!(ibv_reg_mr(p.client.pd, p.client.addr(0) as *mut _, 8, 1).is_null());
            assert_eq!(errno(), libc::ENOSPC);
            assert!(ibv_alloc_pd(context).is_null());
            assert_eq!(errno(), libc::ENOSPC);
            assert!(ibv_create_cq(context, 301, null_mut(), null_mut(), 0).is_null());
        }
        drop(p);
        drop(Pair::default());
    });
}

#[test]
fn a_queue_is_armed_by_what_comes_next() {
    planned("a_queue_is_armed_by_what_comes_next", "arm=deferred", || {
        let p = Pair::default();
        let fd = p.server.channel_fd();
        (1..=5).for_each(|i| assert_eq!(p.server.recv(i, &[]), 0));
        let send = |wr_id| {
            p.client.post(Wr::send(wr_id, &[]));
            p.client.done(wr_id);
        };
        // By a poll, that takes what is there.
        p.server.arm(false);
        send(1);
        assert!(!readable(fd, SHORT), "it is not armed yet");
        p.server.done(1);
        assert!(!readable(fd, SHORT), "nothing has come since");
        send(2);
        assert!(readable(fd, WAIT));
        assert_eq!(p.server.cq_event(), Ok(()));
        p.server.done(2);
        // By a poll, that leaves some.
        p.server.arm(false);
        send(3);
        send(4);
        p.server.done(3);
        assert!(readable(fd, WAIT));
        assert_eq!(p.server.cq_event(), Ok(()));
        p.server.done(4);
        // By a post.
        p.server.arm(false);
        assert_eq!(p.server.recv(6, &[]), 0);
        send(5);
        assert!(readable(fd, WAIT));
        assert_eq!(p.server.cq_event(), Ok(()));
    });
}

#[test]
fn each_arming_has_two_events() {
    planned("each_arming_has_two_events", "events=2", || {
        let p = Pair::default();
        nonblocking(p.server.channel_fd());
        for i in 1..=3 {
            p.server.recv(i, &[]);
            p.server.arm(false);
            p.client.post(Wr::send(i, &[]));
            p.client.done(i);
            assert!(readable(p.server.channel_fd(), WAIT));
            assert_eq!(p.server.cq_event(), Ok(()));
            assert!(readable(p.server.channel_fd(), WAIT));
            assert_eq!((p.server.cq_event(), p.server.cq_event()), (Ok(()), Err(libc::EAGAIN)));
            p.server.done(i);
        }
    });
}

#[test]
fn flushes_are_found_by_polling() {
    planned("flushes_are_found_by_polling", "flush=on-poll", || {
        let p = Pair::default();
        let fd = p.server.channel_fd();
        (1..=3).for_each(|i| assert_eq!(p.server.recv(i, &[]), 0));
        p.server.arm(false);
        p.server.disconnect();
        assert!(readable(fd, WAIT), "the first has an event");
        assert_eq!(p.server.cq_event(), Ok(()));
        p.server.arm(false);
        p.server.recv(4, &[]);
        assert!(!readable(fd, SHORT), "the others have none");
        (1..=4).for_each(|i| p.server.fails(i, IBV_WC_WR_FLUSH_ERR));
    });
}

#[test]
fn destroying_a_queue_pair_takes_its_time() {
    planned("destroying_a_queue_pair_takes_its_time", "destroy-cost=200000", || {
        let p = Pair::default();
        let start = Instant::now();
        assert!(queue_pair(&p.client, 0).is_ok());
        // For 256 entries.
        assert!(start.elapsed() >= Duration::from_millis(51), "{:?}", start.elapsed());
    });
}

/// Binds an identifier to the device and looks at it.
fn bound(look: impl FnOnce(&rdma_cm_id)) {
    let cm = Cm::new();
    let id = cm.id();
    let mut sa = sockaddr("127.0.0.1:0");
    // SAFETY: a live identifier and an address.
    unsafe {
        assert_eq!(rdma_bind_addr(id, (&raw mut sa).cast()), 0);
        look(&*id);
        rdma_destroy_id(id);
    }
}

#[test]
fn a_node_without_guid_is_not_found() {
    planned("a_node_without_guid_is_not_found", "guid=0", || {
        bound(|id| assert!(id.verbs.is_null()));
        // SAFETY: the list is freed as it was got.
        unsafe {
            let list = ibv_get_device_list(null_mut());
            assert_eq!(ibv_get_device_guid(*list), 0);
            ibv_free_device_list(list);
        }
    });
}

#[test]
fn a_device_says_that_it_is_iwarp_and_whose() {
    planned("a_device_says_that_it_is_iwarp_and_whose", "transport=iwarp vendor=0x1ded", || {
        bound(|id| {
            // SAFETY: a live context has its device.
            let device = unsafe { &*(*id.verbs).device };
            assert_eq!(device.node_type, ibv_node_type::IBV_NODE_RNIC);
            assert_eq!(device.transport_type, ibv_transport_type::IBV_TRANSPORT_IWARP);
            // SAFETY: a live context; zeroes are valid attributes.
            let mut attr: ibv_device_attr = unsafe { zeroed() };
            // SAFETY: as above.
            assert_eq!(unsafe { ibv_query_device(id.verbs, &raw mut attr) }, 0);
            assert_eq!(attr.vendor_id, 0x1ded);
        });
    });
}

#[test]
fn a_process_can_not_connect_to_itself() {
    planned("a_process_can_not_connect_to_itself", "loopback=no", || {
        let cm = Cm::new();
        let (listener, port) = cm.listen("127.0.0.1:0");
        let id = cm.resolve(&format!("127.0.0.1:{port}"));
        assert_eq!(connect(id, &Options::default()), 0);
        cm.expect(RDMA_CM_EVENT_UNREACHABLE);
        // SAFETY: live identifiers.
        unsafe {
            rdma_destroy_id(id);
            rdma_destroy_id(listener);
        }
    });
}

/// Connects, with the accepting side's event still to come.
fn half_connected() -> (Side, Side, [Cm; 2]) {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let client = Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), Options::default());
    assert_eq!(connect(client.id, &client.options), 0);
    let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let server = Side::new(request.id, Options::default());
    server.recv(1, &[]);
    assert_eq!(accept(server.id, &server.options), 0);
    client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
    (client, server, [client_cm, server_cm])
}

#[test]
fn ready_to_use_comes_late() {
    planned("ready_to_use_comes_late", "late-rtu=500", || {
        let (client, server, [_client_cm, server_cm]) = half_connected();
        client.post(Wr::send(1, &[]));
        server.done(1);
        assert!(server_cm.try_event(Duration::from_millis(100)).is_none());
        server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
        drop((client, server));
        // Or the application says that something has come.
        let (client, server, [_client_cm, server_cm]) = half_connected();
        let established = IBV_EVENT_COMM_EST;
        // SAFETY: a live identifier.
        unsafe {
            assert_eq!(rdma_notify(server.id, established), 0);
            server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
            assert_eq!((rdma_notify(server.id, established), errno()), (-1, libc::EISCONN));
        }
        assert!(server_cm.try_event(Duration::from_millis(700)).is_none(), "it comes once");
        drop((client, server));
    });
}

#[test]
fn a_profile_is_a_bundle_of_terms() {
    const NAME: &str = "a_profile_is_a_bundle_of_terms";
    if std::env::var(PART).as_deref() == Ok(NAME) {
        assert_eq!(full(), (-libc::ENOMEM, -libc::ENOMEM));
        // Of the list, which comes after the profile's own.
        let p = Pair::default();
        assert_eq!((queue_pair(&p.client, 96), queue_pair(&p.client, 8)), (Ok(40), Ok(40)));
        return;
    }
    let run = |device| {
        let mut process = again(NAME);
        let process = process.env("SOFTRDMA_DEVICE", device).env("SOFTRDMA_FAULTS", "inline=40");
        process.output().expect("the process")
    };
    let out = run("qedr");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = run("qedr2");
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2));
    let names = "mlx5, mlx4, irdma, irdma-iwarp, erdma, bnxt, hns-hip08, iwarp, ionic, mana, qedr";
    assert!(said.contains("there is no 'qedr2'") && said.contains(names), "{said}");
}

/// The names of the devices that there are.
fn devices() -> Vec<String> {
    let mut count = 0;
    // SAFETY: a list of so many devices, given back.
    unsafe {
        let list = ibv_get_device_list(&raw mut count);
        let name = |at| CStr::from_ptr(ibv_get_device_name(*list.add(at))).to_string_lossy();
        let names = (0..count as usize).map(|at| name(at).into_owned()).collect();
        ibv_free_device_list(list);
        names
    }
}

/// A connection of the device that has an address with itself.
fn pair(address: &str) -> Pair {
    Pair::at(address, Options::default(), Options::default())
}

/// Whether a write with immediate data can be posted.
fn has_immediate(p: &Pair) -> bool {
    p.server.recv(1, &[]);
    p.client.post(Wr::write_imm(1, &[], 0, 0, 8)) == 0
}

#[test]
fn two_devices_have_each_its_address_and_its_ways() {
    let name = "two_devices_have_each_its_address_and_its_ways";
    planned_by("SOFTRDMA_SECOND", name, "127.0.0.2 imm=none max-qp=8568", || {
        assert_eq!(devices(), ["softrdma0", "softrdma1"]);
        let (first, second) = (pair("127.0.0.1"), pair("127.0.0.2"));
        assert!(has_immediate(&first) && !has_immediate(&second));
        // SAFETY: live identifiers, and attributes that are numbers.
        unsafe {
            let of = |p: &Pair| (*p.client.id).verbs;
            assert_ne!(of(&first), of(&second));
            assert_eq!((*second.client.id).verbs, (*second.server.id).verbs);
            let attributes = |p: &Pair| {
                let mut attributes: ibv_device_attr = zeroed();
                assert_eq!(ibv_query_device(of(p), &raw mut attributes), 0);
                attributes
            };
            let (first, second) = (attributes(&first), attributes(&second));
            assert_ne!(first.node_guid, second.node_guid);
            assert_eq!((first.max_qp, second.max_qp), (65_536, 8568));
        }
        assert!(has_immediate(&pair("127.0.0.3")), "every other address is the first's");
    });
}

#[test]
fn a_second_device_may_come_later() {
    let plan = "127.0.0.2 imm=none appears=300";
    planned_by("SOFTRDMA_SECOND", "a_second_device_may_come_later", plan, || {
        assert_eq!(devices(), ["softrdma0"]);
        let cm = Cm::new();
        let mut sa = sockaddr("127.0.0.2:0");
        // SAFETY: a live identifier and an address.
        let mut bind = |id| unsafe { rdma_bind_addr(id, (&raw mut sa).cast()) };
        assert_eq!(bind(cm.id()), -1);
        assert_eq!(errno(), libc::ENODEV);
        assert!(has_immediate(&pair("127.0.0.1")));
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(devices(), ["softrdma0", "softrdma1"]);
        assert!(!has_immediate(&pair("127.0.0.2")));
    });
}
