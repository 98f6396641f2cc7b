// SPDX-License-Identifier: BSD-3-Clause
//! Listening and accepting.
//!
//! The server keeps one `connListener` for our type: addresses and a port go in,
//! descriptors come out, on which it calls our accept handler. What it gets are
//! *copies* of the event channels' descriptors: it may deregister and close them
//! by its own functions, at a rebind, at shutdown, in 8.0 which knows no other way,
//! and nothing of ours is closed by that. So a change of port or address that can't be
//! had leaves what was listened on: it is only given to the server again.

use crate::config::Settings;
use crate::conntype::address::resolve;
use crate::conntype::listen_error::{Devices, ListenError};
use crate::conntype::relisten;
use crate::endpoint::{Endpoint, NoMemory};
use crate::host::layout::{ConnectionType90, Listener81, MAX_BINDS, RdmaSettings};
use crate::host::main_cell::MainPtr;
use crate::host::symbols::Symbols;
use crate::host::{Line, MainCell};
use crate::log_limit::LogLimiter;
use crate::metrics::METRICS;
use crate::poller::Poller;
use once_cell::sync::OnceCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use verbs::Error;
use verbs::cm::{EventChannel, EventKind, Id, IdKey};
use verbs::device::Device;

/// Connection requests that wait in the kernel; it caps the number itself.
const BACKLOG: i32 = 1024;
/// Events of a listener handled in one go, as many as the server accepts of others.
const EVENTS_PER_GO: usize = 10;

/// What the server listens on when it is told no address.
const EVERYWHERE: [&str; 2] = ["*", "-::*"];

/// The server's listener of our type. Main thread.
#[derive(Debug)]
pub struct Listening {
    line: Line,
    pub(super) symbols: Symbols,
    pub(super) settings: Arc<MainCell<Settings>>,
    pub(super) poller: &'static Poller,
    listeners: MainCell<Listeners>,
    pub(super) refusals: MainCell<LogLimiter>,
    /// The registered `ConnectionType`.
    kind: OnceCell<MainPtr<c_void>>,
    /// The endpoint whose connection the server accepts at this moment.
    pub(super) accepting: MainCell<Option<Arc<Endpoint>>>,
}

static LISTENING: OnceCell<Listening> = OnceCell::new();

/// What is listened on. Main thread.
#[derive(Debug)]
struct Listeners {
    open: Vec<Listener>,
    /// What the module itself was told, by its arguments or, on 8.0, by its settings:
    /// what counts where no directive of the server's does.
    own_bind: Vec<String>,
    own_port: u16,
    /// Whether that is what is listened on.
    by_own: bool,
    /// Whether the next `listen` is for that, and not for a directive.
    next_by_own: bool,
    /// Whether it was tried that a first client can be served.
    memory_tried: bool,
    /// What `bindaddr` of the server's structure points to, for `INFO`.
    pointers: Box<[MainPtr<c_char>; MAX_BINDS]>,
}

#[derive(Debug)]
struct Listener {
    /// None while the device of its address is gone.
    id: Option<Arc<Id>>,
    channel: Arc<EventChannel>,
    address: SocketAddr,
    /// The address in the operator's words.
    name: CString,
    /// The number of the descriptor that the server has, or −1.
    given: RawFd,
}

impl Listeners {
    /// Nothing is listened on yet.
    fn new(settings: &Settings) -> Self {
        Self {
            open: Vec::new(),
            own_bind: settings.bind.clone(),
            own_port: settings.port,
            by_own: false,
            next_by_own: false,
            memory_tried: false,
            pointers: Box::new([MainPtr::null(); MAX_BINDS]),
        }
    }

    /// The device of a listener was removed, and the listener with it. Its descriptor, which
    /// the server has, is good for the next one.
    fn lose(&mut self, id: IdKey, poller: &Poller) {
        let lost = |listener: &&mut Listener| listener.id.as_ref().is_some_and(|it| it.key() == id);
        if let Some(listener) = self.open.iter_mut().find(lost) {
            listener.stop();
            let what = format!(
                "the RDMA device of {} was removed: listening there again as soon as it is back",
                listener.address
            );
            poller.say_trouble(log::Level::Warn, &what);
            relisten::begin(listen_again);
        }
    }

