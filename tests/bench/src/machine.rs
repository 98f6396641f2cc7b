// SPDX-License-Identifier: BSD-3-Clause
//! Where figures come from: without it they say nothing.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A machine, as its kernel describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's model.
    pub processor: String,
    /// How many of them there are.
    pub processors: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The load averages when the measuring began, of 1, 5 and 15 minutes.
    pub load: String,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).context(path.to_owned());
        let field = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
        };
        let memory = field(&read("/proc/meminfo")?, "MemTotal").context("no MemTotal")?;
        let kib: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal")?;
        Ok(Self {
            processor: field(&read("/proc/cpuinfo")?, "model name").context("no model name")?,
            processors: std::thread::available_parallelism()?.get(),
            memory: kib << 10,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load: read("/proc/loadavg")?.split_whitespace().take(3).collect::<Vec<_>>().join(" "),
        })
    }
}
