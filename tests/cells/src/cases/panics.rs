// SPDX-License-Identifier: BSD-3-Clause
//! That a panic in the module never crosses into the server, and ends one connection at
//! most. The module is the one that scripts/test.sh builds with the feature `test-panics`: a
//! file in a folder makes the next call of the function of that name panic.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::rdma::Connection;
use client::{Client, pattern, tcp};

use super::basics::expect;
use super::outgoing::{Driver, on_driver_with};
use super::peers::{Peer, linked};
use crate::cell::{Case, Cell};
use crate::lab::Lab;
use crate::server::{Settings, free_port};

pub const CASES: &[Case] = &[
    Case::new("panics", panics).unstarted(),
    Case::new("panics-outgoing", panics_outgoing),
    Case::new("panics-listening", panics_listening).unstarted(),
    Case::new("panics-links", panics_links).with(super::peers::primary),
];

/// Clients over RDMA that have nothing to do with it.
const OTHERS: usize = 3;

/// What brings the panic about, and whom it ends.
enum Act {
    /// A client comes, and is not served.
    Comes,
    /// A client that is connected sends this, and is not answered.
    Sends(&'static str),
    /// A client leaves, and nothing of it stays.
    Leaves,
    /// A client says so and leaves, after which it lingers no longer.
    Quits,
    /// A client comes and goes, and is served.
    Visits,
    /// The server does by itself what it does all the time.
    Nothing,
    /// An operator asks, and is answered.
    Asks(&'static str),
    /// The operator changes the port, which works.
    Moves,
    /// The operator changes the port, which does not work.
    Stays,
}

use Act::{Asks, Comes, Leaves, Moves, Nothing, Quits, Sends, Stays, Visits};

/// Every function that is guarded, by its name in the guard, except those of the lists that
/// follow.
const FUNCTIONS: &[(&str, Act)] = &[
    ("accept_handler", Visits),
    ("set_read_handler", Comes),
    ("accept", Comes),
    ("is_local", Comes),
    ("addr", Sends("CLIENT INFO")),
    ("read", Sends("PING")),
    ("update_state", Sends("PING")),
    ("postpone_update_state", Visits),
    ("write", Sends("PING")),
    ("writev", Sends("GET big")),
    ("set_write_handler", Sends("GET big")),
    ("close", Leaves),
    ("has_pending_data", Nothing),
    ("process_pending_data", Nothing),
    ("listen", Stays),
    ("closeListener", Moves),
    // Beside the table: what the event loop and the timers call.
    ("wake-up", Visits),
    ("connection event", Visits),
    ("completion", Visits),
    ("device event", Visits),
    ("one completion", Sends("PING")),
    ("one endpoint", Sends("PING")),
    ("handshake timer", Visits),
    ("one endpoint's handshake timer", Quits),
    ("the handshake timer's next tick", Visits),
    ("housekeeping timer", Nothing),
    ("the housekeeping timer's next tick", Nothing),
    ("the end of an endpoint", Leaves),
    ("new client", Visits),
    ("INFO", Asks("INFO everything")),
    ("a command", Asks("RDMA.STATS")),
    ("the doctor", Asks("RDMA.DOCTOR")),
    ("rdma.replication", Asks("CONFIG SET rdma.replication prefer")),
    ("the value of rdma.replication", Asks("CONFIG GET rdma.replication")),
    ("rdma.port", Stays),
    ("the value of rdma.port", Asks("CONFIG GET rdma.port")),
    ("rdma.bind", Asks("CONFIG SET rdma.bind 127.0.0.2")),
    ("the value of rdma.bind", Asks("CONFIG GET rdma.bind")),
    ("appendfsync", Asks("CONFIG SET appendfsync no")),
    ("the filter of commands", Asks("REPLCONF capa eof")),
    // Last: there are none after it.
    ("io-threads", Asks("CONFIG SET io-threads 1")),
];

/// Those that are asked for where a listener has lost its device.
const LISTENING: &[&str] = &["listening again", "the next attempt to listen"];

/// The functions for connections that the server opens itself.
const OUTGOING: &[&str] = &[
    "conn_create",
    "connect",
    "blocking_connect",
    "sync_write",
    "sync_read",
    "sync_readline",
    "shutdown",
];

/// The last of all.
const EXIT: &str = "the exit";

/// Those for links to other servers.
const LINKS: &[&str] = &[
    "conn_create of TCP",
    "connect of TCP",
    "a link's inquiry",
    "a link's connection",
    "the links' clock",
];

/// Asks for panics in a server's module.
struct Panics(PathBuf);

impl Panics {
    fn new(cell: &Cell) -> Result<Self> {
        let folder = cell.folder().join("panics");
        std::fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    /// Has `settings` start a server that panics when asked.
    fn prepare(&self, lab: &Lab, settings: &mut Settings) -> Result<()> {
        settings.module = Some(lab.variant("with-panics")?);
        let variable = "VALKEY_RDMA_TEST_PANICS".to_owned();
        settings.environment.push((variable, self.0.display().to_string()));
        Ok(())
    }

    /// The next call of `function` panics.
    fn ask(&self, function: &str) -> Result<()> {
        Ok(std::fs::write(self.0.join(function), b"")?)
    }

    /// Waits until it has.
    fn wait(&self, function: &str, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.0.join(function).exists() {
            ensure!(Instant::now() < deadline, "{function} was not called");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// What a server holds for the clients that stay.
#[derive(Debug, PartialEq)]
struct Holdings {
    connections: u64,
    transient: u64,
    registered: u64,
}

impl Holdings {
    fn of(cell: &Cell) -> Result<Self> {
        let info = cell.info()?;
        Ok(Self {
            connections: info.number("rdma_connections_established")?,
            transient: info.sum(&["rdma_connections_handshaking", "rdma_connections_lingering"])?,
            registered: info.number("rdma_registered_bytes")?,
        })
    }
}

/// Those who must not notice.
struct Others {
    rdma: Vec<Client<Connection>>,
    tcp: Client<tcp::Connection>,
}

impl Others {
    fn ping(&mut self) -> Result<()> {
        for client in &mut self.rdma {
            expect(client, "PING", "PONG").context("another client over RDMA")?;
        }
        expect(&mut self.tcp, "PING", "PONG").context("a client over TCP")
    }
}

/// One panic after the other in one server, and after each everybody else is served.
fn panics(cell: &mut Cell) -> Result<()> {
    let panics = Panics::new(cell)?;
    panics.prepare(cell.lab, &mut cell.settings)?;
    // A send queue that is drained concerns nobody, but is told.
    let told = ("SOFTRDMA_FAULTS".to_owned(), "async-event=5/2".to_owned());
    cell.settings.environment.push(told);
    cell.start()?;
    let rdma = (0..OTHERS).map(|_| cell.rdma()).collect::<Result<_>>()?;
    let mut others = Others { rdma, tcp: cell.tcp()? };
    let big = pattern::value(1, 4 << 20);
    ensure!(others.tcp.command(&[b"SET", b"big", &big])?.text() == "OK", "SET");
    others.ping()?;
    let before = Holdings::of(cell)?;
    let mut asked = 0;
    for (function, act) in FUNCTIONS {
        if !is_called(cell, function) {
            continue;
        }
        panic_in(cell, &panics, function, act, &mut others)
            .and_then(|()| others.ping())
            .and_then(|()| expect(&mut cell.rdma()?, "PING", "PONG").context("a new client"))
            .and_then(|()| settled(cell, &before))
            .with_context(|| format!("a panic in {function}"))?;
        asked += 1;
    }
    cell.figure("functions that panicked", asked);
    cell.moved(asked * 14, asked * 7);
    panics.ask(EXIT)?;
    let mut server = cell.take_server()?;
    let status = server.stop()?;
    ensure!(status.success(), "the server ended with {status}");
    let lines = server.log_lines(&format!("panic in {EXIT}:"))?.len();
    ensure!(lines == 1, "{lines} lines tell of the panic in {EXIT}");
    Ok(())
}

/// Whether this server calls the function at all.
fn is_called(cell: &Cell, function: &str) -> bool {
    match function {
        "update_state" | "postpone_update_state" | "wake-up" => cell.has_io_threads(),
        "closeListener" => cell.id.line() != "8.0",
        "rdma.port" | "rdma.bind" => cell.id.line() == "8.0",
        "the value of rdma.port" | "the value of rdma.bind" => cell.id.line() == "8.0",
        "io-threads" => cell.id.line() == "9.0",
        _ => true,
    }
}

fn panic_in(
    cell: &mut Cell,
    panics: &Panics,
    function: &str,
    act: &Act,
    others: &mut Others,
) -> Result<()> {
    let patience = cell.lab.patience();
    let before = said(cell, function)?;
    if function == "the filter of commands" {
        // What the server says to a replica brings it about.
        expect(&mut others.tcp, "CONFIG SET dual-channel-replication-enabled yes", "OK")?;
        let mut replica = cell.rdma()?;
        expect(&mut replica, "REPLCONF capa dual-channel", "OK")?;
        expect(&mut replica, "PSYNC ? -1", "DUALCHANNELSYNC")?;
    }
    match act {
        Comes => {
            protect(&mut others.tcp, function == "is_local")?;
            panics.ask(function)?;
            let served = cell.rdma().and_then(|mut client| Ok(client.words("PING")?));
            protect(&mut others.tcp, false)?;
            match served {
                Ok(reply) if !reply.is_error() => bail!("the newcomer is served: {reply}"),
                _ => {}
            }
        }
        Sends(line) => {
            let mut client = cell.rdma()?;
            expect(&mut client, "PING", "PONG")?;
            // Or a server that is slow would find room for all of a large reply, and set no
            // write handler.
            client.stream().hold(true)?;
            panics.ask(function)?;
            let words: Vec<_> = line.split(' ').map(str::as_bytes).collect();
            client.request(&words)?;
            panics.wait(function, patience)?;
            // The end of the connection is an error here, too.
            let _ = client.stream().hold(false);
            if let Ok(reply) = client.reply() {
                let start: String = reply.text().chars().take(60).collect();
                bail!("the client is answered: {start:?}");
            }
            client.stream().wait_end(Instant::now() + patience)?;
        }
        Leaves => {
            let mut client = cell.rdma()?;
            expect(&mut client, "PING", "PONG")?;
            panics.ask(function)?;
        }
        Quits => {
            let mut client = cell.rdma()?;
            expect(&mut client, "PING", "PONG")?;
            panics.ask(function)?;
            // The answer may come too late.
            let _ = client.words("QUIT");
            client.stream().wait_end(Instant::now() + patience)?;
        }
        // Twice: whoever panicked has to be called again.
        Visits => {
            for _ in 0..2 {
                panics.ask(function)?;
                expect(&mut cell.rdma()?, "PING", "PONG")?;
                panics.wait(function, patience)?;
            }
        }
        Nothing => {
            for _ in 0..2 {
                panics.ask(function)?;
                panics.wait(function, patience)?;
            }
        }
        Asks(line) => {
            for _ in 0..2 {
                panics.ask(function)?;
                others.tcp.words(line)?;
            }
        }
        Moves => {
            let old = cell.server().rdma_address().port();
            panics.ask(function)?;
            move_to(cell, &mut others.tcp, free_port()?)?;
            panics.wait(function, patience)?;
            move_to(cell, &mut others.tcp, old)?;
        }
        Stays => {
            // A directive is what the server goes back to; 8.0 has but one port.
            move_to(cell, &mut others.tcp, cell.server().rdma_address().port())?;
            panics.ask(function)?;
            if move_to(cell, &mut others.tcp, free_port()?).is_ok() {
                bail!("the port is changed by a function that panicked");
            }
        }
    }
    panics.wait(function, patience)?;
    let times = match act {
        Visits | Nothing | Asks(_) => 2,
        _ => 1,
    };
    // It says so right after it has.
    let deadline = Instant::now() + patience;
    while said(cell, function)? < before + times && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let now = said(cell, function)?;
    ensure!(now == before + times, "the log names it {} times, and not {times}", now - before);
    Ok(())
}

/// How often the log names a panic in the function.
fn said(cell: &Cell, function: &str) -> Result<usize> {
    Ok(cell.server().log_lines(&format!("panic in {function}:"))?.len())
}

/// Lets only local clients in without a password, for which the server asks who is one.
fn protect(client: &mut Client<tcp::Connection>, on: bool) -> Result<()> {
    expect(client, &format!("CONFIG SET protected-mode {}", if on { "yes" } else { "no" }), "OK")
}

fn move_to(cell: &Cell, client: &mut Client<tcp::Connection>, port: u16) -> Result<()> {
    let name = match cell.id.line() {
        "8.0" => "rdma.port",
        _ => "rdma-port",
    };
    expect(client, &format!("CONFIG SET {name} {port}"), "OK")
}

/// Waits until the server holds what it held before.
fn settled(cell: &Cell, before: &Holdings) -> Result<()> {
    let deadline = Instant::now() + cell.lab.patience();
    loop {
        let now = Holdings::of(cell)?;
        if now == *before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "before: {before:?}, now: {now:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same with the connections that a server opens.
fn panics_outgoing(cell: &mut Cell) -> Result<()> {
    let panics = Panics::new(cell)?;
    let prepare = |lab: &Lab, settings: &mut Settings| panics.prepare(lab, settings);
    on_driver_with(cell, prepare, |cell, driver| {
        let other = driver.connected(cell.server().rdma_address())?;
        for function in OUTGOING {
            panics.ask(function)?;
            outgoing(cell, driver, function)
                .and_then(|()| panics.wait(function, cell.lab.patience()))
                .and_then(|()| driver.ping(&other).context("another connection"))
                .with_context(|| format!("a panic in {function}"))?;
        }
        driver.close(&other)?;
        driver.settle(cell).map(drop)
    })
}

/// Has the driver call the function, on a connection of its own.
fn outgoing(cell: &Cell, driver: &mut Driver, function: &str) -> Result<()> {
    let target = cell.server().rdma_address();
    let (host, port) = (target.ip(), target.port());
    if function == "conn_create" {
        let reply = driver.words("DRIVER.NEW")?;
        ensure!(reply.is_error(), "a connection: {reply}");
        return Ok(());
    }
    let number = match function {
        "connect" | "blocking_connect" => driver.create()?,
        _ => driver.connected(target)?,
    };
    let reply = driver.words(&match function {
        "connect" => format!("DRIVER.CONNECT {number} {host} {port}"),
        "blocking_connect" => format!("DRIVER.BLOCKINGCONNECT {number} {host} {port} 10000"),
        "sync_write" => format!("DRIVER.SYNCWRITE {number} PING 10000"),
        "sync_read" => format!("DRIVER.SYNCREAD {number} 7 10000"),
        "sync_readline" => format!("DRIVER.SYNCREADLINE {number} 100 10000"),
        "shutdown" => format!("DRIVER.SHUTDOWN {number}"),
        other => bail!("nobody calls {other}"),
    })?;
    // It has no answer to give.
    ensure!(reply.is_error() || function == "shutdown", "{reply}");
    let view = driver.view(&number)?;
    ensure!(view.is_ended_by("Input/output error"), "{view:?}");
    driver.close(&number)
}

/// A listener waits for its device, and its timer panics.
fn panics_listening(cell: &mut Cell) -> Result<()> {
    let panics = Panics::new(cell)?;
    panics.prepare(cell.lab, &mut cell.settings)?;
    // The device goes for longer than the panics take.
    let plan = "remove-device@50 device-returns=4000";
    cell.settings.environment.push(("SOFTRDMA_FAULTS".to_owned(), plan.to_owned()));
    cell.start()?;
    let mut client = cell.rdma()?;
    let deadline = Instant::now() + cell.lab.patience();
    while expect(&mut client, "PING", "PONG").is_ok() {
        ensure!(Instant::now() < deadline, "the device stays");
    }
    for function in LISTENING {
        panics.ask(function)?;
        panics.wait(function, cell.lab.patience())?;
    }
    for function in LISTENING {
        let said = said(cell, function)?;
        ensure!(said == 1, "the log names a panic in {function} {said} times");
    }
    cell.wait_info("the listener", |info| Ok(info.number("rdma_listeners_waiting")? == 0))?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    cell.moved(14, 7);
    Ok(())
}

/// The link of a replica comes about in the next attempt, if not in this one.
fn panics_links(cell: &mut Cell) -> Result<()> {
    let panics = Panics::new(cell)?;
    let module = cell.lab.variant("with-panics")?;
    let replica = Peer::start_with(cell, "replica", "require", |settings| {
        settings.module = Some(module);
        let variable = "VALKEY_RDMA_TEST_PANICS".to_owned();
        settings.environment.push((variable, panics.0.display().to_string()));
    })?;
    expect(&mut cell.tcp()?, "SET key value", "OK")?;
    for function in LINKS {
        replica.ask("REPLICAOF NO ONE")?;
        panics.ask(function)?;
        replica.follow(cell)?;
        linked(&replica)
            .and_then(|()| panics.wait(function, cell.lab.patience()))
            .with_context(|| format!("a panic in {function}"))?;
        let said = replica.server.log_lines(&format!("panic in {function}:"))?.len();
        ensure!(said == 1, "the log names a panic in {function} {said} times");
        ensure!(replica.transport()? == "rdma", "the link after a panic in {function}");
    }
    replica.stop()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Guarded functions that no cell makes panic, and why.
    const UNTRIED: &[(&str, &str)] = &[
        ("conn_create_accepted", "no server calls it"),
        ("loading", "the server does not start then"),
        ("ending a connection", "it runs only after another panic, and catches what that left"),
        (
            "one endpoint's housekeeping timer",
            "it strikes whoever is first, as that of the handshake timer does",
        ),
        ("a timer", "without it the timer does not come again, which is all that it does"),
        ("connect handler", "without it the server does not hear of a connection that failed"),
    ];

    fn sources(folder: &Path, text: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, text);
            } else {
                *text += &std::fs::read_to_string(path).unwrap();
            }
        }
    }

    #[test]
    fn every_guarded_function_is_made_to_panic() {
        let mut text = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../src"), &mut text);
        let tried = FUNCTIONS.iter().map(|(name, _)| *name);
        let untried = UNTRIED.iter().map(|(name, _)| *name);
        let known: Vec<_> = tried.chain([OUTGOING, LISTENING, LINKS, &[EXIT]].concat()).collect();
        let mut guarded = 0;
        for (at, _) in text.match_indices("guard") {
            let rest = &text[at..];
            let calls = ["guard(", "guard_on("];
            let Some(rest) = calls.iter().find_map(|call| rest.strip_prefix(call)) else {
                continue;
            };
            let Some(name) = rest.trim_start().strip_prefix('"') else { continue };
            let name = name.split('"').next().unwrap();
            guarded += 1;
            assert!(
                known.contains(&name) || untried.clone().any(|other| other == name),
                "{name} is guarded, and no cell makes it panic"
            );
        }
        assert!(guarded > 45, "{guarded} guards are found");
        for name in known.into_iter().chain(untried) {
            assert!(text.contains(&format!("\"{name}\"")), "nothing guarded is called {name}");
        }
    }
}
