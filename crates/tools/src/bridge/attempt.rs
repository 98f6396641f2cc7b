// SPDX-License-Identifier: BSD-3-Clause
//! The search for a connection to the server: over RDMA, or over TCP where that fails and may be.

use crate::bridge::carrier::{Carrier, Relay};
use crate::bridge::listen::tune;
use crate::bridge::metrics::By;
use crate::bridge::watch::{Part, Watch};
use crate::server::resolve;
use anyhow::{Error, Result};
use client::{Connecting, Options};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// While RDMA has just failed, further programs are not made to wait until it fails again.
const PAUSE: Duration = Duration::from_secs(2);

/// A name is looked up again by the first that connects after so long.
const NAME_LASTS: Duration = Duration::from_secs(30);

/// The server, and how it is reached.
#[derive(Debug)]
pub struct Target {
    /// As it was given.
    pub name: String,
    addresses: Vec<SocketAddr>,
    resolved: Instant,
    options: Options,
    /// The port of TCP, where that may be; none in it for that of RDMA.
    fallback: Option<Option<u16>>,
    /// RDMA is not tried before.
    rdma_after: Option<Instant>,
}

impl Target {
    /// See [`Arguments`](crate::bridge::Arguments).
    pub fn new(
        name: &str,
        addresses: Vec<SocketAddr>,
        options: Options,
        fallback: Option<Option<u16>>,
    ) -> Self {
        let (name, resolved) = (name.to_owned(), Instant::now());
        Self { name, addresses, resolved, options, fallback, rdma_after: None }
    }

    /// How long connecting may take.
    pub fn timeout(&self) -> Duration {
        self.options.timeout
    }

    /// What looks the name up, which may wait: if that is due, and there is a name.
    pub fn lookup(&mut self, now: Instant) -> Option<impl FnOnce() -> Vec<SocketAddr> + use<>> {
        let name = &self.name;
        let literal = name.parse::<IpAddr>().is_ok() || name.parse::<SocketAddr>().is_ok();
        if literal || now < self.resolved + NAME_LASTS {
            return None;
        }
        self.resolved = now;
        let name = name.clone();
        Some(move || resolve(&name).unwrap_or_default())
    }

    /// The name stands for these from now on, unless they are none.
    pub fn set_addresses(&mut self, addresses: Vec<SocketAddr>) {
        if !addresses.is_empty() {
            self.addresses = addresses;
        }
    }
}

/// A connection that is being looked for: RDMA at each address, then TCP at each.
#[derive(Debug)]
pub struct Attempt {
    trying: Option<Trying>,
    /// Those that were not tried yet, the last of them next.
    left: Vec<(By, SocketAddr)>,
    /// Why the first that was tried failed.
    failed: Option<Error>,
    deadline: Instant,
}

#[derive(Debug)]
enum Trying {
    /// With the number of its descriptors that are watched.
    Rdma(Connecting, usize),
    Tcp(Socket, SocketAddr),
}

/// What the descriptors of an RDMA connection are, in the order in which they come about.
const RDMA_PARTS: [Part; 2] = [Part::Manager, Part::Completions];

/// What became of an attempt.
#[derive(Debug)]
pub enum Reached {
    /// Nothing yet.
    NotYet,
    /// The server.
    Server(Carrier),
    /// Nobody, and why.
    Nobody(Error),
}

impl Attempt {
    /// Begins with the first.
    pub fn begin(target: &Target, now: Instant) -> Self {
        let rdma = target.addresses.iter().map(|&address| (By::Rdma, address));
        let tcp = target.fallback.into_iter().flat_map(|port| {
            let at = move |address: &SocketAddr| {
                (By::Tcp, SocketAddr::new(address.ip(), port.unwrap_or(address.port())))
            };
            target.addresses.iter().map(at)
        });
        let paused = target.fallback.is_some() && target.rdma_after.is_some_and(|at| now < at);
        let mut left: Vec<_> = if paused { tcp.collect() } else { rdma.chain(tcp).collect() };
        left.reverse();
        Self { trying: None, left, failed: None, deadline: now + target.options.timeout }
    }

    /// When what is tried now has taken too long.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Why the first that was tried failed, if it did.
    pub fn failed(&self) -> Option<&Error> {
        self.failed.as_ref()
    }

    /// Goes on.
    pub fn progress(&mut self, target: &mut Target, now: Instant, watch: &Watch<'_>) -> Reached {
        loop {
            if let Some(trying) = self.trying.take() {
                let by = trying.by();
                let step =
                    if now < self.deadline { trying.step(watch) } else { Err(trying.late()) };
                match step {
                    Ok(ControlFlow::Break(carrier)) => return Reached::Server(carrier),
                    Ok(ControlFlow::Continue(trying)) => {
                        self.trying = Some(trying);
                        return Reached::NotYet;
                    }
                    Err(error) => self.give_up(by, error, target, now),
                }
            }
            let Some((by, address)) = self.left.pop() else {
                let error = self.failed.take();
                return Reached::Nobody(error.unwrap_or_else(|| Error::msg("no address")));
            };
            self.deadline = now + target.options.timeout;
            match Trying::begin(by, address, &target.options, watch) {
                Ok(trying) => self.trying = Some(trying),
                Err(error) => self.give_up(by, error, target, now),
            }
        }
    }

