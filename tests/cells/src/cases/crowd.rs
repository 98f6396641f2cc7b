// SPDX-License-Identifier: BSD-3-Clause
//! That clients which do nothing cost next to nothing.

use anyhow::{Result, ensure};

use super::hostile::Holdings;
use super::operators::completion_queues;
use super::stalled::settle;
use crate::cell::{Case, Cell};
use crate::matrix::Fabric;
use crate::tools::Load;

/// The cases of this file.
pub const CASES: &[Case] = &[Case::new("idle-crowd", idle_crowd)];

/// Resident memory that an idle connection may take, in bytes, the server's own share
/// included. Upstream's C module takes 3.8 MB on Soft-RoCE.
const MOST: f64 = 200.0 * 1024.0;

/// Completion queues that serve the crowd at most: each has to be looked at again and again.
/// Every one serves twice as many connections as the one before, the first 77.
const QUEUES: u64 = 5;

/// Descriptors that a connection takes in one process, the software fabric's included.
const DESCRIPTORS: u64 = 3;

fn idle_crowd(cell: &mut Cell) -> Result<()> {
    let count = match cell.lab.fabric {
        // As many as the limit on descriptors leaves room for, and that is many.
        Fabric::Soft => 2000.min((limit_on_descriptors()? - 500) / DESCRIPTORS),
        Fabric::Vm | Fabric::VmNew | Fabric::Hw => 200,
    };
    ensure!(count >= 100, "the limit on open files leaves room for {count} connections");
    let requests = if cell.lab.is_slow() { 2000 } else { 20_000 };
    let load =
        Load { tests: vec!["set", "get"], requests, clients: 50, size: 64, ..Load::default() };
    // Brings the server's pools, and ours, to their working size.
    cell.benchmark(&load, cell.lab.cell_limit())?;
    settle(cell)?;
    let rest = Holdings::at_rest(cell)?;
    let before = cell.server().resident()?;

    let crowd = cell.idle_clients(count as usize)?;
    cell.wait_info("the crowd", |info| Ok(info.number("rdma_connections_established")? == count))?;
    let queues = completion_queues(cell)?;
    ensure!(queues <= QUEUES, "{count} connections have {queues} completion queues");
    let each = cell.server().resident()?.saturating_sub(before) as f64 / count as f64;
    cell.figure("resident memory of an idle connection", format!("{:.0} KiB", each / 1024.0));
    ensure!(each < MOST, "an idle connection takes {each:.0} bytes");

    // Those who are busy are served as before: the figures stand one under the other.
    cell.benchmark(&load, cell.lab.cell_limit())?;
    drop(crowd);
    rest.wait_back(cell)?;
    Ok(())
}

fn limit_on_descriptors() -> Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a place for the answer.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    ensure!(result == 0, "getrlimit: {}", std::io::Error::last_os_error());
    Ok(limit.rlim_cur.min(1 << 20))
}
