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
    Case::new("doctor-profiles", on_profiles).unstarted(),
];

/// The devices that the software fabric behaves as, what each is to be taken for, and which
/// checks fail there. The first is the fabric in its own way.
const PROFILES: [(&str, &str, &[&str]); 12] = [
    ("", "rxe", &[]),
    ("mlx5", "mlx5", &[]),
    ("mlx4", "mlx5", &[]),
    ("irdma", "irdma", &["receiver-not-ready"]),
    ("irdma-iwarp", "irdma-iwarp", &["receiver-not-ready"]),
    ("erdma", "erdma", &["receiver-not-ready"]),
    ("bnxt", "bnxt", &[]),
    ("hns-hip08", "hns", &["receiver-not-ready"]),
    ("iwarp", "iwarp", &["immediate"]),
    ("ionic", "ionic", &[]),
    ("mana", "mana", &["send-queue"]),
    ("qedr", "qedr", &[]),
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
pub(super) struct Said {
    pub(super) device: String,
    pub(super) resembles: String,
    checks: Vec<(String, String)>,
}

impl Said {
    /// The checks that failed, by name.
    pub(super) fn failures(&self) -> Vec<&str> {
        let failed = self.checks.iter().filter(|(_, outcome)| outcome.starts_with("failed: "));
        failed.map(|(name, _)| name.as_str()).collect()
    }

    /// In a line, for a table: what did not pass, and which device it is like.
    pub(super) fn text(&self) -> String {
        let bad = self.checks.iter().filter(|(_, outcome)| !outcome.starts_with("passed"));
        let bad: Vec<_> = bad.map(|(name, outcome)| format!("{name} {outcome}")).collect();
        let bad = if bad.is_empty() { "all passed".to_owned() } else { bad.join("; ") };
        format!("resembles {}: {bad}", self.resembles)
    }
}

/// A map's values by their names.
fn value<'a>(map: &'a Value, name: &str) -> Result<&'a Value> {
    let fields = map.elements();
    let at = fields.iter().position(|field| field.text() == name);
    at.and_then(|at| fields.get(at + 1)).with_context(|| format!("no {name} in {map}"))
}

/// What was said of each device.
pub(super) fn all_said(reply: &Value) -> Result<Vec<Said>> {
    ensure!(!reply.is_error(), "RDMA.DOCTOR: {reply}");
    let said = |map: &Value| {
        let checks = value(map, "checks")?;
        let pairs = checks.elements().chunks_exact(2);
        Ok(Said {
            device: value(map, "device")?.text(),
            resembles: value(map, "resembles")?.text(),
            checks: pairs.map(|pair| (pair[0].text(), pair[1].text())).collect(),
        })
    };
    reply.elements().iter().map(said).collect()
}

fn said(reply: &Value) -> Result<Said> {
    let mut all = all_said(reply)?;
    ensure!(all.len() == 1, "not one device: {reply}");
    Ok(all.remove(0))
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
    ensure!(found.failures() == checks, "{} instead of {checks:?}", found.text());
    ensure!(found.resembles == resembles, "it resembles {}", found.resembles);
    Ok(())
}

/// What is said of every device that the software fabric behaves as.
fn on_profiles(cell: &mut Cell) -> Result<()> {
    let mut wrong = Vec::new();
    for (device, resembles, checks) in PROFILES {
        cell.settings.environment = vec![("SOFTRDMA_DEVICE".to_owned(), device.to_owned())];
        cell.start()?;
        let found = doctor(cell)?;
        cell.stop()?;
        let device = if device.is_empty() { "the fabric" } else { device };
        cell.figure(device, found.text());
        if found.failures() != checks || found.resembles != resembles {
            wrong.push(format!("{device}: {}", found.text()));
        }
    }
    ensure!(wrong.is_empty(), "not as expected: {}", wrong.join("\n"));
    Ok(())
}

/// What was found is gone by: no client has to find it out again.
fn refused_at_once(cell: &mut Cell) -> Result<()> {
    for _ in 0..2 {
        ensure!(cell.rdma().is_err(), "a client is accepted");
    }
    let info = cell.info()?;
    ensure!(info.number("rdma_refused_device")? == 2, "the refusals are not counted");
    ensure!(info.number("rdma_posts_failed")? == 0, "a write was tried");
    ensure!(info.number("rdma_devices_unfit")? == 1, "the device is not called unfit");
    let lines = cell.server().log_lines("device softrdma0 can't serve clients")?;
    ensure!(lines.len() == 1, "not one line: {lines:?}");
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
    refused_at_once(cell)?;
    cell.stop()?;
    with(cell, "probe=no", "imm=none");
    cell.start()?;
    doctor(cell)?;
    refused_at_once(cell)?;
    cell.stop()?;
    with(cell, "probe=require", "imm=none");
    refusal(cell, &["not loaded: probe=require, and softrdma0: immediate: "])?;
    Ok(())
}
