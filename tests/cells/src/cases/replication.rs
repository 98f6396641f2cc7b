// SPDX-License-Identifier: BSD-3-Clause
//! Links between servers over RDMA. The cell's own server is the primary; its replicas are
//! servers of the same kind. Whatever the link carries, data and offsets have to be the same on
//! both sides, and what moved over RDMA is counted.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::basics::expect;
use super::peers::{
    KEYS, Peer, VALUE, Writer, amid_sync, arguments, ask, fill, fill_slowly_sent, in_cluster,
    linked, missing, primary, same, told, wait,
};
use crate::cell::{Case, Cell, no_crash};
use crate::server::{Server, free_port};

pub const CASES: &[Case] = &[
    Case::new("repl-full-sync", full_sync).with(primary),
    Case::new("repl-small-window", small_window).with(primary),
    Case::new("repl-partial", partial).with(|settings| {
        primary(settings);
        settings.arguments.push("linger-time=60000".to_owned());
    }),
    Case::new("repl-failover", failover).with(primary),
    Case::new("repl-chain", chain).with(primary),
    Case::new("repl-fallback", fallback).with(primary),
    Case::new("repl-wrong-server", wrong_server).with(primary),
    Case::new("repl-dual-channel", dual_channel).with(primary),
    Case::new("repl-kill", kill).with(primary),
    Case::new("repl-hazards", hazards).with(primary),
    Case::new("repl-shutdown-now", shutdown_now).with(primary),
    Case::new("repl-shutdown", shutdown).with(primary),
    Case::new("repl-cluster", cluster).with(|settings| {
        primary(settings);
        in_cluster(settings);
    }),
    Case::new("repl-table", table).unstarted(),
    Case::new("repl-refused", refused).with(primary).unstarted(),
];

/// Every way in which a replica is loaded, while the primary is written to.
fn full_sync(cell: &mut Cell) -> Result<()> {
    let replica = Peer::start(cell, "replica", "require")?;
    full_syncs(cell, replica, &["disabled", "on-empty-db", "swapdb"])
}

/// The same where the replica offers the smallest window that there is: the data ends at a
/// window's end some six hundred times, and what the primary writes only once has to fit.
fn small_window(cell: &mut Cell) -> Result<()> {
    let replica = Peer::start_with(cell, "replica", "require", |settings| {
        settings.arguments.push(String::from("rx-size=64k"));
    })?;
    full_syncs(cell, replica, &["disabled", "swapdb"])
}

fn full_syncs(cell: &mut Cell, replica: Peer, ways: &[&str]) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let mut loads = 0;
    for diskless in ["yes", "no"] {
        for load in ways {
            let what = format!("repl-diskless-sync {diskless}, repl-diskless-load {load}");
            replica.ask("REPLICAOF NO ONE")?;
            replica.ask("FLUSHALL")?;
            replica.ask(&format!("CONFIG SET repl-diskless-load {load}"))?;
            ask(cell.server(), &format!("CONFIG SET repl-diskless-sync {diskless}"), patience)?;
            ask(cell.server(), "DEBUG CHANGE-REPL-ID", patience)?;
            let writer = Writer::start(cell.server(), patience)?;
            let (began, before) = (Instant::now(), cell.info()?.number("rdma_bytes_sent")?);
            replica.follow(cell).and_then(|()| linked(&replica)).context(what.clone())?;
            let took = began.elapsed();
            writer.stop()?;
            same(cell.server(), &replica).context(what.clone())?;
            loads += 1;
            let info = cell.info()?;
            ensure!(info.number("sync_full")? == loads, "{what}: more than one attempt");
            let sent = info.number("rdma_bytes_sent")? - before;
            ensure!(sent as usize >= KEYS * VALUE, "{what}: {sent} bytes over RDMA");
            ensure!(replica.transport()? == "rdma", "{what}: {}", replica.transport()?);
            cell.figure(&what, format!("{} ms", took.as_millis()));
        }
    }
    replica.stop()
}

