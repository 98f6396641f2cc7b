// SPDX-License-Identifier: BSD-3-Clause
//! The connection manager: addresses, the handshake, its refusals and its end.

mod common;

use common::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::mem::zeroed;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

fn no_event(cm: &Cm) {
    let event = cm.try_event(Duration::from_millis(50));
    assert!(event.is_none(), "{event:?}");
}

#[test]
fn private_data_goes_both_ways_padded_to_the_message() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let options = |data: &[u8]| Options { private: data.to_vec(), reads: 3, ..Options::default() };
    let client =
        Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), options(b"from the client"));
    assert_eq!(connect(client.id, &client.options), 0);
    let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    assert_eq!((request.private.len(), &request.private[..15]), (56, &b"from the client"[..]));
    assert_eq!(request.private[15..], [0; 41]);
    let server = Side::new(request.id, options(&[7; 196]));
    assert_eq!(accept(server.id, &server.options), 0);
    let established = client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    assert_eq!(established.private, [7; 196]);
    server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    assert_eq!(client.query().max_rd_atomic, 3);
    // SAFETY: live identifiers.
    unsafe {
        assert_eq!(rdma_get_dst_port(client.id), port.to_be());
        assert_eq!(rdma_get_src_port(server.id), port.to_be());
        assert_eq!(rdma_get_dst_port(server.id), rdma_get_src_port(client.id));
        assert_ne!((*client.qp).qp_num, (*server.qp).qp_num);
        drop((client, server));
        rdma_destroy_id(listener);
    }
}

#[test]
fn private_data_that_is_too_long_is_refused() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let options = Options { private: vec![1; 57], ..Options::default() };
    let client = Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), options);
    assert_eq!((connect(client.id, &client.options), errno()), (-1, libc::EINVAL));
    drop(client);
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
}

/// An address of this machine that is not a loopback one, if it has any.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[test]
fn every_own_address_works() {
    let own = own_address().map(|ip| ip.to_string());
    for ip in ["127.0.0.1", "127.9.8.7", "::1"].into_iter().chain(own.as_deref()) {
        let p = Pair::at(ip, Options::default(), Options::default());
        p.server.recv(1, &[]);
        p.client.post(Wr::send(2, &[]));
        p.server.done(1);
        // SAFETY: a live identifier and its addresses.
        let (family, verbs) = unsafe {
            ((*p.client.id).route.addr.dst_addr_union.dst_addr.sa_family, (*p.client.id).verbs)
        };
        assert_eq!(
            i32::from(family),
            if ip.contains(':') { libc::AF_INET6 } else { libc::AF_INET }
        );
        assert!(!verbs.is_null());
    }
}

#[test]
fn a_wildcard_listener_takes_connections_to_each_address() {
    for (any, targets) in
        [("0.0.0.0", &["127.0.0.1", "127.0.0.2"][..]), ("[::]", &["[::1]", "127.0.0.1"])]
    {
        let (client_cm, server_cm) = (Cm::new(), Cm::new());
        let (listener, port) = server_cm.listen(&format!("{any}:0"));
        // SAFETY: live identifiers.
        unsafe { assert!((*listener).verbs.is_null()) };
        for target in targets {
            let id = client_cm.resolve(&format!("{target}:{port}"));
            let client = Side::new(id, Options::default());
            connect(id, &client.options);
            let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
            // SAFETY: as above.
            unsafe {
                assert!(!(*request.id).verbs.is_null());
                rdma_destroy_id(request.id);
            }
            client_cm.expect(RDMA_CM_EVENT_REJECTED);
        }
        // SAFETY: as above.
        unsafe { rdma_destroy_id(listener) };
    }
}

fn bind(cm: &Cm, address: &str, v6_only: bool) -> (*mut rdma_cm_id, i32) {
    let id = cm.id();
    let mut on = 1i32;
    let mut sa = sockaddr(address);
    // SAFETY: a live identifier, an int, an address.
    unsafe {
        if v6_only {
            assert_eq!(rdma_set_option(id, 0, 2, (&raw mut on).cast(), 4), 0);
        }
        let ret = rdma_bind_addr(id, (&raw mut sa).cast());
        (id, if ret == 0 { 0 } else { errno() })
    }
}

#[test]
fn a_taken_address_is_refused_and_free_again_after() {
    let cm = Cm::new();
    let (listener, port) = cm.listen("127.0.0.1:0");
    let mut ids = vec![];
    let mut check = |address: String, v6_only, expected| {
        let (id, got) = bind(&cm, &address, v6_only);
        assert_eq!(got, expected, "{address}");
        ids.push(id);
    };
    check(format!("127.0.0.1:{port}"), false, libc::EADDRINUSE);
    check(format!("0.0.0.0:{port}"), false, libc::EADDRINUSE);
    check(format!("[::]:{port}"), false, libc::EADDRINUSE);
    check(format!("[::]:{port}"), true, 0);
    check(format!("127.0.0.2:{port}"), false, 0);
    check("192.0.2.1:1234".into(), false, libc::EADDRNOTAVAIL);
    // SAFETY: live identifiers.
    unsafe {
        rdma_destroy_id(listener);
        let (id, got) = bind(&cm, &format!("127.0.0.1:{port}"), false);
        assert_eq!(got, 0);
        ids.push(id);
        for id in ids {
            rdma_destroy_id(id);
        }
    }
}

