// SPDX-License-Identifier: BSD-3-Clause
//! Lines of the log. What can repeat is told a few times a minute and counted besides.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(60);
const PER_INTERVAL: u32 = 3;

/// A line, whatever it says.
pub fn say(message: fmt::Arguments<'_>) {
    eprintln!("valkey-rdma bridge: {message}");
}

#[derive(Debug)]
struct Kind {
    since: Instant,
    said: u32,
    unsaid: u64,
}

/// Which lines of each kind were said lately.
#[derive(Debug, Default)]
pub struct Notes {
    kinds: HashMap<&'static str, Kind>,
}

impl Notes {
    /// Says a line of a kind, unless enough of it were said in this minute. The next one then
    /// ends with the number of those that were not.
    pub fn say(&mut self, now: Instant, kind: &'static str, message: fmt::Arguments<'_>) {
        if let Some(more) = self.allow(now, kind) {
            say(format_args!("{message}{more}"));
        }
    }

    fn allow(&mut self, now: Instant, kind: &'static str) -> Option<String> {
        let kind = self.kinds.entry(kind).or_insert(Kind { since: now, said: 0, unsaid: 0 });
        if now >= kind.since + INTERVAL {
            (kind.since, kind.said) = (now, 0);
        }
        if kind.said == PER_INTERVAL {
            kind.unsaid += 1;
            return None;
        }
        kind.said += 1;
        Some(match std::mem::take(&mut kind.unsaid) {
            0 => String::new(),
            more => format!(" ({more} more since the last such line)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_not_said() {
        let (mut notes, start) = (Notes::default(), Instant::now());
        let said = (0..1000).filter(|_| notes.allow(start, "flood").is_some()).count();
        assert_eq!(said, PER_INTERVAL as usize);
        assert!(notes.allow(start, "another").is_some(), "each kind by itself");
        let later = start + INTERVAL;
        let more = notes.allow(later, "flood").unwrap();
        assert_eq!(more, format!(" ({} more since the last such line)", 1000 - PER_INTERVAL));
        assert_eq!(notes.allow(later, "flood").unwrap(), "");
    }
}
