// SPDX-License-Identifier: BSD-3-Clause
//! One go at the benchmark: everything that is not measured yet, in turns, kept as it comes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use cells::lab::Lab;
use indicatif::{ProgressBar, ProgressStyle};

use crate::contender::Contender::{self, Ours, Tcp, Upstream};
use crate::results::{Measured, Results};
use crate::stats::Estimate;
use crate::table::{Cell, Crowd, Table};
use crate::trace::Counting;
use crate::{bare, crowd, idle, load};

/// See the module's text.
pub struct Session<'a> {
    lab: &'a Lab,
    table: &'a Table,
    turns: u32,
    results: Results,
    progress: ProgressBar,
    saved: Instant,
    folders: u32,
    passed: u32,
    failed: u32,
}

impl<'a> Session<'a> {
    /// A go at `table` that adds to `results`.
    pub fn new(lab: &'a Lab, table: &'a Table, turns: u32, mut results: Results) -> Result<Self> {
        results.commit = cells::report::commit(&lab.repo)?;
        results.days.insert(cells::report::today()?);
        let who = Contender::ALL.len() as u64;
        let cells = table.cells.len() as u64 * who * (u64::from(turns) + 1);
        let by_turn = who * u64::from(table.crowd.is_some()) + u64::from(table.bare);
        let steps = cells + table.idle.len() as u64 * who + by_turn * u64::from(turns);
        let progress = ProgressBar::new(steps).with_style(ProgressStyle::with_template(
            "{pos}/{len} runs, {elapsed} so far, about {eta} to go: {msg}",
        )?);
        progress.enable_steady_tick(Duration::from_secs(1));
        let saved = Instant::now();
        Ok(Self { lab, table, turns, results, progress, saved, folders: 0, passed: 0, failed: 0 })
    }

    /// Measures, and prints a line for each cell and the sum; whether nothing failed.
    pub fn run(mut self) -> Result<bool> {
        for &connections in &self.table.idle {
            self.idle(connections)?;
        }
        if let Some(crowd) = self.table.crowd {
            self.crowd(crowd)?;
        }
        if self.table.bare {
            self.bare()?;
        }
        for cell in &self.table.cells {
            self.cell(cell)?;
        }
        // Last of all: what is measured for its speed is not to be counted meanwhile.
        if !self.table.cells.is_empty() {
            let counting = Counting::begin()?;
            for cell in &self.table.cells {
                self.system_calls(cell, &counting)?;
            }
        }
        self.progress.finish_and_clear();
        if self.failed == 0 {
            let _ = std::fs::remove_dir_all(&self.lab.scratch);
        }
        println!("{} passed, {} failed, 0 skipped", self.passed, self.failed);
        Ok(self.failed == 0)
    }

    fn idle(&mut self, connections: u32) -> Result<()> {
        let mut failures = Vec::new();
        let mut shown = Vec::new();
        for who in Contender::ALL {
            let known =
                self.results.idle.get(&connections).and_then(|all| all.get(&who)?.as_ref().ok());
            let outcome = match known {
                Some(&bytes) => Ok(bytes),
                None => {
                    let folder =
                        self.step(&format!("memory of {connections} connections, {who}"))?;
                    let outcome =
                        idle::measure(self.lab, &self.table.pace, who, connections, &folder);
                    outcome.map_err(|error| format!("{error:#}"))
                }
            };
            match &outcome {
                Ok(bytes) => shown.push(format!("{who} {:.0} KiB", bytes / 1024.0)),
                Err(why) => failures.push(format!("{who}: {why}")),
            }
            self.results.idle.entry(connections).or_default().insert(who, outcome);
            self.keep()?;
        }
        self.conclude(&format!("memory of {connections} idle connections"), shown, failures);
        Ok(())
    }

    fn crowd(&mut self, crowd: Crowd) -> Result<()> {
        let name = format!("{} active of {} connections", crowd.active, crowd.connections);
        let mut failures = Vec::new();
        for turn in 0..self.turns {
            for who in Contender::order(turn) {
                let turns = self.results.crowd.entry(crowd.connections).or_default();
                if matches!(turns.entry(turn).or_default().get(&who), Some(Ok(_))) {
                    self.progress.inc(1);
                    continue;
                }
                let folder = self.step(&format!("{name}, turn {}, {who}", turn + 1))?;
                let outcome = crowd::measure(self.lab, &self.table.pace, crowd, who, &folder);
                let outcome = outcome.map_err(|error| format!("{error:#}"));
                if let Err(why) = &outcome {
                    failures.push(format!("{who}, turn {}: {why}", turn + 1));
                }
                let turns = self.results.crowd.entry(crowd.connections).or_default();
                turns.entry(turn).or_default().insert(who, outcome);
                self.keep()?;
            }
        }
        let shown = Contender::ALL.into_iter().filter_map(|who| {
            let (speed, bytes) = self.results.among(crowd.connections, who)?;
            let (speed, gib) = (speed.median, bytes.median / f64::from(1 << 30));
            Some(format!("{who} {speed:.2} of the speed alone, {gib:.2} GiB resident"))
        });
        let shown = shown.collect();
        self.conclude(&name, shown, failures);
        Ok(())
    }

