// SPDX-License-Identifier: BSD-3-Clause
//! One RDMA connection: its queue pair, its memory, its windows.
//!
//! An endpoint outlives the server's `connection` on both sides: it exists while
//! the handshake is going on, and it lingers while the last bytes are delivered.
//! [`Endpoint::read`] and [`Endpoint::write`] may be called on any thread; who finds another
//! one at it comes again. Everything else is the main thread's.
//!
//! Memory of an endpoint: one *control* region (receive slots, slots for our own
//! control messages, a little staging memory), one *receive* region that the peer
//! may write to, which grows and shrinks with the traffic, and, once a write asks for
//! it, a larger *staging* region. Each endpoint has a protection domain of its own, so
//! that no peer can use a key of another's.
//!
//! What happens to it is decided by `proto`: by its [`Stream`], which reader, writer and
//! poller share, and its [`Session`], the poller's. Here is what they work on: the queue pair
//! and registered memory. What completed, and the reading, is in `receiving`; the writing in
//! `sending`; the control region, and what the session posts, in `control`.

pub mod activity;
mod control;
pub mod place;
mod receiving;
mod sending;
pub mod status;
pub mod watch;
pub mod wr_id;

use activity::Activity;
use place::Place;
use watch::Watch;

use crate::device::abilities::FEW_RECEIVES;
use crate::device::{Reservation, SharedDevice};
use crate::endpoint::wr_id::EndpointId;
use crate::host::main_cell::MainPtr;
use crate::host::{Connection, MainCell};
use crate::metrics::{Counter, METRICS};
use control::{CONTROL_SLOTS, Layout};
use proto::buffer_size;
use proto::session::{Millis, Reader, Session, Timing};
use proto::staging::STEPS;
pub use proto::stream::ReadOutcome;
use proto::stream::Stream;
pub use proto::window::PeerState;
pub use sending::WriteOutcome;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32};
use verbs::Error;
use verbs::account;
use verbs::cm::{Id, IdKey};
use verbs::device::Device;
use verbs::mr::{Access, ProtectionDomain, Region};
use verbs::qp::QueuePair;

/// Payload work requests that may be in flight.
const PAYLOAD_DEPTH: usize = 32;
/// Probes that may be in flight, with one to spare.
const PROBES: u32 = 2;

/// The control region of a connection with the fewest receives.
const LEAST_CONTROL: usize = Layout { receives: FEW_RECEIVES }.bytes();

const SEND_DEPTH: u32 = PAYLOAD_DEPTH as u32 + CONTROL_SLOTS as u32 + PROBES;

/// One RDMA connection. [`read`](Self::read) and [`write`](Self::write) may be called on any
/// thread, everything else on the main thread where a method does not say otherwise.
#[derive(Debug)]
pub struct Endpoint {
    // In the order in which things may be destroyed.
    qp: QueuePair,
    /// The windows, and larger staging memory.
    stream: Stream<Region>,
    control: Region,
    layout: Layout,
    /// The error number of a write that could not be posted for good, for the log; 0 for
    /// none.
    post_error: AtomicI32,
    /// Whether the job that an I/O thread has of this connection may not write.
    held: AtomicBool,
    activity: Activity,
    key: EndpointId,
    peer: Option<SocketAddr>,
    local: Option<SocketAddr>,
    own: MainCell<MainState>,
    domain: Arc<ProtectionDomain>,
    reservation: Reservation,
    id: Arc<Id>,
    /// Until it is removed.
    device: MainCell<Option<Arc<SharedDevice>>>,
    // When all else is gone.
    _place: Place,
}

/// The part of an endpoint that only the main thread reaches.
#[derive(Debug)]
pub struct MainState {
    /// The state of the protocol, with the receive buffers.
    pub session: Session<Region>,
    /// The server's connection, unless it has none yet or none any more.
    connection: MainPtr<Connection>,
    /// Whether the endpoint is in the ready queue.
    pub queued: bool,
    /// Whether it had something to do at its last turn, and got nowhere. It may be in the queue
    /// again all the same.
    pub parked: bool,
    /// The poller's turn in which commands of the connection were carried out last.
    pub carried_out: Option<u64>,
    /// Whether its RNR timer was set.
    pub rnr_timer_set: bool,
    /// Why it ends, once that is known.
    pub reason: Option<Reason>,
    /// The system's error number if it could not be established.
    pub failure: i32,
    /// The connection's state, and so the gauge that counts it. In [`Ending`](Stage::Ending)
    /// it is to be removed, or was.
    pub(super) stage: Stage,
    /// The server's number for the client, once there is one.
    pub client: Option<u64>,
    /// Who the peer is.
    pub role: Role,
    /// The watchdog's notes.
    pub watch: Watch,
}

