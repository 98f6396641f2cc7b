// SPDX-License-Identifier: BSD-3-Clause
//! What a connection is doing, for those who ask: `RDMA.CLIENTS`, the watchdog, the log.
//!
//! What a connection waits for follows from what it has anyway. Only for how long it
//! does has to be noted when the wait begins, see [`crate::endpoint::activity`].

use crate::endpoint::activity::Shortage;
use crate::endpoint::{Endpoint, PeerState, Stage};
use crate::host::reply::Reply;
use crate::time;
use proto::session::Millis;

/// The event that a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The connection manager establishes it.
    Establishment,
    /// The client announces its first receive buffer.
    Announcement,
    /// The client reads its window and announces it again.
    Window,
    /// Work requests of ours complete: the client's device acknowledges them.
    Completion,
    /// The server acts: it was told, and an I/O thread has the job, or will.
    IoThread,
    /// The server wants to read what arrived.
    Server,
    /// The next pass.
    Pass,
    /// The last bytes arrive.
    Delivery,
    /// Nothing: it is the client's turn.
    Nothing,
}

impl Wait {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Establishment => "connection manager",
            Self::Announcement => "client's announcement",
            Self::Window => "client's window",
            Self::Completion => "completion",
            Self::IoThread => "I/O thread",
            Self::Server => "server",
            Self::Pass => "pass",
            Self::Delivery => "delivery",
            Self::Nothing => "nothing",
        }
    }
}

/// The event that the endpoint waits for, and the time at which the wait began. Main thread.
pub fn wait(endpoint: &Endpoint) -> (Wait, Millis) {
    let activity = endpoint.activity();
    let own = endpoint.main_state();
    let (stage, heard) = (own.stage, own.session.last_heard());
    let (established, probing) = (own.session.is_cm_established(), own.session.is_probing());
    let (parked, quiet_since) = (own.parked, own.watch.since);
    let awaits_slot = own.session.awaits_control_slot();
    drop(own);
    match stage {
        Stage::Handshaking if !established => return (Wait::Establishment, activity.begun),
        Stage::Handshaking => return (Wait::Announcement, activity.begun),
        Stage::Lingering => return (Wait::Delivery, quiet_since),
        Stage::Ending => return (Wait::Pass, quiet_since),
        Stage::Established => {}
    }
    match activity.held_back() {
        Some((Shortage::Window, since)) if !endpoint.stream().outbound().has_room() => {
            return (Wait::Window, since);
        }
        Some((Shortage::Staging, since)) if !endpoint.is_writable() => {
            return (Wait::Completion, since);
        }
        _ => {}
    }
    if endpoint.has_work() {
        let wait = if parked { Wait::IoThread } else { Wait::Pass };
        return (wait, quiet_since);
    }
    if endpoint.stream().unread() > 0 || endpoint.stream().peer_state() != PeerState::Connected {
        return (Wait::Server, quiet_since);
    }
    if probing || awaits_slot {
        return (Wait::Completion, quiet_since);
    }
    (Wait::Nothing, heard)
}

/// All that there is to say about a connection, as `RDMA.CLIENTS` says it. Main thread.
pub fn describe(endpoint: &Endpoint) -> Reply {
    let now = time::now();
    let ago = |since: Millis| Reply::from(now.saturating_sub(since));
    let (waits_for, since) = wait(endpoint);
    let (received, received_size) = endpoint.stream().received();
    let (sent, sent_size) = endpoint.stream().outbound().position();
    let own = endpoint.main_state();
    let (id, stage, heard) = (own.client, own.stage, own.session.last_heard());
    let role = own.role;
    drop(own);
    Reply::Map(vec![
        ("id", id.into()),
        ("addr", endpoint.peer().map(|address| address.to_string()).into()),
        ("laddr", endpoint.local().map(|address| address.to_string()).into()),
        ("device", endpoint.device().name().into()),
        ("port", u64::from(endpoint.id().port()).into()),
        ("state", stage.text().into()),
        ("age-ms", ago(endpoint.activity().begun)),
        ("last-received-ms", ago(heard)),
        ("waits-for", waits_for.text().into()),
        ("waits-ms", ago(since)),
        ("bytes-received", (endpoint.stream().total_read() + endpoint.stream().unread()).into()),
        ("bytes-unread", endpoint.stream().unread().into()),
        ("receive-window-filled", received.into()),
        ("receive-window-size", received_size.into()),
        ("bytes-sent", endpoint.activity().sent().into()),
        ("send-window-filled", u64::from(sent).into()),
        ("send-window-size", u64::from(sent_size).into()),
        ("writes-in-flight", endpoint.stream().outbound().in_flight().into()),
        ("receive-buffer", (endpoint.receive_bytes() as u64).into()),
        ("staging-buffer", endpoint.staging_bytes().map(|bytes| bytes as u64).into()),
        ("receive-slots", u64::from(endpoint.receive_slots()).into()),
        ("receive-slots-kind", endpoint.device().receive_slots().into()),
        ("role", role.text().into()),
    ])
}
