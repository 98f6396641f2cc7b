// SPDX-License-Identifier: BSD-3-Clause
//! What a device tells by its asynchronous events: that it failed, or a completion queue of
//! its, or that something befell a connection or a port.

use anyhow::{Context, Result, ensure};
use client::{Client, rdma};

use super::basics::expect;
use super::devices::{Way, each};
use super::removal::IDLE;
use super::stalled::settle;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[Case::new("device-events", events).unstarted()];

/// Clients of which each is answered so often before it is over.
const CLIENTS: usize = 3;
const PINGS: usize = 40;

fn events(cell: &mut Cell) -> Result<()> {
    let ways: [(&str, Way); 4] = [
        ("cq-err@60", queue_fails),
        ("async-event=8@60", device_fails),
        ("async-event=3@60", queue_pair_fails),
        // Of a port, of the device's addresses, and one that means nothing.
        ("async-event=10@20 async-event=18@30 async-event=5@50", told),
    ];
    each(cell, &ways)
}

fn clients(cell: &Cell) -> Result<Vec<Client<rdma::Connection>>> {
    (0..CLIENTS).map(|_| cell.rdma()).collect()
}

/// Asks until the device's failure has ended the connections, all of them.
fn end(cell: &Cell, clients: &mut [Client<rdma::Connection>]) -> Result<()> {
    let lost = |client: &mut Client<rdma::Connection>| expect(client, "PING", "PONG").is_err();
    ensure!((0..PINGS).any(|_| clients.iter_mut().any(lost)), "no connection ends");
    cell.wait_info("the ends of all connections", |info| {
        Ok(info.number("rdma_ended_by_error")? == CLIENTS as u64)
    })?;
    Ok(())
}

/// A completion queue that is silent from then on: who is on it ends at once and not by a
/// probe, and nobody else comes to it.
fn queue_fails(cell: &mut Cell) -> Result<()> {
    end(cell, &mut clients(cell)?)?;
    let info = cell.info()?;
    ensure!(info.number("rdma_queues_lost")? == 1, "no queue is said to be lost");
    ensure!(info.number("rdma_devices_lost")? == 0, "the device is said to be lost");
    let words = format!("a completion queue of device softrdma0 failed: its {CLIENTS} connections");
    said(cell, &words)?;
    goes_on(cell)
}

fn device_fails(cell: &mut Cell) -> Result<()> {
    end(cell, &mut clients(cell)?)?;
    let info = cell.info()?;
    ensure!(info.number("rdma_devices_lost")? == 1, "the device is not said to be lost");
    said(cell, "device softrdma0 is lost: it failed, or was removed")?;
    goes_on(cell)
}

/// One connection ends, with the reason.
fn queue_pair_fails(cell: &mut Cell) -> Result<()> {
    let mut clients = clients(cell)?;
    let lost = |client: &mut Client<rdma::Connection>| expect(client, "PING", "PONG").is_err();
    let ended = (0..PINGS).find_map(|_| clients.iter_mut().position(lost)).context("none ends")?;
    clients.remove(ended);
    clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    let info = cell.info()?;
    ensure!(info.number("rdma_ended_by_error")? == 1, "not one connection has ended");
    ensure!(info.number("rdma_device_events")? == 1, "the event is not counted");
    said(cell, " lost: local access violation work queue error; device softrdma0")
}

/// What ends nobody is told and counted.
fn told(cell: &mut Cell) -> Result<()> {
    let mut clients = clients(cell)?;
    for _ in 0..PINGS {
        clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    }
    cell.wait_info("the events to be counted", |info| Ok(info.number("rdma_device_events")? == 3))?;
    said(cell, "device softrdma0: port error (port 1)")?;
    said(cell, "device softrdma0: GID table change")?;
    let drained = cell.server().log_lines("send queue drained")?;
    ensure!(drained.is_empty(), "what is nobody's concern is said: {drained:?}");
    Ok(())
}

/// Others are served, and the event loop is at rest.
fn goes_on(cell: &mut Cell) -> Result<()> {
    expect(&mut cell.rdma().context("a client after it")?, "PING", "PONG")?;
    settle(cell)?;
    cell.check_idle(IDLE, "after the event")
}

fn said(cell: &Cell, words: &str) -> Result<()> {
    let lines = cell.server().log_lines(words)?;
    ensure!(lines.len() == 1, "not one line '{words}': {lines:?}");
    Ok(())
}
