// SPDX-License-Identifier: BSD-3-Clause
//! Which field of `INFO rdma` is which metric: one table, of which everything is made that is
//! told of a field.

/// What a metric's values do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They only grow, until the server starts anew.
    Counter,
    /// They go up and down.
    Gauge,
}

impl Kind {
    /// As `TYPE` lines say it.
    pub fn text(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// Which number of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The field is the number.
    Whole,
    /// The field is one of milliseconds; the metric has seconds.
    Milliseconds,
    /// The first number of a limit: what there is now.
    Now,
    /// The second one: the most. Without a limit there is none.
    Most,
}

/// One number of `INFO rdma`.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The field, without `rdma_`.
    pub field: &'static str,
    /// The number of it.
    pub part: Part,
    /// The value of the metric's label.
    pub label: &'static str,
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What its values do.
    pub kind: Kind,
    /// The name of its label; empty for none, and then it has one source.
    pub label: &'static str,
    /// What it means.
    pub help: &'static str,
    /// Where its values come from.
    pub sources: &'static [Source],
}

const fn from(field: &'static str) -> Source {
    Source { field, part: Part::Whole, label: "" }
}

const fn part(field: &'static str, part: Part) -> Source {
    Source { field, part, label: "" }
}

/// The value `label` of the metric's label.
const fn by(label: &'static str, field: &'static str) -> Source {
    Source { field, part: Part::Whole, label }
}

const fn seconds(label: &'static str, field: &'static str) -> Source {
    Source { field, part: Part::Milliseconds, label }
}

macro_rules! metrics {
    ($($kind:ident $name:literal $(by $label:literal)?, $help:literal: $($source:expr),+;)+) => {
        /// All metrics that are made of fields of `INFO rdma` which are numbers.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: concat!("valkey_rdma_", $name),
            kind: Kind::$kind,
            label: concat!("", $($label)?),
            help: $help,
            sources: &[$($source),+],
        }),+];
    };
}

