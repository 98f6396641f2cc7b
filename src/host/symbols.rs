// SPDX-License-Identifier: BSD-3-Clause
//! The functions that the server's executable exports to modules of its own
//! build, found by name.

use super::connection::Connection;
use super::difference::Difference;
use super::layout::Listener81;
use super::line::Line;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Number of the RDMA type in 9.x (`CONN_TYPE_RDMA`); 8.x goes by name.
pub const TYPE_NUMBER: c_int = 3;
/// Name of the RDMA type, in every line.
pub const TYPE_NAME: &CStr = c"rdma";

/// `acceptCommonHandler(connection, flags, ip)`, where `flags` is a structure that is passed
/// by value: in one register up to 9.0, in two in 9.1, and if it grows on, on the stack. No
/// release looks at `ip`. So there is one way to call them all: zeros wherever flags may be.
type AcceptCommon = unsafe extern "C" fn(*mut Connection, u64, u64, u64, u64, u64, [u64; 8]);

/// The server's functions, of one line.
#[derive(Clone, Copy, Debug)]
pub struct Symbols {
    line: Line,
    register: unsafe extern "C" fn(*mut c_void) -> c_int,
    connection_type_tcp: unsafe extern "C" fn() -> *const c_void,
    listener_by_type: *mut c_void,
    accept_common: AcceptCommon,
    change_listener: unsafe extern "C" fn(*mut Listener81) -> c_int,
}

// SAFETY: addresses of functions.
unsafe impl Send for Symbols {}
// SAFETY: as above.
unsafe impl Sync for Symbols {}

/// The address of a function that the server's executable exports.
pub fn find(name: &'static CStr) -> Option<*mut c_void> {
    // SAFETY: the handle of the main program is always there; a NUL-terminated name.
    // Not RTLD_DEFAULT: that would look into this module too, and what it depends on.
    let address = unsafe {
        let program = libc::dlopen(std::ptr::null(), libc::RTLD_NOW);
        libc::dlsym(program, name.as_ptr())
    };
    (!address.is_null()).then_some(address)
}

/// The file that this module was loaded from.
pub fn own_file() -> Option<PathBuf> {
    // SAFETY: numbers and pointers, where zeroes are valid.
    let mut found: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address of a function of ours, and a place for the answer, whose name lives
    // as long as we are loaded.
    unsafe {
        let known = libc::dladdr(own_file as *const c_void, &mut found) != 0;
        (known && !found.dli_fname.is_null())
            .then(|| PathBuf::from(OsStr::from_bytes(CStr::from_ptr(found.dli_fname).to_bytes())))
    }
}

/// Sees to it that this module's code stays where it is, whoever closes it. Returns whether
/// that worked.
pub fn stay() -> bool {
    let path = own_file().and_then(|path| CString::new(path.into_os_string().into_vec()).ok());
    // SAFETY: a C string; what is open already is found, and nothing else opened. The handle
    // is never closed.
    path.is_some_and(|path| unsafe {
        !libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD).is_null()
    })
}

/// The live table of the server's TLS type, if TLS is built in. Where it is not, the server
/// would complain of being asked, and might remember the answer beyond the loading of TLS as a
/// module.
pub fn tls_table(line: Line) -> Option<*const c_void> {
    /// `CONN_TYPE_TLS` of 9.x.
    const NUMBER: c_int = 2;
    find(c"SSL_CTX_new")?;
    let by_type = find(c"connectionByType")?;
    // SAFETY: the signature is that of the line.
    let table = unsafe {
        if line.numbers_types() {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> *const c_void>(
                by_type,
            )(NUMBER)
        } else {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> *const c_void>(
                by_type,
            )(c"tls".as_ptr())
        }
    };
    (!table.is_null()).then_some(table)
}

/// Whether the server was built with an RDMA transport of its own: then, and only
/// then, the executable brings librdmacm along.
pub fn server_has_own_rdma() -> bool {
    find(c"rdma_create_event_channel").is_some()
}

