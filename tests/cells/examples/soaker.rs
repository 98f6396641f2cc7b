// SPDX-License-Identifier: BSD-3-Clause
//! A crew of RDMA clients on a fabric that may fail at any moment: they write values of 1 B
//! to 10 MB, read them back, compare every byte, leave in every way, and come again.
//!
//! `soaker ADDRESS SEED MILLISECONDS CLIENTS`, with the faults of this side in
//! `SOFTRDMA_FAULTS`. A connection may end with an error at any step, for that is what faults
//! do. What it may not do is stand still while something is due, deliver a wrong byte, or break
//! the protocol: then this program fails and says which client saw what. Otherwise it prints
//! one line, a count of each of [`Tally::NAMES`].

use std::fmt;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use client::resp::{Stream, encode};
use client::{Error, pattern, rdma};
use fastrand::Rng;

/// A connection on which something is due and nothing happens for so long is stuck.
const STUCK: Duration = Duration::from_secs(5);
/// The longest value.
const LONGEST: f64 = 10e6;
/// Bytes of values after which a batch of commands ends.
const BATCH: usize = 3_000_000;
/// Keys of a connection.
const KEYS: usize = 3;

fn main() -> ExitCode {
    match run() {
        Ok(tally) => {
            println!("{}", tally.0.map(|count| count.to_string()).join(" "));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Tally> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, seed, milliseconds, clients] = &arguments[..] else {
        bail!("soaker ADDRESS SEED MILLISECONDS CLIENTS");
    };
    let address: SocketAddr = address.parse()?;
    let seed: u64 = seed.parse()?;
    let until = Instant::now() + Duration::from_millis(milliseconds.parse()?);
    let crew: Vec<_> = (0..clients.parse::<u64>()?)
        .map(|number| {
            std::thread::spawn(move || {
                let name = format!("{seed}-{number}");
                let rng = Rng::with_seed(seed ^ (number << 48));
                Client { address, rng, until, name: name.clone(), tally: Tally::default() }
                    .work()
                    .with_context(|| format!("client {name}"))
            })
        })
        .collect();
    let mut total = Tally::default();
    // The first that failed speaks for all.
    for client in crew {
        let tally = client.join().map_err(|_| anyhow!("a client panicked"))??;
        total.0.iter_mut().zip(tally.0).for_each(|(sum, count)| *sum += count);
    }
    Ok(total)
}

/// What a client did and met.
#[derive(Clone, Copy, Default)]
struct Tally([u64; 5]);

impl Tally {
    /// Connections, those that could not be opened, those that ended by an error; replies,
    /// and bytes of them, that were right.
    const NAMES: [&str; 5] = ["connections", "refused", "lost", "replies", "bytes"];

    fn add(&mut self, name: &str, count: u64) {
        let at = Self::NAMES.iter().position(|known| *known == name).expect("a known name");
        self.0[at] += count;
    }
}

/// The value of a key: its seed and length, or none.
type Content = Option<(u64, usize)>;

/// One client, connection after connection.
struct Client {
    address: SocketAddr,
    rng: Rng,
    until: Instant,
    name: String,
    tally: Tally,
}

impl Client {
    fn work(mut self) -> Result<Tally> {
        // Keys of the connection before, each with what may stand there.
        let mut left: Vec<(String, Vec<Content>)> = Vec::new();
        for number in 0.. {
            if Instant::now() >= self.until {
                break;
            }
            let what = format!("connection {number}");
            let options = rdma::Options {
                window: *self.rng.choice(&[1 << 20, 1 << 20, 100_003, 4096]).expect("some"),
                timeout: STUCK,
                ..rdma::Options::default()
            };
            let stream = match rdma::Connection::open(self.address, &options) {
                Ok(stream) => stream,
                Err(error) => {
                    tolerate(error.into()).context(what)?;
                    self.tally.add("refused", 1);
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            self.tally.add("connections", 1);
            let mut visit = Visit {
                stream,
                until: self.until,
                inbox: Vec::new(),
                keys: (0..KEYS).map(|key| format!("{}-{number}-{key}", self.name)).collect(),
                contents: vec![vec![None]; KEYS],
                most: (options.window as usize * 50).min(LONGEST as usize),
            };
            let ended = visit.run(&mut self, &left).and_then(|farewell| match farewell {
                Farewell::InOrder => Ok(visit.stream.disconnect(STUCK).context("disconnecting")?),
                Farewell::Abrupt => Ok(()),
            });
            left = visit.keys.into_iter().zip(visit.contents).collect();
            match ended {
                Err(error) if error.is::<TimeIsUp>() => break,
                Err(error) => {
                    tolerate(error).context(what)?;
                    self.tally.add("lost", 1);
                }
                Ok(()) => {}
            }
        }
        Ok(self.tally)
    }
}

/// The shift is over in the middle of work that goes on slowly.
#[derive(Debug)]
struct TimeIsUp;

impl std::error::Error for TimeIsUp {}

impl fmt::Display for TimeIsUp {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("the time is up")
    }
}

/// Passes over what a fault may cause.
fn tolerate(error: anyhow::Error) -> Result<()> {
    match error.downcast_ref::<Error>() {
        Some(Error::TimedOut(_) | Error::Protocol(_)) | None => Err(error),
        Some(_) => Ok(()),
    }
}

/// The reply that a command is to have.
enum Due {
    /// `OK` for a value that then stands at this key.
    Stored(usize),
    /// What these keys hold, in one reply.
    Contents(Vec<usize>),
    /// `PONG`.
    Pong,
}

/// How a connection is to be left.
enum Farewell {
    InOrder,
    Abrupt,
}

/// One connection and what is known of its keys.
struct Visit {
    stream: rdma::Connection,
    until: Instant,
    inbox: Vec<u8>,
    keys: Vec<String>,
    /// What may stand at each key: the value that was acknowledged last, and those that were
    /// sent after it, in their order.
    contents: Vec<Vec<Content>>,
    /// The longest value that its window lets through in reasonable time.
    most: usize,
}

impl Visit {
    fn run(&mut self, client: &mut Client, left: &[(String, Vec<Content>)]) -> Result<Farewell> {
        for (key, contents) in left {
            self.request(&mut client.rng, &[b"GET", key.as_bytes()])?;
            let replies = contents.iter().map(|&content| bulk(content)).collect();
            self.expect(client, replies).with_context(|| format!("GET {key} by a successor"))?;
            self.request(&mut client.rng, &[b"DEL", key.as_bytes()])?;
            self.expect(client, vec![b":0\r\n".into(), b":1\r\n".into()]).context("DEL")?;
        }
        for _ in 0..client.rng.u32(1..20) {
            self.batch(client)?;
            if client.rng.u32(0..8) == 0 {
                std::thread::sleep(Duration::from_millis(client.rng.u64(0..800)));
            }
        }
        self.leave(client)
    }

    /// Sends some commands in one go and checks their replies.
    fn batch(&mut self, client: &mut Client) -> Result<()> {
        let mut request = Vec::new();
        let mut due = Vec::new();
        let mut bytes = 0;
        for _ in 0..client.rng.usize(1..8) {
            let key = client.rng.usize(0..KEYS);
            match client.rng.u32(0..8) {
                0..3 => {
                    let length = (LONGEST.powf(client.rng.f64()) as usize).min(self.most);
                    bytes += length;
                    let seed = client.rng.u64(..);
                    self.contents[key].push(Some((seed, length)));
                    let value = pattern::value(seed, length);
                    encode(&mut request, &[b"SET", self.keys[key].as_bytes(), &value]);
                    due.push(Due::Stored(key));
                }
                3..6 => {
                    bytes += self.length(key);
                    encode(&mut request, &[b"GET", self.keys[key].as_bytes()]);
                    due.push(Due::Contents(vec![key]));
                }
                6 if (0..KEYS).map(|key| self.length(key)).sum::<usize>() < BATCH => {
                    let mut words = vec![&b"MGET"[..]];
                    words.extend(self.keys.iter().map(String::as_bytes));
                    encode(&mut request, &words);
                    due.push(Due::Contents((0..KEYS).collect()));
                }
                _ => {
                    encode(&mut request, &[b"PING"]);
                    due.push(Due::Pong);
                }
            }
            if bytes > BATCH {
                break;
            }
        }
        // What a key holds when its turn comes: these contents are in the order of the SETs.
        let mut stored = vec![0; KEYS];
        self.send(&mut client.rng, &request)?;
        if client.rng.u32(0..10) == 0 {
            // The replies are there, and nobody polls.
            std::thread::sleep(Duration::from_millis(client.rng.u64(0..500)));
        }
        for (number, due) in due.into_iter().enumerate() {
            let (reply, what) = match &due {
                Due::Stored(_) => (b"+OK\r\n".to_vec(), "SET"),
                Due::Pong => (b"+PONG\r\n".to_vec(), "PING"),
                Due::Contents(keys) => {
                    let mut reply = match keys.len() {
                        1 => Vec::new(),
                        many => format!("*{many}\r\n").into_bytes(),
                    };
                    for &key in keys {
                        reply.extend(bulk(self.contents[key][stored[key]]));
                    }
                    (reply, "GET")
                }
            };
            self.expect(client, vec![reply])
                .with_context(|| format!("command {number} of a batch, {what}"))?;
            if let Due::Stored(key) = due {
                stored[key] += 1;
            }
        }
        for (contents, stored) in self.contents.iter_mut().zip(stored) {
            contents.drain(..stored);
        }
        Ok(())
    }

    fn length(&self, key: usize) -> usize {
        self.contents[key].last().copied().flatten().map_or(0, |(_, length)| length)
    }

    /// Leaves: by QUIT, in order, in the middle of a request or of a reply, or at once.
    fn leave(&mut self, client: &mut Client) -> Result<Farewell> {
        match client.rng.u32(0..5) {
            0 => {
                self.request(&mut client.rng, &[b"QUIT"])?;
                self.expect(client, vec![b"+OK\r\n".into()]).context("QUIT")?;
                self.stream.wait_end(Instant::now() + STUCK).context("after QUIT")?;
            }
            1 => return Ok(Farewell::InOrder),
            2 => self.send(&mut client.rng, b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$1000000\r\nand")?,
            3 => {
                let key = self.keys[0].clone();
                self.request(&mut client.rng, &[b"GET", key.as_bytes()])?;
            }
            _ => {}
        }
        Ok(Farewell::Abrupt)
    }

    fn request(&mut self, rng: &mut Rng, words: &[&[u8]]) -> Result<()> {
        let mut request = Vec::new();
        encode(&mut request, words);
        self.send(rng, &request)
    }

    /// Sends in pieces of any size; each has to go in time.
    fn send(&mut self, rng: &mut Rng, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            ensure!(Instant::now() < self.until, TimeIsUp);
            let piece = bytes.len().min(2_f64.powf(rng.f64() * 20.0) as usize + 1);
            let piece = if rng.bool() { bytes.len().min(200_000) } else { piece };
            let (now, later) = bytes.split_at(piece);
            self.stream.send(now, Instant::now() + STUCK).context("sending")?;
            bytes = later;
        }
        Ok(())
    }

    /// Reads on until it is clear which of `allowed` the reply is; bytes have to come in time.
    fn expect(&mut self, client: &mut Client, mut allowed: Vec<Vec<u8>>) -> Result<()> {
        let mut compared = 0;
        loop {
            let there = self.inbox.len();
            let fits = |reply: &Vec<u8>| {
                let end = reply.len().min(there);
                compared >= end || reply[compared..end] == self.inbox[compared..end]
            };
            ensure!(
                allowed.iter().any(fits),
                "wrong bytes: {}",
                difference(&self.inbox, &allowed[0])
            );
            allowed.retain(fits);
            compared = there;
            if let Some(reply) = allowed.iter().find(|reply| reply.len() <= there) {
                client.tally.add("replies", 1);
                client.tally.add("bytes", reply.len() as u64);
                self.inbox.drain(..reply.len());
                return Ok(());
            }
            ensure!(Instant::now() < self.until, TimeIsUp);
            self.stream
                .receive(&mut self.inbox, Instant::now() + STUCK)
                .with_context(|| format!("after {there} bytes of a reply"))?;
        }
    }
}

/// The reply that carries a value.
fn bulk(content: Content) -> Vec<u8> {
    let Some((seed, length)) = content else { return b"$-1\r\n".into() };
    let mut reply = format!("${length}\r\n").into_bytes();
    reply.extend(pattern::value(seed, length));
    reply.extend(b"\r\n");
    reply
}

/// Where what came begins to differ from what was wanted, and how.
fn difference(came: &[u8], wanted: &[u8]) -> String {
    let at = came.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    let piece = |bytes: &[u8]| bytes[at..bytes.len().min(at + 40)].escape_ascii().to_string();
    format!(
        "'{}' instead of '{}' at {at} ({} bytes came, {} were wanted)",
        piece(came),
        piece(wanted),
        came.len(),
        wanted.len()
    )
}
