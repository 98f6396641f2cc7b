// SPDX-License-Identifier: BSD-3-Clause
//! Minor release lines of valkey-server. The layouts that matter to a connection
//! module change between lines and never within one.

use std::fmt;

/// A supported line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// 8.0.
    V8_0,
    /// 8.1.
    V8_1,
    /// 9.1.
    V9_1,
}

/// A server's version, as `0x00MMmmpp` (`ValkeyModule_GetServerVersion`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 >> 16 & 0xff, self.0 >> 8 & 0xff, self.0 & 0xff)
    }
}

impl Line {
    /// The line that a version belongs to, if it is a supported one.
    pub fn of(version: Version) -> Option<Self> {
        match version.0 >> 8 {
            0x0800 => Some(Self::V8_0),
            0x0801 => Some(Self::V8_1),
            0x0901 => Some(Self::V9_1),
            _ => None,
        }
    }

    /// All supported lines, in words.
    pub const SUPPORTED: &'static str = "8.0, 8.1 and 9.1";

    /// Whether the server itself knows `rdma-port` and the directives beside it.
    pub fn has_directives(self) -> bool {
        self != Self::V8_0
    }

    /// Whether the server starts I/O threads by the number of descriptors that
    /// fired (8.x) and not by how busy its main thread is (9.1).
    pub fn wakes_threads_by_descriptors(self) -> bool {
        self != Self::V9_1
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V8_0 => "8.0",
            Self::V8_1 => "8.1",
            Self::V9_1 => "9.1",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_releases_belong_to_their_line_and_other_lines_to_none() {
        assert_eq!(Line::of(Version(0x0008_0001)), Some(Line::V8_0));
        assert_eq!(Line::of(Version(0x0008_01ff)), Some(Line::V8_1));
        assert_eq!(Line::of(Version(0x0009_0102)), Some(Line::V9_1));
        for other in [0x0007_0204, 0x0008_0200, 0x0009_0001, 0x0009_0200, 0x0108_0001] {
            assert_eq!(Line::of(Version(other)), None, "{}", Version(other));
        }
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(Version(0x0009_010c).to_string(), "9.1.12");
    }
}
