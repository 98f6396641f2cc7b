// SPDX-License-Identifier: BSD-3-Clause
//! Every way to say where to listen and how, at start and while the server runs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use client::rdma::Connection;
use client::{Client, pattern};

use super::basics::expect;
use crate::cell::{Case, Cell};
use crate::server::{Server, free_port, host};

pub const CASES: &[Case] = &[
    Case::new("config-arguments", arguments).unstarted(),
    Case::new("config-wildcard", wildcard).unstarted(),
    Case::new("config-port-0", port_zero).unstarted(),
    Case::new("config-directives", directives).unstarted(),
    Case::new("config-both", both).unstarted(),
    Case::new("config-set-port", set_port),
    Case::new("config-set-bind", set_bind),
    Case::new("config-set-full", set_full)
        .with(|settings| settings.arguments.push("max-registered-memory=2m".to_owned())),
    Case::new("config-set-fails", set_fails),
    Case::new("config-rewrite", rewrite),
];

/// How a server of this line calls the setting `name` in `CONFIG SET`: 8.0's own
/// configuration knows nothing of RDMA, so the module brings it along there.
fn setting(cell: &Cell, name: &str) -> String {
    match cell.id.line() {
        "8.0" => format!("rdma.{name}"),
        _ => format!("rdma-{name}"),
    }
}

/// A client at another address than the cell's usual one.
fn at(cell: &Cell, address: SocketAddr) -> Result<Client<Connection>> {
    let mut client = Connection::client(address, &cell.options(), cell.lab.patience())
        .with_context(|| format!("connecting to {address}"))?;
    expect(&mut client, "PING", "PONG")?;
    Ok(client)
}

/// Makes sure that nobody listens at `address`.
fn refused(cell: &Cell, address: SocketAddr) -> Result<()> {
    ensure!(
        Connection::open(address, &cell.options()).is_err(),
        "somebody still listens at {address}"
    );
    Ok(())
}

/// The largest window that the server announces to a client, which has to be busy for it.
fn announced(cell: &Cell, client: &mut Client<Connection>) -> Result<u32> {
    let value = pattern::value(3, 1 << 20);
    for _ in 0..6 {
        client.command(&[b"SET", b"large", &value])?;
    }
    let deadline = Instant::now() + cell.lab.patience();
    Ok(client.stream().peer_window(deadline)?.length)
}

/// The addresses of the device that this fabric has.
fn addresses(cell: &Cell) -> Vec<IpAddr> {
    [Some(cell.lab.address), cell.lab.second_address, cell.lab.address_v6]
        .into_iter()
        .flatten()
        .collect()
}

/// Several binds, one of them optional and nobody's, IPv4 and IPv6, and the other arguments.
fn arguments(cell: &mut Cell) -> Result<()> {
    let port = cell.settings.rdma.port();
    let mut arguments: Vec<String> =
        addresses(cell).iter().map(|&address| format!("bind={}", host(address))).collect();
    arguments.extend([
        "bind=-192.0.2.77".to_owned(),
        format!("port={port}"),
        "rx-size=256k".to_owned(),
        "completion-vector=0".to_owned(),
    ]);
    cell.settings.arguments = arguments;
    cell.start()?;
    for address in addresses(cell) {
        let mut client = at(cell, SocketAddr::new(address, port))?;
        ensure!(
            announced(cell, &mut client)? == 256 << 10,
            "rx-size=256k, and a window of {}",
            announced(cell, &mut client)?
        );
    }
    // It walks through all addresses, and has to find each of them there.
    cell.info()?;
    Ok(())
}

/// Everywhere: without a bind both kinds of addresses, with `*` IPv4's, as for TCP.
fn wildcard(cell: &mut Cell) -> Result<()> {
    let port = cell.settings.rdma.port();
    type Covers = fn(&IpAddr) -> bool;
    let everywhere: [(&[&str], Covers); 3] =
        [(&[], |_| true), (&["bind=*"], IpAddr::is_ipv4), (&["bind=::*"], IpAddr::is_ipv6)];
    for (bind, covers) in everywhere {
        cell.settings.arguments(bind);
        cell.settings.arguments.push(format!("port={port}"));
        cell.start()?;
        // It walks through all addresses, and has to find each of them there.
        cell.info()?;
        for address in addresses(cell).into_iter().filter(covers) {
            at(cell, SocketAddr::new(address, port)).with_context(|| format!("with {bind:?}"))?;
        }
        cell.stop()?;
    }
    Ok(())
}

