// SPDX-License-Identifier: BSD-3-Clause
//! Input that can't work: one clear line in the log that says what is wrong, and never a
//! crash.

use anyhow::{Context, Result, ensure};

use super::basics::expect;
use crate::cell::{Case, Cell, no_crash};
use crate::lab::BUILT;
use crate::server::{Server, free_port};

pub const CASES: &[Case] = &[
    Case::new("bad-arguments", bad_arguments).unstarted(),
    Case::new("bad-address", bad_address).unstarted(),
    Case::new("no-descriptors", no_descriptors).unstarted(),
    Case::new("no-device", no_device).unstarted(),
    Case::new("no-rdma-core", no_rdma_core).unstarted(),
    Case::new("low-memlock", low_memlock).unstarted(),
    Case::new("falsified-server", falsified_server).unstarted(),
    Case::new("unknown-release", unknown_release).unstarted(),
    Case::new("loaded-twice", loaded_twice).unstarted(),
    Case::new("namesake", namesake).unstarted(),
    Case::new("loaded-late", loaded_late).with(|settings| {
        settings.module = None;
        settings.directive("enable-module-command yes");
    }),
    Case::new("unload", unload).with(|settings| settings.directive("enable-module-command yes")),
];

/// Starts a server that has to refuse, and returns the one line of its log that has all of
/// `words` in it.
pub(super) fn refusal(cell: &mut Cell, words: &[&str]) -> Result<String> {
    let mut server = cell.launch()?;
    let status = server
        .wait_exit(cell.lab.patience())
        .with_context(|| format!("with {:?}", cell.settings.arguments))?;
    no_crash(&server)?;
    ensure!(
        status.code() == Some(1),
        "the server ended with {status} instead of refusing to start"
    );
    let log = server.log()?;
    let lines: Vec<&str> =
        log.lines().filter(|line| words.iter().all(|word| line.contains(word))).collect();
    ensure!(
        lines.len() == 1,
        "{} lines of the log have {words:?}, for {:?}; it says:\n{log}",
        lines.len(),
        cell.settings.arguments
    );
    Ok(lines[0].to_owned())
}

fn bad_arguments(cell: &mut Cell) -> Result<()> {
    let bind = format!("bind={}", cell.settings.rdma.ip());
    for (argument, words) in [
        ("frobnicate=1", &["frobnicate"][..]),
        ("frobnicate", &["frobnicate"]),
        ("port=abc", &["port", "abc"]),
        ("port=65536", &["port", "65536", "65535"]),
        ("port=-1", &["port", "-1"]),
        ("port=", &["port"]),
        ("bind=", &["bind"]),
        ("rx-size=", &["rx-size"]),
        ("rx-size=lots", &["rx-size", "lots"]),
        ("rx-size=1", &["rx-size"]),
        ("rx-size=64g", &["rx-size", "64g"]),
        ("completion-vector=x", &["completion-vector", "x"]),
    ] {
        cell.settings.arguments(&[&bind, argument]);
        let line = refusal(cell, &[&["rdma"], words].concat())?;
        cell.figure(argument, line);
    }
    Ok(())
}

/// An address that no RDMA device owns.
fn bad_address(cell: &mut Cell) -> Result<()> {
    let port = format!("port={}", cell.settings.rdma.port());
    for address in ["192.0.2.77", "2001:db8::77"] {
        cell.settings.arguments(&[&format!("bind={address}"), &port]);
        let line = refusal(cell, &["rdma", address])?;
        cell.figure(address, line);
    }
    cell.settings.arguments(&["bind=not-an-address.invalid", &port]);
    refusal(cell, &["rdma", "not-an-address.invalid"])?;
    cell.settings.arguments(&["bind=-192.0.2.77", "bind=-2001:db8::77", &port]);
    refusal(cell, &["rdma", "none of the optional addresses could be listened on"])?;
    let own = format!("bind={}", cell.settings.rdma.ip());
    cell.settings.arguments(&[&own, &own, &port]);
    refusal(cell, &["rdma", "the address is named twice"])?;
    Ok(())
}

/// An event loop without room for what the module has to watch.
fn no_descriptors(cell: &mut Cell) -> Result<()> {
    // The event loop takes numbers below this many, whatever the server is allowed.
    cell.settings.directive("maxclients 1");
    let usual = cell.settings.clone();
    for free in 4..60 {
        // Numbers below the bound are in use, but for some: those that the server takes for
        // itself before it loads modules have to be among them.
        let fill = format!("for n in $(seq {free} 200); do eval \"exec $n</dev/null\"; done");
        cell.settings = usual.clone();
        let prefix = ["bash", "-c", &format!("{fill}; exec \"$@\""), "bash"];
        cell.settings.prefix = prefix.map(str::to_owned).to_vec();
        let mut server = cell.launch()?;
        let status = server.wait_exit(cell.lab.patience())?;
        ensure!(!status.success(), "the server ended with {status}");
        let lines = server.log_lines("not loaded: the server's event loop takes no more")?;
        if let [line] = &lines[..] {
            cell.figure("no room in the event loop", line);
            return Ok(());
        }
    }
    anyhow::bail!("the server never said it")
}

