// SPDX-License-Identifier: BSD-3-Clause
//! A connection without manners, for what no client library lets a client do.
//!
//! Each step of connecting is a call of its own, so that one may stop at any of them. Nothing
//! is sent, announced, answered or posted again unasked; whatever arrives is only noted. What
//! to send, where to write and what to claim about it is up to the caller.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rdma_sys::{ibv_wc_opcode, ibv_wc_status, rdma_cm_event_type};

use crate::error::{Error, Result};
use crate::rdma::{expect_event, milliseconds_left};
use crate::verbs::{
    CmId, CompletionQueue, Memory, ProtectionDomain, QueuePair, Remote, Work, wait_readable,
};
use crate::wire::{self, Control, Window};

/// Work requests in each direction.
const DEPTH: u32 = 256;
/// What a receive has room for.
const SLOT: usize = 64;
/// Bytes from which sends and writes are posted, used round and round.
const SCRATCH: usize = 4 << 20;
/// Marks the `wr_id` of a send; a receive carries the number of its slot.
const SENT: u64 = 1 << 32;

/// What such a connection brings along.
#[derive(Clone, Debug)]
pub struct Options {
    /// Receives posted before connecting.
    pub receives: u32,
    /// Whether a receive is posted again once it was used.
    pub repost: bool,
    /// How often the server may retry when it finds no receive posted; 7 is without end.
    pub rnr_retry: u8,
    /// The length of the memory that the server could be told to write to.
    pub memory: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { receives: 64, repost: true, rnr_retry: 7, memory: 1 << 20 }
    }
}

/// A connection, or a part of one. Dropping it is an abrupt end.
pub struct Raw {
    // In the order in which they may go: work before memory, memory before its domain.
    queue_pair: QueuePair,
    queue: CompletionQueue,
    receives: Memory,
    scratch: Memory,
    memory: Memory,
    _domain: ProtectionDomain,
    id: CmId,

    options: Options,
    used: usize,
    /// Sends, writes and reads posted, and those of them that succeeded.
    posted: u64,
    done: u64,
    messages: Vec<Vec<u8>>,
    announced: u64,
    ended: Option<String>,
}

impl Raw {
    /// Everything that one side can do alone: the server has not heard of it yet.
    pub fn resolve(address: SocketAddr, options: &Options, deadline: Instant) -> Result<Self> {
        let id = CmId::new()?;
        id.resolve_address(None, address, milliseconds_left(deadline))?;
        expect_event(&id, rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED, deadline)?;
        id.resolve_route(milliseconds_left(deadline))?;
        expect_event(&id, rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED, deadline)?;
        let device = id.device();
        let domain = ProtectionDomain::new(device)?;
        let queue = CompletionQueue::new(device, 2 * DEPTH)?;
        let queue_pair = QueuePair::new(&id, &domain, &queue, DEPTH)?;
        let receives = Memory::new(&domain, DEPTH as usize * SLOT, false)?;
        let raw = Self {
            queue_pair,
            queue,
            receives,
            scratch: Memory::new(&domain, SCRATCH, false)?,
            memory: Memory::new(&domain, options.memory, true)?,
            _domain: domain,
            id,
            options: options.clone(),
            used: 0,
            posted: 0,
            done: 0,
            messages: Vec::new(),
            announced: 0,
            ended: None,
        };
        for slot in 0..options.receives.min(DEPTH) {
            raw.post_receive(u64::from(slot))?;
        }
        Ok(raw)
    }

    /// Asks the server for the connection, and does not look at its answer: without that the
    /// answer is not confirmed, and the server's side stays half open.
    pub fn request(&self) -> Result<()> {
        self.id.connect_with(self.options.rnr_retry)
    }

    /// Waits for the server's answer and confirms it.
    pub fn establish(&self, deadline: Instant) -> Result<()> {
        expect_event(&self.id, rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, deadline)
    }

    /// All steps up to the established connection; nothing is announced.
    pub fn open(address: SocketAddr, options: &Options, deadline: Instant) -> Result<Self> {
        let raw = Self::resolve(address, options, deadline)?;
        raw.request()?;
        raw.establish(deadline)?;
        Ok(raw)
    }

