// SPDX-License-Identifier: BSD-3-Clause
//! A session under any sequence of messages, immediates, completions, calls of the
//! server and moments. Beside it stands the simplest account of what it may do:
//! what was announced bounds what is accepted, a window is used once, a feature request
//! holds its receive until it is replied to.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use std::collections::VecDeque;
use std::convert::Infallible;
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, Shortage, Transmit};
use valkey_rdma_proto::session::{
    Lost, MessageAction, Port, Reader, Session, TimeoutAction, Timing, Violation,
};
use valkey_rdma_proto::staging::Steps;
use valkey_rdma_proto::stream::{ReadOutcome, Stream, Written};
use valkey_rdma_proto::window::{Announcement, Chunk};
use valkey_rdma_proto::wire::{Memory, Message};

const TIMING: Timing =
    Timing { handshake: 1_000, keepalive: 500, answer: 3_000, linger: 100, delivery: 2_000 };
const FIRST: u32 = 1 << 14;
const LARGEST: u32 = 1 << 16;
const STAGING: usize = 1 << 12;
const STEPS: Steps = [2 << 12, 4 << 12, 8 << 12];
const DEPTH: usize = 16;
const RECEIVES: u16 = 64;
const CONTROL_SLOTS: u16 = 8;

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
    /// So many of our messages have arrived.
    Answers(u8),
    Close(u8),
    Wait(u16),
}

/// A device that takes everything and holds it to what both sides announced.
#[derive(Default)]
struct Device {
    /// Payload in flight, by number.
    in_flight: VecDeque<u32>,
    /// The probe in flight: the number that it bears, and the payload before it.
    probe: Option<(u32, usize)>,
    /// Slots of our messages in flight.
    messages: VecDeque<u16>,
    /// Posted receives.
    receives: VecDeque<u16>,
    /// Feature requests that were not replied to.
    asked: VecDeque<u16>,
    /// Of the peer's buffers: announced and not taken, and the one in use.
    waiting: Option<Announcement>,
    window: Announcement,
    used: u32,
    /// Buffers so far: each is at its own address.
    buffers: u64,
    /// Of our buffers: where the unread bytes and the room stand, in order.
    announced: VecDeque<(u64, u32)>,
    /// Bytes that the peer may still write.
    room: u64,
}

impl Transmit<usize> for Device {
    type Staged = usize;
    type Error = Infallible;

    fn register(&mut self, length: usize) -> Option<usize> {
        assert!(STEPS.contains(&length));
        Some(length)
    }

    fn copy(&mut self, region: Option<&usize>, chunk: Chunk) -> usize {
        assert!(chunk.length > 0);
        assert!(chunk.offset + chunk.length <= region.copied().unwrap_or(STAGING));
        chunk.length
    }

    fn post(&mut self, staged: usize, write: PayloadWrite) -> Result<(), PostError<Infallible>> {
        if self.used == self.window.length {
            self.window = self.waiting.take().expect("a window of the peer's");
            self.used = 0;
        }
        assert_eq!(staged as u32, write.length);
        assert_eq!(write.rkey, self.window.rkey);
        assert_eq!(write.address, self.window.address + u64::from(self.used));
        self.used += write.length;
        assert!(self.used <= self.window.length);
        self.in_flight.push_back(write.sequence);
        assert!(self.in_flight.len() <= DEPTH);
        Ok(())
    }
}

impl Port for Device {
    /// Address and length.
    type Buffer = (u64, u32);
    type Error = Infallible;

    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<Infallible>> {
        assert!(!self.receives.contains(&slot));
        self.receives.push_back(slot);
        Ok(())
    }

    fn post_message(&mut self, slot: u16, message: Message) -> Result<(), PostError<Infallible>> {
        assert!(!self.messages.contains(&slot));
        self.messages.push_back(slot);
        match message {
            Message::GetServerFeature { select, features: 0 } => {
                assert_eq!(self.asked.pop_front(), Some(select));
            }
            Message::RegisterXferMemory(Memory { address, length, .. }) => {
                assert_eq!(self.room, 0, "announced before it was full");
                self.announced.push_back((address, length));
                self.room = u64::from(length);
            }
            message => panic!("{message:?}"),
        }
        Ok(())
    }

    fn post_probe(
        &mut self,
        next: u32,
        _window: Option<Announcement>,
    ) -> Result<(), PostError<Infallible>> {
        assert!(self.probe.is_none(), "one is out");
        self.probe = Some((next, self.in_flight.len()));
        Ok(())
    }

    fn register(&mut self, length: u32) -> Option<(u64, u32)> {
        assert!(length <= LARGEST);
        self.buffers += 1;
        Some((self.buffers << 32, length))
    }

