// SPDX-License-Identifier: BSD-3-Clause
//! Connections that a server opens. No stock server opens one over RDMA yet, so the module of
//! `tests/driver` calls the slots for it, in a second server of the same kind. The cell's own
//! server is the one that is connected to.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::resp::encode;
use client::{Client, Value, pattern, tcp};

use super::stalled::settle;
use crate::cell::{Case, Cell, no_crash};
use crate::info::Info;
use crate::lab::{Lab, sha256};
use crate::process::tail;
use crate::server::{Server, Settings, free_port};

pub const CASES: &[Case] = &[
    Case::new("outgoing-connect", |cell| on_driver(cell, &[], connect)),
    Case::new("outgoing-sync", |cell| on_driver(cell, &[], sync)),
    Case::new("outgoing-async", |cell| on_driver(cell, &[], asynchronous)),
    Case::new("outgoing-timeouts", |cell| on_driver(cell, &["handshake-timeout=1500"], timeouts)),
    Case::new("outgoing-refusals", |cell| on_driver(cell, &[], refusals)),
    Case::new("outgoing-close", |cell| on_driver(cell, &[], close)),
    Case::new("outgoing-lost", |cell| on_driver(cell, &[], lost)),
];

const LENGTH: usize = 5 << 20;
/// Milliseconds that a blocking call gets which is to succeed.
const LONG: u64 = 60_000;
/// Milliseconds that a blocking call gets which is to time out.
const SHORT: u64 = 500;
/// An address that is nobody's.
const NOWHERE: &str = "192.0.2.77";

/// Runs a case with a second server whose driver module opens the connections.
fn on_driver(
    cell: &mut Cell,
    arguments: &[&str],
    case: fn(&mut Cell, &mut Driver) -> Result<()>,
) -> Result<()> {
    let prepare = |_: &Lab, settings: &mut Settings| {
        settings.arguments.extend(arguments.iter().map(|&text| text.to_owned()));
        Ok(())
    };
    on_driver_with(cell, prepare, case)
}

/// The same with a second server that `prepare` changes, and looks at what is left of it.
pub(super) fn on_driver_with(
    cell: &mut Cell,
    prepare: impl FnOnce(&Lab, &mut Settings) -> Result<()>,
    case: impl FnOnce(&mut Cell, &mut Driver) -> Result<()>,
) -> Result<()> {
    let mut settings = Settings::new(cell.lab, &cell.id.server, cell.id.io_threads)?;
    // No I/O thread has to do with a connection that is not a client's.
    settings.io_threads_as_they_are();
    settings.directive(&format!("loadmodule {}", module()?.display()));
    prepare(cell.lab, &mut settings)?;
    let folder = cell.folder().join("driver");
    let server = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
    let mut driver = Driver { client: server.tcp(cell.lab.patience())?, server };
    driver.check_identity(cell)?;
    let result = case(cell, &mut driver).and_then(|()| driver.stop());
    result.with_context(|| {
        format!("the driver's log ends:\n{}", tail(&driver.server.log().unwrap_or_default()))
    })
}

/// The driver module, which is built along with this program.
pub(super) fn module() -> Result<PathBuf> {
    let folder = std::env::current_exe()?;
    let path = folder.parent().context("a program without a folder")?.join("libdriver.so");
    ensure!(path.exists(), "{} is missing: cargo build -p driver", path.display());
    Ok(path)
}

/// The server that opens connections.
pub(super) struct Driver {
    server: Server,
    client: Client<tcp::Connection>,
}

/// What the driver sees of a connection.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    state: String,
    error: String,
    local: String,
    remote: String,
    is_local: String,
}

impl View {
    fn of(reply: &Value) -> Result<Self> {
        let fields: Vec<String> = reply.elements().iter().map(Value::text).collect();
        let [state, error, local, remote, is_local] = fields
            .try_into()
            .map_err(|_| anyhow::anyhow!("not the view of a connection: {reply}"))?;
        Ok(Self { state, error, local, remote, is_local })
    }

    /// Whether the connection is over for this reason.
    pub(super) fn is_ended_by(&self, error: &str) -> bool {
        matches!(self.state.as_str(), "ERROR" | "CLOSED") && self.error == error
    }

    fn check(&self, state: &str, error: &str) -> Result<()> {
        ensure!(
            self.state == state && self.error == error,
            "a connection in state {} with error '{}' instead of {state} with '{error}'",
            self.state,
            self.error
        );
        Ok(())
    }
}