/// Links that are killed at either end, while the primary is written to: each is resumed, and
/// the other end hears of it at once, whatever time clients have to read their last words.
fn partial(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let replica = Peer::start(cell, "replica", "require")?;
    replica.follow(cell)?;
    linked(&replica)?;
    let writer = Writer::start(cell.server(), patience)?;
    const TIMES: u64 = 6;
    for time in 1..=TIMES {
        std::thread::sleep(Duration::from_millis(150));
        match time % 2 {
            0 => ask(cell.server(), "CLIENT KILL TYPE replica", patience)?,
            _ => replica.ask("CLIENT KILL TYPE master")?,
        };
        // Any close is over after ten seconds.
        let soon = if cell.lab.is_slow() { patience } else { Duration::from_secs(8) };
        wait("a resumed link", soon, || Ok(cell.info()?.number("sync_partial_ok")? == time))?;
        linked(&replica)?;
    }
    let writes = writer.stop()?;
    same(cell.server(), &replica)?;
    let info = cell.info()?;
    ensure!(info.number("sync_full")? == 1, "more than one full synchronization");
    let opened = replica.info()?.number("rdma_links_over_rdma")?;
    ensure!(opened == 1 + TIMES, "{opened} links over RDMA");
    cell.figure("writes meanwhile", writes);
    replica.stop()
}

/// The replica becomes the primary, and the primary its replica: both links over RDMA, and no
/// data is sent anew.
fn failover(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let replica = Peer::start(cell, "replica", "require")?;
    replica.follow(cell)?;
    linked(&replica)?;
    let address = replica.server.settings().rdma;
    let target = format!("FAILOVER TO {} {} TIMEOUT 20000", address.ip(), address.port());
    ask(cell.server(), &target, patience)?;
    cell.wait_info("the other role", |info| {
        Ok(info.text("role")? == "slave" && info.text("master_link_status")? == "up")
    })?;
    let info = replica.info()?;
    ensure!(info.text("role")? == "master", "two replicas");
    ensure!(info.number("sync_full")? == 0 && info.number("sync_partial_ok")? == 1, "a full sync");
    expect(&mut replica.client()?, "SET after failover", "OK")?;
    same(cell.server(), &replica)?;
    let link = cell.info()?.text("rdma_primary_link")?.to_owned();
    ensure!(link.starts_with("transport=rdma,"), "the old primary's link: {link}");
    replica.stop()
}

/// A replica of a replica over RDMA, and one over TCP beside it.
fn chain(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let middle = Peer::start(cell, "middle", "require")?;
    middle.follow(cell)?;
    linked(&middle)?;
    let last = Peer::start(cell, "last", "require")?;
    let by_tcp = Peer::start(cell, "by-tcp", "no")?;
    for peer in [&last, &by_tcp] {
        peer.follow_at(middle.server.settings().rdma)?;
    }
    let writer = Writer::start(cell.server(), patience)?;
    linked(&last)?;
    linked(&by_tcp)?;
    writer.stop()?;
    for peer in [&middle, &last, &by_tcp] {
        same(cell.server(), peer)?;
    }
    ensure!(last.transport()? == "rdma", "the last link: {}", last.transport()?);
    ensure!(by_tcp.transport()?.is_empty(), "a link that nobody asked for over RDMA");
    let roles = middle.ask("RDMA.CLIENTS")?;
    ensure!(roles.contains("role primary") && roles.contains("role replica"), "{roles}");
    [last, by_tcp, middle].into_iter().try_for_each(Peer::stop)
}

