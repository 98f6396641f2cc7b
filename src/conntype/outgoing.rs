// SPDX-License-Identifier: BSD-3-Clause
//! Connections that this server opens, and the calls of the server that block.
//!
//! A stock server opens none over RDMA by itself; `replication` does it in its place. What
//! blocks does what TCP's calls do, on the main thread and beside it.

use crate::conntype::address::resolve;
use crate::endpoint::{Endpoint, PeerState, ReadOutcome, Reason, Stage, WriteOutcome};
use crate::host::connection::{Connection, Handler, State};
use crate::host::main_cell::{MainPtr, is_main_thread};
use crate::host::{MainCell, api};
use crate::metrics::METRICS;
use crate::poller::connection::RdmaConnection;
use crate::poller::serving::call_handler;
use crate::poller::{Origin, Poller};
use redis_module::raw::RedisModuleCtx;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbs::Error;
use verbs::cm::{Event, EventKind, Id};

/// Time for resolving an address, and again for a route, in milliseconds.
const RESOLVE_MS: i32 = 2000;

/// How long a read that blocks another thread than the main one takes at most.
const ELSEWHERE: Duration = Duration::from_millis(20);
/// The main thread comes round ten times a second at least, unless it is busy or waits.
const STANDS_STILL: Duration = Duration::from_millis(500);

/// Connections whose address or route is being resolved.
static RESOLVING: MainCell<Vec<Resolving>> = MainCell::new(Vec::new());

/// Connections that failed so, and whose handlers are still to be called.
static FAILED: MainCell<VecDeque<MainPtr<RdmaConnection>>> = MainCell::new(VecDeque::new());

#[derive(Debug)]
struct Resolving {
    id: Id,
    connection: MainPtr<RdmaConnection>,
}

/// `ConnectionType.connect`. Returns whether it is under way; `handler` follows.
///
/// # Safety
/// `connection` is live and new.
pub unsafe fn connect(
    poller: &Poller,
    connection: *mut RdmaConnection,
    to: &str,
    port: u16,
    from: Option<&str>,
    handler: Option<Handler>,
) -> bool {
    // SAFETY: by the caller's promise.
    let base = unsafe { &mut (*connection).base };
    match start(poller, connection, to, port, from) {
        Ok(()) => {
            base.conn_handler = handler;
            base.set_state(State::Connecting);
            true
        }
        Err(error) => {
            log::debug!("cannot connect to {to} port {port}: {error}");
            base.fail(error.errno());
            false
        }
    }
}

/// Why no connection is under way.
#[derive(Debug)]
enum ConnectError {
    /// The name has no address.
    Resolve(io::Error),
    /// The connection manager did not begin.
    Verbs(Error),
}

impl ConnectError {
    /// What the server is told.
    fn errno(&self) -> i32 {
        match self {
            Self::Resolve(_) => libc::EADDRNOTAVAIL,
            Self::Verbs(error) => error.errno,
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve(error) => write!(f, "{error}"),
            Self::Verbs(error) => write!(f, "{error}"),
        }
    }
}

fn start(
    poller: &Poller,
    connection: *mut RdmaConnection,
    to: &str,
    port: u16,
    from: Option<&str>,
) -> Result<(), ConnectError> {
    let target = resolve(to, port).map_err(ConnectError::Resolve)?;
    // As for TCP, a source that can't be had is no reason not to connect.
    let source = from.and_then(|name| resolve(name, 0).ok());
    let id = resolving(poller, source, target)
        .or_else(
            |error| if source.is_some() { resolving(poller, None, target) } else { Err(error) },
        )
        .map_err(ConnectError::Verbs)?;
    RESOLVING.borrow_mut().push(Resolving { id, connection: MainPtr(connection) });
    Ok(())
}

/// An id whose address is being resolved.
fn resolving(poller: &Poller, source: Option<SocketAddr>, target: SocketAddr) -> Result<Id, Error> {
    let id = Id::new(poller.channel())?;
    id.resolve_address(source, target, RESOLVE_MS)?;
    Ok(id)
}

