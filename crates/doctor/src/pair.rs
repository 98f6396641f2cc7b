// SPDX-License-Identifier: BSD-3-Clause
//! Two ends of one connection, both ours: what the checks are tried on.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbs::Error;
use verbs::cm::{Event, EventChannel, EventKind, Id};
use verbs::cq::{Batch, Completion, CompletionChannel, CompletionQueue};
use verbs::device::Device;
use verbs::mr::{Access, ProtectionDomain, Region};
use verbs::qp::{QueuePair, RemoteBuf};

/// Longest wait for a step of connecting.
const CONNECTING: Duration = Duration::from_secs(3);

/// Looks at a queue are at most so far apart, should the device lose an event.
const LOOK: Duration = Duration::from_millis(10);

/// Tries of a receive that the device can't take just now.
const TRIES: usize = 100;

/// Receives that a server posts for each connection.
pub(crate) const RECEIVES: usize = 64;
/// Work requests that a server may have in flight on one connection.
pub(crate) const SENDS: u32 = 42;
/// Bytes of a control message.
pub(crate) const MESSAGE: usize = 32;
/// Bytes that either end can write and be written to.
pub(crate) const BUFFER: usize = 4096;

/// One end: a queue pair with its queue, and three regions.
pub(crate) struct End {
    pub(crate) qp: QueuePair,
    pub(crate) queue: Arc<CompletionQueue>,
    pub(crate) channel: Arc<CompletionChannel>,
    /// Slots of the receives.
    pub(crate) messages: Region,
    /// Where the other end may write.
    pub(crate) window: Region,
    /// What this end sends.
    pub(crate) out: Region,
    pub(crate) domain: Arc<ProtectionDomain>,
    id: Arc<Id>,
}

/// A connection to itself.
pub(crate) struct Pair {
    /// The end that accepted.
    pub(crate) server: End,
    /// The end that asked.
    pub(crate) client: End,
}

/// Why there is no connection.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// Some call of making an end failed.
    Failed(Error),
    /// The connection manager said something else, or nothing in time.
    NoConnection(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Pair {
    /// Connects `address` to itself; either end may have `sends` work requests in flight, and has
    /// `receives` posted.
    pub(crate) fn connect(address: IpAddr, sends: u32, receives: usize) -> Result<Self, Trouble> {
        let (listening, asking) = (Arc::new(EventChannel::new()?), Arc::new(EventChannel::new()?));
        let listener = Id::new(&listening)?;
        // A port of the kernel's choice.
        listener.listen(SocketAddr::new(address, 0), 1)?;
        let to = listener.local_address().ok_or_else(|| said("no port to listen on"))?;
        let to = SocketAddr::new(address, to.port());

        let id = Arc::new(Id::new(&asking)?);
        let patience = CONNECTING.as_millis() as i32;
        id.resolve_address(None, to, patience)?;
        expect(&asking, EventKind::AddressResolved)?;
        id.resolve_route(patience)?;
        expect(&asking, EventKind::RouteResolved)?;
        let client = End::new(id, sends, receives)?;
        client.id.connect()?;

        let request = expect(&listening, EventKind::ConnectRequest)?;
        // SAFETY: the request's own id, which nobody else takes.
        let id = Arc::new(unsafe { Id::from_request(request.id, &listening) });
        let server = End::new(id, sends, receives)?;
        server.id.accept()?;
        expect(&asking, EventKind::Established)?;
        expect(&listening, EventKind::Established)?;
        // As a server does, so that a peer which is only ahead need not wait long.
        let _ = server.qp.shorten_rnr_timer();
        Ok(Self { server, client })
    }

    /// Ends the connection as a peer that leaves does.
    pub(crate) fn close(self) {
        self.client.id.disconnect();
        self.server.id.disconnect();
    }

    /// The device.
    pub(crate) fn device(&self) -> Option<Device> {
        self.server.id.device()
    }
}

impl End {
    fn new(id: Arc<Id>, sends: u32, receives: usize) -> Result<Self, Trouble> {
        let device = id.device().ok_or_else(|| said("the address belongs to no device"))?;
        let domain = Arc::new(ProtectionDomain::new(&device)?);
        let channel = Arc::new(CompletionChannel::new(&device)?);
        let entries = 2 * (sends + receives as u32);
        let queue = Arc::new(CompletionQueue::new(&channel, entries, 0, 0)?);
        let qp = QueuePair::new(&id, &domain, &queue, sends, receives as u32)?;
        let messages = Region::new(&domain, RECEIVES * MESSAGE, Access::Local)?;
        let window = Region::new(&domain, BUFFER, Access::RemoteWrite)?;
        let out = Region::new(&domain, BUFFER, Access::Local)?;
        let end = Self { qp, queue, channel, messages, window, out, domain, id };
        (0..receives).try_for_each(|slot| end.receive(slot))?;
        Ok(end)
    }

    /// Posts the receive of a slot, which its completion bears as id.
    pub(crate) fn receive(&self, slot: usize) -> Result<(), Error> {
        let slot = slot % RECEIVES;
        let mut tries = 0;
        loop {
            let into = self.messages.sge(slot * MESSAGE, MESSAGE as u32);
            match self.qp.post_receive(slot as u64, into) {
                // Some devices want to be asked again.
                Err(error) if error.is_queue_full() && tries < TRIES => tries += 1,
                done => return done,
            }
        }
    }

    /// Where the other end may write.
    pub(crate) fn target(&self) -> RemoteBuf {
        RemoteBuf {
            address: self.window.start().expose_provenance() as u64,
            rkey: self.window.rkey(),
        }
    }

    /// Adds completions to `all` until there are `count` of them, or the time is up.
    pub(crate) fn collect(
        &self,
        all: &mut Vec<Completion>,
        count: usize,
        limit: Duration,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let mut batch = Batch::default();
        loop {
            self.queue.poll(&mut batch)?;
            all.extend(batch.iter());
            let left = deadline.saturating_duration_since(Instant::now());
            if all.len() >= count || left.is_zero() {
                return Ok(());
            }
            if batch.iter().next().is_none() {
                readable(self.channel.fd(), left.min(LOOK));
            }
        }
    }
}

fn said(text: &str) -> Trouble {
    Trouble::NoConnection(text.to_owned())
}

/// Waits for one event of connecting.
fn expect(events: &EventChannel, kind: EventKind) -> Result<Event, Trouble> {
    let deadline = Instant::now() + CONNECTING;
    loop {
        match events.next()? {
            Some(event) if event.kind == kind => return Ok(event),
            Some(event) => {
                let text =
                    format!("{:?} (status {}) instead of {kind:?}", event.kind, event.status);
                return Err(said(&text));
            }
            None => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(said(&format!("no {kind:?} in {} s", CONNECTING.as_secs())));
                }
                readable(events.fd(), left);
            }
        }
    }
}

/// Whether a descriptor is readable within `limit`.
pub(crate) fn readable(fd: RawFd, limit: Duration) -> bool {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let limit = limit.as_millis().max(1) as i32;
    // SAFETY: one entry.
    unsafe { libc::poll(&mut entry, 1, limit) > 0 }
}