impl Driver {
    /// The stock server, with the module under test in it.
    fn check_identity(&self, cell: &Cell) -> Result<()> {
        let executable = PathBuf::from(format!("/proc/{}/exe", self.server.pid()));
        ensure!(
            sha256(&executable)? == cell.lab.stock(&cell.id.server)?.sha256,
            "the driver's server is not the stock executable"
        );
        let module = self.server.settings().module.as_ref().context("a server without a module")?;
        let name = module.file_name().context("a module without a name")?;
        let mapped = self.server.mapped(&name.to_string_lossy())?;
        ensure!(!mapped.is_empty(), "the module is not mapped into the driver's server");
        for file in mapped {
            ensure!(sha256(&file)? == sha256(module)?, "another module is mapped");
        }
        Ok(())
    }

    /// Ends the server, which has to be there still.
    fn stop(&mut self) -> Result<()> {
        ensure!(self.server.is_running()?, "the driver's server has ended");
        let status = self.server.stop()?;
        no_crash(&self.server)?;
        ensure!(status.success(), "the driver's server ended with {status}");
        Ok(())
    }

    /// A further client, for what has to happen at the same time.
    fn another(&self, cell: &Cell) -> Result<Client<tcp::Connection>> {
        self.server.tcp(cell.lab.patience())
    }

    fn info(&self, cell: &Cell) -> Result<Info> {
        self.server.info(cell.lab.patience())
    }