metrics! {
    Gauge "connections" by "state", "Connections by how far they have come: in handshake, clients of the server, closed and delivering their last bytes, being given back.":
        by("handshaking", "connections_handshaking"),
        by("established", "connections_established"),
        by("lingering", "connections_lingering"),
        by("ending", "connections_ending");
    Gauge "connections_window_full", "Connections with a reply that their client's window does not take.":
        from("connections_window_full");
    Counter "connections_accepted_total", "Connections that were handed to the server, which may have refused them.":
        from("connections_accepted");
    Counter "connections_opened_total", "Connections that the server opened to other servers.":
        from("connections_opened");
    Counter "connections_refused_total" by "reason", "Connection requests that were refused: max-handshakes, memory that could not be had or registered, no descriptor left, the device or the connection manager.":
        by("handshakes", "refused_handshakes"),
        by("memory", "refused_memory"),
        by("descriptors", "refused_descriptors"),
        by("device", "refused_device");
    Counter "connections_ended_total" by "by", "Connections that are over: closed by the client, by the server, by a violation of the protocol, by an error of the fabric or the device, or since a handshake or a probe took too long.":
        by("client", "ended_by_client"),
        by("server", "ended_by_server"),
        by("violation", "ended_by_violation"),
        by("error", "ended_by_error"),
        by("timeout", "ended_by_timeout");
    Counter "lingering_cut_short_total", "Connections that were delivering their last bytes and were ended to make room for others.":
        from("lingering_cut_short");
    Gauge "endings_at_once_peak", "Most ends that one pass has seen to.":
        from("endings_at_once_most");
    Counter "links_total" by "outcome", "Links to primaries and for moving slots: over RDMA, over TCP though RDMA was preferred, refused since RDMA was required.":
        by("rdma", "links_over_rdma"),
        by("tcp", "links_over_tcp"),
        by("refused", "links_refused");
    Counter "links_to_another_server_total", "Links not over RDMA because TCP and RDMA led to two servers.":
        from("links_to_another_server");
    Counter "received_bytes_total", "Payload that the server has read.":
        from("bytes_received");
    Counter "sent_bytes_total", "Payload that was posted into clients' windows.":
        from("bytes_sent");
    Counter "passes_total", "Passes of the poller over completions or ready connections.":
        from("passes");
    Counter "completions_total", "Completions taken from the completion queues.":
        from("completions");
    Gauge "completions_per_poll_peak", "Most completions that one poll took.":
        from("completions_per_poll_peak");
    Counter "busy_polls_total" by "result", "Looks at the queues without a system call, by whether they found completions.":
        by("hit", "busy_poll_hits"),
        by("miss", "busy_poll_misses");
    Counter "reads_total" by "thread", "Reads that returned bytes, by the main thread and by I/O threads.":
        by("main", "reads_main"),
        by("io", "reads_io");
    Counter "writes_total" by "thread", "Writes that took bytes, by the main thread and by I/O threads.":
        by("main", "writes_main"),
        by("io", "writes_io");
    Counter "short_writes_total" by "thread", "Writes that took less than they were given, by the main thread and by I/O threads.":
        by("main", "short_writes_main"),
        by("io", "short_writes_io");
    Counter "writes_before_sync_total", "Jobs of I/O threads that were told to come again with appendfsync always, before writes were synced.":
        from("writes_before_sync");
    Counter "stalls_total" by "for", "Times that a write was held back: for the client's window, or for staging memory and room in the send queue.":
        by("window", "window_stalls"),
        by("staging", "staging_stalls");
    Counter "stall_seconds_total" by "for", "Time that writes were held back, of those stalls that are over.":
        seconds("window", "window_stalls_ms"),
        seconds("staging", "staging_stalls_ms");
    Counter "resumptions_total", "Write handlers called because there was room again.":
        from("resumptions");
    Counter "announcements_received_total", "Announcements of receive buffers that clients sent.":
        from("announcements_received");
    Counter "announcements_sent_total", "Announcements of receive buffers that were sent to clients.":
        from("announcements_sent");
    Counter "announcements_sent_early_total", "Those of the announcements sent for which the buffer before was not read to its end.":
        from("announcements_sent_early");
    Counter "parked_total", "Times that a connection had something to do and could not go on by itself.":
        from("parked");
    Counter "woken_total", "Times that such a connection was woken.":
        from("woken");
    Counter "watchdog_nudges_total", "Connections that stood still although they had something to do; 0 in a correct build.":
        from("watchdog_nudges");
    Counter "violations_total" by "kind", "Violations of the protocol by clients.":
        by("message", "violations_message"),
        by("overrun", "violations_overrun"),
        by("announcement", "violations_announcement"),
        by("feature", "violations_feature"),
        by("operation", "violations_operation");
    Counter "failed_work_requests_total" by "kind", "Work requests that failed, flushes not counted: the client posted no receives, did not answer, announced another buffer, refused or failed, or the own side did.":
        by("receiver_not_ready", "errors_receiver_not_ready"),
        by("transport", "errors_transport"),
        by("remote_access", "errors_remote_access"),
        by("remote", "errors_remote"),
        by("local", "errors_local");
    Counter "posts_failed_total", "Work requests that a device did not take, but for want of room.":
        from("posts_failed");
    Counter "poll_failures_total", "Polls of a completion queue that failed.":
        from("poll_failures");
    Counter "keepalive_probes_total", "Keepalive probes to silent clients, and behind last replies.":
        from("keepalive_probes");
    Counter "devices_lost_total", "Devices that were removed or failed while they were in use.":
        from("devices_lost");
    Counter "devices_unfit_total", "Devices that were found unable to serve clients.":
        from("devices_unfit");
    Counter "queues_lost_total", "Completion queues that failed, and ended their connections.":
        from("queues_lost");
    Counter "device_events_total", "Asynchronous events of the devices in use.":
        from("device_events");
    Gauge "listeners_waiting", "Listening addresses whose device is gone, which are tried again.":
        from("listeners_waiting");
    Gauge "registered_bytes", "Registered memory.":
        from("registered_bytes");
    Gauge "registered_peak_bytes", "The most registered memory that there was.":
        from("registered_peak_bytes");
    Gauge "registered_limit_bytes", "The limit max-registered-memory; absent where there is none.":
        part("limit_registered_bytes", Part::Most);
    Gauge "locked_memory_limit_bytes", "The server's limit on locked memory; absent where there is none.":
        part("limit_locked_bytes", Part::Most);
    Counter "registrations_total", "Memory regions that were registered.":
        from("registrations");
    Gauge "handshakes", "Connections that count for max-handshakes.":
        part("limit_handshakes", Part::Now);
    Gauge "handshakes_limit", "The limit max-handshakes.":
        part("limit_handshakes", Part::Most);
    Gauge "connections_numbered", "Connections that have a number, in any state.":
        part("limit_connections", Part::Now);
    Gauge "connections_limit", "The most connections that the module can number.":
        part("limit_connections", Part::Most);
}

