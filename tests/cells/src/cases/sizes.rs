// SPDX-License-Identifier: BSD-3-Clause
//! That values of every size arrive exactly, compared byte by byte in both directions. What
//! goes in over RDMA is read back over TCP and the other way round, so that two mistakes
//! can't hide each other.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use client::rdma::Options;
use client::{Value, pattern};

use super::basics::expect;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("sizes-edges", edges),
    Case::new("sizes-64mb", |cell| exact(cell, 64 << 20)),
    Case::new("sizes-512mb", |cell| exact(cell, 512 << 20))
        .with(|settings| settings.directive("proto-max-bulk-len 600mb")),
    Case::new("odd-windows", odd_windows),
    Case::new("odd-receive-size", odd_receive_size).unstarted(),
    Case::new("small-server-window", edges)
        .with(|settings| settings.arguments.push("rx-size=64k".to_owned())),
];

/// The client's window unless told otherwise, and the server's largest.
const WINDOW: usize = 1 << 20;

/// Lengths around what fills a window exactly, once and twice: as a value alone, and with
/// what RESP puts around it in a request and in a reply.
fn edge_lengths() -> Vec<usize> {
    let request = b"*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$1048576\r\n\r\n".len();
    let reply = b"$1048576\r\n\r\n".len();
    let mut lengths = vec![0, 1, 2, 100, 16 << 10, (64 << 10) - 1, 64 << 10, (64 << 10) + 1];
    for around in [0, request, reply] {
        for windows in [1, 2] {
            let exact = windows * WINDOW - around;
            lengths.extend([exact - 1, exact, exact + 1]);
        }
    }
    lengths.push(4 * WINDOW + 5);
    lengths
}

fn edges(cell: &mut Cell) -> Result<()> {
    for length in edge_lengths() {
        exact(cell, length)?;
    }
    fill_windows(cell)?;
    // All of them once more over one connection, so that windows begin anywhere.
    let mut client = cell.rdma()?;
    for (seed, length) in edge_lengths().into_iter().enumerate() {
        let value = pattern::value(100 + seed as u64, length);
        client.command(&[b"SET", b"key", &value])?;
        let read = client.command(&[b"GET", b"key"])?;
        ensure!(read == Value::Bulk(value), "{length} bytes came back changed");
        cell.moved(length, length);
    }
    Ok(())
}

/// Requests that end a byte before, at and a byte behind the end of the server's window,
/// and of the one after it, through all sizes that the window takes as it grows.
fn fill_windows(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    let mut sizes = BTreeSet::new();
    for turn in 0..60_usize {
        let (window, room) = client.stream().peer_room(Instant::now() + cell.lab.patience())?;
        sizes.insert(window);
        let length = room + window * (turn / 3 % 2) + turn % 3 - 1;
        // Around the value: its own length takes the more digits the longer it is.
        let around =
            |value: usize| format!("*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n${value}\r\n\r\n").len();
        let Some(value) = (0..length).rev().find(|value| value + around(*value) == length) else {
            expect(&mut client, "PING", "PONG")?;
            continue;
        };
        let value = pattern::value(turn as u64, value);
        client.command(&[b"SET", b"key", &value])?;
        let read = client.command(&[b"GET", b"key"])?;
        ensure!(read == Value::Bulk(value), "a request of {length} bytes for {room} of {window}");
        cell.moved(length, length - around(length));
    }
    ensure!(sizes.len() > 1, "the server's window never grew: {sizes:?}");
    cell.figure("the server's windows", format!("{sizes:?}"));
    // A client that goes on at once has somewhere to write to.
    let ahead = cell.info()?.number("rdma_announcements_sent_early")?;
    ensure!(ahead > 0, "no window was announced before the one before was read");
    cell.figure("windows announced ahead", ahead);
    Ok(())
}

