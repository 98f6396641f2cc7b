// SPDX-License-Identifier: BSD-3-Clause
//! Planned faults strike where and when they were planned. The plan is the
//! process's, so each test runs in a process of its own: this program again.

mod common;

use common::*;
use rdma_sys::ibv_event_type::*;
use rdma_sys::ibv_wc_status::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

#[test]
fn posts_fail_as_told() {
    planned("posts_fail_as_told", "post-send=EIO@2 post-recv=ENOMEM@1", || {
        let p = Pair::default();
        assert_eq!(p.server.recv(1, &[]), libc::ENOMEM);
        assert_eq!(p.server.recv(1, &[]), 0);
        assert_eq!(p.client.post(Wr::write(1, &[], 0, 0)), 0);
        assert_eq!(p.client.post(Wr::write(2, &[], 0, 0)), libc::EIO);
        assert_eq!(p.client.post(Wr::write(3, &[], 0, 0)), 0);
        p.client.done(1);
        p.client.done(3);
    });
}

#[test]
fn the_send_queue_seems_full_now_and_then() {
    planned("the_send_queue_seems_full_now_and_then", "sq-full/3", || {
        let p = Pair::default();
        let results: Vec<i32> = (0..9).map(|i| p.client.post(Wr::write(i, &[], 0, 0))).collect();
        assert_eq!(results.iter().filter(|r| **r == libc::ENOMEM).count(), 3);
        assert_eq!(results[2], libc::ENOMEM);
    });
}

#[test]
fn registrations_fail_by_count_and_by_size() {
    planned("registrations_fail_by_count_and_by_size", "reg-mr=EPERM@3 memlock=200000", || {
        let p = Pair::default(); // Two regions of 64 KB.
        let mut more = vec![0u8; 100_000];
        // SAFETY: a live domain and memory of ours.
        unsafe {
            let mr = ibv_reg_mr(p.client.pd, more.as_mut_ptr().cast(), 10, 1);
            assert_eq!((mr.is_null(), errno()), (true, libc::EPERM));
            let mr = ibv_reg_mr(p.client.pd, more.as_mut_ptr().cast(), more.len(), 1);
            assert_eq!((mr.is_null(), errno()), (true, libc::ENOMEM));
            let mr = ibv_reg_mr(p.client.pd, more.as_mut_ptr().cast(), 60_000, 1);
            assert!(!mr.is_null());
            ibv_dereg_mr(mr);
        }
    });
}

#[test]
fn a_completion_fails_and_the_queue_pair_with_it() {
    planned("a_completion_fails_and_the_queue_pair_with_it", "wc-error=12@3", || {
        let p = Pair::default();
        for i in 1..=4 {
            p.client.post(Wr::write(i, &[], 0, 0));
        }
        p.client.done(1);
        p.client.done(2);
        p.client.fails(3, IBV_WC_RETRY_EXC_ERR);
        p.client.fails(4, IBV_WC_WR_FLUSH_ERR);
    });
}

#[test]
fn completions_come_late_but_in_order() {
    planned("completions_come_late_but_in_order", "wc-delay=2000000@2", || {
        let p = Pair::default();
        let start = Instant::now();
        for i in 1..=5 {
            p.client.post(Wr::write(i, &[], 0, 0));
        }
        p.client.done(1);
        assert!(start.elapsed() < Duration::from_secs(2));
        for i in 2..=5 {
            p.client.done(i);
        }
        assert!(start.elapsed() >= Duration::from_secs(2));
    });
}

#[test]
fn completions_come_in_batches() {
    planned("completions_come_in_batches", "wc-batch=4", || {
        let p = Pair::default();
        p.client.arm(false);
        for i in 0..8 {
            p.client.post(Wr::write(i, &[], 0, 0));
        }
        assert!(readable(p.client.channel_fd(), WAIT));
        for i in 0..8 {
            p.client.done(i);
        }
        // A batch that does not fill comes nevertheless.
        p.client.post(Wr::write(9, &[], 0, 0));
        p.client.done(9);
    });
}

#[test]
fn an_event_is_lost() {
    planned("an_event_is_lost", "event-lost@2", || {
        let p = Pair::default();
        for i in 1..=3 {
            p.client.arm(false);
            p.client.post(Wr::write(i, &[], 0, 0));
            p.client.done(i);
            let told = readable(p.client.channel_fd(), Duration::from_millis(100));
            assert_eq!(told, i != 2, "round {i}");
            if told {
                assert_eq!(p.client.cq_event(), Ok(()));
            }
        }
    });
}

