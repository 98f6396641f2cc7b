// SPDX-License-Identifier: BSD-3-Clause
//! Completion channels and completion queues.

use crate::Error;
use crate::descriptor::set_nonblocking;
use crate::device::Device;
use crate::library::call;
use rdma_sys::*;
use std::ffi::CStr;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::{fmt, mem};

/// A descriptor that polls readable when an armed queue gets a completion.
#[derive(Debug)]
pub struct CompletionChannel {
    raw: *mut ibv_comp_channel,
    /// Open for as long as the channel is there.
    device: Device,
}

// SAFETY: libibverbs is thread-safe, and the pointer is freed by the owner alone.
unsafe impl Send for CompletionChannel {}
// SAFETY: as above.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    /// A channel on a device; non-blocking, closed on exec.
    ///
    /// # Errors
    /// If the device or the process has no descriptor left.
    pub fn new(device: &Device) -> Result<Self, Error> {
        // SAFETY: a live context.
        let raw = unsafe { call!(ibv_create_comp_channel(device.context())) };
        if raw.is_null() {
            return Err(Error::last("create a completion channel"));
        }
        let channel = Self { raw, device: device.clone() };
        set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        // SAFETY: live as long as `self`.
        unsafe { (*self.raw).fd }
    }

    /// Takes one event off the channel and acknowledges it. Returns the number of the queue
    /// that it was of, if there was one.
    ///
    /// # Errors
    /// `EIO` if the device was removed: there will be no event any more, and the
    /// descriptor polls as in error for ever.
    pub fn take_event(&self) -> Result<Option<usize>, Error> {
        let mut cq = ptr::null_mut();
        let mut context = ptr::null_mut();
        // SAFETY: a live channel and places for the answer; the queue is live,
        // since destroying one takes its events off the channel.
        unsafe {
            if call!(ibv_get_cq_event(self.raw, &mut cq, &mut context)) != 0 {
                let error = Error::last("take completion events");
                return match error.errno {
                    libc::EAGAIN | libc::EINTR => Ok(None),
                    _ => Err(error),
                };
            }
            call!(ibv_ack_cq_events(cq, 1));
        }
        Ok(Some(context.addr()))
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed here alone; its queues, which keep it, are gone.
        unsafe { call!(ibv_destroy_comp_channel(self.raw)) };
    }
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    raw: *mut ibv_cq,
    _channel: Arc<CompletionChannel>,
}

// SAFETY: as of the channel.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// The id that the work request was posted with.
    pub wr_id: u64,
    /// The result.
    pub outcome: Outcome,
}

/// The result of a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A SEND of so many bytes arrived in the posted receive.
    Received(u32),
    /// An RDMA WRITE arrived with this immediate, in host order.
    Immediate(u32),
    /// One of our own work requests is over.
    Sent,
    /// Something that no work request of ours asks for.
    Unexpected(u32),
    /// The work request failed; the queue pair is in error.
    Failed(Status),
}

/// Why a work request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u32);

impl Status {
    /// Whether the work request only followed the queue pair into error.
    pub fn is_flush(self) -> bool {
        self.0 == ibv_wc_status::IBV_WC_WR_FLUSH_ERR
    }

    /// Whether a message was longer than the receive that it found, if this is the status
    /// of a receive.
    pub fn is_too_long(self) -> bool {
        self.0 == ibv_wc_status::IBV_WC_LOC_LEN_ERR
    }

    /// Whether our own device could not carry out a work request.
    pub fn is_local_operation(self) -> bool {
        self.0 == ibv_wc_status::IBV_WC_LOC_QP_OP_ERR
    }

    /// The kind of failure.
    pub fn failure(self) -> Failure {
        match self.0 {
            ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => Failure::ReceiverNotReady,
            ibv_wc_status::IBV_WC_RETRY_EXC_ERR | ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => {
                Failure::Transport
            }
            ibv_wc_status::IBV_WC_REM_ACCESS_ERR => Failure::RemoteAccess,
            ibv_wc_status::IBV_WC_REM_INV_REQ_ERR
            | ibv_wc_status::IBV_WC_REM_OP_ERR
            | ibv_wc_status::IBV_WC_REM_ABORT_ERR => Failure::Remote,
            _ => Failure::Local,
        }
    }