    /// Tries to listen where a device was removed. Returns whether that is to be tried again.
    fn listen_again(&mut self, poller: &Poller) -> bool {
        let mut waiting = false;
        for listener in self.open.iter_mut().filter(|listener| listener.id.is_none()) {
            match listener.start() {
                Ok(()) => {
                    let what = format!("listening on {} again", listener.address);
                    poller.say_trouble(log::Level::Info, &what);
                }
                Err(error) => {
                    log::debug!("not listening on {} yet: {error}", listener.address);
                    waiting = true;
                }
            }
        }
        waiting
    }

    /// Gives the server a descriptor of each listener.
    ///
    /// # Errors
    /// If none is left; then the server has none of them.
    ///
    /// # Safety
    /// `listener` is the server's own, of our type.
    unsafe fn give(&mut self, listener: *mut Listener81) -> Result<(), ListenError> {
        let copies = self.open.iter().map(|it| duplicate(it.channel.fd()));
        let copies = copies.collect::<Result<Vec<_>, _>>().map_err(ListenError::Descriptor)?;
        for (index, (ours, copy)) in self.open.iter_mut().zip(copies).enumerate() {
            ours.given = copy.into_raw_fd();
            self.pointers[index] = MainPtr(ours.name.as_ptr().cast_mut());
            // SAFETY: by the caller's promise; there are no more than the server has room
            // for.
            unsafe { (&raw mut (*listener).fd).cast::<c_int>().add(index).write(ours.given) };
        }
        // SAFETY: as above. `INFO` prints `bindaddr` for each descriptor, so it must name
        // what is listened on; the server frees none of it.
        unsafe {
            (*listener).count = self.open.len() as c_int;
            (*listener).bindaddr = (&raw mut *self.pointers).cast();
            (*listener).bindaddr_count = (*listener).count;
        }
        Ok(())
    }

    /// Listens on `binds` and nothing else. What is listened on already goes on without a
    /// gap.
    ///
    /// # Errors
    /// Why not all could be had. Then it listens where it did before.
    fn change(&mut self, binds: &[String], port: u16) -> Result<(), ListenError> {
        // The server has closed its descriptors: their numbers are free for others.
        self.open.iter_mut().for_each(|it| it.given = -1);
        let mut change = Change::default();
        let result = self.choose(binds, port, &mut change);
        let Change { opened, aside, chosen } = change;
        if result.is_err() {
            drop(opened);
            self.restore(aside);
        } else {
            let all = std::mem::take(&mut self.open).into_iter().chain(opened);
            let mut all: Vec<_> = all.filter(|it| chosen.contains(&it.address)).collect();
            all.sort_by_key(|it| chosen.iter().position(|address| *address == it.address));
            self.open = all;
        }
        result
    }

    /// Opens what is missing, and says which addresses are wanted.
    ///
    /// # Errors
    /// Of the first that can't be had.
    fn choose(
        &mut self,
        binds: &[String],
        port: u16,
        change: &mut Change,
    ) -> Result<(), ListenError> {
        for bind in binds {
            let (optional, name) = match bind.strip_prefix('-') {
                Some(rest) => (true, rest),
                None => (false, bind.as_str()),
            };
            match self.find_or_open(name, port, change) {
                Ok(address) => change.chosen.push(address),
                Err(why) if optional => {
                    log::debug!("not listening on {name} port {port}, which is optional: {why}");
                }
                Err(why) => return Err(ListenError::Address(name.to_owned(), port, why.into())),
            }
        }
        if change.chosen.is_empty() {
            return Err(ListenError::NoneOptional(Devices::now()));
        }
        if !self.memory_tried {
            if change.opened.iter().any(|it| it.device().is_none()) {
                try_all_devices()?;
            }
            self.memory_tried = true;
        }
        Ok(())
    }

    /// The address of a name, which is listened on if it was not.
    ///
    /// # Errors
    /// Why it is not.
    fn find_or_open(
        &mut self,
        name: &str,
        port: u16,
        change: &mut Change,
    ) -> Result<SocketAddr, ListenError> {
        let address = resolve(name, port).map_err(ListenError::Resolve)?;
        if change.chosen.contains(&address) {
            return Err(ListenError::Twice);
        }
        if self.open.iter().any(|it| it.address == address) {
            return Ok(address);
        }
        let channel = Arc::new(EventChannel::new().map_err(ListenError::Verbs)?);
        let id = listening(&channel, address).or_else(|error| {
            // All addresses and one of them can't be listened on at a time; the kernel has
            // either word for it.
            let taken = matches!(error.errno, libc::EADDRINUSE | libc::EADDRNOTAVAIL);
            if taken && self.make_room(address, change) {
                listening(&channel, address)
            } else {
                Err(error)
            }
        });
        let id = id.map_err(|error| match error.errno {
            libc::EADDRINUSE => ListenError::Verbs(error),
            _ => ListenError::Device(error, Devices::now()),
        })?;
        if let (Some(device), false) = (id.device(), self.memory_tried) {
            Endpoint::try_memory(&device)?;
        }
        let name = CString::new(name).unwrap_or_default();
        change.opened.push(Listener { id: Some(id), channel, address, name, given: -1 });
        Ok(address)
    }

