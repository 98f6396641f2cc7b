// SPDX-License-Identifier: BSD-3-Clause
//! The send loop: bytes of the server become RDMA WRITEs into the peer's windows.
//!
//! A write takes the peer's window, takes staging memory, has the bytes copied there,
//! accounts for them and has a work request posted, again and again until something runs
//! short; then it returns at once with what it took. It never waits: completions and
//! announcements bring room, and whoever called comes again then.
//!
//! What copies and posts is the caller's, behind [`Transmit`]: registered memory and the
//! queue pair in the module, a simulated fabric or a model's in the tests.

use crate::staging::{Staging, Steps};
use crate::window::sync::{AtomicBool, Ordering};
use crate::window::{Announcement, Chunk, SendLedger, SendWindow, WindowInUse, Writer};

/// Most bytes of one work request: the device sends one piece while the next is copied.
const PIECE: usize = 256 * 1024;

/// Why a work request was not posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostError<E> {
    /// The queue has no room at this moment.
    Full,
    /// The queue pair does not take it, for this reason: the connection is over.
    Failed(E),
}

/// One RDMA WRITE with immediate, of bytes that were staged. Its immediate is its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadWrite {
    /// Address in the peer's memory.
    pub address: u64,
    /// Remote key of the peer's region.
    pub rkey: u32,
    /// Length in bytes.
    pub length: u32,
    /// Its number, modulo 2^24.
    pub sequence: u32,
    /// Whether it must cause a completion.
    pub signalled: bool,
}

/// The owner of staging memory and queue pair, as the send loop uses it. `R` is a region
/// of larger staging memory; `None` of it stands for the small one.
pub trait Transmit<R> {
    /// Staged bytes, as a work request names them.
    type Staged;
    /// Why a work request could not be posted.
    type Error;

    /// A region of `length` bytes of staging memory, if it can be had.
    fn register(&mut self, length: usize) -> Option<R>;

    /// Copies the next `chunk.length` bytes to send to their place in the staging memory.
    fn copy(&mut self, region: Option<&R>, chunk: Chunk) -> Self::Staged;

    /// Posts a work request that reads what was staged.
    ///
    /// # Errors
    /// [`PostError`] if the queue pair does not take it.
    fn post(
        &mut self,
        staged: Self::Staged,
        write: PayloadWrite,
    ) -> Result<(), PostError<Self::Error>>;
}

/// Why a write took less than it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage<E> {
    /// The peer's window is full.
    Window,
    /// Staging memory or the send queue is full.
    Staging,
    /// A work request could not be posted, and not for want of room.
    Failed(E),
}

/// The result of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent<E> {
    /// Bytes that were taken and posted.
    pub bytes: usize,
    /// The reason why not all was taken.
    pub shortage: Option<Shortage<E>>,
}

/// The peer's windows, and what is in flight to them. `R` is a region of staging memory.
/// Any thread may call any of it, except where a method says whose it is.
#[derive(Debug)]
pub struct SendQueue<R> {
    pub(crate) window: SendWindow,
    pub(crate) ledger: SendLedger<Outgoing<R>>,
    /// A work request found no room although the ledger had some for it.
    no_room: AtomicBool,
    /// Bytes of the small staging memory.
    small: usize,
}

/// The writer's state, which the holder of the right to write may use.
#[derive(Debug)]
pub(crate) struct Outgoing<R> {
    window: Announcement,
    used: u32,
    pub(crate) staging: Staging<R>,
}

impl<R> SendQueue<R> {
    /// A queue for `depth` work requests in flight, with `small` bytes of staging memory that
    /// are always there and larger ones of the sizes `steps`.
    pub fn new(depth: usize, small: usize, steps: Steps) -> Self {
        let staging = Staging::new(steps);
        let outgoing = Outgoing { window: Announcement::default(), used: 0, staging };
        Self {
            window: SendWindow::default(),
            ledger: SendLedger::new(depth, small, outgoing),
            no_room: AtomicBool::new(false),
            small,
        }
    }

