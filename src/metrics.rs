// SPDX-License-Identifier: BSD-3-Clause
//! Counters and gauges behind `INFO rdma` and `RDMA.STATS`. Counting costs one relaxed add.

use proto::session::Violation;
use std::sync::atomic::{AtomicU64, Ordering};
use verbs::account;
use verbs::cq::Failure;

/// One number that only grows, or a gauge that also shrinks. Any thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// So many less, for gauges.
    pub fn sub(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::Relaxed);
    }

    /// At least so many, for the most that there were.
    pub fn raise(&self, count: u64) {
        // As a rule it does not, and a look is cheaper than an exchange.
        if count > self.get() {
            self.0.fetch_max(count, Ordering::Relaxed);
        }
    }

    /// The present value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $name:ident,)*) => {
        /// All counters of the module.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $($(#[doc = $doc])+ pub $name: Counter,)*
        }

        impl Metrics {
            const fn new() -> Self {
                Self { $($name: Counter(AtomicU64::new(0)),)* }
            }

            /// Every counter's name and value, in the order of `INFO rdma`.
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                let (now, peak) = account::registered();
                vec![
                    $((stringify!($name), self.$name.get()),)*
                    ("registered_bytes", now),
                    ("registered_peak_bytes", peak),
                    ("registrations", account::registrations()),
                ]
            }
        }
    };
}

metrics! {
    /// Connections that are not the server's clients yet.
    connections_handshaking,
    /// Connections that are the server's clients.
    connections_established,
    /// Connections that the server closed and whose last bytes are on their way.
    connections_lingering,
    /// Connections that are over, whose parts are being given back.
    connections_ending,
    /// Connections with a reply that their client's window does not take, now.
    connections_window_full,
    /// Connections that were handed to the server, which may have refused them, ever.
    connections_accepted,
    /// Connections that this server opened to others, ever.
    connections_opened,
    /// Links to primaries, and for moving slots, that went over RDMA, ever.
    links_over_rdma,
    /// Those that went over TCP, though RDMA was preferred, ever.
    links_over_tcp,
    /// Those that did not come about, since RDMA was required, ever.
    links_refused,
    /// Of the last two, those for which there was another server over RDMA than over TCP.
    links_to_another_server,
    /// Connection requests that were refused.
    connections_refused,
    /// Of these, because of `max-handshakes`.
    refused_handshakes,
    /// Because memory could not be registered: `max-registered-memory`, or locked memory.
    refused_memory,
    /// Because no descriptor was left.
    refused_descriptors,
    /// Because the device, or the connection manager, had something else against it.
    refused_device,
    /// Ends by the client.
    ended_by_client,
    /// Ends by the server: a reply that closes, `CLIENT KILL`, a limit.
    ended_by_server,
    /// Ends by a violation of the protocol.
    ended_by_violation,
    /// Ends by an error of the fabric.
    ended_by_error,
    /// Ends of connections that did not complete their handshake in time, or left a keepalive
    /// probe without an answer.
    ended_by_timeout,
    /// Connections that lingered and were ended early, to make room for others.
    lingering_cut_short,
    /// Most ends that one pass has seen to.
    endings_at_once_most,
    /// Payload that the server has read.
    bytes_received,
    /// Payload that was posted into clients' windows.
    bytes_sent,
    /// Passes of the poller over completions or ready connections.
    passes,
    /// Completions taken from the completion queues.
    completions,
    /// Most completions that one poll took.
    completions_per_poll_peak,
    /// Reads that returned bytes, by thread.
    reads_main,
    /// As above.
    reads_io,
    /// Writes that took bytes, by thread.
    writes_main,
    /// As above.
    writes_io,
    /// Writes that took less than they were given, by thread.
    short_writes_main,
    /// As above.
    short_writes_io,
    /// Jobs of I/O threads that might have sent replies to writes before these were synced, with
    /// `appendfsync always`; they were told to come again.
    writes_before_sync,
    /// Times that a write was held back because the client's window was full.
    window_stalls,
    /// Time that such writes waited, of those that are over, in milliseconds.
    window_stalls_ms,
    /// Times that a write was held back because staging memory or the send queue was full.
    staging_stalls,
    /// Time that such writes waited, of those that are over, in milliseconds.
    staging_stalls_ms,
    /// Write handlers called because a window or staging memory had room again. Main thread:
    /// no other calls handlers.
    resumptions,
    /// Announcements of receive buffers that clients sent to us.
    announcements_received,
    /// Announcements of our receive buffers that we sent to clients.
    announcements_sent,
    /// Of these: sent while the buffer before was not read to its end.
    announcements_sent_early,
    /// Times that a connection had something to do and could not go on by itself.
    parked,
    /// Times that such a connection was woken.
    woken,
    /// Connections that were stuck although they had something to do; 0 in a correct build.
    watchdog_nudges,
    /// Violations of the protocol.
    violations,
    /// Of these: SENDs that are no control message of the protocol.
    violations_message,
    /// Immediates that exceed our window.
    violations_overrun,
    /// Announcements before the last one was used up, or of a buffer that can't be.
    violations_announcement,
    /// Features switched on that there are not.
    violations_feature,
    /// Completions that no operation of the protocol leads to.
    violations_operation,
    /// Busy polls that found completions: the device's event was left in its channel.
    busy_poll_hits,
    /// Busy polls that found none, so that the event was taken.
    busy_poll_misses,
    /// Completions of work requests with an error, flushes not counted.
    error_completions,
    /// Of these: the client posted no receives (RNR) for longer than it asked us to try.
    errors_receiver_not_ready,
    /// The client, or the network between, did not answer.
    errors_transport,
    /// The client's buffer was not what it announced.
    errors_remote_access,
    /// The client's device refused or failed.
    errors_remote,
    /// Our own side.
    errors_local,
    /// Work requests that could not be posted, but for want of room; their connections ended.
    posts_failed,
    /// Polls of a completion queue that failed; the next one went on, or the device was lost.
    poll_failures,
    /// Keepalive probes: zero-length writes to a silent client, or behind the last reply.
    keepalive_probes,
    /// Devices that were removed, or failed, while they were in use.
    devices_lost,
    /// Devices that were found unable to serve clients: they refuse what the protocol needs.
    devices_unfit,
    /// Completion queues that failed, and ended their connections.
    queues_lost,
    /// Asynchronous events of the devices in use.
    device_events,
    /// Listening addresses whose device is gone, which are tried again, now.
    listeners_waiting,
}

