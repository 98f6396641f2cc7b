// SPDX-License-Identifier: BSD-3-Clause
//! The cells to measure, as `tests/bench/cells.toml` writes them down.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cells::matrix::Fabric;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// More than this must never be under way at once, in bytes.
const UNDER_WAY: u64 = 1 << 30;

/// Where something is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The software fabric, natively.
    Soft,
    /// Soft-RoCE, in an emulated machine.
    Vm,
    /// The software fabric, in an emulated machine.
    SoftVm,
}

impl Place {
    /// What carries the bytes there.
    pub fn fabric(self) -> Fabric {
        match self {
            Self::Soft | Self::SoftVm => Fabric::Soft,
            Self::Vm => Fabric::Vm,
        }
    }

    /// What the report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Soft => "The software fabric",
            Self::Vm => "Soft-RoCE in an emulated machine",
            Self::SoftVm => "The software fabric in an emulated machine",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Soft => "soft",
            Self::Vm => "vm",
            Self::SoftVm => "soft-vm",
        })
    }
}

/// What tells one cell of a place from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    /// `get` or `set`.
    pub command: String,
    /// The length of a value.
    pub size: Size,
    /// Connections.
    pub clients: u32,
    /// Requests that a connection sends before it waits for replies.
    pub pipeline: u32,
    /// The server's `io-threads`.
    pub io_threads: u32,
    /// How long its load lasts, if not as long as the place's others.
    pub seconds: Option<u32>,
}

impl fmt::Display for Cell {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, size, clients, pipeline, io_threads, .. } = self;
        write!(out, "{command}/{size}/c{clients}/p{pipeline}/io{io_threads}")
    }
}

impl Cell {
    /// Requests under way at once.
    fn under_way(&self) -> u64 {
        u64::from(self.clients) * u64::from(self.pipeline)
    }

    /// Whether a selector, parts separated by `/`, names this cell: each part is one of the
    /// cell's own, or begins one and ends in `*`.
    pub fn is_selected(&self, selector: &str) -> bool {
        let id = self.to_string();
        selector.split('/').all(|part| {
            id.split('/').any(|own| match part.strip_suffix('*') {
                Some(start) => own.starts_with(start),
                None => own == part,
            })
        })
    }
}

/// A length in bytes, written with B, KB or MB behind it (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Size(pub u64);

const UNITS: [(&str, u64); 3] = [("MB", 1 << 20), ("KB", 1 << 10), ("B", 1)];

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let units = UNITS.iter();
        let (number, unit) = units
            .filter_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))
            .next()
            .with_context(|| format!("'{text}' has no unit; there are B, KB and MB"))?;
        let number: u64 = number.parse().with_context(|| format!("'{text}'"))?;
        Ok(Self(number * unit))
    }
}

impl TryFrom<String> for Size {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit));
        let (name, unit) = whole.expect("one byte divides everything");
        write!(out, "{}{name}", self.0 / unit)
    }
}

/// How long a run lasts, in seconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Pace {
    /// Load that counts for nothing.
    pub warm_up: u32,
    /// Load that is measured.
    pub seconds: u32,
    /// What it may take besides.
    limit: u64,
}

impl Pace {
    /// The pace of one cell.
    pub fn of(self, cell: &Cell) -> Self {
        Self { seconds: cell.seconds.unwrap_or(self.seconds), ..self }
    }

