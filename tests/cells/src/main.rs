// SPDX-License-Identifier: BSD-3-Clause
//! Runs the cells of the integration matrix: each a case on one stock server, one fabric and
//! one number of I/O threads.
//!
//! A cell that is listed and selected and does not pass is a failure, also if it could not
//! even start; the only way to skip one is to write down why, in the matrix.

mod bridge;
mod cases;
mod cell;
mod junit;
mod tools;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cells::{info, lab, matrix, process, report, server};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use cell::{Case, Cell};
use junit::Outcome;
use lab::{Given, Lab};
use matrix::{Expected, Fabric, Level, Selector};
use report::{Record, State};

/// Runs the cells of the integration matrix.
#[derive(Parser)]
struct Options {
    /// What carries the bytes: soft has to be run through scripts/softrdma.sh, vm inside
    /// scripts/guest.sh.
    #[arg(long, required_unless_present = "report")]
    fabric: Option<Fabric>,
    /// How much of the matrix, where no selector says which cells.
    #[arg(long, default_value = "full")]
    level: Level,
    /// The list of expected cells.
    #[arg(long, default_value = "tests/matrix.toml")]
    matrix: PathBuf,
    /// The module under test.
    #[arg(long)]
    module: Option<PathBuf>,
    /// The executable of a server: runs the cells of its line on it, and no others. The cells
    /// are named for its release.
    #[arg(long)]
    server: Option<PathBuf>,
    /// An address of the RDMA device, for hw.
    #[arg(long)]
    address: Option<IpAddr>,
    /// A file that remembers what has passed; cells in it are not run again with the same
    /// module.
    #[arg(long)]
    state: Option<PathBuf>,
    /// Writes what the state says of the whole matrix to this file, and runs nothing.
    #[arg(long, requires = "state")]
    report: Option<PathBuf>,
    /// Runs the chosen cells so many times over, or until one fails: for what fails rarely.
    #[arg(long, default_value_t = 1, conflicts_with = "state")]
    rounds: usize,
    /// How many cells run at a time, except for those that need the machine for themselves.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Writes what became of the cells to this file, as JUnit's XML.
    #[arg(long)]
    junit: Option<PathBuf>,
    /// Prints the chosen cells and runs none.
    #[arg(long)]
    list: bool,
    /// Which cells, of whatever level: CASE, or CASE/SERVER/FABRIC/IO-THREADS with any of them left out; `*` at
    /// the end of a part stands for any rest.
    selectors: Vec<Selector>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let text = std::fs::read_to_string(&options.matrix)
        .with_context(|| options.matrix.display().to_string())?;
    let names: Vec<&str> = cases::all().map(|case| case.name).collect();
    let matrix = matrix::read(&text, &names)?;
    let given = options.server.as_deref().map(Given::new).transpose()?;
    let cells = match &given {
        Some(given) => matrix.given(&given.release)?,
        None => matrix.cells.clone(),
    };
    let state = options.state.as_deref().map(State::open).transpose()?;
    if let (Some(path), Some(state)) = (&options.report, &state) {
        std::fs::write(path, state.report(&matrix)?)?;
        return Ok(true);
    }
    let fabric = options.fabric.expect("clap asks for it when there is no report to write");
    let chosen = matrix::select(cells, fabric, options.level, &options.selectors)?;
    if options.list {
        for cell in &chosen {
            println!("{}", cell.id);
        }
        return Ok(true);
    }
    ensure!(!chosen.is_empty(), "no cell of {fabric} is selected; --list shows what there is");

    let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let built = std::env::var_os("CARGO_TARGET_DIR").map_or(repo.join("target"), PathBuf::from);
    let module = options.module.clone().unwrap_or(built.join("release/libvalkey_rdma.so"));
    if let Some(given) = &given {
        println!("valkey-server {}: {}", given.release, given.build);
    }
    let lab = Lab::new(&repo, &module, fabric, options.address, given)?;

    let rounds = chosen.len() * options.rounds;
    let progress = ProgressBar::new(rounds as u64).with_style(ProgressStyle::with_template(
        "{pos}/{len} cells, {elapsed} so far, about {eta} to go: {msg}",
    )?);
    progress.enable_steady_tick(Duration::from_secs(1));
    let run = Run {
        lab: &lab,
        commit: report::commit(&repo)?,
        date: report::today()?,
        state: Mutex::new(state),
        totals: Mutex::default(),
        junit: Mutex::new(junit::Cells::new(fabric)),
        progress: &progress,
        until_failure: options.rounds > 1,
    };
    let (alone, together): (Vec<_>, Vec<_>) = chosen.iter().partition(|cell| cell.alone);
    // One round after the other: two runs of one cell would share its folder.
    for _ in 0..options.rounds {
        run.cells(&together, options.jobs)?;
        run.cells(&alone, 1)?;
    }
    progress.finish_and_clear();
    if let Some(path) = &options.junit {
        run.junit.into_inner().expect("no cell panicked").write(path)?;
    }
    let totals = run.totals.into_inner().expect("no cell panicked");
    if totals.failed == 0 {
        let _ = std::fs::remove_dir_all(&lab.scratch);
    }
    println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.skipped);
    Ok(totals.failed == 0)
}

