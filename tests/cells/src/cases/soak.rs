// SPDX-License-Identifier: BSD-3-Clause
//! A fabric that fails: servers and clients on which every kind of fault strikes, by chance
//! that a seed decides.
//!
//! A cell starts one server after another, each with faults of its own, and with it crews of
//! clients (`examples/soaker.rs`) whose processes have theirs. Each of these *lives* has the
//! seed after that of the life before, so that the seed of a life that fails, given as
//! `SOAK_SEED`, brings it back as the first life of the same cell. Chance decides what strikes,
//! not when: threads and processes take turns as they like.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use client::Error;
use fastrand::Rng;

use super::basics::expect;
use super::hostile::Holdings;
use crate::cell::{Case, Cell};
use crate::process::run;
use crate::tools::Pinger;

pub const CASES: &[Case] = &[
    Case::new("soak", |cell| soak(cell, 2)).unstarted(),
    Case::new("soak-long", |cell| soak(cell, 30)).unstarted(),
];

/// Crews that a server sees one after the other, each with faults of its own; and at most,
/// while its memory has grown with each.
const WAVES: usize = 3;
const MOST_WAVES: usize = 10;
/// Traffic of one of them.
const SHIFT: Duration = Duration::from_secs(2);
/// Crews at a time, and clients in one.
const CREWS: usize = 2;
const CLIENTS: usize = 4;
/// How long the TCP client waits for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Resident memory that grows by more in every wave is leaked; in one or two, allocators may have
/// kept it.
const GROWTH: u64 = 4 << 20;

/// What was seen in all.
#[derive(Default)]
struct Seen {
    /// What crews did and met, as they print it.
    crews: [u64; 5],
    pings: u32,
    worst: Duration,
}

/// The seed that was asked for, or one that the time decides.
pub(super) fn seed() -> Result<u64> {
    match std::env::var("SOAK_SEED") {
        Ok(text) => text.parse().with_context(|| format!("SOAK_SEED '{text}'")),
        Err(_) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
            Ok(now.as_millis() as u64 % 1_000_000_000)
        }
    }
}

/// Terms of a plan of faults for a server.
pub(super) fn server_faults(rng: &mut Rng) -> Vec<String> {
    faults(rng, SERVER)
}

fn soak(cell: &mut Cell, lives: u64) -> Result<()> {
    let seed = seed()?;
    cell.figure("seed", seed);
    cell.settings.arguments.push("keepalive-interval=300".to_owned());
    let common = cell.settings.clone();
    let mut seen = Seen::default();
    for seed in seed..seed + lives {
        cell.settings = common.clone();
        life(cell, seed, &mut seen)
            .with_context(|| format!("again by: SOAK_SEED={seed} scripts/test.sh {}", cell.id))?;
    }
    let [connections, refused, lost, replies, bytes] = seen.crews;
    cell.figure(
        "connections",
        format!("{connections}, {lost} lost, {refused} more could not be opened"),
    );
    cell.figure("right replies", format!("{replies}, {} MB", bytes / 1_000_000));
    cell.figure("TCP pings", format!("{}, worst {} ms", seen.pings, seen.worst.as_millis()));
    ensure!(lost > 0, "no fault ever ended a connection: this tested nothing");
    ensure!(replies > 10 * lives, "only {replies} replies: this tested nothing");
    Ok(())
}

/// One server, from its start to its end.
fn life(cell: &mut Cell, seed: u64, seen: &mut Seen) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let mut faults = faults(&mut rng, SERVER);
    let window = *rng.choice(&["64k", "300k", "1m", "1m"]).expect("some");
    cell.settings.arguments.push(format!("rx-size={window}"));
    let settings = cell.settings.clone();
    let mut start = |faults: &[String]| {
        cell.settings = settings.clone();
        cell.settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), faults.join(" ")));
        cell.start()
    };
    if let Err(error) = start(&faults) {
        // One that can't register memory when it starts says so and ends.
        let before = faults.len();
        faults.retain(|term| !term.starts_with("reg-mr"));
        ensure!(faults.len() < before, error.context(faults.join(" ")));
        start(&faults)?;
    }
    serve(cell, &mut rng, seen)
        .with_context(|| format!("a server with '{}', rx-size {window}", faults.join(" ")))
}

