// SPDX-License-Identifier: BSD-3-Clause
//! Failovers that somebody else decides: Sentinel, or the nodes of a cluster. Neither knows
//! of RDMA; addresses and ports are the same for both, so links go over RDMA before and after.
//! What a writer's replicas have confirmed survives each of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::basics::expect;
use super::peers::{Peer, Writer, ask, in_cluster, linked, missing, primary, same, wait};
use crate::cell::{Case, Cell};
use crate::server::free_port;

pub const CASES: &[Case] = &[
    Case::new("repl-sentinel", sentinel).with(primary).unstarted(),
    Case::new("repl-cluster-failover", cluster_failover)
        .with(|settings| {
            primary(settings);
            in_cluster(settings);
            settings.directives.retain(|line| !line.starts_with("cluster-node-timeout"));
            settings.directive("cluster-node-timeout 2500");
        })
        .unstarted(),
];

/// Writes that have to be confirmed before something happens.
const WRITES: u64 = 200;

/// The stock server as a Sentinel, which watches `primary`.
fn start_sentinel(cell: &Cell, primary: &Peer) -> Result<Peer> {
    let folder = cell.folder().join("sentinel");
    let port = free_port()?;
    let (at, watched) = (cell.lab.address, primary.server.settings().port);
    let lines = [
        format!("bind {}", crate::lab::LOOPBACK),
        format!("port {port}"),
        format!("dir {}", folder.display()),
        format!("logfile {}", folder.join("log").display()),
        format!("sentinel monitor cell {at} {watched} 1"),
        "sentinel down-after-milliseconds cell 1500".to_owned(),
        "sentinel failover-timeout cell 20000".to_owned(),
        String::new(),
    ];
    let sentinel = Peer::start_with(cell, "sentinel", "no", |settings| {
        settings.port = port;
        settings.module = None;
        settings.configuration = Some(lines.join("\n"));
        // A server becomes a Sentinel by its last argument.
        let words = ["sh", "-c", "exec \"$@\" --sentinel", "sh"];
        settings.prefix = words.map(str::to_owned).to_vec();
    })?;
    // Its own clocks are made for networks: it would ask every ten seconds only. One that was
    // kept from running does nothing for half a minute.
    let reply =
        sentinel.ask("SENTINEL DEBUG info-period 500 publish-period 500 tilt-period 2000")?;
    ensure!(reply == "OK", "SENTINEL DEBUG: {reply}");
    Ok(sentinel)
}

/// `SENTINEL FAILOVER`, and one because the primary was killed, which comes back as a replica.
fn sentinel(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let mut peers = Vec::new();
    for name in ["one", "two", "three"] {
        peers.push(Peer::start(cell, name, "require")?);
    }
    peers[0].ask("DEBUG POPULATE 2000 key 1000")?;
    let first = peers[0].server.settings().rdma;
    for replica in &peers[1..] {
        replica.follow_at(first)?;
    }
    peers[1..].iter().try_for_each(Peer::linked_over_rdma)?;
    let sentinel = start_sentinel(cell, &peers[0])?;
    let replicas = || Ok(sentinel.client()?.words("SENTINEL REPLICAS cell")?.elements().len() == 2);
    wait("a Sentinel that knows both replicas", patience, replicas)?;
    let mut at = 0;
    for killed in [false, true] {
        let what = if killed { "the primary is killed" } else { "SENTINEL FAILOVER" };
        let began = Instant::now();
        let writer = Writer::start_confirmed(&peers[at].server, patience, 2)?;
        writer.reaches(WRITES, patience)?;
        if killed {
            peers[at].server.kill()?;
        } else {
            // One that has not heard of a replica's priority and offset yet finds none fit.
            wait("a Sentinel that takes the command", patience, || {
                Ok(!sentinel.client()?.words("SENTINEL FAILOVER cell")?.is_error())
            })?;
        }
        let address = || -> Result<u16> {
            let reply = sentinel.client()?.words("SENTINEL GET-PRIMARY-ADDR-BY-NAME cell")?;
            let reply = match reply.is_error() {
                // As it was called up to 7.2, and is still.
                true => sentinel.client()?.words("SENTINEL GET-MASTER-ADDR-BY-NAME cell")?,
                false => reply,
            };
            Ok(reply.elements().get(1).context("no address")?.text().parse()?)
        };
        let before = peers[at].server.settings().port;
        wait("another primary", patience, || Ok(address()? != before)).context(what)?;
        let port = address()?;
        let next = peers.iter().position(|peer| peer.server.settings().port == port);
        let next = next.with_context(|| format!("{what}: nobody has port {port}"))?;
        if killed {
            peers[at].again(cell)?;
        }
        let writes = writer.cut().context(what)?;
        for (index, peer) in peers.iter().enumerate().filter(|(index, _)| *index != next) {
            wait("a replica of the new primary", patience, || {
                let info = peer.info()?;
                Ok(info.text("role")? == "slave"
                    && info.number("master_port")? == u64::from(port)
                    && info.text("master_link_status")? == "up")
            })
            .with_context(|| format!("{what}: server {index}"))?;
            peer.linked_over_rdma().with_context(|| format!("{what}: server {index}"))?;
        }
        ensure!(writes >= WRITES, "{what}: {writes} writes were confirmed");
        expect(&mut peers[next].client()?, &format!("SET after {next}"), "OK")?;
        for (index, peer) in peers.iter().enumerate() {
            if index != next {
                same(&peers[next].server, peer).with_context(|| format!("{what}: {index}"))?;
            }
            let lost = missing(&peer.server, writes, patience)?;
            ensure!(lost == 0, "{what}: {lost} of {writes} confirmed writes are lost");
        }
        cell.figure(what, format!("{} ms, {writes} confirmed", began.elapsed().as_millis()));
        at = next;
    }
    ensure!(sentinel.server.log_lines("+tilt")?.len() < 5, "a Sentinel that hardly ran");
    peers.into_iter().chain([sentinel]).try_for_each(Peer::stop)
}

