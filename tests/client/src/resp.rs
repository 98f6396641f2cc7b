// SPDX-License-Identifier: BSD-3-Clause
//! RESP2 and RESP3, as much as tests need, over any byte stream.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A connection as RESP sees it: bytes in order, both ways.
pub trait Stream {
    /// Sends all of `bytes` before `deadline`.
    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<()>;

    /// Waits until `deadline` for at least one byte and appends what came to `into`.
    fn receive(&mut self, into: &mut Vec<u8>, deadline: Instant) -> Result<()>;
}

/// A reply of the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `+OK` and the like.
    Simple(String),
    /// An error's text.
    Error(String),
    /// An integer.
    Integer(i64),
    /// Bytes with their length before them.
    Bulk(Vec<u8>),
    /// No value.
    Null,
    /// Several replies; maps are flattened into their keys and values.
    Array(Vec<Value>),
}

impl Value {
    /// The bytes of a string reply of either kind.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Simple(text) => Some(text.as_bytes()),
            Self::Bulk(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The reply as text, for messages and for replies that are text.
    pub fn text(&self) -> String {
        self.to_string()
    }

    /// The elements of an array reply.
    pub fn elements(&self) -> &[Value] {
        match self {
            Self::Array(elements) => elements,
            _ => &[],
        }
    }

    /// Whether this is an error reply.
    pub fn is_error(&self) -> bool {
        matches!(self, Self::Error(_))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Simple(text) => out.write_str(text),
            Self::Error(text) => write!(out, "-{text}"),
            Self::Integer(number) => write!(out, "{number}"),
            Self::Bulk(bytes) => out.write_str(&String::from_utf8_lossy(bytes)),
            Self::Null => out.write_str("(null)"),
            Self::Array(elements) => {
                out.write_str("[")?;
                for (number, element) in elements.iter().enumerate() {
                    let separator = if number == 0 { "" } else { " " };
                    write!(out, "{separator}{element}")?;
                }
                out.write_str("]")
            }
        }
    }
}

/// Appends the request for `arguments` to `into`.
pub fn encode(into: &mut Vec<u8>, arguments: &[&[u8]]) {
    into.extend_from_slice(format!("*{}\r\n", arguments.len()).as_bytes());
    for argument in arguments {
        into.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        into.extend_from_slice(argument);
        into.extend_from_slice(b"\r\n");
    }
}

/// Reads one reply at the beginning of `bytes`: the reply and its length, or `None` while it
/// is incomplete.
fn parse(bytes: &[u8]) -> Result<Option<(Value, usize)>> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return Ok(None);
    };
    let after = end + 2;
    let line = std::str::from_utf8(&bytes[1..end]).map_err(|_| violation(bytes))?;
    let number = || line.parse::<i64>().map_err(|_| violation(bytes));
    let value = match bytes[0] {
        b'+' | b',' | b'(' => Value::Simple(line.to_owned()),
        b'#' => Value::Integer((line == "t").into()),
        b'-' => Value::Error(line.to_owned()),
        b':' => Value::Integer(number()?),
        b'_' => Value::Null,
        b'$' | b'=' | b'!' => {
            let Ok(length) = usize::try_from(number()?) else {
                return Ok(Some((Value::Null, after)));
            };
            let Some(payload) = bytes.get(after..after + length + 2) else {
                return Ok(None);
            };
            return Ok(Some((Value::Bulk(payload[..length].to_vec()), after + length + 2)));
        }
        kind @ (b'*' | b'%' | b'~' | b'>') => {
            let Ok(count) = usize::try_from(number()?) else {
                return Ok(Some((Value::Null, after)));
            };
            let count = if kind == b'%' { count * 2 } else { count };
            let mut elements = Vec::new();
            let mut position = after;
            for _ in 0..count {
                let Some((element, length)) = parse_more(&bytes[position..])? else {
                    return Ok(None);
                };
                elements.push(element);
                position += length;
            }
            return Ok(Some((Value::Array(elements), position)));
        }
        _ => return Err(violation(bytes)),
    };
    Ok(Some((value, after)))
}

fn parse_more(bytes: &[u8]) -> Result<Option<(Value, usize)>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    parse(bytes)
}

fn violation(bytes: &[u8]) -> Error {
    let start = &bytes[..bytes.len().min(40)];
    Error::Protocol(format!("not a reply: {:?}", String::from_utf8_lossy(start)))
}