impl Metrics {
    /// Counts a violation, in all and by its kind.
    pub fn violated(&self, violation: &Violation) {
        self.violations.add(1);
        match violation {
            Violation::Message(_) | Violation::TooLong => &self.violations_message,
            Violation::Overrun(_) => &self.violations_overrun,
            Violation::WindowInUse(_) | Violation::Wraps { .. } => &self.violations_announcement,
            Violation::Feature(_) => &self.violations_feature,
            Violation::Operation(_) => &self.violations_operation,
        }
        .add(1);
    }

    /// Counts a work request that failed, in all and by its kind.
    pub fn failed(&self, failure: Failure) {
        self.error_completions.add(1);
        match failure {
            Failure::ReceiverNotReady => &self.errors_receiver_not_ready,
            Failure::Transport => &self.errors_transport,
            Failure::RemoteAccess => &self.errors_remote_access,
            Failure::Remote => &self.errors_remote,
            Failure::Local => &self.errors_local,
        }
        .add(1);
    }
}

/// The module's counters.
pub static METRICS: Metrics = Metrics::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_add_up_to_the_total() {
        let metrics = Metrics::new();
        for violation in [
            Violation::TooLong,
            Violation::Wraps { address: 1, length: 2 },
            Violation::Feature(1),
            Violation::Operation(9),
        ] {
            metrics.violated(&violation);
        }
        metrics.failed(Failure::ReceiverNotReady);
        metrics.failed(Failure::Local);
        let sum = |prefix: &str| -> u64 {
            let fields = metrics.fields();
            fields.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, n)| n).sum()
        };
        assert_eq!((metrics.violations.get(), sum("violations_")), (4, 4));
        assert_eq!((metrics.error_completions.get(), sum("errors_")), (2, 2));
    }
}
