// SPDX-License-Identifier: BSD-3-Clause
//! The devices as librdmacm knows them: opened once for all identifiers, and closed when the
//! device was removed and nobody refers to it.
//!
//! As there, the list is compared with what devices there are in rdma_get_devices, and when an
//! identifier comes to a device that is not known yet. A device that has vanished is closed
//! then, or, while identifiers or lists refer to it, with the last of them.

use super::address;
use crate::verbs::context::Context;
use crate::verbs::device::{self, Device};
use crate::verbs::memory::Pd;
use rdma_sys::*;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

struct Entry {
    device: &'static Device,
    context: Option<Arc<Context>>,
    /// The protection domain of identifiers whose application brings none.
    pd: Option<Arc<Pd>>,
    references: usize,
    /// It has vanished.
    dead: bool,
}

static ENTRIES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// What an identifier holds of its device.
pub struct Reference {
    pub device: &'static Device,
    pub verbs: *mut ibv_context,
    pub pd: *mut ibv_pd,
}

// SAFETY: the pointers are only passed on.
unsafe impl Send for Reference {}

impl Entry {
    fn context(&mut self) -> Result<Arc<Context>, i32> {
        if self.context.is_none() {
            self.context = Some(Context::open(self.device).ok_or(libc::ENODEV)?);
        }
        Ok(self.context.clone().expect("opened above"))
    }

    /// One reference less.
    fn put(&mut self) {
        self.references -= 1;
        if self.references == 0 {
            self.pd = None;
        }
    }
}

/// Closes what is dead and nobody's.
fn sweep(entries: &mut Vec<Entry>) {
    entries.retain_mut(|entry| {
        let over = entry.dead && entry.references == 0;
        if over && let Some(context) = entry.context.take() {
            context.close_for_good();
        }
        !over
    });
}

/// Compares the list with what there is.
fn sync(entries: &mut Vec<Entry>) -> Result<(), i32> {
    let present = device::present();
    if present.is_empty() {
        return Err(libc::ENODEV);
    }
    for entry in entries.iter_mut() {
        entry.dead = !present.iter().any(|device| std::ptr::eq(entry.device, *device));
    }
    for device in present {
        if entries.iter().all(|entry| !std::ptr::eq(entry.device, device)) {
            entries.push(Entry { device, context: None, pd: None, references: 0, dead: false });
        }
    }
    sweep(entries);
    Ok(())
}

/// The device that has an address now.
pub fn at(ip: IpAddr) -> Option<&'static Device> {
    device::at(address::owner(ip)?)
}

/// Whether there ever was a device.
pub fn initialise() -> Result<(), i32> {
    let mut entries = ENTRIES.lock().unwrap();
    if entries.is_empty() {
        sync(&mut entries)?;
    }
    Ok(())
}

/// Refers to the device that has an address.
pub fn acquire(ip: IpAddr) -> Result<Reference, i32> {
    let device = at(ip).ok_or(libc::ENODEV)?;
    let mut entries = ENTRIES.lock().unwrap();
    let known = |entry: &Entry| !entry.dead && std::ptr::eq(entry.device, device);
    if !entries.iter().any(known) {
        sync(&mut entries)?;
    }
    let entry = entries.iter_mut().find(|entry| known(entry)).ok_or(libc::ENODEV)?;
    let context = entry.context()?;
    if entry.pd.is_none() {
        entry.pd = Some(Pd::new(context.clone())?);
    }
    let pd = entry.pd.as_ref().expect("made above");
    let pd = (&raw const pd.c).cast_mut();
    entry.references += 1;
    Ok(Reference { device, verbs: context.as_c(), pd })
}

impl Drop for Reference {
    fn drop(&mut self) {
        let mut entries = ENTRIES.lock().unwrap();
        if let Some(entry) = entries.iter_mut().find(|e| std::ptr::eq(e.device, self.device)) {
            entry.put();
        }
        sweep(&mut entries);
    }
}

/// The contexts of all devices there are, each with a reference.
pub fn list() -> Result<Vec<*mut ibv_context>, i32> {
    let mut entries = ENTRIES.lock().unwrap();
    sync(&mut entries)?;
    let mut all = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !entry.dead) {
        match entry.context() {
            Ok(context) => all.push(context.as_c()),
            Err(_) => {
                entry.dead = true;
                continue;
            }
        }
        entry.references += 1;
    }
    Ok(all)
}

/// Gives the references of a list back.
pub fn release(list: &[*mut ibv_context]) {
    let mut entries = ENTRIES.lock().unwrap();
    for entry in entries.iter_mut() {
        let verbs = entry.context.as_ref().map(|context| context.as_c());
        if verbs.is_some_and(|verbs| list.contains(&verbs)) {
            entry.put();
        }
    }
    sweep(&mut entries);
}
