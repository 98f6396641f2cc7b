// SPDX-License-Identifier: BSD-3-Clause
//! `ConnectionType` and `connListener`, as the servers' headers declare them. Sizes
//! and offsets are asserted at compile time here, and a test holds them against
//! `tests/abi/*.txt`, which `scripts/abi-check.sh` takes from those headers.
//!
//! A table's *head* is what this module fills in: up to `update_state`. There are three
//! heads. What follows, the *tail*, differs from layout to layout, and every member of it
//! may be null. So our own tables end in zeros, more of them than any server looks at,
//! and one table serves all layouts with the same head.

use super::connection::{Connection, Handler};
use super::line::{Layout, Line};
use libc::{iovec, ssize_t};
use std::ffi::{c_char, c_int, c_longlong, c_void};
use std::mem::{offset_of, size_of};

/// The server's event loop; only ever passed on.
#[repr(C)]
pub struct EventLoop {
    _opaque: [u8; 0],
}

/// `CONFIG_BINDADDR_MAX`: descriptors of one listener.
pub const MAX_BINDS: usize = 16;

/// An entry that does something with a connection.
pub type Action = unsafe extern "C" fn(*mut Connection);
/// An entry without arguments.
pub type Nothing = unsafe extern "C" fn();
/// `configure`: the type's settings, and whether it is a change of them.
pub type Configure = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;
/// `ae_handler`, `accept_handler`: a descriptor of the event loop fired.
pub type FileHandler = unsafe extern "C" fn(*mut EventLoop, c_int, *mut c_void, c_int);
/// `addr`: the address of either side, as text.
pub type Addr =
    unsafe extern "C" fn(*mut Connection, *mut c_char, usize, *mut c_int, c_int) -> c_int;
/// An entry that answers with a number about a connection.
pub type Ask = unsafe extern "C" fn(*mut Connection) -> c_int;
/// `listen`.
pub type Listen<L> = unsafe extern "C" fn(*mut L) -> c_int;
/// `closeListener`.
pub type CloseListener<L> = unsafe extern "C" fn(*mut L);
/// `conn_create`.
pub type Create = unsafe extern "C" fn() -> *mut Connection;
/// `conn_create_accepted`: by the descriptor of the accepted one.
pub type CreateAccepted = unsafe extern "C" fn(c_int, *mut c_void) -> *mut Connection;
/// `connect`.
pub type Connect = unsafe extern "C" fn(
    *mut Connection,
    *const c_char,
    c_int,
    *const c_char,
    Option<Handler>,
) -> c_int;
/// 9.0 puts `int multipath` before the handler.
pub type ConnectMultipath = unsafe extern "C" fn(
    *mut Connection,
    *const c_char,
    c_int,
    *const c_char,
    c_int,
    Option<Handler>,
) -> c_int;
/// `blocking_connect`.
pub type BlockingConnect =
    unsafe extern "C" fn(*mut Connection, *const c_char, c_int, c_longlong) -> c_int;
/// `accept`.
pub type Accept = unsafe extern "C" fn(*mut Connection, Option<Handler>) -> c_int;
/// `write`.
pub type Write = unsafe extern "C" fn(*mut Connection, *const c_void, usize) -> c_int;
/// `writev`.
pub type Writev = unsafe extern "C" fn(*mut Connection, *const iovec, c_int) -> c_int;
/// `read`.
pub type Read = unsafe extern "C" fn(*mut Connection, *mut c_void, usize) -> c_int;
/// `set_write_handler`; the last argument asks for the write barrier.
pub type SetWriteHandler = unsafe extern "C" fn(*mut Connection, Option<Handler>, c_int) -> c_int;
/// `set_read_handler`.
pub type SetReadHandler = unsafe extern "C" fn(*mut Connection, Option<Handler>) -> c_int;
/// An entry that answers with a text that the connection keeps.
pub type Text = unsafe extern "C" fn(*mut Connection) -> *const c_char;
/// `sync_write`, `sync_read`, `sync_readline`: with a time-out in milliseconds.
pub type SyncIo =
    unsafe extern "C" fn(*mut Connection, *mut c_char, ssize_t, c_longlong) -> ssize_t;
/// An entry that answers with a number about the type as a whole.
pub type Query = unsafe extern "C" fn() -> c_int;
/// A boolean, and from 9.1.2 on a mask (read 1, write 2).
pub type Postpone = unsafe extern "C" fn(*mut Connection, c_int);

/// Zeros at the end of our own tables: four times as many as the longest tail has members.
pub const TAIL: usize = 16;

