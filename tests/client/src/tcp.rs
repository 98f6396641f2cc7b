// SPDX-License-Identifier: BSD-3-Clause
//! The same client over TCP: the observer of a server whose RDMA side is under test.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::resp::{Client, Stream};

/// One TCP connection.
pub struct Connection(TcpStream);

impl Connection {
    /// Connects to `address` within `timeout`.
    pub fn open(address: SocketAddr, timeout: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, timeout)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .map_err(|source| Error::System { call: "connect", source })?;
        Ok(Self(stream))
    }

    /// Connects, and speaks RESP with `timeout` for each call.
    pub fn client(address: SocketAddr, timeout: Duration) -> Result<Client<Self>> {
        Ok(Client::new(Self::open(address, timeout)?, timeout))
    }
}

/// The time left until `deadline`; a time-out of nothing would mean for ever to a socket.
fn left(deadline: Instant, doing: &'static str) -> Result<Option<Duration>> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(Error::TimedOut(doing)),
        left => Ok(Some(left)),
    }
}

fn failure(call: &'static str, source: std::io::Error) -> Error {
    match source.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::TimedOut(call),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted => {
            Error::Closed
        }
        _ => Error::System { call, source },
    }
}

impl Stream for Connection {
    fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<()> {
        while !bytes.is_empty() {
            self.0
                .set_write_timeout(left(deadline, "sending")?)
                .map_err(|source| failure("setsockopt", source))?;
            match self.0.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failure("sending", error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, into: &mut Vec<u8>, deadline: Instant) -> Result<()> {
        let mut buffer = [0; 64 * 1024];
        loop {
            self.0
                .set_read_timeout(left(deadline, "receiving")?)
                .map_err(|source| failure("setsockopt", source))?;
            match self.0.read(&mut buffer) {
                Ok(0) => return Err(Error::Closed),
                Ok(count) => {
                    into.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failure("receiving", error)),
            }
        }
    }
}
