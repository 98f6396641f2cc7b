// SPDX-License-Identifier: BSD-3-Clause
//! A number of I/O threads that changes while they work, which 9.0 and later can.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use client::rdma::Connection;
use client::{Client, pattern};

use super::basics::expect;
use crate::cell::{Case, Cell};
use crate::server::{Settings, wakes_by_descriptors};
use crate::tools::Load;

pub const CASES: &[Case] = &[
    Case::new("io-threads-set", set_and_used).with(|settings| {
        begin_with_one(settings);
        settings.io_threads_as_they_are();
    }),
    Case::new("io-threads-set-always", set).with(begin_with_one),
];

/// How many clients work meanwhile.
const CLIENTS: usize = 4;

fn begin_with_one(settings: &mut Settings) {
    settings.directives.retain(|line| !line.starts_with("io-threads "));
}

/// Values of several sizes, written and read until it is over; how many bytes that were.
fn work(mut client: Client<Connection>, own: usize, over: &AtomicBool) -> Result<usize> {
    let key = format!("key{own}");
    let mut bytes = 0;
    while !over.load(Ordering::Relaxed) {
        for size in [10, 3_000, 200_000] {
            let value = pattern::value(own as u64 + bytes as u64, size);
            let reply = client.command(&[b"SET", key.as_bytes(), &value])?;
            ensure!(reply.text() == "OK", "SET: {reply}");
            let reply = client.command(&[b"GET", key.as_bytes()])?;
            ensure!(reply.bytes() == Some(&value[..]), "a value of {size} bytes came back changed");
            bytes += size;
        }
    }
    Ok(bytes)
}

/// The number goes up and down under traffic, and every value is right.
fn set(cell: &mut Cell) -> Result<()> {
    let clients = (0..CLIENTS).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    let mut observer = cell.tcp()?;
    let over = AtomicBool::new(false);
    let bytes = std::thread::scope(|scope| -> Result<usize> {
        let over = &over;
        let works: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(own, client)| scope.spawn(move || work(client, own, over)))
            .collect();
        let mut steps = || -> Result<()> {
            for number in [4, 1, 8, 2, 3, 1, 6, 4] {
                expect(&mut observer, &format!("CONFIG SET io-threads {number}"), "OK")?;
                expect(&mut cell.rdma()?, "PING", "PONG")?;
                std::thread::sleep(Duration::from_millis(150));
            }
            Ok(())
        };
        let stepped = steps();
        over.store(true, Ordering::Relaxed);
        let mut bytes = 0;
        for work in works {
            bytes += work.join().expect("no panic")?;
        }
        stepped.map(|()| bytes)
    })?;
    ensure!(bytes > 0, "the clients did nothing");
    cell.moved(bytes, bytes);
    cell.figure("bytes each way", bytes);
    Ok(())
}

/// After that the server uses the threads that it did not start with, as it decides by itself. One that
/// goes by descriptors needs more of them than the device's, and only while there are threads.
fn set_and_used(cell: &mut Cell) -> Result<()> {
    // A listener's has a copy in any case.
    let idle = same_descriptors(cell.server().pid());
    set(cell)?;
    let count = |cell: &Cell| -> Result<(u64, u64)> {
        let info = cell.info()?;
        Ok((info.number("rdma_reads_io")?, info.number("rdma_writes_io")?))
    };
    let before = count(cell)?;
    let deadline = Instant::now() + cell.lab.patience();
    let mut most = 0;
    loop {
        most = most.max(under_load(cell)?);
        let now = count(cell)?;
        let (reads, writes) = (now.0 - before.0, now.1 - before.1);
        if reads > 0 && writes > 0 {
            cell.figure("reads and writes by I/O threads", format!("{reads} and {writes}"));
            break;
        }
        ensure!(Instant::now() < deadline, "I/O threads did {reads} reads and {writes} writes");
    }
    cell.figure("descriptors that fire together", most);
    let by_descriptors = wakes_by_descriptors(&cell.id.server);
    ensure!((most > idle) == by_descriptors, "{most} descriptors fire together, {idle} at rest");
    expect(&mut cell.tcp()?, "CONFIG SET io-threads 1", "OK")?;
    let most = under_load(cell)?;
    ensure!(most == idle, "{most} descriptors fire together, and there are no I/O threads");
    Ok(())
}

/// Has many clients busy at once, and returns the most descriptors that were one and the same
/// at a time.
fn under_load(cell: &mut Cell) -> Result<usize> {
    let load = Load {
        tests: vec!["set", "get"],
        requests: 8_000,
        clients: 30,
        size: 512,
        pipeline: 8,
        ..Load::default()
    };
    let (pid, limit) = (cell.server().pid(), cell.lab.cell_limit());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(same_descriptors(pid));
                std::thread::sleep(Duration::from_millis(20));
            }
            most
        });
        let loaded = cell.benchmark(&load, limit);
        over.store(true, Ordering::Relaxed);
        let most = sampler.join().expect("no panic");
        loaded.map(|_| most)
    })
}

/// The most descriptors of a process that stand for one and the same eventfd. On the software
/// fabric a device's completion channel is one.
fn same_descriptors(pid: u32) -> usize {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten();
    for entry in entries.flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        if let Some(id) = text.lines().find_map(|line| line.strip_prefix("eventfd-id:")) {
            *counts.entry(id.trim().to_owned()).or_default() += 1;
        }
    }
    counts.into_values().max().unwrap_or(0)
}
