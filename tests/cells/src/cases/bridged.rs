// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma bridge`: programs that speak no RDMA, by way of it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::{Client, pattern, tcp};

use crate::cell::{Case, Cell};
use crate::lab::LOOPBACK;
use crate::process::{Process, run};
use crate::server::free_port;

pub const CASES: &[Case] = &[
    Case::new("bridge", bridge),
    Case::new("bridge-ends", ends),
    Case::new("bridge-systemd", systemd),
    Case::new("bridge-crowd", crowd),
];

/// Bytes of values: none, few, at the edges of staging memory and windows, and many.
const SIZES: [usize; 9] =
    [0, 1, 14_080, 16 << 10, 100_000, (256 << 10) - 1, (1 << 20) + 1, 5_000_000, 64 << 20];

/// A bridge that runs, and where it is reached.
struct Bridge {
    process: Process,
    tcp: SocketAddr,
    unix: PathBuf,
    metrics: SocketAddr,
    log: PathBuf,
    patience: Duration,
}

impl Bridge {
    /// One that listens at a TCP port and a Unix socket.
    fn start(cell: &Cell, to: SocketAddr, name: &str, more: &[&str]) -> Result<Self> {
        let tcp = SocketAddr::new(LOOPBACK, free_port()?);
        let metrics = SocketAddr::new(LOOPBACK, free_port()?);
        let unix = cell.folder().join(format!("{name}.sock"));
        let log = cell.folder().join(format!("{name}.log"));
        let mut command = Command::new(cell.lab.program("valkey-rdma")?);
        command.args(["bridge", "--listen", &tcp.to_string(), "--to", &to.to_string()]);
        command.arg("--listen").arg(format!("unix:{}", unix.display()));
        command.args(["--metrics", &metrics.to_string()]).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let process = Process::spawn(&mut command)?;
        let bridge = Self { process, tcp, unix, metrics, log, patience: cell.lab.patience() };
        bridge.wait_log("from ")?;
        Ok(bridge)
    }

