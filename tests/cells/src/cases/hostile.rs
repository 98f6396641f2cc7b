// SPDX-License-Identifier: BSD-3-Clause
//! Clients that do what the protocol forbids, or what it allows and nobody should do.
//!
//! Each attack runs while two well-behaved clients, one over RDMA and one over TCP, keep
//! pinging. Afterwards the server has to hold what it held before: memory, descriptors and
//! connections. What it says is exact too: an attack that ends a connection is counted once,
//! under the right reason, and one line of the log names the client and what it did; one that
//! does not is not held against the client.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use client::raw::{Options, Raw};
use client::resp::Stream;
use client::wire::{self, Window};
use client::{Client, pattern};

use super::basics::expect;
use super::upstream::Upstream;
use crate::cell::{Case, Cell};
use crate::info::Info;
use crate::process::Process;

pub const CASES: &[Case] = &[
    Case::new("hostile-messages", |cell| run(cell, MESSAGES))
        .with(|settings| settings.arguments.push("linger-time=2000".to_owned())),
    Case::new("hostile-immediates", |cell| run(cell, IMMEDIATES)),
    Case::new("hostile-windows", |cell| run(cell, WINDOWS)),
    Case::new("hostile-announcements", |cell| run(cell, ANNOUNCEMENTS)),
    Case::new("hostile-floods", |cell| run(cell, FLOODS)),
    Case::new("hostile-deaf", |cell| run(cell, DEAF)),
    Case::new("hostile-rights", rights),
    Case::new("hostile-handshakes", |cell| run(cell, HANDSHAKES))
        .with(|settings| settings.arguments.push("handshake-timeout=1500".to_owned())),
    Case::new("hostile-leaving", leaving),
    Case::new("hostile-upstream", upstream).unstarted(),
    Case::new("hostile-crowd", crowd).with(|settings| {
        settings.arguments.push(format!("max-handshakes={CROWD}"));
        settings.arguments.push("handshake-timeout=5000".to_owned());
    }),
    Case::new("limit-registered", registered).with(|settings| {
        settings.arguments.push(format!("max-registered-memory={LIMIT}"));
        settings.arguments.push("rx-size=64k".to_owned());
    }),
    Case::new("limit-keepalive", keepalive)
        .with(|settings| settings.arguments.push("keepalive-interval=300".to_owned())),
    Case::new("limit-linger", linger)
        .with(|settings| settings.arguments.push("linger-time=300".to_owned())),
];

pub(super) const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
pub(super) const PONG: &[u8] = b"+PONG\r\n";
/// Commands that do nothing and are not answered.
const NOTHING: &[u8] = &[b'\n'; 100];
/// The value `big`.
const BIG: usize = 4 << 20;
/// What each connection registers from the start, and the total that a case allows.
const NEED: usize = 32 << 10;
const LIMIT: usize = 36 * NEED;
const GET_BIG: &[u8] = b"*2\r\n$3\r\nGET\r\n$3\r\nbig\r\n";

/// Where an attack goes, and how long it may take.
pub(super) struct Target {
    address: SocketAddr,
    patience: Duration,
}

impl Target {
    pub(super) fn of(cell: &Cell) -> Self {
        Self { address: cell.server().rdma_address(), patience: cell.lab.patience() }
    }

    pub(super) fn soon(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// An established connection that has announced nothing.
    fn open(&self) -> Result<Raw> {
        self.open_with(&Options::default())
    }

    pub(super) fn open_with(&self, options: &Options) -> Result<Raw> {
        Ok(Raw::open(self.address, options, self.soon())?)
    }

    /// A connection that is the server's client, and has been answered.
    pub(super) fn join(&self) -> Result<(Raw, Inbox)> {
        let mut raw = self.open()?;
        raw.send(&raw.window().announcement())?;
        let mut inbox = self.inbox(&mut raw)?;
        self.ping(&mut raw, &mut inbox)?;
        Ok((raw, inbox))
    }

    pub(super) fn inbox(&self, raw: &mut Raw) -> Result<Inbox> {
        let window = raw.peer_window(self.soon())?;
        Ok(Inbox { window, used: 0, answered: 0 })
    }

    /// A PING that is answered into this side's memory, behind what came before.
    pub(super) fn ping(&self, raw: &mut Raw, inbox: &mut Inbox) -> Result<()> {
        inbox.say(raw, PING)?;
        self.reply(raw, inbox, PONG)
    }

    /// Waits for a reply behind those that came before.
    pub(super) fn reply(&self, raw: &mut Raw, inbox: &mut Inbox, wanted: &[u8]) -> Result<()> {
        raw.wait_announced((inbox.answered + wanted.len()) as u64, self.soon())?;
        let reply = raw.memory(inbox.answered, wanted.len());
        inbox.answered += wanted.len();
        ensure!(reply == wanted, "another reply: '{}'", String::from_utf8_lossy(&reply));
        Ok(())
    }
}

/// The server's window, and how far both sides have got.
pub(super) struct Inbox {
    window: Window,
    used: u32,
    answered: usize,
}

impl Inbox {
    /// Writes `bytes` behind what was written before, and announces them.
    pub(super) fn say(&mut self, raw: &mut Raw, bytes: &[u8]) -> Result<()> {
        self.claim(raw, bytes, bytes.len() as u32)
    }

    /// The same, announcing `count` bytes.
    pub(super) fn claim(&mut self, raw: &mut Raw, bytes: &[u8], count: u32) -> Result<()> {
        let address = self.window.address + u64::from(self.used);
        raw.write(address, self.window.rkey, bytes, Some(count))?;
        self.used = self.used.wrapping_add(count);
        Ok(())
    }

