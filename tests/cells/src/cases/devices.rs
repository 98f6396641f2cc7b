// SPDX-License-Identifier: BSD-3-Clause
//! Devices that do something else than Soft-RoCE does: they give less inline data than was
//! asked for, say "try again" where others say "no room", return error numbers with a minus,
//! or refuse what the protocol needs. The software fabric does as they do.

use anyhow::{Context, Result, ensure};
use client::{Value, pattern};

use super::basics::expect;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[Case::new("device-ways", ways).unstarted()];

/// What a server with such a device has to do.
pub(super) type Way = fn(&mut Cell) -> Result<()>;

fn ways(cell: &mut Cell) -> Result<()> {
    let ways: [(&str, Way); 4] = [
        ("inline=32", little_inline),
        ("post-send=-EAGAIN/23 post-recv=-EAGAIN/23", try_again),
        // The first is the announcement, the second the first reply.
        ("post-send=-EINVAL@2", unable),
        ("post-send=-EIO@4", refusing),
    ];
    each(cell, &ways)
}

/// Each story with a server of its own, on a device with those faults.
pub(super) fn each(cell: &mut Cell, ways: &[(&str, Way)]) -> Result<()> {
    for (faults, way) in ways {
        cell.settings.environment = vec![("SOFTRDMA_FAULTS".to_owned(), (*faults).to_owned())];
        cell.start()?;
        way(cell).with_context(|| format!("where '{faults}'"))?;
        cell.stop()?;
    }
    Ok(())
}

/// Replies of all lengths about what fits, asked for and given.
fn little_inline(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    for length in (0..120).step_by(5) {
        let value = pattern::value(length, length as usize);
        client.command(&[b"SET", b"key", &value])?;
        let read = client
            .command(&[b"GET", b"key"])
            .with_context(|| format!("a reply with {length} bytes"))?;
        ensure!(read == Value::Bulk(value), "{length} bytes came back changed");
    }
    Ok(())
}

/// What there is no room for is posted later, and no connection ends.
fn try_again(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    for turn in 0..4 {
        let value = pattern::value(turn, 500_000);
        client.command(&[b"SET", b"key", &value])?;
        let read = client.command(&[b"GET", b"key"])?;
        ensure!(read == Value::Bulk(value), "another value");
    }
    told(cell, 0, "")
}

/// A device that can't do what the protocol needs: the first reply already is refused.
fn unable(cell: &mut Cell) -> Result<()> {
    ended(cell, 0)?;
    told(cell, 1, "RDMA writes with immediate data")
}

/// One that refuses something later.
fn refusing(cell: &mut Cell) -> Result<()> {
    ended(cell, 2)?;
    told(cell, 1, "Input/output error (os error 5); device ")?;
    let hints = cell.server().log_lines("immediate data")?;
    ensure!(hints.is_empty(), "what it can do is held against the device: {hints:?}");
    Ok(())
}

/// A client is answered so many times, and then its connection ends.
fn ended(cell: &Cell, answers: usize) -> Result<()> {
    let mut client = cell.rdma()?;
    for _ in 0..answers {
        expect(&mut client, "PING", "PONG")?;
    }
    let reply = client.words("PING");
    ensure!(reply.is_err(), "it is answered still: {reply:?}");
    expect(&mut cell.rdma()?, "PING", "PONG")
}

/// The refusals are counted, and the log has a line with `words` about each.
pub(super) fn told(cell: &Cell, count: u64, words: &str) -> Result<()> {
    cell.wait_info("the refusals to be counted", |info| {
        let ended = info.number("rdma_ended_by_error")?;
        Ok(info.number("rdma_posts_refused")? == count && ended == count)
    })?;
    let lines = cell.server().log_lines(" lost: ")?;
    ensure!(
        lines.len() as u64 == count && lines.iter().all(|line| line.contains(words)),
        "not {count} lines with '{words}': {lines:?}"
    );
    Ok(())
}
