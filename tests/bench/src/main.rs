// SPDX-License-Identifier: BSD-3-Clause
//! The benchmark: this module beside upstream's in C, in the same server build, and beside
//! TCP, in turns.
//!
//! It asserts nothing about speed. A run that did not serve all that it was asked is a
//! failure: it is shown, counted, kept for the report, and does not stop the rest.

mod aims;
mod bare;
mod contender;
mod crowd;
mod idle;
mod load;
mod machine;
mod plot;
mod report;
mod results;
mod session;
mod stats;
mod table;
mod trace;
mod usage;
mod words;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cells::lab::Lab;
use clap::{Args, Parser};

use results::Results;
use session::Session;

/// Measures this module beside upstream's and TCP.
#[derive(Parser)]
enum Command {
    /// Measures, and keeps what came out.
    Run(Run),
    /// Writes a report on what was measured.
    Report(Report),
}

#[derive(Args)]
struct Run {
    /// Where this is: soft has to be run through scripts/softrdma.sh, vm inside
    /// scripts/guest.sh, soft-vm by both.
    #[arg(long)]
    place: table::Place,
    /// The file that keeps the results; what it holds of the same module is not measured
    /// again.
    #[arg(long)]
    results: PathBuf,
    /// How often everything is measured; six are the fewest for 95 % intervals.
    #[arg(long, default_value_t = 6)]
    turns: u32,
    /// The table of cells.
    #[arg(long, default_value = "tests/bench/cells.toml")]
    cells: PathBuf,
    /// The few short runs that show that everything works.
    #[arg(long)]
    smoke: bool,
    /// Prints what would be measured, and measures nothing.
    #[arg(long)]
    list: bool,
    /// Which cells: parts of their names, separated by `/`; `*` at the end of a part stands
    /// for any rest. `memory` is the memory of idle connections, `crowd` active connections
    /// among thousands of idle ones, `bare` what RDMA writes alone reach.
    selectors: Vec<String>,
}

#[derive(Args)]
struct Report {
    /// A file of results; one for each place.
    #[arg(long)]
    results: Vec<PathBuf>,
    /// The table of cells.
    #[arg(long, default_value = "tests/bench/cells.toml")]
    cells: PathBuf,
    /// Why cells fall behind, and goals are not reached.
    #[arg(long, default_value = "tests/bench/reasons.toml")]
    reasons: PathBuf,
    /// The report; its plots go into the folder of the same name without `.md`.
    into: PathBuf,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Run(options) => measure(&options),
        Command::Report(options) => write(&options).map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn measure(options: &Run) -> Result<bool> {
    let mut table = table::read(&text(&options.cells)?, options.place, options.smoke)?;
    if !options.selectors.is_empty() {
        let chosen = |cell: &table::Cell| {
            options.selectors.iter().any(|selector| cell.is_selected(selector))
        };
        table.cells.retain(chosen);
        let named = |what: &str| options.selectors.iter().any(|selector| selector == what);
        if !named("memory") {
            table.idle.clear();
        }
        table.crowd = table.crowd.filter(|_| named("crowd"));
        table.bare &= named("bare");
    }
    if options.list {
        table.cells.iter().for_each(|cell| println!("{cell}"));
        return Ok(true);
    }
    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let built = std::env::var_os("CARGO_TARGET_DIR").map_or(repo.join("target"), PathBuf::from);
    let module = built.join("release/libvalkey_rdma.so");
    let lab = Lab::new(&repo, &module, options.place.fabric(), None, None)?;
    let earlier = Results::read(&options.results)?;
    let same = earlier.filter(|results| results.module == lab.module_sha256);
    let results = match same {
        Some(results) => results,
        None => Results::none(&options.results, options.place, &lab, machine::Machine::here()?),
    };
    Session::new(&lab, &table, options.turns, results)?.run()
}

fn write(options: &Report) -> Result<()> {
    let mut places = Vec::new();
    for path in &options.results {
        if let Some(results) = Results::read(path)? {
            places.push(results);
        }
    }
    let reasons = toml::from_str(&text(&options.reasons)?)
        .with_context(|| options.reasons.display().to_string())?;
    report::write(&options.into, &places, &text(&options.cells)?, &reasons)
}
