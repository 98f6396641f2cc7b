// SPDX-License-Identifier: BSD-3-Clause
//! The hand-overs under loom, which runs every interleaving of three threads that
//! needs no more than [`PREEMPTIONS`] preemptions, and every value that a load may
//! see by its ordering:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --lib model
//! ```
//!
//! The types are the real ones; what stands around them here is the least that
//! uses them as the transport does. Three threads: the main thread, which is the
//! poller, and two I/O threads. The main thread hands jobs out and is told when
//! one is over through channels, as the server does through its queues, and
//! nothing else orders a job after the one before. The fabric acts on the main
//! thread: it reads staging memory at the last moment that it may, right before
//! the completion, and writes into the receive buffer at the first, right after
//! the announcement.
//!
//! What goes wrong shows itself so: bytes are compared; memory consists of loom's
//! cells, so that two who touch a byte without an order between them fail; a
//! wake-up that is lost leaves the main thread waiting for ever, which is a
//! deadlock; a window or a job that is handed over twice fails an assertion.

use crate::send_queue::{PayloadWrite, PostError, SendQueue, Sent, Transmit};
use crate::staging::Steps;
use crate::stream::{ReadOutcome, Stream, Written};
use crate::window::{
    Announcement, Chunk, PeerState, ReceiveWindow, SendLedger, SendWindow, SharedPeerState,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::mpsc::{Receiver, Sender, channel};
use loom::thread::{self, JoinHandle};

/// Preemptions in one interleaving, unless `LOOM_MAX_PREEMPTIONS` says otherwise.
const PREEMPTIONS: usize = 3;

fn model(run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.max_branches = 10_000;
    builder.check(run);
}

/// Two things at once, and what they come to. Both on threads of their own: loom takes
/// the first one's way to its end as its first interleaving, and looks for the others
/// from there.
fn at_once<A: Send + 'static, B: Send + 'static>(
    first: impl FnOnce() -> A + Send + 'static,
    second: impl FnOnce() -> B + Send + 'static,
) -> (A, B) {
    let (first, second) = (thread::spawn(first), thread::spawn(second));
    (first.join().unwrap(), second.join().unwrap())
}

/// Bytes that threads and the fabric share with nothing but the windows between them.
struct Memory(Vec<UnsafeCell<u8>>);

// SAFETY: loom's cells find who breaks this, which is what they are here for.
unsafe impl Sync for Memory {}
// SAFETY: bytes.
unsafe impl Send for Memory {}

impl Memory {
    fn new(length: usize) -> Self {
        Self((0..length).map(|_| UnsafeCell::new(0)).collect())
    }

    fn store(&self, at: usize, bytes: &[u8]) {
        for (cell, byte) in self.0[at..].iter().zip(bytes) {
            // SAFETY: loom checks it.
            cell.with_mut(|place| unsafe { *place = *byte });
        }
    }

    fn load(&self, at: usize, length: usize) -> Vec<u8> {
        // SAFETY: loom checks it.
        self.0[at..at + length].iter().map(|cell| cell.with(|byte| unsafe { *byte })).collect()
    }

    /// Whoever frees memory must be alone with all of it.
    fn free(&self) {
        self.store(0, &vec![0xff; self.0.len()]);
    }
}

/// The threads that the server gives jobs to.
struct IoThreads<J> {
    queues: Vec<Sender<Option<J>>>,
    handles: Vec<JoinHandle<()>>,
}

impl<J: 'static> IoThreads<J> {
    fn start(count: usize, work: impl Fn(J) + Clone + 'static) -> Self {
        let (queues, handles) = (0..count)
            .map(|_| {
                let (queue, jobs): (Sender<Option<J>>, Receiver<Option<J>>) = channel();
                let work = work.clone();
                let handle = thread::spawn(move || {
                    while let Ok(Some(job)) = jobs.recv() {
                        work(job);
                    }
                });
                (queue, handle)
            })
            .unzip();
        Self { queues, handles }
    }

    /// Successive jobs migrate.
    fn give(&mut self, job: J) {
        self.queues[0].send(Some(job)).unwrap();
        self.queues.rotate_left(1);
    }

    fn stop(self) {
        for queue in &self.queues {
            queue.send(None).unwrap();
        }
        for handle in self.handles {
            handle.join().unwrap();
        }
    }
}

/// What the main thread waits for.
enum Event {
    /// The send queue has another work request.
    Posted(WorkRequest),
    /// A write job is over and took so many bytes.
    Written(usize),
    /// A read job is over and has these bytes.
    Read(Vec<u8>),
    /// A probe is posted, and this would be the number of the next work request.
    Probe(u32),
}

