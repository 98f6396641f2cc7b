// SPDX-License-Identifier: BSD-3-Clause
//! What a server answers (RESP2), read with bounds: on time, size and depth.

use anyhow::{Context, Result, bail, ensure};
use std::io::{self, BufRead};
use std::time::Instant;

/// The longest line: a number, or an error's text.
const LINE: usize = 64 << 10;
/// The longest string that a server holds.
const STRING: usize = 512 << 20;
/// The most elements in all, of which a client of `RDMA.CLIENTS` has fewer than fifty.
const ELEMENTS: u64 = 100_000_000;
/// Lists within lists.
const DEPTH: u32 = 8;

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A simple or a bulk string.
    Text(Vec<u8>),
    /// A number.
    Number(i64),
    /// There is no value.
    Nothing,
    /// Values in their order. A map is names and values by turns.
    List(Vec<Reply>),
}

impl Reply {
    /// Of which kind it is, in words.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Number(_) => "a number",
            Self::Nothing => "nothing",
            Self::List(_) => "a list",
        }
    }

    /// A text.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Text(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        }
    }
}

/// The server's answer is an error.
#[derive(Debug)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server answers: {}", self.0)
    }
}

impl std::error::Error for Refused {}

/// Reads one answer, which has to be complete at `deadline`.
///
/// # Errors
/// The connection's; a [`Refused`]; or that it is no answer.
pub fn read(stream: &mut impl BufRead, deadline: Option<Instant>) -> Result<Reply> {
    Reader { stream, deadline, left: ELEMENTS }.reply(0)
}

struct Reader<'a, S> {
    stream: &'a mut S,
    deadline: Option<Instant>,
    /// How many more elements there may be.
    left: u64,
}

impl<S: BufRead> Reader<'_, S> {
    fn reply(&mut self, depth: u32) -> Result<Reply> {
        ensure!(depth < DEPTH, "an answer of too many lists within lists");
        let line = self.line()?;
        let Some((kind, rest)) = line.split_first() else { bail!("an empty answer") };
        let text = String::from_utf8_lossy(rest);
        let number = || -> Result<i64> {
            text.parse().with_context(|| format!("the answer '{}{text}'", char::from(*kind)))
        };
        match kind {
            b'+' => Ok(Reply::Text(rest.to_vec())),
            b'-' => Err(Refused(text.into_owned()).into()),
            b':' => Ok(Reply::Number(number()?)),
            b'$' => match number()? {
                -1 => Ok(Reply::Nothing),
                length => Ok(Reply::Text(self.string(length)?)),
            },
            b'*' => match number()? {
                -1 => Ok(Reply::Nothing),
                count => {
                    let count = u64::try_from(count).ok().filter(|count| *count <= self.left);
                    let count = count.context("a list that is too long")?;
                    self.left -= count;
                    (0..count)
                        .map(|_| self.reply(depth + 1))
                        .collect::<Result<_>>()
                        .map(Reply::List)
                }
            },
            other => bail!("the server answers with a '{}'", char::from(*other)),
        }
    }

    /// What has arrived, which is more than nothing. The clock is looked at before each wait: many
    /// small pieces take as little as one large one.
    fn arrived(&mut self) -> Result<&[u8]> {
        let late = self.deadline.is_some_and(|deadline| Instant::now() > deadline);
        ensure!(!late, io::Error::new(io::ErrorKind::TimedOut, "the answer takes too long"));
        loop {
            match self.stream.fill_buf() {
                Ok(bytes) => ensure!(!bytes.is_empty(), "the connection has ended"),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            // As it is there, this does not wait.
            return Ok(self.stream.fill_buf()?);
        }
    }

    /// A line without its end.
    fn line(&mut self) -> Result<Vec<u8>> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            ensure!(line.len() < LINE, "a line without an end");
            let bytes = self.arrived()?;
            let count =
                bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |at| at + 1);
            line.extend_from_slice(&bytes[..count]);
            self.stream.consume(count);
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }

    /// A string, and the line's end behind it. Memory grows with what arrives, not with what
    /// was said.
    fn string(&mut self, length: i64) -> Result<Vec<u8>> {
        let length = usize::try_from(length).ok().filter(|length| *length <= STRING);
        let whole = length.context("a string that is too long")? + 2;
        let mut string = Vec::new();
        while string.len() < whole {
            let bytes = self.arrived()?;
            let count = bytes.len().min(whole - string.len());
            string.extend_from_slice(&bytes[..count]);
            self.stream.consume(count);
        }
        ensure!(string.ends_with(b"\r\n"), "a string without an end");
        string.truncate(whole - 2);
        Ok(string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn of(text: &str) -> Result<Reply> {
        read(&mut text.as_bytes(), None)
    }

    #[test]
    fn answers_of_each_kind_are_read() {
        let text = |text: &str| Reply::Text(text.into());
        assert_eq!(of("+OK\r\n").unwrap(), text("OK"));
        assert_eq!(of("$0\r\n\r\n").unwrap(), text(""));
        assert_eq!(of("$-1\r\n").unwrap(), Reply::Nothing);
        let list = of("*2\r\n*1\r\n:-7\r\n$4\r\na\r\nb\r\n").unwrap();
        assert_eq!(list, Reply::List(vec![Reply::List(vec![Reply::Number(-7)]), text("a\r\nb")]));
        let refused = of("-NOAUTH who are you\r\n").unwrap_err();
        assert_eq!(refused.downcast::<Refused>().unwrap().0, "NOAUTH who are you");
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for text in
            ["", "\r\n", "+OK", "$3\r\nab", "$2\r\nabcd", "$-7\r\n", "*99999999999\r\n", "?\r\n"]
        {
            assert!(of(text).is_err(), "{text:?}");
        }
        assert!(of(&"*1\r\n".repeat(100)).is_err());
    }

    #[test]
    fn the_deadline_is_the_whole_answer_s() {
        let past = Instant::now().checked_sub(Duration::from_secs(1));
        let error = read(&mut &b"+OK\r\n"[..], past).unwrap_err();
        let error = error.downcast::<io::Error>().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
