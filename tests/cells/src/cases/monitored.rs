// SPDX-License-Identifier: BSD-3-Clause
//! What is told of a server by the command `valkey-rdma`: to Prometheus, and on a screen.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::pattern;

use super::basics::expect;
use super::stalled::stall;
use crate::cell::{Case, Cell};
use crate::info::Info;
use crate::process::{Process, run};
use crate::server::free_port;

pub const CASES: &[Case] = &[Case::new("exporter", exporter), Case::new("top", top)];

/// The page of one scrape: the values by series, and the names of counters.
struct Page {
    text: String,
    values: BTreeMap<String, f64>,
    counters: BTreeSet<String>,
}

impl Page {
    fn parse(text: String) -> Result<Self> {
        let mut page = Self { text, values: BTreeMap::new(), counters: BTreeSet::new() };
        for line in page.text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').context("a TYPE line")?;
                if kind == "counter" {
                    page.counters.insert(name.to_owned());
                }
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').context("a line without a value")?;
                let value = value.parse().with_context(|| format!("the line '{line}'"))?;
                let double = page.values.insert(series.to_owned(), value);
                ensure!(double.is_none(), "{series} is there twice");
            }
        }
        Ok(page)
    }

    fn value(&self, series: &str) -> Result<f64> {
        let value = self.values.get(series).copied();
        value.with_context(|| format!("no {series} in:\n{}", self.text))
    }

    fn is(&self, series: &str, wanted: f64) -> Result<()> {
        let value = self.value(series)?;
        ensure!(value == wanted, "{series} is {value}, not {wanted}, in:\n{}", self.text);
        Ok(())
    }

    /// That the server is told to be away, for this reason and no other.
    fn is_down(&self, reason: &str) -> Result<()> {
        self.is("valkey_rdma_up", 0.0)?;
        for other in ["connect", "auth", "timeout", "not_loaded", "answer"] {
            let series = format!("valkey_rdma_exporter_scrape_error{{reason=\"{other}\"}}");
            self.is(&series, f64::from(u8::from(other == reason)))?;
        }
        ensure!(!self.text.contains("valkey_rdma_connections"), "values all the same");
        Ok(())
    }
}

/// What a page has; it has to be there.
fn get(address: SocketAddr, path: &str, wait: Option<f64>) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address)?;
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit)?;
    let wait = wait.map(|wait| format!("X-Prometheus-Scrape-Timeout-Seconds: {wait}\r\n"));
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{}\r\n", wait.unwrap_or_default())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer of HTTP")?;
    Ok((head.to_owned(), body.to_owned()))
}

fn scrape(address: SocketAddr, wait: Option<f64>) -> Result<Page> {
    let (head, body) = get(address, "/metrics", wait)?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    ensure!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    Page::parse(body)
}

/// One number of a field of INFO, where it is to be found on the page.
struct Row {
    field: String,
    part: String,
    series: String,
}

impl Row {
    fn number(&self, info: &Info) -> Result<Option<f64>> {
        let text = info.text(&self.field)?;
        let text = match self.part.as_str() {
            "(now)" => text.split('/').next().unwrap_or_default(),
            "(most)" => text.split('/').nth(1).unwrap_or_default(),
            _ => text,
        };
        if text == "none" {
            return Ok(None);
        }
        let number: f64 = text.parse().with_context(|| format!("{}: {text}", self.field))?;
        Ok(Some(if self.part == "(ms)" { number / 1000.0 } else { number }))
    }
}

/// What the exporter says becomes of each field; and the fields that are no number, or left out.
fn table(program: &Path, folder: &Path, patience: Duration) -> Result<(Vec<Row>, Vec<String>)> {
    let listed = run(Command::new(program).args(["exporter", "--list"]), b"", folder, patience)?;
    let (mut rows, mut others) = (Vec::new(), Vec::new());
    for line in listed.text().lines() {
        let columns: Vec<_> = line.split('\t').collect();
        let [field, series, meaning] = columns[..] else { anyhow::bail!("'{line}'") };
        ensure!(meaning.len() > 5, "without a meaning: '{line}'");
        let (field, part) = field.split_once(' ').unwrap_or((field, ""));
        match (field, series) {
            ("-", _) => {}
            (_, "-") => others.push(field.to_owned()),
            _ => rows.push(Row { field: field.into(), part: part.into(), series: series.into() }),
        }
    }
    Ok((rows, others))
}

