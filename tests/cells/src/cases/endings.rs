// SPDX-License-Identifier: BSD-3-Clause
//! How connections end and begin where the server is late, busy or has many of them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::raw::{Options, Raw};
use client::rdma::Connection;
use client::{Client, Value};

use super::basics::expect;
use super::hostile::{Holdings, Inbox, Target};
use super::operators::completion_queues;
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::info::Info;

pub const CASES: &[Case] = &[
    Case::new("idle-ends", idle)
        .with(|settings| settings.arguments.push("linger-time=6000".to_owned())),
    Case::new("left-behind", left_behind),
    Case::new("stalled-handshakes", stalled_handshakes)
        .with(|settings| settings.arguments.push("handshake-timeout=2000".to_owned())),
    Case::new("crowd-ends", |cell| crowd_ends(cell, 2000)),
    // The software fabric has descriptors of its own for each connection, and the event loop
    // takes none whose number is beyond its limit on clients.
    Case::new("crowd-ends-5000", |cell| crowd_ends(cell, 5000))
        .with(|settings| settings.directive("maxclients 19000")),
    Case::new("refused-linger", refused_linger).with(|settings| {
        settings.directive(&format!("maxclients {CLIENTS}"));
        settings.arguments.push(format!("max-handshakes={TRANSIENTS}"));
    }),
    Case::new("busy-server", busy_server).with(|settings| {
        settings.arguments.push(format!("max-handshakes={SILENT}"));
        settings.arguments.push("handshake-timeout=500".to_owned());
        settings.directive("busy-reply-threshold 50");
        settings.directive("loading-process-events-interval-bytes 1024");
    }),
];

/// A client that had nothing written to it for `linger-time` learns its end at once, and one
/// that had has its time.
fn idle(cell: &mut Cell) -> Result<()> {
    let mut admin = cell.tcp()?;
    let mut subscribers = Vec::new();
    for _ in 0..2 {
        let mut client = cell.rdma()?;
        let id = client.words("CLIENT ID")?.text();
        client.words("SUBSCRIBE news")?;
        subscribers.push((id, client));
    }
    std::thread::sleep(Duration::from_millis(6200));
    for (id, mut client) in subscribers {
        expect(&mut admin, &format!("CLIENT KILL ID {id}"), "1")?;
        // Less than `linger-time`, and much for a busy machine.
        let end = client.stream().wait_end(Instant::now() + Duration::from_secs(5));
        end.context("an idle client")?;
    }
    let mut busy = cell.rdma()?;
    let id = busy.words("CLIENT ID")?.text();
    expect(&mut admin, &format!("CLIENT KILL ID {id}"), "1")?;
    ensure!(cell.info()?.number("rdma_connections_lingering")? == 1, "no time to read");
    cell.moved(3 * 10, 3 * 4);
    Ok(())
}

/// Connections that fill the server's queue while it sleeps, and what each sends. More than a
/// pass takes from one queue, and few enough for the receives that each has.
const CROWD: usize = 225;
const WRITES: usize = 60;

/// What a client sent before it left is carried out, however much stands before it.
fn left_behind(cell: &mut Cell) -> Result<()> {
    let target = Target::of(cell);
    let options = Options { receives: 8, repost: true, memory: 4096, ..Options::default() };
    let join = || -> Result<(Raw, Inbox)> {
        let mut raw = target.open_with(&options)?;
        raw.send(&raw.window().announcement())?;
        let mut inbox = target.inbox(&mut raw)?;
        target.ping(&mut raw, &mut inbox)?;
        Ok((raw, inbox))
    };
    let mut crowd = (0..CROWD).map(|_| join()).collect::<Result<Vec<_>>>()?;
    let (mut leaver, mut its) = join()?;
    let mut admin = cell.tcp()?;
    for round in 0..2 {
        admin.request(&[b"DEBUG", b"SLEEP", b"1"])?;
        std::thread::sleep(Duration::from_millis(100));
        for (raw, inbox) in &mut crowd {
            for _ in 0..WRITES {
                inbox.say(raw, b"")?;
            }
        }
        let set = format!("*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$1\r\n{round}\r\n");
        its.say(&mut leaver, set.as_bytes())?;
        leaver.flush(target.soon())?;
        leaver.disconnect()?;
        drop(leaver);
        ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
        cell.wait_info("the leaver gone", |info| {
            Ok(info.number("rdma_connections_established")? == CROWD as u64)
        })?;
        let value = admin.words("GET key")?;
        ensure!(value == Value::Bulk(round.to_string().into()), "round {round}: SET left {value}");
        for (raw, _) in &mut crowd {
            raw.flush(target.soon())?;
        }
        (leaver, its) = join()?;
    }

    // One whose whole life passes before the server has looked: its announcement, a command, and
    // its leaving.
    let mut brief = target.open_with(&options)?;
    let mut its = target.inbox(&mut brief)?;
    admin.request(&[b"DEBUG", b"SLEEP", b"1"])?;
    std::thread::sleep(Duration::from_millis(100));
    brief.send(&brief.window().announcement())?;
    its.say(&mut brief, b"SET key brief\r\n")?;
    brief.flush(target.soon())?;
    brief.disconnect()?;
    drop(brief);
    ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
    let deadline = Instant::now() + cell.lab.patience();
    while admin.words("GET key")?.text() != "brief" {
        ensure!(Instant::now() < deadline, "a client that left at once was not heard");
        std::thread::sleep(Duration::from_millis(10));
    }
    cell.moved(CROWD * 14, CROWD * 7);
    Ok(())
}

