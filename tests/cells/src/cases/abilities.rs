// SPDX-License-Identifier: BSD-3-Clause
//! What a server can do with the module in it: all that it could without, and RDMA.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::{Client, Value, pattern, tcp};

use super::basics::expect;
use crate::cell::{Case, Cell, no_crash};
use crate::lab::LOOPBACK;
use crate::server::{Server, free_port};

pub const CASES: &[Case] = &[
    Case::new("abilities", abilities),
    Case::new("abilities-swapdb", swapdb).unstarted(),
    Case::new("abilities-migration", migration).unstarted(),
];

/// What a server may answer differently from the next one, module or not: where it runs and
/// what it was told.
const OWN_SETTINGS: [&str; 6] =
    ["port", "dir", "logfile", "rdma.port", "rdma.bind", "rdma.replication"];

/// A server of the cell's line with the cell's settings and without the module.
fn plain(cell: &Cell, folder: &str) -> Result<Server> {
    let mut settings = cell.settings.clone();
    settings.module = None;
    settings.port = free_port()?;
    Server::start(cell.lab, &cell.id.server, &cell.folder().join(folder), &settings)
}

/// Ends a server of the case's own.
fn end(mut server: Server) -> Result<()> {
    let status = server.stop()?;
    no_crash(&server)?;
    ensure!(status.success(), "the server ended with {status}");
    Ok(())
}

/// The elements of a reply as texts.
fn texts(reply: &Value) -> BTreeSet<String> {
    reply.elements().iter().map(Value::text).collect()
}

/// That `with` has what `without` has, and beyond that only what is `ours`.
fn more_by(
    what: &str,
    with: &BTreeSet<String>,
    without: &BTreeSet<String>,
    ours: impl Fn(&str) -> bool,
) -> Result<()> {
    let lost: Vec<_> = without.difference(with).collect();
    ensure!(lost.is_empty(), "{what}: with the module {lost:?} are gone");
    let strange: Vec<_> = with.difference(without).filter(|name| !ours(name)).collect();
    ensure!(strange.is_empty(), "{what}: with the module there are also {strange:?}");
    Ok(())
}

type Observer = Client<tcp::Connection>;

