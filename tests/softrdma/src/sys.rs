// SPDX-License-Identifier: BSD-3-Clause
//! The few system calls that the fabric stands on, with owners for what they return.

use crate::fork;
use std::io::{Error, Result};
use std::mem::{size_of, zeroed};
use std::os::fd::RawFd;
use std::ptr;

/// A descriptor that is closed when its owner goes.
#[derive(Debug)]
pub struct Fd {
    raw: RawFd,
    private: bool,
}

impl Fd {
    /// Takes a descriptor that only this process may hold: a forked child closes it.
    pub fn private(raw: RawFd) -> Fd {
        fork::note(raw);
        Fd { raw, private: true }
    }

    /// Takes a descriptor that the application sees; a child may keep it.
    pub fn visible(raw: RawFd) -> Fd {
        Fd { raw, private: false }
    }

    pub fn raw(&self) -> RawFd {
        self.raw
    }

    /// Closes the descriptor of an owner that is never dropped.
    pub fn close_early(&self) {
        // SAFETY: the owner is not used any more.
        unsafe { libc::close(self.raw) };
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if fork::in_child() {
            return;
        }
        if self.private {
            fork::forget(self.raw);
        }
        // SAFETY: we own it, and this is its only close.
        unsafe { libc::close(self.raw) };
    }
}

fn check(ret: i32) -> Result<i32> {
    if ret < 0 { Err(Error::last_os_error()) } else { Ok(ret) }
}

/// A blocking event counter of which each read takes one.
pub fn event_counter() -> Result<Fd> {
    // SAFETY: no pointers.
    check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_SEMAPHORE) }).map(Fd::visible)
}

/// A doorbell: written by another process, watched edge-triggered, never read.
pub fn doorbell() -> Result<Fd> {
    // SAFETY: no pointers.
    check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(Fd::private)
}

/// Adds one to an event counter or doorbell.
pub fn signal(fd: &Fd) {
    let one = 1u64;
    // SAFETY: eight valid bytes; a full counter is already readable.
    unsafe { libc::write(fd.raw, (&raw const one).cast(), 8) };
}

/// Takes one from an event counter without waiting, whatever the descriptor's
/// mode; false if there was none.
pub fn take(fd: &Fd) -> bool {
    let mut n = 0u64;
    let iov = libc::iovec { iov_base: (&raw mut n).cast(), iov_len: 8 };
    // SAFETY: eight valid bytes.
    unsafe { libc::preadv2(fd.raw, &raw const iov, 1, -1, libc::RWF_NOWAIT) == 8 }
}

/// Takes one signal off, waiting for one unless the descriptor is non-blocking.
pub fn await_signal(fd: &Fd) -> Result<()> {
    let mut n = 0u64;
    // SAFETY: eight valid bytes.
    check(unsafe { libc::read(fd.raw, (&raw mut n).cast(), 8) } as i32).map(drop)
}

fn in_error(fd: &Fd) -> bool {
    let mut p = libc::pollfd { fd: fd.raw, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut p, 1, 0) };
    p.revents & libc::POLLERR != 0
}

