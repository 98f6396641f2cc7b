// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma ping`: round trips, as ping(8) shows them.

use crate::server::{Login, Server, Session};
use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Round trips of a server: over RDMA, and over TCP beside it on request.
#[derive(clap::Args)]
pub struct Arguments {
    /// The server, with the port of RDMA: 6379 unless given.
    #[arg(value_name = "HOST[:PORT]")]
    server: String,
    #[command(flatten)]
    login: Login,
    /// Ends after so many; without it, with Ctrl-C.
    #[arg(short, long, value_name = "NUMBER")]
    count: Option<u64>,
    /// Seconds from one to the next; 0 for one right after the other.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
    /// Has the server send back so many bytes (ECHO) instead of a PONG: bandwidth.
    #[arg(short, long, value_name = "BYTES")]
    size: Option<usize>,
    /// Asks over TCP as well, in turns: at this port, or at that of RDMA.
    #[arg(long, value_name = "PORT", num_args = 0..=1)]
    tcp: Option<Option<u16>>,
    /// Shows the sum alone.
    #[arg(short, long)]
    quiet: bool,
}

/// The slowest round trip that is told apart from others, in nanoseconds: an hour.
const SLOWEST: u64 = 3_600_000_000_000;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// One way to the server, and what it came to.
struct Way {
    session: Session,
    times: Histogram<u64>,
    sent: u64,
}

impl Way {
    fn new(session: Session) -> Result<Self> {
        let times = Histogram::new_with_bounds(1, SLOWEST, 3).context("a histogram")?;
        Ok(Self { session, times, sent: 0 })
    }

    /// One round trip, in nanoseconds.
    fn round_trip(&mut self, payload: Option<&[u8]>) -> Result<u64> {
        self.sent += 1;
        let began = Instant::now();
        match payload {
            None => {
                let answer = self.session.ask(&[b"PING"])?;
                ensure!(answer == b"PONG", "PING is answered by other than PONG");
            }
            Some(payload) => {
                let answer = self.session.ask(&[b"ECHO", payload])?;
                ensure!(answer == payload, "ECHO is answered by other bytes");
            }
        }
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(SLOWEST).clamp(1, SLOWEST);
        self.times.record(took).context("a time")?;
        Ok(took)
    }

    /// The summing up.
    fn sum(&self, size: Option<usize>) -> String {
        let at = |quantile| milliseconds(self.times.value_at_quantile(quantile));
        let answered = self.times.len();
        let mut text = format!(
            "{}: connected in {} ms; {} sent, {answered} answered",
            self.session.carrier,
            milliseconds(self.session.connect.as_nanos() as u64),
            self.sent,
        );
        if answered > 0 {
            text += &format!(
                "\n  min {} p50 {} p99 {} max {} ms",
                milliseconds(self.times.min()),
                at(0.5),
                at(0.99),
                milliseconds(self.times.max())
            );
            text += &bars(&self.times);
        }
        if let Some(size) = size.filter(|_| answered > 0) {
            let each = self.times.mean() / 1e9;
            text +=
                &format!("\n  {:.1} MB/s each way, one after the other", size as f64 / each / 1e6);
        }
        text
    }
}

fn milliseconds(nanoseconds: u64) -> String {
    format!("{:.3}", nanoseconds as f64 / 1e6)
}

/// How many took less than each power of two of microseconds.
fn bars(times: &Histogram<u64>) -> String {
    const WIDTH: u64 = 40;
    let mut text = String::new();
    let mut from = 0;
    for power in 0..=u64::BITS {
        let to = 1000_u64.saturating_mul(1_u64.checked_shl(power).unwrap_or(u64::MAX));
        let count = if to > from { times.count_between(from, to - 1) } else { 0 };
        if count > 0 {
            let bar = "#".repeat((count * WIDTH).div_ceil(times.len()) as usize);
            text += &format!("\n  < {:>9} ms {count:>8} {bar}", milliseconds(to));
        }
        from = to;
        if to > times.max() {
            break;
        }
    }
    text
}

/// Pings. `Ok(false)` if there were answers missing.
///
/// # Errors
/// If a connection can't be had.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let interval = Duration::try_from_secs_f64(arguments.interval)
        .with_context(|| format!("--interval {}: not a time", arguments.interval))?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)).context("Ctrl-C")?;
    let payload = arguments.size.map(|size| vec![b'x'; size]);
    let server = Server { address: &arguments.server, login: &arguments.login };
    let mut ways = vec![Way::new(server.over_rdma()?)?];
    if let Some(port) = arguments.tcp {
        ways.push(Way::new(server.over_tcp(port)?)?);
    }
    let mut failure = None;
    let mut number = 0;
    'all: while arguments.count.is_none_or(|count| number < count) && !interrupted() {
        number += 1;
        let next = Instant::now() + interval;
        for way in &mut ways {
            match way.round_trip(payload.as_deref()) {
                Ok(took) if !arguments.quiet => println!(
                    "{} from {} ({}): number={number} time={} ms",
                    if payload.is_some() { "ECHO" } else { "PONG" },
                    server.address,
                    way.session.carrier,
                    milliseconds(took)
                ),
                Ok(_) => {}
                Err(error) => {
                    failure = Some(error.context(way.session.carrier.clone()));
                    break 'all;
                }
            }
        }
        if arguments.count.is_none_or(|count| number < count) {
            pause(next);
        }
    }
    println!("--- {} ---", server.address);
    ways.iter().for_each(|way| println!("{}", way.sum(arguments.size)));
    match failure {
        None => Ok(ways.iter().all(|way| way.times.len() == way.sent)),
        Some(error) => {
            eprintln!("valkey-rdma: {error:#}");
            Ok(false)
        }
    }
}

fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Sleeps until then, in pieces: Ctrl-C ends it.
fn pause(until: Instant) {
    while !interrupted() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_in_one_bar() {
        let mut times = Histogram::<u64>::new_with_bounds(1, SLOWEST, 3).unwrap();
        for time in [1, 999, 1_000, 1_999, 70_000, SLOWEST] {
            times.record(time).unwrap();
        }
        let text = bars(&times);
        let sum: u64 = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3))
            .map(|count| count.parse::<u64>().unwrap())
            .sum();
        assert_eq!(sum, 6, "{text}");
        assert_eq!(text.trim().lines().count(), 4, "{text}");
    }
}
