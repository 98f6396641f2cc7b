// SPDX-License-Identifier: BSD-3-Clause
//! How `top` shows what there is: totals above, clients below, as many columns as there is room
//! for.

use super::model::{Model, Row};
use ratatui::Frame;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};
use std::convert::Infallible;
use std::time::Instant;

/// Lines of totals.
const TOTALS: u16 = 7;

/// A column: its heading, its width, whether numbers stand at its right end, and its text.
struct Column(&'static str, u16, bool, fn(&Row) -> String);

/// The columns, the most telling first.
const COLUMNS: [Column; 13] = [
    Column("ID", 6, true, |row| row.client.id.map_or_else(|| "-".into(), |id| id.to_string())),
    Column("ADDRESS", 21, false, |row| row.client.addr.clone()),
    Column("WAITS FOR", 21, false, |row| row.client.waits_for.clone()),
    Column("SINCE", 6, true, |row| span(row.client.waits_ms)),
    Column("IN/s", 6, true, |row| number(row.received)),
    Column("OUT/s", 6, true, |row| number(row.sent)),
    Column("SEND%", 5, true, |row| share(row.client.send_window)),
    Column("RECV%", 5, true, |row| share(row.client.receive_window)),
    Column("UNREAD", 6, true, |row| number(Some(row.client.unread as f64))),
    Column("FLIGHT", 6, true, |row| row.client.in_flight.to_string()),
    Column("MEMORY", 6, true, |row| number(Some(row.client.buffers as f64))),
    Column("STATE", 11, false, |row| row.client.state.clone()),
    Column("DEVICE", 10, false, |row| row.client.device.clone()),
];

/// Draws all of it. `keys` is whether somebody can press them.
pub fn draw(frame: &mut Frame, model: &Model, keys: bool, now: Instant) {
    let foot = u16::from(keys);
    let [head, table, foot] = Layout::vertical([
        Constraint::Length(TOTALS + 1),
        Constraint::Min(0),
        Constraint::Length(foot),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(totals(model, now)), head);
    clients(frame, model, table);
    if keys {
        frame.render_widget(Paragraph::new(footer(model)), foot);
    }
}

/// One frame as plain text: as many lines as it takes.
///
/// # Errors
/// None: memory takes all.
pub fn plain(model: &Model, width: u16, now: Instant) -> Result<String, Infallible> {
    let lines = u16::try_from(model.rows().len()).unwrap_or(u16::MAX);
    // A heading above the clients.
    let height = lines.saturating_add(TOTALS + 2);
    let mut terminal = Terminal::new(TestBackend::new(width, height))?;
    terminal.draw(|frame| draw(frame, model, false, now))?;
    let buffer = terminal.backend().buffer();
    let line = |cells: &[ratatui::buffer::Cell]| {
        let text: String = cells.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.trim_end().to_owned() + "\n"
    };
    Ok(buffer.content().chunks(usize::from(width)).map(line).collect())
}

fn bold(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().add_modifier(Modifier::BOLD))
}

fn warning(text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), Style::new().fg(Color::Red).add_modifier(Modifier::BOLD))
}

/// What all connections come to.
fn totals(model: &Model, now: Instant) -> Vec<Line<'static>> {
    let mut title = vec![bold(format!("valkey-rdma top  {}", model.server))];
    let Some(reading) = model.reading() else {
        return vec![Line::from(title), state(model, now)];
    };
    let info = &reading.info;
    let text = |name: &str| info.text(name).unwrap_or("?").to_owned();
    let count = |name: &str| info.number(name).unwrap_or_default();
    let rate = |names: &[&str]| number(model.rate(names));
    title.push(Span::raw(format!("  module {} on {}", text("version"), text("line"))));
    let some = |what: &str, counters: &[&str]| {
        let sum: u64 = counters.iter().map(|name| count(name)).sum();
        let text = format!("  {what} {sum}");
        if sum > 0 { warning(text) } else { Span::raw(text) }
    };
    let limit = |name: &str| {
        let most = info.limit(name).and_then(|(_, most)| most);
        most.map_or_else(|| String::from("none"), |most| number(Some(most as f64)))
    };
    let devices: Vec<_> = info
        .devices()
        .map(|device| {
            let name = device.text("name").unwrap_or("?");
            format!("{name} ({})", device.number("connections").unwrap_or_default())
        })
        .collect();
    let memory = format!(
        "Memory       registered {}  limit {}  memlock {}  devices {}",
        number(Some(count("registered_bytes") as f64)),
        limit("limit_registered_bytes"),
        limit("limit_locked_bytes"),
        devices.join(" "),
    );
    let waits: Vec<_> = model
        .waits()
        .into_iter()
        .map(|(what, count, longest)| format!("{count} {what} ({})", span(longest)))
        .collect();
    vec![
        Line::from(title),
        state(model, now),
        Line::from(format!(
            "Connections  {} established  {} handshaking  {} lingering  {} ending  {}/s new",
            count("connections_established"),
            count("connections_handshaking"),
            count("connections_lingering"),
            count("connections_ending"),
            rate(&["connections_accepted"]),
        )),
        Line::from(format!(
            "Traffic      in {}B/s out {}B/s  reads {}/s writes {}/s, io {}/s",
            rate(&["bytes_received"]),
            rate(&["bytes_sent"]),
            rate(&["reads_main", "reads_io"]),
            rate(&["writes_main", "writes_io"]),
            rate(&["reads_io", "writes_io"]),
        )),
        Line::from(vec![
            Span::raw(format!(
                "Held back    stalls for window {}/s  for staging {}/s",
                rate(&["window_stalls"]),
                rate(&["staging_stalls"]),
            )),
            some("windows full now", &["connections_window_full"]),
        ]),
        Line::from(vec![
            Span::raw("Faults     "),
            some("refused", &["connections_refused"]),
            some("violations", &["violations"]),
            some("failed", &["error_completions", "posts_failed", "poll_failures"]),
            some("lost", &["devices_lost", "queues_lost"]),
            some("nudges", &["watchdog_nudges"]),
        ]),
        Line::from(memory),
        Line::from(format!("Waits for    {}", waits.join("  "))),
    ]
}

