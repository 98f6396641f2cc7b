// SPDX-License-Identifier: BSD-3-Clause
//! What a server does when it is asked, compared with what its layout promises, before
//! anything of ours is registered: how a connection type tells which it is, and what a
//! new TCP connection looks like.
//!
//! The functions that are called may be others than expected. So each gets a connection
//! that is good for any of them, and what comes back is copied by the kernel, which answers
//! a wrong address with an error.

use super::connection::{Connection, State};
use super::difference::Difference;
use super::fingerprint::executable;
use super::line::Line;
use redis_module::raw;
use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::null_mut;

/// `IOV_MAX` of Linux, which the server's TCP connections have as `iovcnt`.
const IOV_MAX: u16 = 1024;

/// So many connections are made, and so many pieces of memory of ours: an allocator may give a
/// remnant of another size to one of them.
const SAMPLES: usize = 8;

/// A slot whose function takes a connection, if anything.
type Slot<T> = unsafe extern "C" fn(*mut Connection, *mut c_void, usize, usize, usize) -> T;

/// Asks the TCP type of a server of `line` what it is and for a new connection.
///
/// # Errors
/// The first [`Difference`].
///
/// # Safety
/// `table` is the server's TCP table, which has passed its fingerprint. Main thread.
pub unsafe fn tcp(line: Line, table: *const c_void) -> Result<(), Difference> {
    // SAFETY: functions of the server, as the fingerprint has made sure; see the module's text.
    unsafe {
        let get_type: Slot<usize> = slot(line, table, "get_type");
        says_tcp(line, get_type(&mut Dummy::new(table).connection, null_mut(), 0, 0, 0))?;
        let create: Slot<*mut Connection> = slot(line, table, "conn_create");
        let close: Slot<()> = slot(line, table, "close");
        let make = || create(&mut Dummy::new(table).connection, null_mut(), 0, 0, 0);
        let close = |connection| close(connection, null_mut(), 0, 0, 0);
        let new = make();
        is_new(&copy(new)?, table)?;
        close(new);
        sizes(make, close)
    }
}

/// Compares the size of the server's connections with that of pieces of memory of ours, from
/// the same allocator and at the same time.
///
/// # Errors
/// The connections are larger or smaller.
///
/// # Safety
/// `make` gives a connection of the server, and `close` takes one. Main thread.
unsafe fn sizes(
    make: impl Fn() -> *mut Connection,
    close: impl Fn(*mut Connection),
) -> Result<(), Difference> {
    // SAFETY: pointers that the server has set before it called us.
    let functions = unsafe {
        (raw::RedisModule_MallocUsableSize, raw::RedisModule_Alloc, raw::RedisModule_Free)
    };
    let (Some(usable_size), Some(alloc), Some(free)) = functions else { return Ok(()) };
    // SAFETY: memory of the server's allocator, given back once.
    unsafe {
        let pieces = [(); SAMPLES].map(|()| (alloc(size_of::<Connection>()), make()));
        let ours = pieces.map(|(ours, _)| usable_size(ours));
        let theirs = pieces.map(|(_, theirs)| usable_size(theirs.cast()));
        for (ours, theirs) in pieces {
            free(ours);
            close(theirs);
        }
        same_size(ours, theirs)
    }
}

/// A connection that does no harm to any function of a connection type: it has no descriptor,
/// and who would free it sees that it is in use. Taken for a listener it has no descriptors
/// either, and no addresses.
#[repr(C)]
struct Dummy {
    connection: Connection,
    rest: [u64; 8],
}

impl Dummy {
    fn new(table: *const c_void) -> Self {
        let mut connection = Connection::new(table, State::None, IOV_MAX);
        connection.refs = 1;
        Self { connection, rest: [0; 8] }
    }
}

/// The function in a slot.
///
/// # Safety
/// `table` is of this line, and `F` a function's type.
unsafe fn slot<F>(line: Line, table: *const c_void, name: &str) -> F {
    let member = line.head().iter().find(|(member, _)| *member == name);
    let (_, offset) = member.expect("a member of every line");
    // SAFETY: by the caller's promise; the fingerprint has seen that it is not null.
    unsafe { table.byte_add(*offset).cast::<F>().read() }
}

/// Whether `get_type` has answered as the TCP type does: with its number or its name.
fn says_tcp(line: Line, answer: usize) -> Result<(), Difference> {
    let readable = |address: usize| {
        executable(libc::PF_R).iter().any(|it| it.start <= address && address + 4 <= it.end)
    };
    let right = if line.numbers_types() {
        // An int: the register's other half is anything.
        answer as u32 == 0
    } else {
        // SAFETY: four bytes of the executable.
        readable(answer) && unsafe { (answer as *const [u8; 4]).read() } == *b"tcp\0"
    };
    match right {
        true => Ok(()),
        false => Err(Difference::Type { answer, numbered: line.numbers_types() }),
    }
}

/// A connection's memory, as far as we know it.
type Bytes = [u8; size_of::<Connection>()];

