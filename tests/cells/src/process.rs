// SPDX-License-Identifier: BSD-3-Clause
//! Child processes that end in time: every one is waited for with a bound, and ended by its
//! own pid when the bound passes or when its owner goes away.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A child process, ended when dropped.
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let child =
            command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        Ok(Self { child, status: None })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits for its end; `None` if `timeout` passed first.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.status()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: i32) {
        if self.status.is_none() {
            // SAFETY: a pid that this process has not yet waited for can't be another's.
            unsafe { libc::kill(self.id() as i32, signal) };
        }
    }

    /// Ends it: politely first, after `patience` by force.
    pub fn end(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM);
        if let Some(status) = self.wait(patience)? {
            return Ok(status);
        }
        self.signal(libc::SIGKILL);
        self.wait(Duration::from_secs(10))?.context("a process survived SIGKILL for 10 s")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.status(), Ok(Some(_))) {
            self.signal(libc::SIGKILL);
            let _ = self.wait(Duration::from_secs(10));
        }
    }
}

/// What a finished program printed.
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl Output {
    /// The standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Runs `command` to its end, within `timeout`, with `input` on its standard input. Output
/// goes through files in `folder`, which can't fill up and block the program.
pub fn run(
    command: &mut Command,
    input: &[u8],
    folder: &Path,
    timeout: Duration,
) -> Result<Output> {
    let file = |name: &str| -> Result<File> {
        let path = folder.join(format!("{name}.{}", unique()));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(path)?;
        Ok(file)
    };
    let mut stdin = file("stdin")?;
    std::io::Write::write_all(&mut stdin, input)?;
    stdin.rewind()?;
    let (mut stdout, mut stderr) = (file("stdout")?, file("stderr")?);
    command
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout.try_clone()?))
        .stderr(Stdio::from(stderr.try_clone()?));
    let mut process = Process::spawn(command)?;
    let status = process.wait(timeout)?;
    let mut output = Vec::new();
    stdout.rewind()?;
    stdout.read_to_end(&mut output)?;
    let mut errors = Vec::new();
    stderr.rewind()?;
    stderr.read_to_end(&mut errors)?;
    let errors = String::from_utf8_lossy(&errors).into_owned();
    match status {
        Some(status) => Ok(Output { stdout: output, stderr: errors, status }),
        None => bail!(
            "{:?} did not finish in {} s; it printed: {} {}",
            command.get_program(),
            timeout.as_secs(),
            tail(&String::from_utf8_lossy(&output)),
            tail(&errors)
        ),
    }
}

fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The last lines of a text, for messages.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
