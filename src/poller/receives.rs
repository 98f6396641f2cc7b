// SPDX-License-Identifier: BSD-3-Clause
//! What becomes of a peer that is ahead of our receives, by the device: it is made to wait for
//! a short time, or finds more receives.

use super::Poller;
use crate::device::SharedDevice;
use crate::endpoint::Endpoint;
use log::Level;
use std::sync::Arc;
use verbs::Error;

impl Poller {
    /// Accepts the connection of an endpoint. From here on the peer may send, so its time to
    /// wait is set now, and not when the connection manager says that it is established.
    ///
    /// # Errors
    /// As the connection manager's.
    pub fn accept(&self, endpoint: &Arc<Endpoint>) -> Result<(), Error> {
        endpoint.id().accept()?;
        self.shorten_rnr_timer(endpoint);
        Ok(())
    }

    /// Sets the time that a peer waits where it finds no receive posted. A device on which that
    /// does not hold gets more receives for each connection from then on.
    pub(super) fn shorten_rnr_timer(&self, endpoint: &Arc<Endpoint>) {
        let device = endpoint.device();
        let set = std::mem::replace(&mut endpoint.main_state().rnr_timer_set, true);
        if set || device.opened().is_iwarp() {
            return;
        }
        let Some(times) = endpoint.shorten_rnr_timer() else { return };
        device.abilities().ack_timeout = times.ack_timeout;
        if device.abilities().note_rnr_timer(times.is_rnr_short) {
            let what = format!(
                "device {} does not shorten the RNR timer: a client that is ahead would wait for \
                 655 ms, so further connections have {} receives each",
                device.name(),
                device.receives()
            );
            self.say_trouble(Level::Info, &what);
        }
    }

    /// A device was opened: on one of iWARP there is no RNR, and who is ahead is cut off.
    pub(super) fn choose_receives(&self, device: &SharedDevice) {
        if device.opened().is_iwarp() && device.abilities().note_rnr_timer(false) {
            let what = format!(
                "device {} is of iWARP, which has no RNR: its connections have {} receives each",
                device.name(),
                device.receives()
            );
            self.say_trouble(Level::Info, &what);
        }
    }
}
