// SPDX-License-Identifier: BSD-3-Clause
//! Listening and accepting.
//!
//! The server keeps one `connListener` for our type: addresses and a port go in,
//! descriptors come out, on which it calls our accept handler. What it gets are
//! *copies* of the event channels' descriptors: it may deregister and close them
//! by its own functions, at a rebind, at shutdown, in 8.0 which knows no other way,
//! and nothing of ours is closed by that.

use super::address::resolve;
use super::endpoint::{Endpoint, Reason};
use super::valve::Valve;
use super::{Transport, clock, relisten};
use crate::config::Settings;
use crate::host::layout::{ConnectionType91, EventLoop, Listener81, MAX_BINDS, RdmaSettings};
use crate::metrics::METRICS;
use crate::verbs::Error;
use crate::verbs::cm::{Device, EventChannel, EventKind, Id, IdKey};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

/// Connection requests that wait in the kernel; it caps the number itself.
const BACKLOG: i32 = 1024;
/// Events of a listener handled in one go, as many as the server accepts of others.
const EVENTS_PER_GO: usize = 10;

/// What the server listens on when it is told no address.
const EVERYWHERE: [&str; 2] = ["*", "-::*"];

/// State of the server's listener of our type. Main thread only.
#[derive(Debug)]
pub struct Listeners {
    open: Vec<Listener>,
    /// What the module itself was told, by its arguments or, on 8.0, by its settings:
    /// what counts where no directive of the server's does.
    pub own_bind: Vec<String>,
    pub own_port: u16,
    /// Whether that is what is listened on.
    by_own: bool,
    /// Whether the next `listen` is for that, and not for a directive.
    next_by_own: bool,
    /// The names that `bindaddr` of the server's structure points to, for `INFO`.
    names: Vec<CString>,
    pointers: Box<[*mut c_char; MAX_BINDS]>,
    refusals: Valve,
}

#[derive(Debug)]
struct Listener {
    // Before the channel, which must outlive its ids.
    /// None while the device of its address is gone.
    id: Option<Id>,
    channel: EventChannel,
    address: SocketAddr,
    /// The number of the descriptor that the server has.
    given: RawFd,
}

impl Listeners {
    /// Nothing is listened on yet.
    pub fn new(settings: &Settings) -> Self {
        Self {
            open: Vec::new(),
            own_bind: settings.bind.clone(),
            own_port: settings.port,
            by_own: false,
            next_by_own: false,
            names: Vec::new(),
            pointers: Box::new([std::ptr::null_mut(); MAX_BINDS]),
            refusals: Valve::new(1),
        }
    }

    /// The device of a listener was removed, and the listener with it. Its descriptor, which
    /// the server has, is good for the next one.
    fn lose(&mut self, id: IdKey) {
        let lost = |listener: &&mut Listener| listener.id.as_ref().is_some_and(|it| it.key() == id);
        if let Some(listener) = self.open.iter_mut().find(lost) {
            listener.id = None;
            METRICS.listeners_waiting.add(1);
            let what = format!(
                "the RDMA device of {} was removed: listening there again as soon as it is back",
                listener.address
            );
            Transport::get().poller.say_trouble(log::Level::Warn, &what);
            relisten::begin();
        }
    }

    /// Tries to listen where a device was removed. Returns whether that is to be tried again.
    pub fn listen_again(&mut self) -> bool {
        let mut waiting = false;
        for listener in self.open.iter_mut().filter(|listener| listener.id.is_none()) {
            match listening(&listener.channel, listener.address) {
                Ok(id) => {
                    listener.id = Some(id);
                    METRICS.listeners_waiting.sub(1);
                    let what = format!("listening on {} again", listener.address);
                    Transport::get().poller.say_trouble(log::Level::Info, &what);
                }
                Err(error) => {
                    log::debug!("not listening on {} yet: {error}", listener.address);
                    waiting = true;
                }
            }
        }
        waiting
    }

    /// Gives the server its descriptors, as many as there are names.
    ///
    /// # Safety
    /// `listener` is the server's own, of our type.
    unsafe fn give(&mut self, listener: *mut Listener81, descriptors: Vec<OwnedFd>) {
        let names: Vec<_> = self.names.iter().map(|name| name.as_ptr().cast_mut()).collect();
        self.pointers[..names.len()].copy_from_slice(&names);
        // SAFETY: by the caller's promise. `INFO` prints `bindaddr` for each descriptor,
        // so it must name what is listened on; the server frees none of it.
        unsafe {
            for (index, descriptor) in descriptors.into_iter().enumerate() {
                (&raw mut (*listener).fd)
                    .cast::<c_int>()
                    .add(index)
                    .write(descriptor.into_raw_fd());
                (*listener).count = index as c_int + 1;
            }
            (*listener).bindaddr = (&raw mut *self.pointers).cast();
            (*listener).bindaddr_count = (*listener).count;
        }
    }
}

