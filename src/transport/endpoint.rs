// SPDX-License-Identifier: BSD-3-Clause
//! One RDMA connection: its queue pair, its memory, its windows.
//!
//! An endpoint outlives the server's `connection` on both sides: it exists while
//! the handshake is going on, and it lingers while the last bytes are delivered.
//! [`Endpoint::read`] and [`Endpoint::write`] may be called on any thread, one of
//! each at a time; everything else is the main thread's.
//!
//! Memory of an endpoint: one *control* region (receive slots, slots for our own
//! control messages, a little staging memory), one *receive* region that the peer
//! may write to, which grows and shrinks with the traffic, and, once a write asks for
//! it, a larger *staging* region. Each endpoint has a protection domain of its own, so
//! that no peer can use a key of another's.

use super::hub::Hub;
use super::key::{Key, Work};
use super::status::{Activity, Shortage};
use super::watchdog::Watch;
use super::{clock, growth};
use crate::host::main_cell::is_main_thread;
use crate::host::{Connection, MainCell};
use crate::metrics::{Counter, METRICS};
use crate::session::{Millis, Session, Timing};
use crate::verbs::Error;
use crate::verbs::cm::{Device, Id, IdKey};
use crate::verbs::memory::{self, Access, ProtectionDomain, Region};
use crate::verbs::pair::{QueuePair, Slice, Target};
pub use crate::window::Fate;
use crate::window::{Announcement, ReceiveWindow, SendLedger, SendWindow, SharedFate, Writer};
use crate::wire::{MESSAGE_LEN, Memory, Message};
use std::net::SocketAddr;
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Receives that a peer finds posted: each of its writes and messages uses one
/// until the next pass. A peer that is ahead waits, by RNR, for 0.64 ms.
const RECEIVE_SLOTS: u16 = 64;
/// Control messages of ours that may be in flight.
const CONTROL_SLOTS: u16 = 8;
/// Payload work requests that may be in flight.
const PAYLOAD_DEPTH: usize = 32;
/// Probes that may be in flight, with one to spare.
const PROBES: u32 = 2;

const SEND_DEPTH: u32 = PAYLOAD_DEPTH as u32 + CONTROL_SLOTS as u32 + PROBES;
/// Completions that an endpoint can cause at a time.
const ENTRIES: u32 = SEND_DEPTH + RECEIVE_SLOTS as u32;

/// The control region: four pages.
const CONTROL_BYTES: usize = 16 * 1024;
const CONTROL_SLOTS_AT: usize = RECEIVE_SLOTS as usize * MESSAGE_LEN;
const STAGING_AT: usize = CONTROL_SLOTS_AT + CONTROL_SLOTS as usize * MESSAGE_LEN;
/// Staging memory that every endpoint has.
const SMALL_STAGING: usize = CONTROL_BYTES - STAGING_AT;
/// Staging memory of an endpoint that had more to send, by steps: all of it is written to
/// in turn, so more than is needed is memory that no cache holds. The last is the window of
/// the usual client, who is to get all of it at once.
const LARGER_STAGING: [usize; 3] = [64 * 1024, 192 * 1024, 1024 * 1024];
/// Most bytes of one work request: the device sends one piece while the next is copied.
const PIECE: usize = 256 * 1024;

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// So many bytes.
    Bytes(usize),
    /// None yet.
    Again,
    /// None any more.
    End,
    /// The connection is broken.
    Broken,
}

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// So many bytes were taken, at least one.
    Bytes(usize),
    /// No room at this moment; the write handler will be called when there is.
    Again,
    /// The connection is broken.
    Broken,
}

/// See the module's text.
#[derive(Debug)]
pub struct Endpoint {
    // In the order in which things may be destroyed.
    pair: QueuePair,
    inbound: ReceiveWindow,
    /// The regions behind `inbound`.
    receive: MainCell<Receive>,
    outbound: SendWindow,
    ledger: SendLedger<Outgoing>,
    control: Region,
    fate: SharedFate,
    /// The send queue refused a work request that it should have taken.
    refused: AtomicBool,
    activity: Activity,
    key: Key,
    peer: Option<SocketAddr>,
    local: Option<SocketAddr>,
    own: MainCell<Own>,
    // Before the id: the kernel's id must not outlive what hangs on it.
    domain: ProtectionDomain,
    id: Id,
    hub: MainCell<Rc<Hub>>,
    reservation: usize,
}

