// SPDX-License-Identifier: BSD-3-Clause
//! How connections end and begin where the server is late, busy or has many of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::Value;
use client::raw::{Options, Raw};

use super::basics::expect;
use super::hostile::{Inbox, Target};
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("idle-ends", idle)
        .with(|settings| settings.arguments.push("linger-time=2000".to_owned())),
    Case::new("left-behind", left_behind),
    Case::new("stalled-handshakes", stalled_handshakes)
        .with(|settings| settings.arguments.push("handshake-timeout=2000".to_owned())),
];

/// A client that had nothing written to it for `linger-time` learns its end at once, and one
/// that had has its time.
fn idle(cell: &mut Cell) -> Result<()> {
    let mut admin = cell.tcp()?;
    let mut subscribers = Vec::new();
    for _ in 0..2 {
        let mut client = cell.rdma()?;
        let id = client.words("CLIENT ID")?.text();
        client.words("SUBSCRIBE news")?;
        subscribers.push((id, client));
    }
    for (id, mut client) in subscribers {
        std::thread::sleep(Duration::from_millis(2200));
        expect(&mut admin, &format!("CLIENT KILL ID {id}"), "1")?;
        let end = client.stream().wait_end(Instant::now() + Duration::from_millis(1500));
        end.context("an idle client")?;
    }
    let mut busy = cell.rdma()?;
    let id = busy.words("CLIENT ID")?.text();
    expect(&mut admin, &format!("CLIENT KILL ID {id}"), "1")?;
    ensure!(cell.info()?.number("rdma_connections_lingering")? == 1, "no time to read");
    cell.moved(3 * 10, 3 * 4);
    Ok(())
}

/// Connections that fill the server's queue while it sleeps, and what each sends. More than a
/// pass takes from one queue, and few enough for the receives that each has.
const CROWD: usize = 225;
const WRITES: usize = 60;

/// What a client sent before it left is carried out, however much stands before it.
fn left_behind(cell: &mut Cell) -> Result<()> {
    let target = Target::of(cell);
    let options = Options { receives: 8, repost: true, memory: 4096, ..Options::default() };
    let join = || -> Result<(Raw, Inbox)> {
        let mut raw = target.open_with(&options)?;
        raw.send(&raw.window().announcement())?;
        let mut inbox = target.inbox(&mut raw)?;
        target.ping(&mut raw, &mut inbox)?;
        Ok((raw, inbox))
    };
    let mut crowd = (0..CROWD).map(|_| join()).collect::<Result<Vec<_>>>()?;
    let (mut leaver, mut its) = join()?;
    let mut admin = cell.tcp()?;
    for round in 0..2 {
        admin.request(&[b"DEBUG", b"SLEEP", b"1"])?;
        std::thread::sleep(Duration::from_millis(100));
        for (raw, inbox) in &mut crowd {
            for _ in 0..WRITES {
                inbox.say(raw, b"")?;
            }
        }
        let set = format!("*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$1\r\n{round}\r\n");
        its.say(&mut leaver, set.as_bytes())?;
        leaver.flush(target.soon())?;
        leaver.disconnect()?;
        drop(leaver);
        ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
        cell.wait_info("the leaver gone", |info| {
            Ok(info.number("rdma_connections_established")? == CROWD as u64)
        })?;
        let value = admin.words("GET key")?;
        ensure!(value == Value::Bulk(round.to_string().into()), "round {round}: SET left {value}");
        for (raw, _) in &mut crowd {
            raw.flush(target.soon())?;
        }
        (leaver, its) = join()?;
    }
    cell.moved(CROWD * 14, CROWD * 7);
    Ok(())
}

/// Connections in handshake while the server sleeps.
const HANDSHAKES: usize = 100;

/// A server that slept for longer than `handshake-timeout` holds that against no client that
/// did its part meanwhile.
fn stalled_handshakes(cell: &mut Cell) -> Result<()> {
    let target = Target::of(cell);
    let options = Options { receives: 8, memory: 4096, ..Options::default() };
    let mut half = Vec::new();
    for _ in 0..HANDSHAKES {
        half.push(Raw::resolve(cell.server().rdma_address(), &options, target.soon())?);
    }
    let mut admin = cell.tcp()?;
    for raw in &half {
        raw.request()?;
    }
    let all = format!("rdma_connections_handshaking:{HANDSHAKES}\r");
    while !admin.words("INFO rdma")?.text().contains(&all) {}
    admin.request(&[b"DEBUG", b"SLEEP", b"2.5"])?;
    for raw in &mut half {
        raw.establish(target.soon())?;
        raw.send(&raw.window().announcement())?;
    }
    ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
    for (number, raw) in half.iter_mut().enumerate() {
        let mut inbox = target.inbox(raw)?;
        target.ping(raw, &mut inbox).with_context(|| format!("client {number}"))?;
    }
    ensure!(cell.info()?.number("rdma_ended_by_timeout")? == 0, "clients were given up");
    // One that does not answer is, all the same.
    let silent = target.open_with(&options)?;
    cell.wait_info("a time-out", |info| Ok(info.number("rdma_ended_by_timeout")? == 1))?;
    drop(silent);
    cell.moved(HANDSHAKES * 14, HANDSHAKES * 7);
    Ok(())
}
