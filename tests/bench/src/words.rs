// SPDX-License-Identifier: BSD-3-Clause
//! Figures as the report's tables have them.

use crate::contender::Contender;
use crate::results::{Kind, Measured};
use crate::stats::Estimate;

/// A thread that is awake for so much of the time is what limits.
const SATURATED: f64 = 0.9;

/// The median of a figure, or that the contender fails.
pub fn show(
    measured: &Measured,
    who: Contender,
    what: Kind,
    format: impl Fn(f64) -> String,
) -> String {
    match measured.of(who, what) {
        Some(estimate) => format(estimate.median),
        None if measured.failure(who).is_some() => "fails".to_owned(),
        None => "–".to_owned(),
    }
}

/// A ratio and its interval.
pub fn interval(ratio: Option<Estimate>) -> String {
    let Some(Estimate { median, low, high, level }) = ratio else { return "–".to_owned() };
    match level {
        level if level >= 0.95 => format!("{median:.2} [{low:.2}, {high:.2}]"),
        // Few turns promise less, and one promises nothing.
        level if level > 0.0 => {
            format!("{median:.2} [{low:.2}, {high:.2} at {:.0} %]", level * 100.0)
        }
        _ => format!("{median:.2}"),
    }
}

/// Three digits that count, or all before the point.
pub fn rounded(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// How much of the time server and client were awake.
pub fn awake(measured: &Measured, who: Contender) -> String {
    let server = measured.of(who, |figures| figures.server);
    let client = measured.of(who, |figures| figures.client);
    server.zip(client).map_or("–".to_owned(), |(server, client)| {
        format!("{:.0} %, {:.0} %", server.median * 100.0, client.median * 100.0)
    })
}

/// What limits a contender.
pub fn bound(measured: &Measured, who: Contender) -> &'static str {
    let saturated = |what| measured.of(who, what).is_some_and(|part| part.median >= SATURATED);
    match (saturated(|figures| figures.server), saturated(|figures| figures.client)) {
        (true, false) => "server",
        (false, true) => "client",
        (true, true) => "both",
        (false, false) => "neither",
    }
}

/// Characters that a list has room for.
const ROOM: usize = 160;

/// The beginning of a text, without its line breaks, as a list has room for. All of it stands
/// with the figures.
pub fn one_line(text: &str) -> String {
    let line = text.lines().map(str::trim).collect::<Vec<_>>().join(" / ");
    match line.char_indices().nth(ROOM) {
        Some((end, _)) => format!("{} …", line[..end].trim_end()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_shows_the_beginning_of_a_long_text() {
        assert_eq!(one_line("said:\n  no\n"), "said: / no");
        let long = one_line(&"é".repeat(ROOM + 1));
        assert_eq!(long, "é".repeat(ROOM) + " …");
        assert_eq!(one_line(&"é".repeat(ROOM)), "é".repeat(ROOM));
    }
}
