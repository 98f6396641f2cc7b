// SPDX-License-Identifier: BSD-3-Clause
//! Three servers that follow each other for a long time on a fabric that fails: links are
//! killed at either end, servers sleep, are killed and come back, and the roles change. Writers
//! count what was acknowledged.
//!
//! Two of the servers open their links over RDMA and, where that fails, over TCP; the third
//! one opens its over TCP, so that each loss has TCP's beside it. `REPL_SOAK_SECONDS` says how
//! long, `SOAK_SEED` which chances. Chance decides what strikes, not when.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::{Client, tcp};
use fastrand::Rng;

use super::peers::{Peer, primary, same, wait};
use super::soak::{seed, server_faults};
use crate::cell::{Case, Cell};
use crate::server::{Server, Settings};

pub const CASES: &[Case] = &[Case::new("repl-soak", soak).with(primary).unstarted()];

const SECONDS: u64 = 90;
/// Between two changes of roles.
const ROUND: Duration = Duration::from_secs(20);
const NAMES: [&str; 3] = ["one", "two", "by-tcp"];
const WRITERS: usize = 4;
/// Values that a writer has at a time.
const VALUES: u64 = 1000;
/// Within what time every link is up again: three in vain, one over TCP.
const LINKED: Duration = Duration::from_secs(60);
/// What may have been acknowledged and not have left a server that is killed, beyond what TCP
/// loses in the same run: the links over TCP have no faults, and a kernel still sends what a dead
/// process has written, while a device does not. About a second of what is written.
const UNSENT: u64 = 400;
/// Memory that a server may keep for good; what it has itself does not grow.
const GROWTH: u64 = 48 << 20;
/// Descriptors that come and go.
const DESCRIPTORS: usize = 12;

/// Where writers write at this moment, if anywhere.
type Place = Arc<Mutex<Option<SocketAddr>>>;

/// A client that counts on a server, wherever it is, and writes a value each time.
struct Counter {
    acknowledged: Arc<AtomicU64>,
    writes: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

struct Crew {
    place: Place,
    stop: Arc<AtomicBool>,
    counters: Vec<Counter>,
}

impl Crew {
    fn start(patience: Duration) -> Self {
        let (place, stop) = (Place::default(), Arc::new(AtomicBool::new(false)));
        let counter = |number: usize| {
            let (acknowledged, writes) = <(Arc<AtomicU64>, Arc<AtomicU64>)>::default();
            let (place, stop) = (Arc::clone(&place), Arc::clone(&stop));
            let (last, count) = (Arc::clone(&acknowledged), Arc::clone(&writes));
            let work = move || {
                while !stop.load(Ordering::Relaxed) {
                    let Some(at) = read(&place) else {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    // Who was turned away takes a moment.
                    std::thread::sleep(Duration::from_millis(5));
                    let Ok(mut client) = tcp::Connection::client(at, patience) else { continue };
                    while !stop.load(Ordering::Relaxed) && read(&place) == Some(at) {
                        let Ok(value) = write(&mut client, number) else { break };
                        last.store(value, Ordering::Relaxed);
                        count.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_micros(500));
                    }
                }
            };
            Counter { acknowledged, writes, thread: std::thread::spawn(work) }
        };
        let counters = (0..WRITERS).map(counter).collect();
        Self { place, stop, counters }
    }

    /// From now on they write here, or nowhere.
    fn send_to(&self, server: Option<&Server>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) =
            server.map(Server::tcp_address);
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.counters.iter().map(|it| it.acknowledged.load(Ordering::Relaxed)).collect()
    }

    fn writes(&self) -> u64 {
        self.counters.iter().map(|it| it.writes.load(Ordering::Relaxed)).sum()
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for counter in self.counters {
            counter.thread.join().expect("a writer does not panic");
        }
    }
}

