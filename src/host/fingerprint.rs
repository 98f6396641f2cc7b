// SPDX-License-Identifier: BSD-3-Clause
//! Whether the running server has the shape that its version promises.
//!
//! The live table of the TCP connection type is what we can look at without
//! knowing a private offset. Which of its members are null is characteristic of
//! the line, and the others must point into the executable's own code. A server
//! whose table is shifted, shorter or patched fails here and is refused. What the
//! table can't show (`ClientFlags`, `connListener`) is tied to the line, and
//! `scripts/abi-check.sh` compares it for each new release.

use super::layout::{ConnectionType80, ConnectionType81, ConnectionType91};
use super::line::Line;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ops::Range;

/// Members of the TCP type that are null in every supported line.
const NULL_MEMBERS: &[&str] = &[
    "init",
    "cleanup",
    "configure",
    "has_pending_data",
    "process_pending_data",
    "postpone_update_state",
    "update_state",
    "sync_handlers_in_update_state",
    "get_peer_cert",
    "get_peer_user",
    "connIntegrityChecked",
];

/// A member that is not what the line has there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The member's name in the server's headers.
    pub member: &'static str,
    /// What was found, as an address.
    pub found: usize,
    /// Whether it should have been null.
    pub expected_null: bool,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected = if self.expected_null { "null" } else { "a function of the server" };
        write!(
            f,
            "`{}` of its TCP connection type is {:#x} instead of {expected}",
            self.member, self.found
        )
    }
}

/// Compares a TCP table, given as its machine words, with that of `line`.
///
/// # Errors
/// The first member that differs.
pub fn check(line: Line, words: &[usize], code: &[Range<usize>]) -> Result<(), Mismatch> {
    let (_, _, members) = table_abi(line);
    for &(member, offset) in members {
        let found = words.get(offset / size_of::<usize>()).copied().unwrap_or(0);
        let expected_null = NULL_MEMBERS.contains(&member);
        let fits = if expected_null {
            found == 0
        } else {
            code.iter().any(|range| range.contains(&found))
        };
        if !fits {
            return Err(Mismatch { member, found, expected_null });
        }
    }
    Ok(())
}

fn table_abi(line: Line) -> (&'static str, usize, &'static [(&'static str, usize)]) {
    match line {
        Line::V8_0 => ConnectionType80::ABI,
        Line::V8_1 => ConnectionType81::ABI,
        Line::V9_1 => ConnectionType91::ABI,
    }
}

/// Reads the live table of the TCP type and compares it.
///
/// # Errors
/// The first member that differs.
///
/// # Safety
/// `table` points to the server's TCP table.
pub unsafe fn check_live(line: Line, table: *const c_void) -> Result<(), Mismatch> {
    let words = table_abi(line).1 / size_of::<usize>();
    // SAFETY: every line's table is in the executable's data, far from its end; a
    // shorter one than expected would be followed by other data of the server.
    let words = unsafe { std::slice::from_raw_parts(table.cast::<usize>(), words) };
    check(line, words, &executable_code())
}

/// Address ranges of the main executable's code.
fn executable_code() -> Vec<Range<usize>> {
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        out: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid entry; `out` is the vector below. The
        // first entry is the main program (dl_iterate_phdr(3)), so stop after it.
        unsafe {
            let info = &*info;
            let out = &mut *out.cast::<Vec<Range<usize>>>();
            for i in 0..usize::from(info.dlpi_phnum) {
                let header = &*info.dlpi_phdr.add(i);
                if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0 {
                    let start = (info.dlpi_addr + header.p_vaddr) as usize;
                    out.push(start..start + header.p_memsz as usize);
                }
            }
        }
        1
    }
    let mut ranges = Vec::new();
    // SAFETY: the callback keeps to the contract and `ranges` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut ranges).cast()) };
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: [Range<usize>; 2] = [0x1000..0x2000, 0x3000..0x3001];

    /// A table as `line`'s server has it.
    fn genuine(line: Line) -> Vec<usize> {
        let (_, size, members) = table_abi(line);
        let mut words = vec![0; size / 8];
        for (member, offset) in members {
            if !NULL_MEMBERS.contains(member) {
                words[offset / 8] = 0x1000 + offset;
            }
        }
        words
    }

    #[test]
    fn the_lines_own_table_is_accepted() {
        for line in [Line::V8_0, Line::V8_1, Line::V9_1] {
            assert_eq!(check(line, &genuine(line), &CODE), Ok(()));
        }
    }

    #[test]
    fn another_lines_table_is_refused() {
        for line in [Line::V8_0, Line::V8_1, Line::V9_1] {
            for other in [Line::V8_0, Line::V8_1, Line::V9_1] {
                if line != other {
                    let mut words = genuine(other);
                    words.resize(40, 0);
                    // 9.1's table differs from 8.1's in nothing that TCP fills in:
                    // there the version alone decides.
                    let same = matches!(
                        (line, other),
                        (Line::V8_1, Line::V9_1) | (Line::V9_1, Line::V8_1)
                    );
                    assert_eq!(check(line, &words, &CODE).is_ok(), same, "{line} {other}");
                }
            }
        }
    }

    #[test]
    fn a_shifted_or_nulled_or_foreign_member_is_named() {
        for line in [Line::V8_0, Line::V8_1, Line::V9_1] {
            let (_, _, members) = table_abi(line);
            for &(member, offset) in members {
                let mut words = genuine(line);
                let expected_null = NULL_MEMBERS.contains(&member);
                words[offset / 8] = if expected_null { 0x1234 } else { 0 };
                let found = words[offset / 8];
                assert_eq!(
                    check(line, &words, &CODE),
                    Err(Mismatch { member, found, expected_null })
                );
                if !expected_null {
                    words[offset / 8] = 0x9000;
                    assert_eq!(check(line, &words, &CODE).unwrap_err().found, 0x9000);
                }
            }
            let mut shifted = genuine(line);
            shifted.insert(9, 0x1111);
            assert!(check(line, &shifted, &CODE).is_err());
            shifted = genuine(line);
            shifted.remove(9);
            shifted.push(0);
            assert!(check(line, &shifted, &CODE).is_err());
        }
    }

    #[test]
    fn this_process_has_code() {
        let here = this_process_has_code as *const () as usize;
        assert!(executable_code().iter().any(|range| range.contains(&here)));
    }
}