    /// Writes as much of `length` bytes as the peer's windows, the staging memory and the send
    /// queue take, and returns at once. `None` if somebody else is writing at this moment.
    pub fn write<T: Transmit<R>>(&self, length: usize, transmit: &mut T) -> Option<Sent<T::Error>> {
        let mut writer = self.ledger.writer()?;
        let mut bytes = 0;
        let shortage = loop {
            if bytes == length {
                break None;
            }
            let copy = |transmit: &mut T, region: Option<&R>, chunk: Chunk| {
                (transmit.copy(region, chunk), chunk.length)
            };
            match self.write_piece(&mut writer, length - bytes, transmit, copy) {
                Ok(count) => bytes += count,
                Err(shortage) => break Some(shortage),
            }
        };
        Some(Sent { bytes, shortage })
    }

    /// Has `fill` put bytes into staging memory, at most `most` and no more than one work request
    /// takes, and posts those that it says it put there: none if there were none. `fill` is not
    /// called if there is no room. `None` if somebody else is writing at this moment.
    pub fn fill<T: Transmit<R>>(
        &self,
        most: usize,
        transmit: &mut T,
        fill: impl FnOnce(&mut T, Option<&R>, Chunk) -> (T::Staged, usize),
    ) -> Option<Sent<T::Error>> {
        let mut writer = self.ledger.writer()?;
        Some(match self.write_piece(&mut writer, most, transmit, fill) {
            Ok(bytes) => Sent { bytes, shortage: None },
            Err(shortage) => Sent { bytes: 0, shortage: Some(shortage) },
        })
    }

    /// Stages and posts one work request, of at most `most` bytes: `stage` puts them into their
    /// place and says how many they are. Returns that.
    #[inline]
    fn write_piece<T: Transmit<R>>(
        &self,
        writer: &mut Writer<'_, Outgoing<R>>,
        most: usize,
        transmit: &mut T,
        stage: impl FnOnce(&mut T, Option<&R>, Chunk) -> (T::Staged, usize),
    ) -> Result<usize, Shortage<T::Error>> {
        if writer.used == writer.window.length {
            writer.window = self.window.take().ok_or(Shortage::Window)?;
            writer.used = 0;
        }
        let wanted = most.min((writer.window.length - writer.used) as usize);
        if wanted > writer.free() {
            Self::enlarge(writer, wanted, transmit);
        }
        let chunk = writer.chunk(wanted.min(PIECE)).ok_or(Shortage::Staging)?;
        let (staged, count) = stage(transmit, writer.staging.present(), chunk);
        if count == 0 {
            return Ok(0);
        }
        assert!(count <= chunk.length, "no more than there was room for");
        let length = count as u32;
        let Announcement { address, rkey, .. } = writer.window;
        let address = address + u64::from(writer.used);
        writer.used += length;
        // Before the work request is posted: the peer announces only after it has arrived.
        self.window.publish_left(writer.window.length - writer.used);
        let (sequence, signalled) = writer.enter(count);
        let write = PayloadWrite { address, rkey, length, sequence, signalled };
        transmit.post(staged, write).map_err(|error| {
            writer.take_back(count);
            writer.used -= length;
            self.window.publish_left(writer.window.length - writer.used);
            match error {
                PostError::Full => {
                    self.no_room.store(true, Ordering::Relaxed);
                    Shortage::Staging
                }
                PostError::Failed(error) => Shortage::Failed(error),
            }
        })?;
        Ok(count)
    }

    /// Gets larger staging memory if a region of a larger step is of use for `wanted` bytes.
    #[cold]
    fn enlarge<T: Transmit<R>>(
        writer: &mut Writer<'_, Outgoing<R>>,
        wanted: usize,
        transmit: &mut T,
    ) {
        let (window, capacity) = (writer.window.length as usize, writer.capacity());
        let make = |length| transmit.register(length);
        if let Some(length) = writer.staging.enlarge(wanted, window, capacity, make) {
            writer.install(length);
        }
    }

    /// Whether a write would take a byte at this moment.
    pub fn is_writable(&self) -> bool {
        self.window.has_room()
            && self.ledger.credit() > 0
            // Somebody who writes at this moment will be followed by an update.
            && self.ledger.writer().is_some_and(|mut writer| writer.free() > 0)
    }

    /// Poller: the peer opened a window. One of 0 bytes is legal and changes nothing.
    ///
    /// # Errors
    /// [`WindowInUse`] if the one before was not used to its last byte.
    pub fn announce(&self, new: Announcement) -> Result<(), WindowInUse> {
        self.window.announce(new)
    }

