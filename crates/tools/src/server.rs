// SPDX-License-Identifier: BSD-3-Clause
//! A server to talk to: its address, who asks, and its answers.

use crate::reply::{self, Reply};
use anyhow::{Context, Result, bail, ensure};
use client::{Connection, Options};
use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The port of servers that say no other.
const PORT: u16 = 6379;

/// Who asks, and how long it may take.
#[derive(Clone, clap::Args)]
pub struct Login {
    /// Who asks, where the server wants a password.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// The password; better given by the environment, where `ps` does not show it.
    #[arg(long, env = "VALKEY_PASSWORD", hide_env_values = true)]
    password: Option<String>,
    /// Seconds that connecting, and each answer, may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    timeout: f64,
}

impl Login {
    /// Who asks with this name and password, if any.
    pub fn new(user: Option<String>, password: Option<String>, timeout: f64) -> Self {
        Self { user, password, timeout }
    }
}

/// A server, by an address of people's: `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
pub struct Server<'a> {
    /// The address, whose port is that of RDMA: 6379 unless it says another.
    pub address: &'a str,
    /// Who asks.
    pub login: &'a Login,
}

/// Bytes both ways, whatever carries them.
pub trait Stream: Read + Write {}

impl<T: Read + Write> Stream for T {}

/// A connection to a server that takes commands.
pub struct Session {
    stream: BufReader<Box<dyn Stream>>,
    /// What carries it, in words.
    pub carrier: String,
    /// How long connecting took.
    pub connect: Duration,
    /// When answers have to be there, if that was said.
    deadline: Option<Instant>,
}

impl Server<'_> {
    /// The addresses that the name stands for.
    ///
    /// # Errors
    /// If it stands for none.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>> {
        resolve(self.address)
    }

    fn timeout(&self) -> Result<Duration> {
        let timeout = Duration::try_from_secs_f64(self.login.timeout);
        let timeout = timeout.ok().filter(|timeout| !timeout.is_zero());
        timeout.with_context(|| format!("--timeout {}: not a time", self.login.timeout))
    }

    /// Connects over RDMA.
    ///
    /// # Errors
    /// Why not.
    pub fn over_rdma(&self) -> Result<Session> {
        let options = Options { timeout: self.timeout()?, ..Options::default() };
        let began = Instant::now();
        let connection = Connection::open(self.resolve()?.as_slice(), &options)?;
        let connect = began.elapsed();
        let carrier = format!("RDMA, {}", connection.device());
        self.session(Box::new(connection), carrier, connect)
    }

    /// Connects over TCP, to `port` unless it is that of RDMA.
    ///
    /// # Errors
    /// Why not.
    pub fn over_tcp(&self, port: Option<u16>) -> Result<Session> {
        let timeout = self.timeout()?;
        let mut last = None;
        for mut address in self.resolve()? {
            address.set_port(port.unwrap_or(address.port()));
            let began = Instant::now();
            match TcpStream::connect_timeout(&address, timeout) {
                Ok(stream) => {
                    let connect = began.elapsed();
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(timeout))?;
                    stream.set_write_timeout(Some(timeout))?;
                    return self.session(Box::new(stream), String::from("TCP"), connect);
                }
                Err(error) => last = Some((address, error)),
            }
        }
        let (address, error) = last.expect("an address at least");
        Err(error).with_context(|| format!("cannot connect to {address} over TCP"))
    }

    fn session(
        &self,
        stream: Box<dyn Stream>,
        carrier: String,
        connect: Duration,
    ) -> Result<Session> {
        let stream = BufReader::new(stream);
        let deadline = Some(Instant::now() + self.timeout()?);
        let mut session = Session { stream, carrier, connect, deadline };
        if let Some(password) = &self.login.password {
            let user = self.login.user.as_deref().unwrap_or("default");
            let words = [b"AUTH", user.as_bytes(), password.as_bytes()];
            session.ask(&words).context("AUTH")?;
        }
        session.deadline = None;
        Ok(session)
    }
}

/// The addresses that a name of people's stands for: `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
///
/// # Errors
/// If it stands for none.
pub fn resolve(name: &str) -> Result<Vec<SocketAddr>> {
    let with_port = format!("{name}:{PORT}");
    // A bare IPv6 address has colons and no port.
    let bare = name.parse().map(|ip| vec![SocketAddr::new(ip, PORT)]);
    let found = bare.or_else(|_| {
        let all = name.to_socket_addrs().or_else(|_| with_port.to_socket_addrs());
        all.map(Iterator::collect)
    });
    let found = found.with_context(|| format!("'{name}' is no address of a server"))?;
    ensure!(!found.is_empty(), "'{name}' stands for no address");
    Ok(found)
}

impl Session {
    /// The answer to a command, whose reply is a simple or a bulk string.
    ///
    /// # Errors
    /// The connection's, the server's, or that the answer is of another kind.
    pub fn ask(&mut self, words: &[&[u8]]) -> Result<Vec<u8>> {
        match self.reply(words)? {
            Reply::Text(bytes) => Ok(bytes),
            other => bail!("the server answers with {}", other.kind()),
        }
    }

    /// The answer to a command, of any kind but an error.
    ///
    /// # Errors
    /// The connection's, or the server's, which is a [`reply::Refused`].
    pub fn reply(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        self.stream.get_mut().write_all(&request)?;
        reply::read(&mut self.stream, self.deadline)
    }

    /// Answers that are not complete by then are given up, however much of them arrives; what
    /// the time-out says of each piece holds besides.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }
}
