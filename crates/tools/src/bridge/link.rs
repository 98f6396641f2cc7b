// SPDX-License-Identifier: BSD-3-Clause
//! One program and its way to the server: bytes both ways, and how it ends.
//!
//! Sockets and channels are watched by edges: what was readable or writable is taken for so
//! until an attempt says otherwise, so that a link with nothing to do is never woken. What one
//! side does not take stays where it is, in the other's socket or window, which then fills up
//! and holds that side back.

use crate::bridge::attempt::{Attempt, Reached, Target};
use crate::bridge::carrier::Carrier;
use crate::bridge::metrics::{Direction, Metrics, Reason};
use crate::bridge::notes::Notes;
use crate::bridge::watch::{Part, Watch};
use prometheus_client::metrics::counter::Counter;
use socket2::Socket;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

/// Bytes that one link carries each way before another has its turn.
const TURN: usize = 1 << 20;

/// Bytes that a program is asked for at first and at most. A piece that was filled is followed
/// by one four times as large: large ones take more of the connection's memory.
const PIECES: (usize, usize) = (4 << 10, 256 << 10);

/// How long a server is waited for that has not answered yet, when the program has ended its
/// side; and how long for more, when it has. Only the program knows how many answers there are.
const ANSWER: Duration = Duration::from_secs(1);
const MORE: Duration = Duration::from_millis(100);

/// How long a program may take to read the last bytes before it sees the end, and to end its
/// own side after that. Its socket is not closed before, or what it still sends would have the
/// kernel forget the last bytes.
const LAST_WORDS: Duration = Duration::from_secs(60);
const FAREWELL: Duration = Duration::from_secs(1);

/// A program's connection and the server's.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    stage: Stage,
    readable: bool,
    writable: bool,
    /// The program has ended its side, which a read will tell.
    hung_up: bool,
    /// Nobody is there any more who reads. What was sent before is carried out.
    gone: bool,
    piece: usize,
    /// When a byte moved last, and whether it was the server's.
    moved: Instant,
    answered: bool,
    to_server: Counter,
    to_program: Counter,
}

#[derive(Debug)]
enum Stage {
    Connecting(Attempt),
    /// Both ways; with the time at which the program's end was seen, the server's alone.
    Serving {
        carrier: Carrier,
        ended: bool,
    },
    /// What the program sent is on its way to the server; nothing else matters any more.
    Delivering {
        carrier: Carrier,
        until: Instant,
    },
    /// The last line, of which so many bytes are written.
    Refusing {
        line: String,
        written: usize,
        until: Instant,
    },
    /// The program is to see the end.
    Parting {
        until: Instant,
    },
    Over,
}

/// What a link needs of the bridge.
pub struct Around<'a> {
    /// Who serves.
    pub target: &'a mut Target,
    /// What is watched.
    pub watch: Watch<'a>,
    /// What is counted.
    pub metrics: &'a Metrics,
    /// What is said.
    pub notes: &'a mut Notes,
    /// The time.
    pub now: Instant,
}

/// When a link has something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// When a descriptor tells of something, or at a time.
    Event(Option<Instant>),
    /// Now, after the others.
    Turn,
    /// Never.
    Over,
}

/// How far one direction got.
enum Flow {
    Waits,
    Turn,
    /// The side that the bytes come from has ended.
    Ended,
    /// The program is gone.
    Gone,
    /// The server is gone.
    Lost(String),
}

impl Link {
    /// A program that has just connected: the server is asked for a connection.
    pub fn new(socket: Socket, around: &mut Around<'_>) -> Self {
        let attempt = Attempt::begin(around.target, around.now);
        Self::in_stage(socket, Stage::Connecting(attempt), around)
    }

    /// A program that is told why not.
    pub fn refused(socket: Socket, why: &str, around: &mut Around<'_>) -> Self {
        let stage = refusal(why, around.now);
        Self::in_stage(socket, stage, around)
    }

    fn in_stage(socket: Socket, stage: Stage, around: &mut Around<'_>) -> Self {
        Self {
            socket,
            stage,
            readable: true,
            writable: true,
            hung_up: false,
            gone: false,
            piece: PIECES.0,
            moved: around.now,
            answered: true,
            to_server: around.metrics.bytes(Direction::ToServer),
            to_program: around.metrics.bytes(Direction::ToPrograms),
        }
    }

    /// Whether it counts among those that are served.
    pub fn is_served(&self) -> bool {
        matches!(self.stage, Stage::Connecting(_) | Stage::Serving { .. })
    }

    /// Its socket told of something.
    pub fn notice_socket(&mut self, readable: bool, writable: bool, hung_up: bool, gone: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable;
        self.hung_up |= hung_up;
        self.gone |= gone;
    }

