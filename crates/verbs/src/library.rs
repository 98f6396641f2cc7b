// SPDX-License-Identifier: BSD-3-Clause
//! Opens librdmacm and libibverbs at run time and keeps the addresses of their functions.
//!
//! A program that uses this crate is not *linked* against the two libraries: it starts on a
//! machine that lacks them, and [`load`] says what to install. A module of valkey-server must
//! not be linked against them at all. From 8.1 on the server loads modules with
//! `RTLD_DEEPBIND`, and a library that comes in as the dependency of such a module is bound
//! deep as well. In a server whose `malloc` is jemalloc it would free with glibc what libc
//! allocated with jemalloc, and abort before any line of the module ran. So the libraries are
//! opened here, without that flag.
//!
//! The types come from the `rdma-sys` crate, whose declarations bindgen makes of the libraries'
//! own headers. They are never called, since a call would need the symbol. `call!` takes the
//! type of the declaration and the address that `dlsym` found.

use once_cell::sync::OnceCell;
use std::ffi::{CStr, c_void};
use std::fmt;
use std::mem;

/// Why the libraries can't be used.
#[derive(Debug)]
pub enum LoadError {
    /// `dlopen` failed: file name and the loader's words.
    Open(&'static str, String),
    /// A function is missing: the library is too old.
    Symbol(&'static str, &'static str),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(file, why) => write!(
                f,
                "cannot open {file}: {why}; install rdma-core's libraries \
                 (Debian: apt install librdmacm1 ibverbs-providers)"
            ),
            Self::Symbol(file, name) => write!(
                f,
                "{file} has no function {name}: it is older than rdma-core 35; install a newer one"
            ),
        }
    }
}

impl std::error::Error for LoadError {}

/// Address of a function whose type is not known here.
type Address = unsafe extern "C" fn();

macro_rules! functions {
    ($($library:literal { $($name:ident)* })*) => {
        /// A function of either library, by its place in the table.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug)]
        pub(crate) enum Function { $($($name,)*)* }

        /// The libraries with the names of their functions, in the order of [`Function`].
        const LIBRARIES: &[(&CStr, &[&CStr])] =
            &[$(($library, &[$(name(concat!(stringify!($name), "\0")),)*]),)*];
    };
}

const fn name(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("a name ends in NUL"),
    }
}

functions! {
    c"librdmacm.so.1" {
        rdma_create_event_channel
        rdma_destroy_event_channel
        rdma_create_id
        rdma_destroy_id
        rdma_set_option
        rdma_bind_addr
        rdma_listen
        rdma_resolve_addr
        rdma_resolve_route
        rdma_create_qp
        rdma_connect
        rdma_accept
        rdma_reject
        rdma_disconnect
        rdma_notify
        rdma_migrate_id
        rdma_get_cm_event
        rdma_ack_cm_event
        rdma_get_devices
        rdma_free_devices
    }
    c"libibverbs.so.1" {
        ibv_fork_init
        ibv_is_fork_initialized
        ibv_get_device_name
        ibv_get_device_index
        ibv_query_device
        ibv_alloc_pd
        ibv_dealloc_pd
        ibv_reg_mr
        ibv_dereg_mr
        ibv_create_comp_channel
        ibv_destroy_comp_channel
        ibv_create_cq
        ibv_destroy_cq
        ibv_get_async_event
        ibv_ack_async_event
        ibv_event_type_str
        ibv_get_cq_event
        ibv_ack_cq_events
        ibv_destroy_qp
        ibv_modify_qp
        ibv_query_qp
        ibv_wc_status_str
    }
}

/// Addresses by [`Function`]; the libraries stay open for the life of the process.
static TABLE: OnceCell<Vec<Address>> = OnceCell::new();

/// Opens both libraries, once for the process. The rest of this crate works after that, and
/// panics before.
///
/// # Errors
/// A library that is not there or is too old. The text says what to install.
pub fn load() -> Result<(), LoadError> {
    TABLE.get_or_try_init(find).map(drop)
}

fn find() -> Result<Vec<Address>, LoadError> {
    let mut table = Vec::new();
    for (file, names) in LIBRARIES {
        let handle = open(file)?;
        for name in *names {
            // SAFETY: an open handle and a NUL-terminated name.
            let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
            if address.is_null() {
                return Err(LoadError::Symbol(text(file), text(name)));
            }
            // SAFETY: the address of a function, which is not called by this type.
            table.push(unsafe { mem::transmute::<*mut c_void, Address>(address) });
        }
    }
    Ok(table)
}

fn open(file: &'static CStr) -> Result<*mut c_void, LoadError> {
    // SAFETY: plain dlopen of a NUL-terminated name. Local, so that nobody else in the process
    // sees the symbols; not deep, see the module's text.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: dlerror returns NULL or a string that lives until the next dl call.
        let why = unsafe {
            let text = libc::dlerror();
            if text.is_null() {
                String::from("no reason given")
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        return Err(LoadError::Open(text(file), why));
    }
    Ok(handle)
}

fn text(name: &'static CStr) -> &'static str {
    name.to_str().expect("names in this file are ASCII")
}

/// The address of `function` as a pointer of the type that `declaration` returns.
///
/// `declaration` is not called. So rdma-sys's function, which it mentions, is not compiled in,
/// and the program needs no symbol of it.
///
/// # Safety
/// `declaration` returns a pointer to the function of that name.
pub(crate) unsafe fn typed<F: Copy>(_declaration: impl FnOnce() -> F, function: Function) -> F {
    const { assert!(size_of::<F>() == size_of::<Address>()) };
    let table = TABLE.get().expect("verbs::library::load comes first");
    let address = table[function as usize];
    // SAFETY: both are function pointers, and by the caller's promise F is this one's type.
    unsafe { mem::transmute_copy::<Address, F>(&address) }
}

/// Calls a function of the libraries as the C declaration has it. Unsafe as that call is.
macro_rules! call {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        let function = $crate::library::typed(
            || {
                let declared: unsafe extern "C" fn($($crate::library::inferred!($argument)),*) -> _ =
                    rdma_sys::$name;
                declared
            },
            $crate::library::Function::$name,
        );
        function($($argument),*)
    }};
}
pub(crate) use call;

/// The type of an argument, which the declaration knows.
macro_rules! inferred {
    ($argument:expr) => {
        _
    };
}
pub(crate) use inferred;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_or_old_is_told_with_the_remedy() {
        let missing = open(c"libvalkey-rdma-none.so.1").unwrap_err().to_string();
        assert!(missing.starts_with("cannot open libvalkey-rdma-none.so.1: "), "{missing}");
        assert!(missing.contains("apt install librdmacm1"), "{missing}");
        let old = LoadError::Symbol("libibverbs.so.1", "ibv_fork_init").to_string();
        assert!(old.contains("no function ibv_fork_init: it is older"), "{old}");
    }

    #[test]
    fn the_table_has_a_place_for_each_function() {
        let names: Vec<_> = LIBRARIES.iter().flat_map(|(_, names)| *names).copied().collect();
        assert_eq!(
            names[Function::rdma_create_event_channel as usize],
            c"rdma_create_event_channel"
        );
        assert_eq!(names[Function::ibv_fork_init as usize], c"ibv_fork_init");
        assert_eq!(names[Function::ibv_wc_status_str as usize], c"ibv_wc_status_str");
        assert_eq!(names.len(), Function::ibv_wc_status_str as usize + 1);
    }
}