/// To the main thread.
type Events = Sender<Event>;

struct WorkRequest {
    sequence: u32,
    signalled: bool,
    offset: usize,
    length: usize,
    target: u64,
}

// --- Sending ------------------------------------------------------------------

/// No larger staging memory: regions of it can't be had.
const NONE: Steps = [usize::MAX; 3];

struct Sending {
    queue: SendQueue<()>,
    staging: Memory,
}

/// The caller's part of the send loop: copies `bytes` and hands the work requests on.
struct Port<'a> {
    bytes: &'a [u8],
    staging: &'a Memory,
    queue: &'a Events,
}

impl Transmit<()> for Port<'_> {
    type Staged = usize;
    type Error = ();

    fn register(&mut self, _length: usize) -> Option<()> {
        None
    }

    fn copy(&mut self, _region: Option<&()>, chunk: Chunk) -> usize {
        let (now, later) = self.bytes.split_at(chunk.length);
        self.staging.store(chunk.offset, now);
        self.bytes = later;
        chunk.offset
    }

    fn post(&mut self, offset: usize, write: PayloadWrite) -> Result<(), PostError<()>> {
        let PayloadWrite { sequence, signalled, length, address: target, .. } = write;
        let length = length as usize;
        let posted = WorkRequest { sequence, signalled, offset, length, target };
        self.queue.send(Event::Posted(posted)).unwrap();
        Ok(())
    }
}

impl Sending {
    fn new(depth: usize, staging: usize) -> Self {
        Self { queue: SendQueue::new(depth, staging, NONE), staging: Memory::new(staging) }
    }

    fn write(&self, bytes: &[u8], queue: &Events) -> usize {
        let mut port = Port { bytes, staging: &self.staging, queue };
        self.queue.write(bytes.len(), &mut port).map_or(0, |sent| sent.bytes)
    }
}

/// When the fabric carries work requests out.
#[derive(Clone, Copy, PartialEq)]
enum Pace {
    /// As soon as the main thread gets to it.
    Prompt,
    /// When the job that posted them is over.
    Late,
}

/// The peer: announces windows of these lengths one after the other, each when the
/// one before is exactly full.
struct Peer {
    lengths: std::vec::IntoIter<u32>,
    /// Address of the next byte and room from there on.
    next: u64,
    room: u32,
    received: Vec<u8>,
}

impl Peer {
    fn new(lengths: &[u32]) -> Self {
        let lengths = lengths.to_vec().into_iter();
        Self { lengths, next: 0, room: 0, received: Vec::new() }
    }

    fn announce(&mut self, to: &SendQueue<()>) {
        while self.room == 0 {
            let Some(length) = self.lengths.next() else { return };
            self.next = (self.next / 100 + 1) * 100;
            self.room = length;
            let announcement = Announcement { address: self.next, length, rkey: 0 };
            to.announce(announcement).expect("an honest announcement");
        }
    }

    fn receive(&mut self, at: u64, bytes: &[u8]) {
        assert_eq!(at, self.next, "bytes out of order, or outside of the window");
        self.next += bytes.len() as u64;
        self.room = self.room.checked_sub(bytes.len() as u32).expect("more than the window");
        self.received.extend_from_slice(bytes);
    }
}

/// The main thread's side of sending: handler, jobs, fabric.
struct SendMain {
    shared: Arc<Sending>,
    peer: Peer,
    pace: Pace,
    in_flight: Vec<WorkRequest>,
    source: &'static [u8],
    accepted: usize,
    /// The write handler is installed, as after a write that came back short.
    handler: bool,
    job: bool,
}

impl SendMain {
    /// The level is looked at; the handler queues a job, or nothing if one is queued.
    fn mark_if_ready(&mut self, io: &mut IoThreads<Job>) {
        if self.handler && self.shared.queue.is_writable() && !self.job {
            self.queue_job(io);
        }
    }

    fn queue_job(&mut self, io: &mut IoThreads<Job>) {
        self.job = true;
        io.give(Job::Write(self.accepted));
        // The completion of a read job updates the state while this one runs.
        self.mark_if_ready(io);
    }

    fn carry_out(&mut self, io: &mut IoThreads<Job>) {
        for request in std::mem::take(&mut self.in_flight) {
            let bytes = self.shared.staging.load(request.offset, request.length);
            self.peer.receive(request.target, &bytes);
            if request.signalled {
                assert!(self.shared.queue.retire((request.sequence + 1) & 0x00ff_ffff));
                self.mark_if_ready(io);
            }
            self.peer.announce(&self.shared.queue);
            self.mark_if_ready(io);
        }
    }

