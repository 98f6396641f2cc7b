// SPDX-License-Identifier: BSD-3-Clause
//! What two processes reach with RDMA writes alone: perftest's `ib_write_bw`, with writes as
//! large as a window, each of which waits for the one before.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cells::lab::LOOPBACK;
use cells::process::{Process, run, tail};
use cells::server::free_port;

/// Bytes of a window: a client's, and the module's when it has grown.
pub const WINDOW: u32 = 1 << 20;

/// Writes of one run.
const WRITES: u32 = 3000;

/// perftest connects twice, and its client may come before its server listens again.
const TRIES: u32 = 5;

/// Bytes in a second, measured once.
pub fn measure(folder: &std::path::Path) -> Result<f64> {
    let mut tries = 0;
    loop {
        tries += 1;
        match once(folder) {
            Err(_) if tries < TRIES => {}
            result => return result,
        }
    }
}

fn once(folder: &std::path::Path) -> Result<f64> {
    let port = free_port()?.to_string();
    let command = || {
        let mut command = Command::new("ib_write_bw");
        command.args(["-R", "-F", "-t", "1", "-s", &WINDOW.to_string()]);
        command.args(["-n", &WRITES.to_string(), "-p", &port]);
        command
    };
    let mut listens = command();
    listens.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server =
        Process::spawn(&mut listens).context("ib_write_bw (run scripts/setup.sh bench)")?;
    std::thread::sleep(Duration::from_millis(500));
    let mut writes = command();
    writes.arg(LOOPBACK.to_string());
    let output = run(&mut writes, b"", folder, Duration::from_secs(60));
    server.end(Duration::from_secs(5))?;
    let output = output?;
    ensure!(output.status.success(), "ib_write_bw: {}", tail(&output.text()));
    average(&output.text()).with_context(|| format!("ib_write_bw said: {}", tail(&output.text())))
}

/// The column "BW average", in units of 2^20 bytes, of the line that begins with the size.
fn average(text: &str) -> Result<f64> {
    let size = WINDOW.to_string();
    let line = text.lines().find(|line| line.split_whitespace().next() == Some(&size));
    let column = line.and_then(|line| line.split_whitespace().nth(3)).context("no figures")?;
    Ok(column.parse::<f64>().context("BW average")? * f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_read() {
        let text = " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate\n \
                    1048576    3000             9154.31            8931.50             0.008931\n";
        assert_eq!(average(text).unwrap(), 8931.5 * 1048576.0);
        assert!(average("Couldn't connect").is_err());
    }
}
