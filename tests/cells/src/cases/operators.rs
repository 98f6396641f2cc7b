// SPDX-License-Identifier: BSD-3-Clause
//! What an operator is told: by `RDMA.CLIENTS`, `RDMA.STATS` and `INFO rdma`, by the log, and
//! by the watchdog.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::raw::{Options, Raw};
use client::resp::Stream;
use client::wire::Window;
use client::{Client, Value, pattern, rdma};

use super::basics::{expect, expect_end};
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::lab::LOOPBACK;

pub const CASES: &[Case] = &[
    Case::new("rdma-clients", clients),
    // Probes for the client's sake would give it back as well, later.
    Case::new("reply-memory", reply_memory)
        .with(|settings| settings.arguments.push("keepalive-interval=86400000".to_owned())),
    Case::new("child-memory", child_memory),
    Case::new("rdma-stats", stats).with(|settings| {
        settings.arguments.push("max-handshakes=1".to_owned());
        settings.arguments.push("max-registered-memory=64m".to_owned());
    }),
    Case::new("rdma-commands", commands),
    Case::new("quiet-log", quiet_log),
    Case::new("crash-report", crash_report),
    Case::new("watchdog", watchdog).unstarted(),
    Case::new("watchdog-off", watchdog_off).unstarted(),
];

/// A server that crashes says what the transport counted, on whichever thread it crashed, and
/// does not blame the module for that.
fn crash_report(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    let pid = cell.server().pid();
    let mut thread = pid;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        if std::fs::read_to_string(entry.path().join("comm"))?.starts_with("io_thd") {
            thread = entry.file_name().to_string_lossy().parse()?;
        }
    }
    ensure!((thread != pid) == (cell.id.io_threads > 1), "I/O threads have another name");
    // SAFETY: numbers; a signal to a thread of the cell's own server.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, libc::SIGSEGV) };
    ensure!(sent == 0, "tgkill: {}", std::io::Error::last_os_error());
    let mut server = cell.take_server()?;
    let status = server.wait_exit(cell.lab.patience())?;
    ensure!(!status.success(), "the server ended with {status}");
    let log = server.log()?;
    for words in ["rdma_version:", "rdma_bytes_sent:", "rdma_registered_bytes:"] {
        ensure!(log.contains(words), "the crash report has no {words}");
    }
    ensure!(!log.contains("please report it"), "the crash report blames the module");
    client.stream().wait_end(Instant::now() + cell.lab.patience())?;
    Ok(())
}

/// A map of a reply: names and values in turn.
struct Map(Vec<Value>);

impl Map {
    fn get(&self, name: &str) -> Result<&Value> {
        let mut pairs = self.0.chunks_exact(2);
        let found = pairs.find(|pair| pair[0].bytes() == Some(name.as_bytes()));
        found.map(|pair| &pair[1]).with_context(|| format!("no field '{name}'"))
    }

    fn text(&self, name: &str) -> Result<String> {
        Ok(self.get(name)?.text())
    }

    fn number(&self, name: &str) -> Result<u64> {
        match self.get(name)? {
            Value::Integer(number) => Ok(u64::try_from(*number)?),
            other => anyhow::bail!("{name} is {other}, not a number"),
        }
    }

    fn map(&self, name: &str) -> Result<Map> {
        Ok(Map(self.get(name)?.elements().to_vec()))
    }

    /// That each of these fields has this number.
    fn check(&self, wanted: &[(&str, u64)]) -> Result<()> {
        for (name, number) in wanted {
            let value = self.number(name)?;
            ensure!(value == *number, "{name} is {value} and should be {number}");
        }
        Ok(())
    }
}

/// What `RDMA.CLIENTS` says of the connection from `address`.
fn connection(cell: &Cell, address: SocketAddr) -> Result<Map> {
    let reply = cell.tcp()?.words("RDMA.CLIENTS")?;
    let found = reply.elements().iter().find_map(|entry| {
        let map = Map(entry.elements().to_vec());
        map.text("addr").is_ok_and(|text| text == address.to_string()).then_some(map)
    });
    found.with_context(|| format!("RDMA.CLIENTS has no {address}: {reply}"))
}