    fn bare(&mut self) -> Result<()> {
        let mut failures = Vec::new();
        for turn in 0..self.turns {
            if matches!(self.results.bare.get(&turn), Some(Ok(_))) {
                self.progress.inc(1);
                continue;
            }
            let folder = self.step(&format!("RDMA writes alone, turn {}", turn + 1))?;
            let outcome = bare::measure(&folder).map_err(|error| format!("{error:#}"));
            failures.extend(outcome.as_ref().err().map(|why| format!("turn {}: {why}", turn + 1)));
            self.results.bare.insert(turn, outcome);
            self.keep()?;
        }
        let shown = self.results.bare().map(|rate| format!("{:.0} MB/s", rate.median / 1e6));
        self.conclude("RDMA writes alone", shown.into_iter().collect(), failures);
        Ok(())
    }

    fn cell(&mut self, cell: &Cell) -> Result<()> {
        let pace = self.table.pace.of(cell);
        let mut failures = Vec::new();
        for turn in 0..self.turns {
            for who in Contender::order(turn) {
                let known = self.results.cell(cell).turns.get(&turn).and_then(|all| all.get(&who));
                if matches!(known, Some(Ok(_))) {
                    self.progress.inc(1);
                    continue;
                }
                let folder = self.step(&format!("{cell}, turn {}, {who}", turn + 1))?;
                let figures = load::measure(self.lab, &pace, cell, who, &folder);
                let outcome = figures.map_err(|error| format!("{error:#}"));
                if let Err(why) = &outcome {
                    failures.push(format!("{who}, turn {}: {why}", turn + 1));
                }
                self.results.cell(cell).turns.entry(turn).or_default().insert(who, outcome);
                self.keep()?;
            }
        }
        let shown = summary(self.results.cell(cell));
        self.conclude(&cell.to_string(), shown, failures);
        Ok(())
    }

    fn system_calls(&mut self, cell: &Cell, counting: &Counting) -> Result<()> {
        let pace = self.table.pace.of(cell);
        let mut failures = Vec::new();
        for who in Contender::ALL {
            if matches!(self.results.cell(cell).calls.get(&who), Some(Ok(_))) {
                self.progress.inc(1);
                continue;
            }
            let folder = self.step(&format!("{cell}, system calls, {who}"))?;
            let calls = counting.of(self.lab, &pace, cell, who, &folder);
            let outcome = calls.map_err(|error| format!("{error:#}"));
            if let Err(why) = &outcome {
                failures.push(format!("{who}: {why}"));
            }
            self.results.cell(cell).calls.insert(who, outcome);
            self.keep()?;
        }
        let measured = self.results.cell(cell);
        let shown = Contender::ALL
            .into_iter()
            .filter_map(|who| Some(format!("{who} {:.2}", measured.system_calls(who)?)))
            .collect();
        self.conclude(&format!("system calls for each request of {cell}"), shown, failures);
        Ok(())
    }

    /// Announces the next run; the folder for it.
    fn step(&mut self, what: &str) -> Result<PathBuf> {
        self.progress.set_message(what.to_owned());
        self.folders += 1;
        let folder = self.lab.scratch.join(self.folders.to_string());
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Keeps what has just been measured.
    fn keep(&mut self) -> Result<()> {
        let now = Instant::now();
        self.results.wall += (now - self.saved).as_secs_f64();
        self.saved = now;
        self.progress.inc(1);
        self.results.save()
    }

    fn conclude(&mut self, name: &str, shown: Vec<String>, failures: Vec<String>) {
        let word = if failures.is_empty() { "pass" } else { "FAIL" };
        match failures.is_empty() {
            true => self.passed += 1,
            false => self.failed += 1,
        }
        let mut text = format!("{word}  {name}: {}", shown.join(", "));
        for failure in failures {
            text += &format!("\n      {}", failure.replace('\n', "\n      "));
        }
        self.progress.suspend(|| println!("{text}"));
    }
}

/// A cell in a line, for whoever watches.
fn summary(measured: &Measured) -> Vec<String> {
    let mut shown = Vec::new();
    for who in Contender::ALL {
        if let Some(rate) = measured.of(who, |figures| figures.rate) {
            shown.push(format!("{who} {:.0}/s", rate.median));
        }
    }
    for (name, to) in [("ours/C", Upstream), ("ours/TCP", Tcp)] {
        let rate = measured.ratio(Ours, to, |figures| figures.rate);
        let cpu = measured.ratio(Ours, to, |figures| figures.cpu);
        if let (Some(Estimate { median: rate, .. }), Some(Estimate { median: cpu, .. })) =
            (rate, cpu)
        {
            shown.push(format!("{name} {rate:.2}, CPU {cpu:.2}"));
        }
    }
    shown
}