/// Fields that are no metric of the table above, and what becomes of them.
pub const OTHERS: &[(&str, &str)] = &[
    ("version", "a label of valkey_rdma_module_info"),
    ("line", "a label of valkey_rdma_module_info"),
    ("replication", "the label policy of valkey_rdma_replication_policy"),
    (
        "primary_link",
        "valkey_rdma_primary_link and valkey_rdma_primary_link_age_seconds; not its address and reason, which are texts without a bound",
    ),
    ("device0", "valkey_rdma_device_…, with the device's name as a label; as device1, …"),
    ("connections_refused", "left out: the sum over valkey_rdma_connections_refused_total"),
    ("violations", "left out: the sum over valkey_rdma_violations_total"),
    ("error_completions", "left out: the sum over valkey_rdma_failed_work_requests_total"),
];

/// Metrics that are made of something else than one number of `INFO rdma`.
pub const MADE: &[(&str, Kind, &str)] = &[
    ("valkey_rdma_up", Kind::Gauge, "Whether the server could be read."),
    ("valkey_rdma_exporter_build_info", Kind::Gauge, "The exporter's version."),
    (
        "valkey_rdma_exporter_scrape_duration_seconds",
        Kind::Gauge,
        "How long reading the server took.",
    ),
    (
        "valkey_rdma_exporter_scrape_error",
        Kind::Gauge,
        "Why the server could not be read: 1 for the reason, 0 for all others.",
    ),
    (
        "valkey_rdma_exporter_unknown_fields",
        Kind::Gauge,
        "Fields of INFO rdma that this exporter does not know: it is older than the module.",
    ),
    (
        "valkey_rdma_module_info",
        Kind::Gauge,
        "The module's version, and the line of releases that it took the server for.",
    ),
    (
        "valkey_rdma_replication_policy",
        Kind::Gauge,
        "What carries links to primaries: 1 for the policy in force.",
    ),
    (
        "valkey_rdma_primary_link",
        Kind::Gauge,
        "What carries the link to the primary: 1 for what does; absent where there never was one.",
    ),
    ("valkey_rdma_primary_link_age_seconds", Kind::Gauge, "For how long that has been so."),
    (
        "valkey_rdma_device_info",
        Kind::Gauge,
        "A device in use, and how its connections' receive slots are done.",
    ),
    ("valkey_rdma_device_connections", Kind::Gauge, "Connections of a device."),
    (
        "valkey_rdma_device_receive_slots",
        Kind::Gauge,
        "Receive slots that the device's next connection gets.",
    ),
    ("valkey_rdma_device_completion_queues", Kind::Gauge, "Completion queues of a device."),
    (
        "valkey_rdma_device_completion_entries",
        Kind::Gauge,
        "Entries of a device's completion queues.",
    ),
    (
        "valkey_rdma_device_completion_entries_reserved",
        Kind::Gauge,
        "Of these, those that are reserved for connections.",
    ),
    (
        "valkey_rdma_device_ack_timeout_seconds",
        Kind::Gauge,
        "The local ACK timeout of the device's first connection; absent where it is not known.",
    ),
    (
        "valkey_rdma_clients_waiting",
        Kind::Gauge,
        "Connections by what they wait for, as RDMA.CLIENTS says it.",
    ),
    ("valkey_rdma_clients_longest_wait_seconds", Kind::Gauge, "The longest of these waits."),
    (
        "valkey_rdma_clients_unread_bytes",
        Kind::Gauge,
        "Bytes that have arrived and that the server has not read.",
    ),
    (
        "valkey_rdma_clients_writes_in_flight",
        Kind::Gauge,
        "Writes that are not known to have arrived.",
    ),
    (
        "valkey_rdma_client_received_bytes_total",
        Kind::Counter,
        "Bytes that have arrived from a client.",
    ),
    ("valkey_rdma_client_sent_bytes_total", Kind::Counter, "Bytes that were sent to a client."),
    (
        "valkey_rdma_client_wait_seconds",
        Kind::Gauge,
        "For how long a client has been waiting, by what it waits for.",
    ),
    (
        "valkey_rdma_client_unread_bytes",
        Kind::Gauge,
        "Bytes of a client that have arrived and that the server has not read.",
    ),
    (
        "valkey_rdma_client_buffers_bytes",
        Kind::Gauge,
        "Registered memory of a client beside what each connection has.",
    ),
    (
        "valkey_rdma_client_series_left_out",
        Kind::Gauge,
        "Clients without series of their own, since there are more than were asked for.",
    ),
];

