// SPDX-License-Identifier: BSD-3-Clause
//! The RDMA connection type, called as the server's own code would call it.
//!
//! Where a slot lies is read from `tests/abi`, which comes from the server's headers, and
//! not from the transport's own tables: a slot that the transport fills at a wrong place
//! is thereby found out.

use libc::ssize_t;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_longlong, c_void};
use std::sync::OnceLock;

/// `struct connection`, whose members are reached by their offsets.
#[repr(C)]
pub struct Connection {
    _opaque: [u8; 0],
}

/// What the server calls back with a connection.
pub type Handler = unsafe extern "C" fn(*mut Connection);

type Action = unsafe extern "C" fn(*mut Connection);
type Ask = unsafe extern "C" fn(*mut Connection) -> c_int;
type Text = unsafe extern "C" fn(*mut Connection) -> *const c_char;
type SyncIo = unsafe extern "C" fn(*mut Connection, *mut c_char, ssize_t, c_longlong) -> ssize_t;

/// Of each line one of its layouts: in the slots that are called here they agree.
const LINES: [(u32, &str); 4] = [
    (0x0800, include_str!("../../abi/8.0.0.txt")),
    (0x0801, include_str!("../../abi/8.1.0.txt")),
    (0x0900, include_str!("../../abi/9.0.0.txt")),
    (0x0901, include_str!("../../abi/9.1.0.txt")),
];
/// The line from which on types go by number and a connect may be multipath.
const NUMBERED: u32 = 0x0900;

/// The registered connection type of a server.
pub struct ConnectionType {
    table: *const u8,
    offsets: HashMap<&'static str, usize>,
    line: u32,
}

// SAFETY: a table that is never written to.
unsafe impl Send for ConnectionType {}
// SAFETY: as above.
unsafe impl Sync for ConnectionType {}

static RDMA: OnceLock<ConnectionType> = OnceLock::new();

/// The RDMA connection type of this server, whose version is `0x00MMmmpp`.
pub fn rdma(version: u32) -> Result<&'static ConnectionType, String> {
    if let Some(found) = RDMA.get() {
        return Ok(found);
    }
    let line = version >> 8;
    let (_, headers) = LINES
        .iter()
        .find(|(known, _)| *known == line)
        .ok_or_else(|| format!("no offsets for a server of version {version:#x}"))?;
    // SAFETY: the main program exports the function, with this signature in the line's
    // headers.
    let table = unsafe {
        let find = libc::dlsym(libc::RTLD_DEFAULT, c"connectionByType".as_ptr());
        if find.is_null() {
            return Err("the server exports no connectionByType".to_owned());
        }
        if line < NUMBERED {
            type ByName = unsafe extern "C" fn(*const c_char) -> *const u8;
            std::mem::transmute::<*mut c_void, ByName>(find)(c"rdma".as_ptr())
        } else {
            type ByNumber = unsafe extern "C" fn(c_int) -> *const u8;
            std::mem::transmute::<*mut c_void, ByNumber>(find)(constant(headers, "CONN_TYPE_RDMA"))
        }
    };
    if table.is_null() {
        return Err("the server has no RDMA connection type".to_owned());
    }
    let rows = headers.lines().filter_map(|row| row.strip_prefix("offset\t"));
    let offsets = rows.filter_map(|row| {
        let mut words = row.split('\t');
        Some((words.next()?, words.next()?.parse().ok()?))
    });
    Ok(RDMA.get_or_init(|| ConnectionType { table, offsets: offsets.collect(), line }))
}

/// Words of the shortest table of all lines.
const LEAST_WORDS: usize = 30;

/// The table of the TCP type as it is now: 0, or the distance of what a word points to from the
/// start of the executable.
pub fn tcp_words() -> Result<Vec<usize>, String> {
    // SAFETY: the main program exports the function, with this signature in every line; zeros
    // are a valid structure.
    unsafe {
        let find = libc::dlsym(libc::RTLD_DEFAULT, c"connectionTypeTcp".as_ptr());
        let mut found: libc::Dl_info = std::mem::zeroed();
        if find.is_null() || libc::dladdr(find, &mut found) == 0 {
            return Err("the server exports no connectionTypeTcp".to_owned());
        }
        type Table = unsafe extern "C" fn() -> *const usize;
        let table = std::mem::transmute::<*mut c_void, Table>(find)();
        let words = std::slice::from_raw_parts(table, LEAST_WORDS);
        let base = found.dli_fbase as usize;
        Ok(words.iter().map(|&word| if word == 0 { 0 } else { word.wrapping_sub(base) }).collect())
    }
}

