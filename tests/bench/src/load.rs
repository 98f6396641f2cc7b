// SPDX-License-Identifier: BSD-3-Clause
//! One run: a new server, load by `valkey-benchmark`, and what both used meanwhile.
//!
//! The load lasts a fixed time. Processor time and requests are read off twice within that
//! time, both when all clients are connected and served, so that making and ending connections
//! counts for nothing.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cells::info::Info;
use cells::lab::Lab;
use cells::process::{Process, run, tail, threads};
use cells::server::Server;
use serde::{Deserialize, Serialize};

use crate::contender::{Contender, alive, end};
use crate::table::{Cell, Pace};
use crate::usage::Usage;

/// How far the readings keep from both ends of what the benchmark measures: it looks at its
/// clock every quarter of a second.
const MARGIN: Duration = Duration::from_millis(300);

/// What a run measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Requests in a second, as the benchmark counts them.
    pub rate: f64,
    /// Latency in milliseconds that half of the requests keep.
    pub p50: f64,
    /// Latency in milliseconds that 99 of 100 requests keep.
    pub p99: f64,
    /// Processor time of the server for each request, in microseconds.
    pub cpu: f64,
    /// The part of the time in which the server's main thread did not sleep.
    pub server: f64,
    /// The same of the benchmark's.
    pub client: f64,
}

/// What was seen of a load between two readings.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Requests that the server served.
    pub requests: u64,
    /// Processor time of the server.
    pub cpu: Duration,
    /// As in [`Figures`].
    pub server: f64,
    /// As in [`Figures`].
    pub client: f64,
}

/// A server with a value to read in it, and its benchmark.
pub struct Stage<'a> {
    pub lab: &'a Lab,
    pub contender: Contender,
    pub cell: &'a Cell,
    pub folder: &'a Path,
    pub server: Server,
    limit: Duration,
}

impl<'a> Stage<'a> {
    /// Starts the server and writes the value over TCP.
    pub fn set(
        lab: &'a Lab,
        pace: &Pace,
        cell: &'a Cell,
        contender: Contender,
        folder: &'a Path,
    ) -> Result<Self> {
        let server = contender.start(lab, cell.io_threads, folder)?;
        let mut fill = Contender::Tcp.benchmark(lab, &server);
        fill.args(["-t", "set", "-n", "1", "-c", "1", "-q", "-d", &cell.size.0.to_string()]);
        let output = run(&mut fill, b"", folder, pace.limit())?;
        ensure!(output.status.success(), "writing the value: {}", tail(&output.stderr));
        Ok(Self { lab, contender, cell, folder, server, limit: pace.limit() })
    }

    /// Runs the cell's load with `bound`, options that say when it ends, and calls `meanwhile`
    /// while it runs; what the benchmark printed, which [`table`] reads, and what that answered.
    pub fn load<T>(
        &mut self,
        bound: &[&str],
        meanwhile: impl FnOnce(&mut Self, &mut Process) -> Result<T>,
    ) -> Result<(String, T)> {
        let cell = self.cell;
        let (stdout, stderr) = (self.folder.join("benchmark"), self.folder.join("errors"));
        let mut command = self.contender.benchmark(self.lab, &self.server);
        command.args(["--csv", "--precision", "3", "-t", &cell.command]);
        command.args(["-c", &cell.clients.to_string(), "-d", &cell.size.0.to_string()]);
        command.args(["-P", &cell.pipeline.to_string()]).args(bound);
        command.stdin(Stdio::null());
        command.stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let mut benchmark = Process::spawn(&mut command)?;
        let said = || -> Result<String> {
            let text = std::fs::read_to_string(&stdout)? + &std::fs::read_to_string(&stderr)?;
            Ok(tail(&text))
        };
        let seen = meanwhile(self, &mut benchmark).with_context(|| {
            let said = said().unwrap_or_default();
            format!("while valkey-benchmark said '{said}'")
        });
        let status = if seen.is_ok() { benchmark.wait(self.limit)? } else { None };
        if !status.is_some_and(|status| status.success()) {
            // A process that ends closes its connections a little earlier.
            std::thread::sleep(MARGIN);
        }
        alive(&mut self.server)?;
        let seen = seen?;
        let status = status.with_context(|| {
            let said = said().unwrap_or_default();
            format!(
                "valkey-benchmark did not end within {} s: {said}\nits threads:\n{}{}",
                self.limit.as_secs(),
                threads(benchmark.id()),
                self.server.scene()
            )
        })?;
        ensure!(status.success(), "valkey-benchmark: {status}: {}", said()?);
        Ok((std::fs::read_to_string(&stdout)?, seen))
    }

