// SPDX-License-Identifier: BSD-3-Clause
//! One connection of Valkey over RDMA, from the client's side.
//!
//! Each side announces a receive buffer, its *window*. The other fills it front to back by
//! RDMA writes, each announced by an immediate that carries its length, and waits once it is
//! full; the owner announces again when the window is full *and* read. Here, bytes are taken
//! out of the window as soon as a call sees them, unless [`Connection::hold`] says otherwise:
//! a held window fills up and is not announced again, which is what a stalled reader looks
//! like to the server. A client that makes no calls at all is the other kind of stalled
//! reader: it does not even poll.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rdma_sys::{ibv_wc_opcode, ibv_wc_status, rdma_cm_event_type};

use crate::error::{Error, Result};
use crate::resp::{Client, Stream};
use crate::verbs::{
    CmId, Completion, CompletionQueue, Memory, ProtectionDomain, QueuePair, Remote, Work,
    wait_readable,
};
use crate::wire::{self, Control, Window};

/// Receives posted, and sends allowed in flight: what libvalkey has.
const DEPTH: u32 = 1024;
/// Sends kept free of payload, so that an announcement always finds room.
const CONTROL_RESERVE: u32 = 16;
/// Room for a control message, and for one that is longer than the protocol allows.
const SLOT: usize = 64;
/// How long a wait relies on a notification before it looks for itself: a fabric on which
/// faults are planned may lose one.
const LOOK_AGAIN_MS: i32 = 500;
/// Marks the `wr_id` of a send; a receive carries the number of its slot.
const SENT: u64 = 1 << 32;

/// How to connect.
#[derive(Clone, Debug)]
pub struct Options {
    /// The length of the receive window to announce.
    pub window: u32,
    /// The local address to connect from.
    pub source: Option<IpAddr>,
    /// How long connecting may take.
    pub timeout: Duration,
    /// Whether to announce the window once connected, as every proper client does.
    pub announce: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: 1024 * 1024, source: None, timeout: Duration::from_secs(10), announce: true }
    }
}

/// A connection. Dropping it is an abrupt end: what a killed client leaves behind.
pub struct Connection {
    // In the order in which they may go: work before memory, memory before its domain.
    queue_pair: Option<QueuePair>,
    queue: CompletionQueue,
    control: Memory,
    staging: Memory,
    window: Memory,
    domain: ProtectionDomain,
    id: CmId,

    /// The server's window and how much of it is filled.
    peer: Option<Window>,
    sent: u32,
    /// Bytes that the server has put into our window, and how many of them were taken.
    arrived: usize,
    taken: usize,
    /// Bytes taken out of the window that no call has asked for yet.
    inbox: Vec<u8>,
    held: bool,
    in_flight: u32,
    next_control: u32,
    announcements: u64,
    ended: Option<Ended>,
}

/// How the connection was seen to end.
enum Ended {
    Disconnected,
    Failed(String),
}

// SAFETY: the RDMA objects may be used from any thread, and one connection is used by one
// thread at a time since every call takes it exclusively.
unsafe impl Send for Connection {}

impl Connection {
    /// Connects to `address`.
    pub fn open(address: SocketAddr, options: &Options) -> Result<Self> {
        let deadline = Instant::now() + options.timeout;
        let id = CmId::new()?;
        let source = options.source.map(|ip| SocketAddr::new(ip, 0));
        id.resolve_address(source, address, milliseconds_left(deadline))?;
        expect_event(&id, rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED, deadline)?;
        id.resolve_route(milliseconds_left(deadline))?;
        expect_event(&id, rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED, deadline)?;

        let device = id.device();
        let domain = ProtectionDomain::new(device)?;
        let queue = CompletionQueue::new(device, 2 * DEPTH)?;
        let queue_pair = QueuePair::new(&id, &domain, &queue, DEPTH)?;
        let control = Memory::new(&domain, 2 * DEPTH as usize * SLOT, false)?;
        for slot in 0..u64::from(DEPTH) {
            queue_pair.post_receive(&control, slot as usize * SLOT, wire::CONTROL_LEN, slot)?;
        }
        let window = Memory::new(&domain, options.window as usize, true)?;
        let staging = Memory::new(&domain, 0, false)?;
        id.connect()?;
        expect_event(&id, rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, deadline)?;

        let mut connection = Self {
            queue_pair: Some(queue_pair),
            queue,
            control,
            staging,
            window,
            domain,
            id,
            peer: None,
            sent: 0,
            arrived: 0,
            taken: 0,
            inbox: Vec::new(),
            held: false,
            in_flight: 0,
            next_control: 0,
            announcements: 0,
            ended: None,
        };
        if options.announce {
            connection.announce()?;
        }
        Ok(connection)
    }

