// SPDX-License-Identifier: BSD-3-Clause
//! Which known kind of device one is like, by its vendor's number, else by what it does.

use verbs::device::Facts;

/// What tells one kind from another.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Bytes that a work request may carry in itself, as the device granted them.
    pub(crate) inline: Option<u32>,
    /// Whether an RDMA WRITE with immediate data was taken.
    pub(crate) immediate: Option<bool>,
    /// What becomes of a message that finds no receive.
    pub(crate) unready: Option<Unready>,
}

/// What becomes of a message that finds no receive posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unready {
    /// It is sent again after the time that was set.
    SentAgain,
    /// It is sent again, after far longer.
    SentAgainLate,
    /// The connection ends.
    Lost,
}

/// Vendors' numbers, as their kernel drivers report them (the InfiniBand OUI, or the PCI
/// vendor), and the names of rdma-core's providers.
const VENDORS: [(u32, &str); 9] = [
    (0x02c9, "mlx5"),
    (0x15b3, "mlx5"),
    (0x14e4, "bnxt"),
    (0x1414, "mana"),
    (0x1dd8, "ionic"),
    (0x1077, "qedr"),
    (0x1ded, "erdma"),
    (0x1425, "cxgb4"),
    (0x19e5, "hns"),
];

/// Intel's, whose devices have two transports.
const INTEL: u32 = 0x8086;

/// The known kind that a device is most like; `rxe`, which has no habits, where nothing tells.
pub(crate) fn of(facts: Option<&Facts>, seen: &Seen) -> &'static str {
    let Some(facts) = facts else { return "none" };
    if seen.immediate == Some(false) {
        return "iwarp";
    }
    if facts.vendor == INTEL {
        return if facts.iwarp { "irdma-iwarp" } else { "irdma" };
    }
    if let Some((_, name)) = VENDORS.iter().find(|(vendor, _)| *vendor == facts.vendor) {
        return name;
    }
    match (facts.iwarp, seen.inline, seen.unready) {
        (true, Some(96), _) => "erdma",
        (true, ..) => "irdma-iwarp",
        (_, Some(32), _) => "hns",
        (_, _, Some(Unready::SentAgainLate)) => "irdma",
        _ => "rxe",
    }
}
