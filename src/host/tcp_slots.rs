// SPDX-License-Identifier: BSD-3-Clause
//! The two slots of the server's TCP type by which it opens connections, and their replacement.
//!
//! The server makes a connection to another one by `conn_create` and `connect` of the live
//! table, which lies in writable memory. Nothing else of the server is ever changed, and these
//! two only where replication over RDMA is asked for.

use super::connection::{Connection, Handler};
use super::layout::{Connect, ConnectMultipath, Create};
use super::line::Line;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr;

/// What a connection is to be opened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Name or address.
    pub address: CString,
    /// The port.
    pub port: c_int,
    /// The address to come from.
    pub source: Option<CString>,
    /// Whether by multipath TCP.
    pub multipath: c_int,
}

/// What stands in the two slots instead. A line has one of the two `connect`s.
#[derive(Clone, Copy, Debug)]
pub struct Replacement {
    /// `conn_create`.
    pub create: Create,
    /// `connect`, up to 8.1.
    pub connect: Connect,
    /// `connect`, from 9.0 on.
    pub connect_multipath: ConnectMultipath,
}

/// The server's own `connect`.
#[derive(Clone, Copy, Debug)]
enum Original {
    Plain(Connect),
    Multipath(ConnectMultipath),
}

/// The two slots, as the server has them.
#[derive(Clone, Copy, Debug)]
pub struct TcpSlots {
    table: *mut c_void,
    create: *mut Create,
    connect: *mut c_void,
    original: Original,
}

// SAFETY: addresses of the server's that stay as they are.
unsafe impl Send for TcpSlots {}
// SAFETY: as above.
unsafe impl Sync for TcpSlots {}

impl TcpSlots {
    /// Finds the slots in a table of the line.
    ///
    /// # Safety
    /// `table` is the server's TCP table, which has passed its fingerprint: both slots have
    /// functions of the server.
    pub unsafe fn find(line: Line, table: *const c_void) -> Self {
        let at = |name| {
            let member = line.head().iter().find(|(member, _)| *member == name);
            let (_, offset) = member.expect("a member of every line");
            table.cast_mut().wrapping_byte_add(*offset)
        };
        let connect = at("connect");
        // SAFETY: by the caller's promise; the type is the line's.
        let original = unsafe {
            match line {
                Line::V8_0 | Line::V8_1 => Original::Plain(connect.cast::<Connect>().read()),
                Line::V9_0 | Line::V9_1 => {
                    Original::Multipath(connect.cast::<ConnectMultipath>().read())
                }
            }
        };
        Self { table: table.cast_mut(), create: at("conn_create").cast(), connect, original }
    }

    /// Whether both slots can be written to.
    pub fn are_writable(&self) -> bool {
        let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return false };
        [self.create.addr(), self.connect.addr()].iter().all(|slot| is_writable(&maps, *slot))
    }

    /// Puts other functions into the slots.
    ///
    /// # Safety
    /// They [are writable](Self::are_writable); main thread, and no other one looks at them.
    pub unsafe fn replace(&self, with: Replacement) {
        // SAFETY: by the caller's promise.
        unsafe {
            match self.original {
                Original::Plain(_) => self.connect.cast::<Connect>().write(with.connect),
                Original::Multipath(_) => {
                    self.connect.cast::<ConnectMultipath>().write(with.connect_multipath);
                }
            }
            self.create.write(with.create);
        }
    }

    /// The TCP type.
    pub fn kind(&self) -> *const c_void {
        self.table
    }

    /// The server's own `connect`.
    ///
    /// # Safety
    /// As the server calls it: a live connection that is new, or of the TLS type.
    pub unsafe fn connect(
        &self,
        connection: *mut Connection,
        target: &Target,
        handler: Option<Handler>,
    ) -> c_int {
        let address: *const c_char = target.address.as_ptr();
        let source = target.source.as_ref().map_or(ptr::null(), |source| source.as_ptr());
        // SAFETY: by the caller's promise; C strings, which the server copies if need be.
        unsafe {
            match self.original {
                Original::Plain(connect) => {
                    connect(connection, address, target.port, source, handler)
                }
                Original::Multipath(connect) => {
                    connect(connection, address, target.port, source, target.multipath, handler)
                }
            }
        }
    }
}

/// Whether the eight bytes at an address are writable, by the text of `/proc/self/maps`.
fn is_writable(maps: &str, address: usize) -> bool {
    maps.lines().any(|line| {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { return false };
        let ends = range.split_once('-').and_then(|(start, end)| {
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?))
        });
        ends.is_some_and(|(start, end)| start <= address && address + 8 <= end)
            && rights.as_bytes().get(1) == Some(&b'w')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_writable_or_not() {
        const MAPS: &str = "\
            55d0a0000000-55d0a0010000 r-xp 00000000 08:01 1 /usr/bin/valkey-server\n\
            55d0a0010000-55d0a0012000 r--p 00010000 08:01 1 /usr/bin/valkey-server\n\
            55d0a0012000-55d0a0014000 rw-p 00012000 08:01 1 /usr/bin/valkey-server\n";
        assert!(is_writable(MAPS, 0x55d0_a001_2000) && is_writable(MAPS, 0x55d0_a001_3ff8));
        assert!(!is_writable(MAPS, 0x55d0_a001_1ff8) && !is_writable(MAPS, 0x55d0_a000_0000));
        assert!(!is_writable(MAPS, 0x55d0_a001_3ffc) && !is_writable("", 0x1000));
    }

    #[test]
    fn own_memory_is_as_it_is() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let variable = 0_u64;
        assert!(is_writable(&maps, (&raw const variable).addr()));
        assert!(!is_writable(&maps, own_memory_is_as_it_is as *const () as usize));
    }
}
