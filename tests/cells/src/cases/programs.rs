// SPDX-License-Identifier: BSD-3-Clause
//! The client library, and the command `valkey-rdma` that is built on it.

use std::io::{self, BufRead, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::pattern;
use library::{Connecting, Connection, Error, Options};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::upstream::Upstream;
use crate::cell::{Case, Cell};
use crate::process::run;
use crate::server::free_port;

pub const CASES: &[Case] = &[
    Case::new("library", library_serves),
    Case::new("library-crowd", library_crowd),
    Case::new("library-upstream", library_upstream).unstarted(),
    Case::new("tool", tool),
];

/// Bytes of values: none, few, at the edges of staging memory and windows, and many.
const SIZES: [usize; 9] =
    [0, 1, 14_080, 16 << 10, 100_000, (1 << 20) - 1, (1 << 20) + 1, 5_000_000, 64 << 20];

fn open(address: SocketAddr, patience: Duration) -> Result<Connection> {
    let options = Options { timeout: patience, ..Options::default() };
    Ok(Connection::open(address, &options)?)
}

/// Writes a command, in one call of several pieces.
fn say(connection: &mut Connection, words: &[&[u8]]) -> Result<()> {
    let mut pieces = vec![format!("*{}\r\n", words.len()).into_bytes()];
    for word in words {
        pieces.push(format!("${}\r\n", word.len()).into_bytes());
        pieces.push(word.to_vec());
        pieces.push(b"\r\n".to_vec());
    }
    let mut slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let mut slices = &mut slices[..];
    // Ends of words of no bytes too, so that one of them is not waited for.
    while !slices.is_empty() {
        let count = connection.write_vectored(slices)?;
        IoSlice::advance_slices(&mut slices, count);
        while slices.first().is_some_and(|slice| slice.is_empty()) {
            slices = &mut slices[1..];
        }
    }
    Ok(())
}

fn hear(connection: &mut Connection, wanted: &[u8]) -> Result<()> {
    let mut bytes = vec![0; wanted.len()];
    connection.read_exact(&mut bytes)?;
    ensure!(bytes == wanted, "other bytes than those that were to come ({})", wanted.len());
    Ok(())
}

/// SET and GET of one value.
fn there_and_back(connection: &mut Connection, seed: u64, size: usize) -> Result<()> {
    let value = pattern::value(seed, size);
    say(connection, &[b"SET", b"key", &value])?;
    hear(connection, b"+OK\r\n")?;
    say(connection, &[b"GET", b"key"])?;
    let mut reply = format!("${size}\r\n").into_bytes();
    reply.extend_from_slice(&value);
    reply.extend_from_slice(b"\r\n");
    hear(connection, &reply)
}

/// Values of all sizes, commands in one go, and each way in which a connection ends or waits.
fn library_serves(cell: &mut Cell) -> Result<()> {
    let address = cell.server().rdma_address();
    let patience = cell.lab.patience();
    let mut connection = open(address, patience)?;
    let sizes = if cell.lab.is_slow() { &SIZES[..7] } else { &SIZES[..] };
    let mut moved = 0;
    for (seed, &size) in sizes.iter().enumerate() {
        there_and_back(&mut connection, seed as u64, size).with_context(|| format!("{size} B"))?;
        moved += size;
    }
    // A window that fills slowly has no second one beside it: it is announced when it was read.
    for seed in 0..6 {
        there_and_back(&mut connection, seed, 300_000).context("slowly")?;
        moved += 300_000;
        std::thread::sleep(Duration::from_millis(400));
    }
    cell.moved(moved, moved);

    // So many that neither side's window takes all of it at once.
    const COUNT: usize = 20_000;
    let requests = b"PING\r\n".repeat(COUNT);
    let mut written = 0;
    let mut replies = Vec::new();
    let deadline = Instant::now() + patience;
    while replies.len() < 7 * COUNT {
        ensure!(Instant::now() < deadline, "{} bytes of replies", replies.len());
        if written < requests.len() {
            written += or_wait(connection.try_write(&[IoSlice::new(&requests[written..])]))?;
        }
        let mut bytes = [0; 4096];
        let count = or_wait(connection.try_read(&mut bytes))?;
        replies.extend_from_slice(&bytes[..count]);
    }
    ensure!(replies == b"+PONG\r\n".repeat(COUNT), "other replies than PONG");

    event_loop(address, patience).context("in an event loop")?;
    cell.moved(5_000_000, 5_000_000);

    // A server that stands still is waited for, and no longer than was said.
    connection.set_timeout(Some(Duration::from_millis(300)));
    let stopped = cell.server().pause();
    connection.write_all(b"PING\r\n")?;
    let error = connection.read(&mut [0; 16]).err().context("an answer of a stopped server")?;
    ensure!(error.kind() == io::ErrorKind::TimedOut, "instead of a time-out: {error}");
    drop(stopped);
    connection.set_timeout(Some(patience));
    hear(&mut connection, b"+PONG\r\n").context("after the time-out")?;

    // What is written before a close arrives.
    let value = pattern::value(77, 300_000);
    say(&mut connection, &[b"SET", b"closed", &value])?;
    connection.close()?;
    let mut connection = open(address, patience)?;
    say(&mut connection, &[b"STRLEN", b"closed"])?;
    hear(&mut connection, b":300000\r\n")?;

    // The server's end is one.
    say(&mut connection, &[b"QUIT"])?;
    hear(&mut connection, b"+OK\r\n")?;
    ensure!(connection.read(&mut [0; 16])? == 0, "bytes after QUIT");
    let error = connection.write(b"PING\r\n").err().context("a write after the end")?;
    ensure!(error.kind() == io::ErrorKind::ConnectionAborted, "instead of an end: {error}");

    // Nobody there.
    let nobody = SocketAddr::new(address.ip(), free_port()?);
    match Connection::open(nobody, &Options { timeout: patience, ..Options::default() }) {
        Err(error @ Error::NotConnected(..)) => {
            let text = error.to_string();
            ensure!(text.contains("no server listens there"), "it says: {text}");
        }
        other => anyhow::bail!("where nobody is: {other:?}"),
    }
    Ok(())
}

/// One thread that waits for edges alone, and bytes that nobody copies: filled in where they are
/// sent from, and looked at where they arrived.
fn event_loop(address: SocketAddr, patience: Duration) -> Result<()> {
    let mut events = Events::with_capacity(8);
    let mut poll = Poll::new()?;
    let watch = |poll: &Poll, fd| {
        poll.registry().register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
    };
    let mut connecting =
        Connecting::begin(address, &Options { timeout: patience, ..Options::default() })?;
    let mut watched = 0;
    let mut connection = loop {
        if let Some(connection) = connecting.progress()? {
            break connection;
        }
        for fd in connecting.descriptors().skip(watched) {
            watch(&poll, fd)?;
            watched += 1;
        }
        let left = connecting.deadline().saturating_duration_since(Instant::now());
        poll.poll(&mut events, Some(left))?;
        ensure!(!events.is_empty(), "waited in vain for {}", connecting.awaited());
    };
    // Those that joined in the last step; one that is watched already is refused.
    for fd in connection.descriptors() {
        let _ = watch(&poll, fd);
    }

    let value = pattern::value(4, 5_000_000);
    let command = |words: &str| words.replace(' ', "\r\n").into_bytes();
    let mut request = command("*3 $3 SET $6 filled $5000000 ");
    request.extend_from_slice(&value);
    request.extend(command(" *2 $3 GET $6 filled "));
    let mut wanted = command("+OK $5000000 ");
    wanted.extend_from_slice(&value);
    wanted.extend(command(" "));

    let (mut request, mut wanted) = (&request[..], &wanted[..]);
    connection.progress()?;
    while !wanted.is_empty() {
        while !request.is_empty() {
            let filled = connection.try_fill(100_000, |place| request.read(place))?;
            if filled.transpose()?.is_none() {
                break;
            }
        }
        match connection.try_fill_buf() {
            Ok(arrived) => {
                // Not all at once, as a program that parses would.
                let count = arrived.len().min(10_000);
                ensure!(wanted.starts_with(&arrived[..count]), "{} to come", wanted.len());
                wanted = &wanted[count..];
                connection.consume(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll.poll(&mut events, Some(patience))?;
                ensure!(!events.is_empty(), "no event, and {} bytes to come", wanted.len());
                connection.progress()?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    while !connection.try_close()? {
        poll.poll(&mut events, Some(patience))?;
        ensure!(!events.is_empty(), "no event while it closes");
    }
    Ok(())
}

/// Nothing, where it would have to wait.
fn or_wait(outcome: io::Result<usize>) -> io::Result<usize> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        outcome => outcome,
    }
}

/// Many connections, each with its own bytes, of which some vanish in the middle.
fn library_crowd(cell: &mut Cell) -> Result<()> {
    let count = if cell.lab.is_slow() { 10 } else { 200 };
    let address = cell.server().rdma_address();
    let mut crowd = Vec::new();
    let options = Options { window: 64 << 10, timeout: cell.lab.patience(), ..Options::default() };
    for _ in 0..count {
        crowd.push(Connection::open(address, &options)?);
    }
    for round in 0..3 {
        for (index, connection) in crowd.iter_mut().enumerate() {
            let name = format!("{round}-{index}");
            let value = pattern::value(index as u64, 1000 * round + index);
            say(connection, &[b"SET", name.as_bytes(), &value])?;
        }
        for connection in &mut crowd {
            hear(connection, b"+OK\r\n")?;
        }
        for (index, connection) in crowd.iter_mut().enumerate() {
            say(connection, &[b"GET", format!("{round}-{index}").as_bytes()])?;
        }
        for (index, connection) in crowd.iter_mut().enumerate() {
            let value = pattern::value(index as u64, 1000 * round + index);
            let mut reply = format!("${}\r\n", value.len()).into_bytes();
            reply.extend_from_slice(&value);
            reply.extend_from_slice(b"\r\n");
            hear(connection, &reply)?;
        }
        crowd.truncate(crowd.len() - count / 5);
    }
    let left = crowd.len() as u64;
    cell.wait_info("those that left are gone", |info| {
        Ok(info.number("rdma_connections_established")? == left)
    })?;
    let bytes = (0..count).sum::<usize>();
    cell.moved(bytes, bytes);
    Ok(())
}

/// The same bytes through upstream's own module, which is built for 9.1 only.
fn library_upstream(cell: &mut Cell) -> Result<()> {
    let Upstream { process: mut server, rdma: address, .. } = Upstream::spawn(cell, "upstream")?;
    let deadline = Instant::now() + cell.lab.patience();
    let mut connection = loop {
        match open(address, cell.lab.patience()) {
            Ok(connection) => break connection,
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(30)),
            Err(error) => return Err(error).context("upstream's server"),
        }
    };
    for (seed, size) in SIZES.into_iter().enumerate() {
        there_and_back(&mut connection, seed as u64, size).with_context(|| format!("{size} B"))?;
    }
    connection.close()?;
    server.end(Duration::from_secs(5)).map(drop)
}

/// `valkey-rdma ping` and `valkey-rdma check`, as a person types them.
fn tool(cell: &mut Cell) -> Result<()> {
    let program = cell.lab.program("valkey-rdma")?;
    let patience = cell.lab.patience();
    let address = cell.server().rdma_address().to_string();
    let tcp = cell.server().tcp_address().port().to_string();
    let folder = cell.folder().to_owned();
    let try_it = |words: &[&str]| run(Command::new(&program).args(words), b"", &folder, patience);

    let pinged = try_it(&["ping", &address, "--count", "5", "--interval", "0", "--tcp", &tcp])?;
    let text = pinged.text();
    let answers = |carrier: &str| text.matches(&format!("({carrier}")).count();
    ensure!((answers("RDMA, "), answers("TCP)")) == (5, 5), "{text}{}", pinged.stderr);
    ensure!(text.matches("5 sent, 5 answered").count() == 2, "no sums: {text}");

    let size = "3000000";
    let echoed = try_it(&["ping", &address, "-q", "-c", "3", "-i", "0", "--size", size])?;
    ensure!(echoed.text().contains("MB/s each way"), "{}{}", echoed.text(), echoed.stderr);
    cell.moved(3 * 3_000_000, 3 * 3_000_000);

    let checked = try_it(&["check", &address, "--json", "--examine"])?;
    let text = checked.text();
    ensure!(text.contains(r#""found":"PING: PONG""#), "{text}{}", checked.stderr);
    ensure!(text.contains("immediate: passed"), "the device was not examined: {text}");
    ensure!(text.contains(r#""works":true"#), "it does not work: {text}");

    let nobody = SocketAddr::new(cell.lab.address, free_port()?).to_string();
    let failed = Command::new(&program).args(["ping", &nobody, "-c", "1"]).output()?;
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    ensure!(failed.status.code() == Some(2) && text.contains("no server listens"), "{text}");
    let failed = Command::new(&program).args(["check", &nobody]).output()?;
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    ensure!(failed.status.code() == Some(1) && text.contains("FAIL server"), "{text}");
    Ok(())
}