/// Its own address as the server sees it, and its number there.
fn identity<S: Stream>(client: &mut Client<S>) -> Result<(u64, SocketAddr)> {
    let info = client.words("CLIENT INFO")?.text();
    let field = |name: &str| {
        let field = info.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        field.with_context(|| format!("CLIENT INFO has no {name}: {info}"))
    };
    Ok((field("id")?.parse()?, field("addr")?.parse()?))
}

/// Waits until `RDMA.CLIENTS` says that the connection from `address` waits for `what`, and
/// says the same of its bytes a moment later: an I/O thread counts what it wrote after that
/// has left, and may be held up in between.
fn wait_for(cell: &Cell, address: SocketAddr, what: &str) -> Result<Map> {
    let deadline = Instant::now() + cell.lab.patience();
    let mut before = None;
    loop {
        let map = connection(cell, address)?;
        let (waits, sent) = (map.text("waits-for")?, map.number("bytes-sent")?);
        if waits == what && before == Some(sent) {
            return Ok(map);
        }
        ensure!(Instant::now() < deadline, "it waits for '{waits}' and not for '{what}'");
        before = Some(sent);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Clients that wait for different things, and what is said of each.
fn clients(cell: &mut Cell) -> Result<()> {
    let value = pattern::value(1, 10 << 20);
    cell.tcp()?.command(&[b"SET", b"big", &value])?;
    ensure!(cell.tcp()?.words("RDMA.CLIENTS")?.elements().is_empty(), "clients before the first");

    // One that has been answered.
    let mut idle = cell.rdma()?;
    let (id, address) = identity(&mut idle)?;
    let before = wait_for(cell, address, "nothing")?;
    expect(&mut idle, "PING", "PONG")?;
    let map = wait_for(cell, address, "nothing")?;
    let announced = idle.stream().peer_window(Instant::now() + cell.lab.patience())?.length;
    map.check(&[
        ("id", id),
        ("bytes-received", before.number("bytes-received")? + b"*1\r\n$4\r\nPING\r\n".len() as u64),
        ("bytes-sent", before.number("bytes-sent")? + b"+PONG\r\n".len() as u64),
        ("bytes-unread", 0),
        ("send-window-filled", map.number("bytes-sent")?),
        ("send-window-size", u64::from(idle.stream().own_window().length)),
        ("receive-window-filled", map.number("bytes-received")?),
        ("receive-window-size", u64::from(announced)),
        ("port", 1),
    ])?;
    ensure!(map.text("laddr")? == cell.server().rdma_address().to_string(), "another laddr");
    ensure!(map.text("state")? == "established", "state {}", map.text("state")?);

    // One that asked for more than its window takes, and does not read.
    let mut stalled = cell.rdma()?;
    let (id, address) = identity(&mut stalled)?;
    let already = connection(cell, address)?.number("bytes-sent")?;
    stalled.request(&[b"GET", b"big"])?;
    let window = u64::from(stalled.stream().own_window().length);
    let wanted = [
        ("id", id),
        ("bytes-sent", window),
        ("send-window-filled", window),
        ("send-window-size", window),
        ("bytes-unread", 0),
    ];
    let map = wait_for(cell, address, "client's window")?;
    map.check(&wanted)?;
    std::thread::sleep(Duration::from_millis(300));
    let later = wait_for(cell, address, "client's window")?;
    later.check(&wanted)?;
    let (first, second) = (map.number("waits-ms")?, later.number("waits-ms")?);
    // The module's clock is true to a tick of the kernel, which is 10 ms at most.
    ensure!(
        second + 10 >= first + 300,
        "it waits for {first} ms, and 300 ms later for {second} ms"
    );
    let info = cell.info()?;
    ensure!(info.number("rdma_connections_window_full")? == 1, "one window is full");
    ensure!(info.number("rdma_window_stalls")? == 1, "one write was held back");

    // One that never announced a window.
    let mute = Raw::open(
        cell.server().rdma_address(),
        &Options::default(),
        Instant::now() + cell.lab.patience(),
    )?;
    let address = mute.local_address().context("a connection without an address")?;
    let map = wait_for(cell, address, "client's announcement")?;
    ensure!(map.text("state")? == "handshaking", "state {}", map.text("state")?);
    ensure!(*map.get("id")? == Value::Null, "a client's number before there is a client");
    mute.disconnect()?;

    // The reader reads on.
    ensure!(stalled.reply()? == Value::Bulk(value.clone()), "another value after the stall");
    let (_, address) = identity(&mut stalled)?;
    let map = wait_for(cell, address, "nothing")?;
    ensure!(
        map.number("bytes-sent")? > already + value.len() as u64,
        "less was sent than was read"
    );
    let info = cell.info()?;
    ensure!(info.number("rdma_connections_window_full")? == 0, "no window is full any more");
    ensure!(
        info.number("rdma_window_stalls_ms")? >= second,
        "a stall of {second} ms and more was counted as {} ms",
        info.number("rdma_window_stalls_ms")?
    );
    drop((idle, stalled));
    settle(cell)?;
    ensure!(cell.tcp()?.words("RDMA.CLIENTS")?.elements().is_empty(), "clients after the last");
    cell.moved(0, value.len());
    Ok(())
}

/// That a connection has staging memory by the size of its replies, and gives it back.
fn reply_memory(cell: &mut Cell) -> Result<()> {
    const MOST: u64 = 5 << 18;
    let mut client = cell.rdma()?;
    let (_, address) = identity(&mut client)?;
    let staging = |cell: &Cell| wait_for(cell, address, "nothing")?.number("staging-buffer");
    let small = staging(cell)?;
    let before = cell.info()?.number("rdma_registered_bytes")?;
    let mut seen = vec![small];
    // The server writes what it has in as many pieces as it likes, so a bound is all there is.
    for (length, most) in [(1000, 0), (16_000, 64 << 10), (60_000, 256 << 10), (8 << 20, MOST)] {
        let value = pattern::value(length, length as usize);
        cell.tcp()?.command(&[b"SET", b"key", &value])?;
        for _ in 0..3 {
            let read = client.command(&[b"GET", b"key"])?;
            ensure!(read == Value::Bulk(value.clone()), "{length} bytes came back changed");
        }
        cell.moved(0, 3 * value.len());
        let now = staging(cell)?;
        ensure!(now <= small + most, "{now} bytes of staging memory for replies of {length} bytes");
        seen.push(now);
    }
    ensure!(seen.last() > seen.first(), "the staging memory never grew");
    let registered = cell.info()?.number("rdma_registered_bytes")?;
    ensure!(registered <= before + MOST, "{registered} bytes registered, {before} before");
    cell.wait_info("the memory to be given back", |info| {
        Ok(info.number("rdma_registered_bytes")? <= before)
    })?;
    ensure!(staging(cell)? == small, "other staging memory than at first");
    cell.figure("staging memory", format!("{seen:?}"));
    Ok(())
}

/// What is registered is not copied into a forked child: all of it is kept out of it.
fn child_memory(cell: &mut Cell) -> Result<()> {
    let kept_out = |cell: &Cell| -> Result<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", cell.server().pid()))?;
        let (mut private, mut size, mut sum) = (false, 0, 0);
        for line in maps.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                ["Size:", kib, ..] => size = kib.parse::<u64>()? << 10,
                ["VmFlags:", ..] if private && words.contains(&"dc") => sum += size,
                // A range, its rights, and of no file: the fabric shares some with others.
                [_, rights, _, _, inode, ..] if rights.len() == 4 && !line.contains(" kB") => {
                    private = rights.ends_with('p') && inode == "0";
                }
                _ => {}
            }
        }
        Ok(sum)
    };
    let registered = |cell: &Cell| cell.info()?.number("rdma_registered_bytes");
    // The first client brings along what the fabric keeps out for reasons of its own.
    let mut first = cell.rdma()?;
    expect(&mut first, "PING", "PONG")?;
    let before = (registered(cell)?, kept_out(cell)?);

    // Small buffers, large ones, two of them, and staging memory.
    let value = pattern::value(3, 8 << 20);
    first.command(&[b"SET", b"key", &value])?;
    ensure!(first.command(&[b"GET", b"key"])? == Value::Bulk(value.clone()), "another value");
    let mut others = (0..10).map(|_| cell.rdma()).collect::<Result<Vec<_>>>()?;
    for other in &mut others {
        expect(other, "PING", "PONG")?;
    }
    let (registered, kept) = (registered(cell)? - before.0, kept_out(cell)? - before.1);
    ensure!(registered > 10 * (32 << 10), "only {registered} bytes more are registered");
    ensure!(kept >= registered, "a child gets all but {kept} of {registered} registered bytes");
    cell.moved(value.len(), value.len());
    cell.figure("registered, and kept out of children", format!("{registered}, {kept}"));
    Ok(())
}

