// SPDX-License-Identifier: BSD-3-Clause
//! A module that falsifies the server it is loaded into, so that the next module meets one
//! that is not what it should be. Its one argument says how:
//!
//! - `version=0x00MMmmpp`: the server claims that version;
//! - `null=N`: slot N of the TCP connection type is null;
//! - `shift=N`: the slots from N on have moved on by one.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};

const OK: c_int = 0;
const ERR: c_int = 1;
/// Slots in the shortest of the tables.
const SLOTS: usize = 30;

/// Where a module's context keeps the function that looks up API functions: first of all.
type GetApi = unsafe extern "C" fn(name: *const c_char, place: *mut c_void) -> c_int;

/// Looks up one function of the module API.
///
/// # Safety
/// `context` is what the server passed, and `F` the type of the function `name`.
unsafe fn api<F>(context: *mut c_void, name: &CStr) -> Option<F> {
    let mut function: Option<F> = None;
    // SAFETY: the context begins with this pointer in every release; a function pointer's
    // Option has the pointer's own layout.
    unsafe {
        let get = *context.cast::<GetApi>();
        get(name.as_ptr(), (&raw mut function).cast());
    }
    function
}

/// The server's entry into the module.
///
/// # Safety
/// Called by the server as the module API has it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RedisModule_OnLoad(
    context: *mut c_void,
    arguments: *const *mut c_void,
    count: c_int,
) -> c_int {
    type SetAttributes = unsafe extern "C" fn(*mut c_void, *const c_char, c_int, c_int);
    type StringPtrLen = unsafe extern "C" fn(*mut c_void, *mut usize) -> *const c_char;
    // SAFETY: the API's own types; the one argument is checked to be there.
    unsafe {
        let Some(set) = api::<SetAttributes>(context, c"RedisModule_SetModuleAttribs") else {
            return ERR;
        };
        set(context, c"falsify".as_ptr(), 1, 1);
        let Some(text) = api::<StringPtrLen>(context, c"RedisModule_StringPtrLen") else {
            return ERR;
        };
        if count != 1 {
            return ERR;
        }
        let argument = CStr::from_ptr(text(*arguments, std::ptr::null_mut()));
        let Some((what, value)) = argument.to_str().ok().and_then(|text| text.split_once('='))
        else {
            return ERR;
        };
        let done = match what {
            "version" => u32::from_str_radix(value.trim_start_matches("0x"), 16)
                .ok()
                .and_then(|version| claim(version)),
            "null" => value.parse().ok().and_then(|slot| change(slot, false)),
            "shift" => value.parse().ok().and_then(|slot| change(slot, true)),
            _ => None,
        };
        if done.is_some() { OK } else { ERR }
    }
}

/// Makes the server's version function answer `version`.
///
/// # Safety
/// Rewrites code of the process, while nothing else runs it.
unsafe fn claim(version: u32) -> Option<()> {
    // SAFETY: the function is longer than the six bytes of `mov eax, version; ret`.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, c"VM_GetServerVersion".as_ptr());
        let code = [&[0xb8][..], &version.to_le_bytes(), &[0xc3]].concat();
        writable(function, code.len(), libc::PROT_EXEC)?;
        std::ptr::copy_nonoverlapping(code.as_ptr(), function.cast(), code.len());
    }
    Some(())
}

/// Nulls a slot of the TCP connection type, or moves the slots from there on by one.
///
/// # Safety
/// Changes the live table, for a server that will not run.
unsafe fn change(slot: usize, shift: bool) -> Option<()> {
    type Table = unsafe extern "C" fn() -> *mut *mut c_void;
    // SAFETY: the table has more slots than SLOTS in every release.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, c"connectionTypeTcp".as_ptr());
        if function.is_null() || slot >= SLOTS {
            return None;
        }
        let table = std::mem::transmute::<*mut c_void, Table>(function)();
        writable(table.cast(), SLOTS * size_of::<*mut c_void>(), 0)?;
        let at = table.add(slot);
        if shift {
            std::ptr::copy(at, at.add(1), SLOTS - slot - 1);
        }
        *at = std::ptr::null_mut();
    }
    Some(())
}

/// Makes the pages of `length` bytes at `address` writable.
///
/// # Safety
/// As mprotect.
unsafe fn writable(address: *mut c_void, length: usize, more: c_int) -> Option<()> {
    if address.is_null() {
        return None;
    }
    // SAFETY: whole pages around an address that is mapped.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as c_long as usize;
        let start = address as usize & !(page - 1);
        let end = (address as usize + length).next_multiple_of(page);
        let protection = libc::PROT_READ | libc::PROT_WRITE | more;
        (libc::mprotect(start as *mut c_void, end - start, protection) == 0).then_some(())
    }
}
