// SPDX-License-Identifier: BSD-3-Clause
//! Devices of the kernel beside the guest's own: a second Soft-RoCE, and siw, which is iWARP in
//! software, with a provider and a connection manager of its own and without immediate data; and
//! servers that can't reach a device that is there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use client::{Client, rdma, tcp};

use super::basics::expect;
use super::doctor::all_said;
use super::refusals::refusal;
use crate::cell::{Case, Cell};
use crate::process::run;

pub const CASES: &[Case] = &[
    Case::new("two-devices", two_devices).unstarted(),
    Case::new("siw", siw).unstarted(),
    Case::new("doctor-providers", doctor_providers).unstarted(),
    Case::new("no-netdev", no_netdev).unstarted(),
    Case::new("no-address", no_address).unstarted(),
    Case::new("no-rdma-ucm", no_rdma_ucm).unstarted(),
];

/// A device beside the guest's own, on a network interface of its own.
struct Device {
    kind: &'static str,
    netdev: &'static str,
    address: IpAddr,
}

const RXE: Device =
    Device { kind: "rxe", netdev: "d1", address: IpAddr::V4(Ipv4Addr::new(10, 9, 8, 1)) };
const SIW: Device =
    Device { kind: "siw", netdev: "d2", address: IpAddr::V4(Ipv4Addr::new(10, 9, 7, 1)) };

impl Device {
    /// Makes it, unless it is there. It stays as long as the guest does: librdmacm, which this
    /// process has loaded as a client, keeps every device open, and this kernel's drivers can't
    /// be taken away from a process.
    fn add(&self, folder: &Path) -> Result<()> {
        let Self { kind, netdev, address } = self;
        shell(
            &format!(
                "rdma link show {kind}1/1 2>/dev/null | grep -q . || {{
                 ip link add {netdev} mtu 9000 type dummy && ip link set {netdev} up &&
                 ip addr add {address}/24 dev {netdev} &&
                 rdma link add {kind}1 type {kind} netdev {netdev}; }}"
            ),
            folder,
        )
    }

    /// A client of it.
    fn client(&self, cell: &Cell) -> Result<Client<rdma::Connection>> {
        let server = SocketAddr::new(self.address, cell.server().rdma_address().port());
        Ok(rdma::Connection::client(server, &cell.options(), cell.lab.patience())?)
    }

    /// Makes it, and starts a server on it and on the guest's own.
    fn serve(&self, cell: &mut Cell) -> Result<()> {
        self.add(cell.folder())?;
        cell.settings.arguments.push(format!("bind={}", self.address));
        cell.start()
    }
}

fn shell(command: &str, folder: &Path) -> Result<()> {
    let limit = Duration::from_secs(60);
    let output = run(Command::new("sh").args(["-c", command]), b"", folder, limit)
        .with_context(|| command.to_owned())?;
    ensure!(output.status.success(), "{command}: {}", output.stderr);
    Ok(())
}

fn once(cell: &Cell, words: &str) -> Result<()> {
    let lines = cell.server().log_lines(words)?;
    ensure!(lines.len() == 1, "not one line with '{words}': {lines:?}");
    Ok(())
}

/// Clients on both devices, each of which has its queues; no one of them bounds the other's.
fn two_devices(cell: &mut Cell) -> Result<()> {
    const CLIENTS: usize = 10;
    RXE.serve(cell)?;
    let mut clients =
        (0..CLIENTS).flat_map(|_| [cell.rdma(), RXE.client(cell)]).collect::<Result<Vec<_>>>()?;
    let value = client::pattern::value(1, 100_000);
    for client in &mut clients {
        client.command(&[b"SET", b"key", &value])?;
        let read = client.command(&[b"GET", b"key"])?;
        ensure!(read.bytes() == Some(&value), "another value");
    }
    let info = cell.info()?;
    let devices: Vec<_> = info.all("rdma_device").map(|(_, it)| it).collect();
    for name in ["name=rxe0,", "name=rxe1,"] {
        let connections = format!(",connections={CLIENTS},");
        let fit = devices.iter().filter(|it| it.contains(name) && it.contains(&connections));
        ensure!(fit.count() == 1, "not {CLIENTS} connections with {name}: {devices:?}");
    }
    drop(clients);
    cell.stop()
}

