// SPDX-License-Identifier: BSD-3-Clause
//! What a request costs in this module's own data paths, without device, fabric and server:
//! the hand-overs and the protocol, and the copies that they order.
//!
//! * `read`: what `read` of the table does: look, copy out, consume; and the announcement once
//!   the window is used up.
//! * `write`: what `write` does: right to write, staging, copy, entry; and the completions.
//! * `pass`: what a pass adds for a connection that received: the immediate, or the peer's
//!   announcement as it came over the wire.
//!
//! Work requests, the polling of completions and the server's handlers need a device and a
//! server: `scripts/bench.sh` measures them, with all around them.
//!
//! `cargo bench -p valkey-rdma-proto` runs these.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use valkey_rdma_proto::session::{Reaction, Session, Timing};
use valkey_rdma_proto::window::{Announcement, ReceiveWindow, SendLedger, SendWindow};
use valkey_rdma_proto::wire::{Memory, Message};

const SIZES: [usize; 3] = [64, 1024, 16 << 10];
/// Windows as large connections have them.
const WINDOW: usize = 1 << 20;
const DEPTH: usize = 64;
const TIMING: Timing =
    Timing { handshake: 10_000, keepalive: 5_000, answer: 60_000, linger: 500, delivery: 10_000 };

fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read");
    let received = vec![7_u8; WINDOW];
    let start = received.as_ptr() as u64;
    for size in SIZES {
        let window = ReceiveWindow::new();
        let mut into = vec![0_u8; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                if window.is_consumed() {
                    window.announce(start, WINDOW as u32);
                }
                window.arrived(size as u32).expect("the sizes divide the window");
                let (address, count) = window.readable().expect("bytes arrived");
                let offset = (address - start) as usize;
                into.copy_from_slice(&received[offset..offset + count]);
                window.consume(count);
                black_box(&mut into);
            });
        });
    }
    group.finish();
}

fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write");
    let mut staging = vec![0_u8; WINDOW];
    for size in SIZES {
        let (outbound, ledger) = (SendWindow::default(), SendLedger::new(DEPTH, WINDOW, ()));
        let reply = vec![7_u8; size];
        let mut left = 0;
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                if left == 0 {
                    let new = Announcement { address: 0, length: WINDOW as u32, rkey: 1 };
                    outbound.announce(new).expect("the last window is used up");
                    left = outbound.take().expect("it waits").length;
                }
                let mut writer = ledger.writer().expect("nobody else writes");
                let chunk = writer.chunk(size).expect("room, since completions come at once");
                staging[chunk.offset..chunk.offset + chunk.length].copy_from_slice(&reply);
                left -= chunk.length as u32;
                outbound.publish_left(left);
                let (sequence, signalled) = writer.enter(chunk.length);
                drop(writer);
                if signalled {
                    ledger.retire(sequence.wrapping_add(1));
                }
                black_box(&mut staging);
            });
        });
    }
    group.finish();
}

fn pass(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass");
    let (inbound, outbound) = (ReceiveWindow::new(), SendWindow::default());
    let mut session = Session::new(TIMING, 0);
    let announcement =
        Message::RegisterXferMemory(Memory { address: 4096, length: 1 << 20, rkey: 1 }).encode();
    session.establish();
    session.message(&announcement, 0, &outbound, 0).expect("the first announcement");
    session.handshake_completed_by_window();
    assert!(session.is_open());

    let mut now = 0;
    group.bench_function("immediate", |bencher| {
        bencher.iter(|| {
            now += 1;
            if inbound.is_consumed() {
                inbound.announce(0, WINDOW as u32);
            }
            session.immediate(64, &inbound, now).expect("64 divides the window");
            inbound.consume(64);
            black_box(inbound.unread())
        });
    });
    group.bench_function("announcement", |bencher| {
        bencher.iter(|| {
            now += 1;
            outbound.take();
            outbound.publish_left(0);
            let reaction = session.message(black_box(&announcement), 0, &outbound, now);
            assert_eq!(reaction, Ok(Reaction::WindowOpened));
        });
    });
    group.finish();
}

criterion_group!(hot_paths, read, write, pass);
criterion_main!(hot_paths);
