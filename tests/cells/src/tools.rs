// SPDX-License-Identifier: BSD-3-Clause
//! The clients nobody here wrote: `valkey-cli` and `valkey-benchmark`, with `--rdma`.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cell::Cell;
use crate::info::Info;
use crate::process::{Output, Process, run_beside, tail};
use crate::server::host;

impl Cell<'_> {
    /// One of the tools, pointed at the server's RDMA side.
    fn tool(&self, name: &str) -> Command {
        let address = self.server().rdma_address();
        let mut command = Command::new(self.lab.clients.join(name));
        command.args(["--rdma", "-h", &host(address.ip())]);
        command.args(["-p", &address.port().to_string()]);
        command
    }

    fn run_tool(&self, command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
        run_beside(command, input, self.folder(), limit, || self.server().scene())
    }

    /// Runs `valkey-cli --rdma` with `arguments`, and `input` to its standard input.
    pub fn cli(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        let mut command = self.tool("valkey-cli");
        command.args(arguments);
        self.run_tool(&mut command, input, self.lab.patience())
    }

    /// The same, where nothing but success will do; its output without the last newline.
    pub fn cli_text(&self, arguments: &[&str]) -> Result<String> {
        let output = self.cli(arguments, b"")?;
        ensure!(
            output.status.success(),
            "valkey-cli {arguments:?}: {} {} {}",
            output.status,
            tail(&output.text()),
            tail(&output.stderr)
        );
        Ok(output.text().trim_end_matches('\n').to_owned())
    }

    /// Runs `valkey-benchmark --rdma` to its end and returns a line for each test.
    pub fn benchmark(&mut self, load: &Load, limit: Duration) -> Result<Vec<Row>> {
        let mut command = self.benchmark_command(load);
        let output = self.run_tool(&mut command, b"", limit)?;
        ensure!(
            output.status.success(),
            "valkey-benchmark: {} {} {}",
            output.status,
            tail(&output.text()),
            tail(&output.stderr)
        );
        let rows = rows(&output.text())?;
        ensure!(
            rows.len() == load.tests.len(),
            "valkey-benchmark reported {} tests of {}: {}",
            rows.len(),
            load.tests.len(),
            output.text()
        );
        for row in &rows {
            self.figure(
                &format!("{} of {} B, {} clients", row.test, load.size, load.clients),
                format!("{:.0}/s, p99 {:.1} ms", row.per_second, row.p99),
            );
        }
        for test in &load.tests {
            let bytes = load.requests * load.size;
            match *test {
                "set" => self.moved(bytes, load.requests * 5),
                "ping_mbulk" => self.moved(load.requests * 14, load.requests * 7),
                _ => self.moved(load.requests * 20, bytes),
            }
        }
        Ok(rows)
    }

    /// Starts `valkey-benchmark --rdma` on a load that lasts until it is dropped, and waits until
    /// all its clients are connected: it crashes where one can't connect.
    pub fn traffic(&self, clients: usize, size: usize) -> Result<Traffic> {
        let load = Load {
            tests: vec!["set", "get"],
            requests: 1_000_000_000,
            clients,
            size,
            ..Load::default()
        };
        let mut command = self.benchmark_command(&load);
        command.arg("-l");
        let output = std::fs::File::create(self.folder().join("traffic"))?;
        command.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let established = |info: &Info| info.number("rdma_connections_established");
        let before = established(&self.info()?)?;
        let traffic = Traffic(Process::spawn(&mut command)?);
        self.wait_info("its clients", |info| Ok(established(info)? >= before + clients as u64))?;
        Ok(traffic)
    }

    /// Starts `valkey-benchmark --rdma` with so many clients that do nothing until it is dropped.
    pub fn idle_clients(&self, count: usize) -> Result<Traffic> {
        let mut command = self.tool("valkey-benchmark");
        command.args(["-I", "-c", &count.to_string()]);
        let output = std::fs::File::create(self.folder().join("idle-clients"))?;
        command.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Traffic(Process::spawn(&mut command)?))
    }

    fn benchmark_command(&self, load: &Load) -> Command {
        let mut command = self.tool("valkey-benchmark");
        command.args(["-t", &load.tests.join(","), "--csv"]);
        command.args(["-n", &load.requests.to_string()]);
        command.args(["-c", &load.clients.to_string()]);
        command.args(["-d", &load.size.to_string()]);
        command.args(["-P", &load.pipeline.to_string()]);
        command.args(["-k", if load.reconnect { "0" } else { "1" }]);
        command
    }
}

