// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma top`: a server's RDMA clients, as top(1) shows processes.

mod model;
mod view;

use crate::monitor::{Access, Failure, Monitor, Reading};
use anyhow::{Context, Result, bail, ensure};
use model::{Model, Sort};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

/// A server's RDMA clients and totals, on the full screen: rates, windows, who waits for what.
///
/// Keys: q quits, p pauses, s sorts by something else, r reverses, / filters, arrows and Page
/// Up and Down scroll.
#[derive(clap::Args)]
pub struct Arguments {
    /// The server; its port is 6379 unless given.
    #[arg(value_name = "HOST[:PORT]")]
    server: String,
    #[command(flatten)]
    access: Access,
    /// Seconds from one reading to the next.
    #[arg(short, long, value_name = "SECONDS", default_value_t = 2.0)]
    interval: f64,
    /// Prints one frame as plain text, and ends. Rates are those of one interval.
    #[arg(long)]
    once: bool,
    /// By what clients are sorted.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    /// Shows clients only that have this in their address, device, state, role or wait.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
}

/// The shortest interval.
const SHORTEST: Duration = Duration::from_millis(100);
/// How long keys and readings may wait to be seen.
const TURN: Duration = Duration::from_millis(50);
/// Columns where nobody says how many there are.
const WIDTH: u16 = 132;

/// What came of a reading, and when.
type Outcome = (Instant, Result<Reading, Failure>);

/// Shows until it is ended. `Ok(true)` always.
///
/// # Errors
/// If there is no terminal; with `--once`, if the server can't be read.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let interval = Duration::try_from_secs_f64(arguments.interval).ok();
    let interval = interval.filter(|interval| *interval >= SHORTEST);
    let interval = interval
        .with_context(|| format!("--interval {}: not a time of 0.1 or more", arguments.interval))?;
    let monitor = Monitor::new(&arguments.server, &arguments.access, true)?;
    let mut model = Model::default();
    model.server = format!("{} over {}", monitor.address(), monitor.carrier());
    (model.interval, model.sort) = (interval, arguments.sort);
    model.filter.clone_from(&arguments.filter);
    if arguments.once {
        return once(&monitor, &mut model).map(|()| true);
    }
    ensure!(
        std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
        "this is no terminal; --once prints a frame as text"
    );
    let ended = Arc::new(AtomicBool::new(false));
    let by_signal = Arc::clone(&ended);
    ctrlc::set_handler(move || by_signal.store(true, Ordering::Relaxed)).context("signals")?;
    let paused = Arc::new(AtomicBool::new(false));
    let readings = read(monitor, interval, Arc::clone(&paused));
    // Sets the hook that gives the terminal back before a panic's text as well.
    let mut terminal = ratatui::try_init().context("the terminal")?;
    let shown = show(&mut terminal, &mut model, &readings, &paused, &ended);
    ratatui::restore();
    shown.map(|()| true)
}

/// Two readings, for rates, and one frame.
fn once(monitor: &Monitor, model: &mut Model) -> Result<()> {
    for round in 0..2 {
        if round > 0 {
            std::thread::sleep(model.interval);
        }
        let outcome = monitor.read(None);
        if let Err(failure) = &outcome {
            bail!("{failure}");
        }
        model.take(Instant::now(), outcome);
    }
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let of_terminal = || match std::io::stdout().is_terminal() {
        true => terminal::size().ok().map(|(columns, _)| columns),
        false => None,
    };
    let width = said.or_else(of_terminal).unwrap_or(WIDTH);
    let text = view::plain(model, width.clamp(1, 1000), Instant::now())?;
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Reads in a thread of its own, so that keys are answered while a server is not.
fn read(monitor: Monitor, interval: Duration, paused: Arc<AtomicBool>) -> Receiver<Outcome> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let next = Instant::now() + interval;
            if !paused.load(Ordering::Relaxed) {
                let outcome = monitor.read(None);
                if sender.send((Instant::now(), outcome)).is_err() {
                    return;
                }
            }
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    });
    receiver
}

fn show(
    terminal: &mut DefaultTerminal,
    model: &mut Model,
    readings: &Receiver<Outcome>,
    paused: &AtomicBool,
    ended: &AtomicBool,
) -> Result<()> {
    while !ended.load(Ordering::Relaxed) {
        loop {
            match readings.try_recv() {
                // One that was under way when the pause began.
                Ok(_) if model.paused => {}
                Ok((at, outcome)) => model.take(at, outcome),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => bail!("nothing is read any more"),
            }
        }
        terminal.draw(|frame| view::draw(frame, model, true, Instant::now()))?;
        if event::poll(TURN)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
            && !press(model, key)
        {
            return Ok(());
        }
        paused.store(model.paused, Ordering::Relaxed);
    }
    Ok(())
}

/// What a key does. `false` if it ends.
fn press(model: &mut Model, key: KeyEvent) -> bool {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return key.code != KeyCode::Char('c');
    }
    if model.typing {
        match key.code {
            KeyCode::Char(letter) => model.filter.push(letter),
            KeyCode::Backspace => drop(model.filter.pop()),
            KeyCode::Enter => model.typing = false,
            KeyCode::Esc => {
                model.typing = false;
                model.filter.clear();
            }
            _ => {}
        }
        return true;
    }
    let most = model.rows().len().saturating_sub(1);
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('p' | ' ') => model.paused = !model.paused,
        KeyCode::Char('s') => model.sort = model.sort.next(),
        KeyCode::Char('r') => model.reverse = !model.reverse,
        KeyCode::Char('/') => {
            model.typing = true;
            model.filter.clear();
        }
        KeyCode::Up | KeyCode::Char('k') => model.skipped = model.skipped.saturating_sub(1),
        KeyCode::Down | KeyCode::Char('j') => model.skipped = (model.skipped + 1).min(most),
        KeyCode::PageUp => model.skipped = model.skipped.saturating_sub(10),
        KeyCode::PageDown => model.skipped = (model.skipped + 10).min(most),
        KeyCode::Home => model.skipped = 0,
        KeyCode::End => model.skipped = most,
        _ => {}
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn type_keys(model: &mut Model, keys: &[KeyCode]) -> bool {
        keys.iter().all(|key| press(model, KeyEvent::from(*key)))
    }

    #[test]
    fn keys_do_what_the_last_line_says() {
        let mut model = model::tests::example();
        let letters = |text: &str| text.chars().map(KeyCode::Char).collect::<Vec<_>>();
        assert!(type_keys(&mut model, &letters("ppsr")));
        assert!((!model.paused, model.sort, model.reverse) == (true, Sort::In, true));
        // While a filter is typed a q is a letter.
        assert!(type_keys(&mut model, &letters("/q7")));
        assert!(type_keys(&mut model, &[KeyCode::Backspace, KeyCode::Enter]));
        assert_eq!((model.filter.as_str(), model.typing), ("q", false));
        assert!(type_keys(&mut model, &[KeyCode::Char('/'), KeyCode::Esc]));
        assert_eq!(model.filter, "");
        assert!(type_keys(&mut model, &[KeyCode::Down; 9]));
        assert_eq!(model.skipped, 3, "beyond the last client");
        assert!(type_keys(&mut model, &[KeyCode::PageUp]) && model.skipped == 0);
        assert!(!type_keys(&mut model, &letters("q")));
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        model.typing = true;
        assert!(!press(&mut model, interrupt));
    }
}
