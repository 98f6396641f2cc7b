// SPDX-License-Identifier: BSD-3-Clause
//! Many queue pairs on one completion queue: what is counted here is work, which
//! must not grow with those that are idle.

mod common;

use common::*;
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use softrdma::tally::{CALLS, LOOKS, NUMBERS};
use std::collections::HashMap;
use std::ptr::null_mut;
use std::sync::Mutex;
use std::time::Instant;

/// The counts are the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A server whose connections share one completion queue, and its clients, each with
/// a queue of its own, or with one for all as well.
struct Farm {
    clients: Vec<Side>,
    servers: Vec<Side>,
    queue: Queue,
    clients_queue: Option<Queue>,
    pd: *mut ibv_pd,
    listener: *mut rdma_cm_id,
    client_cm: Cm,
    server_cm: Cm,
}

const SIZE: usize = 64;

impl Farm {
    fn new(count: usize) -> Farm {
        Farm::with(count, false)
    }

    fn with(count: usize, one_queue: bool) -> Farm {
        let (client_cm, server_cm) = (Cm::new(), Cm::new());
        let (listener, port) = server_cm.listen("127.0.0.1:0");
        let at = format!("127.0.0.1:{port}");
        let first = client_cm.resolve(&at);
        // SAFETY: a live identifier, and its context.
        let (context, pd) = unsafe { ((*first).verbs, ibv_alloc_pd((*first).verbs)) };
        let large = || Queue::new(context, 4 * count as i32 + 16);
        let (queue, clients_queue) = (large(), one_queue.then(large));
        let small =
            Options { send_wr: 4, recv_wr: 4, cqe: 8, buffer: 2 * SIZE, ..Options::default() };
        let mut farm = Farm {
            clients: vec![],
            servers: vec![],
            queue,
            clients_queue,
            pd,
            listener,
            client_cm,
            server_cm,
        };
        for i in 0..count {
            let id = if i == 0 { first } else { farm.client_cm.resolve(&at) };
            let client = Side::new(id, Options { queue: clients_queue, pd, ..small.clone() });
            assert_eq!(connect(client.id, &client.options), 0);
            let request = farm.server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
            let shared = Options { queue: Some(queue), pd, ..small.clone() };
            let server = Side::new(request.id, shared);
            server.recv(1, &[server.sge(0, SIZE)]);
            assert_eq!(accept(server.id, &server.options), 0);
            farm.client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
            farm.server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
            farm.clients.push(client);
            farm.servers.push(server);
        }
        farm
    }

    /// The server: sends back what comes, asleep on the channel in between.
    fn echo(&self, messages: usize) {
        // SAFETY: live queue pairs.
        let number = |side: &Side| unsafe { (*side.qp).qp_num };
        let by_number: HashMap<_, _> = self.servers.iter().map(|s| (number(s), s)).collect();
        let any = &self.servers[0];
        any.arm(false);
        let mut left = messages;
        loop {
            // SAFETY: room for one completion.
            let mut wc: ibv_wc = unsafe { std::mem::zeroed() };
            // SAFETY: a live queue of this farm.
            while unsafe { ibv_poll_cq(self.queue.cq, 1, &raw mut wc) } == 1 {
                assert_eq!(wc.status, ibv_wc_status::IBV_WC_SUCCESS);
                if wc.wr_id == 1 {
                    let side = by_number[&wc.qp_num];
                    side.recv(1, &[side.sge(0, SIZE)]);
                    assert_eq!(side.post(Wr::send(2, &[side.sge(0, SIZE)])), 0);
                    left -= 1;
                }
            }
            if left == 0 {
                return;
            }
            assert!(readable(any.channel_fd(), WAIT), "{left} of {messages} are missing");
            any.cq_event().expect("an event is there");
            any.arm(false);
        }
    }

    /// Each of the first `active` clients sends and waits for the answer, `rounds` times.
    fn ask(&self, active: usize, rounds: usize) {
        for _ in 0..rounds {
            for client in &self.clients[..active] {
                client.recv(1, &[client.sge(SIZE, SIZE)]);
                client.arm(false);
                assert_eq!(client.post(Wr::send(2, &[client.sge(0, SIZE)])), 0);
            }
            let (queues, each) =
                if self.clients_queue.is_some() { (1, 2 * active) } else { (active, 2) };
            for client in &self.clients[..queues] {
                let mut left = each;
                while left > 0 {
                    if client.try_poll().is_some() {
                        left -= 1;
                        continue;
                    }
                    assert!(readable(client.channel_fd(), WAIT), "no answer");
                    client.cq_event().expect("an event is there");
                    client.arm(false);
                }
            }
        }
    }

    /// The looks and calls that a message from one of `active` clients costs, at the
    /// least: a thread that the machine keeps waiting is called for.
    fn cost(&self, active: usize, rounds: usize) -> (f64, f64) {
        let costs: Vec<_> = (0..10).map(|_| self.cost_once(active, rounds)).collect();
        println!("{costs:?}");
        let least = |a: f64, b: f64| a.min(b);
        costs.into_iter().reduce(|a, b| (least(a.0, b.0), least(a.1, b.1))).expect("some")
    }

    fn cost_once(&self, active: usize, rounds: usize) -> (f64, f64) {
        let messages = active * rounds;
        let before = (LOOKS.so_far(), CALLS.so_far());
        std::thread::scope(|s| {
            s.spawn(|| self.echo(messages));
            self.ask(active, rounds);
        });
        let each = |now: u64, before: u64| (now - before) as f64 / messages as f64;
        (each(LOOKS.so_far(), before.0), each(CALLS.so_far(), before.1))
    }
}

