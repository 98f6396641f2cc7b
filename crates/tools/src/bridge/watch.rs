// SPDX-License-Identifier: BSD-3-Clause
//! Which descriptors are watched, and which link an event is of.

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use std::io;
use std::os::fd::RawFd;

/// What a descriptor belongs to within a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The program's socket.
    Socket,
    /// The completions of the RDMA connection.
    Completions,
    /// Its connection manager's events.
    Manager,
    /// The TCP connection to the server.
    Relay,
}

const PARTS: [Part; 4] = [Part::Socket, Part::Completions, Part::Manager, Part::Relay];

/// Has the descriptors of one link watched. Closing one ends that.
pub struct Watch<'a> {
    registry: &'a Registry,
    slot: usize,
}

impl<'a> Watch<'a> {
    /// Those of the link in a slot.
    pub fn new(registry: &'a Registry, slot: usize) -> Self {
        Self { registry, slot }
    }

    /// Watches a descriptor from now on.
    ///
    /// # Errors
    /// The system's.
    pub fn add(&self, fd: RawFd, part: Part) -> io::Result<()> {
        let interest = match part {
            Part::Socket | Part::Relay => Interest::READABLE | Interest::WRITABLE,
            Part::Completions | Part::Manager => Interest::READABLE,
        };
        let token = Token(self.slot * PARTS.len() + part as usize);
        self.registry.register(&mut SourceFd(&fd), token, interest)
    }

    /// The slot and the part that an event's token stands for.
    pub fn of(token: Token) -> (usize, Part) {
        (token.0 / PARTS.len(), PARTS[token.0 % PARTS.len()])
    }
}
