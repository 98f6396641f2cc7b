// SPDX-License-Identifier: BSD-3-Clause
//! A session under any sequence of messages, immediates, completions, calls of the
//! server and moments. Beside it stands the simplest account of what it may do:
//! what was announced bounds what is accepted, a window is used once, a question
//! holds its receive until it is answered.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use valkey_rdma_proto::session::{Duty, Reaction, Session, Timing};
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, Shortage, Transmit};
use valkey_rdma_proto::staging::Steps;
use valkey_rdma_proto::stream::{ReadOutcome, Stream, Written};
use valkey_rdma_proto::window::{Announcement, Chunk};
use valkey_rdma_proto::wire::{Memory, Message};
use std::collections::VecDeque;

const TIMING: Timing = Timing { handshake: 1_000, keepalive: 500, answer: 3_000, linger: 100, delivery: 2_000 };
const BUFFER: u32 = 1 << 16;
/// Where it stands.
const ADDRESS: u64 = 0x7000_0000;
const STAGING: usize = 1 << 12;
const STEPS: Steps = [2 << 12, 4 << 12, 8 << 12];
const DEPTH: usize = 16;

#[derive(Arbitrary, Debug)]
enum Step {
    /// The peer sends these bytes.
    Message(Vec<u8>),
    /// The peer announces.
    Announcement { address: u64, length: u32, rkey: u32 },
    /// The peer asks.
    Question(u16),
    /// The peer writes, or says so.
    Immediate(u32),
    /// The connection manager reports.
    Established,
    /// The server reads.
    Read(u16),
    /// The server writes.
    Write(u16),
    /// A work request of those in flight is over, and with it those before it.
    Completed(u8),
    /// A completion that nobody asked for.
    Stray(u32),
    ProbeCompleted,
    /// There is room for answers.
    Answers(u8),
    Close(bool),
    Wait(u16),
}

/// Takes every work request, and holds it to what the peer announced.
struct Device<'a> {
    in_flight: &'a mut VecDeque<u32>,
    waiting: &'a mut Option<Announcement>,
    window: &'a mut Announcement,
    used: &'a mut u32,
}