    /// Any single step of a run that takes longer hangs.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit + u64::from(self.warm_up + self.seconds))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Entry {
    commands: Vec<String>,
    sizes: Vec<Size>,
    clients: Vec<u32>,
    pipeline: Vec<u32>,
    io_threads: Vec<u32>,
    places: Vec<Place>,
    /// Seconds of load that is measured, instead of the place's.
    seconds: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Memory {
    connections: Vec<u32>,
    places: Vec<Place>,
}

/// A few active connections among many idle ones.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crowd {
    /// All connections.
    pub connections: u32,
    /// Those that are active.
    pub active: u32,
    /// The server's `maxclients`: it watches no descriptor whose number is beyond that and
    /// some, and a connection takes more than the one.
    pub maxclients: u32,
    /// Where.
    place: Place,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bare {
    place: Place,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Smoke {
    seconds: u32,
    cells: Vec<String>,
    connections: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    place: BTreeMap<String, Pace>,
    cells: Vec<Entry>,
    memory: Memory,
    crowd: Vec<Crowd>,
    bare: Bare,
    smoke: Smoke,
}

/// What is to be measured at one place.
#[derive(Debug)]
pub struct Table {
    /// How long a run lasts.
    pub pace: Pace,
    /// The cells, in the file's order.
    pub cells: Vec<Cell>,
    /// Numbers of idle connections whose memory is measured.
    pub idle: Vec<u32>,
    /// The few among many, if they are measured.
    pub crowd: Option<Crowd>,
    /// Whether RDMA writes alone are measured.
    pub bare: bool,
}

/// Reads the part of the table that is for `place`; of a smoke test, the little that it takes.
pub fn read(text: &str, place: Place, smoke: bool) -> Result<Table> {
    let file: File = toml::from_str(text).context("reading the table of cells")?;
    let name = place.to_string();
    let mut pace = *file.place.get(&name).with_context(|| format!("no [place.{name}]"))?;
    let mut cells = Vec::new();
    for entry in &file.cells {
        if entry.places.contains(&place) {
            expand(entry, &mut cells)?;
        }
    }
    let mut seen = HashSet::new();
    if let Some(twice) = cells.iter().find(|cell| !seen.insert((*cell).clone())) {
        bail!("the table lists {twice} twice");
    }
    if smoke {
        let known: Vec<String> = cells.iter().map(Cell::to_string).collect();
        for cell in &file.smoke.cells {
            ensure!(known.contains(cell), "[smoke] names {cell}, which no entry lists");
        }
        cells.retain(|cell| file.smoke.cells.contains(&cell.to_string()));
        pace = Pace { warm_up: 0, seconds: file.smoke.seconds, ..pace };
    }
    let idle = match smoke {
        true => file.smoke.connections,
        false if file.memory.places.contains(&place) => file.memory.connections,
        false => Vec::new(),
    };
    let crowd = file.crowd.into_iter().find(|crowd| crowd.place == place && !smoke);
    let bare = file.bare.place == place && !smoke;
    Ok(Table { pace, cells, idle, crowd, bare })
}

fn expand(entry: &Entry, into: &mut Vec<Cell>) -> Result<()> {
    for &io_threads in &entry.io_threads {
        for &size in &entry.sizes {
            for &clients in &entry.clients {
                for &pipeline in &entry.pipeline {
                    for command in &entry.commands {
                        ensure!(
                            ["get", "set"].contains(&command.as_str()),
                            "there is no command '{command}', only get and set"
                        );
                        let command = command.clone();
                        let seconds = entry.seconds;
                        let cell = Cell { command, size, clients, pipeline, io_threads, seconds };
                        ensure!(
                            cell.under_way() * size.0 <= UNDER_WAY,
                            "{cell} has more than 1 GiB under way"
                        );
                        into.push(cell);
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = include_str!("../cells.toml");

    #[test]
    fn the_table_is_about_thirty_cells() {
        let soft = read(TEXT, Place::Soft, false).unwrap();
        let vm = read(TEXT, Place::Vm, false).unwrap();
        assert!((25..=40).contains(&soft.cells.len()), "{}", soft.cells.len());
        assert!((25..=40).contains(&vm.cells.len()), "{}", vm.cells.len());
        let smoke = read(TEXT, Place::Soft, true).unwrap();
        assert_eq!((smoke.cells.len(), smoke.idle.len(), smoke.pace.seconds), (2, 1, 2));
        let crowds = [&soft, &vm, &smoke].map(|table| table.crowd.is_some());
        assert_eq!(crowds, [true, false, false]);
        let many = read(TEXT, Place::SoftVm, false).unwrap();
        assert_eq!((many.cells.len(), many.idle.len(), many.bare), (0, 0, false));
        assert_eq!(many.crowd.map(|crowd| crowd.connections), Some(10_000));
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("64B", 64), ("1KB", 1024), ("10MB", 10 << 20)] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.0, bytes);
            assert_eq!(size.to_string(), text);
        }
        assert!("64".parse::<Size>().is_err());
        assert!("xKB".parse::<Size>().is_err());
    }

    #[test]
    fn a_cell_with_too_much_under_way_is_refused() {
        let more = TEXT.replace("clients = [1, 50, 500]", "clients = [1, 50, 500, 17000000]");
        let error = read(&more, Place::Soft, false).unwrap_err().to_string();
        assert!(error.contains("1 GiB"), "{error}");
    }

    #[test]
    fn a_cell_listed_twice_is_refused() {
        let twice = TEXT.replace("sizes = [\"1KB\"]", "sizes = [\"64B\"]");
        let error = read(&twice, Place::Soft, false).unwrap_err().to_string();
        assert!(error.contains("twice"), "{error}");
    }

    #[test]
    fn selectors_name_parts_of_a_cell() {
        let cells = read(TEXT, Place::Soft, false).unwrap().cells;
        let count = |selector: &str| cells.iter().filter(|cell| cell.is_selected(selector)).count();
        assert_eq!(count("64B/c1/set"), 1);
        assert_eq!(count("c50*/64B/io1/p1"), 4);
        assert_eq!(count("nothing"), 0);
    }
}