impl Symbols {
    /// Finds the functions in the running executable.
    ///
    /// # Errors
    /// The first that is missing.
    pub fn find(line: Line) -> Result<Self, Difference> {
        let missing = |name: &'static CStr| Difference::Function(name.to_str().unwrap_or("?"));
        let need = |name| find(name).ok_or_else(|| missing(name));
        // Not called: it tells the two kinds of I/O threads from each other.
        need(if line.wakes_threads_by_descriptors() {
            c"adjustIOThreadsByEventLoad"
        } else {
            c"IOThreadsBeforeSleep"
        })?;
        // SAFETY: the signatures are those of the line's headers, `docs/abi.md`.
        unsafe {
            Ok(Self {
                line,
                register: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut c_void) -> c_int,
                >(need(c"connTypeRegister")?),
                connection_type_tcp: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn() -> *const c_void,
                >(need(c"connectionTypeTcp")?),
                listener_by_type: need(c"listenerByType")?,
                accept_common: std::mem::transmute::<*mut c_void, AcceptCommon>(need(
                    c"acceptCommonHandler",
                )?),
                change_listener: std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut Listener81) -> c_int,
                >(need(c"changeListener")?),
            })
        }
    }

    /// The live table of the TCP connection type.
    pub fn tcp_table(&self) -> *const c_void {
        // SAFETY: the server registered TCP before it loads any module.
        unsafe { (self.connection_type_tcp)() }
    }

    /// Registers a connection type. Main thread, at load only.
    ///
    /// Returns whether the server took it.
    ///
    /// # Safety
    /// `table` is the line's `ConnectionType`, valid for the life of the process.
    pub unsafe fn register(&self, table: *mut c_void) -> bool {
        // SAFETY: by the caller's promise.
        unsafe { (self.register)(table) == 0 }
    }

    /// The server's listener of our type, as far as the lines agree on it.
    /// After registration only: the server complains of types that it does not know.
    pub fn listener(&self) -> *mut Listener81 {
        // SAFETY: the signature is that of the line.
        unsafe {
            if self.line.numbers_types() {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(c_int) -> *mut Listener81>(
                    self.listener_by_type,
                )(TYPE_NUMBER)
            } else {
                std::mem::transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*const c_char) -> *mut Listener81,
                >(self.listener_by_type)(TYPE_NAME.as_ptr())
            }
        }
    }

    /// Closes the listener and opens it again with its present fields. Main thread.
    ///
    /// # Safety
    /// `listener` is the server's own, from [`listener`](Self::listener).
    pub unsafe fn change_listener(&self, listener: *mut Listener81) -> bool {
        // SAFETY: by the caller's promise.
        unsafe { (self.change_listener)(listener) == 0 }
    }

    /// Hands an accepted connection to the server, which makes a client of it or
    /// closes it. Afterwards the connection may be gone. Main thread.
    ///
    /// # Safety
    /// `connection` is of our type and in state accepting.
    pub unsafe fn accept_common(&self, connection: *mut Connection) {
        // SAFETY: by the caller's promise; whatever the flags' size, they are zeros.
        unsafe { (self.accept_common)(connection, 0, 0, 0, 0, 0, [0; 8]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// What a server's function was called with: the connection, and all bits of the flags.
    static CALL: Mutex<(usize, u64)> = Mutex::new((0, !0));

    macro_rules! servers {
        ($($name:ident: $words:literal,)*) => {
            $(unsafe extern "C" fn $name(
                connection: *mut Connection,
                flags: Flags<$words>,
                ip: *mut c_char,
            ) {
                let flags = flags.0.iter().fold(0, |bits, word| bits | word);
                *CALL.lock().unwrap() = (connection as usize, flags | ip as u64);
            })*
            /// Servers whose flags have so many words.
            const SERVERS: &[unsafe extern "C" fn()] = &[$(
                // SAFETY: only ever called after it was made a function of the real type.
                unsafe { std::mem::transmute::<*const (), unsafe extern "C" fn()>($name as *const ()) },
            )*];
        };
    }

    #[repr(C)]
    struct Flags<const WORDS: usize>([u64; WORDS]);

    servers! { one: 1, two: 2, three: 3, eight: 8, }

    #[test]
    fn flags_of_any_size_arrive_as_zeros() {
        for server in SERVERS {
            *CALL.lock().unwrap() = (0, !0);
            // SAFETY: what is under test.
            unsafe {
                let accept = std::mem::transmute::<unsafe extern "C" fn(), AcceptCommon>(*server);
                accept(std::ptr::without_provenance_mut(0x40), 0, 0, 0, 0, 0, [0; 8]);
            }
            assert_eq!(*CALL.lock().unwrap(), (0x40, 0));
        }
    }

    #[test]
    fn this_code_has_a_file() {
        assert!(super::own_file().unwrap().exists());
    }
}
