// SPDX-License-Identifier: BSD-3-Clause
//! The report: tables and plots of what was measured, what fell behind, and the figures
//! themselves.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::contender::Contender::{self, Ours, Tcp, Upstream};
use crate::load::Figures;
use crate::results::{Kind, Measured, Results};
use crate::stats::{BEHIND, Estimate, geometric_mean};
use crate::table::{self, Cell};
use crate::words::{awake, bound, interval, one_line, rounded, show};
use crate::{aims, plot};

/// Why cells fall behind and goals are not reached: by place, by cell or goal.
pub type Reasons = BTreeMap<String, BTreeMap<String, String>>;

const INTRODUCTION: &str = "\
# Performance

Written by `scripts/bench.sh`; only the reasons for what falls short are written by hand, in
`tests/bench/reasons.toml`. Everybody can repeat it: `scripts/bench.sh all`. The folder
[performance](performance) has the figures of each single run, as JSON.

**ours** is this module, **C** upstream's module of the same release, **TCP** no module, over
loopback. All three run in the same build of valkey-server 9.1.2, with a new server for each
run, under upstream's `valkey-benchmark`, in turns: six turns are all orders of the three. A
cell `get/16KB/c50/p16/io4` is GET of 16 KB by 50 clients, each with 16 requests under way, on
a server with `io-threads 4`.

- A ratio is taken within each turn. Shown are the median over the turns and, in brackets, its
  95 % interval by order statistics.
- *awake* is the part of the time in which the main thread of server and client did not sleep
  (it ran or waited for a processor). From 90 % on it is what bounds the cell; where the client
  does, a faster server can't be seen in the throughput, but in the CPU time.
- CPU is what all threads of the server used, user and system, for each request.
- System calls are counted at the kernel's tracepoints, in a run of its own, at full speed. On
  the software fabric they are the fabric's, which does in user space what a device and its
  kernel driver do elsewhere: one of them for each reply is the doorbell, which wakes the
  client's process. Readings of the clock are left out where they are system calls.
- Memory is what is resident with so many idle connections less what was without, divided by
  their number; the first connection also brings what all of a device share. The software
  fabric's links are in it.
- The software fabric and an emulated machine say nothing of RDMA hardware: the columns compare
  with each other, and no figure with any of elsewhere.
";

/// Writes the report, and beside it its plots and the figures that it is made of.
pub fn write(into: &Path, all: &[Results], cells: &str, reasons: &Reasons) -> Result<()> {
    let plots = into.with_extension("");
    std::fs::create_dir_all(&plots)?;
    let mut text = INTRODUCTION.to_owned();
    for results in all {
        let place = results.place.to_string();
        let cells = table::read(cells, results.place, false)?.cells;
        let none = BTreeMap::new();
        let page = Page { results, cells, reasons: reasons.get(&place).unwrap_or(&none) };
        text += &page.text()?;
        page.plots(&plots, &mut text)?;
        results.copy(&plots.join(format!("{place}.json")))?;
    }
    std::fs::write(into, text).with_context(|| into.display().to_string())
}

/// The part of the report on one place.
struct Page<'a> {
    results: &'a Results,
    cells: Vec<Cell>,
    reasons: &'a BTreeMap<String, String>,
}