impl MainState {
    /// The server's connection, or null where there is none yet or none any more.
    pub fn connection(&self) -> *mut Connection {
        self.connection.0
    }

    /// Ties the endpoint to the server's `connection`; null unties it.
    pub fn set_connection(&mut self, connection: *mut Connection) {
        self.connection = MainPtr(connection);
    }
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The client disconnected.
    Client,
    /// The server closed it.
    Server,
    /// The peer broke the protocol.
    Violation,
    /// A work request failed, or the device.
    Error,
    /// The peer was silent for too long.
    Timeout,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A client, for all that is known.
    Client,
    /// A server that has opened a link to this one: a replica, or a node whose slots move here.
    Replica,
    /// A server that this one has opened a link to.
    Primary,
}

impl Role {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Replica => "replica",
            Self::Primary => "primary",
        }
    }
}

/// The state of a connection, as `INFO rdma` counts it and `RDMA.CLIENTS` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Connecting or accepted, and not ready for commands.
    Handshaking,
    /// Commands and replies go to and fro.
    Established,
    /// Closed by the server; the last bytes are being delivered.
    Lingering,
    /// Over: to be removed, removed, or being destroyed.
    Ending,
}

impl Stage {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Handshaking => "handshaking",
            Self::Established => "established",
            Self::Lingering => "lingering",
            Self::Ending => "ending",
        }
    }

    fn gauge(self) -> &'static Counter {
        match self {
            Self::Handshaking => &METRICS.connections_handshaking,
            Self::Established => &METRICS.connections_established,
            Self::Lingering => &METRICS.connections_lingering,
            Self::Ending => &METRICS.connections_ending,
        }
    }
}

/// The memory that a connection begins with can't be had on a device.
#[derive(Debug)]
pub struct NoMemory {
    device: String,
    error: Error,
}

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cannot serve clients: a connection begins with {} bytes of registered memory, but on \
             {} the server {}",
            LEAST_CONTROL + buffer_size::FIRST as usize,
            self.device,
            self.error
        )
    }
}

impl std::error::Error for NoMemory {}

/// The parameters of a new endpoint.
#[derive(Debug)]
pub struct Plan {
    /// Its name in work requests.
    pub key: EndpointId,
    /// Its place among the endpoints.
    pub place: Place,
    /// The smallest and the largest that its receive buffer may be; it begins with the smallest.
    pub receive_sizes: RangeInclusive<u32>,
    /// Intervals and limits of the protocol.
    pub timing: Timing,
    /// The time at which it is made.
    pub now: Millis,
}

impl Endpoint {
    /// Registers on a device as much memory as one connection begins with, and gives it
    /// back: so that a limit which admits no client shows before the first one comes.
    ///
    /// # Errors
    /// If it can't be had.
    pub fn try_memory(device: &Device) -> Result<(), NoMemory> {
        account::uncounted(|| {
            let domain = Arc::new(ProtectionDomain::new(device)?);
            let _control = Region::new(&domain, LEAST_CONTROL, Access::Local)?;
            Region::new(&domain, buffer_size::FIRST as usize, Access::RemoteWrite).map(drop)
        })
        .map_err(|error| NoMemory { device: device.name(), error })
    }

