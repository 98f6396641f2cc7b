// SPDX-License-Identifier: BSD-3-Clause
//! Servers that follow each other: how they are started beside the cell's own, written to, and
//! compared.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::{Client, tcp};

use crate::cell::{Cell, no_crash};
use crate::info::Info;
use crate::lab::LOOPBACK;
use crate::server::{Server, Settings, free_port};

/// Data that a full synchronization moves: so many values of a size.
pub(super) const KEYS: usize = 4000;
pub(super) const VALUE: usize = 10_000;

/// Has a server be one that is replicated: RDMA and TCP have one port and one address.
pub(super) fn primary(settings: &mut Settings) {
    settings.port = settings.rdma.port();
    // Several servers whose I/O threads never rest would only wait for each other's processor.
    settings.io_threads_as_they_are();
    settings.arguments = arguments(settings.rdma, "require");
    if settings.rdma.ip() != LOOPBACK {
        settings.directive(&format!("bind {LOOPBACK} {}", settings.rdma.ip()));
    }
    settings.directive("repl-diskless-sync-delay 0");
    settings.directive("rdbcompression no");
    settings.directive("repl-backlog-size 32mb");
    settings.directive("client-output-buffer-limit replica 0 0 0");
}

pub(super) fn arguments(rdma: SocketAddr, replication: &str) -> Vec<String> {
    vec![
        format!("bind={}", rdma.ip()),
        format!("port={}", rdma.port()),
        format!("replication={replication}"),
    ]
}

/// A server beside the cell's own.
pub(super) struct Peer {
    pub(super) server: Server,
    pub(super) patience: Duration,
}

impl Peer {
    /// Starts one with the cell's settings; `replication` is the module's argument.
    pub(super) fn start(cell: &Cell, name: &str, replication: &str) -> Result<Self> {
        Self::start_with(cell, name, replication, |_| {})
    }

    pub(super) fn start_with(
        cell: &Cell,
        name: &str,
        replication: &str,
        change: impl FnOnce(&mut Settings),
    ) -> Result<Self> {
        let mut settings = cell.settings.clone();
        settings.port = free_port()?;
        settings.rdma.set_port(settings.port);
        settings.arguments = arguments(settings.rdma, replication);
        change(&mut settings);
        let folder = cell.folder().join(name);
        let server = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
        Ok(Self { server, patience: cell.lab.patience() })
    }

    /// Starts one in cluster mode, with a bus of its own.
    pub(super) fn start_node(cell: &Cell, name: &str, replication: &str) -> Result<Self> {
        Self::start_with(cell, name, replication, |settings| {
            let bus = free_port().expect("a port");
            settings.directives.retain(|line| !line.starts_with("cluster-port "));
            settings.directive(&format!("cluster-port {bus}"));
        })
    }

    /// Has a node of a cluster meet this one.
    pub(super) fn meet(&self, node: &Server) -> Result<()> {
        let own = self.server.settings();
        let bus = own.directives.iter().find_map(|line| line.strip_prefix("cluster-port "));
        let bus = bus.context("no bus")?;
        let meet = format!("CLUSTER MEET {} {} {bus}", own.rdma.ip(), own.rdma.port());
        ask(node, &meet, self.patience).map(drop)
    }

    /// Starts it again where it was, as it was.
    pub(super) fn again(&mut self, cell: &Cell) -> Result<()> {
        self.again_with(cell, |_| {})
    }

    /// Starts it again where it was, with other settings.
    pub(super) fn again_with(
        &mut self,
        cell: &Cell,
        change: impl FnOnce(&mut Settings),
    ) -> Result<()> {
        let (folder, mut settings) =
            (self.server.folder().to_owned(), self.server.settings().clone());
        change(&mut settings);
        self.server = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
        Ok(())
    }

    /// Waits until the link is up, and over RDMA.
    pub(super) fn linked_over_rdma(&self) -> Result<()> {
        linked(self)?;
        let transport = self.transport()?;
        ensure!(transport == "rdma", "the link: {transport}");
        Ok(())
    }