    /// Measures once.
    pub fn figures(&mut self, pace: &Pace) -> Result<Figures> {
        let (printed, seen, ()) = self.watch(pace, |span| {
            std::thread::sleep(span);
            Ok(())
        })?;
        let [rate, p50, p99] = table(&printed)
            .with_context(|| format!("valkey-benchmark said: {}", tail(&printed)))?;
        ensure!(rate > 0.0, "no request was finished");
        let cpu = seen.cpu.as_secs_f64() * 1e6 / seen.requests as f64;
        Ok(Figures { rate, p50, p99, cpu, server: seen.server, client: seen.client })
    }

    /// Runs the load once and calls `during` while it lasts, with the time that it is to take;
    /// what the benchmark printed, what was seen meanwhile, and what `during` answered.
    pub fn watch<T>(
        &mut self,
        pace: &Pace,
        during: impl FnOnce(Duration) -> Result<T>,
    ) -> Result<(String, Seen, T)> {
        let (warm_up, seconds) = (pace.warm_up.to_string(), pace.seconds.to_string());
        let bound = ["--warmup", &warm_up, "--duration", &seconds];
        let mut counts = observer(self)?;
        let before = counts()?;
        let (printed, (seen, answer)) =
            self.load(&bound, |stage, load| watch(stage, load, pace, before, &mut counts, during))?;
        Ok((printed, seen, answer))
    }

