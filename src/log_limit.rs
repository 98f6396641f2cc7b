// SPDX-License-Identifier: BSD-3-Clause
//! A limit on repeated log lines.
//!
//! Whatever a client, a device or a fault of ours causes can repeat, and a line each time would
//! fill the disk. So each line that is not the answer to an operator's action goes through a
//! [`LogLimiter`] (`tests/log_lines.rs` checks), except at the level *debug*.

use log::Level;
use proto::session::Millis;
use std::fmt;

const INTERVAL: Millis = 60_000;

/// Logs up to a number of messages in a minute, and counts the others.
#[derive(Debug)]
pub struct LogLimiter {
    per_minute: u32,
    /// Start of the current minute.
    begun: Option<Millis>,
    logged: u32,
    suppressed: u64,
}

impl LogLimiter {
    /// A limit of `per_minute` messages.
    pub const fn new(per_minute: u32) -> Self {
        Self { per_minute, begun: None, logged: 0, suppressed: 0 }
    }

    /// Logs a message, unless the limit is reached; the next line that is logged then ends with
    /// the number of those that were not.
    pub fn log(&mut self, now: Millis, level: Level, message: fmt::Arguments<'_>) {
        if let Some(more) = self.allow(now) {
            log::log!(level, "{message}{more}");
        }
    }

    /// What to append to a message that may be logged at `now`; `None` if it may not.
    fn allow(&mut self, now: Millis) -> Option<String> {
        if self.begun.is_none_or(|begun| now >= begun + INTERVAL) {
            self.begun = Some(now);
            self.logged = 0;
        }
        if self.logged == self.per_minute {
            self.suppressed += 1;
            return None;
        }
        self.logged += 1;
        Some(match std::mem::take(&mut self.suppressed) {
            0 => String::new(),
            more => format!(" ({more} more since the last such line)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_beyond_the_limit_are_counted() {
        let mut limit = LogLimiter::new(2);
        assert_eq!(limit.allow(5).as_deref(), Some(""));
        assert_eq!(limit.allow(6).as_deref(), Some(""));
        assert_eq!(limit.allow(7), None);
        assert_eq!(limit.allow(60_004), None);
        let text = limit.allow(60_005).unwrap();
        assert_eq!(text, " (2 more since the last such line)");
        assert_eq!(limit.allow(200_000).as_deref(), Some(""));
    }
}
