// SPDX-License-Identifier: BSD-3-Clause
//! A client that asks for 10 MB and does not read: it costs the server nothing but the
//! memory of its reply, and others are served meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::{Client, Value, pattern, rdma};

use super::basics::expect;
use crate::cell::{Case, Cell};
use crate::tools::Load;

pub const CASES: &[Case] = &[
    Case::new("stalled-unpolled", unpolled),
    Case::new("stalled-unannounced", unannounced),
    Case::new("stalled-leaves", leaves),
    Case::new("stalled-memory", memory)
        .with(|settings| settings.arguments.push("linger-time=60000".to_owned())),
];

const LENGTH: usize = 10 << 20;

/// Puts the value there, and measures how often the idle server's event loop runs.
fn prepare(cell: &mut Cell) -> Result<(Vec<u8>, f64)> {
    let value = pattern::value(7, LENGTH);
    cell.tcp()?.command(&[b"SET", b"big", &value])?;
    let idle = cell.idle_rate()?;
    Ok((value, idle))
}

/// Waits until the server has sent what fits into the stalled client's window.
fn wait_full(cell: &Cell, window: u64) -> Result<()> {
    cell.wait_info("a full window", |info| Ok(info.number("rdma_bytes_sent")? >= window))?;
    // The last bytes are counted when they are posted; let what follows from them happen.
    std::thread::sleep(Duration::from_millis(300));
    Ok(())
}

/// The server idles, and serves others over RDMA and TCP.
fn others_are_served(cell: &mut Cell, idle: f64) -> Result<()> {
    cell.check_idle(idle, "with a stalled reader")?;
    expect(&mut cell.tcp()?, "PING", "PONG")?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    let load =
        Load { tests: vec!["set", "get"], requests: 500, clients: 5, size: 64, ..Load::default() };
    cell.benchmark(&load, cell.lab.patience())?;
    Ok(())
}

/// One that makes no calls at all for a while, then reads on.
fn unpolled(cell: &mut Cell) -> Result<()> {
    let (value, idle) = prepare(cell)?;
    let mut client = cell.rdma()?;
    client.request(&[b"GET", b"big"])?;
    wait_full(cell, 1 << 20)?;
    others_are_served(cell, idle)?;
    ensure!(client.reply()? == Value::Bulk(value), "another value after the stall");
    expect(&mut client, "PING", "PONG")?;
    cell.moved(0, LENGTH);
    Ok(())
}

/// One that polls and acknowledges, and does not announce its full window again.
fn unannounced(cell: &mut Cell) -> Result<()> {
    let (value, idle) = prepare(cell)?;
    let mut client = cell.rdma()?;
    stall(cell, &mut client, &[b"GET", b"big"])?;
    others_are_served(cell, idle)?;
    client.stream().hold(false)?;
    ensure!(client.reply()? == Value::Bulk(value), "another value after the stall");
    expect(&mut client, "PING", "PONG")?;
    cell.moved(0, LENGTH);
    Ok(())
}

/// Asks for something large and lets the window fill up.
pub(super) fn stall(
    cell: &Cell,
    client: &mut Client<rdma::Connection>,
    words: &[&[u8]],
) -> Result<()> {
    client.stream().hold(true)?;
    client.request(words)?;
    let window = client.stream().own_window().length as usize;
    let deadline = Instant::now() + cell.lab.patience();
    while client.stream().held_bytes() < window {
        let now = Instant::now();
        ensure!(now < deadline, "the window did not fill up");
        // Held bytes are never handed out: this ends by its own short time-out.
        let mut none = Vec::new();
        let until = now + Duration::from_millis(50);
        match client::resp::Stream::receive(client.stream(), &mut none, until) {
            Err(error) if error.is_timeout() => {}
            Err(error) => return Err(error.into()),
            Ok(()) => bail!("bytes out of a held window"),
        }
    }
    Ok(())
}