/// Whether a connection is as `conn_create` of the TCP type makes it.
fn is_new(bytes: &Bytes, table: *const c_void) -> Result<(), Difference> {
    let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let int = |at: usize| i32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let short = |at: usize| i16::from_ne_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    let members: [(&'static str, i64, i64); 11] = [
        ("type", long(offset_of!(Connection, kind)) as i64, table as i64),
        ("state", int(offset_of!(Connection, state)).into(), State::None as i64),
        ("last_errno", int(offset_of!(Connection, last_errno)).into(), 0),
        ("fd", int(offset_of!(Connection, fd)).into(), -1),
        ("flags", short(offset_of!(Connection, flags)).into(), 0),
        ("refs", short(offset_of!(Connection, refs)).into(), 0),
        ("iovcnt", short(offset_of!(Connection, iovcnt)).into(), IOV_MAX.into()),
        ("private_data", long(offset_of!(Connection, private_data)) as i64, 0),
        ("conn_handler", long(offset_of!(Connection, conn_handler)) as i64, 0),
        ("write_handler", long(offset_of!(Connection, write_handler)) as i64, 0),
        ("read_handler", long(offset_of!(Connection, read_handler)) as i64, 0),
    ];
    match members.into_iter().find(|(_, found, expected)| found != expected) {
        None => Ok(()),
        Some((member, found, expected)) => Err(Difference::Connection { member, found, expected }),
    }
}

/// Whether connections have the size that we know, from what the allocator made of requests
/// for that size (`ours`) and of the server's requests (`theirs`), in bytes. It may make
/// more than one size of the same request: glibc adds a remnant of up to 16 bytes that is
/// too small for a piece of its own. So the smallest of theirs has to be one that ours can have.
fn same_size(ours: [usize; SAMPLES], theirs: [usize; SAMPLES]) -> Result<(), Difference> {
    let size = size_of::<Connection>();
    let smallest = theirs.into_iter().min().expect("some samples");
    let largest = ours.into_iter().max().expect("some samples");
    match (size..=largest).contains(&smallest) {
        true => Ok(()),
        false => Err(Difference::Size { found: smallest, expected: largest }),
    }
}

/// The memory at an address, or that it is no memory.
fn copy(from: *const Connection) -> Result<Bytes, Difference> {
    let mut ends = [0; 2];
    // SAFETY: a place for two descriptors, which are new and nobody else's.
    let (mut reader, writer) = unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) != 0 {
            return Err(Difference::NoPipe(io::Error::last_os_error().raw_os_error().unwrap_or(0)));
        }
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    };
    let mut bytes = [0; size_of::<Connection>()];
    // SAFETY: the kernel looks whether the memory is there.
    let written = unsafe { libc::write(writer.as_raw_fd(), from.cast(), bytes.len()) };
    if written != bytes.len() as isize || reader.read_exact(&mut bytes).is_err() {
        return Err(Difference::NoConnection(from.addr()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(connection: &Connection) -> Bytes {
        copy(connection).unwrap()
    }

    fn table() -> *const c_void {
        std::ptr::without_provenance(0x5540)
    }

    #[test]
    fn a_new_connection_is_known() {
        let connection = Connection::new(table(), State::None, IOV_MAX);
        assert_eq!(is_new(&bytes(&connection), table()), Ok(()));
    }

    #[test]
    fn whatever_is_elsewhere_in_a_connection_is_named() {
        let good = bytes(&Connection::new(table(), State::None, IOV_MAX));
        for (at, name) in [
            (0, "type"),
            (8, "state"),
            (12, "last_errno"),
            (16, "fd"),
            (20, "flags"),
            (22, "refs"),
            (24, "iovcnt"),
            (32, "private_data"),
            (40, "conn_handler"),
            (48, "write_handler"),
            (56, "read_handler"),
        ] {
            let mut other = good;
            other[at] ^= 0x55;
            let why = is_new(&other, table()).unwrap_err().to_string();
            assert!(why.contains(&format!("`{name}`")), "{at}: {why}");
        }
        // A member more in front of the descriptor.
        let mut moved = good;
        moved.copy_within(16..56, 24);
        moved[16..24].fill(0);
        assert!(is_new(&moved, table()).unwrap_err().to_string().contains("`fd`"));
    }

    #[test]
    fn what_is_no_memory_is_an_error() {
        for address in [0, 1, 0x8000_0000_0000_0000, usize::MAX - 63] {
            assert!(copy(std::ptr::without_provenance(address)).is_err(), "{address:#x}");
        }
    }

    /// The sizes that glibc's allocator gives for 64 bytes: 72, and 88 from a remnant.
    #[test]
    fn allocators_may_round_up_and_members_may_not_be_added() {
        let mixed = [72, 88, 72, 72, 88, 72, 72, 72];
        for (ours, theirs) in [
            ([64; SAMPLES], [64; SAMPLES]),
            ([72; SAMPLES], [72; SAMPLES]),
            ([72; SAMPLES], mixed),
            (mixed, [88; SAMPLES]),
        ] {
            assert_eq!(same_size(ours, theirs), Ok(()));
        }
        for (ours, theirs) in [
            ([64; SAMPLES], [80; SAMPLES]),
            ([72; SAMPLES], [88; SAMPLES]),
            ([72; SAMPLES], [56; SAMPLES]),
            (mixed, [104; SAMPLES]),
        ] {
            assert!(same_size(ours, theirs).is_err(), "{ours:?} {theirs:?}");
        }
    }

    #[test]
    fn a_type_tells_its_name_or_its_number() {
        static NAME: &[u8; 5] = b"tcp\0.";
        let name = NAME.as_ptr() as usize;
        for line in Line::ALL {
            assert_eq!(says_tcp(line, 0).is_ok(), line.numbers_types());
            assert_eq!(says_tcp(line, name).is_ok(), !line.numbers_types(), "{line}");
            assert!(says_tcp(line, 3).is_err());
            assert!(says_tcp(line, name + 1).is_err());
        }
    }
}