fn constant(headers: &str, name: &str) -> c_int {
    let mut rows = headers.lines().filter_map(|row| row.strip_prefix("const\t"));
    let value = rows.find_map(|row| row.strip_prefix(name)?.strip_prefix('\t'));
    value.and_then(|value| value.parse().ok()).expect("a constant of the headers")
}

/// What a blocking call came to: how much, or the error number that it left.
pub type Outcome = Result<usize, i32>;

fn outcome(returned: ssize_t) -> Outcome {
    usize::try_from(returned).map_err(|_| {
        std::io::Error::last_os_error().raw_os_error().expect("an error of the system")
    })
}

/// Every method but [`create`](Self::create) wants a connection that is live, on the main
/// thread.
impl ConnectionType {
    /// The function in a slot.
    ///
    /// # Safety
    /// `F` is the type of the slot's function.
    unsafe fn slot<F>(&self, name: &str) -> F {
        let offset = self.offsets[format!("ConnectionType.{name}").as_str()];
        // SAFETY: the offset lies in the table; a function's Option has its layout.
        let function = unsafe { self.table.add(offset).cast::<Option<F>>().read() };
        function.unwrap_or_else(|| panic!("the slot {name} is empty"))
    }

    /// `conn_create`.
    pub fn create(&self) -> *mut Connection {
        // SAFETY: the slot's type.
        unsafe { self.slot::<unsafe extern "C" fn() -> *mut Connection>("conn_create")() }
    }

    /// `connect`: whether it is under way, so that `handler` follows.
    pub unsafe fn connect(
        &self,
        connection: *mut Connection,
        host: &CStr,
        port: c_int,
        source: Option<&CStr>,
        handler: Handler,
    ) -> bool {
        type Connect = unsafe extern "C" fn(
            *mut Connection,
            *const c_char,
            c_int,
            *const c_char,
            Option<Handler>,
        ) -> c_int;
        type ConnectMultipath = unsafe extern "C" fn(
            *mut Connection,
            *const c_char,
            c_int,
            *const c_char,
            c_int,
            Option<Handler>,
        ) -> c_int;
        let (host, source) = (host.as_ptr(), source.map_or(std::ptr::null(), CStr::as_ptr));
        // SAFETY: the slot's type in this line; by the caller's promise.
        unsafe {
            if self.line < NUMBERED {
                let connect = self.slot::<Connect>("connect");
                connect(connection, host, port, source, Some(handler)) == 0
            } else {
                let connect = self.slot::<ConnectMultipath>("connect");
                connect(connection, host, port, source, 0, Some(handler)) == 0
            }
        }
    }

    /// `blocking_connect`.
    pub unsafe fn blocking_connect(
        &self,
        connection: *mut Connection,
        host: &CStr,
        port: c_int,
        timeout: c_longlong,
    ) -> Outcome {
        type Slot =
            unsafe extern "C" fn(*mut Connection, *const c_char, c_int, c_longlong) -> c_int;
        // SAFETY: the slot's type; by the caller's promise.
        outcome(unsafe {
            self.slot::<Slot>("blocking_connect")(connection, host.as_ptr(), port, timeout)
        } as ssize_t)
    }

    /// `write`; `None` when it takes nothing now.
    pub unsafe fn write(&self, connection: *mut Connection, bytes: &[u8]) -> c_int {
        type Slot = unsafe extern "C" fn(*mut Connection, *const c_void, usize) -> c_int;
        // SAFETY: the slot's type; by the caller's promise.
        unsafe { self.slot::<Slot>("write")(connection, bytes.as_ptr().cast(), bytes.len()) }
    }

    /// `read`.
    pub unsafe fn read(&self, connection: *mut Connection, into: &mut [u8]) -> c_int {
        type Slot = unsafe extern "C" fn(*mut Connection, *mut c_void, usize) -> c_int;
        // SAFETY: the slot's type; by the caller's promise.
        unsafe { self.slot::<Slot>("read")(connection, into.as_mut_ptr().cast(), into.len()) }
    }

    /// `set_write_handler`, without a barrier.
    pub unsafe fn set_write_handler(&self, connection: *mut Connection, handler: Option<Handler>) {
        type Slot = unsafe extern "C" fn(*mut Connection, Option<Handler>, c_int) -> c_int;
        // SAFETY: the slot's type; by the caller's promise.
        let result = unsafe { self.slot::<Slot>("set_write_handler")(connection, handler, 0) };
        assert_eq!(result, 0, "set_write_handler");
    }