/// An event of an id that has no endpoint: one that is being resolved.
pub fn event(poller: &Poller, event: Event) {
    let mut resolving = RESOLVING.borrow_mut();
    let Some(index) = resolving.iter().position(|entry| entry.id.key() == event.id) else {
        return;
    };
    let errno = match event.kind {
        EventKind::AddressResolved => match resolving[index].id.resolve_route(RESOLVE_MS) {
            Ok(()) => return,
            Err(error) => error.errno,
        },
        EventKind::RouteResolved => {
            let Resolving { id, connection } = resolving.swap_remove(index);
            drop(resolving);
            join(poller, id, connection.0);
            return;
        }
        EventKind::Failed if event.status < 0 => -event.status,
        EventKind::Failed | EventKind::Rejected | EventKind::DeviceRemoval => libc::ENETUNREACH,
        _ => return,
    };
    let Resolving { id, connection } = resolving.swap_remove(index);
    drop(resolving);
    drop(id);
    fail(connection.0, errno);
}

/// Gives a resolved id its endpoint and asks for the connection.
fn join(poller: &Poller, id: Id, connection: *mut RdmaConnection) {
    let joined = poller.enter(id, Origin::Server).and_then(|endpoint| {
        endpoint.main_state().set_connection(connection.cast());
        // SAFETY: a connection that is being resolved is live: its close removes it
        // from the list.
        unsafe { (*connection).endpoint = Some(Arc::clone(&endpoint)) };
        endpoint.id().connect()
    });
    if let Err(error) = joined {
        log::debug!("cannot connect: {error}");
        part(poller, connection);
        fail(connection, error.errno);
    }
}

/// Parts a connection from an endpoint that did not come to be connected.
fn part(poller: &Poller, connection: *mut RdmaConnection) {
    // SAFETY: live, see `join`.
    if let Some(endpoint) = unsafe { (*connection).endpoint.take() } {
        endpoint.main_state().set_connection(std::ptr::null_mut());
        poller.remove(endpoint, Reason::Error);
    }
}

/// The attempt failed. The server hears of it through its handler, but not from here:
/// this may be inside a call of the server that blocks.
fn fail(connection: *mut RdmaConnection, errno: i32) {
    // SAFETY: live, see `join`.
    let base = unsafe { &(*connection).base };
    base.fail(errno);
    if base.conn_handler.is_some() {
        FAILED.borrow_mut().push_back(MainPtr(connection));
        api::after(Duration::ZERO, on_failed);
    }
}

/// Calls the handler of the attempt that failed first.
unsafe extern "C" fn on_failed(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    crate::panic::guard("connect handler", || {
        let first = FAILED.borrow_mut().pop_front();
        if let Some(MainPtr(connection)) = first {
            // SAFETY: live, since its close removes it from the list; no cell is open
            // during the call.
            unsafe {
                let handler = (*connection).base.conn_handler.take();
                call_handler(connection.cast(), handler);
            }
        }
    });
}

/// The handshake of a connecting endpoint is complete, or has failed.
pub fn finish(poller: &Poller, endpoint: &Arc<Endpoint>) {
    let connection = endpoint.main_state().connection();
    if connection.is_null() {
        return;
    }
    if !settle(poller, endpoint, connection.cast()) {
        return;
    }
    // SAFETY: the endpoint's connection is live; no cell is open during the call.
    unsafe {
        let handler = (*connection).conn_handler.take();
        if !call_handler(connection, handler) {
            return;
        }
    }
    if !endpoint.main_state().connection().is_null() {
        poller.mark_if_ready(endpoint);
    }
}

/// Takes over the outcome of a handshake. Returns whether there is one.
fn settle(poller: &Poller, endpoint: &Arc<Endpoint>, connection: *mut RdmaConnection) -> bool {
    // SAFETY: the endpoint's connection is live.
    let base = unsafe { &(*connection).base };
    if base.state() != State::Connecting {
        return false;
    }
    if endpoint.stream().peer_state() != PeerState::Connected {
        let late = endpoint.main_state().reason == Some(Reason::Timeout);
        let failure = endpoint.main_state().failure;
        base.fail(if late { libc::ETIMEDOUT } else { failure });
        part(poller, connection);
        return true;
    }
    if !endpoint.main_state().session.is_open() {
        return false;
    }
    base.set_state(State::Connected);
    if endpoint.main_state().stage == Stage::Handshaking {
        endpoint.enter_stage(Stage::Established);
        METRICS.connections_opened.add(1);
    }
    true
}