/// That the values are those of INFO: between two answers, of what moves.
fn compare(page: &Page, rows: &[Row], before: &Info, after: &Info) -> Result<usize> {
    let mut moved = 0;
    for row in rows {
        let (Some(low), Some(high)) = (row.number(before)?, row.number(after)?) else {
            ensure!(!page.values.contains_key(&row.series), "{} is there", row.series);
            continue;
        };
        let value = page.value(&row.series)?;
        let counter = page.counters.contains(row.series.split('{').next().unwrap_or_default());
        // A gauge may have been anything between, unless nothing goes on.
        if counter || low == high {
            let (field, series) = (&row.field, &row.series);
            ensure!(
                (low..=high).contains(&value),
                "{series} is {value}, {field} {low} before it and {high} after it"
            );
        }
        moved += usize::from(counter && value > 0.0);
    }
    Ok(moved)
}

fn exporter(cell: &mut Cell) -> Result<()> {
    let program = cell.lab.program("valkey-rdma")?;
    let (folder, patience) = (cell.folder().to_owned(), cell.lab.patience());
    let server = cell.server().tcp_address().to_string();
    let own = SocketAddr::new([127, 0, 0, 1].into(), free_port()?);
    let listen = own.to_string();
    let mut process = Process::spawn(
        Command::new(&program)
            .args(["exporter", "--server", &server, "--listen", &listen])
            .args(["--client-series", "2"])
            .stderr(std::fs::File::create(folder.join("exporter"))?)
            .stdout(Stdio::null()),
    )?;
    let deadline = Instant::now() + patience;
    while TcpStream::connect(own).is_err() {
        ensure!(process.status()?.is_none() && Instant::now() < deadline, "it does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (head, body) = get(own, "/", None)?;
    ensure!(head.starts_with("HTTP/1.1 200") && body.contains("href=\"/metrics\""), "{body}");
    ensure!(get(own, "/other", None)?.0.starts_with("HTTP/1.1 404"), "a page that is not there");

    // Every field that this server has is told of, or said to be left out.
    let (rows, others) = table(&program, &folder, patience)?;
    let info = cell.info()?;
    let listed: BTreeSet<_> =
        rows.iter().map(|row| &row.field).chain(&others).map(String::as_str).collect();
    for (field, _) in info.all("rdma_") {
        let device = field.strip_prefix("rdma_device").is_some_and(|it| it.parse::<u8>().is_ok());
        ensure!(device || listed.contains(field), "{field} is no metric, and not left out");
    }

    // Under load: what only grows lies between what INFO says before and after it, and grows.
    let traffic = cell.traffic(4, 5000)?;
    let mut last: Option<Page> = None;
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(100));
        let before = cell.info()?;
        let page = scrape(own, None)?;
        let moved = compare(&page, &rows, &before, &cell.info()?).context("under load")?;
        ensure!(moved > 10, "{moved} counters have counted");
        page.is("valkey_rdma_up", 1.0)?;
        page.is("valkey_rdma_exporter_unknown_fields", 0.0)?;
        page.is("valkey_rdma_client_series_left_out", 2.0)?;
        let series = page.values.keys().filter(|it| it.starts_with("valkey_rdma_client_sent"));
        ensure!(series.count() == 2, "other series of clients:\n{}", page.text);
        if let Some(last) = last {
            let counters = page.values.iter().filter(|(series, _)| {
                let name = series.split('{').next().unwrap_or_default();
                page.counters.contains(name) && !name.starts_with("valkey_rdma_client_")
            });
            for (series, value) in counters {
                let before = last.value(series)?;
                ensure!(*value >= before, "{series} went from {before} to {value}");
            }
            for series in ["valkey_rdma_sent_bytes_total", "valkey_rdma_received_bytes_total"] {
                ensure!(page.value(series)? > last.value(series)?, "{series} does not grow");
            }
        }
        last = Some(page);
    }
    traffic.stop()?;
    cell.moved(100_000, 100);

    // At rest: all of it is the same.
    let mut client = cell.rdma()?;
    expect(&mut client, "PING", "PONG")?;
    let before = cell.wait_info("the traffic's end", |info| {
        let gone = info.number("rdma_connections_ending")? == 0;
        Ok(gone && info.number("rdma_connections_established")? == 1)
    })?;
    let page = scrape(own, None)?;
    compare(&page, &rows, &before, &cell.info()?).context("at rest")?;
    for (total, parts) in [
        ("rdma_connections_refused", "valkey_rdma_connections_refused_total{"),
        ("rdma_violations", "valkey_rdma_violations_total{"),
        ("rdma_error_completions", "valkey_rdma_failed_work_requests_total{"),
    ] {
        let parts = page.values.iter().filter(|(series, _)| series.starts_with(parts));
        let sum: f64 = parts.map(|(_, value)| value).sum();
        ensure!(sum == before.number(total)? as f64, "{total} is not the sum of its parts: {sum}");
    }
    page.is("valkey_rdma_clients_waiting{waits_for=\"nothing\"}", 1.0)?;
    let line = format!("line=\"{}\"", before.text("rdma_line")?);
    ensure!(page.text.contains(&line), "no {line} in:\n{}", page.text);
    let device = before.text("rdma_device0")?.split([',', '=']).nth(1).context("a device")?;
    page.is(&format!("valkey_rdma_device_connections{{device=\"{device}\"}}"), 1.0)?;
    drop(client);
    cell.wait_info("the client's end", |info| {
        Ok(info.number("rdma_connections_established")? == 0)
    })?;

    passwords(cell, &program, own).context("with a password")?;

    // A server that stands still, and one that is away.
    let stopped = cell.server().pause();
    let asked = Instant::now();
    scrape(own, Some(1.0))?.is_down("timeout")?;
    ensure!(asked.elapsed() < patience, "a scrape took {} s", asked.elapsed().as_secs());
    drop(stopped);
    expect(&mut cell.tcp()?, "PING", "PONG")?;
    scrape(own, None)?.is("valkey_rdma_up", 1.0)?;
    let nobody = format!("127.0.0.1:{}", free_port()?);
    let once = ["exporter", "--once", "--server", &nobody];
    let away = run(Command::new(&program).args(once), b"", &folder, patience)?;
    ensure!(away.status.code() == Some(1), "it ends with {}", away.status);
    ensure!(away.stderr.contains("Connection refused"), "it says {}", away.stderr);
    Page::parse(away.text())?.is_down("connect")?;
    ensure!(process.status()?.is_none(), "the exporter has ended");
    process.end(Duration::from_secs(5)).map(drop)
}

