// SPDX-License-Identifier: BSD-3-Clause
//! A stock server with the module in it: how it is configured, started, watched and ended.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use client::{Client, tcp};

use crate::info::Info;
use crate::lab::{LOOPBACK, Lab};
use crate::matrix::{self, Fabric};
pub use crate::ports::free_port;
use crate::process::{Paused, Process, cpu_ticks, kernel_tells, tail, threads};

/// How long a server may take until it answers, or as long as one call of a client.
const START: Duration = Duration::from_secs(60);
/// How long it may take to shut down.
const STOP: Duration = Duration::from_secs(30);

/// What makes a server use its I/O threads for everything: up to 9.0, and since.
const IO_THREADS_ALWAYS: [&str; 2] = ["events-per-io-thread 0", "io-threads-always-active yes"];

/// Whether a server of this name starts its I/O threads by descriptors that fired.
pub fn wakes_by_descriptors(server: &str) -> bool {
    ["8.0", "8.1", "9.0"].contains(&matrix::line(server))
}

/// What a server is started with. A case changes what it is about.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Lines of the configuration file.
    pub directives: Vec<String>,
    /// The module to load.
    pub module: Option<PathBuf>,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The TCP port.
    pub port: u16,
    /// The RDMA address and port that the arguments name.
    pub rdma: SocketAddr,
    /// A whole configuration file instead of what the fields above say.
    pub configuration: Option<String>,
    /// A command that runs the server's command.
    pub prefix: Vec<String>,
    /// Variables of the environment.
    pub environment: Vec<(String, String)>,
}

impl Settings {
    /// The settings that cells have in common.
    pub fn new(lab: &Lab, line: &str, io_threads: u32) -> Result<Self> {
        let rdma = SocketAddr::new(lab.address, free_port()?);
        let mut settings = Self {
            directives: Vec::new(),
            module: Some(lab.module.clone()),
            arguments: vec![format!("bind={}", rdma.ip()), format!("port={}", rdma.port())],
            port: free_port()?,
            rdma,
            configuration: None,
            prefix: Vec::new(),
            environment: Vec::new(),
        };
        settings.directive("save \"\"");
        settings.directive("enable-debug-command yes");
        settings.directive("protected-mode no");
        if io_threads > 1 {
            settings.directive(&format!("io-threads {io_threads}"));
            // Left alone, both kinds use I/O threads only when they think it worth it, and
            // a test of what I/O threads do would test nothing.
            settings.directive(IO_THREADS_ALWAYS[usize::from(!wakes_by_descriptors(line))]);
        }
        Ok(settings)
    }

    /// Leaves it to the server when to use its I/O threads.
    pub fn io_threads_as_they_are(&mut self) {
        self.directives.retain(|line| !IO_THREADS_ALWAYS.contains(&line.as_str()));
    }

    /// Adds a line of configuration.
    pub fn directive(&mut self, line: &str) {
        self.directives.push(line.to_owned());
    }

    /// The configuration file. The module comes last, behind what directives load.
    fn text(&self, folder: &Path) -> String {
        if let Some(text) = &self.configuration {
            return text.clone();
        }
        let mut lines = vec![
            format!("bind {LOOPBACK}"),
            format!("port {}", self.port),
            format!("dir {}", folder.display()),
            format!("logfile {}", log_path(folder).display()),
        ];
        lines.extend(self.directives.iter().cloned());
        if let Some(module) = &self.module {
            let arguments = self.arguments.join(" ");
            lines.push(format!("loadmodule {} {arguments}", module.display()));
        }
        lines.join("\n") + "\n"
    }

    /// Replaces the module's arguments.
    pub fn arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|&text| text.to_owned()).collect();
    }
}

/// A server process.
pub struct Server {
    process: Process,
    folder: PathBuf,
    settings: Settings,
    fabric: Fabric,
}