    /// Connects, and speaks RESP with `timeout` for each call.
    pub fn client(
        address: SocketAddr,
        options: &Options,
        timeout: Duration,
    ) -> Result<Client<Self>> {
        Ok(Client::new(Self::open(address, options)?, timeout))
    }

    /// Keeps what arrives in the window from now on, or takes it out again.
    pub fn hold(&mut self, held: bool) -> Result<()> {
        self.held = held;
        self.take_arrived()
    }

    /// Bytes that lie in the held window.
    pub fn held_bytes(&self) -> usize {
        self.arrived - self.taken
    }

    /// How often the server has announced a window.
    pub fn announcements(&self) -> u64 {
        self.announcements
    }

    /// The server's window as it was last announced, waiting for the first until `deadline`.
    pub fn peer_window(&mut self, deadline: Instant) -> Result<Window> {
        loop {
            self.progress()?;
            if let Some(window) = self.peer {
                return Ok(window);
            }
            self.live()?;
            self.wait(deadline, "waiting for the server's window")?;
        }
    }

    /// Size of the server's window, and what is left of it, once some is, until `deadline`.
    pub fn peer_room(&mut self, deadline: Instant) -> Result<(usize, usize)> {
        loop {
            let window = self.peer_window(deadline)?;
            if window.length > self.sent {
                return Ok((window.length as usize, (window.length - self.sent) as usize));
            }
            self.live()?;
            self.wait(deadline, "waiting for the server's next window")?;
        }
    }

    /// This side's window, as an announcement would have it.
    pub fn own_window(&self) -> Window {
        Window {
            address: self.window.address(),
            length: self.window.length() as u32,
            rkey: self.window.rkey(),
        }
    }

    /// Sends `message` as a control message, whatever it says and however long it is, up to
    /// 64 bytes.
    pub fn post_control(&mut self, message: &[u8]) -> Result<()> {
        assert!(message.len() <= SLOT, "a control message of at most 64 bytes");
        let slot = DEPTH + self.next_control % DEPTH;
        self.next_control = self.next_control.wrapping_add(1);
        let offset = slot as usize * SLOT;
        self.control.copy_in(offset, message);
        let Some(queue_pair) = &self.queue_pair else {
            return Err(Error::Closed);
        };
        queue_pair.post(Work::Send, &self.control, offset, message.len(), SENT)?;
        self.in_flight += 1;
        Ok(())
    }

