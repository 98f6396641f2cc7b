// SPDX-License-Identifier: BSD-3-Clause
//! Protection domains and registered memory.
//!
//! Registered memory is always a page-aligned mapping of its own, which a forked child does
//! not get. Its pages are pinned, and a kernel that makes fork safe for registered memory by
//! itself (5.12 and newer) copies those within fork: while a server saves it would stand still
//! for them, and have them twice. No child ever looks at them.

use crate::Error;
use crate::account::Share;
use crate::device::Device;
use crate::error::{REGISTER, REGISTER_WITHIN};
use crate::library::call;
use rdma_sys::*;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// A protection domain: who is in it may use each other's keys, nobody else.
#[derive(Debug)]
pub struct ProtectionDomain {
    raw: *mut ibv_pd,
    /// Open for as long as the domain is there.
    _device: Device,
}

// SAFETY: libibverbs is thread-safe, and the pointer is freed by the owner alone.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A new domain on a device.
    ///
    /// # Errors
    /// If the device has none left.
    pub fn new(device: &Device) -> Result<Self, Error> {
        // SAFETY: a live device context.
        let raw = unsafe { call!(ibv_alloc_pd(device.context())) };
        if raw.is_null() {
            return Err(Error::last("allocate a protection domain"));
        }
        Ok(Self { raw, _device: device.clone() })
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: allocated by us, freed here alone; what was made in it, which keeps it, is gone.
        unsafe { call!(ibv_dealloc_pd(self.raw)) };
    }
}

/// The access rights to a region, beside this process's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device, on our own work requests only.
    Local,
    /// The peer too, by RDMA WRITE and nothing else.
    RemoteWrite,
}

/// A scatter/gather element: registered bytes that a work request reads or writes.
#[derive(Clone, Copy)]
pub struct Sge<'region> {
    pub(crate) raw: ibv_sge,
    _region: PhantomData<&'region Region>,
}

impl Sge<'_> {
    /// The same, for a caller that sees to the region itself.
    ///
    /// # Safety
    /// The region is there until the call that posts this has returned.
    pub unsafe fn unbound(self) -> Sge<'static> {
        Sge { raw: self.raw, _region: PhantomData }
    }
}

/// A registered mapping.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    length: usize,
    raw: *mut ibv_mr,
    _share: Share,
    _domain: Arc<ProtectionDomain>,
}

// SAFETY: the region is plain memory, which its users touch by raw pointers: who may touch
// which part of it when is their business.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

fn map_and_register(
    domain: &ProtectionDomain,
    length: usize,
    access: Access,
) -> Result<(NonNull<u8>, *mut ibv_mr), Error> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(Error::last("map memory to register"));
    }
    // SAFETY: the mapping made above. A kernel that can't leaves it as it was.
    unsafe { libc::madvise(start, length, libc::MADV_DONTFORK) };
    let flags = match access {
        Access::Local => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
        Access::RemoteWrite => {
            ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
        }
    };
    // SAFETY: a live domain and a mapping of that length.
    let raw = unsafe { call!(ibv_reg_mr(domain.raw(), start, length, flags as i32)) };
    if raw.is_null() {
        let error = Error::last(REGISTER);
        // SAFETY: the mapping made above, unused.
        unsafe { libc::munmap(start, length) };
        return Err(error);
    }
    let start = NonNull::new(start.cast()).expect("mmap never succeeds at 0");
    Ok((start, raw))
}

/// Page size in bytes.
fn page_size() -> usize {
    // SAFETY: a query without arguments; it does not fail for this name.
    (unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) as usize
}

impl Region {
    /// Maps and registers `length` bytes of zeroes, rounded up to whole pages.
    ///
    /// # Errors
    /// `ENOMEM` beyond the limit on locked memory, `EDQUOT` beyond
    /// [`limit_registered`](crate::account::limit_registered).
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        length: usize,
        access: Access,
    ) -> Result<Self, Error> {
        let length = length.next_multiple_of(page_size());
        let beyond = Error { action: REGISTER_WITHIN, errno: libc::EDQUOT };
        let share = Share::take(length as u64).ok_or(beyond)?;
        let (start, raw) = map_and_register(domain, length, access)?;
        share.count();
        Ok(Self { start, length, raw, _share: share, _domain: Arc::clone(domain) })
    }

    /// Start of the mapping, which is also the address that a peer must use.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes, a multiple of the page size.
    pub fn length(&self) -> usize {
        self.length
    }

    /// `length` bytes from `offset` on, for a work request.
    ///
    /// # Panics
    /// If they are not all in the region.
    pub fn sge(&self, offset: usize, length: u32) -> Sge<'_> {
        let end = offset.checked_add(length as usize);
        assert!(end.is_some_and(|end| end <= self.length), "{length} bytes at {offset}");
        // SAFETY: live as long as `self`.
        let lkey = unsafe { (*self.raw).lkey };
        let addr = self.start.as_ptr().addr() + offset;
        Sge { raw: ibv_sge { addr: addr as u64, length, lkey }, _region: PhantomData }
    }

    /// Key by which the peer's work requests name the region.
    pub fn rkey(&self) -> u32 {
        // SAFETY: live as long as `self`.
        unsafe { (*self.raw).rkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered and mapped by us, released here alone. After the
        // registration is gone no device writes there any more.
        unsafe {
            call!(ibv_dereg_mr(self.raw));
            libc::munmap(self.start.as_ptr().cast(), self.length);
        }
    }
}