/// A primary that can't be had over RDMA: TCP in the same attempt, or no link at all.
fn fallback(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let without = Peer::start_with(cell, "without", "no", |settings| settings.module = None)?;
    let elsewhere = Peer::start_with(cell, "elsewhere", "no", |settings| {
        settings.rdma.set_port(free_port().expect("a port"));
        settings.arguments = arguments(settings.rdma, "no");
    })?;
    let prefers = Peer::start(cell, "prefers", "prefer")?;
    let requires = Peer::start(cell, "requires", "require")?;
    for (primary, why) in [
        (&without, "it does not tell over TCP which server it is"),
        (&elsewhere, "no connection over RDMA: Connection refused"),
    ] {
        fill(cell, &primary.server)?;
        let address = SocketAddr::new(cell.lab.address, primary.server.settings().port);
        let attempts = prefers.server.log_lines("REPLICA sync started")?.len();
        let tries = requires.info()?.number("rdma_links_refused")?;
        requires.follow_at(address)?;
        prefers.follow_at(address)?;
        linked(&prefers)?;
        same(&primary.server, &prefers)?;
        ensure!(prefers.transport()? == "tcp", "the link: {}", prefers.transport()?);
        let attempts = prefers.server.log_lines("REPLICA sync started")?.len() - attempts;
        ensure!(attempts == 1, "{attempts} attempts");
        let line = told(&prefers)?.pop().context("no line")?;
        ensure!(line.contains("over TCP") && line.contains(why), "the log says {line}");
        cell.figure("prefer", line);

        let refused = || Ok(requires.info()?.number("rdma_links_refused")? >= tries + 3);
        wait("three attempts that are refused", patience, refused)?;
        let info = requires.info()?;
        ensure!(info.text("master_link_status")? == "down", "a link in spite of require");
        let lines = told(&requires)?;
        let said = lines.iter().filter(|line| line.contains(why)).count();
        ensure!(said == 1, "{said} lines for one change: {lines:?}");
    }
    let counted = prefers.info()?.number("rdma_links_over_tcp")?;
    ensure!(counted == 2, "{counted} links over TCP");
    // A primary that can be had over RDMA is.
    fill(cell, cell.server())?;
    for peer in [&prefers, &requires] {
        peer.follow(cell)?;
        linked(peer)?;
        same(cell.server(), peer)?;
        ensure!(peer.transport()? == "rdma", "the link: {}", peer.transport()?);
    }
    [prefers, requires, without, elsewhere].into_iter().try_for_each(Peer::stop)
}

/// One address and port, and behind it one server over TCP and another one over RDMA.
fn wrong_server(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    // The cell's own server has the RDMA port, this one the TCP port of that number.
    let port = free_port()?;
    let right = Peer::start_with(cell, "right", "no", |settings| {
        settings.arguments = arguments(SocketAddr::new(cell.lab.address, port), "no");
    })?;
    let mut settings = cell.settings.clone();
    settings.port = port;
    let both = right.server.settings().port;
    settings.rdma.set_port(both);
    settings.arguments = arguments(settings.rdma, "no");
    let folder = cell.folder().join("wrong");
    let wrong = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
    fill(cell, &right.server)?;
    expect(&mut wrong.tcp(patience)?, "SET wrong server", "OK")?;
    let wrong = Peer { server: wrong, patience };
    let address = SocketAddr::new(cell.lab.address, both);
    let prefers = Peer::start(cell, "prefers", "prefer")?;
    let requires = Peer::start(cell, "requires", "require")?;
    requires.ask("SET mine 1")?;
    requires.follow_at(address)?;
    prefers.follow_at(address)?;
    linked(&prefers)?;
    same(&right.server, &prefers)?;
    ensure!(prefers.transport()? == "tcp", "the link: {}", prefers.transport()?);
    let refused = || Ok(requires.info()?.number("rdma_links_refused")? >= 3);
    wait("three attempts that are refused", patience, refused)?;
    expect(&mut requires.client()?, "GET mine", "1")?;
    for peer in [&prefers, &requires] {
        ensure!(peer.info()?.number("rdma_links_to_another_server")? > 0, "not counted");
        let line = told(peer)?.pop().context("no line")?;
        ensure!(line.contains("are not those of one server"), "the log says {line}");
        cell.figure("the log", line);
    }
    let info = wrong.info()?;
    ensure!(info.number("sync_full")? == 0, "the wrong server has sent its data");
    [prefers, requires, wrong, right].into_iter().try_for_each(Peer::stop)
}

/// Both sides offer a second channel for the data: that goes over TCP, the stream over RDMA.
fn dual_channel(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    const ON: &str = "CONFIG SET dual-channel-replication-enabled yes";
    ask(cell.server(), ON, patience)?;
    ask(cell.server(), "CONFIG SET repl-diskless-sync yes", patience)?;
    fill(cell, cell.server())?;
    let replica = Peer::start(cell, "replica", "require")?;
    replica.ask(ON)?;
    for time in 1..=2 {
        let writer = Writer::start(cell.server(), patience)?;
        let before = cell.info()?;
        replica.follow(cell)?;
        linked(&replica)?;
        writer.stop()?;
        same(cell.server(), &replica)?;
        let info = cell.info()?;
        let sent = info.number("rdma_bytes_sent")? - before.number("rdma_bytes_sent")?;
        ensure!((sent as usize) < KEYS * VALUE, "{sent} bytes over RDMA: the data too");
        ensure!(replica.transport()? == "rdma", "the link: {}", replica.transport()?);
        ensure!(info.number("total_forks")? == time, "a fork more than once");
        replica.ask("REPLICAOF NO ONE")?;
        ask(cell.server(), "DEBUG CHANGE-REPL-ID", patience)?;
    }
    replica.stop()
}