    /// Makes the endpoint of a connection request or of a resolved id.
    ///
    /// # Errors
    /// The first of its parts that could not be had.
    pub fn new(id: Arc<Id>, device: Arc<SharedDevice>, plan: Plan) -> Result<Self, Error> {
        let opened = id.device().ok_or(Error { action: verbs::FIND, errno: libc::ENODEV })?;
        let domain = Arc::new(ProtectionDomain::new(&opened)?);
        let layout = Layout { receives: device.receives() };
        let control = Region::new(&domain, layout.bytes(), Access::Local)?;
        let first = *plan.receive_sizes.start();
        let region = Region::new(&domain, first as usize, Access::RemoteWrite)?;
        let receives = u32::from(layout.receives);
        // As many completions as it can cause at a time.
        let (reservation, qp) = device.reserve(SEND_DEPTH + receives, |queue| {
            QueuePair::new(&id, &domain, queue, SEND_DEPTH, receives)
        })?;
        let endpoint = Self {
            qp,
            stream: Stream::new(PAYLOAD_DEPTH, layout.staging(), STEPS),
            control,
            layout,
            post_error: AtomicI32::new(0),
            held: AtomicBool::new(false),
            activity: Activity::new(plan.now),
            key: plan.key,
            peer: id.peer_address(),
            local: id.local_address(),
            own: MainCell::new(MainState {
                session: Session::new(
                    plan.timing,
                    region,
                    plan.receive_sizes,
                    CONTROL_SLOTS,
                    plan.now,
                ),
                connection: MainPtr::null(),
                queued: false,
                parked: false,
                carried_out: None,
                rnr_timer_set: false,
                reason: None,
                failure: libc::ECONNREFUSED,
                stage: Stage::Handshaking,
                client: None,
                role: Role::Client,
                watch: Watch::new(plan.now),
            }),
            domain,
            reservation,
            id,
            device: MainCell::new(Some(device)),
            _place: plan.place,
        };
        endpoint.post_receives()?;
        Stage::Handshaking.gauge().add(1);
        Ok(endpoint)
    }

    /// The endpoint's name in work requests.
    pub fn key(&self) -> EndpointId {
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

    /// The state that only the main thread may touch.
    ///
    /// # Panics
    /// On another thread, and while it is borrowed.
    #[track_caller]
    pub fn main_state(&self) -> std::cell::RefMut<'_, MainState> {
        self.own.borrow_mut()
    }

    /// The connection is in this state from now on, and counted there.
    pub fn enter_stage(&self, stage: Stage) {
        std::mem::replace(&mut self.main_state().stage, stage).gauge().sub(1);
        stage.gauge().add(1);
    }

    /// The server is done with the connection: from now on it lingers. Main thread.
    pub fn begin_lingering(&self, now: Millis) {
        self.enter_stage(Stage::Lingering);
        let mut own = self.main_state();
        let reader = match own.role {
            Role::Replica | Role::Primary => Reader::Server,
            Role::Client if self.stream.total_read() > 0 => Reader::Client,
            Role::Client => Reader::Refused,
        };
        own.session.close(self.activity.written(), reader, now);
    }

    /// The windows, and what became of the peer. Any thread.
    pub fn stream(&self) -> &Stream<Region> {
        &self.stream
    }

    /// Whether one of the server's handlers has something to do. Main thread.
    pub fn has_work(&self) -> bool {
        let connection = self.main_state().connection();
        if connection.is_null() {
            return false;
        }
        // SAFETY: an endpoint's connection is live until the server closes it, which
        // clears the pointer.
        let (read, write) = unsafe { ((*connection).read_handler, (*connection).write_handler) };
        (read.is_some() && self.is_readable()) || (write.is_some() && self.is_writable())
    }

    /// Whether the server has not written yet all that it began to. Main thread.
    pub fn awaits_write(&self) -> bool {
        let connection = self.main_state().connection();
        // SAFETY: as in `has_work`.
        !connection.is_null() && unsafe { (*connection).write_handler.is_some() }
    }

    /// The writer's counters and times. Any thread.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// The device that it is on. Main thread.
    ///
    /// # Panics
    /// After [`detach`](Self::detach).
    pub fn device(&self) -> Arc<SharedDevice> {
        Arc::clone(self.device.borrow_mut().as_ref().expect("an endpoint that is not removed"))
    }

    /// The endpoint is removed: from here on it may be destroyed on any thread. What the
    /// device has for it stays until then. Main thread.
    pub fn detach(&self) {
        *self.device.borrow_mut() = None;
        self.qp.detach();
    }

    /// The number of its queue pair, by which the device tells of it.
    pub fn queue_pair(&self) -> u32 {
        self.qp.number()
    }

    /// The device's number of its completion queue.
    pub fn queue(&self) -> usize {
        self.reservation.queue()
    }
}
