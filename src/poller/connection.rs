// SPDX-License-Identifier: BSD-3-Clause
//! The server's `connection` of our type.

use crate::endpoint::Endpoint;
use crate::host::connection::{Connection, State};
use redis_module::raw;
use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Pieces that the server may hand to one `writev`, as for its TCP connections.
/// They are copied before `writev` returns, so the number costs us nothing.
const PIECES: u16 = 1024;

/// Who opened a connection in the server's place, and goes with it.
pub trait Opener: fmt::Debug + Send {
    /// The server closes the connection, which is as `base` says. Main thread.
    fn closed(&mut self, base: &Connection);
}

/// The structure behind the server's `connection *`: the server's own one first.
///
/// It lies in memory of the server's allocator. So the TCP type may free it as its own while it
/// is one of that type, see [`create_tcp`](Self::create_tcp).
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
    /// Who opened it, if it is a link between servers.
    pub opener: Option<Box<dyn Opener>>,
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
        Self::allocate(base, descriptor)
    }

    /// A new connection of the server's own TCP type, `kind`, as that makes it, but with room
    /// behind it. It owns nothing as long as it is TCP's, so that the server may free it.
    pub fn create_tcp(kind: *const c_void) -> *mut Self {
        Self::allocate(Connection::new(kind, State::None, PIECES), None)
    }

    fn allocate(base: Connection, descriptor: Option<OwnedFd>) -> *mut Self {
        // SAFETY: as much memory of the server's allocator as is written; that never returns
        // without.
        unsafe {
            let place = raw::RedisModule_Calloc.expect("server API")(1, size_of::<Self>());
            let place = place.cast::<Self>();
            place.write(Self { base, _later: [0; 2], endpoint: None, opener: None, descriptor });
            place
        }
    }

    /// Makes a new connection of the TCP type one of ours, `kind`, with a descriptor that keeps
    /// what the server sets: whether and for how long a read may block. `false` if there is no
    /// descriptor left.
    pub fn take_over(&mut self, kind: *const c_void) -> bool {
        // SAFETY: no pointers; a new descriptor or −1.
        let fd = unsafe {
            let how = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            libc::socket(libc::AF_UNIX, how, 0)
        };
        if fd < 0 {
            return false;
        }
        // SAFETY: the descriptor is new and nobody else's.
        self.descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
        self.base.fd = fd;
        self.base.kind = kind;
        true
    }

    /// Makes it a new connection of the TCP type `kind` again, which owns nothing.
    pub fn give_back(&mut self, kind: *const c_void) {
        debug_assert!(self.endpoint.is_none(), "the endpoint stays with us");
        self.opener = None;
        self.descriptor = None;
        self.base.fd = -1;
        self.base.kind = kind;
        self.base.read_handler = None;
        self.base.write_handler = None;
        self.base.set_state(State::None);
    }

    /// Whether the connection has its descriptor.
    pub fn has_descriptor(&self) -> bool {
        self.descriptor.is_some()
    }

    /// How long the server wants to block on this connection, if it does: the debugger of
    /// scripts and a replica that loads its data say so by the descriptor, which has no other
    /// use. [`Duration::MAX`] is for as long as it takes. A system call or two.
    pub fn blocks_for(&self) -> Option<Duration> {
        let fd = self.descriptor.as_ref()?.as_raw_fd();
        // SAFETY: a query of a descriptor of our own.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if flags < 0 || flags & libc::O_NONBLOCK != 0 {
            return None;
        }
        let mut limit = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let mut length = size_of::<libc::timeval>() as libc::socklen_t;
        // SAFETY: as above, with a place for the answer. Only a socket has one.
        let asked = unsafe {
            let place = (&raw mut limit).cast();
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, place, &mut length)
        };
        let limit = Duration::new(limit.tv_sec as u64, limit.tv_usec as u32 * 1000);
        Some(if asked != 0 || limit.is_zero() { Duration::MAX } else { limit })
    }

    /// Ends the life of a connection.
    ///
    /// # Safety
    /// `connection` is from this module and is not used afterwards.
    pub unsafe fn free(connection: *mut Self) {
        // SAFETY: by the caller's promise; it was written by `allocate`, in memory of the
        // server's allocator.
        unsafe {
            std::ptr::drop_in_place(connection);
            raw::RedisModule_Free.expect("server API")(connection.cast());
        }
    }
}