    fn memory(&self, &(address, length): &(u64, u32)) -> Memory {
        Memory { address, length, rkey: 3 }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut device = Device::default();
    let device = &mut device;
    let mut session = Session::new(TIMING, (0, FIRST), FIRST..=LARGEST, CONTROL_SLOTS, 0);
    let stream = Stream::new(DEPTH, STAGING, STEPS);
    session.post_receives(device, RECEIVES).expect("nothing is refused");
    let (mut now, mut written, mut unread) = (0, 0, 0_u64);
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
                // Without a receive the peer's write waits, by RNR.
                let Some(slot) = device.receives.pop_front() else { continue };
                let (told, count) = (device.room, u64::from(count));
                // The peer may guess a buffer that it is not told of yet.
                let guesses = session.awaits_control_slot();
                device.room = told.saturating_sub(count);
                match session.on_immediate(&stream, device, slot, count as u32, now) {
                    Ok(()) if count > told => {
                        assert!(guesses, "more than was announced");
                        return;
                    }
                    Ok(()) => unread += count,
                    Err(Lost::Violation(Violation::Overrun(_))) => {
                        assert!(count > told);
                        return;
                    }
                    Err(lost) => panic!("{lost:?}"),
                }
                None
            }
            Step::Established => {
                session.establish(&stream, device, now).expect("nothing is refused");
                None
            }
            Step::Read(most) => {
                let outcome = stream.read(usize::from(most), |address, count| {
                    let count = count as u32;
                    let (place, length) = device.announced.front_mut().expect("a buffer");
                    assert_eq!(address, *place);
                    (*place, *length) = (*place + u64::from(count), *length - count);
                    if *length == 0 {
                        device.announced.pop_front();
                    }
                });
                match outcome {
                    ReadOutcome::Bytes(count) => {
                        assert!(count <= usize::from(most));
                        unread = unread.checked_sub(count as u64).expect("no more than came");
                    }
                    ReadOutcome::Again => assert!(unread == 0 || most == 0),
                    ReadOutcome::End | ReadOutcome::Broken => panic!("nobody said so"),
                }
                session.announce_if_full(&stream, device, now).expect("nothing is refused");
                None
            }
            Step::Write(count) => {
                match stream.write(usize::from(count), device) {
                    Written::Posted(bytes, shortage) => {
                        assert_eq!(shortage.is_none(), bytes == usize::from(count));
                        if shortage == Some(Shortage::Window) {
                            assert!(device.waiting.is_none());
                            assert_eq!(device.used, device.window.length);
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
                if !device.in_flight.is_empty() {
                    let which = usize::from(which) % device.in_flight.len();
                    let number = device.in_flight[which];
                    device.in_flight.drain(..=which);
                    if let Some((_, before)) = &mut device.probe {
                        *before = before.saturating_sub(which + 1);
                    }
                    let action = session.on_payload_sent(&stream, device, number, now);
                    if action.expect("nothing is refused") != TimeoutAction::Wait {
                        return;
                    }
                }
                None
            }
            Step::Stray(sequence) => {
                let known = |posted: &u32| (posted + 1) & 0x00ff_ffff == sequence & 0x00ff_ffff;
                if !device.in_flight.iter().any(known) {
                    assert!(!stream.outbound().retire(sequence), "gave back what was not posted");
                }
                None
            }
            Step::ProbeCompleted => {
                if let Some((next, before)) = device.probe.take() {
                    device.in_flight.drain(..before);
                    let action = session.on_probe_sent(&stream, device, next, now);
                    if action.expect("nothing is refused") != TimeoutAction::Wait {
                        return;
                    }
                }
                None
            }
            Step::Answers(most) => {
                for _ in 0..most {
                    let Some(slot) = device.messages.pop_front() else { break };
                    session.on_message_sent(&stream, device, slot, now).expect("taken");
                }
                None
            }
            Step::Close(reader) => {
                let reader =
                    [Reader::Refused, Reader::Client, Reader::Server][usize::from(reader % 3)];
                session.close(written, reader, now);
                None
            }
            Step::Wait(time) => {
                now += u64::from(time);
                let action = session.handle_timeout(&stream, device, true, now);
                if action.expect("nothing is refused") != TimeoutAction::Wait {
                    return;
                }
                session.on_housekeeping_tick(&stream, device, now).expect("nothing is refused");
                None
            }
        };
        if let Some(bytes) = message {
            let Some(slot) = device.receives.pop_front() else { continue };
            let decoded = Message::decode(&bytes);
            if let Ok(Message::GetServerFeature { select, .. }) = decoded {
                device.asked.push_back(select);
            }
            match session.on_message(&stream, device, slot, &bytes, now) {
                Ok(MessageAction::Nothing) => {}
                Ok(MessageAction::WindowOpened | MessageAction::HandshakeCompleted) => {
                    let Ok(Message::RegisterXferMemory(new)) = decoded else {
                        panic!("a window by what was no announcement");
                    };
                    assert!(device.waiting.is_none(), "an early announcement");
                    assert_eq!(device.used, device.window.length, "an early announcement");
                    assert!(new.address.checked_add(u64::from(new.length)).is_some());
                    if new.length > 0 {
                        let Memory { address, length, rkey } = new;
                        device.waiting = Some(Announcement { address, length, rkey });
                    }
                }
                Err(Lost::Violation(violation)) => {
                    assert!(!violation.to_string().is_empty());
                    return;
                }
                Err(Lost::PostFailed(never)) => match never {},
            }
        }
        assert_eq!(stream.unread(), unread);
        assert_eq!(
            stream.outbound().has_room(),
            device.waiting.is_some() || device.used < device.window.length
        );
        assert_eq!(stream.outbound().is_idle(), device.in_flight.is_empty());
        assert_eq!(session.messages_in_flight(), device.messages.len());
        assert_eq!(device.receives.len() + device.asked.len(), usize::from(RECEIVES));
    }
});
