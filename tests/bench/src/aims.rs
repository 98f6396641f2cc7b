// SPDX-License-Identifier: BSD-3-Clause
//! What is aimed at, beside what was reached: of each aim the cell that is furthest from it.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use anyhow::Result;

use crate::contender::Contender::{self, Ours, Tcp, Upstream};
use crate::results::{Measured, Results};
use crate::stats::BEHIND;
use crate::table::{Cell, Place, Size};
use crate::words::bound;

/// How an aim is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Goal {
    Most(f64),
    Least(f64),
}

use Goal::{Least, Most};

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Most(most) => value <= most,
            Least(least) => value >= least,
        }
    }

    /// Of several values the one that is furthest from it.
    fn worst(self, values: impl Iterator<Item = (String, f64)>) -> Option<(String, f64)> {
        match self {
            Most(_) => values.max_by(|a, b| a.1.total_cmp(&b.1)),
            Least(_) => values.min_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Most(most) => write!(out, "at most {most}"),
            Least(least) => write!(out, "at least {least}"),
        }
    }
}

/// One aim.
struct Aim {
    /// By which `tests/bench/reasons.toml` says why it is not reached.
    key: &'static str,
    text: String,
    goal: Goal,
    /// Where the worst value is, and it.
    worst: Option<(String, f64)>,
    /// How many values reach the goal, and how many there are.
    reached: (usize, usize),
}

impl Aim {
    fn new(key: &'static str, text: &str, goal: Goal, values: Vec<(String, f64)>) -> Self {
        let reached = values.iter().filter(|(_, value)| goal.is_met(*value)).count();
        let reached = (reached, values.len());
        Self { key, text: text.to_owned(), goal, worst: goal.worst(values.into_iter()), reached }
    }

    fn is_met(&self) -> bool {
        self.worst.as_ref().is_some_and(|(_, value)| self.goal.is_met(*value))
    }
}

/// The table of aims, and why some are not reached.
pub fn table(
    results: &Results,
    cells: &[Cell],
    reasons: &BTreeMap<String, String>,
) -> Result<String> {
    let aims = aims(results, cells);
    let mut text = String::from(
        "\n| aim | goal | reached by | at worst | where |\n| --- | --- | --- | ---: | --- |\n",
    );
    for aim in &aims {
        let (place, value) = match &aim.worst {
            Some((place, value)) if aim.is_met() => (place.as_str(), format!("{value:.2}")),
            Some((place, value)) => (place.as_str(), format!("**{value:.2}**")),
            None => ("no such cell", "–".to_owned()),
        };
        let (reached, all) = aim.reached;
        writeln!(text, "| {} | {} | {reached} of {all} | {value} | {place} |", aim.text, aim.goal)?;
    }
    let short: Vec<&Aim> = aims.iter().filter(|aim| !aim.is_met()).collect();
    if !short.is_empty() {
        text += "\nWhat is short of its goal, and why:\n\n";
    }
    for aim in short {
        let why = reasons.get(aim.key).map_or("not explained yet", String::as_str);
        writeln!(text, "- {}: {why}", aim.text)?;
    }
    Ok(text)
}

fn aims(results: &Results, cells: &[Cell]) -> Vec<Aim> {
    // A place that has no cells has none of their aims.
    let mut aims = if cells.is_empty() { Vec::new() } else { of_cells(results, cells) };
    for &connections in results.crowd.keys() {
        let Some((speed, resident)) = results.among(connections, Ours) else { continue };
        let place = format!("{connections} connections");
        aims.push(Aim::new(
            "crowd-speed",
            "Speed of active connections among idle ones, to that alone",
            Least(0.9),
            vec![(place.clone(), speed.median)],
        ));
        let gib = resident.median / f64::from(1 << 30);
        let text = "GiB resident with them";
        aims.push(Aim::new("crowd-memory", text, Most(4.0), vec![(place, gib)]));
    }
    aims
}

