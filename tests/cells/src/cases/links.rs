// SPDX-License-Identifier: BSD-3-Clause
//! What befalls a link between servers from its first step on: nobody answers, the data path is
//! dead, either side is asleep or leaves, in each of the steps. The cell's own server is the
//! primary.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::basics::expect;
use super::peers::{
    Peer, Writer, amid_sync, arguments, ask, fill, fill_slowly_sent, linked, primary, same, told,
    wait,
};
use crate::cell::{Case, Cell, no_crash};
use crate::server::{Settings, free_port};

pub const CASES: &[Case] = &[
    Case::new("repl-in-vain", in_vain).with(primary),
    Case::new("repl-unanswered", unanswered).with(primary),
    Case::new("repl-closed", closed).with(primary),
    Case::new("repl-load", load).with(primary),
    Case::new("repl-abort", abort).with(primary),
    Case::new("repl-asleep", asleep).with(|settings| {
        primary(settings);
        short_of_patience(settings);
    }),
];

/// Starts a replica on whose fabric faults strike.
fn with_faults(cell: &Cell, name: &str, replication: &str, plan: &str) -> Result<Peer> {
    Peer::start_with(cell, name, replication, |settings| {
        settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
    })
}

/// How many of the lines about a link hold these words.
fn said(peer: &Peer, words: &str) -> Result<usize> {
    Ok(told(peer)?.iter().filter(|line| line.contains(words)).count())
}

/// A handshake that works and a data path that does not: after three links that ended before they
/// were in sync one goes over TCP (`prefer`), and the next is tried over RDMA again; or the next
/// attempt is refused (`require`), so that the server waits. Each change has one line.
fn in_vain(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    ask(cell.server(), "CONFIG SET repl-diskless-sync yes", patience)?;
    fill(cell, cell.server())?;
    // A full synchronization takes thousands of requests, a partial one a few.
    const PLAN: &str = "lose-transfer/300";
    let prefers = with_faults(cell, "prefers", "prefer", PLAN)?;
    prefers.follow(cell)?;
    linked(&prefers)?;
    same(cell.server(), &prefers)?;
    ensure!(prefers.transport()? == "tcp", "the link: {}", prefers.transport()?);
    let info = prefers.info()?;
    let (rdma, tcp) = (info.number("rdma_links_over_rdma")?, info.number("rdma_links_over_tcp")?);
    ensure!((rdma, tcp) == (3, 1), "{rdma} links over RDMA and {tcp} over TCP");
    const WHY: &str = "over TCP: the last 3 links over RDMA ended before the replica was in sync";
    let lines = (said(&prefers, "over RDMA")?, said(&prefers, WHY)?);
    ensure!(lines == (4, 1), "{lines:?} lines, {:?}", told(&prefers)?);
    prefers.ask("CLIENT KILL TYPE master")?;
    wait("a link over RDMA again", patience, || Ok(prefers.transport()? == "rdma"))?;
    prefers.linked_over_rdma()?;

    let requires = with_faults(cell, "requires", "require", PLAN)?;
    requires.follow(cell)?;
    const LINKS: u64 = 7;
    wait("links that are tried again", patience, || {
        Ok(requires.info()?.number("rdma_links_over_rdma")? >= LINKS)
    })?;
    let info = requires.info()?;
    ensure!(info.text("master_link_status")? == "down", "a link in spite of the faults");
    ensure!(info.number("rdma_links_over_tcp")? == 0, "a link over TCP");
    // A server whose link ends in the middle of its synchronization tries again at once, and
    // one whose attempt is refused a second later.
    let refused = info.number("rdma_links_refused")?;
    ensure!(refused >= 2, "{LINKS} links in vain, of which {refused} were waited for");
    const NONE: &str = "replication=require, and the last 3 links over RDMA ended before";
    ensure!(said(&requires, NONE)? as u64 >= refused, "{:?}", told(&requires)?);
    ensure!(said(&requires, "over TCP")? == 0, "{:?}", told(&requires)?);
    [prefers, requires].into_iter().try_for_each(Peer::stop)
}

