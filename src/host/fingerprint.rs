// SPDX-License-Identifier: BSD-3-Clause
//! Whether the running server has the shape that its version promises.
//!
//! The live table of the TCP connection type is what we can look at without
//! knowing a private offset. Which of its members are null is characteristic of
//! the line, and the others must point into the executable's own code. A server
//! whose table is shifted, shorter or patched fails here and is refused. Nothing is
//! read beyond the smallest table that the line has. The tail, where the layouts of a line
//! differ, is null for TCP; where TLS is built in, the table of that type shows it.
//! What no table can show is what [`probe`](super::probe) is for.

use super::layout::SYNC_HANDLERS;
use super::line::{Layout, Line};
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ops::Range;

/// Members of the head that are null in the TCP type of every supported line.
const NULL_MEMBERS: &[&str] = &[
    "init",
    "cleanup",
    "configure",
    "has_pending_data",
    "process_pending_data",
    "postpone_update_state",
    "update_state",
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

/// Compares a TCP table, given as its machine words, with those of `line`.
///
/// # Errors
/// The first member that differs.
pub fn check(line: Line, words: &[usize], code: &[Range<usize>]) -> Result<(), Mismatch> {
    for (member, offset) in members(line) {
        let found = words.get(offset / size_of::<usize>()).copied().unwrap_or(0);
        let expected_null = is_null(line, member);
        let fits = if expected_null { found == 0 } else { within(code, found) };
        if !fits {
            return Err(Mismatch { member, found, expected_null });
        }
    }
    Ok(())
}

/// The layout among `candidates` that a TLS table has. All functions of its tail are there.
pub fn tail(candidates: &[Layout], words: &[usize], code: &[Range<usize>]) -> Option<Layout> {
    let fits = |layout: &Layout| {
        layout.tail().iter().all(|&(member, offset)| {
            // What lies beyond the smallest table was not read.
            words.get(offset / size_of::<usize>()).is_none_or(|&found| match member {
                // An int, which is 0 or 1, and padding.
                SYNC_HANDLERS => found as u32 <= 1,
                _ => within(code, found),
            })
        })
    };
    candidates.iter().copied().find(fits)
}

fn within(ranges: &[Range<usize>], address: usize) -> bool {
    ranges.iter().any(|range| range.contains(&address))
}

/// The members that every server of the line has: the head, and the smallest tail.
fn members(line: Line) -> impl Iterator<Item = (&'static str, usize)> {
    let smallest = line.layouts().into_iter().min_by_key(|layout| layout.size());
    let tail = smallest.map_or(&[][..], Layout::tail);
    line.head().iter().chain(tail).copied()
}

/// Whether a member of [`members`] is null in the TCP type.
fn is_null(line: Line, member: &str) -> bool {
    NULL_MEMBERS.contains(&member) || !line.head().iter().any(|(name, _)| *name == member)
}

/// Reads the live table of the TCP type and compares it.
///
/// # Errors
/// The first member that differs.
///
/// # Safety
/// `table` points to the server's TCP table.
pub unsafe fn check_live(line: Line, table: *const c_void) -> Result<(), Mismatch> {
    // SAFETY: by the caller's promise.
    check(line, unsafe { words(line, table) }, &executable(libc::PF_X))
}

/// Reads the live table of the TLS type: the layout among `candidates` that it has.
///
/// # Safety
/// `table` points to the server's TLS table.
pub unsafe fn tail_live(line: Line, candidates: &[Layout], table: *const c_void) -> Option<Layout> {
    // SAFETY: by the caller's promise.
    tail(candidates, unsafe { words(line, table) }, &executable(libc::PF_X))
}

/// # Safety
/// `table` points to a table of the server.
unsafe fn words<'a>(line: Line, table: *const c_void) -> &'a [usize] {
    let count = line.least_size() / size_of::<usize>();
    // SAFETY: by the caller's promise; no table of the line is smaller, and they are constants.
    unsafe { std::slice::from_raw_parts(table.cast::<usize>(), count) }
}

/// Address ranges of the main executable that have all of `flags`, such as `PF_X` for its code.
pub fn executable(flags: u32) -> Vec<Range<usize>> {
    struct Search {
        flags: u32,
        found: Vec<Range<usize>>,
    }
    unsafe extern "C" fn collect(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        out: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid entry; `out` is the search below. The
        // first entry is the main program (dl_iterate_phdr(3)), so stop after it.
        unsafe {
            let info = &*info;
            let search = &mut *out.cast::<Search>();
            for i in 0..usize::from(info.dlpi_phnum) {
                let header = &*info.dlpi_phdr.add(i);
                if header.p_type == libc::PT_LOAD && header.p_flags & search.flags == search.flags {
                    let start = (info.dlpi_addr + header.p_vaddr) as usize;
                    search.found.push(start..start + header.p_memsz as usize);
                }
            }
        }
        1
    }
    let mut search = Search { flags, found: Vec::new() };
    // SAFETY: the callback keeps to the contract and `search` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut search).cast()) };
    search.found
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: [Range<usize>; 2] = [0x1000..0x2000, 0x3000..0x3001];

    /// A TCP table as `line`'s server has it.
    fn genuine(line: Line) -> Vec<usize> {
        let mut words = vec![0; line.least_size() / 8];
        for (member, offset) in line.head() {
            if !NULL_MEMBERS.contains(member) {
                words[offset / 8] = 0x1000 + offset;
            }
        }
        words
    }

    /// A TLS table of `layout`, without what is beyond the line's smallest.
    fn tls(line: Line, layout: Layout) -> Vec<usize> {
        let mut words = vec![0x1800; 64];
        for (member, offset) in layout.tail() {
            words[offset / 8] = if *member == SYNC_HANDLERS { 0 } else { 0x1000 + offset };
        }
        words.truncate(line.least_size() / 8);
        words
    }

    #[test]
    fn the_lines_own_table_is_accepted() {
        for line in Line::ALL {
            assert_eq!(check(line, &genuine(line), &CODE), Ok(()));
        }
    }

    #[test]
    fn another_lines_table_is_refused() {
        for line in Line::ALL {
            for other in Line::ALL {
                if line != other {
                    let mut words = genuine(other);
                    words.resize(40, 0);
                    // From 8.1 on nothing that TCP fills in has moved: there the probes decide.
                    let same = line != Line::V8_0 && other != Line::V8_0;
                    assert_eq!(check(line, &words, &CODE).is_ok(), same, "{line} {other}");
                }
            }
        }
    }

    #[test]
    fn a_tls_table_shows_its_layout() {
        for line in Line::ALL {
            for layout in line.layouts() {
                let words = tls(line, layout);
                let found = tail(&line.layouts(), &words, &CODE);
                assert_eq!(found, Some(layout), "{line}");
                for other in line.layouts() {
                    let fits = tail(&[other], &words, &CODE) == Some(other);
                    assert_eq!(fits, other == layout, "{} {}", layout.name(), other.name());
                }
                let foreign = vec![0x9000; words.len()];
                assert_eq!(tail(&line.layouts(), &foreign, &CODE), None, "{line}");
            }
        }
    }

    #[test]
    fn a_shifted_or_nulled_or_foreign_member_is_named() {
        for line in Line::ALL {
            for (member, offset) in members(line) {
                let mut words = genuine(line);
                let expected_null = is_null(line, member);
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
        assert!(within(&executable(libc::PF_X), here));
    }
}
