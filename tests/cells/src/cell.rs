// SPDX-License-Identifier: BSD-3-Clause
//! One cell while it runs: what a case works with, and what is checked after every case.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::rdma::{self, Options};
use client::{Client, tcp};

use crate::info::Info;
use crate::lab::{Lab, sha256};
use crate::matrix::CellId;
use crate::server::{Server, Settings, wakes_by_descriptors};

/// A case: what a cell does with its server.
pub struct Case {
    /// Its name in the matrix.
    pub name: &'static str,
    /// Changes the settings that the server is started with.
    prepare: fn(&mut Settings),
    /// Whether a server is started before it runs.
    started: bool,
    /// The test itself.
    run: fn(&mut Cell) -> Result<()>,
}

impl Case {
    /// A case on a server with the common settings.
    pub const fn new(name: &'static str, run: fn(&mut Cell) -> Result<()>) -> Self {
        Self { name, prepare: |_| {}, started: true, run }
    }

    /// The same on a server with changed settings.
    pub const fn with(mut self, prepare: fn(&mut Settings)) -> Self {
        self.prepare = prepare;
        self
    }

    /// The same without a server: the case starts its own.
    pub const fn unstarted(mut self) -> Self {
        self.started = false;
        self
    }
}

/// A running cell.
pub struct Cell<'a> {
    /// What the run is made of.
    pub lab: &'a Lab,
    /// Which cell this is.
    pub id: CellId,
    /// What its server is started with.
    pub settings: Settings,
    folder: PathBuf,
    server: Option<Server>,
    servers_started: u32,
    claimed: Traffic,
    nudges: u64,
    figures: Vec<(String, String)>,
}

/// Bytes over RDMA, from the server's point of view.
#[derive(Clone, Copy, Debug, Default)]
struct Traffic {
    received: u64,
    sent: u64,
}

impl<'a> Cell<'a> {
    /// Runs `case` as the cell `id`, and checks what every cell has to fulfil. Each wait in it
    /// is bounded by itself; a case that took more than `limit` in all has failed too.
    pub fn run(
        lab: &'a Lab,
        id: CellId,
        case: &Case,
        limit: Duration,
    ) -> (Result<()>, Vec<(String, String)>) {
        let mut cell = match Self::prepare(lab, id, case) {
            Ok(cell) => cell,
            Err(error) => return (Err(error), Vec::new()),
        };
        let started = Instant::now();
        let result = cell.go(case).and_then(|()| {
            ensure!(
                started.elapsed() <= limit,
                "it took {} s, more than the {} s it may",
                started.elapsed().as_secs(),
                limit.as_secs()
            );
            Ok(())
        });
        let result = cell.finish(result);
        (result, cell.figures)
    }

    fn prepare(lab: &'a Lab, id: CellId, case: &Case) -> Result<Self> {
        let folder = lab.scratch.join(id.to_string().replace('/', "_"));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let mut settings = Settings::new(lab, &id.server, id.io_threads)?;
        if let Some(device) = &id.device {
            settings.environment.push(("SOFTRDMA_DEVICE".to_owned(), device.clone()));
        }
        (case.prepare)(&mut settings);
        Ok(Self {
            lab,
            id,
            settings,
            folder,
            server: None,
            servers_started: 0,
            claimed: Traffic::default(),
            nudges: 0,
            figures: Vec::new(),
        })
    }

    fn go(&mut self, case: &Case) -> Result<()> {
        if case.started {
            self.start()?;
        }
        (case.run)(self)?;
        if self.server.is_some() {
            self.check_server()?;
        }
        Ok(())
    }

    /// Ends the server, looks for crashes, and puts the log's end to a failure, and what a
    /// server that does not answer is at.
    fn finish(&mut self, mut result: Result<()>) -> Result<()> {
        let silence = self.server.as_mut().filter(|_| result.is_err()).and_then(Server::silence);
        if let Some(scene) = silence {
            result = result.context(format!("the server does not answer; {scene}"));
        }
        let ended = self.stop();
        let last = self.folder.join(format!("server-{}", self.servers_started));
        let log = std::fs::read_to_string(last.join("log")).unwrap_or_default();
        let result = result.and(ended);
        if result.is_ok() {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
        result.with_context(|| {
            format!(
                "kept in {}; the server's log ends:\n{}",
                self.folder.display(),
                crate::process::tail(&log)
            )
        })
    }

    /// Starts the cell's server with its settings, in a folder of its own.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.server.is_none(), "the cell's server runs already");
        let folder = self.server_folder();
        let server = Server::start(self.lab, &self.id.server, &folder, &self.settings)?;
        self.check_identity(&server)?;
        self.server = Some(server);
        Ok(())
    }