#[test]
fn receivers_are_not_ready_though_they_are() {
    planned("receivers_are_not_ready_though_they_are", "seed=1 rnr%2", || {
        let p = Pair::default();
        p.server.rnr_timer(14);
        for i in 0..100 {
            p.server.recv(i, &[]);
            p.client.post(Wr::send(i, &[]));
            p.server.done(i);
            p.client.done(i);
        }
        drop(p);
        let p = Pair::new(Options::default(), Options { rnr_retry: 0, ..Options::default() });
        for i in 0..60 {
            p.server.recv(i, &[]);
            p.client.post(Wr::send(i, &[]));
        }
        while p.client.wc().status == IBV_WC_SUCCESS {}
        p.client.enters_error();
    });
}

/// Connects as far as it goes; answers the events of both sides after the request.
fn handshake() -> (Vec<u32>, Vec<u32>) {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let client = Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), Options::default());
    connect(client.id, &client.options);
    let soon = Duration::from_millis(300);
    let mut server = None;
    let mut events = (vec![], vec![]);
    while let Some(event) = server_cm.try_event(soon) {
        if event.kind == RDMA_CM_EVENT_CONNECT_REQUEST {
            let side = Side::new(event.id, Options::default());
            accept(side.id, &side.options);
            server = Some(side);
        } else {
            events.1.push(event.kind);
        }
    }
    while let Some(event) = client_cm.try_event(soon) {
        events.0.push(event.kind);
    }
    while let Some(event) = server_cm.try_event(soon) {
        events.1.push(event.kind);
    }
    drop((client, server));
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
    events
}

#[test]
fn a_request_is_lost() {
    planned("a_request_is_lost", "lose-req@1", || {
        assert_eq!(handshake(), (vec![RDMA_CM_EVENT_REJECTED], vec![]));
        assert_eq!(handshake().0, [RDMA_CM_EVENT_ESTABLISHED]);
    });
}

#[test]
fn a_reply_is_lost() {
    planned("a_reply_is_lost", "lose-rep@1", || {
        assert_eq!(handshake(), (vec![RDMA_CM_EVENT_REJECTED], vec![RDMA_CM_EVENT_REJECTED]));
    });
}

#[test]
fn ready_to_use_is_lost() {
    planned("ready_to_use_is_lost", "lose-rtu@1", || {
        let (client, server) = handshake();
        assert_eq!(client, [RDMA_CM_EVENT_ESTABLISHED, RDMA_CM_EVENT_DISCONNECTED]);
        assert_eq!(server, [RDMA_CM_EVENT_REJECTED]);
    });
}

#[test]
fn a_disconnect_request_is_lost() {
    planned("a_disconnect_request_is_lost", "lose-dreq@1", || {
        let p = Pair::default();
        p.server.recv(1, &[]);
        p.client.disconnect();
        // Both find the connection gone at once. A goodbye that is merely not answered
        // counts as lost after 5 s.
        let event = p.client_cm.try_event(Duration::from_secs(2)).expect("an event in time");
        assert_eq!(event.kind, RDMA_CM_EVENT_DISCONNECTED);
        p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
        p.server.disconnect();
        p.server.fails(1, IBV_WC_WR_FLUSH_ERR);
        // The next one is as it should be.
        let p = Pair::default();
        p.client.disconnect();
        p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
        p.server.disconnect();
        p.server_cm.expect(RDMA_CM_EVENT_TIMEWAIT_EXIT);
    });
}

