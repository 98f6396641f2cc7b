// SPDX-License-Identifier: BSD-3-Clause
//! Links that came to nothing: after some in a row the next is not tried over RDMA.

use crate::host::tcp_slots::Target;

/// So many links in a row that came about and ended before the replica was in sync: then the
/// data path is not to be trusted, whatever the handshake says.
pub(super) const IN_VAIN: u32 = 3;

/// Links in a row to one target that ended before they were in sync.
#[derive(Debug)]
pub(super) struct Attempts(Option<(Target, u32)>);

impl Attempts {
    /// Nothing was tried yet.
    pub(super) const fn none() -> Self {
        Self(None)
    }

    /// A link to the primary is over that did or did not get so far as to be in sync.
    pub(super) fn note(&mut self, target: Target, synchronized: bool) {
        let before = self.0.take().filter(|(other, _)| *other == target).map_or(0, |(_, n)| n);
        if !synchronized {
            self.0 = Some((target, before + 1));
        }
    }

    /// Whether the last ones to this target were in vain. If so they are forgotten: the next one
    /// does not go over RDMA, and the one after it is tried there again.
    pub(super) fn were_in_vain(&mut self, target: &Target) -> bool {
        let enough = self.0.as_ref().is_some_and(|(other, n)| other == target && *n >= IN_VAIN);
        if enough {
            self.0 = None;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::c_int;

    fn target(port: c_int) -> Target {
        Target { address: c"192.0.2.1".to_owned(), port, source: None, multipath: 0 }
    }

    #[test]
    fn after_three_links_in_vain_one_goes_elsewhere() {
        let mut attempts = Attempts::none();
        for _ in 0..2 {
            for _ in 0..IN_VAIN {
                assert!(!attempts.were_in_vain(&target(1)));
                attempts.note(target(1), false);
            }
            assert!(!attempts.were_in_vain(&target(2)), "another primary");
            assert!(attempts.were_in_vain(&target(1)));
        }
    }

    #[test]
    fn one_that_was_in_sync_or_another_primary_begins_anew() {
        let mut attempts = Attempts::none();
        for last in [(target(1), true), (target(2), false)] {
            attempts.note(target(1), false);
            attempts.note(target(1), false);
            attempts.note(last.0, last.1);
            attempts.note(target(1), false);
            assert!(!attempts.were_in_vain(&target(1)));
            attempts.note(target(1), true);
        }
    }
}
