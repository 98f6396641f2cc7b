// SPDX-License-Identifier: BSD-3-Clause
//! The key table: what an lkey or rkey gives access to, and the check of each access.
//!
//! InfiniBand Architecture Specification, volume 1, 10.6.3 (access control) and
//! 10.6.7 (memory windows): the key must be valid, belong to the queue pair's
//! protection domain, cover the range, and permit the operation; a type-2B window
//! moreover belongs to one queue pair.

use rdma_sys::{ibv_access_flags, ibv_sge};
use std::sync::{RwLock, RwLockReadGuard};

/// What a key stands for.
#[derive(Clone)]
pub struct Grant {
    pub pd: u64,
    /// Address that the other side names.
    pub iova: u64,
    pub length: u64,
    /// Where byte `iova` lies in this process.
    pub base: *mut u8,
    pub access: u32,
    /// A type-2 window works through the queue pair that bound it only.
    pub qp: Option<u32>,
    /// The region that a bound window lies in.
    pub region: Option<u32>,
    /// Windows bound to this region; it can't be deregistered meanwhile.
    pub windows: u32,
}

// SAFETY: the pointer is only dereferenced under the table's lock, in the
// process that registered it.
unsafe impl Send for Grant {}
// SAFETY: as above.
unsafe impl Sync for Grant {}

pub const LOCAL_WRITE: u32 = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
pub const REMOTE_WRITE: u32 = ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0;
pub const REMOTE_READ: u32 = ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
pub const REMOTE_ATOMIC: u32 = ibv_access_flags::IBV_ACCESS_REMOTE_ATOMIC.0;
pub const MW_BIND: u32 = ibv_access_flags::IBV_ACCESS_MW_BIND.0;
pub const ZERO_BASED: u32 = ibv_access_flags::IBV_ACCESS_ZERO_BASED.0;

enum Slot {
    Free,
    /// A key that exists but grants nothing yet: a window before its bind.
    Reserved,
    Live(Grant),
}

/// All keys of the process. The low byte of a key is its variant, which a type-2
/// window's binder chooses and which otherwise tells reuses of a slot apart.
pub struct Keys {
    slots: Vec<(Slot, u8)>,
    free: Vec<u32>,
}

static KEYS: RwLock<Keys> = RwLock::new(Keys { slots: Vec::new(), free: Vec::new() });

/// Holds the table still: nothing is deregistered while it lives.
pub fn read() -> RwLockReadGuard<'static, Keys> {
    KEYS.read().unwrap()
}

/// Adds a key, live or reserved.
pub fn insert(grant: Option<Grant>) -> u32 {
    let mut keys = KEYS.write().unwrap();
    if keys.slots.is_empty() {
        // Slot 0 stays unused: a key of 0 is always wrong.
        keys.slots.push((Slot::Free, 0));
    }
    // Slots rest before they are used again, as long as there are few.
    let index = if keys.free.len() > 64 {
        keys.free.remove(0)
    } else {
        keys.slots.push((Slot::Free, 0));
        keys.slots.len() as u32 - 1
    };
    let slot = &mut keys.slots[index as usize];
    slot.1 = slot.1.wrapping_add(1);
    slot.0 = grant.map_or(Slot::Reserved, Slot::Live);
    index << 8 | u32::from(slot.1)
}

/// Removes a key; false while memory windows are bound to it.
pub fn remove(key: u32) -> bool {
    let mut keys = KEYS.write().unwrap();
    let index = (key >> 8) as usize;
    if let Slot::Live(g) = &keys.slots[index].0
        && g.windows > 0
    {
        return false;
    }
    keys.release_region(index);
    keys.slots[index].0 = Slot::Free;
    keys.free.push(index as u32);
    true
}

/// Binds a reserved window key, with the variant that `key` carries.
///
/// A window that is bound already must be invalidated first (10.6.7.2.4).
pub fn bind(key: u32, region_key: u32, grant: Grant) -> bool {
    let mut keys = KEYS.write().unwrap();
    let index = (key >> 8) as usize;
    if !matches!(keys.slots.get(index), Some((Slot::Reserved, _))) {
        return false;
    }
    match keys.live_mut(region_key) {
        Some(region) => region.windows += 1,
        None => return false,
    }
    keys.slots[index] = (Slot::Live(Grant { region: Some(region_key), ..grant }), key as u8);
    true
}

/// Takes a bound window's rights away again; false if the key is not a window's.
pub fn unbind(key: u32, pd: u64) -> bool {
    let mut keys = KEYS.write().unwrap();
    let window = keys.live(key).is_some_and(|g| g.region.is_some() && g.pd == pd);
    if window {
        let index = (key >> 8) as usize;
        keys.release_region(index);
        keys.slots[index].0 = Slot::Reserved;
    }
    window
}

impl Keys {
    fn release_region(&mut self, index: usize) {
        if let Slot::Live(Grant { region: Some(region), .. }) = self.slots[index].0
            && let Some(region) = self.live_mut(region)
        {
            region.windows -= 1;
        }
    }

    fn live_mut(&mut self, key: u32) -> Option<&mut Grant> {
        match self.slots.get_mut((key >> 8) as usize) {
            Some((Slot::Live(g), variant)) if *variant == key as u8 => Some(g),
            _ => None,
        }
    }

    /// What a key grants, if it is valid.
    pub fn live(&self, key: u32) -> Option<&Grant> {
        match self.slots.get((key >> 8) as usize) {
            Some((Slot::Live(g), variant)) if *variant == key as u8 => Some(g),
            _ => None,
        }
    }

    fn check(
        &self,
        key: u32,
        pd: u64,
        addr: u64,
        len: u64,
        access: u32,
    ) -> Option<(&Grant, *mut u8)> {
        let g = self.live(key)?;
        let offset = addr.checked_sub(g.iova)?;
        if g.pd != pd || g.access & access != access || offset.checked_add(len)? > g.length {
            return None;
        }
        Some((g, g.base.wrapping_add(offset as usize)))
    }

    /// Checks a remote access by way of queue pair `qp`; answers where it goes.
    pub fn remote(
        &self,
        key: u32,
        pd: u64,
        qp: u32,
        addr: u64,
        len: u64,
        access: u32,
    ) -> Option<*mut u8> {
        let (g, p) = self.check(key, pd, addr, len, access)?;
        g.qp.is_none_or(|bound| bound == qp).then_some(p)
    }

    /// Checks a local scatter or gather entry; answers where it lies.
    pub fn local(&self, sge: &ibv_sge, pd: u64, access: u32) -> Option<*mut u8> {
        let (g, p) = self.check(sge.lkey, pd, sge.addr, u64::from(sge.length), access)?;
        g.region.is_none().then_some(p)
    }
}
