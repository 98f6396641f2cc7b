// SPDX-License-Identifier: BSD-3-Clause
//! Prometheus' text exposition format, version 0.0.4.

use super::table::{Kind, MADE, METRICS, Metric, Part, knows};
use crate::monitor::{Client, Failure, Info, Reading, Reason, WAITS};
use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::time::Duration;

/// A label's name and value.
type Label<'a> = (&'a str, &'a str);

/// What one reading comes to.
///
/// `series` is how many clients get series of their own at most.
pub fn write(outcome: &Result<Reading, Failure>, took: Duration, series: usize) -> String {
    let mut page = Page::default();
    page.made("valkey_rdma_up", [(vec![], u64::from(outcome.is_ok()))]);
    let version = ("version", env!("CARGO_PKG_VERSION"));
    page.made("valkey_rdma_exporter_build_info", [(vec![version], 1)]);
    page.made("valkey_rdma_exporter_scrape_duration_seconds", [(vec![], took.as_secs_f64())]);
    let failed = outcome.as_ref().err().map(|failure| failure.reason);
    let reasons = Reason::ALL
        .map(|reason| (vec![("reason", reason.text())], u64::from(failed == Some(reason))));
    page.made("valkey_rdma_exporter_scrape_error", reasons);
    match outcome {
        Ok(reading) => {
            page.info(&reading.info);
            if let Some(clients) = &reading.clients {
                page.clients(clients);
                page.series(clients, series);
            }
        }
        // For people: a comment is nothing to Prometheus.
        Err(failure) => page.comment(&failure.text),
    }
    page.text
}

