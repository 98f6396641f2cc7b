// SPDX-License-Identifier: BSD-3-Clause
//! `ConnectionType` and `connListener` of each line, as their headers declare
//! them. Sizes and offsets are asserted at compile time here, and a test holds
//! them against `tests/abi/*.txt`, which `scripts/abi-check.sh` takes from the
//! server's own headers.

use super::connection::{Connection, Handler};
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
/// 9.1 puts `int multipath` before the handler.
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
/// A boolean in 8.x, a mask (read 1, write 2) in 9.1.
pub type Postpone = unsafe extern "C" fn(*mut Connection, c_int);
/// `get_peer_cert`.
pub type PeerCert = unsafe extern "C" fn(*mut Connection) -> *mut c_char;
/// `get_peer_user`.
pub type PeerUser = unsafe extern "C" fn(*mut Connection, *mut *mut c_char) -> *mut c_void;

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
    ConnectionType80 = "ConnectionType", 240 bytes {
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
        232 get_peer_cert ("get_peer_cert"): Option<PeerCert>,
    }
}

c_struct! {
    /// `ConnectionType` of 8.1: `closeListener` and `connIntegrityChecked` are new.
    ConnectionType81 = "ConnectionType", 256 bytes {
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
        240 get_peer_cert ("get_peer_cert"): Option<PeerCert>,
        248 integrity_checked ("connIntegrityChecked"): Option<Query>,
    }
}

c_struct! {
    /// `ConnectionType` of 9.1: the type tells its number, connections may be
    /// multipath, and two members about who the peer is joined at the end.
    ConnectionType91 = "ConnectionType", 272 bytes {
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
        240 sync_handlers_in_update_state ("sync_handlers_in_update_state"): c_int,
        248 get_peer_cert ("get_peer_cert"): Option<PeerCert>,
        256 get_peer_user ("get_peer_user"): Option<PeerUser>,
        264 integrity_checked ("connIntegrityChecked"): Option<Query>,
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
    /// `connListener` of 8.1 and 9.1. Up to `ct` it is that of 8.0.
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
    /// The core's RDMA settings (8.1 and 9.1), to which a listener's `priv` points
    /// if `rdma-port` was not 0 when the server started.
    RdmaSettings = "serverRdmaContextConfig", 144 bytes {
        0 bindaddr ("bindaddr"): [*mut c_char; MAX_BINDS],
        128 bindaddr_count ("bindaddr_count"): c_int,
        132 port ("port"): c_int,
        136 rx_size ("rx_size"): c_int,
        140 completion_vector ("completion_vector"): c_int,
    }
}

/// `struct ClientFlags` of 8.x, which travels by value: in one register.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ClientFlags8(pub u64);

/// `struct ClientFlags` of 9.1: in two registers.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct ClientFlags16(pub u64, pub u64);

const _: () = assert!(size_of::<ClientFlags8>() == 8 && size_of::<ClientFlags16>() == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// The numbers of `tests/abi/LINE.txt`, by "size STRUCT" and "offset STRUCT.FIELD".
    fn headers(text: &'static str) -> HashMap<String, usize> {
        let rows = text.lines().filter(|line| line.starts_with("size") || line.starts_with("off"));
        rows.map(|row| {
            let mut words = row.split('\t');
            let mut word = || words.next().expect("kind, name, number");
            (format!("{} {}", word(), word()), word().parse().expect("a number"))
        })
        .collect()
    }

    #[test]
    fn the_tables_are_those_of_the_headers() {
        let v80 = headers(include_str!("../../tests/abi/8.0.txt"));
        let v81 = headers(include_str!("../../tests/abi/8.1.txt"));
        let v91 = headers(include_str!("../../tests/abi/9.1.txt"));
        for (headers, (name, size, fields)) in [
            (&v80, ConnectionType80::ABI),
            (&v80, Listener80::ABI),
            (&v81, ConnectionType81::ABI),
            (&v81, Listener81::ABI),
            (&v81, RdmaSettings::ABI),
            (&v91, ConnectionType91::ABI),
            (&v91, Listener81::ABI),
            (&v91, RdmaSettings::ABI),
        ] {
            assert_eq!(headers[&format!("size {name}")], size, "size of {name}");
            for (field, offset) in fields {
                assert_eq!(headers[&format!("offset {name}.{field}")], *offset, "{name}.{field}");
            }
            let prefix = format!("offset {name}.");
            let declared = headers.keys().filter(|key| key.starts_with(&prefix)).count();
            assert_eq!(declared, fields.len(), "fields of {name}");
        }
        for (headers, size) in [(&v80, 8), (&v81, 8), (&v91, 16)] {
            assert_eq!(headers["size ClientFlags"], size);
            assert_eq!(headers["size connection"], size_of::<Connection>());
        }
    }
}