    /// The library's words for it.
    pub fn text(self) -> String {
        // SAFETY: the function answers any number with a static string.
        unsafe {
            let text = call!(ibv_wc_status_str(self.0));
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// Whose failure it is, as far as a status tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The peer posted no receives for longer than it asked us to try.
    ReceiverNotReady,
    /// The peer or the network between is gone.
    Transport,
    /// The peer's buffer is not what it announced.
    RemoteAccess,
    /// The peer's device refused or failed.
    Remote,
    /// Our own side.
    Local,
}

/// Most completions that one call of [`CompletionQueue::poll`] takes.
const BATCH: usize = 32;

impl CompletionQueue {
    /// A queue of at least `entries` on the channel's device. Its events go to that channel
    /// and bear `number`; `vector` says which of the device's interrupts raises them.
    ///
    /// # Errors
    /// If the device can't.
    pub fn new(
        channel: &Arc<CompletionChannel>,
        entries: u32,
        vector: u32,
        number: usize,
    ) -> Result<Self, Error> {
        // SAFETY: a live context and channel.
        let raw = unsafe {
            call!(ibv_create_cq(
                channel.device.context(),
                entries as i32,
                ptr::without_provenance_mut(number),
                channel.raw,
                vector as i32,
            ))
        };
        if raw.is_null() {
            return Err(Error::last("create a completion queue"));
        }
        Ok(Self { raw, _channel: Arc::clone(channel) })
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.raw
    }

    /// Asks for one event at the next completion. Completions that are there already raise
    /// none: poll once more afterwards.
    ///
    /// # Errors
    /// If the device can't: the connections of this queue can't be served then.
    pub fn arm(&self) -> Result<(), Error> {
        // SAFETY: a live queue.
        Error::check_number("arm a completion queue", unsafe { ibv_req_notify_cq(self.raw, 0) })
    }

    /// Takes as many completions as a [`Batch`] holds into `batch`, in place of what it held. Those that
    /// the provider had taken before it failed are in it even after an error.
    ///
    /// # Errors
    /// If a completion can't be read, the queue overran, or its device is gone.
    pub fn poll(&self, batch: &mut Batch) -> Result<(), Error> {
        batch.clear();
        // SAFETY: a live queue and room for BATCH completions.
        let count = unsafe { ibv_poll_cq(self.raw, BATCH as i32, batch.raw.as_mut_ptr()) };
        match usize::try_from(count) {
            Ok(count) => {
                batch.count = count;
                Ok(())
            }
            Err(_) => {
                batch.count = batch.raw.iter().take_while(|wc| wc.wr_id != UNTOUCHED).count();
                // Providers do not set `errno` here.
                Err(Error { action: "poll a completion queue", errno: libc::EIO })
            }
        }
    }
}

/// The id of no work request: one that the provider did not write.
const UNTOUCHED: u64 = u64::MAX;

/// Completions that were taken together. One is made for good and used again and again: a
/// queue is looked at far more often than it has completions.
pub struct Batch {
    /// The first `count` are those of the last poll; the others are [`UNTOUCHED`].
    raw: [ibv_wc; BATCH],
    count: usize,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Default for Batch {
    fn default() -> Self {
        // SAFETY: a completion is plain numbers.
        let mut batch = Self { raw: unsafe { mem::zeroed() }, count: BATCH };
        batch.clear();
        batch
    }
}

impl Batch {
    /// Forgets what it holds. The status is one of a failure: should a provider write half a
    /// completion, then that is not taken for a success.
    fn clear(&mut self) {
        for wc in &mut self.raw[..mem::take(&mut self.count)] {
            wc.wr_id = UNTOUCHED;
            wc.status = ibv_wc_status::IBV_WC_GENERAL_ERR;
        }
    }

    /// Whether it holds as many as it can, so that there may be more.
    pub fn is_full(&self) -> bool {
        self.count == BATCH
    }

    /// Each of them, in their order.
    pub fn iter(&self) -> impl Iterator<Item = Completion> {
        self.raw[..self.count].iter().map(|wc| Completion { wr_id: wc.wr_id, outcome: outcome(wc) })
    }
}

fn outcome(wc: &ibv_wc) -> Outcome {
    // After a failure only id and status are valid.
    if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
        return Outcome::Failed(Status(wc.status));
    }
    // A SEND that carries more than a message completes as one, but for a flag.
    let more = ibv_wc_flags::IBV_WC_WITH_IMM.0 | ibv_wc_flags::IBV_WC_WITH_INV.0;
    match wc.opcode {
        ibv_wc_opcode::IBV_WC_RECV if wc.wc_flags & more != 0 => Outcome::Unexpected(wc.opcode),
        ibv_wc_opcode::IBV_WC_RECV => Outcome::Received(wc.byte_len),
        ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM => {
            // SAFETY: a successful completion with this opcode carries an immediate.
            Outcome::Immediate(u32::from_be(unsafe { wc.imm_data_invalidated_rkey_union.imm_data }))
        }
        ibv_wc_opcode::IBV_WC_SEND | ibv_wc_opcode::IBV_WC_RDMA_WRITE => Outcome::Sent,
        other => Outcome::Unexpected(other),
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: created by us, destroyed here alone; its queue pairs, which keep it, are
        // gone, and its events are acknowledged as they are taken.
        unsafe { call!(ibv_destroy_cq(self.raw)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_send_that_carries_more_than_a_message_is_no_message() {
        // SAFETY: a completion is plain numbers.
        let mut wc: ibv_wc = unsafe { mem::zeroed() };
        (wc.opcode, wc.byte_len) = (ibv_wc_opcode::IBV_WC_RECV, 32);
        assert_eq!(outcome(&wc), Outcome::Received(32));
        wc.wc_flags = ibv_wc_flags::IBV_WC_GRH.0;
        assert_eq!(outcome(&wc), Outcome::Received(32), "what the device adds is its own");
        for flag in [ibv_wc_flags::IBV_WC_WITH_IMM, ibv_wc_flags::IBV_WC_WITH_INV] {
            wc.wc_flags = flag.0;
            assert_eq!(outcome(&wc), Outcome::Unexpected(wc.opcode));
        }
    }

    #[test]
    fn failures_are_told_apart() {
        for (status, failure) in [
            (ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR, Failure::ReceiverNotReady),
            (ibv_wc_status::IBV_WC_RETRY_EXC_ERR, Failure::Transport),
            (ibv_wc_status::IBV_WC_REM_ACCESS_ERR, Failure::RemoteAccess),
            (ibv_wc_status::IBV_WC_REM_OP_ERR, Failure::Remote),
            (ibv_wc_status::IBV_WC_LOC_PROT_ERR, Failure::Local),
        ] {
            assert_eq!(Status(status).failure(), failure);
        }
    }
}