#[test]
fn nobody_at_the_port_is_a_rejection() {
    let cm = Cm::new();
    let id = cm.resolve("127.0.0.1:9");
    let side = Side::new(id, Options::default());
    assert_eq!(connect(id, &side.options), 0);
    let event = cm.expect(RDMA_CM_EVENT_REJECTED);
    assert_eq!(event.status, 8, "no such service");
    assert_eq!(side.state(), ibv_qp_state::IBV_QPS_ERR);
}

#[test]
fn an_address_elsewhere_can_not_be_reached() {
    let cm = Cm::new();
    let id = cm.id();
    let mut sa = sockaddr("192.0.2.1:7");
    // SAFETY: a live identifier and an address.
    unsafe {
        assert_eq!(rdma_resolve_addr(id, null_mut(), (&raw mut sa).cast(), 100), 0);
        let event = cm.expect(RDMA_CM_EVENT_ADDR_ERROR);
        assert!(event.status < 0);
        rdma_destroy_id(id);
    }
}

#[test]
fn a_rejection_carries_its_private_data() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let id = client_cm.resolve(&format!("127.0.0.1:{port}"));
    let side = Side::new(id, Options::default());
    side.recv(1, &[]);
    connect(id, &side.options);
    let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    // SAFETY: live identifiers.
    unsafe {
        assert_eq!(rdma_reject(request.id, b"no room".as_ptr().cast(), 7), 0);
        let event = client_cm.expect(RDMA_CM_EVENT_REJECTED);
        assert_eq!((event.status, &event.private[..7]), (28, &b"no room"[..]));
        side.fails(1, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
        rdma_destroy_id(request.id);
        rdma_destroy_id(listener);
    }
}

#[test]
fn disconnecting_flushes_here_tells_there_and_ends_in_timewait() {
    let p = Pair::default();
    p.client.recv(1, &[]);
    p.server.recv(1, &[]);
    p.client.disconnect();
    p.client.fails(1, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
    p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    // The other side's queue pair is its own to flush.
    assert_eq!(p.server.try_poll(), None);
    no_event(&p.client_cm);
    p.server.disconnect();
    p.server.fails(1, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
    p.client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    p.client_cm.expect(RDMA_CM_EVENT_TIMEWAIT_EXIT);
    p.server_cm.expect(RDMA_CM_EVENT_TIMEWAIT_EXIT);
}

#[test]
fn both_may_disconnect_at_once() {
    let p = Pair::default();
    p.client.disconnect();
    p.server.disconnect();
    p.client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
}

#[test]
fn what_was_sent_before_a_disconnect_is_there_after_it() {
    for _ in 0..50 {
        let p = Pair::default();
        p.server.recv(1, &[p.server.sge(0, 64)]);
        p.client.post(Wr::send(2, &[p.client.sge(0, 64)]));
        p.client.done(2);
        p.client.disconnect();
        p.server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
        p.server.done(1);
    }
}

#[test]
fn destroying_an_identifier_tells_the_other_side() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let client = Side::new(client_cm.resolve(&format!("127.0.0.1:{port}")), Options::default());
    connect(client.id, &client.options);
    let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let server = Side::new(request.id, Options::default());
    accept(server.id, &server.options);
    client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    drop(client);
    server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    drop(server);
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
}

#[test]
fn a_client_that_leaves_before_the_answer_is_told_to_the_server() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let id = client_cm.resolve(&format!("127.0.0.1:{port}"));
    let side = Side::new(id, Options::default());
    connect(id, &side.options);
    assert!(readable(server_cm.fd(), WAIT));
    drop(side);
    let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let event = server_cm.expect(RDMA_CM_EVENT_REJECTED);
    assert_eq!(event.id, request.id);
    // SAFETY: live identifiers.
    unsafe {
        rdma_destroy_id(request.id);
        rdma_destroy_id(listener);
    }
}

#[test]
fn a_listener_that_goes_refuses_who_waits() {
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let id = client_cm.resolve(&format!("127.0.0.1:{port}"));
    let side = Side::new(id, Options::default());
    connect(id, &side.options);
    assert!(readable(server_cm.fd(), WAIT));
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
    client_cm.expect(RDMA_CM_EVENT_REJECTED);
    no_event(&server_cm);
}

