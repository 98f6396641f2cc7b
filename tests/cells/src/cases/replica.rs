// SPDX-License-Identifier: BSD-3-Clause
//! Stock replicas that come to the server by way of its RDMA port, behind a bridge.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::basics::expect;
use crate::bridge::Bridge;
use crate::cell::{Case, Cell, no_crash};
use crate::lab::LOOPBACK;
use crate::server::{Server, free_port};

pub const CASES: &[Case] = &[Case::new("dual-channel", dual_channel).with(|settings| {
    settings.directive("repl-diskless-sync yes");
    settings.directive("repl-diskless-sync-delay 0");
    settings.directive("dual-channel-replication-enabled yes");
})];

/// What the log says of such a replica.
const SAID: &str = "a replica that comes by way of RDMA wants a second channel";

/// A replica that wants a second channel is synchronized by its first one, with one fork of the
/// server each time, and costs others nothing when that is over.
fn dual_channel(cell: &mut Cell) -> Result<()> {
    let bridge = Bridge::open(cell.server().rdma_address(), cell.options())?;
    let mut settings = cell.settings.clone();
    settings.module = None;
    settings.port = free_port()?;
    settings.directive(&format!("replicaof {LOOPBACK} {}", bridge.port()));
    // One that loads from a file keeps the file of an attempt that failed, and if it is back in
    // the same second it finds that in its way and gives up for five.
    settings.directive("repl-diskless-load swapdb");
    expect(&mut cell.rdma()?, "SET before 1", "OK")?;
    ensure!(filters(cell)? == 0, "a filter of commands before there is a replica");
    let folder = cell.folder().join("replica");
    let mut replica = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
    for round in 1..=3 {
        synchronized(cell, &replica, round)?;
        // The second begins with the filter in its place, the third without.
        if round == 2 {
            let deadline = Instant::now() + cell.lab.patience();
            while filters(cell)? > 0 {
                ensure!(Instant::now() < deadline, "the filter of commands stays");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        let mut tcp = cell.tcp()?;
        expect(&mut tcp, "DEBUG CHANGE-REPL-ID", "OK")?;
        expect(&mut tcp, "CLIENT KILL TYPE replica", "1")?;
    }
    let lines = cell.server().log_lines(SAID)?;
    ensure!(lines.len() == 1, "{} such lines within a minute", lines.len());
    cell.figure("the log", &lines[0]);
    let why = replica.log_lines("rdb-channel-over-rdma")?;
    ensure!(!why.is_empty(), "the replica's log does not say why");
    let status = replica.stop()?;
    no_crash(&replica)?;
    ensure!(status.success(), "the replica ended with {status}");
    cell.moved(100, 100);
    Ok(())
}

/// Filters of commands that the server goes through, which all commands pay for.
fn filters(cell: &Cell) -> Result<u64> {
    // Others are there too: 9.1 has its scripts in a module.
    let text = cell.tcp()?.words("INFO modules")?.text();
    let ours = text.lines().find(|line| line.contains("name=rdma,")).context("no such module")?;
    let found = ours.split(',').find_map(|part| part.strip_prefix("filters="));
    Ok(found.context("no number of filters")?.parse()?)
}

/// Waits until the replica was loaded so many times and follows, and no fork more was spent.
fn synchronized(cell: &mut Cell, replica: &Server, times: u64) -> Result<()> {
    let patience = cell.lab.patience();
    let deadline = Instant::now() + patience;
    let key = format!("round:{times}");
    expect(&mut cell.tcp()?, &format!("SET {key} {times}"), "OK")?;
    loop {
        let (server, info) = (cell.info()?, replica.info(patience)?);
        let (forks, link) = (server.number("total_forks")?, info.text("master_link_status")?);
        ensure!(forks <= times, "{forks} forks, and the replica's link to its primary is {link}");
        let full = server.number("sync_full")?;
        if full == times && link == "up" {
            break;
        }
        ensure!(Instant::now() < deadline, "{full} full synchronizations, and the link is {link}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut client = replica.tcp(patience)?;
    expect(&mut client, "GET before", "1")?;
    expect(&mut client, &format!("GET {key}"), &times.to_string())?;
    expect(&mut cell.rdma()?, &format!("SET after:{key} 1"), "OK")?;
    while client.words(&format!("GET after:{key}"))?.text() != "1" {
        ensure!(Instant::now() < deadline, "the replica does not follow");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
