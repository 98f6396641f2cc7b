// SPDX-License-Identifier: BSD-3-Clause
//! Any bytes as a control message: what decodes says the same when it is encoded
//! again, and nothing but length and operation code is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use valkey_rdma_proto::wire::{DecodeError, MESSAGE_LEN, Message};

fuzz_target!(|bytes: &[u8]| {
    match Message::decode(bytes) {
        Ok(message) => {
            assert_eq!(bytes.len(), MESSAGE_LEN);
            let encoded = message.encode();
            assert_eq!(Message::decode(&encoded), Ok(message));
            assert_eq!(encoded[..2], bytes[..2]);
        }
        Err(DecodeError::Length(length)) => {
            assert_eq!(length, bytes.len());
            assert_ne!(length, MESSAGE_LEN);
        }
        Err(DecodeError::Opcode(opcode)) => assert!(opcode > 3),
    }
});