impl Page<'_> {
    fn text(&self) -> Result<String> {
        let mut text = String::new();
        self.heading(&mut text)?;
        text += &aims::table(self.results, &self.cells, self.reasons)?;
        if !self.cells.is_empty() {
            self.throughput(&mut text)?;
            self.behind(&mut text)?;
            self.cost(&mut text)?;
            self.threads(&mut text)?;
            self.memory(&mut text)?;
        }
        self.crowds(&mut text)?;
        self.bare(&mut text)?;
        self.failures(&mut text)?;
        Ok(text)
    }

    fn measured(&self) -> impl Iterator<Item = (&Cell, Option<&Measured>)> {
        self.cells.iter().map(|cell| (cell, self.results.cells.get(&cell.to_string())))
    }

    fn heading(&self, text: &mut String) -> Result<()> {
        let Results { place, machine, commit, days, wall, .. } = self.results;
        let days = days.iter().map(String::as_str).collect::<Vec<_>>().join(" and ");
        let cells = self.results.cells.values().map(|measured| measured.turns.len());
        let turns = cells.chain(self.results.crowd.values().map(BTreeMap::len)).max().unwrap_or(0);
        write!(
            text,
            "\n## {}\n\nCommit {commit}, {days}. {} processors ({}), {:.0} GiB, Linux {}; load \
             averages before: {}. Up to {turns} turns, {:.0} minutes in all.\n",
            place.title(),
            machine.processors,
            machine.processor,
            machine.memory as f64 / f64::from(1 << 30),
            machine.kernel,
            machine.load,
            wall / 60.0
        )?;
        if self.cells.is_empty() {
            return Ok(());
        }
        let ratios = |what: Kind| {
            let medians = self.measured().filter_map(move |(_, measured)| {
                Some(measured?.ratio(Ours, Upstream, what)?.median)
            });
            geometric_mean(medians).map_or("–".to_owned(), |mean| format!("{mean:.2}"))
        };
        writeln!(
            text,
            "Over all cells, ours is at {} of C's throughput with {} of its CPU time for each \
             request (geometric means).",
            ratios(|figures| figures.rate),
            ratios(|figures| figures.cpu)
        )?;
        Ok(())
    }

    fn throughput(&self, text: &mut String) -> Result<()> {
        *text += "\n### Throughput\n\n\
                  | cell | ours/C | ours/TCP | ours, 1/s | C, 1/s | TCP, 1/s | awake, server and \
                  client: ours | C | bound by |\n\
                  | --- | --- | --- | ---: | ---: | ---: | --- | --- | --- |\n";
        for (cell, measured) in self.measured() {
            let Some(measured) = measured else {
                writeln!(text, "| {cell} | not run | | | | | | | |")?;
                continue;
            };
            let rate = |who| show(measured, who, |figures| figures.rate, rounded);
            writeln!(
                text,
                "| {cell} | **{}** | {} | {} | {} | {} | {} | {} | {} |",
                interval(measured.ratio(Ours, Upstream, |figures| figures.rate)),
                interval(measured.ratio(Ours, Tcp, |figures| figures.rate)),
                rate(Ours),
                rate(Upstream),
                rate(Tcp),
                awake(measured, Ours),
                awake(measured, Upstream),
                bound(measured, Ours)
            )?;
        }
        Ok(())
    }

    fn behind(&self, text: &mut String) -> Result<()> {
        let mut none = true;
        *text += "\n### Behind\n\nCells whose interval of ours/C lies wholly below 0.95:\n\n";
        for (cell, measured) in self.measured() {
            let ratio = measured.and_then(|m| m.ratio(Ours, Upstream, |figures| figures.rate));
            if let Some(ratio) = ratio.filter(|ratio| ratio.is_surely_below(BEHIND)) {
                let name = cell.to_string();
                let why = self.reasons.get(&name).map_or("not explained yet", String::as_str);
                writeln!(text, "- {name}, {}: {why}", interval(Some(ratio)))?;
                none = false;
            }
        }
        if none {
            *text += "none.\n";
        }
        Ok(())
    }

    fn failures(&self, text: &mut String) -> Result<()> {
        let mut lines = String::new();
        for (cell, measured) in self.measured() {
            for who in Contender::ALL {
                if let Some(why) = measured.and_then(|measured| measured.failure(who)) {
                    writeln!(lines, "- {cell}, {who}: {}", one_line(why))?;
                }
            }
        }
        let crowds = self.results.crowd.values().flat_map(BTreeMap::values);
        let bare = self.results.bare.values();
        for who in Contender::ALL {
            let mut failed = crowds.clone().filter_map(|turn| turn.get(&who)?.as_ref().err());
            if let Some(why) = failed.next() {
                writeln!(lines, "- active connections among idle ones, {who}: {}", one_line(why))?;
            }
        }
        for why in bare.filter_map(|turn| turn.as_ref().err()).take(1) {
            writeln!(lines, "- RDMA writes alone: {}", one_line(why))?;
        }
        for (connections, outcomes) in &self.results.idle {
            for (who, outcome) in outcomes {
                if let Err(why) = outcome {
                    writeln!(lines, "- {connections} idle connections, {who}: {}", one_line(why))?;
                }
            }
        }
        if !lines.is_empty() {
            write!(
                text,
                "\n### Failed\n\nThe first failure of each, where a run failed:\n\n{lines}"
            )?;
        }
        Ok(())
    }

    fn cost(&self, text: &mut String) -> Result<()> {
        *text += "\n### Cost of a request, and latency\n\n\
                  | cell | CPU: ours/C | ours, µs | C | TCP | system calls: ours | C | TCP | \
                  p50: ours, ms | C | TCP | p99: ours, ms | C | TCP |\n\
                  | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | \
                  ---: | ---: | ---: |\n";
        for (cell, measured) in self.measured() {
            let Some(measured) = measured else { continue };
            write!(
                text,
                "| {cell} | **{}**",
                interval(measured.ratio(Ours, Upstream, |figures| figures.cpu))
            )?;
            for who in Contender::ALL {
                write!(text, " | {}", show(measured, who, |figures| figures.cpu, rounded))?;
            }
            for who in Contender::ALL {
                let calls =
                    measured.system_calls(who).map_or("–".to_owned(), |n| format!("{n:.2}"));
                write!(text, " | {calls}")?;
            }
            for what in [|figures: &Figures| figures.p50, |figures: &Figures| figures.p99] {
                for who in Contender::ALL {
                    write!(text, " | {}", show(measured, who, what, |ms| format!("{ms:.3}")))?;
                }
            }
            *text += " |\n";
        }
        Ok(())
    }

    /// Cells that exist with one and with more I/O threads.
    fn threads(&self, text: &mut String) -> Result<()> {
        *text += "\n### I/O threads: throughput with them to that without\n\n\
                  | cell | ours | C | TCP |\n| --- | ---: | ---: | ---: |\n";
        for (cell, measured) in self.measured().filter(|(cell, _)| cell.io_threads > 1) {
            let without = Cell { io_threads: 1, ..cell.clone() }.to_string();
            let (Some(with), Some(without)) = (measured, self.results.cells.get(&without)) else {
                continue;
            };
            write!(text, "| {cell}")?;
            for who in Contender::ALL {
                let rate =
                    |measured: &Measured| Some(measured.of(who, |figures| figures.rate)?.median);
                let ratio = rate(with).zip(rate(without)).map(|(a, b)| format!("{:.2}", a / b));
                write!(text, " | {}", ratio.unwrap_or("–".to_owned()))?;
            }
            *text += " |\n";
        }
        Ok(())
    }

    fn memory(&self, text: &mut String) -> Result<()> {
        *text += "\n### Memory of idle connections, KiB for each\n\n\
                  | connections | ours | C | TCP |\n| ---: | ---: | ---: | ---: |\n";
        for (connections, outcomes) in &self.results.idle {
            write!(text, "| {connections}")?;
            for who in Contender::ALL {
                let shown = match outcomes.get(&who) {
                    Some(Ok(bytes)) => format!("{:.0}", bytes / 1024.0),
                    Some(Err(_)) => "fails".to_owned(),
                    None => "–".to_owned(),
                };
                write!(text, " | {shown}")?;
            }
            *text += " |\n";
        }
        Ok(())
    }

    /// A few active connections among many idle ones.
    fn crowds(&self, text: &mut String) -> Result<()> {
        if self.results.crowd.is_empty() {
            return Ok(());
        }
        *text += "\n### Active connections among idle ones\n\n\
                  | connections in all | | ours | C | TCP |\n| ---: | --- | --- | --- | --- |\n";
        for &connections in self.results.crowd.keys() {
            let all = Contender::ALL.map(|who| self.results.among(connections, who));
            let row = |show: fn((Estimate, Estimate)) -> String| {
                all.map(|one| one.map_or("–".to_owned(), show)).join(" | ")
            };
            let speed = row(|(speed, _)| interval(Some(speed)));
            let resident = row(|(_, bytes)| format!("{:.2}", bytes.median / f64::from(1 << 30)));
            writeln!(text, "| {connections} | speed of the active, to that alone | {speed} |")?;
            writeln!(text, "| {connections} | GiB resident | {resident} |")?;
        }
        Ok(())
    }

    fn bare(&self, text: &mut String) -> Result<()> {
        if let Some(bare) = self.results.bare() {
            let mb = bare.median / 1e6;
            write!(
                text,
                "\nRDMA writes of 1 MiB alone, each after the one before (perftest's \
                 `ib_write_bw`), move {mb:.0} MB/s between two processes.\n"
            )?;
        }
        Ok(())
    }

    fn plots(&self, folder: &Path, text: &mut String) -> Result<()> {
        let place = self.results.place;
        let kinds: [(&str, &str, Kind); 2] = [
            ("throughput", "Throughput, ours/C (more is better)", |figures| figures.rate),
            ("cpu", "Server CPU time for each request, ours/C (less is better)", |figures| {
                figures.cpu
            }),
        ];
        for (name, title, what) in kinds {
            let rows: Vec<(String, Estimate)> = self
                .measured()
                .filter_map(|(cell, measured)| {
                    Some((cell.to_string(), measured?.ratio(Ours, Upstream, what)?))
                })
                .collect();
            if !rows.is_empty() {
                let file = format!("{place}-{name}.svg");
                plot::ratios(&folder.join(&file), &format!("{title}, {place}"), &rows)?;
                let folder = folder.file_name().context("a report without a name")?.display();
                write!(text, "\n![{title}]({folder}/{file})\n")?;
            }
        }
        Ok(())
    }
}