/// Either side is killed in the middle of a full synchronization, or the operator ends it.
fn kill(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill_slowly_sent(cell, cell.server())?;
    let replica = Peer::start(cell, "replica", "require")?;
    for load in ["disabled", "swapdb"] {
        replica.ask(&format!("CONFIG SET repl-diskless-load {load}"))?;
        // The primary is killed.
        let mut other = Peer::start(cell, &format!("primary-{load}"), "no")?;
        fill_slowly_sent(cell, &other.server)?;
        replica.follow_at(other.server.settings().rdma)?;
        amid_sync(&replica, &other.server)?;
        other.server.kill()?;
        wait("a link that is down", patience, || {
            let info = replica.info()?;
            Ok(info.text("master_link_status")? == "down"
                && info.number("master_sync_in_progress")? == 0
                && info.number("loading")? == 0)
        })
        .with_context(|| format!("the primary is killed, repl-diskless-load {load}"))?;
        // The operator ends it; a server that loads its memory takes no such command.
        if load == "disabled" {
            replica.follow(cell)?;
            amid_sync(&replica, cell.server())?;
            let began = Instant::now();
            replica.ask("REPLICAOF NO ONE")?;
            let took = began.elapsed();
            ensure!(took < Duration::from_secs(4), "{} ms to end it", took.as_millis());
            ensure!(replica.info()?.text("role")? == "master", "still a replica");
            cell.figure("REPLICAOF NO ONE", format!("{} ms", took.as_millis()));
            cell.wait_info("no child", |info| Ok(info.number("rdb_bgsave_in_progress")? == 0))?;
        }
        // The replica is killed.
        let mut victim = Peer::start(cell, &format!("victim-{load}"), "require")?;
        victim.ask(&format!("CONFIG SET repl-diskless-load {load}"))?;
        victim.follow(cell)?;
        amid_sync(&victim, cell.server())?;
        victim.server.kill()?;
        cell.wait_info("no replica and no child", |info| {
            Ok(info.number("connected_slaves")? == 0
                && info.number("rdb_bgsave_in_progress")? == 0
                && info.number("rdma_connections_established")? == 0)
        })?;
    }
    ask(cell.server(), "CONFIG SET rdb-key-save-delay 0", patience)?;
    replica.follow(cell)?;
    linked(&replica)?;
    same(cell.server(), &replica)?;
    replica.stop()
}

/// With `replication=no` nothing of the server is touched; otherwise two words are.
fn table(cell: &mut Cell) -> Result<()> {
    let driver = super::outgoing::module()?;
    let words = |name: &str, replication: Option<&str>| -> Result<Vec<String>> {
        let mut settings = cell.settings.clone();
        settings.directive(&format!("loadmodule {}", driver.display()));
        (settings.port, settings.module) = (free_port()?, None);
        if let Some(replication) = replication {
            settings.module = Some(cell.lab.module.clone());
            settings.arguments = arguments(settings.rdma, replication);
        }
        let folder = cell.folder().join(name);
        let mut server = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
        let reply = server.tcp(cell.lab.patience())?.words("DRIVER.TABLE")?;
        ensure!(!reply.is_error(), "DRIVER.TABLE: {reply}");
        server.stop()?;
        Ok(reply.elements().iter().map(client::Value::text).collect())
    };
    let stock = words("stock", None)?;
    ensure!(stock.len() == 30 && stock.iter().any(|word| word != "0x0"), "{stock:?}");
    ensure!(words("no", Some("no"))? == stock, "replication=no changes the table");
    // `conn_create` and `connect`.
    let wanted = if cell.id.line() == "8.0" { [9, 13] } else { [10, 14] };
    for replication in ["prefer", "require"] {
        let now = words(replication, Some(replication))?;
        let changed: Vec<_> = (0..30).filter(|&at| now[at] != stock[at]).collect();
        ensure!(changed == wanted, "replication={replication} changes the slots {changed:?}");
    }
    Ok(())
}

