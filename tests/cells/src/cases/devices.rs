// SPDX-License-Identifier: BSD-3-Clause
//! Devices that do something else than Soft-RoCE does: they give less inline data than was
//! asked for, say "try again" where others say "no room", return error numbers with a minus,
//! or refuse what the protocol needs. The software fabric does as they do.

use anyhow::{Context, Result, ensure};
use client::{Value, pattern};

use super::basics::expect;
use super::stalled::settle;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[Case::new("device-ways", ways).unstarted()];

/// What a server with such a device has to do.
pub(super) type Way = fn(&mut Cell) -> Result<()>;

fn ways(cell: &mut Cell) -> Result<()> {
    let ways: [(&str, Way); 8] = [
        ("inline=32", little_inline),
        ("post-send=-EAGAIN/23 post-recv=-EAGAIN/23", try_again),
        // Each client's first is the announcement and the second its first reply.
        ("post-send=-EINVAL@4", unable_once),
        ("post-send=-EIO@4", refusing),
        // Local QP operation error, of a device that is not Soft-RoCE.
        ("recv-error=2@4 vendor=713", failing_receive),
        ("max-pd=4 at-limit=EAGAIN", |cell| refused(cell, "rdma.max")),
        ("netlink=no", no_netlink),
        ("guid=0", |cell| refused(cell, "its node GUID is 0")),
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

/// A first reply that is refused says nothing of a device that has carried out others.
fn unable_once(cell: &mut Cell) -> Result<()> {
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    settle(cell)?;
    ended(cell, 0)?;
    told(cell, 1, "Invalid argument (os error 22); device ")?;
    ensure!(cell.info()?.number("rdma_devices_unfit")? == 0, "the device is called unfit");
    Ok(())
}

/// One that refuses something later.
fn refusing(cell: &mut Cell) -> Result<()> {
    ended(cell, 2)?;
    told(cell, 1, "Input/output error (os error 5); device ")?;
    let hints = cell.server().log_lines("immediate data")?;
    ensure!(hints.is_empty(), "what it can do is held against the device: {hints:?}");
    Ok(())
}

/// A receive that fails by our own device's doing is not the client's.
fn failing_receive(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    let reply = (0..4).try_for_each(|_| expect(&mut client, "PING", "PONG"));
    ensure!(reply.is_err(), "all receives complete");
    cell.wait_info("the end of the connection", |info| {
        Ok(info.number("rdma_ended_by_error")? == 1)
    })?;
    let info = cell.info()?;
    ensure!(info.number("rdma_violations")? == 0, "the client is blamed");
    ensure!(info.number("rdma_errors_local")? == 1, "the failure is not counted");
    let lines = cell.server().log_lines("lost: local QP operation error (Receive")?;
    ensure!(lines.len() == 1, "the connection's end is not explained: {lines:?}");
    expect(&mut cell.rdma()?, "PING", "PONG")
}

/// What the library can't learn is said, and nobody minds otherwise.
fn no_netlink(cell: &mut Cell) -> Result<()> {
    for _ in 0..3 {
        expect(&mut cell.rdma()?, "PING", "PONG")?;
    }
    let lines = cell.server().log_lines("RestrictAddressFamilies=AF_NETLINK")?;
    ensure!(lines.len() == 1, "not one line: {lines:?}");
    told(cell, 0, "")
}

/// Clients are refused, at once or after some, for a reason with `words`.
fn refused(cell: &mut Cell, words: &str) -> Result<()> {
    let clients: Vec<_> = (0..5).map(|_| cell.rdma()).collect();
    ensure!(clients.iter().any(Result::is_err), "all are served");
    expect(&mut cell.tcp()?, "PING", "PONG")?;
    let lines = cell.server().log_lines(" refused: ")?;
    ensure!(
        lines.len() == 1 && lines[0].contains(words),
        "the refusal is not explained by '{words}': {lines:?}"
    );
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
        Ok(info.number("rdma_posts_failed")? == count && ended == count)
    })?;
    let lines = cell.server().log_lines(" lost: ")?;
    ensure!(
        lines.len() as u64 == count && lines.iter().all(|line| line.contains(words)),
        "not {count} lines with '{words}': {lines:?}"
    );
    Ok(())
}
