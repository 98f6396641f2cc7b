// SPDX-License-Identifier: BSD-3-Clause
//! Child processes that end in time: every one is waited for with a bound, and ended by its
//! own pid when the bound passes or when its owner goes away.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
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

/// What each thread of process `pid` is at, as the kernel has it: name, state, where in the
/// kernel it sleeps, and the number and arguments of its system call. For whoever finds a
/// message about a program that hung, and nothing else of it.
pub fn threads(pid: u32) -> String {
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return "  gone\n".to_owned();
    };
    let mut text = String::new();
    for task in tasks.flatten().map(|task| task.path()) {
        let status = read(task.join("status"));
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        text += &format!(
            "  {}: {}, in {}, system call {}\n",
            field("Name:").unwrap_or_default().trim(),
            field("State:").unwrap_or_default().trim(),
            read(task.join("wchan")),
            read(task.join("syscall")).trim(),
        );
    }
    text
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
    run_beside(command, input, folder, timeout, String::new)
}

/// The same; if it does not finish, `scene` adds to the message what it finds while the
/// program is still there.
pub fn run_beside(
    command: &mut Command,
    input: &[u8],
    folder: &Path,
    timeout: Duration,
    scene: impl FnOnce() -> String,
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
            "{:?} did not finish in {} s; it printed: {} {}\nits threads:\n{}{}",
            command.get_program(),
            timeout.as_secs(),
            tail(&String::from_utf8_lossy(&output)),
            tail(&errors),
            threads(process.id()),
            scene()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_described_before_it_is_ended() {
        let folder = std::env::temp_dir();
        let mut command = Command::new("sleep");
        command.arg("60");
        let limit = Duration::from_millis(200);
        let result = run_beside(&mut command, b"", &folder, limit, || "the scene".to_owned());
        let message = result.err().expect("it did not finish").to_string();
        for part in ["did not finish", "sleep: S (sleeping)", "system call", "the scene"] {
            assert!(message.contains(part), "no '{part}' in {message}");
        }
    }
}
