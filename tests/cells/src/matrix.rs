// SPDX-License-Identifier: BSD-3-Clause
//! The list of expected cells, as `tests/matrix.toml` writes it down.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// How much of the matrix a run covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// What every change has to pass.
    Quick,
    /// Everything.
    Full,
}

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fabric {
    /// The software fabric of `tests/softrdma`, natively.
    Soft,
    /// Soft-RoCE in a virtual machine.
    Vm,
    /// The same with a newer kernel, whose devices can be removed while they are in use.
    VmNew,
    /// An RDMA device of this machine; it runs the cells of `vm`.
    Hw,
}

impl fmt::Display for Fabric {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Soft => "soft",
            Self::Vm => "vm",
            Self::VmNew => "vm-new",
            Self::Hw => "hw",
        })
    }
}

/// One entry of the file: a case on every combination of what it lists.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Entry {
    case: Vec<String>,
    servers: Vec<String>,
    fabrics: Vec<Fabric>,
    /// Profiles of devices, of the software fabric. Without them it is itself.
    #[serde(default)]
    devices: Vec<String>,
    io_threads: Vec<u32>,
    level: Level,
    /// Why these cells are expected not to run.
    skip: Option<String>,
    /// How long one of these cells may take, instead of the fabric's own bound.
    seconds: Option<u64>,
    /// Whether each of these cells needs the machine for itself.
    #[serde(default)]
    alone: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Lines that no stock server is fetched for, each with the one whose cells are its own.
    #[serde(default)]
    like: HashMap<String, String>,
    cell: Vec<Entry>,
}

/// The whole file, read.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Every cell on the stock servers.
    pub cells: Vec<Expected>,
    like: HashMap<String, String>,
}

/// What tells one cell from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CellId {
    /// The test.
    pub case: String,
    /// The stock server, named for its release line or its release, or the release of a server
    /// that was given.
    pub server: String,
    /// What carries the bytes.
    pub fabric: Fabric,
    /// The device that the server's fabric behaves as, if not as itself.
    pub device: Option<String>,
    /// The server's `io-threads`.
    pub io_threads: u32,
}

impl CellId {
    /// The minor line of the server: `8.1` of `8.1`, `8.1-embedded` and `8.1.7`.
    pub fn line(&self) -> &str {
        line(&self.server)
    }

    /// The fabric, and the device if it behaves as one: `soft` or `soft+mlx5`.
    fn carrier(&self) -> String {
        match &self.device {
            Some(device) => format!("{}+{device}", self.fabric),
            None => self.fabric.to_string(),
        }
    }
}

/// The minor line of a server's name.
pub fn line(server: &str) -> &str {
    let end = server.match_indices(['.', '-']).nth(1);
    end.map_or(server, |(at, _)| &server[..at])
}

impl fmt::Display for CellId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, server, io_threads, .. } = self;
        write!(out, "{case}/{server}/{}/{io_threads}", self.carrier())
    }
}

/// One expected cell.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Which one.
    pub id: CellId,
    /// The least level that includes it.
    pub level: Level,
    /// Why it is skipped, if it is.
    pub skip: Option<String>,
    /// Its own bound in seconds.
    pub seconds: Option<u64>,
    /// Whether no other cell may run beside it.
    pub alone: bool,
}

/// A choice of cells: parts separated by `/`, each of which has to be one of the cell's own
/// (case, server line, fabric, io-threads). A part may end in `*`: `soft+*` is the software
/// fabric as any device. It chooses from all levels.
#[derive(Clone, Debug)]
pub struct Selector(Vec<String>);

impl FromStr for Selector {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<String> = text.split('/').map(str::to_owned).collect();
        ensure!(
            parts.iter().all(|part| !part.is_empty()),
            "a selector is CASE, or CASE/SERVER/FABRIC/IO-THREADS with any of them left out"
        );
        Ok(Self(parts))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0.join("/"))
    }
}

impl Selector {
    fn matches(&self, id: &CellId) -> bool {
        let own = [id.case.clone(), id.server.clone(), id.carrier(), id.io_threads.to_string()];
        self.0.iter().all(|part| {
            own.iter().any(|own| match part.strip_suffix('*') {
                Some(start) => own.starts_with(start),
                None => own == part,
            })
        })
    }
}