/// One value each way.
fn exact(cell: &mut Cell, length: usize) -> Result<()> {
    let mut fast = cell.rdma()?;
    let mut plain = cell.tcp()?;
    let value = pattern::value(1, length);
    let reply = fast.command(&[b"SET", b"key", &value])?;
    ensure!(reply.text() == "OK", "SET of {length} bytes over RDMA: {reply}");
    let read = plain.command(&[b"GET", b"key"])?;
    ensure!(read == Value::Bulk(value), "{length} bytes set over RDMA read back changed over TCP");
    drop(read);
    let value = pattern::value(2, length);
    plain.command(&[b"SET", b"key", &value])?;
    let read = fast
        .command(&[b"GET", b"key"])
        .with_context(|| format!("GET of {length} bytes over RDMA"))?;
    ensure!(read == Value::Bulk(value), "{length} bytes set over TCP read back changed over RDMA");
    cell.moved(length, length);
    Ok(())
}

/// Clients whose windows are tiny, odd or large.
fn odd_windows(cell: &mut Cell) -> Result<()> {
    let sizes: &[u32] = &[1, 2, 3, 7, 64, 1000, 4097, 65_537, 1_000_003, 3 << 20];
    for &window in sizes {
        let options = Options { window, ..cell.options() };
        let mut client = cell.rdma_with(&options)?;
        // A window of a byte costs a round trip for each byte.
        let length = (window as usize * if cell.lab.is_slow() { 40 } else { 300 }).min(8 << 20);
        let value = pattern::value(window.into(), length);
        client.command(&[b"SET", b"key", &value])?;
        for _ in 0..2 {
            let read = client
                .command(&[b"GET", b"key"])
                .with_context(|| format!("GET of {length} bytes into a window of {window}"))?;
            ensure!(
                read == Value::Bulk(value.clone()),
                "{length} bytes came changed through a window of {window}"
            );
        }
        cell.moved(length, 2 * length);
    }
    let windows = cell.info()?.number("rdma_announcements_received")?;
    ensure!(windows > 100, "only {windows} windows were used up");
    Ok(())
}

/// A setting that is no number of whole pages, by the server's directive where it has one:
/// once the buffers have their size, they are used again and again.
fn odd_receive_size(cell: &mut Cell) -> Result<()> {
    const ASKED: u32 = 100_000;
    const WHOLE_PAGES: u32 = 98_304;
    if cell.id.line() == "8.0" {
        cell.settings.arguments.push(format!("rx-size={ASKED}"));
    } else {
        let rdma = cell.settings.rdma;
        cell.settings.directive(&format!("rdma-bind {}", rdma.ip()));
        cell.settings.directive(&format!("rdma-port {}", rdma.port()));
        cell.settings.directive(&format!("rdma-rx-size {ASKED}"));
        cell.settings.arguments.clear();
    }
    cell.start()?;
    let mut client = cell.rdma()?;
    let value = pattern::value(9, 4 << 20);
    let mut counts = Vec::new();
    for _ in 0..2 {
        let before = cell.info()?;
        for _ in 0..5 {
            client.command(&[b"SET", b"key", &value])?;
        }
        let after = cell.info()?;
        let count = |name: &str| Ok::<_, anyhow::Error>(after.number(name)? - before.number(name)?);
        counts.push((count("rdma_registrations")?, count("rdma_announcements_sent")?));
        cell.moved(5 * value.len(), 0);
    }
    let (registrations, windows) = counts[1];
    ensure!(windows > 100, "only {windows} windows were used");
    // A pause of the machine may take the second buffer away, which comes back then.
    ensure!(registrations <= 10, "{registrations} registrations for {windows} windows");
    let size = client.stream().peer_room(Instant::now() + cell.lab.patience())?.0;
    ensure!(size == WHOLE_PAGES as usize, "the server's window has {size} bytes");
    ensure!(client.command(&[b"GET", b"key"])? == Value::Bulk(value), "another value");
    cell.figure("registrations and windows", format!("{counts:?}"));
    Ok(())
}
