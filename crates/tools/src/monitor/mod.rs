// SPDX-License-Identifier: BSD-3-Clause
//! What a server says of its RDMA side, read again and again: for `exporter` and `top`.

mod reading;

pub use reading::{Client, Info, WAITS, is_device};

use crate::reply::{Refused, Reply};
use crate::server::{Login, Server, Session};
use anyhow::{Context, Result, ensure};
use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Who asks, by which way, and how long it may take.
#[derive(Clone, clap::Args)]
pub struct Access {
    /// Who asks, where the server wants a password: a user with +@rdma and +info.
    #[arg(long, value_name = "NAME", env = "VALKEY_USER")]
    user: Option<String>,
    /// A file whose first line is the password. Without it, VALKEY_PASSWORD in the environment
    /// is the password.
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Asks over RDMA, at the port of RDMA, instead of TCP.
    #[arg(long)]
    rdma: bool,
    /// Seconds that connecting and all answers may take, together.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    timeout: f64,
}

/// Why a server could not be read, in classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No connection.
    Connect,
    /// It wants another user or password, or allows this one too little.
    Auth,
    /// It took too long.
    Timeout,
    /// The server has no RDMA module.
    NotLoaded,
    /// It answered something else, or ended the connection.
    Answer,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Connect, Self::Auth, Self::Timeout, Self::NotLoaded, Self::Answer];

    /// In one word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Auth => "auth",
            Self::Timeout => "timeout",
            Self::NotLoaded => "not_loaded",
            Self::Answer => "answer",
        }
    }
}

/// Why a server could not be read.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The class.
    pub reason: Reason,
    /// In full, in one line.
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    /// Sorts an error, which is of the class `otherwise` if it does not tell more.
    fn sort(error: &anyhow::Error, otherwise: Reason) -> Self {
        let refused = error.chain().find_map(|cause| cause.downcast_ref::<Refused>());
        let late = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
        let late = late
            .map(std::io::Error::kind)
            .any(|kind| matches!(kind, ErrorKind::TimedOut | ErrorKind::WouldBlock));
        let reason = match refused {
            Some(Refused(text)) => {
                let starts = |words: &[&str]| words.iter().any(|word| text.starts_with(word));
                match text {
                    _ if starts(&["NOAUTH", "WRONGPASS", "NOPERM", "ERR AUTH"]) => Reason::Auth,
                    _ if starts(&["ERR unknown command"]) => Reason::NotLoaded,
                    _ => Reason::Answer,
                }
            }
            None if late => Reason::Timeout,
            None => otherwise,
        };
        let text = format!("{error:#}").replace(['\r', '\n'], " ");
        Self { reason, text }
    }
}

/// What a server said at one time.
#[derive(Clone, Debug)]
pub struct Reading {
    /// `INFO rdma`.
    pub info: Info,
    /// `RDMA.CLIENTS`, if it was asked for.
    pub clients: Option<Vec<Client>>,
}

/// A server that is read again and again.
pub struct Monitor {
    address: String,
    login: Login,
    rdma: bool,
    timeout: Duration,
    clients: bool,
    /// Readings that were given up and still hang, in a name server as a rule.
    hanging: Arc<AtomicUsize>,
}

/// So many hang at most; then no further one is begun.
const HANGING: usize = 4;

impl Monitor {
    /// Reads the server of this address, with its clients or without.
    ///
    /// # Errors
    /// If the time is none, or there is no password where one was promised.
    pub fn new(address: &str, access: &Access, clients: bool) -> Result<Self> {
        let timeout = Duration::try_from_secs_f64(access.timeout).ok();
        let timeout = timeout.filter(|timeout| !timeout.is_zero());
        let timeout =
            timeout.with_context(|| format!("--timeout {}: not a time", access.timeout))?;
        let password = match &access.password_file {
            Some(path) => Some(password(path)?),
            // An empty variable is as good as none: that is how a unit's file leaves it out.
            None => std::env::var("VALKEY_PASSWORD").ok().filter(|password| !password.is_empty()),
        };
        Ok(Self {
            address: address.to_owned(),
            login: Login::new(access.user.clone(), password, access.timeout),
            rdma: access.rdma,
            timeout,
            clients,
            hanging: Arc::default(),
        })
    }

    /// The server's address, as it was given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What carries the questions.
    pub fn carrier(&self) -> &'static str {
        if self.rdma { "RDMA" } else { "TCP" }
    }

    /// Asks, on a connection of its own. It is back within the time-out or `within`, whichever
    /// is shorter, also where a name server or a device does not answer.
    ///
    /// # Errors
    /// Why the server could not be read.
    pub fn read(&self, within: Option<Duration>) -> Result<Reading, Failure> {
        let within = within.map_or(self.timeout, |within| within.min(self.timeout));
        let late = || Failure {
            reason: Reason::Timeout,
            text: format!("no answer from {} within {:.1} s", self.address, within.as_secs_f64()),
        };
        if self.hanging.load(Ordering::Relaxed) >= HANGING {
            return Err(late());
        }
        let (sender, receiver) = mpsc::channel();
        let (address, login) = (self.address.clone(), self.login.clone());
        let (rdma, clients) = (self.rdma, self.clients);
        let deadline = Instant::now() + within;
        let hanging = Arc::clone(&self.hanging);
        hanging.fetch_add(1, Ordering::Relaxed);
        std::thread::spawn(move || {
            let server = Server { address: &address, login: &login };
            let reading = read(&server, rdma, clients, deadline);
            hanging.fetch_sub(1, Ordering::Relaxed);
            // Nobody waits any more, if it took too long.
            let _ = sender.send(reading);
        });
        receiver.recv_timeout(within).unwrap_or_else(|_| Err(late()))
    }
}

