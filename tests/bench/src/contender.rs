// SPDX-License-Identifier: BSD-3-Clause
//! Who is measured: the same server build with this module, with upstream's, and with none.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cells::lab::{BUILT, LOOPBACK, Lab};
use cells::process::tail;
use cells::server::{Server, Settings};
use serde::{Deserialize, Serialize};

/// What carries the requests to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contender {
    /// This repository's module.
    Ours,
    /// Upstream's module, in C.
    Upstream,
    /// No module: TCP over loopback.
    Tcp,
}

use Contender::{Ours, Tcp, Upstream};

impl Contender {
    /// All there are.
    pub const ALL: [Self; 3] = [Ours, Upstream, Tcp];

    /// Who is measured after whom in a turn: each order once in six turns, so that nobody
    /// always comes after the same other.
    pub fn order(turn: u32) -> [Self; 3] {
        const ORDERS: [[Contender; 3]; 6] = [
            [Ours, Upstream, Tcp],
            [Upstream, Tcp, Ours],
            [Tcp, Ours, Upstream],
            [Upstream, Ours, Tcp],
            [Ours, Tcp, Upstream],
            [Tcp, Upstream, Ours],
        ];
        ORDERS[turn as usize % ORDERS.len()]
    }

    /// Starts a server in `folder` that serves by this, with I/O threads as they are out of
    /// the box. A port that is free for TCP may be taken on the fabric: then it takes others.
    pub fn start(self, lab: &Lab, io_threads: u32, folder: &Path) -> Result<Server> {
        let mut tries = 0;
        loop {
            let settings = self.settings(lab, io_threads)?;
            let folder = folder.join(format!("server{tries}"));
            tries += 1;
            match Server::start(lab, BUILT, &folder, &settings) {
                Err(error) if tries < 3 && format!("{error:#}").contains("Failed listening") => {}
                result => return result.context("the server"),
            }
        }
    }

    fn settings(self, lab: &Lab, io_threads: u32) -> Result<Settings> {
        let mut settings = Settings::new(lab, BUILT, io_threads)?;
        settings.io_threads_as_they_are();
        match self {
            Ours => {}
            Upstream => {
                settings.module = Some(lab.built.join("valkey-rdma.so"));
                settings.arguments.clear();
                settings.directive(&format!("rdma-bind {}", settings.rdma.ip()));
                settings.directive(&format!("rdma-port {}", settings.rdma.port()));
            }
            Tcp => settings.module = None,
        }
        Ok(settings)
    }

    /// `valkey-benchmark`, pointed at the server by this way.
    pub fn benchmark(self, lab: &Lab, server: &Server) -> Command {
        let mut command = Command::new(lab.clients.join("valkey-benchmark"));
        let address = match self {
            Tcp => SocketAddr::new(LOOPBACK, server.settings().port),
            _ => {
                command.arg("--rdma");
                server.rdma_address()
            }
        };
        command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
        command
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Ours => "ours",
            Upstream => "C module",
            Tcp => "TCP",
        })
    }
}

/// Fails if the server has gone: a better explanation than what its clients say.
pub fn alive(server: &mut Server) -> Result<()> {
    ensure!(server.is_running()?, "the server died; its log ends: {}", tail(&server.log()?));
    Ok(())
}

/// Ends a server that has to be alive and well still.
pub fn end(mut server: Server) -> Result<()> {
    alive(&mut server)?;
    if let Some(report) = server.crash_report()? {
        anyhow::bail!("the server crashed: {report}");
    }
    let status = server.stop()?;
    ensure!(status.success(), "the server ended with {status}: {}", tail(&server.log()?));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn six_turns_are_all_orders() {
        let orders: HashSet<[Contender; 3]> = (0..6).map(Contender::order).collect();
        assert_eq!(orders.len(), 6);
        for order in orders {
            assert_eq!(order.iter().collect::<HashSet<_>>().len(), 3);
        }
    }
}