/// The receive buffers.
#[derive(Debug)]
struct Receive {
    /// The one that was announced last.
    region: Region,
    /// The one before, if there are two. Perhaps it is read still.
    other: Option<Region>,
    /// When it was announced, unless it was not yet.
    since: Option<Millis>,
    /// The largest that one may be, in bytes.
    most: u32,
}

/// What belongs to the writer, whoever that is at the moment.
#[derive(Debug, Default)]
struct Outgoing {
    window: Announcement,
    used: u32,
    /// Larger staging memory: the last is in use. Work requests in flight may read from
    /// those before, so they are kept until nothing is.
    larger: Vec<Region>,
}

/// What belongs to the main thread.
#[derive(Debug)]
pub struct Own {
    pub session: Session,
    /// The server's connection, unless it has none yet or none any more.
    pub connection: *mut Connection,
    /// Whether the endpoint is in the ready queue.
    pub queued: bool,
    /// Whether it was parked with something to do.
    pub parked: bool,
    /// Why it ends, once that is known.
    pub reason: Option<Reason>,
    /// The system's error number if it could not be established.
    pub failure: i32,
    /// Which gauge counts it.
    pub(super) stage: Option<Stage>,
    /// The server's number for the client, once there is one.
    pub client: Option<u64>,
    /// What the watchdog remembers.
    pub watch: Watch,
    free_control_slots: Vec<u16>,
    announcement_due: bool,
    /// `total_posted` at the last two ticks of the slow clock.
    posted_before: [u64; 2],
}

/// Who or what ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Client,
    Server,
    Violation,
    Error,
    Timeout,
}

/// Where a connection stands, as `INFO rdma` counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Handshaking,
    Established,
    Lingering,
}

impl Stage {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Handshaking => "handshaking",
            Self::Established => "established",
            Self::Lingering => "lingering",
        }
    }

    fn gauge(self) -> &'static Counter {
        match self {
            Self::Handshaking => &METRICS.connections_handshaking,
            Self::Established => &METRICS.connections_established,
            Self::Lingering => &METRICS.connections_lingering,
        }
    }
}

/// What an endpoint is made with.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub key: Key,
    /// The largest that its receive buffer may be.
    pub receive_bytes: u32,
    pub timing: Timing,
    pub now: Millis,
}

impl Endpoint {
    /// Registers, on each device, as much memory as one connection needs, and gives it
    /// back: so that a limit which admits no client shows before the first one comes.
    ///
    /// # Errors
    /// In words, for the first device that refuses.
    pub fn try_memory(receive_bytes: u32) -> Result<(), String> {
        let mut result = Ok(());
        Device::for_each(|device| {
            let tried = memory::uncounted(|| {
                let domain = ProtectionDomain::new(device)?;
                let _control = Region::new(&domain, CONTROL_BYTES, Access::Local)?;
                Region::new(&domain, receive_bytes as usize, Access::RemoteWrite).map(drop)
            });
            if let (Err(error), Ok(())) = (tried, &result) {
                let bytes = CONTROL_BYTES + receive_bytes as usize;
                result = Err(format!(
                    "a connection needs {bytes} bytes of registered memory (rx-size and {} KiB), \
                     but on {} the server {error}",
                    CONTROL_BYTES / 1024,
                    device.name(),
                ));
            }
        });
        result
    }

