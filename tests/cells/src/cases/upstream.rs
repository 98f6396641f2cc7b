// SPDX-License-Identifier: BSD-3-Clause
//! A server with upstream's own module, which is built for 9.1 only.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::Result;

use crate::cell::Cell;
use crate::lab::LOOPBACK;
use crate::process::Process;
use crate::server::free_port;

/// The server, which ends with this.
pub struct Upstream {
    pub process: Process,
    pub tcp: SocketAddr,
    pub rdma: SocketAddr,
}

impl Upstream {
    /// Starts one in the folder `name` of the cell. It may not listen yet.
    pub fn spawn(cell: &Cell, name: &str) -> Result<Self> {
        let built = &cell.lab.built;
        let folder = cell.folder().join(name);
        std::fs::create_dir_all(&folder)?;
        let tcp = SocketAddr::new(LOOPBACK, free_port()?);
        let rdma = SocketAddr::new(cell.lab.address, free_port()?);
        let mut command = Command::new(built.join("valkey-server"));
        command.args(["--port", &tcp.port().to_string(), "--bind", &tcp.ip().to_string()]);
        command.args(["--save", "", "--protected-mode", "no", "--dir"]).arg(&folder);
        command.arg("--logfile").arg(folder.join("log"));
        command.args(["--rdma-bind", &rdma.ip().to_string()]);
        command.args(["--rdma-port", &rdma.port().to_string()]);
        command.arg("--loadmodule").arg(built.join("valkey-rdma.so"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { process: Process::spawn(&mut command)?, tcp, rdma })
    }
}