/// Lost after each number of requests in turn, with more of them on their way.
#[test]
fn a_connection_is_lost_at_any_point_of_a_transfer() {
    const LAST: u64 = 12;
    const NAME: &str = "a_connection_is_lost_at_any_point_of_a_transfer";
    // Each connection's requests add up: after each loss the next connection starts a new count.
    let plan: Vec<String> =
        (1..=LAST).map(|n| format!("lose-transfer@{}", n * (n + 1) / 2)).collect();
    planned(NAME, &plan.join(" "), || {
        for lost_at in 1..=LAST {
            let o = Options { buffer: 1 << 20, ..Options::default() };
            let p = Pair::new(o.clone(), o);
            for i in 1..=LAST + 3 {
                p.server.recv(i, &[p.server.sge(0, 1 << 20)]);
            }
            for i in 1..=LAST + 3 {
                assert_eq!(p.client.post(Wr::send(i, &[p.client.sge(0, 100_000)])), 0);
            }
            p.client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
            p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
            p.server.disconnect();
            let received = std::iter::from_fn(|| Some(p.server.wc()))
                .take_while(|wc| wc.status == IBV_WC_SUCCESS)
                .count() as u64;
            assert_eq!(received, lost_at, "received before the loss");
            // No request succeeds that did not arrive, and each is told of.
            let sent: Vec<Wc> = (1..=LAST + 3).map(|_| p.client.wc()).collect();
            let well = sent.iter().take_while(|wc| wc.status == IBV_WC_SUCCESS).count();
            assert!(well as u64 <= received, "{well} of {received}");
            assert_eq!(sent[well].status, IBV_WC_RETRY_EXC_ERR);
            assert!(sent[well + 1..].iter().all(|wc| wc.status == IBV_WC_WR_FLUSH_ERR));
        }
    });
}

/// What happened to each of 60 posts, as a line of text.
fn refusals(plan: &str) -> String {
    const NAME: &str = "a_run_is_repeated_by_its_seed";
    let out = again(NAME).env("SOFTRDMA_FAULTS", plan).output().expect("the process");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let line = text.lines().find_map(|line| line.split_once("refused: ")).expect("a result").1;
    line.to_owned()
}

#[test]
fn a_run_is_repeated_by_its_seed() {
    if std::env::var(PART).is_ok() {
        let p = Pair::default();
        let posts: Vec<i32> = (0..60).map(|i| p.client.post(Wr::write(i, &[], 0, 0))).collect();
        println!("refused: {posts:?}");
        return;
    }
    let once = refusals("seed=7 sq-full%4 post-send=EIO%9");
    assert!(once.contains("12") && once.contains('5'), "ENOMEM and EIO: {once}");
    assert_eq!(once, refusals("seed=7 sq-full%4 post-send=EIO%9"));
    assert_ne!(once, refusals("seed=8 sq-full%4 post-send=EIO%9"));
}

#[test]
fn a_connection_is_lost_amid_the_transfer() {
    planned("a_connection_is_lost_amid_the_transfer", "lose-transfer@3", || {
        let p = Pair::default();
        for i in 1..=5 {
            p.client.post(Wr::write(i, &[], 0, 0));
        }
        let mut wc = p.client.wc();
        while wc.status == IBV_WC_SUCCESS {
            wc = p.client.wc();
        }
        assert_eq!((wc.wr_id, wc.status), (4, IBV_WC_RETRY_EXC_ERR));
        p.client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
        p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    });
}

/// Has the device removed, which the plan `remove-device@2` brings about.
fn remove(p: &Pair) {
    p.client.post(Wr::write(1, &[], 0, 0));
    p.client.done(1);
    p.client.post(Wr::send(2, &[]).flags(0));
    p.client_cm.expect(RDMA_CM_EVENT_DEVICE_REMOVAL);
    // The listener's, which is bound to an address, and the connection's.
    p.server_cm.expect(RDMA_CM_EVENT_DEVICE_REMOVAL);
    p.server_cm.expect(RDMA_CM_EVENT_DEVICE_REMOVAL);
}

/// What epoll says of a descriptor that it watches already.
fn epoll(epoll: i32, within: Duration) -> Option<i32> {
    // SAFETY: a valid event.
    unsafe {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        let n = libc::epoll_wait(epoll, &raw mut event, 1, within.as_millis() as i32);
        (n == 1).then_some(event.events as i32)
    }
}