/// Whether what is shown is what there is.
fn state(model: &Model, now: Instant) -> Line<'static> {
    let age = model.age(now).map(|age| age.as_millis() as u64);
    let every = format!("{:.1} s", model.interval.as_secs_f64());
    match (model.failure(), age) {
        (Some(failure), age) => {
            let age = age.map_or_else(String::new, |age| format!(", last read {} ago", span(age)));
            Line::from(warning(format!("AWAY, tried every {every}{age}: {failure}")))
        }
        (None, _) if model.paused => Line::from(bold("PAUSED")),
        (None, Some(_)) => {
            let link = model.reading().and_then(|reading| reading.info.map("primary_link"));
            let link = link.and_then(|link| link.text("transport"));
            let link = link.map_or_else(String::new, |it| format!("  link to the primary: {it}"));
            Line::from(format!("read every {every}{link}"))
        }
        (None, None) => Line::from("asking…"),
    }
}

fn clients(frame: &mut Frame, model: &Model, area: ratatui::layout::Rect) {
    let mut left = area.width;
    let shown = COLUMNS.iter().take_while(|Column(_, width, ..)| {
        let fits = left >= *width;
        left = left.saturating_sub(width + 1);
        fits
    });
    let shown: Vec<_> = shown.collect();
    let aligned = |text: String, Column(_, width, right, _): &Column| {
        let width = usize::from(*width);
        // The end of an address tells more than its beginning.
        let excess = text.chars().count().saturating_sub(width);
        let text: String = text.chars().skip(excess).collect();
        Cell::from(if *right { format!("{text:>width$}") } else { text })
    };
    let heading = shown.iter().map(|column| aligned(column.0.to_owned(), column));
    let heading = TableRow::new(heading).style(Style::new().add_modifier(Modifier::REVERSED));
    let rows = model.rows();
    let most = rows.len().saturating_sub(usize::from(area.height.saturating_sub(1)));
    let rows = rows.iter().skip(model.skipped.min(most)).map(|row| {
        let cells = shown.iter().map(|column| aligned((column.3)(row), column));
        let style = match row.client.waits_for.as_str() {
            "nothing" => Style::new(),
            _ if row.client.waits_ms >= 1000 => Style::new().fg(Color::Red),
            _ => Style::new().fg(Color::Yellow),
        };
        TableRow::new(cells).style(style)
    });
    let widths = shown.iter().map(|Column(_, width, ..)| Constraint::Length(*width));
    frame.render_widget(Table::new(rows, widths).header(heading).column_spacing(1), area);
}

fn footer(model: &Model) -> Line<'static> {
    if model.typing {
        return Line::from(format!("filter: {}_   (Enter keeps it, Esc drops it)", model.filter));
    }
    let filter = match model.filter.as_str() {
        "" => String::new(),
        filter => format!(" ({filter})"),
    };
    let order = if model.reverse { ", reversed" } else { "" };
    Line::from(format!(
        "q quit  p pause  s sort ({}{order})  r reverse  / filter{filter}  arrows scroll",
        model.sort.text()
    ))
}

