// SPDX-License-Identifier: BSD-3-Clause
//! Two processes: data between them, the death of one, and forks.
//!
//! The other process is this test program again, told its part by the environment.

mod common;

use common::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

const PART: &str = "SOFTRDMA_TEST_PART";

/// The other process: plays its part, and does nothing in an ordinary run.
#[test]
fn part() {
    match std::env::var(PART).as_deref() {
        Ok("echo") => echo(false),
        Ok("echo and fork") => echo(true),
        Ok("forked") => forked(),
        Ok("descriptors") => descriptors(),
        Ok(other) => panic!("no part {other}"),
        Err(_) => {}
    }
}

fn play(part: &str) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "part", "--nocapture", "--test-threads=1"])
        .env(PART, part)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the other process")
}

struct Other(Child);

impl Other {
    /// Starts a part that prints its port.
    fn start(part: &str) -> (Other, u16) {
        let mut child = play(part);
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let port = lines
            .map_while(Result::ok)
            .find_map(|line| line.split_once("port ").and_then(|(_, p)| p.trim().parse().ok()))
            .expect("its port");
        (Other(child), port)
    }

    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("gone");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that sends back what it receives, until the client leaves.
fn echo(fork: bool) {
    let cm = Cm::new();
    let (_listener, port) = cm.listen("127.0.0.1:0");
    println!("port {port}");
    let request = cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let side = Side::new(request.id, Options { buffer: 1 << 20, ..Options::default() });
    side.recv(1, &[side.sge(0, 1 << 20)]);
    accept(side.id, &side.options);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    if fork {
        // SAFETY: the child only sleeps and exits.
        unsafe {
            if libc::fork() == 0 {
                libc::sleep(20);
                libc::_exit(0);
            }
        }
    }
    // Long before this the other process has left, or ended this one.
    let end = Instant::now() + Duration::from_secs(180);
    while Instant::now() < end && cm.try_event(Duration::ZERO).is_none() {
        if let Some(wc) = side.try_poll()
            && wc.wr_id == 1
        {
            side.recv(1, &[side.sge(0, 1 << 20)]);
            side.post(Wr::send(2, &[side.sge(0, wc.len as usize)]));
        }
    }
}

fn connected(port: u16) -> (Cm, Side) {
    let cm = Cm::new();
    let id = cm.resolve(&format!("127.0.0.1:{port}"));
    let side = Side::new(id, Options { buffer: 2 << 20, ..Options::default() });
    assert_eq!(connect(id, &side.options), 0);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    (cm, side)
}

fn round_trip(side: &mut Side, data: &[u8]) {
    side.fill(0, data);
    side.recv(1, &[side.sge(1 << 20, 1 << 20)]);
    side.post(Wr::send(2, &[side.sge(0, data.len())]).flags(0));
    side.done(1);
    assert!(side.bytes(1 << 20, data.len()) == data);
}

#[test]
fn data_goes_between_processes() {
    let (_other, port) = Other::start("echo");
    let (_cm, mut side) = connected(port);
    for i in 0..200u32 {
        round_trip(&mut side, &pattern(if i % 10 == 0 { 1 << 20 } else { 64 }, i as u8));
        // The sends were unsignalled: one signalled one frees their slots.
        if i % 50 == 49 {
            side.post(Wr::write(3, &[], 0, 0));
            side.done(3);
        }
    }
}

/// The names in the sockets' abstract namespace that belong to a listener's port.
fn socket_names(port: u16) -> usize {
    let all = std::fs::read_to_string("/proc/net/unix").expect("procfs");
    all.matches(&format!("@softrdma/{port}/")).count()
}

/// What a process has open, by the names of its descriptors after the first three.
fn open_files(process: u32) -> Vec<String> {
    let of = |n: u32| std::fs::read_link(format!("/proc/{process}/fd/{n}")).ok();
    (3..1024).filter_map(of).map(|path| path.to_string_lossy().into_owned()).collect()
}

/// Memory that a process shares with others, by its name.
fn shared_memory(process: u32) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("procfs");
    let shared =
        maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|m| m.contains('s')));
    shared.map(|line| line.split_whitespace().nth(5).unwrap_or("").to_owned()).collect()
}

/// The child of a process.
fn child_of(process: u32) -> u32 {
    let end = Instant::now() + WAIT;
    while Instant::now() < end {
        let all = std::fs::read_dir(format!("/proc/{process}/task")).expect("procfs");
        for thread in all.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children"));
            if let Some(child) = children.unwrap_or_default().split_whitespace().next() {
                return child.parse().expect("a process id");
            }
        }
    }
    panic!("process {process} has no child");
}

/// A process with a connection has nothing that has a name in a file system or that
/// System V keeps, so whatever ends it, nothing stays.
#[test]
fn a_killed_process_leaves_nothing_behind() {
    let (mut other, port) = Other::start("echo");
    let (cm, mut side) = connected(port);
    round_trip(&mut side, b"before");
    let process = other.0.id();
    let files = open_files(process);
    assert!(files.iter().any(|name| name.starts_with("socket:")), "{files:?}");
    let nameless = |name: &str| name == "/dev/null" || name.starts_with("/memfd:");
    let named = |name: &&String| name.starts_with('/') && !nameless(name);
    assert_eq!(files.iter().find(named), None);
    let shared = shared_memory(process);
    assert!(
        !shared.is_empty() && shared.iter().all(|name| name.starts_with("/memfd:")),
        "{shared:?}"
    );
    assert_ne!(socket_names(port), 0);
    other.kill();
    cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    assert_eq!(socket_names(port), 0);
}