/// A cluster whose nodes find that a primary is gone: its replica takes its place, and it comes
/// back as a replica. Three nodes have slots, since two have to agree; only one has data.
fn cluster_failover(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let node = |name: &str, replication: &str| Peer::start_node(cell, name, replication);
    let mut first = node("first", "require")?;
    let replica = node("replica", "require")?;
    let voters = [node("second", "no")?, node("third", "no")?];
    first.ask("CLUSTER ADDSLOTSRANGE 0 16381")?;
    voters[0].ask("CLUSTER ADDSLOTS 16382")?;
    voters[1].ask("CLUSTER ADDSLOTS 16383")?;
    for (epoch, peer) in [&first, &voters[0], &voters[1]].into_iter().enumerate() {
        peer.ask(&format!("CLUSTER SET-CONFIG-EPOCH {}", epoch + 1))?;
    }
    for peer in voters.iter().chain([&replica]) {
        peer.meet(&first.server)?;
    }
    let id = first.ask("CLUSTER MYID")?;
    let all = [&first, &replica, &voters[0], &voters[1]];
    let know = || {
        let count =
            |peer: &&Peer| Ok(peer.ask("CLUSTER NODES")?.matches(" connected").count() == 4);
        all.iter().map(count).try_fold(true, |all, one: Result<bool>| Ok(all && one?))
    };
    wait("nodes that know each other", patience, know)?;
    first.ask("DEBUG POPULATE 2000 key 1000")?;
    replica.ask(&format!("CLUSTER REPLICATE {id}"))?;
    replica.linked_over_rdma()?;
    wait("a cluster that is well", patience, || {
        let well = |peer: &&Peer| -> Result<bool> {
            Ok(peer.ask("CLUSTER INFO")?.contains("cluster_state:ok")
                && peer.ask("CLUSTER NODES")?.contains("slave"))
        };
        all.iter().map(well).try_fold(true, |all, one| Ok(all && one?))
    })?;
    let writer = Writer::start_confirmed(&first.server, patience, 1)?;
    writer.reaches(WRITES, patience)?;
    let began = Instant::now();
    first.server.kill()?;
    let writes = writer.cut()?;
    // Two have to miss it first.
    let takes = patience.max(Duration::from_secs(30));
    wait("a replica that takes over", takes, || Ok(replica.info()?.text("role")? == "master"))?;
    let took = began.elapsed();
    let lost = missing(&replica.server, writes, patience)?;
    ensure!(lost == 0, "{lost} of {writes} confirmed writes are lost");
    let slot = |peer: &Peer| peer.ask("CLUSTER NODES");
    let owner = replica.ask("CLUSTER MYID")?;
    wait("nodes that know the new owner", patience, || {
        let nodes = slot(&voters[0])?;
        let line = nodes.lines().find(|line| line.starts_with(&owner)).context("not listed")?;
        Ok(line.contains("0-16381"))
    })?;
    expect(&mut replica.client()?, "SET {w}:after failover", "OK")?;
    first.again(cell)?;
    wait("the old primary as a replica", patience, || {
        let info = first.info()?;
        Ok(info.text("role")? == "slave" && info.text("master_link_status")? == "up")
    })?;
    linked(&first)?;
    first.linked_over_rdma()?;
    same(&replica.server, &first)?;
    expect(&mut replica.client()?, "SET {w}:again 1", "OK")?;
    same(&replica.server, &first)?;
    let lost = missing(&first.server, writes, patience)?;
    ensure!(lost == 0, "{lost} of {writes} confirmed writes are lost where they were made");
    cell.figure("taken over after", format!("{} ms, {writes} confirmed", took.as_millis()));
    // The cluster's bus has stayed on TCP.
    for peer in [&first, &replica] {
        let info = peer.info()?;
        let opened = info.number("rdma_connections_opened")?;
        ensure!(opened == info.number("rdma_links_over_rdma")?, "{opened} connections opened");
    }
    let state = ask(&replica.server, "CLUSTER INFO", patience)?;
    ensure!(state.contains("cluster_state:ok"), "{state}");
    [first, replica].into_iter().chain(voters).try_for_each(Peer::stop)
}
