// SPDX-License-Identifier: BSD-3-Clause
//! What an RDMA device does with each thing that Valkey over RDMA relies on.
//!
//! [`examine`] connects an address of this machine to itself, by the same calls as a server and
//! a client make, and tries one thing after the other. It needs nobody else, takes seconds, and
//! leaves nothing behind. A device that can't connect to itself is not unfit: what could not be
//! tried is [`Outcome::Inconclusive`].
//!
//! [`verbs::library::load`] comes first. Any thread but an event loop's, since it waits.

#![deny(missing_docs, unreachable_pub)]

pub mod addresses;
mod checks;
mod pair;
mod profile;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use verbs::cm::{EventChannel, Id};
use verbs::device::Facts;

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The device does as it should; figures, if there are any.
    Passed(String),
    /// It does not: what it did.
    Failed(String),
    /// It could not be tried: why.
    Inconclusive(String),
}

/// In a line: `passed`, or `passed: …`, `failed: …`, `inconclusive: …`.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text) = match self {
            Self::Passed(text) => ("passed", text),
            Self::Failed(text) => ("failed", text),
            Self::Inconclusive(text) => ("inconclusive", text),
        };
        f.write_str(word)?;
        if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
    }
}

/// What was found out about one device.
#[derive(Clone, Debug)]
pub struct Examination {
    /// The address that was connected to itself.
    pub address: IpAddr,
    /// What the device says of itself, if there is one at the address.
    pub facts: Option<Facts>,
    /// The checks by name, in the order in which they were made.
    pub checks: Vec<(&'static str, Outcome)>,
    /// The known kind of device that it is most like.
    pub resembles: &'static str,
    /// Whether it takes RDMA writes with immediate data, if that could be tried.
    pub immediate: Option<bool>,
}

impl Examination {
    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.checks.iter().filter_map(|(name, outcome)| match outcome {
            Outcome::Failed(why) => Some((*name, why.as_str())),
            _ => None,
        })
    }
}

/// The devices that have one of `addresses`, by their names, each with the first of them.
///
/// # Errors
/// If there is no connection manager.
pub fn devices(addresses: &[IpAddr]) -> Result<Vec<(String, IpAddr)>, verbs::Error> {
    let events = Arc::new(EventChannel::new()?);
    let mut found: Vec<(String, IpAddr)> = Vec::new();
    for &address in addresses {
        let id = Arc::new(Id::new(&events)?);
        // A port of the kernel's choice. An address that no device has is not listened on.
        if id.listen(SocketAddr::new(address, 0), 1).is_err() {
            continue;
        }
        if let Some(device) = id.device() {
            let name = device.name();
            if found.iter().all(|(other, _)| *other != name) {
                found.push((name, address));
            }
        }
    }
    Ok(found)
}

/// Tries out the device that has `address`.
pub fn examine(address: IpAddr) -> Examination {
    let (facts, checks, seen) = checks::all(address);
    let resembles = profile::of(facts.as_ref(), &seen);
    Examination { address, facts, checks, resembles, immediate: seen.immediate }
}