/// A server that wants one is not read without, and says so; over both ways, with a file that
/// has it or the environment, it is.
fn passwords(cell: &Cell, program: &Path, own: SocketAddr) -> Result<()> {
    let (folder, patience) = (cell.folder().to_owned(), cell.lab.patience());
    let mut operator = cell.tcp()?;
    expect(&mut operator, "ACL SETUSER watcher on >hidden +@rdma +info", "OK")?;
    expect(&mut operator, "CONFIG SET requirepass secret", "OK")?;
    expect(&mut operator, "AUTH secret", "OK")?;
    let page = scrape(own, None)?;
    page.is_down("auth")?;
    ensure!(page.text.contains("NOAUTH"), "it does not say what the server says:\n{}", page.text);

    let file = folder.join("password");
    std::fs::write(&file, "hidden\n")?;
    let file = file.to_str().context("a path of UTF-8")?;
    let once = |more: &[&str], password: &str| -> Result<(Page, Option<i32>)> {
        let mut command = Command::new(program);
        command.args(["exporter", "--once"]).args(more).env("VALKEY_PASSWORD", password);
        let done = run(&mut command, b"", &folder, patience)?;
        Ok((Page::parse(done.text())?, done.status.code()))
    };
    let (tcp, rdma) = (cell.server().tcp_address(), cell.server().rdma_address());
    let (tcp, rdma) = (tcp.to_string(), rdma.to_string());
    for (more, password, clients) in [
        (&["--server", &tcp][..], "secret", 0.0),
        (&["--server", &tcp, "--user", "watcher", "--password-file", file], "wrong", 0.0),
        (&["--server", &rdma, "--rdma", "--user", "watcher", "--password-file", file], "", 1.0),
    ] {
        let (page, code) = once(more, password)?;
        page.is("valkey_rdma_up", 1.0).with_context(|| format!("{more:?}"))?;
        ensure!(code == Some(0), "it ends with {code:?}");
        page.is("valkey_rdma_connections{state=\"established\"}", clients)?;
    }
    let (page, code) = once(&["--server", &tcp], "wrong")?;
    page.is_down("auth")?;
    ensure!(code == Some(1), "it ends with {code:?}");
    let reply = operator.command(&[b"CONFIG", b"SET", b"requirepass", b""])?.text();
    ensure!(reply == "OK", "{reply}");
    Ok(())
}

