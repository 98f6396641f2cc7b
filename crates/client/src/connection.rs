// SPDX-License-Identifier: BSD-3-Clause
//! One connection: how it comes about, what completes on it, and its bytes.

use crate::connecting::Connecting;
use crate::memory::{
    CONTROL_SLOTS, Objects, PAYLOAD_DEPTH, RECEIVES, SEND_DEPTH, STAGING, Sender, Work,
};
use crate::{Error, wait};
use proto::send_queue::{PostError, Shortage};
use proto::session::{Lost, Reader, Session, TimeoutAction, Timing};
use proto::staging::STEPS;
use proto::stream::{ReadOutcome, Stream, Written};
use proto::window::PeerState;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{mem, ptr, slice};
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
    /// After so long without a sign of the server [`tick`](Connection::tick) asks its device for
    /// one, and gives the connection up if none comes for four times as long.
    pub keepalive: Duration,
}

/// 1 MiB, any device, 5 seconds to wait and 15 of silence.
impl Default for Options {
    fn default() -> Self {
        Self {
            window: 1 << 20,
            source: None,
            timeout: Duration::from_secs(5),
            keepalive: Duration::from_secs(15),
        }
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
    /// The queue tells of its next completion.
    armed: bool,
    /// It is being closed.
    closing: bool,
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
        let mut connecting = Connecting::begin(address, options)?;
        loop {
            if let Some(connection) = connecting.progress()? {
                return Ok(connection);
            }
            let descriptors: Vec<RawFd> = connecting.descriptors().collect();
            if !wait::readable(&descriptors, Some(connecting.deadline()))? {
                return Err(Error::TimedOut(connecting.awaited()));
            }
        }
    }

    /// Asks the server of `id`, which has a route to it, for a connection.
    pub(crate) fn ask(
        id: Arc<Id>,
        events: Arc<EventChannel>,
        address: SocketAddr,
        options: &Options,
    ) -> Result<Self, Error> {
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
        // Whoever connects and closes has a time-out of its own.
        let never = u64::MAX / 4;
        let keepalive = options.keepalive.as_millis() as u64;
        let answer = keepalive.saturating_mul(4).min(never);
        let timing = Timing { handshake: never, keepalive, answer, linger: 0, delivery: never };
        let mut session = Session::new(timing, buffer, largest..=largest, CONTROL_SLOTS, 0);
        session.post_receives(&mut &objects, RECEIVES).map_err(|error| match error {
            PostError::Full => verbs::Error { action: "post a receive", errno: libc::ENOMEM },
            PostError::Failed(error) => error,
        })?;
        id.connect()?;
        Ok(Self {
            objects,
            stream: Stream::new(PAYLOAD_DEPTH, STAGING, STEPS),
            session,
            queue,
            channel,
            id,
            events,
            batch: Batch::default(),
            armed: false,
            closing: false,
            lost: None,
            violation: None,
            timeout: Some(options.timeout),
            began: Instant::now(),
        })
    }

    /// The server has taken the connection: announces the first window.
    pub(crate) fn establish(&mut self) -> Result<(), Error> {
        let now = self.now();
        self.session.establish(&self.stream, &mut &self.objects, now)?;
        Ok(())
    }

