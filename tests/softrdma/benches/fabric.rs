// SPDX-License-Identifier: BSD-3-Clause
//! The fabric beside a Unix socket, between two processes, in turns within one run:
//! the 64-byte round trip and the bandwidth of 1 MB transfers. It shows that the
//! fabric is fast enough to test on; it says nothing about RDMA.
//!
//! `cargo bench -p softrdma` prints each figure and both ratios, and fails if a
//! ratio is not met.

#[path = "../tests/common/mod.rs"]
mod common;

use common::*;
use rdma_sys::rdma_cm_event_type::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const PART: &str = "SOFTRDMA_BENCH_PART";
const MB: usize = 1 << 20;
const TRIPS: usize = 5_000;
const TRANSFERS: usize = 500;
const ROUNDS: usize = 12;

/// How a side waits for the other.
#[derive(Clone, Copy, PartialEq)]
enum Waiting {
    /// Asleep on the descriptor, as an event loop.
    Events,
    /// In a loop around the completion queue.
    Polling,
}

fn main() {
    if let Ok(part) = std::env::var(PART) {
        return other_process(&part);
    }
    println!("64-byte round trip, in microseconds, and 1 MB transfers, in MB/s, two processes\n");
    println!(
        "{:>6} {:>10} {:>10} {:>10} {:>12} {:>12}",
        "round", "unix", "events", "polling", "unix MB/s", "write MB/s"
    );
    let mut all: Vec<[f64; 5]> = Vec::new();
    for round in 0..ROUNDS {
        let row = [
            unix_round_trip(),
            round_trip(Waiting::Events),
            round_trip(Waiting::Polling),
            unix_stream(),
            writes(),
        ];
        println!(
            "{round:>6} {:>10.2} {:>10.2} {:>10.2} {:>12.0} {:>12.0}",
            row[0], row[1], row[2], row[3], row[4]
        );
        all.push(row);
    }
    // The best of each: a machine that does other things too disturbs every
    // figure, and always in one direction.
    let best = |column: usize, pick: fn(f64, f64) -> f64| {
        all.iter().map(|row| row[column]).reduce(pick).expect("at least one round")
    };
    let (unix, events, polling) = (best(0, f64::min), best(1, f64::min), best(2, f64::min));
    let (stream, writes) = (best(3, f64::max), best(4, f64::max));
    println!(
        "\nbest round trip: unix {unix:.2}, by events {events:.2}, by polling {polling:.2} us"
    );
    println!("best bandwidth: unix {stream:.0}, writes {writes:.0} MB/s");
    let (latency, bandwidth) = (events / unix, writes / stream);
    println!("round trip by events / Unix socket: {latency:.2} (at most 2.5)");
    println!("round trip by polling / Unix socket: {:.2}", polling / unix);
    println!("1 MB writes / Unix stream: {bandwidth:.2} (at least 0.5)");
    if latency > 2.5 || bandwidth < 0.5 {
        std::process::exit(1);
    }
}

struct Other(Child);

impl Other {
    fn start(part: &str) -> Other {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .env(PART, part)
            .spawn()
            .expect("the other process");
        Other(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.wait();
    }
}

fn socket_path() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("softrdma-bench-{}", std::process::id()))
}

fn unix_pair(part: &str) -> (UnixStream, Other) {
    let path = socket_path();
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a socket");
    let other = Other::start(&format!("{part} {}", path.display()));
    let (stream, _) = listener.accept().expect("a connection");
    let _ = std::fs::remove_file(&path);
    (stream, other)
}

fn unix_round_trip() -> f64 {
    let (mut stream, _other) = unix_pair("unix-echo");
    let mut buffer = [0; 64];
    let start = Instant::now();
    for _ in 0..TRIPS {
        stream.write_all(&buffer).expect("sent");
        stream.read_exact(&mut buffer).expect("received");
    }
    let each = start.elapsed().as_secs_f64() * 1e6 / TRIPS as f64;
    // The other process ends with the stream, and is waited for after it.
    drop(stream);
    each
}

fn unix_stream() -> f64 {
    let (mut stream, _other) = unix_pair("unix-sink");
    let buffer = vec![7; MB];
    let start = Instant::now();
    for _ in 0..TRANSFERS {
        stream.write_all(&buffer).expect("sent");
    }
    stream.shutdown(std::net::Shutdown::Write).expect("shut");
    let mut end = [0];
    stream.read_exact(&mut end).expect("all received");
    TRANSFERS as f64 / start.elapsed().as_secs_f64()
}

/// Waits for completions as `waiting` says, and hands each to `each`.
fn completions(side: &Side, waiting: Waiting, mut each: impl FnMut(Wc)) {
    if waiting == Waiting::Events {
        assert!(readable(side.channel_fd(), WAIT), "stalled");
        side.cq_event().expect("an event");
        side.arm(false);
    }
    let mut any = false;
    while let Some(wc) = side.try_poll() {
        assert_eq!(wc.status, 0);
        each(wc);
        any = true;
    }
    if !any {
        // Whoever polls without end on a busy machine waits for himself.
        std::thread::yield_now();
    }
}