    /// Writes `bytes` to any address on the other side under any key, announced by any
    /// immediate or by none. It may fail later: see [`Self::wait_end`].
    pub fn post_write(
        &mut self,
        address: u64,
        rkey: u32,
        bytes: &[u8],
        immediate: Option<u32>,
    ) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        self.fit_staging(bytes.len(), deadline)?;
        self.staging.copy_in(0, bytes);
        self.write_staged(Remote { address, rkey }, 0, bytes.len(), immediate)
    }

    /// Waits until all work posted so far is done.
    pub fn flush(&mut self, deadline: Instant) -> Result<()> {
        loop {
            self.progress()?;
            if self.in_flight == 0 {
                return Ok(());
            }
            self.live()?;
            self.wait(deadline, "waiting for work in flight")?;
        }
    }

    /// Waits until the connection is over, for whatever reason.
    pub fn wait_end(&mut self, deadline: Instant) -> Result<()> {
        loop {
            self.progress()?;
            if self.ended.is_some() {
                return Ok(());
            }
            self.wait(deadline, "waiting for the end")?;
        }
    }

    /// Disconnects in order: what was sent is acknowledged first, and the other side agrees.
    pub fn disconnect(mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        self.flush(deadline)?;
        self.id.disconnect()?;
        self.wait_end(deadline)
    }

    /// Falls silent: from now on nothing that the server sends is answered, and it is not
    /// told. What a client behind a broken link looks like, for as long as this value lives.
    pub fn vanish(&mut self) {
        self.queue_pair = None;
        self.ended = Some(Ended::Disconnected);
    }

    fn announce(&mut self) -> Result<()> {
        self.arrived = 0;
        self.taken = 0;
        self.post_control(&self.own_window().announcement())
    }

    /// Moves what lies in the window to the inbox, and announces the window again if that
    /// was the last of it.
    fn take_arrived(&mut self) -> Result<()> {
        if self.held || self.taken == self.arrived {
            return Ok(());
        }
        self.window.copy_out(self.taken, self.arrived - self.taken, &mut self.inbox);
        self.taken = self.arrived;
        if self.taken == self.window.length() && self.ended.is_none() {
            self.announce()?;
        }
        Ok(())
    }

    /// Handles every completion that is there.
    fn progress(&mut self) -> Result<()> {
        while let Some(completion) = self.queue.poll()? {
            self.complete(&completion)?;
        }
        self.take_arrived()
    }

    fn complete(&mut self, completion: &Completion) -> Result<()> {
        if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
            if self.ended.is_none() {
                self.ended = Some(match completion.status {
                    ibv_wc_status::IBV_WC_WR_FLUSH_ERR => Ended::Disconnected,
                    _ => Ended::Failed(completion.status_text()),
                });
            }
            self.in_flight = 0;
            return Ok(());
        }
        match completion.opcode {
            ibv_wc_opcode::IBV_WC_RECV => {
                self.control_message(completion)?;
                self.repost(completion.wr_id)
            }
            ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
                self.arrived += completion.immediate as usize;
                if self.arrived > self.window.length() {
                    return Err(Error::Protocol(format!(
                        "{} bytes announced into a window of {}",
                        self.arrived,
                        self.window.length()
                    )));
                }
                self.repost(completion.wr_id)?;
                self.take_arrived()
            }
            _ => {
                self.in_flight -= 1;
                Ok(())
            }
        }
    }

    fn control_message(&mut self, completion: &Completion) -> Result<()> {
        let mut message = Vec::new();
        let offset = completion.wr_id as usize * SLOT;
        let length = (completion.byte_len as usize).min(SLOT);
        self.control.copy_out(offset, length, &mut message);
        match wire::parse(&message) {
            Some(Control::Window(window)) => {
                self.peer = Some(window);
                self.sent = 0;
                self.announcements += 1;
                Ok(())
            }
            Some(Control::Keepalive) => Ok(()),
            // What libvalkey would not accept either.
            Some(Control::Other(opcode)) => {
                Err(Error::Protocol(format!("control message {opcode}")))
            }
            None => {
                Err(Error::Protocol(format!("a control message of {} bytes", completion.byte_len)))
            }
        }
    }

    fn repost(&self, slot: u64) -> Result<()> {
        match &self.queue_pair {
            Some(queue_pair) => queue_pair.post_receive(
                &self.control,
                slot as usize * SLOT,
                wire::CONTROL_LEN,
                slot,
            ),
            None => Ok(()),
        }
    }

    /// Sleeps until there may be something to handle, and handles connection events.
    fn wait(&mut self, deadline: Instant, doing: &'static str) -> Result<()> {
        self.queue.arm()?;
        // What came between the last poll and the arming will not notify.
        if let Some(completion) = self.queue.poll()? {
            return self.complete(&completion);
        }
        let left = milliseconds_left(deadline);
        if left == 0 {
            return Err(Error::TimedOut(doing));
        }
        if !wait_readable([self.queue.fd(), self.id.fd()], left.min(LOOK_AGAIN_MS))? {
            return Ok(());
        }
        self.queue.acknowledge();
        while let Some(event) = self.id.event()? {
            use rdma_cm_event_type::*;
            if matches!(event.kind, RDMA_CM_EVENT_DISCONNECTED | RDMA_CM_EVENT_DEVICE_REMOVAL)
                && self.ended.is_none()
            {
                self.ended = Some(Ended::Disconnected);
            }
        }
        Ok(())
    }

    /// An error if the connection is over.
    fn live(&self) -> Result<()> {
        match &self.ended {
            None => Ok(()),
            Some(Ended::Disconnected) => Err(Error::Closed),
            Some(Ended::Failed(status)) => Err(Error::Completion(status.clone())),
        }
    }

    /// Makes sure that the staging memory holds `length` bytes; it is replaced only while
    /// nothing in flight can still need it.
    fn fit_staging(&mut self, length: usize, deadline: Instant) -> Result<()> {
        if self.staging.length() < length {
            self.flush(deadline)?;
            self.staging = Memory::new(&self.domain, length, false)?;
        }
        Ok(())
    }

    fn write_staged(
        &mut self,
        remote: Remote,
        offset: usize,
        length: usize,
        immediate: Option<u32>,
    ) -> Result<()> {
        let Some(queue_pair) = &self.queue_pair else {
            return Err(Error::Closed);
        };
        let work = Work::Write(remote, immediate);
        queue_pair.post(work, &self.staging, offset, length, SENT)?;
        self.in_flight += 1;
        Ok(())
    }
}