/// A primary that answers over TCP, while nobody answers at the same port over RDMA, or a step
/// of the way there fails: TCP in the same attempt (`prefer`), or no link (`require`). The policy
/// can be changed while links are tried.
fn unanswered(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    // The RDMA port of that number is another server's, which is kept from running.
    let port = free_port()?;
    let right = Peer::start_with(cell, "right", "no", |settings| {
        settings.arguments = arguments(SocketAddr::new(cell.lab.address, port), "no");
    })?;
    let both = right.server.settings().rdma;
    let silent = Peer::start_with(cell, "silent", "no", |settings| {
        settings.arguments = arguments(both, "no");
    })?;
    fill(cell, &right.server)?;
    let hurried = |cell: &Cell, name: &str, replication: &str, plan: &str| {
        Peer::start_with(cell, name, replication, |settings| {
            settings.arguments.push("handshake-timeout=500".to_owned());
            if plan.starts_with("only=") {
                // It has no device to listen on either.
                settings
                    .arguments
                    .retain(|it| !it.starts_with("bind=") && !it.starts_with("port="));
            }
            settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
        })
    };
    const WHY: &str = "no connection over RDMA: Connection timed out";
    let prefers = hurried(cell, "prefers", "prefer", "seed=1")?;
    let requires = hurried(cell, "requires", "require", "seed=1")?;
    let paused = silent.server.pause();
    prefers.follow_at(both)?;
    requires.follow_at(both)?;
    linked(&prefers)?;
    same(&right.server, &prefers)?;
    ensure!(prefers.transport()? == "tcp", "the link: {}", prefers.transport()?);
    let attempts = prefers.server.log_lines("REPLICA sync started")?.len();
    ensure!(attempts == 1, "{attempts} attempts");
    ensure!(said(&prefers, WHY)? == 1, "{:?}", told(&prefers)?);
    cell.figure("the log", told(&prefers)?.pop().context("no line")?);
    let refused = || Ok(requires.info()?.number("rdma_links_refused")? >= 2);
    wait("two attempts that are refused", patience, refused)?;
    ensure!(requires.info()?.text("master_link_status")? == "down", "a link");
    ensure!(said(&requires, WHY)? == 1, "{:?}", told(&requires)?);
    requires.ask("CONFIG SET rdma.replication prefer")?;
    linked(&requires)?;
    same(&right.server, &requires)?;
    ensure!(requires.transport()? == "tcp", "the link: {}", requires.transport()?);
    drop(paused);
    // An address that no device of the replica's reaches, a request that is lost, and a
    // connection that is lost while the server behind it is being asked.
    fill(cell, cell.server())?;
    for plan in ["only=127.0.0.77", "lose-req", "lose-transfer@1"] {
        let peer = hurried(cell, &format!("prefers-{plan}"), "prefer", plan)?;
        peer.follow(cell)?;
        linked(&peer)?;
        same(cell.server(), &peer).with_context(|| plan.to_owned())?;
        ensure!(peer.transport()? == "tcp", "{plan}: the link: {}", peer.transport()?);
        let attempts = peer.server.log_lines("REPLICA sync started")?.len();
        ensure!(attempts == 1, "{plan}: {attempts} attempts");
        ensure!(said(&peer, "over TCP: no connection over RDMA")? == 1, "{:?}", told(&peer)?);
        cell.figure(plan, told(&peer)?.pop().context("no line")?);
        peer.stop()?;
    }
    // Once is not for ever.
    let peer = hurried(cell, "requires-later", "require", "lose-transfer@1")?;
    peer.follow(cell)?;
    peer.linked_over_rdma()?;
    ensure!(peer.info()?.number("rdma_links_refused")? == 1, "it was not refused once");
    [peer, prefers, requires, silent, right].into_iter().try_for_each(Peer::stop)
}

/// A link that the operator ends in each of its steps: nothing of it stays, and the next one
/// comes about.
fn closed(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    // Whatever comes over RDMA comes late, so that each step takes a while.
    let replica = with_faults(cell, "replica", "require", "wc-delay=60000")?;
    let at_rest = |replica: &Peer| -> Result<usize> {
        wait("no connection", patience, || {
            let info = replica.info()?;
            Ok(info.sum(&["rdma_connections_established", "rdma_connections_handshaking"])? == 0)
        })?;
        replica.server.descriptors()
    };
    // The first link sets up what stays.
    replica.follow(cell)?;
    replica.linked_over_rdma()?;
    replica.ask("REPLICAOF NO ONE")?;
    let before = at_rest(&replica)?;
    let mut handed_over = Vec::new();
    for step in 0..12 {
        let links = replica.info()?.number("rdma_links_over_rdma")?;
        replica.follow(cell)?;
        std::thread::sleep(Duration::from_millis(25 * step));
        replica.ask("REPLICAOF NO ONE")?;
        ensure!(replica.info()?.text("role")? == "master", "still a replica");
        handed_over.push(replica.info()?.number("rdma_links_over_rdma")? > links);
    }
    ensure!(!handed_over[0] && handed_over.contains(&true), "all in one step: {handed_over:?}");
    // The server behind the address says nothing over TCP.
    let deaf = std::net::TcpListener::bind((cell.lab.address, 0))?;
    for _ in 0..3 {
        replica.follow_at(deaf.local_addr()?)?;
        std::thread::sleep(Duration::from_millis(50));
        replica.ask("REPLICAOF NO ONE")?;
    }
    drop(deaf);
    wait("the descriptors that there were", patience, || Ok(at_rest(&replica)? == before))?;
    replica.follow(cell)?;
    replica.linked_over_rdma()?;
    same(cell.server(), &replica)?;
    cell.wait_info("one replica", |info| Ok(info.number("connected_slaves")? == 1))?;
    replica.stop()
}

