// SPDX-License-Identifier: BSD-3-Clause
//! What a server does with its clients besides answering them: saving, pausing, killing,
//! refusing, sleeping, shutting down.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::rdma::{self, Connection, Options};
use client::{Client, Value, pattern};

use super::basics::{expect, expect_end};
use crate::cell::{Case, Cell, no_crash};
use crate::tools::Pinger;

pub const CASES: &[Case] = &[
    Case::new("save", save).with(|settings| {
        settings.directive("appendonly yes");
        settings.directive("auto-aof-rewrite-percentage 0");
    }),
    Case::new("pause", pause),
    Case::new("kill", kill),
    Case::new("maxclients", maxclients).with(|settings| settings.directive("maxclients 5")),
    Case::new("protected-mode", protected_mode)
        .with(|settings| settings.directive("protected-mode yes")),
    Case::new("password", password),
    Case::new("output-limit", output_limit).with(|settings| {
        settings.directive("client-output-buffer-limit normal 4mb 0 0");
    }),
    Case::new("idle-timeout", idle_timeout).with(|settings| settings.directive("timeout 2")),
    Case::new("shutdown", shutdown),
    Case::new("killed-saving", killed_saving),
    Case::new("sleep", sleep),
];

/// BGSAVE and BGREWRITEAOF while clients read and write: the forked child touches nothing of
/// theirs, and they notice nothing.
fn save(cell: &mut Cell) -> Result<()> {
    let value = pattern::value(1, 2 << 20);
    let mut client = cell.rdma()?;
    client.command(&[b"SET", b"big", &value])?;
    let traffic = cell.traffic(10, 40 << 10)?;
    for round in 0..if cell.lab.is_slow() { 2 } else { 5 } {
        for (command, running, result) in [
            ("BGSAVE", "rdb_bgsave_in_progress", "rdb_last_bgsave_status"),
            ("BGREWRITEAOF", "aof_rewrite_in_progress", "aof_last_bgrewrite_status"),
        ] {
            // The rewrite that `appendonly yes` starts by itself may still run.
            cell.wait_info("no child", |info| {
                Ok(info.number("rdb_bgsave_in_progress")? == 0
                    && info.number("aof_rewrite_in_progress")? == 0)
            })?;
            let reply = client.words(command)?;
            ensure!(!reply.is_error(), "{command}, round {round}: {reply}");
            let read = client.command(&[b"GET", b"big"])?;
            ensure!(read == Value::Bulk(value.clone()), "GET during {command}");
            let info = cell.wait_info(command, |info| Ok(info.number(running)? == 0))?;
            ensure!(info.text(result)? == "ok", "{command}: {}", info.text(result)?);
            cell.moved(0, value.len());
        }
    }
    traffic.stop()
}

/// CLIENT PAUSE holds writes back and lets them through afterwards.
fn pause(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    let mut writers = Vec::new();
    for _ in 0..10 {
        writers.push(cell.rdma()?);
    }
    expect(&mut client, "CLIENT PAUSE 1500 WRITE", "OK")?;
    let started = Instant::now();
    for writer in &mut writers {
        writer.request(&[b"SET", b"key", &pattern::value(1, 3000)])?;
    }
    ensure!(client.words("GET nothing")? == Value::Null, "a read is not held");
    for writer in &mut writers {
        ensure!(writer.reply()?.text() == "OK", "a paused SET");
    }
    ensure!(
        started.elapsed() >= Duration::from_millis(1300),
        "CLIENT PAUSE held writes for {} ms only",
        started.elapsed().as_millis()
    );
    cell.moved(10 * 3000, 10 * 5);
    Ok(())
}

/// CLIENT KILL, by id and by address; the others stay, and a killed one notices.
fn kill(cell: &mut Cell) -> Result<()> {
    let traffic = cell.traffic(5, 1000)?;
    let mut killer = cell.rdma()?;
    for round in 0..10 {
        let mut victim = cell.rdma()?;
        let id = victim.words("CLIENT ID")?.text();
        let command = match round % 2 {
            0 => format!("CLIENT KILL ID {id}"),
            _ => {
                let list = killer.words(&format!("CLIENT LIST ID {id}"))?.text();
                let address = list
                    .split_whitespace()
                    .find_map(|field| field.strip_prefix("addr="))
                    .unwrap_or_default()
                    .to_owned();
                format!("CLIENT KILL ADDR {address}")
            }
        };
        expect(&mut killer, &command, "1")?;
        expect_end(&mut victim)?;
    }
    // Suicide: the reply is the last thing that arrives.
    let mut victim = cell.rdma()?;
    let id = victim.words("CLIENT ID")?.text();
    expect(&mut victim, &format!("CLIENT KILL ID {id} SKIPME no"), "1")?;
    expect_end(&mut victim)?;
    expect(&mut killer, "PING", "PONG")?;
    cell.moved(1000, 1000);
    traffic.stop()
}