    pub(super) fn client(&self) -> Result<Client<tcp::Connection>> {
        self.server.tcp(self.patience)
    }

    /// A command, which has to succeed.
    pub(super) fn ask(&self, line: &str) -> Result<String> {
        ask(&self.server, line, self.patience)
    }

    pub(super) fn info(&self) -> Result<Info> {
        self.server.info(self.patience)
    }

    pub(super) fn follow(&self, cell: &Cell) -> Result<()> {
        self.follow_at(cell.server().settings().rdma)
    }

    pub(super) fn follow_at(&self, primary: SocketAddr) -> Result<()> {
        self.ask(&format!("REPLICAOF {} {}", primary.ip(), primary.port())).map(drop)
    }

    /// What carries the link to the primary, as the module tells it.
    pub(super) fn transport(&self) -> Result<String> {
        let info = self.info()?;
        let link = info.text("rdma_primary_link").unwrap_or("transport=,");
        let word = link.split(',').find_map(|field| field.strip_prefix("transport="));
        Ok(word.unwrap_or_default().to_owned())
    }

    /// Ends it; it has to be there still, and nothing may be wrong with it.
    pub(super) fn stop(mut self) -> Result<()> {
        ensure!(self.server.is_running()?, "a server has ended by itself");
        let info = self.info()?;
        if let Ok(nudges) = info.number("rdma_watchdog_nudges") {
            ensure!(nudges == 0, "the watchdog had to nudge {nudges} of a replica's connections");
        }
        let status = self.server.stop()?;
        no_crash(&self.server)?;
        ensure!(status.success(), "a server ended with {status}");
        Ok(())
    }
}

pub(super) fn ask(server: &Server, line: &str, patience: Duration) -> Result<String> {
    let reply = server.tcp(patience)?.words(line)?;
    ensure!(!reply.is_error(), "{line}: {reply}");
    Ok(reply.text())
}