    fn give_up(&mut self, by: By, error: Error, target: &mut Target, now: Instant) {
        if by == By::Rdma && !self.left.iter().any(|(by, _)| *by == By::Rdma) {
            target.rdma_after = Some(now + PAUSE);
        }
        // TCP is tried for want of RDMA, so the reason for that is the one to tell.
        self.failed.get_or_insert(error);
    }
}

impl Trying {
    fn begin(by: By, address: SocketAddr, options: &Options, watch: &Watch<'_>) -> Result<Self> {
        match by {
            By::Rdma => {
                let (connecting, mut watched) = (Connecting::begin(address, options)?, 0);
                watch_more(&connecting, &mut watched, watch)?;
                Ok(Self::Rdma(connecting, watched))
            }
            By::Tcp => match connect(address, watch) {
                Ok(socket) => Ok(Self::Tcp(socket, address)),
                Err(error) => Err(over_tcp(address, &error)),
            },
        }
    }

    fn by(&self) -> By {
        match self {
            Self::Rdma(..) => By::Rdma,
            Self::Tcp(..) => By::Tcp,
        }
    }

    /// Goes on, as far as that to a connection.
    fn step(self, watch: &Watch<'_>) -> Result<ControlFlow<Carrier, Self>> {
        match self {
            Self::Rdma(mut connecting, mut watched) => {
                let Some(mut connection) = connecting.progress()? else {
                    watch_more(&connecting, &mut watched, watch)?;
                    return Ok(ControlFlow::Continue(Self::Rdma(connecting, watched)));
                };
                let descriptors = connection.descriptors().into_iter().rev();
                for (fd, part) in descriptors.zip(RDMA_PARTS).skip(watched) {
                    watch.add(fd, part)?;
                }
                // What came before it was watched.
                connection.progress()?;
                Ok(ControlFlow::Break(Carrier::Rdma(Box::new(connection))))
            }
            Self::Tcp(socket, address) => match is_connected(&socket) {
                Ok(true) => Ok(ControlFlow::Break(Carrier::Tcp(Relay::new(socket)))),
                Ok(false) => Ok(ControlFlow::Continue(Self::Tcp(socket, address))),
                Err(error) => Err(over_tcp(address, &error)),
            },
        }
    }

    /// That it takes too long.
    fn late(&self) -> Error {
        match self {
            Self::Rdma(connecting, _) => {
                let (address, awaited) = (connecting.address(), connecting.awaited());
                Error::msg(format!(
                    "cannot connect to {address} over RDMA: timed out while waiting for {awaited}"
                ))
            }
            Self::Tcp(_, address) => over_tcp(*address, &io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Watches what has joined the descriptors.
fn watch_more(connecting: &Connecting, watched: &mut usize, watch: &Watch<'_>) -> Result<()> {
    for (fd, part) in connecting.descriptors().zip(RDMA_PARTS).skip(*watched) {
        watch.add(fd, part)?;
        *watched += 1;
    }
    Ok(())
}

fn connect(address: SocketAddr, watch: &Watch<'_>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    tune(&socket)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => watch.add(socket.as_raw_fd(), Part::Relay)?,
    }
    Ok(socket)
}

fn is_connected(socket: &Socket) -> io::Result<bool> {
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

fn over_tcp(address: SocketAddr, error: &io::Error) -> Error {
    Error::msg(format!("cannot connect to {address} over TCP: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(name: &str) -> (Target, Instant) {
        let addresses = vec!["127.0.0.1:7".parse().unwrap()];
        let target = Target::new(name, addresses, Options::default(), Some(Some(9)));
        let resolved = target.resolved;
        (target, resolved)
    }

    #[test]
    fn a_name_is_looked_up_again_in_time_and_an_address_never() {
        for (name, due) in [("localhost:7", true), ("127.0.0.1:7", false), ("::1", false)] {
            let (mut target, resolved) = target(name);
            assert!(target.lookup(resolved).is_none(), "{name}: at once");
            assert_eq!(target.lookup(resolved + NAME_LASTS).is_some(), due, "{name}");
            assert!(target.lookup(resolved + NAME_LASTS).is_none(), "{name}: twice");
        }
        let (mut target, resolved) = target("localhost:7");
        let found = target.lookup(resolved + NAME_LASTS).unwrap()();
        assert!(found.contains(&"127.0.0.1:7".parse().unwrap()), "{found:?}");
        target.set_addresses(Vec::new());
        assert_eq!(target.addresses.len(), 1, "a name that is lost is not forgotten");
    }

    #[test]
    fn while_rdma_has_just_failed_tcp_alone_is_tried() {
        let (mut target, now) = target("127.0.0.1:7");
        let ways = |attempt: &Attempt| {
            attempt.left.iter().rev().map(|(by, to)| (*by, to.port())).collect::<Vec<_>>()
        };
        let mut attempt = Attempt::begin(&target, now);
        assert_eq!(ways(&attempt), [(By::Rdma, 7), (By::Tcp, 9)]);
        let (by, _) = attempt.left.pop().unwrap();
        attempt.give_up(by, Error::msg("no device"), &mut target, now);
        let second = Attempt::begin(&target, now + PAUSE / 2);
        assert_eq!(ways(&second), [(By::Tcp, 9)]);
        // Nor does a failure of TCP make the pause any longer.
        attempt.left.clear();
        attempt.give_up(By::Tcp, Error::msg("nobody"), &mut target, now + PAUSE / 2);
        assert_eq!(attempt.failed.unwrap().to_string(), "no device");
        assert_eq!(ways(&Attempt::begin(&target, now + PAUSE)).len(), 2);
    }
}