/// Counters by reason and kind, limits, devices; the same from `RDMA.STATS` and from `INFO`.
fn stats(cell: &mut Cell) -> Result<()> {
    let soon = || Instant::now() + cell.lab.patience();
    let open = || Raw::open(cell.server().rdma_address(), &Options::default(), soon());
    let peak = cell.info()?.number("rdma_registered_peak_bytes")?;
    ensure!(peak == 0, "{peak} bytes were registered before the first client");

    // A message that is none.
    let mut bad = open()?;
    bad.send(&[0xff; 32])?;
    bad.wait_end(soon())?;
    settle(cell)?;
    // A window with a key that is none: the reply fails.
    let mut lying = open()?;
    let own = lying.window();
    lying.send(&Window { rkey: own.rkey ^ 0x00ff_ff00, ..own }.announcement())?;
    let window = lying.peer_window(soon())?;
    let ping = b"*1\r\n$4\r\nPING\r\n";
    lying.write(window.address, window.rkey, ping, Some(ping.len() as u32))?;
    lying.wait_end(soon())?;
    settle(cell)?;
    // One in handshake is all that may be.
    let waiting = open()?;
    cell.wait_info("a handshake", |info| Ok(info.number("rdma_connections_handshaking")? == 1))?;
    ensure!(open().is_err(), "a second handshake at the limit of one");

    let reply = Map(cell.tcp()?.words("RDMA.STATS")?.elements().to_vec());
    reply.check(&[
        ("violations", 1),
        ("violations_message", 1),
        ("ended_by_violation", 1),
        ("error_completions", 1),
        ("errors_remote_access", 1),
        ("ended_by_error", 1),
        ("connections_refused", 1),
        ("refused_handshakes", 1),
        ("connections_handshaking", 1),
        ("watchdog_nudges", 0),
    ])?;
    let limits = reply.map("limits")?;
    limits.map("handshakes")?.check(&[("now", 1), ("most", 1)])?;
    let registered = reply.number("registered_bytes")?;
    ensure!(registered > 0, "nothing is registered for a connection in handshake");
    limits.map("registered_bytes")?.check(&[("now", registered), ("most", 64 << 20)])?;
    let device = only_device(&reply)?;
    ensure!(device.get("ports")?.elements() == [Value::Integer(1)], "not port 1 alone");
    device.check(&[("connections", 1), ("completion-queues", 1)])?;
    ensure!(
        device.number("completion-entries-reserved")? > 0
            && device.number("completion-entries")?
                >= device.number("completion-entries-reserved")?,
        "more entries of the queue are reserved than there are"
    );

    let info = cell.info()?;
    for pair in reply.0.chunks_exact(2) {
        if let Value::Integer(_) = pair[1] {
            info.number(&format!("rdma_{}", pair[0]))?;
        }
    }
    for name in ["violations_message", "errors_remote_access", "refused_handshakes"] {
        ensure!(info.number(&format!("rdma_{name}"))? == 1, "INFO and RDMA.STATS differ in {name}");
    }
    ensure!(info.text("rdma_limit_handshakes")? == "1/1", "another limit on handshakes");
    let wanted = format!("{registered}/{}", 64 << 20);
    ensure!(info.text("rdma_limit_registered_bytes")? == wanted, "another limit on memory");
    let device = info.text("rdma_device0")?;
    ensure!(
        device.contains("name=")
            && device.contains(",ports=1,")
            && device.contains("receive-slots="),
        "INFO shows the device as {device}"
    );
    waiting.disconnect()?;
    Ok(())
}

