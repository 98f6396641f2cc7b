// SPDX-License-Identifier: BSD-3-Clause
//! Large values with I/O threads: what hangs the upstream module for ever on 8.0, and what
//! makes the main thread sleep while an I/O thread's job is over.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cell::{Case, Cell};
use crate::tools::{Load, Pinger};

pub const CASES: &[Case] = &[
    Case::new("deadlock-40kb", |cell| {
        let requests = if cell.lab.is_slow() { 400 } else { 2000 };
        deadlock(cell, requests, 10, 40 << 10)
    }),
    Case::new("deadlock-10mb", |cell| {
        let requests = if cell.lab.is_slow() { 50 } else { 200 };
        deadlock(cell, requests, 50, 10_000_000)
    }),
    Case::new("deadlock-guard", guard).unstarted(),
    // Once a second the server's own clock would wake the main thread.
    Case::new("jobs-collected", jobs_collected).with(|settings| settings.directive("hz 1")),
];

/// That the test above can fail: on 8.0, a module that does not defer, built with the feature
/// `test-handler-loop`, hangs the server under the same load.
fn guard(cell: &mut Cell) -> Result<()> {
    cell.settings.module = Some(cell.lab.variant("with-handler-loop")?);
    cell.start()?;
    let pinger = Pinger::start(cell, PING_LIMIT)?;
    let load = load(2000, 10, 40 << 10);
    let loaded = cell.benchmark(&load, PING_LIMIT * 2);
    let pinged = pinger.stop(cell);
    // Nothing but force ends it.
    drop(cell.take_server()?);
    ensure!(loaded.is_err(), "the load went through a module that does not defer");
    ensure!(pinged.is_err(), "the server answered all the time without deferral");
    Ok(())
}

/// While the only client waits, nothing but the end of an I/O thread's job goes on, and no
/// descriptor tells the server of that.
fn jobs_collected(cell: &mut Cell) -> Result<()> {
    let load =
        Load { tests: vec!["set"], requests: 500, clients: 1, size: 1 << 20, ..Load::default() };
    // If one job in ten waits for the clock, it takes longer.
    cell.benchmark(&load, Duration::from_secs(30))?;
    let jobs = cell.info()?.number("rdma_reads_io")?;
    cell.figure("reads by I/O threads", jobs);
    ensure!(jobs >= load.requests as u64, "only {jobs} reads by I/O threads");
    Ok(())
}

/// An answer that takes longer than this is a server that is not there.
const PING_LIMIT: Duration = Duration::from_secs(10);

fn load(requests: usize, clients: usize, size: usize) -> Load {
    Load { tests: vec!["set", "get"], requests, clients, size, ..Load::default() }
}

fn deadlock(cell: &mut Cell, requests: usize, clients: usize, size: usize) -> Result<()> {
    let idle = cell.idle_rate()?;
    let pinger = Pinger::start(cell, PING_LIMIT * if cell.lab.is_slow() { 3 } else { 1 })?;
    let load = load(requests, clients, size);
    let loaded = cell.benchmark(&load, cell.lab.cell_limit() * 2);
    let pings = pinger.stop(cell);
    loaded?;
    ensure!(pings?.count > 1, "the load was over before the second ping");

    let info = cell.info()?;
    let windows = info.number("rdma_announcements_received")?;
    let resumed = info.number("rdma_resumptions")?;
    let short_io = info.number("rdma_short_writes_io")?;
    let short_main = info.number("rdma_short_writes_main")?;
    cell.figure("windows used up", windows);
    cell.figure("resumptions", resumed);
    cell.figure("short writes by I/O threads", short_io);
    cell.figure("short writes by the main thread", short_main);
    // That no I/O thread resumed anything is checked after every cell.
    ensure!(
        resumed <= 2 * windows + clients as u64 * 2,
        "{resumed} resumptions for {windows} windows used up"
    );
    ensure!(resumed > 0, "nothing was ever resumed: the load did not test what it should");
    if cell.has_io_threads() {
        ensure!(short_io > 0, "no write by an I/O thread was ever short");
    }
    cell.check_idle(idle, "after the load")
}
