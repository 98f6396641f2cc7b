// SPDX-License-Identifier: BSD-3-Clause
//! Which releases of valkey-server are supported, as data: the minor lines, by which a
//! server behaves, and the layouts, by which its structures lie. A layout may change
//! within a line.

use std::fmt;

/// A supported minor line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// 8.0.
    V8_0,
    /// 8.1.
    V8_1,
    /// 9.0.
    V9_0,
    /// 9.1.
    V9_1,
}

/// How the structures lie, named for the first release that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// From 8.0.0 on.
    V8_0_0,
    /// From 8.1.0 on.
    V8_1_0,
    /// From 9.0.0 on.
    V9_0_0,
    /// 9.1.0 and 9.1.1.
    V9_1_0,
    /// From 9.1.2 on.
    V9_1_2,
}

/// A server's version, as `0x00MMmmpp` (`ValkeyModule_GetServerVersion`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 >> 16 & 0xff, self.0 >> 8 & 0xff, self.0 & 0xff)
    }
}

/// The known releases: a line, its patch releases from the first to the last, and what they
/// have. `tests/abi/releases.tsv` says of each how that is known.
const KNOWN: [(Line, u8, u8, Layout); 5] = [
    (Line::V8_0, 0, 9, Layout::V8_0_0),
    (Line::V8_1, 0, 8, Layout::V8_1_0),
    (Line::V9_0, 0, 4, Layout::V9_0_0),
    (Line::V9_1, 0, 1, Layout::V9_1_0),
    (Line::V9_1, 2, 2, Layout::V9_1_2),
];

impl Line {
    /// All supported lines.
    pub const ALL: [Self; 4] = [Self::V8_0, Self::V8_1, Self::V9_0, Self::V9_1];

    /// The same, in words.
    pub const SUPPORTED: &'static str = "8.0, 8.1, 9.0 and 9.1";

    /// The line that a version belongs to, if it is a supported one.
    pub fn of(version: Version) -> Option<Self> {
        Self::ALL.into_iter().find(|line| line.number() == version.0 >> 8)
    }

    /// Major and minor number, as a version has them.
    fn number(self) -> u32 {
        match self {
            Self::V8_0 => 0x0800,
            Self::V8_1 => 0x0801,
            Self::V9_0 => 0x0900,
            Self::V9_1 => 0x0901,
        }
    }

    /// The last known release of this line.
    pub fn last_known(self) -> Version {
        let own = KNOWN.iter().filter(|(line, ..)| *line == self);
        let last = own.map(|(.., last, _)| *last).max().unwrap_or(0);
        Version(self.number() << 8 | u32::from(last))
    }

    /// The layouts that a release of this line may have.
    pub fn layouts(self) -> Vec<Layout> {
        let own = KNOWN.iter().filter(|(line, ..)| *line == self).map(|(.., layout)| *layout);
        // What 9.1.2 changed was meant for later releases of 9.0 as well.
        let next = (self == Self::V9_0).then_some(Layout::V9_1_2);
        own.chain(next).collect()
    }

    /// Whether the server itself knows `rdma-port` and the directives beside it.
    pub fn has_directives(self) -> bool {
        self != Self::V8_0
    }

    /// Whether connection types go by number (9.x) and not by name (8.x).
    pub fn numbers_types(self) -> bool {
        matches!(self, Self::V9_0 | Self::V9_1)
    }

    /// Whether the server starts I/O threads by the number of descriptors that
    /// fired and not by how busy its main thread is (9.1).
    pub fn wakes_threads_by_descriptors(self) -> bool {
        self != Self::V9_1
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.number();
        write!(f, "{}.{}", number >> 8, number & 0xff)
    }
}

impl Layout {
    /// The layout of a known release.
    pub fn of(version: Version) -> Option<Self> {
        let line = Line::of(version)?;
        let patch = (version.0 & 0xff) as u8;
        let found =
            KNOWN.iter().find(|(l, from, to, _)| *l == line && (*from..=*to).contains(&patch));
        found.map(|(.., layout)| *layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_releases_belong_to_their_line_and_other_lines_to_none() {
        assert_eq!(Line::of(Version(0x0008_0001)), Some(Line::V8_0));
        assert_eq!(Line::of(Version(0x0008_01ff)), Some(Line::V8_1));
        assert_eq!(Line::of(Version(0x0009_0004)), Some(Line::V9_0));
        assert_eq!(Line::of(Version(0x0009_0102)), Some(Line::V9_1));
        for other in [0x0007_0204, 0x0008_0200, 0x0009_0200, 0x000a_0000, 0x0108_0001] {
            assert_eq!(Line::of(Version(other)), None, "{}", Version(other));
        }
    }

    #[test]
    fn the_supported_lines_are_named() {
        let names = Line::ALL.map(|line| line.to_string());
        assert_eq!(names.join(", ").replace(", 9.1", " and 9.1"), Line::SUPPORTED);
    }

    #[test]
    fn a_line_ends_with_its_last_known_release() {
        for (line, last) in Line::ALL.into_iter().zip(["8.0.9", "8.1.8", "9.0.4", "9.1.2"]) {
            assert_eq!(line.last_known().to_string(), last);
            assert!(Layout::of(line.last_known()).is_some());
            assert_eq!(Layout::of(Version(line.last_known().0 + 1)), None);
        }
    }

    /// Each row of `tests/abi/releases.tsv`, and no release beside them.
    #[test]
    fn each_release_has_the_layout_that_was_found() {
        let mut rows = 0;
        for row in include_str!("../../tests/abi/releases.tsv").lines() {
            if row.starts_with('#') {
                continue;
            }
            let words: Vec<_> = row.split('\t').collect();
            let [release, layout, source] = words[..] else { panic!("'{row}' has three words") };
            assert!(["headers", "binary", "neighbours"].contains(&source), "{row}");
            let numbers: Vec<u32> = release.split('.').map(|n| n.parse().unwrap()).collect();
            let [major, minor, patch] = numbers[..] else { panic!("{release} has three numbers") };
            let version = Version(major << 16 | minor << 8 | patch);
            let found = Layout::of(version).unwrap_or_else(|| panic!("{release} is not known"));
            assert_eq!(found.name(), layout, "{release}");
            rows += 1;
        }
        let known: usize = KNOWN.iter().map(|(_, from, to, _)| usize::from(to - from) + 1).sum();
        assert_eq!(rows, known);
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(Version(0x0009_010c).to_string(), "9.1.12");
    }
}
