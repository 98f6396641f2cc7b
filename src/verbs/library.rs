// SPDX-License-Identifier: BSD-3-Clause
//! Opening librdmacm and libibverbs at run time, and forwarding to them.
//!
//! The module must not be *linked* against the two libraries. From 8.1 on the
//! server loads modules with `RTLD_DEEPBIND`, and a library that comes in as the
//! dependency of such a module is bound deep as well: in a server whose `malloc`
//! is jemalloc it would free with glibc what libc allocated with jemalloc, and
//! abort before any line of ours ran. So the libraries are opened here, without
//! that flag, and this file defines the functions that the `rdma-sys` crate
//! imports: each passes its arguments on. The linker then finds every symbol
//! inside the module and records no dependency (a test looks). As a bonus a
//! machine without the libraries gets a sentence and not a loader's error.

use rdma_sys::*;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

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

/// Opens a library and keeps it open for the life of the process.
fn open(file: &'static CStr) -> Result<*mut c_void, LoadError> {
    // SAFETY: plain dlopen of a NUL-terminated name. Local, so that the server's
    // other modules don't see the symbols; not deep, see the module's text.
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
        return Err(LoadError::Open(file.to_str().unwrap_or("?"), why));
    }
    Ok(handle)
}

macro_rules! forward {
    ($($library:literal { $(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?;)* })*) => {
        /// The functions of both libraries, found by [`load`].
        #[allow(non_snake_case)]
        struct Functions {
            $($($name: unsafe extern "C" fn($($type),*) $(-> $ret)?,)*)*
        }

        impl Functions {
            fn find() -> Result<Self, LoadError> {
                let mut addresses: Vec<*mut c_void> = Vec::new();
                $(
                    let file = concat!($library, "\0");
                    let file = CStr::from_bytes_with_nul(file.as_bytes()).expect("ends in NUL");
                    let handle = open(file)?;
                    for name in [$(concat!(stringify!($name), "\0")),*] {
                        // SAFETY: an open handle and a NUL-terminated name.
                        let address = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
                        if address.is_null() {
                            return Err(LoadError::Symbol($library, name.trim_end_matches('\0')));
                        }
                        addresses.push(address);
                    }
                )*
                let mut addresses = addresses.into_iter();
                Ok(Self {
                    // SAFETY: the address is that of the function whose C declaration
                    // rdma-sys took from the library's own header, spelt again here.
                    $($($name: unsafe {
                        std::mem::transmute::<
                            *mut c_void,
                            unsafe extern "C" fn($($type),*) $(-> $ret)?,
                        >(addresses.next().expect("one for each name"))
                    },)*)*
                })
            }
        }

        $($(
            /// Forwards to the library's function of this name.
            ///
            /// # Safety
            /// As the library's function; [`load`] must have succeeded.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $type),*) $(-> $ret)? {
                let functions = FUNCTIONS.get().expect("the RDMA libraries are open");
                // SAFETY: the caller keeps the library function's contract.
                unsafe { (functions.$name)($($arg),*) }
            }
        )*)*
    };
}

forward! {
    "librdmacm.so.1" {
        fn rdma_create_event_channel() -> *mut rdma_event_channel;
        fn rdma_destroy_event_channel(channel: *mut rdma_event_channel);
        fn rdma_create_id(
            channel: *mut rdma_event_channel,
            id: *mut *mut rdma_cm_id,
            context: *mut c_void,
            ps: rdma_port_space::Type,
        ) -> c_int;
        fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int;
        fn rdma_set_option(
            id: *mut rdma_cm_id,
            level: c_int,
            name: c_int,
            value: *mut c_void,
            length: usize,
        ) -> c_int;
        fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut libc::sockaddr) -> c_int;
        fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int;
        fn rdma_resolve_addr(
            id: *mut rdma_cm_id,
            source: *mut libc::sockaddr,
            destination: *mut libc::sockaddr,
            timeout_ms: c_int,
        ) -> c_int;
        fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int;
        fn rdma_create_qp(
            id: *mut rdma_cm_id,
            pd: *mut ibv_pd,
            attributes: *mut ibv_qp_init_attr,
        ) -> c_int;
        fn rdma_connect(id: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
        fn rdma_accept(id: *mut rdma_cm_id, parameters: *mut rdma_conn_param) -> c_int;
        fn rdma_reject(id: *mut rdma_cm_id, data: *const c_void, length: u8) -> c_int;
        fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int;
        fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int;
        fn rdma_get_cm_event(
            channel: *mut rdma_event_channel,
            event: *mut *mut rdma_cm_event,
        ) -> c_int;
        fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
        fn rdma_event_str(event: rdma_cm_event_type::Type) -> *const c_char;
        fn rdma_get_devices(count: *mut c_int) -> *mut *mut ibv_context;
        fn rdma_free_devices(list: *mut *mut ibv_context);
    }
    "libibverbs.so.1" {
        fn ibv_fork_init() -> c_int;
        fn ibv_is_fork_initialized() -> ibv_fork_status;
        fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
        fn ibv_query_device(context: *mut ibv_context, attributes: *mut ibv_device_attr) -> c_int;
        fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
        fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
        fn ibv_reg_mr(
            pd: *mut ibv_pd,
            address: *mut c_void,
            length: usize,
            access: c_int,
        ) -> *mut ibv_mr;
        fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
        fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
        fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
        fn ibv_create_cq(
            context: *mut ibv_context,
            entries: c_int,
            cq_context: *mut c_void,
            channel: *mut ibv_comp_channel,
            vector: c_int,
        ) -> *mut ibv_cq;
        fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
        fn ibv_get_cq_event(
            channel: *mut ibv_comp_channel,
            cq: *mut *mut ibv_cq,
            cq_context: *mut *mut c_void,
        ) -> c_int;
        fn ibv_ack_cq_events(cq: *mut ibv_cq, count: c_uint);
        fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
        fn ibv_modify_qp(qp: *mut ibv_qp, attributes: *mut ibv_qp_attr, mask: c_int) -> c_int;
        fn ibv_wc_status_str(status: ibv_wc_status::Type) -> *const c_char;
    }
}

static FUNCTIONS: OnceLock<Functions> = OnceLock::new();

/// Opens both libraries. The owners of this module may be used after it succeeded.
///
/// # Errors
/// [`LoadError`], with what to install.
pub fn load() -> Result<(), LoadError> {
    if FUNCTIONS.get().is_none() {
        let _ = FUNCTIONS.set(Functions::find()?);
    }
    Ok(())
}

/// Makes `fork` safe beside registered memory, where the kernel does not by itself.
/// Must come before the first registration.
///
/// # Errors
/// If the libraries can't.
pub fn prepare_for_fork() -> Result<(), super::Error> {
    // SAFETY: no arguments; the libraries are open, else the forwarder panics.
    unsafe {
        if ibv_is_fork_initialized() == IBV_FORK_DISABLED {
            return super::Error::check_number(
                "make registered memory safe for fork",
                ibv_fork_init(),
            );
        }
    }
    Ok(())
}