    fn posted(&mut self, request: WorkRequest, io: &mut IoThreads<Job>) {
        self.in_flight.push(request);
        if self.pace == Pace::Prompt || !self.job {
            self.carry_out(io);
        }
    }

    /// The server's end of a write job: `update_state`, then, if bytes are left,
    /// `set_write_handler`.
    fn written(&mut self, count: usize, io: &mut IoThreads<Job>) {
        self.job = false;
        self.accepted += count;
        self.carry_out(io);
        self.mark_if_ready(io);
        self.handler = self.accepted < self.source.len();
        self.mark_if_ready(io);
    }

    fn is_over(&self) -> bool {
        self.peer.received.len() == self.source.len() && !self.job
    }
}

enum Job {
    /// Write the source from here on.
    Write(usize),
    /// Read at most so many bytes.
    Read(usize),
}

/// Bytes go out through windows of `lengths`, staging memory of `staging` bytes and
/// a send queue of `depth` work requests, written by jobs that migrate between two
/// I/O threads.
fn send(source: &'static [u8], lengths: &'static [u32], depth: usize, staging: usize, pace: Pace) {
    model(move || {
        let shared = Arc::new(Sending::new(depth, staging));
        let (queue, events) = channel();
        let mut io = IoThreads::start(2, {
            let shared = Arc::clone(&shared);
            move |job| {
                let Job::Write(from) = job else { unreachable!() };
                let count = shared.write(&source[from..], &queue);
                queue.send(Event::Written(count)).unwrap();
            }
        });
        let mut main = SendMain {
            shared,
            peer: Peer::new(lengths),
            pace,
            in_flight: Vec::new(),
            source,
            accepted: 0,
            handler: false,
            job: false,
        };
        main.queue_job(&mut io);
        // The first announcement comes while the first job runs.
        main.peer.announce(&main.shared.queue);
        main.mark_if_ready(&mut io);
        while !main.is_over() {
            match events.recv().unwrap() {
                Event::Posted(request) => main.posted(request, &mut io),
                Event::Written(count) => main.written(count, &mut io),
                Event::Read(_) | Event::Probe(_) => unreachable!(),
            }
        }
        assert_eq!(main.peer.received, source);
        assert!(main.shared.queue.is_idle());
        io.stop();
    });
}

#[test]
fn bytes_are_sent_in_order_while_windows_and_staging_memory_change_hands() {
    send(b"abcd", &[2, 1, 1], 4, 2, Pace::Prompt);
}

#[test]
fn staging_memory_is_used_again_within_one_job() {
    send(b"abcd", &[4], 4, 2, Pace::Prompt);
}

#[test]
fn bytes_are_sent_in_order_when_completions_are_late() {
    send(b"abc", &[1, 2], 4, 2, Pace::Late);
}

#[test]
fn bytes_are_sent_in_order_through_a_send_queue_of_one() {
    send(b"abc", &[2, 2], 1, 2, Pace::Prompt);
}

// --- Receiving ----------------------------------------------------------------

struct Receiving {
    window: ReceiveWindow,
    /// All buffers that are announced one after the other; an address is a place in it.
    buffer: Memory,
}

impl Receiving {
    fn new(length: usize) -> Self {
        Self { window: ReceiveWindow::new(), buffer: Memory::new(length) }
    }

    /// As the transport's read.
    fn read(&self, length: usize) -> Vec<u8> {
        let Some(mut reader) = self.window.reader() else { return Vec::new() };
        let Some((address, waiting)) = reader.readable() else { return Vec::new() };
        let count = waiting.min(length);
        let bytes = self.buffer.load(address as usize, count);
        reader.consume(count);
        bytes
    }
}

/// The main thread's side of receiving: fabric, announcements, jobs. The read handler
/// is always installed.
struct ReceiveMain {
    shared: Arc<Receiving>,
    /// Lengths of the announcements to come.
    lengths: std::vec::IntoIter<u32>,
    /// Where the present buffer begins, and the next: each has memory of its own.
    present: usize,
    next: usize,
    /// Where the peer writes next, and its room.
    at: usize,
    room: usize,
    source: &'static [u8],
    sent: usize,
    received: Vec<u8>,
    job: bool,
}

impl ReceiveMain {
    fn new(shared: Arc<Receiving>, lengths: &[u32], source: &'static [u8]) -> Self {
        let lengths = lengths.to_vec().into_iter();
        let (received, job) = (Vec::new(), false);
        let (present, next, at, room, sent) = (0, 0, 0, 0, 0);
        Self { shared, lengths, present, next, at, room, source, sent, received, job }
    }