/// The aims that are judged by the cells, and by the memory of idle connections.
fn of_cells(results: &Results, cells: &[Cell]) -> Vec<Aim> {
    let measured =
        || cells.iter().filter_map(|cell| Some((cell, results.cells.get(&cell.to_string())?)));
    let small = || measured().filter(|(cell, _)| cell.size == Size(64));
    let mut aims = Vec::new();
    let mut aim = |key, text: &str, goal: Goal, values: &mut dyn Iterator<Item = (String, f64)>| {
        aims.push(Aim::new(key, text, goal, values.collect()));
    };

    aim(
        "cpu",
        "CPU time for a request of 64 B, ours/C",
        Most(0.7),
        &mut small().filter_map(|(cell, measured)| {
            let ratio = measured.ratio(Ours, Upstream, |figures| figures.cpu)?;
            Some((cell.to_string(), ratio.median))
        }),
    );
    aim(
        "system-calls",
        "System calls for a request of 64 B, ours/C",
        Most(0.7),
        &mut small().filter_map(|(cell, measured)| {
            let calls = |who| measured.system_calls(who);
            Some((cell.to_string(), calls(Ours)? / calls(Upstream)?))
        }),
    );
    aim(
        "throughput",
        "Throughput at 64 B with 50 clients, ours/C, where the server and not the client is what \
         limits ours or C",
        Least(if results.place == Place::Vm { 1.3 } else { 1.5 }),
        &mut small()
            .filter(|(cell, measured)| {
                cell.clients == 50
                    && [Ours, Upstream].iter().any(|&who| bound(measured, who) == "server")
            })
            .filter_map(|(cell, measured)| {
                let ratio = measured.ratio(Ours, Upstream, |figures| figures.rate)?;
                Some((cell.to_string(), ratio.median))
            }),
    );
    aim(
        "io-threads",
        "Throughput with I/O threads to that without, ours/TCP",
        Least(1.0),
        &mut measured().filter(|(cell, _)| cell.io_threads > 1).filter_map(|(cell, with)| {
            let without = Cell { io_threads: 1, ..cell.clone() };
            let gain = |who| gain(with, results.cells.get(&without.to_string())?, who);
            Some((cell.to_string(), gain(Ours)? / gain(Tcp)?))
        }),
    );
    let behind = measured()
        .filter_map(|(_, measured)| measured.ratio(Ours, Upstream, |figures| figures.rate))
        .filter(|ratio| ratio.is_surely_below(BEHIND))
        .count();
    let all = format!("{} cells", measured().count());
    aim("behind", "Cells behind C, see below", Most(0.0), &mut [(all, behind as f64)].into_iter());
    aim(
        "memory",
        "KiB for an idle connection",
        Most(200.0),
        &mut results.idle.iter().filter_map(|(connections, all)| {
            let bytes = all.get(&Ours)?.as_ref().ok()?;
            Some((format!("{connections} of them"), bytes / 1024.0))
        }),
    );
    if let Some(bare) = results.bare() {
        let large = measured().filter(|(cell, _)| cell.size == Size(10 << 20) && cell.clients == 1);
        aim(
            "bare",
            "10 MB by one client, to RDMA writes alone",
            Least(0.85),
            &mut large.filter_map(|(cell, measured)| {
                let rate = measured.of(Ours, |figures| figures.rate)?.median;
                Some((cell.to_string(), rate * cell.size.0 as f64 / bare.median))
            }),
        );
    }
    aims
}

/// How much of its throughput a contender has with I/O threads.
fn gain(with: &Measured, without: &Measured, who: Contender) -> Option<f64> {
    let rate = |measured: &Measured| Some(measured.of(who, |figures| figures.rate)?.median);
    Some(rate(with)? / rate(without)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_what_is_furthest_from_the_goal() {
        let values = || [("a", 0.5), ("b", 0.9), ("c", 0.6)].map(|(name, v)| (name.to_owned(), v));
        assert_eq!(Most(0.7).worst(values().into_iter()), Some(("b".to_owned(), 0.9)));
        assert_eq!(Least(0.7).worst(values().into_iter()), Some(("a".to_owned(), 0.5)));
        assert_eq!(Least(0.7).worst(std::iter::empty()), None);
    }

    #[test]
    fn a_goal_that_nothing_was_measured_for_is_not_reached() {
        let aim = |values: &[f64]| {
            let values = values.iter().map(|&value| (String::new(), value)).collect();
            Aim::new("cpu", "", Most(0.7), values)
        };
        assert!(aim(&[0.7]).is_met());
        assert!(!aim(&[0.7, 0.71]).is_met());
        assert_eq!(aim(&[0.7, 0.71, 0.1]).reached, (2, 3));
        assert!(!aim(&[]).is_met());
    }
}
