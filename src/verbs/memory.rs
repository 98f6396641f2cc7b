// SPDX-License-Identifier: BSD-3-Clause
//! Protection domains and registered memory.
//!
//! Registered memory is always a page-aligned mapping of its own, which a forked child does
//! not get. Its pages are pinned, and a kernel that makes fork safe for registered memory by
//! itself (5.12 and newer) copies those within fork: while a server saves it would stand still
//! for them, and have them twice. No child ever looks at them. What is registered is pinned, so it is resident from the start, and
//! neither `maxmemory` nor the allocator's statistics see it; the counters here do.

use super::cm::Device;
use super::error::REGISTER;
use super::{Error, library};
use rdma_sys::*;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

static REGISTERED: AtomicU64 = AtomicU64::new(0);
static REGISTERED_PEAK: AtomicU64 = AtomicU64::new(0);
static REGISTRATIONS: AtomicU64 = AtomicU64::new(0);
static REGISTERED_LIMIT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Bytes that are registered now, and the most that ever were at one time.
pub fn registered() -> (u64, u64) {
    (REGISTERED.load(Ordering::Relaxed), REGISTERED_PEAK.load(Ordering::Relaxed))
}

/// Regions that were registered so far.
pub fn registrations() -> u64 {
    REGISTRATIONS.load(Ordering::Relaxed)
}

/// Runs `trial`, which gives back all that it registers: none of it counts among the most
/// that was registered. (What another thread registers meanwhile counts if it is still there
/// in the end.)
pub fn uncounted<T>(trial: impl FnOnce() -> T) -> T {
    let peak = REGISTERED_PEAK.load(Ordering::Relaxed);
    let result = trial();
    let peak = peak.max(REGISTERED.load(Ordering::Relaxed));
    REGISTERED_PEAK.store(peak, Ordering::Relaxed);
    result
}

/// From now on a registration that would take the total above `bytes` fails.
pub fn limit_registered(bytes: u64) {
    REGISTERED_LIMIT.store(bytes, Ordering::Relaxed);
}

/// A protection domain: who is in it may use each other's keys, nobody else.
#[derive(Debug)]
pub struct ProtectionDomain {
    raw: *mut ibv_pd,
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
    pub fn new(device: Device) -> Result<Self, Error> {
        // SAFETY: a live device context.
        let raw = unsafe { library::ibv_alloc_pd(device.0) };
        if raw.is_null() {
            return Err(Error::last("allocate a protection domain"));
        }
        Ok(Self { raw })
    }

    pub(super) fn raw(&self) -> *mut ibv_pd {
        self.raw
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: allocated by us, freed here alone.
        unsafe { library::ibv_dealloc_pd(self.raw) };
    }
}

/// Who may touch a region besides this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device, on our own work requests only.
    Local,
    /// The peer too, by RDMA WRITE and nothing else.
    RemoteWrite,
}

/// A registered mapping.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    length: usize,
    raw: *mut ibv_mr,
}

// SAFETY: the region is plain memory; who may touch which part of it when is the
// business of `window`, whose users go through raw pointers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// Page size in bytes.
fn page_size() -> usize {
    // SAFETY: a query without arguments; it does not fail for this name.
    (unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) as usize
}

impl Region {
    /// Maps and registers `length` bytes of zeroes, rounded up to whole pages.
    ///
    /// # Errors
    /// `ENOMEM` if the limit on locked memory or [`limit_registered`] forbids it.
    pub fn new(domain: &ProtectionDomain, length: usize, access: Access) -> Result<Self, Error> {
        let length = length.next_multiple_of(page_size());
        let total = REGISTERED.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
        let region = if total > REGISTERED_LIMIT.load(Ordering::Relaxed) {
            Err(Error {
                action: "register memory within the configured total (max-registered-memory)",
                errno: libc::EDQUOT,
            })
        } else {
            Self::map_and_register(domain, length, access)
        };
        match region {
            Ok(_) => {
                REGISTRATIONS.fetch_add(1, Ordering::Relaxed);
                REGISTERED_PEAK.fetch_max(total, Ordering::Relaxed);
            }
            Err(_) => {
                REGISTERED.fetch_sub(length as u64, Ordering::Relaxed);
            }
        }
        region
    }

    fn map_and_register(
        domain: &ProtectionDomain,
        length: usize,
        access: Access,
    ) -> Result<Self, Error> {
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
                ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
                    | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
            }
        };
        // SAFETY: a live domain and a mapping of that length.
        let raw = unsafe { library::ibv_reg_mr(domain.raw(), start, length, flags as i32) };
        if raw.is_null() {
            let error = Error::last(REGISTER);
            // SAFETY: the mapping made above, unused.
            unsafe { libc::munmap(start, length) };
            return Err(error);
        }
        let start = NonNull::new(start.cast()).expect("mmap never succeeds at 0");
        Ok(Self { start, length, raw })
    }

    /// Start of the mapping, which is also the address that a peer must use.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Length in bytes, a multiple of the page size.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Key for our own work requests.
    pub fn local_key(&self) -> u32 {
        // SAFETY: live as long as `self`.
        unsafe { (*self.raw).lkey }
    }

    /// Key for the peer's.
    pub fn remote_key(&self) -> u32 {
        // SAFETY: live as long as `self`.
        unsafe { (*self.raw).rkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered and mapped by us, released here alone. After the
        // registration is gone no device writes there any more.
        unsafe {
            library::ibv_dereg_mr(self.raw);
            libc::munmap(self.start.as_ptr().cast(), self.length);
        }
        REGISTERED.fetch_sub(self.length as u64, Ordering::Relaxed);
    }
}
