// SPDX-License-Identifier: BSD-3-Clause
//! What the connections of one device share: the completion channel and the
//! completion queues.
//!
//! A queue serves many connections and must never overrun, since that would end
//! them all: each connection reserves an entry for every work request that it may
//! ever have outstanding. A reservation is given back only when the queue was
//! seen empty after the queue pair was destroyed, so that a completion which
//! lingers still has its place.
//!
//! A device that was removed, or that fails, is *retired*. The poller forgets it at once, so
//! that no connection comes to it any more, and the connections that are left hold it until the
//! last of them is removed. Its queues stay for as long as a queue pair is on them. Until then
//! librdmacm must not close the device, nor later while nobody is connected: so the id of the
//! connection that it was opened for is kept, which is bound to the device.

pub mod abilities;

use abilities::Abilities;

use crate::host::MainCell;
use crate::host::reply::Reply;
use crate::metrics::METRICS;
use proto::busy_poll::{Nanos, Pace};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use verbs::Error;
use verbs::cm::{Id, IdKey};
use verbs::cq::{Batch, Completion, CompletionChannel, CompletionQueue};
use verbs::device::{BROADCOM, Device, Limits};

/// Entries of a device's queues, in the order in which they are made: for 77 connections,
/// for 154 and so on, twice as many each time up to 2,473, or to the device's limit. Few
/// queues, since each has to be looked at, and each that fires costs system calls: nine do
/// for 10,000 connections. One less than a power of two, since providers keep one free and
/// round up (`rxe_queue_init` of the kernel, mlx5's `create_cq`).
const SIZES: [u32; 6] = [8191, 16_383, 32_767, 65_535, 131_071, 262_143];

/// The largest where that is not for free: to destroy a queue pair, Broadcom's library looks at
/// each entry of its completion queue (`bnxt_re_cleanup_cq`), twice as many as were asked for.
const LARGEST_SCANNED: u32 = 16_383;

/// Entries that the queue of a number is to have.
fn size(number: usize, vendor: u32) -> u32 {
    let size = SIZES[number.min(SIZES.len() - 1)];
    if vendor == BROADCOM { size.min(LARGEST_SCANNED) } else { size }
}

/// Completions taken from a queue in one pass, in batches: enough for any burst,
/// few enough that the event loop gets its turn.
const BATCHES_PER_PASS: usize = 64;

/// Polls of a queue that fail one right after the other until the queue is given up. One may
/// be about a single completion that the provider could not make sense of.
const FAILURES: u32 = 3;

/// A device as its connections share it: the completion channel, the completion queues and the
/// pace of their completions. Main thread only.
#[derive(Debug)]
pub struct SharedDevice {
    queues: MainCell<Vec<Shared>>,
    channel: Arc<CompletionChannel>,
    opened: Device,
    /// The id that it was opened for, which holds it open.
    anchor: Arc<Id>,
    /// Tells it from all others that were opened, the same device before among them.
    number: usize,
    limits: Limits,
    name: String,
    vector: u32,
    pace: MainCell<Pace>,
    abilities: MainCell<Abilities>,
    /// Where completions are taken to, unless that is being done.
    batch: MainCell<Option<Box<Batch>>>,
}

/// Entries of a queue that are kept for one queue pair. Whoever holds it drops it after that
/// pair, on whichever thread; until then the queue stays, also if the device is retired.
#[derive(Debug)]
pub struct Reservation {
    index: usize,
    entries: u32,
    queue: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    completions: Arc<CompletionQueue>,
    /// Reserved entries whose queue pairs are gone.
    stale: AtomicU32,
}

impl Reservation {
    /// The device's number of the queue.
    pub fn queue(&self) -> usize {
        self.index
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Release: the queue pair is destroyed before.
        self.queue.stale.fetch_add(self.entries, Ordering::Release);
    }
}

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    capacity: u32,
    reserved: u32,
    /// Whether it may hold completions that nothing will tell of: its event was taken, or
    /// a pass left some, or it was armed and not looked at since.
    fired: bool,
    /// Completions that were taken. Where none was left, as many as could have been there
    /// count as taken.
    taken: u64,
    /// Whether the next completion is told, or was and waits in the channel.
    armed: bool,
    /// It failed: nothing is asked of it any more, and another takes its place with the next
    /// connection.
    failed: bool,
}

