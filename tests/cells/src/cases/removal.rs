// SPDX-License-Identifier: BSD-3-Clause
//! A device that goes while it is in use, and one that can do less than others.
//!
//! The software fabric removes its device after so many sends of the server, and brings it
//! back. In the virtual machine it is the kernel's own Soft-RoCE, by `rdma link delete`. Either
//! way the completion channel is in error for ever from then on, and what is left of the old
//! device is closed by librdmacm once nothing is bound to it: who uses it then has crashed.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::rdma::{self, Options};

use super::basics::expect;
use super::hostile::Holdings;
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::process::run;
use crate::server::Settings;

pub const CASES: &[Case] = &[
    Case::new("removal", |cell| removal(cell, 3)).with(removed_often),
    Case::new("removal-long", |cell| removal(cell, 200)).with(|settings| {
        everywhere(settings);
        faults(settings, "remove-device/3000 device-returns=200");
    }),
    Case::new("removal-address", removal_address).with(removed_once),
    Case::new("device-reset", device_reset).with(everywhere),
    Case::new("device-reset-address", device_reset),
    Case::new("device-limits", device_limits).unstarted(),
    Case::new("address-changes", address_changes)
        .with(|settings| faults(settings, "address-changes@20")),
];

/// Clients that connect again and again.
const CREW: usize = 50;
/// How long one of them does nothing between two requests: fifty that never rest would be what keeps
/// each other and the server waiting.
const THINKS: Duration = Duration::from_millis(10);
/// How long it waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// And for its connection: a request that comes while there is no device is lost.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a removal may take, the crew's reconnecting and the next sends included.
const ROUND: Duration = Duration::from_secs(20);
/// How long the device is away.
const AWAY: Duration = Duration::from_millis(200);
/// Within what time after its return each of the crew is answered again, and within what time
/// a client over TCP is answered all the while.
const RETURN: Duration = Duration::from_secs(5);
/// What the figures count of the latter, which on a machine that others use is not the server's
/// doing alone.
const TCP_ANSWER: Duration = Duration::from_millis(100);
/// Lines of the module's that a server may have in its log in a minute: the kinds that a removal
/// brings are let through thirty times.
const LINES: usize = 150;

/// Resident memory that may be kept for the crew's like to come: pools, the fabric's own
/// devices, which it never frees, and what a sanitizer holds back. Without one it is some 3 MiB.
const MEMORY: u64 = 24 << 20;

/// Turns of an idle event loop in a second, with plenty to spare: one that spins on a
/// descriptor makes hundreds of thousands.
pub const IDLE: f64 = 100.0;

fn faults(settings: &mut Settings, plan: &str) {
    settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
}

/// Listens on all devices.
fn everywhere(settings: &mut Settings) {
    settings.arguments.retain(|argument| !argument.starts_with("bind="));
    settings.arguments.push("bind=*".to_owned());
}

fn removed_often(settings: &mut Settings) {
    everywhere(settings);
    faults(settings, "remove-device/2000 device-returns=200");
}

/// Listens on one address, which goes with the device.
fn removed_once(settings: &mut Settings) {
    faults(settings, "remove-device@500 device-returns=1500");
}

/// Clients of which each connects, asks for as long as it is answered, and connects again.
struct Crew {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Asked>>,
}

/// What a client of the crew, or all of it, met with.
#[derive(Default)]
struct Asked {
    replies: usize,
    /// Connections that were answered.
    answered: u64,
    /// Those of them that ended without the client's doing.
    lost: u64,
    pauses: Pauses,
}

/// How long answers took.
#[derive(Default)]
struct Pauses {
    longest: Duration,
    /// Of them, those that took longer than they should.
    long: usize,
}

impl Pauses {
    fn add(&mut self, pause: Duration, most: Duration) {
        self.longest = self.longest.max(pause);
        self.long += usize::from(pause > most);
    }

    fn join(self, other: Self) -> Self {
        Self { longest: self.longest.max(other.longest), long: self.long + other.long }
    }

    fn text(&self, most: Duration) -> String {
        let [longest, most] = [self.longest, most].map(|time| time.as_millis());
        format!("{longest} ms at most, more than {most} ms {} times", self.long)
    }
}

impl Crew {
    fn start(cell: &Cell, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let address = cell.server().rdma_address();
        let client = || {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || ask(address, &stop))
        };
        let threads = (0..count).map(|_| client()).collect();
        Self { stop, threads }
    }

    fn end(self) -> Asked {
        self.stop.store(true, Ordering::Relaxed);
        let done = self.threads.into_iter().map(|it| it.join().expect("a client does not panic"));
        done.fold(Asked::default(), |sum, one| Asked {
            replies: sum.replies + one.replies,
            answered: sum.answered + one.answered,
            lost: sum.lost + one.lost,
            pauses: sum.pauses.join(one.pauses),
        })
    }
}