/// With port 0 the module is there and does not listen, until it is told a port.
fn port_zero(cell: &mut Cell) -> Result<()> {
    let address = cell.settings.rdma;
    cell.settings.arguments = vec![format!("bind={}", address.ip()), "port=0".to_owned()];
    cell.start()?;
    cell.info()?;
    refused(cell, address)?;
    let command = format!("CONFIG SET {} {}", setting(cell, "port"), address.port());
    expect(&mut cell.tcp()?, &command, "OK")?;
    at(cell, address)?;
    // And it listens where the arguments said, not everywhere.
    if let Some(second) = cell.lab.second_address {
        refused(cell, SocketAddr::new(second, address.port()))?;
    }
    cell.info()?;
    Ok(())
}

/// The server's own directives, where it has them.
fn directives(cell: &mut Cell) -> Result<()> {
    let address = cell.settings.rdma;
    cell.settings.arguments(&[]);
    for line in [
        format!("rdma-bind {}", address.ip()),
        format!("rdma-port {}", address.port()),
        "rdma-rx-size 131072".to_owned(),
    ] {
        cell.settings.directive(&line);
    }
    cell.start()?;
    let mut client = at(cell, address)?;
    ensure!(
        announced(cell, &mut client)? == 128 << 10,
        "rdma-rx-size 131072, and a window of {}",
        announced(cell, &mut client)?
    );
    if let Some(second) = cell.lab.second_address {
        refused(cell, SocketAddr::new(second, address.port()))?;
    }
    Ok(())
}

/// Both at once: the directive wins, and a log line says so.
fn both(cell: &mut Cell) -> Result<()> {
    let address = cell.settings.rdma;
    let unheard = SocketAddr::new(address.ip(), free_port()?);
    cell.settings.arguments =
        vec![format!("bind={}", address.ip()), format!("port={}", unheard.port())];
    cell.settings.directive(&format!("rdma-bind {}", address.ip()));
    cell.settings.directive(&format!("rdma-port {}", address.port()));
    cell.start()?;
    at(cell, address)?;
    refused(cell, unheard)?;
    let words = format!("wins over the module's argument port={}", unheard.port());
    cell.server().wait_log(&words, cell.lab.patience())?;
    Ok(())
}

/// Another port while clients are at work: they stay, and new ones find the new port.
fn set_port(cell: &mut Cell) -> Result<()> {
    let old = cell.settings.rdma;
    let mut stays = cell.rdma()?;
    let traffic = cell.traffic(10, 4000)?;
    let mut observer = cell.tcp()?;
    let name = setting(cell, "port");
    let mut last = old;
    for _ in 0..3 {
        let new = SocketAddr::new(old.ip(), free_port()?);
        expect(&mut observer, &format!("CONFIG SET {name} {}", new.port()), "OK")?;
        at(cell, new)?;
        refused(cell, last)?;
        let reply = observer.words(&format!("CONFIG GET {name}"))?.text();
        ensure!(reply.contains(&new.port().to_string()), "CONFIG GET: {reply}");
        expect(&mut stays, "PING", "PONG")?;
        last = new;
    }
    // No listener at all, and one again.
    expect(&mut observer, &format!("CONFIG SET {name} 0"), "OK")?;
    refused(cell, last)?;
    expect(&mut stays, "PING", "PONG")?;
    expect(&mut observer, &format!("CONFIG SET {name} {}", old.port()), "OK")?;
    at(cell, old)?;
    traffic.stop()?;
    let value = pattern::value(1, 3 << 20);
    stays.command(&[b"SET", b"key", &value])?;
    cell.moved(value.len(), 0);
    Ok(())
}