/// The text so far.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn comment(&mut self, text: &str) {
        let _ = writeln!(self.text, "# {}", text.replace('\n', " "));
    }

    fn head(&mut self, name: &str, kind: Kind, help: &str) {
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {}", kind.text());
    }

    fn sample(&mut self, name: &str, labels: &[Label], value: impl Display) {
        self.text.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
            let begin = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{begin}{label}=\"{value}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{end} {value}");
    }

    /// A metric that is not of the table of fields. Nothing, if it has no values. Of values with
    /// the same labels the first counts: Prometheus would refuse the whole page.
    fn made<'a, V: Display>(
        &mut self,
        name: &str,
        samples: impl IntoIterator<Item = (Vec<Label<'a>>, V)>,
    ) {
        let (_, kind, help) = MADE.iter().find(|(it, ..)| *it == name).expect("in the table");
        let mut seen = BTreeSet::new();
        for (labels, value) in samples {
            if seen.is_empty() {
                self.head(name, *kind, help);
            }
            if seen.insert(labels.clone()) {
                self.sample(name, &labels, value);
            }
        }
    }

    /// A metric of the table of fields. Nothing of what the server does not tell: its module may
    /// be older.
    fn metric(&mut self, metric: &Metric, info: &Info) {
        let mut begun = false;
        for source in metric.sources {
            let value = match source.part {
                Part::Whole => info.number(source.field).map(|value| value.to_string()),
                Part::Milliseconds => info.number(source.field).map(milliseconds),
                Part::Now => info.limit(source.field).map(|(now, _)| now.to_string()),
                Part::Most => {
                    info.limit(source.field).and_then(|(_, most)| most).map(|most| most.to_string())
                }
            };
            let Some(value) = value else { continue };
            if !begun {
                self.head(metric.name, metric.kind, metric.help);
                begun = true;
            }
            let label = [(metric.label, source.label)];
            self.sample(metric.name, if metric.label.is_empty() { &[] } else { &label }, value);
        }
    }

    fn info(&mut self, info: &Info) {
        METRICS.iter().for_each(|metric| self.metric(metric, info));
        let unknown: Vec<_> =
            info.fields().map(|(name, _)| name).filter(|name| !knows(name)).collect();
        self.made("valkey_rdma_exporter_unknown_fields", [(vec![], unknown.len())]);
        if !unknown.is_empty() {
            self.comment(&format!("not known, rdma_…: {}", unknown.join(" ")));
        }
        let text = |name| info.text(name).unwrap_or_default();
        let labels = vec![("version", text("version")), ("line", text("line"))];
        self.made("valkey_rdma_module_info", [(labels, 1)]);
        let policies = ["no", "prefer", "require"].map(|policy| {
            (vec![("policy", policy)], u64::from(info.text("replication") == Some(policy)))
        });
        self.made("valkey_rdma_replication_policy", policies);
        if let Some(link) = info.map("primary_link") {
            let carriers = ["rdma", "tcp", "none"].map(|carrier| {
                let carried = link.text("transport") == Some(carrier);
                (vec![("transport", carrier)], u64::from(carried))
            });
            self.made("valkey_rdma_primary_link", carriers);
            let age = link.number("since-ms").map(|age| (vec![], milliseconds(age)));
            self.made("valkey_rdma_primary_link_age_seconds", age);
        }
        self.devices(info);
    }

    fn devices(&mut self, info: &Info) {
        let kinds = info.devices().filter_map(|device| {
            let kind = device.text("receive-slots").unwrap_or_default();
            Some((vec![("device", device.text("name")?), ("receive_slots", kind)], 1))
        });
        self.made("valkey_rdma_device_info", kinds);
        for (name, field) in [
            ("valkey_rdma_device_connections", "connections"),
            ("valkey_rdma_device_receive_slots", "receive-slots-each"),
            ("valkey_rdma_device_completion_queues", "completion-queues"),
            ("valkey_rdma_device_completion_entries", "completion-entries"),
            ("valkey_rdma_device_completion_entries_reserved", "completion-entries-reserved"),
        ] {
            let values = info.devices().filter_map(|device| {
                Some((vec![("device", device.text("name")?)], device.number(field)?))
            });
            self.made(name, values);
        }
        // As the device has it: 4.096 µs × 2^N, and 0 for unknown.
        let timeouts = info.devices().filter_map(|device| {
            let exponent = device.number("ack-timeout").filter(|it| (1..=31).contains(it))?;
            let seconds = 4.096e-6 * (1_u64 << exponent) as f64;
            Some((vec![("device", device.text("name")?)], seconds))
        });
        self.made("valkey_rdma_device_ack_timeout_seconds", timeouts);
    }

    /// What all clients together come to: as many series whatever their number.
    fn clients(&mut self, clients: &[Client]) {
        let known = |wait: &str| WAITS.contains(&wait);
        let waits = || WAITS.into_iter().chain(["other"]);
        let all = |wait: &'static str| {
            clients.iter().filter(move |client| match wait {
                "other" => !known(&client.waits_for),
                wait => client.waits_for == wait,
            })
        };
        let counts = waits().map(|wait| (vec![("waits_for", wait)], all(wait).count()));
        self.made("valkey_rdma_clients_waiting", counts);
        let longest = waits().map(|wait| {
            let longest = all(wait).map(|client| client.waits_ms).max();
            (vec![("waits_for", wait)], milliseconds(longest.unwrap_or_default()))
        });
        self.made("valkey_rdma_clients_longest_wait_seconds", longest);
        let sum = |of: fn(&Client) -> u64| [(vec![], clients.iter().map(of).sum::<u64>())];
        self.made("valkey_rdma_clients_unread_bytes", sum(|client| client.unread));
        self.made("valkey_rdma_clients_writes_in_flight", sum(|client| client.in_flight));
    }

    /// Series of single clients: of those that are connected longest, since these stay the same.
    fn series(&mut self, clients: &[Client], most: usize) {
        if most == 0 {
            return;
        }
        let mut chosen: Vec<_> =
            clients.iter().filter_map(|client| Some((client.id?.to_string(), client))).collect();
        chosen.sort_by_key(|(_, client)| client.id);
        chosen.truncate(most);
        let left_out = clients.len() - chosen.len();
        self.made("valkey_rdma_client_series_left_out", [(vec![], left_out)]);
        for (name, of) in [
            ("valkey_rdma_client_received_bytes_total", (|it| it.received) as fn(&Client) -> u64),
            ("valkey_rdma_client_sent_bytes_total", |it| it.sent),
            ("valkey_rdma_client_unread_bytes", |it| it.unread),
            ("valkey_rdma_client_buffers_bytes", |it| it.buffers),
        ] {
            let values = chosen.iter().map(|(id, client)| {
                (vec![("id", id.as_str()), ("addr", &client.addr)], of(client))
            });
            self.made(name, values);
        }
        let waits = chosen.iter().map(|(id, client)| {
            let labels =
                vec![("id", id.as_str()), ("addr", &client.addr), ("waits_for", &client.waits_for)];
            (labels, milliseconds(client.waits_ms))
        });
        self.made("valkey_rdma_client_wait_seconds", waits);
    }
}

