// SPDX-License-Identifier: BSD-3-Clause
//! The checks, one after the other. Each says what it needs to hold, and why it matters.

use crate::Outcome;
use crate::pair::{BUFFER, End, MESSAGE, Pair, RECEIVES, SENDS, Trouble, readable};
use crate::profile::{Seen, Unready};
use std::net::IpAddr;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verbs::Error;
use verbs::cq::{Completion, Outcome as Done};
use verbs::device::Facts;
use verbs::mr::{Access, ProtectionDomain, Region};
use verbs::qp::RemoteBuf;

/// Longest wait for what a device does by itself.
const SOON: Duration = Duration::from_secs(1);
/// A device that repeats a message after 0.64 ms has done so within this; one that left its
/// timer at 655 ms has not (InfiniBand specification, table "RNR NAK timer field").
const SENT_AGAIN: Duration = Duration::from_millis(300);
/// How long receives are kept back in that check.
const UNREADY: Duration = Duration::from_millis(20);
/// Most work requests posted to find out how many a queue takes.
const MOST_POSTED: usize = 4096;

/// Lengths of writes: at the edges of what a work request may carry in itself, on devices that
/// grant 32 or 96 bytes, and a page.
const LENGTHS: [usize; 6] = [1, 32, 33, 96, 97, BUFFER];
/// Tells whether its bytes come in the right order.
const IMMEDIATE: u32 = 0x0102_0304;

/// The id of what an end sends; receives have the number of their slot.
const SENT: u64 = 1 << 32;

/// What was found.
type Verdict = Result<String, Wrong>;

/// Why a check did not pass.
enum Wrong {
    /// What the device did.
    Did(String),
    /// There was nothing to try it on.
    Untried(String),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::Did(error.to_string())
    }
}

impl From<Trouble> for Wrong {
    fn from(trouble: Trouble) -> Self {
        Self::Untried(match trouble {
            Trouble::Failed(error) => error.to_string(),
            Trouble::NoConnection(what) => format!("cannot connect to itself: {what}"),
        })
    }
}

fn did<T>(what: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong::Did(what.into()))
}

/// What all checks have in common.
struct Bench {
    address: IpAddr,
    seen: Seen,
}

type Check = fn(&mut Bench) -> Verdict;

const CHECKS: [(&str, Check); 11] = [
    ("message", message),
    ("immediate", immediate),
    ("inline", inline),
    ("probe", probe),
    ("probe-with-key", probe_with_key),
    ("receiver-not-ready", receiver_not_ready),
    ("send-queue", send_queue),
    ("isolation", isolation),
    ("flush", flush),
    ("events", events),
    ("registration", registration),
];