impl Stream for Connection {
    fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<()> {
        while !bytes.is_empty() {
            self.progress()?;
            self.live()?;
            let room = self.peer.map_or(0, |peer| peer.length - self.sent) as usize;
            if room == 0 || self.in_flight >= DEPTH - CONTROL_RESERVE {
                self.wait(deadline, "waiting for room to send")?;
                continue;
            }
            let peer = self.peer.expect("room in a window means a window");
            self.fit_staging(peer.length as usize, deadline)?;
            let offset = self.sent as usize;
            let length = bytes.len().min(room);
            let (now, later) = bytes.split_at(length);
            self.staging.copy_in(offset, now);
            let remote = Remote { address: peer.address + u64::from(self.sent), rkey: peer.rkey };
            self.write_staged(remote, offset, length, Some(length as u32))?;
            self.sent += length as u32;
            bytes = later;
        }
        Ok(())
    }

    fn receive(&mut self, into: &mut Vec<u8>, deadline: Instant) -> Result<()> {
        loop {
            // Completions first: what was delivered before the end counts.
            self.progress()?;
            if !self.inbox.is_empty() {
                into.append(&mut self.inbox);
                return Ok(());
            }
            self.live()?;
            self.wait(deadline, "receiving")?;
        }
    }
}

pub(crate) fn milliseconds_left(deadline: Instant) -> i32 {
    let left = deadline.saturating_duration_since(Instant::now());
    left.as_millis().try_into().unwrap_or(i32::MAX)
}

/// Waits for the one event that the connection manager should report next.
pub(crate) fn expect_event(
    id: &CmId,
    wanted: rdma_cm_event_type::Type,
    deadline: Instant,
) -> Result<()> {
    loop {
        match id.event()? {
            Some(event) if event.kind == wanted => return Ok(()),
            Some(event) => return Err(event.refusal()),
            None => {
                let left = milliseconds_left(deadline);
                if left == 0 || !wait_readable([id.fd(), -1], left)? {
                    return Err(Error::TimedOut("connecting"));
                }
            }
        }
    }
}