fn dies(part: &str) {
    let (mut other, port) = Other::start(part);
    let (cm, mut side) = connected(port);
    round_trip(&mut side, b"before");
    if part == "echo and fork" {
        // The child keeps no end of a connection and no listener, once it has begun to run.
        let child = child_of(other.0.id());
        let end = Instant::now() + WAIT;
        while open_files(child).iter().any(|name| name.starts_with("socket:")) {
            assert!(Instant::now() < end, "{:?}", open_files(child));
        }
    }
    other.kill();
    let start = Instant::now();
    cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(side.post(Wr::send(9, &[])), 0);
    side.fails(9, ibv_wc_status::IBV_WC_RETRY_EXC_ERR);
    // Nothing stayed behind: the address is free.
    let cm = Cm::new();
    let (id, _) = cm.listen(&format!("127.0.0.1:{port}"));
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(id) };
}

#[test]
fn a_killed_server_is_noticed_and_leaves_nothing() {
    dies("echo");
}

#[test]
fn a_killed_server_is_noticed_though_its_child_lives() {
    dies("echo and fork");
}

#[test]
fn a_server_killed_amid_a_transfer_is_noticed() {
    let (mut other, port) = Other::start("echo");
    let (cm, side) = connected(port);
    // More than the wire holds, and nobody takes the second.
    side.post(Wr::send(1, &[side.sge(0, 1 << 20)]));
    side.post(Wr::send(2, &[side.sge(0, 1 << 20)]));
    other.kill();
    cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    let mut last = side.wc();
    if last.status == ibv_wc_status::IBV_WC_SUCCESS {
        last = side.wc();
    }
    assert_eq!(last.status, ibv_wc_status::IBV_WC_RETRY_EXC_ERR, "{last:?}");
}

#[test]
fn a_killed_client_is_noticed() {
    let cm = Cm::new();
    let (listener, port) = cm.listen("127.0.0.1:0");
    let mut client = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "client_part", "--nocapture"])
        .env("SOFTRDMA_TEST_PORT", port.to_string())
        .spawn()
        .expect("the client");
    let request = cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let side = Side::new(request.id, Options::default());
    accept(side.id, &side.options);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    client.kill().expect("killed");
    client.wait().expect("gone");
    cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    drop(side);
    // SAFETY: a live identifier.
    unsafe { rdma_destroy_id(listener) };
}

#[test]
fn client_part() {
    if let Ok(port) = std::env::var("SOFTRDMA_TEST_PORT") {
        let _held = connected(port.parse().expect("a port"));
        std::thread::sleep(Duration::from_secs(20));
    }
}

fn ends_well(part: &str) {
    let out = play(part).wait_with_output().expect("its end");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn a_forked_child_can_do_nothing_and_harms_nobody() {
    ends_well("forked");
}

fn forked() {
    let p = Pair::default();
    p.server.recv(1, &[p.server.sge(0, 8)]);
    // SAFETY: in the child, only calls that must fail at once, and _exit.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            let (a, mut event) = (p.client.sge(0, 8), null_mut());
            let failures = [
                p.client.post(Wr::send(1, &[a])) == libc::ENODEV,
                p.client.recv(1, &[a]) == libc::ENODEV,
                poll(p.client.cq).is_none(),
                ibv_req_notify_cq(p.client.cq, 0) == libc::ENODEV,
                ibv_reg_mr(p.client.pd, a.addr as *mut _, 8, 1).is_null(),
                rdma_create_event_channel().is_null(),
                rdma_get_cm_event(p.client_cm.channel, &raw mut event) == -1,
                rdma_disconnect(p.client.id) == -1,
                rdma_destroy_id(p.client.id) == -1,
                ibv_destroy_qp(p.client.qp) == libc::ENODEV,
                ibv_destroy_cq(p.client.cq) == libc::ENODEV,
                ibv_destroy_comp_channel(p.client.channel) == libc::ENODEV,
                ibv_dealloc_pd(p.client.pd) == libc::ENODEV,
            ];
            let first = failures.iter().position(|failed| !failed);
            libc::_exit(first.map_or(0, |i| 1 + i as i32));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    };
    assert_eq!(libc::WEXITSTATUS(status), 0, "the child's call number");
    assert!(p.client_cm.try_event(Duration::from_millis(50)).is_none());
    p.client.post(Wr::send(2, &[p.client.sge(0, 8)]));
    p.client.done(2);
    p.server.done(1);
}

#[test]
fn two_hundred_connections_leave_no_descriptor() {
    ends_well("descriptors");
}

fn descriptors() {
    let open = || std::fs::read_dir("/proc/self/fd").expect("procfs").count();
    let small = || Options { buffer: 4096, ..Options::default() };
    drop(Pair::default());
    let mut counts = vec![];
    for _ in 0..3 {
        let pairs: Vec<Pair> = (0..100).map(|_| Pair::new(small(), small())).collect();
        drop(pairs);
        // The progress thread lets go of its ends a moment later.
        std::thread::sleep(Duration::from_millis(1500));
        counts.push(open());
    }
    assert!(counts.windows(2).all(|w| w[0] == w[1]), "{counts:?}");
}