/// Servers in which links can't go over RDMA: refused where that is asked for, with one line.
fn refused(cell: &mut Cell) -> Result<()> {
    let falsify = cell.lab.example("libfalsify.so")?;
    let usual = cell.settings.clone();
    let digits: String = cell.id.line().split('.').map(|number| format!("{number:0>2}")).collect();
    let newer = format!("version=0x00{digits}7f");
    let mut changes = vec![
        ("hide=syncWithPrimary", "it exports no function syncWithPrimary"),
        (&newer, "is the last release of its line whose replication this module knows"),
    ];
    if cell.id.line() != "8.0" {
        // There other variables of the server lie beside it.
        changes.push(("readonly=1", "its TCP connection type lies in read-only memory"));
    }
    if cell.id.line().starts_with('9') {
        let name = "hide=slotExportConnectHandler";
        changes.push((name, "it exports no function slotExportConnectHandler"));
    }
    for (change, why) in changes {
        cell.settings = usual.clone();
        cell.settings.directive(&format!("loadmodule {} {change}", falsify.display()));
        let line = super::refusals::refusal(cell, &["not loaded: replication over RDMA is", why])
            .with_context(|| format!("a server with {change}"))?;
        cell.figure(change, line);
        if change != "readonly=1" {
            cell.settings.arguments = arguments(cell.settings.rdma, "no");
            cell.start().with_context(|| format!("replication=no and {change}"))?;
            cell.stop()?;
        }
    }
    // A policy that can't be changed while the server runs, and one that can.
    cell.settings = usual.clone();
    cell.settings.arguments = arguments(cell.settings.rdma, "prefer");
    cell.start()?;
    let mut client = cell.tcp()?;
    expect(&mut client, "CONFIG SET rdma.replication require", "OK")?;
    ensure!(cell.info()?.text("rdma_replication")? == "require", "not taken over");
    expect(&mut client, "CONFIG SET rdma.replication prefer", "OK")?;
    ensure!(client.words("CONFIG SET rdma.replication no")?.is_error(), "CONFIG SET no");
    ensure!(client.words("CONFIG SET rdma.replication yes")?.is_error(), "CONFIG SET yes");
    drop(client);
    cell.stop()?;
    cell.settings.arguments = arguments(cell.settings.rdma, "no");
    cell.start()?;
    let reply = cell.tcp()?.words("CONFIG SET rdma.replication prefer")?;
    ensure!(reply.is_error(), "CONFIG SET rdma.replication prefer: {reply}");
    // Who it is, it says without a password, and each time the same.
    let mut client = cell.tcp()?;
    expect(&mut client, "CONFIG SET requirepass secret", "OK")?;
    let mut stranger = cell.tcp()?;
    let identity = stranger.words("RDMA.IDENTITY")?;
    ensure!(identity.text().len() == 40 && !identity.is_error(), "RDMA.IDENTITY: {identity}");
    ensure!(stranger.words("GET key")?.is_error(), "GET without a password");
    ensure!(stranger.words("RDMA.IDENTITY")? == identity, "another identity");
    // What ends the cell asks as well.
    let reply = client.command(&[b"CONFIG", b"SET", b"requirepass", b""])?;
    ensure!(reply.text() == "OK", "CONFIG SET requirepass: {reply}");
    Ok(())
}

