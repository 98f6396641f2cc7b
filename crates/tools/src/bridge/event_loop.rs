// SPDX-License-Identifier: BSD-3-Clause
//! One thread that serves all links: it sleeps until a descriptor tells of something or a time
//! has come, and then has each link that this concerns go on as far as it can.

use crate::bridge::attempt::Target;
use crate::bridge::link::{Around, Link, Next};
use crate::bridge::listen::Listener;
use crate::bridge::metrics::{Metrics, Reason};
use crate::bridge::notes::{Notes, say};
use crate::bridge::watch::{Part, Watch};
use anyhow::{Context, Result};
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use sd_notify::NotifyState;
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Events that are taken at a time.
const EVENTS: usize = 1024;
/// Programs that are accepted before those that are connected have their turn.
const ACCEPTS: usize = 64;
/// How soon accepting is tried again where the system has no descriptor left.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// From one look after silent servers and idle memory to the next.
const TICK: Duration = Duration::from_secs(1);
/// From one look after what may end to the next, while the bridge ends.
const ENDING: Duration = Duration::from_millis(25);
/// Programs that are being told that there are too many, beyond which they are told nothing.
const TOLD: usize = 128;
/// Descriptors of a link: the program's socket, completions, the connection manager's events,
/// and one for whatever its device's library needs.
const DESCRIPTORS: u64 = 4;
/// Descriptors of everything else.
const OTHERS: u64 = 64;

const WAKER: Token = Token(usize::MAX);

/// How many, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    connections: usize,
    drain: Duration,
}

impl Limits {
    /// As many as were wished, and as the limit on descriptors leaves room for.
    pub fn within(wished: usize, drain: Duration) -> Self {
        let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
        let room = descriptors.saturating_sub(OTHERS) / DESCRIPTORS;
        let room = usize::try_from(room).unwrap_or(usize::MAX).max(1);
        if room < wished {
            say(format_args!(
                "the limit of {descriptors} descriptors leaves room for {room} programs, less \
                 than --max-connections {wished} (LimitNOFILE, ulimit -n)"
            ));
        }
        Self { connections: wished.min(room), drain }
    }
}

/// By which another thread ends the bridge.
#[derive(Clone, Debug)]
pub struct Ending {
    asked: Arc<AtomicU32>,
    waker: Arc<Waker>,
}

impl Ending {
    /// Once: when the answers that are awaited are there. Twice: now.
    pub fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        // It looks at the next event anyway.
        let _ = self.waker.wake();
    }
}

/// A place to listen at, and whether somebody may wait there.
struct Accepting {
    listener: Listener,
    waiting: bool,
}

/// One link, and when it has to be looked at.
struct Entry {
    link: Link,
    deadline: Option<Instant>,
    queued: bool,
}

/// See the module's text.
pub struct Bridge {
    poll: Poll,
    listeners: Vec<Accepting>,
    accept_after: Option<Instant>,
    entries: Slab<Entry>,
    ready: VecDeque<usize>,
    deadlines: BTreeSet<(Instant, usize)>,
    tick: Option<Instant>,
    target: Target,
    lookups: (mpsc::Sender<Vec<SocketAddr>>, mpsc::Receiver<Vec<SocketAddr>>),
    limits: Limits,
    metrics: Metrics,
    notes: Notes,
    ending: Ending,
}