    /// Stops listening where all addresses and one of them are in each other's way, and it is
    /// not wanted any more. Returns whether that changed anything.
    fn make_room(&mut self, address: SocketAddr, change: &mut Change) -> bool {
        let unwanted = |it: &mut Listener| {
            it.address.port() == address.port()
                && (it.address.ip().is_unspecified() || address.ip().is_unspecified())
                && it.id.is_some()
                && !change.chosen.contains(&it.address)
        };
        let before = change.aside.len();
        change.aside.extend(self.open.extract_if(.., unwanted));
        change.aside[before..].iter_mut().for_each(Listener::stop);
        change.aside.len() > before
    }

    /// Listens again where it made room for a change that failed.
    fn restore(&mut self, aside: Vec<Listener>) {
        for mut listener in aside {
            if let Err(error) = listener.start() {
                log::error!("not listening on {} for now: {error}", listener.address);
                relisten::begin(listen_again);
            }
            self.open.push(listener);
        }
    }
}

/// A change of what is listened on, while it is tried.
#[derive(Default)]
struct Change {
    opened: Vec<Listener>,
    /// What made room for others.
    aside: Vec<Listener>,
    /// The addresses that are wanted and listened on.
    chosen: Vec<SocketAddr>,
}

impl Listener {
    /// The device of its address; none where it listens on all.
    fn device(&self) -> Option<Device> {
        self.id.as_ref().and_then(Id::device)
    }

    /// Listens no more, for the time being.
    fn stop(&mut self) {
        self.id = None;
        METRICS.listeners_waiting.add(1);
    }

    /// Listens again.
    ///
    /// # Errors
    /// As the connection manager's.
    fn start(&mut self) -> Result<(), Error> {
        self.id = Some(listening(&self.channel, self.address)?);
        METRICS.listeners_waiting.sub(1);
        Ok(())
    }
}

/// Whether a client could be served by one device at least. What the others lack is said.
///
/// # Errors
/// Of the first, if none can.
fn try_all_devices() -> Result<(), NoMemory> {
    let (mut fit, mut unfit) = (false, Vec::new());
    for device in Device::all() {
        match Endpoint::try_memory(&device) {
            Ok(()) => fit = true,
            Err(why) => unfit.push(why),
        }
    }
    if !fit && !unfit.is_empty() {
        return Err(unfit.swap_remove(0));
    }
    unfit.iter().for_each(|why| log::warn!("{why}"));
    Ok(())
}

/// An attempt to listen where a device was removed. Returns whether that is to be tried again.
fn listen_again() -> bool {
    let listening = Listening::get();
    listening.listeners.borrow_mut().listen_again(listening.poller)
}

