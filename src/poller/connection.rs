// SPDX-License-Identifier: BSD-3-Clause
//! The server's `connection` of our type.

use crate::endpoint::Endpoint;
use crate::host::connection::{Connection, State};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// Pieces that the server may hand to one `writev`, as for its TCP connections.
/// They are copied before `writev` returns, so the number costs us nothing.
const PIECES: u16 = 1024;

/// The structure behind the server's `connection *`: the server's own one first.
#[repr(C)]
#[derive(Debug)]
pub struct RdmaConnection {
    /// The server's part.
    pub base: Connection,
    /// Room for what a later patch release may have added: the probes of a server can't see so
    /// little, and the server would take it for its own.
    _later: [u64; 2],
    /// The RDMA side; gone once the server has closed.
    pub endpoint: Option<Arc<Endpoint>>,
    /// The server prints a descriptor, and calls shutdown(2) and the like on it.
    /// This one is the connection's own and answers those with a harmless error.
    descriptor: Option<OwnedFd>,
}

impl RdmaConnection {
    /// A connection of the registered type `kind`, without an endpoint yet. Freed
    /// by [`free`](Self::free).
    pub fn create(kind: *const c_void, state: State) -> *mut Self {
        // SAFETY: no pointers; a new descriptor or −1.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        // SAFETY: the descriptor is new and nobody else's.
        let descriptor = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) });
        let mut base = Connection::new(kind, state, PIECES);
        base.fd = descriptor.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        Box::into_raw(Box::new(Self { base, _later: [0; 2], endpoint: None, descriptor }))
    }

    /// Whether the connection has its descriptor.
    pub fn has_descriptor(&self) -> bool {
        self.descriptor.is_some()
    }

    /// Whether the server wants to block on this connection: the debugger of scripts says so
    /// by a flag of the descriptor, which has no other use. A system call.
    pub fn is_blocking(&self) -> bool {
        self.descriptor.as_ref().is_some_and(|descriptor| {
            // SAFETY: a query of a descriptor of our own.
            let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFL) };
            flags >= 0 && flags & libc::O_NONBLOCK == 0
        })
    }

    /// Ends the life of a connection.
    ///
    /// # Safety
    /// `connection` is from [`create`](Self::create) and is not used afterwards.
    pub unsafe fn free(connection: *mut Self) {
        // SAFETY: by the caller's promise.
        drop(unsafe { Box::from_raw(connection) });
    }
}
