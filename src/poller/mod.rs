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
//!
//! Here is when a pass takes place. What it finds is in `completions` and `cm_events`, whom it
//! calls in `serving`, how connections end in `endings`, and which there are in `registry`. The
//! devices are in `devices`, and what they tell in `device_events`.

mod cm_events;
mod completions;
pub mod connection;
mod device_events;
mod devices;
mod elsewhere;
mod endings;
pub mod exit;
mod receives;
mod registry;
pub mod serving;
mod teardown;
mod timers;
mod unfit;
mod waiting;
mod wakeup_fds;
mod watchdog;

use self::cm_events::on_connection_event;
use self::elsewhere::Elsewhere;
use self::timers::Timers;
pub use self::timers::again;
use self::wakeup_fds::WakeupFds;
use crate::config::Settings;
use crate::device::{SharedDevice, Which};
use crate::endpoint::place::{self, Place};
use crate::endpoint::wr_id::EndpointId;
use crate::endpoint::{Endpoint, Plan};
use crate::host::{MainCell, api};
use crate::log_limit::LogLimiter;
use crate::metrics::METRICS;
use crate::panic::guard;
use crate::time;
use log::Level;
use once_cell::sync::OnceCell;
use proto::buffer_size;
use proto::session::Millis;
use redis_module::raw;
use registry::Registry;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use verbs::Error;
use verbs::cm::{Event, EventChannel, Id, IdKey};
use verbs::device::Facts;

/// Connection manager events handled in one go, so that a storm of connects leaves
/// the event loop its turn.
const EVENTS_PER_GO: usize = 32;

/// Ends that one pass sees to: the rest has its turn in the next one, right after this.
const ENDINGS_PER_PASS: usize = 64;

/// Lost connections that are logged in a minute; as many violations, and as many lines
/// about devices and addresses.
const LOSSES_PER_MINUTE: u32 = 30;

/// All endpoints with their devices, the queue of those that are ready, and what is registered
/// with the event loop. Main thread only, all of it.
#[derive(Debug)]
pub struct Poller {
    /// Those with connections, or that had some; see `Poller::retire`.
    devices: MainCell<Vec<Arc<SharedDevice>>>,
    /// Devices that were opened so far.
    devices_opened: MainCell<usize>,
    /// Devices that were examined, each with whether it takes writes with immediate data.
    examined: MainCell<Vec<(Facts, bool)>>,
    registry: MainCell<Registry<IdKey, Arc<Endpoint>>>,
    ready: MainCell<VecDeque<EndpointId>>,
    doomed: MainCell<VecDeque<EndpointId>>,
    /// Endpoints whose peers have left, and how far their queues are to be looked at before
    /// that is said: what a peer sent before it left is still read.
    leaving: MainCell<Vec<(EndpointId, u64)>>,
    /// Depth of passes: the server may call us back from inside a handler.
    passes: MainCell<u32>,
    /// Readable while something is ready that no pass will find by itself.
    wake: OwnedFd,
    awake: MainCell<bool>,
    /// Connection manager events of all connections: an accepted connection
    /// inherits its listener's channel and is moved here, so that closing the
    /// listener does it no harm.
    channel: Arc<EventChannel>,
    /// A device had more completions than one pass takes.
    unfinished: MainCell<bool>,
    /// The server gave an I/O thread a job since the last pass before its sleep began.
    job_sent: MainCell<bool>,
    /// Passes before a sleep that are over: after each of them, and before anything else is
    /// written, the server syncs its append-only file if it has to.
    turn: MainCell<u64>,
    /// Whether the server syncs its append-only file before it replies.
    syncs_always: MainCell<bool>,
    wakeup_fds: MainCell<WakeupFds>,
    losses: MainCell<LogLimiter>,
    violations: MainCell<LogLimiter>,
    troubles: MainCell<LogLimiter>,
    nudges: MainCell<LogLimiter>,
    timers: MainCell<Timers>,
    elsewhere: Elsewhere,
    settings: Arc<MainCell<Settings>>,
    upcalls: &'static dyn Upcalls,
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A client, to this server.
    Client,
    /// This server, to another.
    Server,
}

/// Calls from the poller to the connection type, which knows the server. Main thread, all of
/// them; no cell is borrowed during a call.
pub trait Upcalls: fmt::Debug + Send + Sync {
    /// The handshake of an accepted endpoint is complete: makes it a connection of the server.
    fn accepted(&self, poller: &Poller, endpoint: &Arc<Endpoint>);
    /// The handshake of an endpoint that this server opened is complete, or has failed.
    fn connected(&self, poller: &Poller, endpoint: &Arc<Endpoint>);
    /// An event of a connection without an endpoint: its address is being resolved.
    fn resolved(&self, poller: &Poller, event: Event);
    /// Once a second, while there are endpoints or [`needs_housekeeping`](Self::needs_housekeeping).
    fn housekeeping(&self, now: Millis);
    /// Whether the clock has to go on without endpoints.
    fn needs_housekeeping(&self) -> bool;
}

