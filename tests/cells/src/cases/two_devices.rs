// SPDX-License-Identifier: BSD-3-Clause
//! A device that can't serve, or can do less, beside one that serves: it is named, left alone,
//! and hurts nobody, whether it is there at load or comes later. The software fabric has two.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use client::{Client, rdma};

use super::basics::expect;
use super::devices::Way;
use super::stalled::settle;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[Case::new("unfit-beside", unfit_beside).unstarted()];

/// The second device's address.
const SECOND: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
/// Clients of the good device.
const CLIENTS: usize = 5;

fn unfit_beside(cell: &mut Cell) -> Result<()> {
    cell.settings.arguments.push("keepalive-interval=300".to_owned());
    let arguments = cell.settings.arguments.clone();
    for appears in ["", " appears=1000"] {
        let ways: [(&str, Way); 2] = [("imm=none", no_immediate), ("zero-write=fails", no_probes)];
        for (habit, way) in ways {
            // What is not there yet can't be bound to; the wildcard takes it in when it comes.
            cell.settings.arguments = arguments.clone();
            if appears.is_empty() {
                cell.settings.arguments.push(format!("bind={SECOND}"));
            } else {
                cell.settings.arguments.retain(|argument| !argument.starts_with("bind="));
                cell.settings.arguments.push("bind=*".to_owned());
            }
            let second = format!("{SECOND} {habit}{appears}");
            cell.settings.environment = vec![("SOFTRDMA_SECOND".to_owned(), second)];
            cell.start()?;
            way(cell)?;
            settle(cell)?;
            cell.stop()?;
        }
    }
    Ok(())
}

/// A client of the second device.
fn second(cell: &Cell) -> Result<Client<rdma::Connection>> {
    let server = SocketAddr::new(SECOND, cell.server().rdma_address().port());
    // A request that comes before the device is lost.
    let options = rdma::Options { timeout: Duration::from_secs(1), ..cell.options() };
    Ok(rdma::Connection::client(server, &options, cell.lab.patience())?)
}

/// The same, when there is such a device.
fn awaited(cell: &Cell) -> Result<Client<rdma::Connection>> {
    let deadline = Instant::now() + cell.lab.patience();
    loop {
        match second(cell) {
            Err(_) if Instant::now() < deadline => {}
            other => return other,
        }
    }
}

/// Clients of the good device, which have to live all the while.
struct Good(Vec<Client<rdma::Connection>>);

impl Good {
    fn connect(cell: &Cell) -> Result<Self> {
        let mut good = Self((0..CLIENTS).map(|_| cell.rdma()).collect::<Result<_>>()?);
        good.live()?;
        Ok(good)
    }

    fn live(&mut self) -> Result<()> {
        self.0.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))
    }
}

fn once(cell: &Cell, words: &str) -> Result<()> {
    let lines = cell.server().log_lines(words)?;
    ensure!(lines.len() == 1, "not one line with '{words}': {lines:?}");
    Ok(())
}

/// Its first client finds out that it can serve nobody.
fn no_immediate(cell: &mut Cell) -> Result<()> {
    let mut good = Good::connect(cell)?;
    let reply = awaited(cell).and_then(|mut client| Ok(client.words("PING")?));
    ensure!(reply.is_err(), "it is answered: {reply:?}");
    cell.wait_info("the device to be found unfit", |info| {
        Ok(info.number("rdma_devices_unfit")? == 1)
    })?;
    for _ in 0..3 {
        ensure!(second(cell).is_err(), "a further client is accepted");
        good.live()?;
    }
    ensure!(cell.info()?.number("rdma_refused_device")? == 3, "the refusals are not counted");
    once(cell, "device softrdma1 can't serve clients: it refuses RDMA writes with immediate data")?;
    once(cell, " refused: cannot serve clients on its device, which refuses RDMA writes")?;
    let others = cell.server().log_lines("device softrdma0 can't")?;
    ensure!(others.is_empty(), "the good device is accused: {others:?}");
    good.live()?;
    Good::connect(cell)?;
    let info = cell.info()?;
    ensure!(info.number("rdma_devices_lost")? == 0, "a device was given up");
    ensure!(info.number("rdma_ended_by_error")? == 1, "more than its first client is lost");
    Ok(())
}

/// It serves, without probes after the first. Those of the good device are probed as ever.
fn no_probes(cell: &mut Cell) -> Result<()> {
    let mut good = Good::connect(cell)?;
    let mut first = awaited(cell)?;
    expect(&mut first, "PING", "PONG")?;
    first.stream().wait_end(Instant::now() + cell.lab.patience())?;
    let mut client = second(cell)?;
    expect(&mut client, "PING", "PONG")?;
    let probes = cell.info()?.number("rdma_keepalive_probes")?;
    cell.wait_info("probes of the good device", |info| {
        Ok(info.number("rdma_keepalive_probes")? >= probes + 2 * CLIENTS as u64)
    })?;
    expect(&mut client, "PING", "PONG")?;
    good.live()?;
    once(cell, "device softrdma1 can't carry out RDMA writes of no bytes")?;
    let others = cell.server().log_lines("device softrdma0 can't")?;
    ensure!(others.is_empty(), "the good device is accused: {others:?}");
    let ended = cell.info()?.number("rdma_ended_by_error")?;
    ensure!(ended == 1, "{ended} connections are lost instead of one");
    Ok(())
}