    /// Makes the endpoint of a connection request or of a resolved id.
    ///
    /// # Errors
    /// The first of its parts that could not be had. The id goes with the attempt,
    /// which refuses the request that it may stand for.
    pub fn new(id: Id, hub: Rc<Hub>, plan: Plan) -> Result<Self, Error> {
        let domain = ProtectionDomain::new(hub.device())?;
        let control = Region::new(&domain, CONTROL_BYTES, Access::Local)?;
        let first = growth::FIRST.min(plan.receive_bytes);
        let region = Region::new(&domain, first as usize, Access::RemoteWrite)?;
        let receive =
            MainCell::new(Receive { region, other: None, since: None, most: plan.receive_bytes });
        let (reservation, pair) = hub.reserve(ENTRIES, |queue| {
            QueuePair::new(&id, &domain, queue, SEND_DEPTH, u32::from(RECEIVE_SLOTS))
        })?;
        let endpoint = Self {
            pair,
            inbound: ReceiveWindow::new(),
            receive,
            outbound: SendWindow::default(),
            ledger: SendLedger::new(PAYLOAD_DEPTH, SMALL_STAGING, Outgoing::default()),
            control,
            fate: SharedFate::default(),
            refused: AtomicBool::new(false),
            activity: Activity::new(plan.now),
            key: plan.key,
            peer: id.peer_address(),
            local: id.local_address(),
            own: MainCell::new(Own {
                session: Session::new(plan.timing, plan.now),
                connection: ptr::null_mut(),
                queued: false,
                parked: false,
                reason: None,
                failure: libc::ECONNREFUSED,
                stage: None,
                client: None,
                watch: Watch::new(plan.now),
                free_control_slots: (0..CONTROL_SLOTS).collect(),
                announcement_due: false,
                posted_before: [0; 2],
            }),
            domain,
            id,
            hub: MainCell::new(hub),
            reservation,
        };
        (0..RECEIVE_SLOTS).try_for_each(|slot| endpoint.post_receive(slot))?;
        Ok(endpoint)
    }

    /// The endpoint's name in work requests.
    pub fn key(&self) -> Key {
        self.key
    }

    /// The connection manager id.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// The id's identity in events.
    pub fn id_key(&self) -> IdKey {
        self.id.key()
    }

    /// Address of the peer.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Our own address.
    pub fn local(&self) -> Option<SocketAddr> {
        self.local
    }

    /// The peer's address in words, for the log.
    pub fn peer_text(&self) -> String {
        self.peer.map_or_else(|| String::from("unknown address"), |peer| peer.to_string())
    }

