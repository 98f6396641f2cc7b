// SPDX-License-Identifier: BSD-3-Clause
//! Messages that are lost on the way, of the connection manager and of replies: how long is
//! waited for them.

use anyhow::{Result, ensure};
use client::Value;

use super::basics::expect;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("ack-timeout", ack_timeout)
        .with(|settings| settings.arguments.push("ack-timeout=16".to_owned())),
    // Longer than a handshake may take.
    Case::new("late-established", late_established).with(|settings| {
        let plan = ("SOFTRDMA_FAULTS".to_owned(), "late-rtu=30000".to_owned());
        settings.environment.push(plan);
    }),
];

/// What the server's side of a connection waits for an acknowledgement is what was set, and
/// not what the connection manager makes of it, which is 14 on this fabric.
fn ack_timeout(cell: &mut Cell) -> Result<()> {
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    let stats = cell.tcp()?.words("RDMA.STATS")?;
    let after = |map: &Value, name: &str| {
        let at = map.elements().iter().position(|item| item.text() == name)?;
        map.elements().get(at + 1).cloned()
    };
    let devices = after(&stats, "devices");
    let device = devices.as_ref().and_then(|devices| devices.elements().first());
    let timeout = device.and_then(|device| after(device, "ack-timeout"));
    ensure!(timeout == Some(Value::Integer(16)), "ack-timeout is {timeout:?} in {stats}");
    cell.moved(14, 7);
    Ok(())
}

/// A client whose last message of the handshake is lost is served all the same: what it sends
/// shows that it is ready.
fn late_established(cell: &mut Cell) -> Result<()> {
    for _ in 0..3 {
        expect(&mut cell.rdma()?, "PING", "PONG")?;
    }
    cell.moved(3 * 14, 3 * 7);
    Ok(())
}