/// The device in what `RDMA.STATS` answered.
fn only_device(stats: &Map) -> Result<Map> {
    let devices = stats.get("devices")?.elements();
    ensure!(devices.len() == 1, "{} devices instead of one", devices.len());
    Ok(Map(devices[0].elements().to_vec()))
}

/// Completion queues of the only device.
pub(super) fn completion_queues(cell: &Cell) -> Result<u64> {
    let stats = Map(cell.tcp()?.words("RDMA.STATS")?.elements().to_vec());
    only_device(&stats)?.number("completion-queues")
}

/// Who may call the commands, and what the server knows of them.
fn commands(cell: &mut Cell) -> Result<()> {
    let mut admin = cell.tcp()?;
    for name in ["RDMA.CLIENTS", "RDMA.STATS"] {
        ensure!(!admin.words(name)?.is_error(), "{name} for everybody");
        let reply = admin.words(&format!("{name} more"))?;
        ensure!(reply.text().contains("wrong number of arguments"), "{name} more: {reply}");
        let info = admin.words(&format!("COMMAND INFO {name}"))?;
        let entry = info.elements().first().context("no COMMAND INFO")?.elements();
        ensure!(entry.get(1) == Some(&Value::Integer(1)), "{name}: arity {:?}", entry.get(1));
        let docs = admin.words(&format!("COMMAND DOCS {name}"))?.text();
        for words in ["summary", "RDMA", "module", "since 0.1.0", "complexity"] {
            ensure!(docs.contains(words), "COMMAND DOCS {name} without '{words}': {docs}");
        }
    }

    expect(&mut admin, "ACL SETUSER most on nopass +@all -@rdma", "OK")?;
    expect(&mut admin, "ACL SETUSER plain on nopass +@all -@admin", "OK")?;
    expect(&mut admin, "ACL SETUSER watcher on nopass +@rdma +@connection", "OK")?;
    for (user, may) in [("most", false), ("plain", false), ("watcher", true)] {
        // Over RDMA too: the command then looks at the connection that it came by.
        let mut client = cell.rdma()?;
        expect(&mut client, &format!("AUTH {user} x"), "OK")?;
        for name in ["RDMA.CLIENTS", "RDMA.STATS"] {
            let reply = client.words(name)?;
            let refused = reply.text().contains("NOPERM");
            ensure!(refused != may && reply.is_error() != may, "{name} of {user}: {reply}");
        }
    }

    // Maps to a client that speaks RESP3.
    let mut stream = TcpStream::connect((LOOPBACK, cell.server().settings().port))?;
    stream.set_read_timeout(Some(cell.lab.patience()))?;
    let mut ask = |request: &str| -> Result<u8> {
        stream.write_all(request.as_bytes())?;
        let mut answer = [0; 4096];
        let count = stream.read(&mut answer)?;
        ensure!(count > 0, "no answer to {request}");
        // What is left of a long answer.
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        while stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        stream.set_read_timeout(Some(cell.lab.patience()))?;
        Ok(answer[0])
    };
    ensure!(ask("RDMA.STATS\r\n")? == b'*', "no array in RESP2");
    ask("HELLO 3\r\n")?;
    ensure!(ask("RDMA.STATS\r\n")? == b'%', "no map in RESP3");
    Ok(())
}