/// Connections in handshake while the server sleeps.
const HANDSHAKES: usize = 100;

/// A server that slept for longer than `handshake-timeout` holds that against no client that
/// did its part meanwhile.
fn stalled_handshakes(cell: &mut Cell) -> Result<()> {
    let target = Target::of(cell);
    let options = Options { receives: 8, memory: 4096, ..Options::default() };
    let mut half = Vec::new();
    for _ in 0..HANDSHAKES {
        half.push(Raw::resolve(cell.server().rdma_address(), &options, target.soon())?);
    }
    let mut admin = cell.tcp()?;
    for raw in &half {
        raw.request()?;
    }
    let all = format!("rdma_connections_handshaking:{HANDSHAKES}\r");
    while !admin.words("INFO rdma")?.text().contains(&all) {}
    admin.request(&[b"DEBUG", b"SLEEP", b"2.5"])?;
    for raw in &mut half {
        raw.establish(target.soon())?;
        raw.send(&raw.window().announcement())?;
    }
    ensure!(admin.reply()?.text() == "OK", "DEBUG SLEEP");
    for (number, raw) in half.iter_mut().enumerate() {
        let mut inbox = target.inbox(raw)?;
        target.ping(raw, &mut inbox).with_context(|| format!("client {number}"))?;
    }
    ensure!(cell.info()?.number("rdma_ended_by_timeout")? == 0, "clients were given up");
    // One that does not answer is, all the same.
    let silent = target.open_with(&options)?;
    cell.wait_info("a time-out", |info| Ok(info.number("rdma_ended_by_timeout")? == 1))?;
    drop(silent);
    cell.moved(HANDSHAKES * 14, HANDSHAKES * 7);
    Ok(())
}

/// Most ends that the module may see to in one pass.
const ENDINGS_PER_PASS: u64 = 64;