/// Makes an event counter poll as in error, for as long as nobody reads it. The kernel does so
/// when a counter overflows, which a write can't bring about, but the completion of an
/// asynchronous read of the file system can.
pub fn put_in_error(fd: &Fd) {
    /// `struct iocb` of linux/aio_abi.h.
    #[repr(C)]
    struct Iocb {
        data: u64,
        key: u32,
        rw_flags: i32,
        opcode: u16,
        priority: i16,
        file: u32,
        buffer: u64,
        bytes: u64,
        offset: i64,
        reserved: u64,
        flags: u32,
        counter: u32,
    }
    const READ: u16 = 0;
    const TELL_COUNTER: u32 = 1;
    if in_error(fd) {
        return;
    }
    let full = u64::MAX - 1;
    // SAFETY: valid buffers and a structure as the kernel's; the request is over when the
    // context of the asynchronous input is destroyed.
    unsafe {
        // Nobody who writes to it from now on may be made to wait.
        let flags = libc::fcntl(fd.raw, libc::F_GETFL);
        libc::fcntl(fd.raw, libc::F_SETFL, flags | libc::O_NONBLOCK);
        let zero = libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        assert!(zero >= 0, "softrdma: no /dev/zero");
        let mut context = 0_u64;
        let made = libc::syscall(libc::SYS_io_setup, 1, &raw mut context);
        assert!(made == 0, "softrdma: no asynchronous input");
        // What is left of one that was in error already is too much to be taken off.
        if !(0..1000).all(|_| take(fd)) {
            libc::write(fd.raw, (&raw const full).cast(), 8);
        }
        let mut byte = 0_u8;
        let mut request = Iocb {
            data: 0,
            key: 0,
            rw_flags: 0,
            opcode: READ,
            priority: 0,
            file: zero as u32,
            buffer: (&raw mut byte) as u64,
            bytes: 1,
            offset: 0,
            reserved: 0,
            flags: TELL_COUNTER,
            counter: fd.raw as u32,
        };
        let mut requests = [&raw mut request];
        while !in_error(fd) {
            let told = libc::syscall(libc::SYS_io_submit, context, 1, requests.as_mut_ptr());
            assert!(told == 1 || told == -1 && *libc::__errno_location() == libc::EAGAIN);
        }
        libc::syscall(libc::SYS_io_destroy, context);
        libc::close(zero);
    }
}

/// Waits until a descriptor is readable; a negative timeout is none.
pub fn wait_readable(fd: &Fd, timeout_ms: i32) -> Result<bool> {
    let mut p = libc::pollfd { fd: fd.raw, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    check(unsafe { libc::poll(&raw mut p, 1, timeout_ms) }).map(|n| n > 0)
}

/// Anonymous memory that can be handed to another process.
pub fn shared_memory(size: usize) -> Result<Fd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a constant, terminated name.
    let fd = check(unsafe { libc::memfd_create(c"softrdma".as_ptr(), flags) }).map(Fd::private)?;
    // SAFETY: no pointers.
    check(unsafe { libc::ftruncate(fd.raw, size as i64) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.raw, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) })?;
    Ok(fd)
}

/// True if memory that another process made is of that size and stays so: a
/// mapping beyond its end would be a trap.
pub fn lasting_size(fd: &Fd, size: usize) -> bool {
    // SAFETY: zeroes are a valid stat, which the call fills.
    unsafe {
        let mut stat: libc::stat = zeroed();
        libc::fstat(fd.raw, &raw mut stat) == 0
            && stat.st_size == size as i64
            && libc::fcntl(fd.raw, libc::F_GET_SEALS) & libc::F_SEAL_SHRINK != 0
    }
}

/// How much of shared memory exists.
#[cfg(test)]
pub fn resident(fd: &Fd) -> usize {
    // SAFETY: zeroes are a valid stat, which the call fills.
    unsafe {
        let mut stat: libc::stat = zeroed();
        libc::fstat(fd.raw, &raw mut stat);
        stat.st_blocks as usize * 512
    }
}

/// What tells one piece of shared memory from every other that exists.
pub fn identity(fd: &Fd) -> Result<(u64, u64)> {
    // SAFETY: zeroes are a valid stat, which the call fills.
    unsafe {
        let mut stat: libc::stat = zeroed();
        check(libc::fstat(fd.raw, &raw mut stat))?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

/// Maps shared memory; a forked child does not get the mapping.
pub fn map_shared(fd: &Fd, size: usize) -> Result<*mut u8> {
    // SAFETY: a new mapping, nothing existing is replaced.
    let p = unsafe {
        libc::mmap(
            ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.raw,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    // SAFETY: the range was mapped just above.
    unsafe { libc::madvise(p, size, libc::MADV_DONTFORK) };
    Ok(p.cast())
}

/// An unconnected sequenced-packet socket.
pub fn packet_socket() -> Result<Fd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers.
    check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) }).map(Fd::private)
}

