// SPDX-License-Identifier: BSD-3-Clause
//! What a request costs in this module's own data paths, without device, fabric and server:
//! the hand-overs and the protocol, and the copies that they order.
//!
//! * `read`: the immediate, what `read` of the table does (look, copy out, consume), and the
//!   announcement once the window is used up.
//! * `write`: what `write` does: right to write, staging, copy, entry; and the completions.
//! * `pass`: what a pass adds for a connection that received: the immediate and the read that
//!   follows, or one byte written, its completion, and the peer's next announcement as it came
//!   over the wire.
//!
//! Work requests, the polling of completions and the server's handlers need a device and a
//! server: `scripts/bench.sh` measures them, with all around them.
//!
//! `cargo bench -p valkey-rdma-proto` runs these.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, Transmit};
use valkey_rdma_proto::session::{MessageAction, Port, Session, Timing};
use valkey_rdma_proto::staging::STEPS;
use valkey_rdma_proto::stream::{ReadOutcome, Stream, Written};
use valkey_rdma_proto::window::{Announcement, Chunk};
use valkey_rdma_proto::wire::{Memory, Message};

const SIZES: [usize; 3] = [64, 1024, 16 << 10];
/// Windows as large connections have them.
const WINDOW: usize = 1 << 20;
const DEPTH: usize = 64;
const TIMING: Timing =
    Timing { handshake: 10_000, keepalive: 5_000, answer: 60_000, linger: 500, delivery: 10_000 };

fn stream() -> Stream<()> {
    Stream::new(DEPTH, WINDOW, STEPS)
}

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read");
    let received = vec![7_u8; WINDOW];
    let start = received.as_ptr() as u64;
    for size in SIZES {
        let (stream, mut queue) = (stream(), Queue { start });
        let mut session = open(&stream, &mut queue);
        let mut into = vec![0_u8; size];
        let mut now = 0;
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                now += 1;
                session
                    .on_immediate(&stream, &mut queue, 0, size as u32, now)
                    .expect("the sizes divide the window");
                let outcome = stream.read(size, |address, count| {
                    let offset = (address - start) as usize;
                    into.copy_from_slice(&received[offset..offset + count]);
                });
                assert_eq!(outcome, ReadOutcome::Bytes(size));
                announce(&stream, &mut session, &mut queue, now);
                black_box(&mut into);
            });
        });
    }
    group.finish();
}

/// Copies to staging memory, and keeps the last work request.
struct Sender<'a> {
    reply: &'a [u8],
    staging: &'a mut [u8],
    posted: Option<PayloadWrite>,
}

impl Transmit<()> for Sender<'_> {
    type Staged = ();
    type Error = ();

    fn register(&mut self, _length: usize) -> Option<()> {
        None
    }

    fn copy(&mut self, _region: Option<&()>, chunk: Chunk) {
        self.staging[chunk.offset..chunk.offset + chunk.length].copy_from_slice(self.reply);
    }

    fn post(&mut self, (): (), write: PayloadWrite) -> Result<(), PostError<()>> {
        self.posted = Some(write);
        Ok(())
    }
}

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write");
    let mut staging = vec![0_u8; WINDOW];
    for size in SIZES {
        let stream = stream();
        let reply = vec![7_u8; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                if !stream.outbound().has_room() {
                    let new = Announcement { address: 0, length: WINDOW as u32, rkey: 1 };
                    stream.outbound().announce(new).expect("the last window is used up");
                }
                let mut sender = Sender { reply: &reply, staging: &mut staging, posted: None };
                let written = stream.write(size, &mut sender);
                assert_eq!(written, Written::Posted(size, None), "completions come at once");
                let posted = sender.posted.expect("it was posted");
                if posted.signalled {
                    stream.outbound().retire(posted.sequence.wrapping_add(1));
                }
                black_box(&mut staging);
            });
        });
    }
    group.finish();
}

/// Takes everything that a session posts.
struct Queue {
    /// Address of every receive buffer.
    start: u64,
}

impl Port for Queue {
    type Buffer = u32;
    type Error = ();

    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<()>> {
        black_box(slot);
        Ok(())
    }

    fn post_message(&mut self, _slot: u16, message: Message) -> Result<(), PostError<()>> {
        black_box(message.encode());
        Ok(())
    }

    fn post_probe(&mut self, _next: u32, _at: Option<Announcement>) -> Result<(), PostError<()>> {
        Ok(())
    }

    fn register(&mut self, length: u32) -> Option<u32> {
        Some(length)
    }

    fn memory(&self, buffer: &u32) -> Memory {
        Memory { address: self.start, length: *buffer, rkey: 1 }
    }
}

/// The peer's announcement of a window of one byte.
const ANNOUNCEMENT: Message =
    Message::RegisterXferMemory(Memory { address: 4096, length: 1, rkey: 1 });

/// A session whose handshake is complete.
fn open(stream: &Stream<()>, queue: &mut Queue) -> Session<u32> {
    let mut session = Session::new(TIMING, WINDOW as u32, WINDOW as u32..=WINDOW as u32, 8, 0);
    session.establish(stream, queue, 0).expect("nothing is refused");
    let announcement = ANNOUNCEMENT.encode();
    session.on_message(stream, queue, 0, &announcement, 0).expect("the first announcement");
    assert!(session.is_open());
    session
}

/// Announces the receive buffer again if it is full, and has the message arrive at once.
fn announce(stream: &Stream<()>, session: &mut Session<u32>, queue: &mut Queue, now: u64) {
    session.announce_if_full(stream, queue, now).expect("nothing is refused");
    if session.messages_in_flight() > 0 {
        session.on_message_sent(stream, queue, 0, now).expect("nothing is refused");
    }
}

fn pass(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    let (stream, mut queue) = (stream(), Queue { start: 0 });
    let mut staging = vec![0_u8; WINDOW];
    let announcement = ANNOUNCEMENT.encode();
    let mut session = open(&stream, &mut queue);

    let mut now = 0;
    group.bench_function("immediate", |bencher| {
        bencher.iter(|| {
            now += 1;
            session
                .on_immediate(&stream, &mut queue, 0, black_box(64), now)
                .expect("64 divides the window");
            let outcome = stream.read(64, |address, _| {
                black_box(address);
            });
            black_box(outcome);
            announce(&stream, &mut session, &mut queue, now);
        });
    });
    group.bench_function("announcement", |bencher| {
        bencher.iter(|| {
            now += 1;
            let mut sender = Sender { reply: &[0], staging: &mut staging, posted: None };
            stream.write(1, &mut sender);
            let number = sender.posted.expect("it was posted").sequence;
            session.on_payload_sent(&stream, &mut queue, number, now).expect("nothing is refused");
            let action = session.on_message(&stream, &mut queue, 0, black_box(&announcement), now);
            assert_eq!(action, Ok(MessageAction::WindowOpened));
        });
    });
    group.finish();
}

criterion_group!(hot_paths, read, write, pass);
criterion_main!(hot_paths);
