// SPDX-License-Identifier: BSD-3-Clause
//! Counters of what is rare: each is brought about, and has to have the number that it should.

use std::os::fd::RawFd;

use anyhow::{Context, Result, ensure};
use client::pattern;
use client::wire;

use super::basics::expect;
use super::hostile::{Target, features};
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::info::Info;

pub const CASES: &[Case] =
    &[Case::new("counters", counters).unstarted(), Case::new("refusals", refusals).unstarted()];

/// Starts the cell's server with more arguments, and a plan of faults.
fn start(cell: &mut Cell, arguments: &[&str], plan: &str) -> Result<()> {
    let usual = cell.settings.clone();
    let more = arguments.iter().map(|&argument| argument.to_owned());
    cell.settings.arguments.extend(more);
    cell.settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
    let started = cell.start();
    cell.settings = usual;
    started
}

/// That each of these has this number, and each other one that begins so has none.
fn check(info: &Info, kind: &str, wanted: &[(&str, u64)]) -> Result<()> {
    for (name, value) in info.all(&format!("rdma_{kind}_")) {
        let short = &name["rdma_".len()..];
        let number = wanted.iter().find(|(known, _)| *known == short).map_or(0, |it| it.1);
        ensure!(value == number.to_string(), "{name} is {value} and should be {number}");
    }
    for (name, number) in wanted {
        ensure!(info.number(&format!("rdma_{name}"))? == *number, "{name} is not {number}");
    }
    Ok(())
}

fn counters(cell: &mut Cell) -> Result<()> {
    violations(cell).context("violations")?;
    errors(cell).context("errors")?;
    waits(cell).context("I/O threads")?;
    stalls(cell).context("a full send queue")?;
    settings(cell).context("settings")
}

/// One violation of each kind.
fn violations(cell: &mut Cell) -> Result<()> {
    start(cell, &[], "")?;
    let target = Target::of(cell);
    for kind in ["message", "overrun", "announcement", "feature", "operation"] {
        let (mut raw, mut inbox) = target.join()?;
        match kind {
            "message" => raw.send(&[0; 31])?,
            "overrun" => {
                let count = inbox.left() + 1;
                inbox.claim(&mut raw, b"x", count)?;
            }
            "announcement" => raw.send(&raw.window().announcement())?,
            "feature" => raw.send(&features(1))?,
            _ => raw.send_with(&wire::bare(wire::KEEPALIVE), 0)?,
        }
        raw.wait_end(target.soon()).with_context(|| kind.to_owned())?;
    }
    settle(cell)?;
    let info = cell.info()?;
    let kinds = ["message", "overrun", "announcement", "feature", "operation"];
    let kinds = kinds.map(|kind| format!("violations_{kind}"));
    let wanted: Vec<_> = kinds.iter().map(|kind| (kind.as_str(), 1)).collect();
    check(&info, "violations", &wanted)?;
    check(&info, "ended_by", &[("ended_by_violation", 5)])?;
    check(&info, "refused", &[])?;
    ensure!(info.number("rdma_violations")? == 5, "the kinds do not add up");
    cell.stop()
}

/// Connections that can't go on until an I/O thread has done its job.
fn waits(cell: &mut Cell) -> Result<()> {
    start(cell, &[], "")?;
    let value = pattern::value(5, 4 << 20);
    let mut clients = (0..4).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    for client in &mut clients {
        client.request(&[b"SET", b"key", &value])?;
    }
    for client in &mut clients {
        ensure!(client.reply()?.text() == "OK", "SET");
    }
    let counts = |info: &Info| {
        Ok::<_, anyhow::Error>([info.number("rdma_parked")?, info.number("rdma_woken")?])
    };
    let [parked, woken] = counts(&cell.info()?)?;
    ensure!((parked > 0) == cell.has_io_threads(), "{parked} connections waited for a thread");
    // Where the job was all that there was to do, nobody has to be woken.
    ensure!((woken > 0) == (parked > 0) && woken <= parked, "{parked} waited, {woken} were woken");
    cell.figure("parked and woken", parked);
    cell.stop()
}

/// One work request that fails in each manner, by the status that the device gives it.
fn errors(cell: &mut Cell) -> Result<()> {
    for (status, kind) in [
        (4, "local"),
        (10, "remote_access"),
        (11, "remote"),
        (12, "transport"),
        (13, "receiver_not_ready"),
    ] {
        start(cell, &[], &format!("wc-error={status}@5"))?;
        let mut client = cell.rdma()?;
        for _ in 0..200 {
            if client.words("PING").is_err() {
                break;
            }
        }
        drop(client);
        settle(cell)?;
        let info = cell.info()?;
        check(&info, "errors", &[(&format!("errors_{kind}"), 1)])?;
        check(&info, "ended_by", &[("ended_by_error", 1)])?;
        ensure!(info.number("rdma_error_completions")? == 1, "another number of errors");
        cell.stop()?;
    }
    Ok(())
}

