// SPDX-License-Identifier: BSD-3-Clause
//! The queue pair and the memory of a connection, as its session uses them.

use crate::send_queue::PostError;
use crate::window::Announcement;
use crate::wire::{Memory, Message};

/// The owner of queue pair, control region and receive memory, as a session uses it.
pub trait Port {
    /// A receive buffer.
    type Buffer;
    /// Why something could not be posted.
    type Error;

    /// Posts the receive of a slot.
    ///
    /// # Errors
    /// [`PostError`] if the queue pair does not take it.
    fn post_receive(&mut self, slot: u16) -> Result<(), PostError<Self::Error>>;

    /// Posts a control message, which goes into a slot that is free.
    ///
    /// # Errors
    /// [`PostError`] if the queue pair does not take it.
    fn post_message(&mut self, slot: u16, message: Message) -> Result<(), PostError<Self::Error>>;

    /// Posts a probe, which bears the number of the next payload and names the buffer that the
    /// peer announced last, if it announced one.
    ///
    /// # Errors
    /// [`PostError`] if the queue pair does not take it, [`PostError::Full`] too if there are
    /// to be no probes.
    fn post_probe(
        &mut self,
        next: u32,
        at: Option<Announcement>,
    ) -> Result<(), PostError<Self::Error>>;

    /// A receive buffer of `length` bytes, if it can be had.
    fn register(&mut self, length: u32) -> Option<Self::Buffer>;

    /// A receive buffer as the peer is told of it.
    fn memory(&self, buffer: &Self::Buffer) -> Memory;

    /// A receive buffer is announced before the one before was read. To be counted.
    fn announced_early(&mut self) {}
}
