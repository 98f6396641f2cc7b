// SPDX-License-Identifier: BSD-3-Clause
//! What a connection is doing, for those who ask: `RDMA.CLIENTS`, the watchdog, the log.
//!
//! What a connection waits for follows from what it has anyway. Only for how long it
//! does has to be noted when the wait begins, and only where writing is held back is
//! that on another thread: [`Activity`] is the place for it.

use super::endpoint::{Endpoint, Fate, Stage};
use crate::host::reply::Reply;
use crate::metrics::{Counter, METRICS};
use crate::time;
use proto::session::Millis;
use std::sync::atomic::{AtomicU64, Ordering};

/// What holds a write back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Shortage {
    /// The client's window is full.
    Window = 0,
    /// Staging memory or the send queue is full, until work requests complete.
    Staging = 1,
}

impl Shortage {
    fn counters(self) -> (&'static Counter, &'static Counter) {
        match self {
            Self::Window => (&METRICS.window_stalls, &METRICS.window_stalls_ms),
            Self::Staging => (&METRICS.staging_stalls, &METRICS.staging_stalls_ms),
        }
    }
}

/// What a connection's writer did, and since when it is held back. Any thread.
#[derive(Debug)]
pub struct Activity {
    /// When the connection began.
    pub begun: Millis,
    sent: AtomicU64,
    /// When a write took bytes last.
    written: AtomicU64,
    /// 0, or one more than the time, twice, and the shortage in the lowest bit.
    held_back: AtomicU64,
}

impl Activity {
    /// Nothing yet.
    pub fn new(begun: Millis) -> Self {
        Self {
            begun,
            sent: AtomicU64::new(0),
            written: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
        }
    }

    /// A write took so many bytes: whatever held it back is over.
    pub fn wrote(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.written.store(time::now(), Ordering::Relaxed);
        if self.held_back.load(Ordering::Relaxed) != 0 {
            over(self.held_back.swap(0, Ordering::Relaxed));
        }
    }

    /// A write was held back, unless it was so already.
    pub fn hold_back(&self, shortage: Shortage) {
        if self.held_back().is_some_and(|(present, _)| present == shortage) {
            return;
        }
        let now = ((time::now() + 1) << 1) | shortage as u64;
        if shortage == Shortage::Window {
            // First: the main thread takes it off again as soon as it sees the shortage.
            METRICS.connections_window_full.add(1);
        }
        over(self.held_back.swap(now, Ordering::Relaxed));
        shortage.counters().0.add(1);
    }

    /// The client announced a window.
    pub fn window_opened(&self) {
        let present = self.held_back.load(Ordering::Relaxed);
        if unpack(present).is_some_and(|(shortage, _)| shortage == Shortage::Window)
            && self
                .held_back
                .compare_exchange(present, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            over(present);
        }
    }

    /// What holds writing back, and since when.
    pub fn held_back(&self) -> Option<(Shortage, Millis)> {
        unpack(self.held_back.load(Ordering::Relaxed))
    }

    /// When a write took bytes last; 0 if none did.
    pub fn written(&self) -> Millis {
        self.written.load(Ordering::Relaxed)
    }

    /// Bytes that writes took since the connection began.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        over(std::mem::take(self.held_back.get_mut()));
    }
}

fn unpack(held_back: u64) -> Option<(Shortage, Millis)> {
    let shortage = if held_back & 1 == 0 { Shortage::Window } else { Shortage::Staging };
    (held_back != 0).then(|| (shortage, (held_back >> 1) - 1))
}

/// Counts the time of a shortage that is over, if there was one.
fn over(held_back: u64) {
    let Some((shortage, since)) = unpack(held_back) else { return };
    shortage.counters().1.add(time::now().saturating_sub(since));
    if shortage == Shortage::Window {
        METRICS.connections_window_full.sub(1);
    }
}

/// What has to happen for a connection to go on.
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