/// Tells the server, while we are loaded, what to listen on.
///
/// # Safety
/// `listener` is the server's own, of our registered type.
pub unsafe fn configure(listener: *mut Listener81, kind: *const c_void) {
    let mut listeners = Transport::get().listeners.open();
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
pub unsafe fn listen(listener: *mut Listener81) -> bool {
    let was_by_own = Transport::get().listeners.open().by_own;
    // SAFETY: by the caller's promise.
    let result = unsafe { attempt(listener) };
    if let Err(why) = &result {
        log::error!("{why}");
        let mut listeners = Transport::get().listeners.open();
        listeners.open.clear();
        listeners.names.clear();
        // After a setting that did not work the server goes back to the one before. To it
        // that was port 0, if the module's own port was in use, and it does not even call
        // us, unless it has something to close: then `close` sees to the rest.
        if was_by_own && Transport::get().line.has_directives() {
            listeners.by_own = true;
            if let Ok(place) = duplicate(Transport::get().poller.channel().fd()) {
                listeners.names.push(c"(none)".to_owned());
                // SAFETY: as above.
                unsafe { listeners.give(listener, vec![place]) };
            }
        }
    }
    result.is_ok()
}

/// Listens on what the server or the module was told.
///
/// # Errors
/// In words. What was opened by then is still open.
///
/// # Safety
/// As [`listen`].
unsafe fn attempt(listener: *mut Listener81) -> Result<(), String> {
    let transport = Transport::get();
    // SAFETY: by the caller's promise; the fields are those of all lines.
    let (port, server_binds) = unsafe { ((*listener).port, server_binds(listener)) };
    // SAFETY: as above.
    let core = unsafe { core_settings(listener) };
    let mut listeners = transport.listeners.open();
    listeners.by_own = std::mem::take(&mut listeners.next_by_own) && core.is_none();
    if core.is_some() && listeners.own_port != 0 {
        log::info!(
            "the directive rdma-port ({port}) wins over the module's argument port={}",
            listeners.own_port
        );
    }
    if let Some((rx_size, vector)) = core {
        let mut settings = transport.settings.open();
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
    Endpoint::try_memory(transport.settings.open().rx_size)
        .map_err(|why| format!("cannot serve clients: {why}"))?;
    listeners.open.clear();
    listeners.names.clear();
    let mut given = Vec::new();
    for bind in &binds {
        let (optional, address) = match bind.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, bind.as_str()),
        };
        match open(address, port as u16) {
            Ok((opened, descriptor)) => {
                listeners.open.push(opened);
                listeners.names.push(CString::new(address).unwrap_or_default());
                given.push(descriptor);
            }
            Err(error) if optional => {
                log::debug!("not listening on {address} port {port}, which is optional: {error}");
            }
            Err(error) => {
                return Err(format!(
                    "cannot listen on {address} port {port}: {error} ({})",
                    device_hint()
                ));
            }
        }
    }
    if given.is_empty() {
        return Err(format!(
            "none of the optional addresses could be listened on ({})",
            device_hint()
        ));
    }
    // SAFETY: as above.
    unsafe { listeners.give(listener, given) };
    Ok(())
}

