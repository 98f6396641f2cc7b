// SPDX-License-Identifier: BSD-3-Clause
//! The devices. The first is there from the start, as a rule: a planned fault removes it, and
//! another one with the same name and GUID may take its place, as after a reset or a driver's
//! reload. There is a second one if it is asked for, which may come later.

use crate::cm;
use crate::engine::engine;
use crate::fault;
use crate::habits::Habits;
use rdma_sys::*;
use std::mem::zeroed;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// A device that is there, or was.
#[repr(C)]
pub struct Device {
    c: ibv_device,
    /// The kernel's number for it, of which no two devices have the same.
    pub index: i32,
    pub place: Place,
    /// What it does in its own way.
    pub habits: &'static Habits,
    gone: AtomicBool,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Has every address of the machine but the second's.
    First,
    /// Has one address.
    Second,
}

/// What there is at each place.
type Places = [Option<&'static Device>; 2];

/// `None` until it was asked for the first time.
static PRESENT: Mutex<Option<Places>> = Mutex::new(None);

fn change<T>(with: impl FnOnce(&mut Places) -> T) -> T {
    with(PRESENT.lock().unwrap().get_or_insert_with(begin))
}

/// What is there from the start.
fn begin() -> Places {
    let plan = fault::plan();
    let first = (!plan.no_device).then(|| Device::appear(Place::First));
    let second = plan.second.as_ref().and_then(|second| match second.appears {
        None => Some(Device::appear(Place::Second)),
        Some(after) => {
            engine().after(after, || come(Place::Second));
            None
        }
    });
    [first, second]
}

/// The devices that are there now.
pub fn present() -> Vec<&'static Device> {
    change(|places| places.iter().flatten().copied().collect())
}

/// The device at a place.
pub fn at(place: Place) -> Option<&'static Device> {
    change(|places| places[place as usize])
}

/// Takes the first device away; returns it if there was one.
pub fn remove() -> Option<&'static Device> {
    let device = change(|places| places[Place::First as usize].take())?;
    device.gone.store(true, Ordering::SeqCst);
    Some(device)
}

/// A device comes, with the name and the GUID of the one that was at its place before.
pub fn come(place: Place) {
    change(|places| places[place as usize] = Some(Device::appear(place)));
    cm::device_added();
}

impl Device {
    /// Kept for good, as its contexts and the application's lists may be.
    fn appear(place: Place) -> &'static Device {
        static NEXT: AtomicI32 = AtomicI32::new(0);
        let habits = fault::habits_of(place);
        // SAFETY: all zeroes is a valid ibv_device.
        let mut c: ibv_device = unsafe { zeroed() };
        if habits.iwarp {
            c.node_type = ibv_node_type::IBV_NODE_RNIC;
            c.transport_type = ibv_transport_type::IBV_TRANSPORT_IWARP;
        } else {
            c.node_type = ibv_node_type::IBV_NODE_CA;
            c.transport_type = ibv_transport_type::IBV_TRANSPORT_IB;
        }
        let name = format!("softrdma{}", place as usize);
        super::context::copy_name(&mut c.name, &name);
        super::context::copy_name(&mut c.dev_name, &name);
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        Box::leak(Box::new(Device { c, index, place, habits, gone: AtomicBool::new(false) }))
    }

    pub fn as_c(&self) -> *mut ibv_device {
        (&raw const self.c).cast_mut()
    }

    /// The device behind a C pointer.
    ///
    /// # Safety
    /// The pointer came from [`Device::as_c`].
    pub unsafe fn of(c: *mut ibv_device) -> &'static Device {
        // SAFETY: the caller's word; devices are never freed.
        unsafe { &*c.cast() }
    }

    /// The node's GUID in network order, or 0.
    pub fn guid(&self) -> u64 {
        const GUID: u64 = 0x0250_5eff_fe50_f700;
        if self.habits.has_guid { (GUID + self.place as u64).to_be() } else { 0 }
    }

    /// The port's only GID: the first device's is the IPv4 loopback address, mapped.
    pub fn gid(&self) -> ibv_gid {
        let address = match (self.place, &fault::plan().second) {
            (Place::Second, Some(second)) => second.at,
            _ => Ipv4Addr::LOCALHOST.into(),
        };
        let raw = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        ibv_gid { raw }
    }

    /// Whether it was removed.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }
}