/// The first line of a file.
fn password(path: &PathBuf) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("--password-file {}", path.display()))?;
    let line = text.lines().next().unwrap_or_default();
    ensure!(!line.is_empty(), "--password-file {}: its first line is empty", path.display());
    Ok(line.to_owned())
}

fn read(server: &Server, rdma: bool, clients: bool, deadline: Instant) -> Result<Reading, Failure> {
    let session = if rdma { server.over_rdma() } else { server.over_tcp(None) };
    let mut session = session.map_err(|error| Failure::sort(&error, Reason::Connect))?;
    session.set_deadline(deadline);
    let info = info(&mut session).map_err(|error| Failure::sort(&error, Reason::Answer))?;
    if info.text("version").is_none() {
        return Err(Failure {
            reason: Reason::NotLoaded,
            text: format!("{} has no module valkey-rdma: INFO rdma is empty", server.address),
        });
    }
    let clients = match clients {
        true => Some(list(&mut session).map_err(|error| Failure::sort(&error, Reason::Answer))?),
        false => None,
    };
    Ok(Reading { info, clients })
}

fn info(session: &mut Session) -> Result<Info> {
    let text = session.ask(&[b"INFO", b"rdma"]).context("INFO rdma")?;
    Ok(Info::parse(&String::from_utf8_lossy(&text)))
}

fn list(session: &mut Session) -> Result<Vec<Client>> {
    match session.reply(&[b"RDMA.CLIENTS"]).context("RDMA.CLIENTS")? {
        Reply::List(clients) => clients.into_iter().map(Client::parse).collect(),
        other => anyhow::bail!("RDMA.CLIENTS is answered with {}", other.kind()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Read as _, Write as _};
    use std::net::TcpListener;

    /// A server of which each byte comes in time, and the answer never.
    #[test]
    fn an_answer_that_trickles_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    while stream.write_all(b":").is_ok() {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                });
            }
        });
        let access = Access { user: None, password_file: None, rdma: false, timeout: 0.2 };
        let mut monitor = Monitor::new(&address, &access, false).unwrap();
        for attempt in 0..2 * HANGING {
            // The answer to AUTH is bounded as well.
            let password = (attempt % 2 == 1).then(|| String::from("secret"));
            monitor.login = Login::new(None, password, access.timeout);
            let began = Instant::now();
            let failure = monitor.read(None).unwrap_err();
            assert_eq!(failure.reason, Reason::Timeout, "{failure}");
            assert!(began.elapsed() < Duration::from_secs(10));
        }
        // None of them stays.
        let until = Instant::now() + Duration::from_secs(10);
        while monitor.hanging.load(Ordering::Relaxed) > 0 {
            assert!(Instant::now() < until, "readings hang");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn another_server_is_told_apart() {
        for (answer, reason) in [
            ("$0\r\n\r\n", Reason::NotLoaded),
            ("HTTP/1.1 400 Bad Request\r\n\r\n", Reason::Answer),
            ("", Reason::Answer),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut question = [0; 24];
                stream.read_exact(&mut question).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let access = Access { user: None, password_file: None, rdma: false, timeout: 5.0 };
            let failure = Monitor::new(&address, &access, false).unwrap().read(None).unwrap_err();
            assert_eq!(failure.reason, reason, "{failure}");
        }
    }

    #[test]
    fn failures_are_sorted() {
        let refused = |text: &str| anyhow::Error::new(Refused(text.to_owned())).context("AUTH");
        let sorted = |error| Failure::sort(&error, Reason::Connect).reason;
        for text in ["WRONGPASS x", "NOAUTH x", "NOPERM x", "ERR AUTH <password> called without"] {
            assert_eq!(sorted(refused(text)), Reason::Auth, "{text}");
        }
        assert_eq!(sorted(refused("ERR unknown command 'RDMA.CLIENTS'")), Reason::NotLoaded);
        assert_eq!(sorted(refused("DENIED protected mode")), Reason::Answer);
        let io = |kind| anyhow::Error::new(io::Error::from(kind)).context("somewhere");
        assert_eq!(sorted(io(ErrorKind::WouldBlock)), Reason::Timeout);
        assert_eq!(sorted(io(ErrorKind::ConnectionRefused)), Reason::Connect);
    }
}
