// SPDX-License-Identifier: BSD-3-Clause
//! Protection domains, memory regions and memory windows.

use super::context::{Context, limit, unique};
use crate::fault::{self, Point};
use crate::habits::Habits;
use crate::handle;
use crate::keys::{self, Grant};
use rdma_sys::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// A protection domain.
#[repr(C)]
pub struct Pd {
    pub c: ibv_pd,
    pub id: u64,
    pub context: Arc<Context>,
    users: AtomicUsize,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

/// Something in a protection domain, which can't be deallocated meanwhile.
pub struct InPd {
    pub pd: Arc<Pd>,
    released: AtomicBool,
}

impl InPd {
    pub fn new(pd: Arc<Pd>) -> InPd {
        pd.users.fetch_add(1, Ordering::Relaxed);
        InPd { pd, released: AtomicBool::new(false) }
    }

    /// Leaves the domain now: the application has destroyed the object, though
    /// the progress thread may still hold it for a moment.
    pub fn release(&self) {
        if !self.released.swap(true, Ordering::Relaxed) {
            self.pd.users.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
impl Drop for InPd {
    fn drop(&mut self) {
        self.release();
    }
}

impl Pd {
    pub fn new(context: Arc<Context>) -> Result<Arc<Pd>, i32> {
        PDS.add(context.habits(), context.habits().max_pd)?;
        let id = unique();
        let c = ibv_pd { context: context.as_c(), handle: id as u32 };
        Ok(Arc::new(Pd { c, id, context, users: AtomicUsize::new(0) }))
    }

    pub fn busy(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        PDS.remove();
    }
}

/// How many of a limited resource the process has.
struct Count(AtomicI32);

impl Count {
    /// One more, unless that were more than there may be.
    fn add(&self, habits: &Habits, most: i32) -> Result<(), i32> {
        let add = |count| (count < most).then_some(count + 1);
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(habits.at_limit),
        }
    }

    fn remove(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

static PDS: Count = Count(AtomicI32::new(0));
static MRS: Count = Count(AtomicI32::new(0));

/// A memory region.
#[repr(C)]
pub struct Mr {
    c: ibv_mr,
    pd: InPd,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

/// Bytes registered: what a device would have locked.
static LOCKED: AtomicU64 = AtomicU64::new(0);

/// True if every page of the range is mapped.
fn mapped(addr: usize, length: usize) -> bool {
    let page = 4096;
    let mut at = addr & !(page - 1);
    let end = addr + length;
    let mut vec = [0u8; 4096];
    while at < end {
        let n = (end - at).min(vec.len() * page);
        // SAFETY: `vec` has a byte for each page asked about.
        if unsafe { libc::mincore(at as *mut _, n, vec.as_mut_ptr()) } != 0 {
            return false;
        }
        at += n;
    }
    true
}

/// Registers memory; the error is an errno.
pub fn register(
    pd: Arc<Pd>,
    addr: *mut u8,
    length: usize,
    iova: u64,
    access: u32,
) -> Result<*mut ibv_mr, i32> {
    if let Some(code) = fault::strikes(Point::Register) {
        return Err(code as i32);
    }
    // 10.6.3.1: remote write and atomic access need local write access.
    let writes = keys::REMOTE_WRITE | keys::REMOTE_ATOMIC;
    if access & writes != 0 && access & keys::LOCAL_WRITE == 0 {
        return Err(libc::EINVAL);
    }
    if length as u64 > limit::MR_SIZE || (addr as usize).checked_add(length).is_none() {
        return Err(libc::EINVAL);
    }
    if !mapped(addr as usize, length) {
        return Err(libc::EFAULT);
    }
    let locked = LOCKED.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
    if fault::plan().memlock.is_some_and(|limit| locked > limit) {
        LOCKED.fetch_sub(length as u64, Ordering::Relaxed);
        return Err(libc::ENOMEM);
    }
    let habits = pd.context.habits();
    MRS.add(habits, habits.max_mr).inspect_err(|_| {
        LOCKED.fetch_sub(length as u64, Ordering::Relaxed);
    })?;
    let iova = if access & keys::ZERO_BASED != 0 { 0 } else { iova };
    let key = keys::insert(Some(Grant {
        pd: pd.id,
        iova,
        length: length as u64,
        base: addr,
        access,
        qp: None,
        region: None,
        windows: 0,
    }));
    let c = ibv_mr {
        context: pd.context.as_c(),
        pd: (&raw const pd.c).cast_mut(),
        addr: addr.cast(),
        length,
        handle: key >> 8,
        lkey: key,
        rkey: key,
    };
    Ok(handle::into_c(Arc::new(Mr { c, pd: InPd::new(pd) })))
}

/// Deregisters memory; the result is 0 or an errno.
///
/// # Safety
/// The pointer came from [`register`] and is not used again if this succeeds.
pub unsafe fn deregister(mr: *mut ibv_mr) -> i32 {
    // SAFETY: the caller's word.
    let object = unsafe { handle::borrow::<Mr, _>(mr) };
    object.pd.pd.context.check_open("ibv_dereg_mr");
    // 10.6.7.2.6: a region with windows bound to it stays.
    if !keys::remove(object.c.lkey) {
        return libc::EBUSY;
    }
    LOCKED.fetch_sub(object.c.length as u64, Ordering::Relaxed);
    MRS.remove();
    // SAFETY: as above.
    drop(unsafe { handle::take::<Mr, _>(mr) });
    0
}

impl Mr {
    /// The protection domain's number.
    pub fn pd(&self) -> u64 {
        self.pd.pd.id
    }
    pub fn key(&self) -> u32 {
        self.c.lkey
    }
}

/// A type-2 memory window.
#[repr(C)]
pub struct Mw {
    pub c: ibv_mw,
    pub pd: InPd,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Mw {}
// SAFETY: as above.
unsafe impl Sync for Mw {}

/// Allocates a window; its key grants nothing before it is bound.
pub fn allocate_window(pd: Arc<Pd>, kind: ibv_mw_type::Type) -> Result<*mut ibv_mw, i32> {
    if kind != ibv_mw_type::IBV_MW_TYPE_2 {
        return Err(libc::EOPNOTSUPP);
    }
    let key = keys::insert(None);
    let c = ibv_mw {
        context: pd.context.as_c(),
        pd: (&raw const pd.c).cast_mut(),
        rkey: key,
        handle: key >> 8,
        type_: kind,
    };
    Ok(handle::into_c(Arc::new(Mw { c, pd: InPd::new(pd) })))
}

/// Frees a window, bound or not.
///
/// # Safety
/// The pointer came from [`allocate_window`] and is not used again.
pub unsafe fn free_window(mw: *mut ibv_mw) {
    // SAFETY: the caller's word.
    let object = unsafe { handle::take::<Mw, _>(mw) };
    keys::remove(object.c.rkey);
}
