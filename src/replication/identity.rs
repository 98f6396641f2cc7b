// SPDX-License-Identifier: BSD-3-Clause
//! Who a server is. An address and a port may lead to one server over TCP and to another over
//! RDMA (containers, address translation, a proxy), and a replica of the wrong one would lose
//! its data. So each server with this module has an identity, drawn when it is loaded, and tells
//! it to anybody who asks. A replica asks over both ways, and compares.

use std::fmt;
use std::io;
use std::sync::OnceLock;

/// The question, a command without arguments as people type it.
pub const QUESTION: &[u8] = b"RDMA.IDENTITY\r\n";

/// Bytes of an answer that is one, at most.
pub const LONGEST_ANSWER: usize = 256;

const BYTES: usize = 20;

/// One server process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity([u8; BYTES]);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

static OWN: OnceLock<Identity> = OnceLock::new();

/// Draws this server's identity. Once, while the module loads.
///
/// # Errors
/// If the kernel has no random numbers.
pub fn draw() -> io::Result<()> {
    let mut bytes = [0; BYTES];
    // SAFETY: a place for as many bytes.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), BYTES, 0) };
    if count != BYTES as isize {
        return Err(io::Error::last_os_error());
    }
    let _ = OWN.set(Identity(bytes));
    Ok(())
}

/// This server's identity.
///
/// # Panics
/// Before it was drawn.
pub fn own() -> Identity {
    *OWN.get().expect("drawn at load")
}

/// What a server answered, as far as it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Its identity.
    Is(Identity),
    /// Something else: its first line.
    Other(String),
    /// The line is not complete.
    Incomplete,
}

/// Reads an answer.
pub fn read(bytes: &[u8]) -> Answer {
    let Some(end) = bytes.iter().position(|&byte| byte == b'\n') else {
        return match bytes.len() < LONGEST_ANSWER {
            true => Answer::Incomplete,
            false => Answer::Other(String::from("more than one line")),
        };
    };
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    let identity = line.strip_prefix(b"+").filter(|digits| digits.len() == 2 * BYTES);
    let identity = identity.and_then(|digits| {
        let mut found = [0; BYTES];
        for (place, pair) in found.iter_mut().zip(digits.chunks_exact(2)) {
            *place = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Identity(found))
    });
    match identity {
        // Nothing else was asked.
        Some(identity) if end + 1 == bytes.len() => Answer::Is(identity),
        _ => Answer::Other(String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_told_and_understood() {
        draw().unwrap();
        let answer = format!("+{}\r\n", own());
        assert_eq!(read(answer.as_bytes()), Answer::Is(own()));
        for end in 0..answer.len() {
            assert_eq!(read(&answer.as_bytes()[..end]), Answer::Incomplete);
        }
    }

    #[test]
    fn what_is_no_identity_is_something_else() {
        let of = |digits: &str| format!("+{digits}\r\n");
        for text in [
            "-ERR unknown command 'RDMA.IDENTITY', with args beginning with: \r\n",
            "-NOAUTH Authentication required.\r\n",
            "\r\n",
            "\n",
            "+\r\n",
            &of(&"a".repeat(39)),
            &of(&"a".repeat(41)),
            &of(&"g".repeat(40)),
            &of(&"é".repeat(20)),
            &(of(&"a".repeat(40)) + "+OK\r\n"),
            &"x".repeat(LONGEST_ANSWER),
        ] {
            assert!(matches!(read(text.as_bytes()), Answer::Other(_)), "{text}");
        }
        assert_eq!(read(of(&"0a".repeat(20)).as_bytes()), Answer::Is(Identity([10; BYTES])));
    }
}