/// Makes all checks: what the device says of itself, what was found, and what tells its kind.
pub(crate) fn all(address: IpAddr) -> (Option<Facts>, Vec<(&'static str, Outcome)>, Seen) {
    let mut found = Vec::new();
    let started = Instant::now();
    let connected = Pair::connect(address, SENDS, RECEIVES);
    let facts = match connected {
        Err(trouble) => {
            // Some devices have no way to themselves: that says nothing about others.
            found.push(("connection", verdict(Err(trouble.into()))));
            return (None, found, Seen::default());
        }
        Ok(pair) => {
            let connecting = started.elapsed();
            let facts = pair.device().map(|device| device.facts());
            let closing = Instant::now();
            pair.close();
            let figures = format!(
                "connected in {} us, closed in {} us",
                connecting.as_micros(),
                closing.elapsed().as_micros()
            );
            match facts {
                Some(Ok(facts)) => {
                    found.push(("connection", Outcome::Passed(figures)));
                    Some(facts)
                }
                Some(Err(error)) => {
                    found.push(("connection", Outcome::Failed(error.to_string())));
                    None
                }
                None => None,
            }
        }
    };
    let mut bench = Bench { address, seen: Seen::default() };
    for (name, check) in CHECKS {
        found.push((name, verdict(check(&mut bench))));
    }
    (facts, found, bench.seen)
}

fn verdict(found: Verdict) -> Outcome {
    match found {
        Ok(figures) => Outcome::Passed(figures),
        Err(Wrong::Did(what)) => Outcome::Failed(what),
        Err(Wrong::Untried(why)) => Outcome::Inconclusive(why),
    }
}

impl Bench {
    fn pair(&self) -> Result<Pair, Wrong> {
        Ok(Pair::connect(self.address, SENDS, RECEIVES)?)
    }

    /// For what is tried with immediate data.
    fn needs_immediate(&self) -> Result<(), Wrong> {
        match self.seen.immediate {
            Some(true) => Ok(()),
            _ => Err(Wrong::Untried("the device takes no immediate data".to_owned())),
        }
    }
}

/// A SEND of 32 bytes arrives whole: control messages are such.
fn message(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    fill(&pair.client.out, MESSAGE);
    pair.client.qp.post_send(SENT, pair.client.out.sge(0, MESSAGE as u32))?;
    let arrived = one(&pair.server)?;
    match arrived.outcome {
        Done::Received(length) if length as usize == MESSAGE => {}
        other => return did(format!("a message of {MESSAGE} bytes arrived as {}", words(other))),
    }
    same(&pair.server.messages, arrived.wr_id as usize * MESSAGE, MESSAGE)?;
    sent(&pair.client)?;
    pair.close();
    Ok(String::new())
}

/// RDMA WRITE with immediate data, the way of all commands and replies.
fn immediate(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    for length in LENGTHS {
        fill(&pair.client.out, length);
        let bytes = pair.client.out.sge(0, length as u32);
        let posted =
            pair.client.qp.post_write_of(SENT, bytes, pair.server.target(), IMMEDIATE, true);
        if let Err(error) = posted {
            if length == LENGTHS[0] {
                bench.seen.immediate = Some(!error.is_unsupported());
            }
            return did(format!("a write of {length} bytes with immediate data: {error}"));
        }
        match one(&pair.server)?.outcome {
            Done::Immediate(IMMEDIATE) => {}
            other => {
                return did(format!("a write of {length} bytes arrived as {}", words(other)));
            }
        }
        same(&pair.server.window, 0, length)?;
        sent(&pair.client)?;
        bench.seen.immediate = Some(true);
    }
    pair.close();
    Ok(String::new())
}

/// How many bytes a work request may carry in itself. Fewer than were asked for are no fault.
fn inline(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    let granted = pair.server.qp.inline();
    bench.seen.inline = Some(granted);
    pair.close();
    Ok(format!("{granted} bytes"))
}

/// A write of nothing to nowhere, by which a silent peer is found out about.
fn probe(bench: &mut Bench) -> Verdict {
    probe_at(bench, RemoteBuf { address: 0, rkey: 0 })
}

/// The same to memory that is there.
fn probe_with_key(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    let at = pair.server.target();
    nothing_arrives(&pair, at)?;
    pair.close();
    Ok(String::new())
}

fn probe_at(bench: &mut Bench, at: RemoteBuf) -> Verdict {
    let pair = bench.pair()?;
    nothing_arrives(&pair, at)?;
    pair.close();
    Ok(String::new())
}

fn nothing_arrives(pair: &Pair, at: RemoteBuf) -> Result<(), Wrong> {
    pair.client.qp.post_probe(SENT, at)?;
    sent(&pair.client)?;
    let mut none = Vec::new();
    pair.server.collect(&mut none, 1, Duration::from_millis(1))?;
    match none.first() {
        None => Ok(()),
        Some(other) => did(format!("at the other end it completes {}", words(other.outcome))),
    }
}

/// A client may have more writes under way than receives are posted for it. They have to be
/// sent again, and soon.
fn receiver_not_ready(bench: &mut Bench) -> Verdict {
    const WRITES: usize = RECEIVES + 16;
    bench.needs_immediate()?;
    let pair = Pair::connect(bench.address, WRITES as u32, RECEIVES)?;
    for _ in 0..WRITES {
        let bytes = pair.client.out.sge(0, 1);
        // A device that ends the connection at once may refuse what is posted after that.
        if pair.client.qp.post_write(SENT, bytes, pair.server.target(), true).is_err() {
            break;
        }
    }
    std::thread::sleep(UNREADY);
    let mut arrived = Vec::new();
    pair.server.collect(&mut arrived, RECEIVES, SOON)?;
    (0..WRITES - RECEIVES).try_for_each(|slot| pair.server.receive(slot))?;
    let ready = Instant::now();
    let mut done = Vec::new();
    // Two of the long times: the clock may have started late.
    pair.client.collect(&mut done, WRITES, 2 * SOON)?;
    let waited = ready.elapsed();
    let lost = done.iter().find(|completion| completion.outcome != Done::Sent);
    if let Some(lost) = lost {
        bench.seen.unready = Some(Unready::Lost);
        return did(format!(
            "a write found no receive, and the connection ended: {}",
            words(lost.outcome)
        ));
    }
    if done.len() < WRITES {
        bench.seen.unready = Some(Unready::SentAgainLate);
        return did(format!("{} of {WRITES} writes arrived in 2 s", done.len()));
    }
    if waited > SENT_AGAIN {
        bench.seen.unready = Some(Unready::SentAgainLate);
        return did(format!(
            "writes without a receive were sent again after {} ms: the timer that was set does \
             not hold",
            waited.as_millis()
        ));
    }
    bench.seen.unready = Some(Unready::SentAgain);
    pair.close();
    Ok(format!("sent again within {} ms", waited.as_millis()))
}

/// The send queue takes as many work requests as were asked for, and says when it is full.
fn send_queue(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    let mut posted = 0;
    let refusal = loop {
        // Nothing is taken off the queue meanwhile, so what completes keeps its place.
        match pair.client.qp.post_probe(SENT, pair.server.target()) {
            Err(error) => break Some(error),
            Ok(()) => posted += 1,
        }
        if posted == MOST_POSTED {
            break None;
        }
    };
    if posted < SENDS as usize {
        let why = refusal.map_or_else(String::new, |error| error.to_string());
        return did(format!("of {SENDS} work requests it took {posted}: {why}"));
    }
    match refusal {
        Some(error) if !error.is_queue_full() => {
            did(format!("a full queue answers with error number {}", error.errno))
        }
        Some(error) => Ok(format!("{posted} work requests, then error number {}", error.errno)),
        None => Ok(format!("more than {MOST_POSTED} work requests")),
    }
}

/// A key of another protection domain opens nothing, and who tries it ends alone.
fn isolation(bench: &mut Bench) -> Verdict {
    bench.needs_immediate()?;
    let (thief, other) = (bench.pair()?, bench.pair()?);
    let device = thief.device().ok_or_else(|| Wrong::Untried("no device".to_owned()))?;
    let domain = Arc::new(ProtectionDomain::new(&device)?);
    let foreign = Region::new(&domain, BUFFER, Access::RemoteWrite)?;
    let at =
        RemoteBuf { address: foreign.start().expose_provenance() as u64, rkey: foreign.rkey() };
    fill(&thief.client.out, 1);
    thief.client.qp.post_write(SENT, thief.client.out.sge(0, 1), at, true)?;
    match one(&thief.client)?.outcome {
        // By a remote access error; iWARP ends the connection and tells the writer nothing else.
        Done::Failed(_) => {}
        outcome => {
            return did(format!("a write with another domain's key: {}", words(outcome)));
        }
    }
    if same(&foreign, 0, 1).is_ok() {
        return did("a write with another domain's key has reached the memory");
    }
    other.client.qp.post_send(SENT, other.client.out.sge(0, MESSAGE as u32))?;
    match one(&other.server)?.outcome {
        Done::Received(_) => {}
        outcome => {
            return did(format!("another connection ended as well: {}", words(outcome)));
        }
    }
    other.close();
    Ok(String::new())
}

/// A queue pair that fails gives back every receive that is posted, and tells of it.
fn flush(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    pair.server.queue.arm()?;
    pair.server.qp.fail()?;
    let told = readable(pair.server.channel.fd(), SOON);
    let mut flushed = Vec::new();
    pair.server.collect(&mut flushed, RECEIVES, SOON)?;
    let flushes = |it: &&Completion| matches!(it.outcome, Done::Failed(why) if why.is_flush());
    let count = flushed.iter().filter(flushes).count();
    if count < RECEIVES {
        return did(format!("{count} of {RECEIVES} receives were given back within 1 s"));
    }
    // Some devices make these completions when the queue is polled, and tell of none: their
    // connections are looked at by the clock.
    Ok(if told { String::new() } else { "without an event".to_owned() })
}

/// The queue tells of a completion once it is armed, and of no earlier one.
fn events(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    let end = &pair.client;
    let complete =
        || -> Result<(), Wrong> { Ok(end.qp.post_send(SENT, end.out.sge(0, MESSAGE as u32))?) };
    // Twice, which is no more than once.
    end.queue.arm()?;
    end.queue.arm()?;
    complete()?;
    if !readable(end.channel.fd(), SOON) {
        return did("no event of a completion within 1 s");
    }
    while end.channel.take_event()?.is_some() {}
    sent(end)?;
    // What completes before the queue is armed makes no event, and is found by a look.
    complete()?;
    std::thread::sleep(Duration::from_millis(5));
    end.queue.arm()?;
    sent(end)?;
    complete()?;
    if !readable(end.channel.fd(), SOON) {
        return did("no event after the queue was armed beside a completion");
    }
    pair.close();
    Ok(String::new())
}

/// Memory can be registered in the sizes that connections use.
fn registration(bench: &mut Bench) -> Verdict {
    let pair = bench.pair()?;
    let mut figures = Vec::new();
    for (length, name) in [(BUFFER, "4 KiB"), (1 << 20, "1 MiB")] {
        let started = Instant::now();
        let region = Region::new(&pair.server.domain, length, Access::RemoteWrite)?;
        figures.push(format!("{name} in {} us", started.elapsed().as_micros()));
        drop(region);
    }
    pair.close();
    Ok(figures.join(", "))
}

/// The next completion of an end.
fn one(end: &End) -> Result<Completion, Wrong> {
    let mut all = Vec::new();
    end.collect(&mut all, 1, SOON)?;
    match all.first() {
        Some(first) => Ok(*first),
        None => did("nothing completed within 1 s"),
    }
}

/// Waits for a work request of an end, which has to succeed.
fn sent(end: &End) -> Result<(), Wrong> {
    match one(end)?.outcome {
        Done::Sent => Ok(()),
        other => did(words(other)),
    }
}

fn words(outcome: Done) -> String {
    match outcome {
        Done::Received(length) => format!("a message of {length} bytes"),
        Done::Immediate(number) => format!("a write with the immediate {number:#x}"),
        Done::Sent => "success".to_owned(),
        Done::Unexpected(code) => format!("a completion of kind {code}"),
        Done::Failed(status) => status.text(),
    }
}

/// The byte at a position of every pattern.
fn byte(at: usize) -> u8 {
    (at * 7 + 3) as u8
}

/// Writes the pattern to the first bytes of a region, of which no work request uses them now.
fn fill(region: &Region, length: usize) {
    assert!(length <= region.length());
    for at in 0..length {
        // SAFETY: inside the region.
        unsafe { ptr::write_volatile(region.start().add(at), byte(at)) };
    }
}

/// Whether a part of a region, which is written to by nobody now, holds the pattern.
fn same(region: &Region, offset: usize, length: usize) -> Result<(), Wrong> {
    assert!(offset + length <= region.length());
    for at in 0..length {
        // SAFETY: inside the region.
        let found = unsafe { ptr::read_volatile(region.start().add(offset + at)) };
        if found != byte(at) {
            return did(format!(
                "byte {at} of {length} arrived as {found:#x}, not {:#x}",
                byte(at)
            ));
        }
    }
    Ok(())
}
