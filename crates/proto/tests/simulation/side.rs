// SPDX-License-Identifier: BSD-3-Clause
//! One end of a connection: the module's session, windows and ledger, driven over
//! the simulated fabric as the transport drives them over a real one, and an
//! application with bytes to send.

use crate::fabric::{Completion, Event, Fabric, Key, Outcome, Port, Registered, Slice, Work};
use fastrand::Rng;
use std::convert::Infallible;
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, Transmit};
use valkey_rdma_proto::session::{
    MessageAction, Millis, Port as SessionPort, Reader, Session, TimeoutAction, Timing,
};
use valkey_rdma_proto::staging::Steps;
use valkey_rdma_proto::stream::{ReadOutcome, Stream, Written};
use valkey_rdma_proto::window::{Announcement, Chunk, PeerState};
use valkey_rdma_proto::wire::{MESSAGE_LEN, Memory, Message};

/// What a side is made with.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub port: Port,
    /// Bytes to send.
    pub source: u64,
    pub receive_bytes: usize,
    pub receive_slots: u16,
    pub control_slots: u16,
    pub payload_depth: usize,
    pub small_staging: usize,
    pub larger_staging: Steps,
    /// Questions that the application asks.
    pub questions: u32,
    /// One in so many posts is refused as if the queue were full.
    pub refusals: u32,
    /// One in so many jobs is left to an I/O thread.
    pub offload: u32,
}

const TIMING: Timing = Timing {
    handshake: 600_000,
    keepalive: 5_000,
    answer: 600_000,
    linger: 100,
    delivery: 600_000,
};

/// A job that waits for an I/O thread.
#[derive(Debug, Default)]
struct Jobs {
    read: bool,
    write: bool,
}

#[derive(Debug)]
pub struct Side {
    plan: Plan,
    session: Session<Registered>,
    stream: Stream<Registered>,
    control: Registered,
    /// The server has the connection.
    connected: bool,
    /// It had it once: there was somebody to read.
    pub handed_over: bool,
    pub ready: bool,
    jobs: Jobs,
    write_handler: bool,
    /// End of what the application wants to have written so far.
    wanted: u64,
    /// Bytes that the window has taken, and when it did last.
    pub accepted: u64,
    written: Millis,
    pub received: u64,
    asked: u32,
    pub answered: u32,
    /// The application closed by its own decision.
    pub closed: bool,
    /// The connection ended by something that went wrong, or was told to end.
    pub failed: bool,
    pub ended: bool,
}

/// The bytes that go from a port: each is a function of its place.
fn byte(from: Port, at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ (from as u8).wrapping_mul(0x5a)
}

/// A number from 1 to 2 to the power of `bits`, small ones as likely as large ones.
pub fn size(rng: &mut Rng, bits: u32) -> usize {
    let most = 1 << rng.u32(0..=bits);
    rng.usize(1..=most)
}

impl Side {
    pub fn new(plan: Plan, fabric: &mut Fabric, rng: &mut Rng) -> Self {
        let slots = usize::from(plan.receive_slots) + usize::from(plan.control_slots);
        let first = fabric.register(plan.port, rng.usize(1..=plan.receive_bytes), true);
        let largest = plan.receive_bytes as u32;
        let mut side = Self {
            session: Session::new(TIMING, first, 1..=largest, plan.control_slots, 0),
            stream: Stream::new(plan.payload_depth, plan.small_staging, plan.larger_staging),
            control: fabric.register(plan.port, slots * MESSAGE_LEN + plan.small_staging, false),
            connected: false,
            handed_over: false,
            ready: false,
            jobs: Jobs::default(),
            write_handler: false,
            wanted: 0,
            accepted: 0,
            written: 0,
            received: 0,
            asked: 0,
            answered: 0,
            closed: false,
            failed: false,
            ended: false,
            plan,
        };
        let plan = &Plan { refusals: 0, ..plan };
        let mut ports = Ports { plan, control: side.control.key, at: 0, fabric, rng };
        side.session.post_receives(&mut ports, plan.receive_slots).expect("nothing is refused");
        side
    }

    // --- What the application does ------------------------------------------------

    pub fn is_complete(&self, peer: &Self) -> bool {
        self.received == peer.plan.source && self.answered == self.plan.questions
    }

    /// Whether the application has more to say and nothing holds it back.
    pub fn may_produce(&self) -> bool {
        self.connected
            && !self.write_handler
            && !self.jobs.write
            && self.is_peer_connected()
            && self.wanted < self.plan.source
    }

    pub fn produce(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        let left = self.plan.source - self.wanted;
        self.wanted += left.min(size(rng, 12) as u64);
        self.start_write(fabric, rng);
    }

    pub fn may_ask(&self) -> bool {
        self.connected && self.is_peer_connected() && self.asked < self.plan.questions
    }