/// What `valkey-benchmark` is asked to do.
pub struct Load {
    /// The names of its tests.
    pub tests: Vec<&'static str>,
    /// Requests of each test.
    pub requests: usize,
    /// Connections.
    pub clients: usize,
    /// The length of a value.
    pub size: usize,
    /// Requests that a connection sends before it waits for replies.
    pub pipeline: usize,
    /// A connection for each request.
    pub reconnect: bool,
}

impl Default for Load {
    fn default() -> Self {
        let (requests, clients, size, pipeline) = (1, 1, 3, 1);
        Self { tests: Vec::new(), requests, clients, size, pipeline, reconnect: false }
    }
}

/// What `valkey-benchmark` says of a test.
#[derive(Debug, PartialEq)]
pub struct Row {
    /// The test.
    pub test: String,
    /// Requests in a second.
    pub per_second: f64,
    /// The 99th percentile of the latency, in milliseconds.
    pub p99: f64,
}

/// Reads the benchmark's table: a heading, and a line of quoted fields for each test.
fn rows(text: &str) -> Result<Vec<Row>> {
    let mut lines = text
        .lines()
        .filter(|line| line.starts_with('"'))
        .map(|line| -> Vec<&str> { line.trim_matches('"').split("\",\"").collect() });
    let heading = lines.next().context("valkey-benchmark printed no table")?;
    let column = |name: &str| {
        heading
            .iter()
            .position(|field| *field == name)
            .with_context(|| format!("valkey-benchmark's table has no column {name}"))
    };
    let (rate, p99) = (column("rps")?, column("p99_latency_ms")?);
    lines
        .map(|fields| {
            let number = |at: usize| -> Result<f64> {
                let text = fields.get(at).context("a short line")?;
                text.parse().with_context(|| format!("'{text}'"))
            };
            Ok(Row { test: fields[0].to_owned(), per_second: number(rate)?, p99: number(p99)? })
        })
        .collect()
}

/// A benchmark that runs in the background.
pub struct Traffic(Process);

impl Traffic {
    /// Ends it, after making sure that it has not given up by itself.
    pub fn stop(mut self) -> Result<()> {
        let status = self.0.status()?;
        ensure!(status.is_none(), "the traffic had ended by itself: {status:?}");
        self.0.end(Duration::from_secs(5))?;
        Ok(())
    }
}

/// A TCP client that pings the server every half second, in a thread of its own.
pub struct Pinger {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Result<Pings>>,
}

/// What a [`Pinger`] saw.
pub struct Pings {
    /// Pings sent, each of which was answered.
    pub count: u32,
    /// The longest wait for an answer.
    pub worst: Duration,
}

impl Pinger {
    /// Starts to ping the cell's server; an answer that takes `limit` is none.
    pub fn start(cell: &Cell, limit: Duration) -> Result<Self> {
        let mut client = cell.server().tcp(limit)?;
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut pings = Pings { count: 0, worst: Duration::ZERO };
            loop {
                let sent = Instant::now();
                let reply = client
                    .command(&[b"PING"])
                    .with_context(|| format!("TCP ping number {}", pings.count + 1))?;
                ensure!(reply.text() == "PONG", "TCP ping: {reply}");
                pings.count += 1;
                pings.worst = pings.worst.max(sent.elapsed());
                match stopped.recv_timeout(Duration::from_millis(500)) {
                    Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                    _ => return Ok(pings),
                }
            }
        });
        Ok(Self { stop, thread })
    }

    /// Stops, and fails if a ping went unanswered.
    pub fn end(self) -> Result<Pings> {
        let _ = self.stop.send(());
        self.thread.join().expect("the pinger does not panic")
    }

    /// The same, with a figure for the report.
    pub fn stop(self, cell: &mut Cell) -> Result<Pings> {
        let pings = self.end()?;
        cell.figure("TCP pings", format!("{}, worst {} ms", pings.count, pings.worst.as_millis()));
        Ok(pings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmark_s_table_is_read_by_its_heading() {
        let text = "noise\n\"test\",\"rps\",\"avg_latency_ms\",\"p99_latency_ms\"\n\
                    \"SET\",\"1234.50\",\"0.1\",\"2.5\"\n\"GET\",\"99.00\",\"0.1\",\"3.0\"\n";
        let row = |test: &str, per_second, p99| Row { test: test.to_owned(), per_second, p99 };
        assert_eq!(rows(text).unwrap(), [row("SET", 1234.5, 2.5), row("GET", 99.0, 3.0)]);
        assert!(rows("nothing").is_err());
    }
}
