// SPDX-License-Identifier: BSD-3-Clause
//! What each operation does when all is well.

mod common;

use common::*;
use rdma_sys::*;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[test]
fn send_arrives_whole_at_every_size() {
    let o = Options { buffer: 3 << 20, ..Options::default() };
    let mut p = Pair::new(o.clone(), o);
    for (i, len) in [0usize, 1, 31, 4096, 65_536, 262_144, 262_145, 1 << 20, (2 << 20) + 7]
        .into_iter()
        .enumerate()
    {
        let data = pattern(len, i as u8);
        p.client.fill(0, &data);
        p.server.recv(1, &[p.server.sge(0, 3 << 20)]);
        assert_eq!(p.client.post(Wr::send(2, &[p.client.sge(0, len)])), 0);
        let wc = p.server.done(1);
        assert_eq!((wc.len as usize, wc.opcode, wc.imm), (len, ibv_wc_opcode::IBV_WC_RECV, None));
        assert_eq!(p.server.bytes(0, len), data);
        assert_eq!(p.client.done(2).opcode, ibv_wc_opcode::IBV_WC_SEND);
    }
}

#[test]
fn send_with_immediate_delivers_it() {
    let p = Pair::default();
    p.server.recv(1, &[]);
    p.client.post(Wr::send_imm(2, &[], 0xdead_beef));
    assert_eq!(p.server.done(1).imm, Some(0xdead_beef));
    p.client.done(2);
}

#[test]
fn several_pieces_gather_and_scatter() {
    let mut p = Pair::default();
    p.client.fill(0, &pattern(3000, 1));
    let from =
        [p.client.sge(100, 7), p.client.sge(0, 0), p.client.sge(1000, 1500), p.client.sge(0, 93)];
    let to = [p.server.sge(50, 1), p.server.sge(60, 1000), p.server.sge(5000, 4000)];
    p.server.recv(1, &to);
    p.client.post(Wr::send(2, &from));
    assert_eq!(p.server.done(1).len, 1600);
    let b = pattern(3000, 1);
    let sent = [&b[100..107], &b[1000..2500], &b[0..93]].concat();
    let got = [p.server.bytes(50, 1), p.server.bytes(60, 1000), p.server.bytes(5000, 599)].concat();
    assert_eq!(got, sent);
}

#[test]
fn inline_data_is_taken_at_the_post_and_needs_no_key() {
    let p = Pair::default();
    p.server.recv(1, &[p.server.sge(0, 64)]);
    let mut local = *b"inline data from anywhere";
    let sge =
        rdma_sys::ibv_sge { addr: local.as_ptr() as u64, length: local.len() as u32, lkey: 0 };
    assert_eq!(p.client.post(Wr::send(2, &[sge]).flags(SIGNALED | INLINE)), 0);
    local.fill(0);
    p.server.done(1);
    assert_eq!(p.server.bytes(0, 25), b"inline data from anywhere");
    let long = rdma_sys::ibv_sge { addr: local.as_ptr() as u64, length: 65, lkey: 0 };
    assert_eq!(p.client.post(Wr::send(3, &[long]).flags(INLINE)), libc::EINVAL);
}

#[test]
fn write_needs_no_receive_and_its_data_is_there_before_what_follows() {
    let o = Options { buffer: 1 << 20, ..Options::default() };
    let mut p = Pair::new(o.clone(), o);
    let (to, rkey) = (p.server.addr(0), p.server.rkey());
    for round in 0..50u32 {
        let data = pattern(1 << 20, round as u8);
        p.client.fill(0, &data);
        p.server.recv(u64::from(round), &[]);
        p.client.post(Wr::write(1, &[p.client.sge(0, 1 << 20)], to, rkey).flags(0));
        p.client.post(Wr::write_imm(2, &[], 0, 0, round));
        let wc = p.server.done(u64::from(round));
        assert_eq!(
            (wc.opcode, wc.len, wc.imm),
            (ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM, 0, Some(round))
        );
        assert!(p.server.bytes(0, 1 << 20) == data, "round {round}");
        assert_eq!(p.client.done(2).opcode, ibv_wc_opcode::IBV_WC_RDMA_WRITE);
    }
}

