// SPDX-License-Identifier: BSD-3-Clause
//! What the operator sets: the arguments of `loadmodule`.

use proto::buffer_size::PAGE;
use proto::session::{Millis, Timing};
use std::fmt;

/// Bounds of the receive buffer of one connection, as the core's `rdma-rx-size` has them.
pub const RX_SIZE: std::ops::RangeInclusive<u64> = 64 * 1024..=16 * 1024 * 1024;

/// The setting that is meant by `bytes` of [`RX_SIZE`]: whole pages, and no more than was
/// asked for. A buffer is whole pages anyhow, and one that is never as large as it should
/// be would be made anew for each window.
pub fn receive_size(bytes: u64) -> Option<u32> {
    let bytes = Some(bytes).filter(|bytes| RX_SIZE.contains(bytes))? as u32;
    Some(bytes / PAGE * PAGE)
}

/// Bounds of the completion vector, as the core's `rdma-completion-vector` has them;
/// −1 means any.
pub const COMPLETION_VECTOR: std::ops::RangeInclusive<i64> = -1..=1024;

/// The argument that limits registered memory.
pub const MAX_REGISTERED_MEMORY: &str = "max-registered-memory";

/// What is to be done about a device that fails a check when the module is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Probe {
    /// Nothing is checked.
    #[default]
    No,
    /// It is logged.
    Warn,
    /// The module is not loaded.
    Require,
}

/// What carries the links that this server opens to others: to its primary, and to those that
/// its slots move to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replication {
    /// TCP, as the server has it: nothing of it is touched.
    #[default]
    No,
    /// RDMA where that works, else TCP.
    Prefer,
    /// RDMA, or no link.
    Require,
}

impl Replication {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::No, Self::Prefer, Self::Require];

    /// As the operator writes it.
    pub fn text(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Prefer => "prefer",
            Self::Require => "require",
        }
    }
}

/// The module's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Addresses to listen on, as the operator wrote them; empty means all.
    pub bind: Vec<String>,
    /// Port to listen on; 0 means none.
    pub port: u16,
    /// Size of a connection's receive buffer in bytes.
    pub rx_size: u32,
    /// Completion vector, or −1 for any.
    pub completion_vector: i32,
    /// Most connections in handshake at a time.
    pub max_handshakes: u32,
    /// Most bytes of registered memory in all.
    pub max_registered_memory: u64,
    /// A connection that is stuck for so long is nudged, in milliseconds; 0 means never.
    pub watchdog_timeout: Millis,
    /// For how long completions may be waited for before the event loop sleeps, in
    /// microseconds; 0 means not at all.
    pub busy_poll: u64,
    /// Whether a release that is newer than any known one of its line is refused, though all
    /// probes agree.
    pub refuse_unknown: bool,
    /// How long an acknowledgement is waited for before something is sent again, 4.096 µs times
    /// 2 to this; 0 leaves it to the connection manager.
    pub ack_timeout: u8,
    /// Whether devices are examined at load.
    pub probe: Probe,
    /// What carries links between servers.
    pub replication: Replication,
    /// Keepalive intervals in which a probe may stay without an answer; 0 means any number.
    pub keepalive_probes: u64,
    /// Durations of sessions.
    pub timing: Timing,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            bind: Vec::new(),
            port: 0,
            rx_size: 1024 * 1024,
            completion_vector: -1,
            max_handshakes: 1024,
            max_registered_memory: u64::MAX,
            watchdog_timeout: 5_000,
            busy_poll: 5,
            refuse_unknown: false,
            ack_timeout: 0,
            probe: Probe::No,
            replication: Replication::No,
            keepalive_probes: 12,
            timing: Timing {
                handshake: 10_000,
                keepalive: 5_000,
                answer: 12 * 5_000,
                linger: 500,
                delivery: 10_000,
            },
        }
    }
}

/// An argument that can't be used: which, and what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgumentError {
    argument: String,
    expected: String,
}

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "argument \"{}\": expected {}", self.argument, self.expected)
    }
}

impl std::error::Error for ArgumentError {}

