// SPDX-License-Identifier: BSD-3-Clause
//! Counters and gauges behind `INFO rdma`. Counting costs one relaxed add.

use crate::verbs::memory;
use std::sync::atomic::{AtomicU64, Ordering};

/// One number that only grows, or a gauge that also shrinks. Any thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// One less, for gauges.
    pub fn sub(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::Relaxed);
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
                let (now, peak) = memory::registered();
                vec![
                    $((stringify!($name), self.$name.get()),)*
                    ("registered_bytes", now),
                    ("registered_peak_bytes", peak),
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
    /// Connections that became the server's clients, ever.
    connections_accepted,
    /// Connections that this server opened to others, ever.
    connections_opened,
    /// Connection requests that were refused.
    connections_refused,
    /// Ends by the client.
    ended_by_client,
    /// Ends by the server: a reply that closes, `CLIENT KILL`, a limit.
    ended_by_server,
    /// Ends by a violation of the protocol.
    ended_by_violation,
    /// Ends by an error of the fabric.
    ended_by_error,
    /// Ends of connections that did not complete their handshake in time.
    ended_by_timeout,
    /// Payload that arrived in our windows.
    bytes_received,
    /// Payload that was posted into clients' windows.
    bytes_sent,
    /// Passes of the poller over completions or ready connections.
    passes,
    /// Completions taken from the completion queues.
    completions,
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
    /// Write handlers called because a window or staging memory had room again.
    resumptions_main,
    /// As above; always 0, since handlers run on the main thread only.
    resumptions_io,
    /// Clients' receive buffers that were opened to us.
    windows_sent,
    /// Our receive buffers that were opened to clients.
    windows_received,
    /// Times that a connection had something to do and could not go on by itself.
    parked,
    /// Times that such a connection was woken.
    woken,
    /// Violations of the protocol.
    violations,
    /// Work completions with an error, flushes not counted.
    error_completions,
    /// Zero-length writes posted to see whether a silent client is alive.
    probes,
}

/// The module's counters.
pub static METRICS: Metrics = Metrics::new();