/// A primary that stops in the middle of a full synchronization, without a word: the replica
/// gives up after `repl-timeout`, though it reads as one that waits, and serves its own clients
/// over RDMA before and after.
fn load(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill_slowly_sent(cell, cell.server())?;
    let replica = Peer::start(cell, "replica", "require")?;
    replica.ask("CONFIG SET repl-timeout 3")?;
    for load in ["disabled", "swapdb"] {
        replica.ask(&format!("CONFIG SET repl-diskless-load {load}"))?;
        let own = replica.server.settings().rdma;
        let options = cell.options();
        let mut client = client::rdma::Connection::client(own, &options, patience)?;
        replica.follow(cell)?;
        amid_sync(&replica, cell.server())?;
        // Also one that loads its memory answers, if only that it does.
        for _ in 0..20 {
            client.words("PING").with_context(|| load.to_owned())?;
        }
        let paused = cell.server().pause();
        let began = Instant::now();
        let over = wait("a replica that gives up", patience, || {
            let info = replica.info()?;
            Ok(info.number("master_sync_in_progress")? == 0 && info.number("loading")? == 0)
        });
        let took = began.elapsed();
        drop(paused);
        over.with_context(|| load.to_owned())?;
        ensure!(took > Duration::from_secs(2), "{load}: given up after {} ms", took.as_millis());
        expect(&mut client, "PING", "PONG").with_context(|| load.to_owned())?;
        cell.figure(load, format!("given up after {} ms", took.as_millis()));
        replica.ask("REPLICAOF NO ONE")?;
        cell.wait_info("no child", |info| Ok(info.number("rdb_bgsave_in_progress")? == 0))?;
    }
    ask(cell.server(), "CONFIG SET rdb-key-save-delay 0", patience)?;
    replica.follow(cell)?;
    replica.linked_over_rdma()?;
    same(cell.server(), &replica)?;
    replica.stop()
}

/// In the middle of a full synchronization the replica is sent to another primary, or is shut
/// down.
fn abort(cell: &mut Cell) -> Result<()> {
    fill_slowly_sent(cell, cell.server())?;
    let other = Peer::start(cell, "other", "no")?;
    other.ask("SET other 1")?;
    for load in ["disabled", "swapdb"] {
        let mut replica = Peer::start(cell, load, "require")?;
        replica.ask(&format!("CONFIG SET repl-diskless-load {load}"))?;
        // A server that loads its memory takes no such command.
        if load == "disabled" {
            replica.follow(cell)?;
            amid_sync(&replica, cell.server())?;
            replica.follow_at(other.server.settings().rdma)?;
            replica.linked_over_rdma().context("another primary")?;
            same(&other.server, &replica)?;
            cell.wait_info("no child", |info| Ok(info.number("rdb_bgsave_in_progress")? == 0))?;
        }
        replica.follow(cell)?;
        amid_sync(&replica, cell.server())?;
        let began = Instant::now();
        let status = replica.server.stop()?;
        no_crash(&replica.server)?;
        ensure!(status.success(), "{load}: the replica ended with {status}");
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(10), "{load}: {} ms to shut down", took.as_millis());
        cell.figure(&format!("shutdown, {load}"), format!("{} ms", took.as_millis()));
        cell.wait_info("no replica and no child", |info| {
            Ok(info.number("connected_slaves")? == 0
                && info.number("rdb_bgsave_in_progress")? == 0
                && info.number("rdma_connections_established")? == 0)
        })?;
    }
    other.stop()
}

/// Has a server give up a peer that is silent for a second.
fn short_of_patience(settings: &mut Settings) {
    settings.arguments.push("keepalive-interval=300".to_owned());
    settings.arguments.push("keepalive-probes=3".to_owned());
}

/// Either side is asleep for longer than the other one waits for a sign of life, while the
/// primary is written to: the link is over, and resumed when the sleeper wakes up.
fn asleep(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let replica = Peer::start_with(cell, "replica", "require", short_of_patience)?;
    replica.follow(cell)?;
    replica.linked_over_rdma()?;
    const NAP: Duration = Duration::from_secs(4);
    let writer = Writer::start(cell.server(), patience)?;
    let paused = replica.server.pause();
    std::thread::sleep(NAP);
    let ended = cell.info().and_then(|info| info.number("rdma_ended_by_timeout"));
    drop(paused);
    ensure!(ended? == 1, "the primary has waited");
    cell.wait_info("a resumed link", |info| Ok(info.number("sync_partial_ok")? == 1))?;
    linked(&replica)?;
    writer.stop()?;
    same(cell.server(), &replica)?;
    let paused = cell.server().pause();
    std::thread::sleep(NAP);
    let status = replica.info();
    drop(paused);
    let status = status?;
    ensure!(status.number("rdma_ended_by_timeout")? == 1, "the replica has waited");
    ensure!(status.text("master_link_status")? == "down", "a link to one that is asleep");
    cell.wait_info("a resumed link", |info| Ok(info.number("sync_partial_ok")? == 2))?;
    replica.linked_over_rdma()?;
    expect(&mut cell.tcp()?, "SET after sleep", "OK")?;
    same(cell.server(), &replica)?;
    ensure!(cell.info()?.number("sync_full")? == 1, "more than one full synchronization");
    replica.stop()
}