    /// Waits until the server has ended all connections but the one that asks.
    pub fn wait_until_alone(&self) -> Result<()> {
        let mut connection = self.server.tcp(self.limit)?;
        let deadline = Instant::now() + self.limit;
        loop {
            let info = Info::parse(&connection.words("INFO clients")?.text());
            let others = info.number("connected_clients")?.saturating_sub(1);
            if others == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{others} connections outlive the load");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Ends the server, which must be well and must have served nothing but hits.
    pub fn strike(self) -> Result<()> {
        let info = self.server.info(self.limit)?;
        for field in ["total_error_replies", "keyspace_misses"] {
            let count = info.number(field)?;
            ensure!(count == 0, "INFO {field} is {count} after the load");
        }
        end(self.server)
    }
}

/// Measures a cell once.
pub fn measure(
    lab: &Lab,
    pace: &Pace,
    cell: &Cell,
    contender: Contender,
    folder: &Path,
) -> Result<Figures> {
    let mut stage = Stage::set(lab, pace, cell, contender, folder)?;
    let figures = stage.figures(pace)?;
    stage.strike()?;
    Ok(figures)
}

/// What the server has counted so far.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Executions of the cell's command.
    calls: u64,
    /// Connections that it accepted.
    accepted: u64,
}

/// What reads them off, over a TCP connection of its own.
fn observer(stage: &Stage) -> Result<impl FnMut() -> Result<Counts> + use<>> {
    let mut connection = stage.server.tcp(stage.limit)?;
    let command = stage.cell.command.clone();
    Ok(move || {
        let info = Info::parse(&connection.words("INFO commandstats stats")?.text());
        Ok(Counts {
            calls: calls(&info, &command)?,
            accepted: info.number("total_connections_received")?,
        })
    })
}

/// Waits until all clients are there and served, and reads off both processes near the beginning
/// and the end of what counts, between which it calls `during`. `counts` reads off what the
/// server counts, which was `before` before the load.
fn watch<T>(
    stage: &Stage,
    benchmark: &mut Process,
    pace: &Pace,
    before: Counts,
    mut counts: impl FnMut() -> Result<Counts>,
    during: impl FnOnce(Duration) -> Result<T>,
) -> Result<(Seen, T)> {
    let begun = Instant::now();
    let clients = u64::from(stage.cell.clients);
    loop {
        let now = counts()?;
        // Connecting many clients can take longer than warming up, and the first of them are
        // served meanwhile. The benchmark ends its warming up only after that. It has one more
        // connection, for the server's settings, and a last client may be missing here: that one
        // comes within the margin.
        if now.calls > before.calls && now.accepted >= before.accepted + clients {
            break;
        }
        ensure!(
            benchmark.status()?.is_none(),
            "valkey-benchmark ended before all clients were there"
        );
        ensure!(
            begun.elapsed() < stage.limit,
            "after {} s {} of {clients} clients are connected and {} requests served",
            stage.limit.as_secs(),
            now.accepted - before.accepted,
            now.calls - before.calls
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut read = || -> Result<(Counts, Usage, Usage)> {
        Ok((counts()?, Usage::of(stage.server.pid())?, Usage::of(benchmark.id())?))
    };
    let warm = Duration::from_secs(pace.warm_up.into()).saturating_sub(begun.elapsed());
    std::thread::sleep(warm + MARGIN);
    let first = read()?;
    let answer = during(Duration::from_secs(pace.seconds.into()) - 2 * MARGIN)?;
    let last = read()?;
    ensure!(
        benchmark.status()?.is_none(),
        "the load was over before it could be read off: the machine is too busy for figures"
    );
    ensure!(
        first.0.accepted == last.0.accepted,
        "{} clients connected while the load was read off",
        last.0.accepted - first.0.accepted
    );
    let requests = last.0.calls - first.0.calls;
    ensure!(requests > 0, "no request was served within {} s", pace.seconds);
    let seen = Seen {
        requests,
        cpu: last.1.cpu_since(&first.1),
        server: last.1.awake_since(&first.1),
        client: last.2.awake_since(&first.2),
    };
    Ok((seen, answer))
}

/// `cmdstat_get:calls=…,usec=…` of `INFO commandstats`.
fn calls(info: &Info, command: &str) -> Result<u64> {
    let Ok(field) = info.text(&format!("cmdstat_{command}")) else {
        return Ok(0);
    };
    let count = field.strip_prefix("calls=").and_then(|rest| rest.split(',').next());
    count.and_then(|count| count.parse().ok()).with_context(|| format!("commandstats: '{field}'"))
}

/// Rate, p50 and p99 out of the benchmark's table: a heading and one line of quoted fields.
fn table(text: &str) -> Result<[f64; 3]> {
    let mut lines = text
        .lines()
        .filter(|line| line.starts_with('"'))
        .map(|line| line.trim_matches('"').split("\",\"").collect::<Vec<_>>());
    let (heading, row) = (lines.next().context("no table")?, lines.next().context("no figures")?);
    let mut figures = [0.0_f64; 3];
    for (figure, name) in figures.iter_mut().zip(["rps", "p50_latency_ms", "p99_latency_ms"]) {
        let at = heading.iter().position(|field| *field == name);
        let field = at.and_then(|at| row.get(at)).with_context(|| format!("no column {name}"))?;
        *figure = field.parse().with_context(|| format!("{name} is '{field}'"))?;
        ensure!(figure.is_finite(), "{name} is '{field}'");
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_by_its_heading() {
        let text = "noise\n\"test\",\"p99_latency_ms\",\"rps\",\"p50_latency_ms\"\n\
                    \"SET\",\"2.5\",\"1234.50\",\"0.125\"\n";
        assert_eq!(table(text).unwrap(), [1234.5, 0.125, 2.5]);
        assert!(table("nothing").is_err());
        assert!(table("\"test\",\"rps\"\n\"SET\",\"1\"\n").is_err());
    }

    #[test]
    fn calls_are_read_by_command() {
        let text =
            "# Commandstats\r\ncmdstat_get:calls=12,usec=3\r\ncmdstat_set:calls=7,usec=1\r\n";
        let calls = |text, command| calls(&Info::parse(text), command);
        assert_eq!(calls(text, "get").unwrap(), 12);
        assert_eq!(calls(text, "lpush").unwrap(), 0);
        assert!(calls("cmdstat_get:usec=3", "get").is_err());
    }
}