#[test]
fn read_brings_the_data_and_a_fenced_send_waits_for_it() {
    let o = Options { buffer: 4 << 20, ..Options::default() };
    let mut p = Pair::new(o.clone(), o);
    let len = 3 << 20;
    p.server.fill(0, &pattern(len, 9));
    p.server.recv(5, &[p.server.sge(len, 16)]);
    p.client.post(Wr::read(1, &[p.client.sge(0, len)], p.server.addr(0), p.server.rkey()));
    p.client.post(Wr::send(2, &[p.client.sge(len - 16, 16)]).flags(SIGNALED | FENCE));
    let wc = p.client.done(1);
    assert_eq!((wc.opcode, wc.len as usize), (ibv_wc_opcode::IBV_WC_RDMA_READ, len));
    assert!(p.client.bytes(0, len) == pattern(len, 9));
    p.client.done(2);
    p.server.done(5);
    assert_eq!(p.server.bytes(len, 16), pattern(len, 9)[len - 16..]);
}

#[test]
fn both_sides_read_and_write_much_at_once() {
    let o = Options { buffer: 8 << 20, ..Options::default() };
    let p = Pair::new(o.clone(), o);
    let mb = 1 << 20;
    for (a, b) in [(&p.client, &p.server), (&p.server, &p.client)] {
        for i in 0..8u64 {
            let at = if i % 2 == 0 { 0 } else { 2 * mb };
            let wr = if i % 2 == 0 {
                Wr::read(i, &[a.sge(4 * mb, mb)], b.addr(at), b.rkey())
            } else {
                Wr::write(i, &[a.sge(6 * mb, mb)], b.addr(at), b.rkey())
            };
            assert_eq!(a.post(wr), 0);
        }
    }
    for side in [&p.client, &p.server] {
        for i in 0..8 {
            side.done(i);
        }
    }
}

#[test]
fn order_holds_within_a_queue_pair() {
    let o = Options { send_wr: 512, recv_wr: 512, cqe: 2048, ..Options::default() };
    let mut p = Pair::new(o.clone(), o);
    for round in 0..20u32 {
        for i in 0..500u32 {
            let slot = 8 * i as usize;
            p.client.fill(slot, &(round * 500 + i).to_le_bytes());
            p.server.recv(u64::from(i), &[p.server.sge(slot, 4)]);
        }
        for i in 0..500u32 {
            // One in fifty is signalled: completions come for those alone.
            let flags = if i % 50 == 49 { SIGNALED } else { 0 };
            assert_eq!(
                p.client
                    .post(Wr::send(u64::from(i), &[p.client.sge(8 * i as usize, 4)]).flags(flags)),
                0
            );
        }
        for i in 0..500u32 {
            p.server.done(u64::from(i));
            assert_eq!(p.server.bytes(8 * i as usize, 4), (round * 500 + i).to_le_bytes());
        }
        for i in 0..10 {
            p.client.done(i * 50 + 49);
        }
        assert_eq!(p.client.try_poll(), None);
    }
}

#[test]
fn a_queue_pair_that_signals_all_needs_no_flag() {
    let o = Options { sig_all: true, ..Options::default() };
    let p = Pair::new(o, Options::default());
    for i in 0..5 {
        p.client.post(Wr::write(i, &[], 0, 0).flags(0));
    }
    for i in 0..5 {
        p.client.done(i);
    }
}

#[test]
fn write_with_immediate_brings_both() {
    let mut p = Pair::default();
    p.client.fill(0, b"data and word");
    p.server.recv(1, &[]);
    let wr = Wr::write_imm(2, &[p.client.sge(0, 13)], p.server.addr(40), p.server.rkey(), 0xabcd);
    p.client.post(wr);
    let wc = p.server.done(1);
    assert_eq!(
        (wc.opcode, wc.len, wc.imm),
        (ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM, 13, Some(0xabcd))
    );
    assert_eq!(p.server.bytes(40, 13), b"data and word");
    p.client.done(2);
}