/// What befalls a link in daily life: a password, `WAIT`, a child of the replica while links
/// come and go, a replica that is asleep while the primary is written to.
fn hazards(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    fill(cell, cell.server())?;
    let mut client = cell.tcp()?;
    let mut password = |text: &str| -> Result<()> {
        let reply = client.command(&[b"CONFIG", b"SET", b"requirepass", text.as_bytes()])?;
        ensure!(reply.text() == "OK", "CONFIG SET requirepass: {reply}");
        Ok(())
    };
    password("secret")?;
    let replica = Peer::start(cell, "replica", "require")?;
    replica.follow(cell)?;
    let unheard = || Ok(!replica.server.log_lines("NOAUTH")?.is_empty());
    wait("a replica without the password", patience, unheard)?;
    ensure!(replica.info()?.text("master_link_status")? == "down", "in spite of the password");
    replica.ask("CONFIG SET masterauth secret")?;
    linked(&replica)?;
    password("")?;
    let reply = replica.client()?.command(&[b"CONFIG", b"SET", b"masterauth", b""])?;
    ensure!(reply.text() == "OK", "CONFIG SET masterauth: {reply}");
    ensure!(replica.transport()? == "rdma", "the link: {}", replica.transport()?);

    let writer = Writer::start(cell.server(), patience)?;
    let mut client = cell.tcp()?;
    for round in 0..20 {
        expect(&mut client, &format!("SET waited {round}"), "OK")?;
        expect(&mut client, "WAIT 1 10000", "1")?;
        expect(&mut replica.client()?, "GET waited", &round.to_string())?;
    }
    // A child of the replica holds copies of what it had open.
    replica.ask("CONFIG SET rdb-key-save-delay 200")?;
    replica.ask("BGSAVE")?;
    for _ in 0..3 {
        ensure!(replica.info()?.number("rdb_bgsave_in_progress")? == 1, "the child is gone");
        replica.ask("CLIENT KILL TYPE master")?;
        linked(&replica)?;
    }
    wait("the end of the child", patience, || {
        Ok(replica.info()?.number("rdb_bgsave_in_progress")? == 0)
    })?;
    ensure!(replica.info()?.text("rdb_last_bgsave_status")? == "ok", "BGSAVE failed");
    // Asleep for longer than there are receives for, and no longer than it is waited for.
    let paused = replica.server.pause();
    std::thread::sleep(Duration::from_secs(4));
    drop(paused);
    linked(&replica)?;
    writer.stop()?;
    same(cell.server(), &replica)?;
    let info = cell.info()?;
    ensure!(info.number("sync_full")? == 1, "more than one full synchronization");
    ensure!(info.number("sync_partial_ok")? == 3, "other links than those that were killed");
    replica.stop()
}

/// `SHUTDOWN` of a primary that is written to: each write that was acknowledged is on the
/// replica.
fn shutdown(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let replica = Peer::start(cell, "replica", "require")?;
    let rounds = if cell.lab.is_slow() { 2 } else { 4 };
    for round in 0..rounds {
        let mut other = Peer::start(cell, &format!("primary-{round}"), "no")?;
        replica.follow_at(other.server.settings().rdma)?;
        linked(&replica)?;
        let writer = Writer::start(&other.server, patience)?;
        writer.reaches(100, patience)?;
        ensure!(replica.transport()? == "rdma", "the link: {}", replica.transport()?);
        let status = other.server.stop()?;
        no_crash(&other.server)?;
        ensure!(status.success(), "the primary ended with {status}");
        let writes = writer.cut()?;
        ensure!(writes > 50, "{writes} writes were acknowledged");
        // What has arrived is carried out in its turn.
        wait("each write", Duration::from_secs(5), || {
            Ok(missing(&replica.server, writes, patience)? == 0)
        })
        .with_context(|| format!("round {round}: {writes} writes were acknowledged"))?;
        cell.figure(&format!("acknowledged, round {round}"), writes);
        replica.ask("REPLICAOF NO ONE")?;
        replica.ask("FLUSHALL")?;
    }
    replica.stop()
}

/// `SHUTDOWN NOW` waits for no replica. What the server has written by then still arrives, over
/// RDMA as over TCP: also where the replica has no receive at the moment, so that its device asks
/// for the work request again.
fn shutdown_now(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let start = |name: &str, replication: &str, plan: &str| {
        Peer::start_with(cell, name, replication, |settings| {
            settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
        })
    };
    let (by_rdma, by_tcp) = (start("by-rdma", "require", "rnr/3")?, start("by-tcp", "no", "")?);
    for round in 0..5 {
        let mut other = Peer::start(cell, &format!("primary-{round}"), "no")?;
        for peer in [&by_rdma, &by_tcp] {
            peer.follow_at(other.server.settings().rdma)?;
            linked(peer)?;
        }
        ensure!(by_rdma.transport()? == "rdma", "the link: {}", by_rdma.transport()?);
        // The stream goes out to those that have confirmed what they loaded.
        let mut client = other.client()?;
        expect(&mut client, "INCR begun", "1")?;
        expect(&mut client, "WAIT 2 10000", "2")?;
        let writer = Writer::start(&other.server, patience)?;
        writer.reaches(200, patience)?;
        // No answer comes.
        drop(other.client()?.words("SHUTDOWN NOW NOSAVE"));
        let status = other.server.wait_exit(patience)?;
        no_crash(&other.server)?;
        ensure!(status.success(), "the primary ended with {status}");
        let writes = writer.cut()?;
        // What has arrived is carried out in its turn.
        let lost = |peer: &Peer| {
            let mut lost = 0;
            let arrived = wait("each write", Duration::from_secs(3), || {
                lost = missing(&peer.server, writes, patience)?;
                Ok(lost == 0)
            });
            arrived.or_else(|error| if lost > 0 { Ok(()) } else { Err(error) }).map(|()| lost)
        };
        let (over_rdma, over_tcp) = (lost(&by_rdma)?, lost(&by_tcp)?);
        cell.figure(
            &format!("round {round}"),
            format!("of {writes} writes {over_rdma} lost over RDMA, {over_tcp} over TCP"),
        );
        ensure!(over_rdma <= over_tcp, "of {writes} acknowledged writes {over_rdma} are lost");
        for peer in [&by_rdma, &by_tcp] {
            peer.ask("REPLICAOF NO ONE")?;
            peer.ask("FLUSHALL")?;
        }
    }
    by_rdma.stop()?;
    by_tcp.stop()
}