/// Beside a device that serves, siw serves nobody and hurts nobody.
fn siw(cell: &mut Cell) -> Result<()> {
    load_siw(cell)?;
    SIW.serve(cell)?;
    let mut served = cell.rdma()?;
    let mut tcp = cell.tcp()?;

    // The client's own device refuses its request, so that the server has nothing to refuse.
    for _ in 0..3 {
        let reply = SIW.client(cell).and_then(|mut client| Ok(client.words("PING")?));
        ensure!(reply.is_err(), "siw writes with immediate data: {reply:?}");
        others_live(&mut served, &mut tcp)?;
    }
    ensure!(cell.info()?.number("rdma_devices_unfit")? == 0, "the server has tried nothing");

    // The server speaks first where it has no place for a client.
    expect(&mut tcp, "CONFIG SET maxclients 1", "OK")?;
    let mut client = SIW.client(cell)?;
    ensure!(client.reply().is_err(), "the refusal came by a write with immediate data");
    expect(&mut tcp, "CONFIG SET maxclients 100", "OK")?;
    cell.wait_info("the device to be found unfit", |info| {
        Ok(info.number("rdma_devices_unfit")? == 1)
    })?;
    for _ in 0..3 {
        ensure!(SIW.client(cell).is_err(), "a further client is accepted");
        others_live(&mut served, &mut tcp)?;
    }
    once(cell, "device siw1 can't serve clients: it refuses RDMA writes with immediate data")?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    drop(served);
    cell.stop()
}

/// The driver is built by the set-up; what it needs is among the guest's own modules.
fn load_siw(cell: &Cell) -> Result<()> {
    let driver = cell.lab.cache.join("siw/siw.ko");
    ensure!(driver.exists(), "no {}: run scripts/setup.sh guest-siw", driver.display());
    let kernel = cell.lab.cache.join("kernel");
    shell(&format!("modprobe -d {} -a iw_cm libcrc32c", kernel.display()), cell.folder())?;
    let insert = format!("grep -q '^siw ' /proc/modules || insmod {}", driver.display());
    shell(&insert, cell.folder())
}

fn others_live(
    rdma: &mut Client<rdma::Connection>,
    tcp: &mut Client<tcp::Connection>,
) -> Result<()> {
    expect(rdma, "PING", "PONG")?;
    expect(tcp, "PING", "PONG")
}

/// What `RDMA.DOCTOR` says of Soft-RoCE and of siw.
fn doctor_providers(cell: &mut Cell) -> Result<()> {
    load_siw(cell)?;
    SIW.serve(cell)?;
    let reply = cell.tcp()?.words("RDMA.DOCTOR")?;
    let said = all_said(&reply)?;
    for (device, resembles, failures) in
        [("rxe0", "rxe", &[][..]), ("siw1", "iwarp", &["immediate"])]
    {
        let one = said.iter().find(|one| one.device == device);
        let one = one.with_context(|| format!("no {device} in {reply}"))?;
        cell.figure(device, one.text());
        ensure!(one.resembles == resembles, "{device} {}", one.text());
        ensure!(one.failures() == failures, "{device} {}", one.text());
    }
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    cell.stop()
}

/// Has the server run behind a command of the shell's.
fn behind(cell: &mut Cell, unshare: &[&str], command: &str) {
    let shell = format!("{command} && exec \"$@\"");
    let prefix = [&["unshare"], unshare, &["sh", "-c", &shell, "sh"]].concat();
    cell.settings.prefix = prefix.into_iter().map(str::to_owned).collect();
}

/// In a network namespace without the device's interface, as in a pod: the device shows, and
/// none of its addresses is there. That is the reason that is given, and nothing starts.
fn no_netdev(cell: &mut Cell) -> Result<()> {
    behind(cell, &["--net"], "ip link set lo up");
    let line = refusal(cell, &["cannot listen on ", "Cannot assign requested address"])?;
    cell.figure("bind", line);
    cell.settings.arguments.retain(|argument| !argument.starts_with("bind="));
    cell.settings.arguments.extend(["bind=*".to_owned(), "probe=require".to_owned()]);
    let line = refusal(cell, &["no RDMA device has one of this machine's addresses", "ip addr"])?;
    cell.figure("everywhere, with probe=require", line);
    Ok(())
}

/// Beside a device that serves, one whose interface has no address: it is named, can't be
/// reached, and hurts nobody.
fn no_address(cell: &mut Cell) -> Result<()> {
    let add = "rdma link show rxe3/1 2>/dev/null | grep -q . || {
        ip link add d3 type dummy && ip link set d3 addrgenmode none up &&
        rdma link add rxe3 type rxe netdev d3; }";
    shell(add, cell.folder())?;
    cell.settings.arguments.retain(|argument| !argument.starts_with("bind="));
    cell.settings.arguments.push("bind=*".to_owned());
    cell.start()?;
    once(cell, "device rxe3: ")?;
    let reply = cell.tcp()?.words("RDMA.DOCTOR rxe3")?;
    let words = "no device rxe3 has an address that is listened on";
    ensure!(reply.is_error() && reply.text().contains(words), "RDMA.DOCTOR rxe3: {reply}");
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    cell.stop()
}

/// The device is there, and the way to its connection manager is not, as where `rdma_ucm` was
/// not loaded or a container was not let to it.
fn no_rdma_ucm(cell: &mut Cell) -> Result<()> {
    let private = ["--mount", "--propagation", "private"];
    behind(cell, &private, "mount -t tmpfs tmpfs /dev/infiniband");
    let line = refusal(cell, &["cannot open the RDMA connection manager", "modprobe rdma_ucm"])?;
    cell.figure("without rdma_ucm", line);
    Ok(())
}