/// A queue's memory must outlive an event that names it.
#[test]
fn destroying_a_completion_queue_waits_for_the_acknowledgement() {
    let p = Pair::default();
    // SAFETY: a queue of our own, destroyed once; its event is acknowledged by the other thread.
    unsafe {
        let context = (*p.client.id).verbs;
        let channel = ibv_create_comp_channel(context);
        let cq = ibv_create_cq(context, 4, null_mut(), channel, 0);
        let mut init: ibv_qp_init_attr = zeroed();
        (init.send_cq, init.recv_cq) = (cq, cq);
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        init.cap.max_recv_wr = 1;
        let qp = ibv_create_qp(p.client.pd, &raw mut init);
        assert_eq!(ibv_req_notify_cq(cq, 0), 0);
        // In the error state a receive completes at once.
        let mut attr: ibv_qp_attr = zeroed();
        attr.port_num = 1;
        for (state, mask) in [
            (ibv_qp_state::IBV_QPS_INIT, 0x1 | 0x8 | 0x10 | 0x20),
            (ibv_qp_state::IBV_QPS_ERR, 0x1),
        ] {
            attr.qp_state = state;
            assert_eq!(ibv_modify_qp(qp, &raw mut attr, mask), 0);
        }
        let mut wr: ibv_recv_wr = zeroed();
        assert_eq!(ibv_post_recv(qp, &raw mut wr, &mut null_mut()), 0);
        let (mut about, mut user) = (null_mut(), null_mut());
        assert_eq!(ibv_get_cq_event(channel, &raw mut about, &raw mut user), 0);
        assert_eq!((about, ibv_destroy_qp(qp)), (cq, 0));
        let named = about as usize;
        let start = Instant::now();
        let ack = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            ibv_ack_cq_events(named as *mut ibv_cq, 1);
        });
        assert_eq!(ibv_destroy_cq(cq), 0);
        assert!(start.elapsed() >= Duration::from_millis(100));
        ack.join().expect("acknowledged");
        assert_eq!(ibv_destroy_comp_channel(channel), 0);
    }
}

#[test]
fn zero_byte_write_names_no_memory_and_is_acknowledged() {
    let p = Pair::default();
    p.client.post(Wr::write(7, &[], 12_345, 99));
    p.client.done(7);
}

#[test]
fn a_channel_tells_once_for_each_arming() {
    let p = Pair::default();
    let (client, server) = (&p.client, &p.server);
    let fd = server.channel_fd();
    for i in 0..4 {
        server.recv(i, &[]);
    }
    // Not armed: a completion, no event.
    client.post(Wr::send(1, &[]));
    server.done(0);
    assert!(!readable(fd, Duration::from_millis(50)));
    // Armed: one event for two completions.
    server.arm(false);
    client.post(Wr::send(2, &[]));
    client.post(Wr::send(3, &[]));
    assert!(readable(fd, WAIT));
    assert_eq!(server.cq_event(), Ok(()));
    server.done(1);
    server.done(2);
    assert!(!readable(fd, Duration::from_millis(50)));
    nonblocking(fd);
    assert_eq!(server.cq_event(), Err(libc::EAGAIN));
    // Armed for solicited ones only.
    server.arm(true);
    client.post(Wr::send(4, &[]));
    server.done(3);
    assert!(!readable(fd, Duration::from_millis(50)));
    server.recv(4, &[]);
    client.post(Wr::send(5, &[]).flags(SIGNALED | SOLICITED));
    assert!(readable(fd, WAIT));
    assert_eq!(server.cq_event(), Ok(()));
    server.done(4);
}

#[test]
fn a_send_completion_raises_an_event_too() {
    let p = Pair::default();
    for i in 0..200 {
        p.server.recv(i, &[]);
        p.client.arm(false);
        p.client.post(Wr::send(i, &[]));
        assert!(readable(p.client.channel_fd(), WAIT), "round {i}");
        assert_eq!(p.client.cq_event(), Ok(()));
        p.client.done(i);
        p.server.done(i);
    }
}