/// The addresses that the server was told, unless they are our own names.
///
/// # Safety
/// As [`listen`].
unsafe fn server_binds(listener: *mut Listener81) -> Vec<String> {
    let listeners = Transport::get().listeners.open();
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
unsafe fn core_settings(listener: *mut Listener81) -> Option<(u32, i32)> {
    if !Transport::get().line.has_directives() {
        return None;
    }
    // SAFETY: the line's listener has `priv`, null or the core's settings.
    let settings: *const RdmaSettings = unsafe { (*listener).private }.cast();
    if settings.is_null() {
        return None;
    }
    // SAFETY: as above.
    let (rx_size, vector) = unsafe { ((*settings).rx_size, (*settings).completion_vector) };
    let sane = crate::config::RX_SIZE.contains(&u64::try_from(rx_size).unwrap_or(0))
        && crate::config::COMPLETION_VECTOR.contains(&i64::from(vector));
    sane.then_some((rx_size as u32, vector))
}

/// What is there to listen on, in words.
fn device_hint() -> String {
    let names = Device::names();
    if names.is_empty() {
        String::from("this machine has no RDMA device; see `rdma link`")
    } else {
        format!(
            "RDMA devices: {}; see `rdma link` and `ip addr` for their addresses",
            names.join(", ")
        )
    }
}

/// Opens one listener and a descriptor of it for the server.
fn open(address: &str, port: u16) -> Result<(Listener, OwnedFd), String> {
    let address = resolve(address, port)?;
    let channel = EventChannel::new().map_err(|error| error.to_string())?;
    let id = listening(&channel, address).map_err(|error| error.to_string())?;
    let descriptor = duplicate(channel.fd())?;
    let given = descriptor.as_raw_fd();
    Ok((Listener { id: Some(id), channel, address, given }, descriptor))
}

/// An id that listens, and tells the channel.
fn listening(channel: &EventChannel, address: SocketAddr) -> Result<Id, Error> {
    let id = Id::new(channel)?;
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
fn duplicate(fd: RawFd) -> Result<OwnedFd, String> {
    // SAFETY: an open descriptor of a channel that outlives this call.
    unsafe { BorrowedFd::borrow_raw(fd) }
        .try_clone_to_owned()
        .map_err(|error| format!("no descriptor left: {error}"))
}

/// Listens on what the module was told by now. Returns whether that worked.
///
/// # Safety
/// Main thread, after registration.
pub unsafe fn reopen() -> bool {
    let transport = Transport::get();
    let listener = transport.symbols.listener();
    let port = {
        let mut listeners = transport.listeners.open();
        listeners.next_by_own = true;
        listeners.own_port
    };
    // SAFETY: the server's own listener. Without addresses of the server's, `listen`
    // takes the module's.
    unsafe {
        (*listener).ct = transport.kind();
        (*listener).port = c_int::from(port);
        (*listener).bindaddr_count = 0;
        let changed = transport.symbols.change_listener(listener);
        if port == 0 || !changed {
            close_ours();
        }
        changed
    }
}

/// Gives up what is listened on, after the server closed its copies.
pub fn close_ours() {
    let listeners = &Transport::get().listeners;
    let open = std::mem::take(&mut listeners.open().open);
    drop(open);
}

/// `ConnectionType.closeListener`, of 8.1 and on.
///
/// # Safety
/// `listener` is the server's own, of our type.
pub unsafe fn close(listener: *mut Listener81) {
    let transport = Transport::get();
    // SAFETY: 8.1's table and 9.1's agree up to this member, which only wants the
    // listener's descriptors: it deregisters and closes them.
    unsafe {
        let tcp: *const ConnectionType91 = transport.symbols.tcp_table().cast();
        if let Some(close_listener) = (*tcp).close_listener {
            close_listener(listener);
        }
    }
    close_ours();
    let mut listeners = transport.listeners.open();
    // SAFETY: by the caller's promise. A port of 0 comes here for two reasons: the
    // operator set rdma-port to 0, or set rdma-bind while rdma-port was 0 all along
    // and the arguments' port is in use. The second must not stop us listening.
    unsafe {
        if (*listener).port == 0 && listeners.by_own {
            (*listener).port = c_int::from(listeners.own_port);
            listeners.next_by_own = true;
        }
    }
}

/// `ConnectionType.accept_handler`: connection requests of one listener.
pub fn on_readable(_el: *mut EventLoop, fd: RawFd) {
    let transport = Transport::get();
    for _ in 0..EVENTS_PER_GO {
        let event = {
            let listeners = transport.listeners.open();
            let Some(listener) = listeners.open.iter().find(|l| l.given == fd) else { return };
            listener.channel.next()
        };
        match event {
            Ok(Some(event)) => match event.kind {
                // SAFETY: a connection request that nobody took over yet.
                EventKind::ConnectRequest => unsafe { accept(event.id) },
                EventKind::DeviceRemoval => transport.listeners.open().lose(event.id),
                EventKind::AddressChange => {
                    let what = "the address of a listener changed";
                    transport.poller.say_trouble(log::Level::Info, what);
                }
                other => log::debug!("listener: {other:?}, status {}", event.status),
            },
            Ok(None) => return,
            Err(error) => {
                transport.poller.say_trouble(log::Level::Warn, &format!("listener: {error}"));
                return;
            }
        }
    }
}

/// Accepts a connection request, or refuses it.
///
/// # Safety
/// The key is that of a connection request that nobody took over.
unsafe fn accept(key: IdKey) {
    let transport = Transport::get();
    // SAFETY: by the caller's promise.
    let id = unsafe { Id::from_request(key) };
    let peer = id.peer_address().map_or_else(String::new, |peer| peer.to_string());
    let most = u64::from(transport.settings.open().max_handshakes);
    if transport.poller.handshakes() >= most {
        id.reject();
        METRICS.refused_handshakes.add(1);
        refused(&peer, &format!("{most} connections are in handshake (max-handshakes)"));
        return;
    }
    let result = id
        .migrate(transport.poller.channel())
        .and_then(|()| transport.poller.enter(id))
        .and_then(|endpoint| {
            let accepted = endpoint.id().accept();
            if accepted.is_err() {
                endpoint.id().reject();
                transport.poller.remove(endpoint, Reason::Error);
            }
            accepted
        });
    if let Err(error) = result {
        if error.is_about_memory() { &METRICS.refused_memory } else { &METRICS.refused_device }
            .add(1);
        refused(&peer, &error.to_string());
    }
}

/// Counts a refusal and says so, once a minute.
pub(super) fn refused(peer: &str, why: &str) {
    METRICS.connections_refused.add(1);
    if let Some(more) = Transport::get().listeners.open().refusals.open(clock::now()) {
        log::warn!("client {peer} refused: {why}{more}");
    }
}