/// Other addresses while clients are at work; one that can't be had leaves things as they are.
fn set_bind(cell: &mut Cell) -> Result<()> {
    let old = cell.settings.rdma;
    let second = cell.lab.second_address.context("a fabric with one address")?;
    let second = SocketAddr::new(second, old.port());
    let name = setting(cell, "bind");
    let mut stays = cell.rdma()?;
    let traffic = cell.traffic(10, 4000)?;
    let mut observer = cell.tcp()?;
    let reply = observer.words(&format!("CONFIG SET {name} 192.0.2.77"))?;
    ensure!(reply.is_error(), "CONFIG SET {name} to nobody's address: {reply}");
    at(cell, old).context("after a setting that failed, where the arguments say")?;
    if cell.id.line() != "8.0" {
        // On these lines only a port that the server's own configuration knows goes with
        // its own addresses.
        let command = format!("CONFIG SET {} {}", setting(cell, "port"), old.port());
        expect(&mut observer, &command, "OK")?;
    }
    let mut set =
        |text: &str| observer.command(&[b"CONFIG", b"SET", name.as_bytes(), text.as_bytes()]);
    let reply = set(&format!("{} {}", old.ip(), second.ip()))?;
    ensure!(reply.text() == "OK", "CONFIG SET {name}: {reply}");
    at(cell, old)?;
    at(cell, second)?;
    let reply = set(&second.ip().to_string())?;
    ensure!(reply.text() == "OK", "CONFIG SET {name}: {reply}");
    at(cell, second)?;
    refused(cell, old)?;
    expect(&mut stays, "PING", "PONG")?;
    let reply = set("192.0.2.77")?;
    ensure!(reply.is_error(), "CONFIG SET {name} to nobody's address: {reply}");
    at(cell, second)?;
    let reply = set(&old.ip().to_string())?;
    ensure!(reply.text() == "OK", "CONFIG SET {name}: {reply}");
    at(cell, old)?;
    expect(&mut stays, "PING", "PONG")?;
    cell.info()?;
    traffic.stop()
}

/// Another address and port when hardly any memory may be registered any more: neither
/// needs any, and what can't be had leaves what there is.
fn set_full(cell: &mut Cell) -> Result<()> {
    let old = cell.settings.rdma;
    let mut idle = Vec::new();
    // 32 KiB each: there is room for 24 more, and for none that had all of its buffer.
    for _ in 0..40 {
        idle.push(cell.rdma()?);
    }
    cell.wait_info("forty clients", |info| Ok(info.number("rdma_connections_established")? == 40))?;
    let command = format!("CONFIG SET {} 192.0.2.77", setting(cell, "bind"));
    let reply = cell.tcp()?.words(&command)?;
    ensure!(reply.is_error(), "{command}: {reply}");
    at(cell, old).context("after a setting that failed")?;
    listens(cell, &[old])?;
    let new = SocketAddr::new(old.ip(), free_port()?);
    let command = format!("CONFIG SET {} {}", setting(cell, "port"), new.port());
    expect(&mut cell.tcp()?, &command, "OK")?;
    at(cell, new)?;
    refused(cell, old)?;
    listens(cell, &[new])?;
    for client in &mut idle {
        expect(client, "PING", "PONG")?;
    }
    cell.moved(40 * 14, 40 * 7);
    Ok(())
}

