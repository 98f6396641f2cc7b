// SPDX-License-Identifier: BSD-3-Clause
//! Queue pairs, and the work requests that Valkey over RDMA is made of.

use crate::Error;
use crate::cm::Id;
use crate::cq::CompletionQueue;
use crate::library::call;
use crate::mr::{ProtectionDomain, Sge};
use rdma_sys::*;
use std::mem;
use std::ptr;
use std::sync::Arc;

/// A reliable connected queue pair, bound to the id that it was made for.
#[derive(Debug)]
pub struct QueuePair {
    raw: *mut ibv_qp,
    id: Arc<Id>,
    _domain: Arc<ProtectionDomain>,
    _queue: Arc<CompletionQueue>,
    /// Most bytes that a work request may carry in itself.
    inline: u32,
}

// SAFETY: posting is thread-safe in libibverbs. For who changes the id's own pointer to the
// queue pair, see `detach`.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

/// The target of an RDMA WRITE, in the peer's memory.
#[derive(Clone, Copy, Debug)]
pub struct RemoteBuf {
    /// Address of the first byte.
    pub address: u64,
    /// Remote key of the peer's region.
    pub rkey: u32,
}

/// How long a queue pair and its peer wait.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Whether the peer waits for as long as [`QueuePair::shorten_rnr_timer`] sets.
    pub is_rnr_short: bool,
    /// See [`Id::set_ack_timeout`](crate::cm::Id::set_ack_timeout).
    pub ack_timeout: u8,
}

/// Bytes that a work request carries in itself, if the device can: the replies to most
/// commands. The device need not fetch them then.
const INLINE: u32 = 96;

/// Encoding of 0.64 ms (InfiniBand specification, table "RNR NAK timer field"):
/// how long a peer waits before it repeats what found no receive posted here.
/// The connection manager would leave it at 0, which stands for 655 ms.
const RNR_TIMER_0_64_MS: u8 = 12;

impl QueuePair {
    /// Makes the queue pair of `id`.
    ///
    /// # Errors
    /// If the device refuses the sizes or has no queue pair left.
    pub fn new(
        id: &Arc<Id>,
        domain: &Arc<ProtectionDomain>,
        queue: &Arc<CompletionQueue>,
        send_depth: u32,
        receive_depth: u32,
    ) -> Result<Self, Error> {
        let create = |inline: u32| {
            // SAFETY: attributes are numbers and pointers, for which zero means "none".
            let mut attributes: ibv_qp_init_attr = unsafe { mem::zeroed() };
            attributes.send_cq = queue.raw();
            attributes.recv_cq = queue.raw();
            attributes.cap.max_send_wr = send_depth;
            attributes.cap.max_recv_wr = receive_depth;
            attributes.cap.max_send_sge = 1;
            attributes.cap.max_recv_sge = 1;
            attributes.cap.max_inline_data = inline;
            attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
            // SAFETY: live id, domain and queue.
            Error::check("create a queue pair", unsafe {
                call!(rdma_create_qp(id.raw(), domain.raw(), &mut attributes))
            })?;
            // SAFETY: the call succeeded, so the id has its queue pair.
            let raw = unsafe { (*id.raw()).qp };
            // What it was given, which may be less: some devices take the wish and clamp it.
            let inline = attributes.cap.max_inline_data.min(INLINE);
            Ok(Self {
                raw,
                id: Arc::clone(id),
                _domain: Arc::clone(domain),
                _queue: Arc::clone(queue),
                inline,
            })
        };
        create(INLINE).or_else(|_: Error| create(0))
    }

    /// Its number, by which the device tells of it.
    pub fn number(&self) -> u32 {
        // SAFETY: live as long as `self`.
        unsafe { (*self.raw).qp_num }
    }

    /// Bytes that a work request carries in itself at most, as the device granted them.
    pub fn inline(&self) -> u32 {
        self.inline
    }

    /// Puts it into error: all that is posted completes as flushed, and the peer is not told.
    ///
    /// # Errors
    /// If the device can't.
    pub fn fail(&self) -> Result<(), Error> {
        // SAFETY: attributes are numbers; only the masked one is looked at.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        let mask = ibv_qp_attr_mask::IBV_QP_STATE.0 as i32;
        // SAFETY: a live queue pair.
        Error::check_number("put the queue pair into error", unsafe {
            call!(ibv_modify_qp(self.raw, &mut attributes, mask))
        })
    }

    /// Makes a peer that found no receive posted try again soon. Once it is ready to send.
    ///
    /// # Errors
    /// If the device can't change it; slower, but not wrong.
    pub fn shorten_rnr_timer(&self) -> Result<(), Error> {
        // SAFETY: attributes are numbers; only the masked ones are looked at.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.min_rnr_timer = RNR_TIMER_0_64_MS;
        // The state as well, which stays as it is: some drivers hand the field to the device
        // whether it was given or not, and 0 there is a reset.
        attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
        attributes.cur_qp_state = ibv_qp_state::IBV_QPS_RTS;
        let mask = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0
            | ibv_qp_attr_mask::IBV_QP_STATE.0
            | ibv_qp_attr_mask::IBV_QP_CUR_STATE.0;
        // SAFETY: a live queue pair.
        Error::check_number("set the RNR timer", unsafe {
            call!(ibv_modify_qp(self.raw, &mut attributes, mask as i32))
        })
    }

