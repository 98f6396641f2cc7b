// SPDX-License-Identifier: BSD-3-Clause
//! The functions of `ConnectionType`: the door to C.
//!
//! Each checks what it must, calls what does the work, and turns the answer into
//! the number that the server expects. A panic ends the connection that it
//! happened on and nothing else.

use crate::child;
use crate::child::in_child;
use crate::conntype::dual_channel;
use crate::conntype::listener::Listening;
use crate::conntype::outgoing;
use crate::endpoint::{PeerState, ReadOutcome, WriteOutcome};
use crate::host::Line;
use crate::host::connection::{
    Connection, FLAG_CLOSE_SCHEDULED, FLAG_WRITE_BARRIER, Handler, State,
};
use crate::host::layout::{
    ConnectionType80, ConnectionType81, ConnectionType90, EventLoop, Listener80, Listener81, TAIL,
};
use crate::host::main_cell::is_main_thread;
use crate::host::symbols::{TYPE_NAME, TYPE_NUMBER};
use crate::panic::guard;
use crate::poller::Poller;
use crate::poller::connection::RdmaConnection;
use libc::{iovec, ssize_t};
use std::ffi::{CStr, c_char, c_int, c_longlong, c_void};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

const OK: c_int = 0;
const ERR: c_int = -1;

/// How long a blocking write may take, as the server has it for a debugger's client.
const BLOCKING_WRITE: Duration = Duration::from_secs(5);

/// As [`guard`], for work on a connection, which ends by a panic.
fn guard_on<T>(what: &str, connection: *mut Connection, work: impl FnOnce() -> T) -> Option<T> {
    let answer = guard(what, work);
    if answer.is_none() && !connection.is_null() {
        // SAFETY: the server passed a live connection, and what panicked did not
        // come so far as to free it.
        let endpoint = unsafe {
            (*connection).fail(libc::EIO);
            &(*ours(connection)).endpoint
        };
        if let Some(endpoint) = endpoint {
            if is_main_thread() && !in_child() {
                Poller::get().give_up(endpoint);
            } else {
                // The server looks for itself when an I/O thread's job is over.
                endpoint.stream().escalate(PeerState::Failed);
            }
        }
    }
    answer
}

/// The connection as ours.
fn ours(connection: *mut Connection) -> *mut RdmaConnection {
    connection.cast()
}

unsafe extern "C" fn type_name(_connection: *mut Connection) -> *const c_char {
    TYPE_NAME.as_ptr()
}

unsafe extern "C" fn type_number() -> c_int {
    TYPE_NUMBER
}

/// We register no descriptor with this handler, so the server never calls it.
unsafe extern "C" fn ae_handler(_: *mut EventLoop, _: c_int, _: *mut c_void, _: c_int) {}

unsafe extern "C" fn accept_handler(_: *mut EventLoop, fd: c_int, _: *mut c_void, _: c_int) {
    guard("accept_handler", || Listening::get().on_readable(fd));
}

