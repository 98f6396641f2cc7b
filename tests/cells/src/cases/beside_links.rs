// SPDX-License-Identifier: BSD-3-Clause
//! What the server opens by the two slots that carry links, and what stays as it was: links
//! that are to be encrypted, and `MIGRATE`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::basics::expect;
use super::peers::{Peer, fill, linked, primary, same};
use crate::cell::{Case, Cell};
use crate::process::run;
use crate::server::free_port;

pub const CASES: &[Case] = &[
    Case::new("repl-tls", tls).with(primary).unstarted(),
    Case::new("repl-migrate", migrate).with(primary),
];

/// The servers that are built with TLS: Debian's.
const WITH_TLS: [&str; 3] = ["8.0", "8.1", "9.1"];

/// Makes a certificate that signs itself. Returns the lines by which a server uses it.
fn certificate(folder: &Path) -> Result<Vec<String>> {
    let at = |name: &str| folder.join(name).display().to_string();
    let (certificate, key) = (at("certificate.pem"), at("key.pem"));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=cell"]);
    command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    command.args(["-keyout", &key, "-out", &certificate]);
    let output = run(&mut command, b"", folder, Duration::from_secs(30))?;
    ensure!(output.status.success(), "openssl: {}", output.stderr);
    Ok(vec![
        format!("tls-cert-file {certificate}"),
        format!("tls-key-file {key}"),
        format!("tls-ca-cert-file {certificate}"),
        "tls-auth-clients no".to_owned(),
    ])
}

/// With `tls-replication yes` a link is encrypted, though RDMA could be had at that very address
/// and port, and whatever `replication` says; one line of the log says so.
fn tls(cell: &mut Cell) -> Result<()> {
    if !WITH_TLS.contains(&cell.id.server.as_str()) {
        cell.figure("not run", "this server is built without TLS");
        return Ok(());
    }
    let lines = certificate(cell.folder())?;
    let encrypted = Peer::start_with(cell, "encrypted", "no", |settings| {
        settings.directives.extend(lines.iter().cloned());
        settings.directive(&format!("tls-port {}", settings.rdma.port()));
        settings.port = free_port().expect("a port");
    })?;
    let plain = Peer::start(cell, "plain", "no")?;
    fill(cell, &encrypted.server)?;
    plain.ask("SET plain 1")?;
    for replication in ["prefer", "require"] {
        let replica = Peer::start_with(cell, replication, replication, |settings| {
            settings.directives.extend(lines.iter().cloned());
            settings.directive("tls-replication yes");
        })?;
        replica.follow_at(encrypted.server.settings().rdma)?;
        linked(&replica)?;
        for _ in 0..2 {
            replica.ask("CLIENT KILL TYPE master")?;
            linked(&replica)?;
        }
        same(&encrypted.server, &replica)?;
        let info = replica.info()?;
        let tried = info.sum(&[
            "rdma_connections_opened",
            "rdma_links_over_rdma",
            "rdma_links_over_tcp",
            "rdma_links_refused",
        ])?;
        ensure!(tried == 0, "{tried} attempts of the module's");
        ensure!(replica.transport()?.is_empty(), "the link: {}", replica.transport()?);
        let arrived = encrypted.info()?.number("rdma_bytes_received")?;
        ensure!(arrived == 0, "{arrived} bytes came over RDMA");
        let said = replica.server.log_lines("tls-replication is on")?;
        ensure!(said.len() == 1, "{said:?}");
        cell.figure(replication, &said[0]);
        // Who does not ask for encryption any more has RDMA.
        replica.ask("CONFIG SET tls-replication no")?;
        replica.follow_at(plain.server.settings().rdma)?;
        replica.linked_over_rdma()?;
        same(&plain.server, &replica)?;
        replica.stop()?;
    }
    [encrypted, plain].into_iter().try_for_each(Peer::stop)
}

/// `MIGRATE` goes over TCP, between servers whose links go over RDMA.
fn migrate(cell: &mut Cell) -> Result<()> {
    let target = Peer::start(cell, "target", "require")?;
    let mut client = cell.tcp()?;
    let value = "x".repeat(300_000);
    for name in ["one", "two"] {
        let reply = client.command(&[b"SET", name.as_bytes(), value.as_bytes()])?;
        ensure!(reply.text() == "OK", "SET: {reply}");
    }
    let to = target.server.settings().rdma;
    let line = format!("MIGRATE {} {} one 0 10000", to.ip(), to.port());
    expect(&mut client, &line, "OK")?;
    // The second goes by the connection that the server has kept.
    expect(&mut client, &line.replace("one", "two"), "OK")?;
    for name in ["one", "two"] {
        ensure!(target.ask(&format!("GET {name}"))? == value, "{name} has not arrived");
        expect(&mut client, &format!("EXISTS {name}"), "0")?;
    }
    let opened = cell.info()?.number("rdma_connections_opened")?;
    ensure!(opened == 0, "{opened} connections over RDMA");
    let arrived = target.info()?.number("rdma_bytes_received")?;
    ensure!(arrived == 0, "{arrived} bytes came over RDMA");
    target.stop()
}