/// What the endpoint waits for, and since when. Main thread.
pub fn wait(endpoint: &Endpoint) -> (Wait, Millis) {
    let activity = endpoint.activity();
    let own = endpoint.own();
    let (stage, heard) = (own.stage, own.session.last_heard());
    let (established, probing) = (own.session.is_established(), own.session.is_probing());
    let (parked, quiet_since) = (own.parked, own.watch.since);
    drop(own);
    match stage {
        Some(Stage::Handshaking) | None if !established => {
            return (Wait::Establishment, activity.begun);
        }
        Some(Stage::Handshaking) | None => return (Wait::Announcement, activity.begun),
        Some(Stage::Lingering) => return (Wait::Delivery, quiet_since),
        Some(Stage::Ending) => return (Wait::Pass, quiet_since),
        Some(Stage::Established) => {}
    }
    match activity.held_back() {
        Some((Shortage::Window, since)) if !endpoint.outbound().has_room() => {
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
    if endpoint.inbound().unread() > 0 || endpoint.fate() != Fate::Alive {
        return (Wait::Server, quiet_since);
    }
    if probing || endpoint.awaits_control_slot() {
        return (Wait::Completion, quiet_since);
    }
    (Wait::Nothing, heard)
}

/// All that there is to say about a connection, as `RDMA.CLIENTS` says it. Main thread.
pub fn describe(endpoint: &Endpoint) -> Reply {
    let now = time::now();
    let ago = |since: Millis| Reply::from(now.saturating_sub(since));
    let (waits_for, since) = wait(endpoint);
    let (received, received_size) = endpoint.inbound().position();
    let (sent, sent_size) = endpoint.outbound().position();
    let own = endpoint.own();
    let (id, stage, heard) = (own.client, own.stage, own.session.last_heard());
    drop(own);
    Reply::Map(vec![
        ("id", id.into()),
        ("addr", endpoint.peer().map(|address| address.to_string()).into()),
        ("laddr", endpoint.local().map(|address| address.to_string()).into()),
        ("device", endpoint.hub().name().into()),
        ("port", u64::from(endpoint.id().port()).into()),
        ("state", stage.map(Stage::text).into()),
        ("age-ms", ago(endpoint.activity().begun)),
        ("last-received-ms", ago(heard)),
        ("waits-for", waits_for.text().into()),
        ("waits-ms", ago(since)),
        ("bytes-received", (endpoint.inbound().total_read() + endpoint.inbound().unread()).into()),
        ("bytes-unread", endpoint.inbound().unread().into()),
        ("receive-window-filled", received.into()),
        ("receive-window-size", received_size.into()),
        ("bytes-sent", endpoint.activity().sent().into()),
        ("send-window-filled", u64::from(sent).into()),
        ("send-window-size", u64::from(sent_size).into()),
        ("writes-in-flight", endpoint.writes_in_flight().into()),
        ("receive-buffer", (endpoint.receive_bytes() as u64).into()),
        ("staging-buffer", endpoint.staging_bytes().map(|bytes| bytes as u64).into()),
        ("receive-slots", u64::from(endpoint.receive_slots()).into()),
        ("receive-slots-kind", endpoint.hub().receive_slots().into()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_shortage_lasts_until_bytes_flow_or_its_window_opens() {
        let activity = Activity::new(0);
        assert_eq!(activity.held_back(), None);
        activity.hold_back(Shortage::Window);
        let (_, since) = activity.held_back().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        activity.hold_back(Shortage::Window);
        assert_eq!(activity.held_back(), Some((Shortage::Window, since)), "the same still");
        activity.window_opened();
        assert_eq!(activity.held_back(), None);
        activity.hold_back(Shortage::Staging);
        activity.window_opened();
        assert!(activity.held_back().is_some(), "a window is no staging memory");
        activity.wrote(7);
        assert_eq!((activity.held_back(), activity.sent()), (None, 7));
        assert!(activity.written() >= since);
    }

    #[test]
    fn the_gauge_of_full_windows_is_never_less_than_nothing() {
        let activity = Activity::new(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    activity.window_opened();
                    let full = METRICS.connections_window_full.get();
                    assert!(full < 1000, "{full} connections");
                }
            });
            let begun = std::time::Instant::now();
            while begun.elapsed().as_millis() < 300 {
                activity.hold_back(Shortage::Window);
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