fn ask(address: SocketAddr, stop: &AtomicBool) -> Asked {
    let options = Options { timeout: CONNECT, ..Options::default() };
    let mut asked = Asked::default();
    let mut last = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = rdma::Connection::client(address, &options, PATIENCE) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let mut answered = false;
        while !stop.load(Ordering::Relaxed) {
            if expect(&mut client, "PING", "PONG").is_err() {
                asked.lost += u64::from(answered);
                break;
            }
            asked.answered += u64::from(!answered);
            answered = true;
            asked.replies += 1;
            asked.pauses.add(last.elapsed(), AWAY + RETURN);
            last = Instant::now();
            std::thread::sleep(THINKS);
        }
    }
    // Whoever waits still has waited so long.
    asked.pauses.add(last.elapsed(), AWAY + RETURN);
    asked
}

/// A client over TCP that asks all the time while devices come and go.
struct Bystander {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Pauses>>,
}

impl Bystander {
    fn start(cell: &Cell) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = cell.tcp()?;
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut waits = Pauses::default();
                while !stop.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    expect(&mut client, "PING", "PONG").context("a client over TCP")?;
                    waits.add(asked.elapsed(), TCP_ANSWER);
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(waits)
            }
        });
        Ok(Self { stop, thread })
    }

    fn end(self) -> Result<Pauses> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a client does not panic")
    }
}

