// SPDX-License-Identifier: BSD-3-Clause
//! Messages that a crowd of clients could cause, or a device, or a fault of ours, are logged
//! a few times a minute, with the number of those that were not.
//!
//! Whatever happens can happen again, and a loop that says so each time fills the disk. So
//! everything that is not the answer to something an operator did goes through a valve
//! (`tests/log_lines.rs` looks), except at the level that one has to ask for.

use log::Level;
use proto::session::Millis;
use std::fmt;

const INTERVAL: Millis = 60_000;

/// Lets a number of messages through in a minute.
#[derive(Debug)]
pub struct Valve {
    most: u32,
    begun: Option<Millis>,
    let_through: u32,
    held_back: u64,
}

impl Valve {
    /// A valve for `most` messages in a minute.
    pub const fn new(most: u32) -> Self {
        Self { most, begun: None, let_through: 0, held_back: 0 }
    }

    /// Logs a message, unless there were too many.
    pub fn say(&mut self, now: Millis, level: Level, message: fmt::Arguments<'_>) {
        if let Some(more) = self.open(now) {
            log::log!(level, "{message}{more}");
        }
    }

    /// Whether a message may be logged now, and then what to append to it.
    fn open(&mut self, now: Millis) -> Option<String> {
        if self.begun.is_none_or(|begun| now >= begun + INTERVAL) {
            self.begun = Some(now);
            self.let_through = 0;
        }
        if self.let_through == self.most {
            self.held_back += 1;
            return None;
        }
        self.let_through += 1;
        Some(match std::mem::take(&mut self.held_back) {
            0 => String::new(),
            more => format!(" ({more} more since the last such line)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_messages_a_minute_and_the_others_counted() {
        let mut valve = Valve::new(2);
        assert_eq!(valve.open(5).as_deref(), Some(""));
        assert_eq!(valve.open(6).as_deref(), Some(""));
        assert_eq!(valve.open(7), None);
        assert_eq!(valve.open(60_004), None);
        let text = valve.open(60_005).unwrap();
        assert_eq!(text, " (2 more since the last such line)");
        assert_eq!(valve.open(200_000).as_deref(), Some(""));
    }
}