/// The client above the limit gets the error's text, and room made by another's leaving is
/// room.
fn maxclients(cell: &mut Cell) -> Result<()> {
    let mut observer = cell.tcp()?;
    let mut open = Vec::new();
    for _ in 0..4 {
        let mut client = cell.rdma()?;
        expect(&mut client, "PING", "PONG")?;
        open.push(client);
    }
    for _ in 0..3 {
        let mut refused = cell.rdma()?;
        let reply = refused.reply()?;
        ensure!(
            reply.text().contains("max number of clients reached"),
            "the client above the limit got: {reply}"
        );
        expect_end(&mut refused)?;
    }
    drop(open.pop());
    let deadline = Instant::now() + cell.lab.patience();
    while observer.words("CLIENT LIST")?.text().lines().count() > 4 {
        ensure!(Instant::now() < deadline, "a closed client stays in the list");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut accepted = cell.rdma()?;
    expect(&mut accepted, "PING", "PONG")?;
    drop(open);
    drop(accepted);
    // The checks after every cell need room too.
    while observer.words("CLIENT LIST")?.text().lines().count() > 1 {
        ensure!(Instant::now() < deadline, "closed clients stay in the list");
        std::thread::sleep(Duration::from_millis(50));
    }
    cell.moved(5 * 14, 5 * 7);
    Ok(())
}

/// Protected mode serves who comes from the server's own machine, and refuses who comes from
/// elsewhere with its text.
fn protected_mode(cell: &mut Cell) -> Result<()> {
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    if cell.lab.address.is_loopback() {
        return Ok(());
    }
    let elsewhere = Options { source: cell.lab.second_address, ..cell.options() };
    for _ in 0..5 {
        let mut client = cell.rdma_with(&elsewhere)?;
        let reply = client.reply()?;
        ensure!(reply.text().contains("protected mode"), "a client from elsewhere got: {reply}");
        expect_end(&mut client)?;
    }
    Ok(())
}

fn password(cell: &mut Cell) -> Result<()> {
    let mut observer = cell.tcp()?;
    expect(&mut observer, "CONFIG SET requirepass secret", "OK")?;
    let mut client = cell.rdma()?;
    let reply = client.words("PING")?;
    ensure!(reply.text().contains("NOAUTH"), "without a password: {reply}");
    expect(&mut client, "AUTH secret", "OK")?;
    expect(&mut client, "PING", "PONG")?;
    // The checks after every cell know no password.
    let reply = observer.command(&[b"CONFIG", b"SET", b"requirepass", b""])?;
    ensure!(reply.text() == "OK", "CONFIG SET requirepass: {reply}");
    Ok(())
}

/// A client whose replies pile up beyond the limit is closed while it does not read.
fn output_limit(cell: &mut Cell) -> Result<()> {
    let value = pattern::value(1, 1 << 20);
    cell.tcp()?.command(&[b"SET", b"big", &value])?;
    let mut client = cell.rdma()?;
    client.stream().hold(true)?;
    for _ in 0..20 {
        // Not GET: 9.1 may put off its copies, and counts one value for all of them then.
        client.request(&[b"GETRANGE", b"big", b"0", b"-1"])?;
    }
    cell.wait_info("the client closed", |info| {
        Ok(info.number("rdma_connections_established")? == 0)
    })?;
    expect_end(&mut client)
}

/// `timeout` closes an idle client, and one that is at work stays.
fn idle_timeout(cell: &mut Cell) -> Result<()> {
    let mut idle = cell.rdma()?;
    expect(&mut idle, "PING", "PONG")?;
    let mut busy = cell.rdma()?;
    for _ in 0..10 {
        expect(&mut busy, "PING", "PONG")?;
        std::thread::sleep(Duration::from_millis(500));
    }
    expect_end(&mut idle)?;
    expect(&mut busy, "PING", "PONG")?;
    cell.moved(12 * 14, 12 * 7);
    Ok(())
}

/// SHUTDOWN while clients are connected, at work, waiting and stalled.
fn shutdown(cell: &mut Cell) -> Result<()> {
    let value = pattern::value(1, 10 << 20);
    cell.tcp()?.command(&[b"SET", b"big", &value])?;
    let mut waiting = cell.rdma()?;
    waiting.request(&[b"BLPOP", b"queue", b"0"])?;
    let mut stalled = cell.rdma()?;
    stalled.stream().hold(true)?;
    stalled.request(&[b"GET", b"big"])?;
    let traffic = cell.traffic(10, 40 << 10)?;
    std::thread::sleep(Duration::from_secs(1));
    // Its counters go with the server: everything is checked here.
    cell.wait_info("traffic", |info| Ok(info.number("rdma_bytes_received")? > 1 << 20))?;
    let mut server = cell.take_server()?;
    let mut last =
        Client::new(Connection::open(server.rdma_address(), &cell.options())?, cell.lab.patience());
    last.request(&[b"SHUTDOWN", b"NOSAVE"])?;
    let status = server.wait_exit(cell.lab.patience())?;
    no_crash(&server)?;
    ensure!(status.success(), "after SHUTDOWN the server ended with {status}");
    ensure!(!server.log()?.contains("Failed to unload"), "it complains of a module");
    for client in [&mut waiting, &mut stalled, &mut last] {
        expect_gone(client, cell.lab.patience())?;
    }
    // The benchmark has noticed too, or is about to.
    drop(traffic);
    Ok(())
}

/// Waits for the end of a connection whose server has gone.
fn expect_gone(client: &mut Client<rdma::Connection>, patience: Duration) -> Result<()> {
    client.stream().wait_end(Instant::now() + patience)?;
    Ok(())
}

/// DEBUG SLEEP 5 with clients that wait: all are served when it is over, and those that
/// connect meanwhile too.
fn sleep(cell: &mut Cell) -> Result<()> {
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(cell.rdma()?);
    }
    let pinger = Pinger::start(cell, Duration::from_secs(30))?;
    let mut sleeper = cell.tcp()?;
    let started = Instant::now();
    sleeper.request(&[b"DEBUG", b"SLEEP", b"5"])?;
    std::thread::sleep(Duration::from_millis(500));
    let value = pattern::value(1, 100_000);
    for client in &mut clients {
        client.request(&[b"SET", b"key", &value])?;
        client.request(&[b"GET", b"key"])?;
    }
    let mut late = cell.rdma()?;
    expect(&mut late, "PING", "PONG")?;
    ensure!(started.elapsed() >= Duration::from_millis(4500), "the server did not sleep");
    for client in &mut clients {
        ensure!(client.reply()?.text() == "OK", "SET after the sleep");
        ensure!(client.reply()? == Value::Bulk(value.clone()), "GET after the sleep");
    }
    ensure!(sleeper.reply()?.text() == "OK", "DEBUG SLEEP");
    pinger.stop(cell)?;
    cell.moved(20 * value.len(), 20 * value.len());
    Ok(())
}