/// A replica of a cluster's node, its failover, and, where the server can, slots that move to
/// another node.
fn cluster(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let replica = Peer::start_node(cell, "replica", "require")?;
    let target = Peer::start_node(cell, "target", "no")?;
    ask(cell.server(), "CLUSTER ADDSLOTSRANGE 0 16383", patience)?;
    for peer in [&replica, &target] {
        peer.meet(cell.server())?;
    }
    let id = ask(cell.server(), "CLUSTER MYID", patience)?;
    let known = |peer: &Peer, id: &str| Ok(peer.ask("CLUSTER NODES")?.contains(id));
    wait("a node that knows the other", patience, || known(&replica, &id))?;
    fill(cell, cell.server())?;
    replica.ask(&format!("CLUSTER REPLICATE {id}"))?;
    linked(&replica)?;
    same(cell.server(), &replica)?;
    ensure!(replica.transport()? == "rdma", "the link: {}", replica.transport()?);
    cell.wait_info("a replica", |info| Ok(info.number("connected_slaves")? == 1))?;
    let well = |peer: &Server| -> Result<bool> {
        Ok(ask(peer, "CLUSTER INFO", patience)?.contains("cluster_state:ok")
            && ask(peer, "CLUSTER NODES", patience)?.contains("slave"))
    };
    wait("a cluster that is well", patience, || {
        Ok(well(cell.server())? && well(&replica.server)? && well(&target.server)?)
    })?;
    // A cluster that is so young may not vote at once; an attempt takes five seconds.
    let mut next = Instant::now();
    wait("the other role", patience, || {
        let info = cell.info()?;
        if info.text("role")? == "slave" {
            return Ok(info.text("master_link_status")? == "up");
        }
        if Instant::now() >= next {
            replica.client()?.words("CLUSTER FAILOVER")?;
            next = Instant::now() + Duration::from_secs(6);
        }
        Ok(false)
    })?;
    let link = cell.info()?.text("rdma_primary_link")?.to_owned();
    ensure!(link.starts_with("transport=rdma,"), "the old primary's link: {link}");
    ensure!(replica.info()?.number("sync_full")? == 0, "data was sent anew");
    same(cell.server(), &replica)?;
    if cell.id.line().starts_with('9') {
        let to = target.ask("CLUSTER MYID")?;
        wait("a node that knows the other", patience, || known(&replica, &to))?;
        let before = replica.info()?.number("rdma_links_over_rdma")?;
        replica.ask(&format!("CLUSTER MIGRATESLOTS SLOTSRANGE 0 3900 NODE {to}"))?;
        let count = |peer: &Peer| -> Result<usize> { Ok(peer.ask("DBSIZE")?.parse()?) };
        wait("slots that have moved", patience, || {
            let (there, here) = (count(&target)?, count(&replica)?);
            Ok(there > KEYS / 8 && there + here == KEYS)
        })?;
        let links = replica.info()?.number("rdma_links_over_rdma")? - before;
        ensure!(links == 1, "{links} links over RDMA for slots that move");
    }
    [replica, target].into_iter().try_for_each(Peer::stop)
}