    fn announce_if_full(&mut self) {
        let window = &self.shared.window;
        if !window.is_full() {
            return;
        }
        // As the transport asks: in this order, the reader coming in between.
        let consumed = window.is_consumed();
        if (consumed || window.is_other_free())
            && let Some(length) = self.lengths.next()
        {
            // What is not read any more is given back, whatever stood in it.
            let free = if consumed { self.next } else { self.present };
            window.announce(self.next as u64, length);
            self.shared.buffer.store(0, &vec![0xff; free]);
            (self.at, self.room) = (self.next, length as usize);
            self.present = self.next;
            self.next += self.room;
        }
    }

    fn mark_if_ready(&mut self, io: &mut IoThreads<Job>) {
        let unread = self.shared.window.unread();
        assert!(unread <= self.source.len() as u64);
        if unread > 0 && !self.job {
            self.job = true;
            io.give(Job::Read(2));
        }
    }

    /// The peer writes what it has and the window takes, a byte for each immediate;
    /// between them `update_state` is called, also while a job is reading.
    fn arrive(&mut self, io: &mut IoThreads<Job>) {
        self.announce_if_full();
        while self.room > 0 && self.sent < self.source.len() {
            self.shared.buffer.store(self.at, &self.source[self.sent..=self.sent]);
            self.at += 1;
            self.room -= 1;
            self.sent += 1;
            self.shared.window.arrived(1).expect("an honest immediate");
            self.mark_if_ready(io);
            self.announce_if_full();
        }
    }

    fn read(&mut self, bytes: &[u8], io: &mut IoThreads<Job>) {
        self.received.extend_from_slice(bytes);
        self.job = false;
        self.arrive(io);
        self.mark_if_ready(io);
    }

    fn is_over(&self) -> bool {
        self.received.len() == self.source.len() && !self.job
    }
}

#[test]
fn bytes_are_received_in_order_while_the_buffer_changes_hands() {
    model(|| {
        let shared = Arc::new(Receiving::new(5));
        let (queue, events) = channel();
        let mut io = IoThreads::start(2, {
            let shared = Arc::clone(&shared);
            move |job| {
                let Job::Read(length) = job else { unreachable!() };
                queue.send(Event::Read(shared.read(length))).unwrap();
            }
        });
        let mut main = ReceiveMain::new(shared, &[2, 1, 2], b"abcde");
        main.arrive(&mut io);
        while !main.is_over() {
            let Event::Read(bytes) = events.recv().unwrap() else { unreachable!() };
            main.read(&bytes, &mut io);
        }
        assert_eq!(main.received, main.source);
        io.stop();
    });
}

/// Whatever order a third party sees the two counters in, it is told no more than
/// there is.
#[test]
fn anybody_may_ask_how_much_is_unread() {
    model(|| {
        let window = Arc::new(ReceiveWindow::new());
        window.announce(0, 2);
        let reader = thread::spawn({
            let window = Arc::clone(&window);
            move || {
                let mut reader = window.reader().unwrap();
                if let Some((_, waiting)) = reader.readable() {
                    reader.consume(waiting);
                }
            }
        });
        let other = thread::spawn({
            let window = Arc::clone(&window);
            move || assert!(window.unread() <= 2)
        });
        window.arrived(1).unwrap();
        window.arrived(1).unwrap();
        reader.join().unwrap();
        other.join().unwrap();
    });
}

// --- Both ways ----------------------------------------------------------------

/// A reader and a writer at once on one connection, as 8.0 and 8.1 may have them.
#[test]
fn a_connection_sends_and_receives_at_once() {
    model(|| {
        let sending = Arc::new(Sending::new(4, 1));
        let receiving = Arc::new(Receiving::new(2));
        let (queue, events) = channel();
        let work = {
            let (sending, receiving) = (Arc::clone(&sending), Arc::clone(&receiving));
            move |job| {
                let event = match job {
                    Job::Write(from) => Event::Written(sending.write(&b"a"[from..], &queue)),
                    Job::Read(length) => Event::Read(receiving.read(length)),
                };
                queue.send(event).unwrap();
            }
        };
        let mut writer = IoThreads::start(1, work.clone());
        let mut reader = IoThreads::start(1, work);
        let mut output = SendMain {
            shared: sending,
            peer: Peer::new(&[1]),
            pace: Pace::Prompt,
            in_flight: Vec::new(),
            source: b"a",
            accepted: 0,
            handler: false,
            job: false,
        };
        let mut input = ReceiveMain::new(receiving, &[1, 1], b"cd");
        output.queue_job(&mut writer);
        output.peer.announce(&output.shared.queue);
        input.arrive(&mut reader);
        while !(output.is_over() && input.is_over()) {
            match events.recv().unwrap() {
                Event::Posted(request) => output.posted(request, &mut writer),
                Event::Written(count) => output.written(count, &mut writer),
                Event::Read(bytes) => input.read(&bytes, &mut reader),
                Event::Probe(_) => unreachable!(),
            }
        }
        assert_eq!(output.peer.received, output.source);
        assert_eq!(input.received, input.source);
        writer.stop();
        reader.stop();
    });
}

