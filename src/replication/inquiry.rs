// SPDX-License-Identifier: BSD-3-Clause
//! Asks the server behind a TCP address who it is, by a connection of its own, which does not
//! block: the event loop says when it goes on.

use super::identity::{self, Answer, Identity, LONGEST_ANSWER, QUESTION};
use crate::conntype::address::resolve;
use crate::host::api;
use crate::host::tcp_slots::Target;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use verbs::address::to_c;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The server can't be reached over TCP either.
    Unreachable(io::Error),
    /// It does not say who it is, but this.
    Other(String),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => write!(f, "it can't be reached over TCP either: {error}"),
            Self::Other(said) => write!(
                f,
                "it does not tell over TCP which server it is (RDMA.IDENTITY: \"{said}\"), as one \
                 with valkey-rdma does"
            ),
        }
    }
}

/// A question under way. It ends when it is dropped.
#[derive(Debug)]
pub(super) struct Inquiry {
    socket: OwnedFd,
    number: usize,
    asked: bool,
    answer: Vec<u8>,
}

impl Inquiry {
    /// Begins one. `on_event` is called with `number` when it may go on.
    pub(super) fn start(
        target: &Target,
        number: usize,
        on_event: api::OnDescriptor,
    ) -> Result<Self, Unanswered> {
        let connected = socket(target).map_err(Unanswered::Unreachable)?;
        let inquiry = Self { socket: connected, number, asked: false, answer: Vec::new() };
        if !api::watch_writable(inquiry.socket.as_raw_fd(), on_event, number) {
            let full = io::Error::from_raw_os_error(libc::ERANGE);
            return Err(Unanswered::Unreachable(full));
        }
        Ok(inquiry)
    }

    /// Goes on. `None` if it has to wait.
    pub(super) fn proceed(
        &mut self,
        on_event: api::OnDescriptor,
    ) -> Option<Result<Identity, Unanswered>> {
        match self.step(on_event) {
            Ok(Answer::Incomplete) => None,
            Ok(Answer::Is(identity)) => Some(Ok(identity)),
            Ok(Answer::Other(said)) => Some(Err(Unanswered::Other(said))),
            Err(error) => Some(Err(Unanswered::Unreachable(error))),
        }
    }

    fn step(&mut self, on_event: api::OnDescriptor) -> io::Result<Answer> {
        let fd = self.socket.as_raw_fd();
        if !self.asked {
            api::unwatch_writable(fd);
            connected(fd)?;
            // A new connection takes so little at once.
            // SAFETY: as many bytes as said.
            let sent = unsafe {
                libc::send(fd, QUESTION.as_ptr().cast(), QUESTION.len(), libc::MSG_NOSIGNAL)
            };
            if sent != QUESTION.len() as isize {
                return Err(io::Error::last_os_error());
            }
            self.asked = true;
            if !api::watch(fd, on_event, self.number) {
                return Err(io::Error::from_raw_os_error(libc::ERANGE));
            }
            return Ok(Answer::Incomplete);
        }
        let mut bytes = [0_u8; LONGEST_ANSWER];
        // SAFETY: a place for as many bytes.
        let count = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match count {
            0 => return Err(io::Error::from(io::ErrorKind::ConnectionReset)),
            1.. => self.answer.extend_from_slice(&bytes[..count as usize]),
            _ => {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {
                        Ok(Answer::Incomplete)
                    }
                    _ => Err(error),
                };
            }
        }
        Ok(identity::read(&self.answer))
    }
}

impl Drop for Inquiry {
    fn drop(&mut self) {
        let fd = self.socket.as_raw_fd();
        if self.asked { api::unwatch(fd) } else { api::unwatch_writable(fd) }
    }
}

/// A socket that is being connected.
fn socket(target: &Target) -> io::Result<OwnedFd> {
    let port = u16::try_from(target.port).map_err(|_| io::ErrorKind::InvalidInput)?;
    let to = resolve(&target.address.to_string_lossy(), port)?;
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    let socket = unsafe {
        let how = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = libc::socket(family, how, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let fd = socket.as_raw_fd();
    // As for the link itself, a source that can't be had is no reason not to connect.
    if let Some(from) = target.source.as_ref()
        && let Ok(from) = resolve(&from.to_string_lossy(), 0)
    {
        call(from, |address, length| {
            // SAFETY: a socket address of the given length.
            unsafe { libc::bind(fd, address, length) }
        });
    }
    // SAFETY: as above.
    let outcome = call(to, |address, length| unsafe { libc::connect(fd, address, length) });
    let error = io::Error::last_os_error();
    if outcome != 0 && error.raw_os_error() != Some(libc::EINPROGRESS) {
        return Err(error);
    }
    Ok(socket)
}

/// Calls a function of C with an address.
fn call(
    address: SocketAddr,
    function: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> i32,
) -> i32 {
    let storage = to_c(address);
    let length = match address {
        SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
        SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
    };
    function((&raw const storage).cast(), length as libc::socklen_t)
}

/// Whether a socket that was being connected is.
fn connected(fd: i32) -> io::Result<()> {
    let mut error: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: a place for a number.
    let asked = unsafe {
        let place = (&raw mut error).cast();
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, place, &mut length)
    };
    match (asked, error) {
        (0, 0) => Ok(()),
        (0, error) => Err(io::Error::from_raw_os_error(error)),
        _ => Err(io::Error::last_os_error()),
    }
}
