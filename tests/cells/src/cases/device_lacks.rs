// SPDX-License-Identifier: BSD-3-Clause
//! Devices that lack what the protocol needs, or what it goes by. What can be done without is
//! done without and said once, and what can't is a refusal with the reason.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use client::Value;

use super::basics::expect;
use super::devices::{Way, each, told};
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("device-immediate", |cell| each(cell, &[("imm=none", no_immediate)])).unstarted(),
    Case::new("device-receives", receives).unstarted(),
    Case::new("device-probes", probes).unstarted(),
];

/// Devices on which a peer that finds no receive posted waits for long, or is cut off.
fn receives(cell: &mut Cell) -> Result<()> {
    let ways: [(&str, Way); 3] = [
        ("rnr=ignored", no_rnr_timer),
        ("rnr=refused", no_rnr_timer),
        ("transport=iwarp rnr=none", iwarp),
    ];
    each(cell, &ways)
}

/// Devices that can't do the keepalive probe, or not without a key.
fn probes(cell: &mut Cell) -> Result<()> {
    cell.settings.arguments.push("keepalive-interval=300".to_owned());
    each(cell, &[("zero-write=needs-key", probe_with_key), ("zero-write=fails", no_probe)])
}

/// Nobody can be served: the first client finds it out, the others are refused, and who
/// connects by TCP does not notice.
fn no_immediate(cell: &mut Cell) -> Result<()> {
    let mut first = cell.rdma()?;
    ensure!(first.words("PING").is_err(), "it is answered");
    cell.wait_info("the device to be found unfit", |info| {
        Ok(info.number("rdma_devices_unfit")? == 1)
    })?;
    for _ in 0..3 {
        ensure!(cell.rdma().is_err(), "a further client is accepted");
    }
    let info = cell.info()?;
    ensure!(info.number("rdma_refused_device")? == 3, "the refusals are not counted");
    ensure!(info.number("rdma_posts_failed")? == 1, "more than one write was tried");
    let words = "device softrdma0 can't serve clients: it refuses RDMA writes with immediate data";
    once(cell, words)?;
    once(
        cell,
        " refused: cannot serve clients on its device, which refuses RDMA writes with immediate data",
    )?;
    expect(&mut cell.tcp()?, "PING", "PONG")
}

/// What `RDMA.CLIENTS` says of each connection's receive slots, in the order of connecting.
fn receive_slots(cell: &Cell) -> Result<Vec<i64>> {
    let reply = cell.tcp()?.words("RDMA.CLIENTS")?;
    let slots = |entry: &Value| {
        let at = entry.elements().iter().position(|item| item.text() == "receive-slots");
        match at.and_then(|at| entry.elements().get(at + 1)) {
            Some(Value::Integer(slots)) => Ok(*slots),
            other => anyhow::bail!("receive-slots are {other:?} in {entry}"),
        }
    };
    reply.elements().iter().map(slots).collect()
}

/// A peer that is ahead would wait for 655 ms each time: later ones find more receives.
fn no_rnr_timer(cell: &mut Cell) -> Result<()> {
    let mut clients = Vec::new();
    for slots in [&[64][..], &[64, 1024], &[64, 1024, 1024]] {
        clients.push(cell.rdma()?);
        clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
        let mut found = receive_slots(cell)?;
        found.sort_unstable();
        ensure!(found == slots, "receive slots are {found:?} instead of {slots:?}");
    }
    once(cell, "device softrdma0 does not shorten the RNR timer")?;
    many_at_once(cell)
}

/// There is no RNR in iWARP, so that a peer which is ahead would be cut off.
fn iwarp(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    ensure!(receive_slots(cell)? == [1024], "receive slots are {:?}", receive_slots(cell)?);
    once(cell, "device softrdma0 is of iWARP, which has no RNR")?;
    many_at_once(cell)
}

/// As many connections as a device's first queue is not enough for, all of which are ahead.
fn many_at_once(cell: &mut Cell) -> Result<()> {
    const REQUESTS: usize = 700;
    let mut clients = (0..10).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    for client in &mut clients {
        (0..REQUESTS).try_for_each(|_| client.request(&[b"PING"]))?;
    }
    for client in &mut clients {
        for _ in 0..REQUESTS {
            ensure!(client.reply()?.text() == "PONG", "another reply");
        }
    }
    told(cell, 0, "")
}

/// Lives for some probes.
fn idle(cell: &Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    let probes = cell.info()?.number("rdma_keepalive_probes")?;
    cell.wait_info("probes", |info| Ok(info.number("rdma_keepalive_probes")? >= probes + 3))?;
    expect(&mut client, "PING", "PONG")
}

/// A probe goes to the peer's window, of which the key is known.
fn probe_with_key(cell: &mut Cell) -> Result<()> {
    idle(cell)?;
    let info = cell.info()?;
    ensure!(info.number("rdma_error_completions")? == 0, "a probe has failed");
    Ok(())
}

/// The first probe ends its connection. The others are not probed.
fn no_probe(cell: &mut Cell) -> Result<()> {
    let mut first = cell.rdma()?;
    expect(&mut first, "PING", "PONG")?;
    first.stream().wait_end(Instant::now() + cell.lab.patience())?;
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    let probes = cell.info()?.number("rdma_keepalive_probes")?;
    // Long enough for several.
    std::thread::sleep(Duration::from_millis(1500));
    expect(&mut client, "PING", "PONG")?;
    let info = cell.info()?;
    ensure!(info.number("rdma_keepalive_probes")? == probes, "it is probed");
    ensure!(info.number("rdma_ended_by_error")? == 1, "another connection is lost");
    once(cell, "device softrdma0 can't carry out RDMA writes of no bytes")?;
    // What is written last is delivered, though nothing says so.
    expect(&mut client, "QUIT", "OK")
}

fn once(cell: &Cell, words: &str) -> Result<()> {
    let lines = cell.server().log_lines(words)?;
    ensure!(lines.len() == 1, "not one line with '{words}': {lines:?}");
    Ok(())
}