/// Milliseconds in seconds, exactly.
fn milliseconds(value: u64) -> String {
    format!("{}.{:03}", value / 1000, value % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(info: &str, clients: Vec<Client>) -> Result<Reading, Failure> {
        Ok(Reading { info: Info::parse(info), clients: Some(clients) })
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|it| it == line), "no '{line}' in\n{text}");
    }

    #[test]
    fn fields_are_metrics_in_base_units() {
        let info = "rdma_version:0.1.0\r\nrdma_line:9.1\r\nrdma_bytes_sent:18446744073709551615\r\n\
            rdma_window_stalls_ms:12034\r\nrdma_reads_io:7\r\nrdma_limit_handshakes:3/1024\r\n\
            rdma_limit_registered_bytes:4096/none\r\nrdma_replication:prefer\r\n\
            rdma_primary_link:transport=tcp,to=h port 1,since-ms=1500,why=a, b\r\n\
            rdma_device0:name=d0,ports=1,connections=2,receive-slots=private,ack-timeout=14\r\n\
            rdma_device1:name=d0,ports=1,connections=9,receive-slots=private,ack-timeout=0\r\n\
            rdma_new_thing:1\r\n";
        let text = write(&reading(info, Vec::new()), Duration::from_millis(2), 0);
        for line in [
            "valkey_rdma_up 1",
            "valkey_rdma_exporter_scrape_duration_seconds 0.002",
            "valkey_rdma_exporter_scrape_error{reason=\"auth\"} 0",
            "valkey_rdma_sent_bytes_total 18446744073709551615",
            "# TYPE valkey_rdma_sent_bytes_total counter",
            "valkey_rdma_stall_seconds_total{for=\"window\"} 12.034",
            "valkey_rdma_reads_total{thread=\"io\"} 7",
            "valkey_rdma_handshakes 3",
            "valkey_rdma_handshakes_limit 1024",
            "valkey_rdma_module_info{version=\"0.1.0\",line=\"9.1\"} 1",
            "valkey_rdma_replication_policy{policy=\"prefer\"} 1",
            "valkey_rdma_primary_link{transport=\"rdma\"} 0",
            "valkey_rdma_primary_link_age_seconds 1.500",
            "valkey_rdma_device_connections{device=\"d0\"} 2",
            "valkey_rdma_device_ack_timeout_seconds{device=\"d0\"} 0.067108864",
            "valkey_rdma_exporter_unknown_fields 1",
            "# not known, rdma_…: new_thing",
        ] {
            has(&text, line);
        }
        // No limit, no field, and a series that is there already.
        for absent in ["registered_limit_bytes", "thread=\"main\"", "device=\"d0\"} 9"] {
            assert!(!text.contains(absent), "{absent} in\n{text}");
        }
    }

    #[test]
    fn clients_are_counted_by_what_they_wait_for() {
        let client = |id, waits_for: &str, waits_ms| Client {
            id,
            addr: format!("h\"{id:?}"),
            waits_for: waits_for.to_owned(),
            waits_ms,
            unread: 5,
            ..Client::default()
        };
        let clients = vec![
            client(Some(12), "client's window", 5000),
            client(None, "client's announcement", 7),
            client(Some(3), "client's window", 900),
            client(Some(4), "a new kind of wait", 1),
        ];
        let text = write(&reading("", clients), Duration::ZERO, 2);
        for line in [
            "valkey_rdma_clients_waiting{waits_for=\"client's window\"} 2",
            "valkey_rdma_clients_waiting{waits_for=\"nothing\"} 0",
            "valkey_rdma_clients_waiting{waits_for=\"other\"} 1",
            "valkey_rdma_clients_longest_wait_seconds{waits_for=\"client's window\"} 5.000",
            "valkey_rdma_clients_unread_bytes 20",
            "valkey_rdma_client_series_left_out 2",
            "valkey_rdma_client_unread_bytes{id=\"3\",addr=\"h\\\"Some(3)\"} 5",
        ] {
            has(&text, line);
        }
        assert!(!text.contains("id=\"12\""), "more series than were asked for\n{text}");
    }

    #[test]
    fn a_server_that_is_away_is_down() {
        let failure = Failure { reason: Reason::Connect, text: String::from("nobody\nthere") };
        let text = write(&Err(failure), Duration::ZERO, 0);
        has(&text, "valkey_rdma_up 0");
        has(&text, "valkey_rdma_exporter_scrape_error{reason=\"connect\"} 1");
        has(&text, "# nobody there");
        assert!(!text.contains("valkey_rdma_connections"), "{text}");
    }
}