/// Reads the matrix and checks that it lists every case of `known`, none that does not exist,
/// and no cell twice.
pub fn read(text: &str, known: &[&str]) -> Result<Matrix> {
    let file: File = toml::from_str(text).context("reading the matrix")?;
    let mut cells = Vec::new();
    let mut seen = HashSet::new();
    for entry in file.cell {
        ensure!(
            entry.devices.is_empty() || entry.fabrics == [Fabric::Soft],
            "only the software fabric behaves as one device or another"
        );
        let as_itself = entry.devices.is_empty().then_some(None);
        let devices: Vec<Option<String>> =
            as_itself.into_iter().chain(entry.devices.into_iter().map(Some)).collect();
        for case in &entry.case {
            ensure!(known.contains(&case.as_str()), "the matrix lists an unknown case '{case}'");
            for server in &entry.servers {
                let carriers = entry
                    .fabrics
                    .iter()
                    .flat_map(|&fabric| devices.iter().map(move |device| (fabric, device.clone())));
                for (fabric, device) in carriers {
                    for &io_threads in &entry.io_threads {
                        let id = CellId {
                            case: case.clone(),
                            server: server.clone(),
                            fabric,
                            device: device.clone(),
                            io_threads,
                        };
                        ensure!(seen.insert(id.clone()), "the matrix lists {id} twice");
                        cells.push(Expected {
                            id,
                            level: entry.level,
                            skip: entry.skip.clone(),
                            seconds: entry.seconds,
                            alone: entry.alone,
                        });
                    }
                }
            }
        }
    }
    for case in known {
        if !cells.iter().any(|cell| cell.id.case == *case) {
            bail!("the matrix does not list case '{case}'");
        }
    }
    Ok(Matrix { cells, like: file.like })
}

impl Matrix {
    /// The cells on a server that was given, of this release: those of its line.
    ///
    /// # Errors
    /// If no cell is meant for that line.
    pub fn given(&self, release: &str) -> Result<Vec<Expected>> {
        let own = line(release);
        let own = self.like.get(own).map_or(own, String::as_str);
        let cells = self.cells.iter().filter(|cell| cell.id.server == own).cloned();
        let cells = cells.map(|mut cell| {
            release.clone_into(&mut cell.id.server);
            cell
        });
        let cells: Vec<_> = cells.collect();
        ensure!(!cells.is_empty(), "the matrix has no cell for a server {release}");
        Ok(cells)
    }
}

/// The cells of one run, in the matrix's order: those of the level, or those that a selector
/// names. A selector that names none on any fabric is an error, which says what there is.
pub fn select(
    mut cells: Vec<Expected>,
    fabric: Fabric,
    level: Level,
    selectors: &[Selector],
) -> Result<Vec<Expected>> {
    // A device of this machine runs the cells of the virtual one.
    let hw = cells.iter().filter(|cell| cell.id.fabric == Fabric::Vm).cloned().map(|mut cell| {
        cell.id.fabric = Fabric::Hw;
        cell
    });
    let hw: Vec<_> = hw.collect();
    cells.extend(hw);
    for selector in selectors {
        ensure!(
            cells.iter().any(|cell| selector.matches(&cell.id)),
            "'{selector}' selects no cell. There are\n{}",
            parts(&cells)
        );
    }
    cells.retain(|cell| {
        cell.id.fabric == fabric
            && match selectors {
                [] => cell.level <= level,
                _ => selectors.iter().any(|selector| selector.matches(&cell.id)),
            }
    });
    Ok(cells)
}