/// A number in at most six characters, with a prefix of 1000.
fn number(value: Option<f64>) -> String {
    let Some(mut value) = value else { return String::from("-") };
    for unit in ["", "k", "M", "G", "T", "P"] {
        if value < 999.5 {
            let digits = usize::from(!unit.is_empty() && value < 99.95);
            return format!("{value:.digits$}{unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.0}E")
}

/// A time in at most six characters.
fn span(milliseconds: u64) -> String {
    let seconds = milliseconds as f64 / 1e3;
    match seconds {
        _ if seconds < 1.0 => format!("{milliseconds}ms"),
        _ if seconds < 99.95 => format!("{seconds:.1}s"),
        _ if seconds < 5997.0 => format!("{:.1}m", seconds / 60.0),
        _ if seconds < 359_820.0 => format!("{:.1}h", seconds / 3600.0),
        _ => format!("{:.0}d", seconds / 86400.0),
    }
}

/// How much of a window is filled.
fn share((filled, size): (u64, u64)) -> String {
    match size {
        0 => String::from("-"),
        size => (filled.min(size) * 100 / size).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::tests::example;
    use super::*;
    use crate::monitor::{Failure, Reason};
    use std::time::Duration;

    fn frame(model: &Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        let now = Instant::now() + Duration::from_secs(3);
        terminal.draw(|frame| draw(frame, model, true, now)).unwrap();
        let cells = terminal.backend().buffer().content();
        let lines = cells.chunks(usize::from(width));
        let lines = lines.map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>());
        lines.map(|line| line.trim_end().to_owned()).collect()
    }

    #[test]
    fn a_frame_fits_into_eighty_by_twenty_four() {
        let lines = frame(&example(), 80, 24);
        let wanted = [
            "valkey-rdma top  db.example over TCP  module 0.1.0 on 9.1",
            "read every 2.0 s  link to the primary: tcp",
            "Connections  3 established  1 handshaking  0 lingering  0 ending  0/s new",
            "Traffic      in 1.0MB/s out 0B/s  reads 120/s writes 120/s, io 240/s",
            "Held back    stalls for window 120/s  for staging 0/s  windows full now 1",
            "Faults       refused 2  violations 1  failed 0  lost 0  nudges 0",
            "Memory       registered 2.1M  limit 4.2M  memlock none  devices mlx5_0 (4)",
            "Waits for    1 client's window (5.9s)  1 client's announcement (12ms)  1 I/O thr",
            "    ID ADDRESS               WAITS FOR              SINCE   IN/s  OUT/s SEND%",
            "     7 192.0.2.7:36944       client's window         5.9s      0      0   100",
            "     - 192.0.2.7:40004       client's announcement   12ms      -      -     0",
            "    12 192.0.2.7:40001       I/O thread               3ms   1.0M      0     0",
            "     3 192.0.2.7:40003       nothing                61.7m      0      0     0",
        ];
        let keys = "q quit  p pause  s sort (wait)  r reverse  / filter  arrows scroll";
        assert_eq!(lines[..wanted.len()], wanted, "{}", lines.join("\n"));
        assert!(lines[wanted.len()..23].iter().all(String::is_empty), "{lines:?}");
        assert_eq!(lines[23], keys);
    }

    #[test]
    fn numbers_and_times_are_short() {
        for (value, text) in
            [(0.0, "0"), (999.4, "999"), (999.6, "1.0k"), (99_960.0, "100k"), (1.048e6, "1.0M")]
        {
            assert_eq!(number(Some(value)), text);
        }
        for (time, text) in [(999, "999ms"), (5865, "5.9s"), (99_960, "1.7m"), (3_700_000, "61.7m")]
        {
            assert_eq!(span(time), text);
        }
        for time in (0..42).map(|power| 1_u64 << power) {
            assert!(span(time).len() <= 6, "{}", span(time));
        }
        assert_eq!(
            (share((1, 3)), share((0, 0)), share((9, 3))),
            ("33".into(), "-".into(), "100".into())
        );
    }

    #[test]
    fn a_server_that_is_away_is_told() {
        let mut model = example();
        let failure = Failure { reason: Reason::Connect, text: String::from("nobody there") };
        model.take(Instant::now(), Err(failure.clone()));
        let lines = frame(&model, 80, 24);
        assert!(lines[1].starts_with("AWAY, tried every 2.0 s, last read "), "{}", lines[1]);
        assert!(lines[1].ends_with(": nobody there"), "{}", lines[1]);
        assert!(lines[9].contains("192.0.2.7:36944"), "what was read is gone: {}", lines[9]);
        let mut model = Model::default();
        model.take(Instant::now(), Err(failure));
        assert!(frame(&model, 80, 24)[1].contains("nobody there"));
    }

    #[test]
    fn clients_scroll_and_no_size_is_too_small() {
        let mut model = example();
        model.skipped = 100;
        let lines = frame(&model, 80, 11);
        assert!(lines[9].contains("12 192.0.2.7:40001") || lines[9].contains("40003"), "{lines:?}");
        for width in 1..12 {
            for height in 1..12 {
                frame(&model, width, height);
            }
        }
        assert!(frame(&model, 200, 24)[8].ends_with("STATE       DEVICE"), "not all columns");
    }

    #[test]
    fn plain_text_has_all_clients_and_no_keys() {
        let text = plain(&example(), 80, Instant::now()).unwrap();
        assert_eq!(text.lines().count(), 8 + 1 + 4, "{text}");
        assert!(!text.contains("quit"), "{text}");
    }
}
