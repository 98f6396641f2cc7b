// SPDX-License-Identifier: BSD-3-Clause
//! Memory of idle connections: what is resident with them less what was without.

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

/// Resident bytes for each of so many idle connections, in a server of their own.
pub fn measure(
    lab: &Lab,
    pace: &Pace,
    contender: Contender,
    connections: u32,
    folder: &Path,
) -> Result<f64> {
    let server = contender.start(lab, 1, folder)?;
    let bytes = connect(lab, pace, contender, connections, &server);
    // A server that has died is a better explanation than what its clients say.
    end(server)?;
    bytes
}

/// Makes the connections, and looks before and after.
fn connect(
    lab: &Lab,
    pace: &Pace,
    contender: Contender,
    connections: u32,
    server: &Server,
) -> Result<f64> {
    let clients = || -> Result<u64> { server.info(pace.limit())?.number("connected_clients") };
    let wanted = clients()? + u64::from(connections);
    let before = server.resident()?;
    let mut command = contender.benchmark(lab, server);
    command.args(["-I", "-c", &connections.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut benchmark = Process::spawn(&mut command)?;
    let deadline = Instant::now() + pace.limit();
    loop {
        let now = clients()?;
        if now >= wanted {
            break;
        }
        ensure!(
            benchmark.status()?.is_none() && Instant::now() < deadline,
            "{} of {connections} connections within {} s",
            connections as u64 + now - wanted,
            pace.limit().as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(REST);
    ensure!(clients()? == wanted, "the idle connections did not last");
    let after = server.resident()?;
    benchmark.end(Duration::from_secs(5))?;
    Ok((after as f64 - before as f64) / f64::from(connections))
}