impl Listening {
    /// Makes the process's only one, while the module loads. Nothing is listened on yet.
    pub fn start(
        line: Line,
        symbols: Symbols,
        settings: Arc<MainCell<Settings>>,
        poller: &'static Poller,
    ) -> &'static Self {
        let listeners = MainCell::new(Listeners::new(&settings.borrow_mut()));
        LISTENING.get_or_init(|| Self {
            line,
            symbols,
            settings,
            poller,
            listeners,
            refusals: MainCell::new(LogLimiter::new(1)),
            kind: OnceCell::new(),
            accepting: MainCell::default(),
        })
    }

    /// The process's only one, for functions that the server calls.
    ///
    /// # Panics
    /// Before [`start`](Self::start).
    pub fn get() -> &'static Self {
        LISTENING.get().expect("the module is loaded")
    }

    /// The server's line.
    pub fn line(&self) -> Line {
        self.line
    }

    /// The registered `ConnectionType`.
    pub fn kind(&self) -> *const c_void {
        self.kind.get().expect("the type is registered").0
    }

    /// The addresses that are listened on.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.listeners.borrow_mut().open.iter().map(|listener| listener.address.ip()).collect()
    }

    /// Addresses and port of the module's own settings.
    pub fn own(&self) -> (Vec<String>, u16) {
        let listeners = self.listeners.borrow_mut();
        (listeners.own_bind.clone(), listeners.own_port)
    }

    /// Tells the module to listen on other addresses, or on another port, from the next
    /// [`reopen`](Self::reopen) on. Returns what it was told before.
    pub fn set_own(&self, bind: Option<Vec<String>>, port: Option<u16>) -> (Vec<String>, u16) {
        let before = self.own();
        let mut listeners = self.listeners.borrow_mut();
        listeners.own_bind = bind.unwrap_or_else(|| before.0.clone());
        listeners.own_port = port.unwrap_or(before.1);
        before
    }

    /// Tells the server, while we are loaded, what to listen on.
    ///
    /// # Safety
    /// `listener` is the server's own, of our registered type.
    pub unsafe fn configure(&self, listener: *mut Listener81, kind: *mut c_void) {
        let _ = self.kind.set(MainPtr(kind));
        let mut listeners = self.listeners.borrow_mut();
        if listeners.own_port == 0 {
            return;
        }
        listeners.next_by_own = true;
        let port = listeners.own_port;
        // SAFETY: by the caller's promise. The addresses are not given here: `listen`
        // takes them from the arguments.
        unsafe {
            (*listener).ct = kind;
            (*listener).port = c_int::from(port);
        }
    }

    /// `ConnectionType.listen`.
    ///
    /// # Safety
    /// `listener` is the server's own, of our type.
    pub unsafe fn listen(&self, listener: *mut Listener81) -> bool {
        let was_by_own = self.listeners.borrow_mut().by_own;
        // SAFETY: by the caller's promise.
        let result = unsafe { self.listen_as_told(listener) };
        if let Err(why) = &result {
            log::error!("{why}");
            // After a setting that did not work the server goes back to the one before. Until
            // then `INFO` shows what is listened on, and `close` is called: if the module's own
            // port is in use, which to the server is port 0, that one sees to the rest.
            let mut listeners = self.listeners.borrow_mut();
            listeners.by_own = was_by_own;
            // SAFETY: as above.
            if let Err(why) = unsafe { listeners.give(listener) } {
                log::error!("{why}");
            }
        }
        result.is_ok()
    }

    /// Listens on what the server or the module was told.
    ///
    /// # Errors
    /// Why not. What was listened on before is listened on still.
    ///
    /// # Safety
    /// As [`listen`].
    unsafe fn listen_as_told(&self, listener: *mut Listener81) -> Result<(), ListenError> {
        // SAFETY: by the caller's promise; the fields are those of all lines.
        let (port, server_binds) = unsafe { ((*listener).port, self.server_binds(listener)) };
        // SAFETY: as above.
        let core = unsafe { self.core_settings(listener) };
        let mut listeners = self.listeners.borrow_mut();
        listeners.by_own = std::mem::take(&mut listeners.next_by_own) && core.is_none();
        if core.is_some() && listeners.own_port != 0 {
            log::info!(
                "the directive rdma-port ({port}) wins over the module's argument port={}",
                listeners.own_port
            );
        }
        if let Some((rx_size, vector)) = core {
            let mut settings = self.settings.borrow_mut();
            settings.rx_size = rx_size;
            settings.completion_vector = vector;
        }
        if port == 0 {
            return Ok(());
        }
        let binds = if !server_binds.is_empty() {
            server_binds
        } else if !listeners.own_bind.is_empty() {
            listeners.own_bind.clone()
        } else {
            EVERYWHERE.map(str::to_owned).to_vec()
        };
        listeners.change(&binds, port as u16)?;
        // SAFETY: as above.
        unsafe { listeners.give(listener) }
    }

    /// The addresses that the server was told, unless they are our own names.
    ///
    /// # Safety
    /// As [`listen`].
    unsafe fn server_binds(&self, listener: *mut Listener81) -> Vec<String> {
        let listeners = self.listeners.borrow_mut();
        // SAFETY: `bindaddr` has `bindaddr_count` strings, or is our own array.
        unsafe {
            let array = (*listener).bindaddr;
            let own: *const *mut c_char = (&raw const *listeners.pointers).cast();
            if array.is_null() || std::ptr::eq(array.cast_const(), own) {
                return Vec::new();
            }
            let count = (*listener).bindaddr_count.clamp(0, MAX_BINDS as c_int) as usize;
            (0..count)
                .map(|index| *array.add(index))
                .filter(|text| !text.is_null())
                .map(|text| CStr::from_ptr(text).to_string_lossy().into_owned())
                .collect()
        }
    }

    /// Receive size and completion vector of the core's own settings, if the listener
    /// has them: only where the line knows the directives, and `rdma-port` was set when
    /// the server started.
    ///
    /// # Safety
    /// As [`listen`].
    unsafe fn core_settings(&self, listener: *mut Listener81) -> Option<(u32, i32)> {
        if !self.line.has_directives() {
            return None;
        }
        // SAFETY: the line's listener has `priv`, null or the core's settings.
        let settings: *const RdmaSettings = unsafe { (*listener).private }.cast();
        if settings.is_null() {
            return None;
        }
        // SAFETY: as above.
        let (rx_size, vector) = unsafe { ((*settings).rx_size, (*settings).completion_vector) };
        let rx_size = u64::try_from(rx_size).ok().and_then(crate::config::receive_size)?;
        crate::config::COMPLETION_VECTOR.contains(&i64::from(vector)).then_some((rx_size, vector))
    }

    /// Listens on what the module was told by now. Returns whether that worked.
    ///
    /// # Safety
    /// Main thread, after registration.
    pub unsafe fn reopen(&self) -> bool {
        let listener = self.symbols.listener();
        let port = {
            let mut listeners = self.listeners.borrow_mut();
            listeners.next_by_own = true;
            listeners.own_port
        };
        // SAFETY: the server's own listener. Without addresses of the server's, `listen`
        // takes the module's.
        unsafe {
            (*listener).ct = self.kind();
            (*listener).port = c_int::from(port);
            (*listener).bindaddr_count = 0;
            let changed = self.symbols.change_listener(listener);
            if port == 0 {
                self.listeners.borrow_mut().open.clear();
            }
            changed
        }
    }

    /// `ConnectionType.closeListener`, of 8.1 and on.
    ///
    /// # Safety
    /// `listener` is the server's own, of our type.
    pub unsafe fn close(&self, listener: *mut Listener81) {
        // SAFETY: 8.1's table and 9.0's agree up to this member, which only wants the
        // listener's descriptors: it deregisters and closes them.
        unsafe {
            let tcp: *const ConnectionType90 = self.symbols.tcp_table().cast();
            if let Some(close_listener) = (*tcp).close_listener {
                close_listener(listener);
            }
        }
        // SAFETY: by the caller's promise. A port of 0 comes here for two reasons: the
        // operator set rdma-port to 0, or set rdma-bind while rdma-port was 0 all along
        // and the arguments' port is in use. The second must not stop us listening. Where there
        // is a port the server calls `listen` next, which sees what of the old ones is wanted.
        unsafe {
            let mut listeners = self.listeners.borrow_mut();
            if (*listener).port == 0 && listeners.by_own {
                (*listener).port = c_int::from(listeners.own_port);
                listeners.next_by_own = true;
            } else if (*listener).port == 0 {
                listeners.open.clear();
            }
        }
    }

    /// `ConnectionType.accept_handler`: connection requests of one listener.
    pub fn on_readable(&self, fd: RawFd) {
        for _ in 0..EVENTS_PER_GO {
            let channel = {
                let listeners = self.listeners.borrow_mut();
                let Some(listener) = listeners.open.iter().find(|l| l.given == fd) else { return };
                Arc::clone(&listener.channel)
            };
            match channel.next() {
                Ok(Some(event)) => match event.kind {
                    EventKind::ConnectRequest => {
                        // SAFETY: a request of this channel that nobody took over yet.
                        self.accept(unsafe { Id::from_request(event.id, &channel) });
                    }
                    EventKind::DeviceRemoval => {
                        self.listeners.borrow_mut().lose(event.id, self.poller)
                    }
                    EventKind::AddressChange => {
                        let what = "the address of a listener changed";
                        self.poller.say_trouble(log::Level::Info, what);
                    }
                    other => log::debug!("listener: {other:?}, status {}", event.status),
                },
                Ok(None) => return,
                Err(error) => {
                    self.poller.say_trouble(log::Level::Warn, &format!("listener: {error}"));
                    return;
                }
            }
        }
    }
}

/// An id that listens, and tells the channel.
fn listening(channel: &Arc<EventChannel>, address: SocketAddr) -> Result<Arc<Id>, Error> {
    let id = Arc::new(Id::new(channel)?);
    id.listen(address, BACKLOG)?;
    Ok(id)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.id.is_none() {
            METRICS.listeners_waiting.sub(1);
        }
    }
}

/// Another descriptor of the same.
fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: an open descriptor of a channel that outlives this call.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