/// How many bytes the reply at the beginning of `bytes` needs at least. It spares reading a
/// large value again from its start with every piece that arrives.
fn needed(bytes: &[u8]) -> usize {
    let header = &bytes[..bytes.len().min(32)];
    match header.windows(2).position(|pair| pair == b"\r\n") {
        Some(end) if header[0] == b'$' => std::str::from_utf8(&header[1..end])
            .ok()
            .and_then(|line| line.parse::<usize>().ok())
            .map_or(end + 2, |length| end + 2 + length + 2),
        _ => 1,
    }
}

/// A client: requests out, replies in, every call bounded by one time-out.
pub struct Client<S> {
    stream: S,
    /// Bytes that arrived, of which those before `taken` were handed out.
    arrived: Vec<u8>,
    taken: usize,
    timeout: Duration,
}

impl<S: Stream> Client<S> {
    /// Speaks RESP over `stream`.
    pub fn new(stream: S, timeout: Duration) -> Self {
        Self { stream, arrived: Vec::new(), taken: 0, timeout }
    }

    /// The connection below.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The connection below, for good.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Changes the time-out of the calls to come.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends a request and leaves its reply for [`Self::reply`].
    pub fn request(&mut self, arguments: &[&[u8]]) -> Result<()> {
        let mut request = Vec::new();
        encode(&mut request, arguments);
        self.send(&request)
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.send(bytes, Instant::now() + self.timeout)
    }

    /// Waits for the next reply.
    pub fn reply(&mut self) -> Result<Value> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let unread = &self.arrived[self.taken..];
            let wanted = needed(unread);
            let complete = match unread.len() >= wanted {
                true => parse_more(unread)?,
                false => None,
            };
            if let Some((value, length)) = complete {
                self.taken += length;
                if self.taken == self.arrived.len() {
                    self.arrived.clear();
                    self.taken = 0;
                }
                return Ok(value);
            }
            self.arrived.drain(..self.taken);
            self.taken = 0;
            self.arrived.reserve(wanted.saturating_sub(self.arrived.len()));
            self.stream.receive(&mut self.arrived, deadline)?;
        }
    }

    /// Sends a request and waits for its reply, an error reply included.
    pub fn command(&mut self, arguments: &[&[u8]]) -> Result<Value> {
        self.request(arguments)?;
        self.reply()
    }

    /// A request of plain words, such as `"CONFIG GET maxclients"`.
    pub fn words(&mut self, line: &str) -> Result<Value> {
        let arguments: Vec<&[u8]> = line.split_whitespace().map(str::as_bytes).collect();
        self.command(&arguments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that hands out one prepared piece for each call.
    struct Pieces(Vec<Vec<u8>>);

    impl Stream for Pieces {
        fn send(&mut self, _: &[u8], _: Instant) -> Result<()> {
            Ok(())
        }
        fn receive(&mut self, into: &mut Vec<u8>, _: Instant) -> Result<()> {
            if self.0.is_empty() {
                return Err(Error::Closed);
            }
            into.extend(self.0.remove(0));
            Ok(())
        }
    }

    fn replies(bytes: &[u8], piece: usize) -> Vec<Value> {
        let pieces = bytes.chunks(piece).map(<[u8]>::to_vec).collect();
        let mut client = Client::new(Pieces(pieces), Duration::from_secs(1));
        let mut values = Vec::new();
        while let Ok(value) = client.reply() {
            values.push(value);
        }
        values
    }

    #[test]
    fn replies_are_the_same_however_they_are_cut() {
        let bytes =
            b"+OK\r\n$5\r\nhe\r\nl\r\n*2\r\n:7\r\n$-1\r\n-ERR no\r\n%1\r\n+a\r\n_\r\n$0\r\n\r\n";
        let whole = replies(bytes, bytes.len());
        assert_eq!(
            whole,
            [
                Value::Simple("OK".into()),
                Value::Bulk(b"he\r\nl".into()),
                Value::Array(vec![Value::Integer(7), Value::Null]),
                Value::Error("ERR no".into()),
                Value::Array(vec![Value::Simple("a".into()), Value::Null]),
                Value::Bulk(Vec::new()),
            ]
        );
        for piece in 1..bytes.len() {
            assert_eq!(replies(bytes, piece), whole, "pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_reply_is_a_violation() {
        let mut client = Client::new(Pieces(vec![b"hello\r\n".to_vec()]), Duration::from_secs(1));
        assert!(matches!(client.reply(), Err(Error::Protocol(_))));
    }

    #[test]
    fn requests_carry_lengths() {
        let mut bytes = Vec::new();
        encode(&mut bytes, &[b"SET", b"k", b""]);
        assert_eq!(bytes, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n");
    }
}
