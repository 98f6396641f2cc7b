// SPDX-License-Identifier: BSD-3-Clause
//! The clients nobody here wrote.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use client::pattern;

use crate::cell::{Case, Cell};
use crate::server::Settings;
use crate::tools::Load;

pub const CASES: &[Case] = &[
    Case::new("cli", cli),
    Case::new("benchmark", benchmark),
    Case::new("reconnects", reconnects),
    Case::new("offload", offload).with(Settings::io_threads_as_they_are),
];

/// As they are set out of the box, I/O threads take part when many clients are busy at once.
fn offload(cell: &mut Cell) -> Result<()> {
    let load = Load {
        tests: vec!["set", "get"],
        requests: if cell.lab.is_slow() { 5000 } else { 20_000 },
        clients: 50,
        size: 512,
        pipeline: 8,
        ..Load::default()
    };
    let deadline = Instant::now() + cell.lab.patience();
    let (mut reads, mut writes) = (0, 0);
    // 9.1 looks every now and then whether its main thread is busy, and not at once.
    while (reads == 0 || writes == 0) && Instant::now() < deadline {
        cell.benchmark(&load, cell.lab.cell_limit())?;
        let info = cell.info()?;
        (reads, writes) = (info.number("rdma_reads_io")?, info.number("rdma_writes_io")?);
    }
    cell.figure("reads and writes by I/O threads", format!("{reads} and {writes}"));
    ensure!(reads > 0 && writes > 0, "I/O threads did {reads} reads and {writes} writes");
    Ok(())
}

fn cli(cell: &mut Cell) -> Result<()> {
    for (arguments, wanted) in [
        (&["PING"][..], "PONG"),
        (&["SET", "key", "value"], "OK"),
        (&["GET", "key"], "value"),
        (&["QUIT"], "OK"),
    ] {
        let text = cell.cli_text(arguments)?;
        ensure!(text == wanted, "valkey-cli {arguments:?}: '{text}'");
    }
    let value = pattern::value(3, 10 << 20);
    let output = cell.cli(&["-x", "SET", "big"], &value)?;
    ensure!(output.text() == "OK\n", "valkey-cli -x SET: {}", output.text());
    let output = cell.cli(&["GET", "big"], b"")?;
    // Out of a terminal, valkey-cli prints the bytes as they are and a newline.
    ensure!(
        output.stdout.strip_suffix(b"\n") == Some(&value[..]),
        "valkey-cli GET: {} bytes, changed",
        output.stdout.len()
    );
    cell.moved(value.len(), value.len());

    // Refused in the middle of the input: the error is the last thing that arrives.
    let text = cell.cli_text(&["EVAL", "return redis.error_reply('ERR told you')", "0"])?;
    ensure!(text.contains("told you"), "valkey-cli EVAL: '{text}'");
    Ok(())
}

fn benchmark(cell: &mut Cell) -> Result<()> {
    // I/O threads of the 8.x lines wait by spinning: where there are fewer processors than
    // threads, a stock server serves a few hundred requests a second, over TCP too.
    let (small, medium, large) = match (cell.lab.is_slow(), cell.has_io_threads()) {
        (true, _) => (2000, 400, 40),
        (false, true) => (4000, 1000, 200),
        (false, false) => (50_000, 10_000, 400),
    };
    for (requests, clients, size, pipeline) in [
        (small, 10, 64, 1),
        (4 * small, 50, 64, 16),
        (medium, 50, 40 << 10, 1),
        (large, 10, 1 << 20, 1),
    ] {
        let tests = vec!["set", "get"];
        let load = Load { tests, requests, clients, size, pipeline, ..Load::default() };
        cell.benchmark(&load, cell.lab.cell_limit().max(Duration::from_secs(60)))?;
    }
    Ok(())
}

/// Clients that connect anew for each request, as scripts do that call `valkey-cli`; and a
/// crowd right after another crowd went.
fn reconnects(cell: &mut Cell) -> Result<()> {
    // Where I/O threads spin for want of processors, a connection takes tens of milliseconds.
    let few = if cell.lab.is_slow() || cell.has_io_threads() { 150 } else { 600 };
    let reconnecting = |tests, clients, requests| Load {
        tests,
        clients,
        requests,
        size: 64,
        reconnect: true,
        ..Load::default()
    };
    let limit = cell.lab.cell_limit();
    cell.benchmark(&reconnecting(vec!["ping_mbulk"], 1, few), limit)?;
    cell.benchmark(&reconnecting(vec!["set"], 20, 2 * few), limit)?;
    let crowd = if cell.lab.is_slow() { 100 } else { 1000 };
    let load = Load {
        tests: vec!["set", "get"],
        clients: crowd,
        requests: 2 * crowd,
        size: 64,
        ..Load::default()
    };
    cell.benchmark(&load, limit)?;
    let connections = cell.info()?.number("total_connections_received")?;
    let least = (3 * few + 2 * crowd) as u64;
    ensure!(connections >= least, "{connections} connections, not {least}");
    cell.figure("connections", connections);
    Ok(())
}
