// SPDX-License-Identifier: BSD-3-Clause
//! What is written to the peer: the copy into staging memory, the work requests for it, and
//! the memory itself.

use super::activity::Shortage;
use super::control::{SMALL_STAGING, STAGING_AT};
use super::staging::Staging;
use super::{Endpoint, Fate};
use crate::host::main_cell::is_main_thread;
use crate::metrics::METRICS;
use crate::transport::key::Work;
use proto::window::{Announcement, Writer};
use std::ptr;
use std::sync::atomic::Ordering;
use verbs::Error;
use verbs::mr::{Access, Region};
use verbs::qp::{Slice, Target};

/// Most bytes of one work request: the device sends one piece while the next is copied.
const PIECE: usize = 256 * 1024;
/// Most bytes of one call of the server: who is given more than any device sends while it is
/// copied would keep the thread from others, and the server can't be answered 2 GiB.
const CALL: usize = 64 << 20;

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// So many bytes were taken, at least one.
    Bytes(usize),
    /// No room at this moment; the write handler will be called when there is.
    Again,
    /// The connection is broken.
    Broken,
}

/// What belongs to the writer, whoever that is at the moment.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    window: Announcement,
    used: u32,
    larger: Staging<Region>,
}

impl Endpoint {
    /// Whether the write handler has something to do.
    pub fn is_writable(&self) -> bool {
        match self.fate() {
            Fate::Alive => {
                self.outbound.has_room()
                    && self.ledger.credit() > 0
                    // Somebody who writes at this moment will be followed by an update.
                    && self.ledger.writer().is_some_and(|mut writer| writer.free() > 0)
            }
            Fate::Gone | Fate::Broken => true,
        }
    }

    /// Writes as much of `pieces` as the peer's window, the staging memory and the
    /// send queue take, and returns at once. Any thread, one at a time.
    ///
    /// # Safety
    /// Every piece is readable: its address, and its length in bytes.
    pub unsafe fn write(&self, pieces: &[(*const u8, usize)]) -> WriteOutcome {
        let total = at_once(pieces);
        match self.fate() {
            Fate::Alive => {}
            // As a socket does after the peer's close: the commands that it sent
            // before are all carried out, their replies have nowhere to go.
            Fate::Gone => return WriteOutcome::Bytes(total),
            Fate::Broken => return WriteOutcome::Broken,
        }
        if self.is_shut() {
            return WriteOutcome::Broken;
        }
        let Some(mut writer) = self.ledger.writer() else {
            return WriteOutcome::Again;
        };
        let mut source = Source { pieces, within: 0 };
        let mut done = 0;
        let mut shortage = Shortage::Staging;
        while done < total {
            if writer.used == writer.window.length {
                let Some(window) = self.outbound.take() else {
                    shortage = Shortage::Window;
                    break;
                };
                writer.window = window;
                writer.used = 0;
            }
            let room = (writer.window.length - writer.used) as usize;
            let wanted = (total - done).min(room);
            self.enlarge_staging(&mut writer, wanted);
            let Some(chunk) = writer.chunk(wanted.min(PIECE)) else { break };
            let staging = self.staging(&writer);
            // SAFETY: the chunk lies in the staging memory and is nobody else's
            // until its completion; the pieces are readable by the caller's promise.
            unsafe { source.copy_to(staging.0.add(chunk.offset), chunk.length) };
            let bytes = Slice {
                // SAFETY: inside the staging memory.
                address: unsafe { staging.0.add(chunk.offset) } as u64,
                length: chunk.length as u32,
                local_key: staging.1,
            };
            let target = Target {
                address: writer.window.address + u64::from(writer.used),
                rkey: writer.window.rkey,
            };
            writer.used += chunk.length as u32;
            self.outbound.publish_left(writer.window.length - writer.used);
            let (sequence, signalled) = writer.enter(chunk.length);
            let work_request = self.key.work_request(Work::Payload(sequence));
            if let Err(error) = self.pair.post_write(work_request, bytes, target, signalled) {
                writer.take_back(chunk.length);
                writer.used -= chunk.length as u32;
                self.outbound.publish_left(writer.window.length - writer.used);
                if error.is_about_room() {
                    // A full send queue is no error: the clock looks again.
                    self.refused.store(true, Ordering::Relaxed);
                    break;
                }
                METRICS.posts_refused.add(1);
                self.refusal.store(error.errno, Ordering::Relaxed);
                self.worsen(Fate::Gone);
                break;
            }
            done += chunk.length;
        }
        drop(writer);
        let main = is_main_thread();
        if done > 0 {
            self.activity.wrote(done as u64);
        }
        if done < total {
            self.activity.hold_back(shortage);
            if main { &METRICS.short_writes_main } else { &METRICS.short_writes_io }.add(1);
        }
        if done == 0 {
            return if total == 0 { WriteOutcome::Bytes(0) } else { WriteOutcome::Again };
        }
        METRICS.bytes_sent.add(done as u64);
        if main { &METRICS.writes_main } else { &METRICS.writes_io }.add(1);
        WriteOutcome::Bytes(done)
    }