// SAFETY: the pointers are those of live objects, which any thread may use.
unsafe impl Sync for Farm {}

impl Drop for Farm {
    fn drop(&mut self) {
        self.clients.clear();
        self.servers.clear();
        self.queue.destroy();
        if let Some(queue) = self.clients_queue {
            queue.destroy();
        }
        // SAFETY: live objects, no longer in use.
        unsafe {
            assert_eq!(ibv_dealloc_pd(self.pd), 0);
            rdma_destroy_id(self.listener);
        }
        self.listener = null_mut();
    }
}

/// Calls of the progress thread for each message that are as good as none.
const FEW_CALLS: f64 = 0.25;

#[test]
fn idle_queue_pairs_cost_nothing() {
    let _alone = ALONE.lock();
    let (looks, _) = Farm::new(1).cost(1, 100);
    let (among, _) = Farm::new(200).cost(1, 100);
    assert!(among < 2.0 * looks, "{among} looks for a message instead of {looks}");
}

/// Calls of the progress thread for a message among `count` connections, as few as a few tries
/// show. Who does not come within 2 ms has it called, so a busy machine adds some; a fault of
/// the fabric adds them each time.
fn calls(count: usize, messages: usize) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..8 {
        least = least.min(Farm::new(count).cost(count, messages).1);
        if least < FEW_CALLS {
            break;
        }
    }
    least
}

#[test]
fn who_is_on_the_way_needs_no_progress_thread() {
    let _alone = ALONE.lock();
    let calls = calls(50, 20);
    assert!(calls < FEW_CALLS, "{calls} calls for a message");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

/// A socket at each end, the client's own completion channel, and the server's
/// hold on that.
#[test]
fn a_connection_takes_few_descriptors() {
    let _alone = ALONE.lock();
    let few = Farm::new(1);
    let before = descriptors();
    let many = Farm::new(100);
    // A few more are the second farm's own.
    assert_eq!((descriptors() - before) / 100, 4);
    drop((few, many));
}

/// Numbers on the notice board are given out again, and are as good as new.
#[test]
fn queue_pairs_that_went_leave_nothing_in_the_way() {
    let _alone = ALONE.lock();
    for count in [110, 10, 1, 200, 1, 50, 30] {
        let calls = calls(count, 5);
        assert!(calls < FEW_CALLS, "{calls} calls for a message among {count}");
    }
}

/// Some clients destroy their completion queue first, are refused as long as its queue pair is
/// there, and never come back to it, with news from the other side unread.
#[test]
fn a_process_connects_as_often_as_it_likes() {
    let _alone = ALONE.lock();
    let (client_cm, server_cm) = (Cm::new(), Cm::new());
    let (listener, port) = server_cm.listen("127.0.0.1:0");
    let small = Options { send_wr: 4, recv_wr: 4, cqe: 8, buffer: SIZE, ..Options::default() };
    let numbers = NUMBERS.so_far();
    for _ in 0..200 {
        let id = client_cm.resolve(&format!("127.0.0.1:{port}"));
        // SAFETY: a live identifier.
        let context = unsafe { (*id).verbs };
        let leaked = [Queue::new(context, 8), Queue::new(context, 8)];
        let with = |queue| Options { queue: Some(queue), ..small.clone() };
        let client = Side::new(id, with(leaked[0]));
        assert_eq!(connect(client.id, &client.options), 0);
        let request = server_cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
        let server = Side::new(request.id, with(leaked[1]));
        assert_eq!(accept(server.id, &server.options), 0);
        client_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
        server_cm.expect(RDMA_CM_EVENT_ESTABLISHED);
        for side in [&client, &server] {
            side.recv(1, &[side.sge(0, SIZE)]);
        }
        for side in [&client, &server] {
            assert_eq!(side.post(Wr::send(2, &[side.sge(0, SIZE)])), 0);
        }
        for queue in leaked {
            // SAFETY: a live queue, which this leaves as it is.
            assert_eq!(unsafe { ibv_destroy_cq(queue.cq) }, libc::EBUSY);
        }
        client.disconnect();
        server_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
        server.disconnect();
        client_cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    }
    // SAFETY: no longer in use.
    unsafe { rdma_destroy_id(listener) };
    let numbers = NUMBERS.so_far() - numbers;
    assert!(numbers < 100, "{numbers} numbers for 400 queue pairs, two at a time");
}

/// Both ends are in this process, so that it takes nearly 20,000 descriptors.
#[test]
#[ignore = "wants ulimit -n 20000; prints what many connections take, with --ignored --nocapture"]
fn nearly_ten_thousand_connections() {
    let _alone = ALONE.lock();
    let memory = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
        let of = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("a line of it");
            line.split_whitespace().nth(1).expect("kB").parse::<u64>().expect("a number")
        };
        ["RssAnon", "RssShmem", "VmPTE"].map(|name| (name, of(name)))
    };
    let (alone, _) = Farm::with(100, true).cost(100, 20);
    println!("100: {:?} kB", memory());
    let start = Instant::now();
    let farm = Farm::with(9_900, true);
    println!("9,900 in {:?}: {} descriptors, {:?} kB", start.elapsed(), descriptors(), memory());
    let (among, _) = farm.cost(100, 20);
    println!("{alone} looks for a message from 100, {among} among 9,900");
    assert!(among < 2.0 * alone);
    farm.cost_once(9_900, 2);
    println!("after two messages from each: {:?} kB", memory());
    let start = Instant::now();
    drop(farm);
    println!("ended in {:?}", start.elapsed());
}
