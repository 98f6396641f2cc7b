// SPDX-License-Identifier: BSD-3-Clause
//! Idle connections, and the memory that they take: what is resident with them less what was
//! without.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cells::lab::Lab;
use cells::process::Process;
use cells::server::Server;

use crate::contender::{Contender, end};
use crate::table::Pace;

/// After the last connection, until the server has come to rest.
const REST: Duration = Duration::from_secs(1);

/// Connections of one client process, each of which takes it a handful of descriptors.
const EACH: u32 = 2500;

/// Connections that ask for nothing, and the processes that hold them.
pub struct Idle {
    holders: Vec<Process>,
}

impl Idle {
    /// Makes so many connections to the server, and waits until they are there and at rest.
    pub fn connect(
        lab: &Lab,
        limit: Duration,
        contender: Contender,
        connections: u32,
        server: &Server,
    ) -> Result<Self> {
        let clients = || -> Result<u64> { server.info(limit)?.number("connected_clients") };
        let before = clients()?;
        let mut idle = Self { holders: Vec::new() };
        let mut left = connections;
        while left > 0 {
            let some = left.min(EACH);
            let mut command = contender.benchmark(lab, server);
            command.args(["-I", "-c", &some.to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            idle.holders.push(Process::spawn(&mut command)?);
            left -= some;
        }
        let deadline = Instant::now() + limit;
        loop {
            let there = clients()? - before;
            if there >= u64::from(connections) {
                break;
            }
            for holder in &mut idle.holders {
                ensure!(
                    holder.status()?.is_none() && Instant::now() < deadline,
                    "{there} of {connections} connections within {} s",
                    limit.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(REST);
        let there = clients()? - before;
        ensure!(
            there == u64::from(connections),
            "of {connections} idle connections {there} are left after {} s",
            REST.as_secs()
        );
        Ok(idle)
    }

    /// Ends them.
    pub fn end(mut self) -> Result<()> {
        self.holders.iter_mut().try_for_each(|holder| holder.end(Duration::from_secs(20)).map(drop))
    }
}

/// Resident bytes for each of so many idle connections, in a server of their own.
pub fn measure(
    lab: &Lab,
    pace: &Pace,
    contender: Contender,
    connections: u32,
    folder: &Path,
) -> Result<f64> {
    let server = contender.start(lab, 1, folder)?;
    let bytes = grown(lab, pace, contender, connections, &server);
    // A server that has died is a better explanation than what its clients say.
    end(server)?;
    Ok(bytes? / f64::from(connections))
}

/// By how many bytes the server grows.
fn grown(
    lab: &Lab,
    pace: &Pace,
    contender: Contender,
    connections: u32,
    server: &Server,
) -> Result<f64> {
    let before = server.resident()?;
    let idle = Idle::connect(lab, pace.limit(), contender, connections, server)?;
    let after = server.resident()?;
    idle.end()?;
    Ok(after as f64 - before as f64)
}