/// A machine without an RDMA device: the real libraries, natively.
fn no_device(cell: &mut Cell) -> Result<()> {
    cell.settings.environment.push(("LD_LIBRARY_PATH".to_owned(), String::new()));
    let line = refusal(cell, &["No such device", "modprobe rdma_ucm", "driver", "rdma link"])?;
    cell.figure("no device", line);
    Ok(())
}

/// A machine without rdma-core: the line says which package to install.
fn no_rdma_core(cell: &mut Cell) -> Result<()> {
    // In a mount namespace of the server's own, its library folder without the library.
    const HIDE: &str = r#"
        libraries=/usr/lib/x86_64-linux-gnu
        mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work &&
        mount -t overlay -o "lowerdir=$libraries,upperdir=/mnt/upper,workdir=/mnt/work" overlay $libraries &&
        rm "$libraries"/librdmacm.so.1* && unset LD_LIBRARY_PATH && exec "$@""#;
    let prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", HIDE, "sh"];
    cell.settings.prefix = prefix.map(str::to_owned).to_vec();
    let line = refusal(cell, &["librdmacm1"])?;
    cell.figure("no rdma-core", line);
    Ok(())
}

/// Too little locked memory for a server without the privilege to exceed it.
fn low_memlock(cell: &mut Cell) -> Result<()> {
    let prefix = [
        "setpriv",
        "--bounding-set=-ipc_lock",
        "--inh-caps=-ipc_lock",
        "prlimit",
        "--memlock=16384:16384",
    ];
    cell.settings.prefix = prefix.map(str::to_owned).to_vec();
    let line = refusal(cell, &["rdma", "memlock"])?;
    cell.figure("16 KiB of locked memory", line);
    Ok(())
}

/// A server that is not what it says: of a line that is not supported or another than its own,
/// with a connection type whose slots are not where they should be, or with other connections.
/// `tests/cells/examples/falsify.rs` makes it so.
fn falsified_server(cell: &mut Cell) -> Result<()> {
    let falsify = cell.lab.example("libfalsify.so")?;
    let usual = cell.settings.clone();
    // Where `conn_create` is, and where the tail begins.
    let (create, tail) = if cell.id.line() == "8.0" { (9, 29) } else { (10, 30) };
    const SUPPORTS: &str = "supports the lines 8.0, 8.1, 9.0 and 9.1";
    const TABLE: &str = "of its TCP connection type is";
    let mut changes = vec![
        ("version=0x00080200".to_owned(), ["8.2.0", SUPPORTS]),
        ("version=0x00090200".to_owned(), ["9.2.0", SUPPORTS]),
        ("version=0x000a0000".to_owned(), ["10.0.0", SUPPORTS]),
        ("null=16".to_owned(), [TABLE, "instead of a function"]),
        ("null=12".to_owned(), [TABLE, "instead of a function"]),
        ("shift=9".to_owned(), [TABLE, "instead of null"]),
        ("shift=20".to_owned(), [TABLE, "instead of null"]),
        ("cut=20".to_owned(), [TABLE, "instead of a function"]),
        (format!("cut={tail}"), [TABLE, "instead of null"]),
        (format!("swap={create}"), ["`state` of its new TCP connection is 2", "instead of 0"]),
        (format!("larger={create}"), ["its TCP connections have", "bytes instead of 64"]),
        (format!("moved={create}"), ["`fd` of its new TCP connection is 0", "instead of -1"]),
    ];
    for (line, version, release) in [
        ("8.0", "0x00080001", "8.0.1"),
        ("8.1", "0x00080101", "8.1.1"),
        ("9.0", "0x00090004", "9.0.4"),
        ("9.1", "0x00090100", "9.1.0"),
        ("9.1", "0x00090102", "9.1.2"),
    ] {
        if line != cell.id.line() {
            changes.push((format!("version={version}"), ["the server says it is", release]));
        }
    }
    // Debian's are built with TLS, which shows the tail.
    if ["8.0", "8.1", "9.1"].contains(&cell.id.server.as_str()) {
        const TLS: &str = "its TLS connection type does not end as that of";
        // The first function of 9.1.2's tail comes second.
        let certificate = if cell.id.line() == "9.1" { tail + 1 } else { tail };
        changes.push((format!("null-tls={certificate}"), [TLS, ""]));
        if cell.id.server == "9.1" {
            changes.push(("version=0x00090100".to_owned(), [TLS, "9.1.0"]));
        }
    }
    for (change, words) in changes {
        cell.settings = usual.clone();
        cell.settings.directive(&format!("loadmodule {} {change}", falsify.display()));
        let line = refusal(cell, &[&["rdma", "not loaded"], &words[..]].concat())
            .with_context(|| format!("a server with {change}"))?;
        cell.figure(&change, line);
    }
    Ok(())
}

