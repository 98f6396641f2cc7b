// SPDX-License-Identifier: BSD-3-Clause
//! Values whose every byte is known from a seed and a length, for checks of exactness.
//!
//! The stream never repeats within a value, so that a block that arrives twice, at another
//! place or out of an older transfer is told from the right one.

/// The value of `length` bytes that belongs to `seed`.
pub fn value(seed: u64, length: usize) -> Vec<u8> {
    // An odd increment walks through all 2^64 states; the mixing is that of SplitMix64.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ length as u64;
    let mut bytes = Vec::with_capacity(length.next_multiple_of(8));
    while bytes.len() < length {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_their_length_and_differ_by_seed() {
        for length in [0, 1, 7, 8, 9, 4096] {
            assert_eq!(value(1, length).len(), length);
        }
        assert_ne!(value(1, 64), value(2, 64));
        assert_eq!(value(3, 64), value(3, 64));
    }
}