/// Declares a C structure with its size and offsets, asserts them, and lists them
/// for the test that compares them with the headers.
macro_rules! c_struct {
    (
        $(#[$doc:meta])*
        $name:ident = $c_name:literal, $size:literal bytes {
            $($offset:literal $field:ident ($c_field:literal): $type:ty,)*
        }
    ) => {
        $(#[$doc])*
        #[repr(C)]
        pub struct $name {
            $(#[doc = concat!("`", $c_field, "`")] pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };

        impl $name {
            /// The structure's C name, size, and C field names with their offsets.
            pub const ABI: (&'static str, usize, &'static [(&'static str, usize)]) =
                ($c_name, $size, &[$(($c_field, $offset)),*]);
        }
    };
}

c_struct! {
    /// `ConnectionType` of 8.0: the type tells its name.
    ConnectionType80 = "ConnectionType", 360 bytes {
        0 get_type ("get_type"): Option<Text>,
        8 init ("init"): Option<Nothing>,
        16 cleanup ("cleanup"): Option<Nothing>,
        24 configure ("configure"): Option<Configure>,
        32 ae_handler ("ae_handler"): Option<FileHandler>,
        40 accept_handler ("accept_handler"): Option<FileHandler>,
        48 addr ("addr"): Option<Addr>,
        56 is_local ("is_local"): Option<Ask>,
        64 listen ("listen"): Option<Listen<Listener80>>,
        72 conn_create ("conn_create"): Option<Create>,
        80 conn_create_accepted ("conn_create_accepted"): Option<CreateAccepted>,
        88 shutdown ("shutdown"): Option<Action>,
        96 close ("close"): Option<Action>,
        104 connect ("connect"): Option<Connect>,
        112 blocking_connect ("blocking_connect"): Option<BlockingConnect>,
        120 accept ("accept"): Option<Accept>,
        128 write ("write"): Option<Write>,
        136 writev ("writev"): Option<Writev>,
        144 read ("read"): Option<Read>,
        152 set_write_handler ("set_write_handler"): Option<SetWriteHandler>,
        160 set_read_handler ("set_read_handler"): Option<SetReadHandler>,
        168 get_last_error ("get_last_error"): Option<Text>,
        176 sync_write ("sync_write"): Option<SyncIo>,
        184 sync_read ("sync_read"): Option<SyncIo>,
        192 sync_readline ("sync_readline"): Option<SyncIo>,
        200 has_pending_data ("has_pending_data"): Option<Query>,
        208 process_pending_data ("process_pending_data"): Option<Query>,
        216 postpone_update_state ("postpone_update_state"): Option<Postpone>,
        224 update_state ("update_state"): Option<Action>,
        232 tail (""): [usize; TAIL],
    }
}

c_struct! {
    /// `ConnectionType` of 8.1: `closeListener` is new.
    ConnectionType81 = "ConnectionType", 368 bytes {
        0 get_type ("get_type"): Option<Text>,
        8 init ("init"): Option<Nothing>,
        16 cleanup ("cleanup"): Option<Nothing>,
        24 configure ("configure"): Option<Configure>,
        32 ae_handler ("ae_handler"): Option<FileHandler>,
        40 accept_handler ("accept_handler"): Option<FileHandler>,
        48 addr ("addr"): Option<Addr>,
        56 is_local ("is_local"): Option<Ask>,
        64 listen ("listen"): Option<Listen<Listener81>>,
        72 close_listener ("closeListener"): Option<CloseListener<Listener81>>,
        80 conn_create ("conn_create"): Option<Create>,
        88 conn_create_accepted ("conn_create_accepted"): Option<CreateAccepted>,
        96 shutdown ("shutdown"): Option<Action>,
        104 close ("close"): Option<Action>,
        112 connect ("connect"): Option<Connect>,
        120 blocking_connect ("blocking_connect"): Option<BlockingConnect>,
        128 accept ("accept"): Option<Accept>,
        136 write ("write"): Option<Write>,
        144 writev ("writev"): Option<Writev>,
        152 read ("read"): Option<Read>,
        160 set_write_handler ("set_write_handler"): Option<SetWriteHandler>,
        168 set_read_handler ("set_read_handler"): Option<SetReadHandler>,
        176 get_last_error ("get_last_error"): Option<Text>,
        184 sync_write ("sync_write"): Option<SyncIo>,
        192 sync_read ("sync_read"): Option<SyncIo>,
        200 sync_readline ("sync_readline"): Option<SyncIo>,
        208 has_pending_data ("has_pending_data"): Option<Query>,
        216 process_pending_data ("process_pending_data"): Option<Query>,
        224 postpone_update_state ("postpone_update_state"): Option<Postpone>,
        232 update_state ("update_state"): Option<Action>,
        240 tail (""): [usize; TAIL],
    }
}

c_struct! {
    /// `ConnectionType` of 9.0 and 9.1: the type tells its number, and connections may be
    /// multipath.
    ConnectionType90 = "ConnectionType", 368 bytes {
        0 get_type ("get_type"): Option<Query>,
        8 init ("init"): Option<Nothing>,
        16 cleanup ("cleanup"): Option<Nothing>,
        24 configure ("configure"): Option<Configure>,
        32 ae_handler ("ae_handler"): Option<FileHandler>,
        40 accept_handler ("accept_handler"): Option<FileHandler>,
        48 addr ("addr"): Option<Addr>,
        56 is_local ("is_local"): Option<Ask>,
        64 listen ("listen"): Option<Listen<Listener81>>,
        72 close_listener ("closeListener"): Option<CloseListener<Listener81>>,
        80 conn_create ("conn_create"): Option<Create>,
        88 conn_create_accepted ("conn_create_accepted"): Option<CreateAccepted>,
        96 shutdown ("shutdown"): Option<Action>,
        104 close ("close"): Option<Action>,
        112 connect ("connect"): Option<ConnectMultipath>,
        120 blocking_connect ("blocking_connect"): Option<BlockingConnect>,
        128 accept ("accept"): Option<Accept>,
        136 write ("write"): Option<Write>,
        144 writev ("writev"): Option<Writev>,
        152 read ("read"): Option<Read>,
        160 set_write_handler ("set_write_handler"): Option<SetWriteHandler>,
        168 set_read_handler ("set_read_handler"): Option<SetReadHandler>,
        176 get_last_error ("get_last_error"): Option<Text>,
        184 sync_write ("sync_write"): Option<SyncIo>,
        192 sync_read ("sync_read"): Option<SyncIo>,
        200 sync_readline ("sync_readline"): Option<SyncIo>,
        208 has_pending_data ("has_pending_data"): Option<Query>,
        216 process_pending_data ("process_pending_data"): Option<Query>,
        224 postpone_update_state ("postpone_update_state"): Option<Postpone>,
        232 update_state ("update_state"): Option<Action>,
        240 tail (""): [usize; TAIL],
    }
}

c_struct! {
    /// `connListener` of 8.0.
    Listener80 = "connListener", 112 bytes {
        0 fd ("fd"): [c_int; MAX_BINDS],
        64 count ("count"): c_int,
        72 bindaddr ("bindaddr"): *mut *mut c_char,
        80 bindaddr_count ("bindaddr_count"): c_int,
        84 port ("port"): c_int,
        88 ct ("ct"): *const c_void,
        96 priv1 ("priv1"): *mut c_void,
        104 priv2 ("priv2"): *mut c_void,
    }
}

c_struct! {
    /// `connListener` from 8.1 on. Up to `ct` it is that of 8.0.
    Listener81 = "connListener", 104 bytes {
        0 fd ("fd"): [c_int; MAX_BINDS],
        64 count ("count"): c_int,
        72 bindaddr ("bindaddr"): *mut *mut c_char,
        80 bindaddr_count ("bindaddr_count"): c_int,
        84 port ("port"): c_int,
        88 ct ("ct"): *const c_void,
        96 private ("priv"): *mut c_void,
    }
}

c_struct! {
    /// The core's RDMA settings (8.1 and on), to which a listener's `priv` points
    /// if `rdma-port` was not 0 when the server started.
    RdmaSettings = "serverRdmaContextConfig", 144 bytes {
        0 bindaddr ("bindaddr"): [*mut c_char; MAX_BINDS],
        128 bindaddr_count ("bindaddr_count"): c_int,
        132 port ("port"): c_int,
        136 rx_size ("rx_size"): c_int,
        140 completion_vector ("completion_vector"): c_int,
    }
}

impl Line {
    /// The head of a table of this line: its members with their offsets.
    pub fn head(self) -> &'static [(&'static str, usize)] {
        let (_, _, members) = match self {
            Self::V8_0 => ConnectionType80::ABI,
            Self::V8_1 => ConnectionType81::ABI,
            Self::V9_0 | Self::V9_1 => ConnectionType90::ABI,
        };
        &members[..members.len() - 1]
    }

    /// The size of the smallest table that a server of this line can have: nobody reads
    /// more of one.
    pub fn least_size(self) -> usize {
        self.layouts().into_iter().map(Layout::size).min().unwrap_or(0)
    }
}

/// The member of a tail that is a number and no function.
pub const SYNC_HANDLERS: &str = "sync_handlers_in_update_state";

impl Layout {
    /// The first release that has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V8_0_0 => "8.0.0",
            Self::V8_1_0 => "8.1.0",
            Self::V9_0_0 => "9.0.0",
            Self::V9_1_0 => "9.1.0",
            Self::V9_1_2 => "9.1.2",
        }
    }

    /// The size of `ConnectionType`.
    pub fn size(self) -> usize {
        match self {
            Self::V8_0_0 => 240,
            Self::V8_1_0 => 256,
            Self::V9_0_0 | Self::V9_1_0 => 264,
            Self::V9_1_2 => 272,
        }
    }

    /// The tail's members with their offsets.
    pub fn tail(self) -> &'static [(&'static str, usize)] {
        match self {
            Self::V8_0_0 => &[("get_peer_cert", 232)],
            Self::V8_1_0 => &[("get_peer_cert", 240), ("connIntegrityChecked", 248)],
            Self::V9_0_0 => {
                &[("get_peer_cert", 240), ("get_peer_username", 248), ("connIntegrityChecked", 256)]
            }
            Self::V9_1_0 => {
                &[("get_peer_cert", 240), ("get_peer_user", 248), ("connIntegrityChecked", 256)]
            }
            Self::V9_1_2 => &[
                (SYNC_HANDLERS, 240),
                ("get_peer_cert", 248),
                ("get_peer_user", 256),
                ("connIntegrityChecked", 264),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    type Headers = HashMap<String, usize>;

    /// The numbers of a file of `tests/abi`, by "size STRUCT" and "offset STRUCT.FIELD".
    fn headers(text: &'static str) -> Headers {
        let rows = text.lines().filter(|line| line.starts_with("size") || line.starts_with("off"));
        rows.map(|row| {
            let mut words = row.split('\t');
            let mut word = || words.next().expect("kind, name, number");
            (format!("{} {}", word(), word()), word().parse().expect("a number"))
        })
        .collect()
    }

    fn all() -> [(Line, Layout, Headers); 5] {
        [
            (Line::V8_0, Layout::V8_0_0, headers(include_str!("../../tests/abi/8.0.0.txt"))),
            (Line::V8_1, Layout::V8_1_0, headers(include_str!("../../tests/abi/8.1.0.txt"))),
            (Line::V9_0, Layout::V9_0_0, headers(include_str!("../../tests/abi/9.0.0.txt"))),
            (Line::V9_1, Layout::V9_1_0, headers(include_str!("../../tests/abi/9.1.0.txt"))),
            (Line::V9_1, Layout::V9_1_2, headers(include_str!("../../tests/abi/9.1.2.txt"))),
        ]
    }

    /// All members of a structure of the headers, and their offsets.
    fn members(headers: &Headers, name: &str) -> Vec<(String, usize)> {
        let prefix = format!("offset {name}.");
        let own = headers
            .iter()
            .filter_map(|(key, offset)| Some((key.strip_prefix(&prefix)?.to_owned(), *offset)));
        let mut own: Vec<_> = own.collect();
        own.sort_by_key(|(_, offset)| *offset);
        own
    }

    #[test]
    fn the_tables_are_those_of_the_headers() {
        for (line, layout, headers) in all() {
            let declared = line.head().iter().chain(layout.tail());
            let declared: Vec<_> =
                declared.map(|(name, offset)| ((*name).to_owned(), *offset)).collect();
            assert_eq!(declared, members(&headers, "ConnectionType"), "{}", layout.name());
            assert_eq!(headers["size ConnectionType"], layout.size(), "{}", layout.name());
        }
    }

    #[test]
    fn the_other_structures_are_those_of_the_headers() {
        for (line, layout, headers) in all() {
            let first = line == Line::V8_0;
            let listener = if first { Listener80::ABI } else { Listener81::ABI };
            let settings = (!first).then_some(RdmaSettings::ABI);
            for (name, size, fields) in [listener].into_iter().chain(settings) {
                let fields: Vec<_> =
                    fields.iter().map(|(name, offset)| ((*name).to_owned(), *offset)).collect();
                assert_eq!(headers[&format!("size {name}")], size, "{name} of {}", layout.name());
                assert_eq!(fields, members(&headers, name), "{name} of {}", layout.name());
            }
            assert_eq!(headers["size connection"], size_of::<Connection>());
        }
    }

    /// Whatever a server looks at behind the head is zero in our own table.
    #[test]
    fn our_tables_end_behind_every_known_one() {
        for (line, _, headers) in all() {
            let ours = match line {
                Line::V8_0 => size_of::<ConnectionType80>(),
                Line::V8_1 => size_of::<ConnectionType81>(),
                Line::V9_0 | Line::V9_1 => size_of::<ConnectionType90>(),
            };
            assert!(ours >= headers["size ConnectionType"] + 64, "{line}");
        }
    }

    #[test]
    fn the_smallest_table_of_a_line_bounds_what_is_read() {
        let sizes = Line::ALL.map(Line::least_size);
        assert_eq!(sizes, [240, 256, 264, 264]);
    }
}
