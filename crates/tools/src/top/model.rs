// SPDX-License-Identifier: BSD-3-Clause
//! What `top` shows, without how: readings, the rates between them, and which clients in which
//! order.

use crate::monitor::{Client, Failure, Reading};
use std::cmp::Reverse;
use std::time::{Duration, Instant};

/// By what clients are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Those that wait for something first, by how long they have.
    #[default]
    Wait,
    /// Bytes that arrive in a second.
    In,
    /// Bytes that are sent in a second.
    Out,
    /// Registered memory.
    Memory,
    /// Since when they are connected.
    Age,
    /// The number in `CLIENT LIST`.
    Id,
}

impl Sort {
    /// In one word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::In => "in",
            Self::Out => "out",
            Self::Memory => "memory",
            Self::Age => "age",
            Self::Id => "id",
        }
    }

    /// The next one, in a circle.
    pub fn next(self) -> Self {
        match self {
            Self::Wait => Self::In,
            Self::In => Self::Out,
            Self::Out => Self::Memory,
            Self::Memory => Self::Age,
            Self::Age => Self::Id,
            Self::Id => Self::Wait,
        }
    }
}

/// A client, and what it does in a second.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// As the server tells of it.
    pub client: &'a Client,
    /// Bytes that arrive. None if it was not there before.
    pub received: Option<f64>,
    /// Bytes that are sent.
    pub sent: Option<f64>,
}

/// A reading and its time.
type Sample = (Instant, Reading);

/// All that is shown.
#[derive(Debug, Default)]
pub struct Model {
    /// The server's address, as it was given, and what carries the questions.
    pub server: String,
    /// The time from one reading to the next.
    pub interval: Duration,
    now: Option<Sample>,
    before: Option<Sample>,
    failure: Option<Failure>,
    /// The order.
    pub sort: Sort,
    /// The other way round.
    pub reverse: bool,
    /// What shown clients have in their address, device, state, role or wait.
    pub filter: String,
    /// Whether the filter is being typed.
    pub typing: bool,
    /// Nothing is read.
    pub paused: bool,
    /// How many clients are above the first one that is shown.
    pub skipped: usize,
}

impl Model {
    /// Takes what came of a reading. What was read before a failure stays.
    pub fn take(&mut self, at: Instant, outcome: Result<Reading, Failure>) {
        match outcome {
            Ok(reading) => {
                self.before = self.now.replace((at, reading));
                self.failure = None;
            }
            Err(failure) => self.failure = Some(failure),
        }
    }

    /// The last reading, if there was any.
    pub fn reading(&self) -> Option<&Reading> {
        self.now.as_ref().map(|(_, reading)| reading)
    }