/// What the cells of a run have in common.
struct Run<'a> {
    lab: &'a Lab,
    commit: String,
    date: String,
    state: Mutex<Option<State>>,
    totals: Mutex<Totals>,
    junit: Mutex<junit::Cells>,
    progress: &'a ProgressBar,
    until_failure: bool,
}

impl Run<'_> {
    /// Runs cells, `jobs` of them at a time: most wait for most of their time.
    fn cells(&self, cells: &[&Expected], jobs: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.until_failure && self.failed() {
                    break;
                }
                self.cell(cell)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            jobs.into_iter().try_for_each(|job| job.join().expect("no cell panics"))
        })
    }

    fn cell(&self, cell: &Expected) -> Result<()> {
        self.progress.set_message(cell.id.to_string());
        let earlier = {
            let state = self.state.lock().expect("no cell panicked");
            state.as_ref().and_then(|it| it.passed(&cell.id, &self.lab.module_sha256)).cloned()
        };
        let line = if let Some(why) = &cell.skip {
            self.count(cell, 0.0, &Outcome::Skipped(why));
            format!("skip  {}: {why}", cell.id)
        } else if let Some(record) = earlier {
            self.count(cell, record.seconds, &Outcome::Passed);
            format!("pass  {} (on {})", cell.id, record.date)
        } else {
            let ran = run_cell(self.lab, cell);
            let outcome = ran.failure.as_deref().map_or(Outcome::Passed, Outcome::Failed);
            self.count(cell, ran.seconds, &outcome);
            let line = ran.line(cell);
            if let Some(state) = &mut *self.state.lock().expect("no cell panicked") {
                match ran.failure {
                    None => state.add(&cell.id, self.record(cell, ran.seconds, ran.figures))?,
                    Some(_) => state.remove(&cell.id)?,
                }
            }
            line
        };
        self.progress.suspend(|| println!("{line}"));
        self.progress.inc(1);
        Ok(())
    }

    fn failed(&self) -> bool {
        self.totals.lock().expect("no cell panicked").failed > 0
    }

    fn count(&self, cell: &Expected, seconds: f64, outcome: &Outcome<'_>) {
        let mut totals = self.totals.lock().expect("no cell panicked");
        match outcome {
            Outcome::Passed => totals.passed += 1,
            Outcome::Failed(_) => totals.failed += 1,
            Outcome::Skipped(_) => totals.skipped += 1,
        }
        self.junit.lock().expect("no cell panicked").add(&cell.id, seconds, outcome);
    }

    fn record(&self, cell: &Expected, seconds: f64, figures: Vec<(String, String)>) -> Record {
        Record {
            commit: self.commit.clone(),
            module: self.lab.module_sha256.clone(),
            server: self.lab.describe(&cell.id.server),
            date: self.date.clone(),
            seconds,
            figures,
        }
    }
}

/// How the cells of a run ended.
#[derive(Default)]
struct Totals {
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// What a cell came to.
struct Ran {
    seconds: f64,
    figures: Vec<(String, String)>,
    /// Why it failed, from the outermost reason to the innermost, a line each.
    failure: Option<String>,
}

impl Ran {
    /// What is printed of it.
    fn line(&self, cell: &Expected) -> String {
        let word = if self.failure.is_some() { "FAIL" } else { "pass" };
        let mut text = format!("{word}  {} ({:.1} s)", cell.id, self.seconds);
        for (name, value) in &self.figures {
            text += &format!("\n        {name}: {value}");
        }
        if let Some(failure) = &self.failure {
            text += &format!("\n{failure}").replace('\n', "\n        ");
        }
        text
    }
}

fn run_cell(lab: &Lab, cell: &Expected) -> Ran {
    let case: &Case = cases::all()
        .find(|case| case.name == cell.id.case)
        .expect("the matrix was checked against the cases");
    let limit = cell.seconds.map_or(lab.cell_limit(), Duration::from_secs);
    let started = Instant::now();
    let (result, figures) = Cell::run(lab, cell.id.clone(), case, limit);
    let failure = result
        .err()
        .map(|error| error.chain().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
    Ran { seconds: started.elapsed().as_secs_f64(), figures, failure }
}