// --- Closing ------------------------------------------------------------------

/// One connection, as the table of connections and the server hold it.
struct Endpoint {
    stream: Stream<()>,
    buffer: Memory,
    staging: Memory,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.buffer.free();
        self.staging.free();
    }
}

/// What a read came to, with the bytes.
type Read = (ReadOutcome, Vec<u8>);

impl Endpoint {
    fn read(&self) -> Read {
        let mut bytes = Vec::new();
        let outcome = self.stream.read(2, |address, count| {
            bytes = self.buffer.load(address as usize, count);
        });
        (outcome, bytes)
    }

    /// The bytes first and the peer's state afterwards, which would be wrong.
    fn read_bytes_first(&self) -> Read {
        let mut reader = self.stream.inbound().reader().unwrap();
        if let Some((address, count)) = reader.readable() {
            let bytes = self.buffer.load(address as usize, count);
            reader.consume(count);
            return (ReadOutcome::Bytes(count), bytes);
        }
        match self.stream.peer_state() {
            PeerState::Connected => (ReadOutcome::Again, Vec::new()),
            _ => (ReadOutcome::End, Vec::new()),
        }
    }

    /// Writes one byte. `refused` says that nothing can be posted.
    fn write(&self, refused: bool) {
        let written = self.stream.write(1, &mut LastWord { staging: &self.staging, refused });
        assert_ne!(written, Written::Busy);
    }
}

/// A queue pair whose work requests need no completion, or one that takes none.
struct LastWord<'a> {
    staging: &'a Memory,
    refused: bool,
}

impl Transmit<()> for LastWord<'_> {
    type Staged = ();
    type Error = ();

    fn register(&mut self, _length: usize) -> Option<()> {
        None
    }

    fn copy(&mut self, _region: Option<&()>, chunk: Chunk) {
        self.staging.store(chunk.offset, b"w");
    }

    fn post(&mut self, (): (), _write: PayloadWrite) -> Result<(), PostError<()>> {
        if self.refused { Err(PostError::Failed(())) } else { Ok(()) }
    }
}

/// What the server calls us with. It frees it when it closes, and promises that no job
/// is under way then; a job relies on nothing else to keep its endpoint.
type Connection = UnsafeCell<Option<Arc<Endpoint>>>;

#[derive(Clone, Copy)]
enum Task {
    Read,
    Write,
}

enum Ended {
    Read(Read),
    Written,
}

/// The main thread's side of a connection that comes to its end. The read handler is
/// always installed.
struct Closing {
    connection: Arc<Connection>,
    /// The table's hold on the endpoint, which it lets go of when the server has closed.
    endpoint: Arc<Endpoint>,
    io: IoThreads<Task>,
    events: Receiver<Ended>,
    reading: bool,
    writing: bool,
    received: Vec<u8>,
}

impl Closing {
    fn begin(read: fn(&Endpoint) -> Read, refused: bool) -> Self {
        let endpoint = Arc::new(Endpoint {
            stream: Stream::new(2, 1, NONE),
            buffer: Memory::new(2),
            staging: Memory::new(1),
        });
        endpoint.stream.inbound().announce(0, 2);
        let window = Announcement { address: 0, length: 1, rkey: 0 };
        endpoint.stream.outbound().announce(window).unwrap();
        let connection = Arc::new(UnsafeCell::new(Some(Arc::clone(&endpoint))));
        let (queue, events) = channel();
        let io = IoThreads::start(2, {
            let connection = Arc::clone(&connection);
            move |task| {
                let ended = connection.with(|place| {
                    // SAFETY: loom checks that nobody takes it away meanwhile.
                    let endpoint = unsafe { (*place).as_ref() }.expect("not closed yet");
                    match task {
                        Task::Read => Ended::Read(read(endpoint)),
                        Task::Write => {
                            endpoint.write(refused);
                            Ended::Written
                        }
                    }
                });
                queue.send(ended).unwrap();
            }
        });
        let (reading, writing, received) = (false, false, Vec::new());
        Self { connection, endpoint, io, events, reading, writing, received }
    }

    fn queue_read(&mut self) {
        self.reading = true;
        self.io.give(Task::Read);
    }

    fn queue_write(&mut self) {
        self.writing = true;
        self.io.give(Task::Write);
    }

