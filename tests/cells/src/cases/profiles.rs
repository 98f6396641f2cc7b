// SPDX-License-Identifier: BSD-3-Clause
//! What a server does on one device or another, which the software fabric behaves as.

use anyhow::{Result, ensure};

use super::basics::expect;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] =
    &[Case::new("no-immediate", no_immediate), Case::new("clients-ahead", ahead)];

/// A device that has no immediate data: nobody is served over it, who tries is refused, the log
/// says so once, and over TCP the server does its work.
fn no_immediate(cell: &mut Cell) -> Result<()> {
    const CLIENTS: usize = 6;
    for number in 0..CLIENTS {
        let reply = cell.rdma().and_then(|mut client| Ok(client.words("PING")?));
        ensure!(reply.is_err(), "client {number} is answered: {reply:?}");
        expect(&mut cell.tcp()?, "PING", "PONG")?;
    }
    let lines = cell.server().log_lines("can't serve clients")?;
    let warnings = lines.iter().filter(|line| line.contains(" # ")).count();
    ensure!((warnings, lines.len()) == (1, 1), "not one warning: {lines:?}");
    cell.wait_info("nobody to be connected", |info| {
        Ok(info.number("rdma_connections_established")? == 0)
    })?;
    Ok(())
}

/// Clients that send more requests, one by one, than a connection has receives, while the server
/// is busy: none is lost, whatever the device does where it finds no receive.
fn ahead(cell: &mut Cell) -> Result<()> {
    const CLIENTS: usize = 5;
    const REQUESTS: usize = 500;
    // What a device turns out to do is known from the first connection on.
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    let mut clients = (0..CLIENTS).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    let mut admin = cell.tcp()?;
    admin.request(&[b"DEBUG", b"SLEEP", b"0.3"])?;
    for client in &mut clients {
        (0..REQUESTS).try_for_each(|_| client.request(&[b"INCR", b"counter"]))?;
    }
    ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
    for client in &mut clients {
        for number in 0..REQUESTS {
            let reply = client.reply()?;
            ensure!(!reply.is_error(), "reply {number}: {reply}");
        }
    }
    let counted = cell.tcp()?.words("GET counter")?.text();
    ensure!(counted == (CLIENTS * REQUESTS).to_string(), "{counted} requests were counted");
    let ended = cell.info()?.number("rdma_ended_by_error")?;
    ensure!(ended == 0, "{ended} connections were lost");
    cell.moved(CLIENTS * REQUESTS * "*2..$4..INCR..$7..counter..".len(), CLIENTS * REQUESTS * 4);
    Ok(())
}