/// One client that does not read, one whose turn it is, one that is busy.
fn top(cell: &mut Cell) -> Result<()> {
    let program = cell.lab.program("valkey-rdma")?;
    let (folder, patience) = (cell.folder().to_owned(), cell.lab.patience());
    let server = cell.server().tcp_address().to_string();
    cell.tcp()?.command(&[b"SET", b"big", &pattern::value(7, 4 << 20)])?;
    let mut stalled = cell.rdma()?;
    stall(cell, &mut stalled, &[b"GET", b"big"])?;
    let mut idle = cell.rdma()?;
    expect(&mut idle, "PING", "PONG")?;
    let traffic = cell.traffic(1, 1000)?;
    let once = |more: &[&str], columns: &str| -> Result<String> {
        let mut command = Command::new(&program);
        command.args(["top", &server, "--once", "--interval", "0.5"]).args(more);
        let done = run(command.env("COLUMNS", columns), b"", &folder, patience)?;
        ensure!(done.status.success(), "{} {}", done.status, done.stderr);
        Ok(done.text())
    };
    let text = once(&[], "80")?;
    ensure!(text.lines().all(|line| line.chars().count() <= 80), "a wide line:\n{text}");
    ensure!(text.contains("3 established"), "other connections:\n{text}");
    ensure!(text.contains("windows full now 1"), "no full window:\n{text}");
    let rows: Vec<_> = text.lines().skip_while(|line| !line.contains("ADDRESS")).skip(1).collect();
    ensure!(rows.len() == 3, "{} clients:\n{text}", rows.len());
    // It has waited longest, its window is full, and nothing is sent to it.
    let first: Vec<_> = rows[0].split_whitespace().collect();
    ensure!(rows[0].contains("client's window"), "the stalled one is not the first:\n{text}");
    ensure!(first[first.len() - 3..] == ["0", "0", "100"], "of the stalled one:\n{text}");
    let moves = |row: &str| {
        let columns: Vec<_> = row.split_whitespace().collect();
        columns[columns.len() - 3] != "0"
    };
    let moving = rows.iter().filter(|row| moves(row)).count();
    ensure!(moving == 1, "{moving} clients send something:\n{text}");
    let busiest = once(&["--sort", "in"], "80")?;
    let first = busiest.lines().skip_while(|line| !line.contains("ADDRESS")).nth(1);
    ensure!(first.is_some_and(moves), "the busy one is not the first:\n{busiest}");
    let filtered = once(&["--filter", "window"], "200")?;
    let heading =
        filtered.lines().position(|line| line.contains("ADDRESS")).context("a heading")?;
    ensure!(filtered.lines().count() == heading + 2, "more than one client:\n{filtered}");
    ensure!(filtered.contains("DEVICE"), "room for all columns, and not all there:\n{filtered}");
    traffic.stop()?;
    drop((stalled, idle));
    cell.moved(1000, 1 << 20);

    // On a terminal: it leaves the screen as it was, by a key, by Ctrl-C and by a signal, and waits
    // for a server that is away.
    let nobody = format!("127.0.0.1:{}", free_port()?);
    for (address, around, end, shown, code) in [
        (&server, "", "q", "established", 0),
        (&nobody, "", "\\003", "AWAY", 0),
        (&server, "timeout --foreground $PAUSE", "", "established", 124),
    ] {
        let words = format!(
            "(sleep $PAUSE; printf '{end}'; sleep 0.2) | \
             script -qec 'stty cols 80 rows 24; exec {around} {} top {address}' /dev/null",
            program.display()
        );
        // As long as it takes, on a machine that is busy.
        let show = |pause: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", &words]).env("TERM", "xterm").env("PAUSE", pause);
            run(&mut command, b"", &folder, patience)
        };
        let mut done = show("0.6")?;
        if !done.text().contains(shown) {
            done = show("6")?;
        }
        let text = done.text();
        ensure!(done.status.code() == Some(code), "{}: {text}", done.status);
        ensure!(text.contains(shown), "no '{shown}' in {text:?}");
        let (enters, leaves) = (text.find("\x1b[?1049h"), text.rfind("\x1b[?1049l"));
        ensure!(enters.is_some() && enters < leaves, "it does not leave the screen: {text:?}");
    }
    let away =
        run(Command::new(&program).args(["top", &nobody, "--once"]), b"", &folder, patience)?;
    ensure!(away.status.code() == Some(2), "it ends with {}", away.status);
    ensure!(away.stderr.contains("Connection refused"), "it says {}", away.stderr);
    Ok(())
}
