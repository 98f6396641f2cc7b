// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma bridge`: programs that speak no RDMA reach a server over it.
//!
//! For each program that connects, over TCP or a Unix socket, there is one connection to the
//! server. Bytes go both ways as they are: nothing here knows the protocol that they are of,
//! but for the one line that a program gets which can't be served.

mod attempt;
mod carrier;
mod event_loop;
mod link;
mod listen;
mod metrics;
mod notes;
mod watch;

use crate::server::resolve;
use anyhow::{Context, Result, bail, ensure};
use attempt::Target;
use client::Options;
use event_loop::{Bridge, Limits};
use listen::Place;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Has programs that speak no RDMA reach a server over it.
#[derive(clap::Args)]
pub struct Arguments {
    /// Where programs connect; may be repeated. Sockets that systemd hands over join them.
    #[arg(long, value_name = "unix:PATH|ADDRESS:PORT")]
    listen: Vec<Place>,
    /// The server, with the port of RDMA: 6379 unless given.
    #[arg(long, value_name = "HOST[:PORT]")]
    to: String,
    /// Where RDMA fails, connects over TCP instead: at this port, or at that of RDMA. The log
    /// says so.
    #[arg(long, value_name = "PORT", num_args = 0..=1)]
    fallback: Option<Option<u16>>,
    /// The local address to connect from, which also chooses the device.
    #[arg(long, value_name = "ADDRESS")]
    source: Option<IpAddr>,
    /// Programs connected at a time; those beyond get an error.
    #[arg(long, value_name = "NUMBER", default_value_t = 10_000)]
    max_connections: usize,
    /// Registered memory in all, which is resident. A program for whose connection there is none
    /// left gets an error.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    max_memory: Option<u64>,
    /// Bytes of each connection's receive buffer. BYTES may end in k, m or g.
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "256k")]
    window: u64,
    /// Seconds that connecting to the server may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    timeout: f64,
    /// Seconds that SIGTERM leaves to programs which wait for an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    drain: f64,
    /// Where Prometheus finds the metrics: nowhere unless given.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

/// A number of bytes, with k, m or g behind it or without.
fn bytes(text: &str) -> Result<u64> {
    let (digits, unit) = match text.to_ascii_lowercase().strip_suffix(['k', 'm', 'g']) {
        None => (text.to_owned(), 1),
        Some(digits) => match text.as_bytes()[text.len() - 1].to_ascii_lowercase() {
            b'k' => (digits.to_owned(), 1 << 10),
            b'm' => (digits.to_owned(), 1 << 20),
            _ => (digits.to_owned(), 1 << 30),
        },
    };
    let number: u64 = digits.parse().with_context(|| format!("'{text}' is no number of bytes"))?;
    number.checked_mul(unit).with_context(|| format!("'{text}' is too much"))
}

fn seconds(name: &str, value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value).with_context(|| format!("{name} {value}: not a time"))
}

/// Runs until SIGTERM or SIGINT. `Ok(false)` if it had to leave programs without an answer then.
///
/// # Errors
/// If it can't begin.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let timeout = seconds("--timeout", arguments.timeout)?;
    ensure!(!timeout.is_zero(), "--timeout 0: nothing would ever connect");
    let drain = seconds("--drain", arguments.drain)?;
    ensure!(arguments.max_connections > 0, "--max-connections 0: nobody could connect");
    ensure!((4 << 10..=64 << 20).contains(&arguments.window), "--window: from 4k to 64m");
    if let Err(error) = verbs::library::load() {
        ensure!(arguments.fallback.is_some(), "{error}");
        eprintln!("valkey-rdma bridge: {error}: all goes over TCP");
    }
    if let Some(limit) = arguments.max_memory {
        verbs::account::limit_registered(limit, "--max-memory");
    }
    let addresses = resolve(&arguments.to)?;
    let options = Options {
        window: arguments.window as u32,
        source: arguments.source,
        timeout,
        ..Options::default()
    };
    let target = Target::new(&arguments.to, addresses, options, arguments.fallback);

    let mut listeners = listen::handed_over()?;
    for place in &arguments.listen {
        listeners.push(place.listen()?);
    }
    if listeners.is_empty() {
        bail!("nowhere to listen: give --listen, or a socket of systemd's");
    }
    let limits = Limits::within(arguments.max_connections, drain);
    let mut bridge = Bridge::new(target, listeners, limits)?;
    if let Some(address) = arguments.metrics {
        bridge.metrics().serve(address)?;
    }
    let ending = bridge.ending();
    ctrlc::set_handler(move || ending.ask()).context("SIGTERM")?;
    bridge.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_by_their_unit() {
        assert_eq!(bytes("4096").unwrap(), 4096);
        assert_eq!(bytes("64k").unwrap(), 64 << 10);
        assert_eq!(bytes("3G").unwrap(), 3 << 30);
        for text in ["", "k", "1.5m", "-1", "64kb", "99999999999g"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
