// SPDX-License-Identifier: BSD-3-Clause
//! The messages of the handshake (chapter 12), one packet each.

use rdma_sys::rdma_conn_param;
use std::mem::size_of;

pub mod kind {
    pub const REQ: u32 = 1;
    pub const REP: u32 = 2;
    pub const RTU: u32 = 3;
    pub const REJ: u32 = 4;
    pub const DREQ: u32 = 5;
    pub const DREP: u32 = 6;
}

/// Reasons of a REJ (12.6.7.2) that this fabric gives.
pub mod reason {
    pub const TIMEOUT: i32 = 4;
    pub const INVALID_SERVICE: i32 = 8;
    pub const CONSUMER: i32 = 28;
}

/// How much private data each message carries; the receiver always gets all of
/// it, padded with zeroes (12.6, less the IP addressing header in a REQ).
pub fn private_size(kind: u32) -> usize {
    match kind {
        kind::REQ => 56,
        kind::REP => 196,
        kind::REJ => 148,
        _ => 0,
    }
}

/// A message of any kind; unused fields are zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Message {
    pub version: u32,
    pub kind: u32,
    pub qp_num: u32,
    pub reason: i32,
    /// The number of the completion channel whose descriptor comes along, or 0.
    pub channel: u64,
    pub responder_resources: u8,
    pub initiator_depth: u8,
    pub flow_control: u8,
    pub retry_count: u8,
    pub rnr_retry_count: u8,
    pub srq: u8,
    pub port: u16,
    pub source_port: u16,
    /// The addresses of the connection, in a REQ: IPv4 ones mapped into IPv6.
    pub v4: u16,
    pub source: [u8; 16],
    pub target: [u8; 16],
    pub private: [u8; 196],
}

const VERSION: u32 = 2;
pub const SIZE: usize = size_of::<Message>();

impl Message {
    pub fn new(kind: u32) -> Message {
        Message {
            version: VERSION,
            kind,
            qp_num: 0,
            reason: 0,
            channel: 0,
            responder_resources: 0,
            initiator_depth: 0,
            flow_control: 0,
            retry_count: 0,
            rnr_retry_count: 0,
            srq: 0,
            port: 0,
            source_port: 0,
            v4: 0,
            source: [0; 16],
            target: [0; 16],
            private: [0; 196],
        }
    }

    pub fn as_bytes(&self) -> &[u8; SIZE] {
        // SAFETY: plain data without padding that matters.
        unsafe { &*(&raw const *self).cast() }
    }

    /// A received packet, if it is a message of ours.
    pub fn from_bytes(bytes: &[u8]) -> Option<Message> {
        if bytes.len() != SIZE {
            return None;
        }
        // SAFETY: the length fits and every bit pattern is valid.
        let m: Message = unsafe { bytes.as_ptr().cast::<Message>().read_unaligned() };
        (m.version == VERSION).then_some(m)
    }

    /// Takes private data over; false if it is too long for the message.
    ///
    /// # Safety
    /// `data` is readable for `len` bytes.
    pub unsafe fn set_private(&mut self, data: *const u8, len: usize) -> bool {
        if len > private_size(self.kind) {
            return false;
        }
        if len > 0 {
            // SAFETY: the caller's word, and it fits.
            unsafe { std::ptr::copy_nonoverlapping(data, self.private.as_mut_ptr(), len) };
        }
        true
    }

    /// The parameters as the receiving side's event reports them: what the
    /// sender offers to take is what the receiver may send.
    pub fn as_event(&self, private: *const u8) -> rdma_conn_param {
        let len = private_size(self.kind);
        rdma_conn_param {
            private_data: if len > 0 { private.cast() } else { std::ptr::null() },
            private_data_len: len as u8,
            responder_resources: self.initiator_depth,
            initiator_depth: self.responder_resources,
            flow_control: self.flow_control,
            retry_count: self.retry_count,
            rnr_retry_count: self.rnr_retry_count,
            srq: self.srq,
            qp_num: self.qp_num,
        }
    }
}