impl Server {
    /// Starts the stock server of `line` in `folder`, and does not wait for it.
    pub fn launch(lab: &Lab, line: &str, folder: &Path, settings: &Settings) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let configuration = folder.join("valkey.conf");
        std::fs::write(&configuration, settings.text(folder))?;
        let output = File::create(folder.join("output"))?;
        let mut command = lab.server_command(line, &settings.prefix)?;
        command
            .arg(configuration)
            .envs(settings.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Self {
            process: Process::spawn(&mut command)?,
            folder: folder.to_owned(),
            settings: settings.clone(),
            fabric: lab.fabric,
        })
    }

    /// Starts a server and waits until it answers over TCP.
    pub fn start(lab: &Lab, line: &str, folder: &Path, settings: &Settings) -> Result<Self> {
        let mut server = Self::launch(lab, line, folder, settings)?;
        let patience = START.max(lab.patience());
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = server.process.status()? {
                bail!("the server ended while starting ({status}): {}", tail(&server.log()?));
            }
            if server.answers()? {
                return Ok(server);
            }
            ensure!(
                Instant::now() < deadline,
                "the server did not answer within {} s: {}\n{}",
                patience.as_secs(),
                tail(&server.log()?),
                server.scene()
            );
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Whether the server answers, and is this one and not another on the same port.
    fn answers(&self) -> Result<bool> {
        let Ok(mut client) = self.tcp(Duration::from_secs(2)) else {
            return Ok(false);
        };
        let Ok(reply) = client.words("INFO server") else {
            return Ok(false);
        };
        let info = Info::parse(&reply.text());
        let process = info.number("process_id")?;
        ensure!(
            process == u64::from(self.process.id()),
            "port {} belongs to process {process}, not to the server {}",
            self.settings.port,
            self.process.id()
        );
        Ok(true)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it was started with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where it keeps its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The address of its RDMA side.
    pub fn rdma_address(&self) -> SocketAddr {
        self.settings.rdma
    }

    /// The address of its TCP side.
    pub fn tcp_address(&self) -> SocketAddr {
        SocketAddr::new(LOOPBACK, self.settings.port)
    }

    /// A TCP client of it.
    pub fn tcp(&self, timeout: Duration) -> Result<Client<tcp::Connection>> {
        Ok(tcp::Connection::client(self.tcp_address(), timeout)?)
    }

    /// What `INFO everything` says.
    pub fn info(&self, timeout: Duration) -> Result<Info> {
        let reply = self.tcp(timeout)?.words("INFO everything")?;
        ensure!(!reply.is_error(), "INFO: {reply}");
        Ok(Info::parse(&reply.text()))
    }

    /// What it is at, for the message of a failure: its threads, what it says of its RDMA
    /// connections if it answers, and its descriptors. In the virtual machine the kernel tells
    /// what it is at as well, in its own log.
    pub fn scene(&self) -> String {
        let threads = threads(self.pid());
        if self.fabric == Fabric::Vm {
            kernel_tells();
        }
        let answer = |words: &str| -> String {
            let asked = self.tcp(Duration::from_secs(2)).and_then(|mut tcp| Ok(tcp.words(words)?));
            asked.map_or_else(|error| format!("{error:#}"), |reply| reply.to_string())
        };
        let said = answer("INFO rdma");
        let said: Vec<_> = said.lines().filter(|line| !line.ends_with(":0")).collect();
        let mut links: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .into_iter()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .map(|link| link.display().to_string())
            .collect();
        links.sort();
        format!(
            "the server's threads:\n{threads}RDMA.CLIENTS: {}\n{}\nits descriptors: {}",
            answer("RDMA.CLIENTS"),
            said.join(" "),
            links.join(" ")
        )
    }

    /// Everything that it has said: its log, and what went to its output before there was one.
    pub fn log(&self) -> Result<String> {
        let mut text = std::fs::read(self.folder.join("output")).unwrap_or_default();
        text.extend(std::fs::read(log_path(&self.folder)).unwrap_or_default());
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// The lines of its log that hold `words`.
    pub fn log_lines(&self, words: &str) -> Result<Vec<String>> {
        let log = self.log()?;
        let lines = log.lines().filter(|line| line.contains(words));
        Ok(lines.map(str::to_owned).collect())
    }

    /// Waits until a line of the log holds `words`, and returns the first that does.
    pub fn wait_log(&self, words: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(line) = self.log_lines(words)?.into_iter().next() {
                return Ok(line);
            }
            if Instant::now() >= deadline {
                return Err(anyhow!(
                    "no log line with '{words}' within {} s; the log ends: {}",
                    timeout.as_secs(),
                    tail(&self.log()?)
                ));
            }
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.status()?.is_none())
    }

    /// Waits until it ends by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.process
            .wait(timeout)?
            .with_context(|| format!("the server did not end within {} s", timeout.as_secs()))
    }

    /// The scene, if it is there and does not answer: whatever failed, failed by that.
    pub fn silence(&mut self) -> Option<String> {
        let runs = matches!(self.is_running(), Ok(true));
        let pong = || -> Result<bool> {
            let mut client = self.tcp(Duration::from_secs(10))?;
            Ok(client.command(&[b"PING"]).is_ok())
        };
        (runs && !matches!(pong(), Ok(true))).then(|| self.scene())
    }

    /// Keeps it from running, as long as the answer lives.
    #[must_use]
    pub fn pause(&self) -> Paused {
        self.process.pause()
    }

    /// Shuts it down.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let status = self.process.ask_to_end(STOP)?;
        status.with_context(|| {
            format!("the server did not end within {} s\n{}", STOP.as_secs(), self.scene())
        })
    }

    /// Ends it by force, as a crash would.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.kill()
    }

    /// The signs of a crash in its log.
    pub fn crash_report(&self) -> Result<Option<String>> {
        const SIGNS: [&str; 5] = [
            "BUG REPORT START",
            "ASSERTION FAILED",
            "crashed by signal",
            "Guru Meditation",
            "panicked at",
        ];
        // Panics that a test asked for, see src/test_panics.rs, are no crashes.
        const ASKED_FOR: &str = "src/test_panics.rs";
        let log = self.log()?;
        let found = log.lines().position(|line| {
            SIGNS.iter().any(|sign| line.contains(sign)) && !line.contains(ASKED_FOR)
        });
        Ok(found.map(|at| {
            let lines: Vec<&str> = log.lines().skip(at.saturating_sub(3)).take(40).collect();
            lines.join("\n")
        }))
    }

    /// Its resident memory in bytes.
    pub fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib = line.split_whitespace().next().context("VmRSS is empty")?;
        Ok(kib.parse::<u64>()? * 1024)
    }

    /// How many descriptors it has open when it is left alone: the fewest of some samples,
    /// since the observers' own connections come and go.
    pub fn descriptors(&self) -> Result<usize> {
        let mut fewest = usize::MAX;
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(50));
            let now = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count();
            fewest = fewest.min(now);
        }
        Ok(fewest)
    }

    /// Processor time that its main thread has used.
    pub fn main_thread_cpu(&self) -> Result<Duration> {
        let pid = self.pid();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat"))?;
        let (user, kernel) = cpu_ticks(&stat).context("no times in stat")?;
        // SAFETY: sysconf has no preconditions.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        Ok(Duration::from_secs_f64((user + kernel) as f64 / per_second))
    }

    /// The files mapped into it whose name ends in `name`, as this process can open them.
    pub fn mapped(&self, name: &str) -> Result<Vec<PathBuf>> {
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        let maps = std::fs::read_to_string(process.join("maps"))?;
        let lines = maps.lines().filter(|line| line.ends_with(name));
        let files = lines.filter_map(|line| {
            // The link leads to the very file, also where the server sees it under another
            // name; it is for root only.
            let range = line.split_whitespace().next()?;
            let link = process.join("map_files").join(range);
            let shown = line.find('/').map(|at| PathBuf::from(&line[at..]));
            if File::open(&link).is_ok() { Some(link) } else { shown }
        });
        Ok(files.collect())
    }
}

fn log_path(folder: &Path) -> PathBuf {
    folder.join("log")
}

/// An address in the form that configurations and clients' options take.
pub fn host(address: IpAddr) -> String {
    address.to_string()
}
