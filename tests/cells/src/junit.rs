// SPDX-License-Identifier: BSD-3-Clause
//! What became of the cells of a run, as the XML that JUnit writes and CI systems read.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::matrix::{CellId, Fabric};

/// How a cell ended.
pub enum Outcome<'a> {
    /// It passed.
    Passed,
    /// It failed, with this text.
    Failed(&'a str),
    /// It was not run, for the reason that the matrix gives.
    Skipped(&'a str),
}

/// The cells of a run so far, one test suite.
pub struct Cells {
    suite: TestSuite,
}

impl Cells {
    /// None yet, of a run on `fabric`.
    pub fn new(fabric: Fabric) -> Self {
        Self { suite: TestSuite::new(format!("cells.{fabric}")) }
    }

    /// Adds a cell: its case is the class, its id the name.
    pub fn add(&mut self, id: &CellId, seconds: f64, outcome: &Outcome<'_>) {
        let status = match outcome {
            Outcome::Passed => TestCaseStatus::success(),
            Outcome::Failed(text) => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_description(*text);
                status
            }
            Outcome::Skipped(why) => {
                let mut status = TestCaseStatus::skipped();
                status.set_message(*why);
                status
            }
        };
        let mut cell = TestCase::new(id.to_string(), status);
        cell.set_classname(id.case.clone()).set_time(Duration::from_secs_f64(seconds));
        self.suite.add_test_case(cell);
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn write(self, path: &Path) -> Result<()> {
        let mut report = Report::new("valkey-rdma");
        report.add_test_suite(self.suite);
        let text = report.to_string().context("the cells as JUnit's XML")?;
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_is_told_apart() {
        let path = std::env::temp_dir().join(format!("cells-junit-{}.xml", std::process::id()));
        let mut cells = Cells::new(Fabric::Soft);
        let id = |server: &str| CellId {
            case: "commands".to_owned(),
            server: server.to_owned(),
            fabric: Fabric::Soft,
            device: None,
            io_threads: 1,
        };
        cells.add(&id("8.0"), 1.5, &Outcome::Passed);
        cells.add(&id("8.1"), 0.5, &Outcome::Failed("1 < 2 & \"no\""));
        cells.add(&id("9.1"), 0.0, &Outcome::Skipped("no server"));
        cells.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let report = Report::deserialize_from_str(&text).unwrap();
        let suite = &report.test_suites[0];
        assert_eq!((suite.tests, suite.failures), (3, 1), "{text}");
        assert!(matches!(suite.test_cases[0].status, TestCaseStatus::Success { .. }));
        assert!(matches!(suite.test_cases[2].status, TestCaseStatus::Skipped { .. }));
        assert!(text.contains("1 &lt; 2 &amp;"), "{text}");
    }
}