    /// Start and local key of the present staging memory.
    fn staging(&self, writer: &Writer<'_, Outgoing>) -> (*mut u8, u32) {
        match writer.larger.present() {
            Some(region) => (region.start(), region.local_key()),
            // SAFETY: inside the control region.
            None => (unsafe { self.control.start().add(STAGING_AT) }, self.control.local_key()),
        }
    }

    /// Gets larger staging memory if what is free does not do for `wanted` bytes.
    fn enlarge_staging(&self, writer: &mut Writer<'_, Outgoing>, wanted: usize) {
        if wanted <= writer.free() {
            return;
        }
        let (window, capacity) = (writer.window.length as usize, writer.capacity());
        let make = |length| Region::new(&self.domain, length, Access::Local);
        match writer.larger.enlarge(wanted, window, capacity, make) {
            Ok(Some(length)) => writer.install(length),
            Ok(None) => {}
            // Slower but right with what there is.
            Err(error) => log::debug!("connection of {}: {error}", self.peer_text()),
        }
    }

    /// Bytes of all staging memory, unless somebody writes at this moment.
    pub fn staging_bytes(&self) -> Option<usize> {
        let writer = self.ledger.writer()?;
        Some(SMALL_STAGING + writer.larger.all().map(Region::length).sum::<usize>())
    }

    /// Gives larger staging memory back, and the second receive buffer, if nothing was
    /// written for two ticks of the slow clock and nothing is in flight. Returns whether a
    /// probe would show that: the last work requests may not be signalled, and its completion
    /// stands for theirs. Main thread.
    pub fn shrink_if_idle(&self) -> bool {
        let quiet = self.is_quiet();
        if quiet && self.inbound.is_other_free() {
            self.receive.open().other = None;
        }
        let posted = self.ledger.total_posted();
        let mut own = self.own();
        let paused = posted == own.posted_before[0];
        own.posted_before = [posted, own.posted_before[0]];
        drop(own);
        if !quiet || !self.ledger.is_idle() {
            let keeps = |writer: Writer<'_, Outgoing>| writer.larger.present().is_some();
            return paused && !self.ledger.is_idle() && self.ledger.writer().is_some_and(keeps);
        }
        if let Some(mut writer) = self.ledger.idle_writer()
            && writer.larger.present().is_some()
        {
            writer.larger.clear();
            writer.install(SMALL_STAGING);
        }
        false
    }

    /// Whether nothing was written for at least one tick of the slow clock.
    pub fn is_quiet(&self) -> bool {
        let posted = self.ledger.total_posted();
        self.own().posted_before == [posted; 2]
    }

    /// Payload writes that are not known to have arrived.
    pub fn writes_in_flight(&self) -> u64 {
        self.ledger.in_flight()
    }

