// SPDX-License-Identifier: BSD-3-Clause
//! Messages that a crowd of clients could cause are logged once a minute, with the
//! number of those that were not.

use crate::session::Millis;

const INTERVAL: Millis = 60_000;

/// Lets one message through in a minute.
#[derive(Debug, Default)]
pub struct Valve {
    last: Option<Millis>,
    held_back: u64,
}

impl Valve {
    /// Whether a message may be logged now, and then what to append to it.
    pub fn open(&mut self, now: Millis) -> Option<String> {
        if self.last.is_some_and(|last| now < last + INTERVAL) {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
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
    fn one_message_a_minute_and_the_others_counted() {
        let mut valve = Valve::default();
        assert_eq!(valve.open(5).as_deref(), Some(""));
        assert_eq!(valve.open(6), None);
        assert_eq!(valve.open(60_004), None);
        let text = valve.open(60_005).unwrap();
        assert_eq!(text, " (2 more since the last such line)");
        assert_eq!(valve.open(200_000).as_deref(), Some(""));
    }
}