/// The module's lines of the log at notice level and above.
fn loud_lines(cell: &Cell) -> Result<Vec<String>> {
    let lines = cell.server().log_lines("<rdma>")?;
    Ok(lines.into_iter().filter(|line| line.contains(" * <") || line.contains(" # <")).collect())
}

/// Ordinary traffic, and clients that come and go, leave no line in the log.
fn quiet_log(cell: &mut Cell) -> Result<()> {
    let before = loud_lines(cell)?;
    ensure!(!before.is_empty(), "the module said nothing when it was loaded");
    let value = pattern::value(2, 3 << 20);
    for round in 0..20 {
        let mut client = cell.rdma()?;
        ensure!(client.command(&[b"SET", b"key", &value])?.text() == "OK", "SET");
        ensure!(client.command(&[b"GET", b"key"])? == Value::Bulk(value.clone()), "GET");
        expect(&mut client, "PING", "PONG")?;
        match round % 4 {
            // Killed, as it were.
            0 => drop(client),
            1 => client.into_stream().disconnect(cell.lab.patience())?,
            2 => {
                expect(&mut client, "QUIT", "OK")?;
                expect_end(&mut client)?;
            }
            _ => {
                let (id, _) = identity(&mut client)?;
                expect(&mut cell.tcp()?, &format!("CLIENT KILL ID {id}"), "1")?;
                expect_end(&mut client)?;
            }
        }
    }
    settle(cell)?;
    cell.moved(20 * value.len(), 20 * value.len());
    let after = loud_lines(cell)?;
    ensure!(after == before, "the log has new lines: {:?}", &after[before.len()..]);
    Ok(())
}