#[test]
fn a_migrated_identifier_takes_its_pending_events_along() {
    let p = Pair::default();
    let other = Cm::new();
    p.client.disconnect();
    assert!(readable(p.server_cm.fd(), WAIT));
    // SAFETY: live objects.
    unsafe {
        assert_eq!(rdma_migrate_id(p.server.id, other.channel), 0);
        assert_eq!((*p.server.id).channel, other.channel);
    }
    no_event(&p.server_cm);
    other.expect(RDMA_CM_EVENT_DISCONNECTED);
}

#[test]
fn accepted_connections_start_on_the_listener_s_channel_and_live_on_elsewhere() {
    let mut p = Pair::default();
    let stays = Cm::new();
    // SAFETY: live objects; the listener's channel goes with nobody left on it.
    unsafe {
        assert_eq!((*p.server.id).channel, p.server_cm.channel);
        assert_eq!(rdma_migrate_id(p.server.id, stays.channel), 0);
    }
    // SAFETY: a live identifier.
    let port = u16::from_be(unsafe { rdma_get_src_port(p.server.id) });
    p.listener_gone();
    for address in ["127.0.0.1", "0.0.0.0", "[::]"] {
        // The address is free again, though the connection lives on.
        let (id, got) = bind(&stays, &format!("{address}:{port}"), false);
        assert_eq!(got, 0, "{address}");
        // SAFETY: a live identifier.
        unsafe { rdma_destroy_id(id) };
    }
    p.server.recv(1, &[]);
    p.client.post(Wr::send(2, &[]));
    p.server.done(1);
    p.client.disconnect();
    stays.expect(RDMA_CM_EVENT_DISCONNECTED);
}

#[test]
fn destroying_waits_for_the_acknowledgement() {
    let cm = Cm::new();
    let id = cm.id();
    let mut sa = sockaddr("127.0.0.1:7");
    // SAFETY: a live identifier; the event is acknowledged by the other thread.
    unsafe {
        assert_eq!(rdma_resolve_addr(id, null_mut(), (&raw mut sa).cast(), 100), 0);
        let mut event = null_mut();
        assert_eq!(rdma_get_cm_event(cm.channel, &raw mut event), 0);
        let event = event as usize;
        let start = Instant::now();
        let ack = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            rdma_ack_cm_event(event as *mut rdma_cm_event);
        });
        assert_eq!(rdma_destroy_id(id), 0);
        assert!(start.elapsed() >= Duration::from_millis(100));
        ack.join().expect("acknowledged");
    }
}

#[test]
fn a_non_blocking_channel_says_again() {
    let cm = Cm::new();
    nonblocking(cm.fd());
    let mut event = null_mut();
    // SAFETY: a live channel.
    let ret = unsafe { rdma_get_cm_event(cm.channel, &raw mut event) };
    assert_eq!((ret, errno()), (-1, libc::EAGAIN));
}

#[test]
fn steps_out_of_order_are_refused() {
    let cm = Cm::new();
    let id = cm.id();
    // SAFETY: a live identifier.
    unsafe {
        assert_eq!((rdma_resolve_route(id, 1), errno()), (-1, libc::EINVAL));
        assert_eq!((connect(id, &Options::default()), errno()), (-1, libc::EINVAL));
        assert_eq!((accept(id, &Options::default()), errno()), (-1, libc::EINVAL));
        assert_eq!((rdma_disconnect(id), errno()), (-1, libc::EINVAL));
        let mut init: ibv_qp_init_attr = zeroed();
        init.qp_type = ibv_qp_type::IBV_QPT_RC;
        assert_eq!((rdma_create_qp(id, null_mut(), &raw mut init), errno()), (-1, libc::EINVAL));
        rdma_destroy_id(id);
    }
}

#[test]
fn the_device_lists_itself() {
    // SAFETY: the lists are freed as they were got.
    unsafe {
        let mut n = 0;
        let list = rdma_get_devices(&raw mut n);
        assert_eq!(n, 1);
        assert!((*list.add(1)).is_null());
        let mut attr: ibv_device_attr = zeroed();
        assert_eq!(ibv_query_device(*list, &raw mut attr), 0);
        assert!(attr.max_qp_wr >= 1024 && attr.phys_port_cnt == 1);
        rdma_free_devices(list);
        let list = ibv_get_device_list(&raw mut n);
        let name = std::ffi::CStr::from_ptr(ibv_get_device_name(*list));
        assert_eq!(name.to_bytes(), b"softrdma0");
        let context = ibv_open_device(*list);
        ibv_free_device_list(list);
        let mut gid: ibv_gid = zeroed();
        assert_eq!(ibv_query_gid(context, 1, 0, &raw mut gid), 0);
        assert_eq!(gid.raw, Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
        assert_eq!(ibv_query_gid(context, 1, 1, &raw mut gid), -1);
        assert_eq!(ibv_close_device(context), 0);
    }
}
