// SPDX-License-Identifier: BSD-3-Clause
//! What a device turned out to be able to do of what nothing tells before it is tried. It is
//! known until the device is removed: the next one, even of that name, may be another.

/// Receives that a peer finds posted, as a rule: each of its writes and messages uses one until
/// the next pass. A peer that is ahead waits, by RNR, for 0.64 ms.
pub const FEW_RECEIVES: u16 = 64;
/// Where a peer that is ahead would wait for 655 ms, or be cut off: as many as clients may have
/// writes in flight.
pub const MANY_RECEIVES: u16 = 1024;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Abilities {
    /// Whether RDMA writes with immediate data can be posted, once that is known.
    immediate: Option<bool>,
    probes: Probes,
    /// The time to wait for acknowledgements that its first connection was given, 0 for unknown.
    pub ack_timeout: u8,
    /// That time was to be another, which it refused.
    keeps_ack_timeout: bool,
    /// Receives of its next connections, once it is known how long a peer would wait.
    receives: Option<u16>,
}

/// Which RDMA writes of no bytes it carries out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Probes {
    #[default]
    All,
    /// Those with a key of the peer's.
    Keyed,
    None,
}

impl Abilities {
    /// A connection's writes were posted: so the device has immediate data.
    pub fn note_written(&mut self) {
        self.immediate.get_or_insert(true);
    }

    /// A connection's first write was refused as something that there is not. Returns whether
    /// the device is found unable to serve anybody by that.
    pub fn note_write_unsupported(&mut self) -> bool {
        let new = self.immediate.is_none();
        self.immediate.get_or_insert(false);
        new
    }

    /// Whether a peer that finds no receive posted tries again soon. Returns whether it is news
    /// that it does not.
    pub fn note_rnr_timer(&mut self, shortly: bool) -> bool {
        let new = self.receives.is_none();
        self.receives.get_or_insert(if shortly { FEW_RECEIVES } else { MANY_RECEIVES });
        new && !shortly
    }

    /// Whether it is known how many receives a connection should have.
    pub fn knows_receives(&self) -> bool {
        self.receives.is_some()
    }

    /// Receives that the next connection is to have.
    pub fn receives(&self) -> u16 {
        self.receives.unwrap_or(FEW_RECEIVES)
    }

    /// The time to wait for acknowledgements can't be set. Returns whether that is news.
    pub fn note_ack_timeout_unsupported(&mut self) -> bool {
        !std::mem::replace(&mut self.keeps_ack_timeout, true)
    }

    /// A probe was not carried out, with a key of the peer's or without. Returns whether that is
    /// news.
    pub fn note_probe_failed(&mut self, keyed: bool) -> bool {
        let before = self.probes;
        if keyed {
            self.probes = Probes::None;
        } else if before == Probes::All {
            self.probes = Probes::Keyed;
        }
        self.probes != before
    }

    /// Whether it carries out probes with a key of the peer's, or without, as far as is known.
    pub fn carries_probes(&self, keyed: bool) -> bool {
        match self.probes {
            Probes::All => true,
            Probes::Keyed => keyed,
            Probes::None => false,
        }
    }

    /// Whether a connection can be served, as far as is known.
    pub fn can_serve(&self) -> bool {
        self.immediate != Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_written_is_not_called_unable() {
        let mut able = Abilities::default();
        able.note_written();
        assert!(!able.note_write_unsupported() && able.can_serve());
        let mut unable = Abilities::default();
        assert!(unable.can_serve(), "as far as is known");
        assert!(unable.note_write_unsupported() && !unable.can_serve());
        assert!(!unable.note_write_unsupported(), "it is said once");
        unable.note_written();
        assert!(!unable.can_serve());
    }

    #[test]
    fn receives_follow_from_the_first_that_is_known_of_the_timer() {
        let mut short = Abilities::default();
        assert!(!short.knows_receives());
        assert!(!short.note_rnr_timer(true) && !short.note_rnr_timer(false));
        assert_eq!(short.receives(), FEW_RECEIVES);
        let mut long = Abilities::default();
        assert_eq!(long.receives(), FEW_RECEIVES, "until it is known");
        assert!(long.note_rnr_timer(false) && !long.note_rnr_timer(false), "it is said once");
        assert_eq!(long.receives(), MANY_RECEIVES);
    }

    #[test]
    fn probes_that_fail_are_not_tried_again() {
        let mut device = Abilities::default();
        assert!(device.carries_probes(false));
        assert!(
            device.note_probe_failed(false) && !device.note_probe_failed(false),
            "it is said once"
        );
        assert!(device.carries_probes(true) && !device.carries_probes(false));
        assert!(device.note_probe_failed(true) && !device.note_probe_failed(false));
        assert!(!device.carries_probes(true) && !device.carries_probes(false));
    }
}
