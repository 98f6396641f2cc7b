// SPDX-License-Identifier: BSD-3-Clause
//! That connections which come and go leave nothing behind.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use client::{Client, rdma};

use super::basics::expect;
use super::hostile::Holdings;
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::matrix::Fabric;
use crate::process::run;

/// Rounds after which the server's allocators have what they work with. Resident memory of
/// 8.0 was 19.9 MB after ten rounds of 200 clients and 20.6 MB after a hundred.
const WARM_UP: usize = 8;

pub const CASES: &[Case] = &[
    Case::new("churn", |cell| churn(cell, 200, 20)),
    Case::new("churn-light", |cell| churn(cell, 50, 4)),
];

/// What a server takes besides what [`Holdings`] says.
#[derive(Debug)]
struct Footprint {
    resident: u64,
    /// Protection domains, completion queues, queue pairs, identifiers and memory regions, as
    /// the kernel counts them.
    resources: Option<Resources>,
}

#[derive(Debug, serde::Deserialize)]
struct Resources {
    pd: u64,
    cq: u64,
    qp: u64,
    cm_id: u64,
    mr: u64,
}

impl Footprint {
    fn of(cell: &Cell) -> Result<Self> {
        Ok(Self {
            resident: cell.server().resident()?,
            resources: match cell.lab.fabric {
                // The software fabric's objects are the server's own memory.
                Fabric::Soft => None,
                _ => Some(resources(cell)?),
            },
        })
    }
}

fn resources(cell: &Cell) -> Result<Resources> {
    let mut command = Command::new("rdma");
    command.args(["-j", "resource", "show"]);
    let output = run(&mut command, b"", cell.folder(), cell.lab.patience())?;
    let mut devices: Vec<Resources> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("rdma resource: {}", output.text()))?;
    ensure!(devices.len() == 1, "rdma resource shows {} devices", devices.len());
    Ok(devices.remove(0))
}

/// Opens `clients` connections, uses them, and closes them: every other in order.
fn round(cell: &Cell, clients: usize) -> Result<()> {
    let mut open: Vec<Client<rdma::Connection>> = Vec::new();
    for number in 0..clients {
        let client = cell.rdma().with_context(|| format!("connection {number} of {clients}"))?;
        open.push(client);
    }
    for client in &mut open {
        expect(client, "PING", "PONG")?;
    }
    for (number, client) in open.into_iter().enumerate() {
        match number % 2 {
            0 => client.into_stream().disconnect(cell.lab.patience())?,
            _ => drop(client),
        }
    }
    settle(cell)
}

fn churn(cell: &mut Cell, clients: usize, rounds: usize) -> Result<()> {
    // The first rounds bring the server's own pools and allocator to their working size.
    for number in 0..WARM_UP {
        round(cell, clients).with_context(|| format!("warm-up {number}"))?;
    }
    let rest = Holdings::at_rest(cell)?;
    let before = Footprint::of(cell)?;
    for number in 0..rounds {
        round(cell, clients).with_context(|| format!("round {number}"))?;
    }
    // Some of it goes with the next tick of the module's clock.
    rest.wait_back(cell)?;
    let after = Footprint::of(cell)?;
    cell.figure("connections opened and closed", format!("{clients} × {rounds}"));
    cell.figure(
        "resident memory",
        format!("{} KiB before, {} KiB after", before.resident >> 10, after.resident >> 10),
    );
    ensure!(
        after.resident as f64 <= before.resident as f64 * 1.1,
        "resident memory grew: before: {before:?}, after: {after:?}"
    );
    if let (Some(old), Some(new)) = (&before.resources, &after.resources) {
        ensure!(
            new.pd <= old.pd
                && new.cq <= old.cq
                && new.qp <= old.qp
                && new.cm_id <= old.cm_id
                && new.mr <= old.mr,
            "RDMA objects are left: before: {old:?}, after: {new:?}"
        );
    }
    let info = cell.info()?;
    let total = (clients * (rounds + WARM_UP)) as u64;
    ensure!(
        info.number("rdma_connections_accepted")? == total,
        "{total} connections were opened, {} accepted",
        info.number("rdma_connections_accepted")?
    );
    cell.moved(total as usize * 14, total as usize * 7);
    Ok(())
}