/// A change that can't be had: an error, and everything is as before, also what is said of it.
fn set_fails(cell: &mut Cell) -> Result<()> {
    let old = cell.settings.rdma;
    let second = cell.lab.second_address.context("a fabric with one address")?;
    let second = SocketAddr::new(second, old.port());
    let (port, bind) = (setting(cell, "port"), setting(cell, "bind"));
    let mut observer = cell.tcp()?;
    let mut stays = cell.rdma()?;

    // Somebody else's port.
    let mut settings = cell.settings.clone();
    settings.port = free_port()?;
    settings.rdma = SocketAddr::new(old.ip(), free_port()?);
    settings.arguments(&[&format!("bind={}", old.ip()), &format!("port={}", settings.rdma.port())]);
    let folder = cell.folder().join("other");
    let mut other = Server::start(cell.lab, &cell.id.server, &folder, &settings)?;
    let taken = settings.rdma;

    let mut set = |line: &str| observer.words(&format!("CONFIG SET {line}"));
    // Twice: first the arguments' port is in use, then, where there are directives, theirs.
    for round in 0..2 {
        for change in [
            format!("{port} {}", taken.port()),
            format!("{bind} 192.0.2.77"),
            format!("{port} {} {bind} 192.0.2.77", taken.port()),
            format!("{bind} {}", "192.0.2.77 ".repeat(2).trim_end()),
        ] {
            let reply = set(&change)?;
            ensure!(reply.is_error(), "CONFIG SET {change}: {reply}");
            at(cell, old).with_context(|| format!("round {round}, after CONFIG SET {change}"))?;
            refused(cell, second)?;
            listens(cell, &[old])?;
        }
        expect(&mut stays, "PING", "PONG")?;
        let reply = set(&format!("{bind} {} {port} {}", old.ip(), old.port()))?;
        ensure!(reply.text() == "OK", "CONFIG SET to what is there: {reply}");
    }

    // Everywhere and one address on the same port: they can't be had at a time, so what is
    // there makes room, and has to come back.
    ensure!(set(&format!("{bind} *"))?.text() == "OK", "CONFIG SET {bind} *");
    let everywhere = [SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), old.port())];
    at(cell, second)?;
    listens(cell, &everywhere)?;
    let some = format!("{} 192.0.2.77", old.ip());
    let mut set =
        |text: &str| observer.command(&[b"CONFIG", b"SET", bind.as_bytes(), text.as_bytes()]);
    let reply = set(&some)?;
    ensure!(reply.is_error(), "CONFIG SET {bind} {some}: {reply}");
    at(cell, second).context("after a setting that failed, everywhere")?;
    listens(cell, &everywhere)?;
    let reply = set(&old.ip().to_string())?;
    ensure!(reply.text() == "OK", "CONFIG SET {bind}: {reply}");
    at(cell, old)?;
    refused(cell, second)?;
    listens(cell, &[old])?;
    expect(&mut stays, "PING", "PONG")?;

    // The port is free again.
    ensure!(other.stop()?.success(), "the other server's end");
    expect(&mut observer, &format!("CONFIG SET {port} {}", taken.port()), "OK")?;
    at(cell, taken)?;
    refused(cell, old)?;
    listens(cell, &[taken])
}

/// That `INFO` and `CONFIG GET` say that it listens there and nowhere else.
fn listens(cell: &Cell, addresses: &[SocketAddr]) -> Result<()> {
    let port = addresses[0].port();
    let told = |address: &SocketAddr| match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => "*".to_owned(),
        ip => host(ip),
    };
    let info = cell.info()?;
    let names: Vec<String> = addresses.iter().map(|it| format!("bind={}", told(it))).collect();
    let wanted = format!("name=rdma,{},port={port}", names.join(","));
    let line = ["listener2", "listener3"]
        .iter()
        .find_map(|name| info.text(name).ok().filter(|line| line.starts_with("name=rdma")));
    ensure!(line == Some(&wanted), "INFO says {line:?} and not {wanted}");
    let name = setting(cell, "port");
    let said = cell.tcp()?.words(&format!("CONFIG GET {name}"))?;
    let said = said.elements().get(1).map(|value| value.text());
    // On 8.1 and 9.1 the directive knows nothing of the arguments' port.
    let arguments = cell.settings.rdma.port() == port && cell.id.line() != "8.0";
    ensure!(
        said == Some(port.to_string()) || arguments && said.as_deref() == Some("0"),
        "CONFIG GET {name} says {said:?}, and it listens on {port}"
    );
    Ok(())
}

/// What CONFIG REWRITE writes starts the server again, listening at the same place.
fn rewrite(cell: &mut Cell) -> Result<()> {
    let new = SocketAddr::new(cell.settings.rdma.ip(), free_port()?);
    let mut observer = cell.tcp()?;
    let command = format!("CONFIG SET {} {}", setting(cell, "port"), new.port());
    expect(&mut observer, &command, "OK")?;
    expect(&mut observer, "CONFIG REWRITE", "OK")?;
    drop(observer);
    let configuration = std::fs::read_to_string(cell.server().folder().join("valkey.conf"))?;
    cell.stop()?;
    cell.settings.configuration = Some(configuration);
    cell.start()?;
    at(cell, new)?;
    Ok(())
}