    pub fn ask(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        let question = Message::GetServerFeature { select: 7, features: 0 };
        let sent = self.with_session(fabric, rng, |session, _, ports| {
            session.send(ports, question).expect("no failure")
        });
        if sent {
            self.asked += 1;
        }
    }

    pub fn keep_alive(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if self.session.is_cm_established() && self.is_peer_connected() {
            self.with_session(fabric, rng, |session, _, ports| {
                session.send(ports, Message::Keepalive).expect("no failure");
            });
        }
    }

    pub fn has_job(&self) -> bool {
        self.jobs.read || self.jobs.write
    }

    /// An I/O thread does what it was given; then the server updates the state.
    pub fn do_jobs(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if std::mem::take(&mut self.jobs.write) {
            self.do_write(fabric, rng);
        }
        if self.connected && std::mem::take(&mut self.jobs.read) {
            self.do_read(fabric, rng);
        }
        self.announce_if_full(fabric, rng);
        self.mark_if_ready();
    }

    fn start_write(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if rng.u32(0..self.plan.offload) == 0 {
            self.jobs.write = true;
        } else {
            self.do_write(fabric, rng);
        }
    }

    fn do_write(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        let length = (self.wanted - self.accepted) as usize;
        let (plan, control, at) = (&self.plan, self.control.key, self.accepted);
        let mut ports = Ports { plan, control, at, fabric, rng };
        match self.stream.write(length, &mut ports) {
            Written::Posted(count, _) => {
                self.accepted += count as u64;
                if count > 0 {
                    self.written = self.now();
                }
            }
            Written::Discarded => self.wanted = self.accepted,
            Written::Busy => panic!("nobody else writes"),
            Written::Broken => return self.close(fabric, rng),
        }
        self.write_handler = self.accepted < self.wanted;
        self.mark_if_ready();
    }

    fn do_read(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        let (port, received) = (self.plan.port, self.received);
        let outcome = self.stream.read(size(rng, 14), |address, length| {
            let read = fabric.read(Fabric::slice(address, length));
            for (byte_read, at) in read.iter().zip(received..) {
                assert_eq!(*byte_read, byte(1 - port, at), "wrong byte at {at}");
            }
        });
        match outcome {
            ReadOutcome::Bytes(count) => self.received += count as u64,
            ReadOutcome::Again => {}
            ReadOutcome::End | ReadOutcome::Broken => self.close(fabric, rng),
        }
    }

    /// The application closes: what it wrote is still delivered.
    pub fn close(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if !self.connected {
            return;
        }
        self.connected = false;
        self.jobs = Jobs::default();
        let quiet = !self.is_peer_connected();
        self.session.close(self.written, Reader::Client, self.now());
        if quiet {
            self.end(fabric);
        } else {
            self.closed = true;
            self.step(self.now(), fabric, rng);
        }
    }

    // --- What the poller does -----------------------------------------------------

    pub fn event(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        match fabric.next_event(self.plan.port) {
            Some(Event::Established) => {
                let now = self.now();
                let complete = self.with_session(fabric, rng, |session, stream, ports| {
                    session.establish(stream, ports, now).expect("no failure")
                });
                self.ready |= complete;
            }
            Some(Event::Disconnected) => {
                // What came before it is read first.
                while !self.ended && fabric.has_completions(self.plan.port) {
                    self.poll(fabric, rng);
                }
                self.lose(PeerState::Disconnected, fabric);
            }
            None => {}
        }
    }

    pub fn poll(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        let Some(completion) = fabric.poll(self.plan.port) else { return };
        let Completion { work, outcome, .. } = completion;
        let now = self.now();
        match (outcome, work) {
            (Outcome::Failed, _) => {
                self.failed = true;
                self.lose(PeerState::Disconnected, fabric);
            }
            (Outcome::Received(length), Work::Receive(slot)) => {
                let bytes = fabric.read(slot_of(self.control.key, slot, length)).to_vec();
                self.message(&bytes, slot, fabric, rng);
            }
            (Outcome::Immediate(count), Work::Receive(slot)) => {
                self.with_session(fabric, rng, |session, stream, ports| {
                    session.on_immediate(stream, ports, slot, count, now).expect("an honest peer");
                });
                self.mark_if_ready();
            }
            (Outcome::Sent, work) => {
                let action = self.with_session(fabric, rng, |session, stream, ports| match work {
                    Work::Payload(number) => session.on_payload_sent(stream, ports, number, now),
                    Work::Probe(next) => session.on_probe_sent(stream, ports, next, now),
                    Work::Control(slot) => session
                        .on_message_sent(stream, ports, slot, now)
                        .map(|()| TimeoutAction::Wait),
                    Work::Receive(_) => panic!("sent, by a receive"),
                });
                self.act(action.expect("no failure"), fabric);
                self.mark_if_ready();
            }
            (outcome, work) => panic!("{outcome:?} of {work:?}"),
        }
    }

