// SPDX-License-Identifier: BSD-3-Clause
//! What `scripts/accept.sh` asks of a server: each call is one step of the acceptance run,
//! prints what it found as one line, and fails if the server did not do as it has to.
//!
//! Without a step it lists them. `SERVER` is ADDRESS:PORT, of RDMA and TCP alike; the password
//! is taken from the environment, `ACCEPT_PASSWORD`. Times are figures for a person to judge.
//! One is judged here: whether the server's receiver-not-ready timer is the long one.

use std::error::Error;
use std::io::{Read, Write, stdin, stdout};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use client::resp::Stream;
use client::{Client, Value, pattern, rdma, tcp};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;
type Rdma = Client<rdma::Connection>;
type Tcp = Client<tcp::Connection>;

const USAGE: &str = "\
acceptance STEP SERVER …
  tcp SERVER [-x] WORD…               one command; -x takes its last word from stdin
  rdma SERVER [-x] WORD…              the same over RDMA
  lengths SERVER LONGEST              values of many lengths there and back, compared
  burst SERVER COUNT                  separate requests to a server that sleeps
  idle SERVER NAME                    a client that is idle until stdin has a line, then asks
  vanish SERVER NAME                  one that falls silent, until stdin has a line
  crowd SERVER COUNT                  clients that are idle until stdin has a line, then ask
  storm SERVER ROUNDS COUNT           clients that come, ask and go, COUNT at a time
  load rdma|tcp SERVER CLIENTS BYTES PIPELINE SECONDS";

