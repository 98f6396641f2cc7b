// SPDX-License-Identifier: BSD-3-Clause
//! Completions in, handlers called.
//!
//! The poller lives on the server's main thread and is the only one that takes
//! completions. It works in *passes*: it takes what completed, marks the endpoints
//! that have something to do as ready, and then serves each ready endpoint once.
//!
//! Serving calls the server's read handler at most once and its write handler at
//! most once. With I/O threads a handler may do nothing but queue a job, so an
//! endpoint that made no progress is *parked*: it leaves the queue until something
//! wakes it, a completion, an `update_state` or a new handler. A handler is never
//! called again just because bytes are left: that is what hangs a server whose
//! main thread would have to collect the job first. In the same way a write that
//! did not find room is resumed here, when a completion brought room, and nowhere
//! else.
//!
//! Readiness is a level. Completions and calls of the server are the edges at
//! which it is looked at, and an edge outside of a pass also wakes the event loop,
//! since the server asks only once before it sleeps whether anything is pending.

use super::Transport;
use super::connection::{RdmaConnection, call_handler, has_write_barrier};
use super::echoes::Echoes;
use super::endpoint::{Endpoint, Fate, Plan, Reason, Stage};
use super::guard::{guard, guard_endpoint};
use super::hub::{Hub, Progress, Which};
use super::key::{Key, MAX_ENDPOINTS, Work};
use super::pace::Nanos;
use super::valve::Valve;
use super::{clock, listener, outgoing};
use crate::host::connection::State;
use crate::host::reply::Reply;
use crate::host::{MainCell, api};
use crate::metrics::METRICS;
use crate::session::{Reaction, Violation};
use crate::verbs::Error;
use crate::verbs::cm::{Device, Event, EventChannel, EventKind, Id, IdKey};
use crate::verbs::completion::{Completion, Outcome};
use log::Level;
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

/// Connection manager events handled in one go, so that a storm of connects leaves
/// the event loop its turn.
const EVENTS_PER_GO: usize = 32;

/// Lost connections that are logged in a minute; as many violations, and as many lines
/// about devices and addresses.
const LOSSES_PER_MINUTE: u32 = 30;

/// See the module's text. Main thread only, all of it.
#[derive(Debug)]
pub struct Poller {
    hubs: MainCell<Vec<Rc<Hub>>>,
    table: MainCell<Table>,
    ready: MainCell<VecDeque<Key>>,
    doomed: MainCell<Vec<Key>>,
    /// Depth of passes: the server may call us back from inside a handler.
    passes: MainCell<u32>,
    /// Readable while something is ready that no pass will find by itself.
    wake: OwnedFd,
    awake: MainCell<bool>,
    /// Connection manager events of all connections: an accepted connection
    /// inherits its listener's channel and is moved here, so that closing the
    /// listener does it no harm.
    channel: EventChannel,
    /// A hub had more completions than one pass takes.
    unfinished: MainCell<bool>,
    echoes: MainCell<Echoes>,
    /// The endpoint whose connection the server accepts at this moment.
    accepting: MainCell<Option<Arc<Endpoint>>>,
    losses: MainCell<Valve>,
    violations: MainCell<Valve>,
    troubles: MainCell<Valve>,
}

// SAFETY: all fields are cells of the main thread or used on it alone; the event
// channel's pointer does not leave it.
unsafe impl Send for Poller {}
// SAFETY: as above.
unsafe impl Sync for Poller {}

#[derive(Debug, Default)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_id: HashMap<IdKey, Key>,
}

#[derive(Debug)]
struct Slot {
    generation: u16,
    endpoint: Option<Arc<Endpoint>>,
}

