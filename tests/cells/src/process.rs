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

    /// Keeps it from running, as long as the answer lives.
    #[must_use]
    pub fn pause(&self) -> Paused {
        self.signal(libc::SIGSTOP);
        Paused(self.id())
    }

    /// Asks it to end; `None` if it does not within `patience`.
    pub fn ask_to_end(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        self.signal(libc::SIGTERM);
        self.wait(patience)
    }

    /// Ends it: politely first, after `patience` by force.
    pub fn end(&mut self, patience: Duration) -> Result<ExitStatus> {
        match self.ask_to_end(patience)? {
            Some(status) => Ok(status),
            None => self.kill(),
        }
    }

    /// Ends it by force.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(libc::SIGKILL);
        self.wait(Duration::from_secs(10))?.context("a process survived SIGKILL for 10 s")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.status(), Ok(Some(_))) {
            let _ = self.kill();
        }
    }
}

/// A process that is kept from running, until this is dropped. It must not be waited for
/// before that.
pub struct Paused(u32);

impl Drop for Paused {
    fn drop(&mut self) {
        // SAFETY: a signal to a child that is not yet waited for.
        unsafe { libc::kill(self.0 as i32, libc::SIGCONT) };
    }
}

/// What each thread of process `pid` is at, as the kernel has it: name, state, the processor
/// time that it takes within a second, where in the kernel it sleeps, the number and arguments
/// of its system call, and its stack in the kernel, which root may see. For whoever finds a
/// message about a program that hung, and nothing else of it.
pub fn threads(pid: u32) -> String {
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return "  gone\n".to_owned();
    };
    let tasks: Vec<PathBuf> = tasks.flatten().map(|task| task.path()).collect();
    let ticks = |task: &PathBuf| cpu_ticks(&read(task.join("stat"))).unwrap_or_default();
    let before: Vec<_> = tasks.iter().map(ticks).collect();
    std::thread::sleep(Duration::from_secs(1));
    let mut text = String::new();
    for (task, before) in tasks.iter().zip(before) {
        let status = read(task.join("status"));
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let after = ticks(task);
        text += &format!(
            "  {}: {}, {} ticks as user and {} in the kernel, in {}, system call {}\n",
            field("Name:").unwrap_or_default().trim(),
            field("State:").unwrap_or_default().trim(),
            after.0.saturating_sub(before.0),
            after.1.saturating_sub(before.1),
            read(task.join("wchan")),
            read(task.join("syscall")).trim(),
        );
        let stack = read(task.join("stack"));
        text += &stack.lines().map(|line| format!("    {line}\n")).collect::<String>();
    }
    text
}

/// The processor time in a `stat` of the kernel's, as user and in the kernel, in ticks.
pub fn cpu_ticks(stat: &str) -> Option<(u64, u64)> {
    // The name in brackets may hold anything; utime and stime are 12 and 13 after it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Has the kernel write to its log what its processors are at, which tasks it has blocked, and
/// the stacks of all. For a machine that is ours alone.
pub fn kernel_tells() {
    for what in ["l", "w", "t"] {
        let _ = std::fs::write("/proc/sysrq-trigger", what);
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
        let parts = ["did not finish", "sleep: S (sleeping), 0 ticks", "system call", "the scene"];
        for part in parts {
            assert!(message.contains(part), "no '{part}' in {message}");
        }
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "7 (a) b) R 1 7 7 0 -1 4194560 90 0 0 0 12 345 0 0 20 0 1 0";
        assert_eq!(cpu_ticks(stat), Some((12, 345)));
        assert_eq!(cpu_ticks("7 (a"), None);
    }
}