/// Both sides sleep on their channels, as an event loop does: no wake-up may be lost.
#[test]
fn sends_may_complete_on_a_queue_and_a_channel_of_their_own() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let id = client_cm.resolve(&format!("127.0.0.1:{port}"));
    // SAFETY: a live identifier.
    let sends = Queue::new(unsafe { (*id).verbs }, 16);
    let client = Side::new(id, Options { send_queue: Some(sends), ..Options::default() });
    connect(client.id, &client.options);
    let request = server_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST);
    let server = Side::new(request.id, Options::default());
    accept(server.id, &server.options);
    client_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED);
    server_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED);
    // SAFETY: a live channel; an event that is taken is acknowledged.
    let sends_event = || unsafe {
        assert!(readable((*sends.channel).fd, WAIT));
        let (mut cq, mut user) = (null_mut(), null_mut());
        assert_eq!(ibv_get_cq_event(sends.channel, &raw mut cq, &raw mut user), 0);
        ibv_ack_cq_events(cq, 1);
        assert_eq!(cq, sends.cq);
    };
    for _ in 0..200 {
        client.recv(3, &[client.sge(0, 64)]);
        server.recv(1, &[server.sge(0, 64)]);
        client.arm(false);
        // SAFETY: a live queue.
        assert_eq!(unsafe { ibv_req_notify_cq(sends.cq, 0) }, 0);
        client.post(Wr::send(2, &[client.sge(0, 64)]));
        server.done(1);
        sends_event();
        assert_eq!(poll(sends.cq).map(|wc| wc.wr_id), Some(2));
        assert!(!readable(client.channel_fd(), Duration::ZERO));
        server.post(Wr::send(4, &[server.sge(0, 64)]));
        assert!(readable(client.channel_fd(), WAIT));
        client.cq_event().expect("an event is there");
        client.done(3);
        server.done(4);
        // SAFETY: a live channel.
        assert!(!readable(unsafe { (*sends.channel).fd }, Duration::ZERO));
    }
    drop((client, server));
    sends.destroy();
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
}

#[test]
fn ping_pong_by_events_never_stalls() {
    let p = Pair::default();
    let rounds = 5_000u64;
    let turn = |side: &Side, first: bool| {
        let mut worst = Duration::ZERO;
        let mut sends = 0;
        side.recv(0, &[side.sge(0, 64)]);
        side.arm(false);
        if first {
            side.post(Wr::send(1, &[side.sge(64, 64)]));
        }
        let mut got = 0;
        while got < rounds {
            let start = Instant::now();
            assert!(readable(side.channel_fd(), WAIT), "stalled after {got} of {rounds}");
            worst = worst.max(start.elapsed());
            side.cq_event().expect("an event is there");
            side.arm(false);
            while let Some(wc) = side.try_poll() {
                assert_eq!(wc.status, 0);
                if wc.wr_id == 0 {
                    got += 1;
                    side.recv(0, &[side.sge(0, 64)]);
                    if !(first && got == rounds) {
                        sends += 1;
                        side.post(Wr::send(1, &[side.sge(64, 64)]));
                    }
                }
            }
        }
        (worst, sends)
    };
    let (server, client) = (&p.server, &p.client);
    std::thread::scope(|s| {
        let server = s.spawn(|| turn(server, false));
        let (worst, _) = turn(client, true);
        let (worst2, _) = server.join().expect("the server's thread");
        assert!(worst.max(worst2) < Duration::from_secs(2), "{worst:?} {worst2:?}");
    });
}