    fn message(&mut self, bytes: &[u8], slot: u16, fabric: &mut Fabric, rng: &mut Rng) {
        if self.answered < self.asked && bytes[..2] == [0, 0] {
            // An answer: the application's, not the session's.
            self.answered += 1;
            return fabric.post_receive(
                self.plan.port,
                slot,
                slot_of(self.control.key, slot, MESSAGE_LEN),
            );
        }
        let now = self.now();
        let action = self.with_session(fabric, rng, |session, stream, ports| {
            session.on_message(stream, ports, slot, bytes, now).expect("an honest peer")
        });
        self.ready |= action == MessageAction::HandshakeCompleted;
        self.mark_if_ready();
    }

    pub fn serve(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        self.ready = false;
        if !self.connected {
            if self.session.is_open() {
                assert!(self.session.is_cm_established(), "handed over in the handshake");
                (self.connected, self.handed_over) = (true, true);
                self.mark_if_ready();
            }
            return;
        }
        let before = self.progress();
        if self.is_readable() && !self.jobs.read {
            if rng.u32(0..self.plan.offload) == 0 {
                self.jobs.read = true;
            } else {
                self.do_read(fabric, rng);
            }
        }
        if self.connected && self.write_handler && self.is_writable() && !self.jobs.write {
            self.start_write(fabric, rng);
        }
        self.announce_if_full(fabric, rng);
        if self.progress() != before {
            self.mark_if_ready();
        }
    }

    fn lose(&mut self, state: PeerState, fabric: &mut Fabric) {
        if self.ended {
            return;
        }
        self.stream.escalate(state);
        if self.connected {
            self.ready = true;
        } else {
            self.failed |= !self.closed;
            self.end(fabric);
        }
    }

    fn end(&mut self, fabric: &mut Fabric) {
        self.ended = true;
        fabric.disconnect(self.plan.port);
        fabric.destroy(self.plan.port);
        // What is over keeps no memory.
        let mut nothing = || fabric.register(self.plan.port, 0, false);
        self.stream = Stream::new(1, 1, self.plan.larger_staging);
        self.session = Session::new(TIMING, nothing(), 0..=0, 0, 0);
        self.control = nothing();
    }

    /// The housekeeping interval is over.
    pub fn tick(&mut self, now: Millis, fabric: &mut Fabric, rng: &mut Rng) {
        NOW.set(now);
        self.step(now, fabric, rng);
        if self.ended {
            return;
        }
        self.with_session(fabric, rng, |session, stream, ports| {
            session.on_housekeeping_tick(stream, ports, now).expect("no failure");
        });
        if self.stream.outbound().take_no_room() {
            self.mark_if_ready();
        }
    }

    fn step(&mut self, now: Millis, fabric: &mut Fabric, rng: &mut Rng) {
        let action = self.with_session(fabric, rng, |session, stream, ports| {
            session.handle_timeout(stream, ports, true, now).expect("no failure")
        });
        self.act(action, fabric);
    }

    fn act(&mut self, action: TimeoutAction, fabric: &mut Fabric) {
        match action {
            TimeoutAction::Wait => {}
            TimeoutAction::End => self.end(fabric),
            TimeoutAction::HandshakeTimedOut => panic!("although nothing stood in its way"),
            TimeoutAction::NoReply => panic!("although nothing kept the peer from it"),
        }
    }