/// The server closes a connection, which may still be resolved, or have a handler to
/// be called.
pub fn forget(connection: *mut RdmaConnection) {
    FAILED.borrow_mut().retain(|other| other.0 != connection);
    let mut resolving = RESOLVING.borrow_mut();
    let found = resolving.iter().position(|entry| entry.connection.0 == connection);
    let entry = found.map(|index| resolving.swap_remove(index));
    drop(resolving);
    drop(entry);
}

/// The time after `timeout`, which may be absurdly long.
fn later(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or(now + Duration::from_secs(1 << 30))
}

/// Waits for completions and connection events until `done` says so or the time is
/// over. No handler of the server runs meanwhile. Returns what `done` said.
fn wait_for<T>(poller: &Poller, deadline: Instant, done: impl FnMut() -> Option<T>) -> Option<T> {
    if is_main_thread() {
        poller.wait_here(deadline, done)
    } else {
        poller.wait_elsewhere(deadline, done)
    }
}

/// `ConnectionType.blocking_connect`. Returns whether it is connected.
///
/// # Safety
/// `connection` is live and new.
pub unsafe fn blocking_connect(
    poller: &Poller,
    connection: *mut RdmaConnection,
    to: &str,
    port: u16,
    timeout: Duration,
) -> bool {
    // SAFETY: by the caller's promise.
    if !unsafe { connect(poller, connection, to, port, None, None) } {
        return false;
    }
    let outcome = wait_for(poller, later(timeout), || {
        // SAFETY: nobody closes the connection while its owner waits here.
        let endpoint = unsafe { (*connection).endpoint.clone() };
        if let Some(endpoint) = endpoint {
            settle(poller, &endpoint, connection);
        }
        // SAFETY: as above.
        let state = unsafe { (*connection).base.state() };
        (state != State::Connecting).then_some(state == State::Connected)
    });
    if outcome.is_none() {
        forget(connection);
        part(poller, connection);
        // SAFETY: as above.
        unsafe { (*connection).base.fail(libc::ETIMEDOUT) };
    }
    outcome == Some(true)
}

/// Why a blocking call came to nothing, as an error number.
type Failed = i32;

/// `ConnectionType.sync_write`: all of `bytes`, or an error.
///
/// # Errors
/// `ETIMEDOUT`, or `ECONNRESET` if the connection is not there any more.
pub fn sync_write(
    poller: &Poller,
    endpoint: &Arc<Endpoint>,
    bytes: &[u8],
    timeout: Duration,
) -> Result<(), Failed> {
    let mut done = 0;
    wait_for(poller, later(timeout), || {
        while done < bytes.len() && endpoint.stream().peer_state() == PeerState::Connected {
            let rest = &bytes[done..];
            match endpoint.write(&[IoSlice::new(rest)]) {
                WriteOutcome::Bytes(count) => done += count,
                WriteOutcome::Again => return None,
                WriteOutcome::Broken => return Some(Err(libc::ECONNRESET)),
            }
        }
        Some(if done == bytes.len() { Ok(()) } else { Err(libc::ECONNRESET) })
    })
    .unwrap_or(Err(libc::ETIMEDOUT))
}

/// A read of a connection that blocks, for `limit` at most. Beside the main thread it comes back
/// sooner with nothing: there the server asks again, and in between whether it is to stop.
pub fn blocking_read(
    poller: &Poller,
    endpoint: &Endpoint,
    to: &mut [MaybeUninit<u8>],
    limit: Duration,
) -> ReadOutcome {
    let limit = if is_main_thread() { limit } else { limit.min(ELSEWHERE) };
    let outcome = wait_for(poller, later(limit), || match endpoint.read(to) {
        ReadOutcome::Again => None,
        outcome => Some(outcome),
    });
    outcome.unwrap_or(ReadOutcome::Again)
}

