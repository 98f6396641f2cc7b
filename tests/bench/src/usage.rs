// SPDX-License-Identifier: BSD-3-Clause
//! What a process has used of the processors so far, as the kernel counts it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A reading of a process.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    at: Instant,
    /// Processor time of all its threads, user and system.
    cpu: Duration,
    /// Time that its main thread did not sleep: on a processor, or waiting for one.
    awake: Duration,
}

impl Usage {
    /// Reads the process `pid` now.
    pub fn of(pid: u32) -> Result<Self> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            std::fs::read_to_string(&path).context(path)
        };
        Ok(Self {
            at: Instant::now(),
            cpu: cpu(&read("stat")?)?,
            awake: awake(&read("schedstat")?)?,
        })
    }

    /// Processor time since `before`.
    pub fn cpu_since(&self, before: &Self) -> Duration {
        self.cpu.saturating_sub(before.cpu)
    }

    /// The part of the time since `before` in which the main thread did not sleep.
    pub fn awake_since(&self, before: &Self) -> f64 {
        let wall = self.at - before.at;
        self.awake.saturating_sub(before.awake).as_secs_f64() / wall.as_secs_f64()
    }
}

/// utime and stime: fields 12 and 13 behind the name in brackets, which may hold anything.
fn cpu(stat: &str) -> Result<Duration> {
    let fields = stat.rsplit_once(')').context("no name in stat")?.1;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || -> Result<u64> { Ok(fields.next().context("stat is short")?.parse()?) };
    let ticks = next()? + next()?;
    // SAFETY: sysconf has no preconditions.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second))
}

/// The scheduler's nanoseconds on a processor and in a run queue.
fn awake(schedstat: &str) -> Result<Duration> {
    let mut fields = schedstat.split_whitespace();
    let mut next = || -> Result<u64> { Ok(fields.next().context("schedstat is short")?.parse()?) };
    Ok(Duration::from_nanos(next()? + next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_thread_is_seen() {
        // Long enough for the kernel's clock ticks.
        let (before, deadline) =
            (Usage::of(std::process::id()).unwrap(), Instant::now() + Duration::from_millis(200));
        while Instant::now() < deadline {
            std::hint::black_box(0);
        }
        let after = Usage::of(std::process::id()).unwrap();
        assert!(after.cpu_since(&before) > Duration::ZERO);
        assert_eq!(before.cpu_since(&after), Duration::ZERO);
    }

    #[test]
    fn a_name_with_brackets_and_blanks_misleads_nobody() {
        let stat = "7 (a) b (c) S 1 1 1 0 -1 4194304 1 2 3 4 100 50 0 0 20 0 6 0";
        // SAFETY: sysconf has no preconditions.
        let tick = 1.0 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        assert_eq!(cpu(stat).unwrap(), Duration::from_secs_f64(150.0 * tick));
        assert_eq!(awake("3 4 5").unwrap(), Duration::from_nanos(7));
        assert!(cpu("7 (short) S").is_err());
    }
}
