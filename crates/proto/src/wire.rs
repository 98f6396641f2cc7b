// SPDX-License-Identifier: BSD-3-Clause
//! The control messages of Valkey over RDMA, as types.
//!
//! Every control message is 32 bytes, big-endian, and travels in one SEND. The
//! payload itself never appears here: it is written into the other side's
//! window by RDMA WRITE and counted by an immediate. The format is the one of
//! the Valkey documentation's topic "RDMA". This file does no I/O.

use std::fmt;

/// Length of every control message in bytes.
pub const MESSAGE_LEN: usize = 32;

/// The buffer that one side opens for the other's RDMA writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Virtual address on the announcing side.
    pub address: u64,
    /// Length in bytes; 0 is legal and means "no room".
    pub length: u32,
    /// Remote key that covers the buffer.
    pub rkey: u32,
}

/// One control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Question for, or answer with, the server's feature bits.
    GetServerFeature {
        /// Which 64 of the feature bits.
        select: u16,
        /// The bits: 0 in a question.
        features: u64,
    },
    /// The feature bits that a client wants switched on.
    SetClientFeature {
        /// Which 64 of the feature bits.
        select: u16,
        /// The bits.
        features: u64,
    },
    /// Sign of life; answered by nothing.
    Keepalive,
    /// A new receive buffer of the sender: its peer may write there from now on.
    RegisterXferMemory(Memory),
}

/// Why 32 bytes, or fewer, or more, are no control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// A SEND of another length than [`MESSAGE_LEN`].
    Length(usize),
    /// An operation code that the protocol does not define.
    Opcode(u16),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => write!(f, "control message of {n} bytes instead of {MESSAGE_LEN}"),
            Self::Opcode(op) => write!(f, "control message with unknown opcode {op}"),
        }
    }
}

impl std::error::Error for DecodeError {}

const GET_SERVER_FEATURE: u16 = 0;
const SET_CLIENT_FEATURE: u16 = 1;
const KEEPALIVE: u16 = 2;
const REGISTER_XFER_MEMORY: u16 = 3;

impl Message {
    /// The message as it stands on the wire.
    pub fn encode(&self) -> [u8; MESSAGE_LEN] {
        let mut out = [0; MESSAGE_LEN];
        match *self {
            Self::GetServerFeature { select, features } => {
                put_feature(&mut out, GET_SERVER_FEATURE, select, features);
            }
            Self::SetClientFeature { select, features } => {
                put_feature(&mut out, SET_CLIENT_FEATURE, select, features);
            }
            Self::Keepalive => out[..2].copy_from_slice(&KEEPALIVE.to_be_bytes()),
            Self::RegisterXferMemory(m) => {
                out[..2].copy_from_slice(&REGISTER_XFER_MEMORY.to_be_bytes());
                out[16..24].copy_from_slice(&m.address.to_be_bytes());
                out[24..28].copy_from_slice(&m.length.to_be_bytes());
                out[28..].copy_from_slice(&m.rkey.to_be_bytes());
            }
        }
        out
    }

    /// Reads a message from the bytes of one SEND.
    ///
    /// # Errors
    /// [`DecodeError`] if the length or the operation code is not the protocol's.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bytes: &[u8; MESSAGE_LEN] =
            bytes.try_into().map_err(|_| DecodeError::Length(bytes.len()))?;
        let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| (u32::from(u16_at(at)) << 16) | u32::from(u16_at(at + 2));
        let u64_at = |at: usize| (u64::from(u32_at(at)) << 32) | u64::from(u32_at(at + 4));
        match u16_at(0) {
            GET_SERVER_FEATURE => {
                Ok(Self::GetServerFeature { select: u16_at(2), features: u64_at(24) })
            }
            SET_CLIENT_FEATURE => {
                Ok(Self::SetClientFeature { select: u16_at(2), features: u64_at(24) })
            }
            KEEPALIVE => Ok(Self::Keepalive),
            REGISTER_XFER_MEMORY => Ok(Self::RegisterXferMemory(Memory {
                address: u64_at(16),
                length: u32_at(24),
                rkey: u32_at(28),
            })),
            other => Err(DecodeError::Opcode(other)),
        }
    }
}

fn put_feature(out: &mut [u8; MESSAGE_LEN], opcode: u16, select: u16, features: u64) {
    out[..2].copy_from_slice(&opcode.to_be_bytes());
    out[2..4].copy_from_slice(&select.to_be_bytes());
    out[24..].copy_from_slice(&features.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_stands_at_the_documented_offsets() {
        let bytes = Message::RegisterXferMemory(Memory {
            address: 0x0102_0304_0506_0708,
            length: 0x1112_1314,
            rkey: 0x2122_2324,
        })
        .encode();
        assert_eq!(bytes[..2], [0, 3]);
        assert_eq!(bytes[2..16], [0; 14]);
        assert_eq!(bytes[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[24..28], [0x11, 0x12, 0x13, 0x14]);
        assert_eq!(bytes[28..], [0x21, 0x22, 0x23, 0x24]);
    }

    #[test]
    fn every_message_survives_the_round_trip() {
        let memory = Memory { address: u64::MAX - 1, length: u32::MAX, rkey: 7 };
        for message in [
            Message::GetServerFeature { select: 9, features: 1 << 63 },
            Message::SetClientFeature { select: u16::MAX, features: 5 },
            Message::Keepalive,
            Message::RegisterXferMemory(memory),
        ] {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn wrong_lengths_and_opcodes_are_named() {
        assert_eq!(Message::decode(&[0; 31]), Err(DecodeError::Length(31)));
        assert_eq!(Message::decode(&[0; 33]), Err(DecodeError::Length(33)));
        assert_eq!(Message::decode(&[]), Err(DecodeError::Length(0)));
        let mut bytes = [0; MESSAGE_LEN];
        bytes[1] = 4;
        assert_eq!(Message::decode(&bytes), Err(DecodeError::Opcode(4)));
    }
}