/// Waits until a new client is served.
fn served(cell: &Cell) -> Result<()> {
    let deadline = Instant::now() + cell.lab.patience();
    loop {
        match cell.rdma().and_then(|mut client| expect(&mut client, "PING", "PONG")) {
            Ok(()) => return Ok(()),
            Err(error) => ensure!(Instant::now() < deadline, "no client is served: {error:#}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn check_log(cell: &mut Cell) -> Result<()> {
    let lines = cell.server().log_lines("<rdma>")?;
    cell.figure("lines in the log", lines.len());
    let minutes = cell.info()?.number("uptime_in_seconds")? as usize / 60 + 1;
    let most = LINES * minutes;
    ensure!(lines.len() <= most, "{} lines in the log, such as {}", lines.len(), lines[most]);
    Ok(())
}

/// How many connections there were, and what they ended by.
#[derive(Clone, Copy, Debug)]
struct Ended {
    accepted: u64,
    by_client: u64,
    by_error: u64,
}

impl Ended {
    /// Every connection that there was has ended, by its client or with the device.
    fn of(cell: &Cell) -> Result<Self> {
        let info = cell.info()?;
        let number = |name: &str| info.number(&format!("rdma_{name}"));
        let others = ["ended_by_server", "ended_by_violation", "ended_by_timeout", "violations"];
        for name in others {
            ensure!(number(name)? == 0, "{name} is {}", number(name)?);
        }
        let ended = Self {
            accepted: number("connections_accepted")?,
            by_client: number("ended_by_client")?,
            by_error: number("ended_by_error")?,
        };
        // More, where the device went in the midst of a handshake.
        ensure!(ended.by_client + ended.by_error >= ended.accepted, "not all ended: {ended:?}");
        ensure!(ended.by_error > 0, "none ended with the device: {ended:?}");
        Ok(ended)
    }

    /// Whoever lost his connection lost it with the device, and whoever left is said to have.
    fn check(&self, asked: &Asked) -> Result<()> {
        let Asked { answered, lost, .. } = *asked;
        ensure!(
            self.accepted >= answered && self.by_error >= lost && self.by_client >= answered - lost,
            "{self:?}, where {answered} connections were answered and {lost} of them lost"
        );
        Ok(())
    }
}

/// The device goes and comes again and again, while clients reconnect.
fn removal(cell: &mut Cell, removals: u64) -> Result<()> {
    served(cell)?;
    settle(cell)?;
    let rest = Holdings::at_rest(cell)?;
    let resident = cell.server().resident()?;
    let bystander = Bystander::start(cell)?;
    let crew = Crew::start(cell, CREW);
    let deadline = Instant::now() + ROUND * removals as u32;
    let seen = loop {
        match cell.info().and_then(|info| info.number("rdma_devices_lost")) {
            Ok(lost) if lost < removals && Instant::now() < deadline => {}
            other => break other,
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let asked = crew.end();
    let waits = bystander.end()?;
    let (seen, replies) = (seen?, asked.replies);
    ensure!(seen >= removals, "the device was lost {seen} times, after {replies} replies");
    cell.figure("removals", seen);
    cell.figure("time from answer to answer over RDMA", asked.pauses.text(AWAY + RETURN));
    cell.figure("answers over TCP", waits.text(TCP_ANSWER));
    ensure!(
        asked.pauses.long == 0,
        "the crew is served too late: {}",
        asked.pauses.text(AWAY + RETURN)
    );
    ensure!(waits.longest <= RETURN, "over TCP nobody is answered: {}", waits.text(TCP_ANSWER));
    served(cell).context("after the removals")?;
    settle(cell)?;
    rest.wait_back(cell)?;
    cell.check_idle(IDLE, "after the removals")?;
    let more = cell.server().resident()?.saturating_sub(resident);
    cell.figure("more resident memory", format!("{} KiB", more >> 10));
    ensure!(more <= MEMORY, "{more} bytes more are resident, after {seen} removals");
    let ended = Ended::of(cell)?;
    ended.check(&asked)?;
    let Asked { answered, lost, .. } = asked;
    cell.figure("replies", format!("{replies}, over {answered} connections, {lost} of them lost"));
    cell.figure("connections as the server counts them", format!("{ended:?}"));
    check_log(cell)?;
    cell.moved(replies * 14, replies * 7);
    Ok(())
}

/// A listener at an address goes with the device, and comes with it.
fn removal_address(cell: &mut Cell) -> Result<()> {
    let crew = Crew::start(cell, 5);
    let gone = cell.wait_info("the listener to have lost its device", |info| {
        Ok(info.number("rdma_listeners_waiting")? == 1)
    });
    let Asked { replies, .. } = crew.end();
    gone?;
    cell.check_idle(IDLE, "without the device")?;
    served(cell)?;
    ensure!(cell.info()?.number("rdma_listeners_waiting")? == 0, "a listener is said to wait");
    let again = format!("listening on {} again", cell.server().rdma_address());
    ensure!(cell.server().log_lines(&again)?.len() == 1, "no line '{again}'");
    settle(cell)?;
    Ended::of(cell)?;
    check_log(cell)?;
    cell.moved(replies * 14, replies * 7);
    Ok(())
}

fn rdma(cell: &Cell, arguments: &str) -> Result<()> {
    let mut command = Command::new("rdma");
    command.args(arguments.split(' '));
    let output = run(&mut command, b"", cell.folder(), cell.lab.patience())
        .with_context(|| format!("rdma {arguments}"))?;
    ensure!(output.status.success(), "rdma {arguments}: {}", output.stderr);
    Ok(())
}

/// The kernel's own device is removed under clients, and made again.
fn device_reset(cell: &mut Cell) -> Result<()> {
    const CLIENTS: usize = 10;
    let mut clients = (0..CLIENTS).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    rdma(cell, "link delete rxe0")?;
    cell.wait_info("the end of the device's connections", |info| {
        Ok(info.number("rdma_devices_lost")? == 1
            && info.number("rdma_connections_established")? == 0
            && info.number("rdma_registered_bytes")? == 0)
    })?;
    cell.check_idle(IDLE, "without the device")?;
    check_log(cell)?;
    drop(clients);
    rdma(cell, "link add rxe0 type rxe netdev d0")?;
    served(cell)?;
    settle(cell)?;
    cell.check_idle(IDLE, "with the device again")?;
    Ended::of(cell)?;
    check_log(cell)?;
    cell.moved(CLIENTS * 14, CLIENTS * 7);
    Ok(())
}

/// An address that moves on the device ends nothing, and is said.
fn address_changes(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    for _ in 0..40 {
        expect(&mut client, "PING", "PONG")?;
    }
    cell.server().wait_log("address of the connection of", cell.lab.patience())?;
    cell.server().wait_log("the address of a listener changed", cell.lab.patience())?;
    expect(&mut client, "PING", "PONG")?;
    served(cell)?;
    cell.moved(41 * 14, 41 * 7);
    Ok(())
}

/// Devices whose completion queues are small, can't be had, or fail.
fn device_limits(cell: &mut Cell) -> Result<()> {
    let settings = cell.settings.clone();
    let start = |cell: &mut Cell, plan: &str| {
        cell.settings = settings.clone();
        faults(&mut cell.settings, plan);
        cell.start()
    };
    // The second queue can't be had as large as it should be.
    start(cell, "cq-fails-above=8191")?;
    let mut clients = (0..100).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    drop(clients);
    settle(cell)?;
    cell.stop()?;

    // None can be large enough for one connection.
    start(cell, "max-cqe=100")?;
    ensure!(cell.rdma().is_err(), "a client is served without a completion queue");
    // The client hears of it first: the main thread writes its line before it answers others.
    expect(&mut cell.tcp()?, "PING", "PONG")?;
    let refused = cell.server().log_lines("the device's queues are too small")?;
    ensure!(refused.len() == 1, "the refusal is not explained");
    cell.stop()?;

    // One poll fails: nobody notices.
    start(cell, "poll-fails@200")?;
    let mut clients = (0..5).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    for _ in 0..300 {
        clients.iter_mut().try_for_each(|client| expect(client, "PING", "PONG"))?;
    }
    let info = cell.info()?;
    ensure!(info.number("rdma_poll_failures")? == 1, "no poll failed");
    ensure!(info.number("rdma_devices_lost")? == 0, "the device was given up");
    drop(clients);
    settle(cell)?;
    cell.stop()?;

    // All do.
    start(cell, "poll-fails")?;
    let options = Options { timeout: Duration::from_secs(2), ..cell.options() };
    // Whether it is served depends on what each poll had taken.
    drop(cell.rdma_with(&options));
    cell.wait_info("the device to be given up", |info| Ok(info.number("rdma_devices_lost")? > 0))?;
    settle(cell)?;
    cell.check_idle(IDLE, "on a device that fails")?;
    cell.stop()
}
