// SPDX-License-Identifier: BSD-3-Clause
//! Two connected queue pairs, one step at a time.
//!
//! The fabric moves only when it is told to, so that whoever drives it decides on
//! the order of everything that real devices do at once: when a work request is
//! carried out, when its sender learns of it, when a completion is looked at. It
//! watches over the memory that it works on: what a work request reads must stay as
//! it was posted until it is acknowledged, and must be there.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

pub type Key = u32;

/// One of the two ends.
pub type Port = usize;

/// Registered memory, until it is dropped.
#[derive(Debug)]
pub struct Registered {
    pub key: Key,
    pub length: usize,
    dropped: Rc<RefCell<Vec<Key>>>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.dropped.borrow_mut().push(self.key);
    }
}

/// A piece of registered memory.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    pub key: Key,
    pub offset: usize,
    pub length: usize,
}

/// What a work request is, as its completion says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Receive(u16),
    Control(u16),
    Payload(u32),
    Probe(u32),
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Send,
    /// RDMA WRITE with the length as its immediate.
    Write {
        address: u64,
        rkey: Key,
    },
    /// RDMA WRITE of no bytes, without an immediate.
    Probe,
}

#[derive(Debug)]
struct Request {
    work: Work,
    operation: Operation,
    bytes: Slice,
    /// The bytes as they were posted.
    copy: Vec<u8>,
    signalled: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// A SEND of so many bytes.
    Received(usize),
    Immediate(u32),
    Sent,
    Failed,
}

#[derive(Debug)]
pub struct Completion {
    pub work: Work,
    pub outcome: Outcome,
    /// Entries of the send queue that are free again by it.
    frees: usize,
}

/// What the connection manager reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Established,
    Disconnected,
}

/// The send queue is full.
#[derive(Debug)]
pub struct Full;

/// How a pair of queue pairs is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Entries of the send queue.
    pub depth: usize,
    /// Retries at a peer without a posted receive; `None` is without end.
    pub retries: Option<u32>,
}

#[derive(Debug)]
struct Pair {
    setup: Setup,
    alive: bool,
    posted: VecDeque<Request>,
    /// Carried out, but the sender does not know it.
    carried_out: VecDeque<Request>,
    receives: VecDeque<(u16, Slice)>,
    completions: VecDeque<Completion>,
    events: VecDeque<Event>,
    /// Entries of the send queue in use.
    entries: usize,
    /// Of these, acknowledged ones without a completion of their own.
    silent: usize,
    retries_left: Option<u32>,
}

#[derive(Debug)]
struct Region {
    owner: Port,
    bytes: Vec<u8>,
    remote: bool,
}

#[derive(Debug)]
pub struct Fabric {
    pairs: [Pair; 2],
    memory: HashMap<Key, Region>,
    /// Of memory that is gone, and was not looked at yet.
    dropped: Rc<RefCell<Vec<Key>>>,
    next_key: Key,
    /// A queue pair broke because its peer had no receive posted for too long.
    pub ran_out_of_retries: bool,
}

impl Fabric {
    pub fn new(setups: [Setup; 2]) -> Self {
        let pairs = setups.map(|setup| Pair {
            setup,
            alive: true,
            posted: VecDeque::new(),
            carried_out: VecDeque::new(),
            receives: VecDeque::new(),
            completions: VecDeque::new(),
            events: VecDeque::from([Event::Established]),
            entries: 0,
            silent: 0,
            retries_left: setup.retries,
        });
        let (memory, dropped) = (HashMap::new(), Rc::default());
        Self { pairs, memory, dropped, next_key: 1, ran_out_of_retries: false }
    }

    // --- Memory ---------------------------------------------------------------

    pub fn register(&mut self, owner: Port, length: usize, remote: bool) -> Registered {
        let key = self.next_key;
        self.next_key += 1;
        self.memory.insert(key, Region { owner, bytes: vec![0; length], remote });
        Registered { key, length, dropped: Rc::clone(&self.dropped) }
    }

    /// Frees what was dropped, which nothing in flight may need any more.
    pub fn reap(&mut self) {
        for key in self.dropped.take() {
            self.deregister(key);
        }
    }

