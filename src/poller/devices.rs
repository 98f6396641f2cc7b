// SPDX-License-Identifier: BSD-3-Clause
//! The devices: opened for their first connections, retired when they are lost, and doubted
//! when they do not do what was asked.

use super::Poller;
use super::device_events::unwatch_events;
use super::on_completions;
use crate::device::SharedDevice;
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::host::api;
use crate::host::reply::Reply;
use crate::metrics::METRICS;
use log::Level;
use std::sync::Arc;
use verbs::Error;
use verbs::cm::Id;

impl Poller {
    /// The device that an id is bound to, opened if this is its first connection.
    ///
    /// # Errors
    /// If there is no device or it can't be opened.
    pub(super) fn device_of(&self, id: &Arc<Id>) -> Result<Arc<SharedDevice>, Error> {
        let mut devices = self.devices.borrow_mut();
        if let Some(device) = devices.iter().find(|device| device.owns(id)) {
            return Ok(Arc::clone(device));
        }
        let (vector, patience) = {
            let settings = self.settings.borrow_mut();
            (settings.completion_vector, settings.busy_poll)
        };
        let mut opened = self.devices_opened.borrow_mut();
        *opened += 1;
        let device = match SharedDevice::new(id, *opened, vector, patience * 1000) {
            Ok(device) => Arc::new(device),
            Err(error) => {
                // librdmacm may take a device that is back for the one that was removed, where
                // it knows the two by their GUID alone: it looks at what there is now.
                drop(verbs::device::Device::all());
                return Err(error);
            }
        };
        if !api::watch(device.fd(), on_completions, device.number()) {
            return Err(Error { action: "watch the device's completions", errno: libc::ERANGE });
        }
        self.watch_events(&device).inspect_err(|_| api::unwatch(device.fd()))?;
        log::debug!("device {} opened", device.name());
        self.choose_receives(&device);
        self.recall_examination(&device);
        if !device.opened().has_index() {
            let what = format!(
                "device {}: librdmacm tells devices apart by their GUID alone, and takes one that \
                 was reset for the one before, since netlink is closed to the server; a service \
                 needs RestrictAddressFamilies=AF_NETLINK",
                device.name()
            );
            self.say_trouble(Level::Warn, &what);
        }
        devices.push(Arc::clone(&device));
        Ok(device)
    }

    /// The device of a number, unless it is retired.
    pub(super) fn find_device(&self, number: usize) -> Option<Arc<SharedDevice>> {
        self.devices.borrow_mut().iter().find(|device| device.number() == number).cloned()
    }

    /// The device at a place, in the order of their opening.
    pub(super) fn nth_device(&self, index: usize) -> Option<Arc<SharedDevice>> {
        self.devices.borrow_mut().get(index).cloned()
    }

    /// The endpoints of a device.
    pub(super) fn on_device(&self, device: &Arc<SharedDevice>) -> Vec<Arc<Endpoint>> {
        let mut endpoints = self.endpoints();
        endpoints.retain(|endpoint| Arc::ptr_eq(&endpoint.device(), device));
        endpoints
    }

    /// The devices that have or had connections and are there, as `INFO rdma` shows them.
    pub fn describe_devices(&self) -> Vec<Reply> {
        let endpoints = self.endpoints();
        let devices = self.devices.borrow_mut().clone();
        let describe = |device: &Arc<SharedDevice>| {
            let own = endpoints.iter().filter(|endpoint| Arc::ptr_eq(&endpoint.device(), device));
            let mut ports: Vec<u8> = own.map(|endpoint| endpoint.id().port()).collect();
            let connections = ports.len() as u64;
            ports.sort_unstable();
            ports.dedup();
            device.describe(&ports, connections)
        };
        devices.iter().map(describe).collect()
    }

    /// Sets how long a connection waits for acknowledgements. It lives with another time, too.
    pub(super) fn set_ack_timeout(&self, device: &SharedDevice, id: &Id, exponent: u8) {
        if let Err(error) = id.set_ack_timeout(exponent)
            && device.abilities().note_ack_timeout_unsupported()
        {
            let what = format!("device {}: ack-timeout has no effect: {error}", device.name());
            self.say_trouble(Level::Warn, &what);
        }
    }

    /// A device was removed, or can't be used any more: forgets it, so that its
    /// descriptor, which would be readable for ever, is not looked at, and ends its
    /// connections. Its queues go with the last of them. A device that comes back, even the
    /// same, is opened anew.
    pub(super) fn retire(&self, device: &Arc<SharedDevice>, why: &str) {
        {
            let mut devices = self.devices.borrow_mut();
            let Some(index) = devices.iter().position(|it| Arc::ptr_eq(it, device)) else { return };
            devices.remove(index);
        }
        api::unwatch(device.fd());
        unwatch_events(device);
        // Copies of that descriptor among them; they grow again as they are needed.
        self.wakeup_fds.borrow_mut().shrink(true);
        METRICS.devices_lost.add(1);
        let mut ended = 0;
        for endpoint in &self.on_device(device) {
            self.lose(endpoint, PeerState::Disconnected, Reason::Error);
            ended += 1;
        }
        let what = format!("device {} is lost: {why}; its {ended} connections end", device.name());
        self.say_trouble(Level::Warn, &what);
    }

    /// The device did not carry out a probe. From now on it is asked for none of that sort:
    /// its other connections are to live.
    pub(super) fn doubt_probes(&self, endpoint: &Arc<Endpoint>) {
        let keyed = endpoint.stream().outbound().announced().is_some();
        let device = endpoint.device();
        if device.abilities().note_probe_failed(keyed) {
            let how = if keyed { "" } else { " without a key" };
            let what = format!(
                "device {} can't carry out RDMA writes of no bytes{how}: silent clients are not \
                 probed that way from now on",
                device.name()
            );
            self.say_trouble(Level::Warn, &what);
        }
    }
}