    fn wait_log(&self, words: &str) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            let log = std::fs::read_to_string(&self.log)?;
            if log.contains(words) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "no '{words}' in the bridge's log:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn client(&self) -> Result<Client<tcp::Connection>> {
        Ok(tcp::Connection::client(self.tcp, self.patience)?)
    }

    fn raw(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(self.tcp)?;
        stream.set_read_timeout(Some(self.patience))?;
        stream.set_write_timeout(Some(self.patience))?;
        Ok(stream)
    }

    /// One of its metrics; 0 for one that nothing was counted of yet.
    fn metric(&self, name: &str) -> Result<u64> {
        let mut stream = TcpStream::connect(self.metrics)?;
        stream.set_read_timeout(Some(self.patience))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        ensure!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.map_or(Ok(0), str::parse)?)
    }

    fn wait_metric(&self, name: &str, wanted: u64) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        loop {
            let value = self.metric(name)?;
            if value == wanted {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} is {value}, and should be {wanted}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A number of its process, as the kernel counts it.
    fn kernel(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let number = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = number.with_context(|| format!("no {name} in {status}"))?;
        Ok(number.trim().trim_end_matches(" kB").parse()?)
    }

    fn resident(&self) -> Result<u64> {
        Ok(self.kernel("VmRSS")? * 1024)
    }

    /// Turns of its event loop, and how often it went to sleep: the one counts what spins, the
    /// other what is woken, where nothing is to be done.
    fn turns_and_sleeps(&self) -> Result<(u64, u64)> {
        let turns = self.metric("valkey_rdma_bridge_wakeups_total")?;
        Ok((turns, self.kernel("voluntary_ctxt_switches")?))
    }

    /// That it does next to nothing: it has a clock that ticks once a second.
    fn ensure_asleep(&self, while_what: &str) -> Result<()> {
        // Whatever was asked for has come.
        std::thread::sleep(Duration::from_millis(300));
        let (before, began) = (self.turns_and_sleeps()?, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let after = self.turns_and_sleeps()?;
        let (turns, sleeps) = (after.0 - before.0, after.1 - before.1);
        let most = 4 + began.elapsed().as_secs();
        ensure!(
            turns <= most && sleeps <= most,
            "{while_what}: {turns} turns and {sleeps} sleeps in 2 s"
        );
        Ok(())
    }

    /// Ends it as systemd does, and makes sure that it left nobody without an answer.
    fn end(&mut self) -> Result<()> {
        let status = self.process.ask_to_end(self.patience)?.context("it does not end")?;
        let log = std::fs::read_to_string(&self.log)?;
        ensure!(status.success(), "the bridge ended with {status}:\n{log}");
        ensure!(!self.unix.exists(), "its socket is still there");
        Ok(())
    }
}

/// Bytes both ways.
trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

const RDMA: &str = "valkey_rdma_bridge_connections{carrier=\"rdma\"}";

/// The end of a stream, all before it read.
fn rest(stream: &mut impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn bridge(cell: &mut Cell) -> Result<()> {
    let mut bridge = Bridge::start(cell, cell.server().rdma_address(), "bridge", &[])?;
    values(cell, &bridge).context("values")?;
    stock_programs(cell, &bridge).context("stock programs")?;
    conversations(&bridge).context("conversations")?;
    half_closes(&bridge).context("half-closed")?;
    stalled(cell, &bridge).context("a stalled reader")?;
    idle(&bridge).context("idle")?;
    drained(cell, &mut bridge).context("SIGTERM")
}

/// Commands of a program that does not wait for what becomes of them.
const CLOSED: usize = 20_000;

/// Values of all sizes there and back, over TCP and by the Unix socket.
fn values(cell: &mut Cell, bridge: &Bridge) -> Result<()> {
    let sizes = if cell.lab.is_slow() { &SIZES[..6] } else { &SIZES[..] };
    let mut client = bridge.client()?;
    let mut moved = 0;
    for (seed, &size) in sizes.iter().enumerate() {
        let value = pattern::value(seed as u64, size);
        let reply = client.command(&[b"SET", b"key", &value])?;
        ensure!(reply.text() == "OK", "SET of {size} B: {reply}");
        let reply = client.command(&[b"GET", b"key"])?;
        ensure!(reply.bytes() == Some(&value[..]), "other bytes than {size} B were");
        moved += size;
    }
    cell.moved(moved, moved);
    let view = client.words("CLIENT INFO")?.text();
    let rdma = cell.info()?.number("rdma_connections_established")?;
    ensure!(rdma > 0, "the server has no RDMA connection: {view}");

    let mut stream = UnixStream::connect(&bridge.unix)?;
    stream.set_read_timeout(Some(bridge.patience))?;
    let value = pattern::value(99, 300_000);
    let mut request = b"*3\r\n$3\r\nSET\r\n$4\r\nunix\r\n$300000\r\n".to_vec();
    request.extend_from_slice(&value);
    request.extend_from_slice(b"\r\nGET unix\r\nQUIT\r\n");
    stream.write_all(&request)?;
    let mut wanted = b"+OK\r\n$300000\r\n".to_vec();
    wanted.extend_from_slice(&value);
    wanted.extend_from_slice(b"\r\n+OK\r\n");
    ensure!(rest(&mut stream)? == wanted, "other bytes by the Unix socket");

    // Written and closed at once, by a program that reads no answer: more than the server takes
    // at a time.
    let mut stream = UnixStream::connect(&bridge.unix)?;
    stream.write_all(&b"INCR closed\r\n".repeat(CLOSED))?;
    drop(stream);
    let deadline = Instant::now() + bridge.patience;
    loop {
        let count = client.words("GET closed")?.text();
        if count == CLOSED.to_string() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "of {CLOSED} commands before a close {count} were done");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The distribution's own programs, which know no RDMA.
fn stock_programs(cell: &mut Cell, bridge: &Bridge) -> Result<()> {
    let port = bridge.tcp.port().to_string();
    let folder = cell.folder().to_owned();
    let script = cell.lab.repo.join("scripts/chroot.sh");
    let try_it = |program: &str, words: &[&str], input: &[u8]| -> Result<String> {
        let mut command = Command::new(&script);
        command.args([cell.id.server.as_str(), program, "-h", "127.0.0.1", "-p", &port]);
        let output = run(command.args(words), input, &folder, 4 * bridge.patience)?;
        let text = output.text();
        ensure!(output.status.success(), "{program} {words:?}: {text}{}", output.stderr);
        Ok(text)
    };
    ensure!(try_it("valkey-cli", &["-3", "ping"], b"")?.trim() == "PONG", "no PONG");
    // What valkey-cli --rdma can't do.
    let pipe = b"SET piped yes\r\n".repeat(5000);
    let piped = try_it("valkey-cli", &["--pipe"], &pipe)?;
    ensure!(piped.contains("errors: 0, replies: 5000"), "--pipe: {piped}");
    let load = ["-t", "set,get", "-n", "4000", "-c", "20", "-P", "4", "-d", "3000", "--csv"];
    let rows = try_it("valkey-benchmark", &load, b"")?;
    ensure!(rows.lines().filter(|row| row.starts_with('"')).count() == 3, "{rows}");
    cell.moved(4000 * 3000, 4000 * 3000);
    Ok(())
}

/// What is pushed, what is waited for, and who may ask.
fn conversations(bridge: &Bridge) -> Result<()> {
    let (mut first, mut second) = (bridge.client()?, bridge.client()?);
    let mut monitor = bridge.client()?;
    ensure!(monitor.words("MONITOR")?.text() == "OK", "MONITOR");
    first.words("SUBSCRIBE news")?;
    ensure!(second.words("PUBLISH news hello")?.text() == "1", "nobody listens");
    ensure!(first.reply()?.to_string().contains("hello"), "no message");
    let seen = monitor.reply()?.text() + &monitor.reply()?.text();
    ensure!(seen.contains("news"), "MONITOR shows {seen}");

    let mut waiting = bridge.client()?;
    waiting.request(&[b"BLPOP", b"list", b"0"])?;
    std::thread::sleep(Duration::from_millis(100));
    second.words("RPUSH list one")?;
    ensure!(waiting.reply()?.to_string().contains("one"), "BLPOP");

    second.words("CONFIG SET requirepass secret")?;
    let mut stranger = bridge.client()?;
    ensure!(stranger.words("GET key")?.text().contains("NOAUTH"), "a stranger is served");
    ensure!(stranger.words("AUTH wrong")?.is_error(), "a wrong password");
    ensure!(stranger.words("AUTH secret")?.text() == "OK", "the right one");
    let reply = stranger.command(&[b"CONFIG", b"SET", b"requirepass", b""])?;
    ensure!(reply.text() == "OK", "{reply}");
    ensure!(stranger.words("HELLO 3")?.to_string().contains("proto"), "HELLO 3");
    Ok(())
}

/// A program that ends its side gets all its answers, and then the end.
fn half_closes(bridge: &Bridge) -> Result<()> {
    for count in [1, 2000] {
        let mut stream = bridge.raw()?;
        stream.write_all(&b"PING\r\n".repeat(count))?;
        stream.shutdown(Shutdown::Write)?;
        let answers = rest(&mut stream)?;
        ensure!(answers == b"+PONG\r\n".repeat(count), "{} B for {count} PINGs", answers.len());
    }
    Ok(())
}

/// One that reads nothing holds nobody else back, and takes no memory but its windows.
fn stalled(cell: &mut Cell, bridge: &Bridge) -> Result<()> {
    const SIZE: usize = 1 << 20;
    const COUNT: usize = 40;
    const MEMORY: u64 = 4 << 20;
    let mut client = bridge.client()?;
    let value = pattern::value(5, SIZE);
    client.command(&[b"SET", b"big", &value])?;
    let before = bridge.resident()?;
    let mut stream = bridge.raw()?;
    stream.write_all(&b"GET big\r\n".repeat(COUNT))?;
    for _ in 0..20 {
        ensure!(client.words("PING")?.text() == "PONG", "another is not served");
        std::thread::sleep(Duration::from_millis(20));
    }
    let more = bridge.resident()?.saturating_sub(before);
    cell.figure("memory of the bridge for a stalled reader", format!("{} KiB", more >> 10));
    ensure!(more < MEMORY, "a stalled reader takes {more} bytes");
    bridge.ensure_asleep("a stalled reader, and nobody else")?;
    let mut wanted = format!("${SIZE}\r\n").into_bytes();
    wanted.extend_from_slice(&value);
    wanted.extend_from_slice(b"\r\n");
    let mut reply = vec![0; wanted.len()];
    for number in 0..COUNT {
        stream.read_exact(&mut reply)?;
        ensure!(reply == wanted, "other bytes in answer {number}");
    }
    cell.moved(SIZE, COUNT * SIZE);
    Ok(())
}

/// Nobody is woken for programs that do nothing.
fn idle(bridge: &Bridge) -> Result<()> {
    let mut crowd = Vec::new();
    for _ in 0..50 {
        crowd.push(bridge.client()?);
    }
    for client in &mut crowd {
        client.words("PING")?;
    }
    bridge.ensure_asleep("50 idle programs")
}

/// Who waits for an answer gets it, all others see the end.
fn drained(cell: &Cell, bridge: &mut Bridge) -> Result<()> {
    let mut waiting = bridge.client()?;
    let (mut served, mut idle) = (bridge.client()?, bridge.raw()?);
    served.words("PING")?;
    waiting.request(&[b"BLPOP", b"drained", b"0"])?;
    bridge.wait_metric(RDMA, 3)?;
    cell.wait_info("who waits", |info| Ok(info.number("blocked_clients")? == 1))?;
    // SAFETY: a signal to a child that is not yet waited for.
    unsafe { libc::kill(bridge.process.id() as i32, libc::SIGTERM) };
    ensure!(rest(&mut idle)?.is_empty(), "bytes for one that asked nothing");
    ensure!(TcpStream::connect(bridge.tcp).is_err(), "it still listens");
    cell.tcp()?.words("RPUSH drained one")?;
    ensure!(waiting.reply()?.to_string().contains("one"), "the answer was lost");
    let status = bridge.process.wait(bridge.patience)?.context("it does not end")?;
    ensure!(status.success(), "it ended with {status}");
    cell.wait_info("the connections are gone", |info| {
        Ok(info.number("rdma_connections_established")? == 0)
    })?;
    Ok(())
}

/// Limits, a server that is not there, TCP in its place, and ends by force.
fn ends(cell: &mut Cell) -> Result<()> {
    let target = cell.server().rdma_address();
    let few = Bridge::start(cell, target, "few", &["--max-connections", "2"])?;
    let mut served = [few.client()?, few.client()?];
    for client in &mut served {
        client.words("PING")?;
    }
    let mut third = few.raw()?;
    third.write_all(b"PING\r\n")?;
    let answer = String::from_utf8(rest(&mut third)?)?;
    ensure!(answer.starts_with("-ERR valkey-rdma bridge: too many programs"), "'{answer}'");
    few.wait_log("--max-connections")?;
    drop(served);
    few.wait_metric(RDMA, 0)?;
    ensure!(few.client()?.words("PING")?.text() == "PONG", "a place that is free again");

    // Memory for one connection, not for two: a window of 256 KiB and some more.
    let small = Bridge::start(cell, target, "small", &["--max-memory", "400k"])?;
    let mut served = small.client()?;
    served.words("PING")?;
    let answer = small.client()?.words("PING")?.text();
    ensure!(answer.contains("valkey-rdma bridge:") && answer.contains("--max-memory"), "{answer}");
    ensure!(served.words("PING")?.text() == "PONG", "who was there before");

    let nobody = SocketAddr::new(target.ip(), free_port()?);
    let alone = Bridge::start(cell, nobody, "alone", &[])?;
    for _ in 0..10 {
        let answer = alone.client()?.words("PING")?.text();
        ensure!(answer.starts_with("-ERR valkey-rdma bridge: cannot connect"), "'{answer}'");
    }
    let lines = std::fs::read_to_string(&alone.log)?.matches("is refused").count();
    ensure!(lines == 3, "{lines} lines for ten that were refused");

    // One that is there and does not answer. And a window of more than a turn carries.
    let more = ["--timeout", "0.3", "--window", "4m"];
    let hasty = Bridge::start(cell, target, "hasty", &more)?;
    let stopped = cell.server().pause();
    let answer = hasty.client()?.words("PING")?.text();
    ensure!(answer.contains("timed out while waiting for the server"), "'{answer}'");
    drop(stopped);
    let (mut client, value) = (hasty.client()?, pattern::value(6, 20_000_000));
    client.command(&[b"SET", b"large", &value]).context("once it answers again")?;
    for _ in 0..3 {
        ensure!(client.command(&[b"GET", b"large"])?.bytes() == Some(&value[..]), "other bytes");
    }

    let port = cell.server().tcp_address().port().to_string();
    let other = Bridge::start(cell, nobody, "other", &["--fallback", &port])?;
    let mut client = other.client()?;
    let value = pattern::value(3, 3_000_000);
    client.command(&[b"SET", b"tcp", &value])?;
    ensure!(client.command(&[b"GET", b"tcp"])?.bytes() == Some(&value[..]), "other bytes");
    other.wait_log("over TCP: cannot connect")?;
    ensure!(other.metric("valkey_rdma_bridge_connections{carrier=\"tcp\"}")? == 1, "by TCP");

    // The bridge by force: the server is rid of its connections.
    let mut victim = Bridge::start(cell, target, "victim", &[])?;
    let mut client = victim.client()?;
    client.words("PING")?;
    let before = cell.info()?.number("rdma_connections_established")?;
    victim.process.kill()?;
    cell.wait_info("the killed bridge's connection", |info| {
        Ok(info.number("rdma_connections_established")? == before - 1)
    })?;
    ensure!(client.words("PING").is_err(), "answers of a bridge that was killed");

    // The server by force: who waits sees the end, and who comes is told.
    let last = Bridge::start(cell, target, "last", &[])?;
    let mut waiting = last.raw()?;
    waiting.write_all(b"PING\r\nBLPOP nothing 0\r\n")?;
    let mut pong = [0; 7];
    waiting.read_exact(&mut pong)?;
    cell.take_server()?.kill()?;
    ensure!(rest(&mut waiting)?.is_empty(), "bytes of a killed server");
    let answer = last.client()?.words("PING")?.text();
    ensure!(answer.starts_with("-ERR valkey-rdma bridge: cannot connect"), "'{answer}'");
    for mut bridge in [few, small, alone, hasty, other, last] {
        bridge.end()?;
    }
    Ok(())
}

/// Started by systemd: with sockets that it has opened, and which outlive the bridge.
fn systemd(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let folder = cell.folder().to_owned();
    let tcp = TcpListener::bind((LOOPBACK, 0))?;
    let path = folder.join("handed-over.sock");
    let unix = UnixListener::bind(&path)?;
    let manager = UnixDatagram::bind(folder.join("notify"))?;
    manager.set_read_timeout(Some(patience))?;
    let told = || -> Result<String> {
        let mut message = [0; 256];
        let count = manager.recv(&mut message)?;
        Ok(String::from_utf8_lossy(&message[..count]).into_owned())
    };
    let start = |log: &str| -> Result<Process> {
        let mut command = Command::new("sh");
        command.args(["-c", r#"LISTEN_PID=$$ exec "$@" 3<&0 4<&1"#, "sh"]);
        command.arg(cell.lab.program("valkey-rdma")?);
        command.args(["bridge", "--to", &cell.server().rdma_address().to_string()]);
        command.env("LISTEN_FDS", "2").env("NOTIFY_SOCKET", folder.join("notify"));
        command.stdin(OwnedFd::from(tcp.try_clone()?)).stdout(OwnedFd::from(unix.try_clone()?));
        Process::spawn(command.stderr(File::create(folder.join(log))?))
    };
    let ask = |stream: &mut dyn Stream| -> Result<()> {
        let mut pong = [0; 7];
        stream.write_all(b"PING\r\n")?;
        stream.read_exact(&mut pong)?;
        ensure!(&pong == b"+PONG\r\n", "another answer than PONG");
        Ok(())
    };
    let mut first = start("first.log")?;
    ensure!(told()?.contains("READY=1"), "it does not say that it is ready");
    let by_tcp = || -> Result<TcpStream> {
        let stream = TcpStream::connect(tcp.local_addr()?)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(stream)
    };
    ask(&mut by_tcp()?)?;
    let mut stream = UnixStream::connect(&path)?;
    stream.set_read_timeout(Some(patience))?;
    ask(&mut stream)?;
    let status = first.ask_to_end(patience)?.context("it does not end")?;
    ensure!(status.success(), "it ended with {status}");
    ensure!(told()?.contains("STOPPING=1"), "it does not say that it ends");
    ensure!(path.exists(), "it has removed a socket of systemd's");

    // Who connects in between waits, and is served by the next.
    let mut waiting = by_tcp()?;
    let mut second = start("second.log")?;
    ask(&mut waiting)?;
    second.end(patience)?;
    Ok(())
}

/// Two thousand at once, each with its own bytes.
fn crowd(cell: &mut Cell) -> Result<()> {
    let count = if cell.lab.is_slow() { 20 } else { 2000 };
    let window = ["--window", "64k"];
    let mut bridge = Bridge::start(cell, cell.server().rdma_address(), "crowd", &window)?;
    let mut crowd = Vec::new();
    for index in 0..count {
        let mut client = bridge.client()?;
        client.request(&[
            b"SET",
            format!("crowd-{index}").as_bytes(),
            &pattern::value(index, 2000),
        ])?;
        crowd.push(client);
    }
    for client in &mut crowd {
        ensure!(client.reply()?.text() == "OK", "SET");
    }
    for (index, client) in crowd.iter_mut().enumerate() {
        client.request(&[b"GET", format!("crowd-{index}").as_bytes()])?;
    }
    for (index, client) in crowd.iter_mut().enumerate() {
        let value = pattern::value(index as u64, 2000);
        ensure!(client.reply()?.bytes() == Some(&value[..]), "other bytes for {index}");
    }
    bridge.wait_metric(RDMA, count)?;
    cell.figure("memory of the bridge", format!("{} KiB each", bridge.resident()? / 1024 / count));
    cell.moved(count as usize * 2000, count as usize * 2000);
    drop(crowd);
    bridge.wait_metric(RDMA, 0)?;
    bridge.end()
}
