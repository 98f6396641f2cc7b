// SPDX-License-Identifier: BSD-3-Clause
//! What was measured at one place: a JSON file that is written after every run, so that an
//! interrupted benchmark goes on where it was, and that the report is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cells::lab::Lab;
use serde::{Deserialize, Serialize};

use crate::contender::Contender;
use crate::crowd::Among;
use crate::load::Figures;
use crate::machine::Machine;
use crate::stats::{Estimate, estimate};
use crate::table::{Cell, Place};

/// One of a run's figures.
pub type Kind = fn(&Figures) -> f64;

/// What something came to: its figures, or how it failed.
pub type Outcome<T> = Result<T, String>;

/// Everything that was measured with one build of the module at one place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    #[serde(skip)]
    path: PathBuf,
    /// Where.
    pub place: Place,
    /// The hash of the module.
    pub module: String,
    /// The commit that it was built from, as git describes it.
    pub commit: String,
    /// The days of its runs.
    pub days: BTreeSet<String>,
    /// The machine there.
    pub machine: Machine,
    /// The time that all of it took, in seconds.
    pub wall: f64,
    /// By cell.
    pub cells: BTreeMap<String, Measured>,
    /// Bytes for each idle connection, by their number.
    pub idle: BTreeMap<u32, BTreeMap<Contender, Outcome<f64>>>,
    /// A few active connections among many idle ones, by their number, by turn.
    #[serde(default)]
    pub crowd: BTreeMap<u32, BTreeMap<u32, BTreeMap<Contender, Outcome<Among>>>>,
    /// Bytes in a second by RDMA writes alone, by turn.
    #[serde(default)]
    pub bare: BTreeMap<u32, Outcome<f64>>,
}

/// What was measured of a cell.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Its turns: one run of each contender.
    pub turns: BTreeMap<u32, BTreeMap<Contender, Outcome<Figures>>>,
    /// System calls for each request, see [`trace`](crate::trace).
    pub calls: BTreeMap<Contender, Outcome<f64>>,
}

impl Measured {
    /// One figure of a contender over all turns.
    pub fn of(&self, who: Contender, what: Kind) -> Option<Estimate> {
        estimate(self.turns.values().filter_map(|turn| Some(what(turn.get(&who)?.as_ref().ok()?))))
    }

    /// The ratio of a figure of two contenders, turn by turn.
    pub fn ratio(&self, who: Contender, to: Contender, what: Kind) -> Option<Estimate> {
        let pairs = self.turns.values().filter_map(|turn| {
            let (a, b) = (turn.get(&who)?.as_ref().ok()?, turn.get(&to)?.as_ref().ok()?);
            let (a, b) = (what(a), what(b));
            (b > 0.0).then(|| a / b)
        });
        estimate(pairs)
    }

    /// System calls of a contender for each request.
    pub fn system_calls(&self, who: Contender) -> Option<f64> {
        self.calls.get(&who)?.as_ref().ok().copied()
    }

    /// How a contender failed, where it did.
    pub fn failure(&self, who: Contender) -> Option<&str> {
        let runs = self.turns.values().filter_map(|turn| turn.get(&who)?.as_ref().err());
        runs.chain(self.calls.get(&who).and_then(|calls| calls.as_ref().err()))
            .next()
            .map(String::as_str)
    }
}

impl Results {
    /// Reads the file at `path`; none if there is no such file.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(text) => {
                let results: Self = serde_json::from_slice(&text)
                    .with_context(|| format!("the results in {}", path.display()))?;
                Ok(Some(Self { path: path.to_owned(), ..results }))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// No results yet, to be kept at `path`.
    pub fn none(path: &Path, place: Place, lab: &Lab, machine: Machine) -> Self {
        Self {
            path: path.to_owned(),
            place,
            module: lab.module_sha256.clone(),
            commit: String::new(),
            days: BTreeSet::new(),
            machine,
            wall: 0.0,
            cells: BTreeMap::new(),
            idle: BTreeMap::new(),
            crowd: BTreeMap::new(),
            bare: BTreeMap::new(),
        }
    }

    /// Of a contender's active ones among so many connections: their speed, to that alone, and
    /// the server's resident bytes.
    pub fn among(&self, connections: u32, who: Contender) -> Option<(Estimate, Estimate)> {
        let turns = || {
            let turns = self.crowd.get(&connections).into_iter().flat_map(BTreeMap::values);
            turns.filter_map(move |turn| turn.get(&who)?.as_ref().ok())
        };
        let speed = estimate(turns().map(|turn| turn.among.rate / turn.alone.rate))?;
        Some((speed, estimate(turns().map(|turn| turn.resident as f64))?))
    }

    /// What RDMA writes alone reach, in bytes a second.
    pub fn bare(&self) -> Option<Estimate> {
        estimate(self.bare.values().filter_map(|outcome| outcome.as_ref().ok().copied()))
    }

    /// Writes the file: at once whole, or not.
    pub fn save(&self) -> Result<()> {
        self.copy(&self.path)
    }

    /// Writes them all to another file: at once whole, or not.
    pub fn copy(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_string(self)? + "\n")?;
        std::fs::rename(&new, path).with_context(|| path.display().to_string())
    }

    /// What was measured of a cell.
    pub fn cell(&mut self, cell: &Cell) -> &mut Measured {
        self.cells.entry(cell.to_string()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Contender::{Ours, Upstream};

    fn figures(rate: f64) -> Outcome<Figures> {
        Ok(Figures { rate, p50: 1.0, p99: 2.0, cpu: 3.0, server: 0.5, client: 0.9 })
    }

    #[test]
    fn ratios_are_taken_within_a_turn() {
        let mut measured = Measured::default();
        for (turn, ours, theirs) in [(0, 20.0, 10.0), (1, 300.0, 100.0), (2, 8.0, 2.0)] {
            measured
                .turns
                .insert(turn, [(Ours, figures(ours)), (Upstream, figures(theirs))].into());
        }
        measured.turns.insert(3, [(Ours, figures(1.0)), (Upstream, Err("hung".into()))].into());
        let ratio = measured.ratio(Ours, Upstream, |figures| figures.rate).unwrap();
        assert_eq!((ratio.median, ratio.low, ratio.high), (3.0, 2.0, 4.0));
        assert_eq!(measured.failure(Upstream), Some("hung"));
        assert_eq!(measured.failure(Ours), None);
    }

    #[test]
    fn what_was_saved_is_read_again() {
        let path = std::env::temp_dir().join(format!("bench-results.{}", std::process::id()));
        let mut results = Results {
            path: path.clone(),
            place: Place::Soft,
            module: "hash".into(),
            commit: "commit".into(),
            days: ["today".into()].into(),
            machine: Machine::here().unwrap(),
            wall: 1.5,
            cells: BTreeMap::new(),
            idle: BTreeMap::new(),
            crowd: BTreeMap::new(),
            bare: BTreeMap::new(),
        };
        let mut measured = Measured::default();
        measured.turns.insert(0, [(Ours, figures(7.0)), (Upstream, Err("hung".into()))].into());
        results.cells.insert("get".into(), measured);
        results.idle.insert(50, [(Ours, Ok(100.0))].into());
        results.save().unwrap();
        let again = Results::read(&path).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(again.cells["get"].failure(Upstream), Some("hung"));
        assert_eq!(again.cells["get"].of(Ours, |figures| figures.rate).unwrap().median, 7.0);
        assert_eq!(again.idle[&50][&Ours], Ok(100.0));
        assert!(Results::read(&path).unwrap().is_none());
    }
}
