// SPDX-License-Identifier: BSD-3-Clause
//! Queue pairs, and the four work requests of this protocol.

use crate::Error;
use crate::cm::Id;
use crate::cq::CompletionQueue;
use crate::library::call;
use crate::mr::ProtectionDomain;
use rdma_sys::*;
use std::mem;
use std::ptr;

/// A reliable connected queue pair, bound to the id that it was made for.
#[derive(Debug)]
pub struct QueuePair {
    id: *mut rdma_cm_id,
    raw: *mut ibv_qp,
    /// Most bytes that a work request may carry in itself.
    inline: u32,
}

// SAFETY: posting is thread-safe in libibverbs; making and destroying happen on
// the owner's thread.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

/// Registered bytes that a work request reads or writes.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// Address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// Local key of the region that holds them.
    pub local_key: u32,
}

/// Where in the peer's memory an RDMA WRITE goes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Address of the first byte.
    pub address: u64,
    /// Remote key of the peer's region.
    pub rkey: u32,
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
        id: &Id,
        domain: &ProtectionDomain,
        queue: &CompletionQueue,
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
            Ok(Self { id: id.raw(), raw, inline })
        };
        create(INLINE).or_else(|_: Error| create(0))
    }

    /// Makes a peer that found no receive posted try again soon. Once connected.
    ///
    /// # Errors
    /// If the device can't change it; slower, but not wrong.
    pub fn shorten_rnr_timer(&self) -> Result<(), Error> {
        // SAFETY: attributes are numbers; only the masked one is looked at.
        let mut attributes: ibv_qp_attr = unsafe { mem::zeroed() };
        attributes.min_rnr_timer = RNR_TIMER_0_64_MS;
        let mask = ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0 as i32;
        // SAFETY: a live queue pair.
        Error::check_number("set the RNR timer", unsafe {
            call!(ibv_modify_qp(self.raw, &mut attributes, mask))
        })
    }

    /// Posts a receive for one control message.
    ///
    /// # Errors
    /// If the queue pair is gone or full.
    pub fn post_receive(&self, work_request: u64, into: Slice) -> Result<(), Error> {
        let mut sge = sge(into);
        let mut wr = ibv_recv_wr {
            wr_id: work_request,
            next: ptr::null_mut(),
            sg_list: &mut sge,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the provider copies the request while it posts.
        Error::check_number("post a receive", unsafe { ibv_post_recv(self.raw, &mut wr, &mut bad) })
    }

    /// Posts a SEND of one control message; it always completes.
    ///
    /// # Errors
    /// [`Error::is_about_room`] if the send queue is full, others if the queue pair is gone.
    pub fn post_send(&self, work_request: u64, message: Slice) -> Result<(), Error> {
        self.post(work_request, ibv_wr_opcode::IBV_WR_SEND, Some(message), None, 0, true)
    }

    /// Posts an RDMA WRITE that tells the peer its length by immediate. It
    /// completes if `signalled`, or in error.
    ///
    /// # Errors
    /// As [`post_send`](Self::post_send).
    pub fn post_write(
        &self,
        work_request: u64,
        bytes: Slice,
        target: Target,
        signalled: bool,
    ) -> Result<(), Error> {
        let opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
        self.post(work_request, opcode, Some(bytes), Some(target), bytes.length, signalled)
    }

    /// Posts an RDMA WRITE of nothing: it costs the peer no receive and touches no
    /// memory, and completes when all that was posted before it has arrived.
    ///
    /// # Errors
    /// As [`post_send`](Self::post_send).
    pub fn post_probe(&self, work_request: u64) -> Result<(), Error> {
        let nowhere = Target { address: 0, rkey: 0 };
        let opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        self.post(work_request, opcode, None, Some(nowhere), 0, true)
    }

    fn post(
        &self,
        work_request: u64,
        opcode: ibv_wr_opcode::Type,
        bytes: Option<Slice>,
        target: Option<Target>,
        immediate: u32,
        signalled: bool,
    ) -> Result<(), Error> {
        let mut sge = bytes.map(sge);
        // SAFETY: a work request is numbers and pointers, for which zero means "none".
        let mut wr: ibv_send_wr = unsafe { mem::zeroed() };
        wr.wr_id = work_request;
        wr.opcode = opcode;
        if let Some(sge) = &mut sge {
            wr.sg_list = sge;
            wr.num_sge = 1;
        }
        if signalled {
            wr.send_flags |= ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        if bytes.is_some_and(|bytes| bytes.length <= self.inline) {
            wr.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        wr.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
        if let Some(target) = target {
            wr.wr.rdma = rdma_t { remote_addr: target.address, rkey: target.rkey };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: a live queue pair; the provider copies the request while it posts.
        Error::check_number("post a work request", unsafe {
            ibv_post_send(self.raw, &mut wr, &mut bad)
        })
    }
}

fn sge(slice: Slice) -> ibv_sge {
    ibv_sge { addr: slice.address, length: slice.length, lkey: slice.local_key }
}

impl QueuePair {
    /// Has the id forget its queue pair, which is in nobody's way then if it is destroyed on
    /// another thread: librdmacm changes an id's queue pair while it reads events of the
    /// handshake. On the thread that reads them.
    pub fn detach(&self) {
        // SAFETY: made on this id, which its holder keeps until after the pair.
        unsafe { (*self.id).qp = ptr::null_mut() };
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: as above. An id that was detached is only looked at. Completion queues
        // of librdmacm's own making, which `rdma_destroy_qp` would destroy, there are none.
        unsafe {
            if !(*self.id).qp.is_null() {
                self.detach();
            }
            call!(ibv_destroy_qp(self.raw));
        }
    }
}
