// SPDX-License-Identifier: BSD-3-Clause
//! What a server does to a connection by blocking it, which works, or from a forked child,
//! which can't.

use std::time::Duration;

use anyhow::{Result, ensure};
use client::rdma::Connection;
use client::{Client, pattern};

use super::basics::{expect, expect_end};
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("debugger", debugger),
    Case::new("child-debugger", child_debugger),
    Case::new("child-replica", child_replica).with(|settings| {
        settings.directive("repl-diskless-sync yes");
        settings.directive("repl-diskless-sync-delay 0");
        settings.directive("dual-channel-replication-enabled yes");
    }),
];

/// Reads replies until one of them says `words`, and returns all that they said.
fn until(client: &mut Client<Connection>, words: &str) -> Result<String> {
    let mut said = String::new();
    for _ in 0..10 {
        said += &client.reply()?.text();
        if said.contains(words) {
            return Ok(said);
        }
    }
    anyhow::bail!("ten replies, and none says '{words}': {said}")
}

/// A script step by step, in the server itself.
fn debugger(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    expect(&mut client, "SCRIPT DEBUG SYNC", "OK")?;
    let script = "local a = redis.call('incrby', 'n', 40)\nlocal b = a + 2\nreturn b";
    client.request(&[b"EVAL", script.as_bytes(), b"0"])?;
    until(&mut client, "Stopped at 1")?;
    client.request(&[b"step"])?;
    until(&mut client, "Stopped at 2")?;
    // Somebody who takes his time, and asks for more than comes in one piece.
    std::thread::sleep(Duration::from_millis(700));
    let text = String::from_utf8_lossy(&pattern::value(1, 1000))
        .replace(|c: char| !c.is_ascii_alphanumeric(), "x");
    client.request(&[b"eval", format!("return '{text}'").as_bytes()])?;
    until(&mut client, &text[..100])?;
    client.request(&[b"print", b"a"])?;
    until(&mut client, "40")?;
    client.request(&[b"continue"])?;
    until(&mut client, "endsession")?;
    until(&mut client, "42")?;
    expect(&mut cell.rdma()?, "GET n", "40")?;
    cell.moved(1000, 500);
    Ok(())
}

/// What the log says of a child that wanted to write.
const SAID: &str = "a child of the server wanted to write to an RDMA connection";

/// The debugger in a child: the connection ends, the server goes on, and the log says that
/// RDMA is the reason.
fn child_debugger(cell: &mut Cell) -> Result<()> {
    // The clock that looks for a child's note runs while there are connections.
    let mut other = cell.rdma()?;
    let mut client = cell.rdma()?;
    expect(&mut client, "SCRIPT DEBUG YES", "OK")?;
    client.request(&[b"EVAL", b"return 1", b"0"])?;
    expect_end(&mut client)?;
    let line = cell.server().wait_log(SAID, cell.lab.patience())?;
    cell.figure("the log", line);
    expect(&mut other, "PING", "PONG")?;

    let lines = cell.server().log()?.matches(SAID).count();
    ensure!(lines == 1, "{lines} such lines within a minute");
    cell.moved(14, 7);
    Ok(())
}

/// A replica's second channel, over which a child sends the data: the same.
fn child_replica(cell: &mut Cell) -> Result<()> {
    let mut other = cell.rdma()?;
    let mut replica = cell.rdma()?;
    expect(&mut replica, "REPLCONF capa eof rdb-only 1 rdb-channel 1", "OK")?;
    replica.request(&[b"SYNC"])?;
    let line = cell.server().wait_log(SAID, cell.lab.patience())?;
    cell.figure("the log", line);
    expect(&mut other, "PING", "PONG")?;
    cell.moved(14, 7);
    Ok(())
}