/// An address in the abstract namespace: scoped by the network namespace, and
/// gone with the last descriptor, so that a killed process leaves nothing behind.
fn abstract_address(name: &str) -> (libc::sockaddr_un, libc::socklen_t) {
    // SAFETY: all zeroes is a valid sockaddr_un.
    let mut sa: libc::sockaddr_un = unsafe { zeroed() };
    sa.sun_family = libc::AF_UNIX as _;
    for (dst, src) in sa.sun_path[1..].iter_mut().zip(name.bytes()) {
        *dst = src as _;
    }
    (sa, (size_of::<libc::sa_family_t>() + 1 + name.len()) as _)
}

pub fn bind_abstract(fd: &Fd, name: &str) -> Result<()> {
    let (sa, len) = abstract_address(name);
    // SAFETY: a valid address of that length.
    check(unsafe { libc::bind(fd.raw, (&raw const sa).cast(), len) }).map(drop)
}

pub fn connect_abstract(fd: &Fd, name: &str) -> Result<()> {
    let (sa, len) = abstract_address(name);
    // SAFETY: a valid address of that length.
    check(unsafe { libc::connect(fd.raw, (&raw const sa).cast(), len) }).map(drop)
}

/// Ends a connection for both sides.
pub fn shut_down(fd: &Fd) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(fd.raw, libc::SHUT_RDWR) };
}

pub fn listen(fd: &Fd, backlog: i32) -> Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::listen(fd.raw, backlog) }).map(drop)
}

pub fn accept(fd: &Fd) -> Result<Fd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for.
    check(unsafe { libc::accept4(fd.raw, ptr::null_mut(), ptr::null_mut(), flags) })
        .map(Fd::private)
}

const MAX_FDS: usize = 4;

/// A control-message buffer, aligned as cmsghdr wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends one packet with descriptors attached.
pub fn send_packet(fd: &Fd, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
    assert!(fds.len() <= MAX_FDS);
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    // SAFETY: all pointers outlive the call; the control buffer has room for
    // MAX_FDS descriptors and is laid out with the CMSG macros.
    unsafe {
        let mut msg: libc::msghdr = zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        if !fds.is_empty() {
            let size = size_of_val(fds) as u32;
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(size) as usize;
            let c = libc::CMSG_FIRSTHDR(&raw const msg);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(size) as usize;
            ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(c).cast(), fds.len());
        }
        check(libc::sendmsg(fd.raw, &raw const msg, libc::MSG_NOSIGNAL) as i32).map(drop)
    }
}

/// Receives one packet; `Ok(0)` is the end of the connection.
pub fn recv_packet(fd: &Fd, bytes: &mut [u8], fds: &mut Vec<Fd>) -> Result<usize> {
    let mut control = Control([0; 64]);
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all pointers outlive the call; received descriptors are read only
    // within the length that the kernel reports.
    unsafe {
        let mut msg: libc::msghdr = zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.0.as_mut_ptr().cast();
        msg.msg_controllen = control.0.len();
        let n = check(libc::recvmsg(fd.raw, &raw mut msg, libc::MSG_CMSG_CLOEXEC) as i32)?;
        let mut c = libc::CMSG_FIRSTHDR(&raw const msg);
        while !c.is_null() {
            if (*c).cmsg_level == libc::SOL_SOCKET && (*c).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*c).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<RawFd>() {
                    let raw = ptr::read_unaligned(libc::CMSG_DATA(c).cast::<RawFd>().add(i));
                    fds.push(Fd::private(raw));
                }
            }
            c = libc::CMSG_NXTHDR(&raw const msg, c);
        }
        Ok(n as usize)
    }
}

/// Sets errno, as the C interfaces report their failures.
pub fn set_errno(code: i32) {
    // SAFETY: errno is a valid thread-local.
    unsafe { *libc::__errno_location() = code };
}