/// Compares settings, commands, categories and sections of two servers, and then what
/// commands of every manner answer.
fn abilities(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    let without = plain(cell, "without")?;
    let (mut with, mut bare) = (cell.tcp()?, without.tcp(patience)?);

    let settings = |client: &mut Observer| -> Result<BTreeMap<String, String>> {
        let reply = client.words("CONFIG GET *")?;
        let pairs = reply.elements().chunks_exact(2);
        Ok(pairs.map(|pair| (pair[0].text(), pair[1].text())).collect())
    };
    let (there, here) = (settings(&mut bare)?, settings(&mut with)?);
    let names = |map: &BTreeMap<String, String>| map.keys().cloned().collect();
    more_by("settings", &names(&here), &names(&there), |name| OWN_SETTINGS.contains(&name))?;
    for (name, value) in &there {
        ensure!(
            OWN_SETTINGS.contains(&name.as_str()) || here[name] == *value,
            "{name} is '{}' with the module and '{value}' without",
            here[name]
        );
    }

    let is_ours = |name: &str| name.starts_with("rdma");
    let lists = ["COMMAND LIST", "ACL CAT"];
    let categories = texts(&bare.words("ACL CAT")?);
    let categories = categories.iter().map(|category| format!("ACL CAT {category}"));
    for question in lists.map(str::to_owned).into_iter().chain(categories) {
        let (there, here) = (texts(&bare.words(&question)?), texts(&with.words(&question)?));
        ensure!(!there.is_empty(), "{question}: nothing");
        more_by(&question, &here, &there, is_ours)?;
    }

    // `module` and `listener` are what INFO says of a module and of where it listens.
    let told = |client: &mut Observer| -> Result<BTreeSet<String>> {
        let text = client.words("INFO everything")?.text();
        let name = |line: &str| line.split_once(':').map(|(name, _)| name.to_owned());
        Ok(text.lines().filter_map(name).collect())
    };
    let (there, here) = (told(&mut bare)?, told(&mut with)?);
    more_by("INFO", &here, &there, |name| {
        ["rdma", "module", "listener"].iter().any(|ours| name.starts_with(ours))
    })?;

    for command in [
        "SET key value",
        "DEBUG RELOAD",
        "DEBUG OBJECT key",
        "DEBUG STRINGMATCH-LEN 10 a*",
        "DEBUG SET-ACTIVE-EXPIRE 1",
        "DEBUG QUICKLIST-PACKED-THRESHOLD 100B",
        "GET key",
        "SAVE",
        "EVAL return(redis.call('get','key')) 0",
        "FUNCTION STATS",
        "INCR counter",
        "SWAPDB 0 1",
        "SELECT 1",
        "DBSIZE",
        "FLUSHALL SYNC",
        "MEMORY PURGE",
        "CONFIG SET appendonly yes",
        "DEBUG LOADAOF",
        "CONFIG SET appendonly no",
        "CONFIG SET repl-diskless-load swapdb",
        "CONFIG SET save 3600",
        "ACL SETUSER somebody on nopass +@all -@dangerous",
        "ACL DRYRUN somebody FLUSHALL",
        "CLIENT KILL TYPE pubsub",
        "RESET",
    ] {
        let (there, here) = (bare.words(command)?, with.words(command)?);
        // Addresses and ages differ by themselves.
        let comparable = |reply: &Value| match command {
            "DEBUG OBJECT key" => reply.text().split(' ').nth(3).map(str::to_owned),
            _ => Some(reply.text()),
        };
        ensure!(
            comparable(&there) == comparable(&here),
            "{command}: '{here}' with the module, '{there}' without"
        );
        // One rewrite of the append-only file at a time.
        for client in [&mut with, &mut bare] {
            while client.words("INFO persistence")?.text().contains("aof_rewrite_in_progress:1") {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    end(without)
}

/// A replica that may keep its data in memory while it loads its primary's does so with the
/// module too, and does not go by way of the disk.
fn swapdb(cell: &mut Cell) -> Result<()> {
    cell.settings.directive("repl-diskless-load swapdb");
    cell.settings.directive("repl-diskless-sync-delay 0");
    cell.settings.directive("loading-process-events-interval-bytes 4096");
    let primary = plain(cell, "primary")?;
    let patience = cell.lab.patience();
    let value = pattern::value(1, 1 << 20);
    primary.tcp(patience)?.command(&[b"SET", b"key", &value])?;
    let replica_of = format!("replicaof {LOOPBACK} {}", primary.settings().port);

    // So does the same server without the module, and its log says so in these words.
    const IN_MEMORY: &str = "with EOF to parser";
    cell.settings.directive(&replica_of);
    let bare = plain(cell, "without")?;
    bare.wait_log(IN_MEMORY, patience).context("a replica without the module")?;
    end(bare)?;

    cell.start()?;
    let mut client = cell.tcp()?;
    cell.wait_info("the replica's link", |info| Ok(info.text("master_link_status")? == "up"))?;
    ensure!(client.words("GET key")? == Value::Bulk(value), "another value at the replica");
    let log = cell.server().log()?;
    ensure!(
        log.contains(IN_MEMORY),
        "the replica went by way of the disk; its log:\n{}",
        crate::process::tail(&log)
    );

    // A full synchronisation with a primary that it knows: the old data is served meanwhile,
    // and so is whoever asks the module. Its keys take their time.
    let mut filler = primary.tcp(patience)?;
    let filling = pattern::value(3, 2000);
    for number in 0..100 {
        let key = format!("key:{number}");
        let reply = filler.command(&[b"SET", key.as_bytes(), &filling])?;
        ensure!(reply.text() == "OK", "SET: {reply}");
    }
    cell.wait_info("all keys at the replica", |info| {
        Ok(info.text("db0").is_ok_and(|text| text.starts_with("keys=101,")))
    })?;
    let mut fast = cell.rdma()?;
    expect(&mut filler, "CONFIG SET rdb-key-save-delay 20000", "OK")?;
    expect(&mut filler, "CONFIG SET repl-backlog-size 16384", "OK")?;
    let value = pattern::value(2, 1 << 20);
    expect(&mut filler, "MULTI", "OK")?;
    expect(&mut filler, "CLIENT KILL TYPE replica", "QUEUED")?;
    ensure!(filler.command(&[b"SET", b"key", &value])?.text() == "QUEUED", "SET in MULTI");
    ensure!(filler.words("EXEC")?.elements().len() == 2, "EXEC");
    cell.wait_info("it loads", |info| Ok(info.number("async_loading")? == 1))?;
    ensure!(fast.words("RDMA.CLIENTS")?.elements().len() == 1, "RDMA.CLIENTS while it loads");
    ensure!(!fast.words("RDMA.STATS")?.elements().is_empty(), "RDMA.STATS while it loads");
    ensure!(fast.words("GET key:7")? == Value::Bulk(filling), "the old data while it loads");
    ensure!(cell.info()?.number("async_loading")? == 1, "it was not loading any more");
    cell.wait_info("it has loaded", |info| {
        Ok(info.text("master_link_status")? == "up" && info.number("async_loading")? == 0)
    })?;
    ensure!(fast.words("GET key")? == Value::Bulk(value.clone()), "another value afterwards");
    cell.moved(50, value.len());
    end(primary)
}

/// 9.1 hands slots from one node of a cluster to another by CLUSTER MIGRATESLOTS.
fn migration(cell: &mut Cell) -> Result<()> {
    let patience = cell.lab.patience();
    cell.settings.directive("cluster-enabled yes");
    let usual = cell.settings.clone();
    cell.settings.directive(&format!("cluster-port {}", free_port()?));
    cell.start()?;
    let mut other = usual;
    other.port = free_port()?;
    other.rdma = SocketAddr::new(cell.lab.address, free_port()?);
    other
        .arguments(&[&format!("bind={}", other.rdma.ip()), &format!("port={}", other.rdma.port())]);
    let bus = free_port()?;
    other.directive(&format!("cluster-port {bus}"));
    let folder = cell.folder().join("target");
    let target = Server::start(cell.lab, &cell.id.server, &folder, &other)?;

    let (mut here, mut there) = (cell.tcp()?, target.tcp(patience)?);
    expect(&mut here, "CLUSTER ADDSLOTSRANGE 0 16383", "OK")?;
    expect(&mut here, &format!("CLUSTER MEET {LOOPBACK} {} {bus}", other.port), "OK")?;
    let name = there.words("CLUSTER MYID")?.text();
    let known = |client: &mut Observer| -> Result<bool> {
        Ok(client.words("CLUSTER INFO")?.text().contains("cluster_state:ok"))
    };
    let deadline = Instant::now() + patience;
    while !known(&mut here)?
        || !known(&mut there)?
        || !here.words("CLUSTER NODES")?.text().contains(&name)
    {
        ensure!(Instant::now() < deadline, "the nodes do not find each other");
        std::thread::sleep(Duration::from_millis(100));
    }
    // The slot of this key is 12182.
    expect(&mut here, "SET foo bar", "OK")?;
    expect(&mut here, &format!("CLUSTER MIGRATESLOTS SLOTSRANGE 12000 12999 NODE {name}"), "OK")?;
    let moved = |client: &mut Observer| -> Result<bool> {
        Ok(client.words("CLUSTER GETSLOTMIGRATIONS")?.text().contains("success"))
    };
    while !moved(&mut here)? {
        ensure!(
            Instant::now() < deadline,
            "the slots do not move: {}",
            here.words("CLUSTER GETSLOTMIGRATIONS")?
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    expect(&mut there, "GET foo", "bar")?;
    end(target)
}