    /// What the server's window has left.
    pub(super) fn left(&self) -> u32 {
        self.window.length - self.used
    }
}

/// What has to become of an attacker.
#[derive(Clone, Copy, Debug)]
enum Verdict {
    /// The server ends the connection for a violation of the protocol, and says these words.
    Violation(&'static str),
    /// A work request fails and the connection with it; the server says these words.
    Failed(&'static str),
    /// The server waits for it only so long.
    TimedOut,
    /// It goes while the server waits for it: by the fabric's word a leaving or a failure.
    Withdrawn,
    /// Nothing: it goes when it wants to.
    Harmless,
}

/// One thing that a client should not do.
struct Attack {
    name: &'static str,
    verdict: Verdict,
    act: fn(&Target) -> Result<Raw>,
}

const fn attack(name: &'static str, verdict: Verdict, act: fn(&Target) -> Result<Raw>) -> Attack {
    Attack { name, verdict, act }
}

use Verdict::{Failed, Harmless, TimedOut, Violation, Withdrawn};

/// Sends a message before anything was announced.
fn early(target: &Target, message: &[u8]) -> Result<Raw> {
    let mut raw = target.open()?;
    raw.send(message)?;
    Ok(raw)
}

/// Sends a message in the middle of a conversation.
fn late(target: &Target, message: &[u8]) -> Result<Raw> {
    let (mut raw, _) = target.join()?;
    raw.send(message)?;
    Ok(raw)
}

pub(super) fn features(bits: u64) -> [u8; wire::CONTROL_LEN] {
    let mut message = wire::bare(wire::SET_CLIENT_FEATURE);
    message[24..].copy_from_slice(&bits.to_be_bytes());
    message
}

/// Messages of wrong lengths, opcodes and contents.
const MESSAGES: &[Attack] = &[
    attack("a message of no bytes", Violation("of 0 bytes"), |t| early(t, &[])),
    attack("a message of 1 byte", Violation("of 1 bytes"), |t| late(t, &[0])),
    attack("a message of 31 bytes", Violation("of 31 bytes"), |t| early(t, &[0; 31])),
    attack("another of 31 bytes", Violation("of 31 bytes"), |t| late(t, &[0; 31])),
    attack("a message of 33 bytes", Violation("more than 32 bytes"), |t| early(t, &[0; 33])),
    attack("a message of 100 KB", Violation("more than 32 bytes"), |t| late(t, &[3; 100_000])),
    attack("opcode 4", Violation("opcode 4"), |t| early(t, &wire::bare(4))),
    attack("opcode 65535", Violation("opcode 65535"), |t| late(t, &[0xff; 32])),
    attack("a feature that is none", Violation("feature"), |t| early(t, &features(1))),
    attack("all features", Violation("feature"), |t| late(t, &features(u64::MAX))),
    attack("opcode 4 when the server has closed", Violation("opcode 4"), |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, b"QUIT\r\n")?;
        t.reply(&mut raw, &mut inbox, b"+OK\r\n")?;
        raw.send(&wire::bare(4))?;
        Ok(raw)
    }),
    attack("no feature", Harmless, |t| {
        let (mut raw, mut inbox) = t.join()?;
        raw.send(&features(0))?;
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
    attack("a message with an immediate", Violation("unexpected operation"), |t| {
        let (mut raw, _) = t.join()?;
        raw.send_with(&wire::bare(wire::KEEPALIVE), 0)?;
        Ok(raw)
    }),
];

/// Immediates that exceed, wrap or lie.
const IMMEDIATES: &[Attack] = &[
    attack("one byte more than the window", Violation("immediate"), |t| {
        let (mut raw, mut inbox) = t.join()?;
        let count = inbox.left() + 1;
        inbox.claim(&mut raw, b"x", count)?;
        Ok(raw)
    }),
    attack("2^32-1 bytes", Violation("4294967295"), |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.claim(&mut raw, b"x", u32::MAX)?;
        Ok(raw)
    }),
    attack("2^32-1 bytes before anything was announced", Violation("4294967295"), |t| {
        let mut raw = t.open()?;
        let mut inbox = t.inbox(&mut raw)?;
        inbox.claim(&mut raw, b"x", u32::MAX)?;
        Ok(raw)
    }),
    attack("two that wrap to nothing", Violation("immediate"), |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, NOTHING)?;
        let (address, rkey) = (inbox.window.address, inbox.window.rkey);
        raw.write(address, rkey, b"x", Some(0_u32.wrapping_sub(inbox.used)))?;
        Ok(raw)
    }),
    attack("two halves of 2^32", Violation("2147483648"), |t| {
        let (mut raw, inbox) = t.join()?;
        for _ in 0..2 {
            raw.write(inbox.window.address, inbox.window.rkey, b"x", Some(1 << 31))?;
        }
        Ok(raw)
    }),
    attack("more than was written", Harmless, |t| {
        let (mut raw, mut inbox) = t.join()?;
        // What was never written is nobody's: a new window is all zeroes.
        let request = b"*2\r\n$4\r\nECHO\r\n$5000\r\n";
        let end = inbox.window.address + u64::from(inbox.used) + request.len() as u64 + 5000;
        raw.write(end, inbox.window.rkey, b"\r\n", None)?;
        inbox.claim(&mut raw, request, request.len() as u32 + 5002)?;
        let reply = [&b"$5000\r\n"[..], &[0; 5000], b"\r\n"].concat();
        t.reply(&mut raw, &mut inbox, &reply)?;
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
    attack("less than was written", Harmless, |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.claim(&mut raw, PING, 5)?;
        let (address, rkey) = (inbox.window.address, inbox.window.rkey);
        raw.write(address + u64::from(inbox.used), rkey, &[], Some(9))?;
        inbox.used += 9;
        t.reply(&mut raw, &mut inbox, PONG)?;
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
    attack("3,000 of no bytes", Harmless, |t| {
        let (mut raw, mut inbox) = t.join()?;
        for _ in 0..3000 {
            inbox.say(&mut raw, b"")?;
        }
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
    attack("3,000 of one byte", Harmless, |t| {
        let (mut raw, mut inbox) = t.join()?;
        for _ in 0..3000 {
            inbox.say(&mut raw, b"\n")?;
        }
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
];

/// Announces `window` and asks for a reply that goes there.
fn with_window(target: &Target, change: fn(&mut Window), request: &[u8]) -> Result<(Raw, Inbox)> {
    let mut raw = target.open()?;
    let mut window = raw.window();
    change(&mut window);
    raw.send(&window.announcement())?;
    let mut inbox = target.inbox(&mut raw)?;
    inbox.say(&mut raw, request)?;
    Ok((raw, inbox))
}

/// A window's number among those that are announced in turn, and by how much they differ.
const TURNS: [u32; 32] = {
    let mut turns = [0; 32];
    let mut n = 0;
    while n < 32 {
        turns[n] = n as u32 + 1;
        n += 1;
    }
    turns
};
const TURN: u32 = 32 << 10;

/// Announces windows of these lengths, each when the one before is full, and asks for
/// replies that fill them all.
fn in_turn(target: &Target, lengths: &[u32]) -> Result<Raw> {
    let mut raw = target.open()?;
    let window = |raw: &Raw, length: u32| Window { length, ..raw.window() }.announcement();
    raw.send(&window(&raw, lengths[0]))?;
    let mut inbox = target.inbox(&mut raw)?;
    let mut reply = format!("${BIG}\r\n").into_bytes();
    reply.extend(pattern::value(5, BIG));
    reply.extend(b"\r\n");
    let all: usize = lengths.iter().map(|length| *length as usize).sum();
    for _ in 0..all.div_ceil(reply.len()) {
        inbox.say(&mut raw, GET_BIG)?;
    }
    let mut stream = reply.iter().cycle();
    let mut filled = 0;
    for (at, length) in lengths.iter().map(|length| *length as usize).enumerate() {
        filled += length;
        raw.wait_announced(filled as u64, target.soon())?;
        let arrived = raw.memory(0, length);
        ensure!(arrived.iter().eq(stream.by_ref().take(length)), "other bytes in window {at}");
        if let Some(next) = lengths.get(at + 1) {
            raw.send(&window(&raw, *next))?;
        }
    }
    Ok(raw)
}

/// Windows that are none, or not the client's.
const WINDOWS: &[Attack] = &[
    attack("no bytes", Harmless, |t| {
        let (mut raw, _) = with_window(t, |window| window.length = 0, PING)?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("no bytes, and later some", Harmless, |t| {
        let (mut raw, mut inbox) = with_window(t, |window| window.length = 0, PING)?;
        raw.flush(t.soon())?;
        raw.send(&raw.window().announcement())?;
        t.reply(&mut raw, &mut inbox, PONG)?;
        Ok(raw)
    }),
    attack("no bytes, and a reply of 4 MB", Harmless, |t| {
        let (mut raw, _) = with_window(t, |window| window.length = 0, GET_BIG)?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("one byte at a time", Harmless, |t| {
        let (mut raw, _) = with_window(t, |window| window.length = 1, PING)?;
        for at in 0..PONG.len() {
            raw.wait_announced(at as u64 + 1, t.soon())?;
            ensure!(raw.memory(0, 1) == PONG[at..=at], "byte {at} of the reply");
            raw.send(&Window { length: 1, ..raw.window() }.announcement())?;
        }
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("2^32-1 bytes", Harmless, |t| {
        let (mut raw, mut inbox) = with_window(t, |window| window.length = u32::MAX, PING)?;
        t.reply(&mut raw, &mut inbox, PONG)?;
        Ok(raw)
    }),
    attack("2^32-1 bytes that are not there", Failed("remote access"), |t| {
        Ok(with_window(t, |window| window.length = u32::MAX, GET_BIG)?.0)
    }),
    attack("each larger than the one before", Harmless, |t| in_turn(t, &TURNS.map(|n| n * TURN))),
    attack("each smaller than the one before", Harmless, |t| {
        in_turn(t, &TURNS.map(|n| (33 - n) * TURN))
    }),
    attack("larger and smaller in turn", Harmless, |t| {
        in_turn(t, &TURNS.map(|n| if n % 2 == 0 { n * TURN } else { (33 - n) * TURN }))
    }),
    attack("an address that wraps", Violation("wraps"), |t| {
        let mut raw = t.open()?;
        let window = Window { address: u64::MAX - 5, length: 100, ..raw.window() };
        raw.send(&window.announcement())?;
        Ok(raw)
    }),
    attack("the last address and no bytes", Harmless, |t| {
        let (mut raw, _) =
            with_window(t, |window| (window.address, window.length) = (u64::MAX, 0), PING)?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("a key that is none", Failed("remote access"), |t| {
        Ok(with_window(t, |window| window.rkey ^= 0x5555_5555, PING)?.0)
    }),
    attack("an address that is none", Failed("remote access"), |t| {
        Ok(with_window(t, |window| window.address = 4096, PING)?.0)
    }),
    attack("a window beside the memory", Failed("remote access"), |t| {
        Ok(with_window(t, |window| window.address += u64::from(window.length), PING)?.0)
    }),
];

/// Announcements too early and too often.
const ANNOUNCEMENTS: &[Attack] = &[
    attack("two at once", Violation("announced while"), |t| {
        let mut raw = t.open()?;
        for _ in 0..2 {
            raw.send(&raw.window().announcement())?;
        }
        Ok(raw)
    }),
    attack("another when one is in use", Violation("announced while"), |t| {
        let (mut raw, _) = t.join()?;
        raw.send(&raw.window().announcement())?;
        Ok(raw)
    }),
    attack("no room when one is in use", Violation("announced while"), |t| {
        let (mut raw, _) = t.join()?;
        raw.send(&Window { length: 0, ..raw.window() }.announcement())?;
        Ok(raw)
    }),
    attack("another while data is in flight", Violation("announced while"), |t| {
        let memory = Options { memory: 16 << 20, ..Options::default() };
        let mut raw = t.open_with(&memory)?;
        raw.send(&raw.window().announcement())?;
        let mut inbox = t.inbox(&mut raw)?;
        inbox.say(&mut raw, GET_BIG)?;
        raw.wait_announced(1, t.soon())?;
        raw.send(&Window { length: 1000, ..raw.window() }.announcement())?;
        Ok(raw)
    }),
    attack("2,000 of no bytes", Harmless, |t| {
        let mut raw = t.open()?;
        for _ in 0..2000 {
            raw.send(&Window { length: 0, ..raw.window() }.announcement())?;
        }
        raw.send(&raw.window().announcement())?;
        let mut inbox = t.inbox(&mut raw)?;
        t.ping(&mut raw, &mut inbox)?;
        Ok(raw)
    }),
];

/// Sends the same message over and over; ends early once nothing moves any more.
fn flood(target: &Target, options: &Options, opcode: u16) -> Result<Raw> {
    let mut raw = target.open_with(options)?;
    raw.send(&raw.window().announcement())?;
    for _ in 0..5000 {
        match raw.send(&wire::bare(opcode)) {
            Ok(()) => {}
            // The server holds it back, or has given it up.
            Err(error) if error.is_timeout() || error.is_end() => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(raw)
}

/// Control messages without end.
const FLOODS: &[Attack] = &[
    attack("5,000 questions, answers ignored", Harmless, |t| {
        let mut raw = flood(t, &Options::default(), wire::GET_SERVER_FEATURE)?;
        // Each is answered, in good order; the server's first window is a message too.
        raw.wait_messages(5001, t.soon())?;
        Ok(raw)
    }),
    attack("5,000 questions, answers not taken", Harmless, |t| {
        let options = Options { repost: false, ..Options::default() };
        flood(t, &options, wire::GET_SERVER_FEATURE)
    }),
    attack("5,000 questions, answers not taken nor waited for", Failed("RNR"), |t| {
        let options = Options { repost: false, rnr_retry: 0, ..Options::default() };
        flood(t, &options, wire::GET_SERVER_FEATURE)
    }),
    attack("5,000 signs of life", Harmless, |t| {
        let mut raw = flood(t, &Options::default(), wire::KEEPALIVE)?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
];

/// Clients with no receives posted.
const DEAF: &[Attack] = &[
    attack("no receives, for ever", Harmless, |t| {
        let mut raw = t.open_with(&Options { receives: 0, ..Options::default() })?;
        raw.send(&raw.window().announcement())?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("no receives and no patience", Failed("RNR"), |t| {
        let mut raw = t.open_with(&Options { receives: 0, rnr_retry: 0, ..Options::default() })?;
        // The server may have given up already.
        let _ = raw.send(&raw.window().announcement());
        Ok(raw)
    }),
    attack("one receive, and none for the reply", Harmless, |t| {
        let options = Options { receives: 1, repost: false, ..Options::default() };
        let mut raw = t.open_with(&options)?;
        raw.send(&raw.window().announcement())?;
        t.inbox(&mut raw)?.say(&mut raw, GET_BIG)?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    attack("one receive, and no patience with the reply", Failed("RNR"), |t| {
        let options = Options { receives: 1, repost: false, rnr_retry: 0, ..Options::default() };
        let mut raw = t.open_with(&options)?;
        raw.send(&raw.window().announcement())?;
        t.inbox(&mut raw)?.say(&mut raw, PING)?;
        Ok(raw)
    }),
];

/// Handshakes that stop half way. The server waits 1.5 s for them.
const HANDSHAKES: &[Attack] = &[
    attack("resolved", Harmless, |t| Ok(Raw::resolve(t.address, &Options::default(), t.soon())?)),
    attack("asked, the answer not confirmed", TimedOut, |t| {
        let raw = Raw::resolve(t.address, &Options::default(), t.soon())?;
        raw.request()?;
        Ok(raw)
    }),
    attack("asked and gone", Withdrawn, |t| {
        let raw = Raw::resolve(t.address, &Options::default(), t.soon())?;
        raw.request()?;
        // Time for the server to accept, which nobody looks at.
        std::thread::sleep(Duration::from_millis(300));
        Ok(raw)
    }),
    attack("established, nothing announced", TimedOut, |t| t.open()),
    attack("established, bytes but nothing announced", TimedOut, |t| {
        let mut raw = t.open()?;
        t.inbox(&mut raw)?.say(&mut raw, PING)?;
        Ok(raw)
    }),
    attack("established, signs of life but nothing announced", TimedOut, |t| {
        let mut raw = t.open()?;
        for _ in 0..10 {
            raw.send(&wire::bare(wire::KEEPALIVE))?;
        }
        Ok(raw)
    }),
    attack("established and gone", Harmless, |t| t.open()),
];

/// A well-behaved client that pings until it is stopped.
struct Witness {
    name: &'static str,
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<Result<(u32, Duration)>>,
}

impl Witness {
    /// Its calls end by the client's own time-out: an answer that takes longer is none.
    fn start<S: Stream + Send + 'static>(
        name: &'static str,
        mut client: Client<S>,
    ) -> Result<Self> {
        // Once it is answered it is the server's client, and counted.
        expect(&mut client, "PING", "PONG")?;
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (mut count, mut worst) = (1, Duration::ZERO);
            loop {
                let sent = Instant::now();
                expect(&mut client, "PING", "PONG")
                    .with_context(|| format!("the {name} witness, ping {count}"))?;
                count += 1;
                worst = worst.max(sent.elapsed());
                match stopped.recv_timeout(Duration::from_millis(100)) {
                    Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                    _ => return Ok((count, worst)),
                }
            }
        });
        Ok(Self { name, stop, thread })
    }

    /// Fails if a ping went unanswered.
    fn stop(self, cell: &mut Cell) -> Result<u32> {
        let _ = self.stop.send(());
        let (count, worst) = self.thread.join().expect("a witness does not panic")?;
        let text = format!("{count} pings answered, worst {} ms", worst.as_millis());
        cell.figure(&format!("{} witness", self.name), text);
        Ok(count)
    }
}

/// How long a witness may wait for an answer.
fn bound(cell: &Cell) -> Duration {
    Duration::from_secs(if cell.lab.is_slow() { 30 } else { 10 })
}

/// Runs `body` between two witnesses.
fn witnessed(cell: &mut Cell, body: impl FnOnce(&mut Cell) -> Result<()>) -> Result<()> {
    let address = cell.server().rdma_address();
    let rdma = client::rdma::Connection::client(address, &cell.options(), bound(cell))?;
    let rdma = Witness::start("RDMA", rdma)?;
    let tcp = Witness::start("TCP", cell.server().tcp(bound(cell))?)?;
    let result = body(cell);
    let witnesses = (rdma.stop(cell), tcp.stop(cell));
    result?;
    let count = witnesses.0? as usize;
    witnesses.1?;
    cell.moved(count * PING.len(), count * PONG.len());
    Ok(())
}

/// What the server holds, and what it has counted.
#[derive(Clone)]
pub(super) struct Holdings {
    registered: u64,
    descriptors: usize,
    connections: [u64; 4],
    violations: u64,
    by_violation: u64,
    by_error: u64,
    by_timeout: u64,
}

impl Holdings {
    fn of(cell: &Cell) -> Result<Self> {
        // Before the observer's own connection, which takes a moment to close.
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", cell.server().pid()))?.count();
        let info = cell.info()?;
        let number = |name: &str| info.number(&format!("rdma_{name}"));
        Ok(Self {
            registered: number("registered_bytes")?,
            descriptors,
            connections: gauges(&info)?,
            violations: number("violations")?,
            by_violation: number("ended_by_violation")?,
            by_error: number("ended_by_error")?,
            by_timeout: number("ended_by_timeout")?,
        })
    }

    /// The same of a server that is left alone, to come back to.
    pub(super) fn at_rest(cell: &Cell) -> Result<Self> {
        Ok(Self { descriptors: cell.server().descriptors()?, ..Self::of(cell)? })
    }

    /// Waits until the server holds no more than this again.
    pub(super) fn wait_back(&self, cell: &Cell) -> Result<Self> {
        let deadline = Instant::now() + cell.lab.patience();
        let mut now = Self::of(cell)?;
        loop {
            if now.registered <= self.registered
                && now.descriptors <= self.descriptors
                && now.connections == self.connections
            {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "left behind: {} bytes registered (before {}), {} descriptors (before {}), \
                 connections {:?} (before {:?})",
                now.registered,
                self.registered,
                now.descriptors,
                self.descriptors,
                now.connections,
                self.connections
            );
            // A busy server takes its time to close the observer's own connections.
            now = Self::at_rest(cell)?;
        }
    }
}

/// Connections in handshake, established, lingering and ending.
fn gauges(info: &Info) -> Result<[u64; 4]> {
    Ok([
        info.number("rdma_connections_handshaking")?,
        info.number("rdma_connections_established")?,
        info.number("rdma_connections_lingering")?,
        info.number("rdma_connections_ending")?,
    ])
}

/// The lines of the log that name this client.
fn lines_about(cell: &Cell, client: SocketAddr) -> Result<Vec<String>> {
    let name = client.to_string();
    let mut lines = cell.server().log_lines(&name)?;
    // 127.0.0.1:4000 is not 127.0.0.1:40001.
    lines.retain(|line| {
        line.match_indices(&name)
            .any(|(at, _)| !line[at + name.len()..].starts_with(|next: char| next.is_ascii_digit()))
    });
    Ok(lines)
}

/// Runs each attack, and checks that it came to what it should and left nothing behind.
fn run(cell: &mut Cell, attacks: &[Attack]) -> Result<()> {
    prepare(cell)?;
    witnessed(cell, |cell| {
        let rest = Holdings::at_rest(cell)?;
        let mut counted = rest.clone();
        for attack in attacks {
            counted = try_attack(cell, attack, &rest, &counted)
                .with_context(|| format!("'{}'", attack.name))?;
        }
        // A witness, an attacker and a newcomer at a time, one of them with a large reply.
        let peak = cell.info()?.number("rdma_registered_peak_bytes")?;
        ensure!(
            peak <= 3 * ((1 << 20) + (16 << 10)) + (5 << 18),
            "{peak} bytes were registered at one time"
        );
        cell.figure("most bytes registered", peak);
        Ok(())
    })
}

/// The value that attackers ask for, and what the server sets up once and keeps.
fn prepare(cell: &mut Cell) -> Result<()> {
    cell.tcp()?.command(&[b"SET", b"big", &pattern::value(5, BIG)])?;
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    super::stalled::settle(cell)
}

/// Returns what the server has counted after it.
fn try_attack(
    cell: &Cell,
    attack: &Attack,
    rest: &Holdings,
    before: &Holdings,
) -> Result<Holdings> {
    let target = Target::of(cell);
    let mut raw = (attack.act)(&target)?;
    let who = raw.local_address().context("an attacker without an address")?;
    let mut how = String::new();
    if !matches!(attack.verdict, Harmless | Withdrawn) {
        how = raw.wait_end(target.soon()).context("the server does not end the connection")?;
    }
    if let Failed(_) = attack.verdict {
        wait_ended_by_error(cell, before)?;
    }
    drop(raw);
    // Nobody else's trouble.
    expect(&mut cell.rdma()?, "PING", "PONG")?;
    let after = rest.wait_back(cell)?;
    let counted = (
        after.violations - before.violations,
        after.by_violation - before.by_violation,
        after.by_error - before.by_error,
        after.by_timeout - before.by_timeout,
    );
    let lines = lines_about(cell, who)?;
    let (wanted, words) = match attack.verdict {
        Violation(words) => ((1, 1, 0, 0), Some(words)),
        Failed(words) => ((0, 0, 1, 0), Some(words)),
        TimedOut => ((0, 0, 0, 1), Some("handshake")),
        Withdrawn if counted.2 == 1 => ((0, 0, 1, 0), Some("lost")),
        Withdrawn | Harmless => ((0, 0, 0, 0), None),
    };
    ensure!(
        counted == wanted,
        "(violations, ended by violation, by error, by time-out) are {counted:?} instead of \
         {wanted:?}; the client saw '{how}'; the log says of it: {lines:?}"
    );
    match words {
        Some(words) => ensure!(
            lines.len() == 1 && lines[0].contains(words),
            "not exactly one line with '{words}' about {who}: {lines:?}"
        ),
        None => ensure!(lines.is_empty(), "held against {who}: {lines:?}"),
    }
    Ok(after)
}

/// Waits until the server has counted one connection more that ended by an error. The client
/// stays until then: a server that hears of its leaving first, holds nothing against it.
fn wait_ended_by_error(cell: &Cell, before: &Holdings) -> Result<()> {
    let deadline = Instant::now() + cell.lab.patience();
    while Holdings::of(cell)?.by_error == before.by_error {
        ensure!(Instant::now() < deadline, "the server counts no end by an error");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// READ and WRITE where the server gave no right.
const RIGHTS: &[Attack] = &[
    attack("a READ of its own window", Failed("access"), |t| {
        let (mut raw, inbox) = t.join()?;
        raw.read(inbox.window.address, inbox.window.rkey, 64)?;
        Ok(raw)
    }),
    attack("a WRITE across its window's end", Failed("access"), |t| {
        let (mut raw, inbox) = t.join()?;
        let end = inbox.window.address + u64::from(inbox.window.length);
        raw.write(end - 10, inbox.window.rkey, &[7; 20], None)?;
        Ok(raw)
    }),
    attack("a WRITE before its window", Failed("access"), |t| {
        let (mut raw, inbox) = t.join()?;
        raw.write(inbox.window.address - 4096, inbox.window.rkey, &[7; 20], Some(20))?;
        Ok(raw)
    }),
    attack("a WRITE with a key that is none", Failed("access"), |t| {
        let (mut raw, inbox) = t.join()?;
        raw.write(inbox.window.address, !inbox.window.rkey, &[7; 20], Some(20))?;
        Ok(raw)
    }),
    attack("a WRITE before anything was announced", Failed("access"), |t| {
        let mut raw = t.open()?;
        let inbox = t.inbox(&mut raw)?;
        raw.write(inbox.window.address, !inbox.window.rkey, &[7; 20], Some(20))?;
        Ok(raw)
    }),
];

/// READ and WRITE where the server gave no right, or gave it to another.
fn rights(cell: &mut Cell) -> Result<()> {
    run(cell, RIGHTS)?;
    for reading in [false, true] {
        let what = if reading { "READ" } else { "WRITE" };
        foreign(cell, reading).with_context(|| format!("a {what} in another's window"))?;
    }
    Ok(())
}

/// With the valid address and key of another connection's window.
fn foreign(cell: &mut Cell, reading: bool) -> Result<()> {
    let target = Target::of(cell);
    let (mut victim, mut inbox) = target.join()?;
    // The victim's request lies in its window and is not announced yet: time to spoil it.
    let place = inbox.window.address + u64::from(inbox.used);
    let request = b"*2\r\n$4\r\nECHO\r\n$8\r\nunharmed\r\n";
    victim.write(place, inbox.window.rkey, request, None)?;
    victim.flush(target.soon())?;

    let before = Holdings::at_rest(cell)?;
    let (mut thief, _) = target.join()?;
    let who = thief.local_address().context("an attacker without an address")?;
    match reading {
        true => thief.read(place, inbox.window.rkey, request.len())?,
        false => thief.write(place, inbox.window.rkey, &[b'x'; 30], None)?,
    }
    let how = thief.wait_end(target.soon())?;
    ensure!(!how.contains("success"), "it succeeded");
    wait_ended_by_error(cell, &before)?;
    drop(thief);

    inbox.claim(&mut victim, &[], request.len() as u32)?;
    target.reply(&mut victim, &mut inbox, b"$8\r\nunharmed\r\n")?;
    target.ping(&mut victim, &mut inbox)?;
    let after = before.wait_back(cell)?;
    ensure!(
        after.by_error - before.by_error == 1,
        "{} connections ended by an error instead of one",
        after.by_error - before.by_error
    );
    let lines = lines_about(cell, who)?;
    ensure!(
        lines.len() == 1 && lines[0].contains("access"),
        "not exactly one line about {who}: {lines:?}"
    );
    Ok(())
}

/// How far a leaving client got, and the way there.
type Step = (&'static str, fn(&Target) -> Result<Raw>);

const STEPS: &[Step] = &[
    ("established", |t| t.open()),
    ("announced", |t| {
        let mut raw = t.open()?;
        raw.send(&raw.window().announcement())?;
        Ok(raw)
    }),
    ("half a request", |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, &PING[..7])?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
    ("a request, the reply not awaited", |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, PING)?;
        Ok(raw)
    }),
    ("in the middle of a reply", |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, GET_BIG)?;
        raw.wait_announced(100_000, t.soon())?;
        Ok(raw)
    }),
    ("with a question open", |t| {
        let (mut raw, _) = t.join()?;
        raw.send(&wire::bare(wire::GET_SERVER_FEATURE))?;
        Ok(raw)
    }),
    ("blocked", |t| {
        let (mut raw, mut inbox) = t.join()?;
        inbox.say(&mut raw, b"*3\r\n$5\r\nBLPOP\r\n$1\r\nq\r\n$1\r\n0\r\n")?;
        raw.flush(t.soon())?;
        Ok(raw)
    }),
];

/// Clients that leave at each step, with and without a word, and processes that are killed.
fn leaving(cell: &mut Cell) -> Result<()> {
    prepare(cell)?;
    witnessed(cell, |cell| {
        let target = Target::of(cell);
        let before = Holdings::at_rest(cell)?;
        for (name, step) in STEPS {
            for politely in [false, true] {
                let raw = step(&target).with_context(|| (*name).to_owned())?;
                if politely {
                    raw.disconnect()?;
                }
                drop(raw);
                before
                    .wait_back(cell)
                    .with_context(|| format!("'{name}', leaving politely: {politely}"))?;
            }
        }
        for _ in 0..3 {
            let received = cell.info()?.number("rdma_bytes_received")?;
            let traffic = cell.traffic(10, 100_000)?;
            cell.wait_info("traffic", |info| {
                Ok(info.number("rdma_bytes_received")? > received + (1 << 20))
            })?;
            // The end of its owner is SIGKILL.
            drop(traffic);
            before.wait_back(cell).context("a process killed in the middle of its work")?;
        }
        let after = Holdings::of(cell)?;
        ensure!(after.violations == before.violations, "leaving is no violation");
        Ok(())
    })
}

/// Connections in handshake that the server of `crowd` allows. An emulated guest accepts some 5 a
/// second, so that 25 would stand at a time there within the 5 seconds that each has.
const CROWD: usize = 10;

/// Thousands of connects that never speak.
fn crowd(cell: &mut Cell) -> Result<()> {
    prepare(cell)?;
    let attempts = if cell.lab.is_slow() { 300 } else { 3000 };
    witnessed(cell, |cell| {
        let before = Holdings::at_rest(cell)?;
        let refused_before = cell.info()?.number("rdma_connections_refused")?;
        let target = Target::of(cell);
        let options = Options { receives: 1, memory: 1, ..Options::default() };
        let (mut held, mut refused) = (Vec::new(), 0_u64);
        for _ in 0..attempts {
            match Raw::open(target.address, &options, target.soon()) {
                Ok(raw) => held.push(raw),
                Err(client::Error::NotConnected { .. }) => refused += 1,
                Err(error) => return Err(error.into()),
            }
            // Those that the server has timed out since are held on to as well, but not more
            // than this process has descriptors for.
            if held.len() > 300 {
                held.drain(..100);
            }
        }
        let info = cell.info()?;
        ensure!(
            info.number("rdma_connections_handshaking")? <= CROWD as u64,
            "{} connections are in handshake, more than max-handshakes",
            info.number("rdma_connections_handshaking")?
        );
        ensure!(refused > 0, "nobody was refused");
        let counted = info.number("rdma_connections_refused")? - refused_before;
        ensure!(counted == refused, "{refused} were refused, {counted} are counted");
        let lines = cell.server().log_lines("max-handshakes")?;
        ensure!(
            (1..=3).contains(&lines.len()),
            "{} lines about {refused} refusals in less than two minutes",
            lines.len()
        );
        cell.figure("silent connects", format!("{attempts}, of which {refused} were refused"));
        // Time alone makes room again, with the silent ones still there.
        cell.wait_info("no connection in handshake", |info| {
            Ok(info.number("rdma_connections_handshaking")? == 0)
        })?;
        expect(&mut cell.rdma()?, "PING", "PONG")?;
        drop(held);
        let after = before.wait_back(cell)?;
        let timed_out = after.by_timeout - before.by_timeout;
        ensure!(timed_out > 0, "nobody was timed out");
        let lines = cell.server().log_lines("handshake not completed")?;
        ensure!(
            (1..=90).contains(&lines.len()),
            "{} lines about {timed_out} time-outs in less than three minutes",
            lines.len()
        );
        cell.figure("timed out", format!("{timed_out}, in {} log lines", lines.len()));
        ensure!(after.violations == before.violations, "silence is no violation");
        Ok(())
    })
}

/// At the limit of registered memory the newcomer is refused, those who are in go on, and
/// who leaves makes room.
fn registered(cell: &mut Cell) -> Result<()> {
    prepare(cell)?;
    witnessed(cell, |cell| {
        let before = Holdings::at_rest(cell)?;
        let value = pattern::value(5, BIG);
        let mut inside = Vec::new();
        let refusal = loop {
            ensure!(inside.len() < 100, "100 connections within {LIMIT} bytes");
            match cell.rdma() {
                Ok(mut client) => {
                    expect(&mut client, "PING", "PONG")?;
                    inside.push(client);
                }
                Err(error) => break error,
            }
        };
        ensure!(
            refusal
                .downcast_ref()
                .is_some_and(|error| matches!(error, client::Error::NotConnected { .. })),
            "not a reject: {refusal:#}"
        );
        ensure!(inside.len() >= 20, "only {} connections within {LIMIT} bytes", inside.len());
        for _ in 0..20 {
            ensure!(cell.rdma().is_err(), "a newcomer above the limit");
        }
        let info = cell.info()?;
        ensure!(info.number("rdma_registered_bytes")? <= LIMIT as u64, "more than the limit");
        ensure!(info.number("rdma_connections_refused")? == 21, "refusals are not counted");
        let lines = cell.server().log_lines("refused")?;
        ensure!(lines.len() == 1, "{} lines about 21 refusals", lines.len());
        // Without room for more staging memory a large reply takes many small steps.
        for client in inside.iter_mut().take(4) {
            let read = client.command(&[b"GET", b"big"])?;
            ensure!(read == client::Value::Bulk(value.clone()), "another value at the limit");
        }
        for client in &mut inside {
            expect(client, "PING", "PONG")?;
        }
        inside.pop();
        cell.wait_info("room", |info| {
            Ok(info.number("rdma_registered_bytes")? <= (LIMIT - NEED) as u64)
        })?;
        expect(&mut cell.rdma()?, "PING", "PONG")?;
        cell.figure("connections within the limit", inside.len() + 2);
        drop(inside);
        before.wait_back(cell)?;
        Ok(())
    })
}

/// A silent client is probed, and lives; one that has vanished is found out.
fn keepalive(cell: &mut Cell) -> Result<()> {
    prepare(cell)?;
    witnessed(cell, |cell| {
        let before = Holdings::at_rest(cell)?;
        let target = Target::of(cell);
        let (mut idle, mut inbox) = target.join()?;
        let probes = cell.info()?.number("rdma_keepalive_probes")?;
        cell.wait_info("probes", |info| Ok(info.number("rdma_keepalive_probes")? >= probes + 5))?;
        // None of them cost the idle client a receive, or looked like bytes.
        target.ping(&mut idle, &mut inbox)?;
        drop(idle);
        before.wait_back(cell)?;

        let mut vanished = cell.rdma()?;
        expect(&mut vanished, "PING", "PONG")?;
        vanished.stream().vanish();
        before.wait_back(cell).context("a client that vanished without a word")?;
        let after = Holdings::of(cell)?;
        // Its device gives up, or we do: Soft-RoCE tries for ever.
        let (error, timeout) =
            (after.by_error - before.by_error, after.by_timeout - before.by_timeout);
        ensure!(error + timeout == 1, "the vanished client is not counted once");

        // One that has no receive for its reply, so that nothing behind that arrives either.
        let options = Options { receives: 2, repost: false, ..Options::default() };
        let mut deaf = target.open_with(&options)?;
        deaf.send(&deaf.window().announcement())?;
        let mut inbox = target.inbox(&mut deaf)?;
        let who = deaf.local_address().context("a client without an address")?;
        inbox.say(&mut deaf, PING)?;
        deaf.wait_announced(PONG.len() as u64, target.soon())?;
        inbox.say(&mut deaf, PING)?;
        before.wait_back(cell).context("a client that answers no probe")?;
        ensure!(Holdings::of(cell)?.by_timeout == after.by_timeout + 1, "not counted as timed out");
        let lines = lines_about(cell, who)?;
        ensure!(
            lines.len() == 1 && lines[0].contains("no reply to a keepalive probe"),
            "the log says: {lines:?}"
        );
        Ok(())
    })
}

/// A client that the server has closed gets so long to read its last words, and no longer.
fn linger(cell: &mut Cell) -> Result<()> {
    prepare(cell)?;
    witnessed(cell, |cell| {
        let before = Holdings::at_rest(cell)?;
        let target = Target::of(cell);
        let (mut raw, mut inbox) = target.join()?;
        inbox.say(&mut raw, b"*1\r\n$4\r\nQUIT\r\n")?;
        target.reply(&mut raw, &mut inbox, b"+OK\r\n")?;
        raw.wait_end(target.soon()).context("after QUIT")?;
        before.wait_back(cell)?;

        // One that takes nothing: the last words can't be delivered, and are given up.
        let options = Options { receives: 2, repost: false, ..Options::default() };
        let mut deaf = target.open_with(&options)?;
        deaf.send(&deaf.window().announcement())?;
        let mut inbox = target.inbox(&mut deaf)?;
        inbox.say(&mut deaf, b"*2\r\n$6\r\nCLIENT\r\n$2\r\nID\r\n")?;
        deaf.wait_announced(4, target.soon())?;
        inbox.say(&mut deaf, b"*1\r\n$4\r\nQUIT\r\n")?;
        deaf.flush(target.soon())?;
        before.wait_back(cell).context("a client that does not take its last words")?;
        drop(deaf);
        if before.violations != Holdings::of(cell)?.violations {
            bail!("deafness is no violation");
        }
        Ok(())
    })
}

/// The same attacks on the C module that upstream's 9.1 is built with: what becomes of its
/// server. Nothing is demanded of it; each outcome is a figure of the report.
fn upstream(cell: &mut Cell) -> Result<()> {
    let lists = [
        ("messages", MESSAGES),
        ("immediates", IMMEDIATES),
        ("windows", WINDOWS),
        ("announcements", ANNOUNCEMENTS),
        ("floods", FLOODS),
        ("deaf", DEAF),
        ("rights", RIGHTS),
        ("handshakes", HANDSHAKES),
    ];
    for (list, attacks) in lists {
        for (number, attack) in attacks.iter().enumerate() {
            let outcome = on_upstream(cell, attack, &format!("{list}-{number}"))
                .with_context(|| format!("{list}, '{}'", attack.name))?;
            cell.figure(&format!("{list}, {}", attack.name), outcome);
        }
    }
    Ok(())
}

/// How long the upstream server may leave anybody without an answer.
const UPSTREAM: Duration = Duration::from_secs(5);

fn on_upstream(cell: &Cell, attack: &Attack, name: &str) -> Result<String> {
    let Upstream { process: mut server, tcp, rdma: address } = Upstream::spawn(cell, name)?;
    let observe = || client::tcp::Connection::client(tcp, UPSTREAM);
    let deadline = Instant::now() + cell.lab.patience();
    let mut observer = loop {
        match observe() {
            Ok(observer) => break observer,
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(30)),
            Err(error) => return Err(error).context("the upstream server does not start"),
        }
    };
    observer.command(&[b"SET", b"big", &pattern::value(5, BIG)])?;
    let options = client::rdma::Options { timeout: UPSTREAM, ..Default::default() };
    let join = || client::rdma::Connection::client(address, &options, UPSTREAM);
    expect(&mut join()?, "PING", "PONG").context("before the attack")?;

    let mut raw = (attack.act)(&Target { address, patience: UPSTREAM });
    let ended = match &mut raw {
        Ok(raw) => raw.wait_end(Instant::now() + Duration::from_secs(2)).is_ok(),
        Err(_) => false,
    };
    let mut outcome = Vec::new();
    let mut others = |when: &str, server: &mut Process| -> Result<bool> {
        let tcp = observer.words("PING").is_ok();
        let rdma = join().is_ok_and(|mut client| client.words("PING").is_ok());
        if !tcp {
            outcome.push(format!("TCP clients are not answered {when}"));
        }
        if !rdma {
            outcome.push(format!("RDMA clients are not answered {when}"));
        }
        // A crash takes its time, for the report that it writes.
        let patience = if tcp && rdma { Duration::ZERO } else { Duration::from_secs(15) };
        let status = server.wait(patience)?;
        if let Some(status) = status {
            outcome.push(format!("the server ends ({status})"));
        }
        Ok(status.is_none())
    };
    let lives = others("with the attacker there", &mut server)?;
    let attacker = match &raw {
        Ok(_) if ended => "the attacker's connection ends".to_owned(),
        Ok(_) => "the attacker stays connected".to_owned(),
        Err(error) => format!("the attacker gets: {error:#}"),
    };
    drop(raw);
    if lives {
        std::thread::sleep(Duration::from_millis(300));
        if others("once it has left", &mut server)? {
            if outcome.is_empty() {
                outcome.push("others are served".to_owned());
            }
            outcome.push(attacker);
        }
    }
    server.end(Duration::from_secs(5))?;
    Ok(outcome.join("; "))
}