/// A write that finds the send queue full.
fn stalls(cell: &mut Cell) -> Result<()> {
    start(cell, &[], "sq-full@20")?;
    let mut client = cell.rdma()?;
    for _ in 0..40 {
        expect(&mut client, "PING", "PONG")?;
    }
    let info = cell.info()?;
    let (stalls, window) =
        (info.number("rdma_staging_stalls")?, info.number("rdma_window_stalls")?);
    ensure!((stalls, window) == (1, 0), "{stalls} stalls, {window} for want of a window");
    ensure!(info.number("rdma_posts_failed")? == 0, "a full queue is counted as a refusal");
    cell.stop()
}

/// What `busy-poll` and `completion-vector` are set to can be seen.
fn settings(cell: &mut Cell) -> Result<()> {
    let vectors = std::thread::available_parallelism()?.get() as u64;
    for (patience, vector) in [(0, 1), (1000, 5)] {
        let arguments = [format!("busy-poll={patience}"), format!("completion-vector={vector}")];
        start(cell, &arguments.each_ref().map(String::as_str), "")?;
        // One that waits for each reply, so that nothing comes faster than it is served.
        let mut client = cell.rdma()?;
        for _ in 0..500 {
            expect(&mut client, "PING", "PONG")?;
        }
        let info = cell.info()?;
        let polls = [info.number("rdma_busy_poll_hits")?, info.number("rdma_busy_poll_misses")?];
        // With I/O threads a round trip may well take longer than the longest patience.
        let may_poll = patience > 0;
        let must_poll = may_poll && !cell.has_io_threads();
        ensure!(may_poll || polls == [0, 0], "{polls:?} polls with busy-poll={patience}");
        ensure!(!must_poll || polls != [0, 0], "no polls with busy-poll={patience}");
        let device = info.text("rdma_device0")?;
        let wanted = format!("completion-vector={},", vector % vectors);
        ensure!(device.contains(&wanted), "not {wanted} but {device}");
        cell.figure(&format!("busy-poll={patience}"), format!("{polls:?} hits and misses"));
        cell.stop()?;
    }
    Ok(())
}

/// Clients that are refused for want of something: the reason is said and counted, and when it
/// is gone so is the refusal.
fn refusals(cell: &mut Cell) -> Result<()> {
    let served = |cell: &Cell| expect(&mut cell.rdma()?, "PING", "PONG");
    let refused = |cell: &Cell, kind: &str, words: &str| -> Result<()> {
        let info = cell.info()?;
        check(&info, "refused", &[(&format!("refused_{kind}"), 1)])?;
        ensure!(info.number("rdma_connections_refused")? == 1, "another number of refusals");
        let lines = cell.server().log_lines(words)?;
        ensure!(lines.len() == 1 && lines[0].contains(" refused: "), "{words}: {lines:?}");
        Ok(())
    };

    start(cell, &["max-registered-memory=1m"], "")?;
    // Each has 32 KiB.
    let mut clients = (0..32).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    ensure!(cell.rdma().is_err(), "a client beyond the limit on memory");
    refused(cell, "memory", "(max-registered-memory)")?;
    clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    drop(clients);
    settle(cell)?;
    served(cell)?;
    cell.stop()?;

    start(cell, &[], "post-recv=EIO@1")?;
    ensure!(cell.rdma().is_err(), "a client that the device does not serve");
    refused(cell, "device", "cannot post a receive")?;
    served(cell)?;
    cell.stop()?;

    // The handshake is all but done when descriptors run out. To its log file the server could
    // not say so: it opens it for each line.
    cell.settings.directive("logfile \"\"");
    start(cell, &[], "")?;
    served(cell)?;
    settle(cell)?;
    let target = Target::of(cell);
    let mut raw = target.open_with(&client::raw::Options::default())?;
    cell.wait_info("a handshake", |info| Ok(info.number("rdma_connections_handshaking")? == 1))?;
    // The observer's own connections are closed by then.
    cell.server().descriptors()?;
    let before = limit_descriptors(cell.server().pid(), None)?;
    raw.send(&raw.window().announcement())?;
    let ended = raw.wait_end(target.soon());
    limit_descriptors(cell.server().pid(), Some(before))?;
    ended?;
    settle(cell)?;
    refused(cell, "descriptors", "no descriptor left")?;
    served(cell)?;
    Ok(())
}

/// Lets a process open no descriptor more, or as many as it could. Returns what it could.
fn limit_descriptors(pid: u32, to: Option<libc::rlimit>) -> Result<libc::rlimit> {
    let mut before = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a place for the answer.
    let asked = unsafe {
        libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut before)
    };
    ensure!(asked == 0, "prlimit: {}", std::io::Error::last_os_error());
    // The lowest number that is free: nothing is given out from there on.
    let open = |fd: &RawFd| std::fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_ok();
    let free = (0..).find(|fd| !open(fd)).context("no number is free")?;
    let limit = to.unwrap_or(libc::rlimit { rlim_cur: free as u64, ..before });
    // SAFETY: a limit, and no place for an answer.
    let set =
        unsafe { libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) };
    ensure!(set == 0, "prlimit: {}", std::io::Error::last_os_error());
    Ok(before)
}
