// SPDX-License-Identifier: BSD-3-Clause
//! One connection: how it comes about, what completes on it, and its bytes.

use crate::memory::Work;
use crate::memory::{CONTROL_SLOTS, Objects, PAYLOAD_DEPTH, RECEIVES, SEND_DEPTH, STAGING, Sender};
use crate::{Error, wait};
use proto::send_queue::{PostError, Shortage};
use proto::session::{Lost, Session, Timing};
use proto::staging::STEPS;
use proto::stream::{ReadOutcome, Stream, Written};
use proto::window::PeerState;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbs::cm::{EventChannel, EventKind, Id};
use verbs::cq::{Batch, Completion, CompletionChannel, CompletionQueue, Outcome};
use verbs::library;
use verbs::mr::{ProtectionDomain, Region};
use verbs::qp::QueuePair;

/// Receive buffers are at most so large: the protocol counts their bytes in 32 bits.
const LARGEST_WINDOW: u32 = 1 << 30;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the receive buffer: what the server may send before any of it is read. Rounded
    /// up to whole pages; it is registered, and so resident. A second one of this size is used
    /// while the server sends much.
    pub window: u32,
    /// The local address to connect from, which also chooses the device.
    pub source: Option<IpAddr>,
    /// How long connecting may take, and each read and write after it that finds nothing to do.
    pub timeout: Duration,
}

/// 1 MiB, any device, 5 seconds.
impl Default for Options {
    fn default() -> Self {
        Self { window: 1 << 20, source: None, timeout: Duration::from_secs(5) }
    }
}

/// A connection to a server. Used by one thread at a time, any thread.
///
/// Dropping it ends it: what was written and is not acknowledged yet may be lost, see
/// [`close`](Self::close).
#[derive(Debug)]
pub struct Connection {
    // In the order in which they may be destroyed: the queue pair is the first in `objects`.
    objects: Objects,
    stream: Stream<Region>,
    session: Session<Region>,
    queue: Arc<CompletionQueue>,
    channel: Arc<CompletionChannel>,
    id: Arc<Id>,
    events: Arc<EventChannel>,
    batch: Batch,
    /// Why it is over, unless the server just closed it.
    lost: Option<String>,
    violation: Option<proto::session::Violation>,
    timeout: Option<Duration>,
    began: Instant,
}

impl Connection {
    /// Connects to the first of the address's that answers: a socket address, or text such as
    /// `cache.example:6379`. Returns when commands can be written.
    ///
    /// # Errors
    /// That of the last address: see [`Error`].
    pub fn open(address: impl ToSocketAddrs + Clone, options: &Options) -> Result<Self, Error> {
        library::load().map_err(Error::Library)?;
        let unknown = |error| Error::Address(String::from("the address"), error);
        let addresses = address.to_socket_addrs().map_err(unknown)?;
        let mut last = unknown(io::ErrorKind::NotFound.into());
        for address in addresses {
            match Self::open_one(address, options) {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn open_one(address: SocketAddr, options: &Options) -> Result<Self, Error> {
        let began = Instant::now();
        let deadline = began + options.timeout;
        let events = Arc::new(EventChannel::new()?);
        let id = Arc::new(Id::new(&events)?);
        let expect = |kind| expect(&events, kind, address, deadline);
        let milliseconds = i32::try_from(options.timeout.as_millis()).unwrap_or(i32::MAX);
        let source = options.source.map(|ip| SocketAddr::new(ip, 0));
        id.resolve_address(source, address, milliseconds)?;
        expect(EventKind::AddressResolved)?;
        id.resolve_route(milliseconds)?;
        expect(EventKind::RouteResolved)?;

        let no_device = Error::NotConnected(address, EventKind::Failed, -libc::ENODEV);
        let device = id.device().ok_or(no_device)?;
        let domain = Arc::new(ProtectionDomain::new(&device)?);
        let channel = Arc::new(CompletionChannel::new(&device)?);
        let receives = u32::from(RECEIVES);
        let queue = Arc::new(CompletionQueue::new(&channel, SEND_DEPTH + receives, 0, 0)?);
        let queue_pair = QueuePair::new(&id, &domain, &queue, SEND_DEPTH, receives)?;
        let window = options.window.clamp(1, LARGEST_WINDOW);
        let (objects, buffer) = Objects::new(queue_pair, domain, window)?;
        let largest = buffer.length() as u32;
        // Nobody asks this session for what is due: whoever waits has a time-out.
        let never = u64::MAX / 2;
        let timing = Timing {
            handshake: never,
            keepalive: never,
            answer: never,
            linger: never,
            delivery: never,
        };
        let mut session = Session::new(timing, buffer, largest..=largest, CONTROL_SLOTS, 0);
        session.post_receives(&mut &objects, RECEIVES).map_err(|error| match error {
            PostError::Full => verbs::Error { action: "post a receive", errno: libc::ENOMEM },
            PostError::Failed(error) => error,
        })?;
        id.connect()?;
        expect(EventKind::Established)?;

        let mut connection = Self {
            objects,
            stream: Stream::new(PAYLOAD_DEPTH, STAGING, STEPS),
            session,
            queue,
            channel,
            id,
            events,
            batch: Batch::default(),
            lost: None,
            violation: None,
            timeout: Some(options.timeout),
            began,
        };
        let now = connection.now();
        connection.session.establish(&connection.stream, &mut &connection.objects, now)?;
        while !connection.session.is_open() {
            connection.wait(Some(deadline), "the server's window")?;
        }
        Ok(connection)
    }

    /// How long reads and writes wait from now on; none waits for as long as it takes.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The server's address.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        self.id.peer_address()
    }

    /// This side's address.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.id.local_address()
    }

    /// The name of the RDMA device that carries the connection.
    pub fn device(&self) -> String {
        self.id.device().map_or_else(String::new, |device| device.name())
    }

    /// Readable when there may be something to do: then call [`progress`](Self::progress),
    /// or try again what would have had to wait. Call it once, too, before waiting for them the
    /// first time.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.channel.fd(), self.events.fd()]
    }

