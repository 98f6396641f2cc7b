// SPDX-License-Identifier: BSD-3-Clause
//! The control messages of Valkey over RDMA: 32 bytes, big-endian, sent by SEND.
//!
//! Written apart from the module's own `wire` on purpose: a mistake in one would otherwise
//! agree with itself.

/// The length of every control message.
pub const CONTROL_LEN: usize = 32;

/// Opcode of a request for the server's features.
pub const GET_SERVER_FEATURE: u16 = 0;
/// Opcode of a client's choice of features.
pub const SET_CLIENT_FEATURE: u16 = 1;
/// Opcode of a keepalive message.
pub const KEEPALIVE: u16 = 2;
/// Opcode of the announcement of a receive buffer.
pub const REGISTER_XFER_MEMORY: u16 = 3;

/// A receive buffer as announced to the other side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Where it begins, in the address space of its owner.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// The key that lets the other side write there.
    pub rkey: u32,
}

impl Window {
    /// The message that announces this window.
    pub fn announcement(&self) -> [u8; CONTROL_LEN] {
        let mut message = bare(REGISTER_XFER_MEMORY);
        message[16..24].copy_from_slice(&self.address.to_be_bytes());
        message[24..28].copy_from_slice(&self.length.to_be_bytes());
        message[28..32].copy_from_slice(&self.rkey.to_be_bytes());
        message
    }
}

/// A message with nothing but its opcode.
pub fn bare(opcode: u16) -> [u8; CONTROL_LEN] {
    let mut message = [0; CONTROL_LEN];
    message[..2].copy_from_slice(&opcode.to_be_bytes());
    message
}

/// A control message from the server, as far as this client looks into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// A new window to send into.
    Window(Window),
    /// A sign of life.
    Keepalive,
    /// Anything else, by its opcode.
    Other(u16),
}

/// Reads a message; `None` if it has not the length of one.
pub fn parse(message: &[u8]) -> Option<Control> {
    let message: &[u8; CONTROL_LEN] = message.try_into().ok()?;
    let opcode = u16::from_be_bytes([message[0], message[1]]);
    Some(match opcode {
        REGISTER_XFER_MEMORY => Control::Window(Window {
            address: u64::from_be_bytes(message[16..24].try_into().unwrap()),
            length: u32::from_be_bytes(message[24..28].try_into().unwrap()),
            rkey: u32::from_be_bytes(message[28..32].try_into().unwrap()),
        }),
        KEEPALIVE => Control::Keepalive,
        other => Control::Other(other),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_has_its_fields_where_the_protocol_puts_them() {
        let window =
            Window { address: 0x0102_0304_0506_0708, length: 0x1112_1314, rkey: 0x2122_2324 };
        let message = window.announcement();
        assert_eq!(message[..2], [0, 3]);
        assert_eq!(message[2..16], [0; 14]);
        assert_eq!(message[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(message[24..28], [0x11, 0x12, 0x13, 0x14]);
        assert_eq!(message[28..32], [0x21, 0x22, 0x23, 0x24]);
        assert_eq!(parse(&message), Some(Control::Window(window)));
    }

    #[test]
    fn other_messages_are_told_apart() {
        assert_eq!(parse(&bare(KEEPALIVE)), Some(Control::Keepalive));
        assert_eq!(parse(&bare(9)), Some(Control::Other(9)));
        assert_eq!(parse(&[0; 31]), None);
    }
}