fn serve(cell: &mut Cell, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
    let pinger = Pinger::start(cell, ANSWER)?;
    // The first connection makes the server set up what it keeps for good.
    warm_up(cell)?;
    let before = Holdings::at_rest(cell)?;
    let mut resident: Vec<u64> = Vec::new();
    let grows = |sizes: &[u64]| sizes.windows(2).all(|pair| pair[1] > pair[0] + GROWTH);
    while resident.len() < WAVES || grows(&resident) {
        ensure!(
            resident.len() < MOST_WAVES,
            "resident memory grows from wave to wave, in bytes: {resident:?}"
        );
        wave(cell, rng, seen)?;
        before.wait_back(cell).with_context(|| cell.server().scene())?;
        expect(&mut cell.tcp()?, "FLUSHALL", "OK")?;
        expect(&mut cell.tcp()?, "MEMORY PURGE", "OK")?;
        resident.push(cell.server().resident()?);
    }
    let pings = pinger.end()?;
    seen.pings += pings.count;
    seen.worst = seen.worst.max(pings.worst);

    let info = cell.info()?;
    if cell.has_io_threads() && info.number("rdma_bytes_received")? > 1 << 20 {
        ensure!(info.number("rdma_reads_io")? > 0, "the I/O threads did no reads");
    }
    ensure!(info.number("rdma_violations")? == 0, "the clients are said to break the protocol");
    cell.stop()
}

/// One shift of all crews, with traffic from its first to its last moment.
fn wave(cell: &Cell, rng: &mut Rng, seen: &mut Seen) -> Result<()> {
    let soaker = cell.lab.example("soaker")?;
    let address = cell.server().rdma_address();
    let crews: Vec<_> = (0..CREWS)
        .map(|_| {
            let (soaker, folder) = (soaker.clone(), cell.folder().to_owned());
            let mut rng = rng.fork();
            std::thread::spawn(move || crew(&soaker, &folder, address, &mut rng))
        })
        .collect();
    for crew in crews {
        let done =
            crew.join().expect("a crew does not panic").with_context(|| cell.server().scene())?;
        seen.crews.iter_mut().zip(done).for_each(|(sum, count)| *sum += count);
    }
    Ok(())
}

/// The first connection that gets through.
fn warm_up(cell: &Cell) -> Result<()> {
    let deadline = Instant::now() + cell.lab.patience();
    loop {
        match cell.rdma().and_then(|mut client| expect(&mut client, "PING", "PONG")) {
            Ok(()) => return Ok(()),
            Err(error) => {
                let stuck = matches!(error.downcast_ref(), Some(Error::TimedOut(_)));
                ensure!(!stuck && Instant::now() < deadline, "the first connection: {error:#}");
            }
        }
    }
}

/// One shift of one crew.
fn crew(soaker: &Path, folder: &Path, address: SocketAddr, rng: &mut Rng) -> Result<[u64; 5]> {
    let faults = faults(rng, CLIENT).join(" ");
    let seed = rng.u32(..);
    let mut command = Command::new(soaker);
    command
        .args([address.to_string(), seed.to_string()])
        .args([SHIFT.as_millis().to_string(), CLIENTS.to_string()])
        .env("SOFTRDMA_FAULTS", &faults);
    let output = run(&mut command, b"", folder, SHIFT + Duration::from_secs(30))
        .with_context(|| format!("crew {seed} with '{faults}'"))?;
    ensure!(
        output.status.success(),
        "crew {seed} with '{faults}': {} {}",
        output.status,
        output.stderr.trim_end()
    );
    let text = output.text();
    let counts: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    counts.try_into().ok().with_context(|| format!("a crew printed '{text}'"))
}

/// A kind of fault as a plan may have it.
struct Fault {
    /// Terms of which one is taken.
    terms: &'static [&'static str],
    /// When it strikes.
    when: When,
    /// One plan in so many has it.
    share: u32,
}