    /// The times that it goes by, as far as the device tells: not of a queue pair that has failed.
    pub fn times(&self) -> Option<Times> {
        // SAFETY: plain numbers and pointers, which the call fills in.
        let (mut attributes, mut made): (ibv_qp_attr, ibv_qp_init_attr) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        let mask = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0
            | ibv_qp_attr_mask::IBV_QP_TIMEOUT.0
            | ibv_qp_attr_mask::IBV_QP_STATE.0;
        // SAFETY: a live queue pair and room for the answer.
        let queried =
            unsafe { call!(ibv_query_qp(self.raw, &mut attributes, mask as i32, &mut made)) };
        let tells = queried == 0 && attributes.qp_state == ibv_qp_state::IBV_QPS_RTS;
        tells.then_some(Times {
            is_rnr_short: attributes.min_rnr_timer == RNR_TIMER_0_64_MS,
            ack_timeout: attributes.timeout,
        })
    }

    /// Posts a receive: a SEND of the peer fills its bytes, an immediate leaves them alone.
    ///
    /// # Errors
    /// If the queue pair is gone or full.
    pub fn post_receive(&self, wr_id: u64, into: Sge<'_>) -> Result<(), Error> {
        let mut sge = into.raw;
        let mut wr = ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the provider copies the request while it posts.
        Error::check_number("post a receive", unsafe { ibv_post_recv(self.raw, &mut wr, &mut bad) })
    }

    /// Posts a SEND of one message; it always completes.
    ///
    /// # Errors
    /// [`Error::is_queue_full`] if the send queue is full, others if the queue pair is gone.
    pub fn post_send(&self, wr_id: u64, message: Sge<'_>) -> Result<(), Error> {
        self.post(wr_id, ibv_wr_opcode::IBV_WR_SEND, Some(message), None, 0, true)
    }

    /// Posts an RDMA WRITE that tells the peer its length by immediate. It
    /// completes if `signalled`, or in error.
    ///
    /// # Errors
    /// As [`post_send`](Self::post_send).
    pub fn post_write(
        &self,
        wr_id: u64,
        bytes: Sge<'_>,
        to: RemoteBuf,
        signalled: bool,
    ) -> Result<(), Error> {
        self.post_write_of(wr_id, bytes, to, bytes.raw.length, signalled)
    }

    /// The same with another immediate.
    ///
    /// # Errors
    /// As [`post_send`](Self::post_send).
    pub fn post_write_of(
        &self,
        wr_id: u64,
        bytes: Sge<'_>,
        to: RemoteBuf,
        immediate: u32,
        signalled: bool,
    ) -> Result<(), Error> {
        let opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
        self.post(wr_id, opcode, Some(bytes), Some(to), immediate, signalled)
    }

    /// Posts an RDMA WRITE of nothing: it costs the peer no receive and touches no
    /// memory, and completes when all that was posted before it has arrived. `at` is looked at
    /// by few devices only.
    ///
    /// # Errors
    /// As [`post_send`](Self::post_send).
    pub fn post_probe(&self, wr_id: u64, at: RemoteBuf) -> Result<(), Error> {
        let opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        self.post(wr_id, opcode, None, Some(at), 0, true)
    }

    fn post(
        &self,
        wr_id: u64,
        opcode: ibv_wr_opcode::Type,
        bytes: Option<Sge<'_>>,
        to: Option<RemoteBuf>,
        immediate: u32,
        signalled: bool,
    ) -> Result<(), Error> {
        let mut sge = bytes.map(|bytes| bytes.raw);
        // SAFETY: a work request is numbers and pointers, for which zero means "none".
        let mut wr: ibv_send_wr = unsafe { mem::zeroed() };
        wr.wr_id = wr_id;
        wr.opcode = opcode;
        if let Some(sge) = &mut sge {
            wr.sg_list = sge;
            wr.num_sge = 1;
        }
        if signalled {
            wr.send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        if bytes.is_some_and(|bytes| bytes.raw.length <= self.inline) {
            wr.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        wr.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
        if let Some(to) = to {
            wr.wr.rdma = rdma_t { remote_addr: to.address, rkey: to.rkey };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the provider copies the request while it posts.
        Error::check_number("post a work request", unsafe {
            ibv_post_send(self.raw, &mut wr, &mut bad)
        })
    }
}

impl QueuePair {
    /// Has the id forget its queue pair, which is in nobody's way then if it is destroyed on
    /// another thread: librdmacm changes an id's queue pair while it reads events of the
    /// handshake. On the thread that reads them.
    pub fn detach(&self) {
        // SAFETY: a live id.
        unsafe { (*self.id.raw()).qp = ptr::null_mut() };
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: as above. An id that was detached is only looked at. Completion queues
        // of librdmacm's own making, which `rdma_destroy_qp` would destroy, there are none.
        unsafe {
            if !(*self.id.raw()).qp.is_null() {
                self.detach();
            }
            call!(ibv_destroy_qp(self.raw));
        }
    }
}