    /// Payload up to and without `sequence` has arrived.
    pub fn payload_completed(&self, sequence: u32) {
        self.ledger.retire(sequence);
    }

    /// Whether every payload that was posted is known to have arrived.
    pub fn is_delivered(&self) -> bool {
        self.ledger.is_idle()
    }

    /// Whether a work request was refused since the last call, so that no completion
    /// may be on its way that would bring the writer back.
    pub fn take_refused(&self) -> bool {
        self.refused.swap(false, Ordering::Relaxed)
    }

    /// The error number with which the device refused a write for good, once. Main thread.
    pub fn take_refusal(&self) -> Option<i32> {
        Some(self.refusal.swap(0, Ordering::Relaxed)).filter(|errno| *errno != 0)
    }

    /// Whether nothing was written yet.
    pub fn is_unwritten(&self) -> bool {
        self.ledger.total_posted() == 0
    }

    /// Posts a probe; `false` if somebody is writing at this moment. Main thread.
    ///
    /// # Errors
    /// If the queue pair does not take it.
    pub fn post_probe(&self) -> Result<bool, Error> {
        // With the writer's lock: a payload that has its number already, but is not
        // posted yet, would otherwise be taken for one that the probe came after.
        let Some(writer) = self.ledger.writer() else { return Ok(false) };
        let sequence = writer.next_sequence();
        self.pair.post_probe(self.key.work_request(Work::Probe(sequence)))?;
        drop(writer);
        METRICS.keepalive_probes.add(1);
        Ok(true)
    }
}

/// How many bytes of these pieces one call takes at most.
fn at_once(pieces: &[(*const u8, usize)]) -> usize {
    pieces.iter().fold(0, |sum: usize, piece| sum.saturating_add(piece.1)).min(CALL)
}

/// Bytes to send, in pieces.
struct Source<'a> {
    pieces: &'a [(*const u8, usize)],
    /// Bytes of the first piece that were copied already.
    within: usize,
}

impl Source<'_> {
    /// Copies the next `length` bytes, of which there must be as many.
    ///
    /// # Safety
    /// The pieces are readable, `to` is writable for `length` bytes.
    unsafe fn copy_to(&mut self, mut to: *mut u8, mut length: usize) {
        while length > 0 {
            let (start, size) = self.pieces[0];
            let count = (size - self.within).min(length);
            // SAFETY: by the caller's promise; the two never overlap, one is ours.
            unsafe {
                ptr::copy_nonoverlapping(start.add(self.within), to, count);
                to = to.add(count);
            }
            length -= count;
            self.within += count;
            if self.within == size {
                self.pieces = &self.pieces[1..];
                self.within = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_takes_no_more_than_the_server_can_be_told() {
        let pieces = |lengths: &[usize]| -> Vec<_> {
            lengths.iter().map(|length| (ptr::null(), *length)).collect()
        };
        assert_eq!(at_once(&pieces(&[])), 0);
        assert_eq!(at_once(&pieces(&[3, 0, 4])), 7);
        for large in [&[CALL + 1][..], &[1 << 31, 1 << 31], &[usize::MAX, 1]] {
            assert_eq!(at_once(&pieces(large)), CALL);
        }
    }

    #[test]
    fn pieces_are_joined_in_order_whatever_the_steps() {
        let text = b"one two three";
        let pieces: Vec<_> = [&text[..3], &text[3..3], &text[3..8], &text[8..]]
            .iter()
            .map(|piece| (piece.as_ptr(), piece.len()))
            .collect();
        for step in 1..=text.len() {
            let mut source = Source { pieces: &pieces, within: 0 };
            let mut out = vec![0_u8; text.len()];
            let mut at = 0;
            while at < text.len() {
                let count = step.min(text.len() - at);
                // SAFETY: `out` holds as many bytes as the pieces.
                unsafe { source.copy_to(out.as_mut_ptr().add(at), count) };
                at += count;
            }
            assert_eq!(out, text);
        }
    }
}
