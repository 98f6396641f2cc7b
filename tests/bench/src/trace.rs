// SPDX-License-Identifier: BSD-3-Clause
//! System calls of the server for each request, counted by strace.
//!
//! A traced server is many times slower, so this is a run of its own, whose times are not
//! looked at. It serves a few requests, and then again those and more: the difference is what
//! the more of them took, without that for making and ending connections: it is waited for until
//! all have ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cells::lab::Lab;
use cells::process::Process;

use crate::contender::Contender;
use crate::load::Stage;
use crate::table::{Cell, Pace};

/// System calls for each request, by name.
pub type Calls = BTreeMap<String, f64>;

/// Counts the system calls of a cell whose untraced rate is known.
pub fn count(
    lab: &Lab,
    pace: &Pace,
    cell: &Cell,
    contender: Contender,
    rate: f64,
    folder: &Path,
) -> Result<Calls> {
    let mut stage = Stage::set(lab, pace, cell, contender, folder)?;
    let few = cell.under_way();
    // About a second's worth when traced; whole rounds of all connections.
    let rounds = (rate * 0.2 / few as f64).min(20_000.0 / few as f64).max(1.0);
    let more = few * rounds.ceil() as u64;
    let before = traced(&mut stage, few)?;
    let after = traced(&mut stage, few + more)?;
    stage.strike()?;
    Ok(after
        .into_iter()
        .map(|(name, count)| {
            let least = before.get(&name).copied().unwrap_or(0);
            (name, count.saturating_sub(least) as f64 / more as f64)
        })
        .filter(|(_, each)| *each > 0.0)
        .collect())
}

/// Serves so many requests under strace: system calls by name.
fn traced(stage: &mut Stage, requests: u64) -> Result<BTreeMap<String, u64>> {
    let table = stage.folder.join("strace");
    let pid = stage.server.pid();
    let mut command = Command::new("strace");
    command.args(["-f", "-c", "-U", "name,calls", "-p", &pid.to_string(), "-o"]).arg(&table);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(stage.folder.join("strace.errors"))?);
    let mut strace = Process::spawn(&mut command).context("strace (run scripts/setup.sh bench)")?;
    attached(pid, &mut strace, stage.folder)?;
    stage.load(&["-n", &requests.to_string()], |_, _| Ok(()))?;
    stage.wait_until_alone()?;
    // It lets go of the server and prints its table.
    strace.end(Duration::from_secs(20))?;
    let text = std::fs::read_to_string(&table)?;
    parse(&text).with_context(|| format!("strace said: {text}"))
}

/// Waits until each thread of the process `pid` is traced.
fn attached(pid: u32, strace: &mut Process, folder: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut all = true;
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = std::fs::read_to_string(thread?.path().join("status"))?;
            all &= !status.contains("TracerPid:\t0\n");
        }
        if all {
            return Ok(());
        }
        ensure!(
            strace.status()?.is_none() && Instant::now() < deadline,
            "strace could not attach to the server: {}",
            std::fs::read_to_string(folder.join("strace.errors"))?
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// strace's table: a heading, a rule, a line for each name, a rule, a total.
fn parse(text: &str) -> Result<BTreeMap<String, u64>> {
    let mut calls = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(count)) = (words.next(), words.next()) else { continue };
        if name != "total"
            && let Ok(count) = count.parse()
        {
            calls.insert(name.to_owned(), count);
        }
    }
    ensure!(!calls.is_empty(), "no system call was counted");
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_without_its_total() {
        let text = "syscall              calls\n---------------- ---------\nread   21\n\
                    epoll_wait  4\n---------------- ---------\ntotal  25\n";
        let calls = parse(text).unwrap();
        assert_eq!(calls.len(), 2);
        assert_eq!((calls["read"], calls["epoll_wait"]), (21, 4));
        assert!(parse("").is_err());
    }
}
