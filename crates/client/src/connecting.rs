// SPDX-License-Identifier: BSD-3-Clause
//! A connection in the making.

use crate::{Connection, Error, Options};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;
use verbs::cm::{EventChannel, EventKind, Id};
use verbs::library;

/// A connection in the making, for event loops: nothing of it waits.
///
/// When one of its [`descriptors`](Self::descriptors) is readable, [`progress`](Self::progress)
/// goes on. Dropping it gives it up.
#[derive(Debug)]
pub struct Connecting {
    // Before the id, which has its queue pair.
    stage: Stage,
    id: Arc<Id>,
    events: Arc<EventChannel>,
    address: SocketAddr,
    options: Options,
    deadline: Instant,
}

/// What is waited for.
#[derive(Debug)]
enum Stage {
    Address,
    Route,
    /// That the server takes the connection.
    Taken(Box<Connection>),
    /// That it announces its window.
    Window(Box<Connection>),
    /// Nothing: it was handed out, or has failed.
    Over,
}

impl Connecting {
    /// Begins to connect to a server.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn begin(address: SocketAddr, options: &Options) -> Result<Self, Error> {
        library::load().map_err(Error::Library)?;
        let deadline = Instant::now() + options.timeout;
        let events = Arc::new(EventChannel::new()?);
        let id = Arc::new(Id::new(&events)?);
        let source = options.source.map(|ip| SocketAddr::new(ip, 0));
        let connecting =
            Self { stage: Stage::Address, id, events, address, options: options.clone(), deadline };
        connecting.id.resolve_address(source, address, connecting.milliseconds())?;
        Ok(connecting)
    }

    fn milliseconds(&self) -> i32 {
        i32::try_from(self.options.timeout.as_millis()).unwrap_or(i32::MAX)
    }

    /// The server's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// When [`Options::timeout`] is over; it is for the caller to look at the clock.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// What is waited for, in words, for [`Error::TimedOut`].
    pub fn awaited(&self) -> &'static str {
        match self.stage {
            Stage::Window(_) => "the server's window",
            _ => "the server to take the connection",
        }
    }

    /// One of them is readable when there may be something to do. Another may join them in each
    /// [`progress`](Self::progress), and all remain those of the [`Connection`].
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let completions = match &self.stage {
            Stage::Taken(connection) | Stage::Window(connection) => {
                Some(connection.descriptors()[0])
            }
            _ => None,
        };
        [self.events.fd()].into_iter().chain(completions)
    }

    /// Goes on as far as possible; returns the connection once commands can be written to it.
    ///
    /// # Errors
    /// If it can't be had: see [`Error`].
    pub fn progress(&mut self) -> Result<Option<Connection>, Error> {
        loop {
            let awaited = match &mut self.stage {
                Stage::Address => EventKind::AddressResolved,
                Stage::Route => EventKind::RouteResolved,
                Stage::Taken(_) => EventKind::Established,
                Stage::Window(connection) => {
                    if !connection.is_open()? {
                        return Ok(None);
                    }
                    let Stage::Window(connection) = std::mem::replace(&mut self.stage, Stage::Over)
                    else {
                        unreachable!("it was one a moment ago")
                    };
                    return Ok(Some(*connection));
                }
                Stage::Over => return Ok(None),
            };
            let Some(event) = self.events.next()? else { return Ok(None) };
            if event.kind != awaited {
                return Err(Error::NotConnected(self.address, event.kind, event.status));
            }
            self.stage = match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Address => {
                    self.id.resolve_route(self.milliseconds())?;
                    Stage::Route
                }
                Stage::Route => {
                    let (id, events) = (Arc::clone(&self.id), Arc::clone(&self.events));
                    let asked = Connection::ask(id, events, self.address, &self.options)?;
                    Stage::Taken(Box::new(asked))
                }
                Stage::Taken(mut connection) => {
                    connection.establish()?;
                    Stage::Window(connection)
                }
                other => other,
            };
        }
    }
}