/// A server that is killed while its child saves: its clients learn of it, and it can be
/// started again at once, though the child is still there.
fn killed_saving(cell: &mut Cell) -> Result<()> {
    let mut observer = cell.tcp()?;
    for number in 0..100 {
        expect(&mut observer, &format!("SET key:{number} {number}"), "OK")?;
    }
    // The child needs 100 s. It reports at the first key, when it would notice that nobody
    // listens, and then not before it has saved a thousand.
    expect(&mut observer, "CONFIG SET rdb-key-save-delay 1000000", "OK")?;
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    ensure!(observer.words("BGSAVE")?.text().contains("started"), "BGSAVE");
    cell.wait_info("the child's report", |info| Ok(info.number("current_cow_peak")? > 0))?;
    let mut server = cell.take_server()?;
    let pid = server.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let child = Child(children.trim().parse().with_context(|| format!("children: {children}"))?);
    server.kill()?;

    cell.start().context("starting again at once")?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    client.stream().wait_end(Instant::now() + cell.lab.patience() / 4).context("its client")?;
    ensure!(child.is_there(), "the child has ended, so this shows nothing");
    cell.moved(14, 7);
    Ok(())
}

/// A process that is not ours to wait for; it ends with this value.
struct Child(i32);

impl Child {
    fn is_there(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0));
        status.is_ok_and(|text| !text.contains("State:\tZ"))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a signal to the server's own child, which was there a moment ago.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}
