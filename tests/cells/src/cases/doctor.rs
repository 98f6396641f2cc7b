// SPDX-License-Identifier: BSD-3-Clause
//! `RDMA.DOCTOR` and `probe=`: what is said of a good device and of others, that nobody has to
//! wait for it, and that nothing of it stays.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use client::Value;

use super::basics::expect;
use super::devices::{Way, each};
use super::hostile::Holdings;
use super::refusals::refusal;
use crate::cell::{Case, Cell};
use crate::tools::Pinger;

pub const CASES: &[Case] = &[
    Case::new("doctor", examine),
    Case::new("doctor-devices", on_devices).unstarted(),
    Case::new("doctor-at-load", at_load).unstarted(),
];

/// Every check that there is.
const CHECKS: [&str; 12] = [
    "connection",
    "message",
    "immediate",
    "inline",
    "probe",
    "probe-with-key",
    "receiver-not-ready",
    "send-queue",
    "isolation",
    "flush",
    "events",
    "registration",
];

/// What was said of one device.
struct Said {
    device: String,
    resembles: String,
    checks: Vec<(String, String)>,
}

/// A map's values by their names.
fn value<'a>(map: &'a Value, name: &str) -> Result<&'a Value> {
    let fields = map.elements();
    let at = fields.iter().position(|field| field.text() == name);
    at.and_then(|at| fields.get(at + 1)).with_context(|| format!("no {name} in {map}"))
}

fn said(reply: &Value) -> Result<Said> {
    ensure!(!reply.is_error(), "RDMA.DOCTOR: {reply}");
    ensure!(reply.elements().len() == 1, "not one device: {reply}");
    let map = &reply.elements()[0];
    let checks = value(map, "checks")?;
    let pairs = checks.elements().chunks_exact(2);
    Ok(Said {
        device: value(map, "device")?.text(),
        resembles: value(map, "resembles")?.text(),
        checks: pairs.map(|pair| (pair[0].text(), pair[1].text())).collect(),
    })
}

fn doctor(cell: &Cell) -> Result<Said> {
    said(&cell.tcp()?.words("RDMA.DOCTOR")?)
}

fn examine(cell: &mut Cell) -> Result<()> {
    // The first connections and the first examination make server and fabric set up what they
    // keep for good.
    cell.traffic(4, 4000)?.stop()?;
    doctor(cell)?;
    let before = Holdings::at_rest(cell)?;
    let traffic = cell.traffic(4, 4000)?;
    let pinger = Pinger::start(cell, cell.lab.patience())?;

    let found = doctor(cell)?;
    let names: Vec<_> = found.checks.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == CHECKS, "the checks are {names:?}");
    let bad: Vec<_> =
        found.checks.iter().filter(|(_, outcome)| !outcome.starts_with("passed")).collect();
    ensure!(bad.is_empty(), "a good device does not pass: {bad:?}");
    ensure!(found.resembles == "rxe", "it resembles {}", found.resembles);
    let by_name = said(&cell.tcp()?.words(&format!("RDMA.DOCTOR {}", found.device))?)?;
    ensure!(by_name.device == found.device, "another device than asked for");
    // Over RDMA itself, too.
    said(&cell.rdma()?.words("RDMA.DOCTOR")?)?;

    for (command, words) in [
        ("RDMA.DOCTOR nobody", "no device nobody has an address that is listened on"),
        ("RDMA.DOCTOR a b", "wrong number of arguments"),
    ] {
        let reply = cell.tcp()?.words(command)?;
        ensure!(reply.is_error() && reply.text().contains(words), "{command}: {reply}");
    }
    let mut client = cell.tcp()?;
    expect(&mut client, "MULTI", "OK")?;
    expect(&mut client, "RDMA.DOCTOR", "QUEUED")?;
    let reply = client.words("EXEC")?;
    ensure!(reply.to_string().contains("not in a transaction"), "EXEC: {reply}");

    drop(client);

    // Two at a time: one is made, and the other told so. Who leaves meanwhile is in nobody's way.
    let deadline = Instant::now() + cell.lab.patience();
    loop {
        let (mut first, mut second) = (cell.tcp()?, cell.tcp()?);
        first.request(&[b"RDMA.DOCTOR"])?;
        let reply = second.words("RDMA.DOCTOR")?;
        if reply.is_error() {
            ensure!(reply.text().contains("under way"), "the second: {reply}");
            break;
        }
        ensure!(Instant::now() < deadline, "no examination was ever under way");
    }
    while cell.tcp()?.words("RDMA.DOCTOR")?.is_error() {
        ensure!(Instant::now() < deadline, "the examination is never over");
    }

    pinger.end()?;
    traffic.stop()?;
    before.wait_back(cell).with_context(|| cell.server().scene())?;
    Ok(())
}

/// What fails on devices that lack something, and no more.
fn on_devices(cell: &mut Cell) -> Result<()> {
    let ways: [(&str, Way); 6] = [
        ("imm=none", |cell| fails(cell, &["immediate"], "iwarp")),
        ("rnr=ignored", |cell| fails(cell, &["receiver-not-ready"], "irdma")),
        ("transport=iwarp rnr=none inline=48", |cell| {
            fails(cell, &["receiver-not-ready"], "irdma-iwarp")
        }),
        ("zero-write=needs-key", |cell| fails(cell, &["probe"], "rxe")),
        ("zero-write=fails", |cell| fails(cell, &["probe", "probe-with-key"], "rxe")),
        ("event-lost%1", |cell| fails(cell, &["events"], "rxe")),
    ];
    each(cell, &ways)
}

fn fails(cell: &mut Cell, checks: &[&str], resembles: &str) -> Result<()> {
    let found = doctor(cell)?;
    let failed: Vec<_> =
        found.checks.iter().filter(|(_, outcome)| outcome.starts_with("failed: ")).collect();
    let names: Vec<_> = failed.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names == checks, "{failed:?} failed instead of {checks:?}");
    ensure!(found.resembles == resembles, "it resembles {}", found.resembles);
    Ok(())
}

fn at_load(cell: &mut Cell) -> Result<()> {
    let arguments = cell.settings.arguments.clone();
    let with = |cell: &mut Cell, probe: &str, faults: &str| {
        cell.settings.arguments = arguments.clone();
        cell.settings.arguments.push(probe.to_owned());
        cell.settings.environment = vec![("SOFTRDMA_FAULTS".to_owned(), faults.to_owned())];
    };
    with(cell, "probe=require", "");
    cell.start()?;
    cell.stop()?;
    with(cell, "probe=warn", "imm=none");
    cell.start()?;
    cell.server().wait_log("softrdma0: immediate: a write of 1 bytes", cell.lab.patience())?;
    cell.stop()?;
    with(cell, "probe=require", "imm=none");
    refusal(cell, &["not loaded: probe=require, and softrdma0: immediate: "])?;
    Ok(())
}
