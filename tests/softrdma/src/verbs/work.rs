// SPDX-License-Identifier: BSD-3-Clause
//! Work requests as the queues hold them, and requests as the wire carries them.

use crate::keys::Keys;
use rdma_sys::*;

/// A posted receive.
pub struct RecvWork {
    pub wr_id: u64,
    pub sges: Vec<ibv_sge>,
}

/// What a send work request asks for.
pub enum Operation {
    /// A request to the other side, with the header that will travel.
    Request(Header),
    /// Binds a memory window, on this side only.
    Bind { mw_key: u32, new_key: u32, mr_key: u32, addr: u64, length: u64, access: u32 },
    /// Invalidates a memory window's key, on this side only.
    Invalidate(u32),
}

/// A posted send.
pub struct SendWork {
    pub wr_id: u64,
    pub operation: Operation,
    pub opcode: ibv_wc_opcode::Type,
    pub signaled: bool,
    pub fence: bool,
    pub sges: Vec<ibv_sge>,
    /// Inline data: copied when posted, checked against no key.
    pub inline: Option<Box<[u8]>>,
    /// Its number among all sends posted to this queue pair, from 1.
    pub index: u64,
    /// The number of the last request that must be acknowledged before this is
    /// complete; valid once it is sent.
    pub request: u64,
}

/// The kinds of requests on the wire.
pub mod kind {
    pub const SEND: u8 = 1;
    pub const WRITE: u8 = 2;
    pub const READ: u8 = 3;
}

/// Bits of [`Header::flags`].
pub mod flag {
    pub const IMM: u8 = 1;
    pub const INVALIDATE: u8 = 2;
    pub const SOLICITED: u8 = 4;
}

/// Precedes each request's payload in the ring.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Header {
    pub kind: u8,
    pub flags: u8,
    pub reserved: u16,
    /// Immediate data in network order, or the key to invalidate.
    pub imm: u32,
    pub rkey: u32,
    pub len: u32,
    pub addr: u64,
}

pub const HEADER: usize = size_of::<Header>();

impl Header {
    /// Whether it is a WRITE that brings nothing, no immediate data either.
    pub fn is_write_of_nothing(&self) -> bool {
        self.kind == kind::WRITE && self.len == 0 && self.flags & flag::IMM == 0
    }
}

/// Negative acknowledgements, as they stand in [`crate::link::Link::nak`].
pub mod nak {
    pub const INVALID_REQUEST: u32 = 1;
    pub const ACCESS: u32 = 2;
    pub const OPERATIONAL: u32 = 3;
}

/// Walks a scatter or gather list from byte `offset` for `len` bytes, checking
/// each entry; false if a key does not allow it.
pub fn walk(
    keys: &Keys,
    pd: u64,
    sges: &[ibv_sge],
    access: u32,
    mut offset: usize,
    mut len: usize,
    mut piece: impl FnMut(*mut u8, usize),
) -> bool {
    for sge in sges {
        let size = sge.length as usize;
        if offset >= size {
            offset -= size;
            continue;
        }
        if len == 0 {
            break;
        }
        let Some(base) = keys.local(sge, pd, access) else { return false };
        let n = (size - offset).min(len);
        piece(base.wrapping_add(offset), n);
        len -= n;
        offset = 0;
    }
    true
}

/// The bytes that a list covers.
pub fn total(sges: &[ibv_sge]) -> u64 {
    sges.iter().map(|s| u64::from(s.length)).sum()
}