    /// Another of its descriptors told of something.
    pub fn notice(&mut self, part: Part) {
        let (Stage::Serving { carrier, .. } | Stage::Delivering { carrier, .. }) = &mut self.stage
        else {
            return;
        };
        carrier.notice(part);
    }

    /// Once a second. Whether it has to go on.
    pub fn tick(&mut self, now: Instant) -> bool {
        let Stage::Serving { carrier, .. } = &mut self.stage else { return false };
        carrier.tick();
        // Bytes of a server that has gone, and a program that does not take them.
        self.gone |= !carrier.is_connected() && !self.writable && now >= self.moved + LAST_WORDS;
        !carrier.is_connected()
    }

    /// Ends it, if no answer is awaited as far as can be told.
    pub fn end_if_idle(&mut self, around: &mut Around<'_>) {
        let quiet = self.answered && around.now >= self.moved + MORE;
        if matches!(self.stage, Stage::Serving { .. }) && quiet {
            self.end(around);
        }
    }

    /// Ends it, whatever is awaited.
    pub fn end(&mut self, around: &mut Around<'_>) {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Serving { carrier, .. } => self.deliver(carrier, around),
            Stage::Connecting(_) => self.stage = refusal("it is shutting down", around.now),
            other => self.stage = other,
        }
    }

    fn deliver(&mut self, carrier: Carrier, around: &Around<'_>) {
        around.metrics.disconnected(carrier.by());
        let until = around.now + around.target.timeout();
        self.stage = Stage::Delivering { carrier, until };
    }

    fn part(&mut self, now: Instant) {
        // The program may be gone already.
        let _ = self.socket.shutdown(Shutdown::Write);
        self.stage = Stage::Parting { until: now + FAREWELL };
    }

    /// Does all that can be done now, and says when there will be more.
    pub fn go(&mut self, around: &mut Around<'_>) -> Next {
        loop {
            match std::mem::replace(&mut self.stage, Stage::Over) {
                Stage::Connecting(attempt) => {
                    if let Some(next) = self.connect(attempt, around) {
                        return next;
                    }
                }
                Stage::Serving { carrier, ended } => {
                    if let Some(next) = self.serve(carrier, ended, around) {
                        return next;
                    }
                }
                Stage::Delivering { mut carrier, until } => match carrier.try_close() {
                    Ok(false) if around.now < until => {
                        self.stage = Stage::Delivering { carrier, until };
                        return Next::Event(Some(until));
                    }
                    _ => {
                        drop(carrier);
                        self.part(around.now);
                    }
                },
                Stage::Refusing { line, mut written, until } => {
                    if self.gone || around.now >= until {
                        return Next::Over;
                    }
                    match (&self.socket).write(&line.as_bytes()[written..]) {
                        Ok(count) => written += count,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.stage = Stage::Refusing { line, written, until };
                            return Next::Event(Some(until));
                        }
                        Err(_) => return Next::Over,
                    }
                    if written < line.len() {
                        self.stage = Stage::Refusing { line, written, until };
                    } else {
                        self.part(around.now);
                    }
                }
                Stage::Parting { until } => {
                    if self.gone || around.now >= until {
                        return Next::Over;
                    }
                    self.stage = Stage::Parting { until };
                    return self.forget(until);
                }
                Stage::Over => return Next::Over,
            }
        }
    }

    fn connect(&mut self, mut attempt: Attempt, around: &mut Around<'_>) -> Option<Next> {
        let name = around.target.name.clone();
        match attempt.progress(around.target, around.now, &around.watch) {
            Reached::NotYet => {
                let deadline = attempt.deadline();
                self.stage = Stage::Connecting(attempt);
                Some(Next::Event(Some(deadline)))
            }
            Reached::Server(carrier) => {
                around.metrics.connected(carrier.by());
                if let (Carrier::Tcp(_), error) = (&carrier, attempt.failed()) {
                    let why = error.map_or_else(
                        || String::from("RDMA has just failed"),
                        |it| format!("{it:#}"),
                    );
                    let message = format_args!("a program reaches {name} over TCP: {why}");
                    around.notes.say(around.now, "fallback", message);
                }
                self.moved = around.now;
                self.stage = Stage::Serving { carrier, ended: false };
                None
            }
            Reached::Nobody(error) => {
                let why = format!("{error:#}");
                around.metrics.refused(Reason::Unreachable);
                let message = format_args!("a program is refused: {why}");
                around.notes.say(around.now, "unreachable", message);
                self.stage = refusal(&why, around.now);
                None
            }
        }
    }

    /// Bytes both ways, as far as they go. `None` if that led to another stage.
    fn serve(
        &mut self,
        mut carrier: Carrier,
        mut ended: bool,
        around: &mut Around<'_>,
    ) -> Option<Next> {
        let out = self.feed_program(&mut carrier, around.now);
        let inward = match ended {
            true => Flow::Waits,
            false => self.feed_server(&mut carrier, around.now),
        };
        ended |= matches!(inward, Flow::Ended);
        if let Flow::Lost(error) = &out {
            let message = format_args!("a connection to {}: {error}", around.target.name);
            around.notes.say(around.now, "lost", message);
        }
        match (out, inward) {
            (Flow::Ended | Flow::Lost(_), _) => {
                around.metrics.disconnected(carrier.by());
                drop(carrier);
                self.part(around.now);
                return None;
            }
            // Nobody will send more, or read what comes.
            (_, Flow::Gone) => {
                self.deliver(carrier, around);
                return None;
            }
            _ if self.gone && (ended || !self.readable) => {
                self.deliver(carrier, around);
                return None;
            }
            // The server's last words come first, for which the program has no room.
            (Flow::Waits, Flow::Lost(_)) if !self.writable => {}
            (Flow::Turn, _) | (_, Flow::Turn | Flow::Lost(_)) => {
                self.stage = Stage::Serving { carrier, ended };
                return Some(Next::Turn);
            }
            _ => {}
        }
        let mut deadline = None;
        if ended && self.writable {
            // Nothing waits for the program: how long has the server been silent?
            let patience = if self.answered { MORE } else { ANSWER };
            let until = self.moved + patience;
            if around.now >= until {
                self.deliver(carrier, around);
                return None;
            }
            deadline = Some(until);
        }
        self.stage = Stage::Serving { carrier, ended };
        Some(Next::Event(deadline))
    }

    /// From the server's window straight into the program's socket.
    fn feed_program(&mut self, carrier: &mut Carrier, now: Instant) -> Flow {
        let mut left = TURN;
        while self.writable || self.gone {
            if left == 0 {
                return Flow::Turn;
            }
            let bytes = match carrier.fill_buf() {
                Ok([]) => return Flow::Ended,
                Ok(bytes) => &bytes[..bytes.len().min(left)],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flow::Waits,
                Err(error) => return Flow::Lost(error.to_string()),
            };
            let count = match self.gone {
                true => Ok(bytes.len()),
                false => (&self.socket).write(bytes),
            };
            match count {
                Ok(count) => {
                    // The socket took what it has room for.
                    self.writable = count == bytes.len();
                    carrier.consume(count);
                    left -= count;
                    self.to_program.inc_by(count as u64);
                    (self.moved, self.answered) = (now, true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.gone = true,
            }
        }
        Flow::Waits
    }

    /// From the program's socket straight into registered memory.
    fn feed_server(&mut self, carrier: &mut Carrier, now: Instant) -> Flow {
        let mut left = TURN;
        while self.readable {
            if left == 0 {
                return Flow::Turn;
            }
            let mut room = 0;
            let filled = carrier.fill(self.piece.min(left), |place| {
                room = place.len();
                (&self.socket).read(place)
            });
            match filled {
                Err(error) => return Flow::Lost(error.to_string()),
                Ok(None) => return Flow::Waits,
                Ok(Some(Ok(0))) => {
                    self.readable = false;
                    return Flow::Ended;
                }
                Ok(Some(Ok(count))) => {
                    // A socket that gave less has no more, but for its end.
                    self.readable = count == room || self.hung_up;
                    self.piece = match count == self.piece {
                        true => (4 * self.piece).min(PIECES.1),
                        false if count < self.piece / 4 => PIECES.0,
                        false => self.piece,
                    };
                    left -= count;
                    self.to_server.inc_by(count as u64);
                    (self.moved, self.answered) = (now, false);
                }
                Ok(Some(Err(error))) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => self.readable = false,
                    _ => return Flow::Gone,
                },
            }
        }
        Flow::Waits
    }

    /// Reads what nobody wants, until the program ends its side too.
    fn forget(&mut self, until: Instant) -> Next {
        let mut nowhere = [0; 4096];
        for _ in 0..16 {
            match (&self.socket).read(&mut nowhere) {
                Ok(0) => return Next::Over,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Next::Event(Some(until));
                }
                Err(_) => return Next::Over,
            }
        }
        Next::Turn
    }
}

/// A line of the protocol's, which every client shows to its user.
fn refusal(why: &str, now: Instant) -> Stage {
    let why: String = why.chars().map(|it| if it.is_control() { ' ' } else { it }).collect();
    let line = format!("-ERR valkey-rdma bridge: {why}\r\n");
    Stage::Refusing { line, written: 0, until: now + FAREWELL }
}