fn read(place: &Place) -> Option<SocketAddr> {
    *place.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(client: &mut Client<tcp::Connection>, number: usize) -> Result<u64> {
    let reply = client.words(&format!("INCR count:{number}"))?;
    ensure!(!reply.is_error(), "INCR: {reply}");
    let count: u64 = reply.text().parse()?;
    let key = format!("value:{number}:{}", count % VALUES);
    let value = count.to_string().repeat(1 + (count % 300) as usize);
    client.command(&[b"SET", key.as_bytes(), value.as_bytes()])?;
    Ok(count)
}

/// What of the counts a server does not have.
fn lost(peer: &Peer, counts: &[u64]) -> Result<u64> {
    let mut client = peer.client()?;
    let mut lost = 0;
    for (number, count) in counts.iter().enumerate() {
        let text = client.words(&format!("GET count:{number}"))?.text();
        lost += count.saturating_sub(text.parse().unwrap_or(0));
    }
    Ok(lost)
}

/// What was seen in all.
#[derive(Default)]
struct Seen {
    killed: u64,
    handed_over: u64,
    /// Times when a failover left two primaries.
    both: u64,
    links_killed: u64,
    lost_over_rdma: u64,
    lost_over_tcp: u64,
    over_rdma: u64,
    over_tcp: u64,
}

struct Soak<'a> {
    cell: &'a Cell<'a>,
    rng: Rng,
    peers: Vec<Peer>,
    /// Descriptors and resident memory of each server, when it was first looked at.
    before: Vec<Option<(usize, u64)>>,
    at: usize,
    crew: Crew,
    seen: Seen,
}