    /// Starts a server that may well refuse to run, and does not wait for it.
    pub fn launch(&mut self) -> Result<Server> {
        let folder = self.server_folder();
        Server::launch(self.lab, &self.id.server, &folder, &self.settings)
    }

    fn server_folder(&mut self) -> PathBuf {
        self.servers_started += 1;
        self.folder.join(format!("server-{}", self.servers_started))
    }

    /// Shuts the cell's server down and makes sure that it went without a crash.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut server) = self.server.take() else {
            return Ok(());
        };
        let before = server.is_running()?;
        let status = server.stop()?;
        no_crash(&server)?;
        ensure!(
            !server.log()?.contains("Failed to unload module rdma"),
            "the server complains of the module when it exits"
        );
        ensure!(before, "the server had ended by itself ({status})");
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }

    /// Hands the server over to the case, which then looks after its end.
    pub fn take_server(&mut self) -> Result<Server> {
        self.server.take().context("the cell has no server")
    }

    /// The cell's server.
    pub fn server(&self) -> &Server {
        self.server.as_ref().expect("a case without a server asked for it")
    }

    /// A folder for the cell's own files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// An RDMA client with the usual options.
    pub fn rdma(&self) -> Result<Client<rdma::Connection>> {
        self.rdma_with(&self.options())
    }

    /// The usual options of an RDMA client on this fabric.
    pub fn options(&self) -> Options {
        Options { timeout: self.lab.patience(), ..Options::default() }
    }

    /// An RDMA client.
    pub fn rdma_with(&self, options: &Options) -> Result<Client<rdma::Connection>> {
        let address = self.server().rdma_address();
        rdma::Connection::client(address, options, self.lab.patience())
            .with_context(|| format!("connecting to {address} over RDMA"))
    }

    /// A TCP client.
    pub fn tcp(&self) -> Result<Client<tcp::Connection>> {
        self.server().tcp(self.lab.patience())
    }

    /// What the server's `INFO` says now.
    pub fn info(&self) -> Result<Info> {
        self.server().info(self.lab.patience())
    }

    /// Waits until `condition` holds for the server's `INFO`.
    pub fn wait_info(&self, what: &str, condition: impl Fn(&Info) -> Result<bool>) -> Result<Info> {
        let deadline = Instant::now() + self.lab.patience();
        loop {
            let info = self.info()?;
            if condition(&info)? {
                return Ok(info);
            }
            if Instant::now() >= deadline {
                bail!("waited {} s for: {what}", self.lab.patience().as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Claims that the case moved at least so many bytes over RDMA: what the server received
    /// and what it sent. The server's own counters have to agree in the end.
    pub fn moved(&mut self, received: usize, sent: usize) {
        self.claimed.received += received as u64;
        self.claimed.sent += sent as u64;
    }

    /// So many connections have to be nudged by the watchdog in this cell: in all others, none.
    pub fn expect_nudges(&mut self, count: u64) {
        self.nudges = count;
    }

    /// Notes a figure for the report.
    pub fn figure(&mut self, name: &str, value: impl ToString) {
        self.figures.push((name.to_owned(), value.to_string()));
    }

    /// Whether the server has I/O threads.
    pub fn has_io_threads(&self) -> bool {
        self.id.io_threads > 1
    }

    /// How often the event loop of the idle server runs in a second.
    pub fn idle_rate(&self) -> Result<f64> {
        self.at_rest(|cell| Ok(cell.loop_rate()?.min(cell.loop_rate()?)))
    }

    /// Makes sure that the event loop is as idle as that of the same server was, when it ran
    /// `idle` times a second: at most 2 × hz times more. One that spins never is, while one
    /// that has just been busy may need a moment.
    pub fn check_idle(&mut self, idle: f64, when: &str) -> Result<()> {
        let most = idle + 2.0 * self.info()?.number("hz")? as f64;
        let (rate, share) = self.at_rest(|cell| {
            let mut rates = Vec::new();
            for _ in 0..4 {
                let (busy, started) = (cell.server().main_thread_cpu()?, Instant::now());
                let rate = cell.loop_rate()?;
                let busy = cell.server().main_thread_cpu()? - busy;
                if rate <= most {
                    return Ok((rate, busy.as_secs_f64() / started.elapsed().as_secs_f64()));
                }
                rates.push(rate.round());
            }
            bail!("the event loop runs {rates:?} times a second {when}, idle it was {idle:.0}")
        })?;
        self.figure(
            &format!("event loop {when}"),
            format!("{rate:.0}/s (idle {idle:.0}/s), main thread {:.0} %", 100.0 * share),
        );
        Ok(())
    }

    /// Measures while no I/O thread is used: a stock server that has to use them always is
    /// never idle, and that of 9.1, told otherwise, still keeps them for a while.
    fn at_rest<T>(&self, measure: impl Fn(&Self) -> Result<T>) -> Result<T> {
        let mut observer = self.tcp()?;
        let mut set = |rest: bool| -> Result<()> {
            let line = match (wakes_by_descriptors(&self.id.server), rest) {
                (true, true) => "events-per-io-thread 2".to_owned(),
                (true, false) => "events-per-io-thread 0".to_owned(),
                (false, true) => "io-threads 1".to_owned(),
                (false, false) => format!("io-threads {}", self.id.io_threads),
            };
            let reply = observer.words(&format!("CONFIG SET {line}"))?;
            ensure!(reply.text() == "OK", "CONFIG SET {line}: {reply}");
            Ok(())
        };
        if !self.has_io_threads() {
            return measure(self);
        }
        set(true)?;
        let measured = measure(self);
        set(false)?;
        measured
    }

    /// Cycles of the server's event loop in a second.
    fn loop_rate(&self) -> Result<f64> {
        let mut observer = self.tcp()?;
        let mut cycles = || -> Result<u64> {
            Info::parse(&observer.words("INFO everything")?.text()).number("eventloop_cycles")
        };
        // The connection and the first answer have cycles of their own.
        cycles()?;
        let (first, started) = (cycles()?, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        let elapsed = started.elapsed().as_secs_f64();
        Ok((cycles()? - first) as f64 / elapsed)
    }

    /// The server is the package's, and the module in it is the one under test.
    fn check_identity(&self, server: &Server) -> Result<()> {
        let executable = format!("/proc/{}/exe", server.pid());
        let stock = self.lab.stock(&self.id.server)?;
        ensure!(
            sha256(Path::new(&executable))? == stock.sha256,
            "the server is not the executable of {}",
            stock.version
        );
        let Some(module) = &server.settings().module else {
            return Ok(());
        };
        let name = module.file_name().context("a module without a name")?;
        let mapped = server.mapped(&name.to_string_lossy())?;
        ensure!(!mapped.is_empty(), "the module is not mapped into the server");
        for file in mapped {
            ensure!(
                sha256(&file)? == sha256(module)?,
                "{} in the server is not the module under test",
                file.display()
            );
        }
        Ok(())
    }

    /// What has to hold at the end of every cell whose server is still there.
    fn check_server(&mut self) -> Result<()> {
        let server = self.server.as_mut().expect("checked by the caller");
        ensure!(server.is_running()?, "the server has ended");
        no_crash(server)?;
        if server.settings().module.is_none() {
            return Ok(());
        }
        // A client may have read a reply before the thread that wrote it has counted it.
        let deadline = Instant::now() + Duration::from_secs(2);
        let info = loop {
            let info = self.info()?;
            let moved = Traffic {
                received: info.number("rdma_bytes_received")?,
                sent: info.number("rdma_bytes_sent")?,
            };
            if moved.received >= self.claimed.received && moved.sent >= self.claimed.sent {
                break info;
            }
            ensure!(
                Instant::now() < deadline,
                "the case claims {:?} over RDMA, the server counted {moved:?}",
                self.claimed
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        let nudges = info.number("rdma_watchdog_nudges")?;
        ensure!(
            nudges == self.nudges,
            "the watchdog had to nudge {nudges} connections, where {} were to be",
            self.nudges
        );
        let by_io = info.sum(&["rdma_reads_io", "rdma_writes_io"])?;
        match self.has_io_threads() {
            // A case without traffic has nothing for them to do.
            true => ensure!(
                by_io > 0 || self.claimed.received == 0,
                "the I/O threads did no reads and no writes"
            ),
            false => ensure!(by_io == 0, "I/O threads worked, and there should be none"),
        }
        Ok(())
    }
}

/// Makes sure that a server's log reports no crash.
pub fn no_crash(server: &Server) -> Result<()> {
    match server.crash_report()? {
        Some(report) => bail!("the server's log reports a crash:\n{report}"),
        None => Ok(()),
    }
}