    fn with_session<T>(
        &mut self,
        fabric: &mut Fabric,
        rng: &mut Rng,
        work: impl FnOnce(&mut Session<Registered>, &Stream<Registered>, &mut Ports<'_>) -> T,
    ) -> T {
        let ports = &mut Ports { plan: &self.plan, control: self.control.key, at: 0, fabric, rng };
        work(&mut self.session, &self.stream, ports)
    }

    fn now(&self) -> Millis {
        NOW.get()
    }

    // --- What an endpoint does ------------------------------------------------------

    fn is_readable(&self) -> bool {
        self.stream.is_readable()
    }

    fn is_writable(&self) -> bool {
        self.stream.is_writable()
    }

    fn is_peer_connected(&self) -> bool {
        self.stream.peer_state() == PeerState::Connected
    }

    fn mark_if_ready(&mut self) {
        self.ready |=
            self.connected && (self.is_readable() || self.write_handler && self.is_writable());
    }

    fn progress(&self) -> u64 {
        self.stream.progress()
    }

    fn announce_if_full(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if self.ended {
            return;
        }
        let now = self.now();
        self.with_session(fabric, rng, |session, stream, ports| {
            session.announce_if_full(stream, ports, now).expect("no failure");
        });
    }

    /// Panics unless everything that was borrowed for a transfer is back.
    pub fn assert_nothing_in_flight(&self, fabric: &Fabric) {
        let (receives, entries) = fabric.in_use(self.plan.port);
        assert_eq!(receives, usize::from(self.plan.receive_slots), "receives not posted again");
        assert_eq!(entries, 0, "entries of the send queue in use");
        assert_eq!(self.session.messages_in_flight(), 0, "messages not given back");
        assert_eq!(self.session.receive_buffers().count(), 1, "the second one of an idle peer");
        let queue = self.stream.outbound();
        assert!(queue.is_idle(), "work requests not given back");
        let staging = queue.staging_bytes(|region| region.length);
        assert_eq!(staging, Some(self.plan.small_staging), "staging memory of an idle connection");
    }
}

fn refuses(plan: &Plan, rng: &mut Rng) -> bool {
    plan.refusals > 0 && rng.u32(0..plan.refusals) == 0
}

/// A slot of a control region.
fn slot_of(control: Key, slot: u16, length: usize) -> Slice {
    Slice { key: control, offset: usize::from(slot) * MESSAGE_LEN, length }
}

/// What a side posts and registers through.
struct Ports<'a> {
    plan: &'a Plan,
    control: Key,
    /// How many bytes of the application were written before.
    at: u64,
    fabric: &'a mut Fabric,
    rng: &'a mut Rng,
}

impl Ports<'_> {
    fn posted<T>(&self, result: Result<(), T>) -> Result<(), PostError<Infallible>> {
        result.map_err(|_| PostError::Full)
    }

    /// Whether the device is to take no work request now.
    fn refuse(&mut self) -> Result<(), PostError<Infallible>> {
        if refuses(self.plan, self.rng) { Err(PostError::Full) } else { Ok(()) }
    }
}

impl Transmit<Registered> for Ports<'_> {
    type Staged = Slice;
    type Error = Infallible;

    fn register(&mut self, length: usize) -> Option<Registered> {
        self.refuse().ok()?;
        Some(self.fabric.register(self.plan.port, length, false))
    }

    fn copy(&mut self, region: Option<&Registered>, chunk: Chunk) -> Slice {
        let slots = usize::from(self.plan.receive_slots + self.plan.control_slots);
        let (key, start) =
            region.map_or((self.control, slots * MESSAGE_LEN), |region| (region.key, 0));
        let bytes: Vec<u8> =
            (self.at..).map(|at| byte(self.plan.port, at)).take(chunk.length).collect();
        let offset = start + chunk.offset;
        self.fabric.write(key, offset, &bytes);
        Slice { key, offset, length: chunk.length }
    }

    fn post(&mut self, staged: Slice, write: PayloadWrite) -> Result<(), PostError<Infallible>> {
        assert_eq!(write.length as usize, staged.length);
        self.refuse()?;
        let work = Work::Payload(write.sequence);
        let to = (write.address, write.rkey);
        let result = self.fabric.post_write(self.plan.port, work, staged, to, write.signalled);
        self.posted(result)?;
        self.at += u64::from(write.length);
        Ok(())
    }
}

impl SessionPort for Ports<'_> {
    type Buffer = Registered;
    type Error = Infallible;

    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<Infallible>> {
        self.refuse()?;
        let into = slot_of(self.control, slot, MESSAGE_LEN);
        self.fabric.post_receive(self.plan.port, slot, into);
        Ok(())
    }

    fn post_message(&mut self, slot: u16, message: Message) -> Result<(), PostError<Infallible>> {
        self.refuse()?;
        let bytes = slot_of(self.control, self.plan.receive_slots + slot, MESSAGE_LEN);
        self.fabric.write(bytes.key, bytes.offset, &message.encode());
        let result = self.fabric.post_send(self.plan.port, Work::Control(slot), bytes);
        self.posted(result)
    }

    fn post_probe(
        &mut self,
        next: u32,
        _: Option<Announcement>,
    ) -> Result<(), PostError<Infallible>> {
        self.refuse()?;
        let result = self.fabric.post_probe(self.plan.port, Work::Probe(next));
        self.posted(result)
    }

    /// Of any length: peers announce what they like.
    fn register(&mut self, length: u32) -> Option<Registered> {
        self.refuse().ok()?;
        let length = self.rng.usize(1..=length as usize);
        Some(self.fabric.register(self.plan.port, length, true))
    }

    fn memory(&self, buffer: &Registered) -> Memory {
        let address = Fabric::address(buffer.key);
        Memory { address, length: buffer.length as u32, rkey: buffer.key }
    }
}

thread_local! {
    /// The simulated time.
    pub static NOW: std::cell::Cell<Millis> = const { std::cell::Cell::new(0) };
}