impl Bridge {
    /// One that listens already and serves nobody yet.
    ///
    /// # Errors
    /// If the system has no descriptor left.
    pub fn new(target: Target, listeners: Vec<Listener>, limits: Limits) -> Result<Self> {
        let poll = Poll::new().context("an event loop")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).context("an event loop")?);
        for (index, listener) in listeners.iter().enumerate() {
            let fd = listener.socket().as_raw_fd();
            let token = listener_token(index);
            poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE)?;
        }
        Ok(Self {
            poll,
            listeners: listeners
                .into_iter()
                .map(|listener| Accepting { listener, waiting: true })
                .collect(),
            accept_after: None,
            entries: Slab::new(),
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            tick: None,
            target,
            lookups: mpsc::channel(),
            limits,
            metrics: Metrics::default(),
            notes: Notes::default(),
            ending: Ending { asked: Arc::default(), waker },
        })
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// By which it is ended.
    pub fn ending(&self) -> Ending {
        self.ending.clone()
    }

    /// Serves until it is ended. `Ok(false)` if programs were left without an answer.
    ///
    /// # Errors
    /// If the system can't wait for events.
    pub fn run(&mut self) -> Result<bool> {
        let places: Vec<_> = self.listeners.iter().map(|it| it.listener.name.as_str()).collect();
        say(format_args!("from {} to {}", places.join(", "), self.target.name));
        // Nobody minds where there is no systemd.
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        let mut events = Events::with_capacity(EVENTS);
        while self.ending.asked.load(Ordering::Relaxed) == 0 {
            self.turn(&mut events, None)?;
        }
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        self.listeners.clear();
        self.drain(&mut events)
    }

    fn drain(&mut self, events: &mut Events) -> Result<bool> {
        say(format_args!("ending, {} programs are connected", self.entries.len()));
        let until = Instant::now() + self.limits.drain;
        let mut left = None;
        loop {
            let (now, asked) = (Instant::now(), self.ending.asked.load(Ordering::Relaxed));
            let late = now >= until || asked > 1;
            if late && left.is_none() {
                let count = self.entries.iter().filter(|(_, it)| it.link.is_served()).count();
                left = Some((count, now + self.target.timeout()));
            }
            for slot in self.slots() {
                self.with(slot, now, |link, around| match late {
                    true => link.end(around),
                    false => link.end_if_idle(around),
                });
                self.enqueue(slot);
            }
            let over = left.is_some_and(|(_, until)| now >= until) || asked > 2;
            if self.entries.is_empty() || over {
                let count = left.map_or(0, |(count, _)| count);
                if count > 0 {
                    say(format_args!("{count} programs had to go without an answer"));
                }
                return Ok(count == 0);
            }
            self.turn(events, Some(ENDING))?;
        }
    }

    fn slots(&self) -> Vec<usize> {
        self.entries.iter().map(|(slot, _)| slot).collect()
    }

    /// Waits for something to do, at most for so long, and does it.
    fn turn(&mut self, events: &mut Events, at_most: Option<Duration>) -> Result<()> {
        let timeout = self.timeout(Instant::now(), at_most);
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => events.clear(),
            outcome => outcome.context("waiting for events")?,
        }
        self.metrics.wakeups.inc();
        events.iter().for_each(|event| self.notice(event));
        let now = Instant::now();
        while let Ok(addresses) = self.lookups.1.try_recv() {
            self.target.set_addresses(addresses);
        }
        self.accept(now);
        while let Some(&(deadline, slot)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.set_deadline(slot, None);
            self.enqueue(slot);
        }
        if self.tick.is_some_and(|at| now >= at) {
            self.tick(now);
        }
        // Those that want another turn have it after the next look at the events.
        for _ in 0..self.ready.len() {
            let Some(slot) = self.ready.pop_front() else { break };
            self.go(slot, now);
        }
        if self.entries.is_empty() {
            self.tick = None;
        }
        Ok(())
    }

    fn timeout(&self, now: Instant, at_most: Option<Duration>) -> Option<Duration> {
        let waiting = self.listeners.iter().any(|it| it.waiting);
        let accepting = waiting.then(|| self.accept_after.unwrap_or(now));
        let turn = (!self.ready.is_empty()).then_some(now);
        let deadline = self.deadlines.first().map(|(deadline, _)| *deadline);
        let next = [accepting, turn, deadline, self.tick].into_iter().flatten().min();
        let until = next.map(|next| next.saturating_duration_since(now));
        until.into_iter().chain(at_most).min()
    }

    fn notice(&mut self, event: &Event) {
        if event.token() == WAKER {
            return;
        }
        if let Some(accepting) = self.listeners.get_mut(usize::MAX - 1 - event.token().0) {
            accepting.waiting = true;
            return;
        }
        let (slot, part) = Watch::of(event.token());
        // One that is over may have left an event behind.
        let Some(entry) = self.entries.get_mut(slot) else { return };
        match part {
            Part::Socket => entry.link.notice_socket(
                event.is_readable(),
                event.is_writable(),
                event.is_read_closed(),
                event.is_write_closed() || event.is_error(),
            ),
            other => entry.link.notice(other),
        }
        self.enqueue(slot);
    }

    fn enqueue(&mut self, slot: usize) {
        if let Some(entry) = self.entries.get_mut(slot)
            && !std::mem::replace(&mut entry.queued, true)
        {
            self.ready.push_back(slot);
        }
    }

    fn set_deadline(&mut self, slot: usize, deadline: Option<Instant>) {
        let Some(entry) = self.entries.get_mut(slot) else { return };
        if entry.deadline == deadline {
            return;
        }
        if let Some(old) = std::mem::replace(&mut entry.deadline, deadline) {
            self.deadlines.remove(&(old, slot));
        }
        if let Some(new) = deadline {
            self.deadlines.insert((new, slot));
        }
    }

    /// Has a link do something, with all that it needs.
    fn with<T>(
        &mut self,
        slot: usize,
        now: Instant,
        act: impl FnOnce(&mut Link, &mut Around<'_>) -> T,
    ) -> Option<T> {
        let entry = self.entries.get_mut(slot)?;
        let mut around = Around {
            target: &mut self.target,
            watch: Watch::new(self.poll.registry(), slot),
            metrics: &self.metrics,
            notes: &mut self.notes,
            now,
        };
        Some(act(&mut entry.link, &mut around))
    }

    fn go(&mut self, slot: usize, now: Instant) {
        if let Some(entry) = self.entries.get_mut(slot) {
            entry.queued = false;
        }
        match self.with(slot, now, Link::go) {
            Some(Next::Event(deadline)) => self.set_deadline(slot, deadline),
            Some(Next::Turn) => {
                self.set_deadline(slot, None);
                self.enqueue(slot);
            }
            Some(Next::Over) => {
                self.set_deadline(slot, None);
                self.entries.remove(slot);
            }
            None => {}
        }
    }

    fn tick(&mut self, now: Instant) {
        self.tick = Some(now + TICK);
        for slot in self.slots() {
            if self.with(slot, now, |link, _| link.tick(now)) == Some(true) {
                self.enqueue(slot);
            }
        }
    }

    fn accept(&mut self, now: Instant) {
        if self.accept_after.is_some_and(|at| now < at) {
            return;
        }
        self.accept_after = None;
        for index in 0..self.listeners.len() {
            for _ in 0..ACCEPTS {
                if !self.listeners[index].waiting {
                    break;
                }
                match self.listeners[index].listener.accept() {
                    Ok(socket) => self.add(socket, now),
                    Err(error) => match error.kind() {
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                        io::ErrorKind::WouldBlock => self.listeners[index].waiting = false,
                        _ => {
                            let message = format_args!("cannot accept a program: {error}");
                            self.notes.say(now, "accept", message);
                            self.accept_after = Some(now + EXHAUSTED);
                            return;
                        }
                    },
                }
            }
        }
    }

    fn add(&mut self, socket: socket2::Socket, now: Instant) {
        let served = self.entries.iter().filter(|(_, it)| it.link.is_served()).count();
        let limit = self.limits.connections;
        if served < limit {
            self.look_up(now);
        } else {
            self.metrics.refused(Reason::Limit);
            let message = format_args!(
                "a program is refused: {served} are connected, and more may not \
                 (--max-connections)"
            );
            self.notes.say(now, "limit", message);
            if self.entries.len() >= limit + TOLD {
                return;
            }
        }
        let slot = self.entries.vacant_key();
        let fd = socket.as_raw_fd();
        let watch = Watch::new(self.poll.registry(), slot);
        if let Err(error) = watch.add(fd, Part::Socket) {
            self.notes.say(now, "watch", format_args!("cannot serve a program: {error}"));
            return;
        }
        let mut around = Around {
            target: &mut self.target,
            watch,
            metrics: &self.metrics,
            notes: &mut self.notes,
            now,
        };
        let link = match served < limit {
            true => Link::new(socket, &mut around),
            false => Link::refused(socket, "too many programs are connected", &mut around),
        };
        self.entries.insert(Entry { link, deadline: None, queued: false });
        self.enqueue(slot);
        self.tick.get_or_insert(now + TICK);
    }

    /// Looks the server's name up again if that is due, in a thread that may wait.
    fn look_up(&mut self, now: Instant) {
        let Some(lookup) = self.target.lookup(now) else { return };
        let (sender, waker) = (self.lookups.0.clone(), Arc::clone(&self.ending.waker));
        std::thread::spawn(move || {
            let _ = sender.send(lookup());
            let _ = waker.wake();
        });
    }
}

fn listener_token(index: usize) -> Token {
    Token(usize::MAX - 1 - index)
}