    fn mark_if_ready(&mut self) {
        if self.endpoint.stream.is_readable() && !self.reading {
            self.queue_read();
        }
    }

    /// The peer's next byte.
    fn arrive(&mut self, at: usize, byte: u8) {
        self.endpoint.buffer.store(at, &[byte]);
        self.endpoint.stream.inbound().arrived(1).unwrap();
        self.mark_if_ready();
    }

    fn lose(&mut self, state: PeerState) {
        self.endpoint.stream.escalate(state);
        self.mark_if_ready();
    }

    /// Until a read tells the server that the connection is over.
    fn run(&mut self) -> ReadOutcome {
        loop {
            match self.events.recv().unwrap() {
                Ended::Read((outcome, bytes)) => {
                    self.reading = false;
                    self.received.extend(bytes);
                    if matches!(outcome, ReadOutcome::End | ReadOutcome::Broken) {
                        return outcome;
                    }
                }
                Ended::Written => self.writing = false,
            }
            self.mark_if_ready();
        }
    }

    /// The server waits for the jobs that are under way, and closes.
    fn close(mut self) -> PeerState {
        while self.writing || self.reading {
            match self.events.recv().unwrap() {
                Ended::Read(_) => self.reading = false,
                Ended::Written => self.writing = false,
            }
        }
        self.give_back()
    }

    /// The connection goes, the table lets go, the memory is free again.
    fn give_back(self) -> PeerState {
        let state = self.endpoint.stream.peer_state();
        // SAFETY: loom checks that no job is under way.
        self.connection.with_mut(|place| drop(unsafe { (*place).take() }));
        let endpoint = Arc::try_unwrap(self.endpoint);
        assert!(endpoint.is_ok(), "nobody else keeps the memory");
        drop(endpoint);
        self.io.stop();
        state
    }
}

/// The peer writes two bytes and leaves, while the server reads for no reason.
fn leave(read: fn(&Endpoint) -> Read) {
    model(move || {
        let mut main = Closing::begin(read, false);
        main.queue_read();
        main.arrive(0, b'a');
        main.arrive(1, b'b');
        main.lose(PeerState::Disconnected);
        assert_eq!(main.run(), ReadOutcome::End);
        assert_eq!(main.received, b"ab", "sent before it left");
        main.close();
    });
}

#[test]
fn what_a_peer_sent_before_it_left_is_read_to_the_end() {
    leave(Endpoint::read);
}

#[test]
#[should_panic = "sent before it left"]
fn looking_at_the_bytes_before_the_peer_s_state_would_lose_the_last_ones() {
    leave(Endpoint::read_bytes_first);
}

#[test]
fn a_violation_ends_a_connection_that_reads_and_writes() {
    model(|| {
        let mut main = Closing::begin(Endpoint::read, false);
        main.queue_write();
        main.arrive(0, b'a');
        main.lose(PeerState::Failed);
        assert_eq!(main.run(), ReadOutcome::Broken);
        assert_eq!(main.close(), PeerState::Failed);
    });
}

#[test]
fn a_writer_that_can_post_nothing_ends_the_connection() {
    model(|| {
        let mut main = Closing::begin(Endpoint::read, true);
        main.queue_write();
        main.arrive(0, b'a');
        assert_eq!(main.run(), ReadOutcome::End);
        assert_eq!(main.received, b"a");
        assert_eq!(main.close(), PeerState::Disconnected);
    });
}

/// The poller and a writer find out at once; the server closes for the first reason it
/// hears of, and the worse one counts.
#[test]
fn a_violation_is_not_forgotten_when_a_writer_fails() {
    model(|| {
        let mut main = Closing::begin(Endpoint::read, true);
        main.queue_write();
        main.lose(PeerState::Failed);
        main.run();
        assert_eq!(main.close(), PeerState::Failed);
    });
}

#[test]
#[should_panic = "Causality violation"]
fn free_before_close_races_with_reader() {
    model(|| {
        let mut main = Closing::begin(Endpoint::read, false);
        main.arrive(0, b'a');
        main.lose(PeerState::Failed);
        main.give_back();
    });
}

#[test]
fn a_state_that_was_seen_gets_no_better() {
    model(|| {
        let state = Arc::new(SharedPeerState::default());
        let (poller, writer) = (Arc::clone(&state), Arc::clone(&state));
        let others = [
            thread::spawn(move || poller.escalate(PeerState::Failed)),
            thread::spawn(move || writer.escalate(PeerState::Disconnected)),
        ];
        let seen = [state.get(), state.get(), state.get()];
        assert!(seen.is_sorted(), "{seen:?}");
        for other in others {
            other.join().unwrap();
        }
        assert_eq!(state.get(), PeerState::Failed);
    });
}