    /// Cycles of the event loop in a second.
    fn loop_rate(&mut self) -> Result<f64> {
        let mut cycles = || -> Result<u64> {
            Info::parse(&self.client.words("INFO everything")?.text()).number("eventloop_cycles")
        };
        let (first, started) = (cycles()?, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let elapsed = started.elapsed().as_secs_f64();
        Ok((cycles()? - first) as f64 / elapsed)
    }

    pub(super) fn words(&mut self, line: &str) -> Result<Value> {
        Ok(self.client.words(line)?)
    }

    /// A command that has to succeed.
    fn command(&mut self, arguments: &[&[u8]]) -> Result<Value> {
        let reply = self.client.command(arguments)?;
        let name = String::from_utf8_lossy(arguments[0]).into_owned();
        ensure!(!reply.is_error(), "{name}: {reply}");
        Ok(reply)
    }

    /// A new connection: its number.
    pub(super) fn create(&mut self) -> Result<String> {
        Ok(self.command(&[b"DRIVER.NEW"])?.text())
    }

    pub(super) fn view(&mut self, number: &str) -> Result<View> {
        View::of(&self.words(&format!("DRIVER.STATE {number}"))?)
    }

    /// A connection that is connected to `target`.
    pub(super) fn connected(&mut self, target: SocketAddr) -> Result<String> {
        let number = self.create()?;
        let (host, port) = (target.ip(), target.port());
        let line = format!("DRIVER.BLOCKINGCONNECT {number} {host} {port} {LONG}");
        let reply = self.words(&line)?;
        ensure!(reply.text() == "OK", "{line}: {reply}");
        self.view(&number)?.check("CONNECTED", "Success")?;
        Ok(number)
    }

    /// An attempt to connect that has to fail, by the handler or at once: state and error.
    fn failed_connect(&mut self, host: &str, port: u16) -> Result<(String, View)> {
        let number = self.create()?;
        let reply = self.words(&format!("DRIVER.CONNECT {number} {host} {port}"))?;
        let view = self.view(&number)?;
        if !reply.is_error() {
            ensure!(View::of(&reply)? == view, "another view than the handler's: {reply}");
        }
        ensure!(
            view.state == "ERROR" && view.error != "Success",
            "a connection to {host} port {port}: {view:?}"
        );
        Ok((number, view))
    }

    /// The same with `blocking_connect`, which has to fail with `error` within `limit`.
    fn failed_blocking_connect(
        &mut self,
        (host, port): (&str, u16),
        milliseconds: u64,
        error: &str,
    ) -> Result<Duration> {
        let number = self.create()?;
        let started = Instant::now();
        let reply =
            self.words(&format!("DRIVER.BLOCKINGCONNECT {number} {host} {port} {milliseconds}"))?;
        let took = started.elapsed();
        ensure!(reply.is_error(), "a connection to {host} port {port}: {reply}");
        self.view(&number)?.check("ERROR", error)?;
        ensure!(reply.text().ends_with(&format!("errno {error}")), "{reply}");
        self.close(&number)?;
        Ok(took)
    }

    pub(super) fn close(&mut self, number: &str) -> Result<()> {
        self.command(&[b"DRIVER.CLOSE", number.as_bytes()]).map(drop)
    }

    /// Sends all of `bytes` by `sync_write`.
    fn sync_write(&mut self, number: &str, bytes: &[u8]) -> Result<()> {
        let timeout = LONG.to_string();
        let arguments = [b"DRIVER.SYNCWRITE", number.as_bytes(), bytes, timeout.as_bytes()];
        let reply = self.command(&arguments)?;
        ensure!(reply == Value::Integer(bytes.len() as i64), "sync_write: {reply}");
        Ok(())
    }

    /// Reads a line by `sync_readline`, which has to be `wanted`.
    fn expect_line(&mut self, number: &str, wanted: &str) -> Result<()> {
        let reply = self.words(&format!("DRIVER.SYNCREADLINE {number} 1024 {LONG}"))?;
        // The carriage return is counted and overwritten, as the server's own function has it.
        ensure!(
            reply.bytes() == Some(format!("{wanted}\0").as_bytes()),
            "sync_readline: {reply:?} instead of '{wanted}'"
        );
        Ok(())
    }

    /// PING and its reply, by the slots that block.
    pub(super) fn ping(&mut self, number: &str) -> Result<()> {
        self.sync_write(number, b"PING\r\n")?;
        self.expect_line(number, "+PONG")
    }

    /// Waits until none of this server's RDMA connections is left, nor what belongs to one.
    pub(super) fn settle(&self, cell: &Cell) -> Result<Info> {
        let deadline = Instant::now() + cell.lab.patience();
        loop {
            let info = self.info(cell)?;
            let open = info.sum(&[
                "rdma_connections_handshaking",
                "rdma_connections_established",
                "rdma_connections_lingering",
                "rdma_connections_ending",
            ])?;
            if open == 0 {
                return Ok(info);
            }
            ensure!(Instant::now() < deadline, "{open} of the driver's connections stay");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Asks for an exchange, and leaves its end for [`exchanged`].
fn exchange(
    client: &mut Client<tcp::Connection>,
    number: &str,
    wanted: usize,
    bytes: &[u8],
) -> Result<()> {
    let wanted = wanted.to_string();
    client.request(&[b"DRIVER.EXCHANGE", number.as_bytes(), wanted.as_bytes(), bytes])?;
    Ok(())
}

/// What ended the exchange, the connection's state then, and what came.
fn exchanged(client: &mut Client<tcp::Connection>) -> Result<(String, String, Vec<u8>)> {
    match client.reply()? {
        Value::Array(reply) => match reply.as_slice() {
            [how, state, Value::Bulk(bytes)] => Ok((how.text(), state.text(), bytes.clone())),
            other => bail!("an exchange: {other:?}"),
        },
        other => bail!("an exchange: {other}"),
    }
}

fn request(arguments: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&mut bytes, arguments);
    bytes
}

/// How much longer than its time-out a call may take.
fn slack(cell: &Cell) -> Duration {
    Duration::from_secs(if cell.lab.is_slow() { 20 } else { 3 })
}

/// `connect` and its handler, with and without a source, and what the slots say of it.
fn connect(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let (host, port) = (target.ip(), target.port());
    let idle = driver.loop_rate()?;
    let fresh = driver.create()?;
    let view = driver.view(&fresh)?;
    view.check("NONE", "Success")?;
    ensure!(view.remote.starts_with("unknown"), "the peer of an unconnected one: {view:?}");

    let view = View::of(&driver.words(&format!("DRIVER.CONNECT {fresh} {host} {port}"))?)?;
    view.check("CONNECTED", "Success")?;
    ensure!(view == driver.view(&fresh)?, "another view than the handler's");
    ensure!(view.remote == format!("{host} {port}"), "remote address: {view:?}");
    ensure!(view.is_local == "1", "is_local, from an address to itself: {view:?}");
    driver.ping(&fresh)?;
    let peer = view.local.replace(' ', ":");
    let list = cell.tcp()?.words("CLIENT LIST")?.text();
    ensure!(list.contains(&format!(" addr={peer} ")), "the server has no client {peer}: {list}");

    let second = cell.lab.second_address.unwrap_or(host);
    for (source, local) in [(second.to_string(), second), (NOWHERE.to_owned(), host)] {
        let number = driver.create()?;
        let line = format!("DRIVER.CONNECT {number} {host} {port} {source}");
        let view = View::of(&driver.words(&line)?)?;
        view.check("CONNECTED", "Success")?;
        ensure!(view.local.starts_with(&format!("{local} ")), "source {source}: {view:?}");
        // Local is what stays on the machine for certain.
        let is_local = u8::from(host.is_loopback() || local == host).to_string();
        ensure!(view.is_local == is_local, "is_local, source {source}: {view:?}");
        driver.ping(&number)?;
    }
    let opened = driver.info(cell)?.number("rdma_connections_opened")?;
    ensure!(opened == 3, "{opened} connections opened, by the driver's count, instead of 3");

    // They are idle now: so is the server that has them.
    let rate = driver.loop_rate()?;
    let hz = driver.info(cell)?.number("hz")? as f64;
    cell.figure(
        "event loop cycles/s, three connections open",
        format!("{rate:.0} (idle {idle:.0})"),
    );
    ensure!(
        rate <= 2.0 * (idle + hz),
        "the event loop runs {rate:.0} times a second with three idle connections, without it \
         was {idle:.0}"
    );
    cell.moved(3 * 6, 3 * 7);
    Ok(())
}

/// The slots that block, with values larger than any window; another connection's handlers
/// wait meanwhile.
fn sync(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let number = driver.connected(target)?;
    let waiting = driver.connected(target)?;
    let mut other = driver.another(cell)?;
    exchange(&mut other, &waiting, 7, b"BLPOP list 0\r\n")?;
    for length in [0, 1, 16 << 10, LENGTH] {
        let value = pattern::value(length as u64, length);
        driver.sync_write(&number, &request(&[b"SET", b"key", &value]))?;
        driver.expect_line(&number, "+OK")?;
        let stored = cell.tcp()?.command(&[b"GET", b"key"])?;
        ensure!(stored == Value::Bulk(value.clone()), "another value of {length} B was stored");
        driver.sync_write(&number, b"GET key\r\n")?;
        driver.expect_line(&number, &format!("${length}"))?;
        let read = driver.words(&format!("DRIVER.SYNCREAD {number} {length} {LONG}"))?;
        ensure!(read == Value::Bulk(value), "another value of {length} B came back");
        driver.expect_line(&number, "")?;
        cell.moved(length, length);
    }
    // A buffer that is too small for the line gets its beginning.
    driver.sync_write(&number, b"PING\r\n")?;
    let start = driver.words(&format!("DRIVER.SYNCREADLINE {number} 4 {LONG}"))?;
    ensure!(start.bytes() == Some(b"+PO"), "a line in four bytes: {start:?}");
    driver.expect_line(&number, "NG")?;
    // What wakes the other connection arrives inside a call that blocks.
    driver.sync_write(&number, b"RPUSH list x\r\nDEBUG SLEEP 0.3\r\nPING\r\n")?;
    for line in [":1", "+OK", "+PONG"] {
        driver.expect_line(&number, line)?;
    }
    let (how, state, bytes) = exchanged(&mut other)?;
    ensure!(
        (how.as_str(), state.as_str()) == ("enough", "CONNECTED") && bytes.starts_with(b"*2\r\n"),
        "the other connection: {how} {state} {bytes:?}"
    );
    let info = driver.info(cell)?;
    ensure!(info.number("rdma_bytes_sent")? > LENGTH as u64, "bytes sent by the driver");
    ensure!(info.number("rdma_bytes_received")? > LENGTH as u64, "bytes received by the driver");
    Ok(())
}

/// Handlers that write and read as there is room and data, to the end of the connection.
fn asynchronous(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let mut open = Vec::new();
    for seed in 0..4 {
        open.push((driver.another(cell)?, driver.connected(target)?, pattern::value(seed, LENGTH)));
    }
    for (client, number, value) in &mut open {
        let key = format!("key{number}");
        let requests = [
            request(&[b"SET", key.as_bytes(), value]),
            request(&[b"GET", key.as_bytes()]),
            request(&[b"QUIT"]),
        ];
        exchange(client, number, usize::MAX >> 1, &requests.concat())?;
    }
    for (client, number, value) in &mut open {
        let (how, state, bytes) = exchanged(client)?;
        ensure!(
            (how.as_str(), state.as_str()) == ("end", "CLOSED"),
            "connection {number} ended by '{how}' in state {state}"
        );
        let length = format!("+OK\r\n${LENGTH}\r\n");
        let wanted = [length.as_bytes(), value, b"\r\n+OK\r\n"].concat();
        ensure!(bytes == wanted, "connection {number} read {} other bytes", bytes.len());
    }
    cell.moved(4 * LENGTH, 4 * LENGTH);

    // Bytes that came before there was a handler are no less readable.
    let number = driver.connected(target)?;
    driver.sync_write(&number, b"PING\r\n")?;
    std::thread::sleep(Duration::from_millis(300));
    let mut client = driver.another(cell)?;
    exchange(&mut client, &number, 7, b"")?;
    let (how, _, bytes) = exchanged(&mut client)?;
    ensure!(how == "enough" && bytes == b"+PONG\r\n", "{how}, {bytes:?}");
    // Nor does taking the handlers away take the connection away.
    driver.ping(&number)?;
    exchange(&mut client, &number, 7, b"PING\r\n")?;
    let (how, _, bytes) = exchanged(&mut client)?;
    ensure!(how == "enough" && bytes == b"+PONG\r\n", "{how}, {bytes:?}");
    Ok(())
}

/// A peer that does not answer.
fn timeouts(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let (host, port) = (target.ip().to_string(), target.port());
    let number = driver.connected(target)?;
    driver.ping(&number)?;

    let stopped = cell.server().pause();
    let wanted = Duration::from_millis(SHORT);
    let took = driver.failed_blocking_connect((&host, port), SHORT, "Connection timed out")?;
    cell.figure("blocking_connect of 500 ms", format!("{} ms", took.as_millis()));
    ensure!(took >= wanted && took < wanted + slack(cell), "it took {} ms", took.as_millis());

    // The handshake's own time-out; the handler tells of it.
    let started = Instant::now();
    let (late, view) = driver.failed_connect(&host, port)?;
    view.check("ERROR", "Connection timed out")?;
    let took = started.elapsed();
    cell.figure("handshake-timeout of 1500 ms", format!("{} ms", took.as_millis()));
    ensure!(took < Duration::from_millis(1500) + slack(cell), "it took {} ms", took.as_millis());
    driver.close(&late)?;

    // A reply that does not come is no end of the connection.
    driver.sync_write(&number, b"PING\r\n")?;
    for command in ["DRIVER.SYNCREADLINE", "DRIVER.SYNCREAD"] {
        let started = Instant::now();
        let reply = driver.words(&format!("{command} {number} 100 {SHORT}"))?;
        let took = started.elapsed();
        ensure!(reply.text().ends_with("errno Connection timed out"), "{command}: {reply}");
        ensure!(took >= wanted && took < wanted + slack(cell), "{command}: {took:?}");
        driver.view(&number)?.check("CONNECTED", "Success")?;
    }
    drop(stopped);
    driver.expect_line(&number, "+PONG")?;
    driver.ping(&number)?;

    // Nor is a window that does not open.
    let mut sleeper = cell.tcp()?;
    sleeper.request(&[b"DEBUG", b"SLEEP", b"3"])?;
    std::thread::sleep(Duration::from_millis(200));
    let started = Instant::now();
    let value = pattern::value(1, LENGTH);
    let reply = driver.client.command(&[
        b"DRIVER.SYNCWRITE",
        number.as_bytes(),
        &request(&[b"SET", b"key", &value]),
        SHORT.to_string().as_bytes(),
    ])?;
    let took = started.elapsed();
    ensure!(reply.text().ends_with("errno Connection timed out"), "sync_write: {reply}");
    ensure!(took >= wanted && took < wanted + slack(cell), "sync_write: {took:?}");
    driver.view(&number)?.check("CONNECTED", "Success")?;
    driver.close(&number)?;
    ensure!(sleeper.reply()?.text() == "OK", "DEBUG SLEEP");
    settle(cell)?;
    ensure!(cell.tcp()?.words("GET key")? == Value::Null, "half a command was carried out");
    driver.settle(cell)?;
    cell.moved(18, 21);
    Ok(())
}

/// A peer that is not there, and one that does not want us.
fn refusals(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let (host, port) = (target.ip().to_string(), target.port());
    let closed = free_port()?;

    let (number, view) = driver.failed_connect(&host, closed)?;
    view.check("ERROR", "Connection refused")?;
    // A failed connection answers every slot with its failure.
    for (command, arguments) in [
        ("WRITE", "x"),
        ("READ", "10"),
        ("SYNCWRITE", "x 100"),
        ("SYNCREAD", "10 100"),
        ("SYNCREADLINE", "10 100"),
    ] {
        let reply = driver.words(&format!("DRIVER.{command} {number} {arguments}"))?;
        ensure!(
            reply.is_error() && reply.text().contains("state ERROR"),
            "{command} on a failed connection: {reply}"
        );
    }
    driver.words(&format!("DRIVER.SHUTDOWN {number}"))?;
    driver.close(&number)?;
    let took = driver.failed_blocking_connect((&host, closed), LONG, "Connection refused")?;
    cell.figure("a refusal", format!("{} ms", took.as_millis()));
    ensure!(took < slack(cell), "a refusal took {} ms", took.as_millis());

    let (number, view) = driver.failed_connect(NOWHERE, port)?;
    cell.figure("an address without a device", &view.error);
    driver.close(&number)?;
    driver.failed_blocking_connect((NOWHERE, port), LONG, &view.error)?;
    // Two at once: the failure of the first is noticed inside the call for the second.
    let (first, second) = (driver.create()?, driver.create()?);
    let reply = driver.client.command(&[
        b"DRIVER.OVERLAP",
        first.as_bytes(),
        second.as_bytes(),
        NOWHERE.as_bytes(),
        b"7",
        b"",
        NOWHERE.as_bytes(),
        b"7",
        SHORT.to_string().as_bytes(),
    ])?;
    if !reply.is_error() {
        View::of(&reply)?.check("ERROR", &view.error)?;
        driver.view(&second)?.check("ERROR", &view.error)?;
    }
    driver.view(&first)?.check("ERROR", &view.error)?;

    for (host, port) in [("not-a-name.invalid", port), (host.as_str(), 0)] {
        let (number, view) = driver.failed_connect(host, port)?;
        cell.figure(&format!("{host} port {port}"), view.error);
        driver.close(&number)?;
    }
    for port in ["65536", "-1"] {
        let number = driver.create()?;
        let reply = driver.words(&format!("DRIVER.CONNECT {number} {host} {port}"))?;
        ensure!(reply.text().contains("Invalid argument"), "port {port}: {reply}");
    }

    // A server that is full says so, and then ends it.
    let mut observer = cell.tcp()?;
    observer.words("CONFIG SET maxclients 1")?;
    let number = driver.connected(target)?;
    driver.expect_line(&number, "-ERR max number of clients reached")?;
    let reply = driver.words(&format!("DRIVER.SYNCREAD {number} 1 {LONG}"))?;
    ensure!(reply.text().ends_with("errno Connection reset by peer"), "after the end: {reply}");
    driver.close(&number)?;
    observer.words("CONFIG SET maxclients 10000")?;
    let number = driver.connected(target)?;
    driver.ping(&number)?;
    cell.moved(6, 7);
    Ok(())
}

/// `close` and `shutdown` at every point of a connection's life; nothing stays behind.
fn close(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let (host, port) = (target.ip().to_string(), target.port());
    let closed = free_port()?;
    // The first ones make the server set up what it keeps for good.
    driver.command(&[b"DRIVER.VISIT", host.as_bytes(), port.to_string().as_bytes()])?;
    let before = driver.settle(cell)?.number("rdma_registered_bytes")?;
    let descriptors = driver.server.descriptors()?;

    for _ in 0..if cell.lab.is_slow() { 5 } else { 30 } {
        for (host, port) in [(host.as_str(), port), (&host, closed), (NOWHERE, port)] {
            driver.command(&[b"DRIVER.ABANDON", host.as_bytes(), port.to_string().as_bytes()])?;
            // Also where the slot itself fails, since nobody can get there.
            driver.words(&format!("DRIVER.VISIT {host} {port}"))?;
        }
    }

    // While the peer does not answer; the handler is not called any more.
    let stopped = cell.server().pause();
    let number = driver.create()?;
    let mut other = driver.another(cell)?;
    let port_text = port.to_string();
    other.request(&[
        b"DRIVER.CONNECT",
        number.as_bytes(),
        host.as_bytes(),
        port_text.as_bytes(),
    ])?;
    std::thread::sleep(Duration::from_millis(200));
    driver.view(&number)?.check("CONNECTING", "Success")?;
    driver.close(&number)?;
    let reply = other.reply()?;
    ensure!(reply.text().contains("closed by another command"), "the pending connect: {reply}");
    drop(stopped);

    // What was written is delivered all the same.
    let value = pattern::value(3, 512 << 10);
    let number = driver.connected(target)?;
    driver.sync_write(&number, &request(&[b"SET", b"delivered", &value]))?;
    driver.close(&number)?;
    let mut observer = cell.tcp()?;
    let deadline = Instant::now() + cell.lab.patience();
    while observer.command(&[b"GET", b"delivered"])? != Value::Bulk(value.clone()) {
        ensure!(Instant::now() < deadline, "what was written before the close did not arrive");
        std::thread::sleep(Duration::from_millis(20));
    }
    cell.moved(value.len(), 0);

    // What was not written is not.
    let number = driver.connected(target)?;
    let stopped = cell.server().pause();
    let value = pattern::value(4, LENGTH);
    exchange(&mut other, &number, 5, &request(&[b"SET", b"unsent", &value]))?;
    std::thread::sleep(Duration::from_millis(300));
    driver.close(&number)?;
    let reply = other.reply()?;
    ensure!(reply.text().contains("closed by another command"), "the exchange: {reply}");
    drop(stopped);

    // After a shutdown there is nothing more to come, and the handlers hear of it.
    let number = driver.connected(target)?;
    driver.ping(&number)?;
    exchange(&mut other, &number, 100, b"")?;
    std::thread::sleep(Duration::from_millis(100));
    driver.words(&format!("DRIVER.SHUTDOWN {number}"))?;
    let (how, state, bytes) = exchanged(&mut other)?;
    ensure!(
        (how.as_str(), state.as_str()) == ("end", "CLOSED") && bytes.is_empty(),
        "after a shutdown: {how} {state} {bytes:?}"
    );

    let after = driver.settle(cell)?.number("rdma_registered_bytes")?;
    ensure!(after <= before, "registered bytes: {before} before, {after} after");
    drop(other);
    let deadline = Instant::now() + cell.lab.patience();
    while driver.server.descriptors()? > descriptors {
        ensure!(
            Instant::now() < deadline,
            "descriptors: {descriptors} before, {} after",
            driver.server.descriptors()?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    settle(cell)?;
    ensure!(observer.words("GET unsent")? == Value::Null, "half a command was carried out");
    Ok(())
}

/// A peer that dies.
fn lost(cell: &mut Cell, driver: &mut Driver) -> Result<()> {
    let target = cell.server().rdma_address();
    let (reader, waiter, idle) =
        (driver.connected(target)?, driver.connected(target)?, driver.connected(target)?);
    driver.ping(&idle)?;
    let mut asynchronous = driver.another(cell)?;
    exchange(&mut asynchronous, &reader, 100, b"PING\r\n")?;
    let mut blocking = driver.another(cell)?;
    blocking.words("PING")?;
    blocking.request(&[
        b"DRIVER.SYNCREADLINE",
        waiter.as_bytes(),
        b"100",
        LONG.to_string().as_bytes(),
    ])?;
    std::thread::sleep(Duration::from_millis(300));
    // By force, in the middle of a call that blocks.
    drop(cell.take_server()?);
    let started = Instant::now();
    let reply = blocking.reply()?;
    let took = started.elapsed();
    cell.figure("the loss was noticed after", format!("{} ms", took.as_millis()));
    ensure!(
        reply.text().contains("state ERROR")
            && reply.text().ends_with("errno Connection reset by peer"),
        "sync_readline from a dead peer: {reply}"
    );
    ensure!(took < Duration::from_secs(20) + slack(cell), "it took {took:?} to notice");
    let (how, state, bytes) = exchanged(&mut asynchronous)?;
    ensure!(bytes == b"+PONG\r\n", "before the loss came {bytes:?}");
    ensure!(how == "end" && state == "CLOSED", "the handlers saw '{how}' in state {state}");
    let reply = driver.words(&format!("DRIVER.SYNCREAD {idle} 1 {LONG}"))?;
    ensure!(reply.text().ends_with("errno Connection reset by peer"), "an idle one: {reply}");
    driver.close(&idle)?;
    driver.close(&waiter)?;
    driver.settle(cell)?;
    Ok(())
}