/// Ones that leave instead, each in its own way; nothing of them stays behind.
fn leaves(cell: &mut Cell) -> Result<()> {
    let (_, idle) = prepare(cell)?;
    // The first one makes the server set up what it keeps for good.
    drop(stalled_client(cell)?);
    settle(cell)?;
    let descriptors = cell.server().descriptors()?;
    let registered = cell.info()?.number("rdma_registered_bytes")?;
    for round in 0..10 {
        let client = stalled_client(cell)?;
        match round % 2 {
            0 => drop(client),
            _ => client.into_stream().disconnect(cell.lab.patience())?,
        }
    }
    let killed = stalled_client(cell)?;
    expect(&mut cell.tcp()?, "CLIENT KILL TYPE normal SKIPME yes", "1")?;
    settle(cell)?;
    drop(killed);
    let after = cell.info()?;
    let descriptors_after = cell.server().descriptors()?;
    ensure!(
        descriptors_after <= descriptors,
        "descriptors: {descriptors} before, {descriptors_after} after"
    );
    ensure!(
        after.number("rdma_registered_bytes")? <= registered,
        "registered bytes: {registered} before, {} after",
        after.number("rdma_registered_bytes")?
    );
    cell.moved(0, 11 << 20);
    cell.check_idle(idle, "after stalled readers left")
}

fn stalled_client(cell: &Cell) -> Result<Client<rdma::Connection>> {
    let mut client = cell.rdma()?;
    stall(cell, &mut client, &[b"GET", b"big"])?;
    Ok(client)
}

/// What the server had to keep for them counts against its `maxmemory`. It is given back when
/// they are closed, not when their connections have ended.
fn memory(cell: &mut Cell) -> Result<()> {
    const CLIENTS: u64 = 10;
    // A reply that the server has to copy: a stored value it may only refer to.
    let ask: [&[u8]; 3] = [b"EVAL", b"return string.rep('x', 3000000)", b"0"];
    let crowd = |cell: &Cell| -> Result<Vec<_>> {
        (0..CLIENTS)
            .map(|_| {
                let mut client = cell.rdma()?;
                stall(cell, &mut client, &ask)?;
                Ok(client)
            })
            .collect()
    };
    let used = |cell: &Cell| -> Result<u64> { cell.info()?.number("used_memory") };
    // The first ones make the server set up what it keeps for good.
    drop(crowd(cell)?);
    cell.wait_info("no clients", |info| Ok(info.number("rdma_connections_established")? == 0))?;
    cell.tcp()?.words("SCRIPT FLUSH SYNC")?;
    let before = used(cell)?;

    let killed = crowd(cell)?;
    let stalled = used(cell)?;
    ensure!(stalled > before + CLIENTS * (1 << 20), "{stalled} bytes, {before} before");
    let reply = cell.tcp()?.words("CLIENT KILL TYPE normal SKIPME yes")?.text();
    // A TCP client that has just left may be among them.
    let count: u64 = reply.parse().with_context(|| format!("CLIENT KILL: {reply}"))?;
    ensure!(count >= CLIENTS, "{count} of {CLIENTS} clients were killed");
    let given_back = |info: &crate::info::Info| -> Result<bool> {
        Ok(info.number("used_memory")? <= before + CLIENTS * (64 << 10))
    };
    let info = cell.wait_info("the memory of killed clients", given_back)?;
    let lingering = info.number("rdma_connections_lingering")?;
    ensure!(lingering == CLIENTS, "{lingering} of {CLIENTS} connections linger");
    let kept = info.number("used_memory")?.saturating_sub(before);
    cell.figure(
        "used memory",
        format!(
            "{} KiB more by stalled clients, {} KiB while their \
        connections linger",
            (stalled - before) >> 10,
            kept >> 10
        ),
    );
    drop(killed);

    drop(crowd(cell)?);
    cell.wait_info("the memory of clients that left", given_back)?;
    cell.moved(0, (CLIENTS << 20) as usize);
    Ok(())
}

/// Waits until the server has no RDMA connection left.
pub fn settle(cell: &Cell) -> Result<()> {
    cell.wait_info("no RDMA connections", |info| {
        Ok(info.sum(&[
            "rdma_connections_handshaking",
            "rdma_connections_established",
            "rdma_connections_lingering",
            "rdma_connections_ending",
        ])? == 0)
    })?;
    Ok(())
}
