// SPDX-License-Identifier: BSD-3-Clause
//! That commands of every manner work over RDMA as they do over TCP.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::resp::{Client, Stream, encode};
use client::{Value, pattern, rdma};

use crate::cell::{Case, Cell};
use crate::process::run;

pub const CASES: &[Case] = &[
    Case::new("commands", commands),
    Case::new("waiting", waiting),
    Case::new("reply-off", reply_off),
    Case::new("pipeline", pipeline),
    Case::new("last-words", last_words)
        .with(|settings| settings.arguments.push("linger-time=200".to_owned())),
    Case::new("listed", listed),
    Case::new("verbs-example", verbs_example),
];

/// Sends a command of plain words and compares the reply.
pub fn expect<S: Stream>(client: &mut Client<S>, line: &str, wanted: &str) -> Result<()> {
    let reply = client.words(line)?.text();
    ensure!(reply == wanted, "{line}: '{reply}' instead of '{wanted}'");
    Ok(())
}

/// PING, SET, GET and MULTI.
fn commands(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    expect(&mut client, "ECHO hello", "hello")?;
    let value = pattern::value(1, 3000);
    ensure!(client.command(&[b"SET", b"key", &value])?.text() == "OK", "SET");
    let read = client.command(&[b"GET", b"key"])?;
    ensure!(read == Value::Bulk(value.clone()), "GET: another value");
    cell.moved(value.len(), value.len());

    expect(&mut client, "MULTI", "OK")?;
    expect(&mut client, "INCR counter", "QUEUED")?;
    expect(&mut client, "INCRBY counter 41", "QUEUED")?;
    let replies = client.words("EXEC")?;
    ensure!(
        replies == Value::Array(vec![Value::Integer(1), Value::Integer(42)]),
        "EXEC: {replies}"
    );

    let mut other = cell.rdma()?;
    expect(&mut other, "WATCH counter", "OK")?;
    expect(&mut client, "INCR counter", "43")?;
    expect(&mut other, "MULTI", "OK")?;
    expect(&mut other, "INCR counter", "QUEUED")?;
    ensure!(other.words("EXEC")? == Value::Null, "EXEC in spite of WATCH");

    let error = client.words("INCR key")?;
    ensure!(error.is_error(), "INCR of text: {error}");
    ensure!(client.words("NOSUCHCOMMAND")?.is_error(), "an unknown command");
    ensure!(client.words("HELLO 3")?.elements().len() >= 10, "HELLO 3");
    expect(&mut client, "PING", "PONG")
}

/// A client of a few lines on the module's own crates, which lists the devices as well.
fn verbs_example(cell: &mut Cell) -> Result<()> {
    let program = cell.lab.example("rdma_ping")?;
    let patience = cell.lab.patience();
    let devices = run(&mut Command::new(&program), b"", cell.folder(), patience)?;
    ensure!(!devices.text().is_empty(), "no device; {}", devices.stderr);
    let address = cell.server().rdma_address().to_string();
    let reply = run(Command::new(&program).arg(address), b"", cell.folder(), patience)?;
    ensure!(reply.text() == "+PONG\r\n", "the reply '{}'; {}", reply.text(), reply.stderr);
    cell.figure("devices", devices.text().trim_end().replace('\n', ", "));
    cell.moved("PING\r\n".len(), "+PONG\r\n".len());
    Ok(())
}

/// Pub/sub and BLPOP: replies that come when someone else acts.
fn waiting(cell: &mut Cell) -> Result<()> {
    let mut subscriber = cell.rdma()?;
    let mut publisher = cell.rdma()?;
    subscriber.words("SUBSCRIBE news")?;
    let mut bytes = 0;
    for (round, size) in [10, 3000, 500_000].into_iter().enumerate() {
        let message = pattern::value(round as u64, size);
        let reply = publisher.command(&[b"PUBLISH", b"news", &message])?;
        ensure!(reply == Value::Integer(1), "PUBLISH: {reply}");
        let push = subscriber.reply()?;
        ensure!(
            push.elements().get(2) == Some(&Value::Bulk(message)),
            "the message of {size} bytes did not arrive as it was"
        );
        bytes += size;
    }
    cell.moved(bytes, bytes);

    let mut waiter = cell.rdma()?;
    waiter.request(&[b"BLPOP", b"queue", b"0"])?;
    cell.wait_info("a blocked client", |info| Ok(info.number("blocked_clients")? == 1))?;
    let value = pattern::value(9, 20_000);
    publisher.command(&[b"RPUSH", b"queue", &value])?;
    let reply = waiter.reply()?;
    ensure!(reply.elements().get(1) == Some(&Value::Bulk(value)), "BLPOP: another value");

    // One that leaves while it waits takes nothing.
    waiter.request(&[b"BLPOP", b"queue", b"0"])?;
    cell.wait_info("a blocked client", |info| Ok(info.number("blocked_clients")? == 1))?;
    drop(waiter);
    cell.wait_info("no blocked client", |info| Ok(info.number("blocked_clients")? == 0))?;
    expect(&mut publisher, "RPUSH queue x", "1")?;
    expect(&mut publisher, "LLEN queue", "1")
}

