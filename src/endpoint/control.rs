// SPDX-License-Identifier: BSD-3-Clause
//! The control region of an endpoint: slots for the messages of both sides, and a little
//! staging memory behind them.

use super::Endpoint;
use crate::endpoint::key::Work;
use proto::wire::{MESSAGE_LEN, Message};
use verbs::Error;

/// Receives that a peer finds posted: each of its writes and messages uses one
/// until the next pass. A peer that is ahead waits, by RNR, for 0.64 ms.
pub(super) const RECEIVE_SLOTS: u16 = 64;
/// Control messages of ours that may be in flight.
pub(super) const CONTROL_SLOTS: u16 = 8;

/// The control region: four pages.
pub(super) const CONTROL_BYTES: usize = 16 * 1024;
pub(super) const CONTROL_SLOTS_AT: usize = RECEIVE_SLOTS as usize * MESSAGE_LEN;
pub(super) const STAGING_AT: usize = CONTROL_SLOTS_AT + CONTROL_SLOTS as usize * MESSAGE_LEN;
/// Staging memory that every endpoint has.
pub(super) const SMALL_STAGING: usize = CONTROL_BYTES - STAGING_AT;

impl Endpoint {
    /// Sends the answers that are due, as far as there are slots. Main thread.
    ///
    /// # Errors
    /// If a message can't be posted.
    pub fn send_answers(&self) -> Result<(), Error> {
        loop {
            let Some((answer, slot)) = self.own().session.next_answer() else { return Ok(()) };
            if !self.send_control(answer)? {
                self.own().session.answer_not_sent(answer, slot);
                return Ok(());
            }
            self.post_receive_again(slot)?;
        }
    }

    /// Posts a control message; `false` if no slot is free, or no room in the queue.
    pub(super) fn send_control(&self, message: Message) -> Result<bool, Error> {
        let Some(slot) = self.own().free_control_slots.pop() else { return Ok(false) };
        let offset = CONTROL_SLOTS_AT + usize::from(slot) * MESSAGE_LEN;
        // SAFETY: a free slot of the control region, which is ours alone.
        unsafe {
            let place = self.control.start().add(offset);
            place.cast::<[u8; MESSAGE_LEN]>().write(message.encode());
        }
        let bytes = self.control.sge(offset, MESSAGE_LEN as u32);
        match self.qp.post_send(self.key.work_request(Work::Control(slot)), bytes) {
            Ok(()) => Ok(true),
            Err(error) => {
                self.own().free_control_slots.push(slot);
                if error.is_queue_full() { Ok(false) } else { Err(error) }
            }
        }
    }

    /// A control message of ours has arrived. Main thread.
    pub fn control_completed(&self, slot: u16) {
        self.own().free_control_slots.push(slot);
    }

    /// Whether a message of ours waits for a slot. Main thread.
    pub fn awaits_control_slot(&self) -> bool {
        let own = self.own();
        own.announcement_due || own.session.owes_answers() || own.free_control_slots.is_empty()
    }

    /// Posts the receive of a slot again, which has to wait if there is no room now. Main
    /// thread.
    ///
    /// # Errors
    /// If the queue pair refuses it.
    pub fn post_receive_again(&self, slot: u16) -> Result<(), Error> {
        let result = self.post_receive(slot);
        if result.is_err_and(|error| error.is_queue_full()) {
            self.own().unposted.push(slot);
            return Ok(());
        }
        result
    }

    /// Posts the receives that there was no room for. Main thread.
    ///
    /// # Errors
    /// If the queue pair refuses one.
    pub fn post_waiting_receives(&self) -> Result<(), Error> {
        let waiting = std::mem::take(&mut self.own().unposted);
        waiting.into_iter().try_for_each(|slot| self.post_receive_again(slot))
    }

    /// Posts the receive of a slot. Main thread.
    ///
    /// # Errors
    /// If the queue pair does not take it.
    pub(super) fn post_receive(&self, slot: u16) -> Result<(), Error> {
        let offset = usize::from(slot) * MESSAGE_LEN;
        let into = self.control.sge(offset, MESSAGE_LEN as u32);
        self.qp.post_receive(self.key.work_request(Work::Receive(slot)), into)
    }

    /// The bytes of the SEND that arrived in a slot.
    pub fn received(&self, slot: u16, length: u32) -> Vec<u8> {
        let length = (length as usize).min(MESSAGE_LEN);
        let offset = usize::from(slot.min(RECEIVE_SLOTS - 1)) * MESSAGE_LEN;
        // SAFETY: inside the control region; the receive completed and is not
        // posted, so the device does not write there.
        unsafe { std::slice::from_raw_parts(self.control.start().add(offset), length) }.to_vec()
    }

    /// Receives that are posted for the peer.
    pub fn receive_slots(&self) -> u16 {
        RECEIVE_SLOTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_control_region_fit() {
        const { assert!(STAGING_AT + SMALL_STAGING == CONTROL_BYTES) };
        const { assert!(SMALL_STAGING > 8 * 1024) };
    }
}
