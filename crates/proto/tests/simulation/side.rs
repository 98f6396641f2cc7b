// SPDX-License-Identifier: BSD-3-Clause
//! One end of a connection: the module's session, windows and ledger, driven over
//! the simulated fabric as the transport drives them over a real one, and an
//! application with bytes to send.

use crate::fabric::{Completion, Event, Fabric, Key, Outcome, Port, Registered, Slice, Work};
use fastrand::Rng;
use valkey_rdma_proto::send_queue::{PayloadWrite, PostError, Transmit};
use valkey_rdma_proto::session::{Duty, Millis, Reaction, Session, Timing};
use valkey_rdma_proto::staging::Steps;
use valkey_rdma_proto::stream::{ReadOutcome, Stream, Written};
use valkey_rdma_proto::window::{Chunk, PeerState};
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

/// Memory that a side always has.
#[derive(Debug)]
struct SideMemory {
    control: Registered,
    receive: Registered,
}

#[derive(Debug)]
pub struct Side {
    plan: Plan,
    session: Session,
    stream: Stream<Registered>,
    /// Gone when the connection is over.
    memory: Option<SideMemory>,
    /// Where the present window begins in that: at its start or in its middle.
    receives_at: u32,
    free_control_slots: Vec<u16>,
    /// An announcement of this length could not be sent yet.
    announcement_due: Option<u32>,
    posted_before: u64,
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
    pub fn new(plan: Plan, fabric: &mut Fabric) -> Self {
        let slots = usize::from(plan.receive_slots) + usize::from(plan.control_slots);
        let side = Self {
            session: Session::new(TIMING, 0),
            stream: Stream::new(plan.payload_depth, plan.small_staging, plan.larger_staging),
            memory: Some(SideMemory {
                control: fabric.register(
                    plan.port,
                    slots * MESSAGE_LEN + plan.small_staging,
                    false,
                ),
                receive: fabric.register(plan.port, 2 * plan.receive_bytes, true),
            }),
            receives_at: 0,
            free_control_slots: (0..plan.control_slots).collect(),
            announcement_due: None,
            posted_before: 0,
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
        (0..plan.receive_slots).for_each(|slot| side.post_receive(slot, fabric));
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
        if self.send_control(question, fabric, rng) {
            self.asked += 1;
        }
    }

    pub fn keep_alive(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if self.session.is_established() && self.is_peer_connected() {
            self.send_control(Message::Keepalive, fabric, rng);
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
        let (plan, control, at) = (&self.plan, self.control(), self.accepted);
        let mut sender = Sender { plan, control, at, fabric, rng };
        match self.stream.write(length, &mut sender) {
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
        let (port, received, key) = (self.plan.port, self.received, self.receive());
        let outcome = self.stream.read(size(rng, 14), |address, length| {
            let offset = (address - Fabric::address(key)) as usize;
            let read = fabric.read(Slice { key, offset, length });
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
        self.session.close(self.written, true, self.now());
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
                let complete = self.session.establish();
                self.announce_if_full(fabric, rng);
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
        match (outcome, work) {
            (Outcome::Failed, _) => {
                self.failed = true;
                self.lose(PeerState::Disconnected, fabric);
            }
            (Outcome::Received(length), Work::Receive(slot)) => {
                let bytes = fabric.read(self.slot(slot, length)).to_vec();
                self.message(&bytes, slot, fabric, rng);
            }
            (Outcome::Immediate(count), Work::Receive(slot)) => {
                let now = self.now();
                self.session.immediate(count, self.stream.inbound(), now).expect("an honest peer");
                self.post_receive(slot, fabric);
                self.announce_if_full(fabric, rng);
                self.mark_if_ready();
            }
            (Outcome::Sent, Work::Payload(sequence)) => {
                self.stream.outbound().retire((sequence + 1) & 0x00ff_ffff);
                let now = self.now();
                self.session.payload_completed(now);
                self.mark_if_ready();
            }
            (Outcome::Sent, Work::Probe(sequence)) => {
                self.stream.outbound().retire(sequence);
                let now = self.now();
                self.session.probe_completed(now);
                self.mark_if_ready();
            }
            (Outcome::Sent, Work::Control(slot)) => {
                self.free_control_slots.push(slot);
                self.send_answers(fabric, rng);
                self.announce_if_full(fabric, rng);
            }
            (outcome, work) => panic!("{outcome:?} of {work:?}"),
        }
    }

    fn message(&mut self, bytes: &[u8], slot: u16, fabric: &mut Fabric, rng: &mut Rng) {
        if self.answered < self.asked && bytes[..2] == [0, 0] {
            // An answer: the application's, not the session's.
            self.answered += 1;
            return self.post_receive(slot, fabric);
        }
        let now = self.now();
        let reaction = self.session.message(bytes, slot, self.stream.outbound(), now);
        match reaction.expect("an honest peer") {
            Reaction::Nothing => self.post_receive(slot, fabric),
            Reaction::WindowOpened => {
                self.post_receive(slot, fabric);
                self.ready |= self.session.handshake_completed_by_window();
                self.mark_if_ready();
            }
            Reaction::AnswerDue => self.send_answers(fabric, rng),
        }
    }

    pub fn serve(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        self.ready = false;
        if !self.connected {
            if self.session.is_open() {
                assert!(self.session.is_established(), "handed over in the handshake");
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
        self.stream = Stream::new(1, 1, self.plan.larger_staging);
        self.memory = None;
    }

    /// The slow clock.
    pub fn tick(&mut self, now: Millis, fabric: &mut Fabric, rng: &mut Rng) {
        let written_before =
            std::mem::replace(&mut self.posted_before, self.stream.outbound().total_posted());
        NOW.set(now);
        self.step(now, fabric, rng);
        if self.ended {
            return;
        }
        if written_before == self.posted_before {
            self.stream.outbound().release_staging();
        }
        self.send_answers(fabric, rng);
        self.announce_if_full(fabric, rng);
        if self.stream.outbound().take_refused() {
            self.mark_if_ready();
        }
    }

    fn step(&mut self, now: Millis, fabric: &mut Fabric, rng: &mut Rng) {
        match self.session.duty(now, self.stream.outbound().is_idle()) {
            Duty::Wait => {}
            Duty::Probe => {
                let refused = self.refuses(rng);
                let port = self.plan.port;
                let post = |next| refused || fabric.post_probe(port, Work::Probe(next)).is_err();
                if self.stream.outbound().probe(post).expect("nobody else writes") {
                    self.session.probe_not_sent();
                }
            }
            Duty::End => self.end(fabric),
            Duty::TimedOut => panic!("no handshake, although nothing stood in its way"),
            Duty::Unanswered => panic!("no answer, although nothing stood in its way"),
        }
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

    fn refuses(&self, rng: &mut Rng) -> bool {
        refuses(&self.plan, rng)
    }

    /// Opens the next window, of whatever length, once the one before is full: where it
    /// was, if that was read, or in the other half of the memory.
    fn announce_if_full(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        if !self.session.is_established() || !self.is_peer_connected() || self.ended {
            return;
        }
        let most = self.plan.receive_bytes as u32;
        let length = match self.announcement_due.take() {
            Some(length) => length,
            None if self.stream.inbound().is_full() && self.stream.inbound().is_other_free() => {
                let stays = self.stream.inbound().is_consumed() && rng.bool();
                if !stays && (!self.stream.inbound().is_consumed() && rng.bool()) {
                    // The reader may come first.
                    return;
                }
                self.receives_at = if stays { self.receives_at } else { most - self.receives_at };
                let length = if rng.u32(0..3) == 0 { rng.u32(1..=most) } else { most };
                self.stream.inbound().announce(self.receive_address(), length);
                length
            }
            None => return,
        };
        let memory = Memory { address: self.receive_address(), length, rkey: self.receive() };
        if !self.send_control(Message::RegisterXferMemory(memory), fabric, rng) {
            self.announcement_due = Some(length);
        }
    }

    fn control(&self) -> Key {
        self.memory.as_ref().expect("not over").control.key
    }

    fn receive(&self) -> Key {
        self.memory.as_ref().expect("not over").receive.key
    }

    fn receive_address(&self) -> u64 {
        Fabric::address(self.receive()) + u64::from(self.receives_at)
    }

    fn send_answers(&mut self, fabric: &mut Fabric, rng: &mut Rng) {
        while let Some((answer, slot)) = self.session.next_answer() {
            if !self.send_control(answer, fabric, rng) {
                return self.session.answer_not_sent(answer, slot);
            }
            self.post_receive(slot, fabric);
        }
    }

    fn send_control(&mut self, message: Message, fabric: &mut Fabric, rng: &mut Rng) -> bool {
        let Some(slot) = self.free_control_slots.pop() else { return false };
        let bytes = self.slot(self.plan.receive_slots + slot, MESSAGE_LEN);
        fabric.write(bytes.key, bytes.offset, &message.encode());
        let sent = !self.refuses(rng)
            && fabric.post_send(self.plan.port, Work::Control(slot), bytes).is_ok();
        if !sent {
            self.free_control_slots.push(slot);
        }
        sent
    }

    fn post_receive(&self, slot: u16, fabric: &mut Fabric) {
        fabric.post_receive(self.plan.port, slot, self.slot(slot, MESSAGE_LEN));
    }

    /// A slot of the control region.
    fn slot(&self, slot: u16, length: usize) -> Slice {
        Slice { key: self.control(), offset: usize::from(slot) * MESSAGE_LEN, length }
    }

    /// Panics unless everything that was borrowed for a transfer is back.
    pub fn assert_nothing_in_flight(&self, fabric: &Fabric) {
        let (receives, entries) = fabric.in_use(self.plan.port);
        assert_eq!(receives, usize::from(self.plan.receive_slots), "receives not posted again");
        assert_eq!(entries, 0, "entries of the send queue in use");
        assert_eq!(self.free_control_slots.len(), usize::from(self.plan.control_slots));
        let queue = self.stream.outbound();
        assert!(queue.is_idle(), "work requests not given back");
        let staging = queue.staging_bytes(|region| region.length);
        assert_eq!(staging, Some(self.plan.small_staging), "staging memory of an idle connection");
    }
}

fn refuses(plan: &Plan, rng: &mut Rng) -> bool {
    plan.refusals > 0 && rng.u32(0..plan.refusals) == 0
}

/// One write of the application.
struct Sender<'a> {
    plan: &'a Plan,
    control: Key,
    /// How many bytes were written before.
    at: u64,
    fabric: &'a mut Fabric,
    rng: &'a mut Rng,
}

impl Transmit<Registered> for Sender<'_> {
    type Staged = Slice;
    type Error = ();

    fn register(&mut self, length: usize) -> Option<Registered> {
        (!refuses(self.plan, self.rng)).then(|| self.fabric.register(self.plan.port, length, false))
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

    fn post(&mut self, staged: Slice, write: PayloadWrite) -> Result<(), PostError<()>> {
        assert_eq!(write.length as usize, staged.length);
        let work = Work::Payload(write.sequence);
        let to = (write.address, write.rkey);
        let Self { plan, fabric, .. } = self;
        if refuses(plan, self.rng)
            || fabric.post_write(plan.port, work, staged, to, write.signalled).is_err()
        {
            return Err(PostError::Full);
        }
        self.at += u64::from(write.length);
        Ok(())
    }
}

thread_local! {
    /// The simulated time.
    pub static NOW: std::cell::Cell<Millis> = const { std::cell::Cell::new(0) };
}