    /// Poller: work requests up to and without number `sequence` are over. Returns whether
    /// that gave anything back; a number that was never posted does not.
    pub fn retire(&self, sequence: u32) -> bool {
        self.ledger.retire(sequence)
    }

    /// Poller: the buffer that the peer announced last, whatever is left of it.
    pub fn announced(&self) -> Option<Announcement> {
        self.window.announced()
    }

    /// Posts a probe, whose completion says that all before it has arrived. `post` is told
    /// the number of the next work request, and may not write. `None` if somebody is writing
    /// at this moment.
    pub fn probe<T>(&self, post: impl FnOnce(u32) -> T) -> Option<T> {
        // With the right to write: a payload that has its number already, but is not
        // posted yet, would otherwise be taken for one that the probe came after.
        let writer = self.ledger.writer()?;
        Some(post(writer.next_sequence()))
    }

    /// Gives larger staging memory back, if nothing is in flight and nobody writes.
    pub fn release_staging(&self) {
        if let Some(mut writer) = self.ledger.idle_writer()
            && writer.staging.present().is_some()
        {
            writer.staging.clear();
            writer.install(self.small);
        }
    }

    /// Whether there is larger staging memory. `false` if somebody is writing.
    pub fn has_larger_staging(&self) -> bool {
        self.ledger.writer().is_some_and(|writer| writer.staging.present().is_some())
    }

    /// Bytes of all staging memory, where `length` tells a region's. `None` if somebody is
    /// writing.
    pub fn staging_bytes(&self, length: impl Fn(&R) -> usize) -> Option<usize> {
        let writer = self.ledger.writer()?;
        Some(self.small + writer.staging.all().map(length).sum::<usize>())
    }

    /// Whether a work request found no room since the last call, so that no completion may
    /// be on its way that would bring the writer back.
    pub fn take_no_room(&self) -> bool {
        self.no_room.swap(false, Ordering::Relaxed)
    }

    /// Whether every posted work request is known to be over.
    pub fn is_idle(&self) -> bool {
        self.ledger.is_idle()
    }

    /// Work requests that are not known to be over. Exact while nobody writes.
    pub fn in_flight(&self) -> u64 {
        self.ledger.in_flight()
    }

    /// Work requests posted since the connection began.
    pub fn total_posted(&self) -> u64 {
        self.ledger.total_posted()
    }

    /// Whether a byte could be written into the peer's memory at this moment.
    pub fn has_room(&self) -> bool {
        self.window.has_room()
    }

    /// How much of the latest announced window is written, and its size, in bytes. Exact
    /// while nobody writes.
    pub fn position(&self) -> (u32, u32) {
        self.window.position()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Bytes in a staging memory of its own, and every work request that was posted.
    #[derive(Default)]
    struct Device {
        posted: Vec<(Option<usize>, Chunk, PayloadWrite)>,
        /// What the next post is answered, if it is not taken.
        answer: Option<PostError<&'static str>>,
    }

    impl Transmit<usize> for Device {
        type Staged = (Option<usize>, Chunk);
        type Error = &'static str;

        fn register(&mut self, length: usize) -> Option<usize> {
            Some(length)
        }

        fn copy(&mut self, region: Option<&usize>, chunk: Chunk) -> Self::Staged {
            (region.copied(), chunk)
        }

        fn post(
            &mut self,
            (region, chunk): Self::Staged,
            write: PayloadWrite,
        ) -> Result<(), PostError<&'static str>> {
            self.posted.push((region, chunk, write));
            self.answer.take().map_or(Ok(()), Err)
        }
    }

    fn queue(window: u32) -> (SendQueue<usize>, Device) {
        let queue = SendQueue::new(8, 100, [1000, 2000, 3000]);
        queue.announce(Announcement { address: 5000, length: window, rkey: 7 }).unwrap();
        (queue, Device::default())
    }

