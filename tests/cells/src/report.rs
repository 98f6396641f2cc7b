// SPDX-License-Identifier: BSD-3-Clause
//! What became of the cells: kept in a state file, so that a long run can be resumed, and
//! written as a table for people.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::matrix::{CellId, Expected, Matrix};

/// A cell that passed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The commit that the module was built from, as git describes it.
    pub commit: String,
    /// The hash of the module, by which a record is known to be of the same one.
    pub module: String,
    /// The server's release and build.
    #[serde(default)]
    pub server: String,
    /// The day.
    pub date: String,
    /// How long it took.
    pub seconds: f64,
    /// What it measured.
    pub figures: Vec<(String, String)>,
}

/// The records of all cells that have passed so far.
pub struct State {
    path: PathBuf,
    records: BTreeMap<String, Record>,
}

impl State {
    /// Reads the file at `path`; none is an empty one.
    pub fn open(path: &Path) -> Result<Self> {
        let records = match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("the state in {}", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(Self { path: path.to_owned(), records })
    }

    /// The record of a cell that passed with the module of this hash.
    pub fn passed(&self, id: &CellId, module: &str) -> Option<&Record> {
        let record = self.records.get(&id.to_string());
        record.filter(|record| record.module == module)
    }

    /// Adds a record, at once on disk too: the next moment may be a crash.
    pub fn add(&mut self, id: &CellId, record: Record) -> Result<()> {
        self.records.insert(id.to_string(), record);
        self.save()
    }

    /// Forgets a cell, because it failed now.
    pub fn remove(&mut self, id: &CellId) -> Result<()> {
        self.records.remove(&id.to_string());
        self.save()
    }

    fn save(&self) -> Result<()> {
        let new = self.path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec_pretty(&self.records)?)?;
        std::fs::rename(&new, &self.path)?;
        Ok(())
    }

    /// Everything that is known: the releases, and all cells on them.
    pub fn report(&self, matrix: &Matrix) -> Result<String> {
        let mut cells = matrix.cells.clone();
        let stock: BTreeSet<_> = cells.iter().map(|cell| cell.id.server.clone()).collect();
        let given: BTreeSet<_> =
            self.records.keys().filter_map(|id| id.split('/').nth(1)).collect();
        for release in given.into_iter().filter(|server| !stock.contains(*server)) {
            cells.extend(matrix.given(release)?);
        }
        Ok(self.table(&cells))
    }

    /// For each server how many of its cells have passed, and when the last did.
    fn releases(&self, cells: &[Expected]) -> String {
        let mut text = "## Releases\n\n| server | release and build | passed | of | until |\n\
             | --- | --- | ---: | ---: | --- |\n"
            .to_owned();
        let servers: BTreeSet<_> = cells.iter().map(|cell| &cell.id.server).collect();
        for server in servers {
            let own = cells.iter().filter(|cell| cell.id.server == *server && cell.skip.is_none());
            let own: Vec<_> = own.collect();
            let passed = own.iter().filter_map(|cell| self.records.get(&cell.id.to_string()));
            let passed: Vec<_> = passed.collect();
            let last = passed.iter().max_by_key(|record| &record.date);
            text += &format!(
                "| {server} | {} | {} | {} | {} |\n",
                last.map_or("", |record| &record.server),
                passed.len(),
                own.len(),
                last.map_or("", |record| &record.date)
            );
        }
        text + "\n"
    }

    /// For each device that the software fabric behaves as, what has passed of each case.
    fn devices(&self, cells: &[Expected]) -> String {
        let own: Vec<(&String, &Expected)> = cells
            .iter()
            .filter_map(|cell| Some((cell.id.device.as_ref()?, cell)))
            .filter(|(_, cell)| cell.skip.is_none())
            .collect();
        if own.is_empty() {
            return String::new();
        }
        let cases: BTreeSet<_> = own.iter().map(|(_, cell)| &cell.id.case).collect();
        let devices: BTreeSet<_> = own.iter().map(|(device, _)| device).collect();
        let row = |name: &str, column: &dyn Fn(&String) -> String| {
            let columns: Vec<String> = cases.iter().map(|case| column(case)).collect();
            format!("| {name} | {} |\n", columns.join(" | "))
        };
        let mut text = "## Devices\n\nThe software fabric behaves as each of them, by what is \
             known of it from outside\n(`tests/softrdma/src/profiles.rs`): cells that have passed, \
             of how many.\n\n"
            .to_owned();
        text += &row("device", &|case| case.clone());
        text += &row("---", &|_| "---".to_owned());
        for device in devices {
            text += &row(device, &|case| {
                let of = own.iter().filter(|(its, cell)| its == device && cell.id.case == *case);
                let ids: Vec<String> = of.map(|(_, cell)| cell.id.to_string()).collect();
                let passed = ids.iter().filter(|id| self.records.contains_key(*id)).count();
                if ids.is_empty() { String::new() } else { format!("{passed}/{}", ids.len()) }
            });
        }
        text + "\n"
    }

    /// The table of all cells, those without a record included.
    fn table(&self, cells: &[Expected]) -> String {
        let passed =
            cells.iter().filter(|cell| self.records.contains_key(&cell.id.to_string())).count();
        let skipped = cells.iter().filter(|cell| cell.skip.is_some()).count();
        let mut text = format!(
            "# Test report\n\nWritten by `scripts/test.sh full`. {passed} of {} cells of the \
             matrix have passed, {skipped} are skipped for the reason given. Figures of the \
             virtual machine are those of an emulated processor: they compare only with each \
             other.\n\n{}{}## Cells\n\n\
             | cell | result | commit | date | seconds | figures |\n\
             | --- | --- | --- | --- | ---: | --- |\n",
            cells.len(),
            self.releases(cells),
            self.devices(cells)
        );
        for cell in cells {
            let row = match (&cell.skip, self.records.get(&cell.id.to_string())) {
                (Some(why), _) => format!("skipped: {why} | | | |"),
                (None, None) => "not run | | | |".to_owned(),
                (None, Some(record)) => {
                    let figures: Vec<String> = record
                        .figures
                        .iter()
                        .map(|(name, value)| format!("{name}: {value}"))
                        .collect();
                    format!(
                        "passed | {} | {} | {:.1} | {}",
                        record.commit,
                        record.date,
                        record.seconds,
                        figures.join("; ")
                    )
                }
            };
            text += &format!("| {} | {row} |\n", cell.id);
        }
        text
    }
}

/// The commit of the repository at `repo`, as git describes it; with a mark when files differ
/// from it.
pub fn commit(repo: &Path) -> Result<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(repo)
        .args(["describe", "--always", "--dirty", "--abbrev=10"])
        .output()
        .context("git describe")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Today, as `date` has it.
pub fn today() -> Result<String> {
    let output = Command::new("date").arg("+%F").output().context("date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