/// A release that is newer than any known one of its line: served if it is like the last of
/// them, with a line that says so, and refused where that is asked for.
fn unknown_release(cell: &mut Cell) -> Result<()> {
    let falsify = cell.lab.example("libfalsify.so")?;
    let digits: String = cell.id.line().split('.').map(|number| format!("{number:0>2}")).collect();
    let release = format!("{}.127", cell.id.line());
    cell.settings.directive(&format!("loadmodule {} version=0x00{digits}7f", falsify.display()));
    cell.start()?;
    let words = format!("valkey-server {release} is newer than {}.", cell.id.line());
    let line = cell.server().wait_log(&words, cell.lab.patience())?;
    ensure!(line.contains(" * "), "a line at notice: {line}");
    cell.figure("newer", line);
    let mut client = cell.rdma()?;
    expect(&mut client, "SET key value", "OK")?;
    expect(&mut client, "GET key", "value")?;
    drop(client);
    cell.moved(30, 10);
    cell.stop()?;
    cell.settings.arguments.push("unknown-release=refuse".to_owned());
    let line = refusal(cell, &["not loaded", &release, "unknown-release=refuse"])?;
    cell.figure("refused", line);
    Ok(())
}

/// A second `loadmodule` of the same file, which a file that is included brings: the log names
/// both lines, and already when the first is loaded.
fn loaded_twice(cell: &mut Cell) -> Result<()> {
    let included = cell.folder().join("included.conf");
    let module = cell.lab.module.display().to_string();
    std::fs::write(&included, format!("# a package's\nloadmodule {module}\n"))?;
    cell.settings.directive(&format!("include {}", included.display()));
    let first = format!("line 2 of {}, included by line ", included.display());
    let line = refusal(cell, &["not loaded: it is loaded already", &first, ", or of line "])?;
    cell.figure("loaded twice", line);
    refusal(cell, &["loads this module again"])?;
    Ok(())
}

/// Upstream's own module, which has the same name: the log names its file and the line that
/// loads it, whichever comes second.
fn namesake(cell: &mut Cell) -> Result<()> {
    let theirs = cell.lab.built.join("valkey-rdma.so");
    let line = format!("loadmodule {} --port {}", theirs.display(), free_port()?);
    let usual = cell.settings.clone();
    for first in [true, false] {
        cell.settings = usual.clone();
        let own = format!(
            "loadmodule {} {}",
            cell.lab.module.display(),
            cell.settings.arguments.join(" ")
        );
        let (early, late) = if first { (&line, &own) } else { (&own, &line) };
        cell.settings.module = None;
        cell.settings.directive(early);
        cell.settings.directive(late);
        let folder = cell.folder().join(if first { "theirs" } else { "ours" });
        let mut server = Server::launch(cell.lab, BUILT, &folder, &cell.settings)?;
        let status = server.wait_exit(cell.lab.patience())?;
        no_crash(&server)?;
        ensure!(status.code() == Some(1), "the server ended with {status}");
        let log = server.log()?;
        let configuration = server.folder().join("valkey.conf");
        let text = std::fs::read_to_string(&configuration)?;
        let number = 1 + text.lines().position(|it| *it == line).context("no such line")?;
        let place = format!("line {number} of {}", configuration.display());
        let words = match first {
            true => vec!["not loaded: the module ", "remove ", &place],
            false => vec!["too: if that is another module of the name", &place],
        };
        let found = log.lines().find(|line| words.iter().all(|word| line.contains(word)));
        let found = found.with_context(|| format!("no line with {words:?}:\n{log}"))?;
        cell.figure(if first { "theirs first" } else { "ours first" }, found);
    }
    Ok(())
}

/// MODULE LOAD into a running server: refused, and the server lives on.
fn loaded_late(cell: &mut Cell) -> Result<()> {
    let mut client = cell.tcp()?;
    let module = cell.lab.module.display().to_string();
    for _ in 0..3 {
        let reply = client.words(&format!("MODULE LOAD {module} port=0"))?;
        ensure!(reply.is_error(), "MODULE LOAD: {reply}");
    }
    let line = cell.server().wait_log("loadmodule", cell.lab.patience())?;
    cell.figure("MODULE LOAD", line);
    expect(&mut client, "PING", "PONG")
}

/// MODULE UNLOAD: refused, and everything goes on.
fn unload(cell: &mut Cell) -> Result<()> {
    let reply = cell.tcp()?.words("MODULE UNLOAD rdma")?;
    ensure!(reply.is_error(), "MODULE UNLOAD: {reply}");
    cell.server().wait_log("a connection type can't be unloaded", cell.lab.patience())?;
    // While there are connections the server does not even ask: a timer runs.
    let mut fast = cell.rdma()?;
    let reply = cell.tcp()?.words("MODULE UNLOAD rdma")?;
    ensure!(reply.is_error(), "MODULE UNLOAD: {reply}");
    cell.figure("MODULE UNLOAD", reply);
    let reply = fast.words("MODULE UNLOAD rdma")?;
    ensure!(reply.is_error(), "MODULE UNLOAD: {reply}");
    expect(&mut fast, "PING", "PONG")?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    cell.moved(28, 14);
    Ok(())
}