    /// Whether the server has announced its window too, so that commands can be written.
    pub(crate) fn is_open(&mut self) -> Result<bool, Error> {
        self.progress()?;
        match self.stream.peer_state() {
            PeerState::Connected => Ok(self.session.is_open()),
            _ => Err(self.end()),
        }
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

    /// Whether the server is there, as far as is known. What it sent before it went can be read.
    pub fn is_connected(&self) -> bool {
        self.stream.peer_state() == PeerState::Connected
    }

    /// Readable when there may be something to do: then call [`progress`](Self::progress), and
    /// try again what would have had to wait. Call it once, too, before waiting for them the
    /// first time. The first tells of completions and of nothing else
    /// ([`complete`](Self::complete)). They tell of each thing once, so that they can be watched
    /// by edges.
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

    /// The half of [`progress`](Self::progress) that the first descriptor tells of: a system
    /// call where the whole takes two.
    ///
    /// # Errors
    /// If the device fails.
    pub fn complete(&mut self) -> Result<(), Error> {
        self.take_notified().map(drop)
    }

    /// To be called about once a second by who waits in an event loop of its own: asks a server
    /// that is silent for a sign of life, and gives memory back that an idle connection has no
    /// use for. An end of the connection is told by the next read or write.
    pub fn tick(&mut self) {
        // What waits is taken first, so that no answer is overlooked.
        if let Err(error) = self.take_completions() {
            self.lose(error.to_string());
        }
        if self.closing || !self.is_connected() {
            return;
        }
        let now = self.now();
        let (session, stream, mut port) = (&mut self.session, &self.stream, &self.objects);
        let ticked = session
            .on_housekeeping_tick(stream, &mut port, now)
            .and_then(|()| session.handle_timeout(stream, &mut port, true, now));
        match ticked {
            Ok(TimeoutAction::NoReply) => self.lose(String::from("the server does not answer")),
            Ok(_) => {}
            Err(error) => self.lose(error.to_string()),
        }
    }

    /// Both halves; returns how many completions and events there were.
    fn advance(&mut self) -> Result<usize, Error> {
        let mut count = self.take_notified()?;
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

    /// Takes the notification and the completions that there are, and has the queue tell of the
    /// next.
    fn take_notified(&mut self) -> Result<usize, Error> {
        self.armed &= self.channel.take_event()?.is_none();
        if !self.armed {
            self.queue.arm()?;
            self.armed = true;
        }
        self.take_completions()
    }

    /// Makes sure that the descriptors tell of what comes from here on. A queue that was armed
    /// and has not told yet will; else there may be more to be seen now, and the answer is `true`.
    fn rearm(&mut self) -> Result<bool, Error> {
        let sleeps = !self.armed;
        if sleeps {
            self.take_notified()?;
        }
        Ok(sleeps)
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
        let arrived = self.try_fill_buf()?;
        let count = arrived.len().min(to.len());
        to[..count].copy_from_slice(&arrived[..count]);
        self.consume(count);
        Ok(count)
    }

    /// What has arrived and was not [consumed](BufRead::consume), where the server wrote it;
    /// empty if the server has closed and everything was consumed. There may be more behind it.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived, else that of an [`Error`].
    pub fn try_fill_buf(&mut self) -> io::Result<&[u8]> {
        self.take_completions()?;
        let mut arrived = self.arrived();
        if arrived == Err(ReadOutcome::Again) && self.rearm()? {
            arrived = self.arrived();
        }
        match arrived {
            // SAFETY: the window says that these bytes of a receive buffer arrived and were not
            // read. Until they are, which takes `&mut self`, it is neither freed nor announced.
            Ok((address, count)) => Ok(unsafe {
                slice::from_raw_parts(ptr::with_exposed_provenance(address as usize), count)
            }),
            Err(ReadOutcome::Again) => Err(io::ErrorKind::WouldBlock.into()),
            Err(_) => match self.end() {
                Error::Closed => Ok(&[]),
                error => Err(error.into()),
            },
        }
    }

    /// Address and number of the bytes that can be read at this moment.
    fn arrived(&self) -> Result<(u64, usize), ReadOutcome> {
        let mut arrived = None;
        let outcome = self.stream.take(|address, waiting| {
            arrived = Some((address, waiting));
            0
        });
        arrived.ok_or(outcome)
    }

    /// Writes as much of `pieces` as there is room for, in order, and returns how many bytes
    /// that is. They are copied: the pieces are free again.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room, else that of an [`Error`].
    pub fn try_write(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.write_now(pieces)? {
            0 if pieces.iter().any(|piece| !piece.is_empty()) => {
                let again = if self.rearm()? { self.write_now(pieces)? } else { 0 };
                if again == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(again) }
            }
            count => Ok(count),
        }
    }

    /// Has `fill` put bytes into registered memory, from where they are sent: it is given a
    /// piece of at most `most` bytes and says how many it put there. If there is no room at this
    /// moment `fill` is not called, and the answer is none.
    ///
    /// # Errors
    /// The connection's. What `fill` answers is handed through.
    pub fn try_fill(
        &mut self,
        most: usize,
        mut fill: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Option<io::Result<usize>>, Error> {
        self.take_completions()?;
        match self.fill_now(most, &mut fill)? {
            None if self.rearm()? => self.fill_now(most, &mut fill),
            filled => Ok(filled),
        }
    }

    fn fill_now(
        &mut self,
        most: usize,
        fill: &mut impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Option<io::Result<usize>>, Error> {
        let mut filled = None;
        let mut sender = Sender { objects: &self.objects, pieces: &[], within: 0 };
        let written = self.stream.fill(most, &mut sender, |sender, region, chunk| {
            let (staged, outcome) = sender.fill(region, chunk, fill);
            let count = *outcome.as_ref().unwrap_or(&0);
            filled = Some(outcome);
            (staged, count)
        });
        match written {
            Written::Posted(0, Some(Shortage::Failed(error))) => {
                self.lose(error.to_string());
                Err(self.end())
            }
            // Filled, and not posted for want of room: there is no way to give the bytes back.
            Written::Posted(0, Some(Shortage::Staging)) if filled.is_some() => {
                self.lose(String::from("the send queue has no room for what was to fit"));
                Err(self.end())
            }
            Written::Posted(..) | Written::Busy => Ok(filled),
            Written::Discarded | Written::Broken => Err(self.end()),
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
        while !self.try_close()? {
            self.wait(deadline, "what was written to arrive")?;
        }
        Ok(())
    }

    /// Ends the connection if everything that was written is known to have arrived at the
    /// server's device; else asks for that, and answers `false`. Nothing may be written from the
    /// first call on.
    ///
    /// # Errors
    /// If the connection ends before.
    pub fn try_close(&mut self) -> Result<bool, Error> {
        self.progress()?;
        if !self.is_connected() {
            return Err(self.end());
        }
        let now = self.now();
        if !mem::replace(&mut self.closing, true) {
            self.session.close(now, Reader::Server, now);
        }
        // The last writes may have asked for no completion; a probe behind them does.
        let mut port = &self.objects;
        match self.session.handle_timeout(&self.stream, &mut port, true, now)? {
            TimeoutAction::End => {
                self.id.disconnect();
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Waits until something has happened, and handles it.
    fn wait(&mut self, deadline: Option<Instant>, what: &'static str) -> Result<(), Error> {
        // The queue is armed by it: what completes from here on makes the descriptor readable.
        let count = self.advance()?;
        if !self.is_connected() {
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

    fn wait_for_data(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        match self.wait(deadline, "data from the server") {
            // The next read tells of it, after all that came before.
            Err(Error::Closed | Error::Lost(_) | Error::Violation(_)) => Ok(()),
            outcome => outcome,
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
            batch.into_iter().for_each(|completion| self.on_completion(completion));
        }
    }

    fn on_completion(&mut self, completion: Completion) {
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
                    self.wait_for_data(deadline)?;
                }
                outcome => return outcome,
            }
        }
    }
}

/// The bytes where the server wrote them, without a copy.
impl BufRead for Connection {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let deadline = self.deadline();
        loop {
            match self.try_fill_buf().map(drop) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for_data(deadline)?;
                }
                Ok(()) => return self.try_fill_buf(),
                Err(error) => return Err(error),
            }
        }
    }

    fn consume(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        self.stream.take(|_, _| count);
        let now = self.now();
        let announced = self.session.announce_if_full(&self.stream, &mut &self.objects, now);
        // The bytes count; the next call finds what else there is.
        if let Err(error) = announced {
            self.lose(error.to_string());
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
