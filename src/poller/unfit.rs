// SPDX-License-Identifier: BSD-3-Clause
//! Devices that can serve nobody, since they refuse RDMA writes with immediate data: found out
//! by a connection's first write, or by an examination before any.

use super::Poller;
use crate::device::SharedDevice;
use crate::endpoint::Endpoint;
use crate::metrics::METRICS;
use log::Level;
use std::sync::Arc;
use verbs::Error;
use verbs::device::Facts;

impl Poller {
    /// A device refused a connection's first write as something that there is not. If none has
    /// ever written there, nobody can be served by it.
    pub(super) fn doubt_device(&self, device: &Arc<SharedDevice>, error: Error) {
        let has_written = |it: &Arc<Endpoint>| it.stream().outbound().total_posted() > 0;
        if self.on_device(device).iter().any(has_written) {
            device.abilities().note_written();
        }
        self.refuse_clients_of(device, &error.to_string());
    }

    /// An examination has found whether a device takes such writes.
    pub fn note_examined(&self, facts: &Facts, immediate: bool) {
        {
            let mut examined = self.examined.borrow_mut();
            examined.retain(|(other, _)| other.name != facts.name);
            examined.push((facts.clone(), immediate));
        }
        let devices = self.devices.borrow_mut().clone();
        devices.iter().for_each(|device| self.recall_examination(device));
    }

    /// Goes by what an examination has found, if it was of this device: another one may have
    /// the name by now, or another firmware.
    pub(super) fn recall_examination(&self, device: &SharedDevice) {
        let of_it = |(facts, _): &&(Facts, bool)| facts.name == device.name();
        let found = self.examined.borrow_mut().iter().find(of_it).cloned();
        let Some((facts, immediate)) = found else { return };
        if device.opened().facts().ok() != Some(facts) {
            return;
        }
        if immediate {
            device.abilities().note_written();
        } else {
            self.refuse_clients_of(device, "by RDMA.DOCTOR, or probe=");
        }
    }

    /// Refuses the clients of a device from now on, unless it has carried out such a write.
    fn refuse_clients_of(&self, device: &SharedDevice, why: &str) {
        if device.abilities().note_write_unsupported() {
            METRICS.devices_unfit.add(1);
            let what = format!(
                "device {} can't serve clients: it refuses RDMA writes with immediate data, which \
                 the protocol needs ({why}); they are refused from now on",
                device.name()
            );
            self.say_trouble(Level::Warn, &what);
        }
    }
}
