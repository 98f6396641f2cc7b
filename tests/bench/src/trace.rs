// SPDX-License-Identifier: BSD-3-Clause
//! System calls of the server for each request, counted at the kernel's tracepoints.
//!
//! The server keeps nearly its full speed. A tracer that stops it at each call would slow it down
//! manyfold, and so change how much it finds to do at each wake-up.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cells::lab::Lab;
use perf_event::events::Tracepoint;
use perf_event::{Builder, Counter};

use crate::contender::Contender;
use crate::load::Stage;
use crate::table::{Cell, Pace};

/// Where the kernel describes its tracepoints; scripts/setup.sh mounts it.
const TRACEPOINTS: &str = "/sys/kernel/tracing/events";
/// The tracepoint of all system calls.
const ALL: &str = "raw_syscalls/sys_enter";
/// Those of readings of the clock, which are left out: only where the kernel has no clock for
/// user space, as with some virtual machines, do they take a system call.
const CLOCK: [&str; 2] = ["syscalls/sys_enter_clock_gettime", "syscalls/sys_enter_gettimeofday"];

/// System calls that are tried out.
const TRIED: u64 = 1000;

/// The time in which system calls can be counted.
///
/// The first counter at a tracepoint puts it into the kernel's code, and the last one takes it
/// out, for which the kernel waits until no processor can be in it. An emulated and busy machine
/// takes seconds for that, and was seen to hang. So a few counters stay from the beginning to the
/// end. Meanwhile each system call on the machine is a little slower.
pub struct Counting(#[expect(dead_code, reason = "held")] Counters);

impl Counting {
    /// From now on system calls can be counted, as was tried with a known number of them.
    pub fn begin() -> Result<Self> {
        // SAFETY: no arguments.
        let own = unsafe { libc::gettid() };
        let mut counters = Counters::new(&[own]).context("counting system calls")?;
        let before = counters.read()?;
        for _ in 0..TRIED {
            let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: no arguments, and a place for the time.
            unsafe {
                libc::syscall(libc::SYS_getppid);
                libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now);
            }
        }
        let counted = counters.read()? - before;
        // To read the counters takes a few.
        ensure!(
            (TRIED..TRIED + 10).contains(&counted),
            "of {TRIED} system calls, and as many readings of the clock, {counted} were counted"
        );
        Ok(Self(counters))
    }

    /// System calls of all threads of the server for each request of a cell, in a run of its own.
    pub fn of(
        &self,
        lab: &Lab,
        pace: &Pace,
        cell: &Cell,
        contender: Contender,
        folder: &Path,
    ) -> Result<f64> {
        let mut stage = Stage::set(lab, pace, cell, contender, folder)?;
        let pid = stage.server.pid();
        let (_, seen, calls) = stage.watch(pace, |span| {
            let mut counters = Counters::new(&threads(pid)?)?;
            std::thread::sleep(span);
            counters.read()
        })?;
        stage.strike()?;
        ensure!(calls > 0, "no system call was counted");
        Ok(calls as f64 / seen.requests as f64)
    }
}

/// The threads of the process `pid`.
fn threads(pid: u32) -> Result<Vec<i32>> {
    std::fs::read_dir(format!("/proc/{pid}/task"))?
        .map(|task| {
            let name = task?.file_name();
            let thread = name.to_str().and_then(|name| name.parse().ok());
            thread.with_context(|| format!("the thread {name:?}"))
        })
        .collect()
}

/// Counters of the system calls of some threads, one for each.
struct Counters {
    all: Vec<Counter>,
    clock: Vec<Counter>,
}

impl Counters {
    /// Begins to count what these threads call.
    fn new(threads: &[i32]) -> Result<Self> {
        let (all, clock) = (tracepoint(ALL)?, [tracepoint(CLOCK[0])?, tracepoint(CLOCK[1])?]);
        let mut counters = Self { all: Vec::new(), clock: Vec::new() };
        for thread in threads {
            counters.all.push(counter(all, *thread)?);
            for event in clock {
                counters.clock.push(counter(event, *thread)?);
            }
        }
        Ok(counters)
    }

    /// System calls so far, without readings of the clock.
    fn read(&mut self) -> Result<u64> {
        let sum = |counters: &mut [Counter]| -> std::io::Result<u64> {
            counters.iter_mut().map(Counter::read).sum()
        };
        // The clock's first: what is called in between must not make it the larger.
        let clock = sum(&mut self.clock)?;
        Ok(sum(&mut self.all)? - clock)
    }
}

fn counter(event: Tracepoint, thread: i32) -> Result<Counter> {
    let mut counter = Builder::new(event)
        .observe_pid(thread)
        .any_cpu()
        .include_kernel()
        .build()
        .context("the kernel does not let us count (are you root?)")?;
    counter.enable()?;
    Ok(counter)
}

fn tracepoint(name: &str) -> Result<Tracepoint> {
    let path = Path::new(TRACEPOINTS).join(name).join("id");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} (run scripts/setup.sh bench)", path.display()))?;
    let id = text.trim().parse().with_context(|| format!("{}: '{text}'", path.display()))?;
    Ok(Tracepoint::with_id(id))
}