    /// What belongs to the main thread.
    #[track_caller]
    pub fn own(&self) -> std::cell::RefMut<'_, Own> {
        self.own.open()
    }

    /// Counts the endpoint in another gauge, or in none any more.
    pub fn enter_stage(&self, stage: Option<Stage>) {
        let before = std::mem::replace(&mut self.own().stage, stage);
        if let Some(before) = before {
            before.gauge().sub(1);
        }
        if let Some(stage) = stage {
            stage.gauge().add(1);
        }
    }

    /// What became of the peer; any thread.
    pub fn fate(&self) -> Fate {
        self.fate.get()
    }

    /// It gets no better: `Gone` after `Alive`, `Broken` after both.
    pub fn worsen(&self, fate: Fate) {
        self.fate.worsen(fate);
    }

    /// The send window, for the session.
    pub fn outbound(&self) -> &SendWindow {
        &self.outbound
    }

    /// The receive window, for the session.
    pub fn inbound(&self) -> &ReceiveWindow {
        &self.inbound
    }

    /// Whether the read handler has something to do.
    pub fn is_readable(&self) -> bool {
        self.inbound.unread() > 0 || self.fate() != Fate::Alive
    }

    /// Whether the write handler has something to do.
    pub fn is_writable(&self) -> bool {
        match self.fate() {
            Fate::Alive => {
                self.outbound.has_room()
                    && self.ledger.credit() > 0
                    // Somebody who writes at this moment will be followed by an update.
                    && self.ledger.writer().is_some_and(|mut writer| writer.free() > 0)
            }
            Fate::Gone | Fate::Broken => true,
        }
    }

    /// Whether one of the server's handlers has something to do. Main thread.
    pub fn has_work(&self) -> bool {
        let connection = self.own().connection;
        if connection.is_null() {
            return false;
        }
        // SAFETY: an endpoint's connection is live until the server closes it, which
        // clears the pointer.
        let (read, write) = unsafe { ((*connection).read_handler, (*connection).write_handler) };
        (read.is_some() && self.is_readable()) || (write.is_some() && self.is_writable())
    }

    /// What the writer did.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Payload writes that are not known to have arrived.
    pub fn writes_in_flight(&self) -> u64 {
        self.ledger.in_flight()
    }

    /// Bytes of the receive buffers.
    pub fn receive_bytes(&self) -> usize {
        let receive = self.receive.open();
        receive.region.length() + receive.other.as_ref().map_or(0, Region::length)
    }

    /// Bytes of staging memory, unless somebody writes at this moment.
    pub fn staging_bytes(&self) -> Option<usize> {
        self.ledger.writer().map(|mut writer| writer.capacity())
    }

    /// Receives that are posted for the peer.
    pub fn receive_slots(&self) -> u16 {
        RECEIVE_SLOTS
    }

    /// The hub of its device. Main thread.
    pub fn hub(&self) -> Rc<Hub> {
        Rc::clone(&self.hub.open())
    }

    /// A number that grows with every byte read and work request posted.
    pub fn progress(&self) -> u64 {
        self.inbound.total_read().wrapping_add(self.ledger.total_posted())
    }

    /// Whether a work request was refused since the last call, so that no completion
    /// may be on its way that would bring the writer back.
    pub fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::Relaxed)
    }

    /// Whether every payload that was posted is known to have arrived.
    pub fn is_delivered(&self) -> bool {
        self.ledger.is_idle()
    }

    /// Copies received bytes to `to`. Any thread, one at a time.
    ///
    /// # Safety
    /// `to` is writable for `length` bytes.
    pub unsafe fn read(&self, to: *mut u8, length: usize) -> ReadOutcome {
        let fate = self.fate();
        if fate == Fate::Broken {
            return ReadOutcome::Broken;
        }
        let Some((address, waiting)) = self.inbound.readable() else {
            return if fate == Fate::Gone { ReadOutcome::End } else { ReadOutcome::Again };
        };
        let count = waiting.min(length);
        if count == 0 {
            return ReadOutcome::Again;
        }
        // SAFETY: the window says that these bytes of the receive buffer arrived and
        // were not read. Until they are consumed the buffer is not freed nor announced,
        // and the peer may not write there (one that does spoils its own request); `to`
        // is the caller's.
        unsafe {
            let from = ptr::with_exposed_provenance::<u8>(address as usize);
            ptr::copy_nonoverlapping(from, to, count);
        };
        self.inbound.consume(count);
        METRICS.bytes_received.add(count as u64);
        let reads = if is_main_thread() { &METRICS.reads_main } else { &METRICS.reads_io };
        reads.add(1);
        ReadOutcome::Bytes(count)
    }

    /// Writes as much of `pieces` as the peer's window, the staging memory and the
    /// send queue take, and returns at once. Any thread, one at a time.
    ///
    /// # Safety
    /// Every piece is readable: its address, and its length in bytes.
    pub unsafe fn write(&self, pieces: &[(*const u8, usize)]) -> WriteOutcome {
        let total: usize = pieces.iter().map(|piece| piece.1).sum();
        match self.fate() {
            Fate::Alive => {}
            // As a socket does after the peer's close: the commands that it sent
            // before are all carried out, their replies have nowhere to go.
            Fate::Gone => return WriteOutcome::Bytes(total),
            Fate::Broken => return WriteOutcome::Broken,
        }
        let Some(mut writer) = self.ledger.writer() else {
            return WriteOutcome::Again;
        };
        let mut source = Source { pieces, within: 0 };
        let mut done = 0;
        let mut shortage = Shortage::Staging;
        while done < total {
            if writer.used == writer.window.length {
                let Some(window) = self.outbound.take() else {
                    shortage = Shortage::Window;
                    break;
                };
                writer.window = window;
                writer.used = 0;
            }
            let room = (writer.window.length - writer.used) as usize;
            let wanted = (total - done).min(room);
            self.enlarge_staging(&mut writer, wanted);
            let Some(chunk) = writer.chunk(wanted.min(PIECE)) else { break };
            let staging = self.staging(&writer);
            // SAFETY: the chunk lies in the staging memory and is nobody else's
            // until its completion; the pieces are readable by the caller's promise.
            unsafe { source.copy_to(staging.0.add(chunk.offset), chunk.length) };
            let bytes = Slice {
                // SAFETY: inside the staging memory.
                address: unsafe { staging.0.add(chunk.offset) } as u64,
                length: chunk.length as u32,
                local_key: staging.1,
            };
            let target = Target {
                address: writer.window.address + u64::from(writer.used),
                rkey: writer.window.rkey,
            };
            writer.used += chunk.length as u32;
            self.outbound.publish_left(writer.window.length - writer.used);
            let (sequence, signalled) = writer.enter(chunk.length);
            let work_request = self.key.work_request(Work::Payload(sequence));
            if let Err(error) = self.pair.post_write(work_request, bytes, target, signalled) {
                writer.take_back(chunk.length);
                writer.used -= chunk.length as u32;
                self.outbound.publish_left(writer.window.length - writer.used);
                if error.errno == libc::ENOMEM {
                    // A full send queue is no error: the clock looks again.
                    self.refused.store(true, Ordering::Relaxed);
                    break;
                }
                log::debug!("connection of {}: {error}", self.peer_text());
                self.worsen(Fate::Gone);
                break;
            }
            done += chunk.length;
        }
        drop(writer);
        let main = is_main_thread();
        if done > 0 {
            self.activity.wrote(done as u64);
        }
        if done < total {
            self.activity.hold_back(shortage);
            if main { &METRICS.short_writes_main } else { &METRICS.short_writes_io }.add(1);
        }
        if done == 0 {
            return if total == 0 { WriteOutcome::Bytes(0) } else { WriteOutcome::Again };
        }
        METRICS.bytes_sent.add(done as u64);
        if main { &METRICS.writes_main } else { &METRICS.writes_io }.add(1);
        WriteOutcome::Bytes(done)
    }

    /// Start and local key of the present staging memory.
    fn staging(&self, writer: &Writer<'_, Outgoing>) -> (*mut u8, u32) {
        match writer.larger.last() {
            Some(region) => (region.start(), region.local_key()),
            // SAFETY: inside the control region.
            None => (unsafe { self.control.start().add(STAGING_AT) }, self.control.local_key()),
        }
    }

    /// Gets larger staging memory if what is free does not do for `wanted` bytes: twice as
    /// much, so that one half is sent while the other is copied to.
    fn enlarge_staging(&self, writer: &mut Writer<'_, Outgoing>, wanted: usize) {
        if wanted <= writer.free() {
            return;
        }
        let [.., most] = LARGER_STAGING;
        let step = LARGER_STAGING.into_iter().find(|step| *step >= 2 * wanted).unwrap_or(most);
        let length = step.min(writer.window.length as usize);
        if length <= writer.capacity() {
            return;
        }
        match Region::new(&self.domain, length, Access::Local) {
            Ok(region) => {
                writer.install(region.length());
                writer.larger.push(region);
            }
            // Slower but right with what there is.
            Err(error) => log::debug!("connection of {}: {error}", self.peer_text()),
        }
    }

    /// Gives larger staging memory back, and the second receive buffer, if nothing was
    /// written for two ticks of the slow clock and nothing is in flight. Main thread.
    pub fn shrink_if_idle(&self) {
        let quiet = self.is_quiet();
        if quiet && self.inbound.is_other_free() {
            self.receive.open().other = None;
        }
        let mut own = self.own();
        own.posted_before = [self.ledger.total_posted(), own.posted_before[0]];
        drop(own);
        if quiet
            && let Some(mut writer) = self.ledger.idle_writer()
            && !writer.larger.is_empty()
        {
            writer.larger.clear();
            writer.install(SMALL_STAGING);
        }
    }

    /// Whether nothing was written for at least one tick of the slow clock.
    pub fn is_quiet(&self) -> bool {
        let posted = self.ledger.total_posted();
        self.own().posted_before == [posted; 2]
    }

    /// Whether a message of ours waits for a slot. Main thread.
    pub fn awaits_control_slot(&self) -> bool {
        let own = self.own();
        own.announcement_due || own.session.owes_answers() || own.free_control_slots.is_empty()
    }

    /// Whether the receive window is consumed and nobody has tried to announce it. Main thread.
    pub fn is_announcement_missed(&self) -> bool {
        let own = self.own();
        self.inbound.is_consumed()
            && !own.announcement_due
            && own.session.is_established()
            && self.fate() == Fate::Alive
    }

    /// Opens the receive window again if it is full, and consumed or there is another
    /// buffer. Main thread.
    ///
    /// # Errors
    /// If the message can't be posted.
    pub fn announce_if_full(&self) -> Result<(), Error> {
        let own = self.own();
        let due = own.announcement_due;
        let wanted = own.session.is_established()
            && (due || self.inbound.is_full())
            && self.fate() == Fate::Alive;
        drop(own);
        if !wanted || (!due && !self.turn_receive_buffer()) {
            return Ok(());
        }
        let receive = self.receive.open();
        let memory = Memory {
            address: receive.region.start().expose_provenance() as u64,
            length: receive.region.length() as u32,
            rkey: receive.region.remote_key(),
        };
        drop(receive);
        if !due {
            self.inbound.announce(memory.address, memory.length);
        }
        let message = Message::RegisterXferMemory(memory);
        let sent = self.send_control(message)?;
        self.own().announcement_due = !sent;
        if sent {
            METRICS.windows_received.add(1);
        }
        Ok(())
    }

    /// Has the next receive buffer ready, of a size that fits the traffic, the present one
    /// being full. `false` if the peer has to wait until that was read.
    fn turn_receive_buffer(&self) -> bool {
        let now = clock::now();
        let mut receive = self.receive.open();
        let receive = &mut *receive;
        let took = receive.since.map(|since| now - since);
        let present = receive.region.length() as u32;
        let wanted = took.map_or(present, |took| growth::next(present, receive.most, took));
        let two = took.is_some_and(growth::wants_two);
        // Slower but right with what there is, where there is no memory for more.
        let new = || {
            Region::new(&self.domain, wanted as usize, Access::RemoteWrite)
                .inspect_err(|error| log::debug!("connection of {}: {error}", self.peer_text()))
                .ok()
        };
        if self.inbound.is_consumed() {
            if !two {
                receive.other = None;
            }
            if wanted != present
                && let Some(region) = new()
            {
                receive.region = region;
            }
        } else {
            if !two || !self.inbound.is_other_free() {
                return false;
            }
            let fits = |region: &Region| region.length() == wanted as usize;
            let Some(next) = receive.other.take().filter(fits).or_else(new) else { return false };
            receive.other = Some(std::mem::replace(&mut receive.region, next));
            METRICS.windows_ahead.add(1);
        }
        receive.since = Some(now);
        true
    }

    /// Sends the answers that are due, as far as there are slots. Main thread.
    ///
    /// # Errors
    /// If a message can't be posted.
    pub fn send_answers(&self) -> Result<(), Error> {
        loop {
            let Some((answer, slot)) = self.own().session.next_answer() else { return Ok(()) };
            if !self.send_control(answer)? {
                self.own().session.answer_not_sent(answer, slot);
                return Ok(());
            }
            self.post_receive(slot)?;
        }
    }

    /// Posts a control message; `false` if no slot is free, or no room in the queue.
    fn send_control(&self, message: Message) -> Result<bool, Error> {
        let Some(slot) = self.own().free_control_slots.pop() else { return Ok(false) };
        let offset = CONTROL_SLOTS_AT + usize::from(slot) * MESSAGE_LEN;
        // SAFETY: a free slot of the control region, which is ours alone.
        let address = unsafe {
            let place = self.control.start().add(offset);
            place.cast::<[u8; MESSAGE_LEN]>().write(message.encode());
            place as u64
        };
        let bytes =
            Slice { address, length: MESSAGE_LEN as u32, local_key: self.control.local_key() };
        match self.pair.post_send(self.key.work_request(Work::Control(slot)), bytes) {
            Ok(()) => Ok(true),
            Err(error) => {
                self.own().free_control_slots.push(slot);
                if error.errno == libc::ENOMEM { Ok(false) } else { Err(error) }
            }
        }
    }

    /// A control message of ours has arrived. Main thread.
    pub fn control_completed(&self, slot: u16) {
        self.own().free_control_slots.push(slot);
    }

    /// Payload up to and without `sequence` has arrived.
    pub fn payload_completed(&self, sequence: u32) {
        self.ledger.retire(sequence);
    }

    /// Posts the receive of a slot (again). Main thread.
    ///
    /// # Errors
    /// If the queue pair does not take it.
    pub fn post_receive(&self, slot: u16) -> Result<(), Error> {
        let offset = usize::from(slot) * MESSAGE_LEN;
        let into = Slice {
            // SAFETY: inside the control region.
            address: unsafe { self.control.start().add(offset) } as u64,
            length: MESSAGE_LEN as u32,
            local_key: self.control.local_key(),
        };
        self.pair.post_receive(self.key.work_request(Work::Receive(slot)), into)
    }

    /// The bytes of the SEND that arrived in a slot.
    pub fn received(&self, slot: u16, length: u32) -> Vec<u8> {
        let length = (length as usize).min(MESSAGE_LEN);
        let offset = usize::from(slot.min(RECEIVE_SLOTS - 1)) * MESSAGE_LEN;
        // SAFETY: inside the control region; the receive completed and is not
        // posted, so the device does not write there.
        unsafe { std::slice::from_raw_parts(self.control.start().add(offset), length) }.to_vec()
    }

    /// Posts a probe; `false` if somebody is writing at this moment. Main thread.
    ///
    /// # Errors
    /// If the queue pair does not take it.
    pub fn post_probe(&self) -> Result<bool, Error> {
        // With the writer's lock: a payload that has its number already, but is not
        // posted yet, would otherwise be taken for one that the probe came after.
        let Some(writer) = self.ledger.writer() else { return Ok(false) };
        let sequence = writer.next_sequence();
        self.pair.post_probe(self.key.work_request(Work::Probe(sequence)))?;
        drop(writer);
        METRICS.probes.add(1);
        Ok(true)
    }

    /// The connection is established: makes an early peer's retries quick.
    pub fn established(&self) {
        if let Err(error) = self.pair.shorten_rnr_timer() {
            log::debug!("connection of {}: {error}", self.peer_text());
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // The queue pair goes right after this; until the completion queue was
        // seen empty its entries stay reserved.
        self.hub.open().release(self.reservation, ENTRIES);
    }
}