/// What a selector's parts can be, though not in every combination.
fn parts(cells: &[Expected]) -> String {
    let all = |part: fn(&CellId) -> String| -> String {
        let parts: BTreeSet<String> = cells.iter().map(|cell| part(&cell.id)).collect();
        parts.into_iter().collect::<Vec<_>>().join(" ")
    };
    format!(
        "cases: {}\nservers: {}\nfabrics: {}\nio-threads: {}\nbut not each with each: \
         --list shows the cells",
        all(|id| id.case.clone()),
        all(|id| id.server.clone()),
        all(CellId::carrier),
        all(|id| id.io_threads.to_string())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        [like]
        "9.0" = "9.1"

        [[cell]]
        case = ["a", "b"]
        servers = ["8.0", "9.1"]
        fabrics = ["soft", "vm"]
        io-threads = [1, 4]
        level = "quick"

        [[cell]]
        case = ["b"]
        servers = ["8.1"]
        fabrics = ["vm"]
        io-threads = [8]
        level = "full"
        skip = "not yet"

        [[cell]]
        case = ["b"]
        servers = ["9.1"]
        fabrics = ["soft"]
        devices = ["mlx4", "mlx5"]
        io-threads = [4]
        level = "full"
    "#;

    fn tried(fabric: Fabric, level: Level, selectors: &[&str]) -> Result<Vec<String>> {
        let selectors: Vec<Selector> = selectors.iter().map(|s| s.parse().unwrap()).collect();
        let chosen = select(read(TEXT, &["a", "b"])?.cells, fabric, level, &selectors)?;
        Ok(chosen.iter().map(|cell| cell.id.to_string()).collect())
    }

    fn chosen(fabric: Fabric, level: Level, selectors: &[&str]) -> Vec<String> {
        tried(fabric, level, selectors).unwrap()
    }

    #[test]
    fn entries_expand_to_every_combination() {
        assert_eq!(read(TEXT, &["a", "b"]).unwrap().cells.len(), 19);
        assert_eq!(chosen(Fabric::Soft, Level::Full, &[]).len(), 10);
        assert_eq!(chosen(Fabric::Vm, Level::Quick, &[]).len(), 8);
        assert_eq!(chosen(Fabric::Vm, Level::Full, &[]).len(), 9);
    }

    #[test]
    fn a_given_server_has_the_cells_of_its_line() {
        let matrix = read(TEXT, &["a", "b"]).unwrap();
        for (release, count) in [("8.0.7", 8), ("8.1.9", 1), ("9.0.4", 10), ("9.1.0", 10)] {
            let cells = matrix.given(release).unwrap();
            assert_eq!(cells.len(), count, "{release}");
            assert!(cells.iter().all(|cell| cell.id.server == release));
        }
        assert!(matrix.given("9.2.0").is_err());
    }

    #[test]
    fn a_server_is_of_a_line() {
        for (server, own) in
            [("8.0", "8.0"), ("8.1-embedded", "8.1"), ("9.1.0-lite", "9.1"), ("9.0.4", "9.0")]
        {
            assert_eq!(line(server), own);
        }
    }

    #[test]
    fn selectors_name_parts_of_a_cell() {
        assert_eq!(chosen(Fabric::Hw, Level::Quick, &["a/8.0"]), ["a/8.0/hw/1", "a/8.0/hw/4"]);
        assert_eq!(chosen(Fabric::Vm, Level::Full, &["8", "a/9*/4"]), ["a/9.1/vm/4", "b/8.1/vm/8"]);
    }

    #[test]
    fn the_software_fabric_is_itself_or_a_device() {
        let soft = |selector| chosen(Fabric::Soft, Level::Full, &[selector]);
        assert_eq!(soft("b/9.1/soft/4"), ["b/9.1/soft/4"]);
        assert_eq!(soft("b/9.1/soft+mlx5/4"), ["b/9.1/soft+mlx5/4"]);
        assert_eq!(soft("soft+*"), ["b/9.1/soft+mlx4/4", "b/9.1/soft+mlx5/4"]);
        let elsewhere = TEXT.replace("[\"soft\"]", "[\"vm\"]");
        assert!(read(&elsewhere, &["a", "b"]).is_err());
    }

    #[test]
    fn a_selector_chooses_from_all_levels() {
        assert_eq!(chosen(Fabric::Vm, Level::Quick, &["b/8.1"]), ["b/8.1/vm/8"]);
    }

    #[test]
    fn a_selector_that_names_nothing_is_an_error_that_says_what_there_is() {
        // Of another fabric than this run's, there may be some in the next.
        assert!(chosen(Fabric::Soft, Level::Full, &["a/vm", "b/8.1", "a/hw"]).is_empty());
        for wrong in ["c", "a/8.1", "a/8.0/vm/2", "a/8.0/9.1"] {
            let error = tried(Fabric::Vm, Level::Full, &["a", wrong]).unwrap_err().to_string();
            for part in [wrong, "cases: a b", "servers: 8.0 8.1 9.1", "io-threads: 1 4 8"] {
                assert!(error.contains(part), "no '{part}' in {error}");
            }
        }
    }

    #[test]
    fn a_case_in_only_one_of_matrix_and_code_is_an_error() {
        assert!(read(TEXT, &["a"]).is_err());
        assert!(read(TEXT, &["a", "b", "c"]).is_err());
    }

    #[test]
    fn a_cell_listed_twice_is_an_error() {
        let twice = TEXT.replace("\"8.1\"", "\"8.0\"").replace("[8]", "[4]");
        assert!(read(&twice, &["a", "b"]).is_err());
    }
}