#[test]
fn the_device_is_removed() {
    planned("the_device_is_removed", "remove-device@2", || {
        let p = Pair::default();
        p.server.recv(5, &[]);
        nonblocking(p.client.channel_fd());
        p.client.arm(false);
        // SAFETY: descriptors and a valid event.
        let watch = unsafe {
            let watch = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            let fd = p.client.channel_fd();
            assert_eq!(libc::epoll_ctl(watch, libc::EPOLL_CTL_ADD, fd, &raw mut event), 0);
            watch
        };
        remove(&p);
        // In error for ever, whatever is read of it.
        for _ in 0..3 {
            let events = epoll(watch, Duration::from_secs(5)).expect("an event");
            assert_ne!(events & libc::EPOLLERR, 0, "{events:x}");
            while p.client.cq_event().is_ok() {}
            assert_eq!(p.client.cq_event(), Err(libc::EIO));
        }
        async_event(&p.client, std::ptr::without_provenance_mut::<u8>(1), IBV_EVENT_DEVICE_FATAL);
        // Nothing more completes, and the kernel does nothing any more.
        while p.client.try_poll().is_some() {}
        p.server.recv(6, &[]);
        std::thread::sleep(Duration::from_millis(20));
        assert!(p.client.try_poll().is_none() && p.server.try_poll().is_none());
        assert_eq!(p.client.post(Wr::write(3, &[], 0, 0)), libc::EIO);
        // SAFETY: live objects and nothing that would be touched.
        unsafe {
            assert_eq!(ibv_req_notify_cq(p.client.cq, 0), libc::EIO);
            assert!(ibv_reg_mr(p.client.pd, p.client.addr(0) as *mut _, 8, 1).is_null());
            assert_eq!(errno(), libc::EIO);
            assert!(rdma_get_devices(null_mut()).is_null());
            libc::close(watch);
        }
        // Each identifier can be bound no more, and one without an address can.
        let mut sa = sockaddr("127.0.0.1:0");
        let id = p.client_cm.id();
        // SAFETY: a live identifier and an address.
        unsafe {
            assert_eq!(rdma_bind_addr(id, (&raw mut sa).cast()), -1);
            assert_eq!(errno(), libc::ENODEV);
            rdma_destroy_id(id);
        }
    });
}

#[test]
fn a_device_comes_back() {
    planned("a_device_comes_back", "remove-device@2 device-returns=200", || {
        let mut p = Pair::default();
        let (_everywhere, port) = p.server_cm.listen("0.0.0.0:0");
        // SAFETY: live objects.
        let (old, index) = unsafe {
            let old = (*p.client.id).verbs;
            (old, ibv_get_device_index((*old).device))
        };
        remove(&p);
        std::thread::sleep(Duration::from_millis(400));
        assert!(p.server_cm.try_event(Duration::ZERO).is_none(), "no more than these events");
        // Who listened at an address does no more; who listened everywhere does again.
        p.listener_gone();
        let (client_cm, server_cm) = (Cm::new(), &p.server_cm);
        let client = Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), Options::default());
        assert_eq!(connect(client.id, &client.options), 0);
        let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
        let server = Side::new(request.id, Options::default());
        assert_eq!(accept(server.id, &server.options), 0);
        client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
        server.recv(5, &[]);
        client.post(Wr::send(7, &[]));
        client.done(7);
        server.done(5);
        // SAFETY: live objects.
        unsafe {
            let new = (*client.id).verbs;
            assert_ne!(new, old);
            assert!(ibv_get_device_index((*new).device) > index, "it is another device");
            // What hangs on the old one is dead, and can be destroyed.
            assert_eq!(ibv_req_notify_cq(p.client.cq, 0), libc::EIO);
        }
        drop(client);
        drop(server);
    });
}

/// A process of its own that uses what is closed, and what it said.
fn aborts(name: &str, plan: &str, what: &str) {
    let out = again(name).env("SOFTRDMA_FAULTS", plan).output().expect("the process");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains(what), "{} {said}", out.status);
}

#[test]
fn a_device_that_nobody_is_bound_to_is_closed_and_a_use_is_told() {
    const NAME: &str = "a_device_that_nobody_is_bound_to_is_closed_and_a_use_is_told";
    if std::env::var(PART).as_deref() != Ok(NAME) {
        return aborts(
            NAME,
            "remove-device@2 device-returns=100",
            "ibv_poll_cq on a device whose ibv_context is closed",
        );
    }
    let mut p = Pair::default();
    // SAFETY: a live identifier.
    let context = unsafe { (*p.client.id).verbs };
    let kept = Queue::new(context, 10);
    remove(&p);
    std::thread::sleep(Duration::from_millis(300));
    let look = || {
        let mut count = 0;
        // SAFETY: the list is freed as it was got.
        unsafe {
            let list = rdma_get_devices(&raw mut count);
            assert!(!list.is_null() && count == 1 && *list != context);
            rdma_free_devices(list);
        }
    };
    // The list was compared, but identifiers still hold it.
    look();
    assert!(poll(kept.cq).is_none());
    p.listener_gone();
    drop(p);
    // Now they do not.
    poll(kept.cq);
    std::process::exit(0);
}

