// SPDX-License-Identifier: BSD-3-Clause
//! Large replies with I/O threads: what hangs the upstream module for ever on 8.0.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cell::{Case, Cell};
use crate::tools::{Load, Pinger};

pub const CASES: &[Case] = &[
    Case::new("deadlock-40kb", |cell| {
        let requests = if cell.lab.is_slow() { 600 } else { 2000 };
        deadlock(cell, requests, 10, 40 << 10)
    }),
    Case::new("deadlock-10mb", |cell| {
        let requests = if cell.lab.is_slow() { 100 } else { 200 };
        deadlock(cell, requests, 50, 10_000_000)
    }),
];

fn deadlock(cell: &mut Cell, requests: usize, clients: usize, size: usize) -> Result<()> {
    let idle = cell.idle_rate()?;
    // An answer that takes longer than this is a server that is not there.
    let limit = Duration::from_secs(if cell.lab.is_slow() { 30 } else { 10 });
    let pinger = Pinger::start(cell, limit)?;
    let load = Load { tests: vec!["set", "get"], requests, clients, size, pipeline: 1 };
    let loaded = cell.benchmark(&load, cell.lab.cell_limit() * 2);
    let pings = pinger.stop(cell);
    loaded?;
    ensure!(pings?.count > 1, "the load was over before the second ping");

    let info = cell.info()?;
    let windows = info.number("rdma_windows_sent")?;
    let resumed = info.number("rdma_resumptions_main")?;
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