impl Soak<'_> {
    fn others(&self) -> Vec<usize> {
        (0..self.peers.len()).filter(|&index| index != self.at).collect()
    }

    /// Waits until everybody follows the primary.
    fn linked(&self) -> Result<()> {
        let address = self.peers[self.at].server.settings().rdma;
        for index in self.others() {
            let peer = &self.peers[index];
            let up = || {
                let info = peer.info()?;
                Ok(info.text("role")? == "slave"
                    && info.number("master_port")? == u64::from(address.port())
                    && info.text("master_link_status")? == "up")
            };
            wait("a link that is up", LINKED, up).with_context(|| {
                let log = peer.server.log().unwrap_or_default();
                format!("{}: {}", NAMES[index], crate::process::tail(&log))
            })?;
        }
        Ok(())
    }

    /// Waits until everybody has what the primary has at this moment. A link may be up on which
    /// nothing has arrived for seconds, with the faults that the fabric has.
    fn reached(&self) -> Result<()> {
        let offset = self.peers[self.at].info()?.number("master_repl_offset")?;
        for index in self.others() {
            let there = || Ok(self.peers[index].info()?.number("slave_repl_offset")? >= offset);
            wait("a replica that has what its primary has", LINKED, there)
                .with_context(|| NAMES[index].to_owned())?;
        }
        Ok(())
    }

    /// Sends everybody to the primary. One that loads its memory takes no such command.
    fn follow(&self, primary: SocketAddr) -> Result<()> {
        let line = format!("REPLICAOF {} {}", primary.ip(), primary.port());
        self.others().into_iter().try_for_each(|index| {
            let taken = || Ok(!self.peers[index].client()?.words(&line)?.is_error());
            wait("a server that takes REPLICAOF", LINKED, taken)
        })
    }

    /// Links come to an end, and servers sleep, for a while.
    fn trouble(&mut self, until: Instant) -> Result<()> {
        while Instant::now() < until {
            let others = self.others();
            let replica = &self.peers[*self.rng.choice(&others).expect("some")];
            match self.rng.u32(0..10) {
                0..4 => {
                    replica.ask("CLIENT KILL TYPE master")?;
                    self.seen.links_killed += 1;
                }
                4..7 => {
                    self.peers[self.at].ask("CLIENT KILL TYPE replica")?;
                    self.seen.links_killed += 1;
                }
                7 => {
                    let paused = replica.server.pause();
                    std::thread::sleep(Duration::from_millis(self.rng.u64(100..1500)));
                    drop(paused);
                }
                8 => drop(replica.client()?.words("BGSAVE")?),
                _ => {
                    let to = ["prefer", "require"][self.rng.usize(0..2)];
                    // The one that has no such links refuses.
                    drop(replica.client()?.words(&format!("CONFIG SET rdma.replication {to}"))?);
                }
            }
            std::thread::sleep(Duration::from_millis(self.rng.u64(200..2000)));
        }
        for peer in &self.peers {
            drop(peer.client()?.words("CONFIG SET rdma.replication prefer")?);
        }
        Ok(())
    }

    /// The primary hands its role over: nothing may be lost.
    fn hand_over(&mut self) -> Result<()> {
        self.linked()?;
        let others = self.others();
        let next = *self.rng.choice(&others).expect("some");
        let address = self.peers[next].server.settings().rdma;
        let (host, port) = (address.ip(), address.port());
        let line = format!("FAILOVER TO {host} {port} TIMEOUT 30000");
        // It takes a moment until the primary knows what the replica knows.
        wait("a replica that is fit for FAILOVER", LINKED, || {
            Ok(self.peers[self.at].client()?.words(&line)?.text() == "OK")
        })?;
        let done = || -> Result<bool> {
            let info = self.peers[self.at].info()?;
            Ok(info.text("master_failover_state")? == "no-failover")
        };
        wait("the end of FAILOVER", LINKED, done)?;
        self.crew.send_to(None);
        let counts = self.crew.acknowledged();
        let leads = |index: usize| -> Result<bool> {
            Ok(self.peers[index].info()?.text("role")? == "master")
        };
        // Who was the primary still is if the time was over.
        match (leads(self.at)?, leads(next)?) {
            (false, true) => {
                self.at = next;
                self.seen.handed_over += 1;
                // Nobody tells the third.
                self.follow(address)?;
            }
            // The link ended between the request and its answer. The server takes that for a
            // refusal, over any transport, and goes on; the other one has taken over.
            (true, true) => {
                self.seen.both += 1;
                self.follow(self.peers[self.at].server.settings().rdma)?;
            }
            _ => {}
        }
        let lost = lost(&self.peers[self.at], &counts)?;
        ensure!(lost == 0, "{lost} acknowledged writes are lost by FAILOVER");
        Ok(())
    }

    /// The primary is killed while it is written to, and comes back as a replica of the one that
    /// got furthest.
    fn kill(&mut self) -> Result<()> {
        self.linked()?;
        let over: Vec<_> = self
            .others()
            .into_iter()
            .map(|index| Ok((index, self.peers[index].transport()? == "rdma")))
            .collect::<Result<_>>()?;
        self.count(self.at)?;
        self.reached()?;
        self.peers[self.at].server.kill()?;
        self.crew.send_to(None);
        std::thread::sleep(Duration::from_millis(200));
        let counts = self.crew.acknowledged();
        let mut behind = Vec::new();
        for &(index, rdma) in &over {
            let lost = lost(&self.peers[index], &counts)?;
            let sum = match rdma {
                true => &mut self.seen.lost_over_rdma,
                false => &mut self.seen.lost_over_tcp,
            };
            *sum += lost;
            behind.push((lost, index));
        }
        let next = behind.iter().min().expect("some").1;
        self.peers[next].ask("REPLICAOF NO ONE")?;
        let killed = std::mem::replace(&mut self.at, next);
        self.start(killed)?;
        let address = self.peers[next].server.settings().rdma;
        self.follow(address)?;
        self.seen.killed += 1;
        Ok(())
    }

    /// Starts one that was killed, with other faults.
    fn start(&mut self, index: usize) -> Result<()> {
        let plan = plan(&mut self.rng);
        let peer = &mut self.peers[index];
        let change = |settings: &mut Settings| {
            settings.environment.retain(|(name, _)| name != "SOFTRDMA_FAULTS");
            settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.clone()));
        };
        peer.again_with(self.cell, change).with_context(|| plan.clone())?;
        self.before[index] = None;
        Ok(())
    }

    /// Nobody writes: everybody has the same data, and holds what it held.
    fn look(&mut self) -> Result<()> {
        self.crew.send_to(None);
        self.linked()?;
        for index in self.others() {
            same(&self.peers[self.at].server, &self.peers[index])
                .with_context(|| NAMES[index].to_owned())?;
        }
        for (index, peer) in self.peers.iter().enumerate() {
            let name = NAMES[index];
            let info = peer.info()?;
            let nudges = info.number("rdma_watchdog_nudges")?;
            ensure!(nudges == 0, "{name}: the watchdog had to nudge {nudges} connections");
            ensure!(info.number("rdma_violations")? == 0, "{name} speaks of violations");
            let holds = (peer.server.descriptors()?, peer.server.resident()?);
            let before = *self.before[index].get_or_insert(holds);
            ensure!(
                holds.0 <= before.0 + DESCRIPTORS && holds.1 <= before.1 + GROWTH,
                "{name}: descriptors and memory were {before:?} and are {holds:?}"
            );
            let busy = peer.server.main_thread_cpu()?;
            std::thread::sleep(Duration::from_secs(1));
            let busy = peer.server.main_thread_cpu()? - busy;
            ensure!(busy < Duration::from_millis(500), "{name}: {busy:?} of an idle second");
        }
        Ok(())
    }

    /// Notes what carried the links of a server that ends.
    fn count(&mut self, index: usize) -> Result<()> {
        let info = self.peers[index].info()?;
        self.seen.over_rdma += info.number("rdma_links_over_rdma")?;
        self.seen.over_tcp += info.number("rdma_links_over_tcp")?;
        Ok(())
    }
}