/// A server with the build that can be told to forget an endpoint, one client of it, and the
/// folder by which it is told.
fn forgetful(cell: &mut Cell, timeout: &str) -> Result<Client<rdma::Connection>> {
    let orders = cell.folder().join("orders");
    std::fs::create_dir_all(&orders)?;
    cell.settings.module = Some(cell.lab.variant("with-panics")?);
    let variable = ("VALKEY_RDMA_TEST_PANICS".to_owned(), orders.display().to_string());
    cell.settings.environment.push(variable);
    cell.settings.arguments.push(format!("watchdog-timeout={timeout}"));
    cell.start()?;
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    // A tick of the clock looks at nothing else while it waits.
    let order = orders.join("mark_ready");
    std::fs::write(&order, "")?;
    client.request(&[b"PING"])?;
    let deadline = Instant::now() + cell.lab.patience();
    while order.exists() {
        ensure!(Instant::now() < deadline, "nothing was to be forgotten");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(client)
}

/// A connection that was forgotten is found, said, counted and served.
fn watchdog(cell: &mut Cell) -> Result<()> {
    let mut client = forgetful(cell, "1000")?;
    let started = Instant::now();
    ensure!(client.reply()?.text() == "PONG", "PING after the nudge");
    cell.figure("rescued after", format!("{:.1} s", started.elapsed().as_secs_f64()));
    cell.expect_nudges(1);
    let line = cell.server().wait_log("has been nudged", cell.lab.patience())?;
    let (_, address) = identity(&mut client)?;
    for words in [&address.to_string(), "waits-for=pass", "bytes-unread=14"] {
        ensure!(line.contains(words), "'{words}' is missing in: {line}");
    }
    expect(&mut client, "PING", "PONG")
}

/// Without the watchdog it stays so, which is what the case above is worth.
fn watchdog_off(cell: &mut Cell) -> Result<()> {
    let mut client = forgetful(cell, "0")?;
    client.set_timeout(Duration::from_secs(8));
    ensure!(client.reply().is_err_and(|error| error.is_timeout()), "served all the same");
    ensure!(cell.info()?.number("rdma_watchdog_nudges")? == 0, "nudged by what is off");
    Ok(())
}