impl Transmit<usize> for Device<'_> {
    type Staged = usize;
    type Error = ();

    fn register(&mut self, length: usize) -> Option<usize> {
        assert!(STEPS.contains(&length));
        Some(length)
    }

    fn copy(&mut self, region: Option<&usize>, chunk: Chunk) -> usize {
        assert!(chunk.length > 0);
        assert!(chunk.offset + chunk.length <= region.copied().unwrap_or(STAGING));
        chunk.length
    }

    fn post(&mut self, staged: usize, write: PayloadWrite) -> Result<(), PostError<()>> {
        if *self.used == self.window.length {
            *self.window = self.waiting.take().expect("a window of the peer's");
            *self.used = 0;
        }
        assert_eq!(staged as u32, write.length);
        assert_eq!(write.rkey, self.window.rkey);
        assert_eq!(write.address, self.window.address + u64::from(*self.used));
        *self.used += write.length;
        assert!(*self.used <= self.window.length);
        self.in_flight.push_back(write.sequence);
        assert!(self.in_flight.len() <= DEPTH);
        Ok(())
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut session = Session::new(TIMING, 0);
    let stream = Stream::new(DEPTH, STAGING, STEPS);
    let (inbound, outbound) = (stream.inbound(), stream.outbound());
    let (mut now, mut written) = (0, 0);
    let mut slots: VecDeque<u16> = (0..64).collect();
    let mut held: VecDeque<(u16, u16)> = VecDeque::new();
    // Of our buffer: what the peer may still write, and what was not read.
    let (mut room, mut unread) = (0_u64, 0_u64);
    // Of the peer's buffer: announced and not taken, and the one in use.
    let (mut waiting, mut window, mut used) = (None, Announcement::default(), 0_u32);
    let mut in_flight: VecDeque<u32> = VecDeque::new();
    for step in steps {
        let message = match step {
            Step::Message(bytes) => Some(bytes),
            Step::Announcement { address, length, rkey } => {
                let memory = Memory { address, length, rkey };
                Some(Message::RegisterXferMemory(memory).encode().to_vec())
            }
            Step::Question(select) => {
                Some(Message::GetServerFeature { select, features: 0 }.encode().to_vec())
            }
            Step::Immediate(count) => {
                let result = session.immediate(count, inbound, now);
                assert_eq!(result.is_ok(), u64::from(count) <= room);
                if result.is_err() {
                    return;
                }
                room -= u64::from(count);
                unread += u64::from(count);
                None
            }
            Step::Established => {
                session.establish();
                None
            }
            Step::Read(most) => {
                let before = unread;
                let outcome = stream.read(usize::from(most), |address, count| {
                    // What is unread ends where the room begins.
                    assert_eq!(address + before + room, ADDRESS + u64::from(BUFFER));
                    unread -= count as u64;
                });
                match outcome {
                    ReadOutcome::Bytes(count) => {
                        assert_eq!(count as u64, before.min(u64::from(most)));
                    }
                    ReadOutcome::Again => assert!(before == 0 || most == 0),
                    ReadOutcome::End | ReadOutcome::Broken => panic!("nobody said so"),
                }
                None
            }
            Step::Write(count) => {
                let mut device = Device {
                    in_flight: &mut in_flight,
                    waiting: &mut waiting,
                    window: &mut window,
                    used: &mut used,
                };
                match stream.write(usize::from(count), &mut device) {
                    Written::Posted(bytes, shortage) => {
                        assert_eq!(shortage.is_none(), bytes == usize::from(count));
                        if shortage == Some(Shortage::Window) {
                            assert!(waiting.is_none() && used == window.length);
                        }
                        if bytes > 0 {
                            written = now;
                        }
                    }
                    outcome => panic!("{outcome:?}"),
                }
                None
            }
            Step::Completed(which) => {
                if !in_flight.is_empty() {
                    let which = usize::from(which) % in_flight.len();
                    let sequence = in_flight[which];
                    in_flight.drain(..=which);
                    assert!(outbound.retire((sequence + 1) & 0x00ff_ffff));
                    session.payload_completed(now);
                }
                None
            }
            Step::Stray(sequence) => {
                let known = |posted: &u32| (posted + 1) & 0x00ff_ffff == sequence & 0x00ff_ffff;
                if !in_flight.iter().any(known) {
                    assert!(!outbound.retire(sequence), "gave back what was not posted");
                }
                None
            }
            Step::ProbeCompleted => {
                session.probe_completed(now);
                None
            }
            Step::Answers(most) => {
                for _ in 0..most {
                    let answer = session.next_answer();
                    let expected = held.pop_front();
                    assert_eq!(answer.map(|(_, slot)| slot), expected.map(|(_, slot)| slot));
                    let (Some((answer, slot)), Some((select, _))) = (answer, expected) else { break };
                    assert_eq!(answer, Message::GetServerFeature { select, features: 0 });
                    slots.push_back(slot);
                }
                None
            }
            Step::Close(served) => {
                session.close(written, served, now);
                None
            }
            Step::Wait(time) => {
                now += u64::from(time);
                match session.duty(now, outbound.is_idle()) {
                    Duty::Wait | Duty::Probe => {}
                    Duty::End | Duty::TimedOut | Duty::Unanswered => return,
                }
                None
            }
        };
        if let Some(bytes) = message {
            // Without a receive the peer's message waits, by RNR.
            let Some(slot) = slots.pop_front() else { continue };
            match session.message(&bytes, slot, outbound, now) {
                Ok(Reaction::Nothing) => slots.push_back(slot),
                Ok(Reaction::AnswerDue) => {
                    let Ok(Message::GetServerFeature { select, .. }) = Message::decode(&bytes)
                    else {
                        panic!("an answer to what was no question");
                    };
                    held.push_back((select, slot));
                }
                Ok(Reaction::WindowOpened) => {
                    let Ok(Message::RegisterXferMemory(new)) = Message::decode(&bytes) else {
                        panic!("a window by what was no announcement");
                    };
                    assert!(waiting.is_none() && used == window.length, "an early announcement");
                    assert!(new.address.checked_add(u64::from(new.length)).is_some());
                    if new.length > 0 {
                        let Memory { address, length, rkey } = new;
                        waiting = Some(Announcement { address, length, rkey });
                    }
                    session.handshake_completed_by_window();
                    slots.push_back(slot);
                }
                Err(violation) => {
                    assert!(!violation.to_string().is_empty());
                    return;
                }
            }
        }
        if session.is_established() && inbound.is_consumed() {
            assert_eq!((room, unread), (0, 0));
            inbound.announce(ADDRESS, BUFFER);
            room = u64::from(BUFFER);
        }
        assert_eq!(inbound.unread(), unread);
        assert_eq!(outbound.has_room(), waiting.is_some() || used < window.length);
        assert_eq!(outbound.is_idle(), in_flight.is_empty());
        assert_eq!(slots.len() + held.len(), 64);
    }
});