    fn deregister(&mut self, key: Key) {
        for pair in &self.pairs {
            let mut in_flight = pair.posted.iter().chain(&pair.carried_out);
            assert!(
                in_flight.all(|request| request.bytes.key != key || request.bytes.length == 0),
                "memory freed that a work request in flight reads"
            );
            assert!(
                pair.receives.iter().all(|(_, slice)| slice.key != key),
                "memory freed that a posted receive writes to"
            );
        }
        self.memory.remove(&key).expect("memory freed twice");
    }

    /// Bytes that are registered at this moment.
    pub fn registered(&self) -> usize {
        self.memory.values().map(|region| region.bytes.len()).sum()
    }

    /// Where a region begins for RDMA.
    pub fn address(key: Key) -> u64 {
        u64::from(key) << 32
    }

    /// The memory at an address.
    pub fn slice(address: u64, length: usize) -> Slice {
        Slice { key: (address >> 32) as Key, offset: address as u32 as usize, length }
    }

    pub fn read(&self, slice: Slice) -> &[u8] {
        &self.memory[&slice.key].bytes[slice.offset..slice.offset + slice.length]
    }

    pub fn write(&mut self, key: Key, offset: usize, bytes: &[u8]) {
        let region = self.memory.get_mut(&key).expect("a write to memory that was freed");
        region.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    // --- What a side does -------------------------------------------------------

    pub fn post_receive(&mut self, port: Port, slot: u16, into: Slice) {
        let pair = &mut self.pairs[port];
        pair.receives.push_back((slot, into));
        if !pair.alive {
            self.flush(port);
        }
    }

    pub fn post_send(&mut self, port: Port, work: Work, bytes: Slice) -> Result<(), Full> {
        self.post(port, work, Operation::Send, bytes, true)
    }

    pub fn post_write(
        &mut self,
        port: Port,
        work: Work,
        bytes: Slice,
        to: (u64, Key),
        signalled: bool,
    ) -> Result<(), Full> {
        let (address, rkey) = to;
        self.post(port, work, Operation::Write { address, rkey }, bytes, signalled)
    }

    pub fn post_probe(&mut self, port: Port, work: Work) -> Result<(), Full> {
        self.post(port, work, Operation::Probe, Slice { key: 0, offset: 0, length: 0 }, true)
    }

    fn post(
        &mut self,
        port: Port,
        work: Work,
        operation: Operation,
        bytes: Slice,
        signalled: bool,
    ) -> Result<(), Full> {
        let copy = if bytes.length > 0 { self.read(bytes).to_vec() } else { Vec::new() };
        let pair = &mut self.pairs[port];
        if pair.entries == pair.setup.depth {
            return Err(Full);
        }
        pair.entries += 1;
        pair.posted.push_back(Request { work, operation, bytes, copy, signalled });
        if !pair.alive {
            self.flush(port);
        }
        Ok(())
    }

    pub fn poll(&mut self, port: Port) -> Option<Completion> {
        let pair = &mut self.pairs[port];
        let completion = pair.completions.pop_front()?;
        pair.entries -= completion.frees;
        Some(completion)
    }

    pub fn next_event(&mut self, port: Port) -> Option<Event> {
        self.pairs[port].events.pop_front()
    }

    /// Ends the connection from this side; the other one is told.
    pub fn disconnect(&mut self, port: Port) {
        self.break_pair(port);
        self.pairs[1 - port].events.push_back(Event::Disconnected);
    }

    /// The queue pair is gone, and with it whatever it had to do or to say.
    pub fn destroy(&mut self, port: Port) {
        let pair = &mut self.pairs[port];
        pair.alive = false;
        pair.posted.clear();
        pair.carried_out.clear();
        pair.receives.clear();
        pair.completions.clear();
        pair.events.clear();
        (pair.entries, pair.silent) = (0, 0);
    }

    // --- What happens by itself -------------------------------------------------

    pub fn has_completions(&self, port: Port) -> bool {
        !self.pairs[port].completions.is_empty()
    }

    pub fn has_events(&self, port: Port) -> bool {
        !self.pairs[port].events.is_empty()
    }

    pub fn can_carry_out(&self, port: Port) -> bool {
        let (pair, peer) = (&self.pairs[port], &self.pairs[1 - port]);
        pair.posted.front().is_some_and(|request| {
            matches!(request.operation, Operation::Probe)
                || !peer.alive
                || !peer.receives.is_empty()
                || pair.retries_left.is_some()
        })
    }

    pub fn can_acknowledge(&self, port: Port) -> bool {
        !self.pairs[port].carried_out.is_empty()
    }

    /// Receives that are posted, and entries of the send queue in use.
    pub fn in_use(&self, port: Port) -> (usize, usize) {
        (self.pairs[port].receives.len(), self.pairs[port].entries)
    }

    /// Carries out the next work request of a port, or fails at it.
    pub fn carry_out(&mut self, port: Port) {
        let [first, second] = &mut self.pairs;
        let (pair, peer) = if port == 0 { (first, second) } else { (second, first) };
        let Some(request) = pair.posted.front() else { return };
        if !peer.alive {
            return self.break_pair(port);
        }
        if !matches!(request.operation, Operation::Probe) {
            let Some((slot, into)) = peer.receives.pop_front() else {
                match &mut pair.retries_left {
                    Some(0) => {
                        self.ran_out_of_retries = true;
                        self.break_pair(port);
                    }
                    Some(left) => *left -= 1,
                    None => {}
                }
                return;
            };
            let outcome = match request.operation {
                Operation::Send => Outcome::Received(request.copy.len()),
                _ => Outcome::Immediate(request.copy.len() as u32),
            };
            peer.completions.push_back(Completion { work: Work::Receive(slot), outcome, frees: 0 });
            let (key, offset) = match request.operation {
                Operation::Write { address, rkey } => {
                    let region = self.memory.get(&rkey).expect("a write to memory that was freed");
                    assert!(
                        region.remote && region.owner != port,
                        "a write to memory not announced"
                    );
                    let offset =
                        address.checked_sub(Self::address(rkey)).expect("below the buffer");
                    (rkey, offset as usize)
                }
                _ => (into.key, into.offset),
            };
            let request = pair.posted.front().expect("seen above");
            let source = &self.memory[&request.bytes.key].bytes;
            let source = &source[request.bytes.offset..request.bytes.offset + request.bytes.length];
            assert_eq!(
                source, request.copy,
                "memory reused before its work request was carried out"
            );
            let bytes = request.copy.clone();
            let pair = &mut self.pairs[port];
            pair.retries_left = pair.setup.retries;
            self.write(key, offset, &bytes);
        }
        let pair = &mut self.pairs[port];
        let request = pair.posted.pop_front().expect("seen above");
        pair.carried_out.push_back(request);
    }

    /// The sender learns that its oldest work request arrived. Until then it might
    /// have had to send it again.
    pub fn acknowledge(&mut self, port: Port) {
        let Some(request) = self.pairs[port].carried_out.pop_front() else { return };
        if request.bytes.length > 0 {
            let now = self.read(request.bytes);
            assert_eq!(now, request.copy, "memory reused before its work request was acknowledged");
        }
        let pair = &mut self.pairs[port];
        pair.silent += 1;
        if request.signalled {
            let frees = std::mem::take(&mut pair.silent);
            let (work, outcome) = (request.work, Outcome::Sent);
            pair.completions.push_back(Completion { work, outcome, frees });
        }
    }

    /// The queue pair goes to the error state: everything it has is flushed.
    pub fn break_pair(&mut self, port: Port) {
        self.pairs[port].alive = false;
        self.flush(port);
    }

    fn flush(&mut self, port: Port) {
        let pair = &mut self.pairs[port];
        let outcome = Outcome::Failed;
        let requests = pair.carried_out.drain(..).chain(pair.posted.drain(..));
        for request in requests {
            let frees = 1 + std::mem::take(&mut pair.silent);
            pair.completions.push_back(Completion { work: request.work, outcome, frees });
        }
        for (slot, _) in pair.receives.drain(..) {
            let work = Work::Receive(slot);
            pair.completions.push_back(Completion { work, outcome, frees: 0 });
        }
    }
}