/// Waits until `condition` holds.
pub(super) fn wait(
    what: &str,
    patience: Duration,
    condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let mut condition = condition;
    let deadline = Instant::now() + patience;
    while !condition()? {
        ensure!(Instant::now() < deadline, "waited {} s for: {what}", patience.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Waits until a replica's link is up.
pub(super) fn linked(peer: &Peer) -> Result<()> {
    let up = || Ok(peer.info()?.text("master_link_status")? == "up");
    wait("a link that is up", peer.patience, up).with_context(|| {
        let log = peer.server.log().unwrap_or_default();
        format!("the replica's log ends:\n{}", crate::process::tail(&log))
    })
}

/// Waits until both servers are at the same offset, and makes sure that they have the same data.
pub(super) fn same(one: &Server, other: &Peer) -> Result<()> {
    let patience = other.patience;
    let other = &other.server;
    let offset = |server: &Server| server.info(patience)?.number("master_repl_offset");
    wait("equal offsets", patience, || Ok(offset(one)? == offset(other)?))?;
    let digest = |server: &Server| ask(server, "DEBUG DIGEST", patience);
    let (left, right) = (digest(one)?, digest(other)?);
    ensure!(left == right, "the data of the primary is {left}, that of its replica {right}");
    ensure!(left != "0".repeat(40), "there is no data");
    Ok(())
}

pub(super) fn fill(cell: &Cell, server: &Server) -> Result<()> {
    let value = if cell.lab.is_slow() { VALUE / 10 } else { VALUE };
    ask(server, &format!("DEBUG POPULATE {KEYS} key {value}"), cell.lab.patience()).map(drop)
}

/// A client that writes to a server all the time, each time to another key, all of one slot.
pub(super) struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// The `at`-th write.
fn write(at: u64) -> (String, String) {
    (format!("{{w}}:{at}"), format!("{at:0>100}"))
}

impl Writer {
    pub(super) fn start(server: &Server, patience: Duration) -> Result<Self> {
        Self::start_confirmed(server, patience, 0)
    }

    /// One whose writes count when so many replicas have confirmed them (`WAIT`).
    pub(super) fn start_confirmed(
        server: &Server,
        patience: Duration,
        replicas: u64,
    ) -> Result<Self> {
        let mut client = server.tcp(patience)?;
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (until, count) = (Arc::clone(&stop), Arc::clone(&acknowledged));
        let thread = std::thread::spawn(move || {
            let mut at = 0_u64;
            while !until.load(Ordering::Relaxed) {
                let (key, value) = write(at);
                let reply = client.command(&[b"SET", key.as_bytes(), value.as_bytes()])?;
                ensure!(reply.text() == "OK", "SET: {reply}");
                at += 1;
                if replicas > 0 {
                    let reply = client.words(&format!("WAIT {replicas} 1000"))?;
                    ensure!(!reply.is_error(), "WAIT: {reply}");
                    if reply.text().parse::<u64>()? < replicas {
                        continue;
                    }
                }
                count.store(at, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(())
        });
        Ok(Self { stop, acknowledged, thread: Some(thread) })
    }

    /// How many writes count so far.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many count.
    pub(super) fn reaches(&self, writes: u64, patience: Duration) -> Result<()> {
        wait("a writer that gets on", patience, || Ok(self.acknowledged() >= writes))
    }

    fn join(&mut self) -> Result<()> {
        let ended = self.thread.take().context("joined once")?.join();
        ended.map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }

    /// Ends it. Returns how many writes count.
    pub(super) fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()?;
        Ok(self.acknowledged())
    }

    /// Its server takes no more writes, which it has to notice. Returns how many count.
    pub(super) fn cut(mut self) -> Result<u64> {
        ensure!(self.join().is_err(), "the writer did not notice");
        Ok(self.acknowledged())
    }
}

/// How many of a writer's first writes a server does not have.
pub(super) fn missing(server: &Server, writes: u64, patience: Duration) -> Result<u64> {
    let mut client = server.tcp(patience)?;
    // A replica in a cluster answers for its slots to who asks so; others don't know the command.
    client.words("READONLY")?;
    let mut missing = 0;
    for first in (0..writes).step_by(500) {
        let wanted: Vec<_> = (first..writes.min(first + 500)).map(write).collect();
        let mut words: Vec<&[u8]> = vec![b"MGET"];
        words.extend(wanted.iter().map(|(key, _)| key.as_bytes()));
        let reply = client.command(&words)?;
        ensure!(!reply.is_error(), "MGET: {reply}");
        let found = reply.elements();
        ensure!(found.len() == wanted.len(), "MGET: {} values", found.len());
        let right = found.iter().zip(&wanted).filter(|(found, (_, value))| found.text() == *value);
        missing += (wanted.len() - right.count()) as u64;
    }
    Ok(missing)
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The lines of a server's log that tell what carries a link.
pub(super) fn told(peer: &Peer) -> Result<Vec<String>> {
    peer.server.log_lines("link to the primary")
}

/// Fills a server, whose full synchronizations go without a file and take their time from now
/// on, so that something can happen in the middle of one.
pub(super) fn fill_slowly_sent(cell: &Cell, server: &Server) -> Result<()> {
    for line in ["CONFIG SET repl-diskless-sync yes", "CONFIG SET rdb-key-save-delay 500"] {
        ask(server, line, cell.lab.patience())?;
    }
    fill(cell, server)
}

/// Waits until a replica is in the middle of its full synchronization over RDMA.
pub(super) fn amid_sync(replica: &Peer, primary: &Server) -> Result<()> {
    let begun = primary.info(replica.patience)?.number("rdma_bytes_sent")?;
    wait("a synchronization under way", replica.patience, || {
        let sent = primary.info(replica.patience)?.number("rdma_bytes_sent")?;
        Ok(sent > begun + (2 << 20))
    })
}

pub(super) fn in_cluster(settings: &mut Settings) {
    settings.directive("cluster-enabled yes");
    settings.directive(&format!("cluster-port {}", free_port().expect("a port")));
    settings.directive("cluster-node-timeout 20000");
}