/// CLIENT REPLY OFF and SKIP: commands that are done and not answered.
fn reply_off(cell: &mut Cell) -> Result<()> {
    let mut client = cell.rdma()?;
    client.request(&[b"CLIENT", b"REPLY", b"OFF"])?;
    for _ in 0..1000 {
        client.request(&[b"INCR", b"counter"])?;
    }
    client.request(&[b"CLIENT", b"REPLY", b"ON"])?;
    ensure!(client.reply()?.text() == "OK", "CLIENT REPLY ON");
    expect(&mut client, "GET counter", "1000")?;
    client.request(&[b"CLIENT", b"REPLY", b"SKIP"])?;
    client.request(&[b"INCR", b"counter"])?;
    expect(&mut client, "GET counter", "1001")?;
    cell.moved(1000 * 20, 10);
    Ok(())
}

/// 10,000 commands before the first reply is read.
fn pipeline(cell: &mut Cell) -> Result<()> {
    const COMMANDS: usize = 10_000;
    let mut client = cell.rdma()?;
    let mut requests = Vec::new();
    for number in 0..COMMANDS {
        let value = number.to_string();
        encode(&mut requests, &[b"SET", b"key", value.as_bytes()]);
        encode(&mut requests, &[b"GET", b"key"]);
    }
    let started = Instant::now();
    client.send(&requests)?;
    for number in 0..COMMANDS {
        let (set, get) = (client.reply()?, client.reply()?);
        ensure!(set.text() == "OK", "SET number {number}: {set}");
        ensure!(get.text() == number.to_string(), "GET number {number}: {get}");
    }
    cell.figure(
        "pipelined commands/s",
        format!("{:.0}", 2.0 * COMMANDS as f64 / started.elapsed().as_secs_f64()),
    );
    cell.moved(requests.len(), COMMANDS * 10);
    Ok(())
}

/// What a server says right before it closes arrives all the same, also while a child of its
/// runs: then it shuts connections down before it closes them.
fn last_words(cell: &mut Cell) -> Result<()> {
    let value = pattern::value(4, 900_000);
    cell.tcp()?.command(&[b"SET", b"long", &value])?;
    last_words_of_all_kinds(cell, &value)?;

    // Left to itself the child would be done before the first connection is.
    let mut admin = cell.tcp()?;
    for key in 0..100 {
        expect(&mut admin, &format!("SET key:{key} x"), "OK")?;
    }
    expect(&mut admin, "CONFIG SET rdb-key-save-delay 1000000", "OK")?;
    ensure!(!admin.words("BGSAVE")?.is_error(), "BGSAVE");
    cell.wait_info("the child", |info| Ok(info.number("rdb_bgsave_in_progress")? == 1))?;
    last_words_of_all_kinds(cell, &value).context("while a child runs")?;
    ensure!(cell.info()?.number("rdb_bgsave_in_progress")? == 1, "the child ended too early");
    Ok(())
}

fn last_words_of_all_kinds(cell: &mut Cell, long: &[u8]) -> Result<()> {
    for _ in 0..3 {
        let mut client = cell.rdma()?;
        client.request(&[b"QUIT"])?;
        ensure!(client.reply()?.text() == "OK", "QUIT");
        expect_end(&mut client)?;
    }
    for _ in 0..3 {
        let mut client = cell.rdma()?;
        client.send(b"*1\r\n$-7\r\n")?;
        let reply = client.reply()?;
        ensure!(reply.text().contains("Protocol error"), "after a broken request: {reply}");
        expect_end(&mut client)?;
    }
    // A long answer, and the connection's end right behind it.
    for _ in 0..3 {
        let mut client = cell.rdma()?;
        let mut requests = Vec::new();
        encode(&mut requests, &[b"GET", b"long"]);
        encode(&mut requests, &[b"QUIT"]);
        client.send(&requests)?;
        ensure!(client.reply()? == Value::Bulk(long.to_owned()), "GET before QUIT");
        ensure!(client.reply()?.text() == "OK", "QUIT after GET");
        expect_end(&mut client)?;
        cell.moved(0, long.len());
    }
    cell.wait_info("all connections gone", |info| {
        Ok(info.number("rdma_connections_established")? == 0
            && info.number("rdma_connections_lingering")? == 0)
    })?;
    Ok(())
}

/// Waits for the server to close the connection.
pub fn expect_end(client: &mut Client<rdma::Connection>) -> Result<()> {
    client.stream().wait_end(Instant::now() + Duration::from_secs(20))?;
    Ok(())
}

/// The listener in INFO, the connection in CLIENT LIST.
fn listed(cell: &mut Cell) -> Result<()> {
    let address = cell.server().rdma_address();
    let mut client = cell.rdma()?;
    // Once it is answered it is the server's client, and counted.
    let id = client.words("CLIENT ID")?.text();
    let info = cell.info()?;
    let listener = (0..8)
        .filter_map(|number| info.text(&format!("listener{number}")).ok())
        .find(|text| text.contains("name=rdma"));
    let wanted = format!("port={}", address.port());
    ensure!(
        listener.is_some_and(|text| {
            text.contains(&wanted) && text.contains(&address.ip().to_string())
        }),
        "INFO server shows the listener as {listener:?}"
    );
    let list = client.words(&format!("CLIENT LIST ID {id}"))?.text();
    ensure!(
        list.contains(&format!("laddr={address}"))
            && list.contains("addr=")
            && !list.contains("fd=-1"),
        "CLIENT LIST shows {list}"
    );
    expect(&mut client, "CLIENT SETNAME tester", "OK")?;
    ensure!(info.number("rdma_connections_established")? >= 1, "INFO rdma shows no connection");
    cell.moved(20, 100);
    Ok(())
}