    /// The address by which the server knows this client.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.id.local_address()
    }

    /// This side's memory, as an honest announcement would have it.
    pub fn window(&self) -> Window {
        Window {
            address: self.memory.address(),
            length: self.memory.length() as u32,
            rkey: self.memory.rkey(),
        }
    }

    /// Posts a SEND of `bytes`.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.post(Work::Send, bytes)
    }

    /// Posts a SEND of `bytes` with an immediate, which no message of the protocol has.
    pub fn send_with(&mut self, bytes: &[u8], immediate: u32) -> Result<()> {
        self.post(Work::SendWith(immediate), bytes)
    }

    /// Posts a WRITE of `bytes` to any address under any key, claiming by the immediate
    /// whatever it claims.
    pub fn write(
        &mut self,
        address: u64,
        rkey: u32,
        bytes: &[u8],
        immediate: Option<u32>,
    ) -> Result<()> {
        self.post(Work::Write(Remote { address, rkey }, immediate), bytes)
    }

    /// Posts a READ of `length` bytes from any address under any key.
    pub fn read(&mut self, address: u64, rkey: u32, length: usize) -> Result<()> {
        self.post(Work::Read(Remote { address, rkey }), &vec![0; length])
    }

    fn post(&mut self, work: Work, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= SCRATCH, "more than the scratch memory at once");
        let room_by = Instant::now() + Duration::from_secs(5);
        while self.posted - self.done >= u64::from(DEPTH) {
            self.live()?;
            if !self.pump(room_by)? {
                return Err(Error::TimedOut("waiting for room in the send queue"));
            }
        }
        if self.used + bytes.len() > SCRATCH {
            self.used = 0;
        }
        self.scratch.copy_in(self.used, bytes);
        self.queue_pair.post(work, &self.scratch, self.used, bytes.len(), SENT)?;
        self.used += bytes.len();
        self.posted += 1;
        Ok(())
    }

    fn post_receive(&self, slot: u64) -> Result<()> {
        self.queue_pair.post_receive(&self.receives, slot as usize * SLOT, wire::CONTROL_LEN, slot)
    }

    /// Waits until something happened, and notes all that did; false once `deadline` passed.
    pub fn pump(&mut self, deadline: Instant) -> Result<bool> {
        loop {
            self.queue.arm()?;
            if self.look()? {
                return Ok(true);
            }
            let left = milliseconds_left(deadline);
            if left == 0 || !wait_readable([self.queue.fd(), self.id.fd()], left)? {
                return Ok(false);
            }
            self.queue.acknowledge();
        }
    }

    fn look(&mut self) -> Result<bool> {
        let mut any = false;
        while let Some(completion) = self.queue.poll()? {
            any = true;
            if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
                // The first failure says why; the others follow from it.
                self.ended.get_or_insert_with(|| completion.status_text());
                continue;
            }
            match completion.opcode {
                ibv_wc_opcode::IBV_WC_RECV => {
                    let mut message = Vec::new();
                    let length = (completion.byte_len as usize).min(SLOT);
                    self.receives.copy_out(completion.wr_id as usize * SLOT, length, &mut message);
                    self.messages.push(message);
                }
                ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
                    self.announced += u64::from(completion.immediate);
                }
                _ => {
                    self.done += 1;
                    continue;
                }
            }
            if self.options.repost && self.ended.is_none() {
                self.post_receive(completion.wr_id)?;
            }
        }
        while let Some(event) = self.id.event()? {
            any = true;
            use rdma_cm_event_type::*;
            if event.kind != RDMA_CM_EVENT_ESTABLISHED {
                self.ended.get_or_insert_with(|| event.refusal().to_string());
            }
        }
        Ok(any)
    }

    fn until(
        &mut self,
        deadline: Instant,
        doing: &'static str,
        done: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        loop {
            if done(self) {
                return Ok(());
            }
            self.live()?;
            if !self.pump(deadline)? {
                return Err(Error::TimedOut(doing));
            }
        }
    }

    fn live(&self) -> Result<()> {
        match &self.ended {
            None => Ok(()),
            Some(why) => Err(Error::Completion(why.clone())),
        }
    }

    /// The server's first window, waiting for it.
    pub fn peer_window(&mut self, deadline: Instant) -> Result<Window> {
        let found = |raw: &Self| {
            raw.messages.iter().find_map(|message| match wire::parse(message) {
                Some(Control::Window(window)) => Some(window),
                _ => None,
            })
        };
        self.until(deadline, "waiting for the server's window", |raw| found(raw).is_some())?;
        Ok(found(self).expect("just seen"))
    }

    /// Waits until all that was posted has succeeded.
    pub fn flush(&mut self, deadline: Instant) -> Result<()> {
        self.until(deadline, "waiting for what was posted", |raw| raw.done == raw.posted)
    }

    /// Waits until the server has claimed to have written `count` bytes in all.
    pub fn wait_announced(&mut self, count: u64, deadline: Instant) -> Result<()> {
        self.until(deadline, "waiting for the server's bytes", |raw| raw.announced >= count)
    }

    /// Waits until so many control messages have come.
    pub fn wait_messages(&mut self, count: usize, deadline: Instant) -> Result<()> {
        self.until(deadline, "waiting for control messages", |raw| raw.messages.len() >= count)
    }

    /// What lies in this side's memory.
    pub fn memory(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.memory.copy_out(offset, length, &mut bytes);
        bytes
    }

    /// Waits for the end of the connection, however it shows, and says how it did.
    pub fn wait_end(&mut self, deadline: Instant) -> Result<String> {
        loop {
            if let Some(why) = &self.ended {
                return Ok(why.clone());
            }
            if !self.pump(deadline)? {
                return Err(Error::TimedOut("waiting for the end"));
            }
        }
    }

    /// Starts an orderly disconnection.
    pub fn disconnect(&self) -> Result<()> {
        self.id.disconnect()
    }
}