/// Faults that leave a server its device and its memory.
fn plan(rng: &mut Rng) -> String {
    let mut plan = server_faults(rng);
    plan.retain(|term| {
        !["reg-mr", "memlock", "remove-device"].iter().any(|it| term.starts_with(it))
    });
    plan.join(" ")
}

fn soak(cell: &mut Cell) -> Result<()> {
    let seconds = match std::env::var("REPL_SOAK_SECONDS") {
        Ok(text) => text.parse().with_context(|| format!("REPL_SOAK_SECONDS '{text}'"))?,
        Err(_) => SECONDS,
    };
    let seed = seed()?;
    cell.figure("seed", seed);
    let seen = lives(cell, seed, Duration::from_secs(seconds))
        .with_context(|| format!("again by: SOAK_SEED={seed} scripts/test.sh {}", cell.id))?;
    for (name, value) in seen {
        cell.figure(name, value);
    }
    Ok(())
}

fn lives(cell: &Cell, seed: u64, duration: Duration) -> Result<Vec<(&'static str, String)>> {
    let mut rng = Rng::with_seed(seed);
    let mut peers = Vec::new();
    for name in NAMES {
        let replication = if name == "by-tcp" { "no" } else { "prefer" };
        let plan = plan(&mut rng);
        peers.push(
            Peer::start_with(cell, name, replication, |settings| {
                settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.clone()));
                settings.arguments.push("keepalive-interval=1000".to_owned());
            })
            .with_context(|| plan)?,
        );
    }
    peers[0].ask("DEBUG POPULATE 3000 key 1000")?;
    for peer in &peers[1..] {
        peer.follow_at(peers[0].server.settings().rdma)?;
    }
    let crew = Crew::start(cell.lab.patience());
    let before = vec![None; peers.len()];
    let mut soak = Soak { cell, rng, peers, before, at: 0, crew, seen: Seen::default() };
    let (began, end) = (Instant::now(), Instant::now() + duration);
    let mut rounds = 0;
    while Instant::now() < end {
        soak.crew.send_to(Some(&soak.peers[soak.at].server));
        soak.trouble(end.min(Instant::now() + ROUND))?;
        let what = format!("round {rounds}, {} s", began.elapsed().as_secs());
        match rounds % 2 {
            0 => soak.hand_over().context(what.clone())?,
            _ => soak.kill().context(what.clone())?,
        }
        soak.look().context(what)?;
        rounds += 1;
    }
    (0..NAMES.len()).try_for_each(|index| soak.count(index))?;
    let Soak { peers, crew, seen, .. } = soak;
    let writes = crew.writes();
    crew.end();
    peers.into_iter().try_for_each(Peer::stop)?;
    ensure!(rounds > 1 && writes > 1000, "{rounds} rounds, {writes} writes: nothing was tested");
    let bound = seen.lost_over_tcp + UNSENT * seen.killed;
    ensure!(seen.lost_over_rdma <= bound, "{} writes lost over RDMA", seen.lost_over_rdma);
    Ok(vec![
        ("acknowledged writes", writes.to_string()),
        ("FAILOVER, nothing lost", seen.handed_over.to_string()),
        ("FAILOVER, both were primaries after it", seen.both.to_string()),
        ("primaries killed", seen.killed.to_string()),
        (
            "acknowledged and not on a replica of these",
            format!("{} over RDMA, {} over TCP", seen.lost_over_rdma, seen.lost_over_tcp),
        ),
        ("links killed", seen.links_killed.to_string()),
        ("links opened", format!("{} over RDMA, {} over TCP", seen.over_rdma, seen.over_tcp)),
    ])
}