impl Shared {
    fn is_due(&self, which: Which) -> bool {
        !self.failed && (which == Which::All || self.fired || !self.armed)
    }

    fn is_free(&self) -> bool {
        self.failed || self.reserved == 0
    }

    fn takes(&self, entries: u32) -> bool {
        !self.failed && self.capacity - self.reserved >= entries
    }
}

/// Queues to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that fired, and those that are not armed.
    Fired,
    /// Every one.
    All,
}

/// Whether a device has more completions than one pass took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All were taken.
    Empty,
    /// Some are left.
    More,
}

impl SharedDevice {
    /// Opens the device of `anchor` for connections, whose completions may be waited for as
    /// long as `patience`. No two have the same number.
    ///
    /// # Errors
    /// If there is no device, it does not answer, or a descriptor can't be had.
    pub fn new(
        anchor: &Arc<Id>,
        number: usize,
        completion_vector: i32,
        patience: Nanos,
    ) -> Result<Self, Error> {
        let device = anchor.device().ok_or(Error { action: verbs::FIND, errno: libc::ENODEV })?;
        let limits = device.limits()?;
        let vector = match u32::try_from(completion_vector) {
            Ok(vector) => vector % limits.vectors,
            // Any will do; spread servers of one machine by their process id.
            Err(_) => std::process::id() % limits.vectors,
        };
        Ok(Self {
            queues: MainCell::new(Vec::new()),
            channel: Arc::new(CompletionChannel::new(&device)?),
            name: device.name(),
            opened: device,
            anchor: Arc::clone(anchor),
            number,
            limits,
            vector,
            pace: MainCell::new(Pace::new(patience)),
            abilities: MainCell::default(),
            batch: MainCell::default(),
        })
    }