#[test]
fn threads_may_post_to_one_queue_pair_at_once() {
    let o = Options { send_wr: 4096, recv_wr: 8192, cqe: 16_384, ..Options::default() };
    let p = Pair::new(o.clone(), o);
    let (threads, each) = (4u64, 1_500u64);
    for i in 0..threads * each {
        assert_eq!(p.server.recv(i, &[p.server.sge(0, 8)]), 0);
    }
    let (client, server) = (&p.client, &p.server);
    std::thread::scope(|s| {
        for t in 0..threads {
            s.spawn(move || {
                for i in 0..each {
                    let mark = t << 32 | i;
                    loop {
                        let sge = rdma_sys::ibv_sge {
                            addr: (&raw const mark) as u64,
                            length: 8,
                            lkey: 0,
                        };
                        match client.post(
                            Wr::send_imm(mark, &[sge], (t * each + i) as u32)
                                .flags(SIGNALED | INLINE),
                        ) {
                            0 => break,
                            libc::ENOMEM => std::thread::yield_now(),
                            other => panic!("post: {other}"),
                        }
                    }
                }
            });
        }
        let mut next = vec![0; threads as usize];
        for _ in 0..threads * each {
            let wc = client.wc();
            assert_eq!(wc.status, 0);
            let t = (wc.wr_id >> 32) as usize;
            assert_eq!(wc.wr_id & 0xffff_ffff, next[t], "order within a thread");
            next[t] += 1;
        }
    });
    let mut next = vec![0; threads as usize];
    for i in 0..threads * each {
        let imm = u64::from(server.done(i).imm.expect("immediate data"));
        assert_eq!(imm % each, next[(imm / each) as usize]);
        next[(imm / each) as usize] += 1;
    }
}

/// Threads post receives and poll one queue at once: nothing is lost, nothing comes twice.
#[test]
fn threads_may_post_receives_and_poll_at_once() {
    let o = Options { send_wr: 256, recv_wr: 256, cqe: 1024, ..Options::default() };
    let p = Pair::new(o.clone(), o);
    p.server.rnr_timer(1);
    let (client, server) = (&p.client, &p.server);
    let (threads, each) = (3u64, 300u64);
    let seen = std::sync::Mutex::new(vec![0u8; (threads * each) as usize]);
    let got = AtomicU64::new(0);
    std::thread::scope(|s| {
        for t in 0..threads {
            let (seen, got) = (&seen, &got);
            s.spawn(move || {
                let end = Instant::now() + 11 * WAIT;
                let mut posted = 0;
                while got.load(Ordering::Relaxed) < threads * each {
                    if posted < each && server.recv(t * each + posted, &[]) == 0 {
                        posted += 1;
                    }
                    match server.try_poll() {
                        Some(wc) => {
                            assert_eq!(wc.status, 0);
                            seen.lock().expect("no thread failed")[wc.wr_id as usize] += 1;
                            got.fetch_add(1, Ordering::Relaxed);
                        }
                        None => std::thread::yield_now(),
                    }
                    assert!(Instant::now() < end, "{} received", got.load(Ordering::Relaxed));
                }
            });
        }
        let (mut sent, mut done) = (0, 0);
        let end = Instant::now() + 12 * WAIT;
        while done < threads * each {
            assert!(Instant::now() < end, "{done} completed");
            if sent < threads * each && client.post(Wr::send(sent, &[])) == 0 {
                sent += 1;
            }
            while let Some(wc) = client.try_poll() {
                assert_eq!((wc.wr_id, wc.status), (done, 0));
                done += 1;
            }
        }
    });
    assert!(seen.lock().expect("no thread failed").iter().all(|times| *times == 1));
}

#[test]
fn unknown_operations_are_refused() {
    let p = Pair::default();
    for opcode in [
        ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP,
        ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD,
        ibv_wr_opcode::IBV_WR_TSO,
    ] {
        let wr = Wr { opcode, ..Wr::send(1, &[p.client.sge(0, 8)]) };
        assert_eq!(p.client.post(wr), libc::EOPNOTSUPP);
    }
}

/// The adapter works while the application does something else.
#[test]
fn an_application_that_does_not_look_delays_nobody() {
    let p = Pair::default();
    for i in 0..50 {
        p.server.recv(i, &[p.server.sge(0, 8)]);
        p.server.arm(false);
        let start = Instant::now();
        p.client.post(Wr::send(i, &[p.client.sge(0, 8)]));
        p.client.done(i);
        assert!(start.elapsed() < Duration::from_millis(500), "round {i}: {:?}", start.elapsed());
        assert!(readable(p.server.channel_fd(), WAIT));
        assert_eq!(p.server.cq_event(), Ok(()));
        p.server.done(i);
    }
}