const NAMES: &str = "one of bind=ADDRESS, port=NUMBER, rx-size=BYTES, completion-vector=NUMBER, \
     max-handshakes=NUMBER, max-registered-memory=BYTES, handshake-timeout=MS, keepalive-interval=MS, \
     keepalive-probes=NUMBER, linger-time=MS, watchdog-timeout=MS, busy-poll=US, \
     ack-timeout=NUMBER, \
     unknown-release=accept|refuse, probe=no|warn|require, replication=no|prefer|require";

/// Arguments of builds before 0.1.0, and the names that they have now.
pub const RENAMED: [(&str, &str); 4] = [
    ("comp-vector", "completion-vector"),
    ("max-registered", MAX_REGISTERED_MEMORY),
    ("liveness-interval", "keepalive-interval"),
    ("liveness-failures", "keepalive-probes"),
];

impl Settings {
    /// Reads the arguments of `loadmodule`, each `name=value`; `bind` may be repeated
    /// and may hold several addresses.
    ///
    /// # Errors
    /// The first argument that can't be used.
    pub fn from_arguments<'a>(
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ArgumentError> {
        let mut settings = Self::default();
        for argument in arguments {
            let error = |expected: &str| ArgumentError {
                argument: argument.to_owned(),
                expected: expected.to_owned(),
            };
            let (name, value) = argument.split_once('=').ok_or_else(|| error(NAMES))?;
            let number = |low: u64, high: u64| {
                let text = if high == u64::MAX {
                    format!("a number from {low}")
                } else {
                    format!("a number from {low} to {high}")
                };
                let number = value.parse().ok().filter(|n| (low..=high).contains(n));
                number.ok_or_else(|| error(&text))
            };
            match name.to_ascii_lowercase().as_str() {
                "bind" => {
                    let addresses: Vec<_> = value.split_ascii_whitespace().collect();
                    if addresses.is_empty() || addresses.contains(&"-") {
                        return Err(error("an address, `*`, or `-` and an address"));
                    }
                    settings.bind.extend(addresses.into_iter().map(str::to_owned));
                    if settings.bind.len() > crate::host::layout::MAX_BINDS {
                        return Err(error("at most 16 addresses in all"));
                    }
                }
                "port" => settings.port = number(0, 65_535)? as u16,
                "rx-size" => {
                    settings.rx_size = bytes(value)
                        .and_then(receive_size)
                        .ok_or_else(|| error("64k to 16m bytes"))?;
                }
                "completion-vector" => {
                    settings.completion_vector = value
                        .parse()
                        .ok()
                        .filter(|n| COMPLETION_VECTOR.contains(n))
                        .ok_or_else(|| error("a number from -1 to 1024"))?
                        as i32;
                }
                "max-handshakes" => settings.max_handshakes = number(1, 1_000_000)? as u32,
                MAX_REGISTERED_MEMORY => {
                    settings.max_registered_memory = bytes(value)
                        .filter(|n| *n >= 1 << 20)
                        .ok_or_else(|| error("a number of bytes, at least 1m"))?;
                }
                "handshake-timeout" => settings.timing.handshake = number(100, 600_000)?,
                "keepalive-interval" => settings.timing.keepalive = number(100, 86_400_000)?,
                "keepalive-probes" => settings.keepalive_probes = number(0, 1000)?,
                "watchdog-timeout" => {
                    settings.watchdog_timeout = number(0, 86_400_000)
                        .ok()
                        .filter(|ms| *ms == 0 || *ms >= 1000)
                        .ok_or_else(|| error("0, or a number from 1000 to 86400000"))?;
                }
                "ack-timeout" => settings.ack_timeout = number(0, 31)? as u8,
                "busy-poll" => settings.busy_poll = number(0, 1000)?,
                "unknown-release" => {
                    settings.refuse_unknown = match value {
                        "accept" => false,
                        "refuse" => true,
                        _ => return Err(error("accept or refuse")),
                    };
                }
                "probe" => {
                    settings.probe = match value {
                        "no" => Probe::No,
                        "warn" => Probe::Warn,
                        "require" => Probe::Require,
                        _ => return Err(error("no, warn or require")),
                    };
                }
                "replication" => {
                    settings.replication = Replication::ALL
                        .into_iter()
                        .find(|it| it.text() == value)
                        .ok_or_else(|| error("no, prefer or require"))?;
                }
                "linger-time" => settings.timing.linger = number(0, 60_000)?,
                name => {
                    let renamed = RENAMED.iter().find(|(old, _)| *old == name);
                    return Err(match renamed {
                        Some((_, new)) => error(&format!("{new}=…, the name that it has now")),
                        None => error(NAMES),
                    });
                }
            }
        }
        settings.timing.answer = match settings.keepalive_probes {
            0 => Millis::MAX,
            failures => failures * settings.timing.keepalive,
        };
        Ok(settings)
    }
}

