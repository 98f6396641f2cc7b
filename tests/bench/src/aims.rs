// SPDX-License-Identifier: BSD-3-Clause
//! What is aimed at, beside what was reached: of each aim the cell that is furthest from it.

use std::fmt::Write;

use anyhow::Result;

use crate::contender::Contender::{self, Ours, Tcp, Upstream};
use crate::results::{Measured, Results};
use crate::stats::BEHIND;
use crate::table::{Cell, Size};
use crate::words::{bound, interval};

/// The table of aims.
pub fn table(results: &Results, cells: &[Cell]) -> Result<String> {
    let measured =
        || cells.iter().filter_map(|cell| Some((cell, results.cells.get(&cell.to_string())?)));
    let small = || measured().filter(|(cell, _)| cell.size == Size(64));
    let by_server = small().filter(|(cell, measured)| {
        cell.clients == 50 && [Ours, Upstream].iter().any(|&who| bound(measured, who) == "server")
    });
    let threaded = measured().filter_map(|(cell, with)| {
        let without = Cell { io_threads: 1, ..cell.clone() };
        let gain = |who| gain(with, results.cells.get(&without.to_string())?, who);
        (cell.io_threads > 1).then(|| Some((cell, gain(Ours)? / gain(Tcp)?))).flatten()
    });
    let behind = measured()
        .filter_map(|(_, measured)| measured.ratio(Ours, Upstream, |figures| figures.rate))
        .filter(|ratio| ratio.is_surely_below(BEHIND))
        .count();
    let at_once = if results.fabric == "vm" { 1.3 } else { 1.5 };

    let mut text = String::from("\n| aim | reached at worst | where |\n| --- | ---: | --- |\n");
    text += &row(
        "CPU time for a request of 64 B, ours/C: at most 0.7",
        greatest(small().filter_map(|(cell, measured)| {
            Some((cell, measured.ratio(Ours, Upstream, |figures| figures.cpu)?.median))
        })),
    );
    text += &row(
        "System calls for a request of 64 B, ours/C: at most 0.7",
        greatest(small().filter_map(|(cell, measured)| {
            let calls = |who| measured.system_calls(who);
            Some((cell, calls(Ours)? / calls(Upstream)?))
        })),
    );
    text += &row(
        &format!(
            "Throughput at 64 B with 50 clients, ours/C, where the server and not the client is \
             what limits ours or C: at least {at_once}"
        ),
        least(by_server.filter_map(|(cell, measured)| {
            Some((cell, measured.ratio(Ours, Upstream, |figures| figures.rate)?.median))
        })),
    );
    text +=
        &row("Throughput with I/O threads to that without, ours/TCP: at least 1", least(threaded));
    writeln!(text, "| Cells behind C, see below: 0 | {behind} | |")?;
    if let Some(Ok(bytes)) = results.idle.get(&500).and_then(|outcomes| outcomes.get(&Ours)) {
        let kib = bytes / 1024.0;
        writeln!(text, "| KiB for one of 500 idle connections: below 200 | {kib:.0} | |")?;
    }
    for &connections in results.crowd.keys() {
        if let Some((speed, resident)) = results.among(connections) {
            let gib = resident.median / f64::from(1 << 30);
            writeln!(
                text,
                "| Speed of the active ones among {connections} connections, to that alone: at \
                 least 0.9 | {} | |\n| GiB resident with them: at most 4 | {gib:.2} | |",
                interval(Some(speed))
            )?;
        }
    }
    if let Some(bare) = results.bare() {
        let large = measured().filter(|(cell, _)| cell.size == Size(10 << 20) && cell.clients == 1);
        let of_bare = large.filter_map(|(cell, measured)| {
            let rate = measured.of(Ours, |figures| figures.rate)?.median;
            Some((cell, rate * cell.size.0 as f64 / bare.median))
        });
        text += &row("10 MB by one client, to RDMA writes alone: at least 0.85", least(of_bare));
    }
    Ok(text)
}

/// An aim, and the cell that is furthest from it.
fn row(aim: &str, worst: Option<(&Cell, f64)>) -> String {
    match worst {
        Some((cell, value)) => format!("| {aim} | {value:.2} | {cell} |\n"),
        None => format!("| {aim} | – | no such cell |\n"),
    }
}

/// How much of its throughput a contender has with I/O threads.
fn gain(with: &Measured, without: &Measured, who: Contender) -> Option<f64> {
    let rate = |measured: &Measured| Some(measured.of(who, |figures| figures.rate)?.median);
    Some(rate(with)? / rate(without)?)
}

fn least<'a>(values: impl Iterator<Item = (&'a Cell, f64)>) -> Option<(&'a Cell, f64)> {
    values.min_by(|a, b| a.1.total_cmp(&b.1))
}

fn greatest<'a>(values: impl Iterator<Item = (&'a Cell, f64)>) -> Option<(&'a Cell, f64)> {
    values.max_by(|a, b| a.1.total_cmp(&b.1))
}
