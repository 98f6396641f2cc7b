// SPDX-License-Identifier: BSD-3-Clause
//! A module that falsifies the server it is loaded into, so that the next module meets one
//! that is not what it should be. Its one argument says how:
//!
//! - `version=0x00MMmmpp`: the server claims that version;
//! - `null=N`: slot N of the TCP connection type is null;
//! - `null-tls=N`: the same in the TLS type;
//! - `shift=N`: the slots from N on have moved on by one;
//! - `cut=N`: the table ends before slot N, and something else lies there;
//! - `swap=N`: slots N and N+1 have each other's function;
//! - `larger=N`: slot N, which makes connections, makes larger ones;
//! - `moved=N`: it makes some with a member more in front of the descriptor;
//! - `hide=NAME`: the executable does not export the function of that name;
//! - `readonly=1`: the TCP connection type can't be written to.

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
use std::sync::OnceLock;

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
            "null" => value.parse().ok().and_then(|slot| change(c"tcp", slot, Change::Null)),
            "shift" => value.parse().ok().and_then(|slot| change(c"tcp", slot, Change::Shift)),
            "null-tls" => value.parse().ok().and_then(|slot| change(c"tls", slot, Change::Null)),
            "cut" => value.parse().ok().and_then(|slot| change(c"tcp", slot, Change::Cut)),
            "swap" => value.parse().ok().and_then(|slot| change(c"tcp", slot, Change::Swap)),
            "larger" => value.parse().ok().and_then(|slot| make_others(context, slot, 64 + 24, 16)),
            "moved" => value.parse().ok().and_then(|slot| make_others(context, slot, 64 + 8, 24)),
            "hide" => CString::new(value).ok().and_then(|name| hide(&name)),
            "readonly" => table(c"tcp").and_then(|table| read_only(table.cast())),
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

/// Gives an exported function another name.
///
/// # Safety
/// Changes the executable's table of names, while nobody else looks for one.
unsafe fn hide(name: &CStr) -> Option<()> {
    // SAFETY: numbers and pointers, where zeros are valid; the name that is found is the
    // executable's own.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr());
        let mut found: libc::Dl_info = std::mem::zeroed();
        if function.is_null() || libc::dladdr(function, &mut found) == 0 {
            return None;
        }
        let own = found.dli_sname.cast_mut();
        if own.is_null() || CStr::from_ptr(own) != name {
            return None;
        }
        writable(own.cast(), name.count_bytes(), 0)?;
        *own = b'?' as c_char;
    }
    Some(())
}

/// Makes the pages of a table what they are not.
///
/// # Safety
/// A server that writes to these pages ends.
unsafe fn read_only(table: *mut c_void) -> Option<()> {
    // SAFETY: whole pages around an address that is mapped.
    unsafe {
        let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
        let start = table as usize & !(page - 1);
        let end = (table as usize + SLOTS * size_of::<*mut c_void>()).next_multiple_of(page);
        let done = libc::mprotect(start as *mut c_void, end - start, libc::PROT_READ) == 0;
        done.then_some(())
    }
}

/// What becomes of a table from a slot on.
enum Change {
    Null,
    Shift,
    Cut,
    Swap,
}

/// The table of the TCP or the TLS type.
///
/// # Safety
/// The server has registered its types.
unsafe fn table(kind: &CStr) -> Option<*mut *mut c_void> {
    type Table = unsafe extern "C" fn() -> *mut *mut c_void;
    let name = if kind == c"tls" { c"connectionTypeTls" } else { c"connectionTypeTcp" };
    // SAFETY: functions of this type in every release.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr());
        if function.is_null() {
            return None;
        }
        let table = std::mem::transmute::<*mut c_void, Table>(function)();
        (!table.is_null()).then_some(table)
    }
}

/// Changes the slots of a connection type.
///
/// # Safety
/// Changes the live table, for a server that will not run.
unsafe fn change(kind: &CStr, slot: usize, change: Change) -> Option<()> {
    if slot > SLOTS + 1 {
        return None;
    }
    // SAFETY: behind the table's SLOTS there are more in most releases, and else there is other
    // data of the server, which will not run.
    unsafe {
        let table = table(kind)?;
        let end = SLOTS + 2;
        writable(table.cast(), end * size_of::<*mut c_void>(), 0)?;
        let at = table.add(slot);
        match change {
            Change::Null => *at = std::ptr::null_mut(),
            // Slot N keeps what it had: only at the end something is where nothing should be.
            Change::Shift => std::ptr::copy(at, at.add(1), end - slot - 1),
            Change::Cut => (slot..end).for_each(|slot| {
                *table.add(slot) = std::ptr::without_provenance_mut(0x4141_4141);
            }),
            Change::Swap => std::ptr::swap(at, at.add(1)),
        }
    }
    Some(())
}

/// The server's function that allocates zeros: so many items of a size.
type Zeros = unsafe extern "C" fn(usize, usize) -> *mut c_void;

/// What [`other`] makes.
struct Other {
    zeros: Zeros,
    /// The TCP type, as an address.
    kind: usize,
    size: usize,
    /// Where the descriptor is.
    descriptor: usize,
}

static OTHER: OnceLock<Other> = OnceLock::new();

/// Makes a connection as the server does, but for its size and where its descriptor is.
unsafe extern "C" fn other() -> *mut c_void {
    let Some(other) = OTHER.get() else { return std::ptr::null_mut() };
    // SAFETY: the server's own function; all members are within the size.
    unsafe {
        let connection = (other.zeros)(1, other.size);
        connection.cast::<usize>().write(other.kind);
        connection.byte_add(other.descriptor).cast::<c_int>().write(-1);
        connection.byte_add(other.descriptor + 8).cast::<u16>().write(1024);
        connection
    }
}

/// Has the function in a slot of the TCP type jump to [`other`].
///
/// # Safety
/// Rewrites code of the process, while nothing else runs it; `context` is the server's.
unsafe fn make_others(
    context: *mut c_void,
    slot: usize,
    size: usize,
    descriptor: usize,
) -> Option<()> {
    // SAFETY: a function that makes a connection is longer than the twelve bytes of
    // `mov rax, address; jmp rax`.
    unsafe {
        let table = table(c"tcp")?;
        let zeros = api::<Zeros>(context, c"RedisModule_Calloc")?;
        OTHER.set(Other { zeros, kind: table as usize, size, descriptor }).ok()?;
        let function = *table.add(slot);
        let target = (other as *const () as u64).to_le_bytes();
        let code = [&[0x48, 0xb8][..], &target, &[0xff, 0xe0]].concat();
        writable(function, code.len(), libc::PROT_EXEC)?;
        std::ptr::copy_nonoverlapping(code.as_ptr(), function.cast(), code.len());
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