/// Whether the table says what becomes of a field, which may be that it is left out.
pub fn knows(field: &str) -> bool {
    let known = |name: &str| OTHERS.iter().any(|(other, _)| *other == name);
    let metric = || METRICS.iter().flat_map(|metric| metric.sources).any(|it| it.field == field);
    metric() || known(field) || crate::monitor::is_device(field)
}

/// The table for people and programs: a line for each number of a field, with the metric or what
/// else becomes of it, and for each metric that is made of something else, with its meaning.
pub fn listing() -> String {
    let mut text = String::new();
    for metric in METRICS {
        for source in metric.sources {
            let label = match metric.label {
                "" => String::new(),
                label => format!("{{{label}=\"{}\"}}", source.label),
            };
            let part = match source.part {
                Part::Whole => "",
                Part::Milliseconds => " (ms)",
                Part::Now => " (now)",
                Part::Most => " (most)",
            };
            let (field, name, help) = (source.field, metric.name, metric.help);
            text += &format!("rdma_{field}{part}\t{name}{label}\t{help}\n");
        }
    }
    for (field, what) in OTHERS {
        text += &format!("rdma_{field}\t-\t{what}\n");
    }
    for (name, _, help) in MADE {
        text += &format!("-\t{name}\t{help}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn names() -> Vec<(&'static str, Kind, &'static str)> {
        let of_table = METRICS.iter().map(|metric| (metric.name, metric.kind, metric.help));
        of_table.chain(MADE.iter().copied()).collect()
    }

    #[test]
    fn names_are_prometheus_s() {
        let mut seen = BTreeSet::new();
        for (name, kind, help) in names() {
            assert!(seen.insert(name), "{name} is there twice");
            assert!(name.starts_with("valkey_rdma_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
            assert!(!name.contains("_ms") && !name.contains("millisecond"), "{name}");
            assert!(help.ends_with('.') && !help.contains('\n'), "{name}: {help}");
        }
    }

    #[test]
    fn units_and_labels_fit() {
        let mut seen = BTreeSet::new();
        for metric in METRICS {
            assert_eq!(metric.label.is_empty(), metric.sources.len() == 1, "{}", metric.name);
            for source in metric.sources {
                assert_eq!(metric.label.is_empty(), source.label.is_empty(), "{}", metric.name);
                assert_eq!(
                    source.part == Part::Milliseconds,
                    source.field.ends_with("_ms"),
                    "{}",
                    source.field
                );
                assert_eq!(
                    source.field.starts_with("limit_"),
                    matches!(source.part, Part::Now | Part::Most),
                    "{}",
                    source.field
                );
                // A mix-up is a label, or a name, that has nothing of its field.
                assert!(source.field.contains(source.label), "{source:?}");
                let words =
                    source.field.split('_').filter(|word| !["limit", "most"].contains(word));
                let named = words.clone().all(|word| metric.name.contains(word));
                assert!(named || !source.label.is_empty(), "{}: {source:?}", metric.name);
                assert!(seen.insert((source.field, format!("{:?}", source.part))), "{source:?}");
            }
            let bytes = metric.sources.iter().any(|source| source.field.contains("bytes"));
            assert_eq!(bytes, metric.name.contains("_bytes"), "{}", metric.name);
        }
        for (field, _) in OTHERS {
            assert!(!seen.iter().any(|(it, _)| it == field), "{field} is there twice");
        }
    }

    /// The dashboard asks for nothing that there is not.
    #[test]
    fn the_dashboard_s_metrics_are_there() {
        let text = include_str!("../../../../packaging/grafana-dashboard.json");
        let board: serde_json::Value = serde_json::from_str(text).unwrap();
        let mut expressions = Vec::new();
        collect(&board, &mut expressions);
        assert!(expressions.len() > 15, "{}", expressions.len());
        let known: BTreeSet<_> = names().into_iter().map(|(name, ..)| name).collect();
        for expression in expressions {
            let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let mut of_ours = words.filter(|word| word.starts_with("valkey_rdma_")).peekable();
            assert!(of_ours.peek().is_some(), "nothing of ours in: {expression}");
            of_ours.for_each(|word| assert!(known.contains(word), "no {word}: {expression}"));
        }
    }

    /// What stands under `expr`, and the query of a variable.
    fn collect(value: &serde_json::Value, into: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    match value.as_str() {
                        Some(text) if ["expr", "definition"].contains(&name.as_str()) => {
                            into.push(text.to_owned());
                        }
                        _ => collect(value, into),
                    }
                }
            }
            serde_json::Value::Array(items) => items.iter().for_each(|item| collect(item, into)),
            _ => {}
        }
    }
}