impl Poller {
    /// A poller without endpoints, not watched yet.
    ///
    /// # Errors
    /// If a descriptor can't be had, or the kernel has no RDMA connection manager.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: no pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(Error { action: "create an eventfd", errno });
        }
        Ok(Self {
            hubs: MainCell::default(),
            table: MainCell::default(),
            ready: MainCell::default(),
            doomed: MainCell::default(),
            passes: MainCell::default(),
            // SAFETY: a new descriptor, nobody else's.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
            awake: MainCell::default(),
            channel: EventChannel::new()?,
            unfinished: MainCell::default(),
            echoes: MainCell::default(),
            accepting: MainCell::default(),
            losses: MainCell::new(Valve::new(LOSSES_PER_MINUTE)),
            violations: MainCell::new(Valve::new(LOSSES_PER_MINUTE)),
            troubles: MainCell::new(Valve::new(LOSSES_PER_MINUTE)),
        })
    }

    /// Registers with the event loop. `echoes` is the most descriptors that may fire
    /// for one device beside its own.
    pub fn watch(&self, echoes: usize) -> bool {
        self.echoes.open().allow(echoes);
        api::watch(self.wake.as_raw_fd(), on_wake, 0)
            && api::watch(self.channel.fd(), on_connection_event, 0)
    }

    /// The channel of connection manager events of connections.
    pub fn channel(&self) -> &EventChannel {
        &self.channel
    }

    /// The hub of a device, opened if this is its first connection.
    ///
    /// # Errors
    /// If the device can't be opened.
    pub fn hub(&self, device: Device) -> Result<Rc<Hub>, Error> {
        let mut hubs = self.hubs.open();
        if let Some(hub) = hubs.iter().find(|hub| hub.device() == device) {
            return Ok(Rc::clone(hub));
        }
        let (vector, patience) = {
            let settings = Transport::get().settings.open();
            (settings.completion_vector, settings.busy_poll)
        };
        let hub = Rc::new(Hub::new(device, vector, patience * 1000)?);
        if !api::watch(hub.fd(), on_completions, hubs.len()) {
            return Err(Error { action: "watch the device's completions", errno: libc::ERANGE });
        }
        log::debug!("device {} opened", hub.name());
        hubs.push(Rc::clone(&hub));
        Ok(hub)
    }

    /// The devices that have or had connections, as `INFO rdma` shows them.
    pub fn devices(&self) -> Vec<Reply> {
        let endpoints = self.endpoints();
        let hubs = self.hubs.open().clone();
        let describe = |hub: &Rc<Hub>| {
            let own = endpoints.iter().filter(|endpoint| Rc::ptr_eq(&endpoint.hub(), hub));
            let mut ports: Vec<u8> = own.map(|endpoint| endpoint.id().port()).collect();
            let connections = ports.len() as u64;
            ports.sort_unstable();
            ports.dedup();
            hub.describe(&ports, connections)
        };
        hubs.iter().map(describe).collect()
    }

    /// Makes an endpoint for `id` and enters it.
    ///
    /// # Errors
    /// If a part of it can't be had.
    pub fn enter(&self, id: Id) -> Result<Arc<Endpoint>, Error> {
        let transport = Transport::get();
        let device = id.device().ok_or(Error { action: "find the device", errno: libc::ENODEV })?;
        let hub = self.hub(device)?;
        let key = {
            let mut table = self.table.open();
            let index = match table.free.pop() {
                Some(index) => index,
                None if table.slots.len() < MAX_ENDPOINTS => {
                    table.slots.push(Slot { generation: 0, endpoint: None });
                    table.slots.len() as u32 - 1
                }
                None => return Err(Error { action: "enter an endpoint", errno: libc::EMFILE }),
            };
            let slot = &mut table.slots[index as usize];
            slot.generation = slot.generation.wrapping_add(1);
            Key { index, generation: slot.generation }
        };
        let (receive_bytes, timing) = {
            let settings = transport.settings.open();
            (settings.rx_size, settings.timing)
        };
        let plan = Plan { key, receive_bytes, timing, now: clock::now() };
        match Endpoint::new(id, hub, plan) {
            Ok(endpoint) => {
                let endpoint = Arc::new(endpoint);
                let mut table = self.table.open();
                table.by_id.insert(endpoint.id_key(), key);
                table.slots[key.index as usize].endpoint = Some(Arc::clone(&endpoint));
                drop(table);
                endpoint.enter_stage(Some(Stage::Handshaking));
                clock::attend(&endpoint);
                Ok(endpoint)
            }
            Err(error) => {
                self.table.open().free.push(key.index);
                Err(error)
            }
        }
    }

    /// The endpoint of a key, unless it is gone.
    pub fn find(&self, key: Key) -> Option<Arc<Endpoint>> {
        let table = self.table.open();
        let slot = table.slots.get(key.index as usize)?;
        if slot.generation == key.generation { slot.endpoint.clone() } else { None }
    }

    /// All endpoints there are.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.table.open().slots.iter().filter_map(|slot| slot.endpoint.clone()).collect()
    }

    /// How many endpoints there are.
    pub fn count(&self) -> usize {
        self.table.open().by_id.len()
    }

    /// Connections in handshake at this moment.
    pub fn handshakes(&self) -> u64 {
        METRICS.connections_handshaking.get()
    }

    /// Disconnects and frees an endpoint that no connection of the server has any more.
    pub fn remove(&self, endpoint: Arc<Endpoint>, reason: Reason) {
        let key = endpoint.key();
        let mut table = self.table.open();
        let slot = &mut table.slots[key.index as usize];
        if slot.generation != key.generation || slot.endpoint.take().is_none() {
            return;
        }
        table.by_id.remove(&endpoint.id_key());
        table.free.push(key.index);
        drop(table);
        let reason = endpoint.own().reason.unwrap_or(reason);
        match reason {
            Reason::Client => &METRICS.ended_by_client,
            Reason::Server => &METRICS.ended_by_server,
            Reason::Violation => &METRICS.ended_by_violation,
            Reason::Error => &METRICS.ended_by_error,
            Reason::Timeout => &METRICS.ended_by_timeout,
        }
        .add(1);
        endpoint.enter_stage(None);
        endpoint.id().disconnect();
    }

    /// The endpoint may have something to do: serves it in a pass to come, and sees
    /// to it that one comes.
    pub fn mark_ready(&self, endpoint: &Endpoint) {
        {
            let mut own = endpoint.own();
            if own.queued {
                return;
            }
            own.queued = true;
            if std::mem::take(&mut own.parked) {
                METRICS.woken.add(1);
            }
        }
        #[cfg(feature = "test-panics")]
        if super::panics::asked_for("mark_ready") {
            // As the worst of faults would have it: queued, it believes, and it is not.
            return;
        }
        self.ready.open().push_back(endpoint.key());
        if *self.passes.open() == 0 {
            self.wake_loop();
        }
    }

    /// Marks the endpoint ready if one of its handlers has something to do.
    pub fn mark_if_ready(&self, endpoint: &Endpoint) {
        if endpoint.has_work() {
            self.mark_ready(endpoint);
        }
    }

    /// As [`mark_ready`](Self::mark_ready), whatever was noted of the endpoint and of the
    /// event loop before. For the watchdog.
    pub fn nudge(&self, endpoint: &Endpoint) {
        endpoint.own().queued = false;
        *self.awake.open() = false;
        self.mark_ready(endpoint);
    }

    /// Begins a pass, which ends when the answer is dropped, by a panic too: who marks
    /// an endpoint as ready meanwhile need not wake the event loop.
    fn pass(&self) -> Pass<'_> {
        *self.passes.open() += 1;
        Pass(self)
    }

    fn wake_loop(&self) {
        if !std::mem::replace(&mut *self.awake.open(), true) {
            let one: u64 = 1;
            // SAFETY: eight bytes from a u64. The counter can't overflow: it is
            // written only when it was read since.
            unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Whether completions wait that the last pass did not take.
    pub fn is_behind(&self) -> bool {
        *self.unfinished.open()
    }

    /// Whether the event loop must not sleep.
    pub fn is_pending(&self) -> bool {
        self.is_behind() || !self.ready.open().is_empty()
    }

    /// A pass over what is pending, before the server sleeps. Returns how many endpoints
    /// were served.
    pub fn run(&self) -> usize {
        let _pass = self.pass();
        let unfinished = std::mem::take(&mut *self.unfinished.open());
        let hubs = self.hubs.open().len();
        for index in 0..hubs {
            let hub = Rc::clone(&self.hubs.open()[index]);
            if !hub.is_armed() {
                // First what is there, or the event would come at once.
                let found = self.take_completions(&hub, Which::Fired) > 0;
                hub.pace().looked_last(found);
                self.arm(&hub);
                self.take_completions(&hub, Which::Fired);
            } else if unfinished {
                self.take_completions(&hub, Which::Fired);
            }
        }
        if self.is_pending() { self.serve_ready() } else { 0 }
    }

    /// A pass for the completions of one hub.
    fn run_completions(&self, hub: &Rc<Hub>) {
        let _pass = self.pass();
        let patience = hub.pace().patience(clock::nanos());
        let left = patience.is_some_and(|deadline| {
            let found = self.wait_for_completions(hub, deadline);
            hub.pace().looked(found, clock::nanos())
        });
        if !left {
            // Not armed yet: what completes until the server sleeps is found then, and
            // no event has to be made for it.
            self.take_events(hub);
            self.take_completions(hub, Which::Fired);
        }
        let busy = self.ready.open().len();
        self.echoes.open().grow(hub.fd(), busy);
        self.serve_ready();
        hub.pace().passed(clock::nanos());
    }

    /// Takes what completed on a hub, and looks until `deadline` if that is nothing. Returns
    /// whether there was something.
    fn wait_for_completions(&self, hub: &Hub, deadline: Nanos) -> bool {
        loop {
            if self.take_completions(hub, Which::All) > 0 {
                METRICS.waits_fruitful.add(1);
                return true;
            }
            if deadline == 0 || clock::nanos() >= deadline {
                METRICS.waits_fruitless.add(1);
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Returns how many there were.
    fn take_completions(&self, hub: &Hub, which: Which) -> u64 {
        let count = Cell::new(0);
        let progress = hub.poll(which, |completion| {
            count.set(count.get() + 1);
            self.complete(completion);
        });
        METRICS.completions.add(count.get());
        METRICS.completions_at_once_most.raise(count.get());
        match progress {
            Ok(Progress::Empty) => {}
            Ok(Progress::More) => *self.unfinished.open() = true,
            Err(error) => {
                let what = format!("device {}: {error}; its connections end", hub.name());
                self.say_trouble(Level::Error, &what);
                for endpoint in self.endpoints() {
                    if endpoint.id().device() == Some(hub.device()) {
                        self.lose(&endpoint, Fate::Gone, Reason::Error);
                    }
                }
            }
        }
        count.get()
    }

    /// One completion.
    fn complete(&self, completion: Completion) {
        let Some((key, work)) = Key::parse(completion.work_request) else { return };
        // A connection that is gone may still have completions on their way.
        let Some(endpoint) = self.find(key) else { return };
        guard_endpoint("one completion", &endpoint, || {
            self.complete_work(&endpoint, work, completion.outcome);
        });
    }

    fn complete_work(&self, endpoint: &Arc<Endpoint>, work: Work, outcome: Outcome) {
        match outcome {
            Outcome::Failed(status) if matches!(work, Work::Receive(_)) && status.is_too_long() => {
                self.violate(endpoint, Violation::TooLong);
            }
            Outcome::Failed(status) => {
                if !status.is_flush() {
                    METRICS.failed(status.failure());
                }
                if endpoint.fate() == Fate::Alive {
                    let why = if status.is_flush() {
                        // Nothing of ours failed: the device refused what the peer tried.
                        String::from("an access that it has no right to, or the device failed")
                    } else {
                        format!("{} ({work:?})", status.text())
                    };
                    self.say_lost(endpoint, &why);
                }
                self.lose(endpoint, Fate::Gone, Reason::Error);
            }
            Outcome::Unexpected(code) => self.violate(endpoint, Violation::Operation(code)),
            Outcome::Received(length) => {
                let Work::Receive(slot) = work else { return };
                self.receive_message(endpoint, slot, length);
            }
            Outcome::Immediate(count) => {
                let Work::Receive(slot) = work else { return };
                let now = clock::now();
                let result = endpoint.own().session.immediate(count, endpoint.inbound(), now);
                match result {
                    Ok(()) => {
                        self.post_again(endpoint, slot);
                        // The sooner the better: the peer has nowhere to write to.
                        self.attempt(endpoint, endpoint.announce_if_full());
                    }
                    Err(violation) => self.violate(endpoint, violation),
                }
                self.mark_if_ready(endpoint);
            }
            Outcome::Sent => match work {
                Work::Payload(sequence) => {
                    endpoint.payload_completed((sequence + 1) & 0x00ff_ffff);
                    endpoint.own().session.heard(clock::now());
                    self.mark_if_ready(endpoint);
                }
                Work::Probe(sequence) => {
                    endpoint.payload_completed(sequence);
                    endpoint.own().session.probe_completed(clock::now());
                    self.mark_if_ready(endpoint);
                }
                Work::Control(slot) => {
                    endpoint.control_completed(slot);
                    self.attempt(endpoint, endpoint.send_answers());
                    self.attempt(endpoint, endpoint.announce_if_full());
                }
                Work::Receive(_) => {}
            },
        }
    }

    fn receive_message(&self, endpoint: &Arc<Endpoint>, slot: u16, length: u32) {
        let bytes = endpoint.received(slot, length);
        let reaction =
            endpoint.own().session.message(&bytes, slot, endpoint.outbound(), clock::now());
        match reaction {
            Ok(Reaction::Nothing) => self.post_again(endpoint, slot),
            Ok(Reaction::WindowOpened) => {
                METRICS.windows_sent.add(1);
                endpoint.activity().window_opened();
                self.post_again(endpoint, slot);
                if endpoint.own().session.handshake_completed_by_window() {
                    self.mark_ready(endpoint);
                }
                self.mark_if_ready(endpoint);
            }
            Ok(Reaction::AnswerDue) => self.attempt(endpoint, endpoint.send_answers()),
            Err(violation) => self.violate(endpoint, violation),
        }
    }

    fn post_again(&self, endpoint: &Arc<Endpoint>, slot: u16) {
        if endpoint.fate() == Fate::Alive {
            self.attempt(endpoint, endpoint.post_receive(slot));
        }
    }

    /// Ends the connection if something that it needs could not be posted.
    pub fn attempt(&self, endpoint: &Arc<Endpoint>, result: Result<(), Error>) {
        if let Err(error) = result {
            log::debug!("connection of {}: {error}", endpoint.peer_text());
            self.lose(endpoint, Fate::Gone, Reason::Error);
        }
    }

    /// Says why a connection is lost, unless many are.
    pub fn say_lost(&self, endpoint: &Endpoint, why: &str) {
        if let Some(more) = self.losses.open().open(clock::now()) {
            log::info!("connection of {} lost: {why}{more}", endpoint.peer_text());
        }
    }

    /// Says what befell a device or an address, unless much does.
    pub fn say_trouble(&self, level: log::Level, what: &str) {
        if let Some(more) = self.troubles.open().open(clock::now()) {
            log::log!(level, "{what}{more}");
        }
    }

    fn violate(&self, endpoint: &Arc<Endpoint>, violation: Violation) {
        if endpoint.fate() != Fate::Broken {
            METRICS.violated(&violation);
            if let Some(more) = self.violations.open().open(clock::now()) {
                let peer = endpoint.peer_text();
                log::warn!("client {peer} broke the protocol: {violation}{more}");
            }
        }
        self.lose(endpoint, Fate::Broken, Reason::Violation);
    }

    /// The connection is over for this reason; whoever has it is told.
    pub fn lose(&self, endpoint: &Arc<Endpoint>, fate: Fate, reason: Reason) {
        if fate > endpoint.fate() {
            endpoint.worsen(fate);
        }
        let mut own = endpoint.own();
        own.reason.get_or_insert(reason);
        let orphan = own.connection.is_null();
        drop(own);
        if orphan {
            // Not here: completions of this endpoint may stand further on in the batch.
            self.doomed.open().push(endpoint.key());
            if *self.passes.open() == 0 {
                self.wake_loop();
            }
        } else {
            self.mark_ready(endpoint);
        }
    }

    /// Serves every endpoint that is in the queue now, once.
    fn serve_ready(&self) -> usize {
        METRICS.passes.add(1);
        self.remove_doomed();
        let count = self.ready.open().len();
        let mut served = 0;
        for _ in 0..count {
            let Some(key) = self.ready.open().pop_front() else { break };
            let Some(endpoint) = self.find(key) else { continue };
            endpoint.own().queued = false;
            guard_endpoint("one endpoint", &endpoint, || self.serve(&endpoint));
            served += 1;
        }
        // What the handlers closed.
        self.remove_doomed();
        served
    }

    /// Removes the endpoints that were given up since the last time.
    fn remove_doomed(&self) {
        let doomed = std::mem::take(&mut *self.doomed.open());
        for key in doomed {
            if let Some(endpoint) = self.find(key) {
                self.remove(endpoint, Reason::Error);
            }
        }
    }

    fn serve(&self, endpoint: &Arc<Endpoint>) {
        let (connection, open) = {
            let own = endpoint.own();
            (own.connection, own.session.is_open())
        };
        if connection.is_null() {
            if open {
                self.hand_over(endpoint);
            }
            return;
        }
        // SAFETY: live, see `mark_if_ready`.
        if unsafe { (*connection).state() } == State::Connecting {
            if open || endpoint.fate() != Fate::Alive {
                outgoing::finish(endpoint);
            }
            return;
        }
        let before = endpoint.progress();
        // SAFETY: as above.
        let write_first = unsafe { has_write_barrier(connection) };
        let mut steps = [Self::call_read, Self::call_write];
        if write_first {
            steps.reverse();
        }
        for step in steps {
            step(self, endpoint);
            if endpoint.own().connection.is_null() {
                return;
            }
        }
        self.attempt(endpoint, endpoint.announce_if_full());
        if endpoint.has_work() {
            if endpoint.progress() != before {
                self.mark_ready(endpoint);
            } else {
                endpoint.own().parked = true;
                METRICS.parked.add(1);
            }
        }
    }

    fn call_read(&self, endpoint: &Arc<Endpoint>) {
        loop {
            let connection = endpoint.own().connection;
            if connection.is_null() || !endpoint.is_readable() {
                return;
            }
            // SAFETY: live, see `mark_if_ready`; no cell is open during the call.
            unsafe {
                let base = &*connection;
                let handler = match (base.read_handler, endpoint.fate()) {
                    (None, Fate::Alive) => return,
                    // Nobody reads: let the writer find out.
                    (None, _) => {
                        base.set_state(State::Closed);
                        base.write_handler
                    }
                    (handler, _) => handler,
                };
                if handler.is_none() || !call_handler(connection, handler) {
                    return;
                }
            }
            // The test feature brings back what this transport exists to avoid.
            if cfg!(not(feature = "test-no-deferral")) {
                return;
            }
        }
    }

    fn call_write(&self, endpoint: &Arc<Endpoint>) {
        let connection = endpoint.own().connection;
        if connection.is_null() {
            return;
        }
        // SAFETY: live, see `mark_if_ready`; no cell is open during the call.
        unsafe {
            let handler = (*connection).write_handler;
            if handler.is_some() && endpoint.is_writable() {
                let main = crate::host::main_cell::is_main_thread();
                if main { &METRICS.resumptions_main } else { &METRICS.resumptions_io }.add(1);
                call_handler(connection, handler);
            }
        }
    }

    /// The handshake is complete: makes the endpoint a connection of the server.
    fn hand_over(&self, endpoint: &Arc<Endpoint>) {
        let transport = Transport::get();
        let connection = RdmaConnection::create(transport.kind(), State::Accepting);
        // SAFETY: just made, nobody else's yet.
        unsafe {
            if !(*connection).has_descriptor() {
                listener::refused(&endpoint.peer_text(), "no descriptor left");
                METRICS.refused_descriptors.add(1);
                RdmaConnection::free(connection);
                self.lose(endpoint, Fate::Gone, Reason::Server);
                return;
            }
            (*connection).endpoint = Some(Arc::clone(endpoint));
        }
        endpoint.own().connection = connection.cast();
        endpoint.enter_stage(Some(Stage::Established));
        METRICS.connections_accepted.add(1);
        let ip = endpoint.peer().map_or_else(String::new, |peer| peer.ip().to_string());
        let ip = CString::new(ip).expect("an address has no NUL");
        *self.accepting.open() = Some(Arc::clone(endpoint));
        // SAFETY: of our type and accepting; the server only reads the text.
        unsafe { transport.symbols.accept_common(connection.cast(), ip.as_ptr().cast_mut()) };
        *self.accepting.open() = None;
        self.mark_if_ready(endpoint);
    }

    /// The server has a new client, of whatever connection type.
    pub fn client_connected(&self, client: u64) {
        // The server says so while it accepts, so it is the one that is being accepted.
        if let Some(endpoint) = self.accepting.open().take() {
            endpoint.own().client = Some(client);
        }
    }

    /// Lets go of descriptors that fire with a device's and were not needed since the
    /// last call, or of all. Slow clock.
    pub fn shrink_echoes(&self, all: bool) {
        self.echoes.open().shrink(all);
    }

    /// Handles what happened to connections.
    fn run_connection_events(&self) {
        let _pass = self.pass();
        for _ in 0..EVENTS_PER_GO {
            match self.channel.next() {
                Ok(Some(event)) => self.connection_event(event),
                Ok(None) => break,
                Err(error) => {
                    self.say_trouble(Level::Warn, &error.to_string());
                    break;
                }
            }
        }
        self.serve_ready();
    }

    fn connection_event(&self, event: Event) {
        let key = self.table.open().by_id.get(&event.id).copied();
        let Some(endpoint) = key.and_then(|key| self.find(key)) else {
            outgoing::event(event);
            return;
        };
        match event.kind {
            EventKind::Established => {
                endpoint.established();
                let complete = endpoint.own().session.establish();
                self.attempt(&endpoint, endpoint.announce_if_full());
                if complete {
                    self.mark_ready(&endpoint);
                }
            }
            EventKind::Disconnected | EventKind::TimewaitExit => {
                // What it sent before it left is still to be read.
                let hubs = self.hubs.open().clone();
                for hub in &hubs {
                    self.take_completions(hub, Which::All);
                }
                endpoint.own().reason.get_or_insert(Reason::Client);
                self.lose(&endpoint, Fate::Gone, Reason::Client);
            }
            EventKind::Failed | EventKind::Rejected => {
                let why = format!("it could not be established (status {})", event.status);
                // Negative statuses are error numbers, others a peer's reasons to reject.
                if event.status < 0 {
                    endpoint.own().failure = -event.status;
                }
                self.say_lost(&endpoint, &why);
                self.lose(&endpoint, Fate::Gone, Reason::Error);
            }
            EventKind::DeviceRemoval => {
                let what = format!("device of the connection of {} removed", endpoint.peer_text());
                self.say_trouble(Level::Warn, &what);
                self.lose(&endpoint, Fate::Gone, Reason::Error);
            }
            EventKind::AddressChange => {
                let what = format!("address of the connection of {} changed", endpoint.peer_text());
                self.say_trouble(Level::Info, &what);
            }
            EventKind::AddressResolved
            | EventKind::RouteResolved
            | EventKind::ConnectRequest
            | EventKind::Other => {}
        }
    }

    /// The server closed the connection of `endpoint`: what it had written is still
    /// delivered.
    pub fn close(&self, endpoint: &Arc<Endpoint>) {
        endpoint.enter_stage(Some(Stage::Lingering));
        let quiet = endpoint.is_quiet() && endpoint.is_delivered();
        let alive = endpoint.fate() == Fate::Alive;
        {
            let mut own = endpoint.own();
            own.connection = std::ptr::null_mut();
            own.watch.since = clock::now();
            own.session.close(quiet || !alive, clock::now());
            if alive {
                own.reason.get_or_insert(Reason::Server);
            }
        }
        if quiet || !alive {
            self.doomed.open().push(endpoint.key());
            if *self.passes.open() == 0 {
                self.wake_loop();
            }
        } else {
            clock::attend(endpoint);
        }
    }

    /// Handles what happened to connections and what completed, without calling any
    /// handler: for calls of the server that block, and for the clock. What became
    /// ready is served in a pass afterwards.
    pub fn run_quietly(&self) {
        while let Ok(Some(event)) = self.channel.next() {
            self.connection_event(event);
        }
        let hubs = self.hubs.open().clone();
        for hub in hubs {
            hub.doubt();
            self.look_at(&hub);
        }
    }

    /// Takes what completed on the queues of a hub that fired, without calling any handler.
    fn look_at(&self, hub: &Hub) {
        self.take_events(hub);
        self.arm(hub);
        self.take_completions(hub, Which::Fired);
    }

    fn take_events(&self, hub: &Hub) {
        hub.take_events();
        hub.pace().taken();
    }

    /// What completes from here on fires the descriptor again; what completed before is to
    /// be taken now.
    fn arm(&self, hub: &Hub) {
        if let Err(error) = hub.arm() {
            self.say_trouble(Level::Error, &format!("device {}: {error}", hub.name()));
        }
    }

    /// The descriptors that become readable when [`run_quietly`](Self::run_quietly)
    /// has something to do.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let hubs = self.hubs.open();
        std::iter::once(self.channel.fd()).chain(hubs.iter().map(|hub| hub.fd())).collect()
    }

    fn clear_wake(&self) {
        *self.awake.open() = false;
        let mut value: u64 = 0;
        // SAFETY: eight bytes into a u64; an empty eventfd answers EAGAIN.
        unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut value).cast(), 8) };
    }
}

/// A pass that is going on.
struct Pass<'a>(&'a Poller);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        *self.0.passes.open() -= 1;
    }
}

unsafe extern "C" fn on_wake(_fd: c_int, _data: *mut c_void, _mask: c_int) {
    guard("wake-up", (), || {
        let poller = &Transport::get().poller;
        poller.clear_wake();
        let _pass = poller.pass();
        poller.serve_ready();
    });
}

unsafe extern "C" fn on_connection_event(_fd: c_int, _data: *mut c_void, _mask: c_int) {
    guard("connection event", (), || Transport::get().poller.run_connection_events());
}

unsafe extern "C" fn on_completions(_fd: c_int, data: *mut c_void, _mask: c_int) {
    guard("completion", (), || {
        let poller = &Transport::get().poller;
        let hub = poller.hubs.open().get(data as usize).cloned();
        if let Some(hub) = hub {
            poller.run_completions(&hub);
        }
    });
}
