// SPDX-License-Identifier: BSD-3-Clause
//! A TCP port that leads to a server's RDMA port: how what speaks no RDMA, a stock replica,
//! comes to the server by way of it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use client::Error;
use client::rdma::{Connection, Options};
use client::resp::Stream;

use crate::lab::LOOPBACK;

/// How long one direction is waited for before the other has its turn.
const TURN: Duration = Duration::from_millis(2);

/// See the module's text. It is open until it is dropped.
pub struct Bridge {
    port: u16,
    closed: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Bridge {
    /// Opens one to `target`, which is connected to with `options` for each that comes.
    pub fn open(target: SocketAddr, options: Options) -> Result<Self> {
        let listener = TcpListener::bind((LOOPBACK, 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let closed = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&closed);
        let accepting = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let (options, until) = (options.clone(), Arc::clone(&until));
                        // Whatever ends one side ends the other.
                        std::thread::spawn(move || carry(stream, target, &options, &until));
                    }
                    Err(_) => std::thread::sleep(TURN),
                }
            }
        });
        Ok(Self { port, closed, accepting: Some(accepting) })
    }

    /// The TCP port, on the loopback address.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

/// Carries bytes both ways until one side has ended.
fn carry(
    mut tcp: TcpStream,
    target: SocketAddr,
    options: &Options,
    closed: &AtomicBool,
) -> Result<()> {
    // On some systems it would inherit the listener's way.
    tcp.set_nonblocking(false)?;
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(TURN))?;
    let mut rdma = Connection::open(target, options)?;
    let mut buffer = [0; 64 * 1024];
    let mut arrived = Vec::new();
    while !closed.load(Ordering::Relaxed) {
        match tcp.read(&mut buffer) {
            Ok(0) => return Ok(rdma.disconnect(options.timeout)?),
            Ok(count) => rdma.send(&buffer[..count], Instant::now() + options.timeout)?,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
        match rdma.receive(&mut arrived, Instant::now() + TURN) {
            Ok(()) => tcp.write_all(&arrived)?,
            Err(Error::TimedOut(_)) => {}
            Err(error) => return Err(error.into()),
        }
        arrived.clear();
    }
    Ok(())
}
