// SPDX-License-Identifier: BSD-3-Clause
//! `struct connection` (`src/connection.h`), the same in all supported lines.
//!
//! The server reads `type` and `iovcnt` on any thread, everything else on the
//! main thread; `state` and `last_errno` are also written by a read or write
//! that an I/O thread does, so they are atomics here.

use std::ffi::{c_int, c_short, c_ushort, c_void};
use std::mem::{offset_of, size_of};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

/// A callback of the server, called with the connection on the main thread.
pub type Handler = unsafe extern "C" fn(*mut Connection);

/// States of a connection (`ConnectionState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum State {
    /// Created, not connecting yet.
    None = 0,
    /// On its way to a server.
    Connecting = 1,
    /// Accepted; the handshake is not over.
    Accepting = 2,
    /// Established.
    Connected = 3,
    /// Ended by the peer.
    Closed = 4,
    /// Broken.
    Error = 5,
}

/// The connection is to be closed when the last handler returns.
pub const FLAG_CLOSE_SCHEDULED: c_short = 1;
/// The write handler goes before the read handler.
pub const FLAG_WRITE_BARRIER: c_short = 2;

/// `struct connection`. Ours is the first field of a larger structure.
#[repr(C)]
#[derive(Debug)]
pub struct Connection {
    /// The table of its type.
    pub kind: *const c_void,
    pub(super) state: AtomicI32,
    pub(super) last_errno: AtomicI32,
    /// The descriptor that the server prints.
    pub fd: c_int,
    /// The flags above.
    pub flags: c_short,
    /// Handlers that are running.
    pub refs: c_short,
    /// Most pieces of one `writev`.
    pub iovcnt: c_ushort,
    /// The server's client.
    pub private_data: *mut c_void,
    /// Called when connecting or accepting is over.
    pub conn_handler: Option<Handler>,
    /// Called when there is room to write.
    pub write_handler: Option<Handler>,
    /// Called when there is something to read.
    pub read_handler: Option<Handler>,
}

const _: () = {
    assert!(size_of::<Connection>() == 64);
    assert!(offset_of!(Connection, state) == 8);
    assert!(offset_of!(Connection, last_errno) == 12);
    assert!(offset_of!(Connection, fd) == 16);
    assert!(offset_of!(Connection, flags) == 20);
    assert!(offset_of!(Connection, refs) == 22);
    assert!(offset_of!(Connection, iovcnt) == 24);
    assert!(offset_of!(Connection, private_data) == 32);
    assert!(offset_of!(Connection, conn_handler) == 40);
    assert!(offset_of!(Connection, write_handler) == 48);
    assert!(offset_of!(Connection, read_handler) == 56);
};

impl Connection {
    /// A connection of the registered type `kind`.
    pub fn new(kind: *const c_void, state: State, iovcnt: u16) -> Self {
        Self {
            kind,
            state: AtomicI32::new(state as i32),
            last_errno: AtomicI32::new(0),
            fd: -1,
            flags: 0,
            refs: 0,
            iovcnt,
            private_data: ptr::null_mut(),
            conn_handler: None,
            write_handler: None,
            read_handler: None,
        }
    }

    /// The connection's state; any thread.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            1 => State::Connecting,
            2 => State::Accepting,
            3 => State::Connected,
            4 => State::Closed,
            5 => State::Error,
            _ => State::None,
        }
    }

    /// Sets the state; any thread.
    pub fn set_state(&self, state: State) {
        self.state.store(state as i32, Ordering::Release);
    }

    /// The connection is broken for the reason `errno`; any thread.
    pub fn fail(&self, errno: i32) {
        self.last_errno.store(errno, Ordering::Relaxed);
        self.set_state(State::Error);
    }

    /// The last error's number; any thread.
    pub fn last_errno(&self) -> i32 {
        self.last_errno.load(Ordering::Relaxed)
    }
}