/// A TCP client that pings without a pause to speak of, and its longest wait.
struct Gaps {
    worst: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Gaps {
    fn start(cell: &Cell) -> Result<Self> {
        let mut client = cell.tcp()?;
        let (worst, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (most, over) = (Arc::clone(&worst), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let sent = Instant::now();
                expect(&mut client, "PING", "PONG")?;
                most.fetch_max(sent.elapsed().as_millis() as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        Ok(Self { worst, stop, thread })
    }

    /// The longest wait since the last call, as a figure.
    fn note(&self, cell: &mut Cell, when: &str) {
        let worst = self.worst.swap(0, Ordering::Relaxed);
        cell.figure(&format!("longest wait of a TCP client, {when}"), format!("{worst} ms"));
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

/// Thousands of connections that come at once, and end at once: killed by the server, and left
/// by a process that is killed. A pass does no more of it than it may.
fn crowd_ends(cell: &mut Cell, count: u64) -> Result<()> {
    let count = if cell.lab.is_slow() { count / 10 } else { count };
    // What the server sets up once and keeps.
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    settle(cell)?;
    let mut admin = cell.tcp()?;
    let gaps = Gaps::start(cell)?;
    let rest = Holdings::at_rest(cell)?;
    for killed in [true, false] {
        gaps.note(cell, "before");
        let crowd = cell.idle_clients(count as usize)?;
        cell.wait_info("the crowd", |info| {
            Ok(info.number("rdma_connections_established")? == count)
        })?;
        gaps.note(cell, &format!("while {count} come"));
        if killed {
            let address = cell.server().rdma_address();
            expect(&mut admin, &format!("CLIENT KILL LADDR {address}"), &count.to_string())?;
            rest.wait_back(cell).context("killed by the server")?;
            gaps.note(cell, "while as many are killed");
            drop(crowd);
        } else {
            drop(crowd);
            rest.wait_back(cell).context("their process is killed")?;
            gaps.note(cell, "while as many are lost");
        }
    }
    gaps.end()?;
    let most = cell.info()?.number("rdma_endings_at_once_most")?;
    ensure!((1..=ENDINGS_PER_PASS).contains(&most), "{most} ends in one pass");
    cell.figure("most ends in one pass", most);
    let deadline = Instant::now() + cell.lab.patience();
    while completion_queues(cell)? > 1 {
        ensure!(Instant::now() < deadline, "completion queues of the peak are kept");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Clients at a time that the server of `refused-linger` has, and connections beside them.
const CLIENTS: usize = 20;
const TRANSIENTS: u64 = 50;

/// Connections that the server refuses, and that do not take the refusal, are bounded in
/// number and time.
fn refused_linger(cell: &mut Cell) -> Result<()> {
    let target = Target::of(cell);
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    settle(cell)?;
    let mut admin = cell.tcp()?;
    let mut info = || -> Result<Info> { Ok(Info::parse(&admin.words("INFO everything")?.text())) };
    let rest = Holdings::at_rest(cell)?;
    // One receive: for the server's window, and none for what it says.
    let options = Options { receives: 1, repost: false, memory: 4096, ..Options::default() };
    let mut open = VecDeque::new();
    for _ in 0..if cell.lab.is_slow() { 150 } else { 500 } {
        let mut raw = target.open_with(&options)?;
        raw.send(&raw.window().announcement())?;
        open.push_back(raw);
        if open.len() > 200 {
            open.pop_front();
        }
    }
    let said = info()?;
    let most = said.number("rdma_registered_peak_bytes")? / (32 << 10);
    cell.figure("most connections at one time", most);
    ensure!(said.number("rdma_lingering_cut_short")? > 0, "nobody had to make room");
    // Those that are over may still be on their way out.
    let limit = CLIENTS as u64 + TRANSIENTS;
    ensure!(most <= 3 * limit, "{most} connections at one time, {limit} may be");
    // The others go by themselves, although their peers are still there.
    let deadline = target.soon();
    while info()?.number("rdma_connections_lingering")? > 0 {
        ensure!(Instant::now() < deadline, "refused connections linger without end");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(open);
    // Until then there is no place for the client that asks what is left.
    while info()?.number("connected_clients")? >= CLIENTS as u64 {
        ensure!(Instant::now() < deadline, "clients that are gone stay");
        std::thread::sleep(Duration::from_millis(100));
    }
    rest.wait_back(cell)?;
    Ok(())
}

/// As many as may be in handshake.
const SILENT: usize = 3;

/// A server that carries out a script for long, or loads its data, lets go of who quits and of
/// who never speaks: it runs its event loop meanwhile, but no timers.
fn busy_server(cell: &mut Cell) -> Result<()> {
    let mut killer = cell.rdma()?;
    let mut script = cell.rdma()?;
    script.request(&[b"EVAL", b"while true do end", b"0"])?;
    wait_refused(cell, &mut killer, "Slow script detected", "BUSY")?;
    let result = comings_and_goings(cell).context("while a script runs");
    expect(&mut killer, "SCRIPT KILL", "OK")?;
    ensure!(script.reply()?.is_error(), "the script was not killed");
    result?;

    expect(&mut killer, "DEBUG POPULATE 3000 key 100", "OK")?;
    // Of each key, in microseconds.
    expect(&mut killer, "CONFIG SET key-load-delay 3000", "OK")?;
    script.request(&[b"DEBUG", b"RELOAD"])?;
    wait_refused(cell, &mut killer, "Loading RDB", "LOADING")?;
    comings_and_goings(cell).context("while the server loads")?;
    ensure!(killer.words("GET key")?.text().contains("LOADING"), "it loaded too quickly");
    expect(&mut killer, "CONFIG SET key-load-delay 0", "OK")?;
    ensure!(script.reply()?.text() == "OK", "DEBUG RELOAD");
    cell.moved(100, 100);
    Ok(())
}

/// Waits until the server is at it by its log, and answers others by this error. Not before:
/// a request that comes together with what keeps it busy waits for the end of that, over TCP
/// too.
fn wait_refused(cell: &Cell, client: &mut Client<Connection>, at: &str, error: &str) -> Result<()> {
    cell.server().wait_log(at, cell.lab.patience())?;
    let reply = client.words("GET key")?;
    ensure!(reply.text().contains(error), "'{reply}' instead of {error}");
    Ok(())
}

/// Clients that quit, and others that never speak and take all the room there is for
/// handshakes: until it is free again.
fn comings_and_goings(cell: &Cell) -> Result<()> {
    let target = Target::of(cell);
    let soon = || Instant::now() + Duration::from_secs(4);
    for _ in 0..3 {
        let (mut raw, mut inbox) = open(cell)?;
        inbox.say(&mut raw, b"QUIT\r\n")?;
        raw.wait_end(soon()).context("one that quit")?;
    }
    let options = Options { receives: 1, memory: 1, ..Options::default() };
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(target.open_with(&options)?);
    }
    for raw in &mut silent {
        raw.wait_end(soon()).context("one that never spoke")?;
    }
    drop(open(cell).context("one that comes after those")?);
    Ok(())
}

/// A client that has announced its window, and knows the server's.
fn open(cell: &Cell) -> Result<(Raw, Inbox)> {
    let target = Target::of(cell);
    let mut raw = target.open_with(&Options::default())?;
    raw.send(&raw.window().announcement())?;
    let inbox = target.inbox(&mut raw)?;
    Ok((raw, inbox))
}