/// When a fault of a plan strikes; the number is drawn between two.
enum When {
    /// One time in so many.
    Chance(u64, u64),
    /// Once, at that time.
    Once(u64, u64),
    /// It is a setting.
    Always,
}

use When::{Always, Chance, Once};

const fn fault(terms: &'static [&'static str], when: When) -> Fault {
    Fault { terms, when, share: 3 }
}

const fn rare(terms: &'static [&'static str], when: When) -> Fault {
    Fault { terms, when, share: 6 }
}

/// Statuses of a failed work request. The length error is left out: it would be the peer's.
const STATUSES: &[&str] =
    &["wc-error=4", "wc-error=9", "wc-error=10", "wc-error=11", "wc-error=12", "wc-error=13"];
const DELAYS: &[&str] = &["wc-delay=100", "wc-delay=2000", "wc-delay=30000"];
const BATCHES: &[&str] = &["wc-batch=2", "wc-batch=5", "wc-batch=30"];

/// What may strike on the server's side. What is tried again once a second must not fail
/// so often that it fails five times in a row.
const SERVER: &[Fault] = &[
    fault(&["post-send=EIO", "post-send=EINVAL"], Chance(100, 5000)),
    fault(&["post-recv=EIO", "post-recv=ENOMEM"], Chance(300, 10_000)),
    fault(&["sq-full"], Chance(20, 300)),
    fault(&["reg-mr=ENOMEM", "reg-mr=EAGAIN"], Chance(3, 30)),
    fault(STATUSES, Chance(100, 5000)),
    fault(DELAYS, Chance(10, 1000)),
    fault(BATCHES, Chance(2, 100)),
    fault(&["event-lost"], Chance(10, 300)),
    fault(&["rnr"], Chance(3, 300)),
    fault(&["lose-rep"], Chance(2, 20)),
    fault(&["lose-dreq"], Chance(1, 10)),
    fault(&["lose-transfer"], Chance(100, 5000)),
    rare(&["memlock=3000000", "memlock=8000000"], Always),
    rare(&["remove-device"], Once(50, 5000)),
];

/// What may strike on the clients' side. A client posts 1,024 receives at once, and lets the
/// server wait 655 ms when it is not ready.
const CLIENT: &[Fault] = &[
    fault(&["post-send=EIO", "sq-full"], Chance(50, 2000)),
    fault(&["post-recv=EIO"], Chance(2000, 50_000)),
    fault(&["reg-mr=ENOMEM"], Chance(3, 30)),
    fault(STATUSES, Chance(50, 2000)),
    fault(DELAYS, Chance(10, 1000)),
    fault(BATCHES, Chance(2, 100)),
    fault(&["event-lost"], Chance(10, 300)),
    fault(&["rnr"], Chance(20, 300)),
    fault(&["lose-req"], Chance(2, 20)),
    fault(&["lose-rtu"], Chance(2, 20)),
    fault(&["lose-dreq"], Chance(1, 10)),
    fault(&["lose-transfer"], Chance(50, 2000)),
    rare(&["memlock=5000000"], Always),
    rare(&["remove-device"], Once(50, 2000)),
];

/// The terms of a plan of faults, as the fabric understands them.
fn faults(rng: &mut Rng, kinds: &[Fault]) -> Vec<String> {
    let mut plan = vec![format!("seed={}", rng.u32(..))];
    for fault in kinds {
        let term = rng.choice(fault.terms).expect("a term");
        // Small numbers are as likely as large ones.
        let mut draw = |least: u64, most: u64| {
            (least as f64 * (most as f64 / least as f64).powf(rng.f64())).round()
        };
        let when = match fault.when {
            Chance(least, most) => format!("%{}", draw(least, most)),
            Once(least, most) => format!("@{}", draw(least, most)),
            Always => String::new(),
        };
        if rng.u32(0..fault.share) == 0 {
            plan.push(format!("{term}{when}"));
        }
    }
    plan
}