    /// Handles whatever has completed, and has [`descriptors`](Self::descriptors) tell of the
    /// next. Never waits. An end of the connection is told by the next read or write.
    ///
    /// # Errors
    /// If the device fails.
    pub fn progress(&mut self) -> Result<(), Error> {
        self.advance().map(drop)
    }

    /// The same; returns how many completions and events there were.
    fn advance(&mut self) -> Result<usize, Error> {
        self.channel.take_event()?;
        self.queue.arm()?;
        let mut count = self.take_completions()?;
        let mut gone = false;
        while let Some(event) = self.events.next()? {
            count += 1;
            gone |= matches!(
                event.kind,
                EventKind::Disconnected | EventKind::DeviceRemoval | EventKind::TimewaitExit
            );
        }
        if gone {
            // What the server sent before it closed has completed by now.
            count += self.take_completions()?;
            self.stream.escalate(PeerState::Disconnected);
        }
        Ok(count)
    }

    /// Reads what has arrived, at most as much as fits; 0 if the server has closed and
    /// everything was read, or `to` is empty.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived, else that of an [`Error`].
    pub fn try_read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        self.take_completions()?;
        match self.read_arrived(to) {
            ReadOutcome::Again => {
                self.progress()?;
                self.outcome(to)
            }
            outcome => self.told(outcome),
        }
    }

    fn outcome(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let outcome = self.read_arrived(to);
        self.told(outcome)
    }

    fn told(&mut self, outcome: ReadOutcome) -> io::Result<usize> {
        match outcome {
            ReadOutcome::Bytes(count) => {
                let now = self.now();
                let announced =
                    self.session.announce_if_full(&self.stream, &mut &self.objects, now);
                // The bytes count; the next call finds what else there is.
                if let Err(error) = announced {
                    self.lose(error.to_string());
                }
                Ok(count)
            }
            ReadOutcome::Again => Err(io::ErrorKind::WouldBlock.into()),
            ReadOutcome::End | ReadOutcome::Broken => match self.end() {
                Error::Closed => Ok(0),
                error => Err(error.into()),
            },
        }
    }

    fn read_arrived(&self, to: &mut [u8]) -> ReadOutcome {
        self.stream.read(to.len(), |address, count| {
            // SAFETY: the window says that these bytes of a receive buffer arrived and were not
            // read. Until they are, it is neither freed nor announced. `to` has room for them.
            unsafe {
                let from = ptr::with_exposed_provenance(address as usize);
                ptr::copy_nonoverlapping(from, to.as_mut_ptr(), count);
            }
        })
    }

    /// Writes as much of `pieces` as there is room for, in order, and returns how many bytes
    /// that is. They are copied: the pieces are free again.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, else that of an [`Error`].
    pub fn try_write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.write_now(pieces)? {
            0 if pieces.iter().any(|piece| !piece.is_empty()) => {
                self.progress()?;
                match self.write_now(pieces)? {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    count => Ok(count),
                }
            }
            count => Ok(count),
        }
    }

    fn write_now(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, Error> {
        self.take_completions()?;
        let total = pieces.iter().fold(0_usize, |sum, piece| sum.saturating_add(piece.len()));
        let mut sender = Sender { objects: &self.objects, pieces, within: 0 };
        match self.stream.write(total, &mut sender) {
            Written::Posted(0, Some(Shortage::Failed(error))) => {
                self.lose(error.to_string());
                Err(self.end())
            }
            Written::Posted(count, _) => Ok(count),
            Written::Busy => Ok(0),
            Written::Discarded | Written::Broken => Err(self.end()),
        }
    }

    /// Waits until everything that was written has arrived at the server's device, and ends
    /// the connection.
    ///
    /// # Errors
    /// If that takes longer than the time-out, or the connection ends before.
    pub fn close(mut self) -> Result<(), Error> {
        let deadline = self.deadline();
        // The last writes may have asked for no completion; a probe behind them does.
        if !self.stream.outbound().is_idle() {
            let at = self.stream.outbound().announced();
            let mut port = &self.objects;
            let posted = self
                .stream
                .outbound()
                .probe(|next| proto::session::Port::post_probe(&mut port, next, at));
            if let Some(Err(PostError::Failed(error))) = posted {
                return Err(error.into());
            }
        }
        while !self.stream.outbound().is_idle() {
            if self.stream.peer_state() != PeerState::Connected {
                return Err(self.end());
            }
            self.wait(deadline, "what was written to arrive")?;
        }
        self.id.disconnect();
        Ok(())
    }

    /// Waits until something has happened, and handles it.
    fn wait(&mut self, deadline: Option<Instant>, what: &'static str) -> Result<(), Error> {
        // The queue is armed by it: what completes from here on makes the descriptor readable.
        let count = self.advance()?;
        if self.stream.peer_state() != PeerState::Connected {
            return Err(self.end());
        }
        if count > 0 {
            return Ok(());
        }
        match wait::readable(&self.descriptors(), deadline)? {
            true => self.progress(),
            false => Err(Error::TimedOut(what)),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.timeout.map(|timeout| Instant::now() + timeout)
    }

    /// Milliseconds since it began.
    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Handles all completions there are, and returns how many.
    fn take_completions(&mut self) -> Result<usize, Error> {
        let mut count = 0;
        loop {
            self.queue.poll(&mut self.batch)?;
            let batch: Vec<Completion> = self.batch.iter().collect();
            if batch.is_empty() {
                return Ok(count);
            }
            count += batch.len();
            batch.into_iter().for_each(|completion| self.complete(completion));
        }
    }

    fn complete(&mut self, completion: Completion) {
        let now = self.now();
        let (session, stream) = (&mut self.session, &self.stream);
        let mut port = &self.objects;
        let done = match (completion.outcome, Work::of(completion.wr_id)) {
            (Outcome::Immediate(count), Work::Receive(slot)) => {
                session.on_immediate(stream, &mut port, slot, count, now)
            }
            (Outcome::Received(length), Work::Receive(slot)) => {
                let message = self.objects.received(slot);
                let length = (length as usize).min(message.len());
                session.on_message(stream, &mut port, slot, &message[..length], now).map(drop)
            }
            (Outcome::Sent, Work::Control(slot)) => {
                session.on_message_sent(stream, &mut port, slot, now).map_err(Lost::PostFailed)
            }
            (Outcome::Sent, Work::Payload(number)) => session
                .on_payload_sent(stream, &mut port, number, now)
                .map(drop)
                .map_err(Lost::PostFailed),
            (Outcome::Sent, Work::Probe(next)) => session
                .on_probe_sent(stream, &mut port, next, now)
                .map(drop)
                .map_err(Lost::PostFailed),
            (Outcome::Failed(status), _) => {
                // Flushed work requests say nothing of the reason; a close has none.
                if !status.is_flush() {
                    self.lose(status.text());
                }
                self.stream.escalate(PeerState::Disconnected);
                return;
            }
            (Outcome::Unexpected(code), _) => {
                Err(Lost::Violation(proto::session::Violation::Operation(code)))
            }
            (Outcome::Immediate(_) | Outcome::Received(_) | Outcome::Sent, _) => Ok(()),
        };
        match done {
            Ok(()) => {}
            Err(Lost::Violation(violation)) => {
                self.violation.get_or_insert(violation);
                self.stream.escalate(PeerState::Failed);
            }
            Err(Lost::PostFailed(error)) => self.lose(error.to_string()),
        }
    }

    fn lose(&mut self, why: String) {
        self.lost.get_or_insert(why);
        self.stream.escalate(PeerState::Disconnected);
    }

    /// Why it is over, which it is.
    fn end(&self) -> Error {
        match (self.violation, &self.lost) {
            (Some(violation), _) => Error::Violation(violation),
            (None, Some(why)) => Error::Lost(why.clone()),
            (None, None) => Error::Closed,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.id.disconnect();
    }
}

/// Waits for what has arrived. `Ok(0)` is the end, as a socket's.
impl Read for Connection {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let deadline = self.deadline();
        loop {
            match self.try_read(to) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.wait(deadline, "data from the server") {
                        // The next read tells of it, after all that came before.
                        Ok(()) | Err(Error::Closed | Error::Lost(_) | Error::Violation(_)) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                outcome => return outcome,
            }
        }
    }
}

/// Waits for room. What was written is on its way at once: flushing does nothing.
impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let deadline = self.deadline();
        loop {
            match self.try_write(pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(deadline, "room in the server's window")?;
                }
                outcome => return outcome,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for the next event of connecting.
fn expect(
    events: &EventChannel,
    kind: EventKind,
    address: SocketAddr,
    deadline: Instant,
) -> Result<(), Error> {
    loop {
        match events.next()? {
            Some(event) if event.kind == kind => return Ok(()),
            Some(event) => return Err(Error::NotConnected(address, event.kind, event.status)),
            None => {
                if !wait::readable(&[events.fd()], Some(deadline))? {
                    return Err(Error::TimedOut("the server to take the connection"));
                }
            }
        }
    }
}