static POLLER: OnceCell<Poller> = OnceCell::new();

impl Poller {
    /// A poller without endpoints, not watched yet.
    ///
    /// # Errors
    /// If a descriptor can't be had, or the kernel has no RDMA connection manager.
    fn new(
        settings: Arc<MainCell<Settings>>,
        upcalls: &'static dyn Upcalls,
    ) -> Result<Self, Error> {
        // SAFETY: no pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(Error { action: "create an eventfd", errno });
        }
        Ok(Self {
            devices: MainCell::default(),
            devices_opened: MainCell::default(),
            examined: MainCell::default(),
            registry: MainCell::default(),
            ready: MainCell::default(),
            doomed: MainCell::default(),
            leaving: MainCell::default(),
            passes: MainCell::default(),
            // SAFETY: a new descriptor, nobody else's.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
            awake: MainCell::default(),
            channel: Arc::new(EventChannel::new()?),
            unfinished: MainCell::default(),
            job_sent: MainCell::default(),
            turn: MainCell::default(),
            syncs_always: MainCell::default(),
            wakeup_fds: MainCell::default(),
            losses: MainCell::new(LogLimiter::new(LOSSES_PER_MINUTE)),
            violations: MainCell::new(LogLimiter::new(LOSSES_PER_MINUTE)),
            troubles: MainCell::new(LogLimiter::new(LOSSES_PER_MINUTE)),
            nudges: MainCell::new(LogLimiter::new(watchdog::LINES_PER_MINUTE)),
            timers: MainCell::default(),
            elsewhere: Elsewhere::default(),
            settings,
            upcalls,
        })
    }

    /// Makes the process's poller; once, while the module loads.
    ///
    /// # Errors
    /// As `new`'s.
    pub fn start(
        settings: Arc<MainCell<Settings>>,
        upcalls: &'static dyn Upcalls,
    ) -> Result<&'static Self, Error> {
        POLLER.get_or_try_init(|| Self::new(settings, upcalls))
    }

    /// The process's poller, for functions that the server calls. What they call is given it.
    ///
    /// # Panics
    /// Before [`start`](Self::start).
    pub fn get() -> &'static Self {
        POLLER.get().expect("the module is loaded")
    }

    /// The module's settings.
    pub fn settings(&self) -> &MainCell<Settings> {
        &self.settings
    }

    fn timers(&self) -> &MainCell<Timers> {
        &self.timers
    }

    pub(super) fn upcalls(&self) -> &'static dyn Upcalls {
        self.upcalls
    }

    pub(super) fn log_nudge(&self, now: Millis, message: fmt::Arguments<'_>) {
        self.nudges.borrow_mut().log(now, Level::Warn, message);
    }

    /// The most descriptors that may fire for one device beside its own.
    pub fn allow_wakeup_fds(&self, most: usize) {
        self.wakeup_fds.borrow_mut().allow(most);
    }

    /// Whether the server syncs its append-only file before it replies.
    pub fn sync_always(&self, always: bool) {
        *self.syncs_always.borrow_mut() = always;
    }

    /// Registers with the event loop.
    pub fn watch(&self) -> bool {
        api::watch(self.wake.as_raw_fd(), on_wake, 0)
            && api::watch(self.channel.fd(), on_connection_event, 0)
    }

    /// The channel of connection manager events of connections.
    pub fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// Makes an endpoint for `id`, which `origin` opened, and enters it.
    ///
    /// # Errors
    /// If a part of it can't be had.
    pub fn enter(&self, id: Id, origin: Origin) -> Result<Arc<Endpoint>, Error> {
        let id = Arc::new(id);
        let entered = self.enter_on(self.device_of(&id)?, &id, origin);
        if entered.is_err() {
            // The id may hold the device open, and the peer would wait for an answer.
            id.reject();
        }
        entered
    }

    fn enter_on(
        &self,
        device: Arc<SharedDevice>,
        id: &Arc<Id>,
        origin: Origin,
    ) -> Result<Arc<Endpoint>, Error> {
        if !device.abilities().can_serve() {
            let action =
                "serve clients on its device, which refuses RDMA writes with immediate data";
            return Err(Error { action, errno: libc::EOPNOTSUPP });
        }
        teardown::help();
        let key = {
            let mut registry = self.registry.borrow_mut();
            place::vacated().into_iter().for_each(|key| registry.give_back(key));
            registry.reserve()
        };
        let key = key.ok_or(Error { action: "enter an endpoint", errno: libc::EMFILE })?;
        let (largest, timing, ack_timeout) = {
            let settings = self.settings.borrow_mut();
            (settings.rx_size, settings.timing, settings.ack_timeout)
        };
        if ack_timeout > 0 {
            self.set_ack_timeout(&device, id, ack_timeout);
        }
        let place = Place::new(key);
        let smallest = match origin {
            Origin::Client => buffer_size::FIRST.min(largest),
            // One size for good: a server with upstream's own module ends at the second.
            Origin::Server => largest,
        };
        let receive_sizes = smallest..=largest;
        let plan = Plan { key, place, receive_sizes, timing, now: time::now() };
        let endpoint = Arc::new(Endpoint::new(Arc::clone(id), device, plan)?);
        self.registry.borrow_mut().enter(key, endpoint.id_key(), Arc::clone(&endpoint));
        self.track_transient(&endpoint);
        Ok(endpoint)
    }

    /// The endpoint of a key, unless it is gone.
    pub fn find(&self, key: EndpointId) -> Option<Arc<Endpoint>> {
        self.registry.borrow_mut().find(key)
    }

    /// All endpoints there are.
    pub fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.registry.borrow_mut().all().cloned().collect()
    }

    /// The endpoint of the client that has this number at the server, if it is one of ours.
    pub fn find_client(&self, client: u64) -> Option<Arc<Endpoint>> {
        let is_it = |endpoint: &&Arc<Endpoint>| endpoint.main_state().client == Some(client);
        self.registry.borrow_mut().all().find(is_it).cloned()
    }

    /// How many endpoints there are.
    pub fn count(&self) -> usize {
        self.registry.borrow_mut().count()
    }

    /// Connections at this moment that are not the server's clients yet, or not any more.
    pub fn transients(&self) -> u64 {
        METRICS.connections_handshaking.get() + METRICS.connections_lingering.get()
    }

    /// Makes room for a newcomer in handshake where there are to be at most `most`
    /// transients: the one that has lingered longest is ended. `false` if none lingers.
    pub fn make_room(&self, most: u64) -> bool {
        if self.transients() < most {
            return true;
        }
        let Some(endpoint) = self.take_oldest_lingering() else { return false };
        METRICS.lingering_cut_short.add(1);
        self.doom(&endpoint);
        true
    }

    /// Begins a pass, which ends when the answer is dropped, by a panic too: who marks
    /// an endpoint as ready meanwhile need not wake the event loop.
    fn pass(&self) -> Pass<'_> {
        *self.passes.borrow_mut() += 1;
        Pass(self)
    }

    fn wake_loop(&self) {
        if !std::mem::replace(&mut *self.awake.borrow_mut(), true) {
            self.write_wake();
        }
    }

    /// Wakes the event loop. Any thread.
    fn write_wake(&self) {
        let one: u64 = 1;
        // SAFETY: eight bytes from a u64. The counter does not come near its end: each of those
        // who write waits for what the loop does then before it writes again.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Whether completions wait that the last pass did not take.
    pub fn is_behind(&self) -> bool {
        *self.unfinished.borrow_mut()
    }

    /// Whether the event loop must not sleep.
    pub fn is_pending(&self) -> bool {
        self.is_behind()
            || *self.job_sent.borrow_mut()
            || !self.ready.borrow_mut().is_empty()
            || !self.doomed.borrow_mut().is_empty()
    }

    /// The server gives an I/O thread a job.
    ///
    /// It looks for such jobs at the start of its `beforeSleep`, and if there are none it
    /// sleeps, with no descriptor that would tell it of their end. A handler called in the
    /// pass after that look may bring one: then the loop goes round once more.
    pub fn job_sent(&self) {
        *self.job_sent.borrow_mut() = true;
    }

    /// A pass over what is pending, before the server sleeps. Returns how many endpoints
    /// were served.
    pub fn run(&self) -> usize {
        let _pass = self.pass();
        self.tick_if_late();
        *self.job_sent.borrow_mut() = false;
        let unfinished = std::mem::take(&mut *self.unfinished.borrow_mut());
        for index in 0.. {
            // One that is retired meanwhile makes the others move up: the next pass has them.
            let Some(device) = self.nth_device(index) else { break };
            if !device.is_armed() {
                // First what is there, or the event would come at once.
                let found = self.take_completions(&device, Which::Fired) > 0;
                device.pace().looked_last(found);
                self.arm(&device);
                self.take_completions(&device, Which::Fired);
            } else if unfinished {
                self.take_completions(&device, Which::Fired);
            }
        }
        let served = if self.is_pending() { self.serve_ready() } else { 0 };
        *self.turn.borrow_mut() += 1;
        self.turn_elsewhere();
        served
    }

    /// A pass for the completions of one device.
    fn run_completions(&self, device: &Arc<SharedDevice>) {
        let _pass = self.pass();
        let patience = device.pace().patience(time::nanos());
        let left = patience.is_some_and(|deadline| {
            let found = self.wait_for_completions(device, deadline);
            device.pace().looked(found, time::nanos())
        });
        if !left {
            self.take_events(device);
            // As a rule not yet: what completes until the server sleeps is found then,
            // and no event has to be made for it.
            if device.pace().is_alone() {
                self.arm(device);
            }
            self.take_completions(device, Which::Fired);
        }
        if self.find_device(device.number()).is_some() {
            let busy = self.ready.borrow_mut().len();
            self.wakeup_fds.borrow_mut().grow(device.fd(), busy);
        }
        let served = self.serve_ready();
        device.pace().passed(served, time::nanos());
    }

    /// Gives back completion queues that are not needed any more. Housekeeping timer.
    pub fn shrink_queues(&self) {
        self.devices.borrow_mut().iter().for_each(|device| device.shrink());
    }

    /// Whether the housekeeping timer has something to look at.
    pub fn needs_clock(&self) -> bool {
        self.count() > 0 || self.devices.borrow_mut().iter().any(|device| device.is_shrinking())
    }

    /// Lets go of descriptors that fire with a device's and were not needed since the
    /// last call, or of all. Housekeeping timer.
    pub fn shrink_wakeup_fds(&self, all: bool) {
        self.wakeup_fds.borrow_mut().shrink(all);
    }

    /// Handles what happened to connections and what completed, up to the bound of a pass,
    /// without calling any handler: for calls of the server that block, and for the clock.
    /// Endpoints that became ready are served in a pass afterwards. Returns whether nothing was left.
    pub fn catch_up(&self) -> bool {
        let all = self.take_connection_events();
        // Every queue is looked at, whatever a pass left over.
        *self.unfinished.borrow_mut() = false;
        let devices = self.devices.borrow_mut().clone();
        for device in devices {
            device.doubt();
            self.look_at(&device);
        }
        all && !self.is_behind()
    }

    /// Takes what completed on the queues of a device that fired, without calling any handler.
    fn look_at(&self, device: &Arc<SharedDevice>) {
        self.take_events(device);
        self.arm(device);
        self.take_completions(device, Which::Fired);
    }

    fn take_events(&self, device: &Arc<SharedDevice>) {
        if let Err(error) = device.take_events() {
            self.retire(device, &error.to_string());
        }
        device.pace().taken();
    }

    /// What completes from here on fires the descriptor again; what completed before is to
    /// be taken now.
    fn arm(&self, device: &Arc<SharedDevice>) {
        if let Err(error) = device.arm() {
            self.retire(device, &error.to_string());
        }
    }

    /// The descriptors that become readable when [`catch_up`](Self::catch_up)
    /// has something to do.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let devices = self.devices.borrow_mut();
        std::iter::once(self.channel.fd()).chain(devices.iter().map(|device| device.fd())).collect()
    }

    fn clear_wake(&self) {
        *self.awake.borrow_mut() = false;
        let mut value: u64 = 0;
        // SAFETY: eight bytes into a u64; an empty eventfd answers EAGAIN.
        unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut value).cast(), 8) };
    }
}

/// A pass that is going on.
struct Pass<'a>(&'a Poller);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        *self.0.passes.borrow_mut() -= 1;
    }
}

unsafe extern "C" fn on_wake(_fd: c_int, _data: *mut c_void, _mask: c_int) {
    guard("wake-up", || {
        let poller = Poller::get();
        poller.clear_wake();
        let _pass = poller.pass();
        poller.announce_elsewhere();
        poller.serve_ready();
    });
}

unsafe extern "C" fn on_completions(_fd: c_int, data: *mut c_void, mask: c_int) {
    guard("completion", || {
        let poller = Poller::get();
        let Some(device) = poller.find_device(data as usize) else { return };
        // Nobody asked whether it is writable: so the event loop says that it is in error.
        if mask & raw::REDISMODULE_EVENTLOOP_WRITABLE as c_int != 0 {
            let _pass = poller.pass();
            poller.retire(&device, "its completion channel is closed");
            poller.serve_ready();
        } else {
            poller.run_completions(&device);
        }
    });
}