// --- The promises of single types ----------------------------------------------

/// A peer that announces whenever it likes: what is accepted reaches the writer
/// once, whole, and not before the window before it was used to its last byte.
#[test]
fn early_announcements_neither_tear_nor_replace_the_one_in_use() {
    model(|| {
        let window = Arc::new(SendWindow::default());
        let buffer = |n: u32| Announcement { address: u64::from(n) << 32, length: n, rkey: n };
        let (poller, writer) = (Arc::clone(&window), Arc::clone(&window));
        let (accepted, mut taken) = at_once(
            move || {
                let offers = (1..=3).map(buffer);
                offers.filter(|offer| poller.announce(*offer).is_ok()).collect::<Vec<_>>()
            },
            move || {
                let mut taken = Vec::new();
                for _ in 0..3 {
                    if let Some(new) = writer.take() {
                        taken.push(new);
                        writer.publish_left(0);
                    }
                }
                taken
            },
        );
        taken.extend(window.take());
        assert_eq!(taken, accepted);
    });
}

/// A writer takes a window and uses a part of it, while the main thread looks.
fn while_a_window_is_taken(look: fn(&SendWindow) -> bool) {
    model(move || {
        let window = Arc::new(SendWindow::default());
        window.announce(Announcement { address: 0, length: 2, rkey: 0 }).unwrap();
        let poller = Arc::clone(&window);
        let (_, seen) = at_once(
            move || {
                window.take().unwrap();
                window.publish_left(1);
            },
            move || look(&poller),
        );
        assert!(seen);
    });
}

#[test]
fn an_announcement_is_refused_while_a_byte_is_left() {
    while_a_window_is_taken(|window| window.announce(Announcement::default()).is_err());
}

#[test]
fn there_is_room_all_the_time_while_a_window_is_taken() {
    while_a_window_is_taken(SendWindow::has_room);
}

/// The number of a work request that was not posted gives nothing back, and that of
/// one that was gives back what it used, also if nothing but the ledger says so.
#[test]
fn a_work_request_is_retired_with_what_it_used_or_not_at_all() {
    model(|| {
        let ledger = Arc::new(SendLedger::new(4, 2, ()));
        let (writer, poller) = (Arc::clone(&ledger), Arc::clone(&ledger));
        let (_, retired) = at_once(
            move || {
                let mut writer = writer.writer().unwrap();
                writer.enter(1);
                writer.enter(1);
                // The send queue refuses the second one.
                writer.take_back(1);
            },
            move || poller.retire(1),
        );
        assert_eq!(ledger.writer().unwrap().free(), if retired { 2 } else { 1 });
        assert_eq!(ledger.is_idle(), retired);
    });
}

/// Two who both believe that it is their turn.
#[test]
fn of_two_writers_one_comes_back_later() {
    model(|| {
        let ledger = Arc::new(SendLedger::new(4, 4, 0));
        let write = |ledger: &SendLedger<usize>| {
            ledger.writer().is_some_and(|mut writer| {
                writer.enter(1);
                *writer += 1;
                true
            })
        };
        let other = thread::spawn({
            let ledger = Arc::clone(&ledger);
            move || write(&ledger)
        });
        let mine = write(&ledger);
        let wrote = usize::from(other.join().unwrap()) + usize::from(mine);
        assert!(wrote > 0);
        assert_eq!(*ledger.writer().unwrap(), wrote);
        assert_eq!(ledger.total_posted(), wrote as u64);
    });
}

/// Two who both believe that it is their turn, at the end of a buffer: each byte is read once,
/// and in order.
#[test]
fn of_two_readers_one_comes_back_later() {
    model(|| {
        let shared = Arc::new(Receiving::new(2));
        shared.buffer.store(0, b"ab");
        for at in 0..2 {
            shared.window.announce(at, 1);
            shared.window.arrived(1).unwrap();
        }
        let (first, second) = (Arc::clone(&shared), Arc::clone(&shared));
        let (first, second) = at_once(move || first.read(1), move || second.read(1));
        let mut bytes = [first, second].concat();
        assert!(!bytes.is_empty());
        bytes.sort_unstable();
        bytes.extend(shared.read(1));
        assert_eq!(bytes, b"ab");
    });
}

/// A region of larger staging memory, which nobody may touch any more once it is dropped.
struct Region(Arc<Memory>);

impl Drop for Region {
    fn drop(&mut self) {
        self.0.free();
    }
}

/// A queue whose larger staging memory holds `b`, delivered, and what writes to it.
struct Shrinking {
    queue: SendQueue<Region>,
    /// The small staging memory, and the region.
    memory: [Arc<Memory>; 2],
}