/// A number of bytes, with or without k, m or g (powers of 1024).
fn bytes(text: &str) -> Option<u64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &lower[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" => 1 << 10,
        "m" | "mb" => 1 << 20,
        "g" | "gb" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Settings, ArgumentError> {
        Settings::from_arguments(arguments.iter().copied())
    }

    #[test]
    fn arguments_are_understood() {
        let settings = parse(&[
            "bind=10.0.0.1 -::1",
            "BIND=*",
            "port=6380",
            "rx-size=128k",
            "completion-vector=3",
            "max-registered-memory=1g",
            "linger-time=0",
            "watchdog-timeout=0",
            "keepalive-probes=3",
            "keepalive-interval=200",
            "unknown-release=refuse",
            "ack-timeout=14",
            "probe=warn",
            "replication=prefer",
        ])
        .unwrap();
        assert_eq!(settings.bind, ["10.0.0.1", "-::1", "*"]);
        assert_eq!((settings.port, settings.rx_size), (6380, 131_072));
        assert_eq!((settings.completion_vector, settings.max_registered_memory), (3, 1 << 30));
        assert_eq!((settings.timing.linger, settings.watchdog_timeout), (0, 0));
        assert_eq!((settings.timing.keepalive, settings.timing.answer), (200, 600));
        assert!(settings.refuse_unknown);
        assert_eq!(settings.ack_timeout, 14);
        assert_eq!(settings.probe, Probe::Warn);
        assert_eq!(settings.replication, Replication::Prefer);
        assert_eq!(parse(&["keepalive-probes=0"]).unwrap().timing.answer, Millis::MAX);
        assert_eq!(parse(&[]).unwrap(), Settings::default());
    }

    #[test]
    fn a_receive_buffer_is_whole_pages_and_no_larger_than_asked_for() {
        for (asked, meant) in
            [(65_536, 65_536), (100_000, 98_304), (102_400, 102_400), (16 << 20, 16 << 20)]
        {
            assert_eq!(receive_size(asked), Some(meant));
            assert_eq!(parse(&[&format!("rx-size={asked}")]).unwrap().rx_size, meant);
        }
        assert_eq!((receive_size(65_535), receive_size((16 << 20) + 1)), (None, None));
    }

    #[test]
    fn a_renamed_argument_is_refused_with_its_new_name() {
        for (old, new) in RENAMED {
            let text = parse(&[&format!("{old}=1")]).unwrap_err().to_string();
            assert!(text.contains(old) && text.contains(&format!("expected {new}=")), "{text}");
            assert!(NAMES.contains(&format!(" {new}=")), "{new} is no argument");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_with_what_can() {
        for (argument, expected) in [
            ("prot=1", "one of bind="),
            ("port", "one of bind="),
            ("port=65536", "a number from 0 to 65535"),
            ("port=-1", "a number from 0 to 65535"),
            ("port=", "a number from 0 to 65535"),
            ("rx-size=63k", "64k to 16m bytes"),
            ("rx-size=17m", "64k to 16m bytes"),
            ("rx-size=1x", "64k to 16m bytes"),
            ("completion-vector=-2", "a number from -1 to 1024"),
            ("bind=", "an address"),
            ("unknown-release=yes", "accept or refuse"),
            ("ack-timeout=32", "a number from 0 to 31"),
            ("probe=yes", "no, warn or require"),
            ("replication=yes", "no, prefer or require"),
            ("busy-poll=1001", "a number from 0 to 1000"),
            ("watchdog-timeout=999", "0, or a number from 1000"),
            ("max-registered-memory=99999999999g", "a number of bytes"),
        ] {
            let text = parse(&[argument]).unwrap_err().to_string();
            assert!(text.contains(argument) && text.contains(expected), "{text}");
        }
        let many = ["bind=1.1.1.1"; 17];
        assert!(parse(&many).unwrap_err().to_string().contains("at most 16"));
    }
}
