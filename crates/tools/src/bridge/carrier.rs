// SPDX-License-Identifier: BSD-3-Clause
//! What carries one program's bytes to the server and back: an RDMA connection, or TCP in its
//! place. Nothing of it waits.

use crate::bridge::metrics::By;
use crate::bridge::watch::Part;
use client::Connection;
use socket2::Socket;
use std::io::{self, BufRead, Read, Write};

/// Bytes that TCP holds each way.
const RELAYED: usize = 64 * 1024;

/// See the module's text.
#[derive(Debug)]
pub enum Carrier {
    /// RDMA.
    Rdma(Box<Connection>),
    /// TCP.
    Tcp(Relay),
}

impl Carrier {
    /// Which of the two it is.
    pub fn by(&self) -> By {
        match self {
            Self::Rdma(_) => By::Rdma,
            Self::Tcp(_) => By::Tcp,
        }
    }

    /// Has `fill` put bytes for the server into memory from where they are sent, at most `most`;
    /// none if there is no room at this moment.
    ///
    /// # Errors
    /// If the server has gone. What `fill` answers is handed through.
    pub fn fill(
        &mut self,
        most: usize,
        fill: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Option<io::Result<usize>>> {
        match self {
            Self::Rdma(connection) => Ok(connection.try_fill(most, fill)?),
            Self::Tcp(relay) => relay.fill(most, fill),
        }
    }

    /// Bytes of the server's that wait; empty after its end.
    ///
    /// # Errors
    /// `WouldBlock` if there are none at this moment.
    pub fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self {
            Self::Rdma(connection) => connection.try_fill_buf(),
            Self::Tcp(relay) => relay.fill_buf(),
        }
    }

    /// So many of them were taken.
    pub fn consume(&mut self, count: usize) {
        match self {
            Self::Rdma(connection) => connection.consume(count),
            Self::Tcp(relay) => relay.taken += count,
        }
    }

    /// One of the descriptors told of something. What has become of it is told by the next
    /// attempt to read or write.
    pub fn notice(&mut self, part: Part) {
        let Self::Rdma(connection) = self else { return };
        let _ = match part {
            Part::Completions => connection.complete(),
            _ => connection.progress(),
        };
    }

    /// Once a second.
    pub fn tick(&mut self) {
        if let Self::Rdma(connection) = self {
            connection.tick();
        }
    }

    /// Whether the server is there, as far as is known.
    pub fn is_connected(&self) -> bool {
        match self {
            Self::Rdma(connection) => connection.is_connected(),
            Self::Tcp(relay) => !relay.ended,
        }
    }

    /// Ends it once all has arrived at the server; `false` if that is not known yet.
    ///
    /// # Errors
    /// If the server goes before.
    pub fn try_close(&mut self) -> io::Result<bool> {
        match self {
            Self::Rdma(connection) => Ok(connection.try_close()?),
            Self::Tcp(relay) => relay.flush(),
        }
    }
}

/// A TCP connection with memory on the way.
#[derive(Debug)]
pub struct Relay {
    socket: Socket,
    /// For the server: from `sent` on.
    outgoing: Vec<u8>,
    sent: usize,
    /// Of the server's: from `taken` to `arrived`.
    incoming: Vec<u8>,
    taken: usize,
    arrived: usize,
    ended: bool,
}

impl Relay {
    /// Of a socket that is connected, and does not wait.
    pub fn new(socket: Socket) -> Self {
        let (outgoing, incoming) = (Vec::new(), Vec::new());
        Self { socket, outgoing, sent: 0, incoming, taken: 0, arrived: 0, ended: false }
    }

    /// Whether nothing is left to be sent.
    fn flush(&mut self) -> io::Result<bool> {
        while self.sent < self.outgoing.len() {
            match (&self.socket).write(&self.outgoing[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        (self.outgoing, self.sent) = (Vec::new(), 0);
        Ok(true)
    }

    fn fill(
        &mut self,
        most: usize,
        mut fill: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Option<io::Result<usize>>> {
        if !self.flush()? {
            return Ok(None);
        }
        self.outgoing.resize(most.min(RELAYED), 0);
        let filled = fill(&mut self.outgoing);
        self.outgoing.truncate(*filled.as_ref().unwrap_or(&0));
        self.flush()?;
        Ok(Some(filled))
    }

    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        // A server that takes no more may have said why.
        let _ = self.flush();
        if self.taken == self.arrived {
            self.incoming.resize(RELAYED, 0);
            (self.taken, self.arrived) = (0, 0);
            let count = loop {
                match (&self.socket).read(&mut self.incoming) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        self.incoming = Vec::new();
                        return Err(error);
                    }
                    Ok(count) => break count,
                }
            };
            self.arrived = count;
            self.ended = count == 0;
        }
        Ok(&self.incoming[self.taken..self.arrived])
    }
}
