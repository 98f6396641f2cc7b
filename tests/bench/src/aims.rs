// SPDX-License-Identifier: BSD-3-Clause
//! What is aimed at, beside what was reached: of each aim the cell that is furthest from it.

use std::fmt::Write;

use anyhow::Result;

use crate::contender::Contender::{self, Ours, Tcp, Upstream};
use crate::results::{Measured, Results};
use crate::stats::BEHIND;
use crate::table::{Cell, Size};
use crate::words::bound;

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
    let mut row = |aim: &str, worst: Option<(&Cell, f64)>| {
        let (value, place) = worst
            .map_or(("–".to_owned(), "no such cell".to_owned()), |(cell, value)| {
                (format!("{value:.2}"), cell.to_string())
            });
        writeln!(text, "| {aim} | {value} | {place} |")
    };
    row(
        "CPU time for a request of 64 B, ours/C: at most 0.7",
        greatest(small().filter_map(|(cell, measured)| {
            Some((cell, measured.ratio(Ours, Upstream, |figures| figures.cpu)?.median))
        })),
    )?;
    row(
        "System calls for a request of 64 B, ours/C: at most 0.7",
        greatest(small().filter_map(|(cell, measured)| {
            let calls = |who| measured.system_calls(who);
            Some((cell, calls(Ours)? / calls(Upstream)?))
        })),
    )?;
    row(
        &format!(
            "Throughput at 64 B with 50 clients, ours/C, where the server and not the client is \
             what limits ours or C: at least {at_once}"
        ),
        least(by_server.filter_map(|(cell, measured)| {
            Some((cell, measured.ratio(Ours, Upstream, |figures| figures.rate)?.median))
        })),
    )?;
    row("Throughput with I/O threads to that without, ours/TCP: at least 1", least(threaded))?;
    writeln!(text, "| Cells behind C, see below: 0 | {behind} | |")?;
    if let Some(Ok(bytes)) = results.idle.get(&500).and_then(|outcomes| outcomes.get(&Ours)) {
        let kib = bytes / 1024.0;
        writeln!(text, "| KiB for one of 500 idle connections: below 200 | {kib:.0} | |")?;
    }
    Ok(text)
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
