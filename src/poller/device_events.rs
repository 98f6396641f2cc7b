// SPDX-License-Identifier: BSD-3-Clause
//! What devices tell by asynchronous events, and what follows: a completion queue that failed
//! is given up with its connections, a device that failed with all of them. The rest is said
//! and counted.

use super::{EVENTS_PER_GO, Poller};
use crate::device::SharedDevice;
use crate::endpoint::{Endpoint, PeerState, Reason};
use crate::host::api;
use crate::metrics::METRICS;
use crate::panic::guard;
use log::Level;
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::sync::Arc;
use verbs::Error;
use verbs::events::DeviceEvent;

impl Poller {
    /// Watches what a device tells.
    ///
    /// # Errors
    /// If the event loop does not take its descriptor.
    pub(super) fn watch_events(&self, device: &SharedDevice) -> Result<(), Error> {
        let fd = device.opened().events_fd()?;
        if api::watch(fd, on_device_events, device.number()) {
            Ok(())
        } else {
            Err(Error { action: "watch the device's events", errno: libc::ERANGE })
        }
    }

    /// Takes what a device tells, up to the bound of a pass.
    pub(super) fn take_device_events(&self, device: &Arc<SharedDevice>) {
        for _ in 0..EVENTS_PER_GO {
            match device.opened().next_event() {
                Ok(Some(event)) => self.device_event(device, event),
                Ok(None) => return,
                Err(error) => return self.retire(device, &error.to_string()),
            }
        }
    }

    fn device_event(&self, device: &Arc<SharedDevice>, event: DeviceEvent) {
        METRICS.device_events.add(1);
        let name = device.name();
        match event {
            DeviceEvent::QueueFailed(number) => self.give_up_queue(device, number),
            DeviceEvent::Fatal => self.retire(device, "it failed, or was removed"),
            DeviceEvent::QueuePairFailed(number, what) => {
                self.queue_pair_failed(device, number, &what)
            }
            DeviceEvent::Port(port, what) => {
                self.say_trouble(Level::Info, &format!("device {name}: {what} (port {port})"));
            }
            DeviceEvent::Other(what) => {
                self.say_trouble(Level::Info, &format!("device {name}: {what}"));
            }
            DeviceEvent::Established(number) => {
                let of = |it: &&Arc<Endpoint>| it.queue_pair() == number;
                if let Some(endpoint) = self.on_device(device).iter().find(of) {
                    endpoint.id().notify_arrival();
                }
            }
            DeviceEvent::Routine => {}
        }
    }

    /// A queue pair failed, so that its connection is over. The flushed work requests say so as
    /// well, sooner or later, and no reason.
    fn queue_pair_failed(&self, device: &Arc<SharedDevice>, number: u32, what: &str) {
        let endpoints = self.on_device(device);
        let Some(endpoint) = endpoints.iter().find(|it| it.queue_pair() == number) else { return };
        if endpoint.stream().peer_state() == PeerState::Connected {
            self.say_lost(endpoint, &format!("{what}; device {}", device.name()));
        }
        self.lose(endpoint, PeerState::Disconnected, Reason::Error);
    }

    /// A completion queue failed, so that nothing completes on it any more: its connections
    /// end, and no other comes to it.
    pub(super) fn give_up_queue(&self, device: &Arc<SharedDevice>, number: usize) {
        if !device.give_up_queue(number) {
            return;
        }
        METRICS.queues_lost.add(1);
        let mut ended = 0;
        for endpoint in self.on_device(device).iter().filter(|it| it.queue() == number) {
            self.lose(endpoint, PeerState::Disconnected, Reason::Error);
            ended += 1;
        }
        let what = format!(
            "a completion queue of device {} failed: its {ended} connections end",
            device.name()
        );
        self.say_trouble(Level::Warn, &what);
    }
}

/// Ends [`Poller::watch_events`].
pub(super) fn unwatch_events(device: &SharedDevice) {
    if let Ok(fd) = device.opened().events_fd() {
        api::unwatch(fd);
    }
}

unsafe extern "C" fn on_device_events(_fd: RawFd, data: *mut c_void, _mask: c_int) {
    guard("device event", || {
        let poller = Poller::get();
        let Some(device) = poller.find_device(data as usize) else { return };
        let _pass = poller.pass();
        poller.take_device_events(&device);
        poller.serve_ready();
    });
}