    /// The pace of the device's completions.
    pub fn pace(&self) -> std::cell::RefMut<'_, Pace> {
        self.pace.borrow_mut()
    }

    /// What it turned out to be able to do.
    pub fn abilities(&self) -> std::cell::RefMut<'_, Abilities> {
        self.abilities.borrow_mut()
    }

    /// Whether a message that is longer than its receive may show as a failed operation of our
    /// own, which a receive that makes sense does not show elsewhere.
    pub fn hides_length(&self) -> bool {
        self.limits.is_soft_roce()
    }

    /// Receives that a connection of it is to have.
    pub fn receives(&self) -> u16 {
        let most = u16::try_from(self.limits.work_requests).unwrap_or(u16::MAX);
        self.abilities().receives().min(most)
    }

    /// Whether the id is bound to this device.
    pub fn owns(&self, id: &Id) -> bool {
        self.anchor.shares_device(id)
    }

    /// The id that holds the device open. Once its connection is over, its events concern the
    /// device alone.
    pub fn anchor(&self) -> IdKey {
        self.anchor.key()
    }

    /// The number that it was opened with.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its connections' receive slots are done.
    pub fn receive_slots(&self) -> &'static str {
        "private"
    }

    /// The fields of `INFO rdma` for this device, whose connections use `ports`.
    pub fn describe(&self, ports: &[u8], connections: u64) -> Reply {
        let queues = self.queues.borrow_mut();
        let present = || queues.iter().filter(|shared| !shared.failed);
        let sum = |field: fn(&Shared) -> u32| present().map(|q| u64::from(field(q))).sum::<u64>();
        Reply::Map(vec![
            ("name", self.name().into()),
            ("ports", Reply::List(ports.iter().map(|port| u64::from(*port).into()).collect())),
            ("connections", connections.into()),
            ("receive-slots", self.receive_slots().into()),
            ("receive-slots-each", u64::from(self.receives()).into()),
            ("ack-timeout", u64::from(self.abilities().ack_timeout).into()),
            ("completion-vector", u64::from(self.vector).into()),
            ("completion-queues", (present().count() as u64).into()),
            ("completion-entries", sum(|queue| queue.capacity).into()),
            ("completion-entries-reserved", sum(|queue| queue.reserved).into()),
        ])
    }

    /// Gives up the queue of a number, which failed. `false` if that is known, or there is none.
    pub fn give_up_queue(&self, number: usize) -> bool {
        let mut queues = self.queues.borrow_mut();
        let Some(shared) = queues.get_mut(number).filter(|shared| !shared.failed) else {
            return false;
        };
        shared.failed = true;
        true
    }

    /// Whether the queue of a number was given up.
    pub fn is_given_up(&self, number: usize) -> bool {
        self.queues.borrow_mut().get(number).is_some_and(|shared| shared.failed)
    }

    /// The device itself, which tells of what befalls it.
    pub fn opened(&self) -> &Device {
        &self.opened
    }

    /// Descriptor that polls readable when completions wait.
    pub fn fd(&self) -> std::os::fd::RawFd {
        self.channel.fd()
    }

    /// Reserves `entries` in a queue and hands that queue to `with`; what `with`
    /// makes on it must be gone before the reservation is dropped.
    ///
    /// # Errors
    /// Those of a new queue, if one is needed, and of `with`.
    pub fn reserve<T>(
        &self,
        entries: u32,
        with: impl FnOnce(&Arc<CompletionQueue>) -> Result<T, Error>,
    ) -> Result<(Reservation, T), Error> {
        let mut queues = self.queues.borrow_mut();
        let most = self.limits.completion_entries;
        if most < entries {
            let action = "reserve completion queue entries: the device's queues are too small";
            return Err(Error { action, errno: libc::ENOSPC });
        }
        // The first, so that those made for a peak are empty some time after it.
        let index = match queues.iter().position(|shared| shared.takes(entries)) {
            Some(index) => index,
            None => {
                let failed = queues.iter().position(|shared| shared.failed);
                let index = failed.unwrap_or(queues.len());
                let wish = size(index, self.limits.vendor).clamp(entries, most);
                let (queue, capacity) = self.new_queue(index, wish, entries)?;
                queue.completions.arm()?;
                let shared = Shared {
                    queue: Arc::new(queue),
                    capacity,
                    reserved: 0,
                    fired: false,
                    taken: 0,
                    armed: true,
                    failed: false,
                };
                match queues.get_mut(index) {
                    Some(place) => *place = shared,
                    None => queues.push(shared),
                }
                index
            }
        };
        let made = with(&queues[index].queue.completions)?;
        queues[index].reserved += entries;
        let queue = Arc::clone(&queues[index].queue);
        Ok((Reservation { index, entries, queue }, made))
    }

    /// A queue, of as many entries as can be had: of `wish`, or else half as many, and so on
    /// down to `least`. A device that has no memory for a large one may have it for a small.
    fn new_queue(&self, number: usize, wish: u32, least: u32) -> Result<(Queue, u32), Error> {
        let mut capacity = wish;
        loop {
            let tried = CompletionQueue::new(&self.channel, capacity, self.vector, number);
            match tried {
                Ok(completions) => {
                    let completions = Arc::new(completions);
                    return Ok((Queue { completions, stale: AtomicU32::new(0) }, capacity));
                }
                Err(error) if capacity == least => return Err(error),
                Err(_) => capacity = (capacity / 2).max(least),
            }
        }
    }

    /// Gives back queues that were made for more connections than there are, but one.
    pub fn shrink(&self) {
        let mut queues = self.queues.borrow_mut();
        while queues.len() > 1 && queues.last().is_some_and(Shared::is_free) {
            queues.pop();
        }
    }

    /// Whether there is something to be given back, now or after what waits.
    pub fn is_shrinking(&self) -> bool {
        let queues = self.queues.borrow_mut();
        queues.len() > 1 || queues.iter().any(|shared| !shared.is_free())
    }

    /// When so many completions of a queue were taken, those that are there now are among them.
    pub fn horizon(&self, index: usize) -> u64 {
        let shared = &self.queues.borrow_mut()[index];
        shared.taken + u64::from(shared.capacity)
    }

    /// Whether a queue's completions were taken up to a [`horizon`](Self::horizon).
    pub fn is_beyond(&self, index: usize, horizon: u64) -> bool {
        self.queues.borrow_mut()[index].taken >= horizon
    }

    /// Takes the events off the channel: their queues fired.
    ///
    /// # Errors
    /// If the device is gone.
    pub fn take_events(&self) -> Result<(), Error> {
        let mut queues = self.queues.borrow_mut();
        // One-shot arming: there is at most one event for each queue.
        for _ in 0..queues.len() {
            let Some(number) = self.channel.take_event()? else { break };
            let Some(shared) = queues.get_mut(number) else { continue };
            shared.fired = true;
            shared.armed = false;
        }
        Ok(())
    }

    /// Takes every queue for fired, in case that an event was lost.
    pub fn doubt(&self) {
        for shared in self.queues.borrow_mut().iter_mut() {
            shared.fired = true;
            shared.armed = false;
        }
    }

    /// Asks for an event at the next completion of each queue whose event was taken. What
    /// completed before is not told: the queues that fired are to be polled once more.
    ///
    /// # Errors
    /// If the device is gone.
    pub fn arm(&self) -> Result<(), Error> {
        let due = |shared: &&mut Shared| !shared.armed && !shared.failed;
        for shared in self.queues.borrow_mut().iter_mut().filter(due) {
            shared.queue.completions.arm()?;
            shared.armed = true;
            shared.fired = true;
        }
        Ok(())
    }

    /// Whether completions of each queue will be told.
    pub fn is_armed(&self) -> bool {
        self.queues.borrow_mut().iter().all(|shared| shared.armed || shared.failed)
    }

    /// Takes all completions that are there, up to the bound of a pass, and hands
    /// them to `each`. A queue from which all were taken did not fire any more.
    ///
    /// # Errors
    /// If a queue can't be polled, with its number: its connections are lost.
    pub fn poll(
        &self,
        which: Which,
        mut each: impl FnMut(Completion),
    ) -> Result<Progress, (usize, Error)> {
        let mut batch = self.batch.borrow_mut().take().unwrap_or_default();
        let progress = self.poll_into(&mut batch, which, &mut each);
        *self.batch.borrow_mut() = Some(batch);
        progress
    }

    fn poll_into(
        &self,
        batch: &mut Batch,
        which: Which,
        each: &mut impl FnMut(Completion),
    ) -> Result<Progress, (usize, Error)> {
        let mut progress = Progress::Empty;
        let count = self.queues.borrow_mut().len();
        for index in 0..count {
            if !self.queues.borrow_mut()[index].is_due(which) {
                continue;
            }
            let mut failures = 0;
            for round in 0.. {
                // The cell is closed again before `each` runs.
                let queue = Arc::clone(&self.queues.borrow_mut()[index].queue);
                // What is gone now has left all its completions: if none is found after
                // that, there are none. Acquire: see `Reservation`.
                let stale = queue.stale.load(Ordering::Acquire);
                let polled = queue.completions.poll(batch);
                batch.iter().for_each(&mut *each);
                if let Err(error) = polled {
                    METRICS.poll_failures.add(1);
                    failures += 1;
                    if failures == FAILURES {
                        return Err((index, error));
                    }
                    continue;
                }
                failures = 0;
                let shared = &mut self.queues.borrow_mut()[index];
                shared.taken += batch.iter().count() as u64;
                if !batch.is_full() {
                    shared.taken += u64::from(shared.capacity);
                    shared.reserved -= stale;
                    queue.stale.fetch_sub(stale, Ordering::Relaxed);
                    shared.fired = false;
                    break;
                }
                if round == BATCHES_PER_PASS {
                    shared.fired = true;
                    progress = Progress::More;
                    break;
                }
            }
        }
        Ok(progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_that_are_scanned_stay_small() {
        let sizes = |vendor| (0..8).map(|number| size(number, vendor)).collect::<Vec<_>>();
        assert_eq!(sizes(0x2c9)[..6], SIZES);
        assert_eq!(sizes(0x2c9)[6..], [262_143; 2]);
        assert_eq!(sizes(BROADCOM), [[8191].as_slice(), &[16_383; 7]].concat());
    }
}