    /// Why the server can't be read now.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// How old the last reading is.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.now.as_ref().map(|(at, _)| now.saturating_duration_since(*at))
    }

    /// The last two readings, and the seconds between them.
    fn span(&self) -> Option<(&Reading, &Reading, f64)> {
        let ((then, before), (at, now)) = (self.before.as_ref()?, self.now.as_ref()?);
        let seconds = at.saturating_duration_since(*then).as_secs_f64();
        (seconds > 0.0).then_some((before, now, seconds))
    }

    /// How much the sum of these counters grows in a second. None where there is nothing to
    /// compare with, as when the server was started anew.
    pub fn rate(&self, counters: &[&str]) -> Option<f64> {
        let (before, now, seconds) = self.span()?;
        let grown = counters
            .iter()
            .map(|counter| now.info.number(counter)?.checked_sub(before.info.number(counter)?));
        Some(grown.sum::<Option<u64>>()? as f64 / seconds)
    }

    /// The clients that the filter lets through, in their order.
    pub fn rows(&self) -> Vec<Row<'_>> {
        let clients = self.reading().and_then(|reading| reading.clients.as_deref());
        let mut rows: Vec<_> = clients
            .unwrap_or_default()
            .iter()
            .filter(|client| self.passes(client))
            .map(|client| self.row(client))
            .collect();
        let rate = |rate: Option<f64>| Reverse(rate.unwrap_or_default() as u64);
        rows.sort_by_key(|row| row.client.id);
        match self.sort {
            Sort::Wait => rows.sort_by_key(|Row { client, .. }| {
                (client.waits_for == "nothing", Reverse(client.waits_ms))
            }),
            Sort::In => rows.sort_by_key(|row| rate(row.received)),
            Sort::Out => rows.sort_by_key(|row| rate(row.sent)),
            Sort::Memory => rows.sort_by_key(|row| Reverse(row.client.buffers)),
            Sort::Age => rows.sort_by_key(|row| Reverse(row.client.age_ms)),
            Sort::Id => {}
        }
        if self.reverse {
            rows.reverse();
        }
        rows
    }

    fn passes(&self, client: &Client) -> bool {
        let wanted = self.filter.to_lowercase();
        let Client { addr, device, state, role, waits_for, .. } = client;
        [addr, device, state, role, waits_for]
            .into_iter()
            .any(|text| text.to_lowercase().contains(&wanted))
    }

    fn row<'a>(&'a self, client: &'a Client) -> Row<'a> {
        let rates = self.span().and_then(|(before, _, seconds)| {
            let before = before.clients.as_ref()?.iter();
            let before = before.clone().find(|it| it.id == client.id && it.addr == client.addr)?;
            let grown =
                |of: fn(&Client) -> u64| Some(of(client).checked_sub(of(before))? as f64 / seconds);
            Some((grown(|it| it.received)?, grown(|it| it.sent)?))
        });
        Row { client, received: rates.map(|it| it.0), sent: rates.map(|it| it.1) }
    }

    /// How many clients wait for each thing that any waits for, and the longest of these waits
    /// in milliseconds; the longest first, and those whose turn it is last.
    pub fn waits(&self) -> Vec<(&str, usize, u64)> {
        let mut waits: Vec<(&str, usize, u64)> = Vec::new();
        let clients = self.reading().and_then(|reading| reading.clients.as_ref());
        for client in clients.into_iter().flatten() {
            match waits.iter_mut().find(|(what, ..)| *what == client.waits_for) {
                Some((_, count, longest)) => {
                    *count += 1;
                    *longest = client.waits_ms.max(*longest);
                }
                None => waits.push((&client.waits_for, 1, client.waits_ms)),
            }
        }
        waits.sort_by_key(|(what, _, longest)| (*what == "nothing", Reverse(*longest)));
        waits
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::monitor::{Info, Reason};

    /// Two readings with two seconds between: a client that works, one that does not read, one
    /// whose turn it is, and one in handshake that came only now.
    pub fn example() -> Model {
        let info = |received: u64, stalls: u64| {
            Info::parse(&format!(
                "rdma_version:0.1.0\r\nrdma_line:9.1\r\nrdma_replication:prefer\r\n\
                 rdma_device0:name=mlx5_0,ports=1,connections=4\r\n\
                 rdma_primary_link:transport=tcp,to=h,since-ms=90000,why=x\r\n\
                 rdma_connections_handshaking:1\r\nrdma_connections_established:3\r\n\
                 rdma_connections_lingering:0\r\nrdma_connections_ending:0\r\n\
                 rdma_connections_window_full:1\r\nrdma_connections_accepted:7\r\n\
                 rdma_connections_refused:2\r\nrdma_bytes_received:{received}\r\n\
                 rdma_bytes_sent:1048576\r\nrdma_reads_main:0\r\nrdma_reads_io:{stalls}\r\n\
                 rdma_writes_main:0\r\nrdma_writes_io:{stalls}\r\nrdma_window_stalls:{stalls}\r\n\
                 rdma_staging_stalls:0\r\nrdma_watchdog_nudges:0\r\nrdma_violations:1\r\n\
                 rdma_error_completions:0\r\nrdma_posts_failed:0\r\nrdma_devices_lost:0\r\n\
                 rdma_registered_bytes:2097152\r\nrdma_limit_registered_bytes:2097152/4194304\r\n\
                 rdma_limit_locked_bytes:2097152/none\r\n"
            ))
        };
        let client = |id, port: u16, waits_for: &str, waits_ms, received| Client {
            id,
            addr: format!("192.0.2.7:{port}"),
            device: String::from("mlx5_0"),
            role: String::from("client"),
            state: String::from(if id.is_some() { "established" } else { "handshaking" }),
            waits_for: waits_for.to_owned(),
            waits_ms,
            age_ms: 7612,
            received,
            receive_window: (received % 16384, 16384),
            send_window: (if waits_for == "client's window" { 1 << 20 } else { 0 }, 1 << 20),
            buffers: 30464,
            ..Client::default()
        };
        let working = |received| client(Some(12), 40001, "I/O thread", 3, received);
        let stalled = client(Some(7), 36944, "client's window", 5865, 17);
        let idle = client(Some(3), 40003, "nothing", 3_700_000, 900);
        let new = client(None, 40004, "client's announcement", 12, 0);
        let mut model = Model {
            server: String::from("db.example over TCP"),
            interval: Duration::from_secs(2),
            ..Model::default()
        };
        let then = Instant::now();
        let before = vec![working(1000), stalled.clone(), idle.clone()];
        let now = vec![working(2_001_000), stalled, idle, new];
        let reading = |info, clients| Ok(Reading { info, clients: Some(clients) });
        model.take(then, reading(info(1_000_000, 10), before));
        model.take(then + Duration::from_secs(2), reading(info(3_000_000, 250), now));
        model
    }

    fn order(model: &Model) -> Vec<Option<u64>> {
        model.rows().iter().map(|row| row.client.id).collect()
    }

    #[test]
    fn rates_are_between_the_last_two_readings() {
        let mut model = example();
        assert_eq!(model.rate(&["bytes_received"]), Some(1_000_000.0));
        assert_eq!(model.rate(&["reads_main", "reads_io"]), Some(120.0));
        assert_eq!(model.rate(&["no_such_field"]), None);
        let rows = model.rows();
        let row = |id| rows.iter().find(|row| row.client.id == id).unwrap();
        assert_eq!(row(Some(12)).received, Some(1_000_000.0));
        assert_eq!(row(Some(7)).sent, Some(0.0));
        assert_eq!(row(None).received, None, "there is nothing to compare with");
        // The server was started anew: its counters begin again.
        let fresh = Reading { info: Info::parse("rdma_bytes_received:5\r\n"), clients: None };
        model.take(Instant::now() + Duration::from_secs(9), Ok(fresh));
        assert_eq!(model.rate(&["bytes_received"]), None);
    }

    #[test]
    fn clients_are_sorted_and_filtered() {
        let mut model = example();
        assert_eq!(order(&model), [Some(7), None, Some(12), Some(3)]);
        assert_eq!(
            model.waits(),
            [
                ("client's window", 1, 5865),
                ("client's announcement", 1, 12),
                ("I/O thread", 1, 3),
                ("nothing", 1, 3_700_000)
            ]
        );
        model.sort = Sort::In;
        assert_eq!(order(&model)[0], Some(12));
        model.reverse = true;
        assert_eq!(order(&model)[3], Some(12));
        model.filter = String::from("Window");
        assert_eq!(order(&model), [Some(7)]);
        model.filter = String::from("192.0.2.8");
        assert_eq!(order(&model), []);
        let mut sort = Sort::default();
        for _ in 0..6 {
            sort = sort.next();
        }
        assert_eq!(sort, Sort::default());
    }

    #[test]
    fn a_failure_leaves_what_was_read() {
        let mut model = example();
        let failure = Failure { reason: Reason::Connect, text: String::from("nobody there") };
        model.take(Instant::now(), Err(failure));
        assert_eq!(order(&model).len(), 4);
        assert!(model.failure().is_some());
    }
}