/// One write to either memory.
struct ToEither<'a> {
    memory: &'a [Arc<Memory>; 2],
    byte: u8,
    /// Which of the two it is in, and where.
    staged: Option<(usize, usize)>,
}

impl Transmit<Region> for ToEither<'_> {
    type Staged = (usize, usize);
    type Error = ();

    fn register(&mut self, _length: usize) -> Option<Region> {
        Some(Region(Arc::clone(&self.memory[1])))
    }

    fn copy(&mut self, region: Option<&Region>, chunk: Chunk) -> (usize, usize) {
        let which = usize::from(region.is_some());
        self.memory[which].store(chunk.offset, &[self.byte]);
        (which, chunk.offset)
    }

    fn post(&mut self, staged: (usize, usize), _: PayloadWrite) -> Result<(), PostError<()>> {
        self.staged = Some(staged);
        Ok(())
    }
}

impl Shrinking {
    fn new() -> Self {
        let memory = [1, 2].map(|length| Arc::new(Memory::new(length)));
        let shrinking = Self { queue: SendQueue::new(4, 1, [2, 2, 2]), memory };
        // The first byte fills the small memory, so that the second gets the region.
        shrinking.queue.announce(Announcement { address: 0, length: 3, rkey: 0 }).unwrap();
        assert_eq!(shrinking.write(b'a'), Some((0, 0)));
        assert_eq!(shrinking.write(b'b'), Some((1, 0)));
        assert!(shrinking.queue.retire(2));
        shrinking
    }

    fn write(&self, byte: u8) -> Option<(usize, usize)> {
        let mut port = ToEither { memory: &self.memory, byte, staged: None };
        let Sent { bytes, .. } = self.queue.write(1, &mut port)?;
        assert_eq!(bytes, 1);
        port.staged
    }
}

/// The main thread gives staging memory back while an I/O thread may begin to write.
fn shrink(release: fn(&SendQueue<Region>)) {
    model(move || {
        let shared = Arc::new(Shrinking::new());
        let (queue, written) = channel();
        let io = thread::spawn({
            let shared = Arc::clone(&shared);
            move || queue.send(shared.write(b'c')).unwrap()
        });
        release(&shared.queue);
        if let Some((which, offset)) = written.recv().unwrap() {
            assert_eq!(shared.memory[which].load(offset, 1), b"c", "freed while in flight");
            assert!(shared.queue.retire(3));
        }
        assert!(shared.queue.is_idle());
        io.join().unwrap();
    });
}

#[test]
fn staging_memory_is_freed_only_while_nothing_is_in_flight() {
    shrink(SendQueue::release_staging);
}

#[test]
#[should_panic = "freed while in flight"]
fn asking_before_taking_the_right_to_write_would_free_memory_in_flight() {
    shrink(|queue| {
        if queue.is_idle()
            && let Some(mut writer) = queue.ledger.writer()
        {
            writer.staging.clear();
            writer.install(1);
        }
    });
}

/// The main thread posts a probe, whose completion stands for all work requests
/// before it, while an I/O thread may be between entering one and posting it.
fn probe(probe: fn(&SendQueue<()>, &mut dyn FnMut(u32))) {
    model(move || {
        let shared = Arc::new(Sending::new(4, 2));
        shared.queue.announce(Announcement { address: 0, length: 2, rkey: 0 }).unwrap();
        let (queue, requests) = channel();
        let io = thread::spawn({
            let (shared, queue) = (Arc::clone(&shared), queue.clone());
            move || {
                let count = shared.write(b"a", &queue);
                queue.send(Event::Written(count)).unwrap();
            }
        });
        probe(&shared.queue, &mut |next| queue.send(Event::Probe(next)).unwrap());
        queue.send(Event::Written(0)).unwrap();
        let (mut before, mut over) = (0, 0);
        while over < 2 {
            match requests.recv().unwrap() {
                Event::Probe(next) => assert_eq!(next, before, "the probe overtook a work request"),
                Event::Posted(_) => before += 1,
                Event::Written(_) => over += 1,
                Event::Read(_) => unreachable!(),
            }
        }
        io.join().unwrap();
    });
}

#[test]
fn a_probe_stands_for_all_that_is_posted_before_it() {
    probe(|queue, post| {
        queue.probe(post);
    });
}

#[test]
#[should_panic = "the probe overtook a work request"]
fn a_probe_that_does_not_hold_the_right_to_write_overtakes() {
    probe(|queue, post| {
        let next = queue.ledger.writer().map(|writer| writer.next_sequence());
        if let Some(next) = next {
            post(next);
        }
    });
}