/// Something was read from a connection: has the next receive buffer announced if that is due.
///
/// # Safety
/// `connection` is live and the endpoint's own.
pub unsafe fn has_read(poller: &Poller, endpoint: &Arc<Endpoint>, connection: *mut Connection) {
    if is_main_thread() {
        // Soonest is best: the peer may be waiting for this window.
        poller.lose_on_error(endpoint, endpoint.announce_if_full());
        return;
    }
    // The result of an I/O thread's job is collected, which announces.
    // SAFETY: by the caller's promise; what is looked at does not change while somebody reads.
    let reads_alone = || unsafe {
        let own = connection.cast::<RdmaConnection>();
        (*own).opener.is_some() && (*own).blocks_for().is_some()
    };
    if endpoint.stream().is_buffer_read() && reads_alone() {
        poller.read_elsewhere(endpoint);
    }
}

/// `ConnectionType.sync_read`: fills `to`, or an error.
///
/// # Errors
/// As [`sync_write`].
///
/// # Safety
/// As [`has_read`]'s.
pub unsafe fn sync_read(
    poller: &Poller,
    connection: *mut Connection,
    endpoint: &Arc<Endpoint>,
    to: &mut [MaybeUninit<u8>],
    timeout: Duration,
) -> Result<(), Failed> {
    let mut done = 0;
    wait_for(poller, later(timeout), || {
        while done < to.len() {
            match endpoint.read(&mut to[done..]) {
                ReadOutcome::Bytes(count) => {
                    done += count;
                    // SAFETY: by the caller's promise.
                    unsafe { has_read(poller, endpoint, connection) };
                }
                ReadOutcome::Again => return None,
                ReadOutcome::End | ReadOutcome::Broken => return Some(Err(libc::ECONNRESET)),
            }
        }
        Some(Ok(()))
    })
    .unwrap_or(Err(libc::ETIMEDOUT))
}

/// `ConnectionType.sync_readline`: a line without its end, and a NUL, in `to`.
/// Returns its length, counted as the server's own function counts it: with a
/// carriage return, which is overwritten all the same.
///
/// # Errors
/// As [`sync_write`].
///
/// # Safety
/// As [`has_read`]'s.
pub unsafe fn sync_readline(
    poller: &Poller,
    connection: *mut Connection,
    endpoint: &Arc<Endpoint>,
    to: &mut [MaybeUninit<u8>],
    timeout: Duration,
) -> Result<usize, Failed> {
    let deadline = later(timeout);
    let mut length = 0;
    let mut before = 0;
    while length + 1 < to.len() {
        if length == 0 && !is_main_thread() && !begins(poller, endpoint, deadline) {
            // The main thread waits for this one to stop, so that nothing can arrive. A primary
            // that is not ready yet sends empty lines: after one the server looks up.
            to[0].write(0);
            return Ok(0);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let place = &mut to[length..=length];
        // SAFETY: by the caller's promise.
        unsafe { sync_read(poller, connection, endpoint, place, left)? };
        // SAFETY: it was read.
        let byte = unsafe { place[0].assume_init() };
        if byte == b'\n' {
            to[length].write(0);
            if before == b'\r' {
                to[length - 1].write(0);
            }
            return Ok(length);
        }
        before = byte;
        length += 1;
        to[length].write(0);
    }
    Ok(length)
}

/// Waits beside the main thread until a line begins, or the connection or the time is over.
/// `false` if the main thread has stood still instead.
fn begins(poller: &Poller, endpoint: &Endpoint, deadline: Instant) -> bool {
    let (mut turns, mut since) = (poller.turns(), Instant::now());
    while !endpoint.is_readable() && Instant::now() < deadline {
        let nap = deadline.min(Instant::now() + ELSEWHERE);
        poller.wait_elsewhere(nap, || endpoint.is_readable().then_some(()));
        if poller.turns() != turns {
            (turns, since) = (poller.turns(), Instant::now());
        } else if since.elapsed() >= STANDS_STILL {
            return false;
        }
    }
    true
}