/// Longest wait for a reply, or for connecting: a server may fork, or be told to sleep.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What the receiver-not-ready timer is unless somebody shortens it: code 0 of the
/// InfiniBand specification, 9.7.5.2.8.
const LONG_TIMER: Duration = Duration::from_micros(655_360);
/// The sleep of a server, and what of it is over before requests are sent. What is left is
/// one long timer and a little, so that the next one would end well after the sleep.
const SLEEP: &str = "1.1";
const ASLEEP: Duration = Duration::from_millis(350);
/// Clients up to this number have a window of 1 MiB each, as libvalkey's have; more have less.
const FEW: usize = 50;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match step(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn step(words: &[&str]) -> Result<()> {
    match *words {
        ["tcp", server, ref command @ ..] if !command.is_empty() => {
            ask(tcp_client(server.parse()?)?, command)
        }
        ["rdma", server, ref command @ ..] if !command.is_empty() => {
            ask(rdma_client(server.parse()?, 1)?, command)
        }
        ["lengths", server, longest] => lengths(server.parse()?, longest.parse()?),
        ["burst", server, count] => burst(server.parse()?, count.parse()?),
        ["idle", server, name] => idle(server.parse()?, name),
        ["vanish", server, name] => vanish(server.parse()?, name),
        ["crowd", server, count] => crowd(server.parse()?, count.parse()?),
        ["storm", server, rounds, count] => storm(server.parse()?, rounds.parse()?, count.parse()?),
        ["load", fabric, server, clients, bytes, pipeline, seconds] => {
            let load = Load {
                server: server.parse()?,
                clients: clients.parse()?,
                value: pattern::value(1, bytes.parse()?),
                pipeline: pipeline.parse()?,
                time: Duration::from_secs_f64(seconds.parse()?),
            };
            match fabric {
                "rdma" => load.run(|| rdma_client(load.server, load.clients)),
                "tcp" => load.run(|| tcp_client(load.server)),
                _ => Err(USAGE.into()),
            }
        }
        _ => Err(USAGE.into()),
    }
}

// --- connections ---------------------------------------------------------------

/// One of so many clients.
fn rdma_client(server: SocketAddr, of: usize) -> Result<Rdma> {
    let window = if of > FEW { 64 * 1024 } else { 1024 * 1024 };
    let options = rdma::Options { window, timeout: TIMEOUT, ..rdma::Options::default() };
    admitted(rdma::Connection::client(server, &options, TIMEOUT)?)
}

fn tcp_client(server: SocketAddr) -> Result<Tcp> {
    admitted(tcp::Connection::client(server, TIMEOUT)?)
}

fn admitted<S: Stream>(mut client: Client<S>) -> Result<Client<S>> {
    if let Ok(password) = std::env::var("ACCEPT_PASSWORD") {
        expect(client.command(&[b"AUTH", password.as_bytes()])?, b"OK")?;
    }
    Ok(client)
}

/// An error unless the reply is that string.
fn expect(reply: Value, wanted: &[u8]) -> Result<()> {
    match reply.bytes() {
        Some(bytes) if bytes == wanted => Ok(()),
        _ => {
            let reply: String = reply.text().chars().take(80).collect();
            Err(format!("another reply than was to come: {reply}").into())
        }
    }
}

fn ping<S: Stream>(client: &mut Client<S>) -> Result<()> {
    expect(client.words("PING")?, b"PONG")
}

/// Tells who waits for this process, and waits until they have done their part.
fn until_told(text: &str) -> Result<()> {
    println!("{text}");
    stdout().flush()?;
    stdin().read_line(&mut String::new())?;
    Ok(())
}

// --- steps -----------------------------------------------------------------------

fn ask<S: Stream>(mut client: Client<S>, command: &[&str]) -> Result<()> {
    let mut input = Vec::new();
    let mut words: Vec<&[u8]> = command.iter().map(|word| word.as_bytes()).collect();
    if words[0] == b"-x" {
        stdin().read_to_end(&mut input)?;
        words.remove(0);
        words.push(&input);
    }
    let reply = client.command(&words)?;
    if reply.is_error() {
        return Err(reply.text().into());
    }
    print(&reply, 0)
}

/// A string as it is; elements on lines of their own, indented by their depth.
fn print(value: &Value, depth: usize) -> Result<()> {
    match value {
        Value::Array(elements) => elements.iter().try_for_each(|e| print(e, depth + 1))?,
        Value::Bulk(bytes) if depth == 0 => stdout().write_all(bytes)?,
        other => println!("{:width$}{other}", "", width = 2 * depth.saturating_sub(1)),
    }
    Ok(())
}

/// Every length about the limits of inline data, which devices have from 32 to some hundreds of
/// bytes, and those about the sizes of windows and regions.
fn lengths(server: SocketAddr, longest: usize) -> Result<()> {
    let edges = [256, 512, 1024, 4096, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];
    let around = edges.iter().flat_map(|edge| edge - 1..=edge + 1);
    let all = (1..=300).chain(around).chain([5_000_000, 32 << 20]).filter(|n| *n <= longest);
    let (mut rdma, mut tcp) = (rdma_client(server, 1)?, tcp_client(server)?);
    let (mut count, mut wrong) = (0, Vec::new());
    for length in all {
        let value = pattern::value(length as u64, length);
        expect(rdma.command(&[b"SET", b"accept:length", &value])?, b"OK")?;
        let by_rdma = rdma.command(&[b"GET", b"accept:length"]);
        let by_rdma = by_rdma.map_err(|error| format!("a reply with {length} bytes: {error}"))?;
        let by_tcp = tcp.command(&[b"GET", b"accept:length"])?;
        if by_rdma.bytes() != Some(&value) || by_tcp.bytes() != Some(&value) {
            wrong.push(length);
        }
        count += 1;
    }
    rdma.words("DEL accept:length")?;
    if !wrong.is_empty() {
        return Err(format!("of {count} lengths these came back changed: {wrong:?}").into());
    }
    println!("{count} lengths up to {longest} bytes, there and back and compared with TCP");
    Ok(())
}

/// More writes in flight than the server has receives for, while it sleeps.
fn burst(server: SocketAddr, count: usize) -> Result<()> {
    let (mut client, mut other) = (rdma_client(server, 1)?, tcp_client(server)?);
    for _ in 0..5 {
        ping(&mut client)?;
        let asked = Instant::now();
        let sleeper = thread::spawn(move || {
            let reply = other.words(&format!("DEBUG SLEEP {SLEEP}"))?;
            let awake = Instant::now();
            expect(reply, b"OK").map(|()| (awake, other))
        });
        thread::sleep(ASLEEP.saturating_sub(asked.elapsed()));
        let sent = Instant::now();
        for number in 0..count {
            client.request(&[b"ECHO", number.to_string().as_bytes()])?;
        }
        let written = sent.elapsed();
        for number in 0..count {
            let reply = client.reply().map_err(|error| {
                format!(
                    "{error} at reply {number} of {count}: has this device no receiver-not-ready?"
                )
            })?;
            expect(reply, number.to_string().as_bytes())?;
        }
        let replied = Instant::now();
        let (awake, again) = sleeper.join().map_err(|_| "the sleeper panicked")??;
        other = again;
        // With the long timer the device tries again at multiples of it, so then.
        let asleep = awake.saturating_duration_since(sent);
        let tries = (asleep.as_micros() / LONG_TIMER.as_micros()) as u32 + 1;
        let long = (LONG_TIMER * tries).saturating_sub(asleep);
        let took = replied.saturating_duration_since(awake);
        let text = format!(
            "{count} separate requests written in {} ms, all replies {} ms after the server woke up",
            written.as_millis(),
            took.as_millis()
        );
        // Only one receive too few: what more requests take is a matter of processors, too.
        if count > 65 {
            println!("{text}");
            return Ok(());
        }
        if took < long / 2 {
            println!("{text}; a timer of 655 ms would have made it {}", long.as_millis());
            return Ok(());
        }
        // A machine that was busy for a moment is asked once more; a long timer is long each time.
        eprintln!("{text}; with a timer of 655 ms it had been {}", long.as_millis());
    }
    Err("the receiver-not-ready timer is 655 ms, in five tries of five".into())
}

fn idle(server: SocketAddr, name: &str) -> Result<()> {
    let mut client = rdma_client(server, 1)?;
    expect(client.command(&[b"CLIENT", b"SETNAME", name.as_bytes()])?, b"OK")?;
    until_told("ready")?;
    ping(&mut client)
}

fn vanish(server: SocketAddr, name: &str) -> Result<()> {
    let mut client = rdma_client(server, 1)?;
    expect(client.command(&[b"CLIENT", b"SETNAME", name.as_bytes()])?, b"OK")?;
    client.stream().vanish();
    until_told("ready")
}

fn crowd(server: SocketAddr, count: usize) -> Result<()> {
    let mut clients = (0..count).map(|_| rdma_client(server, count)).collect::<Result<Vec<_>>>()?;
    clients.iter_mut().try_for_each(ping)?;
    until_told("ready")?;
    clients.iter_mut().try_for_each(ping)?;
    println!("{count} clients were answered when they came, and after they were idle");
    Ok(())
}

fn storm(server: SocketAddr, rounds: usize, count: usize) -> Result<()> {
    let start = Instant::now();
    for _ in 0..rounds {
        let mut clients =
            (0..count).map(|_| rdma_client(server, FEW + 1)).collect::<Result<Vec<_>>>()?;
        clients.iter_mut().try_for_each(ping)?;
        clients.into_iter().try_for_each(|client| client.into_stream().disconnect(TIMEOUT))?;
    }
    println!("{}", start.elapsed().as_micros() / (rounds * count) as u128);
    Ok(())
}

// --- load ------------------------------------------------------------------------

struct Load {
    server: SocketAddr,
    clients: usize,
    value: Vec<u8>,
    pipeline: usize,
    time: Duration,
}

impl Load {
    /// SET and then GET, each for the whole time, by several threads which have several clients.
    fn run<S: Stream + Send>(&self, open: impl Fn() -> Result<Client<S>> + Sync) -> Result<()> {
        let threads = self.clients.min(4);
        let start = Barrier::new(threads);
        let totals = thread::scope(|scope| {
            let worker = |number: usize| {
                let (open, start) = (&open, &start);
                scope.spawn(move || {
                    let key = format!("accept:load:{number}");
                    let own = (number..self.clients).step_by(threads);
                    // Who fails comes to the barriers as well, or the others wait for ever.
                    let clients = own.map(|_| open()).collect::<Result<Vec<_>>>();
                    start.wait();
                    let set = clients.and_then(|mut clients| {
                        let set = [b"SET", key.as_bytes(), &self.value];
                        self.phase(&mut clients, &set).map(|rate| (clients, rate))
                    });
                    start.wait();
                    let (mut clients, set) = set?;
                    let get = self.phase(&mut clients, &[b"GET", key.as_bytes()])?;
                    expect(clients[0].command(&[b"GET", key.as_bytes()])?, &self.value)?;
                    Ok((set, get))
                })
            };
            let workers: Vec<_> = (0..threads).map(worker).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().map_err(|_| "a thread of the load panicked")?)
                .collect::<Result<Vec<_>>>()
        })?;
        let set: f64 = totals.iter().map(|(set, _)| set).sum();
        let get: f64 = totals.iter().map(|(_, get)| get).sum();
        println!("{set:.0} SET/s {get:.0} GET/s");
        Ok(())
    }

    /// Requests per second: all clients have theirs on the way, then each gets its replies.
    fn phase<S: Stream>(&self, clients: &mut [Client<S>], command: &[&[u8]]) -> Result<f64> {
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed() < self.time {
            for client in &mut *clients {
                (0..self.pipeline).try_for_each(|_| client.request(command))?;
            }
            for client in &mut *clients {
                for _ in 0..self.pipeline {
                    let reply = client.reply()?;
                    if reply.is_error() || reply == Value::Null {
                        return Err(reply.text().into());
                    }
                    done += 1;
                }
            }
        }
        Ok(f64::from(done) / start.elapsed().as_secs_f64())
    }
}