unsafe extern "C" fn addr(
    connection: *mut Connection,
    ip: *mut c_char,
    ip_len: usize,
    port: *mut c_int,
    remote: c_int,
) -> c_int {
    guard_on("addr", connection, || {
        // SAFETY: the server passes a live connection.
        let endpoint = unsafe { (*ours(connection)).endpoint.as_ref() };
        let address = endpoint.and_then(|e| if remote != 0 { e.peer() } else { e.local() });
        let text = address.map_or_else(|| String::from("?"), |a| a.ip().to_string());
        // SAFETY: `ip` has room for `ip_len` bytes, `port` for one number, if given.
        unsafe {
            if !ip.is_null() && ip_len > 0 {
                let count = text.len().min(ip_len - 1);
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), ip, count);
                *ip.add(count) = 0;
            }
            if !port.is_null() {
                *port = address.map_or(0, |a| c_int::from(a.port()));
            }
        }
        if address.is_some() { OK } else { ERR }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn is_local(connection: *mut Connection) -> c_int {
    guard_on("is_local", connection, || {
        // SAFETY: the server passes a live connection.
        let endpoint = unsafe { (*ours(connection)).endpoint.as_ref() };
        let ends = endpoint.and_then(|e| Some((e.peer()?.ip(), e.local()?.ip())));
        // An RDMA device rarely has a loopback address: a client of the same machine
        // comes from the address that it goes to.
        ends.map_or(ERR, |(peer, local)| c_int::from(peer.is_loopback() || peer == local))
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn listen(listener: *mut Listener81) -> c_int {
    guard("listen", || {
        // SAFETY: the server passes its own listener.
        if unsafe { Listening::get().listen(listener) } { OK } else { ERR }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn listen_80(listener: *mut Listener80) -> c_int {
    // SAFETY: up to and with `ct` the structure is the later one, and 8.0's has no
    // member that `listen` would look at behind it.
    unsafe { listen(listener.cast()) }
}

unsafe extern "C" fn close_listener(listener: *mut Listener81) {
    // SAFETY: the server passes its own listener.
    guard("closeListener", || unsafe { Listening::get().close(listener) });
}

unsafe extern "C" fn conn_create() -> *mut Connection {
    guard("conn_create", || RdmaConnection::create(Listening::get().kind(), State::None).cast())
        .unwrap_or(std::ptr::null_mut())
}

/// The server itself never calls this one: accepted connections come from us.
unsafe extern "C" fn conn_create_accepted(_fd: c_int, _private: *mut c_void) -> *mut Connection {
    guard("conn_create_accepted", || {
        RdmaConnection::create(Listening::get().kind(), State::Accepting).cast()
    })
    .unwrap_or(std::ptr::null_mut())
}

/// As shutdown(2) of both directions, for this side: nothing is read or written any more. The
/// peer is told when the connection is closed, after it got what was written: the server shuts
/// down right before it closes, wherever a forked child may have a copy of a socket.
unsafe extern "C" fn shutdown(connection: *mut Connection) {
    guard_on("shutdown", connection, || {
        if in_child() {
            return;
        }
        // SAFETY: the server passes a live connection.
        if let Some(endpoint) = unsafe { (*ours(connection)).endpoint.clone() } {
            endpoint.stream().shut_down();
            Poller::get().mark_if_ready(&endpoint);
        }
    });
}

/// Whatever becomes of the endpoint: nothing may call the server about this connection
/// any more.
unsafe extern "C" fn close(connection: *mut Connection) {
    if in_child() {
        return;
    }
    let own = ours(connection);
    // SAFETY: the server passes a live connection and does not use it after this
    // call, except for a handler that is running (`refs`).
    unsafe {
        (*connection).read_handler = None;
        (*connection).write_handler = None;
        (*connection).set_state(State::Closed);
        let endpoint = (*own).endpoint.take();
        let opener = (*own).opener.take();
        let closed = guard("close", || {
            outgoing::forget(own);
            if let Some(mut opener) = opener {
                opener.closed(&(*own).base);
            }
            if let Some(endpoint) = &endpoint {
                Poller::get().close(endpoint);
            }
        });
        if closed.is_none() {
            // Something may still point to the connection: it is not freed.
            (*connection).conn_handler = None;
            if let Some(endpoint) = endpoint {
                guard("ending a connection", || {
                    endpoint.main_state().set_connection(std::ptr::null_mut());
                });
                Poller::get().give_up(&endpoint);
            }
        } else if (*connection).refs > 0 {
            (*connection).flags |= FLAG_CLOSE_SCHEDULED;
        } else {
            RdmaConnection::free(own);
        }
    }
}

unsafe extern "C" fn connect(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    source: *const c_char,
    handler: Option<Handler>,
) -> c_int {
    guard_on("connect", connection, || {
        let port = u16::try_from(port).ok();
        // SAFETY: the server passes a live connection and strings, or null.
        unsafe {
            let (Some(to), Some(port), false) = (text(address), port, in_child()) else {
                (*connection).fail(libc::EINVAL);
                return ERR;
            };
            let source = text(source);
            let started = outgoing::connect(
                Poller::get(),
                ours(connection),
                &to,
                port,
                source.as_deref(),
                handler,
            );
            if started { OK } else { ERR }
        }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn connect_multipath(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    source: *const c_char,
    _multipath: c_int,
    handler: Option<Handler>,
) -> c_int {
    // SAFETY: as for `connect`; multipath TCP is TCP's.
    unsafe { connect(connection, address, port, source, handler) }
}

unsafe extern "C" fn blocking_connect(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    timeout: c_longlong,
) -> c_int {
    guard_on("blocking_connect", connection, || {
        let port = u16::try_from(port).ok();
        // SAFETY: the server passes a live connection and a string.
        unsafe {
            let (Some(to), Some(port), false) = (text(address), port, in_child()) else {
                (*connection).fail(libc::EINVAL);
                return ERR;
            };
            if outgoing::blocking_connect(
                Poller::get(),
                ours(connection),
                &to,
                port,
                millis(timeout),
            ) {
                OK
            } else {
                set_errno((*connection).last_errno());
                ERR
            }
        }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn accept(connection: *mut Connection, handler: Option<Handler>) -> c_int {
    guard_on("accept", connection, || {
        // SAFETY: the server passes a live connection, and keeps it alive over this call.
        unsafe {
            if (*connection).state() != State::Accepting {
                return ERR;
            }
            (*connection).set_state(State::Connected);
            if crate::poller::serving::call_handler(connection, handler) { OK } else { ERR }
        }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn write(
    connection: *mut Connection,
    data: *const c_void,
    length: usize,
) -> c_int {
    guard_on("write", connection, || {
        // SAFETY: the server passes a live connection and `length` readable bytes, not null.
        unsafe {
            let bytes = std::slice::from_raw_parts(data.cast::<u8>(), length);
            let taken = write_pieces(connection, &[IoSlice::new(bytes)]);
            let endpoint = &(*ours(connection)).endpoint;
            if usize::try_from(taken) == Ok(length)
                && let Some(endpoint) = endpoint
            {
                dual_channel::look_at(endpoint, bytes);
            }
            match endpoint {
                Some(endpoint)
                    if usize::try_from(taken).unwrap_or(0) < length
                        && is_main_thread()
                        && !in_child()
                        && (*ours(connection)).blocks_for().is_some() =>
                {
                    let rest = &bytes[usize::try_from(taken).unwrap_or(0)..];
                    match outgoing::sync_write(Poller::get(), endpoint, rest, BLOCKING_WRITE) {
                        Ok(()) => length as c_int,
                        Err(_) => taken,
                    }
                }
                _ => taken,
            }
        }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn writev(
    connection: *mut Connection,
    pieces: *const iovec,
    count: c_int,
) -> c_int {
    guard_on("writev", connection, || {
        // SAFETY: the server passes `count` pieces of its reply buffers, so each is readable and
        // none is null; an `IoSlice` has the layout of an `iovec`.
        unsafe {
            let pieces =
                std::slice::from_raw_parts(pieces.cast::<IoSlice<'_>>(), count.max(0) as usize);
            write_pieces(connection, pieces)
        }
    })
    .unwrap_or(ERR)
}

/// # Safety
/// A live connection.
unsafe fn write_pieces(connection: *mut Connection, pieces: &[IoSlice<'_>]) -> c_int {
    if in_child() {
        child::note_write();
        set_errno(libc::ENOTCONN);
        return ERR;
    }
    // SAFETY: by the caller's promise.
    let (base, endpoint) = unsafe { (&*connection, &(*ours(connection)).endpoint) };
    let Some(endpoint) = endpoint else {
        base.fail(libc::ENOTCONN);
        return ERR;
    };
    match endpoint.write(pieces) {
        // A call takes far less than a number of this type holds.
        WriteOutcome::Bytes(count) => count as c_int,
        WriteOutcome::Again => {
            set_errno(libc::EAGAIN);
            ERR
        }
        WriteOutcome::Broken => {
            base.fail(libc::EPIPE);
            ERR
        }
    }
}

unsafe extern "C" fn read(connection: *mut Connection, to: *mut c_void, length: usize) -> c_int {
    guard_on("read", connection, || {
        // SAFETY: the server passes a live connection and `length` writable bytes.
        unsafe {
            if in_child() {
                set_errno(libc::ENOTCONN);
                return ERR;
            }
            let Some(endpoint) = &(*ours(connection)).endpoint else {
                (*connection).fail(libc::ENOTCONN);
                return ERR;
            };
            let length = length.min(c_int::MAX as usize);
            let to = std::slice::from_raw_parts_mut(to.cast::<MaybeUninit<u8>>(), length);
            let mut outcome = endpoint.read(to);
            // I/O threads never block. What reads a link on another thread may be the server's
            // loading of a replica's data.
            if matches!(outcome, ReadOutcome::Again)
                && (is_main_thread() || (*ours(connection)).opener.is_some())
                && let Some(limit) = (*ours(connection)).blocks_for()
            {
                outcome = outgoing::blocking_read(Poller::get(), endpoint, to, limit);
            }
            match outcome {
                ReadOutcome::Bytes(count) => {
                    outgoing::has_read(Poller::get(), endpoint, connection);
                    count as c_int
                }
                ReadOutcome::Again => {
                    set_errno(libc::EAGAIN);
                    ERR
                }
                ReadOutcome::End => {
                    (*connection).set_state(State::Closed);
                    0
                }
                ReadOutcome::Broken => {
                    (*connection).fail(libc::ECONNRESET);
                    ERR
                }
            }
        }
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn set_write_handler(
    connection: *mut Connection,
    handler: Option<Handler>,
    barrier: c_int,
) -> c_int {
    guard_on("set_write_handler", connection, || {
        // SAFETY: the server passes a live connection, on the main thread.
        unsafe {
            (*connection).write_handler = handler;
            if barrier != 0 {
                (*connection).flags |= FLAG_WRITE_BARRIER;
            } else {
                (*connection).flags &= !FLAG_WRITE_BARRIER;
            }
            look_again(connection, handler.is_some());
        }
        OK
    })
    .unwrap_or(ERR)
}

unsafe extern "C" fn set_read_handler(
    connection: *mut Connection,
    handler: Option<Handler>,
) -> c_int {
    guard_on("set_read_handler", connection, || {
        // SAFETY: the server passes a live connection, on the main thread.
        unsafe {
            (*connection).read_handler = handler;
            look_again(connection, handler.is_some());
        }
        OK
    })
    .unwrap_or(ERR)
}

/// Readiness is a level: what waits already is noticed when a handler comes.
///
/// # Safety
/// A live connection.
unsafe fn look_again(connection: *mut Connection, has_handler: bool) {
    // SAFETY: by the caller's promise.
    let (state, endpoint) =
        unsafe { ((*connection).state(), (*ours(connection)).endpoint.as_ref()) };
    // While accepting nothing may be called; the accepting itself looks afterwards.
    if has_handler
        && state != State::Accepting
        && !in_child()
        && let Some(endpoint) = endpoint
    {
        Poller::get().mark_if_ready(endpoint);
    }
}

unsafe extern "C" fn get_last_error(connection: *mut Connection) -> *const c_char {
    // SAFETY: the server passes a live connection; strerror takes any number, and its
    // answer is used at once, on the main thread.
    unsafe { libc::strerror((*connection).last_errno()) }
}

unsafe extern "C" fn sync_write(
    connection: *mut Connection,
    data: *mut c_char,
    size: ssize_t,
    timeout: c_longlong,
) -> ssize_t {
    guard_on("sync_write", connection, || {
        // SAFETY: the server passes a live connection and `size` readable bytes.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size.max(0) as usize) };
        blocking(connection, |endpoint| {
            outgoing::sync_write(Poller::get(), endpoint, bytes, millis(timeout))
                .map(|()| bytes.len())
        })
    })
    .unwrap_or(-1)
}

unsafe extern "C" fn sync_read(
    connection: *mut Connection,
    to: *mut c_char,
    size: ssize_t,
    timeout: c_longlong,
) -> ssize_t {
    guard_on("sync_read", connection, || {
        // SAFETY: the server passes a live connection and `size` writable bytes.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast(), size.max(0) as usize) };
        blocking(connection, |endpoint| {
            let poller = Poller::get();
            // SAFETY: as above; the endpoint is the connection's.
            unsafe { outgoing::sync_read(poller, connection, endpoint, to, millis(timeout)) }
                .map(|()| to.len())
        })
    })
    .unwrap_or(-1)
}

unsafe extern "C" fn sync_readline(
    connection: *mut Connection,
    to: *mut c_char,
    size: ssize_t,
    timeout: c_longlong,
) -> ssize_t {
    guard_on("sync_readline", connection, || {
        // SAFETY: the server passes a live connection and `size` writable bytes.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast(), size.max(0) as usize) };
        blocking(connection, |endpoint| {
            let poller = Poller::get();
            // SAFETY: as above; the endpoint is the connection's.
            unsafe { outgoing::sync_readline(poller, connection, endpoint, to, millis(timeout)) }
        })
    })
    .unwrap_or(-1)
}

fn blocking(
    connection: *mut Connection,
    work: impl FnOnce(&Arc<crate::endpoint::Endpoint>) -> Result<usize, i32>,
) -> ssize_t {
    // SAFETY: the server passes a live connection.
    let endpoint = unsafe { (*ours(connection)).endpoint.clone() };
    let result = match endpoint {
        Some(endpoint) if !in_child() => work(&endpoint),
        _ => Err(libc::ENOTCONN),
    };
    match result {
        Ok(count) => count as ssize_t,
        Err(errno) => {
            if errno != libc::ETIMEDOUT {
                // SAFETY: as above.
                unsafe { (*connection).fail(errno) };
            }
            set_errno(errno);
            -1
        }
    }
}

unsafe extern "C" fn has_pending_data() -> c_int {
    guard("has_pending_data", || c_int::from(!in_child() && Poller::get().is_pending()))
        .unwrap_or(0)
}

unsafe extern "C" fn process_pending_data() -> c_int {
    guard("process_pending_data", || if in_child() { 0 } else { Poller::get().run() as c_int })
        .unwrap_or(0)
}

/// Before the server gives an I/O thread a job, and, with 0, when it has collected it. 9.1
/// also calls it from an I/O thread that parses. Says nothing about what that thread is at.
unsafe extern "C" fn postpone_update_state(connection: *mut Connection, jobs: c_int) {
    guard("postpone_update_state", || {
        if jobs != 0 && is_main_thread() && !in_child() {
            let poller = Poller::get();
            poller.job_sent();
            // SAFETY: the server passes a live connection.
            if let Some(endpoint) = unsafe { &(*ours(connection)).endpoint } {
                poller.hold_early_writes(endpoint);
            }
        }
    });
}

/// Main thread, after an I/O thread did something. Calls no handler: the server may
/// be in the middle of its own loop over connections.
unsafe extern "C" fn update_state(connection: *mut Connection) {
    guard_on("update_state", connection, || {
        // SAFETY: the server passes a live connection.
        let endpoint = unsafe { (*ours(connection)).endpoint.clone() };
        if let Some(endpoint) = endpoint
            && !in_child()
        {
            let poller = Poller::get();
            // If the job was a read, what it read is carried out right after this.
            poller.carries_out(&endpoint);
            poller.lose_on_error(&endpoint, endpoint.announce_if_full());
            poller.mark_if_ready(&endpoint);
        }
    });
}

fn millis(timeout: c_longlong) -> Duration {
    Duration::from_millis(u64::try_from(timeout).unwrap_or(0))
}

fn set_errno(errno: i32) {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = errno };
}

/// # Safety
/// A C string, or null.
unsafe fn text(string: *const c_char) -> Option<String> {
    // SAFETY: by the caller's promise.
    (!string.is_null()).then(|| unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned())
}

/// Fills in the members that all lines share; the three lists differ in what stands
/// beside it.
macro_rules! table {
    ($type:ident { $($field:ident: $value:expr,)* }) => {
        Box::into_raw(Box::new($type {
            init: None,
            cleanup: None,
            configure: None,
            ae_handler: Some(ae_handler),
            accept_handler: Some(accept_handler),
            addr: Some(addr),
            is_local: Some(is_local),
            conn_create: Some(conn_create),
            conn_create_accepted: Some(conn_create_accepted),
            shutdown: Some(shutdown),
            close: Some(close),
            blocking_connect: Some(blocking_connect),
            accept: Some(accept),
            write: Some(write),
            writev: Some(writev),
            read: Some(read),
            set_write_handler: Some(set_write_handler),
            set_read_handler: Some(set_read_handler),
            get_last_error: Some(get_last_error),
            sync_write: Some(sync_write),
            sync_read: Some(sync_read),
            sync_readline: Some(sync_readline),
            has_pending_data: Some(has_pending_data),
            process_pending_data: Some(process_pending_data),
            postpone_update_state: Some(postpone_update_state),
            update_state: Some(update_state),
            tail: [0; TAIL],
            $($field: $value,)*
        }))
        .cast()
    };
}

/// The table of a line, for the life of the process.
pub fn of(line: Line) -> *mut c_void {
    match line {
        Line::V8_0 => table!(ConnectionType80 {
            get_type: Some(type_name),
            listen: Some(listen_80),
            connect: Some(connect),
        }),
        Line::V8_1 => table!(ConnectionType81 {
            get_type: Some(type_name),
            listen: Some(listen),
            close_listener: Some(close_listener),
            connect: Some(connect),
        }),
        Line::V9_0 | Line::V9_1 => table!(ConnectionType90 {
            get_type: Some(type_number),
            listen: Some(listen),
            close_listener: Some(close_listener),
            connect: Some(connect_multipath),
        }),
    }
}