    #[test]
    fn a_write_ends_with_the_window_that_it_fills() {
        let (queue, mut device) = queue(30);
        let sent = queue.write(50, &mut device).unwrap();
        assert_eq!(sent, Sent { bytes: 30, shortage: Some(Shortage::Window) });
        let (_, chunk, write) = device.posted[0];
        assert_eq!(chunk, Chunk { offset: 0, length: 30 });
        assert_eq!((write.address, write.rkey, write.length), (5000, 7, 30));
        queue.announce(Announcement { address: 9000, length: 100, rkey: 8 }).unwrap();
        assert_eq!(queue.write(20, &mut device).unwrap().shortage, None);
        assert_eq!(device.posted[1].2.address, 9000);
        assert_eq!(queue.write(1, &mut device).unwrap().bytes, 1);
        assert_eq!(device.posted[2].2.address, 9020);
    }

    #[test]
    fn a_failed_post_leaves_the_window_and_the_staging_memory_as_they_were() {
        let (queue, mut device) = queue(30);
        queue.write(10, &mut device).unwrap();
        device.answer = Some(PostError::Full);
        let sent = queue.write(20, &mut device).unwrap();
        assert_eq!(sent, Sent { bytes: 0, shortage: Some(Shortage::Staging) });
        assert!(queue.take_no_room());
        assert!(!queue.take_no_room(), "once");
        device.answer = Some(PostError::Failed("no"));
        let sent = queue.write(20, &mut device).unwrap();
        assert_eq!(sent.shortage, Some(Shortage::Failed("no")));
        assert!(!queue.take_no_room());
        assert_eq!((queue.total_posted(), queue.position()), (1, (10, 30)));
        queue.write(20, &mut device).unwrap();
        let [first, second] = [device.posted[1], device.posted[3]];
        assert_eq!(second.1, first.1, "the same place");
        assert_eq!((second.2.address, second.2.sequence), (5010, 1));
    }

    #[test]
    fn larger_staging_memory_comes_with_a_large_write_and_goes_when_nothing_is_in_flight() {
        let (queue, mut device) = queue(5000);
        queue.write(100, &mut device).unwrap();
        assert_eq!(queue.staging_bytes(|region| *region), Some(100));
        let sent = queue.write(1500, &mut device).unwrap();
        assert_eq!(sent.bytes, 1500);
        assert_eq!(device.posted[1].0, Some(3000), "twice as much");
        assert_eq!(queue.staging_bytes(|region| *region), Some(3100));
        queue.release_staging();
        assert!(queue.has_larger_staging(), "two work requests are in flight");
        assert!(queue.retire(2));
        queue.release_staging();
        assert_eq!(queue.staging_bytes(|region| *region), Some(100));
    }

    #[test]
    fn what_is_filled_is_sent_and_no_more() {
        let (queue, mut device) = queue(30);
        let mut fill = |most, count| {
            let stage =
                |_: &mut Device, region: Option<&usize>, chunk| ((region.copied(), chunk), count);
            queue.fill(most, &mut device, stage).unwrap()
        };
        assert_eq!(fill(20, 0), Sent { bytes: 0, shortage: None });
        assert_eq!(fill(20, 5), Sent { bytes: 5, shortage: None });
        assert_eq!(fill(100, 25), Sent { bytes: 25, shortage: None });
        assert_eq!(fill(1, 1), Sent { bytes: 0, shortage: Some(Shortage::Window) });
        let [(_, first, five), (_, second, rest)] = device.posted[..] else { panic!("two") };
        assert_eq!((first, five.length, five.address), (Chunk { offset: 0, length: 20 }, 5, 5000));
        assert_eq!(
            (second, rest.length, rest.address),
            (Chunk { offset: 5, length: 25 }, 25, 5005)
        );
    }

    #[test]
    #[should_panic(expected = "no more than there was room for")]
    fn nobody_fills_more_than_there_is_room_for() {
        let (queue, mut device) = queue(30);
        queue.fill(10, &mut device, |_, _, chunk| ((None, chunk), 11));
    }

    #[test]
    fn a_probe_bears_the_number_of_the_next_work_request() {
        let (queue, mut device) = queue(30);
        assert_eq!(queue.probe(|sequence| sequence), Some(0));
        queue.write(1, &mut device).unwrap();
        assert_eq!(queue.probe(|sequence| sequence), Some(1));
        queue.probe(|_| assert_eq!(queue.write(1, &mut device), None));
    }
}