/// Bytes to send, in pieces.
struct Source<'a> {
    pieces: &'a [(*const u8, usize)],
    /// Bytes of the first piece that were copied already.
    within: usize,
}

impl Source<'_> {
    /// Copies the next `length` bytes, of which there must be as many.
    ///
    /// # Safety
    /// The pieces are readable, `to` is writable for `length` bytes.
    unsafe fn copy_to(&mut self, mut to: *mut u8, mut length: usize) {
        while length > 0 {
            let (start, size) = self.pieces[0];
            let count = (size - self.within).min(length);
            // SAFETY: by the caller's promise; the two never overlap, one is ours.
            unsafe {
                ptr::copy_nonoverlapping(start.add(self.within), to, count);
                to = to.add(count);
            }
            length -= count;
            self.within += count;
            if self.within == size {
                self.pieces = &self.pieces[1..];
                self.within = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_joined_in_order_whatever_the_steps() {
        let text = b"one two three";
        let pieces: Vec<_> = [&text[..3], &text[3..3], &text[3..8], &text[8..]]
            .iter()
            .map(|piece| (piece.as_ptr(), piece.len()))
            .collect();
        for step in 1..=text.len() {
            let mut source = Source { pieces: &pieces, within: 0 };
            let mut out = vec![0_u8; text.len()];
            let mut at = 0;
            while at < text.len() {
                let count = step.min(text.len() - at);
                // SAFETY: `out` holds as many bytes as the pieces.
                unsafe { source.copy_to(out.as_mut_ptr().add(at), count) };
                at += count;
            }
            assert_eq!(out, text);
        }
    }

    #[test]
    fn the_parts_of_the_control_region_fit() {
        const { assert!(STAGING_AT + SMALL_STAGING == CONTROL_BYTES) };
        const { assert!(SMALL_STAGING > 8 * 1024) };
    }
}