#[test]
fn a_poll_fails_and_what_was_taken_is_there() {
    planned("a_poll_fails_and_what_was_taken_is_there", "poll-fails@1", || {
        let p = Pair::default();
        for i in 1..=4 {
            p.client.post(Wr::write(i, &[], 0, 0));
        }
        std::thread::sleep(Duration::from_millis(200));
        // SAFETY: zeroes are valid completions, for which there is room.
        unsafe {
            let mut wc: [ibv_wc; 4] = std::mem::zeroed();
            assert_eq!(ibv_poll_cq(p.client.cq, 4, wc.as_mut_ptr()), -1);
            assert_eq!(wc.map(|wc| wc.wr_id), [1, 2, 3, 0]);
        }
        p.client.done(4);
    });
}

#[test]
fn large_completion_queues_can_not_be_had() {
    planned("large_completion_queues_can_not_be_had", "cq-fails-above=100", || {
        let p = Pair::new(
            Options { cqe: 50, ..Options::default() },
            Options { cqe: 50, ..Options::default() },
        );
        // SAFETY: a live context.
        unsafe {
            let context = (*p.client.id).verbs;
            assert!(ibv_create_cq(context, 101, null_mut(), null_mut(), 0).is_null());
            assert_eq!(errno(), libc::ENOMEM);
        }
    });
}

#[test]
fn a_completion_queue_fails() {
    planned("a_completion_queue_fails", "cq-err@2", || {
        let p = Pair::default();
        p.client.post(Wr::write(1, &[], 0, 0));
        p.client.done(1);
        // Nobody polls: armed, so that the fabric completes the write by itself.
        p.client.arm(false);
        p.client.post(Wr::write(2, &[], 0, 0));
        async_event(&p.client, p.client.cq, IBV_EVENT_CQ_ERR);
        async_event(&p.client, p.client.qp, IBV_EVENT_QP_FATAL);
        assert!(p.client.try_poll().is_none(), "it is silent from then on");
    });
}

#[test]
fn asynchronous_events_are_of_what_their_kind_says() {
    let plan = "async-event=3@1 async-event=10@2 async-event=0@3";
    planned("asynchronous_events_are_of_what_their_kind_says", plan, || {
        let p = Pair::default();
        (1..=3).for_each(|i| assert_eq!(p.client.post(Wr::write(i, &[], 0, 0)), 0));
        async_event(&p.client, p.client.qp, IBV_EVENT_QP_ACCESS_ERR);
        async_event(&p.client, std::ptr::without_provenance_mut::<u8>(1), IBV_EVENT_PORT_ERR);
        async_event(&p.client, p.client.cq, IBV_EVENT_CQ_ERR);
        for i in 1..=3 {
            p.client.done(i);
        }
    });
}

#[test]
fn there_is_no_device() {
    planned("there_is_no_device", "no-device", || {
        let mut n = 7;
        // SAFETY: the list is freed as it was got.
        unsafe {
            assert!(rdma_create_event_channel().is_null());
            assert_eq!(errno(), libc::ENODEV);
            let list = ibv_get_device_list(&raw mut n);
            assert!(!list.is_null() && (*list).is_null() && n == 0);
            ibv_free_device_list(list);
        }
    });
}

#[test]
fn the_device_owns_one_address() {
    planned("the_device_owns_one_address", "only=127.0.0.2", || {
        drop(Pair::at("127.0.0.2", Options::default(), Options::default()));
        let cm = Cm::new();
        let id = cm.id();
        for (address, expected) in
            [("127.0.0.1:0", libc::ENODEV), ("192.0.2.1:0", libc::EADDRNOTAVAIL), ("0.0.0.0:0", 0)]
        {
            let mut sa = sockaddr(address);
            // SAFETY: a live identifier and an address.
            let ret = unsafe { rdma_bind_addr(id, (&raw mut sa).cast()) };
            assert_eq!(if ret == 0 { 0 } else { errno() }, expected, "{address}");
        }
        // SAFETY: a live identifier.
        unsafe { rdma_destroy_id(id) };
    });
}

#[test]
fn a_plan_that_makes_no_sense_ends_the_process() {
    let mut process = again("there_is_no_device");
    let out = process.env("SOFTRDMA_FAULTS", "no-devise").output().expect("the process");
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("can't understand 'no-devise'"));
}
