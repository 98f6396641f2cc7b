// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma exporter`: what a server tells of its RDMA side, for Prometheus.

mod exposition;
mod table;

use crate::http::{self, Answer, Request};
use crate::monitor::{Access, Failure, Monitor};
use anyhow::{Context, Result, ensure};
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Offers what a server tells of its RDMA side to Prometheus.
///
/// The server is asked anew at each scrape (INFO rdma and RDMA.CLIENTS). Where it can't be read,
/// the page is there all the same and says valkey_rdma_up 0, with the reason.
///
/// Who asks needs +@rdma and +info: ACL SETUSER watcher on >secret +@rdma +info
#[derive(clap::Args)]
pub struct Arguments {
    /// The server; its port is 6379 unless given.
    #[arg(long, value_name = "HOST[:PORT]", default_value = "127.0.0.1", env = "VALKEY_SERVER")]
    server: String,
    #[command(flatten)]
    access: Access,
    /// Where to be scraped.
    #[arg(
        long,
        visible_alias = "web.listen-address",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:9122"
    )]
    listen: SocketAddr,
    /// The page that has the metrics.
    #[arg(
        long,
        visible_alias = "web.telemetry-path",
        value_name = "PATH",
        default_value = "/metrics"
    )]
    path: String,
    /// Series of single clients as well, of so many at most: those that are connected longest.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    client_series: usize,
    /// Does not ask RDMA.CLIENTS, whose answer is of half a kilobyte for each client.
    #[arg(long, conflicts_with = "client_series")]
    no_clients: bool,
    /// Prints the page once, and ends: with 0 if the server could be read.
    #[arg(long)]
    once: bool,
    /// Prints which field of INFO rdma is which metric, and ends.
    #[arg(long)]
    list: bool,
}

/// What is left of who asks' time when the answer is sent.
const MARGIN: Duration = Duration::from_millis(500);

/// What scrapes need.
struct Exporter {
    monitor: Monitor,
    path: String,
    client_series: usize,
    /// What was last said of the server on standard error.
    said: Mutex<Option<String>>,
}

/// Offers the metrics until it is ended; or prints them. `Ok(false)` if they were to be printed
/// and the server could not be read.
///
/// # Errors
/// If the address can't be listened at, or an argument can't be.
pub fn run(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        std::io::stdout().write_all(table::listing().as_bytes())?;
        return Ok(true);
    }
    ensure!(
        arguments.path.starts_with('/') && arguments.path != "/",
        "--path {}: a path such as /metrics",
        arguments.path
    );
    let exporter = Exporter {
        monitor: Monitor::new(&arguments.server, &arguments.access, !arguments.no_clients)?,
        path: arguments.path.clone(),
        client_series: arguments.client_series,
        said: Mutex::new(None),
    };
    if arguments.once {
        let (text, works) = exporter.page(None);
        std::io::stdout().write_all(text.as_bytes())?;
        return Ok(works);
    }
    let listener = TcpListener::bind(arguments.listen)
        .with_context(|| format!("cannot listen at {}", arguments.listen))?;
    eprintln!(
        "valkey-rdma: http://{}{} has the metrics of {}, asked over {}",
        listener.local_addr()?,
        arguments.path,
        arguments.server,
        exporter.monitor.carrier()
    );
    http::serve(&listener, move |request| exporter.answer(request))
}

impl Exporter {
    fn answer(&self, request: &Request) -> Answer {
        match request.path.as_str() {
            path if path == self.path => Answer {
                status: "200 OK",
                kind: "text/plain; version=0.0.4; charset=utf-8",
                body: self.page(request.patience).0,
            },
            "/" => Answer {
                status: "200 OK",
                kind: "text/html; charset=utf-8",
                body: format!(
                    "<!doctype html><title>valkey-rdma exporter</title>\n\
                     <h1>valkey-rdma exporter</h1>\n<p><a href=\"{0}\">{0}</a>\n",
                    escaped(&self.path)
                ),
            },
            _ => Answer::plain("404 Not Found", &format!("the metrics are at {}", self.path)),
        }
    }

    /// Reads the server. The page, and whether the server could be read.
    fn page(&self, patience: Option<Duration>) -> (String, bool) {
        let began = Instant::now();
        let within = patience.map(|patience| match patience > 2 * MARGIN {
            true => patience - MARGIN,
            false => patience / 2,
        });
        let outcome = self.monitor.read(within);
        self.say(outcome.as_ref().err());
        let text = exposition::write(&outcome, began.elapsed(), self.client_series);
        (text, outcome.is_ok())
    }

    /// One line for each change, so that a server that is away for long fills no log.
    fn say(&self, failure: Option<&Failure>) {
        let text = failure.map(ToString::to_string);
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *said == text {
            return;
        }
        match &text {
            Some(text) => eprintln!("valkey-rdma: {text}"),
            None => eprintln!("valkey-rdma: {} is read again", self.monitor.address()),
        }
        *said = text;
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('"', "&quot;")
}