/// A message that finds no receive wakes its target for nothing, which then sleeps on
/// and is not known to be on its way any more.
#[test]
fn who_was_woken_in_vain_hears_of_its_own_sends() {
    let p = Pair::default();
    let (client, server) = (&p.client, &p.server);
    nonblocking(server.channel_fd());
    server.arm(false);
    client.recv(0, &[]);
    // Tried again after 655 ms, which is when everything would be looked at anyway.
    client.post(Wr::send(1, &[]));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(server.cq_event(), Err(libc::EAGAIN));
    server.post(Wr::send(2, &[]));
    assert!(readable(server.channel_fd(), Duration::from_millis(400)), "not told");
    assert_eq!(server.cq_event(), Ok(()));
    server.done(2);
    client.done(0);
    server.recv(3, &[]);
    server.done(3);
    client.done(1);
}

/// A stream of writes of every size, each announced by an immediate, in both
/// directions at once and by event loops: what the module under test does all day.
#[test]
fn streams_of_announced_writes_arrive_exact() {
    const WINDOW: usize = 300_000;
    const ROUNDS: usize = 60;
    const EMPTY: u32 = 0;
    let o = Options { buffer: 2 * WINDOW, ..Options::default() };
    let p = Pair::new(o.clone(), o);
    for side in [&p.client, &p.server] {
        side.rnr_timer(1);
        for _ in 0..64 {
            side.recv(0, &[]);
        }
        side.arm(false);
    }
    // Each side fills the other's window, waits until that is said to be empty,
    // and fills it anew.
    let run = |me: &Side, peer: &Side, mut x: u64| {
        let (mut sent, mut round_out, mut got, mut round_in) = (WINDOW, 0, 0, 0);
        let mut window_empty = true;
        let own = me.addr(WINDOW) as *mut u8;
        loop {
            if window_empty && sent == WINDOW && round_out < ROUNDS {
                let data = pattern(WINDOW, round_out as u8);
                // SAFETY: the second half of our own buffer, all of it acknowledged.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), own, WINDOW) };
                (sent, window_empty) = (0, false);
                round_out += 1;
            }
            while sent < WINDOW {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let len = ((x >> 33) as usize % 40_000 + 1).min(WINDOW - sent);
                let sge = [me.sge(WINDOW + sent, len)];
                match me.post(Wr::write_imm(1, &sge, peer.addr(sent), peer.rkey(), len as u32)) {
                    0 => sent += len,
                    libc::ENOMEM => break,
                    other => panic!("post: {other}"),
                }
            }
            if round_in == ROUNDS && round_out == ROUNDS && window_empty {
                return;
            }
            assert!(readable(me.channel_fd(), WAIT), "stalled: {round_out} out, {round_in} in");
            me.cq_event().expect("an event");
            me.arm(false);
            while let Some(wc) = me.try_poll() {
                assert_eq!(wc.status, 0, "{wc:?}");
                if wc.wr_id != 0 {
                    continue;
                }
                me.recv(0, &[]);
                match wc.imm {
                    Some(EMPTY) => window_empty = true,
                    Some(len) => got += len as usize,
                    None => panic!("no immediate: {wc:?}"),
                }
                if got == WINDOW {
                    assert!(
                        me.bytes(0, WINDOW) == pattern(WINDOW, round_in as u8),
                        "round {round_in}"
                    );
                    got = 0;
                    round_in += 1;
                    while me.post(Wr::send_imm(2, &[], EMPTY)) != 0 {
                        std::thread::yield_now();
                        assert!(me.try_poll().is_none_or(|wc| wc.wr_id != 0), "no room to answer");
                    }
                }
            }
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| run(&p.server, &p.client, 1));
        run(&p.client, &p.server, 2);
    });
}