fn connected(
    part: &str,
    options: Options,
) -> (Cm, Side, Other, Vec<u8>, *mut rdma_sys::rdma_cm_id) {
    let cm = Cm::new();
    let (listener, port) = cm.listen("127.0.0.1:0");
    let other = Other::start(&format!("{part} {port}"));
    let request = cm.expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    let side = Side::new(request.id, options);
    for _ in 0..32 {
        side.recv(0, &[side.sge(0, 64)]);
    }
    side.arm(false);
    accept(side.id, &side.options);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    (cm, side, other, request.private, listener)
}

fn name(waiting: Waiting) -> &'static str {
    if waiting == Waiting::Events { "echo-events" } else { "echo-polling" }
}

fn round_trip(waiting: Waiting) -> f64 {
    let (_cm, side, _other, _, listener) = connected(name(waiting), Options::default());
    let start = Instant::now();
    let mut trips = 0;
    let send = |n: usize| {
        // Every sixteenth is signalled, to free the slots before it.
        let flags = if n.is_multiple_of(16) { SIGNALED } else { 0 };
        assert_eq!(side.post(Wr::send(1, &[side.sge(64, 64)]).flags(flags | INLINE)), 0);
    };
    send(0);
    while trips < TRIPS {
        completions(&side, waiting, |wc| {
            if wc.wr_id == 0 {
                trips += 1;
                side.recv(0, &[side.sge(0, 64)]);
                if trips < TRIPS {
                    send(trips);
                }
            }
        });
    }
    let each = start.elapsed().as_secs_f64() * 1e6 / TRIPS as f64;
    side.disconnect();
    drop(side);
    // SAFETY: a live identifier.
    unsafe { rdma_sys::rdma_destroy_id(listener) };
    each
}

fn writes() -> f64 {
    let options = Options { buffer: MB, ..Options::default() };
    let (_cm, side, _other, private, listener) = connected("target", options);
    let to = u64::from_le_bytes(private[..8].try_into().expect("an address"));
    let rkey = u32::from_le_bytes(private[8..12].try_into().expect("a key"));
    let start = Instant::now();
    let (mut posted, mut done) = (0, 0);
    while done < TRANSFERS {
        while posted < TRANSFERS && posted - done < 8 {
            assert_eq!(side.post(Wr::write(1, &[side.sge(0, MB)], to, rkey)), 0);
            posted += 1;
        }
        completions(&side, Waiting::Events, |_| done += 1);
    }
    let rate = TRANSFERS as f64 / start.elapsed().as_secs_f64();
    side.disconnect();
    drop(side);
    // SAFETY: a live identifier.
    unsafe { rdma_sys::rdma_destroy_id(listener) };
    rate
}

/// The other end of each measurement.
fn other_process(part: &str) {
    let (what, argument) = part.split_once(' ').expect("a part and its argument");
    match what {
        "unix-echo" => {
            let mut stream = UnixStream::connect(argument).expect("connected");
            let mut buffer = [0; 64];
            while stream.read_exact(&mut buffer).is_ok() {
                stream.write_all(&buffer).expect("sent");
            }
        }
        "unix-sink" => {
            let mut stream = UnixStream::connect(argument).expect("connected");
            let mut buffer = vec![0; MB];
            while stream.read(&mut buffer).expect("received") > 0 {}
            stream.write_all(&[1]).expect("sent");
        }
        "echo-events" => echo(argument, Waiting::Events),
        "echo-polling" => echo(argument, Waiting::Polling),
        "target" => target(argument),
        _ => panic!("no part {what}"),
    }
}

fn echo(port: &str, waiting: Waiting) {
    let cm = Cm::new();
    let side = Side::new(cm.resolve(&format!("127.0.0.1:{port}")), Options::default());
    for _ in 0..32 {
        side.recv(0, &[side.sge(0, 64)]);
    }
    side.arm(false);
    connect(side.id, &side.options);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    let mut echoed = 0;
    while echoed < TRIPS {
        completions(&side, waiting, |wc| {
            if wc.wr_id == 0 {
                echoed += 1;
                side.recv(0, &[side.sge(0, 64)]);
                let flags = if echoed % 16 == 0 { SIGNALED } else { 0 };
                assert_eq!(side.post(Wr::send(1, &[side.sge(64, 64)]).flags(flags | INLINE)), 0);
            }
        });
    }
    cm.expect(RDMA_CM_EVENT_DISCONNECTED);
    side.disconnect();
}

fn target(port: &str) {
    let cm = Cm::new();
    let id = cm.resolve(&format!("127.0.0.1:{port}"));
    let mut side = Side::new(id, Options { buffer: MB, ..Options::default() });
    side.options.private = [&side.addr(0).to_le_bytes()[..], &side.rkey().to_le_bytes()].concat();
    connect(side.id, &side.options);
    cm.expect(RDMA_CM_EVENT_ESTABLISHED);
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        if let Some(event) = cm.try_event(WAIT)
            && event.kind == RDMA_CM_EVENT_DISCONNECTED
        {
            side.disconnect();
            return;
        }
    }
}