    /// `set_read_handler`.
    pub unsafe fn set_read_handler(&self, connection: *mut Connection, handler: Option<Handler>) {
        type Slot = unsafe extern "C" fn(*mut Connection, Option<Handler>) -> c_int;
        // SAFETY: the slot's type; by the caller's promise.
        let result = unsafe { self.slot::<Slot>("set_read_handler")(connection, handler) };
        assert_eq!(result, 0, "set_read_handler");
    }

    /// `sync_write`.
    pub unsafe fn sync_write(
        &self,
        connection: *mut Connection,
        bytes: &[u8],
        timeout: c_longlong,
    ) -> Outcome {
        let start = bytes.as_ptr().cast_mut().cast();
        // SAFETY: the slot's type, which is without a `const` for what it only reads; by
        // the caller's promise.
        outcome(unsafe {
            self.slot::<SyncIo>("sync_write")(connection, start, bytes.len() as ssize_t, timeout)
        })
    }

    /// `sync_read` or `sync_readline`, whichever is named.
    pub unsafe fn sync_read(
        &self,
        slot: &str,
        connection: *mut Connection,
        into: &mut [u8],
        timeout: c_longlong,
    ) -> Outcome {
        let start = into.as_mut_ptr().cast();
        // SAFETY: the slot's type; by the caller's promise.
        outcome(unsafe {
            self.slot::<SyncIo>(slot)(connection, start, into.len() as ssize_t, timeout)
        })
    }

    /// `shutdown`.
    pub unsafe fn shutdown(&self, connection: *mut Connection) {
        // SAFETY: the slot's type; by the caller's promise.
        unsafe { self.slot::<Action>("shutdown")(connection) }
    }

    /// `close`; the connection is not used any more.
    pub unsafe fn close(&self, connection: *mut Connection) {
        // SAFETY: the slot's type; by the caller's promise.
        unsafe { self.slot::<Action>("close")(connection) }
    }

    /// `addr`, of the other end or of this one: the address and the port.
    pub unsafe fn addr(&self, connection: *mut Connection, remote: bool) -> String {
        type Slot =
            unsafe extern "C" fn(*mut Connection, *mut c_char, usize, *mut c_int, c_int) -> c_int;
        let mut ip = [0 as c_char; 64];
        let mut port = -1;
        // SAFETY: the slot's type, which ends the text with a NUL; by the caller's promise.
        let (result, ip) = unsafe {
            let addr = self.slot::<Slot>("addr");
            let result =
                addr(connection, ip.as_mut_ptr(), ip.len(), &raw mut port, c_int::from(remote));
            (result, CStr::from_ptr(ip.as_ptr()).to_string_lossy().into_owned())
        };
        if result == 0 { format!("{ip} {port}") } else { format!("unknown {ip} {port}") }
    }

    /// `is_local`.
    pub unsafe fn is_local(&self, connection: *mut Connection) -> c_int {
        // SAFETY: the slot's type; by the caller's promise.
        unsafe { self.slot::<Ask>("is_local")(connection) }
    }

    /// `get_last_error`.
    pub unsafe fn last_error(&self, connection: *mut Connection) -> String {
        // SAFETY: the slot's type, which returns a C string; by the caller's promise.
        unsafe {
            let text = self.slot::<Text>("get_last_error")(connection);
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }

    /// The connection's state, in the headers' word for it.
    pub unsafe fn state(&self, connection: *mut Connection) -> &'static str {
        let offset = self.offsets["connection.state"];
        // SAFETY: an enumeration stands there; by the caller's promise.
        let state = unsafe { connection.cast::<u8>().add(offset).cast::<c_int>().read_volatile() };
        let (_, headers) = LINES.iter().find(|(line, _)| *line == self.line).expect("our line");
        ["NONE", "CONNECTING", "ACCEPTING", "CONNECTED", "CLOSED", "ERROR"]
            .into_iter()
            .find(|name| constant(headers, &format!("CONN_STATE_{name}")) == state)
            .unwrap_or("?")
    }
}

/// An error number in words.
pub fn error_text(errno: i32) -> String {
    // SAFETY: any number will do; the answer is copied at once.
    unsafe { CStr::from_ptr(libc::strerror(errno)) }.to_string_lossy().into_owned()
}

/// A C string of an argument.
pub fn c_string(bytes: &[u8]) -> Result<CString, String> {
    CString::new(bytes).map_err(|_| "a NUL in an argument".to_owned())
}
